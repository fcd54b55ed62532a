"""The paper's loss is TRL's: the same pairs through its RewardTrainer give the same loss and gradients."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("trl", reason="trl is not installed (extra `bench`): nothing to compare with")
pytest.importorskip("datasets", reason="datasets is not installed (extra `data`): TRL needs it")

from rich.console import Console
from transformers import AutoModelForSequenceClassification

from critrm.config import TrainConfig
from critrm.models import load_tokenizer
from critrm.pair_trainer import make_trainer
from critrm.reward_model import Reads, RewardModel
from critrm.training_data import encode_pairs, packed_row
from critrm.types import CritiquedPair

pytestmark = pytest.mark.filterwarnings("ignore")  # TRL still uses names that transformers has deprecated


@pytest.mark.parametrize("center_weight", [0.0, 0.01])
@pytest.mark.parametrize("margins", [True, False])
def test_loss_and_gradients_are_those_of_trls_reward_trainer(center_weight, margins, tiny_model, pairs, tmp_path):
    arm = [
        CritiquedPair(
            pair=replace(pair, rating=pair.rating if n % 3 else None),
            critic="c",
            chosen_critique="good " * (1 + n % 3),
            rejected_critique="bad",
        )
        for n, pair in enumerate(pairs)
    ]
    settings = {} if margins else {"margins": None}
    config = TrainConfig(backbone=str(tiny_model), precision="fp32", center_weight=center_weight, **settings)
    model = RewardModel.from_backbone(str(tiny_model), Reads(critic="c"), seed=0)
    model.save(tmp_path / "start")
    encoded, _ = encode_pairs(arm, model, config=config)
    console = Console(quiet=True)
    ours, _ = make_trainer(
        model, config, encoded=encoded, held_out=[], out=tmp_path / "ours", seed=0, rate=1e-4, console=console
    )
    our_loss = ours.compute_loss(ours.model, packed_row(encoded))
    our_loss.backward()

    theirs = _trl_trainer(tmp_path, encoded, margins=margins, center_weight=center_weight)
    batch = next(iter(theirs.get_eval_dataloader(theirs.train_dataset)))  # in the given order
    assert ("margin" in batch) == margins
    their_loss = theirs.compute_loss(theirs.model, batch)
    their_loss.backward()

    assert our_loss.item() == pytest.approx(their_loss.item(), abs=1e-6, rel=1e-6)
    gradients = dict(theirs.model.named_parameters())
    for name, parameter in ours.model.named_parameters():
        expected = gradients[name].grad
        torch.testing.assert_close(parameter.grad, expected, atol=1e-5 * float(expected.abs().max()), rtol=1e-5)


def _trl_trainer(folder, encoded, *, margins, center_weight):
    from datasets import Dataset
    from trl import RewardConfig, RewardTrainer

    rows = [
        {
            f"{side}_ids": pair.encoded.prompt + branch
            for side, branch in zip(("chosen", "rejected"), pair.encoded.branches, strict=True)
        }
        | ({"margin": pair.encoded.margin} if margins else {})
        for pair in encoded
    ]
    arguments = RewardConfig(
        output_dir=str(folder / "theirs"),
        use_cpu=True,
        bf16=False,
        per_device_eval_batch_size=len(rows),
        center_rewards_coefficient=center_weight or None,
        report_to="none",
    )
    return RewardTrainer(
        model=AutoModelForSequenceClassification.from_pretrained(folder / "start"),
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=load_tokenizer(str(folder / "start")),
    )
