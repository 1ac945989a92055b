"""A study -> what it will take, before anything runs: jobs, GPU-hours, disk, memory, access."""

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
    """Print what a study will take.

    Args:
        study: YAML file.
        only: tables and figures to plan for; all of the study by default.
        assumptions: what GPU-hours are reckoned with.
    """
    sys.stdout.write(Plan(load_file(study), only, assumptions).document())


if __name__ == "__main__":
    command.main(plan)
