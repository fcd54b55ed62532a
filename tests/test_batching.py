"""Rows of packed pairs: layout, budget, and that no pair is lost."""

from hypothesis import given
from hypothesis import strategies as st

from critrm.augment import Budget
from critrm.batching import EncodedPair, encode_pair, pack, token_batches
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
