"""What every engine of captioning is asked, and what it answers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from PIL import Image

from flame.data import hub_models
from flame.study.schema.data import Sampling


@dataclass(frozen=True, eq=False)
class Request:
    """One caption to write.

    Args:
        image: upright RGB.
        prompt: question to the model.
        sampling: sampling parameters.
        max_tokens: tokens after which the caption is cut.
        seed: of the sampling; None: the engine draws from its own generator.
    """

    image: Image.Image
    prompt: str
    sampling: Sampling
    max_tokens: int
    seed: int | None


@dataclass(frozen=True)
class Reply:
    """A caption as generated.

    Args:
        text: the caption; for an error, the error message.
        finish: `stop` if the model ended it, `length` if it was cut at `max_tokens`.
    """

    text: str
    finish: Literal["stop", "length", "error"]


class Engine(Protocol):
    """A multimodal LLM, loaded and ready.

    Attributes:
        batch: images that one call of `describe` should ask about.
        calls: concurrent calls that keep the engine busy.
    """

    batch: int
    calls: int

    async def describe(self, requests: Sequence[Request]) -> list[Reply]:
        """One reply per request, in order; requests about one image should be adjacent.

        Raises:
            ValueError: the engine cannot answer any request.
        """
        ...

    def close(self) -> None:
        """End requests that are under way, and free the engine."""
        ...


def model_folder(name: str, revision: str | None, *, with_code: bool = False) -> Path:
    """Folder of a model: one of this name, or verified files of the hub at a revision."""
    folder = Path(name)
    return folder if folder.is_dir() else hub_models.cached(name, revision, with_code=with_code)


def chat(request: Request, image: dict[str, Any]) -> list[dict[str, Any]]:
    """A conversation of one turn: the image, then the question."""
    return [{"role": "user", "content": [image, {"type": "text", "text": request.prompt}]}]


def bisected(
    answer: Callable[[Sequence[Request]], list[Reply]], requests: Sequence[Request]
) -> list[Reply]:
    """Replies to a batch; halves of a refused batch are sent until the refused request is alone.

    An image that the preprocessing of a model rejects then costs no other image its caption, and
    a batch of n log2(n) halvings: at each, one half is answered and the other is refused, which
    happens before anything is generated.
    """
    try:
        return answer(requests)
    except ValueError as error:
        if len(requests) == 1:
            return [Reply(str(error), "error")]
        half = len(requests) // 2
        return [*bisected(answer, requests[:half]), *bisected(answer, requests[half:])]
