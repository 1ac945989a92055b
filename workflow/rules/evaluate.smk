rule evaluate:
    """A trained tower -> every metric of a bundle of benchmarks, and the hits behind them."""
    input:
        model="results/train/{run}",
        datasets=evaluate_datasets,
        stores=evaluate_stores,
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
        mem_mb=2500,
        runtime="4h",
        batch_size=256,
    params:
        program=program,
        settings=evaluate_settings,
        origin=evaluate_origin,
    shell:
        "{params.program} flame.evaluate --model {input.model} --datasets {input.datasets}"
        " --stores {input.stores} --out {output.metrics} --hits {output.hits}"
        " --settings {params.settings:q} --threads {threads}"
        " --batch-size {resources.batch_size} 2>&1 | tee {log}"
