"""The pairs of a report as data for its page: texts once each, every arm's scores, and what each sentence did.

The page reads these keys:

    texts       every text once; all else names texts by their place
    tests       name, and pairs as [id, subset, [[role, text], ...], chosen, rejected]
    critiques   sets of [critique of chosen, critique of rejected] per pair of a test set, or null
    models      one per run and test set: label, test, number of seeds, and arms with critic, critiques and scores
                (mean reward of chosen, of rejected, seeds that order the pair rightly) or null per pair
    effects     critic -> test set -> pair's place -> per side [[length, effect, aspect], ...]
"""

import json
import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from critrm.attribution_files import Attribution, read_attributions
from critrm.report_data import Report, ReportCell, label_of
from critrm.report_texts import ArmTexts, arm_texts
from critrm.store import file_name
from critrm.types import SIDES, Outcome, PreferencePair, Score

Json = dict[str, Any]


class Texts:
    """Every text once, by its place."""

    def __init__(self) -> None:
        """Start with none."""
        self.places: dict[str, int] = {}

    def place(self, text: str) -> int:
        """Where a text is."""
        return self.places.setdefault(text, len(self.places))


def explorer(report: Report, *, n_pairs: int) -> Json:
    """The data of the page's explorer.

    Args:
        report: the report; test sets without pairs are left out.
        n_pairs: at most so many pairs of each test set, from its beginning.

    Raises:
        DataError: an arm's critiques or an attribution cannot be read.
    """
    texts = Texts()
    tests: list[Json] = []
    models: list[Json] = []
    critiques: list[list[list[int] | None]] = []
    known: dict[str, int] = {}
    effects: dict[str, dict[int, dict[int, Any]]] = {}
    attributions = _attributions(report.folder)
    for test, all_pairs in report.pairs.items():
        pairs = all_pairs[:n_pairs]
        if not pairs:
            continue
        number = len(tests)
        tests.append({"name": test, "n_all": len(all_pairs), "pairs": [_pair(pair, texts) for pair in pairs]})
        for cell in report.cells:
            found = arm_texts(cell, test)
            sets: dict[str, int] = {}
            for critic, said in found.items():
                rows = [_said(said, pair, texts) for pair in pairs]
                key = json.dumps([number, rows])
                if key not in known:
                    known[key] = len(critiques)
                    critiques.append(rows)
                sets[critic] = known[key]
                if critic in attributions:
                    by_pair = _effects(pairs, said, attributions[critic])
                    effects.setdefault(critic, {}).setdefault(number, {}).update(by_pair)
            models.append(_model(cell, report.cells, test, number, pairs, sets))
    return {
        "texts": list(texts.places),
        "tests": tests,
        "critiques": critiques,
        "models": models,
        "effects": effects,
        "scale": _scale(effects),
    }


def _pair(pair: PreferencePair, texts: Texts) -> list[Any]:
    turns = [[message.role, texts.place(message.content)] for message in pair.prompt]
    return [pair.id, pair.subset or pair.source, turns, texts.place(pair.chosen), texts.place(pair.rejected)]


def _said(said: ArmTexts, pair: PreferencePair, texts: Texts) -> list[int] | None:
    found = said.get(pair.id)
    return None if found is None else [texts.place(text) for text in found]


def _model(
    cell: ReportCell,
    cells: Sequence[ReportCell],
    test: str,
    number: int,
    pairs: Sequence[PreferencePair],
    sets: Mapping[str, int],
) -> Json:
    return {
        "label": label_of(cell, cells),
        "test": number,
        "n_seeds": cell.n_runs,
        "n_train": cell.n_train,
        "arms": [
            {
                "critic": critic,
                "critiques": sets.get(critic),
                "scores": [_scores([scores[pair.id] for scores in by_seed]) for pair in pairs],
            }
            for critic, by_seed in cell.scores[test].items()
        ],
    }


def _scores(by_seed: Sequence[Score]) -> list[float] | None:
    """Mean rewards, and how many seeds order the pair rightly; None where a seed's reward is not a number."""
    if any(score.outcome is Outcome.UNSCORED for score in by_seed):
        return None
    chosen, rejected = (math.fsum(getattr(score, side) for score in by_seed) / len(by_seed) for side in SIDES)
    if not (math.isfinite(chosen) and math.isfinite(rejected)):
        return None
    return [round(chosen, 4), round(rejected, 4), sum(score.outcome is Outcome.RIGHT for score in by_seed)]


def _attributions(folder: Path) -> dict[str, dict[tuple[str, str], Attribution]]:
    """Critic -> (pair id, side) -> effects, of all that `critrm attribute` wrote below the folder."""
    found: dict[str, dict[tuple[str, str], Attribution]] = {}
    for path in sorted(folder.rglob("attribution.jsonl")):
        for each in read_attributions(path):
            found.setdefault(each.critic, {}).setdefault((each.pair_id, each.side), each)
    return found


def _effects(
    pairs: Sequence[PreferencePair], said: ArmTexts, attributions: Mapping[tuple[str, str], Attribution]
) -> dict[int, Any]:
    """Pair's place -> per side the sentences' lengths, effects and aspects; None for a side of another text.

    Lengths are in UTF-16 units, as a browser counts.
    """
    found = {}
    for number, pair in enumerate(pairs):
        sides: list[list[list[Any]] | None] = []
        for side, critique in zip(SIDES, said.get(pair.id, ("", "")), strict=True):
            each = attributions.get((pair.id, side))
            is_same = each is not None and "".join(sentence.text for sentence in each.sentences) == critique
            sides.append(
                [
                    [_length(sentence.text), _finite(sentence.effect), sentence.aspect]
                    for sentence in (each.sentences if each else ())
                ]
                if is_same
                else None
            )
        if any(sides):
            found[number] = sides
    return found


def _length(text: str) -> int:
    return len(text.encode("utf-16-le", "surrogatepass")) // 2


def _finite(effect: float) -> float | None:
    return round(effect, 4) if math.isfinite(effect) else None


def _scale(effects: Mapping[str, Mapping[int, Mapping[int, Any]]]) -> float:
    """The effect of full colour: of all, the largest but a few."""
    sizes = sorted(
        abs(effect)
        for tests in effects.values()
        for by_pair in tests.values()
        for sides in by_pair.values()
        for side in sides
        for _, effect, _ in side or ()
        if effect is not None
    )
    return (sizes[math.ceil(0.98 * len(sizes)) - 1] if sizes else 0.0) or 1.0


def attribute_command(report: Report) -> str:
    """How to get the sentences' effects for this folder; empty where no arm reads critiques."""
    cell = next((cell for cell in report.cells if cell.critics), None)
    if cell is None:
        return ""
    critic, test = file_name(cell.critics[-1]), next(iter(cell.tests))
    model = cell.folder / "train" / critic / f"seed-{report.seeds[0]}" / "model"
    arm = cell.folder / "augment" / test / f"{critic}.jsonl"
    out = report.folder / "attribution" / critic
    return shlex.join(["critrm", "attribute", str(model), str(arm), "--out", str(out)])


def embedded(content: Json) -> str:
    """JSON that can stand in a script element: nothing in it ends the element, whatever the texts hold."""
    # ASCII alone, so that half an emoji, which has no UTF-8 form, comes through as well.
    return json.dumps(content, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
