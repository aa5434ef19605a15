"""What plain Hugging Face models compute, read off with torch hooks and nothing else.

Nothing in this file uses the library under test, so its results are an independent truth.
"""

from __future__ import annotations

import inspect
from operator import attrgetter

import torch
from transformers import PreTrainedModel
from transformers.utils import logging as hf_logging

Ints = torch.Tensor
Floats = torch.Tensor

# Where each family keeps its decoder blocks; the others keep them in `model.layers`.
BLOCK_PATHS = {
    "gpt2": "transformer.h",
    "gpt_bigcode": "transformer.h",
    "gpt_neo": "transformer.h",
    "gptj": "transformer.h",
    "gpt_neox": "gpt_neox.layers",
    "opt": "model.decoder.layers",
    "bloom": "transformer.h",
    "falcon": "transformer.h",
    "mpt": "transformer.blocks",
}


def block_list(model: PreTrainedModel) -> torch.nn.ModuleList:
    """The decoder blocks of a model, in order."""
    return attrgetter(BLOCK_PATHS.get(model.config.model_type, "model.layers"))(model)


def position_ids(attention_mask: Ints) -> Ints:
    """Positions that `generate` derives from a padding mask: a count of the real tokens so far.

    Padding gets position 0.
    """
    counted = attention_mask.long().cumsum(-1) - 1
    return counted.masked_fill(attention_mask == 0, 0)


def takes_position_ids(model: PreTrainedModel) -> bool:
    """Whether the forward pass has positions at all (ALiBi-only families have none)."""
    return "position_ids" in inspect.signature(model.forward).parameters


def inputs_of(model: PreTrainedModel, input_ids: Ints, attention_mask: Ints | None = None) -> dict:
    """Keyword arguments of a forward pass over a batch that may be padded.

    Without a mask there are no explicit positions either: given positions but no mask,
    Transformers would look for several sequences packed into one row.
    """
    inputs = {"input_ids": input_ids, "use_cache": False}
    if attention_mask is not None:
        inputs["attention_mask"] = attention_mask
        if takes_position_ids(model):
            inputs["position_ids"] = position_ids(attention_mask)
    return inputs


def forget_rope(model: PreTrainedModel) -> None:
    """Undo what earlier forward passes left in the rotary embedding.

    Dynamic scaling keeps the frequencies of the longest sequence it has seen, so results would
    depend on what ran before.
    """
    for module in model.modules():
        if getattr(module, "rope_type", None) == "dynamic":
            module.inv_freq = module.original_inv_freq.clone()
            module.max_seq_len_cached = module.original_max_seq_len


@torch.no_grad()
def logits_of(
    model: PreTrainedModel, input_ids: Ints, attention_mask: Ints | None = None
) -> Floats:
    """Logits [batch, position, vocabulary] of one forward pass without a cache."""
    forget_rope(model)
    return model(**inputs_of(model, input_ids, attention_mask)).logits


def block_outputs(
    model: PreTrainedModel, input_ids: Ints, attention_mask: Ints | None = None
) -> tuple[list[Floats], list[Floats], Floats]:
    """Hidden states entering each block, hidden states leaving each block, and the logits."""
    entering: list[Floats] = []
    leaving: list[Floats] = []

    # Clones, because some families write into these tensors later.
    def before(_module, args, kwargs):
        entering.append(hidden_states(args, kwargs).clone())

    def after(_module, _args, output):
        leaving.append((output[0] if isinstance(output, tuple) else output).clone())

    handles = []
    try:
        for block in block_list(model):
            handles.append(block.register_forward_pre_hook(before, with_kwargs=True))
            handles.append(block.register_forward_hook(after))
        logits = logits_of(model, input_ids, attention_mask)
    finally:
        for handle in handles:
            handle.remove()
    return entering, leaving, logits


def zero_block_input(
    model: PreTrainedModel, layer: int, input_ids: Ints, attention_mask: Ints | None = None
) -> Floats:
    """Logits when the hidden states entering block `layer` are replaced by zeros."""

    def zero(_module, args, kwargs):
        zeros = torch.zeros_like(hidden_states(args, kwargs))
        if args:
            return (zeros, *args[1:]), kwargs
        return args, kwargs | {"hidden_states": zeros}

    handle = block_list(model)[layer].register_forward_pre_hook(zero, with_kwargs=True)
    try:
        return logits_of(model, input_ids, attention_mask)
    finally:
        handle.remove()


def hidden_states(args: tuple, kwargs: dict) -> Floats:
    """The hidden states among the arguments of a block."""
    return args[0] if args else kwargs["hidden_states"]


def padded_batch(
    vocab: int, lengths: list[int], side: str, pad_id: int = 0, seed: int = 0
) -> tuple[Ints, Ints]:
    """Random rows of the given lengths, padded on one side to the longest, and their mask.

    Rows hold no padding token, so padding is exactly where the mask is 0.
    """
    if side not in ("left", "right"):
        raise ValueError(f"side must be 'left' or 'right', not {side!r}")
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths)
    input_ids = torch.full((len(lengths), width), pad_id)
    attention_mask = torch.zeros(len(lengths), width, dtype=torch.long)
    for row, length in enumerate(lengths):
        tokens = torch.randint(vocab - 1, (length,), generator=generator)
        tokens += tokens >= pad_id  # skip the padding token
        columns = slice(width - length, width) if side == "left" else slice(0, length)
        input_ids[row, columns] = tokens
        attention_mask[row, columns] = 1
    return input_ids, attention_mask


@torch.no_grad()
def greedy(model: PreTrainedModel, input_ids: Ints, attention_mask: Ints | None, n: int) -> Ints:
    """The `n` tokens that greedy generation with a key-value cache appends to each row.

    The end-of-sequence token is a token like any other: it does not stop a row. (Asking for
    `min_new_tokens` would not do, because that forbids the token and so changes the choice.)
    """
    forget_rope(model)
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    settings = model.generation_config
    eos, verbosity = settings.eos_token_id, hf_logging.get_verbosity()
    settings.eos_token_id = None
    hf_logging.set_verbosity_error()  # it advises against generating past the trained length
    try:
        tokens = model.generate(
            input_ids,
            attention_mask=attention_mask,
            max_new_tokens=n,
            do_sample=False,
            use_cache=True,
            pad_token_id=0,
        )
    finally:
        settings.eos_token_id = eos
        hf_logging.set_verbosity(verbosity)
    return tokens[:, input_ids.shape[1] :]
