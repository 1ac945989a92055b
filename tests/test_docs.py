"""The documents are true: keys, links, examples."""

import re
import runpy
import shutil
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import yaml
from PIL import Image
from pydantic import BaseModel

from flame import download
from flame.data import datasets
from flame.data.datasets import scenes
from flame.data.datasets.__main__ import document
from flame.evaluation.tasks import Asked, Images, Texts
from flame.figure import figure
from flame.report import figures
from flame.study import include, jobs, stages
from flame.study.load import StudyError, load, load_file
from flame.study.schema.benchmarks import task_names
from flame.study.schema.figures import kinds, module
from flame.study.settings import Question
from flame.study.study import Study
from tests.answers import counted, write

ROOT = Path(__file__).parents[1]
PAGES = [
    path
    for pattern in ("*.md", "config/*.md", "results/README.md", "bench/*.md", "docs/**/*.md")
    for path in sorted(ROOT.glob(pattern))
]


def models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """Every pydantic model that a field's type names, at any depth."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
        for field in annotation.model_fields.values():
            yield from models_in(field.annotation)
    for argument in get_args(annotation):
        yield from models_in(argument)


def keys_of_a_study() -> list[str]:
    models = dict.fromkeys([*models_in(Study), scenes.Options])
    keys = [f"{model.__name__}.{field}" for model in models for field in model.model_fields]
    return keys + [f"{kind}.{key}" for kind in kinds() for key in module(kind).Keys.model_fields]


def blocks(language: str) -> list[str]:
    """Examples of docs/adding.md in one language."""
    text = (ROOT / "docs/adding.md").read_text()
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def merged(values: Any, changes: Any) -> Any:
    if not isinstance(values, dict) or not isinstance(changes, dict):
        return changes
    return values | {key: merged(values.get(key), value) for key, value in changes.items()}


@pytest.fixture
def squares(tmp_path, monkeypatch) -> Path:
    """The example data set, in a folder where data sets are looked for; the folder beside it."""
    package = tmp_path / "datasets"
    package.mkdir()
    (package / "squares.py").write_text(blocks("python")[0])
    monkeypatch.setattr(datasets, "__path__", [*datasets.__path__, str(package)])
    yield tmp_path / "out" / "squares"
    sys.modules.pop("flame.data.datasets.squares", None)


@pytest.mark.parametrize("key", keys_of_a_study())
def test_every_key_is_explained(key):
    assert f"`{key.split('.')[1]}`" in (ROOT / "config/README.md").read_text()


def anchors(page: Path) -> set[str]:
    """Anchors that GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_exist(page):
    text = page.read_text()
    links = re.findall(r"\]\(([^)\s]+)", text) + re.findall(r'(?:src|srcset|href)="([^"]+)', text)
    for link in links:
        path, _, anchor = link.partition("#")
        if ":" not in link:
            target = page.parent / path if path else page
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link


def test_every_test_that_the_faults_name_is_where_they_say():
    found = 0
    for row in re.findall(r"^\| .+ \|$", (ROOT / "docs/faults.md").read_text(), re.M):
        text = ""
        for name in re.findall(r"`((?:tests/[\w/]*)?test_[\w.]+)`", row.split(" | ")[-1]):
            if name.endswith(".py"):
                path = ROOT / name if "/" in name else ROOT / "tests/faults" / name
                text = path.read_text()
                found += 1
            else:
                assert f"def {name.rstrip('.')}" in text, name
    assert found > 50


def test_the_example_study_is_valid(squares):
    values = yaml.safe_load((ROOT / "config/config.yaml").read_text())
    for block in blocks("yaml"):
        values = merged(values, yaml.safe_load(block))
    study = load(values, "docs/adding.md", ROOT)
    assert study.targets("vit-layer-20")["short"] == ("scene", "weather")


def test_the_example_data_set_can_be_read(squares):
    download.dataset("squares", '{"images": 8}', 0, squares)
    assert (squares / "manifest.json").is_file()


def test_the_example_task_answers():
    task = types.ModuleType("nearest")
    exec(blocks("python")[1], vars(task))
    images, texts = torch.eye(3), torch.eye(3)[[0, 2, 1]]
    question = Question(benchmark="b", task="nearest", dataset="d", captions="raw")
    asked = Asked(
        question,
        images=lambda: Images("abc", [None] * 3, images),
        visual=pytest.fail,
        texts={"raw": Texts("abc", texts.__getitem__)}.__getitem__,
    )
    answer = task.evaluate(asked)
    assert answer.metrics["accuracy"].hit.tolist() == [True, False, False]


@pytest.fixture
def bars(tmp_path, monkeypatch):
    """The example kind of figure, in a folder where kinds are looked for."""
    package = tmp_path / "figures"
    package.mkdir()
    (package / "bars.py").write_text(blocks("python")[2])
    monkeypatch.setattr(figures, "__path__", [*figures.__path__, str(package)])
    yield "bars"
    sys.modules.pop("flame.report.figures.bars", None)


