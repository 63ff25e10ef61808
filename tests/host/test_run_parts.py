"""Parts that sampling runs are made of: which step a level is, whose a condition is, what is said once, what is put back."""

import functools
import logging
import math
import types

import comfy.model_management
import psutil
import pytest
import torch

from pastiche.nodes.algorithms.metrics import channel_correlation
from pastiche.nodes.host.features import capture as capturing
from pastiche.nodes.host.features.capture import _check_room, capture, feature_shapes, require_even, require_shape, storage_dtype
from pastiche.nodes.host.features.library import _inside_folders
from pastiche.nodes.host.features.stores import FileStore, FileWriter, MemoryStore, _aligned, _upload, readable_size
from pastiche.nodes.host.features.views import _as_grid, choose_key, feature_pca, features_at
from pastiche.nodes.host.injections import hints
from pastiche.nodes.host.injections.hints import Expected, Other, _likeness, _start_hint
from pastiche.nodes.host.injections.hspace import HSpacePatches, sigma_of_timestep
from pastiche.nodes.host.injections.injectfusion_sampler import RowNoise
from pastiche.nodes.host.injections.keep_outside import KeepOutsidePatches
from pastiche.nodes.host.injections.run import SamplingRun, _BankReader, rows_of, same_weights
from pastiche.nodes.host.injections.schedule import Schedule, SigmaRange, current_sigma, nearest, sigma_range
from pastiche.nodes.host.injections.style_rows import RowPatches
from pastiche.nodes.host.networks.families import find_adapter
from pastiche.nodes.sockets import FeatureBank, FeatureKey, Fingerprint, Trajectory
from support.models import tiny_cond, tiny_unet

KEY, H = FeatureKey("self_attention", "output", 7, 0), FeatureKey("h_space", "middle", 0)
CPU = torch.device("cpu")


@functools.cache
def unet():
    """One for all tests, which leave it as it is."""
    return tiny_unet()


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def trajectory(levels=(0.0, 1.0, 2.0, 4.0), batch=1, latents=None, size=(8, 8)):
    latents = random(len(levels), batch, 4, *size) if latents is None else latents
    return Trajectory(torch.tensor(levels), latents, [[random(1, 7, 32), {}]], "next", Fingerprint("w", "p"))


def bank(memory="ram", **about):
    return FeatureBank(trajectory(**about), (KEY,), memory, None, None)


# schedules


def test_the_nearest_level_is_the_step():
    levels = Schedule(torch.tensor([8.0, 4.0, 2.0, 0.0]))
    assert levels.steps == 3 and [levels.step(sigma) for sigma in (9.0, 6.1, 5.9, 2.5, 0.9)] == [0, 0, 1, 2, 3]
    assert [levels.first_steps(share) for share in (0.0, 0.5, 0.34, 1.0)] == [0, 2, 1, 3]
    assert levels.within(2.0, 1.0) and not levels.within(2.0, 0.67) and levels.within(4.0, 0.67) and levels.within(0.0, 1.5)
    assert nearest(torch.tensor([1.0, 5.0, 3.0]), 3.2) == 2 and current_sigma({"sigmas": torch.tensor([[2.5]])}) == 2.5


def test_a_split_schedule_is_a_part_of_the_whole():
    whole = Schedule(torch.tensor([8.0, 4.0, 2.0, 1.0, 0.0]))
    for levels, part in (
        ([4.0, 2.0, 1.0], True), ([8.0, 4.0], True), ([4.01, 2.0], True), ([4.1, 2.0], False), ([4.0, 1.0], False), ([1.0, 0.0], True),
        ([1.0, 0.0, 0.0], False), ([8.0, 4.0, 2.0, 1.0, 0.0], True),
    ):
        assert Schedule(torch.tensor(levels)).is_part_of(whole) is part, levels


