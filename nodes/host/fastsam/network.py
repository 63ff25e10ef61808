"""The FastSAM network behind one call, from a checkpoint (ultralytics) or an ONNX export (onnxruntime).

Both are optional packages and imported here, when a model is loaded, not before.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
import warnings

import comfy.model_management
import folder_paths
import torch
from torch import Tensor

from ..whole_models import WholeModelPatcher
from .checkpoint import MASKS, SegmenterWeights

STRIDE = 32  # image sides the network takes are multiples of this
INSTALL = "pip install --no-deps ultralytics opencv-python-headless"
INSTALL_ONNX = "pip install onnxruntime (or onnxruntime-gpu)"


class TorchNetwork:
    """A YOLOv8-seg on ComfyUI's device, moved and offloaded by ComfyUI's model management."""

    fixed_size: tuple[int, int] | None = None

    def __init__(self, weights: SegmenterWeights, name: str):
        self.size = weights.size
        self.patcher = WholeModelPatcher(
            _build(weights, name),
            load_device=comfy.model_management.get_torch_device(),
            offload_device=comfy.model_management.unet_offload_device(),
        )

    def __call__(self, picture: Tensor) -> tuple[Tensor, Tensor]:
        """picture (1, 3, H, W) in 0..1, sides multiples of 32 -> prediction (37, A), prototypes (32, H/4, W/4)."""
        device = self.patcher.load_device
        comfy.model_management.load_models_gpu([self.patcher], memory_required=picture.numel() * 400)
        model = self.patcher.model
        head = model.model[-1]
        # plain attributes, which no model management moves: strides and the anchors of the last size
        head.stride, head.shape = head.stride.to(device), None
        with torch.inference_mode():
            prediction, prototypes = model(picture.to(device, torch.float32))
        return prediction[0].clone(), prototypes[0].clone()


class OnnxNetwork:
    """An ONNX export of FastSAM; onnxruntime keeps its own memory, outside ComfyUI's management."""

    def __init__(self, path: str):
        name = os.path.basename(path)
        try:
            import onnxruntime
        except ImportError as error:
            raise ValueError(f"{name} needs onnxruntime, which is not installed: {INSTALL_ONNX}.") from error
        providers = ["CPUExecutionProvider"]
        if comfy.model_management.get_torch_device().type == "cuda":
            providers.insert(0, "CUDAExecutionProvider")
        available = onnxruntime.get_available_providers()
        try:
            self.session = onnxruntime.InferenceSession(path, providers=[p for p in providers if p in available])
        except Exception as error:  # onnxruntime's exceptions share no public base class
            raise ValueError(f"{name} is no ONNX file that onnxruntime can open; export FastSAM again. ({error})") from error
        inputs, outputs = self.session.get_inputs(), self.session.get_outputs()
        self._check(name, inputs, outputs)
        height, width = inputs[0].shape[2:]
        fixed = isinstance(height, int) and isinstance(width, int)
        self.fixed_size = (height, width) if fixed else None
        self.size = max(height, width) if fixed else 1024
        self.half = "float16" in inputs[0].type

    @staticmethod
    def _check(name: str, inputs, outputs) -> None:
        ranks = [len(tensor.shape) for tensor in outputs]
        if len(inputs) != 1 or len(inputs[0].shape) != 4 or ranks != [3, 4]:
            raise ValueError(
                f"{name} is no YOLOv8-seg export: expected one image input and outputs of rank 3 and 4 "
                f"(predictions, prototypes), found {len(inputs)} inputs and outputs of rank {ranks}."
            )
        channels, masks = outputs[0].shape[1], outputs[1].shape[1]
        if isinstance(masks, int) and masks != MASKS:
            raise ValueError(f"{name} has {masks} prototypes, expected {MASKS}.")
        if isinstance(channels, int) and channels != 5 + MASKS:
            raise ValueError(f"{name} has {channels - 4 - MASKS} classes; FastSAM has 1. Export FastSAM-s or FastSAM-x.")

    def __call__(self, picture: Tensor) -> tuple[Tensor, Tensor]:
        array = picture.cpu().numpy()
        feed = {self.session.get_inputs()[0].name: array.astype("float16") if self.half else array}
        prediction, prototypes = self.session.run(None, feed)
        if prediction.shape[1] != 5 + MASKS or prototypes.shape[1] != MASKS:
            raise ValueError(
                f"The ONNX model gave {prediction.shape[1]} values an anchor and {prototypes.shape[1]} prototypes, "
                f"expected {5 + MASKS} and {MASKS}: one class, {MASKS} mask coefficients."
            )
        return torch.from_numpy(prediction[0]).float(), torch.from_numpy(prototypes[0]).float()


