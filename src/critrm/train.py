"""Stage 3: the ranking loss with margin, on transformers' Trainer (sections 3.2 and 4.4)."""

import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ValidationError
from rich.console import Console

from critrm import models
from critrm.callbacks import failure_advice
from critrm.config import TrainConfig
from critrm.errors import ConfigError, DataError
from critrm.frozen_head import frozen_head
from critrm.losses import ranking_loss
from critrm.pair_trainer import PairTrainer, fresh_model, make_trainer, whole_model
from critrm.readings import Readings
from critrm.reward_model import Reads, RewardModel
from critrm.store import content_hash, mark_stage_done, read_records, stage_is_done, write_manifest, write_records
from critrm.training_data import ScoreScale, TrainingPair, drop_critiques, encode_pairs, margin_of
from critrm.types import CritiquedPair, Score
from critrm.zero_label import CUE, reading_direction


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainResult:
    """Where a trained reward model lies, and how it got there."""

    folder: Path
    """The model's folder."""
    n_pairs: int
    n_tokens: int
    """Tokens the backbone read, over all epochs."""
    seconds: float
    loss: float
    """Mean loss over the training steps; of a head fitted to a frozen backbone, over pairs left out of the fit."""
    notes: tuple[str, ...]


def run_facts(config: TrainConfig, *, seed: int, rate: float, max_length: int) -> dict[str, Any]:
    """What, with the pairs, decides a run's weights; the rest of the config is about speed, or about other runs."""
    others = {"learning_rates", "seeds", "n_held_out", "n_sweep", "pairs_per_pass", "checkpoint_minutes", "report_to"}
    facts = config.model_dump(exclude=others | {"gradient_checkpointing"})
    # Settings that came later are no facts of a run without them: what was finished before they existed stays finished.
    for later in (
        "loss",
        "center_weight",
        "lm_weight",
        "score_weight",
        "critique_dropout",
        "critique_first",
        "keep",
        "frozen",
        "load_in_4bit",
    ):
        if facts[later] == TrainConfig.model_fields[later].default:
            del facts[later]
    return facts | {"seed": seed, "learning_rate": rate, "max_length": max_length}


def train_reward_model(
    pairs: Sequence[CritiquedPair],
    config: TrainConfig,
    *,
    out: str | Path,
    held_out: Sequence[CritiquedPair] = (),
    seed: int = 0,
    learning_rate: float | None = None,
    max_length: int = 2048,
    readings: str | Path | None = None,
    console: Console | None = None,
) -> TrainResult:
    """Train one reward model on one arm; resumes from its last checkpoint, and does nothing when it is finished.

    Under `torchrun` or `accelerate launch` every process calls it; the first one shows progress and writes.

    Args:
        pairs: critiqued pairs of one critic (or of none).
        config: section 4.4's settings.
        out: the run's folder; the model goes into `out/model`.
        held_out: pairs of the same arm, for `keep: best` only.
        seed: of the head, the order of pairs and everything else that is drawn.
        learning_rate: its maximum; the first of the config's when None.
        max_length: tokens of prompt + completion + critique that are read.
        readings: folder that keeps what a frozen backbone reads, for other runs; until this run is finished when None.
        console: gets the progress bar; none is shown when None.

    Raises:
        DataError: no pairs, or pairs of several critics.
        ConfigError: settings that do not go together, or with these pairs.
        ModelError: the backbone cannot be loaded, or memory runs out.
        StorageError: the disk is full.
    """
    out, started = Path(out).absolute(), time.time()
    _check(pairs, held_out, config)
    rate = config.learning_rates[0] if learning_rate is None else learning_rate
    facts = run_facts(config, seed=seed, rate=rate, max_length=max_length)
    parts = (pairs, held_out) if config.keep == "best" else (pairs,)
    with_scores = config.learns_scores_of(pairs[0].critic)
    fingerprint = content_hash(facts, *([item.content(with_scores=with_scores) for item in part] for part in parts))
    if stage_is_done(out, fingerprint):
        return _read_result(out)

    scale = ScoreScale.of(pairs) if with_scores else None
    reads = Reads(
        critic=pairs[0].critic,
        max_length=max_length,
        backbone=config.backbone,
        critique_dropout=config.critique_dropout,
        critique_first=config.critique_first,
        cue=CUE if config.frozen else "",
    )
    # Loaded and let go before the model that is trained, which takes as much memory.
    direction = reading_direction(config.backbone) if config.frozen else None
    with failure_advice(out):
        reward_model = fresh_model(config, reads, seed=seed)
        arm = drop_critiques(pairs, config.critique_dropout, seed=seed)
        encoded, n_cut = encode_pairs(arm, reward_model, config=config, score_scale=scale)
        if direction is not None:
            kept = Readings(readings or out / "checkpoints")
            outcome = _fit(reward_model, config, encoded, direction, out=out, seed=seed, readings=kept, console=console)
        else:
            left_out = held_out if config.keep == "best" else ()
            tested, _ = encode_pairs(left_out, reward_model, config=config, score_scale=scale)
            trainer, note = make_trainer(
                reward_model, config, encoded=encoded, held_out=tested, out=out, seed=seed, rate=rate, console=console
            )
            outcome = _train(trainer, reward_model, config, out=out, seed=seed, owner=fingerprint, note=note)
    result = TrainResult(
        folder=out / "model",
        n_pairs=len(pairs),
        n_tokens=sum(pair.encoded.n_tokens for pair in encoded) * config.n_epochs,
        seconds=round(time.time() - started, 1),
        loss=outcome.loss,
        notes=tuple(filter(None, (outcome.note, *_data_notes(encoded, n_cut, config, max_length=max_length)))),
    )
    if outcome.writes:
        _finish(out, outcome, result, facts, fingerprint, started)
    outcome.wait()  # so that each process may load the model now
    return result


