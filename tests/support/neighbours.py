"""Other nodes on a MODEL: core's own, and small patches of ours with the shape of other packs'.

Each takes a MODEL and returns a patched clone.
"""

import functools
import importlib.util
from contextlib import contextmanager
from pathlib import Path

import comfy.model_management
import comfy.model_patcher
import comfy.samplers
import torch
import torch.nn.functional as F

from support.models import randomize, tiny_cond, tiny_unet
from support.styles import merged, random_lora

NODES = {  # of nodes that patch a MODEL and keep its grids: what they are called in docs/compatibility.md
    "pag": "PerturbedAttentionGuidance", "sag": "SelfAttentionGuidance", "nag": "NAGuidance", "freeu": "FreeU_V2", "rescale_cfg": "RescaleCFG",
    "cfg_zero": "CFGZeroStar", "mahiro": "Mahiro", "fresca": "FreSca", "lora": "Load LoRA", "merge": "ModelMergeSimple",
    "blurred_queries": "smoothed energy guidance*", "perturbed_tokens": "token perturbation guidance*", "couple_one": "attention couple*",
    "prompted": "IPAdapter*",
}


def patched(name, model):
    """`model` with a node of NODES, as the tests set it."""
    if name == "lora":
        return merged(model, random_lora(model, 3))
    if name == "prompted":
        return image_prompt(model, {("output", number): 1 for number in (5, 6, 10)})
    if name == "couple_one":
        return couple(model, [tiny_cond(model, seed=20)[0][0]])
    return globals()[name](model)


def merge(model, ratio=0.7):
    from comfy_extras.nodes_model_merging import ModelMergeSimple

    return ModelMergeSimple().merge(model, tiny_unet(seed=1), ratio)[0]


