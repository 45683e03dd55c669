"""The command as a user meets it: a process of its own, its two streams and its exit status."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import click.testing
import pytest
from plain_llama import TINY_MOE, plain_llama

from edgemoe.cli import VERBS, main, options
from edgemoe.cli.inspect import summary
from edgemoe.errors import PromptError
from edgemoe.index import read_index

RAM = "96MiB"
GREEDY = ("--temp", "0", "--max-tokens", "24", "--ram", RAM)
PROMPT = "Tell me a story about a ship."

HELP = """\
Usage: edgemoe [OPTIONS] COMMAND [ARGS]...

  Run Mixture-of-Experts GGUF models inside the RAM you give them.

  Look at a model, and at what a budget would buy:

      edgemoe inspect model.gguf
      edgemoe plan model.gguf --ram 6GiB

  Ask one question; the answer alone goes to standard output:

      edgemoe run model.gguf --ram 6GiB "Why is the sky blue?"
      edgemoe run model.gguf --ram 50% < question.txt > answer.txt

  Talk with it (Ctrl-C stops an answer, Ctrl-D leaves):

      edgemoe chat model.gguf --ram 6GiB

  --ram bounds the whole process: weights, caches, buffers and Python. Leave
  it out to use the memory that is free now.

Options:
  --version   Show the version and exit.
  -h, --help  Show this message and exit.

Commands:
  inspect   Show what is in a model: layers, experts, sizes.
  plan      Show where every byte of a RAM budget would go.
  run       Answer one prompt.
  chat      Talk with a model.
  profile   Learn from text which experts a task needs.
  tasks     Look after the tasks of a model.
  match     Say which task a prompt belongs to, or none.
  evaluate  Measure what keeping only a task's experts costs.
  bench     Measure edgemoe beside plain llama.cpp, in one run.
  convert   Make GGUF files that suit a purpose.
"""

INSPECTION = """\
model           tiny-moe
architecture    qwen3moe
quantization    Q4_K - Medium
context         512 tokens
layers          8, 8 with experts
experts         32 in each layer, top-4 for each token
shared experts  none
expert groups   none

file            31.2 MiB
dense weights   1.96 MiB (41 F32, 28 Q4_K, 5 Q6_K)
experts         29.1 MiB (20 Q4_K, 4 Q6_K)
one expert      108 KiB to 124 KiB, by layer
one token       3.63 MiB of experts, all layers together
page alignment  0% of the experts' parts start on a page of 4,096 bytes
"""


def edgemoe(*arguments: str | bytes | Path, stdin: str | bytes = b"", **environment: str) -> Any:
    """Run the command to its end, both streams as text."""
    result = subprocess.run(
        [sys.executable, "-m", "edgemoe", *arguments],
        input=stdin.encode() if isinstance(stdin, str) else stdin,
        capture_output=True,
        timeout=120,
        env={**os.environ, **environment},
    )
    result.stdout, result.stderr = result.stdout.decode(), result.stderr.decode()
    assert "Traceback" not in result.stderr, result.stderr
    return result


def start(*arguments: str | Path) -> subprocess.Popen[str]:
    """Start the command, streams as pipes."""
    return subprocess.Popen(
        [sys.executable, "-m", "edgemoe", *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def changed_model(folder: Path, old: bytes, new: bytes) -> Path:
    """A copy of the model with a few bytes replaced."""
    data = TINY_MOE.read_bytes()
    assert data.count(old) == 1 and len(old) == len(new)
    path = folder / "changed.gguf"
    path.write_bytes(data.replace(old, new))
    return path


def test_help_is_a_tutorial() -> None:
    assert click.testing.CliRunner().invoke(main, ["-h"], prog_name="edgemoe", terminal_width=78).output == HELP


@pytest.mark.parametrize("verb", VERBS)
def test_each_verb_has_its_line_in_the_help(verb: str) -> None:
    command = main.get_command(click.Context(main), verb)
    assert command is not None
    assert command.get_short_help_str(limit=80) == VERBS[verb]
    result = click.testing.CliRunner().invoke(main, [verb, "-h"], prog_name="edgemoe")
    assert result.exit_code == 0
    arguments = "COMMAND" if isinstance(command, click.Group) else "MODEL"
    assert result.output.startswith(f"Usage: edgemoe {verb} [OPTIONS] {arguments}")


def test_version() -> None:
    result = edgemoe("--version")
    assert result.stdout.split()[0] == "edgemoe"
    assert result.stdout.split()[1][0].isdigit()


@pytest.mark.parametrize(
    ("arguments", "heavy"),
    [
        (["--help"], ["llama_cpp", "numpy", "gguf", "rich", "prompt_toolkit", "psutil", "edgemoe._native"]),
        (["run", "--help"], ["llama_cpp", "numpy", "gguf", "rich", "prompt_toolkit", "psutil", "edgemoe._native"]),
        (["inspect", str(TINY_MOE)], ["llama_cpp", "prompt_toolkit", "edgemoe._native"]),
        (["run", str(TINY_MOE), "--ram", "1KiB", "x"], ["prompt_toolkit"]),
        (["run", str(TINY_MOE), "--keep", "4/16", "x"], ["llama_cpp", "numpy", "gguf", "rich", "edgemoe._native"]),
    ],
)
def test_verbs_import_only_what_they_need(arguments: list[str], heavy: list[str]) -> None:
    program = f"""