def test_ranges_hold_both_their_ends():
    assert SigmaRange().holds(0.0) and SigmaRange().holds(1e9)
    span = SigmaRange(4.0, 1.0)
    assert [span.holds(sigma) for sigma in (4.0, 1.0, 2.0, 4.1, 0.9)] == [True, True, True, False, False]
    sampling = unet().get_model_object("model_sampling")
    found = sigma_range(sampling, 0.25, 0.75)
    assert (found.high, found.low) == (sampling.percent_to_sigma(0.25), sampling.percent_to_sigma(0.75))
    assert found.high > found.low


def test_timesteps_of_the_papers_scale():
    sampling = unet().get_model_object("model_sampling")
    assert sigma_of_timestep(sampling, 0) == sigma_of_timestep(sampling, -1) == 0
    assert sigma_of_timestep(sampling, 1000) == math.inf
    assert sigma_of_timestep(sampling, 999) == sigma_of_timestep(sampling, 999.5) == float(sampling.sigma_max)
    for timestep in (1, 400, 998):
        assert sigma_of_timestep(sampling, timestep) == pytest.approx(float(sampling.sigmas[timestep]), rel=1e-3)


# a run


def run(conds=()):
    return SamplingRun(types.SimpleNamespace(conds=dict(conds), model_options={"transformer_options": {}}))


def test_a_value_is_computed_once():
    own, calls = run(), []
    assert [own.memo("a", lambda: calls.append(1) or 7) for _ in range(3)] == [7, 7, 7] and calls == [1]
    assert own.memo("none", lambda: calls.append(2)) is None and own.memo("none", lambda: 5) is None


def test_conditions_are_told_by_their_prompts():
    positive, negative, third = [{"uuid": "p"}, {"uuid": "s"}], [{"uuid": "n"}, {"uuid": "s"}], [{"uuid": "c"}]
    own = run({"positive": positive, "negative": negative, "middle": third})
    assert own.conditional("p", 0) and not own.conditional("p", 1)  # before the conditions are known: by number
    own.name_conditions()
    assert own.conditional("p", 1) and own.conditional("c", 1) and own.conditional("s", 1) and not own.conditional("n", 0)
    assert positive[1]["uuid"] == "s" and negative[1]["uuid"] != "s" and not own.conditional(negative[1]["uuid"], 0)
    names = negative[1]["uuid"]
    own.name_conditions()
    assert negative[1]["uuid"] == names  # once a run
    own.alias("copy", "n")
    own.alias("nothing", "unknown")
    assert not own.conditional("copy", 0) and own.conditional("nothing", 0) and not own.conditional("nothing", 1)
    assert not own.conditional("x", 1)


@pytest.mark.parametrize("sigma, step, told", [(4.0, 3, False), (4.015, 3, False), (4.03, 3, True), (1.4, 1, True), (0.1, 1, True), (2.0, 2, False)])
def test_a_level_that_was_not_captured_is_said_once(caplog, sigma, step, told):
    caplog.set_level(logging.INFO)
    reader = _BankReader(bank())
    assert [reader._nearest(sigma) for _ in range(3)] == [step] * 3
    assert caplog.text.count("no features at sigma") == int(told)


def test_features_are_kept_once_a_step():
    reader = _BankReader(bank())
    reader.keys.add(KEY)
    reader.keep(H, torch.ones(1))
    reader.keep(KEY, torch.ones(1))
    reader.keep(KEY, torch.zeros(1))
    assert reader._tensors == {KEY: torch.ones(1)} and reader.size == (4, 8, 8)


def test_models_share_weights_where_nothing_was_patched():
    model = unet()
    clone = model.clone()
    assert same_weights(model, clone)
    clone.add_patches({"diffusion_model.out.2.weight": ("diff", (torch.zeros(1),))})
    assert not same_weights(model, clone) and not same_weights(model, tiny_unet())
    injected = model.clone()
    injected.injections["other"] = []
    assert not same_weights(model, injected)


def test_features_go_to_every_chunk():
    one, two = random(1, 3, 2), random(2, 3, 2)
    assert torch.equal(rows_of(one, 4, {}), one.expand(4, 3, 2))
    assert torch.equal(rows_of(two, 4, {"cond_or_uncond": [0, 1]}), torch.cat([two, two]))
    assert torch.equal(rows_of(two, 2, {"cond_or_uncond": [0]}), two)


