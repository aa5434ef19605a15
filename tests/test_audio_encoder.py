"""`HookedAudioEncoder`: Hugging Face's HuBERT and wav2vec 2.0 to the last digit, every hook point
alive, parts that add up, and the doors it comes in by."""

from __future__ import annotations

import copy
import sys
import warnings
from functools import cache

import numpy as np
import pytest
import torch
from encoders import check_edit, check_stream_is_a_sum, close, drawn, edited, without
from transformers import (
    HubertConfig,
    HubertForCTC,
    HubertForSequenceClassification,
    HubertModel,
    Wav2Vec2Config,
    Wav2Vec2CTCTokenizer,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForCTC,
    Wav2Vec2ForPreTraining,
    Wav2Vec2Model,
    Wav2Vec2Processor,
)

from hookedlm import HookedTransformerConfig
from hookedlm.audio import HookedAudioEncoder
from hookedlm.convert.audio import convert_audio
from hookedlm.errors import (
    ConfigError,
    ConversionError,
    HookNameError,
    HookNeverFiredError,
    InputError,
    LoadError,
    TokenizerError,
    WeightError,
)

SIZES = dict(
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=4,
    intermediate_size=48,
    layer_norm_eps=1e-3,
    conv_dim=(8, 12, 10),
    conv_kernel=(5, 3, 2),
    conv_stride=(4, 2, 2),
    num_conv_pos_embeddings=6,
    num_conv_pos_embedding_groups=4,
    vocab_size=11,
)
FIELD, HOP = 5 + 4 * 2 + 8, 16
"""Samples of the first frame, and of each further one."""

REAL = torch.ones(2, FIELD + 8 * HOP, dtype=torch.long)
REAL[1, FIELD + 5 * HOP + 3 :] = 0
SAMPLES = torch.randn(REAL.shape, generator=torch.Generator().manual_seed(0)) * REAL
MASK = torch.tensor([[1] * 9, [1] * 6 + [0] * 3])

POST = (HubertForCTC, HubertConfig, False, "group")
PRE = (Wav2Vec2ForCTC, Wav2Vec2Config, True, "layer")
KINDS = [
    POST,
    (HubertForCTC, HubertConfig, True, "layer"),
    (HubertModel, HubertConfig, False, "layer"),
    (HubertModel, HubertConfig, True, "group"),
    (Wav2Vec2ForCTC, Wav2Vec2Config, False, "group"),
    PRE,
    (Wav2Vec2Model, Wav2Vec2Config, True, "group"),
]


def name_of(kind) -> str:
    return f"{kind[0].__name__}-{'pre' if kind[2] else 'post'}-{kind[3]}"


each_kind = pytest.mark.parametrize("kind", KINDS, ids=name_of)
both_layouts = pytest.mark.parametrize("kind", [POST, PRE], ids=name_of)


def speech(kind, **more) -> torch.nn.Module:
    """A random speech encoder in which no weight is a one or a zero."""
    cls, config, stable, norm = kind
    options = SIZES | dict(do_stable_layer_norm=stable, feat_extract_norm=norm) | more
    return drawn(lambda: cls(config(**options)))


@cache
def pair(kind) -> tuple[torch.nn.Module, HookedAudioEncoder]:
    theirs = speech(kind)
    extractor = Wav2Vec2FeatureExtractor(return_attention_mask=True)
    return theirs, HookedAudioEncoder.from_pretrained("x", hf_model=theirs, processor=extractor)


def frames(model) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        return model.frames_of(SAMPLES, REAL)


# Parity -------------------------------------------------------------------------------------------


