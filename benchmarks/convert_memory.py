"""Measures ``edgemoe convert hf`` on a synthetic checkpoint of about 6 GB: peak memory, and speed beside a plain copy.

    python -m benchmarks.convert_memory --type bf16 --type q8_0 --type q4_k

The checkpoint has the shape of Qwen3-30B-A3B with fewer layers and random weights, in shards of two layers. It is made
in a temporary folder beside `--folder`, and all files are removed at the end, whatever happens. Each conversion is a
process of its own, its peak memory is what the kernel noted (VmHWM). Sources are dropped from the page cache before
every run, and a copy counts as done when it is on the disk, as the converter's output does. Lines for people go to
standard error, the last line of standard output is the result as JSON.
"""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt

from benchmarks.measurements import MIB, say
from edgemoe.bench_machine import make_cold

N_VOCAB, N_EMBD, N_FF, N_EXPERT, N_HEAD, N_HEAD_KV, HEAD_DIM = 32000, 2048, 768, 128, 32, 4, 128
LIMIT = 1500 * 10**6
_PIECE = 16 * MIB


def write_checkpoint(folder: Path, n_layer: int) -> int:
    """Write a Qwen3-MoE checkpoint of random bfloat16 weights; returns the bytes of its shards."""
    config = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "vocab_size": N_VOCAB,
        "hidden_size": N_EMBD,
        "intermediate_size": 6144,
        "num_hidden_layers": n_layer,
        "num_attention_heads": N_HEAD,
        "num_key_value_heads": N_HEAD_KV,
        "head_dim": HEAD_DIM,
        "num_experts": N_EXPERT,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "moe_intermediate_size": N_FF,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(config))
    write_tokenizer(folder)
    layers = [dict(layer(il)) for il in range(n_layer)]
    ends = {
        "model.embed_tokens.weight": (N_VOCAB, N_EMBD),
        "lm_head.weight": (N_VOCAB, N_EMBD),
        "model.norm.weight": (N_EMBD,),
    }
    shards = [ends, *({**first, **second} for first, second in zip(layers[::2], [*layers[1::2], {}], strict=False))]
    noise = np.random.default_rng(0).standard_normal(_PIECE // 2, np.float32) * N_EMBD**-0.5
    piece = (noise.view(np.uint32) >> 16).astype(np.uint16)
    places: dict[str, str] = {}
    for number, tensors in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        write_shard(folder / name, tensors, piece)
        places |= dict.fromkeys(tensors, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def layer(il: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a layer."""
    block = f"model.layers.{il}"
    for norm in ("input_layernorm", "post_attention_layernorm"):
        yield f"{block}.{norm}.weight", (N_EMBD,)
    for part, n_head in (("q", N_HEAD), ("k", N_HEAD_KV), ("v", N_HEAD_KV)):
        yield f"{block}.self_attn.{part}_proj.weight", (n_head * HEAD_DIM, N_EMBD)
    for part in "qk":
        yield f"{block}.self_attn.{part}_norm.weight", (HEAD_DIM,)
    yield f"{block}.self_attn.o_proj.weight", (N_EMBD, N_HEAD * HEAD_DIM)
    yield f"{block}.mlp.gate.weight", (N_EXPERT, N_EMBD)
    for expert in range(N_EXPERT):
        for part, shape in (("gate", (N_FF, N_EMBD)), ("up", (N_FF, N_EMBD)), ("down", (N_EMBD, N_FF))):
            yield f"{block}.mlp.experts.{expert}.{part}_proj.weight", shape


def write_shard(path: Path, tensors: dict[str, tuple[int, ...]], piece: npt.NDArray[np.uint16]) -> None:
    """Write a safetensors file whose weights are the piece over and over."""
    header: dict[str, Any] = {}
    at = 0
    for name, shape in tensors.items():
        n_bytes = 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + n_bytes]}
        at += n_bytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        while at:
            at -= file.write(piece.data.cast("B")[:at])
        os.fsync(file.fileno())


def write_tokenizer(folder: Path) -> None:
    """Write a byte-level tokenizer without merges; the tokens above 256 stay unused."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    letters = [chr(c) for c in visible] + [chr(256 + i) for i in range(256 - len(visible))]
    model = {"type": "BPE", "vocab": {letter: i for i, letter in enumerate(letters)}, "merges": []}
    split = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    end = {"id": 256, "content": "<|end|>", "special": True, **plain}
    tokenizer = {"added_tokens": [end], "normalizer": None, "pre_tokenizer": split, "decoder": split, "model": model}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>"})
    )


def copy(sources: list[Path], target: Path) -> float:
    """Seconds that a plain copy takes until it is on the disk."""
    for source in sources:
        make_cold(source)
    begin = time.perf_counter()
    with target.open("wb") as out:
        for source in sources:
            with source.open("rb") as file:
                while data := file.read(_PIECE):
                    out.write(data)
        os.fsync(out.fileno())
    seconds = time.perf_counter() - begin
    target.unlink()
    return seconds


def convert(folder: Path, target: Path, type_: str) -> dict[str, float]:
    """One conversion: seconds, bytes written, peak memory of its process."""
    for source in folder.glob("*.safetensors"):
        make_cold(source)
    command = [sys.executable, "-m", "edgemoe", "convert", "hf", str(folder), "-o", str(target), "--type", type_]
    begin = time.perf_counter()
    process = subprocess.Popen(command)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.perf_counter() - begin
    if process.returncode:
        raise click.ClickException(f"{' '.join(command)} ended with status {process.returncode}")
    n_bytes = target.stat().st_size
    target.unlink()
    return {"seconds": seconds, "bytes": n_bytes, "peak_rss": usage.ru_maxrss * 1024}


@click.command()
@click.option("--folder", type=click.Path(path_type=Path, exists=True, file_okay=False), default=Path(), help="Where.")
@click.option("--type", "types", multiple=True, default=("bf16", "q8_0", "q4_k"), help="What to convert to.")
@click.option("--layers", default=5, help="1.2 GB each.")
def main(folder: Path, types: tuple[str, ...], layers: int) -> None:
    """Measure conversions of a synthetic checkpoint."""
    with tempfile.TemporaryDirectory(dir=folder, prefix="convert-") as name:
        checkpoint = Path(name) / "checkpoint"
        checkpoint.mkdir()
        n_bytes = write_checkpoint(checkpoint, layers)
        say(f"checkpoint of {n_bytes / 1e9:.2f} GB")
        sources = sorted(checkpoint.glob("*.safetensors"))
        copies = [copy(sources, Path(name) / "copy")]
        rows = {type_: convert(checkpoint, Path(name) / "model.gguf", type_) for type_ in types}
        copies.append(copy(sources, Path(name) / "copy"))
    rate = n_bytes / (sum(copies) / len(copies))
    say(f"plain copy: {rate / 1e6:.0f} MB/s ({', '.join(f'{n_bytes / s / 1e6:.0f}' for s in copies)})")
    for type_, row in rows.items():
        row["share_of_copy"] = n_bytes / row["seconds"] / rate
        say(
            f"{type_}: {row['seconds']:.1f} s, {n_bytes / row['seconds'] / 1e6:.0f} MB/s of checkpoint,"
            f" {row['share_of_copy']:.0%} of a copy, peak {row['peak_rss'] / 1e6:.0f} MB"
            f" ({'below' if row['peak_rss'] < LIMIT else 'ABOVE'} {LIMIT / 1e6:.0f} MB), {row['bytes'] / 1e9:.2f} GB"
        )
    cores = len(os.sched_getaffinity(0))
    print(json.dumps({"checkpoint_bytes": n_bytes, "copy_seconds": copies, "cores": cores, "conversions": rows}))
    sys.exit(any(row["peak_rss"] >= LIMIT for row in rows.values()))


if __name__ == "__main__":
    main()
