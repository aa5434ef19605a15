"""Each of the classic utils against an independent truth, and all of their names."""

from __future__ import annotations

import inspect
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import hf, hooked, word_tokenizer
from tokenizers import processors
from torch import nn
from transformers import TopKLogitsWarper, TopPLogitsWarper
from transformers.activations import ACT2FN

import hookedlm
from hookedlm import FactoredMatrix, HookPoint, prompts, utils
from hookedlm.errors import InputError, TokenizerError

SIGNATURES = """
calc_fan_in_and_fan_out(tensor)
check_structure(t1, t2, *, verbose=False)
clear_huggingface_cache()
composition_scores(left, right, broadcast_dims=True)
download_file_from_hf(repo_name, file_name, subfolder='.', cache_dir=CACHE_DIR, \
force_is_torch=False, **kwargs)
get_act_name(name, layer=None, layer_type=None)
get_attention_mask(tokenizer, tokens, prepend_bos)
get_corner(tensor, n=3)
get_cumsum_along_dim(tensor, dim, reverse=False)
get_dataset(dataset_name, **kwargs)
get_device()
get_input_with_manually_prepended_bos(tokenizer, input)
get_nested_attr(obj, attr_str)
get_offset_position_ids(past_kv_pos_offset, attention_mask)
get_tokenizer_with_bos(tokenizer)
get_tokens_with_bos_removed(tokenizer, tokens)
init_kaiming_normal_(param, a=0, nonlinearity='relu', gain=1.0, mode='fan_in')
init_kaiming_uniform_(param, a=0, nonlinearity='relu', gain=1.0, mode='fan_in')
init_xavier_normal_(param, gain=1.0)
init_xavier_uniform_(param, gain=1.0)
is_library_available(name)
is_lower_triangular(x)
is_square(x)
keep_single_column(dataset, col_name)
lm_accuracy(logits, tokens, per_token=False)
lm_cross_entropy_loss(logits, tokens, attention_mask=None, per_token=False)
override_or_use_default_value(default_flag, override=None)
print_gpu_mem(step_name='')
remove_batch_dim(tensor)
repeat_along_head_dimension(tensor, n_heads, clone_tensor=True)
sample_logits(final_logits, top_k=None, top_p=None, temperature=1.0, freq_penalty=0.0, tokens=None)
select_compatible_kwargs(kwargs_dict, callable)
set_nested_attr(obj, attr_str, value)
test_prompt(prompt, answer, model, prepend_space_to_answer=True, print_details=True, \
prepend_bos=None, top_k=10)
to_numpy(tensor)
tokenize_and_concatenate(dataset, tokenizer, streaming=False, max_length=1024, \
column_name='text', add_bos_token=True, num_proc=10)
transpose(tensor)
warn_if_mps(device)
"""
OTHER_NAMES = """
ACTIVATION_FN_DICT CACHE_DIR FactoredMatrix LocallyOverridenDefaults Slice SliceInput
USE_DEFAULT_VALUE XIELU gelu_fast gelu_new gelu_pytorch_tanh solu xielu
"""


@pytest.mark.parametrize("line", SIGNATURES.strip().splitlines(), ids=lambda s: s.split("(")[0])
def test_the_classic_signatures(line):
    name, _, rest = line.partition("(")
    found = inspect.signature(vars(utils)[name])
    shown = []
    for p in found.parameters.values():
        default = "CACHE_DIR" if p.default is utils.CACHE_DIR else repr(p.default)
        star = {p.VAR_KEYWORD: "**", p.VAR_POSITIONAL: "*"}.get(p.kind, "")
        if p.kind is p.KEYWORD_ONLY and "*" not in shown:
            shown.append("*")
        shown.append(star + p.name + ("" if p.default is p.empty else f"={default}"))
    assert ", ".join(shown) == rest.removesuffix(")")


@pytest.mark.parametrize("name", OTHER_NAMES.split())
def test_the_other_classic_names(name):
    assert name in vars(utils)


def test_utils_defines_nothing_itself():
    assert "def " not in inspect.getsource(utils)
    assert utils.Slice is hookedlm.Slice
    assert utils.FactoredMatrix is FactoredMatrix
    assert utils.get_act_name is hookedlm.get_act_name
    assert utils.USE_DEFAULT_VALUE is None


def test_utils_needs_none_of_the_heavy_libraries():
    heavy = "{'datasets', 'pandas'} & {*sys.modules}"
    check = f"import sys, hookedlm.utils; sys.exit(', '.join({heavy}) or None)"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


