"""A film in one style: chunks of frames are inverted, restyled, decoded and written one after the other."""

from __future__ import annotations

import logging
import uuid
from dataclasses import astuple, dataclass, replace
from typing import Any

import comfy.model_management
import comfy.samplers
import torch
import torch.nn.functional as F
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ...algorithms.frames import film_statistics, spread
from ...algorithms.motion import steadied
from ...algorithms.styleid import masked_statistics, restandardised
from ...sockets import FeatureBank, FeatureKey
from ..checks import HALF, check_tensor
from ..features.on_the_way import invert_and_capture
from ..features.stores import readable_size
from ..injections.style import inject_style
from ..networks.content import digest as content_digest
from ..networks.families import find_adapter
from ..networks.fingerprint import fingerprint, weights_digest
from ..networks.marks import require_plain
from ..trajectories.inversion import reconstruct
from .links import LINKS, CarriedRows, FrameLinks
from .progress import FilmProgress
from .written import WrittenFrames, digest

STREAM = "self_attention"
PROCESS = uuid.uuid4().hex  # objects are numbered anew when ComfyUI starts
PATCHED = (
    "model_options", "object_patches", "weight_wrapper_patches", "attachments", "additional_models", "callbacks", "wrappers", "injections",
    "hook_patches",
)  # of a ModelPatcher; LoRAs are in its fingerprint
SCHEDULERS = comfy.samplers.SCHEDULER_NAMES


@dataclass(frozen=True)
class FilmSettings:
    """What a film's pictures depend on, beside the film, the style and the model.

    steps, scheduler: of inversion and sampling; unused where the style's features bring their schedule. gamma, temperature, layers:
    Style Injection's. adain: whether the latents take the style's statistics, with those of `statistics_frames` frames of the film
    as their own. link: see LINKS. steady: 0..1, of `algorithms.motion.steadied`.
    """

    steps: int = 20
    scheduler: str = "normal"
    gamma: float = 0.75
    temperature: float = 1.5
    adain: bool = True
    link: str = "none"
    steady: float = 0.6
    layers: str = "auto"
    statistics_frames: int = 8