def test_rows_of_a_style_take_their_own_samples_features():
    feature, options = random(2, 3, 2), {"cond_or_uncond": [0, 1, 2]}
    assert torch.equal(RowPatches._of_rows(feature, [1, 2, 5], (0,) * 6, options), feature[[1, 0, 1]])
    assert torch.equal(RowPatches._of_rows(feature[:1], [1, 2], (0,) * 6, options), feature[[0, 0]])


def test_h_space_changes_something_between_its_limits():
    def changes(gamma=0.5, t_edit=400.0, mask=None):
        return HSpacePatches(bank(), gamma, t_edit, "both", mask, "constant").changes

    assert changes() and changes(t_edit=999.0) and changes(mask=torch.ones(1, 8, 8)) and changes(t_edit=0)
    assert not changes(gamma=0) and not changes(t_edit=1000) and not changes(mask=torch.zeros(1, 8, 8))


def test_nothing_is_injected_outside_of_a_run():
    own = HSpacePatches(bank(), 0.5, 400.0, "both", None, "constant")
    assert own.share({"sigmas": torch.tensor([1.0])}) == 0.0
    args = {"h": random(1, 4, 2, 2), "transformer_options": {"sigmas": torch.tensor([1.0])}}
    assert own(args) is args


def test_noise_of_a_row_depends_on_seed_and_row_alone():
    like = torch.zeros(3, 4, 5)
    noise = RowNoise(7, 3).like(like)
    assert all(torch.equal(noise[row], RowNoise(7 + row, 1).like(like[:1])[0]) for row in range(3))
    again = RowNoise(2**64 - 1, 2)
    assert not torch.equal(again.like(like), again.like(like))


def outside(levels=(0.0, 1.0, 3.0)):
    return KeepOutsidePatches(trajectory(levels, 1, torch.tensor(levels).view(-1, 1, 1, 1, 1).expand(-1, 1, 1, 2, 2).clone() * 10), torch.zeros(1, 2, 2))


@pytest.mark.parametrize("sigma, value", [(0.0, 0.0), (1.0, 10.0), (3.0, 30.0), (9.0, 30.0), (2.0, 20.0), (1.5, 15.0), (0.25, 2.5), (1.00005, 10.0), (2.99995, 30.0)])
def test_the_content_at_a_level(sigma, value):
    assert outside()._content(sigma, torch.zeros(1)).flatten().tolist() == pytest.approx([value] * 4, abs=1e-6)


@pytest.mark.parametrize("start, refused", [(3.0, False), (3.014, False), (3.016, True), (1.0, False)])
def test_a_content_that_ends_below_the_sampling_is_refused(start, refused):
    sigmas = torch.tensor([start, 0.0])
    if not refused:
        return outside().check(None, None, sigmas)
    with pytest.raises(ValueError, match="^trajectory: it ends at sigma 3.000"):
        outside().check(None, None, sigmas)


# hints


def start(x, sigma=4.0, others=(), levels=(0.0, 1.0, 4.0)):
    return _start_hint(Expected(("content", noisy(levels)), tuple(others)), x, sigma)


def noisy(levels=(0.0, 1.0, 4.0)):
    clean, noise = random(1, 4, 32, 32), random(1, 4, 32, 32, seed=1)
    return trajectory(levels, latents=torch.stack([clean + level * noise for level in levels]))


def mixed(likeness, deviation=None):
    """A latent whose channels correlate this much with the inverted one's."""
    own = noisy().latents[-1]
    other = random(*own.shape, seed=9)
    unit = lambda x: (x - x.mean((2, 3), keepdim=True)) / x.std((2, 3), keepdim=True)
    own, other = unit(own), unit(other)
    other = unit(other - (own * other).mean((2, 3), keepdim=True) * own)
    x = likeness * own + math.sqrt(1 - likeness**2) * other
    assert channel_correlation(x, noisy().latents[-1]) == pytest.approx(likeness, abs=1e-3)
    return x * float(noisy().latents[-1].std() if deviation is None else deviation)


