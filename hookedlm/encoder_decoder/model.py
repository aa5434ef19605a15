"""`HookedEncoderDecoder`: T5 and BART with a hook point everywhere."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hookedlm.axes import LOGITS, STREAM
from hookedlm.config import HookedTransformerConfig
from hookedlm.convert.encoder_decoder import (
    EncoderDecoderLayers,
    decoder_context,
    encoder_context,
)
from hookedlm.encoder_decoder.check import check
from hookedlm.encoder_decoder.generation import GenerationMethods
from hookedlm.encoder_decoder.inputs import DecoderTokens, Input, InputMethods, Tokens
from hookedlm.encoder_decoder.loading import DOOR, fresh_layers
from hookedlm.encoders import EncoderBase, Loaded
from hookedlm.errors import InputError, WeightError
from hookedlm.hooks import HookPoint
from hookedlm.layers.context import Context
from hookedlm.layers.cross import CrossContext
from hookedlm.layers.norm import Same
from hookedlm.layers.relative import RelativeAttention

Stream = Float[Tensor, "batch pos d_model"]
DecoderStream = Float[Tensor, "batch decoder_pos d_model"]
ReturnType = Literal["logits"] | None


class HookedEncoderDecoder(InputMethods, GenerationMethods, EncoderBase):
    """A T5 or BART as one instrumented model, on Hugging Face's own tensors.

    Hook names are the classic ones (docs/hooks.md): ``hook_embed``, ``encoder.L.hook_resid_pre``,
    ..., ``decoder.L.hook_cross_attn_out``, ..., ``hook_logits``. Stacked weights are those of
    self-attention and MLPs, the encoder's layers before the decoder's. Sources: arXiv 1910.10683,
    1910.13461.
    """

    what = "encoder-decoder"

    def __init__(
        self,
        cfg: HookedTransformerConfig | dict[str, Any],
        tokenizer: Any = None,
        move_to_device: bool = True,
    ):
        super().__init__()
        self._begin(cfg)
        self.tokenizer = tokenizer
        # A config out of a checkpoint brings its layers along: a subclass has these arguments only.
        layers = vars(self.cfg).pop("layers_read", None)
        if layers is None:
            if self.cfg.d_vocab == -1 and tokenizer is not None:
                self.cfg.d_vocab = self.cfg.d_vocab_out = len(tokenizer)
            layers = fresh_layers(self.cfg)
        self._build(layers)
        self._finish(move_to_device)

    def _build(self, layers: EncoderDecoderLayers) -> None:
        """Put finished layers in, in the order in which their hooks fire."""
        self._hf_config = layers.config
        self.embed = layers.embed
        self.hook_embed = HookPoint(STREAM, shares=True)
        self.pos_embed = layers.encoder.pos_embed
        if self.pos_embed is not None:
            self.hook_pos_embed = HookPoint(STREAM, shares=True)
        self.encoder_embed_ln: nn.Module = layers.encoder.embed_ln or Same()
        self.encoder = nn.ModuleList(layers.encoder.blocks)
        self.encoder_final_ln: nn.Module = layers.encoder.final_ln or Same()
        self.hook_decoder_embed = HookPoint(STREAM, shares=True)
        self.decoder_pos_embed = layers.decoder.pos_embed
        if self.decoder_pos_embed is not None:
            self.hook_decoder_pos_embed = HookPoint(STREAM, shares=True)
        self.decoder_embed_ln: nn.Module = layers.decoder.embed_ln or Same()
        self.decoder = nn.ModuleList(layers.decoder.blocks)
        self.decoder_final_ln: nn.Module = layers.decoder.final_ln or Same()
        self.unembed = layers.unembed
        self.hook_logits = HookPoint(LOGITS)

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
        dtype: str | torch.dtype | None = torch.float32,
        **from_pretrained_kwargs: Any,
    ) -> HookedEncoderDecoder:
        """A T5 or BART from the hub, a local folder, or ``hf_model``; compared with Hugging Face's.

        Raises LoadError when there is nothing to read, ConversionError when the numbers differ.
        """
        cls._refuse_steps(checkpoint_index, checkpoint_value)
        loaded = DOOR.load(model_name, hf_model, tokenizer, dtype, from_pretrained_kwargs)
        return cls._pretrained(loaded, device, move_to_device)

    @classmethod
    def _of(cls, loaded: Loaded[EncoderDecoderLayers]) -> HookedEncoderDecoder:
        vars(loaded.cfg)["layers_read"] = loaded.layers
        return cls(loaded.cfg, loaded.companion, move_to_device=False)

    def _check(self, hf_model: Any) -> None:
        check(self, hf_model)

    # Running --------------------------------------------------------------------------------------

    def forward(
        self,
        input: Input,
        decoder_input: DecoderTokens | None = None,
        return_type: ReturnType = "logits",
        one_zero_attention_mask: Tokens | None = None,
        *,
        decoder_attention_mask: DecoderTokens | None = None,
    ) -> Float[Tensor, "batch decoder_pos d_vocab"] | None:
        """Logits of the decoder behind each token of ``decoder_input``.

        ``input`` is the encoder's: text, texts or tokens. For text ``decoder_input`` is the start
        token unless given. Masks are 1 at real tokens; without one, all of a tensor are. With
        ``return_type=None`` nothing is returned. Raises InputError on other types, on tokens that
        are none and on shapes that do not fit.
        """
        if return_type not in ("logits", None):
            raise InputError(f"return_type={return_type!r}: expected 'logits' or None")
        tokens, mask = self._read(input, one_zero_attention_mask)
        if decoder_input is None:
            if isinstance(input, Tensor):
                raise InputError(
                    "decoder_input is missing: what the decoder reads, beginning with its start "
                    "token. For text it may be left out"
                )
            decoder_input = self._start(len(tokens))
        decoder_tokens = self._checked(decoder_input, "decoder_input")
        decoder_mask = self._fitting(
            decoder_attention_mask, decoder_tokens, "decoder_attention_mask"
        )
        encoded = self.encoder_output(tokens, mask)
        resid = self.decoder_output(decoder_tokens, encoded, mask, decoder_mask)
        if return_type is None and not self.hook_logits.wanted:
            return None
        logits = self.hook_logits(self.unembed(resid))
        return logits if return_type == "logits" else None

    def encoder_output(
        self, tokens: Tokens, one_zero_attention_mask: Tokens | None = None
    ) -> Stream:
        """The encoder's stream behind its last norm: what cross-attention reads.

        Raises InputError on tokens that are none and on a mask of another shape.
        """
        tokens, mask = self._read(tokens, one_zero_attention_mask)
        resid = self.hook_embed(self.embed(tokens))
        if self.pos_embed is not None:
            places = self.pos_embed(tokens).expand(resid.shape)
            resid = resid + self.hook_pos_embed(places)
        resid = self.encoder_embed_ln(resid)
        self.driver.forget()
        context = encoder_context(self._hf_config, resid, mask)
        return self.encoder_final_ln(self._through(self.encoder, resid, context))

    def decoder_output(
        self,
        decoder_input: DecoderTokens,
        encoded: Stream,
        one_zero_attention_mask: Tokens | None = None,
        decoder_attention_mask: DecoderTokens | None = None,
    ) -> DecoderStream:
        """The decoder's stream behind its last norm, what the unembedding reads, for an encoder's
        output and mask.

        Raises InputError on tokens that are none and on another number of rows than ``encoded``.
        """
        tokens = self._checked(decoder_input, "decoder_input")
        if len(tokens) != len(encoded):
            raise InputError(
                f"decoder_input has {len(tokens)} rows and the encoder's input {len(encoded)}"
            )
        resid = self.hook_decoder_embed(self.embed(tokens))
        if self.decoder_pos_embed is not None:
            places = self.decoder_pos_embed(tokens).expand(resid.shape)
            resid = resid + self.hook_decoder_pos_embed(places)
        resid = self.decoder_embed_ln(resid)
        self.driver.latest = self.driver.latest[: len(self.encoder)]
        context = decoder_context(
            self._hf_config, resid, decoder_attention_mask, encoded, one_zero_attention_mask
        )
        return self.decoder_final_ln(self._through(self.decoder, resid, context))

    def _through(self, blocks: nn.ModuleList, resid: Stream, context: Context) -> Stream:
        """The stream behind all blocks of a stack, each with the bias by distance computed last."""
        for block in blocks:
            attn: Any = block.attn
            if isinstance(attn, RelativeAttention) and attn.has_relative_attention_bias:
                context = replace(context, bias=attn.position_bias(*resid.shape[:2]))
            self.driver.latest.append(_without_graph(context))
            resid = block(resid, context)
        return resid

    # Names ----------------------------------------------------------------------------------------

    def why_missing(self, name: str) -> str:
        """Why a point of the classic naming is absent from this model."""
        if name.startswith("blocks."):
            rest = name.removeprefix("blocks.")
            return f"This model has two stacks of blocks: encoder.{rest}, decoder.{rest}."
        if name == "hook_pos_embed":
            return "Positions are a bias on attention's scores here: encoder.0.attn.rel_pos_hook."
        return ""

    @property
    def W_pos(self) -> Float[Tensor, "n_ctx d_model"]:
        """The encoder's position embeddings; raises WeightError in a T5, which has none."""
        if self.pos_embed is None:
            raise WeightError(
                "no W_pos: positions are a bias on attention's scores here, "
                "encoder[0].attn.rel_pos_bias.weight"
            )
        return self.pos_embed.W_pos

    @property
    def blocks(self) -> nn.ModuleList:
        """There are two stacks: always raises InputError."""
        raise InputError(
            "this model has two stacks of blocks, model.encoder and model.decoder: what asks for "
            "one stream from the first layer to the last does not apply to it"
        )

    def all_composition_scores(self, mode: Literal["Q", "K", "V"]) -> Any:
        """Heads of two stacks do not compose in order of their layers: always raises InputError."""
        return self.blocks

    def all_head_labels(self) -> list[str]:
        """``["EL0H0", ..., "DL0H0", ...]``: heads of the encoder's layers, then the decoder's."""
        stacks: list[tuple[str, Any]] = [("E", self.encoder), ("D", self.decoder)]
        return [
            f"{letter}L{layer}H{head}"
            for letter, blocks in stacks
            for layer, block in enumerate(blocks)
            for head in range(block.attn.spec.n_heads)
        ]


def _without_graph(context: Context) -> Context:
    """What a cache needs of a context when it computes an entry."""
    bias = None if context.bias is None else context.bias.detach()
    context = replace(context, bias=bias)
    return replace(context, encoded=None) if isinstance(context, CrossContext) else context
