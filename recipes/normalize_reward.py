"""After stage 2: fit gain and bias of a reward model on reference samples, so that PPO sees mean 0 and std 1.

python recipes/normalize_reward.py --reward_model outputs/quickstart/reward --dataset_name samples.jsonl

Rows as in the SFT stage (of pairs, `chosen` counts): demonstrations, or samples of the SFT policy. Their held-out
part is used; `--dataset_test_split train` takes all rows of a file.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from rlhf_recipes.config import DataArguments, parse_stage
from rlhf_recipes.data import load_splits, to_completions, with_graded_prompts
from rlhf_recipes.models import load_reward_model
from rlhf_recipes.models.readout import Readout
from rlhf_recipes.reward_modeling.finished import normalize_reward_model
from rlhf_recipes.rewards import ClassifierReward


@dataclass
class NormalizeArguments:
    """The reward model that gets gain and bias, and how they are fitted."""

    reward_model: str = field(metadata={"help": "Folder of the reward stage; gain and bias are saved in it."})
    mode: Literal["std", "mean_only"] = field(
        default="std", metadata={"help": "std: mean 0 and standard deviation 1. mean_only: mean 0."}
    )
    batch_size: int = field(default=16, metadata={"help": "Texts per forward pass."})


ARGUMENTS = (NormalizeArguments, DataArguments)


def main(args: NormalizeArguments, data_args: DataArguments) -> None:
    # 1. The model, with the raw scores of its readout, and the reference samples.
    readout = Readout.load(args.reward_model)
    model, tokenizer = load_reward_model(args.reward_model)
    raw = Readout(readout.readout)
    reward = ClassifierReward(model, tokenizer, Path(args.reward_model).name, args.batch_size, raw)
    rows = with_graded_prompts(load_splits(data_args, to_completions, tokenizer.chat_template)["test"])
    if "completion" not in rows.column_names:
        raise ValueError(
            f"The rows of {data_args.dataset_name} need `completion` (and `prompt`); they have {rows.column_names}."
        )
    prompts = rows["prompt"] if "prompt" in rows.column_names else [""] * len(rows)
    scores = torch.tensor(reward.scores(list(prompts), list(rows["completion"]), [True] * len(rows)))

    # 2. Gain and bias, beside the weights.
    fitted = normalize_reward_model(args.reward_model, scores, args.mode)
    mean, std = scores.mean().item(), scores.std(correction=0).item()
    print(
        f"{len(rows)} samples with raw mean {mean:.4f} and standard deviation {std:.4f}: "
        f"gain {fitted.gain:.6g}, bias {fitted.bias:.6g}, saved in {args.reward_model}"
    )


if __name__ == "__main__":
    main(*parse_stage(ARGUMENTS))
