"""What a report shows first and how it draws: result, samples, colours, axes, intervals, the law's table."""

import re
from xml.etree import ElementTree

import pytest
from matplotlib.figure import Figure

from rlhf_recipes.tools.pages.colours import CRITIC, GOLD, KL, POLICY, POLICY_LOOK, REFERENCE, REWARD
from rlhf_recipes.tools.report import outcome, write_report
from rlhf_recipes.tools.report.drawing import plot_win_rates, run_looks
from rlhf_recipes.tools.report.frontiers import frontiers
from rlhf_recipes.tools.report.outcome import comparison as table_of
from rlhf_recipes.tools.report.outcome import numbers
from rlhf_recipes.tools.report.reading import Stage, gold_metric, read_runs
from rlhf_recipes.tools.report.samples import all_samples
from tests.tools.runs import comparison, ppo_history, write_json, write_run

_HEIGHT = r"[ML] \S+ (\S+)"  # in the path of an SVG
COLOURS = {POLICY, REFERENCE, REWARD, GOLD, KL, CRITIC}


def page_of(*folders, out):
    html = write_report(folders, out).read_text(encoding="utf-8")
    return ElementTree.fromstring(html.removeprefix("<!DOCTYPE html>\n"))


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    return page_of(write_run(folder / "world"), out=folder / "report")


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    folder = tmp_path_factory.mktemp("several")
    return page_of(*(write_run(folder / name) for name in ("first", "second")), out=folder / "report")


def plots(root):
    """The SVGs by their names."""
    found = [element for element in root.iter() if element.tag.rpartition("}")[2] == "svg"]
    return {next(part.get("id") for part in svg.iter() if part.get("id")).rpartition("-")[0]: svg for svg in found}


def colours_of(svg):
    """The colours of its lines, points and areas that stand for something."""
    styles = " ".join(element.get("style", "") for element in svg.iter())
    return set(re.findall(r"#[0-9a-f]{6}", styles)) & COLOURS


def ticks(svg, axis):
    """The places and labels of an axis."""
    found = {}
    for group in svg.iter():
        if re.search(rf"-{axis}tick_\d+$", group.get("id", "")):
            use = next(element for element in group.iter() if element.tag.endswith("use"))
            label = "".join(text.text for text in group.iter() if text.tag.endswith("text"))
            found[float(label.replace("\N{MINUS SIGN}", "-"))] = float(use.get(axis))
    return found


def value_at(svg, place):
    """The value at a height of the plot, by two ticks of its axis."""
    (one, first), (two, second), *_ = sorted(ticks(svg, "y").items())
    return one + (place - first) / (second - first) * (two - one)


def test_a_thing_has_one_colour_in_all_plots(one):
    found = {name: colours_of(svg) for name, svg in plots(one).items()}
    expected = {
        "ppo-reward": {REWARD, GOLD},
        "ppo-held-out": {REWARD, GOLD},
        "frontier-training": {REWARD, GOLD},
        "ppo-kl": {KL},
        "ppo-length": {POLICY},
        "ppo-entropy": {POLICY},
        "ppo-win-rate": {POLICY, REFERENCE},
        "result-win-rates": {POLICY, REFERENCE},
        "ppo-critic": {CRITIC, REFERENCE},
        "ppo-clip": {POLICY},
        "ppo-learning-rate": set(),
        "sft-loss": {POLICY},
        "reward-accuracy": {REWARD, REFERENCE},
        "reward-margin": {REWARD},
    }
    assert {name: found[name] for name in expected} == expected


def test_a_run_has_one_colour_in_all_plots_and_beside_its_name(several):
    signs = {}
    for element in several.iter("span"):
        if element.get("class") == "sign" and element.tail in ("first", "second"):
            signs.setdefault(element.tail, set()).add((element.text, element.get("style")))
    assert signs == {"first": {("●", f"color:{POLICY}")}, "second": {("■", f"color:{REWARD}")}}
    found = {name: colours_of(svg) - {REFERENCE} for name, svg in plots(several).items()}
    assert len(found) > 15
    assert {name: colours for name, colours in found.items() if colours != {POLICY, REWARD}} == {}


