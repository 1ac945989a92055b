rule caption:
    """Images of a data set -> long and short captions, by an MLLM or as published."""
    input:
        unpack(inputs("caption")),
    output:
        "results/caption/{captioner}/{dataset}/{part}.parquet",
    log:
        "logs/caption/{captioner}/{dataset}/{part}.log",
    benchmark:
        "logs/caption/{captioner}/{dataset}/{part}.tsv"
    conda:
        "../../environment.yml"
    threads: 1
    resources:
        mem_mb=memory("caption"),
        runtime=growing(24 * HOUR),
        workers=1,
    params:
        program=program,
        settings=param("caption", "settings"),
    shell:
        "{params.program} flame.caption write --images {input.images} --out {output}"
        " --settings {params.settings:q} --threads {threads}"
        " --workers {resources.workers} 2>&1 | tee {log}"


use rule caption as caption_by_vllm with:
    wildcard_constraints:
        captioner=one_of(jobs.captioners_by_vllm(study)),
    conda:
        "../envs/vllm.yml"
    threads: 8
    resources:
        mem_mb=memory("caption"),
        runtime=growing(24 * HOUR),
        workers=4,


ruleorder: caption_by_vllm > caption


rule captions:
    """All parts of a captioner's captions, with the data set's own, and a report of what was bad."""
    input:
        unpack(inputs("captions")),
    output:
        directory("results/captions/{captioner}/{dataset}"),
    log:
        "logs/captions/{captioner}/{dataset}.log",
    conda:
        "../../environment.yml"
    resources:
        mem_mb=memory("captions"),
        runtime=growing(HOUR),
    params:
        program=program,
        settings=param("captions", "settings"),
    shell:
        "{params.program} flame.caption join --images {input.images} --parts {input.parts}"
        " --out {output} --settings {params.settings:q} 2>&1 | tee {log}"
