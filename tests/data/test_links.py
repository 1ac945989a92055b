"""CC3M and YFCC15M: from a hub, from shards, from links of which many are dead."""

import io
import json
import os
import random
import signal
import subprocess
import sys
import tarfile
import textwrap
import time
from pathlib import Path

import polars as pl
import pytest
import webdataset
from PIL import Image

from flame import download
from flame.data import datasets, hub, hub_client
from flame.data.datasets import Sample, Skipped, _links, cc3m, yfcc15m
from flame.data.datasets._links import LinkOptions, Round
from tests.loopback import Loopback, Reply, cut, html, status, wrong

# Writes what img2dataset 1.47.0 writes, with its words for what went wrong, one link at a time.
STAND_IN = """
    import io, json, sys, tarfile, urllib.request
    from pathlib import Path
    import polars as pl
    from PIL import Image

    options = dict(argument[2:].split("=", 1) for argument in sys.argv[1:])
    out, per_shard = Path(options["output_folder"]), int(options["number_sample_per_shard"])
    links = pl.read_parquet(options["url_list"])
    least = int(options["min_image_size"])

    def fetch(url):
        try:
            with urllib.request.urlopen(url, timeout=2) as answer:
                data = answer.read()
        except Exception as error:
            return None, "failed_to_download", str(error)
        try:
            image = Image.open(io.BytesIO(data))
            image.load()
        except Exception:
            return None, "failed_to_resize", "Image decoding error"
        if min(image.size) < least:
            return None, "failed_to_resize", "image too small"
        jpeg = io.BytesIO()
        image.convert("RGB").save(jpeg, "JPEG", quality=95)
        return jpeg.getvalue(), "success", None

    for shard in range(-(-len(links) // per_shard)):
        if (out / f"{shard:05d}_stats.json").exists():
            continue
        rows = []
        with tarfile.open(out / f"{shard:05d}.tar", "w") as tar:
            piece = links.slice(shard * per_shard, per_shard)
            for number, link in reversed(list(enumerate(piece.iter_rows(named=True)))):
                key = f"{shard:05d}{number:04d}"
                data, how, error = fetch(link["url"])
                rows.append(link | {"key": key, "status": how, "error_message": error})
                for kind, content in (("jpg", data), ("txt", link["caption"].encode())):
                    if data:
                        member = tarfile.TarInfo(f"{key}.{kind}")
                        member.size = len(content)
                        tar.addfile(member, io.BytesIO(content))
        schema = {name: pl.String for name in rows[0]}
        pl.DataFrame(rows, schema=schema).write_parquet(out / f"{shard:05d}.parquet")
        (out / f"{shard:05d}_stats.json").write_text(json.dumps({"count": len(rows)}))
"""


@pytest.fixture
def server():
    with Loopback() as server:
        yield server


@pytest.fixture(autouse=True)
def surroundings(monkeypatch, server, tmp_path):
    monkeypatch.setattr(hub_client, "BACKOFF", 0.01)
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("HF_TOKEN", raising=False)


@pytest.fixture
def stand_in(monkeypatch, tmp_path):
    script = tmp_path / "img2dataset.py"
    script.write_text(textwrap.dedent(STAND_IN))
    monkeypatch.setenv("FLAME_IMG2DATASET", f"{sys.executable} {script}")
    monkeypatch.setattr(_links, "PER_SHARD", 4)


def picture(seed=0, size=(24, 16), kind="JPEG"):
    noise = random.Random(seed).randbytes(size[0] * size[1] * 3)
    data = io.BytesIO()
    Image.frombytes("RGB", size, noise).save(data, kind, lossless=True)
    return data.getvalue()


def shard(*members):
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return data.getvalue()


def pairs(first, count):
    """A shard of whole pairs."""
    members = []
    for i in range(first, first + count):
        members += [(f"{i:09d}.jpg", picture(i)), (f"{i:09d}.txt", b"caption %d\n" % i)]
    return shard(*members)


SNAPSHOT = {
    "README.md": b"a card",
    "cc3m-train-0000.tar": pairs(0, 3),
    "cc3m-train-0001.tar": pairs(10_000, 2),
    "cc3m-validation-0000.tar": pairs(0, 1),
}


def hub_options(**changes):
    return cc3m.Options(**{"id": "owner/cc3m", "revision": "main"} | changes)


