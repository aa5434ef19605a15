"""Text to tokens and back, on four small tokenizers that differ in what they add by themselves."""

import logging
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from hookedlm.errors import InputError, NotOneTokenError, TokenizerError
from hookedlm.tokens import TokenAbsentError, TokenMethods, affixes, with_bos

CORPUS = ["Hello world", " Mary and John went to the store", "the cat sat on the mat"] * 4
# Their tokens, as trained below: a word with its leading space is one token.
HELLO = ["Hello", " world"]


def byte_level(specials, **tokens) -> PreTrainedTokenizerFast:
    """A byte-level BPE that has every space-led word of CORPUS as one token."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1000,
        special_tokens=[AddedToken(text, special=True) for text in specials],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, **tokens)


def adding(tokenizer, single, *specials) -> PreTrainedTokenizerFast:
    """The tokenizer with a post-processor that wraps every text as ``single`` says."""
    ids = [(text, tokenizer.convert_tokens_to_ids(text)) for text in specials]
    backend = tokenizer.backend_tokenizer
    backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=ids)
    return tokenizer


def gpt2_like():
    """bos is eos, no pad, adds nothing."""
    end = "<|endoftext|>"
    return byte_level([end], bos_token=end, eos_token=end, unk_token=end)


def llama_like():
    """Puts <s> in front of every text; no pad."""
    return adding(
        byte_level(["<unk>", "<s>", "</s>"], bos_token="<s>", eos_token="</s>"), "<s> $A", "<s>"
    )


def no_bos():
    """As Qwen: eos and pad, no bos."""
    return byte_level(["<end>", "<pad>"], eos_token="<end>", pad_token="<pad>")


def bos_and_eos():
    """Puts <s> before and </s> after every text."""
    bare = byte_level(
        ["<s>", "</s>", "<pad>"], bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    return adding(bare, "<s> $A </s>", "<s>", "</s>")


def classifying():
    """As BERT: [CLS] and [SEP] around every text, none of them bos."""
    bare = byte_level(["[CLS]", "[SEP]", "[PAD]"], pad_token="[PAD]")
    return adding(bare, "[CLS] $A [SEP]", "[CLS]", "[SEP]")


KINDS = [gpt2_like, llama_like, no_bos, bos_and_eos, classifying]


class Speaker(TokenMethods):
    """Just enough of a model."""

    def __init__(self, tokenizer, n_ctx=64, default_prepend_bos=True, padding_side=None):
        self.cfg = SimpleNamespace(
            n_ctx=n_ctx,
            default_prepend_bos=default_prepend_bos,
            tokenizer_prepends_bos=None,
            d_vocab=-1,
            device="cpu",
        )
        self.device = torch.device("cpu")
        self.set_tokenizer(tokenizer, padding_side)
        n_vocab = 300 if tokenizer is None else self.cfg.d_vocab
        self.W_U = torch.arange(4.0 * n_vocab).reshape(4, n_vocab)


def pieces(model, text, **options):
    """What `to_tokens` makes of one text, as the vocabulary's own entries."""
    [row] = model.to_tokens(text, **options).tolist()
    names = model.tokenizer.convert_ids_to_tokens(row)
    return [name.replace("Ġ", " ") for name in names]


# --------------------------------------------------------------------------------------------
# BOS
# --------------------------------------------------------------------------------------------

END = "<|endoftext|>"
BOS_TABLE = [
    # tokenizer, text, prepend_bos, tokens
    (gpt2_like, "Hello world", True, [END, *HELLO]),
    (gpt2_like, "Hello world", False, HELLO),
    (gpt2_like, f"{END}Hello world", True, [END, *HELLO]),
    (gpt2_like, f"{END}Hello world", False, [END, *HELLO]),
    (gpt2_like, "", True, [END]),
    (gpt2_like, "", False, []),
    (gpt2_like, END, True, [END]),
    (gpt2_like, f"Hello{END} world", True, [END, "Hello", END, " world"]),
    (llama_like, "Hello world", True, ["<s>", *HELLO]),
    (llama_like, "Hello world", False, HELLO),
    (llama_like, "<s>Hello world", True, ["<s>", *HELLO]),
    (llama_like, "<s>Hello world", False, ["<s>", *HELLO]),
    (llama_like, "", True, ["<s>"]),
    (llama_like, "", False, []),
    (bos_and_eos, "Hello world", True, ["<s>", *HELLO, "</s>"]),
    (bos_and_eos, "Hello world", False, [*HELLO, "</s>"]),
    (bos_and_eos, "<s>Hello world", True, ["<s>", *HELLO, "</s>"]),
    (bos_and_eos, "", True, ["<s>", "</s>"]),
    (no_bos, "Hello world", False, HELLO),
    (no_bos, "Hello world", None, HELLO),
    (classifying, "Hello world", False, ["[CLS]", *HELLO, "[SEP]"]),
    (classifying, "Hello world", None, ["[CLS]", *HELLO, "[SEP]"]),
]


