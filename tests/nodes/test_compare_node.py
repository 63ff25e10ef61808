"""PasticheCompare: both pictures reach the browser as they are."""

import numpy as np
import torch
from PIL import Image

from pastiche.nodes.compare import ComparePictures
from pastiche.nodes.host.compare import KEY


def test_two_files_the_first_of_each_batch(generator):
    import folder_paths

    before, after = torch.rand(2, 16, 24, 3, generator=generator), torch.rand(3, 32, 48, 3, generator=generator)
    shown = ComparePictures.execute(before, after).ui[KEY]
    assert len(shown) == 2 and shown[0]["filename"] != shown[1]["filename"]
    for entry, images in zip(shown, (before, after)):
        assert entry["type"] == "temp"
        with Image.open(f"{folder_paths.get_temp_directory()}/{entry['subfolder']}/{entry['filename']}") as file:
            assert np.abs(np.asarray(file) / 255.0 - images[0].numpy()).max() <= 1 / 255
