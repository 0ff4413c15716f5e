"""Scorers with a known fault: the kind of answer that they pay is found, and no other."""

import doctest
import json
import math
import re
from pathlib import Path

import pytest

from rlhf_recipes.rewards.verifier import check_verifier, paid_table, refuse_if_bought
from rlhf_recipes.statistics.metrics import proportion_interval
from rlhf_recipes.tools.cli import main

ROWS = [{"prompt": f"2 * {n} =", "answer": str(2 * n)} for n in range(1, 21)]


def number_of(text):
    found = re.search(r"-?\d+", text)
    return found and found.group()


def first_number_no_sign(text, row):
    found = re.search(r"\d+", text)
    return float(found is not None and found.group() == row["answer"])


SCORERS = {
    # The scorer, and the kinds that it pays.
    "exact": (lambda text, row: float(text == row["answer"]), {"true"}),
    "stripped": (lambda text, row: float(text.strip() == row["answer"]), {"true", "spaces"}),
    "number": (lambda text, row: float(number_of(text) == row["answer"]), {"true", "spaces", "sentence", "twice"}),
    "no sign": (first_number_no_sign, {"true", "spaces", "sentence", "twice", "negated"}),
    "contained": (lambda text, row: float(row["answer"] in text), {"true", "spaces", "sentence", "twice", "negated"}),
    "prefix": (lambda text, row: float(row["answer"].startswith(text)), {"true", "empty"}),
    "any number": (
        lambda text, row: float(number_of(text) is not None),
        {"true", "spaces", "sentence", "twice", "constant", "other", "negated"},
    ),
    "anything": (
        lambda text, row: 1.0,
        {"true", "spaces", "sentence", "twice", "constant", "other", "negated", "empty"},
    ),
    "nothing": (lambda text, row: 0.0, set()),
}


@pytest.mark.parametrize("name", SCORERS)
def test_what_is_paid(name):
    scorer, paid = SCORERS[name]
    found = check_verifier(scorer, ROWS)
    assert {entry.kind for entry in found if entry.paid > 0.5} == paid
    assert [entry.kind for entry in found if entry.right] == ["true", "spaces", "sentence", "twice"]
    bought = paid & {"constant", "other", "negated", "empty"}
    if not paid:
        with pytest.raises(ValueError, match="pays the rows' own answers 0.00"):
            refuse_if_bought(found)
    elif bought:
        with pytest.raises(ValueError, match="can be bought") as error:
            refuse_if_bought(found)
        assert all(f"the kind {kind!r}" in str(error.value) for kind in bought)
    else:
        refuse_if_bought(found)


def test_every_text_by_hand():
    seen = []
    rows = [{"answer": 5}, {"answer": "-1.50"}, {"answer": "yes"}, {"answer": "0"}]
    check_verifier(lambda text, row: seen.append((row["answer"], text)) or 0.0, rows, template="<{answer}>")
    assert seen == [
        *((5, "<5>"), ("-1.50", "<-1.50>"), ("yes", "<yes>"), ("0", "<0>")),
        *((5, " <5>\n"), ("-1.50", " <-1.50>\n"), ("yes", " <yes>\n"), ("0", " <0>\n")),
        *[(answer, f"The answer is <{answer}>.") for answer in (5, "-1.50", "yes", "0")],
        *[(answer, f"<{answer}> <{answer}>") for answer in (5, "-1.50", "yes", "0")],
        *((5, "<0>"), ("-1.50", "<0>"), ("yes", "<0>")),  # 0 is right in the last row
        *((5, "<-1.50>"), ("-1.50", "<yes>"), ("yes", "<0>"), ("0", "<5>")),
        *((5, "<-5>"), ("-1.50", "<1.50>")),
        *[(answer, "") for answer in (5, "-1.50", "yes", "0")],
    ]


@pytest.mark.parametrize(
    ("answer", "negated"),
    [
        ("5", "-5"),
        ("+5", "-5"),
        (" -5 ", "5"),
        (".5", "-.5"),
        ("1,234.5", "-1,234.5"),
        ("2.5e-3", "-2.5e-3"),
        ("3/4", "-3/4"),
        *(("0", None), ("0.00", None), ("-0", None), ("x = 5", None), ("5 apples", None), ("5-3", None)),
    ],
)
def test_negated_numbers(answer, negated):
    seen = []
    found = check_verifier(lambda text, row: seen.append(text) or 0.0, [{"answer": answer}])
    entry = next(entry for entry in found if entry.kind == "negated")
    assert (entry.rows, entry.example) == ((0, "") if negated is None else (1, negated))
    assert math.isnan(entry.paid) == (negated is None)


