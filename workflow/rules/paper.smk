rule table:
    """Metrics of every run and benchmark -> one table of the paper, as CSV and as Markdown."""
    input:
        table_metrics,
    output:
        csv="results/{table}.csv",
        markdown="results/{table}.md",
    log:
        "logs/table/{table}.log",
    conda:
        "../../environment.yml"
    resources:
        mem_mb=1000,
        runtime="10m",
    params:
        program=program,
        reported=table_reported,
        numbers=table_numbers,
        settings=table_settings,
    shell:
        "{params.program} flame.table --metrics {input} --reported {params.reported}"
        " --csv {output.csv} --markdown {output.markdown} --settings {params.settings:q}"
        " 2>&1 | tee {log}"