@functools.lru_cache(maxsize=1)
def core_nodes():
    """ComfyUI's nodes.py, by its path: here "nodes" may be the pack's folder."""
    path = Path(comfy.samplers.__file__).parents[1] / "nodes.py"
    spec = importlib.util.spec_from_file_location("comfyui_core_nodes", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.lru_cache(maxsize=1)
def _control_net():
    """A random ControlNet of the tiny SD1.x, with core's classes."""
    import comfy.cldm.cldm
    import comfy.controlnet
    import comfy.ops

    network = comfy.cldm.cldm.ControlNet(
        image_size=32, in_channels=4, model_channels=32, hint_channels=3, num_res_blocks=[2] * 4, channel_mult=(1, 1, 2, 2), num_heads=2,
        use_spatial_transformer=True, transformer_depth=[1] * 6 + [0] * 2, transformer_depth_middle=1, context_dim=32, legacy=False,
        dtype=torch.float32, operations=comfy.ops.disable_weight_init,
    )
    randomize(network, 50)
    return comfy.controlnet.ControlNet(network, load_device=comfy.model_management.get_torch_device())


def controlled(positive, negative, size=(16, 16)):
    """(positive, negative) after core's Apply ControlNet with a random picture for a latent of `size`."""
    picture = torch.rand(1, 8 * size[0], 8 * size[1], 3, generator=torch.Generator().manual_seed(51))
    return core_nodes().ControlNetApplyAdvanced().apply_controlnet(positive, negative, _control_net(), picture, 0.5, 0.0, 1.0)


def with_area(positive, other):
    """`positive` and, in the left half, core's Conditioning (Set Area with Percentage) of `other`."""
    return positive + core_nodes().ConditioningSetAreaPercentage().append(other, 0.5, 1.0, 0.0, 0.0, 1.0)[0]


def pag(model, scale=3.0):
    from comfy_extras.nodes_pag import PerturbedAttentionGuidance

    return PerturbedAttentionGuidance.execute(model, scale).result[0]


def sag(model, scale=0.8):
    from comfy_extras.nodes_sag import SelfAttentionGuidance

    return SelfAttentionGuidance.execute(model, scale, 2.0).result[0]


def nag(model, scale=3.0):
    from comfy_extras.nodes_nag import NAGuidance

    return NAGuidance.execute(model, scale, 0.5, 1.5).result[0]


def easycache(model, threshold=5.0):
    """Skips every step it may."""
    from comfy_extras.nodes_easycache import EasyCacheNode

    return EasyCacheNode.execute(model, threshold, 0.0, 1.0, False).result[0]


def lazycache(model, threshold=5.0):
    from comfy_extras.nodes_easycache import LazyCacheNode

    return LazyCacheNode.execute(model, threshold, 0.0, 1.0, False).result[0]


def tome(model, ratio=0.5):
    from comfy_extras.nodes_tomesd import TomePatchModel

    return TomePatchModel.execute(model, ratio).result[0]


def deep_shrink(model, end_percent=1.0):
    from comfy_extras.nodes_model_downscale import PatchModelAddDownscale

    return PatchModelAddDownscale.execute(model, 3, 2.0, 0.0, end_percent, True, "bilinear", "bilinear").result[0]


def hypertile(model):
    """Cuts the queries of a latent of 8 x 8 or more, in levels of that size, into tiles of 4 x 4 at least."""
    from comfy_extras.nodes_hypertile import HyperTile

    return HyperTile.execute(model, 32, 1, 0, False)[0]


def compiled(model):
    """TorchCompileModel's shape: core's wrapper around code that keeps the patches of its first run (core drops the
    guards on transformer_options). The code is the eager network's."""
    from comfy.patcher_extension import WrappersMP
    from comfy_api.torch_helpers.torch_compile import COMPILE_KEY, apply_torch_compile_factory

    network, first = model.model.diffusion_model, {}

    class Traced(torch.nn.Module):
        dtype = network.dtype

        def forward(self, x, t, context=None, control=None, transformer_options={}, **kwargs):
            for name in ("patches", "patches_replace"):
                first.setdefault(name, transformer_options.get(name, {}))
            return network(x, t, context=context, control=control, transformer_options={**transformer_options, **first}, **kwargs)

    patched = model.clone()
    patched.add_wrapper_with_key(WrappersMP.APPLY_MODEL, COMPILE_KEY, apply_torch_compile_factory({"diffusion_model": Traced()}))
    return patched


def freeu(model):
    from comfy_extras.nodes_freelunch import FreeU_V2

    return FreeU_V2.execute(model, 1.3, 1.4, 0.9, 0.2).result[0]


def rescale_cfg(model):
    from comfy_extras.nodes_model_advanced import RescaleCFG

    return RescaleCFG().patch(model, 0.7)[0]


def cfg_zero(model):
    from comfy_extras.nodes_cfg import CFGZeroStar

    return CFGZeroStar.execute(model).result[0]


def mahiro(model):
    from comfy_extras.nodes_mahiro import Mahiro

    return Mahiro.execute(model).result[0]


def fresca(model):
    from comfy_extras.nodes_fresca import FreSca

    return FreSca.execute(model, 1.0, 1.5, 2).result[0]


def blurred_queries(model, scale=20.0):
    """Smoothed energy guidance's shape: an extra pass whose middle attention has averaged queries, told by chunk."""

    def average(q, k, v, options):
        chunks = options["cond_or_uncond"]
        parts = list(q.chunk(len(chunks)))
        parts = [part.mean(1, keepdim=True).expand_as(part) if kind == 0 else part for part, kind in zip(parts, chunks)]
        return explicit_attention(torch.cat(parts), k, v, options["n_heads"])

    def after(args):
        options = comfy.model_patcher.set_model_options_patch_replace(args["model_options"].copy(), average, "attn1", "middle", 0)
        (blurred,) = comfy.samplers.calc_cond_batch(args["model"], [args["cond"]], args["input"], args["sigma"], options)
        return args["denoised"] + scale * (args["cond_denoised"] - blurred)

    patched = model.clone()
    patched.set_model_sampler_post_cfg_function(after)
    return patched


def perturbed_tokens(model, scale=2.0):
    """Token perturbation guidance's shape: both conditions again, tokens reversed before one block's attention."""

    def reverse(n, context, value, options):
        if options["block"] != ("output", 4):
            return n, context, value
        return n, context.flip(1)[:, : context.shape[1] // 2], value.flip(1)[:, : value.shape[1] // 2]

    def after(args):
        options = comfy.model_patcher.create_model_options_clone(args["model_options"])
        patches = options["transformer_options"].setdefault("patches", {})
        patches["attn1_patch"] = [*patches.get("attn1_patch", []), reverse]
        cond, uncond = comfy.samplers.calc_cond_batch(args["model"], [args["cond"], args["uncond"]], args["input"], args["sigma"], options)
        return args["denoised"] + scale * (args["cond_denoised"] - cond) - 0.5 * scale * (args["uncond_denoised"] - uncond)

    patched = model.clone()
    patched.set_model_sampler_post_cfg_function(after)
    return patched


def tiled(model, tile=8):
    """Tiled diffusion's shape: the latent is cut along H, tiles run as one tile-major batch, overlaps are averaged."""

    def wrapper(apply_model, args):
        x, t, c = args["input"], args["timestep"], args["c"]
        starts = [*range(0, x.shape[-2] - tile, tile // 2), x.shape[-2] - tile]
        pieces = torch.cat([x[..., start : start + tile, :] for start in starts])
        repeated = {}
        for name, value in c.items():
            batched = torch.is_tensor(value) and value.shape[0] == x.shape[0]
            repeated[name] = value.repeat(len(starts), *[1] * (value.ndim - 1)) if batched else value
        out = apply_model(pieces, t.repeat(len(starts)), **repeated).chunk(len(starts))
        total, count = torch.zeros_like(x), torch.zeros_like(x)
        for start, piece in zip(starts, out):
            total[..., start : start + tile, :] += piece
            count[..., start : start + tile, :] += 1
        return total / count

    patched = model.clone()
    patched.set_model_unet_function_wrapper(wrapper)
    return patched


def couple(model, contexts):
    """Attention couple's shape: conditional queries are repeated for each region's context before attn2 and mixed after."""
    regions = 1 + len(contexts)

    def before(q, k, v, options):
        kinds = options["cond_or_uncond"]
        queries, keys = [], []
        for kind, own, text in zip(kinds, q.chunk(len(kinds)), k.chunk(len(kinds))):
            queries.append(own if kind == 1 else own.repeat(regions, 1, 1))
            others = [context.to(k).expand(own.shape[0], -1, -1) for context in contexts]
            keys.append(text if kind == 1 else torch.cat([text, *others]))
        return torch.cat(queries), torch.cat(keys), torch.cat(keys)

    def after(out, options):
        kinds, position, mixed = options["cond_or_uncond"], 0, []
        rows = sum(1 if kind == 1 else regions for kind in kinds)
        batch = out.shape[0] // rows
        for kind in kinds:
            count = 1 if kind == 1 else regions
            chunk = out[position : position + count * batch]
            mixed.append(chunk.unflatten(0, (count, batch)).mean(0))
            position += count * batch
        return torch.cat(mixed)

    patched = model.clone()
    patched.set_model_attn2_patch(before)
    patched.set_model_attn2_output_patch(after)
    return patched


class _ImagePrompt:
    """IPAdapter's shape: an object in attn2's slot that further ones are added to."""

    def __init__(self, number, weight, tokens):
        self.prompts = []
        self.add(number, weight, tokens)

    def add(self, number, weight, tokens):
        self.prompts.append((number, weight, tokens))

    def __call__(self, q, k, v, options):
        out = explicit_attention(q, k, v, options["n_heads"])
        for number, weight, tokens in self.prompts:
            generator = torch.Generator().manual_seed(number)
            keys, values = (tokens @ torch.randn(tokens.shape[-1], k.shape[-1], generator=generator) / 5 for _ in range(2))
            own = [part.expand(q.shape[0], -1, -1).to(q) for part in (keys, values)]
            out = out + weight * explicit_attention(q, *own, options["n_heads"])
        return out


def image_prompt(model, depths, weight=0.7):
    """depths: {(block, number): transformer blocks there}."""
    patched = model.clone()
    options = patched.model_options["transformer_options"]
    slots = options.setdefault("patches_replace", {}).setdefault("attn2", {})
    tokens = torch.randn(1, 3, 16, generator=torch.Generator().manual_seed(40))
    for number, slot in enumerate((*place, depth) for place, count in depths.items() for depth in range(count)):
        if slot in slots:
            slots[slot].add(number, weight, tokens)
        else:
            slots[slot] = _ImagePrompt(number, weight, tokens)
    return patched


@contextmanager
def sliding_windows(windows):
    """AnimateDiff-Evolved's shape: its own sampling function, which never asks for a calc_cond_batch function of the
    options and evaluates windows of the batch; windows: lists of frames that cover it."""

    def sampling_function(model, x, timestep, uncond, cond, cond_scale, model_options={}, seed=None):
        options = comfy.model_patcher.create_model_options_clone(model_options)
        shared = options.setdefault("transformer_options", {}).setdefault("ad_params", {})
        totals, counts = [torch.zeros_like(x), torch.zeros_like(x)], torch.zeros_like(x)
        for frames in windows:
            shared["sub_idxs"] = frames
            copies = [[dict(entry) for entry in condition] for condition in (cond, uncond)]
            parts = comfy.samplers.calc_cond_batch(model, copies, x[frames], timestep[frames], options)
            for total, part in zip(totals, parts):
                total[frames] += part
            counts[frames] += 1
        return comfy.samplers.cfg_function(
            model, totals[0] / counts, totals[1] / counts, cond_scale, x, timestep, model_options=options, cond=cond, uncond=uncond
        )

    original, comfy.samplers.sampling_function = comfy.samplers.sampling_function, sampling_function
    try:
        yield
    finally:
        comfy.samplers.sampling_function = original


def explicit_attention(q, k, v, heads):
    """(B, T, C) softmax attention written out."""
    q, k, v = (t.unflatten(2, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    weights = F.softmax(q @ k.transpose(2, 3) / q.shape[-1] ** 0.5, dim=-1)
    return (weights @ v).transpose(1, 2).flatten(2)
