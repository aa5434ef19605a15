"""`HookedEncoder`: BERT with a hook point everywhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from hookedlm.axes import LOGITS, STREAM
from hookedlm.caching import CachingMethods
from hookedlm.config import HookedTransformerConfig
from hookedlm.convert.check import TOLERANCES
from hookedlm.convert.encoder import EncoderLayers, bidirectional_mask, truth_of
from hookedlm.driver import LatestContexts
from hookedlm.encoder.loading import fresh_layers, load_encoder
from hookedlm.errors import ConversionError, InputError, TokenizerError, WeightError
from hookedlm.hooks import HookPoint
from hookedlm.layers.context import Context
from hookedlm.model import HookedTransformer
from hookedlm.placing import PlacingMethods
from hookedlm.root import HookedRootModule
from hookedlm.weights import WeightMethods

Tokens = Int[Tensor, "batch pos"]
Input = str | Sequence[str] | Tokens | Int[Tensor, "pos"]
ReturnType = Literal["logits", "predictions", "next_sentence"] | None
RETURN_TYPES = ("logits", "predictions", "next_sentence", None)


class HookedEncoder(CachingMethods, WeightMethods, PlacingMethods, HookedRootModule):
    """A BERT as one instrumented encoder, on Hugging Face's own tensors.

    Hook names are the classic ones (docs/hooks.md): ``embed.hook_embed``, ``hook_full_embed``,
    ``blocks.L.hook_resid_pre``, ..., ``blocks.L.hook_normalized_resid_post``. Source: arXiv
    1810.04805.
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
        self.cfg = HookedTransformerConfig.unwrap(cfg)
        if self.cfg.n_devices != 1:
            raise InputError("n_devices: an encoder stands on one device here")
        self.tokenizer = tokenizer
        layers = fresh_layers(self.cfg) if layers is None else layers
        self._mask_config = layers.config
        self._outside: list[Any] = []
        self.driver = LatestContexts()
        self.embed = layers.embed
        self.hook_full_embed = HookPoint(STREAM, shares=True)
        self.blocks = nn.ModuleList(layers.blocks)
        self.ln_final = None
        self.mlm_head = layers.mlm_head
        self.unembed = layers.unembed
        self.hook_logits = HookPoint(LOGITS)
        self.pooler = layers.pooler
        self.nsp_head = layers.nsp_head
        self.setup()
        if move_to_device and self.cfg.device is not None:
            self.to(self.cfg.device)

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
        """A BERT from the hub, a local folder, or ``hf_model``; compared with Hugging Face's.

        Heads without weights in the checkpoint are left out, and using them is an error. Raises
        LoadError when there is nothing to read, ConversionError when the numbers differ.
        """
        if checkpoint_index is not None or checkpoint_value is not None:
            raise NotImplementedError("checkpoints of encoders: name a revision=... instead")
        loaded = load_encoder(model_name, hf_model, tokenizer, dtype, from_pretrained_kwargs)
        hooked = cls(loaded.cfg, loaded.tokenizer, move_to_device=False, layers=loaded.layers)
        hooked.eval()
        hooked._check(loaded.hf_model)
        if loaded.casts or device is not None:
            hooked.to(device=device or hooked.device, dtype=loaded.dtype)
        elif move_to_device and hf_model is None:
            hooked.to(loaded.device)
        return hooked

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
        parts = (found["input_ids"], found["token_type_ids"], found["attention_mask"])
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
        resid = self.hook_full_embed(self.embed(tokens, types.to(tokens.device)))
        mask = one_zero_attention_mask
        mask = None if mask is None else mask.to(tokens.device)
        context = Context(mask=bidirectional_mask(self._mask_config, resid.detach(), mask))
        self.driver.latest = [context] * len(self.blocks)
        for block in self.blocks:
            resid = block(resid, context)
        return resid

    def forward(
        self,
        input: Input,
        return_type: ReturnType = "logits",
        token_type_ids: Tokens | None = None,
        one_zero_attention_mask: Tokens | None = None,
    ) -> Any:
        """Logits of the masked-language-model head ``[batch, pos, d_vocab]``.

        ``return_type``: "logits"; "predictions", the likeliest tokens at the masked positions (a
        string for one, a list for several); "next_sentence", logits ``[batch, 2]``; None. Raises
        InputError on other types and on heads that this model has not.
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
        if return_type == "next_sentence":
            if self.pooler is None or self.nsp_head is None:
                raise InputError("this model has no pooler and next-sentence head")
            return self.nsp_head(self.pooler(resid))
        if return_type is None:
            return self._heads_listened_to(resid)
        logits = self._logits(resid)
        return logits if return_type == "logits" else self._predictions(tokens, logits)

    def _heads_listened_to(self, resid: Tensor) -> None:
        """Run the heads only where somebody wants to see what passes in them."""
        wanted = {name.split(".")[0] for name, point in self.hook_dict.items() if point.wanted}
        if self.mlm_head is not None and wanted & {"mlm_head", "hook_logits"}:
            self._logits(resid)
        if self.pooler is not None and wanted & {"pooler", "nsp_head"}:
            pooled = self.pooler(resid)
            if self.nsp_head is not None:
                self.nsp_head(pooled)

    def _logits(self, resid: Tensor) -> Float[Tensor, "batch pos d_vocab"]:
        if self.mlm_head is None or self.unembed is None:
            raise InputError(
                "this model has no masked-language-model head: use encoder_output, or "
                "return_type='next_sentence'"
            )
        return self.hook_logits(self.unembed(self.mlm_head(resid)))

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
        """Compare with Hugging Face's model on a padded batch, unheard and with every hook on."""
        n = min(11, self.cfg.n_ctx)
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(self.cfg.d_vocab, (2, n), generator=generator).to(self.device)
        types = torch.zeros_like(tokens)
        types[:, n // 2 :] = 1 if len(self.embed.token_type_embed.W_token_type) > 1 else 0
        mask = torch.ones_like(tokens)
        mask[1, max(1, 2 * n // 3) :] = 0
        inputs = {"input_ids": tokens, "token_type_ids": types, "attention_mask": mask}
        truth = truth_of(hf_model, inputs)
        limit = TOLERANCES[self.dtype]
        everywhere = [(lambda name: True, lambda x, hook: None)]
        for hooks in ([], everywhere):
            with self.hooks(fwd_hooks=hooks):
                resid = self.encoder_output(tokens, types, mask)
                ours = {"stream": resid}
                if self.mlm_head is not None:
                    ours["logits"] = self._logits(resid)
                if self.pooler is not None:
                    pooled = self.pooler(resid)
                    if self.nsp_head is not None:
                        ours["next_sentence"] = self.nsp_head(pooled)
            for name, x in ours.items():
                real = mask.bool() if x.ndim == 3 else slice(None)
                y = truth[name]
                error = float((x[real] - y[real]).abs().max() / y[real].abs().max().clamp(min=1e-9))
                if not error <= limit:
                    raise ConversionError(
                        f"{name} differ from Hugging Face's by {error:.1e} (allowed {limit:.0e})"
                    )

    # Names ----------------------------------------------------------------------------------------

    is_in_full_cache = HookedTransformer.is_in_full_cache
    set_use_attn_result = HookedTransformer.set_use_attn_result
    set_use_split_qkv_input = HookedTransformer.set_use_split_qkv_input
    set_use_attn_in = HookedTransformer.set_use_attn_in
    set_use_hook_mlp_in = HookedTransformer.set_use_hook_mlp_in

    def cache_size(self, *args: Any, **kwargs: Any) -> Any:
        """Not measured before a run: always raises NotImplementedError."""
        raise NotImplementedError("run_with_cache(...)[1].nbytes says what a run has recorded")

    def why_missing(self, name: str) -> str:
        """Why a point of the classic naming is absent from this model."""
        if name in ("hook_embed", "hook_pos_embed"):
            return f"An encoder's is embed.{name}."
        return ""

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
