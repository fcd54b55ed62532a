"""Who sees whom in a packed row, told in two ways that have to agree."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from critrm.row_layout import Group, pieces_of, row_mask, segments_of

TREE = Group(0, 2, (2, 1), ((1, 2), ()))
"""A prompt of 2 tokens, a branch of 2 that forks into 1 and 2, and a branch of 1."""
BRANCH = st.tuples(st.integers(1, 7), st.lists(st.integers(1, 5), max_size=3))
SHAPES = st.lists(st.tuples(st.integers(0, 9), st.lists(BRANCH, min_size=1, max_size=3)), min_size=1, max_size=3)


def groups_of(shapes):
    """Groups of these shapes, laid end to end."""
    groups, n = [], 0
    for n_prompt, branches in shapes:
        twigs = tuple(tuple(twigs) for _, twigs in branches)
        groups.append(Group(n, n_prompt, tuple(length for length, _ in branches), twigs if any(twigs) else ()))
        n += n_prompt + sum(length + sum(twigs) for length, twigs in branches)
    return tuple(groups), n


def mask_of(groups, n, **settings):
    index = torch.arange(n)
    return row_mask(groups, **settings)(index[0], index[0], index[:, None], index)


def test_the_mask_of_a_small_tree():
    expected = """
        1.......
        11......
        111.....
        1111....
        11111...
        1111.1..
        1111.11.
        11.....1"""
    rows = ["".join("1" if seen else "." for seen in row) for row in mask_of((TREE,), 8)]
    assert rows == expected.split()


def test_a_window_counts_positions_not_places():
    # The last branch lies far behind the prompt in the row, and right behind it in position.
    seen = mask_of((TREE,), 8, window=2)
    assert seen[7].nonzero().flatten().tolist() == [1, 7]
    assert seen[5].nonzero().flatten().tolist() == [3, 5]


def test_a_row_is_cut_into_as_few_sequences_as_can_be():
    pieces = pieces_of((TREE, Group(8, 3, (4, 5))))
    assert [(piece.before, piece.own) for piece in pieces] == [
        ((), (0, 1, 2)),
        ((0, 1), (3,)),
        ((0,), (4,)),
        ((), (5, 6)),
        ((5,), (7,)),
    ]


@given(SHAPES, st.none() | st.integers(1, 20))
@settings(max_examples=50, deadline=None)
def test_pieces_and_mask_agree(shapes, window):
    groups, n = groups_of(shapes)
    segments = segments_of(groups)
    assert [segment.start for segment in segments] == [
        sum(s.length for s in segments[:i]) for i in range(len(segments))
    ]
    expected = torch.zeros(n, n, dtype=torch.bool)
    for piece in pieces_of(groups):
        tokens = [
            segments[number].start + i for number in piece.before + piece.own for i in range(segments[number].length)
        ]
        n_own = sum(segments[number].length for number in piece.own)
        for i in range(len(tokens) - n_own, len(tokens)):
            for j in range(max(0, i + 1 - (window or n)), i + 1):
                expected[tokens[i], tokens[j]] = True
    assert torch.equal(mask_of(groups, n, window=window), expected)
