"""Nothing that was written is lost or half there: atomic files under kill -9, full and read-only disks."""

import gzip
import json
import signal
import subprocess
import sys
import time
import timeit
import typing
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from critrm.errors import ConfigError, DataError, StorageError
from critrm.store import (
    content_hash,
    disk_errors,
    file_hash,
    file_name,
    from_json,
    mark_stage_done,
    read_records,
    read_rows,
    refuse_same_folders,
    stage_is_done,
    to_json,
    write_manifest,
    write_records,
    write_text,
)
from critrm.types import (
    RATINGS,
    Critique,
    CritiquedPair,
    EvalResult,
    Interval,
    Message,
    PreferencePair,
    RunManifest,
    Score,
    Tally,
)

# Records in and out

TEXT = st.text(max_size=20) | st.sampled_from(["\x00", "\u2028\x85\x1c", "\u202eשלום 😀", "\ud83d", "{{ x }}", "\r\n"])
NUMBER = st.floats(allow_nan=False)
COUNT = st.integers(0, 10**6)
PAIR = st.builds(
    PreferencePair,
    id=TEXT,
    prompt=st.lists(st.builds(Message, st.sampled_from(["system", "user", "assistant"]), TEXT), max_size=3).map(tuple),
    chosen=TEXT,
    rejected=TEXT,
    rating=st.none() | st.sampled_from(RATINGS),
    margin=st.none() | NUMBER,
    source=TEXT,
)
CRITIQUE = st.builds(
    Critique,
    key=TEXT,
    pair_id=TEXT,
    side=st.sampled_from(["chosen", "rejected"]),
    text=TEXT,
    critic=TEXT,
    prompt_version=TEXT,
    n_prompt_tokens=COUNT,
    cost=NUMBER,
    score=st.none() | NUMBER,
    failure=TEXT,
)
TALLY = st.builds(
    Tally,
    n_right=COUNT,
    n_wrong=COUNT,
    n_tie=COUNT,
    n_unscored=COUNT,
    accuracy=st.none() | st.builds(Interval, value=NUMBER, low=NUMBER, high=NUMBER),
)
RESULT = st.builds(
    EvalResult,
    benchmark=TEXT,
    model=TEXT,
    critic=TEXT,
    overall=TALLY,
    subsets=st.dictionaries(TEXT, TALLY, max_size=3),
    sections=st.dictionaries(TEXT, NUMBER, max_size=3),
    headline_value=st.none() | NUMBER,
)
RECORDS = {
    PreferencePair: PAIR,
    Critique: CRITIQUE,
    CritiquedPair: st.builds(CritiquedPair, pair=PAIR, critic=TEXT, chosen_critique=TEXT, rejected_critique=TEXT),
    Score: st.builds(Score, TEXT, NUMBER, NUMBER),
    EvalResult: RESULT,
    RunManifest: st.builds(
        RunManifest,
        command=TEXT,
        config=st.dictionaries(TEXT, st.none() | st.booleans() | COUNT | TEXT, max_size=3),
        versions=st.dictionaries(TEXT, TEXT, max_size=2),
        seeds=st.lists(COUNT, max_size=3).map(tuple),
        inputs=st.dictionaries(TEXT, TEXT, max_size=2),
        started=TEXT,
        seconds=NUMBER,
        notes=st.lists(TEXT, max_size=2).map(tuple),
    ),
}


@pytest.mark.parametrize("record_type", RECORDS, ids=lambda record_type: record_type.__name__)
@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_records_are_read_back_as_they_were_written(tmp_path_factory, record_type, data):
    records = data.draw(st.lists(RECORDS[record_type], min_size=1, max_size=3))
    path = tmp_path_factory.getbasetemp() / f"{record_type.__name__}.jsonl"
    assert write_records(path, records) == len(records)
    assert path.read_bytes().count(b"\n") == len(records)
    assert read_records(path, record_type) == records


def test_a_reply_cut_inside_an_emoji_is_stored_as_its_escape(tmp_path):
    assert to_json({"x": "😀"}) == '{"x": "😀"}'
    assert to_json({"x": "\ud83d"}) == '{"x": "\\ud83d"}'
    write_records(tmp_path / "x.jsonl", [{"x": "\ud83d"}])
    assert list(read_rows(tmp_path / "x.jsonl")) == [(1, {"x": "\ud83d"})]


