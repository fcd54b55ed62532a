"""Chooses an arm's learning rate on pairs held out from training (section 4.4)."""

import json
import math
import random
import shutil
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from critrm.config import TrainConfig
from critrm.errors import DataError
from critrm.reward_model import RewardModel
from critrm.store import content_hash, mark_stage_done, stage_is_done
from critrm.train import held_out_loss, run_facts, train_reward_model
from critrm.types import CritiquedPair

SPLIT_SEED = 195
"""Draws the held-out pairs; one number, so that every arm and seed holds out the same ones."""

Arm = tuple[CritiquedPair, ...]


def split_held_out(arm: Sequence[CritiquedPair], n_held_out: int) -> tuple[Arm, Arm]:
    """The pairs to train on, in their order, and those held out: the same ones for every arm and seed.

    Raises:
        DataError: no pair would be left to train on, or training diverges at every rate.
    """
    order = random.Random(SPLIT_SEED).sample(range(len(arm)), len(arm))
    if len(arm) <= n_held_out:
        raise DataError(f"{n_held_out} held-out pairs leave none of {len(arm)} to train on")
    rest = tuple(arm[index] for index in sorted(order[n_held_out:]))
    return rest, tuple(arm[index] for index in order[:n_held_out])


def choose_learning_rate(
    arm: Sequence[CritiquedPair], config: TrainConfig, *, out: Path, max_length: int, console: Console
) -> float:
    """The learning rate with the lowest ranking loss on held-out pairs; trials that are finished are not repeated.

    Args:
        arm: an arm's training pairs.
        config: its rates, how many pairs are held out, and how many a trial trains on.
        out: the arm's folder; a trial's marks lie in `out/learning-rate-*`.
        max_length: tokens of prompt + completion + critique that are read.
        console: where progress is shown.

    Raises:
        DataError: no pair would be left to train on.
    """
    order = random.Random(SPLIT_SEED).sample(range(len(arm)), len(arm))
    _, held_out = split_held_out(arm, config.n_held_out)
    rest = [arm[index] for index in sorted(order[config.n_held_out :][: config.n_sweep])]
    losses = {
        rate: _trial(rest, held_out, config, rate=rate, out=out, max_length=max_length, console=console)
        for rate in config.learning_rates
    }
    best = min(losses, key=lambda rate: (math.isnan(losses[rate]), losses[rate]))
    if math.isnan(losses[best]):
        raise DataError(f"training diverged at every learning rate ({', '.join(map(str, losses))}): add lower ones")
    tried = ", ".join(f"{rate:g}: {loss:.3f}" for rate, loss in losses.items())
    console.print(f"{arm[0].critic}: learning rate {best:g} (held-out loss {tried})", highlight=False)
    return best


def _trial(
    rest: Sequence[CritiquedPair],
    held_out: Sequence[CritiquedPair],
    config: TrainConfig,
    *,
    rate: float,
    out: Path,
    max_length: int,
    console: Console,
) -> float:
    folder = out / f"learning-rate-{rate:g}"
    config = config.model_copy(update={"keep": "last"})
    facts = run_facts(config, seed=config.seeds[0], rate=rate, max_length=max_length)
    learnt = config.learns_scores_of(rest[0].critic)
    fingerprint = content_hash(
        facts, [item.content(with_scores=learnt) for item in rest], [item.content() for item in held_out]
    )
    marker = folder / "sweep"
    if not stage_is_done(marker, fingerprint):
        result = train_reward_model(
            rest,
            config,
            out=folder,
            seed=config.seeds[0],
            learning_rate=rate,
            max_length=max_length,
            console=console,
        )
        scores = RewardModel.load(result.folder).score(held_out)
        loss = held_out_loss(held_out, scores, config.margins)
        accuracy = sum(score.chosen > score.rejected for score in scores) / len(scores)
        mark_stage_done(marker, fingerprint, loss=loss, accuracy=accuracy, n_held_out=len(held_out), n_train=len(rest))
        # Without its weights the training is not done: another sweep over other held-out pairs has to train again.
        (folder / "done.json").unlink()
        shutil.rmtree(result.folder)
    return float(json.loads((marker / "done.json").read_text(encoding="utf-8"))["loss"])
