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


def require_memory(device: torch.device, needed: float, what: str) -> None:
    """Refuse a GPU that is too small; call this before any data is read.

    Args:
        device: where to compute; only a GPU is asked.
        needed: bytes.
        what: for the error.

    Raises:
        ValueError: less memory is free.
    """
    if device.type != "cuda":
        return
    free, whole = torch.cuda.mem_get_info(device)
    if needed > free:
        raise ValueError(
            f"{what} needs {needed / 1e9:.1f} GB of GPU memory, of which {free / 1e9:.1f} of "
            f"{whole / 1e9:.1f} GB are free"
        )
