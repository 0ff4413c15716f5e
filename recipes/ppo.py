"""Stage 3: PPO against the reward model, and the comparison of the policy with its reference.

accelerate launch recipes/ppo.py --config recipes/quickstart/ppo.yaml [--learning_rate 1e-5]
"""

from functools import partial

from rlhf_recipes import PPOArguments, PPOConfig
from rlhf_recipes.config import DataArguments, parse_stage

# The library is first: it knows what others say on import and nobody needs to hear.
# isort: split
from trl import ModelConfig

ARGUMENTS = (PPOArguments, DataArguments, PPOConfig, ModelConfig)


def brevity(completion_ids, **kwargs):
    """A reward of your own: a number for each completion. It also gets `prompts`, `completions` and all columns."""
    return [-0.01 * len(ids) for ids in completion_ids]


def spread_evenly(scores, mask):
    """A placement of your own: from scores `(B,)` and a mask of tokens `(B, T)` to token rewards `(B, T)`."""
    return scores[:, None] * mask / mask.sum(dim=1, keepdim=True).clamp(min=1)


def main(ppo_args: PPOArguments, data_args: DataArguments, training_args: PPOConfig, model_args: ModelConfig) -> None:
    # Imported here, so that --help does not wait for them.
    from rlhf_recipes import PPOTrainer
    from rlhf_recipes.checkpoints import check_output_dir, is_finished
    from rlhf_recipes.data import load_rows, load_splits, to_prompts
    from rlhf_recipes.evaluation import evaluate_policy, watch_training, write_evaluation
    from rlhf_recipes.models import load_policy, load_policy_base, load_tokenizer, lora_config
    from rlhf_recipes.tracking import log_outputs, start_stage

    checkpoint = check_output_dir(training_args)
    if is_finished(training_args, checkpoint):
        return

    # 1. Prompts, and the policy: a trained adapter on the (4-bit) base, or a fresh adapter on the bare base.
    source = {"revision": model_args.model_revision, "trust_remote_code": training_args.trust_remote_code}
    tokenizer = load_tokenizer(model_args.model_name_or_path, **source)
    rows = load_splits(data_args, partial(to_prompts, prompt_words=ppo_args.prompt_words), tokenizer.chat_template)
    policy, reader = load_policy_base(model_args, tokenizer, rows, **source)  # with a processor if rows have pictures
    if (start := ppo_args.policy_adapter or ppo_args.sft_adapter) is not None:
        policy = load_policy(policy, start, training_args.adapter_tolerance)

    # 2. Rewards: `reward_adapter` (gated or not), `reward_adapters`, `reward_url`, your own functions, in the order of
    #    `reward_weights`. The judge has weight 0: it is logged beside the reward, and PPO does not see it.
    reward_funcs = ppo_args.rewards()
    # reward_funcs.append(brevity)  # yours: take away the first `#`
    if not reward_funcs:
        raise ValueError("PPO needs a reward: set `reward_adapter`, `reward_adapters` or `reward_url`, or append one.")
    if ppo_args.gold_score is not None:
        training_args.reward_weights = [*(training_args.reward_weights or [1.0] * len(reward_funcs)), 0.0]
        reward_funcs.append(ppo_args.judge())
    placement = None  # `reward_placement` says which tokens are paid; or a function of yours: spread_evenly

    # 3. Train. The hooks watch, on held-out prompts, how the score grows with the KL, and for a hacked reward.
    trainer = PPOTrainer(
        model=policy,
        reward_funcs=reward_funcs,
        args=training_args,
        train_dataset=rows["train"],
        eval_dataset=rows["test"],
        processing_class=reader,
        peft_config=lora_config(model_args, "CAUSAL_LM", policy) if start is None else None,
        reference_adapter=ppo_args.sft_adapter if ppo_args.policy_adapter else None,
        critic_model=ppo_args.critic_model,
        placement=placement,
        ptx_dataset=None if ppo_args.ptx_dataset is None else load_rows(ppo_args.ptx_dataset, split="train"),
    )
    judge = None if ppo_args.gold_score is None else trainer.reward_func_names[-1]
    watch_training(trainer, rows["test"], ppo_args, gold=judge)
    parents = [start, ppo_args.reward_adapter, ppo_args.gate_adapter, *(ppo_args.reward_adapters or [])]
    python = [*reward_funcs, placement]
    run = start_stage("ppo", training_args, ppo_args, data_args, model_args, parents=parents, python=python)
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
    trainer.save_state()

    # 4. Is the policy better than its reference on prompts that no stage has seen?
    evaluation = evaluate_policy(trainer, rows["test"], gold=judge, rows=ppo_args.evaluation_rows)
    if trainer.is_world_process_zero():
        print(write_evaluation(evaluation, training_args.output_dir))
    log_outputs(run, training_args.output_dir)
    trainer.end()


if __name__ == "__main__":
    main(*parse_stage(ARGUMENTS))
