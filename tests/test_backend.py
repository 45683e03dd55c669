"""`edgemoe.Llama` is `llama_cpp.Llama`: each feature gives the same result on both, and failures are named."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
from plain_llama import TINY_MOE, arena_share, logits, plain_llama
from tiny_models import write_tiny_model

from edgemoe import llama_library
from edgemoe.backend import Llama, plan_model
from edgemoe.errors import BackendError, BudgetError, EdgemoeError, StoreError
from edgemoe.plan import ExpertPlan

SETTINGS: dict[str, Any] = {"n_ctx": 512, "n_ubatch": 64, "n_threads": 1, "n_threads_batch": 1, "seed": 5}
SHAPE = {"n_ctx": 512, "n_ubatch": 64}
PROMPT = "def read(path):\n    "


@pytest.fixture(scope="module")
def ours() -> Iterator[Llama]:
    with arena_share(0.25):
        llama = Llama(str(TINY_MOE), logits_all=True, **SETTINGS)
    with llama:
        yield llama


@pytest.fixture(scope="module")
def plain() -> Iterator[llama_cpp.Llama]:
    llama = plain_llama(TINY_MOE, logits_all=True, **SETTINGS)
    yield llama
    llama.close()


def without_id(answer: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in answer.items() if key not in ("id", "created")}


def test_completion_with_sampling_and_logprobs(ours: Llama, plain: llama_cpp.Llama) -> None:
    options = {"max_tokens": 32, "temperature": 0.9, "seed": 11, "logprobs": 3}
    found, expected = ours(PROMPT, **options), plain(PROMPT, **options)
    assert without_id(found) == without_id(expected)
    assert found["usage"]["completion_tokens"] > 0


def test_chat_with_the_model_s_own_template(ours: Llama, plain: llama_cpp.Llama) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is a river?"}]
    options = {"messages": messages, "max_tokens": 24, "temperature": 0.0}
    assert without_id(ours.create_chat_completion(**options)) == without_id(plain.create_chat_completion(**options))
    assert ours.chat_format == plain.chat_format


def test_streaming_is_the_whole_answer_in_pieces(ours: Llama) -> None:
    options: dict[str, Any] = {"max_tokens": 24, "temperature": 0.0}
    whole = ours(PROMPT, **options)["choices"][0]["text"]
    pieces = [piece["choices"][0]["text"] for piece in ours(PROMPT, stream=True, **options)]
    assert len(pieces) > 4
    assert "".join(pieces) == whole


def test_grammar(ours: Llama, plain: llama_cpp.Llama) -> None:
    grammar = llama_cpp.LlamaGrammar.from_string('root ::= "yes" | "no, " [0-9]+', verbose=False)
    options = {"max_tokens": 12, "temperature": 0.0, "grammar": grammar}
    found = ours("Is it?", **options)["choices"][0]["text"]
    assert found == plain("Is it?", **options)["choices"][0]["text"]
    assert found.startswith(("yes", "no, "))


def test_tools(ours: Llama, plain: llama_cpp.Llama) -> None:
    tool = {
        "type": "function",
        "function": {
            "name": "weather",
            "parameters": {
                "type": "object",
                "properties": {"sunny": {"type": "boolean"}},
                "required": ["sunny"],
            },
        },
    }
    options = {
        "messages": [{"role": "user", "content": "Will it rain?"}],
        "tools": [tool],
        "tool_choice": {"type": "function", "function": {"name": "weather"}},
        "max_tokens": 40,
        "temperature": 0.0,
    }
    found = ours.create_chat_completion(**options)["choices"][0]["message"]
    assert (
        found["tool_calls"][0]["function"]
        == (plain.create_chat_completion(**options)["choices"][0]["message"]["tool_calls"][0]["function"])
    )
    assert "sunny" in json.loads(found["tool_calls"][0]["function"]["arguments"])


def test_state_is_saved_and_restored(ours: Llama) -> None:
    prompt = ours.tokenize(PROMPT.encode())
    expected = logits(ours, prompt, [7, 8, 9])
    ours.reset()
    ours.eval([*prompt, 7])
    state = ours.save_state()
    ours.reset()
    ours.eval([50, 60, 70])
    ours.load_state(state)
    ours.eval([8])
    ours.eval([9])
    assert np.array_equal(ours.scores[ours.n_tokens - 1], expected[-1])


def test_embeddings() -> None:
    settings = SETTINGS | {"embedding": True}
    plain = plain_llama(TINY_MOE, **settings)
    expected = plain.embed(PROMPT)
    plain.close()
    with arena_share(0.25), Llama(str(TINY_MOE), **settings) as ours:
        found = ours.embed(PROMPT)
    assert np.array_equal(np.array(found), np.array(expected))
    assert np.abs(np.array(found)).max() > 0


def test_embeddings_off_are_refused_as_in_llama_cpp(ours: Llama) -> None:
    with pytest.raises(RuntimeError, match="embedding=True"):
        ours.embed(PROMPT)


def test_close_twice_and_context_manager() -> None:
    with Llama(str(TINY_MOE), ram="1GiB", **SETTINGS) as llama:
        llama.eval([5, 6, 7])
    llama.close()
    with pytest.raises(StoreError, match="closed"):
        llama.store.stats()


def test_context_defaults_to_what_fits_and_zero_means_the_model_s_own() -> None:
    assert plan_model(TINY_MOE, "1GiB").n_ctx == 512
    with Llama(str(TINY_MOE), ram="1GiB", n_ctx=0) as llama:
        assert llama.n_ctx() == 512


def test_a_prompt_batch_that_does_not_fit_is_served_tensor_by_tensor() -> None:
    settings = SETTINGS | {"n_ubatch": 32}
    prompt = np.random.default_rng(0).integers(4, 4000, 64).tolist()
    with arena_share(0.08), Llama(str(TINY_MOE), **settings) as ours:
        assert ours.plan.prompt_mode == "per-tensor"
        assert ours.plan.n_ubatch == 32
        found = logits(ours, prompt, [])
        # Two batches of eight layers, but in the last layer only the token whose logits are wanted goes on.
        assert ours.store.stats().staged_layers == 14
    plain = plain_llama(TINY_MOE, **settings)
    assert np.array_equal(found, logits(plain, prompt, []))
    plain.close()


def test_smaller_batches_are_chosen_and_reported() -> None:
    with arena_share(0.0), Llama(str(TINY_MOE), **(SETTINGS | {"n_ubatch": 256})) as ours:
        assert ours.plan.prompt_mode == "small-batches"
        assert ours.plan.n_ubatch < 256
        assert ours.context_params.n_ubatch == ours.plan.n_ubatch
        assert any(f"n_ubatch is {ours.plan.n_ubatch} instead of 256" in note for note in ours.plan.notes)


def test_an_override_of_the_number_of_experts_is_planned_and_served() -> None:
    settings = SETTINGS | {"kv_overrides": {"qwen3moe.expert_used_count": 8}}
    with arena_share(0.0), Llama(str(TINY_MOE), **settings) as ours:
        assert set(ours.index.n_expert_used) == {8}
        found = logits(ours, [5, 6, 7], [8, 9])
        n_ubatch = ours.plan.n_ubatch
    plain = plain_llama(TINY_MOE, **(settings | {"n_ubatch": n_ubatch}))
    assert np.array_equal(found, logits(plain, [5, 6, 7], [8, 9]))
    plain.close()


def test_logits_of_all_tokens_must_be_announced(plain: llama_cpp.Llama) -> None:
    """llama.cpp would abort the process: the memory for more than one token's logits is not there."""
    with arena_share(0.25), Llama(str(TINY_MOE), **SETTINGS) as llama:
        lean = llama.plan.bytes_of("compute buffers")
        llama._batch.set_batch(batch=[5, 6, 7], n_past=0, logits_all=True)
        with pytest.raises(BackendError, match="logits_all=True"):
            llama._ctx.decode(llama._batch)
        assert np.array_equal(logits(llama, [5, 6, 7], [8]), logits(plain, [5, 6, 7], [8]))
    assert lean < plan_model(TINY_MOE, "1GiB", **SHAPE, logits_all=True).bytes_of("compute buffers")


