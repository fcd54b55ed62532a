"""Train critic by test critic, on a finished run with tiny models: the run's own cells, resuming, and the warnings."""

import io
import json

import pytest
from rich.console import Console

from critrm import cross as module
from critrm.config import Recipe
from critrm.cross import command, cross_critics, cross_markdown, cross_tables
from critrm.errors import DataError
from critrm.pipeline import run_recipe
from critrm.results import same_models_difference
from critrm.types import NO_CRITIC, Outcome

RIGHT, WRONG, UNSCORED = Outcome.RIGHT, Outcome.WRONG, Outcome.UNSCORED


@pytest.fixture(scope="module")
def run_folder(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    recipe = {
        "name": "small",
        "preferences": {
            "train": {"path": "bundled:mini-pairs.jsonl", "split": "train", "limit": 8},
            "test": {"mini": {"path": "bundled:mini-pairs.jsonl", "split": "test", "limit": 8}},
        },
        "critique": {
            "critics": {
                "frontier-llm": {"file": "bundled:mini-frontier-llm.jsonl"},
                "same again": {"file": "bundled:mini-frontier-llm.jsonl"},
            }
        },
        "augment": {"max_length": 1000},
        "train": {"backbone": str(tiny_model), "batch_size": 4, "precision": "fp32", "seeds": [0, 1]},
        "evaluate": {"zero_label": False},
    }
    run_recipe(Recipe.model_validate(recipe), out=folder)
    return folder


def test_the_matrix_of_a_run(run_folder, monkeypatch, capsys):
    results = cross_critics(run_folder)
    own = json.loads((run_folder / "results.json").read_text())["tests"]["mini"]["all"]["arms"]
    critics = [NO_CRITIC, "frontier-llm", "same again"]
    assert results["critics"] == critics
    rows = results["tests"]["mini"]
    for trained in critics:
        assert list(rows[trained]) == critics
        diagonal = rows[trained][trained]
        assert diagonal["difference"] is None
        assert {name: diagonal[name] for name in ("mean", "by_seed", "low")} == {
            name: own[trained][name] for name in ("mean", "by_seed", "low")
        }
    assert rows["frontier-llm"]["same again"]["by_seed"] == rows["frontier-llm"]["frontier-llm"]["by_seed"]
    assert rows["frontier-llm"]["same again"]["difference"]["value"] == 0.0
    assert not list(run_folder.glob("cross/frontier-llm/*/mini/frontier-llm")), "the run has it"
    assert len(list(run_folder.glob("cross/*/seed-*/mini/*/done.json"))) == 12
    assert json.loads((run_folder / "cross.json").read_text()) == results
    # Again: no model is loaded, but for the cell that is missing.
    (run_folder / "cross" / "none" / "seed-1" / "mini" / "frontier-llm" / "done.json").unlink()
    loaded, load = [], module.RewardModel.load
    monkeypatch.setattr(module.RewardModel, "load", lambda folder: loaded.append(str(folder)) or load(folder))
    assert cross_critics(run_folder) == results
    assert loaded == [str(run_folder / "train" / "none" / "seed-1" / "model")]
    command(run_folder)
    shown = capsys.readouterr().out
    assert "Train critic by test critic, mini" in shown and "reads same again" in shown


def test_a_folder_without_a_finished_run_is_refused(tmp_path):
    with pytest.raises(DataError, match="no finished run"):
        cross_critics(tmp_path)
    (tmp_path / "manifest.json").write_text("{}")
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(DataError, match="no finished run"):
        cross_critics(tmp_path)


def _cell(mean, lost=None, p=None):
    found = {"mean": mean, "std": None, "low": mean, "high": mean, "difference": None}
    if lost is not None:
        found["difference"] = {"value": lost, "low": lost, "high": lost, "p_value": p, "p_holm": p}
    return found


def test_only_a_significant_loss_warns():
    rows = {
        "a[/x]": {"a[/x]": _cell(0.9), "b": _cell(0.7, 0.2, 0.001), NO_CRITIC: _cell(0.88, 0.02, 0.4)},
        "b": {"a[/x]": _cell(0.95, -0.2, 0.001), "b": _cell(0.75), NO_CRITIC: _cell(0.6, 0.15, 0.04)},
    }
    warnings = module._warnings("mini", rows)
    assert len(warnings) == 2
    assert warnings[0].startswith("mini: trained with critiques by a[/x], it loses 0.200")
    assert "without critiques" in warnings[1]
    results = {"critics": ["a[/x]", "b", NO_CRITIC], "seeds": [0], "tests": {"mini": rows}, "warnings": warnings}
    console = Console(width=80, record=True, file=io.StringIO())
    for table in cross_tables(results):
        console.print(table)
    text = console.export_text()
    assert "reads b" in text and "+0.200" in text and "it loses 0.200" in text and "a[/x]" in text
    markdown = cross_markdown(results)
    assert "| a[/x] | 0.900" in markdown and f"- {warnings[0]}" in markdown


def test_the_same_models_are_compared_with_themselves():
    one = [[RIGHT] * 8 + [WRONG] * 2]
    other = [[RIGHT] * 2 + [WRONG] * 8]
    found = same_models_difference(one, other)
    assert found["value"] == pytest.approx(0.6)
    assert found["p_value"] == pytest.approx(2 * 0.5**6), "exact McNemar"
    # Seeds that differ a lot, but lose the same on the same pairs: the spread of the seeds is no doubt of the loss.
    good, bad = [RIGHT] * 30, [RIGHT] * 10 + [WRONG] * 20
    paired = same_models_difference([good, bad, good], [[WRONG, *good[1:]], [WRONG, *bad[1:]], [WRONG, *good[1:]]])
    assert paired["value"] == pytest.approx(1 / 30)
    assert paired["high"] < 0.15
    assert same_models_difference([[UNSCORED]], [[RIGHT]]) is None
    assert same_models_difference([], []) is None
