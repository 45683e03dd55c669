"""Loss curves of layers, measured on tiny models."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tiny_models import write_tiny_model

from edgemoe.backend import Llama
from edgemoe.errors import AllocationError, BudgetError
from edgemoe.expert_set import ExpertLayers
from edgemoe.perplexity import measure
from edgemoe.sensitivity import cut_layer, default_sizes, sensitivity


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sensitivity") / "tiny.gguf"
    write_tiny_model(path, "qwen3moe")
    return path


def opened(path: Path) -> Llama:
    return Llama(str(path), ram="1GiB", n_ctx=64, n_threads=1, n_threads_batch=1, logits_all=True)


def scores_for(layers: ExpertLayers) -> np.ndarray:
    return np.random.default_rng(1).random((len(layers.numbers), layers.n_expert))


def layers_of(n_expert: int, used: int, n_group: int = 1, n_group_used: int = 1) -> ExpertLayers:
    return ExpertLayers((0, 1, 2), n_expert, (used,) * 3, (100,) * 3, n_group, n_group_used)


def test_curves_are_the_divergence_of_each_layer_cut_alone(model: Path) -> None:
    with opened(model) as llama:
        layers = ExpertLayers.of(llama.index)
        scores = scores_for(layers)
        sizes = (max(layers.floor), layers.n_expert - 1)
        text = [np.random.default_rng(seed).integers(0, llama.n_vocab(), 40).tolist() for seed in range(2)]
        seen: list[tuple[int, int]] = []
        curves = sensitivity(llama, text, scores, layers, sizes, lambda done, total: seen.append((done, total)))
        assert curves.sizes == (*sizes, layers.n_expert)
        assert (curves.loss[:, -1] == 0).all() and (curves.loss[:, 0] > 0).all()
        for row in range(len(layers.numbers)):
            (alone,) = measure(llama, text, [cut_layer(scores, layers, row, sizes[0])])
            assert curves.loss[row, 0] == pytest.approx(alone.kl, rel=1e-6)
        total = 2 * (1 + len(layers.numbers) * len(sizes))
        assert seen == [(done, total) for done in range(1, total + 1)]


def test_a_cut_leaves_all_other_layers_whole() -> None:
    layers = layers_of(16, 2)
    scores = scores_for(layers)
    cut = cut_layer(scores, layers, 1, 5)
    assert cut.sizes == (16, 5, 16)
    assert set(cut.kept[1]) == set(np.argsort(-scores[1])[:5].tolist())
    assert "layer 1 alone" in cut.why


def test_groups_keep_equally_many() -> None:
    layers = layers_of(16, 4, n_group=4, n_group_used=2)
    kept = cut_layer(scores_for(layers), layers, 2, 8).kept[2]
    assert [sum(expert // 4 == group for expert in kept) for group in range(4)] == [2, 2, 2, 2]
    assert default_sizes(layers) == (8, 12)


@pytest.mark.parametrize(
    ("layers", "sizes"),
    [
        (layers_of(32, 4), (4, 8, 12, 16, 24)),
        (layers_of(128, 8), (16, 32, 48, 64, 96)),
        (layers_of(64, 20), (20, 24, 32, 48)),
        (layers_of(8, 2), (2, 3, 4, 6)),
        (layers_of(4, 4), ()),
    ],
)
def test_sizes_lie_between_what_routing_needs_and_the_whole_layer(layers: ExpertLayers, sizes: tuple[int, ...]) -> None:
    assert default_sizes(layers) == sizes


def test_nothing_to_measure(model: Path) -> None:
    with opened(model) as llama:
        layers = ExpertLayers.of(llama.index)
        for text, sizes in (([], (4,)), ([[1, 2, 3]], ())):
            with pytest.raises(AllocationError, match="nothing to measure"):
                sensitivity(llama, text, scores_for(layers), layers, sizes)
        with pytest.raises(BudgetError, match="too small"):
            sensitivity(llama, [[1, 2, 3]], scores_for(layers), layers, (1,))


def test_interrupted_measurement_raises_and_lifts_the_limit(model: Path) -> None:
    with opened(model) as llama:
        layers = ExpertLayers.of(llama.index)
        text = [[1, 2, 3, 4, 5, 6, 7, 8]]

        def stop(done: int, total: int) -> None:
            if done == 3:
                raise KeyboardInterrupt

        def logits() -> np.ndarray:
            llama.reset()
            llama.eval(text[0])
            return llama.scores[:8].copy()

        before = logits()
        with pytest.raises(KeyboardInterrupt):
            sensitivity(llama, text, scores_for(layers), layers, (4, 6), stop)
        assert np.array_equal(logits(), before)
