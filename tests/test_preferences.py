"""Every dialect on its real file, bad rows with their place, and texts that must come through unchanged."""

import gzip
import json
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from critrm.dialects import DIALECTS, NO_MAJORITY, TIE
from critrm.errors import ConfigError, DataError
from critrm.preferences import PairSet, command, read_pairs
from critrm.store import read_rows, write_records
from critrm.types import RATINGS, Message, PreferencePair

HOSTILE = "nul\x00 \u2028line\x85 \u202eRTL שלום 😀 <|im_end|></s>[INST] {{ x }} {% raw %} [/red] \r\n\ttab "
ROW = {"id": "a", "prompt": "Why?", "chosen": "Because.", "rejected": "No idea."}
HH = "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Why?\n\nAssistant: "


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def written(path, *rows):
    write_records(path, rows)
    return path


def only(path, *rows, **options) -> PreferencePair:
    (pair,) = read_pairs(written(path, *rows), **options).pairs
    return pair


# Real files: (place, dialect, pairs, skipped by reason)
REAL = [
    ("hh-pairs/pairs.jsonl", "critrm", 1379, {}),
    ("llmbar/Natural/dataset.json.gz", "llmbar", 100, {}),
    ("llmbar/Adversarial/Neighbor/dataset.json.gz", "llmbar", 134, {}),
    ("llmbar/Adversarial/GPTInst/dataset.json.gz", "llmbar", 92, {}),
    ("llmbar/Adversarial/GPTOut/dataset.json.gz", "llmbar", 47, {}),
    ("llmbar/Adversarial/Manual/dataset.json.gz", "llmbar", 46, {}),
    ("pandalm/testset-v1.json.gz", "pandalm", 842, {TIE: 105, "empty": 52}),
    ("rewardbench-rebuilt/filtered.jsonl.gz", "rewardbench", 1935, {"empty": 1, "identical": 1}),
    ("dsp/helpful.test.json.gz", "dsp", 2339, {"prompts differ": 9, "empty": 4}),
    ("dsp/harmless.test.json.gz", "dsp", 2303, {"prompts differ": 5, "empty": 4}),
    ("dsp/webgpt.test.json.gz", "dsp", 656, {TIE: 245}),
    ("ultrafeedback-sample/train_clean.jsonl.gz", "ultrafeedback", 884, {TIE: 111, "identical": 3, "empty": 2}),
    ("ultrafeedback-sample/eval_clean.jsonl.gz", "ultrafeedback", 175, {TIE: 25}),
    ("auto-j/testdata_pairwise.jsonl.gz", "auto-j", 1017, {TIE: 373, "empty": 1, "identical": 1}),
    ("rmb/pairwise.jsonl.gz", "rmb", 14522, {"identical": 14, "empty": 7}),
]


@pytest.mark.parametrize(("place", "dialect", "n_pairs", "skipped"), REAL, ids=[place for place, *_ in REAL])
def test_a_real_file_comes_to_its_known_count(data_dir, place, dialect, n_pairs, skipped):
    if not (data_dir / place).exists():
        pytest.skip(f"{place} is not among the real data sets")
    found = read_pairs(data_dir / place, skip_bad=True)
    reasons = Counter(row.reason.partition(":")[0].removesuffix(" to the chosen completion") for row in found.skipped)
    assert (found.dialect, len(found.pairs), dict(reasons)) == (dialect, n_pairs, skipped)
    assert all(pair.prompt[-1].role == "user" and pair.chosen.strip() != pair.rejected.strip() for pair in found.pairs)


def test_the_labels_of_real_files_point_to_the_right_side(data_dir):
    rows = {row["idx"]: row for _, row in read_rows(data_dir / "pandalm" / "testset-v1.json.gz")}
    found = read_pairs(data_dir / "pandalm" / "testset-v1.json.gz", skip_bad=True).pairs
    for pair in found:
        row = rows[int(pair.id)]
        votes = [row[f"annotator{n}"] for n in (1, 2, 3)]
        assert votes.count(1 if pair.chosen == str(row["response1"]) else 2) >= 2
        assert pair.prompt[0].content.startswith(row["instruction"])
    helpful = gzip.decompress((data_dir / "dsp" / "helpful.test.json.gz").read_bytes())
    first = json.loads(helpful)[0] if helpful.startswith(b"[") else json.loads(helpful.split(b"\n")[0])
    pair = read_pairs(data_dir / "dsp" / "helpful.test.json.gz", limit=1).pairs[0]
    assert first["score"] == [1.0, 0.0]
    assert first["text"][0].endswith(pair.chosen)
    assert first["text"][1].endswith(pair.rejected)