class Film:
    """Restyles `frames`, (F, H, W, C) in 0..1, and writes them.

    style: a picture (1, H, W, C), or the FeatureBank of one. memory: where a chunk's features are, see MEMORY. Of the frames before a chunk
    only the last written picture is needed, and for the links two frames' rows, so memory does not grow with the film, and chunks of any
    size give one picture (to rounding).
    """

    def __init__(
        self, model: ModelPatcher, vae: Any, frames: Tensor, style: Tensor | FeatureBank, settings: FilmSettings, positive: list | None = None,
        memory: str = "ram",
    ):
        """Raises ValueError for a MODEL, VAE or style that does not fit."""
        require_plain(model, "would change the inversion")
        if settings.link not in LINKS:
            raise ValueError(f'link: got "{settings.link}", choose among {", ".join(LINKS)}.')
        self.model, self.vae, self.settings, self.positive, self.memory = model, vae, settings, positive, memory
        self.places = find_adapter(model).places(settings.layers)
        self.frames, self._given = _fitted(vae, frames), style
        self.style: FeatureBank | None = None
        if isinstance(style, FeatureBank):
            self._require_style(style)
            self.sigmas, self.style = style.trajectory.schedule, style
        else:
            if style.shape[0] != 1:
                raise ValueError(f"style: got {style.shape[0]} pictures; a film takes one style: connect a single picture.")
            self.sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), settings.scheduler, settings.steps).cpu()

    def identity(self) -> str:
        """Digest of everything that the restyled frames depend on, beside rounding."""
        style = self._given
        if isinstance(style, FeatureBank):
            trajectory = style.trajectory
            style_parts = [trajectory.latents[-1], trajectory.sigmas, trajectory.conditioning[0][0], sorted(map(str, style.keys))]
        else:
            style_parts = [style]
        conditioning = [] if self.positive is None else [self.positive[0][0], self.positive[0][1].get("pooled_output")]
        return digest([
            *fingerprint(self.model), self._of_other_nodes(), weights_digest(self.vae),
            self.frames, *style_parts, *conditioning, astuple(self.settings), self.sigmas,
        ])

    def _of_other_nodes(self) -> str:
        """What they put on the MODEL and on positive; "" where there is nothing.

        It can be told for as long as this ComfyUI runs and no longer: frames of other settings are never taken for this film's.
        """
        patched = {name: getattr(self.model, name, None) for name in PATCHED}
        conditioned = [{name: value for name, value in options.items() if name != "pooled_output"} for _, *rest in self.positive or () for options in rest]
        if not _holds_anything([patched, conditioned]) and len(self.positive or ()) < 2:
            return ""
        return f"{PROCESS} {content_digest(self.model, self.positive) or uuid.uuid4().hex}"

    def restyle(self, written: WrittenFrames, chunk: int) -> Tensor:
        """(F, H, W, 3) in 0..1, what is on the disk: frames written before are read, the others made, `chunk` at a time."""
        done, count, settings = written.done, len(self.frames), self.settings
        out: Tensor | None = None
        for number in range(done):
            out = self._put(out, number, written.read(number))
        if done == count:
            return out
        own = _statistics_in(written.tensors)
        sampled = spread(count, settings.statistics_frames) if settings.adain and own is None else []
        progress = FilmProgress((self.style is None) + len(sampled) + 2 * (count - done))
        style = self._style(progress)
        if sampled:
            own = self._statistics(sampled, chunk, progress)
        wanted = masked_statistics(style.trajectory.latents[-1].float()) if settings.adain else None
        carried = _rows_in(written.tensors) if done else None
        for begin in range(done, count, chunk):
            end, after = min(begin + chunk, count), CarriedRows()
            decoded = self._restyled(begin, end, style, own, wanted, carried, after, progress)
            for number, frame in zip(range(begin, end), decoded):
                comfy.model_management.throw_exception_if_processing_interrupted()
                if number and settings.steady:
                    frame = self._steadied(frame, number, out[number - 1])
                pixels = (frame * 255).round().to(torch.uint8)
                written.write(number, pixels)
                out = self._put(out, number, pixels)
            written.advance(end, _tensors(own, after) if end < count else {})
            progress.written(end, count, pixels)
            carried = after
        return out

    def _steadied(self, frame: Tensor, number: int, before: Tensor) -> Tensor:
        device, size = comfy.model_management.get_torch_device(), frame.shape[:2]
        now, then = (_sized(self.frames[i], *size) for i in (number, number - 1))
        return steadied(*(picture.to(device) for picture in (frame, now, before, then)), self.settings.steady).cpu()

    def _put(self, out: Tensor | None, number: int, pixels: Tensor) -> Tensor:
        if out is None:
            out = torch.empty(len(self.frames), *pixels.shape, dtype=torch.float32)
        if pixels.shape != out.shape[1:]:
            raise ValueError(f"vae: frame {number + 1} is {tuple(pixels.shape)}, the first one {tuple(out.shape[1:])}.")
        out[number] = pixels.float() / 255
        return out

    def _style(self, progress: FilmProgress) -> FeatureBank:
        if self.style is None:
            with progress.stage(1):
                _, _, self.style = self._inverted(self._encoded(_fitted(self.vae, self._given), "style"), "ram", remember=True)
        return self.style

    def _require_style(self, bank: FeatureBank) -> None:
        if bank.trajectory.batch != 1:
            raise ValueError(f"style_features: they are of {bank.trajectory.batch} pictures; a film takes one style.")
        if bank.trajectory.latents.ndim != 5:
            raise ValueError("style_features: they are of a video; a film takes those of a single picture.")

    def _statistics(self, numbers: list[int], chunk: int, progress: FilmProgress) -> tuple[Tensor, Tensor]:
        """Mean and deviation, (1, C, 1, 1) each, of inverted frames spread over the whole film: no chunk matters to them."""
        noises = []
        for begin in range(0, len(numbers), chunk):
            part = numbers[begin : begin + chunk]
            with progress.stage(len(part)):
                _, trajectory, _ = self._inverted(self._encoded(self.frames[part], "frames"), "recompute")
            noises.append(trajectory.latents[-1].float())
        return film_statistics(torch.cat(noises))

    def _restyled(
        self, begin: int, end: int, style: FeatureBank, own: tuple | None, wanted: tuple | None, carried: CarriedRows | None, after: CarriedRows,
        progress: FilmProgress,
    ) -> Tensor:
        """(F, H, W, 3) decoded frames begin..end."""
        settings, adapter = self.settings, find_adapter(self.model)
        with progress.stage(end - begin):
            _, trajectory, content = self._inverted(self._encoded(self.frames[begin:end], "frames"), self.memory)
        noise = trajectory.latents[-1]
        if wanted is not None:
            noise = restandardised(noise, own, wanted)
        patched = inject_style(
            self.model, style, content if settings.gamma else None, settings.gamma, settings.temperature, 1.0, settings.layers, 0.0, 1.0, None
        )
        patched = FrameLinks(adapter, self.places, settings.link, carried, after).install(patched)
        with progress.stage(end - begin):
            latent = reconstruct(patched, replace(trajectory, latents=noise.unsqueeze(0)))
        images = self.vae.decode(latent)
        if images.ndim != 4 or len(images) != end - begin:
            raise ValueError(f"vae: it decodes {end - begin} frames to {tuple(images.shape)}. Connect the model's own VAE, of single pictures.")
        if begin == 0 and (after.first or after.last):
            size = sum(rows.nbytes for part in (after.first, after.last) for rows in part.values())
            logging.info("Pastiche: the links carry %s of rows from chunk to chunk.", readable_size(size))
        return check_tensor(images[..., :3].float().cpu(), "vae", HALF).clamp(0, 1)

    def _inverted(self, latent: Tensor, memory: str, remember: bool = False) -> tuple[dict, Any, FeatureBank]:
        return invert_and_capture(
            self.model, {"samples": latent}, self.sigmas, STREAM, self.settings.layers, memory, positive=self.positive, remember=remember
        )

    def _encoded(self, images: Tensor, name: str) -> Tensor:
        """(F, C, h, w) latents of (F, H, W, 3) pictures."""
        comfy.model_management.throw_exception_if_processing_interrupted()
        latent = self.vae.encode(images)
        if latent.ndim != 4 or len(latent) != len(images):
            raise ValueError(
                f"vae: it makes a latent {tuple(latent.shape)} of {len(images)} {name}, as the VAEs of video models do. "
                "Restyle Frames needs one of single pictures, as SD1.x, SD2.x, SDXL and the mini model have."
            )
        return latent