@each_kind
@pytest.mark.parametrize("padded", [True, False], ids=["padded", "whole"])
def test_numbers_are_hugging_faces(kind, padded):
    theirs, model = pair(kind)
    inputs = {"input_values": SAMPLES} | ({"attention_mask": REAL} if padded else {})
    with torch.no_grad():
        truth = theirs(**inputs, output_hidden_states=True)
        given, mask = model.frames_of(SAMPLES, REAL if padded else None)
        assert torch.equal(mask, MASK if padded else torch.ones_like(MASK))
        last = theirs.base_model(**inputs).last_hidden_state
        assert torch.equal(model((given, mask))[mask.bool()], last[mask.bool()])
        assert torch.equal(model.encoder_output(given, mask)[mask.bool()], last[mask.bool()])
        if model.unembed is not None:
            logits = model(given, mask, return_type="logits")
            assert torch.equal(logits[mask.bool()], truth.logits[mask.bool()])
        _, cache = model.run_with_cache(given, one_zero_attention_mask=mask)
    after = "resid_post" if kind[2] else "normalized_resid_post"
    ours = [cache["hook_full_embed"], *(cache[f"blocks.{i}.hook_{after}"] for i in range(3))]
    assert len(truth.hidden_states) == 4
    for mine, his in zip(ours, truth.hidden_states, strict=True):
        real = mask.bool()
        torch.testing.assert_close(mine[real], his[real], rtol=1e-5, atol=1e-5)


@both_layouts
def test_patterns_are_hugging_faces(kind):
    theirs, model = pair(kind)
    eager = copy.deepcopy(theirs)
    eager.set_attn_implementation("eager")
    with torch.no_grad():
        truth = eager(SAMPLES, attention_mask=REAL, output_attentions=True).attentions
    _, cache = model.run_with_cache(frames(model))
    for layer, pattern in enumerate(truth):
        ours = cache["pattern", layer]
        torch.testing.assert_close(ours[1, :, :6], pattern[1, :, :6], rtol=1e-5, atol=1e-6)
        assert not ours[1, :, :, 6:].any()


@both_layouts
def test_padding_is_not_heard(kind):
    """Where no norm spans the whole waveform, a row is what it is alone."""
    _, model = pair((*kind[:3], "layer"))
    n = FIELD + 5 * HOP + 3
    with torch.no_grad():
        alone = model(model.frames_of(SAMPLES[1:, :n]))
        together = model(model.frames_of(SAMPLES, REAL))[1:, :6]
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "more",
    [
        dict(hidden_act="relu"),
        dict(hidden_act="gelu_new", feat_extract_activation="relu"),
        dict(conv_bias=True, num_conv_pos_embeddings=5),
        dict(conv_pos_batch_norm=True),
        dict(feat_proj_layer_norm=False),
        dict(mask_time_prob=0.0),
        dict(attn_implementation="eager"),
    ],
    ids=lambda more: "-".join(more),
)
def test_variants_of_a_config(more):
    theirs = speech(POST, **more)
    model = HookedAudioEncoder.from_pretrained("x", hf_model=theirs)
    with torch.no_grad():
        logits = model(model.frames_of(SAMPLES, REAL), return_type="logits")
        truth = theirs(SAMPLES, attention_mask=REAL).logits
    torch.testing.assert_close(logits[MASK.bool()], truth[MASK.bool()], rtol=1e-5, atol=1e-5)


@both_layouts
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(kind, dtype):
    cast = speech(kind).to(dtype)
    model = HookedAudioEncoder.from_pretrained("tiny", hf_model=cast, dtype=dtype)
    with torch.no_grad():
        ours = model(model.frames_of(SAMPLES))
        assert torch.equal(ours, cast.base_model(SAMPLES.to(dtype)).last_hidden_state)
    assert model.cfg.dtype == dtype


