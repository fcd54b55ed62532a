"""Critiqued pairs and candidates to packed token rows in which a prompt is paid for once.

One pair is one group `prompt, chosen + critique, rejected + critique`; several groups are laid end to end in one row
without padding. `attention.packed_attention` keeps groups and branches apart, and positions restart after the prompt,
so each reward equals that of a row of its own. Several critiques of one completion share the completion, too.
"""

import contextlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

import torch

from critrm.augment import Budget, Tokens, segment_pair
from critrm.errors import DataError, ModelError
from critrm.row_layout import Group
from critrm.types import CritiquedPair, Message, PreferencePair

Place = tuple[int, int, int]
"""Which reward: the number of the candidates in a window, of the completion, and of the critique."""


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidates:
    """Completions of one prompt, to be rewarded (best-of-n), each with any number of critiques."""

    prompt: tuple[Message, ...]
    completions: tuple[str, ...]
    critiques: tuple[tuple[str, ...], ...] = ()
    """For each completion the critiques to read it with, one reward each; empty: each completion is read alone."""


@dataclass(frozen=True, slots=True)
class EncodedTree:
    """A prompt, completions that go on from it, and critiques that go on from these, as tokens."""

    prompt: Tokens
    branches: tuple[tuple[Tokens, tuple[Tokens, ...]], ...]
    """Each completion and its critiques; an empty critique stands for none."""
    places: tuple[Place, ...]
    """Which reward each critique is for, in order."""

    @property
    def n_tokens(self) -> int:
        """Tokens that the backbone reads."""
        return len(self.prompt) + sum(len(branch) + sum(map(len, twigs)) for branch, twigs in self.branches)


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """Several pairs, or trees, in one row."""

    input_ids: torch.Tensor
    """(1, n_tokens)."""
    position_ids: torch.Tensor
    """(1, n_tokens): restart at 0 for each prompt, and after the prompt for each branch."""
    score_positions: torch.Tensor
    """(n_pairs, 2): the index of the last token of each branch, chosen first. Of trees (n_places,): each critique's."""
    groups: tuple[Group, ...]
    margins: torch.Tensor
    """(n_pairs,); of trees empty."""


class _Sized(Protocol):
    @property
    def n_tokens(self) -> int: ...


Encoded = TypeVar("Encoded", bound=_Sized)


def encode_pair(
    item: CritiquedPair,
    encode: Callable[[str], Tokens],
    *,
    bos: Tokens,
    budget: Budget,
    cue: Sequence[int] = (),
    margin: float = 0.0,
) -> EncodedPair:
    """Tokenize one pair by segments within the budget.

    `bos` goes before the prompt and `cue` behind each branch; both count towards the budget, and are never cut.
    """
    segments = segment_pair(item, encode, replace(budget, max_length=budget.max_length - len(bos) - len(cue)))
    chosen, rejected = segments.branches
    return EncodedPair(item.pair.id, bos + segments.prompt, ([*chosen, *cue], [*rejected, *cue]), margin)


def encode_candidates(
    candidates: Candidates,
    encode: Callable[[str], Tokens],
    *,
    bos: Tokens,
    budget: Budget,
    max_tokens: int,
    cue: Sequence[int] = (),
    number: int = 0,
) -> Iterator[EncodedTree]:
    """Tokenize candidates into trees of at most `max_tokens` tokens; one longer reading is a tree of its own.

    Each reading (prompt, completion, critique) is cut to the budget by itself, so that a reward does not depend on the
    other candidates; what readings then have in common is read once.

    Raises:
        DataError: there are critiques, but not for every completion.
    """
    if candidates.critiques and len(candidates.critiques) != len(candidates.completions):
        n, m = len(candidates.critiques), len(candidates.completions)
        raise DataError(f"critiques of {n} completions, but there are {m}", field="critiques")
    known: dict[str, Tokens] = {}

    def encode_once(text: str) -> Tokens:
        if text not in known:
            known[text] = encode(text)
        return known[text]

    room = replace(budget, max_length=budget.max_length - len(bos) - len(cue))
    prompts: dict[tuple[int, ...], dict[tuple[int, ...], list[tuple[Tokens, Place]]]] = {}
    for i, completion in enumerate(candidates.completions):
        for j, critique in enumerate(candidates.critiques[i] if candidates.critiques else ("",)):
            pair = PreferencePair(id="", prompt=candidates.prompt, chosen=completion, rejected=completion)
            item = CritiquedPair(pair=pair, chosen_critique=critique, rejected_critique=critique)
            segments = segment_pair(item, encode_once, room)
            branches = prompts.setdefault((*bos, *segments.prompt), {})
            # A critique that comes first is followed by the completion: then there is no completion to share.
            first, then = segments.completions[0], segments.critiques[0]
            if budget.critique_first:
                first, then = segments.branches[0], []
            branches.setdefault(tuple(first), []).append(([*then, *cue], (number, i, j)))
    for prompt, branches in prompts.items():
        readings = [(list(y), c, place) for y, found in branches.items() for c, place in found]
        yield from _trees(list(prompt), readings, max_tokens)


