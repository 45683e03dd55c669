"""Makes small random patterns; the same arguments give the same pattern."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edgemoe.evidence import DocumentShares, QualityRow, Source
from edgemoe.fingerprint import ModelFingerprint, fingerprint
from edgemoe.index import read_index
from edgemoe.loss_curves import LossCurves
from edgemoe.pattern import Pattern, make_pattern
from edgemoe.patterns import PatternStore

ROW = QualityRow("2/4", "uniform", "peu", 4.0, 12.5, 0.03, 0.01, None, "held-out text of maths", 3)


def tiny_model(n_layers: int = 3, n_expert: int = 8, *, router: str = "a", quantization: str = "b") -> ModelFingerprint:
    """A model whose first layer is dense; `router` and `quantization` are the digit that fills its hashes."""
    layers, used = tuple(range(1, n_layers + 1)), (min(2, n_expert),) * n_layers
    label = f"Q_{quantization}"
    return ModelFingerprint(router * 64, quantization * 64, "qwen3moe", f"tiny {router}", label, layers, n_expert, used)


def random_scores(model: ModelFingerprint, seed: int = 0) -> npt.NDArray[np.float32]:
    shape = (len(model.layers), model.n_expert)
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def random_documents(model: ModelFingerprint, n: int, *, seed: int = 0) -> DocumentShares:
    """n documents of two pieces each."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(10, 99, n)
    return DocumentShares(
        document=np.repeat(np.arange(n), 2).astype(np.int32),
        tokens=np.stack([tokens, tokens // 2], 1).ravel().astype(np.int32),
        shares=rng.random((2 * n, len(model.layers), model.n_expert)).astype(np.float16),
    )


def tiny_pattern(
    task: str = "maths",
    model: ModelFingerprint | None = None,
    *,
    scores: Mapping[str, npt.NDArray[np.float32]] | None = None,
    n_tokens: int = 100,
    n_documents: int = 2,
    measured: bool = True,
    seed: int = 0,
) -> Pattern:
    """A pattern ranked by the first of its scores, by default with all there can be in one."""
    model = model or tiny_model()
    scores = scores or {"peu": random_scores(model, seed), "frequency": abs(random_scores(model, seed + 1))}
    sensitivity = None
    if measured:
        loss = np.tile([0.5, 0.25, 0.0], (len(model.layers), 1))
        loss[-1] = np.nan  # not measured
        sensitivity = LossCurves((2, 4, model.n_expert), loss)
    return make_pattern(
        task,
        model,
        next(iter(scores)),
        scores,
        Source(task, "c" * 64, n_documents, n_tokens, chat_template=True, answers=True),
        random_documents(model, n_documents, seed=seed),
        sensitivity,
        (ROW,) if measured else (),
    )


def stored_patterns(path: Path, folder: Path, *tasks: str) -> Path:
    """A folder with random tasks of a model file, `maths` and `law` unless others are named."""
    model = fingerprint(read_index(path))
    store = PatternStore(model, folder)
    for number, task in enumerate(tasks or ("maths", "law")):
        mass = np.random.default_rng(number).random((len(model.layers), model.n_expert), dtype=np.float32)
        store.save(tiny_pattern(task, model, scores={"peu": mass}, measured=False, seed=number))
    return folder