def test_the_studys_pairs_split_into_train_and_two_tests(data_dir):
    path = data_dir / "hh-pairs" / "pairs.jsonl"
    assert len(read_pairs(path, split="train").pairs) == 720
    assert len(read_pairs(path, split="test", source="hh-helpful-base").pairs) == 240
    assert len(read_pairs(path, split="test").pairs) == 659
    adversarial = read_pairs(path, source="llmbar-neighbor, llmbar-manual")
    assert len(adversarial.pairs) == 134 + 46
    assert adversarial.n_filtered == 1379 - 180
    first = read_pairs(path, limit=1).pairs[0]
    assert first.id == "hh-0058"
    assert [m.role for m in first.prompt] == ["user", "assistant", "user", "assistant", "user"]
    assert first.prompt[-1].content == "Thanks!"


# Small rows in each dialect, all of one pair.
BEFORE = (Message("user", "Hi"), Message("assistant", "Hello."), Message("user", "Why?"))
CHAT = [user("Hi"), assistant("Hello."), user("Why?")]
MULTI_TURN = {
    "critrm": {"prompt": "Human: Hi\n\nAssistant: Hello.\n\nHuman: Why?", "chosen": "Yes.", "rejected": "No."},
    "critrm messages": {"prompt": CHAT, "chosen": "Yes.", "rejected": "No."},
    "TRL explicit": {"prompt": HH.rstrip(), "chosen": "Yes.", "rejected": "No."},
    "TRL conversational": {"prompt": CHAT, "chosen": [assistant("Yes.")], "rejected": [assistant("No.")]},
    "trl-implicit": {"chosen": [*CHAT, assistant("Yes.")], "rejected": [*CHAT, assistant("No.")]},
    "trl-implicit prompt": {
        "prompt": "Hi",
        "chosen": [*CHAT, assistant("Yes.")],
        "rejected": [*CHAT, assistant("No.")],
    },
    "hh": {"chosen": HH + "Yes.", "rejected": HH + "No."},
    "dsp": {"text": [HH + "No.", HH + "Yes."], "score": [0.0, 1.0]},
    "dsp webgpt": {
        "text": [
            f"## Human:\nHi\n\n## Assistant:\nHello.\n\n## Human:\nWhy?\n\n\n\n## Assistant:\n{said}"
            for said in ("Yes.", "No.")
        ],
        "score": [1.5, 0.5],
    },
    "ultrafeedback": {
        "chosen": [*CHAT, assistant("Yes.")],
        "rejected": [*CHAT, assistant("No.")],
        "score_chosen": 8.0,
        "score_rejected": 7.5,
    },
    "rmb": {
        "pair_uid": "rows-00001",
        "conversation_input": [turn | {"language": "English"} for turn in CHAT],
        "chosen": {"answer": "Yes.", "llm_name": "x"},
        "reject": {"answer": "No.", "llm_name": "y"},
    },
}


@pytest.mark.parametrize("name", MULTI_TURN)
def test_every_dialect_of_a_conversation_gives_the_same_pair(tmp_path, name):
    found = read_pairs(written(tmp_path / "rows.jsonl", MULTI_TURN[name]))
    assert found.pairs == (PreferencePair(id="rows-00001", prompt=BEFORE, chosen="Yes.", rejected="No."),)
    assert found.dialect == name.partition(" ")[0].replace("TRL", "critrm")


SINGLE_TURN = {
    "rewardbench": {"prompt": "Human: Q", "subset": "s", "id": 7, "chosen_model": "m", "rejected_model": "n"}
    | {"chosen": "Yes.", "rejected": "No."},
    "llmbar": {"input": "Human: Q", "output_1": "No.", "output_2": "Yes.", "label": 2},
    "pandalm": {"instruction": "Human: Q", "input": "", "response1": "Yes.", "response2": "No.", "idx": 0}
    | {"annotator1": 1, "annotator2": 0, "annotator3": 1},
}


