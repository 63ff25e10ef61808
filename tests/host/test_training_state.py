"""The training state of Train Style LoRA: what a resumed training continues, and what happens when files go wrong."""

import functools
import json
import logging
import shutil

import pytest
import safetensors.torch
import torch
from support.models import tiny_cond, tiny_unet
from support.training import same

from pastiche.nodes.host.training import loop
from pastiche.nodes.host.training import state as training_state
from pastiche.nodes.host.training.job import train_for_node
from pastiche.nodes.host.training.loop import TrainingSettings
from pastiche.nodes.host.training.progress import TimeLeft


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr("folder_paths.get_output_directory", lambda: str(tmp_path))
    return tmp_path / "loras"


@pytest.fixture(scope="module")
def model():
    return tiny_unet()


@pytest.fixture
def train(model, folder):
    latents = {"samples": torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))}
    cond = tiny_cond(model)

    def run(steps, name="style", **settings):
        settings = TrainingSettings(**{"steps": steps, "rank": 2, "learning_rate": 1e-2, **settings})
        return train_for_node(model, cond, latents, None, None, settings, name)

    return run


def test_resume_counts_only_the_steps_that_fp16_took(train, monkeypatch):
    """Steps whose gradients overflow are left out: neither Adam's bias correction nor the loss scale may forget it."""
    plain = loop._TrainingLoop._losses

    def losses(self, *args):
        return plain(self, *args) * (1e30 if self._state.step < 2 else 1)

    scaler = functools.partial(torch.amp.GradScaler, init_scale=128.0, growth_interval=3)
    monkeypatch.setattr(loop._TrainingLoop, "_losses", losses)
    monkeypatch.setattr(torch.amp, "GradScaler", scaler)
    whole = train(8, "", precision="fp16")
    train(4, precision="fp16")
    state = training_state.TrainingState(training_state.state_path("style"))
    assert (state.step, state.updates) == (4, 2) and state._scaler["scale"] == 32.0
    resumed = train(8, precision="fp16")
    assert resumed.losses == whole.losses and same(resumed.lora, whole.lora)


def test_a_cosine_goes_on_only_over_the_same_number_of_steps(train, monkeypatch):
    monkeypatch.setattr(training_state, "SAVE_EVERY", 1)
    settings = {"schedule": "cosine", "clean_weight": 0.1, "validation_every": 2}
    whole = train(6, "", **settings)
    with monkeypatch.context() as patch:  # stops as a crash does: the last file is that of step 2
        patch.setattr("pastiche.nodes.host.training.progress.NodeProgress.update", lambda self, step, *rest: 1 / (step < 3))
        with pytest.raises(ZeroDivisionError):
            train(6, **settings)
    with pytest.raises(ValueError, match="its schedule is cosine over 6 steps, this one's is cosine over 7 steps"):
        train(7, **settings)
    with pytest.raises(ValueError, match="its schedule is cosine over 6 steps, this one's is constant"):
        train(6, clean_weight=0.1)
    with pytest.raises(ValueError, match="its clean_weight is 0.1, this one's is 0.0"):
        train(6, schedule="cosine")
    resumed = train(6, **settings)
    assert same(resumed.lora, whole.lora) and resumed.losses == whole.losses and resumed.validation == whole.validation


def test_a_state_without_the_newer_settings_has_their_defaults(train, folder):
    train(2)
    with safetensors.safe_open(str(folder / "style.training.safetensors"), framework="pt") as file:
        assert not {"schedule", "clean_weight"} & set(json.loads(file.metadata()["identity"]))  # as earlier versions wrote it
    with pytest.raises(ValueError, match="its clean_weight is 0.0, this one's is 0.1"):
        train(3, clean_weight=0.1)
    assert train(3).steps == 3


def test_a_finished_training_is_handed_on_and_said_to_be(train):
    done = train(3)
    again = train(3)
    assert same(done.lora, again.lora) and "checkpoint has all 3 steps" in again.summary()
    with pytest.raises(ValueError, match="steps: got 2, but the checkpoint has done 3 already"):
        train(2)


def test_layers_without_gradient_are_kept_too(train, model, caplog):
    """Linear layers that take no part (targets all) have no moments; saving and resuming passes them by."""
    network = model.model.diffusion_model
    network.spare = torch.nn.Linear(4, 4)
    try:
        with caplog.at_level(logging.INFO):
            whole = train(3, "", targets="all")
        assert caplog.text.count("take no part and learn nothing: spare.") == 1
        train(1, targets="all")
        assert same(train(3, targets="all").lora, whole.lora)
    finally:
        del network.spare


