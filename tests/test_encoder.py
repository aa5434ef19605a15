"""`HookedEncoder`: Hugging Face's BERT to the last digit, every hook point alive, parts that add
up, and the doors it comes in by."""

from __future__ import annotations

import warnings

import pytest
import torch
from encoders import check_edit, check_stream_is_a_sum, drawn, without
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForNextSentencePrediction,
    BertForPreTraining,
    BertTokenizerFast,
)

import hookedlm
from hookedlm import HookedTransformerConfig
from hookedlm.encoder import HookedEncoder
from hookedlm.encoder.next_sentence import ANSWERS, BertNextSentencePrediction
from hookedlm.errors import (
    ConversionError,
    HookNameError,
    InputError,
    LoadError,
    TokenizerError,
    WeightError,
)

SIZES = dict(
    vocab_size=60,
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=4,
    intermediate_size=48,
    max_position_embeddings=24,
    layer_norm_eps=1e-3,
)
WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] the cat sat on a mat dog ran home mary john".split()
TOKENS = torch.randint(5, 60, (2, 9), generator=torch.Generator().manual_seed(0))
MASK = torch.tensor([[1] * 9, [1] * 6 + [0] * 3])
TYPES = torch.tensor([[0] * 4 + [1] * 5, [0] * 3 + [1] * 6])


def bert(kind=BertForPreTraining, **more) -> torch.nn.Module:
    """A random BERT in which no weight is a one or a zero."""
    return drawn(lambda: kind(BertConfig(**SIZES | more)))


@pytest.fixture(scope="module")
def theirs() -> torch.nn.Module:
    return bert()


@pytest.fixture(scope="module")
def tokenizer() -> BertTokenizerFast:
    words = [*WORDS, *(f"w{i}" for i in range(60 - len(WORDS)))]
    return BertTokenizerFast(vocab={word: i for i, word in enumerate(words)})


@pytest.fixture(scope="module")
def model(theirs, tokenizer) -> HookedEncoder:
    return HookedEncoder.from_pretrained("tiny", hf_model=theirs, tokenizer=tokenizer)


GIVEN = [
    {},
    {"one_zero_attention_mask": MASK},
    {"token_type_ids": TYPES},
    {"token_type_ids": TYPES, "one_zero_attention_mask": MASK},
]


def hf_inputs(given: dict) -> dict:
    renamed = {"one_zero_attention_mask": "attention_mask", "token_type_ids": "token_type_ids"}
    return {renamed[name]: value for name, value in given.items()}


# Parity -------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("one_gelu")
@pytest.mark.parametrize("given", GIVEN, ids=lambda given: "+".join(given) or "plain")
@pytest.mark.parametrize("act", ["gelu", "gelu_new", "relu"])
def test_numbers_are_hugging_faces(given, act):
    theirs = bert(hidden_act=act)
    model = HookedEncoder.from_pretrained("tiny", hf_model=theirs)
    with torch.no_grad():
        truth = theirs(TOKENS, **hf_inputs(given), output_hidden_states=True)
        assert torch.equal(model(TOKENS, **given), truth.prediction_logits)
        says = model(TOKENS, return_type="next_sentence", **given)
        assert torch.equal(says, truth.seq_relationship_logits)
        out = model.encoder_output(TOKENS, **given)
        assert torch.equal(out, truth.hidden_states[-1])
        _, cache = model.run_with_cache(TOKENS, **given)
    real = given.get("one_zero_attention_mask", torch.ones_like(TOKENS)).bool()
    ours = [cache["hook_full_embed"]]
    ours += [cache[f"blocks.{i}.hook_normalized_resid_post"] for i in range(3)]
    for mine, his in zip(ours, truth.hidden_states, strict=True):
        torch.testing.assert_close(mine[real], his[real], rtol=1e-5, atol=1e-5)


def test_patterns_are_hugging_faces(model, theirs):
    theirs.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            truth = theirs(TOKENS, attention_mask=MASK, output_attentions=True).attentions
    finally:
        theirs.set_attn_implementation("sdpa")
    _, cache = model.run_with_cache(TOKENS, one_zero_attention_mask=MASK)
    for layer, pattern in enumerate(truth):
        ours = cache["pattern", layer]
        torch.testing.assert_close(ours[:, :, :6], pattern[:, :, :6], rtol=1e-5, atol=1e-6)
        assert not ours[1, :, :, 6:].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(theirs, dtype):
    import copy

    cast = copy.deepcopy(theirs).to(dtype)
    model = HookedEncoder.from_pretrained("tiny", hf_model=cast, dtype=dtype)
    with torch.no_grad():
        assert torch.equal(model(TOKENS), cast(TOKENS).prediction_logits)
    assert model.cfg.dtype == dtype


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_the_kernel_hugging_face_was_to_use_does_not_matter(implementation):
    theirs = bert(attn_implementation=implementation)
    model = HookedEncoder.from_pretrained("tiny", hf_model=theirs)
    with torch.no_grad():
        ours = model(TOKENS, one_zero_attention_mask=MASK)[MASK.bool()]
        truth = theirs(TOKENS, attention_mask=MASK).prediction_logits[MASK.bool()]
    torch.testing.assert_close(ours, truth, rtol=1e-5, atol=1e-5)


