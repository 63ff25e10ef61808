import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pastiche.nodes.algorithms.lora import add_rows, apply_low_rank, convolve_low_rank, init_low_rank, select_targets
from pastiche.nodes.algorithms.training import (
    loss_weight,
    output_gain,
    random_crop,
    rate_share,
    signal_to_noise,
    step_generator,
    weighted_error,
    window_means,
)

UNET = [
    "time_embed.0",
    "input_blocks.1.1.transformer_blocks.0.attn1.to_q",
    "input_blocks.1.1.transformer_blocks.0.attn1.to_out.0",
    "input_blocks.1.1.transformer_blocks.0.attn2.to_k",
    "input_blocks.1.1.transformer_blocks.0.ff.net.0.proj",
    "middle_block.1.transformer_blocks.0.attn1.to_v",
]
FLUX = ["img_in", "double_blocks.0.img_attn.qkv", "double_blocks.0.img_attn.proj", "double_blocks.0.img_mlp.0",
        "single_blocks.0.linear1", "single_blocks.0.linear2", "final_layer.linear"]
ADM = ["joint_blocks.0.x_block.attn.qkv", "joint_blocks.0.x_block.mlp.fc1", "layers.0.attention.out", "label_emb.0.0"]


def test_targets():
    assert select_targets(UNET, "qkv") == [UNET[1], UNET[3], UNET[5]]
    assert select_targets(UNET, "qkv+out") == [UNET[1], UNET[2], UNET[3], UNET[5]]
    assert select_targets(UNET, "all") == UNET and select_targets(UNET, "all+conv") == UNET
    assert select_targets(FLUX, "qkv") == ["double_blocks.0.img_attn.qkv", "single_blocks.0.linear1"]
    assert select_targets(FLUX, "qkv+out") == [FLUX[1], FLUX[2], FLUX[4], FLUX[5]]
    assert select_targets(ADM, "qkv") == [ADM[0]] and select_targets(ADM, "qkv+out") == [ADM[0], ADM[2]]
    fused = ["single_blocks.0.linear1", "double_blocks.0.img_attn.linear1", "time_attention.linear1"]
    assert select_targets(fused, "qkv") == fused[:1]  # only Flux's single blocks hold q, k, v in a layer of that name
    others = ["double_layers.0.attn.w1q", "blocks.0.attn.img_qkv", "blocks.0.self_attention.to_query", "blocks.0.self_attention.out_layer",
              "blocks.0.feed_forward.out_layer", "double_layers.0.attn.w2o", "double_layers.0.mlp.w1q"]
    assert select_targets(others, "qkv") == others[:3] and select_targets(others, "qkv+out") == [*others[:4], others[5]]
    with pytest.raises(ValueError, match='got "q"'):
        select_targets(UNET, "q")


def test_initialisation_is_seeded_and_starts_at_nothing():
    down, up = init_low_rank(40, 24, 8, torch.Generator().manual_seed(3))
    again, _ = init_low_rank(40, 24, 8, torch.Generator().manual_seed(3))
    assert torch.equal(down, again) and not up.any()
    assert init_low_rank(4000, 2, 8, torch.Generator().manual_seed(0))[0].std() == pytest.approx(1 / 8, rel=0.02)


def test_a_convolutions_window_changes_neither_the_start_nor_its_size():
    down, up = init_low_rank(400, 24, 8, torch.Generator().manual_seed(0), (3, 3))
    assert down.shape == (8, 400, 3, 3) and up.shape == (24, 8, 1, 1) and not up.any()
    # D sums over nine cells: its output on unit noise is as large as a linear layer's, sqrt(400) / 8.
    assert down.flatten(1).norm(dim=1).mean() == pytest.approx(400**0.5 / 8, rel=0.02)


@pytest.mark.parametrize("stride, padding", [(1, 1), (2, 0)])
def test_convolution_equals_merged_weights(stride, padding, generator):
    """float64: U (D * x) beside W * x is (W + scale U D) * x, with its gradient."""
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
    weight, x, low = draw(5, 4, 3, 3), draw(2, 4, 7, 6), [draw(2, 4, 3, 3), draw(5, 2, 1, 1)]
    convolve = lambda x, kernel: F.conv2d(x, kernel, None, stride, padding)
    beside, merged = ([t.clone().requires_grad_() for t in low] for _ in range(2))
    found = convolve(x, weight) + convolve_low_rank(convolve, x, *beside, 1.7)
    change = (merged[1].flatten(1) @ merged[0].flatten(1)).reshape(weight.shape)
    expected = convolve(x, weight + 1.7 * change)
    torch.testing.assert_close(found, expected)
    for a, b in zip(torch.autograd.grad(found.square().sum(), beside), torch.autograd.grad(expected.square().sum(), merged)):
        torch.testing.assert_close(a, b)


