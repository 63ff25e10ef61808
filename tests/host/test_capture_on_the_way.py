"""Features kept while an inversion runs: where the network was asked, and not once more than that."""

from dataclasses import replace

import comfy.model_management as management
import folder_paths
import pytest
import torch
from comfy_execution.graph_utils import ExecutionBlocker
from pathlib import Path
from pastiche.nodes.host.features.capture import capture
from pastiche.nodes.host.features.on_the_way import invert_and_capture
from pastiche.nodes.inversion import DDIMInversion
from support.models import tiny_cond, tiny_unet
from support.sampling import cancelled_at, random_latent, schedule

STREAMS, LAYERS, STEPS = "self_attention, residual, h_space", "6-8", 4
CPU = torch.device("cpu")


def counted(model):
    """A clone of `model` and the list of sigmas it is evaluated at."""
    sigmas = []

    def wrapper(apply_model, args):
        sigmas.append(float(args["timestep"][0]))
        return apply_model(args["input"], args["timestep"], **args["c"])

    counting = model.clone()
    counting.set_model_unet_function_wrapper(wrapper)
    return counting, sigmas


@pytest.fixture(scope="module")
def model():
    return tiny_unet()


def on_the_way(model, scheme, memory="ram", batch=2, **settings):
    latent = {"samples": random_latent(8, 6, batch)}
    return invert_and_capture(
        model, latent, schedule(model, STEPS), STREAMS, LAYERS, memory, "full", positive=tiny_cond(model), scheme=scheme, **settings
    )[1:]


def asked_at(trajectory, scale):
    """Where each scheme's last evaluation of a level was, from the trajectory alone: (S + 1, B, C, H, W)."""
    x, s = trajectory.latents.double(), trajectory.sigmas.double()
    at = x.clone()
    for j in range(1, trajectory.steps + 1):
        if trajectory.scheme == "next":
            at[j] = scale(s[j - 1]) / scale(s[j]) * x[j - 1]
        elif trajectory.scheme == "predicted" and j > 1:  # the first guess is made with `next`, not with the trajectory
            at[j] = x[j - 1] + (s[j] - s[j - 1]) * (x[j - 1] - x[j - 2]) / (s[j - 1] - s[j - 2])
    return at.float()


@pytest.mark.parametrize("scheme, evaluations", [("next", STEPS), ("predicted", STEPS + 1), ("current", STEPS + 1), ("midpoint", 2 * STEPS + 1)])
def test_features_are_those_of_where_the_scheme_asked(model, scheme, evaluations):
    """`current` and `midpoint` ask elsewhere: the levels they leave out are evaluated once, at the latents themselves."""
    counting, sigmas = counted(model)
    trajectory, bank = on_the_way(counting, scheme)
    assert len(sigmas) == evaluations
    if scheme == "current":  # the clean latent counts as one of the model's smallest sigma
        assert sigmas[0] == pytest.approx(float(model.model.model_sampling.sigma_min))
    asked = asked_at(trajectory, lambda sigma: (1 + sigma**2) ** -0.5)
    expected = capture(model, replace(trajectory, latents=asked), STREAMS, LAYERS, "ram", "full")
    assert bank.keys == expected.keys and bank.trajectory is trajectory
    for key in bank.keys:
        for step in range(2 if scheme == "predicted" else 1, STEPS + 1):
            ours, theirs = (b.store.read(key, step, CPU) for b in (bank, expected))
            assert ours.shape == theirs.shape and (ours - theirs).norm() <= 2e-4 * theirs.norm()


def test_an_exact_inversion_sees_the_features_of_its_latents(model):
    """On a random network the iteration diverges: where it kept another iterate than the last, that one is evaluated."""
    trajectory, bank = on_the_way(model, "fixed_point", iterations=2)
    expected = capture(model, trajectory, STREAMS, LAYERS, "ram", "full")
    for key in bank.keys:
        for step in range(1, STEPS + 1):
            ours, theirs = (b.store.read(key, step, CPU) for b in (bank, expected))
            assert (ours - theirs).norm() <= 1e-4 * theirs.norm()


def test_disk_holds_the_same_and_a_cancelled_run_leaves_no_file(model):
    folder = Path(folder_paths.get_temp_directory()) / "pastiche"
    _, kept = on_the_way(model, "predicted", "ram")
    before = set(folder.glob("*")) if folder.exists() else set()
    _, bank = on_the_way(model, "predicted", "disk")
    for key in bank.keys:
        assert torch.equal(bank.store.read(key, 2, CPU), kept.store.read(key, 2, CPU))
    del bank
    cancelling, _ = cancelled_at(model, 3)
    with pytest.raises(management.InterruptProcessingException):
        on_the_way(cancelling, "predicted", "disk")
    assert (set(folder.glob("*")) if folder.exists() else set()) == before


def test_keeping_features_changes_nothing_of_the_inversion(model):
    plain = DDIMInversion.execute(model, {"samples": random_latent()}, schedule(model, 3), tiny_cond(model)).result
    kept = DDIMInversion.execute(model, {"samples": random_latent()}, schedule(model, 3), tiny_cond(model), memory="ram", layers="6-8").result
    assert torch.equal(plain[1].latents, kept[1].latents)
    assert plain[3].store is None and plain[3].memory == "recompute"
    assert kept[3].store.nbytes > 0 and {key.number for key in kept[3].keys} == {6, 7, 8}
    assert not model.model_options["transformer_options"].get("patches")


def test_a_network_without_known_features_inverts_and_only_the_features_output_stops():
    model, network = tiny_unet(), torch.nn.Identity()
    network.dtype = torch.float32
    model.model.diffusion_model = network
    model.set_model_unet_function_wrapper(lambda apply_model, args: 0.5 * args["input"])
    settings = dict(model=model, latent={"samples": random_latent()}, sigmas=schedule(model, 2), positive=[[torch.zeros(1, 7, 32), {}]])
    _, trajectory, _, features, *_ = DDIMInversion.execute(**settings).result
    assert trajectory.steps == 2 and isinstance(features, ExecutionBlocker) and "features:" in features.message
    with pytest.raises(ValueError):
        DDIMInversion.execute(**settings, memory="ram")