@pytest.mark.parametrize("kind, text, prepend_bos, expected", BOS_TABLE)
def test_there_is_one_bos_or_none(kind, text, prepend_bos, expected):
    assert pieces(Speaker(kind()), text, prepend_bos=prepend_bos) == expected


@pytest.mark.parametrize("kind", [gpt2_like, llama_like, bos_and_eos])
def test_prepend_bos_none_follows_the_configuration(kind):
    tokenizer = kind()
    for default in (True, False):
        model = Speaker(tokenizer, default_prepend_bos=default)
        assert pieces(model, "Hello") == pieces(model, "Hello", prepend_bos=default)
    own = Speaker(tokenizer, default_prepend_bos=None)
    assert own.to_tokens("Hello").tolist() == [tokenizer("Hello")["input_ids"]]


@pytest.mark.parametrize("kind", [no_bos, classifying])
def test_a_bos_that_does_not_exist_is_refused_only_when_asked_for(kind):
    model = Speaker(kind(), default_prepend_bos=True)
    assert model.to_tokens("Hello").tolist() == [model.tokenizer("Hello")["input_ids"]]
    with pytest.raises(TokenizerError, match="no beginning-of-sequence token"):
        model.to_tokens("Hello", prepend_bos=True)


def test_the_tokenizers_own_additions_are_found_by_watching():
    found = [affixes(kind(), [" the cat", "Hello", ""]) for kind in KINDS]
    assert found == [([], []), ([1], []), ([], []), ([0], [1]), ([0], [1])]
    without_text = [affixes(kind()) for kind in KINDS]
    assert without_text == [([], []), ([1], []), ([], []), ([0], [1]), ([], [0, 1])]


def test_a_vocabulary_of_a_few_words_is_asked_for_no_other():
    backend = Tokenizer(models.WordLevel({"[X]": 0, "[Y]": 1, "7": 2, "8": 3}))  # no unknown token
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    words = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="[X]", eos_token="[Y]")
    model = Speaker(adding(words, "[X] $A [Y]", "[X]", "[Y]"))
    assert model.cfg.d_vocab == 4
    assert model.cfg.tokenizer_prepends_bos
    assert model.to_tokens(["", "7 8"]).tolist() == [[0, 1, 1, 1], [0, 2, 3, 1]]
    assert model.to_tokens("8", prepend_bos=False).tolist() == [[3, 1]]


def test_what_stands_beside_bos_in_the_prefix_is_kept():
    tokenizer = llama_like()
    assert with_bos(tokenizer, [9], False, prefix=[7, 1], suffix=[8]) == [7, 9, 8]
    assert with_bos(tokenizer, [9], True, prefix=[7, 1], suffix=[8]) == [7, 1, 9, 8]
    assert with_bos(tokenizer, [1, 9], True, prefix=[7]) == [1, 7, 9]
    assert with_bos(tokenizer, [9], None, prefix=[7, 1]) == [7, 1, 9]
    assert with_bos(tokenizer, [9], None, prefix=[7]) == [7, 9]


@pytest.mark.parametrize("kind, adds", [(gpt2_like, False), (llama_like, True), (no_bos, False)])
def test_set_tokenizer_fills_the_configuration(kind, adds):
    model = Speaker(kind())
    assert model.cfg.tokenizer_prepends_bos is adds
    assert model.cfg.d_vocab == len(model.tokenizer)
    model.cfg.d_vocab = 5000
    model.set_tokenizer(kind())
    assert model.cfg.d_vocab == 5000


# --------------------------------------------------------------------------------------------
# Padding and the mask
# --------------------------------------------------------------------------------------------

