"""Critiqued pairs to packed token rows in which a pair pays for its prompt once.

One pair is one group `prompt, chosen + critique, rejected + critique`; several groups are laid end to end in one row
without padding. `attention.packed_attention` keeps groups and branches apart, and positions restart after the prompt,
so each reward equals that of a row of its own.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from critrm.attention import Group
from critrm.augment import Budget, Tokens, segment_pair
from critrm.types import CritiquedPair


@dataclass(frozen=True, slots=True)
class EncodedPair:
    """A critiqued pair as tokens."""

    pair_id: str
    prompt: Tokens
    """The shared tokens, the tokenizer's beginning-of-sequence token included where it has one."""
    branches: tuple[Tokens, Tokens]
    """Completion and critique of the chosen, then of the rejected side."""
    margin: float = 0.0

    @property
    def n_tokens(self) -> int:
        """Tokens that the backbone reads for this pair."""
        return len(self.prompt) + len(self.branches[0]) + len(self.branches[1])


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """Several pairs in one row."""

    input_ids: torch.Tensor
    """(1, n_tokens)."""
    position_ids: torch.Tensor
    """(1, n_tokens): restart at 0 for each prompt, and after the prompt for each branch."""
    score_positions: torch.Tensor
    """(n_pairs, 2): the index of the last token of each branch, chosen first."""
    groups: tuple[Group, ...]
    margins: torch.Tensor
    """(n_pairs,)."""


def encode_pair(
    item: CritiquedPair, encode: Callable[[str], Tokens], *, bos: Tokens, budget: Budget, margin: float = 0.0
) -> EncodedPair:
    """Tokenize one pair by segments within the budget; `bos` goes before the prompt and counts towards the budget."""
    segments = segment_pair(item, encode, Budget(budget.max_length - len(bos), budget.min_share))
    return EncodedPair(item.pair.id, bos + segments.prompt, segments.branches, margin)


def pack(pairs: Sequence[EncodedPair]) -> PackedBatch:
    """Lay pairs end to end in one row.

    Example: one pair with prompt [5, 6], chosen [7, 8] and rejected [9] becomes
    input_ids [[5, 6, 7, 8, 9]], position_ids [[0, 1, 2, 3, 2]], score_positions [[3, 4]].
    """
    ids: list[int] = []
    positions: list[int] = []
    ends: list[list[int]] = []
    groups = []
    for pair in pairs:
        n_prompt = len(pair.prompt)
        groups.append(Group(len(ids), n_prompt, tuple(len(branch) for branch in pair.branches)))
        ids += pair.prompt
        positions += range(n_prompt)
        pair_ends = []
        for branch in pair.branches:
            ids += branch
            positions += range(n_prompt, n_prompt + len(branch))
            pair_ends.append(len(ids) - 1)
        ends.append(pair_ends)
    return PackedBatch(
        torch.tensor([ids]),
        torch.tensor([positions]),
        torch.tensor(ends),
        tuple(groups),
        torch.tensor([pair.margin for pair in pairs]),
    )


def token_batches(
    pairs: Iterable[EncodedPair], *, max_tokens_per_step: int, window: int = 256
) -> Iterator[list[EncodedPair]]:
    """Group pairs into batches of at most `max_tokens_per_step` tokens; a longer pair is a batch of its own.

    Within a window of pairs the longest come first, so that batches are even; memory does not grow with the data.
    """
    held: list[EncodedPair] = []
    for pair in pairs:
        held.append(pair)
        if len(held) == window:
            yield from _fill(held, max_tokens_per_step)
            held = []
    yield from _fill(held, max_tokens_per_step)


def _fill(pairs: list[EncodedPair], max_tokens: int) -> Iterator[list[EncodedPair]]:
    batch: list[EncodedPair] = []
    n_tokens = 0
    for pair in sorted(pairs, key=lambda pair: -pair.n_tokens):
        if batch and n_tokens + pair.n_tokens > max_tokens:
            yield batch
            batch, n_tokens = [], 0
        batch.append(pair)
        n_tokens += pair.n_tokens
    if batch:
        yield batch
