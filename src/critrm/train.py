"""Stage 3: the ranking loss with margin, on transformers' Trainer (sections 3.2 and 4.4)."""

import json
import logging
import math
import shutil
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import PrinterCallback, TrainerCallback, TrainingArguments

from critrm import models
from critrm.batching import EncodedPair
from critrm.config import TrainConfig
from critrm.errors import DataError
from critrm.pair_trainer import (
    EncodedPairs,
    PairTrainer,
    RichProgress,
    TimedCheckpoints,
    collate,
    full_disk,
    ranking_loss,
)
from critrm.reward_model import Reads, RewardModel
from critrm.store import (
    content_hash,
    mark_stage_done,
    read_records,
    stage_is_done,
    write_manifest,
    write_records,
)
from critrm.types import CritiquedPair, Score

PAPER_STEPS = 155
"""Optimiser steps of the paper's runs; its 32 warm-up steps are a fifth of them."""


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
    """Mean ranking loss over the training steps."""
    notes: tuple[str, ...]


def margin_of(item: CritiquedPair, margins: Mapping[str, float] | None) -> float:
    """m(r): the pair's own margin, else that of its rating, else 0; 0 when margins are off."""
    if margins is None:
        return 0.0
    if item.pair.margin is not None:
        return item.pair.margin
    return margins.get(item.pair.rating, 0.0) if item.pair.rating else 0.0


def scaled_warmup(config: TrainConfig, n_steps: int) -> tuple[int, str]:
    """The warm-up steps, scaled down with the number of steps when there are fewer than in the paper, and a note."""
    if n_steps >= PAPER_STEPS or config.warmup_steps == 0:
        return config.warmup_steps, ""
    warmup = min(config.warmup_steps, max(1, round(config.warmup_steps * n_steps / PAPER_STEPS)))
    return (
        warmup,
        f"warm-up scaled from {config.warmup_steps} to {warmup} steps: there are {n_steps} steps, not {PAPER_STEPS}",
    )


def run_facts(config: TrainConfig, *, seed: int, rate: float, max_length: int) -> dict[str, Any]:
    """What, with the pairs, decides a run's weights; the rest of the config is about speed, or about other runs."""
    others = {"learning_rates", "seeds", "n_held_out", "n_sweep", "pairs_per_pass", "checkpoint_minutes", "report_to"}
    return config.model_dump(exclude=others) | {"seed": seed, "learning_rate": rate, "max_length": max_length}


def train_reward_model(
    pairs: Sequence[CritiquedPair],
    config: TrainConfig,
    *,
    out: str | Path,
    seed: int = 0,
    learning_rate: float | None = None,
    max_length: int = 2048,
    console: Console | None = None,
) -> TrainResult:
    """Train one reward model on one arm; resumes from its last checkpoint, and does nothing when it is finished.

    Args:
        pairs: critiqued pairs of one critic (or of none).
        config: section 4.4's settings.
        out: the run's folder; the model goes into `out/model`.
        seed: of the head, the order of pairs and everything else that is drawn.
        learning_rate: its maximum; the first of the config's when None.
        max_length: tokens of prompt + completion + critique that are read.
        console: gets the progress bar; none is shown when None.

    Raises:
        DataError: no pairs, or pairs of several critics.
        ModelError: the backbone cannot be loaded.
    """
    out, started = Path(out), time.time()
    critics = {item.critic for item in pairs}
    if len(critics) != 1:
        raise DataError(f"training needs pairs of one arm, got {sorted(critics) or 'none'}", field="critic")
    rate = config.learning_rates[0] if learning_rate is None else learning_rate
    facts = run_facts(config, seed=seed, rate=rate, max_length=max_length)
    fingerprint = content_hash(facts, [asdict(item) for item in pairs])
    if stage_is_done(out, fingerprint):
        return _read_result(out)

    reads = Reads(critic=pairs[0].critic, max_length=max_length, backbone=config.backbone)
    reward_model = RewardModel.from_backbone(config.backbone, reads, seed=seed)
    encoded = [reward_model.encode(item, margin=margin_of(item, config.margins)) for item in pairs]
    trainer, notes = _trainer(reward_model, encoded, config, out=out, seed=seed, rate=rate, console=console)
    if not any(pair.margin for pair in encoded) and config.margins is not None:
        notes = (*notes, "no margin: the pairs carry no ratings")
    checkpoint = _last_checkpoint(out, fingerprint)
    with full_disk(out), models.quiet():
        outcome = trainer.train(resume_from_checkpoint=checkpoint)
    if config.lora_rank:
        adapted: Any = trainer.model
        adapted.save_pretrained(out / "adapter")
        reward_model.model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False).merge_and_unload()
    result = TrainResult(
        folder=out / "model",
        n_pairs=len(pairs),
        n_tokens=sum(pair.n_tokens for pair in encoded) * config.n_epochs,
        seconds=round(time.time() - started, 1),
        loss=float(outcome.training_loss),
        notes=notes,
    )
    _finish(out, reward_model, trainer, result, facts, fingerprint, started)
    return result


