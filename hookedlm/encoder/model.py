"""`HookedEncoder`: BERT and its relatives with a hook point everywhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from hookedlm.axes import LOGITS, STREAM
from hookedlm.config import HookedTransformerConfig
from hookedlm.convert.encoder import EncoderLayers, truth_of
from hookedlm.encoder.loading import DOOR, fresh_layers
from hookedlm.encoders import EncoderBase, Loaded
from hookedlm.errors import InputError, TokenizerError, WeightError
from hookedlm.hooks import HookPoint

Tokens = Int[Tensor, "batch pos"]
Input = str | Sequence[str] | Tokens | Int[Tensor, "pos"]
ReturnType = Literal["logits", "predictions", "next_sentence", "replaced"] | None
RETURN_TYPES = ("logits", "predictions", "next_sentence", "replaced", None)
HEADS = {
    "logits": "masked-language-model head",
    "replaced": "head that detects replaced tokens",
    "next_sentence": "pooler and next-sentence head",
}
POINTS = {
    "logits": {"mlm_head", "hook_logits"},
    "replaced": {"rtd_head"},
    "next_sentence": {"pooler", "nsp_head"},
    "pooled": {"pooler"},
}
"""Where the hook points of what each answer takes begin."""


class HookedEncoder(EncoderBase):
    """A BERT, RoBERTa (CamemBERT, XLM-R), ELECTRA or DistilBERT as one instrumented encoder, on
    Hugging Face's own tensors.

    Hook names are the classic ones (docs/hooks.md): ``embed.hook_embed``, ``hook_full_embed``,
    ``blocks.L.hook_resid_pre``, ..., ``blocks.L.hook_normalized_resid_post``. Sources: arXiv
    1810.04805, 1907.11692, 2003.10555, 1910.01108.
    """

    def __init__(
        self,
        cfg: HookedTransformerConfig | dict[str, Any],
        tokenizer: Any = None,
        move_to_device: bool = True,
        *,
        layers: EncoderLayers | None = None,
    ):
        super().__init__()
        self._begin(cfg)
        self.tokenizer = tokenizer
        layers = fresh_layers(self.cfg) if layers is None else layers
        self._mask_config = layers.config
        self.embed = layers.embed
        self.hook_full_embed = HookPoint(STREAM, shares=True)
        self.blocks = nn.ModuleList(layers.blocks)
        self.ln_final = None
        self.mlm_head = layers.mlm_head
        self.unembed = layers.unembed
        if self.unembed is not None:
            self.hook_logits = HookPoint(LOGITS)
        self.rtd_head = layers.rtd_head
        self.pooler = layers.pooler
        self.nsp_head = layers.nsp_head
        self._finish(move_to_device)

    @classmethod
    def from_pretrained(
        cls,
        model_name: str,
        checkpoint_index: int | None = None,
        checkpoint_value: int | None = None,
        hf_model: nn.Module | None = None,
        device: str | torch.device | None = None,
        tokenizer: Any = None,
        move_to_device: bool = True,
        dtype: str | torch.dtype = torch.float32,
        **from_pretrained_kwargs: Any,
    ) -> HookedEncoder:
        """An encoder from the hub, a local folder, or ``hf_model``; compared with Hugging Face's.

        Heads without weights in the checkpoint are left out, and using them is an error. Raises
        LoadError when there is nothing to read, ConversionError when the numbers differ.
        """
        cls._refuse_steps(checkpoint_index, checkpoint_value)
        loaded = DOOR.load(model_name, hf_model, tokenizer, dtype, from_pretrained_kwargs)
        return cls._pretrained(loaded, device, move_to_device)

    @classmethod
    def _of(cls, loaded: Loaded[EncoderLayers]) -> HookedEncoder:
        return cls(loaded.cfg, loaded.companion, move_to_device=False, layers=loaded.layers)

    # Running --------------------------------------------------------------------------------------

    def to_tokens(
        self,
        input: str | Sequence[str] | Sequence[Sequence[str]],
        move_to_device: bool = True,
        truncate: bool = True,
    ) -> tuple[Tokens, Tokens, Tokens]:
        """(tokens, token types, mask of real positions), all ``[batch, pos]``, padded right.

        A text, several, or pairs of texts. Raises TokenizerError without a tokenizer.
        """
        if self.tokenizer is None:
            raise TokenizerError("this model has no tokenizer: pass tokens, or tokenizer=...")
        texts = [input] if isinstance(input, str) else [_text_or_pair(text) for text in input]
        found = self.tokenizer(
            texts,
            return_tensors="pt",
            padding=True,
            truncation=truncate,
            max_length=self.cfg.n_ctx if truncate else None,
            return_token_type_ids=True,
        )
        types = found["token_type_ids"].clamp(max=self.embed.n_types - 1)
        parts = (found["input_ids"], types, found["attention_mask"])
        if move_to_device:
            parts = tuple(part.to(self.device) for part in parts)
        return parts

    def encoder_output(
        self,
        tokens: Tokens,
        token_type_ids: Tokens | None = None,
        one_zero_attention_mask: Tokens | None = None,
    ) -> Float[Tensor, "batch pos d_model"]:
        """The stream behind the last block, normed: what the heads read.

        ``one_zero_attention_mask`` is 1 at real tokens; without one, all are. Raises InputError on
        tokens that are none and on shapes that do not fit.
        """
        tokens = self._checked(tokens)
        types = torch.zeros_like(tokens) if token_type_ids is None else token_type_ids
        for name, given in (("token_type_ids", types), ("attention mask", one_zero_attention_mask)):
            if given is not None and given.shape != tokens.shape:
                raise InputError(
                    f"{name} of shape {tuple(given.shape)}: expected {tuple(tokens.shape)}"
                )
        if types.device.type == "cpu" and int(types.max()) >= self.embed.n_types:
            raise InputError(
                f"token_type_ids up to {int(types.max())}: this model's types of tokens are 0 to "
                f"{self.embed.n_types - 1}"
            )
        resid = self.hook_full_embed(self.embed(tokens, types.to(tokens.device)))
        mask = one_zero_attention_mask
        return self._through_blocks(resid, None if mask is None else mask.to(tokens.device))

    def forward(
        self,
        input: Input,
        return_type: ReturnType = "logits",
        token_type_ids: Tokens | None = None,
        one_zero_attention_mask: Tokens | None = None,
    ) -> Any:
        """Logits of the masked-language-model head ``[batch, pos, d_vocab]``.

        ``return_type``: "logits"; "predictions", the likeliest tokens at the masked positions (a
        string for one, a list for several); "next_sentence", logits ``[batch, 2]``; "replaced",
        logits ``[batch, pos]`` of ELECTRA's discriminator; None. Raises InputError on other types
        and on heads that this model has not.
        """
        if return_type not in RETURN_TYPES:
            raise InputError(f"return_type={return_type!r}: expected one of {RETURN_TYPES}")
        if isinstance(input, Tensor):
            tokens = input if input.ndim == 2 else input[None]
        else:
            tokens, types, mask = self.to_tokens(input)
            token_type_ids = types if token_type_ids is None else token_type_ids
            if one_zero_attention_mask is None:
                one_zero_attention_mask = mask
        resid = self.encoder_output(tokens, token_type_ids, one_zero_attention_mask)
        if return_type is None:
            self._heads_listened_to(resid)
            return None
        found = self._answer(resid, "logits" if return_type == "predictions" else return_type)
        return self._predictions(tokens, found) if return_type == "predictions" else found

    @property
    def _answers(self) -> list[str]:
        """What this model's heads can say."""
        heads = {
            "logits": self.unembed,
            "replaced": self.rtd_head,
            "next_sentence": self.nsp_head if self.pooler is not None else None,
            "pooled": self.pooler if self.nsp_head is None else None,
        }
        return [name for name, head in heads.items() if head is not None]

    def _heads_listened_to(self, resid: Tensor) -> None:
        """Run the heads only where somebody wants to see what passes in them."""
        wanted = {name.split(".")[0] for name, point in self.hook_dict.items() if point.wanted}
        for name in self._answers:
            if wanted & POINTS[name]:
                self._answer(resid, name)

    def _answer(self, resid: Tensor, name: str) -> Tensor:
        """What one head makes of the stream; raises InputError without it."""
        if name not in self._answers:
            raise InputError(
                f"this model has no {HEADS[name]}: use encoder_output"
                + "".join(
                    f", or return_type={other!r}" for other in self._answers if other in HEADS
                )
            )
        if name == "replaced":
            return self.rtd_head(resid)
        if name == "logits":
            return self.hook_logits(self.unembed(self.mlm_head(resid)))
        pooled = self.pooler(resid)
        return pooled if name == "pooled" else self.nsp_head(pooled)

    def _predictions(self, tokens: Tokens, logits: Tensor) -> str | list[str]:
        if self.tokenizer is None or self.tokenizer.mask_token_id is None:
            raise TokenizerError("predictions need a tokenizer with a mask token")
        masked = tokens.to(logits.device) == self.tokenizer.mask_token_id
        if not masked.any():
            raise InputError(f"no {self.tokenizer.mask_token} in the input: nothing to predict")
        words = [self.tokenizer.decode([token]) for token in logits[masked].argmax(-1).tolist()]
        return words[0] if len(words) == 1 else words

    def _checked(self, tokens: Tokens) -> Tokens:
        if tokens.ndim != 2 or tokens.is_floating_point() or not tokens.numel():
            raise InputError(
                f"tokens of shape {tuple(tokens.shape)} and dtype {tokens.dtype}: expected "
                "integers [batch, pos]"
            )
        if tokens.shape[1] > self.cfg.n_ctx:
            raise InputError(f"{tokens.shape[1]} positions: this model has {self.cfg.n_ctx}")
        return tokens.to(self.device, torch.long)

    # Checking -------------------------------------------------------------------------------------

    @torch.no_grad()
    def _check(self, hf_model: Any) -> None:
        """Compare with Hugging Face's model on a padded batch; raises ConversionError."""
        n = min(11, self.cfg.n_ctx)
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(self.cfg.d_vocab, (2, n), generator=generator).to(self.device)
        mask = torch.ones_like(tokens)
        mask[1, max(1, 2 * n // 3) :] = 0
        pad = self._mask_config.pad_token_id
        if pad is not None:
            tokens[mask == 0] = pad
        types = torch.zeros_like(tokens)
        types[:, n // 2 :] = min(1, self.embed.n_types - 1)
        inputs = {"input_ids": tokens, "attention_mask": mask}
        if self.embed.token_type_embed is not None:
            inputs["token_type_ids"] = types
        truth = truth_of(hf_model, inputs)

        def run() -> dict[str, Tensor]:
            resid = self.encoder_output(tokens, types, mask)
            found = {name: self._answer(resid, name) for name in self._answers}
            if "replaced" in found:
                found["replaced"] = found["replaced"][..., None]
            return {"stream": resid} | found

        for name in self._answers:  # the only head's are called so
            truth.setdefault(name, truth.get("logits", truth["stream"]))
        if "replaced" in self._answers:
            truth["replaced"] = truth["replaced"][..., None]
        self._confirm(run, truth, dict.fromkeys(("stream", "logits", "replaced"), mask))

    # Names ----------------------------------------------------------------------------------------

    @property
    def W_E(self) -> Float[Tensor, "d_vocab d_model"]:
        """Token embeddings."""
        return self.embed.embed.W_E

    @property
    def W_pos(self) -> Float[Tensor, "n_ctx d_model"]:
        """Position embeddings."""
        return self.embed.pos_embed.W_pos

    @property
    def W_U(self) -> Float[Tensor, "d_model d_vocab"]:
        """From the masked-language-model head to logits."""
        if self.unembed is None:
            raise WeightError("this model has no masked-language-model head: there is no W_U")
        return self.unembed.W_U


def _text_or_pair(text: Any) -> Any:
    return text if isinstance(text, str) else tuple(text)
