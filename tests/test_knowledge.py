"""What each prompt knows: from a data set and its stores to numbers, table and figure."""

import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import yaml

from flame.data import attributes
from flame.data.datasets import scenes
from flame.embedding import store
from flame.knowledge import knowledge
from flame.report import claims, knowledge_claims
from flame.report import knowledge as report
from flame.report.figures.knowledge import draw
from flame.study import jobs, stages
from flame.study.load import StudyError, load, load_file
from flame.study.schema.knowledge import Knows
from flame.study.schema.tables import Claim
from tests.workflow import ROOT, TINY

KEYS = [f"{i:06d}" for i in range(120)]
TINTS = ["red", "blue", "green"]


@pytest.fixture(scope="module")
def study():
    return load_file(TINY, ROOT)


@pytest.fixture
def settings(study):
    found = stages.knowledge(study, "random-llama")
    return found.model_copy(update={"facets": ("color", "scene"), "attributes": ("tint", "action")})


@pytest.fixture
def inputs(tmp_path) -> tuple[Path, list[Path]]:
    """A data set whose tints are in the vectors of one facet, and nothing in those of another."""
    rng, folder, path = np.random.default_rng(0), tmp_path / "scenes", tmp_path / "0.zarr"
    folder.mkdir()
    tints = rng.integers(len(TINTS), size=len(KEYS))
    shown = [
        {"tint": TINTS[tint], "action": "running" if i % 2 else None}
        for i, tint in enumerate(tints)
    ]
    attributes.write(folder, zip(KEYS, shown, strict=True))
    facets = {"color": " the color:", "scene": " the scene:"}
    store.create(path, {"kind": "long", "facets": facets, "part": 0, "parts": 1})
    writer = store.Writer(path, "scenes", keys=KEYS, facets=[*facets], dim=8)
    told = rng.normal(size=(len(KEYS), 8)) + 6 * np.eye(8)[tints]
    for rows in writer.missing():
        both = np.stack([told, rng.normal(size=told.shape)], axis=1)
        writer.write(rows, both[rows.start : rows.stop])
    return folder, [path]


def run(tmp_path, inputs, settings) -> tuple[dict, pl.DataFrame]:
    out, hits = tmp_path / "random-llama.json", tmp_path / "random-llama.parquet"
    knowledge(*inputs, out, hits, settings)
    return json.loads(out.read_text()), pl.read_parquet(hits)


def test_the_prompt_that_tells_an_attribute_knows_it(tmp_path, inputs, settings):
    result, hits = run(tmp_path, inputs, settings)
    found = {(each["facet"], each["attribute"]): each for each in result["records"]}
    assert found["color", "tint"]["value"] > 95
    assert found["scene", "tint"]["low"] < 100 / 3 < found["scene", "tint"]["high"]
    assert found["color", "tint"]["queries"] == len(KEYS)
    assert found["color", "action"]["queries"] == len(KEYS) // 2
    counted = hits.group_by("facet", "attribute").agg(pl.col("hit").sum(), pl.len())
    for facet, name, hit, count in counted.iter_rows():
        assert (hit, count) == (found[facet, name]["hits"], found[facet, name]["queries"])
    majority = {each["attribute"]: each for each in result["majority"]}
    assert majority["tint"]["classes"] == 3
    assert majority["action"]["value"] == 100


def test_same_inputs_give_the_same_numbers(tmp_path, inputs, settings):
    first, second = run(tmp_path, inputs, settings), run(tmp_path, inputs, settings)
    assert first[0]["records"] == second[0]["records"]
    assert first[1].equals(second[1])


def test_a_data_set_without_attributes_is_refused(tmp_path, inputs, settings):
    folder, stores = inputs
    with pytest.raises(ValueError, match=r"no attribute 'mood'; known: tint, action"):
        run(tmp_path, inputs, settings.model_copy(update={"attributes": ("mood",)}))
    (folder / attributes.FILE).unlink()
    with pytest.raises(ValueError, match="has no attributes of its images"):
        run(tmp_path, (folder, stores), settings)


def record(facet: str, attribute: str, value: float) -> dict:
    return {"facet": facet, "attribute": attribute, "value": value, "low": value - 2,
            "high": value + 2}  # fmt: skip


@pytest.fixture
def metrics(tmp_path, study) -> list[Path]:
    """One LLM whose prompt of the minor object knows it best, and whose prompts are else alike."""
    path = tmp_path / "random-llama.json"
    probed = stages.probed(study)
    cells = [
        record(facet, name, 60 if (facet, name) == ("minor_category", "minor") else 50)
        for facet in probed.facets
        for name in probed.block.attributes
    ]
    majority = [record("", name, 10) for name in probed.block.attributes]
    path.write_text(json.dumps({"captions": 96, "records": cells, "majority": majority}))
    return [path]


def test_the_table_marks_the_best_prompt_only_where_it_is_above_the_others(metrics, study):
    settings = stages.knowledge_table(study)
    known = report.read(metrics, settings.probed)
    text = report.as_markdown(known, settings)
    rows = [line for line in text.splitlines() if line.startswith("| entity | minor category")]
    assert "**60.0**\\*<br><sub>58.0-62.0</sub>" in rows[0]
    assert "most frequent class* | 10.0<br><sub>8.0-12.0</sub>" in text
    frame = pl.read_csv(report.as_csv(known, settings.probed).encode())
    assert frame["prompt"].to_list()[2:4] == ["minor category", "minor characteristic"]
    assert frame["minor object 95% high"][2] == 62
    assert [name for name in settings.probed.block.attributes if known["Random"].best(name)] == [
        "minor"
    ]


