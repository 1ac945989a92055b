"""Broken or mismatched inputs are refused with an error that names the file."""

import io
import json
import random
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest
import torch
from PIL import Image

from flame import download
from flame.captioning.describe import raw_captions
from flame.captioning.parts import Row, description, write_chunk
from flame.data import datasets
from flame.data.datasets import Sample, Skipped, _links
from flame.data.images import ImageReader
from flame.data.json_objects import read_objects
from flame.data.pixels import RESIZES, ImageError
from flame.data.shards import ShardWriter
from flame.embed import embed
from flame.embedding import checkpoints, provenance, store
from flame.embedding.llm import FrozenLLM
from flame.evaluation.tasks import zeroshot
from flame.evaluation.vocabulary import Speaker
from flame.report import results
from flame.runtime.checksums import SUMS, read_json
from flame.training.tokens import Tokens
from tests.broken import broken_forms, flipped, replaced
from tests.embedding.test_store import ATTRIBUTES, FACETS, write
from tests.evaluation.test_tasks import asked as asked_of
from tests.test_embed import SETTINGS as EMBED


@pytest.fixture(scope="module", params=["float16", "fp8", "int8"])
def whole(request, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of 100 rows, in each storage format."""
    vectors = np.random.default_rng(0).standard_normal((100, len(FACETS), 8))
    folder = tmp_path_factory.mktemp("store")
    return write(folder / "0.zarr", vectors, storage=request.param)


def content(path: Path) -> tuple:
    """Everything that a stage reads from a store."""
    embeddings = store.Embeddings.open([path], "scenes")
    rows = embeddings.rows(np.arange(len(embeddings.keys)))
    return embeddings.attributes, embeddings.keys.to_list(), rows.tobytes()


def outcome(path: Path) -> tuple[tuple | None, str]:
    """What a stage reads from a store, or the error message."""
    try:
        return content(path), ""
    except ValueError as error:
        return None, str(error)


def files(path: Path) -> list[Path]:
    return [file for file in sorted(path.rglob("*")) if file.is_file()]


def test_no_bit_of_a_store_can_change_unseen(whole):
    expected, draw, refused = content(whole), random.Random(0), 0
    for file in files(whole):
        data = file.read_bytes()
        for place in {0, len(data) - 1, *(draw.randrange(len(data)) for _ in range(4))}:
            with replaced(file, flipped(data, place)):
                found, said = outcome(whole)
            # Bytes without meaning, such as spaces in JSON, may change.
            assert found == expected or str(whole) in said, (file, place)
            refused += bool(said)
    assert refused > 25


def test_no_file_of_a_store_can_be_missing_or_cut_unseen(whole):
    for file in files(whole):
        half = file.read_bytes()[: file.stat().st_size // 2]
        for data in (None, b"", half):
            with replaced(file, data), pytest.raises((ValueError, OSError)) as caught:
                content(whole)
            assert str(whole) in str(caught.value), (file, data)


def test_a_flipped_byte_is_found_in_what_is_read_and_only_there(tmp_path):
    vectors = np.random.default_rng(0).standard_normal((600, len(FACETS), 8))
    path = write(tmp_path / "0.zarr", vectors)
    row, facet = 517, 1
    shard = path / "scenes/embeddings/c/1/0/0"
    place = ((row - 512) * len(FACETS) + facet) * 16 + 5  # 8 values of 2 bytes a vector
    shard.write_bytes(flipped(shard.read_bytes(), place))
    embeddings = store.Embeddings.open([path], "scenes")
    others = np.delete(np.arange(600), row)
    np.testing.assert_array_equal(embeddings.rows(others), vectors.astype(np.float16)[others])
    embeddings.rows(np.array([row]), [FACETS[0]])
    broken = rf"{shard} is corrupt: facet number 1 of key 'key-517'"
    with pytest.raises(ValueError, match=broken):
        embeddings.rows(np.array([3, row]), [FACETS[1]])
    with pytest.raises(ValueError, match=broken):
        embeddings.mean()
    with pytest.raises(ValueError, match=broken):
        store.Embeddings.open([path], "scenes", cache_bytes=1 << 30)


def test_a_store_of_before_there_were_checksums_is_refused(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(store, "FORMAT", 1)
        path = write(tmp_path / "0.zarr", np.ones((3, len(FACETS), 8)), **ATTRIBUTES)
    with pytest.raises(ValueError, match=r"0\.zarr has store format 1, this version reads 3"):
        store.by_kind([path])


# Weights.


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("llm") / "llm"
    checkpoints.random("llama", out, layers=1)
    return out


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_broken_llm_is_named(llm, name):
    for data in broken_forms(llm / name):
        for reader in (FrozenLLM, Speaker):
            with replaced(llm / name, data), pytest.raises((ValueError, OSError)) as caught:
                reader(llm)
            assert str(llm / name) in str(caught.value), data


# Data sets.


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set as the download stage writes it."""
    out = tmp_path_factory.mktemp("data") / "datasets" / "scenes"
    options = {"split": "val", "images": 5, "raw": 1, "long": 1}
    download.dataset("scenes", json.dumps(options), 0, out)
    return out


ALONE = EMBED.model_copy(update={"datasets": ("scenes",)})
READERS = {
    "embed": lambda folder: embed(folder / "no-llm", [folder], folder / "out", ALONE),
    "CLIP": lambda folder: Tokens(folder / "captions.parquet", "raw", 8),
    "caption": lambda folder: raw_captions(folder, []),
    "images": lambda folder: ImageReader(folder),
}


@pytest.mark.parametrize(
    ("reader", "name"),
    [(r, "captions") for r in ("embed", "CLIP", "caption")] + [("images", "index")],
)
def test_torn_or_changed_tables_of_a_data_set_are_named(scenes, reader, name):
    file = scenes / f"{name}.parquet"
    for data in broken_forms(file):
        with replaced(file, data), pytest.raises((ValueError, OSError)) as caught:
            READERS[reader](scenes)
        assert str(file) in str(caught.value), data


def test_digests_are_those_of_sha256sum(scenes):
    subprocess.run(["sha256sum", "--check", "--strict", "--quiet", SUMS], cwd=scenes, check=True)


def test_torn_answers_of_an_engine_are_named(tmp_path):
    part = tmp_path / "0.parquet"
    write_chunk(part, [Row("k", "short", "a dog", "")], images=1)
    part.write_bytes(part.read_bytes()[:-9])
    with pytest.raises(ValueError, match=f"{part} is broken"):
        description(part)


@pytest.mark.parametrize("name", ["json", "parquet"])
def test_a_torn_result_is_named(tmp_path, name):
    metrics, hits = tmp_path / "m.json", tmp_path / "m.parquet"
    metrics.write_text('{"records": []}')
    columns = dict.fromkeys(("benchmark", "metric", "key"), pl.String) | {
        "query": pl.Int64,
        "hit": pl.Boolean,
    }
    pl.DataFrame(schema=columns).write_parquet(hits)
    results.read([metrics], [hits], {})
    torn = tmp_path / f"m.{name}"
    torn.write_bytes(torn.read_bytes()[:-4])
    with pytest.raises(ValueError, match=f"{torn} is broken"):
        results.read([metrics], [hits], {})


# Images.


def encoded(image: Image.Image, form: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def noise(width: int, height: int) -> Image.Image:
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


RED = Image.new("RGB", (40, 24), "red")
TURNED = Image.Exif()
TURNED[0x0112] = 6
STEPS = (np.arange(40 * 24).reshape(24, 40) * 64).astype(np.uint16)  # from black to nearly white
# Images as web crawls have them, with the mean of each channel where it is known.
ODD = {
    "one colour": (encoded(RED, "PNG"), (255, 0, 0)),
    "CMYK": (encoded(RED.convert("CMYK"), "JPEG", quality=100), (255, 0, 0)),
    "CMYK TIFF": (encoded(RED.convert("CMYK"), "TIFF"), (255, 0, 0)),
    "grey": (encoded(Image.new("L", (9, 9), 90), "JPEG"), (90, 90, 90)),
    "black and white": (encoded(Image.new("1", (9, 9), 1), "PNG"), (255, 255, 255)),
    "palette": (encoded(RED.convert("P"), "GIF"), (255, 0, 0)),
    "16 bits": (encoded(Image.fromarray(STEPS), "PNG"), (119.5,) * 3),
    "16 bits TIFF": (encoded(Image.fromarray(STEPS), "TIFF"), (119.5,) * 3),
    "turned": (encoded(noise(40, 24), "JPEG", exif=TURNED), None),
    "animated": (encoded(RED, "GIF", save_all=True, append_images=[noise(40, 24)]), (255, 0, 0)),
    "animated PNG": (
        encoded(RED, "PNG", save_all=True, append_images=[noise(40, 24)]),
        (255, 0, 0),
    ),
    "one pixel": (encoded(Image.new("RGB", (1, 1), "red"), "PNG"), (255, 0, 0)),
    "1 x 5,000": (encoded(noise(1, 5000), "PNG"), None),
    "5,000 x 1": (encoded(noise(5000, 1), "JPEG"), None),
}
BROKEN = {
    "no image": b"<html>not found</html>",
    "nothing": b"",
    "half": encoded(noise(40, 24), "JPEG")[:700],
    "numbers": encoded(
        Image.fromarray(np.linspace(-9, 900, 81).reshape(9, 9).astype("f4")), "TIFF"
    ),
}


def crawl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, max_skipped: float) -> Path:
    """A data set of all these images, as the download stage writes it."""
    images = {name: data for name, (data, _) in ODD.items()} | BROKEN

    def read(*_: object) -> Iterator[Sample]:
        return (
            Sample(name.replace(" ", "-"), data, {"raw": [name]}) for name, data in images.items()
        )

    module = SimpleNamespace(
        **vars(datasets.module("scenes")) | {"read": read, "size": lambda _: len(images)}
    )
    monkeypatch.setattr(download, "module", lambda _: module)
    out = tmp_path / "datasets" / "crawl"
    download.dataset(
        "scenes", json.dumps({"split": "val", "images": 1}), 0, out, max_skipped=max_skipped
    )
    return out


def test_odd_images_come_out_as_people_see_them_and_broken_ones_are_counted(tmp_path, monkeypatch):
    folder = crawl(tmp_path, monkeypatch, 0.3)
    manifest = read_json(folder / "manifest.json")
    assert [entry["key"] for entry in manifest["skipped"]] == [
        name.replace(" ", "-") for name in BROKEN
    ]
    assert manifest["reasons"] == {"broken image": len(BROKEN)}
    reader = ImageReader(folder)
    for row, (name, (_, mean)) in enumerate(ODD.items()):
        pixels = reader.read(row)
        if mean:
            np.testing.assert_allclose(pixels.mean((0, 1)), mean, atol=3, err_msg=name)
    assert reader.read([*ODD].index("turned")).shape == (40, 24, 3)
    for how in RESIZES:
        batch = reader.load(range(len(reader)), 32, how)
        assert batch.shape == (len(ODD), 3, 32, 32)


def test_too_many_broken_images_are_told_with_names(tmp_path, monkeypatch):
    with pytest.raises(
        ValueError, match=rf"4 of {len(ODD) + 4} images are broken, more than 10.0%: no-image"
    ):
        crawl(tmp_path, monkeypatch, 0.1)


def test_an_image_that_breaks_later_is_named_among_thousands(tmp_path):
    writer = ShardWriter(tmp_path, 1000)
    data = [encoded(noise(8 + i % 7, 8), "JPEG") for i in range(7)]
    for i in range(3000):
        writer.add(Sample(f"k{i}", data[i % 7], {}))
    writer.close()
    offset, size = pl.read_parquet(tmp_path / "index.parquet").select("offset", "size").row(1234)
    shard = tmp_path / "shard-00001.tar"
    # Inside the image data, where a JPEG would decode to other colours without an error.
    shard.write_bytes(flipped(shard.read_bytes(), offset + size - 20))
    reader = ImageReader(tmp_path)
    with pytest.raises(ImageError, match=rf"'k1234' in {shard} at byte {offset}: .*CRC32C"):
        reader.load(range(1200, 1300), 8)
    reader.load([*range(1200, 1234), *range(1235, 1300)], 8)


# Captions.

LATIN = "Un café".encode("latin-1")


def test_captions_of_another_encoding_are_left_out_and_told(tmp_path):
    shard = tmp_path / "0.tar"
    with tarfile.open(shard, "w") as tar:
        for name, data in {"a.jpg": b"1", "a.txt": LATIN, "b.jpg": b"2", "b.txt": b"a dog"}.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    left_out, kept = _links.samples([shard])
    assert left_out == Skipped("a", "caption is not UTF-8")
    assert kept.captions == {"raw": ["a dog"]}


@pytest.mark.parametrize("ends", [(b"[", b"]"), (b"", b"\n")], ids=["list", "lines"])
def test_published_captions_of_another_encoding_are_named(tmp_path, ends):
    file = tmp_path / "captions.json"
    file.write_bytes(ends[0] + b'{"key": "a", "text": "' + LATIN + b'"}' + ends[1])
    with pytest.raises(ValueError, match=f"{file} is not UTF-8"):
        list(read_objects(file))


# Embeddings of another LLM or prompt.

SPACE = {
    "llm": "small",
    "checkpoint": "a" * 64,
    "layer": "last",
    "final_norm": True,
    "positions": "restart",
    "cleanup": "none",
    "max_caption_tokens": None,
}


def embedded(folder: Path, kind: str, **attributes: object) -> store.Embeddings:
    """Embeddings of three captions of a kind."""
    path = write(folder / f"{kind}.zarr", np.ones((3, len(FACETS), 8)), kind=kind, **attributes)
    return store.Embeddings.open([path], "scenes")


@pytest.fixture
def trained(tmp_path) -> dict:
    """How the texts of a run were embedded, which matched two facets of raw captions."""
    stores = {"raw": embedded(tmp_path / "trained", "raw", **SPACE)}
    return json.loads(json.dumps(provenance.describe(stores, {"raw": FACETS[:2]})))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("llm", "other"),
        ("checkpoint", "b" * 64),
        ("layer", 3),
        ("final_norm", False),
        ("positions", "running"),
        ("cleanup", "release"),
        ("max_caption_tokens", 77),
        ("prefix", ["a", "c"]),
        ("facets", dict.fromkeys(FACETS, " another")),
    ],
)
@pytest.mark.parametrize("kind", ["raw", "class"])
def test_texts_that_were_embedded_otherwise_are_refused(trained, tmp_path, name, value, kind):
    other = embedded(tmp_path, kind, **SPACE | {name: value})
    said = rf"trained on embeddings with \w*{name.rstrip('s')}.*, those of the {kind} captions have"
    with pytest.raises(ValueError, match=said):
        provenance.check(trained, other, FACETS[:1], "raw")


