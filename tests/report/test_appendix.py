"""The study is compared with the paper's appendix, and every difference is marked."""

from functools import cache
from pathlib import Path

import polars as pl
import pytest
import torch
from torch import nn

from flame.report.appendix import FIXED
from flame.study.load import load_file
from flame.study.schema.llms import Facet, Prompt
from flame.study.schema.runs import Augment, Recipe
from flame.study.schema.tables import AppendixTable
from flame.study.settings import AppendixSettings
from flame.study.study import Study
from flame.table import compare_appendix
from flame.training import optim

ROOT = Path(__file__).parents[2]
REPORTED = ROOT / "config" / "reported"
# What Table A1 prints.
A1 = Recipe(
    epochs=32, batch_size=4096, lr=5e-4, weight_decay=0.5, warmup_steps=2000, betas=(0.9, 0.98)
)


@cache
def study() -> Study:
    """The demo study."""
    return load_file(ROOT / "config" / "config.yaml", ROOT)


def show(folder, of: str, file: str, **changes) -> tuple[pl.DataFrame, str]:
    recipe = changes.pop("recipe", None)
    name = "own" if of == "recipe" else None
    table = {"title": "T.", "of": of, "recipe": name, "reported": {"file": file}}
    values = {"facets": study().facets, "prompts": study().prompts} | changes
    settings = AppendixSettings(
        study="tiny",
        name="t",
        table=AppendixTable.model_validate(table),
        recipe=recipe,
        backbones=("small", "large"),
        version=1,
        **values,
    )
    out = folder / "t.csv", folder / "t.md"
    compare_appendix(REPORTED / file, *out, settings)
    return pl.read_csv(out[0], infer_schema=False), out[1].read_text()


def test_the_papers_own_recipe_differs_nowhere_from_table_a1(tmp_path):
    frame, markdown = show(tmp_path, "recipe", "table_a1.csv", recipe=A1)
    printed = frame.filter(pl.col("paper").is_not_null())
    assert printed["paper"].to_list() == printed["study"].to_list()
    assert len(printed) == 9
    assert "differs" not in markdown
    assert "Visual towers trained with it: small, large." in markdown


def test_table_a2_has_another_batch_and_weight_decay(tmp_path):
    frame, markdown = show(tmp_path, "recipe", "table_a2.csv", recipe=A1)
    different = frame.filter(differs="differs").select("key", "paper", "study").rows()
    assert different == [("batch_size", "8,192", "4,096"), ("weight_decay", "0.2", "0.5")]
    assert "| batch size | `batch_size` | 8,192 | 4,096 | **differs** |" in markdown


def test_a_number_that_is_printed_otherwise_is_the_same(tmp_path):
    """The paper prints 5e-4 for 0.0005, and a tuple of floats as `0.9, 0.98`."""
    changed = A1.model_copy(update={"lr": 0.0015, "betas": (0.9, 0.95)})
    frame, _ = show(tmp_path, "recipe", "table_a1.csv", recipe=changed)
    different = frame.filter(differs="differs").select("paper", "study").rows()
    assert different == [("5e-4", "1.5e-3"), ("0.9, 0.98", "0.9, 0.95")]


def test_no_key_of_a_recipe_is_left_out(tmp_path):
    frame, markdown = show(tmp_path, "recipe", "table_a1.csv", recipe=A1)
    keys = set(Recipe.model_fields) - {"augment"} | {f"augment.{k}" for k in Augment.model_fields}
    assert set(frame["key"]) == keys | set(FIXED)
    assert frame["key"].is_unique().all()
    assert "| `tau` | 0.07 | initial temperature |" in markdown


def test_what_no_key_decides_is_what_the_optimizer_does():
    assert FIXED["optimizer"] == type(optim.adamw(nn.Linear(2, 2), A1)).__name__
    assert isinstance(optim.adamw(nn.Linear(2, 2), A1), torch.optim.AdamW)
    recipe = A1.model_copy(update={"warmup_steps": 0, "lr": 1.0})
    rates = [optim.learning_rate(step, 4, recipe) for step in range(4)]
    half = 2**0.5 / 4  # half a cosine at 0, 1/4, 1/2, 3/4 of the way
    assert rates == pytest.approx([1.0, 0.5 + half, 0.5, 0.5 - half])
    assert FIXED["schedule"] == "cosine decay"


def test_the_prompts_of_the_study_are_those_of_the_paper(tmp_path):
    frame, markdown = show(tmp_path, "prompts", "appendix_b.csv")
    paper = frame.filter(pl.col("number").is_not_null())
    for key in ("level", "text", "long", "short", "template"):
        assert paper[f"{key} paper"].to_list() == paper[f"{key} study"].to_list()
    assert paper["number"].to_list() == [str(n) for n in range(1, 10)]
    assert paper["long paper"].to_list() == ["yes"] * 5 + ["no", "yes", "yes", "no"]
    assert paper["short paper"].to_list() == ["no"] * 6 + ["yes", "no", "no"]
    assert "**differs**" not in markdown


def test_prompts_that_differ_are_marked_with_the_papers_beside_them(tmp_path):
    facets = {name: facet for name, facet in study().facets.items() if name != "color"}
    facets |= {
        "action": Facet(level="interaction", text="what is done"),
        "mood": Facet(level="scene", text="the mood"),
    }
    facets_of_long = tuple(name for name in facets if name != "mood")
    template = 'Image: "{caption}". {facet} is:"'
    long, short = study().prompts["long"], study().prompts["short"]
    prompts = {
        "long": Prompt(**{**long.model_dump(), "facets": facets_of_long}),
        "short": Prompt(**{**short.model_dump(), "template": template}),
    }
    frame, markdown = show(tmp_path, "prompts", "appendix_b.csv", facets=facets, prompts=prompts)
    marks = dict(frame.filter(pl.col("differs").is_not_null()).select("facet", "differs").rows())
    assert marks == {
        "action": "differs",
        "scene": "differs",  # its template for short captions
        "color": "not in this study",
        "mood": "not in the paper",
    }
    lines = markdown.splitlines()
    changed = next(i for i, line in enumerate(lines) if "what is done" in line)
    assert lines[changed].endswith("| **differs** |")
    assert "the primary action or event taking place in this image" in lines[changed + 1]
    assert f"`{template}` | **differs** |" in markdown


def test_what_does_not_match_is_named(tmp_path):
    file = tmp_path / "wrong.csv"
    file.write_text("table,config,key,value\nTable A1,batch size,batchsize,4096\n")
    with pytest.raises(ValueError, match=r"'batchsize' \(did you mean 'batch_size'\?\)"):
        show(tmp_path, "recipe", str(file), recipe=A1)
