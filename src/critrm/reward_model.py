"""A backbone with a scalar head: load, score, save (section 3.2).

The model on disk is a plain `AutoModelForSequenceClassification` with one label in safetensors, beside its tokenizer
and `critrm.json`, which says what it reads (which critic's critiques, how many tokens). Any tool that loads
transformers classifiers loads it.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MethodType
from typing import Any, Self

import torch
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from critrm import models
from critrm.attention import PACKED_ATTENTION, Group
from critrm.augment import Budget, text_encoder
from critrm.batching import EncodedPair, PackedBatch, encode_pair, pack, token_batches
from critrm.errors import DataError, ModelError
from critrm.store import content_hash, from_json, write_text
from critrm.types import NO_CRITIC, CritiquedPair, Score


@dataclass(frozen=True, slots=True, kw_only=True)
class Reads:
    """What a reward model was trained to read; `critrm.json` beside its weights."""

    critic: str = NO_CRITIC
    max_length: int = 2048
    backbone: str = ""


class RewardModel:
    """Scores critiqued pairs; wraps a transformers classifier with one label."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, reads: Reads, *, name: str) -> None:
        """Args are a loaded classifier whose attention is packed (`load` or `from_backbone`), and what it reads."""
        self.model, self.tokenizer, self.reads, self.name = model, tokenizer, reads, name
        self._encode = text_encoder(tokenizer)
        self._bos = [tokenizer.bos_token_id] if _adds_bos(tokenizer) else []

    @classmethod
    def load(cls, folder: str | Path, *, device: str | None = None, precision: str = "auto") -> Self:
        """Load a trained reward model.

        Args:
            folder: a folder that `critrm train` wrote, a run's model folder, or a hub id of any one-label classifier.
            device: `cpu`, `cuda`, ...; the best there is when None.
            precision: `fp32`, `bf16`, or `auto` (bf16 where the hardware computes in it).

        Raises:
            ModelError: there is no model, or it has more than one label.
        """
        path = Path(folder)
        facts = path / "critrm.json"
        reads = from_json(Reads, json.loads(facts.read_text(encoding="utf-8"))) if facts.is_file() else Reads()
        model, tokenizer = _load_classifier(str(folder))
        loaded = cls(model, tokenizer, reads, name=str(folder))
        device = device or models.choose_device()
        loaded.precision = models.choose_precision(device) if precision == "auto" else precision
        loaded.model.train(False)
        torch.nn.Module.to(loaded.model, device)  # transformers' own `to` is not typed
        return loaded

    @classmethod
    def from_backbone(cls, backbone: str, reads: Reads, *, seed: int) -> Self:
        """Put a new scalar head on a pretrained language model; the head is drawn with `seed` (section 3.2)."""
        torch.manual_seed(seed)
        model, tokenizer = _load_classifier(str(models.resolve(backbone)), new_head=True)
        return cls(model, tokenizer, reads, name=backbone)

    precision: str = "fp32"

    @property
    def critic(self) -> str:
        """The critic whose critiques it was trained on; `none` for the No-Critiques arm."""
        return self.reads.critic

    @property
    def fingerprint(self) -> str:
        """A hash of the weights' sums and of what it reads: two models with one fingerprint give the same scores."""
        sums = [float(parameter.detach().double().sum()) for parameter in self.model.parameters()]
        return content_hash(asdict(self.reads), sums, self.precision)

    def encode(self, item: CritiquedPair, *, margin: float = 0.0) -> EncodedPair:
        """Tokenize one pair as this model reads it."""
        budget = Budget(self.reads.max_length)
        return encode_pair(item, self._encode, bos=self._bos, budget=budget, margin=margin)

    @torch.inference_mode()
    def score(
        self,
        pairs: Iterable[CritiquedPair],
        *,
        max_tokens_per_step: int = 4096,
        on_progress: Callable[[int], None] | None = None,
    ) -> list[Score]:
        """Reward both completions of each pair.

        Args:
            pairs: critiqued pairs; with empty critiques for a model of the No-Critiques arm.
            max_tokens_per_step: how many tokens are computed at once; does not change the scores.
            on_progress: called with the number of pairs done in each step.

        Returns:
            One score per pair, in the given order.
        """
        self.model.train(False)
        scores: dict[str, Score | None] = {}

        def encoded() -> Iterable[EncodedPair]:
            for item in pairs:
                if item.pair.id in scores:
                    raise DataError("two pairs have this id; ids must be unique", field=f"id {item.pair.id}")
                scores[item.pair.id] = None  # keeps the given order
                yield self.encode(item)

        for batch in token_batches(encoded(), max_tokens_per_step=max_tokens_per_step):
            rewards = self.rewards(pack(batch)).float().cpu().tolist()
            for pair, (chosen, rejected) in zip(batch, rewards, strict=True):
                scores[pair.pair_id] = Score(pair.pair_id, chosen, rejected)
            if on_progress:
                on_progress(len(batch))
        return [score for score in scores.values() if score is not None]

    def rewards(self, batch: PackedBatch) -> torch.Tensor:
        """(n_pairs, 2) rewards of a packed batch, chosen first."""
        device = self.model.device
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=self.precision == "bf16"):
            rewards: torch.Tensor = self.model(
                input_ids=batch.input_ids.to(device),
                position_ids=batch.position_ids.to(device),
                score_positions=batch.score_positions.to(device),
                groups=batch.groups,
            )
        return rewards

    def save(self, folder: str | Path) -> None:
        """Write weights (safetensors), config, tokenizer and `critrm.json`.

        The folder loads with `AutoModelForSequenceClassification.from_pretrained`.
        """
        folder = Path(folder)
        save_classifier(self.model, self.tokenizer, folder)
        write_text(folder / "critrm.json", json.dumps(asdict(self.reads), indent=2) + "\n")


