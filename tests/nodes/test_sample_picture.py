"""PasticheSamplePicture: every sample is there, as the file has it, and shows in the browser in its own size."""

import numpy as np
import pytest
import torch
from PIL import Image

from pastiche.nodes.host import samples
from pastiche.nodes.samples import SamplePicture


@pytest.mark.parametrize("name", samples.SAMPLES)
def test_picture_and_mask(repository, name):
    image, mask = SamplePicture.execute(name).args
    with Image.open(repository / "assets" / "samples" / samples.SAMPLES[name]) as file:
        assert image.shape == (1, file.height, file.width, 3) and image.dtype == torch.float32
        assert np.array_equal((image[0] * 255).round().to(torch.uint8).numpy(), np.asarray(file.convert("RGB")))
    assert mask.shape == image.shape[:3] and set(mask.unique().tolist()) <= {0.0, 1.0}
    assert bool(mask.any()) == (name in samples.SUBJECTS)


def test_the_cup_is_marked():
    _, mask = SamplePicture.execute("coffee").args
    assert mask[0, 130, 270] == 1  # the coffee
    assert mask[0, 10, 10] == mask[0, 390, 590] == 0  # floor and table


def test_choices_are_the_samples():
    schema = SamplePicture.GET_SCHEMA()
    assert schema.inputs[0].options == list(samples.SAMPLES)
    assert [output.io_type for output in schema.outputs] == ["IMAGE", "MASK"]  # LoadImage's, which may take its place


def test_unknown_name_is_a_sentence():
    with pytest.raises(ValueError, match="no sample 'tea'; there are coffee"):
        SamplePicture.execute("tea")


@pytest.mark.parametrize("name", samples.SAMPLES)
def test_the_browser_shows_the_same_picture(repository, name):
    """Otherwise run tools/make_sample_previews.py. The picker's marks are pixels: the sizes must agree."""
    with Image.open(repository / "js" / "samples" / f"{name}.jpg") as shown, Image.open(repository / "assets" / "samples" / samples.SAMPLES[name]) as file:
        assert shown.size == file.size
        difference = np.asarray(shown.convert("RGB"), np.float64) - np.asarray(file.convert("RGB"), np.float64)
    assert np.abs(difference).mean() < 16  # another picture differs by 60 and more


def test_every_sample_has_a_source(repository):
    licences = (repository / "assets" / "samples" / "LICENSES.md").read_text()
    for path in (repository / "assets" / "samples").glob("*.[jp][pn]g"):
        assert path.name in licences
