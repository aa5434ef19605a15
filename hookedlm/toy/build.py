"""Build: a config becomes layers, of the same classes as a converted model's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from hookedlm.axes import KEY, NEURONS, QUERY, SCALE, STREAM
from hookedlm.config import HookedTransformerConfig
from hookedlm.convert.build import Block, build_block
from hookedlm.layers import rotary
from hookedlm.layers.activations import activation
from hookedlm.layers.attention import Attention, AttentionTensors
from hookedlm.layers.block import Parts
from hookedlm.layers.embed import Embed, PosEmbed, Unembed
from hookedlm.layers.mlp import MLP, Activation, GatedMLP, MLPTensors
from hookedlm.layers.moe import MoE
from hookedlm.layers.norm import Norm
from hookedlm.layers.shortformer import ShortformerAttention
from hookedlm.layers.toy_moe import Experts, Router
from hookedlm.spec import AttentionSpec, BlockSpec, MLPSpec, MoESpec, NormSpec
from hookedlm.toy.initial import init_weights
from hookedlm.toy.prepare import ToyPreparer, window_of


@dataclass
class Layers:
    """Everything a model is put together from, in the order of the forward pass."""

    embed: Embed
    pos_embed: PosEmbed | None
    blocks: list[Block]
    ln_final: nn.Module | None
    unembed: Unembed
    preparer: ToyPreparer

    def tree(self) -> nn.Module:
        """The layers as one module, under the names they have in a model."""
        parts = {
            "embed": self.embed,
            "pos_embed": self.pos_embed,
            "blocks": nn.ModuleList(self.blocks),
            "ln_final": self.ln_final,
            "unembed": self.unembed,
        }
        return nn.ModuleDict({name: part for name, part in parts.items() if part is not None})


def build_layers(cfg: HookedTransformerConfig) -> Layers:
    """New layers with initial weights; raises ConfigError if the config can't be built.

    With ``cfg.init_weights=False`` all weights are zero (those of norms one).
    """
    cfg.check_buildable()
    make = LayerMaker(cfg)
    embed = make.embed()
    layers = Layers(
        embed=embed,
        pos_embed=make.pos_embed(),
        blocks=[make.block(layer) for layer in range(cfg.n_layers)],
        ln_final=make.ln_final(),
        unembed=make.unembed(cast(Tensor, embed.W_E) if cfg.tie_word_embeddings else None),
        preparer=ToyPreparer(cfg),
    )
    if cfg.init_weights:
        init_weights(layers, cfg)
    return layers


class LayerMaker:
    """Single parts, weights zero and norms one. Weights are views of the matrices that `F.linear`
    multiplies with."""

    def __init__(self, cfg: HookedTransformerConfig):
        self.cfg = cfg
        kind = cfg.normalization_type
        self.norms = None if kind is None else self.norm_spec(kind.removesuffix("Pre"))
        self.norm_weights = kind in ("LN", "RMS")

    def new(self, *shape: int) -> Tensor:
        """Zeros, laid out in memory as ``shape`` says."""
        return torch.zeros(shape, dtype=self.cfg.dtype, device=self.cfg.device)

    def weight(self, x: Tensor) -> Tensor:
        """``x`` to be trained (marked last: a view made while autograd is off forgets it)."""
        return x.detach().requires_grad_()

    def embed(self) -> Embed:
        """The token embedding."""
        cfg = self.cfg
        ln = self.norm(self.norm_spec("LN"), True) if cfg.post_embedding_ln else None
        return Embed(self.weight(self.new(cfg.d_vocab, cfg.d_model)), ln=ln)

    def pos_embed(self) -> PosEmbed | None:
        """The position embedding; None where positions are not learned."""
        if self.cfg.positional_embedding_type not in ("standard", "shortformer"):
            return None
        return PosEmbed(self.weight(self.new(self.cfg.n_ctx, self.cfg.d_model)))

    def ln_final(self) -> Norm | None:
        """The norm before the logits; None in models without norms."""
        final_rms = self.cfg.final_rms and self.norms is not None
        return self.norm(self.norm_spec("RMS") if final_rms else self.norms, self.norm_weights)

    def unembed(self, W_E: Tensor | None = None) -> Unembed:
        """The unembedding, tied to ``W_E [d_vocab, d_model]`` if that is given."""
        cfg, softcap = self.cfg, self.cfg.output_logits_soft_cap
        W_U = self.new(cfg.d_vocab_out, cfg.d_model) if W_E is None else W_E
        return Unembed(
            self.weight(W_U.t()),
            self.weight(self.new(cfg.d_vocab_out)),
            softcap=softcap if softcap > 0 else None,
        )

    def norm_spec(self, kind: str) -> NormSpec:
        """LayerNorm or RMSNorm with this model's epsilon."""
        if kind == "LN":
            return NormSpec("LN", self.cfg.eps)
        return NormSpec("RMS", self.cfg.eps, native=False)

    def norm(
        self,
        spec: NormSpec | None,
        weights: bool,
        width: int | None = None,
        axes: str = STREAM,
        scale_axes: str = SCALE,
        on_demand: bool = False,
    ) -> Norm | None:
        """The norm of a spec over ``width`` (by default the stream's); None for none."""
        if spec is None:
            return None
        width = width or self.cfg.d_model
        w = self.weight(self.new(width) + 1) if weights else None
        b = self.weight(self.new(width)) if weights and spec.centres else None
        return Norm(spec, w, b, scale_axes, axes, on_demand)

    def act(self) -> Activation:
        """The activation function of one layer; it may have parameters."""
        act = activation(self.cfg.act_fn)
        if isinstance(act, nn.Module):
            act.to(device=self.cfg.device, dtype=self.cfg.dtype)
        return act

    def block(self, layer: int) -> Block:
        """One block."""
        cfg = self.cfg
        mlp = None if cfg.attn_only else self.moe() if cfg.num_experts else self.mlp()
        post = self.norms if cfg.use_normalization_before_and_after else None
        before_mlp, after_mlp = (self.norms, post) if mlp is not None else (None, None)
        parts = Parts(
            attn=self.attention(layer),
            mlp=mlp,
            ln1=self.norm(self.norms, self.norm_weights),
            ln2=self.norm(before_mlp, self.norm_weights),
            ln1_post=self.norm(post, self.norm_weights),
            ln2_post=self.norm(after_mlp, self.norm_weights),
        )
        parallel = cfg.parallel_attn_mlp and mlp is not None
        spec = BlockSpec(
            layout="parallel" if parallel else "sequential",
            attn=parts.attn.spec,
            mlp=None if mlp is None else mlp.spec,
            ln1=self.norms,
            ln2=before_mlp,
            ln1_post=post,
            ln2_post=after_mlp,
            branches_first=False,
        )
        return build_block(spec, parts)

    def attention(self, layer: int) -> Attention:
        """The attention of one layer."""
        cfg, d, e = self.cfg, self.cfg.d_model, self.cfg.d_head
        spec = _attention_spec(cfg, layer)

        def into_heads(n: int) -> Tensor:
            return self.weight(self.new(n, e, d).transpose(1, 2))

        tensors = AttentionTensors(
            W_Q=into_heads(spec.n_heads),
            W_K=into_heads(spec.n_kv_heads),
            W_V=into_heads(spec.n_kv_heads),
            W_O=self.weight(self.new(d, spec.n_heads, e).permute(1, 2, 0)),
            b_Q=self.weight(self.new(spec.n_heads, e)),
            b_K=self.weight(self.new(spec.n_kv_heads, e)),
            b_V=self.weight(self.new(spec.n_kv_heads, e)),
            b_O=self.weight(self.new(d)),
        )
        rotate = rotary.rotate_pairs if cfg.rotary_adjacent_pairs else rotary.rotate_halves
        norm = self.norm_spec("RMS") if cfg.use_qk_norm else None
        q_norm, k_norm = (
            self.norm(norm, True, e, axes, axes.replace("d_head", "1"), on_demand=True)
            for axes in (QUERY, KEY)
        )
        shortformer = cfg.positional_embedding_type == "shortformer"
        kind = ShortformerAttention if shortformer else Attention
        return kind(spec, tensors, rotate, q_norm, k_norm)

    def mlp(self) -> MLP | GatedMLP:
        """A dense MLP. A gated one has no bias on its gate, as in TransformerLens."""
        cfg, d, m = self.cfg, self.cfg.d_model, self.cfg.d_mlp
        tensors = MLPTensors(
            W_in=self.weight(self.new(m, d).t()),
            W_out=self.weight(self.new(d, m).t()),
            b_in=self.weight(self.new(m)),
            b_out=self.weight(self.new(d)),
            W_gate=self.weight(self.new(m, d).t()) if cfg.gated_mlp else None,
        )
        act = self.act()
        if cfg.gated_mlp:
            return GatedMLP(MLPSpec(m, True, cfg.act_fn), tensors, act)
        norm = self.norm_spec("LN") if cfg.is_layer_norm_activation() else None
        ln = self.norm(norm, cfg.normalization_type == "LN", m, NEURONS)
        return MLP(MLPSpec(m, False, cfg.act_fn, norm), tensors, act, ln)

    def moe(self) -> MoE:
        """A mixture of experts (Mixtral's routing)."""
        cfg, d, m = self.cfg, self.cfg.d_model, self.cfg.d_mlp
        n, k = cfg.num_experts, cfg.experts_per_token
        experts = Experts(
            self.act(),
            W_in=self.weight(self.new(n, d, m)),
            W_out=self.weight(self.new(n, m, d)),
            W_gate=self.weight(self.new(n, d, m)) if cfg.gated_mlp else None,
            b_in=None if cfg.gated_mlp else self.weight(self.new(n, m)),
            b_out=None if cfg.gated_mlp else self.weight(self.new(n, d)),
        )
        router = Router(self.weight(self.new(n, d).t()), k)
        return MoE(MoESpec(n, k, d, m, cfg.act_fn), router, experts, router, experts)


def _attention_spec(cfg: HookedTransformerConfig, layer: int) -> AttentionSpec:
    divisor = cfg.attn_scale if cfg.use_attn_scale else 1.0
    if cfg.scale_attn_by_inverse_layer_idx:
        divisor *= layer + 1
    return AttentionSpec(
        n_heads=cfg.n_heads,
        n_kv_heads=cfg.n_key_value_heads or cfg.n_heads,
        d_head=cfg.d_head,
        scale=1.0 / divisor,
        rotary=cfg.positional_embedding_type == "rotary",
        softcap=cfg.attn_scores_soft_cap if cfg.attn_scores_soft_cap > 0 else None,
        qk_norm="head" if cfg.use_qk_norm else None,
        window=window_of(cfg, layer),
        causal=cfg.attention_dir == "causal",
    )
