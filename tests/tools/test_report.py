"""The report: what it shows of a run, that every text is escaped, and that damage costs only what is damaged."""

import json
import math
import re
import runpy
import sys
import warnings
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_recipes.tools.cli import main
from rlhf_recipes.tools.pages.html import printable
from rlhf_recipes.tools.report import write_report
from rlhf_recipes.tools.report.checks import bought
from rlhf_recipes.tools.report.outcome import verdict
from rlhf_recipes.tools.report.parts import shown
from rlhf_recipes.tools.report.reading import Stage, finite, read_runs, series
from tests.tools.runs import HOSTILE, ODD, comparison, ppo_history, record, verifier_record, write_json, write_run


def page_of(*folders, out):
    html = write_report(folders, out).read_text(encoding="utf-8")
    assert html.startswith("<!DOCTYPE html>\n")
    return html, ElementTree.fromstring(html.removeprefix("<!DOCTYPE html>\n"))


def text_of(root):
    return " ".join(" ".join(root.itertext()).split())


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    html, root = page_of(write_run(folder / "world"), out=folder / "report")
    return folder, html, root


def test_the_page_is_well_formed_and_closed(whole):
    _, html, root = whole
    tags = [element.tag.rpartition("}")[2] for element in root.iter()]
    assert {"script", "img", "link", "iframe", "object", "image", "form"}.isdisjoint(tags)
    assert all(element.get("href", "#").startswith("#") for element in root.iter())
    ids = [element.get("id") for element in root.iter() if element.get("id")]
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:url\(#|href="#)([^)"]+)', html)) <= set(ids)
    assert not re.search("https?:", re.sub(r'xmlns(:\w+)?="[^"]*"', "", html))
    assert "default-src 'none'" in html
    assert "width=device-width" in html


def test_every_plot_is_in_the_page_and_beside_it(whole):
    folder, _, root = whole
    svgs = [element for element in root.iter() if element.tag.endswith("}svg")]
    pngs = sorted(path.name for path in (folder / "report").glob("*.png"))
    assert len(svgs) == len(pngs) > 10
    assert {"ppo-reward.png", "ppo-kl.png", "ppo-critic.png", "sft-loss.png", "frontier-training.png"} <= set(pngs)
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in (folder / "report").glob("*.png"))


def test_the_page_has_what_was_run_and_what_came_out(whole):
    text = text_of(whole[2])
    assert "recipes/ppo.py --config x.yaml" in text
    assert "0123456789ab-dirty" in text
    assert "trl 1.16.0" in text
    assert "ppo: It is better than the reference, but was better before" in text
    assert "Win rate 0.800 [0.750, 0.850] by gold_score. Gold score 0.000 → 2.000, reward 0.100 → 2.100, " in text
    assert "at a KL of 2.500 nats per completion. Alarms and warnings: 1 ." in text
    assert "0.840 [0.800, 0.870]" in text
    assert "fell a text" in text
    assert "ppo reward 1.250" in text
    assert "reference gold -0.750" in text
    assert "Can the reward be bought? ppo : It can be bought: it pays for constant 0.500 [0.352, 0.648]." in text
    assert "rollouts of step 120, 16 of them" in text
    assert text.endswith("What is missing Nothing.")


def test_the_same_run_gives_the_same_page(whole, tmp_path):
    folder, html, _ = whole
    assert page_of(folder / "world", out=tmp_path)[0] == html


def test_hostile_texts_are_shown_and_not_run(tmp_path):
    folder = write_run(tmp_path / "a $x^2$ <script>alert(1)</script>&_{".replace("/", "_"), HOSTILE, "<b>ppo")
    other = write_run(tmp_path / "_\u202eb\U0001f600", ODD)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        html, root = page_of(folder, other, out=tmp_path / "out")
    tags = {element.tag.rpartition("}")[2] for element in root.iter()}
    assert {"script", "img", "b"}.isdisjoint(tags)
    assert not root.findall(".//*[@onerror]")
    text = text_of(root)
    assert text.count("alert('x')") > 10
    assert "alert(1)" in text
    assert "\x00" not in html
    assert all(re.fullmatch(r"[a-z-]+\.png", path.name) for path in (tmp_path / "out").glob("*.png"))


