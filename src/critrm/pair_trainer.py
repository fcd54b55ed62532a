"""transformers' Trainer over packed rows, and how a run of it is set up (sections 3.2, 4.4)."""

import contextlib
import functools
import math
import os
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType
from rich.console import Console
from torch.nn import functional
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from critrm import models
from critrm.callbacks import RichProgress, TimedCheckpoints
from critrm.config import TrainConfig
from critrm.cores import GradientsInOrder, n_side_by_side, sharing_cores
from critrm.errors import ConfigError, ModelError
from critrm.losses import critique_loss, reward_losses
from critrm.reward_model import Reads, RewardModel
from critrm.training_data import EpochSampler, TrainingPair, TrainingPairs, collate
from critrm.types import NO_CRITIC

PAPER_STEPS = 155
"""Optimiser steps of the paper's runs; its 32 warm-up steps are a fifth of them."""
N_EVALUATIONS = 10
"""How often `keep: best` looks at the held-out pairs; once more after the last step."""
MODEL_INPUTS = ("input_ids", "position_ids", "score_positions", "groups")


class LanguageHead:
    """The backbone's own next-token head on the reward model's hidden states; no part of the model that is saved.

    With tied embeddings it is the input embedding, which then learns from both ends, as in pretraining. Otherwise it is
    the backbone's `lm_head`, which stays as it was: the gradient goes through it into the backbone.
    """

    def __init__(self, reward_model: RewardModel, backbone: str) -> None:
        """Args are the model that is trained, and the name of the language model that it was made from.

        Raises:
            ModelError: the language model's logits are not what is computed here.
        """
        model = reward_model.model
        config = model.config.get_text_config().to_dict()
        # Cohere multiplies its logits, Granite divides them, Gemma 2 bounds them; all say so in their config.
        self.scale = float(config.get("logit_scale") or 1.0) / float(config.get("logits_scaling") or 1.0)
        self.bound = float(config.get("final_logit_softcapping") or 0.0)
        self.tied = bool(config["tie_word_embeddings"])
        language_model: Any = models.load_causal_lm(backbone)
        own: Any = language_model.get_input_embeddings() if self.tied else language_model.get_output_embeddings()
        self.head = own.requires_grad_(False)
        self._compare(language_model, backbone)
        if self.tied:
            self.head = model.get_input_embeddings()
        self._kept = threading.local()  # several threads may each have read a row
        # A hook, since the classifier returns rewards only.
        model.base_model.register_forward_hook(self._keep_hidden)

    def _keep_hidden(self, module: torch.nn.Module, args: Any, output: Any) -> None:
        self._kept.hidden = output.last_hidden_state

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        head = self.head.to(hidden.device)
        hidden = hidden.to(head.weight.dtype)
        # An embedding is no linear map to call; a head of its own may have a bias.
        logits: torch.Tensor = functional.linear(hidden, head.weight) if self.tied else head(hidden)
        logits = logits * self.scale
        return self.bound * torch.tanh(logits / self.bound) if self.bound else logits

    @torch.no_grad()
    def _compare(self, language_model: Any, backbone: str) -> None:
        """Refuse a language model whose own logits on a few tokens are others than ours from its hidden states."""
        n_tokens = int(language_model.get_input_embeddings().weight.shape[0])
        ids = torch.tensor([[token % n_tokens for token in (5, 7, 11, 13, 17)]], device=language_model.device)
        expected = language_model(input_ids=ids, use_cache=False).logits
        found = self._logits(language_model.base_model(input_ids=ids, use_cache=False).last_hidden_state)
        # Not-a-number passes: where FSDP loads weights on one rank, the others have none yet.
        if expected.shape != found.shape or bool(((found - expected).abs() > 1e-4 * expected.abs().max()).any()):
            raise ModelError(
                f"{backbone}: {type(language_model).__name__} computes its logits in a way that critrm does not know, "
                "so critiques cannot be predicted as it predicts them. Train without lm_weight."
            )

    def losses(self, inputs: dict[str, Any]) -> torch.Tensor:
        """(n_pairs,) losses on the critique tokens of the row that the model has just read in this thread."""
        hidden = self._kept.hidden[0, inputs["critique_sources"]]
        del self._kept.hidden
        logits = self._logits(hidden)
        targets = inputs["input_ids"][0, inputs["critique_tokens"]]
        return critique_loss(logits, targets, inputs["critique_pairs"], n_pairs=len(inputs["margins"]))


