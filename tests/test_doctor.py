"""The doctor finds what is wrong, says what to do, and finds nothing wrong with what is right."""

import json
import shutil
from dataclasses import replace

import pytest

from critrm.data_checks import check_critics, check_lengths, check_pairs
from critrm.doctor import command
from critrm.errors import ConfigError
from critrm.findings import Finding
from critrm.model_checks import check_reward_model, check_tokenizer
from critrm.models import load_tokenizer
from critrm.reward_model import Reads, RewardModel
from critrm.store import write_records
from critrm.types import Critique, CritiquedPair


def verdicts(findings: list[Finding]) -> dict[str, str]:
    return {finding.check: finding.verdict for finding in findings}


@pytest.fixture
def reward_model(tiny_model) -> RewardModel:
    return RewardModel.from_backbone(str(tiny_model), Reads(critic="c", max_length=512), seed=0)


def with_template(tiny_model, folder, template, **changes):
    shutil.copytree(tiny_model, folder)
    (folder / "chat_template.jinja").write_text(template)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | changes))
    return load_tokenizer(str(folder))


def test_a_padding_token_that_ends_texts_is_noted(tiny_model):
    found = {finding.check: finding for finding in check_tokenizer(load_tokenizer(str(tiny_model)))}
    assert found["padding token"].verdict == "note" and "<|im_end|>" in found["padding token"].what
    assert found["chat template"].verdict == "good"
    assert found["beginning-of-sequence token"].verdict == "good"


def test_a_padding_token_of_its_own_is_good(tiny_model, tmp_path):
    tokenizer = load_tokenizer(str(tiny_model))
    tokenizer.pad_token = "<|endoftext|>"
    assert verdicts(check_tokenizer(tokenizer))["padding token"] == "good"


def test_a_template_that_writes_the_date_is_a_warning(tiny_model, tmp_path):
    dated = "Today is {{ strftime_now('%d %b %Y') }}.{% for message in messages %}{{ message['content'] }}{% endfor %}"
    tokenizer = with_template(tiny_model, tmp_path / "dated", dated)
    assert verdicts(check_tokenizer(tokenizer))["chat template"] == "warning"
    tokenizer.chat_template = None
    assert verdicts(check_tokenizer(tokenizer))["chat template"] == "note"


def test_a_beginning_that_is_written_twice_is_a_warning(tiny_model):
    from tokenizers.processors import TemplateProcessing

    tokenizer = load_tokenizer(str(tiny_model))
    bos = tokenizer.bos_token
    tokenizer.chat_template = bos + "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.bos_token_id)]
    )
    assert verdicts(check_tokenizer(tokenizer))["beginning-of-sequence token"] == "warning"


def test_a_sound_reward_model_passes(reward_model, pairs):
    items = [CritiquedPair(pair=pair, critic="c", chosen_critique="Good.", rejected_critique="Bad.") for pair in pairs]
    found = verdicts(check_reward_model(reward_model, items))
    assert set(found.values()) == {"good"} and len(found) == 4


def test_rewards_that_depend_on_the_batch_are_a_problem(reward_model, pairs, monkeypatch):
    rewards = RewardModel.rewards
    monkeypatch.setattr(RewardModel, "rewards", lambda self, batch: rewards(self, batch) * len(batch.groups))
    found = verdicts(check_reward_model(reward_model, [CritiquedPair(pair=pair) for pair in pairs]))
    assert found["rewards and the batch"] == "problem" and found["rewards and the order"] == "good"


@pytest.mark.parametrize("place", [0, -1])
def test_rewards_that_are_no_numbers_are_a_problem(place, reward_model, pairs, monkeypatch):
    rewards = RewardModel.rewards

    def spoiled(self, batch):
        found = rewards(self, batch)
        if len(batch.groups) == 1:  # one of the two that are compared
            found[0, place] = float("nan")
        return found

    monkeypatch.setattr(RewardModel, "rewards", spoiled)
    findings = check_reward_model(reward_model, [CritiquedPair(pair=pair) for pair in pairs])
    (found,) = [finding for finding in findings if finding.check == "rewards and the batch"]
    assert found.verdict == "problem" and "4 of 8 rewards are not finite" in found.what


def test_a_head_that_is_lost_on_disk_is_a_problem(reward_model, pairs, monkeypatch):
    save = RewardModel.save

    def save_another_head(self, folder):
        head = self.model.score.weight.data.clone()
        self.model.score.weight.data.mul_(2)
        save(self, folder)
        self.model.score.weight.data.copy_(head)

    monkeypatch.setattr(RewardModel, "save", save_another_head)
    assert verdicts(check_reward_model(reward_model, [CritiquedPair(pair=pair) for pair in pairs])) == {
        "rewards and the batch": "good",
        "rewards and the order": "good",
        "rewards and padding": "good",
        "saved and loaded": "problem",
    }


def test_pairs_that_contradict_or_repeat_each_other(pairs):
    assert verdicts(check_pairs(pairs))["labels"] == verdicts(check_pairs(pairs))["copies"] == "good"
    contrary = replace(pairs[0], id="x", chosen=pairs[0].rejected, rejected=pairs[0].chosen)
    assert verdicts(check_pairs([*pairs, contrary]))["labels"] == "warning"
    assert verdicts(check_pairs([*pairs, replace(pairs[0], id="y")]))["copies"] == "warning"


