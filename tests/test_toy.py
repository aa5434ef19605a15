"""Toy models against a transformer written out with einsum, head by head and key by key."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hookedlm.config import HookedTransformerConfig as Config
from hookedlm.errors import ConfigError, InputError
from hookedlm.hooks import HookRequest, attached
from hookedlm.layers import rotary
from hookedlm.layers.activations import ACTIVATIONS, XIELU, activation
from hookedlm.toy import build_layers, init_weights
from hookedlm.toy.prepare import alibi_slopes

TOY = dict(
    n_layers=2, d_model=24, n_ctx=12, d_head=6, d_vocab=19, act_fn="gelu", seed=0, device="cpu"
)
ROTARY = dict(positional_embedding_type="rotary")
LOCAL = dict(use_local_attn=True, window_size=3, attn_types=["local", "global"])
MOE = dict(num_experts=4, experts_per_token=2)

OPTIONS = {
    "plain": {},
    "attn_only": dict(attn_only=True, act_fn=None),
    "attn_only_parallel": dict(attn_only=True, act_fn=None, parallel_attn_mlp=True),
    "no_norm": dict(normalization_type=None),
    "LNPre": dict(normalization_type="LNPre"),
    "RMS": dict(normalization_type="RMS"),
    "RMSPre": dict(normalization_type="RMSPre"),
    "final_rms": dict(final_rms=True),
    "final_rms_pre": dict(final_rms=True, normalization_type="LNPre"),
    "eps": dict(eps=0.3),
    **{f"act_{name}": dict(act_fn=name) for name in (*ACTIVATIONS, "xielu")},
    "solu_ln_pre": dict(act_fn="solu_ln", normalization_type="LNPre"),
    "gated": dict(gated_mlp=True, act_fn="silu"),
    "gated_xielu": dict(gated_mlp=True, act_fn="xielu"),
    "no_positions": dict(positional_embedding_type=None),
    "rotary": ROTARY,
    "rotary_part": dict(**ROTARY, rotary_dim=4, rotary_base=100),
    "rotary_pairs": dict(**ROTARY, rotary_dim=4, rotary_adjacent_pairs=True),
    "rotary_local": dict(**ROTARY, **LOCAL, rotary_base_local=50),
    "rotary_ntk": dict(
        **ROTARY, use_NTK_by_parts_rope=True, NTK_original_ctx_len=40, rotary_base=100
    ),
    "shortformer": dict(positional_embedding_type="shortformer", normalization_type=None),
    "shortformer_LN": dict(positional_embedding_type="shortformer", parallel_attn_mlp=True),
    "shortformer_attn_only": dict(
        positional_embedding_type="shortformer", normalization_type=None, attn_only=True
    ),
    "alibi": dict(positional_embedding_type="alibi"),
    "alibi_3": dict(positional_embedding_type="alibi", n_heads=3),
    "alibi_capped_local": dict(
        positional_embedding_type="alibi", **LOCAL, attn_scores_soft_cap=2.0
    ),
    "local": LOCAL,
    "bidirectional": dict(attention_dir="bidirectional"),
    "bidirectional_local": dict(attention_dir="bidirectional", **LOCAL),
    "bidirectional_alibi": dict(attention_dir="bidirectional", positional_embedding_type="alibi"),
    "scale": dict(attn_scale=1.7),
    "no_scale": dict(use_attn_scale=False),
    "by_layer": dict(scale_attn_by_inverse_layer_idx=True),
    "qk_norm": dict(use_qk_norm=True, n_key_value_heads=2, **ROTARY),
    "score_cap": dict(attn_scores_soft_cap=1.5),
    "logit_cap": dict(output_logits_soft_cap=2.5),
    "before_and_after_LN": dict(use_normalization_before_and_after=True),
    "before_and_after_RMS": dict(
        use_normalization_before_and_after=True, normalization_type="RMS", parallel_attn_mlp=True
    ),
    "before_and_after_attn_only": dict(use_normalization_before_and_after=True, attn_only=True),
    "parallel": dict(parallel_attn_mlp=True),
    "embed_ln": dict(post_embedding_ln=True),
    "grouped": dict(n_key_value_heads=2),
    "one_kv_head": dict(n_key_value_heads=1, **ROTARY),
    "odd_heads": dict(n_heads=3, d_head=10),
    "moe": MOE,
    "moe_gated": dict(**MOE, gated_mlp=True, act_fn="silu"),
    "moe_xielu": dict(**MOE, act_fn="xielu"),
    "tied": dict(tie_word_embeddings=True),
    "d_vocab_out": dict(d_vocab_out=5),
}


def randomised(layers, seed=1):
    """Every parameter random, those included that start as zeros or ones."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in layers.tree().named_parameters():
            spread = 0.8 if "." not in name else 1 / math.sqrt(p.shape[-2]) if p.ndim > 1 else 0.5
            p.copy_(torch.randn(p.shape, generator=generator) * spread)
    return layers


