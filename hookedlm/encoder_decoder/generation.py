"""`GenerationMethods`: the decoder continued, token by token."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor
from tqdm import tqdm

from hookedlm.errors import InputError, TokenizerError
from hookedlm.sampling import sample_logits

if TYPE_CHECKING:
    from hookedlm.encoder_decoder.model import HookedEncoderDecoder

RETURN_TYPES = ("input", "str", "tensor", "tokens")


class GenerationMethods:
    """`generate`."""

    @torch.no_grad()
    def generate(
        self: HookedEncoderDecoder,
        input: Any = "",
        one_zero_attention_mask: Int[Tensor, "batch pos"] | None = None,
        max_new_tokens: int = 10,
        stop_at_eos: bool = True,
        eos_token_id: int | list[int] | None = None,
        do_sample: bool = True,
        top_k: int | None = None,
        top_p: float | None = None,
        temperature: float = 1.0,
        freq_penalty: float = 0.0,
        return_type: Literal["input", "str", "tensor", "tokens"] = "input",
        verbose: bool = True,
        *,
        decoder_input: Int[Tensor, "batch decoder_pos"] | None = None,
    ) -> str | list[str] | Int[Tensor, "batch decoder_pos"]:
        """What the decoder says: a start token (or ``decoder_input``) and ``max_new_tokens`` more.

        ``input`` is the encoder's: text, texts or tokens; text gives text back, without special
        tokens. Hooks stay active: the encoder runs once, the decoder over all its tokens for each
        new one. ``do_sample=False`` or ``temperature=0`` is greedy. Rows that met eos are padded.
        ``verbose`` shows a progress bar. Raises InputError when no eos token is known to stop at.
        """
        if return_type not in RETURN_TYPES:
            raise InputError(f"return_type={return_type!r}: expected one of {RETURN_TYPES}")
        says_text = return_type == "str" or (
            return_type == "input" and not isinstance(input, Tensor)
        )
        if says_text and self.tokenizer is None:
            raise TokenizerError(f"return_type={return_type!r} needs a tokenizer")
        stops = self._stop_tokens(eos_token_id) if stop_at_eos else []
        padding = self._padding(stops)
        tokens, mask = self._read(input, one_zero_attention_mask)
        said = self._start(len(tokens)) if decoder_input is None else decoder_input
        said = self._checked(said, "decoder_input")
        self.run_state.runs += 1
        encoded = self.encoder_output(tokens, mask)
        done = torch.zeros(len(tokens), dtype=torch.bool, device=said.device)
        for _ in tqdm(range(max_new_tokens), disable=not verbose, leave=False):
            resid = self.decoder_output(said, encoded, mask)
            logits = self.hook_logits(self.unembed(resid))[:, -1]
            if do_sample:
                new = sample_logits(logits, top_k, top_p, temperature, freq_penalty, said)
            else:
                new = logits.argmax(-1)
            new = torch.where(done, padding, new)
            said = torch.cat([said, new[:, None]], dim=1)
            done |= torch.isin(new, torch.tensor(stops, device=new.device, dtype=new.dtype))
            if done.all():
                break
        if not says_text:
            return said
        texts = self.tokenizer.batch_decode(said, skip_special_tokens=True)
        return texts[0] if isinstance(input, str) else texts

    def _stop_tokens(self: HookedEncoderDecoder, given: int | list[int] | None) -> list[int]:
        found: Any = given
        if found is None and self.tokenizer is not None:
            found = self.tokenizer.eos_token_id
        if found is None:
            found = self._hf_config.eos_token_id
        if found is None:
            raise InputError(
                "no end-of-sequence token is known: pass eos_token_id=, or stop_at_eos=False"
            )
        return [found] if isinstance(found, int) else list(found)

    def _padding(self: HookedEncoderDecoder, stops: list[int]) -> int:
        """What rows that are done go on with."""
        if self.tokenizer is not None and self.tokenizer.pad_token_id is not None:
            return self.tokenizer.pad_token_id
        own = self._hf_config.pad_token_id
        return own if own is not None else (stops or [0])[0]
