"""What stands beside the accuracy of one evaluation."""

import io
import json
import math

import pytest
from rich.console import Console

from critrm.baselines import LONGER, LONGER_CRITIQUE, UNTRAINED_ALONE
from critrm.diagnostics import diagnose, diagnostics_table
from critrm.errors import DataError
from critrm.results import ALL
from critrm.types import CritiquedPair, Outcome, Score


@pytest.fixture
def items(pairs):
    return [
        CritiquedPair(pair=pair, critic="[c]", chosen_critique="Good, and right.", rejected_critique="Bad.")
        for pair in pairs
    ]


def _shown(statistics):
    console = Console(width=200, file=io.StringIO())
    console.print(diagnostics_table(statistics))
    return " ".join(console.file.getvalue().split())


def test_all_statistics_of_one_evaluation(items):
    scores = [Score(item.pair.id, float(n % 3), 1.0) for n, item in enumerate(items)]
    found = diagnose(items, scores)
    arm = found["groups"][ALL]["arms"]["[c]"]
    assert (arm["mean"], arm["half"], arm["n_tie"]) == (pytest.approx(4 / 12), pytest.approx(0.5), 4)
    assert set(found["groups"]) == {ALL, "single-turn", "multi-turn"}
    null = found["groups"][ALL]["baselines"]["[c]"]
    assert null[LONGER]["mean"] == 0.0
    assert null[LONGER_CRITIQUE]["difference"]["value"] == pytest.approx(-8 / 12)
    assert found["calibration"]["n"] == 12
    assert found["length_bias"]["chosen_shorter"]["n_right"] == 4
    assert any(f"does not beat {LONGER_CRITIQUE} (1.000, p " in note for note in found["notes"])
    assert any("was not compared with a bag of words" in note for note in found["notes"])
    text = _shown(found)
    assert "calibration error" in text
    assert "[c] (0.333) does not beat" in text, "a critic's name is no markup"
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize("scores", ["none", "nan"])
def test_nothing_scored_is_no_number_and_no_defeat(items, scores):
    given = [] if scores == "none" else [Score(item.pair.id, math.nan, 0.0) for item in items]
    found = diagnose(items, given)
    assert found["calibration"] is None
    assert found["groups"][ALL]["arms"]["[c]"]["mean"] is None
    assert not any("does not beat" in note for note in found["notes"])
    assert LONGER in _shown(found)
    json.dumps(found, allow_nan=False)


def test_what_the_untrained_backbone_reads_is_a_row(items):
    scores = [Score(item.pair.id, 1.0, 0.0) for item in items]
    found = diagnose(items, scores, zero_label={UNTRAINED_ALONE: [Outcome.WRONG] * 12})
    null = found["groups"][ALL]["baselines"]["[c]"][UNTRAINED_ALONE]
    assert (null["mean"], null["difference"]["value"]) == (0.0, 1.0)
    assert UNTRAINED_ALONE in _shown(found)


def test_one_pair_and_all_ties(items):
    found = diagnose(items[:1], [Score(items[0].pair.id, 1.0, 1.0)])
    assert found["groups"][ALL]["arms"]["[c]"]["half"] == 0.5
    assert found["length_bias"]["correlation"] is None


def test_pairs_of_one_critic_are_needed(items, pairs):
    with pytest.raises(DataError, match="no pairs"):
        diagnose([], [])
    with pytest.raises(DataError, match="one critic"):
        diagnose([*items[1:], CritiquedPair(pair=pairs[0])], [])


def test_an_arm_without_critiques_gets_no_note(pairs):
    plain = [CritiquedPair(pair=pair) for pair in pairs]
    assert diagnose(plain, [Score(pair.id, 0.0, 1.0) for pair in pairs])["notes"] == []
