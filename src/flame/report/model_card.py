"""Model card of an export: what it is, how to use it, what it was trained on, what it scores."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from flame.report.results_table import markdown_table, metric_name
from flame.study.settings import ExportSettings

PAPER = "https://arxiv.org/abs/2411.11927"
# Task of ours -> the hub's name for it; other tasks keep their names.
TASKS = {
    "zeroshot": "zero-shot-image-classification",
    "retrieval": "image-text-retrieval",
    "probe": "image-classification",
}
PIPELINE = TASKS["zeroshot"]


def model_card(
    settings: ExportSettings,
    training: Mapping[str, Any],
    llm: Mapping[str, Any],
    records: Sequence[Mapping[str, Any]],
) -> ModelCard:
    """Model card with results as metadata for the hub, and as a table.

    Args:
        settings: of the export.
        training: settings of the training, from the tower's `run.json`.
        llm: description of the LLM, its `flame.json`.
        records: results of evaluations, as `flame.evaluation.records` describes them.
    """
    results: list[EvalResult] = []
    for result in eval_results(records):
        if result not in results:  # two benchmarks of the paper may share a stand-in
            results.append(result)
    data = ModelCardData(
        library_name="flame",
        pipeline_tag=PIPELINE,
        license="other",
        license_name="of-its-parts",
        tags=["flame", "clip", PIPELINE, TASKS["retrieval"]],
        model_name=settings.run,
        eval_results=results or None,
    )
    if not results:
        del data.model_name  # metadata only together with results
    body = _body(settings, training, llm, records)
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}")


def eval_results(records: Sequence[Mapping[str, Any]]) -> Iterator[EvalResult]:
    """Every metric in percent, under the data set that was measured, a stand-in or not."""
    for record in records:
        arguments = {name: record[name] for name in ("facets", "negatives") if record.get(name)}
        for name, metric in record["metrics"].items():
            yield EvalResult(
                task_type=TASKS.get(record["task"], record["task"]),
                dataset_type=record["dataset"],
                dataset_name=record["dataset"],
                dataset_config=record.get("captions"),
                metric_type=name,
                metric_name=f"{metric_name(name)} (%)",
                metric_value=round(metric["value"], 2),
                metric_args=arguments or None,
            )


def _body(
    settings: ExportSettings,
    training: Mapping[str, Any],
    llm: Mapping[str, Any],
    records: Sequence[Mapping[str, Any]],
) -> str:
    recipe, backbone = training["recipe"], training["backbone"]
    kinds = "\n".join(
        f"- `{kind}`: {', '.join(reading.facets)}" for kind, reading in settings.kinds.items()
    )
    return f"""# {settings.run}

An image tower trained to match the caption embeddings of a frozen LLM, by the method of
[FLAME]({PAPER}). This is an independent reproduction: these are not the paper's own weights.

## Usage

```python
import flame

model = flame.load("this folder, or owner/name")
images, texts = model.encode_image([image]), model.encode_text(["a photo of a dog."])
print(images @ texts.T)
```

`encode_text(texts, kind)` embeds texts with the prompt of their kind, and averages these facets:

{kinds}

## Components

- Image tower: timm's `{backbone["timm"]}` at {backbone["image_size"]} pixels, trained from scratch
  for {recipe["epochs"]} epochs on data set `{training["dataset"]}`, batch size
  {recipe["batch_size"]}, seed {training["seed"]}. All settings are in `run.json`.
- LLM: {llm["origin"]}, licence: {llm["licence"] or "as stated by its publisher"}; frozen.

## Results

In percent, on the benchmarks of the study that the tower was trained in.{_stand_ins(records)}

{_table(records)}"""


def _stand_ins(records: Sequence[Mapping[str, Any]]) -> str:
    """What the name of a stand-in says, for the first one among the results."""
    for record in records:
        if record["name"] != record["benchmark"]:
            return (
                f"\n*{record['name']}*: measured on the data set `{record['dataset']}`, which only "
                f"stands in for\n{record['benchmark']}; the number says nothing about "
                f"{record['benchmark']} itself."
            )
    return ""


def _table(records: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        [
            record["name"],
            metric_name(name),
            f"{metric['value']:.1f}",
            f"{metric['low']:.1f} to {metric['high']:.1f}",
        ]
        for record in records
        for name, metric in record["metrics"].items()
    ]
    head = ["benchmark", "metric", "%", "95 % interval"]
    rule = ["---", "---", "---:", "---:"]
    return markdown_table([head, rule, *rows]) if rows else "None.\n"