def test_two_models_on_one_file_at_once() -> None:
    with arena_share(0.25):
        first, second = Llama(str(TINY_MOE), **SETTINGS), Llama(str(TINY_MOE), io="mmap", **SETTINGS)
    with first, second:
        for tokens in ([5, 6, 7], [100, 200, 300], [9]):
            assert np.array_equal(logits(first, tokens, [3]), logits(second, tokens, [3]))


def test_split_files(tmp_path: Path) -> None:
    whole = write_tiny_model(tmp_path / "whole.gguf", "qwen3moe")
    parts = write_tiny_model(tmp_path / "parts.gguf", "qwen3moe", split=7)
    assert len(parts) > 2
    settings = SETTINGS | {"n_ctx": 64}
    with arena_share(0.5), Llama(str(whole[0]), **settings) as one, Llama(str(parts[0]), **settings) as many:
        assert many.index.files == tuple(parts)
        assert np.array_equal(logits(one, [5, 6, 7, 8], [9, 10]), logits(many, [5, 6, 7, 8], [9, 10]))


def test_progress_of_loading_is_reported() -> None:
    seen: list[tuple[int, int]] = []
    with Llama(str(TINY_MOE), ram="1GiB", on_progress=lambda done, total: seen.append((done, total)), **SETTINGS):
        pass
    done, total = seen[-1]
    assert done == total > 0
    assert sorted(seen) == seen