@dataclass(frozen=True, slots=True, kw_only=True)
class _Outcome:
    """A trained model that is not on disk yet."""

    reward_model: RewardModel
    loss: float
    note: str
    log: Sequence[Mapping[str, Any]]
    writes: bool = True
    """Whether this process is the one that writes."""
    wait: Callable[[], None] = lambda: None
    """Returns when all processes are here."""


def _train(
    trainer: PairTrainer, reward_model: RewardModel, config: TrainConfig, *, out: Path, seed: int, owner: str, note: str
) -> _Outcome:
    with trainer.accelerator.main_process_first():
        _forget_last_result(out)
        checkpoint = _last_checkpoint(out, owner)
    with models.quiet():
        loss = float(trainer.train(resume_from_checkpoint=checkpoint).training_loss)
        reward_model = whole_model(reward_model, trainer, config=config, out=out, seed=seed)
    log, writes = trainer.state.log_history, trainer.is_world_process_zero()
    wait = trainer.accelerator.wait_for_everyone
    return _Outcome(reward_model=reward_model, loss=loss, note=note, log=log, writes=writes, wait=wait)


def _fit(
    reward_model: RewardModel,
    config: TrainConfig,
    encoded: Sequence[TrainingPair],
    direction: torch.Tensor,
    *,
    out: Path,
    seed: int,
    readings: Readings,
    console: Console | None,
) -> _Outcome:
    _forget_last_result(out)
    how: dict[str, Any] = {"readings": readings, "seed": seed, "precision": config.precision, "console": console}
    fit = frozen_head(reward_model, encoded, direction=direction, score_weight=config.score_weight, **how)
    held_out = f"{fit.held_out_accuracy:.3f} of the pairs left out of a fit were ranked right"
    start = "" if direction.any() else ", no reading of its own to start from"
    note = f"the backbone stayed as it was{start}; ridge {fit.strength:g} by cross-validation, {held_out}"
    log = [{"ridge": fit.strength, "held_out_loss": fit.held_out_loss, "held_out_accuracy": fit.held_out_accuracy}]
    return _Outcome(reward_model=reward_model, loss=fit.held_out_loss, note=note, log=log)