# Shapes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given, expected",
    [
        (torch.arange(3.0, requires_grad=True), [0.0, 1.0, 2.0]),
        (nn.Parameter(torch.ones(2)), [1.0, 1.0]),
        (torch.tensor([1.5, 2.0], dtype=torch.bfloat16), [1.5, 2.0]),
        (torch.tensor([1 + 2j]).conj(), [1 - 2j]),
        (np.array([1, 2]), [1, 2]),
        ([1, 2], [1, 2]),
        ((1.0, 2.0), [1.0, 2.0]),
        ([torch.ones(2, requires_grad=True), torch.zeros(2)], [[1.0, 1.0], [0.0, 0.0]]),
        (3, 3),
        (2.5, 2.5),
        (True, True),
        ("word", "word"),
    ],
)
def test_to_numpy(given, expected):
    made = utils.to_numpy(given)
    assert isinstance(made, np.ndarray)
    assert made.tolist() == expected


def test_to_numpy_refuses_what_is_no_array():
    with pytest.raises(InputError, match="set can't become an array"):
        utils.to_numpy({1, 2})


def test_transpose_and_corner_and_batch():
    x = torch.arange(120).reshape(2, 3, 4, 5)
    assert utils.transpose(x).equal(torch.stack([torch.stack([m.T for m in row]) for row in x]))
    assert utils.get_corner(x, 2).equal(x[:2, :2, :2, :2])
    assert utils.get_corner(torch.tensor(3.0)) == 3
    AB = FactoredMatrix(torch.randn(4, 6, 2), torch.randn(4, 2, 7))
    torch.testing.assert_close(utils.get_corner(AB, 3), AB.AB[:3, :3, :3])
    assert utils.remove_batch_dim(x[:1]).equal(x[0])
    assert utils.remove_batch_dim(x).equal(x)


@pytest.mark.parametrize("clone", [True, False])
def test_repeat_along_head_dimension(clone):
    x = torch.randn(2, 3, 4)
    repeated = utils.repeat_along_head_dimension(x, 5, clone_tensor=clone)
    assert repeated.shape == (2, 3, 5, 4)
    assert all(repeated[:, :, head].equal(x) for head in range(5))
    assert (repeated.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()) is not clone


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_running_sums(dim):
    x = torch.randint(10, (3, 4))
    up, down = utils.get_cumsum_along_dim(x, dim), utils.get_cumsum_along_dim(x, dim, reverse=True)
    for i in range(x.shape[dim]):
        assert up.select(dim, i).equal(x.narrow(dim, 0, i + 1).sum(dim))
        assert down.select(dim, i).equal(x.narrow(dim, i, x.shape[dim] - i).sum(dim))


@pytest.mark.parametrize("past", [0, 2])
def test_position_ids_count_the_real_tokens_before(past):
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [1, 1, 0, 0, 1]])
    expected = [[max(0, sum(row[: i + 1]) - 1) for i in range(past, 5)] for row in mask.tolist()]
    assert utils.get_offset_position_ids(past, mask).tolist() == expected


def test_square_and_triangular():
    x = torch.arange(1, 10).reshape(3, 3)
    assert utils.is_square(x)
    assert not utils.is_square(x[:2])
    assert not utils.is_square(x[None])
    assert utils.is_lower_triangular(x.tril())
    assert not utils.is_lower_triangular(x)
    assert not utils.is_lower_triangular(x[:2].tril())


def same_structure(t1, t2) -> bool:
    """Every comparison of neighbours, one at a time."""
    n, m = t1.shape
    down = [((i, j), (i + 1, j)) for i in range(n - 1) for j in range(m)]
    along = [((i, j), (i, j + 1)) for i in range(n) for j in range(m - 1)]
    return all((t1[a] >= t1[b]) == (t2[a] >= t2[b]) for a, b in down + along)


def test_check_structure(capsys):
    t1 = torch.randn(4, 5)
    others = [t1.exp(), -t1, *(t1 + 0.3 * torch.randn(4, 5) for _ in range(20))]
    answers = [utils.check_structure(t1, t2) for t2 in others]
    assert answers == [same_structure(t1, t2) for t2 in others]
    assert set(answers) == {True, False}
    printed = capsys.readouterr().out
    assert printed.count("PASSED") == sum(answers)
    t2 = t1.clone()
    t2[2] = t1[2] + 100
    assert not utils.check_structure(t1, t2, verbose=True)
    assert "rows 1:2" in capsys.readouterr().out
    with pytest.raises(InputError, match="one shape"):
        utils.check_structure(t1, t1[:2])


