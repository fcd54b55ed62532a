"""Nothing that was paid for is lost: the cache under kill -9, torn writes, merges, full and read-only disks."""

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from critrm import critique_cache
from critrm.critique_cache import CritiqueCache, command_info, command_merge
from critrm.errors import ConfigError, StorageError
from critrm.types import Critique

TEXT = st.text(max_size=20) | st.sampled_from(["\x00", "\u2028\x85\x1c", "\u202eשלום 😀", "\ud83d", "{{ x }}", "\r\n"])
CRITIQUE = st.builds(
    Critique,
    key=TEXT,
    pair_id=TEXT,
    side=st.sampled_from(["chosen", "rejected"]),
    text=TEXT,
    critic=TEXT,
    prompt_version=TEXT,
    n_prompt_tokens=st.integers(0, 10**6),
    cost=st.floats(0),
    score=st.none() | st.floats(allow_nan=False),
    failure=TEXT,
)

ANSWER = Critique(key="k", pair_id="p", side="chosen", text="Good.\x00\u2028😀", critic="c", prompt_version="v")
FAILURE = replace(ANSWER, text="", failure="timeout")


def test_an_answer_is_found_again_also_by_the_next_process(tmp_path):
    path = tmp_path / "folder" / "cache.sqlite"
    with CritiqueCache(path) as cache:
        assert cache.get("k") is None
        cache.put(ANSWER)
        assert (cache.get("k"), cache.get("other"), len(cache)) == (ANSWER, None, 1)
    with CritiqueCache(path) as cache:
        assert (cache.get("k"), len(cache)) == (ANSWER, 1)


def test_a_failure_never_replaces_an_answer_and_an_answer_replaces_a_failure(tmp_path):
    with CritiqueCache(tmp_path / "cache") as cache:
        cache.put(FAILURE)
        assert cache.get("k") == FAILURE
        cache.put(ANSWER)
        cache.put(FAILURE)
        assert cache.get("k") == ANSWER
        newer = replace(ANSWER, text="Better.")
        cache.put(newer)
        assert (cache.get("k"), len(cache)) == (newer, 1)


def test_a_row_costs_what_all_calls_for_its_key_have_cost(tmp_path):
    billed = replace(FAILURE, failure="empty reply: max_tokens ran out before any text", cost=0.125)
    with CritiqueCache(tmp_path / "cache") as cache:
        cache.put(billed)
        cache.put(replace(billed, failure="refusal: no", cost=0.5))
        assert cache.get("k") == replace(billed, cost=0.625)
        cache.put(replace(ANSWER, cost=0.25))
        assert cache.get("k") == replace(ANSWER, cost=0.875)
        cache.put(billed)
        assert cache.get("k") == replace(ANSWER, cost=1.0)
    with CritiqueCache(tmp_path / "cache") as cache:
        assert cache.by_critic()["c"]["cost"] == 1.0


def _payer(path: Path) -> list[str]:
    script = WRITER.replace('f"{name}-{i}"', '"k"').replace(
        'prompt_version=""', 'prompt_version="", cost=1.0, failure="x"'
    )
    return [sys.executable, "-c", script, str(path), "c", "100"]


def test_two_processes_that_pay_for_one_call_are_both_counted(tmp_path):
    path = tmp_path / "cache"
    both = [subprocess.Popen(_payer(path), stdout=subprocess.DEVNULL) for _ in range(2)]
    assert [process.wait(timeout=120) for process in both] == [0, 0]
    with CritiqueCache(path) as cache:
        assert cache.get("k").cost == 200.0


@given(CRITIQUE)
@settings(max_examples=40, deadline=None)
def test_any_critique_survives_the_cache(tmp_path_factory, critique):
    key = critique.key.encode("utf-8", "replace").decode()  # keys are hashes
    critique = replace(critique, key=key)
    path = tmp_path_factory.getbasetemp() / "any-critique"
    path.unlink(missing_ok=True)
    with CritiqueCache(path) as cache:
        cache.put(critique)
        assert cache.get(key) == critique


WRITER = """
import sys
from critrm.critique_cache import CritiqueCache
from critrm.types import Critique
name, n = sys.argv[2], int(sys.argv[3])
with CritiqueCache(sys.argv[1]) as cache:
    for i in range(n):
        text = "x" * 300
        cache.put(Critique(key=f"{name}-{i}", pair_id="p", side="chosen", text=text, critic=name, prompt_version=""))
        print(i, flush=True)
"""