def test_the_figure_has_every_number_and_frames_the_best(metrics, study):
    figure = draw(metrics, stages.figure(study, "knowledge"))
    panel = figure.axes[0]
    assert panel.get_title() == "Random"
    assert [text.get_text() for text in panel.texts].count("50") == 80
    assert [text.get_text() for text in panel.texts if text.get_fontweight() == "bold"] == ["60"]
    assert len(panel.patches) == 1
    assert len(panel.lines) == 8  # a dot for each prompt but that of the whole description


def test_the_finished_study_has_table_and_figure(finished):
    table = pl.read_csv(finished / "results/knowledge.csv")
    assert len(table) == 10
    for name in ("knowledge.md", "knowledge.png", "knowledge/random-llama.parquet"):
        assert (finished / "results" / name).exists()


def test_stores_hold_all_facets_of_the_llms_that_are_probed():
    study = load_file(ROOT / "config/config.yaml", ROOT)
    assert study.embedding.facets == "used"
    for llm in study.knowledge.llms.values():
        assert len(study.embedded_facets(llm, "scenes", "long")) == 9
    without = study.model_copy(update={"knowledge": None})
    assert len(without.embedded_facets("gemma-3-270m", "scenes", "long")) == 7


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"dataset": "scene"}, "knowledge.dataset: unknown dataset 'scene'"),
        ({"dataset": "plain"}, "knowledge.dataset: source 'cifar10' does not know attributes"),
        ({"captions": "longs"}, "knowledge.captions: no prompt embeds captions of kind 'longs'"),
        ({"llms": {"A": "llama"}}, "knowledge.llms: unknown llm 'llama'"),
        ({"attributes": {"colour": "c"}, "asks_for": {}}, "unknown attribute 'colour'"),
        ({"asks_for": {"action": "verb"}}, "knowledge.asks_for.action: unknown attribute 'verb'"),
        ({"asks_for": {"verb": "action"}}, "knowledge.asks_for: facet not embedded: 'verb'"),
    ],
)
def test_a_mistake_is_named_before_anything_runs(change, said):
    values = yaml.safe_load(TINY.read_text())
    values["datasets"]["plain"] = {"source": "cifar10", "options": {}}
    values["knowledge"] |= change
    with pytest.raises(StudyError) as error:
        load(values, "tiny", ROOT)
    assert said in str(error.value)


def test_a_study_without_probes_has_no_job_of_them():
    study = load_file(ROOT / "config/paper.yaml", ROOT)
    assert not any("knowledge" in path for path in jobs.targets(study))
    with pytest.raises(ValueError, match="no block `knowledge`"):
        jobs.knowledge_table(study)
    with pytest.raises(ValueError, match="does not name LLM"):
        jobs.knowledge(study, "mistral-nemo")


def test_scenes_know_their_attributes():
    options = scenes.Options(split="train", images=6, long=1)
    for sample in scenes.read(Path(), options, seed=0):
        assert tuple(sample.attributes) == scenes.ATTRIBUTES


@pytest.fixture
def probes(tmp_path, study) -> knowledge_claims.Probes:
    """Hits of two LLMs: one knows the tint of every second caption by one prompt, else none."""
    asked, counts = {"color": "tint", "action": "action"}, {"tint": 200, "action": 50}
    paths = []
    for llm, knows in (("one", True), ("none", False)):
        rows = [
            {"facet": facet, "attribute": name, "query": query, "key": str(query), "hit": hit}
            for name, count in counts.items()
            for facet in ("color", "action", "scene")
            for query in range(count)
            for hit in [knows and (facet, name) == ("color", "tint") and query % 2 == 0]
        ]
        paths.append(tmp_path / f"{llm}.parquet")
        pl.DataFrame(rows).write_parquet(paths[-1])
    probed = stages.probed(study)
    block = probed.block.model_copy(
        update={"llms": {"One": "one", "None": "none"}, "asks_for": asked}
    )
    return knowledge_claims.read(paths, probed.model_copy(update={"block": block}))


def test_a_claim_is_the_mean_over_prompts_of_their_lead_in_what_they_ask_for(probes):
    found = probes.difference(Knows(llm="One"))
    assert found.value == pytest.approx((50 + 0) / 2)
    # The mean of 200 hits and misses, halved, as the other attribute is never known.
    deviation = 100 * np.sqrt(0.25 / 200) / 2
    assert found.low == pytest.approx(25 - 1.96 * deviation, abs=0.7)
    assert found.high == pytest.approx(25 + 1.96 * deviation, abs=0.7)
    assert probes.difference(Knows(llm="None")).value == 0


def test_two_llms_are_compared_over_all_prompts_and_attributes(probes):
    found = probes.difference(Knows(llm="One", beyond="None"))
    assert found.value == pytest.approx(50 / 3 / 2)
    claim = Claim(text="Knows.", where="ours", knows=Knows(llm="One", beyond="None"))
    verdict = claims.judge(claim, None, {}, probes)
    assert (verdict.word, verdict.measured) == ("holds", found)
    assert "One against None: mean of all" in claims.claims_table([verdict], {})


def test_a_claim_on_an_llm_that_is_not_probed_is_refused():
    values = yaml.safe_load(TINY.read_text())
    values["claims"] = {"a": {"text": "A.", "where": "ours", "knows": {"llm": "Rndom"}}}
    with pytest.raises(StudyError, match=r"claims\.a\.knows: no LLM of `knowledge` 'Rndom'"):
        load(values, "tiny", ROOT)
    with pytest.raises(ValueError, match="only in the list"):
        Claim(text="A.", where="ours", knows=Knows(llm="Random"), table="table6")
