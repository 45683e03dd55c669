"""Chat templates are found wherever releases of transformers have put them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_tokenizers as tiny
from gguf.constants import Keys
from tiny_tokenizers import FAMILIES, write_json

from edgemoe.converters.vocabulary import vocabulary_metadata
from edgemoe.errors import ConvertError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny.write_family(tmp_path, FAMILIES["gpt-2"])
    return tmp_path


def templates(folder: Path, in_config: Any = None) -> dict[str, Any]:
    write_json(folder / "tokenizer_config.json", {"eos_token": "<|endoftext|>", "chat_template": in_config})
    metadata = vocabulary_metadata(folder, "gpt2", tiny.N_VOCAB)
    return {key.removeprefix("tokenizer."): value.value for key, value in metadata.items() if ".chat_template" in key}


def test_text_in_the_config(folder: Path) -> None:
    assert templates(folder) == {}
    assert templates(folder, "{{ a }}\n") == {"chat_template": "{{ a }}\n"}


def test_named_ones_in_the_config(folder: Path) -> None:
    named = [
        {"name": "default", "template": "d"},
        {"name": "tool-use", "template": "t"},
        {"name": "rag", "template": "r"},
    ]
    expected = {"chat_template": "d", "chat_template.tool_use": "t", "chat_template.rag": "r"}
    assert templates(folder, named) == expected | {"chat_templates": ["tool_use", "rag"]}
    assert templates(folder, {"rag": "r"}) == {"chat_template.rag": "r", "chat_templates": ["rag"]}


def test_files_go_first(folder: Path) -> None:
    write_json(folder / "chat_template.json", {"chat_template": "from json"})
    assert templates(folder) == {"chat_template": "from json"}
    assert templates(folder, "from config") == {"chat_template": "from config"}
    (folder / "chat_template.jinja").write_bytes("ž\r\n".encode())
    assert templates(folder, "from config") == {"chat_template": "ž\r\n"}
    more = folder / "additional_chat_templates"
    more.mkdir()
    (more / "rag.jinja").write_text("r")
    assert templates(folder) == {"chat_template": "ž\r\n", "chat_template.rag": "r", "chat_templates": ["rag"]}


def test_llama_cpp_reads_it(folder: Path) -> None:
    write_json(folder / "tokenizer_config.json", {"eos_token": "<|endoftext|>", "chat_template": "{{ messages }}"})
    with tiny.converted(folder, "gpt2") as llama:
        assert llama.metadata[Keys.Tokenizer.CHAT_TEMPLATE] == "{{ messages }}"


def test_damage(folder: Path) -> None:
    for damaged in ([{"name": "a"}], [3], 3, {"a": 3}):
        with pytest.raises(ConvertError, match="not laid out"):
            templates(folder, damaged)
    (folder / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(ConvertError, match="not UTF-8"):
        templates(folder)
    (folder / "chat_template.jinja").unlink()
    (folder / "chat_template.jinja").mkdir()
    with pytest.raises(ConvertError, match="cannot be read"):
        templates(folder)
