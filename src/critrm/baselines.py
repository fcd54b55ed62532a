"""Null baselines: what a score is worth that reads no meaning, to be laid beside every reward model's.

If a reward model that reads critiques does not beat a bag of words over the critiques alone, it may have learnt no more
than that critics scold bad answers. The fitted baselines are deterministic, and quick: no GPU, seconds for 1,000 pairs.
"""

import importlib.util
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from critrm.leaked_scores import leaked_score
from critrm.types import NO_CRITIC, SIDES, Critique, CritiquedPair, Outcome, Score, Side

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

LONGER = "longer completion wins"
LONGER_CRITIQUE = "longer critique wins"
COMPLETIONS_ONLY = "bag of words, completions"
CRITIQUES_ONLY = "bag of words, critiques"
SENTIMENT = "critique sentiment only"
LEAKED = "leaked score only"
OWN_SCORE = "critic's own score"
UNTRAINED_ALONE = "untrained, critique alone"
UNTRAINED_WHOLE = "untrained, whole text"
CRITIQUE_NULLS = (LONGER_CRITIQUE, CRITIQUES_ONLY, SENTIMENT)
"""Those that see nothing but the critiques and understand none of them."""
ZERO_LABEL_NULLS = (UNTRAINED_ALONE, UNTRAINED_WHOLE)
"""Those that understand, but learnt from no label: what the backbone says before any training (`zero_label`)."""

Text = Callable[[CritiquedPair, Side], str]


def baselines(
    train_items: Sequence[CritiquedPair],
    test_items: Sequence[CritiquedPair],
    *,
    critiques: Sequence[Critique] = (),
) -> dict[str, list[Outcome]]:
    """The null baselines of one arm, by name; each has one outcome per test pair, in their order.

    Args:
        train_items: the arm's training pairs, of which the bags of words learn; without any they are left out.
        test_items: the pairs to judge; without critiques only the baselines on completions are computed.
        critiques: recorded critiques with the critic's own score, if there are.

    Baselines whose package (`pip install 'critrm[eval]'`) is missing are left out. In the leaked and the own score a
    pair is unscored unless both sides have one.
    """
    found: dict[str, list[Score]] = {LONGER: _compare(test_items, lambda item, side: len(item.pair.completion(side)))}
    can_learn = bool(train_items) and importlib.util.find_spec("sklearn") is not None
    if can_learn:
        found[COMPLETIONS_ONLY] = bag_of_words(train_items, test_items, text=lambda x, side: x.pair.completion(side))
    if any(item.critic != NO_CRITIC for item in test_items):
        found[LONGER_CRITIQUE] = _compare(test_items, lambda item, side: len(item.critique(side)))
        if can_learn and any(item.critic != NO_CRITIC for item in train_items):
            found[CRITIQUES_ONLY] = bag_of_words(train_items, test_items, text=lambda x, side: x.critique(side))
        if importlib.util.find_spec("vaderSentiment") is not None:
            found[SENTIMENT] = sentiment(test_items)
        found[LEAKED] = _compare(test_items, lambda item, side: leaked_score(item.critique(side)))
    if own := own_scores(test_items, critiques):
        found[OWN_SCORE] = own
    return {name: [score.outcome for score in scores] for name, scores in found.items()}


def own_scores(items: Sequence[CritiquedPair], critiques: Sequence[Critique]) -> list[Score]:
    """What the critic itself gives each side, as recorded beside its first critiques; none where it scored nothing.

    A pair is unscored unless both its sides have a score.
    """
    own = {(row.pair_id, row.side): row.score for row in critiques if row.score is not None and not row.sample}
    return _compare(items, lambda item, side: own.get((item.pair.id, side))) if own else []


def _compare(items: Sequence[CritiquedPair], value: Callable[[CritiquedPair, Side], float | None]) -> list[Score]:
    """The value of each side as its reward; None is not-a-number, and so unscored."""
    values = [[value(item, side) for side in SIDES] for item in items]
    rewards = [[math.nan if each is None else float(each) for each in both] for both in values]
    return [Score(item.pair.id, *both) for item, both in zip(items, rewards, strict=True)]


def bag_of_words(
    train_items: Sequence[CritiquedPair], test_items: Sequence[CritiquedPair], *, text: Text
) -> list[Score]:
    """Logistic regression on the difference of the two sides' tf-idf vectors over words and pairs of words.

    Args:
        train_items: pairs to learn from.
        test_items: pairs to score.
        text: what is read of a side.

    Returns:
        One score per test pair; ties throughout where no word occurs in two training texts.
    """
    from scipy.sparse import vstack
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    train, test = ([[text(item, side) for item in items] for side in SIDES] for items in (train_items, test_items))
    words = TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True)
    try:
        words.fit([*train[0], *train[1]])
        difference: csr_matrix = words.transform(train[0]) - words.transform(train[1])
    except ValueError:  # scikit-learn's name for an empty vocabulary
        return [Score(item.pair.id, 0.0, 0.0) for item in test_items]
    # Each pair both ways round, so that there are two classes and no intercept.
    both_ways = vstack([difference, -difference])
    labels = [1] * len(train_items) + [0] * len(train_items)
    model = LogisticRegression(C=10.0, fit_intercept=False, max_iter=1000).fit(both_ways, labels)
    if not test_items:
        return []
    chosen, rejected = (model.decision_function(words.transform(texts)) for texts in test)
    return [Score(item.pair.id, float(chosen[n]), float(rejected[n])) for n, item in enumerate(test_items)]


def sentiment(items: Sequence[CritiquedPair]) -> list[Score]:
    """How positive the words of each critique are, by the VADER lexicon, from -1 to 1: the mean over its sentences."""
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    analyzer = SentimentIntensityAnalyzer()

    def tone(item: CritiquedPair, side: Side) -> float:
        sentences = [each for each in item.critique(side).replace("\n", ". ").split(". ") if each.strip()]
        tones = [analyzer.polarity_scores(sentence)["compound"] for sentence in sentences]
        return sum(tones) / len(tones) if tones else 0.0

    return _compare(items, tone)