import sys
from edgemoe.cli import main
try:
    main({arguments!r})
except SystemExit:
    pass
print([name for name in {heavy!r} if name in sys.modules])
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "[]"


def test_inspect() -> None:
    assert edgemoe("inspect", TINY_MOE).stdout == INSPECTION


def test_inspect_json() -> None:
    assert json.loads(edgemoe("inspect", TINY_MOE, "--json").stdout) == summary(read_index(TINY_MOE))


def test_plan() -> None:
    plan = json.loads(edgemoe("plan", TINY_MOE, "--ram", RAM, "--ctx", "300", "--ubatch", "32", "--json").stdout)
    assert plan["budget"] == {"bytes": 96 << 20, "reason": f"--ram {RAM}"}
    assert sum(line["bytes"] for line in plan["lines"]) == 96 << 20
    assert (plan["n_ctx"], plan["n_ubatch"]) == (300, 32)
    screen = edgemoe("plan", TINY_MOE, "--ram", RAM, "--ctx", "300", "--ubatch", "32").stdout
    for line in plan["lines"]:
        assert f"{line['name']}  " in screen
    assert f"total                 96.0 MiB  --ram {RAM}\n" in screen
    assert "\ncontext         300 tokens\nprompt batch    32 tokens, " in screen


def test_smallest_budget_of_the_plan_is_enough_to_run() -> None:
    plan = edgemoe("plan", TINY_MOE, "--ram", "1GiB").stdout
    smallest = next(line.split()[2] for line in plan.splitlines() if line.startswith("smallest --ram"))
    result = edgemoe("run", TINY_MOE, "--ram", smallest, "--max-tokens", "4", PROMPT, "--json")
    assert result.returncode == 0, result.stderr
    document = json.loads(result.stdout)
    assert document["stats"]["peak_rss_bytes"] <= document["stats"]["budget_bytes"]


def test_too_small_a_budget_names_one_that_would_do() -> None:
    result = edgemoe("run", TINY_MOE, "--ram", "40MiB", PROMPT)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith("edgemoe: --ram 40MiB is too small for tiny-moe-q4_k_m.gguf: at least ")
    enough = result.stderr.split("give --ram ")[1].split()[0]
    assert edgemoe("run", TINY_MOE, "--ram", enough, "--max-tokens", "4", PROMPT).returncode == 0


def test_run_prints_the_answer_alone() -> None:
    """The answer is the model's own chat completion; plan and measurements are on the other stream."""
    with_budget = edgemoe("run", TINY_MOE, *GREEDY, PROMPT)
    plain = plain_llama(TINY_MOE, n_ctx=512, flash_attn=True)
    expected: Any = plain.create_chat_completion([{"role": "user", "content": PROMPT}], temperature=0, max_tokens=24)
    plain.close()
    assert with_budget.returncode == 0
    assert with_budget.stdout == expected["choices"][0]["message"]["content"] + "\n"
    plan, _, measured = with_budget.stderr.rpartition("\n\n")
    assert plan.startswith("Python and libraries  ")
    assert [line.split("  ")[0] for line in measured.splitlines()] == [
        "peak memory",
        "hit rate",
        "prompt",
        "generation",
        "read",
        "io",
        "seed",
    ]
    assert " of 96.0 MiB\n" in measured


def test_run_without_a_terminal_prints_no_control_characters() -> None:
    result = edgemoe("run", TINY_MOE, *GREEDY, PROMPT, TERM="xterm-256color")
    assert not {c for c in result.stdout + result.stderr if c < " " and c != "\n"}


