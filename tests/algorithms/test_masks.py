"""Mask resizing against closed forms and torch's own area mode where that is exact."""

from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F

from pastiche.nodes.algorithms.masks import boundary, feather_mask, grow_mask, resize_mask


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


def disc(radius, size=41):
    y, x = torch.meshgrid(torch.arange(size) - size // 2, torch.arange(size) - size // 2, indexing="ij")
    return (x * x + y * y <= radius * radius).float()[None]


@pytest.mark.parametrize("radius", [1, 2, 5, 13])
def test_growing_a_pixel_gives_the_disc(radius):
    assert torch.equal(grow_mask(disc(0), radius), disc(radius))


def test_shrinking_undoes_growing_of_a_disc_and_is_its_dual():
    mask = torch.rand(2, 21, 17, generator=torch.Generator().manual_seed(4))
    assert torch.equal(grow_mask(mask, -3), 1 - grow_mask(1 - mask, 3))
    assert torch.equal(grow_mask(disc(7), -7)[0, 20, 20], torch.tensor(1.0))
    assert grow_mask(disc(7), -8).sum() == 0
    assert torch.equal(grow_mask(mask, 0), mask)


def test_growing_beyond_the_image_and_at_its_border():
    assert torch.equal(grow_mask(disc(0, 5), 100), torch.ones(1, 5, 5))
    assert torch.equal(grow_mask(torch.ones(1, 6, 4), -2), torch.ones(1, 6, 4))


def test_soft_edges_move_and_stay():
    ramp = torch.linspace(0, 1, 11).expand(1, 11, 11).contiguous()
    torch.testing.assert_close(grow_mask(ramp, 2)[0, 5, :9], ramp[0, 5, 2:])


def test_feather_keeps_constants_and_centre_of_an_edge():
    assert torch.equal(feather_mask(torch.zeros(1, 9, 9), 4), torch.zeros(1, 9, 9))
    torch.testing.assert_close(feather_mask(torch.ones(2, 9, 9), 4), torch.ones(2, 9, 9))
    edge = torch.zeros(1, 40, 40)
    edge[..., 20:] = 1
    soft = feather_mask(edge, 6)[0, 20]
    assert (soft.diff() >= 0).all() and soft[:8].max() < 0.01 and soft[32:].min() > 0.99
    torch.testing.assert_close(soft[19] + soft[20], torch.tensor(1.0))
    assert torch.equal(feather_mask(edge, 0), edge)


@pytest.mark.parametrize("pixels", [0.5, 1, 2, 4, 5])
def test_feather_is_scipys_gaussian_of_half_the_width(pixels):
    ndimage = pytest.importorskip("scipy.ndimage")
    mask = (torch.rand(2, 21, 17, generator=torch.Generator().manual_seed(0)) > 0.6).double()
    expected = [ndimage.gaussian_filter(one.numpy(), pixels / 2, mode="nearest", radius=max(1, round(1.5 * pixels))) for one in mask]
    torch.testing.assert_close(feather_mask(mask, pixels), torch.stack([torch.from_numpy(one) for one in expected]))


def test_contour_is_inside_and_thin():
    shape = disc(10) > 0
    line = boundary(shape, 1)
    assert (line & ~shape).sum() == 0 and line[0, 20, 10] and not line[0, 20, 12]
    assert not boundary(torch.ones(1, 5, 5, dtype=torch.bool)).any()


@pytest.mark.parametrize("radius", [1, 5, 6, 13, 40])
def test_growing_is_the_largest_within_the_disc(radius):
    mask = torch.rand(2, 17, 23, generator=torch.Generator().manual_seed(radius))
    expected = mask.clone()
    for y in range(-16, 17):
        for x in range(-22, 23):
            if x * x + y * y <= radius * radius:
                moved = torch.full_like(mask, -torch.inf)
                moved[:, max(0, y) : 17 + min(0, y), max(0, x) : 23 + min(0, x)] = mask[:, max(0, -y) : 17 - max(0, y), max(0, -x) : 23 - max(0, x)]
                expected = torch.maximum(expected, moved)
    assert torch.equal(grow_mask(mask, radius), expected)


def test_growing_can_be_cancelled():
    calls = []

    def cancel():
        calls.append(0)
        if len(calls) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        grow_mask(torch.rand(1, 64, 64), -20, cancel)
