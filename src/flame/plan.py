"""A study -> an estimate of what it takes: jobs, GPU-hours, disk, memory, access."""

import sys
from pathlib import Path

from flame.report.plan import Assumptions, Plan
from flame.runtime import command
from flame.study.load import load_file

DEFAULT = Assumptions()


def plan(
    study: Path,
    *,
    only: tuple[str, ...] = (),
    assumptions: Assumptions = DEFAULT,
) -> None:
    """Print an estimate of what a study takes.

    Args:
        study: YAML file.
        only: names of tables and figures; by default the whole study.
        assumptions: what GPU-hours are estimated from.
    """
    sys.stdout.write(Plan(load_file(study), only, assumptions).document())


if __name__ == "__main__":
    command.main(plan)
