import asyncio
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from functools import partial
from pathlib import Path

import pytest

from critrm.critique import command, critique_pairs
from critrm.critique_cache import CritiqueCache
from critrm.critique_files import read_critiques
from critrm.errors import ConfigError, CriticError
from critrm.llm import ChatRequest, OpenAIChat, Reply, Sampling
from critrm.store import write_records
from critrm.types import Message, PreferencePair
from scripted_server import completion, serving

ray = pytest.importorskip("ray", reason="ray is not installed (the extra `ray`)")
psutil = pytest.importorskip("psutil", reason="psutil is not installed; it comes with accelerate")

from critrm.ray_llm import RayChat  # noqa: E402

KEY = "sk-never-to-be-seen-1234"
SAMPLING = Sampling(max_tokens=16)


def answer(body, delay=0.02):
    """A text that depends on nothing but the request."""
    time.sleep(delay)
    return completion(hashlib.sha256(json.dumps(body["messages"]).encode()).hexdigest())


def make_pairs(n):
    prompt = (Message("user", "Say a number."),)
    return [PreferencePair(id=f"p{i}", prompt=prompt, chosen=f"{i}", rejected=f"-{i} or so") for i in range(n)]


def served(url, **settings):
    return partial(OpenAIChat, "m", base_url=url, concurrency=4, **settings)


def requests(n):
    return [ChatRequest(id=f"r{i}", messages=(Message("user", f"Say {i}."),)) for i in range(n)]


def collect(chat, asked):
    async def run():
        return [reply async for reply in chat.stream(asked, SAMPLING)]

    return asyncio.run(run())


def workers(process=None):
    """The worker processes beneath this one that have begun to answer."""
    found = []
    for child in (process or psutil.Process()).children(recursive=True):
        try:
            if child.cmdline()[:1] == ["ray::_Worker.answer"]:
                found.append(child)
        except psutil.Error:
            continue
    return found


@pytest.fixture(autouse=True)
def quiet_server(monkeypatch):
    """Killed clients break their connections off, which the server would print."""
    monkeypatch.setattr("socketserver.BaseServer.handle_error", lambda *_: None)


