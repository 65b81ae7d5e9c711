"""A prepared H on a device: uploaded once, laid out for the kernels, and shared by all tiles of a layer."""

from __future__ import annotations

import threading
import weakref
from typing import NamedTuple

import numpy as np
import torch

from ..feedback import BLOCK, Feedback

_cache: dict[tuple[int, torch.device], DeviceFeedback] = {}
_lock = threading.Lock()


class DeviceFeedback(NamedTuple):
    """The fields of `Feedback` on a device, float32, in the order of the visit. Zeros fill up.

    P = N rounded up to a multiple of BLOCK. R: low rank, k rounded up to a multiple of BLOCK; dense, P. What a kernel
    reads term by term lies so that the BLOCK columns of a term are neighbours.
    """

    dense: bool
    is_diagonal: bool
    """Whether H is known to be a diagonal matrix: low rank, and V of nothing but zeros."""
    order: torch.Tensor
    """int32 [P]: the column visited j-th; 0 beyond N."""
    gains: torch.Tensor
    """[R, P]: low rank, column j holds g_j; dense, L_ij at [i, j]."""
    directions: torch.Tensor
    """[R, P]: low rank, Vᵀ; dense, Hᵀ."""
    vectors: torch.Tensor
    """Low rank [P, R]: V. Dense: nothing, [0, R]."""
    coupling: torch.Tensor
    """[P / BLOCK, BLOCK, BLOCK]: L_ij inside each block, at [block, i, j], zero unless i < j."""
    slopes: torch.Tensor
    """[P / BLOCK, BLOCK, BLOCK]: H_ij inside each block, at [block, i, j], zero unless i < j."""
    pivots: torch.Tensor
    """[P]: Δ."""
    diagonal: torch.Tensor
    """[P]: D (dense: zeros)."""
    curvature: torch.Tensor
    """[P]: H_jj."""

    @property
    def rank(self) -> int:
        """R: the terms of a product over everything before a block."""
        return self.gains.shape[0]


def on_device(feedback: Feedback, device: torch.device) -> DeviceFeedback:
    """The feedback on `device`, uploaded at the first call and kept as long as `feedback` itself lives.

    Any thread and any CUDA stream may use what is returned. The feedback must be in float32.
    """
    assert feedback.gains.dtype == np.float32, f"the feedback is in {feedback.gains.dtype}, not float32"
    # By identity: arrays have no hash. The entry goes before the identity can be given to another object.
    key = id(feedback), device
    with _lock:
        if key not in _cache:
            _cache[key] = _upload(feedback, device)
            weakref.finalize(feedback, _cache.pop, key, None)
        return _cache[key]


def _upload(feedback: Feedback, device: torch.device) -> DeviceFeedback:
    def matrix(part: np.ndarray, width: int) -> torch.Tensor:
        """[rows, width]: zeros in the columns that `part` lacks."""
        return torch.nn.functional.pad(torch.from_numpy(part).to(device), (0, width - part.shape[1]))

    padded = feedback.pivots.size
    rank = padded if feedback.dense else -(-feedback.gains.shape[1] // BLOCK) * BLOCK
    order = np.zeros(padded, dtype=np.int32)
    order[: feedback.columns] = feedback.order
    vectors = matrix(feedback.vectors, rank)
    prepared = DeviceFeedback(
        feedback.dense,
        not feedback.dense and not feedback.vectors.any(),
        torch.from_numpy(order).to(device),
        matrix(feedback.gains, rank).T.contiguous(),
        vectors.T.contiguous(),
        vectors.new_empty((0, rank)) if feedback.dense else vectors.contiguous(),
        torch.from_numpy(feedback.coupling).to(device).transpose(1, 2).contiguous(),
        torch.from_numpy(feedback.slopes).to(device).transpose(1, 2).contiguous(),
        *(torch.from_numpy(part).to(device) for part in (feedback.pivots, feedback.diagonal, feedback.curvature)),
    )
    if device.type == "cuda":
        # Complete before a kernel of another thread's stream, which does not wait for this one, may read it.
        torch.cuda.current_stream(device).synchronize()
    return prepared
