"""What is pushed to the hub: which files, what the card says, what never leaves, and the upload itself."""

import base64
import json
import os
import subprocess
import sys
import threading
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import yaml

from critrm.augment import augment_pairs, write_augmented
from critrm.config import data_path, load_recipe
from critrm.critique_files import read_critiques
from critrm.errors import ConfigError, CriticMismatch, DataError, ModelError
from critrm.evaluate import evaluate
from critrm.pipeline import run_recipe
from critrm.preferences import read_pairs
from critrm.prompts import reward_segments, with_critique
from critrm.push import command, stage_model, stage_pairs
from critrm.reward_model import Reads, RewardModel
from critrm.store import read_records, write_records
from critrm.types import Critique, CritiquedPair

SECRET = "hf_" + "s" * 34


def critiques_of(pairs, *, critic="c"):
    return [
        Critique(key=f"{pair.id}-{side}", pair_id=pair.id, side=side, text=f"{side}: it is {side}.", critic=critic,
                 prompt_version="0123456789ab")
        for pair in pairs
        for side in ("chosen", "rejected")
    ]  # fmt: skip


@pytest.fixture(scope="module")
def run(tiny_model, tmp_path_factory):
    """A finished run with two arms."""
    folder = tmp_path_factory.mktemp("push")
    mini = read_pairs(data_path("bundled:mini-pairs.jsonl")).pairs
    write_records(folder / "critiques.jsonl", critiques_of(mini, critic="kind critic"))
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        yaml.safe_dump(
            {
                "name": "tiny",
                "preferences": {
                    "train": {"path": "bundled:mini-pairs.jsonl", "split": "train", "limit": 8},
                    "test": {"mini": {"path": "bundled:mini-pairs.jsonl", "split": "test", "limit": 12}},
                },
                "critique": {"critics": {"kind critic": {"file": str(folder / "critiques.jsonl")}}},
                "augment": {"max_length": 512},
                "train": {"backbone": str(tiny_model), "batch_size": 4, "learning_rates": [1e-3], "seeds": [0]},
                "evaluate": {"zero_label": False},
            }
        )
    )
    run_recipe(load_recipe(str(recipe)), out=folder / "run")
    return folder / "run"


@pytest.fixture
def model(tiny_model, tmp_path):
    made = RewardModel.from_backbone(str(tiny_model), Reads(critic="c", max_length=400, backbone="org/base"), seed=3)
    made.save(tmp_path / "mine")
    return tmp_path / "mine"


def metadata(folder):
    _, front, text = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    return yaml.safe_load(front), text


def test_a_run_s_model_goes_with_its_own_numbers_and_those_of_the_other_arms(run, tmp_path):
    out = stage_model(str(run), "me/rm", out=tmp_path / "out", licence="apache-2.0", critic="kind critic")
    facts, text = metadata(out)
    own = json.loads((run / "evaluate/kind-critic/seed-0/mini/pairs.json").read_text())
    accuracy = own["overall"]["accuracy"]
    (result,) = facts["model-index"][0]["results"]
    assert result["metrics"][0]["value"] == round(accuracy["value"], 4)
    assert facts["license"] == "apache-2.0"
    assert f"| mini | 12 | {accuracy['value']:.3f} [{accuracy['low']:.2f}, {accuracy['high']:.2f}] |" in text
    assert "| none |" in text, "the arm without critiques stands beside it"
    assert "- prompt version: `0123456789ab`" in text
    assert "- pairs: `8`" in text


def test_the_card_says_when_an_arm_beats_no_null(run, tmp_path):
    out = stage_model(str(run), "me/rm", out=tmp_path / "out", licence="mit", critic="kind critic")
    results = json.loads((run / "results.json").read_text())
    from critrm.results import baseline_notes

    notes = list(baseline_notes(results["tests"]))
    assert notes, "random weights beat nothing"
    assert "does not beat" in metadata(out)[1]


def test_only_the_model_leaves_and_no_name_of_this_machine(run, tmp_path, tiny_model):
    out = stage_model(str(run), "me/rm", out=tmp_path / "out", licence="mit", critic="kind critic")
    assert {file.name for file in out.iterdir()} == {
        "README.md", "chat_template.jinja", "config.json", "critrm.json", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json",
    }  # fmt: skip
    for file in out.iterdir():
        if file.suffix != ".safetensors":
            assert str(tiny_model.parent) not in file.read_text(encoding="utf-8"), file.name


def test_what_is_staged_scores_as_the_model_does(run, tmp_path):
    out = stage_model(str(run), "me/rm", out=tmp_path / "out", licence="mit", critic="kind critic")
    items = read_records(run / "augment/mini/kind-critic.jsonl", CritiquedPair)[:4]
    expected = RewardModel.load(run, critic="kind critic").score(items)
    assert RewardModel.load(out).score(items) == expected
    assert RewardModel.load(out).reads.critic == "kind critic"


