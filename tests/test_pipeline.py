"""A whole recipe on the bundled pairs, with the tiny model as backbone and as critic; resumed after kill -9."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter

import pytest
import yaml

from critrm.config import Recipe, data_path, load_recipe
from critrm.critique_files import read_critiques
from critrm.errors import ConfigError, CriticError, DataError, ModelError
from critrm.pipeline import command, run_recipe, share_run
from critrm.preferences import read_pairs
from critrm.types import NO_CRITIC
from critrm.work_sharing import claim
from scripted_server import completion, serving


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
    assert list(mini["ensembles"]) == [
        "all seeds",
        "all seeds and untrained, whole text",
        "all seeds and critic's own score",
    ]
    assert list(mini["ensembles"]["all seeds"]) == [NO_CRITIC, "tiny", "frontier-llm"]
    assert list(mini["ensembles"]["all seeds and critic's own score"]) == ["frontier-llm"]
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
    # Who does not want to wait for another process that puts the results together is sent away.
    with claim(tmp_path / ".results"):
        assert share_run(recipe, out=tmp_path, wait=False) is None
    assert share_run(recipe, out=tmp_path, wait=False)["tests"] == results["tests"]


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


def test_the_best_weights_are_chosen_on_pairs_that_are_not_trained_on(tiny_model, tmp_path):
    recipe = _recipe(tiny_model, keep="best", n_held_out=8)
    del recipe["critique"]["critics"]["tiny"]
    results = run_recipe(Recipe.model_validate(recipe), out=tmp_path)
    trained = json.loads((tmp_path / "train" / NO_CRITIC / "seed-0" / "result.jsonl").read_text())
    assert trained["n_pairs"] == results["n_train"] - 8


def test_files_that_count_their_rows_and_critiques_in_two_files(tiny_model, tmp_path):
    recipe = _recipe(tiny_model)
    recipe["evaluate"] = {"zero_label": False}
    for name, prefix in (("train", ""), ("test", "test-")):
        rows = [
            {"id": n, "prompt": f"{name} {n}?", "chosen": f"Yes, {n}.", "rejected": f"No, not {n}."} for n in range(8)
        ]
        critiques = [
            {"pair_id": f"{prefix}{row['id']}", "side": side, "critique": f"It is {side}."}
            for row in rows
            for side in ("chosen", "rejected")
        ]
        for file, content in ((f"{name}.jsonl", rows), (f"{name}-critiques.jsonl", critiques)):
            (tmp_path / file).write_text("".join(json.dumps(row) + "\n" for row in content))
    recipe["preferences"] = {
        "train": {"path": str(tmp_path / "train.jsonl")},
        "test": {"counted": {"path": str(tmp_path / "test.jsonl"), "id_prefix": "test-"}},
    }
    files = [str(tmp_path / f"{name}-critiques.jsonl") for name in ("train", "test")]
    recipe["critique"]["critics"] = {"kind": {"file": files}}
    results = run_recipe(Recipe.model_validate(recipe), out=tmp_path / "out")
    assert (results["n_train"], results["tests"]["counted"]["all"]["n"]) == (8, 8)
    del recipe["preferences"]["test"]["counted"]["id_prefix"]
    with pytest.raises(DataError, match="ids must be unique"):
        run_recipe(Recipe.model_validate(recipe), out=tmp_path / "again")


def test_null_baselines_stand_beside_the_arms(tiny_model, tmp_path):
    pytest.importorskip("sklearn")
    recipe = _recipe(tiny_model)
    del recipe["critique"]["critics"]["tiny"]
    results = run_recipe(Recipe.model_validate(recipe), out=tmp_path)
    table = (tmp_path / "results.md").read_text()
    assert "longer completion wins" in table.lower() and "bag of words, critiques" in table.lower()
    nulls = results["tests"]["mini"]["all"]["baselines"]
    assert {name for name in nulls[NO_CRITIC] if "untrained" in name} == {"untrained, whole text"}
    assert "untrained, critique alone" in nulls["frontier-llm"] and "untrained, critique alone" in table
    assert "zero-label frontier-llm" in results["seconds"]
    blends = results["tests"]["mini"]["all"]["blends"]
    assert {reading: list(found) for reading, found in blends.items()} == {
        "untrained, whole text": [NO_CRITIC, "frontier-llm"],
        "critic's own score": ["frontier-llm"],
    }
    # The critic is right about nearly all of these pairs, and the tiny model about half of them.
    arm = results["tests"]["mini"]["all"]["arms"]["frontier-llm"]["mean"]
    assert arm < blends["critic's own score"]["frontier-llm"]["mean"]
    kept = tmp_path / "zero-label" / "frontier-llm" / "mini.jsonl"
    stamp = kept.stat().st_mtime_ns
    assert run_recipe(Recipe.model_validate(recipe), out=tmp_path)["tests"] == results["tests"]
    assert kept.stat().st_mtime_ns == stamp, "it is not asked twice"


def test_a_critic_that_left_out_a_score_is_not_blended(tiny_model, tmp_path):
    rows = [json.loads(line) for line in data_path("bundled:mini-frontier-llm.jsonl").read_text().splitlines()]
    recipe = _recipe(tiny_model)
    recipe["evaluate"] = {"zero_label": False}
    test = run_recipe(Recipe.model_validate(recipe | {"critique": {"critics": {}}}), out=tmp_path / "plain")
    assert test["tests"]["mini"]["all"]["blends"] == {"untrained, whole text": {}, "critic's own score": {}}
    for row in rows:
        if row["pair_id"].endswith("3"):
            del row["score"]
    critiques = tmp_path / "critiques.jsonl"
    critiques.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe["critique"]["critics"] = {"forgetful": {"file": str(critiques)}}
    mini = run_recipe(Recipe.model_validate(recipe), out=tmp_path / "run")["tests"]["mini"]["all"]
    assert 0 < mini["baselines"]["forgetful"]["critic's own score"]["n_unscored"] < mini["n"]
    assert mini["blends"]["critic's own score"] == {}


def test_scores_that_a_critic_does_not_give_stop_a_run_before_it_trains(tiny_model, tmp_path):
    recipe = _recipe(tiny_model, score_weight=1.0)
    with pytest.raises(ValueError, match="score_weight learns critics' own scores, and tiny will give none"):
        Recipe.model_validate(recipe)
    del recipe["critique"]["critics"]["tiny"]
    rows = [json.loads(line) for line in data_path("bundled:mini-frontier-llm.jsonl").read_text().splitlines()]
    plain = tmp_path / "plain.jsonl"
    plain.write_text("".join(json.dumps({**row, "score": None}) + "\n" for row in rows))
    both = {"plain": {"file": str(plain)}} | recipe["critique"]["critics"]
    with pytest.raises(ConfigError, match="the critiques by 'plain' of these 24 pairs carry none"):
        run_recipe(Recipe.model_validate(recipe | {"critique": {"critics": both}}), out=tmp_path / "both")
    assert not list(tmp_path.rglob("*.safetensors"))
    for source in (recipe["preferences"]["train"], recipe["preferences"]["test"]["mini"]):
        source["limit"] = 8
    run_recipe(Recipe.model_validate(recipe), out=tmp_path / "alone")
    weights = next((tmp_path / "alone").glob("train/frontier-llm/*/model/model.safetensors"))
    stamp = weights.stat().st_mtime_ns
    # Other scores of test pairs are no other training, those of training pairs are.
    for split, is_other in (("test", False), ("train", True)):
        ids = {pair.id for pair in read_pairs(data_path("bundled:mini-pairs.jsonl"), split=split).pairs}
        changed = [{**row, "score": 10 - row["score"]} if row["pair_id"] in ids else row for row in rows]
        plain.write_text("".join(json.dumps(row) + "\n" for row in changed))
        recipe["critique"] = {"critics": {"frontier-llm": {"file": str(plain)}}}
        run_recipe(Recipe.model_validate(recipe), out=tmp_path / "alone")
        assert (weights.stat().st_mtime_ns != stamp) == is_other


def test_a_backbone_that_cannot_be_asked_costs_a_row_of_the_table(tiny_model, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise ModelError("no words")

    recipe = _recipe(tiny_model)
    del recipe["critique"]["critics"]["tiny"]
    for source in (recipe["preferences"]["train"], recipe["preferences"]["test"]["mini"]):
        source["limit"] = 8
    monkeypatch.setattr("critrm.run_results.zero_label_scores", refuse)
    results = run_recipe(Recipe.model_validate(recipe), out=tmp_path)
    assert not any("untrained" in name for name in results["tests"]["mini"]["all"]["baselines"]["frontier-llm"])


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


def test_named_critics_the_backbone_itself_and_a_limit_over_all(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-never-written")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    recipe = _recipe(tiny_model)
    for source in (recipe["preferences"]["train"], recipe["preferences"]["test"]["mini"]):
        source["limit"] = 8
    recipe["critique"] = {
        "critics": {"gpt-4-turbo": {"max_tokens": 9}, "self": {"self_critique": True, "max_tokens": 4}},
        "max_cost": 1e-6,
    }
    with serving(lambda _: completion("Fine.")) as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        with pytest.raises(CriticError, match="32 calls are not made yet"):
            run_recipe(Recipe.model_validate(recipe), out=tmp_path / "run")
        assert server.bodies == []
        recipe["critique"]["max_cost"] = 50.0
        results = run_recipe(Recipe.model_validate(recipe), out=tmp_path / "run")
        assert len(server.bodies) == 32
    assert results["cost"] == {"gpt-4-turbo": pytest.approx(32 * 320e-6), "self": 0.0}
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["cost"] == pytest.approx(32 * 320e-6)
    assert manifest["config"]["ledger"]["gpt-4-turbo"]["calls"] == 32
    assert manifest["config"]["ledger"]["self"]["tokens_out"] > 0
    # What one critic has cost counts before another one spends.
    recipe["critique"] = {
        "critics": {"other": {"model": "m", "price_in": 1, "price_out": 1}, "gpt-4-turbo": {"max_tokens": 9}},
        "max_cost": 32 * 320e-6,
    }
    with pytest.raises(CriticError, match=r"\$0\.0102 spent, \$0\.0102 of it in earlier runs"):
        run_recipe(Recipe.model_validate(recipe), out=tmp_path / "run")
    assert not any(b"sk-never" in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())


def test_a_dry_run_lists_all_critics_and_leaves_no_run_folder(tiny_model, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("CO_API_KEY", raising=False)
    monkeypatch.setenv("COLUMNS", "160")
    recipe = _recipe(tiny_model)
    recipe["critique"]["critics"] |= {"command-r": {}, "self": {"self_critique": True, "samples": 2, "temperature": 1}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    command(str(tmp_path / "recipe.yaml"), out=tmp_path / "run", dry_run=True)
    lines = capsys.readouterr().out.splitlines()
    calls = {
        line.split()[0]: line.split()[1] for line in lines if line.startswith(("tiny ", "command-r ", "self ", "all "))
    }
    assert calls == {"tiny": "88", "command-r": "88", "self": "176", "all": "352"}
    assert any("tiny: in by the model's own tokenizer" in line for line in lines)
    assert not (tmp_path / "run").exists()


def test_rewards_averaged_over_critiques_take_more_of_test_pairs_alone(tiny_model, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    recipe = _recipe(tiny_model)
    recipe["preferences"]["train"]["limit"] = 9
    for source in recipe["preferences"]["test"].values():
        source["limit"] = 4
    recipe["critique"]["critics"] = {
        "drawn": {"model": f"local:{tiny_model}", "temperature": 1.0, "max_tokens": 5},
        "greedy": {"model": f"local:{tiny_model}", "max_tokens": 5},
    }
    recipe["evaluate"] = {"samples": 3, "zero_label": False}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    command(str(tmp_path / "recipe.yaml"), out=tmp_path / "run", dry_run=True)
    plan = capsys.readouterr().out
    assert re.search(r"drawn, 1 a completion +18 ", plan) and re.search(r"drawn, 3 a completion +24 ", plan)
    assert re.search(r"greedy +26 ", plan) and re.search(r"all +68 ", plan)
    run_recipe(Recipe.model_validate(recipe), out=tmp_path / "run")
    n_samples = {
        critic: Counter(row.pair_id for row in read_critiques(tmp_path / "run" / "critique" / f"{critic}.jsonl"))
        for critic in ("drawn", "greedy")
    }
    train = {pair.id for pair in read_pairs(tmp_path / "run" / "preferences" / "train.jsonl").pairs}
    assert {n for id, n in n_samples["drawn"].items() if id in train} == {2}
    assert {n for id, n in n_samples["drawn"].items() if id not in train} == {6}
    assert set(n_samples["greedy"].values()) == {2}


def test_an_unknown_critic_stops_a_recipe_before_anything_is_done(tiny_model, tmp_path):
    recipe = _recipe(tiny_model)
    recipe["critique"]["critics"]["gtp-4-turbo"] = {}
    with pytest.raises(ConfigError, match="Did you mean gpt-4-turbo"):
        run_recipe(Recipe.model_validate(recipe), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_demo_recipe_trains_three_arms():
    recipe = load_recipe("bundled:demo.yaml")
    assert list(recipe.critique.critics) == ["smollm2", "frontier-llm"]
