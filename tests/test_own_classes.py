"""Classes of a user's own, without config or transformers: matched, corrected, refused in words."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hookedlm
from hookedlm import Row
from hookedlm.errors import ConversionError, InputError

VOCAB, WIDTH, HEADS, LAYERS = 60, 32, 4, 3


class HandNorm(nn.Module):
    """A LayerNorm that tells its epsilon to nobody."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(WIDTH)), nn.Parameter(torch.randn(WIDTH))

    def forward(self, x):
        return F.layer_norm(x, (WIDTH,), self.weight, self.bias, 1e-5)


class RootNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH))

    def forward(self, x):
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


class FusedAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.c_attn, self.c_proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.n_head = HEADS

    def forward(self, x):
        q, k, v = (
            t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in self.c_attn(x).split(WIDTH, -1)
        )
        z = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(z.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    def __init__(self):
        super().__init__()
        self.c_fc, self.act = nn.Linear(WIDTH, 48), nn.GELU()
        self.c_proj, self.dropout = nn.Linear(48, WIDTH), nn.Dropout(0.1)

    def forward(self, x):
        return self.dropout(self.c_proj(self.act(self.c_fc(x))))


class FirstBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.ln_1, self.attn = HandNorm(), FusedAttention()
        self.ln_2, self.mlp = HandNorm(), FeedForward()

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class Small(nn.Module):
    """The layout that many a tutorial has: reads out the last position unless it has targets."""

    def __init__(self):
        super().__init__()
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(VOCAB, WIDTH),
                "wpe": nn.Embedding(24, WIDTH),
                "h": nn.ModuleList(FirstBlock() for _ in range(LAYERS)),
                "ln_f": HandNorm(),
            }
        )
        self.lm_head = nn.Linear(WIDTH, VOCAB, bias=False)
        self.lm_head.weight = self.transformer.wte.weight

    def forward(self, idx, targets=None):
        places = torch.arange(idx.shape[1], device=idx.device)
        x = self.transformer.wte(idx) + self.transformer.wpe(places)
        for block in self.transformer.h:
            x = block(x)
        x = self.transformer.ln_f(x)
        return self.lm_head(x if targets is not None else x[:, [-1]]), None


def turned(x: Tensor) -> Tensor:
    """A rotation of one's own."""
    half = x.shape[-1] // 2
    angle = torch.outer(torch.arange(x.shape[2]), 100.0 ** -(torch.arange(half) / half))
    a, b = x[..., :half], x[..., half:]
    return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()), -1)


