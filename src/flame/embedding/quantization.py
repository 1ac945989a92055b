"""Formats of stored vectors: float16, or 8 bits per value with scales."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

FP8 = torch.float8_e4m3fn
FP8_MAX = float(torch.finfo(FP8).max)  # 448
FP8_VALUES = torch.arange(256, dtype=torch.uint8).view(FP8).float().numpy()
INT8_MAX = 127
# The scales of int8 come from the first shard; values of later rows that exceed them are clipped.
MARGIN = 1.25

Name = Literal["float16", "fp8", "int8"]


def _same(values: np.ndarray, scales: np.ndarray | None = None) -> np.ndarray:
    return values


@dataclass(frozen=True)
class Storage:
    """A format of (n, K, D) vectors.

    Args:
        dtype: of the stored values.
        scales: float16 vectors -> factors of their stored values, (n, K, 1) or (1, K, D); None if
            the stored values are the vectors.
        encode: vectors and scales -> stored values, of the shape of the vectors.
        decode: stored values -> float32.
        is_of_row: whether each row has its own scales, or all rows share those of the first shard.
        scales_dtype: of the scales on disk.
    """

    dtype: str
    scales: Callable[[np.ndarray], np.ndarray] | None = None
    encode: Callable[[np.ndarray, np.ndarray], np.ndarray] = _same
    decode: Callable[[np.ndarray], np.ndarray] = _same
    is_of_row: bool = False
    scales_dtype: str = ""


def of_dtype(dtype: np.dtype) -> Storage | None:
    """Storage with values of this dtype, if there is one."""
    return next((storage for storage in STORAGES.values() if storage.dtype == dtype), None)


def _powers(vectors: np.ndarray) -> np.ndarray:
    """Smallest power of two per vector that scales its values into the range of fp8."""
    largest = np.abs(vectors).max(axis=2, keepdims=True).astype(np.float32)
    _, exponents = np.frexp(largest / FP8_MAX)
    return np.exp2(np.maximum(exponents, -24).astype(np.float32)).astype(np.float16)


def _to_fp8(vectors: np.ndarray, scales: np.ndarray) -> np.ndarray:
    scaled = torch.from_numpy(vectors.astype(np.float32) / scales.astype(np.float32))
    return scaled.to(FP8).view(torch.uint8).numpy()


def _from_fp8(values: np.ndarray) -> np.ndarray:
    return FP8_VALUES[values]


def _of_dimensions(vectors: np.ndarray) -> np.ndarray:
    """Step size of int8 in each dimension of each facet."""
    largest = MARGIN * np.abs(vectors).max(axis=0, keepdims=True).astype(np.float32)
    return np.where(largest > 0, largest, 1) / INT8_MAX


def _to_int8(vectors: np.ndarray, scales: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(vectors / scales), -INT8_MAX, INT8_MAX).astype(np.int8)


def _from_int8(values: np.ndarray) -> np.ndarray:
    return values.astype(np.float32)


STORAGES: dict[str, Storage] = {
    "float16": Storage("float16"),
    "fp8": Storage("uint8", _powers, _to_fp8, _from_fp8, is_of_row=True, scales_dtype="<f2"),
    "int8": Storage("int8", _of_dimensions, _to_int8, _from_int8, scales_dtype="<f4"),
}
