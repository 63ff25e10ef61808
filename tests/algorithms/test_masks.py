"""Mask resizing against closed forms and torch's own area mode where that is exact."""

from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F

from pastiche.nodes.algorithms.masks import resize_mask


@pytest.mark.parametrize("size", [(7, 5), (8, 8), (64, 40), (3, 100)])
@pytest.mark.parametrize("target", [(3, 3), (5, 13), (16, 9), (1, 1)])
def test_constant_masks_stay_exactly_constant(size, target):
    zero, one = torch.zeros(2, *size), torch.ones(2, *size)
    assert torch.equal(resize_mask(zero, *target), torch.zeros(2, *target))
    assert torch.equal(resize_mask(one, *target), torch.ones(2, *target))


def test_whole_ratio_is_torch_area_mode():
    mask = torch.rand(2, 48, 64, generator=torch.Generator().manual_seed(0))
    expected = F.interpolate(mask[:, None], (6, 8), mode="area")[:, 0]
    torch.testing.assert_close(resize_mask(mask, 6, 8), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("source, target", [(5, 3), (7, 2), (9, 7), (512, 73)])
def test_fractional_ratio_is_the_overlap_integral(source, target):
    values = torch.rand(source, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    step = Fraction(source, target)
    expected = []
    for i in range(target):
        low, high = i * step, (i + 1) * step
        overlap = [max(Fraction(0), min(high, j + 1) - max(low, j)) for j in range(source)]
        expected.append(sum(float(o / step) * v.item() for o, v in zip(overlap, values)))
    row = resize_mask(values.view(1, 1, source), 1, target)[0, 0]
    column = resize_mask(values.view(1, source, 1), target, 1)[0, :, 0]
    torch.testing.assert_close(row, torch.tensor(expected), rtol=0, atol=1e-6)
    torch.testing.assert_close(column, row, rtol=0, atol=0)


def test_total_area_is_kept_when_shrinking():
    mask = (torch.rand(1, 101, 77, generator=torch.Generator().manual_seed(2)) > 0.6).float()
    assert resize_mask(mask, 13, 11).mean().item() == pytest.approx(mask.mean().item(), abs=1e-6)


def test_growing_is_bilinear_and_same_size_is_untouched():
    mask = torch.rand(1, 4, 6, generator=torch.Generator().manual_seed(3))
    expected = F.interpolate(mask[:, None], (10, 15), mode="bilinear", align_corners=False)[:, 0]
    torch.testing.assert_close(resize_mask(mask, 10, 15), expected, rtol=0, atol=1e-6)
    assert torch.equal(resize_mask(mask, 4, 6), mask)
    assert resize_mask(mask[0], 2, 3).shape == (1, 2, 3)


def test_refusals_name_the_shape():
    with pytest.raises(ValueError, match=r"\(1, 1, 4, 4\)"):
        resize_mask(torch.zeros(1, 1, 4, 4), 2, 2)
    with pytest.raises(ValueError, match="0x2"):
        resize_mask(torch.zeros(1, 4, 4), 0, 2)