@both_layouts
def test_weights_are_hugging_faces_tensors(kind):
    theirs, model = pair(kind)
    layer = theirs.base_model.encoder.layers[1]
    assert model.blocks[1].attn.W_Q.data_ptr() == layer.attention.q_proj.weight.data_ptr()
    assert model.blocks[1].attn.W_O.data_ptr() == layer.attention.out_proj.weight.data_ptr()
    assert model.W_U.data_ptr() == theirs.lm_head.weight.data_ptr()
    his = {p.data_ptr() for p in theirs.parameters()}
    assert {p.data_ptr() for p in model.parameters()} <= his
    assert model.W_Q.shape == (3, 4, 32, 8)
    assert model.W_in.shape == (3, 32, 48)
    assert model.b_U.shape == (11,)
    assert model.QK.shape == (3, 4, 32, 32)
    assert model.all_head_labels()[-1] == "L2H3"
    cfg = model.cfg
    assert (cfg.d_vocab, cfg.d_head, cfg.d_mlp, cfg.eps) == (11, 8, 48, 1e-3)
    assert (cfg.attention_dir, cfg.act_fn) == ("bidirectional", "gelu")


def test_a_module_in_training_is_compared_as_in_evaluation():
    theirs = speech(POST, mask_time_prob=0.9, hidden_dropout=0.9).train()
    state = torch.get_rng_state(), np.random.get_state()[1].copy()
    model = HookedAudioEncoder.from_pretrained("x", hf_model=theirs)
    assert theirs.training
    assert torch.equal(state[0], torch.get_rng_state())
    assert (state[1] == np.random.get_state()[1]).all()
    before = model(frames(model))
    model.train()
    given, mask = model.frames_of(SAMPLES, REAL)
    assert torch.equal(model((given, mask)), before)
    with torch.no_grad():
        truth = theirs.eval().base_model(SAMPLES, attention_mask=REAL).last_hidden_state
    assert torch.equal(before[MASK.bool()], truth[MASK.bool()])


def test_running_statistics_stay():
    theirs = speech(POST, conv_pos_batch_norm=True)
    statistics = {name: x.clone() for name, x in theirs.named_buffers()}
    assert statistics
    model = HookedAudioEncoder.from_pretrained("x", hf_model=theirs).train()
    model(model.frames_of(SAMPLES))
    assert all(torch.equal(x, statistics[name]) for name, x in theirs.named_buffers())


@pytest.mark.parametrize("broken", ["positions", "head"])
def test_a_wrong_reading_is_noticed(broken, monkeypatch):
    """The check when a model loads: with one part read otherwise it must not pass."""
    from hookedlm.layers.audio import AudioEmbed
    from hookedlm.layers.embed import Unembed

    if broken == "positions":
        monkeypatch.setattr(AudioEmbed, "forward", lambda self, frames, real: self.ln(frames))
    else:
        monkeypatch.setattr(Unembed, "forward", lambda self, x: x @ self.W_U)
    with pytest.raises(ConversionError, match="differ from Hugging Face's"):
        HookedAudioEncoder.from_pretrained("x", hf_model=speech(POST))


# Hooks --------------------------------------------------------------------------------------------

FRONT = ["embed.hook_embed", "embed.hook_pos_embed"]
NORMED = ["hook_scale", "hook_normalized"]
ATTENTION = [f"attn.hook_{x}" for x in ("q", "k", "v", "attn_scores", "pattern", "z")]
MLP = ["mlp.hook_pre", "mlp.hook_post", "hook_mlp_out", "hook_resid_post"]


@both_layouts
def test_the_classic_names_in_firing_order(kind):
    _, model = pair(kind)
    _, cache = model.run_with_cache([wave.numpy() for wave in SAMPLES])
    names = list(cache)
    norms = {x: [f"{x}.{hook}" for hook in NORMED] for x in ("embed.ln", "ln1", "ln2", "ln_final")}
    start = ["front_end.hook_features", *FRONT]
    attention = [*ATTENTION, "hook_attn_out", "hook_resid_mid"]
    if kind is POST:
        start, end = [*start, *norms["embed.ln"], "hook_full_embed"], ["hook_logits"]
        block = ["hook_resid_pre", *attention, *norms["ln1"], *MLP, *norms["ln2"]]
        block += ["hook_normalized_resid_post"]
    else:
        start, end = [*start, "hook_full_embed"], [*norms["ln_final"], "hook_logits"]
        block = ["hook_resid_pre", *norms["ln1"], *attention, *norms["ln2"], *MLP]
    blocks = [f"blocks.{layer}.{name}" for layer in range(3) for name in block]
    assert names == [*start, *blocks, *end]