def test_hostile_keys_of_metrics_are_escaped(tmp_path):
    rows = [{"step": i, "reward": 3.0, f"rewards/{HOSTILE}/mean": 1.0, "rewards/b/mean": 2.0} for i in (1, 2)]
    write_json(tmp_path / "ppo/trainer_state.json", {"log_history": rows})
    evaluation = {"policy": {}, "win_rate": 0.5, "win_rate_ci": [0.4, 0.6], "win_rate_by": HOSTILE}
    write_json(tmp_path / "ppo/evaluation.json", evaluation)
    _, root = page_of(tmp_path, out=tmp_path / "out")
    assert "alert('x')" in text_of(root)
    assert not [element for element in root.iter() if element.tag.endswith("script")]


def test_names_in_legends_are_no_mathematics(tmp_path):
    for name in ("$x^2$", "$\\frac{$"):
        write_json(tmp_path / name / "ppo/trainer_state.json", {"log_history": ppo_history()})
    html, _ = page_of(tmp_path / "$x^2$", tmp_path / "$\\frac{$", out=tmp_path / "out")
    legend = re.findall(r"<text [^>]*>([^<]*)</text>", html)
    runs = sum("Reward and gold score" in title for title in re.findall("<h3>(.*?)</h3>", html))
    assert runs == 1
    assert legend.count("$x^2$") == legend.count("$\\frac{$") > 5


def test_several_runs_are_compared(tmp_path):
    runs = [write_run(tmp_path / name / "seed") for name in ("one", "two")]
    _, root = page_of(*runs, out=tmp_path / "out")
    text = text_of(root)
    [result] = [rows for table in root.iter("table") if (rows := rows_of(table))[0][1].startswith("win rate")]
    assert [row[0] for row in result] == ["", "●one/seed", "■two/seed", "○reference"]  # the same for both
    assert (
        result[1][1:]
        == result[2][1:]
        == [
            "0.800 [0.750, 0.850]",
            *("-", "2.000", "2.100", "2.500", "18.000", "1", "64", "32", "gold_score"),
        ]
    )
    assert result[3] == ["○reference", "0.5", "0.5", "0.000", "0.100", "2.500", "18.000", "1", "", "", ""]
    assert "one/seed two/seed reward gold_score" in text  # the legend of one plot with all four curves
    assert len(list((tmp_path / "out").glob("ppo-kl*.png"))) == 1
    [first, second] = read_runs(runs)
    assert (first.name, second.name) == ("one/seed", "two/seed")
    assert [stage.name for stage in first.stages] == ["one/seed"] * 3


def test_a_single_stage_is_a_run_and_the_same_folder_counts_once(tmp_path):
    folder = write_run(tmp_path / "world")
    [run] = read_runs([folder / "ppo", folder / "sft" / ".." / "ppo"])
    assert [stage.kind for stage in run.stages] == ["ppo"]
    assert run.missing == []


def test_stages_are_in_the_order_in_which_they_ran(tmp_path):
    write_run(tmp_path)
    write_json(tmp_path / "a_base/run.json", record("base"))
    write_json(tmp_path / "judge/run.json", record("reward"))
    write_json(tmp_path / "judge/evaluation.json", {"accuracy": 0.7})
    write_json(tmp_path / "a_certificate/certificate.json", {"verdict": {}})
    names = [stage.name for stage in read_runs([tmp_path])[0].stages]
    assert names == ["a_base", "sft", "judge", "reward", "a_certificate", "ppo"]


def test_an_empty_folder_has_a_report_that_says_so(tmp_path):
    _, root = page_of(tmp_path, out=tmp_path / "out")
    assert "The folder holds no stage" in text_of(root)


