"""Scoring a benchmark: who may read which critiques, what is on disk, and what a second or a killed run does."""

import gzip
import io
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
from rich.console import Console

from critrm import evaluate as stage
from critrm.augment import augment_pairs, write_augmented
from critrm.critique_files import read_critiques
from critrm.errors import ConfigError, CriticMismatch, DataError, StorageError
from critrm.evaluate import command, evaluate, read_result, read_scores, result_table
from critrm.metrics import tally
from critrm.reward_model import Reads, RewardModel
from critrm.store import write_records
from critrm.types import Critique, CritiquedPair, Message, Outcome, Score


class Scorer:
    """A reward model whose rewards are known; counts what it is asked to score."""

    name = "known"
    scores_without_critiques = False

    def __init__(self, rewards=None, *, critic="c", fingerprint="f", stop_after=None):
        self.rewards, self.critic, self.fingerprint, self.stop_after = rewards or {}, critic, fingerprint, stop_after
        self.scored = []

    def score(self, pairs, *, max_tokens_per_step, on_progress):
        if self.stop_after is not None and len(self.scored) >= self.stop_after:
            raise KeyboardInterrupt
        self.scored += [item.pair.id for item in pairs]
        on_progress(len(pairs))
        return [Score(item.pair.id, *self.rewards.get(item.pair.id, (1.0, 0.0))) for item in pairs]


@pytest.fixture
def items(pairs):
    return [CritiquedPair(pair=pair, critic="c", chosen_critique="Good.", rejected_critique="Bad.") for pair in pairs]


def _shown(table):
    console = Console(width=200, file=io.StringIO())
    console.print(table)
    return console.file.getvalue()


def test_accuracy_is_strict_by_subset_and_ties_are_apart(items):
    rewards = {"pair-00": (0.0, 1.0), "pair-01": (2.0, 2.0), "pair-02": (math.nan, 1.0)}
    result = evaluate(Scorer(rewards), items)
    overall = result.overall
    assert (overall.n_right, overall.n_wrong, overall.n_tie, overall.n_unscored) == (9, 1, 1, 1)
    assert overall.accuracy.value == pytest.approx(9 / 11)
    assert result.subsets["single-turn"].accuracy.value == pytest.approx(6 / 8)
    assert result.subsets["multi-turn"].accuracy.value == 1.0
    assert (result.model, result.critic, result.headline_value) == ("known", "c", pytest.approx(9 / 11))


def test_critiques_of_another_critic_are_refused_unless_allowed(items):
    scorer = Scorer(critic="other")
    with pytest.raises(CriticMismatch, match="'other'.*'c'.*--allow-other-critic"):
        evaluate(scorer, items)
    assert scorer.scored == []
    assert evaluate(scorer, items, allow_other_critic=True).critic == "c"
    with pytest.raises(CriticMismatch, match="'none'"):
        evaluate(Scorer(), [CritiquedPair(pair=item.pair) for item in items])


def test_a_model_trained_with_critique_dropout_also_scores_without_critiques(items):
    scorer = Scorer()
    scorer.scores_without_critiques = True
    plain = [CritiquedPair(pair=item.pair) for item in items]
    assert evaluate(scorer, plain).critic == "none"
    assert evaluate(scorer, items).critic == "c"


def test_bad_pairs_are_refused_before_anything_is_scored(items):
    scorer = Scorer()
    with pytest.raises(DataError, match="no pairs"):
        evaluate(scorer, [])
    with pytest.raises(DataError, match="one critic"):
        evaluate(scorer, [*items, replace(items[0], critic="d")])
    with pytest.raises(DataError, match="ids must be unique"):
        evaluate(scorer, [*items, items[3]])
    with pytest.raises(DataError, match="no pair is of RewardBench"):
        evaluate(scorer, items, benchmark="rewardbench")
    with pytest.raises(ConfigError, match="no benchmark"):
        evaluate(scorer, items, benchmark="nonsense")
    assert scorer.scored == []


