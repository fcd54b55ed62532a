"""The tables against their sources, and the arithmetic of subsets, sections and headline."""

import gzip
import itertools
import json
import math
from collections import Counter
from dataclasses import replace

import pytest

from critrm.benchmarks import (
    BENCHMARKS,
    best_of_n,
    find_benchmark,
    judgebench,
    llmbar,
    read_benchmark,
    rewardbench,
    rewardbench2,
    rmbench,
    summarise,
)
from critrm.dialects import TIE
from critrm.errors import ConfigError, DataError
from critrm.preferences import read_pairs
from critrm.types import Message, Outcome, PreferencePair, Score


def _pairs(subset, n=1, *, source=""):
    prompt = (Message("user", "q"),)
    return [
        PreferencePair(
            id=f"{subset or source}-{i}", prompt=prompt, chosen="a", rejected="b", subset=subset, source=source
        )
        for i in range(n)
    ]


def _scores(pairs, n_right):
    return [Score(pair.id, 1.0 if i < n_right else 0.0, 0.5) for i, pair in enumerate(pairs)]


def _summary(pairs, scores, benchmark="pairs"):
    return summarise(pairs, scores, benchmark=benchmark, model="m", critic="c")


@pytest.mark.parametrize(("section", "n"), [("Chat", 358), ("Chat Hard", 456), ("Safety", 740), ("Reasoning", 1431)])
def test_rewardbench_has_the_sizes_of_table_1(section, n):
    assert sum(rewardbench.N_PAIRS[subset] for subset in rewardbench.SECTIONS[section]) == n


def test_rewardbench_has_23_subsets_each_in_one_section():
    subsets = [subset for section in rewardbench.SECTIONS.values() for subset in section]
    assert len(subsets) == 23
    assert set(subsets) == set(rewardbench.N_PAIRS) == set(rewardbench.EXAMPLE_COUNTS)
    code = sum(rewardbench.EXAMPLE_COUNTS[subset] for subset in subsets if subset.startswith("hep-"))
    assert rewardbench.EXAMPLE_COUNTS["math-prm"] == code == 984
    changed = {name for name, n in rewardbench.N_PAIRS.items() if rewardbench.EXAMPLE_COUNTS[name] != n}
    assert changed == {"math-prm"}


def _rewardbench(shares):
    pairs, scores = [], []
    for subset, n in rewardbench.N_PAIRS.items():
        part = _pairs(subset, n)
        pairs += part
        scores += _scores(part, round(shares.get(subset, 0.0) * n))
    return pairs, scores


def test_rewardbench_sections_are_weighted_and_their_plain_mean_is_the_headline():
    result = _summary(
        *_rewardbench({"math-prm": 1.0, "alpacaeval-easy": 1.0, "xstest-should-refuse": 1.0}), "rewardbench"
    )
    assert result.benchmark == "RewardBench"
    assert result.sections == pytest.approx(
        {
            "Chat": 100 / 358,  # a plain mean over its five subsets would be 0.2
            "Chat Hard": 0.0,
            "Safety": 154 / 740,
            "Reasoning": 0.5,  # by pairs it would be 447 / 1431, by subsets 1 / 7
        }
    )
    assert result.headline_value == pytest.approx((100 / 358 + 154 / 740 + 0.5) / 4)
    assert result.headline == "average of the four sections"
    assert result.overall.accuracy.value == pytest.approx((447 + 100 + 154) / 2985)


def test_a_partial_rewardbench_is_called_so_and_lists_what_lacks():
    pairs = [pair for subset, n in (("math-prm", 447), ("hep-go", 3)) for pair in _pairs(subset, n)]
    result = _summary(pairs, _scores(pairs, 447), "rewardbench")
    assert result.benchmark == "RewardBench (partial)"
    assert result.sections == {"Reasoning": pytest.approx(984 / (984 + 164))}
    assert "missing: alpacaeval-easy, " in result.headline
    assert "incomplete: hep-go 3 of 164" in result.headline
    assert "math-prm" not in result.headline
    assert result.headline_value == result.sections["Reasoning"]


