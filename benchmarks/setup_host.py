"""Makes ComfyUI and the pack importable for the benchmarks: import this before torch, comfy or pastiche.

ComfyUI is the folder named by COMFYUI_PATH, else .environment/ComfyUI. The pack is imported as `pastiche`.
BENCHMARK_DEVICE=cuda uses the GPU; otherwise everything runs on the CPU.
"""

import os
import platform
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def prepare() -> None:
    sys.path[:0] = [str(ROOT / "tools"), str(ROOT / "tests")]
    from host.imports import make_importable

    make_importable(cpu=os.environ.get("BENCHMARK_DEVICE", "cpu") == "cpu")


def hardware() -> str:
    """One line that names the machine."""
    import torch

    if torch.cuda.is_available() and os.environ.get("BENCHMARK_DEVICE") == "cuda":
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{cores}-core CPU ({platform.machine()}), torch {torch.__version__}, {torch.get_num_threads()} threads"


def full_size_sd15(path: Path) -> None:
    """Writes a U-Net of SD1.5's full size (860 M parameters) with random weights, fp32 safetensors (3.4 GB)."""
    import safetensors.torch
    import torch
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    network = UNetModel(
        image_size=32, in_channels=4, out_channels=4, model_channels=320, num_res_blocks=[2, 2, 2, 2],
        channel_mult=[1, 2, 4, 4], transformer_depth=[1, 1, 1, 1, 1, 1, 0, 0], transformer_depth_middle=1,
        transformer_depth_output=[1] * 9 + [0] * 3, use_spatial_transformer=True, context_dim=768,
        use_linear_in_transformer=False, num_heads=8, legacy=False, dtype=torch.float32,
    )
    from support.models import randomize

    randomize(network)
    path.parent.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file({k: v.contiguous() for k, v in network.state_dict().items()}, str(path))


prepare()