# Matrices that compose ----------------------------------------------------------------------------


def matrices(*leading: int) -> FactoredMatrix:
    return FactoredMatrix(torch.randn(*leading, 9, 3), torch.randn(*leading, 3, 9))


def test_composition_scores_are_ratios_of_dense_norms():
    left, right = matrices(2, 3), matrices(4)
    scores = utils.composition_scores(left, right)
    assert scores.shape == (2, 3, 4)
    for i in range(2):
        for j in range(3):
            for k in range(4):
                L, R = left.AB[i, j], right.AB[k]
                torch.testing.assert_close(scores[i, j, k], (L @ R).norm() / L.norm() / R.norm())
    assert utils.composition_scores(matrices(), matrices()).shape == ()


def test_composition_scores_of_pairs():
    left, right = matrices(3), matrices(3)
    pairs = utils.composition_scores(left, right, broadcast_dims=False)
    torch.testing.assert_close(pairs, utils.composition_scores(left, right).diagonal())
    one_left = utils.composition_scores(matrices(1), right, broadcast_dims=False)
    assert one_left.shape == (3,)


def test_matrices_that_cannot_compose():
    with pytest.raises(InputError, match="inner sizes"):
        utils.composition_scores(matrices(), FactoredMatrix(torch.ones(8, 2), torch.ones(2, 9)))


# Initial weights ----------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(7, 5), (4, 7, 5), (5,)])
@pytest.mark.parametrize(
    "kind", ["xavier_uniform_", "xavier_normal_", "kaiming_uniform_", "kaiming_normal_"]
)
@pytest.mark.parametrize(
    "options", [{}, {"mode": "fan_out", "nonlinearity": "leaky_relu", "a": 0.3}]
)
def test_initial_weights_are_torch_s_on_the_same_seed(shape, kind, options):
    """Weights here are [in, out], torch's [out, in]: as many numbers, drawn in the same order."""
    if "xavier" in kind:
        options = {"gain": 1.7} if options else {}
    fan_in, fan_out = ([1, *shape[-2:]])[-2], shape[-1] * (shape[0] if len(shape) == 3 else 1)
    ours, theirs = torch.empty(shape), torch.empty(fan_out, fan_in)
    torch.manual_seed(5)
    made = vars(utils)[f"init_{kind}"](ours, **options)
    torch.manual_seed(5)
    torch_options = options if options or "xavier" in kind else {"nonlinearity": "relu"}
    vars(nn.init)[kind](theirs, **torch_options)
    assert made is ours
    torch.testing.assert_close(ours.flatten(), theirs.flatten())


def test_a_gain_multiplies():
    for name in ("init_kaiming_uniform_", "init_kaiming_normal_"):
        drawn = []
        for gain in (1.0, 3.0):
            torch.manual_seed(1)
            drawn.append(vars(utils)[name](torch.empty(6, 4), gain=gain))
        torch.testing.assert_close(3 * drawn[0], drawn[1])


def test_fans_of_other_ranks_are_refused():
    assert utils.calc_fan_in_and_fan_out(torch.empty(4, 7, 5)) == (7, 20)
    for shape in ((), (1, 2, 3, 4)):
        with pytest.raises(InputError, match="has no fan"):
            utils.calc_fan_in_and_fan_out(torch.empty(shape))
    with pytest.raises(InputError, match="fan_middle"):
        utils.init_kaiming_normal_(torch.empty(2, 2), mode="fan_middle")


# Activations --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gelu_new", "gelu_fast", "gelu_pytorch_tanh"])
def test_gelus_are_those_of_transformers(name):
    x = torch.linspace(-6, 6, 101)
    torch.testing.assert_close(vars(utils)[name](x), ACT2FN[name](x), atol=2e-6, rtol=0)
    assert utils.ACTIVATION_FN_DICT[name] is vars(utils)[name]


def test_solu_and_xielu():
    x = torch.linspace(-6, 6, 101)
    torch.testing.assert_close(utils.solu(x), x * F.softmax(x, -1))
    torch.testing.assert_close(
        utils.xielu(x), ACT2FN["xielu"](x.to(torch.bfloat16)).float(), rtol=0.02, atol=0.02
    )
    with torch.no_grad():
        torch.testing.assert_close(utils.xielu(x), utils.XIELU()(x))
    assert set(utils.ACTIVATION_FN_DICT) == set(
        "solu solu_ln gelu gelu_new gelu_fast gelu_pytorch_tanh silu relu xielu".split()
    )