def test_the_snippet_for_transformers_scores_as_the_model_does(model, pairs):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    classifier = AutoModelForSequenceClassification.from_pretrained(model)
    ours = RewardModel.load(model, precision="fp32")
    for pair in pairs:
        for critique in ("It is right.\nSo it is.", ""):
            item = CritiquedPair(pair=pair, critic="c", chosen_critique=critique, rejected_critique=critique)
            read = with_critique(pair.prompt, pair.chosen, critique)
            rows = [{"role": each.role, "content": each.content} for each in read]
            text = tokenizer.apply_chat_template(rows, tokenize=False)
            assert text == "".join(reward_segments(pair.prompt, pair.chosen, critique))
            logit = classifier(**tokenizer(text, return_tensors="pt")).logits.item()
            assert logit == pytest.approx(ours.score([item])[0].chosen, abs=1e-4)


def test_a_generation_prompt_ends_where_the_completion_begins(model, pairs):
    from transformers import AutoTokenizer

    rows = [{"role": each.role, "content": each.content} for each in pairs[2].prompt]
    text = AutoTokenizer.from_pretrained(model).apply_chat_template(rows, tokenize=False, add_generation_prompt=True)
    assert text == reward_segments(pairs[2].prompt, "", "")[0]


def test_evaluations_of_the_model_are_taken_and_others_refused(model, pairs, tmp_path):
    items = augment_pairs(pairs, {"c": critiques_of(pairs)}).arms["c"]
    evaluate(RewardModel.load(model), items, out=tmp_path / "sums")
    out = stage_model(str(model), "me/rm", out=tmp_path / "out", licence="mit", evaluations=[tmp_path / "sums"])
    assert metadata(out)[0]["model-index"][0]["results"][0]["dataset"]["name"] == "sums"
    other = RewardModel.load(model)
    other.name = "somebody/else"
    evaluate(other, items, out=tmp_path / "other")
    with pytest.raises(DataError, match=r"somebody/else, not of"):
        stage_model(str(model), "me/rm", out=tmp_path / "out", licence="mit", evaluations=[tmp_path / "other"])
    evaluate(other, augment_pairs(pairs, {}).arms["none"], out=tmp_path / "none", allow_other_critic=True)
    with pytest.raises(CriticMismatch, match="with critiques by 'none'"):
        stage_model(str(model), "me/rm", out=tmp_path / "out", licence="mit", evaluations=[tmp_path / "none"])
    with pytest.raises(DataError, match="no result in it"):
        stage_model(str(model), "me/rm", out=tmp_path / "out", licence="mit", evaluations=[tmp_path])


def test_a_model_nobody_evaluated_says_so(model, tmp_path):
    facts, text = metadata(stage_model(str(model), "me/rm", out=tmp_path / "out", licence="mit"))
    assert "Not evaluated" in text
    assert "model-index" not in facts
    assert facts["base_model"] == "org/base"


def test_hostile_names_stay_text(tiny_model, tmp_path):
    critic = "`</code>\n# Best\n---\n| x |"
    made = RewardModel.from_backbone(str(tiny_model), Reads(critic=critic, max_length=400), seed=3)
    made.save(tmp_path / "mine")
    facts, text = metadata(stage_model(str(tmp_path / "mine"), "me/rm", out=tmp_path / "out", licence="mit"))
    assert "\n# Best" not in text
    assert facts["license"] == "mit"


def test_what_is_no_model_is_refused(tmp_path, model):
    with pytest.raises(ModelError, match="no reward model in it"):
        stage_model(str(tmp_path), "me/rm", out=tmp_path / "out", licence="mit")
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    with pytest.raises(ModelError, match="not in safetensors"):
        stage_model(str(model), "me/rm", out=tmp_path / "out", licence="mit")


@pytest.mark.parametrize("readme", ["# My thesis", "Made with critrm"])
def test_somebody_s_folder_is_not_emptied(model, tmp_path, readme):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    (tmp_path / "thesis" / "README.md").write_text(readme)
    with pytest.raises(ConfigError, match="holds other files"):
        stage_model(str(model), "me/rm", out=tmp_path / "thesis", licence="mit")
    assert (tmp_path / "thesis" / "chapter.txt").is_file()


def test_the_model_itself_is_never_replaced(model):
    with pytest.raises(ConfigError, match="holds other files"):
        stage_model(str(model), "me/rm", out=model, licence="mit")
    assert (model / "model.safetensors").is_file()


def test_pushing_again_replaces_what_was_staged(model, run, tmp_path):
    stage_model(str(model), "me/rm", out=tmp_path / "out", licence="mit")
    stage_pairs(run / "augment/train/kind-critic.jsonl", "me/pairs", out=tmp_path / "out", licence="mit")
    assert {file.name for file in (tmp_path / "out").rglob("*") if file.is_file()} == {"README.md", "train.jsonl"}
    assert (model / "model.safetensors").is_file(), "it had a second name there"


