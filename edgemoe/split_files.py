"""The files of one model: a single GGUF, or the parts that llama.cpp's gguf-split makes of it."""

from __future__ import annotations

import os
import re
from collections import Counter
from pathlib import Path
from typing import NoReturn

from edgemoe.errors import ModelFileError
from edgemoe.gguf_header import GGUFHeader, read_header, show

__all__ = ["read_headers"]

_PART_NAME = re.compile(r"(?P<stem>.+)-(?P<part>\d{5})-of-(?P<count>\d{5})\.gguf", re.ASCII | re.DOTALL)


def read_headers(path: str | os.PathLike[str]) -> tuple[GGUFHeader, ...]:
    """Read the headers of all files of a model.

    Parameters
    ----------
    path : str or path-like
        The only file, or the first part of a split model (``<stem>-00001-of-0000N.gguf``); the other parts
        are expected beside it under their own names, as llama.cpp expects them.

    Returns
    -------
    tuple of GGUFHeader
        In order of the parts; no tensor name occurs twice.

    Raises
    ------
    ModelFileError
        If the path is not the first part, a part is missing or does not belong to the set, or any file is
        unsound.
    """
    from gguf.constants import Keys

    first = read_header(path)
    number = _split_key(first, Keys.Split.LLM_KV_SPLIT_NO, default=0)
    count = _split_key(first, Keys.Split.LLM_KV_SPLIT_COUNT, default=0)
    if count <= 1:
        return (first,)
    given = _PART_NAME.fullmatch(first.path.name)
    if number != 0:
        ending = f"-00001-of-{count:05d}.gguf"
        part_1 = first.path.with_name(given["stem"] + ending) if given else f"the file ending in {ending}"
        _refuse(first.path, f"is part {number + 1} of {count}, expected the first", f"give {part_1} instead")
    if given is None or int(given["part"]) != 1 or int(given["count"]) != count:
        _refuse(
            first.path,
            f"is part 1 of {count} but its name does not end in -00001-of-{count:05d}.gguf, by which the"
            " other parts are found",
            "give all parts their original names",
        )
    headers = [first]
    for part in range(2, count + 1):
        part_path = first.path.with_name(f"{given['stem']}-{part:05d}-of-{count:05d}.gguf")
        if not part_path.exists():
            _refuse(first.path, f"is part 1 of {count} but {part_path} is missing", "download that part too")
        header = read_header(part_path)
        if _split_key(header, Keys.Split.LLM_KV_SPLIT_NO) != part - 1:
            _refuse(part_path, f"does not say that it is part {part}", "download that part again")
        if _split_key(header, Keys.Split.LLM_KV_SPLIT_COUNT, default=count) != count:
            _refuse(part_path, f"does not belong to a set of {count} parts", "download that part again")
        headers.append(header)
    names = [tensor.name for header in headers for tensor in header.tensors]
    expected = _split_key(first, Keys.Split.LLM_KV_SPLIT_TENSORS_COUNT)
    if len(names) != expected:
        _refuse(first.path, f"and its {count - 1} other parts hold {len(names)} tensors, expected {expected}")
    twice, times = Counter(names).most_common(1)[0] if names else ("", 0)
    if times > 1:
        _refuse(first.path, f"and its other parts hold tensor {show(twice)} {times} times")
    return tuple(headers)


def _refuse(path: Path, found: str, next_step: str = "download all parts again") -> NoReturn:
    raise ModelFileError(f"{path} {found}; {next_step}")


def _split_key(header: GGUFHeader, key: str, default: int | None = None) -> int:
    value = header.metadata.get(key, default)
    if value is None:
        _refuse(header.path, f"has no {key}, which a part of a split model needs")
    if type(value) is not int or value < 0:
        _refuse(header.path, f"has {key} {show(str(value))}, expected a number of 0 or more")
    return value
