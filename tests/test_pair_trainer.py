"""The Trainer's loss over passes, critique prediction, checkpointed activations, the best weights."""

import json
import math
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PhiConfig,
    PhiForCausalLM,
)

from critrm import pair_trainer
from critrm.config import TrainConfig
from critrm.errors import ConfigError, ModelError
from critrm.pair_trainer import LanguageHead, make_trainer, scaled_warmup
from critrm.reward_model import Reads, RewardModel
from critrm.train import train_reward_model
from critrm.training_data import collate, encode_pairs, packed_row
from critrm.types import CritiquedPair


@pytest.fixture
def arm(pairs):
    return [
        CritiquedPair(pair=pair, critic="c", chosen_critique="good " * (1 + n % 3), rejected_critique="bad and bad")
        for n, pair in enumerate(pairs)
    ]


def _config(folder, **changes):
    settings = {"precision": "fp32", "batch_size": 4, "learning_rates": (5e-3,), "checkpoint_minutes": 100}
    return TrainConfig(backbone=str(folder), **settings | changes)


def _trainer(folder, arm, config, out):
    model = RewardModel.from_backbone(str(folder), Reads(critic="c"), seed=0)
    encoded, _ = encode_pairs(arm, model, config=config)
    console = Console(quiet=True)
    trainer, _ = make_trainer(model, config, encoded=encoded, held_out=[], out=out, seed=0, rate=1e-3, console=console)
    return model, encoded, trainer


def test_warmup_is_the_papers_at_its_number_of_steps_and_scaled_below():
    config = TrainConfig(backbone="x")
    assert scaled_warmup(config, 155) == (32, "")
    assert scaled_warmup(config, 1000) == (32, "")
    steps, note = scaled_warmup(config, 23)
    assert steps == 5
    assert "32 to 5" in note
    # From three steps on, the numbers of runs that were finished before one step had to be left.
    for n_steps in range(3, 155):
        assert scaled_warmup(config, n_steps)[0] == min(32, max(1, round(32 * n_steps / 155)))
    assert scaled_warmup(config, 25)[0] == 5


def test_a_step_is_left_after_the_warmup_and_the_note_says_so():
    for wanted in (0, 1, 32, 200):
        for n_steps in (1, 2, 3, 20, 154, 155, 160, 1000):
            steps, note = scaled_warmup(TrainConfig(backbone="x", warmup_steps=wanted), n_steps)
            assert 0 <= steps < n_steps
            assert (f"from {wanted} to {steps} steps" in note) == (steps != wanted)
    assert scaled_warmup(TrainConfig(backbone="x"), 1) == (
        0,
        "warm-up scaled from 32 to 0 steps: there is 1 step, not 155",
    )
    note = scaled_warmup(TrainConfig(backbone="x", warmup_steps=200), 160)[1]
    assert note == "warm-up scaled from 200 to 159 steps: there are 160 steps"