def _trees(prompt: Tokens, readings: list[tuple[Tokens, Tokens, Place]], max_tokens: int) -> Iterator[EncodedTree]:
    branches: list[tuple[Tokens, tuple[Tokens, ...]]] = []
    places: list[Place] = []
    n_tokens = len(prompt)
    for completion, critique, place in readings:
        goes_on = bool(branches) and branches[-1][0] == completion
        n_new = len(critique) + (0 if goes_on else len(completion))
        if branches and n_tokens + n_new > max_tokens:
            yield EncodedTree(prompt, tuple(branches), tuple(places))
            branches, places, goes_on = [], [], False
            n_tokens, n_new = len(prompt), len(completion) + len(critique)
        n_tokens += n_new
        places.append(place)
        if goes_on:
            branches[-1] = (completion, (*branches[-1][1], critique))
        else:
            branches.append((completion, (critique,)))
    if branches:
        yield EncodedTree(prompt, tuple(branches), tuple(places))


def pack(pairs: Sequence[EncodedPair]) -> PackedBatch:
    """Lay pairs end to end in one row.

    Example: one pair with prompt [5, 6], chosen [7, 8] and rejected [9] becomes
    input_ids [[5, 6, 7, 8, 9]], position_ids [[0, 1, 2, 3, 2]], score_positions [[3, 4]].
    """
    trees = [EncodedTree(pair.prompt, tuple((branch, ([],)) for branch in pair.branches), ()) for pair in pairs]
    ids, positions, ends, groups = _lay_out(trees)
    margins = torch.tensor([pair.margin for pair in pairs])
    return PackedBatch(ids, positions, ends.view(-1, 2), groups, margins)


def pack_trees(trees: Sequence[EncodedTree]) -> PackedBatch:
    """Lay trees end to end in one row, like pairs; a completion's critiques follow it.

    Example: prompt [5], a completion [6] with the critiques [7, 8] and [9] becomes
    input_ids [[5, 6, 7, 8, 9]], position_ids [[0, 1, 2, 3, 2]], score_positions [3, 4].
    """
    ids, positions, ends, groups = _lay_out(trees)
    return PackedBatch(ids, positions, ends, groups, torch.tensor([]))


def _lay_out(trees: Sequence[EncodedTree]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, tuple[Group, ...]]:
    ids: list[int] = []
    positions: list[int] = []
    ends: list[int] = []
    groups = []
    for tree in trees:
        n_prompt, start = len(tree.prompt), len(ids)
        ids += tree.prompt
        positions += range(n_prompt)
        for branch, twigs in tree.branches:
            ids += branch
            fork = n_prompt + len(branch)
            positions += range(n_prompt, fork)
            branch_end = len(ids) - 1 if branch else start + n_prompt - 1
            for twig in twigs:
                ids += twig
                positions += range(fork, fork + len(twig))
                ends.append(len(ids) - 1 if twig else branch_end)
        # No segment for an empty twig: it is scored at its branch's end.
        n_twigs = tuple(tuple(len(twig) for twig in twigs if twig) for _, twigs in tree.branches)
        groups.append(
            Group(start, n_prompt, tuple(len(branch) for branch, _ in tree.branches), n_twigs if any(n_twigs) else ())
        )
    return torch.tensor([ids]), torch.tensor([positions]), torch.tensor(ends), tuple(groups)


def token_batches(pairs: Iterable[Encoded], *, max_tokens_per_step: int, window: int = 256) -> Iterator[list[Encoded]]:
    """Group pairs into batches of at most `max_tokens_per_step` tokens; a longer pair is a batch of its own.

    Within a window of pairs the longest come first, so that batches are even; memory does not grow with the data.
    """
    held: list[Encoded] = []
    for pair in pairs:
        held.append(pair)
        if len(held) == window:
            yield from _fill(held, max_tokens_per_step)
            held = []
    yield from _fill(held, max_tokens_per_step)


def _fill(pairs: list[Encoded], max_tokens: int) -> Iterator[list[Encoded]]:
    batch: list[Encoded] = []
    n_tokens = 0
    for pair in sorted(pairs, key=lambda pair: -pair.n_tokens):
        if batch and n_tokens + pair.n_tokens > max_tokens:
            yield batch
            batch, n_tokens = [], 0
        batch.append(pair)
        n_tokens += pair.n_tokens
    if batch:
        yield batch


@contextlib.contextmanager
def memory_advice(advice: str) -> Iterator[None]:
    """Say in one line that memory ran out, and what to do about it.

    Args:
        advice: what to lower, as a sentence.

    Raises:
        ModelError: the device's memory, or the machine's, did not suffice.
    """
    try:
        yield
    # MemoryError is Python's; torch's allocator for the CPU has no error class of its own.
    except (MemoryError, RuntimeError) as error:
        out = isinstance(error, MemoryError | torch.OutOfMemoryError)
        if not out and not re.search("not enough memory|can't allocate memory|out of memory", str(error)):
            raise
        reason = (str(error).strip() or "out of memory").splitlines()[0]
        raise ModelError(f"memory ran out ({reason}). {advice}") from error
