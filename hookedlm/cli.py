"""The command line: ``hookedlm demo``, ``hookedlm info MODEL``, ``hookedlm verify MODEL``.

Exit codes: 0 done; 1 a model that differs from Hugging Face's; 2 bad input, one line on stderr
that says what; 130 interrupted.
"""

from __future__ import annotations

import argparse
import os
import sys
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub.utils import logging as hub_logging
from jaxtyping import Float
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.utils import logging as hf_logging

from hookedlm import __version__, plots
from hookedlm.convert import hf
from hookedlm.convert.check import TOLERANCES, Truth, compare, listen_to_all, run_truth
from hookedlm.convert.lent import LentLoop, shown
from hookedlm.convert.prepare import HFPreparer
from hookedlm.convert.report import Agreement
from hookedlm.errors import HookedLMError, InputError, LoadError
from hookedlm.hooks import attached
from hookedlm.load import load
from hookedlm.loading import default_device, resolve, to_dtype
from hookedlm.model import HookedTransformer
from hookedlm.patching import get_act_patch_resid_pre

CLEAN = "After John and Mary went to the store, Mary gave a bottle of milk to"
CORRUPTED = "After John and Mary went to the store, John gave a bottle of milk to"
ANSWER, WRONG = " John", " Mary"
WIDTH = 100
LABEL, CELL = 20, 6


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code (argparse itself exits with 2 on bad arguments)."""
    arguments = parser().parse_args(argv)
    try:
        with _quiet_transformers():
            code: int = arguments.run(arguments)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        print("hookedlm: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # somebody reads only the first lines: `hookedlm info gpt2 | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (HookedLMError, OSError) as error:
        line = textwrap.shorten(str(error), width=500, placeholder=" ...")
        print(f"hookedlm: {line}", file=sys.stderr)
        return 2


def parser() -> argparse.ArgumentParser:
    """The arguments of all commands."""
    top = argparse.ArgumentParser(
        prog="hookedlm",
        description="Look into Hugging Face causal language models.",
        epilog="MODEL is a name on the Hugging Face hub, a short one such as pythia-70m, a local "
        "checkpoint folder, or 'demo': the small trained model that is part of the package and "
        "needs no network. Exit codes: 0 done, 1 differs from Hugging Face, 2 bad input.",
    )
    top.add_argument("--version", action="version", version=f"hookedlm {__version__}")
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    demo = commands.add_parser(
        "demo",
        help="find where a model keeps what it needs, by patching",
        description="Runs two prompts that differ in one name, puts the residual stream of the "
        "clean one into the corrupted one at every layer and position, and shows where that "
        "brings the answer back.",
    )
    demo.add_argument("--out", type=Path, default=Path("hookedlm_demo.html"), metavar="FILE.html")
    demo.add_argument("--model", default="demo", help="another model (default: %(default)s)")
    demo.set_defaults(run=_demo)

    info = commands.add_parser(
        "info",
        help="what was found in a model",
        description="Prints sizes, how exactly each part agrees with Hugging Face's, and all hook "
        "points with their axes.",
    )
    info.add_argument("model", metavar="MODEL")
    info.set_defaults(run=_info)

    verify = commands.add_parser(
        "verify",
        help="compare a model with Hugging Face's, block by block",
        description="Runs Hugging Face's model and ours on one padded batch and compares the "
        "residual stream after every block, and the logits: once with nobody listening (fused "
        "code) and once with a hook everywhere (longhand code). Exit code 1 if they differ.",
    )
    verify.add_argument("model", metavar="MODEL")
    verify.add_argument("--dtype", help="float32, bfloat16, ... (default: the checkpoint's)")
    verify.set_defaults(run=_verify)
    return top


# Loading ------------------------------------------------------------------------------------------


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No advice and no bars from transformers, within the context."""
    level, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hub_level = hub_logging.get_verbosity()
    hf_logging.set_verbosity_error()
    hub_logging.set_verbosity_error()  # its retries without a network
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)
        hub_logging.set_verbosity(hub_level)
        if bars:
            hf_logging.enable_progress_bar()


def _loaded(model: str | nn.Module) -> HookedTransformer:
    """A model, or LoadError whatever its files did to transformers."""
    try:
        return load(model).eval()
    except (SafetensorError, ImportError, KeyError, ValueError) as error:
        if isinstance(error, HookedLMError):
            raise
        raise LoadError(f"can't load {model!r}: {error}") from error


def _original(name: str, dtype: torch.dtype | None) -> nn.Module:
    """Hugging Face's own model, loaded by Hugging Face's own code."""
    path, local = resolve(name)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            path, dtype="auto" if dtype is None else dtype, local_files_only=local
        )
    except (OSError, SafetensorError, ImportError, KeyError, ValueError) as error:
        raise LoadError(f"can't read a causal language model from {name!r}: {error}") from error
    return model.to(default_device()).eval()


# info ---------------------------------------------------------------------------------------------


def _info(arguments: argparse.Namespace) -> int:
    model = _loaded(arguments.model)
    for text in (model.cfg, model.fidelity(), model.hook_points()):
        print(text, end="\n\n")
    return 0


# verify -------------------------------------------------------------------------------------------