def every_point():
    for kind in (POST, PRE):
        for name in pair(kind)[1].hook_dict:
            if not name.startswith(("blocks.0", "blocks.2")):
                yield pytest.param(kind, name, id=f"{name_of(kind)}-{name}")


@pytest.mark.parametrize("kind, name", list(every_point()))
def test_every_hook_fires_and_its_edit_counts(kind, name):
    _, model = pair(kind)
    sizes = dict(batch=2, pos=9, key_pos=9, head=4, kv_head=4, d_head=8, d_model=32, d_mlp=48)
    sizes |= {"d_vocab": 11, "d_conv": 10, "1": 1}
    waves = [wave.numpy() for wave in SAMPLES]

    def run(hooks):
        return model.run_with_hooks(waves, return_type="logits", fwd_hooks=hooks)

    def in_place(x, hook):
        x.copy_(edited(x))

    with torch.no_grad():
        after = run([(name, lambda x, hook: edited(x))])
        torch.testing.assert_close(after, run([(name, in_place)]))
    check_edit(model, name, tuple(sizes[axis] for axis in model.hook_dict[name].axes), run)


@both_layouts
def test_an_edit_in_place_leaves_the_callers_frames_alone(kind):
    _, model = pair(kind)
    given, _ = frames(model)
    kept = given.clone()
    model.run_with_hooks(given, fwd_hooks=[("embed.hook_embed", lambda x, hook: x.zero_())])
    assert torch.equal(given, kept)


@both_layouts
def test_listening_changes_nothing(kind):
    _, model = pair(kind)
    with torch.no_grad():
        plain = model(frames(model))
        heard = model.run_with_hooks(
            frames(model), fwd_hooks=[(lambda name: True, lambda x, hook: None)]
        )
    torch.testing.assert_close(plain, heard, rtol=1e-5, atol=1e-5)


@each_kind
def test_entries_computed_when_read_are_those_of_a_live_hook(kind):
    _, model = pair(kind)
    _, cache = model.run_with_cache(frames(model))
    assert "blocks.1.attn.hook_pattern" not in cache.cache_dict.recorded()
    assert ("ln_final.hook_normalized" in cache) == kind[2]
    assert ("hook_logits" in cache) == (model.unembed is not None)
    for name in cache:
        _, live = model.run_with_cache(frames(model), names_filter=name)
        finite = torch.isfinite(live[name])
        assert torch.equal(finite, torch.isfinite(cache[name]))
        torch.testing.assert_close(cache[name][finite], live[name][finite], rtol=1e-4, atol=1e-5)


def test_names_that_are_not_there():
    _, post = pair(POST)
    _, pre = pair(PRE)
    _, bare = pair(KINDS[2])
    for model, name, says in (
        (post, "hook_ful_embed", "hook_full_embed"),
        (post, "hook_embed", r"embed\.hook_embed"),
        (post, "ln_final.hook_scale", "ln2 of the last"),
        (pre, "blocks.0.hook_normalized_resid_post", "ln_final"),
        (bare, "hook_logits", "no CTC head"),
    ):
        with pytest.raises(HookNameError, match=says):
            model.run_with_cache(frames(model), names_filter=name)
    with pytest.raises(HookNeverFiredError):  # frames have passed it already
        post.run_with_cache(frames(post), names_filter="front_end.hook_features")


# Parts that add up --------------------------------------------------------------------------------