def test_shares_and_intervals():
    # Every fourth row pays half of the range for the empty answer; the range is -1 to 3.
    rows = [{"answer": str(n), "half": n % 4 == 0} for n in range(1, 41)]

    def scorer(text, row):
        return 3.0 if text == row["answer"] else 1.0 if row["half"] and not text else -1.0

    found = {entry.kind: entry for entry in check_verifier(scorer, rows, pays=(-1.0, 3.0))}
    assert (found["true"].paid, found["true"].rows) == (1.0, 40)
    assert found["empty"].paid == pytest.approx(10 * 0.5 / 40, abs=1e-12)
    assert found["empty"].interval == pytest.approx(proportion_interval(5.0, 40), abs=1e-12)
    assert (found["empty"].row, found["empty"].example) == (3, "")
    refuse_if_bought(list(found.values()), bound=0.125)
    with pytest.raises(ValueError, match=r"pays 0.12 for the kind 'empty'"):
        refuse_if_bought(list(found.values()), bound=0.124)
    assert paid_table(list(found.values())).count("\n") == 8


def test_rounding_is_no_more_than_full_pay():
    found = check_verifier(lambda text, row: 1.0000000000000002, ROWS)
    assert {entry.paid for entry in found} == {1.0}


class TestRewardFunctions:
    """With TRL's signature: columns by keyword, chats as chats, None where it does not judge."""

    def test_columns_and_texts(self):
        def exact(prompts, completions, completion_ids, answer, level, **kwargs):
            assert len(prompts) == len(completions) == len(completion_ids) == len(answer) == len(level)
            return [float(text == truth) for text, truth in zip(completions, answer, strict=True)]

        found = check_verifier(exact, [row | {"level": 1} for row in ROWS])
        assert [entry.kind for entry in found if entry.paid > 0] == ["true"]

    def test_chats(self):
        def exact(completions, answer, **kwargs):
            return [float(chat[0]["content"] == truth) for chat, truth in zip(completions, answer, strict=True)]

        rows = [row | {"prompt": [{"role": "user", "content": row["prompt"]}]} for row in ROWS]
        assert [entry.kind for entry in check_verifier(exact, rows) if entry.paid > 0] == ["true"]

    def test_async_and_none(self):
        async def exact(completions, answer, **kwargs):
            return [1.0 if text == truth else None for text, truth in zip(completions, answer, strict=True)]

        assert [entry.kind for entry in check_verifier(exact, ROWS) if entry.paid > 0] == ["true"]

    def test_other_column(self):
        rows = [{"prompt": row["prompt"], "solution": row["answer"]} for row in ROWS]
        found = check_verifier(lambda text, row: float(text == row["solution"]), rows, answer_column="solution")
        assert found[0].paid == 1.0


@pytest.mark.parametrize(
    ("reward", "rows", "options", "kind", "message"),
    [
        (SCORERS["exact"][0], [], {}, ValueError, "no rows"),
        (SCORERS["exact"][0], [{"answer": "1"}, {"answer": None}], {}, ValueError, "Row 1 has no answer.*got None"),
        (SCORERS["exact"][0], ROWS, {"answer_column": "truth"}, ValueError, "Row 0 has no answer.*`truth`"),
        (SCORERS["exact"][0], ROWS, {"template": "<answer>"}, ValueError, "`template` must hold"),
        (SCORERS["exact"][0], ROWS, {"pays": (1.0, 1.0)}, ValueError, "`pays` is the least and the most"),
        (lambda text, row: 2.0, ROWS, {}, ValueError, r"pays 2 for '2' in row 0, but `pays` says 0 to 1"),
        (lambda text, row: math.nan, ROWS, {}, ValueError, "pays nan"),
        (lambda text: 1.0, ROWS, {}, TypeError, "or a scorer of a text and its row"),
        (lambda text, row: 1 / len(text), ROWS, {"pays": (0, 9)}, RuntimeError, "of the kind 'empty': division"),
        (lambda completions, **kwargs: [1.0], ROWS, {}, RuntimeError, "'true': .*must return a list of 20 rewards"),
    ],
)
def test_errors(reward, rows, options, kind, message):
    with pytest.raises(kind, match=message):
        check_verifier(reward, rows, **options)


@pytest.mark.parametrize("bound", [-0.1, 1.0, math.nan])
def test_bad_bounds(bound):
    with pytest.raises(ValueError, match="from 0 to below 1"):
        refuse_if_bought(check_verifier(SCORERS["exact"][0], ROWS), bound)


