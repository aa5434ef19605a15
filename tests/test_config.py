"""`HookedTransformerConfig`: names, derivations, refusals."""

from __future__ import annotations

import copy
import pickle
import random

import numpy as np
import pytest
import torch

from hookedlm.config import HookedTransformerConfig as Config
from hookedlm.errors import ConfigError

SIZES = dict(n_layers=2, d_model=32, n_ctx=16, d_head=8)
TOY = dict(**SIZES, d_vocab=50, act_fn="relu")


def config(**changes):
    return Config(**(TOY | changes))


def test_what_is_left_open_is_derived():
    cfg = config(device="cpu")
    assert (cfg.n_heads, cfg.d_mlp, cfg.d_vocab_out) == (4, 128, 50)
    assert cfg.attn_scale == pytest.approx(8**0.5)
    assert cfg.initializer_range == pytest.approx(0.8 / 32**0.5)
    assert cfg.rotary_dim is None
    assert cfg.n_params == 2 * (4 * 32 * 32 + 2 * 32 * 128)
    assert config(positional_embedding_type="rotary").rotary_dim == 8
    assert config(init_mode="xavier_normal").initializer_range == 1.0
    assert config(use_attn_scale=False).attn_scale == -1.0
    assert config(d_vocab_out=3).d_vocab_out == 3
    assert config(d_mlp=7).d_mlp == 7
    assert Config(**SIZES, d_vocab=5, attn_only=True).d_mlp is None
    assert config().device == ("cuda" if torch.cuda.is_available() else "cpu")


def test_parameters_are_counted():
    attention = 4 * 32 * 32
    assert Config(**SIZES, attn_only=True).n_params == 2 * attention
    assert config(gated_mlp=True).n_params == 2 * (attention + 3 * 32 * 128)
    moe = config(gated_mlp=True, num_experts=5, experts_per_token=2)
    assert moe.n_params == 2 * (attention + 5 * (3 * 32 * 128 + 32))


@pytest.mark.parametrize(
    ("given", "dtype"),
    [
        ("float32", torch.float32),
        ("bfloat16", torch.bfloat16),
        ("torch.float16", torch.float16),
        (torch.float64, torch.float64),
    ],
)
def test_dtypes_may_be_words(given, dtype):
    assert config(dtype=given).dtype == dtype


def test_zero_layers_and_heads_of_any_width_are_fine():
    assert config(n_layers=0).n_params == 0
    assert config(n_heads=3, d_head=10).n_heads == 3


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (dict(act_fn=None), "act_fn is missing.*attn_only"),
        (dict(act_fn="gelu_ne"), "gelu_new"),
        (dict(d_head=7), "not a multiple of d_head=7"),
        (dict(normalization_type="ln"), "Did you mean 'LN'"),
        (dict(positional_embedding_type="rotory"), "Did you mean 'rotary'"),
        (dict(attention_dir="casual"), "Did you mean 'causal'"),
        (dict(init_mode="gpt"), "Did you mean 'gpt2'"),
        (dict(attn_types=["global"]), "one for each of the 2 layers"),
        (dict(use_local_attn=True), "window_size"),
        (dict(use_local_attn=True, window_size=2, attn_types=["local", "sliding"]), "global"),
        (dict(n_key_value_heads=3), r"these do: \[1, 2, 4\]"),
        (dict(n_key_value_heads=0), "does not divide"),
        (dict(positional_embedding_type="rotary", rotary_dim=3), "even"),
        (dict(positional_embedding_type="rotary", rotary_dim=10), "at most d_head=8"),
        (dict(num_experts=2), "experts_per_token"),
        (dict(num_experts=2, experts_per_token=3), "1 to num_experts=2"),
        (dict(act_fn="solu_ln", gated_mlp=True), "use 'solu'"),
        (dict(d_vocab=0), "positive"),
        (dict(d_model=0), "positive"),
        (dict(n_layers=-1), "0 layers or more"),
        (dict(dtype="float31"), "float32"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused(changes, said):
    with pytest.raises(ConfigError, match=said):
        config(**changes)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (dict(d_vocab=-1), "tokenizer"),
        (dict(tie_word_embeddings=True, d_vocab_out=3), "the two matrices are one"),
        (dict(positional_embedding_type="relative_positional_bias"), "expected one of"),
        (dict(load_in_4bit=True), "quantised"),
        (dict(act_fn="quick_gelu", original_architecture="SomeForCausalLM"), "act_fn"),
    ],
)
def test_what_can_wait_is_refused_when_building(changes, said):
    cfg = config(**changes)
    with pytest.raises(ConfigError, match=said):
        cfg.check_buildable()


def test_a_loaded_model_may_have_parts_without_a_name():
    cfg = config(act_fn="quick_gelu", original_architecture="X", positional_embedding_type="opaque")
    assert cfg.act_fn == "quick_gelu"
    assert config(act_fn=None, original_architecture="X").act_fn is None


def test_dictionaries():
    cfg = Config.from_dict(TOY)
    assert Config.from_dict(cfg.to_dict()) == cfg
    assert Config.unwrap(cfg) is cfg
    assert Config.unwrap(TOY) == cfg
    given = cfg.to_dict()
    given["d_model"] = 5
    assert cfg.d_model == 32
    with pytest.raises(ConfigError, match=r"no field 'n_layer'.*'n_layers'"):
        Config.from_dict({**TOY, "n_layer": 2})
    with pytest.raises(ConfigError, match="missing: n_ctx, d_head"):
        Config.from_dict({"n_layers": 1, "d_model": 4})


def test_copies_and_pickles():
    cfg = config(seed=3)
    assert copy.deepcopy(cfg) == cfg
    assert pickle.loads(pickle.dumps(cfg)) == cfg


def test_a_seed_leaves_the_global_generators_alone():
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    cfg = config(seed=5)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (np.random.get_state()[1].tolist(), random.getstate())

    def drawn():
        cfg.set_seed_everywhere(5)
        return torch.rand(1).item(), np.random.rand(), random.random()

    assert drawn() == drawn()


def test_it_shows_what_is_not_default():
    shown = repr(config(device="cpu"))
    assert "d_model=32" in shown
    assert "act_fn='relu'" in shown
    assert "window_size" not in shown
    assert eval(shown, {"HookedTransformerConfig": Config}) == config(device="cpu")


def test_layer_norm_activations():
    assert config(act_fn="solu_ln").is_layer_norm_activation()
    assert not config(act_fn="solu").is_layer_norm_activation()