def test_unknown_fields_are_ignored_and_missing_ones_named_with_their_line(tmp_path):
    path = tmp_path / "scores.jsonl"
    write_records(path, [{"pair_id": "a", "chosen": 1.0, "rejected": 0.0, "new": 1}])
    assert read_records(path, Score) == [Score("a", 1.0, 0.0)]
    write_records(path, [Score("a", 1.0, 0.0), {"pair_id": "b", "chosen": 1.0}])
    with pytest.raises(DataError, match=r"scores\.jsonl:2: not a Score .*rejected"):
        read_records(path, Score)


def test_nested_records_that_are_no_records_are_data_errors(tmp_path):
    path = tmp_path / "arm.jsonl"
    for pair in ("text", None, 3, {"id": "a", "prompt": ["x"], "chosen": "", "rejected": ""}, {"prompt": 4}):
        write_records(path, [{"pair": pair}])
        with pytest.raises(DataError, match=r"arm\.jsonl:1: not a CritiquedPair"):
            read_records(path, CritiquedPair)


def test_the_types_of_a_record_are_looked_up_once_not_for_every_row():
    pair = PreferencePair(id="a", prompt=(Message("user", "x"),) * 3, chosen="y", rejected="z")
    row = json.loads(to_json(CritiquedPair(pair=pair)))

    def look_up() -> None:
        for record_type in (CritiquedPair, PreferencePair, Message):
            typing.get_type_hints(record_type)

    # The quickest of many short runs, so that a busy machine does not matter.
    rebuilt, looked_up = (
        min(timeit.repeat(work, number=50, repeat=20)) for work in (lambda: from_json(CritiquedPair, row), look_up)
    )
    assert rebuilt < looked_up  # 20 against 35 microseconds; about 75 with the look-ups inside


# Rows of any file

LINES = [{"n": 1, "text": "a\u2028b"}, {"n": 2, "text": "\x85"}]


def _bytes(*rows: object) -> bytes:
    return b"\n".join(json.dumps(row, ensure_ascii=False).encode() for row in rows)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.jsonl", _bytes(*LINES)),
        ("a.jsonl", _bytes(*LINES).replace(b"\n", b"\r\n\r\n") + b"\r\n"),
        ("a.jsonl", b"\xef\xbb\xbf" + _bytes(*LINES)),
        ("a.json", _bytes(LINES)),
        ("a.json", _bytes(*LINES)),
        ("a.jsonl.gz", gzip.compress(_bytes(*LINES))),
        ("a.json.gz", gzip.compress(_bytes(LINES))),
    ],
)
def test_rows_are_split_on_newline_bytes_only(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    assert [row for _, row in read_rows(tmp_path / name)] == LINES


def test_line_numbers_count_blank_lines(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"\n" + _bytes(LINES[0]) + b"\n\n\n" + _bytes(LINES[1]))
    assert [number for number, _ in read_rows(tmp_path / "a.jsonl")] == [2, 5]


BROKEN = [
    ("a.jsonl", b"", None, "empty"),
    ("a.jsonl", b"\n \n", None, "no rows"),
    ("a.json", b"[]", None, "no rows"),
    ("a.jsonl", b'{"n": 1}\n{"n": 2', 2, "malformed JSON"),
    ("a.jsonl", b'{"n": 1}\nNOT JSON\n{"n": 3}', 2, "malformed JSON"),
    ("a.jsonl", b'{"n": 1}\n[2]', 2, "JSON object"),
    ("a.jsonl", b'{"n": "\xff"}', 1, "UTF-8"),
    ("a.jsonl", b"[" * 200_000, 1, "malformed JSON"),
    ("a.jsonl", b'{"n": ' + b"1" * 5000 + b"}", 1, "malformed JSON"),
    ("a.json", b'[{"n": 1},\n{"n": 2}\n', 3, "malformed JSON"),
    ("a.json", b'[{"n": 1}, 2]', 2, "JSON object"),
    ("a.json", b'["\xff"]', None, "JSON text"),
    ("a.jsonl.gz", b"no gzip", None, "gzip"),
    ("a.jsonl.gz", gzip.compress((_bytes(*LINES) + b"\n") * 99)[:-20], None, "gzip"),
    ("a.jsonl.gz", gzip.compress(b"")[:10] + b"\xff" * 50, None, "gzip"),
    ("a.parquet", b"no parquet", None, "Parquet"),
]


@pytest.mark.parametrize(
    ("name", "data", "line", "reason"), BROKEN, ids=[f"{n}-{i}" for i, (n, *_) in enumerate(BROKEN)]
)
def test_torn_empty_and_malformed_files_name_file_and_line(tmp_path, name, data, line, reason):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=reason) as error:
        list(read_rows(tmp_path / name))
    assert (error.value.path, error.value.line) == (str(tmp_path / name), line)


