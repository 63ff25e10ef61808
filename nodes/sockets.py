"""The pack's socket types and the contracts of what travels over them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from comfy_api.latest import io

TrajectorySocket = io.Custom("PASTICHE_TRAJECTORY")
FeaturesSocket = io.Custom("PASTICHE_FEATURES")
StyleSocket = io.Custom("PASTICHE_STYLE")
FastSAMSocket = io.Custom("PASTICHE_FASTSAM")  # carries host.fastsam.FastSAM


class Fingerprint(NamedTuple):
    """What a MODEL computes with: `weights` without, `patches` only the LoRA-like weight patches (hex digests)."""

    weights: str
    patches: str


class FeatureKey(NamedTuple):
    """Names one captured tensor of the U-Net.

    stream: one of `STREAMS`; block: "input" | "middle" | "output"; number: the block's index;
    depth: the transformer block inside it (0 for `residual` and `h_space`).
    """

    stream: str
    block: str
    number: int
    depth: int = 0

    def __str__(self) -> str:
        return f"{self.stream}/{self.block}.{self.number}.{self.depth}"

    @classmethod
    def parse(cls, text: str) -> "FeatureKey":
        stream, place = text.split("/")
        block, number, depth = place.split(".")
        return cls(stream, block, int(number), int(depth))


# Per step and sample, with T = height * width tokens of the block's grid:
#   self_attention      (T, C)     normed hidden state that enters attn1's to_q, to_k, to_v
#   self_attention_q/k/v(T, C)     the same after its projection
#   cross_attention_q   (T, C)     attn2 queries; cross_attention_k (tokens of the prompt, C) its keys
#   residual            (C, h, w)  residual-block output before its skip is added
#   h_space             (C, h, w)  output of the middle block
STREAMS = (
    "self_attention",
    "self_attention_q",
    "self_attention_k",
    "self_attention_v",
    "cross_attention_q",
    "cross_attention_k",
    "residual",
    "h_space",
)


@dataclass(frozen=True)
class Trajectory:
    """A DDIM inversion, noise level by noise level.

    sigmas:       (S + 1,) float32, ascending from 0: the sampling schedule reversed.
    latents:      (S + 1, B, C, H, W) or (S + 1, B, C, T, H, W) float32 on the CPU, in the model's own latent space;
                  latents[j] is the latent at sigmas[j], latents[0] the clean one.
    conditioning: the CONDITIONING that predicted every step (one entry).
    scheme:       the inversion's name in algorithms.inversion.SCHEMES.
    fingerprint:  of the MODEL that made it.
    """

    sigmas: torch.Tensor
    latents: torch.Tensor
    conditioning: list
    scheme: str
    fingerprint: Fingerprint

    @property
    def steps(self) -> int:
        return len(self.sigmas) - 1

    @property
    def batch(self) -> int:
        return self.latents.shape[1]

    @property
    def schedule(self) -> torch.Tensor:
        """The SIGMAS that sample this trajectory back: (S + 1,), descending to 0."""
        return self.sigmas.flip(0)


class FeatureStore(Protocol):
    """Where captured tensors live. Steps count from 1, as the trajectory's latents do (0 is the clean latent)."""

    nbytes: int

    def read(self, key: FeatureKey, step: int, device: torch.device) -> torch.Tensor: ...


@dataclass(frozen=True)
class FeatureBank:
    """Features of a trajectory: what the network computed at (latents[j], sigmas[j]) for every j >= 1, or, kept while
    the inversion ran, where its scheme asked the network for level j.

    store:  None in `recompute` mode: features are then made beside the sampling, by `model`.
    model:  the MODEL they come from.
    """

    trajectory: Trajectory
    keys: tuple[FeatureKey, ...]
    memory: str
    store: FeatureStore | None
    model: Any

    def keys_of(self, stream: str) -> list[FeatureKey]:
        return [key for key in self.keys if key.stream == stream]


@dataclass(frozen=True)
class StyleEntry:
    """One style of a multi-style transfer: at most one of lora, model, features and picture says what changes the model.

    lora:         a LORA_MODEL: LoRA tensors by their standard names.
    model:        the guider's MODEL with LoRAs on top.
    features:     a style's FeatureBank with `self_attention` hidden states, injected as StyleID does.
    picture:      a LATENT of style pictures, whose rows run beside this style's as Style Reference does it.
    conditioning: this style's CONDITIONING; None takes the guider's positive.
    mask:         (B or 1, H, W) or (H, W) in [0, 1], any size, where the style acts; None is everywhere.
    strength:     of the LoRA; with features or a picture, 0..1, what the mask is multiplied with.
    start_percent, end_percent: share of the schedule, 0..1, in which the style acts.
    temperature, layers: of the injection; share: of a picture, join | replace.
    """

    lora: dict[str, torch.Tensor] | None = None
    model: Any | None = None
    features: FeatureBank | None = None
    conditioning: list | None = None
    mask: torch.Tensor | None = None
    strength: float = 1.0
    start_percent: float = 0.0
    end_percent: float = 1.0
    temperature: float = 1.5
    layers: str = "auto"
    name: str = ""
    picture: dict | None = None
    share: str = "join"
