"""Where the output of every rule lies: the one list of paths, as patterns of wildcards."""

from collections.abc import Iterable

# rule -> its outputs; a test compares them with the rules.
OUTPUTS = {
    "download_dataset": ("resources/datasets/{dataset}",),
    "download_llm": ("resources/llms/{llm}",),
    "download_tower": ("resources/towers/{run}",),
    "caption": ("results/caption/{captioner}/{dataset}/{part}.parquet",),
    "captions": ("results/captions/{captioner}/{dataset}",),
    "prompt": ("results/prompts/{prompt}/{facet}.txt",),
    "embed": ("results/embed/{llm}/{bundle}/{kind}/{part}.zarr",),
    "train": ("results/train/{run}",),
    "evaluate": ("results/evaluate/{run}/{bundle}.json", "results/evaluate/{run}/{bundle}.parquet"),
    "fewshot": (
        "results/fewshot/{run}/{benchmark}.json",
        "results/fewshot/{run}/{benchmark}.parquet",
        "results/fewshot/{run}/{benchmark}.words.json",
    ),
    "knowledge": ("results/knowledge/{llm}.json", "results/knowledge/{llm}.parquet"),
    "overhead": ("results/overhead.json",),
    "export": ("results/export/{run}",),
    "table": ("results/{table}.csv", "results/{table}.md"),
    "claims": ("results/claims.csv", "results/claims.md"),
    "knowledge_table": ("results/knowledge.csv", "results/knowledge.md"),
    "variance": ("results/variance.csv", "results/variance.md"),
    "appendix": ("results/{appendix}.csv", "results/{appendix}.md"),
    "figure": ("results/{figure}.png", "results/{figure}.pdf"),
}


def output(rule: str, **wildcards: object) -> str:
    """Path of the first output of a rule."""
    return OUTPUTS[rule][0].format(**wildcards)


def dataset(name: str) -> str:
    """Folder of a data set: shards, index, its own captions."""
    return output("download_dataset", dataset=name)


def llm(name: str) -> str:
    """Folder of an LLM."""
    return output("download_llm", llm=name)


def with_suffix(results: Iterable[str], *suffixes: str) -> list[str]:
    """Files of results, which are paths without extensions; all of one suffix after the other."""
    results = list(results)
    return [f"{path}.{suffix}" for suffix in suffixes for path in results]
