"""`generate`: the same text as Hugging Face's, with hooks in it."""

from __future__ import annotations

import logging

import pytest
import torch
from conftest import hf, hooked, word_tokenizer
from hf_truth import greedy, padded_batch
from tiny import VOCAB, one_per_family, quiet_transformers
from transformers import StoppingCriteria
from transformers.generation.streamers import BaseStreamer

import hookedlm
from hookedlm import HookedTransformer
from hookedlm.errors import InputError, TokenizerError

SOME = ["gpt2-base", "llama-grouped", "gpt_neox-parallel", "bloom-base", "mixtral-base"]
TEXTS = ["the cat sat on the mat", "John ran", "Mary went to the store"]
EOS = 2


@pytest.fixture(autouse=True)
def silence(caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]):
    """Nothing in this file prints, logs a warning, or advises about settings."""
    loggers = [logging.getLogger(name) for name in ("transformers", "hookedlm")]
    for logger in loggers:
        logger.addHandler(caplog.handler)
    yield
    for logger in loggers:
        logger.removeHandler(caplog.handler)
    loud = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert loud == []
    out, err = capsys.readouterr()
    assert (out, err) == ("", "")


def some_tokens(batch: int = 2, n: int = 6, seed: int = 0) -> torch.Tensor:
    return padded_batch(VOCAB, [n] * batch, "left", seed=seed)[0]


def theirs(name: str, tokens: torch.Tensor, **options) -> torch.Tensor:
    """What plain Hugging Face generates, the prompt included."""
    with quiet_transformers():
        return hf(name).generate(
            tokens, attention_mask=torch.ones_like(tokens), pad_token_id=0, **options
        )


# --- Greedy --------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("tiny", one_per_family(), ids=lambda tiny: tiny.id)
def test_greedy(tiny, use_cache: bool):
    tokens, mask = padded_batch(VOCAB, [7, 4], "left", seed=1)
    options = {"do_sample": False, "stop_at_eos": False, "max_new_tokens": 5}
    out = hooked(tiny.id).generate(
        tokens, attention_mask=mask, use_past_kv_cache=use_cache, **options
    )
    assert torch.equal(out[:, :7], tokens)
    assert torch.equal(out[:, 7:], greedy(hf(tiny.id), tokens, mask, 5))


def test_temperature_zero_is_greedy(model: HookedTransformer):
    tokens = some_tokens()
    out = model.generate(tokens, temperature=0.0, max_new_tokens=5)
    assert torch.equal(out, model.generate(tokens, do_sample=False, max_new_tokens=5))


def test_past_the_trained_length_without_learned_positions():
    """Rotary models go on; neither they nor a model at its limit gives advice."""
    out = hooked("llama-grouped").generate(some_tokens(1, 62), max_new_tokens=4, do_sample=False)
    assert out.shape[1] <= 66
    out = hooked("gpt2-base").generate(some_tokens(1, 60), max_new_tokens=4, stop_at_eos=False)
    assert out.shape[1] == 64


def test_past_the_position_embeddings(model: HookedTransformer):
    with pytest.raises(InputError, match="position embeddings for 64"):
        model.generate(some_tokens(1, 60), max_new_tokens=6, stop_at_eos=False)
    seen: list[int] = []
    hook = ("hook_embed", lambda x, hook: seen.append(hook.pos_offset))
    model.run_with_hooks(some_tokens(), fwd_hooks=[hook])
    assert seen == [0]  # where the failed run stopped is forgotten


# --- Sampling ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.5},
        {"top_k": 5},
        {"top_p": 0.7},
        {"top_k": 20, "top_p": 0.9, "temperature": 1.3},
        {"repetition_penalty": 3.0},
    ],
    ids=lambda options: "-".join(options) or "plain",
)
@pytest.mark.parametrize("name", SOME)
def test_sampling_is_hugging_faces(name: str, options: dict):
    tokens = some_tokens(batch=3)
    torch.manual_seed(5)
    ours = hooked(name).generate(tokens, max_new_tokens=8, stop_at_eos=False, **options)
    torch.manual_seed(5)
    plain = {"top_k": 0, "do_sample": True, "max_new_tokens": 8, "min_new_tokens": 0}
    eos = hf(name).generation_config.eos_token_id
    hf(name).generation_config.eos_token_id = None
    try:
        expected = theirs(name, tokens, **(plain | options))
    finally:
        hf(name).generation_config.eos_token_id = eos
    assert torch.equal(ours, expected)


def test_sampling_follows_the_seed(model: HookedTransformer):
    tokens = some_tokens()
    outs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outs.append(model.generate(tokens, max_new_tokens=10, stop_at_eos=False))
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])


def test_sampling_by_default(model: HookedTransformer):
    outs = {tuple(model.generate(some_tokens(1))[0].tolist()) for _ in range(6)}
    assert len(outs) > 1
    assert all(len(out) <= 16 for out in outs)


