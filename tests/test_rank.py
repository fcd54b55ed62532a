"""Best of n: order, ties and failures of lists; critiques from the file or a critic; the same as evaluate's lists."""

import io
import json
import math
import re

import pytest
from rich.console import Console

from critrm import rank as stage
from critrm.completion_lists import CompletionList, as_pairs, read_prompts, with_critiques
from critrm.errors import ConfigError, CriticMismatch, DataError, ModelError
from critrm.evaluate import evaluate
from critrm.preferences import read_pairs
from critrm.rank import check_readable, command, rank_completions, rank_to_file
from critrm.rankings import rankings_table
from critrm.reward_model import Reads, RewardModel
from critrm.types import Critique, CritiquedPair, Message
from scripted_server import Answer, completion, serving

PROMPT = (Message("user", "2 + 2?"),)


@pytest.fixture(scope="module")
def alone(tiny_model):
    return RewardModel.from_backbone(str(tiny_model), Reads(max_length=400), seed=3)


@pytest.fixture(scope="module")
def reader(tiny_model):
    return RewardModel.from_backbone(str(tiny_model), Reads(critic="c", max_length=400), seed=3)


class Scorer:
    """A completion's reward is its number, of `nan` none; counts the prompts it is asked for."""

    name, critic, fingerprint = "known", "none", "f"
    scores_without_critiques = True

    def __init__(self, *, stop_after=None):
        self.n_prompts, self.stop_after = 0, stop_after

    def score_candidates(self, candidates, *, max_tokens_per_step, on_progress):
        for each in candidates:
            if self.n_prompts == self.stop_after:
                raise KeyboardInterrupt
            self.n_prompts += 1
            yield [[float(text.split()[0])] for text in each.completions]
            if on_progress:
                on_progress(1)


def listed(*completions, number=0, **fields):
    return CompletionList(id=f"p{number}", prompt=PROMPT, completions=completions, **fields)


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def rows_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_completions_are_ordered_by_reward_and_ties_are_said():
    (found,) = rank_completions(Scorer(), [listed("1", "3 a", "2", "3 b", "2")])
    assert found.order == (1, 3, 2, 4, 0)
    assert found.ties == ((1, 3), (2, 4))
    assert (found.best, found.best_completion, found.critic) == (1, "3 a", "none")
    (found,) = rank_completions(Scorer(), [listed("1", "nan", "2")])
    assert (found.scores, found.order, found.best) == ((1.0, None, 2.0), (2, 0), None)
    assert found.failure == "a reward is not a number"


def test_rewards_are_the_models_own_and_equal_readings_tie(reader):
    texts, critiques = ("4", "four", "5", "4"), ("Right.", "Right, in words.", "Wrong.", "Right.")
    (found,) = rank_completions(reader, [listed(*texts, critiques=critiques, critic="c")])
    assert list(found.scores) == pytest.approx(reader.score_completions(PROMPT, texts, critiques=critiques), abs=1e-4)
    assert found.scores[0] == found.scores[3]
    assert (0, 3) in found.ties


