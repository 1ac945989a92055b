"""Images and prompts -> captions by a multimodal LLM, in one of three engines.

The study names the engine. All of them answer the same `Request`s with one `Reply` each. The
package of an engine is imported when the engine is created, so none needs those of the others.

What a caption costs, for MiniCPM-Llama3-V 2.5 (8 billion parameters) with the prompts of
config/paper.yaml; flame.report.caption_costs reckons with the same numbers:

- Image: 96 tokens a slice. An image of at most the area of 448 x 448 pixels is one slice, a larger
  one a thumbnail and up to 9 slices of about that area. CC3M's (shortest side at most 512) are
  mostly a thumbnail and 2 slices, 288 tokens; the most is 960. The vision encoder sees about 1,024
  patches a slice.
- Prompt: about 40 tokens of template, marks around slices, and question.
- Output: about 130 tokens for a long caption and 22 for a short one; at most 512 and 96, by
  `max_tokens`.
- Shared: the captions of an image have all tokens before the question in common. With prefix
  caching the image is encoded and prefilled once an image, not once a caption, because the question
  comes last and both requests are submitted together.

So an image costs one encoding and prefill of about 330 tokens, 20 more for the second question, and
152 decoded tokens. A bad caption is decoded twice.
"""

from importlib.metadata import version

from flame.captioning.engines.base import Engine, Reply, Request
from flame.study.schema.data import ServerCaptioner, TransformersCaptioner, VllmCaptioner

__all__ = ["Engine", "Reply", "Request", "create", "versions"]

# Packages whose versions affect the captions of an engine.
PACKAGES = {
    "vllm": ("vllm", "transformers", "torch"),
    "server": ("requests",),
    "transformers": ("transformers", "torch"),
}


def create(
    captioner: VllmCaptioner | ServerCaptioner | TransformersCaptioner, seed: int = 0
) -> Engine:
    """Engine of a captioner, with its model loaded.

    Args:
        captioner: multimodal LLM and its prompts.
        seed: of the engine's own generator, for requests without a seed of their own.

    Raises:
        ValueError: a missing token, an unpinned revision of remote code, or a bad option.
    """
    match captioner:
        case VllmCaptioner():
            from flame.captioning.engines.vllm import VllmEngine

            return VllmEngine(captioner, seed)
        case ServerCaptioner():
            from flame.captioning.engines.server import ServerEngine

            return ServerEngine(captioner)
        case TransformersCaptioner():
            from flame.captioning.engines.transformers import TransformersEngine

            return TransformersEngine(captioner)


def versions(engine: str) -> dict[str, str]:
    """Versions of the packages that affect the captions of an engine."""
    return {name: version(name) for name in PACKAGES[engine]}
