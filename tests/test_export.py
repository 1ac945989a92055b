"""An export gives the same vectors as the workflow, and the same numbers in clip_benchmark."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from clip_benchmark.metrics import zeroshot_classification
from huggingface_hub import ModelCard
from PIL import Image

import flame
from flame import clip_benchmark, download, embed, export
from flame.data.images import ImageReader
from flame.embedding import checkpoints
from flame.embedding.store import Embeddings
from flame.evaluate import evaluate
from flame.evaluation import encoder
from flame.evaluation.features import Features
from flame.runtime import command
from flame.study import stages
from flame.study.load import load_file
from flame.study.study import Study
from flame.towers.flame import FlameTower
from flame.towers.load import load, save
from tests import wds
from tests.loopback import Loopback, Reply

ROOT = Path(__file__).parents[1]
LABELS = {"animals": "class", "scenes-short": "short"}


@pytest.fixture(scope="module")
def study() -> Study:
    return load_file(ROOT / "tests/config/tiny.yaml", ROOT)


@pytest.fixture(scope="module")
def made(study, tmp_path_factory) -> dict[str, Path]:
    """Two benchmarks, a random LLM, their embeddings, an untrained tower, results and export."""
    root = tmp_path_factory.mktemp("export")
    paths = {name: root / "datasets" / name for name in LABELS}
    for name, folder in paths.items():
        options = json.dumps(study.datasets[name].options)
        download.dataset("scenes", options, 0, folder)
    llm = root / "llm"
    llm.mkdir()
    checkpoints.random("llama", llm, layers=2, width=32)
    stores = []
    for name, kind in LABELS.items():
        settings = stages.embed(study, "random-llama", "benchmarks", kind, 0)
        settings = settings.model_copy(update={"datasets": (name,)})
        stores.append(root / f"{kind}.zarr")
        embed.embed(llm, [paths[name]], stores[-1], settings, threads=1)
    torch.manual_seed(0)
    trained = stages.train(study, "flame-7")
    tower = FlameTower(trained.backbone, trained.recipe, 32)
    scene = torch.randn(32)
    tower.centers = {kind: {"scene": scene.clone()} for kind in ("raw", "short")}
    (root / "tower").mkdir()
    record = {"settings": trained.model_dump(mode="json"), "dim": 32}
    save(tower, root / "tower", record)
    asked = stages.evaluate(study, "flame-7", "benchmarks")
    wanted = [q for q in asked.questions if q.benchmark in ("ImageNet-1k", "MSCOCO")]
    asked = asked.model_copy(update={"questions": tuple(wanted)})
    metrics = root / "metrics.json"
    evaluate(
        root / "tower", [*paths.values()], metrics, root / "hits.parquet", asked, tuple(stores)
    )
    settings = stages.export(study, "flame-7")
    export.write(root / "tower", llm, root / "out", settings, metrics=(metrics,))
    return paths | {
        "root": root, "tower": root / "tower", "llm": llm, "metrics": metrics, "out": root / "out",
        **dict(zip(LABELS.values(), stores, strict=True)),
    }  # fmt: skip


@pytest.mark.parametrize(("name", "kind"), LABELS.items())
def test_vectors_are_those_of_the_benchmarks(study, made, name, kind):
    loaded = flame.load(made["out"])
    tower, _ = load(made["tower"])
    features = Features(tower, [made[name]], [made[kind]], 7, "test")
    (question,) = (
        q for q in study.questions("flame-7", "benchmarks")
        if q.dataset == name and q.benchmark in ("ImageNet-1k", "MSCOCO")
    )  # fmt: skip
    asked = features.asked(question)
    reader = ImageReader(made[name])
    images = [Image.fromarray(reader.read(i)) for i in range(len(reader))]
    torch.testing.assert_close(loaded.encode_image(images).cpu(), asked.images().features)
    texts = _texts(made[name], kind)
    found = loaded.encode_text(texts, kind).cpu()
    # The LLM rounds differently in other batches.
    assert (found * asked.texts(kind).features).sum(dim=1).min() > 0.999
    stored = Embeddings.open([made[kind]], name)
    assert list(stored.keys) == list(asked.texts(kind).keys)


def _texts(folder: Path, kind: str) -> list[str]:
    import polars as pl

    return pl.read_parquet(folder / "captions.parquet").filter(kind=kind)["text"].to_list()


def test_three_lines_from_anywhere(made, tmp_path):
    Image.new("RGBA", (50, 30), (255, 0, 0, 128)).save(tmp_path / "image.png")
    lines = f"""