@pytest.mark.parametrize("n_steps", [1, 2])
def test_few_pairs_train_all_weights(n_steps, tiny_model, arm, tmp_path):
    config = _config(tiny_model, batch_size=len(arm) // n_steps)
    before = RewardModel.from_backbone(str(tiny_model), Reads(critic="c"), seed=0).model.state_dict()
    result = train_reward_model(arm, config, out=tmp_path, seed=0)
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    rates = [row["learning_rate"] for row in log if "learning_rate" in row]
    assert len(rates) == n_steps
    assert rates[0] == pytest.approx(5e-3)
    for name, tensor in load_file(result.folder / "model.safetensors").items():
        assert not torch.equal(tensor, before[name]), name


def test_passes_of_a_step_add_up_to_the_mean_over_its_pairs_and_fillers_do_not_count(tiny_model, arm, tmp_path):
    config = _config(tiny_model, center_weight=0.1, lm_weight=0.3, score_weight=0.5)
    _, encoded, trainer = _trainer(tiny_model, arm[:5], config, tmp_path)
    encoded = [replace(pair, scores=(1.0 - n, math.nan)) for n, pair in enumerate(encoded)]
    filler = replace(encoded[0], weight=0.0)
    passes = [collate(encoded[:3]), collate([*encoded[3:], filler])]
    n_items = trainer._get_num_items_in_batch(passes, torch.device("cpu"))
    assert float(n_items) == 5
    with torch.no_grad():
        single = [float(trainer.compute_loss(trainer.model, packed_row([pair]))) for pair in encoded]
        rows = [row for each in passes for row in each["rows"]]
        total = sum(float(trainer.compute_loss(trainer.model, row, num_items_in_batch=n_items)) for row in rows)
    assert total == pytest.approx(sum(single) / 5, rel=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_rows_read_at_once_give_the_gradients_of_one_row_to_rounding_and_the_same_bits_again(
    set_threads, checkpointing, tiny_model, arm, tmp_path
):
    set_threads(3)
    config = _config(tiny_model, lm_weight=0.3, gradient_checkpointing=checkpointing)
    model, encoded, trainer = _trainer(tiny_model, arm[:8], config, tmp_path)
    assert trainer.n_at_once == 3
    model.model.double()
    passes = trainer.data_collator(encoded)
    assert len(passes["rows"]) == 3
    n_items = torch.tensor(8)

    def gradients(inputs):
        model.model.zero_grad()
        losses = [trainer.training_step(model.model, inputs, n_items) for _ in range(2)]  # two passes, added up
        return [float(loss) for loss in losses], [parameter.grad for parameter in model.model.parameters()]

    loss, expected = gradients({"rows": [packed_row(encoded)]})
    at_once = [gradients(passes) for _ in range(5)]
    for found_loss, found in at_once:
        assert found_loss == pytest.approx(loss, rel=1e-6)
        for one, other, again in zip(expected, found, at_once[0][1], strict=True):
            torch.testing.assert_close(other, one, rtol=1e-6, atol=1e-8 * float(one.norm()) + 1e-12)
            assert torch.equal(other, again)
    assert found_loss == at_once[0][0]


def test_a_model_that_draws_dropout_is_read_row_by_row(set_threads, tiny_model, arm, tmp_path):
    set_threads(3)
    model = RewardModel.from_backbone(str(tiny_model), Reads(critic="c"), seed=0)
    model.model.config.attention_dropout = 0.1
    config = _config(tiny_model)
    encoded, _ = encode_pairs(arm[:4], model, config=config)
    how = {"encoded": encoded, "held_out": [], "out": tmp_path, "seed": 0, "rate": 1e-3, "console": None}
    trainer, _ = make_trainer(model, config, **how)
    assert trainer.n_at_once == 1
    assert len(trainer.data_collator(encoded)["rows"]) == 1


def _language_model(kind, folder, tiny_model):
    """A random language model with tiny_model's tokenizer; its logits are a linear map of hidden states, or more."""
    from critrm.models import load_tokenizer

    tokenizer = load_tokenizer(str(tiny_model))
    sizes = {
        "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.5, "pad_token_id": 0,
    }  # fmt: skip
    torch.manual_seed(0)
    model = {
        "untied": lambda: LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=False)),
        "tied": lambda: LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=True)),
        "scaled": lambda: CohereForCausalLM(CohereConfig(**sizes, logit_scale=0.25)),
        "bounded": lambda: Gemma2ForCausalLM(Gemma2Config(**sizes, head_dim=8, final_logit_softcapping=3.0)),
        "divided": lambda: GraniteForCausalLM(GraniteConfig(**sizes, logits_scaling=4.0, tie_word_embeddings=False)),
        "divided, tied": lambda: GraniteForCausalLM(
            GraniteConfig(**sizes, logits_scaling=4.0, tie_word_embeddings=True)
        ),
        "biased": lambda: PhiForCausalLM(PhiConfig(**sizes, tie_word_embeddings=False)),
    }[kind]()
    if kind == "biased":
        torch.nn.init.normal_(model.lm_head.bias)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["untied", "tied", "scaled", "bounded", "divided", "divided, tied", "biased"])
def test_critiques_are_predicted_as_the_backbone_predicts_them(kind, tiny_model, arm, tmp_path):
    folder = _language_model(kind, tmp_path / "lm", tiny_model)
    config = _config(folder, lm_weight=1.0)
    model = RewardModel.from_backbone(str(folder), Reads(critic="c"), seed=0)
    encoded, _ = encode_pairs(arm[:3], model, config=config)
    head = LanguageHead(model, str(folder))
    inputs = packed_row(encoded)
    model.model(**{name: inputs[name] for name in pair_trainer.MODEL_INPUTS})
    found = head.losses(inputs).tolist()

    plain = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").requires_grad_(False)
    for pair, loss in zip(encoded, found, strict=True):
        log_likelihoods = []
        for branch, n_critique in zip(pair.encoded.branches, pair.n_critiques, strict=True):
            assert n_critique > 0
            ids = torch.tensor([pair.encoded.prompt + branch])
            logs = plain(input_ids=ids).logits[0, :-1].log_softmax(-1)
            chosen = logs[torch.arange(ids.shape[1] - 1), ids[0, 1:]]
            log_likelihoods.append(chosen[-n_critique:])
        assert loss == pytest.approx(-float(torch.cat(log_likelihoods).mean()), rel=1e-4)