@both_layouts
@pytest.mark.parametrize("batched", [True, False])
def test_the_stream_is_a_sum(kind, batched):
    _, model = pair(kind)
    given, mask = frames(model)
    rows = slice(0, 2 if batched else 1)
    with torch.no_grad():
        _, cache = model.run_with_cache(
            given[rows], one_zero_attention_mask=mask[rows], remove_batch_dim=not batched
        )
    end = "hook_resid_post" if kind is PRE else "hook_normalized_resid_post"
    check_stream_is_a_sum(model, cache, f"blocks.2.{end}", pre_norm=kind is PRE)
    labels = cache.decompose_resid(return_labels=True)[1]
    assert labels[:4] == ["embed", "pos_embed", "0_attn_out", "0_mlp_out"]


def test_a_pre_norm_stream_is_a_plain_sum():
    _, model = pair(PRE)
    _, cache = model.run_with_cache(frames(model))
    stream = cache["embed.hook_embed"] + cache["embed.hook_pos_embed"]
    for layer in range(3):
        close(stream, cache["resid_pre", layer])
        stream = stream + cache["attn_out", layer] + cache["mlp_out", layer]
    close(stream, cache["resid_post", 2])


@both_layouts
def test_parts_add_up_to_logits(kind):
    """The CTC head is linear behind the last norm."""
    _, model = pair(kind)
    with torch.no_grad():
        logits, cache = model.run_with_cache(frames(model), return_type="logits")
        bias = model.b_U if kind is POST else model.ln_final.b @ model.W_U + model.b_U
        for token in (0, 7):
            attrs = cache.logit_attrs(cache.decompose_resid(), token)
            close(attrs.sum(0) + bias[token], logits[..., token])
        heads = cache.logit_attrs(cache.stack_head_results(-1), 7)
        close(cache.head_logit_attrs(7), heads)
    with pytest.raises(TokenizerError, match="index"):
        cache.logit_attrs(cache.decompose_resid(), "A")
    _, bare = pair(KINDS[2])
    _, cache = bare.run_with_cache(frames(bare))
    with pytest.raises(WeightError, match="W_U"):
        cache.logit_attrs(cache.decompose_resid(), 0)


# Gradients ----------------------------------------------------------------------------------------


@both_layouts
def test_gradients_are_hugging_faces(kind):
    theirs = speech(kind)
    model = HookedAudioEncoder.from_pretrained("x", hf_model=theirs)
    model(model.frames_of(SAMPLES, REAL), return_type="logits")[
        MASK.bool()
    ].square().sum().backward()
    theirs(SAMPLES, attention_mask=REAL).logits[MASK.bool()].square().sum().backward()
    base = theirs.base_model
    convolution = "conv_layers.0.conv.weight"
    for ours, his in (
        (model.blocks[0].attn.W_Q.grad.transpose(1, 2).flatten(0, 1), "attention.q_proj"),
        (model.blocks[0].mlp.W_out.grad.t(), "feed_forward.output_dense"),
    ):
        truth = base.encoder.layers[0].get_submodule(his).weight.grad
        torch.testing.assert_close(ours, truth, rtol=1e-4, atol=1e-4 * float(truth.abs().max()))
    ours = model.front_end.feature_extractor.get_parameter(convolution).grad
    truth = base.feature_extractor.get_parameter(convolution).grad
    torch.testing.assert_close(ours, truth, rtol=1e-4, atol=1e-4 * float(truth.abs().max()))


def test_gradients_at_hooks():
    _, model = pair(PRE)
    given, mask = frames(model)
    given.requires_grad_()
    seen = []
    with model.hooks(bwd_hooks=[("blocks.1.hook_resid_pre", lambda g, hook: seen.append(g))]):
        model((given, mask)).sum().backward()
    assert seen[0].shape == (2, 9, 32)
    assert given.grad[0].abs().sum() > 0
    assert not given.grad[1, 6:].any()  # padding is silenced


# Sound --------------------------------------------------------------------------------------------