def test_on_bad_is_told_of_each_bad_line_and_reading_goes_on(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"n": 1}\nBAD\n{"n": 3}\n"text"\n{"n": 5}')
    told: list[DataError] = []
    assert [number for number, _ in read_rows(tmp_path / "a.jsonl", on_bad=told.append)] == [1, 3, 5]
    assert [error.line for error in told] == [2, 4]


def test_missing_files_and_folders_say_so(tmp_path):
    for path, reason in ((tmp_path / "none.jsonl", "no such file"), (tmp_path, "folder")):
        with pytest.raises(DataError, match=reason):
            list(read_rows(path))


# Atomic writes


def test_a_write_that_fails_leaves_the_old_file_and_no_litter(tmp_path):
    path = tmp_path / "a.jsonl"
    write_text(path, "old")
    with pytest.raises(TypeError):
        write_records(path, [{"x": 1}, {"x": object()}])
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "new \ud83d")
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.jsonl"]


def test_records_are_written_as_they_come_and_counted(tmp_path):
    path, waiting = tmp_path / "a.jsonl", []

    def rows(n):
        for i in range(n):
            waiting.append(i)
            yield {"i": i, "text": "x" * 100_000}
            # The ones before are on their way to the disk: many pairs do not have to fit into memory as text.
            assert sum(each.stat().st_size for each in tmp_path.iterdir()) >= 100_000 * (i - 1)

    assert write_records(path, rows(20)) == 20 and len(waiting) == 20
    assert [row["i"] for _, row in read_rows(path)] == list(range(20))


def test_records_that_fail_on_the_way_leave_the_old_file(tmp_path):
    path = tmp_path / "a.jsonl"
    write_records(path, [{"a": 1}])

    def rows():
        yield {"a": 2}
        raise KeyError("no more")

    with pytest.raises(KeyError):
        write_records(path, rows())
    assert [row for _, row in read_rows(path)] == [{"a": 1}] and list(tmp_path.iterdir()) == [path]


def test_folders_are_made_and_line_ends_kept(tmp_path):
    write_text(tmp_path / "a" / "b" / "c.txt", "x\r\ny\n")
    assert (tmp_path / "a" / "b" / "c.txt").read_bytes() == b"x\r\ny\n"


KILLED_WRITER = """
import sys
from critrm.store import write_records
size = 0
while True:
    size = 3000 - size
    write_records(sys.argv[1], [{"n": n, "text": "x" * 500} for n in range(size or 1)])
"""


def test_kill_9_during_writes_leaves_a_whole_file(tmp_path):
    path = tmp_path / "a.jsonl"
    for pause in (0.01, 0.05):
        path.unlink(missing_ok=True)
        _kill_when([sys.executable, "-c", KILLED_WRITER, str(path)], path.exists, pause)
        assert [row["n"] for _, row in read_rows(path)] in ([0], list(range(3000)))


def _kill_when(command: list[str], ready, pause: float) -> None:
    with subprocess.Popen(command) as process:
        deadline = time.monotonic() + 60
        while not ready():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(pause)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL


def test_a_path_that_cannot_be_written_is_a_storage_error_that_names_it(tmp_path):
    # A parent that is a file refuses everybody; permissions would not stop root.
    (tmp_path / "file").touch()
    path = tmp_path / "file" / "a.jsonl"
    for write in (lambda: write_text(path, "x"), lambda: write_records(path, [{}])):
        with pytest.raises(StorageError, match=r"file/a\.jsonl: cannot write"):
            write()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_disk_is_a_storage_error_that_says_what_to_do(tmp_path):
    with (
        pytest.raises(StorageError, match=r"out\.jsonl: cannot write \(No space left.*Free space"),
        disk_errors("out.jsonl"),
        open("/dev/full", "wb", buffering=0) as full,
    ):
        full.write(b"x")