def test_what_is_written_is_read_back(items, tmp_path):
    rewards = {"pair-01": (math.nan, 0.25), "pair-03": (0.1, 0.30000000000000004), "pair-04": (math.inf, 0.0)}
    result = evaluate(Scorer(rewards), items, out=tmp_path)
    assert read_result(tmp_path / "pairs.json") == result
    scores = {score.pair_id: score for score in read_scores(tmp_path / "pairs.scores.jsonl")}
    assert list(scores) == [item.pair.id for item in items]
    assert scores["pair-01"].outcome is Outcome.UNSCORED
    assert (scores["pair-03"].chosen, scores["pair-03"].rejected) == rewards["pair-03"]
    assert scores["pair-04"].outcome is Outcome.RIGHT
    rows = [json.loads(line) for line in (tmp_path / "pairs.scores.jsonl").read_text().splitlines()]
    assert rows[1]["chosen"] is None, "other tools read no NaN"
    assert {(row["pair_id"], row["outcome"]) for row in rows[:2]} == {("pair-00", "right"), ("pair-01", "unscored")}
    assert rows[2]["subset"] == "multi-turn"


def test_rewards_on_disk_are_used_again(items, tmp_path):
    first = evaluate(Scorer({"pair-05": (math.nan, 0.0)}), items, out=tmp_path)
    again = Scorer()
    assert evaluate(again, items[::-1], out=tmp_path).overall == first.overall
    assert again.scored == []


@pytest.mark.parametrize("change", ["model", "critique", "completion"])
def test_whatever_a_reward_depends_on_makes_it_anew(items, tmp_path, change):
    evaluate(Scorer(), items, out=tmp_path)
    scorer = Scorer({"pair-03": (0.0, 1.0)}, fingerprint="g" if change == "model" else "f")
    if change == "critique":
        items[3] = replace(items[3], rejected_critique="Worse.")
    elif change == "completion":
        items[3] = replace(items[3], pair=replace(items[3].pair, chosen="Six."))
    result = evaluate(scorer, items, out=tmp_path)
    assert scorer.scored == ([item.pair.id for item in items] if change == "model" else ["pair-03"])
    assert result.overall.n_wrong == 1
    assert [score.pair_id for score in read_scores(tmp_path / "pairs.scores.jsonl")] == [item.pair.id for item in items]


def test_fewer_pairs_leave_no_rewards_of_the_others(items, tmp_path):
    evaluate(Scorer(), items, out=tmp_path)
    again = Scorer()
    assert evaluate(again, items[:4], out=tmp_path).overall.n_right == 4
    assert again.scored == []
    assert len(read_scores(tmp_path / "pairs.scores.jsonl")) == 4


def test_benchmarks_share_a_folder(items, tmp_path):
    evaluate(Scorer(), items, out=tmp_path)
    evaluate(Scorer(), items, out=tmp_path, benchmark="pandalm")
    assert {path.name for path in tmp_path.iterdir()} == {
        "pairs.json", "pairs.scores.jsonl", "pairs.statistics.json",
        "pandalm.json", "pandalm.scores.jsonl", "pandalm.statistics.json",
    }  # fmt: skip


def test_an_interrupted_run_goes_on_and_never_leaves_an_old_result(items, tmp_path, monkeypatch):
    monkeypatch.setattr(stage, "PAIRS_PER_SAVE", 5)
    evaluate(Scorer(fingerprint="old"), items, out=tmp_path)
    with pytest.raises(KeyboardInterrupt):
        evaluate(Scorer(stop_after=5), items, out=tmp_path)
    assert not (tmp_path / "pairs.json").exists()
    assert len(read_scores(tmp_path / "pairs.scores.jsonl")) == 5
    rest = Scorer()
    assert evaluate(rest, items, out=tmp_path).overall.n_right == 12
    assert rest.scored == [item.pair.id for item in items[5:]]


