"""The page at `/`, in a real headless Chromium: clicks, keys, a phone's screen."""

import asyncio
import os
import shutil
import threading
import time

import pytest

from critrm.critique_cache import CritiqueCache
from critrm.live import LiveRewardModel
from critrm.llm import Reply, ScriptedChat
from critrm.reward_model import RewardModel
from critrm.serving_app import create_app
from critrm.serving_guard import Limits
from live_parts import READS, make_critic, scripted_critic

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
HOSTILE = "<img src=x onerror=document.title='hit'><b>bold</b> {{ 7*7 }} \u202e🙂"


class Served:
    """The application on a port of its own, for the length of a `with` block."""

    def __init__(self, live: LiveRewardModel, token: str = ""):
        import uvicorn

        config = uvicorn.Config(create_app(live, name="my-run", limits=Limits(token=token)), port=0, log_config=None)
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run)

    def __enter__(self) -> str:
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)
        return f"http://127.0.0.1:{self.server.servers[0].sockets[0].getsockname()[1]}/"

    def __exit__(self, *_):
        self.server.should_exit = True
        self.thread.join()


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (critrm[dev])")
    if not CHROMIUM:
        pytest.skip("there is no chromium on this machine")
    with playwright.sync_playwright() as running:
        found = running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def page(browser):
    opened = browser.new_page()
    opened.set_default_timeout(60_000)
    opened.problems = []
    opened.requested = []
    opened.on("console", lambda message: message.type == "error" and opened.problems.append(message.text))
    opened.on("pageerror", lambda error: opened.problems.append(str(error)))
    opened.on("request", lambda request: opened.requested.append(request.url))
    yield opened
    opened.close()


@pytest.fixture(scope="session")
def model(tiny_model) -> RewardModel:
    return RewardModel.from_backbone(str(tiny_model), READS, seed=0)


@pytest.fixture
def serve(model, tmp_path):
    """Starts a server with a critic."""
    opened = []

    def start(chat=None, token=""):
        cache = CritiqueCache(tmp_path / "critiques.sqlite")
        live = LiveRewardModel(model, critic=make_critic(chat or scripted_critic(), cache, retries=0))
        opened.extend((cache, live))
        return Served(live, token)

    yield start
    for each in opened:
        each.close()


def fill(page, prompt: str, first: str, second: str = "") -> None:
    page.fill("#prompt", prompt)
    page.fill("#first", first)
    page.fill("#second", second)


def status(page, words: str) -> str:
    page.wait_for_function("words => document.getElementById('status').textContent.includes(words)", arg=words)
    page.wait_for_function("() => !document.getElementById('go').disabled")
    return page.text_content("#status")


def test_two_responses_by_clicks(page, serve):
    with serve() as url:
        page.goto(url)
        page.click("#example")
        page.click("#go")
        assert "with a probability of" in status(page, "is preferred")
        rewards = [float(text.replace("\u2212", "-")) for text in page.locator(".reward").all_text_contents()]
        assert len(rewards) == 2
        best = page.locator(".card").nth(int(rewards[1] > rewards[0]))
        assert "best" in best.get_attribute("class").split()
        sentences = page.locator(".card").first.locator(".sentence")
        assert sentences.count() == 2
        assert sentences.nth(1).text_content().startswith("It is 38 long.")
        assert page.locator(".sentence sub").first.text_content()[0] in "+\u2212"
        assert page.is_visible("#legend")
        colour = page.locator(".sentence").first.evaluate("each => getComputedStyle(each).backgroundColor")
        assert colour.startswith("rgba(")
    assert not page.problems
    assert {each.split("/")[2] for each in page.requested if not each.startswith("data:")} == {url.split("/")[2]}


