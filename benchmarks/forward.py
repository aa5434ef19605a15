"""Plain forward pass, nobody listening: this library beside plain transformers, same weights.

    python benchmarks/forward.py [--shapes 1x16 8x64 1x1024] [--rounds 15] [--device cpu]

Rounds are interleaved (ours, theirs, ours, ...), so that a machine that warms up or is disturbed
treats both alike; medians and their ratio are printed, and the logits are compared first.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable

import torch
import transformers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import hookedlm


def gpt2_small() -> torch.nn.Module:
    """GPT-2 small's shape, random weights."""
    return GPT2LMHeadModel(GPT2Config()).eval()


def small() -> torch.nn.Module:
    """4 layers, d_model 128: Python's overhead dominates."""
    return GPT2LMHeadModel(GPT2Config(n_layer=4, n_embd=128, n_head=4, vocab_size=5000)).eval()


def llama_half_billion() -> torch.nn.Module:
    """A grouped-query Llama of about 0.5B parameters, random weights."""
    config = LlamaConfig(
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        vocab_size=32000,
        max_position_embeddings=4096,
    )
    return LlamaForCausalLM(config).eval()


MODELS: dict[str, Callable[[], torch.nn.Module]] = {
    "gpt2-small": gpt2_small,
    "small": small,
    "llama-0.5b": llama_half_billion,
}


def timed(run: Callable[[], object], device: str) -> float:
    """Seconds of one call, the device's queue drained."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


@torch.no_grad()
def compare(name: str, shape: tuple[int, int], rounds: int, device: str) -> str:
    """One line: medians of both and their ratio."""
    torch.manual_seed(0)
    theirs = MODELS[name]().to(device)
    ours = hookedlm.load(theirs)
    tokens = torch.randint(theirs.config.vocab_size, shape, device=device)
    torch.testing.assert_close(ours(tokens), theirs(tokens).logits, rtol=1e-4, atol=1e-4)
    runs = {"ours": lambda: ours(tokens), "theirs": lambda: theirs(tokens, use_cache=False).logits}
    times: dict[str, list[float]] = {who: [] for who in runs}
    for i in range(rounds + 2):
        for who in sorted(runs, reverse=bool(i % 2)):  # each goes first in every other round
            seconds = timed(runs[who], device)
            if i >= 2:
                times[who].append(seconds)
    a, b = statistics.median(times["ours"]), statistics.median(times["theirs"])
    pairwise = statistics.median(x / y for x, y in zip(times["ours"], times["theirs"], strict=True))
    batch, pos = shape
    size = f"{batch} x {pos}"
    return f"| {name} | {size} | {a * 1e3:.2f} | {b * 1e3:.2f} | {a / b:.3f} | {pairwise:.3f} |"


def main() -> None:
    """Parse, measure, print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=["gpt2-small", "small"], choices=MODELS)
    parser.add_argument("--shapes", nargs="+", default=["1x16", "8x64", "1x1024"])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    print(
        f"torch {torch.__version__}, transformers {transformers.__version__}, "
        f"hookedlm {hookedlm.__version__}, Python {platform.python_version()}, "
        f"{torch.get_num_threads()} threads, {arguments.device}\n\n"
        "| model | batch x pos | hookedlm, ms | transformers, ms | ratio of medians | "
        "median ratio |\n| --- | --- | --- | --- | --- | --- |"
    )
    for name in arguments.models:
        for text in arguments.shapes:
            batch, pos = map(int, text.split("x"))
            print(compare(name, (batch, pos), arguments.rounds, arguments.device), flush=True)


if __name__ == "__main__":
    main()
