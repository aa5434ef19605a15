"""What every test starts from: one thread, no network, a fixed seed, a small tokenizer."""

from __future__ import annotations

import functools
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers reads it

import pytest
import torch
from tiny import TINIES
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast
from transformers.activations import NewGELUActivation

import hookedlm
from hookedlm import HookedTransformer
from hookedlm.layers.activations import gelu_tanh

# Tiny models gain nothing from threads, and several workers of a test run would fight over cores.
torch.set_num_threads(int(os.environ.get("HOOKEDLM_TEST_THREADS", "1")))

WORDS = "the cat sat on a mat and Mary John went to store dog ran home with red blue".split()


@pytest.fixture(autouse=True)
def seed() -> int:
    """The global seed, the same at the start of every test."""
    torch.manual_seed(0)
    return 0


def word_tokenizer(*, adds_bos: bool = False, side: str = "right") -> PreTrainedTokenizerFast:
    """One token a word, in the 96 ids that the tiny models know: pad 0, bos 1, eos 2."""
    vocabulary = ["<pad>", "<s>", "</s>", "<unk>", *WORDS, *(f"w{i}" for i in range(96 - 22))]
    backend = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>")
    )
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if adds_bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 1)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        padding_side=side,
    )


@pytest.fixture(name="word_tokenizer")
def _word_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer that fits the tiny models and adds nothing by itself."""
    return word_tokenizer()


@pytest.fixture
def bos_tokenizer() -> PreTrainedTokenizerFast:
    """The same, putting bos in front of every text by itself."""
    return word_tokenizer(adds_bos=True)


@functools.cache
def hf(name: str) -> torch.nn.Module:
    """One of the tiny models by its id, as Hugging Face runs it. Shared: leave it as it is."""
    [tiny] = [tiny for tiny in TINIES if tiny.id == name]
    return tiny.build()


@functools.cache
def hooked(name: str) -> HookedTransformer:
    """The same, hooked, with a tokenizer. Shared: leave it as it is."""
    return hookedlm.load(hf(name), tokenizer=word_tokenizer())


@pytest.fixture
def one_gelu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hugging Face's GELU of eight operations as the one kernel that it is here: without that
    difference, numbers are equal to the bit."""
    monkeypatch.setattr(NewGELUActivation, "forward", lambda self, x: gelu_tanh(x))


@pytest.fixture
def model() -> HookedTransformer:
    """A hooked tiny GPT-2."""
    return hooked("gpt2-base")
