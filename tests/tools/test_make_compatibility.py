import importlib.util


def load(repository):
    spec = importlib.util.spec_from_file_location("make_compatibility", repository / "tools" / "make_compatibility.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


CASE = '<testcase name="{name}"><properties><property name="pair" value=\'["{ours}", "{theirs}", "{verdict}"]\'/></properties>{end}</testcase>'


def test_only_what_passed_is_claimed(repository, tmp_path):
    tool = load(repository)
    cases = [
        ("a", "Ours", "Other*", "works", ""), ("b", "Ours", "Other*", "works", ""), ("c", "Ours", "Bad", "works", ""),
        ("d", "Ours", "Bad", "works", "<failure/>"), ("e", "Second", "Bad", "refused", ""), ("f", "Second", "Skipped", "works", "<skipped/>"),
    ]
    body = "".join(CASE.format(name=name, ours=ours, theirs=theirs, verdict=verdict, end=end) for name, ours, theirs, verdict, end in cases)
    results = tmp_path / "results.xml"
    results.write_text(f"<testsuites><testsuite>{body}<testcase name='no pair'/></testsuite></testsuites>")
    pairs = tool.read_pairs(results)
    assert pairs == {("Ours", "Other*"): "works", ("Ours", "Bad"): "fails", ("Second", "Bad"): "refused", ("Second", "Skipped"): "fails"}
    rows = [line for line in tool.as_page(pairs, "0").splitlines() if line.startswith("|")]
    assert rows == ["|  | Ours | Second |", "| --- | --- | --- |", "| Bad | fails | refused |", "| Other\\* | works |  |", "| Skipped |  | fails |"]


def test_the_page_is_a_page_of_the_tool(repository):
    page = (repository / "docs" / "compatibility.md").read_text(encoding="utf-8")
    assert page.startswith("# Which nodes go together") and "| works |" in page and "fails" not in page
    assert page.endswith(load(repository).BY_HAND.read_text(encoding="utf-8"))


def test_several_result_files_are_one(repository, tmp_path):
    tool = load(repository)
    for name, verdict, end in (("a", "works", ""), ("b", "works", "<failure/>")):
        case = CASE.format(name=name, ours="Ours", theirs="Other", verdict=verdict, end=end)
        (tmp_path / f"{name}.xml").write_text(f"<testsuites><testsuite>{case}</testsuite></testsuites>")
    paths = [tmp_path / "a.xml", tmp_path / "b.xml"]
    assert tool.read_pairs(paths[0]) == {("Ours", "Other"): "works"} and tool.read_pairs(*paths) == {("Ours", "Other"): "fails"}


def test_pairs_of_the_page_are_noted_by_tests(repository):
    """Nothing is claimed of a node that no test names."""
    page = (repository / "docs" / "compatibility.md").read_text(encoding="utf-8").split("## Run by hand")[0]
    rows = [[cell.strip().replace("\\*", "*") for cell in line.strip("|").split("|")] for line in page.splitlines() if line.startswith("| ")]
    sources = "".join(path.read_text(encoding="utf-8") for folder in ("neighbours", "support") for path in (repository / "tests" / folder).glob("*.py"))
    assert len(rows) > 10 and all(f'"{name}' in sources for name in [*rows[0][1:], *(row[0] for row in rows[2:])])
