"""Autoencoder: principal components in closed form, then windows that overlap. decoder.py trains the rest."""
import time

import torch
import torch.nn.functional as F

# The U-Net sees every latent channel with this deviation. SD1.x's sigmas end at 14.6; the smaller the latent, the
# less of it the last steps hold and the more an inversion through them loses (docs/mini/REPORT.md).
LATENT_SCALE = 1.5


def patches(pixels, size=8):
    """(B, 3, H, W) -> (B * H/8 * W/8, 192)."""
    return F.unfold(pixels, size, stride=size).transpose(1, 2).reshape(-1, 3 * size * size)


def principal_components(pools, rng, channels, rounds=24):
    """Leading eigenvectors (channels, 192) and mean (192) of patches, half photos, half art."""
    total, outer, mean = 0, 0.0, 0.0
    for _ in range(rounds):
        batch = torch.cat([pools["photo"].crops(rng, 64, 128), pools["painting"].crops(rng, 24, 128),
                           pools["drawing"].crops(rng, 8, 128)])
        p = patches(batch).double()
        total, outer, mean = total + len(p), outer + p.T @ p, mean + p.sum(0)
    mean = mean / total
    values, vectors = torch.linalg.eigh(outer / total - mean[:, None] * mean)
    leading = vectors[:, -channels:].flip(1).T
    return leading * leading.sum(1, keepdim=True).sign(), mean  # a fixed sign: brighter is larger


def set_linear_transform(model, components, mean):
    """analysis(x) = V (x - mean) and synthesis(z) = V^T z + mean of 8x8 patches, in the middle of the model's window."""
    kernel = components.reshape(-1, 3, 8, 8).float()
    middle = slice(model.margin, model.margin + 8)
    with torch.no_grad():
        for layer in (model.analysis, model.synthesis):
            layer.weight.zero_()
            layer.weight[..., middle, middle] = kernel
        model.analysis.bias.copy_(-(components @ mean).float())
        # A transposed convolution has one bias per colour; the mean patch is flat to 1 %.
        model.synthesis.bias.copy_(mean.reshape(3, 64).mean(1).float())
        for last in (model.refine[-2], model.finish.out, model.correction.out):
            torch.nn.init.zeros_(last.weight)
            torch.nn.init.zeros_(last.bias)


def lap(model, pools, rng, minutes=2.0, rate=2e-3):
    """From patches to overlapping windows: analysis and synthesis alone, by Adam on their squared error.

    A decibel better than patches, with less than half of their grid, before any network.
    """
    parameters = [*model.analysis.parameters(), *model.synthesis.parameters()]
    optimizer = torch.optim.Adam(parameters, rate, betas=(0.9, 0.98))
    start, step = time.process_time(), 0
    while (progress := (time.process_time() - start) / (60 * minutes)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 50) * max(0.02, 1 - progress)
        x = torch.cat([pools["photo"].crops(rng, 11, 128), pools["painting"].crops(rng, 4, 128), pools["drawing"].crops(rng, 1, 128)])
        y = model.synthesise(model.analyse(x))
        optimizer.zero_grad(set_to_none=True)
        F.mse_loss(y, x).backward()
        optimizer.step()
        step += 1


def latent_statistics(model, pools, rng):
    """Per-channel mean and std of latents, and a least-squares map latent -> RGB in [-1, 1].

    Returns mean (16), std (16), rgb (16, 3), bias (3); rgb and bias act on scaled latents.
    """
    batch = torch.cat([pools["photo"].crops(rng, 256, 128), pools["painting"].crops(rng, 128, 128)])
    with torch.no_grad():
        z = model.encode(batch)
    mean, std = z.mean((0, 2, 3)), z.std((0, 2, 3))
    scaled = ((z - mean[:, None, None]) / std[:, None, None]).permute(0, 2, 3, 1).reshape(-1, z.shape[1])
    design = torch.cat([scaled, torch.ones(len(scaled), 1)], 1)
    target = F.avg_pool2d(batch, 8).permute(0, 2, 3, 1).reshape(-1, 3)
    solution = torch.linalg.lstsq(design, target).solution
    return mean, std, solution[:-1].contiguous(), solution[-1].contiguous()
