"""The declared minimum version and the warning about older hosts."""

import logging
import re
import subprocess
import sys

import pytest

from pastiche.nodes.host.version import OLDEST_COMFYUI, warn_if_too_old


@pytest.mark.parametrize("running, old", [("0.19.5", True), ("0.3.75", True), ("0.20.0", False), ("0.20", False), ("0.20.0rc2", False), ("v0.31.0-rc1", False), ("1.0", False)])
def test_older_hosts_are_told(caplog, running, old):
    with caplog.at_level(logging.WARNING):
        assert warn_if_too_old(running) is old
    assert (running in caplog.text and OLDEST_COMFYUI in caplog.text) is old


def test_the_host_under_test_is_new_enough():
    assert not warn_if_too_old()


def test_versions_that_are_none(caplog):
    assert not warn_if_too_old("nightly") and not caplog.text


def test_pyproject_says_the_same(repository):
    declared = re.search(r'requires-comfyui = ">=([\d.]+)"', (repository / "pyproject.toml").read_text())
    assert declared[1] == OLDEST_COMFYUI


def test_old_hosts_are_told_before_the_import_fails(repository, tmp_path):
    """On a ComfyUI without comfy_api the pack cannot be imported; the sentence stands above the traceback."""
    (tmp_path / "comfyui_version.py").write_text('__version__ = "0.3.10"\n')
    (tmp_path / "pack").symlink_to(repository, target_is_directory=True)
    done = subprocess.run([sys.executable, "-c", "import pack"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    warning, error = done.stderr.index("this ComfyUI is 0.3.10, Pastiche is made for"), done.stderr.index("Error: No module named 'comfy")
    assert warning < error
