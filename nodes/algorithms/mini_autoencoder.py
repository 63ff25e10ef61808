"""The mini model's autoencoder: a linear patch transform and a learned decoder that hides its seams."""

from __future__ import annotations
import torch
from torch import nn

PATCH = 8
LATENT_CHANNELS = 16
WIDTH = 96  # of the decoder at latent size


class ResidualBlock(nn.Module):
    """x + conv(silu(conv(silu(x)))), (B, C, H, W) to the same shape."""

    def __init__(self, channels):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        h = self.conv1(nn.functional.silu(x))
        return x + self.conv2(nn.functional.silu(h))


class Finish(nn.Module):
    """Works at pixel resolution, across the borders of patches, which no layer at latent size can smooth.

    features (B, width, h, w) of the layers before and the picture so far (B, 3, 8h, 8w) -> what to add to it.
    """

    def __init__(self, width, channels, deep=4, blocks=3):
        super().__init__()
        self.deep = nn.Sequential(*(ResidualBlock(width) for _ in range(deep)), nn.SiLU(),
                                  nn.Conv2d(width, channels * PATCH * PATCH, 1), nn.PixelShuffle(PATCH))
        self.join = nn.Conv2d(channels + 3, channels, 3, padding=1)
        self.blocks = nn.Sequential(*(ResidualBlock(channels) for _ in range(blocks)), nn.SiLU())
        self.out = nn.Conv2d(channels, 3, 3, padding=1)

    def forward(self, features, picture):
        return self.out(self.blocks(self.join(torch.cat([self.deep(features), picture], 1))))


class Correction(nn.Module):
    """What the latents around say that a linear transform cannot: pixels (B, 3, 8h, 8w) -> (B, channels, h, w), of unit size."""

    def __init__(self, width, channels):
        super().__init__()
        self.layers = nn.Sequential(nn.PixelUnshuffle(PATCH), nn.Conv2d(3 * PATCH * PATCH, width, 3, padding=1),
                                    ResidualBlock(width), ResidualBlock(width), nn.SiLU())
        self.out = nn.Conv2d(width, channels, 3, padding=1)

    def forward(self, pixels):
        return self.out(self.layers(pixels))


class MiniAutoencoder(nn.Module):
    """A lapped linear transform of pictures to 16 channels, 8x smaller, and a network back.

    `encode` is one stride-8 convolution: each latent pixel weighs a window of 16x16 pixels that overlaps its neighbours'
    (`window` 8: patches, each by itself), and a small network's correction of it (`correction` channels; 0: none).
    `decode` has the transposed convolution, adds what a small convolutional network, working at latent size, predicts was
    lost, then what a few layers at pixel resolution say (`finish` channels; 0: none). Pixels are (B, 3, H, W) in [-1, 1],
    H and W multiples of 8, mirrored at the borders; latents (B, 16, H/8, W/8), not scaled (the latent format brings them
    to the same deviation).
    """

    def __init__(self, width=WIDTH, latent_channels=LATENT_CHANNELS, finish=0, window=PATCH, correction=0):
        super().__init__()
        self.margin = (window - PATCH) // 2  # of the window around its patch
        self.analysis = nn.Conv2d(3, latent_channels, window, stride=PATCH)
        # one more latent pixel on every side, then cut to the picture
        self.synthesis = nn.ConvTranspose2d(latent_channels, 3, window, stride=PATCH, padding=PATCH + self.margin)
        self.refine = nn.Sequential(
            nn.Conv2d(latent_channels, width, 3, padding=1),
            ResidualBlock(width), ResidualBlock(width), ResidualBlock(width),
            nn.SiLU(), nn.Conv2d(width, 3 * PATCH * PATCH, 3, padding=1), nn.PixelShuffle(PATCH),
        )
        self.finish = Finish(width, finish) if finish else None
        self.correction = Correction(correction, latent_channels) if correction else None
        # Latents differ in scale by a factor of 50; the network wants them alike.
        self.register_buffer("latent_std", torch.ones(latent_channels))

    @classmethod
    def from_state(cls, state):
        """The autoencoder of a state dict, of any generation: width, `finish` and window are read from its shapes."""
        last = state.get("finish.out.weight")
        analysis, correction = state.get("analysis.weight"), state.get("correction.out.weight")
        model = cls(*state["refine.0.weight"].shape[:2], 0 if last is None else last.shape[1],
                    PATCH if analysis is None else analysis.shape[-1], 0 if correction is None else correction.shape[1])
        model.load_state_dict(state)
        return model

    def analyse(self, pixels):
        """The linear part of `encode`."""
        return self.analysis(nn.functional.pad(pixels, [self.margin] * 4, "reflect"))

    def synthesise(self, latents):
        """The linear part of `decode`."""
        return self.synthesis(nn.functional.pad(latents, [1] * 4, "replicate"))

    def encode(self, pixels):
        """(B, 3, H, W) in [-1, 1] -> (B, 16, H/8, W/8)."""
        latents = self.analyse(pixels)
        if self.correction is None:
            return latents
        return latents + self.latent_std.to(latents)[None, :, None, None] * self.correction(pixels)

    def decode(self, latents):
        """(B, 16, h, w) -> (B, 3, 8h, 8w), about [-1, 1]."""
        features = self.refine[:4](latents / self.latent_std.to(latents)[None, :, None, None])
        picture = self.synthesise(latents) + self.refine[4:](features)
        return picture if self.finish is None else picture + self.finish(features, picture)