# What a model got right ---------------------------------------------------------------------------


@pytest.mark.parametrize("leading", [(), (2,), (2, 3)])
def test_accuracy_counts_the_likeliest_next_tokens(leading):
    logits, tokens = torch.randn(*leading, 6, 3), torch.randint(3, (*leading, 6))
    rows = zip(logits.reshape(-1, 6, 3), tokens.reshape(-1, 6), strict=True)
    right = [[bool(row[i].argmax() == ids[i + 1]) for i in range(5)] for row, ids in rows]
    per_token = utils.lm_accuracy(logits, tokens, per_token=True)
    assert per_token.shape == (*leading, 5)
    assert per_token.reshape(-1, 5).tolist() == right
    flat = [x for row in right for x in row]
    assert float(utils.lm_accuracy(logits, tokens)) == pytest.approx(sum(flat) / len(flat))


# Sampling -----------------------------------------------------------------------------------------


def drawn(n: int, logits, **options):
    """How often each token comes out, of n draws of a row."""
    samples = utils.sample_logits(logits.expand(n, -1), **options)
    return torch.bincount(samples, minlength=logits.shape[-1]) / n


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.5},
        {"top_k": 3},
        {"top_p": 0.7},
        {"top_k": 4, "top_p": 0.6, "temperature": 2.0},
        {"top_k": 100},
        {"top_p": 1.0},
    ],
)
def test_samples_follow_the_distribution_of_transformers(options):
    logits = torch.tensor([2.0, 1.5, 1.0, 0.0, -1.0, -1.5])
    scores = logits[None] / options.get("temperature", 1.0)
    if "top_k" in options:
        scores = TopKLogitsWarper(options["top_k"])(None, scores)
    if "top_p" in options:
        scores = TopPLogitsWarper(options["top_p"])(None, scores)
    expected = scores.softmax(-1)[0]
    frequencies = drawn(20_000, logits, **options)
    assert ((frequencies > 0) == (expected > 0)).all()
    torch.testing.assert_close(frequencies, expected, atol=0.02, rtol=0)


def test_a_penalty_for_each_time_a_token_occurred():
    logits = torch.tensor([1.0, 1.0, 0.5, 0.0])
    counts = torch.tensor([0, 3, 1, 0])
    expected = (logits / 0.8 - 0.4 * counts).softmax(-1)
    tokens = torch.tensor([1, 2, 1, 1]).expand(20_000, -1)
    frequencies = drawn(20_000, logits, freq_penalty=0.4, tokens=tokens, temperature=0.8)
    torch.testing.assert_close(frequencies, expected, atol=0.02, rtol=0)


def test_the_likeliest_token_and_every_shape():
    logits = torch.randn(3, 4, 10)
    assert utils.sample_logits(logits, temperature=0.0).equal(logits.argmax(-1))
    assert utils.sample_logits(logits, top_k=1).equal(logits.argmax(-1))
    assert utils.sample_logits(logits[0, 0], top_p=1e-9).shape == ()
    assert utils.sample_logits(logits.half(), top_k=1).equal(logits.half().argmax(-1))


def test_sampling_leaves_its_arguments_alone():
    logits, tokens = torch.randn(2, 5), torch.zeros(2, 3, dtype=torch.long)
    before = logits.clone()
    utils.sample_logits(logits, top_k=2, freq_penalty=1.0, tokens=tokens)
    assert logits.equal(before)


@pytest.mark.parametrize(
    "options, match",
    [
        ({"top_k": 0}, "top_k=0"),
        ({"top_k": True}, "top_k=True"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"top_p": 1.5}, "top_p=1.5"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"temperature": math.nan}, "temperature=nan"),
        ({"freq_penalty": 1.0}, "pass them as tokens"),
        ({"freq_penalty": 1.0, "tokens": torch.zeros(3, 2, dtype=torch.long)}, "need tokens"),
    ],
)
def test_values_out_of_range_are_refused(options, match):
    with pytest.raises(InputError, match=match):
        utils.sample_logits(torch.randn(2, 5), **options)


# A prompt and its answer --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def demo():
    return hookedlm.load_demo()


