"""The mini autoencoder's two generations of decoders, and the measure of the grid that the second is trained against."""
import pytest
import torch
from mini_training.decoder import comb, grid, grid_penalty, second_differences, strange
from pastiche.nodes.algorithms.mini_autoencoder import MiniAutoencoder


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def first():
    torch.manual_seed(0)
    return MiniAutoencoder(width=8).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def second():
    torch.manual_seed(1)
    return MiniAutoencoder(width=8, finish=4).eval().requires_grad_(False)


def test_a_file_of_the_first_generation_decodes_as_before(first):
    z = noise(2, 16, 3, 4)
    again = MiniAutoencoder.from_state(first.state_dict())
    assert again.finish is None
    linear = torch.nn.functional.conv_transpose2d(z, first.synthesis.weight, first.synthesis.bias, stride=8)
    torch.testing.assert_close(again.decode(z), linear + first.refine(z), atol=1e-6, rtol=1e-6)


def test_a_file_of_the_second_generation_is_recognised(second):
    z = noise(1, 16, 4, 3)
    again = MiniAutoencoder.from_state(second.state_dict())
    assert torch.equal(again.decode(z), second.decode(z))
    assert again.decode(z).shape == (1, 3, 32, 24)


def test_finish_adds_to_the_first_generation(first, second):
    """With the other parts equal and its output layer at zero, nothing changes; else it adds what `out` says."""
    model = MiniAutoencoder(width=8, finish=4).requires_grad_(False)
    model.load_state_dict({**second.state_dict(), **first.state_dict()})
    z = noise(1, 16, 3, 3)
    changed = model.decode(z)
    model.finish.out.weight.zero_()
    model.finish.out.bias.fill_(0.25)
    torch.testing.assert_close(model.decode(z), first.decode(z) + 0.25, atol=1e-6, rtol=1e-6)
    assert (changed - first.decode(z)).abs().max() > 1e-3


def test_finish_sees_over_the_border_of_a_patch(second):
    """What a pixel beside a border gets depends on the picture on its other side, at pixel resolution."""
    features = torch.zeros(1, 8, 2, 2)
    picture = torch.zeros(1, 3, 16, 16)
    other = picture.clone()
    other[..., 4, 8] = 1.0  # the first column of the right patch
    change = (second.finish(features, other) - second.finish(features, picture)).abs().sum(1)[0]
    assert change[4, 7] > 1e-6 and change[4, 3] > 0


def test_unknown_state_is_refused(first):
    state = first.state_dict()
    del state["analysis.weight"]
    with pytest.raises(RuntimeError, match="analysis.weight"):
        MiniAutoencoder.from_state(state)


def test_second_differences_by_hand():
    """One step of height 1 over the border at column 16 of 32: 1 there, 1/2 on both sides, 0 elsewhere."""
    picture = torch.zeros(1, 1, 1, 32, dtype=torch.float64)
    picture[..., 16:] = 1
    expected = torch.zeros(2, 8, dtype=torch.float64)
    expected[1, 0], expected[0, 7], expected[1, 1] = 1, 0.5, 0.5
    assert torch.equal(second_differences(picture)[0, 0, 0], expected)


def test_second_differences_ignore_ramps():
    ramp = torch.arange(48, dtype=torch.float64).expand(1, 3, 48, 48)
    assert second_differences(ramp).abs().max() == 0


