"""Singular directions beside those of dense matrices cut out of Hugging Face's state dicts."""

from __future__ import annotations

import pytest
import torch
from conftest import hf, hooked
from tiny import tinies

import hookedlm
from hookedlm.errors import InputError, WeightError
from hookedlm.svd_interpreter import SVDInterpreter

LAYER = 1


def gpt2_matrices(head):
    weights = {k: v.double() for k, v in hf("gpt2-base").state_dict().items()}
    here = f"transformer.h.{LAYER}."
    W_V = weights[here + "attn.c_attn.weight"].chunk(3, dim=1)[2]  # Conv1D: [in, out]
    rows = slice(8 * head, 8 * (head + 1))
    norm = weights[here + "ln_2.weight"]
    return weights["lm_head.weight"], {
        "OV": W_V[:, rows] @ weights[here + "attn.c_proj.weight"][rows],
        "w_in": (norm[:, None] * weights[here + "mlp.c_fc.weight"]).T,
        "w_out": weights[here + "mlp.c_proj.weight"],
    }


def llama_matrices(head):
    weights = {k: v.double() for k, v in hf("llama-grouped").state_dict().items()}
    here = f"model.layers.{LAYER}."
    kv, query = (slice(8 * i, 8 * (i + 1)) for i in (head // 2, head))  # 4 heads on 2 values
    norm = weights[here + "post_attention_layernorm.weight"]
    return weights["lm_head.weight"], {
        "OV": weights[here + "self_attn.v_proj.weight"][kv].T
        @ weights[here + "self_attn.o_proj.weight"][:, query].T,
        "w_in": weights[here + "mlp.up_proj.weight"] * norm,
        "w_gate": weights[here + "mlp.gate_proj.weight"] * norm,
        "w_out": weights[here + "mlp.down_proj.weight"].T,
    }


def gemma_matrices(head):
    weights = {k: v.double() for k, v in hf("gemma-multi_query").state_dict().items()}
    here = f"model.layers.{LAYER}."
    query = slice(16 * head, 16 * (head + 1))  # one key/value head for all
    norm = 1 + weights[here + "post_attention_layernorm.weight"]
    return weights["lm_head.weight"], {
        "OV": weights[here + "self_attn.v_proj.weight"].T
        @ weights[here + "self_attn.o_proj.weight"][:, query].T,
        "w_in": weights[here + "mlp.up_proj.weight"] * norm,
        "w_out": weights[here + "mlp.down_proj.weight"].T,
    }


FAMILIES = {
    "gpt2-base": gpt2_matrices,
    "llama-grouped": llama_matrices,
    "gemma-multi_query": gemma_matrices,
}


@pytest.mark.parametrize("head", range(4))
@pytest.mark.parametrize("name", FAMILIES)
def test_equals_the_svd_of_the_dense_matrix_up_to_sign(name, head):
    unembedding, matrices = FAMILIES[name](head)
    interpreter = SVDInterpreter(hooked(name))
    for vector_type, matrix in matrices.items():
        heads = {"head_index": head} if vector_type == "OV" else {}
        scores = interpreter.get_singular_vectors(vector_type, LAYER, 5, **heads)
        assert scores.shape == (96, 1, 5)
        expected = unembedding @ torch.linalg.svd(matrix).Vh[:5].T
        signs = (scores[:, 0] * expected).sum(0).sign()
        torch.testing.assert_close(
            scores[:, 0].double() * signs, expected, rtol=1e-4, atol=1e-4, msg=vector_type
        )


def test_a_norm_that_does_not_stand_before_the_mlp_is_left_out():
    model = hooked("opt-post_norm")
    scores = SVDInterpreter(model).get_singular_vectors("w_in", 0, 3)[:, 0]
    plain = torch.linalg.svd(model.blocks[0].mlp.W_in.detach().T).Vh[:3] @ model.W_U.detach()
    torch.testing.assert_close(scores.abs(), plain.T.abs(), rtol=1e-4, atol=1e-4)


def test_half_precision_is_decomposed_in_float32():
    [tiny] = [t for t in tinies("llama") if t.variant == "grouped"]
    model = hookedlm.load(tiny.build(torch.bfloat16))
    for vector_type, heads in [("OV", {"head_index": 3}), ("w_in", {}), ("w_out", {})]:
        scores = SVDInterpreter(model).get_singular_vectors(vector_type, 0, 2, **heads)
        wide = hookedlm.load(tiny.build(torch.bfloat16).float())
        same = SVDInterpreter(wide).get_singular_vectors(vector_type, 0, 2, **heads)
        assert scores.dtype == torch.float32
        torch.testing.assert_close(scores.abs(), same.abs(), rtol=1e-3, atol=1e-3)


def test_top_tokens_stand_at_the_two_ends():
    model = hooked("gpt2-base")
    interpreter = SVDInterpreter(model)
    scores = interpreter.get_singular_vectors("w_out", 0, 2)
    top = interpreter.get_top_tokens("w_out", 0, 2, k=4)
    bottom = interpreter.get_top_tokens("w_out", 0, 2, k=4, largest=False)
    for i in range(2):
        order = scores[:, 0, i].argsort(descending=True).tolist()
        assert top[i] == [model.to_single_str_token(token) for token in order[:4]]
        assert bottom[i] == [model.to_single_str_token(token) for token in order[::-1][:4]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("ov", 0), "'OV', 'w_in', 'w_gate', 'w_out'"),
        (("w_in", 3), "layers are 0 to 2"),
        (("w_in", -1), "layers are 0 to 2"),
        (("OV", 0), "needs head_index, 0 to 3"),
        (("OV", 0, 5, 4), "heads are 0 to 3"),
        (("OV", 0, 9, 0), "1 to 8"),  # d_head directions
        (("w_out", 0, 33), "1 to 32"),
        (("w_out", 0, 0), "1 to 32"),
        (("w_out", 0, 5, 0), "only 'OV' has heads"),
    ],
)
def test_what_is_out_of_range_is_refused_with_the_range(arguments, message):
    with pytest.raises(InputError, match=message):
        SVDInterpreter(hooked("gpt2-base")).get_singular_vectors(*arguments)


def test_parts_without_such_a_matrix_say_so():
    with pytest.raises(WeightError, match="mixture of experts"):
        SVDInterpreter(hooked("mixtral-base")).get_singular_vectors("w_in", 0)
    with pytest.raises(WeightError, match="not gated"):
        SVDInterpreter(hooked("gpt2-base")).get_singular_vectors("w_gate", 0)
    toy = hookedlm.HookedTransformer(
        dict(n_layers=1, d_model=8, n_ctx=4, d_head=4, d_vocab=5, attn_only=True, device="cpu")
    )
    with pytest.raises(WeightError, match="no w_out"):
        SVDInterpreter(toy).get_singular_vectors("w_out", 0)