# --- shards ---------------------------------------------------------------------------------------


def test_pairs_of_the_snapshot_in_order(server, tmp_path):
    server.hub("owner/cc3m", "main", SNAPSHOT)
    found = list(cc3m.read(tmp_path, hub_options(), 0))
    keys = ["000000000", "000000001", "000000002", "000010000", "000010001"]
    assert [sample.key for sample in found] == keys
    assert found[3] == Sample(keys[3], picture(10_000), {"raw": ["caption 10000"]})
    validation = list(cc3m.read(tmp_path, hub_options(split="validation"), 0))
    assert [sample.key for sample in validation] == keys[:1]
    assert cc3m.report(tmp_path, hub_options()) == {
        "commit": hub.commit_of(tmp_path / "owner--cc3m-main")
    }


def test_a_limit_fetches_only_the_shards_that_it_needs(server, tmp_path):
    server.hub("owner/cc3m", "main", SNAPSHOT)
    assert len(list(cc3m.read(tmp_path, hub_options(limit=2), 0))) == 2
    assert [path.name for path in (tmp_path / "owner--cc3m-main").glob("*.tar")] == [
        "cc3m-train-0000.tar"
    ]
    assert len(list(cc3m.read(tmp_path, hub_options(limit=4), 0))) == 4


def test_shards_are_deleted_only_where_an_option_says_so(server, tmp_path):
    server.hub("owner/cc3m", "main", SNAPSHOT)
    seen = []
    for _ in cc3m.read(tmp_path, hub_options(keep=False), 0):
        seen.append(len(list((tmp_path / "owner--cc3m-main").glob("*.tar"))))
    assert seen == [1] * 5
    assert not list((tmp_path / "owner--cc3m-main").glob("*.tar"))
    list(cc3m.read(tmp_path, hub_options(), 0))
    assert len(list((tmp_path / "owner--cc3m-main").glob("*.tar"))) == 2


def test_what_is_wrong_with_a_sample_is_told(tmp_path):
    (tmp_path / "0.tar").write_bytes(
        shard(
            ("a.jpg", picture(1)),
            ("a.txt", b"one"),
            ("b.jpg", picture(2)),
            ("c.txt", b"no image"),
            ("d.jpg", picture(3)),
            ("d.txt", b"  \n"),
            ("a.jpg", picture(4)),
            ("a.txt", b"again"),
            ("e.PNG", picture(5, kind="PNG")),
            ("e.txt", b"five"),
            ("e.json", b"{}"),
        )
    )
    (tmp_path / "1.tar").write_bytes(
        shard(("./sub.1/f.x.jpg", b""), ("e.webp", b""), ("e.txt", b"again"), ("g.gif", b"gif"))
    )
    found = list(_links.samples([tmp_path / "0.tar", tmp_path / "1.tar"]))
    assert [
        item.key if isinstance(item, Sample) else (item.key, item.reason) for item in found
    ] == [
        "a",
        ("b", "no caption"),
        ("c", "no image"),
        ("d", "no caption"),
        ("a", "duplicate key"),
        "e",
        ("sub_1_f", "no image"),
        ("e", "duplicate key"),
        ("g", "no image"),
    ]


def test_samples_are_those_that_webdataset_finds(tmp_path):
    members = [("x/a.jpg", b"1"), ("x/a.txt", b"one"), ("b.json", b"{}"), ("b.txt", b"two")]
    members += [("b.jpg", b"2"), ("c.PNG", b"3"), ("c.txt", "drei ä".encode())]
    (tmp_path / "0.tar").write_bytes(shard(*members))
    theirs = [
        (sample["__key__"].replace("/", "_"), sample.get("jpg", sample.get("png")), sample["txt"])
        for sample in webdataset.WebDataset(str(tmp_path / "0.tar"), shardshuffle=False)
    ]
    ours = list(_links.samples([tmp_path / "0.tar"]))
    assert [(s.key, s.image, s.captions["raw"][0].encode()) for s in ours] == theirs
    assert len(ours) == 3


def test_two_samples_of_one_key_in_a_row_are_two(tmp_path):
    members = [("a.jpg", b"1"), ("a.txt", b"one"), ("a.jpg", b"2"), ("a.txt", b"two")]
    (tmp_path / "0.tar").write_bytes(shard(*members))
    found = list(_links.samples([tmp_path / "0.tar"]))
    assert found == [
        Sample("a", b"1", {"raw": ["one"]}),
        Skipped("a", "duplicate key"),
    ]


