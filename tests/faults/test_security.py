"""Tokens do not leak; captions, names and weights are never run as code."""

import ast
import io
import json
import os
import pickle
import re
import subprocess
import sys
import zipfile
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from PIL import Image
from pydantic import TypeAdapter, ValidationError

from flame.captioning import engines
from flame.data.datasets import Sample
from flame.data.shards import ShardWriter
from flame.study.load import StudyError, load_file
from flame.study.schema.data import Captioner, VllmCaptioner
from flame.study.schema.llms import PackageCheckpoint
from tests.loopback import Loopback, Reply, Request

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "src/flame").rglob("*.py"))
SECRET = "hf_abcdefghijklmnopqrstuvwxyz0123456789"
OTHER = "sk-zyxwvutsrqponmlkjihgfedcba9876543210"


# Code that is not ours.

# Functions that run code given in their argument, or may do so.
RUNS_CODE = {
    "eval",
    "exec",
    "compile",
    "__import__",
    "os.system",
    "os.popen",
    "pickle.load",
    "pickle.loads",
    "marshal.loads",
    "shelve.open",
    "yaml.load",
    "yaml.unsafe_load",
    "yaml.full_load",
    "joblib.load",
    "torch.load",
    "torch.jit.load",
    "torch.hub.load",
    "np.load",
    "numpy.load",
    "subprocess.getoutput",
    "subprocess.getstatusoutput",
}


def calls(path: Path) -> list[tuple[str, ast.Call]]:
    """Every call in a module, with the dotted name of the function."""
    tree = ast.parse(path.read_text())
    return [(ast.unparse(n.func), n) for n in ast.walk(tree) if isinstance(n, ast.Call)]


def keyword(call: ast.Call, name: str) -> str | None:
    return next((ast.unparse(k.value) for k in call.keywords if k.arg == name), None)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT / "src")))
def test_no_module_runs_what_it_reads(path):
    for name, call in calls(path):
        if name == "torch.load":
            assert keyword(call, "weights_only") == "True", ast.unparse(call)
            continue
        assert name not in RUNS_CODE, ast.unparse(call)
        assert keyword(call, "shell") is None, ast.unparse(call)
        trusted = keyword(call, "trust_remote_code")
        # The one exception passes on the setting of the study, which requires a pinned commit.
        assert trusted is None or path.name == "vlm.py", ast.unparse(call)


def test_code_of_others_is_run_for_pinned_revisions_only():
    for study in sorted((ROOT / "config").glob("*.yaml")):
        for captioner in load_file(study, ROOT).captioners.values():
            if getattr(captioner, "trust_remote_code", False):
                assert re.fullmatch("[0-9a-f]{40}", captioner.revision), study


@pytest.mark.parametrize("revision", ["main", "v1.0", "0" * 39])
def test_code_behind_a_name_that_can_be_moved_is_refused(revision):
    captioner = VllmCaptioner(
        engine="vllm",
        id="owner/model",
        revision=revision,
        trust_remote_code=True,
        prompts={"short": "What is it?"},
        max_tokens={"short": 9},
    )
    with pytest.raises(ValueError, match="its revision must be a commit"):
        engines.create(captioner)


class Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_pickle_in_place_of_weights_is_not_unpickled(tmp_path):
    """`from_pretrained` would take a pytorch_model.bin where there are no safetensors."""
    from flame.embedding import checkpoints
    from flame.embedding.llm import FrozenLLM

    checkpoints.random("llama", tmp_path / "llm", layers=1, width=16, heads=2)
    (tmp_path / "llm" / "model.safetensors").unlink()
    (tmp_path / "llm" / "SHA256SUMS").unlink()
    file = tmp_path / "llm" / "pytorch_model.bin"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Bomb(tmp_path / "ran"), protocol=2))
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/byteorder", "little")
    for load in (FrozenLLM, lambda folder: checkpoints.from_folder(folder, tmp_path / "copy")):
        with pytest.raises((ValueError, OSError, pickle.UnpicklingError)):
            load(tmp_path / "llm")
    assert not (tmp_path / "ran").exists()


# Names in a study.

NASTY = "x'; touch ran #"


@pytest.mark.parametrize(
    "packages",
    [["--index-url=http://127.0.0.1/simple"], ["-r/etc/passwd"], ["a==1 --pre"], ["a"], ["a==1;b"]],
)
def test_a_package_is_a_name_and_a_version_and_no_option_of_pip(packages):
    values = {"source": "package", "packages": packages, "sha256": "0" * 64, "licence": "MIT"}
    with pytest.raises(ValidationError, match="packages"):
        PackageCheckpoint.model_validate(values)