@pytest.mark.parametrize("likeness, said", [(1.0, ""), (0.86, ""), (0.84, "noise was added to the content's"), (0.51, "noise was added"), (0.48, "sampling does not start from")])
def test_how_alike_a_start_must_be(likeness, said):
    found = start(mixed(likeness))
    assert (not found) if not said else said in found


def test_a_part_of_a_schedule_is_no_noisier_than_its_level():
    latents = noisy().latents
    assert start(latents[1], 1.0) == "" and start(1.55 * latents[1], 1.0) == ""
    assert "sampling begins at sigma 1, but the latent it continues has 1.7 times" in start(1.7 * latents[1], 1.0)
    assert start(mixed(0.0), 3.95) != "" and start(mixed(0.0), 3.9) == ""  # below 0.98 of the last level


def test_an_encoded_picture_is_told_from_noise():
    clean = noisy().latents[0]
    assert start(clean).startswith("sampling starts from the content's encoded picture")
    scale = float(noisy().latents[-1].std() / clean.std())
    assert start(0.6 * scale * clean).startswith("sampling starts from the content's encoded")
    assert "encoded" not in start(0.65 * scale * clean)


def test_a_start_that_is_another_picture():
    other = Other("style", noisy(), "Swap them.")
    content = trajectory((0.0, 1.0, 4.0), latents=random(3, 1, 4, 32, 32, seed=5))
    ask = lambda x: _start_hint(Expected(("content", content), (other,)), x, 4.0)
    assert ask(mixed(0.6)) == "sampling starts from the style's inverted noise. Swap them."
    assert ask(noisy().latents[0] * 3) == "sampling starts from the style's encoded picture. Swap them."
    assert ask(mixed(0.45)).startswith("sampling does not start from the content's")
    assert _start_hint(Expected(None, (other,)), mixed(0.45), 4.0) == ""
    assert _start_hint(Expected(None, (other,)), mixed(0.55), 4.0)


def test_latents_of_other_sizes_are_not_compared():
    own = noisy()
    assert _likeness(random(1, 4, 16, 32), own, 4.0) is None and _likeness(random(2, 4, 32, 32), own, 4.0) is not None
    pair = trajectory((0.0, 4.0), latents=random(2, 2, 4, 32, 32))
    assert _likeness(random(2, 4, 32, 32), pair, 4.0) is not None and _likeness(random(3, 4, 32, 32), pair, 4.0) is None
    assert start(random(1, 4, 16, 32)) == ""


@pytest.mark.parametrize("cfg, function, options, said", [
    (1.0, "sample_euler", {}, []), (1.5, "sample_euler", {}, ["cfg is 1.5"]), (None, "sample_euler", {}, []),
    (1.0, "sample_euler_ancestral", {}, ["the sampler euler_ancestral adds new noise"]),
    (1.0, "sample_euler", {"s_churn": 0.5}, ["adds new noise"]),
    (1.0, "sample_euler", {"s_churn": 0.0, "eta": 0.0}, []), (1.0, "sample_ddim", {"eta": 0.5}, ["adds new noise"]),
])
def test_guidance_and_noise_of_samplers(cfg, function, options, said):
    guider = types.SimpleNamespace(cfg=cfg)
    sampler = types.SimpleNamespace(sampler_function=types.SimpleNamespace(__name__=function), extra_options=options)
    found = list(hints.hints(Expected(unguided=True), guider, sampler, random(1, 4, 8, 8), 4.0))
    assert len(found) == len(said) and all(part in sentence for part, sentence in zip(said, found))
    assert not [sentence for sentence in hints.hints(Expected(), types.SimpleNamespace(cfg=7.0), sampler, random(1, 4, 8, 8), 4.0) if "cfg" in sentence]
    belongs = list(hints.hints(Expected(sampler=("Own Sampler", function)), guider, sampler, random(1, 4, 8, 8), 4.0))
    missing = list(hints.hints(Expected(sampler=("Own Sampler", "sample_own")), guider, sampler, random(1, 4, 8, 8), 4.0))
    assert not [sentence for sentence in belongs if "Own" in sentence]
    assert "Own Sampler is not the sampler of this run" in missing[-1]