@pytest.mark.parametrize("name", SINGLE_TURN)
def test_a_benchmarks_prompt_is_one_turn_whatever_it_says(tmp_path, name):
    found = read_pairs(written(tmp_path / "rows.jsonl", SINGLE_TURN[name]))
    (pair,) = found.pairs
    assert (found.dialect, pair.prompt) == (name, (Message("user", "Human: Q"),))
    assert (pair.chosen, pair.rejected) == ("Yes.", "No.")
    assert pair.id == {"rewardbench": "7", "llmbar": "rows-00001", "pandalm": "0"}[name]


def test_pandalms_input_follows_the_instruction(tmp_path):
    pair = only(tmp_path / "p.jsonl", SINGLE_TURN["pandalm"] | {"input": "The text."})
    assert pair.prompt[0].content == "Human: Q\n\nThe text."


UNDECIDED = [
    (SINGLE_TURN["pandalm"] | {"annotator1": 0}, TIE),
    (SINGLE_TURN["pandalm"] | {"annotator3": 2}, NO_MAJORITY),
    (MULTI_TURN["dsp"] | {"score": [1, 1]}, TIE),
    (MULTI_TURN["ultrafeedback"] | {"score_chosen": 7.5}, TIE),
]


@pytest.mark.parametrize(("row", "reason"), UNDECIDED)
def test_an_undecided_row_is_no_error_but_counted(tmp_path, row, reason):
    decided = SINGLE_TURN["pandalm"] if "annotator1" in row else MULTI_TURN["dsp" if "text" in row else "ultrafeedback"]
    found = read_pairs(written(tmp_path / "p.jsonl", decided | ({"idx": 9} if "idx" in row else {}), row))
    assert len(found.pairs) == 1
    assert [(skipped.line, skipped.reason) for skipped in found.skipped] == [(2, reason)]


BAD = [
    ({"prompt": " \n"}, "prompt", "empty"),
    ({"prompt": []}, "prompt", "empty"),
    ({"prompt": None}, "prompt", "missing"),
    ({"prompt": 3}, "prompt", "text or a list"),
    ({"prompt": [{"role": "robot", "content": "x"}]}, "prompt", "role"),
    ({"prompt": [user(None)]}, "prompt", "text"),
    ({"prompt": [user("x"), assistant("y")]}, "prompt", "user's turn"),
    ({"chosen": " \u2028\t"}, "chosen", "empty"),
    ({"rejected": ""}, "rejected", "empty"),
    ({"rejected": None}, "rejected", "missing"),
    ({"chosen": 5}, "chosen", "text"),
    ({"chosen": ["x"]}, "chosen", "role"),
    ({"chosen": [user("x")]}, "chosen", "one assistant message"),
    ({"rejected": "Because. \n"}, "rejected", "identical"),
    ({"chosen": "half \ud83d"}, "chosen", "surrogate"),
    ({"rating": "great"}, "rating", "'great'"),
    ({"rating": 4}, "rating", "4"),
    ({"rating": 1.5}, "rating", "1.5"),
    ({"rating": True}, "rating", "True"),
    ({"rating": ["better"]}, "rating", "better"),
    ({"margin": float("inf")}, "margin", "finite"),
    ({"margin": float("nan")}, "margin", "finite"),
    ({"margin": 10**400}, "margin", "finite"),
    ({"margin": "2"}, "margin", "finite"),
    ({"margin": False}, "margin", "finite"),
    ({"source": ["x"]}, "source", "text"),
    ({"split": 1}, "split", "text"),
    ({"id": True}, "id", "text"),
    ({"id": {"x": 1}}, "id", "text"),
    ({"id": "first"}, "id", "second pair"),
]


@pytest.mark.parametrize(("change", "field", "reason"), BAD, ids=[f"{f}-{r}-{i}" for i, (_, f, r) in enumerate(BAD)])
def test_a_bad_row_is_named_or_kept_in_the_ledger(tmp_path, change, field, reason):
    path = written(tmp_path / "p.jsonl", ROW | {"id": "first"}, ROW | change, ROW | {"id": "last"})
    with pytest.raises(DataError) as error:
        read_pairs(path)
    assert (error.value.path, error.value.line, error.value.field) == (str(path), 2, field)
    assert reason in error.value.reason
    assert "--skip-bad" in str(error.value)
    found = read_pairs(path, skip_bad=True)
    assert [pair.id for pair in found.pairs] == ["first", "last"]
    (skipped,) = found.skipped
    assert (skipped.path, skipped.line, skipped.field) == (str(path), 2, field)
    assert reason in skipped.reason
    assert "--skip-bad" not in skipped.reason