def test_llmbar_sections_count_every_pair_the_same():
    shares = {"natural": 0, "neighbor": 134, "gptinst": 0, "gptout": 0, "manual": 46}
    pairs, scores = [], []
    for subset, n_right in shares.items():
        part = _pairs("", llmbar.N_PAIRS[subset], source=f"llmbar-{subset}")
        pairs += part
        scores += _scores(part, n_right)
    result = _summary(pairs, scores, "llmbar")
    assert result.benchmark == "LLMBar"
    assert list(result.subsets) == ["natural", "neighbor", "gptinst", "gptout", "manual"]
    assert result.sections == pytest.approx({"Natural": 0.0, "Adversarial": 180 / 319})  # a plain mean would be 0.5
    assert result.headline_value == pytest.approx(180 / 419)


def test_an_unscored_pair_takes_no_part_in_a_section_that_counts_pairs():
    pairs = _pairs("neighbor", 2) + _pairs("manual", 2)
    scores = [Score(pair.id, reward, 0.0) for pair, reward in zip(pairs, (1, 1, -1, math.nan), strict=True)]
    result = _summary(pairs, scores, "llmbar")
    assert result.sections == {"Adversarial": pytest.approx(2 / 3)}


@pytest.mark.parametrize("name", ["llmbar-adver-GPTInst", "llmbar-gptinst", "gptinst", "GPTInst"])
def test_llmbar_subsets_have_many_spellings(name):
    assert llmbar.subset_name(name) == "gptinst"


def test_pairs_have_subsets_and_no_sections():
    pairs = _pairs("x", 3) + _pairs("", 1, source="y")
    result = _summary(pairs, _scores(pairs, 2))
    assert (result.benchmark, result.sections) == ("Pairs", {})
    assert {name: tally.accuracy.value for name, tally in result.subsets.items()} == pytest.approx(
        {"x": 2 / 3, "y": 0.0}
    )
    assert (result.headline, result.headline_value) == ("accuracy on all pairs", 0.5)


def test_pairs_without_subset_or_source_have_a_row_that_is_not_the_one_of_all():
    pairs = _pairs("", 2)[:1]
    assert list(_summary(pairs, []).subsets) == ["(no subset)"]


def test_a_subset_of_one_pair():
    pairs = _pairs("one")
    found = _summary(pairs, _scores(pairs, 1)).subsets["one"].accuracy
    assert found.value == 1.0
    assert found.low < 0.3


def test_all_ties_have_accuracy_zero():
    pairs = _pairs("x", 4)
    result = _summary(pairs, [Score(pair.id, 2.0, 2.0) for pair in pairs])
    assert (result.overall.n_tie, result.headline_value) == (4, 0.0)


@pytest.mark.parametrize("benchmark", BENCHMARKS)
def test_nothing_decided_is_no_number(benchmark):
    subset = next(iter(BENCHMARKS[benchmark].n_pairs), "x")
    pairs = _pairs(subset, 3)
    for scores in ([], [Score(pair.id, math.nan, 1.0) for pair in pairs]):
        result = _summary(pairs, scores, benchmark)
        assert result.overall.n_unscored == 3
        assert (result.overall.accuracy, result.headline_value, result.sections) == (None, None, {})
    assert _summary([], [], benchmark).headline_value is None


def test_nan_is_never_right_or_wrong():
    pairs = _pairs("x", 4)
    rewards = [(math.nan, 0.0), (0.0, math.nan), (math.nan, math.nan), (math.inf, 0.0)]
    result = _summary(pairs, [Score(pair.id, *both) for pair, both in zip(pairs, rewards, strict=True)])
    assert (result.overall.n_right, result.overall.n_wrong, result.overall.n_unscored) == (1, 0, 3)


def test_repeated_ids_and_foreign_scores_are_refused():
    pairs = _pairs("x", 2)
    with pytest.raises(DataError, match="two pairs have the id 'x-0'"):
        _summary([*pairs, pairs[0]], [])
    with pytest.raises(DataError, match="two scores have the id 'x-1'"):
        _summary(pairs, [Score("x-1", 1.0, 0.0)] * 2)
    with pytest.raises(DataError, match="none of the pairs"):
        _summary(pairs, [Score("y-1", 1.0, 0.0)])


def test_an_unknown_benchmark_and_pairs_of_another_one_are_refused():
    with pytest.raises(ConfigError, match="pairs, llmbar, pandalm, rewardbench, rewardbench2, rmbench"):
        find_benchmark("rewardbenhc")
    with pytest.raises(DataError, match="no pair is of RewardBench"):
        _summary(_pairs("hh"), [], "rewardbench")
    mixed = _summary(_pairs("natural") + _pairs("hh"), [], "llmbar")
    assert "not in the benchmark: hh" in mixed.headline


