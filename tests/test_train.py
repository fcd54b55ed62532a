"""Runs from pairs to a saved model: learned, exact, resumable after kill -9, and refused where they cannot work."""

import inspect
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import replace

import pytest
import torch
from peft import PeftModel
from pydantic import ValidationError
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from critrm.batching import pack
from critrm.config import TrainConfig
from critrm.errors import ConfigError, DataError, ModelError, StorageError
from critrm.pair_trainer import fresh_model
from critrm.reward_model import Reads, RewardModel
from critrm.store import write_records
from critrm.train import command, held_out_loss, run_facts, train_reward_model
from critrm.types import CritiquedPair, Score


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


@pytest.mark.parametrize("checkpointing", [False, True])
def test_threads_that_share_a_step_give_the_same_bits_again_and_one_threads_result_to_rounding(
    checkpointing, set_threads, tiny_model, arm, tmp_path
):
    def weights(name, n_threads):
        set_threads(n_threads)
        config = _config(tiny_model, gradient_checkpointing=checkpointing).model_copy(update={"precision": "bf16"})
        result = train_reward_model(arm[:20], config, out=tmp_path / name, seed=1)
        return result.loss, load_file(result.folder / "model.safetensors")

    (alone, expected), (loss, first), (again, second) = weights("alone", 1), weights("first", 3), weights("second", 3)
    assert loss == again
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert loss == pytest.approx(alone, rel=0.02)
    for name, tensor in expected.items():
        torch.testing.assert_close(first[name], tensor, atol=0.02, rtol=0.05)


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


def test_a_run_of_other_settings_over_an_old_one_leaves_nothing_that_is_not_its_own(
    tiny_model, arm, tmp_path, monkeypatch
):
    old, new = _config(tiny_model, lora_rank=4), _config(tiny_model)
    train_reward_model(arm, old, out=tmp_path)
    expected = load_file(tmp_path / "model" / "model.safetensors")
    save = RewardModel.save

    def fill_the_disk(self, folder):
        save(self, folder)
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(RewardModel, "save", fill_the_disk)
        with pytest.raises(StorageError):
            train_reward_model(arm, new, out=tmp_path)
    # The model's folder holds the new weights, so the old run is done no more: it is trained again.
    assert not torch.equal(
        load_file(tmp_path / "model" / "model.safetensors")["score.weight"], expected["score.weight"]
    )
    train_reward_model(arm, old, out=tmp_path)
    assert (tmp_path / "adapter").is_dir()
    for name, tensor in load_file(tmp_path / "model" / "model.safetensors").items():
        torch.testing.assert_close(tensor, expected[name])
    train_reward_model(arm, new, out=tmp_path)
    assert not (tmp_path / "adapter").exists()


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
    # The adapters on a fresh backbone are the model, bit for bit.
    backbone = RewardModel.from_backbone(str(tiny_model), Reads(critic="c"), seed=5).model
    with warnings.catch_warnings():
        # peft still asks for an attribute by a name that transformers has deprecated.
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        reloaded = PeftModel.from_pretrained(backbone, tmp_path / "adapter").merge_and_unload().state_dict()
    for name, tensor in load_file(result.folder / "model.safetensors").items():
        assert torch.equal(reloaded[name], tensor), name


@pytest.fixture
def wide_model(tiny_model, tmp_path):
    """The tiny model with layers as wide as the blocks of 64 weights that 4 bits come in."""
    folder = shutil.copytree(tiny_model, tmp_path / "wide-model")
    shape = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16, "initializer_range": 0.2}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig.from_pretrained(tiny_model, **shape)).save_pretrained(folder)
    return folder


