"""Sections of bench/gpu.py: ceilings of the card, and the frozen LLM in Nemo's shape."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from gpu_bench import PEAK, Bench, Sizes


def ceilings(bench: Bench) -> None:
    """What the card itself reaches: matrix products and copies."""
    n = bench.sizes.matmul
    for name, dtype, tf32 in (
        ("bfloat16", torch.bfloat16, False),
        ("TF32", torch.float32, True),
        ("float32", torch.float32, False),
    ):
        torch.backends.cuda.matmul.allow_tf32 = tf32
        a, b = (torch.randn(n, n, device=bench.device, dtype=dtype) for _ in range(2))
        seconds = bench.seconds(lambda a=a, b=b: a @ b, repeats=10)
        bench.add(f"matrix product, {name}", 2e-12 * n**3 / seconds, "TFLOP/s", n=n)
    torch.backends.cuda.matmul.allow_tf32 = False
    source = torch.empty(bench.sizes.copy, dtype=torch.uint8, device=bench.device).random_()
    target = torch.empty_like(source)
    seconds = bench.seconds(lambda: target.copy_(source), repeats=10)
    bench.add("copy on the device", 2e-9 * len(source) / seconds, "GB/s, read and written")
    host = torch.empty(bench.sizes.copy, dtype=torch.uint8, pin_memory=bench.device.type == "cuda")
    seconds = bench.seconds(lambda: target.copy_(host, non_blocking=True))
    bench.add("copy from pinned memory", 1e-9 * len(host) / seconds, "GB/s")


def nemo(sizes: Sizes, layers: int) -> Any:
    """Configuration of a Mistral of Nemo's layer shape."""
    from transformers import MistralConfig

    return MistralConfig(
        vocab_size=sizes.tokens_of_llm,
        hidden_size=sizes.width,
        intermediate_size=sizes.hidden,
        num_hidden_layers=layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.key_heads,
        head_dim=sizes.head_dim,
        sliding_window=None,
    )


def prompts(sizes: Sizes, captions: int) -> tuple[list[list[int]], list[list[int]]]:
    """Random tokens: a prefix for every caption, with lengths as of long captions; suffixes."""
    draws = torch.Generator().manual_seed(0)
    mean = sizes.long_tokens
    lengths = (mean * (1 + 0.25 * torch.randn(captions, generator=draws))).int().clamp(min=5)

    def tokens(length: int) -> list[int]:
        return torch.randint(3, sizes.tokens_of_llm, (length,), generator=draws).tolist()

    return [*map(tokens, lengths.tolist())], [
        tokens(sizes.suffix_tokens) for _ in range(sizes.facets)
    ]


def speeds(device: torch.device) -> dict[str, Any]:
    """Speed settings of the frozen LLM that are compared; those of the device are among them."""
    from flame.embedding.speed import LLMSpeed

    own = LLMSpeed.of(device)
    ways = {
        "as transformers has it": (False, "matmul", False),
        "fused norms": (True, "matmul", False),
        "fused norms, SDPA": (True, "sdpa", False),
        "fused norms, SDPA, compiled": (True, "sdpa", True),
    }
    if device.type == "cpu":  # no C++ compiler is asked for
        del ways["fused norms, SDPA, compiled"]
    return {
        name: replace(own, fused_norms=fused, attention=attention, compile=compiled)
        for name, (fused, attention, compiled) in ways.items()
    }


def exact(bench: Bench) -> None:
    """One pass against one pass per facet by plain `transformers`, and bfloat16 against float32."""
    from transformers import AutoModel

    from flame.embedding.llm import FrozenLLM

    prefixes, suffixes = prompts(bench.sizes, min(24, bench.sizes.captions))

    def model(dtype: torch.dtype) -> Any:
        torch.manual_seed(0)
        with bench.device:
            return AutoModel.from_config(nemo(bench.sizes, 2), dtype=torch.float32).eval().to(dtype)

    reference = separate(model(torch.float32), prefixes, suffixes)
    for dtype in (torch.float32, torch.bfloat16):
        found = {"one pass per facet": separate(model(dtype), prefixes, suffixes)}
        for name, speed in speeds(bench.device).items():
            encoder = FrozenLLM.from_model(model(dtype), speed=speed)
            found[f"one pass, {name}"] = encoder.embed_tokens(prefixes, suffixes)
        for name, vectors in found.items():
            error = ((vectors - reference).norm() / reference.norm()).item()
            cosine = torch.cosine_similarity(vectors, reference, dim=-1).min().item()
            what = f"{name}, {str(dtype).split('.')[1]}"
            bench.add(what, error, "relative error", least_cosine=cosine)


