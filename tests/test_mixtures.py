"""Mixtures of critics: each pair has one critic, in the shares asked for, and a larger share keeps the smaller one."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from critrm.config import Recipe, data_path
from critrm.errors import ConfigError
from critrm.mixtures import mix_critiques
from critrm.pipeline import run_recipe
from critrm.store import read_records, write_records
from critrm.types import Critique
from report_study import made_critiques, made_pairs

PAIRS = made_pairs(2000)
CRITIQUES = {critic: made_critiques(PAIRS, critic) for critic in ("good", "weak", "human")}


def mixed(shares) -> dict[str, str]:
    """Pair id -> whose critiques it got, both from one critic."""
    rows = mix_critiques(PAIRS, CRITIQUES, shares, name="mixed")
    assert {row.critic for row in rows} == {"mixed"}
    found = {row.pair_id: row.text.partition(" ")[0] for row in rows}
    assert len(rows) == 2 * len(found)
    assert all(row.text.startswith(found[row.pair_id]) for row in rows)
    return found


@given(st.floats(0.01, 0.99), st.floats(0.01, 0.99))
def test_every_pair_has_one_critic_and_a_larger_share_keeps_the_smaller_ones(a, b):
    small, large = (mixed({"good": share, "weak": 1 - share}) for share in sorted((a, b)))
    assert set(small) == set(large) == {pair.id for pair in PAIRS}
    assert {key for key, critic in small.items() if critic == "good"} <= {
        key for key, critic in large.items() if critic == "good"
    }


def test_the_shares_are_those_asked_for():
    found = list(mixed({"good": 0.2, "weak": 0.5, "human": 0.3}).values())
    for critic, share in {"good": 0.2, "weak": 0.5, "human": 0.3}.items():
        assert found.count(critic) / len(found) == pytest.approx(share, abs=0.03)


def test_all_samples_of_a_pairs_critic_come_along_and_other_pairs_stay_out():
    rows = [
        Critique(key=f"{n}", pair_id="test-0", side="chosen", sample=n, text="x", critic=critic, prompt_version="")
        for critic in ("good", "weak")
        for n in range(3)
    ]
    by_critic = {critic: [row for row in rows if row.critic == critic] for critic in ("good", "weak")}
    shares = {"good": 0.5, "weak": 0.5}
    assert sorted(row.sample for row in mix_critiques(PAIRS[:1], by_critic, shares, name="m")) == [0, 1, 2]
    assert mix_critiques(PAIRS[1:2], by_critic, shares, name="m") == []


@pytest.fixture
def weak_file(tmp_path):
    rows = [json.loads(line) for line in data_path("bundled:mini-frontier-llm.jsonl").read_text().splitlines()]
    write_records(tmp_path / "weak.jsonl", [row | {"critique": "Fine."} for row in rows])
    return tmp_path / "weak.jsonl"


def _recipe(tiny_model, mixtures, weak_file="weak.jsonl"):
    critics = {"frontier-llm": {"file": "bundled:mini-frontier-llm.jsonl"}, "weak": {"file": str(weak_file)}}
    pairs = {"path": "bundled:mini-pairs.jsonl", "split": "train", "limit": 12}
    return {
        "name": "mixed",
        "preferences": {"train": pairs, "test": {"mini": pairs | {"split": "test"}}},
        "critique": {"critics": critics, "mixtures": mixtures},
        "train": {"backbone": str(tiny_model), "batch_size": 4, "precision": "fp32", "frozen": True},
        "evaluate": {"zero_label": False},
    }


def test_a_run_has_an_arm_for_each_mixture(tiny_model, weak_file, tmp_path):
    recipe = _recipe(tiny_model, {"half": {"frontier-llm": 0.5, "weak": 0.5}}, weak_file)
    results = run_recipe(Recipe.model_validate(recipe), out=tmp_path / "run")
    assert list(results["learning_rates"]) == ["none", "frontier-llm", "weak", "half"]
    rows = read_records(tmp_path / "run" / "critique" / "half.jsonl", Critique)
    assert len(rows) == 2 * 24
    assert 0 < sum(row.text == "Fine." for row in rows) < len(rows)


@pytest.mark.parametrize("priced", [("frontier-llm",), ("frontier-llm", "weak")])
def test_what_a_mixture_costs_is_known_where_it_is_of_all_its_critics(tiny_model, weak_file, tmp_path, priced):
    recipe = _recipe(tiny_model, {"half": {"frontier-llm": 0.5, "weak": 0.5}}, weak_file)
    for name in priced:
        source = data_path(recipe["critique"]["critics"][name]["file"])
        rows = [json.loads(line) | {"cost": 0.5} for line in source.read_text().splitlines()]
        write_records(tmp_path / f"{name}-priced.jsonl", rows)
        recipe["critique"]["critics"][name]["file"] = str(tmp_path / f"{name}-priced.jsonl")
    results = run_recipe(Recipe.model_validate(recipe), out=tmp_path / "run")
    every = 2 * 24 * 0.5
    expected = dict.fromkeys(priced, every) | ({"half": every} if len(priced) == 2 else {})
    assert results["cost"] == expected


@pytest.mark.parametrize(
    ("mixtures", "message"),
    [
        ({"half": {"frontier-llm": 0.5, "unknown": 0.5}}, "not there: unknown"),
        ({"half": {"frontier-llm": 0.5, "weak": 0.4}}, "add up to 1"),
        ({"half": {"frontier-llm": 1.0}}, "two critics"),
        ({"weak": {"frontier-llm": 0.5, "weak": 0.5}}, "already"),
        ({"half": {"frontier-llm": 1.5, "weak": -0.5}}, "greater than 0"),
    ],
)
def test_a_mixture_that_cannot_be_is_refused(tiny_model, mixtures, message):
    with pytest.raises(ValueError, match=message):
        Recipe.model_validate(_recipe(tiny_model, mixtures))


def test_a_mixture_may_not_take_the_plain_arms_name(tiny_model, weak_file, tmp_path):
    recipe = Recipe.model_validate(_recipe(tiny_model, {"None": {"frontier-llm": 0.5, "weak": 0.5}}, weak_file))
    with pytest.raises(ConfigError, match="None"):
        run_recipe(recipe, out=tmp_path)


def test_a_grid_takes_a_mixture_with_its_critics(tiny_model):
    recipe = _recipe(tiny_model, {"half": {"frontier-llm": 0.5, "weak": 0.5}})
    grids = {"some": {"critics": ["frontier-llm", "weak", "half"]}}
    assert Recipe.model_validate(recipe | {"study": {"grids": grids}}).study
    with pytest.raises(ValueError, match="not there: third"):
        Recipe.model_validate(recipe | {"study": {"grids": {"some": {"critics": ["third"]}}}})