def test_pairs_come_back_as_they_were(data_dir, tmp_path):
    found = read_pairs(data_dir / "hh-pairs/pairs.jsonl", split="test", limit=40).pairs
    rows = read_critiques(data_dir / "critiques/frontier-llm.jsonl", critic="frontier-llm")
    augmented = augment_pairs(found, {"frontier-llm": rows})
    write_augmented(tmp_path / "arms", augmented)
    arm = tmp_path / "arms/frontier-llm.jsonl"
    out = stage_pairs(arm, "me/pairs", out=tmp_path / "out", licence="mit", split="test")
    file = out / "data/test.jsonl"
    again = augment_pairs(read_pairs(file).pairs, {"frontier-llm": read_critiques(file)}).arms["frontier-llm"]
    before = augmented.arms["frontier-llm"]
    # The split is the file's.
    assert [item.pair for item in again] == [replace(item.pair, split="") for item in before]
    for side in ("chosen", "rejected"):
        assert [item.critique(side).strip() for item in again] == [item.critique(side).strip() for item in before]
    scores = [(item.chosen_score, item.rejected_score) for item in before]
    assert [(item.chosen_score, item.rejected_score) for item in again] == scores and None not in scores[0]
    facts, text = metadata(out)
    assert facts["configs"][0]["data_files"] == [{"split": "test", "path": "data/test.jsonl"}]
    assert f"{len(before)} preference pairs" in text


def test_pairs_load_with_datasets(run, tmp_path):
    datasets = pytest.importorskip("datasets")
    out = stage_pairs(run / "augment/train/kind-critic.jsonl", "me/pairs", out=tmp_path / "out", licence="mit")
    loaded = datasets.load_dataset(str(out), split="train", cache_dir=str(tmp_path / "cache"))
    assert loaded.num_rows == 8
    assert loaded[0]["chosen"][0]["role"] == "assistant"
    assert "kind critic" in metadata(out)[1]


def test_a_file_that_is_no_arm_is_refused(tmp_path, data_dir):
    with pytest.raises(DataError, match="not an arm"):
        stage_pairs(data_dir / "hh-pairs/pairs.jsonl", "me/pairs", out=tmp_path / "out", licence="mit")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"repo": "no-owner"}, "no owner/name"),
        ({"repo": "a/b/../c"}, "no owner/name"),
        ({"repo": "me/$(id)"}, "no owner/name"),
        ({"license": "Apache 2"}, "small letters"),
        ({"split": "../x"}, "letters, digits"),
    ],
)
def test_names_are_checked_before_anything_is_written(fields, said, model, tmp_path):
    with pytest.raises(ConfigError, match=said):
        command(str(model), **({"repo": "me/rm", "license": "mit", "out": tmp_path / "out"} | fields))
    assert not (tmp_path / "out").exists()


def test_nothing_leaves_without_being_told_to(model, tmp_path, capsys):
    command(str(model), "me/rm", license="mit", out=tmp_path / "out")
    assert "Nothing was uploaded" in capsys.readouterr().out


@contextmanager
def hub(*, refuses: int = 0):
    """A server that speaks what `huggingface_hub` needs for an upload; keeps what it was sent."""
    sent = {"files": {}, "paths": [], "tokens": set()}

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["content-length"]))
            sent["paths"].append(self.path)
            sent["tokens"].add(self.headers["authorization"])
            address = f"http://{self.headers['host']}/me/rm"
            if refuses:
                return self.answer(refuses, {"error": "You may not."})
            if self.path.endswith("/preupload/main"):
                files = json.loads(body)["files"]
                return self.answer(200, {"files": [
                    {"path": each["path"], "uploadMode": "regular", "shouldIgnore": False} for each in files
                ]})  # fmt: skip
            if "/commit/" in self.path:
                for line in map(json.loads, body.splitlines()):
                    if line["key"] == "file":
                        sent["files"][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                return self.answer(200, {"commitUrl": address, "commitOid": "0" * 40})
            return self.answer(200, {"url": address, "name": "me/rm", "id": "me/rm"})

        def do_GET(self):
            sent["paths"].append(self.path)
            self.answer(404, {"error": "There is nothing."})

        def answer(self, status, content):
            data = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", sent
    finally:
        server.shutdown()
        server.server_close()


def push(address, *args, token=SECRET):
    kept = {name: value for name, value in os.environ.items() if name not in ("HF_HUB_OFFLINE", "HF_TOKEN")}
    env = kept | {"HF_ENDPOINT": address, "HF_HUB_DISABLE_XET": "1"} | ({"HF_TOKEN": token} if token else {})
    return subprocess.run(
        [sys.executable, "-m", "critrm", "push", *map(str, args), "--license", "mit", "--upload"],
        env=env, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


def test_an_upload_sends_what_was_staged(model, tmp_path):
    with hub() as (address, sent):
        done = push(address, model, "me/rm", "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert sent["files"] == {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    assert sent["tokens"] == {f"Bearer {SECRET}"}
    assert SECRET not in done.stdout + done.stderr


def test_a_refused_upload_says_why_and_keeps_the_token(run, tmp_path):
    with hub(refuses=403) as (address, _):
        done = push(address, run / "augment/train/kind-critic.jsonl", "me/pairs", "--out", tmp_path / "out")
    assert done.returncode == 2
    assert "http 403" in done.stderr
    assert "HF_TOKEN" in done.stderr
    assert SECRET not in done.stdout + done.stderr
    assert (tmp_path / "out/README.md").is_file()
