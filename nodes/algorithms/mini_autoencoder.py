"""The mini model's autoencoder: a linear patch transform and a learned decoder that hides its seams."""
import torch
from torch import nn

PATCH = 8
LATENT_CHANNELS = 16


class ResidualBlock(nn.Module):
    """x + conv(silu(conv(silu(x)))), (B, C, H, W) to the same shape."""

    def __init__(self, channels):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        h = self.conv1(nn.functional.silu(x))
        return x + self.conv2(nn.functional.silu(h))


class MiniAutoencoder(nn.Module):
    """8x8 patches to 16 channels and back.

    `encode` projects every 8x8x3 patch on the 16 leading principal components of natural
    patches (one stride-8 convolution). `decode` inverts it linearly, then adds what a small
    convolutional network, working at latent size, predicts was lost from the patch and its
    neighbours: block seams and sharp edges.
    Pixels are (B, 3, H, W) in [-1, 1], H and W multiples of 8; latents (B, 16, H/8, W/8),
    not scaled (the latent format brings them to unit variance).
    """

    def __init__(self, width=96, latent_channels=LATENT_CHANNELS):
        super().__init__()
        self.analysis = nn.Conv2d(3, latent_channels, PATCH, stride=PATCH)
        self.synthesis = nn.ConvTranspose2d(latent_channels, 3, PATCH, stride=PATCH)
        self.refine = nn.Sequential(
            nn.Conv2d(latent_channels, width, 3, padding=1),
            ResidualBlock(width), ResidualBlock(width), ResidualBlock(width),
            nn.SiLU(), nn.Conv2d(width, 3 * PATCH * PATCH, 3, padding=1), nn.PixelShuffle(PATCH),
        )
        # Latents differ in scale by a factor of 50; the network wants them alike.
        self.register_buffer("latent_std", torch.ones(latent_channels))

    def encode(self, pixels):
        """(B, 3, H, W) in [-1, 1] -> (B, 16, H/8, W/8)."""
        return self.analysis(pixels)

    def decode(self, latents):
        """(B, 16, h, w) -> (B, 3, 8h, 8w), about [-1, 1]."""
        std = self.latent_std.to(latents)[None, :, None, None]
        return self.synthesis(latents) + self.refine(latents / std)
