"""The grader: a model that splits critiques into atomic information units and checks each (Appendix E).

Precision: every unit of a critique is checked against the question, the response and a reference answer. Recall: every
unit of a reference critique is looked for in the critique.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from critrm.budget import Ledger, Price, Purse
from critrm.critique_cache import CritiqueCache
from critrm.errors import DataError
from critrm.information_units import Case, Grade, read_truth, read_units
from critrm.llm import Chat, Sampling
from critrm.prompts import load_template, quote_imitations, render_conversation, render_template
from critrm.questions import Question, ask
from critrm.types import Critique, Message, PreferencePair, Side

MAX_TOKENS = 1024
"""Of a grader's reply by default: the longest is a reference answer."""

OnAnswer = Callable[[int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Grader:
    """The model that grades critiques, and how it is called: the arguments of `questions.ask`."""

    chat: Chat
    name: str
    cache: CritiqueCache
    sampling: Sampling = Sampling(max_tokens=MAX_TOKENS)
    retry_failed: bool = False
    price: Price | None = None
    purse: Purse | None = None
    ledger: Ledger = field(default_factory=Ledger)
    watch: Callable[[str, int], OnAnswer] | None = None
    """Is told of each round of calls, by name and number, and gives what is to be told of the answers."""

    def ask(self, questions: Sequence[Question], *, round_name: str) -> list[Critique]:
        """The replies to one round of calls, in order."""
        return ask(
            questions,
            self.chat,
            asked=self.name,
            sampling=self.sampling,
            cache=self.cache,
            retry_failed=self.retry_failed,
            price=self.price,
            purse=self.purse,
            ledger=self.ledger,
            on_answer=self.watch(round_name, len(questions)) if self.watch else None,
        )


def meta_critique(
    pairs: Sequence[PreferencePair],
    critiques: Sequence[Critique],
    *,
    references: Sequence[Critique],
    grader: Grader,
    answers: Mapping[str, str] | None = None,
) -> list[Grade]:
    """Grade critiques against reference critiques of the same completions.

    Args:
        pairs: the pairs that the critiques are about.
        critiques: the critiques, of one critic or several; those of other pairs are left out.
        references: at most one critique of each completion, by any critic.
        grader: who grades.
        answers: pair id -> reference answer; the grader writes those that are missing.

    Returns:
        One grade per critique, in their order.

    Raises:
        DataError: no critique is of these pairs, or there are two reference critiques of one completion.
        CriticError: the grader cannot be used at all, or the limit is reached; what was answered is stored.
    """
    return check_cases(make_cases(pairs, critiques, references=references, grader=grader, answers=answers), grader)


def make_cases(
    pairs: Sequence[PreferencePair],
    critiques: Sequence[Critique],
    *,
    references: Sequence[Critique],
    grader: Grader,
    answers: Mapping[str, str] | None = None,
) -> list[Case]:
    """The first half of `meta_critique`: have the critiques split into units, and the reference answers written."""
    by_id = {pair.id: pair for pair in pairs}
    graded = [critique for critique in critiques if critique.pair_id in by_id]
    if not graded:
        raise DataError("no critique is of any of these pairs", field="pair_id")
    places = {(critique.pair_id, critique.side) for critique in graded}
    reference_of = _reference_of(each for each in references if (each.pair_id, each.side) in places)
    texts = {each.text: each for each in (*graded, *reference_of.values()) if not each.failure}
    known = dict(answers or {})
    unanswered = [by_id[pair_id] for pair_id in dict.fromkeys(each.pair_id for each in graded) if pair_id not in known]
    questions = [_question("metacritique_units", each, critique=text) for text, each in texts.items()]
    questions += [_answer_question(pair) for pair in unanswered]
    replies = grader.ask(questions, round_name="units")
    units = {text: _units(reply) for text, reply in zip(texts, replies[: len(texts)], strict=True)}
    no_answer = {}
    for pair, reply in zip(unanswered, replies[len(texts) :], strict=True):
        known[pair.id] = reply.text
        if reply.failure:
            no_answer[pair.id] = f"no reference answer: {reply.failure}"
    return [
        _case(
            critique,
            by_id[critique.pair_id],
            reference_of.get((critique.pair_id, critique.side)),
            units=units,
            answer=known[critique.pair_id],
            no_answer=no_answer.get(critique.pair_id, ""),
        )
        for critique in graded
    ]


def _reference_of(references: Iterable[Critique]) -> dict[tuple[str, Side], Critique]:
    found: dict[tuple[str, Side], Critique] = {}
    for each in references:
        if (each.pair_id, each.side) in found:
            where = f"{each.pair_id!r}, {each.side}"
            raise DataError(f"two reference critiques of {where}: give those of one critic", field="pair_id")
        found[each.pair_id, each.side] = each
    return found


def _question(template: str, about: Critique | Case, **values: str) -> Question:
    loaded = load_template(template)
    # What imitates the template's own labels is quoted; the question is quoted where it is rendered.
    texts = {
        name: value if name == "question" else quote_imitations(value, template=loaded)
        for name, value in values.items()
    }
    message = Message("user", render_template(loaded, **texts))
    return Question(pair_id=about.pair_id, side=about.side, messages=(message,), template_version=loaded.version)


def _answer_question(pair: PreferencePair) -> Question:
    loaded = load_template("metacritique_answer")
    text = render_template(loaded, conversation=render_conversation(pair.prompt, template=loaded))
    message = Message("user", text)
    return Question(pair_id=pair.id, side="chosen", messages=(message,), template_version=loaded.version)


def _units(reply: Critique) -> tuple[tuple[str, ...], str]:
    """The units of a critique, or why there are none."""
    if reply.failure:
        return (), f"the grader's call failed: {reply.failure}"
    if reply.finish_reason == "length":
        return (), "the list of units was cut at max_tokens"
    units = read_units(reply.text)
    return units, "" if units else "the critique makes no claim"


def _case(
    critique: Critique,
    pair: PreferencePair,
    reference: Critique | None,
    *,
    units: Mapping[str, tuple[tuple[str, ...], str]],
    answer: str,
    no_answer: str,
) -> Case:
    failed = "the critic's call failed" if critique.failure else ""
    own, no_units = ((), failed) if failed else units[critique.text]
    theirs: tuple[str, ...] = ()
    no_reference = "no reference critique"
    if reference and not reference.failure:
        theirs, reason = units[reference.text]
        no_reference = f"reference critique: {reason}" if reason else ""
    return Case(
        pair_id=critique.pair_id,
        side=critique.side,
        critic=critique.critic,
        prompt=pair.prompt,
        response=pair.completion(critique.side),
        critique=critique.text,
        answer=answer,
        units=own,
        reference_units=theirs,
        no_precision=no_units or no_answer,
        no_recall=failed or no_reference,
    )


def check_cases(cases: Sequence[Case], grader: Grader) -> list[Grade]:
    """The second half of `meta_critique`: have the grader check every unit, one call each.

    A call that failed, or a reply without one clear verdict, leaves its unit unscored.
    """
    questions = [question for case in cases for question in (*_precision(case), *_recall(case))]
    replies = iter(grader.ask(questions, round_name="checks"))

    def labels(n: int) -> tuple[bool | None, ...]:
        return tuple(None if reply.failure else read_truth(reply.text) for reply in (next(replies) for _ in range(n)))

    return [
        Grade(
            pair_id=case.pair_id,
            side=case.side,
            critic=case.critic,
            units=case.units,
            reference_units=case.reference_units,
            precision_labels=labels(len(_precision(case))),
            recall_labels=labels(len(_recall(case))),
            no_precision=case.no_precision,
            no_recall=case.no_recall,
        )
        for case in cases
    ]


def _precision(case: Case) -> list[Question]:
    if case.no_precision:
        return []
    template = load_template("metacritique_precision")
    question = render_conversation(case.prompt, template=template)
    texts = {"question": question, "response": case.response, "answer": case.answer}
    return [_question("metacritique_precision", case, unit=unit, **texts) for unit in case.units]


def _recall(case: Case) -> list[Question]:
    if case.no_recall:
        return []
    return [_question("metacritique_recall", case, unit=unit, critique=case.critique) for unit in case.reference_units]
