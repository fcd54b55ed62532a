"""Stage 5: the generative judge rates every completion from 0 to 10, without and with a critique (section 5.3).

A pair is right only if the chosen completion's rating is strictly higher: equal ratings are a tie, which is not right.
A reply without one clear rating is unscored, and so is its pair. With `expected` the score is not the rating that was
written but the mean of all eleven by the probabilities that the judge gave them, which hardly ever ties.
"""

import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from critrm.benchmarks import find_benchmark, read_benchmark, summarise
from critrm.budget import Ledger, Price, Purse
from critrm.critics import open_chat, price_of, sampling_of
from critrm.critique_cache import CritiqueCache, default_cache_path
from critrm.critique_files import read_critiques
from critrm.errors import ConfigError, CriticError, DataError
from critrm.likert import NO_PROBABILITIES, NOT_WHOLE, expected_rating, read_rating
from critrm.llm import Chat, Reply, Sampling
from critrm.prompts import Template, load_template, quote_imitations, render_conversation, render_template
from critrm.questions import ModelFlags, Question, ask, progress
from critrm.store import write_manifest, write_records, write_text
from critrm.types import NO_CRITIC, SIDES, Critique, Message, PreferencePair, Side, Verdict
from critrm.verdicts import judge_table, recorded_verdicts, result_json, verdict_scores

MAX_TOKENS = 384
"""Of a reply by default: a critique of the length that `critrm critique` asks for, and the rating behind it."""
TOP_LOGPROBS = 20
"""Alternatives asked for with an expected score: as many as endpoints give, so that all eleven grades may be there."""


def judge_pairs(
    pairs: Sequence[PreferencePair],
    chat: Chat,
    *,
    judge: str,
    sampling: Sampling,
    cache: CritiqueCache,
    with_critique: bool = False,
    critiques: Sequence[Critique] | None = None,
    expected: bool = False,
    template: str | Path | None = None,
    retry_failed: bool = False,
    price: Price | None = None,
    purse: Purse | None = None,
    ledger: Ledger | None = None,
    on_answer: Callable[[int], None] | None = None,
) -> list[Verdict]:
    """Have a judge rate both completions of each pair, each on its own (section 5.3).

    Args:
        pairs: the preference pairs.
        chat: the judge's model.
        judge: its name in the results.
        sampling: how replies are drawn.
        cache: answered calls; those are not made again.
        with_critique: the judge writes a critique before the rating, in the same reply.
        critiques: critiques by one critic that the judge reads before it rates; a completion without one is unscored.
        expected: score by the probabilities of the rating's token; the rating as written is the verdict's `rating`. A
            reply without usable probabilities is unscored.
        template: a file instead of the template that belongs to the above; it uses `conversation`, `response` and, with
            critiques, `critique`.
        retry_failed: make calls again that failed before.
        price: what the judge's tokens cost.
        purse: the limit on what may be spent; it needs a price.
        ledger: is kept of the calls.
        on_answer: is told how many completions each answer settles.

    Returns:
        Two verdicts per pair: the pairs in their order, chosen then rejected.

    Raises:
        ConfigError: the template cannot be used, or critiques are both given and to be written.
        CriticError: the judge cannot be used at all, or the limit is reached; what was answered is stored.
        DataError: there are two critiques of one completion.
        StorageError: the cache cannot be written.
    """
    if with_critique and critiques is not None:
        raise ConfigError("either the judge writes a critique first or it is given critiques, not both")
    default = "judge_given_critique" if critiques is not None else "judge_with_critique" if with_critique else "judge"
    needs = ("conversation", "response", *(["critique"] if critiques is not None else []))
    loaded = load_template(template or default, needs=needs)
    given = _by_place(critiques or ())
    places = [(pair, side, given.get((pair.id, side))) for pair in pairs for side in SIDES]
    asked = [critiques is None or bool(critique and not critique.failure) for _, _, critique in places]
    questions = [
        _question(pair, side, critique.text if critique else "", loaded)
        for (pair, side, critique), is_asked in zip(places, asked, strict=True)
        if is_asked
    ]
    if on_answer and (n_left_out := len(places) - len(questions)):
        on_answer(n_left_out)
    answers = iter(
        ask(
            questions,
            chat,
            asked=judge,
            sampling=replace(sampling, top_logprobs=TOP_LOGPROBS) if expected else sampling,
            cache=cache,
            retry_failed=retry_failed,
            price=price,
            purse=purse,
            ledger=ledger,
            score_of=_expected if expected else None,
            on_answer=on_answer,
        )
    )
    return [
        _verdict(next(answers), critique, expected=expected)
        if is_asked
        else Verdict(pair_id=pair.id, side=side, likert=None, judge=judge, unscored="no critique to read")
        for (pair, side, critique), is_asked in zip(places, asked, strict=True)
    ]