@pytest.mark.parametrize("length", [700, 1024, 5000])
def test_a_shard_that_breaks_off_is_no_shard(tmp_path, length):
    whole = pairs(0, 3)
    (tmp_path / "0.tar").write_bytes(whole[:length])
    with pytest.raises(ValueError, match=r"0\.tar is not a complete tar"):
        list(_links.samples([tmp_path / "0.tar"]))


def test_yfcc_from_shards_that_somebody_placed(tmp_path):
    options = yfcc15m.Options(shards=str(tmp_path / "mine"))
    with pytest.raises(ValueError, match=r"place the tar shards of YFCC15M .*mine; or take a list"):
        list(yfcc15m.read(tmp_path, options, 0))
    (tmp_path / "mine/0.tar").write_bytes(pairs(0, 2))
    assert len(list(yfcc15m.read(tmp_path, options, 0))) == 2
    assert yfcc15m.report(tmp_path, options) == {"which": "release"}
    with pytest.raises(ValueError, match="raw/shards"):
        list(yfcc15m.read(tmp_path / "raw", yfcc15m.Options(), 0))


@pytest.mark.parametrize(
    ("module", "options", "size"),
    [
        (cc3m, {}, 2_905_954),
        (cc3m, {"split": "validation"}, 13_443),
        (cc3m, {"limit": 500}, 500),
        (cc3m, {"source": "links", "links": "x.tsv"}, 3_318_333),
        (yfcc15m, {}, 15_061_521),
        (yfcc15m, {"which": "declip"}, 15_388_848),
        (yfcc15m, {"which": "openai", "limit": 10**9}, 14_829_396),
    ],
)
def test_sizes(module, options, size):
    assert module.size(module.Options(**options)) == size


# --- links ----------------------------------------------------------------------------------------


def serve(server):
    """Links with every fault, and what is to be said of each."""
    fine = [server.file(f"/{i}.jpg", picture(i), kind="image/jpeg") for i in range(5)]
    bad = {
        server.file("/404.jpg", b"", faults=[status(404)]): "HTTP 404",
        server.file("/410.jpg", b"", faults=[status(410)]): "HTTP 410",
        server.file("/html.jpg", b"", faults=[html()]): "no image",
        server.file("/broken.jpg", picture(6), faults=[wrong(picture(6)[:300])]): "no image",
        server.file("/small.jpg", picture(7, (9, 30))): "too small",
        server.file("/cut.jpg", picture(8), faults=[cut(100, times=None)]): "connection",
        "http://127.0.0.1:9/refused.jpg": "connection",
        "http://no-such-host.invalid/a.jpg": "no such host",
        "neither": "no URL",
    }
    return fine, bad


def write_tsv(path, urls):
    path.write_text("".join(f'say "{i}\t{url}\n' for i, url in enumerate(urls)))
    return path


def test_links_dead_and_alive(server, tmp_path, stand_in):
    fine, bad = serve(server)
    urls = [*list(bad)[:3], *fine, *list(bad)[3:]]
    options = cc3m.Options(
        source="links", links=str(write_tsv(tmp_path / "cc3m.tsv", urls)), min_size=10, retries=0
    )
    found = list(cc3m.read(tmp_path / "raw", options, 0))
    assert [sample.key for sample in found] == [f"{i:09d}" for i in range(3, 8)]
    assert [sample.captions for sample in found] == [{"raw": [f'say "{i}']} for i in range(3, 8)]
    assert Image.open(io.BytesIO(found[0].image)).size == (24, 16)
    survival = cc3m.report(tmp_path / "raw", options)["survival"]
    assert (survival["total"], survival["alive"], survival["share"]) == (14, 5, 0.3571)
    assert survival["dead"] == {
        reason: list(bad.values()).count(reason) for reason in dict.fromkeys(bad.values())
    }
    assert survival["rounds"] == [{"asked": 14, "gained": 5, "dead": survival["dead"]}]


