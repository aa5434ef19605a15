"""`BertNextSentencePrediction`: does the second sentence follow the first?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from jaxtyping import Float, Int
from torch import Tensor

from hookedlm.encoder.model import HookedEncoder
from hookedlm.errors import InputError

Tokens = Int[Tensor, "batch pos"]
ANSWERS = ("The sentences are sequential", "The sentences are NOT sequential")


class BertNextSentencePrediction:
    """A `HookedEncoder` asked about pairs of sentences; hooks and caches are the encoder's.

    Raises InputError on an encoder without a pooler and next-sentence head.
    """

    def __init__(self, model: HookedEncoder):
        if model.pooler is None or model.nsp_head is None:
            raise InputError("this encoder has no pooler and next-sentence head")
        self.model = model

    def to_tokens(
        self, input: Sequence[str] | Sequence[Sequence[str]], **kwargs: Any
    ) -> tuple[Tokens, Tokens, Tokens]:
        """(tokens, token types, mask) of one pair ``[first, second]`` or of several."""
        pairs: Any = [input] if all(isinstance(part, str) for part in input) else input
        if not all(len(pair) == 2 for pair in pairs):
            raise InputError("next-sentence prediction wants two sentences, or pairs of them")
        return self.model.to_tokens([tuple(pair) for pair in pairs], **kwargs)

    def forward(
        self,
        input: Sequence[str] | Sequence[Sequence[str]] | Tokens,
        return_type: Literal["logits", "predictions"] | None = "logits",
        token_type_ids: Tokens | None = None,
        one_zero_attention_mask: Tokens | None = None,
    ) -> Float[Tensor, "batch choice"] | str | list[str] | None:
        """Logits ``[batch, 2]`` (follows, does not), or the answers in words."""
        arguments = self._arguments(input, token_type_ids, one_zero_attention_mask)
        return self._answer(self.model(return_type="next_sentence", **arguments), return_type)

    __call__ = forward

    def run_with_cache(
        self,
        input: Sequence[str] | Sequence[Sequence[str]] | Tokens,
        return_type: Literal["logits", "predictions"] | None = "logits",
        token_type_ids: Tokens | None = None,
        one_zero_attention_mask: Tokens | None = None,
        **kwargs: Any,
    ) -> tuple[Any, Any]:
        """(answer, cache); further arguments are those of `HookedEncoder.run_with_cache`."""
        arguments = self._arguments(input, token_type_ids, one_zero_attention_mask)
        logits, cache = self.model.run_with_cache(
            return_type="next_sentence", **arguments, **kwargs
        )
        return self._answer(logits, return_type), cache

    def _arguments(self, input: Any, types: Tokens | None, mask: Tokens | None) -> dict[str, Any]:
        if not isinstance(input, Tensor):
            input, own_types, own_mask = self.to_tokens(input)
            types = own_types if types is None else types
            mask = own_mask if mask is None else mask
        elif types is None:
            raise InputError(
                "tokens need token_type_ids beside them: 0 in the first, 1 in the second"
            )
        return {"input": input, "token_type_ids": types, "one_zero_attention_mask": mask}

    def _answer(self, logits: Tensor, return_type: str | None) -> Any:
        if return_type not in ("logits", "predictions", None):
            raise InputError(f"return_type={return_type!r}: expected logits, predictions or None")
        if return_type == "predictions":
            answers = [ANSWERS[choice] for choice in logits.argmax(-1).tolist()]
            return answers[0] if len(answers) == 1 else answers
        return None if return_type is None else logits