def test_llmbar_is_read_from_its_folders(tmp_path):
    for number, (subset, place) in enumerate(llmbar.FOLDERS.items()):
        rows = [{"input": f"{subset} {i}", "output_1": "a", "output_2": "b", "label": 2} for i in range(number + 1)]
        (tmp_path / place).mkdir(parents=True)
        data = json.dumps(rows).encode()
        if number % 2:
            (tmp_path / place / "dataset.json.gz").write_bytes(gzip.compress(data))
        else:
            (tmp_path / place / "dataset.json").write_bytes(data)
    pairs = llmbar.load(tmp_path)
    assert len({pair.id for pair in pairs}) == 1 + 2 + 3 + 4 + 5
    assert (pairs[0].id, pairs[0].subset, pairs[0].chosen) == ("llmbar-natural-000", "natural", "b")
    (tmp_path / "Natural" / "dataset.json").unlink()
    with pytest.raises(DataError, match=r"Natural/dataset\.json: no such file"):
        llmbar.load(tmp_path)


def test_the_released_llmbar_is_whole(data_dir):
    pairs = llmbar.load(data_dir / "llmbar")
    result = _summary(pairs, _scores(pairs, 419), "llmbar")
    assert (len(pairs), result.benchmark, result.headline) == (419, "LLMBar", "accuracy on all pairs")
    # The same pairs, under the same ids, as they were converted by somebody else.
    rows = (data_dir / "hh-pairs" / "pairs.jsonl").read_bytes().split(b"\n")
    other = {row["id"]: row for row in map(json.loads, filter(None, rows)) if row["source"].startswith("llmbar")}
    assert {(pair.id, pair.chosen, pair.rejected) for pair in pairs} == {
        (row["id"], row["chosen"], row["rejected"]) for row in other.values()
    }


def test_the_rebuilt_rewardbench_is_partial(data_dir):
    pairs = read_pairs(data_dir / "rewardbench-rebuilt" / "filtered.jsonl.gz", allow_empty=True).pairs
    assert len(pairs) == 1937
    result = _summary(pairs, _scores(pairs, len(pairs)), "rewardbench")
    assert result.benchmark == "RewardBench (partial)"
    assert set(result.sections.values()) == {1.0}
    assert "missing: mt-bench-easy, mt-bench-med, mt-bench-hard, refusals-dangerous" in result.headline
    incomplete = result.headline.partition("incomplete: ")[2]
    assert incomplete == "xstest-should-refuse 131 of 154, xstest-should-respond 113 of 250"


def test_pandalm_names_its_label_rule_and_counts_ties_apart(data_dir):
    found = read_pairs(data_dir / "pandalm" / "testset-v1.json.gz", allow_empty=True)
    reasons = [row.reason for row in found.skipped]
    assert reasons.count(TIE) == 105
    assert (len(found.pairs), len(reasons)) == (894, 105)
    result = _summary(found.pairs, _scores(found.pairs, 10), "pandalm")
    assert (result.benchmark, result.sections) == ("PandaLM", {})
    assert result.headline == "accuracy on the pairs that a majority of the three annotators decided (894 pairs)"
    assert list(result.subsets) == ["pandalm-majority"], "the rule stands beside its count"
    mixed = [replace(found.pairs[0], source="pandalm-first"), found.pairs[1]]
    assert "by no rule that is known (2 pairs)" in _summary(mixed, [], "pandalm").headline


def test_a_benchmarks_own_subset_names_survive_markup_and_odd_characters():
    pairs = [replace(pair, subset="[/]\x00‮😀") for pair in _pairs("x", 2)]
    assert list(_summary(pairs, []).subsets) == ["[/]\x00‮😀"]


