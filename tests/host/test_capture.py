import logging
import math

import pytest
import torch
from pastiche.nodes.host.features.capture import capture, feature_shapes
from pastiche.nodes.host.networks.families import find_adapter
from pastiche.nodes.host.trajectories.inversion import invert
from pastiche.nodes.host.injections.run import SamplingRun, _BankReader
from pastiche.nodes.sockets import FeatureKey
from support.models import tiny_cond, tiny_unet
from support.sampling import random_latent, schedule

STREAMS = "self_attention, self_attention_qkv, cross_attention, residual, h_space"


def trajectory_of(model, steps=3, size=(9, 6), batch=2):
    return invert(model, {"samples": random_latent(*size, batch=batch)}, schedule(model, steps), tiny_cond(model), "next")[1]


@pytest.mark.parametrize("family", ["sd15", "sd20", "sdxl"])
def test_shapes_are_those_predicted_on_odd_sizes(family):
    model = tiny_unet(family)
    trajectory = trajectory_of(model)
    bank = capture(model, trajectory, STREAMS, "output 0-2, middle" if family == "sdxl" else "middle, output 5-11", "ram", "full")
    predicted = feature_shapes(find_adapter(model), bank.keys, trajectory)
    for key in bank.keys:
        assert tuple(bank.store.read(key, 1, torch.device("cpu")).shape) == predicted[key]
    assert bank.store.nbytes == sum(torch.Size(shape).numel() for shape in predicted.values()) * 4 * trajectory.steps


def test_features_of_a_step_are_those_of_its_own_latent_and_sigma():
    """Evaluates the U-Net itself at (x_j, s_j); a neighbouring latent or sigma is plainly different."""
    model = tiny_unet()
    trajectory = trajectory_of(model, steps=4)
    bank = capture(model, trajectory, "self_attention", "8", "ram", "full")
    key = FeatureKey("self_attention", "output", 8, 0)
    network, sampling = model.model.diffusion_model, model.model.model_sampling

    def direct(latent_step, sigma_step):
        seen = []
        sigma = trajectory.sigmas[sigma_step].expand(2)
        hook = network.output_blocks[8][1].transformer_blocks[0].norm1.register_forward_hook(lambda m, i, out: seen.append(out))
        try:
            x = sampling.calculate_input(sigma, trajectory.latents[latent_step])
            network(x, sampling.timestep(sigma).float(), context=trajectory.conditioning[0][0].expand(2, -1, -1), transformer_options={})
        finally:
            hook.remove()
        return seen[0]

    for step in range(1, 5):
        stored = bank.store.read(key, step, torch.device("cpu"))
        assert (stored - direct(step, step)).abs().max() < 1e-5
        assert (stored - direct(step - 1, step)).abs().max() > 1e-2
        if step > 1:
            assert (stored - direct(step, step - 1)).abs().max() > 1e-2


def test_explicit_projections_and_residual_and_h_equal_the_modules_own():
    model = tiny_unet()
    trajectory = trajectory_of(model, steps=1)
    bank = capture(model, trajectory, STREAMS, "6", "ram", "full")
    blocks = model.model.diffusion_model.output_blocks[6]
    attention = blocks[1].transformer_blocks[0]

    def read(stream, block="output", number=6):
        return bank.store.read(FeatureKey(stream, block, number), 1, torch.device("cpu"))

    hidden = read("self_attention")
    for name in "qkv":
        expected = getattr(attention.attn1, f"to_{name}")(hidden)
        assert torch.allclose(read(f"self_attention_{name}"), expected, atol=1e-5)
    context = trajectory.conditioning[0][0].expand(2, -1, -1)
    assert torch.allclose(read("cross_attention_k"), attention.attn2.to_k(context), atol=1e-5)
    seen = {}
    network = model.model.diffusion_model
    hooks = [
        blocks[0].out_layers.register_forward_hook(lambda m, i, out: seen.__setitem__("residual", out)),
        network.middle_block.register_forward_hook(lambda m, i, out: seen.__setitem__("h", out)),
    ]
    sigma = trajectory.sigmas[1].expand(2)
    sampling = model.model.model_sampling
    network(sampling.calculate_input(sigma, trajectory.latents[1]), sampling.timestep(sigma).float(), context=context, transformer_options={})
    [hook.remove() for hook in hooks]
    assert torch.allclose(read("residual"), seen["residual"], atol=1e-5)
    # nn.Sequential hooks do not see ComfyUI's own block loop: the middle is compared through its last layer
    assert read("h_space", "middle", 0).shape == (2, network.middle_block[-1].out_channels, 2, 1)


