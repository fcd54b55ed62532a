"""Asks a model questions, each once: answers are cached like critiques, under a key of all that determines them.

What the judge and the grader share: the calls, and the flags that say whom to call.
"""

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

from cyclopts import Parameter
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from critrm.budget import MAYBE_BILLED, Ledger, Price, Purse
from critrm.calls import ask_each, reply_record
from critrm.config import CriticConfig, validated
from critrm.critics import complete_critic, load_critics, no_price, price_of
from critrm.critique_cache import CritiqueCache
from critrm.errors import ConfigError, CriticError
from critrm.llm import Chat, Reply, Sampling
from critrm.store import content_hash
from critrm.types import Critique, Message, Side


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """One call: what is asked, and about which completion."""

    pair_id: str
    side: Side
    messages: tuple[Message, ...]
    template_version: str


def ask(
    questions: Sequence[Question],
    chat: Chat,
    *,
    asked: str,
    sampling: Sampling,
    cache: CritiqueCache,
    retry_failed: bool = False,
    price: Price | None = None,
    purse: Purse | None = None,
    ledger: Ledger | None = None,
    score_of: Callable[[Reply], float | None] | None = None,
    on_answer: Callable[[int], None] | None = None,
) -> list[Critique]:
    """Have a model answer questions.

    Args:
        questions: the questions; equal ones share a call.
        chat: the model.
        asked: the name that the model goes by.
        sampling: how replies are drawn; part of the key.
        cache: answered calls; those are not made again.
        retry_failed: make calls again that failed before.
        price: what the model's tokens cost.
        purse: the limit on what may be spent; it needs a price.
        ledger: is kept of the calls.
        score_of: a number that only the reply's token probabilities give; stored as the answer's `score`.
        on_answer: is told how many questions each answer settles, as it becomes known.

    Returns:
        The answers in the order of the questions, in the form in which critiques are stored. A failed call has its
        `failure` set.

    Raises:
        ConfigError: a limit without a price.
        CriticError: the model cannot be used at all, or the limit is reached; what was answered is stored.
        StorageError: the cache cannot be written.
    """
    if purse and price is None:
        raise no_price(asked)
    keys = [_key(question, chat.model, sampling) for question in questions]
    counts = Counter(keys)
    # In the order of keys: a hash's order says nothing of which completion is the chosen one.
    distinct = dict(sorted(zip(keys, questions, strict=True), key=lambda item: item[0]))
    found: dict[str, Critique] = {}
    paid: dict[str, float] = {}
    """What calls to be made again have cost before: a failure can be billed."""

    def receive(answer: Critique, *, cached: bool) -> None:
        if ledger:
            ledger.add(answer, cached=cached)
        # As the cache has it: with the cost of the failures before it.
        found[answer.key] = replace(answer, cost=answer.cost + paid.get(answer.key, 0.0))
        if on_answer:
            on_answer(counts[answer.key])

    for key in distinct:
        stored = cache.get(key)
        if stored and purse:
            purse.paid_before(key, stored.cost)
        if stored and not (stored.failure and retry_failed):
            receive(stored, cached=True)
        elif stored:
            paid[key] = stored.cost
            if ledger:
                ledger.cost_cached += stored.cost
    todo = {key: question for key, question in distinct.items() if key not in found}

    def answered(reply: Reply) -> None:
        question = todo[reply.id]
        answer = reply_record(
            reply,
            question.messages,
            pair_id=question.pair_id,
            side=question.side,
            critic=asked,
            prompt_version=question.template_version,
            price=price,
        )
        if score_of and not answer.failure:
            answer = replace(answer, score=score_of(reply))
        cache.put(answer)
        if purse:
            purse.settle(reply.id, answer.cost, unsure=answer.failure.startswith(MAYBE_BILLED))
        receive(answer, cached=False)

    if todo:
        asyncio.run(
            ask_each(
                todo,
                chat,
                messages_of=lambda key: todo[key].messages,
                sampling=sampling,
                answered=answered,
                price=price,
                purse=purse,
            )
        )
    if missing := len(distinct) - len(found):
        raise CriticError(f"{chat.model} left {missing} calls without a reply. Run the same command again.")
    return [
        replace(found[key], pair_id=question.pair_id, side=question.side, critic=asked)
        for key, question in zip(keys, questions, strict=True)
    ]