@both_layouts
@pytest.mark.parametrize("normalise", [True, False])
def test_waveforms_go_through_the_feature_extractor(kind, normalise):
    theirs, _ = pair(kind)
    extractor = Wav2Vec2FeatureExtractor(do_normalize=normalise, return_attention_mask=False)
    model = HookedAudioEncoder.from_pretrained("x", hf_model=theirs, processor=extractor)
    waves = [3 * SAMPLES[0].numpy() + 1, SAMPLES[1, : FIELD + 5 * HOP + 3].numpy() - 2]
    inputs = extractor(
        waves, sampling_rate=16000, padding=True, return_attention_mask=True, return_tensors="pt"
    )
    with torch.no_grad():
        truth = theirs(**inputs).logits
        given, mask = model.to_frames(waves)
        ours = model(waves, return_type="logits")
        assert torch.equal(mask, MASK)
        assert torch.equal(model((given, mask), return_type="logits"), ours)
        assert torch.equal(model(given, mask, return_type="logits"), ours)
        assert torch.equal(
            model([torch.tensor(wave) for wave in waves], return_type="logits"), ours
        )
    assert torch.equal(ours[MASK.bool()], truth[MASK.bool()])


def test_forms_of_a_waveform():
    _, model = pair(POST)
    with torch.no_grad():
        truth = model(SAMPLES[:1])
        for form in (SAMPLES[0], SAMPLES[0].numpy(), SAMPLES[0].tolist(), [SAMPLES[0].tolist()]):
            assert torch.equal(model(form), truth)
        torch.testing.assert_close(model(SAMPLES[0].double()), truth)
        assert torch.equal(model(SAMPLES), model([SAMPLES[0], SAMPLES[1]]))
        assert torch.equal(model(SAMPLES.numpy()), model((SAMPLES[0], SAMPLES[1])))
        assert model(SAMPLES[:1], return_type=None) is None
    assert model.to_frames(SAMPLES[0], move_to_device=False)[0].device.type == "cpu"


def test_the_feature_extractor_of_a_processor(tmp_path):
    file = tmp_path / "vocab.json"
    file.write_text('{"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, "|": 4}')
    extractor = Wav2Vec2FeatureExtractor()
    both = Wav2Vec2Processor(extractor, Wav2Vec2CTCTokenizer(str(file)))
    model = HookedAudioEncoder.from_pretrained("x", hf_model=pair(POST)[0], processor=both)
    assert model.processor is extractor


def test_bad_input():
    _, model = pair(POST)
    wave, (given, mask) = SAMPLES[0], frames(model)
    for wrong, says in (
        ([], "without a waveform"),
        ("a.wav", "without a waveform"),
        (torch.tensor(1.0), "one channel"),
        (wave[: FIELD - 1], f"takes {FIELD}"),
        ([wave, wave[:3]], "waveform 1 has 3 samples"),
        (torch.zeros(500, 2), "waveform 0 has 2 samples"),
        ([torch.zeros(2, 500)], "one channel"),
        (np.zeros((1, 9, 32)), "one channel"),
        (["a"], "numbers"),
        (torch.full_like(wave, torch.nan), "not a number"),
        (given[..., :5], "d_model|32"),
        (given[:, :0], "frames"),
    ):
        with pytest.raises(InputError, match=says):
            model(wrong)
    for call, says in (
        (lambda: model(wave, sampling_rate=8000), "16000"),
        (lambda: model.to_frames(wave, 44100), "resample"),
        (lambda: model(given, mask[:, :4]), "attention mask"),
        (lambda: model(given, torch.zeros_like(mask)), "no real frame"),
        (lambda: model(wave, return_type="logit"), "return_type"),
        (lambda: pair(KINDS[2])[1](given, return_type="logits"), "no CTC head"),
        (lambda: model.frames_of(wave), r"\[batch, sample\]"),
        (lambda: model.frames_of(SAMPLES, REAL[:1]), r"\[batch, sample\]"),
        (lambda: model.frames_of(SAMPLES[:, :9]), "too few samples"),
        (lambda: model.frames_of(SAMPLES, REAL * (torch.arange(149) < 9)), "too few samples"),
        (lambda: model.frames_of(SAMPLES, REAL.flip(1)), "on the right"),
    ):
        with pytest.raises(InputError, match=says):
            call()
    bare = HookedAudioEncoder.from_pretrained("x", hf_model=pair(POST)[0])
    with pytest.raises(InputError, match="processor="):
        bare(wave)


