"""Trains a small MoE language model whose router is of another kind than tiny-moe's, and writes it as GGUF.

tiny-moe is qwen3moe: softmax, top 4 of 32, weights renormalised. This one is dots1, which routes like DeepSeek-V3:
sigmoid, top 3 of 32, a selection bias that alone keeps the load even, weights renormalised and scaled, a shared expert,
and a dense first layer. The tokenizer is tiny-moe's.

Training needs PyTorch, which is no dependency of edgemoe. Install it into a folder of its own:

    pip install --target torch-only torch
    PYTHONPATH=torch-only nice -n 19 python -m benchmarks.train_small_moe ../shared/models/tiny-moe/eval/calib \\
        --held-out ../shared/models/tiny-moe/eval --system-text -o small-moe

Both folders hold one <domain>.jsonl per domain, a document under "text" in each line. `--system-text` adds what a
Debian machine has lying about: Python's standard library, headers, manual pages, scripts, licences. The model is
written every five minutes; at the end llama.cpp's logits are compared with PyTorch's.
"""

from __future__ import annotations

import gzip
import json
import math
import os
import random
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import click
import gguf
import llama_cpp
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.measurements import say

TOKENIZER = Path(__file__).resolve().parent.parent / "models" / "tiny-moe-q4_k_m.gguf"
END_OF_TEXT = 0

Tokens = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Shape:
    """Hyperparameters under llama.cpp's names."""

    n_vocab: int = 4096
    n_ctx: int = 512
    n_embd: int = 192
    n_head: int = 3
    n_layer: int = 5
    n_ff: int = 512
    n_ff_exp: int = 64
    n_expert: int = 32
    n_expert_used: int = 3
    expert_weights_scale: float = 2.5
    f_norm_rms_eps: float = 1e-6
    rope_freq_base: float = 10000.0

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head


SYSTEM_TEXT: Mapping[str, tuple[tuple[str, str], ...]] = {
    "python": ((str(Path(os.__file__).parent), "*.py"),),
    "cpp": (("/usr/include", "*.h"), ("/usr/include", "*.hpp"), ("/usr/include", "*.tcc")),
    "german": (("/usr/share/man/de", "*.gz"),),
    "french": (("/usr/share/man/fr", "*.gz"),),
    "shell": (("/usr/share/bash-completion", "*"), ("/var/lib/dpkg/info", "*.p*"), ("/usr/lib/git-core", "*.sh")),
    "javascript": (("/usr/lib/node_modules", "*.js"), ("/usr/share/nodejs", "*.js"), ("/usr/share/javascript", "*.js")),
    "config": (("/usr/lib/node_modules", "*.json"), ("/usr/share", "*.y*ml"), ("/etc", "*.conf")),
    "legal": (("/usr/share/common-licenses", "*"), ("/usr/share/doc", "copyright")),
}
DOCUMENT_CHARACTERS = 16_000  # so that no single file fills its domain
DOMAIN_CHARACTERS = 1_500_000
ROFF = re.compile(r"^[.']\s*\\\".*$|^[.'][A-Za-z]+ ?|\\f\[?[A-Z]+\]?|\\f.|\\[&|^/,]", re.MULTILINE)


def read_domains(folder: Path) -> dict[str, list[str]]:
    """The documents of each <domain>.jsonl."""
    return {
        file.stem: [json.loads(line)["text"] for line in file.open(encoding="utf-8")]
        for file in sorted(folder.glob("*.jsonl"))
    }


def system_documents(domain: str) -> Iterator[str]:
    """The beginnings of this machine's files of a domain, in a fixed random order."""
    files = sorted(file for root, pattern in SYSTEM_TEXT.get(domain, ()) for file in Path(root).rglob(pattern))
    random.Random(0).shuffle(files)
    for file in files:
        if file.is_file() and not file.is_symlink() and "site-packages" not in file.parts:
            data = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
            text = data.decode(errors="replace")
            text = ROFF.sub("", text).replace("\\-", "-") if file.suffix == ".gz" else text
            if "\ufffd" not in text and max(map(len, text.splitlines()), default=0) < 2000:
                yield text[:DOCUMENT_CHARACTERS]


