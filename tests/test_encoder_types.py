"""`HookedEncoder` of BERT's relatives: Hugging Face's numbers, positions counted from padding,
heads of each kind, every hook point alive, parts that add up, and folders that load."""

from __future__ import annotations

import warnings
from functools import cache
from pathlib import Path

import pytest
import torch
import transformers as hf
from encoders import check_edit, check_stream_is_a_sum, drawn

import hookedlm
from hookedlm.encoder import HookedEncoder
from hookedlm.errors import ConversionError, InputError, WeightError
from hookedlm.families.bert import ENCODERS
from hookedlm.families.hubert import AUDIO_ENCODERS
from hookedlm.families.t5 import ENCODER_DECODERS

SIZES = dict(
    vocab_size=60,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=48,
    max_position_embeddings=24,
    layer_norm_eps=1e-3,
    pad_token_id=1,
    bos_token_id=None,
    eos_token_id=None,
)
NARROW = {"embedding_size": 12}
DISTIL = dict(
    vocab_size=60,
    dim=32,
    n_layers=2,
    n_heads=4,
    hidden_dim=48,
    max_position_embeddings=24,
    pad_token_id=1,
)
CASES = {
    "roberta": (hf.RobertaForMaskedLM, {}),
    "roberta-untied": (
        hf.RobertaForMaskedLM,
        dict(hidden_act="relu", tie_word_embeddings=False, type_vocab_size=1),
    ),
    "roberta-bare": (hf.RobertaModel, {}),
    "camembert": (hf.CamembertForMaskedLM, {}),
    "camembert-relu": (hf.CamembertForMaskedLM, dict(hidden_act="relu", num_attention_heads=2)),
    "xlm-roberta": (hf.XLMRobertaForMaskedLM, {}),
    "xlm-roberta-bare": (hf.XLMRobertaModel, dict(hidden_act="gelu_new", pad_token_id=4)),
    "data2vec-text": (hf.Data2VecTextForMaskedLM, {}),
    "data2vec-text-untied": (
        hf.Data2VecTextForMaskedLM,
        dict(tie_word_embeddings=False, hidden_act="relu"),
    ),
    "electra-generator": (hf.ElectraForMaskedLM, NARROW),
    "electra-generator-wide": (
        hf.ElectraForMaskedLM,
        dict(embedding_size=32, hidden_act="relu", tie_word_embeddings=False),
    ),
    "electra-discriminator": (hf.ElectraForPreTraining, NARROW),
    "electra-discriminator-wide": (
        hf.ElectraForPreTraining,
        dict(embedding_size=32, hidden_act="gelu_new"),
    ),
    "electra-bare": (hf.ElectraModel, NARROW),
    "ernie": (hf.ErnieForPreTraining, {"use_task_id": False}),
    "ernie-untied": (
        hf.ErnieForMaskedLM,
        dict(tie_word_embeddings=False, hidden_act="relu", use_task_id=False),
    ),
    "distilbert": (hf.DistilBertForMaskedLM, {}),
    "distilbert-sinusoidal": (
        hf.DistilBertForMaskedLM,
        dict(sinusoidal_pos_embds=True, activation="relu", tie_word_embeddings=False),
    ),
    "bert-bare": (hf.BertModel, {}),
    "bert-untied": (hf.BertForMaskedLM, dict(tie_word_embeddings=False, hidden_act="relu")),
}
each = pytest.mark.parametrize("name", CASES)

TOKENS = torch.randint(5, 60, (2, 9), generator=torch.Generator().manual_seed(0))
MASK = torch.tensor([[1] * 9, [1] * 6 + [0] * 3])


@cache
def pair(name: str) -> tuple[torch.nn.Module, HookedEncoder]:
    kind, differences = CASES[name]
    sizes = DISTIL if kind is hf.DistilBertForMaskedLM else SIZES
    theirs = drawn(lambda: kind(kind.config_class(**sizes | differences)))
    return theirs, HookedEncoder.from_pretrained("tiny", hf_model=theirs)


