"""`SampleMethods`: a few texts of the kind a model was trained on."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any, Literal

from jaxtyping import Int
from torch import Tensor

from hookedlm.data import get_dataset
from hookedlm.errors import InputError

if TYPE_CHECKING:
    from hookedlm.model import HookedTransformer

DATASETS = {
    "neel": "c4_code",
    "neel-solu-old": "pile",
    "GPTNeoForCausalLM": "pile",
    "GPTNeoXForCausalLM": "pile",
    "GPTJForCausalLM": "pile",
    "OPTForCausalLM": "pile",
}
"""Architecture -> `get_dataset`'s name for a sample of its training data; others: openwebtext."""


class SampleMethods:
    """``model.dataset`` and samples of it."""

    dataset: Any = None
    """A sample of training texts, once loaded: rows with a "text"."""

    def load_sample_training_dataset(self: HookedTransformer, **kwargs: Any) -> None:
        """Download ten thousand texts like the model's training data into ``model.dataset``.

        Keywords go to ``datasets.load_dataset``. Raises LoadError offline, ImportError without the
        datasets library. ``model.dataset = [{"text": ...}, ...]`` does as well.
        """
        architecture = self.cfg.original_architecture or ""
        self.dataset = get_dataset(DATASETS.get(architecture, "openwebtext"), **kwargs)

    def sample_datapoint(
        self: HookedTransformer,
        tokenize: bool = False,
        prepend_bos: bool | None = None,
        padding_side: Literal["left", "right"] | None = None,
        *,
        seed: int | None = None,
    ) -> str | Int[Tensor, "1 pos"]:
        """A random text of ``model.dataset`` (loaded first if need be), or its tokens, cut to the
        context. ``seed`` makes the choice reproducible; no global generator is asked.

        Raises as `load_sample_training_dataset` and `to_tokens`; InputError if there are no texts.
        """
        if self.dataset is None:
            self.load_sample_training_dataset()
        if len(self.dataset) == 0:
            raise InputError("model.dataset holds no texts")
        text = self.dataset[random.Random(seed).randrange(len(self.dataset))]["text"]
        if not tokenize:
            return text
        return self.to_tokens(text, prepend_bos, padding_side, truncate=False)[:, : self.cfg.n_ctx]