def built(**changes):
    cfg = Config(**(TOY | changes))
    return cfg, randomised(build_layers(cfg))


def some_tokens(cfg, batch=2, n=9):
    generator = torch.Generator().manual_seed(7)
    return torch.randint(cfg.d_vocab, (batch, n), generator=generator)


def run(cfg, layers, tokens, attention_mask=None, hooked=False, splits=False):
    """What a model's forward does with layers, step by step."""
    n = tokens.shape[1]
    x = layers.embed(tokens)
    positions = torch.arange(n)[None]
    if attention_mask is not None:
        positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)
    extra = {}
    if layers.pos_embed is not None:
        places = layers.pos_embed.at(positions).expand(x.shape)
        if cfg.positional_embedding_type == "shortformer":
            extra = {"pos_embed": places}
        else:
            x = x + places
    prepared = layers.preparer(embeds=x.detach(), attention_mask=attention_mask, **extra)
    points = []
    for block in layers.blocks:
        points += [block.attn.hook_pattern] if hooked else []
        points += [block.mlp.hook_expert_out] if hooked and cfg.num_experts else []
        points += [block.hook_q_input, block.hook_k_input, block.hook_v_input] if splits else []
    with attached(HookRequest(point, lambda x, hook: x) for point in points):
        for block, context in zip(layers.blocks, prepared.contexts, strict=True):
            x = block(x, context)
    return layers.unembed(x if layers.ln_final is None else layers.ln_final(x))


# The truth ----------------------------------------------------------------------------------------


