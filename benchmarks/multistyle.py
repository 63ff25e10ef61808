"""Multi-Style Guider: three LoRAs with masks against a plain forward of the same batch, and core's LoRA hooks with masks.

SD1.5's block positions with random weights; --full takes its real size, --mini the pack's own small model. One process, interleaved rounds; times of a
sampling step are taken between the first and the last step of a run, so setup and the hooks' first weight
computation do not count; the whole run has both. Processor seconds do not depend on what else the machine does.

    python benchmarks/multistyle.py --latent 8 16 32 [--targets transformer] [--full WORKFOLDER | --mini | --width 128 --rank 6] [--table FILE]
"""

import argparse
import statistics
import time
from pathlib import Path

import setup_host  # noqa: F401  first: it makes the others importable
import comfy.hooks
import comfy.samplers
import comfy.sd
import torch
from report import add_outputs, publish
from support.models import load_real, tiny_unet

from pastiche.nodes.host.networks.mini import load_mini
from pastiche.nodes.host.multistyle.guider import multi_style_guider
from pastiche.nodes.sockets import StyleEntry

STYLES = 3


def in_lora(name, module, targets):
    """qkv: the projections that DiffStyler trains. transformer: every layer of the attention blocks, as most LoRAs have."""
    if not isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)):
        return False
    if targets == "qkv":
        return name.endswith((".to_q", ".to_k", ".to_v"))
    return ".transformer_blocks." in name or name.endswith((".proj_in", ".proj_out"))


def random_lora(model, seed, rank, targets):
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, module in model.model.named_modules():
        if in_lora(name, module, targets):
            outputs, inputs, *kernel = module.weight.shape
            tensors[f"{name}.lora_down.weight"] = torch.randn(rank, inputs, *kernel, generator=generator) / rank
            tensors[f"{name}.lora_up.weight"] = torch.randn(outputs, rank, *[1] * len(kernel), generator=generator) * 0.01
    return tensors


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--latent", type=int, nargs="+", default=[16])
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--targets", choices=("qkv", "transformer"), default="qkv", help="which layers the LoRAs change")
    parser.add_argument("--full", type=Path, help="folder for a 3.4 GB random checkpoint of SD1.5's real size")
    parser.add_argument("--mini", action="store_true", help="the embedded mini model")
    parser.add_argument("--width", type=int, default=320, help="base width of the U-Net; 320 is SD1.5's, at one resolution's depth")
    add_outputs(parser)
    options = parser.parse_args()
    if options.full:
        path = options.full / "random_sd15.safetensors"
        if not path.exists():
            setup_host.full_size_sd15(path)
        model = comfy.sd.load_diffusion_model(str(path))
    elif options.mini:
        model = load_mini()[0]
    else:
        model = load_real("sd15") if options.width == 320 else tiny_unet(
            channels=options.width, channel_mult=(1, 2, 4, 4), context_dim=768, heads=8
        )
    size = sum(parameter.numel() for parameter in model.model.parameters()) / 1e6
    generator = torch.Generator().manual_seed(0)
    network = model.model.model_config.unet_config
    channels = model.model.latent_format.latent_channels
    prompts = [[[torch.randn(1, 77, network["context_dim"], generator=generator), {}]] for _ in range(STYLES + 1)]
    loras = [random_lora(model, seed, options.rank, options.targets) for seed in range(STYLES)]
    masks = [torch.zeros(1, 64, 64) for _ in range(STYLES)]
    for number, mask in enumerate(masks):
        mask[..., number * 16 : number * 16 + 16] = 1  # the last quarter is the base's

    def plain():
        guider = comfy.samplers.CFGGuider(model)
        guider.set_conds([prompt[0] for prompt in prompts], [])
        guider.set_cfg(1.0)
        return guider

    def ours():
        entries = [StyleEntry(lora=lora, conditioning=prompt, mask=mask) for lora, prompt, mask in zip(loras, prompts, masks)]
        return multi_style_guider(model, prompts[-1], [], 1.0, entries)

    def hooks():
        conds = []
        for lora, prompt, mask in zip(loras, prompts, masks):
            hook = comfy.hooks.create_hook_lora(lora, 1.0, 0.0)
            conds += comfy.hooks.set_conds_props([prompt], 1.0, "default", mask=mask, hooks=hook)[0]
        (conds,) = comfy.hooks.set_default_conds_and_combine([conds], [prompts[-1]])
        guider = comfy.samplers.CFGGuider(model)
        guider.set_conds(conds, [])
        guider.set_cfg(1.0)
        return guider

    def measure(make, side):
        stamps = []
        noise = torch.randn(1, channels, side, side, generator=torch.Generator().manual_seed(1))
        sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", options.steps)
        guider, start = make(), time.perf_counter()
        result = guider.sample(
            noise, torch.zeros_like(noise), comfy.samplers.sampler_object("euler"), sigmas, disable_pbar=True, seed=0,
            callback=lambda *_: stamps.append((time.perf_counter(), time.process_time())),
        )
        whole = time.perf_counter() - start
        return [*((stamps[-1][i] - stamps[0][i]) / (len(stamps) - 1) for i in (0, 1)), whole], result

    variants = {
        f"plain forward of {STYLES + 1} rows": plain,
        f"Multi-Style Guider, {STYLES} LoRAs": ours,
        f"core's LoRA hooks with masks, {STYLES} LoRAs": hooks,
    }
    lines = [
        f"# {STYLES} styles in one sampling", "",
        f"{setup_host.hardware()}. U-Net with SD1.5's blocks, {size:.0f} M random parameters, fp32; LoRAs of rank {options.rank} on "
        f"{'all queries, keys and values' if options.targets == 'qkv' else 'every layer of the attention blocks'}, three masks and the base in the last quarter, no guidance: {STYLES + 1} rows. "
        f"{options.rounds} interleaved rounds of {options.steps} steps (medians). Made by `benchmarks/multistyle.py`.", "",
    ]
    for side in options.latent:
        runs, results = {name: [] for name in variants}, {}
        for _ in range(options.rounds):
            for name, make in variants.items():
                seconds, results[name] = measure(make, side)
                runs[name].append(seconds)
                print(side, name, "%.2f s, %.2f cpu s, whole run %.1f s" % tuple(seconds), flush=True)
        names = list(variants)
        agreement = float((results[names[1]] - results[names[2]]).abs().max() / results[names[2]].abs().max())
        medians = {name: [statistics.median(column) for column in zip(*values)] for name, values in runs.items()}
        base = medians[names[0]]
        lines += [f"## {side}x{side} latent", "", "| | s/step | processor s/step | times plain (s) | times plain (processor s) | whole run, s |", "|---|---|---|---|---|---|"]
        lines += [f"| {name} | {s:.2f} | {c:.2f} | {s / base[0]:.2f} | {c / base[1]:.2f} | {whole:.1f} |" for name, (s, c, whole) in medians.items()]
        lines += ["", f"Largest difference between our result and the hooks': {agreement:.1e} of the largest value.", ""]
    publish(lines, options.table)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
