"""The study, and what rules ask of it: `inputs` and `param` of a job come from flame.study.jobs."""

import os
import re
import sys
from functools import cache
from pathlib import Path
from shlex import quote

from snakemake.exceptions import WorkflowError
from snakemake.io import IOFile, ancient

ROOT = Path(str(workflow.current_basedir)).parents[1]
SRC = Path(os.path.relpath(ROOT / "src"))
sys.path.insert(0, str(ROOT / "src"))

from flame.runtime import failures
from flame.runtime.checksums import sha256
from flame.study import files, jobs, stages
from flame.study.load import StudyError, load


def checked_study():
    """The study named by --configfile or by the profile; one line per mistake if it has any."""
    origins = [str(path) for path in workflow.configfiles] or ["no --configfile"]
    if workflow.config_settings.config:
        origins.append("--config")
    try:
        return load(config, ", ".join(origins), ROOT)
    except StudyError as error:
        sys.exit(f"{error}\nNothing was run; config/README.md explains every key.")


study = checked_study()
# With all that it includes: the captions of the report speak of it.
config.update(study.model_dump(mode="json"))


# --- what a job reads and is told -------------------------------------------------------------


@cache
def job(rule, **wildcards):
    """The job of a rule; unknown names are errors that list the known ones."""
    try:
        return jobs.JOBS[rule](study, **wildcards)
    except ValueError as error:
        raise WorkflowError(str(error)) from error


def inputs(rule):
    """Input function of a rule: all that its jobs read, by name."""

    def read(wildcards):
        found = job(rule, **wildcards)
        fresh = found.ancient and not is_recorded(files.output(rule, **wildcards), found)
        keep = () if fresh else found.ancient
        return {
            name: [ancient(path) for path in paths] if name in keep else paths
            for name, paths in found.inputs.items()
        }

    return read


def is_recorded(output, job):
    """Whether a file was last made by a job with just these params.

    Of a job behind an `ancient` input that is about to be rewritten, Snakemake asks no other reason
    to rerun it, such as a changed recipe (dag.py, update_needrun: "masked"). So an input is ancient
    only for a job whose params are those on record.
    """
    recorded = workflow.persistence.params(IOFile(output))
    return Path(output).exists() and recorded == sorted(map(repr, job.params.values()))


def param(rule, name):
    """Param of a rule: what its program is told under this name."""

    def told(wildcards):
        return job(rule, **wildcards).params[name]

    return told


def sources(wildcards, input):
    """Flags of what only some runs have: embeddings, captions, or a run to start from."""
    given = {name: input.get(name) for name in ("stores", "captions", "base")}
    return " ".join(f"--{name} {paths}" for name, paths in given.items() if paths)


def validation(wildcards, input):
    """Flags of what is validated during a training, where anything is.

    As in `program`, they are no reason to rerun: no weights depend on them.
    """
    if not input.get("validation_datasets"):
        return ""
    settings = quote(stages.validation(study, wildcards.run).model_dump_json())
    given = {name: input.get(name) for name in ("validation_datasets", "validation_stores")}
    paths = [f"--{name.replace('_', '-')} {paths}" for name, paths in given.items() if paths]
    return f"--validation {settings} {' '.join(paths)}"


def claims_overhead(wildcards, input):
    """Flags of the times and probes behind claims on them, where there are any."""
    given = {name: input.get(name) for name in ("overhead", "probes")}
    return " ".join(f"--{name} {paths}" for name, paths in given.items() if paths)


def reported(section):
    """Flag of the paper's numbers, if any; as in `program`, its place is no reason to rerun."""

    def flag(wildcards, output):
        file = getattr(study, section)[wildcards[0]].reported
        return ["--reported", os.path.relpath(ROOT / file.file)] if file else []

    return flag


def reported_digest(section):
    """Digest of the paper's numbers: they are a reason."""

    def digest(wildcards):
        file = getattr(study, section)[wildcards[0]].reported
        return sha256(ROOT / file.file) if file else ""

    return digest


# --- wildcards --------------------------------------------------------------------------------


def one_of(names):
    """Regular expression of some names; of nothing if there are none."""
    return "|".join(map(re.escape, sorted(names))) or "(?!)"


wildcard_constraints:
    dataset=r"[^/]+",
    llm=r"[^/]+",
    bundle=r"[^/]+",
    kind=r"[^/]+",
    part=r"\d+",
    captioner=r"[^/]+",
    run=r"[^/]+",
    benchmark=r"[^/]+",
    figure=r"[^/]+",
    appendix=one_of(study.appendix),
    table=rf"(?!(?:claims|knowledge|variance|{one_of(study.appendix)})\.)[^/]+",


def report_failures(log):
    """Print, at the end of a run on a cluster, which jobs failed and why."""
    sys.stderr.writelines(failures.report(Path(path).read_text()) for path in log)
