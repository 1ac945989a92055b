rule train:
    """Images and stored embeddings -> a visual tower (Eq. 1)."""
    input:
        images=train_images,
        stores=train_stores,
        llm=train_llm,
    output:
        directory("results/train/{run}"),
    log:
        "logs/train/{run}.log",
    benchmark:
        "logs/train/{run}.tsv"
    priority: 1
    conda:
        "../../environment.yml"
    threads: 1
    resources:
        mem_mb=2500,
        runtime="24h",
        workers=0,
        cache_mb=1000,
    params:
        program=program,
        settings=train_settings,
        origin=train_origin,
    shell:
        "{params.program} flame.train --images {input.images} --stores {input.stores}"
        " --out {output} --settings {params.settings:q} --threads {threads}"
        " --workers {resources.workers} --cache-mb {resources.cache_mb} 2>&1 | tee {log}"
