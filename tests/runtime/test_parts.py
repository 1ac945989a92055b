"""Parts of embedding and captioning jobs: no overlap, no gap, side by side, and never one twice."""

import io
import json
import os
import signal
import sys
import time
from itertools import pairwise
from multiprocessing import Process
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from PIL import Image

from flame import caption
from flame import embed as stage
from flame.captioning.engines import Reply
from flame.data.datasets import Sample
from flame.data.shards import ShardWriter
from flame.embedding import checkpoints
from flame.embedding.store import Embeddings
from flame.runtime import command
from flame.runtime.parts import rows_of
from flame.study.schema.data import TransformersCaptioner
from flame.study.settings import CaptionSettings, CaptionsSettings, EmbedSettings
from tests import forks

IMAGES = 11
SETTINGS = EmbedSettings(
    kind="long",
    datasets=("scenes", "few"),
    part=0,
    parts=1,
    llm="tiny",
    layer="last",
    final_norm=True,
    positions="restart",
    max_caption_tokens=40,
    cleanup="none",
    storage="float16",
    prefix=('Description: "', '". In one word,'),
    facets={"category": " the category:", "mood": " the mood:"},
    version=1,
)
CAPTIONER = TransformersCaptioner(
    engine="transformers",
    id="none",
    prompts={"long": "What is it?", "short": "In short?"},
    max_tokens={"long": 50, "short": 20},
)


def write_captions(folder: Path, captions: int) -> None:
    """Captions of two kinds; of each, an image has two, but the last one if they are uneven."""
    folder.mkdir()
    rows = [
        {"key": f"{i // 2:05d}", "kind": kind, "text": f"{kind} number {i}", "flags": ""}
        for i in range(captions)
        for kind in ("short", "long")
    ]
    pl.DataFrame(rows).write_parquet(folder / "captions.parquet")


def test_parts_have_every_row_once_and_in_order():
    for total in range(60):
        for parts in range(1, 70):
            each = [rows_of(total, part, parts) for part in range(parts)]
            assert [row for rows in each for row in rows] == list(range(total))
            assert max(map(len, each)) - min(map(len, each)) <= 1
    for total, parts in ((2_823_019, 283), (14_772_456, 1478), (10**12 + 7, 997)):
        edges = [rows_of(total, part, parts) for part in range(parts)]
        assert edges[0].start == 0
        assert edges[-1].stop == total
        assert all(one.stop == two.start for one, two in pairwise(edges))


def test_a_part_that_is_none_is_refused():
    with pytest.raises(ValueError, match="part 3 of 3; known: 0 to 2"):
        rows_of(10, 3, 3)


@pytest.mark.parametrize("captions", [1, 2, 7, 10])
def test_parts_of_captions_to_embed_are_all_captions(tmp_path, captions):
    write_captions(tmp_path / "scenes", captions)
    folders = [tmp_path / "scenes"]
    for parts in (1, 2, 3, 7, 11):
        found = []
        for part in range(parts):
            changes = {"datasets": ("scenes",), "part": part, "parts": parts}
            asked = SETTINGS.model_copy(update=changes)
            found += stage._captions(folders, asked)["scenes"].rows()
        assert found == [(f"{i // 2:05d}", f"long number {i}") for i in range(captions)]


class Painter:
    """Stands for a multimodal LLM: says what colour an image has."""

    batch, calls = 1, 1

    async def describe(self, requests):
        return [Reply(f"All of it is {r.image.getpixel((0, 0))}.", "stop") for r in requests]

    def close(self):
        pass


@pytest.fixture
def pictures(tmp_path, monkeypatch):
    """Data set of as many colours as images, and a captioner that tells them."""
    writer = ShardWriter(tmp_path / "pictures", samples_per_shard=4)
    for i in range(IMAGES):
        png = io.BytesIO()
        Image.new("RGB", (8, 8), (i, 0, 0)).save(png, "PNG")
        writer.add(Sample(key=f"p{i}", image=png.getvalue(), captions={"raw": [f"raw {i}"]}))
    (tmp_path / "pictures" / "manifest.json").write_text(json.dumps(writer.close()))
    monkeypatch.setattr(caption.engines, "create", lambda captioner, seed: Painter())
    return tmp_path / "pictures"