def _holds_anything(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(_holds_anything, value.values()))
    return any(map(_holds_anything, value)) if isinstance(value, (list, tuple)) else value is not None


def _fitted(vae: Any, frames: Tensor) -> Tensor:
    """(F, H, W, 3) as the VAE cuts them: to whole latent cells."""
    frames = frames[..., :3]
    cut = getattr(vae, "vae_encode_crop_pixels", None)
    return frames if cut is None else cut(frames)


def _sized(frame: Tensor, height: int, width: int) -> Tensor:
    """(h, w, 3) at the size of the decoded frames, which a VAE that pads makes larger."""
    if frame.shape[:2] == (height, width):
        return frame
    return F.interpolate(frame.movedim(-1, 0).unsqueeze(0), (height, width), mode="bilinear", antialias=True)[0].movedim(0, -1)  # HWC -> CHW -> HWC


def _tensors(own: tuple[Tensor, Tensor] | None, rows: CarriedRows) -> dict[str, Tensor]:
    """What the next chunk needs, by name."""
    statistics = {} if own is None else dict(zip(("statistics/mean", "statistics/std"), own))
    carried = {f"{part}/{name}": tensor for part in ("first", "last") for name, tensor in getattr(rows, part).items()}
    return statistics | carried


def _statistics_in(tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor] | None:
    return (tensors["statistics/mean"], tensors["statistics/std"]) if "statistics/mean" in tensors else None


def _rows_in(tensors: dict[str, Tensor]) -> CarriedRows:
    return CarriedRows(*(
        {name.removeprefix(part): tensor for name, tensor in tensors.items() if name.startswith(part)} for part in ("first/", "last/")
    ))


def restyle_film(
    model: ModelPatcher, vae: Any, frames: Tensor, style: Tensor | None, style_features: FeatureBank | None, settings: FilmSettings, chunk: int,
    filename_prefix: str, resume: bool, positive: list | None = None, memory: str = "ram",
) -> tuple[Tensor, WrittenFrames]:
    """`frames` in the style of a picture or of its features, and where they are written. Raises ValueError for inputs that do not fit."""
    if (style is None) == (style_features is None):
        given = "both" if style is not None else "neither"
        raise ValueError(f"style: connect a style picture or style_features, one of them; got {given}.")
    film = Film(model, vae, frames, style if style_features is None else style_features, settings, positive, memory)
    written = WrittenFrames(filename_prefix, film.identity(), len(film.frames), resume)
    return film.restyle(written, chunk), written