def test_a_run_that_is_there_with_others_in_one_kind_only_keeps_its_colour(tmp_path):
    for name, kinds in {"a": ("sft", "ppo"), "b": ("ppo",), "c": ("reward", "ppo")}.items():
        for kind in kinds:
            write_json(tmp_path / name / kind / "trainer_state.json", {"log_history": ppo_history(2)})
            write_json(tmp_path / name / kind / "run.json", {"stage": kind})
    stages = [stage for run in read_runs([tmp_path / name for name in "abc"]) for stage in run.stages]
    looks = run_looks(stages)
    assert list(looks) == ["a", "b", "c"]
    assert [stage.name for stage in stages] == ["a", "a", "b", "c", "c"]
    assert run_looks([stage for stage in stages if stage.name == "a"]) == {}


def test_axes_hold_what_has_a_meaning(one):
    found = plots(one)
    for name in ("ppo-win-rate", "ppo-clip", "ppo-critic", "sft-accuracy", "reward-accuracy", "ppo-diversity"):
        assert {0.0, 1.0} <= set(ticks(found[name], "y")), name
    for name in ("ppo-kl", "ppo-length", "ppo-entropy", "sft-loss", "reward-loss", "ppo-learning-rate"):
        assert 0.0 in ticks(found[name], "y"), name
    for name in ("ppo-reward", "ppo-kl", "sft-loss", "frontier-training"):
        assert min(ticks(found[name], "x")) == 0.0, name


@pytest.mark.parametrize(("spread", "least"), [(None, 1.0), (8.0, 8.0)])
def test_noise_does_not_fill_a_plot(spread, least, tmp_path):
    rewards = [5.0, 5.02, 4.99, 5.01]
    history = [{"step": i, "kl": 0.0, "reward": reward} for i, reward in enumerate(rewards)]
    for row in history if spread else ():
        row["reward_std"] = spread
    write_json(tmp_path / "ppo/trainer_state.json", {"log_history": history})
    svg = plots(page_of(tmp_path, out=tmp_path / "out"))["ppo-reward"]
    edge = next(group for group in svg.iter() if group.get("id", "").endswith("patch_2"))
    heights = [float(y) for path in edge for y in re.findall(_HEIGHT, path.get("d"))]
    low, high = sorted((value_at(svg, min(heights)), value_at(svg, max(heights))))
    assert high - low == pytest.approx(1.08 * least, rel=0.01)
    assert (low + high) / 2 == pytest.approx(5.005, abs=0.01)


def test_intervals_are_drawn(one):
    svg = plots(one)["ppo-win-rate"]
    [band] = [group for group in svg.iter() if "FillBetweenPolyCollection" in group.get("id", "")]
    heights = [float(y) for path in band.iter() if path.get("d") for y in re.findall(_HEIGHT, path.get("d"))]
    shift = next((float(use.get("y")) for use in band.iter() if use.tag.endswith("use")), 0.0)
    ends = sorted(value_at(svg, height + shift) for height in heights)
    assert (ends[0], ends[-1]) == pytest.approx((0.54, 0.85), abs=0.005)
    # The reward model's held-out accuracy is measured at the end only, with an interval.
    accuracy = plots(one)["reward-accuracy"]
    bars = [group for group in accuracy.iter() if "LineCollection" in group.get("id", "")]
    paths = [path.get("d") for group in bars for path in group.iter() if path.get("d")]
    heights = [float(y) for path in paths for y in re.findall(_HEIGHT, path)]
    assert sorted(value_at(accuracy, height) for height in heights) == pytest.approx([0.8, 0.87], abs=0.005)


def test_win_rates_are_drawn_with_their_intervals():
    axes = Figure().add_subplot()
    plot_win_rates(axes, [("a $x$", 0.8, (0.7, 0.9), POLICY_LOOK), ("b", 0.4, (0.2, 0.6), POLICY_LOOK)])
    lines = [list(line.get_xdata()) for line in axes.get_lines()]
    assert lines == [[0.5, 0.5], [0.7, 0.9], [0.8], [0.2, 0.6], [0.4]]
    assert axes.get_xlim() == (0.0, 1.0)
    assert [text.get_text() for text in axes.texts] == ["a $x$", "b"]