def test_gradient_equals_autograd_on_merged_weights(generator):
    """float64: d loss / d (down, up) beside the weight is that of the same numbers merged into it."""
    weights = [torch.randn(6, 6, generator=generator, dtype=torch.float64) for _ in range(3)]
    low = [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3) for shape in ((2, 6), (6, 2))]
    x = torch.randn(5, 6, generator=generator, dtype=torch.float64)
    scale = 1.7

    def attention(linear):
        q, k, v = (linear(x, i) for i in range(3))
        return F.scaled_dot_product_attention(q[None], k[None], v[None]).square().sum()

    beside = [t.clone().requires_grad_() for t in low]
    attention(lambda x, i: x @ weights[i].T + apply_low_rank(x, beside[2 * i], beside[2 * i + 1], scale)).backward()
    merged = [t.clone().requires_grad_() for t in low]
    attention(lambda x, i: x @ (weights[i] + scale * merged[2 * i + 1] @ merged[2 * i]).T).backward()
    for a, b in zip(beside, merged):
        assert a.grad.abs().max() > 1e-3
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-9)


def test_rows_take_their_own_update(generator):
    x = torch.randn(3, 7, 6, generator=generator, dtype=torch.float64)
    down, up = (torch.randn(3, *s, generator=generator, dtype=torch.float64) for s in ((2, 6), (5, 2)))
    scale = torch.tensor([1.0, 0.0, 2.5], dtype=torch.float64)
    output = torch.randn(3, 7, 5, generator=generator, dtype=torch.float64)
    together = add_rows(output, x, down, up * scale[:, None, None])
    for row in range(3):
        alone = output[row] + apply_low_rank(x[row], down[row], up[row], float(scale[row]))
        torch.testing.assert_close(together[row], alone)
    assert torch.equal(together[1], output[1])


def _eps(sigma, output, x):
    return x - output * sigma[:, None]


def _v(sigma, output, x):
    variance = sigma[:, None] ** 2 + 1
    return x / variance - output * sigma[:, None] / variance.sqrt()


@pytest.mark.parametrize("denoise, weight", [(_eps, lambda s: 1 / s**2), (_v, lambda s: (s**2 + 1) / s**2)])
def test_loss_is_the_error_of_the_models_own_output(denoise, weight, generator):
    sigma = torch.tensor([0.05, 1.0, 14.6], dtype=torch.float64)
    gain = output_gain(denoise, sigma)
    torch.testing.assert_close(gain**-2, weight(sigma))
    x, m, target = (torch.randn(3, 8, generator=generator, dtype=torch.float64) for _ in range(3))
    error = weighted_error(denoise(sigma, m, x), denoise(sigma, target, x), loss_weight(gain, sigma**-2, 0))
    torch.testing.assert_close(error, (m - target).square().mean(dim=1))


def test_min_snr_equals_its_published_forms():
    sigma = torch.tensor([0.1, 0.6, 3.0], dtype=torch.float64)
    snr = signal_to_noise(lambda s, noise, latent: latent + s[:, None] * noise, sigma)
    torch.testing.assert_close(snr, sigma**-2)
    eps = loss_weight(output_gain(_eps, sigma), snr, 5.0) * output_gain(_eps, sigma) ** 2
    torch.testing.assert_close(eps, snr.clamp(max=5) / snr)
    v = loss_weight(output_gain(_v, sigma), snr, 5.0) * output_gain(_v, sigma) ** 2
    torch.testing.assert_close(v, snr.clamp(max=5) / (snr + 1))
    flow = signal_to_noise(lambda s, noise, latent: s[:, None] * noise + (1 - s[:, None]) * latent, sigma[:2])
    torch.testing.assert_close(flow, ((1 - sigma[:2]) / sigma[:2]) ** 2)


