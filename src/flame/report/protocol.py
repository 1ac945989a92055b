"""The study's recipe and prompts, value by value beside those of the paper's appendix."""

from collections.abc import Mapping, Sequence
from typing import Any

from flame.runtime.errors import known
from flame.study.schema.llms import Facet, Prompt
from flame.study.schema.runs import Augment, Recipe

# What `flame.training.optim` does whatever the recipe says.
FIXED = {"optimizer": "AdamW", "schedule": "cosine decay"}
DIFFERS = "differs"
Record = dict[str, str | None]


def recipe_records(recipe: Recipe, printed: Sequence[Record]) -> list[Record]:
    """Lines of Table A1 or A2, and after them every key of a recipe that they do not have.

    Args:
        recipe: of the study.
        printed: lines of the table, with config, key and value.
    """
    values: dict[str, Any] = {**FIXED, **recipe.model_dump(exclude={"augment"})}
    values |= {f"augment.{key}": value for key, value in recipe.augment.model_dump().items()}
    lines = {str(line["key"]): line for line in printed}
    for key in lines:
        if key not in values:
            raise ValueError(f"no key of a recipe {known(key, values)}")
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
    """Prompts of Appendix B, and after them every facet that only the study has.

    Args:
        facets: of the study.
        prompts: of the study; one that embeds captions of kind `long`, one of kind `short`.
        printed: number, facet, level, text, long, short and template of each prompt.
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


def _study_prompt(name: str, facets: Mapping[str, Facet], prompts: Mapping[str, Prompt]) -> Record:
    """Level, text, defaults and template of a facet; nothing if the study does not have it."""
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
    """A value as the paper's tables print such: `4,096`, `5e-4`, `0.9, 0.98`."""
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
    """Numbers of a text, so that two ways to print one are the same."""
    parts: list[float | str] = []
    for part in text.split(", "):
        try:
            parts.append(float(part.replace(",", "")))
        except ValueError:
            parts.append(part)
    return parts
