"""What a kind of network must tell and do so that features can be read from it and put into it."""

from __future__ import annotations

from typing import Any, Callable, Iterable, NamedTuple, Protocol

from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ...sockets import STREAMS, FeatureKey

Place = tuple[str, int]  # block, number
Slot = tuple[str, int, int]  # block, number, depth: one transformer block
Emit = Callable[[FeatureKey, Tensor], None]

RUN = "pastiche_run"  # in a run's transformer_options: a `Running`

EXPLICIT = {"self_attention_qkv": ("self_attention_q", "self_attention_k", "self_attention_v"),
            "self_attention_qk": ("self_attention_q", "self_attention_k"),
            "cross_attention": ("cross_attention_q", "cross_attention_k")}


class Attended(NamedTuple):
    """What enters the projections of one self-attention: (rows, T, C) each; T of `query` may differ from the others'."""

    query: Tensor
    keys: Tensor
    values: Tensor


class Replacement(NamedTuple):
    """What a change of one self-attention's input wants: `weight` of its result over that without the change.

    weight: None where it replaces altogether, else a number or (rows, T or 1, 1).
    passes: where the weight is 0 the inputs are those given, so that the result there needs no second attention.
    """

    inputs: Attended
    weight: Tensor | float | None = None
    passes: bool = False


ChangeHidden = Callable[[Tensor, Attended, dict], Replacement | None]
"""(own, inputs, options) -> what to attend with, None for no change here. `own` is the sample's hidden state before
any change of ours, (rows, T, C); `inputs` what the changes installed earlier made of it; options as patches get them."""


Attend = Callable[[Tensor, Tensor, Tensor, dict], Tensor]
"""(q, k, v, options) -> (rows, T, C): one attention on projected q, k, v."""

ChangeResidual = Callable[[Place, Tensor, tuple[int, int], dict], "Tensor | None"]
"""(place, the block's input, (h, w) of its output, options) -> what to add to its skip, or None for its own output."""


class Running(Protocol):
    """What patches may know of the sampling run that a forward belongs to."""

    adapter: NetworkAdapter  # of the network that runs, which need not be the object that the patches were made for
    model_options: dict  # of the run

    def replaced_attention(self, kind: str, slot: tuple) -> Callable | None:
        """Another node's attn1/attn2 replacement at a slot, if there is one: patches' options lack `patches_replace`."""
        ...


class NetworkAdapter:
    """One MODEL's network. A family implements what it has; what it lacks is refused with its name.

    `find_adapter` in families.py makes them. Places are ("input" | "middle" | "output", number).
    """

    family: str

    def places(self, layers: str, kind: str = "attention") -> list[Place]:
        """Resolves layer text; `kind` is "attention" or "residual". Raises ValueError for places without it."""
        raise self._lacks(f"{kind} blocks")

    def default_places(self, kind: str, block: str = "output") -> list[Place]:
        """Every place of one kind in one block, in the order they run."""
        raise self._lacks(f"{kind} blocks")

    def depth(self, place: Place) -> int:
        """How many transformer blocks a place has."""
        raise self._lacks("attention blocks")

    def heads(self, slot: Slot) -> int:
        raise self._lacks("attention blocks")

    def grid(self, place: Place, height: int, width: int) -> tuple[int, int]:
        """(h, w) of the features at a place for a (height, width) latent."""
        raise self._lacks("places")

    def shape(self, key: FeatureKey, height: int, width: int, context_tokens: int = 77) -> tuple[int, ...]:
        """Shape of one captured tensor of one sample, without batch and step."""
        raise self._lacks(f"{key.stream} features")

    def keys(self, streams: str, layers: str) -> list[FeatureKey]:
        """Every tensor that `streams` (comma-separated) of `layers` consists of."""
        keys: dict[FeatureKey, None] = {}
        for stream in parse_streams(streams):
            if stream == "h_space":
                keys[FeatureKey(stream, "middle", 0)] = None
                continue
            kind = "residual" if stream == "residual" else "attention"
            for place in self.places(layers, kind):
                depths = 1 if kind == "residual" else self.depth(place)
                keys.update({FeatureKey(stream, *place, depth): None for depth in range(depths)})
        return list(keys)

    def slots(self, places: Iterable[Place]) -> list[Slot]:
        return [(*place, depth) for place in places for depth in range(self.depth(place))]

    def project(self, kind: str, slot: Slot, name: str, hidden: Tensor) -> Tensor:
        """`hidden` through the running network's own projection; kind: attn1 | attn2, name: to_q | to_k | to_v."""
        raise self._lacks("attention blocks")

    def projection_weight(self, kind: str, slot: Slot, name: str) -> Tensor:
        """That projection's matrix, (out, in) float32 on the CPU, for use outside a run."""
        raise self._lacks("attention blocks")

    def is_residual(self, layer: Any, place: Place) -> bool:
        """Whether `layer` is the residual block whose features a place stands for."""
        return False

    def capture(self, transformer_options: dict, keys: Iterable[FeatureKey], emit: Emit) -> None:
        """Adds patches to `transformer_options` that pass each tensor of `keys` to `emit`, whole batches at a time.

        They come after the patches already there and change nothing. Raises ValueError where another node is in the way.
        """
        raise self._lacks("features")

    def change_hidden(self, model: ModelPatcher, change: ChangeHidden, blends: bool) -> None:
        """Puts `change` before the self-attentions of `model` (a clone), after the changes already there.

        Results nest: each is blended, by its weight, with what the attention gives under the changes before it.
        blends: whether `change` ever returns a weight.
        """
        raise self._lacks("attention blocks")

    def replace_attention(
        self, model: ModelPatcher, kind: str, slots: Iterable[Slot], make: Callable[[Slot, Attend], Attend]
    ) -> Callable[[dict], list[str]]:
        """Puts make(slot, attend) in the place of attentions of `model` (a clone); attend is what would have run there.

        kind: attn1 (self) or attn2 (cross). Returns what tells, of a run's transformer_options, the places
        ("attn1 of output 7") that another node has taken since.
        """
        raise self._lacks("attention blocks")

    def change_residual(self, model: ModelPatcher, places: Iterable[Place], change: ChangeResidual) -> Callable[[dict], bool]:
        """Puts `change` in the place of the residual blocks' output at some places of `model` (a clone).

        Returns what tells, of a run's transformer_options, whether another node runs such blocks in its own way.
        """
        raise self._lacks("residual blocks")

    def change_h_space(self, model: ModelPatcher, change: Callable[[dict], dict]) -> None:
        """Puts `change` after the middle block of `model` (a clone): args["h"] is (rows, C, h, w), options are in
        args["transformer_options"]; the args it returns go to the decoder."""
        raise self._lacks("h_space")

    def empty_prompt(self) -> list:
        """A CONDITIONING of one entry that stands for the papers' empty prompt."""
        raise self._lacks("empty prompt")

    def _lacks(self, what: str) -> ValueError:
        return ValueError(f"{self.family} has no {what} that Pastiche knows; connect an SD1.x, SD2.x, SDXL or Pastiche mini model.")


def parse_streams(text: str) -> list[str]:
    """Comma-separated stream names -> members of STREAMS, `self_attention_qkv` and the like spelled out."""
    streams: dict[str, None] = {}
    for name in (part.strip().lower() for part in text.split(",")):
        members = EXPLICIT.get(name, (name,))
        if members[0] not in STREAMS:
            raise ValueError(
                f'streams: unknown stream "{name}"; choose among self_attention, residual, h_space, {", ".join(EXPLICIT)}.'
            )
        streams.update(dict.fromkeys(members))
    return list(streams)
