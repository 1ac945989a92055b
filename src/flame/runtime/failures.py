"""What failed for good in a run of Snakemake on a cluster, and the ends of its logs: told last.

Snakemake tells of a failed job when it fails; on a cluster hundreds of others may come after it,
and some of those that failed have gone well since.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

LINES = 12  # of a log that are shown

# The form of Snakemake's own log: one block a failed submission, which is a job or a group of jobs.
BLOCK = re.compile(r"^    message: SLURM-job '(?P<id>\w+)' failed.*\n(?P<body>(?:    .*\n)*)", re.M)
FINISHED = re.compile(r"^Finished jobid: (\d+) ", re.M)
JOB = re.compile(r"^ +jobid: (\d+)$", re.M)
OUTPUT = re.compile(r"^ +output: (.+)$", re.M)
LOGS = re.compile(r"^ +log: (.+) \(check log file\(s\) for error details\)$", re.M)


class Failure(NamedTuple):
    """The last submission of jobs that did not end well."""

    slurm_id: str
    outputs: list[str]
    logs: list[Path]


def failures(text: str) -> list[Failure]:
    """Those of a run, from Snakemake's log of it, without those that a retry made good."""
    last: dict[frozenset[str], Failure] = {}
    for block in BLOCK.finditer(text):
        jobs, body = frozenset(JOB.findall(block["body"])), block["body"]
        outputs = [path for line in OUTPUT.findall(body) for path in line.split(", ")]
        logs = [Path(path) for line in LOGS.findall(body) for path in line.split(", ")]
        if not jobs <= set(FINISHED.findall(text[block.end() :])):
            last[jobs] = Failure(block["id"], outputs, logs)
    return list(last.values())


def report(text: str) -> str:
    """Each failure with its SLURM job, its logs and their last lines; empty if there is none."""
    found = failures(text)
    if not found:
        return ""
    lines = [f"\nFailed on the cluster: {len(found)}; the last lines of the logs"]
    for failure in found:
        lines.append(f"\nSLURM job {failure.slurm_id}: {', '.join(failure.outputs)}")
        for path in failure.logs:
            lines += [f"  {path}", *(f"    {line}" for line in _end(path, failure.slurm_id))]
    return "\n".join(lines) + "\n\n"


def _end(path: Path, slurm_id: str) -> Iterator[str]:
    """What a log ends with; of SLURM's own, what SLURM said, for the rest is Snakemake's."""
    lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    if path.stem == slurm_id:
        lines = [line for line in lines if re.match(r"(slurmstepd|srun|slurm_\w+|sbatch)\b", line)]
    yield from lines[-LINES:] or ["(nothing)"]