def test_plots_are_told_in_words(one, several):
    words = plots(one)["ppo-kl"].get("aria-label")
    assert words == (
        "KL to the reference, nats per completion, over the optimizer steps. KL: 0.3 at step 10, 3.6 at step 120."
    )
    words = plots(several)["ppo-kl"].get("aria-label")
    assert words.endswith("first, KL: 0.3 at step 10, 3.6 at step 120. second, KL: 0.3 at step 10, 3.6 at step 120.")
    words = plots(one)["result-win-rates"].get("aria-label")
    assert words == "Win rates with their 95 % intervals: ppo 0.800 [0.750, 0.850]."


def stage_of(folder, **records):
    records = {f"{name}.json": record for name, record in records.items()}
    return Stage("ppo", folder, "ppo", records, ppo_history(), alarms=[])


def test_the_numbers_of_a_verdict(tmp_path):
    assert numbers(stage_of(tmp_path, evaluation=comparison())) == (
        "Win rate 0.800 [0.750, 0.850] by gold_score. Gold score 0.000 → 2.000, reward 0.100 → 2.100, at a KL of "
        "2.500 nats per completion."
    )
    without = comparison(gold=(None, None), by="reward_score")
    assert "by reward_score. Reward 0.100 → 2.100, at a KL" in numbers(stage_of(tmp_path, evaluation=without))
    cut = stage_of(tmp_path)
    assert numbers(cut) == "Last logged: gold score 0.600 at step 120, reward 1.200 at step 120, KL 3.600 at step 120."
    assert numbers(Stage("ppo", tmp_path, "ppo")) == ""


def test_the_average_of_a_policys_weights_has_a_row_of_its_own(tmp_path):
    evaluation = comparison()
    ema = {**evaluation["policy"], "gold_score": 1.25, "win_rate": 0.625, "win_rate_ci": [0.5, 0.75]}
    assert "average of its weights" not in table_of([stage_of(tmp_path / "a", evaluation=evaluation)], {})
    text = table_of([stage_of(tmp_path / "b", evaluation={**evaluation, "ema": ema})], {})
    (row,) = [line for line in text.split("<tr>") if "average of its weights" in line]
    assert "0.625 [0.500, 0.750]" in row
    assert "1.250" in row


def test_gold_is_what_the_frontier_was_made_of(tmp_path):
    history = [
        {"step": i, "reward": 1.0 * i, "rewards/reward/mean": 1.5 * i, "rewards/brief/mean": -0.5 * i} for i in (1, 2)
    ]
    points = [{"step": i, "distance": 1.0, "reward": 1.0 * i, "gold": -0.5 * i} for i in (1, 2)]
    stage = Stage("ppo", tmp_path, "ppo", {}, history)
    assert gold_metric(stage) is None  # a penalty is no judge
    stage.records["frontier.json"] = {"training": {"points": [3, {"step": [], "gold": 1.0}, *points]}}
    assert gold_metric(stage) == "rewards/brief/mean"
    stage = Stage("ppo", tmp_path, "ppo", {}, [{"step": 1, "reward": 1.0, "rewards/gold_score/mean": 1.0}])
    assert gold_metric(stage) is None  # the only reward is what is trained on
    stage.history[0]["rewards/reward/mean"] = 2.0
    assert gold_metric(stage) == "rewards/gold_score/mean"


