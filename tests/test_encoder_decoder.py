"""`HookedEncoderDecoder`: Hugging Face's T5 and BART, every hook point alive, streams that add up,
text generated as Hugging Face generates it, and the doors it comes in by."""

from __future__ import annotations

import copy
import functools
from dataclasses import replace

import pytest
import torch
from conftest import word_tokenizer
from encoders import check_edit, without
from tiny import perturb, quiet_transformers, tinies
from transformers import (
    BartConfig,
    BartForCausalLM,
    BartForConditionalGeneration,
    BlenderbotConfig,
    BlenderbotForConditionalGeneration,
    MarianConfig,
    MarianMTModel,
    MBartConfig,
    MBartForConditionalGeneration,
    MT5Config,
    MT5ForConditionalGeneration,
    MvpConfig,
    MvpForConditionalGeneration,
    PegasusConfig,
    PegasusForConditionalGeneration,
    PLBartConfig,
    PLBartForConditionalGeneration,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
    T5Model,
    UMT5Config,
    UMT5ForConditionalGeneration,
)

from hookedlm import HookedTransformerConfig
from hookedlm.encoder_decoder import HookedEncoderDecoder
from hookedlm.errors import (
    ConfigError,
    ConversionError,
    HookNameError,
    InputError,
    LoadError,
    TokenizerError,
    WeightError,
)
from hookedlm.families.t5 import ENCODER_DECODERS
from hookedlm.layers.relative import RelativePositions, bucket_of

