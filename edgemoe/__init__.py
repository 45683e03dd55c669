"""edgemoe: run Mixture-of-Experts GGUF models inside the RAM you give them.

Names are resolved on first use, so that ``import edgemoe`` costs nothing and only running a model imports llama.cpp.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgemoe.backend import Llama, plan_model
    from edgemoe.chat import ChatSession, Sampling
    from edgemoe.errors import EdgemoeError
    from edgemoe.index import ExpertIndex, read_index
    from edgemoe.plan import ExpertPlan

__all__ = ["ChatSession", "EdgemoeError", "ExpertIndex", "ExpertPlan", "Llama", "Sampling", "plan_model", "read_index"]

_HOME = {
    "ChatSession": "chat",
    "EdgemoeError": "errors",
    "ExpertIndex": "index",
    "ExpertPlan": "plan",
    "Llama": "backend",
    "Sampling": "chat",
    "plan_model": "backend",
    "read_index": "index",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
