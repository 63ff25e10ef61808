"""Feature slerp against the closed form in float64, and where the closed form has no answer."""

import math

import numpy as np
import pytest
import torch

from pastiche.nodes.algorithms.slerp import angle, lerp, masked_slerp, match_norm, resize_features, slerp


def features(seed, shape=(2, 8, 5, 3), dtype=torch.float64, scale=3.0):
    return (scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).to(dtype)


def norms(x):
    return x.double().flatten(1).norm(dim=1)


def test_zero_content_has_no_norm_to_bring_to_another():
    h = features(1)
    content = features(2)
    content[0] = 0
    matched = match_norm(content, h)
    assert not matched[0].any() and torch.allclose(norms(matched)[1], norms(h)[1])


def closed_form(h, content, gamma):
    """The paper's equation, sample by sample in NumPy float64."""
    out = []
    for a, b in zip(h.double().numpy(), content.double().numpy()):
        b = b * np.linalg.norm(a) / np.linalg.norm(b)
        theta = math.acos(float((a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b)))
        out.append(math.sin((1 - gamma) * theta) / math.sin(theta) * a + math.sin(gamma * theta) / math.sin(theta) * b)
    return torch.from_numpy(np.stack(out))


@pytest.mark.parametrize("gamma", [0.1, 0.3, 0.6, 0.9, 1.0])
def test_is_the_papers_equation_and_keeps_the_norm(gamma):
    h, content = features(0), features(1, scale=0.2)
    mixed = slerp(h, content, gamma)
    torch.testing.assert_close(mixed, closed_form(h, content, gamma), rtol=0, atol=1e-12)
    torch.testing.assert_close(norms(mixed), norms(h), rtol=1e-12, atol=0)
    torch.testing.assert_close(angle(h, mixed), gamma * angle(h, content), rtol=1e-9, atol=0)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.float16, 1e-3), (torch.bfloat16, 8e-3)])
def test_norm_in_lower_precision(dtype, tolerance):
    h, content = features(2, (3, 64, 8, 8), dtype), features(3, (3, 64, 8, 8), dtype)
    mixed = slerp(h, content, 0.6)
    assert mixed.dtype == dtype
    torch.testing.assert_close(norms(mixed), norms(h), rtol=tolerance, atol=0)
    torch.testing.assert_close(mixed.double(), closed_form(h, content, 0.6), rtol=4 * tolerance, atol=4 * tolerance)


def test_half_precision_does_not_overflow_inside():
    h, content = features(4, dtype=torch.float16, scale=8000), features(5, dtype=torch.float16, scale=8000)
    assert norms(h).max() > torch.finfo(torch.float16).max
    assert torch.isfinite(slerp(h, content, 0.5)).all()


def test_ends():
    h, content = features(6), features(7, scale=10)
    assert slerp(h, content, 0) is h
    assert masked_slerp(h, content, 0, torch.ones(1, 1, 5, 3)) is h
    assert torch.equal(slerp(h, content, 1.0), match_norm(content, h))
    torch.testing.assert_close(norms(match_norm(content, h)), norms(h))


def test_content_of_one_serves_a_batch():
    h, content = features(8), features(9, (1, 8, 5, 3))
    single = torch.cat([slerp(h[i : i + 1], content, 0.4) for i in range(2)])
    assert torch.equal(slerp(h, content, 0.4), single)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
@pytest.mark.parametrize("gamma", [0.25, 0.5, 1.0])
def test_no_nan_where_the_angle_gives_no_arc(dtype, gamma):
    h = features(10, dtype=dtype)
    nearly = (h.double() * (1 + 1e-6 * features(11))).to(dtype)
    exact = {"same": h, "scaled": 2 * h, "nearly the same": nearly}
    for name, content in exact.items():
        torch.testing.assert_close(slerp(h, content, gamma), h, rtol=4e-3, atol=4e-3, msg=name)
    opposite = slerp(h, -h, gamma)  # no unique arc: the straight line through 0
    torch.testing.assert_close(opposite, ((1 - 2 * gamma) * h.double()).to(dtype), rtol=4e-3, atol=4e-3)
    zero = torch.zeros_like(h)
    assert torch.equal(slerp(h, zero, gamma), h)  # no direction to turn to
    assert torch.equal(slerp(zero, h, gamma), zero)
    assert torch.equal(slerp(zero, zero, gamma), zero)


