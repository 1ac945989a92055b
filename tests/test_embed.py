"""The embed stage writes all facets of every caption, and interruptions change no byte."""

import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from flame import embed as stage
from flame.embedding import checkpoints
from flame.embedding.llm import FrozenLLM, cleaned
from flame.embedding.speed import LLMSpeed
from flame.embedding.store import Embeddings
from flame.runtime import checksums, command
from flame.runtime.checksums import seal, sha256
from flame.study.settings import EmbedSettings

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


def write_captions(folder: Path, texts: list[str]) -> None:
    folder.mkdir(exist_ok=True)
    rows = [
        {"key": f"{i // 2:05d}", "kind": kind, "text": text, "flags": ""}
        for i, text in enumerate(texts)
        for kind in ("short", "long")
    ]
    pl.DataFrame(rows).write_parquet(folder / "captions.parquet")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random LLM and two data sets, of 2,600 and of 5 long captions."""
    root = tmp_path_factory.mktemp("inputs")
    checkpoints.random("llama", root / "llm", layers=2, width=16, heads=2)
    draw = random.Random(0)
    words = ["a", "red", "apple", "on", "the", "beach", "\n", '"', "北"]
    texts = [" ".join(draw.choices(words, k=draw.randint(0, 12))) for _ in range(2600)]
    write_captions(root / "scenes", texts)
    write_captions(root / "few", ["", "a", "b" * 100, "", "c"])
    return root


@pytest.fixture(scope="module")
def expected(inputs: Path) -> Path:
    run(inputs, inputs / "0.zarr")
    return inputs / "0.zarr"


def run(inputs: Path, out: Path, **changes: object) -> None:
    settings = SETTINGS.model_copy(update=changes)
    folders = [inputs / name for name in settings.datasets if (inputs / name).exists()]
    stage.embed(inputs / "llm", folders, out, settings, threads=1)


def job(*arguments: str) -> None:
    """The command line of the stage in a separate process."""
    sys.argv = ["embed", *arguments]
    command.main(stage.embed)


def start(inputs: Path, out: Path) -> multiprocessing.Process:
    flags = f"--llm {inputs / 'llm'} --out {out} --datasets {inputs / 'scenes'} {inputs / 'few'}"
    # A fork server imports torch once for all jobs; forking this process would not be safe.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["flame.embed"])
    arguments = [*flags.split(), "--threads", "1", "--settings", SETTINGS.model_dump_json()]
    process = context.Process(target=job, args=arguments)
    process.start()
    return process


def shards(out: Path) -> int:
    """Shards of the large data set that an unfinished job has written."""
    return len(list(out.with_name(out.name + ".partial").glob("**/scenes/embeddings/c/*/0/0")))


def content(store: Path) -> dict[str, bytes]:
    files = (path for path in store.rglob("*") if path.is_file())
    return {path.relative_to(store).as_posix(): path.read_bytes() for path in files}


def test_rows_are_the_embeddings_of_the_captions_in_their_order(inputs, expected):
    embeddings = Embeddings.open([expected], "few")
    llm = FrozenLLM(inputs / "llm")
    texts, cut = llm.truncate(["", "a", "b" * 100, "", "c"], 40)
    alone = [llm.embed([t], SETTINGS.prefix, list(SETTINGS.facets.values())) for t in texts]
    np.testing.assert_allclose(
        embeddings.rows(np.arange(5)), np.concatenate(alone), atol=2e-2, rtol=2e-2
    )
    assert embeddings.keys.to_list() == ["00000", "00000", "00001", "00001", "00002"]
    assert embeddings.attributes["counts"]["few"] == {"rows": 5, "empty": 2, "cut": cut}
    assert embeddings.facets == ("category", "mood")


def test_killed_jobs_resume_to_the_same_bytes(inputs, expected, tmp_path, caplog):
    out = tmp_path / "0.zarr"
    lease = tmp_path / "0.zarr.partial" / "lease.lock"
    for end, wanted in ((signal.SIGKILL, 0), (signal.SIGKILL, 1), (signal.SIGTERM, 3)):
        process = start(inputs, out)
        while shards(out) < wanted or not lease.exists():
            assert process.is_alive()
            time.sleep(0.002)
        os.kill(process.pid, end)
        process.join()
        assert process.exitcode == (-9 if end == signal.SIGKILL else 143)
        assert lease.exists() == (end == signal.SIGKILL)
        assert not out.exists()
    kept = 512 * shards(out)
    assert kept >= 3 * 512
    caplog.set_level("INFO")
    run(inputs, out)
    assert f"kept {kept} of 2605 captions" in caplog.text
    assert content(out) == content(expected)


@pytest.mark.parametrize("batches", [0, 3, 30, 50])
def test_an_interruption_at_any_batch_leaves_no_trace(
    inputs, expected, tmp_path, monkeypatch, batches
):
    class Interrupted(BaseException):
        pass

    class Failing(FrozenLLM):
        def embed_tokens(self, *args, on_batch, **kwargs):
            def count(captions):
                nonlocal batches
                batches -= 1
                if batches < 0:
                    raise Interrupted
                on_batch(captions)

            return super().embed_tokens(*args, on_batch=count, **kwargs)

    out = tmp_path / "0.zarr"
    with monkeypatch.context() as patch:
        patch.setattr(stage, "FrozenLLM", Failing)
        with pytest.raises(Interrupted):
            run(inputs, out)
    run(inputs, out)
    assert content(out) == content(expected)


@pytest.mark.parametrize("stopped", [0, 2, 5])
def test_shards_that_are_batched_together_leave_no_trace_of_an_interruption(
    inputs, expected, tmp_path, monkeypatch, stopped
):
    """As on a GPU, in groups of two shards: rows 0 to 1023, 1024 to 2047, 2048 to 2599."""
    speed = LLMSpeed(shards=2)
    monkeypatch.setattr(LLMSpeed, "of", lambda device: speed)
    run(inputs, tmp_path / "whole.zarr")
    for dataset in ("scenes", "few"):
        own, other = (
            Embeddings.open([path], dataset) for path in (tmp_path / "whole.zarr", expected)
        )
        rows = np.arange(len(own.keys))
        np.testing.assert_allclose(own.rows(rows), other.rows(rows), atol=2e-2, rtol=2e-2)

    class Interrupted(BaseException):
        pass

    write = stage.store.Writer.write

    def failing(writer, rows, vectors):
        nonlocal stopped
        stopped -= 1
        if stopped < 0:
            raise Interrupted
        write(writer, rows, vectors)

    out = tmp_path / "0.zarr"
    with monkeypatch.context() as patch:
        patch.setattr(stage.store.Writer, "write", failing)
        with pytest.raises(Interrupted):
            run(inputs, out)
    run(inputs, out)
    assert content(out) == content(tmp_path / "whole.zarr")


def test_a_changed_caption_starts_afresh(inputs, tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    write_captions(tmp_path / "few", ["old"])
    (tmp_path / "llm").symlink_to(inputs / "llm")
    with monkeypatch.context() as patch:
        patch.setattr(stage.progress, "bar", lambda *args, **kwargs: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(tmp_path, tmp_path / "0.zarr", datasets=("few",))
    write_captions(tmp_path / "few", ["new", "more"])
    run(tmp_path, tmp_path / "0.zarr", datasets=("few",))
    assert "starting over" in caplog.text
    assert len(Embeddings.open([tmp_path / "0.zarr"], "few").keys) == 2


def test_parts_are_slices_of_the_whole(inputs, expected, tmp_path):
    paths = [tmp_path / f"{part}.zarr" for part in range(3)]
    for part, path in enumerate(paths):
        run(inputs, path, part=part, parts=3)
    for dataset in ("scenes", "few"):
        whole, joined = (Embeddings.open(p, dataset) for p in ([expected], paths))
        assert joined.keys.equals(whole.keys)
        rows = np.arange(len(whole.keys))
        np.testing.assert_allclose(joined.rows(rows), whole.rows(rows), atol=2e-2, rtol=2e-2)


def test_a_job_hashes_no_large_file_that_is_as_it_was_when_it_was_sealed(
    inputs, expected, tmp_path, monkeypatch
):
    hashed = []

    def counted(path):
        hashed.append(path.name)
        return sha256(path)

    for module in (checksums, stage):
        monkeypatch.setattr(module, "sha256", counted)
    monkeypatch.setattr(checksums, "LARGE", 20_000)
    for name in ("llm", "scenes", "few"):
        shutil.copytree(inputs / name, tmp_path / name)
    old = time.time() - 60
    large = [tmp_path / "llm/model.safetensors", tmp_path / "scenes/captions.parquet"]
    for path in large:
        assert path.stat().st_size > checksums.LARGE
        os.utime(path, (old, old))
        seal(path.parent)
    hashed.clear()
    run(tmp_path, tmp_path / "0.zarr")
    assert "flame.json" in hashed
    assert not {path.name for path in large} & {*hashed} - {"captions.parquet"}
    assert hashed.count("captions.parquet") == 1  # that of the small data set, which is not sealed
    assert content(tmp_path / "0.zarr") == content(expected)


def test_unknown_names_are_told_with_the_known_ones(inputs, tmp_path):
    with pytest.raises(ValueError, match=r"no captions of kind 'longer'.*known: long, short"):
        run(inputs, tmp_path / "0.zarr", kind="longer")
    with pytest.raises(ValueError, match="no folder given for data set 'scene'"):
        run(inputs, tmp_path / "0.zarr", datasets=("scene",))


def test_a_gpu_that_is_too_small_is_told_before_any_data_is_read(inputs, tmp_path, monkeypatch):
    monkeypatch.setattr(stage, "device_of", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2 << 20, 4 << 20))
    with pytest.raises(ValueError, match=r"^embedding by llm needs .* of 0\.0 GB are free"):
        stage.embed(inputs / "llm", [tmp_path / "nowhere"], tmp_path / "0.zarr", SETTINGS)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a dog", "a dog."),
        ("a dog.", "a dog."),
        ('a "red" dog', "a 'red' dog."),
        ('it says "dog"', "it says 'dog'"),
        ("a dog?", "a dog."),
        ("", ""),
    ],
)
def test_a_caption_is_cleaned_as_the_release_does(text, expected):
    assert cleaned(text) == expected


def test_cleaning_changes_what_the_llm_reads(inputs, tmp_path):
    run(inputs, tmp_path / "0.zarr", datasets=("few",), cleanup="release", max_caption_tokens=None)
    llm = FrozenLLM(inputs / "llm")
    alone = llm.embed(["a."], SETTINGS.prefix, list(SETTINGS.facets.values()))
    found = Embeddings.open([tmp_path / "0.zarr"], "few").rows(np.array([1]))
    np.testing.assert_allclose(found, alone, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize(
    ("asked", "device", "captions", "fault", "compiled"),
    [
        ("auto", "cpu", 10**6, None, False),
        ("auto", "cuda", 10, None, False),
        ("auto", "cuda", 10**6, None, True),
        ("auto", "cuda", 10**6, "no C++ compiler", False),
        ("no", "cuda", 10**6, None, False),
        ("yes", "cpu", 10, None, True),
    ],
)
def test_many_captions_are_embedded_by_compiled_layers_on_a_gpu(
    monkeypatch, asked, device, captions, fault, compiled
):
    monkeypatch.setattr(stage, "device_of", lambda: torch.device(device))
    monkeypatch.setattr(stage, "compiler_fault", lambda *_: fault)
    assert stage._compiled(asked, captions) == compiled
