"""Arms that mix critics: of each pair the critiques of one of them. What does a better critic of some pairs gain?"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from critrm.store import content_hash
from critrm.types import Critique, PreferencePair


def mix_critiques(
    pairs: Sequence[PreferencePair],
    critiques: Mapping[str, Sequence[Critique]],
    shares: Mapping[str, float],
    *,
    name: str,
) -> list[Critique]:
    """Give each pair the critiques of one critic, under the mixture's name.

    Which critic's depends on the pair's id alone. Where a mixture of the same critics, in the same order, gives the
    first of them a larger share, it keeps all pairs that it had.

    Args:
        pairs: the pairs whose critiques are mixed.
        critiques: critic -> its critiques.
        shares: critic -> its share of the pairs; they add up to 1.
        name: of the mixture.
    """
    critic_of = {pair.id: _drawn(pair.id, shares) for pair in pairs}
    return [
        replace(row, critic=name)
        for critic in shares
        for row in critiques[critic]
        if critic_of.get(row.pair_id) == critic
    ]


def _drawn(pair_id: str, shares: Mapping[str, float]) -> str:
    point, end = int(content_hash(pair_id)[:12], 16) / 16**12, 0.0
    for critic, share in shares.items():
        end += share
        if point < end:
            return critic
    return list(shares)[-1]  # rounding may leave the shares a little below 1
