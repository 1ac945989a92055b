"""Data sets and captioners."""

from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from flame.data import datasets as dataset_modules
from flame.runtime.errors import known
from flame.study.schema.section import Section


class Dataset(Section):
    """Images with captions, read by the module `flame.data.datasets.<source>`."""

    source: str = Field(description="module under src/flame/data/datasets")
    options: dict[str, Any] = Field(default={}, description="options of that module")
    bundle: str | None = Field(
        default=None,
        description="sets of a bundle share one embed and one evaluate job, probes with the other "
        "training sets of theirs; null: its own name",
    )
    parts: dict[str, PositiveInt] = Field(
        default={}, description="caption kind -> number of embedding jobs; 1 if absent"
    )
    captioner: str | None = Field(
        default=None,
        description="captioner of its long and short captions; null: the data set has them",
    )
    captioner_parts: PositiveInt = Field(default=1, description="number of captioning jobs")

    @model_validator(mode="after")
    def _check_options(self) -> "Dataset":
        module = dataset_modules.module(self.source)
        unknown = [key for key in self.options if key not in module.Options.model_fields]
        if unknown:
            raise ValueError(f"unknown option {known(unknown[0], module.Options.model_fields)}")
        module.Options.model_validate(self.options)
        return self

    @property
    def drawn(self) -> bool:
        """Whether a program draws it."""
        return bool(dataset_modules.module(self.source).CARD.drawn)

    @property
    def images(self) -> int:
        """Expected number of images."""
        module = dataset_modules.module(self.source)
        return module.size(module.Options.model_validate(self.options))

    @property
    def drawings(self) -> int:
        """Images of each sample; more than one only where the data set is drawn here."""
        return self.options.get("drawings", 1)


class Sampling(Section):
    """Sampling parameters of a captioner."""

    temperature: NonNegativeFloat = Field(default=0.7, description="0: greedy decoding")
    top_p: PositiveFloat = 0.8
    top_k: PositiveInt | None = Field(default=100, description="null: no limit")
    repetition_penalty: PositiveFloat = 1.05


class _Captioner(Section):
    prompts: dict[str, str] = Field(
        min_length=1, description="caption kind -> instruction for the model"
    )
    max_tokens: dict[str, PositiveInt] = Field(
        description="caption kind -> token limit; a caption that reaches it counts as bad"
    )
    sampling: Sampling = Sampling()
    retry: Sampling = Field(
        default=Sampling(temperature=1.0, top_p=0.95, repetition_penalty=1.2),
        description="sampling of the single retry after a bad caption",
    )
    seed: NonNegativeInt = 0
    max_alike: PositiveInt = Field(
        default=100, description="number of images that may share a caption before it counts as bad"
    )

    @model_validator(mode="after")
    def _same_kinds(self) -> "_Captioner":
        if set(self.prompts) != set(self.max_tokens):
            raise ValueError(
                f"prompts and max_tokens have different kinds: {sorted(self.prompts)} and "
                f"{sorted(self.max_tokens)}"
            )
        return self


class VllmCaptioner(_Captioner):
    """An MLLM run by vLLM's offline engine, in its own conda environment."""

    engine: Literal["vllm"]
    id: str
    revision: str = Field(description="commit of the checkpoint and its code")
    trust_remote_code: bool = Field(
        default=False, description="run code from the checkpoint, at that revision"
    )
    template: str | None = Field(
        default=None,
        description="prompt with {question}, for a model without a chat template",
    )
    stop: tuple[str, ...] = Field(default=(), description="tokens that end a caption")
    seed_requests: bool = Field(
        default=False,
        description="a seed per request, which slows vLLM's sampling; false: one per part",
    )
    options: dict[str, Any] = Field(default={}, description="more arguments of vLLM's engine")


class ServerCaptioner(_Captioner):
    """An MLLM behind an OpenAI-compatible server, such as `vllm serve` or llama.cpp."""

    engine: Literal["server"]
    url: str = Field(description="base URL, including /v1")
    model: str
    token: str | None = Field(
        default=None,
        description="environment variable that holds the token; null: no token is sent",
    )
    concurrency: PositiveInt = Field(default=32, description="concurrent requests")
    timeout: PositiveFloat = Field(default=120.0, description="seconds per caption")
    attempts: PositiveInt = Field(default=5, description="attempts per request if the server fails")
    seed_requests: bool = Field(
        default=True,
        description="send a seed with each request, which slows the sampling of a vLLM server",
    )

    @field_validator("url")
    @classmethod
    def _holds_no_secret(cls, url: str) -> str:
        if "@" in url or "?" in url:
            raise ValueError(
                "must not contain a login or a query, because it is stored with the captions; "
                "name the environment variable that holds the token as `token`"
            )
        return url


class TransformersCaptioner(_Captioner):
    """An MLLM supported by transformers, such as MiniCPM-V 4.6 or LLaVA."""

    engine: Literal["transformers"]
    id: str = Field(description="hub id, or a folder")
    revision: str | None = Field(default=None, description="commit; null only for a folder")
    batch_size: PositiveInt = 8

    @property
    def seed_requests(self) -> bool:
        """Whether each request has a seed of its own, which costs nothing here."""
        return True


class PublishedCaptions(Section):
    """Published captions, joined to the images by key."""

    engine: Literal["published"]
    id: str = Field(description="data set on the hub")
    revision: str
    files: dict[str, str] = Field(
        min_length=1, description="caption kind -> file in it, a JSON list or JSON Lines"
    )
    key: str = Field(default="__key__", description="field with the key of the image")
    text: str = Field(default="minicpm", description="field with the caption")


Captioner = Annotated[
    VllmCaptioner | ServerCaptioner | TransformersCaptioner | PublishedCaptions,
    Field(discriminator="engine"),
]
