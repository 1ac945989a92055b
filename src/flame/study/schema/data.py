"""Data sets, and who writes their captions."""

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
    """Images with captions, brought into one form by `flame.datasets.<source>`."""

    source: str = Field(description="module under src/flame/datasets that reads it")
    options: dict[str, Any] = Field(default={}, description="options of that module")
    bundle: str | None = Field(
        default=None, description="sets of one bundle share a job in embed and in evaluate"
    )
    parts: dict[str, PositiveInt] = Field(
        default={}, description="caption kind -> embedding jobs it is cut into; 1 where absent"
    )
    captioner: str | None = Field(
        default=None, description="who writes its long and short captions; null: the set has them"
    )
    captioner_parts: PositiveInt = Field(
        default=1, description="captioning jobs that its images are cut into"
    )

    @model_validator(mode="after")
    def _check_options(self) -> "Dataset":
        module = dataset_modules.module(self.source)
        unknown = [key for key in self.options if key not in module.Options.model_fields]
        if unknown:
            raise ValueError(f"unknown option {known(unknown[0], module.Options.model_fields)}")
        module.Options.model_validate(self.options)
        return self

    @property
    def images(self) -> int:
        """Number of images that are to be expected."""
        module = dataset_modules.module(self.source)
        return module.size(module.Options.model_validate(self.options))


class Sampling(Section):
    """How a captioner draws its words."""

    temperature: NonNegativeFloat = Field(default=0.7, description="0: always the likeliest word")
    top_p: PositiveFloat = 0.8
    top_k: PositiveInt | None = Field(default=100, description="null: all")
    repetition_penalty: PositiveFloat = 1.05


class _Captioner(Section):
    prompts: dict[str, str] = Field(
        min_length=1, description="caption kind -> what the model is asked"
    )
    max_tokens: dict[str, PositiveInt] = Field(
        description="caption kind -> tokens after which a caption is cut, and counts as bad"
    )
    sampling: Sampling = Sampling()
    retry: Sampling = Field(
        default=Sampling(temperature=1.0, top_p=0.95, repetition_penalty=1.2),
        description="of the one other try where a caption is bad",
    )
    seed: NonNegativeInt = 0
    max_alike: PositiveInt = Field(
        default=100, description="images that may have one caption before it counts as bad"
    )

    @model_validator(mode="after")
    def _same_kinds(self) -> "_Captioner":
        if set(self.prompts) != set(self.max_tokens):
            raise ValueError(
                f"prompts and max_tokens: not the same kinds, {sorted(self.prompts)} and "
                f"{sorted(self.max_tokens)}"
            )
        return self


class VllmCaptioner(_Captioner):
    """An MLLM in vLLM's offline engine, in a conda environment of its own."""

    engine: Literal["vllm"]
    id: str
    revision: str = Field(description="commit of the checkpoint, and of its code")
    trust_remote_code: bool = Field(
        default=False, description="run the code that the checkpoint brings, at that revision"
    )
    template: str | None = Field(
        default=None,
        description="prompt with {question} in it, for a model without a chat template of its own",
    )
    stop: tuple[str, ...] = Field(default=(), description="tokens at which a caption ends")
    options: dict[str, Any] = Field(default={}, description="further arguments of vllm.LLM")


class ServerCaptioner(_Captioner):
    """An MLLM behind any OpenAI-compatible server: `vllm serve`, llama.cpp and others."""

    engine: Literal["server"]
    url: str = Field(description="its base, up to and with /v1")
    model: str
    token: str | None = Field(
        default=None, description="environment variable with the token; null: none is sent"
    )
    concurrency: PositiveInt = Field(default=32, description="requests under way at a time")
    timeout: PositiveFloat = Field(default=120.0, description="seconds for one caption")
    attempts: PositiveInt = Field(default=5, description="at one request, where the server fails")

    @field_validator("url")
    @classmethod
    def _holds_no_secret(cls, url: str) -> str:
        if "@" in url or "?" in url:
            raise ValueError(
                "may hold no login and no query, as it is written down with the captions; "
                "name the environment variable that has the token as `token`"
            )
        return url


class TransformersCaptioner(_Captioner):
    """An MLLM that transformers knows, such as MiniCPM-V 4.6 or LLaVA."""

    engine: Literal["transformers"]
    id: str = Field(description="hub id, or a folder")
    revision: str | None = Field(default=None, description="commit; null only for a folder")
    batch_size: PositiveInt = 8


class PublishedCaptions(Section):
    """Captions that somebody published, joined to the images by key."""

    engine: Literal["published"]
    id: str = Field(description="data set of the hub")
    revision: str
    files: dict[str, str] = Field(
        min_length=1, description="caption kind -> JSON list or lines of objects in it"
    )
    key: str = Field(default="__key__", description="field with the key of the image")
    text: str = Field(default="minicpm", description="field with the caption")


Captioner = Annotated[
    VllmCaptioner | ServerCaptioner | TransformersCaptioner | PublishedCaptions,
    Field(discriminator="engine"),
]
