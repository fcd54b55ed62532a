"""Stage 6: how good are the critiques? Precision, recall and F1 of their atomic information units (Appendix E).

A grader (any chat model) splits a critique and a reference critique of the same completion into units that make one
point each, and checks them; `grader.py` makes the calls, `information_units.py` counts.
"""

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from critrm.budget import Ledger
from critrm.critics import open_chat, price_of, sampling_of
from critrm.critique_cache import CritiqueCache, default_cache_path
from critrm.critique_files import read_critiques
from critrm.errors import ConfigError, DataError
from critrm.grader import MAX_TOKENS, Grader, OnAnswer, check_cases, meta_critique
from critrm.information_units import (
    Grade,
    LabelAgreement,
    MetaResult,
    agreement,
    read_annotations,
    summarise_grades,
)
from critrm.preferences import read_pairs
from critrm.questions import ModelFlags, progress
from critrm.store import read_rows, write_manifest, write_records, write_text
from critrm.types import Interval

Graded = tuple[list[Grade], dict[str, Any]]
"""Grades, and the grader's settings for the manifest."""


def command(
    critiques: Path | None = None,
    *,
    out: Path,
    pairs: str = "",
    reference: Path | None = None,
    answers: Path | None = None,
    recorded: Path | None = None,
    split: str = "",
    source: str = "",
    subset: str = "",
    limit: int | None = None,
    skip_bad: bool = False,
    flags: ModelFlags = ModelFlags(),  # noqa: B008 - frozen
) -> None:
    """Grade critiques by their atomic information units; the same command goes on where it was interrupted.

    Args:
        critiques: the critiques to grade, of one critic or several.
        out: folder for the grades and the result.
        pairs: the preference pairs that they are about: a file or a hub id.
        reference: the critiques that recall is measured against, by any one critic.
        answers: reference answers, rows with `pair_id` and `answer`; the grader writes those that are missing.
        recorded: MetaCritique's human-labelled critiques instead; a model's labels are compared with the humans'.
        split: only pairs of this split.
        source: only pairs of these sources, comma separated.
        subset: only pairs of these subsets, comma separated.
        limit: only so many pairs, or so many recorded questions.
        skip_bad: leave out rows that cannot be read instead of stopping at the first.
        flags: the grader.
    """
    started, console, ledger = time.time(), Console(), Ledger()
    agreements: dict[str, LabelAgreement] = {}
    if recorded is not None:
        if critiques or reference or pairs or answers:
            raise ConfigError("--recorded holds its own questions and critiques: give no other files beside it")
        human, (grades, facts) = _grade_recorded(recorded, flags, limit=limit, ledger=ledger)
        agreements = human_agreement(grades, human) if flags.name else {}
    elif critiques is None or reference is None or not pairs:
        raise ConfigError("name the critiques, their --pairs and the --reference critiques, or give --recorded FILE")
    else:
        found = read_pairs(
            pairs, split=split, source=source, subset=subset, limit=limit, skip_bad=skip_bad, allow_empty=True
        ).pairs
        rows, references = read_critiques(critiques), read_critiques(reference)
        known = read_answers(answers) if answers else {}
        grades, facts = _call(
            flags,
            lambda grader: meta_critique(found, rows, references=references, grader=grader, answers=known),
            ledger=ledger,
        )
    results, grader_name = summarise_grades(grades), flags.name or "human"
    write_records(out / "grades.jsonl", map(grade_row, grades))
    content = {
        "grader": grader_name,
        "results": [asdict(each) for each in results],
        "agreement_with_human_labels": {name: asdict(each) for name, each in agreements.items()},
    }
    write_text(out / "metacritique.json", json.dumps(content, indent=2) + "\n")
    files = [str(path) for path in (critiques, pairs or None, reference, answers, recorded) if path]
    facts |= {"files": files, "ledger": ledger.facts()}
    write_manifest(out, config=facts, started=started, inputs=files, cost=ledger.cost + ledger.cost_cached)
    console.print(results_table(results, grader=grader_name, agreements=agreements))
    console.print(f"Result: {out / 'metacritique.json'}", soft_wrap=True, markup=False)


