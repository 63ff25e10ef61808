"""Whatever a schema allows: hypothesis strategies for every input of every node, good values and hostile ones.

`values(node)` draws a node's keyword arguments; `run(node, arguments)` executes it and what comes out of it: a MODEL or
GUIDER is sampled for two steps. `complaint` says what is wrong with the way in which something failed.
"""

from __future__ import annotations

import functools
import linecache
import math
import traceback
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.samplers
import hypothesis.strategies as st
import torch
from comfy_api.latest import io

from pastiche.nodes.features import CaptureFeatures
from pastiche.nodes.host.features.library import FOLDER, register_folder, save_bank
from pastiche.nodes.host.fastsam.model import FastSAM
from pastiche.nodes.host.trajectories.inversion import invert, inverted_noise
from pastiche.nodes.host.trajectories.midpoint_sampler import midpoint_sampler
from pastiche.nodes.sockets import FeatureBank, StyleEntry, Trajectory

from .families import family_cond, tiny_model
from .models import tiny_cond, tiny_unet
from .sampling import random_latent, schedule
from .styles import random_lora
from .unconditional import TRAINED

NODES = Path(__file__).resolve().parents[2] / "nodes"
NAN, INF = float("nan"), float("inf")
STREAMS = "self_attention, h_space, residual, self_attention_qk, cross_attention"
# What a test can afford of inputs whose limits are for real models and pictures
AFFORDABLE = {
    "rank": 4, "steps": 2, "batch_size": 3, "preview_every": 2, "size": 64, "resolution": 96, "substeps": 4, "iterations": 3,
}
TEXTS = {
    "points": ["", "[[10, 10]]", '[{"x": 3, "y": 4, "label": 0}]', '{"positive": [[1, 2]], "negative": [], "size": [64, 64]}', "[[1e308, 1e308]]",
               "[[" + "9" * 400 + ", 1]]", "[" * 3000 + "]" * 3000, "[[NaN, 1]]", "[[Infinity, 1]]", "[[1, 2, {}]]", "{}", "null", "true", "3", '"x"',
               "[[1]]", '{"points": [[1, 2]], "labels": [[]]}', '{"positive": 3}', '{"x": 1, "y": 2, "label": []}', "[[" + "9" * 5000 + ", 1]]"],
    "boxes": ["", "[[1, 2, 30, 40]]", '[{"x": 1, "y": 2, "width": 30, "height": 40}]', "[[0, 0, 1e308, 1e308]]", '[{"x": 1e308, "y": 0, "width": 1e308, "height": 1}]',
              "[[" + "9" * 400 + ", 1, 2, 3]]", "[" * 3000 + "]" * 3000, "[[1, 2, 1, 2]]", "[[NaN, 0, 1, 1]]", '{"boxes": 3}', "{}", '{"boxes": [[1, 2, 3, 4]], "size": [0, 0]}',
              '{"boxes": [[1, 2, 3, 4]], "size": [1e-308, 1e-308]}', '{"boxes": [[1, 2, 3, 4]], "size": [' + "9" * 400 + ", 1]}"],
    "layers": ["auto", "6-11", "output 3", "middle", "0-999999999", "99", "", ",", "input 1-2, 4", "6-" + "9" * 5000, "11-6", "none"],
    "layer": ["output 7", "output 4", "middle", "input 1", "", "auto", "3-4", "9" * 400],
    "streams": ["self_attention", STREAMS, "h_space", "self_attention_qkv", "", ",", "nothing", "self_attention, self_attention"],
    "weights": ["", "1", "1, 0.5", "nan", "inf", "1e308, 1e308", "-1", "9" * 400, "1,", "0"],
    "filename_prefix": ["style", "a/b", "../../x", "/", "", ".", "n" * 300, "nul\0", "%date%", "a" * 5000 + "/b", " ", "con:", "\ud800"],
    "checkpoint": ["", "state", "../x", "n" * 300, "nul\0", ".hidden", " ", "\ud800", "broken"],
    "text": ["", "a cup"],
}
TEXTS |= {name: TEXTS["layers"] for name in ("feature_layers", "self_attention_layers", "cross_attention_layers")}
TEXTS |= {name: TEXTS["points"] for name in ("positive_coords", "negative_coords")}


class StandInVAE:
    """Encodes and decodes by averaging and repeating 8x8 pixels."""

    first_stage_model = torch.nn.Identity()

    def __init__(self, value: float = 0.0):
        self.value = value

    def encode(self, image):
        small = torch.nn.functional.avg_pool2d(image.movedim(-1, 1).float(), 8, ceil_mode=True)
        return torch.cat([small, small[:, :1]], 1) + self.value

    def decode(self, latent):
        return latent[:, :3].repeat_interleave(8, 2).repeat_interleave(8, 3).movedim(1, -1).clamp(0, 1) + self.value