def _verify(arguments: argparse.Namespace) -> int:
    original = _original(arguments.model, to_dtype(arguments.dtype))
    model = _loaded(original)
    print(model.fidelity(), end="\n\n")
    preparer = model.driver.preparer
    if isinstance(preparer, LentLoop):
        blocks = [hf.at(original, place) for place in preparer.paths]
    else:
        assert isinstance(preparer, HFPreparer)
        blocks = list(hf.at(original, preparer.row.blocks))
    truth = run_truth(original, blocks, original.get_input_embeddings().weight.shape[0])
    tolerance = TOLERANCES.get(truth.logits.dtype, 1e-5)
    print(f"The whole model on a padded batch; allowed: {tolerance:.0e} for each block passed")
    print(f"{'after':<14}{'quiet':<16}listening")
    wrong: list[str] = []
    pairs = zip(_errors(model, truth, False), _errors(model, truth, True), strict=True)
    for passed, ((where, quiet), (_, listening)) in enumerate(pairs, start=1):
        print(f"{where:<14}{quiet!s:<16}{listening!s}")
        if not max(quiet.error, listening.error) <= passed * tolerance:
            wrong.append(where)
    if wrong:
        print(f"DIFFERS from Hugging Face, first at {wrong[0]}")
        return 1
    print("agrees with Hugging Face")
    return 0


@torch.no_grad()
def _errors(model: HookedTransformer, truth: Truth, listening: bool) -> list[tuple[str, Agreement]]:
    """How far the stream after each block, and the logits, are from Hugging Face's."""
    streams = [f"blocks.{i}.hook_resid_post" for i in range(len(model.blocks))]
    with attached(listen_to_all(model) if listening else []):
        logits, cache = model.run_with_cache(
            truth.tokens, attention_mask=truth.real.long(), names_filter=streams
        )
    errors = [
        (name.removesuffix(".hook_resid_post"), compare(cache[name], shown(block, x), truth.real))
        for name, block, x in zip(streams, model.blocks, truth.outputs, strict=True)
    ]
    return [*errors, ("logits", compare(logits, truth.logits, truth.real))]


# demo ---------------------------------------------------------------------------------------------


@torch.no_grad()
def _demo(arguments: argparse.Namespace) -> int:
    out: Path = arguments.out
    if out.is_dir() or not out.absolute().parent.is_dir():
        raise InputError(f"--out {out}: expected a file in a folder that exists")
    model = _loaded(arguments.model)
    print(model.fidelity(), end="\n\n")

    clean, corrupted = model.to_tokens(CLEAN), model.to_tokens(CORRUPTED)
    answer, wrong = model.to_single_token(ANSWER), model.to_single_token(WRONG)
    if clean.shape != corrupted.shape:
        raise InputError("this model's tokenizer cuts the two prompts into different lengths")

    def logit_difference(logits: Float[Tensor, "batch pos d_vocab"]) -> Float[Tensor, ""]:
        return (logits[:, -1, answer] - logits[:, -1, wrong]).mean()

    clean_logits, cache = model.run_with_cache(clean)
    high, low = float(logit_difference(clean_logits)), float(logit_difference(model(corrupted)))
    print(f"Logit of {ANSWER!r} less that of {WRONG!r}, as the next token:")
    print(f"{high:+8.2f}  clean      {CLEAN!r}")
    print(f"{low:+8.2f}  corrupted  {CORRUPTED!r}")
    if abs(high - low) < 1e-3:
        raise InputError("this model answers both prompts alike: there is nothing to find")
    if high < 0 or low > 0:
        print("This model does not solve the task; the table below says little.")

    patched = get_act_patch_resid_pre(model, corrupted, cache, logit_difference)
    restored = (patched - low) / (high - low)
    print("\nThe clean residual stream put into the corrupted run, token by token, layer by layer:")
    print("0 = answers as if corrupted, 1 = answers as if clean; [ ] = the largest", end="\n\n")
    tokens = [str(token) for token in model.to_str_tokens(clean[0])]
    print(table(restored.T, tokens))
    _write_figure(restored, tokens, out)
    return 0


def table(values: Float[Tensor, "row column"], labels: Sequence[str]) -> str:
    """Rows of numbers behind their labels, the largest in brackets, at most 100 columns wide.

    Columns are layers; what does not fit stands below.
    """
    names = [_shortened(label) for label in plots.unique_labels(labels)]
    best = divmod(int(values.argmax()), values.shape[1])
    most = (WIDTH - LABEL) // (CELL + 1)
    parts = []
    for start in range(0, values.shape[1], most):
        columns = range(start, min(start + most, values.shape[1]))
        lines = [f"{'layer':<{LABEL}}" + "".join(f"{column:>{CELL}} " for column in columns)]
        for row, name in enumerate(names):
            cells = [f"{round(float(values[row, column]), 2) + 0.0:.2f}" for column in columns]
            cells = [
                f"[{cell}]" if (row, column) == best else f"{cell} "
                for cell, column in zip(cells, columns, strict=True)
            ]
            lines.append(f"{name:<{LABEL}}" + "".join(f"{cell:>{CELL + 1}}" for cell in cells))
        parts.append("\n".join(line.rstrip() for line in lines))
    return "\n\n".join(parts)


def _shortened(label: str) -> str:
    return label if len(label) < LABEL - 1 else f"{label[: LABEL - 4]}.."


def _write_figure(restored: Float[Tensor, "layer pos"], tokens: Sequence[str], out: Path) -> None:
    try:
        figure = plots.heatmap(
            restored,
            x=tokens,
            title="Residual stream patched from clean into corrupted",
            xaxis="token",
            yaxis="layer",
            colorbar="restored",
        )
    except ImportError as error:
        print(f"\nNo figure written: {error}")
        return
    print(f"\nThe same as a figure: {plots.save_html(figure, out)}")