def padded(model: torch.nn.Module, left: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    mask = MASK.flip(1) if left else MASK
    return TOKENS.masked_fill(mask == 0, model.config.pad_token_id), mask


def types_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    n_types = vars(model.config).get("type_vocab_size", 0)
    if not n_types:
        return {}
    return {"token_type_ids": (torch.arange(9) > 3).long().expand(2, 9).clamp(max=n_types - 1)}


def answers(model: HookedEncoder, out) -> dict[str, torch.Tensor]:
    """What Hugging Face's heads say, by the return type that asks for it here."""
    single = "logits" if model.rtd_head is None else "replaced"
    found = {
        "logits": out.get("prediction_logits"),
        "next_sentence": out.get("seq_relationship_logits"),
        single: out.get("logits", out.get("prediction_logits")),
    }
    return {name: x for name, x in found.items() if x is not None}


# Parity -------------------------------------------------------------------------------------------


@each
@pytest.mark.usefixtures("one_gelu")
@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
def test_numbers_are_hugging_faces(name, left):
    theirs, model = pair(name)
    tokens, mask = padded(theirs, left)
    types = types_of(theirs)
    given = types | {"one_zero_attention_mask": mask}
    with torch.no_grad():
        out = theirs(tokens, attention_mask=mask, **types)
        stream = theirs.base_model(tokens, attention_mask=mask, **types).last_hidden_state
        real = mask.bool()
        assert torch.equal(model.encoder_output(tokens, **given)[real], stream[real])
        for kind, truth in answers(model, out).items():
            ours = model(tokens, return_type=kind, **given)
            at = slice(None) if kind == "next_sentence" else real
            assert torch.equal(ours[at], truth[at])
        _, cache = model.run_with_cache(tokens, return_type=None, **given)
        states = theirs.base_model(
            tokens, attention_mask=mask, output_hidden_states=True, **types
        ).hidden_states
    ours = [cache["hook_full_embed"]]
    ours += [cache[f"blocks.{i}.hook_normalized_resid_post"] for i in range(2)]
    for mine, his in zip(ours, states, strict=True):
        torch.testing.assert_close(mine[real], his[real], rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("one_gelu")
@pytest.mark.parametrize("name", ["roberta", "xlm-roberta-bare", "camembert", "data2vec-text"])
def test_positions_count_the_tokens_that_are_not_padding(name):
    theirs, model = pair(name)
    pad = theirs.config.pad_token_id
    tokens = TOKENS.clone()
    tokens[0, 3] = tokens[1, :2] = pad  # and no mask: attention sees padding, positions skip it
    table = theirs.base_model.embeddings.position_embeddings.weight
    _, cache = model.run_with_cache(tokens, return_type=None)
    rows = cache["embed.hook_pos_embed"]
    assert torch.equal(rows[0, :5], table[[pad + 1, pad + 2, pad + 3, pad, pad + 4]])
    assert torch.equal(rows[1, :3], table[[pad, pad, pad + 1]])
    assert torch.equal(model.W_pos, table[pad + 1 :])
    assert model.W_pos.data_ptr() == table[pad + 1].data_ptr()
    assert model.cfg.n_ctx == 24 - pad - 1
    with torch.no_grad():
        truth = theirs.base_model(tokens).last_hidden_state
        assert torch.equal(model.encoder_output(tokens), truth)
        longest = torch.full((1, model.cfg.n_ctx), 7)
        assert torch.equal(
            model.encoder_output(longest), theirs.base_model(longest).last_hidden_state
        )
    with pytest.raises(InputError, match=str(model.cfg.n_ctx)):
        model.encoder_output(torch.full((1, model.cfg.n_ctx + 1), 7))


def test_padding_in_bert_is_a_token_like_others():
    theirs, model = pair("bert-bare")
    _, cache = model.run_with_cache(padded(theirs)[0], return_type=None)
    assert torch.equal(cache["embed.hook_pos_embed"][1], model.W_pos[:9])


# Hooks --------------------------------------------------------------------------------------------

SHAPES = dict(batch=2, pos=9, key_pos=9, head=4, kv_head=4, d_head=8, d_model=32, d_mlp=48)
SHAPES |= {"d_vocab": 60, "choice": 2, "d_embed": 12, "1": 1}


@pytest.mark.parametrize(
    "name", ["roberta", "electra-generator", "electra-discriminator", "distilbert", "ernie"]
)
def test_every_hook_fires_and_its_edit_counts(name):
    theirs, model = pair(name)
    tokens, mask = padded(theirs)

    for point, hook in model.hook_dict.items():
        head = next(iter(set(model._answers) & {"logits", "replaced"}))
        kind = "next_sentence" if point.startswith(("pooler", "nsp")) else head
        axes = tuple(SHAPES[axis] for axis in hook.axes)

        def run(hooks, kind=kind):
            return model.run_with_hooks(
                tokens, return_type=kind, one_zero_attention_mask=mask, fwd_hooks=hooks
            )

        check_edit(model, point, axes, run)


@pytest.mark.parametrize("name", CASES)
def test_the_stream_is_a_sum(name):
    theirs, model = pair(name)
    tokens, mask = padded(theirs)
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens, return_type=None, one_zero_attention_mask=mask)
        check_stream_is_a_sum(model, cache, "blocks.1.hook_normalized_resid_post")
    labels = cache.decompose_resid(return_labels=True)[1]
    assert ("token_type_embed" in labels) == bool(types_of(theirs))


def test_a_projection_of_the_embeddings_is_part_of_the_stream():
    """ELECTRA's embeddings are narrower than its stream: hooks see them so, W_E is so."""
    theirs, model = pair("electra-generator")
    assert model.W_E.shape == (60, 12)
    assert model.W_U.shape == (12, 60)
    assert model.cfg.d_model == 32
    assert model.hook_dict["embed.hook_embed"].axes[-1] == "d_embed"
    project = theirs.electra.embeddings_project
    assert model.embed.project.W.data_ptr() == project.weight.data_ptr()
    bias = model.accumulated_bias(0)
    truth = project(theirs.electra.embeddings.LayerNorm.bias)
    torch.testing.assert_close(bias, truth, rtol=1e-5, atol=1e-6)


def test_a_head_that_is_heard_runs():
    _, model = pair("roberta-bare")
    _, cache = model.run_with_cache(TOKENS, return_type=None, names_filter="pooler.hook_pooler_out")
    with torch.no_grad():
        truth = pair("roberta-bare")[0](TOKENS).pooler_output
    torch.testing.assert_close(cache["pooler.hook_pooler_out"], truth, rtol=1e-5, atol=1e-6)
    _, model = pair("electra-discriminator")
    _, cache = model.run_with_cache(TOKENS, return_type=None, names_filter="rtd_head.*")
    with torch.no_grad():
        assert torch.equal(cache["rtd_head.hook_rtd_out"], model(TOKENS, return_type="replaced"))


# Doors --------------------------------------------------------------------------------------------


@each
def test_checkpoint_folders(name, tmp_path):
    theirs, first = pair(name)
    theirs.save_pretrained(tmp_path)
    model = HookedEncoder.from_pretrained(str(tmp_path), device="cpu")
    assert model._answers == first._answers
    assert model.cfg.d_vocab == 60
    tokens, mask = padded(theirs)
    with torch.no_grad():
        for kind in set(model._answers) - {"pooled"}:
            ours = model(tokens, return_type=kind, one_zero_attention_mask=mask)
            truth = first(tokens, return_type=kind, one_zero_attention_mask=mask)
            torch.testing.assert_close(ours, truth, rtol=1e-5, atol=1e-6)
        ours, truth = (x.encoder_output(tokens, None, mask) for x in (model, first))
        torch.testing.assert_close(ours, truth, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "kind", [hf.RobertaForSequenceClassification, hf.ElectraForTokenClassification]
)
def test_a_checkpoint_of_another_task_gives_its_encoder(kind, tmp_path):
    theirs = drawn(lambda: kind(kind.config_class(**SIZES)))
    with pytest.raises(ConversionError, match="base_model"):
        HookedEncoder.from_pretrained("x", hf_model=theirs)
    theirs.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers lists what the checkpoint lacks
        model = HookedEncoder.from_pretrained(str(tmp_path), device="cpu")
    assert model._answers == []
    with torch.no_grad():
        truth = theirs.base_model(TOKENS).last_hidden_state
        assert torch.equal(model.encoder_output(TOKENS), truth)
    with pytest.raises(InputError, match="encoder_output"):
        model(TOKENS)


def test_a_parameter_that_nobody_knows(tmp_path):
    kind = hf.ErnieForMaskedLM
    theirs = kind(kind.config_class(**SIZES, use_task_id=True))
    with pytest.raises(ConversionError, match="task_type_embeddings"):
        HookedEncoder.from_pretrained("x", hf_model=theirs)


def test_heads_that_a_model_has_not():
    _, model = pair("electra-discriminator")
    with pytest.raises(InputError, match="return_type='replaced'"):
        model(TOKENS)
    with pytest.raises(WeightError, match="W_U"):
        _ = model.W_U
    _, model = pair("roberta")
    with pytest.raises(InputError, match="replaced tokens"):
        model(TOKENS, return_type="replaced")
    with pytest.raises(InputError, match="next-sentence"):
        model(TOKENS, return_type="next_sentence")


def test_types_of_tokens_that_a_model_does_not_tell_apart():
    for name in ("roberta-untied", "distilbert"):
        _, model = pair(name)
        with pytest.raises(InputError, match="0 to 0"):
            model(TOKENS, token_type_ids=torch.ones_like(TOKENS))
        assert torch.equal(model(TOKENS, token_type_ids=torch.zeros_like(TOKENS)), model(TOKENS))


def test_the_page_names_every_type():
    page = (Path(__file__).parent.parent / "docs" / "differences.md").read_text("utf-8")
    for name, kinds in (
        ("HookedEncoder", ENCODERS),
        ("HookedEncoderDecoder", ENCODER_DECODERS),
        ("HookedAudioEncoder", AUDIO_ENCODERS),
    ):
        assert f"| `{name}` | {', '.join(kinds)} |" in page


# Bare decoders, which embed texts ----------------------------------------------------------------

DECODER = dict(
    vocab_size=60,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    intermediate_size=48,
    pad_token_id=1,
)


@pytest.mark.parametrize(
    "kind, differences",
    [
        (hf.Qwen3Model, {}),
        (hf.Gemma3TextModel, {}),
        (hf.Gemma3TextModel, {"use_bidirectional_attention": True}),
        (hf.LlamaModel, {"hidden_act": "relu"}),
    ],
)
def test_a_decoder_without_its_head_loads(kind, differences):
    theirs = drawn(lambda: kind(kind.config_class(**DECODER | differences)))
    model = hookedlm.load(theirs)
    tokens, mask = padded(theirs, left=True)
    with torch.no_grad():
        truth = theirs(tokens, attention_mask=mask).last_hidden_state[mask.bool()]
        ours = model(tokens, attention_mask=mask)[mask.bool()]
    torch.testing.assert_close(ours, truth, rtol=1e-5, atol=1e-5)
    everyone = "use_bidirectional_attention" in differences
    assert model.cfg.attention_dir == ("bidirectional" if everyone else "causal")

    def run(hooks):
        return model.run_with_hooks(TOKENS, fwd_hooks=hooks)

    sizes = SHAPES | {"kv_head": 2, "d_vocab": 32}
    for point, hook in model.hook_dict.items():
        if not hook.on_demand:
            check_edit(model, point, tuple(sizes[axis] for axis in hook.axes), run)
