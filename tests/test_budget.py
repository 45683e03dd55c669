"""``--ram`` bounds the whole process: the kernel's own peak says so, for several budgets down to the floor."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from plain_llama import TINY_MOE

from edgemoe.memory_cgroup import CgroupUnavailableError, memory_cgroup

MIB = 1 << 20
PROMPT = "Explain in a few words how a river finds its way to the sea, and why the sea does not overflow. " * 4
EDGEMOE = [sys.executable, "-m", "edgemoe"]

# Runs the rest of its arguments and prints what VmHWM the finished child had, bytes (resource.getrusage is in KiB).
MEASURED = """
import resource, subprocess, sys
status = subprocess.run(sys.argv[1:]).returncode
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024, file=sys.stderr)
sys.exit(status)
"""


def floor_budget() -> int:
    command = [*EDGEMOE, "plan", str(TINY_MOE), "--ram", "1GiB", "--ctx", "512", "--json"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    floor: int = json.loads(done.stdout)["floor_budget"]
    return floor


def answer_within(budget: int, command: Sequence[str]) -> tuple[dict[str, Any], int]:
    """Run in a memory cgroup whose limit is the budget where one can be made; gives the answer and the peak, bytes."""
    try:
        with memory_cgroup(budget) as group:
            done = subprocess.run(group.command(command), capture_output=True, text=True, timeout=300)
            assert done.returncode == 0, done.stderr
            assert group.killed() == 0
            return json.loads(done.stdout), group.peak()
    except CgroupUnavailableError:
        command = [sys.executable, "-c", MEASURED, *command]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout), int(done.stderr.split()[-1])


@pytest.mark.parametrize("above_floor", [2, 5, 12, 25, 60])
def test_the_peak_stays_below_the_budget(above_floor: int) -> None:
    budget = floor_budget() + above_floor * MIB
    options = ["--ram", str(budget), "--ctx", "512", "--max-tokens", "100", "--temp", "0", "--threads", "1", "--json"]
    answer, peak = answer_within(budget, [*EDGEMOE, "run", str(TINY_MOE), *options, PROMPT])
    assert answer["text"]
    assert peak < budget


def test_vm_hwm_stays_below_the_budget_too() -> None:
    """RSS counts shared library pages that a cgroup may find charged to somebody else."""
    budget = floor_budget() + 2 * MIB
    options = ["--ram", str(budget), "--ctx", "512", "--max-tokens", "100", "--temp", "0", "--threads", "1", "--json"]
    command = [sys.executable, "-c", MEASURED, *EDGEMOE, "run", str(TINY_MOE), *options, PROMPT]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    assert int(done.stderr.split()[-1]) < budget


TALK = [
    f"Tom has {n} apples and buys {3 * n} more. How many apples does he have in the end, and how many does each of his"
    f" {n} friends get when he gives all of them away?"
    for n in range(2, 8)
]


def peak_at_the_floor(*arguments: object, text: str = "") -> tuple[int, int]:
    """The smallest budget that a verb takes, and 3 MiB, and the peak of a run with it; bytes."""
    command = [*EDGEMOE, *map(str, arguments), "--threads", "1", "--ram"]
    refused = subprocess.run([*command, "1MiB"], capture_output=True, text=True, input=text, timeout=300)
    found = re.search(r"give --ram (\d+)MiB", refused.stderr)
    assert found is not None, refused.stderr
    budget = (int(found[1]) + 3) * MIB
    measured = [sys.executable, "-c", MEASURED, *command, str(budget)]
    done = subprocess.run(measured, capture_output=True, text=True, input=text, timeout=300)
    assert done.returncode == 0, done.stderr
    return budget, int(done.stderr.split()[-1])


def test_profiling_and_matching_stay_below_the_budget_too(tmp_path: Path) -> None:
    """Compiling the kernels and measuring layers are all part of it."""
    (tmp_path / "maths.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TALK))
    store = ("--store", tmp_path / "tasks")
    profile = ("profile", TINY_MOE, tmp_path / "maths.jsonl", "--task", "maths", "--ctx", 128, *store)
    for verb, text in (
        (profile, ""),
        (("match", TINY_MOE, "-", *store), TALK[0]),
        (("chat", TINY_MOE, "--experts", "auto", "--ctx", 512, "--max-tokens", 8, *store), "\n".join(TALK[:2])),
    ):
        budget, peak = peak_at_the_floor(*verb, text=text)
        assert peak < budget, verb[0]


def test_a_thousand_tokens_at_the_floor_do_not_grow() -> None:
    program = """
import json, sys
from edgemoe import Llama
from edgemoe.errors import BudgetError
from edgemoe.memory import current_rss, peak_rss
options = {"n_ctx": 1100, "n_threads": 1}
try:
    Llama(sys.argv[1], ram=1, **options)
except BudgetError as error:
    floor = error.needed
with Llama(sys.argv[1], ram=floor + (2 << 20), **options) as llama:
    seen = []
    for number, token in enumerate(llama.generate(llama.tokenize(b"A river"), temp=0.8)):
        seen.append(current_rss())
        if number == 1000:
            break
    print(json.dumps({"budget": floor + (2 << 20), "early": seen[99], "late": seen[-1], "peak": peak_rss()}))
"""
    done = subprocess.run([sys.executable, "-c", program, str(TINY_MOE)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout)
    assert measured["late"] <= 1.1 * measured["early"]
    assert measured["peak"] < measured["budget"]


def test_the_demo_needs_less_than_plain_llama_cpp() -> None:
    """The README's first screen: `make demo` runs below what llama.cpp takes for the same model and context."""
    makefile = (Path(TINY_MOE).parent.parent / "Makefile").read_text()
    demo = next(line for line in makefile.splitlines() if line.startswith("DEMO_RAM := "))
    assert demo.endswith("MiB")
    program = """
import sys, llama_cpp
llama = llama_cpp.Llama(sys.argv[1], n_ctx=512, flash_attn=True, verbose=False)
llama.create_chat_completion([{"role": "user", "content": sys.argv[2]}], max_tokens=100)
"""
    plain = [sys.executable, "-c", program, str(TINY_MOE), PROMPT]
    done = subprocess.run([sys.executable, "-c", MEASURED, *plain], capture_output=True, text=True, check=True)
    assert int(demo.split()[-1].removesuffix("MiB")) * MIB < int(done.stderr.split()[-1])
