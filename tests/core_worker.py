"""Run by `test_extras.py`: the core without what the extras bring, and what it says where that is needed."""

import importlib
import json
import logging
import pkgutil
import sys
from pathlib import Path


def run(modules, base, folder, root):
    for module in modules:
        sys.modules[module] = None  # `import` raises and `find_spec` finds nothing, as if it were not installed

    import rlhf_recipes

    messages = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logging.getLogger("rlhf_recipes").addHandler(handler)

    imported = [
        module.name
        for module in pkgutil.walk_packages(rlhf_recipes.__path__, "rlhf_recipes.", onerror=lambda name: None)
        if not module.name.startswith("rlhf_recipes.tools")
    ]
    for name in imported:
        importlib.import_module(name)

    from datasets import Dataset
    from peft import LoraConfig

    from rlhf_recipes import PPOConfig, PPOTrainer
    from rlhf_recipes.config import parse_stage
    from rlhf_recipes.evaluation.callbacks import PolicyEvaluation
    from rlhf_recipes.evaluation.judges import EndpointJudge
    from rlhf_recipes.reward_modeling.baselines import fit_tfidf, pair_baselines
    from rlhf_recipes.rewards import JudgeReward, RemoteReward
    from rlhf_recipes.statistics.texts import self_bleu
    from rlhf_recipes.tools.cli import main
    from rlhf_recipes.tracking import start_run

    def parse(stage, *words):
        sys.path.insert(0, str(root / "recipes"))
        config = str(root / "recipes/quickstart" / f"{stage}.yaml")
        return parse_stage(importlib.import_module(stage).ARGUMENTS, ["--config", config, *words])

    for stage in ("sft", "reward", "ppo"):
        parse(stage, "--report_to", "none", "--output_dir", str(folder / stage))

    # PPO with an evaluation before its end, and the baselines of the reward stage
    prompts = Dataset.from_list(
        [{"prompt": text} for text in ("the film was", "a story felt", "this actor is", "the plot")]
    )
    config = PPOConfig(
        str(folder / "ppo"),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        per_device_train_batch_size=2,
        max_completion_length=4,
        max_steps=2,
        critic_init="policy",
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = PPOTrainer(
        model=base,
        reward_funcs=lambda completion_ids, **kwargs: [float(len(ids)) for ids in completion_ids],
        args=config,
        train_dataset=prompts,
        peft_config=LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear"),
    )
    trainer.add_callback(PolicyEvaluation(trainer, prompts, every=1, rows=4))
    trainer.train()
    lines = Path(folder, "ppo", "policy_evaluation.jsonl").read_text().splitlines()

    pairs = Dataset.from_dict({"prompt": ["a", "b"], "chosen": ["so good", "good film"], "rejected": ["bad", "dull"]})
    baselines = sorted(pair_baselines(pairs, pairs))

    # What needs an extra
    votes, rankings = folder / "votes.jsonl", folder / "rankings.jsonl"
    votes.write_text(json.dumps({"winner": "a", "loser": "b"}) + "\n")
    rankings.write_text(json.dumps({"prompt": "q", "completions": ["a", "b"], "ranks": [1, 2]}) + "\n")
    NEEDS = {
        "report": lambda: importlib.import_module("rlhf_recipes.tools.report").write_report([folder]),
        "certificate": lambda: importlib.import_module("rlhf_recipes.tools.certificate"),
        "dashboards": lambda: importlib.import_module("rlhf_recipes.tools.dashboards"),
        "ranking": lambda: importlib.import_module("rlhf_recipes.tools.ranking.ranking"),
        "self-BLEU": lambda: self_bleu([[1], [2]]),
        "baseline": lambda: fit_tfidf(pairs),
        "judge": lambda: EndpointJudge("http://localhost/v1", "judge"),
        "remote reward": lambda: RemoteReward("http://localhost/score"),
        "reward of a judge": lambda: JudgeReward("http://localhost/v1/chat/completions", "judge", "Is it polite?"),
        "W&B": lambda: parse("ppo"),
        "W&B run": lambda: start_run(
            recipe="r", stage="s", output_dir=str(folder / "run"), config={}, report_to=["wandb"]
        ),
        "labelling page": lambda: importlib.import_module("rlhf_recipes.tools.labeling.app"),
    }
    refused = {}
    for name, use in NEEDS.items():
        try:
            use()
        except ModuleNotFoundError as error:
            refused[name] = str(error)

    logging.getLogger("rlhf_recipes").removeHandler(handler)
    codes = {
        "report": main(["report", str(folder)]),
        "rank": main(["rank", str(votes)]),
        "rate": main(["rate", str(rankings), str(folder / "rated.jsonl")]),
        "label": main(["label", "--data", str(rankings), "--db", str(folder / "labels.sqlite")]),
    }
    print(
        json.dumps(
            {
                "imported": len(imported),
                "steps": trainer.state.global_step,
                "evaluations": [json.loads(line) for line in lines],
                "messages": [message for message in messages if "Left out" in message],
                "baselines": baselines,
                "refused": refused,
                "codes": codes,
            }
        )
    )


if __name__ == "__main__":
    run(sys.argv[1].split(), sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4]))