class Truth:
    """The same function, one token and one head at a time, from the named weights."""

    def __init__(self, cfg, layers):
        self.cfg = cfg
        self.w = {name: p.detach() for name, p in layers.tree().named_parameters()}

    def get(self, name, default=0.0):
        return self.w.get(name, default)

    def norm(self, kind, name, x):
        if kind is None:
            return x
        if kind.startswith("LN"):
            x = x - x.mean(-1, keepdim=True)
        x = x / torch.sqrt((x * x).mean(-1, keepdim=True) + self.cfg.eps)
        return x * self.get(f"{name}.w", 1.0) + self.get(f"{name}.b")

    def block_norm(self, name, x):
        return self.norm(self.cfg.normalization_type, name, x)

    def act(self, prefix, x):
        name = self.cfg.act_fn
        if name.startswith("solu"):
            return x * torch.exp(x) / torch.exp(x).sum(-1, keepdim=True)
        if name == "xielu":
            a_p = torch.log1p(torch.exp(self.w[f"{prefix}.act_fn.alpha_p"]))
            a_n = 0.5 + torch.log1p(torch.exp(self.w[f"{prefix}.act_fn.alpha_n"]))
            return torch.where(x > 0, a_p * x**2 + 0.5 * x, a_n * (torch.exp(x) - 1 - x) + 0.5 * x)
        if name == "silu":
            return x / (1 + torch.exp(-x))
        if name == "relu":
            return (x + x.abs()) / 2
        if name == "gelu":
            return x * (1 + torch.erf(x / math.sqrt(2))) / 2
        return x / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    def rotated(self, x, positions, layer):
        """``x [pos, d_head]`` as complex numbers, turned."""
        cfg = self.cfg
        local = cfg.use_local_attn and cfg.attn_types[layer] == "local"
        own_base = local and cfg.rotary_base_local is not None
        base = cfg.rotary_base_local if own_base else cfg.rotary_base
        out = x.clone()
        half = cfg.rotary_dim // 2
        for i in range(half):
            frequency = base ** (-2 * i / cfg.rotary_dim)
            if cfg.use_NTK_by_parts_rope and not own_base:
                turns = cfg.NTK_original_ctx_len * frequency / (2 * math.pi)
                if turns < cfg.NTK_by_parts_low_freq_factor:
                    frequency /= cfg.NTK_by_parts_factor
                elif turns < cfg.NTK_by_parts_high_freq_factor:
                    low, high = cfg.NTK_by_parts_low_freq_factor, cfg.NTK_by_parts_high_freq_factor
                    keep = (turns - low) / (high - low)
                    frequency = keep * frequency + (1 - keep) * frequency / cfg.NTK_by_parts_factor
            a, b = (2 * i, 2 * i + 1) if cfg.rotary_adjacent_pairs else (i, i + half)
            z = torch.complex(x[:, a], x[:, b]) * torch.exp(1j * frequency * positions)
            out[:, a], out[:, b] = z.real, z.imag
        return out

    def attention(self, layer, x, places):
        """``x [pos, d_model]`` normed, and the places queries and keys also read."""
        cfg, n = self.cfg, x.shape[0]
        p = f"blocks.{layer}.attn"
        group = cfg.n_heads // (cfg.n_key_value_heads or cfg.n_heads)
        divisor = cfg.attn_scale if cfg.use_attn_scale else 1.0
        if cfg.scale_attn_by_inverse_layer_idx:
            divisor *= layer + 1
        local = cfg.use_local_attn and cfg.attn_types[layer] == "local"
        out = self.w[f"{p}.b_O"].repeat(n, 1)
        for h in range(cfg.n_heads):
            g = h // group
            q = torch.einsum("pd,de->pe", x + places, self.w[f"{p}.W_Q"][h]) + self.w[f"{p}.b_Q"][h]
            k = torch.einsum("pd,de->pe", x + places, self.w[f"{p}.W_K"][g]) + self.w[f"{p}.b_K"][g]
            v = torch.einsum("pd,de->pe", x, self.w[f"{p}.W_V"][g]) + self.w[f"{p}.b_V"][g]
            if cfg.use_qk_norm:
                q, k = self.norm("RMS", f"{p}.q_norm", q), self.norm("RMS", f"{p}.k_norm", k)
            if cfg.positional_embedding_type == "rotary":
                q, k = (self.rotated(y, torch.arange(n), layer) for y in (q, k))
            scores = torch.full((n, n), -torch.inf)
            for i in range(n):
                for j in range(n):
                    if cfg.attention_dir == "causal" and j > i:
                        continue
                    if local and abs(i - j) >= cfg.window_size:
                        continue
                    score = torch.dot(q[i], k[j]) / divisor
                    if cfg.attn_scores_soft_cap > 0:
                        cap = cfg.attn_scores_soft_cap
                        score = cap * torch.tanh(score / cap)
                    if cfg.positional_embedding_type == "alibi":
                        score = score - SLOPES[cfg.n_heads][h] * abs(i - j)
                    scores[i, j] = score
            z = torch.einsum("qk,ke->qe", torch.softmax(scores, -1), v)
            out = out + torch.einsum("qe,ed->qd", z, self.w[f"{p}.W_O"][h])
        return out

    def mlp(self, layer, x):
        p = f"blocks.{layer}.mlp"
        if self.cfg.num_experts:
            return self.mixture(p, x)
        pre = torch.einsum("pd,dm->pm", x, self.w[f"{p}.W_in"]) + self.w[f"{p}.b_in"]
        if self.cfg.gated_mlp:
            post = self.act(p, torch.einsum("pd,dm->pm", x, self.w[f"{p}.W_gate"])) * pre
        else:
            post = self.act(p, pre)
        if self.cfg.act_fn == "solu_ln":
            post = self.norm("LN", f"{p}.ln", post)
        return torch.einsum("pm,md->pd", post, self.w[f"{p}.W_out"]) + self.w[f"{p}.b_out"]

    def mixture(self, p, x):
        rows = []
        for token in x:
            probs = torch.softmax(torch.einsum("d,de->e", token, self.w[f"{p}.router.W_router"]), 0)
            best = sorted(range(self.cfg.num_experts), key=lambda e: -probs[e])
            best = best[: self.cfg.experts_per_token]
            total = sum(probs[e] for e in best)
            out = 0
            for e in best:
                pre = token @ self.get(f"{p}.experts.W_in")[e] + self.bias(f"{p}.experts.b_in", e)
                if self.cfg.gated_mlp:
                    gate = token @ self.w[f"{p}.experts.W_gate"][e]
                    post = self.act(f"{p}.experts", gate) * pre
                else:
                    post = self.act(f"{p}.experts", pre)
                y = post @ self.w[f"{p}.experts.W_out"][e] + self.bias(f"{p}.experts.b_out", e)
                out = out + probs[e] / total * y
            rows.append(out)
        return torch.stack(rows)

    def bias(self, name, e):
        return self.w[name][e] if name in self.w else 0.0

    def __call__(self, tokens):
        """Logits of one prompt ``[pos]``."""
        cfg, n = self.cfg, len(tokens)
        x = self.w["embed.W_E"][tokens]
        if cfg.post_embedding_ln:
            x = self.norm("LN", "embed.ln", x)
        places = self.w["pos_embed.W_pos"][:n] if "pos_embed.W_pos" in self.w else 0.0
        apart = cfg.positional_embedding_type == "shortformer"
        if not apart:
            x, places = x + places, 0.0
        both = cfg.use_normalization_before_and_after
        for layer in range(cfg.n_layers):
            p = f"blocks.{layer}"
            attn_out = self.attention(layer, self.block_norm(f"{p}.ln1", x), places)
            attn_out = self.block_norm(f"{p}.ln1_post", attn_out) if both else attn_out
            mid = x + attn_out
            if cfg.attn_only:
                x = mid
                continue
            read = x if cfg.parallel_attn_mlp else mid
            mlp_out = self.mlp(layer, self.block_norm(f"{p}.ln2", read))
            x = mid + (self.block_norm(f"{p}.ln2_post", mlp_out) if both else mlp_out)
        kind = cfg.normalization_type
        x = self.norm("RMS" if cfg.final_rms and kind is not None else kind, "ln_final", x)
        logits = torch.einsum("pd,dv->pv", x, self.w["unembed.W_U"]) + self.w["unembed.b_U"]
        cap = cfg.output_logits_soft_cap
        return cap * torch.tanh(logits / cap) if cap > 0 else logits