def word_runs(text: str) -> set[tuple[str, ...]]:
    """All runs of eight words: unlike lines, they are the same however a text is wrapped."""
    words = re.findall(r"\w+", text)
    return set(zip(*(words[i:] for i in range(8)), strict=False))


def add_system_text(training: dict[str, list[str]], held_out: Mapping[str, list[str]]) -> None:
    """Fill up each domain, leaving out every document of which more than a twentieth is in the held-out text."""
    forbidden = {run for documents in held_out.values() for text in documents for run in word_runs(text)}
    for domain, documents in training.items():
        n_characters = sum(map(len, documents))
        for text in system_documents(domain):
            if n_characters >= DOMAIN_CHARACTERS:
                break
            runs = word_runs(text)
            if runs and len(runs & forbidden) <= 0.05 * len(runs):
                documents.append(text)
                n_characters += len(text)


def tokenize(documents: Iterable[str], tokenizer: llama_cpp.Llama) -> Tokens:
    """All documents in a row, each with an end."""
    pieces = (tokenizer.tokenize(text.encode(), add_bos=False, special=True) for text in documents)
    return np.array([token for piece in pieces for token in [*piece, END_OF_TEXT]], dtype=np.int64)


def matrix(*shape: int, gain: float = 1.0) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape) * gain / math.sqrt(shape[-1]))


class Block(nn.Module):
    """A layer of dots1: attention with normed queries and keys, then a dense or a sparse feed-forward."""

    def __init__(self, shape: Shape, dense: bool) -> None:
        super().__init__()
        n, n_ff, n_expert = shape.n_embd, shape.n_ff_exp, shape.n_expert
        small = 1 / math.sqrt(2 * shape.n_layer)  # what is added to the residual stream
        self.shape, self.dense = shape, dense
        self.attn_norm, self.ffn_norm = nn.Parameter(torch.ones(n)), nn.Parameter(torch.ones(n))
        self.attn_q_norm = nn.Parameter(torch.ones(shape.head_dim))
        self.attn_k_norm = nn.Parameter(torch.ones(shape.head_dim))
        self.attn_q, self.attn_k, self.attn_v = matrix(n, n), matrix(n, n), matrix(n, n)
        self.attn_output = matrix(n, n, gain=small)
        if dense:
            self.ffn_gate, self.ffn_up = matrix(shape.n_ff, n), matrix(shape.n_ff, n)
            self.ffn_down = matrix(n, shape.n_ff, gain=small)
            return
        self.ffn_gate_inp = matrix(n_expert, n, gain=0.5)
        self.ffn_gate_exps, self.ffn_up_exps = matrix(n_expert, n_ff, n), matrix(n_expert, n_ff, n)
        self.ffn_down_exps = matrix(n_expert, n, n_ff, gain=small)
        self.ffn_gate_shexp, self.ffn_up_shexp = matrix(n_ff, n), matrix(n_ff, n)
        self.ffn_down_shexp = matrix(n, n_ff, gain=small)
        self.register_buffer("exp_probs_b", torch.zeros(n_expert))
        self.load = torch.zeros(n_expert)  # tokens that each expert got in the last pass

    def norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return functional.rms_norm(x, weight.shape, weight, self.shape.f_norm_rms_eps)

    def forward(self, x: Tensor, rotation: Tensor) -> Tensor:
        x = x + self.attention(self.norm(x, self.attn_norm), rotation)
        h = self.norm(x, self.ffn_norm)
        if self.dense:
            return x + swiglu(h, self.ffn_gate, self.ffn_up, self.ffn_down)
        shared = swiglu(h, self.ffn_gate_shexp, self.ffn_up_shexp, self.ffn_down_shexp)
        return x + shared + self.experts(h.flatten(0, 1)).view_as(h)

    def attention(self, h: Tensor, rotation: Tensor) -> Tensor:
        def heads(weight: Tensor) -> Tensor:
            return functional.linear(h, weight).unflatten(-1, (self.shape.n_head, -1)).transpose(1, 2)

        q = rotate(self.norm(heads(self.attn_q).float(), self.attn_q_norm), rotation)
        k = rotate(self.norm(heads(self.attn_k).float(), self.attn_k_norm), rotation)
        v = heads(self.attn_v)
        mixed = functional.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v, is_causal=True)
        return functional.linear(mixed.transpose(1, 2).flatten(2), self.attn_output)

    def experts(self, h: Tensor) -> Tensor:
        """The routed experts' sum for each token: [T, n_embd]."""
        k = self.shape.n_expert_used
        with torch.autocast("cpu", enabled=False):
            scores = torch.sigmoid(functional.linear(h.float(), self.ffn_gate_inp))
        ids = (scores.detach() + self.exp_probs_b).topk(k).indices
        weights = scores.gather(1, ids)
        weights = self.shape.expert_weights_scale * weights / weights.sum(1, keepdim=True)
        by_expert = ids.flatten().argsort(stable=True)
        self.load = torch.bincount(ids.flatten(), minlength=self.shape.n_expert)
        ends, tokens = self.load.cumsum(0).to(torch.int32), by_expert // k

        def grouped(x: Tensor, weight: Tensor) -> Tensor:
            dtype = torch.bfloat16 if torch.is_autocast_enabled("cpu") else torch.float32
            return functional.grouped_mm(x.to(dtype), weight.to(dtype).transpose(1, 2), offs=ends)

        x = h[tokens]
        x = functional.silu(grouped(x, self.ffn_gate_exps)) * grouped(x, self.ffn_up_exps)
        x = grouped(x, self.ffn_down_exps).float() * weights.flatten()[by_expert, None]
        return torch.zeros_like(h, dtype=x.dtype).index_add(0, tokens, x)


