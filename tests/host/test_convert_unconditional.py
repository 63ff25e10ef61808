"""tools/convert_unconditional.py: what it writes is read back as the same network."""

import importlib.util

import pytest
import torch
from safetensors import safe_open

from support.published_unets import PLANS, draw


@pytest.fixture
def tool(repository):
    spec = importlib.util.spec_from_file_location("convert_unconditional", repository / "tools" / "convert_unconditional.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_moving_average_is_written_with_notes(tool, tmp_path, capsys):
    old, new = draw(PLANS["iddpm"], 1), draw(PLANS["iddpm"], 2)
    torch.save({"model": old, "ema": {f"module.{key}": value for key, value in new.items()}}, tmp_path / "net.pt")
    target = tmp_path / "made" / "net.safetensors"
    assert tool.main([str(tmp_path / "net.pt"), str(target), "--heads", "2", "--betas", "cosine", "--timesteps", "4000"]) == 0
    with safe_open(str(target), framework="pt") as file:
        assert file.metadata() == {"pastiche.heads": "2", "pastiche.betas": "cosine", "pastiche.timesteps": "4000"}
        assert set(file.keys()) == set(new) and all(torch.equal(file.get_tensor(key), new[key]) for key in new)
    assert "iDDPM layout" in (told := capsys.readouterr().out) and "moving average" in told
    assert [path.name for path in target.parent.iterdir()] == ["net.safetensors"]
    again = tmp_path / "again.safetensors"
    assert tool.main([str(target), str(again)]) == 0
    with safe_open(str(again), framework="pt") as file:
        assert file.metadata()["pastiche.heads"] == "2"


def test_what_is_no_such_model_writes_nothing(tool, tmp_path, capsys):
    state = dict(draw(PLANS["p2"]))
    state.pop("out.2.bias")
    torch.save(state, tmp_path / "net.pt")
    for target in ("net.safetensors", "net.bin"):
        assert tool.main([str(tmp_path / "net.pt"), str(tmp_path / target)]) == 1
    assert "lacks out.2.bias" in (told := capsys.readouterr().err) and "net.bin should end" in told
    assert tool.main([str(tmp_path / "missing.pt"), str(tmp_path / "net.safetensors")]) == 1
    torch.save({**draw(PLANS["p2"]), "out.0.bias": torch.zeros(7)}, tmp_path / "net.pt")
    assert tool.main([str(tmp_path / "net.pt"), str(tmp_path / "net.safetensors")]) == 1
    assert "norm_out.bias is (7,), expected (32,)" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["net.pt"]
