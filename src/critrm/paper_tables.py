"""The paper's numbers, so that a report lays them beside ours: Tables 1, 2 and 4, and what its text reads off curves.

They are copied from the paper as printed. The plots themselves give no numbers: a reading is what the text states.
"""

import csv
import re
from dataclasses import dataclass
from pathlib import Path

PAPER = Path(__file__).with_name("data") / "paper"
NO_CRITIQUES = "No-Critiques"
"""The paper's name of the arm without critiques."""
SECTIONS = ("Chat", "Chat Hard", "Safety", "Reasoning")
PANDALM = "PandaLM"
CHECKPOINTS = ("LLaMA-7B Base", "Command-35B Base", "Command R-35B")
"""The backbones of Table 2 that reward models were trained from (section 4.3)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PaperCount:
    """A row of Table 1: how many pairs a test set has."""

    benchmark: str
    dataset: str
    n_examples: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PaperAccuracy:
    """A row of Table 2: accuracy by section and on PandaLM; None where the paper has a dash."""

    checkpoint: str
    critic: str
    accuracy: dict[str, float | None]

    @property
    def average(self) -> float:
        """The plain mean of RewardBench's four sections, which is that benchmark's headline."""
        values = [self.accuracy[name] for name in SECTIONS]
        return sum(value for value in values if value is not None) / len(values)


@dataclass(frozen=True, slots=True, kw_only=True)
class PaperQuality:
    """A row of Table 4: MetaCritique's scores."""

    critic: str
    precision: float
    recall: float
    f1: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PaperReading:
    """A number that the text states about a figure."""

    section: str
    critic: str
    """Whose critiques; empty where the text names nobody."""
    checkpoint: str
    measure: str
    """`gain` in the average score, `plain_pairs` (or `_above`) of the same accuracy, `rate` of both, ..."""
    n_train: int | None
    value: float
    quote: str
    """The words of the paper."""


def table1() -> list[PaperCount]:
    """Table 1: the test sets."""
    return [
        PaperCount(benchmark=row["benchmark"], dataset=row["dataset"], n_examples=int(row["n_examples"]))
        for row in _rows("table1")
    ]


def table2() -> list[PaperAccuracy]:
    """Table 2: accuracy by checkpoint, critic and section, with the judges and the state of the art below."""
    return [
        PaperAccuracy(
            checkpoint=row["checkpoint"],
            critic=row["critic"],
            accuracy={name: float(row[name]) if row[name] else None for name in (*SECTIONS, PANDALM)},
        )
        for row in _rows("table2")
    ]


def table4() -> list[PaperQuality]:
    """Table 4: how good the critiques are."""
    return [
        PaperQuality(critic=row.pop("critic"), **{name: float(value) for name, value in row.items()})
        for row in _rows("table4")
    ]


def readings() -> list[PaperReading]:
    """What the text reads off Figures 2 to 4 and 6."""
    return [
        PaperReading(
            section=row["section"],
            critic=row["critic"],
            checkpoint=row["checkpoint"],
            measure=row["measure"],
            n_train=int(row["n_train"]) if row["n_train"] else None,
            value=float(row["value"]),
            quote=row["quote"],
        )
        for row in _rows("readings")
    ]


def paper_gains() -> dict[str, dict[str, float]]:
    """Critic -> checkpoint -> how much its critiques add to the average over RewardBench's sections, from Table 2."""
    plain = {row.checkpoint: row.average for row in table2() if row.critic == NO_CRITIQUES}
    gains: dict[str, dict[str, float]] = {}
    for row in table2():
        if row.critic != NO_CRITIQUES and row.checkpoint in plain:
            gains.setdefault(row.critic, {})[row.checkpoint] = row.average - plain[row.checkpoint]
    return gains


def same_name(ours: str, papers: str) -> bool:
    """Whether a critic or section of ours is the paper's, however it is spelled (`gpt-4-turbo`, `GPT4-Turbo`)."""
    return _letters(ours) == _letters(papers)


def _letters(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.rsplit("/", 1)[-1].lower().replace("+", "plus"))


def _rows(name: str) -> list[dict[str, str]]:
    with open(PAPER / f"{name}.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))