def _by_place(critiques: Iterable[Critique]) -> dict[tuple[str, Side], Critique]:
    found: dict[tuple[str, Side], Critique] = {}
    for critique in critiques:
        place = (critique.pair_id, critique.side)
        if place in found:
            raise DataError(f"two critiques of {place[0]!r}, {place[1]}: give those of one critic", field="pair_id")
        found[place] = critique
    return found


def _question(pair: PreferencePair, side: Side, critique: str, template: Template) -> Question:
    text = render_template(
        template,
        conversation=render_conversation(pair.prompt, template=template),
        response=quote_imitations(pair.completion(side), template=template),
        critique=quote_imitations(critique, template=template),
    )
    return Question(pair_id=pair.id, side=side, messages=(Message("user", text),), template_version=template.version)


def _expected(reply: Reply) -> float | None:
    return expected_rating(reply.text, reply.choices, cut=reply.finish_reason == "length")


def _verdict(answer: Critique, given: Critique | None, *, expected: bool) -> Verdict:
    rating = read_rating(answer.text, cut=answer.finish_reason == "length")
    critique, critic = (given.text, given.critic) if given else (rating.before, answer.critic if rating.before else "")
    written = None if answer.failure else rating.likert
    unscored = f"call failed: {answer.failure}" if answer.failure else rating.unscored
    if expected and written is not None and answer.score is None:
        unscored = NO_PROBABILITIES if written.is_integer() else NOT_WHOLE
    return Verdict(
        pair_id=answer.pair_id,
        side=answer.side,
        likert=answer.score if expected else written,
        rating=written if expected else None,
        judge=answer.critic,
        critique=critique,
        critic=critic,
        reply=answer.text,
        unscored=unscored,
        key=answer.key,
        n_prompt_tokens=answer.n_prompt_tokens,
        n_completion_tokens=answer.n_completion_tokens,
        cost=answer.cost,
    )


