"""Rows of packed pairs and candidates: layout, budget, sharing, and that none is lost."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from critrm.augment import Budget
from critrm.batching import (
    Candidates,
    EncodedPair,
    EncodedTree,
    encode_candidates,
    encode_pair,
    memory_advice,
    pack,
    pack_trees,
    token_batches,
)
from critrm.errors import DataError, ModelError
from critrm.types import CritiquedPair, Message, PreferencePair


def test_pack_lays_out_the_documented_example():
    batch = pack([EncodedPair("a", [5, 6], ([7, 8], [9])), EncodedPair("b", [5], ([1], [2, 3]), margin=0.5)])
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9, 5, 1, 2, 3]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 2, 0, 1, 1, 2]]
    assert batch.score_positions.tolist() == [[3, 4], [6, 8]]
    assert [(g.start, g.n_prompt, g.n_branches) for g in batch.groups] == [(0, 2, (2, 1)), (5, 1, (1, 2))]
    assert batch.margins.tolist() == [0.0, 0.5]


TOKENS = st.lists(st.integers(0, 9), min_size=1, max_size=30)


@given(st.lists(st.tuples(TOKENS, TOKENS, TOKENS), max_size=40), st.integers(1, 100), st.integers(1, 10))
def test_token_batches_hold_every_pair_once_within_the_budget(parts, max_tokens, window):
    pairs = [EncodedPair(str(i), prompt, (a, b)) for i, (prompt, a, b) in enumerate(parts)]
    batches = list(token_batches(pairs, max_tokens_per_step=max_tokens, window=window))
    assert sorted(pair.pair_id for batch in batches for pair in batch) == sorted(pair.pair_id for pair in pairs)
    assert all(len(batch) == 1 or sum(pair.n_tokens for pair in batch) <= max_tokens for batch in batches)


def test_encode_pair_counts_the_bos_token_towards_the_budget():
    pair = PreferencePair(id="p", prompt=(Message("user", "x" * 50),), chosen="abcdef", rejected="gh")
    item = CritiquedPair(pair=pair, critic="c", chosen_critique="good", rejected_critique="bad")
    encoded = encode_pair(item, lambda text: list(text.encode()), bos=[1], budget=Budget(120), margin=0.25)
    assert encoded.prompt[0] == 1
    assert max(len(encoded.prompt) + len(branch) for branch in encoded.branches) <= 120
    assert encoded.margin == 0.25


def test_an_empty_side_is_scored_at_the_end_of_its_prompt():
    batch = pack([EncodedPair("a", [5, 6], ([7], [])), EncodedPair("b", [1], ([], [2]))])
    assert batch.score_positions.tolist() == [[2, 1], [3, 4]]


def test_pack_trees_lays_out_the_documented_example():
    tree = EncodedTree([5], (([6], ([7, 8], [9])),), ((0, 0, 0), (0, 0, 1)))
    batch = pack_trees([tree, EncodedTree([1], (([2], ([],)), ([3, 4], ([], [5]))), ())])
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9, 1, 2, 3, 4, 5]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 2, 0, 1, 1, 2, 3]]
    assert batch.score_positions.tolist() == [3, 4, 6, 8, 9]
    assert [(g.start, g.n_prompt, g.n_branches, g.n_twigs) for g in batch.groups] == [
        (0, 1, (1,), ((2, 1),)),
        (5, 1, (1, 2), ((), (1,))),
    ]


def _trees(completions, critiques=(), *, max_length=400, max_tokens=10**6):
    candidates = Candidates(prompt=(Message("user", "Q?"),), completions=completions, critiques=critiques)
    encode = lambda text: list(text.encode())  # noqa: E731
    return list(
        encode_candidates(candidates, encode, bos=[1], budget=Budget(max_length), max_tokens=max_tokens, number=7)
    )


def test_prompts_and_completions_are_read_once():
    (tree,) = _trees(("abc", "d", "abc"), (("good", "bad"), ("fine",), ("so so",)))
    assert bytes(tree.prompt[1:]).decode().count("Q?") == 1
    assert [(bytes(y).decode(), len(twigs)) for y, twigs in tree.branches] == [(" abc", 3), (" d", 1)]
    assert tree.places == ((7, 0, 0), (7, 0, 1), (7, 2, 0), (7, 1, 0))
    assert tree.n_tokens == pack_trees([tree]).input_ids.shape[1]


@given(st.lists(st.sampled_from(["a", "bb", "c" * 30]), max_size=6), st.integers(1, 200), st.booleans())
def test_every_reading_is_in_one_tree_within_the_budget(completions, max_tokens, with_critiques):
    critiques = tuple((f"critique {i}", "and another") for i in range(len(completions))) if with_critiques else ()
    trees = _trees(tuple(completions), critiques, max_tokens=max_tokens)
    assert sorted(place for tree in trees for place in tree.places) == [
        (7, i, j) for i in range(len(completions)) for j in range(2 if with_critiques else 1)
    ]
    assert all(tree.n_tokens <= max_tokens or len(tree.places) == 1 for tree in trees)


def test_a_reading_is_cut_by_itself():
    short, long = _trees(("abc", "x" * 500), max_length=60)
    assert len(short.prompt) > len(long.prompt)
    assert long.n_tokens == 60


def test_critiques_of_other_completions_are_refused():
    with pytest.raises(DataError, match="critiques of 1 completions, but there are 2"):
        _trees(("a", "b"), (("good",),))


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.\nmore lines"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes."),
        RuntimeError("not enough memory: you tried to allocate 99 bytes."),
        MemoryError(),
    ],
)
def test_out_of_memory_becomes_advice(error):
    with pytest.raises(ModelError, match=r"^memory ran out \(.*\)\. Lower it\.$"), memory_advice("Lower it."):
        raise error


def test_other_errors_stay_what_they_are():
    with pytest.raises(RuntimeError, match="shapes"), memory_advice("Lower it."):
        raise RuntimeError("shapes do not match")
