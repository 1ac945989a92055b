"""Who may import whom: a package imports itself and those to its left, a program only packages."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

FLAME = Path(__file__).parents[1] / "src/flame"
PACKAGES = [
    "runtime",
    "data",
    "study",
    "captioning",
    "embedding",
    "towers",
    "training",
    "evaluation",
    "report",
]
FILES = sorted(FLAME.rglob("*.py"))


def imported(path: Path) -> set[str]:
    """First name below `flame` of everything that a file imports."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    names = [a.name for node in nodes if isinstance(node, ast.Import) for a in node.names]
    for node in nodes:
        if isinstance(node, ast.ImportFrom):
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return {name.split(".")[1] for name in names if name.startswith("flame.")}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(FLAME)))
def test_imports_point_one_way(path):
    room = path.relative_to(FLAME).parts[0]
    known = PACKAGES[: PACKAGES.index(room) + 1] if room in PACKAGES else PACKAGES
    assert imported(path) - {"__version__"} <= set(known)


def test_there_are_no_other_packages():
    assert {path.parent.name for path in FLAME.glob("*/__init__.py")} == set(PACKAGES)


@pytest.mark.parametrize(
    "code",
    [
        "import flame",
        "import flame.data.datasets.scenes",
        "import flame.study.jobs",
        "import flame.study.memory",
        "from flame.study.load import load_file; load_file(root / 'config/paper.yaml', root)",
    ],
)
def test_the_study_loads_neither_torch_nor_matplotlib(code):
    root = FLAME.parents[1]
    code = f"import pathlib, sys; root = pathlib.Path({str(root)!r}); {code}"
    code += "; sys.exit(bool({'torch', 'matplotlib'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], cwd=FLAME.parent).returncode == 0


# What a machine needs that only trains or runs an LLM, such as a rented one for bench/gpu.py.
STEP = [
    "flame.data.pixels",
    "flame.embedding.attention",
    "flame.embedding.llm",
    "flame.study.settings",
    "flame.towers.load",
    "flame.towers.pretrained",
    "flame.training.loader",
    "flame.training.trainer",
]


def test_a_training_step_loads_neither_polars_nor_zarr():
    code = f"import sys, {', '.join(STEP)}"
    code += "; sys.exit(', '.join({'polars', 'zarr'} & sys.modules.keys()) or 0)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=FLAME.parent, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_no_room_without_a_name():
    assert not [path for path in FILES if path.stem in {"utils", "helpers", "common", "misc"}]
