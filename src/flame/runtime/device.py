"""Where to compute, and in which precision."""

from functools import cache

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


@cache
def compiler_fault(backend: str, device: torch.device) -> str | None:
    """What keeps torch.compile from working, such as a missing C++ compiler; None if nothing does.

    It compiles something small, because torch.compile itself finds out with the first batch.

    Args:
        backend: of torch.compile.
        device: where to compute.
    """
    try:
        torch.compile(lambda x: x.sin() + 1, backend=backend)(torch.ones(8, device=device))
    except (RuntimeError, ImportError) as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        return lines[0] if lines else type(error).__name__
    return None