def swiglu(h: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return functional.linear(functional.silu(functional.linear(h, gate)) * functional.linear(h, up), down)


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Rotary position embedding of the halves of each head, llama.cpp's NeoX kind."""
    cos, sin = rotation[:, : x.shape[-2]]
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


class SmallMoe(nn.Module):
    """The whole model; input and output embeddings are one matrix, which GGUF holds twice."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.token_embd = nn.Parameter(torch.randn(shape.n_vocab, shape.n_embd) * 0.02)
        self.output_norm = nn.Parameter(torch.ones(shape.n_embd))
        self.blk = nn.ModuleList(Block(shape, dense=i == 0) for i in range(shape.n_layer))
        frequencies = shape.rope_freq_base ** -(torch.arange(0, shape.head_dim, 2) / shape.head_dim)
        angles = torch.outer(torch.arange(shape.n_ctx), frequencies)
        self.register_buffer("rotation", torch.stack((angles.cos(), angles.sin())), persistent=False)

    @property
    def sparse(self) -> list[Block]:
        """The layers with experts."""
        return [block for block in self.blk if not block.dense]

    def forward(self, tokens: Tensor) -> Tensor:
        x = functional.embedding(tokens, self.token_embd)
        for block in self.blk:
            x = block(x, self.rotation)
        x = self.blk[0].norm(x, self.output_norm)
        return functional.linear(x, self.token_embd)

    def loss(self, windows: Tensor) -> Tensor:
        """Mean cross-entropy of each window [B, T + 1]'s last T tokens, in nats."""
        return functional.cross_entropy(self(windows[:, :-1]).float().flatten(0, 1), windows[:, 1:].flatten())


WINDOWS = 2  # of n_ctx tokens, in a step
WARM_UP = 50
PEAK_RATE = 2e-3
BIAS_RATE = 1e-3  # how far a selection bias moves in a step, towards an even load (Wang et al. 2024, arXiv:2408.15664)
EVALUATED = 8  # held-out windows of each domain
EXPORT_SECONDS = 300


def train(model: SmallMoe, training: Mapping[str, Tokens], seconds: float, path: Path) -> int:
    """Train for that long, writing `path` now and then, and return the number of steps.

    A domain is drawn with a chance that grows like the square root of its size, so that small ones are not seen over
    and over again.
    """
    rng = np.random.default_rng(0)
    texts = [torch.from_numpy(tokens) for tokens in training.values()]
    chances = np.sqrt([len(text) for text in texts])
    n_ctx = model.shape.n_ctx
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.97), fused=True)
    load = torch.ones(len(model.sparse), model.shape.n_expert)  # running means, 1 is even
    losses: list[float] = []
    started = exported = time.monotonic()
    while (now := time.monotonic()) < started + seconds:
        rate = PEAK_RATE * min(1, (len(losses) + 1) / WARM_UP) * (1 - (now - started) / seconds)
        for group in optimizer.param_groups:
            group["lr"] = rate
        chosen = [texts[i] for i in rng.choice(len(texts), WINDOWS, p=chances / chances.sum())]
        starts = [int(rng.integers(len(text) - n_ctx)) for text in chosen]
        windows = torch.stack([text[start : start + n_ctx + 1] for text, start in zip(chosen, starts, strict=True)])
        with torch.autocast("cpu", torch.bfloat16):
            loss = model.loss(windows)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        for block, mean in zip(model.sparse, load, strict=True):
            mean.lerp_(block.load / block.load.float().mean(), 0.1)
            block.exp_probs_b += BIAS_RATE * torch.sign(1 - mean)
        losses.append(loss.item())
        if len(losses) % 50 == 0:
            seen = f"{len(losses)} steps, {len(losses) * WINDOWS * n_ctx / 1e6:.2f} M tokens, {now - started:.0f} s"
            extremes = f"load of an expert {load.min():.2f} to {load.max():.2f}"
            say(f"{seen}: loss {np.mean(losses[-50:]):.3f}, {extremes}")
        if now > exported + EXPORT_SECONDS:
            write_gguf(path, model, gguf.GGMLQuantizationType.F16)
            exported = now
    return len(losses)


