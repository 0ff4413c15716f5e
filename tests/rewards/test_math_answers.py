"""The last box against the true answer. What needs math-verify is skipped where it is not installed."""

import sys
import threading

import pytest

from rlhf_recipes.rewards.math_answers import last_box, math_reward
from rlhf_recipes.rewards.verifier import check_verifier, refuse_if_bought


@pytest.fixture
def math_verify():
    return pytest.importorskip("math_verify", reason="math-verify is not installed: pip install math-verify")


@pytest.mark.parametrize(
    ("text", "box"),
    [
        (r"so \boxed{5}", "5"),
        (r"\boxed{3} or rather \boxed{5}.", "5"),
        (r"\boxed{\frac{1}{2}} }", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{}", ""),
        (r"\boxed{5", None),
        (r"\boxed{3} and \boxed{5", None),
        ("5}", None),
        ("", None),
    ],
)
def test_last_box(text, box):
    assert last_box(text) == box


def test_without_math_verify_the_command_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(ImportError, match="pip install math-verify"):
        math_reward([r"\boxed{5}"], answer=["5"])


@pytest.mark.parametrize(
    ("true", "given", "paid"),
    [
        ("5", r"\boxed{5}", 1.0),
        ("5", r"\boxed{-5}", 0.0),
        ("-5", r"\boxed{5}", 0.0),
        ("5", "5", 0.0),
        ("5", "", 0.0),
        ("5", r"\boxed{}", 0.0),
        (r"\frac{1}{2}", r"\boxed{0.5}", 1.0),
        # The last box alone.
        ("5", r"\boxed{6}, no: \boxed{5}", 1.0),
        ("5", r"\boxed{5}, no: \boxed{6}", 0.0),
        (r"\{5, 6\}", r"\boxed{5} \boxed{6}", 0.0),
        # The true answer goes first: with the sides exchanged this is false.
        ("5", r"\boxed{2+3=5}", 1.0),
        # Plain exponents and mixed numbers.
        ("2.5", r"\boxed{2.5e-3}", 0.0),
        ("0.0025", r"\boxed{2.5e-3}", 0.0),
        ("0.0025", r"\boxed{2.5\times10^{-3}}", 1.0),
        ("3", r"\boxed{5 3/4}", 0.0),
        ("2", r"\boxed{5 3/4}", 0.0),
        ("7", r"\boxed{3 4}", 0.0),
        (r"5\frac{3}{4}", r"\boxed{5.75}", 1.0),
        ("5.75", r"\boxed{5\frac{3}{4}}", 1.0),
        # Tuples, by position.
        ("x=5, y=7", r"\boxed{(7,5)}", 0.0),
        ("x=5, y=7", r"\boxed{(5,7)}", 1.0),
        ("x=5, y=7", r"\boxed{x=5, y=7}", 1.0),
        ("(5,7)", r"\boxed{7,5}", 0.0),
        ("(5,7)", r"\boxed{5,7}", 1.0),
        ("(5,7)", r"\boxed{\left(5, \frac{14}{2}\right)}", 1.0),
        ("5,7", r"\boxed{7,5}", 0.0),
        ("5,7", r"\boxed{5,7,9}", 0.0),
        ("(1,2),(3,4)", r"\boxed{(1,2),(3,4)}", 1.0),
        ("(1,2),(3,4)", r"\boxed{(3,4),(1,2)}", 0.0),
        (r"\{1,2\}", r"\boxed{\{2,1\}}", 1.0),
        # One answer is not two, be they alike.
        ("5", r"\boxed{5,5}", 0.0),
        ("5", r"\boxed{5,6}", 0.0),
        ("5", r"\boxed{5 \text{ or } 6}", 0.0),
        # The brackets of an interval.
        ("(1,2]", r"\boxed{(1,2]}", 1.0),
        ("(1,2]", r"\boxed{[1,2]}", 0.0),
        ("[1,2]", r"\boxed{1,2}", 0.0),
        # Not every comma makes a tuple, and not every bracket.
        ("1,000", r"\boxed{1000}", 1.0),
        ("1000", r"\boxed{1,000}", 1.0),
        ("(x+1)(x-1)", r"\boxed{x^2-1}", 1.0),
        (r"\text{yes}", r"\boxed{\text{yes}}", 1.0),
        (r"\text{yes}", r"\boxed{\text{no}}", 0.0),
    ],
)
def test_what_is_paid(math_verify, true, given, paid):
    assert math_reward([given], answer=[true]) == [paid]


@pytest.mark.parametrize("true", ["2.5e-3", "5 3/4", "", "(1, 2e5)"])
def test_true_answers_that_are_misread_are_refused(math_verify, true):
    with pytest.raises(ValueError, match="true answer of row 1"):
        math_reward([r"\boxed{5}"] * 2, answer=["5", true])


def test_chats_and_other_threads(math_verify):
    results = []
    chats = [[{"role": "assistant", "content": rf"\boxed{{{n}}}"}] for n in (5, 6)]
    thread = threading.Thread(target=lambda: results.extend(math_reward(chats, answer=["5", "5"])))
    thread.start()
    thread.join()
    assert results == [1.0, 0.0]


def test_it_cannot_be_bought(math_verify):
    rows = [{"prompt": f"{n}", "answer": str(n)} for n in range(1, 11)]
    found = check_verifier(math_reward, rows, template=r"\boxed{{answer}}")
    refuse_if_bought(found, bound=0.0)
    assert {entry.kind: entry.paid for entry in found if entry.right} == dict.fromkeys(
        ["true", "spaces", "sentence", "twice"], 1.0
    )