@pytest.mark.parametrize(
    "damage", [b"", b"{", b'{"pair_id": "pair-00"}\n', b"\xff\xfe\n", b'{"chosen": "x", "rejected": 1}\n']
)
def test_a_damaged_file_of_rewards_is_made_anew_by_evaluate_and_named_by_read_scores(items, tmp_path, damage):
    path = tmp_path / "pairs.scores.jsonl"
    path.write_bytes(damage)
    with pytest.raises(DataError, match=r"pairs\.scores\.jsonl"):
        read_scores(path)
    assert evaluate(Scorer(), items, out=tmp_path).overall.n_right == 12
    assert len(read_scores(path)) == 12


def test_read_result_names_what_is_no_result(tmp_path):
    for text in ("{}", '{"overall": 3}', "[]"):
        (tmp_path / "pairs.json").write_text(text)
        with pytest.raises(DataError, match=r"pairs\.json"):
            read_result(tmp_path / "pairs.json")


@pytest.mark.parametrize("change", ["model", "fewer pairs"])
def test_statistics_and_probes_of_other_rewards_are_removed(items, tmp_path, change):
    evaluate(Scorer(), items, out=tmp_path)
    (tmp_path / "pairs.probe.json").write_text("{}")
    (tmp_path / "pandalm.probe.json").write_text("{}")
    assert stage.score_benchmark(Scorer(), items, out=tmp_path)
    assert (tmp_path / "pairs.statistics.json").exists() and (tmp_path / "pairs.probe.json").exists()
    if change == "model":
        stage.score_benchmark(Scorer(fingerprint="g"), items, out=tmp_path)
    else:
        stage.score_benchmark(Scorer(), items[:4], out=tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"pairs.json", "pairs.scores.jsonl", "pandalm.probe.json"}


def test_a_list_that_lost_a_pair_is_unscored(items):
    items = [replace(item, pair=replace(item.pair, id=f"{n // 3}#{n % 3}")) for n, item in enumerate(items)]
    scorer = Scorer({"1#1": (0.0, 1.0)})
    whole = [item.pair for item in items]
    left = [item for item in items if item.pair.id != "1#1"]
    assert evaluate(scorer, items, benchmark="best-of-n").overall.n_wrong == 1
    found = evaluate(scorer, left, benchmark="best-of-n", whole=whole).overall
    assert (found.n_right, found.n_wrong, found.n_unscored) == (3, 0, 1)
    assert evaluate(scorer, left, whole=whole).overall.n_unscored == 0, "pairs that were dropped are no part of a list"
    scorer.scored.clear()
    with pytest.raises(DataError, match="none of the pairs"):
        evaluate(scorer, items, benchmark="best-of-n", whole=whole[1:])
    assert scorer.scored == []


def test_training_pairs_are_not_tested(items):
    scorer = Scorer()
    with pytest.raises(DataError, match="2 of the 8 test pairs are training pairs, such as 'pair-04'"):
        evaluate(scorer, items[4:], train_items=items[:6])
    assert scorer.scored == []
    assert evaluate(scorer, items[6:], train_items=items[:6]).overall.n_right == 6


def test_a_folder_that_cannot_be_written_is_a_storage_error(items, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError):
        evaluate(Scorer(), items, out=tmp_path / "file" / "out")


def test_a_pair_that_the_model_gives_no_score_is_unscored(items, tmp_path):
    class Forgetful(Scorer):
        def score(self, pairs, **settings):
            return super().score(pairs, **settings)[:-1]

    assert evaluate(Forgetful(), items, out=tmp_path).overall.n_unscored == 1
    assert evaluate(Forgetful(), items).overall.n_unscored == 1