def evaluate(model: SmallMoe, training: Mapping[str, Tokens], held_out: Mapping[str, Tokens]) -> dict[str, float]:
    """Say what each domain's held-out text costs, in nats per token, and how much its routing differs from the rest.

    The baseline knows how often each token occurs in the training text, all domains together.
    """
    n_ctx = model.shape.n_ctx
    counts = np.bincount(np.concatenate(list(training.values())), minlength=model.shape.n_vocab) + 1.0
    unigram = -np.log(counts / counts.sum())
    costs, baseline, loads = {}, [], []
    for domain, tokens in held_out.items():
        starts = np.linspace(0, len(tokens) - n_ctx - 1, EVALUATED).astype(int)
        windows = np.stack([tokens[start : start + n_ctx + 1] for start in starts])
        with torch.no_grad():
            costs[domain] = model.loss(torch.from_numpy(windows)).item()
        baseline.append(float(unigram[windows[:, 1:]].mean()))
        loads.append(torch.stack([block.load / block.load.sum() for block in model.sparse]))
        say(f"{domain:11} perplexity {math.exp(costs[domain]):7.1f}   unigram {math.exp(baseline[-1]):7.1f}")
    mean = math.exp(float(np.mean(list(costs.values()))))
    say(f"{'mean':11} perplexity {mean:7.1f}   unigram {math.exp(float(np.mean(baseline))):7.1f}")
    usage = torch.stack(loads)
    information = (usage * torch.log2(usage / usage.mean(0) + 1e-12)).sum(-1).mean(0)
    say(f"what an expert tells of the domain, bits by layer: {' '.join(f'{bits:.2f}' for bits in information)}")
    return costs


def is_matrix(name: str, tensor: Tensor) -> bool:
    """Whether a tensor is stored in less than 32 bits; the router never is."""
    return tensor.ndim > 1 and not name.endswith("ffn_gate_inp")