# From the paper: 1/2^1 ... 1/2^8 for eight heads; for three, those of two, then the first of four.
SLOPES = {4: [2**-2, 2**-4, 2**-6, 2**-8], 3: [2**-4, 2**-8, 2**-2]}


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_computes_what_it_says(option):
    cfg, layers = built(**OPTIONS[option])
    tokens = some_tokens(cfg)
    expected = torch.stack([Truth(cfg, layers)(prompt) for prompt in tokens])
    for ways in ({}, {"hooked": True}, {"splits": True}):
        got = run(cfg, layers, tokens, **ways)
        torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-5)


SAME = ("plain", "attn_only", "attn_only_parallel", "act_gelu")


@pytest.mark.parametrize("option", [name for name in OPTIONS if name not in SAME])
def test_an_option_is_not_ignored(option):
    """Its result differs from the plain model's with the same weights (or it has other ones)."""
    cfg, layers = built(**OPTIONS[option])
    base = {"attn_only": True, "act_fn": None} if cfg.attn_only else {}
    plain_cfg, plain = built(**base)
    names = {n: p.shape for n, p in layers.tree().named_parameters()}
    plain_names = {n: p.shape for n, p in plain.tree().named_parameters()}
    tokens = some_tokens(cfg)
    if names == plain_names:
        difference = run(cfg, layers, tokens) - run(plain_cfg, plain, tokens)
        assert difference.abs().max() > 1e-5


