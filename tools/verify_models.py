#!/usr/bin/env python3
"""Checks files of FastSAM and of unconditional models as the pack's loaders read them, and prints what was verified.

    python tools/verify_models.py --fastsam FastSAM-s.pt --unconditional models/diffusers
    python tools/verify_models.py --unconditional afhqdog_p2.pt --sample afhq.png --device cuda

--fastsam takes files (.pt, .safetensors, .onnx); --unconditional files, diffusers folders, or folders of either. For each:
its SHA-256, the layout that names and shapes tell, the number of parameters, a forward's shape and whether all of it is
finite. --sample also draws a picture from noise with 25 DDIM steps (as PNG, the model's name in its name where there are
several): wrong heads or betas show there and nowhere else. Exit status: 0 when all passed, 1 when a file failed, 2 when
there was nothing to check. Needs ComfyUI (COMFYUI_PATH, else .environment/ComfyUI).
"""

import argparse
import hashlib
import sys
from pathlib import Path

SIZES = {(0.33, 0.5): "FastSAM-s", (1.0, 1.25): "FastSAM-x"}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fastsam", type=Path, nargs="+", default=[], metavar="FILE")
    parser.add_argument("--unconditional", type=Path, nargs="+", default=[], metavar="PATH", help="files or folders")
    parser.add_argument("--size", type=int, default=64, help="pixels of a side in unconditional forwards; 256 for --sample")
    parser.add_argument("--sample", type=Path, help="PNG to write: a picture from noise")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options = parser.parse_args(arguments)
    prepare(options.device)
    work = [(path, verify_fastsam) for path in options.fastsam]
    work += [(path, verify_unconditional) for given in options.unconditional for path in models_in(given)]
    failed = 0
    for path, verify in work:
        print(path, flush=True)
        try:
            for line in verify(path, options):
                print(f"  {line}", flush=True)
            print("  passed")
        except Exception as error:  # whatever is wrong with one file, the others are checked
            failed += 1
            print(f"  FAILED: {error if isinstance(error, ValueError) else repr(error)}")
    print(f"{len(work) - failed} of {len(work)} passed")
    return 2 if not work else int(failed > 0)


def prepare(device: str) -> None:
    """ComfyUI and the pack (as `pastiche`) importable, unless they are."""
    if "pastiche" in sys.modules:
        return
    from host.imports import make_importable

    make_importable(cpu=device == "cpu")


def models_in(path: Path) -> list[Path]:
    """The path itself, or the models in a folder that is none itself. A name with nothing behind it stays, to fail by name."""
    if not path.is_dir() or (path / "config.json").is_file() or (path / "unet" / "config.json").is_file():
        return [path]
    inside = [entry for entry in sorted(path.iterdir()) if entry.suffix.lower() in (".safetensors", ".pt", ".pth", ".ckpt")
              or (entry / "config.json").is_file() or (entry / "unet" / "config.json").is_file()]
    return inside or [path]


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def require_finite(tensor, what: str) -> None:
    if not tensor.isfinite().all():
        raise ValueError(f"{what} holds {int((~tensor.isfinite()).sum())} values that are not finite.")


