"""`OpaqueTail`: logits by Hugging Face's own code, from a stream that our blocks computed."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn

from hookedlm.convert.calling import logits_of, tokens_name
from hookedlm.convert.prepare import CallRecorder, HFPreparer


class OpaqueTail:
    """Runs the model over its recorders; the last one hands on our stream instead of its input."""

    def __init__(self, model: nn.Module, preparer: HFPreparer):
        self.model = model
        self.preparer = preparer
        self.accepts = set(inspect.signature(model.forward).parameters)

    def __call__(
        self,
        stream: Tensor,
        tokens: Tensor | None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        """Logits ``[batch, pos, d_vocab]`` of the stream leaving the last block."""
        given: dict[str, Any] = {
            tokens_name(self.model): tokens,
            "inputs_embeds": stream if tokens is None else None,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "use_cache": False,
        }
        recorders = [m for m in self.preparer.module.modules() if isinstance(m, CallRecorder)]
        for recorder in recorders:  # whichever is called last
            recorder.substitute = stream
        try:
            kwargs = {n: v for n, v in given.items() if v is not None and n in self.accepts}
            return logits_of(self.model(**kwargs))
        finally:
            for recorder in recorders:
                recorder.substitute = None
            self.preparer.calls.clear()
