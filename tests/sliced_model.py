"""Cuts experts out of a GGUF file: what a masked model has to equal."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import gguf

# Everything of a layer that has one share for each expert, along its last dimension in ggml's order.
_BY_EXPERT = re.compile(
    r"blk\.(\d+)\.(ffn_(gate|up|down|gate_up)_exps\.(weight|bias|scale)|ffn_gate_inp\.(weight|bias)|exp_probs_b(\.bias)?)$"
)


def slice_model(source: Path, target: Path, kept: Mapping[int, Sequence[int]]) -> None:
    """Write `source` with only the kept experts of each layer, renumbered in their order.

    Every MoE layer keeps equally many, because a GGUF file has one ``expert_count``; with groups of experts, equally
    many of each group, and the number of groups stays. Of layers that are not named, the first experts are kept.
    """
    (n_kept,) = {len(experts) for experts in kept.values()}
    reader = gguf.GGUFReader(source)
    architecture = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(target, architecture)
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name == "general.architecture":
            continue
        value = n_kept if field.name == f"{architecture}.expert_count" else field.contents()
        item_type = field.types[1] if len(field.types) > 1 else None
        writer.add_key_value(field.name, value, field.types[0], item_type)
    for tensor in reader.tensors:
        match = _BY_EXPERT.match(tensor.name)
        data = tensor.data[list(kept.get(int(match[1]), range(n_kept)))] if match else tensor.data
        writer.add_tensor(tensor.name, data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