def _trainer(
    reward_model: RewardModel,
    encoded: list[EncodedPair],
    config: TrainConfig,
    *,
    out: Path,
    seed: int,
    rate: float,
    console: Console | None,
) -> tuple[PairTrainer, tuple[str, ...]]:
    device = models.choose_device()
    precision = models.choose_precision(device) if config.precision == "auto" else config.precision
    # A divisor of the batch size, so that every optimiser step holds exactly `batch_size` pairs.
    per_pass = max(n for n in range(1, config.pairs_per_pass + 1) if config.batch_size % n == 0)
    n_steps = math.ceil(len(encoded) / config.batch_size) * config.n_epochs
    warmup, note = scaled_warmup(config, n_steps)
    arguments = TrainingArguments(
        output_dir=str(out / "checkpoints"),
        per_device_train_batch_size=per_pass,
        gradient_accumulation_steps=config.batch_size // per_pass,
        num_train_epochs=config.n_epochs,
        learning_rate=rate,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": config.min_learning_rate_share},
        warmup_steps=warmup,
        optim="adamw_torch",
        weight_decay=0.0,
        seed=seed,
        bf16=precision == "bf16",
        use_cpu=device == "cpu",
        logging_steps=1,
        save_strategy="no",
        save_total_limit=1,
        report_to=list(config.report_to) or "none",
        remove_unused_columns=False,
        disable_tqdm=True,
        dataloader_pin_memory=device != "cpu",
    )
    callbacks: list[TrainerCallback] = [TimedCheckpoints(config.checkpoint_minutes)]
    if console is not None:
        callbacks.append(RichProgress(console, f"train {reward_model.critic}, seed {seed}, lr {rate:g}"))
    model = _with_adapters(reward_model.model, config.lora_rank) if config.lora_rank else reward_model.model
    trainer = PairTrainer(
        model=model, args=arguments, train_dataset=EncodedPairs(encoded), data_collator=collate, callbacks=callbacks
    )
    trainer.remove_callback(PrinterCallback)  # the Trainer's stand-in for a progress bar; the log is in log.jsonl
    return trainer, (note,) if note else ()


def _with_adapters(model: Any, rank: int) -> Any:
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", modules_to_save=["score"])
    with warnings.catch_warnings():
        # peft still asks for an attribute by a name that transformers has deprecated.
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        return get_peft_model(model, lora)


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
    out: Path,
    reward_model: RewardModel,
    trainer: PairTrainer,
    result: TrainResult,
    facts: dict[str, Any],
    fingerprint: str,
    started: float,
) -> None:
    if not trainer.is_world_process_zero():
        return
    with full_disk(out):
        reward_model.save(out / "model")
    write_records(out / "log.jsonl", trainer.state.log_history)
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
    seed: int = 0,
    learning_rate: float = 8e-5,
    batch_size: int = 32,
    n_epochs: int = 1,
    max_length: int = 2048,
    margin: bool = True,
    lora_rank: int = 0,
    precision: str = "auto",
    checkpoint_minutes: float = 5.0,
    report_to: tuple[str, ...] = (),
) -> None:
    """Train a reward model on one arm; the same command resumes an interrupted run.

    Args:
        arm: critiqued pairs that `critrm augment` wrote.
        backbone: the pretrained model: hub id, folder, or `embedded:NAME`.
        out: folder of the run; the model goes into its `model`.
        seed: of everything that is drawn.
        learning_rate: the maximum learning rate.
        batch_size: pairs per optimiser step.
        n_epochs: passes over the pairs.
        max_length: tokens of prompt + completion + critique that are read.
        margin: use the ratings' margins of equations 1 and 2, where the pairs have ratings.
        lora_rank: train adapters of this rank and the head instead of all parameters.
        precision: fp32, bf16 or auto.
        checkpoint_minutes: least minutes between two checkpoints.
        report_to: the Trainer's loggers, such as tensorboard or wandb.
    """
    settings: dict[str, Any] = {
        "backbone": backbone,
        "learning_rates": (learning_rate,),
        "batch_size": batch_size,
        "n_epochs": n_epochs,
        "lora_rank": lora_rank,
        "precision": precision,
        "checkpoint_minutes": checkpoint_minutes,
        "report_to": report_to,
    }
    config = TrainConfig(**settings if margin else settings | {"margins": None})
    console = Console()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    pairs = read_records(arm, CritiquedPair)
    result = train_reward_model(pairs, config, out=out, seed=seed, max_length=max_length, console=console)
    for note in result.notes:
        console.print(f"[yellow]Note:[/] {note}")
    console.print(
        f"{result.n_pairs} pairs, {result.n_tokens} tokens, {result.seconds:.0f} s, mean loss {result.loss:.3f}"
    )
    console.print(f"Reward model: {result.folder}", soft_wrap=True)
