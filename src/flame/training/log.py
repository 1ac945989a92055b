"""The log of a training run, `log.jsonl`: a line for some of its steps and for each validation.

A step has `step`, `epoch`, `loss`, `tau`, `lr`, `grad_norm` and the rates of `Trainer`; a
validation has `step`, `epoch`, `seconds` and `validation`: benchmark -> metric -> percent.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from flame.runtime.resumable import write_atomic
from flame.training import processes
from flame.training.processes import Place

NAME = "log.jsonl"


class Log:
    """The log of a run, without what an interrupted run wrote after its checkpoint.

    Only the first process writes it.

    Attributes:
        validated: steps with a validation, the same in all processes.
    """

    def __init__(self, folder: Path, step: int, place: Place) -> None:
        """Open the log.

        Args:
            folder: of the run.
            step: of the checkpoint; later lines are dropped.
            place: of this process.
        """
        path = folder / NAME if place.rank == 0 else Path(os.devnull)
        old = path.read_text().splitlines(keepends=True) if path.is_file() else []
        parsed = [(line, json.loads(line)) for line in old if line.endswith("\n")]
        kept = [(line, values) for line, values in parsed if values["step"] <= step]
        if place.rank == 0:
            write_atomic(path, "".join(line for line, _ in kept).encode())
        self._file = path.open("a", buffering=1)
        own = {values["step"] for _, values in kept if "validation" in values}
        self.validated: set[int] = processes.from_first(own)

    def __enter__(self) -> "Log":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._file.close()

    def write(self, line: Mapping[str, Any]) -> None:
        """Append a line."""
        self._file.write(json.dumps(line) + "\n")
        if "validation" in line:
            self.validated.add(line["step"])
