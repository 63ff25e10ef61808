"""Motion between two frames, and a film's restyled frames held steady along it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

COARSEST = 48  # pixels of the shorter side below which the search halves no further
BLOCK, OVERLAP = 8, 2  # pixels: what moves as one, and how far around it is looked
STILL = 1e-3  # what each pixel of a step costs against the difference it saves: flat parts stay with what is around them
OUTSIDE = 0.05  # what it costs where all of a block comes from outside of the picture
MISMATCH = 0.05  # difference of the originals, in 0..1, at which a pixel counts as another thing (weight 1/e)


def motion(before: Tensor, now: Tensor) -> Tensor:
    """Where each pixel of `now` was in `before`: (H, W, 3) in 0..1 each -> (H, W, 2) whole pixels (down, right).

    Block matching from coarse to fine: on each level, twice as fine as the one before, the best of the steps near what was found
    for the block and its neighbours.
    """
    levels = [(before, now)]
    while min(levels[0][0].shape[:2]) >= 2 * COARSEST:
        levels.insert(0, tuple(F.avg_pool2d(frame.movedim(-1, 0), 2).movedim(0, -1) for frame in levels[0]))
    height, width = (-(-side // BLOCK) for side in levels[0][1].shape[:2])
    field, reach = torch.zeros(height, width, 2, dtype=torch.long, device=now.device), 4
    for old, new in levels:
        height, width = (-(-side // BLOCK) for side in new.shape[:2])
        if field.shape[:2] != (height, width):
            field, reach = _finer(field, height, width), 2
        field = _Blocks(old, new).search(field, reach)
    return field.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)[: now.shape[0], : now.shape[1]]


def steadied(restyled: Tensor, now: Tensor, before_restyled: Tensor, before: Tensor, strength: float) -> Tensor:
    """`restyled` (H, W, 3) blended with the frame before it, moved as the originals moved.

    A recursive filter along the motion (Dubois and Sabri, IEEE Trans. Commun. 1984), guided by the film itself as in Bonneel et al.,
    Blind video temporal consistency, 2015: y_t + s c (W y_{t-1} - y_t), W the step from frame to frame and c = exp(-(d / MISMATCH)^2),
    d the originals' mean difference there, so that what is new in the film is taken as it is. now, before: the originals,
    (H, W, 3); all in 0..1. strength s in 0..1; 0 returns `restyled` itself.
    """
    if strength == 0:
        return restyled
    height, width = now.shape[:2]
    field = motion(before, now)
    rows, columns, inside = _places(field, height, width)
    difference = (before[rows, columns] - now).abs().mean(-1)[None, None]
    difference = F.avg_pool2d(difference, 5, 1, 2, count_include_pad=False)[0, 0]
    weight = strength * torch.exp(-((difference / MISMATCH) ** 2)) * inside
    return restyled + weight.unsqueeze(-1) * (before_restyled[rows, columns] - restyled)


def _finer(field: Tensor, height: int, width: int) -> Tensor:
    """Steps of a level half as fine, for (height, width) blocks in this level's pixels."""
    rows = (torch.arange(height, device=field.device) // 2).clamp_max(field.shape[0] - 1)
    columns = (torch.arange(width, device=field.device) // 2).clamp_max(field.shape[1] - 1)
    return 2 * field[rows][:, columns]


def _places(field: Tensor, height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Row and column that each pixel came from, within the picture, and whether it was there."""
    rows = torch.arange(height, device=field.device).unsqueeze(1) + field[..., 0]
    columns = torch.arange(width, device=field.device).unsqueeze(0) + field[..., 1]
    inside = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
    return rows.clamp(0, height - 1), columns.clamp(0, width - 1), inside


class _Blocks:
    """The blocks of one level, (H, W, 3) frames, and what a step from frame to frame costs each of them."""

    def __init__(self, old: Tensor, new: Tensor):
        self.old = old
        (height, width), around = new.shape[:2], torch.arange(-OVERLAP, BLOCK + OVERLAP, device=new.device)
        self.rows, self.columns = (
            (BLOCK * torch.arange(-(-side // BLOCK), device=new.device).unsqueeze(1) + around).clamp(0, side - 1) for side in (height, width)
        )
        self.new = new[self.rows[:, None, :, None], self.columns[None, :, None, :]]  # (blocks down, blocks right, n, n, 3)

    def search(self, field: Tensor, reach: int) -> Tensor:
        """The best step of each block: near its own of `field` (blocks down, blocks right, 2), and nearer its neighbours'."""
        best, found = self._cost(field), field
        for base, near in ((field, reach), *((_shifted(field, *step), 1) for step in ((0, 1), (0, -1), (1, 0), (-1, 0)))):
            for down in range(-near, near + 1):
                for right in range(-near, near + 1):
                    tried = base + base.new_tensor((down, right))
                    cost = self._cost(tried) + STILL * (abs(down) + abs(right))
                    better = cost < best
                    best, found = torch.where(better, cost, best), torch.where(better.unsqueeze(-1), tried, found)
        return found

    def _cost(self, field: Tensor) -> Tensor:
        """Mean difference over each block and what is around it, as far as it lies in the picture."""
        height, width = self.old.shape[:2]
        rows, columns = self.rows.unsqueeze(1) + field[..., :1], self.columns.unsqueeze(0) + field[..., 1:]
        inside = ((rows >= 0) & (rows < height)).unsqueeze(-1) & ((columns >= 0) & (columns < width)).unsqueeze(-2)
        old = self.old[rows.clamp(0, height - 1).unsqueeze(-1), columns.clamp(0, width - 1).unsqueeze(-2)]
        difference, share = (old - self.new).abs().mean(-1) * inside, inside.float().mean((-2, -1))
        return difference.mean((-2, -1)) / share.clamp_min(1e-3) + OUTSIDE * (1 - share)


def _shifted(field: Tensor, down: int, right: int) -> Tensor:
    """Each block's neighbour's steps; at the border its own."""
    rows = (torch.arange(field.shape[0], device=field.device) + down).clamp(0, field.shape[0] - 1)
    columns = (torch.arange(field.shape[1], device=field.device) + right).clamp(0, field.shape[1] - 1)
    return field[rows][:, columns]