BAD_DIALECT_ROWS = [
    ("hh", {"chosen": "\n\nHuman: Hi", "rejected": HH + "x"}, "chosen"),
    ("hh", {"chosen": "preface\n\n" + HH + "x", "rejected": HH + "y"}, "chosen"),
    ("hh", {"chosen": HH + "x", "rejected": HH.replace("Hi", "Ho") + "y"}, "rejected"),
    ("dsp", {"text": [HH + "x"], "score": [1, 0]}, "text"),
    ("dsp", {"text": [HH + "x", HH + "y"], "score": [1]}, "score"),
    ("dsp", {"text": [HH + "x", HH + "y"], "score": ["1", None]}, "score"),
    ("trl-implicit", {"chosen": CHAT, "rejected": [*CHAT, assistant("y")]}, "chosen"),
    ("trl-implicit", {"chosen": [*CHAT, assistant("x")], "rejected": [user("z"), assistant("y")]}, "rejected"),
    ("llmbar", SINGLE_TURN["llmbar"] | {"label": 3}, "label"),
    ("llmbar", SINGLE_TURN["llmbar"] | {"label": True}, "label"),
    ("llmbar", SINGLE_TURN["llmbar"] | {"output_1": None}, "output_1"),
    ("auto-j", {"prompt": "p", "response 1": "a", "response 2": "b", "label": 3}, "label"),
    ("auto-j", {"prompt": "p", "response 1": "a", "label": 1}, "response 2"),
    ("pandalm", SINGLE_TURN["pandalm"] | {"annotator2": 5}, "annotator1"),
    ("pandalm", SINGLE_TURN["pandalm"] | {"response1": 3}, "response1"),
    ("ultrafeedback", MULTI_TURN["ultrafeedback"] | {"score_rejected": None}, "score_chosen"),
    ("ultrafeedback", MULTI_TURN["ultrafeedback"] | {"score_rejected": 9}, "score_chosen"),
    ("rmb", MULTI_TURN["rmb"] | {"reject": "No."}, "reject"),
    ("rewardbench", SINGLE_TURN["rewardbench"] | {"chosen": ["x"]}, "chosen"),
]


@pytest.mark.parametrize(("dialect", "row", "field"), BAD_DIALECT_ROWS)
def test_a_row_that_breaks_its_dialect_names_the_field(tmp_path, dialect, row, field):
    with pytest.raises(DataError) as error:
        read_pairs(written(tmp_path / "p.jsonl", row), dialect=dialect)
    assert (error.value.line, error.value.field) == (1, field)


EXAMPLES = [*MULTI_TURN.values(), *SINGLE_TURN.values(), ROW]
COLUMNS = sorted({"metadata", "rating", "margin", "source", "category_path"}.union(*EXAMPLES))


@pytest.mark.parametrize("dialect", DIALECTS)
@given(
    row=st.dictionaries(
        st.sampled_from(COLUMNS),
        st.recursive(
            st.none() | st.booleans() | st.integers(0, 3) | st.floats() | st.text(max_size=4),
            lambda inner: (
                st.lists(inner, max_size=3)
                | st.dictionaries(st.sampled_from(["role", "content", "answer", "score_chosen"]), inner)
            ),
            max_leaves=6,
        ),
    )
)
@settings(max_examples=25, deadline=None)
def test_no_row_raises_anything_but_a_data_error(tmp_path_factory, dialect, row):
    path = written(tmp_path_factory.getbasetemp() / f"any-{dialect}.jsonl", row)
    for name in (dialect, "auto"):
        try:
            assert read_pairs(path, dialect=name, source="x,y").pairs
        except DataError as error:
            assert error.path == str(path)


@pytest.mark.parametrize(
    ("given_rating", "rating"),
    [(name, name) for name in RATINGS]
    + [("Significantly_Better", "significantly better"), (" BETTER ", "better"), ("", None), (None, None)]
    + [(1, "slightly better"), (2, "better"), (3, "significantly better"), (2.0, "better"), (float("nan"), None)],
)
def test_ratings(tmp_path, given_rating, rating):
    assert only(tmp_path / "p.jsonl", ROW | {"rating": given_rating}).rating == rating


