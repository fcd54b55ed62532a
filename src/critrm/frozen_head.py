"""A reward head on a backbone that stays as it was pretrained: fitted to the pairs, not trained through the backbone.

Beyond the paper. Training all weights on few pairs teaches a small backbone the surface of completions and unteaches
it to read critiques. Here each side of a pair is read once, with `zero_label.CUE` behind it, and the reward is linear
in the backbone's last hidden state there: some multiple of its own good-minus-bad reading, and a ridge-penalised rest,
both fitted by the ranking loss. How much is left to the rest is chosen by cross-validation on the same pairs.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from critrm import models
from critrm.batching import EncodedPair
from critrm.losses import ranking_loss
from critrm.readings import Readings
from critrm.reward_model import RewardModel

STRENGTHS = (100.0, 30.0, 10.0, 3.0, 1.0, 0.3, 0.1, 0.03, 0.01)
"""Weights of the squared head, for features of unit spread, from which cross-validation chooses."""
N_FOLDS = 5


@dataclass(frozen=True, slots=True)
class HeadFit:
    """A fitted head, and how it was chosen."""

    weight: torch.Tensor
    """(hidden_size,)."""
    strength: float
    """The ridge's weight."""
    held_out_loss: float
    """Mean ranking loss of pairs that the head was not fitted to, by cross-validation."""
    held_out_accuracy: float
    """Their share with the chosen completion strictly ahead."""


def frozen_head(
    model: RewardModel,
    pairs: Sequence[EncodedPair],
    *,
    direction: torch.Tensor,
    readings: Readings,
    seed: int,
    precision: str = "auto",
    console: Console | None = None,
) -> HeadFit:
    """Read all pairs with the backbone and give the model the head that fits them.

    Args:
        model: a backbone under a new head, which is replaced.
        pairs: the training pairs as the model reads them, with their margins.
        direction: (hidden_size,), the backbone's own reading; see `zero_label.reading_direction`.
        readings: keeps what was read.
        seed: of the folds.
        precision: `fp32`, `bf16`, or `auto`; the head itself is fitted in 64 bits.
        console: gets the progress bar.

    Raises:
        ModelError: memory does not suffice.
        StorageError: the disk is full.
    """
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    device = models.choose_device()
    model.precision = models.choose_precision(device) if precision == "auto" else precision
    torch.nn.Module.to(model.model, device)  # transformers' own `to` is not typed
    with Progress(*columns, console=console or Console(quiet=True)) as progress:
        task = progress.add_task(f"read {escape(model.critic)}", total=len(pairs))
        ends = readings.of(model, pairs, on_progress=lambda n: progress.update(task, advance=n))
    fit = fit_head(ends[:, 0] - ends[:, 1], torch.tensor([pair.margin for pair in pairs]), direction, seed=seed)
    with torch.no_grad():
        model.head.weight.copy_(fit.weight[None])
    torch.nn.Module.to(model.model, "cpu")
    return fit


def fit_head(differences: torch.Tensor, margins: torch.Tensor, direction: torch.Tensor, *, seed: int) -> HeadFit:
    """Fit a head to the differences of pairs.

    Args:
        differences: (n_pairs, hidden_size), chosen minus rejected.
        margins: (n_pairs,), as in equation 2.
        direction: (hidden_size,), along which the head is not penalised.
        seed: of the folds.
    """
    differences, margins, direction = differences.double(), margins.double(), direction.double()
    spread = differences.square().mean(0).sqrt().clamp_min(1e-12)
    reading = differences @ direction
    scale = reading.square().mean().sqrt().clamp_min(1e-12)
    features = torch.cat([differences / spread, (reading / scale)[:, None]], dim=1)
    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(seed))
    folds = [order[start::N_FOLDS] for start in range(min(N_FOLDS, len(order)))]
    found = []
    for strength in STRENGTHS:
        losses, n_right = [], 0
        for fold in folds if len(folds) > 1 else ():
            kept = torch.ones(len(features), dtype=torch.bool)
            kept[fold] = False
            rewards = features[fold] @ _fit(features[kept], margins[kept], strength)
            losses += _losses(rewards, margins[fold]).tolist()
            n_right += int((rewards > 0).sum())
        loss = sum(losses) / len(losses) if losses else float("nan")
        found.append((loss, strength, n_right / max(len(losses), 1)))
    # A single pair leaves nothing to choose by: the strongest ridge, which leaves the backbone's own reading.
    loss, strength, accuracy = min(found, key=lambda each: each[0]) if len(folds) > 1 else found[0]
    fitted = _fit(features, margins, strength)
    weight = fitted[:-1] / spread + fitted[-1] / scale * direction
    return HeadFit(weight.float(), strength, loss, accuracy)


def _losses(rewards: torch.Tensor, margins: torch.Tensor) -> torch.Tensor:
    return ranking_loss(torch.stack([rewards, torch.zeros_like(rewards)], dim=1), margins)


def _fit(features: torch.Tensor, margins: torch.Tensor, strength: float) -> torch.Tensor:
    """Minimise the mean ranking loss plus `strength` times the square of all weights but the last."""
    weight = torch.zeros(features.shape[1], dtype=features.dtype, requires_grad=True)
    optimiser = torch.optim.LBFGS([weight], max_iter=200, line_search_fn="strong_wolfe")

    def step() -> float:
        optimiser.zero_grad()
        loss = _losses(features @ weight, margins).mean() + strength * weight[:-1].square().sum()
        # A trace of a penalty, without which separable pairs would drive the last weight to infinity.
        loss = loss + 1e-4 * weight[-1].square()
        loss.backward()  # type: ignore[no-untyped-call]  # torch has no types for it
        return float(loss.detach())

    optimiser.step(step)  # type: ignore[no-untyped-call]  # nor for this
    return weight.detach()
