import re
import time
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from rlhf_recipes.tools.labeling import app as app_module
from rlhf_recipes.tools.labeling import results as results_module
from rlhf_recipes.tools.labeling.app import cleaned_name, guarded_app
from rlhf_recipes.tools.labeling.records import Item
from rlhf_recipes.tools.labeling.store import Store
from tests.tools.labeling.conftest import pairs

ROOT = Path(app_module.__file__).parent
URL = "http://127.0.0.1:8731"
HOSTILE = (
    "<script>alert(1)</script><img src=x onerror=alert(1)>{{ 7 * 7 }}</textarea></div>"
    "'\"&amp; **bold** [x](javascript:alert(1)) \u202egnp.exe\u202c \x1b[31m\x00\u200b"
)


class Elements(HTMLParser):
    """All elements of a page, with the text of each one's own place."""

    VOID = {"meta", "link", "input", "img", "br"}

    def __init__(self, text):
        super().__init__()
        self.found, self.open = [], []
        self.feed(text)
        assert self.open == [], "every element is closed"

    def handle_starttag(self, tag, attributes):
        element = {"tag": tag, "text": "", "within": [one["tag"] for one in self.open], **dict(attributes)}
        self.found.append(element)
        if tag not in self.VOID:
            self.open.append(element)

    def handle_endtag(self, tag):
        assert self.open.pop()["tag"] == tag

    def handle_data(self, data):
        for element in self.open:
            element["text"] += data

    def all(self, tag, **attributes):
        chosen = [one for one in self.found if one["tag"] == tag]
        return [one for one in chosen if all(one.get(name.rstrip("_")) == value for name, value in attributes.items())]


class Browser(TestClient):
    """A labeller's browser: it sends where a request comes from."""

    def __init__(self, store, password=None):
        super().__init__(guarded_app(store, "127.0.0.1", password), base_url=URL, headers={"origin": URL})

    def sign_in(self, name="Ann", **fields):
        return self.post("/sign-in", data={"name": name, **fields})

    def page(self, path="/"):
        answer = self.get(path)
        assert answer.status_code == 200
        return Elements(answer.text)

    def item(self):
        return int(self.page().all("input", name="item")[0]["value"])

    def judge(self, choice="first", **fields):
        return self.post("/judge", data={"item": self.item(), "choice": choice, **fields})


@pytest.fixture
def store(opened):
    return opened(pairs(5))


@pytest.fixture
def ann(store):
    browser = Browser(store)
    browser.sign_in()
    return browser


def said(answer):
    return Elements(answer.text).all("p", id="said")[0]["text"]


class TestSigningIn:
    def test_every_page_asks_for_a_name_first(self, store):
        browser = Browser(store)
        for path in ("/", "/results"):
            assert browser.get(path, follow_redirects=False).headers["location"] == "/sign-in"
        for path in ("/judge", "/undo", "/leave", "/sign-out"):
            answer = browser.post(path, data={"item": 0, "choice": "first", "showing": "x"}, follow_redirects=False)
            assert answer.headers["location"] == "/sign-in"
        assert store.judgements() == []
        assert browser.get("/docs").status_code == browser.get("/openapi.json").status_code == 404

    def test_the_session_is_a_strict_cookie_and_its_secret_is_not_in_the_file(self, store):
        browser = Browser(store)
        answer = browser.sign_in()
        cookie = answer.history[0].headers["set-cookie"]
        assert "HttpOnly" in cookie
        assert "samesite=strict" in cookie.lower()
        [token] = browser.cookies.values()
        assert len(token) >= 43
        assert (
            token.encode() not in store.path.read_bytes() + store.path.with_name(f"{store.path.name}-wal").read_bytes()
        )

    def test_a_forged_cookie_is_nobody(self, store, ann):
        [name] = ann.cookies.keys()
        browser = Browser(store)
        browser.cookies.set(name, "x" * 43)
        assert browser.get("/", follow_redirects=False).status_code == 303

    def test_the_password_is_asked_for(self, store, monkeypatch):
        compared = []
        compare = app_module.hmac.compare_digest
        monkeypatch.setattr(app_module.hmac, "compare_digest", lambda a, b: compared.append((a, b)) or compare(a, b))
        browser = Browser(store, password="correct horse")
        assert browser.page("/sign-in").all("input", type="password")
        for wrong in ({}, {"given": "correct horsf"}, {"given": "c"}):
            answer = browser.sign_in(**wrong)
            assert answer.status_code == 403
            assert "That is not the password." in answer.text
            assert not browser.cookies
        assert browser.sign_in(given="correct horse").status_code == 200
        assert len(compared) == 4
        assert {len(part) for pair in compared for part in pair} == {32}, "hashes, so that lengths tell nothing"

    @pytest.mark.parametrize("name", ["", "   ", "a" * 41, "Ann\u202e", "a\x00b"])
    def test_a_name_is_a_name(self, store, name):
        answer = Browser(store).sign_in(name)
        assert answer.status_code == 403
        assert "Give a name of 1 to 40 letters." in answer.text

    def test_names_are_brought_into_one_form(self):
        assert cleaned_name(" A\u0308nn   Lee\n") == "\xc4nn Lee"

    def test_signing_out_ends_the_session(self, store, ann):
        cookies = dict(ann.cookies)
        ann.post("/sign-out")
        again = Browser(store)
        again.cookies.update(cookies)
        assert again.get("/", follow_redirects=False).status_code == 303


