"""Loss and accuracy against the definition, computed the long way in float64."""

import math

import pytest
import torch

from hookedlm.errors import InputError
from hookedlm.loss import lm_accuracy, lm_cross_entropy_loss


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(3, 5, 11, generator=generator)
    tokens = torch.randint(11, (3, 5), generator=generator)
    return logits, tokens


def by_definition(logits, tokens):
    """minus log p(next token), one number at a time."""
    out = torch.zeros(tokens.shape[0], tokens.shape[1] - 1, dtype=torch.float64)
    for b in range(tokens.shape[0]):
        for i in range(tokens.shape[1] - 1):
            scores = logits[b, i].double().tolist()
            total = math.fsum(math.exp(s) for s in scores)
            out[b, i] = math.log(total) - scores[tokens[b, i + 1]]
    return out


def test_loss_is_minus_the_log_probability_of_the_next_token(batch):
    logits, tokens = batch
    truth = by_definition(logits, tokens)
    per_token = lm_cross_entropy_loss(logits, tokens, per_token=True)
    torch.testing.assert_close(per_token.double(), truth, rtol=1e-5, atol=1e-5)
    loss = lm_cross_entropy_loss(logits, tokens)
    assert loss.item() == pytest.approx(truth.mean().item(), rel=1e-5)
    assert loss.shape == ()


@pytest.mark.parametrize("dtype", [torch.bool, torch.long, torch.float32])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_of_either_side_leaves_the_loss_of_the_real_tokens(batch, dtype, side):
    logits, tokens = batch
    mask = torch.ones(3, 5, dtype=dtype)
    real = slice(None, 3) if side == "right" else slice(2, None)
    mask[1, :] = 0
    mask[1, real] = 1
    # What stands at padding must not matter, not even if it is not a number.
    logits[1][mask[1] == 0] = float("nan")

    alone = by_definition(logits[1:2, real], tokens[1:2, real])
    others = by_definition(logits[[0, 2]], tokens[[0, 2]])
    truth = (alone.sum() + others.sum()) / (alone.numel() + others.numel())
    assert lm_cross_entropy_loss(logits, tokens, mask).item() == pytest.approx(truth.item(), 1e-5)

    per_token = lm_cross_entropy_loss(logits, tokens, mask, per_token=True)
    assert per_token.shape == (3, 4)
    assert int((per_token[1] == 0).sum()) == 2
    kept = per_token[1][per_token[1] != 0]
    torch.testing.assert_close(kept.double(), alone[0], rtol=1e-5, atol=1e-5)


def test_gradient_is_softmax_minus_one_hot(batch):
    logits, tokens = batch
    logits.requires_grad_()
    lm_cross_entropy_loss(logits, tokens).backward()
    one_hot = torch.nn.functional.one_hot(tokens[:, 1:], 11)
    expected = (logits.detach()[:, :-1].softmax(-1) - one_hot) / 12
    torch.testing.assert_close(logits.grad[:, :-1], expected)
    assert not logits.grad[:, -1].any()


def test_half_precision_logits_are_scored_in_float32(batch):
    logits, tokens = batch
    logits = logits.bfloat16()
    loss = lm_cross_entropy_loss(logits, tokens, per_token=True)
    assert loss.dtype == torch.float32
    truth = by_definition(logits, tokens)
    torch.testing.assert_close(loss.double(), truth, rtol=1e-5, atol=1e-5)


def test_any_number_of_leading_dimensions(batch):
    logits, tokens = batch
    truth = lm_cross_entropy_loss(logits, tokens, per_token=True)
    single = lm_cross_entropy_loss(logits[0], tokens[0], per_token=True)
    stacked = lm_cross_entropy_loss(
        logits.expand(2, 3, 5, 11), tokens.expand(2, 3, 5), per_token=True
    )
    assert torch.equal(single, truth[0])
    assert torch.equal(stacked, truth.expand(2, 3, 4))
    assert lm_cross_entropy_loss(logits[:0], tokens[:0], per_token=True).shape == (0, 4)


def test_accuracy_counts_right_guesses():
    tokens = torch.tensor([[0, 2, 1, 1]])
    guesses = torch.tensor([[2, 0, 1, 0]])  # right, wrong, right, (nothing follows)
    logits = torch.nn.functional.one_hot(guesses, 3).float()
    assert lm_accuracy(logits, tokens).item() == pytest.approx(2 / 3)
    assert lm_accuracy(logits, tokens, per_token=True).tolist() == [[True, False, True]]


def test_what_cannot_be_scored_is_refused_in_words(batch):
    logits, tokens = batch
    with pytest.raises(InputError, match=r"tokens of shape \(3, 5\), got \(3, 4\)"):
        lm_cross_entropy_loss(logits, tokens[:, 1:])
    with pytest.raises(InputError, match="attention_mask"):
        lm_cross_entropy_loss(logits, tokens, torch.ones(3, 4))
    for function in (lm_cross_entropy_loss, lm_accuracy):
        with pytest.raises(InputError, match="at least two positions"):
            function(logits[:, :1], tokens[:, :1])
        assert function(logits[:, :1], tokens[:, :1], per_token=True).shape == (3, 0)
