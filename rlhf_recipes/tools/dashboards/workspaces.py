"""The workspaces: their panels, and the runs that they show."""

from __future__ import annotations

from typing import Any

from rlhf_recipes.extras import from_extra

with from_extra("wandb", needed_by="Making dashboards"):
    import wandb_workspaces.reports.v2.interface as wr
    import wandb_workspaces.workspaces as ws
    from wandb_workspaces.expr import Metric

_STEP = "train/global_step"
_CONFIG = ("kl_coef", "learning_rate", "gae_lambda", "num_iterations")  # what runs of PPO often differ in


def reward_workspace(entity: str, project: str) -> ws.Workspace:
    """The workspace of the stage `reward`.

    Args:
        entity: User or team.
        project: Project of the runs.

    Returns:
        The workspace, not saved.

    Example:
        >>> [section.name for section in reward_workspace("me", "rlhf-recipes").sections]
        ['Is it better than simple rules?', 'Learning', 'Optimizer']
    """
    rules = [f"evaluation/baselines/{rule}/accuracy" for rule in ("tfidf", "longer", "shorter")]
    sections = [
        _section(
            "Is it better than simple rules?",
            wr.BarPlot(title="Held-out accuracy", metrics=["evaluation/accuracy", *rules], range_x=(0, 1)),
            wr.BarPlot(title="95 % interval", metrics=["evaluation/accuracy_low", "evaluation/accuracy_high"]),
            wr.BarPlot(title="Held-out margin", metrics=["evaluation/margin"]),
        ),
        _section(
            "Learning",
            _line("Loss", "train/loss"),
            _line("Accuracy on training pairs", "train/accuracy"),
            _line("Margin of winner over loser", "train/margin"),
            _line("Scores", "train/min_reward", "train/mean_reward", "train/max_reward"),
        ),
        _section(
            "Optimizer", _line("Gradient norm", "train/grad_norm"), _line("Learning rate", "train/learning_rate")
        ),
    ]
    return _workspace(entity, project, "Reward models", sections, "reward", ["summary:evaluation/accuracy"])


def ppo_workspace(entity: str, project: str) -> ws.Workspace:
    """The workspace of the stage `ppo`: does the policy get better, or does it fool its reward model?

    Args:
        entity: User or team.
        project: Project of the runs.

    Returns:
        The workspace, not saved.

    Example:
        >>> [section.name for section in ppo_workspace("me", "rlhf-recipes").sections][:2]
        ['Better, or fooling the reward model?', 'Samples']
    """
    tables = ("eval/samples", "evaluation/samples", "completions", "alarm/samples", "alarm/ngrams")
    sections = [
        _section(
            "Better, or fooling the reward model?",
            _line("Reward and its parts, gold score among them", "train/reward", regex="train/rewards/.*/mean"),
            _line("Held-out scores", *_both("reward_score"), *_both("gold_score")),
            _line("Win rate against the reference", "eval/win_rate", "eval/win_rate_low", "eval/win_rate_high"),
            _line("Frontier of the rollouts", "frontier/reward", "frontier/gold", x="frontier/distance"),
            _line("Frontier, held out", "frontier_eval/reward", "frontier_eval/gold", x="frontier_eval/distance"),
            _line("Free of length", "eval/length_controlled_win_rate", "eval/length_controlled_reward"),
            _line("Alarms (1 where one went off)", regex="train/alarm/.*"),
        ),
        _section("Samples", *[wr.WeavePanelSummaryTable(table_name=table) for table in tables], columns=1),
        _section(
            "Distance to the reference",
            _line("KL per completion, nats", "train/kl", "eval/policy/kl"),
            _line("KL per token, nats", "train/kl_per_token", "eval/policy/kl_per_token"),
            _line("Weight of the KL penalty", "train/kl_coef"),
        ),
        _section(
            "Completions",
            _line("Mean length, tokens", "train/completions/mean_length", *_both("length")),
            _line("Share that was cut off", "train/completions/clipped_ratio", *_both("truncation_rate")),
            _line("Entropy, nats per token", "train/entropy", *_both("entropy")),
            _line("Different pairs of tokens", *_both("distinct_2")),
            _line("Self-BLEU", *_both("self_bleu")),
            _line("Share with the most frequent 4-gram", *_both("top_ngram")),
        ),
        _section(
            "Critic",
            _line("Explained variance", "train/critic/explained_variance", *_parts("explained_variance")),
            _line("Values and returns", "train/critic/value_mean", "train/critic/return_mean", *_parts("value")),
            _line("Value loss", "train/critic/value_loss"),
            _line("Clip fraction of values", "train/critic/clip_fraction"),
        ),
        _section(
            "Updates",
            _line("Policy loss", "train/ppo/policy_loss"),
            _line("Clip fraction", "train/ppo/clip_fraction"),
            _line("KL of an update, nats", "train/ppo/approx_kl"),
            _line("Probability ratios", "train/ppo/ratio_mean", "train/ppo/ratio_max"),
            _line("Share of updates made", "train/ppo/updates_made"),
            _line("Gradient norm", "train/grad_norm"),
            _line("Learning rate", "train/learning_rate"),
            _line("Seconds per part", regex="profiling/Time taken.*"),
        ),
    ]
    columns = ["summary:evaluation/win_rate", "summary:evaluation/policy/kl", "config:kl_coef"]
    return _workspace(entity, project, "PPO", sections, "ppo", columns)


