"""Dialects whose row is a list of completions, not a pair: each becomes several pairs `<id>#0`, `<id>#1`, ...

A list is put together again where it is counted (`benchmarks`), by the id up to the last `#`.
"""

import json
from collections.abc import Callable
from typing import Any

from critrm.dialects import Fields, bad_field, checked_text, literal_messages, text_field
from critrm.store import Rows
from critrm.types import SIDES

RMB_LISTS = "rmb-lists"
"""The dialect, only when asked for, that reads RMB's pairs as its best-of-n lists."""

STYLES = ("concise", "detailed", "markdown")
"""RM-Bench's three styles of each response, from the plainest to the fanciest."""

# From the labels of the hub's file, and of the released ones, to the benchmark's domains.
_RM_DOMAINS = {
    "chat": "chat",
    "math": "math",
    "code": "code",
    "safety-refuse": "safety-refuse",
    "safety-response": "safety-response",
    "alpacaeval": "chat",
    "bigcode/humanevalpack": "code",
    "xstest-should-respond": "safety-response",
    "xstest-should-refuse": "safety-refuse",
    "refusals-dangerous": "safety-refuse",
    "refusals-offensive": "safety-refuse",
}


def style_match(chosen_style: int, rejected_style: int) -> str:
    """RM-Bench: hard where the rejected response has the fancier style, easy where the chosen one has."""
    return "normal" if chosen_style == rejected_style else "hard" if chosen_style < rejected_style else "easy"


def _texts(row: Fields, field: str, *, n: int | None = None) -> list[str]:
    value = row.get(field)
    if not isinstance(value, list) or not value:
        raise bad_field(field, "missing" if value is None else "must be a list of texts, not empty")
    if n is not None and len(value) != n:
        raise bad_field(field, f"must be a list of {n} texts, not {len(value)}")
    return [checked_text(each, field) for each in value]


def _rm_bench(row: Fields) -> list[Fields]:
    """RM-Bench: three chosen and three rejected responses by style, nine pairs; `source` says easy, normal or hard."""
    prompt = literal_messages(row.get("prompt"), "prompt")
    chosen, rejected = (_texts(row, side, n=len(STYLES)) for side in SIDES)
    label = text_field(row, "domain") if row.get("domain") else text_field(row, "subset")
    domain = _RM_DOMAINS.get(label, label)
    # The released files number their rows each on their own.
    own = {} if row.get("id") in (None, "") else {"id": f"{domain}-{row['id']}"}
    return [
        own
        | {
            "prompt": prompt,
            "chosen": better,
            "rejected": worse,
            "subset": domain,
            "source": style_match(i, j),
        }
        for i, better in enumerate(chosen)
        for j, worse in enumerate(rejected)
    ]


def _chosen_against_rejected(prompt: Any, chosen: list[str], rejected: list[str]) -> list[Fields]:
    """So many pairs that each completion is in one: whether all chosen beat all rejected shows in their rewards."""
    n = max(len(chosen), len(rejected))
    return [
        {"prompt": prompt, "chosen": chosen[i % len(chosen)], "rejected": rejected[i % len(rejected)]} for i in range(n)
    ]


def _best_of_n(row: Fields) -> list[Fields]:
    """RewardBench 2 and its like: one or more right completions, and the wrong ones."""
    chosen = [text_field(row, "chosen")] if isinstance(row.get("chosen"), str) else _texts(row, "chosen")
    prompt = literal_messages(row.get("prompt"), "prompt")
    return _chosen_against_rejected(prompt, chosen, _texts(row, "rejected"))


def _rmb_best_of_n(row: Fields) -> list[Fields]:
    """RMB's best-of-n lists: the best answer and its losers."""
    losers, best = row.get("loser_list"), row.get("bon_best")
    if not isinstance(best, dict):
        raise bad_field("bon_best", "must be an object with an answer")
    if not isinstance(losers, list) or not losers or not all(isinstance(each, dict) for each in losers):
        raise bad_field("loser_list", "must be a list of objects, each with an answer")
    prompt = literal_messages(row.get("conversation_input"), "conversation_input")
    rejected = [text_field(each, "answer") for each in losers]
    found = _chosen_against_rejected(prompt, [text_field(best, "answer")], rejected)
    own = {"id": row["bon_uid"]} if row.get("bon_uid") else {}
    return [fields | own | {"subset": row.get("category_path")} for fields in found]


def rmb_lists(rows: Rows) -> Rows:
    """RMB's pairs -> best-of-n lists: those with one conversation and one winner, if it has two losers or more.

    A list stands where its first pair does, and has that pair's id.
    """
    lists: dict[str, tuple[int, Fields]] = {}
    for number, row in rows:
        prompt, best = row.get("conversation_input"), row.get("chosen")
        answer = best.get("answer") if isinstance(best, dict) else best
        new: Fields = row | {"bon_uid": row.get("pair_uid"), "bon_best": best, "loser_list": []}
        _, found = lists.setdefault(json.dumps([prompt, answer], sort_keys=True), (number, new))
        if row.get("reject") not in found["loser_list"]:
            found["loser_list"].append(row.get("reject"))
    for number, found in lists.values():
        # A row that is no pair of RMB's is passed on: its reader says what is wrong with it.
        if len(found["loser_list"]) > 1 or not isinstance(found["bon_best"], dict):
            yield number, found


def _holds_texts(value: object) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], str)


LIST_DIALECTS: dict[str, tuple[Callable[[Fields], bool], Callable[[Fields], list[Fields]]]] = {
    "rmb-best-of-n": (lambda row: "bon_best" in row and "loser_list" in row, _rmb_best_of_n),
    "rm-bench": (
        # Other lists may hold three of each as well: only the benchmark's own domains tell it from them.
        lambda row: (
            all(_holds_texts(row.get(side)) and len(row[side]) == len(STYLES) for side in SIDES)
            and str(row.get("domain") or row.get("subset")) in _RM_DOMAINS
            and "num_correct" not in row
        ),
        _rm_bench,
    ),
    "best-of-n": (lambda row: "prompt" in row and _holds_texts(row.get("rejected")) and "chosen" in row, _best_of_n),
}
"""Name -> how a row of it is recognised, and the fields of its pairs. `best-of-n` also reads RewardBench 2."""
