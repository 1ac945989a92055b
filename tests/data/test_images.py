"""Shards are tars with true offsets; images come out upright in RGB."""

import io
import pickle
import tarfile

import numpy as np
import polars as pl
import pytest
import torch
from PIL import Image

from flame.data.datasets import Sample
from flame.data.images import ImageReader
from flame.data.pixels import ImageError, decode, square, to_rgb
from flame.data.shards import ShardWriter

EXIF_ORIENTATION, TURNED_RIGHT = 0x0112, 6


def encoded(image, image_format="PNG", **settings):
    file = io.BytesIO()
    image.save(file, image_format, **settings)
    return file.getvalue()


def picture(seed, size=(8, 8)):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def samples():
    return [
        # The long key needs more than one header block in the tar.
        Sample(key, encoded(picture(i)), {"raw": [f"r{i}"], "long": [f"l{i}", f"m{i}"]}, label)
        for i, (key, label) in enumerate(
            [("a", "x"), ("b" * 150, None), ("c", "x"), ("d", "y"), ("e", None)]
        )
    ]


def write(root, samples, samples_per_shard=2):
    writer = ShardWriter(root, samples_per_shard)
    for sample in samples:
        writer.add(sample)
    return writer


@pytest.fixture
def root(tmp_path):
    writer = write(tmp_path, samples())
    writer.add_classes({"x": ["an x", "x"], "y": ["a y"]})
    assert writer.close() == {"images": 5, "captions": 18, "shards": 3}
    return tmp_path


def reader_of(tmp_path, *images):
    write(tmp_path, [Sample(f"k{i}", image, {}) for i, image in enumerate(images)]).close()
    return ImageReader(tmp_path)


def test_offsets_lead_to_the_members_of_a_standard_tar(root):
    rows = pl.read_parquet(root / "index.parquet").to_dicts()
    assert [row["shard"] for row in rows] == [0, 0, 1, 1, 2]
    for row, sample in zip(rows, samples(), strict=True):
        path = root / f"shard-{row['shard']:05d}.tar"
        assert path.read_bytes()[row["offset"] :][: row["size"]] == sample.image
        with tarfile.open(path) as tar:
            assert tar.extractfile(f"{sample.key}.png").read() == sample.image
        assert (row["key"], row["width"], row["height"], row["label"]) == (
            sample.key,
            8,
            8,
            sample.label,
        )


def test_captions_stand_in_file_order_with_the_classes_last(root):
    rows = pl.read_parquet(root / "captions.parquet")
    assert rows.columns == ["key", "kind", "text", "flags"]
    assert rows["text"].to_list()[:4] == ["r0", "l0", "m0", "r1"]
    assert rows.filter(kind="class").select("key", "text").rows() == [
        ("x", "an x"),
        ("x", "x"),
        ("y", "a y"),
    ]


def test_same_samples_give_the_same_files(tmp_path):
    for name in ("one", "two"):
        write(tmp_path / name, samples()).close()
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()


def test_further_images_of_a_key_are_read_by_number(tmp_path):
    drawings = [[encoded(picture(10 * i + number)) for number in range(3)] for i in range(3)]
    made = [
        Sample(f"k{i}", first, {}, more=tuple(more)) for i, (first, *more) in enumerate(drawings)
    ]
    assert write(tmp_path, made).close() == {"images": 3, "captions": 0, "shards": 2}
    with tarfile.open(tmp_path / "shard-00000.tar") as tar:
        assert tar.getnames()[:3] == ["k0.png", "k0.1.png", "k0.2.png"]
    reader = ImageReader(tmp_path)
    assert (len(reader), reader.drawings) == (3, 3)
    for drawing in range(3):
        read = reader.request(np.array([2, 0]), 8, drawing=drawing)()
        for pixels, i in zip(read, (2, 0), strict=True):
            np.testing.assert_array_equal(pixels.transpose(1, 2, 0), picture(10 * i + drawing))


def test_samples_have_the_same_number_of_images(tmp_path):
    image = encoded(picture(0))
    with pytest.raises(ValueError, match="'b' has 1 further images, others 0"):
        write(tmp_path, [Sample("a", image, {}), Sample("b", image, {}, more=(image,))])


@pytest.mark.parametrize("key", ["a.b", "a/b", "a"])
def test_bad_keys_are_refused(tmp_path, key):
    with pytest.raises(ValueError, match=f"'{key}' is a duplicate or contains"):
        write(
            tmp_path, [Sample("a", encoded(picture(0)), {}), Sample(key, encoded(picture(0)), {})]
        )


