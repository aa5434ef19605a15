"""A small training loop for toy models: `train`, with its `HookedTransformerTrainConfig`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sized
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn, optim
from torch.utils.data import DataLoader, Dataset, IterableDataset
from tqdm import tqdm

from hookedlm.errors import ConfigError, InputError
from hookedlm.model import HookedTransformer

OPTIMIZERS = ("Adam", "AdamW", "SGD")


@dataclass
class HookedTransformerTrainConfig:
    """How to train; raises ConfigError on values that make no sense.

    ``seed`` orders the data. ``max_grad_norm`` clips. Adam with ``weight_decay`` is AdamW (arXiv
    1711.05101), AdamW without it is Adam; ``momentum`` is SGD's. The rate rises linearly to ``lr``
    over ``warmup_steps``. ``max_steps`` ends training after so many steps in all. Every
    ``save_every`` steps a checkpoint is written to ``save_dir``, every ``print_every`` the loss is
    shown on the progress bar (None: no bar). ``device`` None leaves the model where it is.
    """

    num_epochs: int
    batch_size: int
    lr: float = 1e-3
    seed: int = 0
    momentum: float = 0.0
    max_grad_norm: float | None = None
    weight_decay: float | None = None
    optimizer_name: str = "Adam"
    device: str | None = None
    warmup_steps: int = 0
    save_every: int | None = None
    save_dir: str | None = None
    wandb: bool = False
    wandb_project_name: str | None = None
    print_every: int | None = 50
    max_steps: int | None = None

    def __post_init__(self) -> None:
        self.check()

    def check(self) -> None:
        """Raise ConfigError unless the values, which may have been edited, make sense."""
        if self.optimizer_name not in OPTIMIZERS:
            raise ConfigError(
                f"optimizer_name={self.optimizer_name!r}: expected one of {OPTIMIZERS}"
            )
        if self.momentum and self.optimizer_name != "SGD":
            raise ConfigError(f"momentum={self.momentum}: {self.optimizer_name} takes none")
        for name in ("num_epochs", "batch_size", "save_every", "print_every", "max_steps"):
            value = vars(self)[name]
            if value is not None and value < 1:
                raise ConfigError(f"{name}={value}: expected 1 or more")
        if self.save_every is not None and self.save_dir is None:
            raise ConfigError("save_every needs save_dir, the folder for the checkpoints")


@dataclass
class Step:
    """What ``on_step`` is told after each step of the optimizer; ``step`` counts from 1."""

    step: int
    epoch: int
    loss: float
    lr: float


def train(
    model: HookedTransformer,
    config: HookedTransformerTrainConfig,
    dataset: Dataset,
    *,
    on_step: Callable[[Step], None] | None = None,
    resume_from: str | Path | None = None,
) -> HookedTransformer:
    """The model, trained in place on a dataset of {"tokens": [pos]}; all tokens are real.

    ``on_step`` is called after each step. Checkpoints are ``model_{step}.pt`` (the state dict) with
    ``training_{step}.pt`` (the optimizer's) beside it; ``resume_from`` such a model file goes on
    from there, with the data and losses of the uninterrupted run. The model is left in the mode
    (train or eval) it came in, also by an exception; global random state is not used.

    Raises InputError for a dataset without tokens, ConfigError without a wandb that was asked for.
    """
    config.check()
    _check_dataset(dataset)
    log = _wandb_log(config)
    if config.device is not None:
        model.to(config.device)
    tied = _tied(model)
    optimizer = _optimizer(config, tied)
    warmup = optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / max(1, config.warmup_steps))
    )
    progress = _Progress(model, optimizer, warmup, config)
    done = 0 if resume_from is None else progress.restore(Path(resume_from))
    shown = tqdm(total=_n_steps(config, dataset), initial=done, disable=config.print_every is None)
    with _training_mode(model), shown:
        batches = islice(_batches(dataset, config), config.max_steps)
        for step, (epoch, tokens) in enumerate(batches, start=1):
            if step <= done:
                continue
            [lr] = map(float, warmup.get_last_lr())
            loss = _update(model, optimizer, tied, tokens, config.max_grad_norm)
            warmup.step()
            report = Step(step, epoch, loss, lr)
            shown.update()
            if config.print_every is not None and step % config.print_every == 0:
                shown.set_postfix(epoch=epoch, loss=f"{loss:.4f}")
            if config.save_every is not None and step % config.save_every == 0:
                progress.save(step)
            log({"train_loss": loss, "samples": step * config.batch_size, "epoch": epoch})
            if on_step is not None:
                on_step(report)
    return model


Tied = dict[nn.Parameter, list[nn.Parameter]]


def _tied(model: nn.Module) -> Tied:
    """Each trained tensor, with the other parameters that are views of all of it.

    A tied embedding is two parameters on one memory: stepping both would move it twice.
    """
    tied: Tied = {}
    owners: dict[tuple[int, int], nn.Parameter] = {}
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.numel():
            owner = owners.setdefault((parameter.data_ptr(), parameter.numel()), parameter)
            tied.setdefault(owner, [])
            if owner is not parameter:
                tied[owner].append(parameter)
    return tied


def _update(
    model: HookedTransformer,
    optimizer: optim.Optimizer,
    tied: Tied,
    tokens: Int[Tensor, "batch pos"],
    max_grad_norm: float | None,
) -> float:
    """One step down the gradient; returns the loss before it."""
    tokens = tokens.to(model.device)
    model.zero_grad()
    with torch.enable_grad():
        loss = model(tokens, return_type="loss", attention_mask=torch.ones_like(tokens))
        loss.backward()
    for owner, others in tied.items():
        for grad in [other.grad for other in others if other.grad is not None]:
            grad = grad if grad.shape == owner.shape else grad.t()
            owner.grad = grad.clone() if owner.grad is None else owner.grad + grad
    if max_grad_norm is not None:
        nn.utils.clip_grad_norm_(list(tied), max_grad_norm)
    optimizer.step()
    model.zero_grad()
    return float(loss.detach())


# What is put together from the config -------------------------------------------------------------


def _optimizer(config: HookedTransformerTrainConfig, tied: Tied) -> optim.Optimizer:
    decay = config.weight_decay or 0.0
    if config.optimizer_name == "SGD":
        return optim.SGD(tied, lr=config.lr, momentum=config.momentum, weight_decay=decay)
    return optim.AdamW(tied, lr=config.lr, weight_decay=decay)


def _batches(
    dataset: Dataset, config: HookedTransformerTrainConfig
) -> Iterator[tuple[int, Int[Tensor, "batch pos"]]]:
    """(epoch, tokens) of all epochs, shuffled by the seed; an IterableDataset keeps its order."""
    generator = torch.Generator().manual_seed(config.seed)
    loader = DataLoader(
        dataset,
        batch_size=config.batch_size,
        shuffle=not isinstance(dataset, IterableDataset),
        generator=generator,
    )
    for epoch in range(1, config.num_epochs + 1):
        for batch in loader:
            yield epoch, batch["tokens"]


def _n_steps(config: HookedTransformerTrainConfig, dataset: Dataset) -> int | None:
    """How many steps there will be, if that can be known."""
    if not isinstance(dataset, Sized):
        return config.max_steps
    n_steps = config.num_epochs * -(-len(dataset) // config.batch_size)
    return n_steps if config.max_steps is None else min(n_steps, config.max_steps)


def _check_dataset(dataset: Dataset) -> None:
    """Raise InputError unless items are {"tokens": integer tensor}."""
    if isinstance(dataset, Sized) and len(dataset) == 0:
        raise InputError("the dataset is empty")
    if isinstance(dataset, IterableDataset):
        return  # looking at the first item might use it up
    item = dataset[0]
    if not isinstance(item, Mapping) or "tokens" not in item:
        what = sorted(item) if isinstance(item, Mapping) else type(item).__name__
        raise InputError(
            f"items of the dataset must be dictionaries with 'tokens', got {what}. "
            "hookedlm.data.tokenize_and_concatenate makes such a dataset from texts."
        )
    tokens = item["tokens"]
    if not isinstance(tokens, Tensor) or tokens.ndim != 1 or tokens.is_floating_point():
        shape = tuple(tokens.shape) if isinstance(tokens, Tensor) else type(tokens).__name__
        raise InputError(
            f"'tokens' of an item must be an integer tensor [pos], got {shape}. For a dataset of "
            "lists: dataset.set_format('torch')"
        )


def _wandb_log(config: HookedTransformerTrainConfig) -> Callable[[dict[str, Any]], None]:
    """What to call with the numbers of each step."""
    if not config.wandb:
        return lambda numbers: None
    try:
        import wandb
    except ImportError as error:
        raise ConfigError("wandb=True, but it is not installed: pip install wandb") from error
    wandb.init(project=config.wandb_project_name or "hookedlm", config=asdict(config))
    return wandb.log


@contextmanager
def _training_mode(model: nn.Module) -> Iterator[None]:
    """Training mode inside, and every module's own mode again after it."""
    modes = [(module, module.training) for module in model.modules()]
    model.train()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


# Checkpoints --------------------------------------------------------------------------------------


@dataclass
class _Progress:
    """Everything that training changes, and the settings without which it can't be continued."""

    model: nn.Module
    optimizer: optim.Optimizer
    warmup: optim.lr_scheduler.LambdaLR
    config: HookedTransformerTrainConfig

    def _settings(self) -> dict[str, Any]:
        names = ("batch_size", "seed", "optimizer_name", "warmup_steps")
        return {name: vars(self.config)[name] for name in names}

    def save(self, step: int) -> None:
        """Write both files of a checkpoint, the model's last: where it is, the other is too."""
        folder = Path(str(self.config.save_dir))
        folder.mkdir(parents=True, exist_ok=True)
        training = {
            "step": step,
            "settings": self._settings(),
            "optimizer": self.optimizer.state_dict(),
            "warmup": self.warmup.state_dict(),
        }
        _write(training, folder / f"training_{step}.pt")
        _write(self.model.state_dict(), folder / f"model_{step}.pt")

    def restore(self, path: Path) -> int:
        """Load a checkpoint; returns the number of steps done. Raises InputError if it can't be."""
        beside = path.with_name(path.name.replace("model_", "training_", 1))
        for file in (path, beside):
            if not file.is_file():
                raise InputError(f"resume_from={str(path)!r}: there is no file {str(file)!r}")
        training = torch.load(beside, weights_only=True)
        if training["settings"] != self._settings():
            raise InputError(
                f"resume_from={str(path)!r} was trained with {training['settings']}, and config "
                f"says {self._settings()}: what follows would be another run"
            )
        self.model.load_state_dict(torch.load(path, weights_only=True))
        self.optimizer.load_state_dict(training["optimizer"])
        self.warmup.load_state_dict(training["warmup"])
        return int(training["step"])


def _write(value: Any, path: Path) -> None:
    """A file that is there whole or not at all."""
    partial = path.with_suffix(".partial")
    try:
        torch.save(value, partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
