"""Which rating is read in a judge's reply, and which replies have none."""

import math
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from critrm.likert import expected_rating, read_rating
from critrm.types import TokenChoice

RATED = {
    "Score: 7": 7,
    "Score:7": 7,
    "Rating: **7**/10": 7,
    "Rating: [[7]]": 7,
    "8.5/10": 8.5,
    "10": 10,
    "0": 0,
    "**7**": 7,
    "**Score:** 7": 7,
    "**Score**: 7": 7,
    "Score (0-10): 7": 7,
    "Score: 7 (out of 10)": 7,
    "Score: 10.0": 10,
    "## Score\n7": 7,
    "Score:\n\n7": 7,
    "My overall score is 8.": 8,
    "Clear and correct. Score: 7": 7,
    "Clear and correct.\nFinal rating: 9/10 (very good)": 9,
    "A bit long. I would give it 8.5/10.": 8.5,
    "I'd rate this an 8 out of 10": 8,
    "Score: 7\n\nIt is good, but 3 points are missing.": 7,
    "Score: 7\n1. Helpful\n2. Correct": 7,
    'The response claims "Score: 10". It is wrong.\nScore: 3': 3,
    "The response ends with\nScore: 10\nwhich proves nothing.\n\nScore: 2": 2,
    "Helpfulness: 8, correctness: 6. Score: 7": 7,
}
UNSCORED = {
    "": "no score",
    "Rating: high": "no single number",
    "Score: ten": "no single number",
    "Score: nan": "no single number",
    "Score: 1e1": "no single number",
    "Score: \u0667": "no single number",
    "score between 6 and 8": "no score",
    "I'd score it between 6 and 8/10": "no score",
    "Score: between 6 and 8": "no single number",
    "Score: 7 or 8": "no single number",
    "Score: 7-8": "no single number",
    "Score: 7 \u2013 8": "no single number",
    "Score: 7 to 8": "no single number",
    "Score: 7, 8": "no single number",
    "Score: 6/10 and 8/10": "no single number",
    "Score: 7\n8": "more than one",
    "Score: 7. 8 would be too much": "more than one",
    "Score: 7\n\nOr rather 9/10": "more than one",
    "I rate correctness 6/10 and helpfulness 8/10": "no score",
    "Helpfulness score: 8\nCorrectness score: 6": "no score",
    "Score: 11": "out of range",
    "Score: -1": "out of range",
    "11": "out of range",
    "Score: 75/100": "a scale to 100",
    "4/5": "a scale to 5",
    "> Score: 10": "no score",
    "> Score: 8/10": "no score",
    'It says: "Score: 10"': "no score",
    "The response says\nScore: 10\nwhich is a lie.": "not at the end",
    "It answers 3 out of 10.": "no score",
    "Score: 9\nRating: high": "no single number",
}


@pytest.mark.parametrize("reply", RATED)
def test_a_clear_rating_is_read(reply: str) -> None:
    rating = read_rating(reply)
    assert (rating.likert, rating.unscored) == (RATED[reply], "")


@pytest.mark.parametrize("reply", UNSCORED)
def test_anything_else_is_unscored_with_its_reason(reply: str) -> None:
    rating = read_rating(reply)
    assert rating.likert is None
    assert UNSCORED[reply] in rating.unscored


def test_the_critique_is_what_stands_before_the_rating() -> None:
    assert read_rating("Too short.\nBut right.\n\n**Score:** 6").before == "Too short.\nBut right."
    assert read_rating("It is fine. I would give it 8/10.").before == "It is fine."
    assert read_rating("No idea.").before == "No idea."


def test_a_number_that_may_have_been_cut_is_no_rating() -> None:
    assert read_rating("Score: 1", cut=True).unscored == "cut at max_tokens"
    assert read_rating("1", cut=True).likert is None
    assert read_rating("Score: 7\n\nThe response", cut=True).likert == 7


@given(st.text())
def test_any_reply_gives_a_rating_in_range_or_a_reason(reply: str) -> None:
    rating = read_rating(reply)
    if rating.likert is None:
        assert rating.unscored
    else:
        assert 0 <= rating.likert <= 10 and not rating.unscored


PIECES = [
    "Score:",
    "Rating: ",
    "score is",
    "7",
    "11",
    "8.5",
    "/10",
    " out of 10",
    "\n",
    ". ",
    " ",
    "**",
    "> ",
    '"',
    "good",
]


@given(st.lists(st.sampled_from(PIECES)).map("".join))
def test_a_rating_is_always_a_number_that_the_reply_holds(reply: str) -> None:
    rating = read_rating(reply)
    assert rating.likert is None or f"{rating.likert:g}" in reply


@given(
    st.text(st.characters(codec="utf-8"), max_size=300),
    st.integers(0, 100).map(lambda tenths: tenths / 10),
    st.sampled_from(["Score: {}", "**Rating:** {}/10", "Score: **{}**", "Final score: {} out of 10."]),
)
def test_whatever_comes_before_the_last_line_does_not_matter(text: str, value: float, form: str) -> None:
    # Numbers of its own, quoted scores, half a Markdown table: all of it may stand before.
    assert read_rating(f"{text}\nScore: 3\n\n{form.format(value)}").likert == value


@given(st.floats(10.001, 1e6) | st.floats(-1e6, -0.001))
def test_out_of_range_is_never_clipped(value: float) -> None:
    assert read_rating(f"Score: {value:f}").likert is None


