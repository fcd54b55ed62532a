"""PandaLM's human-labelled test set (Wang et al., 2023): instructions of Self-Instruct, answered by five models.

Source: github.com/WeOpenML/PandaLM, `data/testset-v1.json`. Three annotators vote for the first response, the second,
or a tie. How they decide a label is a choice, made where the file is read (`--dialect`):

    pandalm             at least two agree        894 of 999 rows decided
    pandalm-unanimous   all three agree           794
    pandalm-first       the first annotator's     902

The paper reports 762 prompts without saying which rows they are, so a number here names its rule: `source` holds it.
"""

from collections.abc import Sequence

from critrm.types import PreferencePair

RULES: dict[str, str] = {
    "majority": "that a majority of the three annotators decided",
    "unanimous": "that the three annotators decided unanimously",
    "first": "that the first annotator decided",
}

HEADLINE = "accuracy on the pairs"


def headline(pairs: Sequence[PreferencePair]) -> str:
    """What the number is: the rule that decided the labels, and how many pairs it left."""
    found = sorted({pair.source.removeprefix("pandalm-") for pair in pairs})
    rule = RULES.get(found[0]) if len(found) == 1 else None
    return f"{HEADLINE} {rule or 'by no rule that is known'} ({len(pairs)} pairs)"
