"""The study itself -> its recipe beside Tables A1 and A2, its prompts beside Appendix B."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import polars as pl

from flame.report.protocol import DIFFERS, FIXED, Record, prompt_records, recipe_records
from flame.report.reported import read
from flame.report.results_table import markdown_table
from flame.runtime import command
from flame.runtime.resumable import write_atomic
from flame.study.settings import AppendixSettings


def appendix(reported: Path, csv: Path, markdown: Path, settings: AppendixSettings) -> None:
    """Show a part of the study beside what the paper's appendix says of it.

    Args:
        reported: CSV of what the paper says.
        csv: CSV to write, every text of the paper and of the study, and whether they differ.
        markdown: the same, to be read.
        settings: the recipe, or the facets and prompts.
    """
    printed = read(reported, settings.table.reported).to_dicts()
    if settings.recipe is not None:
        records = recipe_records(settings.recipe, printed)
        body = _recipe_markdown(records, settings)
    else:
        records = prompt_records(settings.facets, settings.prompts, printed)
        body = _prompt_markdown(records, settings)
    write_atomic(csv, pl.DataFrame(records, infer_schema_length=None).write_csv().encode())
    write_atomic(markdown, f"**{settings.table.title}**\n\n{body}".encode())


def _recipe_markdown(records: Iterable[Record], settings: AppendixSettings) -> str:
    lines = [["config", "key", "paper", "this study", ""], ["---", "---", "---:", "---:", "---"]]
    others = [["key", "this study", "meaning"], ["---", "---:", "---"]]
    for record in records:
        cells = {key: value or "" for key, value in record.items()}
        key, mark = f"`{cells['key']}`", _bold(record["differs"])
        if not record["config"]:
            others.append([key, cells["study"], cells["meaning"]])
        else:
            key = "" if record["key"] in FIXED else key
            lines.append([cells["config"], key, cells["paper"], cells["study"], mark])
    towers = ", ".join(settings.backbones) or "none"
    return (
        f"Recipe *{settings.table.recipe}* of the *{settings.study}* study; visual towers trained "
        f"by it: {towers}.\n\n{markdown_table(lines)}\n"
        f"Keys of the recipe that the paper's table does not have:\n\n{markdown_table(others)}"
    )


def _prompt_markdown(records: Sequence[Record], settings: AppendixSettings) -> str:
    lines = [["#", "facet", "level", "distinct part", "long", "short", ""]]
    lines.append(["---:", *["---"] * 6])
    for record in records:
        study, paper = (_prompt_cells(record, side) for side in ("study", "paper"))
        number, facet = record["number"] or "", f"`{record['facet']}`"
        lines.append([number, facet, *(study if any(study) else paper), _bold(record["differs"])])
        if all(any(side) for side in (study, paper)) and study != paper:
            lines.append(["", "<sub>paper</sub>", *(f"<sub>{cell}</sub>" for cell in paper), ""])
    return (
        f"The prompts of the *{settings.study}* study, with those of the paper where the two "
        "differ. *long*, *short*: whether a prompt is a default for long and for short captions.\n"
        f"\n{markdown_table(lines)}\n{_template_table(records, settings)}"
    )


def _template_table(records: Iterable[Record], settings: AppendixSettings) -> str:
    paper = dict.fromkeys(r["template paper"] for r in records if r["template paper"])
    lines = [["prompt", "captions", "whole template", ""], ["---", "---", "---", "---"]]
    lines += [["paper", "", f"`{template}`", ""] for template in paper]
    for name, prompt in settings.prompts.items():
        mark = _bold(None if prompt.template in paper else DIFFERS)
        lines.append([f"`{name}`", ", ".join(prompt.captions), f"`{prompt.template}`", mark])
    return markdown_table(lines)


def _prompt_cells(record: Record, side: str) -> list[str]:
    return [record[f"{key} {side}"] or "" for key in ("level", "text", "long", "short")]


def _bold(text: str | None) -> str:
    return f"**{text}**" if text else ""


if __name__ == "__main__":
    command.main(appendix)