def test_run_takes_the_prompt_from_standard_input() -> None:
    expected = edgemoe("run", TINY_MOE, *GREEDY, "--quiet", PROMPT)
    assert expected.stderr == ""
    assert edgemoe("run", TINY_MOE, *GREEDY, "--quiet", stdin=PROMPT + "\n").stdout == expected.stdout
    assert edgemoe("run", TINY_MOE, *GREEDY, "--quiet", "-", stdin=PROMPT).stdout == expected.stdout


def test_run_json() -> None:
    text = edgemoe("run", TINY_MOE, *GREEDY, "--quiet", PROMPT).stdout
    result = edgemoe("run", TINY_MOE, *GREEDY, "--json", "--seed", "5", PROMPT)
    document = json.loads(result.stdout)
    assert result.stderr == ""
    assert document["text"] + "\n" == text
    assert document["finish_reason"] == "length"
    timings, stats = document["timings"], document["stats"]
    assert timings["generated_tokens"] == 24
    assert timings["prompt_tokens"] > len(PROMPT.split())
    assert timings["generated_tokens_per_second"] == pytest.approx(23 / timings["generation_seconds"])
    assert stats["peak_rss_bytes"] <= stats["budget_bytes"] == 96 << 20
    assert 0 < stats["hit_rate"] < 1
    assert stats["bytes_read_per_token"] == pytest.approx(stats["generation_bytes_read"] / 23)
    assert stats["seed"] == 5
    assert document["plan"]["budget"]["bytes"] == 96 << 20


def test_same_seed_same_answer() -> None:
    arguments = ("run", TINY_MOE, "--ram", RAM, "--quiet", "--max-tokens", "12", "--temp", "1.5", PROMPT, "--seed")
    first, again, other = (edgemoe(*arguments, seed).stdout for seed in ("0", "0", "1"))
    assert first == again != other


def test_model_without_chat_template_continues_the_text(tmp_path: Path) -> None:
    model = changed_model(tmp_path, b"tokenizer.chat_template", b"tokenizer.chat_templatX")
    plain = plain_llama(TINY_MOE, n_ctx=512, flash_attn=True)
    expected: Any = plain.create_completion("def join(", temperature=0, max_tokens=24)
    plain.close()
    assert edgemoe("run", model, *GREEDY, "--quiet", "def join(").stdout == expected["choices"][0]["text"] + "\n"
    talk = edgemoe("chat", model, *GREEDY, stdin="def join(\n")
    assert talk.stderr.startswith("tiny-moe has no chat template: using the format llama-2.\n")


def test_chat_template_that_is_no_template(tmp_path: Path) -> None:
    model = changed_model(tmp_path, b"{% for message", b"{% fur message")
    result = edgemoe("run", model, "--ram", RAM, "--quiet", PROMPT)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == (
        f"edgemoe: the chat template in {model} cannot be read (Encountered unknown tag 'fur'.);"
        " use another GGUF of this model\n"
    )


def test_chat_answers_each_line() -> None:
    alone = edgemoe("run", TINY_MOE, *GREEDY, "--quiet", PROMPT).stdout
    talk = edgemoe("chat", TINY_MOE, *GREEDY, "--json", stdin=f"{PROMPT}\nAnd then?\n/reset\n{PROMPT}\n")
    assert (talk.returncode, talk.stderr) == (0, "")
    answers = [json.loads(line) for line in talk.stdout.splitlines()]
    assert [answer["text"] + "\n" == alone for answer in answers] == [True, False, True]
    # The first turn is still in the KV cache when the second is asked.
    assert answers[1]["timings"]["reused_tokens"] >= answers[0]["timings"]["prompt_tokens"]


