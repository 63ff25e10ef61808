"""Parts of the rooms that have no file of their own: other nodes' hooks, number checks, the mini models' memory, FastSAM's small print."""

import functools
import logging
import math
import types

import pytest
import torch

from pastiche.nodes.host import checks
from pastiche.nodes.host.fastsam import network as networks
from pastiche.nodes.host.fastsam.checkpoint import _sane
from pastiche.nodes.host.fastsam.model import FastSAM
from pastiche.nodes.host.fastsam.network import OnnxNetwork
from pastiche.nodes.host.fastsam.numbers import _levels, number_objects
from pastiche.nodes.host.fastsam.preview import _numbers
from pastiche.nodes.host.fastsam.text import _three_of
from pastiche.nodes.host.injections import style as styles
from pastiche.nodes.host.injections.content import ContentPatches, _places
from pastiche.nodes.host.networks import attention_slots, neighbours
from pastiche.nodes.host.networks.adapter import EXPLICIT, NetworkAdapter, parse_streams
from pastiche.nodes.host.networks.families import find_adapter
from pastiche.nodes.host.networks.mini import ARCHITECTURES, MiniVAE, load_mini
from pastiche.nodes.host.networks.unet_hidden import _require_tokens
from pastiche.nodes.host.training import loop
from pastiche.nodes.host.training.loop import TrainingSettings
from pastiche.nodes.host.trajectories.clean_level import clean_sigma, input_scale
from pastiche.nodes.host.trajectories.inversion import check_latent, check_schedule
from pastiche.nodes.host.trajectories.latent_adain import latent_adain
from pastiche.nodes.host.whole_models import WholeModelPatcher
from pastiche.nodes.sockets import FeatureBank, FeatureKey, Fingerprint, Trajectory
from support.models import tiny_unet


@functools.cache
def unet():
    """One for all tests, which leave it as it is."""
    return tiny_unet()


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def called(name):
    """A function that another node could have made."""
    def patch(*args):
        return args

    patch.__qualname__, patch.__module__ = f"{name}.patch.<locals>.inner", "custom_nodes.other"
    return patch


# other nodes


def test_whose_a_hook_is():
    assert neighbours.OURS == "pastiche.nodes" and neighbours.is_ours(find_adapter) and neighbours.is_ours((object, find_adapter))
    for foreign in (called("X"), (object, called("X")), torch.relu, (), 5):
        assert not neighbours.is_ours(foreign)
    near = types.SimpleNamespace(__module__="pastiche.nodes_of_another")
    assert not neighbours.is_ours(near) and neighbours.is_ours(types.SimpleNamespace(__module__="pastiche.nodes"))
    assert neighbours.owner_of(called("HyperTile")) == "HyperTile"
    assert neighbours.owner_of(types.SimpleNamespace()) == "SimpleNamespace"


@pytest.mark.parametrize("make, kind", [
    (lambda patch: {"transformer_options": {"patches": {"attn1_patch": [patch]}}}, "attn1_patch"),
    (lambda patch: {"transformer_options": {"patches": {"forward": [(object, patch)]}}}, "forward"),
    (lambda patch: {"transformer_options": {"patches_replace": {"attn1": {("output", 1): patch}}}}, "attn1 replacement"),
    (lambda patch: {"transformer_options": {"wrappers": {"apply_model": {"key": [patch]}}}}, "apply_model"),
    (lambda patch: {"transformer_options": {"wrappers": {"diffusion_model": {"key": [patch]}}}}, "diffusion_model"),
    (lambda patch: {"transformer_options": {"optimized_attention_override": patch}}, "optimized_attention_override"),
    (lambda patch: {"model_function_wrapper": patch}, "model_function_wrapper"),
])
def test_hooks_of_other_nodes_inside_a_forward(make, kind):
    patch = called("HyperTile")
    assert list(neighbours.foreign_patches(make(patch))) == [(kind, patch)] and neighbours.reads_whole_batch(make(patch))
    assert not neighbours.reads_whole_batch(make(find_adapter))
    assert neighbours.has_tiles(make(patch)) and not neighbours.shrinks(make(patch))
    assert neighbours.shrinks(make(called("PatchModelAddDownscale")))
    assert not neighbours.has_tiles(make(called("Other")))