def test_a_second_round_asks_only_those_that_failed(server, tmp_path, stand_in):
    urls = [server.file(f"/{i}.jpg", picture(i)) for i in range(6)]
    for i in (1, 4):
        server.fault(f"/{i}.jpg", status(503, times=1))
    server.fault("/5.jpg", status(404))
    links = str(write_tsv(tmp_path / "cc3m.tsv", urls))
    options = {"source": "links", "links": links, "retries": 0}
    first = list(cc3m.read(tmp_path / "raw", cc3m.Options(**options), 0))
    assert [sample.key[-1] for sample in first] == ["0", "2", "3"]
    before = len(server.requests)
    again = cc3m.Options(**options, rounds=2)
    second = list(cc3m.read(tmp_path / "raw", again, 0))
    assert [request.path for request in server.requests[before:]] == ["/5.jpg", "/4.jpg", "/1.jpg"]
    assert [sample.key[-1] for sample in second] == ["0", "2", "3", "1", "4"]
    survival = cc3m.report(tmp_path / "raw", again)["survival"]
    assert (survival["total"], survival["alive"], survival["dead"]) == (6, 5, {"HTTP 404": 1})
    assert [(each["asked"], each["gained"]) for each in survival["rounds"]] == [(6, 3), (3, 2)]
    assert len(server.requests) == before + 3


def test_it_goes_on_with_the_shards_that_are_missing(server, tmp_path, stand_in, monkeypatch):
    urls = [server.file(f"/{i}.jpg", picture(i)) for i in range(8)]
    path = write_tsv(tmp_path / "cc3m.tsv", urls)
    options = cc3m.Options(source="links", links=str(path))
    list(cc3m.read(tmp_path / "raw", options, 0))
    (place,) = (tmp_path / "raw").glob("links-*")
    for left in [*place.glob("round-00/shards/00001*"), place / "round-00/done.json"]:
        left.unlink()
    before = len(server.requests)
    assert len(list(cc3m.read(tmp_path / "raw", options, 0))) == 8
    assert sorted(request.path for request in server.requests[before:]) == [
        f"/{i}.jpg" for i in range(4, 8)
    ]


def test_a_tool_that_fails_or_leaves_links_out(server, tmp_path, monkeypatch):
    path = write_tsv(tmp_path / "cc3m.tsv", ["http://127.0.0.1:9/a.jpg"])
    options = cc3m.Options(source="links", links=str(path))
    monkeypatch.setenv("FLAME_IMG2DATASET", "false")
    with pytest.raises(ValueError, match=r"img2dataset failed \(1\)"):
        list(cc3m.read(tmp_path, options, 0))
    monkeypatch.setenv("FLAME_IMG2DATASET", "true")
    with pytest.raises(ValueError, match="reported 0 of 1 links"):
        list(cc3m.read(tmp_path, options, 0))
    monkeypatch.delenv("FLAME_IMG2DATASET")
    monkeypatch.setattr(_links.shutil, "which", lambda name: None)
    monkeypatch.setattr(_links.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"install uv .*or set FLAME_IMG2DATASET"):
        list(cc3m.read(tmp_path, options, 0))


def test_a_job_that_ends_takes_its_downloaders_with_it(tmp_path):
    tool = tmp_path / "tool.sh"
    tool.write_text(f"sleep 600 & echo $! > {tmp_path}/worker\nwait\n")
    code = (
        "import signal, sys; from pathlib import Path; from flame.data.datasets import _links;"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(143));"
        "_links._run_img2dataset(Path('links'), Path('shards'), _links.LinkOptions())"
    )
    source = str(Path(_links.__file__).parents[3])
    environment = os.environ | {"PYTHONPATH": source, "FLAME_IMG2DATASET": f"sh {tool}"}
    job = subprocess.Popen([sys.executable, "-c", code], env=environment)
    deadline = time.monotonic() + 30
    while not (tmp_path / "worker").exists() or not (tmp_path / "worker").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    worker = int((tmp_path / "worker").read_text())
    job.send_signal(signal.SIGTERM)
    assert job.wait(30) == 143
    status = Path(f"/proc/{worker}/status")
    assert not status.exists() or "zombie" in status.read_text()


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ("HTTP Error 403: Forbidden", "HTTP 403"),
        ("<urlopen error [Errno -3] Temporary failure in name resolution>", "no such host"),
        ("<urlopen error [Errno -2] Name or service not known>", "no such host"),
        ("timed out", "timeout"),
        ("<urlopen error [SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed>", "TLS"),
        ("[Errno 104] Connection reset by peer", "connection"),
        ("IncompleteRead(200 bytes read, 1220 more expected)", "connection"),
        ("Use of image disallowed by X-Robots-Tag directive", "not allowed by its site"),
        ("Image decoding error", "no image"),
        ("image too small", "too small"),
        ("image area too large", "too large"),
        ("unknown url type: 'not a url'", "no URL"),
        ("something else", "other"),
        (None, "other"),
    ],
)
def test_reasons(message, reason):
    assert _links.reason(message) == reason


