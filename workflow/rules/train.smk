rule train:
    """Images and stored embeddings (captions, for a baseline) -> a visual tower (Eq. 1)."""
    input:
        unpack(inputs("train")),
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
        mem_mb=memory("train"),
        runtime=growing(24 * HOUR),
        workers=0,
        cache_mb=1000,
        micro_batch="auto",
        grad_checkpointing="auto",
        compile="none",
        keep_epochs=0,
        profile_steps=0,
    params:
        program=trainer,
        sources=sources,
        validation=validation,
        settings=param("train", "settings"),
        origin=param("train", "origin"),
    shell:
        "{params.program} flame.train --images {input.images} {params.sources}"
        " {params.validation}"
        " --out {output} --settings {params.settings:q} --threads {threads}"
        " --workers {resources.workers} --cache-mb {resources.cache_mb}"
        " --micro-batch {resources.micro_batch} --compile {resources.compile}"
        " --grad-checkpointing {resources.grad_checkpointing}"
        " --keep-epochs {resources.keep_epochs} --profile-steps {resources.profile_steps} 2>&1 | tee {log}"
