"""A reward head on a backbone that stays as it was pretrained: fitted to the pairs, not trained through the backbone.

Beyond the paper. Training all weights on few pairs teaches a small backbone the surface of completions and unteaches
it to read critiques. Here each side of a pair is read once, with `zero_label.CUE` behind it, and the reward is linear
in the backbone's last hidden state there: some multiple of its own good-minus-bad reading, and a ridge-penalised rest,
both fitted by the ranking loss, and where that is asked for by the critic's own scores. How much is left to the rest is
chosen by cross-validation on the same pairs.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from critrm import models
from critrm.losses import ranking_loss, score_loss
from critrm.readings import Readings
from critrm.reward_model import RewardModel
from critrm.training_data import TrainingPair

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
    pairs: Sequence[TrainingPair],
    *,
    direction: torch.Tensor,
    readings: Readings,
    seed: int,
    score_weight: float = 0.0,
    precision: str = "auto",
    console: Console | None = None,
) -> HeadFit:
    """Read all pairs with the backbone and give the model the head that fits them.

    Args:
        model: a backbone under a new head, which is replaced.
        pairs: the training pairs as the model reads them, with their margins and scores.
        direction: (hidden_size,), the backbone's own reading; see `zero_label.reading_direction`.
        readings: keeps what was read.
        seed: of the folds.
        score_weight: of the critic's own scores beside the labels.
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
    encoded = [pair.encoded for pair in pairs]
    with Progress(*columns, console=console or Console(quiet=True)) as progress:
        task = progress.add_task(f"read {escape(model.critic)}", total=len(pairs))
        ends = readings.of(model, encoded, on_progress=lambda n: progress.update(task, advance=n))
    fit = fit_head(
        ends,
        torch.tensor([pair.margin for pair in encoded]),
        direction,
        scores=torch.tensor([pair.scores for pair in pairs]),
        score_weight=score_weight,
        seed=seed,
    )
    with torch.no_grad():
        model.head.weight.copy_(fit.weight[None])
    torch.nn.Module.to(model.model, "cpu")
    return fit


def fit_head(
    ends: torch.Tensor,
    margins: torch.Tensor,
    direction: torch.Tensor,
    *,
    scores: torch.Tensor | None = None,
    score_weight: float = 0.0,
    seed: int,
) -> HeadFit:
    """Fit a head to pairs.

    Args:
        ends: (n_pairs, 2, hidden_size), what the backbone says at the ends of both sides, chosen first.
        margins: (n_pairs,), as in equation 2.
        direction: (hidden_size,), along which the head is not penalised.
        scores: (n_pairs, 2), the critic's own on a scale of mean 0 and spread 1; not-a-number where there is none.
        score_weight: of the squared distance to the scores; 0 is labels alone.
        seed: of the folds.
    """
    ends, margins, direction = ends.double(), margins.double(), direction.double()
    differences = ends[:, 0] - ends[:, 1]
    spread = differences.square().mean(0).sqrt().clamp_min(1e-12)
    scale = (differences @ direction).square().mean().sqrt().clamp_min(1e-12)

    def features_of(read: torch.Tensor) -> torch.Tensor:
        return torch.cat([read / spread, (read @ direction / scale)[..., None]], dim=-1)

    features = features_of(differences)
    # Scores have a level, which labels do not see and a head without an intercept cannot have: it is taken out.
    sides = features_of(ends - ends.mean((0, 1))) if scores is not None and score_weight else None
    targets = torch.zeros(0) if scores is None else scores.double()

    def fit(kept: torch.Tensor, strength: float) -> torch.Tensor:
        taught = None if sides is None else (sides[kept], targets[kept], score_weight)
        return _fit(features[kept], margins[kept], strength, taught)

    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(seed))
    folds = [order[start::N_FOLDS] for start in range(min(N_FOLDS, len(order)))]
    found = []
    for strength in STRENGTHS:
        losses, n_right = [], 0
        for fold in folds if len(folds) > 1 else ():
            kept = torch.ones(len(features), dtype=torch.bool)
            kept[fold] = False
            rewards = features[fold] @ fit(kept, strength)
            losses += _losses(rewards, margins[fold]).tolist()
            n_right += int((rewards > 0).sum())
        loss = sum(losses) / len(losses) if losses else float("nan")
        found.append((loss, strength, n_right / max(len(losses), 1)))
    # A single pair leaves nothing to choose by: the strongest ridge, which leaves the backbone's own reading.
    loss, strength, accuracy = min(found, key=lambda each: each[0]) if len(folds) > 1 else found[0]
    fitted = fit(torch.ones(len(features), dtype=torch.bool), strength)
    weight = fitted[:-1] / spread + fitted[-1] / scale * direction
    return HeadFit(weight.float(), strength, loss, accuracy)


def _losses(rewards: torch.Tensor, margins: torch.Tensor) -> torch.Tensor:
    return ranking_loss(torch.stack([rewards, torch.zeros_like(rewards)], dim=1), margins)


def _fit(
    features: torch.Tensor,
    margins: torch.Tensor,
    strength: float,
    taught: tuple[torch.Tensor, torch.Tensor, float] | None = None,
) -> torch.Tensor:
    """Minimise the mean ranking loss plus `strength` times the square of all weights but the last.

    Args:
        features: (n_pairs, n), chosen minus rejected.
        margins: (n_pairs,).
        strength: the ridge's weight.
        taught: with scores, the features of both sides (n_pairs, 2, n), the scores (n_pairs, 2), and their weight.
    """
    weight = torch.zeros(features.shape[1], dtype=features.dtype, requires_grad=True)
    optimiser = torch.optim.LBFGS([weight], max_iter=200, line_search_fn="strong_wolfe")

    def step() -> float:
        optimiser.zero_grad()
        loss = _losses(features @ weight, margins).mean() + strength * weight[:-1].square().sum()
        if taught:
            sides, scores, score_weight = taught
            loss = loss + score_weight * score_loss(sides @ weight, scores).mean()
        # A trace of a penalty, without which separable pairs would drive the last weight to infinity.
        loss = loss + 1e-4 * weight[-1].square()
        loss.backward()  # type: ignore[no-untyped-call]  # torch has no types for it
        return float(loss.detach())

    optimiser.step(step)  # type: ignore[no-untyped-call]  # nor for this
    return weight.detach()