def test_labels_margin_and_own_ids_are_kept_and_missing_ids_numbered_by_line(tmp_path):
    labels = {"source": "s", "subset": "t", "split": "u", "margin": -1}
    rows = [ROW | labels, {**ROW, "id": None}, {**ROW, "id": ""}, ROW | {"id": 12}]
    found = read_pairs(written(tmp_path / "my.pairs.jsonl", *rows)).pairs
    assert [pair.id for pair in found] == ["a", "my-00002", "my-00003", "12"]
    assert (found[0].source, found[0].subset, found[0].split, found[0].margin) == ("s", "t", "u", -1.0)
    assert (found[1].source, found[1].rating, found[1].margin) == ("", None, None)


# Filters, limits, names


def test_filters_are_exact_lists_and_a_missing_column_matches_nothing(tmp_path):
    rows = [ROW | {"id": str(i), "source": source} for i, source in enumerate(("hh", "hh-online", "web", None))]
    path = written(tmp_path / "p.jsonl", *rows)
    assert [pair.id for pair in read_pairs(path, source="hh").pairs] == ["0"]
    found = read_pairs(path, source="web, hh")
    assert ([pair.id for pair in found.pairs], found.n_filtered) == (["0", "2"], 2)
    with pytest.raises(DataError, match="4 rows are not of split train"):
        read_pairs(path, split="train")
    rmb = MULTI_TURN["rmb"] | {"category_path": "Harmlessness/S2"}
    assert read_pairs(written(tmp_path / "r.jsonl", rmb), subset="Harmlessness/S2").pairs


def test_a_row_of_another_split_may_be_bad(tmp_path):
    path = written(tmp_path / "p.jsonl", ROW | {"split": "a", "chosen": ""}, ROW | {"split": "b"})
    assert len(read_pairs(path, split="b").pairs) == 1


def test_the_limit_counts_pairs(tmp_path):
    rows = [ROW | {"id": "x", "chosen": ""}, *(ROW | {"id": str(i)} for i in range(9))]
    found = read_pairs(written(tmp_path / "p.jsonl", *rows), limit=3, skip_bad=True)
    assert ([pair.id for pair in found.pairs], len(found.skipped)) == (["0", "1", "2"], 1)
    with pytest.raises(ConfigError, match="at least 1"):
        read_pairs(tmp_path / "p.jsonl", limit=0)


def test_an_unknown_dialect_and_unknown_columns_list_what_there_is(tmp_path):
    path = written(tmp_path / "p.jsonl", {"question": "x", "answer": "y"})
    with pytest.raises(DataError, match=r"(?s)answer.*question.*critrm.*hh"):
        read_pairs(path)
    with pytest.raises(ConfigError, match="'rewardbank'.*rewardbench"):
        read_pairs(path, dialect="rewardbank")


def test_when_nothing_is_left_the_reasons_are_counted(tmp_path):
    path = written(tmp_path / "p.jsonl", ROW | {"chosen": ""}, ROW | {"chosen": ""}, ROW | {"rating": "x"})
    with pytest.raises(DataError, match=r"no pair is left; 3 rows skipped \(2 chosen: empty; 1 rating"):
        read_pairs(path, skip_bad=True)


# Files


@pytest.mark.parametrize("name", ["p.jsonl", "p.json", "p.jsonl.gz", "p.json.gz", "p.parquet"])
def test_every_file_format_gives_the_same_pairs(tmp_path, name, pairs):
    rows = [json.loads(json.dumps(row)) for row in _as_rows(pairs)]
    path = tmp_path / name
    if name.endswith(".parquet"):
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        text = json.dumps(rows) if ".json." in name + "." else "\n".join(map(json.dumps, rows))
        path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    assert read_pairs(path).pairs == tuple(pairs)


def _as_rows(pairs):
    for pair in pairs:
        prompt = [{"role": message.role, "content": message.content} for message in pair.prompt]
        yield {name: getattr(pair, name) for name in PreferencePair.__slots__} | {"prompt": prompt}


def test_malformed_lines_in_the_middle_are_errors_or_counted(tmp_path):
    path = tmp_path / "p.jsonl"
    good = [json.dumps(ROW | {"id": str(i)}).encode() for i in range(3)]
    path.write_bytes(
        b"\n".join([good[0], b'{"id": "torn', b"[1]", b'{"id": "\xff"}', b"[" * 99999, good[1], b"", good[2]])
    )
    with pytest.raises(DataError, match=r"p\.jsonl:2: malformed JSON"):
        read_pairs(path)
    found = read_pairs(path, skip_bad=True)
    assert [pair.id for pair in found.pairs] == ["0", "1", "2"]
    assert [row.line for row in found.skipped] == [2, 3, 4, 5]