class StandInNetwork:
    """What FastSAM's network gives: three fixed objects, or NaN."""

    size, fixed_size = 64, None

    def __init__(self, value: float = 0.0):
        self.value = value

    def __call__(self, picture):
        height, width = picture.shape[2] // 4, picture.shape[3] // 4
        generator = torch.Generator().manual_seed(0)
        prediction = torch.cat([torch.tensor([[32.0, 32, 40, 40, 0.9], [20, 20, 20, 20, 0.8], [50, 50, 20, 20, 0.7]]), torch.randn(3, 32, generator=generator)], 1).T
        return prediction + self.value, torch.randn(32, height, width, generator=generator) + self.value


@functools.lru_cache(maxsize=None)
def model(name: str = "unet"):
    return {"unet": tiny_unet, "inpaint": inpaint_model}.get(name, lambda: tiny_model(name))()


def inpaint_model():
    made = tiny_unet(in_channels=9, out_channels=4)
    made.model.set_inpaint()
    return made


@functools.lru_cache(maxsize=None)
def trajectory(batch: int = 1, width: int = 8) -> Trajectory:
    return invert(model(), {"samples": random_latent(8, width, batch)}, schedule(model(), 2), tiny_cond(model()))[1]


@functools.lru_cache(maxsize=None)
def features(memory: str = "ram", batch: int = 1, width: int = 8, layers: str = "3-11") -> FeatureBank:
    return CaptureFeatures.execute(model(), trajectory(batch, width), STREAMS, layers, memory, "full").result[0]


def spoiled(value: float) -> Trajectory:
    latents = trajectory().latents.clone()
    latents[1, 0, 0, 0, 0] = value
    return replace(trajectory(), latents=latents)


def uniform(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1))


def hostile_tensors(shape: tuple[int, ...]) -> list[torch.Tensor]:
    plain = uniform(*shape)
    nan, huge = plain.clone(), plain.clone()
    nan.flatten()[-1], huge.flatten()[0] = NAN, INF
    return [
        nan, huge, plain[:0], plain[..., :0], plain.to("meta"), plain.to_sparse(), torch.quantize_per_tensor(plain, 0.1, 0, torch.qint8),
        plain.to(torch.complex64), plain[0], plain[None], (plain * 9).long(), plain.bool(), plain.double() * 1e308, torch.full(shape, 3e38),
    ]