def by_hand(model, prompt_ids, answer_ids):
    """(rank, logit, prob) of each answer token, one run of the model for each."""
    numbers = []
    for i, token in enumerate(answer_ids):
        with torch.no_grad():
            logits = model(torch.tensor([prompt_ids + answer_ids[:i]]))[0, -1]
        rank = logits.argsort(descending=True).tolist().index(token)
        numbers.append((rank, float(logits[token]), float(logits.softmax(-1)[token])))
    return numbers


@pytest.mark.parametrize("prepend_bos", [None, True, False])
def test_the_numbers_of_a_prompt(demo, prepend_bos, capsys):
    tokenizer = demo.tokenizer
    prompt, answer = "The capital of Spain is", "Madrid in the"
    table = prompts.test_prompt(prompt, answer, demo, prepend_bos=prepend_bos, top_k=4)
    bos = [] if prepend_bos is False else [tokenizer.bos_token_id]
    expected = by_hand(demo, bos + tokenizer.encode(prompt), tokenizer.encode(" " + answer))
    assert len(table) == len(expected) > 1
    for row, (rank, logit, prob) in zip(table, expected, strict=True):
        assert (row.prompt, row.answer, row.rank) == (prompt, " Madrid in the", rank)
        assert row.logit == pytest.approx(logit, abs=1e-4)
        assert row.prob == pytest.approx(prob, abs=1e-5)
        assert len(row.top) == 4
        assert row.top[0].prob == max(c.prob for c in row.top)
    assert table[0].token == table[0].top[0].token == " Madrid"
    printed = capsys.readouterr().out
    assert ("<|endoftext|>" in printed) is (prepend_bos is not False)
    assert "Tokenized answer: [' Madrid', ' in', ' the']" in printed
    assert f"Prob: {expected[0][2]:6.2%} Token: | Madrid|" in printed
    assert printed.count("Top 0th token") == len(expected)
    assert repr(table).startswith("AnswerTable(ranks=[(' Madrid', 0), ")


def test_several_prompts_and_answers(demo, capsys):
    spain, france = "The capital of Spain is", "When Mary and John went to the store in France,"
    pairs = prompts.test_prompt([spain, france], ["Madrid", "John"], demo, print_details=False)
    alone = [
        prompts.test_prompt(prompt, answer, demo, print_details=False)[0]
        for prompt, answer in ((spain, "Madrid"), (france, "John"))
    ]
    for row, other in zip(pairs, alone, strict=True):
        assert row[:4] == other[:4]
        assert row.logit == pytest.approx(other.logit, abs=1e-4)
    capsys.readouterr()
    one_prompt = prompts.test_prompt(spain, ["Madrid", "Paris"], demo, print_details=False)
    assert capsys.readouterr().out.count("\n") == 2
    assert [row.token for row in one_prompt] == [" Madrid", " Paris"]
    one_answer = prompts.test_prompt([spain, france], "Madrid", demo, print_details=False)
    assert one_answer[0].rank == 0 < one_answer[1].rank


def test_a_space_only_where_it_is_wanted(demo):
    for answer in ("Madrid", " Madrid"):
        assert (
            prompts.test_prompt("Spain is", answer, demo, print_details=False)[0].token == " Madrid"
        )
    table = prompts.test_prompt("Spain", "s", demo, False, print_details=False)
    assert [row.token for row in table] == ["s"]


def test_what_the_tokenizer_adds_at_the_end_stays_out(demo):
    tokenizer = word_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    model = hookedlm.load(hf("gpt2-base"), tokenizer=tokenizer)
    [row] = prompts.test_prompt("the cat", "sat", model, print_details=False)
    [(rank, logit, _)] = by_hand(model, [1, 4, 5], [6])
    assert row.rank == rank
    assert row.logit == pytest.approx(logit, abs=1e-4)


def test_prompts_that_say_nothing_are_refused(demo):
    with pytest.raises(InputError, match="2 prompts and 3 answers"):
        prompts.test_prompt(["a", "b"], ["c", "d", "e"], demo)
    with pytest.raises(InputError, match="must have a token each"):
        prompts.test_prompt("", "Madrid", demo, prepend_bos=False)
    with pytest.raises(InputError, match="must have a token each"):
        prompts.test_prompt("Spain", "", demo, prepend_space_to_answer=False)
    with pytest.raises(TokenizerError):
        prompts.test_prompt("Spain", "Madrid", hookedlm.load(hf("gpt2-base")))


