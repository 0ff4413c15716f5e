"""Stage 3, without a critic: TRL's RLOO against the same rewards as PPO, and the same comparison with the reference.

accelerate launch recipes/rloo.py --config recipes/grpo_rloo/rloo.yaml [--beta 0.05]
"""

from rlhf_recipes import PolicyArguments, RLOOAdapterConfig
from rlhf_recipes.config import DataArguments, parse_stage

# The library is first: it knows what others say on import and nobody needs to hear.
# isort: split
from trl import ModelConfig

ARGUMENTS = (PolicyArguments, DataArguments, RLOOAdapterConfig, ModelConfig)


def main(
    args: PolicyArguments, data_args: DataArguments, training_args: RLOOAdapterConfig, model_args: ModelConfig
) -> None:
    from grpo import main as train  # beside this script: the stage is the same but for its trainer

    train(args, data_args, training_args, model_args)


if __name__ == "__main__":
    main(*parse_stage(ARGUMENTS))
