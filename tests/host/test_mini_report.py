"""The walks with which the embedded transformer's report measures round trips, on a flow whose solution is known."""
import pytest
import torch
from mini_training.evaluate_transformer import invert, sample


def velocity(x, s):
    """v(x, s) = -x is solved by x(s) = x(0) exp(-s)."""
    return -x


@pytest.mark.parametrize("scheme, order", [("next", 1), ("predicted", 1), ("midpoint", 2)])
def test_walks_converge_with_their_order(scheme, order):
    start = torch.tensor([1.0, -2.0], dtype=torch.float64)
    errors = []
    for count in (20, 40):
        ascending = torch.linspace(0, 1, count + 1, dtype=torch.float64)
        errors.append((invert(velocity, start, ascending, scheme) - start * torch.tensor(-1.0).exp()).abs().max())
    assert 2 ** order * 0.8 < errors[0] / errors[1] < 2 ** order * 1.3


def test_predicted_returns_by_euler_better_than_next():
    start = torch.tensor([1.0], dtype=torch.float64)
    ascending = torch.linspace(0, 1, 21, dtype=torch.float64)
    errors = {s: (sample(velocity, invert(velocity, start, ascending, s), ascending.flip(0), "euler") - start).abs() for s in ("next", "predicted")}
    assert errors["predicted"] < 0.1 * errors["next"]


def test_midpoint_returns_by_its_own_way_down():
    """The way down looks at the same middles with velocities one step off: third order in the step, so under h^2."""
    start = torch.tensor([1.0], dtype=torch.float64)
    ascending = torch.linspace(0, 1, 21, dtype=torch.float64)
    back = sample(velocity, invert(velocity, start, ascending, "midpoint"), ascending.flip(0), "midpoint")
    assert (back - start).abs() < 0.05 ** 2
