"""The texts of a report: each arm's critiques as the reward model read them, and the one example of Table 3."""

from collections.abc import Mapping

from critrm.report_data import Report, ReportCell, main_cells
from critrm.store import file_name, read_records
from critrm.types import CritiquedPair, PreferencePair

ArmTexts = dict[str, tuple[str, str]]
"""Pair id -> the critiques of the chosen and of the rejected completion."""


def arm_texts(cell: ReportCell, test: str) -> dict[str, ArmTexts]:
    """Critic -> critiques of a test set; a critic whose file is gone is left out."""
    found = {}
    for critic in cell.critics:
        path = cell.folder / "augment" / test / f"{file_name(critic)}.jsonl"
        if path.is_file():
            items = read_records(path, CritiquedPair)
            found[critic] = {item.pair.id: (item.chosen_critique, item.rejected_critique) for item in items}
    return found


def example(report: Report) -> tuple[PreferencePair, Mapping[str, ArmTexts]] | None:
    """The pair whose texts are shortest among those that every critic has written of; None without any."""
    for cell in main_cells(report.cells):
        for test, pairs in report.pairs.items():
            texts = arm_texts(cell, test)
            shown = [pair for pair in pairs if texts and all(pair.id in found for found in texts.values())]
            if shown:

                def length(pair: PreferencePair, texts: Mapping[str, ArmTexts] = texts) -> tuple[int, str]:
                    said = sum(len(found[pair.id][0]) for found in texts.values())
                    return said + len(pair.chosen) + sum(len(turn.content) for turn in pair.prompt), pair.id

                return min(shown, key=length), texts
    return None