# features


@pytest.mark.parametrize("count, text", [(0, "0 bytes"), (999, "999 bytes"), (1000, "1 kB"), (1234, "1.23 kB"), (10**6, "1 MB"), (1.18e9, "1.18 GB"), (5e12, "5e+03 GB")])
def test_sizes_are_readable(count, text):
    assert readable_size(count) == text


def test_room_is_asked_where_the_features_will_be(monkeypatch):
    free = {"disk": 5, "device": 3, "ram": 1}
    monkeypatch.setattr(capturing.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=free["disk"]))
    monkeypatch.setattr(comfy.model_management, "get_free_memory", lambda device: free["device"])
    monkeypatch.setattr(psutil, "virtual_memory", lambda: types.SimpleNamespace(available=free["ram"]))
    gpu = torch.device("meta")
    for memory, device, most in (("disk", gpu, 5), ("disk", CPU, 5), ("vram", gpu, 3), ("vram", CPU, 1), ("ram", gpu, 1), ("ram", CPU, 1)):
        _check_room(most, memory, device)
        with pytest.raises(ValueError, match=f"^memory: {memory} needs {most + 1} bytes for these features, {most} bytes are free"):
            _check_room(most + 1, memory, device)


def test_features_have_the_models_kind_of_half_precision():
    kind = lambda dtype, precision="half": storage_dtype(types.SimpleNamespace(model=types.SimpleNamespace(get_dtype_inference=lambda: dtype)), precision)
    assert [kind(dtype) for dtype in (torch.float32, torch.float16, torch.bfloat16)] == [torch.float16, torch.float16, torch.bfloat16]
    assert kind(torch.bfloat16, "full") == torch.float32


def shrunken(model):
    """A MODEL with a patch that calls itself core's Deep Shrink."""
    def patch(h, options):
        return h

    patch.__qualname__ = "PatchModelAddDownscale.patch"
    patched = model.clone()
    patched.set_model_input_block_patch(patch)
    return patched


def test_shapes_that_are_not_the_latents():
    model, shape = unet(), (1, 64, 32)
    require_shape(model, KEY, torch.zeros(2, 64, 32), shape)
    require_shape(model, KEY._replace(stream="cross_attention_k"), torch.zeros(1, 14, 32), shape)
    for found in ((1, 16, 32), (1, 128, 32), (1, 32, 64)):
        with pytest.raises(ValueError, match="^model: self_attention of output 7 is .* Another node on it changes the grid"):
            require_shape(model, KEY, torch.zeros(found), shape)
    small = shrunken(model)
    require_shape(small, KEY, torch.zeros(1, 16, 32), shape)
    for found in ((1, 128, 32), (1, 32, 64)):  # no fewer elements: not Deep Shrink's doing
        with pytest.raises(ValueError, match="^model: .* PatchModelAddDownscale \\(Deep Shrink\\) changes the grid"):
            require_shape(small, KEY, torch.zeros(found), shape)
    require_even(model, "")
    with pytest.raises(ValueError, match="^features: with PatchModelAddDownscale .* Do this."):
        require_even(small, "Do this.")


def test_prompts_of_none_count_77_tokens():
    model = unet()
    adapter, key = find_adapter(model), FeatureKey("cross_attention_k", "output", 7, 0)
    with_prompt = trajectory(batch=2)
    assert feature_shapes(adapter, [key], with_prompt) == {key: (2, 7, 32)}
    without = Trajectory(with_prompt.sigmas, with_prompt.latents, [[None, {}]], "next", Fingerprint("w", "p"))
    assert feature_shapes(adapter, [key, H], without) == {key: (2, 77, 32), H: (2, 64, 1, 1)}


