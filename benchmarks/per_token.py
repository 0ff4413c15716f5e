"""Learning per token: PPO here with both critics, TRL's GRPO and RLOO, and TRL 1.12's PPO, on two recipes.

    python benchmarks/per_token.py --tasks quickstart

needs the outputs of the recipes (`--quickstart`, `--movie_sentiment`). Each method gets the same number of rollouts of
the same size, and a learning rate from the same small grid, chosen on a seed that is not reported. See README.md.
"""

import argparse
import json
import sys
from pathlib import Path

import per_token_report
import torch
from learning_vs_trl112 import CACHE, make_environment, run_alone
from per_token_world import TASKS, load_scorer, load_tokenizer_of, load_writer, make_task, read_task, scores
from safetensors.torch import load_file

HERE = Path(__file__).resolve().parent
METHODS = ["ppo_adapter", "ppo_adapter_half", "ppo_adapter_slow", "ppo_head", "grpo", "rloo", "trl112"]
GRID = ["3e-5", "1e-4", "3e-4", "1e-3", "3e-3"]  # the outer ones only where the best of the others lies at the edge
TUNING_SEED = 100
HELD_OUT, SAMPLING_SEED = 512, 7  # prompts, and the draws that every policy gets


def train(place: Path, method: str, learning_rate: str, seed: int, python: str) -> Path:
    """Train one run in a process of its own, unless that was done before, and name its folder."""
    run = place / "runs" / f"{method}_{learning_rate}_{seed}"
    if (run / "run.json").exists():
        return run
    seconds = run_alone([python, HERE / "per_token_worker.py", place, method, learning_rate, str(seed)], run)
    print(f"{place.name} {run.name}: {seconds:.0f} s", flush=True)
    return run


