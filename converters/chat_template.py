"""Chat templates of a checkpoint: Jinja texts, one of them the default, others by name (tool_use, rag, ...)."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from edgemoe.converters.tokenizer_files import TokenizerFiles
from edgemoe.errors import ConvertError

__all__ = ["DEFAULT", "chat_templates"]

DEFAULT = "default"


def chat_templates(files: TokenizerFiles) -> dict[str, str]:
    """Read the chat templates, by name.

    Files of their own (``chat_template.jinja``, ``additional_chat_templates/*.jinja``) go before what
    ``tokenizer_config.json`` says, as they do in `transformers`; ``chat_template.json`` comes last.

    Returns
    -------
    dict of str to str
        The one for ordinary use is `DEFAULT`. Names have letters, digits and underscores only: they become GGUF keys.

    Raises
    ------
    ConvertError
        If a template cannot be read.
    """
    main = files.folder / "chat_template.jinja"
    more = sorted((files.folder / "additional_chat_templates").glob("*.jinja"))
    found = {path.stem: _read(path) for path in more} | ({DEFAULT: _read(main)} if main.exists() else {})
    if not found:
        stored = (files.config.get("chat_template"), files.processor.get("chat_template"))
        found = _by_name(next((value for value in stored if value is not None), {}))
    return {re.sub(r"[^0-9A-Za-z]", "_", name): template for name, template in found.items()}


def _by_name(stored: Any) -> dict[str, str]:
    if isinstance(stored, str):
        return {DEFAULT: stored}
    entries = stored.items() if isinstance(stored, dict) else ((entry["name"], entry["template"]) for entry in stored)
    templates = dict(entries)
    if not all(isinstance(template, str) for template in templates.values()):
        raise TypeError("a chat template is no text")
    return templates


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode()
    except OSError as error:
        raise ConvertError(f"{path} cannot be read: {error.strerror}; check the file") from None
    except UnicodeDecodeError:
        raise ConvertError(f"{path} is not UTF-8 text; save it as UTF-8") from None
