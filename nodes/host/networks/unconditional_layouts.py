"""Recognises the pixel-space U-Nets that papers publish as bare weights, from tensor names and shapes alone.

Two layouts, one topology (a list of encoder blocks whose outputs are all skips, a middle, a list of decoder blocks
that take one skip each):
ADM    guided-diffusion, P2 weighting, improved diffusion: time_embed, input_blocks, middle_block, output_blocks, out.
DDPM   the original DDPM's PyTorch ports: temb.dense, conv_in, down, mid, up, norm_out, conv_out.
What shapes cannot tell (heads and their order, betas) is a `Reading`'s. Sources: Dhariwal and Nichol 2021 (arXiv
2105.05233), Nichol and Dhariwal 2021 (2102.09672), Ho et al. 2020 (2006.11239), Choi et al. 2022 (2204.00227).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Callable, Iterator

from torch import Tensor

GROUPS = 32
WIDEST = 1 << 14  # channels
HEADS = {"auto": None, "1": (1, None), "2": (2, None), "4": (4, None), "8": (8, None), "16": (16, None),
         "32 channels each": (None, 32), "64 channels each": (None, 64), "128 channels each": (None, 128)}
"""Choices of a Reading's heads -> (number of heads, channels of each)."""
ORDERS = ("auto", "q, k, v of each head", "heads of each q, k, v")
ADVICE = "This node loads unconditional RGB models laid out as ADM/P2/iDDPM or as the original DDPM."


@dataclass(frozen=True)
class Layer:
    """One layer: kind conv, residual, attention, down or up. `resample` is what a residual block does to its grid."""

    kind: str
    name: str  # its tensors' prefix in the file, without the dot
    width_in: int
    width_out: int
    resample: str = ""  # "", down, up
    kernel: int = 1  # of a residual block's shortcut


@dataclass(frozen=True)
class Layout:
    """A network's plan. `heads(width)` gives the number of attention heads of a layer."""

    family: str  # for messages: ADM, iDDPM, DDPM
    channels: int  # of the widest grid; also the length of the timestep's sinusoids
    embedding: int
    levels: int
    out_channels: int  # 3, or 6 with a learned variance, of which the first 3 are the noise prediction
    scale_shift: bool
    inputs: tuple[tuple[Layer, ...], ...]
    middle: tuple[Layer, ...]
    outputs: tuple[tuple[Layer, ...], ...]
    heads: Callable[[int], int]
    per_head: bool  # rows of an attention's qkv: q, k and v of one head after the other

    @property
    def original(self) -> bool:
        """The original DDPM's details: sin before cos, eps 1e-6, downsampling padded at the far edges only."""
        return self.family == "DDPM"

    @property
    def schedule(self) -> tuple[str, int]:
        """Betas and timesteps of the published models: iDDPM's with scale and shift are ImageNet 64 and CIFAR-10."""
        return ("cosine", 4000) if self.family == "iDDPM" and self.scale_shift else ("linear", 1000)

    def layers(self) -> Iterator[tuple[str, Layer]]:
        """(name in our network, layer) of every layer."""
        for group, blocks in (("inputs", self.inputs), ("middle", (self.middle,)), ("outputs", self.outputs)):
            for number, block in enumerate(blocks):
                for position, layer in enumerate(block):
                    yield (f"middle.{position}" if group == "middle" else f"{group}.{number}.{position}"), layer


_ADM = {
    "conv": {"": "conv"}, "down": {"op": "conv"}, "up": {"conv": "conv"},
    "residual": {"in_layers.0": "norm1", "in_layers.2": "conv1", "emb_layers.1": "embed", "out_layers.0": "norm2",
                 "out_layers.3": "conv2", "skip_connection": "skip"},
    "attention": {"norm": "norm", "qkv": "qkv", "proj_out": "out"},
}
_DDPM = {
    "conv": {"": "conv"}, "down": {"conv": "conv"}, "up": {"conv": "conv"},
    "residual": {"norm1": "norm1", "conv1": "conv1", "temb_proj": "embed", "norm2": "norm2", "conv2": "conv2",
                 "nin_shortcut": "skip", "conv_shortcut": "skip"},
    "attention": {"norm": "norm", "q": "q", "k": "k", "v": "v", "proj_out": "out"},
}
_OUTER = {
    "ADM": {"time_embed.0": "embed.0", "time_embed.2": "embed.1", "out.0": "norm_out", "out.2": "conv_out"},
    "DDPM": {"temb.dense.0": "embed.0", "temb.dense.1": "embed.1", "norm_out": "norm_out", "conv_out": "conv_out"},
}


