"""The papers' pictures of features: principal components, and where a query looks."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def pca_image(features: torch.Tensor) -> torch.Tensor:
    """(B, C, h, w) -> (B, h, w, 3) in [0, 1]: the top three principal components as red, green and blue.

    One basis for the whole batch, so that colours mean the same in every picture (DiffStyler Fig. 3,
    StyleID Fig. 2). Each component is scaled by its 1st and 99th percentile; signs are fixed by the
    largest loading, so that equal input gives equal colours.
    """
    batch, channels, height, width = features.shape
    points = features.float().movedim(1, -1).reshape(-1, channels)  # BCHW -> (BHW)C
    points = points - points.mean(dim=0)
    _, _, axes = torch.linalg.svd(points.T @ points)
    axes = F.pad(axes[:3], (0, 0, 0, max(0, 3 - channels)))
    largest = axes.abs().argmax(dim=1, keepdim=True)
    axes = axes * torch.where(axes.gather(1, largest) < 0, -1.0, 1.0)
    components = points @ axes.T
    low, high = (torch.quantile(components, q, dim=0) for q in (0.01, 0.99))
    return ((components - low) / (high - low).clamp_min(1e-8)).clamp(0, 1).view(batch, height, width, 3)


def attention_map(query: torch.Tensor, keys: torch.Tensor, heads: int) -> torch.Tensor:
    """softmax(q K^T / sqrt(d)) averaged over heads: query (C,), keys (T, C) -> (T,), summing to 1."""
    width = query.shape[-1] // heads
    logits = torch.einsum("hd,thd->ht", query.float().view(heads, width), keys.float().view(-1, heads, width))
    return torch.softmax(logits / width**0.5, dim=-1).mean(dim=0)


def heat_overlay(image: torch.Tensor, heat: torch.Tensor, opacity: float = 0.65) -> torch.Tensor:
    """Lays a heat map (h, w) in [0, 1] over a picture (H, W, 3): blue, where it is cold, to red."""
    grown = F.interpolate(heat[None, None].float(), image.shape[:2], mode="bilinear", align_corners=False)[0, 0].clamp(0, 1)
    colours = torch.stack([(2 * grown - 0.5), 1 - (2 * grown - 1).abs(), (1.5 - 2 * grown) * 0.8], dim=-1).clamp(0, 1)
    return (1 - opacity) * image + opacity * colours


def mark_cell(image: torch.Tensor, row: int, column: int, grid: tuple[int, int]) -> torch.Tensor:
    """Draws a red frame around one cell of a (rows, columns) grid on a picture (H, W, 3)."""
    height, width = image.shape[:2]
    top, bottom = row * height // grid[0], max((row + 1) * height // grid[0], row * height // grid[0] + 3)
    left, right = column * width // grid[1], max((column + 1) * width // grid[1], column * width // grid[1] + 3)
    line = max(1, min(height, width) // 128)
    marked = image.clone()
    region = marked[max(0, top - line) : bottom + line, max(0, left - line) : right + line]
    inner = marked[top:bottom, left:right].clone()
    region[:] = marked.new_tensor([1.0, 0.1, 0.1])
    marked[top:bottom, left:right] = inner
    return marked