BATCH = ["Hello", " Mary and John went to the store", "", " the cat"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("default", [True, False])
def test_a_batch_is_its_rows_padded_on_one_side(kind, side, default):
    model = Speaker(kind(), default_prepend_bos=default)
    tokens, mask = model.to_tokens_and_mask(BATCH, padding_side=side)
    assert torch.equal(tokens, model.to_tokens(BATCH, padding_side=side))
    assert tokens.dtype == mask.dtype == torch.long
    assert tokens.shape == mask.shape
    for text, row, real in zip(BATCH, tokens, mask, strict=True):
        [alone] = model.to_tokens(text).tolist()
        n_padding = tokens.shape[1] - len(alone)
        padding = [model.pad_token_id] * n_padding
        zeros, ones = [0] * n_padding, [1] * len(alone)
        assert row.tolist() == (padding + alone if side == "left" else alone + padding)
        assert real.tolist() == (zeros + ones if side == "left" else ones + zeros)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_the_inferred_mask_is_the_exact_one_also_where_pad_is_bos(kind, side):
    model = Speaker(kind(), padding_side=side)
    tokens, mask = model.to_tokens_and_mask(BATCH)
    assert torch.equal(model.padding_mask(tokens), mask)
    assert torch.equal(model.padding_mask(tokens, padding_side=side), mask)


def test_inferred_masks_by_hand():
    model = Speaker(gpt2_like())
    pad = model.pad_token_id
    left = torch.tensor([[pad, pad, pad, 5], [pad, 6, 7, 8], [pad, pad, 6, pad]])
    expected = [[0, 0, 1, 1], [1, 1, 1, 1], [0, 1, 1, 1]]
    assert model.padding_mask(left, "left").tolist() == expected
    assert model.padding_mask(left.flip(1), "right").flip(1).tolist() == expected
    # Rows that all end in EOS are not padded, and one row never is.
    assert model.padding_mask(torch.tensor([[5, 6, pad], [7, 8, pad]])).all()
    assert model.padding_mask(torch.tensor([[5, pad, pad]])).tolist() == [[1, 1, 1]]
    assert model.padding_mask(torch.tensor([5, pad])).tolist() == [1, 1]
    assert Speaker(None).padding_mask(left).tolist() == [[1] * 4] * 3


def test_the_padding_side_is_the_argument_then_the_users_change_then_the_default():
    tokenizer = no_bos()
    tokenizer.padding_side = "left"  # as many configurations have it
    model = Speaker(tokenizer)

    def side(**options):
        return "left" if model.to_tokens(["Hello", " the cat"], **options)[0, 0] == 1 else "right"

    assert model.tokenizer.convert_ids_to_tokens(1) == "<pad>"
    assert side() == model.default_padding_side == "right"
    assert side(padding_side="left") == "left"
    model.set_tokenizer(tokenizer, "left")
    assert side() == "left"
    model.tokenizer.padding_side = "right"
    assert side() == "right"
    assert side(padding_side="left") == "left"
    with pytest.raises(InputError, match="'left' or 'right'"):
        model.set_tokenizer(tokenizer, "middle")


def test_the_pad_token_is_one_the_model_knows():
    assert Speaker(no_bos()).pad_token_id == 1
    assert Speaker(llama_like()).pad_token_id == 2  # eos
    assert Speaker(byte_level(["<s>"], bos_token="<s>")).pad_token_id == 0
    assert Speaker(byte_level(["<x>"])).pad_token_id == 0
    model = Speaker(llama_like())
    model.tokenizer.add_special_tokens({"pad_token": "<new>"})
    assert model.tokenizer.pad_token_id == model.cfg.d_vocab  # has no embedding
    assert model.pad_token_id == 2


@pytest.mark.parametrize("kind", KINDS)
def test_the_tokenizer_is_left_as_it_was(kind, caplog, capsys, monkeypatch):
    # Transformers' logger does not propagate to the root.
    monkeypatch.setattr(logging.getLogger("transformers"), "handlers", [caplog.handler])
    tokenizer, fresh = kind(), kind()
    tokenizer.model_max_length = fresh.model_max_length = 3  # so that it would like to complain
    model = Speaker(tokenizer, padding_side="left")
    tokens, _ = model.to_tokens_and_mask(BATCH)
    model.padding_mask(tokens)
    model.to_str_tokens(BATCH[1])
    model.to_string(tokens)
    assert model.tokenizer is tokenizer
    assert tokenizer.special_tokens_map == fresh.special_tokens_map
    assert tokenizer.padding_side == fresh.padding_side
    assert tokenizer.init_kwargs == fresh.init_kwargs
    assert tokenizer.backend_tokenizer.to_str() == fresh.backend_tokenizer.to_str()
    assert caplog.records == []
    assert capsys.readouterr() == ("", "")


# --------------------------------------------------------------------------------------------
# Length
# --------------------------------------------------------------------------------------------


def test_long_texts_lose_their_end_and_a_warning_says_how_much():
    model = Speaker(gpt2_like(), n_ctx=4)
    whole = model.to_tokens(BATCH, truncate=False)
    assert whole.shape == (4, 8)
    with pytest.warns(UserWarning, match="4 tokens cut off the end of 1 of 4 texts") as caught:
        tokens = model.to_tokens(BATCH)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert torch.equal(tokens, whole[:, :4])
    with pytest.warns(UserWarning, match="4 tokens cut off"):
        tokens, mask = model.to_tokens_and_mask(BATCH, padding_side="left")
    assert tokens[1].tolist() == whole[1, :4].tolist()
    assert mask.sum(1).tolist() == [2, 4, 1, 3]


def test_what_the_tokenizer_adds_at_the_end_survives_the_cut():
    model = Speaker(bos_and_eos(), n_ctx=4)
    with pytest.warns(UserWarning, match="5 tokens cut off"):
        assert pieces(model, BATCH[1]) == ["<s>", " Mary", " and", "</s>"]


def test_models_without_a_limit_cut_nothing():
    model = Speaker(gpt2_like(), n_ctx=None)
    assert model.to_tokens("Hello" * 200).shape == (1, 201)


# --------------------------------------------------------------------------------------------
# Back to text
# --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_text_survives_the_way_there_and_back(kind):
    model = Speaker(kind())
    text = " Mary's café costs 3€ , really  !\n"
    ids = model.tokenizer(text, add_special_tokens=False)["input_ids"]
    for container in (ids, torch.tensor(ids), np.array(ids), tuple(ids)):
        assert model.to_string(container) == text
    assert model.to_string(torch.tensor([ids, ids])) == [text, text]
    assert model.to_string([ids]) == [text]
    assert model.to_string(torch.tensor(ids[0])) == model.to_string(ids[0]) == " Mary"
    with pytest.raises(InputError, match=r"\(1, 1, 2\)"):
        model.to_string(torch.zeros(1, 1, 2, dtype=torch.long))
    with pytest.raises(InputError, match="float32"):
        model.to_string(torch.zeros(2))


def test_str_tokens_of_every_kind_of_input():
    model = Speaker(gpt2_like())
    spoken = [END, "Hello", " world"]
    ids = model.to_tokens("Hello world")
    assert model.to_str_tokens("Hello world") == spoken
    assert model.to_str_tokens("Hello world", prepend_bos=False) == HELLO
    assert model.to_str_tokens(["Hello world", " the"]) == [spoken, [END, " the"]]
    assert model.to_str_tokens([]) == []
    for same in (ids, ids[0], ids.numpy(), ids[0].numpy(), ids[0].tolist(), ids.int()):
        assert model.to_str_tokens(same) == spoken
    assert model.to_str_tokens(ids[0, 1]) == ["Hello"]
    assert model.to_str_tokens(ids.expand(2, 3)) == [spoken, spoken]
    assert model.to_str_tokens([ids[0], ids[0, 1:]]) == [spoken, HELLO]
    assert model.to_str_tokens(ids, prepend_bos=False) == spoken  # tokens are taken as they are
    assert model.to_str_tokens("é", prepend_bos=False) == ["\ufffd", "\ufffd"]


# --------------------------------------------------------------------------------------------
# Single tokens
# --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_single_tokens(kind):
    model = Speaker(kind())
    token = model.to_single_token(" Mary")
    assert token == model.tokenizer.convert_tokens_to_ids("ĠMary")
    assert model.to_single_str_token(token) == " Mary"
    with pytest.raises(
        NotOneTokenError, match=r"'Mary' is 2 tokens, not one: \['Ma', 'ry'\]\. ' Mary' is"
    ):
        model.to_single_token("Mary")
    with pytest.raises(NotOneTokenError, match=r"\[' Mary', ' and'\]"):
        model.to_single_token(" Mary and")
    with pytest.raises(AssertionError, match="0 tokens"):  # what TransformerLens raised
        model.to_single_token("")
    with pytest.raises(NotOneTokenError, match="'Hello' is one"):
        model.to_single_token(" Hello")


def test_advice_about_a_token_is_given_also_where_a_space_cannot_be_read():
    backend = Tokenizer(models.WordLevel({"7": 0, "8": 1}))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    model = Speaker(PreTrainedTokenizerFast(tokenizer_object=backend))
    with pytest.raises(NotOneTokenError, match=r"'78' is 2 tokens, not one: \['7', '8'\]\. Try"):
        model.to_single_token("78")


def test_special_tokens_are_single_tokens_too():
    assert Speaker(llama_like()).to_single_token("<s>") == 1


def test_positions_of_a_token():
    model = Speaker(gpt2_like())
    text = "the cat sat on the mat on the mat"
    ids = model.to_tokens(text)
    assert model.to_str_tokens(text)[5] == " the"
    for token in (" the", model.to_single_token(" the"), ids[0, 5]):
        for prompt in (text, ids, ids[0], ids.numpy()):
            assert model.get_token_position(token, prompt) == 5
            assert model.get_token_position(token, prompt, mode="last") == 8
    assert model.get_token_position(" the", text, prepend_bos=False) == 4
    assert model.get_token_position(END, text) == 0
    with pytest.raises(TokenAbsentError, match=r"' Mary' \(id \d+\) is not in \['<\|end"):
        model.get_token_position(" Mary", text)
    with pytest.raises(NotOneTokenError):
        model.get_token_position("Mary", text)
    with pytest.raises(InputError, match="one prompt"):
        model.get_token_position(" the", ids.expand(2, -1))
    assert Speaker(None).get_token_position(7, torch.tensor([3, 7])) == 1


def test_residual_directions_are_columns_of_the_unembedding():
    model = Speaker(gpt2_like())
    mary, john = model.to_single_token(" Mary"), model.to_single_token(" John")
    column = model.W_U[:, mary]
    for one in (" Mary", mary, torch.tensor(mary), torch.tensor([[mary]]), [mary], [" Mary"]):
        assert torch.equal(model.tokens_to_residual_directions(one), column)
    both = torch.stack((column, model.W_U[:, john]))
    for two in ([mary, john], torch.tensor([mary, john]), [" Mary", " John"]):
        assert torch.equal(model.tokens_to_residual_directions(two), both)
    square = torch.tensor([[mary, john], [john, mary]])
    found = model.tokens_to_residual_directions(square)
    assert found.shape == (2, 2, 4)
    assert torch.equal(found[1, 0], model.W_U[:, john])
    with pytest.raises(NotOneTokenError):
        model.tokens_to_residual_directions("Mary")
    for wrong in (-1, model.cfg.d_vocab):
        with pytest.raises(InputError, match="from 0 to"):
            model.tokens_to_residual_directions(wrong)
    assert torch.equal(Speaker(None).tokens_to_residual_directions(3), Speaker(None).W_U[:, 3])


# --------------------------------------------------------------------------------------------
# Refusals
# --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "call",
    [
        lambda model: model.to_tokens("Hello"),
        lambda model: model.to_tokens_and_mask("Hello"),
        lambda model: model.to_string([1]),
        lambda model: model.to_str_tokens("Hello"),
        lambda model: model.to_str_tokens([1]),
        lambda model: model.to_single_token("Hello"),
        lambda model: model.to_single_str_token(1),
        lambda model: model.get_token_position(1, "Hello"),
        lambda model: model.tokens_to_residual_directions("Hello"),
        lambda model: model.pad_token_id,
    ],
)
def test_without_a_tokenizer_text_is_refused_with_advice(call):
    with pytest.raises(TokenizerError, match=r"pass `tokenizer=`.*token tensors"):
        call(Speaker(None))


def test_a_tokenizer_of_another_model_is_noticed():
    model = Speaker(gpt2_like())
    largest = model.cfg.d_vocab - 1
    text = model.to_single_str_token(largest)
    assert model.to_tokens(text).max() == largest
    model.cfg.d_vocab = largest
    with pytest.raises(TokenizerError, match=f"id {largest} .* vocabulary has {largest} entries"):
        model.to_tokens(text)


def test_only_text_is_tokenized_and_only_by_a_tokenizer():
    model = Speaker(gpt2_like())
    with pytest.raises(InputError, match="a text or a list of texts"):
        model.to_tokens([])
    with pytest.raises(TokenizerError, match="PreTrainedTokenizerFast"):
        model.set_tokenizer(model.tokenizer.backend_tokenizer)
    with pytest.raises(TokenizerError, match="AutoTokenizer"):
        model.set_tokenizer("gpt2")