def test_memory_in_whole_lines_of_64_bytes():
    assert [_aligned(size) for size in (0, 1, 64, 65, 128)] == [0, 64, 64, 128, 128]
    shapes = {KEY: (1, 3, 5), H: (2, 7)}
    store = MemoryStore(shapes, 2, torch.float32, CPU)
    assert store.nbytes == 2 * 4 * (15 + 14)
    for step in (1, 2):
        store.write(KEY, step, torch.full((1, 3, 5), float(step)))
        store.write(H, step, torch.full((2, 7), 10.0 * step))
    assert all(store.read(KEY, step, CPU).unique() == step and store.read(H, step, CPU).unique() == 10 * step for step in (1, 2))


def test_smaller_features_come_back_in_their_own_shape():
    store = MemoryStore({KEY: (1, 4, 6), H: (2, 7)}, 2, torch.float32, CPU)
    small, whole = random(1, 2, 3), random(1, 4, 6)
    store.write(KEY, 1, small)
    store.write(KEY, 2, whole)
    store.write(H, 1, torch.ones(2, 7))
    assert torch.equal(store.read(KEY, 1, CPU), small) and torch.equal(store.read(KEY, 2, CPU), whole)
    assert store.read(H, 1, CPU).all()


def test_steps_of_a_file_have_the_shape_that_was_announced(tmp_path):
    writer = FileWriter(tmp_path / "a.safetensors", {"a": (3, 2, 4), "b": (5,)}, {"a": torch.float16, "b": torch.float32}, {"n": "1"})
    for name, step, shape in (("a", 1, (2, 5)), ("a", 0, (2, 4)), ("b", 0, (4,)), ("a", 2, (3, 4))):
        with pytest.raises(ValueError, match=f"^{name}: expected"):
            writer.write(name, step, torch.zeros(shape))
    for step in (3, 1, 2):
        writer.write("a", step, torch.full((2, 4), float(step)))
    writer.write("b", 0, torch.arange(5.0))
    path = writer.finish()
    assert FileStore(path, temporary=False).tensor("b").tolist() == [0, 1, 2, 3, 4] and path.is_file()
    assert FileStore(path).tensor("a")[:, 0, 0].tolist() == [1, 2, 3] and path.is_file()


@pytest.mark.parametrize("count", range(9))
def test_numbers_begin_at_a_multiple_of_eight_bytes(tmp_path, count):
    """As the safetensors format asks for: readers map them as they lie."""
    path = FileWriter(tmp_path / "a.safetensors", {"a": (1, 4)}, {"a": torch.float32}, {"n": "x" * count}).finish()
    assert int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0 and (path.stat().st_size - 16) % 8 == 0


def test_uploads_wait_for_nothing_and_downloads_for_their_bytes(monkeypatch):
    tensor = types.SimpleNamespace(to=lambda device, non_blocking: (device.type, bool(non_blocking)))
    for able in (True, False):
        monkeypatch.setattr(comfy.model_management, "device_supports_non_blocking", lambda device: able)
        assert _upload(tensor, CPU) == ("cpu", False) and _upload(tensor, torch.device("meta")) == ("meta", able)


def test_files_of_listed_folders_alone(tmp_path, monkeypatch):
    import folder_paths

    inside, outside = tmp_path / "a", tmp_path / "ab"
    inside.mkdir(), outside.mkdir()
    monkeypatch.setattr(folder_paths, "get_folder_paths", lambda key: [str(tmp_path / "none"), str(inside)])
    assert _inside_folders(str(inside / "x.safetensors")) and _inside_folders(str(inside / "b" / "x.safetensors"))
    for path in (outside / "x.safetensors", tmp_path / "x.safetensors", inside / ".." / "x.safetensors"):
        assert not _inside_folders(str(path))
    (inside / "link.safetensors").symlink_to(outside / "x.safetensors")
    assert not _inside_folders(str(inside / "link.safetensors"))


