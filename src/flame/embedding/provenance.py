"""Checks that texts are embedded as in training: equal width does not mean the same space."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from flame.embedding.store import Embeddings
from flame.study.schema.llms import LLMOptions

# Attributes of a store that determine the embedding space, whatever the captions.
SPACE = ("llm", "checkpoint", *LLMOptions.model_fields)


def describe(
    stores: Mapping[str, Embeddings], targets: Mapping[str, Sequence[str]]
) -> dict[str, Any]:
    """Provenance of the text embeddings of a training run, as JSON, for `check`.

    Args:
        stores: caption kind -> its embeddings.
        targets: caption kind -> target facets; others are not recorded, so that changing them does
            not change the run.

    Raises:
        ValueError: the kinds were embedded in different ways.
    """
    first = next(iter(targets))
    found: dict[str, Any] = {name: stores[first].attributes.get(name) for name in SPACE}
    for kind in targets:
        for name, value in found.items():
            other = stores[kind].attributes.get(name)
            if other != value:
                raise ValueError(
                    f"embeddings of {first} and of {kind} captions differ in {name}: "
                    f"{json.dumps(value)} and {json.dumps(other)}"
                )
    found["prompts"] = {kind: _prompt(stores[kind], facets) for kind, facets in targets.items()}
    return found


def check(
    trained: Mapping[str, Any], texts: Embeddings, facets: Sequence[str], center: str | None
) -> None:
    """Refuse texts that were embedded in another way than the training texts of a tower.

    The prompt must be that of the same kind in training. For a kind without training texts (class
    names), it must be that of the kind whose mean vectors are subtracted.

    Args:
        trained: as returned by `describe`.
        texts: the embeddings to compare with the tower's features.
        facets: facets in use.
        center: the kind whose mean vectors are subtracted, if any.

    Raises:
        ValueError: an attribute differs; the message holds both values.
    """
    wanted = {name: trained[name] for name in SPACE}
    found = {name: texts.attributes.get(name) for name in SPACE}
    prompts = trained["prompts"]
    like = prompts.get(texts.kind) or prompts.get(center)
    if like:
        common = [facet for facet in facets if facet in like["facets"]]
        wanted |= _flat(like, common)
        found |= _flat(_prompt(texts, common), common)
    for name, value in wanted.items():
        if found[name] != value:
            raise ValueError(
                f"the tower was trained on embeddings with {name} {json.dumps(value)}, those of "
                f"the {texts.kind} captions have {json.dumps(found[name])}"
            )


def _prompt(texts: Embeddings, facets: Sequence[str]) -> dict[str, Any]:
    attributes = texts.attributes
    suffixes = {facet: attributes["facets"].get(facet) for facet in facets}
    return {"prefix": attributes.get("prefix"), "facets": suffixes}


def _flat(prompt: Mapping[str, Any], facets: Sequence[str]) -> dict[str, Any]:
    return {"prefix": prompt["prefix"]} | {f"facet {f}": prompt["facets"].get(f) for f in facets}
