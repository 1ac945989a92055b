"""Published captions are joined by key; unknown keys and duplicates are counted."""

import json

import polars as pl
import pytest

from flame.study.schema.data import PublishedCaptions
from tests import test_caption
from tests.loopback import Loopback
from tests.test_caption import IMAGES, join, texts, write

pictures = test_caption.pictures
PUBLISHED = PublishedCaptions(
    engine="published",
    id="owner/captions",
    revision="a" * 40,
    files={"long": "long.json", "short": "short.jsonl"},
)


@pytest.fixture
def hub(monkeypatch):
    with Loopback() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server


def publish(hub, keys, **changes):
    """A hub's captions of some keys: long ones as a list, short ones as lines."""
    objects = [{"__key__": key, "minicpm": f" The image {key} is red. "} for key in keys]
    files = {
        "long.json": json.dumps(objects).encode(),
        "short.jsonl": "\n".join(map(json.dumps, objects)).encode(),
    }
    hub.hub(PUBLISHED.id, PUBLISHED.revision, files | changes)


def test_published_captions_are_joined_by_key_and_the_others_counted(pictures, hub, tmp_path):
    keys = [f"p{i}" for i in reversed(range(IMAGES))]
    publish(hub, [*keys, "p2", "elsewhere", "p2"])
    path = write(pictures, tmp_path / "0.parquet", captioner=PUBLISHED)
    table, report = join(pictures, [path], PUBLISHED)
    expected = {key: f"The image {key} is red." for key in keys}
    assert texts(table, "long") == texts(table, "short") == expected
    assert len(table.filter(pl.col("kind") != "raw")) == 2 * IMAGES
    # Of each of the two files.
    assert (report["unknown"], report["double"], report["images"]) == (2, 4, IMAGES)
    assert report["images_per_second"] is None
    told = (tmp_path / "joined" / "report.md").read_text()
    assert "2 published captions belong to no image of this data set, 4 are second captions" in told


def test_too_many_images_without_a_published_caption_are_told_by_key(pictures, hub, tmp_path):
    publish(hub, ["p0", "p1", "p3", "p4", "p6"])
    path = write(pictures, tmp_path / "0.parquet", captioner=PUBLISHED)
    with pytest.raises(ValueError, match=r"2 of 7 images have no long caption.*20\.0%: p2, p5$"):
        join(pictures, [path], PUBLISHED, max_skipped=0.2)
    _, report = join(pictures, [path], PUBLISHED, max_skipped=0.3)
    assert report["missing"] == {"long": 2, "short": 2}


def test_an_empty_published_caption_is_none(pictures, hub, tmp_path):
    empty = json.dumps([{"__key__": "p0", "minicpm": " "}]).encode()
    publish(hub, [f"p{i}" for i in range(IMAGES)], **{"long.json": empty})
    path = write(pictures, tmp_path / "0.parquet", captioner=PUBLISHED)
    rows = pl.read_parquet(path).filter(kind="long").rows()
    assert rows == [("p0", "long", None, "empty,dropped")]


def test_published_objects_without_a_key_or_caption_are_refused(pictures, hub, tmp_path):
    other = json.dumps([{"__key__": "p0", "minicpm": "Red."}, {"id": "p1", "minicpm": "Red."}])
    publish(hub, [], **{"long.json": other.encode()})
    with pytest.raises(
        ValueError, match=r"object 1 of long\.json in 'owner/captions' has no '__key__'"
    ):
        write(pictures, tmp_path / "0.parquet", captioner=PUBLISHED)
    assert not (tmp_path / "0.parquet").exists()