@torch.inference_mode()
def separate(
    plain: Any, prefixes: Sequence[Sequence[int]], suffixes: Sequence[Sequence[int]]
) -> torch.Tensor:
    """Embeddings (N, K, D) of plain `transformers`: each caption with each suffix, alone."""
    rows = []
    for prefix in prefixes:
        answers = []
        for suffix in suffixes:
            ids = torch.tensor([[*prefix, *suffix]], device=plain.device)
            answers.append(plain(ids, use_cache=False).last_hidden_state[0, -1])
        rows.append(torch.stack(answers))
    return torch.stack(rows).float().cpu()


def embed(bench: Bench) -> None:
    """Tokens per second of the whole LLM at several token budgets, and what K passes cost."""
    from flame.embedding.llm import FrozenLLM
    from flame.embedding.speed import LLMSpeed

    sizes = bench.sizes
    prefixes, suffixes = prompts(sizes, sizes.captions)
    dtype = torch.bfloat16 if bench.device.type == "cuda" else torch.float32
    for name, speed in speeds(bench.device).items():
        encoder = FrozenLLM.random(
            nemo(sizes, sizes.layers), dtype=dtype, device=str(bench.device), speed=speed
        )
        all_budgets = speed == LLMSpeed.of(bench.device)
        for budget in sizes.budgets if all_budgets else sizes.budgets[1:2] or sizes.budgets:
            bench.add(name, **tokens_per_second(bench, encoder, prefixes, suffixes, budget))
        if all_budgets:
            bench.add("K passes / one pass", **passes(bench, encoder, prefixes, suffixes))
        del encoder
        if bench.device.type == "cuda":
            torch.cuda.empty_cache()


def tokens_per_second(
    bench: Bench,
    encoder: Any,
    prefixes: Sequence[Sequence[int]],
    suffixes: Sequence[Sequence[int]],
    budget: int,
) -> dict[str, Any]:
    """Speed of embedding at one token budget."""
    from flame.embedding.llm import plan
    from flame.report.costs import embedding_flop
    from flame.study.shapes import Shape

    sizes, facets, tail = bench.sizes, len(suffixes), len(suffixes[0])
    shape = Shape(
        sizes.layers,
        sizes.width,
        sizes.heads,
        sizes.head_dim,
        sizes.key_heads,
        sizes.hidden,
        sizes.tokens_of_llm,
    )
    # Batches as they are among the captions of four shards, and not all of them.
    batches = plan([len(ids) for ids in prefixes], facets * tail, budget)
    chosen = batches[:: max(1, len(batches) * budget // sizes.tokens_timed)]
    some = [prefixes[row] for batch in chosen for row in batch]
    tokens = sum(map(len, some)) + len(some) * facets * tail
    flop = sum(embedding_flop(shape, len(ids), tail, facets, passes=False) for ids in some)
    run = partial(encoder.embed_tokens, some, suffixes, token_budget=budget)
    encoder.embed_tokens([prefixes[row] for row in chosen[0]], suffixes, token_budget=budget)
    bench.peak_gb()
    spent = bench.seconds(run, warm=True, repeats=1)
    return {
        "value": tokens / spent,
        "unit": "tokens/s",
        "budget": budget,
        "mfu": flop / spent / PEAK,
        "captions_per_second": len(some) / spent,
        "gb": bench.peak_gb(),
    }


def passes(
    bench: Bench,
    encoder: Any,
    prefixes: Sequence[Sequence[int]],
    suffixes: Sequence[Sequence[int]],
) -> dict[str, Any]:
    """How much longer one pass per facet takes, beside the ratio R of their tokens."""
    few, budget = prefixes[: max(2, len(prefixes) // 16)], encoder.speed.token_budget

    def many() -> None:
        for suffix in suffixes:
            encoder.embed_tokens(few, [suffix], token_budget=budget)

    def once() -> None:
        encoder.embed_tokens(few, suffixes, token_budget=budget)

    ratio = bench.seconds(many, repeats=1) / bench.seconds(once, repeats=1)
    prefix, suffix = sum(map(len, few)), len(few) * len(suffixes[0])
    bound = len(suffixes) * (prefix + suffix) / (prefix + len(suffixes) * suffix)
    return {"value": ratio, "unit": "times as long", "R": bound}