def test_the_receptive_field_is_that_of_the_convolutions():
    _, model = pair(POST)
    assert model._counter.receptive_field == FIELD
    convolutions = model.front_end.feature_extractor
    assert convolutions(torch.zeros(1, FIELD)).shape[-1] == 1
    assert convolutions(torch.zeros(1, FIELD + HOP - 1)).shape[-1] == 1
    assert convolutions(torch.zeros(1, FIELD + HOP)).shape[-1] == 2
    with pytest.raises(RuntimeError):
        convolutions(torch.zeros(1, FIELD - 1))


def test_weights_that_are_not_there():
    _, model = pair(POST)
    for name, says in (("W_E", "convolutions"), ("W_pos", "convolution"), ("W_E_pos", "W_E")):
        with pytest.raises(WeightError, match=says):
            getattr(model, name)


# Doors --------------------------------------------------------------------------------------------


@each_kind
def test_checkpoint_folders(kind, tmp_path):
    theirs = speech(kind)
    theirs.save_pretrained(tmp_path / "tiny")
    Wav2Vec2FeatureExtractor(do_normalize=False).save_pretrained(tmp_path / "tiny")
    model = HookedAudioEncoder.from_pretrained(str(tmp_path / "tiny"), device="cpu")
    assert model.cfg.model_name == "tiny"
    assert model.cfg.original_architecture == kind[0].__name__
    assert model.processor.do_normalize is False
    with torch.no_grad():
        truth = theirs(SAMPLES)
        assert torch.equal(model(SAMPLES), theirs.base_model(SAMPLES).last_hidden_state)
        if model.unembed is not None:
            assert torch.equal(model(SAMPLES, return_type="logits"), truth.logits)
    half = HookedAudioEncoder.from_pretrained(str(tmp_path / "tiny"), torch_dtype=torch.bfloat16)
    assert half.dtype == half.cfg.dtype == torch.bfloat16


def test_a_folder_without_a_feature_extractor(tmp_path):
    speech(POST).save_pretrained(tmp_path)
    model = HookedAudioEncoder.from_pretrained(str(tmp_path))
    assert model.processor is None
    assert model(model.frames_of(SAMPLES)).shape == (2, 9, 32)


def test_a_pretraining_checkpoint_is_its_encoder(tmp_path):
    theirs = speech((Wav2Vec2ForPreTraining, *PRE[1:]), num_codevectors_per_group=4)
    theirs.save_pretrained(tmp_path)
    model = HookedAudioEncoder.from_pretrained(str(tmp_path))
    with torch.no_grad():
        truth = theirs.base_model(SAMPLES).last_hidden_state
        assert torch.equal(model(model.frames_of(SAMPLES)), truth)
    assert model.unembed is None


def test_checkpoints_without_some_of_their_weights(tmp_path):
    theirs = speech(POST)
    theirs.save_pretrained(tmp_path)
    without(tmp_path, "masked_spec_embed")  # many lack it: only training reads it
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers lists what the checkpoint lacks
        model = HookedAudioEncoder.from_pretrained(str(tmp_path))
        with torch.no_grad():
            truth = theirs(SAMPLES).logits
            assert torch.equal(model(model.frames_of(SAMPLES), return_type="logits"), truth)
        without(tmp_path, "layers.1.feed_forward.output_dense")
        with pytest.raises(LoadError, match=r"layers\.1\.feed_forward\.output_dense"):
            HookedAudioEncoder.from_pretrained(str(tmp_path))


