"""Prices, estimates, the ledger, and the limit that is never exceeded."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from critrm.budget import (
    Ledger,
    Price,
    Purse,
    critiques_table,
    dollars,
    estimate,
    estimates_table,
    most_tokens,
    n_characters,
)
from critrm.types import Critique, Message

PRICE = Price(10.0, 30.0)


def row(**changes) -> Critique:
    facts = {"key": "k", "pair_id": "p", "side": "chosen", "text": "t", "critic": "c", "prompt_version": "v"}
    return Critique(**{**facts, "n_prompt_tokens": 100, "n_completion_tokens": 50, "cost": 0.25, **changes})


def prompts(*texts: str) -> list[tuple[Message, ...]]:
    return [(Message("user", text),) for text in texts]


def shown(renderable: object, tmp_path: Path, *, width: int = 140) -> str:
    with open(tmp_path / "out.txt", "w") as file:
        Console(file=file, width=width).print(renderable)
    return (tmp_path / "out.txt").read_text()


def test_a_price_is_per_million_tokens():
    assert PRICE.cost(1_000_000, 0) == 10.0
    assert PRICE.cost(500, 250) == pytest.approx(0.0125)


@given(st.text())
def test_no_tokenizer_makes_more_tokens_than_bytes(text):
    assert most_tokens([Message("user", text)]) > len(text.encode("utf-8", "surrogatepass"))


def test_the_bound_holds_for_a_real_tokenizer(tiny_model):
    from critrm.encoding import encode_chat
    from critrm.models import load_tokenizer

    tokenizer = load_tokenizer(str(tiny_model))
    for text in ("Water boils.", "ß日本語🧑‍🚀" * 50, "<|im_end|>" * 20, "\x00\u202e", "x"):
        assert len(encode_chat(tokenizer, [Message("user", text)])) <= most_tokens([Message("user", text)])


@settings(max_examples=200)
@given(
    limit=st.floats(0, 2),
    before=st.lists(st.floats(0, 0.3), max_size=3),
    calls=st.lists(st.tuples(st.floats(0, 0.2), st.floats(0, 1), st.booleans(), st.booleans()), max_size=40),
)
def test_what_is_spent_never_exceeds_the_limit(limit, before, calls):
    purse = Purse(limit)
    for number, cost in enumerate(before):
        purse.paid_before(f"before {number}", cost)
    spent = sum(before)
    under_way = {}
    for number, (most, share, unsure, finish_one) in enumerate(calls):
        if purse.set_aside(str(number), most):
            under_way[str(number)] = (most * share, unsure)
        if finish_one and under_way:
            key = next(iter(under_way))
            cost, unsure = under_way.pop(key)
            purse.settle(key, 0.0 if unsure else cost, unsure=unsure)
            spent += cost
    for key, (cost, unsure) in under_way.items():
        purse.settle(key, 0.0 if unsure else cost, unsure=unsure)
        spent += cost
    # Billed timeouts included, which nobody told us of.
    assert spent <= max(limit, sum(before)) + 1e-6


def test_the_refusal_says_all_there_is_to_know():
    purse = Purse(1.0)
    purse.paid_before("z", 0.25)
    purse.paid_before("z", 0.25)
    assert purse.set_aside("a", 0.5) and purse.set_aside("b", 0.2)
    assert not purse.set_aside("c", 0.1)
    purse.settle("a", 0.3)
    purse.settle("b", 0.0, unsure=True)
    text = str(purse.refusal(1234))
    for part in (
        "$1.00",
        "$0.5500 spent",
        "$0.2500 of it in earlier runs",
        "$0.2500 left",
        "1,234 calls",
        "--max-cost",
    ):
        assert part in text
    assert "$0.2000 more may be billed for calls that timed out" in text


def test_a_call_asked_again_is_paid_for_both_times():
    purse = Purse(1.0)
    purse.paid_before("a", 0.25)
    assert purse.set_aside("a", 0.5)
    purse.settle("a", 0.5)
    purse.paid_before("a", 0.75)  # as the cache has it now
    assert (purse.spent, purse.spent_before, purse.left) == (0.75, 0.25, 0.25)


def test_the_ledger_keeps_this_run_and_the_cache_apart():
    ledger = Ledger()
    ledger.add(row(), cached=True)
    ledger.add(row(), cached=False)
    ledger.add(row(failure="http 500", n_prompt_tokens=0, n_completion_tokens=0, cost=0.0), cached=False)
    facts = ledger.facts()
    assert facts.pop("seconds") >= 0
    assert facts == {
        "calls": 2,
        "cached": 1,
        "failed": 1,
        "tokens_in": 100,
        "tokens_out": 50,
        "cost": 0.25,
        "cost_cached": 0.25,
    }
    assert ledger.line().startswith("$0.2500, 1 cached, 1 failed, 100 in, 50 out, ")


def test_an_estimate_without_anything_to_go_by():
    found = estimate(prompts("x" * 400, "y" * 800), critic="c", max_tokens=100, price=PRICE, cached=[])
    assert (found.n_calls, found.n_cached, found.tokens_in) == (2, 0, 300)
    assert found.tokens_out == found.most_tokens_out == 200
    assert found.cost == pytest.approx(PRICE.cost(300, 200))
    assert found.most_cost == pytest.approx(PRICE.cost(400 + 800 + 2 * 64, 200))
    assert found.basis == "in by 4 characters a token, out by max_tokens"


def test_an_estimate_goes_by_what_is_cached():
    cached = [(300, row()), (300, row(n_completion_tokens=30)), (999, row(failure="http 500"))]
    found = estimate(prompts("x" * 600), critic="c", max_tokens=100, price=PRICE, cached=cached)
    assert (found.tokens_in, found.tokens_out, found.most_tokens_out) == (200, 40, 100)
    assert found.paid == pytest.approx(0.75)
    assert "cached" in found.basis


def test_an_estimate_goes_by_a_tokenizer_and_by_other_answers():
    found = estimate(
        prompts("x" * 600),
        critic="c",
        max_tokens=100,
        price=None,
        cached=[],
        mean_written=500.0,
        count=lambda messages: n_characters(messages) // 2,
    )
    assert (found.tokens_in, found.tokens_out) == (300, 100)
    assert found.cost is found.most_cost is None


def test_estimates_are_shown_by_critic_and_in_all(tmp_path):
    one, two = (
        estimate(prompts("x" * 400), critic=name, max_tokens=100, price=price, cached=[])
        for name, price in (("[red]a", PRICE), ("b", Price(0.0, 0.0)))
    )
    text = shown(estimates_table([one, two], limit=5.0), tmp_path)
    assert "[red]a" in text and "Limit: $5.00" in text
    assert next(line for line in text.splitlines() if line.startswith("all ")).split()[1:4] == ["2", "0", "200"]
    unpriced = estimate(prompts("x"), critic="c", max_tokens=1, price=None, cached=[])
    text = shown(estimates_table([unpriced]), tmp_path)
    assert "?" in text and "price_in" in text and "\nall " not in text


def test_the_summary_shows_money_only_where_there_is_any(tmp_path):
    ledger = Ledger()
    ledger.add(row(), cached=False)
    ledger.add(row(), cached=True)
    text = shown(critiques_table([row(), row()], ledger, n_skipped=0), tmp_path)
    assert "$0.2500" in text and "$0.5000" in text
    assert "$" not in shown(critiques_table([row(cost=0.0)], Ledger(), n_skipped=1), tmp_path)


def test_small_amounts_have_more_places():
    assert [dollars(amount) for amount in (0, 0.00123, 1.5, 1234.5)] == ["$0.00", "$0.0012", "$1.50", "$1,234.50"]