# ---------------------------------------------------------------- failures


def test_what_a_callback_raises_ends_the_loading() -> None:
    def fail(done: int, total: int) -> None:
        raise ValueError("nobody looks")

    with pytest.raises(ValueError, match="nobody looks"):
        Llama(str(TINY_MOE), ram="1GiB", on_progress=fail, **SETTINGS)


def test_another_version_of_llama_cpp_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "0.3.35")
    with pytest.raises(BackendError, match=r"0\.3\.35 is installed.*pip install llama-cpp-python==0\.3\.36"):
        llama_library.require_version()


def test_no_llama_cpp_python(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(_: str) -> str:
        raise importlib.metadata.PackageNotFoundError

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(BackendError, match="not installed"):
        llama_library.require_version()


def test_a_budget_below_the_floor_names_the_number_that_would_do() -> None:
    with pytest.raises(BudgetError) as caught:
        Llama(str(TINY_MOE), ram="10MiB", **SETTINGS)
    needed = caught.value.needed
    assert needed is not None
    # Other tests' memory is part of this process, so the number may have moved by a little.
    with Llama(str(TINY_MOE), ram=needed + (8 << 20), **SETTINGS) as llama:
        assert len(llama.create_completion(PROMPT, max_tokens=4)["choices"]) == 1


@pytest.mark.parametrize("option", [{"n_gpu_layers": 1}, {"use_mlock": True}, {"vocab_only": True}])
def test_what_contradicts_a_budget_is_refused(option: dict[str, Any]) -> None:
    with pytest.raises(BackendError, match="contradicts a RAM budget"):
        Llama(str(TINY_MOE), ram="1GiB", **option)


def test_unknown_io_mode() -> None:
    with pytest.raises(StoreError, match=r"^io=uring is unknown; give one of auto, direct, mmap, pread$"):
        Llama(str(TINY_MOE), ram="1GiB", io="uring", **SETTINGS)


def test_a_model_that_llama_cpp_refuses_is_reported_with_its_reason(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "bad.gguf", "qwen3moe")[0]
    data = path.read_bytes()
    assert data.count(b"attn_q_norm.weight") > 0
    path.write_bytes(data.replace(b"attn_q_norm.weight", b"attn_x_norm.weight"))
    with pytest.raises(BackendError, match="attn_q_norm"):
        Llama(str(path), ram="1GiB", **SETTINGS)


@pytest.mark.parametrize("io", ["direct", "mmap", "pread"])
def test_a_file_truncated_while_open_is_an_error_and_not_wrong_text(io: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    shutil.copy(TINY_MOE, path)
    with arena_share(0.25), Llama(str(path), io=io, **SETTINGS) as llama:
        llama.eval([5, 6, 7])
        os.truncate(path, path.stat().st_size // 2)
        with pytest.raises(StoreError, match=r"model\.gguf was changed while in use|became shorter"):
            llama.eval(np.random.default_rng(0).integers(4, 4000, 64).tolist())


def test_a_file_replaced_while_open_goes_on_with_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    shutil.copy(TINY_MOE, path)
    with arena_share(0.25), Llama(str(path), **SETTINGS) as llama:
        expected = logits(llama, [5, 6, 7], [8, 9, 10])
        (tmp_path / "other").write_bytes(b"not a model")
        (tmp_path / "other").rename(path)
        assert np.array_equal(logits(llama, [5, 6, 7], [8, 9, 10]), expected)


def test_after_a_failure_the_same_model_can_go_on(ours: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = logits(ours, [5, 6, 7], [8])
    ours.reset()
    ours.eval([5, 6, 7])
    failing = ours._ctx.decode

    def fail_once(batch: Any) -> None:
        monkeypatch.setattr(ours._ctx, "decode", failing)
        ours.interrupt()
        raise StoreError("the disk is on fire")

    monkeypatch.setattr(ours._ctx, "decode", fail_once)
    with pytest.raises(StoreError, match="on fire"):
        ours.eval([8])
    ours.eval([8])
    assert np.array_equal(ours.scores[ours.n_tokens - 1], expected[-1])


def test_ctrl_c_stops_a_long_prompt_batch(tmp_path: Path) -> None:
    """In a process of its own: a signal belongs to the whole process."""
    program = f"""
import sys, time
from edgemoe.backend import Llama
llama = Llama({str(TINY_MOE)!r}, ram="1GiB", n_ctx=512, n_threads=1)
while True:
    print("ready", flush=True)
    try:
        for _ in range(1000):
            llama.reset()
            llama.eval(list(range(5, 505)))
    except KeyboardInterrupt:
        break
llama.reset()
llama.eval([5, 6, 7])
print(llama.n_tokens, flush=True)
llama.close()
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        time.sleep(0.3)
        child.send_signal(signal.SIGINT)
        try:
            output, _ = child.communicate(timeout=60)
        finally:
            child.kill()
    assert output == "3\n"
    assert child.returncode == 0


def test_nothing_hangs_when_the_model_is_not_closed() -> None:
    program = f"""
from edgemoe.backend import Llama
llama = Llama({str(TINY_MOE)!r}, ram="1GiB", n_ctx=64)
llama.eval([5, 6, 7])
"""
    done = subprocess.run([sys.executable, "-c", program], timeout=60, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_errors_share_one_root() -> None:
    with pytest.raises(EdgemoeError):
        Llama("no/such/model.gguf", ram="1GiB")


def test_the_plan_that_is_printed_is_the_plan_that_is_kept() -> None:
    plan: ExpertPlan = plan_model(TINY_MOE, "1GiB", n_ctx=512, n_ubatch=64)
    with Llama(str(TINY_MOE), ram="1GiB", **SETTINGS) as llama:
        assert (llama.plan.n_ctx, llama.plan.n_ubatch) == (plan.n_ctx, plan.n_ubatch)
        assert llama.plan.bytes_of("KV cache") == plan.bytes_of("KV cache")
        assert sum(line.bytes for line in llama.plan.lines) == 1 << 30


def test_ctrl_c_stops_a_load(tmp_path: Path) -> None:
    """In a process of its own; the signal comes while the first tensor is being read."""
    program = f"""
import os, signal
from edgemoe.backend import Llama
from edgemoe.llama_library import internals
begin = internals.LlamaModel.__init__
def begin_and_interrupt(self, **kwargs):
    os.kill(os.getpid(), signal.SIGINT)
    begin(self, **kwargs)
internals.LlamaModel.__init__ = begin_and_interrupt
done = []
try:
    Llama({str(TINY_MOE)!r}, ram="1GiB", n_ctx=512, on_progress=lambda now, total: done.append(now / total))
except KeyboardInterrupt:
    print("interrupted at", "less than all" if done[-1] < 1 else "all")
"""
    done = subprocess.run([sys.executable, "-c", program], timeout=60, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("interrupted at less than all\n", "")