def test_missing_and_empty_files_and_folders_say_so(tmp_path):
    (tmp_path / "empty.jsonl").touch()
    for name, reason in (("none.jsonl", "no such file"), ("empty.jsonl", "empty"), (".", "folder")):
        with pytest.raises(DataError, match=reason):
            read_pairs(tmp_path / name)
    with pytest.raises(DataError, match="no such file"):
        read_pairs("data/none.jsonl")  # two names and a slash, but a file's suffix


def test_a_name_with_one_slash_is_a_data_set_for_the_datasets_library(tmp_path, monkeypatch):
    import datasets

    # The library reads a folder of that name as it reads the hub, so no network is needed.
    folder = tmp_path / "owner" / "name"
    row = {name: ROW[name] for name in ("prompt", "chosen", "rejected")}
    write_records(folder / "train.jsonl", [row, row | {"chosen": HOSTILE + "x" * 50_000}])
    write_records(folder / "test.jsonl", [row])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()
    train = read_pairs("owner/name").pairs
    assert train[1].chosen == HOSTILE + "x" * 50_000
    assert [(pair.id, pair.split) for pair in train] == [("name-00001", "train"), ("name-00002", "train")]
    both = read_pairs("owner/name", split="test, train").pairs
    assert [pair.split for pair in both] == ["test", "train", "train"]
    with pytest.raises(DataError, match="'other'"):
        read_pairs("owner/name", split="other")
    with pytest.raises(DataError, match="owner/none"):
        read_pairs("owner/none")


# Texts pass through unchanged

TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=30) | st.sampled_from(
    [HOSTILE, "Human: x", "x" * 50_000]
)
SAID = TEXT.filter(str.strip)
PROMPT = st.builds(
    lambda before, last: (*before, Message("user", last)),
    st.lists(st.builds(Message, st.sampled_from(["system", "user", "assistant"]), TEXT), max_size=3),
    SAID,
)
PAIR = st.builds(
    PreferencePair,
    id=SAID,
    prompt=PROMPT,
    chosen=SAID,
    rejected=SAID,
    rating=st.none() | st.sampled_from(RATINGS),
    margin=st.none() | st.floats(-1e6, 1e6),
    source=TEXT,
    subset=TEXT,
    split=TEXT,
).filter(lambda pair: pair.chosen.strip() != pair.rejected.strip())


@given(st.lists(PAIR, min_size=1, max_size=3, unique_by=lambda pair: pair.id))
@settings(max_examples=60, deadline=None)
def test_what_is_written_is_read_back_identically(tmp_path_factory, pairs):
    path = tmp_path_factory.getbasetemp() / "round-trip.jsonl"
    write_records(path, pairs)
    found = read_pairs(path)
    assert found == PairSet(pairs=tuple(pairs), skipped=(), dialect="critrm")


@given(SAID.filter(lambda text: not text.lstrip().startswith(("Human:", "## Human:"))), SAID)
@settings(max_examples=40, deadline=None)
def test_a_text_prompt_without_turns_is_one_message_as_it_stands(tmp_path_factory, prompt, said):
    path = tmp_path_factory.getbasetemp() / "text-prompt.jsonl"
    pair = only(path, {"prompt": prompt, "chosen": said + "1", "rejected": said + "2"})
    assert (pair.prompt, pair.chosen, pair.rejected) == ((Message("user", prompt),), said + "1", said + "2")


@pytest.mark.parametrize("name", [name for name in MULTI_TURN if name != "dsp webgpt"])
def test_hostile_text_comes_through_every_dialect(tmp_path, name):
    hostile = HOSTILE.strip(" \n") + "\u2028"  # whitespace that is no transcript's
    line = json.dumps(MULTI_TURN[name])
    for plain in ("Why?", "Yes."):
        line = line.replace(plain, json.dumps(plain + hostile)[1:-1])
    pair = only(tmp_path / "p.jsonl", json.loads(line))
    assert (pair.prompt[-1].content, pair.chosen) == ("Why?" + hostile, "Yes." + hostile)


# The command line


