"""tools/try_hosts.py: what a run's results say of each set, and the page."""

import importlib.util

import pytest


@pytest.fixture(scope="module")
def tool(repository):
    spec = importlib.util.spec_from_file_location("try_hosts", repository / "tools" / "try_hosts.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write(path, cases):
    body = "".join(f'<testcase file="{file}" name="{name}">{end}</testcase>' for file, name, end in cases)
    path.write_text(f"<testsuites><testsuite>{body}</testsuite></testsuites>")
    return path


def test_a_set_works_only_where_all_of_it_ran_and_passed(tool, tmp_path):
    found = tool.outcome(write(tmp_path / "0.1.xml", [
        ("host/test_latent_adain.py", "test_one", ""), ("host/test_latent_adain.py", "test_two[a-b]", ""),
        ("neighbours/test_neighbours_matrix.py", "test_ours_and_theirs[pag-style]", ""),
        ("neighbours/test_neighbours_matrix.py", "test_ours_and_theirs[lora-style]", "<failure/>"),
        ("nodes/test_mini_node.py", "test_schema", "<skipped/>"),
        ("neighbours/test_neighbours_matrix.py", "test_ours_and_theirs[tome-h-space]", ""),
    ]))
    assert found["Latent AdaIN"] == "works" and found["Capture Features, Style Injection"] == "fails (1 of 2)"
    assert found["Load Mini Model"] == "fails (1 of 1)" and found["h-space Slerp"] == found["import, schemas"] == "not run"


def test_a_run_that_could_not_begin_is_no_success(tool, tmp_path):
    found = tool.outcome(write(tmp_path / "0.1.xml", []))
    assert set(found.values()) == {"not run"}


def test_versions_stand_in_their_order(tool):
    row = dict.fromkeys(tool.SETS, "works")
    lines = [line for line in tool.as_page({"0.30.0": row, "0.4.0": row, "0.20.1": row}, "0.20.0", "0.30.0").splitlines() if line.startswith("| 0.")]
    assert [line.split(" | ")[0] for line in lines] == ["| 0.4.0", "| 0.20.1", "| 0.30.0"]


def test_folders_that_are_no_comfyui(tool, tmp_path):
    with pytest.raises(ValueError, match="no folder of a ComfyUI that says its version"):
        tool.version_of(tmp_path)


def test_every_test_that_it_names_exists(tool, repository):
    for tests in tool.SETS.values():
        for test in tests:
            path, _, name = test.partition("::")
            assert not name or f"def {name.split('[')[0]}(" in (repository / path).read_text()


def test_the_page_claims_no_failure_on_a_supported_version(tool, repository):
    page = (repository / "docs" / "hosts.md").read_text(encoding="utf-8")
    oldest = [int(part) for part in tool.stated("nodes/host/version.py", "OLDEST_COMFYUI").split(".")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line.startswith("| 0.")]
    supported = [row for row in rows if [int(part) for part in row[0].split(".")] >= oldest]
    assert len(supported) > 1 and all(cell == "works" for row in supported for cell in row[1:])
    assert supported[0][0] == ".".join(map(str, oldest)), "the oldest supported version is one that was run"
