"""Writes large MoE models of real shapes with random weights, at about the speed of the disk.

python -m benchmarks.synthetic_model qwen3-30b-a3b --layers 12 -o model.gguf

Names and shapes of tensors come from the generator of the tests' tiny models; here only the dimensions are real. A few
hundred rows of each kind of matrix are drawn and quantized; a tensor is filled with copies of them, each starting at
another row and with the blocks within the rows in another order, so that no two experts are alike and every
scale is one that the quantizer made. Such a model computes what a real one would, at the same cost, but its text is
noise and its routers send tokens more evenly over the experts than trained ones do.
"""

from __future__ import annotations

import ctypes
import itertools
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import BinaryIO

import click
import gguf
import numpy as np
import numpy.typing as npt
from tiny_architectures import DIMENSIONS, KEYS, Dimensions, Keys
from tiny_blocks import OUTPUT, Axis, layer
from tiny_models import EXPERT_TENSOR, EXPERT_TYPES, _add_key, _ggml, _size, _weights

Bytes = npt.NDArray[np.int8]

POOL_ROWS = 509  # prime, so that no number of rows repeats the same cut of the pool
F32 = EXPERT_TYPES["f32"]
FALLBACK = EXPERT_TYPES["q8_0"]


@dataclass(frozen=True, slots=True)
class Shape:
    """A model's architecture, parts of a layer (`tiny_blocks.BLOCKS`), hyperparameters, and the usual types."""

    architecture: str
    n_layer: int
    parts: str
    keys: Keys
    dimensions: Dimensions
    expert_type: str = "q4_k"
    dense_type: str = "q4_k"
    embedding_type: str = "q6_k"
    leading_parts: tuple[str, ...] = field(default=())


SHAPES: Mapping[str, Shape] = {
    "qwen3-30b-a3b": Shape(
        "qwen3moe",
        48,
        "attn-norm ffn-norm qkv norm-per-head experts",
        {"rope.freq_base": 1e6, "attention.layer_norm_rms_epsilon": 1e-6},
        {
            "context": "40960", "vocab": "151936", "embd": "2048", "head": "32", "head_kv": "4", "head_dim": "128",
            "ff": "6144", "ff_exp": "768", "expert": "128", "used": "8",
        },
    ),
    "olmoe": Shape(
        "olmoe",
        16,
        "attn-norm ffn-norm qkv norm-of-all-heads experts",
        {"expert_feed_forward_length": None, "rope.freq_base": 1e4},
        {
            "context": "4096", "vocab": "50304", "embd": "2048", "head": "16", "head_kv": "16", "head_dim": "128",
            "ff": "1024", "ff_exp": "1024", "expert": "64", "used": "8",
        },
    ),
    "gpt-oss-20b": Shape(
        "gpt-oss",
        24,
        "attn-norm post-attn-norm qkv qkv-bias attn-out-bias sinks experts expert-biases",
        {"attention.sliding_window": 128, "rope.freq_base": 150000.0},
        {
            "context": "131072", "vocab": "201088", "embd": "2880", "head": "64", "head_kv": "8", "head_dim": "64",
            "ff": "2880", "ff_exp": "2880", "expert": "32", "used": "4",
        },
        expert_type="mxfp4",
        dense_type="q8_0",
        embedding_type="q8_0",
    ),
    "deepseek-v2-lite": Shape(
        "deepseek2",
        27,
        "attn-norm ffn-norm mla-plain-query mla experts shared",
        {
            "attention.kv_lora_rank": "lora_kv", "attention.key_length_mla": "key_mla",
            "attention.value_length_mla": "value_mla", "leading_dense_block_count": 1, "expert_shared_count": 2,
            "expert_weights_scale": 1.0, "rope.freq_base": 1e4,
        },
        {
            "context": "32768", "vocab": "102400", "embd": "2048", "head": "16", "head_kv": "1", "ff": "10944",
            "lora_kv": "512", "rot": "64", "nope": "128", "key_mla": "nope+rot", "value_mla": "128",
            "key_length": "lora_kv+rot", "value_length": "lora_kv",
            "ff_exp": "1408", "ff_shexp": "2*ff_exp", "expert": "64", "used": "6",
        },
        leading_parts=("attn-norm ffn-norm mla-plain-query mla dense",),
    ),
}  # fmt: skip


