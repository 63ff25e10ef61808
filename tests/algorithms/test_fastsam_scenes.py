"""The drawn scenes that stand in for photos with known masks."""

import numpy as np
import pytest
from support import segmenters

drawing = segmenters.scenes()


@pytest.mark.parametrize("seed", range(4))
def test_scene_is_its_masks(seed):
    scene = drawing.draw_scene(seed, 90, 120)
    again = drawing.draw_scene(seed, 90, 120)
    assert np.array_equal(scene.image, again.image) and np.array_equal(scene.masks, again.masks)
    assert scene.image.shape == (90, 120, 3) and 0 <= scene.image.min() and scene.image.max() <= 1
    assert scene.masks.sum(0).max() <= 1, "masks overlap"
    assert 1 <= len(scene.masks) <= 7
    for mask, (x1, y1, x2, y2) in zip(scene.masks, scene.boxes().astype(int)):
        assert mask[y1:y2, x1:x2].sum() == mask.sum()
        x, y = drawing.inner_point(mask)
        assert mask[y, x]
        neighbours = mask[max(0, y - 1) : y + 2, max(0, x - 1) : x + 2]
        assert neighbours.all(), "an inner point lies away from the edge"


def test_seeds_differ():
    assert not np.array_equal(drawing.draw_scene(0).image, drawing.draw_scene(1).image)
