"""Encoding with counts of what was cut, critique dropout, the shared order, and the critique tokens of a packed row."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from critrm.batching import EncodedPair
from critrm.config import TrainConfig
from critrm.errors import ConfigError, DataError
from critrm.reward_model import Reads, RewardModel
from critrm.training_data import (
    TRAINING_ROW_TOKENS,
    EpochSampler,
    ScoreScale,
    TrainingPair,
    TrainingPairs,
    collate,
    drop_critiques,
    encode_pairs,
    margin_of,
    packed_row,
)
from critrm.types import CritiquedPair


@pytest.fixture
def arm(pairs):
    return [
        CritiquedPair(pair=pair, critic="c", chosen_critique="good good", rejected_critique="bad, bad and bad")
        for pair in pairs
    ]


def test_margins_come_from_the_pair_then_from_its_rating_then_from_nothing(arm):
    margins = TrainConfig(backbone="x").margins
    better = replace(arm[0], pair=replace(arm[0].pair, rating="better"))
    assert margin_of(better, margins) == pytest.approx(2 / 3)
    assert margin_of(replace(better, pair=replace(better.pair, margin=0.2)), margins) == 0.2
    assert margin_of(replace(better, pair=replace(better.pair, rating=None)), margins) == 0.0
    assert margin_of(better, None) == 0.0


def test_dropped_critiques_are_about_the_share_and_the_seed_and_id_decide(arm):
    many = [replace(item, pair=replace(item.pair, id=f"{item.pair.id}-{n}")) for n in range(50) for item in arm]
    dropped = drop_critiques(many, 0.3, seed=0)
    bare = {item.pair.id for item in dropped if not item.chosen_critique}
    assert bare == {item.pair.id for item in dropped if not item.rejected_critique}
    assert 0.2 < len(bare) / len(many) < 0.4
    assert [item.pair.id for item in dropped] == [item.pair.id for item in many]
    assert {item.pair.id for item in drop_critiques(many[::-1], 0.3, seed=0) if not item.chosen_critique} == bare
    assert {item.pair.id for item in drop_critiques(many, 0.3, seed=1) if not item.chosen_critique} != bare
    assert drop_critiques(many, 0.0, seed=0) == many


def test_the_critics_scores_become_targets_of_mean_0_and_spread_1(tiny_model, arm):
    config = TrainConfig(backbone=str(tiny_model), score_weight=1.0)
    scored = [replace(item, chosen_score=float(n + 4), rejected_score=float(n)) for n, item in enumerate(arm)]
    scored[1] = replace(scored[1], rejected_score=None)
    model = RewardModel.from_backbone(str(tiny_model), Reads(critic="c"), seed=0)
    pairs, _ = encode_pairs(scored, model, config=config, score_scale=ScoreScale.of(scored))
    found = torch.tensor([pair.scores for pair in pairs]).flatten()
    known = found[~found.isnan()]
    assert len(known) == 2 * len(arm) - 1 and math.isnan(pairs[1].scores[1])
    assert float(known.mean()) == pytest.approx(0, abs=1e-6)
    assert float(known.std(correction=0)) == pytest.approx(1)
    assert packed_row(pairs)["scores"].shape == (len(arm), 2)
    unasked = encode_pairs(scored, model, config=config)[0]
    assert all(math.isnan(score) for pair in unasked for score in pair.scores)


@pytest.mark.parametrize(
    ("score", "reason"),
    [
        (None, "'c' of these 3 pairs carry none: give critiques with a `score`"),
        (5.0, "'c' of these 3 pairs carry all the same"),
        *[(bad, "chosen_score.*must be finite numbers") for bad in ("8", True, math.nan, math.inf)],
    ],
)
def test_scores_that_teach_nothing_are_an_error(arm, score, reason):
    scored = [replace(item, chosen_score=score, rejected_score=score) for item in arm[:3]]
    with pytest.raises((ConfigError, DataError), match=reason):
        ScoreScale.of(scored)


def test_pairs_that_are_cut_are_counted_by_segment(tiny_model, arm):
    config = TrainConfig(backbone=str(tiny_model))
    item = arm[0]
    long_prompt = replace(
        item, pair=replace(item.pair, id="p", prompt=(replace(item.pair.prompt[0], content="a b " * 99),))
    )
    long_completion = replace(item, pair=replace(item.pair, id="y", chosen="a b " * 99))
    long_critique = replace(item, pair=replace(item.pair, id="c"), rejected_critique="a b " * 99)
    model = RewardModel.from_backbone(str(tiny_model), Reads(critic="c", max_length=120), seed=0)
    assert encode_pairs([long_prompt], model, config=config)[1] == {"prompt": 1, "completion": 0, "critique": 0}
    pairs, n_cut = encode_pairs([item, long_prompt, long_completion, long_critique], model, config=config)
    assert n_cut["completion"] >= 1
    assert n_cut["critique"] == 1
    for pair in pairs:
        assert len(pair.encoded.prompt) + max(map(len, pair.encoded.branches)) <= 120
    roomy = RewardModel.from_backbone(str(tiny_model), Reads(critic="c", max_length=1000), seed=0)
    assert not any(encode_pairs([item, long_prompt], roomy, config=config)[1].values())


@given(st.integers(1, 40), st.integers(0, 5), st.integers(1, 8))
def test_the_order_is_a_new_permutation_each_epoch_filled_up_to_the_multiple(n_pairs, seed, multiple):
    sampler = EpochSampler(n_pairs, seed=seed, multiple=multiple)
    first = list(sampler)
    assert sorted(first[:n_pairs]) == list(range(n_pairs))
    assert len(first) == len(sampler)
    assert len(first) % multiple == 0
    assert len(first) - n_pairs < multiple
    assert set(first[n_pairs:]) <= {n_pairs}
    assert list(sampler) == first
    sampler.set_epoch(1)
    assert n_pairs < 8 or list(sampler) != first


def test_what_fills_up_a_batch_weighs_nothing():
    data = TrainingPairs(
        [TrainingPair(EncodedPair("a", [1, 2], ([3], [4]))), TrainingPair(EncodedPair("b", [1], ([3], [4])))]
    )
    assert len(data) == 2
    assert data[2].weight == 0
    assert data[2].encoded.pair_id == "b"
    assert packed_row([data[0], data[2]])["weights"].tolist() == [1, 0]


LENGTHS = st.tuples(st.integers(1, 4), *[st.tuples(st.integers(0, 3), st.integers(0, 3)) for _ in range(2)])


@given(st.lists(LENGTHS, min_size=1, max_size=4), st.booleans())
def test_critique_tokens_are_predicted_from_the_token_before_them_in_their_own_sequence(rows, critique_first):
    # Each token is a number of its own, so that a sequence can be recognised wherever it lies in the row.
    counter = iter(range(1000))
    pairs, followed, expected = [], {}, []
    for index, (n_prompt, *branches) in enumerate(rows):
        prompt = [next(counter) for _ in range(n_prompt)]
        made = []
        for n_completion, n_critique in branches:
            branch = [next(counter) for _ in range(max(n_completion, n_critique == 0) + n_critique)]
            sequence = prompt + branch
            followed |= dict(zip(sequence[n_prompt:], sequence[n_prompt - 1 :], strict=False))
            critique = branch[:n_critique] if critique_first else branch[len(branch) - n_critique :]
            expected += [(token, index) for token in critique]
            made.append(branch)
        n_critiques = tuple(n for _, n in branches)
        encoded = EncodedPair(str(index), prompt, tuple(made))
        pairs.append(TrainingPair(encoded, n_critiques, critique_first=critique_first))
    batch = packed_row(pairs)
    tokens = batch["input_ids"][0, batch["critique_tokens"]].tolist()
    sources = batch["input_ids"][0, batch["critique_sources"]].tolist()
    assert list(zip(tokens, batch["critique_pairs"].tolist(), strict=True)) == expected
    assert sources == [followed[token] for token in tokens]
    assert batch["critique_sources"].dtype == torch.long


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 900), min_size=1, max_size=9), st.integers(2, 4))
def test_rows_for_several_threads_hold_every_pair_once_and_are_even(lengths, n_at_once):
    pairs = [
        TrainingPair(EncodedPair(str(n), [7] * length, ([n], [8])), weight=float(n)) for n, length in enumerate(lengths)
    ]
    rows = collate(pairs, n_at_once=n_at_once)["rows"]
    assert sorted(weight for row in rows for weight in row["weights"].tolist()) == [float(n) for n in range(len(pairs))]
    sizes = [row["input_ids"].shape[1] for row in rows]
    assert sum(sizes) == sum(pair.encoded.n_tokens for pair in pairs)
    if len(pairs) >= n_at_once:
        assert len(rows) >= n_at_once
        # No row could be the longest by more than what one pair adds.
        assert max(sizes) - min(sizes) <= max(pair.encoded.n_tokens for pair in pairs)
    # A row has more tokens than it should only by one pair.
    assert max(sizes) <= TRAINING_ROW_TOKENS + max(pair.encoded.n_tokens for pair in pairs)
    assert collate(pairs)["rows"][0]["weights"].tolist() == [pair.weight for pair in pairs]
