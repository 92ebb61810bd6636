"""Text from files in messages: one line, of bounded length, without control characters."""

import pytest

from spallm_formats import FormatError, SpallmError, printable, shown, summary
from spallm_formats.text import MAX_MESSAGE

HOSTILE = "a\x1b[31m\x9b2J\x07\r\n\u202eb\u2028c\ud800"


def test_what_a_terminal_would_obey_is_escaped():
    assert printable(HOSTILE) == r"a\x1b[31m\x9b2J\x07\r\n\u202eb\u2028c\ud800"
    assert printable("a\n\tb\x1b", lines=True) == "a\n\tb\\x1b"
    assert (
        printable("größer 中文 \N{GRINNING FACE}\u00a0\u3000é")
        == "größer 中文 \N{GRINNING FACE}\u00a0\u3000é"
    )


@pytest.mark.parametrize("kind", [SpallmError, FormatError])
def test_errors_are_one_line_of_bounded_length(kind):
    error = str(kind(f"found {HOSTILE}\nand more\n"))
    assert error.isprintable()
    long = str(kind("found " + "x" * 100_000 + "; run spallm-convert"))
    assert len(long) <= MAX_MESSAGE + 10
    assert long.startswith("found xx")
    assert long.endswith("x; run spallm-convert")


def test_an_error_names_three_problems_and_counts_the_others():
    error = FormatError([f"problem {i}\nof many" for i in range(1000)])
    assert str(error) == "problem 0 of many; problem 1 of many; problem 2 of many; and 997 more"
    assert len(error.problems) == 1000
    assert str(FormatError(["one", "two"])) == "one; two"
    assert summary(["a", "b", "c"], ", ") == "a, b, c"


@pytest.mark.parametrize(
    "value",
    ["x" * 10**6, list(range(10**6)), dict.fromkeys(range(1000), "\x1b"), 10**5000, b"\x1b" * 999],
    ids=type,
)
def test_values_are_shown_short(value):
    assert len(shown(value)) < 600
    assert shown(value).isprintable()


def test_a_value_that_refers_to_itself_deeply_is_shown():
    value = []
    for _ in range(100_000):
        value = [value]
    assert len(shown(value)) < 200
    while value:  # free it without recursion
        value = value.pop()
