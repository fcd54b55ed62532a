"""Null baselines: what each reads, what it leaves open, and the known numbers of the running study."""

from dataclasses import replace

import pytest

from critrm import baselines as module
from critrm.augment import augment_pairs
from critrm.baselines import (
    COMPLETIONS_ONLY,
    CRITIQUES_ONLY,
    LEAKED,
    LONGER,
    LONGER_CRITIQUE,
    OWN_SCORE,
    SENTIMENT,
    bag_of_words,
    baselines,
)
from critrm.critique_files import read_critiques
from critrm.metrics import tally
from critrm.preferences import read_pairs
from critrm.types import Critique, CritiquedPair, Message, Outcome, PreferencePair

RIGHT, WRONG, TIE, UNSCORED = Outcome.RIGHT, Outcome.WRONG, Outcome.TIE, Outcome.UNSCORED
PROMPT = (Message("user", "q"),)


def _item(name, chosen="yes", rejected="no", *, good="", bad=""):
    pair = PreferencePair(id=name, prompt=PROMPT, chosen=chosen, rejected=rejected)
    return CritiquedPair(pair=pair, critic="c" if good else "none", chosen_critique=good, rejected_critique=bad)


def test_longer_wins_by_characters():
    items = [_item("a", "long one", "short"), _item("b", "no", "longer"), _item("c", "same", "size")]
    assert baselines([], items) == {LONGER: [RIGHT, WRONG, TIE]}


def test_without_critiques_only_completions_are_read():
    pytest.importorskip("sklearn")
    items = [_item(str(n), f"good thing {n}", f"bad thing {n}") for n in range(6)]
    found = baselines(items, items)
    assert set(found) == {LONGER, COMPLETIONS_ONLY}
    assert found[COMPLETIONS_ONLY] == [RIGHT] * 6


def test_leaked_grades_need_both_sides():
    items = [
        _item("a", good="Fine. Score: 8/10", bad="Poor. Score: 3/10"),
        _item("b", good="Score: 5/10", bad="Score: 5/10"),
        _item("c", good="Score: 2/10", bad="Nothing said."),
        _item("d", good="Rating: 1/10", bad="Rating: 9/10"),
    ]
    found = baselines([], items)
    assert found[LEAKED] == [RIGHT, TIE, UNSCORED, WRONG]
    assert found[LONGER_CRITIQUE][0] is TIE


def test_the_critics_own_score_is_read_from_recorded_critiques():
    rows = [
        Critique(key=f"{name}{side}", pair_id=name, side=side, text="t", critic="c", prompt_version="", score=score)
        for name, scores in (("a", (7, 2)), ("b", (5, 5)), ("c", (1, None)))
        for side, score in zip(("chosen", "rejected"), scores, strict=True)
    ]
    second = [replace(row, sample=1, score=0) for row in rows]
    items = [_item(name, good="g", bad="b") for name in "abcd"]
    assert baselines([], items, critiques=[*second, *rows])[OWN_SCORE] == [RIGHT, TIE, UNSCORED, UNSCORED]
    assert OWN_SCORE not in baselines([], items, critiques=[replace(row, score=None) for row in rows])


def test_sentiment_hears_praise_and_blame():
    pytest.importorskip("vaderSentiment")
    items = [
        _item("a", good="A great, helpful answer.", bad="A terrible, wrong answer."),
        _item("b", good="Awful.", bad="Excellent!"),
        _item("c", good="It says so.", bad="It says so."),
    ]
    assert baselines([], items)[SENTIMENT] == [RIGHT, WRONG, TIE]


def test_a_bag_of_words_learns_which_words_win_and_does_not_depend_on_chance():
    pytest.importorskip("sklearn")
    train = [_item(str(n), good=f"clear and correct {n}", bad=f"vague and wrong {n}") for n in range(20)]
    test = [
        _item("x", good="wrong", bad="correct"),
        _item("y", good="correct", bad="wrong"),
        _item("z", good="?", bad="!"),
    ]
    found = baselines(train, test)
    assert found[CRITIQUES_ONLY] == [WRONG, RIGHT, TIE]
    assert baselines(train[::-1], test) == found


@pytest.mark.parametrize("texts", [("\x00", "\u202e"), ("one", "two"), ("", "")])
def test_a_bag_without_words_in_common_ties(texts):
    pytest.importorskip("sklearn")
    items = [_item("a")]
    scores = bag_of_words(items, items, text=lambda item, side: texts[side == "rejected"])
    assert [score.outcome for score in scores] == [TIE]


def test_without_the_packages_the_rest_is_there(monkeypatch):
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    items = [_item("a", good="g", bad="b")]
    assert set(baselines(items, items)) == {LONGER, LONGER_CRITIQUE, LEAKED}


def test_no_test_pairs_have_no_outcomes():
    items = [_item(str(n), f"good {n}", f"bad {n}") for n in range(3)]
    assert all(outcomes == [] for outcomes in baselines(items, []).values())


def test_the_known_nulls_of_the_running_study(data_dir):
    pytest.importorskip("sklearn")
    pairs = read_pairs(data_dir / "hh-pairs" / "pairs.jsonl").pairs
    critiques = read_critiques(data_dir / "critiques" / "frontier-llm.jsonl")
    arm = augment_pairs(pairs, {"f": critiques}).arms["f"]
    train, test = ([item for item in arm if item.pair.split == split] for split in ("train", "test"))
    found = baselines(train, test, critiques=critiques)

    def accuracy(name, is_member):
        part = [outcome for outcome, item in zip(found[name], test, strict=True) if is_member(item.pair.source)]
        return tally(part).accuracy.value

    def hh(source):
        return source.startswith("hh")

    def adversarial(source):
        return source.startswith("llmbar") and source != "llmbar-natural"

    known = {CRITIQUES_ONLY: (0.61, 0.58), COMPLETIONS_ONLY: (0.55, 0.38), LONGER: (0.58, 0.18)}
    for name, numbers in known.items():
        assert (accuracy(name, hh), accuracy(name, adversarial)) == pytest.approx(numbers, abs=0.02), name
    assert accuracy(OWN_SCORE, hh) == pytest.approx(139 / 240)