class PairTrainer(Trainer):
    """transformers' Trainer with our losses over packed rows; everything else is the Trainer's."""

    def __init__(self, *, config: TrainConfig, language_head: LanguageHead | None = None, **kwargs: Any) -> None:
        """Takes what Trainer takes, what is minimised, and the head that predicts critiques if they are predicted."""
        super().__init__(**kwargs)
        self.config, self.language_head = config, language_head
        self.n_at_once = 1 if self._must_read_row_by_row() else n_side_by_side(self.args.device)
        self.data_collator = functools.partial(collate, n_at_once=self.n_at_once)
        # The loss below divides by the pairs of the whole optimiser step, so the Trainer must not divide again.
        self.model_accepts_loss_kwargs = True

    def _get_train_sampler(self, train_dataset: Any = None) -> EpochSampler:
        data: Any = self.train_dataset
        world = self.accelerator.num_processes
        multiple = self.args.per_device_train_batch_size * world if world > 1 else 1
        return EpochSampler(len(data), seed=self.args.seed, multiple=multiple)

    def _must_read_row_by_row(self) -> bool:
        """Other processes average each gradient as it comes; dropout draws from one generator, in a thread's order."""
        config = self.accelerator.unwrap_model(self.model).config.get_text_config().to_dict()
        drops = any("drop" in name and isinstance(value, float) and value > 0 for name, value in config.items())
        return drops or self.accelerator.distributed_type != DistributedType.NO

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: torch.device) -> torch.Tensor:
        """Pairs of the optimiser step per process: the processes' gradients then average to the mean over pairs."""
        rows = [row for batch in batch_samples for row in batch["rows"]]
        n_pairs = torch.stack([row["weights"].sum() for row in rows]).sum().to(device)
        gathered: torch.Tensor = self.accelerator.gather(n_pairs)
        mean: torch.Tensor = gathered.sum() / self.accelerator.num_processes
        return mean

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """What the Trainer keeps count of, for a pass."""
        return sum(super(PairTrainer, self).floating_point_ops(row) for row in inputs["rows"])

    def training_step(
        self, model: torch.nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Forward and backward of a pass's rows: as many at once as there are threads for (`critrm.cores`).

        The gradients, and the loss that is returned, are added up in the order of the rows.
        """
        read = functools.partial(super().training_step, model, num_items_in_batch=num_items_in_batch)
        rows = inputs["rows"]
        if len(rows) == 1:
            return read(rows[0])
        learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
        order = GradientsInOrder(learning, len(rows))

        def read_in_turn(number: int) -> torch.Tensor:
            with order.turn(number):
                return read(rows[number])

        with order.watching(), sharing_cores(min(self.n_at_once, len(rows))) as pool:
            return torch.stack(list(pool.map(read_in_turn, range(len(rows))))).sum()

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The mean loss over the pairs of the optimiser step, whatever the passes and processes it is split into."""
        rewards = model(**{name: inputs[name] for name in MODEL_INPUTS})
        losses = self._reward_losses(rewards, inputs)
        if self.language_head is not None:
            # accelerate computes the model's forward in bf16, and nothing else.
            with torch.autocast(rewards.device.type, dtype=torch.bfloat16, enabled=self.args.bf16):
                losses = losses + self.config.lm_weight * self.language_head.losses(inputs)
        weights = inputs["weights"]
        loss = (losses * weights).sum() / (weights.sum() if num_items_in_batch is None else num_items_in_batch)
        return (loss, rewards) if return_outputs else loss

    def _reward_losses(self, rewards: torch.Tensor, inputs: dict[str, Any]) -> torch.Tensor:
        config = self.config
        return reward_losses(
            rewards,
            inputs["margins"],
            inputs["scores"],
            loss=config.loss,
            center_weight=config.center_weight,
            score_weight=config.score_weight,
        )

    @torch.no_grad()
    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """The mean loss of the rewards over the held-out pairs; the critiques' words do not count, their scores do.

        Every process computes all of it: the pairs are few, and sharded models need all processes to take part.
        """
        data: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        n_pairs, per_pass, total = len(data), self.args.per_device_train_batch_size, 0.0
        self.model_wrapped.eval()
        for start in range(0, n_pairs, per_pass):
            pairs = [data[index] for index in range(start, min(start + per_pass, n_pairs))]
            for row in self._prepare_inputs(self.data_collator(pairs))["rows"]:
                rewards = self.model_wrapped(**{name: row[name] for name in MODEL_INPUTS})
                total += float(self._reward_losses(rewards, row).sum())
        self.model_wrapped.train()
        metrics = {f"{metric_key_prefix}_loss": total / n_pairs}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


def scaled_warmup(config: TrainConfig, n_steps: int) -> tuple[int, str]:
    """The warm-up steps, scaled down with the number of steps when there are fewer than in the paper, and a note.

    The learning rate of the first warm-up step is 0, so at least one step comes after the warm-up.
    """
    wanted = config.warmup_steps
    warmup = min(wanted, round(wanted * n_steps / PAPER_STEPS), n_steps - 1)
    if warmup == wanted:
        return warmup, ""
    steps = "is 1 step" if n_steps == 1 else f"are {n_steps} steps"
    fewer = f", not {PAPER_STEPS}" if n_steps < PAPER_STEPS else ""
    return warmup, f"warm-up scaled from {wanted} to {warmup} steps: there {steps}{fewer}"


def make_trainer(
    reward_model: RewardModel,
    config: TrainConfig,
    *,
    encoded: list[TrainingPair],
    held_out: list[TrainingPair],
    out: Path,
    seed: int,
    rate: float,
    console: Console | None,
) -> tuple[PairTrainer, str]:
    """Set up a run of section 4.4, and say in a note how its warm-up was scaled.

    Args:
        reward_model: what is trained.
        config: with what settings.
        encoded: the pairs to train on.
        held_out: the pairs by which the best weights are chosen; the last weights are kept when there are none.
        out: the run's folder.
        seed: of the order of pairs.
        rate: the maximum learning rate.
        console: gets the progress bar of the first process.

    Raises:
        ConfigError: the batch cannot be shared by the processes, or they hold shares of weights that must be whole.
    """
    n_steps = math.ceil(len(encoded) / config.batch_size) * config.n_epochs
    warmup, note = scaled_warmup(config, n_steps)
    best: dict[str, Any] = {}
    if held_out:
        best = {"eval_strategy": "steps", "eval_steps": math.ceil(n_steps / N_EVALUATIONS), "save_strategy": "best"}
        best |= {"load_best_model_at_end": True, "metric_for_best_model": "loss"}
    arguments = TrainingArguments(
        **_arguments(config, out=out) | best,
        learning_rate=rate,
        warmup_steps=warmup,
        seed=seed,
    )
    # transformers would split a packed row over the GPUs that one process sees; for several, launch several processes.
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1
    callbacks: list[TrainerCallback] = [TimedCheckpoints(config.checkpoint_minutes)]
    if console is not None and arguments.process_index == 0:
        callbacks.append(RichProgress(console, f"train {reward_model.critic}, seed {seed}, lr {rate:g}"))
    predicts = config.lm_weight and reward_model.critic != NO_CRITIC
    head = LanguageHead(reward_model, config.backbone) if predicts else None
    trainer = PairTrainer(
        config=config,
        language_head=head,
        model=_with_adapters(reward_model.model, config.lora_rank) if config.lora_rank else reward_model.model,
        args=arguments,
        train_dataset=TrainingPairs(encoded),
        eval_dataset=TrainingPairs(held_out) if held_out else None,
        callbacks=callbacks,
    )
    if config.load_in_4bit and _is_sharded(trainer):
        raise ConfigError(
            "load_in_4bit needs whole weights in every process: leave out FSDP or DeepSpeed, or the 4 bits"
        )
    if head and _is_sharded(trainer):
        raise ConfigError("lm_weight needs whole weights in every process: FSDP and DeepSpeed cannot train with it")
    trainer.remove_callback(PrinterCallback)  # the Trainer's stand-in for a progress bar; the log is in log.jsonl
    return trainer, note


def precision_of(config: TrainConfig) -> models.Precision:
    """What a run's products are computed in."""
    return models.choose_precision(models.choose_device()) if config.precision == "auto" else config.precision


def fresh_model(config: TrainConfig, reads: Reads, *, seed: int) -> RewardModel:
    """The backbone under a new head, before any training; in 4 bits where the config says so.

    Raises:
        ModelError: the backbone cannot be loaded, or bitsandbytes is not installed.
    """
    quantization = models.four_bits(precision_of(config)) if config.load_in_4bit else None
    return RewardModel.from_backbone(config.backbone, reads, seed=seed, quantization=quantization)


def _arguments(config: TrainConfig, *, out: Path) -> dict[str, Any]:
    device, precision = models.choose_device(), precision_of(config)
    n_processes = int(os.environ.get("WORLD_SIZE", "1"))  # what torchrun and accelerate set
    if config.batch_size % n_processes:
        raise ConfigError(f"batch_size {config.batch_size} cannot be shared evenly by {n_processes} processes")
    share = config.batch_size // n_processes
    # A divisor of the batch size, so that every optimiser step holds exactly `batch_size` pairs.
    per_pass = max(n for n in range(1, config.pairs_per_pass + 1) if share % n == 0)
    return {
        "output_dir": str(out / "checkpoints"),
        "per_device_train_batch_size": per_pass,
        "gradient_accumulation_steps": share // per_pass,
        "num_train_epochs": config.n_epochs,
        "lr_scheduler_type": "cosine_with_min_lr",
        "lr_scheduler_kwargs": {"min_lr_rate": config.min_learning_rate_share},
        "optim": "adamw_torch_fused",
        "weight_decay": 0.0,
        "bf16": precision == "bf16",
        "use_cpu": device == "cpu",
        "activation_checkpointing": config.gradient_checkpointing,  # transformers' newer name for it
        "activation_checkpointing_kwargs": {"use_reentrant": False},
        "ddp_find_unused_parameters": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "save_total_limit": 1,
        "report_to": list(config.report_to) or "none",
        "remove_unused_columns": False,
        "disable_tqdm": True,
        "dataloader_pin_memory": device != "cpu",
    }


def _is_sharded(trainer: PairTrainer) -> bool:
    return bool(trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled)


def whole_model(
    reward_model: RewardModel, trainer: PairTrainer, *, config: TrainConfig, out: Path, seed: int
) -> RewardModel:
    """The trained model in one piece: gathered where it was sharded, adapters merged; only process 0 gets it.

    Adapters that were trained on 4 bits are merged into what these 4 bits stand for.
    """
    model: Any = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    if _is_sharded(trainer):
        weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)  # takes all processes
        if not trainer.is_world_process_zero():
            return reward_model
        reward_model = fresh_model(config, reward_model.reads, seed=seed)
        model = _with_adapters(reward_model.model, config.lora_rank) if config.lora_rank else reward_model.model
        model.load_state_dict(weights)
    if config.lora_rank and trainer.is_world_process_zero():
        from peft import PeftModel

        model.save_pretrained(out / "adapter")
        if config.load_in_4bit:
            reward_model = fresh_model(config, reward_model.reads, seed=seed)
            with models.quiet():
                reward_model.model.dequantize(torch.float32)  # type: ignore[no-untyped-call]
            with _peft():
                model = PeftModel.from_pretrained(reward_model.model, out / "adapter")
        reward_model.model = model.merge_and_unload()
    return reward_model


def _with_adapters(model: Any, rank: int) -> Any:
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", modules_to_save=["score"])
    with _peft():
        return get_peft_model(model, lora)


@contextlib.contextmanager
def _peft() -> Iterator[None]:
    with warnings.catch_warnings():
        # peft still asks for an attribute by a name that transformers has deprecated.
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        yield