class GroupedAttention(nn.Module):
    def __init__(self, rotates: bool):
        super().__init__()
        self.wq, self.wk, self.wv = (
            nn.Linear(WIDTH, n, bias=False) for n in (WIDTH, WIDTH // 2, WIDTH // 2)
        )
        self.wo = nn.Linear(WIDTH, WIDTH, bias=False)
        self.head_dim, self.rotates = WIDTH // HEADS, rotates

    def forward(self, x, mask):
        q, k, v = (
            w(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for w in (self.wq, self.wk, self.wv)
        )
        if self.rotates:
            q, k = turned(q), turned(k)
        k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        scores = q @ k.transpose(-1, -2) * self.head_dim**-0.5 + mask
        return self.wo((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


class GatedFeedForward(nn.Module):
    def __init__(self):
        super().__init__()
        self.w1, self.w2, self.w3 = (
            nn.Linear(a, b, bias=False) for a, b in ((WIDTH, 40), (40, WIDTH), (WIDTH, 40))
        )
        self.act = nn.SiLU()

    def forward(self, x):
        return self.w2(self.act(self.w1(x)) * self.w3(x))


class SecondBlock(nn.Module):
    def __init__(self, rotates: bool):
        super().__init__()
        self.attention, self.feed_forward = GroupedAttention(rotates), GatedFeedForward()
        self.attention_norm, self.ffn_norm = RootNorm(), RootNorm()

    def forward(self, x, mask):
        h = x + self.attention(self.attention_norm(x), mask)
        return h + self.feed_forward(self.ffn_norm(h))


class Other(nn.Module):
    """Gated, grouped, no positions but those of a rotation; returns the logits themselves."""

    def __init__(self, rotates: bool = False):
        super().__init__()
        self.tok_embeddings = nn.Embedding(VOCAB, WIDTH)
        self.layers = nn.ModuleList(SecondBlock(rotates) for _ in range(LAYERS))
        self.norm, self.output = RootNorm(), nn.Linear(WIDTH, VOCAB, bias=False)

    def forward(self, tokens):
        mask = torch.full((tokens.shape[1],) * 2, float("-inf")).triu(1)
        h = self.tok_embeddings(tokens)
        for layer in self.layers:
            h = layer(h, mask=mask)
        return self.output(self.norm(h))


class PostBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn, self.norm1 = FusedAttention(), nn.LayerNorm(WIDTH)
        self.ffn = nn.Sequential(nn.Linear(WIDTH, 40), nn.ReLU(), nn.Linear(40, WIDTH))
        self.norm2 = nn.LayerNorm(WIDTH)

    def forward(self, hidden):
        hidden = self.norm1(hidden + self.attn(hidden))
        return self.norm2(hidden + self.ffn(hidden))


class InSequence(nn.Module):
    """Post-norm blocks in a Sequential; the head is the embedding, by hand."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(VOCAB, WIDTH)
        self.stack = nn.Sequential(*(PostBlock() for _ in range(LAYERS)))

    def forward(self, tokens):
        return F.linear(self.stack(self.words(tokens)), self.words.weight)


def made(build, *args) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build(*args).eval()


def tokens() -> Tensor:
    return torch.randint(VOCAB, (2, 9), generator=torch.Generator().manual_seed(1))


def truth(model: nn.Module) -> Tensor:
    return model(tokens(), tokens())[0] if isinstance(model, Small) else model(tokens())


CASES = {
    "small": (made(Small), "uniform, sequential"),
    "other": (made(Other), "uniform, sequential"),
    "rotating": (made(Other, True), "opaque attention in uniform block"),
    "sequence": (made(InSequence), "uniform, post_norm"),
}


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_a_class_of_ones_own(case: str):
    theirs, form = CASES[case]
    ours, x = hookedlm.load(theirs), tokens()
    blocks = [part for part in ours.fidelity().parts if part.where.startswith("blocks")]
    assert all(part.form == form for part in blocks), ours.fidelity()
    expected = truth(theirs)
    got, cache = ours.run_with_cache(x)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    for name in ours.hook_dict:
        if ours.hook_dict[name].on_demand:
            continue
        noisy = [(name, lambda x, hook: x + torch.randn_like(x))]
        with torch.random.fork_rng(devices=[]):
            edited = ours.run_with_hooks(x, fwd_hooks=noisy)
        assert not torch.allclose(edited, got), name
    if form == "uniform, sequential":
        parts = cache.decompose_resid()
        torch.testing.assert_close(parts.sum(0), cache["resid_post", -1], rtol=1e-4, atol=1e-4)
        pattern = cache["pattern", 0]
        torch.testing.assert_close(pattern.sum(-1), torch.ones_like(pattern[..., 0]))
    assert torch.equal(truth(theirs), expected)  # theirs was left alone


@torch.no_grad()
def test_generation_and_streams():
    theirs, _ = CASES["small"]
    ours, x = hookedlm.load(theirs), tokens()
    out = ours.generate(x, max_new_tokens=3, do_sample=False, stop_at_eos=False)
    slow = x
    for _ in range(3):
        slow = torch.cat([slow, theirs(slow)[0].argmax(-1)], 1)
    assert torch.equal(out, slow)
    _, cache = ours.run_with_cache(x)
    resumed = ours(cache["resid_pre", 1], start_at_layer=1)
    torch.testing.assert_close(resumed, ours(x))
    rows = theirs.transformer.wte(x)
    torch.testing.assert_close(ours(inputs_embeds=rows), ours(x))


@torch.no_grad()
def test_a_class_without_masks_refuses_padding_on_the_left():
    ours, x = hookedlm.load(CASES["small"][0]), tokens()
    mask = torch.ones_like(x)
    mask[1, -2:] = 0  # behind the text nothing sees it
    torch.testing.assert_close(ours(x, attention_mask=mask)[1, :-2], ours(x)[1, :-2])
    with pytest.raises(InputError, match="pad on the right"):
        ours(x, attention_mask=mask.flip(1))


@pytest.mark.parametrize("case", CASES)
def test_guessed_templates_are_source(case: str):
    theirs, _ = CASES[case]
    row = hookedlm.guess_templates(theirs)
    assert eval(repr(row), {"Row": Row}) == row
    assert row.blocks == {"small": "transformer.h", "sequence": "stack"}.get(case, "layers")
    with torch.no_grad():
        again = hookedlm.load(theirs, row=row)(tokens())
    torch.testing.assert_close(again, truth(theirs), rtol=1e-5, atol=1e-5)


def test_templates_of_a_known_type():
    from conftest import hf

    assert hookedlm.guess_templates(hf("gpt2-base")).qkv == "attn.c_attn"
    assert "Row(base='transformer'" in repr(hookedlm.guess_templates(hf("gpt2-base")))


@torch.no_grad()
def test_a_given_row_is_used():
    theirs, _ = CASES["small"]
    row = hookedlm.guess_templates(theirs)
    opaque = hookedlm.load(theirs, row=row.but(qkv="attn.nothing"))
    assert "opaque attention" in str(opaque.fidelity())
    torch.testing.assert_close(opaque(tokens()), truth(theirs), rtol=1e-5, atol=1e-5)
    wrong = hookedlm.load(theirs, row=row.but(ln1="ln_2", ln2="ln_1"))  # the check sees it
    assert "opaque block" in str(wrong.fidelity())
    torch.testing.assert_close(wrong(tokens()), truth(theirs), rtol=1e-5, atol=1e-5)
    with pytest.raises(ConversionError, match=r"no 'transformer.layers' in Small"):
        hookedlm.load(theirs, row=row.but(blocks="transformer.layers"))


def test_what_is_missing_is_named():
    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.out = nn.Embedding(VOCAB, 8), nn.Linear(8, VOCAB)

        def forward(self, tokens):
            return self.out(self.words(tokens))

    with pytest.raises(ConversionError, match=r"Flat has no numbered list.*row=Row\(blocks="):
        hookedlm.load(Flat())

    class NoLogits(Other):
        def forward(self, tokens):
            return {"text": "none"}

    with pytest.raises(ConversionError, match=r"forward returned dict: expected logits"):
        hookedlm.load(NoLogits())