def _writer(path: Path, name: str, n: int) -> list[str]:
    return [sys.executable, "-c", WRITER, str(path), name, str(n)]


def test_two_processes_fill_one_new_cache_at_once(tmp_path):
    path = tmp_path / "cache"
    both = [subprocess.Popen(_writer(path, name, 150), stdout=subprocess.DEVNULL) for name in ("a", "b")]
    assert [process.wait(timeout=120) for process in both] == [0, 0]
    with CritiqueCache(path) as cache:
        assert len(cache) == 300
        assert all(cache.get(f"{name}-{i}") for name in ("a", "b") for i in range(150))


def test_kill_9_loses_no_answer_that_was_reported_as_stored(tmp_path):
    path, log = tmp_path / "cache", tmp_path / "log"
    for round_number in range(2):
        log.touch()
        with open(log, "wb") as out, subprocess.Popen(_writer(path, f"r{round_number}", 10**6), stdout=out) as process:
            deadline = time.monotonic() + 60
            while log.read_bytes().count(b"\n") < 100:
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.01)
            process.send_signal(signal.SIGKILL)
        n_reported = log.read_bytes().count(b"\n")
        with CritiqueCache(path) as cache:
            stored = [cache.get(f"r{round_number}-{i}") for i in range(n_reported)]
            assert n_reported >= 100
            assert all(item is not None and item.text == "x" * 300 for item in stored)
            assert cache.get("r0-0") is not None
    assert sqlite3.connect(path).execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_a_file_that_is_no_cache_is_left_alone(tmp_path):
    path = tmp_path / "cache"
    path.write_text("some notes of the user's, longer than a header " * 20)
    before = path.read_bytes()
    with pytest.raises(StorageError, match="not a critique cache"):
        CritiqueCache(path)
    assert path.read_bytes() == before
    with pytest.raises(StorageError):
        CritiqueCache(tmp_path)


def test_a_cache_that_is_full_says_so_and_keeps_what_it_has(tmp_path):
    path = tmp_path / "cache"
    with CritiqueCache(path) as cache:
        cache.put(ANSWER)
        pages = cache._db.execute("PRAGMA page_count").fetchone()[0]
        cache._db.execute(f"PRAGMA max_page_count = {pages + 2}")  # what a full disk does to SQLite
        with pytest.raises(StorageError, match="cache: cannot write .*full"):
            for i in range(100):
                cache.put(replace(ANSWER, key=str(i), text="x" * 3000))
        assert cache.get("k") == ANSWER
    with CritiqueCache(path) as cache:
        assert cache.get("k") == ANSWER


def test_a_path_that_cannot_be_written_is_a_storage_error_that_names_it(tmp_path):
    (tmp_path / "file").touch()  # a parent that is a file refuses everybody
    with pytest.raises(StorageError, match=r"file/cache: cannot write"):
        CritiqueCache(tmp_path / "file" / "cache")


READ_ONLY = """
import os, sys
from critrm.critique_cache import CritiqueCache
from critrm.errors import StorageError
if os.getuid() == 0:  # whom no permissions stop
    os.setgid(65534)
    os.setuid(65534)
try:
    CritiqueCache(sys.argv[1])
except StorageError as error:
    sys.exit(str(error))
"""


@pytest.mark.parametrize("what", ["file", "folder"])
def test_a_read_only_cache_is_refused_before_anything_is_paid_for(tmp_path, what):
    folder = tmp_path / "folder"
    path = folder / "cache"
    with CritiqueCache(path) as cache:
        cache.put(ANSWER)
    for above in (tmp_path, *list(tmp_path.parents)[:3]):  # the child runs as nobody when the tests run as root
        if above.stat().st_uid == os.getuid() and above != Path("/tmp"):
            above.chmod(above.stat().st_mode | 0o011)
    path.chmod(0o444)
    folder.chmod(0o555 if what == "folder" else 0o777)
    try:
        done = subprocess.run([sys.executable, "-c", READ_ONLY, str(path)], capture_output=True, text=True)
    finally:
        folder.chmod(0o755)
    assert done.returncode == 1
    assert "cache: cannot write" in done.stderr and "choose another folder" in done.stderr
    path.chmod(0o644)
    with CritiqueCache(path) as cache:
        assert cache.get("k") == ANSWER


