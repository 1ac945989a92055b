"""The model card names the data sets that were measured, to readers and to the hub."""

from huggingface_hub import ModelCard

from flame.report.model_card import model_card
from flame.study.settings import ExportSettings

SETTINGS = ExportSettings(
    run="flame-7",
    checkpoint={"source": "random", "architecture": "llama", "layers": 2, "width": 32},
    reset=None,
    layer="last",
    final_norm=True,
    positions="restart",
    max_caption_tokens=None,
    cleanup="none",
    kinds={"class": {"prefix": ("", ""), "facets": {"scene": " scene:"}, "center": None}},
    version=1,
)
TRAINING = {
    "recipe": {"epochs": 3, "batch_size": 8},
    "backbone": {"timm": "resnet10t", "image_size": 64},
    "dataset": "scenes",
    "seed": 7,
}
LLM = {"origin": "random weights", "licence": None}


def record(benchmark, task="zeroshot", dataset="animals", metric="top1", value=45.678, **more):
    metrics = {metric: {"value": value, "low": 40.0, "high": 50.0, "hits": 1, "queries": 2}}
    name = f"{dataset} (for {benchmark})"
    about = {"benchmark": benchmark, "name": name, "task": task, "dataset": dataset}
    about["captions"] = "class"
    return about | more | {"run": "flame-7", "metrics": metrics}


def card(*records) -> str:
    return str(model_card(SETTINGS, TRAINING, LLM, records))


def test_results_are_metadata_under_the_data_set_that_was_measured():
    found = ModelCard(
        card(
            record("ImageNet-1k"),
            record("MSCOCO", "retrieval", "scenes", "i2t_r@1", captions="short"),
            record("SugarCrepe", "compose", "pairs", "accuracy", negatives="false"),
        )
    )
    assert found.data.model_name == "flame-7"
    seen = [
        (r.task_type, r.dataset_name, r.dataset_config, r.metric_type, r.metric_name, r.metric_args)
        for r in found.data.eval_results
    ]
    assert seen == [
        ("zero-shot-image-classification", "animals", "class", "top1", "top-1 (%)", None),
        ("image-text-retrieval", "scenes", "short", "i2t_r@1", "I2T R@1 (%)", None),
        ("compose", "pairs", "class", "accuracy", "accuracy (%)", {"negatives": "false"}),
    ]
    assert {r.metric_value for r in found.data.eval_results} == {45.68}
    metadata = found.data.to_yaml()
    assert "ImageNet" not in metadata
    assert "MSCOCO" not in metadata


def test_benchmarks_that_share_a_stand_in_are_one_result():
    found = ModelCard(card(record("ImageNet-1k"), record("CIFAR-10"), record("DTD", value=1.0)))
    assert [r.metric_value for r in found.data.eval_results] == [45.68, 1.0]
    assert "| animals (for CIFAR-10) | top-1 | 45.7 | 40.0 to 50.0 |" in found.text


def test_a_stand_in_is_said_to_be_one():
    text = card(record("DTD", dataset="dtd", name="DTD"), record("ImageNet-1k"))
    told = "*animals (for ImageNet-1k)*: measured on the data set `animals`, which only stands in"
    assert told in text
    assert "nothing about ImageNet-1k itself" in text
    assert "stands in" not in card(record("DTD", dataset="dtd", name="DTD"))


def test_a_card_without_results_says_so():
    text = card()
    assert ModelCard(text).data.eval_results is None
    assert "model_name" not in text
    assert text.endswith("None.\n")


def test_a_card_survives_being_read_and_written():
    text = card(record("ImageNet-1k"))
    assert str(ModelCard(text)) == text
    data = ModelCard(text).data
    assert (data.license, data.license_name, data.library_name) == (
        "other", "of-its-parts", "flame",
    )  # fmt: skip
