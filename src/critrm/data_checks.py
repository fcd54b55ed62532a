"""Checks of preference pairs and critiques: labels, ratings, lengths, and whose critiques they are (4.1 and 4.2)."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from critrm.augment import Budget, segment_pair
from critrm.findings import Finding, Verdict
from critrm.types import RATINGS, SIDES, Critique, CritiquedPair, PreferencePair

TOO_MANY_CUT = 0.05
"""More pairs cut than this share is worth a warning."""
MUCH_LONGER = 0.65
"""A chosen completion that is the longer one more often than this invites a length bias."""


def check_pairs(pairs: Sequence[PreferencePair]) -> list[Finding]:
    """Contradictions, repeated prompts, ratings and length."""
    return [*_contradictions(pairs), _ratings(pairs), _lengths(pairs)]


def _contradictions(pairs: Sequence[PreferencePair]) -> Iterator[Finding]:
    seen = {(pair.prompt, pair.chosen, pair.rejected) for pair in pairs}
    n_contrary = sum((pair.prompt, pair.rejected, pair.chosen) in seen for pair in pairs)
    n_repeated = len(pairs) - len(seen)
    if n_contrary:
        what = f"{n_contrary} pairs are there a second time with the opposite label"
        yield Finding("labels", "warning", what, "Decide which label holds, or remove both.")
    else:
        yield Finding("labels", "good", "no pair contradicts another")
    if n_repeated:
        what = f"{n_repeated} of {len(pairs)} are copies"
        yield Finding(
            "copies", "warning", what, "Remove them: they count twice, and may fall on both sides of a split."
        )
    else:
        yield Finding("copies", "good", "no pair is there twice")


def _ratings(pairs: Sequence[PreferencePair]) -> Finding:
    check = "ratings and margins"
    counts = Counter(pair.rating for pair in pairs if pair.rating)
    n_margins = sum(pair.margin is not None for pair in pairs)
    parts = [f"{counts[rating]} {rating}" for rating in RATINGS if counts[rating]]
    parts += [f"{n_margins} with a margin of their own"] * bool(n_margins)
    if not parts:
        advice = "Equation 1 is used without a margin; nothing is lost but the margin."
        return Finding(check, "note", "the pairs carry none", advice)
    n_none = sum(pair.rating is None and pair.margin is None for pair in pairs)
    if n_none:
        return Finding(
            check, "warning", f"{', '.join(parts)}, {n_none} without", "Pairs without a rating have margin 0."
        )
    return Finding(check, "good", ", ".join(parts))


def _lengths(pairs: Sequence[PreferencePair]) -> Finding:
    check = "length"
    unequal = [pair for pair in pairs if len(pair.chosen) != len(pair.rejected)]
    share = sum(len(pair.chosen) > len(pair.rejected) for pair in unequal) / len(unequal) if unequal else 0.5
    what = f"the chosen completion is the longer one in {share:.0%} of the pairs"
    if max(share, 1 - share) > MUCH_LONGER:
        advice = "A reward model may learn length. Compare with the longer-wins baseline, and test on matched lengths."
        return Finding(check, "warning", what, advice)
    return Finding(check, "good", what)


def check_lengths(
    arm: Sequence[CritiquedPair], encode: Callable[[str], list[int]], *, max_length: int
) -> list[Finding]:
    """How many pairs of an arm are cut to the token budget, by segment, and how many become identical by it."""
    cut, n_identical = Counter[str](), 0
    for item in arm:
        segments = segment_pair(item, encode, Budget(max_length))
        for name, n in zip(("prompt", "completion", "critique"), segments.n_cut, strict=True):
            cut[name] += n > 0
        n_identical += segments.completions[0] == segments.completions[1]
    check = f"{max_length} tokens, critic {arm[0].critic}"
    findings = []
    for name, n in cut.items():
        share = n / len(arm)
        if share:
            verdict: Verdict = "warning" if share > TOO_MANY_CUT or name == "critique" else "note"
            advice = "Train with a longer --max-length, or ask the critic for less."
            findings.append(Finding(check, verdict, f"{name} cut in {n} of {len(arm)} pairs ({share:.0%})", advice))
    if n_identical:
        what = f"{n_identical} pairs become identical when cut"
        advice = "They are dropped from all arms. Train with a longer --max-length."
        findings.append(Finding(check, "warning", what, advice))
    return findings or [Finding(check, "good", "nothing is cut")]


def check_critics(
    pairs: Sequence[PreferencePair], critiques: Sequence[Critique], *, trained_with: str = ""
) -> list[Finding]:
    """Each critic's share of the pairs, and whether it is the one that a reward model was trained with."""
    findings, covered = [], []
    for critic in sorted({row.critic for row in critiques}):
        rows = first_sample([row for row in critiques if row.critic == critic])
        places = {(row.pair_id, row.side) for row in rows if not row.failure and row.text.strip()}
        covered.append({pair.id for pair in pairs if all((pair.id, side) in places for side in SIDES)})
        n_both = len(covered[-1])
        what = f"critiques of both completions for {n_both} of {len(pairs)} pairs"
        if n_both == len(pairs):
            findings.append(Finding(f"critic {critic}", "good", what))
        else:
            advice = "Pairs without both are dropped from all arms: run `critrm critique` again with --retry-failed."
            findings.append(Finding(f"critic {critic}", "warning" if n_both else "problem", what, advice))
        if trained_with and critic != trained_with:
            advice = "Train and test critiques have to come from one critic (section 4.2)."
            what = f"the reward model was trained with critiques by {trained_with!r}"
            findings.append(Finding(f"critic {critic}", "problem", what, advice))
    if all(covered) and covered and not set.intersection(*covered):
        what = f"no pair has critiques by all {len(covered)}"
        findings.append(Finding("critics", "problem", what, "The arms share their pairs: none would be left."))
    return findings


def first_sample(critiques: Sequence[Critique]) -> list[Critique]:
    """What an arm is made of where a critic was asked several times."""
    first = min((row.sample for row in critiques), default=0)
    return [row for row in critiques if row.sample == first]
