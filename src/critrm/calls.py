"""The calls of a critique job: which are to be made, what they will cost, and making them within a limit."""

from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from critrm.budget import Estimate, Price, Purse, estimate, most_tokens, n_characters
from critrm.config import CriticConfig
from critrm.critics import price_of, sampling_of, token_counter
from critrm.critique_cache import CritiqueCache
from critrm.llm import Chat, ChatRequest, Reply, Sampling
from critrm.prompts import critique_messages, load_template
from critrm.store import content_hash
from critrm.types import SIDES, Critique, Message, PreferencePair, Side

_Place = tuple[int, int, Side]
"""A completion and one of its critiques: the pair's position, the sample's number, the side."""


class Calls:
    """The distinct calls of a job: their keys, what each is to be asked, and the completions that it answers."""

    def __init__(
        self, pairs: Sequence[PreferencePair], model: str, *, sampling: Sampling, samples: int, template: str | Path
    ) -> None:
        """Work out the keys.

        Args:
            pairs: the preference pairs.
            model: the critic's model.
            sampling: how replies are drawn; sample j has the seed + j.
            samples: critiques per completion.
            template: the template's name or path.

        Raises:
            ConfigError: the template cannot be used.
        """
        self.pairs, self.sampling, self.samples = pairs, sampling, samples
        self.template = load_template(template, needs=("conversation", "response"))
        places: dict[str, list[_Place]] = {}
        for index in range(len(pairs)):
            for side in SIDES:
                messages = self._messages(index, side)
                for sample in range(samples):
                    drawn = replace(sampling, seed=sampling.seed + sample)
                    key = call_key(model, messages, sampling=drawn, prompt_version=self.template.version)
                    places.setdefault(key, []).append((index, sample, side))
        # In the order of keys: a hash's order says nothing of which completion is the chosen one.
        self.places = dict(sorted(places.items()))
        """Key of each call -> the completions it answers: identical ones share a call."""

    def _messages(self, index: int, side: Side) -> tuple[Message, ...]:
        pair = self.pairs[index]
        return critique_messages(pair.prompt, pair.completion(side), template=self.template)

    def messages(self, key: str) -> tuple[Message, ...]:
        """What the critic is asked. Rendered when it is wanted, so that the prompts are not all in memory."""
        index, _, side = self.places[key][0]
        return self._messages(index, side)

    def split(
        self, cache: CritiqueCache, *, retry_failed: bool
    ) -> tuple[dict[str, Critique], list[str], dict[str, float]]:
        """The calls that the cache answers, the keys of those to be made, and what these have cost before."""
        stored = {key: critique for key in self.places if (critique := cache.get(key))}
        found = {key: row for key, row in stored.items() if not (row.failure and retry_failed)}
        # A failure can be billed: a refusal, say, or max_tokens that ran out before any text.
        paid = {key: row.cost for key, row in stored.items() if key not in found}
        return found, [key for key in self.places if key not in found], paid

    def critique(self, reply: Reply, *, critic: str, price: Price | None) -> Critique:
        """The record of a reply."""
        index, sample, side = self.places[reply.id][0]
        row = reply_record(
            reply,
            self.messages(reply.id),
            pair_id=self.pairs[index].id,
            side=side,
            critic=critic,
            prompt_version=self.template.version,
            price=price,
        )
        return replace(row, sample=sample)


def call_key(model: str, messages: Sequence[Message], *, sampling: Sampling, prompt_version: str) -> str:
    """The key of a critic's call in the cache: all that its answer depends on."""
    # 1 and 1.0 are the same temperature, but not the same text.
    facts = [float(sampling.temperature), float(sampling.top_p), sampling.max_tokens, sampling.seed]
    texts = [[message.role, message.content] for message in messages]
    return content_hash(model, facts, prompt_version, texts)


def reply_record(
    reply: Reply,
    messages: tuple[Message, ...],
    *,
    pair_id: str,
    side: Side,
    critic: str,
    prompt_version: str,
    price: Price | None,
) -> Critique:
    """What is stored of a reply: its text or why there is none, its tokens, and what it cost."""
    failure = reply.failure or ("" if reply.text.strip() else "empty reply")
    n_read, n_written = float(reply.n_prompt_tokens), float(reply.n_completion_tokens)
    if price and not n_read and not failure:
        # An endpoint that does not report its usage still bills it.
        n_read, n_written = n_characters(messages) / 4, max(n_written, len(reply.text) / 4)
    return Critique(
        key=reply.id,
        pair_id=pair_id,
        side=side,
        text="" if failure else reply.text.strip(),
        critic=critic,
        prompt_version=prompt_version,
        n_prompt_tokens=reply.n_prompt_tokens,
        n_completion_tokens=reply.n_completion_tokens,
        cost=price.cost(n_read, n_written) if price else 0.0,
        seconds=round(reply.seconds, 3),
        finish_reason=reply.finish_reason,
        failure=failure,
    )


async def ask_all(
    calls: Calls,
    todo: Sequence[str],
    chat: Chat,
    *,
    answered: Callable[[Reply], None],
    price: Price | None,
    purse: Purse | None,
) -> None:
    """Make the calls of a job, the samples one after the other, since each has its own seed."""
    n_later = len(todo)
    for sample in range(calls.samples):
        keys = [key for key in todo if calls.places[key][0][1] == sample]
        n_later -= len(keys)
        await ask_each(
            keys,
            chat,
            messages_of=calls.messages,
            sampling=replace(calls.sampling, seed=calls.sampling.seed + sample),
            answered=answered,
            price=price,
            purse=purse,
            n_later=n_later,
        )


