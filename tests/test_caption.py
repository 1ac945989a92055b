"""The program `caption`: parts resume, and are joined into one table with a report."""

import asyncio
import io
import json
from collections import defaultdict
from contextlib import suppress
from pathlib import Path

import polars as pl
import pytest
from PIL import Image

from flame import caption
from flame.captioning import describe
from flame.captioning.engines import Reply
from flame.captioning.engines.transformers import TransformersEngine
from flame.data.datasets import Sample
from flame.data.images import ImageReader
from flame.data.reading import shard_path
from flame.data.shards import ShardWriter
from flame.runtime.checksums import verify
from flame.study.schema.data import Sampling, TransformersCaptioner
from flame.study.settings import CaptionSettings, CaptionsSettings
from tests import tiny_vlm

IMAGES = 7
LONG, SHORT = "What is it?", "In short?"
CAPTIONER = TransformersCaptioner(
    engine="transformers",
    id="none",
    prompts={"long": LONG, "short": SHORT},
    max_tokens={"long": 50, "short": 20},
)


class Interrupted(BaseException):
    pass


class Scripted:
    """Stand-in for a multimodal LLM: names the red value of an image, or follows its script.

    Attributes:
        script: (red, prompt) -> reply, whenever asked; by default there is none.
        asked: (red, prompt) of all requests it has answered.
        until: answers after which it breaks off.
        batch: images of a call.
        calls: calls that it takes at once.
    """

    def __init__(self):
        self.batch, self.calls = 1, 1
        self.script = {}
        self.asked = []
        self.until = None

    async def describe(self, requests):
        questions = [(r.image.getpixel((0, 0))[0], r.prompt) for r in requests]
        if self.until is not None and len(self.asked) + len(questions) > self.until:
            raise Interrupted
        self.asked += questions
        return [self.script.get(q, Reply(self.own(*q), "stop")) for q in questions]

    def close(self):
        pass

    @staticmethod
    def own(red, prompt):
        return f"All of it is of red {red}." if prompt == LONG else f"Red {red}."


@pytest.fixture
def engine(monkeypatch):
    found = Scripted()
    monkeypatch.setattr(caption.engines, "create", lambda captioner, seed: found)
    return found


@pytest.fixture
def pictures(tmp_path) -> Path:
    """Images of one colour each; the last has no raw caption, the first has two."""
    folder = tmp_path / "pictures"
    writer = ShardWriter(folder, samples_per_shard=4)
    for i in range(IMAGES):
        png = io.BytesIO()
        Image.new("RGB", (8, 8), (i, 0, 0)).save(png, "PNG")
        raw = [f"raw {i}", "another"] if i == 0 else [f"raw {i}"] * (i < IMAGES - 1)
        writer.add(Sample(key=f"p{i}", image=png.getvalue(), captions={"raw": raw}))
    (folder / "manifest.json").write_text(json.dumps(writer.close()))
    return folder


def write(pictures, path, part=0, parts=1, captioner=CAPTIONER, chunk=2):
    asked = CaptionSettings(
        dataset="pictures", part=part, parts=parts, captioner=captioner, version=1
    )
    caption.write(pictures, path, asked, chunk=chunk)
    return path


def join(pictures, paths, captioner=CAPTIONER, max_skipped=0.0):
    wanted = CaptionsSettings(
        dataset="pictures", captioner=captioner, max_skipped=max_skipped, version=1
    )
    out = pictures.parent / "joined"
    caption.join(pictures, paths, out, wanted)
    verify(out)
    return pl.read_parquet(out / "captions.parquet"), json.loads((out / "report.json").read_text())


def texts(table, kind):
    return dict(table.filter(kind=kind).select("key", "text").rows())


def test_every_image_has_both_captions_and_its_raw_ones(pictures, engine, tmp_path):
    paths = [write(pictures, tmp_path / f"{part}.parquet", part, 2) for part in range(2)]
    table, report = join(pictures, paths[::-1])
    assert texts(table, "long") == {f"p{i}": Scripted.own(i, LONG) for i in range(IMAGES)}
    assert texts(table, "short") == {f"p{i}": Scripted.own(i, SHORT) for i in range(IMAGES)}
    raw = pl.read_parquet(pictures / "captions.parquet")
    assert table.filter(kind="raw").equals(raw)
    assert len(table) == 2 * IMAGES + len(raw)
    assert set(table["flags"]) == {""}
    assert (report["images"], report["parts"], report["broken"]) == (IMAGES, 2, 0)
    assert report["missing"] == {"long": 0, "short": 0}
    assert report["flags"] == {"long": {}, "short": {}}


