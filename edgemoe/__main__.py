"""``python -m edgemoe`` is the ``edgemoe`` command."""

from edgemoe.cli import main

main(prog_name="edgemoe")
