"""``edgemoe tasks``: the tasks that are known of a model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgemoe.cli import options

if TYPE_CHECKING:
    from edgemoe.patterns import PatternStore


@click.group("tasks")
def command() -> None:
    """Look after the tasks of a model.

    `edgemoe profile` makes them; each is a file of its own.
    """


def _store(model: Path, folder: Path | None) -> PatternStore:
    from edgemoe.fingerprint import fingerprint
    from edgemoe.index import read_index
    from edgemoe.patterns import PatternStore

    return PatternStore(fingerprint(read_index(model)), folder)


@command.command("list")
@options.MODEL
@options.STORE
@options.JSON
def list_(model: Path, store: Path | None, json: bool) -> None:
    """List the tasks of MODEL."""
    from edgemoe.cli import task_ui, ui

    patterns = _store(model, store)
    found = patterns.list()
    if json:
        tasks = [task_ui.pattern_document(pattern) for pattern in found.patterns]
        ui.show_json({"folder": str(patterns.folder), "tasks": tasks, "problems": list(found.problems)})
        return
    if found.patterns:
        ui.show(ui.out(), task_ui.task_table(found.patterns))
    else:
        ui.note(f"No tasks in {patterns.folder}; edgemoe profile makes one.")
    for problem in found.problems:
        click.echo(f"edgemoe: {problem}", err=True)


@command.command("show")
@options.MODEL
@click.argument("task")
@options.STORE
@options.JSON
def show(model: Path, task: str, store: Path | None, json: bool) -> None:
    """Show what is known of TASK."""
    from edgemoe.cli import task_ui, ui

    patterns = _store(model, store)
    pattern = patterns.load(task)
    if json:
        ui.show_json(task_ui.pattern_document(pattern))
        return
    ui.show(ui.out(), *task_ui.pattern_parts(pattern))
    note = pattern.note_for(patterns.model)
    if note:
        ui.note(note)


@command.command("merge")
@options.MODEL
@click.argument("tasks", nargs=-1, required=True)
@click.option("--into", required=True, metavar="NAME", help="Name of the new task.")
@options.STORE
def merge(model: Path, tasks: tuple[str, ...], into: str, store: Path | None) -> None:
    """Merge TASKS into a new one, each with the weight of its tokens."""
    from edgemoe.cli import ui

    patterns = _store(model, store)
    patterns.merge(tasks, into)
    ui.note(f"saved as {patterns.path(into)}")


@command.command("remove")
@options.MODEL
@click.argument("tasks", nargs=-1, required=True)
@options.STORE
def remove(model: Path, tasks: tuple[str, ...], store: Path | None) -> None:
    """Delete TASKS."""
    from edgemoe.cli import ui

    _store(model, store).remove(*tasks)
    for task in tasks:
        ui.note(f"{task} is removed.")


@command.command("export")
@options.MODEL
@click.argument("task")
@click.argument("path", type=click.Path(path_type=Path, readable=False))
@options.STORE
def export(model: Path, task: str, path: Path, store: Path | None) -> None:
    """Write TASK to a file of its own for others: at PATH, or with its usual name in a folder."""
    from edgemoe.cli import ui

    ui.note(f"written to {_store(model, store).export(task, path)}")


@command.command("import")
@options.MODEL
@click.argument("paths", nargs=-1, required=True, type=click.Path(path_type=Path, readable=False))
@options.STORE
def import_(model: Path, paths: tuple[Path, ...], store: Path | None) -> None:
    """Take pattern files at PATHS into the tasks of MODEL."""
    from edgemoe.cli import ui

    patterns = _store(model, store)
    for path in paths:
        pattern = patterns.import_(path)
        ui.note(f"{pattern.task} is imported.")
        note = pattern.note_for(patterns.model)
        if note:
            ui.note(note)
