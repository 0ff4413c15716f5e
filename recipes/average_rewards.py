"""After stage 2: one reward model with the mean weights of several runs that differ in their seeds (WARM).

python recipes/average_rewards.py --reward_models outputs/my/run_0 outputs/my/run_1 --output_dir outputs/my/reward
"""

from dataclasses import asdict, dataclass, field

from rlhf_recipes.config import parse_stage
from rlhf_recipes.reward_modeling.finished import average_reward_models
from rlhf_recipes.tracking import start_run


@dataclass
class AverageArguments:
    """Arguments: the reward models to average."""

    reward_models: list[str] = field(metadata={"help": "Folders of the reward stage: runs on the same base."})
    output_dir: str = field(metadata={"help": "A new folder for the averaged model, a whole one without adapters."})


ARGUMENTS = (AverageArguments,)


def main(args: AverageArguments) -> None:
    average_reward_models(args.reward_models, args.output_dir)
    start_run(stage="reward", output_dir=args.output_dir, config=asdict(args), parent=args.reward_models)
    print(f"The mean of {len(args.reward_models)} reward models is in {args.output_dir}")


if __name__ == "__main__":
    main(*parse_stage(ARGUMENTS))
