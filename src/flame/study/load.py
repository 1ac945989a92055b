"""YAML -> a checked study, or one line for each mistake."""

import csv
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from flame.runtime.errors import known
from flame.study import include
from flame.study.schema.llms import FolderCheckpoint
from flame.study.study import Study

MARKUP = re.compile(r"<(?=/?script|!--)", re.IGNORECASE)


class StudyError(ValueError):
    """A study that cannot be computed; the message has one line per mistake."""


def load(values: Mapping[str, Any], origin: str, root: Path) -> Study:
    """Check the values of a study.

    Args:
        values: the study, as parsed from YAML.
        origin: where they come from, to be named in errors.
        root: folder of the checkout, to which the study's files are relative.

    Raises:
        StudyError: one line per mistake, each with origin, path, value and the known ones.
    """
    try:
        # JSON and back: Snakemake hands over its own mappings, the schema wants plain ones.
        whole = include.whole(json.loads(json.dumps(values)), root)
        study = Study.model_validate(whole)
        lines = [*_missing_files(study, root), *_markup("", whole)]
        lines = lines or list(_missing_numbers(study, root))
    except ValidationError as error:
        lines = [line for item in error.errors() for line in _explain(item)]
    except ValueError as error:
        lines = [str(error)]
    if lines:
        raise StudyError("\n".join(f"{origin}: {line}" for line in lines))
    return study


def load_file(path: Path, root: Path = Path()) -> Study:
    """Read and check one study file."""
    return load(yaml.safe_load(path.read_text()), str(path), root)


def _missing_files(study: Study, root: Path) -> Iterator[str]:
    tables = {f"tables.{name}": table.reported for name, table in study.tables.items()}
    tables |= {f"appendix.{name}": table.reported for name, table in study.appendix.items()}
    for path, reported in tables.items():
        if not (root / reported.file).is_file():
            yield f"{path}.reported.file: no such file: {reported.file!r}"
    for name, llm in study.llms.items():
        checkpoint = llm.checkpoint
        if isinstance(checkpoint, FolderCheckpoint) and not Path(checkpoint.path).is_dir():
            yield f"llms.{name}.checkpoint.path: no such folder: {checkpoint.path!r}"


def _missing_numbers(study: Study, root: Path) -> Iterator[str]:
    """Checks without a number to check against: to be told before hours of evaluation."""
    for name, table in study.tables.items():
        if table.tolerance is None:
            continue
        with (root / table.reported.file).open(newline="") as file:
            printed = list(csv.DictReader(file))
        for i, row in enumerate(table.rows):
            match = {**table.reported.match, **(row.reported or {})}
            own = [p for p in printed if all(p.get(k) == str(v) for k, v in match.items())]
            there = [f"{p['benchmark']} {p['metric']}" for p in own if p["value"]]
            where = f"tables.{name}.rows.{i}.reported: {table.reported.file!r} has no"
            if not own:
                yield f"{where} rows with {match}"
            for column in table.columns if own else ():
                wanted = f"{column.printed.benchmark} {column.printed.metric}"
                if wanted not in there:
                    yield f"{where} number for {known(wanted, there)}"


def _markup(path: str, value: Any) -> Iterator[str]:
    """Texts that would end the script of Snakemake's HTML report in which they stand unescaped."""
    if isinstance(value, Mapping):
        for key, below in value.items():
            yield from _markup(f"{path}.{key}" if path else str(key), below)
    elif isinstance(value, list):
        for place, below in enumerate(value):
            yield from _markup(f"{path}.{place}", below)
    elif isinstance(value, str) and MARKUP.search(value):
        yield f"{path}: {value!r}: a report would run what stands in a script or a comment of HTML"


def _explain(error: Mapping[str, Any]) -> list[str]:
    steps = [str(step) for step in error["loc"]]
    if steps[:1] in (["runs"], ["figures"]) and len(steps) > 2:
        del steps[2]  # which of several kinds of block it is
    path = ".".join(steps)
    if error["type"] == "union_tag_invalid":
        tags = error["ctx"]["expected_tags"].replace("'", "").split(", ")
        return [f"{path}: unknown kind of block {known(error['ctx']['tag'], tags)}"]
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "value_error":
        return [f"{path}: {line}" if path else line for line in message.splitlines()]
    given = "" if error["type"] == "missing" else f", not {error['input']!r}"
    return [f"{path}: {message[0].lower()}{message[1:]}{given}"]