def recognise(state: dict[str, Tensor], name: str, heads: str = "auto", order: str = "auto") -> Layout:
    """The plan of a state dict. Raises ValueError, in a sentence that begins with the file's name, for other networks."""
    _refuse_others(state, name)
    try:
        if "input_blocks.0.0.weight" in state:
            layout = _recognise_adm(_Reader(state, name), heads, order)
        elif "conv_in.weight" in state and "temb.dense.0.weight" in state:
            if heads not in ("auto", "1") or order != "auto":
                raise ValueError(
                    f"heads: {name} is laid out as the original DDPM, whose attention has one head; leave heads and "
                    "attention_order at auto."
                )
            layout = _recognise_ddpm(_Reader(state, name))
        else:
            first = next(iter(sorted(state)), "nothing")
            raise ValueError(
                f"{name} is of no layout that is known here: it has neither input_blocks nor conv_in and temb.dense (its first "
                f"tensor is {first[:80]}). {ADVICE}"
            )
    except (KeyError, IndexError) as error:
        raise ValueError(f"{name} lacks {error.args[0]}, or its blocks are not numbered as expected. {ADVICE}") from error
    _check_widths(layout, name)
    return layout


def translate(state: dict[str, Tensor], layout: Layout, name: str) -> dict[str, Tensor]:
    """The file's tensors under our network's names; attention as one matrix with the rows of all q, all k, all v.

    Raises ValueError for tensors that are missing or that the layout has no place for.
    """
    names = _DDPM if layout.original else _ADM
    left, found = dict(state), {}

    def take(theirs: str, ours: str) -> None:
        for leaf in ("weight", "bias"):
            tensor = left.pop(f"{theirs}.{leaf}", None)
            if tensor is None:
                raise ValueError(f"{name} lacks {theirs}.{leaf}, which its layout ({layout.family}) has. Download it again.")
            found[f"{ours}.{leaf}"] = tensor

    for theirs, ours in _OUTER["DDPM" if layout.original else "ADM"].items():
        take(theirs, ours)
    for ours, layer in layout.layers():
        for theirs, part in names[layer.kind].items():
            whole = f"{layer.name}.{theirs}" if theirs else layer.name
            if part == "skip" and f"{whole}.weight" not in left:
                continue  # its widths tell whether the network has one: a missing one is noticed below
            take(whole, f"{ours}.{part}")
        if layer.kind == "attention":
            _join_attention(found, ours, layer, layout, name)
    if left:
        raise ValueError(
            f"{name} has {len(left)} tensors that its layout ({layout.family}) has no place for, the first "
            f"{sorted(left)[0][:80]}. {ADVICE}"
        )
    return found


def check_shapes(state: dict[str, Tensor], expected: dict[str, Tensor], layout: Layout, name: str) -> None:
    """Raises ValueError where a translated state does not fit the network that was built from its plan."""
    for key, tensor in expected.items():
        if key not in state:
            raise ValueError(f"{name}: {key} is missing, which the widths of its layer ask for. Download it again.")
        if state[key].shape != tensor.shape:
            raise ValueError(
                f"{name}: {key} is {tuple(state[key].shape)}, expected {tuple(tensor.shape)} in this layout ({layout.family}). {ADVICE}"
            )
    unknown = sorted(state.keys() - expected.keys())
    if unknown:
        raise ValueError(f"{name}: {unknown[0]} has no place in this layout ({layout.family}). {ADVICE}")


def _join_attention(found: dict[str, Tensor], ours: str, layer: Layer, layout: Layout, name: str) -> None:
    """(3C, C) rows q, k, v from the file's convolutions of width 1."""
    width = layer.width_in
    for leaf in ("weight", "bias"):
        if layout.original:
            parts = [_matrix(found.pop(f"{ours}.{part}.{leaf}"), leaf, width, width, layer.name, name) for part in "qkv"]
            joined = parts[0].new_empty(3 * width, *parts[0].shape[1:])
            for part, rows in zip(parts, joined.chunk(3)):
                rows.copy_(part)
        else:
            joined = _matrix(found[f"{ours}.qkv.{leaf}"], leaf, 3 * width, width, layer.name, name)
            if layout.per_head:  # (heads, qkv, channels of a head) -> (qkv, heads, channels of a head)
                joined = joined.unflatten(0, (layout.heads(width), 3, -1)).transpose(0, 1).flatten(0, 2)
        found[f"{ours}.qkv.{leaf}"] = joined
        found[f"{ours}.out.{leaf}"] = _matrix(found[f"{ours}.out.{leaf}"], leaf, width, width, layer.name, name)


def _matrix(tensor: Tensor, leaf: str, rows: int, width: int, layer: str, name: str) -> Tensor:
    """A convolution of width 1 as a matrix; biases as they are."""
    expected = (rows, width) if leaf == "weight" else (rows,)
    if tuple(tensor.shape[: len(expected)]) != expected or any(size != 1 for size in tensor.shape[len(expected):]):
        raise ValueError(
            f"{name}: an attention {leaf} of {layer} is {tuple(tensor.shape)}, expected {expected} and a kernel of 1."
        )
    return tensor.reshape(expected)