BAD_INPUT = {
    "no such file": (["run", "missing.gguf", "x"], "missing.gguf does not exist"),
    "a directory": (["inspect", "{folder}"], "is a directory"),
    "no name": (["inspect", ""], "no file name was given as MODEL; give the path of a GGUF file"),
    "keep without a task": (["run", "{model}", "--keep", "4/16", "x"], "--experts all does not; give --experts task"),
    "not a GGUF": (["plan", "{folder}/text.gguf"], "is not a GGUF file"),
    "half a header": (["inspect", "{folder}/short.gguf"], "short.gguf"),
    "no number": (["run", "{model}", "--ram", "plenty", "x"], "'plenty' is not a memory size"),
    "negative": (["run", "{model}", "--ram", "-5", "x"], "'-5' is not a memory size"),
    "nothing": (["plan", "{model}", "--ram", "0"], "is not between 1 byte and 1 PiB"),
    "absurd": (["plan", "{model}", "--ram", "99999TiB"], "is not between 1 byte and 1 PiB"),
    "empty prompt": (["run", "{model}", "--ram", RAM, " "], "the prompt is empty"),
    "empty input": (["run", "{model}", "--ram", RAM], "the prompt is empty"),
    "long prompt": (["run", "{model}", "--ram", RAM, "--ctx", "256", "word " * 500], "but the context holds 256"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_sentence(case: str, tmp_path: Path) -> None:
    (tmp_path / "text.gguf").write_text("just text, and a good deal of it")
    (tmp_path / "short.gguf").write_bytes(TINY_MOE.read_bytes()[:5000])
    arguments, sentence = BAD_INPUT[case]
    result = edgemoe(*(a.format(folder=tmp_path, model=TINY_MOE) for a in arguments))
    assert (result.returncode, result.stdout) == (1, "")
    last = result.stderr.splitlines()[-1]
    assert last.startswith("edgemoe: ") and sentence in last
    if case != "long prompt":  # whose plan is already on the screen
        assert len(result.stderr.splitlines()) == 1


def test_prompt_that_is_not_utf8() -> None:
    for result in (edgemoe("run", TINY_MOE, b"caf\xe9"), edgemoe("run", TINY_MOE, stdin=b"caf\xe9")):
        assert result.returncode == 1
        assert result.stderr.endswith("is not UTF-8 text (byte 0xe9 at 3); convert it first\n")


def test_model_path_that_is_not_utf8(tmp_path: Path) -> None:
    path = os.fsencode(tmp_path) + b"/b\xffad.gguf"
    shutil.copy(TINY_MOE, path)
    for result in (edgemoe("run", path, "hi"), edgemoe("inspect", path)):
        assert (result.returncode, result.stdout) == (1, "")
        assert result.stderr.endswith("b\\udcffad.gguf' is not UTF-8; rename the file or its folder\n")
        assert result.stderr.startswith("edgemoe: the path '") and result.stderr.count("\n") == 1


def test_context_longer_than_the_model_was_trained_for() -> None:
    arguments = ("--ram", "160MiB", "--max-tokens", "2", PROMPT)
    remark = "--ctx 600 is more than the 512 tokens that tiny-moe was trained for: "
    assert remark in edgemoe("run", TINY_MOE, "--ctx", "600", *arguments).stderr
    assert edgemoe("run", TINY_MOE, "--ctx", "600", "--quiet", *arguments).stderr == ""
    assert "trained" not in edgemoe("run", TINY_MOE, "--ctx", "512", *arguments).stderr


@pytest.mark.parametrize(
    "flags",
    [
        "--ctx 0",
        "--ctx -1",
        "--ubatch 0",
        "--threads 0",
        "--max-tokens 0",
        "--max-tokens -4",
        "--temp -0.1",
        "--temp nan",
        "--seed -1",
        "--io fast",
        "--nonsense",
    ],
)
@pytest.mark.parametrize("verb", ["run", "chat"])
def test_absurd_flags_are_usage_errors(verb: str, flags: str) -> None:
    result = click.testing.CliRunner().invoke(main, [verb, str(TINY_MOE), *flags.split()])
    assert result.exit_code == 2
    assert flags.split()[0] in result.stderr


def test_file_cut_short_while_talking(tmp_path: Path) -> None:
    model = tmp_path / "model.gguf"
    shutil.copy(TINY_MOE, model)
    with start("chat", model, "--ram", RAM, "--json", "--max-tokens", "8", "--temp", "0") as chat:
        assert chat.stdin and chat.stdout and chat.stderr
        chat.stdin.write("Hello\n")
        chat.stdin.flush()
        first = chat.stdout.readline()
        assert first, chat.stderr.read()
        assert json.loads(first)["text"]
        os.truncate(model, 20_000_000)
        chat.stdin.write("And now something else altogether\n")
        chat.stdin.close()
        assert json.loads(chat.stdout.readline())["finish_reason"] == "error"
        error = chat.stderr.read()
    assert chat.returncode == 1
    assert error.startswith(f"edgemoe: the model file {model} was changed while in use")
    assert error.count("\n") == 1


def test_endless_input_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(options, "LONGEST_INPUT", 4)
    for text in (b"1234", b"12345", b"1" * 99):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text)))
        if len(text) == 4:
            assert options.read_prompt(None) == "1234"
            continue
        with pytest.raises(PromptError, match=r"^standard input has more than .* give a shorter prompt$"):
            options.read_prompt(None)
