"""Online RLHF: policy and reward model alternate, in rounds, after Christiano et al. 2017.

python recipes/online_rlhf/rounds.py --config recipes/online_rlhf/online.yaml [--labeller page --ask_ahead true]

A round: sample pairs -> choose what to ask -> labels -> reward models on all labels so far -> PPO -> report. Each step
ends with a file that is written in one go. Start the command again, after whatever ended it, and it goes on with the
first step whose file is missing.
"""

import gc
import json
import random
import runpy
import shutil
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from rlhf_recipes.checkpoints import complete_checkpoints, write_whole
from rlhf_recipes.config import parse_stage, read_config, validate_fields
from rlhf_recipes.tools.ranking.active import label_schedule

LEAST_LABELS = 16  # in the first round: a third of them tests a member, some are ties
REFERENCE_PAIRS = 128  # of the first policy, on which the scores get mean 0 and standard deviation 1
Row = dict[str, Any]


@dataclass
class RoundArguments:
    """The rounds, who labels in them, and what is asked."""

    reward_config: str = field(metadata={"help": "YAML of the reward stage."})
    ppo_config: str = field(metadata={"help": "YAML of the PPO stage; it names base, first policy and prompts."})
    output_dir: str = field(default="outputs/online_rlhf/online", metadata={"help": "Folder of the run."})
    rounds: int = field(default=4, metadata={"help": "Rounds. 1: all labels first, then one PPO (offline)."})
    ppo_steps: int = field(default=256, metadata={"help": "Steps of PPO in all rounds together."})
    label_budget: int = field(default=120, metadata={"help": "Questions in all rounds together."})
    labels_halved_after: float = field(
        default=64.0, metadata={"help": "Steps of PPO after which half as much is asked as at the start."}
    )
    labeller: Literal["gold", "page", "judge"] = field(
        default="gold", metadata={"help": "gold: the simulated annotator. page: people. judge: a language model."}
    )
    judge: str = field(default="", metadata={"help": "With `labeller: judge`: options of `rlhf-recipes judge`."})
    selection: Literal["disagreement", "random"] = field(
        default="disagreement", metadata={"help": "Which candidates are asked about, from the second round on."}
    )
    ask_ahead: bool = field(
        default=False, metadata={"help": "Ask what the next round learns from before this round's PPO begins."}
    )
    members: int = field(default=3, metadata={"help": "Reward models of the ensemble."})
    candidates_per_label: int = field(default=10, metadata={"help": "Pairs of which one is asked about."})
    error: float = field(default=0.1, metadata={"help": "Gold: share of its choices that are wrong."})
    tie_margin: float = field(default=1.0, metadata={"help": "Gold: difference that it does not notice."})
    incomparable: float = field(default=0.05, metadata={"help": "Gold: share of pairs that it cannot compare."})
    report_pairs: int = field(default=256, metadata={"help": "Pairs of the newest policy that test the ensemble."})
    seed: int = field(default=0, metadata={"help": "Seed of prompts, samples, labels and stages."})

    def __post_init__(self) -> None:
        validate_fields(self)
        for name in ("rounds", "ppo_steps", "members", "report_pairs"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        if self.ppo_steps % self.rounds:
            raise ValueError(f"{self.rounds} rounds cannot share {self.ppo_steps} steps of PPO evenly. Change one.")
        if self.selection == "disagreement" and (self.members < 2 or self.candidates_per_label < 2):
            raise ValueError(
                f"`selection: disagreement` compares at least 2 `members` on 2 `candidates_per_label`, got "
                f"{self.members} and {self.candidates_per_label}. Raise them, or set `selection: random`."
            )
        if not 0.0 <= self.error <= 0.5 or not 0.0 <= self.incomparable < 1.0:
            raise ValueError(
                f"`error` must lie in [0, 0.5] and `incomparable` in [0, 1), got {self.error}, {self.incomparable}."
            )
        if (self.labeller == "judge") != bool(self.judge):
            raise ValueError("`labeller: judge` and `judge`, the options of `rlhf-recipes judge`, belong together.")
        labels = self.labels()
        if labels[0] < LEAST_LABELS or labels[-1] < 1:
            raise ValueError(
                f"`label_budget: {self.label_budget}` gives the rounds {labels} labels. The first needs at least "
                f"{LEAST_LABELS} and every other one at least 1. Raise the budget, or ask for fewer rounds."
            )

    @property
    def steps(self) -> int:
        """Steps of PPO in each round."""
        return self.ppo_steps // self.rounds

    def labels(self) -> list[int]:
        """Questions of each round."""
        before = [number * self.steps for number in range(self.rounds)]
        return label_schedule(self.label_budget, before, self.labels_halved_after)


ARGUMENTS = (RoundArguments,)


class Rounds:
    """What a run has made so far, and its steps. A step that is finished does nothing when it is called again.

    Args:
        args: The arguments.
    """

    def __init__(self, args: RoundArguments) -> None:
        from labellers import check_labeller

        self.args, self.folder = args, Path(args.output_dir)
        self.stages = {name: _script(name) for name in ("reward", "ppo")}
        self.parsed("reward", ["--config", args.reward_config])
        ppo = self.parsed("ppo", ["--config", args.ppo_config])
        self.start, self.data, self.training, self.model = ppo
        if self.start.sft_adapter is None or not Path(self.start.sft_adapter).is_dir():
            raise FileNotFoundError(
                f"The first policy, `sft_adapter` {self.start.sft_adapter} of {args.ppo_config}, is not there. Run "
                "the SFT stage first."
            )
        check_labeller(args, self.start)

    # ---- Where things are

    def round(self, number: int) -> Path:
        return self.folder / f"round_{number:02d}"

    def policy(self, number: int) -> Path:
        """The policy after a round; after round 0, the one that all begins with."""
        return self.round(number) / "ppo" if number > 0 else Path(self.start.sft_adapter)

    def members(self, number: int) -> list[Path]:
        return [self.round(number) / f"reward_{member}" for member in range(self.args.members)]

    def asked(self, number: int) -> list[Row]:
        return _read(self.round(number) / "queries.jsonl")

    @cached_property
    def tokenizer(self) -> Any:
        from rlhf_recipes.models import load_tokenizer

        return load_tokenizer(self.model.model_name_or_path)

    @cached_property
    def prompts(self) -> list[str]:
        from rlhf_recipes.data import load_splits, to_prompts

        prompts = list(load_splits(self.data, to_prompts)["train"]["prompt"])
        if not all(isinstance(prompt, str) for prompt in prompts):
            raise ValueError(f"The prompts of {self.data.dataset_name} are chats. The rounds sample after texts only.")
        return prompts

    # ---- The steps of a round

    def ask(self, number: int) -> None:
        """Sample candidates, choose those to ask about, and put them where the labeller finds them."""
        from labellers import put_up

        queries = self.round(number) / "queries.jsonl"
        if not queries.exists():
            labels = self.args.labels()[number - 1]
            disagreement = self.args.selection == "disagreement" and number > 1
            # Pairs of the same text are no questions: of those drawn at random there are twice as many as needed
            count = labels * (self.args.candidates_per_label if disagreement else 2)
            writer = self.policy(max(number - (2 if self.args.ask_ahead else 1), 0))
            candidates = self.sample(writer, max(count, REFERENCE_PAIRS * (number == 1)), f"ask {number}")
            write_whole(self.round(number) / "candidates.jsonl", _lines(candidates))
            write_whole(queries, _lines(self.choose(number, candidates, labels, disagreement)))
        put_up(self, number)

    def choose(self, number: int, candidates: list[Row], labels: int, disagreement: bool) -> list[Row]:
        """Choose the pairs to ask about, with what the ensemble thinks of them before it learns from the answers."""
        from rlhf_recipes.tools.ranking.active import preference_variance, select_queries

        pairs = [pair for pair in candidates if pair["completions"][0] != pair["completions"][1]]
        if len(pairs) < labels:
            raise ValueError(
                f"{len(pairs)} of {len(candidates)} pairs are of two different texts, and round {number} asks about "
                f"{labels}: the policy says the same again and again. Raise `kl_coef`, or lower the budget."
            )
        if not disagreement:
            pairs = random.Random(f"{self.args.seed} choose {number}").sample(pairs, labels)
        if number > 1:
            raw, normalized = self.scores(number - 1, pairs)
            leads = (normalized[:, :, 0] - normalized[:, :, 1]).mean(dim=0).tolist()
            pairs = [pair | {"lead": lead} for pair, lead in zip(pairs, leads, strict=True)]
            if self.args.members > 1:
                variance = preference_variance(raw[:, :, 0], raw[:, :, 1]).tolist()
                pairs = [pair | {"variance": each} for pair, each in zip(pairs, variance, strict=True)]
        if disagreement:
            chosen = select_queries(raw[:, :, 0], raw[:, :, 1], labels, self.args.seed)
            pairs = [pairs[index] for index in chosen.tolist()]
        return [pair | {"round": number} for pair in pairs]

    def label(self, number: int) -> None:
        """Have the questions answered, and write all labels so far as rows to train on."""
        from labellers import answered

        path = self.round(number) / "labels.jsonl"
        if not path.exists():
            write_whole(path, _lines(answered(self, number)))

    def fit(self, number: int) -> None:
        """Train each member of the ensemble on from where it was, and bring its scores to one scale."""
        from rlhf_recipes.evaluation.records import write_records
        from rlhf_recipes.reward_modeling.bootstrap import member_rows
        from rlhf_recipes.reward_modeling.finished import normalize_reward_model

        if (done := self.round(number) / "rewards.json").exists():
            return
        labels = _read(self.round(number) / "labels.jsonl")
        parts = [member_rows(labels, member, self.args.seed) for member in range(self.args.members)]
        for member, (rows, folder) in enumerate(zip(parts, self.members(number), strict=True)):
            place = self.round(number) / f"rows_{member}"
            for name, part in zip(("train", "test"), rows, strict=True):
                write_whole(place / f"{name}.jsonl", _lines(part))
            more = {} if number == 1 else {"start_adapter": self.members(number - 1)[member]}
            seed = self.seed(f"reward {number} {member}")
            self.run("reward", folder, dataset_name=place, dataset_test_split="test", seed=seed, **more)
        raw, _ = self.scores(number, _read(self.round(1) / "candidates.jsonl")[:REFERENCE_PAIRS])
        for folder, scores in zip(self.members(number), raw, strict=True):
            normalize_reward_model(folder, scores.flatten())
        held_out = [json.loads((folder / "evaluation.json").read_text()) for folder in self.members(number)]
        write_records(done, {"held_out": [{key: one[key] for key in ("accuracy", "n")} for one in held_out]})

    def train(self, number: int) -> None:
        """PPO from the last policy, with the last critic; the first policy stays the reference."""
        members = [str(folder) for folder in self.members(number)]
        more: Row = {"reward_adapter": None, "reward_adapters": members}
        if len(members) == 1:
            more = {"reward_adapter": members[0], "reward_adapters": None}
        if number > 1:
            last = self.policy(number - 1)
            more |= {"policy_adapter": last, "critic_model": last / "critic", "critic_init": None}
        more |= {"max_steps": self.args.steps, "seed": self.seed(f"ppo {number}")}
        self.run("ppo", self.round(number) / "ppo", **more)

    def report(self, number: int) -> None:
        """Write what the round gave: labels, their agreement, the ensemble on the newest policy's samples, gold."""
        from labellers import summary

        from rlhf_recipes.evaluation.records import write_records

        if (done := self.round(number) / "round.json").exists():
            return
        samples = self.sample(self.policy(number), self.args.report_pairs, f"report {number}")
        _, normalized = self.scores(number, samples)
        leads = (normalized[:, :, 0] - normalized[:, :, 1]).mean(dim=0)
        ppo = json.loads((self.round(number) / "ppo" / "evaluation.json").read_text())
        held_out = json.loads((self.round(number) / "rewards.json").read_text())["held_out"]
        record = {"round": number, "selection": self.args.selection if number > 1 else "random"}
        record |= {"steps": self.args.steps * number, **summary(self, number, samples, leads)}
        record |= {"held_out_accuracy": sum(one["accuracy"] for one in held_out) / len(held_out)}
        record |= {name: ppo["policy"][name] for name in ("gold_score", "reward_score", "kl", "length")}
        record |= {"reference_gold_score": ppo["reference"]["gold_score"], "win_rate": ppo["win_rate"]}
        write_records(done, record | {"win_rate_ci": ppo["win_rate_ci"]})

    # ---- What the steps use

    def seed(self, of: str) -> int:
        return random.Random(f"{self.args.seed} {of}").randrange(2**31)

    def place(self, model: Any) -> None:
        if model.device.type != self.training.device.type:  # weights in 4 bits are there already
            model.to(self.training.device)

    def sample(self, adapter: Path, count: int, of: str) -> list[Row]:
        """Sample pairs of completions of a policy after training prompts drawn at random."""
        import torch

        from rlhf_recipes.data.chat_templates import with_first_space
        from rlhf_recipes.models import load_causal_lm, load_policy, model_options
        from rlhf_recipes.models.generation import sample_after_texts

        base = load_causal_lm(self.model.model_name_or_path, **model_options(self.model))
        policy = load_policy(base, adapter, self.training.adapter_tolerance).eval()
        self.place(policy)
        prompts = random.Random(f"{self.args.seed} {of}").choices(self.prompts, k=count)
        torch.manual_seed(self.seed(of))
        options = (self.training.max_completion_length, self.training.per_device_eval_batch_size)
        sides = [sample_after_texts(policy, self.tokenizer, prompts, *options) for _ in range(2)]
        rows = []
        for prompt, *pair in zip(prompts, *sides, strict=True):
            texts = [self.tokenizer.decode(ids, skip_special_tokens=True) for ids in pair]
            texts = [with_first_space(self.tokenizer, prompt, *both) for both in zip(texts, pair, strict=True)]
            start = self.tokenizer(prompt)["input_ids"]
            rows.append({"prompt": prompt, "completions": texts, "completion_ids": [start + ids for ids in pair]})
        return rows

    def scores(self, number: int, pairs: list[Row]) -> tuple[Any, Any]:
        """Score pairs with each member of a round: raw scores and normalised ones, each `(members, pairs, 2)`."""
        import torch

        from rlhf_recipes.models import model_options
        from rlhf_recipes.tools.certificate.scoring import load_scorer

        raw, normalized = [], []
        size = self.training.per_device_eval_batch_size
        for folder in map(str, self.members(number)):
            scorer = load_scorer(self.model.model_name_or_path, folder, None, size, **model_options(self.model))
            self.place(scorer.model)
            texts = [scorer.encoded(ids, pair["prompt"]) for pair in pairs for ids in pair["completion_ids"]]
            scores = torch.from_numpy(scorer.finite_scores(texts)).view(len(pairs), 2)
            raw.append(scores)
            normalized.append(scorer.readout.apply(scores))
        return torch.stack(raw), torch.stack(normalized)

    def parsed(self, stage: str, words: list[str]) -> tuple[Any, ...]:
        return self.stages[stage]["parse_stage"](self.stages[stage]["ARGUMENTS"], words)

    def run(self, stage: str, folder: Path, **fields: Any) -> None:
        """Run a stage in this process, unless it is finished; one that was cut off goes on from its checkpoint."""
        if (folder / "evaluation.json").exists():
            return
        if complete_checkpoints(folder):
            fields["resume_from_checkpoint"] = True
        else:
            shutil.rmtree(folder, ignore_errors=True)
        config = self.args.reward_config if stage == "reward" else self.args.ppo_config
        words = ["--config", config, "--output_dir", str(folder)]
        for name, value in fields.items():
            words += [
                f"--{name}",
                *map(str, value if isinstance(value, list) else ["null" if value is None else value]),
            ]
        self.stages[stage]["main"](*self.parsed(stage, words))
        gc.collect()  # its models are in circles of references


def _script(name: str) -> Row:
    """Read a stage's script, which lies beside the recipe's folder, or in it where that is a copy."""
    here = Path(__file__).resolve().parent
    path = next(folder / f"{name}.py" for folder in (here, here.parent) if (folder / f"{name}.py").is_file())
    return runpy.run_path(str(path))


def _read(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _lines(rows: list[Row]) -> str:
    return "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows)


def main(args: RoundArguments) -> None:
    from labellers import alone, table

    from rlhf_recipes.evaluation.records import SETTINGS, check_settings, write_records

    # 1. Everything that can be wrong is said now; and a folder of another run is left alone.
    rounds = Rounds(args)
    configs = {name: read_config(Path(getattr(args, name)).read_text()) for name in ("reward_config", "ppo_config")}
    settings = json.loads(json.dumps(asdict(args) | configs))
    del settings["output_dir"]  # a folder may be moved
    check_settings(args.output_dir, settings)
    write_records(rounds.folder / SETTINGS, settings)

    # 2. The rounds. With `ask_ahead` the labeller answers the next round's questions while PPO trains.
    with alone(rounds.folder):
        for number in range(1, args.rounds + 1):
            print(f"== round {number} of {args.rounds}")
            rounds.ask(number)
            rounds.label(number)
            rounds.fit(number)
            if args.ask_ahead and number < args.rounds:
                rounds.ask(number + 1)
            rounds.train(number)
            rounds.report(number)
            print(table(rounds))


if __name__ == "__main__":
    main(*parse_stage(ARGUMENTS))