def test_the_table_shows_every_count_and_takes_names_as_text(items):
    items[0] = replace(items[0], pair=replace(items[0].pair, subset="[/red] odd"))
    rewards = {"pair-01": (2.0, 2.0), "pair-03": (math.nan, 1.0)}
    text = " ".join(_shown(result_table(evaluate(Scorer(rewards), items))).split())
    assert "[/red] odd" in text
    assert "0.909 [0.62, 0.98]" in text
    assert "half credit for ties: 0.955" in text
    assert "0.909 accuracy on all pairs" in text
    nothing = evaluate(Scorer({item.pair.id: (math.nan, 0.0) for item in items}), items)
    assert "- accuracy on all pairs" in _shown(result_table(nothing))


# With a real (tiny) reward model.


@pytest.fixture
def model_folder(tiny_model, tmp_path):
    RewardModel.from_backbone(str(tiny_model), Reads(critic="c", max_length=400), seed=3).save(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def files(pairs, tmp_path):
    write_records(tmp_path / "pairs.jsonl", pairs)
    critiques = [
        Critique(key=f"{pair.id}-{side}", pair_id=pair.id, side=side, text=f"{side}!", critic="c", prompt_version="")
        for pair in pairs[:10]
        for side in ("chosen", "rejected")
    ]
    write_records(tmp_path / "critiques.jsonl", critiques)
    return tmp_path


def test_a_real_model_scores_as_it_does_alone_and_is_not_asked_twice(model_folder, items, tmp_path, monkeypatch):
    model = RewardModel.load(model_folder, precision="fp32")
    monkeypatch.setattr(stage, "PAIRS_PER_SAVE", 5)
    result = evaluate(model, items, out=tmp_path / "out")
    for saved, alone in zip(read_scores(tmp_path / "out" / "pairs.scores.jsonl"), model.score(items), strict=True):
        assert (saved.chosen, saved.rejected) == pytest.approx((alone.chosen, alone.rejected), abs=1e-5)
    stamp = (tmp_path / "out" / "pairs.scores.jsonl").stat().st_mtime_ns
    assert evaluate(RewardModel.load(model_folder, precision="fp32"), items, out=tmp_path / "out") == result
    assert (tmp_path / "out" / "pairs.scores.jsonl").stat().st_mtime_ns == stamp


def test_the_command_joins_critiques_and_says_what_it_dropped(model_folder, files, capsys):
    command(str(model_folder), str(files / "pairs.jsonl"), critiques=files / "critiques.jsonl", out=files / "out")
    shown = capsys.readouterr().out
    assert "2 pairs dropped: no critique by c of both sides" in shown
    assert "all pairs" in shown
    assert read_result(files / "out" / "pairs.json").critic == "c"
    assert len(read_scores(files / "out" / "pairs.scores.jsonl")) == 10


def test_the_command_reads_an_arm_of_augment_and_filters_pairs(model_folder, files, pairs, capsys):
    critiques = [replace(row) for row in read_critiques(files / "critiques.jsonl")]
    write_augmented(files / "arms", augment_pairs(pairs, {"c": critiques}))
    command(str(model_folder), str(files / "arms" / "c.jsonl"), out=files / "out")
    assert read_result(files / "out" / "pairs.json").overall.n_unscored == 0
    with pytest.raises(ConfigError, match="give no critiques, critic or filter"):
        command(str(model_folder), str(files / "arms" / "c.jsonl"), split="test")
    command(str(model_folder), str(files / "pairs.jsonl"), critiques=files / "critiques.jsonl", split="test")
    assert "1 pairs dropped" in capsys.readouterr().out


def test_the_command_says_when_texts_are_cut(tiny_model, files, capsys):
    RewardModel.from_backbone(str(tiny_model), Reads(critic="none", max_length=40), seed=3).save(files / "short")
    command(str(files / "short"), str(files / "pairs.jsonl"))
    assert "pairs cut to the model's length: prompt cut" in capsys.readouterr().out


def test_a_cut_by_the_token_that_begins_the_sequence_is_a_cut(tiny_model, items, tmp_path):
    from tokenizers.processors import TemplateProcessing

    def model(max_length):
        made = RewardModel.from_backbone(str(tiny_model), Reads(critic="c", max_length=max_length), seed=3)
        bos = made.tokenizer.bos_token
        made.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, made.tokenizer.bos_token_id)]
        )
        return RewardModel(made.model, made.tokenizer, made.reads, name="m")

    encoded = model(1000).encode(items[0])
    n = len(encoded.prompt) + max(map(len, encoded.branches))
    assert stage._cuts(model(n), items[:1]) == []
    assert stage._cuts(model(n - 1), items[:1]) == ["prompt cut"]