@pytest.fixture(scope="module")
def short_folder():
    """Ray's sockets lie in its folder, and their paths must be short."""
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def cluster(short_folder):
    """A cluster that the process has joined, so that not every test starts one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        ray.init(
            address="local",
            num_cpus=3,
            include_dashboard=False,
            object_store_memory=100 * 2**20,
            log_to_driver=False,
            logging_level="error",
            _temp_dir=str(short_folder),
        )
        yield
        ray.shutdown()


def test_rows_are_those_of_the_local_engine_though_a_worker_is_killed(cluster, tmp_path):
    pairs = make_pairs(40)
    killed = threading.Event()
    lock = threading.Lock()

    def deadly_answer(body):
        with lock:
            if not killed.is_set() and len(server.bodies) >= 20 and (found := workers()):
                found[0].kill()
                killed.set()
        return answer(body)

    with serving(answer) as server, CritiqueCache(tmp_path / "local.sqlite") as cache:
        chat = served(server.url)()
        expected = critique_pairs(pairs, chat, critic="c", sampling=SAMPLING, cache=cache)
    with serving(deadly_answer) as server, CritiqueCache(tmp_path / "ray.sqlite") as cache:
        chat = RayChat(served(server.url), model="m", n_workers=2, block_size=8)
        rows = critique_pairs(pairs, chat, critic="c", sampling=SAMPLING, cache=cache)
        n_calls = len(server.bodies)
        again = critique_pairs(pairs, chat, critic="c", sampling=SAMPLING, cache=cache)
        assert len(cache) == 80
        assert len(server.bodies) == n_calls, "a second run asks nothing"

    def facts(found):
        return [(row.key, row.pair_id, row.side, row.text, row.n_completion_tokens, row.failure) for row in found]

    assert killed.is_set()
    assert facts(rows) == facts(expected) == facts(again)
    assert 80 <= n_calls <= 80 + 4, "only the calls that the killed worker had under way are made again"


def test_the_command_runs_on_the_cluster_and_counts_the_same_calls(cluster, tmp_path, monkeypatch):
    write_records(tmp_path / "pairs.jsonl", make_pairs(6))
    files = {engine: tmp_path / f"{engine}.jsonl" for engine in ("local", "ray")}
    with serving(answer) as server:
        for engine, out in files.items():
            command(
                str(tmp_path / "pairs.jsonl"),
                model="m",
                out=out,
                base_url=server.url,
                engine=engine,
                workers=2,
                cache=tmp_path / f"{engine}.sqlite",
            )
            assert len(server.bodies) == 12
            server.bodies.clear()
    rows = {
        engine: [(row.pair_id, row.side, row.key, row.text) for row in read_critiques(out)]
        for engine, out in files.items()
    }
    assert rows["ray"] == rows["local"]
    with pytest.raises(ConfigError, match="one upload"):
        command(
            str(tmp_path / "pairs.jsonl"),
            model="m",
            out=tmp_path / "x",
            base_url="http://x/v1",
            engine="ray",
            batch=True,
        )


@pytest.mark.slow
def test_draws_no_more_than_a_block_per_worker(cluster):
    drawn, most = 0, 0

    def source():
        nonlocal drawn
        for request in requests(100):
            drawn += 1
            yield request

    async def run(chat):
        nonlocal most
        taken = 0
        async for _ in chat.stream(source(), SAMPLING):
            most = max(most, drawn - taken)
            taken += 1
        return taken

    with serving(partial(answer, delay=0.0)) as server:
        assert asyncio.run(run(RayChat(served(server.url), model="m", n_workers=2, block_size=8))) == 100
    assert most <= 2 * 8


@pytest.mark.slow
def test_a_request_that_kills_its_worker_is_a_failure_and_the_others_are_answered(cluster):
    def make():
        class Deadly:
            model = "m"

            async def stream(self, asked, sampling):
                for request in asked:
                    if request.id == "r5":
                        os._exit(1)
                    yield Reply(id=request.id, text="fine")

        return Deadly()

    replies = collect(RayChat(make, model="m", n_workers=2, block_size=8), requests(16))
    assert sorted(reply.id for reply in replies) == sorted(f"r{i}" for i in range(16))
    (failed,) = [reply for reply in replies if reply.failure]
    assert failed.id == "r5"
    assert "worker died" in failed.failure


@pytest.mark.slow
def test_workers_that_all_die_end_the_run(cluster, monkeypatch):
    monkeypatch.setattr("critrm.ray_llm.MAX_DEATHS_IN_A_ROW", 3)

    def make():
        os._exit(1)

    with pytest.raises(CriticError, match="4 workers died in a row"):
        collect(RayChat(make, model="m", n_workers=1, block_size=64), requests(64))


@pytest.mark.slow
def test_an_error_of_a_worker_is_raised_behind_the_replies(cluster):
    def make():
        class Refusing:
            model = "m"

            async def stream(self, asked, sampling):
                yield Reply(id=asked[0].id, text="fine")
                raise CriticError("the key was rejected")

        return Refusing()

    found = []

    async def run():
        async for reply in RayChat(make, model="m", n_workers=1).stream(requests(5), SAMPLING):
            found.append(reply.id)

    with pytest.raises(CriticError, match=r"^the key was rejected$"):
        asyncio.run(run())
    assert found == ["r0"]


@pytest.mark.slow
def test_a_mistake_in_a_chat_is_raised(cluster):
    def make():
        raise ZeroDivisionError("oh")

    with pytest.raises(ZeroDivisionError):
        collect(RayChat(make, model="m", n_workers=1), requests(5))


@pytest.mark.slow
def test_hostile_text_comes_back_unharmed(cluster):
    texts = ["\0{{ x }}<|im_end|>", "\u202egniht", "🦜" * 3, "[/INST] User:"]

    def make():
        class Echo:
            model = "m"

            async def stream(self, asked, sampling):
                for request in asked:
                    yield Reply(id=request.id, text=request.messages[0].content)

        return Echo()

    asked = [ChatRequest(id=str(i), messages=(Message("user", text),)) for i, text in enumerate(texts)]
    replies = collect(RayChat(make, model="m", n_workers=1), asked)
    assert [reply.text for reply in replies] == texts


@pytest.mark.slow
def test_a_model_in_the_workers_writes_what_it_writes_here(cluster, tiny_model):
    from critrm.local_llm import LocalChat

    make = partial(LocalChat, str(tiny_model), device="cpu", dtype="fp32")
    asked = requests(12)
    expected = {reply.id: (reply.text, reply.n_completion_tokens) for reply in collect(make(), asked)}
    replies = collect(RayChat(make, model="tiny", n_workers=2, block_size=4), asked)
    assert {reply.id: (reply.text, reply.n_completion_tokens) for reply in replies} == expected


@pytest.mark.slow
def test_a_cluster_that_is_too_small(cluster, monkeypatch):
    monkeypatch.setattr("critrm.ray_llm.SECONDS_TO_FIRST_WORKER", 2.0)
    chat = RayChat(served("http://127.0.0.1:9/v1"), model="m", n_workers=1, cpus_per_worker=64)
    with pytest.raises(CriticError, match="started no worker in 2 seconds"):
        collect(chat, requests(1))


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("127.0.0.1:9", "no Ray cluster answers"),
        ("head:x", "no Ray cluster answers"),
        ("ray://head:10001", "cannot be"),
    ],
)
def test_an_address_without_a_cluster(monkeypatch, address, reason):
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with pytest.raises(ConfigError, match=reason):
        collect(RayChat(served("http://127.0.0.1:9/v1"), model="m", n_workers=1, address=address), requests(1))


@pytest.mark.slow
def test_workers_and_their_models_serve_the_next_stream(cluster):
    def make():
        class Named:
            model = "m"

            async def stream(self, asked, sampling):
                for request in asked:
                    yield Reply(id=request.id, text=f"{os.getpid()} {id(self)}")

        return Named()

    chat = RayChat(make, model="m", n_workers=1)
    first, second = collect(chat, requests(3)), collect(chat, requests(3))
    assert len({reply.text for reply in first + second}) == 1
    process = psutil.Process(int(first[0].text.split()[0]))
    del chat
    wait_for(lambda: not is_alive(process), seconds=30)


DRIVER = """
import signal
import sys
from functools import partial
from pathlib import Path
from critrm.critique import command, critique_pairs
from critrm.critique_cache import CritiqueCache
from critrm.llm import OpenAIChat, Sampling
from critrm.preferences import read_pairs
from critrm.ray_llm import RayChat

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
url, pairs, cache = sys.argv[1:]
chat = RayChat(partial(OpenAIChat, "m", base_url=url, concurrency=4), model="m", n_workers=2, block_size=8)
with CritiqueCache(cache) as store:
    rows = critique_pairs(read_pairs(pairs).pairs, chat, critic="c", sampling=Sampling(max_tokens=16), cache=store)
