"""Layer settings as text: "6-11", "middle, output 6-11", "input 1-2, 4"."""

from __future__ import annotations

import re

LARGEST = 999  # no network has as many blocks; a range is counted out, so it must not be endless
_ITEM = re.compile(r"^(?:(input|middle|output)\b)?\s*(?:(\d{1,12})(?:\s*-\s*(\d{1,12}))?)?$")


def parse_layers(text: str) -> list[tuple[str, int]]:
    """Reads comma-separated blocks and ranges into [(block, number)], in the order given, without repeats.

    A bare number belongs to the block named before it, at the start to `output`. "middle" is ("middle", 0).
    Raises ValueError naming the part that cannot be read.
    """
    found: dict[tuple[str, int], None] = {}
    block = "output"
    for item in text.split(","):
        match = _ITEM.match(item.strip().lower())
        if match is None or not item.strip():
            raise ValueError(f'layers: cannot read "{item.strip()[:40]}"; write for example "6-11" or "middle, output 6-11".')
        block = match[1] or block
        if block == "middle":
            if match[2] not in (None, "0"):
                raise ValueError(f'layers: there is one middle block, got "{item.strip()}".')
            found["middle", 0] = None
            continue
        if match[2] is None:
            raise ValueError(f'layers: "{item.strip()}" needs a number, for example "{block} 6-11".')
        first, last = int(match[2]), int(match[3] or match[2])
        if max(first, last) > LARGEST:
            raise ValueError(f'layers: "{item.strip()}" goes beyond {LARGEST}; write for example "{block} 6-11".')
        if last < first:
            raise ValueError(f'layers: the range "{item.strip()}" runs backwards; write "{last}-{first}".')
        found.update({(block, number): None for number in range(first, last + 1)})
    return list(found)


def format_numbers(numbers: list[int]) -> str:
    """[0, 1, 2, 5] -> "0-2, 5"."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)
