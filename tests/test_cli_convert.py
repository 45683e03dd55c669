"""Conversions as a user meets them: what is said, what is written, and the exit status."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from unittest import mock

import click
import pytest
from click.testing import CliRunner, Result
from gguf_bytes import gguf_bytes, moe_metadata
from plain_llama import TINY_MOE
from test_align import pattern_of
from tiny_models import write_tiny_model

from edgemoe.cli import main
from edgemoe.cli.convert import VERBS, command
from edgemoe.converters.align import ALIGNMENT
from edgemoe.converters.gguf_file import GgufFile
from edgemoe.converters.verify import verify
from edgemoe.fingerprint import fingerprint
from edgemoe.index import read_index
from edgemoe.patterns import PatternStore

ROOT = Path(__file__).resolve().parent.parent

HELP = """\
Usage: edgemoe convert [OPTIONS] COMMAND [ARGS]...

  Make GGUF files that suit a purpose.
"""


def edgemoe(*arguments: object) -> Result:
    result = CliRunner().invoke(main, list(map(str, arguments)), prog_name="edgemoe")
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def refusal(*arguments: object) -> str:
    result = edgemoe("convert", *arguments)
    assert result.exit_code == 1 and result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("edgemoe: ") and "; " in line
    return line


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_tiny_model(tmp_path / "m.gguf", "qwen3moe")[0]


@pytest.fixture
def store(model: Path, tmp_path: Path) -> Path:
    """A folder with one task of the model: code."""
    PatternStore(fingerprint(read_index(model)), tmp_path / "tasks").save(pattern_of(model))
    return tmp_path / "tasks"


def test_help() -> None:
    assert edgemoe("convert", "-h").stdout.startswith(HELP)


@pytest.mark.parametrize("verb", VERBS)
def test_each_verb_has_its_line_in_the_help(verb: str) -> None:
    found = command.get_command(click.Context(command), verb)
    assert found is not None and found.get_short_help_str(limit=80) == VERBS[verb]
    assert edgemoe("convert", verb, "-h").stdout.startswith(f"Usage: edgemoe convert {verb} [OPTIONS]")


@pytest.mark.parametrize("arguments", [["convert", "-h"], ["convert", "align", "-h"], ["convert", "slice", "-h"]])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    heavy = ["llama_cpp", "numpy", "gguf", "rich", "psutil", "edgemoe.converters", "edgemoe._native"]
    program = f"""
import sys
from edgemoe.cli import main
try:
    main({arguments!r})
except SystemExit:
    pass