def rewrite(path, change):
    """Changes a state file: `change(tensors, progress)`."""
    with safetensors.safe_open(str(path), framework="pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}
    progress = json.loads(metadata["progress"])
    change(tensors, progress)
    safetensors.torch.save_file(tensors, str(path), {**metadata, "progress": json.dumps(progress)})


def test_states_that_hold_nan_or_miss_parts_are_refused(train, folder):
    train(2)
    path = folder / "style.training.safetensors"
    whole = path.read_bytes()

    def refused(change, match):
        path.write_bytes(whole)
        rewrite(path, change)
        with pytest.raises(ValueError, match=match):
            train(4)

    refused(lambda tensors, progress: next(iter(tensors.values())).fill_(float("nan")), "holds NaN or infinite values")
    refused(lambda tensors, progress: tensors["exp_avg_sq.0"].fill_(float("inf")), "holds NaN or infinite values")
    refused(lambda tensors, progress: tensors.pop(next(key for key in tensors if "lora_up" in key)), "no training state")
    refused(lambda tensors, progress: tensors.update({"exp_avg.0": torch.zeros(7)}), "no training state")
    refused(lambda tensors, progress: progress.update(losses=[1.0]), "no training state")
    refused(lambda tensors, progress: progress.update(step=None), "no training state")
    refused(lambda tensors, progress: progress.update(step=10**400), "no training state")
    refused(lambda tensors, progress: progress.update(losses=[float("nan"), 1.0]), "losses or its scale are no numbers")
    refused(lambda tensors, progress: progress.update(scaler={"scale": "x"}), "no training state")
    refused(lambda tensors, progress: progress.update(scaler=functools.reduce(lambda inner, _: [inner], range(900), [])), "no training state")
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="no training state"):
        train(4)


@pytest.mark.parametrize("name", ["a/b", "..", ".hidden", "nul\0", "\ud800", "c:x"])
def test_names_that_are_none(train, name):
    with pytest.raises(ValueError, match="checkpoint: got .* give a plain name"):
        train(1, name)


def test_a_file_that_cannot_be_written_is_refused_before_the_first_step(train, folder, monkeypatch):
    monkeypatch.setattr("pastiche.nodes.host.training.loop._TrainingLoop._step", lambda *args: pytest.fail("a step was taken"))
    with pytest.raises(ValueError, match="cannot be written .*File name too long"):
        train(3, "x" * 300)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 0))
    with pytest.raises(ValueError, match="checkpoint: needs . MB in .* which has 0 MB left"):
        train(3)
    folder.rmdir()
    folder.write_bytes(b"a file where the folder should be")
    with pytest.raises(ValueError, match="cannot be written"):
        train(3)


def test_a_failing_save_costs_the_file_not_the_training(train, folder, monkeypatch, caplog):
    plain, calls = safetensors.torch.save_file, []

    def full(tensors, path, metadata):
        calls.append(path)
        plain(tensors, path, metadata)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(training_state, "SAVE_EVERY", 1)
    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with caplog.at_level(logging.WARNING):
        trained = train(3)
    assert trained.steps == 3 and trained.trouble == "" and "after step 2" in caplog.text
    assert [path.name for path in folder.iterdir()] == ["style.training.safetensors"]
    calls[:] = [0, 0]
    monkeypatch.setattr(safetensors.torch, "save_file", lambda *args: (_ for _ in ()).throw(OSError(28, "No space left")))
    trained = train(5)
    assert trained.steps == 5 and "could not be written after step 5" in trained.summary()
    assert training_state.TrainingState(training_state.state_path("style")).step == 3  # the last whole file


def test_time_left():
    now = [100.0]
    clock = TimeLeft(10, 0, lambda: now[0])
    assert clock.text(1) == "timing"  # the first step warms up
    now[0] += 60
    assert clock.text(3) == "3:30 left"
    now[0] += 60 * 60
    assert clock.text(4) == "2:02:00 left"
    assert clock.text(10) == "done"


def test_progress_says_what_is_left(train, monkeypatch):
    said = []
    monkeypatch.setattr("pastiche.nodes.host.training.progress.NodeProgress.update", lambda self, step, text, latent=None: said.append(text))
    losses = train(3, "").losses
    assert said[1].startswith(f"step 2/3, loss {sum(losses[:2]) / 2:.4f} (mean of 2), ") and said[1].endswith(" left")
