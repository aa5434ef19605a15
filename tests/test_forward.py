"""`HookedTransformer.forward`: what goes in, what comes out, and what is refused."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from conftest import hf, hooked, word_tokenizer
from hf_truth import block_outputs, logits_of, padded_batch
from tiny import VOCAB, one_per_family, tinies
from transformers import DynamicCache

import hookedlm
from hookedlm import HookedTransformer
from hookedlm.errors import InputError, TokenizerError
from hookedlm.model import Output

# One of each kind of position, layout and head.
SOME = [
    "gpt2-base",
    "llama-grouped",
    "gpt_neox-parallel",
    "bloom-base",
    "gptj-base",
    "opt-pre_norm",
    "gemma2-base",
    "falcon-alibi_sequential",
]
TEXTS = ["the cat sat on the mat", "John ran", "Mary went to the store"]
PAD, BOS = 0, 1


def some_tokens(batch: int = 2, n: int = 9, seed: int = 0) -> torch.Tensor:
    return padded_batch(VOCAB, [n] * batch, "left", seed=seed)[0]


def ids(text: str) -> torch.Tensor:
    """Plain token ids [1, pos] of a text, nothing added."""
    return word_tokenizer()(text, return_tensors="pt")["input_ids"]


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 2e-5) -> bool:
    assert a.shape == b.shape
    return torch.allclose(a, b, rtol=tolerance, atol=tolerance)


# --- Return types --------------------------------------------------------------------------------


def test_return_types(model: HookedTransformer):
    tokens = some_tokens()
    logits = model(tokens)
    assert close(logits, logits_of(hf("gpt2-base"), tokens))
    loss = model(tokens, return_type="loss")
    assert loss.shape == ()
    both = model(tokens, return_type="both")
    assert isinstance(both, Output)
    assert torch.equal(both.logits, logits)
    assert torch.equal(both.loss, loss)
    assert torch.equal(both[1], both.loss)
    assert model(tokens, return_type=None) is None


@pytest.mark.parametrize("typo", ["logit", "Loss", "", False, "none"])
def test_unknown_return_type(model: HookedTransformer, typo: object):
    with pytest.raises(InputError, match=r"return_type.*'logits', 'loss', 'both', None"):
        model(some_tokens(), return_type=typo)


@pytest.mark.parametrize("name", SOME)
def test_loss_is_hugging_faces(name: str):
    tokens = some_tokens(batch=3)
    theirs = hf(name)(input_ids=tokens, labels=tokens).loss
    assert close(hooked(name)(tokens, return_type="loss"), theirs)


def test_loss_leaves_padding_out(model: HookedTransformer):
    tokens, mask = padded_batch(VOCAB, [9, 4], "left", seed=3)
    per_token = model(tokens, return_type="loss", loss_per_token=True, attention_mask=mask)
    assert per_token.shape == (2, 8)
    assert (per_token[1, :5] == 0).all()
    logits = logits_of(hf("gpt2-base"), tokens, mask)
    rows = [
        F.cross_entropy(row[m][:-1], t[m][1:], reduction="none")
        for row, t, m in zip(logits, tokens, mask.bool(), strict=True)
    ]
    assert close(per_token[0], rows[0])
    assert close(per_token[1, 5:], rows[1])
    mean = model(tokens, return_type="loss", attention_mask=mask)
    assert close(mean, torch.cat(rows).mean())


def test_a_text_that_ends_in_the_padding_token_counts_it():
    """Rows of equal length have no padding, whatever their last token is."""
    tokenizer = word_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token  # as GPT-2 is used
    model = hookedlm.load(hf("gpt2-base"), tokenizer=tokenizer)
    texts = ["the cat </s>", "the cat sat"]
    loss = model(texts, return_type="loss", loss_per_token=True, prepend_bos=False)
    alone = model(texts[:1], return_type="loss", loss_per_token=True, prepend_bos=False)
    assert (loss != 0).all()
    assert close(loss[:1], alone)
    tokens = torch.cat([ids(text) for text in texts])
    full = torch.ones_like(tokens)
    known = model(tokens, return_type="loss", loss_per_token=True, attention_mask=full)
    assert close(known, loss)


# --- Text ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", SOME)
def test_texts_row_by_row(name: str, side: str):
    """Each padded row is that prompt alone: logits, losses and every cached activation."""
    model = hooked(name)
    logits, cache = model.run_with_cache(TEXTS, padding_side=side)
    losses = model(TEXTS, padding_side=side, return_type="loss", loss_per_token=True)
    n = logits.shape[1]
    counted = []
    for row, text in enumerate(TEXTS):
        alone, alone_cache = model.run_with_cache(text)
        m = alone.shape[1]
        real = slice(n - m, n) if side == "left" else slice(0, m)
        assert close(logits[row, real], alone[0], 1e-4)
        loss = model(text, return_type="loss", loss_per_token=True)[0]
        inner = losses[row, n - m :] if side == "left" else losses[row, : m - 1]
        assert close(inner, loss, 1e-4)
        counted.append(loss)
        for key in ("hook_embed", "blocks.1.attn.hook_z", "blocks.2.hook_resid_post"):
            assert close(cache[key][row, real], alone_cache[key][0], 1e-4), key
        pattern = cache["pattern", 1][row, :, real, real]
        assert close(pattern, alone_cache["pattern", 1][0], 1e-4)
    mean = model(TEXTS, padding_side=side, return_type="loss")
    assert close(mean, torch.cat(counted).mean(), 1e-4)


def test_default_padding_side(model: HookedTransformer):
    left = hookedlm.load(hf("gpt2-base"), tokenizer=word_tokenizer(), default_padding_side="left")
    assert close(left(TEXTS), model(TEXTS, padding_side="left"))
    assert close(left(TEXTS, padding_side="right"), model(TEXTS))
    assert not torch.allclose(left(TEXTS)[1], model(TEXTS)[1])


@pytest.mark.parametrize("adds_bos", [False, True])
def test_bos(adds_bos: bool):
    model = hookedlm.load(hf("gpt2-base"), tokenizer=word_tokenizer(adds_bos=adds_bos))
    bare = ids("the cat")
    with_bos = torch.cat([torch.tensor([[BOS]]), bare], dim=1)
    for options, expected in [
        ({}, with_bos),
        ({"prepend_bos": True}, with_bos),
        ({"prepend_bos": None}, with_bos),
        ({"prepend_bos": False}, bare),
    ]:
        assert close(model("the cat", **options), logits_of(hf("gpt2-base"), expected))
    # Never two: a text that brings its own gets no other.
    assert close(model("<s> the cat"), logits_of(hf("gpt2-base"), with_bos))
    # Tokens are taken as they are.
    assert model(bare).shape[1] == 2


def test_default_prepend_bos():
    model = hookedlm.load(hf("gpt2-base"), tokenizer=word_tokenizer(), default_prepend_bos=False)
    assert model("the cat").shape[1] == 2
    assert model("the cat", prepend_bos=True).shape[1] == 3


def test_text_needs_a_tokenizer():
    with pytest.raises(TokenizerError, match="tokenizer"):
        hookedlm.load(hf("gpt2-base"))("the cat")


# --- Tokens and masks ----------------------------------------------------------------------------


def test_one_dimensional_tokens(model: HookedTransformer):
    tokens = some_tokens(batch=1)
    assert torch.equal(model(tokens[0]), model(tokens))
    mask = torch.ones_like(tokens[0])
    mask[:2] = 0
    assert torch.equal(
        model(tokens[0], attention_mask=mask), model(tokens, attention_mask=mask[None])
    )


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.int16])
def test_integer_dtypes(model: HookedTransformer, dtype: torch.dtype):
    tokens = some_tokens()
    assert torch.equal(model(tokens.to(dtype)), model(tokens))
    assert torch.equal(
        model(tokens.to(dtype), return_type="loss"), model(tokens, return_type="loss")
    )


@pytest.mark.parametrize("tiny", one_per_family(), ids=lambda tiny: tiny.id)
def test_mask_of_any_dtype(tiny):
    tokens, mask = padded_batch(VOCAB, [9, 5], "left", seed=1)
    model = hooked(tiny.id)
    truth = logits_of(hf(tiny.id), tokens, mask)
    logits = model(tokens, attention_mask=mask)
    assert close(logits[mask.bool()], truth[mask.bool()], 1e-4)
    for dtype in (torch.bool, torch.int32, torch.float32):
        assert torch.equal(model(tokens, attention_mask=mask.to(dtype)), logits)
    # One of ones says nothing.
    assert torch.equal(model(tokens, attention_mask=torch.ones_like(mask)), model(tokens))


def test_right_padding_by_mask(model: HookedTransformer):
    tokens, mask = padded_batch(VOCAB, [9, 5], "right", seed=1)
    logits = model(tokens, attention_mask=mask)
    assert close(logits[1, :5], model(tokens[1:, :5])[0])


def test_left_padding_is_inferred_where_the_tokenizer_pads_left():
    left = hookedlm.load(hf("gpt2-base"), tokenizer=word_tokenizer(), default_padding_side="left")
    tokens, mask = padded_batch(VOCAB, [9, 5], "left", pad_id=PAD, seed=1)
    assert torch.equal(left(tokens), left(tokens, attention_mask=mask))
    assert close(left(tokens)[1, 4:], left(tokens[1:, 4:])[0])
    # The user's own side in the call counts as well; padding on the right changes nothing real.
    right = hooked("gpt2-base")
    assert torch.equal(right(tokens, padding_side="left"), left(tokens))
    assert not torch.allclose(right(tokens)[1], left(tokens)[1])


@pytest.mark.parametrize(
    "input, options, match",
    [
        (torch.zeros(2, 3, 4, dtype=torch.long), {}, "tokens are integers"),
        (torch.zeros(2, 3, dtype=torch.bool), {}, "tokens are integers"),
        (torch.zeros(2, 5), {}, "start_at_layer=0"),
        (torch.zeros(2, 5, 32), {}, "start_at_layer=0"),
        (torch.zeros(2, 5, 31), {"start_at_layer": 1}, r"\[batch, pos, 32\]"),
        (torch.zeros(2, 5, dtype=torch.long), {"start_at_layer": 1}, r"\[batch, pos, 32\]"),
        ("the cat", {"start_at_layer": 1}, "not text"),
        (3, {}, "int"),
        (None, {}, "NoneType"),
        ([], {}, "text"),
        ([3, 4], {}, "text"),
        (torch.tensor([[3, VOCAB]]), {}, f"{VOCAB - 1}"),
        (torch.tensor([[3, -1]]), {}, f"{VOCAB - 1}"),
        (torch.zeros(1, 0, dtype=torch.long), {}, "no positions"),
        (torch.zeros(2, 5, dtype=torch.long), {"attention_mask": torch.zeros(2, 4)}, "5"),
        (torch.zeros(2, 5, dtype=torch.long), {"attention_mask": torch.zeros(3, 5)}, "3"),
    ],
)
def test_refused_inputs(model: HookedTransformer, input: object, options: dict, match: str):
    with pytest.raises(InputError, match=match):
        model(input, **options)


def test_unknown_keywords(model: HookedTransformer):
    with pytest.raises(TypeError, match="return_typ"):
        model(some_tokens(), return_typ="logits")


@pytest.mark.parametrize("name", ["gpt2-base", "gptj-base", "opt-pre_norm", "gpt_neo-alternating"])
def test_too_many_positions(name: str):
    model = hooked(name)
    assert model(some_tokens(1, 64)).shape[1] == 64
    with pytest.raises(InputError, match=r"65 positions.*64"):
        model(some_tokens(1, 65))
    cache = DynamicCache()
    model(some_tokens(1, 60), past_kv_cache=cache)
    with pytest.raises(InputError, match=r"65 positions.*64"):
        model(some_tokens(1, 5), past_kv_cache=cache)


def test_long_text_is_cut_with_a_warning(model: HookedTransformer):
    with pytest.warns(UserWarning, match="64"):
        assert model("the cat " * 50).shape[1] == 64


# --- Part of the layers --------------------------------------------------------------------------


@pytest.mark.parametrize("name", SOME)
def test_two_halves_are_the_whole(name: str):
    model = hooked(name)
    tokens, mask = padded_batch(VOCAB, [9, 5], "left", seed=2)
    entering, leaving, logits = block_outputs(hf(name), tokens, mask)
    real = mask.bool()
    for layer in range(len(entering)):
        stream = model(tokens, stop_at_layer=layer, attention_mask=mask)
        assert close(stream[real], entering[layer][real], 1e-4)
        whole = model(stream, start_at_layer=layer, attention_mask=mask)
        assert close(whole[real], logits[real], 1e-4)
    last = model(tokens, stop_at_layer=len(entering), attention_mask=mask)
    assert close(last[real], leaving[-1][real], 1e-4)


def test_negative_layers(model: HookedTransformer):
    tokens = some_tokens()
    stream = model(tokens, stop_at_layer=-1)
    assert torch.equal(stream, model(tokens, stop_at_layer=2))
    assert torch.equal(model(stream, start_at_layer=-1), model(tokens))
    some = model(model(tokens, stop_at_layer=0), start_at_layer=0, stop_at_layer=-2)
    assert torch.equal(some, model(tokens, stop_at_layer=1))
    # Past the last block only the norm and the unembedding are left.
    assert torch.equal(model(model(tokens, stop_at_layer=3), start_at_layer=3), model(tokens))


@pytest.mark.parametrize("argument", ["start_at_layer", "stop_at_layer"])
@pytest.mark.parametrize("layer", [4, -4, 100])
def test_layers_out_of_range(model: HookedTransformer, argument: str, layer: int):
    input = torch.zeros(1, 3, 32) if argument == "start_at_layer" else some_tokens()
    with pytest.raises(InputError, match=f"{argument}={layer}.*-3 to 3"):
        model(input, **{argument: layer})


def test_loss_from_a_stream(model: HookedTransformer):
    tokens, mask = padded_batch(VOCAB, [9, 5], "left", seed=2)
    stream = model(tokens, stop_at_layer=1, attention_mask=mask)
    options = {"start_at_layer": 1, "attention_mask": mask, "return_type": "loss"}
    loss = model(stream, tokens=tokens, **options)
    assert close(loss, model(tokens, attention_mask=mask, return_type="loss"))
    with pytest.raises(InputError, match="tokens="):
        model(stream, **options)


def test_stream_keeps_its_gradient(model: HookedTransformer):
    stream = model(some_tokens(), stop_at_layer=1).detach().requires_grad_()
    model(stream, start_at_layer=1).sum().backward()
    assert stream.grad is not None
    assert stream.grad.abs().max() > 0


# --- Key-value cache -----------------------------------------------------------------------------


@pytest.mark.parametrize("tiny", one_per_family(), ids=lambda tiny: tiny.id)
def test_cache_continues(tiny):
    model, tokens = hooked(tiny.id), some_tokens(n=12)
    whole = model(tokens)
    cache = DynamicCache()
    pieces = [model(piece, past_kv_cache=cache) for piece in tokens.split([6, 1, 5], dim=1)]
    assert close(torch.cat(pieces, dim=1), whole, 1e-4)
    assert cache.get_seq_length() == 12


@pytest.mark.parametrize("mask_of", ["new", "all", "nothing"])
@pytest.mark.parametrize("name", SOME)
def test_cache_of_a_padded_batch(name: str, mask_of: str):
    model = hooked(name)
    tokens, mask = padded_batch(VOCAB, [12, 8], "left", seed=4)
    whole = model(tokens, attention_mask=mask)
    cache = DynamicCache()
    first = model(tokens[:, :7], attention_mask=mask[:, :7], past_kv_cache=cache)
    pieces = [first]
    for end in range(8, 13):
        given = {"new": mask[:, end - 1 : end], "all": mask[:, :end], "nothing": None}[mask_of]
        step = model(tokens[:, end - 1 : end], attention_mask=given, past_kv_cache=cache)
        pieces.append(step)
    assert close(torch.cat(pieces, dim=1)[mask.bool()], whole[mask.bool()], 1e-4)


def test_cache_mask_of_wrong_length(model: HookedTransformer):
    cache = DynamicCache()
    model(some_tokens(n=5), past_kv_cache=cache)
    mask = torch.ones(2, 4, dtype=torch.long)
    mask[0, 0] = 0
    with pytest.raises(InputError, match="2 for the new tokens or 7 with the 5 cached"):
        model(some_tokens(n=2), attention_mask=mask, past_kv_cache=cache)


def test_cache_wants_a_cache(model: HookedTransformer):
    with pytest.raises(InputError, match="DynamicCache"):
        model(some_tokens(), past_kv_cache=[(1, 2)])


def test_hooks_know_where_they_are(model: HookedTransformer):
    seen = []
    cache = DynamicCache()
    hook = ("blocks.0.hook_resid_pre", lambda x, hook: seen.append((hook.pos_offset, x.shape[1])))
    for piece in some_tokens(n=6).split([4, 2], dim=1):
        model.run_with_hooks(piece, past_kv_cache=cache, fwd_hooks=[hook])
    assert seen == [(0, 4), (4, 2)]


# --- No more than needed -------------------------------------------------------------------------


def blocks_run(model: HookedTransformer, monkeypatch: pytest.MonkeyPatch, *args, **kwargs):
    """Which blocks and whether the unembedding ran in one forward pass."""
    ran: list[object] = []
    with monkeypatch.context() as patch:
        for i, part in enumerate([*model.blocks, model.unembed]):
            label = i if i < len(model.blocks) else "unembed"

            def forward(*inner, _old=part.forward, _label=label):
                ran.append(_label)
                return _old(*inner)

            patch.setattr(part, "forward", forward)
        model.run_with_hooks(*args, **kwargs)
    return ran


def test_runs_only_as_far_as_needed(model: HookedTransformer, monkeypatch: pytest.MonkeyPatch):
    tokens = some_tokens()

    def look(x, hook):
        pass

    def ran(*names: str, **options):
        hooks = [(name, look) for name in names]
        return blocks_run(model, monkeypatch, tokens, fwd_hooks=hooks, **options)

    assert ran(return_type=None) == []
    assert ran("hook_embed", return_type=None) == []
    assert ran("blocks.1.attn.hook_q", return_type=None) == [0, 1]
    assert ran("blocks.0.mlp.hook_post", "blocks.2.hook_resid_pre", return_type=None) == [0, 1]
    assert ran("blocks.0.hook_resid_pre", return_type=None) == []
    assert ran("blocks.2.hook_resid_pre", "blocks.2.attn.hook_q", return_type=None) == [0, 1, 2]
    assert ran("ln_final.hook_scale", return_type=None) == [0, 1, 2]
    assert ran("hook_logits", return_type=None) == [0, 1, 2, "unembed"]
    assert ran("blocks.0.attn.hook_q") == [0, 1, 2, "unembed"]
    assert ran("blocks.0.attn.hook_q", stop_at_layer=1) == [0]


def test_nothing_asked_for_still_fills_a_cache(model: HookedTransformer):
    cache = DynamicCache()
    model(some_tokens(), return_type=None, past_kv_cache=cache)
    assert cache.get_seq_length() == 9


def test_no_warnings_and_no_state(model: HookedTransformer):
    """Runs of other shapes, padded, cached and cut short, leave nothing behind."""
    tokens, mask = padded_batch(VOCAB, [9, 5], "left", seed=5)
    before = model(tokens)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(tokens, attention_mask=mask)
        model(tokens[:, :3], past_kv_cache=DynamicCache())
        model(tokens, stop_at_layer=1)
        model(TEXTS, return_type="both")
    assert torch.equal(model(tokens), before)


@pytest.mark.parametrize("tiny", tinies("llama")[:1], ids=lambda tiny: tiny.id)
def test_inference_mode_and_back(tiny):
    model, tokens = hookedlm.load(tiny.build()), some_tokens()
    with torch.inference_mode():
        inside = model(tokens)
    loss = model(tokens, return_type="loss")
    loss.backward()
    assert close(model(tokens).detach(), inside)
