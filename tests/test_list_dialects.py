"""Rows that hold lists of completions: which pairs they become, and what is refused."""

import pytest

from critrm.errors import DataError
from critrm.list_dialects import LIST_DIALECTS, RMB_LISTS, style_match
from critrm.preferences import read_pairs
from critrm.store import write_records

RM_BENCH = {"id": 8, "prompt": "Q", "domain": "chat", "chosen": ["c0", "c1", "c2"], "rejected": ["r0", "r1", "r2"]}
TIES = {
    "id": "tied:3", "prompt": "Q", "subset": "Ties", "num_correct": 2, "total_completions": 5,
    "chosen": ["c0", "c1"], "rejected": ["r0", "r1", "r2"],
}  # fmt: skip
RMB = {
    "bon_uid": "u", "conversation_input": [{"role": "user", "content": "Q"}], "category_path": "BoN_set/x",
    "bon_best": {"llm_name": "m", "answer": "c0"}, "loser_list": [{"answer": "r0"}, {"answer": "r1"}],
}  # fmt: skip
ROWS = {"rm-bench": RM_BENCH, "best-of-n": TIES, "rmb-best-of-n": RMB}


def _read(tmp_path, *rows, **options):
    write_records(tmp_path / "rows.jsonl", rows)
    return read_pairs(tmp_path / "rows.jsonl", **options)


def _shown(pairs):
    return [(pair.id, pair.chosen, pair.rejected) for pair in pairs]


@pytest.mark.parametrize("dialect", LIST_DIALECTS)
def test_each_is_told_by_its_columns(tmp_path, dialect):
    found = _read(tmp_path, ROWS[dialect])
    assert found.dialect == dialect
    assert all(pair.prompt[-1].content == "Q" for pair in found.pairs)


def test_rm_bench_is_nine_pairs_by_style(tmp_path):
    pairs = _read(tmp_path, RM_BENCH).pairs
    assert len(pairs) == 9
    assert _shown(pairs)[5] == ("chat-8#5", "c1", "r2")
    assert [pair.source for pair in pairs] == [
        "normal", "hard", "hard", "easy", "normal", "hard", "easy", "easy", "normal",
    ]  # fmt: skip
    assert style_match(2, 0) == "easy"


def test_rm_benchs_released_files_name_the_source_and_number_their_rows_each_on_their_own(tmp_path):
    released = {name: value for name, value in RM_BENCH.items() if name != "domain"}
    found = _read(tmp_path, released | {"subset": "alpacaeval"}, released | {"subset": "bigcode/humanevalpack"})
    assert {pair.subset for pair in found.pairs} == {"chat", "code"}
    assert len({pair.id for pair in found.pairs}) == 18


def test_lists_of_three_and_three_are_rm_bench_only_by_its_domains(tmp_path):
    own = {"prompt": "Q", "subset": "mine", "chosen": ["c0", "c1", "c2"], "rejected": ["r0", "r1", "r2"]}
    found = _read(tmp_path, own, own)
    assert found.dialect == "best-of-n"
    assert [pair.id for pair in found.pairs] == [f"rows-0000{row}#{n}" for row in (1, 2) for n in range(3)]
    assert _read(tmp_path, own | {"domain": ["chat"]}).dialect == "best-of-n"


def test_rm_bench_without_ids_gets_them_from_its_lines(tmp_path):
    row = {name: value for name, value in RM_BENCH.items() if name != "id"}
    found = _read(tmp_path, row, row | {"id": None})
    assert (found.dialect, len(found.pairs)) == ("rm-bench", 18)
    assert {pair.id.partition("#")[0] for pair in found.pairs} == {"rows-00001", "rows-00002"}


def test_a_list_becomes_so_many_pairs_that_each_completion_is_in_one(tmp_path):
    assert _shown(_read(tmp_path, TIES).pairs) == [
        ("tied:3#0", "c0", "r0"), ("tied:3#1", "c1", "r1"), ("tied:3#2", "c0", "r2"),
    ]  # fmt: skip
    assert _shown(_read(tmp_path, RMB).pairs) == [("u#0", "c0", "r0"), ("u#1", "c0", "r1")]
    one = {"prompt": "Q", "chosen": "c", "rejected": ["r0", "r1"]}
    assert _shown(_read(tmp_path, one).pairs) == [("rows-00001#0", "c", "r0"), ("rows-00001#1", "c", "r1")]


