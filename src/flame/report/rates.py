"""Rates that GPU-hours are estimated from: given, measured on some GPU, or assumed."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Annotated

from pydantic import Field, PositiveFloat, ValidationError

from flame.study.schema.section import Section

MEASURED = Path("bench/rates.json")  # of the checkout

Share = Annotated[float, Field(gt=0, le=1)]


class MeasuredRates(Section):
    """What was measured; a rate that was not is left out.

    An MFU is model FLOP per second, over the peak of the GPU in bfloat16: those of one pass for
    embedding, those of three forward passes an image for a training whose batch is not split.
    """

    embed_mfu: Share | None = None
    train_mfu: Share | dict[str, Share] | None = Field(
        default=None, description="of every backbone, or timm name -> that of a backbone"
    )
    slices_per_second: PositiveFloat | None = Field(
        default=None, description="448-pixel slices through a captioner's vision tower"
    )
    prompt_tokens_per_second: PositiveFloat | None = Field(
        default=None, description="prompt tokens that a captioner reads"
    )
    caption_tokens_per_second: PositiveFloat | None = Field(
        default=None, description="tokens that a captioner writes"
    )
    captions_per_second: PositiveFloat | None = Field(
        default=None, description="images that get all their captions, by a whole engine"
    )
    images_per_second: PositiveFloat | None = Field(
        default=None, description="images that an evaluation decodes and encodes"
    )


class RatesFile(Section):
    """A file of measured rates."""

    device: str = Field(min_length=1, description="name of the GPU")
    date: date
    source: str = Field(min_length=1, description="what measured them")
    peak: PositiveFloat | None = Field(
        default=None, description="TFLOP/s of the GPU in bfloat16 that its MFU is relative to"
    )
    rates: MeasuredRates

    @property
    def origin(self) -> str:
        """Where and when."""
        return f"measured on {self.device}, {self.date}, by {self.source}"


def read(path: Path) -> RatesFile:
    """Read a file of measured rates.

    Raises:
        ValueError: it is no such file; one line per mistake.
    """
    try:
        return RatesFile.model_validate(json.loads(path.read_text()))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    except ValidationError as error:
        raise ValueError("\n".join(_explained(path, error))) from error


def _explained(path: Path, error: ValidationError) -> Iterator[str]:
    for item in error.errors():
        place = ".".join(map(str, item["loc"])) or "the file"
        yield f"{path}: {place}: {item['msg'].removeprefix('Value error, ')}"


@dataclass(frozen=True)
class Assumptions:
    """What GPU-hours are estimated from. A value given here takes precedence over a measured one.

    Args:
        peak: TFLOP/s of one GPU in bfloat16; 989 is an H100 SXM.
        bandwidth: TB/s of its memory; 3.35 is an H100 SXM.
        gpu_memory: GB of its memory.
        gpus: of a training. A batch whose activations do not fit them is split, or activations
            are recomputed, which costs a forward pass more.
        embed_mfu: utilisation of embedding; 0.45 to 0.55 expected.
        train_mfu: utilisation of training; published runs reach 0.13 to 0.40.
        caption_mfu: utilisation of a captioner that reads images and prompts.
        caption_bandwidth: share of the memory bandwidth that a captioner reaches as it writes; 0.77
            was published for vLLM and Llama-3.1-8B on an A100.
        caption_engine: share of the time that a captioner keeps the GPU busy; 0.8 by these formulas
            in a published benchmark of vLLM 0.6.0 without images, on an A100, which is slower.
        captions_per_second: images that one GPU captions; by default from the three above.
        images_per_second: images that an evaluation decodes, resizes and encodes.
    """

    peak: float | None = None
    bandwidth: float = 3.35
    gpu_memory: float = 80.0
    gpus: int = 8
    embed_mfu: float | None = None
    train_mfu: float | None = None
    caption_mfu: float = 0.5
    caption_bandwidth: float = 0.7
    caption_engine: float = 0.5
    captions_per_second: float | None = None
    images_per_second: float | None = None


# Of what is neither given nor measured.
ASSUMED = {"peak": 989.0, "embed_mfu": 0.5, "train_mfu": 0.3, "images_per_second": 800.0}
GIVEN, GUESSED = "as given", "assumed"


@dataclass(frozen=True)
class Rate:
    """A rate, and where it comes from."""

    value: float
    origin: str

    @property
    def is_measured(self) -> bool:
        """Whether somebody measured it."""
        return self.origin not in (GIVEN, GUESSED)


class Rates:
    """Every rate of an estimate."""

    def __init__(self, assumptions: Assumptions, measured: RatesFile | None = None) -> None:
        """Keep what is given and what is measured."""
        self.assumptions, self.measured = assumptions, measured

    def find(self, name: str, key: str = "") -> Rate | None:
        """A rate: as given, else as measured, else as assumed, else None.

        Args:
            name: of the rate, as in `MeasuredRates`, or `peak`.
            key: timm name, for a rate that is measured by backbone.
        """
        given = getattr(self.assumptions, name, None)
        if given is not None:
            return Rate(given, GIVEN)
        if self.measured is not None:
            source = self.measured if name == "peak" else self.measured.rates
            value = getattr(source, name)
            value = value.get(key) if isinstance(value, Mapping) else value
            if value is not None:
                return Rate(value, self.measured.origin)
        return Rate(ASSUMED[name], GUESSED) if name in ASSUMED else None

    def __getitem__(self, name: str) -> Rate:
        """A rate that always has a value: of `ASSUMED`."""
        found = self.find(name)
        assert found is not None
        return found

    def of_backbone(self, timm: str) -> Rate:
        """Utilisation of training with a backbone."""
        found = self.find("train_mfu", timm)
        assert found is not None
        return found

    def told(self, name: str, unit: str) -> Iterator[str]:
        """A line for each value of a rate, with its origin."""
        values = getattr(self.measured.rates, name, None) if self.measured else None
        given = getattr(self.assumptions, name, None) is not None
        for key in values if isinstance(values, Mapping) and not given else ():
            rate = self.find(name, key)
            assert rate is not None
            yield f"{unit.format(rate.value)} for {key}: {rate.origin}"
        rate = self.find(name)
        if rate is not None:
            rest = " for other backbones" if isinstance(values, Mapping) and not given else ""
            yield f"{unit.format(rate.value)}{rest}: {rate.origin}"
