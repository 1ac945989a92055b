"""A study's YAML merged with what it keeps of the files that it includes, without absent runs."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from flame.runtime.errors import known

INCLUDE, KEEP, ABSENT = "include", "keep", "absent"


def whole(values: Mapping[str, Any], root: Path) -> dict[str, Any]:
    """A study merged with its included files, over which its own values take precedence.

    Blocks are merged key by key, at any depth; lists and single values are replaced.

    Args:
        values: the study, as parsed from YAML; not changed.
        root: folder of the checkout, to which the included files are relative.

    Raises:
        ValueError: a missing file, something to keep that no included file has, or an absent run
            that is defined or that nothing asks for.
    """
    return _without(_joined(values, root))


def _joined(values: Mapping[str, Any], root: Path) -> dict[str, Any]:
    included: dict[str, Any] = {}
    own = dict(values)
    for name in own.pop(INCLUDE, None) or ():
        if not (root / name).is_file():
            raise ValueError(f"{INCLUDE}: no such file: {name!r}")
        below = yaml.safe_load((root / name).read_text())
        included = _merged(included, _joined(below, root))
    kept = _kept(included, own.pop(KEEP, None) or {})
    return _merged(kept, own)


def _kept(included: Mapping[str, Any], keep: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Included blocks; of sections that `keep` names, only the entries that it lists."""
    kept = dict(included)
    for section, names in keep.items():
        if not isinstance(included.get(section), Mapping):
            raise ValueError(f"{KEEP}: no included section {known(section, included)}")
        for name in names:
            if name not in included[section]:
                raise ValueError(
                    f"{KEEP}.{section}: not included: {known(name, included[section])}"
                )
        kept[section] = {name: included[section][name] for name in names}
    return kept


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merged(merged[key], value) if both else value
    return merged


def _without(values: dict[str, Any]) -> dict[str, Any]:
    """The study without anything that needs an absent run.

    Rows of such a run show only what the paper reports; its claims are untested, with the reason.
    """
    absent = dict(values.pop(ABSENT, None) or {})
    unused = set(absent)

    def lacks(run: Any) -> bool:
        unused.discard(run)
        return run in absent

    for name in absent:
        if name in values.get("runs", {}):
            raise ValueError(f"{ABSENT}: run {name!r} is not absent: the study defines it")
    for table in _blocks(values, "tables"):
        table["rows"] = [
            {k: v for k, v in row.items() if k not in ("run", "gain_over") or not lacks(v)}
            for row in table.get("rows", ())
        ]
    for figure in _blocks(values, "figures"):
        runs = figure.get("runs")
        if isinstance(runs, Mapping):
            kept = {n: run for n, run in runs.items() if not (isinstance(run, str) and lacks(run))}
            figure["runs"] = kept
    for claim in _blocks(values, "claims"):
        reasons = [absent[r] for r in (claim.get("better"), claim.get("worse")) if lacks(r)]
        if reasons:
            for key in ("better", "worse", "measures", "table"):
                claim.pop(key, None)
            claim["untested"] = "; ".join(dict.fromkeys(reasons))
    if unused:
        names = ", ".join(sorted(unused))
        raise ValueError(f"{ABSENT}: no table, figure or claim asks for {names}")
    return values


def _blocks(values: dict[str, Any], key: str) -> Iterator[dict[str, Any]]:
    """Copies of the blocks under a key, put in their place; anything else is left alone."""
    if not isinstance(values.get(key), Mapping):
        return
    values[key] = dict(values[key])
    for name, block in values[key].items():
        if isinstance(block, Mapping):
            values[key][name] = dict(block)
            yield values[key][name]
