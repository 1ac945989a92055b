rule download_dataset:
    """A data set from any source -> tar shards, index, captions."""
    output:
        directory("resources/datasets/{dataset}"),
    log:
        "logs/download/dataset/{dataset}.log",
    benchmark:
        "logs/download/dataset/{dataset}.tsv"
    conda:
        "../../environment.yml"
    resources:
        mem_mb=memory("download_dataset"),
        runtime=dataset_minutes,
    params:
        program=program,
        source=param("download_dataset", "source"),
        options=param("download_dataset", "options"),
        seed=param("download_dataset", "seed"),
        max_skipped=param("download_dataset", "max_skipped"),
        version=param("download_dataset", "version"),
    shell:
        "{params.program} flame.download dataset --source {params.source}"
        " --options {params.options:q} --seed {params.seed} --max-skipped {params.max_skipped}"
        " --out {output} 2>&1 | tee {log}"


rule download_llm:
    """An LLM from any source -> a folder with dense safetensors and a tokenizer."""
    output:
        directory("resources/llms/{llm}"),
    log:
        "logs/download/llm/{llm}.log",
    benchmark:
        "logs/download/llm/{llm}.tsv"
    conda:
        "../../environment.yml"
    resources:
        mem_mb=memory("download_llm"),
        runtime=growing(12 * HOUR),
    params:
        program=program,
        checkpoint=param("download_llm", "checkpoint"),
        reset=param("download_llm", "reset"),
        version=param("download_llm", "version"),
    shell:
        "{params.program} flame.download llm --checkpoint {params.checkpoint:q}"
        " {params.reset} --out {output} 2>&1 | tee {log}"


rule download_tower:
    """A pretrained or released tower -> the format of towers trained here."""
    output:
        directory("resources/towers/{run}"),
    log:
        "logs/download/tower/{run}.log",
    benchmark:
        "logs/download/tower/{run}.tsv"
    conda:
        "../../environment.yml"
    resources:
        mem_mb=memory("download_tower"),
        runtime=growing(2 * HOUR),
    params:
        program=program,
        settings=param("download_tower", "settings"),
    shell:
        "{params.program} flame.download tower --settings {params.settings:q}"
        " --out {output} 2>&1 | tee {log}"
