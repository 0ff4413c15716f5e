"""The labelling page in a real browser: by keyboard, by mouse, on a phone, and when the server is killed."""

import contextlib
import json
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from urllib.parse import urlsplit

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        CHROMIUM is None or DRIVER is None,
        reason="needs Chromium and its driver (Debian: apt-get install chromium chromium-driver)",
    ),
]
webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium")

COMMAND = "from rlhf_recipes.tools.cli import main; raise SystemExit(main())"
FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-background-networking --no-first-run "
    "--disable-component-update --disable-sync --disable-default-apps"
)
CLOSED = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"  # what the browser itself would ask stays here
HOSTILE = "<script>window.hacked = true</script><img src='//evil.example/x.png' onerror='window.hacked = true'>"


class Server:
    """`rlhf-recipes label`, as a process that can be killed."""

    def __init__(self, folder, rows, *words):
        self.data, self.db = folder / "rows.jsonl", folder / "labels.sqlite"
        self.data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        self.words, self.port, self.process = words, 0, None
        self.start()

    def start(self):
        data = [] if self.db.exists() else ["--data", self.data]
        words = ["label", "--db", self.db, "--port", self.port, *data, *self.words]
        self.process = subprocess.Popen(
            [sys.executable, "-c", COMMAND, *map(str, words)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        said = self.process.stdout.readline()
        found = re.search(r"http://127\.0\.0\.1:(\d+)/", said)
        assert found, said + self.process.stdout.read()
        self.port = int(found[1])

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.kill()

    def kill(self):
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        self.process.stdout.close()

    def judgements(self):
        from rlhf_recipes.tools.labeling.store import Store

        store = Store(self.db)
        found = store.judgements()
        store.close()
        return found

    def leased(self):
        """Whether an item is on somebody's page."""
        with contextlib.closing(sqlite3.connect(self.db)) as database:
            [(number,)] = database.execute("SELECT count(*) FROM leases WHERE expires_at > ?", (time.time(),))
        return number > 0


class Browser:
    """A labeller at a keyboard."""

    def __init__(self, folder, port, name):
        options = webdriver.ChromeOptions()
        options.binary_location = CHROMIUM
        self.log = folder / f"{name}.netlog.json"
        for flag in (*FLAGS.split(), CLOSED, f"--user-data-dir={folder / name}", f"--log-net-log={self.log}"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        self.driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
        self.name = name
        self.url = f"http://127.0.0.1:{port}/"
        self.driver.get(self.url)
        self.keys(name, "\ue007")  # the field has the focus; Enter
        self.wait("return document.querySelector('#judge') !== null")

    def keys(self, *keys):
        """Type."""
        actions = webdriver.ActionChains(self.driver)
        for key in keys:
            actions = actions.send_keys(key)
        actions.perform()

    def press(self, key):
        """Press a key that brings a new item, and wait for it."""
        showing = "document.querySelector('#judge')?.dataset.showing ?? 'none'"
        before = self.script(f"return {showing}")
        self.keys(key)
        self.wait(f"return ({showing}) !== arguments[0]", before)

    def script(self, source, *arguments):
        return self.driver.execute_script(source, *arguments)

    def wait(self, source, *arguments):
        deadline = time.monotonic() + 60
        while not self.script(source, *arguments):
            assert time.monotonic() < deadline, self.text("body")
            time.sleep(0.02)

    def text(self, selector):
        return self.script("return document.querySelector(arguments[0])?.innerText ?? ''", selector)

    def item(self):
        return self.script("return document.querySelector('[name=item]')?.value ?? null")

    def size(self, width, height=800, dark=False):
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        feature = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})

    def messages(self):
        """What stands in the console, without what a server that is away makes the browser say."""
        said = [entry["message"] for entry in self.driver.get_log("browser")]
        return [message for message in said if "ERR_CONNECTION" not in message and "htmx:error" not in message]

    def close(self):
        """Quit; return the hosts that the page asked for, and the addresses that the browser connected to."""
        self.driver.quit()
        log = json.loads(self.log.read_text())
        kinds = {number: name for name, number in log["constants"]["logEventTypes"].items()}
        events = [(kinds[event["type"]], event.get("params", {})) for event in log["events"]]
        asked = [
            urlsplit(found["url"]).hostname
            for kind, found in events
            if kind == "URL_REQUEST_START_JOB" and "127.0.0.1" in found.get("url", "") + found.get("initiator", "")
        ]
        connected = [
            found["address"].rpartition(":")[0]
            for kind, found in events
            if kind == "TCP_CONNECT_ATTEMPT" and "address" in found
        ]
        return asked, connected


def assert_loopback(asked, connected):
    """The page asked for much, and all of it on this machine; nor did the browser go anywhere else."""
    assert len(asked) > 10
    assert set(asked) == set(connected) == {"127.0.0.1"}


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A page of a few pairs and rankings, and a browser on it."""
    folder = tmp_path_factory.mktemp("label")
    rows = [{"prompt": f"q{n}", "completions": [f"{HOSTILE} {n}", "word " * 150 + "long" * 200]} for n in range(6)]
    rows += [{"prompt": f"r{n}", "completions": [f"{letter}{n}" for letter in "abcd"]} for n in range(6)]
    with Server(folder, rows, "--seed", 1) as server:
        browser = Browser(folder, server.port, "Ann")
        yield server, browser
        assert_loopback(*browser.close())


def go_to(browser, kind):
    """Skip until a pair, or a ranking, is on the page."""
    browser.driver.get(browser.url)
    while browser.text("h1").split()[0] != kind:
        browser.press("s")


def test_a_note_is_typed_without_judging(served):
    server, browser = served
    go_to(browser, "Pair")
    item, before = browser.item(), len(server.judgements())
    browser.keys("n", "1 2 = s u c q", "\ue00c")  # Escape leaves the note
    assert browser.item() == item
    assert len(server.judgements()) == before
    assert browser.script("return document.querySelector('[name=note]').value") == "1 2 = s u c q"
    assert browser.script("return document.activeElement.id") == "heading"
    browser.keys("e")
    browser.press("2")
    last = server.judgements()[-1]
    assert (last.answer.note, last.answer.strength) == ("1 2 = s u c q", "much")
    assert last.answer.ranks[last.shown[1]] == 1
    assert 0 < last.milliseconds < 60_000
    assert "Saved." in browser.text("#said")
    assert browser.text("h1") in browser.script("return document.querySelector('#status').textContent")


def test_keys_can_be_turned_off_and_enter_on_a_strength_judges_nothing(served):
    server, browser = served
    go_to(browser, "Pair")
    before = len(server.judgements())
    browser.script("document.querySelector('[value=much]').focus()")
    browser.keys("\ue007")
    browser.script("document.querySelector('.keys').open = true; document.querySelector('#use-keys').click()")
    browser.script("document.activeElement.blur()")
    browser.keys("1", "s", "=")
    time.sleep(0.3)
    assert len(server.judgements()) == before
    browser.driver.refresh()
    assert browser.script("return document.querySelector('#use-keys').checked") is False
    browser.script("document.querySelector('.keys').open = true; document.querySelector('#use-keys').click()")


def test_tab_reaches_everything_and_comes_out_again(served):
    _, browser = served
    go_to(browser, "Pair")
    reached = []
    for _ in range(40):
        browser.keys("\ue004")
        reached.append(
            browser.script("const e = document.activeElement; return e.dataset.key || e.innerText || e.tagName")
        )
    assert {"1", "=", "2", "c", "s", "u", "n", "Results", "Sign out", "Skip to the content"} <= set(reached)
    assert reached.count("n") > 1, "the note is no trap"


def test_leaving_gives_the_pair_back(served):
    server, browser = served
    go_to(browser, "Pair")
    assert server.leased()
    browser.driver.get("about:blank")
    deadline = time.monotonic() + 20
    while server.leased():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("kind", ["Pair", "Ranking"])
def test_the_page_is_readable_wide_and_narrow_light_and_dark(served, kind):
    _, browser = served
    go_to(browser, kind)
    backgrounds = set()
    for width in (1280, 400):
        for dark in (False, True):
            browser.size(width, dark=dark)
            assert browser.script("return document.documentElement.scrollWidth") <= width
            heights = "return [document.querySelector('.bar').getBoundingClientRect().height, innerHeight]"
            bar, height = browser.script(heights)
            assert bar < height / 3.5
            backgrounds.add(browser.script("return getComputedStyle(document.body).backgroundColor"))
    browser.size(1280)
    assert len(backgrounds) == 2
    assert browser.script("return window.hacked === undefined && document.querySelector('.text img') === null")
    assert browser.messages() == []


def test_rankings_by_keys_by_buttons_and_by_dragging(served):
    server, browser = served
    go_to(browser, "Ranking")
    browser.size(1280, height=1200)
    ranks = "return [...document.querySelectorAll('[name=rank]')].map((field) => field.value)"
    names = "return [...document.querySelectorAll('.answer h2')].map((name) => name.textContent.at(-1)).join('')"
    browser.keys("2", "1", "1", "3")
    assert browser.script(ranks) == ["2", "1", "1", "3"]
    browser.press("\ue007")
    last = server.judgements()[-1]
    assert [last.answer.ranks[index] for index in last.shown] == [2, 1, 1, 3]

    browser.script("document.querySelectorAll('[data-move=\"1\"]')[0].click()")
    assert (browser.script(names), browser.script(ranks)) == ("BACD", list("1234"))
    handles = browser.driver.find_elements("css selector", ".handle")
    middle = handles[3].rect["y"] - handles[0].rect["y"]
    webdriver.ActionChains(browser.driver).click_and_hold(handles[0]).move_by_offset(0, middle // 2).move_by_offset(
        0, middle // 2 + 40
    ).release().perform()
    assert (browser.script(names), browser.script(ranks)) == ("ACDB", list("1234"))
    assert "Answer B is in place 4 of 4." in browser.script("return document.querySelector('#status').textContent")
    browser.press("\ue007")
    last = server.judgements()[-1]
    assert [last.answer.ranks[index] for index in last.shown] == [1, 4, 2, 3]


def test_thirty_pairs_by_two_at_once_with_a_reload_undo_and_a_killed_server(tmp_path):
    rows = [{"prompt": f"q{n}", "response_a": f"x{n}", "response_b": f"y{n}"} for n in range(30)]
    ranks = {"1": [1, 2], "2": [2, 1], "=": [1, 1]}
    said = []

    def judge(browser, key):
        said.append((browser.name, int(browser.item()), ranks[key]))
        browser.press(key)

    with Server(tmp_path, rows) as server:
        both = [Browser(tmp_path, server.port, name) for name in ("Ann", "Bob")]
        for turn in range(29):
            browser, other = both[turn % 2], both[1 - turn % 2]
            assert browser.item() != other.item(), "never the same pair"
            if turn == 5:
                item = browser.item()
                browser.driver.refresh()
                assert browser.item() == item, "a page that is loaded again shows the same pair"
            judge(browser, "12="[turn % 3])
            if turn == 9:
                undone = said.pop()
                browser.press("u")
                assert int(browser.item()) == undone[1]
                judge(browser, "=")
            if turn in (12, 20):
                server.kill()  # directly after the answer to the last click
                browser.keys("1")
                browser.wait("return document.querySelector('#alert').textContent.includes('does not answer')")
                server.start()
        last = next(browser for browser in both if browser.item() is not None)
        judge(last, "1")
        assert "Nothing is left" in last.text("main")
        found = server.judgements()
        held = [one for one in found if one.undone_at is None]
        assert len(found) - len(held) == 1
        assert sorted((one.labeller, one.item, [one.answer.ranks[i] for i in one.shown]) for one in held) == sorted(
            said
        )
        assert sorted(one.item for one in held) == list(range(30))
        for browser in both:
            assert browser.messages() == []
            assert_loopback(*browser.close())