def test_an_interrupted_part_goes_on_after_its_last_whole_chunk(pictures, engine, tmp_path, caplog):
    out = tmp_path / "0.parquet"
    engine.until = 10  # two chunks of two images, and half of the third
    with pytest.raises(Interrupted):
        write(pictures, out)
    assert not out.exists()
    assert len(engine.asked) == 10
    engine.until = None
    caplog.set_level("INFO")
    write(pictures, out)
    assert f"resuming: 4 of {IMAGES} images are done" in caplog.text
    every = [(i, prompt) for i in range(IMAGES) for prompt in (LONG, SHORT)]
    assert engine.asked == every[:10] + every[8:]
    whole = pl.read_parquet(write(pictures, tmp_path / "whole.parquet"))
    assert pl.read_parquet(out).equals(whole)


def test_a_changed_prompt_starts_afresh(pictures, engine, tmp_path):
    out = tmp_path / "0.parquet"
    engine.until = 10
    with pytest.raises(Interrupted):
        write(pictures, out)
    engine.until, engine.asked = None, []
    prompts = {"long": LONG, "short": "Briefly?"}
    write(pictures, out, captioner=CAPTIONER.model_copy(update={"prompts": prompts}))
    every = [(i, prompt) for i in range(IMAGES) for prompt in prompts.values()]
    assert engine.asked == every


class Slow(Scripted):
    """Answers about some images only after it was asked about some others.

    Attributes:
        after: red of an image -> red of the one that must have been asked about before it ends.
        most: images that it was asked about at once.
    """

    def __init__(self, after, calls):
        super().__init__()
        self.after, self.calls = after, calls
        self.seen, self.now, self.most = defaultdict(asyncio.Event), 0, 0

    async def describe(self, requests):
        red = requests[0].image.getpixel((0, 0))[0]
        self.now += 1
        self.most = max(self.most, self.now)
        self.seen.setdefault(red, asyncio.Event()).set()
        if red in self.after:
            await asyncio.wait_for(
                self.seen.setdefault(self.after[red], asyncio.Event()).wait(), 30
            )
        self.now -= 1
        return await super().describe(requests)


def test_no_image_waits_for_the_chunk_before_it(pictures, engine, tmp_path, monkeypatch):
    whole = pl.read_parquet(write(pictures, tmp_path / "whole.parquet"))
    # The first image of every chunk of two ends after all other chunks have begun.
    slow = Slow({0: IMAGES - 1, 2: IMAGES - 2, 4: IMAGES - 1}, calls=4)
    monkeypatch.setattr(caption.engines, "create", lambda captioner, seed: slow)
    assert pl.read_parquet(write(pictures, tmp_path / "0.parquet")).equals(whole)
    reds = [red for red, prompt in slow.asked if prompt == LONG]
    assert reds.index(0) > reds.index(3)


def test_a_part_with_a_hole_resumes(pictures, engine, tmp_path, monkeypatch):
    whole = pl.read_parquet(write(pictures, tmp_path / "whole.parquet"))
    # The first chunk is under way when the last but one, of images 4 and 5, is complete.
    slow = Slow({0: 99}, calls=2)
    slow.until = 10
    monkeypatch.setattr(caption.engines, "create", lambda captioner, seed: slow)
    with pytest.raises(Interrupted):
        write(pictures, tmp_path / "0.parquet")
    left = {path.name for path in tmp_path.glob("0.parquet.partial/content/chunk-*.parquet")}
    assert left == {"chunk-00001.parquet", "chunk-00002.parquet"}
    slow.until, slow.after, slow.asked = None, {}, []
    assert pl.read_parquet(write(pictures, tmp_path / "0.parquet")).equals(whole)
    assert {red for red, _ in slow.asked} == {0, 1, 6}


