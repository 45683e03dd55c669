"""Groups of verbs whose help imports none of them."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import click

__all__ = ["Verbs"]


class Verbs(click.Group):
    """A group that finds a verb's command in a module of its own.

    Parameters
    ----------
    verbs : Mapping of str to str
        Verb -> its line in the help.
    prefix : str
        What comes before a verb in the name of its module.
    """

    def __init__(self, *args: Any, verbs: Mapping[str, str], prefix: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._verbs = verbs
        self._prefix = prefix

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Verbs in the order of the help."""
        return list(self._verbs)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the module of a verb."""
        if cmd_name not in self._verbs:
            return None
        command: click.Command = importlib.import_module(self._prefix + cmd_name).command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the lines of the help without importing the verbs."""
        with formatter.section("Commands"):
            formatter.write_dl(list(self._verbs.items()))