@pytest.mark.parametrize("kind", ["untied", "tied"])
def test_logits_that_are_computed_in_an_unknown_way_are_refused(kind, tiny_model, tmp_path, monkeypatch):
    folder = _language_model(kind, tmp_path, tiny_model)
    model = RewardModel.from_backbone(str(folder), Reads(critic="c"), seed=0)
    forward = LlamaForCausalLM.forward

    def scaled(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits = output.logits * 1.5
        return output

    monkeypatch.setattr(LlamaForCausalLM, "forward", scaled)
    with pytest.raises(ModelError, match="LlamaForCausalLM computes its logits.*without lm_weight"):
        LanguageHead(model, str(folder))


def test_a_language_head_of_its_own_is_not_trained_and_a_shared_one_is(tiny_model, arm, tmp_path):
    config = _config(tiny_model, lm_weight=1.0)
    _, encoded, trainer = _trainer(tiny_model, arm, config, tmp_path)
    before = trainer.language_head.head.weight.clone()
    trainer.train()
    assert torch.equal(trainer.language_head.head.weight, before)
    tied = _language_model("tied", tmp_path / "tied", tiny_model)
    model, _, trainer = _trainer(tied, arm, _config(tied, lm_weight=1.0), tmp_path)
    assert trainer.language_head.head is model.model.get_input_embeddings()


def test_training_on_critiques_makes_them_likelier(tiny_model, arm, tmp_path):
    critiques = {}
    for weight in (0.0, 1.0):
        config = _config(tiny_model, lm_weight=weight, n_epochs=4)
        result = train_reward_model(arm, config, out=tmp_path / str(weight))
        model = RewardModel.load(result.folder, precision="fp32")
        head = LanguageHead(model, str(tiny_model))
        inputs = packed_row(encode_pairs(arm, model, config=_config(tiny_model, lm_weight=1.0))[0])
        model.model(**{name: inputs[name] for name in pair_trainer.MODEL_INPUTS})
        critiques[weight] = head.losses(inputs).mean().item()
    assert critiques[1.0] < critiques[0.0] - 1


def test_checkpointed_activations_and_bf16_change_memory_and_rounding_only(tiny_model, arm, tmp_path):
    runs = {
        "plain": {},
        "checkpointed": {"gradient_checkpointing": True},
        "adapters": {"lora_rank": 4},
        "checkpointed adapters": {"lora_rank": 4, "gradient_checkpointing": True},
    }
    weights = {}
    for name, changes in runs.items():
        result = train_reward_model(arm, _config(tiny_model, **changes), out=tmp_path / name)
        weights[name] = load_file(result.folder / "model.safetensors")
    for name in ("plain", "adapters"):
        for key, tensor in weights[name].items():
            torch.testing.assert_close(
                weights["checkpointed" if name == "plain" else "checkpointed adapters"][key],
                tensor,
                atol=1e-5,
                rtol=1e-4,
            )
    bf16 = train_reward_model(arm, _config(tiny_model, precision="bf16"), out=tmp_path / "bf16")
    fp32 = json.loads((tmp_path / "plain" / "result.jsonl").read_text())["loss"]
    assert bf16.loss == pytest.approx(fp32, rel=0.05)
    assert {tensor.dtype for tensor in load_file(bf16.folder / "model.safetensors").values()} == {torch.float32}


def test_the_best_weights_are_kept_and_survive_in_the_model(tiny_model, arm, tmp_path):
    # What is learned is wrong on the held-out pairs, so that a look before the last one is the best.
    held_out = [
        CritiquedPair(
            pair=replace(item.pair, id=f"h-{item.pair.id}", chosen=item.pair.rejected, rejected=item.pair.chosen),
            critic="c",
            chosen_critique=item.rejected_critique,
            rejected_critique=item.chosen_critique,
        )
        for item in arm
    ]
    config = _config(tiny_model, keep="best", n_epochs=6, margins=None)
    result = train_reward_model(arm, config, out=tmp_path / "best", held_out=held_out)
    rows = [json.loads(line) for line in (tmp_path / "best" / "log.jsonl").read_text().splitlines()]
    looks = [row["eval_loss"] for row in rows if "eval_loss" in row]
    assert len(looks) >= 9
    assert looks[-1] > min(looks)
    scores = RewardModel.load(result.folder, precision="fp32").score(held_out)
    differences = torch.tensor([score.chosen - score.rejected for score in scores])
    assert float(-torch.nn.functional.logsigmoid(differences).mean()) == pytest.approx(min(looks), rel=1e-4)
    assert not (tmp_path / "best" / "checkpoints").exists()
    stamp = (result.folder / "model.safetensors").stat().st_mtime_ns
    assert train_reward_model(arm, config, out=tmp_path / "best", held_out=held_out) == result
    assert (result.folder / "model.safetensors").stat().st_mtime_ns == stamp


def test_what_several_processes_cannot_do_is_refused(tiny_model, arm, tmp_path, monkeypatch):
    monkeypatch.setattr(pair_trainer, "_is_sharded", lambda trainer: True)
    with pytest.raises(ConfigError, match="lm_weight needs whole weights"):
        _trainer(tiny_model, arm, _config(tiny_model, lm_weight=1.0), tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ConfigError, match="cannot be shared evenly by 3"):
        _trainer(tiny_model, arm, _config(tiny_model), tmp_path)
