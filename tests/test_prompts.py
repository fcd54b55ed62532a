"""What the critic and the reward model read."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from critrm.errors import ConfigError
from critrm.prompts import (
    critique_messages,
    load_template,
    render_conversation,
    render_template,
    reward_segments,
    template_version,
)
from critrm.types import Message

APPENDIX_A = (
    "User: Brainstorm uses for a paperclip.\n\n"
    "Chatbot: Holding papers.\n\n"
    "Please provide a critique of the last response in one short paragraph. Your critique should be concise, specific, "
    "insightful and to the point. Aspects you should consider are: (1) Helpfulness. A good response should "
    "precisely/closely answer the user's request. (2) Correctness. A good response should be honest and "
    "factually correct."
)
HOSTILE = "{{ 7*7 }} {% raw %} {# x #} <|im_end|></s> \x00 \u202eabc \u2028 \U0001f9d1\u200d\U0001f680 & <b> \r\n \\n"
ASKED = (Message("user", "Brainstorm uses for a paperclip."),)


def test_critique_prompt_is_appendix_a_exactly() -> None:
    assert critique_messages(ASKED, "Holding papers.") == (Message("user", APPENDIX_A),)


def test_conversation_names_every_speaker() -> None:
    turns = (
        Message("system", "Be kind."),
        Message("user", "Hi"),
        Message("assistant", "Hello"),
        Message("user", "Bye"),
    )
    assert render_conversation(turns) == "System: Be kind.\n\nUser: Hi\n\nChatbot: Hello\n\nUser: Bye"


@given(prompt=st.text(), completion=st.text())
def test_any_text_is_data(prompt: str, completion: str) -> None:
    (message,) = critique_messages((Message("user", prompt),), completion)
    instruction = APPENDIX_A[APPENDIX_A.index("\n\nPlease provide") :]
    assert message.content == f"User: {prompt}\n\nChatbot: {completion}{instruction}"


def test_hostile_text_is_literal() -> None:
    (message,) = critique_messages((Message("user", HOSTILE),), HOSTILE)
    assert message.content.startswith(f"User: {HOSTILE}\n\nChatbot: {HOSTILE}\n\nPlease provide")
    assert HOSTILE in reward_segments(ASKED, "x", HOSTILE)[2]


def test_reward_segments_concatenate_to_the_plain_form() -> None:
    segments = reward_segments(ASKED, "Holding papers. \n", " Too short.\n")
    assert segments == (
        "User: Brainstorm uses for a paperclip.\n\nChatbot:",
        " Holding papers.",
        "\n\nThe following is a critique of the last response: Too short.",
    )
    assert reward_segments(ASKED, "Holding papers.", " \n")[2] == ""
    assert reward_segments((), "x", "")[0] == "Chatbot:"


def test_own_template_from_a_path(tmp_path: Path) -> None:
    own = tmp_path / "mine.md"
    own.write_text("{{ conversation }} >> {{ response }}\n")
    assert critique_messages(ASKED, "x", template=own)[0].content == "User: Brainstorm uses for a paperclip. >> x"
    assert critique_messages(ASKED, "x", template=str(own)) == critique_messages(
        ASKED, "x", template=load_template(own)
    )


def test_version_follows_the_content(tmp_path: Path) -> None:
    own = tmp_path / "mine.md"
    own.write_text(load_template("critique").source)
    assert template_version(own) == template_version("critique")
    assert len(template_version(own)) == 12
    own.write_text(own.read_text() + "Be brief.")
    assert template_version(own) != template_version("critique")


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{{ conversation }}", r"lacks \{\{ response \}\}"),
        ("{{ response }}", r"lacks \{\{ conversation \}\}"),
        ("a\n{{ response", "line 2"),
        ("{{ conversation }} {{ response }} {{ label }}", "'label' is undefined.*can use: conversation, response"),
    ],
)
def test_unusable_template_is_a_config_error(tmp_path: Path, source: str, reason: str) -> None:
    own = tmp_path / "mine.md"
    own.write_text(source)
    with pytest.raises(ConfigError, match=reason):
        critique_messages(ASKED, "x", template=own)


@pytest.mark.parametrize("name", ["nosuch", "no/such.md", "nul\0byte"])
def test_missing_template_lists_ours(name: str) -> None:
    with pytest.raises(ConfigError, match="one of: .*critique"):
        load_template(name)


def test_a_template_cannot_reach_python(tmp_path: Path) -> None:
    own = tmp_path / "mine.md"
    own.write_text("{{ conversation }}{{ response.__class__.__mro__ }}")
    with pytest.raises(ConfigError, match="unsafe"):
        render_template(own, conversation="", response="")