def test_our_hook_in_front_of_anothers_is_looked_through():
    other = called("TomePatchModel")

    def ours():
        return other

    ours.__module__ = "pastiche.nodes.host.x"
    options = {"transformer_options": {"patches": {"attn1_patch": [ours]}}}
    assert list(neighbours.foreign_patches(options)) == [("attn1_patch", other)]
    assert not list(neighbours.foreign_patches({"transformer_options": {"wrappers": {"outer_sample": {"key": [other]}}}, "model_function_wrapper": None}))


def test_what_changes_the_number_of_tokens_is_told():
    def why(*hooks, **more):
        options = {"transformer_options": {"patches": {"attn1_patch": list(hooks)}}, **more}
        return neighbours.size_changers(options), neighbours.why_other_size(options, "masks")

    assert why() == ([], "Conditions with an area cannot be combined with masks: use masks.")
    assert why(called("Other"))[0] == []
    found, sentence = why(called("TomePatchModel"), called("TomePatchModel"))
    assert found == ["TomePatchModel (token merging)"]
    assert sentence == "TomePatchModel (token merging) cannot be combined with masks: take it off this MODEL."
    found, sentence = why(called("PatchModelAddDownscale"), called("HyperTile"))
    assert found == ["PatchModelAddDownscale (Deep Shrink)", "HyperTile (attention in tiles)"]
    assert "put the same node on the MODEL of DDIM Inversion" in sentence
    assert why(model_function_wrapper=called("Tiler"))[0] == ["Tiler, which evaluates the latent in its own way,"]


def test_our_patch_stands_before_tiles():
    a, tiles, b, own = called("A"), called("HyperTile"), called("B"), object()
    assert neighbours.before_tiles([a, tiles, b], own) == [a, own, tiles, b]
    assert neighbours.before_tiles([a, b], own) == [a, b, own] and neighbours.before_tiles([], own) == [own]


def test_wrappers_are_left_out_of_a_runs_own_options():
    groups = {"outer_sample": {"easycache": [1], "other": [2]}, "apply_model": {"other": [3]}}
    options = {"transformer_options": {"wrappers": groups}}
    assert neighbours.leave_out(options, {"lazycache": "LazyCache"}) == []
    assert options["transformer_options"]["wrappers"] is groups
    assert neighbours.leave_out(options, neighbours.CACHES) == ["EasyCache"] and groups["outer_sample"]["easycache"] == [1]
    assert options["transformer_options"]["wrappers"] == {"outer_sample": {"other": [2]}, "apply_model": {"other": [3]}}
    assert neighbours.leave_out({}, neighbours.CACHES) == []


def test_a_replacement_stands_in_front_of_what_was_there():
    q, options = random(1, 4, 8), {"n_heads": 2, "attn_precision": None}
    own, block, later = (lambda tag: lambda q, k, v, o: tag)("slot"), lambda q, k, v, o: "block", lambda q, k, v, o: "later"
    slot = ("output", 3, 0)
    run = types.SimpleNamespace(replaced_attention=lambda kind, place: later if (kind, place) == ("attn1", ("output", 3)) else None)
    ask = lambda displaced, of_block, **more: attention_slots._chained("attn1", slot, displaced, of_block)(q, q, q, {**options, **more})
    assert ask(own, block) == "slot" and ask(own, None, pastiche_run=run) == "slot" and ask(None, block) == "block"
    assert ask(None, block, pastiche_run=run) == "later" and ask(None, None, pastiche_run=run) == "later"
    expected = torch.nn.functional.scaled_dot_product_attention(*(3 * [q.unflatten(-1, (2, 4)).transpose(1, 2)])).transpose(1, 2).flatten(2)
    torch.testing.assert_close(ask(None, None), expected)
    assert attention_slots._reaches(own, own) and not attention_slots._reaches(None, own)
    assert not attention_slots._reaches(block, own)
    chained = (lambda inner: lambda *args: inner(*args))(own)
    assert attention_slots._reaches(chained, own)


