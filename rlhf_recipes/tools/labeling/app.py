"""The page: signing in, one item at a time, and what the judgements say."""

from __future__ import annotations

import hashlib
import hmac
import math
import unicodedata
from pathlib import Path
from typing import Annotated, Any, Literal

from rlhf_recipes.extras import from_extra
from rlhf_recipes.tools.labeling.guard import App, Guard
from rlhf_recipes.tools.labeling.records import STRENGTHS, Answer
from rlhf_recipes.tools.labeling.store import SESSION_SECONDS, Session, Showing, Store
from rlhf_recipes.tools.labeling.texts import turns, visible_parts

with from_extra("label", needed_by="The labelling page"):
    import python_multipart  # noqa: F401  # FastAPI reads forms with it
    import uvicorn  # noqa: F401  # the command serves with it
    from fastapi import APIRouter, Depends, FastAPI, Form, Request, Response
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import PlainTextResponse, RedirectResponse
    from fastapi.staticfiles import StaticFiles
    from fastapi.templating import Jinja2Templates
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from pydantic import BaseModel, Field

    from rlhf_recipes.tools.labeling.results import MOST_JUDGEMENTS, MOST_VOTES, LiveResults  # needs evalica

MOST_OF_A_NAME, MOST_OF_A_NOTE = 40, 2000
_FOLDER = Path(__file__).parent
_SAID = {
    "saved": "Saved.",
    "skipped": "Skipped.",
    "undone": "Taken back. Judge it again.",
    "nothing": "There is nothing to take back.",
    "unseen": "Not saved: you have judged this one already, or it was not on your page.",
}


class JudgementForm(BaseModel):
    """What the page sends. Answers are named by where they stood, from 0 on; the server knows what stood where."""

    item: int
    choice: Literal["first", "second", "tie", "ranked", "incomparable", "skipped"]
    strength: Literal[STRENGTHS] | None = None  # type: ignore[valid-type]
    note: str = Field("", max_length=MOST_OF_A_NOTE)
    milliseconds: int | None = Field(None, ge=0, le=7 * 24 * 3600 * 1000)
    place: list[int] = []
    rank: list[str] = []

    def answer(self, shown: list[int]) -> Answer:
        """Say it of the answers in the order of the data.

        Args:
            shown: Which of them stood where.

        Raises:
            ValueError: If ranks are missing, or answers.
        """
        note = self.note.replace("\r\n", "\n").strip()
        if self.choice in ("incomparable", "skipped"):
            return Answer(self.choice, note=note)
        if self.choice == "ranked":
            if sorted(self.place) != list(range(len(shown))) or len(self.rank) != len(shown):
                raise ValueError("the answers are not those of this item.")
            if not all(rank.strip().isdecimal() for rank in self.rank):
                raise ValueError("give every answer a rank, 1 for the best. Ties share one.")
            by_place = {place: int(rank) for place, rank in zip(self.place, self.rank, strict=True)}
        else:
            by_place = {0: 2 if self.choice == "second" else 1, 1: 2 if self.choice == "first" else 1}
        ranks = [by_place.get(shown.index(answer), 0) for answer in range(len(shown))]
        return Answer("ranked", ranks, self.strength, note)


class _NotSignedIn(Exception):
    """Whoever asks is to sign in first."""


class _Pages:
    """The pages of a database; they are made for the session that asks."""

    def __init__(self, store: Store, password: str | None) -> None:
        self.store, self.password, self.results = store, password, LiveResults(store)
        self.templates = Jinja2Templates(env=_environment())
        self.cookie = f"rlhf_recipes_label_{store.settings['name']}"  # one for each database: ports share cookies

    def sign_in(self, request: Request, problem: str = "") -> Response:
        context = {"password": self.password is not None, "problem": problem, "most": MOST_OF_A_NAME}
        return self.templates.TemplateResponse(request, "sign_in.html", context, 403 if problem else 200)

    def task(self, request: Request, session: Session, said: str) -> Response:
        # Shown first, then counted: so the numbers are of the same moment as the page.
        context: dict[str, Any] = {"showing": self.store.show(session), "progress": self.store.progress(session)}
        context |= {"session": session, "said": _SAID.get(said, "")}
        context |= {"strengths": STRENGTHS, "most_of_a_note": MOST_OF_A_NOTE}
        return self.templates.TemplateResponse(request, "task.html", context)

    def show_results(self, request: Request, session: Session) -> Response:
        context: dict[str, Any] = {"results": self.results.get(), "progress": self.store.progress(session)}
        context |= {"session": session, "most_votes": MOST_VOTES, "most_judgements": MOST_JUDGEMENTS}
        return self.templates.TemplateResponse(request, "results.html", context)


def _pages(request: Request) -> _Pages:
    pages: _Pages = request.app.state.pages
    return pages


Pages = Annotated[_Pages, Depends(_pages)]


