"""A study -> an estimate of what it takes: jobs, GPU-hours, disk, memory, access."""

import sys
from pathlib import Path

from flame.report import rates as rates_file
from flame.report.plan import Plan
from flame.report.rates import Assumptions
from flame.runtime import command
from flame.study.load import load_file

DEFAULT = Assumptions()


def plan(
    study: Path,
    *,
    only: tuple[str, ...] = (),
    rates: Path | None = None,
    assumptions: Assumptions = DEFAULT,
) -> None:
    """Print an estimate of what a study takes.

    Args:
        study: YAML file.
        only: names of tables and figures; by default the whole study.
        rates: JSON file of measured rates (bench/README.md); by default bench/rates.json, if it
            exists here.
        assumptions: what GPU-hours are estimated from. A value given here takes precedence over a
            measured one.
    """
    if rates is None and rates_file.MEASURED.is_file():
        rates = rates_file.MEASURED
    measured = rates_file.read(rates) if rates else None
    sys.stdout.write(Plan(load_file(study), only, assumptions, measured).document())


if __name__ == "__main__":
    command.main(plan)