class TestJudging:
    @pytest.mark.parametrize("choice", ["first", "second", "tie", "incomparable", "skipped"])
    def test_choices_are_of_the_places_on_the_page(self, store, ann, choice):
        page = ann.page()
        first, second = (one["text"].strip() for one in page.all("div", class_="text")[1:])
        answer = ann.judge(choice, strength="much", note=" good\r\nline ", milliseconds=1234)
        assert said(answer) == ("Skipped." if choice == "skipped" else "Saved.")
        [judgement] = store.judgements()
        completions = store.items()[judgement.item].row["completions"]
        assert [completions[index] for index in judgement.shown] == [first, second]
        assert (judgement.labeller, judgement.answer.note, judgement.milliseconds) == ("Ann", "good\nline", 1234)
        if choice in ("first", "second"):
            best = completions[judgement.answer.ranks.index(1)]
            assert best == (first if choice == "first" else second)
            assert judgement.answer.strength == "much"
        elif choice == "tie":
            assert (judgement.answer.ranks, judgement.answer.strength) == ([1, 1], None)
        else:
            assert (judgement.answer.verdict, judgement.answer.ranks) == (choice, None)

    def test_a_ranking_is_of_the_places_whatever_order_they_were_dragged_to(self, opened):
        store = opened([Item({"prompt": "q", "completions": ["a", "b", "c", "d"]})])
        ann = Browser(store)
        ann.sign_in()
        texts = [one["text"].strip() for one in ann.page().all("div", class_="text")[1:]]
        ann.judge("ranked", place=[2, 0, 3, 1], rank=["1", "2", "2", "4"])
        [judgement] = store.judgements()
        ranks = dict(zip("abcd", judgement.answer.ranks, strict=True))
        assert [ranks[texts[place]] for place in (2, 0, 3, 1)] == [1, 2, 2, 3]

    @pytest.mark.parametrize(
        "fields",
        [
            {"place": [0, 1, 2], "rank": ["1", "2", ""]},
            {"place": [0, 1, 2], "rank": ["1", "2", "-1"]},
            {"place": [0, 1, 1], "rank": ["1", "2", "3"]},
            {"place": [0, 1], "rank": ["1", "2"]},
            {"place": [0, 1, 2], "rank": ["1", "2", "4"]},
            {"place": [0, 1, 2], "rank": ["1", "2", "0"]},
            {"choice": "first"},
        ],
    )
    def test_a_ranking_that_is_not_whole_is_not_saved(self, opened, fields):
        store = opened([Item({"prompt": "q", "completions": ["a", "b", "c"]})])
        ann = Browser(store)
        ann.sign_in()
        ann.get("/")
        answer = ann.post("/judge", data={"item": 0, "choice": "ranked"} | fields)
        assert (answer.status_code, answer.text.split(":")[0]) == (422, "Not saved")
        assert store.judgements() == []

    @pytest.mark.parametrize(
        "fields",
        [
            {"choice": "third"},
            {"item": "x"},
            {"strength": "hugely"},
            {"note": "x" * 2001},
            {"milliseconds": "-1"},
            {"milliseconds": "1e99"},
        ],
    )
    def test_what_the_page_cannot_send_is_refused(self, store, ann, fields):
        answer = ann.post("/judge", data={"item": ann.item(), "choice": "first"} | fields)
        assert (answer.status_code, answer.text.split(":")[0]) == (422, "Not saved")
        assert store.judgements() == []

    def test_only_what_is_on_the_page_can_be_judged(self, store, ann):
        item = ann.item()
        for other in {-1, 99, *range(5)} - {item}:
            answer = ann.post("/judge", data={"item": other, "choice": "first"})
            assert answer.status_code == 422 or said(answer).startswith("Not saved")
        assert store.judgements() == []
        ann.judge()
        answer = ann.post("/judge", data={"item": item, "choice": "second"})
        assert said(answer).startswith("Not saved: you have judged this one already")
        assert len(store.judgements()) == 1

    def test_undo_brings_the_pair_and_its_note_back(self, store, ann):
        item = ann.item()
        ann.judge(note="hm </textarea><b>")
        answer = ann.post("/undo")
        assert said(answer) == "Taken back. Judge it again."
        page = Elements(answer.text)
        assert int(page.all("input", name="item")[0]["value"]) == item
        assert page.all("textarea")[0]["text"] == "hm </textarea><b>"
        assert said(ann.post("/undo")) == "There is nothing to take back."

    def test_progress_and_the_end(self, store, ann):
        for number in range(1, 6):
            assert ann.page().all("h1")[0]["text"] == f"Pair {number} of 5"
            ann.judge()
        page = ann.page()
        assert page.all("h1")[0]["text"] == "Done"
        assert not page.all("form", id="judge")
        assert any("Nothing is left for you" in one["text"] for one in page.all("p"))
        bob = Browser(store)
        bob.sign_in("Bob")
        assert bob.page().all("h1")[0]["text"] == "Done"

    def test_what_another_process_adds_is_on_the_open_page_and_in_the_results(self, store, ann, monkeypatch):
        monkeypatch.setattr(results_module, "_FRESH_SECONDS", 0.0)
        for _ in range(5):
            ann.judge()
        assert ann.page().all("h1")[0]["text"] == "Done"
        loop = Store(store.path)
        loop.add([Item({"prompt": "what is new?", "completions": ["this", "that"]})], "round 2")
        loop.close()
        page = ann.page()
        assert page.all("h1")[0]["text"] == "Pair 6 of 6"
        assert any("what is new?" in one["text"] for one in page.all("section", class_="prompt"))
        ann.judge()
        for _ in range(200):
            if any("6" in one["text"] for one in Elements(ann.get("/results").text).all("td")):
                break
            time.sleep(0.02)
        else:
            pytest.fail("the results never counted the sixth judgement")

    def test_two_browsers_get_two_pairs_until_one_leaves(self, opened):
        store = opened(pairs(1))
        ann, bob = Browser(store), Browser(store)
        ann.sign_in()
        bob.sign_in("Bob")
        showing = ann.page().all("form", id="judge")[0]["data-showing"]
        page = bob.page()
        assert any("on the pages of others now" in one["text"] for one in page.all("p"))
        assert bob.post("/leave", data={"showing": showing}).status_code == 204, "it is not Bob's"
        assert not bob.page().all("form", id="judge")
        ann.post("/leave", data={"showing": showing})
        assert bob.page().all("form", id="judge")


