"""What edgemoe has llama.cpp's library do outside a model."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import numpy as np
import pytest

from edgemoe import llama_library
from edgemoe.llama_library import quantize_rows

Q8_0 = 8
ROW_BYTES = 34  # of 32 weights: a float16 scale and 32 bytes


def test_rows_are_quantized() -> None:
    rows = np.linspace(-1, 1, 64, dtype=np.float32).reshape(2, 32)
    packed = quantize_rows(Q8_0, rows, ROW_BYTES)
    assert packed.shape == (2, ROW_BYTES)
    scales = packed[:, :2].copy().view(np.float16).astype(np.float32)
    assert np.allclose(packed[:, 2:].view(np.int8) * scales, rows, atol=1 / 127)


def test_rows_that_ggml_would_misread_never_reach_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama_library, "_quantize_chunk", lambda: pytest.fail("ggml was called"))
    rows = np.zeros((2, 64), np.float32)
    for strange in (rows[:, ::2], rows.astype(np.float64)[:, :32]):
        with pytest.raises(AssertionError, match=r"^float(32|64) rows \(\d+, \d+\) bytes apart"):
            quantize_rows(Q8_0, strange, ROW_BYTES)


@pytest.mark.parametrize(
    ("given", "told"),
    [({}, "3000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "passive"}, "0")],
    ids=["nobody", "spins", "policy"],
)
def test_who_says_how_long_threads_spin(given: dict[str, str], told: str) -> None:
    """libgomp says itself what it was told; whoever is started later is not."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith(("GOMP_", "OMP_"))}
    program = "import os, edgemoe.llama_library; print(os.environ.get('GOMP_SPINCOUNT'))"
    child = subprocess.run(
        [sys.executable, "-c", program],
        env={**ours, **given, "OMP_DISPLAY_ENV": "verbose"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert child.stdout.strip() == str(given.get("GOMP_SPINCOUNT"))
    assert set(re.findall(r"GOMP_SPINCOUNT = '(\d+)'", child.stderr)) == {told}