# networks


def test_streams_spelled_out_once():
    assert parse_streams("self_attention_qkv, h_space, SELF_ATTENTION_K") == [*EXPLICIT["self_attention_qkv"], "h_space"]
    with pytest.raises(ValueError, match='^streams: unknown stream "x"'):
        parse_streams("residual, x")


def test_a_family_without_anything_says_so():
    bare = type("Bare", (NetworkAdapter,), {"family": "Bare"})()
    for ask in (lambda: bare.places("auto"), lambda: bare.depth(("output", 0)), lambda: bare.capture({}, [], None), lambda: bare.empty_prompt(),
                lambda: bare.change_hidden(None, None, False), lambda: bare.change_h_space(None, None), lambda: bare.heads(("output", 0, 0))):
        with pytest.raises(ValueError, match="^Bare has no .* that Pastiche knows"):
            ask()
    assert bare.is_residual(object(), ("output", 0)) is False


def test_a_blend_needs_as_many_tokens():
    run = types.SimpleNamespace(model_options={})
    for weight in (None, 0.5, random(2, 1, 1), random(2, 6, 1), random(2, 6)):
        _require_tokens(weight, 6, {})
    for weight in (random(2, 5, 1), random(2, 7, 8)):
        with pytest.raises(ValueError, match=f"^strength, mask: a blend on {weight.shape[1]} tokens meets 6"):
            _require_tokens(weight, 6, {"pastiche_run": run})


@pytest.mark.parametrize("architecture", ["unet", "transformer"])
def test_mini_models_are_made_again_and_ask_for_their_share_of_memory(architecture):
    model, vae, _ = load_mini(architecture=architecture)
    config = model.model.model_config
    if architecture == "unet":
        expected = model.model.diffusion_model.model_channels / 320
    else:
        expected = 3.1 * (config.unet_config["hidden_size"] / 3072) * 4 / config.unet_config["patch_size"] ** 2
    assert config.memory_usage_factor == pytest.approx(expected) and architecture in ARCHITECTURES
    for patcher in (model, vae.patcher):
        again, arguments = patcher.cached_patcher_init
        other = again(*arguments, disable_dynamic=True)
        ours, theirs = (each.model.state_dict() for each in (patcher, other))
        assert other is not patcher and type(other) is type(patcher) and ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_the_mini_models_empty_prompt_is_its_own():
    model, _, kinds = load_mini()
    ((context, extra),) = find_adapter(model).empty_prompt()
    assert torch.equal(context, kinds["empty"][0][0].float()) and extra == {}
    assert not torch.equal(context, kinds["photo"][0][0])


def test_the_mini_vaes_pixels_and_memory():
    _, vae, _ = load_mini()
    assert isinstance(vae, MiniVAE) and vae.downscale_ratio == vae.upscale_ratio == 8 and vae.latent_channels == 16
    pixels = torch.tensor([0.0, 0.25, 1.0])
    assert vae.process_input(pixels).tolist() == [-1.0, -0.5, 1.0]
    assert vae.process_output(torch.tensor([-3.0, 0.0, 0.5, 9.0])).tolist() == [0, 0.5, 0.75, 1]
    assert vae.memory_used_encode((1, 3, 64, 32), torch.float32) == 32 * 64 * 32 * 4
    assert vae.memory_used_decode((1, 16, 8, 4), torch.float32) == 1024 * 32 * 4


