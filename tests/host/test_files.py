"""Files are whole or not there, and nothing of a killed process stays."""

import os
import subprocess
import sys
import time

import folder_paths
import pytest
from pastiche.nodes.host import files
from pastiche.nodes.host.files import PartialFile, atomic_write, register_models_folder

posix_only = pytest.mark.skipif(os.name == "nt", reason="POSIX locks")


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_the_file_appears_whole(tmp_path):
    target = tmp_path / "state.safetensors"
    target.write_bytes(b"old")
    with atomic_write(target) as partial:
        partial.write_bytes(b"new")
        assert target.read_bytes() == b"old" and partial.parent == tmp_path
    assert target.read_bytes() == b"new" and names(tmp_path) == [target.name]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_nothing_is_left_of_a_write_that_failed(tmp_path, error):
    target = tmp_path / "state.safetensors"
    target.write_bytes(b"old")
    with pytest.raises(error), atomic_write(target) as partial:
        partial.write_bytes(b"half")
        raise error()
    assert target.read_bytes() == b"old" and names(tmp_path) == [target.name]


def test_nothing_is_left_of_a_rename_that_failed(tmp_path):
    target = tmp_path / "taken"
    target.mkdir()
    (target / "file").touch()
    with pytest.raises(OSError), atomic_write(target) as partial:
        partial.write_bytes(b"new")
    assert names(tmp_path) == ["taken"]


def test_bytes_reach_the_disk_before_the_name(tmp_path, monkeypatch):
    order = []
    real_sync, real_replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: (order.append("sync"), real_sync(descriptor)))
    monkeypatch.setattr(os, "replace", lambda a, b: (order.append("rename"), real_replace(a, b)))
    with atomic_write(tmp_path / "a") as partial:
        partial.write_bytes(b"x")
    assert order[:2] == ["sync", "rename"]
    order.clear()
    with atomic_write(tmp_path / "b", durable=False) as partial:
        partial.write_bytes(b"x")
    assert order == ["rename"]


def test_two_processes_of_one_number_do_not_share_a_name(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "getpid", lambda: 7)
    with atomic_write(tmp_path / "a") as first, atomic_write(tmp_path / "a") as second:
        assert first != second
        first.write_bytes(b"first")
        second.write_bytes(b"second")
    assert (tmp_path / "a").read_bytes() == b"first"


def test_a_name_of_full_length_can_be_written(tmp_path):
    target = tmp_path / ("n" * 255)
    with atomic_write(target) as partial:
        partial.write_bytes(b"x")
    assert names(tmp_path) == [target.name]


def test_a_trial_leaves_everything_as_it_is(tmp_path):
    target = tmp_path / "new folder" / "a"
    with atomic_write(target, replace=False) as partial:
        partial.write_bytes(b"x")
    assert names(target.parent) == []
    with pytest.raises(OSError), atomic_write(tmp_path / ("n" * 256), replace=False):
        raise AssertionError("a name that is too long is known before anything is written")
    assert names(tmp_path) == ["new folder"]


def age(path, seconds):
    then = time.time() - seconds
    os.utime(path, (then, then))


@posix_only
def test_what_a_killed_process_left_goes_with_the_next_file(tmp_path):
    script = (
        "import os, sys, fcntl\n"
        "file = open(sys.argv[1], 'wb'); fcntl.flock(file, fcntl.LOCK_EX); print('open', flush=True)\n"
        "sys.stdin.read()\n"
    )
    left = tmp_path / f"{files.PREFIX}1-00{files.SUFFIX}"
    process = subprocess.Popen([sys.executable, "-S", "-c", script, str(left)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        process.stdout.readline()
        age(left, 3600)
        PartialFile(tmp_path / "a").discard()
        assert left.exists()  # its process lives
    finally:
        process.kill()
        process.communicate()
    PartialFile(tmp_path / "a").discard()
    assert names(tmp_path) == []


@posix_only
def test_only_old_partial_files_of_ours_are_removed(tmp_path):
    young, day_old = tmp_path / f"{files.PREFIX}1-00{files.SUFFIX}", tmp_path / f"{files.PREFIX}2-00{files.SUFFIX}"
    others = tmp_path / "theirs.partial"
    for path in (young, day_old, others):
        path.touch()
    age(others, 10 * files.STALE_AFTER)
    own = PartialFile(tmp_path / "a")
    age(own.path, 3600)
    held = open(day_old)
    files._lock(held.fileno())
    age(day_old, files.STALE_AFTER + 60)
    PartialFile(tmp_path / "b").discard()
    held.close()
    assert names(tmp_path) == sorted([young.name, own.path.name, others.name])
    own.discard()


def test_a_registered_folder_lists_its_extensions_only(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", dict(folder_paths.folder_names_and_paths))
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    for name in ("a.pt", "b.safetensors", "c.txt"):
        (tmp_path / name).touch()
    register_models_folder("pastiche_test", {".pt", ".safetensors"}, tmp_path)
    assert folder_paths.get_filename_list("pastiche_test") == ["a.pt", "b.safetensors"]
    register_models_folder("pastiche_default", {".pt"})
    assert folder_paths.get_folder_paths("pastiche_default") == [os.path.join(folder_paths.models_dir, "pastiche_default")]


@pytest.mark.parametrize("content, message", [
    (b"\n <!DOCTYPE html><html>", "x.pt is a web page, not a model"), (b"\xef\xbb\xbf<HTML>", "is a web page"), (b"<?xml version='1.0'?>", "is a web page"),
    (b"version https://git-lfs.github.com/spec/v1\n", "is a note of Git LFS"),
])
def test_a_page_in_a_models_place_is_told(tmp_path, content, message):
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        files.refuse_web_page(tmp_path / "x.pt")


def test_what_is_no_page_passes(tmp_path):
    for content in (b"", b"PK\x03\x04", (60).to_bytes(8, "little") + b'{"a":{}}', b"<\0\0\0\0\0\0\0{}"):
        (tmp_path / "x").write_bytes(content)
        files.refuse_web_page(tmp_path / "x")
    files.refuse_web_page(tmp_path / "missing")
    files.refuse_web_page("nul\0")


@posix_only
def test_the_server_removes_what_was_left_when_it_starts(tmp_path, monkeypatch):
    import asyncio

    from pastiche.nodes.extension import PasticheExtension

    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(tmp_path))
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", dict(folder_paths.folder_names_and_paths))
    left, others = [], []
    for folder in ("pastiche_features", "loras"):
        (tmp_path / folder).mkdir()
        left.append(tmp_path / folder / f"{files.PREFIX}1-00{files.SUFFIX}")
        others.append(tmp_path / folder / "style.safetensors")
    for path in (*left, *others):
        path.touch()
        age(path, files.STALE_AFTER + 60)
    asyncio.run(PasticheExtension().on_load())
    assert not any(path.exists() for path in left) and all(path.exists() for path in others)