def test_weights_are_hugging_faces_tensors(model, theirs):
    layer = theirs.bert.encoder.layer[1]
    attn = model.blocks[1].attn
    assert attn.W_Q.data_ptr() == layer.attention.self.query.weight.data_ptr()
    assert attn.W_O.data_ptr() == layer.attention.output.dense.weight.data_ptr()
    assert model.W_E.data_ptr() == model.W_U.data_ptr()  # tied there, tied here
    assert model.W_E.data_ptr() == theirs.bert.embeddings.word_embeddings.weight.data_ptr()
    assert model.W_Q.shape == (3, 4, 32, 8)
    assert model.W_in.shape == (3, 32, 48)
    assert model.W_E_pos.shape == (60 + 24, 32)
    assert model.b_U.shape == (60,)
    assert model.QK.shape == (3, 4, 32, 32)
    assert model.all_head_labels()[-1] == "L2H3"
    assert model.cfg.attention_dir == "bidirectional"
    assert (model.cfg.d_vocab, model.cfg.n_ctx, model.cfg.eps) == (60, 24, 1e-3)


def test_a_wrong_reading_is_noticed(theirs, monkeypatch):
    """The check when a model loads: with one weight read otherwise it must not pass."""
    from hookedlm.layers.bert import BertMLMHead

    monkeypatch.setattr(BertMLMHead, "forward", lambda self, resid: self.ln(resid))
    with pytest.raises(ConversionError, match="logits differ"):
        HookedEncoder.from_pretrained("tiny", hf_model=theirs)


# Hooks --------------------------------------------------------------------------------------------


def test_the_classic_names_in_firing_order(model):
    _, cache = model.run_with_cache(TOKENS)
    names = list(cache)
    assert names[:6] == [
        "embed.hook_embed",
        "embed.hook_pos_embed",
        "embed.hook_token_type_embed",
        "embed.ln.hook_scale",
        "embed.ln.hook_normalized",
        "hook_full_embed",
    ]
    block = [name.removeprefix("blocks.1.") for name in names if name.startswith("blocks.1.")]
    assert block == [
        "hook_resid_pre",
        *(f"attn.hook_{x}" for x in ("q", "k", "v", "attn_scores", "pattern", "z")),
        "hook_attn_out",
        "hook_resid_mid",
        "ln1.hook_scale",
        "ln1.hook_normalized",
        "mlp.hook_pre",
        "mlp.hook_post",
        "hook_mlp_out",
        "hook_resid_post",
        "ln2.hook_scale",
        "ln2.hook_normalized",
        "hook_normalized_resid_post",
    ]
    assert names[-3:] == ["mlm_head.ln.hook_scale", "mlm_head.ln.hook_normalized", "hook_logits"]


def every_point() -> list[str]:
    model = HookedEncoder.from_pretrained("tiny", hf_model=bert())
    return [name for name in model.hook_dict if not name.startswith(("blocks.0", "blocks.2"))]


@pytest.mark.parametrize("name", every_point())
def test_every_hook_fires_and_its_edit_counts(model, name):
    answer = "next_sentence" if name.startswith(("pooler", "nsp")) else "logits"
    axes = model.hook_dict[name].axes
    sizes = dict(batch=2, pos=9, key_pos=9, head=4, kv_head=4, d_head=8, d_model=32, d_mlp=48)
    sizes |= {"d_vocab": 60, "choice": 2, "1": 1}

    def run(hooks):
        return model.run_with_hooks(TOKENS, return_type=answer, fwd_hooks=hooks)

    check_edit(model, name, tuple(sizes[axis] for axis in axes), run)


def test_listening_changes_nothing(model):
    with torch.no_grad():
        plain = model(TOKENS, one_zero_attention_mask=MASK)
        heard = model.run_with_hooks(
            TOKENS,
            one_zero_attention_mask=MASK,
            fwd_hooks=[(lambda name: True, lambda x, hook: None)],
        )
    torch.testing.assert_close(plain, heard, rtol=1e-5, atol=1e-5)