def test_ratings_and_lengths(pairs):
    assert verdicts(check_pairs(pairs))["ratings and margins"] == "good"
    assert verdicts(check_pairs(pairs))["length"] == "warning"  # every rejected one is the longer one
    bare = [replace(pair, rating=None) for pair in pairs]
    assert verdicts(check_pairs(bare))["ratings and margins"] == "note"
    mixed = [bare[0], *pairs[1:]]
    assert verdicts(check_pairs(mixed))["ratings and margins"] == "warning"
    level = [
        replace(pair, chosen=pair.rejected, rejected=pair.chosen) if i % 2 else pair for i, pair in enumerate(pairs)
    ]
    assert verdicts(check_pairs(level))["length"] == "good"


def test_critiques_that_are_cut_are_a_warning(pairs):
    items = [CritiquedPair(pair=pair, critic="c", chosen_critique="w " * 60, rejected_critique="b") for pair in pairs]
    encode = lambda text: list(range(len(text.split())))  # noqa: E731 one token a word
    assert verdicts(check_lengths(items, encode, max_length=512)) == {"512 tokens, critic c": "good"}
    found = check_lengths(items, encode, max_length=32)
    assert any(finding.verdict == "warning" and "critique cut in 12 of 12" in finding.what for finding in found)


def test_critics_that_miss_pairs_or_are_not_the_models_own(pairs):
    rows = [
        Critique(key=f"{pair.id}{side}", pair_id=pair.id, side=side, text="T", critic="c", prompt_version="")
        for pair in pairs
        for side in ("chosen", "rejected")
    ]
    assert verdicts(check_critics(pairs, rows)) == {"critic c": "good"}
    assert verdicts(check_critics(pairs, rows[:-1])) == {"critic c": "warning"}
    assert verdicts(check_critics(pairs, [replace(row, failure="timeout") for row in rows])) == {"critic c": "problem"}
    assert [finding.verdict for finding in check_critics(pairs, rows, trained_with="d")] == ["good", "problem"]
    assert verdicts(check_critics(pairs, [replace(row, text=" ") for row in rows])) == {"critic c": "problem"}
    halves = rows[:12] + [replace(row, critic="d") for row in rows[12:]]
    assert verdicts(check_critics(pairs, halves)) == {
        "critic c": "warning",
        "critic d": "warning",
        "critics": "problem",
    }


def test_a_critic_that_covers_no_pair_is_a_finding_and_the_other_checks_are_made(tiny_model, pairs, tmp_path, capsys):
    write_records(tmp_path / "pairs.jsonl", pairs)
    sides = ("chosen", "rejected")
    rows = [{"pair_id": f"other-{pair.id}", "side": side, "critique": "T", "critic": "stranger"}
            for pair in pairs for side in sides]  # fmt: skip
    rows += [{"pair_id": pair.id, "side": side, "critique": "T", "critic": "c"} for pair in pairs for side in sides]
    write_records(tmp_path / "critiques.jsonl", rows)
    with pytest.raises(ConfigError, match="problems"):
        command(
            backbone=str(tiny_model), pairs=str(tmp_path / "pairs.jsonl"), critiques=(tmp_path / "critiques.jsonl",),
            out=tmp_path / "findings.json", load_model=False,
        )  # fmt: skip
    findings = {finding["check"]: finding for finding in json.loads((tmp_path / "findings.json").read_text())}
    assert findings["critic stranger"]["verdict"] == "problem"
    assert "0 of 12 pairs" in findings["critic stranger"]["what"]
    assert findings["critic c"]["verdict"] == "good"
    assert findings["2048 tokens, critic c"]["verdict"] == "good"


def test_a_model_is_measured_with_the_length_that_it_reads(reward_model, pairs, tmp_path, capsys):
    write_records(tmp_path / "pairs.jsonl", pairs)
    model = RewardModel(reward_model.model, reward_model.tokenizer, Reads(max_length=16), name="m")
    model.save(tmp_path / "model")
    how = {"model": tmp_path / "model", "pairs": str(tmp_path / "pairs.jsonl"), "load_model": False}
    command(**how, out=tmp_path / "findings.json")
    findings = json.loads((tmp_path / "findings.json").read_text())
    assert {finding["check"] for finding in findings if "tokens, critic" in finding["check"]} == {
        "16 tokens, critic none"
    }
    with pytest.raises(ConfigError, match="leave --max-length out"):
        command(**how, max_length=2048)


def test_critiques_without_their_pairs_are_refused(tiny_model, tmp_path):
    with pytest.raises(ConfigError, match="give --pairs"):
        command(backbone=str(tiny_model), critiques=(tmp_path / "critiques.jsonl",), load_model=False)


def test_the_command(tiny_model, pairs, reward_model, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    write_records(tmp_path / "pairs.jsonl", pairs)
    command(backbone=str(tiny_model), pairs=str(tmp_path / "pairs.jsonl"), out=tmp_path / "findings.json")
    findings = json.loads((tmp_path / "findings.json").read_text())
    assert {"rows", "padding token", "saved and loaded", "labels"} <= {finding["check"] for finding in findings}
    assert "critrm doctor" in capsys.readouterr().out
    rows = [
        {"pair_id": pair.id, "side": side, "critique": "T", "critic": "[/x]"}
        for pair in pairs
        for side in ("chosen", "rejected")
    ]
    write_records(tmp_path / "critiques.jsonl", rows)
    reward_model.save(tmp_path / "model")
    with pytest.raises(ConfigError, match="problems"):
        command(
            model=tmp_path / "model", pairs=str(tmp_path / "pairs.jsonl"), critiques=(tmp_path / "critiques.jsonl",)
        )
    assert "trained with critiques by 'c'" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="--backbone or --model"):
        command()
