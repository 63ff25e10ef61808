"""Several changes of one self-attention: what each sees, and how their results are blended, with an attention that can be added up."""

import types

import pytest
import torch

from pastiche.nodes.algorithms.training import step_generator
from pastiche.nodes.host.networks.adapter import RUN, Attended, Replacement
from pastiche.nodes.host.networks.unet_hidden import CHANGES, HiddenPatch
from pastiche.nodes.host.networks.unet_residual import HOOK, ResidualHandler, runs_residual_blocks
from pastiche.nodes.host.training import loop
from pastiche.nodes.host.training.loop import TrainingSettings
from support.models import randomize, tiny_unet


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Attention:
    """Linear: query + 10 keys + 100 values, means over the tokens of the last two."""

    def __call__(self, query, context=None, value=None, transformer_options=None):
        return query + 10 * context.mean(1, keepdim=True) + 100 * value.mean(1, keepdim=True)

    to_q = staticmethod(lambda x: 2 * x)
    to_k = staticmethod(lambda x: 3 * x)
    to_v = staticmethod(lambda x: 5 * x)
    to_out = staticmethod(lambda x: -x)


def options(replaced=None):
    adapter = types.SimpleNamespace(attention_module=lambda kind, slot: Attention() if (kind, slot) == ("attn1", ("output", 7, 0)) else None)
    run = types.SimpleNamespace(adapter=adapter, replaced_attention=lambda kind, slot: replaced, model_options={})
    return {"block": ("output", 7), "block_index": 0, RUN: run}


def nested(weights, passes=(), replaced=None):
    """The result of changes with these weights, and what each was given."""
    seen, own, given = [], random(2, 4, 3), options(replaced)
    keys = [random(2, 4, 3, seed=seed) for seed in range(1, len(weights) + 1)]

    def changing(number):
        def change(before, inputs, options):
            seen.append((before, inputs))
            return Replacement(Attended(inputs.query + 1, keys[number], inputs.values), weights[number], number in passes)

        return HiddenPatch(change)

    patches, inputs = [changing(number) for number in range(len(weights))], Attended(own, own, own)
    before = [inputs]
    for patch in patches:
        inputs = Attended(*patch(*inputs, given))
        before.append(inputs)
    attend = Attention()
    last = attend(inputs.query, context=inputs.keys, value=inputs.values)
    result = patches[0].settle(last, given)
    assert CHANGES not in given and patches[-1].settle(last, given) is last  # the first settles for all
    return own, seen, before, [attend(each.query, context=each.keys, value=each.values) for each in before], result


def test_every_change_sees_the_samples_own_state_and_what_came_before():
    own, seen, before, _, _ = nested([0.5, 0.5, None])
    assert all(state is own for state, _ in seen)
    for (_, inputs), expected in zip(seen, before):
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(inputs, expected))


def test_a_state_of_other_tokens_is_its_own():
    """Token merging between two patches: what came first is of another size."""
    given, seen = options(), []
    patch = HiddenPatch(lambda own, inputs, options: seen.append(own) or Replacement(inputs, 0.5))
    whole, merged = random(2, 4, 3), random(2, 2, 3)
    patch(whole, whole, whole, given)
    patch(merged, merged, merged, given)
    assert seen[0] is whole and seen[1] is merged
    idle = HiddenPatch(lambda own, inputs, options: None)
    assert idle(merged, whole, whole, given) == (merged, whole, whole) and len(given[CHANGES]) == 2


@pytest.mark.parametrize("weights, passes, expected", [
    ((None,), (), lambda a: a[1]), ((0.25,), (), lambda a: 0.75 * a[0] + 0.25 * a[1]), ((1.0,), (), lambda a: a[1]),
    ((0.5, 0.25), (), lambda a: 0.75 * (0.5 * a[0] + 0.5 * a[1]) + 0.25 * a[2]),
    ((None, 0.25), (), lambda a: 0.75 * a[1] + 0.25 * a[2]), ((0.5, None), (), lambda a: a[2]),
    ((0.5, 0.25, 0.5), (), lambda a: 0.5 * (0.75 * (0.5 * a[0] + 0.5 * a[1]) + 0.25 * a[2]) + 0.5 * a[3]),
    ((0.25,), (0,), lambda a: a[1]),  # where the weight is 0 its inputs are those given
    ((None, 0.25), (1,), lambda a: a[2]), ((0.5, 0.25), (1,), lambda a: 0.75 * (0.5 * a[0] + 0.5 * a[1]) + 0.25 * a[2]),
])
def test_results_are_blended_one_over_the_other(weights, passes, expected):
    *_, attended, result = nested(list(weights), passes)
    torch.testing.assert_close(result, expected(attended), rtol=1e-5, atol=1e-5)