def test_one_response_by_keys_alone(page, serve):
    with serve() as url:
        page.goto(url)
        page.keyboard.press("Tab")
        page.keyboard.type("What is 2 plus 2?")
        page.keyboard.press("Tab")
        page.keyboard.type("4.")
        page.keyboard.press("Control+Enter")
        assert status(page, "Scored.").startswith("Scored.")
        assert page.locator(".card").count() == 1
        page.keyboard.press("Tab")
        page.keyboard.press("Tab")
        page.keyboard.press("Enter")  # the button again; the critique is known by now
        page.wait_for_function("() => document.querySelector('.card .dim').textContent.includes('from the cache')")
    assert not page.problems


class Waiting:
    """A critic that answers about the quick response at once, and about the slow one when it may."""

    model = "waiting"

    def __init__(self):
        self.go_on = threading.Event()

    async def stream(self, requests, sampling):
        for request in sorted(requests, key=lambda each: "slow one" in each.messages[0].content):
            while "slow one" in request.messages[0].content and not self.go_on.is_set():
                await asyncio.sleep(0.01)
            yield Reply(id=request.id, text="A critique of it. It is good.")


def test_critiques_come_one_by_one(page, serve):
    critic = Waiting()
    with serve(critic) as url:
        page.goto(url)
        fill(page, "What?", "slow one", "quick one")
        page.click("#go")
        page.wait_for_function("() => document.querySelectorAll('.critique')[1]?.textContent.startsWith('A critique')")
        assert page.locator(".critique").first.text_content() == ""
        assert page.locator(".reward").first.text_content() == "…"
        assert page.text_content("#status") == "Critique of response 2 is there…"
        critic.go_on.set()
        page.wait_for_function("() => document.querySelectorAll('.sentence').length === 4")
        status(page, "Response")
    assert not page.problems


def test_hostile_text_stays_text(page, serve):
    with serve() as url:
        page.goto(url)
        fill(page, HOSTILE, HOSTILE, HOSTILE + "2")
        page.click("#go")
        status(page, "Response")
        assert HOSTILE[:20] in page.locator(".critique").first.text_content()
        assert page.locator("main img, main b").count() == 0
        assert page.title() == "critrm: my-run"
    assert not page.problems


def test_scores_stay_where_a_critique_is_too_long_to_take_apart(page, serve):
    with serve(ScriptedChat(lambda request: "It is so. " * 129)) as url:
        page.goto(url)
        fill(page, "What?", "4.")
        page.click("#go")
        assert status(page, "not looked at").startswith("Scored. The sentences were not looked at: a critique of 129")
        assert page.locator(".reward").text_content() not in ("…", "–")


def test_a_critic_that_fails_is_said(page, serve):
    with serve(ScriptedChat(lambda request: Reply(id=request.id, failure="http 500: inner"))) as url:
        page.goto(url)
        fill(page, "What?", "4.")
        page.click("#go")
        assert "Not scored: the critic scripted failed (http 500)" in status(page, "Not scored")
        assert page.locator(".reward").text_content() == "–"
    assert not page.problems


def test_the_token_is_asked_for(page, serve):
    with serve(token="secret-token") as url:
        page.goto(url)
        fill(page, "What?", "4.")
        page.fill("#token", "wrong")
        page.click("#go")
        assert "send the server's token" in status(page, "Not scored")
        page.fill("#token", "secret-token")
        page.click("#go")
        status(page, "Scored.")


def test_on_a_phone(browser, serve, tmp_path):
    phone = browser.new_context(viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True)
    page = phone.new_page()
    with serve() as url:
        page.goto(url)
        fill(page, "What is 2 plus 2?", "4." * 200, "I think " + "it is 5, " * 40)
        page.tap("#go")
        status(page, "Response")
        width = page.evaluate("() => document.documentElement.scrollWidth")
        assert width <= 360, "nothing sticks out to the side"
        first, second = (page.locator(".card").nth(i).bounding_box() for i in range(2))
        assert second["y"] >= first["y"] + first["height"], "one below the other"
        assert page.locator("#go").bounding_box()["height"] >= 44
        picture = page.screenshot(path=os.environ.get("CRITRM_SCREENSHOT") or tmp_path / "phone.png", full_page=True)
        assert len(picture) > 10_000
    phone.close()