def test_what_is_no_speech_encoder(tmp_path):
    from tiny import tinies

    gpt2 = tinies("gpt2")[0].build()
    with pytest.raises(ConversionError, match="hubert, wav2vec2"):
        HookedAudioEncoder.from_pretrained("x", hf_model=gpt2)
    gpt2.save_pretrained(tmp_path)
    with pytest.raises(LoadError, match="gpt2"):
        HookedAudioEncoder.from_pretrained(str(tmp_path))
    with pytest.raises(LoadError):
        HookedAudioEncoder.from_pretrained(str(tmp_path / "nowhere"))
    with pytest.raises(LoadError, match="revision"):
        HookedAudioEncoder.from_pretrained("x", hf_model=pair(POST)[0], revision="main")
    with pytest.raises(NotImplementedError, match="revision"):
        HookedAudioEncoder.from_pretrained("x", checkpoint_index=1)


def test_parts_nobody_accounts_for():
    classifier = speech((HubertForSequenceClassification, *POST[1:]))
    with pytest.raises(ConversionError, match=r"classifier.*base_model"):
        HookedAudioEncoder.from_pretrained("x", hf_model=classifier)
    model = HookedAudioEncoder.from_pretrained("x", hf_model=classifier.base_model)
    with torch.no_grad():
        truth = classifier.base_model(SAMPLES).last_hidden_state
        assert torch.equal(model(model.frames_of(SAMPLES)), truth)
    with pytest.raises(ConversionError, match=r"adapter.*[Aa]dapters"):
        convert_audio(speech((Wav2Vec2Model, *PRE[1:]), add_adapter=True))
    with pytest.raises(ConversionError, match="adapter_layer"):
        convert_audio(speech(PRE, adapter_attn_dim=4))


def test_from_a_config():
    fields = dict(
        n_layers=2,
        d_model=32,
        n_ctx=12,
        d_head=8,
        act_fn="gelu",
        attention_dir="bidirectional",
        seed=3,
    )
    state = torch.get_rng_state()
    first = HookedAudioEncoder(HookedTransformerConfig(**fields))
    second = HookedAudioEncoder(fields, model_name="mine")
    assert torch.equal(state, torch.get_rng_state())
    assert second.cfg.model_name == "mine"
    wave = torch.randn(2000)
    assert torch.equal(first(wave), second(wave))
    assert first(wave).shape == (1, 6, 32)  # 400 samples for one frame, 320 for the next
    assert first.unembed is None
    with_head = HookedAudioEncoder(fields | dict(d_vocab=7))
    logits = with_head(wave, return_type="logits")
    assert logits.shape == (1, 6, 7)
    logits.square().sum().backward()
    assert with_head.blocks[0].attn.W_Q.grad.abs().sum() > 0
    for wrong, says in (
        (dict(attention_dir="causal"), "bidirectional"),
        (dict(n_heads=2), "2 heads of 8"),
        (dict(d_model=24), "multiple of 16"),
    ):
        with pytest.raises(ConfigError, match=says):
            HookedAudioEncoder(fields | wrong)
    with pytest.raises(InputError, match="n_devices"):
        HookedAudioEncoder(fields | dict(n_devices=2))


@both_layouts
def test_moving_copying_and_saving(kind):
    theirs = speech(kind)
    model = HookedAudioEncoder.from_pretrained("x", hf_model=theirs)
    given = frames(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.blocks[0].attn.W_O.zero_()
        truth = theirs.base_model(SAMPLES, attention_mask=REAL).last_hidden_state
        assert torch.equal(model(given)[MASK.bool()], truth[MASK.bool()])
        assert not torch.allclose(model(given), twin(given))
        twin.load_state_dict(model.state_dict())
        assert torch.equal(model(given), twin(given))
    model.to(torch.float64)
    assert model(model.frames_of(SAMPLES)).dtype == torch.float64
    assert next(theirs.parameters()).dtype == torch.float32
    assert model.cpu() is model


def test_the_classic_path():
    from hookedlm import transformer_lens

    assert transformer_lens.HookedAudioEncoder is HookedAudioEncoder
    module = sys.modules["hookedlm.transformer_lens.HookedAudioEncoder"]
    assert module.HookedAudioEncoder is HookedAudioEncoder
