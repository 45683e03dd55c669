"""k/M is read, written and refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgemoe.errors import BudgetError
from edgemoe.keep import Keep


@given(m=st.integers(1, 99999), k=st.none() | st.integers(1, 99999))
def test_round_trip(m: int, k: int | None) -> None:
    if k is not None:
        k, m = min(k, m), max(k, m)
    assert Keep.parse(str(Keep(k, m))) == Keep(k, m)


@pytest.mark.parametrize(
    ("text", "keep"),
    [("8/64", Keep(8, 64)), ("64", Keep(None, 64)), (" 8 / 64 ", Keep(8, 64)), ("8/8", Keep(8, 8))],
)
def test_what_people_write(text: str, keep: Keep) -> None:
    assert Keep.parse(text) == keep


@pytest.mark.parametrize(
    "text", ["", "/", "8/", "/64", "8/64/2", "-8/64", "8.5", "8:64", "all", "50%", "٨/64", "8 64", "9" * 6, "x" * 9999]
)
def test_nonsense_gets_a_sentence_with_an_example(text: str) -> None:
    with pytest.raises(BudgetError, match=r"is no number of experts to keep; write 8/64 for 8 active of 64") as caught:
        Keep.parse(text)
    assert len(str(caught.value)) < 250


def test_contradictions() -> None:
    with pytest.raises(BudgetError, match=r"^64/8 activates more experts than it keeps; write 8/64"):
        Keep.parse("64/8")
    for text in ("0", "0/64", "0/0"):
        with pytest.raises(BudgetError, match=rf"^{text} keeps or activates no expert at all; write 8/64"):
            Keep.parse(text)