def test_a_whole_model_is_never_left_in_part(monkeypatch):
    patcher, asked = WholeModelPatcher(torch.nn.Linear(2, 2), torch.device("cpu"), torch.device("cpu")), []
    assert patcher.partially_unload(torch.device("cpu"), 1e9) == patcher.partially_unload(torch.device("cpu")) == 0
    monkeypatch.setattr(WholeModelPatcher.__mro__[1], "partially_load", lambda self, device, extra=0, force=False: asked.append((extra, force)) or 7)
    assert patcher.partially_load(torch.device("cpu"), 5.0) == 7
    assert patcher.partially_load(torch.device("cpu"), force_patch_weights=True) == 7
    assert all(extra > 1e30 for extra, _ in asked) and [force for _, force in asked] == [False, True]


# trajectories


def test_levels_of_a_clean_picture():
    sampling = unet().get_model_object("model_sampling")
    assert [clean_sigma(sampling, level) for level in ("sigma 0", "t = 0", "t = 1")] == [0.0, float(sampling.sigmas[0]), float(sampling.sigmas[1])]
    flow = tiny_unet(prediction="flow").get_model_object("model_sampling")
    assert clean_sigma(flow, "t = 0") == float(flow.sigma_min)
    assert clean_sigma(flow, "t = 1") == pytest.approx(float(flow.percent_to_sigma(998 / 999)))
    with pytest.raises(ValueError, match="^clean_level"):
        clean_sigma(sampling, "t = 2")
    sigma = torch.tensor([0.5, 3.0])
    torch.testing.assert_close(input_scale(sampling, sigma), (1 + sigma**2) ** -0.5)


@pytest.mark.parametrize("sigmas, right", [
    ([1.0, 0.0], True), ([0.0], False), ([1.0], False), ([1.0, 1.0, 0.0], False), ([0.5, 1.0, 0.0], False),
    ([2.0, 1.0], False), ([[1.0, 0.0]], False),
    ([float("inf"), 0.0], False), ([2.0, float("nan"), 0.0], False),
])
def test_schedules_that_can_be_inverted(sigmas, right):
    if right:
        assert check_schedule(torch.tensor(sigmas, dtype=torch.float64)).tolist() == sigmas[::-1]
        return
    with pytest.raises(ValueError, match="^sigmas: "):
        check_schedule(torch.tensor(sigmas))


def test_latents_of_pictures_and_films():
    for shape in ((1, 4, 8, 8), (1, 4, 2, 8, 8)):
        assert check_latent({"samples": torch.zeros(shape)}).shape == shape
    for wrong in (torch.zeros(4, 8, 8), torch.zeros(1, 1, 4, 2, 8, 8), torch.full((1, 4, 8, 8), math.nan)):
        with pytest.raises(ValueError, match="^style: "):
            check_latent({"samples": wrong}, "style")


def test_a_films_statistics_are_over_all_its_frames():
    content, style = {"samples": random(2, 3, 4, 5, 6)}, {"samples": 3 * random(1, 3, 2, 7, 5, seed=1) + 1}
    found = latent_adain(content, style, 1.0, None, None)["samples"]
    assert found.shape == (2, 3, 4, 5, 6)
    for statistic in (torch.Tensor.mean, torch.Tensor.std):
        torch.testing.assert_close(statistic(found, (2, 3, 4)), statistic(style["samples"], (2, 3, 4)).expand(2, 3), rtol=1e-4, atol=1e-4)
    mask = torch.zeros(1, 5, 6)
    mask[..., :3] = 1
    masked = latent_adain(content, style, 1.0, mask, None)["samples"]
    assert torch.equal(masked[..., 3:], content["samples"][..., 3:])
    torch.testing.assert_close(masked[..., :3].mean((2, 3, 4)), style["samples"].mean((2, 3, 4)).expand(2, 3), rtol=1e-4, atol=1e-4)
    rough = latent_adain(content, style, 1.0, None, None, epsilon=1.0)["samples"]
    own = content["samples"].std((2, 3, 4))
    torch.testing.assert_close(rough.std((2, 3, 4)), found.std((2, 3, 4)) * own / (own + 1.0), rtol=1e-4, atol=1e-4)


