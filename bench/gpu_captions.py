"""Section of bench/gpu.py: the parts of captioning, at the shapes of MiniCPM-Llama3-V 2.5."""

from typing import Any

import timm
import torch

from gpu_bench import Bench


def captions(bench: Bench) -> None:
    """Slices, prompt tokens and caption tokens per second, each part alone, by plain libraries.

    An engine such as vLLM overlaps the parts; it was not measured.
    """
    with torch.inference_mode():
        bench.add("vision tower", slices_per_second(bench), "slices/s")
        if bench.device.type == "cuda":
            torch.cuda.empty_cache()
        prompt, caption = tokens_per_second(bench)
    bench.add("prompts", prompt, "tokens/s", sequences=bench.sizes.sequences)
    bench.add("captions", caption, "tokens/s", sequences=bench.sizes.sequences)


def slices_per_second(bench: Bench) -> float:
    """Slices of 448 pixels through SigLIP-400M, without the resampler, which is small."""
    sizes, device = bench.sizes, bench.device
    tower = timm.create_model(sizes.vision, num_classes=0).to(device).eval()
    side = tower.patch_embed.img_size[0]
    slices = torch.randn(sizes.slices, 3, side, side, device=device)

    def encode() -> None:
        with torch.autocast(device.type, torch.bfloat16):
            tower.forward_features(slices)

    return sizes.slices / bench.seconds(encode)


def tokens_per_second(bench: Bench) -> tuple[float, float]:
    """Prompt tokens and new tokens per second of Llama-3-8B, for many sequences at a time."""
    from transformers import AutoModelForCausalLM, LlamaConfig, StaticCache

    sizes, device = bench.sizes, bench.device
    config = LlamaConfig(
        vocab_size=sizes.vocabulary,
        hidden_size=sizes.mllm[1],
        intermediate_size=sizes.mllm[2],
        num_hidden_layers=sizes.mllm[0],
        num_attention_heads=sizes.mllm[3],
        num_key_value_heads=sizes.mllm[4],
        max_position_embeddings=8192,
    )
    with device:
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    rows, length = sizes.sequences, sizes.prompt_tokens
    prompts = torch.randint(3, sizes.vocabulary, (max(1, rows // 8), length), device=device)
    prefill = bench.seconds(lambda: model(prompts, use_cache=False, logits_to_keep=1))
    # The cache as it is in the middle of a caption.
    cache = StaticCache(config=config, max_cache_len=length + sizes.caption_tokens)
    newest = torch.randint(3, sizes.vocabulary, (rows, 1), device=device)
    place = torch.tensor([length + sizes.caption_tokens // 2], device=device)

    def step() -> None:
        model(newest, past_key_values=cache, cache_position=place, position_ids=place[None])

    decode = bench.seconds(step, repeats=10)
    return prompts.numel() / prefill, rows / decode
