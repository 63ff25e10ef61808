"""Perceptual measures for the benchmarks: Gram distance (style) and an LPIPS-like distance (content).

Both need a folder with `vgg16_convs_fp16.safetensors` (conv{b}_{i}.weight/bias of VGG16) and
`lpips_vgg_heads.pth` (LPIPS's linear heads); neither is part of the pack.
"""

from __future__ import annotations

from pathlib import Path

import safetensors.torch
import torch
import torch.nn.functional as F

CONVOLUTIONS = ((1, 2), (2, 2), (3, 3), (4, 3), (5, 3))
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Metrics:
    """Images are (B, 3, H, W) in [0, 1]."""

    def __init__(self, folder: Path):
        self._weights = {k: v.float() for k, v in safetensors.torch.load_file(str(folder / "vgg16_convs_fp16.safetensors")).items()}
        heads = torch.load(folder / "lpips_vgg_heads.pth", weights_only=True, map_location="cpu")
        self._heads = [head.float() for _, head in sorted(heads.items())]
        self._seen: list[tuple[torch.Tensor, list[torch.Tensor]]] = []  # the last pictures: one is compared several times

    def stages(self, image: torch.Tensor) -> list[torch.Tensor]:
        """VGG16 activations after the last ReLU before each pooling: five (B, C, h, w)."""
        for number, (known, stages) in enumerate(self._seen):
            if known is image:
                self._seen.append(self._seen.pop(number))
                return stages
        self._seen = [*self._seen[-3:], (image, self._stages(image))]
        return self._seen[-1][1]

    @torch.no_grad()
    def _stages(self, image: torch.Tensor) -> list[torch.Tensor]:
        x = (image - image.new_tensor(MEAN).view(1, 3, 1, 1)) / image.new_tensor(STD).view(1, 3, 1, 1)
        stages = []
        for block, count in CONVOLUTIONS:
            if block > 1:
                x = F.max_pool2d(x, 2)
            for i in range(1, count + 1):
                name = f"conv{block}_{i}"
                x = F.relu(F.conv2d(x, self._weights[f"{name}.weight"], self._weights[f"{name}.bias"], padding=1))
            stages.append(x)
        return stages

    def gram_distance(self, a: torch.Tensor, b: torch.Tensor) -> float:
        """Mean over four stages of |G_a - G_b| / |G_b|, G the channel correlations; `b` is the style, any size."""
        total = 0.0
        for x, y in zip(self.stages(a)[:4], self.stages(b)[:4]):
            gram_x, gram_y = (torch.einsum("bchw,bdhw->bcd", f, f) / f[0, 0].numel() for f in (x, y))
            total += float((gram_x - gram_y).norm() / gram_y.norm())
        return total / 4

    def lpips(self, a: torch.Tensor, b: torch.Tensor) -> float:
        """LPIPS (Zhang et al. 2018) over the five stages with its published heads; equal sizes."""
        total = 0.0
        for x, y, head in zip(self.stages(a), self.stages(b), self._heads):
            unit_x, unit_y = (f / (f.norm(dim=1, keepdim=True) + 1e-10) for f in (x, y))
            total += float((head.view(1, -1, 1, 1) * (unit_x - unit_y).square()).sum(1).mean())
        return total