@pytest.mark.parametrize("is_arm", [False, True])
def test_the_command_leaves_a_list_unscored_whose_critique_failed(model_folder, files, pairs, is_arm):
    changed = [replace(pair, id=f"{n // 3}#{n % 3}") for n, pair in enumerate(pairs)]
    write_records(files / "pairs.jsonl", changed)
    names = dict(zip((pair.id for pair in pairs), (pair.id for pair in changed), strict=True))
    critiques = [
        replace(row, pair_id=names[row.pair_id])
        for row in read_critiques(files / "critiques.jsonl")
        if row.pair_id != "pair-04"
    ]
    write_records(files / "critiques.jsonl", critiques)
    if is_arm:
        write_augmented(files / "arms", augment_pairs(changed, {"c": critiques}))
        command(str(model_folder), str(files / "arms" / "c.jsonl"), benchmark="best-of-n", out=files / "out")
    else:
        given = {"critiques": files / "critiques.jsonl", "out": files / "out"}
        command(str(model_folder), str(files / "pairs.jsonl"), benchmark="best-of-n", **given)
    overall = read_result(files / "out" / "best-of-n.json").overall
    assert overall.n_unscored == 2, "pair 04 of the second list, and 10 and 11 of the last, have no critiques"
    assert overall.n_right + overall.n_wrong + overall.n_tie == 2


def test_the_command_refuses_what_does_not_fit(model_folder, files):
    with pytest.raises(CriticMismatch):
        command(str(model_folder), str(files / "pairs.jsonl"))
    with pytest.raises(ConfigError, match="add --critiques"):
        command(str(model_folder), str(files / "pairs.jsonl"), critic="c")
    with pytest.raises(CriticMismatch, match="'d'"):
        command(str(model_folder), str(files / "pairs.jsonl"), critiques=files / "critiques.jsonl", critic="d")
    with pytest.raises(DataError, match="no such file"):
        command(str(model_folder), str(files / "absent.jsonl"))
    with pytest.raises(ConfigError, match="no benchmark"):
        command(str(model_folder), str(files / "absent.jsonl"), benchmark="nonsense")


def test_the_command_probes_and_lays_null_baselines_beside(model_folder, files, pairs, capsys):
    critiques = read_critiques(files / "critiques.jsonl")
    augmented = augment_pairs(pairs, {"c": critiques})
    write_augmented(files / "arms", augmented)
    arm, train, same_prompt = (str(files / "arms" / f"{name}.jsonl") for name in ("c", "train", "same-prompt"))
    write_records(train, [replace(item, pair=_other(item.pair, "Else?")) for item in augmented.arms["c"]])
    write_records(same_prompt, [replace(item, pair=_other(item.pair, "")) for item in augmented.arms["c"]])
    command(str(model_folder), arm, train=train, probe=True, out=files / "out")
    shown = capsys.readouterr().out
    assert "in the training pairs" not in shown
    assert "Does it read the critique?" in shown
    assert "longer completion wins" in shown
    statistics = json.loads((files / "out" / "pairs.statistics.json").read_text())
    assert statistics["groups"]["all"]["baselines"]["c"]["longer completion wins"]["mean"] == 0.0
    probed = json.loads((files / "out" / "pairs.probe.json").read_text())
    assert set(probed["all"]) == {
        "original", "swapped", "shuffled", "removed", "negated", "flattery", "injection",
    }  # fmt: skip
    command(str(model_folder), arm, train=same_prompt)
    assert "c.jsonl are in the training pairs" in " ".join(capsys.readouterr().out.split())
    with pytest.raises(DataError, match=r"c\.jsonl.*10 of the 10 test pairs are training pairs"):
        command(str(model_folder), arm, train=arm)
    with pytest.raises(DataError, match="not an arm"):
        command(str(model_folder), arm, train=str(files / "pairs.jsonl"))
    with pytest.raises(CriticMismatch, match="'none'"):
        command(str(model_folder), arm, train=str(files / "arms" / "none.jsonl"))
    with pytest.raises(ConfigError, match="give the critiques"):
        command(str(model_folder), str(files / "pairs.jsonl"), probe=True)