class TestCommand:
    @pytest.fixture
    def files(self, tmp_path):
        script, rows = tmp_path / "rewards.py", tmp_path / "rows.jsonl"
        script.write_text(
            "def exact(text, row):\n    return float(text == row['answer'])\n"
            "def all_paid(text, row):\n    return 1.0\ndef none_paid(text, row):\n    return 0.0\n"
            "def longer(completions, **kwargs):\n    return [float(len(text) > 0) for text in completions]\n"
            "bound = 3\n"
        )
        rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
        return script, rows

    def test_codes_and_table(self, files, capsys):
        script, rows = files
        assert main(["verifier", f"{script}:exact", str(rows)]) == 0
        printed = capsys.readouterr()
        assert re.search(r"(?m)^true      right   1.00  0.84 to 1.00 +20 ", printed.out)
        assert printed.err == ""
        assert main(["verifier", f"{script}:longer", str(rows), "--number", "5"]) == 1
        printed = capsys.readouterr()
        assert re.search(r"(?m)^other     wrong   1.00  0.57 to 1.00 +5 ", printed.out)
        assert "can be bought: it pays 1.00 for the kind 'constant'" in printed.err
        assert main(["verifier", f"{script}:longer", str(rows), "--bound", "1"]) == 2
        assert "`bound` from 0 to below 1, got 200 and 1" in capsys.readouterr().err

    def test_the_file_by_hand(self, files, tmp_path, capsys):
        # 1 for every text: of the 20 answers 2 to 40 none is 0, each has another one and a negative.
        script, rows = files
        folder = tmp_path / "new" / "verifier"
        command = ["verifier", f"{script}:all_paid", str(rows), "--output_dir", str(folder), "--bound", "0.2"]
        assert main(command) == 1
        assert capsys.readouterr().out.endswith(f"{folder / 'verifier.json'}\n")
        assert [path.name for path in folder.iterdir()] == ["verifier.json"]
        written = json.loads((folder / "verifier.json").read_text())
        kinds = written.pop("kinds")
        assert written == {
            "reward": f"{script}:all_paid",
            "rows": {"source": str(rows), "split": "train", "number": 20, "seed": 0},
            "answer_column": "answer",
            "template": "{answer}",
            "constant": "0",
            "pays": [0.0, 1.0],
            "bound": 0.2,
            "verdict": {"verdict": "bought", "kinds": ["constant", "other", "negated", "empty"]},
        }
        right = ["true", "spaces", "sentence", "twice"]
        assert [(kind["kind"], kind["right"]) for kind in kinds] == [
            *((name, True) for name in right),
            *((name, False) for name in ("constant", "other", "negated", "empty")),
        ]
        low = 20 / (20 + 1.959963984540054**2)  # Wilson's lower end where all are paid
        for kind in kinds:
            assert (kind["paid"], kind["rows"], kind["row"]) == (1.0, 20, 0)
            assert kind["interval"] == pytest.approx([low, 1.0], abs=1e-12)
        assert kinds[4]["example"] == "0"
        assert kinds[7]["example"] == ""

    def test_verdicts_in_the_file(self, files, tmp_path, capsys):
        script, rows = files
        path = tmp_path / "verifier.json"
        for name, code, verdict in (
            ("exact", 0, {"verdict": "not bought", "kinds": []}),
            ("none_paid", 1, {"verdict": "true answers not paid", "kinds": []}),
            ("longer", 1, {"verdict": "bought", "kinds": ["constant", "other", "negated"]}),
        ):
            assert main(["verifier", f"{script}:{name}", str(rows), "--output_dir", str(tmp_path)]) == code
            assert json.loads(path.read_text())["verdict"] == verdict
        before = path.read_text()
        assert main(["verifier", f"{script}:nothing", str(rows), "--output_dir", str(tmp_path)]) == 2
        assert path.read_text() == before  # an error leaves the old one
        assert main(["verifier", f"{script}:exact", str(rows), "--output_dir", str(rows)]) == 2  # it is a file
        assert "rows.jsonl" in capsys.readouterr().err

    def test_a_kind_without_rows_and_odd_bytes_are_written(self, files, tmp_path):
        script, rows = files
        rows.write_text('{"answer": "yes"}\n')  # no other answer, no number
        template = "\udcff {answer}"  # what a byte of the command line that is no UTF-8 becomes
        command = ["verifier", f"{script}:all_paid", str(rows), "--output_dir", str(tmp_path), "--template", template]
        assert main(command) == 1
        written = json.loads((tmp_path / "verifier.json").read_text())
        assert written["template"] == "? {answer}"
        [negated] = [kind for kind in written["kinds"] if kind["kind"] == "negated"]
        assert (negated["rows"], negated["paid"], negated["interval"]) == (0, None, None)
        assert written["verdict"]["kinds"] == ["constant", "empty"]

    def test_nothing_is_written_without_the_option(self, files, tmp_path, monkeypatch):
        script, rows = files
        monkeypatch.chdir(tmp_path)
        before = sorted(path for path in tmp_path.rglob("*"))
        assert main(["verifier", f"{script}:all_paid", str(rows)]) == 1
        assert sorted(path for path in tmp_path.rglob("*")) == before

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("exact", "FILE.py:NAME or package.module:NAME"),
            ("{script}:nothing", "defines no 'nothing'"),
            ("{script}:bound", "is a int, and no function"),
            ("nowhere.py:exact", "nowhere.py"),
            ("rlhf_recipes.rewards.verifier:nothing", "nothing"),
            ("rlhf_recipes.nothing:exact", "nothing"),
        ],
    )
    def test_what_is_no_reward_is_named(self, files, capsys, name, message):
        script, rows = files
        assert main(["verifier", name.format(script=script), str(rows)]) == 2
        assert message in capsys.readouterr().err

    def test_a_function_of_a_package(self, files, capsys):
        _, rows = files
        assert main(["verifier", "rlhf_recipes.rewards.verifier:paid_table", str(rows)]) == 2
        assert "takes (results" in capsys.readouterr().err


def test_examples_of_the_page_run():
    failed, tried = doctest.testfile(str(Path(__file__).parents[2] / "docs" / "verifier.md"), module_relative=False)
    assert (failed, tried) == (0, 4)