# injections


@pytest.mark.parametrize("settings, blends, changes", [
    (dict(), False, True), (dict(strength=0.5), True, True), (dict(strength=2.0), True, True),
    (dict(mask=torch.ones(1, 8, 8)), True, True),
    (dict(strength=0.0), True, False), (dict(mask=torch.zeros(1, 8, 8)), True, False),
    (dict(sigmas=styles.SigmaRange(2.0, 2.0)), False, False),
])
def test_when_style_injection_blends_and_changes(settings, blends, changes):
    key = FeatureKey("self_attention", "output", 7)
    bank = FeatureBank(Trajectory(torch.tensor([0.0, 1.0]), random(2, 1, 4, 8, 8), [[None, {}]], "next", Fingerprint("", "")), (key,), "ram", None, None)
    model = unet()
    settings = dict(gamma=0.75, temperature=1.5, strength=1.0, mask=None, sigmas=styles.SigmaRange()) | settings
    own = styles.StylePatches(find_adapter(model), bank, None, [("output", 7)], **settings)
    assert own.blends is blends and bool(own.changes) is changes and not own.projected and own.rows_beside == 1


def test_layers_of_content_features():
    adapter = find_adapter(unet())
    key = lambda stream, number: FeatureKey(stream, "output", number)
    held = FeatureBank(None, (key("residual", 3), key("residual", 5), key("self_attention_q", 3), key("self_attention_q", 7)), "ram", None, None)
    places = lambda text, stream, share=1.0, bank=held: [number for _, number in _places(adapter, bank, text, stream, share)]
    assert places("auto", "residual") == [5] and places(" Auto ", "self_attention_q") == [3, 7]
    assert places("4-6", "residual") == [4, 5, 6]
    for text, share in (("none", 1.0), ("", 1.0), ("auto", 0.0), ("4-6", -1.0)):
        assert places(text, "residual", share) == []
    empty = FeatureBank(None, (), "ram", None, None)
    assert places("auto", "residual", bank=empty) == list(range(4, 12))
    assert places("auto", "self_attention_q", bank=empty) == list(range(3, 12))


@pytest.mark.parametrize("feature_steps, attention_steps, layers, last", [
    (0.5, 0.25, ("residual", "attention"), 0.5), (0.25, 0.5, ("residual", "attention"), 0.5),
    (0.75, 0.5, ("attention",), 0.5), (0.25, 0.75, ("residual",), 0.25),
])
def test_the_steps_that_must_have_been_captured(feature_steps, attention_steps, layers, last):
    sigmas = torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0])
    bank = FeatureBank(Trajectory(sigmas, random(5, 1, 4, 8, 8), [[None, {}]], "next", Fingerprint("", "")), (), "ram", None, None)
    place = [("output", 7)]
    own = ContentPatches(
        find_adapter(unet()), bank, feature_steps, attention_steps, place * ("residual" in layers), place * ("attention" in layers), [], "override"
    )
    (source,) = own.sources
    assert [source.due(sigma) for sigma in (4.0, 3.0, 2.0, 1.0)] == [step < 4 * last for step in range(4)]


# training


def test_out_of_memory_halves_the_batch_rounding_up_and_then_checkpoints(caplog):
    asked = []
    own = loop._TrainingLoop.__new__(loop._TrainingLoop)
    own._micro, own._checkpointing, own._stack = 5, False, types.SimpleNamespace(enter_context=lambda context: asked.append("checkpointing"))
    own._adapters, own._model = types.SimpleNamespace(parameters=lambda: []), types.SimpleNamespace(diffusion_model=torch.nn.Module())
    own._images = types.SimpleNamespace(shape=(1, 4, 16, 8))
    own._draw = lambda step: ()

    def full(*args):
        asked.append(own._micro)
        raise MemoryError

    own._accumulate = full
    with caplog.at_level(logging.WARNING), pytest.raises(ValueError, match="^Out of memory training on a 16x8 latent"):
        own._step(0, None)
    assert asked == [5, 3, 2, 1, "checkpointing", 1] and "going on with 3 image" in caplog.text
    own._accumulate = lambda *args: (_ for _ in ()).throw(KeyError("x"))
    with pytest.raises(KeyError):
        own._step(0, None)


