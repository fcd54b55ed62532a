"""Files of the field with critiques: layouts as their makers publish them, and real files where there are some."""

import copy
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from critrm.averaging import samples_of
from critrm.critique_dialects import CRITIQUE_DIALECTS
from critrm.critique_files import critiqued_pairs
from critrm.errors import DataError

# zankner/CLoud, generate_oracle_critiques.py and generate_self_critiques.py (a list of samples).
CLOUD_ORACLE = {
    "prompt": "What is the capital of the moon?",
    "id": "moon",
    "chosen": "The moon does not have a capital.",
    "rejected": "The moon is made out of cheese.",
    "chosen_feedback": "This response is correct.",
    "rejected_feedback": "This response is funny but wrong.",
}
CLOUD_SELF = CLOUD_ORACLE | {"chosen_feedback": ["Right.", "Correct."], "rejected_feedback": ["Wrong.", "Funny."]}
# OpenBMB/UltraFeedback.
ULTRAFEEDBACK = {
    "source": "sharegpt",
    "instruction": "Best things in Cairo?",
    "models": ["falcon-40b-instruct", "gpt-4", "starchat"],
    "correct_answers": ["None"],
    "incorrect_answers": ["None"],
    "completions": [
        {
            "model": model,
            "principle": "helpfulness",
            "custom_system_prompt": "Be kind.",
            "response": f"Visit {place}.",
            "critique": f"{place} is far too hot in June.",
            "overall_score": score,
            "fine-grained_score": 3.0,
            "annotations": {
                "instruction_following": {"Rating": "2", "Rationale": f"{place} only partly fits."},
                "honesty": {"Rating": rating, "Rationale": "Confident, with subtle mistakes."},
                "truthfulness": {"Type": ["1"], "Rationale": "x", "Rating": "N/A", "Rationale For Rating": "y"},
            },
        }
        for model, place, score, rating in (
            ("a", "Giza", 7.0, "4"),
            ("b", "Saqqara", 7.0, "5"),
            ("c", "Cairo", 3.5, "1"),
        )
    ],
}
# argilla-io/distilabel, UltraFeedback task; None is an answer of the judge that could not be parsed.
DISTILABEL = {
    "instruction": "Say hi",
    "generations": ["Hi!", "No.", None, "Hey"],
    "generation_models": ["a", "b", "c", "d"],
    "ratings": [5, 1, 3, None],
    "rationales": ["Kind.", "Rude.", "Nothing.", "Casual."],
    "model_name": "gpt-4",
}
# prometheus-eval/Preference-Collection and Feedback-Collection.
PREFERENCE_COLLECTION = {
    "orig_criteria": "Is it kind?",
    "orig_feedback_A": "Rude.",
    "orig_feedback_B": "Kind.",
    "orig_instruction": "Say hi",
    "orig_reference_answer": "Hello!",
    "orig_response_A": "No.",
    "orig_response_B": "Hi!",
    "orig_score_A": "1",
    "orig_score_B": "5",
    "orig_preference": "B",
    "instruction": "###Task Description: ...",
    "output": "Feedback: B is kinder. [RESULT] B",
    "orig_feedback": "B is kinder.",
}
FEEDBACK_COLLECTION = {
    "orig_criteria": "Is it kind?",
    "orig_instruction": "Say hi",
    "orig_reference_answer": "Hello!",
    "orig_response": "No.",
    "orig_feedback": "Rude.",
    "orig_score": "1",
}
OTHER_SCORE = FEEDBACK_COLLECTION | {"orig_response": "Hi!", "orig_feedback": "Kind.", "orig_score": "5"}


def read(folder: Path, *rows: dict[str, Any]):
    path = folder / "file.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return critiqued_pairs(path)


