"""A whole recipe on the bundled pairs, with the tiny model as backbone and as critic; resumed after kill -9."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import yaml

from critrm.config import Recipe, load_recipe
from critrm.errors import DataError
from critrm.pipeline import command, run_recipe
from critrm.types import NO_CRITIC


def _recipe(tiny_model, **train) -> dict:
    return {
        "name": "small",
        "preferences": {
            "train": {"path": "bundled:mini-pairs.jsonl", "split": "train", "limit": 24},
            "test": {"mini": {"path": "bundled:mini-pairs.jsonl", "split": "test", "limit": 20}},
        },
        "critique": {
            "critics": {
                "tiny": {"model": f"local:{tiny_model}", "max_tokens": 8},
                "frontier-llm": {"file": "bundled:mini-frontier-llm.jsonl"},
            }
        },
        "augment": {"max_length": 3000},
        "train": {"backbone": str(tiny_model), "batch_size": 8, "precision": "fp32", "checkpoint_minutes": 0, **train},
    }


def _scores(folder):
    return {
        str(path.relative_to(folder)): path.read_text() for path in sorted(folder.glob("evaluate/*/*/*/*.scores.jsonl"))
    }


def test_three_arms_over_identical_pairs_and_a_second_run_does_nothing(tiny_model, tmp_path):
    recipe = Recipe.model_validate(_recipe(tiny_model, seeds=[0, 1]))
    results = run_recipe(recipe, out=tmp_path)
    assert list(results["learning_rates"]) == [NO_CRITIC, "tiny", "frontier-llm"]
    mini = results["tests"]["mini"]["all"]
    assert mini["n"] <= 20
    assert all(len(arm["by_seed"]) == 2 for arm in mini["arms"].values())
    assert results["tokens"]["tiny"]["critic_wrote"] > 0
    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    assert len(written) == 6
    again = run_recipe(recipe, out=tmp_path)
    assert again["tests"] == results["tests"]
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")} == written
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["config"]["name"] == "small"
    assert "frontier-llm" in (tmp_path / "results.md").read_text()


def test_the_learning_rate_is_chosen_once_per_arm_on_held_out_pairs(tiny_model, tmp_path):
    recipe = Recipe.model_validate(
        _recipe(tiny_model, learning_rates=[1e-5, 5e-3], n_held_out=8, n_sweep=12, margins=None)
    )
    results = run_recipe(recipe, out=tmp_path)
    for critic, rate in results["learning_rates"].items():
        tried = {}
        for folder in (tmp_path / "train" / critic).glob("learning-rate-*"):
            facts = json.loads((folder / "sweep" / "done.json").read_text())
            assert (facts["n_held_out"], facts["n_train"]) == (8, 12)
            tried[float(folder.name.removeprefix("learning-rate-"))] = facts["loss"]
        assert rate == min(tried, key=tried.__getitem__)
        assert len(tried) == 2
    assert not list(tmp_path.rglob("learning-rate-*/model")), "the sweep's models are not kept"


def test_a_run_killed_anywhere_ends_with_the_same_scores(tiny_model, tmp_path):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(_recipe(tiny_model)))
    run = [sys.executable, "-m", "critrm", "run", str(tmp_path / "recipe.yaml"), "--out"]
    subprocess.run([*run, str(tmp_path / "whole")], check=True, capture_output=True)
    killed = tmp_path / "killed"
    waits = [
        "critique/frontier-llm.jsonl",
        "train/tiny/seed-0/checkpoints/*/trainer_state.json",
        "evaluate/tiny/seed-0/*/*.json",
    ]
    for pattern in waits:
        process = subprocess.Popen([*run, str(killed)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and process.poll() is None and not list(killed.glob(pattern)):
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    subprocess.run([*run, str(killed)], check=True, capture_output=True)
    assert _scores(killed) == _scores(tmp_path / "whole")


def test_a_pair_in_train_and_test_is_an_error(tiny_model, tmp_path):
    recipe = _recipe(tiny_model)
    recipe["preferences"]["test"]["mini"]["split"] = "train"
    with pytest.raises(DataError, match="ids must be unique"):
        run_recipe(Recipe.model_validate(recipe), out=tmp_path)


def test_the_command_prints_the_table(tiny_model, tmp_path, capsys):
    recipe = _recipe(tiny_model)
    del recipe["critique"]["critics"]["tiny"]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    command(str(tmp_path / "recipe.yaml"), out=tmp_path / "run")
    out = capsys.readouterr().out
    assert "Strict accuracy by test set" in out
    assert "frontier-llm" in out


def test_the_demo_recipe_trains_three_arms():
    recipe = load_recipe("bundled:demo.yaml")
    assert list(recipe.critique.critics) == ["smollm2", "frontier-llm"]
