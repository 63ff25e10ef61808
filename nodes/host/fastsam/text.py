"""Text prompts: a CLIP of the user's choice embeds the objects' crops and the phrases."""

from __future__ import annotations

import json
import os
from typing import Any, Protocol

import comfy.model_management
import folder_paths
import torch
from safetensors import SafetensorError
from torch import Tensor

from ...algorithms.segments import Segments, crop_objects, rank_by_similarity, render_masks
from ..checks import check_tensor
from ..whole_models import WholeModelPatcher

FOLDERS = ("text_encoders", "clip_vision")
NO_FOLDER = "none"
WEIGHTS = "model.safetensors"
LARGEST_JSON, MOST_LAYERS, MOST_SIZE = 1 << 20, 256, 1 << 20
AT_ONCE = 16  # crops embedded together


class PairEncoder(Protocol):
    """A CLIP: size (pixels of its square input), mean (RGB, what it sees as nothing), and two embeddings."""

    size: int
    mean: tuple[float, float, float]

    def embed_images(self, images: Tensor) -> Tensor:
        """(K, size, size, 3) in 0..1 -> (K, D)."""

    def embed_texts(self, texts: list[str]) -> Tensor:
        """T phrases -> (T, D)."""


def choose_by_text(segments: Segments, image: Tensor, phrases: list[str], encoder: PairEncoder, count: int) -> list[int]:
    """Objects whose crops are most similar to each phrase, `count` a phrase. image (H, W, 3)."""
    if not len(segments):
        return []
    fill = torch.tensor(encoder.mean, dtype=torch.float32)
    embedded = []
    for start in range(0, len(segments), AT_ONCE):
        comfy.model_management.throw_exception_if_processing_interrupted()
        part = list(range(start, min(start + AT_ONCE, len(segments))))
        masks = render_masks(segments, part).cpu()
        masks[~masks.any(2).any(1)] = True  # nothing left at full size: the whole image, which fits no phrase well
        embedded.append(encoder.embed_images(crop_objects(image[..., :3].cpu().float(), masks, encoder.size, fill)).cpu())
    images, texts = torch.cat(embedded), encoder.embed_texts(phrases).cpu()
    for name, vectors in (("clip_vision", images), ("clip", texts)):
        check_tensor(vectors, name, "Its weights are damaged, or overflow in half precision.")
    return rank_by_similarity(images, texts, count)


class CoreEncoder:
    """Core's CLIP_VISION and CLIP sockets, where both project into one space."""

    def __init__(self, clip_vision, clip):
        self.clip_vision, self.clip = clip_vision, clip
        self.size = clip_vision.image_size
        self.mean = tuple(clip_vision.image_mean)

    def embed_images(self, images: Tensor) -> Tensor:
        return self.clip_vision.encode_image(images)["image_embeds"]

    def embed_texts(self, texts: list[str]) -> Tensor:
        pooled = [self.clip.encode_from_tokens(self.clip.tokenize(text), return_pooled="unprojected")[1] for text in texts]
        if any(vector is None for vector in pooled):
            raise ValueError("clip: this text encoder gives no sentence embedding (T5 and the like); connect a CLIP.")
        vectors = torch.cat([vector.float() for vector in pooled])
        projected = vectors @ self._projection(vectors.shape[1]).to(vectors).T
        width = getattr(getattr(self.clip_vision.model, "visual_projection", None), "out_features", None)
        if width and width != projected.shape[1]:
            raise ValueError(
                f"clip gives embeddings of {projected.shape[1]} numbers and clip_vision of {width}: not the two halves of one "
                "CLIP. Fitting pairs: CLIP-L with ViT-L/14, OpenCLIP-H with ViT-H, OpenCLIP-bigG with ViT-bigG."
            )
        return projected

    def _projection(self, width: int) -> Tensor:
        """The text projection whose input fits the sentence embedding.

        Core leaves it out of the pooled output of SD1's CLIP, and leaves its weight unset when the file
        has none, as SD1.x checkpoints; an unset one has no plausible spread.
        """
        for name, module in self.clip.cond_stage_model.named_modules():
            weight = getattr(module, "weight", None)
            if name.endswith("text_projection") and weight is not None and weight.shape[1] == width:
                spread = weight.detach().float().std().item()
                identity = torch.equal(weight.detach().float().cpu(), torch.eye(*weight.shape))
                if not identity and 1e-3 < spread < 1:
                    return weight.detach()
        raise ValueError(
            "clip: this text encoder has no text projection (SD1.x checkpoints leave it out), so its text cannot be "
            "compared with images. Load a complete CLIP with core's Load CLIP, or choose a clip_folder."
        )


