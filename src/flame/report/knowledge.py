"""What each prompt knows: results of the probes of every LLM, as CSV and as Markdown."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import polars as pl

from flame.report.markdown import markdown_table
from flame.runtime.checksums import read_json
from flame.study.settings import KnowledgeTableSettings, Probed

TITLE = "What each prompt knows"
NOTE = """\
Ours; the paper has no such table. For each prompt of a frozen LLM, a linear probe predicts an
attribute of the image from the stored embedding of its {kind} caption: top-1 accuracy on captions
that were held out, in percent. No image tower takes part.

- Data: {captions:,} captions of *{dataset}*, in {folds} folds: each is held out once, from a ridge
  classifier trained on the other folds (its penalty by leave-one-out on those). An attribute is
  asked of the captions to which it applies: only people have an action.
- Small print: 95 % interval over captions (bootstrap). The folds share training captions, so it
  does not contain the variation between other training sets.
- **Bold**: the best prompt of a column, where its whole interval is above the mean of the other
  prompts. \\*: the attribute that the prompt asks for.
- Most frequent class: accuracy without any vector.
"""


class Cell(NamedTuple):
    """Accuracy in percent with its 95 % interval."""

    value: float
    low: float
    high: float


class Knowledge(NamedTuple):
    """What the prompts of one LLM know."""

    captions: int
    cells: dict[tuple[str, str], Cell]
    """(facet, attribute) -> accuracy of the probe."""
    majority: dict[str, Cell]
    """Attribute -> accuracy of the most frequent class."""

    def best(self, attribute: str) -> set[str]:
        """Facet that knows an attribute best; empty unless it is above the mean of the others."""
        values = {facet: cell for (facet, of), cell in self.cells.items() if of == attribute}
        best = max(values, key=lambda facet: values[facet].value)
        others = [cell.value for facet, cell in values.items() if facet != best]
        return {best} if others and values[best].low > fmean(others) else set()


def read(metrics: Sequence[Path], probed: Probed) -> dict[str, Knowledge]:
    """Label of an LLM -> what its prompts know.

    Args:
        metrics: JSON of the knowledge stage, one file per LLM.
        probed: names and labels.
    """
    found = {path.stem: read_json(path) for path in metrics}
    return {label: _knowledge(found[llm]) for label, llm in probed.block.llms.items()}


def _knowledge(found: Mapping[str, Any]) -> Knowledge:
    cells = {(each["facet"], each["attribute"]): _cell(each) for each in found["records"]}
    majority = {each["attribute"]: _cell(each) for each in found["majority"]}
    return Knowledge(found["captions"], cells, majority)


def _cell(found: Mapping[str, Any]) -> Cell:
    return Cell(found["value"], found["low"], found["high"])


def words(facet: str) -> str:
    """Name of a facet for readers."""
    return facet.replace("_", " ")


def as_csv(known: Mapping[str, Knowledge], probed: Probed) -> str:
    """One line per LLM and prompt, and one for the most frequent classes."""
    records = []
    for label, knowledge in known.items():
        for facet, about in probed.facets.items():
            cells = {name: knowledge.cells[facet, name] for name in probed.block.attributes}
            head = {"LLM": label, "level": about.level, "prompt": words(facet)}
            records.append(head | _columns(cells, probed))
        head = {"LLM": label, "level": "", "prompt": "most frequent class"}
        records.append(head | _columns(knowledge.majority, probed))
    return pl.DataFrame(records, infer_schema_length=None).write_csv(float_precision=2)


def _columns(cells: Mapping[str, Cell], probed: Probed) -> dict[str, float]:
    columns: dict[str, float] = {}
    for name, label in probed.block.attributes.items():
        value, low, high = cells[name]
        columns |= {label: value, f"{label} 95% low": low, f"{label} 95% high": high}
    return columns


def as_markdown(known: Mapping[str, Knowledge], settings: KnowledgeTableSettings) -> str:
    """A block per LLM: one row per prompt, one column per attribute."""
    block = settings.probed.block
    captions = next(iter(known.values())).captions
    note = NOTE.format(
        kind=block.captions, captions=captions, dataset=block.dataset, folds=block.folds
    )
    parts = [f"**{TITLE}** (*{settings.study}* study)\n\n{note}"]
    for label, knowledge in known.items():
        parts.append(f"**{label}**\n\n{_block(knowledge, settings.probed)}")
    return "\n".join(parts)


def _block(knowledge: Knowledge, probed: Probed) -> str:
    attributes = probed.block.attributes
    best = {name: knowledge.best(name) for name in attributes}
    lines = [["level", "prompt", *attributes.values()], ["---", "---", *["---:"] * len(attributes)]]
    for facet, about in probed.facets.items():
        line = [about.level, words(facet)]
        for name in attributes:
            text = _text(knowledge.cells[facet, name], is_best=facet in best[name])
            asked = probed.block.asks_for.get(facet) == name
            line.append(text.replace("<br>", "\\*<br>") if asked else text)
        lines.append(line)
    majority = [_text(knowledge.majority[name]) for name in attributes]
    return markdown_table([*lines, ["", "*most frequent class*", *majority]])


def _text(cell: Cell, *, is_best: bool = False) -> str:
    value = f"**{cell.value:.1f}**" if is_best else f"{cell.value:.1f}"
    return f"{value}<br><sub>{cell.low:.1f}-{cell.high:.1f}</sub>"
