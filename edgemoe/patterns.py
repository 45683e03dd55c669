"""The tasks of one model on this computer: a folder of pattern files, all bound to the model's fingerprint."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import platformdirs

from edgemoe.errors import PatternError
from edgemoe.evidence import check_task_name
from edgemoe.fingerprint import ModelFingerprint
from edgemoe.pattern import Pattern, merge
from edgemoe.pattern_file import SUFFIX, read_pattern, write_pattern

__all__ = ["Pattern", "PatternList", "PatternStore"]


@dataclass(frozen=True, slots=True)
class PatternList:
    """What a store holds.

    Attributes
    ----------
    patterns : tuple of Pattern
        Usable ones, by task name.
    problems : tuple of str
        A sentence for each file that is damaged or of another model.
    """

    patterns: tuple[Pattern, ...]
    problems: tuple[str, ...]


class PatternStore:
    """Tasks of one model; every task is a file, so processes share a store without locks and the last save wins.

    Parameters
    ----------
    model : ModelFingerprint
        Only its patterns are stored and loaded, of any quantization.
    folder : Path, optional
        Where the files are. Default: a folder of the model's own in the user's data folder.
    """

    def __init__(self, model: ModelFingerprint, folder: Path | None = None) -> None:
        self.model = model
        self.folder = folder or platformdirs.user_data_path("edgemoe") / "tasks" / model.router[:16]

    def names(self) -> tuple[str, ...]:
        """Give the names of all tasks, without reading their files."""
        try:
            return tuple(sorted(path.stem for path in self.folder.iterdir() if path.suffix == SUFFIX))
        except FileNotFoundError:
            return ()
        except OSError as error:
            raise PatternError(f"{self.folder} cannot be read: {error.strerror}; check its permissions") from None

    def list(self) -> PatternList:
        """Read all tasks; what cannot be used is told, and hides nothing else."""
        patterns: list[Pattern] = []
        problems: list[str] = []
        for name in self.names():
            try:
                patterns.append(self.load(name))
            except PatternError as error:
                problems.append(str(error))
        return PatternList(tuple(patterns), tuple(problems))

    def load(self, task: str) -> Pattern:
        """Read one task.

        Raises
        ------
        PatternMismatchError
            If its file is of another model.
        PatternError
            If there is no such task, or its file is damaged.
        """
        path = self._existing(task)
        pattern = read_pattern(path)
        if pattern.task != task:
            raise PatternError(f"{path} holds task {pattern.task!r}; rename it to {pattern.task}{SUFFIX}")
        pattern.note_for(self.model)
        return pattern

    def save(self, pattern: Pattern) -> Path:
        """Write a task, in place of one of the same name.

        Returns
        -------
        Path
            Its file.

        Raises
        ------
        PatternMismatchError
            If it is of another model.
        PatternError
            If the disk refuses it.
        """
        pattern.note_for(self.model)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise PatternError(f"{self.folder} cannot be made: {error.strerror}; check its permissions") from None
        path = self.path(pattern.task)
        write_pattern(pattern, path)
        return path

    def check_new(self, task: str) -> None:
        """Refuse the name of a task that is there: no work of hours is replaced unasked.

        Raises
        ------
        PatternError
            If the store has a task of that name.
        """
        if task in self.names():
            raise PatternError(
                f"task {task!r} exists already in {self.folder}; remove that one first (edgemoe tasks remove), or use"
                " another name"
            )

    def remove(self, *tasks: str) -> None:
        """Delete tasks, damaged ones too: all of them, or none where one is not known.

        Raises
        ------
        PatternError
            If there is no such task, or the folder refuses.
        """
        for path in [self._existing(task, "nothing was removed") for task in tasks]:
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                raise PatternError(f"{path} cannot be removed: {error.strerror}; check its permissions") from None

    def export(self, task: str, path: Path) -> Path:
        """Write a task to a new file, for others.

        Parameters
        ----------
        task : str
            Its name.
        path : Path
            A file that does not exist yet, or a folder.

        Returns
        -------
        Path
            The file written.

        Raises
        ------
        PatternError
            If there is no such task, it is damaged, the file exists or cannot be written.
        """
        pattern = self.load(task)
        if path.is_dir():
            path = path / f"{task}{SUFFIX}"
        if path.exists():
            raise PatternError(f"{path} exists already; remove it or give another path")
        write_pattern(pattern, path)
        return path

    def import_(self, path: Path) -> Pattern:
        """Take a pattern file into the store, under the task name it holds.

        Raises
        ------
        PatternMismatchError
            If it is of another model.
        PatternError
            If it is damaged, or the store has a task of that name already.
        """
        pattern = read_pattern(path)
        pattern.note_for(self.model)
        self.check_new(pattern.task)
        self.save(pattern)
        return pattern

    def merge(self, tasks: Sequence[str], task: str) -> Pattern:
        """Merge tasks of the store into a new one and save it.

        Raises
        ------
        PatternError
            As `pattern.merge`, or if a task is not known or the store has one of the new name.
        """
        self.check_new(task)
        merged = merge([self.load(name) for name in tasks], task)
        self.save(merged)
        return merged

    def path(self, task: str) -> Path:
        """Give the file of a task, whether or not it exists."""
        check_task_name(task)  # before it becomes a path
        return self.folder / f"{task}{SUFFIX}"

    def _existing(self, task: str, otherwise: str = "profile it first") -> Path:
        names = self.names()
        if task in names:
            return self.path(task)
        known = f"known are {', '.join(names)}" if names else "there is none yet"
        near = difflib.get_close_matches(task, names, n=1)
        step = f"did you mean {near[0]}?" if near else otherwise
        raise PatternError(f"no task {task[:80]!a} for {self.model}, {known}; {step}")