def command(
    pairs: str,
    *,
    out: Path,
    with_critique: bool = False,
    critiques: Path | None = None,
    expected: bool = False,
    recorded: bool = False,
    template: Path | None = None,
    benchmark: str = "pairs",
    split: str = "",
    source: str = "",
    subset: str = "",
    limit: int | None = None,
    skip_bad: bool = False,
    flags: ModelFlags = ModelFlags(),  # noqa: B008 - frozen
) -> None:
    """Have a model rate every completion from 0 to 10; the same command goes on where it was interrupted.

    Args:
        pairs: the preference pairs: a file or a hub id.
        out: folder for the verdicts and the result.
        with_critique: the judge writes a critique before the rating.
        critiques: critiques that the judge reads before it rates.
        expected: the score is the mean of all ratings by their token probabilities, not the one that was written.
        recorded: call nobody: the `score` column of --critiques is the verdict.
        template: a file instead of our template.
        benchmark: whose sections to compute.
        split: only pairs of this split.
        source: only pairs of these sources, comma separated.
        subset: only pairs of these subsets, comma separated.
        limit: only so many pairs.
        skip_bad: leave out rows that cannot be read instead of stopping at the first.
        flags: whom to call.
    """
    started, console = time.time(), Console()
    _check_flags(flags, critiques, with_critique=with_critique, expected=expected, recorded=recorded)
    find_benchmark(benchmark)  # a misspelt name is found before anything is paid for
    found = read_benchmark(
        pairs, benchmark=benchmark, split=split, source=source, subset=subset, limit=limit, skip_bad=skip_bad
    ).pairs
    ids = {pair.id for pair in found}
    rows = None if critiques is None else [row for row in read_critiques(critiques) if row.pair_id in ids]
    if rows == []:
        raise DataError("no critique is of any of these pairs", path=str(critiques), field="pair_id")
    summarise(found, [], benchmark=benchmark, model="", critic="")  # so are pairs that are not the benchmark's
    ledger, facts = Ledger(), dict[str, Any]()
    if recorded:
        verdicts = recorded_verdicts(rows or ())
    else:
        verdicts, facts = _call(
            found, flags, rows, with_critique=with_critique, expected=expected, template=template, ledger=ledger
        )
    critic = rows[0].critic if rows else verdicts[0].judge if with_critique else NO_CRITIC
    result = summarise(found, verdict_scores(verdicts), benchmark=benchmark, model=verdicts[0].judge, critic=critic)
    write_records(out / "verdicts.jsonl", verdicts)
    write_text(out / f"{benchmark}.json", json.dumps(result_json(result, verdicts), indent=2) + "\n")
    write_manifest(
        out,
        config={"pairs": pairs, "critiques": str(critiques or ""), "recorded": recorded, "ledger": ledger.facts()}
        | facts,
        started=started,
        inputs=[pairs, *([critiques] if critiques else [])],
        cost=ledger.cost + ledger.cost_cached,
    )
    console.print(judge_table(result, verdicts))
    if all(verdict.likert is None for verdict in verdicts):
        raise CriticError(f"no completion was scored: {verdicts[0].unscored}. Each reply is in {out}/verdicts.jsonl.")
    console.print(f"Result: {out / f'{benchmark}.json'}", soft_wrap=True, markup=False)


def _check_flags(
    flags: ModelFlags, critiques: Path | None, *, with_critique: bool, expected: bool, recorded: bool
) -> None:
    if recorded and critiques is None:
        raise ConfigError("--recorded reads ratings: name their file with --critiques")
    if recorded and (flags.name or with_critique or expected):
        raise ConfigError("--recorded calls nobody: leave out --model, --critic, --with-critique and --expected")
    if with_critique and critiques is not None:
        raise ConfigError("either the judge writes a critique first (--with-critique) or it reads --critiques")


def _call(
    pairs: Sequence[PreferencePair],
    flags: ModelFlags,
    critiques: Sequence[Critique] | None,
    *,
    with_critique: bool,
    expected: bool,
    template: Path | None,
    ledger: Ledger,
) -> tuple[list[Verdict], dict[str, Any]]:
    """The verdicts of the model that the flags name, and the settings for the manifest."""
    settings = flags.settings(max_tokens=MAX_TOKENS)
    purse, chat = flags.purse(settings), open_chat(settings)
    with CritiqueCache(flags.cache or default_cache_path()) as store, progress(Console()) as bar:
        task = bar.add_task(f"judge {flags.name}", total=2 * len(pairs), ledger="")
        verdicts = judge_pairs(
            pairs,
            chat,
            judge=flags.name,
            sampling=sampling_of(settings),
            cache=store,
            with_critique=with_critique,
            critiques=critiques,
            expected=expected,
            template=template,
            retry_failed=flags.retry_failed,
            price=price_of(settings),
            purse=purse,
            ledger=ledger,
            on_answer=lambda n: bar.update(task, advance=n, ledger=ledger.line()),
        )
    own = {"with_critique": with_critique, "expected": expected, "template": str(template or "")}
    return verdicts, settings.model_dump(mode="json", exclude={"template", "file", "samples"}) | own
