rule evaluate:
    """A tower -> all metrics of a bundle of benchmarks, and the hits behind them."""
    input:
        unpack(inputs("evaluate")),
    output:
        metrics="results/evaluate/{run}/{bundle}.json",
        hits="results/evaluate/{run}/{bundle}.parquet",
    log:
        "logs/evaluate/{run}/{bundle}.log",
    benchmark:
        "logs/evaluate/{run}/{bundle}.tsv"
    priority: 2
    conda:
        "../../environment.yml"
    threads: 1
    resources:
        mem_mb=memory("evaluate"),
        runtime=growing(4 * HOUR),
        batch_size=256,
        workers=0,
    params:
        program=program,
        sources=sources,
        settings=param("evaluate", "settings"),
        origin=param("evaluate", "origin"),
    shell:
        "{params.program} flame.evaluate --model {input.model} --datasets {input.datasets}"
        " {params.sources} --out {output.metrics} --hits {output.hits}"
        " --settings {params.settings:q} --threads {threads}"
        " --batch-size {resources.batch_size} --workers {resources.workers} 2>&1 | tee {log}"


rule fewshot:
    """A tower and its LLM -> words of images, and few-shot classification from them (Table C5)."""
    input:
        unpack(inputs("fewshot")),
    output:
        metrics="results/fewshot/{run}/{benchmark}.json",
        hits="results/fewshot/{run}/{benchmark}.parquet",
        words="results/fewshot/{run}/{benchmark}.words.json",
    log:
        "logs/fewshot/{run}/{benchmark}.log",
    benchmark:
        "logs/fewshot/{run}/{benchmark}.tsv"
    priority: 2
    conda:
        "../../environment.yml"
    threads: 1
    resources:
        mem_mb=memory("fewshot"),
        runtime=growing(4 * HOUR),
        batch_size=64,
        workers=0,
    params:
        program=program,
        settings=param("fewshot", "settings"),
        origin=param("fewshot", "origin"),
    shell:
        "{params.program} flame.fewshot --model {input.model} --llm {input.llm}"
        " --dataset {input.dataset} --stores {input.stores} --out {output.metrics}"
        " --hits {output.hits} --words {output.words} --settings {params.settings:q}"
        " --threads {threads} --batch-size {resources.batch_size}"
        " --workers {resources.workers} 2>&1 | tee {log}"


rule knowledge:
    """Embeddings of captions -> what each prompt of an LLM knows of the images."""
    input:
        unpack(inputs("knowledge")),
    output:
        metrics="results/knowledge/{llm}.json",
        hits="results/knowledge/{llm}.parquet",
    log:
        "logs/knowledge/{llm}.log",
    benchmark:
        "logs/knowledge/{llm}.tsv"
    conda:
        "../../environment.yml"
    threads: 1
    resources:
        mem_mb=memory("knowledge"),
        runtime=growing(HOUR),
    params:
        program=program,
        settings=param("knowledge", "settings"),
    shell:
        "{params.program} flame.knowledge --dataset {input.dataset} --stores {input.stores}"
        " --out {output.metrics} --hits {output.hits} --settings {params.settings:q} 2>&1"
        " | tee {log}"


rule overhead:
    """Timings of embedding and training, interleaved with the alternatives (Figure 5)."""
    input:
        unpack(inputs("overhead")),
    output:
        "results/overhead.json",
    log:
        "logs/overhead/overhead.log",
    benchmark:
        "logs/overhead/overhead.tsv"
    conda:
        "../../environment.yml"
    threads: all_cores
    resources:
        mem_mb=memory("overhead"),
        runtime=growing(HOUR),
        workers=0,
        micro_batch="auto",
        grad_checkpointing="auto",
        compile="none",
    params:
        program=program,
        settings=param("overhead", "settings"),
    shell:
        "{params.program} flame.overhead --images {input.images} --llm {input.llm}"
        " --stores {input.stores} --out {output} --settings {params.settings:q}"
        " --threads {threads} --workers {resources.workers}"
        " --micro-batch {resources.micro_batch} --compile {resources.compile}"
        " --grad-checkpointing {resources.grad_checkpointing} 2>&1 | tee {log}"


rule export:
    """A trained FLAME and its LLM -> one folder that `flame.load` opens, with a model card."""
    input:
        unpack(inputs("export")),
    output:
        directory("results/export/{run}"),
    log:
        "logs/export/{run}.log",
    conda:
        "../../environment.yml"
    resources:
        mem_mb=memory("export"),
        runtime=growing(HOUR),
    params:
        program=program,
        settings=param("export", "settings"),
    shell:
        "{params.program} flame.export write --model {input.model} --llm {input.llm}"
        " --metrics {input.metrics} --out {output} --settings {params.settings:q} 2>&1 | tee {log}"