class _Guider:
    def __init__(self, model):
        self.model_patcher, self.inner_model = model, model.model
        self.model_options = model.model_options


@pytest.mark.parametrize("memory, precision, tolerance", [("ram", "full", 1e-5), ("vram", "full", 1e-5), ("disk", "full", 1e-5), ("ram", "half", 5e-3), ("disk", "half", 5e-3)])
def test_memory_modes_hold_the_same_numbers(memory, precision, tolerance):
    model = tiny_unet()
    trajectory = trajectory_of(model)
    reference = _BankReader(capture(model, trajectory, STREAMS, "6-7", "recompute"))
    reference.keys.update(reference.bank.keys)
    other = _BankReader(capture(model, trajectory, STREAMS, "6-7", memory, precision))
    model.pre_run()
    for sigma in trajectory.schedule[:-1].tolist():
        for key in reference.bank.keys:
            like = torch.zeros(1)
            a = reference.read(_Guider(model), key, sigma, like)
            b = other.read(_Guider(model), key, sigma, like)
            assert (a - b).abs().max() <= tolerance * a.abs().max(), (key, sigma)


def test_size_is_estimated_before_capture_within_five_percent(caplog):
    model = tiny_unet()
    with caplog.at_level(logging.INFO):
        bank = capture(model, trajectory_of(model), "self_attention", "6-11", "disk")
    number, unit = caplog.text.split("steps: ")[1].split(" (disk)")[0].split()
    estimate = float(number) * {"kB": 1e3, "MB": 1e6}[unit]
    assert abs(estimate - bank.store.path.stat().st_size) / estimate < 0.05


def test_paper_setting_takes_at_most_1_2_gb_in_ram_and_10_mb_recomputed():
    """SD1.5 at 512x512, 50 steps, layers 6-11, half precision, style and content together."""
    adapter = find_adapter(tiny_unet("sd15", channel_mult=(1, 2, 4, 4)))  # SD1.5 at a tenth of its widths
    elements = 10 * sum(math.prod(adapter.shape(key, 64, 64)) for key in adapter.keys("self_attention", "6-11"))
    assert elements == 3 * 32 * 32 * 640 + 3 * 64 * 64 * 320
    assert 2 * elements * 2 * 50 <= 1.2e9
    assert 2 * 51 * 4 * 64 * 64 * 4 < 10e6


def test_disk_file_goes_with_its_bank():
    model = tiny_unet()
    bank = capture(model, trajectory_of(model), "h_space", "auto", "disk")
    path = bank.store.path
    assert path.exists()
    del bank
    assert not path.exists()


def test_cancel_leaves_no_file_and_the_model_clean():
    import comfy.model_management as management
    from pastiche.nodes.host.features.stores import temporary_path

    model = tiny_unet()
    trajectory = trajectory_of(model)
    before = set(temporary_path().parent.iterdir())
    management.interrupt_current_processing()
    with pytest.raises(management.InterruptProcessingException):
        capture(model, trajectory, "self_attention", "6-11", "disk")
    assert set(temporary_path().parent.iterdir()) == before
    assert "patches" not in model.model_options["transformer_options"]
    capture(model, trajectory, "self_attention", "6-11", "ram")


@pytest.mark.parametrize(
    "family, streams, layers, words",
    [
        ("sdxl", "self_attention", "6-11", r"SDXL|output 0-8, attention in 0-5.*: got output 6"),
        ("sd15", "self_attention", "2", r"attention in 3-11.*got output 2"),
        ("sd15", "values", "6", 'unknown stream "values"'),
        ("sd15", "self_attention", "6..8", "cannot read"),
        ("sd15", "self_attention", "", "cannot read"),
        ("sd15", "self_attention", "11-6", "runs backwards"),
    ],
)
def test_unknown_layers_and_streams_get_a_sentence(family, streams, layers, words):
    model = tiny_unet(family)
    with pytest.raises(ValueError, match=words):
        capture(model, trajectory_of(model, 1), streams, layers, "ram")


def test_trajectory_of_another_model_is_refused():
    with pytest.raises(ValueError, match="made with another model"):
        capture(tiny_unet(seed=1), trajectory_of(tiny_unet(seed=2), 1), "self_attention", "6")


def test_too_little_memory_is_a_sentence(monkeypatch):
    import psutil

    model = tiny_unet()
    trajectory = trajectory_of(model, 1)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": 10})())
    with pytest.raises(ValueError, match="Choose recompute"):
        capture(model, trajectory, "self_attention", "6", "ram")