# Padding and caches -------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    "option", [name for name in OPTIONS if not name.startswith(("act_", "final"))]
)
@torch.no_grad()
def test_padding_changes_nothing(option, side):
    cfg, layers = built(**OPTIONS[option])
    tokens = some_tokens(cfg, batch=2, n=8)
    padded, mask = tokens.clone(), torch.ones_like(tokens)
    real = slice(3, None) if side == "left" else slice(None, 5)
    mask[1] = 0
    mask[1, real] = 1
    padded[1, real] = tokens[1, real]
    for hooked in (False, True):
        got = run(cfg, layers, padded, mask, hooked=hooked)
        assert got.isfinite().all()
        torch.testing.assert_close(got[0], run(cfg, layers, tokens[:1])[0], atol=2e-5, rtol=1e-5)
        alone = run(cfg, layers, tokens[1:, real])[0]
        torch.testing.assert_close(got[1, real], alone, atol=2e-5, rtol=1e-5)


class Lengths:
    def __init__(self, n):
        self.n = n

    def get_seq_length(self):
        return self.n


@pytest.mark.parametrize("n_new", [1, 3])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    "option", ["plain", "local", "rotary_local", "alibi", "shortformer", "grouped"]
)
@torch.no_grad()
def test_after_a_cache_the_contexts_continue(option, padded, n_new):
    """A pass over the last tokens, keys and values of the earlier ones supplied by hand."""
    cfg, layers = built(**OPTIONS[option])
    tokens, past = some_tokens(cfg, n=9), 9 - n_new
    mask = torch.ones_like(tokens)
    if padded:
        mask[1, :2] = 0
    expected = run(cfg, layers, tokens, mask)[:, past:]

    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    x = layers.embed(tokens)
    places = layers.pos_embed.at(positions) if layers.pos_embed is not None else None
    apart = cfg.positional_embedding_type == "shortformer"
    if places is not None and not apart:
        x = x + places

    def contexts(span, cache):
        return layers.preparer(
            embeds=x[:, span],
            attention_mask=mask[:, : span.stop],
            cache=cache,
            pos_embed=places[:, span] if apart else None,
        ).contexts

    stores = [{} for _ in layers.blocks]
    for span in (slice(0, past), slice(past, 9)):
        stream = x[:, span]
        for block, ctx, store in zip(
            layers.blocks, contexts(span, Lengths(span.start)), stores, strict=True
        ):

            def remember(k, v, store=store):
                store["k"] = torch.cat([store["k"], k], 2) if "k" in store else k
                store["v"] = torch.cat([store["v"], v], 2) if "v" in store else v
                return store["k"], store["v"]

            stream = block(stream, type(ctx)(**{**vars(ctx), "remember": remember}))
    got = layers.unembed(layers.ln_final(stream) if layers.ln_final is not None else stream)
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-5)


def test_masks_are_absent_where_a_kernel_needs_none():
    cfg, layers = built(**LOCAL)
    local, whole = layers.preparer(tokens=some_tokens(cfg)).contexts
    assert whole.mask is None
    assert local.mask.shape == (1, 1, 9, 9)
    assert [c.mask for c in layers.preparer(tokens=some_tokens(cfg, n=3)).contexts] == [None, None]
    ones = torch.ones(2, 3)
    padded = layers.preparer(tokens=some_tokens(cfg, n=3), attention_mask=ones)
    assert padded.contexts[1].mask is None
    step = layers.preparer(tokens=some_tokens(cfg, n=1), cache=Lengths(5)).contexts
    assert step[1].mask is None
    assert step[0].mask[0, 0].tolist() == [[False, False, False, True, True, True]]


def test_shortformer_asks_for_its_positions():
    cfg, layers = built(**OPTIONS["shortformer"])
    with pytest.raises(InputError, match="shortformer_pos_embed"):
        layers.preparer(tokens=some_tokens(cfg))


# Weights ------------------------------------------------------------------------------------------


def weights(**changes):
    layers = build_layers(Config(**(TOY | changes)))
    return dict(layers.tree().named_parameters())


def test_a_seed_makes_weights_reproducible_and_touches_nothing_global():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    a, b, other = weights(seed=4), weights(seed=4), weights(seed=5)
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["embed.W_E"], other["embed.W_E"])


def test_without_a_seed_the_global_generator_decides():
    torch.manual_seed(3)
    a = weights(seed=None)
    b = weights(seed=None)
    torch.manual_seed(3)
    again = weights(seed=None)
    assert all(torch.equal(a[name], again[name]) for name in a)
    assert not torch.equal(a["embed.W_E"], b["embed.W_E"])


