"""Overlays of objects, pixel by pixel on hand-made masks."""

import pytest
import torch
from pastiche.nodes.algorithms.overlay import draw_overlay, label_map, paint_layers, palette, tint


def mask(top, bottom, left, right, size=64):
    drawn = torch.zeros(size, size, dtype=torch.bool)
    drawn[top:bottom, left:right] = True
    return drawn


LARGE, INSIDE, ELSEWHERE = mask(8, 40, 8, 40), mask(20, 32, 20, 32), mask(44, 60, 4, 20)


@pytest.fixture
def layers():
    return paint_layers(iter((LARGE, INSIDE, ELSEWHERE)), 64, 64)


def test_later_objects_lie_on_earlier_ones(layers):
    expected = LARGE.long()
    expected[INSIDE], expected[ELSEWHERE] = 2, 3
    assert torch.equal(layers.labels, expected)
    assert torch.equal(label_map(layers), torch.cat([torch.zeros(1, 3), palette(3)])[expected])


def test_outlines_are_the_objects_own_outermost_pixels(layers):
    expected = torch.zeros(64, 64, dtype=torch.long)
    inner = mask(9, 39, 9, 39), mask(21, 31, 21, 31), mask(45, 59, 5, 19)
    for number, drawn in enumerate((LARGE, INSIDE, ELSEWHERE)):
        expected[drawn & ~inner[number]] = number + 1
    assert torch.equal(layers.contours, expected)


def test_anchors_are_the_middles(layers):
    odd = paint_layers(iter((mask(10, 21, 30, 35), torch.zeros(64, 64, dtype=torch.bool))), 64, 64)
    assert odd.anchors == [(32, 15), None]
    assert len(layers.anchors) == 3


def test_the_final_mask_is_bright_tinted_and_outlined(layers):
    image = torch.full((64, 64, 3), 0.5)
    final = LARGE.float()
    final[48:60, 40:60] = 1  # where no object is
    final[[52, 62]] = 0.5  # half inside is outside
    picture, colours = draw_overlay(image, layers, final), palette(3)
    expected = {
        (14, 14): 0.65 * 0.5 + 0.35 * colours[0], (25, 25): 0.65 * 0.5 + 0.35 * colours[1],  # inside
        (20, 25): colours[1], (44, 10): colours[2],  # outlines of objects
        (8, 20): torch.ones(3), (48, 50): torch.ones(3),  # outlines of the final mask
        (54, 50): torch.full((3,), 0.5), (50, 10): torch.full((3,), 0.25), (2, 2): torch.full((3,), 0.25),
        (62, 30): torch.full((3,), 0.375), (52, 10): torch.full((3,), 0.375),
    }
    for (row, column), colour in expected.items():
        torch.testing.assert_close(picture[row, column], colour, msg=f"at {row}, {column}: {picture[row, column]}, not {colour}")
    assert torch.equal(image, torch.full((64, 64, 3), 0.5))


def test_a_tint_is_see_through_and_its_outline_white():
    final = LARGE.float()
    final[50] = 0.5  # half inside is outside
    picture = tint(final)
    assert picture.shape == (64, 64, 4) and torch.equal(picture[8, 20], torch.ones(4))
    torch.testing.assert_close(picture[20, 20], torch.cat([palette(1)[0], torch.tensor([0.45])]))
    assert not picture[2, 2, 3]
    torch.testing.assert_close(picture[50, 20], torch.cat([palette(1)[0], torch.tensor([0.225])]))


@pytest.mark.parametrize("size, line", [(64, 1), (500, 1), (700, 2), (1050, 3)])
def test_outlines_are_a_pixel_for_350(size, line):
    layers = paint_layers(iter((mask(100 if size > 64 else 20, size - 20, 20, size - 20, size),)), size, size)
    column = layers.contours[:, size // 2]
    assert int(column.sum()) == 2 * line


def test_the_first_colours_do_not_depend_on_the_count_and_none_is_alike():
    assert torch.equal(palette(40)[:3], palette(3)) and palette(0).shape == (0, 3)
    distance = torch.cdist(palette(12), palette(12)) + torch.eye(12)
    assert distance.min() > 0.15 and palette(40).min() >= 0 and palette(40).max() <= 1
