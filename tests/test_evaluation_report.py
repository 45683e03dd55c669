"""Tables, rows and the picture of an evaluation."""

from __future__ import annotations

import io
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from rich.console import Console
from rich.table import Table

from edgemoe.arms import ALL_TASKS, FULL, NEAREST, OWN, RANDOM, Arm
from edgemoe.evaluation import Result, summarise
from edgemoe.evaluation_report import FIELDS, row, save_plot, summary_row, summary_table, task_table
from edgemoe.expert_set import ExpertSet
from edgemoe.figures import can_plot
from edgemoe.perplexity import Figures


def result(task: str, name: str, keep: int, loss: float, how: str = "uniform", by: str = "peu", of: str = "") -> Result:
    n_set = 2 if name == RANDOM else 1
    sets = tuple(ExpertSet((0, 1), 8, 2, (tuple(range(keep)),) * 2) for _ in range(n_set))
    ones = np.full(2, float(n_set))
    figures = Figures(ones * 10, ones * 10 * (2 + loss) + [0.5, -0.5], ones * 20, ones * 10 * loss, ones * 9)
    return Result(task, Arm(name, of, how, by, keep, sets), figures)


RESULTS = [
    result("maths", FULL, 8, 0.0, "", ""),
    *(
        result("maths", name, keep, loss / keep, how, by, of)
        for keep in (6, 4, 2)
        for name, loss, how, by, of in (
            (OWN, 0.9, "uniform", "peu", "maths"),
            (OWN, 0.1, "measured", "peu", "maths"),
            (NEAREST, 2.0, "measured", "peu", "law"),
            (ALL_TASKS, 3.0, "measured", "peu", ""),
            (RANDOM, 9.0, "measured", RANDOM, ""),
            (OWN, 0.2, "measured", "frequency", "maths"),
        )
    ),
]


def printed(table: Table) -> str:
    file = io.StringIO()
    Console(file=file, width=200).print(table)
    return file.getvalue()


def test_rows_are_plain_values() -> None:
    found = row(RESULTS[5])
    assert tuple(found) == FIELDS
    assert {key: found[key] for key in FIELDS[:12]} == {
        "task": "maths",
        "arm": RANDOM,
        "set_of": "",
        "allocation": "measured",
        "criterion": RANDOM,
        "keep": 6,
        "mean_kept": 6.0,
        "fewest_kept": 6,
        "most_kept": 6,
        "seeds": 2,
        "tokens": 20,
        "windows": 2,
    }
    assert found["loss"] == pytest.approx(1.5)
    assert found["perplexity"] == pytest.approx(np.exp(3.5))
    assert found["full_perplexity"] == pytest.approx(np.exp(2.0))
    assert found["top1_agreement"] == 0.9
    (summary,) = summarise([RESULTS[5]])
    assert summary_row(summary)["worst_perplexity_change"] == pytest.approx(np.expm1(1.5))


def test_summary_has_a_line_for_each_arm() -> None:
    lines = printed(summary_table(summarise(RESULTS))).splitlines()
    assert " ".join(lines[0].split()) == "keep set spread perplexity ± KL top-1 worst task"
    assert len([line for line in lines[1:] if line.strip()]) == len(RESULTS)
    assert len([line for line in lines if not line.strip()]) == 3  # between numbers of experts
    own = next(line for line in lines if " own " in line)
    assert " ".join(own.split()) == "6 own (peu) uniform +16.2 % 5.8 0.150 90.0% maths +16.2 %"


def test_tables_fit_a_terminal_of_80_columns() -> None:
    widest = [replace(one, task="javascript") for one in RESULTS]
    for table in (summary_table(summarise(widest)), task_table(widest)):
        assert Console(width=80).measure(table).maximum <= 80


def test_task_table_names_whose_set_it_is() -> None:
    text = printed(task_table(RESULTS))
    assert text.startswith("text of maths")
    assert "nearest task: law" in text
    assert "own: maths" not in text


@pytest.mark.skipif(not can_plot(), reason="needs matplotlib")
def test_plot_is_a_picture(tmp_path: Path) -> None:
    save_plot(summarise(RESULTS), 8, "a model: held-out text of 1 task", tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.skipif(not can_plot(), reason="needs matplotlib")
def test_plot_draws_own_sets_by_allocation_and_rivals_once(tmp_path: Path) -> None:
    from matplotlib.axes import Axes

    with mock.patch.object(Axes, "annotate", autospec=True) as annotate:
        save_plot(summarise(RESULTS), 8, "", tmp_path / "plot.png")
    names = {call.args[1] for call in annotate.call_args_list}
    assert names == {
        "own, uniform",
        "own, measured",
        "nearest task, measured",
        "all tasks, measured",
        "random, measured",
    }


def test_matplotlib_is_only_loaded_to_plot() -> None:
    program = "import sys, edgemoe.evaluation_report; print('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout == "False\n"
