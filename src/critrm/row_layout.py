"""Where prompts, completions and critiques lie in a packed row, and who sees whom in it.

A packed row is a sequence of groups, each `prompt, branch 1, branch 2, ...`, laid end to end without padding. A branch
sees its own group's prompt and itself, never another branch or group, and its positions go on from the prompt's end:
every branch is therefore read exactly as a row of its own (`prompt + branch`) would be. A branch may fork again, into
twigs: several critiques of one completion.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch


@dataclass(frozen=True, slots=True)
class Group:
    """Where one prompt and its branches lie in a packed row: lengths in tokens."""

    start: int
    n_prompt: int
    n_branches: tuple[int, ...]
    n_twigs: tuple[tuple[int, ...], ...] = ()
    """For each branch, what forks from its end and directly follows it in the row; empty where nothing does."""


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of a row that is a whole prompt, branch or twig."""

    start: int
    length: int
    before: tuple[int, ...]
    """The numbers of the segments that it goes on from, outermost first: all that it sees besides itself."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Segments that follow each other in the row and in position, and the earlier ones that they go on from."""

    before: tuple[int, ...]
    own: tuple[int, ...]


@lru_cache(maxsize=16)  # asked for by every layer
def segments_of(groups: tuple[Group, ...]) -> tuple[Segment, ...]:
    """The segments of a row, in its order."""
    segments: list[Segment] = []

    def add(length: int, before: tuple[int, ...]) -> int:
        start = segments[-1].start + segments[-1].length if segments else 0
        segments.append(Segment(start, length, before))
        return len(segments) - 1

    for group in groups:
        prompt = add(group.n_prompt, ())
        for i, n_branch in enumerate(group.n_branches):
            branch = add(n_branch, (prompt,))
            for n_twig in group.n_twigs[i] if group.n_twigs else ():
                add(n_twig, (prompt, branch))
    return tuple(segments)


@lru_cache(maxsize=16)
def pieces_of(groups: tuple[Group, ...]) -> tuple[Piece, ...]:
    """A row as few ordinary causal sequences: a prompt, its first branch and that one's first twig are one of them."""
    pieces: list[Piece] = []
    for number, segment in enumerate(segments_of(groups)):
        if pieces and segment.before == pieces[-1].before + pieces[-1].own:
            pieces[-1] = Piece(pieces[-1].before, (*pieces[-1].own, number))
        else:
            pieces.append(Piece(segment.before, (number,)))
    return tuple(pieces)


def row_mask(
    groups: tuple[Group, ...], *, window: int | None = None, device: torch.device | str = "cpu"
) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]:
    """Who sees whom in a packed row, as FlexAttention's `mask_mod(batch, head, query, key)` on indices of tokens.

    Args:
        groups: the row's layout.
        window: a token sees this many positions, its own included (not that many places in the row); None: all.
        device: where the indices are.
    """
    segments = segments_of(groups)
    last = [segment.start + segment.length for segment in segments]
    first = [0] * len(segments)
    for number, segment in enumerate(segments):
        for earlier in segment.before:
            # What goes on from a segment lies behind it without a gap, so one number per token says who sees it.
            last[earlier] = max(last[earlier], last[number])
            first[number] += segments[earlier].length
    lengths = torch.tensor([segment.length for segment in segments])
    seen_until = torch.tensor(last).repeat_interleave(lengths).to(device)
    shift = torch.tensor([segment.start for segment in segments]) - torch.tensor(first)
    positions = (torch.arange(int(lengths.sum())) - shift.repeat_interleave(lengths)).to(device)

    def sees(batch: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        seen = (key <= query) & (query < seen_until[key])
        return seen if window is None else seen & (positions[query] - positions[key] < window)

    return sees
