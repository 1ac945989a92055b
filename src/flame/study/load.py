"""YAML -> a checked study, or one line per mistake."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from flame.runtime.errors import known
from flame.study import checks, include
from flame.study.study import Study


class StudyError(ValueError):
    """A study that cannot be computed; the message has one line per mistake."""


def load(values: Mapping[str, Any], origin: str, root: Path) -> Study:
    """Check the values of a study.

    Args:
        values: the study, as parsed from YAML.
        origin: where they come from, for errors.
        root: folder of the checkout, to which the study's files are relative.

    Raises:
        StudyError: one line per mistake, each with origin, path, value and the known ones.
    """
    try:
        # JSON and back: Snakemake hands over its own mappings, the schema wants plain ones.
        whole = include.whole(json.loads(json.dumps(values)), root)
        study = Study.model_validate(whole)
    except ValidationError as error:
        lines = [line for item in error.errors() for line in _explain(item)]
    except ValueError as error:
        lines = [str(error)]
    else:
        lines = [f"{path}: {text}" for path, text in checks.mistakes(study)]
        lines = lines or [*checks.missing_files(study, root), *checks.markup("", whole)]
        lines = lines or list(checks.missing_numbers(study, root))
        if not lines:
            return study
    raise StudyError("\n".join(f"{origin}: {line}" for line in lines))


def load_file(path: Path, root: Path = Path()) -> Study:
    """Read and check one study file."""
    return load(yaml.safe_load(path.read_text()), str(path), root)


def _explain(error: Mapping[str, Any]) -> list[str]:
    steps = [str(step) for step in error["loc"]]
    if steps[:1] == ["runs"] and len(steps) > 2:
        del steps[2]  # the method, which pydantic adds to the path
    path = ".".join(steps)
    if error["type"] == "union_tag_invalid":
        tags = error["ctx"]["expected_tags"].replace("'", "").split(", ")
        return [f"{path}: unknown kind of block {known(error['ctx']['tag'], tags)}"]
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "value_error":
        return [f"{path}: {line}" if path else line for line in message.splitlines()]
    given = "" if error["type"] == "missing" else f", not {error['input']!r}"
    return [f"{path}: {message[0].lower()}{message[1:]}{given}"]