class FolderEncoder:
    """A CLIP folder in transformers' layout: config.json, model.safetensors, tokenizer files."""

    def __init__(self, path: str):
        from transformers import AutoTokenizer, CLIPModel

        _check_config(path)
        try:
            model = CLIPModel.from_pretrained(path, local_files_only=True, use_safetensors=True)
            self.tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
            if comfy.model_management.is_oom(error):
                raise
            raise ValueError(f"{os.path.basename(path)} is no complete CLIP folder of transformers ({error}).") from error
        self.size = model.config.vision_config.image_size
        self.mean, self.deviation = _normalisation(path)
        self.patcher = WholeModelPatcher(
            torch.nn.Sequential(model.float().eval().requires_grad_(False)),  # CLIPModel's own `device` is read-only
            load_device=comfy.model_management.text_encoder_device(),
            offload_device=comfy.model_management.text_encoder_offload_device(),
        )

    def embed_images(self, images: Tensor) -> Tensor:
        model = self._loaded()
        pixels = (images - torch.tensor(self.mean)) / torch.tensor(self.deviation)
        pixels = pixels.permute(0, 3, 1, 2)  # BHWC -> BCHW
        with torch.inference_mode():
            pooled = model.vision_model(pixel_values=pixels.to(self.patcher.load_device)).pooler_output
            return model.visual_projection(pooled).clone()

    def embed_texts(self, texts: list[str]) -> Tensor:
        model = self._loaded()
        tokens = self.tokenizer(texts, padding=True, truncation=True, return_tensors="pt").to(self.patcher.load_device)
        with torch.inference_mode():
            pooled = model.text_model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]).pooler_output
            return model.text_projection(pooled).clone()

    def _loaded(self):
        comfy.model_management.load_models_gpu([self.patcher])
        return self.patcher.model[0]


def list_clip_folders() -> list[str]:
    """CLIP folders under models/text_encoders and models/clip_vision, after "none"."""
    names = []
    for key in FOLDERS:
        files = folder_paths.get_filename_list(key) if key in folder_paths.folder_names_and_paths else []
        names += [os.path.dirname(file) for file in files if os.path.basename(file) == WEIGHTS and os.path.dirname(file)]
    return [NO_FOLDER, *dict.fromkeys(names)]


def find_clip_folder(name: str) -> str:
    """Full path of a listed folder. Raises ValueError for any other name."""
    if name in list_clip_folders()[1:]:
        for key in FOLDERS:
            path = folder_paths.get_full_path(key, os.path.join(name, WEIGHTS))
            if path:
                return os.path.dirname(path)
    raise ValueError(
        f"clip_folder '{name}' is not under models/text_encoders or models/clip_vision, or has no {WEIGHTS}. "
        "Put a transformers CLIP folder there and refresh."
    )


def _normalisation(path: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    mean, deviation = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    file = os.path.join(path, "preprocessor_config.json")
    if os.path.isfile(file):
        notes = _read_json(file)
        mean, deviation = notes.get("image_mean", mean), notes.get("image_std", deviation)
        if not _three_of(mean, 0) or not _three_of(deviation, 1e-3):
            raise ValueError(f"{os.path.basename(path)}/preprocessor_config.json: image_mean and image_std must be three numbers each, at most 2.")
    return tuple(mean), tuple(deviation)


def _three_of(values: Any, least: float) -> bool:
    return isinstance(values, (list, tuple)) and len(values) == 3 and all(isinstance(v, (int, float)) and least <= v <= 2 for v in values)


def _check_config(path: str) -> None:
    """Raises ValueError for sizes that no CLIP has, before a network is made of them."""
    pending = [_read_json(os.path.join(path, "config.json"))]
    while pending:
        for key, value in pending.pop().items():
            if isinstance(value, dict):
                pending.append(value)
            elif isinstance(value, int) and abs(value) > (MOST_LAYERS if "layers" in key or "heads" in key else MOST_SIZE):
                raise ValueError(f"{os.path.basename(path)}/config.json: {key[:40]} is more than any CLIP has. Download the folder again.")


def _read_json(file: str) -> dict:
    try:
        if os.path.getsize(file) > LARGEST_JSON:
            raise ValueError(f"more than {LARGEST_JSON} bytes")
        with open(file, encoding="utf-8") as handle:
            notes = json.load(handle)
        if not isinstance(notes, dict):
            raise ValueError(f"a {type(notes).__name__}, not an object")
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{os.path.basename(os.path.dirname(file))}/{os.path.basename(file)} cannot be read ({error}). Download the folder again.") from error
    return notes
