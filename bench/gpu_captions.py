"""Section of bench/gpu.py: the parts of captioning, at the shapes of MiniCPM-Llama3-V 2.5."""

from typing import Any

import timm
import torch
from torch.nn.functional import scaled_dot_product_attention, silu

from gpu_bench import Bench


def captions(bench: Bench) -> None:
    """Slices, prompt tokens and caption tokens per second, each part alone.

    An engine such as vLLM overlaps the parts; it was not measured.
    """
    with torch.inference_mode():
        bench.add("vision tower", slices_per_second(bench), "slices/s")
        if bench.device.type == "cuda":
            torch.cuda.empty_cache()
        prompt, caption = tokens_per_second(bench)
    bench.add("prompts", prompt, "tokens/s", sequences=max(1, bench.sizes.sequences // 8))
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
    from transformers import AutoModelForCausalLM, LlamaConfig

    sizes, device = bench.sizes, bench.device
    layers, width, hidden, heads, key_heads = sizes.mllm
    config = LlamaConfig(
        vocab_size=sizes.vocabulary,
        hidden_size=width,
        intermediate_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        max_position_embeddings=8192,
    )
    with device:
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    rows, length = sizes.sequences, sizes.prompt_tokens
    prompts = torch.randint(3, sizes.vocabulary, (max(1, rows // 8), length), device=device)
    prefill = bench.seconds(lambda: model(prompts, use_cache=False, logits_to_keep=1))
    decode = bench.seconds(Step(model, rows, length + sizes.caption_tokens // 2), repeats=10)
    return prompts.numel() / prefill, rows / decode


class Step:
    """The next token of every sequence, by the kernels that an engine needs and nothing else.

    `transformers` itself would measure its own overhead: it copies keys and values for every group
    of heads. Norms, positions and sampling are left out.
    """

    def __init__(self, model: Any, rows: int, context: int) -> None:
        """Make a cache of keys and values as it is in the middle of a caption."""
        self.layers, self.head = model.model.layers, model.lm_head
        config = model.config
        self.dim = config.hidden_size // config.num_attention_heads
        shape = rows, config.num_key_value_heads, context, self.dim
        self.caches = [
            [torch.randn(shape, dtype=model.dtype, device=model.device) for _ in range(2)]
            for _ in self.layers
        ]
        self.newest = torch.randn(rows, config.hidden_size, dtype=model.dtype, device=model.device)

    def __call__(self) -> torch.Tensor:
        """Logits (rows, vocabulary)."""
        x = self.newest
        for layer, (keys, values) in zip(self.layers, self.caches, strict=True):
            attention, mlp = layer.self_attn, layer.mlp
            # The query heads of a group are rows of one head, so that its keys are read once.
            query = attention.q_proj(x).view(len(x), keys.shape[1], -1, self.dim)
            attention.k_proj(x), attention.v_proj(x)
            found = scaled_dot_product_attention(query, keys, values)
            x = x + attention.o_proj(found.reshape(len(x), -1))
            x = x + mlp.down_proj(silu(mlp.gate_proj(x)) * mlp.up_proj(x))
        return self.head(x)
