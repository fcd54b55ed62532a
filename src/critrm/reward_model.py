"""A backbone with a scalar head: load, score, save (section 3.2).

The model on disk is a plain `AutoModelForSequenceClassification` with one label in safetensors, beside its tokenizer
and `critrm.json`, which says what it reads (which critic's critiques, how many tokens). Any tool that loads
transformers classifiers loads it.
"""

import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.hub import cached_file

from critrm import models
from critrm.architectures import load_classifier
from critrm.architectures import save_classifier as save_classifier
from critrm.augment import Budget, text_encoder
from critrm.batching import (
    Candidates,
    EncodedPair,
    PackedBatch,
    encode_candidates,
    encode_pair,
    memory_advice,
    pack,
    pack_trees,
    token_batches,
)
from critrm.cores import computed, n_side_by_side
from critrm.encoding import beginning
from critrm.errors import DataError, ModelError
from critrm.prompts import reward_chat_template
from critrm.store import content_hash, from_json, write_text
from critrm.types import NO_CRITIC, CritiquedPair, Message, Score

CANDIDATES_WINDOW = 64
"""So many prompts' candidates are encoded before they are scored, longest first."""


CPU_ROW_TOKENS = 1024
"""What a CPU reads at once: with longer rows its caches hold less of what the next operation needs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reads:
    """What a reward model was trained to read; `critrm.json` beside its weights."""

    critic: str = NO_CRITIC
    max_length: int = 2048
    backbone: str = ""
    critique_dropout: float = 0.0
    """Share of the training pairs that were read without critiques; above 0, it can score without one."""
    critique_first: bool = False
    """It reads the critique before the completion."""
    cue: str = ""
    """Words of ours behind all that it reads, at whose end it is asked for the reward (`frozen_head`)."""

    @property
    def budget(self) -> Budget:
        """How a pair is laid out and cut."""
        return Budget(self.max_length, critique_first=self.critique_first)


class RewardModel:
    """Scores critiqued pairs; wraps a transformers classifier with one label."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, reads: Reads, *, name: str) -> None:
        """Args are a loaded classifier whose attention is packed (`load` or `from_backbone`), and what it reads."""
        self.model, self.tokenizer, self.reads, self.name = model, tokenizer, reads, name
        self._encode = text_encoder(tokenizer)
        self._bos, self._cue = beginning(tokenizer), self._encode(reads.cue)

    @classmethod
    def load(
        cls, folder: str | Path, *, critic: str | None = None, device: str | None = None, precision: str = "auto"
    ) -> Self:
        """Load a trained reward model.

        Args:
            folder: a model's folder, that of the run which trained it, or a hub id of any one-label classifier.
            critic: which model of a run that trained several: the one that reads this critic's critiques.
            device: `cpu`, `cuda`, ...; the best there is when None.
            precision: `fp32`, `bf16`, or `auto` (bf16 where the hardware computes in it). In bf16 the weights of matrix
                products are kept in bf16 alone; the head and what is added up between the layers stay in fp32.

        Raises:
            ModelError: there is no model, or several, or it has more than one label.
        """
        name = model_folder(str(folder), critic)
        model, tokenizer = load_classifier(name)
        loaded = cls(model, tokenizer, read_facts(name), name=name)
        device = device or models.choose_device()
        loaded.precision = models.choose_precision(device) if precision == "auto" else precision
        loaded.model.train(False)
        if loaded.precision == "bf16":
            _cast_products(loaded.model)
        torch.nn.Module.to(loaded.model, device)  # transformers' own `to` is not typed
        return loaded

    @classmethod
    def from_backbone(cls, backbone: str, reads: Reads, *, seed: int, quantization: Any = None) -> Self:
        """Put a new scalar head on a pretrained language model; the head is drawn with `seed` (section 3.2)."""
        torch.manual_seed(seed)
        model, tokenizer = load_classifier(str(models.resolve(backbone)), new_head=True, quantization=quantization)
        return cls(model, tokenizer, reads, name=backbone)

    precision: str = "fp32"

    @property
    def critic(self) -> str:
        """The critic whose critiques it was trained on; `none` for the No-Critiques arm."""
        return self.reads.critic

    @property
    def head(self) -> torch.nn.Linear:
        """The scalar head."""
        head = self.model.score
        assert isinstance(head, torch.nn.Linear)
        return head

    @property
    def n_special(self) -> int:
        """How many of `max_length` tokens are not the pair's: the tokenizer's beginning of a sequence, and the cue."""
        return len(self._bos) + len(self._cue)

    @property
    def scores_without_critiques(self) -> bool:
        """Whether it was trained to score completions that nobody has critiqued as well."""
        return self.critic == NO_CRITIC or self.reads.critique_dropout > 0

    @property
    def fingerprint(self) -> str:
        """A hash of the weights' sums and of what it reads: two models with one fingerprint give the same scores."""
        sums = [float(parameter.detach().double().sum()) for parameter in self.model.parameters()]
        reads = asdict(self.reads)
        for later in ("critique_dropout", "critique_first", "cue"):
            if not reads[later]:
                # Models from before there was this keep their fingerprint, and so the rewards that are on disk.
                del reads[later]
        return content_hash(reads, sums, self.precision)

    def encode(self, item: CritiquedPair, *, margin: float = 0.0) -> EncodedPair:
        """Tokenize one pair as this model reads it."""
        how: dict[str, Any] = {"bos": self._bos, "budget": self.reads.budget, "cue": self._cue}
        return encode_pair(item, self._encode, **how, margin=margin)

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

        Raises:
            DataError: two pairs have one id.
            ModelError: memory does not suffice for so many tokens at once.
        """
        scores: dict[str, Score | None] = {}

        def seen() -> Iterator[CritiquedPair]:
            for item in pairs:
                if item.pair.id in scores:
                    raise DataError("two pairs have this id; ids must be unique", field=f"id {item.pair.id}")
                scores[item.pair.id] = None  # keeps the given order
                yield item

        for score in self.score_stream(seen(), max_tokens_per_step=max_tokens_per_step, on_progress=on_progress):
            scores[score.pair_id] = score
        return [score for score in scores.values() if score is not None]

    def score_stream(
        self,
        pairs: Iterable[CritiquedPair],
        *,
        max_tokens_per_step: int = 4096,
        on_progress: Callable[[int], None] | None = None,
    ) -> Iterator[Score]:
        """Reward pairs as they come, in memory that does not grow with their number.

        Scores come as they are done: by window of 256 pairs, within it the longest first. The same pairs in the same
        order give the same bits on the same machine. Ids are not checked for being unique; see `score` for the rest.
        """
        self.model.train(False)
        n, n_tokens = self._side_by_side(max_tokens_per_step)
        encoded = (self.encode(item) for item in pairs)
        batches = token_batches(encoded, max_tokens_per_step=n_tokens)
        for batch, rewards in computed(lambda batch: self._computed(pack(batch)), batches, n=n):
            for pair, (chosen, rejected) in zip(batch, rewards.tolist(), strict=True):
                yield Score(pair.pair_id, chosen, rejected)
            if on_progress:
                on_progress(len(batch))

    def score_completions(
        self, prompt: Sequence[Message], completions: Sequence[str], *, critiques: Sequence[str] | None = None
    ) -> list[float]:
        """Reward completions of one prompt (best-of-n); the prompt is read once.

        Args:
            prompt: the conversation so far.
            completions: what could follow it.
            critiques: one of each completion; None where the model reads none.

        Returns:
            One reward per completion, in the given order.

        Raises:
            DataError: there are critiques, but not one per completion.
        """
        each = tuple((critique,) for critique in critiques or ())
        candidates = Candidates(prompt=tuple(prompt), completions=tuple(completions), critiques=each)
        return [rewards[0] for rewards in next(self.score_candidates([candidates]))]

    def score_candidates(
        self,
        candidates: Iterable[Candidates],
        *,
        max_tokens_per_step: int = 4096,
        on_progress: Callable[[int], None] | None = None,
    ) -> Iterator[list[list[float]]]:
        """Reward the completions of many prompts, each with any number of critiques, in constant memory.

        A prompt is read once for all its completions, and a completion once for all its critiques.

        Args:
            candidates: prompts with their completions and critiques.
            max_tokens_per_step: how many tokens are computed at once; does not change the rewards. Where one prompt's
                candidates are longer, they are read in parts, each with the prompt again.
            on_progress: called with the number of prompts done.

        Yields:
            For each prompt, in the given order: by completion, by critique (one without critiques), the reward.

        Raises:
            DataError: there are critiques, but not for every completion.
            ModelError: memory does not suffice for so many tokens at once.
        """
        self.model.train(False)
        limits: dict[str, Any] = {
            "bos": self._bos,
            "budget": self.reads.budget,
            "cue": self._cue,
            "max_tokens": max_tokens_per_step,
        }
        (n, n_tokens), stream = self._side_by_side(max_tokens_per_step), iter(candidates)
        while window := list(itertools.islice(stream, CANDIDATES_WINDOW)):
            trees = (
                tree
                for number, each in enumerate(window)
                for tree in encode_candidates(each, self._encode, **limits, number=number)
            )
            rewards = [
                [[0.0] * len(of_one) for of_one in each.critiques or ((None,),) * len(each.completions)]
                for each in window
            ]
            batches = token_batches(trees, max_tokens_per_step=n_tokens)
            for batch, found in computed(lambda batch: self._computed(pack_trees(batch)), batches, n=n):
                places = [place for tree in batch for place in tree.places]
                for (number, i, j), reward in zip(places, found.tolist(), strict=True):
                    rewards[number][i][j] = reward
            yield from rewards
            if on_progress:
                on_progress(len(window))

    def _side_by_side(self, max_tokens_per_step: int) -> tuple[int, int]:
        """How many rows are computed at once, and how many tokens each may have."""
        n = n_side_by_side(self.model.device)
        most = max_tokens_per_step // n
        return n, min(most, CPU_ROW_TOKENS) if self.model.device.type == "cpu" else most

    @torch.inference_mode()
    def _computed(self, batch: PackedBatch) -> torch.Tensor:
        n_tokens = batch.input_ids.shape[1]
        advice = f"A step held {n_tokens} tokens: lower --max-tokens-per-step, or --max-length if it is one pair's."
        with memory_advice(advice):
            return self.rewards(batch).float().cpu()

    def rewards(self, batch: PackedBatch) -> torch.Tensor:
        """Rewards of a packed batch, in the shape of its `score_positions`: (n_pairs, 2), chosen first, for pairs."""
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
        # Not the backbone's: tools that apply it are to read what was trained on.
        write_text(folder / "chat_template.jinja", reward_chat_template(self.reads.cue))
        write_text(folder / "critrm.json", json.dumps(asdict(self.reads), indent=2) + "\n")


def model_folder(name: str, critic: str | None) -> str:
    """The folder of the model itself, where that of a run, of an arm or of a seed is named; else the name as it is."""
    folder = Path(name)
    if (folder / "config.json").is_file():
        return name
    places = ("model", "seed-*/model", "train/*/seed-*/model")
    found = [str(file.parent) for place in places for file in sorted(folder.glob(f"{place}/config.json"))]
    if len(found) > 1 and critic is not None:
        found = [each for each in found if read_facts(each).critic == critic] or found
    if len(found) > 1:
        shown = ", ".join(found[:8]) + (", ..." if len(found) > 8 else "")
        raise ModelError(f"{name}: holds {len(found)} reward models; name one of them: {shown}")
    return found[0] if found else name


def read_facts(name: str) -> Reads:
    """What a model of ours was trained to read, from its folder or the hub; the defaults for anybody else's."""
    facts = Path(name) / "critrm.json"
    if not Path(name).is_dir():
        found = cached_file(name, "critrm.json", _raise_exceptions_for_missing_entries=False)
        facts = Path(found) if found else facts
    return from_json(Reads, json.loads(facts.read_text(encoding="utf-8"))) if facts.is_file() else Reads()


def _cast_products(model: PreTrainedModel) -> None:
    """Keep in bf16 what autocast would cast to it anew in every step: the same scores, sooner and in less memory."""
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "score":
            module.to(torch.bfloat16)
