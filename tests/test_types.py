"""What the records say about themselves: frozen, light, and the paper's rule for a tie."""

import dataclasses
import math
import subprocess
import sys

import pytest

from critrm import types
from critrm.types import NO_CRITIC, RATINGS, SIDES, CritiquedPair, Message, Outcome, PreferencePair, Score

RECORDS = [item for item in vars(types).values() if isinstance(item, type) and dataclasses.is_dataclass(item)]
PAIR = PreferencePair(id="a", prompt=(Message("user", "Why?"),), chosen="Because.", rejected="No idea.")


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: record.__name__)
def test_records_are_frozen_slotted_and_documented(record):
    assert record.__dataclass_params__.frozen
    assert "__slots__" in vars(record)
    assert record.__doc__
    assert not record.__doc__.startswith(record.__name__ + "(")  # the signature that dataclasses writes itself


def test_a_record_cannot_be_changed_and_equals_its_copy():
    with pytest.raises(dataclasses.FrozenInstanceError):
        PAIR.chosen = "x"
    assert dataclasses.replace(PAIR) == PAIR
    assert hash(dataclasses.replace(PAIR)) == hash(PAIR)
    assert dataclasses.replace(PAIR, chosen="x") != PAIR


def test_the_sides_of_a_pair_and_of_its_critiques():
    item = CritiquedPair(pair=PAIR, critic="c", chosen_critique="good", rejected_critique="bad")
    assert [PAIR.completion(side) for side in SIDES] == ["Because.", "No idea."]
    assert [item.critique(side) for side in SIDES] == ["good", "bad"]
    bare = CritiquedPair(pair=PAIR)
    assert (bare.critic, [bare.critique(side) for side in SIDES]) == (NO_CRITIC, ["", ""])


def test_what_content_hashes_cover_is_what_it_was_before_there_were_scores():
    item = CritiquedPair(pair=PAIR, critic="c", chosen_critique="good", rejected_critique="bad", chosen_score=7.0)
    assert set(item.content()) == {"pair", "critic", "chosen_critique", "rejected_critique"}
    assert item.content() == dataclasses.replace(item, chosen_score=1.0).content()
    assert item.content(with_scores=True) == dataclasses.asdict(item)


@pytest.mark.parametrize(
    ("chosen", "rejected", "outcome"),
    [
        (1.0, 0.5, Outcome.RIGHT),
        (-2.0, -1.0, Outcome.WRONG),
        (0.25, 0.25, Outcome.TIE),
        (0.0, -0.0, Outcome.TIE),
        (math.inf, 3.0, Outcome.RIGHT),
        (math.nan, 1.0, Outcome.UNSCORED),
        (1.0, math.nan, Outcome.UNSCORED),
        (math.nan, math.nan, Outcome.UNSCORED),
    ],
)
def test_only_a_strictly_higher_chosen_reward_is_right(chosen, rejected, outcome):
    assert Score("a", chosen, rejected).outcome is outcome


def test_ratings_are_the_papers_three_points_from_weak_to_strong():
    assert RATINGS == ("slightly better", "better", "significantly better")


def test_the_records_need_nothing_heavy():
    heavy = {"torch", "transformers", "datasets", "openai", "numpy", "pydantic", "pyarrow"}
    code = f"import sys, critrm.types, critrm.errors, critrm.store; print(sorted({heavy} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
