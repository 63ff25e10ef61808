"""Painted photos: what the mini models learn brush strokes from."""
import numpy as np
import pytest
from mini_training import strokes


@pytest.fixture(scope="module")
def photo():
    """A bright disk on a dark ground, (48, 64, 3)."""
    y, x = np.mgrid[0:48, 0:64]
    disk = (y - 24) ** 2 + (x - 32) ** 2 < 15**2
    return np.where(disk[..., None], np.array([210, 160, 60]), np.array([40, 60, 90])).astype(np.uint8)


def in_manner(monkeypatch, **changes):
    plain = dict(kind="brush", width=6.0, length=3.0, layers=2, bristles=0.0, jitter=0.0, saturation=1.0, contrast=1.0, flow=0.0,
                 angle=0.0, swirl=0.0, relief=0.0, inks=0, paper=None)
    monkeypatch.setattr(strokes, "manner", lambda rng: {**plain, **changes})


def test_a_seed_says_the_picture(photo):
    first, again, other = (strokes.paint(photo, np.random.default_rng(seed)) for seed in (3, 3, 4))
    assert first.shape == photo.shape and first.dtype == np.uint8
    assert np.array_equal(first, again) and not np.array_equal(first, other)


@pytest.mark.parametrize("kind", ["brush", "dots"])
def test_the_picture_stays_recognisable(photo, monkeypatch, kind):
    """Without jitter the strokes have the photo's colours; a few pixels between them show the ground."""
    in_manner(monkeypatch, kind=kind, length=3.0 if kind == "brush" else 0.0)
    painted = strokes.paint(photo, np.random.default_rng(0)).astype(float)
    for place in (np.s_[20:28, 28:36], np.s_[:8, :8]):
        assert np.abs(np.median(painted[place] - photo[place], axis=(0, 1))).max() < 3


def test_strokes_run_along_the_flow(photo, monkeypatch):
    """On a flat ground with bristles, the picture changes less along the strokes' direction than across it."""
    flat = np.full((64, 64, 3), 128, np.uint8)
    for angle, along, across in ((0.0, 1, 0), (np.pi / 2, 0, 1)):  # rows run along x at angle 0
        in_manner(monkeypatch, layers=1, length=8.0, flow=1.0, angle=angle, bristles=0.15)
        painted = strokes.paint(flat, np.random.default_rng(0)).astype(float)
        change = [np.abs(np.diff(painted, axis=axis)).mean() for axis in (0, 1)]
        assert change[along] < 0.6 * change[across]


def test_hatching_is_denser_in_the_dark(monkeypatch):
    halves = np.concatenate([np.full((64, 32, 3), 30, np.uint8), np.full((64, 32, 3), 230, np.uint8)], 1)
    in_manner(monkeypatch, kind="hatching", width=2.0, length=8.0, layers=1, paper=np.ones(3))
    painted = strokes.paint(halves, np.random.default_rng(0)).mean(-1)
    bare = painted > 160
    assert bare[:, 4:28].mean() < 0.02 and 0.1 < bare[:, 36:60].mean() < 0.9