def test_is_continuous_where_the_straight_line_takes_over():
    h = features(12, (1, 8, 5, 3))
    side = features(13, (1, 8, 5, 3))
    side = match_norm(side - (side * h).sum() / (h * h).sum() * h, h)
    for sine in (0.9e-4, 1.1e-4):
        theta = math.asin(sine)
        content = math.cos(theta) * h + math.sin(theta) * side
        expected = math.cos(0.3 * theta) * h + math.sin(0.3 * theta) * side
        torch.testing.assert_close(slerp(h, content, 0.3), expected, rtol=0, atol=1e-7)


def test_masks():
    h, content = features(14, dtype=torch.float16), features(15, dtype=torch.float16)
    ones, zeros = torch.ones(1, 1, 5, 3), torch.zeros(1, 1, 5, 3)
    assert torch.equal(masked_slerp(h, content, 0.6, ones), slerp(h, content, 0.6))
    assert torch.equal(masked_slerp(h, content, 0.6, zeros), h)
    left = ones.clone()
    left[..., 1:] = 0
    mixed = masked_slerp(h, content, 0.6, left)
    assert torch.equal(mixed[..., 1:], h[..., 1:])
    # norms and angle are those of the masked parts alone
    torch.testing.assert_close(mixed[..., :1], slerp(h[..., :1], content[..., :1], 0.6), rtol=2e-3, atol=2e-3)


def test_masked_content_may_keep_its_own_norm():
    h, content = features(14), 3 * features(15)
    left = torch.zeros(1, 1, 5, 3, dtype=torch.float64)
    left[..., :1] = 1
    mixed = masked_slerp(h, content, 0.6, left, matched=False)
    for i in range(len(h)):
        a, b = h[i, ..., :1], content[i, ..., :1]
        theta = torch.acos((a * b).sum() / (a.norm() * b.norm()))
        expected = (torch.sin(0.4 * theta) * a + torch.sin(0.6 * theta) * b) / torch.sin(theta)
        torch.testing.assert_close(mixed[i, ..., :1], expected)
        assert not torch.allclose(masked_slerp(h, content, 0.6, left)[i, ..., :1], expected, rtol=0.1)
    assert torch.equal(mixed[..., 1:], h[..., 1:])


def test_disjoint_masks_commute_and_soft_masks_mix():
    h, a, b = features(16), features(17), features(18)
    left = torch.zeros(1, 1, 5, 3)
    left[..., :1] = 1
    right = 1 - left
    one = masked_slerp(masked_slerp(h, a, 0.6, left), b, 0.9, right)
    two = masked_slerp(masked_slerp(h, b, 0.9, right), a, 0.6, left)
    assert torch.equal(one, two)
    half = torch.full((1, 1, 5, 3), 0.5, dtype=torch.float64)
    torch.testing.assert_close(masked_slerp(h, a, 0.6, half), 0.5 * slerp(h, a, 0.6) + 0.5 * h)


def test_lerp_loses_norm_where_slerp_does_not():
    h, content = features(19), features(20)
    assert (norms(lerp(h, content, 0.5)) < 0.85 * norms(h)).all()


def test_resizing_keeps_constants_and_size():
    flat = torch.full((1, 2, 8, 6), 3.0, dtype=torch.float16)
    torch.testing.assert_close(resize_features(flat, 5, 9), torch.full((1, 2, 5, 9), 3.0, dtype=torch.float16))
    assert resize_features(flat, 8, 6) is flat
