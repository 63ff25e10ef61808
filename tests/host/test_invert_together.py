"""Content and style inverted by one node: in one batch where that is the same for each of them."""

import comfy.model_management as management
import pytest
import torch
from comfy_execution.graph_utils import ExecutionBlocker
from pastiche.nodes.inversion import DDIMInversion
from support.models import tiny_cond, tiny_unet
from support.sampling import random_latent, schedule

STEPS = 2
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model():
    """In float64, so that a batch's rows are those of single runs but for the roundings of the float32 latents."""
    model = tiny_unet(dtype=torch.float64)
    with torch.no_grad():
        model.model.diffusion_model.out[2].weight *= 0.2
    return model


@pytest.fixture
def batches(model):
    """The batch size of every forward of the network."""
    sizes = []
    hook = model.model.diffusion_model.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    yield sizes
    hook.remove()


def execute(model, latent, style=None, **settings):
    settings = dict(scheme="predicted", memory="ram", precision="full", layers="6-8") | settings
    latent, style = ({"samples": samples} if samples is not None else None for samples in (latent, style))
    return DDIMInversion.execute(model, latent, schedule(model, STEPS), settings.pop("positive", tiny_cond(model)), style=style, **settings).result


def features(bank):
    return torch.cat([bank.store.read(key, step, CPU).flatten() for key in bank.keys for step in range(1, STEPS + 1)])


@pytest.mark.parametrize("scheme, memory", [("predicted", "ram"), ("fixed_point", "disk"), ("current", "ram")])
def test_each_row_is_the_one_inverted_alone(model, batches, scheme, memory):
    """Up to a rounding of the latent a step, enlarged by the inversion as a rounding of the clean latent is."""
    latents = random_latent(8, 10, batch=2, seed=1), random_latent(8, 10, batch=1, seed=2)
    both = execute(model, *latents, scheme=scheme, memory=memory, iterations=2)
    together = list(batches)
    assert set(together) == {3}
    for outputs, latent in zip((both[:4], both[4:]), latents):
        batches.clear()
        alone = execute(model, latent, scheme=scheme, iterations=2)
        if scheme != "fixed_point":  # there each stops on its own
            assert len(batches) == len(together)
        shaken = execute(model, latent * (1 + 2.0**-22), scheme=scheme, iterations=2)
        for ours, theirs, moved in zip(*((out[1].latents, features(out[3])) for out in (outputs, alone[:4], shaken[:4]))):
            assert ours.shape == theirs.shape
            assert (ours - theirs).norm() <= STEPS * (moved - theirs).norm()
        assert torch.equal(outputs[2].latent, outputs[1].latents[-1])
        assert outputs[0]["samples"].shape == latent.shape
        assert outputs[3].trajectory is outputs[1] and outputs[3].memory == memory


@pytest.mark.parametrize("case", ["size", "prompts", "another node", "memory"])
def test_what_does_not_go_into_one_batch_goes_one_after_another(model, batches, case, monkeypatch, caplog):
    latent, style, settings = random_latent(8, 8, seed=1), random_latent(8, 8, seed=2), {}
    if case == "size":
        style = random_latent(8, 12, seed=2)
    elif case == "prompts":
        settings["positive"] = tiny_cond(model, batch=2)
        latent, style = random_latent(8, 8, batch=2, seed=1), random_latent(8, 8, batch=2, seed=2)
    elif case == "another node":
        model = model.clone()
        model.set_model_attn1_patch(lambda n, context, value, options: (n, context, value))
    else:
        def full(module, args):
            if len(args[0]) > 1:
                raise management.OOM_EXCEPTION("out of memory")

        hook = model.model.diffusion_model.register_forward_pre_hook(full)
    try:
        found = execute(model, latent, style, **settings)
    finally:
        if case == "memory":
            hook.remove()
    rows = len(latent)
    assert batches[-2 * (STEPS + 1) :] == [rows] * 2 * (STEPS + 1)
    assert ("one after another" in caplog.text) is (case == "memory")
    assert torch.equal(found[5].latents, execute(model, style, **settings)[1].latents)


def test_a_list_of_one_leaves_the_style_outputs_closed(model):
    outputs = execute(model, random_latent(), memory="recompute")
    assert len(outputs) == 8 and all(isinstance(output, ExecutionBlocker) for output in outputs[4:])
    assert "style input" in outputs[4].message


def test_recompute_keeps_no_features_of_either(model):
    outputs = execute(model, random_latent(8, 8, seed=1), random_latent(8, 8, seed=2), memory="recompute")
    assert outputs[3].store is None and outputs[7].store is None
    assert outputs[7].trajectory.batch == 1 and not torch.equal(outputs[1].latents, outputs[5].latents)