def save_classifier(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Save in full precision, without the packed attention, which only critrm has."""
    with models.quiet():
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    return tokenizer.bos_token_id is not None and tokenizer.encode("a")[:1] == [tokenizer.bos_token_id]


def _load_classifier(name: str, *, new_head: bool = False) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    tokenizer = models.load_tokenizer(name)
    try:
        # Quiet, since transformers warns of a new head, which is the point of `from_backbone`.
        with models.quiet():
            model, facts = AutoModelForSequenceClassification.from_pretrained(
                name,
                num_labels=1,
                dtype=torch.float32,
                attn_implementation=PACKED_ATTENTION,
                output_loading_info=True,
            )
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(f"{name}: cannot be loaded as a reward model ({error})") from error
    if not new_head and facts["missing_keys"]:
        raise ModelError(
            f"{name}: no reward model: its weights lack {', '.join(sorted(facts['missing_keys']))}. "
            "A backbone becomes one with `critrm train`."
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.config.pad_token_id = tokenizer.pad_token_id
    model.forward = MethodType(_packed_forward(type(model)), model)
    return model, tokenizer


def _packed_forward(model_type: type[PreTrainedModel]) -> Callable[..., Any]:
    """The classifier's forward, which also takes a packed row.

    It replaces `forward` on the instance, so that LoRA, DDP, FSDP and autocast, which all wrap or call `forward`, work
    on packed rows as on plain ones.
    """

    def forward(
        self: Any,
        input_ids: torch.Tensor | None = None,
        *,
        score_positions: torch.Tensor | None = None,
        groups: Sequence[Group] = (),
        position_ids: Any = None,
        **plain: Any,
    ) -> Any:
        if score_positions is None:
            return model_type.forward(self, input_ids, position_ids=position_ids, **plain)
        # A mask of four dimensions is passed on as it is, so none is built: the groups say who sees whom.
        no_mask = position_ids.new_empty(1, 1, 1, 1)
        hidden = self.base_model(
            input_ids=input_ids,
            position_ids=position_ids,
            attention_mask=no_mask,
            groups=tuple(groups),
            use_cache=False,
        ).last_hidden_state
        rewards: torch.Tensor = self.score(hidden[0, score_positions]).squeeze(-1)
        return rewards.float()

    return forward
