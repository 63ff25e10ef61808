"""What a registry install gets: complete without what .comfyignore leaves out, and without placeholders."""

import re
import subprocess
import tomllib
from pathlib import Path
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def shipped() -> set[str]:
    def listed(*more):
        done = subprocess.run(["git", "-c", "core.quotePath=false", "ls-files", "-c", *more], cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            pytest.skip("no git checkout")
        return set(done.stdout.splitlines())

    return listed() - listed("-i", "--exclude-from=.comfyignore")


def test_everything_that_runs_is_shipped(shipped):
    for needed in ("__init__.py", "node_list.json", "nodes/extension.py", "js/sample_picture.js", "js/samples/coffee.jpg",
                   "assets/samples/content_coffee.jpg", "assets/samples/mask_coffee.png", "assets/samples/LICENSES.md",
                   "locales/zh/nodeDefs.json", "workflows/api/pastiche_client.py", "workflows/api/quick_start_mini.json", "LICENSE"):
        assert needed in shipped, needed
    assert [name for name in shipped if name.startswith("subgraphs/")] and [name for name in shipped if name.endswith(".safetensors")]
    assert not [name for name in shipped if name.startswith(("tests/", "tools/", "benchmarks/"))]


def test_readme_says_which_commands_need_a_clone():
    """tools/ is not in a registry install."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    tried = text.partition("## Try it")[2].partition("\n## ")[0]
    before, clone, after = tried.partition("In a clone")
    assert clone and "python tools/" not in before and "python tools/demo.py" in after
    assert "python tools/" not in text.partition("## From a script")[2].partition("\n## ")[0]


def test_project_file_has_no_placeholder():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert not re.findall(r'= ""|TODO|example\.(?:com|org)|<[a-z ]+>|your', text, re.IGNORECASE)
    assert 'license = { file = "LICENSE" }' in text and "classifiers" in text


def test_what_a_publication_adds_is_all_there_or_not_at_all():
    """The repository's address, the publisher's id and the icon's address: none is made up before there is one."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    found = ["Repository" in project["project"].get("urls", {}), *(name in project["tool"]["comfy"] for name in ("PublisherId", "Icon"))]
    assert len(set(found)) == 1, found


def test_icon_is_as_the_registry_wants_it(shipped):
    """A square of at most 400 pixels, in the repository; its address, once there is one, leads to it."""
    icon = ElementTree.parse(ROOT / "assets" / "icon.svg").getroot()
    assert icon.get("width") == icon.get("height") and 64 <= int(icon.get("width")) <= 400
    assert "assets/icon.svg" in shipped
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    addresses = [project["tool"]["comfy"].get("Icon"), *project["project"].get("urls", {}).values()]
    assert all(address is None or re.match(r"https://[^ ]+$", address) for address in addresses)
    assert addresses[0] is None or addresses[0].endswith("/assets/icon.svg")


def test_every_help_page_has_a_picture():
    without = [page.name for page in (ROOT / "js" / "docs").glob("*.md") if not re.search(r"!\[[^\]]+\]\(pictures/", page.read_text(encoding="utf-8"))]
    assert without == []


def test_pictures_are_small_files():
    sizes = {path.name: path.stat().st_size for path in (ROOT / "js" / "docs" / "pictures").iterdir()}
    assert {name: size for name, size in sizes.items() if size > 120_000} == {}


def test_pictures_of_the_pages_are_there_and_shown():
    """Help pages and README name every picture, and each is in its place."""
    pages = [*(ROOT / "js" / "docs").glob("*.md"), ROOT / "README.md"]
    named = {(page.parent / link).resolve() for page in pages for link in re.findall(r"!\[[^\]]+\]\(([^)]+)\)", page.read_text(encoding="utf-8"))}
    assert named == set((ROOT / "js" / "docs" / "pictures").resolve().glob("*.jpg"))