def test_weights_can_be_drawn_again_in_place():
    cfg = Config(**(TOY | dict(act_fn="xielu", num_experts=3, experts_per_token=1)))
    layers = build_layers(cfg)
    parameters = dict(layers.tree().named_parameters())
    first = {name: p.detach().clone() for name, p in parameters.items()}
    randomised(layers)
    init_weights(layers, cfg)
    assert all(torch.equal(p, first[name]) for name, p in parameters.items())
    randomised(layers)
    module = nn.ModuleDict({"model": layers.tree()})
    init_weights(module, cfg)
    assert all(torch.equal(p, first[name]) for name, p in parameters.items())


def test_weights_may_stay_undrawn():
    w = weights(init_weights=False)
    assert all((p == (1 if name.endswith(".w") else 0)).all() for name, p in w.items())


BIG = dict(d_model=64, d_head=16, n_heads=8, d_vocab=300, n_ctx=200, n_layers=1)
FANS = {  # name -> (fan in, fan out)
    "embed.W_E": (300, 64),
    "pos_embed.W_pos": (200, 64),
    "blocks.0.attn.W_Q": (64, 128),
    "blocks.0.attn.W_O": (128, 64),
    "blocks.0.mlp.W_in": (64, 256),
    "blocks.0.mlp.W_out": (256, 64),
    "unembed.W_U": (64, 300),
}


@pytest.mark.parametrize(
    "mode",
    ["gpt2", "muP"] + [f"{a}_{b}" for a in ("xavier", "kaiming") for b in ("uniform", "normal")],
)
@pytest.mark.parametrize("given", [None, 0.3])
def test_initial_weights_have_the_spread_of_their_mode(mode, given):
    changes = {} if given is None else {"initializer_range": given}
    w = weights(**BIG, init_mode=mode, **changes)
    gain = given or 1.0
    for name, (fan_in, fan_out) in FANS.items():
        std = {
            "gpt2": given or 0.8 / 8,
            "xavier": gain * math.sqrt(2 / (fan_in + fan_out)),
            "kaiming": gain * math.sqrt(2 / fan_in),
            "muP": gain
            * {"embed": 1.0, "pos_embed": 1.0, "unembed": 1 / fan_in}.get(
                name.split(".")[0], fan_in**-0.5
            ),
        }[mode.split("_")[0]]
        x = w[name].detach()
        assert x.std().item() == pytest.approx(std, rel=0.03), name
        assert abs(x.mean().item()) < 0.05 * std
        if mode.endswith("uniform"):
            assert x.abs().max() <= std * math.sqrt(3) * 1.0001
        else:
            assert x.abs().max() > std * 3
    for name, p in w.items():
        if name.split(".")[-1].startswith("b"):
            assert (p == 0).all(), name
        if name.endswith(".w"):
            assert (p == 1).all(), name


def test_every_weight_is_trained():
    for changes in ({}, OPTIONS["gated"], MOE, OPTIONS["qk_norm"]):
        with torch.no_grad():
            cfg, layers = built(**changes)
        run(cfg, layers, some_tokens(cfg)).sin().sum().backward()
        for name, p in layers.tree().named_parameters():
            assert p.requires_grad, name
            assert p.grad is not None, name


def test_names_are_those_of_transformer_lens():
    w = weights()
    ln = [f"ln{i}.{x}" for i in (1, 2) for x in "wb"]
    attn = [f"attn.{kind}_{x}" for kind in "Wb" for x in "QKVO"]
    mlp = [f"mlp.{kind}_{x}" for kind in "Wb" for x in ("in", "out")]
    blocks = {f"blocks.{i}.{name}" for i in range(2) for name in (*ln, *attn, *mlp)}
    outside = {"embed.W_E", "pos_embed.W_pos", "ln_final.w", "ln_final.b"}
    assert set(w) == blocks | outside | {"unembed.W_U", "unembed.b_U"}
    assert w["blocks.0.attn.W_Q"].shape == (4, 24, 6)
    assert w["blocks.0.attn.W_O"].shape == (4, 6, 24)