@pytest.mark.parametrize(
    ("rows", "dialect", "expected"),
    [
        ([CLOUD_ORACLE], "cloud", ("moon", "file", "This response is correct.", "This response is funny but wrong.")),
        ([DISTILABEL], "distilabel", ("file-00001-0-1", "gpt-4", "Kind.", "Rude.")),
        ([PREFERENCE_COLLECTION], "prometheus", ("file-00001-0-1", "file", "Kind.", "Rude.")),
        ([FEEDBACK_COLLECTION, OTHER_SCORE], "prometheus", ("file-00001-0-1", "file", "Kind.", "Rude.")),
    ],
)
def test_layout(tmp_path: Path, rows: list[dict[str, Any]], dialect: str, expected: tuple[str, ...]) -> None:
    assert next(name for name, (matches, _) in CRITIQUE_DIALECTS.items() if matches(rows[0])) == dialect
    (pair,), (chosen, rejected) = read(tmp_path, *rows)
    assert (pair.id, chosen.critic, chosen.text, rejected.text) == expected
    assert (chosen.side, rejected.side, chosen.pair_id) == ("chosen", "rejected", pair.id)
    assert len(pair.prompt) == 1


def test_several_critiques_of_a_response_are_samples(tmp_path: Path) -> None:
    pairs, rows = read(tmp_path, CLOUD_SELF)
    assert [(r.side, r.sample, r.text) for r in rows] == [
        ("chosen", 0, "Right."),
        ("chosen", 1, "Correct."),
        ("rejected", 0, "Wrong."),
        ("rejected", 1, "Funny."),
    ]
    assert samples_of(pairs, rows, n_samples=2)[pairs[0].id, "chosen"] == ("Right.", "Correct.")