def test_every_name_in_a_command_is_quoted_or_checked():
    """A rule puts only workflow paths, numbers and quoted values into a shell command.

    The paths hold names of the study, which the check of the study keeps to harmless letters.
    """
    harmless = re.compile(
        r"input(\.\w+)?|output(\.\w+)?|log|threads|resources\.\w+"
        r"|params\.(program|sources|seed|max_skipped|source|reset|reported|overhead|validation)"
    )
    for rules in sorted((ROOT / "workflow/rules").glob("*.smk")):
        for shell in re.findall(r"    shell:\n((?: +\"[^\n]*\n)+)", rules.read_text()):
            for name, how in re.findall(r"\{([\w.]+)(:q)?\}", shell):
                assert how or harmless.fullmatch(name), (rules.name, name)


def written(to: Path, *changes: tuple[str, object], study: Path = ROOT / "tests/config/tiny.yaml"):
    """A study with changed values, each given by its dotted path."""
    values = yaml.safe_load(study.read_text())
    for path, value in changes:
        *parents, key = path.split(".")
        section = values
        for parent in parents:
            section = section[parent]
        section[key] = value
    to.write_text(yaml.safe_dump(values, sort_keys=False))
    return to


@pytest.mark.parametrize(
    ("section", "entry"),
    [
        ("datasets", {"source": "scenes", "options": {"split": "val", "images": 1}}),
        (
            "llms",
            {"checkpoint": {"source": "random", "architecture": "llama", "layers": 1, "width": 16}},
        ),
        ("facets", {"level": "scene", "text": "this"}),
        (
            "figures",
            {
                "kind": "mask",
                "title": "T",
                "llm": "random-llama",
                "prompt": "long",
                "facets": ["scene"],
                "caption": "A dog.",
            },
        ),
    ],
)
@pytest.mark.parametrize("name", [NASTY, "../../out", "-rf", "two words", "a`touch ran`", ""])
def test_a_name_that_a_shell_would_read_is_refused(tmp_path, section, entry, name):
    values = yaml.safe_load((ROOT / "tests/config/tiny.yaml").read_text())
    study = written(tmp_path / "s.yaml", (section, values.get(section, {}) | {name: entry}))
    with pytest.raises(StudyError, match=f"{section}: {re.escape(repr(name))} becomes part"):
        load_file(study, ROOT)


@pytest.mark.parametrize("text", ["a</script>", "<SCRIPT>", "<!-- x"])
def test_a_text_that_would_end_a_script_of_the_report_is_refused(tmp_path, text):
    study = written(tmp_path / "s.yaml", ("tables.table6.title", text))
    with pytest.raises(StudyError, match=rf"tables\.table6\.title: {re.escape(repr(text))}"):
        load_file(study, ROOT)
    load_file(written(tmp_path / "s.yaml", ("tables.table6.title", "1 < 2 <b>")), ROOT)


@pytest.mark.parametrize("url", ["http://me:secret@host/v1", "https://host/v1?api_key=secret"])
def test_a_url_with_a_secret_in_it_is_refused(url):
    values = {"engine": "server", "url": url, "model": "m", "prompts": {}, "max_tokens": {}}
    with pytest.raises(ValidationError, match="environment variable that holds the token"):
        TypeAdapter(Captioner).validate_python(values)


# Tokens.


def everything(folder: Path) -> bytes:
    """Contents and names of all files in a folder."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return b"\n".join([str(path).encode() + path.read_bytes() for path in files])


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of two images."""
    folder = tmp_path_factory.mktemp("images") / "dots"
    writer = ShardWriter(folder, 10)
    for i in range(2):
        png = io.BytesIO()
        Image.new("RGB", (8, 8), "red").save(png, "PNG")
        writer.add(Sample(f"k{i}", png.getvalue(), {"raw": [f"dot {i}"]}))
    writer.close()
    return folder


def answer(request: Request) -> Reply:
    """A server whose first replies repeat the request, as careless servers do."""
    said = len(ANSWERED)
    ANSWERED.append(request)
    if request.token != OTHER or said == 1:
        return Reply(401, json.dumps({"error": f"bad key {request.headers}"}).encode())
    if said == 0:
        return Reply(500, f"headers: {request.headers}".encode())
    text = {"message": {"content": f"a dot number {said}"}, "finish_reason": "stop"}
    return Reply(200, json.dumps({"choices": [text]}).encode())