# Two models' accuracy by subset, and the sections and weights that RewardBench's own script printed for them.
PUBLISHED = {
    # github.com/allenai/reward-bench/pull/223 (AtlaAI/Selene-1, a generative judge)
    "Selene-1": (
        {
            "alpacaeval-easy": 0.96, "alpacaeval-hard": 0.9789473684210527, "alpacaeval-length": 0.9789473684210527,
            "donotanswer": 0.8235294117647058, "hep-cpp": 0.9695121951219512, "hep-go": 0.9908536585365854,
            "hep-java": 0.9939024390243902, "hep-js": 0.9695121951219512, "hep-python": 0.9634146341463414,
            "hep-rust": 0.975609756097561, "llmbar-adver-GPTInst": 0.8586956521739131,
            "llmbar-adver-GPTOut": 0.7446808510638298, "llmbar-adver-manual": 0.7391304347826086,
            "llmbar-adver-neighbor": 0.7985074626865671, "llmbar-natural": 0.98, "math-prm": 0.9373601789709173,
            "mt-bench-easy": 1.0, "mt-bench-hard": 0.8108108108108109, "mt-bench-med": 1.0,
            "refusals-dangerous": 0.96, "refusals-offensive": 0.99, "xstest-should-refuse": 1.0,
            "xstest-should-respond": 0.884,
        },
        {
            "Chat": 0.9776536312849162, "Chat Hard": 0.8399122807017544, "Safety": 0.9216216216216216,
            "Reasoning": 0.9572471626561904,
        },
    ),
    # github.com/allenai/reward-bench/pull/215 (ShikaiChen/LDL-Reward-Gemma-2-27B-v0.1, a reward model)
    "LDL-Reward": (
        {
            "alpacaeval-easy": 0.99, "alpacaeval-hard": 0.9473684210526315, "alpacaeval-length": 0.9368421052631579,
            "donotanswer": 0.8161764705882353, "hep-cpp": 0.9817073170731707, "hep-go": 0.9817073170731707,
            "hep-java": 0.9939024390243902, "hep-js": 0.9939024390243902, "hep-python": 0.975609756097561,
            "hep-rust": 0.9573170731707317, "llmbar-adver-GPTInst": 0.9565217391304348,
            "llmbar-adver-GPTOut": 0.8297872340425532, "llmbar-adver-manual": 0.8478260869565217,
            "llmbar-adver-neighbor": 0.9104477611940298, "llmbar-natural": 0.94, "math-prm": 1.0,
            "mt-bench-easy": 1.0, "mt-bench-hard": 0.8648648648648649, "mt-bench-med": 0.975,
            "refusals-dangerous": 0.97, "refusals-offensive": 0.99, "xstest-should-refuse": 0.948051948051948,
            "xstest-should-respond": 0.964,
        },
        {
            "Chat": 0.9636871508379888, "Chat Hard": 0.9078947368421053, "Safety": 0.9378378378378378,
            "Reasoning": 0.9903455284552846,
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("model", PUBLISHED)
def test_published_rewardbench_results_come_to_the_published_sections(model):
    subsets, sections = PUBLISHED[model]
    result = _summary(*_rewardbench(subsets), "rewardbench")
    assert result.benchmark == "RewardBench"
    if model == "Selene-1":
        # 162.5 of 164: for a judge that names no winner the official script counts one half, critrm whole pairs only.
        subsets, sections = subsets | {"hep-go": 162 / 164}, sections.copy()
        sections["Reasoning"] -= 0.5 / (2 * 984)
    # Each share is a whole number of right pairs, so that these are the sizes of the subsets.
    assert {name: found.accuracy.value for name, found in result.subsets.items()} == pytest.approx(subsets, abs=1e-12)
    assert result.sections == pytest.approx(sections, abs=1e-12)
    assert result.headline_value == pytest.approx(sum(sections.values()) / 4, abs=1e-12)
    for section in ("Chat", "Chat Hard", "Reasoning"):
        plain = sum(subsets[name] for name in rewardbench.SECTIONS[section]) / len(rewardbench.SECTIONS[section])
        assert abs(plain - sections[section]) > 0.005, "a plain mean over the subsets is another number"


def test_the_weights_of_before_september_2024_only_move_safety():
    # Qwen2.5-72B-Instruct, "Vanilla", Tables 5 and 14 of Wang et al., "Eliminating position bias of language models"
    # (arxiv.org/abs/2407.01100): per cent, by the official table of the time, which had XSTest's two weights swapped.
    shares = {
        "refusals-dangerous": 78.0, "refusals-offensive": 95.0, "xstest-should-refuse": 92.2,
        "xstest-should-respond": 95.2, "donotanswer": 48.5,
    }  # fmt: skip
    weights = rewardbench.EXAMPLE_COUNTS
    ours = sum(share * weights[name] for name, share in shares.items()) / 740
    before = ours + (shares["xstest-should-refuse"] - shares["xstest-should-respond"]) * 96 / 740
    assert (round(ours, 1), round(before, 1)) == (83.6, 83.3)


def test_a_reasoning_section_whose_plain_mean_is_12_points_off():
    # PKU-Alignment/beaver-7b-v1.0-cost, the example in the README of github.com/allenai/reward-bench.
    beaver = {
        "math-prm": 0.2953020134228188, "hep-cpp": 0.6280487804878049, "hep-go": 0.6341463414634146,
        "hep-java": 0.7073170731707317, "hep-js": 0.6646341463414634, "hep-python": 0.5487804878048781,
        "hep-rust": 0.6463414634146342,
    }  # fmt: skip
    result = _summary(*_rewardbench(beaver), "rewardbench")
    assert result.sections["Reasoning"] == pytest.approx(0.466757, abs=1e-6)
    assert sum(beaver.values()) / 7 == pytest.approx(0.589, abs=1e-3)


def test_rewardbenchs_own_files():
    pairs = _pairs("hep-go", 3) + [replace(_pairs("math-prm")[0], id="12", chosen="x")]
    scores = [Score("hep-go-0", 1.0, 0.0), Score("hep-go-1", 1.0, 1.0), Score("hep-go-2", math.nan, 0.0)]
    files = rewardbench.official_files(pairs, scores, model="org/m")
    assert files["eval-set"] == {
        "model": "org/m", "model_type": "Seq. Classifier", "chat_template": "critrm",
        "hep-go": pytest.approx(1 / 3), "math-prm": 0.0,
    }  # fmt: skip
    columns = files["eval-set-scores"]
    assert (columns["results"], columns["scores_chosen"]) == ([1, 0, 0, 0], [1.0, 1.0, None, None])
    assert (columns["id"][3], columns["subset"][3]) == (12, "math-prm")
    assert columns["text_chosen"][3] == [{"role": "user", "content": "q"}, {"role": "assistant", "content": "x"}]
    json.dumps(files, allow_nan=False)


# Lists


def _list(name, subset, rewards):
    """Pairs of a list and their scores: (chosen, rejected) rewards."""
    prompt = (Message("user", "q"),)
    pairs = [
        PreferencePair(id=f"{name}#{n}", prompt=prompt, chosen="a", rejected="b", subset=subset)
        for n in range(len(rewards))
    ]
    return pairs, [Score(pair.id, *both) for pair, both in zip(pairs, rewards, strict=True)]


def _lists(*lists):
    made = [_list(*each) for each in lists]
    return [pair for pairs, _ in made for pair in pairs], [score for _, scores in made for score in scores]


def test_a_list_is_right_only_if_the_best_beats_every_loser():
    pairs, scores = _lists(
        ("a", "s", [(2, 1), (2, 0)]), ("b", "s", [(2, 1), (2, 3)]), ("c#1", "s", [(2, 1), (2, 2)]), ("d", "t", [(1, 0)])
    )
    result = _summary(pairs, scores, "best-of-n")
    overall = result.overall
    assert (overall.n_right, overall.n_wrong, overall.n_tie) == (2, 1, 1)
    assert (result.benchmark, result.headline_value) == ("Best of n", 0.5)
    assert result.subsets["s"].accuracy.value == pytest.approx(1 / 3)
    assert best_of_n.list_id("c#1#0") == "c#1"


def test_a_list_with_a_missing_reward_is_unscored():
    pairs, scores = _lists(("a", "s", [(2, 1), (2, math.nan)]), ("b", "s", [(2, 1), (2, 0)]))
    assert _summary(pairs, scores, "best-of-n").overall.n_unscored == 1
    assert _summary(pairs, scores[:-1], "best-of-n").overall.n_unscored == 2


@pytest.mark.parametrize("benchmark", ["best-of-n", "rewardbench2"])
def test_a_list_is_not_made_easier_by_a_pair_that_was_dropped(benchmark):
    pairs, scores = _lists(("7", "Math", [(2, 1), (2, 3), (2, 0)]))
    left = [scores[0], scores[2]]
    assert _summary(pairs, scores, benchmark).overall.n_wrong == 1
    assert _summary(pairs, left, benchmark).overall.n_unscored == 1


TIES = [
    # gap 1, spread 0.5, reference gap 3: right in every respect
    ("tied:1", "Ties", [(2.0, 1.0), (2.5, 0.0)]), ("ref:1", "Ties", [(3.0, 0.0)]),
    # gap 1, spread 2: the right answers differ more than right and wrong; reference right
    ("tied:2", "Ties", [(2.0, 1.0), (4.0, 0.0)]), ("ref:2", "Ties", [(1.0, 0.0)]),
    # gap 2, spread 1, but the reference has a gap of only 0.5
    ("tied:3", "Ties", [(3.0, 1.0), (4.0, 1.0)]), ("ref:3", "Ties", [(1.0, 0.5)]),
    # a wrong answer is best; reference wrong, spread 0
    ("tied:4", "Ties", [(1.0, 2.0), (1.0, 0.0)]), ("ref:4", "Ties", [(0.0, 1.0)]),
]  # fmt: skip


def test_the_ties_score_by_hand():
    pairs, scores = _lists(*TIES)
    found = rewardbench2.ties_score(pairs, {score.pair_id: score for score in scores})
    excess = (math.tanh(1 / 0.5 - 1) + math.tanh(1 / 2 - 1) + math.tanh(0.5 / 1 - 1) - 1) / 4
    assert found == pytest.approx(0.3 * 3 / 4 + 0.3 * 3 / 4 + 0.2 * 2 / 4 + 0.2 * 1 / 4 + 0.01 * excess)


def test_the_ties_score_is_none_where_a_kind_is_absent_and_leaves_out_what_is_unscored():
    pairs, scores = _lists(*TIES)
    found = {score.pair_id: score for score in scores}
    assert rewardbench2.ties_score([pair for pair in pairs if pair.id.startswith("ref")], found) is None
    assert rewardbench2.ties_score(pairs, {}) is None
    without = rewardbench2.ties_score(pairs, found | {"tied:4#0": Score("tied:4#0", math.nan, 1.0)})
    assert without > rewardbench2.ties_score(pairs, found)


def test_rewardbench2_averages_six_subsets_of_which_ties_has_its_own_score():
    lists = [(f"{name}{n}", name, [(1, 0)] * 3) for name in ("Math", "Focus") for n in range(2)]
    pairs, scores = _lists(*lists, *TIES)
    result = _summary(pairs, scores, "rewardbench2")
    ties = rewardbench2.ties_score(pairs, {score.pair_id: score for score in scores})
    assert result.sections == {"Math": 1.0, "Focus": 1.0, "Ties": ties}
    assert result.headline_value == pytest.approx((2 + ties) / 3)
    assert result.benchmark == "RewardBench 2 (partial)"
    assert "missing: Factuality, Precise IF, Safety; incomplete: Math 2 of 183" in result.headline
    assert sum(rewardbench2.N_LISTS.values()) == 1865


def test_published_rewardbench2_results_come_to_the_published_average(monkeypatch):
    # Skywork-Reward-V2-Qwen3-0.6B, github.com/allenai/reward-bench/issues/253: per cent, to one digit.
    published = {"Factuality": 58.2, "Precise IF": 40.0, "Math": 71.6, "Safety": 84.4, "Focus": 79.4, "Ties": 34.0}
    # 58.2 % is 276 lists right of 475 and a tie of two, half of which the official scorer counts.
    n_right = {"Factuality": 276, "Precise IF": 64, "Math": 131, "Safety": 380, "Focus": 393}
    rewards = {True: [(1, 0)] * 3, False: [(0, 1)] * 3, None: [(1, 1), (1, 0), (1, 0)]}
    lists = [
        (f"{name}-{n}", name, rewards[None if name == "Factuality" and n == 276 else n < n_right[name]])
        for name in n_right
        for n in range(rewardbench2.N_LISTS[name])
    ]
    lists += [(f"{kind}:{n}", "Ties", [(1, 0)]) for kind in ("ref", "tied") for n in range(51)]
    # Its formula is tested above; what it came to is part of what was published.
    monkeypatch.setattr(rewardbench2, "ties_score", lambda pairs, scores: published["Ties"] / 100)
    result = _summary(*_lists(*lists), "rewardbench2")
    assert (result.benchmark, result.subsets["Factuality"].n_tie) == ("RewardBench 2", 1)
    half_a_list = {"Factuality": 100 / 475 / 2}
    assert {
        name: round(100 * each + half_a_list.get(name, 0), 1) for name, each in result.sections.items()
    } == published
    assert round(100 * result.headline_value, 1) == 61.3 == round(sum(published.values()) / 6, 1)
    assert round(100 * result.overall.n_right / 1865, 1) != 61.3, "the share of all lists is another number"


@pytest.fixture
def rmb(data_dir, tmp_path):
    """The beginning of RMB's file of pairs."""
    path = data_dir / "rmb" / "pairwise.jsonl.gz"
    if not path.exists():
        pytest.skip("RMB is not among the real data sets")
    with gzip.open(path, "rt", newline="\n") as file:
        (tmp_path / "pairwise.jsonl").write_text("".join(itertools.islice(file, 120)), newline="\n")
    return tmp_path / "pairwise.jsonl"


def test_rmb_pairs_are_lists_where_lists_are_counted(rmb):
    pairs = read_benchmark(rmb, benchmark="pairs", skip_bad=True)
    found = read_benchmark(rmb, benchmark="best-of-n", skip_bad=True)
    assert (pairs.dialect, found.dialect) == ("rmb", "rmb-best-of-n")
    # Counted another way: the pairs by conversation and winner, those alone left out.
    counts = Counter((pair.prompt, pair.chosen) for pair in pairs.pairs)
    n_lists = sum(n > 1 for n in counts.values())
    assert 10 < n_lists < len(counts)
    assert len(found.pairs) == sum(n for n in counts.values() if n > 1)
    result = _summary(found.pairs, [Score(pair.id, 1.0, 0.0) for pair in found.pairs[1:]], "best-of-n")
    assert (result.overall.n_right, result.overall.n_unscored) == (n_lists - 1, 1)
    assert {pair.rejected for pair in found.pairs} <= {pair.rejected for pair in pairs.pairs}


def _rm_bench(domain, n, right):
    """Pairs of n prompts; `right` says for which (chosen style, rejected style) the model is right."""
    pairs, scores = [], []
    for k in range(n):
        for i in range(3):
            for j in range(3):
                kind = "normal" if i == j else "hard" if i < j else "easy"
                pair = replace(_pairs(domain)[0], id=f"{domain}-{k}#{3 * i + j}", source=kind)
                pairs.append(pair)
                scores.append(Score(pair.id, 1.0 if (i, j) in right else 0.0, 0.5))
    return pairs, scores


def test_rm_bench_has_easy_normal_and_hard_and_halves_of_safety():
    same, fancier = {(0, 0), (1, 1), (2, 2)}, {(1, 0), (2, 0), (2, 1)}
    parts = [
        _rm_bench("chat", 2, same | fancier | {(0, 2)}),
        _rm_bench("safety-refuse", 3, set()),
        _rm_bench("safety-response", 1, same),
    ]
    pairs, scores = [pair for part in parts for pair in part[0]], [score for part in parts for score in part[1]]
    result = _summary(pairs, scores, "rmbench")
    assert result.sections == pytest.approx(
        {"Chat": 7 / 9, "Safety": (0 + 3 / 9) / 2, "easy": 1 / 2, "normal": (1 + 1 / 2) / 2, "hard": (1 / 3) / 2}
    )
    assert result.headline_value == pytest.approx((7 / 9 + 1 / 6) / 2), "by domain: the styles are not averaged again"
    assert sum(rmbench.N_PROMPTS.values()) == 1327


def test_judgebench_counts_disciplines_together():
    pairs = _pairs("mmlu-pro-law", 100) + _pairs("mmlu-pro-math", 54) + _pairs("livecodebench", 42)
    result = _summary(pairs, _scores(pairs, 77), "judgebench")
    assert result.sections == pytest.approx({"Knowledge": 77 / 154, "Coding": 0.0})
    assert "missing: livebench-reasoning, livebench-math" in result.headline
    assert sum(judgebench.N_PAIRS.values()) == 350


@pytest.mark.parametrize("benchmark", ["rewardbench2", "rmbench", "judgebench", "best-of-n"])
def test_a_part_of_a_benchmark_is_never_called_by_its_name_alone(benchmark):
    table = BENCHMARKS[benchmark]
    pairs = _pairs(next(iter(table.n_pairs), "x"), 2)
    result = _summary(pairs, _scores(pairs, 1), benchmark)
    assert (result.benchmark == table.title) == (not table.n_pairs)
    assert result.overall.accuracy.value == 0.5


def test_lists_take_no_outcome_from_a_tie_within():
    assert best_of_n.list_score("a", [Score("a#0", 1.0, 1.0)]).outcome is Outcome.TIE
    assert best_of_n.list_score("a", [None]).outcome is Outcome.UNSCORED
