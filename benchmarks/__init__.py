"""Measurements against plain llama.cpp, and the models to measure on. Not installed; run from the repository's root."""

import sys
from pathlib import Path

# The model generator and the numpy kernels are shared with the tests, whose modules import each other by bare name.
sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))
