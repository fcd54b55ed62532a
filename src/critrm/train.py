"""Stage 3: the ranking loss with margin, on transformers' Trainer (sections 3.2 and 4.4)."""

import contextlib
import json
import logging
import math
import re
import shutil
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.nn import functional
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from critrm import models
from critrm.batching import EncodedPair, pack
from critrm.config import TrainConfig
from critrm.errors import DataError, StorageError
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


def ranking_loss(rewards: torch.Tensor, margins: torch.Tensor) -> torch.Tensor:
    """Equations 1 and 2 per pair: -log sigmoid(chosen - rejected - margin).

    Args:
        rewards: (n_pairs, 2), chosen first.
        margins: (n_pairs,).

    Returns:
        (n_pairs,) losses.
    """
    return -functional.logsigmoid(rewards[:, 0] - rewards[:, 1] - margins)


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


@contextlib.contextmanager
def full_disk(out: Path) -> Iterator[None]:
    """Say in one line that weights or a checkpoint could not be written, and that nothing before is lost."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        # torch's writer has no error class of its own.
        if isinstance(error, RuntimeError) and not re.search("PytorchStreamWriter|unexpected pos", str(error)):
            raise
        reason = str(error).splitlines()[0]
        raise StorageError(
            f"{out}: cannot write weights ({reason}). Free space and run the same command again; "
            "it goes on from the last complete checkpoint."
        ) from error


def _trainer(
    reward_model: RewardModel,
    encoded: list[EncodedPair],
    config: TrainConfig,
    *,
    out: Path,
    seed: int,
    rate: float,
    console: Console | None,
) -> tuple["PairTrainer", tuple[str, ...]]:
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
        model=model, args=arguments, train_dataset=_Pairs(encoded), data_collator=collate, callbacks=callbacks
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


def collate(pairs: list[EncodedPair]) -> dict[str, Any]:
    """One packed row of several pairs, as the Trainer passes it to the model."""
    batch = pack(pairs)
    return {
        name: getattr(batch, name) for name in ("input_ids", "position_ids", "score_positions", "groups", "margins")
    }


class _Pairs(torch.utils.data.Dataset[EncodedPair]):
    def __init__(self, pairs: list[EncodedPair]) -> None:
        self.pairs = pairs

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> EncodedPair:
        return self.pairs[index]


class PairTrainer(Trainer):
    """transformers' Trainer with the ranking loss over packed rows; everything else is the Trainer's."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Takes what Trainer takes."""
        super().__init__(*args, **kwargs)
        # The loss below divides by the pairs of the whole optimiser step, so the Trainer must not divide again.
        self.model_accepts_loss_kwargs = True

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: torch.device) -> torch.Tensor:
        n_pairs = torch.tensor(sum(len(batch["margins"]) for batch in batch_samples), device=device)
        gathered: torch.Tensor = self.accelerator.gather(n_pairs)
        mean: torch.Tensor = gathered.sum() / self.accelerator.num_processes
        return mean

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The mean ranking loss over the pairs of the optimiser step, whatever the passes it is split into."""
        margins = inputs.pop("margins")
        rewards = model(**inputs)
        losses = ranking_loss(rewards, margins)
        loss = losses.sum() / (len(margins) if num_items_in_batch is None else num_items_in_batch)
        return (loss, rewards) if return_outputs else loss


class TimedCheckpoints(TrainerCallback):
    """Saves a checkpoint whenever enough time has passed: a kill costs minutes, whatever the model's size."""

    def __init__(self, minutes: float) -> None:
        """Args are the least minutes between two checkpoints."""
        self.seconds, self.saved = minutes * 60, time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Ask the Trainer for a checkpoint when it is time."""
        if time.monotonic() - self.saved >= self.seconds and state.global_step < state.max_steps:
            control.should_save = True
            self.saved = time.monotonic()


class RichProgress(TrainerCallback):
    """A progress bar with the time left and the running loss."""

    def __init__(self, console: Console, title: str) -> None:
        """Args are where to show it, and its title."""
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[loss]}"),
            console=console,
        )
        self.task = self.bar.add_task(title, total=None, loss="")

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Show the bar, from where a resumed run goes on."""
        self.bar.update(self.task, total=state.max_steps, completed=state.global_step)
        self.bar.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Advance."""
        self.bar.update(self.task, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        """Show the loss."""
        if logs and "loss" in logs:
            self.bar.update(self.task, loss=f"loss {float(logs['loss']):.3f}")

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Leave the finished bar on the screen."""
        self.bar.stop()


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