def test_a_sampled_part_that_was_interrupted_ends_with_the_same_captions(
    pictures, tmp_path, monkeypatch
):
    # Whatever a random model writes counts as good, so that nothing is replaced.
    monkeypatch.setattr(describe, "faults", lambda text, finish: ())
    model = tiny_vlm.save(tmp_path / "model")
    sampled = {"sampling": Sampling(temperature=1.0), "max_tokens": {"long": 9, "short": 5}}
    captioner = CAPTIONER.model_copy(update={"id": str(model), "batch_size": 1, **sampled})
    whole = write(pictures, tmp_path / "whole.parquet", captioner=captioner, chunk=4)
    generate = TransformersEngine._generate
    calls = []

    def interrupted(self, requests):
        calls.append(requests)
        if len(calls) > 6:  # three images
            raise Interrupted
        return generate(self, requests)

    monkeypatch.setattr(TransformersEngine, "_generate", interrupted)
    out = tmp_path / "0.parquet"
    rounds = 0
    while not out.exists():
        calls.clear()
        rounds += 1
        with suppress(Interrupted):
            write(pictures, out, captioner=captioner, chunk=1)
    assert 1 < rounds < 9
    assert pl.read_parquet(out).equals(pl.read_parquet(whole))
    assert pl.read_parquet(out)["text"].n_unique() == 2 * IMAGES


@pytest.mark.parametrize("calls", [1, 3])
def test_only_so_many_images_are_in_memory(pictures, engine, tmp_path, monkeypatch, calls):
    slow = Slow({}, calls)
    monkeypatch.setattr(caption.engines, "create", lambda captioner, seed: slow)
    write(pictures, tmp_path / "0.parquet")
    assert slow.most <= calls + 1  # and one that a worker decoded ahead


def test_parts_differ_in_the_seed_of_their_engine(pictures, tmp_path, monkeypatch):
    seeds = []
    monkeypatch.setattr(
        caption.engines, "create", lambda captioner, seed: seeds.append(seed) or Scripted()
    )
    for part in (0, 1, 0):
        write(pictures, tmp_path / f"{len(seeds)}.parquet", part, 2)
    assert seeds[0] == seeds[2] != seeds[1]


def refusing(reds):
    return {(red, prompt): Reply("no", "error") for red in reds for prompt in (LONG, SHORT)}


def test_an_engine_that_answers_nothing_ends_the_job_and_a_few_bad_images_do_not(
    pictures, engine, tmp_path, caplog, monkeypatch
):
    monkeypatch.setattr(describe, "DEAD", 4)
    engine.script |= refusing([2, 3])  # all of the second chunk
    with pytest.raises(ValueError, match=r"all 4 requests failed.*: no"):
        write(pictures, tmp_path / "0.parquet")
    engine.script = refusing([2])
    write(pictures, tmp_path / "0.parquet")
    assert "2 of 4 requests failed: long of 'p2' (no), short of 'p2' (no)" in caplog.text


def test_parts_that_are_not_all_or_of_another_captioner_are_refused(pictures, engine, tmp_path):
    other = CAPTIONER.model_copy(update={"revision": "b" * 40})
    first = write(pictures, tmp_path / "0.parquet", 0, 2)
    second = write(pictures, tmp_path / "1.parquet", 1, 2, captioner=other)
    with pytest.raises(
        ValueError, match=r"1\.parquet and the study differ in captioner: .*bbb.*null"
    ):
        join(pictures, [first, second])
    with pytest.raises(ValueError, match=r"found parts \[0\], expected all of 2 parts"):
        join(pictures, [first])
    with pytest.raises(ValueError, match=r"0\.parquet and the study differ in captioner: "):
        join(pictures, [first, second], captioner=other)


def test_a_part_of_other_images_is_refused(pictures, engine, tmp_path):
    path = write(pictures, tmp_path / "0.parquet")
    raw = pl.read_parquet(pictures / "captions.parquet")
    raw.with_columns(text=pl.lit("changed")).write_parquet(pictures / "captions.parquet")
    with pytest.raises(ValueError, match=r"0\.parquet and the study differ in inputs: "):
        join(pictures, [path])


def test_files_that_are_no_parts_are_refused_by_name(pictures, engine, tmp_path):
    (tmp_path / "torn.parquet").write_bytes(b"PAR1 torn")
    with pytest.raises(ValueError, match=r"torn\.parquet is broken: .*; delete it and run again"):
        join(pictures, [tmp_path / "torn.parquet"])
    with pytest.raises(ValueError, match=r"captions\.parquet does not say how"):
        join(pictures, [pictures / "captions.parquet"])