class _Reader:
    """Looks into a state dict: which layers a prefix has, and how wide they are."""

    def __init__(self, state: dict[str, Tensor], name: str):
        self.state, self.name = state, name

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self.state[key].shape)

    def numbers(self, prefix: str) -> list[int]:
        """Numbers that follow a prefix. Raises ValueError where they are not 0, 1, 2, ..."""
        pattern = re.compile(rf"{re.escape(prefix)}\.(\d{{1,4}})\.")
        found = sorted({int(match[1]) for match in map(pattern.match, self.state) if match})
        if found != list(range(len(found))):
            raise ValueError(
                f"{self.name}: {prefix} has the numbers {found[:40]}; some are missing (a network that resamples without "
                f"weights?). {ADVICE}"
            )
        return found

    def layer(self, prefix: str, resample: str = "") -> Layer:
        """The layer of a prefix, by its tensors' names."""
        state = self.state
        if f"{prefix}.in_layers.2.weight" in state or f"{prefix}.conv1.weight" in state:
            first = next(key for key in (f"{prefix}.in_layers.2.weight", f"{prefix}.conv1.weight") if key in state)
            skips = [f"{prefix}.{name}.weight" for name in ("skip_connection", "nin_shortcut", "conv_shortcut")]
            kernel = next((self.shape(key)[-1] for key in skips if key in state), 1)
            width_out, width_in = self.shape(first)[:2]
            return Layer("residual", prefix, width_in, width_out, resample, kernel)
        if f"{prefix}.qkv.weight" in state or f"{prefix}.q.weight" in state:
            width = self.shape(f"{prefix}.norm.weight")[0]
            return Layer("attention", prefix, width, width)
        for kind, leaf in (("down", ".op"), (resample or "up", ".conv"), ("conv", "")):
            key = f"{prefix}{leaf}.weight"
            if key in state and len(self.shape(key)) == 4:
                width_out, width_in = self.shape(key)[:2]
                return Layer(kind, prefix, width_in, width_out)
        raise ValueError(f"{self.name}: {prefix} is no residual block, attention or resampling layer of these layouts. {ADVICE}")


def _recognise_adm(read: _Reader, heads: str, order: str) -> Layout:
    names = {group: [[f"{group}.{i}.{j}" for j in read.numbers(f"{group}.{i}")] for i in read.numbers(group)]
             for group in ("input_blocks", "output_blocks")}
    outputs = [[read.layer(name) for name in block] for block in names["output_blocks"]]
    # only a decoder that resamples in residual blocks has two in one block; its encoder's look like any other
    updown = any(sum(layer.kind == "residual" for layer in block) > 1 for block in outputs)
    ups = [i for i, block in enumerate(outputs) if len(block) > 1 and block[-1].kind == ("residual" if updown else "up")]
    count, levels = len(names["input_blocks"]), len(ups) + 1
    each = (count - levels) // levels  # residual blocks a level: 1 + levels * each + levels - 1 blocks in all
    downs = [(each + 1) * level for level in range(1, levels)]
    if count != levels * (each + 1) or len(outputs) != count or ups != [place - 1 for place in downs]:
        raise ValueError(
            f"{read.name}: {count} input blocks and {len(outputs)} output blocks, upsampling in {ups}, are no U-Net with the same "
            f"number of residual blocks at every level. {ADVICE}"
        )
    if updown:
        outputs = [[*block[:-1], read.layer(block[-1].name, "up")] if i in ups else block for i, block in enumerate(outputs)]
    inputs = [[read.layer(name, "down" if updown and i in downs else "") for name in block]
              for i, block in enumerate(names["input_blocks"])]
    for i, block in enumerate(inputs):
        kinds = [layer.kind for layer in block]
        expected = ["conv"] if i == 0 else ["residual" if updown else "down"] if i in downs else ["residual"]
        if kinds not in (expected, [*expected, "attention"]):
            raise ValueError(f"{read.name}: input_blocks.{i} holds {', '.join(kinds)}, expected {expected[0]}. {ADVICE}")
    embedding = read.shape("time_embed.0.weight")
    block = inputs[1][0]  # a residual block
    scale_shift = read.shape(f"{block.name}.emb_layers.1.weight")[0] == 2 * block.width_out
    # what the published models of each kind have
    number, each_head = HEADS[heads] or ((None, 64) if updown else (4 if scale_shift else 1, None))
    return Layout(
        family="ADM" if updown else "iDDPM", channels=embedding[1], embedding=embedding[0], levels=levels,
        out_channels=read.shape("out.2.weight")[0], scale_shift=scale_shift,
        inputs=_frozen(inputs), middle=tuple(read.layer(f"middle_block.{i}") for i in read.numbers("middle_block")),
        outputs=_frozen(outputs), heads=_count_heads(number, each_head, read.name), per_head=order != ORDERS[2],
    )