def test_samples_of_the_same_prompts_stand_side_by_side(tmp_path):
    def stage(name, prompts, reference):
        sides = {"policy_gold": 1.5, "reference_gold": 0.5, "outcome": "win"}
        rows = [{"prompt": p, "policy": f"{name} {p}", "reference": f"{reference} {p}", **sides} for p in prompts]
        return Stage(name, tmp_path, "ppo", {"evaluation.json": {"samples": rows}})

    html = all_samples([stage("a", "xy", "same"), stage("b", "xy", "same"), stage("c", "z", "other")], {})
    cards = re.findall(r'<div class="sample">.*?</div></div></div>', html)
    assert [re.findall(r"<pre>(.*?)</pre>", card) for card in cards] == [
        ["x", "same x", "a x", "b x"],
        ["y", "same y", "a y", "b y"],
        ["z", "other z", "c z"],
    ]
    assert re.findall("<h3>(.*?)</h3>", html) == ["a, b", "c"]
    assert html.count("<strong>win</strong>") == 5
    assert cards[0].index("reference") < cards[0].index("a x")
    apart = all_samples([stage("a", "x", "one"), stage("b", "x", "two")], {})
    assert re.findall(r"<pre>(.*?)</pre>", apart) == ["x", "one x", "a x", "two x", "b x"]


def law(points, **fit):
    fit = {
        "form": "rl",
        "start": 0.1,
        "alpha": 2.0,
        "beta": 1.0,
        "peak": 2.7,
        "peak_score": 2.8,
        "residual": 0.05,
    } | fit
    points = [{"step": i, "distance": d, "gold": gold} for i, (d, gold) in enumerate(points)]
    return {"training": {"points": points, "fits": {"gold": fit}}, "evaluation": {"points": [], "fits": {}}}


@pytest.mark.parametrize(
    ("fit", "caution"),
    [
        ({}, ""),
        ({"peak": 4.2}, "the peak is beyond the run: a guess"),
        ({"residual": 0.4}, "the curve misses the points"),
        ({"peak": None, "peak_score": None}, ""),
    ],
)
def test_the_law_is_explained_and_marked_where_it_is_a_guess(fit, caution, tmp_path):
    points = [(0.2 * i, 0.1 * i) for i in range(1, 21)]
    html = frontiers([stage_of(tmp_path, frontier=law(points, **fit))], tmp_path, {})
    cells = re.findall(r"<td[^>]*>(.*?)</td>", html)
    assert cells[1:5] == ["Rollouts: gold", "0.100", "2.000", "1.000"]
    assert cells[7] == "4.000"  # as far as the run went
    assert cells[-1] == caution
    terms = re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", html)
    assert [term for term, _ in terms] == ["start", "alpha", "beta", "peak at d", "furthest d", "residual"]
    assert "score(d) = start + d (alpha - beta ln d)" in html
    assert "Do not trust a fit that the last column marks." in html


def test_policies_of_several_runs_are_points_beside_their_reference(tmp_path, monkeypatch):
    drawn = {}

    def plot(axes, curves, looks):
        drawn[len(drawn)] = [(name, curve["points"][0]) for name, curve in curves]

    monkeypatch.setattr("rlhf_recipes.tools.report.frontiers.plot_frontier", plot)
    stages = []
    expected = [(1.0, (1.0, 1.5)), (2.0, (2.0, 3.0)), (4.0, (0.5, 4.0))]
    for number, (distance, (gold, reward)) in enumerate(expected):
        record = comparison(gold=(gold, -0.5), reward=(reward, 0.5))
        record["policy"]["kl"] = distance**2
        stages.append(stage_of(tmp_path / str(number), evaluation=record))
    html = frontiers(stages, tmp_path, {})
    assert "The policies at their ends" in html
    points = [(name, point["distance"], point["gold"], point["reward"]) for name, point in drawn[len(drawn) - 1]]
    assert points == [("reference", 0.0, -0.5, 0.5), *(("ppo", d, *scores) for d, scores in expected)]
    assert "The policies at their ends" not in frontiers(stages[:1], tmp_path, {})


def test_the_win_rate_at_equal_length_stands_beside_the_other(tmp_path):
    record = comparison() | {"length_controlled_win_rate": 0.61, "length_controlled_win_rate_ci": [0.52, 0.7]}
    cells = re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", outcome.comparison([stage_of(tmp_path, evaluation=record)], {}))
    assert cells[1:3] == ["win rate [95 % interval]", "at equal length"]
    assert any("0.610" in cell and "0.520" in cell for cell in cells)
