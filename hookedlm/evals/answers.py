"""What the model would say next: the logits behind prompts, and the tokens of possible answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from hookedlm.model import HookedTransformer
from hookedlm.tokens import encode, padded


@torch.no_grad()
def last_logits(
    model: HookedTransformer, rows: Sequence[list[int]], batch_size: int
) -> Iterator[Float[Tensor, "d_vocab"]]:
    """The logits after the last token of each row; rows are padded, and padding is masked."""
    for start in tqdm(range(0, len(rows), batch_size), leave=False):
        tokens, mask = padded(list(rows[start : start + batch_size]), 0, "right")
        logits = model(tokens.to(model.device), attention_mask=mask.to(model.device))
        yield from logits[torch.arange(len(tokens)), mask.sum(1) - 1].float().cpu()


def continuation(tokenizer: Any, before: str, text: str) -> list[int]:
    """The tokens of ``text`` as they stand after ``before``."""
    short, long = encode(tokenizer, [before, before + text], special=False)
    n = next((i for i, (a, b) in enumerate(zip(short, long, strict=False)) if a != b), len(short))
    return long[n:]