print([name for name in {heavy!r} if name in sys.modules], file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.stderr == "[]\n"


def test_align(tmp_path: Path) -> None:
    output = tmp_path / "aligned.gguf"
    result = edgemoe("convert", "align", TINY_MOE, "-o", output)
    assert (result.exit_code, result.stdout) == (0, "")
    assert f"every tensor starts on a page of {ALIGNMENT:,} bytes" in result.stderr
    assert "start on a page of this machine: 0% before, 85% now." in result.stderr
    assert "their size is no multiple of a page" in result.stderr
    assert read_index(output).aligned_slabs == pytest.approx(0.85, abs=0.01)


def test_ctrl_c_keeps_what_is_complete(model: Path, tmp_path: Path) -> None:
    output = tmp_path / "aligned.gguf"

    def interrupted(self: object, name: str, chunks: Iterable[bytes]) -> None:
        if name == "blk.1.ffn_up_exps.weight":
            raise KeyboardInterrupt
        write(self, name, chunks)

    write = GgufFile.write
    with mock.patch.object(GgufFile, "write", interrupted):
        result = edgemoe("convert", "align", model, "-o", output)
    assert result.exit_code == 130 and "The same command goes on" in result.stderr
    assert not output.exists() and (tmp_path / "aligned.gguf.partial").exists()
    assert edgemoe("convert", "align", model, "-o", output).exit_code == 0
    assert verify(model, output).same


def test_align_in_the_order_of_a_task(model: Path, store: Path, tmp_path: Path) -> None:
    output = tmp_path / "ordered.gguf"
    arguments = ("align", model, "-o", output, "--order", "code", "--store", store)
    result = edgemoe("convert", *arguments)
    assert result.exit_code == 0
    assert f"tasks of {model} do not fit this file" in result.stderr
    assert verify(model, output).kept
    new_store = tmp_path / "new"
    assert edgemoe("tasks", "import", output, tmp_path / "ordered-code.pattern", "--store", new_store).exit_code == 0
    assert PatternStore(fingerprint(read_index(output)), new_store).load("code").criterion == "peu"
    output.unlink()
    assert "ordered-code.pattern exists already" in refusal(*arguments)
    assert edgemoe("convert", *arguments, "--force").exit_code == 0


def test_slice(model: Path, store: Path, tmp_path: Path) -> None:
    output = tmp_path / "code-8.gguf"
    result = edgemoe("convert", "slice", model, "--task", "code", "--keep", "3/8", "-o", output, "--store", store)
    assert (result.exit_code, result.stdout) == (0, "")
    assert f"will have 3/8 experts and {output.stat().st_size:,} bytes (" in result.stderr
    described = json.loads(edgemoe("inspect", output, "--json").stdout)
    assert (described["n_expert"], described["n_expert_used"]) == (8, 3)
    assert described["name"] == "tiny qwen3moe (code 3/8)"


def test_verify(model: Path, tmp_path: Path) -> None:
    aligned = tmp_path / "aligned.gguf"
    edgemoe("convert", "align", model, "-o", aligned)
    result = edgemoe("convert", "verify", model, aligned)
    n_tensors = len(verify(model, aligned).tensors)
    assert result.exit_code == 0
    assert result.stdout.splitlines()[:3] == [
        f"tensors   {n_tensors} equal, 0 not the same",
        "metadata  0 keys that matter differ, 3 that do not",
        "verdict   the same",
    ]
    other = write_tiny_model(tmp_path / "other.gguf", "qwen3moe", expert_type="q8_0")[0]
    result = edgemoe("convert", "verify", model, other)
    assert result.exit_code == 0
    assert "blk.2.ffn_up_exps.weight    F32    Q8_0    within the quantization error" in result.stdout
    result = edgemoe("convert", "verify", model, write_tiny_model(tmp_path / "seed.gguf", "qwen3moe", seed=1)[0])
    assert result.exit_code == 1 and result.stderr == ""
    assert "verdict   not the same" in result.stdout
    assert "blk.0.attn_q.weight         F32    F32     other bytes" in result.stdout


def test_verify_for_programs(model: Path, tmp_path: Path) -> None:
    result = edgemoe("convert", "verify", model, model, "--json")
    found: dict[str, Any] = json.loads(result.stdout)
    assert (result.exit_code, found["same"], found["keys"], found["kept"]) == (0, True, [], None)
    assert found["tensors"][0] == {
        "name": "token_embd.weight",
        "types": ["F32", "F32"],
        "same": True,
        "found": "equal",
        "error": None,
        "limit": None,
    }
    other = write_tiny_model(tmp_path / "other.gguf", "qwen3moe", seed=1)[0]
    result = edgemoe("convert", "verify", model, other, "--json")
    assert result.exit_code == 1 and json.loads(result.stdout)["same"] is False


def test_where_the_experts_are(model: Path, tmp_path: Path) -> None:
    lines = edgemoe("inspect", model, "--experts").stdout.splitlines()
    assert lines[-1] == "The file has no index of its experts; this follows from its tensors."
    index = read_index(model)
    first = index.experts[0]
    last = first.offset + 15 * first.slab_bytes
    assert f"{first.name}  F32  {first.offset:,} {first.slab_bytes:,} {last:,}".split() in [
        line.split() for line in lines
    ]
    aligned = tmp_path / "aligned.gguf"
    edgemoe("convert", "align", model, "-o", aligned)
    assert edgemoe("inspect", aligned, "--experts").stdout.endswith(
        "The file's own index of its experts says the same.\n"
    )
    found = json.loads(edgemoe("inspect", aligned, "--experts", "--json").stdout)["expert_offsets"]
    assert found["stored"] is True
    for tensor, expected in zip(found["tensors"], read_index(aligned).experts, strict=True):
        assert (tensor["name"], tensor["stride"], tensor["file"]) == (expected.name, expected.slab_bytes, str(aligned))
        assert tensor["offsets"] == [expected.offset + i * expected.slab_bytes for i in range(16)]
    assert "expert_offsets" not in json.loads(edgemoe("inspect", aligned, "--json").stdout)


def test_the_documented_way_to_find_an_expert(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    edgemoe("convert", "align", model, "-o", tmp_path / "aligned.gguf")
    monkeypatch.chdir(tmp_path)
    found: dict[str, Any] = {}
    exec((ROOT / "docs" / "gguf-keys.md").read_text().split("```python\n")[1].split("```")[0], found)
    first = read_index(Path("aligned.gguf")).experts[0]
    assert found["start"] == first.offset + 5 * first.slab_bytes


def test_where_the_experts_of_a_split_model_are(tmp_path: Path) -> None:
    parts = write_tiny_model(tmp_path / "m.gguf", "qwen3moe", split=9)
    lines = edgemoe("inspect", parts[0], "--experts").stdout.splitlines()
    assert {line.split()[-1] for line in lines if "_exps.weight" in line} <= {part.name for part in parts}


def test_bad_input_is_one_sentence(model: Path, store: Path, tmp_path: Path) -> None:
    output, text, dense = tmp_path / "o.gguf", tmp_path / "text", tmp_path / "dense.gguf"
    text.write_text("no model")
    dense.write_bytes(gguf_bytes(moe_metadata()))
    slicing = ("--task", "code", "--store", store, "-o", output)
    assert "is not a GGUF file" in refusal("align", text, "-o", output)
    assert "is a dense model" in refusal("align", dense, "-o", output)
    assert "does not exist" in refusal("align", tmp_path / "gone.gguf", "-o", output)
    assert "no task 'cod'" in refusal("align", model, "-o", output, "--order", "cod", "--store", store)
    assert "no task 'cod'" in refusal("slice", model, "--task", "cod", "--keep", "8", "--store", store, "-o", output)
    assert "is not a GGUF file" in refusal("slice", text, "--keep", "8", *slicing)
    assert "give at least 4" in edgemoe("convert", "slice", model, "--keep", "3", *slicing).stderr
    assert "is no number of experts to keep" in refusal("slice", model, "--keep", "many", *slicing)
    assert "is what is to be converted" in refusal("align", model, "-o", model, "--force")
    assert "is a directory" in refusal("align", model, "-o", tmp_path)
    assert "is a directory" in refusal("align", model, "-o", ".")
    assert "is not a GGUF file" in refusal("verify", model, text)
    assert not output.exists() and not list(tmp_path.glob("*.partial"))
    output.write_bytes(b"mine")
    assert "exists already" in refusal("align", model, "-o", output)
    assert output.read_bytes() == b"mine"
