"""What llama.cpp's own converter makes of the tiny checkpoints: tensors and metadata, in `reference_conversions.json`.

Needs llama.cpp's sources of the pinned release, which are in the source distribution of llama-cpp-python:

    pip download --no-deps --no-binary :all: llama-cpp-python==0.3.36
    tar xzf llama_cpp_python-0.3.36.tar.gz
    python tests/reference_conversions.py llama_cpp_python-0.3.36/vendor/llama.cpp

writes the table anew. Tokenizers are left out: the reference knows them by checksums, which no tiny one has.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

TABLE = Path(__file__).with_suffix(".json")

Facts = dict[str, dict[str, Any]]


def facts(path: Path) -> Facts:
    """Of a GGUF: metadata of the architecture, and the extents of each tensor that are not 1, with its type."""
    from gguf import GGUFReader, GGUFValueType

    reader = GGUFReader(path)
    architecture = str(reader.fields["general.architecture"].contents())
    keys: dict[str, Any] = {"general.architecture": architecture}
    for name, field in reader.fields.items():
        if name.startswith(f"{architecture}."):
            value = field.contents()
            keys[name] = round(value, 7) if field.types[0] == GGUFValueType.FLOAT32 else value
    tensors = {
        tensor.name: [*(int(extent) for extent in tensor.shape if extent != 1), tensor.tensor_type.name]
        for tensor in reader.tensors
    }
    return {"metadata": dict(sorted(keys.items())), "tensors": dict(sorted(tensors.items()))}


def reference_facts(llama_cpp: Path, folder: Path) -> Facts:
    """Convert a checkpoint with llama.cpp's converter, to f16, and give the facts of the result."""
    sys.path[:0] = [str(llama_cpp / "gguf-py"), str(llama_cpp)]
    import conversion
    import gguf

    classes = json.loads((folder / "config.json").read_text())["architectures"]
    model_class = conversion.get_model_class(classes[0])
    model_class.set_vocab = lambda self: None
    model_class.no_mtp = True  # the tiny checkpoints predict no further tokens
    output = folder / "reference.gguf"
    model_class(folder, gguf.LlamaFileType.MOSTLY_F16, output).write()
    return facts(output)


def main() -> None:
    """Write the table."""
    from tiny_checkpoints import CONFIGS, config_of, random_model, save_checkpoint

    table: dict[str, Facts] = {}
    for family in CONFIGS:
        with tempfile.TemporaryDirectory() as name:
            folder = save_checkpoint(random_model(config_of(family)), Path(name))
            table[family] = reference_facts(Path(sys.argv[1]), folder)
            print(family, len(table[family]["tensors"]), file=sys.stderr)
    # A line for each half, so that a difference can be found.
    rows = [
        f'"{family}": {{"metadata": {json.dumps(found["metadata"])},\n"tensors": {json.dumps(found["tensors"])}}}'
        for family, found in table.items()
    ]
    TABLE.write_text("{\n" + ",\n".join(rows) + "\n}\n")


if __name__ == "__main__":
    main()
