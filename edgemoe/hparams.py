"""The numbers of a model's routing, read from GGUF metadata and checked as llama.cpp checks them.

llama.cpp enforces most of these with assertions that end the process, so what it would abort on is refused
here with a sentence (source: `llama_model_base::load_hparams`).
"""

from __future__ import annotations

import functools
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import NoReturn

from edgemoe.errors import ModelFileError, UnknownArchitectureError
from edgemoe.gguf_header import ArraySummary, GGUFHeader, show

__all__ = ["HParams", "read_architecture", "read_hparams"]

_MAX_LAYERS = 512  # LLAMA_MAX_LAYERS
_MAX_EXPERTS = 1024  # LLAMA_MAX_EXPERTS
_UINT32_MAX = (1 << 32) - 1

# Architectures that the pinned llama.cpp loads (LLM_ARCH_NAMES) and gguf 0.19 does not list.
_NEWER_ARCHITECTURES = frozenset(
    {
        "bailingmoe3",
        "cohere2moe",
        "deepseek32",
        "deepseek4",
        "dflash",
        "dots3note",
        "eagle3",
        "gemma4-assistant",
        "glm5-next",
        "granite_swa",
        "graniteswitch",
        "hrm_text",
        "hy_v3",
        "hy_v4",
        "kimi-k3",
        "laguna",
        "maple",
        "mellum",
        "minimax-01",
        "minimax-m3",
        "muse-glimmer",
        "nanbeige",
        "pockettts",
        "qwen3tts",
        "qwen4exp",
        "spark2_5",
        "talkie",
    }
)


@dataclass(frozen=True, slots=True)
class HParams:
    """Hyperparameters under llama.cpp's names; see `edgemoe.index.ExpertIndex` for what they mean.

    Attributes
    ----------
    n_layer_all : int
        All layers of the file (``block_count``), trailing next-token-prediction layers included.
    n_layer : int
        Layers that llama.cpp runs.
    """

    name: str
    n_layer_all: int
    n_layer: int
    n_expert: int
    n_expert_used: tuple[int, ...]
    n_expert_shared: int
    n_expert_group: int
    n_group_used: int
    leading_dense: int
    context_length: int
    n_vocab: int
    n_embd: int
    has_chat_template: bool


def read_architecture(header: GGUFHeader) -> str:
    """Architecture of a model, checked against those the pinned llama.cpp loads.

    Raises
    ------
    UnknownArchitectureError
        If it is not one of them.
    ModelFileError
        If the file does not name one.
    """
    from gguf.constants import Keys

    architecture = header.metadata.get(Keys.General.ARCHITECTURE)
    if not isinstance(architecture, str):
        _refuse(header, f"has no {Keys.General.ARCHITECTURE} text")
    if architecture not in _architectures():
        raise UnknownArchitectureError(
            f"{header.path} has architecture {show(architecture)}, which the llama.cpp of this edgemoe"
            " does not load; use a newer edgemoe or another model"
        )
    return architecture


@functools.cache
def _architectures() -> frozenset[str]:
    from gguf.constants import MODEL_ARCH_NAMES

    return _NEWER_ARCHITECTURES | set(MODEL_ARCH_NAMES.values())