@functools.lru_cache(maxsize=None)
def pool(kind: str) -> tuple[list, list]:
    """(good values, hostile ones) of a socket."""
    latent, cond = random_latent, tiny_cond(model())
    if kind == "MODEL":
        return [model()], [model("inpaint"), model("flux")]
    if kind == "LATENT":
        shapes = [latent(), latent(8, 16), latent(8, 8, 2)]
        odd = [latent(8, 8, 1, 0, 16), latent(8, 8, 1, 0, 9), latent()[:, :, None], latent(7, 9), torch.zeros(1, 4, 8, 8)]
        return [{"samples": x} for x in shapes], [{"samples": x} for x in odd + hostile_tensors((1, 4, 8, 8))] + [{}]
    if kind == "IMAGE":
        good = [uniform(*shape) for shape in ((1, 64, 64, 3), (2, 64, 48, 3), (1, 64, 64, 4))]
        return good, [uniform(1, 64, 64, 1), uniform(1, 1, 1, 3), uniform(1, 64, 64, 2), *hostile_tensors((1, 64, 64, 3))]
    if kind == "MASK":
        return [torch.ones(1, 64, 64), uniform(1, 64, 64), torch.zeros(1, 64, 64), uniform(2, 8, 8)], [uniform(1, 1, 1), uniform(3, 4, 4), *hostile_tensors((1, 16, 16))]
    if kind == "SIGMAS":
        steps = schedule(model(), 2)
        return [steps, schedule(model(), 1)], [steps.flip(0), steps[:1], steps[:-1], steps * 1e30, -steps, *hostile_tensors((3,))]
    if kind == "CONDITIONING":
        nan = cond[0][0].clone()
        nan[0, 0, 0] = NAN
        wide = [[uniform(1, 7, 48), {}]]
        return [cond, tiny_cond(model(), 14, 1)], [[], [[nan, {}]], [*cond, *cond], [[None, {}]], wide, [[cond[0][0][:0], {}]], [[cond[0][0][:, :0], {}]], family_cond("flux")]
    if kind == "PASTICHE_TRAJECTORY":
        own = trajectory()
        return [own], [
            trajectory(2), trajectory(1, 16), spoiled(NAN), spoiled(INF), replace(own, sigmas=own.sigmas.flip(0)), replace(own, sigmas=own.sigmas * NAN),
            replace(own, sigmas=own.sigmas[:1], latents=own.latents[:1]), replace(own, latents=own.latents[:, :0]), replace(own, latents=own.latents[:1]),
            replace(own, conditioning=[]),
        ]
    if kind == "PASTICHE_FEATURES":
        bank = features()
        return [bank, features("recompute")], [
            features("disk"), features("ram", 2), features("ram", 1, 16), features("ram", 1, 8, "11"), replace(bank, trajectory=spoiled(NAN)), replace(bank, keys=()),
        ]
    if kind == "PASTICHE_FASTSAM":
        return [FastSAM("good", StandInNetwork())], [FastSAM("nan", StandInNetwork(NAN))]
    if kind == "VAE":
        return [StandInVAE()], [StandInVAE(NAN)]
    if kind == "SAMPLER":
        return [comfy.samplers.sampler_object("euler"), midpoint_sampler()], []
    if kind == "NOISE":
        noise = inverted_noise(model(), trajectory())
        bad = inverted_noise(model(), spoiled(NAN))
        bad.latent = bad.latent * NAN
        return [noise, inverted_noise(model(), trajectory(1, 16))], [bad]
    if kind == "LORA_MODEL":
        lora = random_lora(model(), 0)
        first = min(key for key in lora if key.endswith("lora_down.weight"))
        return [lora], [{}, {first: lora[first]}, {**lora, first: lora[first] * NAN}, {"nothing.lora_up.weight": torch.zeros(2, 2)}, {**lora, first: lora[first][:0]}, {**lora, first: lora[first].to("meta")}]
    if kind == "PASTICHE_STYLE":
        lora = StyleEntry(lora=random_lora(model(), 0))
        return [lora, StyleEntry(features=features()), StyleEntry(picture={"samples": latent()})], [
            StyleEntry(), replace(lora, mask=uniform(3, 8, 8)), replace(lora, strength=0.0), StyleEntry(features=features("ram", 2)), StyleEntry(model=model("inpaint")),
        ]
    if kind in ("BOUNDING_BOX", "BOUNDING_BOXES", "BBOX"):
        return [[[1, 2, 30, 40]], [{"x": 1, "y": 2, "width": 9, "height": 9}]], [[], {}, [[]], [[[1, 2, 3, 4]], []], [None], [[1, 2]], uniform(2, 4), "x", [{"x": []}], [[INF, 0, 1, 1]]]
    return [], []


def values(node: type[io.ComfyNode]) -> st.SearchStrategy[dict]:
    """Keyword arguments of a node's `execute`."""
    required, optional = {}, {}
    for part in node.define_schema().inputs:
        drawn = _input(part)
        if drawn is not None:
            (optional if part.optional else required)[part.id] = drawn
    return st.fixed_dictionaries(required, optional=optional)


