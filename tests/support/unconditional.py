"""Small diffusers UNet2DModel folders with the block layout of the public DDPM models."""

import json
from pathlib import Path

import pytest
import torch

TRAINED = Path(__file__).resolve().parents[1] / "assets" / "ddpm_blobs"


@pytest.fixture
def root(tmp_path, monkeypatch):
    """An empty models/diffusers of this test alone."""
    import folder_paths

    monkeypatch.setitem(folder_paths.folder_names_and_paths, "diffusers", ([str(tmp_path)], ["folder"]))
    return tmp_path


def noise(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


SHAPES = {
    # google/ddpm-celebahq-256, -church-256 and -bedroom-256 share this layout (there with 128..512 channels)
    "celebahq": dict(
        sample_size=64, block_out_channels=(32, 32, 32, 32, 64, 64), attention_head_dim=None, downsample_padding=0,
        down_block_types=("DownBlock2D",) * 4 + ("AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D") + ("UpBlock2D",) * 4,
    ),
    "cifar10": dict(
        sample_size=32, block_out_channels=(32, 64, 64, 64), attention_head_dim=None, downsample_padding=0,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    ),
}
TINY = dict(
    sample_size=16, block_out_channels=(32, 64), attention_head_dim=None, downsample_padding=0,
    down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
)
SHAPES["church"] = SHAPES["bedroom"] = SHAPES["celebahq"]
COMMON = dict(in_channels=3, out_channels=3, layers_per_block=2, flip_sin_to_cos=False, freq_shift=1,
              norm_eps=1e-6, norm_num_groups=32, act_fn="silu", time_embedding_type="positional")
SCHEDULER = dict(_class_name="DDPMScheduler", beta_start=1e-4, beta_end=0.02, beta_schedule="linear",
                 num_train_timesteps=1000, clip_sample=True, trained_betas=None, variance_type="fixed_small")


def make_network(shape: str, seed: int = 0, gain: float = 1.0):
    """A randomly initialised UNet2DModel; `gain` scales its output layer (small: a smooth eps)."""
    from diffusers import UNet2DModel

    torch.manual_seed(seed)
    network = UNet2DModel(**COMMON, **SHAPES[shape]).eval().requires_grad_(False)
    network.conv_out.weight.mul_(gain)
    return network


def blobs(count: int, generator: torch.Generator, size: int = 16) -> torch.Tensor:
    """(count, 3, size, size) in -1..1: coloured slopes with a disc."""
    axis = torch.linspace(-1, 1, size)
    slope = torch.randn(count, 3, 2, generator=generator)
    image = slope[..., 0, None, None] * axis + slope[..., 1, None, None] * axis[:, None]
    centre = torch.rand(count, 2, 1, 1, generator=generator) - 0.5
    inside = (axis - centre[:, :1]) ** 2 + (axis[:, None] - centre[:, 1:]) ** 2 < 0.2
    return torch.where(inside, torch.rand(count, 3, 1, 1, generator=generator) * 2 - 1, 0.7 * torch.tanh(image))


def train_network(steps: int = 300):
    """How tests/assets/ddpm_blobs was made: a 16x16 UNet2DModel that learned `blobs` a little (eps loss 0.069).

    Its eps is smooth, unlike a random network's, so inversion and whole runs can be judged on it.
    """
    from diffusers import DDPMScheduler, UNet2DModel

    torch.manual_seed(0)
    network, schedule = UNet2DModel(**{**COMMON, "layers_per_block": 1}, **TINY), DDPMScheduler()
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3)
    for step in range(steps):
        clean = blobs(16, generator)
        noise = torch.randn(clean.shape, generator=generator)
        t = torch.randint(1000, (16,), generator=generator)
        loss = torch.nn.functional.mse_loss(network(schedule.add_noise(clean, noise, t), t).sample, noise)
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1, (step + 1) / 20) * (1 - step / steps)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network.eval().requires_grad_(False)


def write_folder(folder: Path, network, pipeline: bool = False, scheduler: dict = SCHEDULER) -> Path:
    """Saves a model folder as the hub has it: all files together, or the unet/ and scheduler/ of a pipeline."""
    network.save_pretrained(folder / "unet" if pipeline else folder)
    place = folder / "scheduler" if pipeline else folder
    place.mkdir(parents=True, exist_ok=True)
    (place / "scheduler_config.json").write_text(json.dumps(scheduler))
    return folder
