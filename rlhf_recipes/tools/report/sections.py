"""The sections of a report. Everything that comes from disk may be anything: it is checked, and escaped."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf_recipes.statistics.frontier import frontier
from rlhf_recipes.tools.pages.certificate import sections, verdict_section
from rlhf_recipes.tools.pages.html import clean, table
from rlhf_recipes.tools.report.drawing import draw_charts, figure, plot_frontier
from rlhf_recipes.tools.report.reading import KINDS, Run, Stage, finite
from rlhf_recipes.tracking import differing_settings, read_settings

_TITLES = {"sft": "SFT", "reward": "Reward", "ppo": "PPO"}
_LONGEST = 120  # characters of a verifier's texts
_VALUES = reprlib.Repr()  # of settings, however long or deep they are
_VALUES.maxlevel, _VALUES.maxlist, _VALUES.maxdict, _VALUES.maxstring, _VALUES.maxother = 2, 20, 20, _LONGEST, _LONGEST
_MEASURES = ("gold_score", "reward_score", "kl", "length", "eos_rate")
_WORDS = {
    "loss": "held-out loss, nats per token",
    "perplexity": "held-out perplexity",
    "accuracy": "held-out pair accuracy",
    "margin": "mean of chosen minus rejected score",
    "chosen_score": "mean score, chosen",
    "rejected_score": "mean score, rejected",
    "n": "rows",
}


def wide(header: Iterable[object], rows: Iterable[Iterable[object]]) -> str:
    """Write a table that scrolls in its own box where the page is narrow."""
    return f'<div class="wide">{table(header, rows)}</div>'


def shown(value: Any, ends: Any = None) -> str:
    """Write a number, perhaps with the ends of its interval; a dash for what is no number.

    Example:
        >>> shown(0.79931, [0.7729, 0.8232]), shown(576), shown(float("nan")), shown("<b>"), shown(0.00003)
        ('0.799 [0.773, 0.823]', '576', '-', '-', '3e-05')
    """
    if not finite(value):
        return "-"
    text = str(value) if isinstance(value, int) else f"{value:.3f}" if 0.001 <= abs(value) < 1e6 else f"{value:.3g}"
    if isinstance(ends, list | tuple) and len(ends) == 2 and all(map(finite, ends)):
        text += f" [{ends[0]:.3f}, {ends[1]:.3f}]"
    return text


def lineage(runs: Sequence[Run]) -> str:
    """Write what was run: stages, commands, commits, versions."""
    rows, commands, versions = [], [], []
    for run in runs:
        for stage in run.stages:
            record, state = stage.record("run"), stage.record("trainer_state")
            parents = record.get("parents")
            paths = [parent.get("path") for parent in parents or [] if isinstance(parent, dict)]
            seconds = next((row["train_runtime"] for row in stage.history if finite(row.get("train_runtime"))), None)
            rows.append(
                (
                    *([run.name] if len(runs) > 1 else []),
                    stage.folder.name,
                    record.get("stage") or (f"{stage.kind} (a guess)" if stage.trained else "-"),
                    _short(record.get("git_commit")),
                    ", ".join(map(str, paths)) or "-",
                    shown(state.get("global_step")),
                    "-" if seconds is None else f"{seconds:.0f}",
                    record.get("wandb_run_id") or "-",
                )
            )
            if record.get("command"):
                commands.append(f"<h3>{clean(stage.folder)}</h3><pre>{clean(record['command'])}</pre>")
            versions.append((str(stage.folder), record.get("versions")))
    header = ("folder", "stage", "commit", "starts from", "steps", "seconds", "W&B run")
    return (
        wide((*(["run"] if len(runs) > 1 else []), *header), rows)
        + f"<details open='open'><summary>Commands</summary>{''.join(commands) or 'None is known.'}</details>"
        + _versions(versions)
    )


def _short(commit: Any) -> str:
    """The first 12 digits, and whether files were changed since."""
    return "-" if not commit else str(commit)[:12] + ("-dirty" if str(commit).endswith("-dirty") else "")


def _versions(stages: Sequence[tuple[str, Any]]) -> str:
    groups: dict[str, list[str]] = {}
    for folder, versions in stages:
        if isinstance(versions, Mapping):
            groups.setdefault(", ".join(f"{name} {value}" for name, value in versions.items()), []).append(folder)
    lines = [(text, "all stages" if len(groups) == 1 else ", ".join(folders)) for text, folders in groups.items()]
    return f"<details><summary>Versions</summary>{wide(('packages', 'in'), lines)}</details>" if lines else ""


def training(kind: str, stages: Sequence[Stage], folder: Path, everything: Sequence[Stage]) -> str:
    """Held-out numbers and curves of one kind of stage, and the checks of a reward: verifier and certificate.

    Args:
        kind: `sft`, `reward` or `ppo`.
        stages: The stages of this kind.
        folder: Where the plots go.
        everything: The stages of all kinds: a check of one kind links to the other one, wherever that is.

    Returns:
        HTML.
    """
    trained = [stage for stage in stages if stage.trained]
    records = [stage.record("evaluation") for stage in trained]
    names = [name for name in _WORDS if any(finite(record.get(name)) for record in records)]
    parts = []
    if names and kind != "ppo":
        rows = [
            (_WORDS[name], *(shown(record.get(name), record.get(f"{name}_ci")) for record in records))
            for name in names
        ]
        parts.append(wide(("", *(stage.name for stage in trained)), rows))
    figures = draw_charts(kind, trained, folder)
    if figures:
        parts.append(_plots(figures))
    elif not all(stage.only_checks for stage in stages):
        parts.append(_note("No curves: nothing was logged."))
    if verified := [verifier(stage) for stage in stages if stage.record("verifier")]:
        lead = "For a learned reward model, the probes of its certificate ask what it pays for"
        parts.append(f'<h3 id="{kind}-verifier">Can the reward be bought?</h3>{"".join(verified)}')
        parts.append(_link("certificate", lead, everything))
    if certified := [stage for stage in stages if stage.record("certificate")]:
        lead = "The probes (sensitivity) ask what a learned reward model pays for; which wrong answers a function pays"
        parts.append(f'<div id="{kind}-certificate">')
        parts += [f"<h3>Certificate: {clean(stage.name)}</h3>{_certificate(stage)}" for stage in certified]
        parts.append(f"{_link('verifier', lead, everything)}</div>")
    return "".join(parts)


def _link(name: str, lead: str, everything: Sequence[Stage]) -> str:
    """Write a sentence with links to where the page has this check of a reward; nothing if it has none."""
    kinds = [kind for kind in KINDS if any(stage.kind == kind and stage.record(name) for stage in everything)]
    links = ", ".join(f'<a href="#{kind}-{name}">{clean(_TITLES[kind])}: {name}</a>' for kind in kinds)
    return f'<p class="note">{clean(lead)}: {links}.</p>' if links else ""


def verifier(stage: Stage) -> str:
    """Write what a reward pays for right and for wrong answers, from `verifier.json`, as far as the file can be read.

    Args:
        stage: Its `missing` gets a sentence if the file cannot be shown whole.

    Returns:
        HTML: the verdict, what was tried, and the kinds of answers, with a mark at those that are paid wrongly.
    """
    record = stage.record("verifier")
    level, sentence = bought(record)
    if level == "care" or not _whole(record):
        stage.missing.append("verifier.json cannot be shown whole, it may be from another version.")
    rows, pays = record.get("rows"), record.get("pays")
    drawn: Mapping[str, Any] = rows if isinstance(rows, dict) else {}
    ends = [f"{end:g}" if finite(end) else "-" for end in pays] if isinstance(pays, list) and len(pays) == 2 else ["-"]
    tried = (
        f"{_text(record.get('reward'))} on {shown(drawn.get('number'))} rows of {_text(drawn.get('source'))} "
        f"({_text(drawn.get('split'))}), seed {shown(drawn.get('seed'))}. It pays {' to '.join(ends)}. Wrong answers "
        f"may get a share of {shown(record.get('bound'))} on average, the rows' own answers lose no more than that."
    )
    kinds = [
        (
            _text(row.get("kind")),
            ("right" if row["right"] else "wrong") if isinstance(row.get("right"), bool) else "-",
            shown(row.get("paid"), row.get("interval")),
            shown(row.get("rows")),
            _mark(row, record),
            "" if row.get("rows") == 0 else repr(_text(row.get("example"))),
        )
        for row in _kinds(record)
    ]
    header = ("answer", "", "paid [95 % interval]", "rows", "", "best paid wrong, worst paid right text")
    box = f'<p class="verdict {level}"><strong>{clean(stage.name)}</strong>: {clean(sentence)}</p>'
    return box + _note(tried) + (wide(header, kinds) if kinds else "")


def bought(record: Mapping[str, Any]) -> tuple[str, str]:
    """Say in one sentence whether a reward can be had without the answer.

    Args:
        record: What `verifier.json` holds, perhaps damaged. A kind above the bound counts whatever verdict is written.

    Returns:
        `good`, `bad`, or `care` where the file does not say or not all of it can be read; and the sentence.

    Example:
        >>> kinds = [{"kind": "negated", "right": False, "rows": 20, "paid": 0.5, "interval": [0.3, 0.7]}]
        >>> bought({"bound": 0.1, "kinds": kinds, "verdict": {"verdict": "bought", "kinds": ["negated"]}})
        ('bad', 'It can be bought: it pays for negated 0.500 [0.300, 0.700].')
        >>> bought({"verdict": {"verdict": "not bought"}})[0]
        'care'
    """
    value: Any = record.get("verdict")
    written = value if isinstance(value, dict) else {}
    above = [row for row in _kinds(record) if _above(row, record)]
    paid = [f"{_text(row.get('kind'))} {shown(row['paid'], row.get('interval'))}" for row in above]
    if not paid and isinstance(written.get("kinds"), list):
        paid = [_text(kind) for kind in written["kinds"]]
    what = f"it pays for {', '.join(paid)}" if paid else "which kinds it pays for is not known"
    if written.get("verdict") == "true answers not paid":
        return "bad", "The rows' own answers are paid too little." + (f" And {what}." if paid else "")
    if above or written.get("verdict") == "bought":
        return "bad", f"It can be bought: {what}."
    if written.get("verdict") != "not bought":
        return "care", "No verdict is known."
    if not _whole(record):
        return "care", "Not bought, says the file, but what this rests on is not whole."
    return "good", "Not bought: no wrong kind of answer is paid above the bound."


def _kinds(record: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    rows = record.get("kinds")
    return [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []


def _whole(record: Mapping[str, Any]) -> bool:
    kinds = _kinds(record)
    read = [isinstance(row.get("right"), bool) and (finite(row.get("paid")) or row.get("rows") == 0) for row in kinds]
    return finite(record.get("bound")) and bool(kinds) and len(kinds) == len(record["kinds"]) and all(read)


def _above(row: Mapping[str, Any], record: Mapping[str, Any]) -> bool:
    paid, bound = row.get("paid"), record.get("bound")
    return row.get("right") is False and finite(paid) and finite(bound) and paid > bound


def _mark(row: Mapping[str, Any], record: Mapping[str, Any]) -> str:
    paid, bound = row.get("paid"), record.get("bound")
    if row.get("rows") == 0:
        return "not tried"
    if row.get("kind") == "true" and finite(paid) and finite(bound) and paid < 1 - bound:
        return "too little"
    return "above the bound" if _above(row, record) else ""


def _text(value: Any) -> str:
    """Text as it is, cut where it is long; a dash for what is no text."""
    if not isinstance(value, str):
        return "-"
    return value if len(value) <= _LONGEST else f"{value[: _LONGEST - 3]}..."


def _certificate(stage: Stage) -> str:
    measures = stage.record("certificate")
    for write in (sections, lambda certificate: [verdict_section(certificate["verdict"])]):
        try:
            first, *rest = write(measures)
        except Exception as error:  # a file from another version may lack anything
            reason = f"certificate.json cannot be shown whole, it may be from another version: {error!r}."
            if reason not in stage.missing:
                stage.missing.append(reason)
        else:
            below = "".join(rest).replace("h2>", "h3>")  # it is part of a section here; texts have no bare `>`
            details = f"<details><summary>What it rests on</summary>{below}</details>" if rest else ""
            return f'<div class="wide">{first}{details}</div>'
    return _note("It cannot be shown: see what is missing.")


def verdict(stage: Stage) -> tuple[str, str]:
    """Summarise in one sentence a stage that trained on rewards.

    Returns:
        `good`, `care` or `bad`, and the sentence.
    """
    record = stage.record("evaluation")
    ends: Any = record.get("win_rate_ci")
    known = isinstance(ends, list) and len(ends) == 2 and all(map(finite, ends)) and finite(record.get("win_rate"))
    if not known:
        return "care", "No win rate against the reference is known."
    rate = f"Win rate against the reference {shown(record['win_rate'], ends)}, by {record.get('win_rate_by', '?')}"
    if _gain(record, "gold_score") < 0 < _gain(record, "reward_score"):
        return "bad", f"{rate}. The reward rose and the gold score fell: the policy fools its reward model."
    if ends[1] < 0.5:
        return "bad", f"{rate}: worse than the reference."
    if any(row.get("kind") == "over_optimization" for row in stage.alarms or []):
        fell = "But an alarm was raised: what its reward stands for fell in training, the reward did not."
        return "bad", f"{rate}. {fell}"
    if ends[0] <= 0.5:
        return "care", f"{rate}: cannot be told from the reference."
    if record.get("win_rate_by") == "reward_score":
        return "care", f"{rate}: better by the reward that it was trained on, which says little. Give a gold score."
    return "good", f"{rate}: better than the reference."


def _gain(record: Mapping[str, Any], name: str) -> float:
    ours, theirs = (_side(record, side).get(name) for side in ("policy", "reference"))
    return ours - theirs if finite(ours) and finite(theirs) else 0.0


def _side(record: Mapping[str, Any], side: str) -> Mapping[str, Any]:
    value = record.get(side)
    return value if isinstance(value, dict) else {}


def comparison(stages: Sequence[Stage]) -> str:
    """Policy against reference: one column of numbers per run and side."""
    records = [stage.record("evaluation") for stage in stages]
    header: list[str] = [""]
    columns: list[Mapping[str, Any]] = []
    for stage, record in zip(stages, records, strict=True):
        for side in ("policy", "reference"):
            header.append(side if len(stages) == 1 else f"{stage.name}: {side}")
            columns.append(_side(record, side))
    rows = [(name, *(shown(column.get(name)) for column in columns)) for name in _MEASURES]
    rates = []
    for stage, record in zip(stages, records, strict=True):
        rate, judge = shown(record.get("win_rate"), record.get("win_rate_ci")), record.get("win_rate_by", "-")
        rates.append((stage.name, rate, judge, shown(record.get("rows")), shown(record.get("prompts"))))
    return wide(("", "win rate [95 % interval]", "judged by", "completions", "prompts"), rates) + wide(header, rows)


def frontiers(stages: Sequence[Stage], folder: Path) -> str:
    """Reward and gold score against the distance to the reference, with the fitted law."""
    parts, rows = [], []
    for part, title in (("training", "Rollouts"), ("evaluation", "Held-out prompts")):
        curves = [(stage.name, curve) for stage in stages if (curve := _curve(stage, part)) is not None]
        if not any(curve["points"] for _, curve in curves):
            continue
        caption = "Points are steps, lines the fitted law. A gold score that bends down: more KL does harm."

        def plot(axes: Any, curves: Sequence[tuple[str, Mapping[str, Any]]] = tuple(curves)) -> None:
            plot_frontier(axes, curves)

        parts.append(figure(f"frontier-{part}", title, caption, plot, folder))
        for name, curve in curves:
            for score, fit in curve["fits"].items():
                numbers = [shown(fit.get(key)) for key in ("alpha", "beta", "peak", "peak_score", "residual")]
                rows.append((name, title, score, *numbers))
    if not parts:
        return _note("There is no frontier: no KL was logged beside a score.")
    header = ("", "of", "score", "alpha", "beta", "peak at sqrt(KL)", "score there", "residual")
    return _plots(parts) + (wide(header, rows) if rows else "")


def _curve(stage: Stage, part: str) -> dict[str, Any] | None:
    """A curve of `frontier.json`, or the same from the log."""
    curve = stage.record("frontier").get(part)
    if isinstance(curve, dict) and isinstance(curve.get("points"), list):
        fits = curve["fits"] if isinstance(curve.get("fits"), dict) else {}
        points = [row for row in curve["points"] if isinstance(row, dict)]
        return {"points": points, "fits": {name: fit for name, fit in fits.items() if isinstance(fit, dict)}}
    if part == "evaluation":
        return frontier(
            stage.history, "eval_policy/kl", {"reward": "eval_policy/reward_score", "gold": "eval_policy/gold_score"}
        )
    if not any("kl_per_token" in entry for entry in stage.history):
        return None  # the `kl` of TRL's other trainers is a mean over tokens, another axis
    scores = {key for entry in stage.history for key in entry if key.startswith("rewards/") and key.endswith("/mean")}
    gold = sorted(scores - {"rewards/reward/mean"})
    names = {"reward": "reward"} | ({"gold": gold[0]} if len(gold) == 1 and len(scores) > 1 else {})
    return frontier(stage.history, "kl", names)


def settings(stages: Sequence[Stage]) -> str:
    """Settings of the stages that differ from the defaults, and those in which stages of one kind differ."""
    known: dict[str, tuple[Stage, Mapping[str, Any]]] = {}
    for stage in stages:
        try:
            values = read_settings(stage.folder)
        except (OSError, ValueError) as error:
            stage.missing.append(f"config.yaml is damaged: {str(error).splitlines()[0]}")
            continue
        if values is not None:
            known[stage.name] = stage, {name: value for name, value in values.items() if name != "output_dir"}
    parts = []
    for kind in (*KINDS, "other"):
        alike = {name: values for name, (stage, values) in known.items() if stage.kind == kind}
        if differing := differing_settings(alike.values()):
            rows = [(field, *(_setting(values, field) for values in alike.values())) for field in differing]
            parts.append(f"<h3>Differences: {clean(_TITLES.get(kind, kind))}</h3>{wide(('', *alike), rows)}")
    for name, (_, values) in known.items():
        rows = [(field, _setting(values, field)) for field in values]
        parts.append(f"<details><summary>{clean(name)}</summary>{wide(('setting', 'value'), rows)}</details>")
    return "".join(parts) or _note("No settings are known: a stage writes config.yaml when it starts.")


def _setting(values: Mapping[str, Any], field: str) -> str:
    return _VALUES.repr(values[field]) if field in values else "default"


def alarms(stages: Sequence[Stage]) -> str:
    """Alarms that went off, why, and what was done."""
    rows = [
        (stage.name, row.get("step", "-"), row.get("kind", "-"), row.get("message", "-"), row.get("action", "warned"))
        for stage in stages
        for row in stage.alarms or []
    ]
    watched = [stage.name for stage in stages if stage.alarms == []]
    parts = [wide(("", "step", "alarm", "reason", "what was done"), rows)] if rows else []
    if watched:
        parts.append(_note(f"Watched, and nothing was found: {', '.join(watched)}."))
    if not parts:
        parts.append(_note("No alarm watched these runs."))
    return "".join(parts)


def missing(runs: Sequence[Run]) -> str:
    """Everything that the report could not show."""
    rows = [(str(run.folder), text) for run in runs for text in run.missing]
    rows += [(str(stage.folder), text) for run in runs for stage in run.stages for text in stage.missing]
    return wide(("folder", "what is missing"), rows) if rows else _note("Nothing.")


def title_of(kind: str) -> str:
    """Heading of a kind of stage."""
    return _TITLES[kind]


def _plots(figures: Iterable[str]) -> str:
    return f'<div class="plots">{"".join(figures)}</div>'


def _note(text: str) -> str:
    return f'<p class="note">{clean(text)}</p>'
