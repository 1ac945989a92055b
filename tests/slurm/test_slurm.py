"""The workflow on a SLURM cluster, as users run it: the tiny study, and what can go wrong.

`make test-slurm` installs SLURM and runs this; plain pytest does not look into this folder. The
cluster is one of two pretended nodes on this machine, started here and stopped at the end.
"""

import importlib.util
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import NamedTuple

import polars as pl
import pytest
import yaml
from filelock import SoftFileLease

from tests.workflow import ROOT, TINY, changed, content
from tests.workflow import snakemake as snakemake_here

SCRIPT = Path(__file__).with_name("cluster.sh")
PATIENCE = 900  # seconds for anything to happen, on a machine that may be busy
LONG = "results/embed/random-llama/scenes/long/0.zarr"
RUN = "results/train/flame-1"


class Job(NamedTuple):
    """A job as squeue lists it."""

    id: str
    state: str
    memory: str
    nodes: int
    what: str  # rule_<name>_wildcards_<values>; of a group, rule_<group>_<names>


class Cluster:
    """A SLURM cluster on this machine."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = os.environ | {
            "SLURM_CONF": f"{folder}/slurm.conf",
            "PATH": f"{folder}/bin:{os.environ['PATH']}",
            "SLURM_LOCAL_PORT": str(free_ports(3)),
        }

    def script(self, command: str) -> None:
        done = subprocess.run(
            ["bash", SCRIPT, command, self.folder],
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert done.returncode == 0, done.stdout

    def ask(self, *command: str) -> str:
        return subprocess.check_output(command, env=self.environment, text=True)

    def requeue(self, job: str) -> None:
        """Preempt a job, as one of higher priority would, and requeue it at once."""
        self.ask("scontrol", "requeue", job)
        until(lambda: self.ask("squeue", "-h", "-j", job, "-o", "%T").strip() == "PENDING")
        self.ask("scontrol", "update", f"JobId={job}", "StartTime=now")


class Run:
    """A run of Snakemake with a cluster profile."""

    def __init__(
        self, cluster: Cluster, folder: Path, study: Path, *flags: str, profile: str = "slurm"
    ) -> None:
        self.cluster, self._log = cluster, folder / "said.txt"
        command = [sys.executable, "-m", "snakemake", "--workflow-profile", profile]
        command += ["--directory", str(folder), "--configfile", str(study)]
        # Without accounting; jobs take seconds, so their state is queried every few seconds.
        command += ["--slurm-status-command", "squeue"]
        command += ["--slurm-init-seconds-before-status-checks", "5", "--latency-wait", "5", *flags]
        with self._log.open("w") as log:
            self.process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=cluster.environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def said(self) -> str:
        return self._log.read_text()

    def jobs(self) -> list[Job]:
        """Submitted jobs, in order of submission."""
        form = "%i|%T|%m|%D|%k"
        asked = "squeue", "-h", "-t", "all", "-n", self._name(), "-o", form
        lines = self.cluster.ask(*asked).splitlines()
        rows = [line.split("|") for line in sorted(lines, key=lambda line: int(line.split("|")[0]))]
        return [Job(i, state, memory, int(nodes), what) for i, state, memory, nodes, what in rows]

    def end(self) -> int:
        """Wait for its end; the exit code. The final squeue listing is kept with its output."""
        code = self.process.wait(PATIENCE)
        form = "%.5i %.10T %.19V %.19S %.19e %.7m %.11l %.5D %k"
        listing = self.cluster.ask("squeue", "-t", "all", "-S", "i", "-n", self._name(), "-o", form)
        self._log.with_name("squeue.txt").write_text(listing)
        return code

    def _name(self) -> str:
        return re.search(r"^SLURM run ID: (\S+)$", self.said, re.M)[1]


@contextmanager
def running(
    cluster: Cluster, folder: Path, study: Path, *flags: str, profile: str = "slurm"
) -> Iterator[Run]:
    run = Run(cluster, folder, study, *flags, profile=profile)
    try:
        yield run
    finally:
        if run.process.poll() is None:
            os.killpg(run.process.pid, signal.SIGKILL)
            run.process.wait()


def until(true: Callable[[], object], run: Run | None = None) -> None:
    """Wait until a condition holds; a given run must not end before."""
    end = time.monotonic() + PATIENCE
    while not true():
        assert run is None or run.process.poll() is None, run.said
        assert time.monotonic() < end, run.said if run else "too late"
        time.sleep(0.005)


def free_ports(count: int) -> int:
    """The first of several consecutive free ports."""
    while True:
        first = Random().randrange(20000, 30000)
        try:
            for port in range(first, first + count):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", port))
        except OSError:
            continue
        return first


def held(partial: Path) -> tuple[str, int]:
    """SLURM job and process that write an output, stopped from now on."""
    pid = SoftFileLease(partial / "lease.lock").pid
    os.kill(pid, signal.SIGSTOP)
    return json.loads((partial / "lease.json").read_text())["job"], pid


def rule_of(job: Job) -> str:
    return re.match(r"rule_(.+?)(?:_wildcards_.*)?$", job.what)[1]


def steps(folder: Path) -> list[dict[str, float]]:
    path = folder / "log.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    if not shutil.which("slurmctld", path=os.environ["PATH"] + ":/usr/sbin"):
        pytest.fail("SLURM is not installed; `make test-slurm` does it, on Debian and as root")
    if importlib.util.find_spec("snakemake_executor_plugin_slurm") is None:
        pytest.fail("snakemake-executor-plugin-slurm is not installed; requirements.lock has it")
    signal.signal(signal.SIGTERM, lambda *_: pytest.exit("terminated"))  # or it would stay behind
    folder = Path(tempfile.mkdtemp(prefix="slurm"))
    cluster = Cluster(folder)
    try:
        cluster.script("start")
        yield cluster
    finally:
        cluster.script("stop")
        shutil.rmtree(folder)


@pytest.fixture(scope="session")
def study(tmp_path_factory) -> Path:
    """The tiny study with two more tables."""
    whole = yaml.safe_load(TINY.with_name("whole.yaml").read_text())
    more = ("appendix", whole["appendix"])
    return changed(tmp_path_factory.mktemp("study") / "tiny.yaml", more)


@pytest.fixture(scope="session")
def finished(cluster, study, tmp_path_factory) -> tuple[Path, list[Job]]:
    """Folder of the tiny study run on the cluster, and the submitted jobs."""
    folder = tmp_path_factory.mktemp("finished")
    with running(cluster, folder, study) as run:
        assert run.end() == 0, run.said
        return folder, run.jobs()


@pytest.fixture(scope="session")
def larger(tmp_path_factory) -> Path:
    """A study of one run with three caption shards and 68 training steps."""
    tiny = yaml.safe_load(TINY.read_text())
    return changed(
        tmp_path_factory.mktemp("larger") / "larger.yaml",
        ("datasets.scenes.options.images", 1100),
        ("datasets.scenes.parts.long", 1),
        ("embedding.facets", "used"),
        ("runs", {"flame-1": tiny["runs"]["flame-1"]}),
        ("tables.table6.rows", tiny["tables"]["table6"]["rows"][:1]),
    )


@pytest.fixture(scope="session")
def undisturbed(larger, tmp_path_factory) -> Path:
    """Folder with a training of the larger study, without a cluster."""
    folder = tmp_path_factory.mktemp("undisturbed")
    done = snakemake_here(folder, larger, "--cores", "2", "--", RUN)
    assert done.returncode == 0, done.stdout
    return folder


def without(folder: Path, to: Path, *paths: str) -> Path:
    """A copy of a folder without some results."""
    shutil.copytree(folder, to)
    for path in paths:
        shutil.rmtree(to / path)
    return to


def test_the_cluster_makes_the_table(finished):
    folder, jobs = finished
    table = pl.read_csv(folder / "results/table6.csv", infer_schema=False)
    assert table["prompts"].to_list() == ["1", "3", "5", "7", "9"]
    assert all(0 <= float(value) <= 100 for row in table.iter_rows() for value in row)
    assert {job.state for job in jobs} == {"COMPLETED"}
    counts = Counter(rule_of(job) for job in jobs)
    assert counts["download_dataset"] == 7
    assert counts["embed_training"] == 4
    assert counts["train"] == counts["evaluate"] == 5
    assert not list((folder / "logs/slurm").rglob("*.log"))  # there are none of what went well


def test_tables_share_a_submission(finished):
    folder, jobs = finished
    for name in ("table6", "table_a1", "appendix_b"):
        assert (folder / f"results/{name}.csv").exists()
    assert [job.what for job in jobs if "table" in job.what] == ["rule_paper_appendix_table"]


@pytest.fixture(scope="session")
def troubled(cluster, finished, tmp_path_factory) -> tuple[Path, str, list[Job]]:
    """A run with one training that must fail, while both exceed their first memory limit."""
    folder = tmp_path_factory.mktemp("troubled")
    recipe = yaml.safe_load(TINY.read_text())["recipes"]["tiny"]
    study = changed(
        folder / "bad.yaml",
        ("recipes.bad", recipe | {"warmup_steps": 1000}),
        ("runs.flame-1.recipe", "bad"),
    )
    runs = RUN, "results/train/flame-3"
    folder = without(finished[0], folder / "copy", *runs)
    memory = "train:mem_mb=600 * attempt ** 2"
    flags = ["--retries", "1", "--set-resources", memory, "--", *runs]
    with running(cluster, folder, study, *flags) as run:
        assert run.end() == 1, run.said
        return folder, run.said, run.jobs()


def test_a_job_that_outgrows_its_memory_gets_more_of_it(finished, troubled):
    folder, _, jobs = troubled
    first, second = (job for job in jobs if "flame-3" in job.what)
    assert (first.state, first.memory) == ("FAILED", "600M")
    assert (second.state, second.memory) == ("COMPLETED", "2400M")
    log = folder / f"logs/slurm/rule_train/flame-3/{first.id}.log"
    assert "exceeded memory limit" in log.read_text()
    weights = "results/train/flame-3/model.safetensors"
    assert (folder / weights).read_bytes() == (finished[0] / weights).read_bytes()


def test_a_failed_job_is_told_last_with_its_id_and_its_log(troubled):
    _, said, jobs = troubled
    tried = [job.id for job in jobs if "flame-1" in job.what]
    assert len(tried) == 2
    told = said.split("Failed on the cluster: 1;")[1]
    assert f"SLURM job {tried[-1]}: {RUN}\n" in told
    assert "train: error: warmup_steps 1000 of only 6 steps" in told
    assert "flame-3" not in told


def test_requeued_jobs_go_on_to_the_same_bytes(cluster, larger, undisturbed, tmp_path):
    """As after a preemption: once in the middle of embedding, once in the middle of training."""
    folder = without(undisturbed, tmp_path / "copy", LONG, RUN)
    store, tower = (folder / f"{path}.partial" for path in (LONG, RUN))
    shards = store / "content/scenes/embeddings"
    with running(cluster, folder, larger, "--", RUN) as run:
        until(lambda: list(shards.glob("c/*/*/*")), run)
        job, _ = held(store)
        assert 0 < len(list(shards.glob("c/*/*/*"))) < 3
        cluster.requeue(job)
        until(lambda: len(steps(tower / "content")) > 5, run)
        job, _ = held(tower)
        assert len(steps(tower / "content")) < 60
        cluster.requeue(job)
        assert run.end() == 0, run.said
        assert [job.state for job in run.jobs()] == ["COMPLETED"] * 2
    kept = (folder / "logs/embed/random-llama/scenes/long/0.log").read_text()
    assert re.search(r"kept (512|1024) of 1100 captions from an interrupted job", kept)
    assert re.search(
        r"resuming from step \d+ of 68", (folder / "logs/train/flame-1.log").read_text()
    )
    assert content(folder / LONG) == content(undisturbed / LONG)
    weights = f"{RUN}/model.safetensors"
    assert (folder / weights).read_bytes() == (undisturbed / weights).read_bytes()


def test_ctrl_c_cancels_the_jobs_and_what_they_did_stays(cluster, larger, undisturbed, tmp_path):
    folder = without(undisturbed, tmp_path / "copy", RUN)
    tower = folder / f"{RUN}.partial/content"
    with running(cluster, folder, larger, "--", RUN) as run:
        until(lambda: len(steps(tower)) > 5, run)
        os.killpg(run.process.pid, signal.SIGINT)
        assert run.end() == 1, run.said
        until(lambda: [job.state for job in run.jobs()] == ["CANCELLED"])
    assert not list(folder.glob(".snakemake/locks/*"))
    resumed = snakemake_here(folder, larger, "--cores", "1", "--", RUN)
    assert resumed.returncode == 0, resumed.stdout
    assert "resuming from step" in (folder / "logs/train/flame-1.log").read_text()
    weights = f"{RUN}/model.safetensors"
    assert (folder / weights).read_bytes() == (undisturbed / weights).read_bytes()


def test_two_nodes_train_one_tower(cluster, larger, undisturbed, tmp_path):
    """With torchrun under srun, one process per (pretended) GPU of a node."""
    folder = without(undisturbed, tmp_path / "copy", RUN)
    resources = ["mpi=srun", "nodes=2", "tasks=2", "tasks_per_gpu=0", "gres=gpu:2", "mem_mb=6000"]
    flags = ["--set-resources", *(f"train:{resource}" for resource in resources)]
    with running(cluster, folder, larger, *flags, "--", RUN) as run:
        assert run.end() == 0, run.said
        assert [(job.state, job.nodes) for job in run.jobs()] == [("COMPLETED", 2)]
    losses, alone = ([line["loss"] for line in steps(at / RUN)] for at in (folder, undisturbed))
    assert len(losses) == len(alone) == 68
    # BatchNorm and Adam amplify rounding; tests/training/test_processes.py compares to 1e-5.
    assert losses == pytest.approx(alone, rel=0.03)


def test_a_profile_for_gpus_submits_to_its_partitions(cluster, study, tmp_path):
    """As users do: a copy with other definitions, here for the pretended nodes."""
    text = (ROOT / "workflow/profiles/one-node/config.yaml").read_text()
    for name, value in {"CPU": '"main"', "CORES": "2"}.items():
        text, changes = re.subn(rf"- {name} = \S+", f"- {name} = {value}", text)
        assert changes == 1
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "config.yaml").write_text(text)
    with running(cluster, tmp_path, study, "--", LONG, profile=str(mine)) as run:
        assert run.end() == 0, run.said
        jobs = {rule_of(job): job.id for job in run.jobs()}
        asked = {rule: cluster.ask("scontrol", "show", "job", i) for rule, i in jobs.items()}
    assert set(jobs) == {"download_dataset", "download_llm", "embed_training"}
    for rule, words in asked.items():
        on_gpu = rule == "embed_training"
        assert f"Partition={'gpu' if on_gpu else 'main'}" in words
        assert "Account=lab" in words
        assert bool(re.search(r"TresPerJob=\S*gpu:1", words)) == on_gpu
    assert re.search(r"CPUs/Task=2\b", asked["embed_training"])
