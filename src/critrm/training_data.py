"""Critiqued pairs as the Trainer draws them: encoded, in an order that all processes share, packed into rows."""

import math
import random
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from critrm.augment import segment_pair, text_encoder
from critrm.batching import EncodedPair, pack
from critrm.config import TrainConfig
from critrm.errors import ConfigError, DataError
from critrm.reward_model import RewardModel
from critrm.types import NO_CRITIC, CritiquedPair

TRAINING_ROW_TOKENS = 2048
"""What one of several threads reads at once. Of a longer row more has to be kept for the backward pass; and that of
each row, however short, computes a gradient of the whole embedding."""


@dataclass(frozen=True, slots=True)
class TrainingPair:
    """An encoded pair and what only training asks of it."""

    encoded: EncodedPair
    n_critiques: tuple[int, int] = (0, 0)
    """How many tokens at the end of each branch are its critique; 0 unless they are to be predicted."""
    weight: float = 1.0
    """How often the pair counts: once, or not at all where it only fills up a batch."""
    critique_first: bool = False
    """The critique's tokens are at the beginning of each branch instead."""
    scores: tuple[float, float] = (math.nan, math.nan)
    """The critic's own scores on a scale of mean 0 and spread 1; not-a-number where there is none to learn from."""


def margin_of(item: CritiquedPair, margins: Mapping[str, float] | None) -> float:
    """m(r): the pair's own margin, else that of its rating, else 0; 0 when margins are off."""
    if margins is None:
        return 0.0
    if item.pair.margin is not None:
        return item.pair.margin
    return margins.get(item.pair.rating, 0.0) if item.pair.rating else 0.0


def drop_critiques(items: Sequence[CritiquedPair], share: float, *, seed: int) -> list[CritiquedPair]:
    """Take both critiques from about `share` of the pairs; which ones, the seed and a pair's id decide."""
    return [
        replace(item, chosen_critique="", rejected_critique="")
        if random.Random(f"{seed}/{item.pair.id}").random() < share
        else item
        for item in items
    ]


@dataclass(frozen=True, slots=True)
class ScoreScale:
    """Mean and spread of a critic's own scores over an arm's training pairs."""

    mean: float
    spread: float

    @classmethod
    def of(cls, items: Sequence[CritiquedPair]) -> "ScoreScale":
        """Of the pairs that are trained on.

        Raises:
            ConfigError: they carry no scores, or all the same.
            DataError: a score is no finite number.
        """
        scores = [score for item in items for score in (item.chosen_score, item.rejected_score) if score is not None]
        # Arms are read from files as they are.
        if bad := [score for score in scores if type(score) not in (int, float) or not math.isfinite(score)]:
            raise DataError(f"must be finite numbers, not {bad[0]!r:.60}", field="chosen_score, rejected_score")
        if len(set(scores)) < 2:
            which = "all the same" if scores else "none"
            raise ConfigError(
                f"score_weight needs the critic's own scores, and the critiques by {items[0].critic!r} of these "
                f"{len(items)} pairs carry {which}: give critiques with a `score`, such as those of `critrm judge "
                "--with-critique`, or leave out score_weight"
            )
        return cls(statistics.fmean(scores), statistics.pstdev(scores))

    def standardise(self, item: CritiquedPair) -> tuple[float, float]:
        """A pair's scores on a scale of mean 0 and spread 1, chosen first; not-a-number where there is none."""
        chosen, rejected = (
            math.nan if score is None else (score - self.mean) / self.spread
            for score in (item.chosen_score, item.rejected_score)
        )
        return chosen, rejected


def encode_pairs(
    items: Sequence[CritiquedPair],
    reward_model: RewardModel,
    *,
    config: TrainConfig,
    score_scale: ScoreScale | None = None,
) -> tuple[list[TrainingPair], dict[str, int]]:
    """Tokenize pairs as the model reads them; with a scale, the critic's own scores become targets.

    Returns:
        The pairs, and by segment how many of them had it cut to the model's length.
    """
    encode = text_encoder(reward_model.tokenizer)
    max_length = reward_model.reads.max_length
    predicted = config.lm_weight > 0 and reward_model.critic != NO_CRITIC
    pairs, n_cut = [], {"prompt": 0, "completion": 0, "critique": 0}
    for item in items:
        encoded = reward_model.encode(item, margin=margin_of(item, config.margins))
        n_critiques = (0, 0)
        # A pair that had something cut fills the length; the others need not be cut up once more to know.
        if predicted or len(encoded.prompt) + max(map(len, encoded.branches)) >= max_length:
            room = replace(reward_model.reads.budget, max_length=max_length - reward_model.n_special)
            segments = segment_pair(item, encode, room)
            for name, n in zip(n_cut, segments.n_cut, strict=True):
                n_cut[name] += n > 0
            if predicted:
                n_critiques = (len(segments.critiques[0]), len(segments.critiques[1]))
        first = reward_model.reads.critique_first
        scores = score_scale.standardise(item) if score_scale else (math.nan, math.nan)
        pairs.append(TrainingPair(encoded, n_critiques, critique_first=first, scores=scores))
    return pairs, n_cut