@pytest.fixture(scope="module")
def torn(tmp_path_factory) -> Path:
    """A copy of a cache, taken while it was open: most of its 40 answers are in the log beside it."""
    folder = tmp_path_factory.mktemp("torn")
    with CritiqueCache(folder / "cache") as cache:
        for i in range(40):
            cache.put(replace(ANSWER, key=str(i), text=f"text {i} " * (10 * (i % 5) + 1)))
        for suffix in ("", "-wal"):
            shutil.copyfile(folder / f"cache{suffix}", folder / f"copy{suffix}")
    return folder / "copy"


@given(st.floats(0, 1), st.integers(0, 3))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_torn_last_write_leaves_a_prefix_of_the_answers(torn, tmp_path, share, n_garbage):
    path = tmp_path / "cache"
    (tmp_path / "cache-shm").unlink(missing_ok=True)
    shutil.copyfile(torn, path)
    log = torn.with_name("copy-wal").read_bytes()
    (tmp_path / "cache-wal").write_bytes(log[: int(share * len(log))] + b"\xff" * n_garbage)
    with CritiqueCache(path) as cache:
        stored = [cache.get(str(i)) for i in range(40)]
        n = len(cache)
        assert all(item is not None for item in stored[:n]) and not any(stored[n:])
        assert all(item.text == f"text {i} " * (10 * (i % 5) + 1) for i, item in enumerate(stored[:n]))
        assert share < 1 or n == 40
        cache.put(replace(ANSWER, key="next"))
    with CritiqueCache(path) as cache:
        assert len(cache) == n + 1


def test_the_log_is_forced_to_disk_now_and_then(tmp_path, monkeypatch):
    with CritiqueCache(tmp_path / "cache") as cache:
        cache.put(ANSWER)
        before = (tmp_path / "cache").stat().st_size
        monkeypatch.setattr(critique_cache, "SECONDS_TO_DISK", 0.0)
        for i in range(50):
            cache.put(replace(ANSWER, key=str(i), text="x" * 1000))
        assert (tmp_path / "cache").stat().st_size > before + 40_000


# Merging


def filled(path: Path, *critiques: Critique) -> Path:
    with CritiqueCache(path) as cache:
        for critique in critiques:
            cache.put(critique)
    return path


def test_an_answer_replaces_a_failure_and_never_the_reverse(tmp_path):
    other = [replace(ANSWER, key=key, text=f"other {key}") for key in ("both", "here-failed", "new")]
    filled(tmp_path / "other", *other, replace(FAILURE, key="other-failed"), replace(FAILURE, key="new-failure"))
    here = [replace(ANSWER, key="both"), replace(ANSWER, key="other-failed"), replace(FAILURE, key="here-failed")]
    with CritiqueCache(filled(tmp_path / "cache", *here)) as cache:
        assert cache.merge(tmp_path / "other") == 3
        assert cache.merge(tmp_path / "other") == 0
        assert len(cache) == 5
        assert (cache.get("both"), cache.get("other-failed")) == (here[0], here[1])
        assert (cache.get("here-failed"), cache.get("new")) == (other[1], other[2])
        assert cache.get("new-failure") == replace(FAILURE, key="new-failure")


def test_merging_counts_no_cost_twice(tmp_path):
    filled(
        tmp_path / "other", replace(FAILURE, cost=0.5), replace(ANSWER, cost=0.25), replace(FAILURE, key="2", cost=1.0)
    )
    # This cache is where the other one was copied from, before the answer.
    here = filled(tmp_path / "cache", replace(FAILURE, cost=0.5), replace(FAILURE, key="2", cost=1.0))
    with CritiqueCache(here) as cache:
        for n_new in (1, 0):
            assert cache.merge(tmp_path / "other") == n_new
            assert (cache.get("k"), cache.get("2").cost) == (replace(ANSWER, cost=0.75), 1.0)


@given(st.lists(CRITIQUE, max_size=6), st.lists(CRITIQUE, max_size=6))
@settings(max_examples=25, deadline=None)
def test_merging_is_putting_one_by_one_where_nothing_better_is_stored(tmp_path_factory, ours, theirs):
    def keyed(critiques):  # keys are hashes, and few ones so that they meet
        return [replace(item, key=f"k{ord(item.key[0]) % 4 if item.key else 0}") for item in critiques]

    folder = tmp_path_factory.mktemp("merge")
    filled(folder / "ours", *keyed(ours))
    with CritiqueCache(filled(folder / "theirs", *keyed(theirs))) as other:
        theirs_stored = {key: other.get(key) for key in ("k0", "k1", "k2", "k3")}
    with CritiqueCache(folder / "ours") as cache:
        expected = {}
        for key, theirs_one in theirs_stored.items():
            our_one = cache.get(key)
            better = our_one is None or (our_one.failure and theirs_one and not theirs_one.failure)
            expected[key] = theirs_one if better else our_one
        n_changed = sum(expected[key] != cache.get(key) for key in expected)
        assert cache.merge(folder / "theirs") >= n_changed
        assert {key: cache.get(key) for key in expected} == expected


