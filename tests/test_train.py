"""The ranking loss, the schedule, and runs that survive kill -9."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from critrm.config import TrainConfig
from critrm.errors import DataError
from critrm.reward_model import RewardModel
from critrm.store import write_records
from critrm.train import command, held_out_loss, margin_of, ranking_loss, scaled_warmup, train_reward_model
from critrm.types import CritiquedPair, Score

FINITE = st.floats(-20, 20)


@given(st.lists(st.tuples(FINITE, FINITE, st.floats(0, 3)), min_size=1))
def test_ranking_loss_is_equation_1(rows):
    rewards = torch.tensor([[chosen, rejected] for chosen, rejected, _ in rows], dtype=torch.float64)
    margins = torch.tensor([margin for _, _, margin in rows], dtype=torch.float64)
    expected = [math.log1p(math.exp(-(chosen - rejected - margin))) for chosen, rejected, margin in rows]
    assert ranking_loss(rewards, margins).tolist() == pytest.approx(expected, rel=1e-9, abs=1e-12)


@pytest.fixture
def arm(pairs):
    """Pairs that only the critique tells apart."""
    return [
        CritiquedPair(
            pair=replace(pair, id=f"{pair.id}-{n}", rating="better"),
            critic="c",
            chosen_critique="good good good",
            rejected_critique="bad bad bad",
        )
        for n in range(4)
        for pair in pairs
    ]


def test_margins_come_from_the_pair_then_from_its_rating_then_from_nothing(arm):
    margins = TrainConfig(backbone="x").margins
    assert margin_of(arm[0], margins) == pytest.approx(2 / 3)
    assert margin_of(replace(arm[0], pair=replace(arm[0].pair, margin=0.2)), margins) == 0.2
    assert margin_of(replace(arm[0], pair=replace(arm[0].pair, rating=None)), margins) == 0.0
    assert margin_of(arm[0], None) == 0.0


def test_warmup_is_the_papers_at_its_number_of_steps_and_scaled_below():
    config = TrainConfig(backbone="x")
    assert scaled_warmup(config, 155) == (32, "")
    assert scaled_warmup(config, 1000) == (32, "")
    steps, note = scaled_warmup(config, 23)
    assert steps == 5
    assert "32 to 5" in note


def _config(tiny_model, **changes):
    return TrainConfig(
        backbone=str(tiny_model),
        precision="fp32",
        batch_size=8,
        learning_rates=(5e-3,),
        checkpoint_minutes=0,
        **changes,
    )


def test_an_arm_that_only_critiques_tell_apart_is_learned_and_the_baseline_stays_at_chance(tiny_model, arm, tmp_path):
    config = _config(tiny_model, n_epochs=4, margins=None)
    train_reward_model(arm, config, out=tmp_path / "c", seed=0)
    scores = RewardModel.load(tmp_path / "c" / "model").score(arm)
    assert all(score.chosen > score.rejected for score in scores)
    # Without critiques, completions that carry no signal leave the loss at ln 2.
    same = [
        CritiquedPair(pair=replace(item.pair, chosen=f"word {n}", rejected=f"word {n + 1}"))
        for n, item in enumerate(arm)
    ]
    result = train_reward_model(same, config, out=tmp_path / "none", seed=0)
    assert result.loss > 0.5


def test_the_result_does_not_depend_on_the_passes_a_step_is_split_into(tiny_model, arm, tmp_path):
    runs = {}
    for per_pass in (8, 4, 3):
        config = _config(tiny_model, pairs_per_pass=per_pass)
        result = train_reward_model(arm[:20], config, out=tmp_path / str(per_pass), seed=1)
        runs[per_pass] = result.loss, load_file(result.folder / "model.safetensors")
    loss, weights = runs[8]
    for other_loss, other in (runs[4], runs[3]):
        assert other_loss == pytest.approx(loss, rel=1e-3)
        for name, tensor in weights.items():
            torch.testing.assert_close(other[name], tensor, atol=2e-4, rtol=1e-3)


def test_a_finished_run_is_not_repeated_and_leaves_no_checkpoints(tiny_model, arm, tmp_path):
    first = train_reward_model(arm, _config(tiny_model), out=tmp_path, seed=0)
    stamp = (first.folder / "model.safetensors").stat().st_mtime_ns
    assert train_reward_model(arm, _config(tiny_model), out=tmp_path, seed=0) == first
    assert (first.folder / "model.safetensors").stat().st_mtime_ns == stamp
    assert not (tmp_path / "checkpoints").exists()
    assert not [path for path in tmp_path.rglob("*") if path.suffix in {".bin", ".pt", ".pth", ".pkl"}]
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["seeds"] == [0]
    assert any("warm-up scaled" in note for note in manifest["notes"])


def test_a_killed_run_resumes_to_the_same_weights(tiny_model, arm, tmp_path):
    write_records(tmp_path / "arm.jsonl", arm)
    arguments = [
        sys.executable, "-m", "critrm", "train", str(tmp_path / "arm.jsonl"), "--backbone", str(tiny_model),
        "--batch-size", "4", "--learning-rate", "0.005", "--precision", "fp32", "--n-epochs", "3",
        "--checkpoint-minutes", "0",
    ]  # fmt: skip
    subprocess.run([*arguments, "--out", str(tmp_path / "whole")], check=True, capture_output=True)
    process = subprocess.Popen(
        [*arguments, "--out", str(tmp_path / "killed")], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not list(
        (tmp_path / "killed").glob("checkpoints/checkpoint-*/trainer_state.json")
    ):
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / "model").exists()
    subprocess.run([*arguments, "--out", str(tmp_path / "killed")], check=True, capture_output=True)
    whole, resumed = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "killed"))
    for name, tensor in whole.items():
        torch.testing.assert_close(resumed[name], tensor, atol=1e-6, rtol=1e-5)


def test_lora_trains_adapters_and_the_saved_head_survives_a_reload(tiny_model, arm, tmp_path):
    config = _config(tiny_model, lora_rank=4, n_epochs=3, margins=None)
    result = train_reward_model(arm, config, out=tmp_path, seed=0)
    scores = RewardModel.load(result.folder).score(arm)
    assert sum(score.chosen > score.rejected for score in scores) == len(arm)
    adapter = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert any("score" in name for name in adapter)
    head = next(tensor for name, tensor in adapter.items() if "score" in name)
    assert torch.equal(load_file(result.folder / "model.safetensors")["score.weight"], head)


def test_the_trainers_loggers_work(tiny_model, arm, tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    train_reward_model(arm[:8], _config(tiny_model, report_to=("tensorboard",)), out=tmp_path / "run")
    assert list((tmp_path / "board").rglob("events.out.tfevents.*"))


def test_bad_arms_are_refused(tiny_model, arm, tmp_path):
    with pytest.raises(DataError, match="one arm"):
        train_reward_model([], _config(tiny_model), out=tmp_path)
    with pytest.raises(DataError, match="one arm"):
        train_reward_model([arm[0], replace(arm[1], critic="d")], _config(tiny_model), out=tmp_path)


def test_held_out_loss_is_the_mean_over_pairs(arm):
    scores = [Score(arm[0].pair.id, 1.0, 0.0), Score(arm[1].pair.id, 0.0, 0.0)]
    expected = (math.log1p(math.exp(-1)) + math.log(2)) / 2
    assert held_out_loss(arm[:2], scores, None) == pytest.approx(expected)


def test_the_command_says_what_it_did(tiny_model, arm, tmp_path, capsys):
    write_records(tmp_path / "arm.jsonl", [replace(item, pair=replace(item.pair, rating=None)) for item in arm[:8]])
    command(tmp_path / "arm.jsonl", backbone=str(tiny_model), out=tmp_path / "run", batch_size=4, precision="fp32")
    out = capsys.readouterr().out
    assert "no margin: the pairs carry no ratings" in out
    assert "warm-up scaled" in out
    assert "8 pairs" in out
