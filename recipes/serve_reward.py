"""Serve a trained reward model over HTTP, for PPO runs in other processes.

python recipes/serve_reward.py --reward_model outputs/quickstart/reward [--port 8000]

In the PPO stage: `reward_url: http://127.0.0.1:8000/score`.
"""

from dataclasses import dataclass, field
from pathlib import Path

from rlhf_recipes.config import parse_stage
from rlhf_recipes.models import load_reward_model
from rlhf_recipes.models.readout import Readout
from rlhf_recipes.rewards import ClassifierReward
from rlhf_recipes.rewards.server import RewardServer


@dataclass
class ServeArguments:
    """The reward model to serve, its address, and the limits of a request."""

    reward_model: str = field(metadata={"help": "Folder of the reward stage, or of any classifier with one output."})
    host: str = field(
        default="127.0.0.1",
        metadata={"help": "Address to listen on. There is no key and no encryption: this machine only by default."},
    )
    port: int = field(default=8000, metadata={"help": "Port. 0: a free one."})
    batch_size: int = field(default=16, metadata={"help": "Texts per forward pass."})
    max_rows: int = field(default=256, metadata={"help": "Most completions in a request."})
    max_megabytes: float = field(default=8.0, metadata={"help": "Longest request, in megabytes."})


ARGUMENTS = (ServeArguments,)


def main(args: ServeArguments) -> None:
    model, tokenizer = load_reward_model(args.reward_model)
    name, readout = Path(args.reward_model).name, Readout.load(args.reward_model)
    reward = ClassifierReward(model, tokenizer, name, args.batch_size, readout)
    with RewardServer(reward.scores, args.host, args.port, args.max_rows, int(args.max_megabytes * 1e6)) as server:
        print(f"{args.reward_model} is served at http://{args.host}:{server.server_port}/score", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print("stopped")


if __name__ == "__main__":
    main(*parse_stage(ARGUMENTS))
