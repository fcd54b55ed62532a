"""The tables against their sources, and the arithmetic of subsets, sections and headline."""

import gzip
import json
import math
from dataclasses import replace

import pytest

from critrm.benchmarks import BENCHMARKS, find_benchmark, llmbar, rewardbench, summarise
from critrm.dialects import TIE
from critrm.errors import ConfigError, DataError
from critrm.preferences import read_pairs
from critrm.types import Message, PreferencePair, Score


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
    assert changed == {"math-prm", "xstest-should-refuse", "xstest-should-respond"}


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
            "Safety": 250 / 740,
            "Reasoning": 0.5,  # by pairs it would be 447 / 1431, by subsets 1 / 7
        }
    )
    assert result.headline_value == pytest.approx((100 / 358 + 250 / 740 + 0.5) / 4)
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


def test_pairs_without_subset_or_source_are_all():
    pairs = _pairs("", 2)[:1]
    assert list(_summary(pairs, []).subsets) == ["all"]


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
    with pytest.raises(ConfigError, match="pairs, llmbar, pandalm, rewardbench"):
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
    pairs = read_pairs(data_dir / "rewardbench-rebuilt" / "filtered.jsonl.gz", skip_bad=True).pairs
    result = _summary(pairs, _scores(pairs, len(pairs)), "rewardbench")
    assert result.benchmark == "RewardBench (partial)"
    assert set(result.sections.values()) == {1.0}
    assert "missing: mt-bench-easy, mt-bench-med, mt-bench-hard, refusals-dangerous" in result.headline
    # Two of its rows have equal completions: skipped, and so the subset counts as incomplete.
    incomplete = result.headline.partition("incomplete: ")[2]
    assert incomplete == "alpacaeval-hard 93 of 95, xstest-should-refuse 131 of 154, xstest-should-respond 113 of 250"


def test_pandalm_names_its_label_rule_and_counts_ties_apart(data_dir):
    found = read_pairs(data_dir / "pandalm" / "testset-v1.json.gz", skip_bad=True)
    reasons = [row.reason for row in found.skipped]
    assert reasons.count(TIE) == 105
    assert len(found.pairs) + len(reasons) == 999
    assert len(found.pairs) <= 894
    result = _summary(found.pairs, _scores(found.pairs, 10), "pandalm")
    assert (result.benchmark, result.sections) == ("PandaLM", {})
    assert "majority of the three annotators" in result.headline


def test_a_benchmarks_own_subset_names_survive_markup_and_odd_characters():
    pairs = [replace(pair, subset="[/]\x00‮😀") for pair in _pairs("x", 2)]
    assert list(_summary(pairs, []).subsets) == ["[/]\x00‮😀"]
