"""Grades that critiques give away: found, told from other numbers, and taken out."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from critrm.critique_files import read_critiques
from critrm.leaked_scores import find_leaks, leaked_score, strip_scores


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


def test_a_strong_critics_critiques_leak_none(data_dir) -> None:
    for name in ("frontier-llm", "frontier-llm-rewardbench"):
        rows = read_critiques(data_dir / "critiques" / f"{name}.jsonl")
        assert [row.text for row in rows if find_leaks(row.text)] == []