def test_clean_weight_beside_eps_is_the_error_of_v():
    """eps + (x0 error) = (1 / s^2 + 1) (x0 error) = (s^2 + 1) / s^2 (x0 error), which is the error of v."""
    sigma = torch.tensor([0.05, 1.0, 14.6], dtype=torch.float64)
    eps, v = (output_gain(kind, sigma) for kind in (_eps, _v))
    torch.testing.assert_close(loss_weight(eps, sigma**-2, 0, 1.0), loss_weight(v, sigma**-2, 0))
    both = loss_weight(eps, sigma**-2, 5.0, 0.5)  # SNR 400, 1 and 1 / 14.6^2
    torch.testing.assert_close(both, torch.tensor([5.5, 1.5, 14.6**-2 + 0.5], dtype=torch.float64))


def test_schedules():
    assert [rate_share("constant", step, 9) for step in range(9)] == [1.0] * 9
    cosine = [rate_share("cosine", step, 40) for step in range(40)]
    plain = [np.cos(np.pi * step / 80) ** 2 for step in range(40)]  # (1 + cos x) / 2 = cos^2 (x / 2)
    assert cosine[:4] == pytest.approx([plain[step] * (step + 1) / 4 for step in range(4)])
    assert cosine[4:] == pytest.approx(plain[4:]) and 0 < cosine[-1] < 0.002
    assert rate_share("cosine", 0, 1) == 1.0
    with pytest.raises(ValueError, match='schedule: got "linear", choose among constant, cosine'):
        rate_share("linear", 0, 9)


def test_step_generators_are_reproducible_and_unlike():
    draw = lambda seed, step: torch.rand(4, generator=step_generator(seed, step)).tolist()
    assert draw(7, 3) == draw(7, 3)
    values = [tuple(draw(seed, step)) for seed in (0, 1, 2**64 - 1) for step in (-2, -1, 0, 1, 500)]
    assert len(set(values)) == len(values)


def test_crop_is_a_window_of_whole_blocks(generator):
    latents = torch.arange(2 * 24 * 40.0).view(2, 1, 24, 40)
    sizes = set()
    for _ in range(20):
        part = random_crop(latents, 0.5, generator)
        sizes.add(part.shape[-2:])
        assert part.shape[-2] % 8 == 0 and part.shape[-1] % 8 == 0 and part.shape[-2] >= 8
        top, left = divmod(int(part[0, 0, 0, 0]), 40)
        assert torch.equal(part, latents[..., top : top + part.shape[-2], left : left + part.shape[-1]])
    assert len(sizes) > 1


@pytest.mark.parametrize("seed, step", [(0, -1), (5, 0), (2**63, 999)])
def test_step_generators_are_splitmix64s(seed, step):
    """Steele et al. 2014, in NumPy's 64-bit arithmetic: a resumed run of another version draws the same numbers."""
    with np.errstate(over="ignore"):
        z = np.uint64(seed) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(step + 1) * np.uint64(0xD1B54A32D192ED03)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = (z ^ (z >> np.uint64(31))) >> np.uint64(1)
    assert step_generator(seed, step).initial_seed() == int(z)


def test_crop_windows_lie_anywhere():
    latents = torch.arange(64 * 64.0).view(1, 1, 64, 64)
    corners = []
    for seed in range(40):
        part = random_crop(latents, 0.5, torch.Generator().manual_seed(seed))
        top, left = divmod(int(part[0, 0, 0, 0]), 64)
        corners.append((top / (64 - part.shape[-2] or 1), left / (64 - part.shape[-1] or 1)))  # 0 .. 1 of the room
    for axis in (0, 1):
        places = [corner[axis] for corner in corners]
        assert min(places) < 0.2 and max(places) > 0.8


def test_a_window_with_one_cell_of_room_takes_both_places():
    latents = torch.arange(9.0).expand(1, 1, 9, 9)
    for picture in (latents, latents.mT):
        starts = {float(random_crop(picture, 0.9, torch.Generator().manual_seed(seed)).min()) for seed in range(30)}
        assert starts == {0.0, 1.0}
    small = latents[..., :8, :8]
    assert torch.equal(random_crop(small, 0.5, torch.Generator().manual_seed(0)), small)


def test_window_means():
    assert window_means([4.0, 2.0, 0.0, 10.0], 2) == [4.0, 3.0, 1.0, 5.0]
    assert window_means([4.0, 2.0, 0.0], 20) == [4.0, 3.0, 2.0]