def test_frequency_penalty(model: HookedTransformer):
    """Checked step by step: logits less the penalty for every earlier occurrence."""
    tokens = some_tokens()
    out = model.generate(
        tokens, max_new_tokens=6, do_sample=False, freq_penalty=4.0, stop_at_eos=False
    )
    expected = tokens
    for _ in range(6):
        logits = hf("gpt2-base")(expected).logits[:, -1].detach().clone()
        for row, earlier in zip(logits, expected, strict=True):
            for token in earlier.tolist():
                row[token] -= 4.0
        expected = torch.cat([expected, logits.argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(out, expected)
    plain = model.generate(tokens, max_new_tokens=6, do_sample=False, stop_at_eos=False)
    assert not torch.equal(out, plain)


def test_users_own_processors_come_on_top(model: HookedTransformer):
    def seven_or_eight(input_ids, scores):
        scores = scores.clone()
        scores[:, :7] = scores[:, 9:] = -torch.inf
        return scores

    options = {"max_new_tokens": 8, "do_sample": False, "logits_processor": [seven_or_eight]}
    out = model.generate(some_tokens(), **options)
    assert all(set(row.tolist()) <= {7, 8} for row in out[:, 6:])
    assert len(set(out[0, 6:].tolist())) == 1
    out = model.generate(some_tokens(), freq_penalty=50.0, **options)  # now they take turns
    assert all(set(row.tolist()) == {7, 8} for row in out[:, 6:])


# --- Stopping ------------------------------------------------------------------------------------


def always(token: int, after: int) -> tuple[str, object]:
    """A hook under which row 0 says ``token`` from position ``after`` on, everyone else token 9."""

    def hook(logits, hook):
        logits = torch.full_like(logits, -10.0)
        logits[..., 9] = 0.0
        if hook.pos_offset + logits.shape[1] >= after:
            logits[0, :, token] = 10.0
        return logits

    return ("hook_logits", hook)


def test_rows_stop_at_eos_and_are_padded(model: HookedTransformer):
    with model.hooks(fwd_hooks=[always(EOS, after=8)]):
        out = model.generate(some_tokens(), do_sample=False, max_new_tokens=6)
        assert out[0, 6:].tolist() == [9, 9, EOS, 0, 0, 0]
        assert out[1, 6:].tolist() == [9] * 6
        # Nobody stops:
        out = model.generate(some_tokens(), do_sample=False, max_new_tokens=6, stop_at_eos=False)
        assert out[0, 6:].tolist() == [9, 9, EOS, EOS, EOS, EOS]
        # Every row stopped: no more is computed.
        out = model.generate(some_tokens(1), do_sample=False, max_new_tokens=6)
        assert out[0, 6:].tolist() == [9, 9, EOS]


@pytest.mark.parametrize("eos", [7, [3, 7], torch.tensor([7])])
def test_another_eos(model: HookedTransformer, eos: object):
    with model.hooks(fwd_hooks=[always(7, after=7)]):
        out = model.generate(some_tokens(), do_sample=False, max_new_tokens=4, eos_token_id=eos)
    assert out[0, 6:].tolist() == [9, 7, 0, 0]


def test_eos_without_a_tokenizer():
    model = hookedlm.load(hf("gpt2-base"))
    with model.hooks(fwd_hooks=[always(EOS, after=7)]):
        out = model.generate(some_tokens(), do_sample=False, max_new_tokens=4)
    assert out[0, 6:8].tolist() == [9, EOS]
    assert out.shape == (2, 10)


def test_stopping_criteria(model: HookedTransformer):
    class Third(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return torch.full((len(input_ids),), input_ids.shape[1] >= 9)

    out = model.generate(
        some_tokens(), max_new_tokens=9, stop_at_eos=False, stopping_criteria=[Third()]
    )
    assert out.shape == (2, 9)


# --- Text ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SOME)
def test_texts_row_by_row(name: str):
    model = hooked(name)
    options = {"do_sample": False, "max_new_tokens": 6}
    texts = model.generate(TEXTS, **options)
    assert isinstance(texts, list)
    for text, prompt in zip(texts, TEXTS, strict=True):
        alone = model.generate(prompt, **options)
        assert isinstance(alone, str)
        assert alone.startswith(prompt)
        assert len(alone.split()) <= len(prompt.split()) + 6
        assert alone.split() == [word for word in text.split() if word != "<pad>"]


def test_the_side_in_use_does_not_matter(model: HookedTransformer):
    left = hookedlm.load(
        hf("gpt2-base"), tokenizer=word_tokenizer(side="left"), default_padding_side="left"
    )
    options = {"do_sample": False, "max_new_tokens": 5}
    assert left.generate(TEXTS, **options) == model.generate(TEXTS, **options)
    tokens, mask = padded_batch(VOCAB, [7, 4], "left", seed=1)
    assert torch.equal(
        left.generate(tokens, **options), model.generate(tokens, attention_mask=mask, **options)
    )
    assert model.tokenizer.padding_side == "right"
    assert model.default_padding_side == "right"


def test_return_types(model: HookedTransformer):
    options = {"do_sample": False, "max_new_tokens": 4, "stop_at_eos": False}
    tokens = model.to_tokens("the cat")
    out = model.generate(tokens, **options)
    assert out.shape == (1, 7)
    text = model.generate("the cat", **options)
    assert text == model.tokenizer.decode(out[0, 1:])  # without bos
    assert torch.equal(model.generate("the cat", return_type="tokens", **options), out)
    assert model.generate(["the cat"], **options) == [text]
    assert model.generate(tokens, return_type="str", **options) == [text]
    assert torch.equal(model.generate(tokens[0], **options), out)
    assert model.generate("the cat", return_type="str", **options) == text
    bare = model.generate("the cat", prepend_bos=False, return_type="tokens", **options)
    assert bare.shape == (1, 6)
    assert model.generate(**options).split()  # from bos alone


def test_refused(model: HookedTransformer):
    tokens = some_tokens()
    with pytest.raises(InputError, match="return_type"):
        model.generate(tokens, return_type="string")
    with pytest.raises(InputError, match="stream"):
        model.generate(torch.zeros(1, 3, 32))
    right = torch.tensor([[4, 5, 6], [4, 0, 0]])
    with pytest.raises(InputError, match="left"):
        model.generate(right, attention_mask=(right != 0).long())
    with pytest.raises(ValueError, match="max_tokens"):
        model.generate(tokens, max_tokens=3)
    with pytest.raises(InputError, match="no positions"):
        model.generate("", prepend_bos=False)
    bare = hookedlm.load(hf("gpt2-base"))
    with pytest.raises(TokenizerError, match="tokenizer"):
        bare.generate("the cat")
    with pytest.raises(TokenizerError, match="tokenizer"):
        bare.generate(tokens, return_type="str", max_new_tokens=1)


class Listener(BaseStreamer):
    """Writes down what it is told."""

    def __init__(self):
        self.told: list[list[int]] = []
        self.ended = False

    def put(self, value: torch.Tensor) -> None:
        self.told.append(value.flatten().tolist())

    def end(self) -> None:
        self.ended = True


def test_streamer(model: HookedTransformer):
    listener = Listener()
    tokens = some_tokens(1)
    out = model.generate(
        tokens, max_new_tokens=3, do_sample=False, stop_at_eos=False, streamer=listener
    )
    assert listener.told == [tokens[0].tolist(), *([token] for token in out[0, 6:].tolist())]
    assert listener.ended


# --- Hooks ---------------------------------------------------------------------------------------


def test_hooks_see_every_step(model: HookedTransformer):
    seen: list[tuple[int, int]] = []
    hook = ("blocks.1.hook_resid_pre", lambda x, hook: seen.append((hook.pos_offset, x.shape[1])))
    options = {"max_new_tokens": 3, "do_sample": False, "stop_at_eos": False}
    with model.hooks(fwd_hooks=[hook]):
        model.generate(some_tokens(), **options)
        assert seen == [(0, 6), (6, 1), (7, 1)]
        seen.clear()
        model.generate(some_tokens(), use_past_kv_cache=False, **options)
        assert seen == [(0, 6), (0, 7), (0, 8)]
    seen.clear()
    model.generate(some_tokens(), **options)
    assert seen == []
    assert not any(point.fwd_hooks for point in model.hook_points())


@pytest.mark.parametrize("use_cache", [True, False])
def test_hooks_steer(model: HookedTransformer, use_cache: bool):
    """A direction added at every position, with and without the cache, against plain passes."""
    direction = 3 * torch.randn(32)
    hook = ("blocks.1.hook_resid_pre", lambda x, hook: x + direction)
    tokens = some_tokens()
    with model.hooks(fwd_hooks=[hook]):
        out = model.generate(
            tokens,
            max_new_tokens=4,
            do_sample=False,
            stop_at_eos=False,
            use_past_kv_cache=use_cache,
        )
    expected = tokens
    for _ in range(4):
        logits = model.run_with_hooks(expected, fwd_hooks=[hook])
        expected = torch.cat([expected, logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(out, expected)
    plain = model.generate(tokens, max_new_tokens=4, do_sample=False, stop_at_eos=False)
    assert not torch.equal(out, plain)


def test_leaves_no_trace(model: HookedTransformer):
    config = hf("gpt2-base").config.to_dict()
    before = model(some_tokens())
    torch.set_grad_enabled(True)
    model.generate(some_tokens(), max_new_tokens=2)
    assert torch.is_grad_enabled()
    assert torch.equal(model(some_tokens()), before)
    assert hf("gpt2-base").config.to_dict() == config


def test_toy_model_generates():
    cfg = {"n_layers": 2, "d_model": 16, "n_ctx": 32, "d_head": 4, "d_vocab": 20}
    model = HookedTransformer(cfg | {"act_fn": "gelu", "seed": 1, "device": "cpu"})
    tokens = torch.tensor([[3, 4, 5], [7, 8, 9]])
    options = {"max_new_tokens": 6, "do_sample": False}
    out = model.generate(tokens, **options)
    assert torch.equal(out, model.generate(tokens, use_past_kv_cache=False, **options))
    expected = tokens
    for _ in range(6):
        expected = torch.cat([expected, model(expected)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(out, expected)
