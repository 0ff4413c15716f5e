import json
import resource
import socket
import subprocess
import sys

import pytest

from rlhf_recipes.tools.cli import main
from rlhf_recipes.tools.labeling.database import create
from rlhf_recipes.tools.labeling.records import Answer
from rlhf_recipes.tools.labeling.store import Store
from tests.tools.labeling.conftest import pairs

ROW = {"prompt": "q", "response_a": "x", "response_b": "y"}


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(ROW | {"prompt": f"q{n}"}) + "\n" for n in range(3)))
    return path


@pytest.fixture
def refused(capsys, monkeypatch):
    """Run the command, which must fail before it serves; return what it says."""
    monkeypatch.delenv("RLHF_RECIPES_LABEL_PASSWORD", raising=False)

    def run(*words):
        assert main(["label", *map(str, words)]) == 2
        return capsys.readouterr().err

    return run


def test_help_is_fast():
    def seconds():  # of the processor, which others may keep busy
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    program = "from rlhf_recipes.tools.cli import main; main(['label', '--help'])"
    before = seconds()
    finished = subprocess.run([sys.executable, "-X", "importtime", "-c", program], capture_output=True, text=True)
    assert seconds() - before < 1
    assert "--labels_per_item K" in finished.stdout
    imported = {line.rpartition("|")[2].strip() for line in finished.stderr.splitlines()}
    assert "rlhf_recipes.tools.labeling.command" in imported
    assert not imported & {"torch", "numpy", "datasets", "fastapi", "sqlite3"}


def test_more_than_this_machine_needs_a_password(refused, data, tmp_path, monkeypatch):
    words = ("--db", tmp_path / "a.sqlite", "--data", data, "--host", "0.0.0.0")
    assert "Others could reach 0.0.0.0, and there is no password" in refused(*words)
    assert "Give at least 8" in refused(*words, "--password", "short")
    monkeypatch.setenv("RLHF_RECIPES_LABEL_PASSWORD", "")
    assert "The password has 0 characters" in refused(*words)
    assert not (tmp_path / "a.sqlite").exists()


def test_bad_rows_are_refused_and_leave_no_file(refused, data, tmp_path):
    data.write_text(json.dumps(ROW) + "\n" + json.dumps(ROW | {"response_b": ""}) + "\n")
    message = refused("--db", tmp_path / "a.sqlite", "--data", data)
    assert message.startswith("rlhf-recipes label: 1 of 2 rows cannot be used: 1 x empty `response_b`")
    assert "row 1 in line 2" in message
    assert [path.name for path in tmp_path.iterdir()] == ["pairs.jsonl"]


def test_a_database_of_other_data_is_refused(refused, data, tmp_path):
    create(tmp_path / "a.sqlite", pairs(2), source="old.jsonl")
    message = refused("--db", tmp_path / "a.sqlite", "--data", data)
    assert "holds judgements of other data (2 rows of old.jsonl)" in message
    assert "was made with the seed 0, got 1" in refused("--db", tmp_path / "a.sqlite", "--seed", 1)
    assert "Expected a database of labels" in refused("--db", data) or "cannot be read" in refused("--db", data)
    assert "Name the answers to compare with `--data`" in refused("--db", tmp_path / "none.sqlite")


def test_a_taken_port_is_said(refused, data, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        message = refused("--db", tmp_path / "a.sqlite", "--data", data, "--port", taken.getsockname()[1])
    assert "Address already in use" in message


def test_an_export_is_written_once(refused, tmp_path, capsys):
    create(tmp_path / "a.sqlite", pairs(1))
    store = Store(tmp_path / "a.sqlite")
    ann = store.session(store.sign_in("Ann"))
    store.judge(ann, store.show(ann).number, Answer("ranked", [2, 1], "much"))
    store.close()
    words = ["label", "--db", str(tmp_path / "a.sqlite"), "--export", str(tmp_path / "prefs.jsonl")]
    assert main(words) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'prefs.jsonl'}: 1 rows\n"
    assert json.loads((tmp_path / "prefs.jsonl").read_text())["label"] == 0.0
    assert "is there already" in refused(*words[1:])
    assert "Leave out `--data`" in refused(*words[1:], "--data", "x")


def test_rows_are_added_once_also_while_the_database_is_open(refused, data, tmp_path, capsys):
    database, more = tmp_path / "labels.sqlite", tmp_path / "more.jsonl"
    more.write_text(json.dumps(ROW) + "\n")
    assert "There is no" in refused("--db", database, "--add", more)
    create(database, pairs(2))
    served = Store(database)
    assert main(["label", "--db", str(database), "--add", str(more)]) == 0
    assert "1 items added, 3 in all" in capsys.readouterr().out
    assert served.items()[2].row["prompt"] == "q"
    assert main(["label", "--db", str(database), "--add", str(more)]) == 0
    assert "has the rows of" in capsys.readouterr().out
    assert len(served.items()) == 3
    served.close()
    assert "Leave out `--data`" in refused("--db", database, "--add", more, "--data", data)
    more.write_text(json.dumps(ROW | {"prompt": "another"}) + "\n")
    assert "other items under the name" in refused("--db", database, "--add", more)
