"""Training beside loops written out with plain torch, on toy models and on Hugging Face's."""

from __future__ import annotations

import builtins
import sys
import types

import pytest
import torch
from conftest import hf
from tiny import tinies
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

import hookedlm
from hookedlm import HookedTransformer
from hookedlm import train as training
from hookedlm.errors import ConfigError, InputError
from hookedlm.train import HookedTransformerTrainConfig, train

QUIET = {"print_every": None}


class Rows(Dataset):
    """Rows of tokens as a dataset of dictionaries."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return {"tokens": self.rows[index]}


def toy(**options):
    return HookedTransformer(
        dict(
            n_layers=1, d_model=16, n_ctx=8, d_head=8, d_vocab=12, act_fn="gelu", seed=1,
            device="cpu",
        )
        | options
    )  # fmt: skip


def random_rows(n=6, n_vocab=12, length=8):
    return torch.randint(n_vocab, (n, length), generator=torch.Generator().manual_seed(3))


def losses_of(model, config, rows, **kwargs):
    losses = []
    train(model, config, Rows(rows), on_step=lambda step: losses.append(step.loss), **kwargs)
    return losses


def config_of(**options):
    return HookedTransformerTrainConfig(**{"num_epochs": 4, "batch_size": 6, **QUIET} | options)


# What it learns, and how --------------------------------------------------------------------------


def test_it_learns_to_count():
    start = torch.randint(12, (64, 1), generator=torch.Generator().manual_seed(0))
    rows = (start + torch.arange(8)) % 12  # the next token is one more
    model = toy()
    losses = losses_of(model, config_of(num_epochs=15, batch_size=8, lr=1e-2), rows)
    assert losses[0] > 2.0
    assert losses[-1] < 0.05
    with torch.no_grad():
        assert float(model(rows, return_type="loss")) < 0.05


OPTIMIZERS = {
    "Adam": ({}, lambda p: torch.optim.Adam(p, lr=0.01)),
    "Adam, decay": ({"weight_decay": 0.3}, lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.3)),
    "AdamW": (
        {"optimizer_name": "AdamW", "weight_decay": 0.2},
        lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.2),
    ),
    "SGD": (
        {"optimizer_name": "SGD", "momentum": 0.8, "weight_decay": 0.1},
        lambda p: torch.optim.SGD(p, 0.01, momentum=0.8, weight_decay=0.1),
    ),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_step_by_step_a_plain_loop(name):
    """One batch an epoch, so that the order of rows is no matter."""
    options, make = OPTIMIZERS[name]
    rows, plain = random_rows(), toy()
    optimizer, expected = make(plain.parameters()), []
    for step in range(6):
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * min(1.0, (step + 1) / 3)
        loss = nn.functional.cross_entropy(plain(rows)[:, :-1].flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        optimizer.step()
        expected.append(float(loss.detach()))
    model = toy()
    config = config_of(num_epochs=6, lr=0.01, warmup_steps=3, max_grad_norm=0.5, **options)
    assert losses_of(model, config, rows) == pytest.approx(expected, abs=1e-6)
    for (name, mine), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert mine.grad is None
        if not name.endswith("b_K"):  # no gradient but noise, which Adam makes as large as any
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("optimizer_name", ["Adam", "SGD"])
@pytest.mark.parametrize("name", ["gpt2-base", "gptj-base", "llama-grouped", "cohere-base"])
def test_as_hugging_face_trains(name, optimizer_name):
    """Fused, grouped, tied and shared weights move as the tensors they are views of."""
    family, _, variant = name.partition("-")
    [tiny] = [t for t in tinies(family) if t.variant == variant]
    rows, theirs = random_rows(n_vocab=95) + 1, tiny.build()  # 0: padding has no gradient there
    optimizer = getattr(torch.optim, optimizer_name)(theirs.parameters(), lr=0.01)
    expected = []
    for _ in range(5):
        logits = theirs(rows).logits
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        optimizer.step()
        expected.append(float(loss.detach()))
    model = hookedlm.load(tiny.build())
    config = config_of(num_epochs=5, lr=0.01, max_grad_norm=1.0, optimizer_name=optimizer_name)
    assert losses_of(model, config, rows) == pytest.approx(expected, rel=1e-4)


def test_batches_of_all_epochs_in_the_order_of_the_seed():
    rows = random_rows()
    seen = []

    class Watched(Rows):
        def __getitem__(self, index):
            seen.append(int(index))
            return super().__getitem__(index)

    train(toy(), config_of(batch_size=4, num_epochs=2, seed=5), Watched(rows))
    seeded = torch.Generator().manual_seed(5)
    loader = DataLoader(list(range(6)), 1, shuffle=True, generator=seeded)
    assert seen[1:] == [int(i) for _ in range(2) for i in loader]  # after the look at the first
    assert seen[1:7] != seen[7:]
    assert sorted(seen[1:7]) == sorted(seen[7:]) == list(range(6))


def test_an_iterable_dataset_keeps_its_order():
    rows = random_rows()

    class Stream(IterableDataset):
        def __iter__(self):
            return iter([{"tokens": row} for row in rows])

    losses = []
    config = config_of(num_epochs=1, batch_size=3)
    train(toy(), config, Stream(), on_step=lambda step: losses.append(step.loss))
    with torch.no_grad():
        first = float(toy()(rows[:3], return_type="loss"))
    assert losses[0] == pytest.approx(first, abs=1e-6)
    assert len(losses) == 2


# Reproducible, and resumed ------------------------------------------------------------------------


def test_a_seed_makes_a_run_again_and_leaves_global_random_state_alone():
    rows = random_rows()
    config = config_of(batch_size=2, lr=0.01)
    before = torch.get_rng_state()
    first = losses_of(toy(), config, rows)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    assert losses_of(toy(), config, rows) == first
    assert losses_of(toy(), config_of(batch_size=2, lr=0.01, seed=1), rows) != first


@pytest.mark.parametrize("options", [{}, {"optimizer_name": "SGD", "momentum": 0.9}])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, options):
    rows = random_rows()
    options = {"batch_size": 4, "lr": 0.01, "warmup_steps": 7, **options}  # 8 steps, 2 an epoch
    whole = losses_of(toy(), config_of(**options), rows)
    config = config_of(**options, max_steps=5, save_every=3, save_dir=str(tmp_path / "new"))
    assert losses_of(toy(), config, rows) == whole[:5]
    assert sorted(file.name for file in (tmp_path / "new").iterdir()) == [
        "model_3.pt",
        "training_3.pt",
    ]
    path = tmp_path / "new" / "model_3.pt"
    rest = losses_of(toy(seed=7), config_of(**options), rows, resume_from=path)
    assert rest == pytest.approx(whole[3:], abs=1e-6)
    with pytest.raises(InputError, match="another run"):
        train(toy(), config_of(**options | {"seed": 2}), Rows(rows), resume_from=path)
    with pytest.raises(InputError, match="no file"):
        train(toy(), config_of(**options), Rows(rows), resume_from=tmp_path / "model_4.pt")


def test_a_checkpoint_is_a_state_dict(tmp_path):
    model, rows = toy(), random_rows()
    train(model, config_of(num_epochs=2, save_every=2, save_dir=str(tmp_path)), Rows(rows))
    other = toy(seed=5)
    other.load_state_dict(torch.load(tmp_path / "model_2.pt", weights_only=True))
    assert torch.equal(other(rows), model(rows))


def test_a_write_that_fails_leaves_no_file(tmp_path, monkeypatch):
    def fails(value, path):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(training.torch, "save", fails)
    with pytest.raises(OSError, match="disk full"):
        train(toy(), config_of(save_every=1, save_dir=str(tmp_path)), Rows(random_rows()))
    assert list(tmp_path.iterdir()) == []


# What is left behind ------------------------------------------------------------------------------


def test_max_steps_counts_over_epochs():
    assert len(losses_of(toy(), config_of(batch_size=2, max_steps=5), random_rows())) == 5


@pytest.mark.parametrize("mode", [True, False])
def test_every_module_is_left_in_its_mode(mode):
    model = toy().train(mode)
    model.blocks[0].mlp.train(not mode)
    modes = [module.training for module in model.modules()]
    inside = []

    def stop(step):
        inside.extend(module.training for module in model.modules())
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(model, config_of(), Rows(random_rows()), on_step=stop)
    assert all(inside)
    assert [module.training for module in model.modules()] == modes
    assert train(model, config_of(num_epochs=1), Rows(random_rows())) is model
    assert [module.training for module in model.modules()] == modes


def test_it_trains_where_gradients_are_switched_off():
    with torch.no_grad():
        losses = losses_of(toy(), config_of(lr=0.01), random_rows())
    assert losses[-1] < losses[0]


def test_the_bar_shows_the_loss_and_nothing_is_printed(capsys):
    train(toy(), config_of(print_every=2), Rows(random_rows()))
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "loss=" in shown.err
    assert "4/4" in shown.err
    train(toy(), config_of(), Rows(random_rows()))
    assert capsys.readouterr().err == ""


# What is refused ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ([{"text": "a"}], "with 'tokens', got \\['text'\\]"),
        ([torch.arange(4)], "with 'tokens', got Tensor"),
        ([{"tokens": [1, 2, 3]}], "set_format"),
        ([{"tokens": torch.rand(4)}], "integer tensor"),
        ([{"tokens": torch.zeros(2, 4, dtype=torch.long)}], "integer tensor"),
        ([], "empty"),
    ],
)
def test_a_dataset_without_tokens_is_refused(dataset, message):
    model = toy()
    before = [parameter.clone() for parameter in model.parameters()]
    with pytest.raises(InputError, match=message):
        train(model, config_of(), dataset)
    assert all(map(torch.equal, model.parameters(), before))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizer_name": "RMSprop"}, "'Adam', 'AdamW', 'SGD'"),
        ({"momentum": 0.9}, "Adam takes none"),
        ({"num_epochs": 0}, "1 or more"),
        ({"max_steps": 0}, "1 or more"),
        ({"save_every": 3}, "save_dir"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        config_of(**options)
    edited = config_of()
    vars(edited).update(options)
    with pytest.raises(ConfigError, match=message):
        train(toy(), edited, Rows(random_rows()))


def test_wandb_is_asked_for_only_when_wanted(monkeypatch):
    imported = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "wandb":
            raise ImportError(name)
        return imported(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    train(toy(), config_of(num_epochs=1), Rows(random_rows()))
    with pytest.raises(ConfigError, match="pip install wandb"):
        train(toy(), config_of(wandb=True), Rows(random_rows()))


def test_wandb_is_told_the_loss_of_each_step(monkeypatch):
    told: list = []
    fake = types.ModuleType("wandb")
    monkeypatch.setattr(fake, "init", lambda **settings: told.append(settings), raising=False)
    monkeypatch.setattr(fake, "log", told.append, raising=False)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    config = config_of(wandb=True, wandb_project_name="toys", num_epochs=2)
    losses = losses_of(toy(), config, random_rows())
    assert told[0]["project"] == "toys"
    assert told[0]["config"]["batch_size"] == 6
    assert [step["train_loss"] for step in told[1:]] == losses
    assert [(step["samples"], step["epoch"]) for step in told[1:]] == [(6, 1), (12, 2)]


def test_the_shared_model_is_untouched():
    """Guards the tests above: they must train models of their own."""
    assert torch.equal(hf("gpt2-base").lm_head.weight, tinies("gpt2")[0].build().lm_head.weight)
