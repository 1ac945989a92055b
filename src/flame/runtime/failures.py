"""Jobs that finally failed on a cluster, with the last lines of their logs, for the end of a run.

Snakemake reports a failure when it happens. On a cluster, hundreds of other jobs may follow, and a
retry may have succeeded since.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

LINES = 12  # shown of each log

# Snakemake's log has one block per failed submission, which is a job or a group of jobs.
BLOCK = re.compile(r"^    message: SLURM-job '(?P<id>\w+)' failed.*\n(?P<body>(?:    .*\n)*)", re.M)
FINISHED = re.compile(r"^Finished jobid: (\d+) ", re.M)
JOB = re.compile(r"^ +jobid: (\d+)$", re.M)
OUTPUT = re.compile(r"^ +output: (.+)$", re.M)
LOGS = re.compile(r"^ +log: (.+) \(check log file\(s\) for error details\)$", re.M)


class Failure(NamedTuple):
    """The last failed submission of some jobs."""

    slurm_id: str
    outputs: list[str]
    logs: list[Path]


def failures(text: str) -> list[Failure]:
    """Failures in the log of a Snakemake run, without those that a retry fixed."""
    last: dict[frozenset[str], Failure] = {}
    for block in BLOCK.finditer(text):
        jobs, body = frozenset(JOB.findall(block["body"])), block["body"]
        outputs = [path for line in OUTPUT.findall(body) for path in line.split(", ")]
        logs = [Path(path) for line in LOGS.findall(body) for path in line.split(", ")]
        if not jobs <= set(FINISHED.findall(text[block.end() :])):
            last[jobs] = Failure(block["id"], outputs, logs)
    return list(last.values())


def report(text: str) -> str:
    """Each failure with its SLURM job, its logs and their last lines; empty without failures."""
    found = failures(text)
    if not found:
        return ""
    lines = [f"\nFailed on the cluster: {len(found)}; last lines of the logs:"]
    for failure in found:
        lines.append(f"\nSLURM job {failure.slurm_id}: {', '.join(failure.outputs)}")
        for path in failure.logs:
            lines += [f"  {path}", *(f"    {line}" for line in _end(path, failure.slurm_id))]
    return "\n".join(lines) + "\n\n"


def _end(path: Path, slurm_id: str) -> Iterator[str]:
    """Last lines of a log; of SLURM's own log only SLURM's lines, as the rest is Snakemake's."""
    lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    if path.stem == slurm_id:
        lines = [line for line in lines if re.match(r"(slurmstepd|srun|slurm_\w+|sbatch)\b", line)]
    yield from lines[-LINES:] or ["(empty)"]