def test_a_run_that_was_cut_off_has_a_report_that_says_what_is_missing(tmp_path):
    folder = write_run(tmp_path / "world")
    ppo = folder / "ppo"
    for name in ("run.json", "evaluation.json", "alarms.json", "policy_evaluation.jsonl"):
        content = (ppo / name).read_text()
        (ppo / name).write_text(content[: len(content) // 2])
    (ppo / "checkpoint-60").mkdir()
    (ppo / "trainer_state.json").rename(ppo / "checkpoint-60/trainer_state.json")
    last = ppo / "completions/completions_00120.parquet"
    last.write_bytes(last.read_bytes()[:200])
    (folder / "sft/trainer_state.json").write_bytes(b"\xff\x00\xfe")
    _, root = page_of(folder, out=tmp_path / "out")
    text = text_of(root)
    for name in ("run.json", "evaluation.json", "alarms.json", "trainer_state.json"):
        assert f"{name} is damaged, perhaps cut off" in text
    assert "policy_evaluation.jsonl: 1 damaged lines are left out." in text
    assert "its log is that of checkpoint-60" in text
    assert "completions_00120.parquet is damaged" in text
    assert "rollouts of step 10" in text
    assert "No win rate against the reference is known." in text
    assert (tmp_path / "out/ppo-kl.png").exists()


def test_a_run_from_another_version_has_a_report(tmp_path):
    write_json(tmp_path / "ppo/run.json", {"stage": "ppo", "parents": "sft", "versions": ["1"], "command": 3})
    write_json(tmp_path / "ppo/trainer_state.json", {"history": []})
    write_json(tmp_path / "ppo/evaluation.json", {"policy": 3, "win_rate": "high", "samples": {"a": 1}})
    write_json(tmp_path / "ppo/frontier.json", {"training": {"points": [1, {}], "fits": {"gold": 1}}})
    write_json(tmp_path / "ppo/alarms.json", [1, {"step": None}])
    write_json(tmp_path / "reward/certificate.json", {"verdict": {"verdict": "unheard of"}})
    write_json(tmp_path / "sft/evaluation.json", [1, 2])
    _, root = page_of(tmp_path, out=tmp_path / "out")
    text = text_of(root)
    assert "trainer_state.json has no list `log_history`" in text
    assert "certificate.json cannot be shown whole, it may be from another version" in text
    assert "evaluation.json must hold a dict, but holds a list." in text


def rows_of(element):
    return [["".join(cell.itertext()) for cell in row] for row in element.iter("tr")]


def cells_of(root, first):
    [cells] = [row for row in rows_of(root) if row[0] == first]
    return cells


def test_a_verifier_stands_beside_the_certificate(tmp_path):
    write_json(tmp_path / "checked/verifier.json", verifier_record("r.py:f"))
    write_json(tmp_path / "certificate/certificate.json", {"verdict": {"verdict": "fit for PPO"}})
    _, root = page_of(tmp_path, out=tmp_path / "out")
    assert cells_of(root, "true") == ["true", "right", "1.000 [0.912, 1.000]", "40", "", "'r.py:f'"]
    assert cells_of(root, "constant") == [
        "constant",
        "wrong",
        "0.500 [0.352, 0.648]",
        "40",
        "above the bound",
        "'r.py:f'",
    ]
    assert cells_of(root, "negated") == ["negated", "wrong", "-", "0", "not tried", ""]
    text = text_of(root)
    assert "r.py:f on 40 rows of r.py:f (train), seed 0. It pays -1 to 3." in text
    assert "a share of 0.100" in text
    assert text.index("Can the reward be bought?") < text.index("Certificate: certificate")
    [box] = [element for element in root.iter("p") if element.get("class") == "verdict bad"]
    assert "".join(box.itertext()) == "checked: It can be bought: it pays for constant 0.500 [0.352, 0.648]."
    # Each names the other, and the links lead there.
    links = {"".join(link.itertext()): link.get("href")[1:] for link in root.iter("a")}
    assert (links["Reward: certificate"], links["Reward: verifier"]) == ("reward-certificate", "reward-verifier")
    places = {element.get("id"): "".join(element.itertext()) for element in root.iter() if element.get("id")}
    assert places["reward-verifier"] == "Can the reward be bought?"
    assert places["reward-certificate"].startswith("Certificate: certificate")
    assert "No curves" not in text  # nobody trains a verifier
    assert "run.json is not there" not in text
    assert "verifier.json" not in text


def test_a_check_links_to_the_other_one_in_another_section(tmp_path):
    write_json(tmp_path / "ppo/run.json", record("ppo"))
    true = {"kind": "true", "right": True, "rows": 40, "paid": 0.85, "interval": None, "example": "x"}
    write_json(tmp_path / "ppo/verifier.json", verifier_record(kinds=[true], verdict="true answers not paid"))
    _, alone = page_of(tmp_path, out=tmp_path / "out")
    assert cells_of(alone, "true") == ["true", "right", "0.850", "40", "too little", "'x'"]
    assert not [link for link in alone.iter("a") if "certificate" in link.get("href")]
    write_json(tmp_path / "reward/certificate.json", {"verdict": {"verdict": "fit for PPO"}})
    _, root = page_of(tmp_path, out=tmp_path / "out")
    links = [link.get("href")[1:] for link in root.iter("a")]
    assert {"ppo-verifier", "reward-certificate"} <= set(links)
    assert set(links) <= {element.get("id") for element in root.iter()}


@pytest.mark.parametrize(
    ("changes", "level", "words"),
    [
        ({}, "bad", "It can be bought: it pays for constant 0.500 [0.352, 0.648]."),
        ({"paid": 0.1, "verdict": "not bought"}, "good", "Not bought"),
        ({"verdict": "not bought"}, "bad", "It can be bought"),  # the numbers count
        ({"paid": 0.0, "verdict": "true answers not paid"}, "bad", "answers are paid too little."),
        ({"verdict": "true answers not paid"}, "bad", "too little. And it pays for constant 0.500"),
        ({"bound": None}, "bad", "It can be bought: it pays for constant."),
        ({"kinds": 3}, "bad", "It can be bought: it pays for constant."),
        ({"bound": None, "verdict": "not bought"}, "care", "is not whole"),
        ({"kinds": [], "verdict": "not bought"}, "care", "is not whole"),
        ({"kinds": [{"kind": "true", "right": True}], "verdict": "not bought"}, "care", "is not whole"),
        ({"paid": 0.0, "verdict": "unheard of"}, "care", "No verdict is known."),
        ({"paid": 0.0, "verdict": ["not bought"]}, "care", "No verdict is known."),
    ],
)
def test_verdicts_on_verifiers(changes, level, words):
    found, sentence = bought(verifier_record(**changes))
    assert found == level
    assert words in sentence
    assert bought({"verdict": {"verdict": "bought"}}) == (
        "bad",
        "It can be bought: which kinds it pays for is not known.",
    )


@pytest.mark.parametrize("text", [HOSTILE, ODD])
def test_texts_of_a_verifier_are_escaped_and_cut(text, tmp_path):
    kind = {"kind": text, "right": False, "rows": 4, "paid": 1.0, "interval": None, "example": text + 900 * "x"}
    rows = {"source": text, "split": text, "number": 4, "seed": 0}
    write_json(tmp_path / "a/verifier.json", verifier_record(text, rows=rows, kinds=[kind]))  # named by its row
    verdict = {"verdict": "bought", "kinds": [text]}
    write_json(tmp_path / "b/verifier.json", verifier_record(text, kinds=[], bound=None) | {"verdict": verdict})
    html, root = page_of(tmp_path, out=tmp_path / "out")
    assert {"script", "img"}.isdisjoint(element.tag.rpartition("}")[2] for element in root.iter())
    boxes = ["".join(element.itertext()) for element in root.iter("p") if element.get("class") == "verdict bad"]
    assert boxes == [
        f"a: It can be bought: it pays for {printable(text)} 1.000.",
        f"b: It can be bought: it pays for {printable(text)}.",
    ]
    assert "xxxx" in html
    assert 120 * "x" not in html


def test_a_verifier_of_which_parts_are_missing_shows_the_others(tmp_path):
    whole = verifier_record()
    damaged = {
        "pays": {"pays": 1},
        "kinds": {"kinds": [3, whole["kinds"][1], {"kind": ["x"], "right": "no", "interval": [1]}]},
        "verdict": {"verdict": None, "kinds": whole["kinds"][:1]},
        "others": {"reward": 7, "rows": ["x"], "bound": "high"},
    }
    for name, changes in damaged.items():
        write_json(tmp_path / name / "verifier.json", whole | changes)
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut/verifier.json").write_text(json.dumps(whole)[:150])
    write_json(tmp_path / "list/verifier.json", [whole])
    _, root = page_of(tmp_path, out=tmp_path / "out")
    text = text_of(root)
    assert text.count("It can be bought: it pays for constant 0.500") == 2  # pays, kinds
    assert "others : It can be bought: it pays for constant." in text
    assert "verdict : No verdict is known." in text
    assert "- on - rows of - (-), seed -." in text
    assert "verifier.json is damaged, perhaps cut off" in text
    assert "verifier.json must hold a dict, but holds a list." in text
    missing = text[text.rindex("What is missing") :]
    assert missing.count("verifier.json cannot be shown whole, it may be from another version.") == 3


def test_metrics_that_are_no_numbers_are_gaps_and_said(tmp_path):
    history = ppo_history()
    history[3]["kl"], history[4]["kl"], history[5]["kl"] = math.nan, None, "much"
    for entry in history:
        entry["entropy"] = math.inf
    write_json(tmp_path / "ppo/trainer_state.json", {"log_history": history})
    write_json(tmp_path / "ppo/evaluation.json", comparison(gold=(math.nan, 0.0), rate=(math.nan, 0.1, 0.2)))
    _, root = page_of(tmp_path, out=tmp_path / "out")
    text = text_of(root)
    assert "kl is no finite number in 3 log entries, first at step 40." in text
    assert "entropy is no finite number in 12 log entries, first at step 10." in text
    assert (tmp_path / "out/ppo-kl.png").exists()
    assert not (tmp_path / "out/ppo-entropy.png").exists()


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


ANSWER = st.dictionaries(st.sampled_from(["kind", "right", "rows", "paid", "interval", "example"]), JSON)
VERIFIER = st.fixed_dictionaries(
    {},
    optional={
        **dict.fromkeys(("reward", "pays", "bound"), JSON),
        "rows": JSON | st.dictionaries(st.sampled_from(["source", "split", "number", "seed"]), JSON),
        "kinds": JSON | st.lists(JSON | ANSWER, max_size=3),
        "verdict": JSON
        | st.fixed_dictionaries(
            {"verdict": JSON | st.sampled_from(["bought", "not bought", "true answers not paid"]), "kinds": JSON}
        ),
    },
)


@given(
    st.lists(JSON, min_size=4, max_size=4),
    st.dictionaries(st.sampled_from(["step", "kl", "loss"]), JSON),
    JSON | VERIFIER,
)
def test_any_json_has_a_report(tmp_path_factory, values, entry, pays):
    folder = tmp_path_factory.mktemp("any")
    names = ("run.json", "evaluation.json", "certificate.json", "frontier.json")
    for name, value in zip(names, values, strict=True):
        write_json(folder / name, value)
    write_json(folder / "trainer_state.json", {"log_history": [entry]})
    write_json(folder / "alarms.json", [values[0]])
    write_json(folder / "verifier.json", pays)
    write_json(folder / "alone/verifier.json", pays)
    _, root = page_of(folder, out=folder / "out")
    assert "could not be made" not in text_of(root)


def test_the_command_prints_the_path(tmp_path, capsys, monkeypatch):
    write_json(tmp_path / "run/sft/evaluation.json", {"loss": 1.0})
    path = tmp_path / "run/report/report.html"
    assert main(["report", str(tmp_path / "run")]) == 0
    assert capsys.readouterr().out == f"{path}\n"
    assert path.exists()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["report", "run", "--output_dir", "elsewhere"])
    monkeypatch.delitem(sys.modules, "rlhf_recipes.tools.report.__main__", raising=False)
    with pytest.raises(SystemExit) as stopped:  # as `python -m` does
        runpy.run_module("rlhf_recipes.tools.report", run_name="__main__")
    assert stopped.value.code == 0
    assert capsys.readouterr().out == "elsewhere/report.html\n"
    assert (tmp_path / "elsewhere/report.html").exists()


def test_a_folder_that_is_not_there_is_an_error(tmp_path, capsys):
    assert main(["report", str(tmp_path / "nothing")]) == 2
    assert "nothing must be the folder of a recipe or a stage" in capsys.readouterr().err
    with pytest.raises(ValueError, match="at least one folder"):
        write_report([])


@pytest.mark.parametrize(
    ("changes", "level", "words"),
    [
        ({}, "good", "better than the reference"),
        ({"rate": (0.52, 0.48, 0.56)}, "care", "cannot be told from"),
        ({"rate": (0.4, 0.35, 0.45)}, "bad", "worse than"),
        ({"gold": (-1.0, 0.0)}, "bad", "fools its reward model"),
        ({"by": "reward_score", "gold": (None, None)}, "care", "says little"),
        ({"rate": (None, 0.5, 0.6)}, "care", "No win rate"),
    ],
)
def test_verdicts(changes, level, words, tmp_path):
    stage = Stage("ppo", tmp_path, records={"evaluation.json": comparison(**changes)})
    found, sentence = verdict(stage)
    assert found == level
    assert words in sentence


def test_a_policy_that_was_better_before_is_not_called_good(tmp_path):
    alarms = [{"kind": "length_drift", "step": 3}, {"kind": "over_optimization", "step": 4}]
    stage = Stage("ppo", tmp_path, records={"evaluation.json": comparison()}, alarms=alarms)
    found, sentence = verdict(stage)
    assert found == "bad"
    assert "fell in training" in sentence
    stage.alarms = alarms[:1]
    assert verdict(stage)[0] == "good"


def test_numbers_and_texts():
    values = (0.00004, 12, 1234567.0, True, "1", 10**400)
    assert [shown(value) for value in values] == ["4e-05", "12", "1.23e+06", "-", "-", "-"]
    assert shown(0.5, [0.1, math.nan]) == "0.500"
    assert not finite(-math.inf)
    assert finite(-3)
    assert series([{"step": 1, "a": 2}, {"step": 2}, {"step": 3, "a": 4.5}], "a") == ([1, 3], [2.0, 4.5])