print(len(rows), sum(bool(row.text) for row in rows))
"""


def run_driver(server, pairs, cache, folder):
    environment = os.environ | {"OPENAI_API_KEY": KEY, "RAY_TMPDIR": str(folder)}
    arguments = [sys.executable, "-c", DRIVER, server.url, str(pairs), str(cache)]
    return subprocess.Popen(arguments, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(condition, seconds=120.0):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it did not happen in time"
        time.sleep(0.1)


def is_alive(process):
    try:
        # Where nothing reaps orphans, the dead stay as zombies.
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.slow
@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT], ids=["kill -9", "Ctrl-C"])
def test_the_same_command_goes_on_where_the_driver_was_stopped(end, tmp_path, short_folder):
    write_records(tmp_path / "pairs.jsonl", make_pairs(40))
    arguments = (tmp_path / "pairs.jsonl", tmp_path / "cache.sqlite", short_folder)
    with serving(partial(answer, delay=0.1)) as server:
        driver = run_driver(server, *arguments)
        wait_for(lambda: len(server.bodies) >= 30)
        processes = workers(psutil.Process(driver.pid))
        assert len(processes) == 2
        driver.send_signal(end)
        _, errors = driver.communicate(timeout=60)
        assert driver.returncode != 0
        # No worker stays behind that goes on calling.
        wait_for(lambda: not any(map(is_alive, processes)), seconds=30)
        n_first = len(server.bodies)
        with CritiqueCache(tmp_path / "cache.sqlite") as cache:
            n_stored = len(cache)
        assert n_first - 2 * 8 <= n_stored < 80, "at most the blocks under way are lost"
        driver = run_driver(server, *arguments)
        output, errors = driver.communicate(timeout=120)
        assert (driver.returncode, output.strip()) == (0, "80 80"), errors
        assert len(server.bodies) - n_first == 80 - n_stored
        assert {headers["authorization"] for headers in server.headers} == {f"Bearer {KEY}"}
    logs = [path for path in short_folder.rglob("*") if path.is_file()]
    assert any("worker" in path.name for path in logs)
    assert not [path for path in logs if KEY.encode() in path.read_bytes()]


def test_a_key_is_not_sent_along(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with pytest.raises(ConfigError, match="OPENAI_API_KEY would be sent through Ray") as caught:
        RayChat(served("http://127.0.0.1:9/v1", api_key=KEY), model="m", n_workers=2)
    assert KEY not in str(caught.value)


@pytest.mark.parametrize("wrong", [{"n_workers": 0}, {"n_workers": 1, "block_size": 0}])
def test_settings_that_cannot_be_used(wrong):
    with pytest.raises(ConfigError, match="at least 1"):
        RayChat(served("http://127.0.0.1:9/v1"), model="m", **wrong)


def test_no_requests_need_no_cluster(monkeypatch):
    monkeypatch.setattr(ray, "is_initialized", lambda: pytest.fail("Ray was needed"))
    assert collect(RayChat(served("http://127.0.0.1:9/v1"), model="m", n_workers=1), []) == []
