"""The session file: a conversation, its task, and the experts that it had in memory, as JSON.

::

    {"edgemoe_session": 1,
     "model": {"name": "tiny-moe", "router": "<64 hexadecimal digits>"},
     "system": "Be brief.",
     "turns": ["a question", "its answer", ...],
     "n_asked": 2, "task": "code", "pinned": false,
     "residents": {"0": [17, 3, 8], ...}}

It is of the model whose `ModelFingerprint.router` it names, in any quantization: expert numbers mean the same in all of
them. The KV cache is not in it: that would be as large as the context's memory, and the conversation is evaluated again
with the next question. A file may come from a stranger: every value is checked before it is used.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgemoe.atomic_file import atomic_file
from edgemoe.errors import SessionError
from edgemoe.fingerprint import MAX_NAME, ModelFingerprint

__all__ = ["VERSION", "SavedSession", "read_session", "write_session"]

VERSION = 1
"""Format version; a reader refuses newer ones."""

_KEY = "edgemoe_session"
_FIELDS = {_KEY, "model", "system", "turns", "n_asked", "task", "pinned", "residents"}
_MAX_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class SavedSession:
    """What is saved of a conversation.

    Attributes
    ----------
    system : str
        System message, empty for none.
    turns : tuple of str
        Questions and answers in turn, oldest first.
    n_asked : int
        Questions asked so far, those that were dropped from `turns` included: seeds are counted with it.
    task : str or None
        The active task, None for all experts.
    pinned : bool
        Whether the user chose it.
    residents : dict of int to tuple of int
        Experts in memory, by layer, those first that were likeliest to be used.
    """

    system: str
    turns: tuple[str, ...]
    n_asked: int
    task: str | None
    pinned: bool
    residents: dict[int, tuple[int, ...]]


def write_session(session: SavedSession, model: ModelFingerprint, path: Path) -> None:
    """Write a session file; a reader sees the old one or the new one, never a part.

    A new file can be read by its owner alone.

    Raises
    ------
    SessionError
        If there is a file already that is no session, or the folder or the disk refuses it.
    """
    document = {
        _KEY: VERSION,
        "model": {"name": model.name, "router": model.router},
        "system": session.system,
        "turns": list(session.turns),
        "n_asked": session.n_asked,
        "task": session.task,
        "pinned": session.pinned,
        "residents": {str(layer): list(ids) for layer, ids in session.residents.items()},
    }
    try:
        if path.exists():
            _read_document(path)
        with atomic_file(path, mode=0o600) as file:
            file.write(json.dumps(document, ensure_ascii=False).encode("utf-8") + b"\n")
    except (OSError, ValueError) as error:  # ValueError: text that no file name can hold
        raise SessionError(f"{path} cannot be written: {_reason(error)}; check the folder and the disk") from None


def read_session(path: Path, model: ModelFingerprint) -> SavedSession:
    """Read a session file of this model.

    Raises
    ------
    SessionError
        If it cannot be read, is no session, is damaged, of a newer format version, or of another model.
    """
    document = _read_document(path)
    if document[_KEY] > VERSION:
        raise SessionError(
            f"{path} is a session of a newer format than {VERSION}, the last one this edgemoe reads; upgrade edgemoe"
        )
    if not _is_sound(document):
        raise SessionError(f"{path} is a damaged edgemoe session; give the path of another one, or of a new file")
    if document["model"]["router"] != model.router:
        raise SessionError(
            f"{path} is a session of {document['model']['name']}, not of this {model.name}; open it with that model"
        )
    # Not by int(), which refuses long numbers with an error of its own.
    layers, residents = {str(layer): layer for layer in model.layers}, document["residents"]
    if not residents.keys() <= layers.keys() or any(max(ids) >= model.n_expert for ids in residents.values()):
        raise SessionError(f"{path} names experts that {model.name} does not have; it is damaged, take a new file")
    return SavedSession(
        system=document["system"],
        turns=tuple(document["turns"]),
        n_asked=document["n_asked"],
        task=document["task"],
        pinned=document["pinned"],
        residents={layers[layer]: tuple(ids) for layer, ids in residents.items()},
    )


def _read_document(path: Path) -> dict[str, Any]:
    """Read what calls itself a session.

    Raises
    ------
    SessionError
        If it cannot be read, or does not.
    """
    try:
        # Opening a pipe or a device could block for ever.
        if path.exists() and not path.is_file():
            raise SessionError(f"{path} is not a regular file, expected an edgemoe session; give the path of one")
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        raise SessionError(f"{path} cannot be read: {_reason(error)}; check the path and its permissions") from None
    try:
        document = json.loads(data) if len(data) <= _MAX_BYTES else None
    except (ValueError, RecursionError):
        document = None
    if not isinstance(document, dict) or type(document.get(_KEY)) is not int:
        raise SessionError(f"{path} is no edgemoe session, or a damaged one; give the path of one, or of a new file")
    return document


def _is_sound(document: dict[str, Any]) -> bool:
    """Whether every field is there and of its type."""
    if document.keys() != _FIELDS:
        return False
    model, turns, residents = document["model"], document["turns"], document["residents"]
    return (
        isinstance(model, dict)
        and model.keys() == {"name", "router"}
        and all(map(_is_name, model.values()))
        and isinstance(turns, list)
        and len(turns) % 2 == 0
        and all(map(_is_text, [document["system"], *turns]))
        and _is_number(document["n_asked"])
        and (document["task"] is None or _is_name(document["task"]))
        and type(document["pinned"]) is bool
        and isinstance(residents, dict)
        and all(map(_is_list_of_experts, residents.values()))
    )


def _is_text(value: object) -> bool:
    """Text that a tokenizer takes: JSON can spell halves of characters."""
    return isinstance(value, str) and not any("\ud800" <= character <= "\udfff" for character in value)


def _is_name(value: object) -> bool:
    return isinstance(value, str) and len(value) <= MAX_NAME and value.isprintable()


def _is_number(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


def _is_list_of_experts(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_is_number, value)) and len(set(value)) == len(value)


def _reason(error: OSError | ValueError) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or type(error).__name__