def test_a_list_is_read_whole_or_not_at_all(tmp_path):
    bad = TIES | {"id": "tied:4", "rejected": ["r0", "", "r2"]}
    found = _read(tmp_path, TIES, bad, skip_bad=True)
    assert {pair.id.partition("#")[0] for pair in found.pairs} == {"tied:3"}
    assert len(_read(tmp_path, TIES, TIES | {"id": "tied:5"}, limit=1).pairs) == 3
    assert len(_read(tmp_path, bad, allow_empty=True).pairs) == 3


@pytest.mark.parametrize(
    ("dialect", "change", "field"),
    [
        ("rm-bench", {"rejected": ["r0"]}, "rejected"),
        ("rm-bench", {"chosen": ["c0", 1, "c2"]}, "chosen"),
        ("rm-bench", {"domain": None}, "subset"),
        ("best-of-n", {"rejected": []}, "rejected"),
        ("best-of-n", {"chosen": None}, "chosen"),
        ("best-of-n", {"id": {"a": 1}}, "id"),
        ("best-of-n", {"prompt": None}, "prompt"),
        ("rmb-best-of-n", {"bon_best": "c0"}, "bon_best"),
        ("rmb-best-of-n", {"loser_list": []}, "loser_list"),
        ("rmb-best-of-n", {"loser_list": [{"answer": None}]}, "answer"),
    ],
)
def test_a_row_that_breaks_its_dialect_names_the_field(tmp_path, dialect, change, field):
    with pytest.raises(DataError) as error:
        _read(tmp_path, ROWS[dialect] | change, dialect=dialect)
    assert (error.value.line, error.value.field) == (1, field)


def test_repeated_ids_are_refused(tmp_path):
    with pytest.raises(DataError, match="a second pair with this id: 'tied:3#0'"):
        _read(tmp_path, TIES, TIES)


def _rmb_pair(uid, chosen, rejected, prompt="Q"):
    return {
        "pair_uid": uid, "conversation_input": [{"role": "user", "content": prompt}], "category_path": "Pairwise_set/x",
        "chosen": {"llm_name": "m", "answer": chosen}, "reject": {"llm_name": "n", "answer": rejected},
    }  # fmt: skip


RMB_PAIRS = (
    _rmb_pair("1", "a", "b"), _rmb_pair("2", "b", "c"), _rmb_pair("3", "a", "c"), _rmb_pair("4", "a", "d", "other"),
    _rmb_pair("5", "a", "b"), _rmb_pair("6", "b", "d"),
)  # fmt: skip


def test_rmb_pairs_with_one_prompt_and_one_winner_are_a_list(tmp_path):
    found = _read(tmp_path, *RMB_PAIRS, dialect=RMB_LISTS)
    # The fourth has another prompt, so that it is alone; the fifth repeats the first.
    assert _shown(found.pairs) == [("1#0", "a", "b"), ("1#1", "a", "c"), ("2#0", "b", "c"), ("2#1", "b", "d")]
    assert {pair.subset for pair in found.pairs} == {"Pairwise_set/x"}
    assert [pair.id for pair in _read(tmp_path, *RMB_PAIRS, dialect=RMB_LISTS, limit=1).pairs] == ["1#0", "1#1"]
    assert _read(tmp_path, *RMB_PAIRS).dialect == "rmb"


def test_rows_that_are_no_pairs_of_rmb_are_named(tmp_path):
    with pytest.raises(DataError) as error:
        _read(tmp_path, *RMB_PAIRS[:2], RM_BENCH, dialect=RMB_LISTS)
    assert (error.value.line, error.value.field) == (3, "bon_best")
    with pytest.raises(DataError, match="no pair is left"):
        _read(tmp_path, *RMB_PAIRS[:2], dialect=RMB_LISTS)
