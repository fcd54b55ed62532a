"""The critics known by name: the file, your own, and what a critic's settings become."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from critrm.batch_llm import BatchChat
from critrm.config import CriticConfig, CritiqueConfig
from critrm.critics import (
    Critics,
    command,
    complete_critic,
    complete_critics,
    critics_table,
    load_critics,
    open_chat,
    price_of,
    token_counter,
    user_file,
)
from critrm.errors import ConfigError, CriticError
from critrm.llm import OpenAIChat
from critrm.types import Message

PAPER = {
    "llama2-7b-chat": "meta-llama/Llama-2-7b-chat-hf",
    "llama2-70b-chat": "meta-llama/Llama-2-70b-chat-hf",
    "mixtral-8x7b-instruct": "mistralai/Mixtral-8x7B-Instruct-v0.1",
    "command-r": "command-r-03-2024",
    "command-r-plus": "command-r-plus-04-2024",
    "gpt-4-turbo": "gpt-4-0125-preview",
}
OWN = """
endpoints:
  mine: {base_url: "http://gpu:8000/v1", key_variable: MY_KEY}
critics:
  mine-8b: {endpoint: mine, model: my/8b, price_in: 0, price_out: 0, temperature: 0.7, max_tokens: 99}
  gpt-4-turbo: {endpoint: mine, model: other}