def test_the_example_kind_of_figure_is_checked_planned_and_drawn(bars, tmp_path):
    values = include.whole(yaml.safe_load((ROOT / "config/config.yaml").read_text()), ROOT)
    block = {
        "kind": bars,
        "title": "Bars",
        "runs": {"CLIP": "clip", "FLAME": "flame-7"},
        "measure": {"benchmark": "ImageNet-1k", "metric": "top1"},
    }
    values["figures"] = {"bars": block}
    study = load(values, "docs/adding.md", ROOT)
    job = jobs.figure(study, "bars")
    trainings = [name for run in ("clip", "flame-7") for name in study.replicas(run)]
    assert [path for path in job.paths if path.endswith("json")] == [
        f"results/evaluate/{name}/classification.json" for name in trainings
    ]
    settings = stages.figure(study, "bars")
    hits = {"ImageNet-1k": {"top1": counted(30, 40)}}
    inputs = [path for name in trainings for path in write(tmp_path, name, hits)]
    figure(inputs, tmp_path / "bars.png", tmp_path / "bars.pdf", settings)
    assert Image.open(tmp_path / "bars.png").size[0] == 5 * 200
    values["figures"] = {"bars": block | {"runs": {"CLIP": "clipp"}, "colour": "red"}}
    with pytest.raises(StudyError, match=r"figures\.bars: unknown key 'colour'"):
        load(values, "docs/adding.md", ROOT)
    values["figures"] = {"bars": block | {"runs": {"CLIP": "clipp"}}}
    with pytest.raises(
        StudyError, match=r"figures\.bars: unknown run 'clipp' \(did you mean 'clip'"
    ):
        load(values, "docs/adding.md", ROOT)


def test_every_result_is_listed():
    study = load_file(ROOT / "config/config.yaml", ROOT)
    page = (ROOT / "results/README.md").read_text().split("What these are made from")[0]
    listed = set(re.findall(r"`(\w+)\.(csv|png)`", page))
    lists = ("claims", "knowledge", "variance")
    tables = {(name, "csv") for name in (*lists, *study.tables, *study.appendix)}
    assert listed == tables | {(name, "png") for name in study.figures}


def test_table_6_of_the_readme_is_that_of_the_last_full_run():
    page = (ROOT / "docs/results/table6.md").read_text()
    table = page[page.index("| prompts") :].split("\n\n")[0].splitlines()
    rows = [re.sub("<br><sub>.*?</sub>", "", row) for row in table if "<sub>paper</sub>" not in row]
    shown = (ROOT / "README.md").read_text().split("<!-- table6 -->\n")[1]
    assert shown.split("\n<!--")[0].splitlines() == rows


def test_results_are_copied_to_the_documents(tmp_path):
    for page in ("README.md", "docs/results/README.md", "docs/results/collect.py"):
        (tmp_path / page).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / page, tmp_path / page)
    results = tmp_path / "results"
    results.mkdir()
    table = "| prompts | a |\n| --- | --- |\n| **1** | 5.0<br><sub>4.0-6.0</sub> |\n"
    paper = "| <sub>paper</sub> | <sub>9.0</sub> |\n"
    (results / "table6.md").write_text(f"**Table 6. Prompts**\n\n{table}{paper}\nA note.\n")
    (results / "claims.md").write_text("# Claims\n")
    for name in ("figure6", "knowledge"):
        Image.new("RGB", (2800, 100)).save(results / f"{name}.png")
    command = [sys.executable, "docs/results/collect.py", "results"]
    assert subprocess.run(command, cwd=tmp_path).returncode == 0
    shown = (tmp_path / "README.md").read_text().split("<!-- table6 -->\n")[1]
    assert shown.split("<!--")[0] == "| prompts | a |\n| --- | --- |\n| **1** | 5.0 |\n"
    assert 'src="docs/results/knowledge.png"' in (tmp_path / "README.md").read_text()
    page = (tmp_path / "docs/results/README.md").read_text()
    assert "- [Claims](claims.md)\n- [Table 6. Prompts](table6.md)\n<!--" in page
    assert "![figure6](figure6.png)" in page
    assert Image.open(tmp_path / "docs/results/figure6.png").size == (1400, 50)


@pytest.mark.parametrize(
    "name",
    [*task_names(), *(path.stem for path in (ROOT / "src/flame/report/figures").glob("[a-z]*.py"))],
)
def test_every_task_and_kind_of_figure_is_explained(name):
    assert f"\n| `{name}` |" in (ROOT / "config/README.md").read_text()


def test_every_program_and_package_is_in_the_tree():
    tree = (ROOT / "README.md").read_text().split("src/flame/\n")[1].split("\ntests/")[0]
    programs = {path.name for path in (ROOT / "src/flame").glob("[a-z]*.py")}
    packages = {f"{path.parent.name}/" for path in (ROOT / "src/flame").glob("*/__init__.py")}
    assert set(re.findall(r"\b\w+\.py\b|^  \w+/", tree, re.M)) == programs | {
        f"  {name}" for name in packages
    }


def test_the_cards_of_the_data_sets_are_written_down():
    assert (ROOT / "docs/datasets.md").read_text() == document()


def test_the_estimate_of_the_paper_study_is_written_down(tmp_path):
    page = tmp_path / "paper-study.md"
    page.write_text((ROOT / "docs/paper-study.md").read_text())
    runpy.run_path(str(ROOT / "docs/estimate.py"))["write"](page)
    assert page.read_text() == (ROOT / "docs/paper-study.md").read_text(), "run make docs"
