"""What is wrong with a critique, one flaw at a time. Texts of weak critics are as SmolLM2-135M wrote them."""

import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from critrm import flaws

GOOD = (
    "It names two uses, holding papers and picking a lock, but the second is not what the user asked for. A longer and "
    "more varied list would have been better."
)


@pytest.mark.parametrize(
    "text",
    [
        "I'm sorry for the confusion, but as a chatbot, I'm here to assist with languages. I'm not equipped to provide "
        "information about Spanish.",
        "As an AI language model, I cannot provide a critique of this response.",
        "Sorry, I can’t help with that.",
        "I am unable to evaluate harmful content.",
        "We won't continue this conversation, and I will not write a critique.",
        "I cannot give you a critique of that.",
        "I'm not comfortable giving this response a fair evaluation.",
        "Sorry, I can't tell you my honest opinion.",
        "I can't help you with this.",
    ],
)
def test_refusal(text: str) -> None:
    assert flaws.is_refusal(text)


@pytest.mark.parametrize(
    "text",
    [
        GOOD,
        "The response says \"I don't cook so I can't help\", which is a needless refusal.",
        "It refuses an everyday cooking question; the assistant says it cannot help.",
        "I cannot give this response full marks because it misses the date.",
        "I can't give it more than a pass, and I won't give the answer a positive evaluation.",
        "I cannot give this evaluation a high mark.",
        "I can't help but notice that the response is short.",
        "I can’t help noticing that the response is short.",
        "As a reader I can't tell that the facts are wrong, nor can I tell whether the assessment is.",
        "I can't tell you what the second paragraph means.",
        "I cannot dock it for that.",
        "I think it is good. " * 30 + "I cannot provide more.",
    ],
)
def test_talking_of_a_refusal_is_none(text: str) -> None:
    assert not flaws.is_refusal(text)


def test_dialogue() -> None:
    assert flaws.is_dialogue("User: I'm looking for a new laptop. Can you recommend a refurbished one?")
    assert flaws.is_dialogue("Sure.\n\nUser: Why?\n\nChatbot: Because.")
    assert not flaws.is_dialogue("The user: a beginner, one supposes.\nSystem: fine.")
    assert not flaws.is_dialogue(GOOD)
    assert flaws.is_dialogue('\n- \n**"User: Why?')
    assert not flaws.is_dialogue("Sure.\n\n--\nUser: Why?")


def _turns_by_definition(text: str) -> bool:
    """Lines whose first word, on them or on a later one, is a speaker; slow, but plain."""
    turn = re.compile(r"^\W*(?:User|Chatbot|System|Human|Assistant)\s*:", re.MULTILINE)
    return bool(turn.match(text)) or len(turn.findall(text)) >= 2


@given(st.lists(st.sampled_from(["User", "Chatbot", ":", "\n", " ", "-", "*", "so", "\r", "\u2028"])).map("".join))
def test_dialogue_is_what_it_says(text: str) -> None:
    assert flaws.is_dialogue(text) == _turns_by_definition(text)


def test_dialogue_takes_time_in_proportion_to_the_text() -> None:
    start = time.process_time()
    assert not flaws.is_dialogue("so\n" + "--\n" * 16_000)
    assert time.process_time() - start < 2  # seconds; a scan from every line to the end takes eight or more


RESPONSE = "You can hold papers together with it, pick a simple lock, reset a phone, or hang a picture on the wall."


def test_echo() -> None:
    assert flaws.is_echo(RESPONSE, RESPONSE)
    assert flaws.is_echo(f"Well said: {RESPONSE.upper()}", "another text", RESPONSE)
    assert flaws.is_echo("Hold papers together with it", RESPONSE)
    # A short quotation is what a good critique does.
    assert not flaws.is_echo(f'"You can hold papers together with it, pick a simple lock" is plain. {GOOD}', RESPONSE)
    assert not flaws.is_echo(GOOD, RESPONSE)
    assert not flaws.is_echo("Good", "Good")
    assert not flaws.is_echo(RESPONSE)


@given(st.text(), st.text())
def test_the_copied_share_is_a_share(text: str, shown: str) -> None:
    assert 0 <= flaws.copied_share(text, shown) <= 1


def test_loop() -> None:
    assert flaws.is_loop("I'm sorry, I'm not sure how to phrase it. " * 6)
    assert not flaws.is_loop(GOOD)
    assert not flaws.is_loop("Too short. Too short.")


def test_truncated() -> None:
    assert flaws.is_truncated("The response is clear, but it does not", "length")
    assert not flaws.is_truncated("The response is clear, but it does not", "stop")
    for end in (".", "!", '."', "。", ".**", "?)"):
        assert not flaws.is_truncated(f"The response is clear{end}", "length")


def test_generic() -> None:
    assert flaws.is_generic(
        "The last response was not helpful. A good response should be honest and factually correct."
    )
    assert flaws.is_generic("Clear and concise.")
    assert not flaws.is_generic(GOOD)
    assert not flaws.is_generic("Correct: 17.")


def test_boilerplate() -> None:
    opening = "The response answers what the user asked for in a friendly tone and "
    same = [f"{opening}ends with word {n}." for n in range(3)]
    texts = [*same, GOOD, GOOD, "Too short.", "Too short.", "Too short."]
    assert flaws.find_boilerplate(texts) == [True] * 3 + [False] * 2 + [True] * 3
    # Three of two hundred are not what the critic always says.
    others = [f"{n} {GOOD}" for n in range(200)]
    assert flaws.find_boilerplate([*same, *others]) == [False] * 203
    assert flaws.find_boilerplate([]) == []


@pytest.mark.parametrize(
    ("text", "language"),
    [
        (GOOD, "English"),
        ("Die Antwort ist nicht falsch, aber sie ist zu kurz und nennt das zweite Beispiel nicht.", "German"),
        ("La réponse est claire et les exemples sont bons, mais elle ne dit pas pour qui.", "French"),
        ("La respuesta es clara y los ejemplos son buenos, pero no dice para quién es el texto.", "Spanish"),
        ("Ответ правильный, но слишком короткий и без примеров.", "CYRILLIC"),
        ("这个回答是正确的，但是太短了，没有给出任何例子，也没有解释原因。", "CJK"),
        ("\ufffd.\ufffd\ufffd\tp\ufffdJ", flaws.UNREADABLE),
        ("1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11", flaws.UNREADABLE),
        ("Too short.", ""),
        ("", ""),
    ],
)
def test_language(text: str, language: str) -> None:
    assert flaws.guess_language(text) == language


@given(st.text())
def test_any_text_can_be_checked(text: str) -> None:
    for check in (flaws.is_refusal, flaws.is_dialogue, flaws.is_loop, flaws.is_truncated, flaws.is_generic):
        assert check(text) in (True, False)
    flaws.guess_language(text)
    flaws.find_boilerplate([text, text])
