"""Critique and score while somebody waits: what the server and the reward functions of RL trainers are made of."""

import asyncio
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Self

from critrm.attribution_files import Attribution, SentenceEffect
from critrm.errors import ConfigError, CriticError, CriticMismatch, DataError, ModelError
from critrm.live_critic import LiveCritic
from critrm.microbatch import MicroBatcher, Rewards
from critrm.sentences import aspect_of, split_sentences
from critrm.types import NO_CRITIC, Critique, Message

if TYPE_CHECKING:
    from critrm.batching import Candidates
    from critrm.reward_model import RewardModel

MAX_SENTENCES = 128
"""Of a critique that is taken apart while somebody waits."""

OnFailure = Literal["raise", "without"]
"""What becomes of a request when the critic has failed, after its retries."""

OnCritique = Callable[[int, Critique], None]
"""Is told of each critique as it comes: the completion's number, and the critique (perhaps with its `failure`)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveScore:
    """A completion's reward and what it was computed from."""

    reward: float
    critique: str = ""
    """What the reward model read; empty where it read none."""
    critic: str = NO_CRITIC
    """Who wrote it; `none` where the reward model read none."""
    cached: bool = False
    """Whether the critique was known before."""
    failure: str = ""
    """Why there is no critique, where one was asked for: the kind, such as `timeout` or `http 500`."""


