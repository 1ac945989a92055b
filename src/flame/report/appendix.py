"""Recipe and prompts of the study, compared value by value with the paper's appendix."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import polars as pl

from flame.report.markdown import bold, markdown_table
from flame.runtime.errors import known
from flame.study.schema.llms import Facet, Prompt
from flame.study.schema.runs import Augment, Recipe
from flame.study.settings import AppendixSettings

# Fixed in `flame.training.optim`; no key of a recipe changes them.
FIXED = {"optimizer": "AdamW", "schedule": "cosine decay"}
DIFFERS = "differs"
Record = dict[str, str | None]


def records_of(settings: AppendixSettings, printed: Sequence[Record]) -> list[Record]:
    """Values of the paper and of the study, and whether they differ.

    Args:
        settings: the recipe, or the facets and prompts.
        printed: rows of the paper's table.
    """
    if settings.recipe is not None:
        return recipe_records(settings.recipe, printed)
    return prompt_records(settings.facets, settings.prompts, printed)


def as_csv(records: Sequence[Record]) -> str:
    """CSV with one line per record."""
    return pl.DataFrame(records, infer_schema_length=None).write_csv()


def as_markdown(records: Sequence[Record], settings: AppendixSettings) -> str:
    """Markdown of the records, under the title of the table."""
    body = _prompts_body if settings.recipe is None else _recipe_body
    return f"**{settings.table.title}**\n\n{body(records, settings)}"


def recipe_records(recipe: Recipe, printed: Sequence[Record]) -> list[Record]:
    """Records of Table A1 or A2, followed by the recipe keys that the table does not have.

    Args:
        recipe: recipe of the study.
        printed: rows of the table, with config, key and value.
    """
    values: dict[str, Any] = {**FIXED, **recipe.model_dump(exclude={"augment"})}
    values |= {f"augment.{key}": value for key, value in recipe.augment.model_dump().items()}
    lines = {str(line["key"]): line for line in printed}
    for key in lines:
        if key not in values:
            raise ValueError(f"no recipe key {known(key, values)}")
    records = []
    for key in [*lines, *(key for key in values if key not in lines)]:
        ours, paper = _text(values[key]), lines[key]["value"] if key in lines else None
        records.append(
            {
                "config": lines[key]["config"] if key in lines else None,
                "key": key,
                "paper": paper,
                "study": ours,
                "differs": None if paper is None else _differs(_parsed(paper) != _parsed(ours)),
                "meaning": None if key in lines else _meaning(key),
            }
        )
    return records


def prompt_records(
    facets: Mapping[str, Facet], prompts: Mapping[str, Prompt], printed: Sequence[Record]
) -> list[Record]:
    """Records of the prompts in Appendix B, followed by the facets that only the study has.

    Args:
        facets: facets of the study.
        prompts: prompts of the study, one for captions of kind `long`, one for kind `short`.
        printed: number, facet, level, text, long, short and template of each prompt in the paper.
    """
    lines = {str(line["facet"]): line for line in printed}
    records = []
    for name in dict.fromkeys([*lines, *facets]):
        paper = lines.get(name, {})
        ours = _study_prompt(name, facets, prompts)
        record: Record = {"number": paper.get("number"), "facet": name}
        for key in ("level", "text", "long", "short", "template"):
            record |= {f"{key} paper": paper.get(key), f"{key} study": ours.get(key)}
        same = all(paper.get(key) == value for key, value in ours.items())
        missing = "not in the paper" if not paper else None if ours else "not in this study"
        records.append({**record, "differs": missing or _differs(not same)})
    return records


def _recipe_body(records: Iterable[Record], settings: AppendixSettings) -> str:
    lines = [["config", "key", "paper", "this study", "note"]]
    lines.append(["---", "---", "---:", "---:", "---"])
    others = [["key", "this study", "meaning"], ["---", "---:", "---"]]
    for record in records:
        cells = {key: value or "" for key, value in record.items()}
        key, mark = f"`{cells['key']}`", bold(record["differs"])
        if not record["config"]:
            others.append([key, cells["study"], cells["meaning"]])
        else:
            key = "" if record["key"] in FIXED else key
            lines.append([cells["config"], key, cells["paper"], cells["study"], mark])
    towers = ", ".join(settings.backbones) or "none"
    return (
        f"Recipe *{settings.table.recipe}* of the *{settings.study}* study. Visual towers trained "
        f"with it: {towers}.\n\n{markdown_table(lines)}\n"
        f"Keys of the recipe that are not in the paper's table:\n\n{markdown_table(others)}"
    )


def _prompts_body(records: Sequence[Record], settings: AppendixSettings) -> str:
    lines = [["#", "facet", "level", "text", "long", "short", "note"]]
    lines.append(["---:", *["---"] * 6])
    for record in records:
        study, paper = (_prompt_cells(record, side) for side in ("study", "paper"))
        number, facet = record["number"] or "", f"`{record['facet']}`"
        lines.append([number, facet, *(study if any(study) else paper), bold(record["differs"])])
        if all(any(side) for side in (study, paper)) and study != paper:
            lines.append(["", "<sub>paper</sub>", *(f"<sub>{cell}</sub>" for cell in paper), ""])
    return (
        f"Facets of the *{settings.study}* study. Where one differs from the paper's, the paper's "
        "is shown below it. *long*, *short*: whether it is used by default for long and for short "
        f"captions.\n\n{markdown_table(lines)}\n"
        f"Templates of the prompts:\n\n{_template_table(records, settings)}"
    )


def _template_table(records: Iterable[Record], settings: AppendixSettings) -> str:
    paper = dict.fromkeys(r["template paper"] for r in records if r["template paper"])
    lines = [["prompt", "captions", "template", "note"], ["---", "---", "---", "---"]]
    lines += [["paper", "", f"`{template}`", ""] for template in paper]
    for name, prompt in settings.prompts.items():
        mark = bold(None if prompt.template in paper else DIFFERS)
        lines.append([f"`{name}`", ", ".join(prompt.captions), f"`{prompt.template}`", mark])
    return markdown_table(lines)


def _prompt_cells(record: Record, side: str) -> list[str]:
    return [record[f"{key} {side}"] or "" for key in ("level", "text", "long", "short")]


def _study_prompt(name: str, facets: Mapping[str, Facet], prompts: Mapping[str, Prompt]) -> Record:
    """Level, text, defaults and template of a facet; empty if the study does not have it."""
    if name not in facets:
        return {}
    by_kind = {kind: prompt for prompt in prompts.values() for kind in prompt.captions}
    defaults = {
        kind: "yes" if kind in by_kind and name in by_kind[kind].default else "no"
        for kind in ("long", "short")
    }
    templates = dict.fromkeys(p.template for p in prompts.values() if name in p.facets)
    facet = facets[name]
    return {
        "level": facet.level,
        "text": facet.text,
        **defaults,
        "template": " / ".join(templates) or None,
    }


def _differs(different: bool) -> str | None:
    return DIFFERS if different else None


def _meaning(key: str) -> str | None:
    if key.startswith("augment."):
        return Augment.model_fields[key.removeprefix("augment.")].description
    return Recipe.model_fields[key].description


def _text(value: Any) -> str:
    """A value as the paper's tables print it: `4,096`, `5e-4`, `0.9, 0.98`."""
    if value is None:
        return "none"
    if isinstance(value, tuple):
        return ", ".join(map(_text, value))
    if isinstance(value, float) and 0 < abs(value) < 0.01:
        mantissa, exponent = f"{value:e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _parsed(text: str) -> list[float | str]:
    """Numbers and words of a text, so that two notations of a number compare equal."""
    parts: list[float | str] = []
    for part in text.split(", "):
        try:
            parts.append(float(part.replace(",", "")))
        except ValueError:
            parts.append(part)
    return parts
