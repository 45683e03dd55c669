"""Writes tiny MoE models with random weights: GGUF files that llama.cpp loads and decodes in milliseconds.

The same (name, seed, dimensions) gives the same weights on every machine, whatever type they are stored in.
"""

from __future__ import annotations

import ctypes
import re
import zlib
from collections.abc import Callable, Mapping
from functools import cache
from math import prod
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt
from tiny_architectures import DIMENSIONS, KEYS, TINY_ARCHITECTURES, Key, TinyArchitecture
from tiny_blocks import Axis, Tensors, layer

Floats = npt.NDArray[np.float32]

# ggml type ids by llama.cpp's names (ggml.h). gguf 0.19 does not know all of them.
EXPERT_TYPES: Mapping[str, int] = {
    "f32": 0, "f16": 1, "bf16": 30,
    "q4_0": 2, "q4_1": 3, "q5_0": 6, "q5_1": 7, "q8_0": 8,
    "q2_k": 10, "q3_k": 11, "q4_k": 12, "q5_k": 13, "q6_k": 14,
    "iq1_s": 19, "iq1_m": 29, "iq2_xxs": 16, "iq2_xs": 17, "iq2_s": 22, "iq3_xxs": 18, "iq3_s": 21,
    "iq4_nl": 20, "iq4_xs": 23,
    "tq1_0": 34, "tq2_0": 35, "mxfp4": 39, "nvfp4": 40, "q1_0": 41, "q2_0": 42,
}  # fmt: skip

# K-, I- and T-quants come in blocks of 256 along a row: dimensions for which every expert type fits.
# (Four experts are too few for deepseek2 and bailingmoe2, which choose among four groups first.)
WIDE: Mapping[str, int] = {"embd": 256, "head_dim": 64, "ff": 256, "ff_exp": 256, "expert": 4, "used": 2}

EXPERT_TENSOR = re.compile(r"ffn_(gate|up|down|gate_up)_exps\.weight$")

# How a tensor is drawn from standard normal numbers: the first pattern that its name contains.
# Everything else is a matrix that keeps the size of its input: N(0, 1/sqrt(fan-in)).
_DRAWS: tuple[tuple[str, Callable[[Floats], Floats]], ...] = (
    (r"ssm_a$", lambda noise: -np.exp(noise)),  # a decay rate: a positive one lets the state explode
    (r"norm.*\.weight|ssm_d$|\.scale|_scale", lambda noise: 1 + 0.1 * noise),
    (r"rope_f", lambda noise: 1 + noise**2),
    (r"\.bias|exp_probs_b|sinks", lambda noise: 0.1 * noise),
)
_GAINS = {"token_embd.weight": 8.0, "output.weight": 4.0, "ffn_gate_inp.weight": 2.0}

_CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_tiny_model(
    path: Path,
    name: str,
    *,
    seed: int = 0,
    expert_type: str | None = None,
    split: int | None = None,
    **dimensions: int,
) -> list[Path]:
    """Write a model of the named entry of `TINY_ARCHITECTURES` and return its files.

    Parameters
    ----------
    path
        The file to write. With `split` it names the set: `a.gguf` gives `a-00001-of-0000N.gguf` and so on.
    name
        Key of `TINY_ARCHITECTURES`.
    seed
        Another seed gives other weights.
    expert_type
        Key of `EXPERT_TYPES` for the expert tensors; all others are float32. Default: the architecture's own.
    split
        Largest number of tensors in one file. Default: a single file.
    dimensions
        Changes to `DIMENSIONS`, e.g. `embd=128` or `**WIDE`.
    """
    tiny = TINY_ARCHITECTURES[name]
    sizes: dict[str, Axis] = {**DIMENSIONS, **tiny.dimensions, **{k: str(v) for k, v in dimensions.items()}}
    writer = gguf.GGUFWriter(path, name, split_max_tensors=split or 0)
    writer.add_name(f"tiny {name}")
    writer.add_block_count(len(tiny.layers))
    for key, value in {**KEYS, **tiny.keys}.items():
        _add_key(writer, f"{name}.{key}", value, sizes)
    _add_tokenizer(writer, _size("vocab", sizes))
    for tensor, axes in _named_tensors(tiny).items():
        shape = tuple(_size(axis, sizes) for axis in axes)
        weights = _weights(f"{name}/{tensor}", shape, seed)
        if EXPERT_TENSOR.search(tensor):
            _add_quantized(writer, tensor, weights, expert_type or tiny.expert_type)
        elif tensor.endswith("tid2eid.weight"):
            writer.add_tensor(tensor, _experts_by_token(shape, _size("expert", sizes), seed))
        else:
            writer.add_tensor(tensor, weights)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return [path] if split is None else sorted(path.parent.glob(f"{path.stem}-*-of-*.gguf"))