ANSWERED: list[Request] = []
OWN = ({"part": 0, "parts": 1}, {"max_skipped": 0})  # settings of `write` and of `join` alone
JOBS = """
import json, sys
from flame import caption, download
from flame.runtime import command
jobs = {"download": {"llm": download.llm, "dataset": download.dataset},
        "caption": {"write": caption.write, "join": caption.join}}
for name, *arguments in json.loads(sys.argv[1]):
    sys.argv = [name, *arguments]
    try:
        command.main(jobs[name])
    except SystemExit as end:
        print(name, "ended:", end, file=sys.stderr)
"""


def test_tokens_are_sent_and_never_said_or_written(images, tmp_path):
    """One job of every stage that uses a token, some failing, with servers that repeat requests."""
    from flame.embedding import checkpoints

    checkpoints.random("llama", tmp_path / "made", layers=1, width=16, heads=2)
    (tmp_path / "made" / "SHA256SUMS").unlink()
    revision = "0" * 40
    out = tmp_path / "out"
    with Loopback() as server:
        server.hub("owner/open", revision, tmp_path / "made", kind="model", gated=SECRET)
        server.hub("owner/shut", revision, tmp_path / "made", kind="model", gated=True)
        captioner = {
            "engine": "server",
            "url": server.url + "/v1",
            "model": "m",
            "token": "OTHER_TOKEN",
            "prompts": {"short": "What is it?"},
            "max_tokens": {"short": 20},
            "concurrency": 1,
        }
        server.route("/v1/chat/completions", answer)
        settings = {"dataset": "dots", "captioner": captioner, "version": 1}
        of_part, of_join = (json.dumps(settings | own) for own in OWN)
        given, part = f"--images {images} --settings", str(out / "caption/0.parquet")
        write = ["caption", "write", *given.split(), of_part, "--out", part]
        join = ["caption", "join", *given.split(), of_join, "--parts", part]
        hub = {"source": "hub", "revision": revision}
        jobs = [
            *(
                ["download", "llm", "--out", str(out / name), "--checkpoint", json.dumps(hub | id_)]
                for name, id_ in (("open", {"id": "owner/open"}), ("shut", {"id": "owner/shut"}))
            ),
            write,  # ends with the 401
            write,
            [*join, "--out", str(out / "dots")],
        ]
        (out / "caption").mkdir(parents=True)
        done = subprocess.run(
            [sys.executable, "-c", JOBS, json.dumps(jobs)],
            env=os.environ
            | {"PYTHONPATH": "src", "HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "home")}
            | {"HF_TOKEN": SECRET, "OTHER_TOKEN": OTHER, "FLAME_TRACEBACK": ""},
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        sent = {request.token for request in server.requests}
    said = done.stdout + done.stderr
    assert sent >= {SECRET, OTHER}, said
    assert (out / "open/model.safetensors").exists(), said
    assert "'owner/shut' is gated" in said
    assert "refuses requests: HTTP 401" in said
    assert (out / "dots/captions.parquet").exists(), said
    for secret in (SECRET, OTHER):
        assert secret not in said
        assert secret.encode() not in everything(out)


# The report.

ALERT = "<img src=x onerror=alert(1)>"
SCRIPT = "<script>alert(2)</script>"


def test_a_report_shows_what_tables_and_study_hold_and_does_not_run_it(tmp_path):
    """None of their text becomes an element of the HTML page that Snakemake writes."""
    reported = {"file": "config/reported/appendix_b.csv"}
    table = {"title": f"B {ALERT}", "of": "prompts", "reported": reported}
    tiny = yaml.safe_load((ROOT / "tests/config/tiny.yaml").read_text())
    study = written(
        tmp_path / "s.yaml",
        ("study", f"tiny {ALERT}"),
        ("facets", tiny["facets"] | {"scene": {"level": "scene", "text": ALERT}}),
        ("appendix", {"b": table}),
    )
    snakemake = [sys.executable, "-m", "snakemake", "--directory", tmp_path, "--configfile", study]
    report = ["--report", "report.html", "results/b.csv"]
    for flags in (["--cores", "1", "results/b.csv"], report):
        done = subprocess.run([*snakemake, *flags], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        with (tmp_path / "results/b.csv").open("a") as file:
            file.write(f"Appendix B,10,{SCRIPT},{ALERT},,,,\n")  # as captions could hold them
    elements = Elements()
    elements.feed((tmp_path / "report.html").read_text())
    assert len(elements.scripts) > 3
    assert any(ALERT in script for script in elements.scripts)
    assert not [script for script in elements.scripts if script.strip().startswith("alert(")]
    assert not [tag for tag, attributes in elements.tags if "onerror" in attributes]


class Elements(HTMLParser):
    """Collects the elements and scripts of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.scripts: list[str] = []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data):
        if self.lasttag == "script":
            self.scripts[-1] += data
