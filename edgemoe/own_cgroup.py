"""The control groups around this process, version 1 or 2: where its limits stand."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

__all__ = ["MEMBERSHIP", "ROOT", "own_cgroups", "read_number", "read_text"]

ROOT = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")


def own_cgroups(controller: str, root: Path = ROOT, membership: Path = MEMBERSHIP) -> tuple[int, list[Path]]:
    """Find this process's cgroup of a controller, and those around it.

    Parameters
    ----------
    controller : str
        ``memory``, ``cpu``.
    root : Path
        Where the cgroup file systems are mounted.
    membership : Path
        The file that says which cgroups this process is in.

    Returns
    -------
    version : int
        Of the cgroup that has the controller: 1 or 2, or 0 where there is none.
    directories : list of Path
        From its own up to the root's.
    """
    path, version = "", 0
    for line in read_text(membership).splitlines():
        _, _, controllers_and_path = line.partition(":")
        controllers, _, name = controllers_and_path.partition(":")
        if controller in controllers.split(","):
            path, version = name, 1
        elif not controllers and not version:
            path, version = name, 2
    if not version:
        return 0, []
    mount = root / controller if version == 1 else root
    parts = [part for part in PurePosixPath(path).parts if part != "/"]
    # In a container the path may be the host's ("/../.." too); what is mounted then is our own cgroup.
    if ".." in parts:
        parts = []
    return version, [mount.joinpath(*parts[:depth]) for depth in range(len(parts), -1, -1)]


def read_number(text: str) -> int | None:
    """Give the whole number that a file of the kernel holds, None if it holds something else."""
    text = text.strip()
    return int(text) if text.isascii() and text.isdigit() else None


def read_text(path: Path) -> str:
    """Give what a file of the kernel holds, nothing if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
