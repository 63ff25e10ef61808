"""Measures of agreement against closed forms and NumPy."""

import math

import numpy as np
import pytest
import torch
from pastiche.nodes.algorithms.metrics import channel_correlation, psnr


def test_psnr_is_its_closed_form():
    a = torch.zeros(2, 3)
    assert psnr(a, a + 0.1, 1.0) == pytest.approx(20.0, abs=1e-5)
    assert psnr(a, a + 0.1, 2.0) == pytest.approx(20 + 20 * math.log10(2), abs=1e-5)
    half = a.clone()
    half[0] = 0.1  # half of the values differ
    assert psnr(a, half, 1.0) == pytest.approx(20 + 10 * math.log10(2), abs=1e-5)
    assert psnr(a, a.clone(), 1.0) == math.inf


def test_correlation_is_numpys_of_each_channel():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 2, 3, 4, 5, generator=generator, dtype=torch.float64)
    expected = np.mean([
        np.corrcoef(a[sample, channel].flatten().numpy(), b[sample, channel].flatten().numpy())[0, 1]
        for sample in range(2) for channel in range(3)
    ])
    assert channel_correlation(a, b) == pytest.approx(expected, abs=1e-12)
    shared = np.mean([channel_correlation(a[sample : sample + 1], b[:1]) for sample in range(2)])
    assert channel_correlation(a, b[:1]) == pytest.approx(shared, abs=1e-12)


def test_mean_and_deviation_of_a_channel_do_not_count():
    a = torch.randn(1, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    assert channel_correlation(a, 3 * a + 5) == pytest.approx(1, abs=1e-6)
    assert channel_correlation(a, 2 - a) == pytest.approx(-1, abs=1e-6)
    assert channel_correlation(a, torch.ones_like(a)) == 0
    assert channel_correlation(a * 1e-30, a) == pytest.approx(1, abs=1e-6)