def _input(part: Any) -> st.SearchStrategy | None:
    kind = part.get_io_type()
    if kind == "BOOLEAN":
        return st.booleans()
    if kind == "COMBO":
        return st.sampled_from(list(part.options)) if part.options else None
    if kind == "INT":
        high = min(part.max if part.max is not None else 1 << 70, AFFORDABLE.get(part.id, 1 << 70))
        return st.integers(part.min, high) | st.sampled_from([part.default if part.default is not None and part.default <= high else part.min, part.min, high])
    if kind == "FLOAT":
        return st.floats(part.min, part.max, allow_nan=False) | st.sampled_from([part.default, part.min, part.max])
    if kind == "STRING":
        known = TEXTS.get(part.id, [])
        usual = [part.default] if part.default is not None else known[:1]
        return st.sampled_from([*usual * (1 + len(known) // 2), *known] or [""]) | st.text(max_size=12)
    if kind.startswith("COMFY_AUTOGROW"):
        return st.dictionaries(st.sampled_from(["style1", "style2"]), _mostly("PASTICHE_STYLE"), max_size=2)
    kinds = kind.split(",")
    return st.one_of([_mostly(name) for name in kinds if pool(name)[0]]) if any(pool(name)[0] for name in kinds) else None


@dataclass(frozen=True)
class Drawn:
    """A value of a pool, named so that reports are short."""

    kind: str
    hostile: bool
    number: int

    @property
    def value(self) -> Any:
        return pool(self.kind)[self.hostile][self.number]


def _mostly(kind: str) -> st.SearchStrategy:
    """Hostile values in one of six: an example with one of them tells more than one with five."""
    good, hostile = ([Drawn(kind, which, number) for number in range(len(pool(kind)[which]))] for which in (False, True))
    return st.integers(0, 5).flatmap(lambda number: st.sampled_from(hostile if number == 5 and hostile else good))


def _opened(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _opened(part) for name, part in value.items()}
    return value.value if isinstance(value, Drawn) else value


class _Hidden:
    unique_id = "7"
    prompt = extra_pnginfo = None


def run(node: type[io.ComfyNode], arguments: dict) -> None:
    """Executes, and samples what comes out. Raises what that raises, and AssertionError for NaN that came out silently."""
    cls = type(node.__name__, (node,), {"hidden": _Hidden})
    arguments = _opened(arguments)
    checks = {name: value for name, value in arguments.items() if name in ("points", "boxes")}
    if checks and hasattr(node, "validate_inputs"):
        node.validate_inputs(**checks)
    for result in cls.execute(**arguments).result or ():
        if isinstance(result, comfy.samplers.CFGGuider):
            _sample(result)
        elif any(hasattr(result, "is_clone") and result.is_clone(model(name)) for name in ("unet", "inpaint", "flux")):
            guider = comfy.samplers.CFGGuider(result)
            cond = family_cond("flux") if result.is_clone(model("flux")) else tiny_cond(model())
            guider.set_conds(cond, cond)
            guider.set_cfg(1.0)
            _sample(guider)
        elif isinstance(result, comfy.samplers.KSAMPLER):
            guider = comfy.samplers.CFGGuider(model())
            guider.set_conds(tiny_cond(model()), tiny_cond(model()))
            _sample(guider, result)
        elif isinstance(result, FeatureBank):
            result = result.trajectory
        for tensor in _tensors(result):
            assert bool(torch.isfinite(tensor).all()), f"NaN came out: {type(result).__name__} of shape {tuple(tensor.shape)}"


def _sample(guider: comfy.samplers.CFGGuider, sampler: Any = None) -> None:
    patcher = guider.model_patcher
    shape = (1, patcher.model.latent_format.latent_channels, 8, 8)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    sigmas = schedule(patcher, 2)
    found = guider.sample(noise, torch.zeros(shape), sampler or comfy.samplers.sampler_object("euler"), sigmas, disable_pbar=True, seed=0)
    assert bool(torch.isfinite(found).all()), "NaN came out of sampling"


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        return [tensor for part in value.values() for tensor in _tensors(part)]
    if isinstance(value, Trajectory):
        return [value.sigmas, value.latents]
    if isinstance(value, float):
        return [torch.tensor(0.0 if value == INF else value)]  # the PSNR of what is the same
    return []


def complaint(error: BaseException) -> str:
    """Why `error` is not what a user should see: a ValueError of the pack's own, in a sentence. "" where it is."""
    if isinstance(error, AssertionError):
        return str(error)
    where = traceback.extract_tb(error.__traceback__)[-1]
    place = f"{type(error).__name__} at {Path(where.filename).name}:{where.lineno}: {str(error)[:300]}"
    if type(error) is not ValueError:
        return place
    if NODES not in Path(where.filename).resolve().parents:
        return f"not the pack's own words: {place}"
    if not linecache.getline(where.filename, where.lineno).lstrip().startswith("raise "):
        return f"Python's words: {place}"
    text = str(error)
    sentence = len(text.split()) >= 4 and text.rstrip()[-1] in ".)" and not math.isnan(len(text))
    return "" if sentence else f"no sentence: {place}"


def register_files() -> None:
    """Feature files for Load Features: a good one, and some that are not."""
    import folder_paths

    register_folder()
    folder_paths.add_model_folder_path("diffusers", str(TRAINED.parent))
    path = save_bank(features(), "any")
    data = path.read_bytes()
    folder = path.parent
    (folder / "cut.safetensors").write_bytes(data[: len(data) // 2])
    (folder / "page.safetensors").write_bytes(b"<!DOCTYPE html><html>" + b" " * 200)
    (folder / "empty.safetensors").write_bytes(b"")
    folder_paths.filename_list_cache.pop(FOLDER, None)


def forget_limit() -> None:
    """Manage Style Library may have set one, which other tests' saving would meet."""
    from pastiche.nodes.host.features.shelf import set_size_limit

    set_size_limit(0)
