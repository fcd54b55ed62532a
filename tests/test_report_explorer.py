"""The pairs of a report as data."""

import json
import math

import pytest

from critrm.attribution_files import Attribution, SentenceEffect, write_attributions
from critrm.report_data import read_report
from critrm.report_explorer import attribute_command, embedded, explorer
from critrm.types import NO_CRITIC
from report_study import made_critiques, made_pairs, made_study


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    return made_study(folder, gains={"a": 1.0, "b": 2.0}, grids={"all": {"sizes": [20, 40]}}, pairs=made_pairs(9))


def test_every_text_is_there_once_with_each_arms_scores(study):
    report = read_report(study)
    found = explorer(report, n_pairs=100)
    assert len(set(found["texts"])) == len(found["texts"])
    test = found["tests"][0]
    assert [pair[0] for pair in test["pairs"]] == [f"test-{i}" for i in range(9)]
    assert [model["label"] for model in found["models"]] == ["backbone-7b, 40 pairs", "backbone-7b, 20 pairs"]
    assert len(found["critiques"]) == 2
    for cell, model in zip(report.cells, found["models"], strict=True):
        for arm in model["arms"]:
            seeds = cell.scores["rewardbench"][arm["critic"]]
            chosen, rejected, n_right = arm["scores"][3]
            pair_id = test["pairs"][3][0]
            assert chosen == round(sum(scores[pair_id].chosen for scores in seeds) / 2, 4)
            assert n_right == sum(scores[pair_id].chosen > scores[pair_id].rejected for scores in seeds)
            if arm["critic"] != NO_CRITIC:
                place = found["critiques"][arm["critiques"]][3][0]
                assert found["texts"][place] == f"{arm['critic']} says: this is right. It is about test-3."


def test_no_more_pairs_than_asked_for(study):
    found = explorer(read_report(study), n_pairs=4)
    assert len(found["tests"][0]["pairs"]) == 4
    assert found["tests"][0]["n_all"] == 9
    assert explorer(read_report(study), n_pairs=0)["tests"] == []


def test_effects_are_those_of_the_text_that_is_shown(tmp_path):
    pairs = made_pairs(3)
    critiques = {"a": made_critiques(pairs, "a😀")}
    grids = {"all": {"sizes": [20]}}
    study = made_study(tmp_path, gains={"a": 1.0}, grids=grids, pairs=pairs, critiques=critiques)

    def effects(pair_id, side, first):
        word = "right" if side == "chosen" else "wrong"
        sentences = (f"{first} says: this is {word}. ", f"It is about {pair_id}.")
        return Attribution(
            pair_id=pair_id,
            side=side,
            critic="a",
            reward=1.0,
            reward_without=0.0,
            sentences=tuple(
                SentenceEffect(text=text, aspect="other", effect=effect)
                for text, effect in zip(sentences, (0.5, math.nan), strict=True)
            ),
        )

    rows = [effects("test-0", side, "a😀") for side in ("chosen", "rejected")]
    rows += [effects("test-1", side, "another text:") for side in ("chosen", "rejected")]
    write_attributions(study / "attribution" / "a" / "attribution.jsonl", rows, keys={"test-0": "", "test-1": ""})
    found = explorer(read_report(study), n_pairs=10)["effects"]["a"][0]
    assert set(found) == {0}
    # The emoji counts twice in a browser.
    assert found[0][0] == [[len("a😀 says: this is right. ") + 1, 0.5, "other"], [19, None, "other"]]


def test_the_command_for_effects_names_files_that_are_there(study):
    words = attribute_command(read_report(study)).split()
    assert words[:2] == ["critrm", "attribute"]
    assert words[3] == str(study / "all" / "backbone-7b" / "pairs-40" / "augment" / "rewardbench" / "b.jsonl")
    assert (study / words[3]).is_file()


def test_nothing_in_a_text_ends_the_script():
    texts = ["</script><script>alert(1)</script>", "<!-- <script>", "\ud83d half an emoji", "\u2028", "\x00"]
    shown = embedded({"texts": texts})
    assert "<" not in shown
    assert shown.isascii()
    assert json.loads(shown)["texts"] == texts