def test_weights_lie_as_they_are_multiplied():
    w = weights(gated_mlp=True, n_key_value_heads=2)
    for name in ("W_Q", "W_K", "W_V"):
        assert w[f"blocks.0.attn.{name}"].transpose(1, 2).is_contiguous()
    W_O = w["blocks.0.attn.W_O"]
    assert W_O.flatten(0, 1).data_ptr() == W_O.data_ptr()
    for name in ("W_in", "W_gate", "W_out"):
        assert w[f"blocks.0.mlp.{name}"].t().is_contiguous()
    assert w["unembed.W_U"].t().is_contiguous()


def test_tied_embeddings_are_one_matrix():
    w = weights(tie_word_embeddings=True)
    assert w["unembed.W_U"].data_ptr() == w["embed.W_E"].data_ptr()
    assert torch.equal(w["unembed.W_U"], w["embed.W_E"].t())
    assert torch.equal(w["embed.W_E"], weights()["embed.W_E"])


def test_absent_parts_have_no_hook_points():
    for option in ("shortformer", "no_norm"):
        _, layers = built(**OPTIONS[option])
        names = [name for name, _ in layers.tree().named_modules()]
        assert not [name for name in names if name.endswith(("hook_scale", "hook_normalized"))]
    _, layers = built(**OPTIONS["attn_only"])
    names = [name for name, _ in layers.tree().named_modules()]
    assert not [name for name in names if "mlp" in name or "ln2" in name or "resid_mid" in name]


def test_dtype_and_zero_layers():
    cfg, layers = built(dtype="bfloat16", **ROTARY, act_fn="xielu")
    logits = run(cfg, layers, some_tokens(cfg))
    assert logits.dtype == torch.bfloat16
    assert {p.dtype for p in layers.tree().parameters()} == {torch.bfloat16}
    cfg, layers = built(n_layers=0)
    expected = torch.stack([Truth(cfg, layers)(prompt) for prompt in some_tokens(cfg)])
    torch.testing.assert_close(run(cfg, layers, some_tokens(cfg)), expected)


def test_a_config_without_a_vocabulary_is_not_built():
    with pytest.raises(ConfigError, match="tokenizer"):
        build_layers(Config(**(TOY | dict(d_vocab=-1))))


# Parts against other people's code ----------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in ACTIVATIONS if not n.startswith("solu")])
def test_activations_agree_with_transformers(name):
    from transformers.activations import ACT2FN

    x = torch.linspace(-6, 6, 101)
    torch.testing.assert_close(activation(name)(x), ACT2FN[name](x), atol=1e-6, rtol=1e-5)


def test_xielu_agrees_with_transformers():
    from transformers.activations import XIELUActivation

    theirs, ours = XIELUActivation(dtype=torch.float32), XIELU()
    torch.testing.assert_close(ours.alpha_p, theirs.alpha_p)
    torch.testing.assert_close(ours.alpha_n, theirs.alpha_n)
    x = torch.linspace(-4, 4, 101)
    torch.testing.assert_close(ours(x), theirs(x), atol=1e-6, rtol=1e-5)


def test_solu():
    x = torch.tensor([[1.0, 2.0, 0.0]])
    torch.testing.assert_close(ACTIVATIONS["solu"](x), x * F.softmax(x, -1))


def test_scaled_rotary_agrees_with_transformers():
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    rope = dict(
        rope_type="llama3",
        rope_theta=5000.0,
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=64,
    )
    theirs = LlamaRotaryEmbedding(
        LlamaConfig(hidden_size=64, num_attention_heads=2, rope_parameters=rope)
    )
    positions = torch.arange(40)[None]
    cos, sin = theirs(torch.zeros(1), positions)
    parts = rotary.NTKByParts(factor=8.0, low=1.0, high=4.0, n_original=64)
    tables = rotary.tables(positions, 32, 5000.0, parts)
    for ours, full in zip(tables, (cos, sin), strict=True):
        torch.testing.assert_close(ours[:, 0], full[..., :16], atol=1e-5, rtol=1e-5)


def test_alibi_slopes_are_the_papers():
    assert alibi_slopes(8) == [2.0**-i for i in range(1, 9)]
    for n, slopes in SLOPES.items():
        assert alibi_slopes(n) == slopes
    assert alibi_slopes(12)[8:] == pytest.approx([2**-0.5, 2**-1.5, 2**-2.5, 2**-3.5])