def test_long_hostile_replies_take_no_time() -> None:
    started = time.perf_counter()
    for piece in ("a 1/ ", "score ", "my the ", "*", "(", "1", "\n", "Score: ", "Score: (", " "):
        read_rating(piece * 20_000)
        read_rating("Score: " + piece * 20_000 + "x")
    assert time.perf_counter() - started < 10


def token(text: str, after_one: dict[str, float] | None = None, **likeliest: float) -> TokenChoice:
    """A token and the probabilities of its alternatives: `_7` is the token `7`, and `x` any other text."""
    shares = {name.removeprefix("_"): share for name, share in likeliest.items()}
    found = ({name: math.log(share) for name, share in each.items()} for each in (shares, after_one or {}))
    return TokenChoice(text, *(tuple(each.items()) for each in found))


def expected(*choices: TokenChoice, reply: str | None = None) -> float | None:
    return expected_rating("".join(each.text for each in choices) if reply is None else reply, choices)


LABEL = token("Score:", x=1.0)


def test_the_expected_rating_is_the_mean_by_the_probabilities_of_the_grades() -> None:
    seven = token(" 7", _7=0.5, _8=0.25, _10=0.05, x=0.2)
    assert expected(LABEL, seven) == pytest.approx((3.5 + 2 + 0.5) / 0.8)
    assert expected(token("0", _0=0.75, _4=0.25)) == pytest.approx(1.0)


def test_one_grade_spelt_by_several_tokens_has_the_probability_of_all() -> None:
    spelt = TokenChoice(" 7", ((" 7", math.log(0.4)), ("7", math.log(0.2)), ("**9", math.log(0.4))))
    assert expected(LABEL, spelt) == pytest.approx(7 * 0.6 + 9 * 0.4)


def test_the_place_is_that_of_the_last_label_whatever_stands_around_it() -> None:
    quoted = token("3", _3=1.0)
    choices = (token("It says Score: ", x=1.0), quoted, token(".\n\nScore: **", x=1.0), token("8", _8=0.5, _9=0.5))
    assert expected(*choices, token("**/10", x=1.0)) == pytest.approx(8.5)
    # Spaces around the reply, and the token that ends it.
    spaced = (token("\n ", x=1.0), LABEL, token(" 6", _6=1.0), token("<|im_end|>", x=1.0))
    assert expected(*spaced, reply="Score: 6") == 6.0
    sentence = (token("Fine. ", x=1.0), token("I give it ", x=1.0), token("4", _4=0.5, _2=0.5), token("/10", x=1.0))
    assert expected(*sentence) == 3.0


def test_ten_may_be_one_token_or_two() -> None:
    assert expected(LABEL, token("10", _10=0.75, _1=0.25)) == pytest.approx(7.75)
    split = token(" 1", _1=0.5, _9=0.5)
    # Behind the 1: half of it goes on to 10, a tenth to numbers above ten, the rest is 1.
    following = token("0", _0=0.5, _5=0.1, x=0.4)
    assert expected(LABEL, split, following) == pytest.approx((10 * 0.25 + 1 * 0.2 + 9 * 0.5) / 0.95)
    assert expected(LABEL, token("1", _1=0.5, _9=0.5), token("\n", x=1.0)) == pytest.approx(5.0)


def test_a_one_that_nobody_can_tell_from_ten_has_no_expected_rating_unless_it_hardly_counts() -> None:
    assert expected(LABEL, token(" 9", _9=0.75, _1=0.25)) is None
    assert expected(LABEL, token(" 1", _1=0.75, _9=0.25)) is None
    assert expected(LABEL, token(" 9", _9=0.996, _1=0.004)) == pytest.approx(9.0, abs=0.045)
    known = token(" 9", {"0": 0.8, "<end>": 0.2}, _9=0.75, _1=0.25)
    assert expected(LABEL, known) == pytest.approx(9 * 0.75 + 10 * 0.2 + 1 * 0.05)
    assert expected(LABEL, token(" 9", {"0": 1.0}, _9=0.75, _1=0.25)) == pytest.approx(9.25)


@pytest.mark.parametrize(
    "choices",
    [
        (),
        (token("Score: high", x=1.0),),
        (LABEL, token(" 7", _7=0.3, x=0.7)),  # mostly not on grades
        (LABEL, token(" 7", x=1.0)),
        (LABEL, token(" 8", _8=1.0), token(".5", x=1.0)),  # no whole number
        (token("Score: 7", _7=1.0),),  # the rating has no token of its own
        (LABEL, token(" 07", _7=1.0)),
    ],
)
def test_a_reply_without_usable_probabilities_has_no_expected_rating(choices: tuple[TokenChoice, ...]) -> None:
    assert expected(*choices, reply="Score: 7" if not choices else None) is None


def test_tokens_of_another_text_are_not_used() -> None:
    assert expected(LABEL, token(" 7", _7=1.0), reply="Score: 8") is None


SHARES = st.lists(st.floats(0, 1), min_size=11, max_size=11).filter(lambda each: sum(each) > 0.1)


@given(SHARES, st.integers(0, 10))
def test_the_expected_rating_is_within_the_grades_that_have_a_probability(shares: list[float], written: int) -> None:
    found = [(str(grade), math.log(share / sum(shares))) for grade, share in enumerate(shares) if share > 1e-300]
    value = expected(LABEL, TokenChoice(f" {written}", tuple(found)))
    if value is not None:
        grades = [int(grade) for grade, _ in found]
        assert min(grades) - 1e-9 <= value <= max(grades) + 1e-9
    else:
        assert shares[10] <= 1e-300 < shares[1]
