"""Memory of a GPU that a job needs, by formula; `flame.study.memory` has that of the node."""

from collections.abc import Mapping
from typing import Any

from flame.study.memory import CHUNK, FLOAT, HALF, PARAMETERS_OF_MLLM, Bytes, Machine, layer_bytes
from flame.study.schema.data import PublishedCaptions, ServerCaptioner
from flame.study.shapes import assumed_shape, tower_shape
from flame.study.study import Study

RESERVED = 1.1  # memory that torch reserves, relative to what it has allocated


def of_job(study: Study, rule: str, wildcards: Mapping[str, Any], machine: Machine) -> Bytes:
    """What a job holds in the memory of a GPU at its peak; nothing where it needs none.

    A training chooses its micro-batches by the memory that there is: only its state is told.
    """
    match rule:
        case "embed":
            shape = assumed_shape(study, wildcards["llm"])
            layer = layer_bytes(shape, machine.tokens, HALF)
            return {"LLM": HALF * shape.parameters, "layer": layer}
        case "fewshot":
            shape = assumed_shape(study, study.flame_run(wildcards["run"]).llm)
            head = FLOAT * shape.vocabulary * (shape.width + 2 * CHUNK)
            return {"LLM": HALF * shape.parameters, "head": head}
        case "overhead" if study.overhead is not None:
            shape = assumed_shape(study, study.flame_run(study.overhead.run).llm)
            return {
                "LLM": HALF * shape.parameters,
                "layer": layer_bytes(shape, machine.tokens, HALF),
            }
        case "train":
            return {"state": 4 * FLOAT * tower_shape(study, wildcards["run"]).parameters}
        case "evaluate":
            return {"tower": FLOAT * tower_shape(study, wildcards["run"]).parameters}
        case "caption":
            who = study.captioners[wildcards["captioner"]]
            if not isinstance(who, PublishedCaptions | ServerCaptioner):
                return {"MLLM": HALF * PARAMETERS_OF_MLLM}
    return {}