def test_rows_that_share_a_forward():
    own = loop._TrainingLoop.__new__(loop._TrainingLoop)
    own._micro, own._conds = 2, ["a", "b", "c"]
    assert list(own._micro_batches([0, 1, 0, 0, 2])) == [[0, 2], [3], [1], [4]] and own._conds_of(1) == ["b"]
    own._conds = ["a"]
    assert list(own._micro_batches([0, 1, 0, 0, 2])) == [[0, 1], [2, 3], [4]] and own._conds_of(1) == ["a"]
    own._conds = ["a", "b"]
    assert list(own._micro_batches([0, 1])) == [[0], [1]] and own._conds_of(1) == ["b"]


@pytest.mark.parametrize("precision, expected", [("model", torch.float16), ("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_the_arithmetic_of_a_training(precision, expected):
    own = loop._TrainingLoop.__new__(loop._TrainingLoop)
    own._settings, own._model = TrainingSettings(precision=precision), types.SimpleNamespace(get_dtype_inference=lambda: torch.float16)
    assert own._compute_dtype() == expected


# checks


@pytest.mark.parametrize("value, low, high, message", [
    (1, 1, 2, None), (2, 1, 2, None), (0.5, 1, 2, "got 0.5, expected 1 to 2"), (3, 1, 2, "got 3, expected 1 to 2"),
    (0, 1, None, "expected at least 1"),
    (9, None, 2, "expected at most 2"), (True, 0, 1, "expected a number, got bool"), ("1", 0, 1, "got str"),
    (math.nan, 0, 1, "finite"), (10**400, 0, 1, "a number of 1329 bits"),
    (1 << 64, 0, 1, "got 1.84467e\\+19"), ((1 << 64) - 1, 0, 1, "got 18446744073709551615"), (7, None, None, None),
])
def test_numbers_and_their_limits(value, low, high, message):
    if message is None:
        checks.check_number(value, "x", low, high)
        return
    with pytest.raises(ValueError, match=f"^x: .*{message}"):
        checks.check_number(value, "x", low, high)


def test_tensors_up_to_their_limits():
    assert checks.largest(torch.tensor([-3.0, 2.0])) == 3
    assert checks.largest(torch.tensor([True])) == 0 == checks.largest(torch.zeros(0))
    assert checks.check_tensor(torch.full((1,), 1e9), "x") is not None
    assert checks.check_image(torch.full((1, 2, 2, 3), 1e6), "x") is None
    for ask in (lambda: checks.check_tensor(torch.full((1,), 1.1e9), "x"), lambda: checks.check_image(torch.full((1, 2, 2, 3), 1.1e6), "x"),
                lambda: checks.check_mask(torch.full((2, 2), 1.1e6), "x"), lambda: checks.check_image(torch.zeros(1, 2, 2, 2), "x"),
                lambda: checks.check_tensor(torch.zeros(0, 2), "x"), lambda: checks.check_tensor(torch.zeros(2, 0), "x")):
        with pytest.raises(ValueError, match="^x: (holds values up to|got)"):
            ask()
    checks.check_tensor(torch.tensor(5.0), "x")


def test_inputs_of_other_packs():
    nested = types.SimpleNamespace(is_nested=True)
    checks.check_samples({"samples": nested}, "latent")
    for samples in (None, [torch.zeros(1, 4, 8, 8)]):
        with pytest.raises(ValueError, match="^latent: expected a tensor"):
            checks.check_samples({"samples": samples}, "latent")
    prompt = torch.zeros(1, 7, 8)
    for conditioning in ([[prompt, {}]], ((prompt, {"pooled_output": None}),), [[None, {}]]):
        checks.check_conditioning(conditioning, "positive")
    for conditioning in ([], None, "text", {}):
        with pytest.raises(ValueError, match="^positive: holds no conditioning"):
            checks.check_conditioning(conditioning, "positive")
    with pytest.raises(ValueError, match="^positive: holds NaN"):
        checks.check_conditioning([[prompt, {}], [prompt, {"pooled_output": torch.full((1, 4), math.nan)}]], "positive")


# FastSAM


def test_numbers_are_white_on_black_inside_the_picture():
    picture = torch.full((60, 90, 3), 0.5)
    for x, y in ((45, 30), (0, 0), (89, 59), (3, 57)):
        written = number_objects(picture, [(x, y)])
        rows, columns = (written != 0.5).any(-1).nonzero().unbind(1)
        high, wide = int(rows.max() - rows.min()) + 1, int(columns.max() - columns.min()) + 1
        assert len(rows) == high * wide and 0 < written.max() <= 1 and written.min() == 0
        assert int(rows.min()) == min(max(0, y - high // 2), 60 - high)
        assert int(columns.min()) == min(max(0, x - wide // 2), 90 - wide)
        edge = written[int(rows.min()), int(columns.min()) : int(columns.max()) + 1]
        assert not edge.any()  # a margin around the digit
    from PIL import Image

    grey = Image.new("L", (2, 1))
    grey.putdata([0, 255])
    assert _levels(grey, 1, 2).flatten().tolist() == [0.0, 1.0]


def test_object_numbers_survive_eight_bits():
    objects = torch.tensor([[0, 1, 255], [256, 257, 70000 % 65536]])
    stored = (_numbers(objects) * 255).to(torch.uint8).long()  # truncates, as the picture's writer
    assert torch.equal(stored[..., 0] + 256 * stored[..., 1], objects) and not stored[..., 2].any()
    large = torch.arange(2049 * 4).view(4, 2049) % 60000
    small = (_numbers(large) * 255).to(torch.uint8).long()
    assert torch.equal(small[..., 0] + 256 * small[..., 1], large[1::3, 1::3])
    assert _numbers(torch.zeros(3, 1024)).shape == (3, 1024, 3)


def test_answers_keep_what_scores_above_two_percent(monkeypatch):
    model = FastSAM("x", types.SimpleNamespace(size=64, fixed_size=None))
    prediction = torch.zeros(37, 4)
    prediction[4] = torch.tensor([0.01, 0.02, 0.021, 0.9])
    model._remember("a", prediction, torch.zeros(32, 4, 4))
    assert model._answers["a"][0][4].tolist() == pytest.approx([0.021, 0.9])
    monkeypatch.setattr("pastiche.nodes.host.fastsam.model.CACHED_BYTES", model._size())
    model._remember("b", prediction[:, :3], torch.zeros(32, 4, 4))
    assert list(model._answers) == ["b"]


@pytest.mark.parametrize("values, least, right", [
    ([0.5, 0.5, 0.5], 0, True), ((0, 1, 2), 0, True), ([0.5, 0.5], 0, False), ([0.5] * 4, 0, False),
    ([0.5, 0.5, 2.1], 0, False), ([0.5, 0.5, 0.0], 1e-3, False),
    ([0.5, 0.5, "1"], 0, False), ("abc", 0, False), (None, 0, False), ([1e-3] * 3, 1e-3, True),
])
def test_three_numbers_of_a_normalisation(values, least, right):
    assert _three_of(values, least) is right


@pytest.mark.parametrize("numbers, right", [
    ((0.33, 0.5, 1024, 640), True), ((4, 4, 1 << 16, 8192), True), ((1e-3, 1e-3, 1, 32), True), ((0, 1, 512, 640), False),
    ((4.1, 1, 512, 640), False),
    ((1, 0, 512, 640), False), ((1, 4.1, 512, 640), False), ((1, 1, 0, 640), False), ((1, 1, (1 << 16) + 1, 640), False),
    ((1, 1, 512, 31), False),
    ((1, 1, 512, 8193), False), ((math.nan, 1, 512, 640), False), ((1, math.inf, 512, 640), False),
])
def test_scales_that_a_yolo_can_have(numbers, right):
    if right:
        assert _sane(*numbers, "x") == numbers
    else:
        with pytest.raises(ValueError, match="^x: impossible YOLOv8 scale"):
            _sane(*numbers, "x")


class Session:
    def __init__(self, path, providers):
        self.path, self.providers, self.given = path, providers, None
        port = lambda shape, kind="tensor(float)": types.SimpleNamespace(shape=shape, type=kind, name="images")
        self.inputs, self.outputs = [port(*self.shape)], [port(shape) for shape in self.answers]

    def get_inputs(self):
        return self.inputs

    def get_outputs(self):
        return self.outputs

    def run(self, names, feed):
        import numpy

        self.given = feed
        return [numpy.ones(shape, dtype="float16") for shape in self.answers]


def onnx(monkeypatch, shape=([1, 3, 64, 96],), answers=((1, 37, 10), (1, 32, 16, 24)), device="cpu"):
    kind = type("Session", (Session,), {"shape": shape, "answers": answers})
    module = types.SimpleNamespace(InferenceSession=kind, get_available_providers=lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", module)
    monkeypatch.setattr(networks.comfy.model_management, "get_torch_device", lambda: torch.device(device))
    return OnnxNetwork("folder/x.onnx")


def test_an_onnx_file_tells_its_size_and_precision(monkeypatch):
    fixed = onnx(monkeypatch)
    assert fixed.fixed_size == (64, 96) and fixed.size == 96 and not fixed.half
    assert fixed.session.providers == ["CPUExecutionProvider"]
    free = onnx(monkeypatch, ([1, 3, "h", 96], "tensor(float16)"))
    assert free.fixed_size is None and free.size == 1024 and free.half
    assert onnx(monkeypatch, device="cuda").session.providers == ["CUDAExecutionProvider", "CPUExecutionProvider"]
    for network, kind in ((fixed, "float32"), (free, "float16")):
        prediction, prototypes = network(torch.zeros(1, 3, 64, 96))
        assert prediction.shape == (37, 10) and prototypes.shape == (32, 16, 24)
        assert prediction.dtype == prototypes.dtype == torch.float32
        assert network.session.given["images"].dtype == kind


@pytest.mark.parametrize("shape, answers, message", [
    (([1, 3, 64],), ((1, 37, 10), (1, 32, 16, 24)), "is no YOLOv8-seg export"), (([1, 3, 64, 64],),
    ((1, 37, 10),), "outputs of rank .3."),
    (([1, 3, 64, 64],), ((1, 37, 10), (1, 31, 16, 24)), "has 31 prototypes, expected 32"), (([1, 3, 64, 64],), ((1, 116, 10),
    (1, 32, 16, 24)), "has 80 classes"),
])
def test_an_onnx_file_of_another_network(monkeypatch, shape, answers, message):
    with pytest.raises(ValueError, match=f"^x.onnx .*{message}"):
        onnx(monkeypatch, shape, answers)


def test_an_onnx_file_that_answers_otherwise_than_it_says(monkeypatch):
    for channels, masks in ((38, 32), (37, 31)):
        network = onnx(monkeypatch, answers=((1, 37, 10), (1, 32, 16, 24)))
        network.session.answers = ((1, channels, 10), (1, masks, 16, 24))
        with pytest.raises(ValueError, match=f"gave {channels} values an anchor and {masks} prototypes"):
            network(torch.zeros(1, 3, 64, 96))
