"""What is told at the end of a run on a cluster, from Snakemake's own log of it."""

from pathlib import Path

import pytest

from flame.runtime.failures import report

ADVICE = "For further error details see the cluster/cloud log and the log files of the rule(s)."


def failed(slurm_id: int, jobid: int, output: str, *logs: Path) -> str:
    """Block of a job that failed, as Snakemake 9.27 writes it."""
    return f"""Error in rule train:
    message: SLURM-job '{slurm_id}' failed, SLURM status is: 'FAILED'. {ADVICE}
    jobid: {jobid}
    input: resources/datasets/scenes, results/embed/llm/scenes/long/0.zarr
    output: {output}
    log: {", ".join(map(str, logs))} (check log file(s) for error details)
    shell:
        python -m flame.train --out {output}
        (command exited with non-zero exit code)
    external_jobid: {slurm_id}
Trying to restart job {jobid}.
"""


def failed_group(slurm_id: int, log: Path, outputs: dict[int, str]) -> str:
    jobs = "".join(
        f"        rule table:\n            jobid: {n}\n            output: {output}\n"
        for n, output in outputs.items()
    )
    return f"    message: SLURM-job '{slurm_id}' failed, SLURM status is: 'FAILED'. {ADVICE}\n" + (
        f"    log: {log} (check log file(s) for error details)\n    jobs:\n{jobs}"
    )


def finished(jobid: int) -> str:
    return f"[Wed Nov 25 21:20:11 2026]\nFinished jobid: {jobid} (Rule: train)\n"


@pytest.fixture
def log(tmp_path) -> Path:
    path = tmp_path / "train.log"
    path.write_text("".join(f"step {n}\n" for n in range(100)) + "train: error: no such facet\n")
    return path


def test_a_failure_is_told_with_its_slurm_job_and_the_end_of_its_log(log):
    told = report(finished(1) + failed(12, 2, "results/train/a", log))
    assert "SLURM job 12: results/train/a\n" in told
    assert told.rstrip().endswith("step 99\n    train: error: no such facet")
    assert "step 50" not in told


def test_what_a_retry_made_good_is_not_told(log):
    text = failed(12, 2, "results/train/a", log) + failed(13, 3, "results/train/b", log)
    told = report(text + finished(2))
    assert "SLURM job 13: results/train/b" in told
    assert "results/train/a" not in told
    assert report(text + finished(2) + finished(3)) == ""
    assert report(finished(2)) == ""


def test_of_several_submissions_the_last_is_told(log):
    told = report("".join(failed(slurm_id, 2, "results/train/a", log) for slurm_id in (12, 14)))
    assert told.count("SLURM job") == 1
    assert "SLURM job 14" in told


def test_of_the_clusters_log_only_what_slurm_said_is_told(tmp_path, log):
    slurm = tmp_path / "12.log"
    slurm.write_text(
        "Building DAG of jobs...\n"
        "slurmstepd-n0: error: StepId=12.0 exceeded memory limit (462622720 > 419430400)\n"
        "Shutting down, this might take some time.\n"
    )
    told = report(failed(12, 2, "results/train/a", tmp_path / "missing.log", slurm))
    assert f"missing.log\n    (empty)\n  {slurm}\n    slurmstepd-n0: error" in told
    assert "Building DAG" not in told


def test_a_group_is_told_with_all_that_it_was_to_make(tmp_path):
    text = failed_group(12, tmp_path / "12.log", {4: "results/a.csv", 5: "results/b.csv"})
    assert "SLURM job 12: results/a.csv, results/b.csv" in report(text)
    assert report(text + finished(4) + finished(5)) == ""
