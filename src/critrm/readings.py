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
from safetensors.torch import load_file, save_file

from critrm import models
from critrm.batching import EncodedPair, memory_advice, pack, token_batches
from critrm.reward_model import RewardModel
from critrm.store import content_hash, disk_errors
from critrm.types import CritiquedPair, Score

PAIRS_PER_FILE = 64
"""Pairs are read and kept in their order by so many; a killed run loses at most these."""


def read_ends(
    model: RewardModel,
    pairs: Sequence[EncodedPair],
    *,
    folder: Path,
    max_tokens_per_step: int = 4096,
    on_progress: Callable[[int], None] | None = None,
) -> torch.Tensor:
    """The backbone's last hidden states at the ends of both sides of each pair.

    Args:
        model: on a backbone as it was pretrained, which `reads.backbone` names.
        pairs: as the model reads them.
        folder: where they are kept, for any number of processes; what is there is not read again.
        max_tokens_per_step: how many tokens are computed at once.
        on_progress: called with the number of pairs that were read, or found.

    Returns:
        (n_pairs, 2, hidden_size), fp32, chosen first. The same bits whether read now or before.

    Raises:
        ModelError: memory does not suffice for so many tokens at once.
        StorageError: the disk is full or read-only.
    """
    parts = [pairs[start : start + PAIRS_PER_FILE] for start in range(0, len(pairs), PAIRS_PER_FILE)]
    found: dict[int, torch.Tensor] = {}
    # In an order of its own, so that processes with the same pairs seldom read the same part at once.
    for number in random.Random().sample(range(len(parts)), len(parts)):
        path = folder / f"{_key(model, parts[number], max_tokens_per_step)}.safetensors"
        if not path.is_file():
            ends = _read(model, parts[number], max_tokens_per_step)
            unfinished = path.with_suffix(f".{os.getpid()}.tmp")
            with disk_errors(path):
                folder.mkdir(parents=True, exist_ok=True)
                save_file({"ends": ends}, unfinished)
                unfinished.replace(path)
        found[number] = load_file(path)["ends"]
        if on_progress:
            on_progress(len(parts[number]))
    return torch.cat([found[number] for number in range(len(parts))])


def _key(model: RewardModel, pairs: Sequence[EncodedPair], max_tokens_per_step: int) -> str:
    how = (model.reads.backbone, model.precision, str(model.model.device), max_tokens_per_step)
    return content_hash(how, [(pair.prompt, pair.branches) for pair in pairs])


@torch.inference_mode()
def _read(model: RewardModel, pairs: Sequence[EncodedPair], max_tokens_per_step: int) -> torch.Tensor:
    model.model.train(False)
    number = {id(pair): n for n, pair in enumerate(pairs)}
    found: dict[int, torch.Tensor] = {}
    seen: list[torch.Tensor] = []
    # The head is handed the hidden states at the ends, (n_pairs, 2, hidden_size).
    handle = model.head.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    advice = "Lower evaluate.max_tokens_per_step, or augment.max_length if it is one pair's."
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

    readings: Path
    """Where what was read is kept; to be set before it scores."""

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
            ends = read_ends(self, part, folder=self.readings, max_tokens_per_step=max_tokens_per_step)
            with torch.inference_mode():
                rewards = head(ends.to(head.weight)).squeeze(-1).cpu()
            for pair, (chosen, rejected) in zip(part, rewards.tolist(), strict=True):
                yield Score(pair.pair_id, chosen, rejected)
            if on_progress:
                on_progress(len(part))
