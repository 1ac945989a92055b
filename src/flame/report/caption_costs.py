"""Time that an MLLM of the size of MiniCPM-Llama3-V 2.5 takes to caption an image, by formula.

An image becomes slices, each of which passes through SigLIP-400M and a resampler and becomes 96
tokens of Llama-3-8B. Image and prompts are read once, bound by FLOP: the image comes before the
question, so that several captions share it through a prefix cache. Captions are written in steps of
one token for every sequence, bound by memory bandwidth: a step reads all weights once, and the keys
and values of all sequences.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from flame.report.rates import Assumptions, Rate, Rates
from flame.study.shapes import SHAPES, Shape

LLAMA = SHAPES["meta-llama/Llama-3.1-8B-Instruct"]  # that of Llama 3
# An image of once to twice 448 x 448 pixels is two slices and a thumbnail. CC3M's shorter side
# is at most 512: 768 x 512 is 1.96 times. YFCC15M's images are taken to be alike.
SLICES = 3
PATCHES = 1024  # of a slice of 448 pixels
VISION_WIDTH, VISION_HIDDEN, VISION_LAYERS = 1152, 4304, 27  # SigLIP-400M
SLICE_TOKENS = 96  # arXiv 2408.01800
PROMPT_TOKENS = 40  # chat template, marks around the slices, question
QUESTION_TOKENS = 20  # behind the image, of a further caption
CAPTION_TOKENS = {"long": 130, "short": 22}  # 600 and 110 characters
OTHER_CAPTION_TOKENS = 22
SEQUENCES = 256  # written at a time
BYTES = 2  # of a bfloat16 value
# Images per second that users report for other MLLMs on one 80 GB GPU; docs/paper-study.md.
REPORTED = (4.0, 12.0)


def slice_flop() -> float:
    """FLOP of a slice in the vision tower and the resampler."""
    width, hidden = VISION_WIDTH, VISION_HIDDEN
    tower = VISION_LAYERS * (
        2 * PATCHES * (4 * width**2 + 2 * width * hidden) + 4 * PATCHES**2 * width
    )
    return tower + 2 * PATCHES * (width * LLAMA.width + 2 * LLAMA.width**2)


def prompt_flop(shape: Shape, tokens: int) -> float:
    """FLOP of reading a prompt."""
    per_pair = 4 * shape.layers * shape.heads * shape.head_dim
    return 2 * shape.layers * shape.layer_parameters * tokens + per_pair * tokens**2 / 2


def step_cost(shape: Shape, context: float, sequences: int = SEQUENCES) -> tuple[float, float]:
    """FLOP and bytes of a step, which writes a token of every sequence.

    Args:
        shape: sizes of the LLM.
        context: tokens that each sequence has so far, on average.
        sequences: written at a time.
    """
    weights = shape.layers * shape.layer_parameters + shape.vocabulary * shape.width
    cached = 2 * shape.layers * shape.key_heads * shape.head_dim
    per_pair = 4 * shape.layers * shape.heads * shape.head_dim
    flop = sequences * (2 * weights + per_pair * context)
    return flop, BYTES * (weights + sequences * context * cached)


@dataclass(frozen=True)
class CaptionTime:
    """GPU-seconds of an image, by part.

    Args:
        vision: slices through the vision tower.
        prompts: image and prompts through the LLM.
        writing: the captions.
        engine: share of the time that the engine keeps the GPU busy.
    """

    vision: float
    prompts: float
    writing: float
    engine: float

    @property
    def seconds(self) -> float:
        """All of it, with the time in which the GPU waits for the engine."""
        return (self.vision + self.prompts + self.writing) / self.engine


def caption_time(kinds: Sequence[str], rates: Rates) -> CaptionTime:
    """GPU-seconds of all captions of an image; parts that are measured replace the formula.

    Args:
        kinds: caption kinds that the MLLM writes.
        rates: given, measured and assumed.
    """
    assumed, peak = rates.assumptions, rates["peak"].value * 1e12
    image = SLICES * SLICE_TOKENS + PROMPT_TOKENS
    lengths = [CAPTION_TOKENS.get(kind, OTHER_CAPTION_TOKENS) for kind in kinds]
    prompt = image + QUESTION_TOKENS * (len(lengths) - 1)
    flop_per_second, written = peak * assumed.caption_mfu, sum(lengths)
    token = token_seconds(LLAMA, image + max(lengths) / 2, assumed, peak)
    slices, read, write = (
        rates.find(f"{what}_per_second") for what in ("slices", "prompt_tokens", "caption_tokens")
    )
    return CaptionTime(
        SLICES / slices.value if slices else SLICES * slice_flop() / flop_per_second,
        prompt / read.value if read else prompt_flop(LLAMA, prompt) / flop_per_second,
        written / write.value if write else written * token,
        assumed.caption_engine,
    )


def token_seconds(shape: Shape, context: float, assumed: Assumptions, peak: float) -> float:
    """Seconds per written token: the longer of computing and of reading memory.

    Args:
        shape: sizes of the LLM.
        context: tokens that each sequence has so far, on average.
        assumed: bandwidth in TB/s, and the shares of both that are reached.
        peak: FLOP/s.
    """
    flop, size = step_cost(shape, context)
    reading = size / (assumed.bandwidth * 1e12 * assumed.caption_bandwidth)
    return max(reading, flop / (peak * assumed.caption_mfu)) / SEQUENCES


def captions_per_second(kinds: Sequence[str], rates: Rates) -> Rate:
    """Images per second and GPU: as given, else measured whole, else from the parts."""
    whole = rates.find("captions_per_second")
    if whole is not None:
        return whole
    time = caption_time(kinds, rates)
    return Rate(1 / time.seconds, "by formula")