def test_a_round_in_words():
    told = _links.as_line(Round(10, 7, {"HTTP 404": 2, "timeout": 1}))
    assert told == "7 of 10 links have an image; dead: 2 HTTP 404, 1 timeout"


@pytest.mark.parametrize("kind", ["csv", "parquet", "jsonl"])
def test_lists_of_every_form_with_keys_of_their_own(tmp_path, kind):
    table = pl.DataFrame({"photo": [71, 72], "title": ['a "b", c', None], "at": ["u1", "u2"]})
    path = tmp_path / f"list.{kind}"
    write = {"csv": table.write_csv, "parquet": table.write_parquet, "jsonl": table.write_ndjson}
    write[kind](path)
    options = LinkOptions(columns={"url": "at", "caption": "title", "key": "photo"})
    rows = _links.read_list(path, options).rows()
    assert rows == [("71", "u1", 'a "b", c'), ("72", "u2", "")]
    with pytest.raises(ValueError, match="no column 'link'; known: photo, title, at"):
        _links.read_list(path, LinkOptions(columns={"url": "link", "caption": "title"}))


def test_a_limit_takes_the_first_links(tmp_path):
    path = write_tsv(tmp_path / "list.tsv", ["u0", "u1", "u2"])
    options = cc3m.Options(limit=2)
    assert _links.read_list(path, options)["url"].to_list() == ["u0", "u1"]
    with pytest.raises(ValueError, match=r"no file 'none\.tsv'"):
        _links.follow(cc3m.Options(links="none.tsv"), tmp_path)


@pytest.mark.skipif(
    "FLAME_IMG2DATASET" not in os.environ, reason="needs FLAME_IMG2DATASET, its command"
)
def test_img2dataset_itself(server, tmp_path):
    fine, bad = serve(server)
    noai = server.route("/no.jpg", lambda _: Reply(200, picture(9), {"X-Robots-Tag": "noai"}))
    bad[noai] = "not allowed by its site"
    webp = server.file("/w.webp", picture(10, kind="WEBP"))
    server.fault("/3.jpg", status(503, times=1))
    path = write_tsv(tmp_path / "cc3m.tsv", [*bad, *fine, webp])
    options = cc3m.Options(source="links", links=str(path), min_size=10, retries=0, rounds=2)
    found = list(cc3m.read(tmp_path / "raw", options, 0))
    keys = [int(sample.key) for sample in found]
    assert keys == [10, 11, 12, 14, 15, 13]
    assert all(sample.captions == {"raw": [f'say "{int(sample.key)}']} for sample in found)
    survival = cc3m.report(tmp_path / "raw", options)["survival"]
    assert survival["dead"] == {
        reason: list(bad.values()).count(reason) for reason in dict.fromkeys(bad.values())
    }
    assert [(each["asked"], each["gained"]) for each in survival["rounds"]] == [(16, 5), (11, 1)]


# --- the stage ------------------------------------------------------------------------------------


def manifest(out):
    return json.loads((out / "manifest.json").read_text())


def run(module, out, max_skipped=0.5, **options):
    download.dataset(module, json.dumps(options), 0, out, max_skipped=max_skipped)
    return manifest(out)


