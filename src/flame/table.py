"""Tables of the paper, verdicts on its claims, and its appendix, filled with results of a study.

Subcommands: `results` fills a table, `claims` judges the claims of the paper, `knowledge` tells
what each prompt knows, `variance` how much numbers vary, `appendix` compares recipe and prompts
with the paper's, `show` prints one of their CSV files.
"""

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import polars as pl
import tyro

from flame.report import (
    appendix,
    check_table,
    claims,
    knowledge,
    knowledge_claims,
    results,
    results_table,
    variance,
)
from flame.report.plain import WIDTH, plain_table
from flame.report.reported import read
from flame.runtime import command
from flame.runtime.checksums import read_json
from flame.runtime.errors import known
from flame.runtime.resumable import write_atomic
from flame.study.settings import (
    AppendixSettings,
    ClaimsSettings,
    KnowledgeTableSettings,
    TableSettings,
    VarianceSettings,
)


def fill_table(
    metrics: list[Path],
    hits: list[Path],
    csv: Path,
    markdown: Path,
    settings: TableSettings,
    reported: Path | None = None,
) -> None:
    """Fill one table of the paper, or of our own.

    Args:
        metrics: JSON files of the evaluate and few-shot stages.
        hits: the Parquet file beside each of them.
        csv: CSV to write. Per column: the value, both ends of its interval, the paper's number. A
            table with a tolerance has one line per number instead, with a verdict.
        markdown: Markdown to write: the same, with the claims of the paper that belong to the
            table.
        settings: rows, columns and claims.
        reported: CSV with the paper's numbers, one per row.
    """
    measured = results.read(metrics, hits, settings.runs)
    printed = None
    if reported is not None and settings.table.reported is not None:
        printed = read(reported, settings.table.reported)
    cells = results_table.fill(measured, printed, settings.table)
    form = results_table if settings.table.tolerance is None else check_table
    text = form.as_markdown(cells, settings)
    if settings.claims:
        verdicts = [claims.judge(claim, measured, {}) for claim in settings.claims]
        text += f"\n**Claims**\n\n{claims.claims_table(verdicts, settings)}"
    write_atomic(csv, form.as_csv(cells, settings).encode())
    write_atomic(markdown, text.encode())


def judge_claims(
    metrics: list[Path],
    hits: list[Path],
    csv: Path,
    markdown: Path,
    settings: ClaimsSettings,
    overhead: Path | None = None,
    probes: tuple[Path, ...] = (),
) -> None:
    """Compare every claim of the paper with what was measured.

    Args:
        metrics: JSON files of the evaluate and few-shot stages.
        hits: the Parquet file beside each of them.
        csv: CSV to write, one line per claim.
        markdown: Markdown to write: the same, under a summary.
        settings: the claims.
        overhead: JSON of the overhead stage, for claims about time.
        probes: Parquet files of the knowledge stage, for claims on what prompts know.
    """
    measured = results.read(metrics, hits, settings.runs)
    ratios = read_json(overhead)["ratios"] if overhead is not None else {}
    answers = knowledge_claims.read(probes, settings.probed) if settings.probed else None
    verdicts = [claims.judge(claim, measured, ratios, answers) for claim in settings.claims]
    write_atomic(csv, claims.as_csv(verdicts, settings).encode())
    write_atomic(markdown, claims.as_markdown(verdicts, settings).encode())


def tell_variance(
    metrics: list[Path], hits: list[Path], csv: Path, markdown: Path, settings: VarianceSettings
) -> None:
    """Tell how much the numbers of all tables vary.

    Args:
        metrics: JSON files of the evaluate and few-shot stages.
        hits: the Parquet file beside each of them.
        csv: CSV to write, one line per number and method.
        markdown: Markdown to write: a block per method.
        settings: tables, and the runs that were trained several times.
    """
    frame = variance.as_frame(results.read(metrics, hits, settings.runs), settings)
    write_atomic(csv, frame.write_csv(float_precision=2).encode())
    write_atomic(markdown, variance.as_markdown(frame, settings).encode())


def tell_knowledge(
    metrics: list[Path], csv: Path, markdown: Path, settings: KnowledgeTableSettings
) -> None:
    """Tell what each prompt knows.

    Args:
        metrics: JSON files of the knowledge stage, one per LLM.
        csv: CSV to write, one line per LLM and prompt.
        markdown: Markdown to write: a block per LLM.
        settings: names and labels.
    """
    known = knowledge.read(metrics, settings.probed)
    write_atomic(csv, knowledge.as_csv(known, settings.probed).encode())
    write_atomic(markdown, knowledge.as_markdown(known, settings).encode())


def compare_appendix(reported: Path, csv: Path, markdown: Path, settings: AppendixSettings) -> None:
    """Compare the recipe or the prompts of the study with the paper's appendix.

    Args:
        reported: CSV with what the paper prints.
        csv: CSV to write: each text of the paper and of the study, and whether they differ.
        markdown: Markdown to write: the same.
        settings: the recipe, or the facets and prompts.
    """
    printed = read(reported, settings.table.reported).to_dicts()
    records = appendix.records_of(settings, printed)
    write_atomic(csv, appendix.as_csv(records).encode())
    write_atomic(markdown, appendix.as_markdown(records, settings).encode())


def show(csv: Annotated[Path, tyro.conf.Positional], columns: tuple[str, ...] = ()) -> None:
    """Print a CSV file of this stage as an aligned table of plain text.

    Args:
        csv: the file.
        columns: columns to print; all by default.
    """
    frame = pl.read_csv(csv, infer_schema=False)
    for name in columns:
        if name not in frame.columns:
            raise ValueError(f"{csv}: no column {known(name, frame.columns)}")
    width = shutil.get_terminal_size((WIDTH, 0)).columns
    sys.stdout.write(plain_table(frame.select(columns or frame.columns), width))


COMMANDS: dict[str, Callable[..., None]] = {
    "results": fill_table,
    "claims": judge_claims,
    "variance": tell_variance,
    "knowledge": tell_knowledge,
    "appendix": compare_appendix,
    "show": show,
}

if __name__ == "__main__":
    command.main(COMMANDS)
