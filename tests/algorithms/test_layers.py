import pytest
from pastiche.nodes.algorithms.layers import format_numbers, parse_layers


@pytest.mark.parametrize(
    "text, expected",
    [
        ("6-8", [("output", 6), ("output", 7), ("output", 8)]),
        ("11", [("output", 11)]),
        ("middle, output 6-7", [("middle", 0), ("output", 6), ("output", 7)]),
        ("input 1-2, 4", [("input", 1), ("input", 2), ("input", 4)]),
        (" Output 3 , 3-4 ", [("output", 3), ("output", 4)]),
        ("middle", [("middle", 0)]),
    ],
)
def test_reads(text, expected):
    assert parse_layers(text) == expected


@pytest.mark.parametrize("text", ["", "a-b", "6-", "-6", "6,,7", "middle 3", "output", "7-6", "up 3", "6 7"])
def test_refuses_with_a_sentence(text):
    with pytest.raises(ValueError, match="layers: "):
        parse_layers(text)


def test_formats_ranges():
    assert format_numbers([5, 0, 1, 2, 8, 9]) == "0-2, 5, 8-9"