def test_the_stage_lists_what_it_left_out_and_converts_what_is_no_jpeg(server, tmp_path):
    whole = picture(2, (200, 200))
    webp = picture(3, kind="WEBP")
    members = shard(
        ("a.jpg", picture(1)),
        ("a.txt", b"fine"),
        ("b.jpg", whole[: len(whole) // 2]),
        ("b.txt", b"half a JPEG, with a whole header"),
        ("c.webp", webp),
        ("c.txt", b"converted"),
        ("d.jpg", b"<html>"),
        ("d.txt", b"a page"),
        ("e.jpg", picture(4)),
    )
    server.hub("owner/cc3m", "main", {"cc3m-train-0000.tar": members})
    out = tmp_path / "datasets/cc3m"
    told = run("cc3m", out, 0.7, id="owner/cc3m", revision="main", limit=100)
    assert (told["images"], told["converted"], told["expected"]) == (2, 1, 100)
    assert {each["key"]: each["reason"].split(":")[0] for each in told["skipped"]} == {
        "b": "broken image",
        "d": "broken image",
        "e": "no caption",
    }
    assert told["reasons"] == {"broken image": 2, "no caption": 1}
    assert told["commit"] == hub.commit_of(tmp_path / "raw/cc3m/owner--cc3m-main")
    with tarfile.open(out / "shard-00000.tar") as tar:
        assert tar.getnames() == ["a.jpg", "c.png"]
        kept, converted = (tar.extractfile(name).read() for name in tar.getnames())
    assert kept == picture(1)
    pixels = [Image.open(io.BytesIO(data)).convert("RGB").tobytes() for data in (converted, webp)]
    assert pixels[0] == pixels[1]


def test_fewer_images_than_the_set_has_are_refused_unless_a_limit_is_set(server, tmp_path):
    server.hub("owner/cc3m", "main", SNAPSHOT)
    place = {"id": "owner/cc3m", "revision": "main"}
    out = tmp_path / "datasets/cc3m"
    with pytest.raises(ValueError, match="CC3M has 5 images, expected 2905954"):
        run("cc3m", out, **place)
    assert not out.exists()
    assert run("cc3m", out, **place, limit=100)["images"] == 5


def test_too_many_left_out_are_named(server, tmp_path):
    members = shard(("a.jpg", picture(1)), ("a.txt", b"fine"), ("b.jpg", b"?"), ("b.txt", b"b"))
    server.hub("owner/cc3m", "main", {"cc3m-train-0000.tar": members})
    with pytest.raises(ValueError, match=r"1 of 2 images are broken, more than 10.0%: b \(broken"):
        run("cc3m", tmp_path / "out/cc3m", 0.1, id="owner/cc3m", revision="main", limit=100)


def test_a_bomb_of_pixels_is_left_out(server, tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    members = shard(
        ("a.jpg", picture(1)),
        ("a.txt", b"fine"),
        ("b.png", picture(2, (200, 200), "PNG")),
        ("b.txt", b"bomb"),
    )
    server.hub("owner/cc3m", "main", {"cc3m-train-0000.tar": members})
    told = run("cc3m", tmp_path / "out/cc3m", id="owner/cc3m", revision="main", limit=100)
    assert [(each["key"], "decompression bomb" in each["reason"]) for each in told["skipped"]] == [
        ("b", True)
    ]


def test_the_stage_goes_on_without_fetching_again(server, tmp_path, monkeypatch):
    server.hub("owner/cc3m", "main", SNAPSHOT)
    out = tmp_path / "datasets/cc3m"
    options = {"id": "owner/cc3m", "revision": "main", "limit": 100}
    whole = download.ShardWriter.close
    monkeypatch.setattr(download.ShardWriter, "close", lambda writer: sys.exit(143))
    with pytest.raises(SystemExit):
        run("cc3m", out, **options)
    before = len(server.requests)
    monkeypatch.setattr(download.ShardWriter, "close", whole)
    assert run("cc3m", out, **options)["images"] == 5
    assert len(server.requests) == before


def test_links_by_the_stage(server, tmp_path, stand_in):
    urls = [server.file(f"/{i}.jpg", picture(i)) for i in range(3)]
    server.fault("/1.jpg", status(404))
    path = tmp_path / "yfcc.csv"
    pl.DataFrame({"url": urls, "caption": ["a", "b", "c"], "photo": [7, 8, 9]}).write_csv(path)
    columns = {"url": "url", "caption": "caption", "key": "photo"}
    told = run(
        "yfcc15m",
        tmp_path / "out/yfcc",
        which="declip",
        source="links",
        links=str(path),
        columns=columns,
    )
    assert (told["which"], told["images"], told["expected"]) == ("declip", 2, 15_388_848)
    assert told["survival"]["dead"] == {"HTTP 404": 1}
    assert told["skipped"] == []
    keys = pl.read_parquet(tmp_path / "out/yfcc/index.parquet")["key"].to_list()
    assert keys == ["7", "9"]
    assert datasets.module("yfcc15m") is yfcc15m