def test_the_command_asks_the_backbone_and_can_do_without_a_reward_model(tiny_model, files, capsys):
    made = RewardModel.from_backbone(
        str(tiny_model), Reads(critic="c", max_length=400, backbone=str(tiny_model)), seed=3
    )
    made.save(files / "trained")
    pairs, how = str(files / "pairs.jsonl"), {"critiques": files / "critiques.jsonl"}
    command(str(files / "trained"), pairs, **how, out=files / "out")
    nulls = json.loads((files / "out" / "pairs.statistics.json").read_text())["groups"]["all"]["baselines"]["c"]
    assert "untrained, critique alone" in nulls and "untrained, whole text" in nulls
    assert "untrained, whole text" in capsys.readouterr().out
    assert len((files / "out" / "pairs.zero-label.jsonl").read_text().splitlines()) == 20
    for kind, name in (("zero-label", "whole text"), ("zero-label-alone", "critique alone")):
        command(f"{kind}:{tiny_model}", pairs, **how, out=files / kind)
        result = read_result(files / kind / "pairs.json")
        assert (result.model, result.critic) == (f"{kind}:{tiny_model}", "c")
        assert result.overall.accuracy.value == pytest.approx(nulls[f"untrained, {name}"]["mean"])
        assert "No zero-label baseline" not in capsys.readouterr().out
    command(f"zero-label:{tiny_model}", pairs)
    with pytest.raises(ConfigError, match="reads critiques alone"):
        command(f"zero-label-alone:{tiny_model}", pairs)


def test_a_backbone_that_cannot_be_asked_costs_no_evaluation(model_folder, files, capsys):
    pairs, how = str(files / "pairs.jsonl"), {"critiques": files / "critiques.jsonl"}
    command(str(model_folder), pairs, **how)
    assert "No zero-label baseline: name the model's backbone with --backbone" in capsys.readouterr().out
    command(str(model_folder), pairs, **how, backbone=str(model_folder))
    assert "a classifier" in " ".join(capsys.readouterr().out.split())
    command(str(model_folder), pairs, **how, zero_label=False)
    assert "No zero-label" not in capsys.readouterr().out


def _other(pair, prompt):
    """A pair of another id, and of another prompt where one is given."""
    changed = (Message("user", f"{prompt} {pair.id}"),) if prompt else pair.prompt
    return replace(pair, id=f"other-{pair.id}", prompt=changed)


def test_a_benchmark_keeps_empty_and_identical_completions(tiny_model, files, pairs):
    odd = [replace(pairs[0], chosen=""), replace(pairs[1], rejected=pairs[1].chosen)]
    write_records(files / "odd.jsonl", odd)
    RewardModel.from_backbone(str(tiny_model), Reads(max_length=400), seed=3).save(files / "plain")
    with pytest.raises(DataError, match="empty"):
        command(str(files / "plain"), str(files / "odd.jsonl"))
    command(str(files / "plain"), str(files / "odd.jsonl"), benchmark="pandalm", out=files / "out")
    outcomes = [score.outcome for score in read_scores(files / "out" / "pandalm.scores.jsonl")]
    assert outcomes[0] in (Outcome.RIGHT, Outcome.WRONG)
    assert outcomes[1] is Outcome.TIE