class TestWhatIsShown:
    @pytest.fixture
    def hostile(self, opened):
        chat = [{"role": "<b>user</b>", "content": HOSTILE}]
        store = opened(
            [
                Item({"prompt": HOSTILE, "completions": [HOSTILE, "plain"]}, models=["<i>m</i>", "n"]),
                Item({"prompt": chat, "completions": [chat, [{"role": "assistant", "content": "plain"}]]}),
            ]
        )
        browser = Browser(store)
        browser.sign_in("<b>Ann</b>")
        return browser

    def test_texts_are_never_markup(self, hostile):
        for _ in range(2):
            answer = hostile.get("/")
            page = Elements(answer.text)
            assert [one["src"] for one in page.all("script")] == ["/static/htmx-4.0.1.min.js", "/static/label.js"]
            assert not page.all("img")
            assert not page.all("b")
            texts = [one["text"] for one in page.all("div", class_="text")]
            shown = [text for text in texts if text != "plain"]
            assert len(shown) == 2
            for text in shown:
                assert text.startswith(
                    "<script>alert(1)</script><img src=x onerror=alert(1)>{{ 7 * 7 }}</textarea></div>"
                )
                assert "U+202EgnP".lower() in text.lower()
                for hidden in "\u202e\u202c\x1b\x00\u200b":
                    assert hidden not in answer.text
                    assert f"U+{ord(hidden):04X}" in text
            hostile.judge("skipped")

    def test_nothing_is_written_into_the_page_that_runs(self, hostile):
        for path in ("/", "/results", "/sign-in"):
            page = Elements(hostile.get(path).text)
            for element in page.found:
                assert not any(name.startswith(("on", "style", "hx-on")) for name in element), element
                assert element["tag"] != "style"
            for tag, name in (("script", "src"), ("link", "href"), ("a", "href"), ("form", "action")):
                assert all(one[name].startswith(("/", "#")) for one in page.all(tag))
        assert "<b>Ann</b>" in unescape(hostile.get("/").text)

    def test_who_wrote_an_answer_and_what_is_known_are_not_shown(self, opened):
        row = {"prompt": "q", "completions": ["x", "y"], "source": "secret-file", "topic": "secret-topic"}
        ann = Browser(opened([Item(row, models=["secret-a", "secret-b"], gold=[2, 1])]))
        ann.sign_in()
        assert "secret" not in ann.get("/").text
        assert not re.search("gold|known", ann.get("/").text)

    def test_labels_landmarks_and_keys(self, ann):
        page = ann.page()
        assert {"header", "main", "nav"} <= {one["tag"] for one in page.found}
        assert page.all("p", role="status")[0]["aria-live"] == "polite"
        assert page.all("p", role="alert")
        named = {one["id"] for one in page.found if "id" in one}
        for element in page.found:
            assert element.get("aria-labelledby", "main") in named
        for field in [*page.all("input"), *page.all("textarea")]:
            assert field.get("type") == "hidden" or "label" in field["within"], field
        keys = {one["data-key"]: one for one in page.found if "data-key" in one}
        assert set(keys) == set("12=suceqwn")
        assert all(one["aria-keyshortcuts"] == key for key, one in keys.items())
        assert not [one for one in page.found if int(one.get("tabindex", 0)) > 0]

    def test_the_package_has_what_the_page_asks_for(self, ann):
        for path in ("/static/label.css", "/static/label.js", "/static/htmx-4.0.1.min.js", "/static/icon.svg"):
            assert ann.get(path).status_code == 200
        assert ann.get("/static/../app.py").status_code == 404
        for path in [*(ROOT / "static").iterdir(), *(ROOT / "templates").iterdir()]:
            if path.suffix in (".js", ".css", ".html", ".svg"):
                outside = re.findall(r"""(?:src|href|url|import|fetch)[=("' ]+https?:[^"') ]+""", path.read_text())
                assert outside == [], path.name
        assert "Zero-Clause BSD" in (ROOT / "static" / "htmx-LICENSE").read_text()


def test_results_are_shown(opened):
    items = [
        item._replace(models=["<b>new", "old"], gold=[1, 2] if n == 3 else None) for n, item in enumerate(pairs(4))
    ]
    store = opened(items)
    store.want(2, 1.0)
    for name in ("Ann", "Bob"):
        browser = Browser(store)
        browser.sign_in(name)
        for _ in range(4):
            shown = store.order(name, browser.item(), 2)
            browser.judge("first" if shown[0] == 0 else "second")
    assert "The rest is being computed" in browser.get("/results").text
    deadline = time.monotonic() + 30
    while not (page := browser.page("/results")).all("table"):
        assert time.monotonic() < deadline
    rows = {one["text"] for one in page.all("tr")}
    assert any(row.startswith("Ann4000") and row.endswith("1.00 [0.21, 1.00] of 1") for row in rows)
    assert any(row.startswith("<b>new") and row.endswith("not identified8") for row in rows)
    assert "over 4 pairs that several judged" in browser.get("/results").text