"""


@pytest.fixture(autouse=True)
def no_settings_of_the_machine(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "xdg"))
    for variable in ("OPENAI_API_KEY", "OPENAI_BASE_URL", "CO_API_KEY", "MY_KEY"):
        monkeypatch.delenv(variable, raising=False)


@pytest.fixture
def ours() -> Critics:
    return load_critics()


def complete(name: str, critics: Critics, *, backbone: str = "", **given) -> CriticConfig:
    return complete_critic(name, CriticConfig(**given), critics=critics, backbone=backbone)


def test_the_papers_six_and_the_embedded_one_are_there(ours):
    assert {name: ours.critics[name].model for name in PAPER} == PAPER
    assert list(ours.critics)[:6] == list(PAPER)
    assert len(ours.critics) >= 18
    embedded = ours.critics["smollm2-135m-instruct"]
    assert ours.endpoints[embedded.endpoint].in_process
    assert embedded.model == "embedded:SmolLM2-135M-Instruct"


def test_every_priced_critic_has_a_key_and_every_keyless_one_no_price(ours):
    for name, critic in ours.critics.items():
        assert bool(ours.endpoints[critic.endpoint].key_variable) == (critic.price_in is not None), name


def test_an_empty_critic_is_the_named_one(ours):
    critic = complete("command-r-plus", ours)
    assert critic.model == "command-r-plus-04-2024"
    assert critic.base_url == "https://api.cohere.ai/compatibility/v1"
    assert critic.key_variable == "CO_API_KEY"
    price = price_of(critic)
    assert price and price.cost(1_000_000, 1_000_000) == pytest.approx(18.0)


def test_what_is_given_overrides(ours, tmp_path):
    (tmp_path / "own.yaml").write_text(OWN)
    critics = load_critics(tmp_path / "own.yaml")
    critic = complete("mine-8b", critics)
    assert (critic.temperature, critic.max_tokens, critic.key_variable) == (0.7, 99, "MY_KEY")
    critic = complete("mine-8b", critics, temperature=0.0, max_tokens=7, samples=1)
    assert (critic.temperature, critic.max_tokens, critic.model) == (0.0, 7, "my/8b")


def test_another_model_has_no_known_price_and_another_url_is_not_sent_the_key(ours):
    assert price_of(complete("gpt-4-turbo", ours, model="gpt-9")) is None
    assert price_of(complete("gpt-4-turbo", ours, model="gpt-9", price_in=1, price_out=2)) is not None
    moved = complete("command-r", ours, base_url="http://gpu/v1", model="CohereLabs/c4ai-command-r-v01")
    assert (moved.key_variable, moved.base_url) == ("", "http://gpu/v1")
    assert complete("command-r", ours, model="local:/models/command-r").base_url is None


def test_a_free_name_with_a_model_is_as_it_stands(ours):
    critic = complete("anything", ours, model="m", base_url="http://host/v1")
    assert (critic.model, critic.base_url, critic.temperature) == ("m", "http://host/v1", 0.0)
    assert price_of(critic) is None


def test_an_unknown_name_says_what_to_do(ours):
    with pytest.raises(ConfigError, match=r"no critic is called 'gpt-4-trubo'. Did you mean gpt-4-turbo"):
        complete("gpt-4-trubo", ours)


def test_a_batch_costs_its_share(ours):
    single, batch = (price_of(complete("gpt-4.1", ours, batch=batch)) for batch in (False, True))
    assert single and batch and batch.cost(1e6, 0) == pytest.approx(single.cost(1e6, 0) / 2)
    with pytest.raises(ConfigError, match="no Batch API is known"):
        complete("command-r", ours, batch=True)


def test_self_critique_is_the_backbone(ours):
    assert complete("self", ours, backbone="/models/x", self_critique=True).model == "local:/models/x"
    assert complete("self", ours, backbone="embedded:E", self_critique=True).model == "embedded:E"
    served = complete("self", ours, backbone="me/x", self_critique=True, base_url="http://h/v1")
    assert (served.model, served.base_url) == ("me/x", "http://h/v1")
    with pytest.raises(ConfigError, match="needs a backbone"):
        complete("self", ours, self_critique=True)


def test_several_samples_have_to_be_drawn(ours):
    with pytest.raises(ConfigError, match="temperature 0"):
        complete("gpt-4-turbo", ours, samples=2)
    assert complete("gpt-4-turbo", ours, samples=2, temperature=0.7).samples == 2


def test_own_critics_override_by_name_the_file_over_the_users(tmp_path, monkeypatch):
    user_file().parent.mkdir(parents=True)
    user_file().write_text(OWN.replace("my/8b", "from-user-file"))
    assert load_critics().critics["mine-8b"].model == "from-user-file"
    assert load_critics().critics["gpt-4-turbo"].model == "other"
    monkeypatch.setenv("WHERE", str(tmp_path))
    (tmp_path / "own.yaml").write_text(OWN)
    found = load_critics("$WHERE/own.yaml")
    assert found.critics["mine-8b"].model == "my/8b"
    assert found.critics["command-r"].model == "command-r-03-2024"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("critics: {x: {endpoint: nowhere, model: m}}", "critics.x.endpoint: no 'nowhere'"),
        ("critics: {x: {endpoint: vllm}}", "critics.x.model"),
        ("critics: {x: {endpoint: vllm, model: m, prise_in: 1}}", "critics.x.prise_in"),
        ("critics: {x: {endpoint: vllm, model: m, price_in: 1}}", "go together"),
        ("critics: {x: {endpoint: vllm, model: m, price_in: -1, price_out: 1}}", "critics.x.price_in"),
        ("endpoints: {e: {key_variable: sk-secret-123}}", "endpoints.e.key_variable"),
        ("critics: [", "not YAML"),
        ("", "critics file"),
    ],
)
def test_errors_name_the_file_and_the_key(tmp_path, text, message):
    path = tmp_path / "own.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        load_critics(path)
    assert str(path) in str(caught.value)
    assert "sk-secret" not in str(caught.value)


def test_a_missing_file_is_an_error():
    with pytest.raises(ConfigError, match="no such critics file"):
        load_critics("/nowhere/critics.yaml")


def test_all_critics_of_a_recipe_are_checked_at_once():
    stage = CritiqueConfig(critics={"gpt-4-turbo": {}, "self": {"self_critique": True}, "f": {"file": "x.jsonl"}})
    found = complete_critics(stage, backbone="b")
    assert {name: critic.model for name, critic in found.items()} == {
        "gpt-4-turbo": "gpt-4-0125-preview",
        "self": "local:b",
        "f": "",
    }
    complete_critics(stage.model_copy(update={"max_cost": 1.0}), backbone="b")
    unpriced = CritiqueConfig(critics={"mine": {"model": "m", "base_url": "http://h/v1"}}, max_cost=1.0)
    with pytest.raises(ConfigError, match=r"critic mine has no known price.*--price-in"):
        complete_critics(unpriced, backbone="b")


def test_open_chat_says_what_does_not_fit(ours):
    embedded = CriticConfig(model="embedded:SmolLM2-135M-Instruct", base_url="http://me:hunter2@host/v1")
    with pytest.raises(ConfigError, match="in this process") as caught:
        open_chat(embedded)
    assert "hunter2" not in str(caught.value)
    with pytest.raises(CriticError, match="OPENAI_API_KEY"):
        open_chat(complete("gpt-4-turbo", ours))
    with pytest.raises(CriticError, match="set CO_API_KEY"):
        open_chat(complete("command-r", ours))
    assert open_chat(CriticConfig(model="m", base_url="http://host/v1")).model == "m"


def test_open_chat_hands_on_the_settings(monkeypatch, tmp_path, ours):
    monkeypatch.setenv("CO_API_KEY", "co-key")
    chat = open_chat(complete("command-r", ours, concurrency=3, timeout=7.0))
    assert isinstance(chat, OpenAIChat)
    assert (chat.model, chat.concurrency, chat.timeout) == ("command-r-03-2024", 3, 7.0)
    assert "cohere" in repr(chat) and "co-key" not in repr(chat)
    several = open_chat(CriticConfig(model="m", base_url="http://a/v1, http://b/v1"))
    assert "http://a/v1" in repr(several) and "http://b/v1" in repr(several)
    monkeypatch.setenv("OPENAI_API_KEY", "oa-key")
    batch = open_chat(complete("gpt-4.1", ours, batch=True), batch_state=tmp_path / "state.json")
    assert isinstance(batch, BatchChat)


def test_tokens_are_counted_only_where_a_tokenizer_is_at_hand(tiny_model, ours):
    count = token_counter(CriticConfig(model=f"local:{tiny_model}"))
    assert count and count((Message("user", "Water boils."),)) > 3
    assert token_counter(CriticConfig(model="local:owner/not-here")) is None
    assert token_counter(complete("gpt-4-turbo", ours)) is None


@pytest.mark.parametrize("width", [160, 80])
def test_the_table_says_whether_a_key_is_set_and_never_shows_it(ours, width):
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(critics_table(ours, environment={"OPENAI_API_KEY": "sk-hidden"}, wide=width > 100))
    lines = console.export_text().splitlines()
    assert not any("sk-hidden" in line for line in lines)
    key = {name: next(line for line in lines if line.startswith(name + " ")).rstrip() for name in PAPER}
    assert key["gpt-4-turbo"].endswith("yes") and "10.00" in key["gpt-4-turbo"]
    assert key["command-r"].endswith("no")
    assert key["llama2-7b-chat"].endswith("not needed")
    assert any("CO_API_KEY" in line for line in lines)


def test_the_command_lists_own_critics(tmp_path: Path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    (tmp_path / "own.yaml").write_text(OWN.replace("mine-8b", "'[red]mine'"))
    command(critics=tmp_path / "own.yaml")
    out = capsys.readouterr().out
    assert "[red]mine" in out and "command-r-plus" in out and str(user_file()) in out