def test_entries_computed_when_read_are_those_of_a_live_hook(model):
    _, cache = model.run_with_cache(TOKENS, one_zero_attention_mask=MASK)
    assert "blocks.1.attn.hook_pattern" not in cache.cache_dict.recorded()
    for name in cache:
        _, live = model.run_with_cache(TOKENS, one_zero_attention_mask=MASK, names_filter=name)
        finite = torch.isfinite(live[name])
        assert torch.equal(finite, torch.isfinite(cache[name]))
        torch.testing.assert_close(cache[name][finite], live[name][finite], rtol=1e-4, atol=1e-5)


def test_nothing_asked_nothing_run(model):
    ran = []
    with model.hooks(fwd_hooks=[("hook_full_embed", lambda x, hook: ran.append(hook.name))]):
        assert model(TOKENS, return_type=None) is None
    assert ran == ["hook_full_embed"]
    _, cache = model.run_with_cache(
        TOKENS, return_type=None, names_filter=["pooler.hook_pooler_out", "hook_logits"]
    )
    assert cache["pooler.hook_pooler_out"].shape == (2, 32)
    assert cache["hook_logits"].shape == (2, 9, 60)


def test_a_misspelt_hook(model):
    with pytest.raises(HookNameError, match="hook_full_embed"):
        model.run_with_cache(TOKENS, names_filter="hook_ful_embed")
    with pytest.raises(KeyError, match=r"embed\.hook_embed"):
        model.run_with_cache(TOKENS)[1]["hook_embed"]


# Parts that add up --------------------------------------------------------------------------------


@pytest.mark.parametrize("batched", [True, False])
def test_the_stream_is_a_sum(model, batched):
    with torch.no_grad():
        _, cache = model.run_with_cache(TOKENS[: 2 if batched else 1], remove_batch_dim=not batched)
    check_stream_is_a_sum(model, cache, "blocks.2.hook_normalized_resid_post")
    labels = cache.decompose_resid(return_labels=True)[1]
    assert labels[:4] == ["embed", "pos_embed", "token_type_embed", "0_attn_out"]


def test_logits_are_no_sum(model):
    _, cache = model.run_with_cache(TOKENS)
    for ask in (
        lambda: cache.head_logit_attrs(7),
        lambda: cache.logit_attrs(cache.decompose_resid(), 7),
    ):
        with pytest.raises(InputError, match="no linear function"):
            ask()


# Text ---------------------------------------------------------------------------------------------


def test_texts_pairs_and_predictions(model, theirs, tokenizer):
    texts = ["the cat sat on [MASK]", "mary ran"]
    _, types, mask = model.to_tokens(texts)
    assert mask.tolist()[1] == [1, 1, 1, 1, 0, 0, 0]
    assert not types.any()
    with torch.no_grad():
        alone = theirs(**tokenizer(texts[1], return_tensors="pt")).prediction_logits
        torch.testing.assert_close(model(texts)[1, :4], alone[0], rtol=1e-5, atol=1e-5)
        truth = theirs(**tokenizer(texts[0], return_tensors="pt")).prediction_logits[0, 5].argmax()
        assert model(texts[0], return_type="predictions") == tokenizer.decode([int(truth)])
        both = model("[MASK] sat on [MASK]", return_type="predictions")
    assert len(both) == 2
    with pytest.raises(InputError, match=r"\[MASK\]"):
        model("the cat", return_type="predictions")
    assert model.to_tokens(("the cat", "the dog"))[0].shape == (2, 4)
    _, types, _ = model.to_tokens([("the cat", "the dog ran")])
    assert types.tolist() == [[0, 0, 0, 0, 1, 1, 1, 1]]
    long, _, _ = model.to_tokens("the cat " * 30)
    assert long.shape == (1, 24)


def test_next_sentences(model, theirs, tokenizer):
    pairs = [["the cat sat", "mary ran home"], ["the dog", "a mat"]]
    nsp = BertNextSentencePrediction(model)
    with torch.no_grad():
        inputs = tokenizer([tuple(pair) for pair in pairs], return_tensors="pt", padding=True)
        truth = theirs(**inputs).seq_relationship_logits
        assert torch.equal(nsp(pairs), truth)
        logits, cache = nsp.run_with_cache(pairs)
    torch.testing.assert_close(logits, truth, rtol=1e-5, atol=1e-5)
    assert torch.equal(cache["nsp_head.hook_nsp_out"], logits)
    assert nsp(pairs, return_type="predictions") == [ANSWERS[i] for i in truth.argmax(-1)]
    assert nsp(pairs[0], return_type="predictions") in ANSWERS
    for wrong in (["one"], [["a", "b", "c"]]):
        with pytest.raises(InputError, match="two sentences"):
            nsp(wrong)
    with pytest.raises(InputError, match="token_type_ids"):
        nsp(TOKENS)
    with pytest.raises(InputError, match="return_type"):
        nsp(pairs, return_type="logit")


