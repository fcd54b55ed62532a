"""Studies over the bundled pairs with the tiny model: plan, run, share, resume, estimate, and what comes out."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace

import pytest
import yaml

from critrm import readings, run_training
from critrm.config import Recipe, data_path
from critrm.errors import ConfigError, DataError
from critrm.preferences import read_pairs
from critrm.report_data import read_report
from critrm.report_tables import accuracy_table
from critrm.reward_model import RewardModel
from critrm.store import write_records
from critrm.study import command, n_trained, run_study
from critrm.study_estimate import estimate_study, n_parameters
from critrm.study_plan import plan_study
from critrm.types import NO_CRITIC, CritiquedPair
from report_study import made_study


def _recipe(tiny_model, *, grids=None, **study) -> dict:
    return {
        "name": "small",
        "preferences": {
            "train": {"path": "bundled:mini-pairs.jsonl", "split": "train", "limit": 40},
            "test": {"mini": {"path": "bundled:mini-pairs.jsonl", "split": "test", "limit": 20}},
        },
        "critique": {"critics": {"frontier-llm": {"file": "bundled:mini-frontier-llm.jsonl"}}},
        "augment": {"max_length": 3000},
        "train": {
            "backbone": str(tiny_model),
            "batch_size": 4,
            "precision": "fp32",
            "seeds": [0, 1],
            "learning_rates": [1e-5, 1e-3],
            "n_held_out": 6,
            "n_sweep": 6,
        },
        "evaluate": {"zero_label": False},
        "study": {
            "grids": grids
            or {
                "critics": {"sizes": [8, 16]},
                "plain": {
                    "critics": [],
                    "sizes": [24],
                    "pairs": [{"path": "bundled:mini-pairs.jsonl", "split": "train"}],
                },
            },
            **study,
        },
    }


@pytest.fixture(scope="module")
def finished(tiny_model, tmp_path_factory):
    out = tmp_path_factory.mktemp("study")
    recipe = Recipe.model_validate(_recipe(tiny_model, label_price=2.0))
    return recipe, out, run_study(recipe, out=out)


def test_smaller_sets_are_part_of_larger_ones(finished):
    recipe, out, _ = finished
    ids = {}
    for cell in plan_study(recipe, out=out):
        rows = (cell.folder / "preferences" / "train.jsonl").read_text().splitlines()
        ids[cell.grid, cell.n_train] = [json.loads(row)["id"] for row in rows]
    assert ids["critics", 8] == ids["critics", 16][:8]
    assert len(ids["plain", 24]) == 24


def test_every_run_is_in_one_tidy_table(finished):
    _, out, found = finished
    with open(out / "study.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    runs = {(row["grid"], row["critic"], row["n_train"], row["seed"]) for row in rows}
    assert len(runs) == 2 * 2 * 2 + 2
    assert {row["test"] for row in rows} == {"mini"}
    for row in rows:
        assert int(row["n_right"]) + int(row["n_wrong"]) + int(row["n_tie"]) + int(row["n_unscored"]) == int(row["n"])
    assert len(found["rows"]) == len(rows)


def test_the_learning_rate_is_chosen_once_at_the_largest_size(finished):
    recipe, out, found = finished
    trials = sorted(path.relative_to(out).parts[2] for path in out.rglob("learning-rate-*"))
    assert set(trials) == {"pairs-16"}
    rates = {cell["n_train"]: cell["results"]["learning_rates"] for cell in found["cells"]}
    assert rates[8] == rates[16]
    assert rates[24][NO_CRITIC] == rates[16][NO_CRITIC]


def test_what_a_critique_is_worth_is_said_for_each_size(finished):
    _, out, found = finished
    assert [(each["critic"], each["n_train"]) for each in found["exchange"] if each["group"] == "all"] == [
        ("frontier-llm", 16),
        ("frontier-llm", 8),
    ]
    for each in found["exchange"]:
        assert (each["smallest"], each["largest"]) == (8, 24)
        assert each["money"] is None  # nobody knows what these critiques cost
        assert each["words"] in (out / "study.md").read_text()


def test_what_a_critique_is_worth_is_said_in_money_where_its_price_is_known(tmp_path):
    grids = {"all": {"sizes": [40, 80]}, "more": {"sizes": [160], "critics": []}}
    study = made_study(tmp_path, gains={"strong": 3.0, "unpriced": 3.0}, grids=grids, cost={"strong": 6.0})
    found = json.loads((study / "study.json").read_text())["exchange"]
    rates = {(each["critic"], each["n_train"]): each for each in found if each["group"] == "all"}
    assert rates["unpriced", 80]["money"] is None and "$" not in rates["unpriced", 80]["words"]
    priced = rates["strong", 80]
    # 60 test pairs have two critiques each, at a dollar a label.
    assert priced["money"] == {
        "label": 1.0,
        "critique": 6.0 / 120,
        "critiqued_pairs": 80 * (1.0 + 2 * 6.0 / 120),
        "plain_pairs": priced["plain_pairs"],
    }
    assert priced["words"].endswith(
        "At $1.00 a label and $0.0500 a critique that is $88.00 instead of more than $160.00."
    )


def test_a_finished_study_does_nothing(finished):
    recipe, out, found = finished
    written = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    assert len(written) == 10
    assert run_study(recipe, out=out)["rows"] == found["rows"]
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")} == written


def test_two_workers_and_a_killed_one_share_a_study(tiny_model, tmp_path, finished, capsys):
    recipe = tmp_path / "small.yaml"
    recipe.write_text(yaml.safe_dump(_recipe(tiny_model, label_price=2.0)))
    first = subprocess.Popen(
        [sys.executable, "-m", "critrm", "study", str(recipe), "--out", str(tmp_path / "out")],
        stdout=subprocess.DEVNULL,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and not list((tmp_path / "out").rglob("evaluate/*/*/done.json")):
        time.sleep(0.1)
    first.send_signal(signal.SIGKILL)
    first.wait()
    command(str(recipe), out=tmp_path / "out", workers=2)
    assert "What a critiqued pair is worth" in capsys.readouterr().out
    rows = json.loads((tmp_path / "out" / "study.json").read_text())["rows"]
    assert [row["accuracy"] for row in rows] == [row["accuracy"] for row in finished[2]["rows"]]


@pytest.mark.slow
def test_ray_workers_give_the_same_table(tiny_model, tmp_path, finished):
    pytest.importorskip("ray")
    recipe = tmp_path / "small.yaml"
    recipe.write_text(yaml.safe_dump(_recipe(tiny_model, label_price=2.0)))
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as folder:
        # Ray's sockets lie in its folder, and their paths must be short.
        env = {"RAY_TMPDIR": folder, "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}
        words = ["study", str(recipe), "--out", str(tmp_path / "out"), "--engine", "ray", "--workers", "2"]
        done = subprocess.run(
            [sys.executable, "-m", "critrm", *words], env=os.environ | env, capture_output=True, text=True, check=False
        )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "What a critiqued pair is worth" in done.stdout
    rows = json.loads((tmp_path / "out" / "study.json").read_text())["rows"]
    assert [row["accuracy"] for row in rows] == [row["accuracy"] for row in finished[2]["rows"]]


def test_a_plan_says_what_is_left_and_what_it_takes(finished, tiny_model, tmp_path, capsys):
    recipe, out, _ = finished
    assert all(each.n_done == each.n_trainings for each in estimate_study(recipe, out=out, tflops=1.0).cells)
    fresh = estimate_study(recipe, out=tmp_path, tflops=1.0)
    slow = estimate_study(recipe, out=tmp_path, tflops=0.5)
    assert [each.n_trainings for each in fresh.cells] == [4, 4, 2]
    for fast, twice in zip(fresh.cells, slow.cells, strict=True):
        assert twice.hours == pytest.approx(2 * fast.hours)
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(_recipe(tiny_model)))
    command(str(path), out=tmp_path / "study", dry_run=True, tflops=1.0)
    assert "Nothing is run yet" in capsys.readouterr().out
    assert not list((tmp_path / "study").rglob("train"))


def test_a_frozen_backbone_is_planned_as_reading_and_reads_no_pair_twice(tiny_model, tmp_path, monkeypatch):
    frozen = {"train": {"frozen": True, "learning_rates": [1e-5]}}
    again = {"train": frozen["train"] | {"critique_dropout": 0.2}}
    grids = {"trained": {"sizes": [16, 8]}, "frozen": {"sizes": [16, 8], "change": frozen}}
    grids |= {"again": {"sizes": [16], "change": again}}
    recipe = Recipe.model_validate(_recipe(tiny_model, grids=grids))
    cells = estimate_study(recipe, out=tmp_path, tflops=1.0).cells
    hours = {(each.cell.grid, each.cell.n_train): each.hours for each in cells}
    # Two seeds that train and test, and a backbone that reads once, for both sizes and seeds, what the larger set has.
    trained = hours["trained", 16] / 2
    eight_pairs = (hours["trained", 16] - hours["trained", 8]) / 2
    assert hours["frozen", 8] == hours["again", 16] == 0
    assert hours["frozen", 16] == pytest.approx(trained - eight_pairs * 2 * 2 / 3, rel=0.05)
    seen, own = [], readings._read
    monkeypatch.setattr(readings, "_read", lambda model, pairs, n: seen.append(len(pairs)) or own(model, pairs, n))
    monkeypatch.setattr(readings, "PAIRS_PER_FILE", 8)
    only = Recipe.model_validate(_recipe(tiny_model, grids={"frozen": {"sizes": [16, 8], "change": frozen}}))
    rows = run_study(only, out=tmp_path / "study")["rows"]
    assert {(row["critic"], row["n_train"], row["seed"]) for row in rows} == {
        (critic, size, seed) for critic in ("none", "frontier-llm") for size in (8, 16) for seed in (0, 1)
    }
    assert sum(seen) == 2 * (16 + 20)


def test_several_draws_are_other_pairs_and_count_as_runs(tiny_model, tmp_path):
    recipe = _recipe(tiny_model, grids={"frozen": {"sizes": [16, 8, 40]}})
    recipe["train"] |= {"frozen": True, "learning_rates": [1e-5], "seeds": [0]}
    one, three = (Recipe.model_validate(recipe | {"study": recipe["study"] | {"draws": draws}}) for draws in (1, 3))
    first = run_study(one, out=tmp_path)
    found = run_study(three, out=tmp_path)
    assert found["draws"] == 3
    assert [row for row in found["rows"] if row["draw"] == 1] == first["rows"]  # what was run stays as it was
    drawn = {}
    for cell in plan_study(three, out=tmp_path):
        rows = (cell.folder / "preferences" / "train.jsonl").read_text().splitlines()
        drawn[cell.draw, cell.n_train] = [json.loads(row)["id"] for row in rows]
    for draw in range(3):
        assert drawn[draw, 8] == drawn[draw, 16][:8]
    assert len({frozenset(drawn[draw, 8]) for draw in range(3)}) == 3
    (rate,) = (each for each in found["exchange"] if each["n_train"] == 16 and each["group"] == "all")
    which = ("frontier-llm", 16, "all")
    accuracies = [row["accuracy"] for row in found["rows"] if (row["critic"], row["n_train"], row["group"]) == which]
    assert rate["accuracy"] == pytest.approx(sum(accuracies) / 3)
    report = read_report(tmp_path)
    assert {(cell.n_train, cell.n_draws, cell.n_runs) for cell in report.cells} == {(8, 3, 3), (16, 3, 3), (40, 1, 1)}
    arm = next(cell for cell in report.cells if cell.n_train == 16).tests["mini"]["all"]["arms"]["frontier-llm"]
    assert sorted(arm["by_seed"]) == pytest.approx(sorted(accuracies))
    assert accuracy_table(report).caption.startswith("Strict accuracy after training on 40 pairs, one seed")
    smaller = replace(report, cells=tuple(cell for cell in report.cells if cell.n_train < 40))
    assert "3 draws of them with one seed" in accuracy_table(smaller).caption


def test_parameters_are_counted_or_read_off_the_name(tiny_model):
    from transformers import AutoModelForCausalLM

    count = sum(each.numel() for each in AutoModelForCausalLM.from_pretrained(tiny_model).parameters())
    assert n_parameters(str(tiny_model)) == count
    assert n_parameters("meta-llama/Llama-2-7b-hf") == 7e9
    assert n_parameters("some/backbone") is None


def test_a_grid_can_change_a_setting_and_then_chooses_its_own_rate(tiny_model, tmp_path):
    grids = {"plain": {"sizes": [16]}, "dropout": {"sizes": [16], "change": {"train": {"critique_dropout": 0.2}}}}
    cells = plan_study(Recipe.model_validate(_recipe(tiny_model, grids=grids)), out=tmp_path)
    assert {cell.grid: cell.recipe.train.critique_dropout for cell in cells} == {"plain": 0.0, "dropout": 0.2}
    assert len({cell.family for cell in cells}) == 2


def test_no_training_is_done_twice_in_a_study(tiny_model, tmp_path, monkeypatch):
    change = {"train": {"critique_dropout": 0.2, "critique_first": True}}
    grids = {"plain": {"sizes": [8]}, "changed": {"sizes": [8], "change": change}}
    recipe = _recipe(tiny_model, grids=grids)
    recipe["train"] |= {"learning_rates": [1e-5], "n_held_out": 0, "seeds": [0]}
    recipe = Recipe.model_validate(recipe)
    trained, train = [], run_training.train_reward_model

    def note_and_train(arm, *args, **settings):
        trained.append(arm[0].critic)
        return train(arm, *args, **settings)

    monkeypatch.setattr(run_training, "train_reward_model", note_and_train)
    planned = estimate_study(recipe, out=tmp_path, tflops=1.0).cells
    plain, changed = (each.hours for each in planned)
    rows = run_study(recipe, out=tmp_path)["rows"]
    # Without critiques the grids differ in nothing.
    assert trained.count("none") == 1
    assert trained.count("frontier-llm") == 2
    assert 0.4 * plain < changed < 0.7 * plain
    without = {grid: [] for grid in grids}
    for row in rows:
        if row["critic"] == NO_CRITIC:
            without[row["grid"]].append(row | {"grid": ""})
    assert without["plain"] == without["changed"] != []

    # A copy that was cut off is made again, and a model that was taken over can be used like any other.
    cells = [tmp_path / name / tiny_model.name / "pairs-8" for name in grids]
    (cells[1] / "evaluate/none/seed-0/done.json").unlink()
    shutil.rmtree(cells[1] / "evaluate/none/seed-0/mini")
    assert run_study(recipe, out=tmp_path)["rows"] == rows
    assert len(trained) == 3
    pairs = [CritiquedPair(pair=pair) for pair in read_pairs(data_path("bundled:mini-pairs.jsonl"), limit=4).pairs]
    first, copied = (RewardModel.load(cell / "train/none/seed-0/model").score(pairs) for cell in cells)
    assert first == copied


def test_a_backbone_is_asked_once_what_it_says_before_any_label(tiny_model, tmp_path):
    recipe = _recipe(tiny_model) | {"evaluate": {"zero_label": True}}
    cells = plan_study(Recipe.model_validate(recipe), out=tmp_path)
    assert [cell.recipe.evaluate.zero_label for cell in cells] == [True, False, False]


def test_training_pairs_of_a_test_prompt_are_left_out(tiny_model, tmp_path):
    grids = {"leak": {"pairs": [{"path": "bundled:mini-pairs.jsonl"}]}}
    cells = plan_study(Recipe.model_validate(_recipe(tiny_model, grids=grids)), out=tmp_path)
    kept = {json.loads(row)["id"] for row in (tmp_path / "pairs" / "leak.jsonl").read_text().splitlines()}
    assert len(kept) == cells[0].n_train == 370


def test_the_same_pair_of_two_sources_is_drawn_once(tiny_model, tmp_path):
    other = tmp_path / "other.jsonl"
    rows = read_pairs(str(data_path("bundled:mini-pairs.jsonl")), split="train").pairs
    write_records(other, [replace(pair, id=f"other-{pair.id}") for pair in rows])
    grids = {"both": {"pairs": [{"path": "bundled:mini-pairs.jsonl", "split": "train"}, {"path": str(other)}]}}
    cells = plan_study(Recipe.model_validate(_recipe(tiny_model, grids=grids)), out=tmp_path)
    assert cells[0].n_train == len(rows)


@pytest.mark.parametrize(
    ("grids", "message"),
    [
        ({"big": {"sizes": [8, 4000]}}, "there are 40 training pairs"),
        ({"big": {"change": {"train": {"batch": 3}}}}, "batch"),
        ({"big": {"change": {"train": {"backbone": "x"}}}}, "backbones"),
    ],
)
def test_a_grid_that_cannot_be_run_is_refused_before_anything_is(tiny_model, tmp_path, grids, message):
    with pytest.raises((DataError, ConfigError), match=message):
        run_study(Recipe.model_validate(_recipe(tiny_model, grids=grids)), out=tmp_path)
    assert not list(tmp_path.rglob("train"))


def test_a_recipe_without_a_study_and_an_unknown_critic_are_refused(tiny_model, tmp_path):
    with pytest.raises(ConfigError, match="no study"):
        run_study(Recipe.model_validate(_recipe(tiny_model) | {"study": None}), out=tmp_path)
    with pytest.raises(ValueError, match="nobody"):
        Recipe.model_validate(_recipe(tiny_model, grids={"a": {"critics": ["nobody"]}}))


def test_trained_cells_are_counted(finished):
    recipe, out, _ = finished
    assert [n_trained(cell) for cell in plan_study(recipe, out=out)] == [4, 4, 2]
