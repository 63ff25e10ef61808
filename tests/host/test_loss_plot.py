"""The loss plot, pixel by pixel: where its lines, numbers and points lie."""

import math

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

from pastiche.nodes.host.training.plot import _place, _round_up, loss_plot

WIDTH, HEIGHT = 768, 432
LEFT, RIGHT, UPPER, LOWER = 72, 752, 40, 384  # the axes
INK, GRID, POINT, MEAN = (60, 60, 60), (225, 225, 225), (150, 175, 215), (205, 80, 30)


def pixels(losses, window=20):
    picture = loss_plot(losses, window)
    assert picture.shape == (1, HEIGHT, WIDTH, 3) and picture.dtype == torch.float32 and picture.max() == 1
    return (picture[0] * 255).round().byte().numpy()


def written(*texts):
    """White paper with (x, y), text, colour, anchor."""
    picture = Image.new("RGB", (WIDTH, HEIGHT), (255, 255, 255))
    for place, text, colour, anchor in texts:
        ImageDraw.Draw(picture).text(place, text, fill=colour, font=ImageFont.load_default(size=14), anchor=anchor)
    return np.asarray(picture)


def scale(top):
    return written(*(((LEFT - 8, LOWER - (LOWER - UPPER) * part / 4), f"{top * part / 4:.3g}", INK, "rm") for part in range(5)))


def is_colour(picture, colour):
    return (picture == np.array(colour)).all(-1)


@pytest.mark.parametrize("value, expected", [
    (0.7, 0.8), (0.11, 0.2), (3, 4), (4.5, 5), (6, 8), (9, 10), (1, 1), (2, 2), (40, 40), (0.05, 0.05), (1234, 2000), (90, 100),
    (0, 1), (-1, 1), (math.nan, 1), (math.inf, 1),
])
def test_the_top_is_the_next_round_number(value, expected):
    assert _round_up(value) == pytest.approx(expected, rel=1e-12)


def test_losses_run_from_edge_to_edge():
    assert _place(0, 0.0, 11, 2.0) == (LEFT, LOWER) and _place(10, 2.0, 11, 2.0) == (RIGHT, UPPER)
    assert _place(5, 1.0, 11, 2.0) == ((LEFT + RIGHT) / 2, (LOWER + UPPER) / 2)
    assert _place(0, 1.0, 1, 2.0)[0] == LEFT and _place(1, 1.0, 2, 2.0)[0] == RIGHT


def test_lines_and_numbers():
    found = pixels([0.25] * 61)
    lines = is_colour(found, GRID)
    assert np.flatnonzero(lines[:, 300]).tolist() == [UPPER, 126, 212, 298, LOWER]
    assert np.flatnonzero(lines[UPPER]).tolist() == list(range(LEFT, RIGHT + 1))
    assert (found[:, :LEFT - 3] == scale(0.4)[:, :LEFT - 3]).all()
    below = written(*(((x, LOWER + 8), text, INK, "mt") for x, text in ((LEFT, "1"), (412, "31"), (RIGHT, "61"))), ((RIGHT, 422), "step", INK, "rb"))
    assert (found[LOWER + 6 :] == below[LOWER + 6 :]).all()
    above = written(((LEFT, 12), "loss of every step", POINT, "la"), ((LEFT + 160, 12), "mean of the last 20", MEAN, "la"))
    assert (found[: UPPER - 4, LEFT - 4 :] == above[: UPPER - 4, LEFT - 4 :]).all()


def test_every_loss_is_a_point_and_the_mean_a_line():
    losses = [1.0, 3.0, 1.0, 3.0, 1.0]  # means of two: 1, 2, 2, 2, 2
    found = pixels(losses, 2)
    rows, columns = np.nonzero(is_colour(found[: LOWER + 4, LEFT + 100 :], POINT))
    points = {(int(column) + LEFT + 100, int(row)) for row, column in zip(rows, columns) if row >= UPPER - 4}
    for x, y in ((LEFT + 170, 126), (412, 298), (LEFT + 510, 126)):
        near = {(column, row) for column, row in points if abs(column - x) < 20 and abs(row - y) < 20}
        assert {column - x for column, _ in near} == {row - y for _, row in near} == {-2, -1, 0, 1, 2}
    line = is_colour(found, MEAN)
    rows = np.flatnonzero(line[UPPER:, 300]) + UPPER
    assert len(rows) == 2 and 212 in rows
    assert line[296:301, LEFT : LEFT + 4].any() and not line[:, LEFT - 8 : LEFT - 2].any()


def test_the_top_is_what_98_of_100_losses_stay_below():
    assert (pixels([1.0] * 98 + [3.0] * 2, 100)[:, :LEFT - 3] == scale(2)[:, :LEFT - 3]).all()
    assert (pixels([1.0] * 97 + [3.0] * 3, 100)[:, :LEFT - 3] == scale(4)[:, :LEFT - 3]).all()


def test_points_above_the_picture_are_left_out():
    found = pixels([1.0] * 99 + [2.5], 100)  # the top is 2
    assert not is_colour(found[30 : UPPER - 3], POINT).any() and not is_colour(found[UPPER - 3 : 200], POINT).any()
    found = pixels([1.0] * 50 + [2.01] + [1.0] * 49, 100)  # two pixels above it
    assert is_colour(found[UPPER - 4 : UPPER], POINT).any()
