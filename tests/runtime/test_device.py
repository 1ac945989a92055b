"""The device and the precision that `auto` stands for."""

import pytest
import torch

from flame.runtime.device import device_of, dtype_of, require_memory

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(("there", "expected"), [(True, GPU), (False, CPU)])
def test_auto_is_the_gpu_if_there_is_one(monkeypatch, there, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    assert device_of("auto") == device_of() == expected
    assert device_of("cpu") == CPU
    assert device_of("cuda:1") == torch.device("cuda", 1)


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({}, torch.float32),
        ({"avx512_bf16": False, "amx_bf16": False}, torch.float32),
        ({"avx512_bf16": True}, torch.bfloat16),
        ({"amx_bf16": True}, torch.bfloat16),
    ],
)
def test_auto_is_bfloat16_where_the_hardware_computes_in_it(monkeypatch, capabilities, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert dtype_of("auto", CPU) == expected
    assert dtype_of("auto", GPU) == torch.bfloat16
    assert dtype_of("float32", GPU) == torch.float32
    assert dtype_of("bfloat16", CPU) == torch.bfloat16


def test_a_gpu_that_is_too_small_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (20 * 10**9, 24 * 10**9))
    require_memory(GPU, 19e9, "this")
    require_memory(CPU, 26.9e9, "this")
    said = "this needs 26.9 GB of GPU memory, of which 20.0 of 24.0 GB are free"
    with pytest.raises(ValueError, match=said):
        require_memory(GPU, 26.9e9, "this")