def _named_tensors(tiny: TinyArchitecture) -> Tensors:
    blocks = {f"blk.{i}.{name}": axes for i, parts in enumerate(tiny.layers) for name, axes in layer(parts).items()}
    return tiny.output | blocks


def _size(axis: Axis, sizes: Mapping[str, Axis]) -> int:
    """The value of an expression like "2*embd+rot"; a dimension may be an expression itself."""

    def factor(text: str) -> int:
        return int(text) if text.isdigit() else _size(sizes[text], sizes)

    return sum(prod(map(factor, term.split("*"))) for term in axis.split("+"))


def _weights(name: str, shape: tuple[int, ...], seed: int) -> Floats:
    rng = np.random.default_rng([zlib.crc32(name.encode()), seed])
    noise = rng.standard_normal(shape[::-1], dtype=np.float32)
    for pattern, draw in _DRAWS:
        if re.search(pattern, name):
            return np.asarray(draw(noise), dtype=np.float32)
    gain = next((gain for end, gain in _GAINS.items() if name.endswith(end)), 1.0)
    return np.asarray(noise * gain / np.sqrt(shape[0]), dtype=np.float32)


def _experts_by_token(shape: tuple[int, ...], n_expert: int, seed: int) -> npt.NDArray[np.int32]:
    """DeepSeek V4's table of routes: different experts for each token, (n_vocab, n_expert_used)."""
    n_used, n_vocab = shape
    return np.random.default_rng(seed).random((n_vocab, n_expert)).argsort(axis=1)[:, :n_used].astype(np.int32)


def _add_key(writer: gguf.GGUFWriter, key: str, value: Key, sizes: Mapping[str, Axis]) -> None:
    match value:
        case bool():
            writer.add_bool(key, value)
        case int():
            writer.add_uint32(key, value)
        case float():
            writer.add_float32(key, value)
        case str():
            writer.add_uint32(key, _size(value, sizes))
        case list():
            writer.add_array(key, [_size(item, sizes) if isinstance(item, str) else item for item in value])


def _add_tokenizer(writer: gguf.GGUFWriter, n_vocab: int) -> None:
    """A byte-level BPE: 256 bytes, four control tokens, and merges of two bytes up to `n_vocab` tokens."""
    # GPT-2 writes a byte that is no visible character as a character from 256 on.
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in visible]
    letters = [chr(c) for c in visible] + [chr(256 + i) for i in range(len(hidden))]
    control = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"]
    pairs = [a + b for a in "etaoinshr" for b in "ndetr"][: n_vocab - len(letters) - len(control)]
    tokens = letters + control + pairs
    types = [gguf.TokenType.NORMAL] * n_vocab
    types[256 : 256 + len(control)] = [gguf.TokenType.CONTROL] * len(control)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([" ".join(pair) for pair in pairs])
    writer.add_bos_token_id(256)
    writer.add_eos_token_id(256)
    writer.add_eot_token_id(258)
    writer.add_pad_token_id(259)
    writer.add_add_bos_token(False)
    writer.add_chat_template(_CHAT_TEMPLATE)


@cache
def _ggml() -> ctypes.CDLL:
    from llama_cpp._ggml import libggml

    assert isinstance(libggml, ctypes.CDLL)
    libggml.ggml_row_size.restype = ctypes.c_size_t
    libggml.ggml_row_size.argtypes = [ctypes.c_int, ctypes.c_int64]
    libggml.ggml_blck_size.restype = ctypes.c_int64
    floats = ctypes.POINTER(ctypes.c_float)
    libggml.ggml_quantize_chunk.restype = ctypes.c_size_t
    libggml.ggml_quantize_chunk.argtypes = [
        ctypes.c_int, floats, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, floats,
    ]  # fmt: skip
    return libggml


def _add_quantized(writer: gguf.GGUFWriter, name: str, weights: Floats, expert_type: str) -> None:
    ggml, type_id, row = _ggml(), EXPERT_TYPES[expert_type], weights.shape[-1]
    if row % ggml.ggml_blck_size(type_id):
        raise ValueError(f"{name}: rows of {row} do not fit {expert_type} blocks of {ggml.ggml_blck_size(type_id)}")
    n_rows = weights.size // row
    # int8, because gguf works out the shape of uint8 data itself, which fails for types it does not know.
    data = np.zeros(n_rows * ggml.ggml_row_size(type_id, row), dtype=np.int8)
    floats = ctypes.POINTER(ctypes.c_float)
    importance = np.ones(row, dtype=np.float32)  # the smallest I-quants refuse to work without one
    ggml.ggml_quantize_chunk(
        type_id,
        weights.ctypes.data_as(floats),
        data.ctypes.data,
        0,
        n_rows,
        row,
        importance.ctypes.data_as(floats),
    )
    writer.add_tensor(name, data, raw_shape=weights.shape, raw_dtype=type_id)