def test_a_full_disk_during_a_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "old")
    # A file-size limit fails a write midway, as a full disk does.
    code = (
        "import resource, signal, sys\nfrom critrm.store import write_text\nfrom critrm.errors import StorageError\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\nresource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "try:\n    write_text(sys.argv[1], 'x' * 100_000)\nexcept StorageError as error:\n    sys.exit(str(error))\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True)
    assert (done.returncode, "a.txt: cannot write" in done.stderr) == (1, True)
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.txt"]


# Markers, manifests, hashes


def test_a_stage_is_done_only_with_the_same_fingerprint_and_a_whole_marker(tmp_path):
    assert not stage_is_done(tmp_path / "none", "f")
    mark_stage_done(tmp_path, "f", n_pairs=3)
    assert stage_is_done(tmp_path, "f")
    assert not stage_is_done(tmp_path, "g")
    assert json.loads((tmp_path / "done.json").read_text()) == {"fingerprint": "f", "n_pairs": 3}
    for damaged in ("", "{", "[]", "{}", "3", '{"fingerprint": null}'):
        (tmp_path / "done.json").write_text(damaged)
        assert not stage_is_done(tmp_path, "f")
    (tmp_path / "done.json").write_bytes(b"\xff\xfe")
    assert not stage_is_done(tmp_path, "f")


def test_a_manifest_says_what_produced_a_folder(tmp_path, monkeypatch):
    data = tmp_path / "pairs.jsonl"
    data.write_text("{}\n")
    monkeypatch.setattr(sys, "argv", ["/usr/bin/critrm", "train", "pairs.jsonl"])
    manifest = write_manifest(
        tmp_path / "run",
        config={"seed": 1, "path": Path("x")},
        started=time.time() - 5,
        inputs=[data, tmp_path / "gone"],
        seeds=[0, 1],
        cost=0.5,
        notes=["short"],
    )
    stored = from_json(RunManifest, json.loads((tmp_path / "run" / "manifest.json").read_text()))
    assert stored == replace(manifest, config={"seed": 1, "path": "x"})
    assert (stored.command, stored.seeds, stored.cost, stored.notes) == (
        "critrm train pairs.jsonl",
        (0, 1),
        0.5,
        ("short",),
    )
    assert stored.inputs == {str(data): file_hash(data)}
    assert stored.versions["python"].startswith("3.")
    assert 5 <= stored.seconds < 60
    assert stored.started.endswith("+00:00")


@given(TEXT, TEXT)
@settings(max_examples=40, deadline=None)
def test_content_hashes_tell_parts_apart(first, second):
    assert content_hash(first, second) == content_hash(first, second)
    assert (content_hash(first, second) == content_hash(second, first)) == (first == second)
    assert content_hash(first, second) != content_hash(first + second)
    assert content_hash({"a": 1, "b": 2}) == content_hash({"b": 2, "a": 1})
    assert len(content_hash(first)) == 32


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("--base-url https://me:hunter2@host:8000/v1?key=abc", "--base-url https://host:8000/v1"),
        ("--base-url http://a/v1?k=1,http://x@b/v1 --out c.jsonl", "--base-url http://a/v1,http://b/v1 --out c.jsonl"),
        ("pairs.jsonl --model m@1 --critic what?", "pairs.jsonl --model m@1 --critic what?"),
    ],
)
def test_a_manifest_holds_no_credentials_of_a_url(tmp_path, monkeypatch, given, kept):
    monkeypatch.setattr(sys, "argv", ["critrm", "critique", *given.split()])
    assert write_manifest(tmp_path, config={}, started=0.0).command == f"critrm critique {kept}"


@pytest.mark.parametrize(
    ("critic", "name"),
    [("org/Model-1.5", "org-Model-1.5"), ("embedded:X", "embedded-X"), ("..", "critic"), ("", "critic")],
)
def test_file_names_of_critics_stay_inside_their_folder(critic, name):
    assert file_name(critic) == name


@pytest.mark.parametrize("names", [["llama3.2:3b", "llama3.2-3b"], ["none."], ["A", "a"]])
def test_critics_that_would_share_a_folder_are_refused(names):
    refuse_same_folders(["llama3.2:3b", "gpt-4.1"])
    with pytest.raises(ConfigError, match="would share the folder"):
        refuse_same_folders(names)
