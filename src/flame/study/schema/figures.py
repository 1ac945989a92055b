"""A block under `figures`. Its kind is a module of `flame.report.figures`, with keys of its own.

A kind has its keys and its drawing in one file, so a new kind is one new file. The study finds the
module by name, the only time that it reaches to a package on its right; the module imports what
draws (matplotlib, torch) inside functions.
"""

import importlib
import pkgutil
from collections.abc import Iterable, Iterator, Mapping
from types import ModuleType
from typing import Annotated, Any

from pydantic import BeforeValidator, SerializeAsAny

from flame.runtime.errors import known
from flame.study import files
from flame.study.schema.section import Section
from flame.study.schema.tables import Measure

KINDS = "flame.report.figures"


class FigureBlock(Section):
    """What every kind of figure has; a kind's `Keys` adds its own keys and says what it reads.

    Methods take the `flame.study.study.Study`, which holds the block and so is not imported here.
    """

    title: str
    kind: str

    def uses(self) -> tuple[Iterable[str], Iterable[Measure]]:
        """Runs and measures whose results the figure is drawn from."""
        return (), ()

    def stores(self) -> tuple[tuple[str, str, str], ...]:
        """LLM, data set and caption kind of the embeddings it is drawn from."""
        return ()

    def mistakes(self, study: Any) -> Iterator[tuple[str, str]]:
        """Key and text of every reference to something that the study does not have.

        Runs and benchmarks of `uses` are checked for every kind.
        """
        yield from ()

    def inputs(self, study: Any, results: Iterable[str]) -> list[str]:
        """Files that it is drawn from.

        Args:
            study: has all that the block names.
            results: of what it uses, as paths without extensions; by default their metrics and
                hits are all that is read.
        """
        return files.with_suffix(results, "json", "parquet")

    def resolved(self, study: Any) -> dict[str, Any]:
        """What else its drawing is given: fields of `FigureSettings` by name."""
        return {}


def kinds() -> list[str]:
    """Names of all kinds."""
    package = importlib.import_module(KINDS)
    return sorted(module.name for module in pkgutil.iter_modules(package.__path__))


def module(kind: str) -> ModuleType:
    """The module of a kind of figure, with `Keys` and `draw`.

    Raises:
        ValueError: there is no such kind.
    """
    if kind not in kinds():
        raise ValueError(f"unknown kind of figure {known(kind, kinds())}")
    return importlib.import_module(f"{KINDS}.{kind}")


def _of_its_kind(block: Any) -> Any:
    if not isinstance(block, Mapping):
        return block
    if "kind" not in block:
        raise ValueError("kind: field required")
    return module(str(block["kind"])).Keys.model_validate(block)


Figure = Annotated[SerializeAsAny[FigureBlock], BeforeValidator(_of_its_kind)]