def read_answers(path: str | Path) -> dict[str, str]:
    """Read reference answers: rows with `pair_id` and `answer`.

    Raises:
        DataError: a row lacks one, or a pair is repeated; names file, line and field.
    """
    found: dict[str, str] = {}
    for number, row in read_rows(path):
        pair_id, answer = row.get("pair_id"), row.get("answer")
        if not isinstance(pair_id, (str, int)) or isinstance(pair_id, bool) or str(pair_id) in found:
            raise DataError("missing, or a second answer of a pair", path=str(path), line=number, field="pair_id")
        if not isinstance(answer, str) or not answer.strip():
            raise DataError("missing: it must be text", path=str(path), line=number, field="answer")
        found[str(pair_id)] = answer
    return found


def _grade_recorded(path: Path, flags: ModelFlags, *, limit: int | None, ledger: Ledger) -> tuple[list[Grade], Graded]:
    """The humans' grades, and the model's; without a model the humans' again."""
    if limit is not None and limit < 1:
        raise ConfigError(f"the limit must be at least 1, not {limit}")
    annotated = read_annotations(path)
    kept = set(list(dict.fromkeys(case.pair_id for case, _ in annotated))[:limit])
    cases = [case for case, _ in annotated if case.pair_id in kept]
    human = [grade for _, grade in annotated if grade.pair_id in kept]
    if not flags.name:
        return human, (human, {})
    return human, _call(flags, lambda grader: check_cases(cases, grader), ledger=ledger)


def human_agreement(grades: Sequence[Grade], human: Sequence[Grade]) -> dict[str, LabelAgreement]:
    """How far the labels of both kinds agree with those that humans gave to the same critiques, in the same order."""
    return {
        "precision": agreement(
            _all(grade.precision_labels for grade in grades), _all(g.precision_labels for g in human)
        ),
        "recall": agreement(_all(grade.recall_labels for grade in grades), _all(g.recall_labels for g in human)),
    }


def _all(labels: Iterable[tuple[bool | None, ...]]) -> list[bool | None]:
    return [label for each in labels for label in each]


def _call(flags: ModelFlags, grade: Callable[[Grader], list[Grade]], *, ledger: Ledger) -> Graded:
    """Grade by the model that the flags name."""
    settings = flags.settings(max_tokens=MAX_TOKENS)
    with CritiqueCache(flags.cache or default_cache_path()) as store, progress(Console()) as bar:

        def watch(round_name: str, n_calls: int) -> OnAnswer:
            task = bar.add_task(round_name, total=n_calls, ledger="")
            return lambda n: bar.update(task, advance=n, ledger=ledger.line())

        grader = Grader(
            chat=open_chat(settings),
            name=flags.name,
            cache=store,
            sampling=sampling_of(settings),
            retry_failed=flags.retry_failed,
            price=price_of(settings),
            purse=flags.purse(settings),
            ledger=ledger,
            watch=watch,
        )
        grades = grade(grader)
    return grades, settings.model_dump(mode="json", exclude={"template", "file", "samples"})


def grade_row(grade: Grade) -> dict[str, Any]:
    """A grade as it is written: the record and its scores."""
    return asdict(grade) | {"precision": grade.precision, "recall": grade.recall, "f1": grade.f1}


def results_table(results: Sequence[MetaResult], *, grader: str, agreements: Mapping[str, LabelAgreement]) -> Table:
    """Table 4 for the terminal, with what could not be graded."""
    table = Table(title=f"MetaCritique, graded by {escape(grader)}")
    for index, title in enumerate(("critic", "n", "units", "precision", "recall", "F1", "no F1")):
        table.add_column(title, justify="left" if index == 0 else "right")
    lines = ["means over critiques \\[95 % bootstrap interval over pairs]"]
    for each in results:
        scores = [_cell(score) for score in (each.precision, each.recall, each.f1)]
        counts = (str(each.n_critiques), str(each.n_units))
        table.add_row(escape(each.critic), *counts, *scores, str(each.undefined["f1"]))
        if each.n_unscored:
            lines.append(f"{escape(each.critic)}: {each.n_unscored} verdicts unscored")
        lines += [f"{escape(each.critic)}: {n} x {escape(reason)}" for reason, n in each.reasons.items()]
    for name, found in agreements.items():
        kappa = "-" if found.kappa is None else f"{found.kappa:.3f}"
        share = "-" if found.accuracy is None else f"{found.accuracy:.3f}"
        lines.append(f"{name} labels: {share} as the humans', kappa {kappa} (n = {found.n})")
    table.caption = "\n".join(lines)
    return table


def _cell(score: Interval | None) -> str:
    return "-" if score is None else f"{score.value:.3f} \\[{score.low:.2f}, {score.high:.2f}]"
