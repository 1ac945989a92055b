rule prompt:
    """The text of one facet, as the LLM reads it; stores that hold the facet depend on it."""
    output:
        "results/prompts/{prompt}/{facet}.txt",
    log:
        "logs/prompts/{prompt}/{facet}.log",
    conda:
        "../../environment.yml"
    params:
        text=param("prompt", "text"),
    # The report draws run times on a logarithmic scale, which a time of 0 s would break.
    shell:
        "(sleep 0.1; printf '%s\\n' {params.text:q} > {output}) 2> {log}"


rule embed:
    """Captions of a kind -> embeddings of every facet, by a frozen LLM in one pass."""
    input:
        unpack(inputs("embed")),
    output:
        directory("results/embed/{llm}/{bundle}/{kind}/{part}.zarr"),
    log:
        "logs/embed/{llm}/{bundle}/{kind}/{part}.log",
    benchmark:
        "logs/embed/{llm}/{bundle}/{kind}/{part}.tsv"
    conda:
        "../../environment.yml"
    threads: 1
    resources:
        mem_mb=memory("embed"),
        runtime=growing(12 * HOUR),
        token_budget="auto",
        compile="auto",
    params:
        program=program,
        settings=param("embed", "settings"),
    shell:
        "{params.program} flame.embed --llm {input.llm} --datasets {input.datasets} --out {output}"
        " --settings {params.settings:q} --token-budget {resources.token_budget}"
        " --compile {resources.compile} --threads {threads} 2>&1 | tee {log}"


use rule embed as embed_training with:
    # Training sets first, so that towers train while the benchmarks are still being embedded.
    wildcard_constraints:
        bundle=one_of(jobs.training_bundles(study)),
    priority: 1


ruleorder: embed_training > embed
