"""Rewards averaged over several critiques of a completion."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from critrm.augment import augment_pairs
from critrm.averaging import SampleAveraged, samples_of
from critrm.config import Recipe
from critrm.errors import DataError
from critrm.evaluate import evaluate
from critrm.pipeline import run_recipe
from critrm.reward_model import Reads, RewardModel
from critrm.types import Critique, CritiquedPair


def critique(pair_id, side, sample, text="", failure=""):
    text = "" if failure else text or f"{side} {sample}: it is {side}."
    key = f"{pair_id} {side} {sample}"
    about = {"critic": "c", "prompt_version": "", "sample": sample, "failure": failure}
    return Critique(key=key, pair_id=pair_id, side=side, text=text, **about)


def all_critiques(pairs, n=3):
    return [critique(pair.id, side, k) for pair in pairs for side in ("chosen", "rejected") for k in range(n)]


@pytest.fixture(scope="module")
def model(tiny_model):
    return RewardModel.from_backbone(str(tiny_model), Reads(critic="c", max_length=400), seed=3)


@pytest.fixture
def items(pairs):
    return augment_pairs(pairs, {"c": all_critiques(pairs)}).arms["c"]


@settings(deadline=None, max_examples=10)
@given(kept=st.sets(st.integers(0, 2), min_size=1), limit=st.integers(1, 3))
def test_the_reward_is_the_mean_over_the_critiques_that_there_are(model, kept, limit):
    from critrm.types import Message, PreferencePair

    pair = PreferencePair(id="a", prompt=(Message("user", "2 + 2?"),), chosen="4", rejected="5")
    rows = [row for row in all_critiques([pair]) if row.sample in kept | {0} or row.side == "rejected"]
    samples = samples_of([pair], rows, n_samples=limit)
    mean = SampleAveraged(model, samples).score([CritiquedPair(pair=pair, critic="c")])[0]
    for side in ("chosen", "rejected"):
        texts = [row.text for row in rows if row.side == side and row.sample < limit]
        assert samples["a", side] == tuple(texts)
        completion = pair.completion(side)
        single = model.score_completions(pair.prompt, [completion] * len(texts), critiques=texts)
        assert getattr(mean, side) == pytest.approx(sum(single) / len(single), abs=2e-3)


def test_failed_and_flawed_critiques_are_left_out(pairs):
    pair = pairs[0]
    rows = [
        critique(pair.id, "chosen", 0),
        critique(pair.id, "chosen", 1, failure="http 500"),
        critique(pair.id, "chosen", 2, text="I'm sorry, but I can't help with that."),
        critique(pair.id, "rejected", 0, text="Good. 8/10"),
    ]
    samples = samples_of([pair], rows, n_samples=3, drop=("refusal",), strip_scores=True)
    assert samples[pair.id, "chosen"] == ("chosen 0: it is chosen.",)
    assert "8/10" not in samples[pair.id, "rejected"][0]


def test_a_pair_without_critiques_is_an_error(model, pairs):
    with pytest.raises(DataError, match="no critique of the chosen"):
        SampleAveraged(model, {}).score([CritiquedPair(pair=pairs[0], critic="c")])


def test_saved_rewards_are_used_again_for_the_same_critiques_alone(model, pairs, items, tmp_path):
    three = SampleAveraged(model, samples_of(pairs, all_critiques(pairs), n_samples=3))
    two = SampleAveraged(model, samples_of(pairs, all_critiques(pairs), n_samples=2))
    assert three.fingerprint != two.fingerprint != model.fingerprint
    evaluate(three, items, out=tmp_path)
    first = (tmp_path / "pairs.scores.jsonl").read_text()
    evaluate(three, items, out=tmp_path)
    assert (tmp_path / "pairs.scores.jsonl").read_text() == first
    evaluate(two, items, out=tmp_path)
    assert (tmp_path / "pairs.scores.jsonl").read_text() != first


def recipe(tiny_model, **critic):
    return Recipe.model_validate(
        {
            "name": "averaged",
            "preferences": {
                "train": {"path": "bundled:mini-pairs.jsonl", "split": "train", "limit": 8},
                "test": {"mini": {"path": "bundled:mini-pairs.jsonl", "split": "test", "limit": 8}},
            },
            "critique": {"critics": {"tiny": {"model": f"local:{tiny_model}", "max_tokens": 6, **critic}}},
            "augment": {"max_length": 600},
            "train": {"backbone": str(tiny_model), "batch_size": 8, "precision": "fp32"},
            "evaluate": {"samples": 3, "zero_label": False},
        }
    )


def test_a_recipe_averages_over_what_its_critic_wrote(tiny_model, tmp_path):
    averaged = recipe(tiny_model, samples=3, temperature=1.0)
    run_recipe(averaged, out=tmp_path)
    place = "evaluate/tiny/seed-0/mini/pairs.scores.jsonl"
    scores = (tmp_path / place).read_text()
    evaluate_section = averaged.evaluate.model_copy(update={"samples": 1})
    run_recipe(averaged.model_copy(update={"evaluate": evaluate_section}), out=tmp_path)
    assert (tmp_path / place).read_text() != scores, "the same run folder, evaluated anew"
    rows = [json.loads(line) for line in (tmp_path / "critique/tiny.jsonl").read_text().splitlines()]
    assert {row["sample"] for row in rows} == {0, 1, 2}


def test_a_recipe_without_samples_to_average_is_an_error(tiny_model, tmp_path):
    with pytest.raises(DataError, match="no critic wrote more than one"):
        run_recipe(recipe(tiny_model), out=tmp_path)
