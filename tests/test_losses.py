"""Each loss against its formula, pair by pair."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from critrm.losses import centring_loss, critique_loss, ranking_loss, reward_losses, scaled_loss, score_loss

FINITE = st.floats(-20, 20)
ROWS = st.lists(st.tuples(FINITE, FINITE, st.floats(0, 3)), min_size=1)


def _tensors(rows):
    rewards = torch.tensor([[chosen, rejected] for chosen, rejected, _ in rows], dtype=torch.float64)
    return rewards, torch.tensor([margin for _, _, margin in rows], dtype=torch.float64)


@given(ROWS)
def test_ranking_loss_is_equation_1(rows):
    expected = [math.log1p(math.exp(-(chosen - rejected - margin))) for chosen, rejected, margin in rows]
    assert ranking_loss(*_tensors(rows)).tolist() == pytest.approx(expected, rel=1e-9, abs=1e-12)


@given(ROWS)
def test_scaled_loss_multiplies_by_the_margin(rows):
    expected = [margin * math.log1p(math.exp(rejected - chosen)) for chosen, rejected, margin in rows]
    assert scaled_loss(*_tensors(rows)).tolist() == pytest.approx(expected, rel=1e-9, abs=1e-12)


@given(ROWS)
def test_centring_loss_is_the_square_of_the_sum(rows):
    expected = [(chosen + rejected) ** 2 for chosen, rejected, _ in rows]
    assert centring_loss(_tensors(rows)[0]).tolist() == pytest.approx(expected, rel=1e-9, abs=1e-12)


SCORE = st.none() | FINITE


@given(st.lists(st.tuples(FINITE, FINITE, SCORE, SCORE), min_size=1))
def test_score_loss_is_the_mean_square_of_the_sides_that_have_a_score(rows):
    rewards = torch.tensor([row[:2] for row in rows], dtype=torch.float64).requires_grad_()
    scores = torch.tensor([[math.nan if s is None else s for s in row[2:]] for row in rows], dtype=torch.float64)
    squares = [[(r - s) ** 2 for r, s in zip(row[:2], row[2:], strict=True) if s is not None] for row in rows]
    losses = score_loss(rewards, scores)
    assert losses.tolist() == pytest.approx([sum(each) / max(len(each), 1) for each in squares])
    (gradient,) = torch.autograd.grad(losses.sum(), rewards)
    assert torch.equal(gradient[scores.isnan()], torch.zeros(int(scores.isnan().sum()), dtype=torch.float64))


@given(ROWS, st.sampled_from(["ranking", "scaled"]), st.floats(0, 2), st.floats(0, 2))
def test_the_rewards_loss_is_the_chosen_one_with_centring_and_scores_as_weighted(rows, loss, center, weight):
    rewards, margins = _tensors(rows)
    scores = rewards.flip(1) / 3
    first = {"ranking": ranking_loss, "scaled": scaled_loss}[loss](rewards, margins)
    expected = first + center * centring_loss(rewards) + weight * score_loss(rewards, scores)
    found = reward_losses(rewards, margins, scores, loss=loss, center_weight=center, score_weight=weight)
    torch.testing.assert_close(found, expected)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2), st.lists(FINITE, min_size=3, max_size=3))))
def test_critique_loss_is_each_pairs_mean_over_its_tokens(rows):
    logits = torch.tensor([row[2] for row in rows], dtype=torch.float32).reshape(-1, 3)
    targets, pair_of = (torch.tensor([row[k] for row in rows], dtype=torch.long) for k in (1, 0))
    found = critique_loss(logits, targets, pair_of, n_pairs=4).tolist()
    for pair in range(4):
        nlls = [
            math.log(sum(math.exp(float(value)) for value in logits[index])) - float(logits[index, target])
            for index, (owner, target, _) in enumerate(rows)
            if owner == pair
        ]
        assert found[pair] == pytest.approx(sum(nlls) / max(len(nlls), 1), rel=1e-4, abs=1e-4)
