"""`HookedTransformer`: a stream pushed through a list of blocks, with a hook point everywhere."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from hookedlm.axes import LOGITS, STREAM
from hookedlm.caching import CachingMethods
from hookedlm.config import HookedTransformerConfig
from hookedlm.convert.report import Fidelity
from hookedlm.driver import Driver, Preparer
from hookedlm.embeds import EmbedsMethods
from hookedlm.errors import InputError
from hookedlm.generation import GenerationMethods
from hookedlm.hooks import HookPoint
from hookedlm.inputs import Input, InputMethods, Stream, Tokens
from hookedlm.interventions.intervening import InterveneMethods
from hookedlm.layers.bert import BertMLMHead
from hookedlm.layers.block import AttentionBranch
from hookedlm.layers.embed import Embed, PosEmbed, TokenTypeEmbed, Unembed
from hookedlm.layers.norm import Norm
from hookedlm.lent import LentMethods, loop_of
from hookedlm.loss import lm_cross_entropy_loss
from hookedlm.missing import why_missing
from hookedlm.placing import PlacingMethods
from hookedlm.pretrained import PretrainedMethods
from hookedlm.processing import ProcessingMethods
from hookedlm.root import HookedRootModule
from hookedlm.samples import SampleMethods
from hookedlm.single import SingleRunMethods
from hookedlm.tokens import TokenMethods
from hookedlm.toy import build_layers, init_weights
from hookedlm.weights import WeightMethods

Logits = Float[Tensor, "batch pos d_vocab"]
Loss = Float[Tensor, "..."]
ReturnType = Literal["logits", "loss", "both"] | None
RETURN_TYPES = ("logits", "loss", "both", None)


class Output(NamedTuple):
    """What ``return_type="both"`` returns."""

    logits: Logits
    loss: Loss


class HookedTransformer(
    PretrainedMethods,
    ProcessingMethods,
    CachingMethods,
    SingleRunMethods,
    GenerationMethods,
    SampleMethods,
    InputMethods,
    EmbedsMethods,
    LentMethods,
    InterveneMethods,
    TokenMethods,
    WeightMethods,
    PlacingMethods,
    HookedRootModule,
):
    """A decoder-only language model as one uniform, instrumented transformer.

    From a Hugging Face model: `hookedlm.load` (its numbers, nothing folded) or `from_pretrained`
    (TransformerLens' defaults). From a `HookedTransformerConfig`: a model to train from scratch.
    Hook points, names and shapes: ``print(model.hook_points())``, or docs/hooks.md.
    """

    def __init__(
        self,
        cfg: HookedTransformerConfig | dict[str, Any],
        tokenizer: Any = None,
        move_to_device: bool = True,
        default_padding_side: Literal["left", "right"] = "right",
    ):
        super().__init__()
        self.cfg = HookedTransformerConfig.unwrap(cfg)
        self.default_padding_side = default_padding_side
        self.tokenizer: Any = None
        if tokenizer is not None:
            self.set_tokenizer(tokenizer, default_padding_side)
        self.history: list[Any] = []
        # A config out of a checkpoint brings its layers along: a subclass has these arguments only.
        layers = vars(self.cfg).pop("layers_read", None)
        self._build(build_layers(self.cfg) if layers is None else layers)
        if move_to_device and self.cfg.device is not None and self.conversion is None:
            self.to(self.cfg.device, print_details=False)

    def _build(self, layers: Any) -> None:
        """Put finished layers in, in the order in which their hooks fire."""
        preparer: Preparer = layers.preparer
        self.driver = Driver(preparer)
        self.conversion: Fidelity | None = vars(layers).get("fidelity")
        self._outside = [vars(layers).get("own"), preparer.module, vars(layers).get("tail")]
        if self.cfg.use_hook_tokens:
            self.hook_tokens = HookPoint("batch pos", shares=True)
        self.embed: Embed | None = layers.embed
        if vars(preparer).get("shows_embed", True):
            self.hook_embed = HookPoint(vars(layers).get("stream_axes", STREAM), shares=True)
        self.pos_embed: PosEmbed | None = layers.pos_embed
        if layers.pos_embed is not None:
            self.hook_pos_embed = HookPoint(STREAM, shares=True)
        type_embed: TokenTypeEmbed | None = vars(layers).get("type_embed")
        if type_embed is not None:
            self.token_type_embed = type_embed
            self.hook_token_type_embed = HookPoint(STREAM, shares=True)
        embed_ln: Norm | None = vars(layers).get("embed_ln")
        if embed_ln is not None:
            self.embed_ln = embed_ln
        self.blocks = nn.ModuleList(layers.blocks)
        self.ln_final: nn.Module | None = layers.ln_final
        mlm_head: BertMLMHead | None = vars(layers).get("mlm_head")
        if mlm_head is not None:
            self.mlm_head = mlm_head
        self.unembed: Unembed | None = layers.unembed
        self.hook_logits = HookPoint(LOGITS)
        self.set_ungroup_grouped_query_attention(self.cfg.ungroup_grouped_query_attention)
        self.setup()

    def init_weights(self) -> None:
        """Draw all weights anew as ``cfg.init_mode`` says (under ``cfg.seed`` if there is one)."""
        init_weights(self, self.cfg)

    # The forward pass -----------------------------------------------------------------------------

    def forward(
        self,
        input: Input | None = None,
        return_type: ReturnType = "logits",
        loss_per_token: bool = False,
        prepend_bos: bool | None = None,
        padding_side: Literal["left", "right"] | None = None,
        start_at_layer: int | None = None,
        tokens: Tokens | None = None,
        shortformer_pos_embed: Stream | None = None,
        attention_mask: Int[Tensor, "batch pos"] | None = None,
        stop_at_layer: int | None = None,
        past_kv_cache: Any = None,
        inputs_embeds: Stream | None = None,
        **others: Any,
    ) -> Any:
        """Logits ``[batch, pos, d_vocab]``, loss, both, or a residual stream.

        ``input``: text, texts, tokens, or (with ``start_at_layer``) the stream entering that
        layer. ``stop_at_layer`` returns the stream entering that layer (negative: from the end).
        ``attention_mask`` is 1 at real tokens; for texts it is known, for tokens it is inferred
        only on the left, from the tokenizer's padding. ``past_kv_cache`` is a transformers
        ``Cache``; the pass appends to it. With ``return_type=None`` only what somebody listens to
        is computed. ``inputs_embeds [batch, pos, d_model]`` stand where the rows of Hugging Face's
        embedding table would (images merged in, say). ``others``: what else Hugging Face's own
        model takes, by its names (``pixel_values``, ``token_type_ids``, ``position_ids``), where it
        takes any. Raises InputError on arguments that make no sense for this model.
        """
        start, stop = self._check(return_type, start_at_layer, stop_at_layer)
        if self._ungrouped != self.cfg.ungroup_grouped_query_attention:  # set on the config
            self.set_ungroup_grouped_query_attention(not self._ungrouped)
        self.driver.preparer.check(others)
        loop = loop_of(self)
        if loop is not None:
            self._check_lent(start_at_layer, shortformer_pos_embed)
        if start and (why := self.driver.preparer.no_start):
            raise InputError(f"start_at_layer={start_at_layer}: only 0 will do here, as {why}")
        if inputs_embeds is not None:
            tokens, mask = self._read_embeds(
                inputs_embeds, input, tokens, attention_mask, start_at_layer
            )
            stream, given = None, inputs_embeds
        else:
            tokens, mask, stream = self._read_input(
                input, prepend_bos, padding_side, start_at_layer, tokens, attention_mask
            )
            given = tokens if stream is None else stream
        past = self.get_pos_offset(past_kv_cache, given.shape[0])
        self.run_state.pos_offset = past
        # Text and masks say what is real; of bare tokens the loss infers it from the tokenizer.
        known = attention_mask is not None or not isinstance(input, Tensor)
        if loop is not None:
            until = stop if stop_at_layer is not None else self._until(return_type, past_kv_cache)
            found = self._run_lent(
                loop, tokens, inputs_embeds, mask, past, past_kv_cache, others, until
            )
            if until is not None:
                return None if stop_at_layer is None else found
            return self._answer(found, tokens, mask, known, return_type, loss_per_token)
        stream, prepared = self._enter(
            tokens, stream, mask, past, past_kv_cache, shortformer_pos_embed, inputs_embeds, others
        )
        if stop_at_layer is None and return_type is None and past_kv_cache is None:
            stop = max(start, self._last_needed())
        blocks = list(self.blocks)[start:stop]
        for block, context in zip(blocks, prepared.contexts[start:stop], strict=True):
            stream = block(stream, context)
        if stop_at_layer is not None:
            return stream
        if stop < len(self.blocks):
            self._entering[stop](stream)
        return self._leave(stream, tokens, mask, known, return_type, loss_per_token)

    def _check(
        self, return_type: ReturnType, start: int | None, stop: int | None
    ) -> tuple[int, int]:
        if return_type not in RETURN_TYPES:
            raise InputError(f"return_type={return_type!r}: expected one of {RETURN_TYPES}")
        n = len(self.blocks)
        first, last, _ = slice(start, stop).indices(n)
        for name, layer in (("start_at_layer", start), ("stop_at_layer", stop)):
            if layer is not None and not -n <= layer <= n:
                raise InputError(f"{name}={layer}: this model's {n} layers allow {-n} to {n}")
        return first, max(first, last)

    def _last_needed(self) -> int:
        """How many blocks must run when nobody asked for logits: up to the last one hooked, without
        it if the hook is where the stream enters it."""
        tail = [self.hook_logits, *self._final_points, *self._head_points]
        if any(point.wanted for point in tail):
            return len(self.blocks)
        wanted = [i for i, points in enumerate(self._block_points) if any(p.wanted for p in points)]
        if not wanted:
            return 0
        last = wanted[-1]
        inside = any(p.wanted for p in self._block_points[last] if p is not self._entering[last])
        return last + int(inside)

    def _leave(
        self,
        stream: Stream,
        tokens: Tokens | None,
        mask: Tensor | None,
        mask_known: bool,
        return_type: ReturnType,
        loss_per_token: bool,
    ) -> Any:
        read_out = [self.hook_logits, *self._head_points]
        if return_type is None and not any(point.wanted for point in read_out):
            if self.ln_final is not None and any(point.wanted for point in self._final_points):
                self.ln_final(stream)
            return None
        logits = self._logits(stream, tokens, mask)
        return self._answer(logits, tokens, mask, mask_known, return_type, loss_per_token)

    def _answer(
        self,
        logits: Logits,
        tokens: Tokens | None,
        mask: Tensor | None,
        mask_known: bool,
        return_type: ReturnType,
        loss_per_token: bool,
    ) -> Any:
        """What was asked for of these logits."""
        logits = self.hook_logits(logits)
        if return_type is None:
            return None
        if return_type == "logits":
            return logits
        if tokens is None:
            raise InputError("the loss needs tokens: pass tokens= beside the residual stream")
        real = torch.ones_like(tokens) if mask_known else None
        if mask is not None:
            real = mask[:, -tokens.shape[1] :]
        loss = self.loss_fn(logits, tokens, real, per_token=loss_per_token)
        return loss if return_type == "loss" else Output(logits, loss)

    def _logits(self, stream: Stream, tokens: Tokens | None, mask: Tensor | None) -> Logits:
        if self.unembed is None:
            positions = (
                None
                if mask is None
                else self.driver.positions(mask, stream.shape[1], 0, stream.device)
            )
            return self._outside[2](stream, tokens, mask, positions)
        stream = stream if self.ln_final is None else self.ln_final(stream)
        return self.unembed(self.mlm_head(stream) if self._head_points else stream)

    def loss_fn(
        self,
        logits: Logits,
        tokens: Tokens,
        attention_mask: Int[Tensor, "batch pos"] | None = None,
        per_token: bool = False,
    ) -> Loss:
        """Next-token cross-entropy: mean over real predictions, or ``[batch, pos - 1]``.

        Without a mask, padding is inferred from the tokenizer as `padding_mask` does.
        """
        if tokens.device != logits.device:
            tokens = tokens.to(logits.device)
        if attention_mask is None and self.tokenizer is not None and tokens.shape[0] > 1:
            attention_mask = self.padding_mask(tokens)
        return lm_cross_entropy_loss(logits, tokens, attention_mask, per_token)

    # Names ----------------------------------------------------------------------------------------

    def setup(self) -> None:
        """Name every hook point; call again after adding or replacing modules."""
        super().setup()
        self._block_points = [self._points_under(f"blocks.{i}.") for i in range(len(self.blocks))]
        self._entering = [
            self.hook_dict[f"blocks.{i}.hook_resid_pre"] for i in range(len(self.blocks))
        ]
        self._final_points = self._points_under("ln_final.")
        self._head_points = self._points_under("mlm_head.")

    def _points_under(self, prefix: str) -> list[HookPoint]:
        return [point for name, point in self.hook_dict.items() if name.startswith(prefix)]

    def is_in_full_cache(self, point: HookPoint) -> bool:
        """On-demand points are part of "everything" once the matching cfg flag is on."""
        if not point.on_demand:
            return True
        last = (point.name or "").rsplit(".", 1)[-1]
        flags = {
            "hook_result": self.cfg.use_attn_result,
            "hook_q_input": self.cfg.use_split_qkv_input,
            "hook_k_input": self.cfg.use_split_qkv_input,
            "hook_v_input": self.cfg.use_split_qkv_input,
            "hook_attn_in": self.cfg.use_attn_in,
            "hook_cross_attn_in": self.cfg.use_attn_in,
            "hook_mlp_in": self.cfg.use_hook_mlp_in,
        }
        return flags.get(last, False)

    def why_missing(self, name: str) -> str:
        """Why a point of the classic naming is absent from this model."""
        return why_missing(self, name)

    def set_use_attn_result(self, use_attn_result: bool) -> None:
        """Whether ``attn.hook_result`` is part of a full cache; hooking it works either way."""
        self.cfg.use_attn_result = use_attn_result

    def set_use_split_qkv_input(self, use_split_qkv_input: bool) -> None:
        """Whether ``hook_{q,k,v}_input`` are part of a full cache; hooking works either way."""
        self.cfg.use_split_qkv_input = use_split_qkv_input

    def set_use_attn_in(self, use_attn_in: bool) -> None:
        """Whether ``hook_attn_in`` is part of a full cache; hooking it works either way."""
        if use_attn_in and not any(name.endswith("hook_attn_in") for name in self.hook_dict):
            raise InputError(
                "hook_attn_in needs as many key/value heads as query heads; this model's queries "
                "are grouped. Use hook_q_input, hook_k_input and hook_v_input."
            )
        self.cfg.use_attn_in = use_attn_in

    def set_use_hook_mlp_in(self, use_hook_mlp_in: bool) -> None:
        """Whether ``hook_mlp_in`` is part of a full cache; hooking it works either way."""
        self.cfg.use_hook_mlp_in = use_hook_mlp_in

    def set_ungroup_grouped_query_attention(self, ungroup_grouped_query_attention: bool) -> None:
        """Whether `hook_k`, `hook_v`, `hook_rot_k`, `hook_k_input` and `hook_v_input` have a head
        for every query head, each to be edited alone, where queries are grouped.

        What the model computes stays the same. A key-value cache belongs to one setting.
        """
        self.cfg.ungroup_grouped_query_attention = self._ungrouped = ungroup_grouped_query_attention
        for block in self.blocks:
            if isinstance(block, AttentionBranch):
                block.ungroup(ungroup_grouped_query_attention)

    def fidelity(self) -> Fidelity:
        """How every part compared with Hugging Face's when this model was loaded; print it.

        Raises InputError for models built from a config, which have no original.
        """
        if self.conversion is None:
            raise InputError("this model was built from a config: there is no original to compare")
        return self.conversion
