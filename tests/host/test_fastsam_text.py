"""Text ranking with tiny random CLIPs, against embeddings and cosines computed by hand."""

import json
import math
import shutil
import types

import comfy.clip_vision
import comfy.sd
import comfy.sd1_clip
import folder_paths
import pytest
import torch

from pastiche.nodes.host.fastsam import text as fastsam_text
from pastiche.nodes.host.fastsam.model import FastSAM
from pastiche.nodes.host.fastsam.prompt import Finish, Prompt, prompt_masks
from pastiche.nodes.host.fastsam.text import CoreEncoder, FolderEncoder
from test_fastsam import DOOR, HOUSE, TREE, Drawn

SIZE, WIDTH = 32, 24
PHRASES = ("red house", "tree", "ab", "door house", "a b tree")


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """A transformers CLIP of 32 px with a vocabulary of letters, in its folder layout."""
    from transformers import CLIPConfig, CLIPModel

    folder = tmp_path_factory.mktemp("clip") / "tiny-clip"
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    words = letters + [letter + "</w>" for letter in letters] + ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: number for number, word in enumerate(words)}
    torch.manual_seed(5)
    layers = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "initializer_factor": 4.0}
    text = {"vocab_size": len(words), "hidden_size": 16, "bos_token_id": len(words) - 2, "eos_token_id": len(words) - 1, **layers}
    vision = {"hidden_size": 16, "image_size": SIZE, "patch_size": 8, **layers}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=WIDTH)).eval().save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CLIPTokenizer", "model_max_length": 77}))
    return folder


@pytest.fixture
def image():
    return torch.rand(64, 64, 3, generator=torch.Generator().manual_seed(3))


def crop_by_hand(image, rectangle, mean):
    """The rectangle on a square of the mean, at the CLIP's size. Masks of `Drawn` lack some corner pixels."""
    segments = FastSAM("drawn", Drawn(rectangle)).segment(image)
    mask = fastsam_text.render_masks(segments)[0]
    rows, columns = torch.where(mask)
    top, bottom, left, right = rows.min(), rows.max() + 1, columns.min(), columns.max() + 1
    height, width = int(bottom - top), int(right - left)
    side = max(height, width)
    square = torch.tensor(mean).repeat(side, side, 1)
    for y in range(height):
        for x in range(width):
            if mask[top + y, left + x]:
                square[(side - height) // 2 + y, (side - width) // 2 + x] = image[top + y, left + x]
    resized = torch.nn.functional.interpolate(square.permute(2, 0, 1)[None], (SIZE, SIZE), mode="bicubic", antialias=True)
    return resized.clamp(0, 1)


def cosine(a, b):
    a, b = a.double().flatten().tolist(), b.double().flatten().tolist()
    return sum(x * y for x, y in zip(a, b)) / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))


def test_ranking_with_a_folder_is_exact(clip_folder, image):
    from transformers import AutoTokenizer, CLIPModel

    model, tokenizer = CLIPModel.from_pretrained(clip_folder).eval(), AutoTokenizer.from_pretrained(clip_folder)
    encoder = FolderEncoder(str(clip_folder))
    segments = FastSAM("drawn", Drawn(HOUSE, DOOR, TREE)).segment(image)
    assert len(segments) == 3
    order = (HOUSE, TREE, DOOR)  # largest first
    mean, deviation = torch.tensor(encoder.mean), torch.tensor(encoder.deviation)
    winners = set()
    for phrase in PHRASES:
        with torch.no_grad():
            text = model(input_ids=tokenizer(phrase, return_tensors="pt").input_ids, pixel_values=torch.zeros(1, 3, SIZE, SIZE))
            expected = []
            for rectangle in order:
                pixels = (crop_by_hand(image, rectangle, encoder.mean) - mean.view(3, 1, 1)) / deviation.view(3, 1, 1)
                vision = model(input_ids=torch.zeros(1, 1, dtype=torch.long), pixel_values=pixels)
                expected.append(cosine(text.text_embeds, vision.image_embeds))
        ranking = sorted(range(3), key=lambda i: -expected[i])
        assert fastsam_text.choose_by_text(segments, image, [phrase], encoder, 3) == ranking
        assert fastsam_text.choose_by_text(segments, image, [phrase], encoder, 1) == ranking[:1]
        winners.add(ranking[0])
    assert len(winners) > 1, "the phrases should not all choose the same object"


def test_padding_of_several_phrases_changes_nothing(clip_folder):
    encoder = FolderEncoder(str(clip_folder))
    together = encoder.embed_texts(list(PHRASES))
    apart = torch.cat([encoder.embed_texts([phrase]) for phrase in PHRASES])
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-5)


def test_prompt_with_a_folder_loads_it_once(clip_folder, image, monkeypatch):
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", dict(folder_paths.folder_names_and_paths))
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    folder_paths.folder_names_and_paths["text_encoders"] = ([str(clip_folder.parent)], {".safetensors"})
    assert "tiny-clip" in fastsam_text.list_clip_folders()
    sam = FastSAM("drawn", Drawn(HOUSE, DOOR, TREE))
    prompt = Prompt(phrases=("tree", "red house"), count=2)
    first = prompt_masks(sam, image[None], prompt, Finish(merge=False), encoder=sam.text_encoder(folder="tiny-clip"))
    loaded = sam._clip[1]
    second = prompt_masks(sam, image[None], prompt, Finish(merge=False), encoder=sam.text_encoder(folder="tiny-clip"))
    assert sam._clip[1] is loaded and torch.equal(first.masks, second.masks) and len(first.masks) >= 2