def _key(question: Question, model: str, sampling: Sampling) -> str:
    # The same form as a critique's, so that a template used as either is paid for once.
    # 1 and 1.0 are the same temperature, but not the same text.
    facts = [float(sampling.temperature), float(sampling.top_p), sampling.max_tokens, sampling.seed]
    # A stored answer of a call that asked for no probabilities has none.
    facts += [sampling.top_logprobs] if sampling.top_logprobs else []
    texts = [[message.role, message.content] for message in question.messages]
    return content_hash(model, facts, question.template_version, texts)


def progress(console: Console) -> Progress:
    """A progress bar: what, how many of all, time left, and the ledger's line."""
    # No text is read as markup: a model's name may hold brackets.
    what, line = (TextColumn(text, markup=False) for text in ("{task.description}", "{task.fields[ledger]}"))
    return Progress(what, BarColumn(bar_width=10), MofNCompleteColumn(), TimeRemainingColumn(), line, console=console)


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class ModelFlags:
    """Whom to call: a named critic with changes, or a model by name.

    Attributes:
        critic: a critic that `critrm critics` lists; or, with --model, the model's name in the results.
        model: a served model's name, `embedded:NAME`, or `local:FOLDER`; the named critic's when not given.
        critics: a file of your own critics.
        base_url: the OpenAI-compatible endpoint, or several of the same model with commas between.
        key_variable: the environment variable that holds the key; OPENAI_API_KEY when not given.
        temperature: 0 is greedy; the named critic's, else 0, when not given.
        top_p: share of the probability that is sampled from; the named critic's, else 1.
        max_tokens: the length of a reply.
        seed: of the sampling; 0 when not given.
        price_in: US dollars per million tokens read; the named critic's when not given.
        price_out: US dollars per million tokens written.
        max_cost: US dollars that these calls may cost, earlier attempts included; the run stops before.
        concurrency: calls under way at once; 16 when not given.
        timeout: seconds to wait for an answer; 60 when not given.
        requests_per_minute: calls sent per minute at most.
        tokens_per_minute: tokens read and written per minute at most.
        cache: the file of answered calls; one for all runs when not given.
        retry_failed: make calls again that failed before.
    """

    critic: str = ""
    model: str = ""
    critics: Path | None = None
    base_url: str | None = None
    key_variable: str | None = None
    temperature: float | None = None
    top_p: float | None = None
    max_tokens: int | None = None
    seed: int | None = None
    price_in: float | None = None
    price_out: float | None = None
    max_cost: float | None = None
    concurrency: int | None = None
    timeout: float | None = None
    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None
    cache: Path | None = None
    retry_failed: bool = False

    @property
    def name(self) -> str:
        """What the model is called in the results; empty when none is named."""
        return self.critic or self.model

    def settings(self, *, max_tokens: int) -> CriticConfig:
        """The settings, complete.

        Args:
            max_tokens: the length of a reply where the flag is not given; a critic's own is meant for critiques.

        Raises:
            ConfigError: no model is named or known, or the settings do not fit together.
        """
        if not self.name:
            raise ConfigError("which model? Give --critic (`critrm critics` lists them) or --model")
        own = ("critic", "critics", "max_cost", "cache", "retry_failed")
        flags = {each.name: getattr(self, each.name) for each in fields(self) if each.name not in own}
        given = {name: value for name, value in flags.items() if value not in (None, "")}
        settings = validated(
            CriticConfig, {"max_tokens": max_tokens} | given, where=f"critic {self.name}", what="settings"
        )
        return complete_critic(self.name, settings, critics=load_critics(self.critics))

    def purse(self, settings: CriticConfig) -> Purse | None:
        """The limit on the cost, if there is one.

        Raises:
            ConfigError: it is no amount, or the price is not known.
        """
        if self.max_cost is None:
            return None
        if not self.max_cost >= 0:
            raise ConfigError("--max-cost must be an amount of US dollars")
        if price_of(settings) is None:
            raise no_price(self.name)
        return Purse(self.max_cost)