# Defaults for a while -----------------------------------------------------------------------------


def test_defaults_are_overridden_and_restored():
    model = hookedlm.load(hf("gpt2-base"), tokenizer=word_tokenizer())
    plain = model.to_tokens(["the cat", "dog"])
    with utils.LocallyOverridenDefaults(model, prepend_bos=False, padding_side="left"):
        assert model.to_tokens(["the cat", "dog"]).tolist() == [[4, 5], [0, 16]]
        with utils.LocallyOverridenDefaults(model, prepend_bos=True):
            assert model.to_tokens(["the cat", "dog"]).tolist() == [[1, 4, 5], [0, 1, 16]]
        assert model.to_tokens(["the cat", "dog"]).tolist() == [[4, 5], [0, 16]]
    assert model.to_tokens(["the cat", "dog"]).equal(plain)
    with pytest.raises(RuntimeError), utils.LocallyOverridenDefaults(model, padding_side="left"):
        raise RuntimeError
    assert model.to_tokens(["the cat", "dog"]).equal(plain)
    assert plain.tolist() == [[1, 4, 5], [1, 16, 0]]


def test_a_side_assigned_to_the_tokenizer_is_overridden_and_comes_back():
    model = hookedlm.load(hf("gpt2-base"), tokenizer=word_tokenizer())
    model.tokenizer.padding_side = "left"
    with utils.LocallyOverridenDefaults(model, padding_side="right"):
        assert model.to_tokens(["the cat", "dog"])[1].tolist() == [1, 16, 0]
    assert model.to_tokens(["the cat", "dog"])[1].tolist() == [0, 1, 16]
    assert model.tokenizer.padding_side == "left"


def test_defaults_that_make_no_sense():
    with pytest.raises(InputError, match="prepend_bos='yes'"):
        utils.LocallyOverridenDefaults(hooked("gpt2-base"), prepend_bos="yes")
    with pytest.raises(InputError, match="padding_side"):
        utils.LocallyOverridenDefaults(hooked("gpt2-base"), padding_side="middle")
    with pytest.raises(TypeError):
        utils.LocallyOverridenDefaults(hooked("gpt2-base"), top_k=3)


# Python and the machine ---------------------------------------------------------------------------


def test_nested_attributes():
    model = hooked("gpt2-base")
    assert utils.get_nested_attr(model, "blocks.0.attn.W_Q") is model.blocks[0].attn.W_Q
    assert isinstance(utils.get_nested_attr(model, "blocks.1.hook_resid_pre"), HookPoint)
    owner = nn.Module()
    owner.inner = nn.Module()
    utils.set_nested_attr(owner, "inner.x", 5)
    utils.set_nested_attr(owner, "y", 6)
    assert (owner.inner.x, owner.y) == (5, 6)
    with pytest.raises(AttributeError):
        utils.get_nested_attr(model, "blocks.0.nothing")


def test_overrides():
    assert utils.override_or_use_default_value(True, None) is True
    assert utils.override_or_use_default_value(True, False) is False
    assert utils.override_or_use_default_value("left") == "left"


def test_compatible_keywords():
    def few(a, /, b, *, c=1):
        pass

    def all_of_them(b, **others):
        pass

    given = {"a": 1, "b": 2, "c": 3, "d": 4}
    assert utils.select_compatible_kwargs(given, few) == {"b": 2, "c": 3}
    assert utils.select_compatible_kwargs(given, all_of_them) == given


def test_libraries(monkeypatch):
    assert utils.is_library_available("torch.nn")
    assert not utils.is_library_available("torch.no_such_module")
    assert not utils.is_library_available("no_such_library")
    assert not utils.is_library_available("no_such_library.part")
    monkeypatch.setitem(sys.modules, "pandas", None)
    assert not utils.is_library_available("pandas")


def test_devices(capsys):
    assert utils.get_device().type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.warns(UserWarning, match="wrong results on mps"):
        utils.warn_if_mps("mps")
    utils.warn_if_mps("cpu")
    utils.warn_if_mps(torch.device("cuda:1"))
    utils.print_gpu_mem("loaded")
    assert capsys.readouterr().out.startswith("loaded ~ ")


def test_gpu_memory_is_counted_in_gib_over_all_devices(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda i: (i + 1) * 2**29)
    utils.print_gpu_mem("step")
    assert capsys.readouterr().out == "step ~ 1.50 GiB allocated on GPU.\n"