def _check(pairs: Sequence[CritiquedPair], held_out: Sequence[CritiquedPair], config: TrainConfig) -> None:
    critics = {item.critic for item in (*pairs, *held_out)}
    if len(critics) != 1 or not pairs:
        raise DataError(f"training needs pairs of one arm, got {sorted(critics) or 'none'}", field="critic")
    if config.frozen and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("a frozen backbone is read by one process: start it without torchrun or accelerate launch")
    if config.keep == "best" and not held_out:
        raise ConfigError("keep: best needs held-out pairs to choose by")
    if config.loss == "scaled" and not any(margin_of(item, config.margins) for item in pairs):
        raise ConfigError("loss: scaled multiplies by the margin, and no pair has a rating or a margin")
    chosen_by = held_out if config.keep == "best" else ()
    if config.loss == "scaled" and chosen_by and not any(margin_of(item, config.margins) for item in chosen_by):
        raise ConfigError(
            "keep: best chooses by the loss on the held-out pairs, and loss: scaled is 0 on all of them: none has a "
            "rating or a margin. Give held-out pairs with ratings, or keep: last"
        )


def _data_notes(
    encoded: Sequence[TrainingPair], n_cut: Mapping[str, int], config: TrainConfig, *, max_length: int
) -> list[str]:
    notes, n_unrated = [], sum(not pair.encoded.margin for pair in encoded)
    if config.margins is not None and n_unrated == len(encoded):
        notes.append("no margin: the pairs carry no ratings")
    elif config.loss == "scaled" and n_unrated:
        notes.append(f"{n_unrated} of {len(encoded)} pairs have no rating: the scaled loss takes no notice of them")
    if any(n_cut.values()):
        counts = ", ".join(f"the {name} of {n}" for name, n in n_cut.items() if n)
        notes.append(f"cut to {max_length} tokens: {counts} of {len(encoded)} pairs")
    return notes


def _forget_last_result(out: Path) -> None:
    """Before `model` is overwritten: a run of other settings is done no more, and has left no adapter of this one."""
    (out / "done.json").unlink(missing_ok=True)
    shutil.rmtree(out / "adapter", ignore_errors=True)


def _last_checkpoint(out: Path, fingerprint: str) -> str | None:
    """The newest complete checkpoint of this very run; those of another configuration are removed."""
    folder, owner = out / "checkpoints", out / "checkpoints" / "owner.txt"
    if not owner.is_file() or owner.read_text(encoding="utf-8") != fingerprint:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        owner.write_text(fingerprint, encoding="utf-8")
    # The Trainer writes its state last, so a checkpoint torn by a kill has none.
    complete = [path.parent for path in folder.glob("checkpoint-*/trainer_state.json")]
    newest = max(complete, key=lambda path: int(path.name.rpartition("-")[2]), default=None)
    return str(newest) if newest else None


def _finish(
    out: Path, outcome: _Outcome, result: TrainResult, facts: dict[str, Any], fingerprint: str, started: float
) -> None:
    with failure_advice(out):
        outcome.reward_model.save(out / "model")
    write_records(out / "log.jsonl", outcome.log)
    write_manifest(out, config=facts, started=started, seeds=[facts["seed"]], notes=result.notes)
    write_records(out / "result.jsonl", [asdict(result) | {"folder": str(result.folder)}])
    mark_stage_done(out, fingerprint)
    shutil.rmtree(out / "checkpoints", ignore_errors=True)


def _read_result(out: Path) -> TrainResult:
    row = json.loads((out / "result.jsonl").read_text(encoding="utf-8"))
    return TrainResult(**row | {"folder": out / "model", "notes": tuple(row["notes"])})


def held_out_loss(
    pairs: Sequence[CritiquedPair], scores: Sequence[Score], margins: Mapping[str, float] | None
) -> float:
    """Mean ranking loss of scored pairs; what the learning rate is chosen by."""
    rewards = torch.tensor([[score.chosen, score.rejected] for score in scores])
    return float(ranking_loss(rewards, torch.tensor([margin_of(item, margins) for item in pairs])).mean())


