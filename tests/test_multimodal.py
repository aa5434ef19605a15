"""Models that also see or hear: their text decoder is hooked, whatever wraps it."""

from __future__ import annotations

import functools
import inspect

import pytest
import torch
from conftest import hf, hooked
from tiny import VOCAB, perturb, quiet_transformers
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageTextToText

import hookedlm
from hookedlm import HookedTransformer
from hookedlm.convert.text_model import readable
from hookedlm.errors import InputError, LoadError

IMAGE = 90
TEXT = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SIGHT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 8,
}
GRID = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "out_hidden_size": 32, "num_heads": 4}
GRID |= {"patch_size": 8, "spatial_merge_size": 1, "intermediate_size": 48}
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
KINDS: dict[str, dict] = {
    "gemma3": {
        "text_config": TEXT
        | {"sliding_window": 4, "sliding_window_pattern": 2}
        | {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
        "vision_config": SIGHT,
        "mm_tokens_per_image": 4,
    },
    "llava": {
        "text_config": TEXT | {"model_type": "llama"},
        "vision_config": SIGHT | {"model_type": "clip_vision_model", "projection_dim": 32},
        "vision_feature_layer": -1,
    },
    "paligemma": {
        "text_config": TEXT | {"model_type": "gemma"},
        "vision_config": SIGHT | {"model_type": "siglip_vision_model", "projection_dim": 32},
        "projection_dim": 32,
    },
    "qwen2_vl": {"text_config": TEXT | {"rope_parameters": MROPE}, "vision_config": GRID},
    "qwen2_5_vl": {"text_config": TEXT | {"rope_parameters": MROPE}, "vision_config": GRID},
    "qwen3_vl": {
        "text_config": TEXT | {"rope_parameters": MROPE},
        "vision_config": GRID | {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
    },
    "idefics3": {
        "text_config": TEXT | {"model_type": "llama"},
        "vision_config": SIGHT,
        "scale_factor": 2,
    },
    "mllama": {
        "text_config": TEXT
        | {"cross_attention_layers": [1], "rope_parameters": {"rope_type": "default"}},
        "vision_config": SIGHT
        | {"num_global_layers": 1, "attention_heads": 4, "vision_output_dim": 64}
        | {"intermediate_layers_indices": [0], "max_num_tiles": 1}
        | {"supported_aspect_ratios": [[1, 1]]},
    },
    "fuyu": {
        "text_config": TEXT | {"model_type": "persimmon", "num_key_value_heads": 4},
        "vocab_size": VOCAB,
        "patch_size": 4,
    },
    "git": {name: size for name, size in TEXT.items() if "key" not in name and "dim" not in name}
    | {"vision_config": SIGHT},
    "blip-2": {
        "text_config": {
            "model_type": "opt",
            "vocab_size": VOCAB,
            "hidden_size": 32,
            "word_embed_proj_dim": 32,
            "ffn_dim": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
            "pad_token_id": 0,
        },
        "vision_config": SIGHT,
        "qformer_config": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
        | {"intermediate_size": 48, "encoder_hidden_size": 32},
        "num_query_tokens": 4,
    },
}  # fmt: skip
SEEING = ("gemma3", "llava", "paligemma", "qwen2_vl", "qwen2_5_vl", "idefics3")


@functools.cache
def built(kind: str) -> nn.Module:
    named = {"image_token_id": IMAGE} if kind not in ("fuyu", "blip-2", "git") else {}
    auto = AutoModelForImageTextToText
    with quiet_transformers(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = AutoConfig.for_model(kind, **KINDS[kind], **named)
        model = auto.from_config(config, dtype=torch.float32).eval()
    perturb(model, 0)
    return model


@functools.cache
def loaded(kind: str) -> HookedTransformer:
    return hookedlm.load(built(kind))


def text() -> Tensor:
    return torch.randint(3, IMAGE, (2, 10), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def seen(kind: str) -> tuple[Tensor, dict]:
    """Tokens with an image among them, and what the processor would give beside them."""
    theirs, generator = built(kind), torch.Generator().manual_seed(2)
    inputs = {"pixel_values": torch.randn(1, 3, 16, 16, generator=generator)}
    if "qwen" in kind:
        inputs = {
            "pixel_values": torch.randn(4, 3 * 2 * 64, generator=generator),
            "image_grid_thw": torch.tensor([[1, 2, 2]]),
        }
    if kind == "idefics3":
        inputs = {"pixel_values": inputs["pixel_values"][None]}
    features = theirs.model.get_image_features(**inputs).pooler_output
    n = sum(len(x.reshape(-1, x.shape[-1])) for x in features)
    tokens = text()[:1].repeat(1, 2)
    tokens[0, 3 : 3 + n] = IMAGE
    is_image = (tokens == IMAGE).long()
    for name in ("token_type_ids", "mm_token_type_ids"):
        if name in inspect.signature(theirs.forward).parameters:
            inputs[name] = is_image if kind != "paligemma" else torch.ones_like(is_image)
    return tokens, inputs


def close(ours: Tensor, theirs: Tensor) -> bool:
    return bool((ours - theirs).abs().max() <= 1e-5 * theirs.abs().max())


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_text_alone(kind: str):
    ours, theirs, x = loaded(kind), readable(built(kind)), text()
    expected = theirs(input_ids=x, use_cache=False).logits
    assert torch.equal(ours(x), expected) or close(ours(x), expected)
    mask = torch.ones_like(x)
    mask[1, :3] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    padded = {"attention_mask": mask, "position_ids": positions}
    expected = theirs(input_ids=x, use_cache=False, **padded).logits
    assert close(ours(x, attention_mask=mask)[mask.bool()], expected[mask.bool()])
    skipped = {"blocks.1"} if kind == "mllama" else set()
    opaque = {part.where for part in ours.fidelity().parts if "opaque" in part.form}
    assert opaque == skipped, ours.fidelity()


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_embeddings_for_tokens(kind: str):
    ours, theirs = loaded(kind), readable(built(kind))
    embeds = torch.randn(2, 10, 32, generator=torch.Generator().manual_seed(3))
    expected = theirs(inputs_embeds=embeds.clone(), use_cache=False).logits
    assert close(ours(inputs_embeds=embeds), expected)
    _, cache = ours.run_with_cache(inputs_embeds=embeds)
    assert cache["hook_embed"].shape == (2, 10, 32)
    rows = theirs.get_input_embeddings()(text())
    assert close(ours(inputs_embeds=rows), ours(text()))


@pytest.mark.parametrize(
    "name",
    ["gpt2-base", "opt-pre_norm_projected", "bloom-base", "granite-multipliers", "gemma2-base"],
)
@torch.no_grad()
def test_embeddings_for_tokens_of_a_text_model(name: str):
    """Scales, position embeddings and norms come where Hugging Face puts them."""
    ours, theirs, x = hooked(name), hf(name), text()
    rows = theirs.get_input_embeddings()(x)
    expected = theirs(inputs_embeds=rows.clone(), use_cache=False).logits
    assert close(ours(inputs_embeds=rows), expected)
    mask = torch.ones_like(x)
    mask[1, :3] = 0
    got = ours(inputs_embeds=rows, attention_mask=mask)
    assert close(got[mask.bool()], ours(x, attention_mask=mask)[mask.bool()])
    both = ours(inputs_embeds=rows, tokens=x, return_type="both")
    assert torch.allclose(both.loss, ours(x, return_type="loss"), atol=1e-5)


def test_gradients_reach_the_embeddings():
    ours, x = hooked("gpt2-base"), text()
    rows = hf("gpt2-base").get_input_embeddings()(x).detach().requires_grad_()
    ours(inputs_embeds=rows)[0, -1].sum().backward()
    assert rows.grad is not None
    assert float(rows.grad[0].abs().min()) > 0
    assert not rows.grad[1].any()


@torch.no_grad()
def test_embeddings_for_tokens_of_a_toy():
    toy = HookedTransformer(
        {"n_layers": 1, "d_model": 8, "n_ctx": 12, "d_head": 4, "d_vocab": 7, "act_fn": "relu"}
    )
    x = torch.tensor([[1, 2, 3]])
    assert close(toy(inputs_embeds=toy.embed.W_E[x]), toy(x))
    with pytest.raises(InputError, match="takes tokens only"):
        toy(x, pixel_values=torch.zeros(1))


@pytest.mark.parametrize("kind", SEEING)
@torch.no_grad()
def test_images(kind: str):
    """What Hugging Face does with an image, with hooks: masks and positions of images included."""
    ours, theirs = loaded(kind), built(kind)
    tokens, inputs = seen(kind)
    expected = theirs(input_ids=tokens, use_cache=False, **inputs).logits
    got = ours(tokens, **inputs)
    assert close(got, expected)
    assert not close(got, ours(tokens))
    zero = [("blocks.1.hook_attn_out", lambda x, hook: 0 * x)]
    assert not close(ours.run_with_hooks(tokens, fwd_hooks=zero, **inputs), expected)
    _, cache = ours.run_with_cache(tokens, **inputs)
    torch.testing.assert_close(
        cache.decompose_resid().sum(0), cache["resid_post", -1], rtol=1e-4, atol=1e-4
    )
    pattern = cache["pattern", 1]
    torch.testing.assert_close(pattern.sum(-1), torch.ones_like(pattern[..., 0]))
    text_only = ours.run_with_cache(tokens)[1]["pattern", 1]
    if kind == "gemma3":  # image tokens see each other, ahead too
        first, last = 3, 6
        assert bool((pattern[0, :, first, last] > 0).all())
        assert not text_only[0, :, first, last].any()


@pytest.mark.parametrize("kind", ["gemma3", "llava"])
@torch.no_grad()
def test_images_merged_by_hugging_face(kind: str):
    """Image features in the embeddings, as a user would put them there."""
    ours, theirs = loaded(kind), built(kind)
    tokens, inputs = seen(kind)
    embeds = theirs.get_input_embeddings()(tokens)
    features = theirs.model.get_image_features(inputs["pixel_values"]).pooler_output
    features = torch.cat(list(features)) if kind == "llava" else features
    embeds = embeds.masked_scatter((tokens == IMAGE)[..., None], features)
    beside = {name: x for name, x in inputs.items() if "type" in name}
    expected = theirs(input_ids=tokens, use_cache=False, **inputs).logits
    assert close(ours(inputs_embeds=embeds, **beside), expected)


@pytest.mark.parametrize("kind", ["gemma3", "llava", "qwen2_vl"])
@pytest.mark.parametrize("past", [True, False])
@torch.no_grad()
def test_generation_from_images(kind: str, past: bool):
    ours, theirs = loaded(kind), built(kind)
    tokens, inputs = seen(kind)
    greedy = {"do_sample": False, "max_new_tokens": 5}
    expected = theirs.generate(
        input_ids=tokens, **inputs, **greedy, eos_token_id=None, pad_token_id=0
    )
    options = greedy | {"stop_at_eos": False, "use_past_kv_cache": past}
    assert torch.equal(ours.generate(tokens, **inputs, **options), expected)
    # What an image left behind (Qwen: by how much it moved positions) is gone in the next text.
    plain = theirs.generate(text(), **greedy, eos_token_id=None, pad_token_id=0)
    assert torch.equal(ours.generate(text(), **options), plain)


@pytest.mark.parametrize("past", [True, False])
@torch.no_grad()
def test_what_is_generated_behind_a_prefix_that_sees_itself(past: bool):
    """PaliGemma's prefix looks both ways; what follows it does not, with a cache or without."""
    ours, theirs = loaded("paligemma"), built("paligemma")
    tokens, inputs = seen("paligemma")
    inputs["token_type_ids"] = torch.zeros_like(tokens)
    how = {"do_sample": False, "max_new_tokens": 4, "output_logits": True}
    how |= {"return_dict_in_generate": True}
    expected = theirs.generate(input_ids=tokens, **inputs, **how, eos_token_id=None, pad_token_id=0)
    got = ours.generate(tokens, **inputs, **how, stop_at_eos=False, use_past_kv_cache=past)
    assert close(torch.stack(got.logits), torch.stack(expected.logits))


@torch.no_grad()
def test_generation_from_embeddings():
    theirs = built("llava")
    rows = theirs.get_input_embeddings()(text())
    greedy = {"do_sample": False, "max_new_tokens": 4}
    expected = theirs.generate(inputs_embeds=rows, **greedy, eos_token_id=None, pad_token_id=0)
    for past in (True, False):
        got = loaded("llava").generate(
            inputs_embeds=rows, **greedy, stop_at_eos=False, use_past_kv_cache=past
        )
        assert torch.equal(got, expected)


@torch.no_grad()
def test_a_cross_attention_runs_where_there_is_something_to_attend_to():
    ours, theirs, x = loaded("mllama"), built("mllama"), text()
    states = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(4))
    theirs.model.language_model.layers[1].cross_attn_attn_gate.data.fill_(0.7)
    expected = theirs(input_ids=x, cross_attention_states=states, use_cache=False).logits
    got, cache = ours.run_with_cache(x, cross_attention_states=states)
    assert close(got, expected)
    assert not torch.equal(cache["resid_pre", 1], cache["resid_post", 1])
    _, cache = ours.run_with_cache(x)
    assert torch.equal(cache["resid_pre", 1], cache["resid_post", 1])
    edited = ours.run_with_hooks(x, fwd_hooks=[("blocks.1.hook_resid_pre", lambda s, hook: s + 1)])
    assert not close(edited, ours(x))


@torch.no_grad()
def test_what_can_not_be_right_is_refused():
    ours, x = loaded("llava"), text()
    with pytest.raises(InputError, match=r"pixle_values.*LlavaModel takes.*pixel_values"):
        ours(x, pixle_values=torch.zeros(1))
    with pytest.raises(InputError, match="inputs_embeds is the input"):
        ours(x, inputs_embeds=torch.zeros(2, 10, 32))
    with pytest.raises(InputError, match="expected a float tensor"):
        ours(inputs_embeds=x)
    with pytest.raises(InputError, match="GPT2Model takes"):
        hooked("gpt2-base")(x, pixel_values=torch.zeros(1))
    with pytest.raises(InputError, match=r"GitForCausalLM puts these beside the 10"):
        loaded("git")(x, pixel_values=torch.randn(2, 3, 16, 16))
    tokens, inputs = seen("qwen3_vl")
    with pytest.raises(InputError, match="adds to the stream between its blocks"):
        loaded("qwen3_vl")(tokens, **inputs)
    assert close(loaded("qwen3_vl")(x), built("qwen3_vl")(x, use_cache=False).logits)


@pytest.mark.parametrize("kind", ["llava", "gemma3", "qwen2_vl"])
@torch.no_grad()
def test_from_a_folder(kind: str, tmp_path):
    theirs = built(kind)
    theirs.save_pretrained(tmp_path)
    x = text()
    expected = theirs(input_ids=x, use_cache=False).logits
    assert close(hookedlm.load(tmp_path, device="cpu")(x), expected)
    classic = HookedTransformer.from_pretrained_no_processing(str(tmp_path), device="cpu")
    assert close(classic(x), expected)
    few = hookedlm.load(tmp_path, device="cpu", first_n_layers=2)
    assert few.cfg.n_layers == 2


def test_a_folder_of_no_language_model(tmp_path):
    with quiet_transformers():
        AutoConfig.for_model("vit").save_pretrained(tmp_path)
    with pytest.raises(LoadError, match="Unrecognized configuration class"):
        hookedlm.load(tmp_path)


@torch.no_grad()
def test_processing_keeps_log_probs():
    theirs, x = built("llava"), text()
    ours = HookedTransformer.from_pretrained(
        "llava", hf_model=theirs, device="cpu", center_writing_weights=False
    )
    expected = theirs(input_ids=x, use_cache=False).logits.log_softmax(-1)
    assert float((ours(x).log_softmax(-1) - expected).abs().max()) < 1e-4
