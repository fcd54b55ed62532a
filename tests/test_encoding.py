"""What people and models wrote never becomes a control token, with and without a chat template."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from critrm import models
from critrm.encoding import encode_chat, encode_text
from critrm.errors import ModelError
from critrm.prompts import critique_messages
from critrm.types import Message


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path):
    return models.load_tokenizer(str(tiny_model))


CONTROL = st.sampled_from(
    ["<|im_end|>", "<|im_start|>system\n", "<|endoftext|>", "{{ 7*7 }}", "{% raw %}", "(critrm:0)"]
)
CONTROLLED = st.lists(
    st.sampled_from(
        ["<|im_end|>", "</s>", "[INST]", "[/INST]", "<|START_OF_TURN_TOKEN|>", "<|eot_id|>", "User: x", "\n"]
    )
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
    max_size=6,
).map("".join)
HOSTILE = st.lists(CONTROL | st.text(st.characters(exclude_categories=["Cs"]), max_size=8), max_size=6).map("".join)


@given(HOSTILE, HOSTILE)
def test_hostile_text_never_becomes_a_control_token(tokenizer, system: str, user: str) -> None:
    ids = encode_chat(tokenizer, [Message("system", system), Message("user", user)])
    start, end = (tokenizer.convert_tokens_to_ids(each) for each in ("<|im_start|>", "<|im_end|>"))
    # Two turns and the opened answer: exactly the template's own control tokens.
    assert [i for i in ids if i in tokenizer.all_special_ids] == [start, end, start, end, start]
    first, second = [i for i, each in enumerate(ids) if each == end]
    assert decoded(tokenizer, ids[1:first]) == "system\n" + system
    assert decoded(tokenizer, ids[first + 1 : second]) == "\n<|im_start|>user\n" + user


FAMILIES = ["<|im_start|>", "<|im_end|>", "</s>", "[INST]", "[/INST]", "<|START_OF_TURN_TOKEN|>", "<|eot_id|>"]
TURNS = "{% for m in messages %}[INST]<|START_OF_TURN_TOKEN|>{{ m['content'] }}<|eot_id|>[/INST]</s>{% endfor %}"


@pytest.fixture(scope="module")
def family_tokenizer(tiny_model: Path):
    """A tokenizer to which the control tokens of several model families are special."""
    tokenizer = models.load_tokenizer(str(tiny_model))
    tokenizer.add_special_tokens({"additional_special_tokens": FAMILIES[2:]})
    tokenizer.chat_template = TURNS
    return tokenizer


@given(prompt=CONTROLLED, completion=CONTROLLED)
def test_the_number_of_control_tokens_does_not_depend_on_the_text(
    family_tokenizer, prompt: str, completion: str
) -> None:
    messages = critique_messages((Message("user", prompt),), completion)
    ids = encode_chat(family_tokenizer, messages)
    control = family_tokenizer.convert_tokens_to_ids(FAMILIES)
    found = [FAMILIES[control.index(i)] for i in ids if i in control]
    assert found == ["[INST]", "<|START_OF_TURN_TOKEN|>", "<|eot_id|>", "[/INST]", "</s>"]
    inner = ids[ids.index(control[5]) + 1 : ids.index(control[6])]
    assert decoded(family_tokenizer, inner) == messages[0].content


@pytest.mark.slow
def test_no_control_token_of_the_embedded_model_comes_out_of_the_text(smollm2: Path) -> None:
    tokenizer = models.load_tokenizer(str(smollm2))
    control = tokenizer.added_tokens_decoder
    plain = [i for i in encode_chat(tokenizer, critique_messages((Message("user", "Hi"),), "x")) if i in control]
    for text in [*FAMILIES, *(token.content for token in control.values())]:
        ids = encode_chat(tokenizer, critique_messages((Message("user", f"Hi {text}"),), f"{text}\n{text}"))
        assert [i for i in ids if i in control] == plain


@pytest.fixture(scope="module")
def base_tokenizer(tiny_model: Path):
    """A base model's: without a chat template."""
    tokenizer = models.load_tokenizer(str(tiny_model))
    tokenizer.chat_template = None
    return tokenizer


@given(HOSTILE)
def test_without_a_template_hostile_text_is_inert_too(base_tokenizer, user: str) -> None:
    ids = encode_chat(base_tokenizer, [Message("user", user)])
    assert not set(ids) & set(base_tokenizer.all_special_ids)
    assert decoded(base_tokenizer, ids) == f"User: {user}\n\nChatbot:"


def decoded(tokenizer, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))


def test_plain_text_is_encoded_as_the_template_alone_would(tokenizer) -> None:
    messages = [Message("user", "What is 2 plus 2?"), Message("assistant", "4"), Message("user", "Sure?")]
    rows = [{"role": each.role, "content": each.content} for each in messages]
    whole = tokenizer.apply_chat_template(rows, tokenize=False, add_generation_prompt=True)
    assert decoded(tokenizer, encode_chat(tokenizer, messages)) == whole
    closed = encode_chat(tokenizer, messages, generation_prompt=False)
    assert decoded(tokenizer, closed) == tokenizer.apply_chat_template(rows, tokenize=False)


@pytest.mark.parametrize(
    ("template", "reason"),
    [("{{ raise_exception('roles must alternate') }}", "must alternate"), ("{{ messages[0].content }}", "drops")],
)
def test_a_template_that_cannot_render_is_a_model_error(tiny_model: Path, template: str, reason: str) -> None:
    tokenizer = models.load_tokenizer(str(tiny_model))
    tokenizer.chat_template = template
    with pytest.raises(ModelError, match=reason):
        encode_chat(tokenizer, [Message("user", "a"), Message("user", "b")])


def test_added_tokens_that_are_not_special_are_text_too(tiny_model: Path) -> None:
    from tokenizers import AddedToken

    tokenizer = models.load_tokenizer(str(tiny_model))
    tokenizer.add_tokens([AddedToken("<think>", special=False), AddedToken("    ", special=False)])
    think, spaces = tokenizer.convert_tokens_to_ids(["<think>", "    "])
    assert think in tokenizer.encode("a <think> b", split_special_tokens=True)  # what has to be guarded against
    ids = encode_text(tokenizer, "a <think><think> b    c")
    assert think not in ids and spaces in ids
    assert tokenizer.decode(ids) == "a <think><think> b    c"
    assert encode_text(tokenizer, "") == []
    assert think not in encode_chat(tokenizer, [Message("user", "<think>")])
