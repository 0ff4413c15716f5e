"""Measure one system of the speed benchmark in a process of its own, and print one line of JSON.

It runs in two environments, so this project is imported only where it is measured.
"""

import argparse
import importlib
import json
import os
import shutil
import statistics
from pathlib import Path

import torch
from speed_clock import Clock, Updates, memory
from speed_floor import floor
from speed_world import COMPLETION_LENGTH, DEVICE, LORA, PROMPT_LENGTH, dtype_of, four_bit, load, prompts
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedTokenizerFast


def import_libraries(system: str) -> None:
    """Import all that a system needs, so that its own memory can be told from that of the libraries."""
    names = ["trl", "peft", "datasets", "bitsandbytes", "transformers.models.llama.modeling_llama"]
    names += {"trl112": ["trl.experimental.ppo"], "grpo": ["trl.trainer.grpo_trainer"]}.get(system, [])
    names += ["trl.trainer.rloo_trainer"] if system == "rloo" else []
    names += ["rlhf_recipes.ppo.trainer"] if system.startswith("ppo_") else []
    for name in names:
        importlib.import_module(name)


def common(given) -> dict:
    """Settings that all trainers share."""
    return {
        "output_dir": str(given.world / "out" / given.system),
        "per_device_train_batch_size": given.micro_batch,
        "learning_rate": 0.0,  # a step takes as long, and completions stay as long as they are drawn at first
        "lr_scheduler_type": "constant",
        "temperature": 1.0,
        "bf16": dtype_of(given.precision) == torch.bfloat16,
        "use_cpu": DEVICE == "cpu",
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "seed": 1,
    }


def grpo_like(given, clock: Clock) -> None:
    """PPO of this project, and TRL's GRPO and RLOO: they share an engine."""
    import datasets
    import trl
    from peft import LoraConfig

    datasets.disable_progress_bars()
    accumulation = given.batch // given.micro_batch
    engine = {
        "max_steps": given.updates * given.epochs,
        "gradient_accumulation_steps": accumulation,
        "num_iterations": given.epochs,
        "max_completion_length": given.completion_length,
    }
    callback = Updates(clock, given.epochs)
    lora = LoraConfig(task_type="CAUSAL_LM", **LORA)
    shared = {
        "train_dataset": prompts(given.world),
        "processing_class": PreTrainedTokenizerFast.from_pretrained(given.world / "policy"),
        "peft_config": lora,
        "callbacks": [callback],
    }
    if given.system in ("grpo", "rloo"):
        make_config, make_trainer = {
            "grpo": (trl.GRPOConfig, trl.GRPOTrainer),
            "rloo": (trl.RLOOConfig, trl.RLOOTrainer),
        }[given.system]
        options = {"activation_checkpointing": False} if given.system == "grpo" else {"gradient_checkpointing": False}
        config = make_config(beta=0.05, num_generations=4, **common(given), **engine, **options)
        reward = load(given.world, AutoModelForSequenceClassification, given.precision, num_labels=1)
        trainer = make_trainer(load(given.world, AutoModelForCausalLM, given.precision), reward, config, **shared)
    else:
        from rlhf_recipes import PPOConfig, PPOTrainer
        from rlhf_recipes.models import load_causal_lm

        half = AutoConfig.from_pretrained(given.world / "policy").num_hidden_layers // 2
        config = PPOConfig(
            critic=given.system.split("_")[1],
            critic_layers=half if given.system == "ppo_adapter_half" else None,
            activation_checkpointing=False,
            **common(given),
            **engine,
        )
        quantization = four_bit() if given.precision == "4bit" else None
        dtype = dtype_of(given.precision)
        model = load_causal_lm(str(given.world / "policy"), quantization_config=quantization, dtype=dtype)
        trainer = PPOTrainer(model, reward_adapters(given), config, **shared)
    trainer.create_optimizer()
    model = trainer.accelerator.unwrap_model(trainer.model)
    trainer._generate = clock.timed(trainer._generate)
    trainer.compute_loss = clock.marks_pass(trainer.compute_loss)
    trainer.optimizer.step = clock.marks_step(trainer.optimizer.step)
    rollout = trainer._generate_and_score_completions

    def counted(inputs):
        batch = rollout(inputs)
        clock.tokens = int(batch["prompt_mask"].sum() + batch["completion_mask"].sum())
        return batch

    trainer._generate_and_score_completions = counted
    trainer.train()


def reward_adapters(given) -> list[str]:
    """Folders of as many reward models as asked for, all alike."""
    folders = [given.world / "reward", *(given.world / f"reward_{index}" for index in range(1, given.rewards))]
    for folder in folders[1:]:
        shutil.copytree(folders[0], folder, dirs_exist_ok=True)
    return [str(folder) for folder in folders]