def test_the_command_writes_pairs_and_ledger_and_shows_what_they_are(tmp_path, capsys, pairs):
    rows = [replace(pair, source="[/x] {{ y }}") for pair in pairs]
    path = written(tmp_path / "p.jsonl", *rows, ROW | {"chosen": ""}, ROW | {"rating": "odd"})
    command(str(path), out=tmp_path / "out" / "pairs.jsonl", skip_bad=True)
    shown = capsys.readouterr().out
    for text in (
        "12 pairs, dialect critrm",
        "source: [/x] {{ y }}",
        "skipped: chosen: empty",
        "rating: better",
        "0.0%",
    ):
        assert text in shown
    assert read_pairs(tmp_path / "out" / "pairs.jsonl").pairs == tuple(rows)
    ledger = [row for _, row in read_rows(tmp_path / "out" / "pairs.skipped.jsonl")]
    assert [(row["line"], row["field"]) for row in ledger] == [(13, "chosen"), (14, "rating")]
    command(str(tmp_path / "out" / "pairs.jsonl"), out=tmp_path / "out" / "again.jsonl")
    assert (tmp_path / "out" / "again.skipped.jsonl").read_text() == ""


@pytest.mark.parametrize("out", ["p.jsonl", "q.parquet", "q.jsonl.gz"])
def test_the_command_refuses_an_out_it_would_spoil(tmp_path, out):
    path = written(tmp_path / "p.jsonl", ROW)
    before = path.read_bytes()
    with pytest.raises(ConfigError, match="not the input"):
        command(str(path), out=tmp_path / out)
    assert [entry.name for entry in tmp_path.iterdir()] == ["p.jsonl"]
    assert path.read_bytes() == before


# Benchmarks: rows that training must not have and published counts do


def test_empty_and_identical_completions_are_kept_when_asked_for(tmp_path):
    path = written(tmp_path / "p.jsonl", ROW | {"chosen": ""}, ROW | {"id": "b", "rejected": ROW["chosen"]})
    with pytest.raises(DataError, match="empty"):
        read_pairs(path)
    found = read_pairs(path, allow_empty=True)
    assert [(pair.chosen, pair.rejected) for pair in found.pairs] == [("", "No idea."), ("Because.", "Because.")]
    with pytest.raises(DataError, match="missing"):
        read_pairs(written(tmp_path / "q.jsonl", {"prompt": "Why?", "chosen": "a", "rejected": None}), allow_empty=True)


@pytest.mark.parametrize(
    ("dialect", "n_pairs", "skipped"),
    [
        ("auto", 894, {TIE: 105}),
        ("pandalm-unanimous", 794, {TIE: 85, "not unanimous": 120}),
        ("pandalm-first", 902, {TIE: 97}),
    ],
)
def test_pandalms_rule_decides_how_many_pairs_there_are(data_dir, dialect, n_pairs, skipped):
    found = read_pairs(data_dir / "pandalm" / "testset-v1.json.gz", dialect=dialect, allow_empty=True)
    assert (len(found.pairs), Counter(row.reason for row in found.skipped)) == (n_pairs, skipped)
    assert {pair.source for pair in found.pairs} == {dialect if dialect != "auto" else "pandalm-majority"}


def test_the_first_annotator_may_be_outvoted(tmp_path):
    row = SINGLE_TURN["pandalm"] | {"annotator1": 1, "annotator2": 2, "annotator3": 2}
    path = written(tmp_path / "p.jsonl", row)
    assert read_pairs(path, dialect="pandalm-first").pairs[0].chosen == row["response1"]
    assert read_pairs(path).pairs[0].chosen == row["response2"]


JUDGEBENCH = {
    "pair_id": "p-1", "source": "mmlu-pro-law", "question": "Why?", "response_model": "m",
    "response_A": "a", "response_B": "b", "label": "B>A",
}  # fmt: skip


def test_judgebench_labels_say_which_response_is_right(tmp_path):
    pair = only(tmp_path / "p.jsonl", JUDGEBENCH)
    assert (pair.id, pair.chosen, pair.subset, pair.source) == ("p-1", "b", "mmlu-pro-law", "m")
    assert only(tmp_path / "p.jsonl", JUDGEBENCH | {"label": "A>B"}).chosen == "a"
    for label in ("A=B", None, 1, True):
        with pytest.raises(DataError, match="'A>B' or 'B>A'"):
            only(tmp_path / "p.jsonl", JUDGEBENCH | {"label": label})
    with pytest.raises(DataError, match="response_B"):
        only(tmp_path / "p.jsonl", {name: JUDGEBENCH[name] for name in JUDGEBENCH if name != "response_B"})