def verify_fastsam(path: Path, options):
    """Yields lines. Raises ValueError."""
    import torch
    from pastiche.nodes.host.fastsam.checkpoint import MASKS, read_checkpoint
    from pastiche.nodes.host.fastsam.network import OnnxNetwork, TorchNetwork

    if not path.is_file():
        raise ValueError(f"{path.name} is no file.")
    yield f"sha256 {sha256(path)}"
    if path.suffix.lower() == ".onnx":
        network = OnnxNetwork(str(path))
        yield f"ONNX export of a one-class YOLOv8-seg, {'half' if network.half else 'single'} precision, " + (
            f"for {network.fixed_size[1]}x{network.fixed_size[0]} only" if network.fixed_size else "for any size")
    else:
        weights = read_checkpoint(str(path))
        known = SIZES.get((round(weights.depth, 2), round(weights.width, 4)), "another size than FastSAM-s and FastSAM-x")
        yield f"YOLOv8-seg with one class, depth {weights.depth}, width {weights.width}: {known}; made for {weights.size} px"
        yield f"{len(weights.state)} tensors, {sum(tensor.numel() for tensor in weights.state.values()) / 1e6:.1f} M parameters"
        for key, tensor in weights.state.items():
            require_finite(tensor.float(), key)
        network = TorchNetwork(weights, path.name)
        yield "every name and shape is ultralytics' own for that layout; all weights finite"
    height, width = network.fixed_size or (64, 96)
    picture = torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(0))
    prediction, prototypes = network(picture)
    require_finite(prediction, "The prediction")
    require_finite(prototypes, "The prototypes")
    anchors = sum((height // stride) * (width // stride) for stride in (8, 16, 32))
    expected = (5 + MASKS, anchors), (MASKS, height // 4, width // 4)
    if (tuple(prediction.shape), tuple(prototypes.shape)) != expected:
        found = f"{tuple(prediction.shape)} and {tuple(prototypes.shape)}"
        raise ValueError(f"a forward gave {found}, expected {expected[0]} and {expected[1]}.")
    scores = prediction[4]
    if not 0 <= float(scores.min()) <= float(scores.max()) <= 1:
        raise ValueError(f"scores run from {float(scores.min()):.3g} to {float(scores.max()):.3g}, expected 0 to 1.")
    yield f"forward at {width}x{height}: prediction {expected[0]}, prototypes {expected[1]}, finite, scores within 0 to 1"


def verify_unconditional(path: Path, options):
    """Yields lines. Raises ValueError."""
    import folder_paths
    import torch
    from pastiche.nodes.host.networks.families import find_adapter
    from pastiche.nodes.host.networks.unconditional_checkpoint import Reading, read_weights
    from pastiche.nodes.host.networks.unconditional_files import describe, load_model
    from pastiche.nodes.host.networks.unconditional_layouts import recognise

    path = path.resolve()
    if not path.exists():
        raise ValueError(f"{path.name} does not exist.")
    folder_paths.add_model_folder_path("diffusers", str(path.parent))
    if path.is_file():
        yield f"sha256 {sha256(path)}"
        weights = read_weights(path)
        reading = Reading().noted(weights.notes, path.name)
        layout = recognise(weights.state, path.name, reading.heads, reading.attention_order)
        yield (f"{layout.family} layout, {layout.levels} levels, {layout.channels} channels at the finest" + (
            ", the file's moving average" if weights.averaged else ""))
        yield f"{describe(layout, reading)} (taken for granted: names and shapes do not tell heads, betas or timesteps)"
        count = sum(tensor.numel() for tensor in weights.state.values())
        yield f"{len(weights.state)} tensors, {count / 1e6:.1f} M parameters, every name and shape accounted for, all finite"
    else:
        for file in sorted(path.rglob("*.safetensors")):
            yield f"sha256 {sha256(file)} {file.relative_to(path)}"
    model, vae, conditioning = load_model(path.name)
    if path.is_dir():
        network = model.model.diffusion_model
        count = sum(parameter.numel() for parameter in network.parameters())
        yield f"diffusers UNet2DModel, {count / 1e6:.1f} M parameters, fits its config.json"
    sampling = model.get_model_object("model_sampling")
    yield f"{len(sampling.sigmas)} timesteps, sigma {float(sampling.sigma_min):.4f} to {float(sampling.sigma_max):.1f}"
    x = torch.randn(1, 3, options.size, options.size, generator=torch.Generator().manual_seed(0))
    predicted = predict(model, x, sampling.sigmas[len(sampling.sigmas) // 2])
    require_finite(predicted, "The prediction")
    if predicted.shape != x.shape:
        raise ValueError(f"a forward gave {tuple(predicted.shape)}, expected {tuple(x.shape)}.")
    adapter = find_adapter(model)
    h = adapter.shape(adapter.keys("h_space", "")[0], options.size, options.size)
    yield f"forward at {options.size}x{options.size}: {tuple(predicted.shape)}, finite; h-space {h}"
    if options.sample:
        yield sample(model, vae, conditioning, options, path)


def predict(model, x, sigma):
    """The predicted clean image at one noise level, through ComfyUI."""
    import comfy.model_management
    import torch

    comfy.model_management.load_models_gpu([model])
    with torch.inference_mode():
        device = model.load_device
        return model.model.apply_model((x * (1 + sigma**2) ** 0.5).to(device), sigma.expand(len(x)).to(device)).float().cpu()


def sample(model, vae, conditioning, options, path: Path) -> str:
    import comfy.sample
    import comfy.samplers
    import torch
    from PIL import Image

    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", 25)
    noise = torch.randn(1, 3, options.size, options.size, generator=torch.Generator().manual_seed(0)) * (1 + sigmas[0] ** 2) ** 0.5
    latent = comfy.sample.sample_custom(
        model, torch.zeros_like(noise), 1.0, comfy.samplers.sampler_object("euler"), sigmas, conditioning, conditioning, noise,
        disable_pbar=True, seed=0,
    )
    image = vae.decode(latent)[0]
    several = len(options.unconditional) > 1 or options.unconditional[0].resolve() != path
    target = options.sample.with_stem(f"{options.sample.stem}_{path.stem}") if several else options.sample
    Image.fromarray((image.clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()).save(target)
    return f"{target}: a picture from noise; look at it"


if __name__ == "__main__":
    sys.exit(main())
