rule table:
    """Metrics of every run and benchmark -> one table of the paper, as CSV and as Markdown."""
    input:
        unpack(inputs("table")),
    output:
        csv=report(
            "results/{table}.csv",
            caption="../report/table.rst",
            category="Tables",
            labels={"table": "{table}"},
        ),
        markdown="results/{table}.md",
    log:
        "logs/table/{table}.log",
    conda:
        "../../environment.yml"
    resources:
        mem_mb=memory("table"),
        runtime=growing(10),
    params:
        program=program,
        reported=reported("tables"),
        numbers=reported_digest("tables"),
        settings=param("table", "settings"),
    shell:
        "{params.program} flame.table results --metrics {input.metrics} --hits {input.hits}"
        " {params.reported:q} --csv {output.csv} --markdown {output.markdown}"
        " --settings {params.settings:q} 2>&1 | tee {log}"


rule claims:
    """Each claim of the paper -> whether it holds on this study, and the figure."""
    input:
        unpack(inputs("claims")),
    output:
        csv=report("results/claims.csv", caption="../report/claims.rst", category="Claims"),
        markdown="results/claims.md",
    log:
        "logs/claims/claims.log",
    conda:
        "../../environment.yml"
    resources:
        mem_mb=memory("claims"),
        runtime=growing(10),
    params:
        program=program,
        overhead=claims_overhead,
        settings=param("claims", "settings"),
    shell:
        "{params.program} flame.table claims --metrics {input.metrics} --hits {input.hits}"
        " {params.overhead} --csv {output.csv} --markdown {output.markdown}"
        " --settings {params.settings:q} 2>&1 | tee {log}"


rule variance:
    """Runs that were trained several times -> how much every number of the tables varies."""
    input:
        unpack(inputs("variance")),
    output:
        csv=report(
            "results/variance.csv",
            caption="../report/variance.rst",
            category="Tables",
            labels={"table": "variance"},
        ),
        markdown="results/variance.md",
    log:
        "logs/variance/variance.log",
    conda:
        "../../environment.yml"
    resources:
        mem_mb=memory("variance"),
        runtime=growing(10),
    params:
        program=program,
        settings=param("variance", "settings"),
    shell:
        "{params.program} flame.table variance --metrics {input.metrics} --hits {input.hits}"
        " --csv {output.csv} --markdown {output.markdown}"
        " --settings {params.settings:q} 2>&1 | tee {log}"


rule knowledge_table:
    """What each prompt knows, of every LLM -> one table, as CSV and as Markdown."""
    input:
        unpack(inputs("knowledge_table")),
    output:
        csv=report(
            "results/knowledge.csv",
            caption="../report/knowledge.rst",
            category="Tables",
            labels={"table": "knowledge"},
        ),
        markdown="results/knowledge.md",
    log:
        "logs/knowledge/table.log",
    conda:
        "../../environment.yml"
    resources:
        mem_mb=memory("knowledge_table"),
        runtime=growing(10),
    params:
        program=program,
        settings=param("knowledge_table", "settings"),
    shell:
        "{params.program} flame.table knowledge --metrics {input.metrics} --csv {output.csv}"
        " --markdown {output.markdown} --settings {params.settings:q} 2>&1 | tee {log}"


rule appendix:
    """The study itself -> Tables A1 and A2, Appendix B."""
    output:
        csv=report(
            "results/{appendix}.csv",
            caption="../report/appendix.rst",
            category="Tables",
            labels={"table": "{appendix}"},
        ),
        markdown="results/{appendix}.md",
    log:
        "logs/appendix/{appendix}.log",
    conda:
        "../../environment.yml"
    resources:
        mem_mb=memory("appendix"),
        runtime=growing(10),
    params:
        program=program,
        reported=reported("appendix"),
        numbers=reported_digest("appendix"),
        settings=param("appendix", "settings"),
    shell:
        "{params.program} flame.table appendix {params.reported:q} --csv {output.csv}"
        " --markdown {output.markdown} --settings {params.settings:q} 2>&1 | tee {log}"


rule figure:
    """Results -> one figure of the paper, as PNG and as PDF."""
    input:
        unpack(inputs("figure")),
    output:
        png=report(
            "results/{figure}.png",
            caption="../report/figure.rst",
            category="Figures",
            labels={"figure": "{figure}"},
        ),
        pdf="results/{figure}.pdf",
    log:
        "logs/figure/{figure}.log",
    conda:
        "../../environment.yml"
    resources:
        mem_mb=memory("figure"),
        runtime=growing(10),
    params:
        program=program,
        settings=param("figure", "settings"),
    shell:
        "{params.program} flame.figure --inputs {input} --png {output.png} --pdf {output.pdf}"
        " --settings {params.settings:q} 2>&1 | tee {log}"
