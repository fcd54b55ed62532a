"""Self-consistency: a completion's reward as the mean over several critiques of it by the same critic."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from critrm.augment import usable_critiques
from critrm.batching import Candidates
from critrm.errors import DataError
from critrm.store import content_hash
from critrm.types import SIDES, Critique, CritiquedPair, PreferencePair, Score, Side

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from critrm.reward_model import Reads, RewardModel

Samples = Mapping[tuple[str, Side], tuple[str, ...]]
"""Pair id and side -> the critiques of that completion, in the order of their samples."""


def samples_of(
    pairs: Sequence[PreferencePair],
    critiques: Sequence[Critique],
    *,
    n_samples: int,
    drop: Sequence[str] = (),
    strip_scores: bool = False,
) -> Samples:
    """The first critiques of each completion that can be used.

    Args:
        pairs: the pairs whose completions they are of.
        critiques: of one critic; failed ones are left out.
        n_samples: at most so many of a completion.
        drop: as in `augment_pairs`.
        strip_scores: as in `augment_pairs`.
    """
    rows = usable_critiques(pairs, [row for row in critiques if row.sample < n_samples], drop, strip_scores)
    found: dict[tuple[str, Side], tuple[str, ...]] = {}
    for row in sorted(rows, key=lambda row: row.sample):
        if not row.failure and row.text.strip():
            found[row.pair_id, row.side] = (*found.get((row.pair_id, row.side), ()), row.text)
    return found


class SampleAveraged:
    """A reward model that reads each completion with every critique of it; its reward is the mean.

    Prompt and completion are read once for all critiques. Where a sample failed, the mean is over the others.
    """

    def __init__(self, model: "RewardModel", samples: Samples) -> None:
        """Args: the reward model, and the critiques by pair id and side; all pairs that are scored have some."""
        self.model, self.samples = model, samples

    @property
    def name(self) -> str:
        """The reward model's."""
        return self.model.name

    @property
    def critic(self) -> str:
        """The reward model's."""
        return self.model.critic

    @property
    def reads(self) -> "Reads":
        """The reward model's."""
        return self.model.reads

    @property
    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """The reward model's."""
        return self.model.tokenizer

    @property
    def n_special(self) -> int:
        """The reward model's."""
        return self.model.n_special

    @property
    def scores_without_critiques(self) -> bool:
        """False: without a critique there is nothing to average."""
        return False

    @property
    def fingerprint(self) -> str:
        """A hash of the reward model's and of all critiques."""
        return content_hash(self.model.fingerprint, sorted((*place, texts) for place, texts in self.samples.items()))

    def score(
        self,
        pairs: Iterable[CritiquedPair],
        *,
        max_tokens_per_step: int = 4096,
        on_progress: Callable[[int], None] | None = None,
    ) -> list[Score]:
        """Reward both completions of each pair; see `RewardModel.score`.

        Raises:
            DataError: a completion has no critique.
            ModelError: memory does not suffice for so many tokens at once.
        """
        items = list(pairs)
        rewards = self.model.score_candidates(
            (self._candidates(item.pair) for item in items),
            max_tokens_per_step=max_tokens_per_step,
            on_progress=on_progress,
        )
        means = ([sum(of_one) / len(of_one) for of_one in of_pair] for of_pair in rewards)
        return [Score(item.pair.id, chosen, rejected) for item, (chosen, rejected) in zip(items, means, strict=True)]

    def _candidates(self, pair: PreferencePair) -> Candidates:
        try:
            critiques = tuple(self.samples[pair.id, side] for side in SIDES)
        except KeyError as error:
            raise DataError(f"no critique of the {error.args[0][1]} completion", field=f"id {pair.id}") from None
        return Candidates(prompt=pair.prompt, completions=(pair.chosen, pair.rejected), critiques=critiques)
