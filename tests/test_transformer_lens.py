"""Code written for TransformerLens 2.x, its imports unchanged."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import pickle
import subprocess
import sys
import types
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

import hookedlm
from hookedlm import HookedTransformer, HookedTransformerConfig
from hookedlm.errors import ConversionError, InputError
from hookedlm.install import Absent
from hookedlm.transformer_lens.paths import ABSENT, MODULES

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def clean_modules():
    """Whatever a test does to sys.modules is undone."""
    before = dict(sys.modules)
    yield
    for name in [name for name in sys.modules if name not in before]:
        if not name.startswith("hookedlm"):
            del sys.modules[name]
    sys.modules.update(before)
    for finder in sys.meta_path:
        if isinstance(finder, Absent):
            finder.packages.intersection_update({"hookedlm.transformer_lens"})


@pytest.fixture
def installed(clean_modules):
    """transformer_lens means hookedlm."""
    return hookedlm.install_as("transformer_lens")


@pytest.fixture(scope="module")
def loaded():
    return hookedlm.HookedTransformer.from_pretrained("demo", device="cpu")


@pytest.fixture
def model(loaded):
    """The demo model through the classic door, without hooks before and after."""
    yield loaded
    loaded.reset_hooks(including_permanent=True)


# Installing ---------------------------------------------------------------------------------------


def test_a_name_is_the_class_and_the_module_of_that_name_is_there_too(installed):
    import transformer_lens
    import transformer_lens.HookedTransformer
    from transformer_lens.HookedTransformer import (
        DTYPE_FROM_STRING,
        HookedTransformer,
        Loss,
        Output,
    )

    assert transformer_lens.HookedTransformer is HookedTransformer is hookedlm.HookedTransformer
    assert DTYPE_FROM_STRING["bf16"] is torch.bfloat16
    assert DTYPE_FROM_STRING["fp32"] is torch.float32
    assert Output is hookedlm.model.Output
    assert Loss is hookedlm.model.Loss
    module = importlib.import_module("transformer_lens.HookedTransformer")
    assert module.HookedTransformer is HookedTransformer
    assert module is not HookedTransformer
    assert transformer_lens.HookedTransformer is HookedTransformer


@pytest.mark.parametrize("path", MODULES)
def test_a_path_imports_the_same_module_by_both_names(installed, path):
    module = importlib.import_module(f"transformer_lens.{path}")
    assert isinstance(module, types.ModuleType)
    assert module is importlib.import_module(f"hookedlm.transformer_lens.{path}")
    assert importlib.util.find_spec(f"transformer_lens.{path}") is not None


def test_classes_are_the_librarys_own(installed):
    from transformer_lens import ActivationCache, EasyTransformer, FactoredMatrix
    from transformer_lens.ActivationCache import ActivationCache as from_module
    from transformer_lens.hook_points import HookedRootModule, HookPoint

    assert ActivationCache is from_module is hookedlm.ActivationCache
    assert EasyTransformer is hookedlm.HookedTransformer
    assert FactoredMatrix is hookedlm.FactoredMatrix
    assert (HookPoint, HookedRootModule) == (hookedlm.HookPoint, hookedlm.HookedRootModule)


def test_modules_that_are_one_there_are_one_here(installed):
    from transformer_lens import loading, loading_from_pretrained, patching, utils

    assert loading is loading_from_pretrained
    assert patching is hookedlm.patching
    assert utils is importlib.import_module("hookedlm.utils")


IN_ANOTHER_MODULE = """
import transformer_lens.utils as utils
from transformer_lens import HookedTransformer
from transformer_lens.components import MLP
"""
IN_A_PROCESS = """
import sys
import hookedlm
hookedlm.install_as("transformer_lens")
import project
assert project.HookedTransformer is hookedlm.HookedTransformer
assert project.utils.get_act_name("k", 6) == "blocks.6.attn.hook_k"
assert not {"datasets", "pandas", "plotly", "wandb"} & sys.modules.keys()
"""


def test_other_modules_of_the_process_import_it(tmp_path):
    (tmp_path / "project.py").write_text(IN_ANOTHER_MODULE)
    (tmp_path / "main.py").write_text(IN_A_PROCESS)
    done = subprocess.run(
        [sys.executable, "-W", "error", str(tmp_path / "main.py")],
        env={"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_one_that_is_imported_already_is_replaced_with_a_warning(clean_modules):
    real, below = types.ModuleType("transformer_lens"), types.ModuleType("transformer_lens.other")
    sys.modules["transformer_lens"], sys.modules["transformer_lens.other"] = real, below
    with pytest.warns(UserWarning, match="imported before and is replaced"):
        hookedlm.install_as("transformer_lens")
    import transformer_lens

    assert transformer_lens is not real
    assert "transformer_lens.other" not in sys.modules


def test_installing_again_changes_nothing(installed):
    before = dict(sys.modules)
    assert hookedlm.install_as("transformer_lens") is installed
    assert sys.modules == before


def test_another_name(clean_modules):
    tl = hookedlm.install_as("tl")
    from tl.hook_points import HookPoint

    assert tl.HookedTransformer is hookedlm.HookedTransformer
    assert HookPoint is hookedlm.HookPoint


@pytest.mark.parametrize("name", ["a.b", "class", "", "two words", "torch", "hookedlm", "colorsys"])
def test_a_name_that_can_not_be_had(clean_modules, name):
    before = dict(sys.modules)
    with pytest.raises(InputError, match="install_as"):
        hookedlm.install_as(name)
    assert sys.modules.keys() == before.keys()


@pytest.mark.parametrize("path", ABSENT)
def test_what_is_not_here_says_what_is(installed, path):
    module, _, name = f"transformer_lens.{path}".rpartition(".")
    with pytest.raises(ImportError) as from_import:
        exec(f"from {module} import {name}", {})
    with pytest.raises(ImportError) as plain_import:
        importlib.import_module(f"{module}.{name}")
    with pytest.raises(AttributeError) as attribute:
        getattr(importlib.import_module(module), name)
    for raised in (from_import, plain_import, attribute):
        assert ABSENT[path] in str(raised.value)
    assert name not in vars(importlib.import_module(module))


def test_a_name_that_never_was_is_an_ordinary_error(installed):
    with pytest.raises(ImportError, match="cannot import name 'nonsense'"):
        exec("from transformer_lens.hook_points import nonsense", {})
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("transformer_lens.nonsense")


def test_a_config_pickled_by_transformer_lens_loads(installed, monkeypatch):
    from transformer_lens import HookedTransformerConfig

    cfg = HookedTransformerConfig(
        n_layers=1, d_model=8, n_ctx=8, d_head=4, d_vocab=9, act_fn="relu"
    )
    path = "transformer_lens.HookedTransformerConfig"
    monkeypatch.setattr(HookedTransformerConfig, "__module__", path)
    pickled = pickle.dumps(cfg, protocol=2)
    monkeypatch.undo()
    assert path.encode() in pickled
    again = pickle.loads(pickled)
    assert type(again) is hookedlm.HookedTransformerConfig
    assert again.to_dict() == cfg.to_dict()
    assert hookedlm.HookedTransformer(again)(torch.arange(4)[None]).shape == (1, 4, 9)


# Changing the model -------------------------------------------------------------------------------


def test_a_subclass_with_another_head(installed, model):
    from transformer_lens import HookedTransformer
    from transformer_lens.hook_points import HookPoint

    class WithValueHead(HookedTransformer):
        def __init__(self, cfg, *args, **kwargs):
            super().__init__(cfg, *args, **kwargs)
            self.value_head = nn.Linear(self.cfg.d_model, 1)
            self.hook_value = HookPoint()
            self.setup()

        def forward(self, tokens, **kwargs):
            stream = super().forward(tokens, stop_at_layer=self.cfg.n_layers, **kwargs)
            value = self.hook_value(self.value_head(self.ln_final(stream)))
            return self.unembed(self.ln_final(stream)), value.squeeze(-1)

    tokens = model.to_tokens("The capital of Spain is")
    with_head = WithValueHead.from_pretrained("demo", device="cpu")
    assert isinstance(with_head, HookedTransformer)
    (logits, value), cache = with_head.run_with_cache(tokens, names_filter="hook_value")
    torch.testing.assert_close(logits, model(tokens))
    assert torch.equal(cache["hook_value"].squeeze(-1), value)
    value.sum().backward()
    assert with_head.value_head.weight.grad is not None


def test_a_subclass_of_a_toy_model(installed):
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    class Doubled(HookedTransformer):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs) * 2

    cfg = HookedTransformerConfig(
        n_layers=1, d_model=8, n_ctx=8, d_head=4, d_vocab=9, act_fn="relu", seed=0
    )
    tokens = torch.arange(5)[None]
    assert torch.equal(Doubled(cfg)(tokens), HookedTransformer(cfg)(tokens) * 2)


def test_replacing_the_mlp_and_the_unembedding(installed, model):
    from transformer_lens.hook_points import HookPoint

    class Zero(nn.Module):
        def __init__(self):
            super().__init__()
            self.hook_in = HookPoint()

        def forward(self, x):
            return torch.zeros_like(self.hook_in(x))

    changed = hookedlm.HookedTransformer.from_pretrained("demo", device="cpu")
    changed.blocks[0].mlp = Zero()
    changed.unembed = nn.Linear(changed.cfg.d_model, 2, bias=False)
    changed.setup()
    tokens = changed.to_tokens("The capital of Spain is")
    seen = []
    logits, cache = changed.run_with_cache(tokens)
    changed.run_with_hooks(
        tokens, fwd_hooks=[("blocks.0.mlp.hook_in", lambda x, hook: seen.append(hook.name))]
    )
    assert seen == ["blocks.0.mlp.hook_in"]
    assert logits.shape == (*tokens.shape, 2)
    assert torch.equal(cache["resid_post", 0], cache["resid_mid", 0])
    torch.testing.assert_close(cache["blocks.0.mlp.hook_in"], cache["normalized", 0, "ln2"])
    _, whole = model.run_with_cache(tokens)
    torch.testing.assert_close(cache["resid_mid", 0], whole["resid_mid", 0])
    assert not torch.allclose(cache["resid_post", 1], whole["resid_post", 1])
    logits.sum().backward()


def test_replacing_a_norm(installed):
    changed = hookedlm.HookedTransformer.from_pretrained("demo", device="cpu")
    for block in changed.blocks:
        block.ln1 = block.ln2 = nn.Identity()
    changed.ln_final = nn.Identity()
    changed.setup()
    _, cache = changed.run_with_cache(changed.to_tokens("The capital of Spain is"))
    assert not any("ln" in name for name in cache)
    assert "blocks.3.hook_resid_post" in cache


def test_a_new_hook_point_in_a_block(installed):
    from transformer_lens.hook_points import HookPoint

    model = hookedlm.HookedTransformer.from_pretrained("demo", device="cpu")
    block = model.blocks[1]
    block.hook_extra = HookPoint()
    inner = block.mlp.forward
    block.mlp.forward = lambda x: block.hook_extra(inner(x))
    model.setup()
    tokens = model.to_tokens("The capital of Spain is")
    _, cache = model.run_with_cache(tokens)
    assert model.hook_dict["blocks.1.hook_extra"] is block.hook_extra
    torch.testing.assert_close(cache["blocks.1.hook_extra"], cache["mlp_out", 1])


def test_flags_set_on_the_config_after_loading(installed, model):
    tokens = model.to_tokens("The capital of Spain is")
    model.cfg.use_attn_result = True
    model.cfg.use_split_qkv_input = True
    try:
        _, cache = model.run_with_cache(tokens)
    finally:
        model.cfg.use_attn_result = model.cfg.use_split_qkv_input = False
    assert "blocks.2.attn.hook_result" in list(cache)
    assert cache["q_input", 2].shape == (*tokens.shape, model.cfg.n_heads, model.cfg.d_model)
    whole = cache["result", 2].sum(2) + model.b_O[2]
    torch.testing.assert_close(whole, cache["attn_out", 2], atol=1e-4, rtol=1e-4)


def test_permanent_hooks_stay(installed, model):
    from transformer_lens.utils import get_act_name

    tokens = model.to_tokens("The capital of Spain is")
    plain = model(tokens)

    def ablate(z, hook):
        z[:, :, 0] = 0
        return z

    model.add_perma_hook(get_act_name("z", 1), ablate)
    changed = model(tokens)
    assert not torch.allclose(plain, changed)
    model.reset_hooks()
    assert torch.equal(model(tokens), changed)
    model.reset_hooks(including_permanent=True)
    assert torch.equal(model(tokens), plain)


def test_a_root_module_of_ones_own(installed):
    from transformer_lens.hook_points import HookedRootModule, HookPoint

    class Toy(HookedRootModule):
        def __init__(self):
            super().__init__()
            self.square = nn.Linear(3, 3)
            self.hook_mid = HookPoint()
            self.hook_out = HookPoint()
            super().setup()

        def forward(self, x):
            return self.hook_out(self.hook_mid(self.square(x)) ** 2)

    toy = Toy()
    x = torch.randn(2, 3)
    out, cache = toy.run_with_cache(x)
    assert list(cache) == ["hook_mid", "hook_out"]
    assert torch.equal(out, cache["hook_mid"] ** 2)
    fixed = toy.run_with_hooks(x, fwd_hooks=[("hook_mid", lambda x, hook: torch.ones_like(x))])
    assert torch.equal(fixed, torch.ones(2, 3))


def test_the_embeddings_called_as_modules(installed, model):
    tokens = model.to_tokens(["The capital of Spain is", "The capital of France is"])
    _, cache = model.run_with_cache(tokens)
    assert torch.equal(model.embed(tokens) + model.pos_embed(tokens), cache["resid_pre", 0])
    assert torch.equal(model.pos_embed(tokens[:, 3:], 3), model.pos_embed(tokens)[:, 3:])


# Analyses, as notebooks write them ----------------------------------------------------------------


def test_indirect_objects(installed, model):
    import transformer_lens.patching as patching
    import transformer_lens.utils as utils

    clean = "After John and Mary went to the store, Mary gave a bottle of milk to"
    corrupted = "After John and Mary went to the store, John gave a bottle of milk to"
    tokens, corrupted_tokens = model.to_tokens(clean), model.to_tokens(corrupted)
    answers = torch.tensor([model.to_single_token(" John"), model.to_single_token(" Mary")])

    def logit_diff(logits):
        right, wrong = logits[:, -1].gather(-1, answers[None]).unbind(-1)
        return (right - wrong).mean()

    logits, cache = model.run_with_cache(tokens)
    clean_diff = logit_diff(logits)
    corrupted_diff = logit_diff(model(corrupted_tokens))
    assert clean_diff > 2
    assert corrupted_diff < -2

    direction = model.tokens_to_residual_directions(answers)
    direction = direction[0] - direction[1]

    def attributed(stack):
        scaled = cache.apply_ln_to_stack(stack, layer=-1, pos_slice=-1)
        return scaled[:, 0] @ direction

    by_layer, labels = cache.accumulated_resid(
        layer=-1, incl_mid=True, pos_slice=-1, return_labels=True
    )
    assert labels[-1] == "final_post"
    bias = model.b_U[answers[0]] - model.b_U[answers[1]]
    torch.testing.assert_close(attributed(by_layer)[-1] + bias, clean_diff, atol=1e-3, rtol=1e-4)
    parts = cache.decompose_resid(layer=-1, pos_slice=-1)
    torch.testing.assert_close(attributed(parts).sum() + bias, clean_diff, atol=1e-3, rtol=1e-4)
    heads = cache.stack_head_results(layer=-1, pos_slice=-1)
    assert attributed(heads).shape == (model.cfg.n_layers * model.cfg.n_heads,)

    def recovered(logits):
        return (logit_diff(logits) - corrupted_diff) / (clean_diff - corrupted_diff)

    patched = patching.get_act_patch_resid_pre(model, corrupted_tokens, cache, recovered)
    where = (tokens != corrupted_tokens)[0].nonzero().item()
    assert patched.shape == (model.cfg.n_layers, tokens.shape[1])
    assert patched[0, where] == pytest.approx(1, abs=1e-3)
    assert patched[0, :where].abs().max() < 1e-3

    def patch(resid, hook, pos):
        resid[:, pos] = cache[hook.name][:, pos]
        return resid

    name = utils.get_act_name("resid_pre", 2)
    by_hand = model.run_with_hooks(
        corrupted_tokens, fwd_hooks=[(name, partial(patch, pos=where))], return_type="logits"
    )
    assert patched[2, where] == pytest.approx(recovered(by_hand).item(), abs=1e-4)


def test_induction_heads_by_hooks(installed, model):
    from transformer_lens import utils
    from transformer_lens.hook_points import HookPoint

    n = 20
    first = torch.randint(100, model.cfg.d_vocab, (4, n))
    bos = torch.full((4, 1), model.tokenizer.bos_token_id)
    tokens = torch.cat([bos, first, first], dim=1)
    scores = torch.zeros(model.cfg.n_layers, model.cfg.n_heads)

    def score(pattern, hook: HookPoint):
        stripe = pattern.diagonal(dim1=-2, dim2=-1, offset=1 - n)
        scores[hook.layer()] = stripe.mean(dim=(0, -1))

    model.run_with_hooks(
        tokens, return_type=None, fwd_hooks=[(lambda name: name.endswith("pattern"), score)]
    )
    assert scores.max() > 0.3
    _, cache = model.run_with_cache(tokens, names_filter=utils.get_act_name("pattern", 2))
    stripe = cache["pattern", 2].diagonal(dim1=-2, dim2=-1, offset=1 - n)
    torch.testing.assert_close(scores[2], stripe.mean(dim=(0, -1)))


def test_a_sparse_autoencoder_in_the_stream(installed, model):
    from transformer_lens.utils import get_act_name

    class SAE(nn.Module):
        def __init__(self, d_model, d_sae):
            super().__init__()
            self.W_enc = nn.Parameter(torch.randn(d_model, d_sae) / d_model**0.5)
            self.W_dec = nn.Parameter(torch.linalg.pinv(self.W_enc.data))

        def forward(self, x):
            return (x @ self.W_enc) @ self.W_dec

    def reconstruct(resid, hook, sae):
        return sae(resid)

    tokens = model.to_tokens("The capital of Spain is")
    sae = SAE(model.cfg.d_model, 2 * model.cfg.d_model)  # as wide as this it loses nothing
    loss = model(tokens, return_type="loss")
    replaced = model.run_with_hooks(
        tokens,
        return_type="loss",
        fwd_hooks=[(get_act_name("resid_pre", 2), partial(reconstruct, sae=sae))],
    )
    torch.testing.assert_close(replaced, loss, atol=1e-3, rtol=1e-3)
    replaced.backward()
    assert sae.W_enc.grad.abs().max() > 0


def test_a_logit_lens_and_a_tuned_vector(installed, model):
    import transformer_lens.utils as utils

    tokens = model.to_tokens(["The capital of Spain is", "The capital of France is"])
    logits, cache = model.run_with_cache(tokens)
    lens = model.unembed(model.ln_final(cache["resid_post", -1]))
    torch.testing.assert_close(lens, logits)
    difference = (cache["resid_pre", 2][1] - cache["resid_pre", 2][0])[-1]
    with model.hooks([(utils.get_act_name("resid_pre", 2), lambda x, hook: x + difference)]):
        steered = model(tokens[:1])
    assert steered.shape == logits[:1].shape
    assert utils.to_numpy(steered).dtype == "float32"


def test_texts_into_rows_of_tokens(installed, model):
    from transformer_lens.utils import gelu_new, lm_cross_entropy_loss, tokenize_and_concatenate

    datasets = pytest.importorskip("datasets")
    texts = datasets.Dataset.from_dict({"text": ["The capital of Spain is Madrid."] * 20})
    rows = tokenize_and_concatenate(texts, model.tokenizer, max_length=16, num_proc=1)
    tokens = torch.stack([torch.as_tensor(row["tokens"]) for row in rows])
    assert tokens.shape[1] == 16
    assert (tokens[:, 0] == model.tokenizer.bos_token_id).all()
    loss = lm_cross_entropy_loss(model(tokens), tokens)
    all_real = torch.ones_like(tokens)  # the tokenizer pads with what stands between texts
    same = model(tokens, return_type="loss", attention_mask=all_real)
    torch.testing.assert_close(loss, same)
    x = torch.linspace(-3, 3, 7)
    torch.testing.assert_close(gelu_new(x), nn.functional.gelu(x, approximate="tanh"))


def test_a_factored_circuit(installed, model):
    from transformer_lens import FactoredMatrix, HookedTransformer

    assert isinstance(model, HookedTransformer)
    circuit = FactoredMatrix(model.W_V[2, 1], model.W_O[2, 1])
    full = model.W_E @ circuit @ model.W_U
    assert isinstance(full, FactoredMatrix)
    torch.testing.assert_close(
        full[:5, :5].AB,
        (model.W_E @ model.W_V[2, 1] @ model.W_O[2, 1] @ model.W_U)[:5, :5],
        atol=1e-4,
        rtol=1e-3,
    )
    assert (model.OV[2, 1].AB - circuit.AB).abs().max() < 1e-5


def test_a_subclass_with_exactly_the_classic_arguments():
    class Mine(HookedTransformer):
        def __init__(self, cfg, tokenizer=None, move_to_device=True, default_padding_side="right"):
            super().__init__(cfg, tokenizer, move_to_device, default_padding_side)
            self.extra = torch.nn.Linear(cfg.d_model, 1)

    mine = Mine.from_pretrained("demo")
    reference = HookedTransformer.from_pretrained("demo")
    tokens = mine.to_tokens("The capital of Spain is")
    assert torch.equal(mine(tokens), reference(tokens))
    drawn = Mine(
        HookedTransformerConfig(
            n_layers=1, d_model=8, n_ctx=8, d_head=4, d_vocab=9, act_fn="relu", seed=0
        )
    )
    assert drawn.conversion is None
    assert drawn(torch.zeros(1, 8).long()).shape == (1, 8, 9)

    class Forgetful(HookedTransformer):
        def __init__(self, cfg, *args, **kwargs):
            super().__init__(dataclasses.replace(cfg), *args, **kwargs)

    with pytest.raises(ConversionError, match="another config"):
        Forgetful.from_pretrained("demo")
