"""tools/pictures.py and tools/canvases.py against the files."""

import canvases
import pictures
from support.live import ROOT


def test_every_sheet_and_canvas_is_a_picture_of_the_pages():
    """So that making all of them anew leaves no file that no page shows (test_release.py looks at the pages)."""
    there = {path.stem for path in (ROOT / "js" / "docs" / "pictures").glob("*.jpg")}
    assert {*pictures.SHEETS, *canvases.CANVASES} - there == set()
