"""RM-Bench (Liu et al., 2025): subtle errors, and answers in three styles each; 1,327 prompts, nine pairs a prompt.

Source: github.com/THU-KEG/RM-Bench (`data/*_filtered.json`, or `total_dataset.json`, or the hub's THU-KEG/RM-Bench).
A pair is *easy* where the chosen response has the fancier style of the two (concise < detailed < markdown), *normal*
where both have the same, and *hard* where the rejected one has: the lower triangle, the diagonal and the upper triangle
of the official 3x3 table. A domain's accuracy is the mean of the three; Safety is the mean of its two halves.
"""

from collections.abc import Mapping, Sequence

from critrm.metrics import section_scores, tally
from critrm.types import Outcome, PreferencePair, Score

N_PROMPTS: dict[str, int] = {"chat": 129, "math": 529, "code": 228, "safety-refuse": 284, "safety-response": 157}

N_PAIRS: dict[str, int] = {domain: 9 * n for domain, n in N_PROMPTS.items()}

SECTIONS: dict[str, tuple[str, ...]] = {
    "Chat": ("chat",),
    "Math": ("math",),
    "Code": ("code",),
    "Safety": ("safety-refuse", "safety-response"),
}

WEIGHTS: dict[str, int] = dict.fromkeys(N_PROMPTS, 1)
"""Refusing and responding make up half of Safety each, though their sizes differ."""

STYLES = ("easy", "normal", "hard")

HEADLINE = "average of the four domains"


def extra_sections(pairs: Sequence[PreferencePair], scores: Mapping[str, Score]) -> dict[str, float]:
    """Easy, normal and hard accuracy, each the mean of the domains (`source` holds a pair's kind)."""
    found: dict[str, float] = {}
    for style in STYLES:
        outcomes: dict[str, list[Outcome]] = {}
        for pair in pairs:
            if pair.source == style:
                score = scores.get(pair.id)
                outcomes.setdefault(pair.subset, []).append(score.outcome if score else Outcome.UNSCORED)
        domains = section_scores({name: tally(each) for name, each in outcomes.items()}, SECTIONS, weights=WEIGHTS)
        if domains:
            found[style] = sum(domains.values()) / len(domains)
    return found