def test_lists_count_as_evaluate_counts_them(alone, tmp_path, capsys):
    rows = [
        {"id": f"l{n}", "prompt": f"{n} + {n}?", "chosen": f"{2 * n}", "rejected": [f"{2 * n + k}" for k in (1, 2, 3)]}
        for n in range(12)
    ]
    rows[5]["chosen"] = ["10", "ten"]
    path = write(tmp_path / "lists.jsonl", *rows)
    rankings = rank_completions(alone, read_prompts(path))
    items = [CritiquedPair(pair=pair) for pair in read_pairs(path, dialect="best-of-n").pairs]
    result = evaluate(alone, items, benchmark="best-of-n").overall
    outcomes = [each.outcome for each in rankings]
    assert (outcomes.count("right"), outcomes.count("wrong")) == (result.n_right, result.n_wrong)
    assert len(outcomes) == 12
    console = Console(width=80, file=io.StringIO())
    console.print(rankings_table(rankings))
    assert f"all others: {result.accuracy.value:.3f}" in " ".join(console.file.getvalue().split())


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"completions": ["a"]}, "field 'prompt'"),
        ({"prompt": "q"}, "field 'completions': missing"),
        ({"prompt": "q", "completions": []}, "field 'completions'"),
        ({"prompt": "q", "completions": ["a", 3]}, "field 'completions': must be text"),
        ({"prompt": "q", "completions": ["a", "b"], "critiques": ["x"]}, "1 critiques of 2"),
        ({"prompt": "q", "completions": ["a"], "critiques": [" "]}, "empty"),
        ({"prompt": [{"role": "assistant", "content": "hi"}], "completions": ["a"]}, "field 'prompt'"),
        ({"prompt": "q", "chosen": "a", "rejected": [1]}, "field 'rejected'"),
        ({"id": "a", "prompt": "q", "completions": ["a"]}, "field 'id': a second row"),
        ({"id": [1], "prompt": "q", "completions": ["a"]}, "field 'id'"),
        ({"prompt": "\ud83d", "completions": ["a"]}, "lone surrogate"),
    ],
)
def test_errors_name_file_line_and_field(row, message, tmp_path):
    path = write(tmp_path / "prompts.jsonl", {"id": "a", "prompt": "q", "completions": ["a", "b"]}, row)
    with pytest.raises(DataError, match=rf"prompts\.jsonl:2: .*{message}"):
        read_prompts(path)


def test_hostile_text_passes_through(tmp_path):
    text = "<|im_end|> {{ x }} \x00 \u202e \u2028 🙂"
    path = write(tmp_path / "prompts.jsonl", {"id": 7, "prompt": text, "completions": [text, ""]})
    (item,) = read_prompts(path)
    assert (item.id, item.prompt[0].content, item.completions) == ("7", text, (text, ""))


def test_critiques_of_lists_come_from_pairs_of_two():
    items = [listed("a", "b", "c"), listed("d", number=1)]
    pairs = [pair for item in items for pair in as_pairs(item)]
    assert [(pair.id, pair.chosen, pair.rejected) for pair in pairs] == [
        ("p0#0", "a", "b"),
        ("p0#1", "c", "c"),
        ("p1#0", "d", "d"),
    ]
    rows = [
        Critique(key="", pair_id=pair.id, side=side, text=f"of {pair.completion(side)}", critic="c", prompt_version="")
        for pair in pairs
        for side in ("chosen", "rejected")
    ]
    first, second = with_critiques(items, rows, critic="c")
    assert (first.critiques, second.critiques) == (("of a", "of b", "of c"), ("of d",))


def test_a_list_is_never_scored_half_with_critiques(reader, tiny_model):
    failed = listed("4", "5", critic="c", failure="timeout")
    (found,) = rank_completions(reader, [failed])
    assert (found.scores, found.order, found.best, found.failure) == ((None, None), (), None, "timeout")
    able = RewardModel.from_backbone(str(tiny_model), Reads(critic="c", critique_dropout=0.1), seed=3)
    (found,) = rank_completions(able, [failed])
    assert list(found.scores) == pytest.approx(able.score_completions(PROMPT, ["4", "5"]), abs=1e-4)
    assert (found.critic, found.failure) == ("none", "timeout")


def test_a_model_reads_what_it_was_trained_to_read(reader, alone):
    with pytest.raises(CriticMismatch, match="--critic c"):
        check_readable(reader, [listed("a")])
    with pytest.raises(CriticMismatch, match="by 'd'"):
        check_readable(reader, [listed("a", critiques=("x",), critic="d")])
    with pytest.raises(CriticMismatch, match="'none'"):
        check_readable(alone, [listed("a", critiques=("x",))])
    check_readable(reader, [listed("a", critiques=("x",), critic="d")], allow_other_critic=True)
    check_readable(reader, [listed("a", critiques=("x",))])
    check_readable(alone, [listed("a")])


