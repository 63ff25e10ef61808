"""Low-rank adapters (Hu et al. 2021): W x + (alpha / r) U D x beside a frozen W; of a convolution D has its window, U is 1x1."""

from __future__ import annotations

import math
from typing import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

TARGETS = ("qkv", "qkv+out", "all", "all+conv")
QKV = {
    "to_q", "to_k", "to_v", "to_qkv", "qkv", "q_proj", "k_proj", "v_proj", "wq", "wk", "wv", "q", "k", "v",
    "add_q_proj", "add_k_proj", "add_v_proj", "linear1", "img_qkv", "txt_qkv", "w1q", "w1k", "w1v", "w2q", "w2k", "w2v",
    "to_query", "to_key", "to_value",
}
OUT = {"to_out", "to_add_out", "out_proj", "o_proj", "proj", "out", "wo", "o", "linear2", "w1o", "w2o", "out_layer"}


def init_low_rank(
    in_features: int, out_features: int, rank: int, generator: torch.Generator, kernel: tuple[int, ...] = ()
) -> tuple[Tensor, Tensor]:
    """Down (r, in, *kernel) ~ N(0, 1/r) (standard deviation 1/r), up (out, r, 1, ...) = 0 (DiffStyler sec. 4).

    Both float32 on the generator's device. A convolution's D sums over its window's k cells: there it is 1/(r sqrt k).
    """
    down = torch.randn(rank, in_features, *kernel, generator=generator) / (rank * math.prod(kernel) ** 0.5)
    return down, torch.zeros(out_features, rank, *(1 for _ in kernel))


def apply_low_rank(x: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
    """(..., in) -> (..., out): scale * U (D x), computed in x's dtype."""
    update = F.linear(F.linear(x, down.to(x.dtype)), up.to(x.dtype))
    return update if scale == 1 else update * scale


def convolve_low_rank(convolve: Callable[[Tensor, Tensor], Tensor], x: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
    """(B, in, H, W) -> (B, out, h, w): scale * U (D * x) with U 1x1, computed in x's dtype.

    convolve(x, kernel) is the layer's own convolution: stride, padding and dilation.
    """
    update = F.conv2d(convolve(x, down.to(x.dtype)), up.to(x.dtype))
    return update if scale == 1 else update * scale


def select_targets(names: Iterable[str], targets: str) -> list[str]:
    """Names of the layers that `targets` means: "qkv" (the paper), "qkv+out", or all of them.

    Attention projections are told by their own name and their parent's, in U-Nets and transformers alike.
    """
    if targets not in TARGETS:
        raise ValueError(f'targets: got "{targets}", choose among {", ".join(TARGETS)}.')
    names = list(names)
    if targets.startswith("all"):
        return names
    wanted = QKV if targets == "qkv" else QKV | OUT
    return [name for name in names if _is_attention_projection(name, wanted)]


def _is_attention_projection(name: str, wanted: set[str]) -> bool:
    parts = name.split(".")
    leaf = parts[-2] if parts[-1].isdigit() and len(parts) > 1 else parts[-1]  # to_out.0
    if leaf not in wanted:
        return False
    if leaf in ("linear1", "linear2"):  # Flux's single blocks fuse q, k, v and the MLP into linear1
        return "single" in name
    return leaf.startswith("to_") or any("attn" in part or "attention" in part for part in parts[:-1])


def add_rows(output: Tensor, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """A layer's output (N, ..., out) plus a different update for every batch row.

    x: (N, ..., in); down: (N, r, in); up: (N, out, r) with the scale in it.
    """
    rows = x.reshape(x.shape[0], -1, x.shape[-1])  # (N, T, in)
    hidden = torch.bmm(rows, down.to(x.dtype).transpose(1, 2))  # (N, T, r)
    plain = output.reshape(output.shape[0], -1, output.shape[-1])
    return torch.baddbmm(plain, hidden, up.to(x.dtype).transpose(1, 2)).reshape(output.shape)