def write_synthetic_model(
    path: Path,
    name: str,
    *,
    n_layer: int | None = None,
    n_vocab: int | None = None,
    expert_type: str | None = None,
    seed: int = 0,
) -> None:
    """Write a model of one of `SHAPES`; the other arguments change its depth, its vocabulary, its experts' type.

    Raises
    ------
    ValueError
        When rows of the model do not fit blocks of `expert_type`, or `n_vocab` is too small for 256 bytes.
    """
    shape = _deepened(SHAPES[name], n_layer)
    sizes: dict[str, Axis] = {**DIMENSIONS, **shape.dimensions}
    if n_vocab is not None:
        sizes["vocab"] = str(n_vocab)
    writer = gguf.GGUFWriter(path, shape.architecture)
    writer.add_name(f"synthetic {name}, {shape.n_layer} layers")
    writer.add_block_count(shape.n_layer)
    for key, value in {**KEYS, **shape.keys}.items():
        _add_key(writer, f"{shape.architecture}.{key}", value, sizes)
    _add_tokenizer(writer, _size("vocab", sizes))
    tensors = []
    for name_in_file, axes in _named_tensors(shape):
        ne = tuple(_size(axis, sizes) for axis in axes)
        tensors.append(SyntheticTensor(name_in_file, ne, _type_of(name_in_file, ne, shape, expert_type), seed))
    for tensor in tensors:
        writer.add_tensor_info(
            tensor.name, tensor.ne[::-1], np.dtype(np.int8), tensor.nbytes, _gguf_type(tensor.ggml_type)
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in tensors:
        writer.write_tensor_data(tensor)
    writer.close()


def _gguf_type(ggml_type: int) -> gguf.GGMLQuantizationType | int:
    """The type for GGUFWriter, which does not know the newest ones but writes a plain number as it is."""
    try:
        return gguf.GGMLQuantizationType(ggml_type)
    except ValueError:
        return ggml_type


def _deepened(shape: Shape, n_layer: int | None) -> Shape:
    if n_layer is None or n_layer == shape.n_layer:
        return shape
    if shape.architecture == "deepseek2":
        # llama.cpp takes 27 layers to mean the lite variant; at other depths queries go through a low rank.
        return replace(
            shape,
            n_layer=n_layer,
            parts=shape.parts.replace("mla-plain-query", "mla-query"),
            leading_parts=tuple(p.replace("mla-plain-query", "mla-query") for p in shape.leading_parts),
            keys={**shape.keys, "attention.q_lora_rank": "lora_q"},
            dimensions={**shape.dimensions, "lora_q": "1536"},
        )
    return replace(shape, n_layer=n_layer)


def _named_tensors(shape: Shape) -> Iterator[tuple[str, tuple[Axis, ...]]]:
    yield from OUTPUT.items()
    for number in range(shape.n_layer):
        parts = shape.leading_parts[number] if number < len(shape.leading_parts) else shape.parts
        yield from ((f"blk.{number}.{name}", axes) for name, axes in layer(parts).items())


def _type_of(name: str, ne: tuple[int, ...], shape: Shape, expert_type: str | None) -> int:
    """A ggml type: as quantizers of real models choose it, q8_0 where a row does not fit the usual one's blocks."""
    if EXPERT_TENSOR.search(name):
        usual = expert_type or shape.expert_type
    elif len(ne) == 1 or "_inp." in name or not name.endswith(".weight"):
        return F32
    elif name in OUTPUT:
        usual = shape.embedding_type
    else:
        usual = shape.dense_type
    fits = ne[0] % _ggml().ggml_blck_size(EXPERT_TYPES[usual]) == 0
    return EXPERT_TYPES[usual] if fits else FALLBACK


class SyntheticTensor:
    """A tensor that makes its bytes while it is written; it has the two members of an array that GGUFWriter uses."""

    def __init__(self, name: str, ne: tuple[int, ...], ggml_type: int, seed: int) -> None:
        self.name = name
        self.ne = ne
        self.ggml_type = ggml_type
        self.seed = seed
        self.row_bytes: int = _ggml().ggml_row_size(ggml_type, ne[0])
        self.n_rows = prod(ne[1:])

    @property
    def nbytes(self) -> int:
        """Size in the file, bytes."""
        return self.n_rows * self.row_bytes

    def tofile(self, file: BinaryIO) -> None:
        """Append all rows to a file."""
        if self.ggml_type == F32:
            _weights(self.name, self.ne, self.seed).tofile(file)
            return
        pool = _quantized_pool(self.name.split(".", 2)[-1] if self.name.startswith("blk.") else self.name, self)
        rng = np.random.default_rng([zlib.crc32(self.name.encode()), self.seed])
        left = self.n_rows
        while left:
            first = int(rng.integers(len(pool)))
            # np.take, because what fancy indexing returns is not contiguous and is written item by item.
            tile = np.take(pool[first : first + left], rng.permutation(pool.shape[1]), axis=1)
            tile.tofile(file)
            left -= len(tile)


# What attention adds to the residual stream is much the same for all tokens of a context. Unless it is small beside
# their embeddings, they all take the same few experts, which spares a cache most of its work.
_FACTORS = {"token_embd.weight": 8.0, "attn_output.weight": 0.1}

_POOLS: dict[tuple[str, int, int], Bytes] = {}


def _quantized_pool(kind: str, tensor: SyntheticTensor) -> Bytes:
    """Random rows of a kind of matrix: [rows, blocks of a row, bytes of a block]."""
    key = (kind, tensor.ggml_type, tensor.ne[0])
    if key not in _POOLS:
        ggml, row = _ggml(), tensor.ne[0]
        weights = _weights(kind, (row, min(POOL_ROWS, tensor.n_rows)), tensor.seed)
        weights *= _FACTORS.get(kind, 1.0)
        data = np.zeros((len(weights), tensor.row_bytes), dtype=np.int8)
        importance = np.ones(row, dtype=np.float32)  # the smallest I-quants refuse to work without one
        floats = ctypes.POINTER(ctypes.c_float)
        ggml.ggml_quantize_chunk(
            tensor.ggml_type,
            weights.ctypes.data_as(floats),
            data.ctypes.data,
            0,
            len(weights),
            row,
            importance.ctypes.data_as(floats),
        )
        _POOLS[key] = data.reshape(len(weights), row // ggml.ggml_blck_size(tensor.ggml_type), -1)
    return _POOLS[key]


def _add_tokenizer(writer: gguf.GGUFWriter, n_vocab: int) -> None:
    """A byte-level BPE of full size: bytes, control tokens, then every pair and many triples of letters."""
    # GPT-2 writes a byte that is no visible character as a character from 256 on.
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    letters = [chr(c) for c in visible] + [chr(256 + i) for i in range(256 - len(visible))]
    control = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    n_merged = n_vocab - len(letters) - len(control)
    if n_merged < 0:
        raise ValueError(f"a vocabulary of {n_vocab} does not hold {len(letters)} bytes and {len(control)} controls")
    merges = itertools.chain(
        itertools.product(letters, letters),
        ((a + b, c) for a, b, c in itertools.product(letters, letters, letters)),
    )
    pairs = list(itertools.islice(merges, n_merged))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(letters + control + [a + b for a, b in pairs])
    kinds = [gguf.TokenType.NORMAL, gguf.TokenType.CONTROL, gguf.TokenType.NORMAL]
    writer.add_token_types(
        [kind for kind, n in zip(kinds, (len(letters), len(control), n_merged), strict=True) for _ in range(n)]
    )
    writer.add_token_merges([f"{a} {b}" for a, b in pairs])
    writer.add_bos_token_id(256)
    writer.add_eos_token_id(256)
    writer.add_eot_token_id(258)
    writer.add_add_bos_token(False)


@click.command()
@click.argument("shape", type=click.Choice(list(SHAPES)))
@click.option("-o", "--output", type=click.Path(path_type=Path, dir_okay=False), required=True)
@click.option("--layers", type=click.IntRange(min=1), help="Depth; the real one if not given.")
@click.option("--vocab", type=click.IntRange(min=300), help="Tokens; the real number if not given.")
@click.option("--type", "expert_type", type=click.Choice(list(EXPERT_TYPES)), help="Type of the experts.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
def main(shape: str, output: Path, layers: int | None, vocab: int | None, expert_type: str | None, seed: int) -> None:
    """Write a model of a real SHAPE with random weights."""
    write_synthetic_model(output, shape, n_layer=layers, n_vocab=vocab, expert_type=expert_type, seed=seed)
    click.echo(f"{output}: {output.stat().st_size / 1e9:.2f} GB", err=True)


if __name__ == "__main__":
    main()
