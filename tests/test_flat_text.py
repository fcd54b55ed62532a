import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from critrm.errors import DataError
from critrm.flat_text import read_turns, split_flat, split_query
from critrm.prompts import reward_segments
from critrm.types import Message

USER, HELLO = Message("user", "Hi"), Message("assistant", "Hello!")
CHATML = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
TEXTS = {
    "ChatML": f"{CHATML}Hello!<|im_end|>\n",
    "ChatML, padded on both sides": f"<|endoftext|><|endoftext|>{CHATML}Hello!<|im_end|><|endoftext|><|endoftext|>",
    "Llama 3": "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nHello!<|eot_id|>",
    "Gemma": "<bos><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\nHello!<end_of_turn>\n",
    "Zephyr": "<|user|>\nHi</s>\n<|assistant|>\nHello!</s>",
    "DeepSeek": "<｜begin▁of▁sentence｜><｜User｜>Hi<｜Assistant｜>Hello!<｜end▁of▁sentence｜>",
    "Mistral": "<s>[INST] Hi [/INST] Hello!</s>",
    "plain": "User: Hi\n\nChatbot: Hello!",
    "HH": "\n\nHuman: Hi\n\nAssistant: Hello!",
}


@pytest.mark.parametrize("name", TEXTS)
def test_known_formats(name):
    assert read_turns(TEXTS[name]) == (USER, HELLO)
    assert split_flat(TEXTS[name]) == ((USER,), "Hello!")


def test_several_turns_and_a_system_message():
    text = "<|im_start|>system\nBe kind.<|im_end|>\n" + CHATML + "Hello!<|im_end|>\n" + CHATML + "Again!"
    prompt, completion = split_flat(text)
    assert [message.role for message in prompt] == ["system", "user", "assistant", "user"]
    assert completion == "Again!"


@pytest.mark.parametrize(
    ("query", "prompt", "messages", "completion"),
    [
        (CHATML + "Hello!<|im_end|>", CHATML, (USER,), "Hello!"),
        ("What? 4", "What?", (Message("user", "What?"),), "4"),
        ("<s> What? 4</s></s>", "What?", (Message("user", "What?"),), "4"),
        (CHATML + "He" + "llo!", CHATML + "He", (USER,), "Hello!"),
        # Decoding changed the prompt, but the query says who speaks.
        (CHATML + "Hello!", "another", (USER,), "Hello!"),
    ],
)
def test_queries_with_their_prompts(query, prompt, messages, completion):
    assert split_query(query, prompt) == (messages, completion)


@pytest.mark.parametrize("text", ["", "no format", "User: Hi", CHATML.removesuffix("<|im_start|>assistant\n"), "[PAD]"])
def test_what_cannot_be_told_is_an_error(text):
    with pytest.raises(DataError):
        split_flat(text)
    with pytest.raises(DataError):
        split_query(text + "x", "another prompt")


plain = st.text(st.characters(exclude_characters="<[:\uff5c", exclude_categories=["Cs"]))


@given(plain.filter(lambda text: text.strip()), plain)
def test_a_response_after_a_plain_prompt_is_kept_as_it_is(prompt, response):
    assert split_query(prompt + response, prompt) == ((Message("user", prompt),), response.removeprefix(" "))


@given(plain, plain.filter(lambda text: text.strip()))
def test_our_own_plain_form_is_read_back(prompt, completion):
    text = "".join(reward_segments((Message("user", prompt),), completion, ""))
    assert split_flat(text) == ((Message("user", prompt),), completion.rstrip())


def test_long_texts_take_no_time():
    started = time.process_time()
    for part in (" ", "<pad>", "\n", "<", "</s> ", "[PAD]", "<|im_start|>user\n"):
        text = part * (200_000 // len(part))
        for split in (lambda text: split_flat(text), lambda text: split_query(text + "x", text)):
            try:
                split(text)
            except DataError:
                continue
    assert time.process_time() - started < 5
