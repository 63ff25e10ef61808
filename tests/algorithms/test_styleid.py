import pytest
import torch
from pastiche.nodes.algorithms.styleid import adain, blend, injected_query, masked_statistics


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_adain_is_the_closed_form_per_channel_and_sample():
    content, style = 2 * noise(2, 3, 5, 7) + 1, 0.5 * noise(2, 3, 4, 9, seed=1) - 2
    out = adain(content, style)
    for b in range(2):
        for c in range(3):
            x, s = content[b, c], style[b, c]
            expected = s.std() * (x - x.mean()) / x.std() + s.mean()
            assert (out[b, c] - expected).abs().max() < 1e-12


def test_adain_with_own_statistics_is_identity():
    x = noise(1, 4, 6, 6)
    assert (adain(x, x) - x).abs().max() < 1e-12


def test_one_style_serves_a_batch():
    content, style = noise(3, 2, 4, 4), noise(1, 2, 8, 8, seed=2)
    for b in range(3):
        assert (adain(content, style)[b : b + 1] - adain(content[b : b + 1], style)).abs().max() < 1e-12


def test_weights_of_one_are_torchs_statistics_and_binary_masks_select():
    x, mask = noise(2, 3, 6, 5), torch.zeros(1, 1, 6, 5, dtype=torch.float64)
    mean, std = masked_statistics(x, torch.ones_like(mask))
    assert torch.allclose(mean, x.mean((2, 3), keepdim=True)) and torch.allclose(std, x.std((2, 3), keepdim=True))
    mask[..., :2, :] = 1
    mean, std = masked_statistics(x, mask)
    inside = x[:, :, :2]
    assert torch.allclose(mean, inside.mean((2, 3), keepdim=True)) and torch.allclose(std, inside.std((2, 3), keepdim=True))


@pytest.mark.parametrize("mask", [None, torch.zeros(1, 1, 4, 4)])
def test_flat_content_takes_the_styles_mean_and_nothing_is_nan(mask):
    content = torch.full((1, 2, 4, 4), 3.0)
    style = noise(1, 2, 4, 4).float()
    out = adain(content, style, mask)
    assert torch.isfinite(out).all()
    assert torch.allclose(out, style.mean((2, 3), keepdim=True).expand_as(out), atol=1e-6)


def test_flat_style_flattens_the_content():
    out = adain(noise(1, 1, 4, 4), torch.full((1, 1, 4, 4), 0.25, dtype=torch.float64))
    assert torch.allclose(out, torch.full_like(out, 0.25))


def test_query_formula_and_its_limits():
    q, c = noise(2, 5, 4), noise(2, 5, 4, seed=1)
    assert torch.equal(injected_query(q, c, 1.0, 1.0), c)
    assert torch.equal(injected_query(q, c, 0.0, 1.0), q)
    assert torch.equal(injected_query(q, None, 0.9, 1.0), q)
    assert torch.allclose(injected_query(q, c, 0.75, 1.5), 1.5 * (0.75 * c + 0.25 * q))


def test_zero_weight_returns_the_plain_result_exactly():
    plain, styled = noise(1, 8, 4).float(), noise(1, 8, 4, seed=1).float()
    weight = torch.tensor([0.0, 1.0, 0.5, 0.0] * 2).view(1, 8, 1)
    out = blend(plain, styled, weight)
    assert torch.equal(out[:, ::4], plain[:, ::4])
    assert torch.allclose(out[:, 2], (plain[:, 2] + styled[:, 2]) / 2)


def test_a_single_pixel_has_a_mean_and_no_deviation():
    """1x1 latents once became NaN: n - 1 is 0."""
    one, many = torch.tensor([3.0, -1.0]).view(1, 2, 1, 1), torch.randn(1, 2, 5, 4, generator=torch.Generator().manual_seed(0))
    mean, std = masked_statistics(one)
    assert torch.equal(mean, one) and not std.any()
    assert torch.equal(adain(one, many), many.mean(dim=(2, 3), keepdim=True))
    assert torch.equal(adain(many, one), one.expand_as(many))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.5, 2.0, 3.0])
def test_queries_are_scaled_by_any_temperature(temperature):
    query, content = torch.randn(2, 1, 3, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(injected_query(query, content, 0.75, temperature), temperature * (0.75 * content + 0.25 * query))
    torch.testing.assert_close(injected_query(query, None, 0.75, temperature), temperature * query)