class LiveRewardModel:
    """A reward model with its critic: a prompt and completions in, critiques and rewards out.

    Any number of `score` calls may be under way at once, in one event loop or in several one after the other
    (`asyncio.run` per batch is fine). Critic calls run concurrently, identical ones are made once and every answer is
    kept in the cache; the reward model computes for all callers together, in a thread of its own. A critic's failure
    never becomes a number: after its retries the call raises, or (`on_failure="without"`, for models that were trained
    with critique dropout) all completions of the call are scored without critiques, so that their rewards can be
    compared, and each result says so.

        model = RewardModel.load("runs/my-model/model")
        critic = LiveCritic.open(settings, critic="my-critic", cache=CritiqueCache(default_cache_path()))
        with LiveRewardModel(model, critic=critic) as live:
            scores = asyncio.run(live.score((Message("user", "2 + 2?"),), ["4", "5"]))
    """

    def __init__(
        self,
        model: "RewardModel",
        *,
        critic: LiveCritic | None = None,
        on_failure: OnFailure = "raise",
        allow_other_critic: bool = False,
        max_tokens_per_step: int = 4096,
        wait: float = 0.002,
    ) -> None:
        """Put the two together; nothing is computed or called yet.

        Args:
            model: the reward model.
            critic: who critiques; None for a model that scores without critiques.
            on_failure: what becomes of a request whose critic has failed.
            allow_other_critic: read critiques of another critic than in training.
            max_tokens_per_step: how many tokens are computed at once; does not change the rewards.
            wait: seconds that a request waits for others when the model is idle.

        Raises:
            CriticMismatch: the model was trained with another critic (section 4.2: train and test match).
            ConfigError: it needs critiques and there is no critic, or it cannot do without and `on_failure` says so.
        """
        check_critic_of(model, critic.critic if critic else NO_CRITIC, allow_other=allow_other_critic)
        if on_failure == "without" and not model.scores_without_critiques:
            raise ConfigError(
                f"{model.name} was never trained to score without critiques, so a failed critique cannot be left out: "
                "train with critique_dropout, or let failures raise"
            )
        self.model, self.critic, self.on_failure = model, critic, on_failure
        self.batcher = MicroBatcher(model, max_tokens_per_step=max_tokens_per_step, wait=wait)
        self.n_without = 0
        """Completions that were scored without critique because the critic failed."""

    async def score(
        self,
        prompt: Sequence[Message],
        completions: Sequence[str],
        *,
        critiques: Sequence[str] | None = None,
        on_critique: OnCritique | None = None,
    ) -> list[LiveScore]:
        """Critique and reward completions of one prompt.

        Args:
            prompt: the conversation so far.
            completions: what could follow it.
            critiques: one of each completion, by the model's critic; the critic is then not called.
            on_critique: is told of each critique as it comes.

        Returns:
            One result per completion, in the given order.

        Raises:
            CriticError: the critic failed and `on_failure` is `raise`; names the kind of failure.
            DataError: there are no completions, or critiques but not one per completion, or the model reads none.
            ModelError: the model gave no number, or memory did not suffice.
        """
        from critrm.batching import Candidates

        if not completions:
            raise DataError("there are no completions", field="completions")
        if critiques is not None:
            self._check_reads_critiques()
        if critiques is not None and len(critiques) != len(completions):
            n, m = len(critiques), len(completions)
            raise DataError(f"critiques of {n} completions, but there are {m}", field="critiques")
        found = await self._critiques(prompt, completions, given=critiques, on_critique=on_critique)
        # What is read twice is read once: the same text never gets two rewards that differ in their last digits.
        readings = [(completion, each.critique) for completion, each in zip(completions, found, strict=True)]
        distinct = tuple(dict.fromkeys(readings))
        texts = tuple((critique,) for _, critique in distinct) if any(each.critique for each in found) else ()
        candidates = Candidates(
            prompt=tuple(prompt), completions=tuple(completion for completion, _ in distinct), critiques=texts
        )
        rewards = dict(zip(distinct, (of_one[0] for of_one in await self._rewards(candidates)), strict=True))
        return [
            LiveScore(
                reward=rewards[reading],
                critique=each.critique,
                critic=each.critic if each.critique else NO_CRITIC,
                cached=each.cached,
                failure=each.failure,
            )
            for reading, each in zip(readings, found, strict=True)
        ]

    async def _critiques(
        self,
        prompt: Sequence[Message],
        completions: Sequence[str],
        *,
        given: Sequence[str] | None,
        on_critique: OnCritique | None,
    ) -> list["_Read"]:
        """What the reward model will read of each completion."""
        critic = self.critic
        if given is not None:
            return [_Read(critique=text, critic=self.model.critic) for text in given]
        if critic is None:
            return [_Read() for _ in completions]

        async def one(number: int, completion: str) -> _Read:
            critique, cached = await critic.critique(prompt, completion)
            if on_critique:
                on_critique(number, critique)
            # The kind alone: what a server wrote besides may name hosts.
            failure = critique.failure.partition(":")[0]
            return _Read(critique=critique.text, critic=critique.critic, cached=cached, failure=failure)

        found = await asyncio.gather(*(one(i, completion) for i, completion in enumerate(completions)))
        failures = [each.failure for each in found if each.failure]
        if not failures:
            return found
        if self.on_failure == "raise":
            raise CriticError(f"the critic {critic.critic} failed ({failures[0]}): no score without its critique")
        self.n_without += len(found)
        return [_Read(failure=each.failure) for each in found]

    async def attribute(self, prompt: Sequence[Message], completion: str, *, critique: str) -> Attribution:
        """What each sentence of a critique did to the reward, as `attribute.attribute_sentences` has it for files.

        Raises:
            DataError: there is no critique, or it has too many sentences, or the model reads none.
            ModelError: the model gave no number, or memory did not suffice.
        """
        from critrm.batching import Candidates

        self._check_reads_critiques()
        if not critique.strip():
            raise DataError("no critique to take apart", field="critique")
        parts = split_sentences(critique)
        if len(parts) > MAX_SENTENCES:
            raise DataError(f"a critique of {len(parts)} sentences; at most {MAX_SENTENCES} are taken apart at once")
        without = ("".join(parts[:i] + parts[i + 1 :]) for i in range(len(parts)))
        candidates = Candidates(prompt=tuple(prompt), completions=(completion,), critiques=((critique, "", *without),))
        reward, reward_without, *others = (await self._rewards(candidates))[0]
        return Attribution(
            pair_id="",
            side="chosen",
            critic=self.model.critic,
            reward=reward,
            reward_without=reward_without,
            sentences=tuple(
                SentenceEffect(text=text, aspect=aspect_of(text), effect=reward - other)
                for text, other in zip(parts, others, strict=True)
            ),
        )

    def _check_reads_critiques(self) -> None:
        if self.model.critic == NO_CRITIC and self.critic is None:
            raise DataError("the reward model was trained without critiques: it reads none", field="critiques")

    async def _rewards(self, candidates: "Candidates") -> Rewards:
        rewards = await self.batcher.score(candidates)
        if not all(math.isfinite(reward) for of_one in rewards for reward in of_one):
            raise ModelError(f"{self.model.name} gave a reward that is not a number: its weights are damaged")
        return rewards

    def close(self) -> None:
        """Reward what is waiting, then stop; the critic's cache stays open."""
        self.batcher.close()

    def __enter__(self) -> Self:
        """Use as a context manager to stop the model's thread."""
        return self

    def __exit__(self, *_: object) -> None:
        """Stop the model's thread."""
        self.close()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Read:
    """What is known of a completion before it is scored."""

    critique: str = ""
    critic: str = NO_CRITIC
    cached: bool = False
    failure: str = ""


def check_critic_of(model: "RewardModel", critic: str, *, allow_other: bool = False) -> None:
    """Whether a reward model may read what a critic writes; `none` is no critic.

    Raises:
        CriticMismatch: it was trained with another critic.
        ConfigError: it needs critiques, and there is no critic.
    """
    if critic == model.critic or allow_other:
        return
    if critic == NO_CRITIC:
        if model.scores_without_critiques:
            return
        raise ConfigError(f"{model.name} reads critiques by {model.critic}: name that critic (--critic)")
    raise CriticMismatch(
        f"the reward model was trained with critiques by {model.critic!r}, not by {critic!r}. "
        "Use that critic, or allow another one with --allow-other-critic (section 4.2)."
    )
