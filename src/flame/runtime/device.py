"""Where to compute, and in which precision."""

import torch


def device_of(name: str = "auto") -> torch.device:
    """The torch device of this name; `auto` is the GPU if there is one, else the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def dtype_of(name: str, device: torch.device) -> torch.dtype:
    """The torch dtype of this name; `auto` is bfloat16 where the hardware supports it.

    Args:
        name: of a dtype, such as "float32", or "auto".
        device: the device that computes.
    """
    if name != "auto":
        return getattr(torch, name)
    cpu = torch.cpu.get_capabilities()
    native = device.type == "cuda" or cpu.get("avx512_bf16") or cpu.get("amx_bf16")
    return torch.bfloat16 if native else torch.float32