def _recognise_ddpm(read: _Reader) -> Layout:
    levels = len(read.numbers("down"))
    each = len(read.numbers("down.0.block"))

    def level(side: str, i: int, count: int) -> list[list[Layer]]:
        attended = read.numbers(f"{side}.{i}.attn")
        if len(read.numbers(f"{side}.{i}.block")) != count or len(attended) not in (0, count):
            raise ValueError(f"{read.name}: {side}.{i} has not {count} residual blocks, or attention after some only. {ADVICE}")
        kinds = ("block", "attn") if attended else ("block",)
        return [[read.layer(f"{side}.{i}.{kind}.{j}") for kind in kinds] for j in range(count)]

    inputs, outputs = [[read.layer("conv_in")]], []
    for i in range(levels):
        inputs += level("down", i, each)
        if i < levels - 1:
            inputs.append([read.layer(f"down.{i}.downsample", "down")])
    for i in reversed(range(levels)):
        outputs += level("up", i, each + 1)
        if i:
            outputs[-1].append(read.layer(f"up.{i}.upsample"))
    embedding = read.shape("temb.dense.0.weight")
    return Layout(
        family="DDPM", channels=embedding[1], embedding=embedding[0], levels=levels,
        out_channels=read.shape("conv_out.weight")[0], scale_shift=False, inputs=_frozen(inputs),
        middle=tuple(read.layer(f"mid.{name}") for name in ("block_1", "attn_1", "block_2")),
        outputs=_frozen(outputs), heads=lambda width: 1, per_head=False,
    )


def _frozen(blocks: list[list[Layer]]) -> tuple[tuple[Layer, ...], ...]:
    return tuple(map(tuple, blocks))


def _count_heads(number: int | None, channels: int | None, name: str) -> Callable[[int], int]:
    def count(width: int) -> int:
        if width % (number or channels):
            what = f"{number} heads do" if number else f"heads of {channels} channels do"
            raise ValueError(f"heads: {name} has an attention of {width} channels, which {what} not divide. Choose another.")
        return number or width // channels

    return count


def _check_widths(layout: Layout, name: str) -> None:
    """Raises ValueError where a layer does not take what the one before it gives, before anything is built."""
    def wrong(layer: Layer, given: int) -> ValueError:
        return ValueError(f"{name}: {layer.name} takes {layer.width_in} channels where {given} arrive. {ADVICE}")

    def walk(block: tuple[Layer, ...], width: int) -> int:
        for layer in block:
            if layer.width_in != width or not 0 < layer.width_out <= WIDEST:
                raise wrong(layer, width)
            if layer.kind in ("residual", "attention") and (layer.width_in % GROUPS or layer.width_out % GROUPS):
                raise ValueError(
                    f"{name}: {layer.name} has {layer.width_in} and {layer.width_out} channels, expected multiples of {GROUPS}."
                )
            if layer.kind == "attention":
                layout.heads(width)
            width = layer.width_out
        return width

    width, skips = 3, []
    for block in layout.inputs:
        width = walk(block, width)
        skips.append(width)
    width = walk(layout.middle, width)
    for block in layout.outputs:
        width = walk(block, width + skips.pop())
    sound = 2 < layout.channels <= WIDEST and layout.channels % 2 == 0 and 0 < layout.embedding <= WIDEST
    if layout.out_channels not in (3, 6) or not sound:
        raise ValueError(
            f"{name} gives {layout.out_channels} channels, with sinusoids of {layout.channels}; expected 3 (or 6 with a learned "
            f"variance). {ADVICE}"
        )


def _refuse_others(state: dict[str, Tensor], name: str) -> None:
    for part, what in (
        ("transformer_blocks", "is a text-conditioned U-Net: load it with Load Diffusion Model or Load Checkpoint"),
        ("first_stage_model.", "is a latent diffusion model, whose U-Net works on a VAE's latents: this node's models work on pixels"),
        ("label_emb.", "is conditioned on classes; its unconditional sibling is needed"),
        ("down_blocks.", "has diffusers' names: put its folder, with config.json, into models/diffusers and choose that"),
    ):
        if any(part in key for key in state):
            raise ValueError(f"{name} {what}.")
    first = state.get("input_blocks.0.0.weight", state.get("conv_in.weight"))
    if first is not None and (first.ndim != 4 or first.shape[1] != 3):
        count = first.shape[1] if first.ndim > 1 else 0
        raise ValueError(f"{name} takes {count} channels, expected 3: an upscaler, a latent model, or one of grey pictures.")
    if first is not None and not any(key.startswith(("output_blocks.", "up.")) for key in state):
        raise ValueError(f"{name} has no decoder (output_blocks, up): a classifier, not a diffusion model.")
