"""Grades that critiques give away: found, told from other numbers, and taken out."""

import time

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from critrm.critique_files import read_critiques
from critrm.leaked_scores import cut_sentences, find_leaks, leaked_score, strip_scores


@pytest.mark.parametrize(
    ("text", "value", "stripped"),
    [
        ("8/10", 0.8, ""),
        ("rating: 9", 0.9, ""),
        ("I'd give it a 7 out of 10", 0.7, ""),
        ("four stars", 0.8, ""),
        ("Score - 85%", 0.85, ""),
        ("Good answer. 8/10.", 0.8, "Good answer."),
        ("Clear and correct. Overall score: 7/10", 0.7, "Clear and correct."),
        ("It is accurate and concise, so I'd give it 8/10.", 0.8, "It is accurate and concise."),
        ("I would rate this response a 7 out of 10 because it misses the date.", 0.7, "It misses the date."),
        ("**Rating:** 8/10\n\nThe response is fine.", 0.8, "The response is fine."),
        ("It is helpful (8/10) and honest.", 0.8, "It is helpful and honest."),
        ("The response scores 9/10 on clarity, and it is honest.", 0.9, "It is honest."),
        ("I would score this answer a solid seven. It is short.", 0.7, "It is short."),
        ("On a scale of 1 to 5, this is a 4. It is short.", 0.8, "It is short."),
        ("Feedback: it is short. [RESULT] 2", 0.4, "Feedback: it is short."),
        ("It is short.\nRating: [[7]]", 0.7, "It is short."),
        ("My overall score is 7.5. It is short.", 0.75, "It is short."),
        ("It is short. So it meets the criteria for a score of 2 in the rubric.", 0.2, "It is short."),
        ("★★★☆☆ It is short.", 0.6, "It is short."),
        ("Grade: 72. It is short.", 0.72, "It is short."),
        ("Clarity: 9/10. Depth is lacking. Overall: 6/10.", 0.6, "Depth is lacking."),
    ],
)
def test_a_grade_is_found_and_taken_out(text: str, value: float, stripped: str) -> None:
    assert leaked_score(text) == pytest.approx(value)
    assert strip_scores(text) == stripped
    assert leaked_score(stripped) is None


@pytest.mark.parametrize(
    ("text", "stripped"),
    [
        (
            "It covers much (history, culture, etc.), and is clear. I'd give it 8/10.",
            "It covers much (history, culture, etc.), and is clear.",
        ),
        ("It is short (it says 'Paris.'), which is fine. 8/10.", "It is short (it says 'Paris.'), which is fine."),
        ('He says "Yes."—which is wrong. Score: 2/10', 'He says "Yes."—which is wrong.'),
        ("A **bold claim.**Then more. Score: 2/10", "A **bold claim.**Then more."),
        ("It is right (as I said), so I'd give it 8/10.", "It is right (as I said)."),
        ("It is **really good**, so I'd give it 8/10.", "It is **really good**."),
        ("It is fine (I'd give it 8/10, and it is earned).", "It is fine, it is earned."),
        ("It deserves an 8/10 overall: 8/10, since it is short.", "It is short."),
    ],
)
def test_innocent_text_stays(text: str, stripped: str) -> None:
    assert strip_scores(text) == stripped


@pytest.mark.parametrize(
    ("text", "stripped"),
    [
        ("It is right.\nScore:\n8", "It is right."),
        ("Rating:\n9", ""),
        ("I'd give it a\n7.", ""),
        ("It is right.\n\n**Score:**\n\n8/10\n\nIt is short.", "It is right.\n\nIt is short."),
        ("It is right.\nI'd give it a\n7 because it is short.\nNo more.", "It is right.\nIt is short.\nNo more."),
    ],
)
def test_a_grade_on_two_lines_goes(text: str, stripped: str) -> None:
    assert leaked_score(text) is not None
    assert strip_scores(text) == stripped


@pytest.mark.parametrize(
    "text",
    [
        "7/20 gives a 35% margin, far above the others.",
        "The scores sum to 314, so the mean score is 78.5, not 79.",
        "It assigns a very high score, 9.5, on an explicit 10-point scale.",
        "The sentiment score of 9 is stated; a score of 78 is needed to pass.",
        "A 7/10 confidence for such an obvious answer is odd.",
        "Two stars is also plausible given the soggy fries.",
        "0.5% over three years is 1.5%. Nothing else is wrong.",
        "The effective rate of 15.7% is right and so is the marginal rate of 30%.",
        "I would rate this highly for its 3 examples.",
        "I give it 3 reasons to be doubted.",
        "He scores 3 of 5 penalties; the answer 3/5 is wrong.",
        "On a scale of 1 to 5 stars, with 5 stars being the highest, how was it?",
        "Score: 12/10",
        "",
    ],
)
def test_other_numbers_are_no_grades(text: str) -> None:
    assert find_leaks(text) == []
    assert strip_scores(text) is text


@given(st.text(), st.sampled_from(["8/10", "Rating: 9", "I'd give it a 7 out of 10.", "four stars", "★★★☆☆"]))
def test_any_text_may_stand_around_a_grade(text: str, grade: str) -> None:
    whole = f"{text}\n{grade}\n{text}"
    leaks = find_leaks(whole)
    assert leaks
    assert all(0 <= leak.value <= 1 for leak in leaks)
    assert all(a.end <= b.start for a, b in zip(leaks, leaks[1:], strict=False))
    assert len(strip_scores(whole)) < len(whole)


WORDS = st.sampled_from(
    [
        *".!?,;:()*\"'”’—- \n\t",
        ". ",
        ".) ",
        "\n\n",
        "Score:",
        "Rating",
        "8",
        "8/10",
        "I'd give it",
        "a",
        "7 out of 10",
        "★★★☆☆",
    ]
    + ["four stars", "Overall", "[[7]]", "etc", "It is", "short", "because", "ß", "\u2028", "\x00"]
)
CRITIQUES = st.one_of(st.text(), st.lists(WORDS).map("".join), st.lists(WORDS).map(" ".join))


@given(CRITIQUES)
def test_sentences_tile_the_text(text: str) -> None:
    sentences = cut_sentences(text)
    assert "".join(sentences) == text
    assert all(sentences)


@given(CRITIQUES)
def test_no_grade_is_left_and_nothing_else_changes(text: str) -> None:
    stripped = strip_scores(text)
    assert leaked_score(stripped) is None
    if leaked_score(text) is None:
        assert stripped == text


@given(CRITIQUES)
def test_the_sentences_before_a_grade_keep_their_words(text: str) -> None:
    assume(not find_leaks(text))
    whole = f"{text}.\n\nMy score is 8/10."
    leaks = find_leaks(whole)
    assume([leak.start for leak in leaks] == [len(text) + 3])
    assert strip_scores(whole).split() == f"{text}.".split()


@pytest.mark.parametrize("mark", ["\n ", "*", "\n\n- ", "# "])
def test_long_runs_of_marks_take_time_in_proportion(mark: str) -> None:
    start = time.process_time()
    assert leaked_score(f"It is short.\n{mark * 10_000}8/10") == 0.8
    assert time.process_time() - start < 2  # seconds; a scan from every mark takes five or more


def test_a_strong_critics_critiques_leak_none(data_dir) -> None:
    for name in ("frontier-llm", "frontier-llm-rewardbench"):
        rows = read_critiques(data_dir / "critiques" / f"{name}.jsonl")
        assert [row.text for row in rows if find_leaks(row.text)] == []