T5_SIZES = dict(
    vocab_size=96,
    d_model=32,
    d_kv=6,  # which is not d_model / num_heads
    d_ff=48,
    num_layers=2,
    num_decoder_layers=3,
    num_heads=4,
    relative_attention_num_buckets=8,
    relative_attention_max_distance=9,
    layer_norm_epsilon=1e-3,
    decoder_start_token_id=0,
    eos_token_id=2,
)
BART_SIZES = dict(
    vocab_size=96,
    d_model=32,
    encoder_layers=2,
    decoder_layers=3,
    encoder_attention_heads=4,
    decoder_attention_heads=4,
    encoder_ffn_dim=48,
    decoder_ffn_dim=48,
    max_position_embeddings=24,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    forced_eos_token_id=None,
    decoder_start_token_id=2,
)
T5 = (T5ForConditionalGeneration, T5Config, T5_SIZES)
BART = (BartForConditionalGeneration, BartConfig, BART_SIZES)
MARIAN = (MarianMTModel, MarianConfig, BART_SIZES)
BLENDERBOT = (BlenderbotForConditionalGeneration, BlenderbotConfig, BART_SIZES)
PEGASUS = (PegasusForConditionalGeneration, PegasusConfig, BART_SIZES)
SCALED = {"scale_embedding": True, "activation_function": "relu"}
KINDS = {
    "t5": (*T5, {}),
    "t5-gated": (*T5, {"feed_forward_proj": "gated-gelu"}),
    "t5-unscaled": (*T5, {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    "mt5": (MT5ForConditionalGeneration, MT5Config, T5_SIZES, {}),
    "umt5": (UMT5ForConditionalGeneration, UMT5Config, T5_SIZES, {}),
    "bart": (*BART, {}),
    "bart-scaled": (*BART, SCALED),
    "mbart": (MBartForConditionalGeneration, MBartConfig, BART_SIZES, {}),
    "plbart": (PLBartForConditionalGeneration, PLBartConfig, BART_SIZES, SCALED),
    "mvp": (MvpForConditionalGeneration, MvpConfig, BART_SIZES, {}),
    "mvp-scaled": (MvpForConditionalGeneration, MvpConfig, BART_SIZES, SCALED),
    "marian": (*MARIAN, {}),
    "marian-scaled": (*MARIAN, SCALED),
    "blenderbot": (*BLENDERBOT, {}),
    "blenderbot-scaled": (*BLENDERBOT, SCALED),
    "pegasus": (*PEGASUS, {}),
    "pegasus-scaled": (*PEGASUS, SCALED),
}
GENERATOR = torch.Generator().manual_seed(0)
TOKENS = torch.randint(3, 96, (2, 9), generator=GENERATOR)
SAID = torch.randint(3, 96, (2, 5), generator=GENERATOR)
MASK = torch.tensor([[1] * 9, [1] * 6 + [0] * 3])
SAID_MASK = torch.tensor([[1] * 5, [1] * 3 + [0] * 2])
GIVEN = [
    {},
    {"one_zero_attention_mask": MASK},
    {"decoder_attention_mask": SAID_MASK},
    {"one_zero_attention_mask": MASK, "decoder_attention_mask": SAID_MASK},
    {"one_zero_attention_mask": MASK.flip(1), "decoder_attention_mask": SAID_MASK.flip(1)},
]


def built(kind, config, sizes, options, seed=0) -> torch.nn.Module:
    """A random model in which no weight is a one or a zero."""
    with quiet_transformers(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = kind(config(**sizes | options)).eval()
        if options.get("tie_word_embeddings") is False:
            model.lm_head.weight = torch.nn.Parameter(torch.randn(96, 32))
        perturb(model, seed)
        for name, buffer in model.named_buffers():
            if name == "final_logits_bias":
                buffer.normal_()
    return model


@functools.cache
def theirs_of(name: str) -> torch.nn.Module:
    return built(*KINDS[name])


@functools.cache
def model_of(name: str) -> HookedEncoderDecoder:
    return HookedEncoderDecoder.from_pretrained(
        "tiny", hf_model=theirs_of(name), tokenizer=word_tokenizer()
    )


each_kind = pytest.mark.parametrize("name", KINDS)
each_family = pytest.mark.parametrize("name", ["t5", "t5-gated", "umt5", "bart", "mbart"])


@pytest.fixture
def model() -> HookedEncoderDecoder:
    return model_of("t5")


@torch.no_grad()
def hf_run(theirs, given, **more):
    renamed = {
        "one_zero_attention_mask": "attention_mask",
        "decoder_attention_mask": "decoder_attention_mask",
    }
    masks = {renamed[name]: value for name, value in given.items()}
    return theirs(TOKENS, decoder_input_ids=SAID, **masks, **more)


def close(ours: torch.Tensor, theirs: torch.Tensor, limit: float = 1e-5) -> None:
    error = (ours.double() - theirs.double()).abs().max() / theirs.double().abs().max()
    assert error <= limit, f"{error:.1e}"


# Parity -------------------------------------------------------------------------------------------


@each_kind
@pytest.mark.parametrize("given", GIVEN, ids=lambda given: "+".join(given) or "plain")
def test_numbers_are_hugging_faces(name, given):
    model, truth = model_of(name), hf_run(theirs_of(name), given, output_hidden_states=True)
    real = given.get("one_zero_attention_mask", torch.ones_like(TOKENS)).bool()
    said = given.get("decoder_attention_mask", torch.ones_like(SAID)).bool()
    with torch.no_grad():
        logits, cache = model.run_with_cache(TOKENS, SAID, **given)
        close(logits[said], truth.logits[said])
        encoded = model.encoder_output(TOKENS, given.get("one_zero_attention_mask"))
        close(encoded[real], truth.encoder_last_hidden_state[real])
    for stack, states, where, n in (
        ("encoder", truth.encoder_hidden_states, real, 2),
        ("decoder", truth.decoder_hidden_states, said, 3),
    ):
        for layer in range(n):
            close(cache[f"{stack}.{layer}.hook_resid_pre"][where], states[layer][where])


@each_family
def test_patterns_are_hugging_faces(name):
    theirs = copy.deepcopy(theirs_of(name))
    theirs.set_attn_implementation("eager")
    given = GIVEN[3]
    truth = hf_run(theirs, given, output_attentions=True)
    _, cache = model_of(name).run_with_cache(TOKENS, SAID, **given)
    for place, patterns, rows, columns in (
        ("encoder.{}.attn", truth.encoder_attentions, MASK, MASK),
        ("decoder.{}.attn", truth.decoder_attentions, SAID_MASK, SAID_MASK),
        ("decoder.{}.cross_attn", truth.cross_attentions, SAID_MASK, MASK),
    ):
        for layer, pattern in enumerate(patterns):
            ours = cache[f"{place.format(layer)}.hook_pattern"]
            assert ours.shape == (2, 4, rows.shape[1], columns.shape[1])
            for row in range(2):
                n = int(rows[row].sum())
                close(ours[row, :, :n], pattern[row, :, :n])
                assert not ours[row, :, :n, int(columns[row].sum()) :].any()


@pytest.mark.parametrize("name", ["t5", "bart"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(name, dtype):
    cast = copy.deepcopy(theirs_of(name)).to(dtype)
    model = HookedEncoderDecoder.from_pretrained("tiny", hf_model=cast, dtype=dtype)
    with torch.no_grad():
        close(model(TOKENS, SAID), cast(TOKENS, decoder_input_ids=SAID).logits, 3e-2)
    assert model.cfg.dtype == dtype


def test_the_kernel_and_mode_of_the_module_do_not_matter():
    theirs = copy.deepcopy(theirs_of("t5")).train()
    theirs.set_attn_implementation("eager")
    model = HookedEncoderDecoder.from_pretrained("tiny", hf_model=theirs)
    assert theirs.training
    assert theirs.encoder.block[0].training
    with torch.no_grad():
        close(model(TOKENS, SAID), model_of("t5")(TOKENS, SAID))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("n_buckets", "max_distance"), [(8, 9), (32, 128), (32, 20), (6, 40)])
def test_buckets_are_t5s(causal, n_buckets, max_distance):
    from transformers.models.t5.modeling_t5 import T5Attention

    ahead = torch.arange(300)[None] - torch.arange(300)[:, None]
    truth = T5Attention._relative_position_bucket(ahead, not causal, n_buckets, max_distance)
    assert torch.equal(bucket_of(ahead, n_buckets, max_distance, causal), truth)


def test_the_last_queries_of_a_longer_text():
    positions = RelativePositions(torch.randn(8, 4), 9, causal=True)
    assert torch.equal(positions(2, 7), positions(7, 7)[:, :, 5:])


@each_family
def test_weights_are_hugging_faces_tensors(name):
    model, theirs = model_of(name), theirs_of(name)
    storages = {p.untyped_storage().data_ptr() for p in (*theirs.parameters(), *theirs.buffers())}
    for name, parameter in model.named_parameters():
        assert parameter.untyped_storage().data_ptr() in storages, name
    assert model.W_E.data_ptr() == model.unembed.W_U.data_ptr()  # tied there, tied here


def test_stacked_weights(model):
    assert model.W_Q.shape == model.W_K.shape == model.W_V.shape == (5, 4, 32, 6)
    assert torch.equal(model.W_O[2], model.decoder[0].attn.W_O)  # the encoder has two
    assert model.W_in.shape == (5, 32, 48)
    assert model.W_gate is None
    assert model_of("t5-gated").W_gate.shape == (5, 32, 48)
    assert model.QK.shape == model.OV.shape == (5, 4, 32, 32)
    assert model.W_U.shape == (32, 96)
    assert model.b_U.shape == (96,)
    assert not model.b_Q.any()
    labels = model.all_head_labels()
    assert len(labels) == 20
    assert (labels[0], labels[7], labels[8], labels[-1]) == ("EL0H0", "EL1H3", "DL0H0", "DL2H3")
    _, cache = model.run_with_cache(TOKENS, SAID)
    ln = model.decoder_final_ln
    normed = cache["decoder_final_ln.hook_normalized"] * ln.w
    close(normed @ model.W_U + model.b_U, cache["hook_logits"])
    with pytest.raises(WeightError, match=r"rel_pos_bias"):
        _ = model.W_pos
    assert model_of("bart").W_pos.shape == (24, 32)


def test_the_config_says_what_there_is(model):
    cfg = model.cfg
    assert (cfg.n_layers, cfg.d_model, cfg.d_head, cfg.n_heads, cfg.d_mlp) == (2, 32, 6, 4, 48)
    assert (cfg.d_vocab, cfg.eps, cfg.act_fn, cfg.gated_mlp) == (96, 1e-3, "relu", False)
    assert cfg.relative_attention_num_buckets == 8
    assert cfg.relative_attention_max_distance == 9
    assert cfg.decoder_start_token_id == 0
    assert cfg.tie_word_embeddings
    assert not model_of("t5-unscaled").cfg.tie_word_embeddings
    bart = model_of("bart").cfg
    assert (bart.n_ctx, bart.positional_embedding_type) == (24, "standard")
    assert bart.decoder_start_token_id == 2


@pytest.mark.parametrize("attribute", ["max_distance", "causal"])
def test_a_wrong_reading_is_noticed(monkeypatch, attribute):
    """The check when a model loads: with one fact read otherwise it must not pass."""
    init = RelativePositions.__init__

    def wrong(self, weight, max_distance, causal):
        init(self, weight, max_distance, causal)
        setattr(self, attribute, {"max_distance": 200, "causal": not causal}[attribute])

    monkeypatch.setattr(RelativePositions, "__init__", wrong)
    with pytest.raises(ConversionError, match="differ"):
        HookedEncoderDecoder.from_pretrained("tiny", hf_model=theirs_of("t5"))


SWAPPED_CROSS = {"q": "encoder_attn.k_proj", "k": "encoder_attn.q_proj"}
T5_ROW, BART_ROW = ENCODER_DECODERS["t5"], ENCODER_DECODERS["bart"]
MISTAKES = {
    "output not scaled": ("t5", {"scales_output": False}),
    "bias not read": ("t5", {"decoder": replace(T5_ROW.decoder, positions=None)}),
    "final norm left out": ("t5", {"encoder": replace(T5_ROW.encoder, ln_final=None)}),
    "embedding not scaled": ("bart-scaled", {"embed_scale": None}),
    "no bias of logits": ("bart", {"unembed_bias": None}),
    "positions not shifted": ("bart", {"decoder": replace(BART_ROW.decoder, pos_offset=0)}),
    "no norm of the embedding": ("bart", {"encoder": replace(BART_ROW.encoder, embed_norm=None)}),
    "pre-norm": (
        "bart",
        {
            "encoder": replace(
                BART_ROW.encoder, block=BART_ROW.encoder.block.but(layout="sequential")
            )
        },
    ),
    "queries for keys": (
        "bart",
        {"decoder": replace(BART_ROW.decoder, cross=BART_ROW.decoder.cross.but(**SWAPPED_CROSS))},
    ),
    "norms for each other": (
        "bart",
        {
            "decoder": replace(
                BART_ROW.decoder,
                block=BART_ROW.decoder.block.but(ln1="encoder_attn_layer_norm"),
                cross=BART_ROW.decoder.cross.but(ln1="self_attn_layer_norm"),
            )
        },
    ),
    "cross-attention sees the past only": (
        "t5",
        {"decoder": replace(T5_ROW.decoder, cross=T5_ROW.decoder.cross.but(causal=True))},
    ),
    "the encoder sees the past only": (
        "bart",
        {"encoder": replace(BART_ROW.encoder, block=BART_ROW.encoder.block.but(causal=True))},
    ),
    "the decoder sees ahead": (
        "bart",
        {"decoder": replace(BART_ROW.decoder, block=BART_ROW.decoder.block.but(causal=False))},
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_a_row_is_noticed(monkeypatch, mistake):
    name, wrong = MISTAKES[mistake]
    theirs = theirs_of(name)
    kind = theirs.config.model_type
    monkeypatch.setitem(ENCODER_DECODERS, kind, ENCODER_DECODERS[kind].but(**wrong))
    with pytest.raises(ConversionError, match=r"differ|accounts for"):
        HookedEncoderDecoder.from_pretrained("tiny", hf_model=theirs)


# Hooks --------------------------------------------------------------------------------------------

ATTENTION = [f"hook_{x}" for x in ("q", "k", "v", "attn_scores", "pattern", "z")]


def norm(name: str) -> list[str]:
    return [f"{name}.hook_scale", f"{name}.hook_normalized"]


def test_the_classic_names_in_firing_order(model):
    _, cache = model.run_with_cache(TOKENS, SAID)
    names = list(cache)
    assert names[0] == "hook_embed"
    encoder = [x.removeprefix("encoder.0.") for x in names if x.startswith("encoder.0.")]
    assert encoder == [
        "hook_resid_pre",
        *norm("ln1"),
        "attn.rel_pos_hook",
        *(f"attn.{x}" for x in ATTENTION),
        "hook_attn_out",
        "hook_resid_mid",
        *norm("ln2"),
        "mlp.hook_pre",
        "mlp.hook_post",
        "hook_mlp_out",
        "hook_resid_post",
    ]
    decoder = [x.removeprefix("decoder.1.") for x in names if x.startswith("decoder.1.")]
    assert decoder == [
        "hook_resid_pre",
        *norm("ln1"),
        *(f"attn.{x}" for x in ATTENTION),
        "hook_attn_out",
        "hook_resid_mid",
        *norm("ln2"),
        *(f"cross_attn.{x}" for x in ATTENTION),
        "hook_cross_attn_out",
        "hook_resid_mid_cross",
        *norm("ln3"),
        "mlp.hook_pre",
        "mlp.hook_post",
        "hook_mlp_out",
        "hook_resid_post",
    ]
    assert names[-3:] == [*norm("decoder_final_ln"), "hook_logits"]
    between = names[names.index("encoder.1.hook_resid_post") + 1 :][:3]
    assert between == [*norm("encoder_final_ln"), "hook_decoder_embed"]


def test_names_of_bart():
    _, cache = model_of("bart").run_with_cache(TOKENS, SAID)
    names = list(cache)
    assert names[:4] == ["hook_embed", "hook_pos_embed", *norm("encoder_embed_ln")]
    start = names.index("hook_decoder_embed")
    assert names[start + 1] == "hook_decoder_pos_embed"
    assert names[start + 2 : start + 4] == norm("decoder_embed_ln")
    decoder = [x.removeprefix("decoder.1.") for x in names if x.startswith("decoder.1.")]
    order = ["hook_cross_attn_out", "ln2.hook_scale", "hook_resid_mid_cross", "mlp.hook_pre"]
    assert [x for x in decoder if x in order] == order


def every_point() -> list[tuple[str, str]]:
    return [
        (name, point)
        for name in ("t5", "umt5", "bart", "mbart", "marian", "pegasus")
        for point in model_of(name).hook_dict
        if not point.startswith(("encoder.1", "decoder.2"))
    ]


@pytest.mark.parametrize(("name", "point"), every_point())
def test_every_hook_fires_and_its_edit_counts(name, point):
    model = model_of(name)
    of_encoder = point.startswith("encoder") or point in ("hook_embed", "hook_pos_embed")
    sizes = dict(batch=2, head=4, kv_head=4, d_head=6 if "t5" in name else 8, d_model=32)
    sizes |= {"d_mlp": 48, "d_vocab": 96, "1": 1, "pos": 9 if of_encoder else 5}
    sizes["key_pos"] = 9 if of_encoder or "cross_attn" in point else 5

    def run(hooks):
        return model.run_with_hooks(TOKENS, SAID, fwd_hooks=hooks)

    check_edit(model, point, tuple(sizes[x] for x in model.hook_dict[point].axes), run)


@each_family
def test_listening_changes_nothing(name):
    model, given = model_of(name), GIVEN[3]
    with torch.no_grad():
        plain = model(TOKENS, SAID, **given)
        heard = model.run_with_hooks(
            TOKENS, SAID, fwd_hooks=[(lambda name: True, lambda x, hook: None)], **given
        )
    close(heard[SAID_MASK.bool()], plain[SAID_MASK.bool()])


@each_family
def test_entries_computed_when_read_are_those_of_a_live_hook(name):
    model, given = model_of(name), GIVEN[3]
    with torch.no_grad():
        _, cache = model.run_with_cache(TOKENS, SAID, **given)
        recorded = cache.cache_dict.recorded()
        for part in ("encoder.1.attn", "decoder.1.attn", "decoder.1.cross_attn"):
            assert f"{part}.hook_pattern" not in recorded
        assert "decoder.1.ln3.hook_scale" not in recorded
        for point in cache:
            _, live = model.run_with_cache(TOKENS, SAID, names_filter=point, **given)
            finite = torch.isfinite(live[point])
            assert torch.equal(finite, torch.isfinite(cache[point]))
            expected = live[point][finite]
            torch.testing.assert_close(cache[point][finite], expected, rtol=1e-4, atol=1e-5)


def test_an_edited_bias_reaches_all_layers_and_what_the_cache_computes(model):
    def only_the_first_row(x, hook):
        x[0, :, :, 0] += 5.0

    points = ["encoder.1.attn.hook_pattern", "decoder.2.attn.hook_pattern"]
    hooks = [
        (f"{stack}.0.attn.rel_pos_hook", only_the_first_row) for stack in ("encoder", "decoder")
    ]
    with torch.no_grad():
        _, before = model.run_with_cache(TOKENS, SAID)
        with model.hooks(fwd_hooks=hooks):
            _, after = model.run_with_cache(TOKENS, SAID)
            _, live = model.run_with_cache(TOKENS, SAID, names_filter=points)
        for point in points:
            assert (after[point][0, ..., 0] > before[point][0, ..., 0]).any()
            close(after[point], live[point])
            close(after[point][1], before[point][1])


def test_keys_of_cross_attention_have_the_encoders_positions(model):
    _, cache = model.run_with_cache(TOKENS, SAID, pos_slice=-1)
    assert cache["decoder.0.cross_attn.hook_k"].shape == (2, 9, 4, 6)
    assert cache["decoder.0.cross_attn.hook_q"].shape == (2, 1, 4, 6)
    assert cache["encoder.0.hook_resid_pre"].shape == (2, 1, 32)


def test_on_demand_points_and_their_flags():
    model = HookedEncoderDecoder.from_pretrained("tiny", hf_model=theirs_of("t5"))
    on_demand = ["hook_attn_in", "hook_q_input", "hook_mlp_in", "attn.hook_result"]
    on_demand += ["hook_cross_attn_in", "cross_attn.hook_result"]
    _, cache = model.run_with_cache(TOKENS, SAID)
    assert not any(f"decoder.0.{point}" in cache for point in on_demand)
    for flag in ("attn_result", "split_qkv_input", "attn_in", "hook_mlp_in"):
        getattr(model, f"set_use_{flag}")(True)
    _, cache = model.run_with_cache(TOKENS, SAID)
    assert all(f"decoder.0.{point}" in cache for point in on_demand)


def test_nothing_asked_nothing_returned(model):
    assert model(TOKENS, SAID, return_type=None) is None
    _, cache = model.run_with_cache(TOKENS, SAID, return_type=None)
    assert "hook_logits" in cache  # somebody listened


def test_a_batch_of_one_without_its_axis(model):
    _, cache = model.run_with_cache(TOKENS[:1], SAID[:1], remove_batch_dim=True)
    _, batched = model.run_with_cache(TOKENS[:1], SAID[:1])
    for point in ("decoder.1.cross_attn.hook_pattern", "decoder.0.attn.rel_pos_hook"):
        assert torch.equal(cache[point], batched[point][0])


def test_names_that_are_none(model):
    with pytest.raises(HookNameError, match=r"encoder\.0\.attn\.hook_q, decoder\.0\.attn\.hook_q"):
        model.run_with_cache(TOKENS, SAID, names_filter="blocks.0.attn.hook_q")
    _, cache = model.run_with_cache(TOKENS, SAID)
    with pytest.raises(KeyError, match=r"encoder\.1\.attn\.hook_q"):
        cache["q", 1]
    for ask in (
        cache.decompose_resid,
        lambda: model.accumulated_bias(1),
        lambda: model.all_composition_scores("Q"),
    ):
        with pytest.raises(InputError, match="two stacks"):
            ask()


# Parts that add up --------------------------------------------------------------------------------


def written(cache, stack: str, n_layers: int) -> torch.Tensor:
    parts = ("attn_out", "cross_attn_out", "mlp_out")[:: 1 if stack == "decoder" else 2]
    names = [f"{stack}.{layer}.hook_{part}" for layer in range(n_layers) for part in parts]
    return torch.stack([cache[name] for name in names]).sum(0)


@pytest.mark.parametrize("name", ["t5", "t5-gated", "t5-unscaled", "umt5"])
def test_both_streams_are_sums(name):
    model = model_of(name)
    with torch.no_grad():
        _, cache = model.run_with_cache(TOKENS, SAID, one_zero_attention_mask=MASK)
    for stack, embed, n in (("encoder", "hook_embed", 2), ("decoder", "hook_decoder_embed", 3)):
        whole = cache[embed] + written(cache, stack, n)
        close(whole, cache[f"{stack}.{n - 1}.hook_resid_post"])


def test_mbarts_streams_are_sums_behind_the_embeddings_norm():
    model = model_of("mbart")
    _, cache = model.run_with_cache(TOKENS, SAID)
    for stack, prefix, n in (("encoder", "hook", 2), ("decoder", "hook_decoder", 3)):
        embedded = cache[f"{prefix}_embed"] + cache[f"{prefix}_pos_embed"]
        close(
            cache[f"{stack}_embed_ln.hook_normalized"],
            vars(model)["_modules"][f"{stack}_embed_ln"](embedded),
        )
        whole = cache[f"{stack}_embed_ln.hook_normalized"] + written(cache, stack, n)
        close(whole, cache[f"{stack}.{n - 1}.hook_resid_post"])


def test_barts_streams_are_normed_sums():
    model = model_of("bart")
    _, cache = model.run_with_cache(TOKENS, SAID)
    block = {x: cache[f"decoder.1.hook_{x}"] for x in ("resid_pre", "resid_mid", "resid_mid_cross")}
    out = {x: cache[f"decoder.1.hook_{x}_out"] for x in ("attn", "cross_attn", "mlp")}
    decoder = model.decoder[1]
    close(decoder.ln1(block["resid_pre"] + out["attn"]), block["resid_mid"])
    close(decoder.ln2(block["resid_mid"] + out["cross_attn"]), block["resid_mid_cross"])
    post = decoder.ln3(block["resid_mid_cross"] + out["mlp"])
    close(post, cache["decoder.1.hook_resid_post"])
    close(post, cache["decoder.2.hook_resid_pre"])


@each_family
def test_heads_add_up_to_attention(name):
    model = model_of(name)
    points = ["*attn.hook_result", "*attn_out"]
    with torch.no_grad():
        _, cache = model.run_with_cache(TOKENS, SAID, names_filter=points)
    for stack in ("encoder", "decoder"):
        for layer, block in enumerate(model._modules[stack].children()):
            for attn in ("attn", "cross_attn")[: 1 if stack == "encoder" else 2]:
                heads = cache[f"{stack}.{layer}.{attn}.hook_result"]
                assert heads.shape[2] == 4
                b_O = block._modules[attn].b_O.detach()
                close(heads.sum(2) + b_O, cache[f"{stack}.{layer}.hook_{attn}_out"])


def test_a_head_reads_its_own_copy(model):
    def silence(x, hook):
        x[:, :, 1] = 0.0

    with torch.no_grad():
        _, before = model.run_with_cache(TOKENS, SAID, names_filter="*attn.hook_q")
        with model.hooks(fwd_hooks=[("decoder.1.hook_q_input", silence)]):
            _, after = model.run_with_cache(TOKENS, SAID, names_filter="*attn.hook_q")
    changed = (
        (before["decoder.1.attn.hook_q"] - after["decoder.1.attn.hook_q"]).abs().amax((0, 1, 3))
    )
    assert changed[1] > 0.1
    assert changed[[0, 2, 3]].max() < 1e-5


def test_gradients(model):
    model = HookedEncoderDecoder.from_pretrained("tiny", hf_model=copy.deepcopy(theirs_of("t5")))
    theirs = copy.deepcopy(theirs_of("t5"))
    grads = {}
    hook = ("encoder.0.hook_resid_pre", lambda grad, hook: grads.update({hook.name: grad.clone()}))
    with model.hooks(bwd_hooks=[hook]):
        model(TOKENS, SAID, one_zero_attention_mask=MASK).log_softmax(-1)[..., 7].sum().backward()
    out = theirs(TOKENS, decoder_input_ids=SAID, attention_mask=MASK).logits
    out.log_softmax(-1)[..., 7].sum().backward()
    assert grads["encoder.0.hook_resid_pre"].abs().sum() > 0
    for ours, his in (
        (
            model.encoder[0].attn.rel_pos_bias.weight,
            theirs.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight,
        ),
        (
            model.decoder[0].attn.rel_pos_bias.weight,
            theirs.decoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight,
        ),
        (model.decoder[1].mlp.W_in, theirs.decoder.block[1].layer[2].DenseReluDense.wi.weight.t()),
        (model.decoder[1].ln2.w, theirs.decoder.block[1].layer[1].layer_norm.weight),
    ):
        expected = (
            his.grad
            if his.is_leaf
            else theirs.decoder.block[1].layer[2].DenseReluDense.wi.weight.grad.t()
        )
        close(ours.grad, expected, 1e-4)
    keys = model.decoder[2].cross_attn.W_K.grad.transpose(1, 2).flatten(0, 1)
    close(keys, theirs.decoder.block[2].layer[1].EncDecAttention.k.weight.grad, 1e-4)


def test_gradients_of_the_bias(model):
    stored: dict[str, torch.Tensor] = {}
    with model.hooks(
        bwd_hooks=[("decoder.0.attn.rel_pos_hook", lambda g, hook: stored.update(bias=g.clone()))]
    ):
        model(TOKENS, SAID).log_softmax(-1)[..., 7].mean().backward()
    assert stored["bias"].shape == (2, 4, 5, 5)
    model.zero_grad()


# Text and generation ------------------------------------------------------------------------------


def test_texts(model):
    texts = ["the cat sat on a mat", "Mary ran"]
    tokens, mask = model.to_tokens(texts)
    assert tokens.shape == (2, 6)
    assert mask.tolist() == [[1] * 6, [1, 1, 0, 0, 0, 0]]
    theirs = theirs_of("t5")
    with torch.no_grad():
        alone = theirs(tokens[1:, :2], decoder_input_ids=torch.tensor([[0]])).logits
        close(model(texts)[1:], alone)  # decoding starts with cfg.decoder_start_token_id
        close(model(texts[1]), alone)
        said = model(texts, SAID)
        close(said[1:], theirs(tokens[1:, :2], decoder_input_ids=SAID[1:]).logits)
    assert model.to_tokens("the " * 600)[0].shape == (1, 512)
    assert model.to_tokens("the " * 600, truncate=False)[0].shape == (1, 600)


@each_kind
@pytest.mark.parametrize("mask", [None, MASK], ids=["plain", "padded"])
def test_greedy_text_is_hugging_faces(name, mask):
    model, theirs = model_of(name), theirs_of(name)
    start = 2 if "bart" in name else 0
    truth = theirs.generate(
        TOKENS, attention_mask=mask, max_new_tokens=12, do_sample=False, num_beams=1,
        decoder_start_token_id=start, eos_token_id=2, pad_token_id=0, use_cache=False,
    )  # fmt: skip
    model.cfg.decoder_start_token_id = start  # mBART's differs from language to language
    ours = model.generate(
        TOKENS, mask, max_new_tokens=12, do_sample=False, eos_token_id=2, verbose=False
    )
    assert torch.equal(ours, truth)


def test_rows_end_where_hugging_faces_end(model):
    theirs = theirs_of("t5")
    options = dict(max_new_tokens=8, do_sample=False)
    free = theirs.generate(TOKENS, eos_token_id=None, use_cache=False, **options)
    stop = int(free[0, 3])  # a token that greedy decoding really says
    truth = theirs.generate(TOKENS, eos_token_id=stop, use_cache=False, **options)
    ours = model.generate(TOKENS, eos_token_id=stop, verbose=False, **options)
    assert torch.equal(ours, truth)
    assert (ours[0] == 0).any()
    on = model.generate(TOKENS, max_new_tokens=8, temperature=0.0, stop_at_eos=False, verbose=False)
    assert torch.equal(on, free)


def test_the_encoder_runs_once_and_hooks_stay_active(model):
    seen: dict[str, list[int]] = {"encoder": [], "decoder": []}

    def count(x, hook):
        seen[hook.name.split(".")[0]].append(x.shape[1])

    points = ["encoder.1.hook_mlp_out", "decoder.1.hook_cross_attn_out"]
    options = dict(max_new_tokens=4, do_sample=False, stop_at_eos=False, verbose=False)
    with model.hooks(fwd_hooks=[(point, count) for point in points]):
        plain = model.generate(TOKENS, **options)
    assert seen == {"encoder": [9], "decoder": [1, 2, 3, 4]}
    with model.hooks(fwd_hooks=[(points[1], lambda x, hook: 9 * x)]):
        assert not torch.equal(model.generate(TOKENS, **options), plain)
    assert torch.equal(model.generate(TOKENS, **options), plain)


def test_generation_of_text(model):
    options = dict(max_new_tokens=5, do_sample=False, verbose=False)
    text = model.generate("the cat", **options)
    tokens = model.generate("the cat", return_type="tokens", **options)
    assert text == model.tokenizer.decode(tokens[0], skip_special_tokens=True)
    both = model.generate(["the cat", "Mary ran home"], **options)
    assert both[0] == text
    assert isinstance(model.generate(TOKENS[:1], return_type="str", verbose=False)[0], str)
    longer = model.generate(
        TOKENS, decoder_input=SAID, max_new_tokens=2, stop_at_eos=False, verbose=False
    )
    assert longer.shape == (2, 7)
    assert torch.equal(longer[:, :5], SAID)


def test_sampling_draws_from_the_distribution(model):
    options = dict(max_new_tokens=1, stop_at_eos=False, verbose=False)
    rows = TOKENS[:1].expand(4000, -1)
    torch.manual_seed(0)
    drawn = model.generate(rows, **options)[:, 1].bincount(minlength=96) / 4000
    start = torch.zeros(1, 1, dtype=torch.long)
    expected = model(TOKENS[:1], start)[0, -1].softmax(-1).detach()
    assert (drawn - expected).abs().max() < 0.04
    few = model.generate(rows[:200], top_k=2, **options)[:, 1]
    assert set(few.tolist()) <= set(expected.topk(2).indices.tolist())
    # Each token said costs so much that none is said twice.
    varied = model.generate(
        TOKENS, max_new_tokens=20, freq_penalty=1e4, top_k=1, stop_at_eos=False, verbose=False
    )
    assert all(len(set(row.tolist())) == 21 for row in varied)


# Doors --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["t5", "t5-unscaled", "umt5", "bart", "mbart", "plbart", "mvp", "marian", "blenderbot"],
)
def test_checkpoint_folders(name, tmp_path):
    theirs = theirs_of(name)
    theirs.save_pretrained(tmp_path / "tiny")
    word_tokenizer().save_pretrained(tmp_path / "tiny")
    model = HookedEncoderDecoder.from_pretrained(str(tmp_path / "tiny"), device="cpu")
    assert model.cfg.model_name == "tiny"
    again = type(theirs).from_pretrained(tmp_path / "tiny")  # which makes Marian's sinusoids anew
    with torch.no_grad():
        close(model(TOKENS, SAID), again(TOKENS, decoder_input_ids=SAID).logits)
    assert isinstance(model.generate("the cat", verbose=False, eos_token_id=2), str)


def test_a_subclass_with_the_classic_arguments_loads(tmp_path):
    class Mine(HookedEncoderDecoder):
        def __init__(self, cfg, tokenizer=None, move_to_device=True):
            super().__init__(cfg, tokenizer, move_to_device)

    mine = Mine.from_pretrained("tiny", hf_model=theirs_of("t5"))
    assert isinstance(mine, Mine)
    assert mine.W_E.data_ptr() == theirs_of("t5").shared.weight.data_ptr()


def test_half_precision_is_cast_as_a_whole(tmp_path):
    theirs_of("t5").save_pretrained(tmp_path)
    half = HookedEncoderDecoder.from_pretrained(str(tmp_path), device="cpu", dtype="float16")
    assert {parameter.dtype for parameter in half.parameters()} == {torch.float16}
    mixed = copy.deepcopy(theirs_of("t5")).half()
    mixed.decoder.block[0].layer[2].DenseReluDense.wo.float()
    with pytest.raises(ConversionError, match="several dtypes"):
        HookedEncoderDecoder.from_pretrained("x", hf_model=mixed)


def test_a_checkpoint_without_its_weights(tmp_path):
    theirs_of("t5").save_pretrained(tmp_path)
    without(tmp_path, "1.layer.1.EncDecAttention.q")
    with pytest.raises(LoadError, match=r"EncDecAttention\.q"):
        HookedEncoderDecoder.from_pretrained(str(tmp_path))


def test_what_is_no_encoder_decoder(tmp_path):
    gpt2 = tinies("gpt2")[0].build()
    with pytest.raises(ConversionError, match=r"hookedlm\.load"):
        HookedEncoderDecoder.from_pretrained("x", hf_model=gpt2)
    gpt2.save_pretrained(tmp_path)
    with pytest.raises(LoadError, match="gpt2"):
        HookedEncoderDecoder.from_pretrained(str(tmp_path))
    for kind, config, sizes in (
        (T5Model, T5Config, T5_SIZES),
        (T5EncoderModel, T5Config, T5_SIZES),
        (BartForCausalLM, BartConfig, BART_SIZES),
    ):
        with pytest.raises(ConversionError, match=kind.__name__):
            HookedEncoderDecoder.from_pretrained("x", hf_model=kind(config(**sizes)))
    with pytest.raises(LoadError):
        HookedEncoderDecoder.from_pretrained(str(tmp_path / "nowhere"))
    with pytest.raises(LoadError, match="revision"):
        HookedEncoderDecoder.from_pretrained("x", hf_model=theirs_of("t5"), revision="main")
    with pytest.raises(NotImplementedError, match="revision"):
        HookedEncoderDecoder.from_pretrained("x", checkpoint_index=1)


def test_parts_nobody_accounts_for():
    odd = copy.deepcopy(theirs_of("t5"))
    odd.encoder.block[1].adapter = torch.nn.Linear(32, 32)
    with pytest.raises(ConversionError, match="adapter"):
        HookedEncoderDecoder.from_pretrained("x", hf_model=odd)
    apart = copy.deepcopy(theirs_of("t5"))
    apart.decoder.embed_tokens = copy.deepcopy(apart.shared)
    with pytest.raises(ConversionError, match="of its own"):
        HookedEncoderDecoder.from_pretrained("x", hf_model=apart)


CFG = HookedTransformerConfig(
    n_layers=2,
    d_model=16,
    n_ctx=12,
    d_head=4,
    n_heads=3,
    d_vocab=30,
    act_fn="gelu",
    gated_mlp=True,
    positional_embedding_type="relative_positional_bias",
    relative_attention_num_buckets=8,
    relative_attention_max_distance=20,
    decoder_start_token_id=0,
    device="cpu",
    seed=3,
)


@pytest.mark.parametrize("tied", [True, False])
def test_from_a_config(tied):
    cfg = replace(CFG, tie_word_embeddings=tied)
    state = torch.get_rng_state()
    first, second = HookedEncoderDecoder(cfg), HookedEncoderDecoder(cfg.to_dict())
    assert torch.equal(state, torch.get_rng_state())
    tokens, said = torch.randint(30, (2, 7)), torch.randint(30, (2, 4))
    assert torch.equal(first(tokens, said), second(tokens, said))
    assert first(tokens, said).shape == (2, 4, 30)
    assert first(tokens, said).std() < 5
    assert (first.W_E.data_ptr() == first.unembed.W_U.data_ptr()) is tied
    pre = torch.randn(3)
    torch.testing.assert_close(first.decoder[0].mlp.act_fn(pre), torch.nn.functional.gelu(pre))
    first(tokens, said).log_softmax(-1)[..., 0].mean().backward()
    assert first.encoder[0].attn.W_Q.grad.abs().sum() > 0
    assert first.generate(tokens, max_new_tokens=2, stop_at_eos=False, verbose=False).shape == (
        2,
        3,
    )


def test_a_config_that_is_no_t5s():
    for fields, says in (
        ({"act_fn": "solu"}, "solu"),
        ({"num_experts": 2, "experts_per_token": 1, "gated_mlp": False}, "dense MLP"),
        ({"relative_attention_num_buckets": 7}, "even"),
        ({"relative_attention_max_distance": 4}, "above half"),
        ({"d_vocab": -1, "d_vocab_out": -1}, "d_vocab"),
    ):
        with pytest.raises(ConfigError, match=says):
            HookedEncoderDecoder(replace(CFG, **fields))
    sized = HookedEncoderDecoder(replace(CFG, d_vocab=-1, d_vocab_out=-1), word_tokenizer())
    assert sized.cfg.d_vocab == len(word_tokenizer())


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((torch.rand(2, 3), SAID), "token ids"),
        ((torch.zeros(1, 0, dtype=torch.long), SAID[:1]), "nothing in it"),
        ((torch.full((2, 3), 96), SAID), "0 to 95"),
        ((TOKENS, torch.full((2, 3), -1)), "decoder_input must be from 0 to 95"),
        ((TOKENS, SAID[:1]), "1 rows"),
        ((TOKENS, SAID[0]), "decoder_input"),
        ((TOKENS, "the cat"), "decoder_input"),
        ((TOKENS,), "decoder_input is missing"),
        ((TOKENS, SAID, "loss"), "return_type='loss'"),
        ((TOKENS, SAID, "logits", MASK[:1]), "one_zero_attention_mask"),
    ],
)
def test_bad_input(model, arguments, says):
    with pytest.raises(InputError, match=says):
        model(*arguments)


def test_bad_input_of_other_kinds(model):
    with pytest.raises(InputError, match="decoder_attention_mask"):
        model(TOKENS, SAID, decoder_attention_mask=MASK)
    with pytest.raises(InputError, match="25 positions"):
        model_of("bart")(torch.zeros(1, 25, dtype=torch.long), SAID[:1])
    with pytest.raises(InputError, match="return_type"):
        model.generate(TOKENS, return_type="text")
    bare = HookedEncoderDecoder.from_pretrained("x", hf_model=theirs_of("t5"))
    with pytest.raises(TokenizerError):
        bare("the cat")
    with pytest.raises(TokenizerError):
        bare.generate(TOKENS, return_type="str")
    mbart = HookedEncoderDecoder.from_pretrained(
        "x", hf_model=theirs_of("mbart"), tokenizer=word_tokenizer()
    )
    mbart.cfg.decoder_start_token_id = None  # which language is to be written
    with pytest.raises(InputError, match="decoder_start_token_id"):
        mbart("the cat")
    assert mbart("the cat", SAID[:1]).shape == (1, 5, 96)
    bare.cfg.decoder_start_token_id = None
    with pytest.raises(InputError, match="decoder_start_token_id"):
        bare.generate(TOKENS, verbose=False)
    bare._hf_config.eos_token_id = None
    with pytest.raises(InputError, match="stop_at_eos"):
        bare.generate(TOKENS, decoder_input=SAID, verbose=False)


def test_moving_copying_and_saving():
    theirs = copy.deepcopy(theirs_of("bart"))
    model = HookedEncoderDecoder.from_pretrained("x", hf_model=theirs)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.decoder[0].cross_attn.W_O.zero_()
        close(model(TOKENS, SAID), theirs(TOKENS, decoder_input_ids=SAID).logits)
        assert not torch.allclose(model(TOKENS, SAID), twin(TOKENS, SAID))
        twin.load_state_dict(model.state_dict())
        close(twin(TOKENS, SAID), model(TOKENS, SAID))
    model.to(torch.float64)
    assert model(TOKENS, SAID).dtype == torch.float64
    assert model.W_E.data_ptr() == model.unembed.W_U.data_ptr()
    assert model.cpu() is model
    assert "encoder.0.attn.rel_pos_bias.weight" in model_of("t5").state_dict()
