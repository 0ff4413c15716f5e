"""Rejection sampling: the best of K completions of each prompt, by the rewards of PPO, for the SFT stage to learn.

accelerate launch recipes/rejection_sampling.py --config recipes/quickstart/ppo.yaml --output_dir outputs/try

It takes the YAML of a PPO stage: policy (`policy_adapter` or `sft_adapter`), rewards, training prompts, `temperature`,
`max_completion_length`, `per_device_eval_batch_size` and `seed`. `samples.jsonl` has every completion with its score
and rank, `train.jsonl` the best one of each prompt, as `recipes/sft.py` reads them. A run that was stopped goes on
when it is started again.
"""

from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

from rlhf_recipes import PPOArguments, PPOConfig
from rlhf_recipes.config import DataArguments, parse_stage

# The library is first: it knows what others say on import and nobody needs to hear.
# isort: split
from trl import ModelConfig


@dataclass
class RejectionArguments:
    """How many completions are sampled."""

    best_of: int = field(default=8, metadata={"help": "Completions of each prompt, of which the best is kept."})
    prompts_per_round: int = field(
        default=64, metadata={"help": "Prompts between two saves, from which a run that was stopped goes on."}
    )

    def __post_init__(self) -> None:
        if self.best_of < 2:
            raise ValueError(
                f"`best_of` is {self.best_of}, but the best of one is no choice: SFT would learn what the policy says "
                "already. Give 2 or more; Llama 2's figures go up to 100."
            )
        if self.prompts_per_round < 1:
            raise ValueError(f"`prompts_per_round` must be at least 1, got {self.prompts_per_round}.")


ARGUMENTS = (RejectionArguments, PPOArguments, DataArguments, PPOConfig, ModelConfig)


def main(
    args: RejectionArguments,
    ppo_args: PPOArguments,
    data_args: DataArguments,
    training_args: PPOConfig,
    model_args: ModelConfig,
) -> None:
    # Imported here, so that --help does not wait for them.
    from rlhf_recipes import PPOTrainer
    from rlhf_recipes.data import load_splits, to_prompts
    from rlhf_recipes.evaluation.records import check_settings
    from rlhf_recipes.evaluation.rejection import BEST, sample_best
    from rlhf_recipes.models import load_causal_lm, load_policy, load_tokenizer, lora_config, model_options
    from rlhf_recipes.tracking import start_stage

    # 1. What the samples are of: a folder with others is refused, and one that is complete is left alone.
    training_args.report_to = []  # nothing is trained, so that the smallest critic will do
    training_args.critic, training_args.critic_layers = "head", None
    training_args.ptx_coef, training_args.ema_decay = 0.0, None
    of_the_run = ("seed", "temperature", "max_completion_length", "per_device_eval_batch_size", "reward_weights")
    settings = {**asdict(args), **asdict(ppo_args), **asdict(data_args), "model": model_args.model_name_or_path}
    settings |= {name: getattr(training_args, name) for name in of_the_run}
    check_settings(training_args.output_dir, settings)
    if Path(training_args.output_dir, BEST).exists():
        print(f"{training_args.output_dir} is finished: {BEST} is there.")
        return

    # 2. Prompts, policy and rewards, as in recipes/ppo.py; the judge has weight 0.
    source = {"revision": model_args.model_revision, "trust_remote_code": training_args.trust_remote_code}
    tokenizer = load_tokenizer(model_args.model_name_or_path, **source)
    rows = load_splits(data_args, partial(to_prompts, prompt_words=ppo_args.prompt_words), tokenizer.chat_template)
    policy = load_causal_lm(model_args.model_name_or_path, **model_options(model_args), **source)
    if (start := ppo_args.policy_adapter or ppo_args.sft_adapter) is not None:
        policy = load_policy(policy, start, training_args.adapter_tolerance)
    reward_funcs = ppo_args.rewards()
    if not reward_funcs:
        raise ValueError("Rejection sampling needs a reward: set `reward_adapter`, `reward_adapters` or `reward_url`.")
    if ppo_args.gold_score is not None:
        training_args.reward_weights = [*(training_args.reward_weights or [1.0] * len(reward_funcs)), 0.0]
        reward_funcs.append(ppo_args.judge())
    trainer = PPOTrainer(
        model=policy,
        reward_funcs=reward_funcs,
        args=training_args,
        train_dataset=rows["train"],
        eval_dataset=rows["test"],
        processing_class=tokenizer,
        peft_config=lora_config(model_args, "CAUSAL_LM") if start is None else None,
        reference_adapter=ppo_args.sft_adapter if ppo_args.policy_adapter else None,
    )

    # 3. Sample, score, keep the best.
    parents = [start, ppo_args.reward_adapter, ppo_args.gate_adapter, *(ppo_args.reward_adapters or [])]
    start_stage("rejection", training_args, args, ppo_args, data_args, model_args, parents=parents)
    rounds = {"best_of": args.best_of, "prompts_per_round": args.prompts_per_round, "seed": training_args.seed}
    found = sample_best(trainer, rows["train"], training_args.output_dir, settings, **rounds)
    if found["best_score"] is None:
        raise ValueError("No completion ended by itself, so that none can be learned. Raise `max_completion_length`.")
    if trainer.is_world_process_zero():
        print(
            f"{found['prompts']:,} prompts, {args.best_of} completions each: mean score {found['score']:.3f}, of the "
            f"best ones {found['best_score']:.3f}; {found['left_out']} prompts without a completion that can be "
            f"learned are left out.\n{training_args.output_dir}/{BEST}"
        )
    trainer.end()


if __name__ == "__main__":
    main(*parse_stage(ARGUMENTS))
