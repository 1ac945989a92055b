"""FLAME: frozen large language models enable data-efficient language-image pre-training."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flame.evaluation.encoder import Flame

__version__ = "0.1.0"


def load(path: Any, **options: Any) -> "Flame":
    """A trained FLAME from a folder or the hub; see `flame.evaluation.encoder.load`."""
    from flame.evaluation import encoder  # here, because torch takes seconds to import

    return encoder.load(path, **options)