def test_the_report_counts_flags_words_and_speed(pictures, engine, tmp_path):
    engine.script[1, LONG] = Reply("cut off in the", "length")
    engine.script[2, SHORT] = Reply("", "stop")
    engine.script[3, LONG] = Reply("one two", "stop")
    table, report = join(pictures, [write(pictures, tmp_path / "0.parquet")])
    bad = table.filter(pl.col("flags") != "").sort("key").rows()
    assert bad == [
        ("p1", "long", "raw 1", "cut,retried,fallback"),
        ("p2", "short", "raw 2", "empty,retried,fallback"),
    ]
    assert report["flags"] == {
        "long": {"cut": 1, "retried": 1, "fallback": 1},
        "short": {"empty": 1, "retried": 1, "fallback": 1},
    }
    # Five captions of 7 words, `raw 1` and `one two`; six of 2 words and `raw 2`.
    long = {"captions": 7, "mean": pytest.approx(39 / 7), "5%": 2, "50%": 7, "95%": 7}
    assert report["words"]["long"] == long
    assert report["words"]["short"] == {"captions": 7, "mean": 2.0, "5%": 2, "50%": 2, "95%": 2}
    assert report["seconds"] > 0
    assert report["images_per_second"] == pytest.approx(IMAGES / report["seconds"])
    told = (tmp_path / "joined" / "report.md").read_text()
    assert "7 images in 1 parts" in told
    assert "| long | cut | 1 | 14.29% |" in told
    assert "| short | no caption | 0 | 0.00% |" in told


def test_the_first_raw_caption_stands_in_or_none_where_there_is_none(pictures, engine, tmp_path):
    engine.script |= {(i, LONG): Reply("", "stop") for i in (0, IMAGES - 1)}
    table = pl.read_parquet(write(pictures, tmp_path / "0.parquet"))
    assert table.filter(pl.col("flags") != "").rows() == [
        ("p0", "long", "raw 0", "empty,retried,fallback"),
        (f"p{IMAGES - 1}", "long", None, "empty,retried,dropped"),
    ]


def test_a_text_that_too_many_images_share_gives_way_to_the_raw_one(pictures, engine, tmp_path):
    for i in (0, 1, IMAGES - 1):
        engine.script[i, LONG] = Reply("A picture of something.", "stop")
    for i in (0, 1):
        engine.script[i, SHORT] = Reply("A picture.", "stop")
    captioner = CAPTIONER.model_copy(update={"max_alike": 2})
    path = write(pictures, tmp_path / "0.parquet", captioner=captioner)
    table, report = join(pictures, [path], captioner, max_skipped=0.2)
    alike = table.filter(pl.col("flags").str.contains("alike")).rows()
    assert alike == [(f"p{i}", "long", f"raw {i}", "alike,fallback") for i in (0, 1)]
    assert f"p{IMAGES - 1}" not in texts(table, "long")
    assert report["flags"]["long"] == {"alike": 3, "fallback": 2, "dropped": 1}
    assert report["missing"] == {"long": 1, "short": 0}
    assert texts(table, "short")["p1"] == "A picture."


def test_a_broken_image_is_flagged_and_its_neighbours_are_described(pictures, engine, tmp_path):
    tar = bytearray(shard_path(pictures, 0).read_bytes())
    _, offsets, _ = ImageReader(pictures)._places
    tar[offsets[1] + 20] ^= 0xFF
    shard_path(pictures, 0).write_bytes(tar)
    path = write(pictures, tmp_path / "0.parquet")
    rows = pl.read_parquet(path).filter(key="p1").rows()
    assert rows == [("p1", kind, None, "broken") for kind in ("long", "short")]
    with pytest.raises(ValueError, match=r"1 of 7 images have no long caption, .*10\.0%: p1"):
        join(pictures, [path], max_skipped=0.1)
    table, report = join(pictures, [path], max_skipped=0.2)
    assert report["broken"] == 1
    assert report["flags"] == {"long": {"broken": 1}, "short": {"broken": 1}}
    assert [*texts(table, "long")] == [f"p{i}" for i in range(IMAGES) if i != 1]


def test_an_image_that_the_engine_refuses_counts_as_missing(pictures, engine, tmp_path):
    engine.script[3, LONG] = Reply("too large", "error")
    path = write(pictures, tmp_path / "0.parquet")
    table, report = join(pictures, [path], max_skipped=0.2)
    assert texts(table, "long")["p3"] == "raw 3"
    assert report["missing"] == {"long": 1, "short": 0}
    assert report["refused"] == {"long": ["p3"], "short": []}
    assert "Refused by the engine, long: p3." in (tmp_path / "joined/report.md").read_text()
    with pytest.raises(ValueError, match=r"1 of 7 images have no long caption.*: p3"):
        join(pictures, [path])
