"""Pretrained models by name: configs without weights, weights, checkpoints."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import hf, hooked
from tiny import TINIES, quiet_transformers
from transformers import AutoConfig

import hookedlm
from hookedlm import HookedTransformer, checkpoints, model_configs
from hookedlm.aliases import ALIASES
from hookedlm.errors import ConversionError, InputError, LoadError
from hookedlm.loading import DEMO

FILLED_LATER = {"tokenizer_name", "tokenizer_prepends_bos", "default_prepend_bos", "device"}
"""Fields that say how a model was loaded, not what it is."""

OPAQUE_BY_TRIAL = {"bloom-post_norm_residual", "bloom-slow_but_exact"}
"""Models whose blocks turn out opaque when they run, so that their activation is not known."""


def config_of(tiny):
    with quiet_transformers():
        return AutoConfig.for_model(tiny.model_type, **copy.deepcopy(tiny.config))


@pytest.mark.parametrize("tiny", TINIES, ids=lambda tiny: tiny.id)
def test_a_config_without_weights_is_the_loaded_models(tiny):
    got = model_configs.get_pretrained_model_config("tiny", hf_cfg=config_of(tiny)).to_dict()
    expected = hooked(tiny.id).cfg.to_dict() | {"model_name": "tiny"}
    wrong = {name for name in got if got[name] != expected[name]} - FILLED_LATER
    assert wrong == ({"act_fn"} if tiny.id in OPAQUE_BY_TRIAL else set())


def test_a_config_from_a_folder_by_name_and_as_a_dictionary():
    expected = hookedlm.load_demo(device="cpu").cfg
    for name in ("demo", str(DEMO)):
        got = model_configs.get_pretrained_model_config(name)
        assert (got.n_layers, got.d_model, got.act_fn) == (4, 128, "gelu_new")
        assert got.d_vocab == expected.d_vocab
    tiny = hf("llama-grouped").config
    got = model_configs.get_pretrained_model_config("x", hf_cfg=tiny.to_dict())
    assert got.normalization_type == "RMS"
    assert got.n_key_value_heads == hooked("llama-grouped").cfg.n_key_value_heads


def test_the_arguments_of_a_config():
    config = hf("gpt2-base").config
    got = model_configs.get_pretrained_model_config(
        "x",
        hf_cfg=config,
        fold_ln=True,
        default_prepend_bos=False,
        dtype=torch.bfloat16,
        first_n_layers=1,
        n_ctx=7,
        device="cpu",
    )
    assert (got.normalization_type, got.default_prepend_bos) == ("LNPre", False)
    assert (got.dtype, got.n_layers, got.n_ctx, got.device) == (torch.bfloat16, 1, 7, "cpu")
    assert config.num_hidden_layers == 3, "the caller's config stays"


def test_a_config_builds_a_model_of_the_same_weights():
    cfg = model_configs.get_pretrained_model_config("demo", device="cpu")
    cfg.init_weights = True
    toy = HookedTransformer(cfg)
    weights = model_configs.get_pretrained_state_dict("demo", cfg)
    toy.load_and_process_state_dict(
        weights, fold_ln=False, center_writing_weights=False, center_unembed=False,
        fold_value_biases=False,
    )  # fmt: skip
    tokens = torch.arange(5, 15)[None]
    torch.testing.assert_close(toy(tokens), hookedlm.load_demo(device="cpu")(tokens))


def test_sizes_only():
    basic = model_configs.get_basic_config("demo")
    assert (basic.d_model, basic.n_layers, basic.n_heads, basic.d_mlp) == (128, 4, 4, 512)
    n_params = model_configs.get_num_params_of_pretrained("demo")
    model = hookedlm.load_demo(device="cpu")
    names = ("W_Q", "W_K", "W_V", "W_O", "W_in", "W_out")
    assert n_params == sum(p.numel() for n, p in model.named_parameters() if n.endswith(names))
    assert model_configs.convert_hf_model_config("demo")["d_head"] == 32


def test_weights_are_copies():
    module = hf("llama-grouped")
    weights = model_configs.convert_weights(module)
    own = hooked("llama-grouped").state_dict()
    assert weights.keys() == own.keys()
    assert all(torch.equal(weights[name], own[name]) for name in own)
    weights["embed.W_E"].zero_()
    assert own["embed.W_E"].any()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gpt2-small", "gpt2"),
        ("PYTHIA-70M", "EleutherAI/pythia-70m"),
        ("gpt2", "gpt2"),
        ("someone/something", "someone/something"),
        ("demo", "demo"),
    ],
)
def test_names(name, expected):
    assert model_configs.get_official_model_name(name) == expected


def test_tables_of_names():
    assert set(model_configs.OFFICIAL_MODEL_NAMES) == set(ALIASES.values())
    for alias in model_configs.DEFAULT_MODEL_ALIASES:
        assert ALIASES[alias] in model_configs.OFFICIAL_MODEL_NAMES
    known = [alias for aliases in model_configs.MODEL_ALIASES.values() for alias in aliases]
    assert sorted(known) == sorted(ALIASES)
    mine = model_configs.make_model_alias_map()
    mine.clear()
    assert ALIASES


def test_checkpoints_of_pythia():
    steps, kind = checkpoints.get_checkpoint_labels("pythia-70m")
    assert (len(steps), kind, steps[-1]) == (154, "step", 143_000)
    config = hf("gpt_neox-parallel").config
    cfg = model_configs.get_pretrained_model_config("pythia-70m", hf_cfg=config, checkpoint_index=3)
    assert (cfg.from_checkpoint, cfg.checkpoint_value, cfg.checkpoint_label_type) == (
        True, 4, "step",
    )  # fmt: skip
    cfg = model_configs.get_pretrained_model_config(
        "pythia-70m", hf_cfg=config, checkpoint_value=1000
    )
    assert steps[cfg.checkpoint_index] == 1000


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: model_configs.get_pretrained_model_config("gpt2"), LoadError, "gpt2"),
        (lambda: model_configs.get_pretrained_model_config("x", {}), LoadError, "model_type"),
        (lambda: checkpoints.get_checkpoint_labels("gpt2"), LoadError, "checkpoints of 'gpt2'"),
        (
            lambda: model_configs.get_pretrained_model_config(
                "x", {"model_type": "vit", "hidden_size": 8}
            ),
            ConversionError,
            "ViTConfig",
        ),
        (
            lambda: model_configs.get_pretrained_model_config(
                "pythia-70m", hf("gpt2-base").config, checkpoint_index=999
            ),
            InputError,
            "checkpoint_index=999",
        ),
        (
            lambda: model_configs.get_pretrained_model_config(
                "pythia-70m", hf("gpt2-base").config, checkpoint_value=17
            ),
            InputError,
            "checkpoint_value=17",
        ),
        (
            lambda: model_configs.get_pretrained_model_config(
                "x", hf("gpt2-base").config, first_n_layers=99
            ),
            LoadError,
            "first_n_layers=99",
        ),
    ],
)
def test_what_can_not_be_known_is_said(call, error, says):
    with pytest.raises(error, match=says):
        call()
