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


@pytest.mark.parametrize("text", ["0-999999999", "999999999", "output 6-11, input 0-1000", "1000-6"])
def test_endless_ranges_are_refused_while_reading(text):
    """Counting 0-999999999 out would take minutes and gigabytes before any model could say no."""
    with pytest.raises(ValueError, match="goes beyond 999; write for example"):
        parse_layers(text)
    assert parse_layers("999") == [("output", 999)]