def comparison_workspace(entity: str, project: str) -> ws.Workspace:
    """The workspace that compares runs of PPO with each other, by what they ended with and by what they differ in.

    Args:
        entity: User or team.
        project: Project of the runs.

    Returns:
        The workspace, not saved.

    Example:
        >>> [section.name for section in comparison_workspace("me", "rlhf-recipes").sections]
        ['Results', 'Curves', 'Settings']
    """
    win_rate, kl = wr.SummaryMetric("evaluation/win_rate"), wr.SummaryMetric("evaluation/policy/kl")
    gold, reward = (wr.SummaryMetric(f"evaluation/policy/{name}_score") for name in ("gold", "reward"))
    columns: list[Any] = [*map(wr.Config, _CONFIG), kl, reward, gold, win_rate]
    results: list[Any] = [
        f"evaluation/{side}/{name}_score" for name in ("gold", "reward") for side in ("policy", "reference")
    ]
    sections = [
        _section(
            "Results",
            wr.BarPlot(title="Win rate against the reference", metrics=["evaluation/win_rate"], range_x=(0, 1)),
            wr.BarPlot(title="Scores at the end", metrics=results),
            wr.BarPlot(title="Length, tokens", metrics=["evaluation/policy/length", "evaluation/reference/length"]),
            wr.ScatterPlot(title="Gold score against KL", x=kl, y=gold),
            wr.ScatterPlot(title="Reward against KL", x=kl, y=reward),
            wr.ScatterPlot(title="Win rate against KL", x=kl, y=win_rate),
        ),
        _section(
            "Curves",
            _line("Reward", "train/reward"),
            _line("Gold score against the distance", "frontier/gold", x="frontier/distance"),
            _line("Reward against the distance", "frontier/reward", x="frontier/distance"),
            _line("KL per completion, nats", "train/kl"),
            _line("Held-out win rate", "eval/win_rate"),
            _line("Mean length, tokens", "train/completions/mean_length"),
        ),
        _section(
            "Settings",
            wr.ParallelCoordinatesPlot(columns=[wr.ParallelCoordinatesPlotColumn(metric) for metric in columns]),
            wr.ParameterImportancePlot(with_respect_to="evaluation/win_rate"),
            wr.RunComparer(diff_only="split"),
            columns=1,
        ),
    ]
    pinned = ["summary:evaluation/win_rate", "summary:evaluation/policy/kl", *(f"config:{name}" for name in _CONFIG)]
    return _workspace(entity, project, "Runs compared", sections, "ppo", pinned)


def _workspace(
    entity: str, project: str, name: str, sections: list[ws.Section], stage: str, columns: list[str]
) -> ws.Workspace:
    runs = ws.RunsetSettings(filters=[Metric("JobType") == stage], pinned_columns=columns)
    settings = ws.WorkspaceSettings(x_axis=_STEP)
    # Below these sections the app shows all else that was logged
    return ws.Workspace(entity, project, name, sections, settings, runs, auto_generate_panels=True)


def _section(name: str, *panels: Any, columns: int = 3) -> ws.Section:
    rows = -(-len(panels) // columns)
    layout = ws.SectionLayoutSettings(columns=columns, rows=min(rows, 3))
    return ws.Section(name, list(panels), is_open=True, layout_settings=layout)


def _line(title: str, *metrics: str, regex: str | None = None, x: str = _STEP) -> wr.LinePlot:
    return wr.LinePlot(title=title, x=x, y=list(metrics), metric_regex=regex)


def _both(name: str) -> list[str]:
    return [f"eval/{side}/{name}" for side in ("policy", "reference")]


def _parts(name: str) -> list[str]:
    return [f"train/critic/{name}_{part}" for part in ("start", "middle", "end")]