# Doors --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind", [BertForMaskedLM, BertForPreTraining, BertForNextSentencePrediction]
)
def test_checkpoint_folders(kind, tokenizer, tmp_path):
    theirs = bert(kind)
    theirs.save_pretrained(tmp_path / "tiny")
    tokenizer.save_pretrained(tmp_path / "tiny")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers lists what the checkpoint lacks
        model = HookedEncoder.from_pretrained(str(tmp_path / "tiny"), device="cpu")
    assert model.cfg.model_name == "tiny"
    with torch.no_grad():
        truth = theirs.base_model(TOKENS).last_hidden_state
        assert torch.equal(model.encoder_output(TOKENS), truth)
        if kind is BertForNextSentencePrediction:
            with pytest.raises(InputError, match="masked-language-model head"):
                model(TOKENS)
            with pytest.raises(WeightError, match="W_U"):
                _ = model.W_U
        else:
            out = theirs(TOKENS)
            logits = out.logits if kind is BertForMaskedLM else out.prediction_logits
            assert torch.equal(model(TOKENS), logits)
            assert model("the [MASK]", return_type="predictions")
        if kind is BertForMaskedLM:
            with pytest.raises(InputError, match="pooler"):
                model(TOKENS, return_type="next_sentence")
            with pytest.raises(InputError, match="pooler"):
                BertNextSentencePrediction(model)


def test_a_checkpoint_without_its_weights(tmp_path):
    bert().save_pretrained(tmp_path)
    without(tmp_path, "layer.1.output.dense")
    with pytest.raises(LoadError, match=r"layer\.1\.output\.dense"):
        HookedEncoder.from_pretrained(str(tmp_path))


def test_what_is_no_encoder(tmp_path):
    from tiny import tinies

    gpt2 = tinies("gpt2")[0].build()
    with pytest.raises(ConversionError, match=r"hookedlm\.load"):
        HookedEncoder.from_pretrained("x", hf_model=gpt2)
    gpt2.save_pretrained(tmp_path)
    with pytest.raises(LoadError, match="gpt2"):
        HookedEncoder.from_pretrained(str(tmp_path))
    with pytest.raises(ConversionError, match="is_decoder"):
        HookedEncoder.from_pretrained("x", hf_model=bert(BertForMaskedLM, is_decoder=True))
    with pytest.raises(LoadError):
        HookedEncoder.from_pretrained(str(tmp_path / "nowhere"))


def test_from_a_config():
    cfg = HookedTransformerConfig(
        n_layers=2,
        d_model=16,
        n_ctx=12,
        d_head=8,
        d_vocab=30,
        act_fn="gelu",
        attention_dir="bidirectional",
        seed=3,
    )
    state = torch.get_rng_state()
    first, second = HookedEncoder(cfg), HookedEncoder(cfg)
    assert torch.equal(state, torch.get_rng_state())
    tokens = torch.randint(30, (2, 5))
    assert torch.equal(first(tokens), second(tokens))
    assert first(tokens).shape == (2, 5, 30)
    loss = first(tokens).log_softmax(-1)[..., 0].mean()
    loss.backward()
    assert first.blocks[0].attn.W_Q.grad.abs().sum() > 0


def test_bad_input(model):
    for wrong, says in (
        (torch.rand(2, 3), "integers"),
        (torch.zeros(1, 0, dtype=torch.long), "integers"),
        (torch.zeros(1, 25, dtype=torch.long), "24"),
    ):
        with pytest.raises(InputError, match=says):
            model(wrong)
    with pytest.raises(InputError, match="token_type_ids"):
        model(TOKENS, token_type_ids=TYPES[:1])
    with pytest.raises(InputError, match="return_type"):
        model(TOKENS, return_type="logit")
    bare = HookedEncoder.from_pretrained("x", hf_model=bert())
    with pytest.raises(TokenizerError):
        bare("the cat")


def test_moving_and_copying(theirs):
    import copy

    model = HookedEncoder.from_pretrained("x", hf_model=copy.deepcopy(theirs))
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.blocks[0].attn.W_O.zero_()
        assert torch.equal(model(TOKENS), theirs(TOKENS).prediction_logits)
    assert not torch.allclose(model(TOKENS), twin(TOKENS))
    model.to(torch.float64)
    assert model(TOKENS).dtype == torch.float64
    assert model.W_E.data_ptr() == model.W_U.data_ptr()
    assert model.cpu() is model


def test_load_takes_a_bert_too():
    """As a language model whose positions all see each other, its stream normed after additions."""
    theirs = bert(BertForMaskedLM)
    model = hookedlm.load(theirs)
    with torch.no_grad():
        assert torch.equal(model(TOKENS), theirs(TOKENS).logits)
    assert model.cfg.attention_dir == "bidirectional"