def sft(given, clock: Clock) -> None:
    """TRL's supervised fine-tuning, with texts as long as prompts and completions together."""
    from datasets import Dataset
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    length = given.prompt_length + given.completion_length
    settings = common(given) | {"max_steps": given.updates, "activation_checkpointing": False, "max_length": length}
    settings["gradient_accumulation_steps"] = given.batch // given.micro_batch
    del settings["temperature"]
    rows = torch.randint(3, 2000, (given.batch * given.updates, length)).tolist()
    trainer = SFTTrainer(
        load(given.world, AutoModelForCausalLM, given.precision),
        SFTConfig(**settings),
        train_dataset=Dataset.from_dict({"input_ids": rows}),
        processing_class=PreTrainedTokenizerFast.from_pretrained(given.world / "policy"),
        peft_config=LoraConfig(task_type="CAUSAL_LM", **LORA),
        callbacks=[Updates(clock, 1)],
    )
    trainer.create_optimizer()
    trainer.compute_loss = clock.marks_pass(trainer.compute_loss)
    trainer.optimizer.step = clock.marks_step(trainer.optimizer.step)
    clock.tokens = given.batch * length
    trainer.train()


def trl112(given, clock: Clock) -> None:
    """PPO of TRL 1.12, with LoRA for policy and critic, and a whole reward model."""
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    tokenizer = PreTrainedTokenizerFast.from_pretrained(given.world / "policy", padding_side="left")

    def pad(row):
        ids = tokenizer(row["prompt"])["input_ids"]
        return {"input_ids": [tokenizer.pad_token_id] * (given.prompt_length - len(ids)) + ids}

    rows = prompts(given.world).map(pad, remove_columns="prompt")
    parts = [load(given.world, AutoModelForCausalLM, given.precision)]
    parts += [load(given.world, AutoModelForSequenceClassification, given.precision, num_labels=1) for _ in range(2)]
    if given.precision == "4bit":
        parts[:2] = [prepare_model_for_kbit_training(part, use_gradient_checkpointing=False) for part in parts[:2]]
    policy, value, reward = parts
    value = get_peft_model(value, LoraConfig(task_type="SEQ_CLS", **LORA))
    config = PPOConfig(
        total_episodes=given.batch * given.updates,
        gradient_accumulation_steps=given.batch // given.micro_batch,
        num_mini_batches=1,
        num_ppo_epochs=given.epochs,
        response_length=given.completion_length,
        local_rollout_forward_batch_size=given.micro_batch,
        stop_token="eos" if "ragged" in given.world.name else None,
        num_sample_generations=0,
        gradient_checkpointing=False,
        **common(given),
    )
    ppo_trainer.batch_generation = clock.timed(ppo_trainer.batch_generation)
    ppo_trainer.forward = clock.marks_pass(ppo_trainer.forward)
    trainer = PPOTrainer(
        args=config,
        processing_class=tokenizer,
        model=policy,
        ref_model=None,
        reward_model=reward,
        value_model=value,
        train_dataset=rows,
        eval_dataset=rows.select(range(given.batch)),
        peft_config=LoraConfig(task_type="CAUSAL_LM", **LORA),
        callbacks=[Updates(clock, 1)],
    )
    trainer.optimizer.step = clock.marks_step(trainer.optimizer.step)
    trainer.train()


SYSTEMS = {
    "ppo_adapter": grpo_like,
    "ppo_adapter_half": grpo_like,
    "ppo_head": grpo_like,
    "trl112": trl112,
    "grpo": grpo_like,
    "rloo": grpo_like,
    "sft": sft,
    "floor_adapter": floor,
    "floor_head": floor,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("world", type=Path)
    parser.add_argument("system", choices=SYSTEMS)
    parser.add_argument("--precision", choices=["fp32", "bf16", "4bit"], default="fp32")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--micro_batch", type=int, default=32)
    parser.add_argument("--prompt_length", type=int, default=PROMPT_LENGTH, help="at most, of the files")
    parser.add_argument("--completion_length", type=int, default=COMPLETION_LENGTH)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--rewards", type=int, default=1, help="reward adapters, for the growth with roles")
    parser.add_argument("--updates", type=int, default=3, help="the first is not counted if there are more")
    given = parser.parse_args()
    import_libraries(given.system)
    torch.manual_seed(0)
    imports = memory("VmRSS")
    clock = Clock()
    SYSTEMS[given.system](given, clock)
    counted = clock.updates[1:] or clock.updates
    # updates of ragged lengths have unlike tokens, whose mean belongs to the mean of their times
    average = statistics.mean if "ragged" in given.world.name else statistics.median
    result = {name: average(update[name] for update in counted) for name in counted[0]}
    result |= {"all": clock.updates, "imports_mib": imports, "peak_mib": memory("VmHWM") - imports}
    print("RESULT " + json.dumps(result | {"threads": torch.get_num_threads(), "load": os.getloadavg()[0]}))


if __name__ == "__main__":
    main()
