"""What training minimises, per pair: ranking with a margin, scaled, centring, scores, critique tokens (section 3.2)."""

from typing import Literal

import torch
from torch.nn import functional


def ranking_loss(rewards: torch.Tensor, margins: torch.Tensor) -> torch.Tensor:
    """Equations 1 and 2: -log sigmoid(chosen - rejected - margin).

    Args:
        rewards: (n_pairs, 2), chosen first.
        margins: (n_pairs,).

    Returns:
        (n_pairs,) losses.
    """
    return -functional.logsigmoid(rewards[:, 0] - rewards[:, 1] - margins)


def scaled_loss(rewards: torch.Tensor, margins: torch.Tensor) -> torch.Tensor:
    """The scaled Bradley-Terry loss: margin * -log sigmoid(chosen - rejected); a pair without a margin weighs nothing.

    Args:
        rewards: (n_pairs, 2), chosen first.
        margins: (n_pairs,).

    Returns:
        (n_pairs,) losses.
    """
    return margins * -functional.logsigmoid(rewards[:, 0] - rewards[:, 1])


def centring_loss(rewards: torch.Tensor) -> torch.Tensor:
    """(chosen + rejected)^2: differences leave the rewards' level open, this holds it at 0.

    Args:
        rewards: (n_pairs, 2).

    Returns:
        (n_pairs,) losses.
    """
    return (rewards[:, 0] + rewards[:, 1]) ** 2


def score_loss(rewards: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """Mean square of reward minus the critic's standardised score, over the sides that have one; 0 without any.

    Args:
        rewards: (n_pairs, 2).
        scores: (n_pairs, 2), not-a-number where there is none.

    Returns:
        (n_pairs,) losses.
    """
    known = ~scores.isnan()
    errors = torch.where(known, rewards - scores.nan_to_num(), 0.0)
    return errors.square().sum(1) / known.sum(1).clamp(min=1)


def critique_loss(logits: torch.Tensor, targets: torch.Tensor, pair_of: torch.Tensor, *, n_pairs: int) -> torch.Tensor:
    """Mean negative log-likelihood of each pair's critique tokens, both sides' together; 0 without any.

    Args:
        logits: (n_tokens, n_vocabulary), one row for each critique token.
        targets: (n_tokens,) the tokens.
        pair_of: (n_tokens,) the index of the pair that each belongs to.
        n_pairs: how many pairs there are.

    Returns:
        (n_pairs,) losses.
    """
    token_losses = functional.cross_entropy(logits.float(), targets, reduction="none")
    sums = token_losses.new_zeros(n_pairs).index_add(0, pair_of, token_losses)
    return sums / torch.bincount(pair_of, minlength=n_pairs).clamp(min=1)


def reward_losses(
    rewards: torch.Tensor,
    margins: torch.Tensor,
    scores: torch.Tensor,
    *,
    loss: Literal["ranking", "scaled"],
    center_weight: float,
    score_weight: float,
) -> torch.Tensor:
    """The part of the loss that the rewards decide, per pair; arguments are those above and the config's."""
    ranking = ranking_loss if loss == "ranking" else scaled_loss
    losses = ranking(rewards, margins)
    if center_weight:
        losses = losses + center_weight * centring_loss(rewards)
    return losses + score_weight * score_loss(rewards, scores) if score_weight else losses