def _build(weights: SegmenterWeights, name: str) -> torch.nn.Module:
    """ultralytics' network, filled. Raises ValueError where tensors do not fit its layout."""
    kind = _segmentation_model()
    expected = _expected(weights)
    missing = [key for key in expected if key not in weights.state]
    unknown = [key for key in weights.state if key not in expected]
    if missing or unknown:
        shown = ", ".join((missing or unknown)[:3])
        raise ValueError(
            f"{name} does not fit YOLOv8-seg of depth {weights.depth}, width {weights.width}: {len(missing)} tensors are "
            f"missing and {len(unknown)} unknown ({shown}, ...). A fused or pruned export? Use the original checkpoint."
        )
    for key, tensor in expected.items():
        if weights.state[key].shape != tensor.shape:
            raise ValueError(f"{name}: {key} is {tuple(weights.state[key].shape)}, expected {tuple(tensor.shape)}.")
    model = kind(weights.layout(), ch=3, nc=1, verbose=False)
    model.load_state_dict(weights.state)
    model.model[-1].export = True  # the head then gives (predictions, prototypes) in every ultralytics version
    return model.float().eval().requires_grad_(False)


def _expected(weights: SegmenterWeights) -> dict[str, Tensor]:
    """Names and shapes of the layout's tensors, on the meta device: sizes that a file only claims take no memory."""
    from ultralytics.nn.tasks import parse_model

    with torch.device("meta"), contextlib.redirect_stdout(io.StringIO()):
        layers, _ = parse_model(weights.layout(), ch=3, verbose=False)
    return {f"model.{key}": tensor for key, tensor in layers.state_dict().items()}


def _segmentation_model() -> type[torch.nn.Module]:
    """ultralytics' SegmentationModel, imported quietly, offline, and without its process-wide settings staying."""
    try:
        with _settings_kept(), contextlib.redirect_stdout(io.StringIO()):
            from ultralytics.nn.tasks import SegmentationModel
    except ImportError as error:
        missing = getattr(error, "name", None) or "ultralytics"
        raise ValueError(
            f"FastSAM checkpoints need the package '{missing.split('.')[0]}', which cannot be imported ({error}). "
            f"Install it without its dependencies, so that PyTorch is not replaced: {INSTALL}"
        ) from error
    return SegmentationModel


@contextlib.contextmanager
def _settings_kept():
    """ultralytics changes torch.save, print options, OpenCV's threads, warning filters and variables on import; put them back."""
    if "ultralytics" in sys.modules:
        yield
        return
    import numpy

    save, printing, variables = torch.save, numpy.get_printoptions(), dict(os.environ)
    settings = {"YOLO_OFFLINE": "True", "YOLO_VERBOSE": "False", "YOLO_AUTOINSTALL": "False",
                "YOLO_CONFIG_DIR": os.path.join(folder_paths.get_user_directory(), "pastiche", "ultralytics")}
    os.environ.update({key: value for key, value in settings.items() if key not in variables})  # read while it is imported
    os.makedirs(os.environ["YOLO_CONFIG_DIR"], exist_ok=True)
    shown = vars(torch._tensor_str.PRINT_OPTS).copy() if hasattr(torch, "_tensor_str") else {}
    try:
        with warnings.catch_warnings():  # whose filters are everybody's
            yield
    finally:
        torch.save = save
        numpy.set_printoptions(**{key: value for key, value in printing.items() if key != "override_repr"})
        if shown:
            vars(torch._tensor_str.PRINT_OPTS).update(shown)
        for key in set(os.environ) - set(variables):
            del os.environ[key]
        os.environ.update(variables)
        with contextlib.suppress(ImportError):
            import cv2

            cv2.setNumThreads(-1)  # its default
