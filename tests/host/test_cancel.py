"""Cancel is looked at within every loop over what a user gives: objects, boxes, steps, rows of a disc, layers of LoRAs."""

import comfy.model_management
import pytest
import torch
from support.models import tiny_cond, tiny_unet
from support.sampling import random_latent, schedule
from support.styles import random_lora
from test_fastsam import DOOR, HOUSE, TREE, Drawn

from pastiche.nodes.algorithms.prompts import Boxes
from pastiche.nodes.host.fastsam import text as fastsam_text
from pastiche.nodes.host.fastsam.model import FastSAM
from pastiche.nodes.host.fastsam.prompt import BOXES_AT_ONCE, Finish, Prompt, choose, prompt_masks
from pastiche.nodes.host.features.capture import capture
from pastiche.nodes.host.features.library import load_bank, register_folder, save_bank
from pastiche.nodes.host.multistyle.lora_batch import BatchedStyles
from pastiche.nodes.host.multistyle.sources import lora_patches
from pastiche.nodes.host.trajectories.inversion import invert


@pytest.fixture
def looks(monkeypatch):
    """How often Cancel was looked at; from the number in `looks.limit` on, it is pressed."""

    class Looks:
        count, limit = 0, 10**9

    def look():
        Looks.count += 1
        if Looks.count > Looks.limit:
            raise comfy.model_management.InterruptProcessingException()

    monkeypatch.setattr(comfy.model_management, "throw_exception_if_processing_interrupted", look)
    return Looks


def stops(looks, action, least):
    """`action` looks at Cancel at least so often, and ends at once wherever it is pressed."""
    looks.count, looks.limit = 0, 10**9
    action()
    total = looks.count
    assert total >= least
    for limit in {0, total // 2, total - 1}:
        looks.count, looks.limit = 0, limit
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            action()
        assert looks.count == limit + 1


@pytest.fixture
def segmenter():
    return FastSAM("drawn", Drawn(HOUSE, DOOR, TREE))


def test_images_objects_and_discs(looks):
    images = torch.rand(2, 64, 64, 3)
    prompt = Prompt(mode="everything")
    stops(looks, lambda: prompt_masks(FastSAM("drawn", Drawn(HOUSE, DOOR, TREE)), images, prompt, Finish(grow=9)), 2 * (1 + 3 + 10))


def test_boxes(looks, segmenter):
    image = torch.rand(64, 64, 3)
    segments = segmenter.segment(image)
    boxes = tuple((float(i % 60), 0.0, i % 60 + 4.0, 8.0) for i in range(5 * BOXES_AT_ONCE))
    stops(looks, lambda: choose(segments, image, 0, Prompt(boxes=(Boxes((boxes,)),))), 5)


def test_crops_for_a_clip(looks, segmenter, monkeypatch):
    class Encoder:
        size, mean = 8, (0.5, 0.5, 0.5)

        def embed_images(self, images):
            return torch.ones(len(images), 4)

        def embed_texts(self, texts):
            return torch.ones(len(texts), 4)

    image = torch.rand(64, 64, 3)
    segments = segmenter.segment(image)
    monkeypatch.setattr(fastsam_text, "AT_ONCE", 1)
    stops(looks, lambda: fastsam_text.choose_by_text(segments, image, ["a"], Encoder(), 1), 3)


def test_steps_of_a_feature_file(looks):
    register_folder()
    model = tiny_unet()
    trajectory = invert(model, {"samples": random_latent()}, schedule(model, 3), tiny_cond(model), "next")[1]
    bank = capture(model, trajectory, "h_space", "auto", "ram")
    stops(looks, lambda: save_bank(bank, "cancelled"), 3)
    path = save_bank_whole(looks, bank)
    assert not list(path.parent.glob("*.partial"))
    stops(looks, lambda: load_bank(path.name, "ram", model), 3)


def save_bank_whole(looks, bank):
    looks.count, looks.limit = 0, 10**9
    return save_bank(bank, "whole")


def test_layers_of_loras(looks):
    model = tiny_unet()
    patches = lora_patches(model, random_lora(model, 0), "ink")
    stops(looks, lambda: BatchedStyles(model.model, [patches], [1.0], ["ink"], torch.device("cpu"), torch.float32), len(patches))
