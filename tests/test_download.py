"""The download stage brings what it is told to into our forms."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import polars as pl
import pytest
from transformers import AutoModel

from flame import download
from flame.data import datasets
from flame.runtime import command

STAGE = {"dataset": download.dataset, "llm": download.llm}


def test_a_data_set_by_command_line(tmp_path, monkeypatch):
    out = tmp_path / "datasets" / "few"
    options = json.dumps({"split": "val", "images": 6, "raw": 1, "long": 2})
    arguments = ["--source", "scenes", "--options", options, "--seed", "1", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["download", "dataset", *arguments])
    command.main(STAGE)
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["images"] == len(pl.read_parquet(out / "index.parquet")) == 6
    assert manifest["captions"] == len(pl.read_parquet(out / "captions.parquet")) == 18
    assert manifest["skipped"] == []
    assert manifest["options"]["split"] == "val"
    assert [path.name for path in out.parent.iterdir()] == ["few"]


def test_an_llm_by_command_line(tmp_path, monkeypatch):
    checkpoint = {"source": "random", "architecture": "llama", "layers": 1, "width": 16}
    out = tmp_path / "llm"
    arguments = ["--checkpoint", json.dumps(checkpoint), "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["download", "llm", *arguments])
    command.main(STAGE)
    assert AutoModel.from_pretrained(out).config.hidden_size == 16
    assert json.loads((out / "flame.json").read_text())["origin"].startswith("random")


def broken_every(n: int) -> SimpleNamespace:
    """A data set of ten images of which every n-th cannot be read."""
    scenes = datasets.module("scenes")

    def read(root: Path, options, seed: int):
        for i, sample in enumerate(scenes.read(root, options, seed)):
            image = b"no image" if i % n == 0 else sample.image
            yield datasets.Sample(sample.key, image, sample.captions)

    return SimpleNamespace(**vars(scenes) | {"read": read})


@pytest.mark.parametrize(("n", "skipped"), [(10, 1), (2, None)])
def test_broken_images_are_listed_up_to_a_limit(tmp_path, monkeypatch, n, skipped):
    monkeypatch.setattr(download, "module", lambda name: broken_every(n))
    options, out = json.dumps({"split": "val", "images": 10}), tmp_path / "few"
    if skipped is None:
        with pytest.raises(
            ValueError, match=r"5 of 10 images are broken, more than 20.0%: val-000"
        ):
            download.dataset("scenes", options, 0, out, max_skipped=0.2)
        assert not out.exists()
    else:
        download.dataset("scenes", options, 0, out, max_skipped=0.2)
        assert len(json.loads((out / "manifest.json").read_text())["skipped"]) == skipped
        assert len(pl.read_parquet(out / "index.parquet")) == 9
