"""Parts that are plain attributes besides stay those of torch's own table."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from measuring import model_of
from torch import nn

import hookedlm
from hookedlm.parts import AtHand


class Pair(AtHand):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(2, 2), nn.ReLU()
        vars(self)["unlisted"] = nn.Linear(2, 2)

    def forward(self, x):
        return self.second(self.first(x))


@pytest.fixture
def pair():
    made = Pair()
    made.keep_at_hand()
    return made


def in_step(pair):
    at_hand = {name for name, value in vars(pair).items() if isinstance(value, nn.Module)}
    assert all(pair._modules[name] is vars(pair)[name] for name in at_hand - {"unlisted"})
    assert "unlisted" in at_hand
    assert "unlisted" not in pair._modules
    return at_hand - {"unlisted"}


def test_parts_are_attributes(pair):
    assert in_step(pair) == {"first", "second"}
    assert list(pair.state_dict()) == ["first.weight", "first.bias"]
    assert [name for name, _ in pair.named_modules()] == ["", "first", "second"]


def test_assigning_exchanges_them(pair):
    other = nn.Tanh()
    pair.second = other
    assert pair.second is other
    assert torch.equal(pair(torch.ones(2)), pair.first(torch.ones(2)).tanh())
    pair.keep_at_hand()
    assert in_step(pair) == {"first", "second"}
    pair.second = None
    assert pair.second is None
    pair.keep_at_hand()
    assert in_step(pair) == {"first"}
    pair.add_module("second", other)
    assert pair.second is other


def test_registering_over_a_part_exchanges_it(pair):
    pair.register_module("second", nn.Tanh())
    assert isinstance(pair.second, nn.Tanh)
    pair._modules["second"] = nn.Sigmoid()  # behind everybody's back
    pair.keep_at_hand()
    assert isinstance(pair.second, nn.Sigmoid)


def test_deleting_deletes(pair):
    del pair.second
    with pytest.raises(AttributeError):
        pair.second  # noqa: B018
    pair.keep_at_hand()
    assert in_step(pair) == {"first"}


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_have_parts_of_their_own(pair, copied):
    other = copied(pair)
    assert in_step(other) == {"first", "second"}
    assert other.first is not pair.first
    with torch.no_grad():
        other.first.weight.add_(1)
    assert not torch.equal(other(torch.ones(2)), pair(torch.ones(2)))


def test_a_model_runs_what_is_put_into_it():
    model = hookedlm.load(model_of("gpt2"))
    tokens = torch.arange(4)[None]

    class Nothing(nn.Module):
        def forward(self, x):
            return torch.zeros_like(x)

    with torch.no_grad():
        expected = model.run_with_hooks(
            tokens, fwd_hooks=[("blocks.1.hook_mlp_out", lambda x, hook: torch.zeros_like(x))]
        )
        model.blocks[1].mlp = Nothing()
        torch.testing.assert_close(model(tokens), expected)