def test_one_layer_is_shown():
    keys = (KEY, KEY._replace(depth=1), FeatureKey("residual", "output", 7), FeatureKey("residual", "middle", 0))
    held = FeatureBank(trajectory(), keys, "ram", None, None)
    assert choose_key(held, ("self_attention",), "7") == keys[1]
    assert choose_key(held, ("residual", "self_attention"), "7") == keys[2]
    assert choose_key(held, ("h_space", "residual"), "middle") == keys[3]
    for layer in ("6-7", "6, 7"):
        with pytest.raises(ValueError, match="^layer: one layer is shown at a time"):
            choose_key(held, ("residual",), layer)
    with pytest.raises(ValueError, match='^layer: the features hold no h_space of "7"; they hold residual of middle 0, residual of output 7, self'):
        choose_key(held, ("h_space",), "7")


def test_tokens_are_laid_out_row_by_row():
    model = unet()
    adapter, held = find_adapter(model), bank(size=(8, 16))
    maps = random(1, 5, 2, 3)
    assert _as_grid(maps, KEY, adapter, held) is maps
    place = ("output", 7)
    rows, columns = adapter.grid(place, 8, 16)
    tokens = torch.arange(float(rows * columns)).view(1, -1, 1)
    assert columns == 2 * rows
    assert torch.equal(_as_grid(tokens, KEY, adapter, held)[0, 0], torch.arange(float(rows * columns)).view(rows, columns))


@pytest.mark.parametrize("share, step", [(0.0, 3), (0.32, 3), (0.34, 2), (0.99, 1), (1.0, 1)])
def test_a_share_of_the_schedule_is_a_step(share, step):
    asked = []
    store = types.SimpleNamespace(read=lambda key, step, device: asked.append((step, device)) or torch.ones(1, dtype=torch.float16))
    held = FeatureBank(trajectory(), (KEY,), "ram", store, None)
    assert features_at(held, KEY, share).dtype == torch.float32 and asked == [(step, CPU)]


@pytest.mark.parametrize("size, scale", [(5, 1), (12, 1), (23, 1), (24, 2), (35, 2), (36, 3)])
def test_pictures_of_features_are_enlarged_by_whole_numbers(size, scale):
    place = FeatureKey("residual", "output", 7)
    store = types.SimpleNamespace(read=lambda key, step, device: random(2, 5, 8, 12))
    held = FeatureBank(trajectory(batch=2), (place,), "ram", store, unet())
    found = feature_pca(held, None, "7", 0.5, size)
    assert found.shape == (2, 8 * scale, 12 * scale, 3)
    assert torch.equal(found, found[:, ::scale, ::scale].repeat_interleave(scale, 1).repeat_interleave(scale, 2))


def test_pinned_features_are_given_back_with_their_store_but_not_at_the_end(monkeypatch):
    """When Python ends, the memory goes anyway, and the device may be gone before it."""
    import gc
    import weakref

    given_back = []
    monkeypatch.setattr(comfy.model_management, "pin_memory", lambda buffer: True)
    monkeypatch.setattr(comfy.model_management, "unpin_memory", lambda buffer: given_back.append(buffer.numel()))
    store = MemoryStore({KEY: (1, 3, 5)}, 2, torch.float32, CPU)
    (last,) = [finalizer for finalizer in weakref.finalize._registry if finalizer.peek() and finalizer.peek()[0] is store]
    assert last.atexit is False and not given_back
    del store
    gc.collect()
    assert given_back == [128]


def test_a_failing_capture_is_told_and_leaves_nothing(monkeypatch):
    model = unet()
    thrown = []
    from pastiche.nodes.host.networks.fingerprint import fingerprint

    own = trajectory()
    own = Trajectory(own.sigmas, own.latents, tiny_cond(model), "next", fingerprint(model))
    monkeypatch.setattr(capturing, "discard", lambda writer: thrown.append(writer))
    for error, kind in ((OSError(28, "No space left"), ValueError), (RuntimeError("stopped"), RuntimeError)):
        monkeypatch.setattr(capturing, "record", lambda *args, error=error: (_ for _ in ()).throw(error))
        with pytest.raises(kind, match="^memory: the disk took no more features .No space left" if kind is ValueError else "stopped"):
            capture(model, own, "self_attention", "7", "ram")
    assert len(thrown) == 2