import flame
from PIL import Image
model = flame.load({str(made["out"])!r})
images = model.encode_image([Image.open("image.png")])
print((images @ model.encode_text(["a red square.", "a dog."]).T).shape)
"""
    done = subprocess.run(
        [sys.executable, "-c", lines], cwd=tmp_path, capture_output=True, text=True,
        env={"PYTHONPATH": str(ROOT / "src"), "PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    assert done.stdout.strip() == "torch.Size([1, 2])", done.stderr


def test_a_kind_decides_the_prompt(made):
    loaded = flame.load(made["out"])
    short, long = (loaded.encode_text(["a dog on a hill"], kind) for kind in ("short", "raw"))
    assert torch.equal(short, long)  # one prompt, and here one center
    loaded.tower.centers["raw"] = {"scene": torch.randn(32)}
    assert not torch.equal(loaded.encode_text(["a dog on a hill"], "raw"), short)
    with pytest.raises(ValueError, match=r"kind 'shorts' .*known: long, short, raw, class"):
        loaded.encode_text(["a"], "shorts")


def test_the_card_tells_parts_prompts_and_results(made):
    card = (made["out"] / "README.md").read_text()
    record = json.loads(made["metrics"].read_text())["records"]
    top1 = next(r for r in record if r["benchmark"] == "ImageNet-1k")["metrics"]["top1"]
    assert f"| animals (for ImageNet-1k) | top-1 | {top1['value']:.1f} |" in card
    assert "which only stands in for" in card
    assert "| ImageNet-1k |" not in card
    in_metadata = {
        (r.dataset_name, r.metric_type): r.metric_value for r in ModelCard(card).data.eval_results
    }
    assert in_metadata["animals", "top1"] == round(top1["value"], 2)
    assert {dataset for dataset, _ in in_metadata} == {*LABELS}  # stand-ins, not the paper's
    for words in ("license: other", "`class`: scene", "resnet10t", "random", "not the paper's own"):
        assert words in card


def test_what_is_no_export_is_refused(made, tmp_path):
    with pytest.raises(ValueError, match=r"is not an export of FLAME: it has no export\.json"):
        flame.load(tmp_path)
    with pytest.raises(ValueError, match="neither a folder nor owner/name"):
        flame.load(tmp_path / "nothing")
    with pytest.raises(ValueError, match="is not an export"):
        export.push(tmp_path, "a/b")


def test_only_flame_is_exported():
    study = load_file(ROOT / "config/config.yaml", ROOT)
    with pytest.raises(ValueError, match="'clip' is not FLAME"):
        stages.export(study, "clip")


def test_an_llm_of_the_hub_is_named_and_not_copied(made, monkeypatch, tmp_path):
    hub = {"source": "hub", "id": "owner/llm", "revision": "a" * 40}
    settings = encoder.ExportSettings.model_validate_json((made["out"] / "export.json").read_text())
    changed = settings.model_dump() | {"checkpoint": hub}
    settings = encoder.ExportSettings.model_validate(changed)
    export.write(made["tower"], made["llm"], tmp_path / "out", settings)
    assert not (tmp_path / "out" / "llm").exists()
    text = ["a dog."]
    own = flame.load(made["out"]).encode_text(text)
    assert torch.equal(flame.load(tmp_path / "out", llm=made["llm"]).encode_text(text), own)


def test_an_export_goes_to_the_hub_and_comes_back(made, monkeypatch, tmp_path):
    """The hub is a local server that accepts small files as the real one does."""
    files: dict[str, bytes] = {}
    with Loopback() as server:
        _take_uploads(server, files)
        run = [sys.executable, "-c", _SCRIPT, str(made["out"])]
        done = subprocess.run(
            run, capture_output=True, text=True, cwd=tmp_path,
            env={
                "PYTHONPATH": f"{ROOT / 'src'}:{ROOT / 'tests'}", "PATH": "/usr/bin:/bin",
                "HF_ENDPOINT": server.url, "HF_TOKEN": "hf_secret", "HF_HOME": str(tmp_path),
                "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1",
            },
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert "hf_secret" not in done.stdout + done.stderr
        there = {
            p.relative_to(made["out"]).as_posix() for p in made["out"].rglob("*") if p.is_file()
        }
        assert set(files) >= there
        assert files["README.md"] == (made["out"] / "README.md").read_bytes()
        server.hub("owner/flame", "main", files, kind="model")
        back = subprocess.run(
            [sys.executable, "-c", _BACK], capture_output=True, text=True, cwd=tmp_path,
            env={"PYTHONPATH": str(ROOT / "src"), "PATH": "/usr/bin:/bin",
                 "HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "other"),
                 "HF_HUB_DISABLE_XET": "1"},
        )  # fmt: skip
        assert back.returncode == 0, back.stderr
    expected = flame.load(made["out"]).encode_text(["a dog."])[0, :3].tolist()
    assert json.loads(back.stdout) == pytest.approx(expected, abs=1e-6)


_SCRIPT = """
import sys
from pathlib import Path
from flame import export
export.push(Path(sys.argv[1]), "owner/flame")
"""
_BACK = """
import flame, json
print(json.dumps(flame.load("owner/flame").encode_text(["a dog."])[0, :3].tolist()))
"""


def _take_uploads(server: Loopback, files: dict[str, bytes]) -> None:
    import base64

    def answer(value: object) -> Reply:
        return Reply(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def preupload(request):
        asked = json.loads(request.body)["files"]
        modes = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in asked]
        return answer({"files": modes})

    def commit(request):
        for line in request.body.splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
        return answer(
            {"commitUrl": f"{server.url}/owner/flame/commit/{'b' * 40}", "commitOid": "b" * 40,
             "hookOutput": "", "success": True}
        )  # fmt: skip

    server.route("/api/repos/create", lambda r: answer({"url": f"{server.url}/owner/flame"}))
    server.route("/api/models/owner/flame/preupload/main", preupload)
    server.route("/api/models/owner/flame/commit/main", commit)
    server.route("/api/validate-yaml", lambda r: answer({"errors": [], "warnings": []}))


@pytest.mark.parametrize(
    ("name", "captions", "benchmark", "metrics"),
    [
        ("animals", None, "ImageNet-1k", {"acc1": "top1"}),
        ("scenes-short", "short", "MSCOCO",
         {"text_retrieval_recall@1": "i2t_r@1", "image_retrieval_recall@1": "t2i_r@1"}),
    ],
)  # fmt: skip
def test_clip_benchmark_finds_our_numbers(
    made, tmp_path, monkeypatch, name, captions, benchmark, metrics
):
    folder = wds.write(made[name], tmp_path / "wds", captions=captions)
    out = tmp_path / "result.json"
    flags = ["--custom_template_file", str(folder / "templates.json")] if not captions else []
    arguments = [
        "eval", "--dataset", "wds/scenes", "--dataset_root", str(folder), "--model_type", "flame",
        "--model", captions or "class", "--pretrained", str(made["out"]), "--no_amp",
        "--num_workers", "0", "--recall_k", "1", "--output", str(out),
        "--task", "zeroshot_retrieval" if captions else "zeroshot_classification", *flags,
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["clip_benchmark", *arguments])
    # `main` replaces it in clip_benchmark itself, which other tests compare with.
    monkeypatch.setattr(zeroshot_classification, "accuracy", None)
    clip_benchmark.main()
    theirs = json.loads(out.read_text())["metrics"]
    records = json.loads(made["metrics"].read_text())["records"]
    ours = next(r for r in records if r["benchmark"] == benchmark)
    for their_name, our_name in metrics.items():
        value = ours["metrics"][our_name]["value"]
        # Up to one query, as the LLM rounds differently in other batches.
        assert 100 * theirs[their_name] == pytest.approx(value, abs=100 / ours["images"] + 0.06)


def test_by_command_line(study, made, tmp_path, monkeypatch):
    settings = stages.export(study, "flame-7").model_dump_json()
    arguments = ["--model", made["tower"], "--llm", made["llm"], "--out", tmp_path / "out"]
    words = ["export", "write", *map(str, arguments), "--settings", settings]
    monkeypatch.setattr(sys, "argv", words)
    command.main({"write": export.write, "push": export.push})
    for name in ("model.safetensors", "run.json", "export.json", "llm/config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (made["out"] / name).read_bytes()
