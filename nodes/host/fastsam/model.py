"""FastSAM in ComfyUI: where its files are, and segmentation of images with a cache."""

from __future__ import annotations

import hashlib
import os
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import comfy.model_management
import folder_paths
import torch
import torch.nn.functional as F
from torch import Tensor

from ...algorithms.segments import Segments, decode_segments
from ..checks import is_finite
from ..files import refuse_web_page, register_models_folder
from .checkpoint import read_checkpoint
from .network import STRIDE, OnnxNetwork, TorchNetwork
from .text import NO_FOLDER, CoreEncoder, FolderEncoder, PairEncoder, find_clip_folder

FOLDER = "fastsam"
EXTENSIONS = {".pt", ".safetensors", ".onnx"}
NEIGHBOURS = ("ultralytics_segm", "ultralytics", "yolov8")  # keys under which other packs keep such models
MINI = "pastiche mini (demo)"
MINI_FILE = Path(__file__).resolve().parents[3] / "assets" / "fastsam_mini.safetensors"
CACHED_BYTES = 256 << 20
LEAST_SCORE = 0.02  # predictions below are not worth keeping


def register_fastsam_folder() -> None:
    """Make models/fastsam, and models/ultralytics/segm if it is there, known to ComfyUI."""
    folders = (FOLDER, os.path.join("ultralytics", "segm"))
    register_models_folder(FOLDER, EXTENSIONS, *(os.path.join(folder_paths.models_dir, folder) for folder in folders))


def list_fastsam() -> list[str]:
    """Model names for the loader: the demo model, then files; those of other packs' folders come as "key/file"."""
    names = [MINI] if MINI_FILE.is_file() else []
    known = folder_paths.folder_names_and_paths
    if FOLDER in known:
        names += folder_paths.get_filename_list(FOLDER)
    for key in NEIGHBOURS:
        if key in known:
            files = folder_paths.get_filename_list(key)
            names += [f"{key}/{file}" for file in files if os.path.splitext(file)[1].lower() in EXTENSIONS]
    return names


def find_fastsam(name: str) -> str:
    """Full path of a name from `list_fastsam`. Raises ValueError for one that is not there."""
    if name == MINI:
        return str(MINI_FILE)
    key, _, rest = name.partition("/")
    for folder, file in ((FOLDER, name), (key, rest) if key in NEIGHBOURS else ("", "")):
        path = folder_paths.get_full_path(folder, file) if folder in folder_paths.folder_names_and_paths else None
        if path:
            return path
    raise ValueError(
        f"'{name}' is in none of ComfyUI's folders. Put FastSAM-s.pt or FastSAM-x.pt into models/{FOLDER} and refresh."
    )


class FastSAM:
    """What the PASTICHE_FASTSAM socket carries: a network, and its answers for the last images.

    The cache holds network output (about 10 MB an image at 1024 pixels, at most 256 MB) on the
    offload device, so another prompt, confidence or overlap runs nothing again.
    """

    def __init__(self, name: str, network: TorchNetwork | OnnxNetwork):
        self.name = name
        self.network = network
        self._answers: OrderedDict[str, tuple[Tensor, Tensor]] = OrderedDict()
        self._clip: tuple[str, PairEncoder] | None = None

    def segment(self, image: Tensor, resolution: int = 0, confidence: float = 0.4, overlap: float = 0.7) -> Segments:
        """Objects of image (H, W, 3) in 0..1. resolution: pixels of its longer side in the network, 0 for the model's own."""
        height, width = image.shape[:2]
        inner, padded = _network_size(height, width, resolution or self.network.size, self.network.fixed_size)
        digest = hashlib.blake2b(image.contiguous().cpu().numpy().tobytes(), digest_size=16).hexdigest()
        key = f"{digest} {height}x{width} {padded}"
        if key not in self._answers:
            comfy.model_management.throw_exception_if_processing_interrupted()
            answer = self.network(_letterbox(image, inner, padded))
            if not all(map(is_finite, answer)):
                raise ValueError(f"fastsam: {self.name} computes NaN for this image; the file is damaged, or half precision is too little for it.")
            self._remember(key, *answer)
        self._answers.move_to_end(key)
        prediction, prototypes = self._answers[key]
        stride = padded[0] / prototypes.shape[1]
        span = (inner[0] / stride, inner[1] / stride)
        return decode_segments(prediction, prototypes, height, width, span, stride, confidence, overlap)

    def text_encoder(self, clip_vision=None, clip=None, folder: str = NO_FOLDER) -> Callable[[], PairEncoder] | None:
        """A way to get the CLIP for text, None where none is given. A folder's stays here, loaded, until another is named."""
        if folder != NO_FOLDER:

            def load() -> PairEncoder:
                if self._clip is None or self._clip[0] != folder:
                    self._clip = None
                    self._clip = (folder, FolderEncoder(find_clip_folder(folder)))
                return self._clip[1]

            return load
        if (clip_vision is None) != (clip is None):
            missing = "clip_vision" if clip_vision is None else "clip"
            raise ValueError(f"text needs both halves of a CLIP: {missing} is not connected.")
        return None if clip is None else lambda: CoreEncoder(clip_vision, clip)

    def _remember(self, key: str, prediction: Tensor, prototypes: Tensor) -> None:
        keep = comfy.model_management.intermediate_device()
        prediction = prediction[:, prediction[4] > LEAST_SCORE]
        self._answers[key] = prediction.float().to(keep), prototypes.float().to(keep)
        while len(self._answers) > 1 and self._size() > CACHED_BYTES:
            self._answers.popitem(last=False)

    def _size(self) -> int:
        return sum(tensor.nbytes for answer in self._answers.values() for tensor in answer)


def load_fastsam(name: str) -> FastSAM:
    """A FastSAM of `list_fastsam`'s names, ready to segment."""
    path = find_fastsam(name)
    if path.lower().endswith(".onnx"):
        refuse_web_page(path)
        return FastSAM(name, OnnxNetwork(path))
    return FastSAM(name, TorchNetwork(read_checkpoint(path), os.path.basename(path)))


def _network_size(height: int, width: int, resolution: int, fixed) -> tuple[tuple[int, int], tuple[int, int]]:
    """(height, width) of the picture inside the network's input, and of that input."""
    if fixed:
        scale = min(fixed[0] / height, fixed[1] / width)
    else:
        scale = resolution / max(height, width)
    inner = max(1, round(height * scale)), max(1, round(width * scale))
    padded = fixed or tuple(-(-side // STRIDE) * STRIDE for side in inner)
    return inner, padded


def _letterbox(image: Tensor, inner: tuple[int, int], padded: tuple[int, int]) -> Tensor:
    """(H, W, 3) -> (1, 3, h, w): resized, and padded below and to the right with the grey YOLO is trained with."""
    picture = image[..., :3].permute(2, 0, 1)[None].float()  # HWC -> BCHW
    picture = F.interpolate(picture, inner, mode="bilinear", antialias=True, align_corners=False).clamp(0, 1)
    return F.pad(picture, (0, padded[1] - inner[1], 0, padded[0] - inner[0]), value=114 / 255)
