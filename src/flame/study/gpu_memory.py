"""Memory of a GPU that a job needs, by formula; `flame.study.memory` has that of the node."""

from collections.abc import Mapping
from typing import Any

from flame.study.memory import FLOAT, HALF, PARAMETERS_OF_MLLM, WORDS, Bytes, Machine, layer_bytes
from flame.study.schema.data import PublishedCaptions, ServerCaptioner
from flame.study.shapes import Shape, assumed_shape, tower_shape
from flame.study.study import Study

RESERVED = 1.1  # memory that torch reserves, relative to what it has allocated


def embedding(shape: Shape, tokens: int) -> Bytes:
    """An LLM in bfloat16, and what a layer of it computes for a batch of some tokens."""
    return {"LLM": HALF * shape.parameters, "layer": layer_bytes(shape, tokens, HALF)}


def vocabulary(shape: Shape) -> Bytes:
    """An LLM in bfloat16, with its head and scores of all tokens in float32."""
    head = FLOAT * shape.vocabulary * (shape.width + 4 * WORDS)
    return {"LLM": HALF * shape.parameters, "head": head}


def total(parts: Bytes) -> float:
    """Bytes that torch reserves for some allocations."""
    return RESERVED * sum(parts.values())


def of_job(study: Study, rule: str, wildcards: Mapping[str, Any], machine: Machine) -> Bytes:
    """What a job holds in the memory of a GPU at its peak; nothing where it needs none.

    A training chooses its micro-batches by the memory that there is: only its state is told.
    """
    match rule:
        case "embed":
            return embedding(assumed_shape(study, wildcards["llm"]), machine.tokens)
        case "fewshot":
            return vocabulary(assumed_shape(study, study.flame_run(wildcards["run"]).llm))
        case "overhead" if study.overhead is not None:
            llm = study.flame_run(study.overhead.run).llm
            return embedding(assumed_shape(study, llm), machine.tokens)
        case "train":
            return {"state": 4 * FLOAT * tower_shape(study, wildcards["run"]).parameters}
        case "evaluate":
            return {"tower": FLOAT * tower_shape(study, wildcards["run"]).parameters}
        case "caption":
            who = study.captioners[wildcards["captioner"]]
            if not isinstance(who, PublishedCaptions | ServerCaptioner):
                return {"MLLM": HALF * PARAMETERS_OF_MLLM}
    return {}
