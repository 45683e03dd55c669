"""Sentences of the package, as the command line says them."""

from __future__ import annotations

import pytest

from edgemoe.cli.flags import in_flags


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        (
            "ram=10MiB is too small; give ram=78MiB or a smaller n_ctx",
            "--ram 10MiB is too small; give --ram 78MiB or a smaller --ctx",
        ),
        ("keep=4/8 limits; give experts=task", "--keep 4/8 limits; give --experts task"),
        ("leave skip_mass out, or lower n_ubatch.", "leave --skip-mass out, or lower --ubatch."),
        ("no memory is left for ram=auto (7 MiB)", "no memory is left for --ram auto (7 MiB)"),
        ("50% of 23.4 GiB RAM", "50% of 23.4 GiB RAM"),
        ("all experts of a task keep", "all experts of a task keep"),
        ("/models/n_ctx=1/ram=2.gguf, models/n_ctx", "/models/n_ctx=1/ram=2.gguf, models/n_ctx"),
    ],
)
def test_options_are_flags(said: str, shown: str) -> None:
    assert in_flags(said) == shown
