"""Does a text find its task? Accuracy, confusion and rejection of `edgemoe.matcher` on held-out documents.

    python -m benchmarks.matcher_accuracy trace ../shared/models/tiny-moe/tiny-moe-q8_0.gguf \
        ../shared/models/tiny-moe/eval/calib ../shared/models/tiny-moe/eval --traces traces
    python -m benchmarks.matcher_accuracy compare --traces traces --out benchmarks/results/matcher-tiny-moe

`trace` writes one file of shares for each part and task; `compare` reads nothing else. Tasks are the .jsonl files of
the calibration folder. Thresholds and metrics are fitted on calibration text alone; held-out text is only measured.
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import json
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import numpy as np
from sklearn.neighbors import KNeighborsClassifier

from benchmarks.measurements import say
from edgemoe.bench_machine import describe
from edgemoe.matcher import Metric, TaskDocuments, TaskMatcher
from edgemoe.routing_space import Space

LENGTHS = (512, 128, 32)
SHORTEST = 48  # tokens; shorter documents are left out
PER_TASK = 20  # documents of a task in the figures; "all" counts all
FEATURES = ("weights", "choices")
NEIGHBOURS = (1, 3, 5)


def routed_logits(model: Path, n_ctx: int) -> tuple[Any, Any]:
    """Plain llama.cpp and a function from text to router logits [L, T, N], of all layers and tokens."""
    import llama_cpp
    from llama_cpp import _ggml
    from llama_cpp import llama_cpp as c

    from edgemoe.index import read_index

    library = getattr(_ggml, "libggml_base", None) or _ggml.libggml
    library.ggml_get_name.restype, library.ggml_get_name.argtypes = ctypes.c_char_p, [ctypes.c_void_p]
    library.ggml_get_data.restype, library.ggml_get_data.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
    library.ggml_nelements.restype, library.ggml_nelements.argtypes = ctypes.c_int64, [ctypes.c_void_p]
    n_expert = read_index(model).n_expert
    seen: dict[int, np.ndarray] = {}

    @c.ggml_backend_sched_eval_callback
    def look(tensor: int, ask: bool, _: object) -> bool:
        name = library.ggml_get_name(tensor)
        if not name.startswith(b"ffn_moe_logits-"):
            return not ask
        if not ask:
            data = ctypes.cast(library.ggml_get_data(tensor), ctypes.POINTER(ctypes.c_float))
            values = np.ctypeslib.as_array(data, (library.ggml_nelements(tensor),))
            seen[int(name.split(b"-")[1])] = values.reshape(-1, n_expert).copy()
        return True

    defaults = c.llama_context_default_params

    def with_callback() -> Any:
        params = defaults()
        params.cb_eval = look
        return params

    c.llama_context_default_params = with_callback
    llama = llama_cpp.Llama(
        str(model), logits_all=True, n_ctx=n_ctx, n_batch=n_ctx, n_ubatch=n_ctx, n_threads=2, verbose=False
    )

    def logits(text: str) -> np.ndarray:
        llama.reset()
        llama._ctx.kv_cache_clear()
        seen.clear()
        llama.eval(llama.tokenize(text.encode(), add_bos=False, special=True)[:n_ctx])
        return np.stack([seen[layer] for layer in sorted(seen)])

    return look, logits


def shares(logits: np.ndarray, n_used: int, feature: str) -> np.ndarray:
    """Mean over tokens of the weights of the chosen experts, or of the choices, [L, N]."""
    chosen = np.argsort(-logits, axis=2, kind="stable")[..., :n_used]
    values = np.take_along_axis(logits, chosen, 2)
    weights = np.exp(values - values[..., :1])
    weights /= weights.sum(2, keepdims=True)
    result = np.zeros_like(logits)
    np.put_along_axis(result, chosen, weights if feature == "weights" else 1 / n_used, 2)
    return result.mean(1)


def trace(model: Path, calibration: Path, held_out: Path, folder: Path) -> None:
    """Shares of the beginnings of all documents, one file for each part and task; files that are there stay."""
    from edgemoe.index import read_index

    n_used = max(read_index(model).n_expert_used)
    callback, logits = routed_logits(model, LENGTHS[0])
    folder.mkdir(parents=True, exist_ok=True)
    for part, source in (("calibration", calibration), ("held-out", held_out)):
        for path in sorted(calibration.glob("*.jsonl")):
            if (folder / f"{part}.{path.stem}.npz").exists():
                continue
            rows: dict[str, list[Any]] = {name: [] for name in (*FEATURES, "tokens", "document", "length")}
            # Not splitlines, which splits at the line separators of Unicode too.
            for number, line in enumerate((source / path.name).read_text().rstrip("\n").split("\n")):
                routed = logits(json.loads(line)["text"])
                for length in LENGTHS if routed.shape[1] >= SHORTEST else ():
                    for feature in FEATURES:
                        rows[feature].append(shares(routed[:, :length], n_used, feature).astype(np.float16))
                    rows["tokens"].append(min(length, routed.shape[1]))
                    rows["document"].append(number)
                    rows["length"].append(length)
            arrays = {name: np.array(values) for name, values in rows.items()}
            np.savez(folder / f"{part}.{path.stem}.npz", **arrays)  # type: ignore[arg-type]
            say(f"{part} {path.stem}: {len(rows['tokens']) // len(LENGTHS)} documents")
    description = describe(model)
    (folder / "model.json").write_text(json.dumps(description))
    del callback


class Traces:
    """What `trace` wrote."""

    def __init__(self, folder: Path) -> None:
        self.model = json.loads((folder / "model.json").read_text())
        self._parts = {
            part: {path.name.split(".")[1]: dict(np.load(path)) for path in sorted(folder.glob(f"{part}.*.npz"))}
            for part in ("calibration", "held-out")
        }
        self.tasks = list(self._parts["calibration"])
        self.n_layers = self._parts["calibration"][self.tasks[0]]["weights"].shape[1]

    def views(self) -> dict[str, tuple[int, ...]]:
        every = tuple(range(self.n_layers))
        return {"all layers": every, "all but the last": every[:-1], "first layer": every[:1]}

    def documents(self, feature: str, count: int = 1 << 30) -> dict[str, TaskDocuments]:
        """Stored documents of each task, the first `count`."""
        found = {}
        for task, rows in self._parts["calibration"].items():
            kept = np.isin(rows["document"], np.unique(rows["document"])[:count])
            found[task] = TaskDocuments(rows[feature][kept], rows["tokens"][kept], rows["document"][kept])
        return found

    def whole(self, feature: str) -> tuple[np.ndarray, np.ndarray]:
        """All stored documents at their full length, and their tasks."""
        found = {task: rows[feature][rows["length"] == LENGTHS[0]] for task, rows in self._parts["calibration"].items()}
        return np.concatenate(list(found.values())), np.repeat(list(found), [len(rows) for rows in found.values()])

    def held_out(self, feature: str, length: int, every: bool) -> Iterator[tuple[str, np.ndarray, int]]:
        for task, rows in self._parts["held-out"].items():
            chosen = np.flatnonzero(rows["length"] == length)
            for row in chosen if every else chosen[:PER_TASK]:
                yield task, rows[feature][row], int(rows["tokens"][row])


def ask(matcher: TaskMatcher, traces: Traces, feature: str, length: int, every: bool = False) -> list[tuple[str, Any]]:
    """True task and match of each held-out document."""
    layers = list(matcher.layers)
    return [(task, matcher.match(v[layers], n)) for task, v, n in traces.held_out(feature, length, every)]


def share(hits: list[bool]) -> float:
    return sum(hits) / max(len(hits), 1)


def say_row(row: dict[str, Any]) -> None:
    figures = "  ".join(f"{row[str(n)]:6.1%} ({row[f'{n} of all']:6.1%})" for n in LENGTHS)
    say(f"{row['feature']:8} {row['view']:17} {row['metric']:14} {row['nearest']:11} {figures}")


def accuracy(traces: Traces) -> list[dict[str, Any]]:
    """Every metric, view, feature and length; rejected documents of stored tasks count as false rejections."""
    rows = []
    for feature in FEATURES:
        for view, layers in traces.views().items():
            for metric in get_args(Metric):
                matcher = TaskMatcher(traces.documents(feature), layers, metric)
                row: dict[str, Any] = {"feature": feature, "view": view, "metric": metric, "nearest": "mean"}
                for length in LENGTHS:
                    for name, every in (("", False), (" of all", True)):
                        found = ask(matcher, traces, feature, length, every)
                        row[f"{length}{name}"] = share([task == match.nearest for task, match in found])
                        row[f"{length}{name} false rejections"] = share([match.task is None for _, match in found])
                rows.append(row)
                say_row(row)
    return rows


def votes(traces: Traces) -> list[dict[str, Any]]:
    """Votes of the nearest stored documents instead of the nearest mean, by their inverse distances; all layers."""
    rows = []
    stored, names = traces.whole("weights")
    for metric in get_args(Metric):
        space = Space(metric, metric == "whitened")
        if space.whiten:
            space.span(stored)
        points, _ = space.place(stored)
        geometry = space.fit(points, np.unique(names, return_inverse=True)[1])
        for k in NEIGHBOURS:
            classifier = KNeighborsClassifier(
                k, weights="distance", metric="cosine" if metric == "cosine" else "euclidean", algorithm="brute"
            ).fit(geometry.compared(points), names)
            nearest = f"{k} document{'s' * (k > 1)}"
            row: dict[str, Any] = {"feature": "weights", "view": "all layers", "metric": metric, "nearest": nearest}
            for length in LENGTHS:
                for name, every in (("", False), (" of all", True)):
                    tasks, vectors, _ = zip(*traces.held_out("weights", length, every), strict=True)
                    asked, _ = space.place(np.stack(vectors))
                    found = classifier.predict(geometry.compared(asked))
                    row[f"{length}{name}"] = share(list(found == np.array(tasks)))
            rows.append(row)
            say_row(row)
    return rows


def rejection(traces: Traces, feature: str, metric: Metric, layers: tuple[int, ...]) -> list[dict[str, Any]]:
    """Each task left out of the store in turn: how many of its documents are rejected, and how many of the others."""
    rows = []
    for left_out in traces.tasks:
        documents = traces.documents(feature)
        del documents[left_out]
        matcher = TaskMatcher(documents, layers, metric)
        row: dict[str, Any] = {"feature": feature, "metric": metric, "layers": len(layers), "left out": left_out}
        for length in LENGTHS:
            found = ask(matcher, traces, feature, length)
            known = np.array([match.oddness - match.threshold for task, match in found if task != left_out])
            unknown = np.array([match.oddness - match.threshold for task, match in found if task == left_out])
            row[f"{length} rejected"] = float((unknown > 0).mean())
            row[f"{length} false"] = float((known > 0).mean())
            # With the threshold that held-out text itself would give: not reachable, a measure of the score alone.
            row[f"{length} rejected at 5 %"] = float((unknown > np.quantile(known, 0.95)).mean())
        rows.append(row)
    means = {key: statistics.fmean(row[key] for row in rows) for key in rows[0] if str(key)[0].isdigit()}
    rows.append({**rows[0], "left out": "mean", **means})
    figures = "   ".join(
        f"{n}: {means[f'{n} rejected']:4.0%} / {means[f'{n} false']:5.1%} / {means[f'{n} rejected at 5 %']:4.0%}"
        for n in LENGTHS
    )
    say(f"{feature:8} {len(layers)} layers {metric:14} rejected / false / rejected at 5 %   {figures}")
    return rows


def few_documents(traces: Traces, feature: str) -> list[dict[str, Any]]:
    """What is left with fewer stored documents."""
    rows = []
    for count in (40, 20, 10, 5, 3, 2, 1):
        matcher = TaskMatcher(traces.documents(feature, count))
        row: dict[str, Any] = {"documents a task": count}
        for length in LENGTHS:
            found = ask(matcher, traces, feature, length)
            row[str(length)] = share([task == match.nearest for task, match in found])
            row[f"{length} false rejections"] = share([match.task is None for _, match in found])
        rows.append(row)
        figures = [f"{row[str(n)]:6.1%} ({row[f'{n} false rejections']:5.1%})" for n in LENGTHS]
        say(f"{count:3} documents a task: accuracy (false rejections) {'  '.join(figures)}")
    return rows


def confusion(traces: Traces, feature: str) -> list[dict[str, Any]]:
    """How many documents of each task have which nearest, of all layers in the default metric."""
    table = []
    matcher = TaskMatcher(traces.documents(feature))
    for length in LENGTHS:
        rows: dict[str, dict[str, Any]] = {
            task: {"tokens": length, "task": task, **dict.fromkeys(traces.tasks, 0)} for task in traces.tasks
        }
        for task, match in ask(matcher, traces, feature, length):
            rows[task][match.nearest] += 1
        table += rows.values()
    for row in table:
        say(f"{row['tokens']:4} {row['task']:12} " + ", ".join(f"{t} {row[t]}" for t in traces.tasks if row[t]))
    return table


def seconds(traces: Traces) -> dict[str, float]:
    """Fitting and matching: these tasks, and random ones of larger models (12 tasks of 40 documents)."""
    result = {}
    stores = {"traced": traces.documents("weights")}
    random = np.random.default_rng(0)
    for n_layers, n_expert in ((48, 128), (58, 256)):
        kinds = random.dirichlet(np.full(n_expert, 0.3), (12, n_layers))
        stores[f"{n_layers}x{n_expert}"] = {
            f"task{place}": TaskDocuments(
                (kind * random.uniform(0.5, 1.5, (120, n_layers, n_expert))).astype(np.float16),
                np.tile(LENGTHS, 40),
                np.repeat(np.arange(40), 3),
            )
            for place, kind in enumerate(kinds)
        }
    for name, documents in stores.items():
        started = time.perf_counter()
        matcher = TaskMatcher(documents)
        result[f"{name} fit"] = time.perf_counter() - started
        vector = next(iter(documents.values())).shares[0]
        spent = []
        for _ in range(30):
            started = time.perf_counter()
            matcher.match(vector, 512)
            spent.append(time.perf_counter() - started)
        result[f"{name} match"] = statistics.median(spent)
        say(f"{name}: fitted in {result[f'{name} fit']:.2f} s, matched in {result[f'{name} match'] * 1e3:.2f} ms")
    return result


def write_table(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()} for row in rows)


def compare(folder: Path, out: Path) -> None:
    """All tables, to standard error and to files."""
    traces = Traces(folder)
    views = traces.views()
    tables = {
        "accuracy": accuracy(traces) + votes(traces),
        "rejection": [
            *(row for metric in get_args(Metric) for row in rejection(traces, "weights", metric, views["all layers"])),
            *rejection(traces, "weights", "whitened", views["all but the last"]),
            *rejection(traces, "weights", "whitened", views["first layer"]),
        ],
        "confusion": confusion(traces, "weights"),
        "documents": few_documents(traces, "weights"),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    for name, rows in tables.items():
        write_table(out.with_name(f"{out.name}-{name}.csv"), rows)
    out.with_suffix(".json").write_text(
        json.dumps({"machine": traces.model, "seconds": seconds(traces)}, indent=1) + "\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    tracing = commands.add_parser("trace")
    tracing.add_argument("model", type=Path)
    tracing.add_argument("calibration", type=Path)
    tracing.add_argument("held_out", type=Path)
    comparing = commands.add_parser("compare")
    comparing.add_argument("--out", type=Path, required=True)
    for command in (tracing, comparing):
        command.add_argument("--traces", type=Path, required=True)
    options = parser.parse_args()
    if options.command == "trace":
        trace(options.model, options.calibration, options.held_out, options.traces)
    else:
        compare(options.traces, options.out)


if __name__ == "__main__":
    sys.exit(main())