def test_another_nodes_replacement_attends_where_there_is_one():
    """On projected queries, keys and values, before the output's projection."""
    def replaced(q, k, v, options):
        return q + k.mean(1, keepdim=True) + v.mean(1, keepdim=True)

    own, _, _, attended, result = nested([0.25], replaced=replaced)
    plain = -(2 * own + 3 * own.mean(1, keepdim=True) + 5 * own.mean(1, keepdim=True))
    torch.testing.assert_close(result, 0.75 * plain + 0.25 * attended[1], rtol=1e-5, atol=1e-5)


def test_nothing_changed_is_nothing_settled():
    out = random(2, 4, 3)
    assert HiddenPatch(None).settle(out, {}) is out and HiddenPatch(None).settle(out, {CHANGES: ()}) is out


def test_residual_blocks_of_others_are_handed_on():
    from comfy.ldm.modules.diffusionmodules.openaimodel import ResBlock

    layer, x = ResBlock(32, 16, 0.0, out_channels=32, dims=2), random(1, 32, 4, 4)
    randomize(layer)  # core leaves new layers without numbers
    emb, calls = random(1, 16), []
    adapter = types.SimpleNamespace(is_residual=lambda asked, place: asked is layer)
    ours = ResidualHandler([("output", 7)], lambda place, x, grid, options: calls.append((place, grid)) or torch.full_like(x, 5.0))

    def theirs(layer, x, emb, context, options, *rest):
        return "theirs"

    def run(handlers, block=("output", 7), running=True):
        given = {"block": block, "patches": {HOOK: handlers}}
        if running:
            given[RUN] = types.SimpleNamespace(adapter=adapter)
        return ours(layer, x, emb, None, given)

    torch.testing.assert_close(run([(ResBlock, ours)]), x + 5)
    assert calls == [(("output", 7), (4, 4))]
    for block, running in ((("output", 6), True), (("output", 7), False)):
        torch.testing.assert_close(run([(ResBlock, ours)], block, running), layer(x, emb))
        assert run([(ResBlock, ours), (torch.nn.Linear, None), (ResBlock, theirs)], block, running) == "theirs"
        torch.testing.assert_close(run([(ResBlock, theirs), (ResBlock, ours)], block, running), layer(x, emb))  # those before had their turn
    assert runs_residual_blocks({"patches": {HOOK: [(ResBlock, theirs)]}})
    assert not runs_residual_blocks({"patches": {HOOK: [(ResBlock, ours)]}})
    assert not runs_residual_blocks({}) and not runs_residual_blocks({"patches": {HOOK: [(torch.nn.Linear, theirs)]}})


def test_a_preview_starts_from_the_largest_sigma_as_core_does():
    sampling, seen = tiny_unet().get_model_object("model_sampling"), []
    own = loop._TrainingLoop.__new__(loop._TrainingLoop)
    own._model, own._sigmas = types.SimpleNamespace(model_sampling=sampling), torch.tensor([3.0, 1.0, 0.0])
    own._images, own._settings = types.SimpleNamespace(shape=torch.Size((1, 4, 8, 8))), TrainingSettings(seed=7)
    own._device, own._conds = torch.device("cpu"), ["c"]
    own._denoise = lambda x, sigma, conds: seen.append((x, sigma.tolist(), conds)) or 0.5 * x
    last = own._preview()
    noise = torch.randn(1, 4, 8, 8, generator=step_generator(7, -2))
    torch.testing.assert_close(seen[0][0], noise * 10**0.5)  # sqrt(1 + sigma^2) at the start of a schedule
    assert [(sigma, conds) for _, sigma, conds in seen] == [([3.0], ["c"]), ([1.0], ["c"])]
    torch.testing.assert_close(seen[1][0], (0.5 + 0.5 / 3) * seen[0][0])
    torch.testing.assert_close(last, 0.5 * seen[1][0])
