rule train:
    """Images and stored embeddings -> a visual tower (Eq. 1)."""
    input:
        images=train_images,
        # A store holds more facets than a run uses, and is written anew when any of them changes.
        # This run depends on the words of its own facets, on the LLM and how it is read.
        stores=ancient(train_stores),
        prompts=train_prompts,
        llm=train_llm,
        readout=train_readout,
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
    shell:
        "{params.program} flame.train --images {input.images} --stores {input.stores}"
        " --out {output} --settings {params.settings:q} --threads {threads}"
        " --workers {resources.workers} --cache-mb {resources.cache_mb} 2>&1 | tee {log}"
