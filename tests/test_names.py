"""Shorthand names of activations, and the nearest name to a wrong one."""

import pytest

from hookedlm.errors import HookNameError
from hookedlm.names import get_act_name, nearest

# Documented results of TransformerLens 2.x (and the two names new here).
SHORTHAND = [
    (("k", 6, "a"), "blocks.6.attn.hook_k"),
    (("k6",), "blocks.6.attn.hook_k"),
    (("k6a",), "blocks.6.attn.hook_k"),
    (("k7",), "blocks.7.attn.hook_k"),
    (("pre", 2), "blocks.2.mlp.hook_pre"),
    (("pre5",), "blocks.5.mlp.hook_pre"),
    (("post", 3), "blocks.3.mlp.hook_post"),
    (("pre_linear", 3), "blocks.3.mlp.hook_pre_linear"),
    (("mlp_mid", 3), "blocks.3.mlp.hook_mid"),
    (("embed",), "hook_embed"),
    (("pos_embed",), "hook_pos_embed"),
    (("normalized", 27, "ln2"), "blocks.27.ln2.hook_normalized"),
    (("scale4", None, "ln1"), "blocks.4.ln1.hook_scale"),
    (("normalized3ln2",), "blocks.3.ln2.hook_normalized"),
    (("scale4ln1",), "blocks.4.ln1.hook_scale"),
    (("scale", 3, "ln1"), "blocks.3.ln1.hook_scale"),
    (("normalized", 1, "mlp.ln"), "blocks.1.mlp.ln.hook_normalized"),
    (("scale",), "ln_final.hook_scale"),
    (("normalized",), "ln_final.hook_normalized"),
    (("scale", 0), "blocks.0.hook_scale"),
    (("resid_pre", 0), "blocks.0.hook_resid_pre"),
    (("resid_pre", -1), "blocks.-1.hook_resid_pre"),
    (("resid_mid", 3, "block"), "blocks.3.hook_resid_mid"),
    (("resid_post4",), "hook_resid_post4"),
    (("attn", 3), "blocks.3.attn.hook_pattern"),
    (("pattern", 3), "blocks.3.attn.hook_pattern"),
    (("attn_logits", 3), "blocks.3.attn.hook_attn_scores"),
    (("attn_scores", 3), "blocks.3.attn.hook_attn_scores"),
    (("query", 3), "blocks.3.attn.hook_q"),
    (("key", 3), "blocks.3.attn.hook_k"),
    (("value", 3), "blocks.3.attn.hook_v"),
    (("rot_q", 3), "blocks.3.attn.hook_rot_q"),
    (("result", 2), "blocks.2.attn.hook_result"),
    (("attn_out", 3), "blocks.3.hook_attn_out"),
    (("mlp_out", 1), "blocks.1.hook_mlp_out"),
    (("q_input", 1), "blocks.1.hook_q_input"),
    (("router_logits", 1), "blocks.1.mlp.hook_router_logits"),
    (("in", 1, "mixer"), "blocks.1.mixer.hook_in"),
    (("logits",), "hook_logits"),
    (("blocks.1.hook_q_input",), "blocks.1.hook_q_input"),
    (("hook_embed",), "hook_embed"),
    (("hook_resid_pre", 2), "blocks.2.hook_resid_pre"),
]


@pytest.mark.parametrize("args, name", SHORTHAND)
def test_shorthand_becomes_the_full_name(args, name):
    assert get_act_name(*args) == name


def test_a_layer_named_twice_must_be_the_same():
    assert get_act_name("k6", 6) == "blocks.6.attn.hook_k"
    with pytest.raises(HookNameError, match=r"layer 6 .* is 3"):
        get_act_name("k6", 3)


PER_BLOCK = (
    "hook_resid_pre ln1.hook_scale ln1.hook_normalized attn.hook_q attn.hook_k attn.hook_v "
    "attn.hook_attn_scores attn.hook_pattern attn.hook_z attn.hook_result hook_attn_out "
    "hook_resid_mid ln2.hook_scale ln2.hook_normalized mlp.hook_pre mlp.hook_post hook_mlp_out "
    "hook_resid_post hook_q_input hook_k_input hook_v_input hook_mlp_in"
).split()
GPT2_SMALL = [
    "hook_embed",
    "hook_pos_embed",
    *(f"blocks.{layer}.{name}" for layer in range(12) for name in PER_BLOCK),
    "ln_final.hook_scale",
    "ln_final.hook_normalized",
    "hook_logits",
]


@pytest.mark.parametrize(
    "wrong, right",
    [
        ("blocks.3.attn.hook_patern", "blocks.3.attn.hook_pattern"),
        ("blocks.3.hook_pattern", "blocks.3.attn.hook_pattern"),
        ("blocks.3.attn.pattern", "blocks.3.attn.hook_pattern"),
        ("blocks.3.attn.hook_attn", "blocks.3.attn.hook_pattern"),
        ("blocks.5.mlp.hook_pattern", "blocks.5.attn.hook_pattern"),
        ("hook_pattern", "blocks.0.attn.hook_pattern"),
        ("attn.hook_pattern", "blocks.0.attn.hook_pattern"),
        ("blocks.99.hook_resid_pre", "blocks.11.hook_resid_pre"),
        ("blocks.-1.hook_resid_pre", "blocks.11.hook_resid_pre"),
        ("blocks.-12.hook_resid_pre", "blocks.0.hook_resid_pre"),
        ("blocks.12.attn.hook_zz", "blocks.11.attn.hook_z"),
        ("hook_resid_post4", "blocks.4.hook_resid_post"),
        ("resid_post", "blocks.0.hook_resid_post"),
        ("blocks.99.ln2.hook_scale", "blocks.11.ln2.hook_scale"),
        ("z", "blocks.0.attn.hook_z"),
        ("blocks.2.hook_scale", "blocks.2.ln1.hook_scale"),
        ("hook_embedding", "hook_embed"),
        ("ln_final.hook_normalised", "ln_final.hook_normalized"),
        ("Blocks.7.Hook_Mlp_Out", "blocks.7.hook_mlp_out"),
        ("embed", "hook_embed"),
    ],
)
def test_the_nearest_name_is_the_one_meant(wrong, right):
    assert nearest(wrong, GPT2_SMALL)[0] == right


def test_nearest_names_are_few_distinct_and_of_the_layer_asked_for():
    found = nearest("blocks.3.hook_resid_pst", GPT2_SMALL, n=3)
    assert found[0] == "blocks.3.hook_resid_post"
    assert len(found) == len(set(found)) == 3
    assert all(name.startswith("blocks.3.") for name in found)
    assert len(nearest("blocks.3.hook_resid_pst", GPT2_SMALL, n=1)) == 1


def test_layers_that_differ_offer_the_closest_layer_that_has_the_activation():
    hybrid = ["blocks.0.mixer.hook_in", "blocks.1.attn.hook_q", "blocks.5.attn.hook_q"]
    assert nearest("blocks.4.attn.hook_q", hybrid)[0] == "blocks.5.attn.hook_q"


def test_nothing_similar_means_no_suggestion():
    assert nearest("zzzzzz", GPT2_SMALL) == []
    assert nearest("hook_embed", []) == []
