"""Arms as files: what `critrm augment` wrote is read again to be evaluated, trained on or taken apart (section 3.2)."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from critrm.benchmarks.best_of_n import list_id
from critrm.errors import CriticMismatch, DataError
from critrm.store import read_records, read_rows
from critrm.types import CritiquedPair, PreferencePair


def read_arm(path: str) -> tuple[CritiquedPair, ...] | None:
    """The pairs of an arm's file; None for any other file and for a hub id.

    Raises:
        DataError: a row lacks a field or is malformed; names file and line.
    """
    if not Path(path).is_file():
        return None
    try:
        _, row = next(iter(read_rows(path)))
    except DataError:
        return None  # read_pairs says what is wrong with it, or leaves the row out
    return tuple(read_records(path, CritiquedPair)) if "pair" in row else None


def read_training_arm(path: str, items: Sequence[CritiquedPair]) -> tuple[CritiquedPair, ...]:
    """The training pairs of the arm that test pairs belong to.

    Args:
        path: the arm's file.
        items: the test pairs.

    Raises:
        DataError: it is no arm's file, or holds some of the test pairs.
        CriticMismatch: it is the arm of another critic.
    """
    found = read_arm(path)
    if found is None:
        raise DataError("not an arm that `critrm augment` wrote", path=path)
    if only_critic(found) != items[0].critic:
        raise CriticMismatch(
            f"--train {path} is of critic {only_critic(found)!r}, the pairs are of {items[0].critic!r}"
        )
    refuse_shared(found, items, path=path)
    return found


def only_critic(pairs: Sequence[CritiquedPair]) -> str:
    """The critic of all pairs; raises a DataError where there is not exactly one."""
    critics = sorted({item.critic for item in pairs})
    if len(critics) != 1:
        raise DataError(f"pairs of one critic are needed, got {critics or 'no pairs'}", field="critic")
    return critics[0]


def refuse_shared(train_items: Sequence[CritiquedPair], items: Sequence[CritiquedPair], *, path: str = "") -> None:
    """Raise a DataError where training pairs are tested: baselines that learnt their labels would only recall them."""
    train = {item.pair.id for item in train_items}
    shared = [item.pair.id for item in items if item.pair.id in train]
    if shared:
        raise DataError(
            f"{len(shared)} of the {len(items)} test pairs are training pairs, such as {shared[0]!r}: name the pairs "
            "that the arm was trained on, none of which is tested",
            path=path,
            field="id",
        )


def with_dropped(items: Sequence[CritiquedPair], facts: Path) -> tuple[PreferencePair, ...]:
    """An arm's pairs, and those that `critrm augment` dropped (`augment.json` says which) of lists that it has."""
    pairs = {item.pair.id: item.pair for item in items}
    dropped = next(iter(read_rows(facts)))[1].get("dropped_pairs") if facts.is_file() else None
    of_list = {list_id(pair_id): pair for pair_id, pair in pairs.items()}
    for pair_id in dropped or ():
        if list_id(pair_id) in of_list:
            # Their texts are not known, nor needed to count the list.
            pairs.setdefault(pair_id, replace(of_list[list_id(pair_id)], id=pair_id))
    return tuple(pairs.values())