def test_rewardbenchs_own_files_lie_beside_the_result(items, tmp_path):
    for n, item in enumerate(items):
        items[n] = replace(item, pair=replace(item.pair, subset="hep-go"))
    evaluate(Scorer(), items, benchmark="rewardbench", out=tmp_path)
    found = json.loads((tmp_path / "rewardbench" / "eval-set" / "known.json").read_text())
    assert found["hep-go"] == 1.0
    scores = json.loads((tmp_path / "rewardbench" / "eval-set-scores" / "known.json").read_text())
    assert scores["results"] == [1] * 12


def test_identical_completions_tie_whatever_the_rounding(items):
    items[0] = replace(items[0], pair=replace(items[0].pair, rejected=items[0].pair.chosen + " "))
    assert evaluate(Scorer({"pair-00": (1.0, 1.0000001)}), items).overall.n_tie == 1


def test_a_killed_command_ends_as_if_it_had_not_been(tiny_model, files, pairs):
    many = [replace(pair, id=f"{pair.id}-{n}") for n in range(6) for pair in pairs]
    write_records(files / "many.jsonl", many)
    RewardModel.from_backbone(str(tiny_model), Reads(max_length=400), seed=3).save(files / "plain")
    code = "import sys; from critrm import cli, evaluate; evaluate.PAIRS_PER_SAVE = 8; cli.main()"
    run = [sys.executable, "-c", code, "evaluate", str(files / "plain"), str(files / "many.jsonl"), "--out"]
    run.append(str(files / "out"))
    env = os.environ | {"OMP_NUM_THREADS": "1"}  # the tiny model gains nothing from threads that wait for each other
    process = subprocess.Popen(run, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=env)
    saved, deadline = files / "out" / "pairs.scores.jsonl", time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None and not saved.exists():
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    before = read_scores(saved)
    assert len(before) % 8 == 0
    subprocess.run(run, check=True, capture_output=True, env=env)
    after = read_scores(saved)
    assert after[: len(before)] == before
    assert [score.pair_id for score in after] == [pair.id for pair in many]
    assert read_result(files / "out" / "pairs.json").overall == tally(score.outcome for score in after)


def test_the_command_evaluates_the_lists_in_rmbs_pairs(tiny_model, data_dir, tmp_path, capsys):
    path = data_dir / "rmb" / "pairwise.jsonl.gz"
    if not path.exists():
        pytest.skip("RMB is not among the real data sets")
    with gzip.open(path, "rt", newline="\n") as file:
        rows = "".join(line for line in itertools.islice(file, 300) if len(line) < 4000)
    (tmp_path / "pairwise.jsonl").write_text("".join(rows.splitlines(keepends=True)[:40]), newline="\n")
    RewardModel.from_backbone(str(tiny_model), Reads(max_length=256), seed=3).save(tmp_path / "model")
    command(str(tmp_path / "model"), str(tmp_path / "pairwise.jsonl"), benchmark="best-of-n", out=tmp_path / "out")
    result = read_result(tmp_path / "out" / "best-of-n.json")
    scores = read_scores(tmp_path / "out" / "best-of-n.scores.jsonl")
    lists = {}
    for score in scores:
        lists.setdefault(score.pair_id.partition("#")[0], []).append(score.chosen > score.rejected)
    overall = result.overall
    assert 1 < len(lists) == overall.n_right + overall.n_wrong + overall.n_tie
    assert overall.n_right == sum(all(beaten) for beaten in lists.values())
    assert all(len(beaten) > 1 for beaten in lists.values())
    assert "Best of n" in capsys.readouterr().out
