"""Pictures: where they can be drawn, and files that are whole."""

from __future__ import annotations

import sys
from pathlib import Path
from unittest import mock

import pytest

from edgemoe.figures import can_plot, new_figure, save_figure


def test_without_matplotlib_nothing_can_be_plotted() -> None:
    with mock.patch.dict(sys.modules, {"matplotlib": None}):
        assert not can_plot()


@pytest.mark.skipif(not can_plot(), reason="needs matplotlib")
def test_a_picture_that_cannot_be_finished_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "cost.png"
    figure = new_figure(2, 1)
    save_figure(figure, path)
    before = path.read_bytes()
    assert before.startswith(b"\x89PNG")

    def half(file: object, **_: object) -> None:
        file.write(b"half")  # type: ignore[attr-defined]
        raise KeyboardInterrupt

    with mock.patch.object(figure, "savefig", half), pytest.raises(KeyboardInterrupt):
        save_figure(figure, path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
