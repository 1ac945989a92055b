"""The facet-decoupled attention mask over real tokens (Figure 3).

Shapes: P tokens of the shared prefix, L tokens of prefix and facets together.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from pydantic import Field

from flame.report.figures import GREY, PALETTE, canvas
from flame.runtime.errors import known
from flame.study import files
from flame.study.schema.figures import FigureBlock

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from flame.study.settings import FigureSettings
    from flame.study.study import Study

BROKEN = "\ufffd"  # that is how a tokenizer shows bytes that are no character yet
SPACE = "\u2423"
INCHES, WIDEST = 0.17, 9.0  # per token; of all tokens, so that a figure stays below 2,400 pixels
NOTE = (
    "One row and one column per token; a word that the tokenizer splits is written once. The token"
    " of a row attends to the coloured columns. The hidden states of bold tokens are the"
    " embeddings. Below: position ids, which restart after the prefix in every facet."
)


class Keys(FigureBlock):
    """The facet-decoupled mask over real tokens (Figure 3)."""

    kind: Literal["mask"]
    llm: str
    prompt: str
    facets: tuple[str, ...] = Field(min_length=1)
    caption: str

    def mistakes(self, study: "Study") -> Iterator[tuple[str, str]]:
        """Unknown LLM, prompt or facets."""
        if self.llm not in study.llms:
            yield "llm", f"unknown llm {known(self.llm, study.llms)}"
        if self.prompt not in study.prompts:
            yield "prompt", f"unknown prompt {known(self.prompt, study.prompts)}"
        for facet in self.facets:
            if facet not in study.facets:
                yield "facets", f"unknown facet {known(facet, study.facets)}"

    def inputs(self, study: "Study", results: Iterable[str]) -> list[str]:
        """Folder of the LLM, for its tokenizer."""
        return [files.llm(self.llm)]

    def resolved(self, study: "Study") -> dict[str, Any]:
        """Prefix and facets of the prompt."""
        prompt = study.prompts[self.prompt]
        return {"prefix": prompt.prefix, "facets": study.suffixes(prompt, self.facets)}


class Tokens(NamedTuple):
    """Tokens of a caption, as laid out for one pass."""

    prefix: list[int]
    facets: list[list[int]]


def draw(inputs: Sequence[Path], settings: "FigureSettings") -> "Figure":
    """The mask, with tokens on both axes.

    Args:
        inputs: folder of the LLM; only its tokenizer is read.
        settings: the figure, with its prefix and facets.
    """
    from matplotlib.patches import Patch
    from transformers import AutoTokenizer

    chosen = settings.figure
    assert isinstance(chosen, Keys)
    assert settings.prefix is not None
    tokenizer = AutoTokenizer.from_pretrained(inputs[0])
    before, after = settings.prefix
    suffixes = list(settings.facets.values())
    tokens = tokenize(tokenizer, before + chosen.caption + after, after, suffixes)
    side = min(INCHES * len(positions(tokens)), WIDEST)
    figure = canvas(side + 2.2, side + 2.9, settings, NOTE)
    axes = figure.subplots()
    _cells(axes, tokens)
    parts = [tokens.prefix, *tokens.facets]
    _label(axes, tokens, [word for part in parts for word in words(tokenizer, part)], side)
    names = ["shared prefix", *(name.replace("_", " ") for name in settings.facets)]
    handles = [Patch(color=c, label=n) for c, n in zip(_colours(tokens), names, strict=True)]
    axes.legend(
        handles=handles,
        loc="upper right",
        fontsize="large",
        facecolor="white",
        edgecolor="none",
        framealpha=1,
    )
    return figure


def words(tokenizer: Any, tokens: Sequence[int]) -> list[tuple[str, int]]:
    """Words that some tokens spell, each with its number of tokens.

    A token goes on with the word before it if it begins with a letter right after one, or if the
    two share the bytes of a character. Without this, a byte-level tokenizer shows neither words nor
    characters.

    Args:
        tokenizer: of the LLM.
        tokens: of a text.
    """
    found: list[tuple[str, int]] = []
    start = 0
    for end in range(1, len(tokens) + 1):
        text = tokenizer.decode(tokens[start:end])
        following = tokenizer.decode(tokens[start : end + 1])
        begun = following.startswith(text) and following[len(text) : len(text) + 1]
        within = begun and (begun.isalnum() or begun == BROKEN) and text[-1:].isalnum()
        if end < len(tokens) and (within or text.endswith(BROKEN)):
            continue
        found.append((text.strip() or SPACE, end - start))
        start = end
    return found


def tokenize(tokenizer: Any, prefix: str, after: str, suffixes: Sequence[str]) -> Tokens:
    """Tokens of a prefix and of the facets' suffixes, laid out as `FrozenLLM` does it.

    Args:
        tokenizer: of the LLM.
        prefix: text of the whole prefix, caption included.
        after: end of the prefix, between caption and suffix.
        suffixes: the facet endings.
    """

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids

    bos = [token for token in tokenizer("").input_ids if token == tokenizer.bos_token_id]
    # A suffix is cut out of a longer text, because some tokenizers add a leading space.
    return Tokens(bos + ids(prefix), [ids(after + s)[len(ids(after)) :] for s in suffixes])


def blocks(tokens: Tokens) -> np.ndarray:
    """(L, L) int: -1 if masked, 0 for a key in the prefix, k for a key in facet k."""
    from flame.embedding.attention import facet_mask

    lengths = [len(facet) for facet in tokens.facets]
    owner = np.repeat(range(len(lengths) + 1), [len(tokens.prefix), *lengths])
    return np.where(facet_mask(len(tokens.prefix), lengths).numpy(), owner, -1)


def positions(tokens: Tokens) -> list[int]:
    """(L,) position ids: every facet continues from the prefix."""
    start = len(tokens.prefix)
    return [*range(start), *chain(*(range(start, start + len(f)) for f in tokens.facets))]


def _colours(tokens: Tokens) -> list[Any]:
    facets = [PALETTE[i % 7] for i in range(len(tokens.facets))]
    return ["0.6", *facets]


def _cells(axes: "Axes", tokens: Tokens) -> None:
    from matplotlib.colors import ListedColormap

    matrix = blocks(tokens)
    colours = ListedColormap(["white", *_colours(tokens)])
    axes.imshow(matrix, cmap=colours, vmin=-1, vmax=len(tokens.facets), interpolation="none")
    edges = np.cumsum([len(tokens.prefix), *map(len, tokens.facets)])
    for edge in edges[:-1] - 0.5:
        axes.axhline(edge, color=GREY, linewidth=0.8)
        axes.axvline(edge, color=GREY, linewidth=0.8)
    inner = np.arange(len(matrix) + 1) - 0.5
    axes.set_xticks(inner, minor=True)
    axes.set_yticks(inner, minor=True)
    axes.grid(which="minor", color="white", linewidth=0.5)
    axes.tick_params(which="both", length=0)


def _label(axes: "Axes", tokens: Tokens, spelled: Sequence[tuple[str, int]], side: float) -> None:
    """Words on both axes, each in the middle of its tokens, and position ids.

    Args:
        axes: with the mask.
        tokens: of the mask.
        spelled: words with their numbers of tokens.
        side: of the mask, in inches.
    """
    lengths = [length for _, length in spelled]
    ends = np.cumsum(lengths)
    middles = ends - (np.array(lengths) + 1) / 2
    texts = [text for text, _ in spelled]
    size = min(10, 0.85 * 72 * side / ends[-1])
    text: Any = {"fontsize": size, "parse_math": False}
    axes.set_yticks(middles, texts, **text)
    ids = positions(tokens)
    axes.set_xticks(range(len(ids)), map(str, ids), rotation=90, fontsize=0.9 * size)
    axes.set_xlabel("position id of the token")
    top = axes.secondary_xaxis("top")
    top.set_xticks(middles, texts, rotation=90, **text)
    top.tick_params(length=0)
    top.spines["top"].set_visible(False)
    answers = np.cumsum([len(facet) for facet in tokens.facets]) + len(tokens.prefix)
    for answer in answers:
        axes.get_yticklabels()[int(np.searchsorted(ends, answer))].set_fontweight("bold")
