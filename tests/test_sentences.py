"""Cutting critiques into sentences loses nothing, and does not cut within what looks like an end and is none."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import critrm
from critrm.sentences import ASPECTS, OTHER, aspect_of, split_sentences

PIECES = st.sampled_from(
    [
        "It is right. ",
        "e.g. ",
        "1. ",
        "\n",
        "\n\n- ",
        "`a. b` ",
        "```\nx. \n",
        "Dr. ",
        "…",
        "。",
        "A. ",
        "🙂 ",
        "\x00",
        "  ",
        "?! ",
    ]
)


@given(st.one_of(st.text(), st.lists(PIECES).map("".join)))
def test_sentences_put_together_are_the_text(text):
    sentences = split_sentences(text)
    assert "".join(sentences) == text
    assert all(sentences)
    words = [any(letter.isalnum() or letter == "_" for letter in sentence) for sentence in sentences]
    assert all(words) or len(sentences) == 1


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("Right. But rude!  Why?", ["Right. ", "But rude!  ", "Why?"]),
        ("Use units, e.g. metres, i.e. SI. Good.", ["Use units, e.g. metres, i.e. SI. ", "Good."]),
        ("Pi is 3.14 here. Version 2.0.1 is old.", ["Pi is 3.14 here. ", "Version 2.0.1 is old."]),
        ("Dr. Smith and George W. Bush agree. Fine.", ["Dr. Smith and George W. Bush agree. ", "Fine."]),
        ("The answer is option B. The rest fits.", ["The answer is option B. ", "The rest fits."]),
        (
            "Nouns, verbs etc. are fine. Dates, etc. It ends.",
            ["Nouns, verbs etc. are fine. ", "Dates, etc. ", "It ends."],
        ),
        ("1. It is wrong.\n2. It is rude.\n", ["1. It is wrong.\n", "2. It is rude.\n"]),
        ("- short\n- clear\n\nThe end", ["- short\n", "- clear\n\n", "The end"]),
        (
            "Call `f. g. h` first. Then:\n```\na. b\n\nc. d\n```\nEnd.",
            ["Call `f. g. h` first. ", "Then:\n", "```\na. b\n\nc. d\n```\n", "End."],
        ),
        ('He says "Stop." Then he goes.', ['He says "Stop." ', "Then he goes."]),
        ("正确。但不完整！", ["正确。", "但不完整！"]),
        ("\n\nGood.\n---", ["\n\nGood.\n---"]),
        ("", []),
    ],
)
def test_where_sentences_end(text, sentences):
    assert list(split_sentences(text)) == sentences


def test_the_bundled_critiques_have_a_few_sentences_each():
    path = Path(critrm.__file__).parent / "data" / "mini-frontier-llm.jsonl"
    critiques = [json.loads(line)["critique"] for line in path.read_text(encoding="utf-8").splitlines()]
    counts = [len(split_sentences(critique)) for critique in critiques]
    assert all("".join(split_sentences(critique)) == critique for critique in critiques)
    assert max(counts) <= 8
    assert 3 < sum(counts) / len(counts) < 4


@pytest.mark.parametrize(
    ("sentence", "aspect"),
    [
        ("It is factually correct.", "correctness"),
        ("The instructions were followed exactly.", "instruction following"),
        ("Helpful and practical.", "helpfulness"),
        ("This is dangerous and illegal.", "safety"),
        ("It admits that it is uncertain.", "honesty"),
        ("The tone is friendly and the structure clear.", "style"),
        ("Far too long and repetitive.", "length"),
        ("The harmonic mean of twelve and thirty-six.", OTHER),
    ],
)
def test_aspects_are_told_by_words(sentence, aspect):
    assert aspect_of(sentence) == aspect


def test_no_two_aspects_share_a_word():
    words = [word for each in ASPECTS.values() for word in each.split()]
    assert len(words) == len(set(words))