class Evaluation:
    """Held-out gold score, reward and exact KL of the policies of a task, with the same draws for all."""

    def __init__(self, place: Path):
        self.task, self.tokenizer = read_task(place), load_tokenizer_of(place)
        self.policy, self.reference = load_writer(place).eval(), load_writer(place).eval()
        self.scorer = load_scorer(place)
        self.judge = None if (place / "gold.json").exists() else load_scorer(place, "judge")
        self.gold_file = place / "gold.json"
        self.prompts = json.loads((place / "test.json").read_text())[:HELD_OUT]

    def curve(self, run: Path) -> list[dict[str, float]]:
        """Evaluate what a run kept: one row for each set of weights, the first before any; made once, then read."""
        if not (run / "curve.json").exists():
            start = {name: one.detach().clone() for name, one in self.policy.state_dict().items() if "lora_" in name}
            rows = [{"rollout": 0, "tokens": 0, "seconds": 0.0} | self.measure()]
            for row in json.loads((run / "run.json").read_text())["rows"]:
                weights = load_file(run / f"rollout_{row['rollout']:04d}.safetensors")
                unexpected = self.policy.load_state_dict(weights, strict=False).unexpected_keys
                assert not unexpected
                assert weights.keys() >= start.keys()
                rows.append(row | self.measure())
            self.policy.load_state_dict(start, strict=False)
            (run / "curve.json").write_text(json.dumps(rows))
        return json.loads((run / "curve.json").read_text())

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """Sample one completion per prompt. KL is that of the distributions, in nats per completion."""
        torch.manual_seed(SAMPLING_SEED)
        eos, pad = self.tokenizer.eos_token_id, self.tokenizer.pad_token_id
        inputs = self.tokenizer(self.prompts, return_tensors="pt", padding=True)
        sequences = self.policy.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            do_sample=True,
            top_k=0,
            max_new_tokens=self.task.completion_length,
        )
        start = inputs["input_ids"].size(1)
        completions = sequences[:, start:]
        ended = (completions == eos).long()
        mask = ended.cumsum(dim=1) - ended == 0  # up to the end token, with it
        completion_ids = [row[counts].tolist() for row, counts in zip(completions, mask, strict=True)]
        prompt_ids = self.tokenizer(self.prompts)["input_ids"]
        kl = self._kl(sequences, torch.cat([inputs["attention_mask"], mask.long()], dim=1), mask)
        return {
            "gold": _mean(self._gold(prompt_ids, completion_ids)),
            "reward": _mean(scores(self.scorer, prompt_ids, completion_ids, pad)),
            "kl": kl,
            "length": mask.sum(dim=1).float().mean().item(),
            "ended": _mean([float(ids[-1] == eos) for ids in completion_ids]),
        }

    def _kl(self, sequences, attention_mask, mask):
        positions = (attention_mask.cumsum(dim=1) - 1).clamp(min=0)
        length, total = mask.size(1), 0.0
        for rows in torch.arange(len(sequences)).split(64):
            kwargs = {"attention_mask": attention_mask[rows], "position_ids": positions[rows]}
            logps, reference = (
                model(sequences[rows], **kwargs).logits[:, -length - 1 : -1].log_softmax(dim=-1)
                for model in (self.policy, self.reference)
            )
            kl = (logps.exp() * (logps - reference)).sum(dim=-1).masked_fill(~mask[rows], 0.0)
            total += kl.sum().item()
        return total / len(sequences)

    def _gold(self, prompt_ids, completion_ids):
        if self.judge is not None:
            return scores(self.judge, prompt_ids, completion_ids, self.tokenizer.pad_token_id)
        from rlhf_recipes.data.synthetic import GoldScore

        texts = self.tokenizer.batch_decode(completion_ids, skip_special_tokens=True)
        return GoldScore.from_file(self.gold_file)(self.prompts, texts, completion_ids=completion_ids)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def tune(place: Path, methods: list[str], pythons: dict[str, str], evaluation: Evaluation) -> dict[str, str]:
    """The learning rate with the highest held-out reward minus `kl_coef` times KL at the end of its run."""
    found = {}
    for method in methods:
        objective, missing = {}, GRID[1:-1]
        while missing:
            for learning_rate in missing:
                run = train(place, method, learning_rate, TUNING_SEED, pythons.get(method, sys.executable))
                last = evaluation.curve(run)[-1]
                objective[learning_rate] = last["reward"] - evaluation.task.kl_coef * last["kl"]
            found[method] = max(objective, key=objective.get)
            best = GRID.index(found[method])
            missing = [rate for rate in GRID[max(best - 1, 0) : best + 2] if rate not in objective]
        text = ", ".join(f"{rate}: {objective[rate]:.3f}" for rate in GRID if rate in objective)
        print(f"{place.name} {method}: {text} -> {found[method]}", flush=True)
    return found


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--environment", type=Path, default=CACHE, help="of TRL 1.12; made if need be (%(default)s)")
    parser.add_argument("--output", type=Path, default=Path("outputs/per_token"), help="(%(default)s)")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    for name, task in TASKS.items():
        parser.add_argument(f"--{name}", type=Path, default=Path(task.outputs), help="of the recipe (%(default)s)")
    return parser.parse_args(argv)


def main(argv=None):
    given = parse(argv)
    pythons = {"trl112": str(make_environment(given.environment))} if "trl112" in given.methods else {}
    for name in given.tasks:
        place = make_task(given.output.resolve(), name, getattr(given, name))
        evaluation = Evaluation(place)
        rates = tune(place, given.methods, pythons, evaluation)
        curves = {method: [] for method in given.methods}
        for seed in given.seeds:
            for method in given.methods:  # alternating
                run = train(place, method, rates[method], seed, pythons.get(method, sys.executable))
                curves[method].append(evaluation.curve(run))
        print(per_token_report.write(place, curves, rates, TASKS[name].nats, TASKS[name].kl_coef), flush=True)
    if per_token_report.plot([given.output / name for name in given.tasks], given.output / "curves.png"):
        print(f"Drawn: {given.output / 'curves.png'}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
