"""Speed of embedding K facets of a caption: one pass, K passes, the release's dense pass.

    python bench/embed.py resources/llms/smollm2-135m --captions 256 --threads 2

Prints, for each way, the best time of several interleaved rounds, and what the saved tokens
promise: R = K (P + S) / (P + K S), with P tokens of a prefix and S of a facet suffix on average.
"""

import argparse
import random
import time
from collections.abc import Callable
from pathlib import Path

import torch

from flame.data.datasets import scenes
from flame.embedding.llm import ATTENTION, TOKEN_BUDGET, FrozenLLM
from flame.evaluation.overhead import PlainLLM

PREFIX = ('Detailed image description: "', '". After thinking step by step,')
PARTS = (
    "the category of the main object in this image",
    "the prominent characteristic or pattern of the main object in this image",
    "the category of the minor object in this image",
    "the prominent characteristic or pattern of the minor object in this image",
    "the primary action or event taking place in this image",
    "this image description",
    "the overall atmosphere or emotion of this image",
    "the positioning layout or spatial relationship in this image",
    "the dominant color or color combination of this image",
)
RELEASE_BATCH = 32


def captions(num: int, seed: int) -> list[str]:
    """Long captions of `flame.data.datasets.scenes`, as the study embeds them."""
    options = scenes.Options(split="bench", images=num, long=1)
    rng = random.Random(seed)
    return [
        scenes.describe(scenes.sample(options, rng, {}), options, rng)["long"][0]
        for _ in range(num)
    ]


def interleaved(
    ways: dict[str, Callable[[], torch.Tensor]], rounds: int, clock: Callable[[], float]
) -> dict[str, float]:
    """Best seconds of each way; the ways take turns, so that a busy machine slows all of them."""
    best = dict.fromkeys(ways, float("inf"))
    for _ in range(rounds):
        for name, way in ways.items():
            start = clock()
            way()
            best[name] = min(best[name], clock() - start)
    return best


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--captions", type=int, default=128)
    parser.add_argument("--facets", type=int, default=7, choices=range(1, len(PARTS) + 1))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--token-budget", type=int, default=TOKEN_BUDGET)
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"))
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="count CPU seconds: for one thread on a busy machine",
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    suffixes = [f' {part} means in just one word:"' for part in PARTS[: args.facets]]
    texts = captions(args.captions, seed=0)
    encoder = FrozenLLM(args.checkpoint, dtype=args.dtype, device="cpu")
    assert encoder.model.config._attn_implementation == ATTENTION
    dense = PlainLLM(encoder)
    # As in the release: captions as they come.
    release = [
        list(range(start, min(start + RELEASE_BATCH, len(texts))))
        for start in range(0, len(texts), RELEASE_BATCH)
    ]
    budget = {"token_budget": args.token_budget}
    ways = {
        "one pass (ours)": lambda: encoder.embed(texts, PREFIX, suffixes, **budget),
        "K separate passes": lambda: torch.cat(
            [encoder.embed(texts, PREFIX, [suffix], **budget) for suffix in suffixes], dim=1
        ),
        "dense padded pass": lambda: dense.embed(texts, PREFIX, suffixes, release),
    }
    ours, separate, padded = (way() for way in ways.values())
    for other in (separate, padded):
        assert torch.cosine_similarity(ours, other, dim=-1).min() > 0.999
    seconds = interleaved(
        ways, args.rounds, time.process_time if args.cpu_time else time.perf_counter
    )

    prefix_tokens = sum(map(len, encoder.prefixes(texts, PREFIX)))
    suffix_tokens = len(texts) * sum(map(len, encoder.endings(PREFIX[1], suffixes)))
    tokens = dict.fromkeys(ways, prefix_tokens + suffix_tokens)
    tokens["K separate passes"] = args.facets * prefix_tokens + suffix_tokens
    bound = tokens["K separate passes"] / tokens["one pass (ours)"]
    print(
        f"{len(texts)} captions, K = {args.facets}, P = {prefix_tokens / len(texts):.1f},"
        f" S = {suffix_tokens / len(texts) / args.facets:.1f}, {encoder.dtype},"
        f" {args.threads} threads, {args.token_budget} tokens a batch"
    )
    print(f"{'':20}{'seconds':>10}{'tokens/s':>10}{'x ours':>10}")
    for name, spent in seconds.items():
        ratio = spent / seconds["one pass (ours)"]
        print(f"{name:20}{spent:10.2f}{tokens[name] / spent:10.0f}{ratio:10.2f}")
    reached = seconds["K separate passes"] / seconds["one pass (ours)"]
    print(f"R = {bound:.2f}; reached {reached:.2f} = {reached / bound:.3f} R")


if __name__ == "__main__":
    main()
