"""DiffStyler's eq. 6: outside a mask the sample follows the content's own trajectory."""

from __future__ import annotations

from typing import Any

import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ...algorithms.diffstyler import keep_outside
from ...algorithms.masks import resize_mask
from ...sockets import Trajectory
from .base import Injection, Source

KEY = "pastiche_keep_outside"
BEYOND = 1.005  # schedulers round; a sigma this far above the trajectory's last one still counts as it
SAME_SIZE = "Sample at the size of the inverted content."


class KeepOutsidePatches(Injection):
    """What the model sees outside is the trajectory itself; what it answers there is the prediction with which an
    Euler step lands on the trajectory's next latent; the finished latent is the trajectory's clean one.
    """

    name = "Keep Outside Mask"

    def __init__(self, trajectory: Trajectory, mask: Tensor):
        self.trajectory, self.mask = trajectory, mask
        self.sources = (Source("trajectory", "The trajectory's latents", trajectory, size=SAME_SIZE),)

    @property
    def changes(self) -> bool:
        return not bool((self.mask >= 1).all())

    def patch(self, model: ModelPatcher) -> None:
        model.add_wrapper_with_key(WrappersMP.SAMPLER_SAMPLE, KEY, self.sampler_sample)
        model.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, KEY, self.predict_noise)

    def sampler_sample(self, executor, model_wrap, sigmas, extra_args, callback, noise, *args, **kwargs):
        last = float(sigmas[-1])  # now: uni_pc writes over it
        samples = executor(model_wrap, sigmas, extra_args, callback, noise, *args, **kwargs)
        # A part of a flow schedule hands its latent on divided by 1 - sigma, as core's samplers do.
        sampling = model_wrap.inner_model.model_sampling
        content = sampling.inverse_noise_scaling(torch.tensor(last), self._content(last, samples))
        return torch.where(self._mask(samples) == 0, content, samples)

    def predict_noise(self, executor, x, timestep, model_options={}, seed=None):
        sigma = float(timestep.flatten()[0])
        mask = self._mask(x)
        # An Euler step from the blended prediction below has blended x already; other samplers stray outside.
        denoised = executor(torch.where(mask == 0, self._content(sigma, x), x), timestep, model_options, seed)
        sigmas = model_options["transformer_options"]["sample_sigmas"].tolist()
        following = max((other for other in sigmas if other < sigma * (1 - 1e-6)), default=0.0)
        # x' = x + (s' - s) (x - D) / s = z(s')  <=>  D = x - s (z(s') - x) / (s' - s)
        leading = x - sigma * (self._content(following, x) - x) / (following - sigma)
        return keep_outside(denoised, leading, mask)

    def _content(self, sigma: float, like: Tensor) -> Tensor:
        """(B or 1, C, H, W) latent of the trajectory at `sigma`; between two levels along the straight line of a DDIM step."""
        levels, latents = self.trajectory.sigmas, self.trajectory.latents
        above = int(torch.searchsorted(levels, sigma))
        if above == 0 or above == len(levels):
            return latents[min(above, len(levels) - 1)].to(like)
        low, high = float(levels[above - 1]), float(levels[above])
        share = (sigma - low) / (high - low)
        for level, exact in ((above - 1, share < 1e-4), (above, share > 1 - 1e-4)):
            if exact:
                return latents[level].to(like)
        return torch.lerp(latents[above - 1], latents[above], share).to(like)

    def _mask(self, like: Tensor) -> Tensor:
        small = resize_mask(self.mask, *like.shape[-2:]).clamp(0, 1)
        return small.view(len(small), *[1] * (like.ndim - 3), *small.shape[1:]).to(like)  # BHW -> B1hw, or B11hw for video

    def check(self, guider: Any, noise: Tensor, sigmas: Tensor) -> None:
        end = float(self.trajectory.sigmas[-1])
        if float(sigmas[0]) > BEYOND * end:
            raise ValueError(
                f"trajectory: it ends at sigma {end:.3f}, sampling starts at {float(sigmas[0]):.3f}. "
                "Connect the same SIGMAS to DDIM Inversion and to the sampler."
            )


def keep_content_outside(model: ModelPatcher, trajectory: Trajectory, mask: Tensor) -> ModelPatcher:
    """`model` that samples freely inside `mask` and keeps the content outside.

    mask: (B or 1, H, W) or (H, W), 1 inside, any size. Returns an unpatched clone where the mask is 1 everywhere.
    Raises ValueError for a trajectory of another model.
    """
    return KeepOutsidePatches(trajectory, mask).install(model)