def test_grid_is_1_without_a_grid_and_grows_with_it():
    """White noise of deviation s: its second difference has deviation sqrt(5) s at every column. A checkerboard of
    patches that differ by h adds h at borders only, so the measure is E|N(h, 5 s^2)| / E|N(0, 5 s^2)|."""
    picture = 0.1 * noise(4, 3, 256, 256)
    assert grid(picture).shape == (4,)
    torch.testing.assert_close(grid(picture), torch.ones(4), atol=0.03, rtol=0)
    board = (torch.arange(256) // 8)
    height = 0.4
    patches = height * ((board[:, None] + board) % 2)
    deviation = torch.tensor(5.0).sqrt() * 0.1
    normal = torch.distributions.Normal(0.0, 1.0)
    x = height / deviation
    folded = deviation * (torch.tensor(2 / torch.pi).sqrt() * (-x * x / 2).exp() + x * (1 - 2 * normal.cdf(-x)))
    expected = folded / (deviation * torch.tensor(2 / torch.pi).sqrt())
    torch.testing.assert_close(grid(picture + patches).mean(), expected, atol=0.03, rtol=0)


def test_comb_is_1_for_noise_and_sees_what_repeats_every_8_pixels():
    """Differences of white noise have a smooth spectrum: 1 within chance. A ripple of period 8 stands out, one of 11 does not."""
    picture = 0.1 * noise(4, 3, 256, 256)
    assert comb(picture).shape == (4,)
    torch.testing.assert_close(comb(picture), torch.ones(4), atol=0.1, rtol=0)  # a quotient of sums over 2300 and 4600 powers
    for period, seen in ((8, True), (4, True), (11, False)):
        ripple = 0.05 * torch.sin(2 * torch.pi * torch.arange(256) / period)
        assert bool(comb(picture + ripple).mean() > 1.5) is seen
        torch.testing.assert_close(comb(picture + ripple), comb((picture + ripple).mT))


def test_penalty_sees_patches_and_not_texture():
    ramp = torch.linspace(-1, 1, 64).expand(1, 3, 64, 64)
    assert grid_penalty(ramp) < 1e-3
    # A texture finer than a patch has the same steps at every column.
    assert grid_penalty((torch.arange(64) % 2).float().expand(1, 3, 64, 64)) < 1e-3
    # Patches of two tones, 0.1 apart: one step of 0.1 a patch, mean 0.1 / 8; bends 0.1 and twice 0.05, mean 0.2 / 8.
    board = torch.arange(64) // 8
    patches = (0.1 * ((board[:, None] + board) % 2)).expand(1, 3, 64, 64)
    steps = (7 / 8 * 0.1 + 7 * 0.1 / 8) / 8 / (0.1 / 8 + 0.02)
    mean = 0.2 / 8
    bends = (abs(0.1 - mean) + 2 * abs(0.05 - mean) + 5 * mean) / 8 / (mean + 0.02)
    torch.testing.assert_close(grid_penalty(patches), torch.tensor((steps + bends) / 2), atol=1e-4, rtol=1e-4)


def test_penalty_sees_patches_whose_borders_were_blurred_or_wiped():
    texture = (torch.arange(64) % 2).float().expand(1, 3, 64, 64)
    wiped = texture.clone()
    for border in range(8, 64, 8):
        wiped[..., border - 2 : border + 2] = 0.5
    assert grid_penalty(wiped) > 0.2
    board = torch.arange(64) // 8
    patches = (0.1 * ((board[:, None] + board) % 2)).expand(1, 1, 64, 64).contiguous()
    blurred = torch.nn.functional.avg_pool2d(patches, 3, 1, 1)
    straight = torch.nn.functional.avg_pool2d(patches, 8, 1)  # steps alike at every column
    assert grid_penalty(blurred) > 2 * grid_penalty(straight[..., :56, :56])


def test_strange_latents_keep_shape_and_stay_bounded():
    std = torch.ones(16, 1, 1)
    torch.manual_seed(0)
    z = noise(6, 16, 8, 8)
    odd = strange(z, std)
    assert odd.shape == z.shape and odd.isfinite().all()
    assert (odd - z).abs().amax(dim=(1, 2, 3)).min() > 0 and odd.std() < 2


def test_penalty_does_not_reward_texture_inside_patches():
    """Roughness in the columns 3 and 4 of a patch, which no jump over a border sees, must not make the penalty smaller."""
    board = torch.arange(64) // 8
    patches = (0.1 * ((board[:, None] + board) % 2)).expand(1, 3, 64, 64)
    inside = (torch.arange(64) % 8 == 3).float() - (torch.arange(64) % 8 == 4).float()
    amount = torch.tensor(0.003, requires_grad=True)
    (gradient,) = torch.autograd.grad(grid_penalty(patches + amount * inside * inside[:, None]), amount)
    assert gradient >= 0


def test_a_window_reads_its_patch_and_what_is_around_it():
    """Each latent pixel is the scalar product with 16x16 pixels around its patch, mirrored at the picture's border."""
    torch.manual_seed(2)
    model = MiniAutoencoder(width=8, window=16).requires_grad_(False)
    picture = noise(2, 3, 16, 24)
    framed = torch.nn.functional.pad(picture, (4, 4, 4, 4), mode="reflect")
    latents = model.encode(picture)
    assert latents.shape == (2, 16, 2, 3)
    for row, column in ((0, 0), (1, 1), (1, 2)):
        window = framed[:, :, 8 * row : 8 * row + 16, 8 * column : 8 * column + 16]
        expected = torch.einsum("bchw,kchw->bk", window, model.analysis.weight) + model.analysis.bias
        torch.testing.assert_close(latents[:, :, row, column], expected, atol=1e-5, rtol=1e-5)


def test_windows_that_add_up_to_1_give_a_flat_picture_up_to_its_border():
    """Hat windows of half their width as hop are a partition of unity; a flat latent is then a flat picture, everywhere."""
    model = MiniAutoencoder(width=8, window=16).requires_grad_(False)
    hat = 1 - (torch.arange(16) - 7.5).abs() / 8
    model.synthesis.weight.zero_()
    model.synthesis.weight[0] = hat[:, None] * hat
    model.synthesis.bias.zero_()
    model.refine[-2].weight.zero_()
    model.refine[-2].bias.zero_()
    latents = torch.zeros(1, 16, 2, 3)
    latents[:, 0] = 0.7
    torch.testing.assert_close(model.decode(latents), torch.full((1, 3, 16, 24), 0.7), atol=1e-6, rtol=0)


def test_the_correction_is_in_units_of_each_channel():
    model = MiniAutoencoder(width=8, window=16, correction=8).requires_grad_(False)
    model.latent_std.copy_(torch.arange(16) + 1.0)
    picture = noise(1, 3, 16, 16)
    model.correction.out.weight.zero_()
    model.correction.out.bias.zero_()
    plain = model.encode(picture)
    model.correction.out.bias.fill_(0.5)
    expected = plain + 0.5 * (torch.arange(16) + 1.0)[None, :, None, None]
    torch.testing.assert_close(model.encode(picture), expected)
    again = MiniAutoencoder.from_state(model.state_dict())
    assert again.margin == 4 and torch.equal(again.encode(picture), model.encode(picture))


@pytest.mark.parametrize("shape", [(8, 8), (8, 24), (40, 16)])
def test_lapped_sizes(shape):
    model = MiniAutoencoder(width=8, finish=4, window=16, correction=8).requires_grad_(False)
    latents = model.encode(noise(1, 3, *shape))
    assert latents.shape == (1, 16, shape[0] // 8, shape[1] // 8)
    assert model.decode(latents).shape == (1, 3, *shape)