def _signed_in(request: Request, pages: Pages) -> Session:
    session = pages.store.session(request.cookies.get(pages.cookie, ""))
    if session is None:
        raise _NotSignedIn
    return session


SignedIn = Annotated[Session, Depends(_signed_in)]
_router = APIRouter()


@_router.get("/sign-in")
def _sign_in_page(request: Request, pages: Pages) -> Response:
    return pages.sign_in(request)


@_router.post("/sign-in")
def _sign_in(
    request: Request, pages: Pages, name: Annotated[str, Form()] = "", given: Annotated[str, Form()] = ""
) -> Response:
    labeller = cleaned_name(name)
    if pages.password is not None and not _same(given, pages.password):
        return pages.sign_in(request, "That is not the password.")
    if not labeller:
        return pages.sign_in(request, f"Give a name of 1 to {MOST_OF_A_NAME} letters.")
    response = RedirectResponse("/", 303)
    response.set_cookie(
        pages.cookie,
        pages.store.sign_in(labeller),
        max_age=int(SESSION_SECONDS),
        httponly=True,
        samesite="strict",
        secure=request.url.scheme == "https",
    )
    return response


@_router.post("/sign-out")
def _sign_out(pages: Pages, session: SignedIn) -> Response:
    pages.store.sign_out(session)
    response = RedirectResponse("/sign-in", 303)
    response.delete_cookie(pages.cookie)
    return response


@_router.get("/")
def _task(request: Request, pages: Pages, session: SignedIn, said: str = "") -> Response:
    return pages.task(request, session, said)


@_router.post("/judge")
def _judge(pages: Pages, session: SignedIn, form: Annotated[JudgementForm, Form()]) -> Response:
    store = pages.store
    try:
        answer = form.answer(store.order(session.labeller, form.item, store.number_of_answers(form.item)))
        saved = store.judge(session, form.item, answer, form.milliseconds)
    except ValueError as error:
        return PlainTextResponse(f"Not saved: {error}", 422)
    said = "unseen" if not saved else "skipped" if form.choice == "skipped" else "saved"
    return RedirectResponse(f"/?said={said}", 303)


@_router.post("/undo")
def _undo(pages: Pages, session: SignedIn) -> Response:
    return RedirectResponse(f"/?said={'undone' if pages.store.undo(session) else 'nothing'}", 303)


@_router.post("/leave")
def _leave(pages: Pages, session: SignedIn, showing: Annotated[str, Form()]) -> Response:
    pages.store.leave(session, showing)
    return Response(status_code=204)


@_router.get("/results")
def _results(request: Request, pages: Pages, session: SignedIn) -> Response:
    return pages.show_results(request, session)


def _to_sign_in(request: Request, error: Exception) -> Response:
    return RedirectResponse("/sign-in", 303)


def _refuse_form(request: Request, error: Exception) -> Response:
    return PlainTextResponse("Not saved: the page sent something that it cannot send.", 422)


def create_app(store: Store, password: str | None = None) -> FastAPI:
    """Make the page of a database, without what guards it.

    Args:
        store: The database.
        password: What labellers have to know; None where a name is enough.

    Returns:
        The application; `guarded_app` is what is served.
    """
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.state.pages = _Pages(store, password)
    app.include_router(_router)
    app.mount("/static", StaticFiles(directory=_FOLDER / "static"))
    app.add_exception_handler(_NotSignedIn, _to_sign_in)
    app.add_exception_handler(RequestValidationError, _refuse_form)
    return app


def guarded_app(store: Store, host: str, password: str | None = None) -> App:
    """Make what is served.

    Args:
        store: The database.
        host: What the server is bound to.
        password: What labellers have to know; None where a name is enough.

    Returns:
        The page behind its guard.
    """
    return Guard(create_app(store, password), host)


def cleaned_name(name: str) -> str:
    """Bring a labeller's name into one form; an empty text for what is no name.

    Args:
        name: As it was typed.

    Example:
        >>> cleaned_name("  Ann  Lee "), cleaned_name(chr(0x202E) + "Ann"), cleaned_name("a" * 41)
        ('Ann Lee', '', '')
    """
    words = " ".join(unicodedata.normalize("NFC", name).split())
    return words if words.isprintable() and len(words) <= MOST_OF_A_NAME else ""


def _same(given: str, password: str) -> bool:
    # Of hashes, so that the time tells nothing of the length either.
    return hmac.compare_digest(*(hashlib.sha256(text.encode()).digest() for text in (given, password)))


def _environment() -> Environment:
    loader = PackageLoader("rlhf_recipes.tools.labeling")
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    environment.filters |= {"turns": turns, "visible_parts": visible_parts, "number": _number}
    environment.globals["title"] = _title
    return environment


def _title(showing: Showing | None) -> str:
    if showing is None:
        return "Done"
    return "Pair" if len(showing.shown) == 2 else "Ranking"


def _number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.{digits}f}"