async def ask_each(
    keys: Iterable[str],
    chat: Chat,
    *,
    messages_of: Callable[[str], tuple[Message, ...]],
    sampling: Sampling,
    answered: Callable[[Reply], None],
    price: Price | None,
    purse: Purse | None,
    n_later: int = 0,
) -> None:
    """Make calls, each rendered when there is room for it.

    With a limit: when the most that the next call can cost is more than what is left, the calls under way are waited
    for. They mostly cost less than was set aside, so there may be room again.

    Args:
        keys: the calls.
        chat: who is asked.
        messages_of: what a call asks.
        sampling: how replies are drawn.
        answered: is given each reply.
        price: what tokens cost.
        purse: the limit on what may be spent.
        n_later: calls of the job that come after these, for the message when the limit is reached.

    Raises:
        CriticError: the limit is reached, or nobody can be asked.
    """
    pending = deque(keys)

    def requests() -> Iterator[ChatRequest]:
        while pending:
            messages = messages_of(pending[0])
            if purse and price:
                most = price.cost(most_tokens(messages), sampling.max_tokens)
                if not purse.set_aside(pending[0], most):
                    return
            yield ChatRequest(id=pending.popleft(), messages=messages)

    while pending:
        n_before = len(pending)
        replies = chat.stream(requests(), sampling)
        try:
            async for reply in replies:
                answered(reply)
        finally:
            if isinstance(replies, AsyncGenerator):
                await replies.aclose()
        if not purse:
            break
        if len(pending) == n_before:
            raise purse.refusal(n_before + n_later)


def estimate_critiques(
    pairs: Sequence[PreferencePair],
    settings: CriticConfig,
    *,
    critic: str,
    cache: CritiqueCache,
    retry_failed: bool = False,
) -> Estimate:
    """What `critique_pairs` would cost with a critic; calls nobody.

    Args:
        pairs: the preference pairs.
        settings: the critic, complete.
        critic: its name.
        cache: answered calls; those are not made again.
        retry_failed: count calls that failed before.
    """
    calls = _calls_of(pairs, settings)
    found, todo, paid = calls.split(cache, retry_failed=retry_failed)
    # Its answers about other pairs are better than nothing.
    mean = None if found else cache.mean_written(critic, prompt_version=calls.template.version)
    row = estimate(
        (calls.messages(key) for key in todo),
        critic=critic,
        max_tokens=settings.max_tokens,
        price=price_of(settings),
        cached=[(n_characters(calls.messages(key)), critique) for key, critique in found.items()],
        mean_written=mean,
        count=token_counter(settings),
    )
    return replace(row, paid=row.paid + sum(paid.values()))


Job = tuple[Sequence[PreferencePair], CriticConfig]
"""Pairs, and the complete critic that is asked about them."""


def jobs_of(
    settings: CriticConfig, train: Sequence[PreferencePair], tests: Sequence[PreferencePair], *, n_averaged: int
) -> list[Job]:
    """What a recipe asks a critic.

    Where rewards are averaged over several critiques, more of them are written of the test pairs: training reads one.

    Args:
        settings: the critic, complete; at temperature 0 it has one critique of a completion to give.
        train: the training pairs.
        tests: the pairs of all test sets.
        n_averaged: over how many critiques of a completion rewards are averaged.
    """
    if settings.files or settings.temperature == 0 or n_averaged <= settings.samples:
        return [([*train, *tests], settings)]
    return [(train, settings), (tests, settings.model_copy(update={"samples": n_averaged}))]


def estimate_jobs(jobs: Sequence[Job], *, critic: str, cache: CritiqueCache) -> list[Estimate]:
    """What each of a critic's jobs would cost; nothing where its critiques are in files.

    Args:
        jobs: of `jobs_of`.
        critic: its name.
        cache: answered calls.
    """
    asked = [(pairs, settings) for pairs, settings in jobs if not settings.files]
    rows = [estimate_critiques(pairs, settings, critic=critic, cache=cache) for pairs, settings in asked]
    if len(rows) < 2:
        return rows
    return [
        replace(row, critic=f"{critic}, {settings.samples} a completion")
        for row, (_, settings) in zip(rows, asked, strict=True)
    ]


def open_purse(limit: float | None, jobs: Iterable[Job], *, cache: CritiqueCache) -> Purse | None:
    """The limit over all critics of a recipe, with what earlier attempts have spent on each of them; None without one.

    Args:
        limit: US dollars.
        jobs: what the critics are asked.
        cache: answered calls.
    """
    if limit is None:
        return None
    purse = Purse(limit)
    for pairs, settings in jobs:
        if not settings.files:
            for critique in _calls_of(pairs, settings).split(cache, retry_failed=False)[0].values():
                purse.paid_before(critique.key, critique.cost)
    return purse


def _calls_of(pairs: Sequence[PreferencePair], settings: CriticConfig) -> Calls:
    # As its chat calls the model.
    model = settings.model.removeprefix("local:")
    sampling = sampling_of(settings)
    return Calls(pairs, model, sampling=sampling, samples=settings.samples, template=settings.template)
