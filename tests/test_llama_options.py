"""What a `Llama` is given: options, tokens and texts that cannot be."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from plain_llama import TINY_MOE

from edgemoe.backend import Llama, plan_model
from edgemoe.dry_run import plan_for
from edgemoe.errors import BackendError
from edgemoe.index import read_index

SETTINGS: dict[str, Any] = {"ram": "1GiB", "n_ctx": 256, "n_ubatch": 64, "n_threads": 1, "n_threads_batch": 1}


@pytest.fixture(scope="module")
def ours() -> Iterator[Llama]:
    with Llama(str(TINY_MOE), **SETTINGS) as llama:
        yield llama


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"n_ctx": -5}, r"^n_ctx=-5 cannot be; give a whole number from 0 to 16777216, or leave it out$"),
        ({"n_ctx": "512"}, r"^n_ctx='512' cannot be; give a whole number from 0 to 16777216, or leave it out$"),
        ({"n_ubatch": 0}, r"^n_ubatch=0 cannot be; give a whole number from 1 to 16777216, or leave it out$"),
        ({"n_batch": 0}, r"^n_batch=0 cannot be; give a whole number from 1 to 16777216, or leave it out$"),
        ({"n_ctx": 10**30}, r"^n_ctx=10{30} cannot be; give a whole number from 0 to 16777216, or leave it out$"),
        ({"n_ctx": True}, r"^n_ctx=True cannot be"),
        ({"n_threads": 513}, r"^n_threads=513 cannot be; give a whole number from 0 to 512"),
        ({"n_threads": -3}, r"^n_threads=-3 cannot be; give a whole number from 0 to 512, or leave it out$"),
        ({"n_threads_batch": 1.5}, r"^n_threads_batch=1\.5 cannot be; give a whole number from 0 to 512"),
        ({"tuning": "x"}, r"^tuning='x' is no edgemoe\.store\.Tuning; leave it out, or give one$"),
        ({"expert": "task"}, r"^there is no option expert; did you mean experts\?$"),
        ({"n_thread": 4}, r"^there is no option n_thread; did you mean n_threads\?$"),
        ({"whatever": 4}, r"^there is no option whatever; leave it out$"),
    ],
)
def test_arguments_that_cannot_be(option: dict[str, Any], message: str) -> None:
    with pytest.raises(BackendError, match=message):
        Llama(str(TINY_MOE), ram="1GiB", **option)


@pytest.mark.parametrize("option", [{"n_ctx": -5}, {"n_ubatch": 0}, {"typek": 8}])
def test_a_plan_refuses_them_too(option: dict[str, Any]) -> None:
    with pytest.raises(BackendError, match=f"{next(iter(option))}.*; (give|did you mean)"):
        plan_model(TINY_MOE, "1GiB", **option)


def test_threads_are_counted() -> None:
    index = read_index(TINY_MOE)
    few, many = (plan_for(index, "1GiB", 64, None, {"n_threads": n}).bytes_of("Python and libraries") for n in (2, 402))
    assert many - few == pytest.approx(400 * (32 << 10), abs=2 << 20)  # what this process holds changes, too


def test_what_stands_for_the_default_is_taken() -> None:
    given = {"n_ctx": np.int64(64), "n_ubatch": None, "n_threads": 0, "n_threads_batch": None}
    with Llama(str(TINY_MOE), ram="1GiB", **given) as llama:
        assert llama.n_ctx() == 64
        assert llama.n_threads > 0


@pytest.mark.parametrize("token", [999_999, 4096, -1])
def test_a_token_that_is_none(ours: Llama, token: int) -> None:
    ours.reset()
    ours.eval([5, 6])
    with pytest.raises(BackendError, match=rf"^{token} is no token of .*; give numbers from 0 to 4095, as `tokenize`"):
        ours.eval([7, token])
    assert ours.n_tokens == 2


@pytest.mark.parametrize("token", [999_999, 4096, -1])
def test_a_token_that_is_none_has_no_text(ours: Llama, token: int) -> None:
    with pytest.raises(BackendError, match=rf"^{token} is no token of "):
        ours.detokenize([5, token])


@pytest.mark.parametrize("text", ["", [], ["hi", ""]])
def test_nothing_is_not_embedded(text: Any) -> None:
    with Llama(str(TINY_MOE), embedding=True, **SETTINGS) as llama:
        with pytest.raises(BackendError, match="nothing to embed in an empty text"):
            llama.embed(text)
        assert len(llama.embed("hi")) > 0


def test_more_tokens_than_the_context_holds(ours: Llama) -> None:
    ours.reset()
    ours.eval([5] * 200)
    with pytest.raises(BackendError, match=r"^57 tokens after 200 are more than the context of 256; give fewer, or"):
        ours.eval([5] * 57)
    ours.eval([5] * 56)
