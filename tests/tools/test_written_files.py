"""tools/host/files.py: files are there whole or not at all."""

import pytest
from host.files import atomic_write


def test_the_file_is_there_after_the_block_and_its_folder_is_made(tmp_path):
    target = tmp_path / "new" / "folder" / "notes.json"
    with atomic_write(target) as partial:
        partial.write_text("whole")
        assert partial.parent == target.parent and not target.exists()
    assert target.read_text() == "whole" and list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_leaves_the_earlier_file_and_nothing_else(tmp_path, error):
    target = tmp_path / "notes.json"
    target.write_text("earlier")
    with pytest.raises(error), atomic_write(target) as partial:
        partial.write_text("hal")
        raise error
    assert target.read_text() == "earlier" and list(tmp_path.iterdir()) == [target]


def test_a_block_that_writes_nothing_says_so(tmp_path):
    with pytest.raises(FileNotFoundError), atomic_write(tmp_path / "notes.json"):
        pass
    assert not list(tmp_path.iterdir())


def test_files_of_one_stem_do_not_meet(tmp_path):
    with atomic_write(tmp_path / "notes.json") as one, atomic_write(tmp_path / "notes.md") as other:
        one.write_text("json")
        other.write_text("md")
    assert (tmp_path / "notes.json").read_text() == "json" and (tmp_path / "notes.md").read_text() == "md"