def test_a_cache_is_copied_with_its_log_or_without(torn, tmp_path):
    before = {path: path.read_bytes() for path in (torn, torn.with_name("copy-wal"))}
    with CritiqueCache(tmp_path / "cache") as cache:
        assert cache.merge(torn) == 40
        assert len(cache) == 40
    assert {path: path.read_bytes() for path in before} == before
    shutil.copyfile(torn, tmp_path / "alone")
    with CritiqueCache(tmp_path / "second") as cache:
        assert 0 <= cache.merge(tmp_path / "alone") < 40


def test_a_cache_in_a_folder_where_nothing_can_be_written_is_read_all_the_same(torn, tmp_path, monkeypatch):
    merge = CritiqueCache._merge

    def refused_at_first(self, other, *, read_from):
        if read_from == other:
            sqlite3.connect("file:/none/such?mode=ro", uri=True)
        return merge(self, other, read_from=read_from)

    monkeypatch.setattr(CritiqueCache, "_merge", refused_at_first)
    with CritiqueCache(tmp_path / "cache") as cache:
        assert cache.merge(torn) == 40


def test_what_cannot_be_merged_is_named_and_changes_nothing(tmp_path):
    (tmp_path / "text").write_text("no cache " * 500)
    sqlite3.connect(tmp_path / "database").execute("CREATE TABLE other (x)").connection.close()
    filled(tmp_path / "damaged", ANSWER)
    with sqlite3.connect(tmp_path / "damaged") as database:
        database.execute("INSERT INTO critiques VALUES ('x', 'half a rec')")
    database.close()
    with CritiqueCache(filled(tmp_path / "cache", FAILURE)) as cache:
        for name, reason in (
            ("none", "none: no such file"),
            ("text", "text: not a critique cache"),
            ("database", "database: not a critique cache"),
            ("damaged", "damaged: 1 rows are damaged"),
            ("cache", "cache: this is the cache itself"),
        ):
            with pytest.raises(StorageError, match=reason):
                cache.merge(tmp_path / name)
        assert (len(cache), cache.get("k")) == (1, FAILURE)


def test_the_command_line_merges_and_says_what_is_there(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    path = tmp_path / "new" / "cache"
    command_info(cache=path)
    assert "no calls stored yet" in capsys.readouterr().out and not path.exists()
    filled(tmp_path / "a", replace(ANSWER, n_prompt_tokens=1500, n_completion_tokens=7, cost=0.25, critic="[b]c"))
    filled(tmp_path / "b", replace(FAILURE, key="2"), replace(ANSWER, key="3", critic="d"))
    command_merge((tmp_path / "a", tmp_path / "b"), cache=path)
    assert "b: 2 calls added" in capsys.readouterr().out
    command_info(cache=path)
    rows = [line.split("│")[1:-1] for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    assert [[cell.strip() for cell in row] for row in rows] == [
        ["[b]c", "1", "1", "0", "1,500", "7", "0.25"],
        ["c", "1", "0", "1", "0", "0", "0.00"],
        ["d", "1", "1", "0", "0", "0", "0.00"],
    ]
    with pytest.raises(ConfigError, match="at least one"):
        command_merge((), cache=path)


def test_the_mean_of_a_critics_answers_is_that_of_one_template(tmp_path):
    with CritiqueCache(tmp_path / "cache") as cache:
        for i, (version, written, failure) in enumerate(
            [("v", 10, ""), ("v", 30, ""), ("judge", 2, ""), ("v", 0, "x")]
        ):
            cache.put(
                replace(
                    ANSWER, key=str(i), prompt_version=version, n_completion_tokens=written, failure=failure, critic="c"
                )
            )
        assert cache.mean_written("c", prompt_version="v") == 20
        assert cache.mean_written("c", prompt_version="other") is None
        assert cache.mean_written("d", prompt_version="v") is None