def captioned(pictures: Path, out: Path, parts: int) -> pl.DataFrame:
    files = [out / f"{part}.parquet" for part in range(parts)]
    for part, path in enumerate(files):
        asked = CaptionSettings(
            dataset="pictures", part=part, parts=parts, captioner=CAPTIONER, version=1
        )
        caption.write(pictures, path, asked, chunk=2)
    wanted = CaptionsSettings(dataset="pictures", captioner=CAPTIONER, max_skipped=0.0, version=1)
    caption.join(pictures, files, out / "joined", wanted)
    return pl.read_parquet(out / "joined" / "captions.parquet")


@pytest.mark.parametrize("parts", [2, 3, 4, IMAGES, IMAGES + 3])
def test_parts_of_images_to_caption_are_all_images(pictures, tmp_path, parts):
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
    whole = captioned(pictures, tmp_path / "whole", 1)
    expected = [f"All of it is ({i}, 0, 0)." for i in range(IMAGES)]
    assert whole.filter(kind="long")["text"].to_list() == expected
    assert captioned(pictures, tmp_path / "parts", parts).equals(whole)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A random LLM and two data sets, of 1,300 and of 1 long caption."""
    root = tmp_path_factory.mktemp("parts")
    checkpoints.random("llama", root / "llm", layers=2, width=16, heads=2)
    write_captions(root / "scenes", 1300)
    write_captions(root / "few", 1)
    return root


def embed(inputs: Path, out: Path, part: int, parts: int) -> None:
    asked = SETTINGS.model_copy(update={"part": part, "parts": parts})
    folders = [inputs / name for name in asked.datasets]
    stage.embed(inputs / "llm", folders, out, asked, threads=1)


def job(errors: str, flags: list[str]) -> None:
    """The stage as its command line runs it, in a process of its own."""
    sys.stderr = os.fdopen(os.open(errors, os.O_WRONLY | os.O_CREAT), "w", buffering=1)
    sys.argv = ["embed", *flags]
    command.main(stage.embed)


def start(inputs: Path, out: Path, name: str, part: int, parts: int) -> Process:
    asked = SETTINGS.model_copy(update={"part": part, "parts": parts})
    flags = f"--llm {inputs / 'llm'} --out {out} --datasets {inputs / 'scenes'} {inputs / 'few'}"
    arguments = [*flags.split(), "--threads", "1", "--settings", asked.model_dump_json()]
    return forks.start(job, str(out.parent / f"{name}.err"), arguments)


def test_two_jobs_side_by_side_embed_what_one_does(inputs, tmp_path):
    embed(inputs, tmp_path / "whole.zarr", 0, 1)
    paths = [tmp_path / f"{part}.zarr" for part in range(2)]
    jobs = [start(inputs, path, str(part), part, 2) for part, path in enumerate(paths)]
    for each in jobs:
        each.join()
        assert each.exitcode == 0
    for dataset in SETTINGS.datasets:
        whole = Embeddings.open([tmp_path / "whole.zarr"], dataset)
        halves = Embeddings.open(paths[::-1], dataset)
        assert halves.keys.equals(whole.keys)
        rows = np.arange(len(whole.keys))
        np.testing.assert_allclose(halves.rows(rows), whole.rows(rows), atol=2e-2, rtol=2e-2)


def test_a_second_job_of_the_same_part_is_refused_and_told_by_whom(inputs, tmp_path):
    out = tmp_path / "0.zarr"
    first = start(inputs, out, "first", 0, 1)
    while not (tmp_path / "0.zarr.partial" / "content").exists():
        assert first.is_alive()
        time.sleep(0.002)
    os.kill(first.pid, signal.SIGSTOP)  # as long as the second needs, and its lease still counts
    second = start(inputs, out, "second", 0, 1)
    second.join()
    os.kill(first.pid, signal.SIGCONT)
    first.join()
    assert (first.exitcode, second.exitcode) == (0, 1)
    told = (tmp_path / "second.err").read_text()
    assert f"error: {out}.partial is being written by process {first.pid} on " in told
    assert Embeddings.open([out], "scenes").attributes["counts"]["scenes"]["rows"] == 1300