def test_adapters_on_4_bits_are_merged_into_what_the_4_bits_stand_for(wide_model, arm, tmp_path):
    pytest.importorskip("bitsandbytes")
    config = _config(wide_model, lora_rank=4, load_in_4bit=True, n_epochs=3, margins=None)
    result = train_reward_model(arm, config, out=tmp_path, seed=0)
    scores = RewardModel.load(result.folder, precision="fp32").score(arm)
    assert sum(score.chosen > score.rejected for score in scores) == len(arm)
    # The adapters on a backbone that is still in 4 bits give these rewards, too.
    quantized = fresh_model(config, Reads(critic="c"), seed=5)
    assert quantized.model.model.layers[0].mlp.up_proj.weight.dtype == torch.uint8
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        quantized.model = PeftModel.from_pretrained(quantized.model, tmp_path / "adapter")
    for ours, theirs in zip(scores, quantized.score(arm), strict=True):
        assert (ours.chosen, ours.rejected) == pytest.approx((theirs.chosen, theirs.rejected), rel=0.01, abs=0.01)
    # What is saved is a plain classifier in full precision, which needs no bitsandbytes.
    weights = load_file(result.folder / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    assert "quantization_config" not in json.loads((result.folder / "config.json").read_text())
    whole = RewardModel.from_backbone(str(wide_model), Reads(), seed=0).model.state_dict()
    assert torch.equal(weights["model.embed_tokens.weight"], whole["model.embed_tokens.weight"])


def test_gradients_through_4_bits_are_those_of_what_they_stand_for_after_an_evaluation_as_well(wide_model, arm):
    pytest.importorskip("bitsandbytes")
    config = _config(wide_model, lora_rank=4, load_in_4bit=True)
    found = []
    for whole in (False, True):
        model = fresh_model(config, Reads(critic="c"), seed=0)
        if whole:
            model.model.dequantize(torch.float32)
        batch = pack([model.encode(item) for item in arm[:4]])
        model.score(arm[:4])  # reads without gradients
        embedded = model.model.get_input_embeddings()
        embedded.weight.requires_grad_(True)
        model.model.train(True)
        rewards = model.rewards(batch)
        (rewards[:, 0] - rewards[:, 1]).sum().backward()
        found.append((rewards.detach(), embedded.weight.grad))
    for quantized, plain in zip(*found, strict=True):
        torch.testing.assert_close(quantized, plain, rtol=0.01, atol=0.01 * float(plain.abs().max()))


def test_the_trainers_loggers_work(tiny_model, arm, tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    train_reward_model(arm[:8], _config(tiny_model, report_to=("tensorboard",)), out=tmp_path / "run")
    assert list((tmp_path / "board").rglob("events.out.tfevents.*"))


def test_bad_arms_are_refused(tiny_model, arm, tmp_path):
    with pytest.raises(DataError, match="one arm"):
        train_reward_model([], _config(tiny_model), out=tmp_path)
    with pytest.raises(DataError, match="one arm"):
        train_reward_model([arm[0], replace(arm[1], critic="d")], _config(tiny_model), out=tmp_path)


def test_settings_that_cannot_work_are_refused_before_anything_is_trained(tiny_model, arm, tmp_path):
    unrated = [replace(item, pair=replace(item.pair, rating=None)) for item in arm]
    with pytest.raises(ConfigError, match="no pair has a rating"):
        train_reward_model(unrated, _config(tiny_model, loss="scaled"), out=tmp_path)
    with pytest.raises(ConfigError, match="held-out pairs.*none has a rating.*keep: last"):
        scaled = _config(tiny_model, loss="scaled", keep="best")
        train_reward_model(arm, scaled, out=tmp_path, held_out=unrated)
    with pytest.raises(ConfigError, match="needs held-out pairs"):
        train_reward_model(arm, _config(tiny_model, keep="best"), out=tmp_path)
    with pytest.raises(DataError, match="one arm"):
        held_out = [replace(arm[0], critic="d")]
        train_reward_model(arm, _config(tiny_model, keep="best"), out=tmp_path, held_out=held_out)
    four_bits = {"load_in_4bit": True}
    for bad in (
        {"loss": "scaled", "margins": None}, {"center_weight": -1}, {"critique_dropout": 1}, {"loss": "x"},
        four_bits, four_bits | {"lora_rank": 4, "lm_weight": 0.1}, four_bits | {"lora_rank": 4, "frozen": True},
    ):  # fmt: skip
        with pytest.raises(ValidationError):
            _config(tiny_model, **bad)
    with pytest.raises(ConfigError, match=r"scaled loss.*margins"):
        command(tmp_path / "arm.jsonl", backbone="x", out=tmp_path, loss="scaled", margin=False)


def test_new_settings_leave_the_facts_of_runs_without_them_alone():
    facts = run_facts(TrainConfig(backbone="x"), seed=0, rate=1e-4, max_length=64)
    assert set(facts) == {
        "backbone", "batch_size", "n_epochs", "min_learning_rate_share", "warmup_steps", "margins", "precision",
        "lora_rank", "seed", "learning_rate", "max_length",
    }  # fmt: skip
    changes = {
        "loss": "scaled",
        "center_weight": 0.1,
        "lm_weight": 0.1,
        "score_weight": 0.1,
        "critique_dropout": 0.1,
        "keep": "best",
    }
    for name, value in changes.items():
        changed = run_facts(TrainConfig(backbone="x", **{name: value}), seed=0, rate=1e-4, max_length=64)
        assert changed == facts | {name: value}
    faster = TrainConfig(backbone="x", gradient_checkpointing=True, pairs_per_pass=1)
    assert run_facts(faster, seed=0, rate=1e-4, max_length=64) == facts


def test_the_scaled_loss_says_which_pairs_it_ignores(tiny_model, arm, tmp_path):
    mixed = [replace(item, pair=replace(item.pair, rating=None)) for item in arm[:4]] + arm[4:]
    result = train_reward_model(mixed, _config(tiny_model, loss="scaled"), out=tmp_path / "mixed")
    assert f"4 of {len(arm)} pairs have no rating: the scaled loss takes no notice of them" in result.notes


def test_with_critique_dropout_a_model_also_learns_from_pairs_without_critiques(tiny_model, arm, tmp_path):
    plain = train_reward_model(arm, _config(tiny_model), out=tmp_path / "plain")
    dropped = train_reward_model(arm, _config(tiny_model, critique_dropout=0.5), out=tmp_path / "dropped")
    assert dropped.n_pairs == plain.n_pairs
    assert 0.5 * plain.n_tokens < dropped.n_tokens < plain.n_tokens
    assert dropped.loss != plain.loss


@pytest.mark.parametrize("frozen", [False, True])
def test_the_critics_scores_are_learnt_where_they_are_asked_for_and_change_nothing_else(
    frozen, tiny_model, arm, tmp_path
):
    # Labels and scores are opposed: what is learnt tells which was listened to.
    scored = [replace(item, chosen_score=1.0, rejected_score=9.0) for item in arm]
    config = _config(tiny_model, n_epochs=1 if frozen else 6, margins=None, frozen=frozen)
    plain = train_reward_model(arm, config, out=tmp_path / "plain")
    weights = plain.folder / "model.safetensors"
    stamp = weights.stat().st_mtime_ns
    assert train_reward_model(scored, config, out=tmp_path / "plain") == plain
    assert weights.stat().st_mtime_ns == stamp, "scores that nobody asked for do not make it another run"
    asked = config.model_copy(update={"score_weight": 20.0})
    train_reward_model(scored, asked, out=tmp_path / "scored")
    scores = RewardModel.load(tmp_path / "scored" / "model").score(scored)
    assert all(score.chosen < score.rejected for score in scores)
    again = [replace(item, chosen_score=9.0, rejected_score=1.0) for item in arm]
    train_reward_model(again, asked, out=tmp_path / "scored")
    scores = RewardModel.load(tmp_path / "scored" / "model").score(scored)
    assert all(score.chosen > score.rejected for score in scores), "other scores make it another run"
    bare = [CritiquedPair(pair=item.pair) for item in arm]
    train_reward_model(bare, asked, out=tmp_path / "bare")  # as with lm_weight, no critiques have nothing to teach
    with pytest.raises(ConfigError, match="score_weight needs the critic's own scores"):
        train_reward_model(arm, asked, out=tmp_path / "none")


def test_a_run_counts_the_pairs_it_had_to_cut(tiny_model, arm, tmp_path):
    result = train_reward_model(arm[:8], _config(tiny_model), out=tmp_path, max_length=24)
    (note,) = [note for note in result.notes if "cut to 24 tokens" in note]
    assert "of 8 pairs" in note
    assert "the prompt of" in note
    assert note in json.loads((tmp_path / "manifest.json").read_text())["notes"]


def test_a_run_that_is_out_of_memory_ends_with_advice(tiny_model, arm, tmp_path, monkeypatch):
    def compute_loss(*args, **kwargs):
        torch.empty(1 << 60, dtype=torch.uint8)

    monkeypatch.setattr("critrm.pair_trainer.PairTrainer.compute_loss", compute_loss)
    with pytest.raises(ModelError, match=r"memory ran out.*pairs_per_pass.*gradient_checkpointing"):
        train_reward_model(arm, _config(tiny_model), out=tmp_path)


def test_the_commands_flags_are_the_configs_keys():
    flags = set(inspect.signature(command).parameters) - {
        "arm",
        "out",
        "held_out",
        "seed",
        "learning_rate",
        "max_length",
        "margin",
    }
    recipes_only = {
        "learning_rates",
        "margins",
        "seeds",
        "n_held_out",
        "n_sweep",
        "warmup_steps",
        "min_learning_rate_share",
    }
    assert flags == set(TrainConfig.model_fields) - recipes_only
    for name in flags - {"backbone"}:
        assert inspect.signature(command).parameters[name].default == TrainConfig.model_fields[name].default


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