def write_gguf(path: Path, model: SmallMoe, kind: gguf.GGMLQuantizationType) -> None:
    """Write the model with its matrices in that type."""
    shape, partial = model.shape, path.with_suffix(".partial")
    writer = gguf.GGUFWriter(partial, "dots1")
    keys = {
        "name": "small-moe", "quantization_version": gguf.GGML_QUANT_VERSION,
        "file_type": gguf.LlamaFileType["ALL_F32" if kind.name == "F32" else f"MOSTLY_{kind.name}"],
        "vocab_size": shape.n_vocab, "context_length": shape.n_ctx, "embedding_length": shape.n_embd,
        "block_count": shape.n_layer, "leading_dense_block_count": 1, "feed_forward_length": shape.n_ff,
        "head_count": shape.n_head, "head_count_kv": shape.n_head, "key_length": shape.head_dim,
        "value_length": shape.head_dim, "layer_norm_rms_eps": shape.f_norm_rms_eps,
        "rope_dimension_count": shape.head_dim, "rope_freq_base": shape.rope_freq_base,
        "expert_count": shape.n_expert, "expert_used_count": shape.n_expert_used, "expert_shared_count": 1,
        "expert_feed_forward_length": shape.n_ff_exp, "expert_gating_func": gguf.ExpertGatingFuncType.SIGMOID,
        "expert_weights_norm": True, "expert_weights_scale": shape.expert_weights_scale,
    }  # fmt: skip
    for key, value in keys.items():
        getattr(writer, f"add_{key}")(value)
    for name, field in gguf.GGUFReader(TOKENIZER).fields.items():
        if name.startswith("tokenizer."):
            writer.add_key_value(name, field.contents(), field.types[0], field.types[-1])
    for name, tensor in [*model.state_dict().items(), ("output", model.token_embd.detach())]:
        stored = kind if is_matrix(name, tensor) else gguf.GGMLQuantizationType.F32
        suffix = "bias" if name.endswith("exp_probs_b") else "weight"
        writer.add_tensor(f"{name}.{suffix}", gguf.quants.quantize(tensor.numpy(), stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    partial.replace(path)


def compare(path: Path, model: SmallMoe, held_out: Mapping[str, Tokens]) -> float:
    """Say how far llama.cpp's logits are from PyTorch's, and return the largest difference.

    In F16 a few tokens differ by as much as 1: those where a near-tie for the last expert falls the other way.
    """
    llama = llama_cpp.Llama(
        str(path), n_ctx=model.shape.n_ctx, logits_all=True, n_threads=1, n_threads_batch=1, type_k=0, type_v=0,
        flash_attn=False, verbose=False,
    )  # fmt: skip
    differences = []
    for tokens in held_out.values():
        piece = tokens[: model.shape.n_ctx]
        llama.reset()
        llama.eval(piece.tolist())
        with torch.no_grad():
            expected = model(torch.from_numpy(piece)[None])[0].numpy()
        differences.append(np.abs(llama.scores[: len(piece)] - expected).max(axis=1))
    each = np.concatenate(differences)
    median, p99, largest = (float(value) for value in np.quantile(each, (0.5, 0.99, 1)))
    say(f"{path.name}: logits differ by {median:.1e} (median token), {p99:.1e} (p99), {largest:.1e} (max)")
    return largest


@click.command(help=__doc__)
@click.argument("calibration", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--held-out", required=True, type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--system-text", is_flag=True, help="Also train on files of this machine.")
@click.option("--minutes", type=float, default=25, show_default=True)
@click.option("-o", "--output", required=True, type=click.Path(file_okay=False, path_type=Path))
def main(calibration: Path, held_out: Path, system_text: bool, minutes: float, output: Path) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    output.mkdir(parents=True, exist_ok=True)
    training_text, held_out_text = read_domains(calibration), read_domains(held_out)
    if system_text:
        add_system_text(training_text, held_out_text)
    tokenizer = llama_cpp.Llama(str(TOKENIZER), vocab_only=True, verbose=False)
    training = {domain: tokenize(documents, tokenizer) for domain, documents in training_text.items()}
    unseen = {domain: tokenize(documents, tokenizer) for domain, documents in held_out_text.items()}
    say("training tokens: " + ", ".join(f"{domain} {len(tokens)}" for domain, tokens in training.items()))
    model = SmallMoe(Shape())
    say(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters")
    n_steps = train(model, training, 60 * minutes, output / "small-moe-f16.gguf")
    for name, tensor in model.state_dict().items():  # what F16 holds, so that F32 and F16 have the same weights
        if is_matrix(name, tensor):
            tensor.copy_(tensor.half().float())
    costs = evaluate(model, training, unseen)
    differences = {}
    for kind in (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16, gguf.GGMLQuantizationType.Q8_0):
        path = output / f"small-moe-{kind.name.lower()}.gguf"
        write_gguf(path, model, kind)
        differences[path.name] = compare(path, model, unseen)
    click.echo(json.dumps({"steps": n_steps, "nats_per_token": costs, "largest_logit_difference": differences}))


if __name__ == "__main__":
    main()