def test_other_criteria_are_not_compared(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no pair"):
        read(tmp_path, FEEDBACK_COLLECTION, OTHER_SCORE | {"orig_criteria": "Is it short?"})


def feedback(response: str, rating: float, critic: str | None = None, text: str = "Text.") -> dict[str, Any]:
    row = {"prompt": "Say hi", "response": response, "feedback": text, "rating": rating}
    return row | ({"critic": critic} if critic else {})


def test_only_ratings_by_the_same_critic_are_compared(tmp_path: Path) -> None:
    rows = [feedback("A", 1, "x"), feedback("B", 5, "x"), feedback("A", 9, "y"), feedback("B", 2, "y")]
    pairs, critiques = read(tmp_path, *rows)
    assert [(pair.id, pair.chosen) for pair in pairs] == [("file-00001-0-1", "B"), ("file-00003-0-1", "A")]
    assert [(row.critic, row.side, row.sample, row.score) for row in critiques] == [
        ("x", "chosen", 0, 5),
        ("x", "rejected", 0, 1),
        ("y", "chosen", 0, 9),
        ("y", "rejected", 0, 2),
    ]


@pytest.mark.parametrize("critic", ["x", None])
def test_a_critics_rows_on_one_response_are_samples(tmp_path: Path, critic: str | None) -> None:
    rows = [
        feedback("A", 4, critic, "A first."),
        feedback("B", 3, critic, "B first."),
        feedback("A ", 1, critic, "A second."),
        feedback("B", 3, critic, "B second."),
    ]
    pairs, critiques = read(tmp_path, *rows)
    # B's mean of 3 is above A's of 2.5.
    assert [(pair.id, pair.chosen, pair.rejected) for pair in pairs] == [("file-00001-0-1", "B", "A")]
    assert [(row.side, row.sample, row.text, row.score) for row in critiques] == [
        ("chosen", 0, "B first.", 3),
        ("chosen", 1, "B second.", 3),
        ("rejected", 0, "A first.", 4),
        ("rejected", 1, "A second.", 1),
    ]


def test_equal_scores_are_no_preference_however_many(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no pair"):
        read(tmp_path, feedback("B", 0.7), *[feedback("A", 0.7)] * 3, *[feedback("B", 0.7)] * 5)


def test_ultrafeedback_by_critique_and_by_aspects(tmp_path: Path) -> None:
    pairs, rows = read(tmp_path, ULTRAFEEDBACK)
    # Giza and Saqqara have the same overall score.
    assert [(pair.id, pair.chosen, pair.rejected) for pair in pairs] == [
        ("file-00001-0-2", "Visit Giza.", "Visit Cairo."),
        ("file-00001-1-2", "Visit Saqqara.", "Visit Cairo."),
    ]
    assert (rows[0].text, rows[0].score, pairs[0].source) == ("Giza is far too hot in June.", 7, "sharegpt")
    by_aspect = copy.deepcopy(ULTRAFEEDBACK)
    for completion in by_aspect["completions"]:
        del completion["critique"], completion["overall_score"]
    pairs, rows = read(tmp_path, by_aspect)
    assert len(pairs) == 3
    assert rows[0].score == 3.5
    assert rows[0].text == (
        "Instruction following: Saqqara only partly fits.\nHonesty: Confident, with subtle mistakes."
    )


@pytest.mark.parametrize(
    ("row", "changes", "field"),
    [
        (ULTRAFEEDBACK, {"completions": "none"}, "completions"),
        (ULTRAFEEDBACK, {"completions": [{"response": "a", "critique": "b"}]}, "overall_score"),
        (
            ULTRAFEEDBACK,
            {"completions": [{"response": "a", "critique": "b", "overall_score": "high"}]},
            "overall_score",
        ),
        (ULTRAFEEDBACK, {"completions": [{"response": "a", "annotations": [1]}]}, "annotations"),
        (DISTILABEL, {"ratings": [5, 1]}, "ratings"),
        (DISTILABEL, {"rationales": "A is better."}, "rationales"),
        (DISTILABEL, {"ratings": [5, float("nan"), 3, None]}, "ratings"),
        (DISTILABEL, {"instruction": None}, "instruction"),
        (PREFERENCE_COLLECTION, {"orig_feedback_B": ""}, "orig_feedback_B"),
        (PREFERENCE_COLLECTION, {"orig_score_A": True}, "orig_score_A"),
        (FEEDBACK_COLLECTION, {"orig_response": None}, "orig_response"),
    ],
)
def test_a_bad_field_is_named(tmp_path: Path, row: dict[str, Any], changes: dict[str, Any], field: str) -> None:
    with pytest.raises(DataError) as caught:
        read(tmp_path, row, row | changes)
    assert (caught.value.line, caught.value.field) == (2, field)


def test_an_explicit_dialect_names_what_is_missing(tmp_path: Path) -> None:
    path = tmp_path / "file.jsonl"
    path.write_text('{"a": 1}\n')
    for dialect in CRITIQUE_DIALECTS:
        with pytest.raises(DataError, match="missing|must be") as caught:
            critiqued_pairs(path, dialect=dialect)
        assert caught.value.field
        assert caught.value.line == 1


# Real files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "n_pairs", "critics"),
    [
        # Second turns: the prompt holds the model's own first answer, so that few responses share a prompt.
        ("prometheus-eval/mt_bench_eval.json.gz", 2, {("gpt-4", 0): 4, ("gpt-4", 1): 4, ("gpt-4", 2): 4}),
        ("prometheus-eval/vicuna_eval.json.gz", 322, {("gpt-4", 0): 644, ("gpt-4", 1): 644, ("gpt-4", 2): 644}),
        ("just-eval/safety_multimodel.jsonl.gz", 1985, {("gpt-3.5-turbo-0613", 0): 3970}),
    ],
)
def test_real_files(data_dir: Path, name: str, n_pairs: int, critics: dict[tuple[str, int], int]) -> None:
    pairs, rows = critiqued_pairs(data_dir / name)
    assert len(pairs) == len({pair.id for pair in pairs}) == n_pairs
    assert Counter((row.critic, row.sample) for row in rows) == critics
    assert not any("###" in pair.chosen + pair.rejected + pair.prompt[0].content for pair in pairs)
    samples = samples_of(pairs, rows, n_samples=len(critics))
    assert {len(texts) for texts in samples.values()} == {len(critics)}
    assert len(samples) == 2 * n_pairs
    means = Counter()
    for row in rows:
        means[row.pair_id, row.side] += row.score
    assert all(means[pair.id, "chosen"] > means[pair.id, "rejected"] for pair in pairs)


def test_human_feedback_without_ratings_says_what_is_missing(data_dir: Path) -> None:
    with pytest.raises(DataError, match="'rating'.*which response is better"):
        critiqued_pairs(data_dir / "shepherd" / "human_data_for_model.jsonl.gz")