def read_hparams(header: GGUFHeader, architecture: str, tensor_names: AbstractSet[str]) -> HParams:
    """Read and check what the metadata says about layers and experts.

    Parameters
    ----------
    header : GGUFHeader
        First file of a Mixture-of-Experts model.
    architecture : str
        Its architecture.
    tensor_names : set of str
        Names of the tensors of all its files.

    Returns
    -------
    HParams
        Values that llama.cpp accepts.

    Raises
    ------
    ModelFileError
        If one is missing, out of range or contradicts another.
    """
    from gguf.constants import Keys

    keys = _Keys(header, architecture)
    n_layer_all = keys.integer(Keys.LLM.BLOCK_COUNT, low=1, high=_MAX_LAYERS)
    n_layer = n_layer_all - keys.integer(Keys.LLM.NEXTN_PREDICT_LAYERS, high=n_layer_all, default=0)
    # deepseek4 runs them as ordinary layers when the prediction head was left out of the file.
    if architecture == "deepseek4" and f"blk.{n_layer}.nextn.eh_proj.weight" not in tensor_names:
        n_layer = n_layer_all
    n_expert = keys.integer(Keys.LLM.EXPERT_COUNT, low=1, high=_MAX_EXPERTS)
    n_expert_used = keys.per_layer(Keys.LLM.EXPERT_USED_COUNT, n_layer_all, high=n_expert)
    n_group = keys.integer(Keys.LLM.EXPERT_GROUP_COUNT, high=n_expert - 1, default=0)
    n_group_used = keys.integer(Keys.LLM.EXPERT_GROUP_USED_COUNT, default=0)
    if n_group > 1 and (n_expert % n_group or not 0 < n_group_used < n_group):
        _refuse(header, f"routes {n_expert} experts by {n_group_used} of {n_group} groups, which is impossible")
    return HParams(
        name=_printable(header.metadata.get(Keys.General.NAME)) or header.path.stem,
        n_layer_all=n_layer_all,
        n_layer=n_layer,
        n_expert=n_expert,
        n_expert_used=n_expert_used[:n_layer],
        n_expert_shared=keys.integer(Keys.LLM.EXPERT_SHARED_COUNT, default=0),
        n_expert_group=n_group,
        n_group_used=n_group_used,
        leading_dense=keys.integer(Keys.LLM.LEADING_DENSE_BLOCK_COUNT, default=0),
        context_length=keys.integer(Keys.LLM.CONTEXT_LENGTH, low=1),
        n_vocab=_n_vocab(header, keys),
        n_embd=keys.integer(Keys.LLM.EMBEDDING_LENGTH, low=1),
        has_chat_template=bool(header.metadata.get(Keys.Tokenizer.CHAT_TEMPLATE)),
    )


def _n_vocab(header: GGUFHeader, keys: _Keys) -> int:
    from gguf.constants import Keys

    tokens = header.metadata.get(Keys.Tokenizer.LIST)
    return tokens.length if isinstance(tokens, ArraySummary) else keys.integer(Keys.LLM.VOCAB_SIZE, default=0)


def _printable(text: object) -> str:
    """Text of a file with nothing in it that could play tricks on a terminal."""
    return "".join(c if c.isprintable() else " " for c in text).strip() if isinstance(text, str) else ""


def _refuse(header: GGUFHeader, found: str) -> NoReturn:
    raise ModelFileError(f"{header.path} {found}; download or convert it again")


class _Keys:
    """The metadata keys of one architecture."""

    def __init__(self, header: GGUFHeader, architecture: str) -> None:
        self._header = header
        self._architecture = architecture

    def integer(self, key: str, *, low: int = 0, high: int = _UINT32_MAX, default: int | None = None) -> int:
        key = key.format(arch=self._architecture)
        return self._checked(key, self._header.metadata.get(key, default), low, high)

    def per_layer(self, key: str, n_layer: int, *, high: int) -> tuple[int, ...]:
        """One value for all layers or an array with one per layer; at least one must not be 0."""
        key = key.format(arch=self._architecture)
        value = self._header.metadata.get(key)
        if not isinstance(value, tuple):
            return (self._checked(key, value, 1, high),) * n_layer
        if len(value) != n_layer:
            _refuse(self._header, f"has {len(value)} values of {key}, expected one for each of {n_layer} layers")
        counts = tuple(self._checked(key, item, 0, high) for item in value)
        if not any(counts):
            _refuse(self._header, f"has {key} 0 in every layer, expected at least 1 in some")
        return counts

    def _checked(self, key: str, value: object, low: int, high: int) -> int:
        if value is None:
            _refuse(self._header, f"has no {key}")
        # bool is an int to Python, not to GGUF.
        if type(value) is not int or not low <= value <= high:
            _refuse(self._header, f"has {key} {show(str(value))}, expected an integer from {low} to {high}")
        return value
