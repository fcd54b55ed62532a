"""Recipes: what they may say, and errors that name the key."""

import pytest
import yaml
from pydantic import ValidationError

from critrm.config import CriticConfig, Recipe, TrainConfig, data_path, load_recipe, validated
from critrm.errors import ConfigError

RECIPE = """
name: mine
preferences:
  train: {path: "bundled:mini-pairs.jsonl", split: train}
  test: {mini: {path: "bundled:mini-pairs.jsonl", split: test}}
train: {backbone: x}
"""


def test_the_defaults_are_the_papers_section_4_4(tmp_path):
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    train = load_recipe(tmp_path / "recipe.yaml").train
    assert (train.batch_size, train.n_epochs, train.warmup_steps) == (32, 1, 32)
    assert (train.learning_rates, train.min_learning_rate_share, train.lora_rank) == ((8e-5,), 0.1, 0)
    assert list(train.margins.values()) == sorted(train.margins.values())


@pytest.mark.parametrize(
    "name", ["demo.yaml", "hh-llmbar.yaml", "paper.yaml", "scaling.yaml", "beyond.yaml", "frozen.yaml"]
)
def test_the_bundled_recipes_are_valid(name):
    assert isinstance(load_recipe(f"bundled:{name}"), Recipe)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (RECIPE + "trian: {}\n", "trian"),
        (RECIPE.replace("backbone: x", "backbone: x, batch_size: 0"), "train.batch_size"),
        (RECIPE.replace("backbone: x", "backbone: x, learning_rates: [1.0e-5, 2.0e-5]"), "n_held_out"),
        (RECIPE.replace("name: mine", "name: ../up"), "name"),
        (RECIPE + "critique: {max_cost: -1}\n", "critique.max_cost"),
        (RECIPE + "critique: {critics: {x: {modle: m}}}\n", "critique.critics.x.modle"),
        ("a: [", "not YAML"),
        ("", "recipe"),
    ],
)
def test_errors_name_the_file_and_the_key(tmp_path, text, message):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        load_recipe(path)
    assert str(path) in str(caught.value)


def test_a_missing_recipe_says_so(tmp_path):
    with pytest.raises(ConfigError, match="no such recipe"):
        load_recipe(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    "wrong",
    [
        {"model": "m", "file": "f"},
        {"model": "m", "self_critique": True},
        {"price_in": 1.0},
        {"samples": 0},
        {"temperature": float("nan")},
        {"key_variable": "sk-this-is-the-key-itself"},
        {"requests_per_minute": 0},
    ],
)
def test_a_critic_that_cannot_be(wrong):
    with pytest.raises(ConfigError) as caught:
        validated(CriticConfig, wrong, where="critic x", what="settings")
    assert str(caught.value).startswith("critic x: ")
    assert "itself" not in str(caught.value)


def test_a_critic_may_be_empty_or_have_several_endpoints():
    assert CriticConfig().model == ""
    critic = CriticConfig(model="m", base_url=["http://a/v1", "http://b/v1"])
    assert critic.base_url == ("http://a/v1", "http://b/v1")
    assert not critic.in_process
    assert CriticConfig(model="local:x").in_process


def test_what_goes_into_manifests_holds_no_credentials():
    critic = CriticConfig(model="m", base_url="http://me:hunter2@host:1/v1?token=hunter3,https://b/v1")
    assert critic.model_dump()["base_url"] == ["http://host:1/v1", "https://b/v1"]
    assert CriticConfig(model="m").model_dump()["base_url"] is None


def test_paths_expand_variables_and_bundled_files(monkeypatch, tmp_path):
    monkeypatch.setenv("SOME_DATA", str(tmp_path))
    monkeypatch.delenv("UNSET_DATA", raising=False)
    assert data_path("$SOME_DATA/a.jsonl") == tmp_path / "a.jsonl"
    assert data_path("bundled:mini-pairs.jsonl").is_file()
    with pytest.raises(ConfigError, match="set the environment variable"):
        data_path("$UNSET_DATA/a.jsonl")
    with pytest.raises(ConfigError, match="no such file"):
        data_path("bundled:../../etc/passwd")


def test_sections_are_frozen():
    with pytest.raises(ValidationError, match="frozen"):
        TrainConfig(backbone="x").batch_size = 4


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"preferences": {"train": {"path": "a"}, "test": {"train": {"path": "b"}}}}, "cannot be called train"),
        ({"preferences": {"train": {"path": "a"}, "test": {"../x": {"path": "b"}}}}, "pattern"),
        ({"train": {"backbone": "b", "keep": "best"}}, "n_held_out"),
        ({"train": {"backbone": "b", "margins": {"slightly": 0.3}}}, "margins"),
    ],
)
def test_what_would_fail_or_mislead_later_is_refused_at_once(tmp_path, change, reason):
    recipe = {
        "name": "x",
        "preferences": {"train": {"path": "a"}, "test": {"t": {"path": "b"}}},
        "train": {"backbone": "b"},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe | change))
    with pytest.raises(ConfigError, match=reason):
        load_recipe(tmp_path / "recipe.yaml")
