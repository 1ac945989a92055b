"""Who may import whom: stages -> parts -> ground; stages meet in files, ground needs no torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SRC = Path(__file__).parents[1] / "src"
STAGES = {
    "download",
    "caption",
    "embed",
    "plan",
    "train",
    "evaluate",
    "export",
    "clip_benchmark",
    "fewshot",
    "overhead",
    "table",
    "figure",
}
GROUND = {
    "config",
    "datasets",
    "failures",
    "fetch",
    "include",
    "integrity",
    "partial",
    "progress",
    "sections",
    "settings",
}
MODULES = sorted((SRC / "flame").rglob("*.py"))


def layer_of(name: str) -> str:
    return "stage" if name in STAGES else "ground" if name in GROUND else "part"


def room(path: Path) -> str:
    return path.relative_to(SRC / "flame").parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> set[str]:
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            rooms |= {a.name.split(".")[1] for a in node.names if a.name.startswith("flame.")}
        elif isinstance(node, ast.ImportFrom) and node.module == "flame":
            rooms |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("flame."):
            rooms.add(node.module.split(".")[1])
    return rooms


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(SRC)))
def test_imports_point_downwards(path):
    allowed = {
        "stage": {"part", "ground"},
        "part": {"part", "ground"},
        "ground": {"ground"},
    }
    if room(path) == "__init__":
        return
    for other in imported_rooms(path) - {room(path)}:
        assert layer_of(other) in allowed[layer_of(room(path))], f"{path.name} imports {other}"


@pytest.mark.parametrize("module", ["flame", "flame.config", "flame.datasets.scenes"])
def test_the_ground_imports_no_torch(module):
    code = f"import {module}, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=SRC).returncode == 0


def test_no_room_without_a_name():
    assert not [path for path in MODULES if path.stem in {"utils", "helpers", "common", "misc"}]
