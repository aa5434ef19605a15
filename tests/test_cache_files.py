"""Caches as a whole: how large they are (before and after), rows, joining, saving and loading."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import hooked
from safetensors.torch import load_file, save_file
from tiny import one_per_family, tinies

import hookedlm
from hookedlm import ActivationCache, HookedTransformer
from hookedlm.errors import CacheFileError, CacheKeyError, InputError

TEXTS = ["the cat sat on a mat", "the dog ran home with Mary"]


@pytest.fixture
def tokens(model) -> torch.Tensor:
    return model.to_tokens(TEXTS)


# Sizes --------------------------------------------------------------------------------------------

ASKED = [
    {},
    {"names_filter": "blocks.*.hook_resid_post"},
    {"names_filter": ["hook_embed", "blocks.1.attn.hook_pattern", "ln_final.hook_scale"]},
    {"names_filter": "*hook_result"},
    {"dtype": torch.float16},
    {"pos_slice": -1},
    {"pos_slice": (1, 3), "dtype": torch.bfloat16},
    {"names_filter": "*attn_scores", "pos_slice": [0, 2]},
]


@pytest.mark.parametrize("asked", ASKED, ids=str)
@pytest.mark.parametrize("shape", [(1, 7), (4, 9), (1, 1)])
@pytest.mark.parametrize("family", ["gpt2", "llama", "mixtral", "gpt_neox"])
def test_the_size_is_known_before_the_run(family, shape, asked):
    model = hooked(tinies(family)[0].id)
    if shape == (1, 1) and asked.get("pos_slice") not in (None, -1):
        pytest.skip("no such positions")
    tokens = torch.randint(3, 96, shape)
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens, **asked)
    assert model.cache_size(tokens, **asked) == cache.nbytes


@pytest.mark.parametrize("tiny", one_per_family(), ids=lambda tiny: tiny.id)
def test_the_size_of_everything_on_every_family(tiny):
    model = hookedlm.load(tiny.build())
    tokens = torch.randint(3, 96, (2, 8))
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens)
    assert model.cache_size(tokens) == cache.nbytes


def test_the_size_of_padded_texts(model):
    texts = [TEXTS[0], "the cat"]
    with torch.no_grad():
        _, cache = model.run_with_cache(texts)
    assert model.cache_size(texts) == cache.nbytes


def test_bytes_count_every_tensor_once(model, tokens):
    _, cache = model.run_with_cache(tokens, names_filter=["hook_embed", "hook_pos_embed"])
    assert cache.nbytes == cache["embed"].nbytes + cache["pos_embed"][:1].nbytes
    shared = ActivationCache({"a": cache["embed"], "b": cache["embed"]}, model)
    assert shared.nbytes == cache["embed"].nbytes
    _, cache = model.run_with_cache(tokens)
    before = cache.nbytes
    pattern = cache["pattern", 0]  # computed, and kept from now on
    assert cache.nbytes == before + pattern.nbytes


# Rows ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [0, -1, (1,), (0, 2), [1], torch.tensor([1, 0])])
def test_rows_of_a_cache(model, tokens, rows):
    _, cache = model.run_with_cache(tokens)
    some = cache.apply_slice_to_batch_dim(rows)
    assert cache.has_batch_dim
    assert some.has_batch_dim == (not isinstance(rows, int))
    index = rows if isinstance(rows, int) else (
        list(range(2))[slice(*rows)] if isinstance(rows, tuple) else torch.as_tensor(rows).tolist()
    )  # fmt: skip
    for name in cache:
        assert torch.equal(some[name], cache[name][index]), name
    assert torch.equal(
        some.decompose_resid(apply_ln=True), cache.decompose_resid(apply_ln=True)[:, index]
    )


def test_rows_of_a_cache_without_rows(model, tokens):
    _, cache = model.run_with_cache(tokens[:1], remove_batch_dim=True)
    with pytest.raises(InputError, match="no batch axis"):
        cache.apply_slice_to_batch_dim(0)


def test_caches_joined_are_the_cache_of_all_rows(model, tokens):
    more = tokens.flip(0)
    _, together = model.run_with_cache(torch.cat([tokens, more, tokens[:1]]))
    caches = [model.run_with_cache(rows)[1] for rows in (tokens, more)]
    caches.append(model.run_with_cache(tokens[:1], remove_batch_dim=True)[1])
    joined = ActivationCache.cat(caches)
    assert list(joined) == list(together)
    assert joined.has_batch_dim
    assert "pattern" not in " ".join(joined.cache_dict.recorded())  # still computed when asked for
    for name in together:
        torch.testing.assert_close(joined[name], together[name], rtol=1e-5, atol=1e-6)


def test_caches_that_do_not_fit_together(model, tokens):
    _, cache = model.run_with_cache(tokens)
    _, short = model.run_with_cache(tokens[:, :3])
    _, few = model.run_with_cache(tokens, names_filter="hook_embed")
    _, other = hooked(tinies("llama")[0].id).run_with_cache(tokens)
    for second, says in ((short, "equal length"), (few, "different activations"), (other, "model")):
        with pytest.raises(InputError, match=says):
            ActivationCache.cat([cache, second])
    with pytest.raises(InputError, match="at least one"):
        ActivationCache.cat([])


def test_toggle_autodiff_is_torchs_switch(model, tokens):
    _, cache = model.run_with_cache(tokens)
    try:
        cache.toggle_autodiff(mode=False)
        assert not torch.is_grad_enabled()
        cache.toggle_autodiff(mode=True)
        assert torch.is_grad_enabled()
        cache.toggle_autodiff()
        assert not torch.is_grad_enabled()
    finally:
        torch.set_grad_enabled(True)


# Files --------------------------------------------------------------------------------------------


@pytest.fixture
def saved(model, tokens, tmp_path) -> tuple[ActivationCache, Path]:
    _, cache = model.run_with_cache(tokens)
    path = tmp_path / "cache.safetensors"
    cache.save(path)
    return cache, path


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "mixtral"])
@pytest.mark.parametrize("batched", [True, False])
def test_what_is_saved_comes_back(family, batched, tokens, tmp_path):
    model = hooked(tinies(family)[0].id)
    rows = tokens if batched else tokens[:1]
    _, cache = model.run_with_cache(rows, remove_batch_dim=not batched)
    cache.save(tmp_path / "x")
    again = ActivationCache.load(tmp_path / "x", model)
    assert list(again) == list(cache)
    assert again.has_batch_dim == batched
    for name in cache:
        assert torch.equal(again[name], cache[name]), name
        assert again[name].dtype == cache[name].dtype
    assert torch.equal(again.decompose_resid(), cache.decompose_resid())


def test_some_activations_and_gradients(model, tokens, tmp_path):
    _, cache = model.run_with_cache(tokens, return_type="loss", incl_bwd=True)
    cache.save(tmp_path / "x", names="*resid_post")
    again = ActivationCache.load(tmp_path / "x", model)
    assert sorted(again) == sorted(
        f"blocks.{i}.hook_resid_post{end}" for i in range(3) for end in ("", "_grad")
    )
    cache.save(tmp_path / "x", names=["blocks.1.attn.hook_result"])
    assert torch.equal(ActivationCache.load(tmp_path / "x", model)["result", 1], cache["result", 1])
    _, few = model.run_with_cache(tokens, names_filter="hook_embed")
    with pytest.raises(CacheKeyError, match="not recorded"):
        few.save(tmp_path / "y", names=["hook_embed", "blocks.0.attn.hook_q"])
    assert not (tmp_path / "y").exists()


def test_a_file_says_what_is_in_it(saved):
    _, path = saved
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        described = json.loads(file.metadata()["hookedlm"])
    assert described["axes"]["blocks.0.attn.hook_pattern"] == ["batch", "head", "pos", "key_pos"]
    assert described["model"]["n_layers"] == 3


def test_every_flipped_byte_is_noticed(saved, model):
    """Header, names, numbers: anywhere in the file."""
    _, path = saved
    whole = path.read_bytes()
    places = [3, 200, 2000, len(whole) // 2, len(whole) - 1]
    for place in places:
        broken = bytearray(whole)
        broken[place] ^= 0x15
        path.write_bytes(broken)
        with pytest.raises(CacheFileError):
            ActivationCache.load(path, model)
    for length in (0, 5, 1000, len(whole) - 8):
        path.write_bytes(whole[:length])
        with pytest.raises(CacheFileError):
            ActivationCache.load(path, model)


def test_files_of_other_kinds(model, tmp_path):
    save_file({"x": torch.ones(2)}, tmp_path / "other")
    for name, says in (("other", "not of"), ("missing", "no such file")):
        with pytest.raises(CacheFileError, match=says):
            ActivationCache.load(tmp_path / name, model)


def test_files_of_other_models(saved, model):
    cache, path = saved
    with pytest.raises(CacheFileError, match="not of this model"):
        ActivationCache.load(path, hooked(tinies("llama")[0].id))
    folded = HookedTransformer.from_pretrained("gpt2", hf_model=hooked_again())
    with pytest.raises(CacheFileError, match="normalization_type is 'LN'"):
        ActivationCache.load(path, folded)
    trained = hookedlm.load(hooked_again())
    ActivationCache.load(path, trained)  # the same weights
    with torch.no_grad():
        trained.blocks[1].mlp.W_out += 0.1
    with pytest.raises(CacheFileError, match="weights differ"):
        ActivationCache.load(path, trained)
    again = ActivationCache.load(path, trained, check_weights=False)
    assert torch.equal(again["embed"], cache["embed"])


def hooked_again():
    return tinies("gpt2")[0].build()


def test_an_interrupted_save_leaves_the_old_file(saved, model, tokens, monkeypatch):
    _, path = saved
    before = path.read_bytes()

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("hookedlm.writing.save_file", interrupted)
    _, other = model.run_with_cache(tokens[:, :3])
    with pytest.raises(KeyboardInterrupt):
        other.save(path)
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_the_format_is_plain_safetensors(saved):
    cache, path = saved
    tensors = load_file(path)
    assert torch.equal(tensors["blocks.1.attn.hook_z"], cache["z", 1])