class TrainingPairs(torch.utils.data.Dataset[TrainingPair]):
    """Training pairs as the data set that a Trainer draws from; the index after the last is a pair of no weight."""

    def __init__(self, pairs: Sequence[TrainingPair]) -> None:
        """Args are the pairs, at least one."""
        self.pairs = pairs
        self.filler = replace(min(pairs, key=lambda pair: pair.encoded.n_tokens), weight=0.0)

    def __len__(self) -> int:
        """How many pairs."""
        return len(self.pairs)

    def __getitem__(self, index: int) -> TrainingPair:
        """One pair."""
        return self.filler if index == len(self.pairs) else self.pairs[index]


class EpochSampler(torch.utils.data.Sampler[int]):
    """A new order of the pairs each epoch, the same in every process.

    Processes must be dealt equally many pairs. accelerate would repeat some for that, which would then count twice;
    here the gap is filled with pairs of no weight, so that the result does not depend on the number of processes.
    """

    def __init__(self, n_pairs: int, *, seed: int, multiple: int) -> None:
        """Args are the pairs, what draws their order, and the number that what is dealt is a multiple of."""
        self.n_pairs, self.seed, self.epoch = n_pairs, seed, 0
        self.n_fill = -n_pairs % multiple

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order is drawn; the Trainer calls it."""
        self.epoch = epoch

    def __len__(self) -> int:
        """How many pairs are dealt, those of no weight included."""
        return self.n_pairs + self.n_fill

    def __iter__(self) -> Iterator[int]:
        """The order of this epoch."""
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        yield from torch.randperm(self.n_pairs, generator=generator).tolist()
        yield from [self.n_pairs] * self.n_fill


def collate(pairs: list[TrainingPair], *, n_at_once: int = 1) -> dict[str, list[dict[str, Any]]]:
    """The pairs of one pass as `rows`: a single one, or several of about equal length for threads that work at once.

    Args:
        pairs: at least one.
        n_at_once: how many threads there are; each gets as many rows as it takes to keep them to `TRAINING_ROW_TOKENS`.
    """
    if n_at_once == 1:
        return {"rows": [packed_row(pairs)]}
    n_tokens = sum(pair.encoded.n_tokens for pair in pairs)
    rows: list[list[TrainingPair]] = [
        [] for _ in range(n_at_once * math.ceil(n_tokens / n_at_once / TRAINING_ROW_TOKENS))
    ]
    lengths = [0] * len(rows)
    for pair in sorted(pairs, key=lambda pair: -pair.encoded.n_tokens):
        shortest = lengths.index(min(lengths))
        rows[shortest].append(pair)
        lengths[shortest] += pair.encoded.n_tokens
    return {"rows": [packed_row(row) for row in rows if row]}


def packed_row(pairs: list[TrainingPair]) -> dict[str, Any]:
    """One packed row of several pairs, with the critique tokens to predict, as the Trainer passes it on.

    Returns:
        The model's arguments; `margins` and `weights` (n_pairs,); `scores` (n_pairs, 2); and of each critique token to
        predict its position in the row (`critique_tokens`), that of the token before it (`critique_sources`), its pair
        (`critique_pairs`).
    """
    batch = pack([pair.encoded for pair in pairs])
    tokens: list[int] = []
    sources: list[int] = []
    owners: list[int] = []
    for index, (pair, group) in enumerate(zip(pairs, batch.groups, strict=True)):
        for end, n_critique, branch in zip(
            batch.score_positions[index].tolist(), pair.n_critiques, pair.encoded.branches, strict=True
        ):
            start = end - len(branch) + 1
            first = start if pair.critique_first else end - n_critique + 1
            tokens += range(first, first + n_critique)
            # What a branch begins with follows the prompt, which for the second does not lie just before it.
            before = group.start + group.n_prompt - 1 if first == start else first - 1
            sources += [before, *range(first, first + n_critique - 1)] if n_critique else []
            owners += [index] * n_critique
    return {
        "input_ids": batch.input_ids,
        "position_ids": batch.position_ids,
        "score_positions": batch.score_positions,
        "groups": batch.groups,
        "margins": batch.margins,
        "weights": torch.tensor([pair.weight for pair in pairs]),
        "scores": torch.tensor([pair.scores for pair in pairs]),
        "critique_tokens": torch.tensor(tokens, dtype=torch.long),
        "critique_sources": torch.tensor(sources, dtype=torch.long),
        "critique_pairs": torch.tensor(owners, dtype=torch.long),
    }