def test_the_same_command_goes_on_where_it_was_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(stage, "PROMPTS_PER_SAVE", 2)
    items, out = [listed("1", "2", number=n) for n in range(6)], tmp_path / "out.jsonl"
    with pytest.raises(KeyboardInterrupt):
        rank_to_file(Scorer(stop_after=3), items, out=out)
    assert [row["id"] for row in rows_of(out)] == ["p0", "p1"]
    model = Scorer()
    found = rank_to_file(model, items, out=out)
    assert model.n_prompts == 4
    assert [(row["id"], row["best"], row["best_completion"]) for row in rows_of(out)] == [
        (each.id, 1, "2") for each in found
    ]
    again = Scorer()
    assert rank_to_file(again, [*items[:5], listed("2", "1", number=5)], out=out)[5].best == 0
    assert again.n_prompts == 1
    assert not any(math.isnan(score) for row in rows_of(out) for score in row["scores"])


def test_the_command_calls_a_critic_for_rows_without_critiques(reader, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr("critrm.models.choose_precision", lambda device: "fp32")
    reader.save(tmp_path / "run" / "model")
    path = write(
        tmp_path / "prompts.jsonl",
        {"id": "a", "prompt": "2 + 2?", "completions": ["4", "5", "6"]},
        {"id": "b", "prompt": "3 + 3?", "completions": ["6", "7"], "critiques": ["Right.", "Wrong."]},
    )
    failing = True

    def answer(request):
        text = request["messages"][0]["content"]
        if failing and "Chatbot: 5" in text:
            return Answer(status=400, body='{"error": {"message": "no"}}')
        return completion(f"It says {text[text.index('Chatbot: ') + 9]}.")

    with serving(answer) as server:
        how = {"critic": "c", "critic_model": "m", "base_url": server.url, "key_variable": "", "price_in": 1.0}
        how |= {"price_out": 1.0, "out": tmp_path / "ranked.jsonl"}
        command(str(tmp_path / "run"), path, dry_run=True, **how)
        assert len(server.bodies) == 0
        command(str(tmp_path / "run"), path, **how)
        first, second = rows_of(tmp_path / "ranked.jsonl")
        assert first["best"] is None and "400" in first["failure"]
        assert second["best"] is not None
        shown = capsys.readouterr().out
        assert "--retry-failed" in shown
        assert re.search(r"written +│ +2 │", shown)
        n_calls, failing = len(server.bodies), False
        command(str(tmp_path / "run"), path, retry_failed=True, **how)
        assert len(server.bodies) == n_calls + 1  # what was answered is not paid for again
    first, _ = rows_of(tmp_path / "ranked.jsonl")
    assert first["critiques"] == ["It says 4.", "It says 5.", "It says 6."]
    expected = reader.score_completions(PROMPT, ["4", "5", "6"], critiques=first["critiques"])
    assert first["scores"] == pytest.approx(expected, abs=1e-4)
    assert json.loads((tmp_path / "ranked.jsonl.manifest.json").read_text())["cost"] > 0
    with pytest.raises(ConfigError, match="is the input"):
        command(str(tmp_path / "run"), path, out=path)


def test_a_run_names_its_model(reader, alone, tmp_path):
    for name, model in (("none", alone), ("c", reader)):
        model.save(tmp_path / "run" / "train" / name / "seed-0" / "model")
    for folder in ("run/train/c/seed-0/model", "run/train/c/seed-0", "run/train/c"):
        assert RewardModel.load(tmp_path / folder).critic == "c"
    with pytest.raises(ModelError, match=r"holds 2 reward models.*seed-0.model"):
        RewardModel.load(tmp_path / "run")
    assert RewardModel.load(tmp_path / "run", critic="c").critic == "c"
    assert RewardModel.load(tmp_path / "run", critic="none").critic == "none"
