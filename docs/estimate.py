"""Write what `flame.plan` says of the paper's study, and of CC3M alone, into docs/paper-study.md.

Usage: python docs/estimate.py, in the checkout. It uses bench/rates.json, if there is one.
"""

import re
from pathlib import Path

from flame.report import rates
from flame.report.plan import Plan
from flame.study.load import load_file

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/paper-study.md"
STUDIES = {"the whole paper": "config/paper.yaml", "CC3M alone": "config/cc3m.yaml"}


def passage() -> str:
    """GPU-hours and disk by stage, and where the rates come from."""
    file = ROOT / rates.MEASURED
    measured = rates.read(file) if file.is_file() else None
    plans = [Plan(load_file(ROOT / path, ROOT), measured=measured) for path in STUDIES.values()]
    documents = [plan.document() for plan in plans]
    totals = [dict(rows(section(document, "Total"))) for document in documents]
    head = f"| | {' | '.join(STUDIES)} |\n| --- | {' | '.join('---:' for _ in plans)} |\n"
    lines = [
        f"| {stage} | {' | '.join(total[stage] for total in totals)} |\n" for stage in totals[0]
    ]
    return head + "".join(lines) + "\n" + section(documents[0], "Assumptions")


def section(document: str, title: str) -> str:
    """Text below a title."""
    return document.split(f"\n## {title}\n\n")[1].split("\n## ")[0].strip()


def rows(table: str) -> list[tuple[str, str]]:
    """Stage, and its GPU-hours and disk."""
    cells = [line.strip("| ").split(" | ") for line in table.splitlines()[2:]]
    return [(stage, f"{hours} h, {disk}") for stage, hours, disk in cells]


def write(page: Path) -> None:
    """Put the passage between the marks in a page."""
    marks, text = r"(<!-- plan -->\n).*?(<!-- /plan -->)", passage()
    found = re.sub(marks, lambda m: f"{m[1]}{text}\n{m[2]}", page.read_text("utf-8"), flags=re.S)
    page.write_text(found, "utf-8")


if __name__ == "__main__":
    write(PAGE)
