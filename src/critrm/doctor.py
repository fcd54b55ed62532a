"""Checks a backbone, its tokenizer and a data set before money is spent on them (sections 3.2, 4.1 and 4.2).

The checks themselves are in `model_checks.py` and `data_checks.py`: functions that return findings.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from critrm.augment import augment_pairs, text_encoder
from critrm.critique_files import read_critiques
from critrm.data_checks import check_critics, check_lengths, check_pairs, first_sample
from critrm.errors import ConfigError, DataError
from critrm.findings import Finding, findings_table
from critrm.model_checks import check_reward_model, check_tokenizer
from critrm.models import load_tokenizer
from critrm.preferences import read_pairs
from critrm.store import write_text
from critrm.types import NO_CRITIC, Critique, CritiquedPair, Message, PreferencePair


def command(
    *,
    backbone: str = "",
    model: Path | None = None,
    pairs: str = "",
    critiques: tuple[Path, ...] = (),
    max_length: int | None = None,
    split: str = "",
    load_model: bool = True,
    out: Path | None = None,
) -> None:
    """Check a backbone or reward model, its tokenizer and a data set before money is spent.

    Args:
        backbone: the language model to be trained: hub id, folder, or `embedded:NAME`.
        model: a reward model's folder, instead of a backbone.
        pairs: the preference pairs to be used.
        critiques: files of critiques of these pairs.
        max_length: tokens of prompt + completion + critique that are to be read, 2048 when not given; a reward model
            says itself how many it reads.
        split: only pairs of this split.
        load_model: also load the weights and score a few pairs; otherwise only the tokenizer is looked at.
        out: write the findings there, as JSON.
    """
    if (backbone and model) or not (backbone or model or pairs):
        raise ConfigError("name what to check: --backbone or --model, and --pairs")
    if critiques and not pairs:
        raise ConfigError("--critiques are looked at together with the pairs that they are of: give --pairs, too")
    if model and max_length is not None:
        raise ConfigError("--model says itself how many tokens it reads: leave --max-length out")
    reads = _reads_of(model)
    name = str(model or backbone)
    found = read_pairs(pairs, split=split, skip_bad=True) if pairs else None
    rows = [row for path in critiques for row in read_critiques(path)]
    findings: list[Finding] = []
    arms: dict[str, tuple[CritiquedPair, ...]] = {}
    if found:
        n_bad = len(found.skipped)
        advice = "See them with `critrm preferences`."
        findings.append(
            Finding("rows", "warning", f"{n_bad} cannot be used", advice)
            if n_bad
            else Finding("rows", "good", f"{len(found.pairs)} pairs")
        )
        findings += check_pairs(found.pairs)
        arms = _arms(found.pairs, rows)
    if name:
        n_read = int(reads.get("max_length") or max_length or 2048)
        findings += _model_findings(name, arms, model=model, max_length=n_read, load_model=load_model)
    if found:
        findings += check_critics(found.pairs, rows, trained_with=str(reads.get("critic", "")))
    console = Console()
    console.print(findings_table(findings))
    if out is not None:
        write_text(out, json.dumps([asdict(finding) for finding in findings], indent=2, ensure_ascii=False) + "\n")
        console.print(f"Findings: {out}", soft_wrap=True, markup=False)
    if any(finding.verdict == "problem" for finding in findings):
        raise ConfigError("there are problems: see the table")


def _arms(pairs: Sequence[PreferencePair], rows: Sequence[Critique]) -> dict[str, tuple[CritiquedPair, ...]]:
    """The No-Critiques arm and one of each critic, each with all the pairs that the critic covers."""
    arms = augment_pairs(pairs, {}).arms
    for critic in sorted({row.critic for row in rows}):
        first = first_sample([row for row in rows if row.critic == critic])
        try:
            arms[critic] = augment_pairs(pairs, {critic: first}, sample=first[0].sample).arms[critic]
        except DataError:
            continue  # it covers no pair, which `check_critics` reports
    return arms


def _model_findings(
    name: str,
    arms: dict[str, tuple[CritiquedPair, ...]],
    *,
    model: Path | None,
    max_length: int,
    load_model: bool,
) -> list[Finding]:
    tokenizer = load_tokenizer(name)
    findings = check_tokenizer(tokenizer)
    for arm in arms.values():
        findings += check_lengths(arm, text_encoder(tokenizer), max_length=max_length)
    if load_model:
        from critrm.reward_model import Reads, RewardModel

        loaded = (
            RewardModel.load(model, device="cpu", precision="fp32")
            if model
            else RewardModel.from_backbone(name, Reads(max_length=max_length, backbone=name), seed=0)
        )
        items = [CritiquedPair(pair=item.pair) for item in arms.get(NO_CRITIC, _SAMPLE)]
        findings += check_reward_model(loaded, items)
    return findings


def _reads_of(model: Path | None) -> dict[str, Any]:
    """What a reward model reads (`reward_model.Reads`), looked up without torch."""
    facts = model / "critrm.json" if model else None
    if not facts or not facts.is_file():
        return {}
    loaded: dict[str, Any] = json.loads(facts.read_text(encoding="utf-8"))
    return loaded


_SAMPLE = tuple(
    CritiquedPair(
        pair=PreferencePair(
            id=f"sample-{i}", prompt=(Message("user", f"Why is the sky {colour}?"),), chosen="Air. " * i, rejected="No."
        )
    )
    for i, colour in enumerate(("blue", "red in the evening", "black at night", "grey"), 1)
)
"""Scored when no pairs are given."""