def test_unreadable_image_is_refused_and_the_writer_goes_on(tmp_path):
    writer = ShardWriter(tmp_path, 2)
    for data in (b"no image", b"", encoded(picture(0), "GIF")):
        with pytest.raises(ImageError, match="'bad'"):
            writer.add(Sample("bad", data, {}))
    writer.add(Sample("good", encoded(picture(0)), {}))
    assert writer.close()["images"] == 1


def test_reader_gives_the_pixels_even_after_pickling(root):
    reader = pickle.loads(pickle.dumps(ImageReader(root)))
    assert reader.keys.to_list() == [sample.key for sample in samples()]
    assert len(reader) == 5
    assert reader.labels == ["x", None, "x", "y", None]
    for i in (3, 0, 4):
        np.testing.assert_array_equal(reader.read(i), np.asarray(picture(i)))
    batch = reader.load([1, 1, 2], size=8)
    assert batch.dtype == torch.uint8
    assert batch.shape == (3, 3, 8, 8)
    np.testing.assert_array_equal(batch[2].permute(1, 2, 0), np.asarray(picture(2)))


def test_every_mode_comes_out_as_rgb(tmp_path):
    red = Image.new("RGB", (8, 8), "red")
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    shown = {
        "palette": (encoded(red.convert("P")), (255, 0, 0)),
        "grey": (encoded(Image.new("L", (8, 8), 90)), (90, 90, 90)),
        "CMYK": (encoded(red.convert("CMYK"), "JPEG", quality=100), (255, 0, 0)),
        "transparent": (encoded(clear), (255, 255, 255)),
        "transparent palette": (
            encoded(Image.new("P", (8, 8), 0), transparency=0),
            (255, 255, 255),
        ),
    }
    reader = reader_of(tmp_path, *(data for data, _ in shown.values()))
    for i, (_, colour) in enumerate(shown.values()):
        pixels = reader.read(i)
        assert pixels.shape == (8, 8, 3)
        np.testing.assert_allclose(pixels, np.broadcast_to(colour, (8, 8, 3)), atol=3)


def test_turned_photo_comes_out_upright(tmp_path):
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = TURNED_RIGHT
    reader = reader_of(tmp_path, encoded(picture(0, (6, 4)), exif=exif))
    np.testing.assert_array_equal(reader.read(0), np.rot90(np.asarray(picture(0, (6, 4))), -1))


def test_other_sizes_are_cropped_in_the_centre(tmp_path):
    wide = Image.new("RGB", (48, 16), "red")
    wide.paste("blue", (16, 0, 32, 16))
    square = reader_of(tmp_path, encoded(wide)).load([0], size=8)
    assert (square[0, 2] > 200).float().mean() > 0.7
    assert (square[0, 0, :, 2:6] < 40).all()


def test_broken_image_is_named(tmp_path):
    reader = reader_of(tmp_path, encoded(picture(0)), encoded(picture(1, (64, 64)), "JPEG"))
    shard = tmp_path / "shard-00000.tar"
    offset = pl.read_parquet(tmp_path / "index.parquet")["offset"][1]
    data = bytearray(shard.read_bytes())
    data[offset : offset + 700] = bytes(700)
    shard.write_bytes(data)
    reader.read(0)
    with pytest.raises(ImageError, match=rf"'k1' in .*shard-00000.tar at byte {offset}"):
        reader.read(1)


def test_the_fast_resize_is_that_of_pillow_but_for_rounding():
    wide = picture(0, (96, 64)).resize((384, 256), Image.Resampling.BICUBIC)
    exact, fast = (square(wide, 100, how).astype(int) for how in ("fit", "fast"))
    assert fast.shape == (100, 100, 3)
    assert (fast != exact).mean() < 0.05  # mostly where one of the two passes is clipped
    assert np.abs(fast - exact).mean() < 0.1


def test_a_jpeg_is_decoded_no_larger_than_needed_for_the_fast_resize(tmp_path):
    large = picture(0, (24, 20)).resize((480, 400), Image.Resampling.BICUBIC)
    file = encoded(large, "JPEG", quality=95)
    assert decode(file, 100).size == (120, 100)
    assert decode(file, 101).size == (240, 200)
    assert decode(encoded(large), 100).size == (480, 400)  # a PNG
    reader = reader_of(tmp_path, file)
    exact, fast = (reader.load([0], 96, how).float() for how in ("fit", "fast"))
    assert 0 < (fast - exact).abs().mean() < 2


def test_reading_leaves_the_image_of_a_caller_as_it_is():
    turned = picture(0, (4, 8))
    turned.getexif()[EXIF_ORIENTATION] = TURNED_RIGHT
    assert to_rgb(turned).size == (8, 4)
    assert turned.size == (4, 8)