def test_what_a_run_did_not_use_of_its_stores_may_change(trained, tmp_path):
    facets = ATTRIBUTES["facets"] | {FACETS[2]: " another"}
    provenance.check(
        trained, embedded(tmp_path / "a", "raw", **SPACE, facets=facets), FACETS, "raw"
    )
    # A kind that was used neither for training nor for centring may have any prompt.
    free = embedded(tmp_path / "b", "short", **SPACE, prefix=["x", "y"])
    provenance.check(trained, free, FACETS[:1], None)


def test_kinds_of_two_llms_are_not_trained_on_together(tmp_path):
    stores = {
        "raw": embedded(tmp_path, "raw", **SPACE),
        "long": embedded(tmp_path, "long", **SPACE | {"llm": "other"}),
    }
    with pytest.raises(ValueError, match='raw and of long captions differ in llm: "small" and "ot'):
        provenance.describe(stores, {"raw": FACETS, "long": FACETS})


# Numbers and labels at their ends.


def test_a_class_without_images_is_a_wrong_answer_and_no_error():
    texts = torch.eye(3)  # of cat, dog, fish; there is no picture of a fish
    images = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.2, 1.0]])
    answer = zeroshot.evaluate(
        asked_of(("xy", ["cat", "dog"], images), (["cat", "dog", "fish"], texts))
    )
    assert answer.metrics["top1"].hit.tolist() == [True, False]
