"""What a frozen backbone says of pairs, kept in files, so that no pair is read twice.

A backbone that is not trained says the same of a pair whatever the head on it was fitted to. Its hidden states are
kept by what was read: a smaller training set, another seed and the same test pairs then cost nothing, nor does what an
interrupted run has read.
"""

import itertools
import os
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from critrm import models
from critrm.batching import EncodedPair, memory_advice, pack, token_batches
from critrm.reward_model import RewardModel
from critrm.store import content_hash, disk_errors
from critrm.types import CritiquedPair, Score

PAIRS_PER_FILE = 64
"""Pairs are read and kept by so many; a killed run loses at most these."""


class Readings:
    """The backbone's last hidden states at the ends of pairs, by what was read, in a folder that processes may share.

    A file holds some pairs, each under a hash of its tokens, of the backbone's name, the precision and the device.
    """

    def __init__(self, folder: str | Path) -> None:
        """Open a folder, which need not be there yet."""
        self.folder = Path(folder)
        self._place: dict[str, Path] = {}
        self._known: set[Path] = set()

    def of(
        self,
        model: RewardModel,
        pairs: Sequence[EncodedPair],
        *,
        max_tokens_per_step: int = 4096,
        on_progress: Callable[[int], None] | None = None,
    ) -> torch.Tensor:
        """What the backbone says at the ends of both sides of each pair; what nobody has read yet is read and kept.

        Args:
            model: on a backbone as it was pretrained, which `reads.backbone` names.
            pairs: as the model reads them.
            max_tokens_per_step: how many tokens are computed at once.
            on_progress: called with the number of pairs that were read, or found.

        Returns:
            (n_pairs, 2, hidden_size), fp32, chosen first.

        Raises:
            ModelError: memory does not suffice for so many tokens at once.
            StorageError: the disk is full or read-only.
        """
        keys = [_key(model, pair) for pair in pairs]
        self._look()
        # Twice the same pair is read once.
        missing = {key: pair for key, pair in zip(keys, pairs, strict=True) if key not in self._place}
        if on_progress:
            on_progress(len(pairs) - len(missing))
        parts = [list(missing)[start : start + PAIRS_PER_FILE] for start in range(0, len(missing), PAIRS_PER_FILE)]
        # In an order of its own, so that processes with the same pairs seldom read the same part at once.
        for part in random.Random().sample(parts, len(parts)):
            self._look()
            left = [key for key in part if key not in self._place]
            if left:
                self._keep(left, _read(model, [missing[key] for key in left], max_tokens_per_step))
            if on_progress:
                on_progress(len(part))
        return torch.stack(self._load(keys))

    def _look(self) -> None:
        """Learn of what other processes have read meanwhile."""
        for path in set(self.folder.glob("*.safetensors")) - self._known:
            with safe_open(path, "pt") as file:
                self._place |= dict.fromkeys(file.keys(), path)
            self._known.add(path)

    def _keep(self, keys: Sequence[str], ends: torch.Tensor) -> None:
        path = self.folder / f"{content_hash(keys)}.safetensors"
        unfinished = path.with_suffix(f".{os.getpid()}.tmp")
        with disk_errors(path):
            self.folder.mkdir(parents=True, exist_ok=True)
            save_file({key: of_pair.clone() for key, of_pair in zip(keys, ends, strict=True)}, unfinished)
            unfinished.replace(path)
        self._look()

    def _load(self, keys: Sequence[str]) -> list[torch.Tensor]:
        by_file: dict[Path, list[str]] = {}
        for key in keys:
            by_file.setdefault(self._place[key], []).append(key)
        found: dict[str, torch.Tensor] = {}
        for path, inside in by_file.items():
            with safe_open(path, "pt") as file:
                found |= {key: file.get_tensor(key) for key in inside}
        return [found[key] for key in keys]


def _key(model: RewardModel, pair: EncodedPair) -> str:
    return content_hash(model.reads.backbone, model.precision, str(model.model.device), pair.prompt, pair.branches)


@torch.inference_mode()
def _read(model: RewardModel, pairs: Sequence[EncodedPair], max_tokens_per_step: int) -> torch.Tensor:
    model.model.train(False)
    number = {id(pair): n for n, pair in enumerate(pairs)}
    found: dict[int, torch.Tensor] = {}
    seen: list[torch.Tensor] = []
    # The head is handed the hidden states at the ends, (n_pairs, 2, hidden_size).
    handle = model.head.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    advice = (
        f"A step held at most {max_tokens_per_step} tokens, or one pair's: lower the length that is read, or "
        "evaluate.max_tokens_per_step where test pairs are read."
    )
    try:
        for batch in token_batches(pairs, max_tokens_per_step=max_tokens_per_step):
            with models.quiet(), memory_advice(advice):
                model.rewards(pack(batch))
            ends = seen.pop().float().cpu()
            found |= {number[id(pair)]: ends[n] for n, pair in enumerate(batch)}
    finally:
        handle.remove()
    return torch.stack([found[n] for n in range(len(pairs))])


class FrozenRewardModel(RewardModel):
    """A reward model on a backbone that was not trained: scores as any other, and reads no pair twice."""

    readings: Readings
    """What was read; to be set before it scores."""

    def score_stream(
        self,
        pairs: Iterable[CritiquedPair],
        *,
        max_tokens_per_step: int = 4096,
        on_progress: Callable[[int], None] | None = None,
    ) -> Iterator[Score]:
        """Reward pairs as they come, in their order; see `RewardModel.score_stream`."""
        stream, head = iter(pairs), self.head
        while part := [self.encode(item) for item in itertools.islice(stream, PAIRS_PER_FILE)]:
            ends = self.readings.of(self, part, max_tokens_per_step=max_tokens_per_step)
            with torch.inference_mode():
                rewards = head(ends.to(head.weight)).squeeze(-1).cpu()
            for pair, (chosen, rejected) in zip(part, rewards.tolist(), strict=True):
                yield Score(pair.pair_id, chosen, rejected)
            if on_progress:
                on_progress(len(part))