@pytest.mark.parametrize("name", ["../tiny-clip", "/etc", "absent", ""])
def test_folders_outside_comfyui_are_refused(name):
    with pytest.raises(ValueError, match="not under models/text_encoders"):
        fastsam_text.find_clip_folder(name)


def test_incomplete_folder(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    with pytest.raises(ValueError, match="no complete CLIP folder"):
        FolderEncoder(str(tmp_path))


# ---- core's sockets ----


def core_pair(text_width=16, image_width=None):
    """CLIP_VISION and CLIP objects of ComfyUI's own classes, tiny and random."""
    torch.manual_seed(7)
    layers = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "hidden_act": "quick_gelu"}
    vision = comfy.clip_vision.ClipVisionModel(
        {"hidden_size": 16, "image_size": SIZE, "patch_size": 8, "num_channels": 3, "projection_dim": image_width or text_width,
         "model_type": "clip_vision_model", **layers}
    )
    target = types.SimpleNamespace(params={}, clip=comfy.sd1_clip.SD1ClipModel, tokenizer=comfy.sd1_clip.SD1Tokenizer)
    clip = comfy.sd.CLIP(target, model_options={"clip_l_model_config": {"hidden_size": text_width, **layers}})
    for model in (vision.model, clip.cond_stage_model):
        for name, parameter in model.named_parameters():
            if name.endswith("logit_scale"):
                continue
            value = torch.ones_like(parameter) if "norm" in name and name.endswith("weight") else 0.3 * torch.randn_like(parameter)
            parameter.data.copy_(value)
    return vision, clip


def test_ranking_with_cores_sockets_is_exact(image):
    vision, clip = core_pair()
    encoder = CoreEncoder(vision, clip)
    segments = FastSAM("drawn", Drawn(HOUSE, DOOR, TREE)).segment(image)
    projection = clip.cond_stage_model.clip_l.transformer.text_projection.weight
    for phrase in PHRASES:
        text = clip.cond_stage_model.clip_l.transformer  # the text model itself, beside all of CLIP's own code
        tokens = torch.tensor([[token for token, _ in clip.tokenize(phrase)["l"][0]]])
        with torch.no_grad():
            pooled = text.text_model(tokens)[2].float()
        expected = []
        for rectangle in (HOUSE, TREE, DOOR):
            crop = crop_by_hand(image, rectangle, encoder.mean)
            expected.append(cosine(pooled @ projection.float().T, vision.encode_image(crop.permute(0, 2, 3, 1))["image_embeds"]))
        assert fastsam_text.choose_by_text(segments, image, [phrase], encoder, 3) == sorted(range(3), key=lambda i: -expected[i])


def test_halves_of_different_clips():
    vision, clip = core_pair(text_width=16, image_width=24)
    with pytest.raises(ValueError, match="16 numbers and clip_vision of 24.*Fitting pairs"):
        CoreEncoder(vision, clip).embed_texts(["tree"])


@pytest.mark.parametrize("spread", [0.0, 1e6, None])
def test_text_encoder_without_its_projection(spread):
    vision, clip = core_pair()
    weight = clip.cond_stage_model.clip_l.transformer.text_projection.weight
    weight.data = torch.eye(len(weight)) if spread is None else spread * torch.randn(weight.shape)
    with pytest.raises(ValueError, match="no text projection"):
        CoreEncoder(vision, clip).embed_texts(["tree"])


def test_half_a_clip():
    vision, clip = core_pair()
    sam = FastSAM("drawn", Drawn(HOUSE))
    with pytest.raises(ValueError, match="clip is not connected"):
        sam.text_encoder(vision, None)
    with pytest.raises(ValueError, match="clip_vision is not connected"):
        sam.text_encoder(None, clip)
    assert sam.text_encoder() is None


@pytest.mark.parametrize("file, content, message", [
    ("config.json", '{"vision_config": {"num_hidden_layers": 1000000000}}', "num_hidden_layers is more than any CLIP has"),
    ("config.json", '{"text_config": {"hidden_size": 1000000000000}}', "hidden_size is more than any CLIP has"),
    ("config.json", "[" * 3000, "config.json cannot be read"),
    ("config.json", "[]", "not an object"),
    ("preprocessor_config.json", '{"image_mean": "x"}', "image_mean and image_std must be three numbers"),
    ("preprocessor_config.json", '{"image_std": [0, 0, 0]}', "image_mean and image_std must be three numbers"),
    ("model.safetensors", "<html>", "no complete CLIP folder"),
])
def test_a_hostile_clip_folder_is_told(clip_folder, tmp_path, file, content, message):
    folder = tmp_path / "clip"
    shutil.copytree(clip_folder, folder)
    (folder / file).write_text(content)
    with pytest.raises(ValueError, match=message):
        FolderEncoder(str(folder))


def test_embeddings_that_are_nan_are_told(image):
    class Blind:
        size, mean = SIZE, (0.5, 0.5, 0.5)

        def embed_images(self, images):
            return torch.full((len(images), 4), float("nan"))

        def embed_texts(self, texts):
            return torch.ones(len(texts), 4)

    segments = FastSAM("drawn", Drawn(HOUSE)).segment(image)
    with pytest.raises(ValueError, match="clip_vision: holds NaN"):
        fastsam_text.choose_by_text(segments, image, ["house"], Blind(), 1)
