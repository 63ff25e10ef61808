"""Autoencoder: principal components in closed form, then a few minutes on the decoder."""
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
    """analysis(x) = V (x - mean), synthesis(z) = V^T z + mean, as convolutions."""
    kernel = components.reshape(-1, 3, 8, 8).float()
    with torch.no_grad():
        model.analysis.weight.copy_(kernel)
        model.analysis.bias.copy_(-(components @ mean).float())
        model.synthesis.weight.copy_(kernel)
        # A transposed convolution has one bias per colour; the mean patch is flat to 1 %.
        model.synthesis.bias.copy_(mean.reshape(3, 64).mean(1).float())
        torch.nn.init.zeros_(model.refine[-2].weight)
        torch.nn.init.zeros_(model.refine[-2].bias)


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


def train_decoder(model, pools, rng, minutes, save, log, batch=16, rate=1e-3):
    """Adam, cosine rate by wall clock, on 128 px crops; the encoder stays fixed.

    The loss is MSE plus a little L1 on horizontal and vertical differences (edges).
    Half of the latents carry noise of up to 0.3 of their std: what a sampler hands over lies beside the images too.
    """
    for p in model.parameters():
        p.requires_grad_(False)
    parameters = [*model.refine.parameters(), *model.synthesis.parameters()]
    for p in parameters:
        p.requires_grad_(True)
    optimizer = torch.optim.AdamW(parameters, rate, betas=(0.9, 0.98), weight_decay=1e-4)
    average = {k: v.clone() for k, v in model.state_dict().items()}
    start, step, last_save, losses = time.monotonic(), 0, 0.0, []
    while (progress := (time.monotonic() - start) / (60 * minutes)) < 1:
        for group in optimizer.param_groups:
            warm = min(1.0, (step + 1) / 100)
            group["lr"] = rate * warm * max(0.02, 0.5 + 0.5 * torch.cos(torch.tensor(progress * torch.pi)).item())
        x = torch.cat([pools["photo"].crops(rng, batch - batch // 4, 128),
                       pools["painting"].crops(rng, batch // 4 - 1, 128), pools["drawing"].crops(rng, 1, 128)])
        with torch.no_grad():
            z = model.encode(x)
            level = 0.3 * torch.rand(len(z), 1, 1, 1) * (torch.rand(len(z), 1, 1, 1) < 0.5)
            z = z + level * torch.randn(z.shape) * model.latent_std[:, None, None]
        y = model.decode(z)
        edges = (y.diff(dim=2) - x.diff(dim=2)).abs().mean() + (y.diff(dim=3) - x.diff(dim=3)).abs().mean()
        loss = F.mse_loss(y, x) + 0.02 * edges
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        decay = min(0.998, (step + 1) / (step + 10))
        for k, v in model.state_dict().items():
            average[k].lerp_(v, 1 - decay)
        step += 1
        losses.append(loss.item())
        if time.monotonic() - last_save > 60:
            last_save = time.monotonic()
            log(f"decoder step {step} loss {sum(losses[-100:]) / len(losses[-100:]):.5f}")
            save(average)
    save(average)
    return step