def command(
    arm: Path,
    *,
    backbone: str,
    out: Path,
    held_out: Path | None = None,
    seed: int = 0,
    learning_rate: float = 8e-5,
    batch_size: int = 32,
    n_epochs: int = 1,
    max_length: int = 2048,
    margin: bool = True,
    loss: Literal["ranking", "scaled"] = "ranking",
    center_weight: float = 0.0,
    lm_weight: float = 0.0,
    score_weight: float = 0.0,
    critique_dropout: float = 0.0,
    critique_first: bool = False,
    keep: Literal["last", "best"] = "last",
    frozen: bool = False,
    lora_rank: int = 0,
    load_in_4bit: bool = False,
    precision: Literal["auto", "fp32", "bf16"] = "auto",
    pairs_per_pass: int = 8,
    gradient_checkpointing: bool = False,
    checkpoint_minutes: float = 5.0,
    report_to: tuple[str, ...] = (),
) -> None:
    """Train a reward model on one arm; the same command resumes an interrupted run.

    Args:
        arm: critiqued pairs that `critrm augment` wrote.
        backbone: the pretrained model: hub id, folder, or `embedded:NAME`.
        out: folder of the run; the model goes into its `model`.
        held_out: more pairs of the same arm, by which `--keep best` chooses.
        seed: of everything that is drawn.
        learning_rate: the maximum learning rate.
        batch_size: pairs per optimiser step, over all processes.
        n_epochs: passes over the pairs.
        max_length: tokens of prompt + completion + critique that are read.
        margin: use the ratings' margins of equations 1 and 2, where the pairs have ratings.
        loss: subtract the margin from the difference (ranking, the paper's), or multiply the loss by it (scaled).
        center_weight: weight of (chosen + rejected)^2.
        lm_weight: weight of a language-model loss on the critiques.
        score_weight: weight of the distance to the critic's own scores, where the critiques carry them.
        critique_dropout: share of the pairs that are read without their critiques.
        critique_first: read the critique before the completion, not behind it as the paper does.
        keep: the last weights, or the best on the held-out pairs.
        frozen: leave the backbone as it is, and fit a head to what it says of each pair: minutes instead of hours.
        lora_rank: train adapters of this rank and the head instead of all parameters.
        load_in_4bit: hold the backbone in 4 bits under the adapters (QLoRA): less memory.
        precision: fp32, bf16 or auto.
        pairs_per_pass: pairs computed at once; memory grows with it, the result does not depend on it.
        gradient_checkpointing: keep fewer activations: less memory, slower, the same result.
        checkpoint_minutes: least minutes between two checkpoints.
        report_to: the Trainer's loggers, such as tensorboard or wandb.
    """
    settings: dict[str, Any] = {} if margin else {"margins": None}
    try:
        config = TrainConfig(
            backbone=backbone,
            learning_rates=(learning_rate,),
            batch_size=batch_size,
            n_epochs=n_epochs,
            loss=loss,
            center_weight=center_weight,
            lm_weight=lm_weight,
            score_weight=score_weight,
            critique_dropout=critique_dropout,
            critique_first=critique_first,
            keep=keep,
            frozen=frozen,
            lora_rank=lora_rank,
            load_in_4bit=load_in_4bit,
            precision=precision,
            pairs_per_pass=pairs_per_pass,
            gradient_checkpointing=gradient_checkpointing,
            checkpoint_minutes=checkpoint_minutes,
            report_to=report_to,
            **settings,
        )
    except ValidationError as error:
        problems = (f"{'.'.join(map(str, found['loc'])) or 'train'}: {found['msg']}" for found in error.errors())
        raise ConfigError("; ".join(problems)) from None
    console = Console(quiet=os.environ.get("RANK", "0") != "0")  # of several processes, the first one speaks
    logging.getLogger("transformers").setLevel(logging.ERROR)
    pairs = read_records(arm, CritiquedPair)
    tests = read_records(held_out, CritiquedPair) if held_out else []
    result = train_reward_model(
        pairs, config, out=out, held_out=tests, seed=seed, max_length=max_length, console=console
    )
    for note in result.notes:
        console.print(f"[yellow]Note:[/] {note}")
    console.print(
        f"{result.n_pairs} pairs, {result.n_tokens} tokens, {result.seconds:.0f} s, mean loss {result.loss:.3f}"
    )
    console.print(f"Reward model: {result.folder}", soft_wrap=True)
