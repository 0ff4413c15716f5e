"""What users of TRL's GRPO expect holds for PPO: docs/trl_behaviour.md says which of TRL's tests each one stands for.

All runs share the tiny model; what is logged and what is trained is compared with numbers that do not come from the
trainer: plain transformers, PEFT, and what the reward functions saw.
"""

import ast
import copy
import inspect
import json
import math
import re
import shutil
import statistics
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset, DatasetDict, IterableDatasetDict
from peft import LoraConfig, PeftModel, get_peft_model
from torch.testing import assert_close
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2ForSequenceClassification,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    TrainerCallback,
)

from rlhf_recipes import PPOTrainer
from rlhf_recipes.models.roles import is_critic_parameter
from rlhf_recipes.ppo.passes import policy_pass
from rlhf_recipes.ppo.rollout import texts_of
from tests.ppo.support import EOS, answer, logged, rollout, trained, without_chance

PAGE = Path(__file__).resolve().parents[1] / "docs" / "trl_behaviour.md"
STEP = {"max_steps": 1, "num_iterations": 1}
NEW_LORA = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear")


def length(completion_ids, **kwargs):
    return [float(len(ids)) for ids in completion_ids]


class Recorder:
    """A reward function that keeps what it was called with."""

    __name__ = "recorder"

    def __init__(self):
        self.calls = []

    def __call__(self, **given):
        self.calls.append(given)
        return length(**given)

    def prompts(self, call=0):
        return self.calls[call]["prompts"]

    def lengths(self, call=0):
        return length(self.calls[call]["completion_ids"])


@pytest.fixture
def make(make_trainer):
    """Make a trainer with a head as its critic and the number of tokens as its reward, unless told otherwise."""

    def trainer(reward_funcs=length, **fields):
        return make_trainer(reward_funcs=reward_funcs, **({"critic": "head", "critic_init": "policy"} | fields))

    return trainer


@pytest.fixture
def make_given(make_config, tiny_model_path, prompts):
    """Make a trainer with arguments of the constructor; the others are the base model and the number of tokens."""

    def trainer(config=None, **given):
        args = make_config(**({"critic": "head", "critic_init": "policy"} | (config or {})))
        defaults = {"model": tiny_model_path, "peft_config": NEW_LORA, "reward_funcs": length}
        return PPOTrainer(args=args, **(defaults | {"train_dataset": prompts} | given))

    return trainer


@pytest.fixture(scope="session")
def chats(prompts):
    return Dataset.from_list([{"prompt": [{"role": "user", "content": row["prompt"]}]} for row in prompts])


def classifier(name):
    """A reward model as an instance, of another architecture than the policy's, for the tiny tokenizer."""
    config = GPT2Config(
        vocab_size=42,
        n_embd=16,
        n_layer=1,
        n_head=2,
        n_positions=64,
        initializer_range=0.5,
        num_labels=1,
        bos_token_id=None,
        eos_token_id=EOS,
        pad_token_id=0,
        name_or_path=name,
    )
    return GPT2ForSequenceClassification(config).eval()


def moved(trainer, before):
    """Names of the weights that training changed."""
    after = dict(trainer.model.named_parameters())
    return {name for name, weight in before.items() if not torch.equal(weight, after[name])}


def all_weights(trainer):
    return {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}


# 1. What is trained


def test_a_model_a_reward_and_prompts_are_enough(make_config, tiny_model_path, prompts):
    trainer = PPOTrainer(tiny_model_path, length, args=make_config(), train_dataset=prompts)
    assert trainer.reward_func_names == ["length"]
    assert trainer.eval_dataset is None
    plain = AutoModelForCausalLM.from_pretrained(tiny_model_path)
    ids = torch.tensor([[6, 7, 8]])
    assert_close(trainer.model(input_ids=ids).logits, plain(input_ids=ids).logits, atol=1e-5, rtol=1e-5)


def test_every_weight_of_a_whole_model_is_trained(make, tiny_model_path):
    trainer = make(model=tiny_model_path, **STEP)
    before = all_weights(trainer)
    trainer.train()
    policy = {name for name, _ in AutoModelForCausalLM.from_pretrained(tiny_model_path).named_parameters()}
    changed = moved(trainer, before)
    assert {name for name in changed if not is_critic_parameter(name)} == policy
    assert any(is_critic_parameter(name) for name in changed)


def check_only_adapters_move(trainer):
    before, trainable = all_weights(trainer), set(trained(trainer))
    trainer.train()
    changed = moved(trainer, before)
    assert changed == trainable, "all that is trainable moves, and the base does not"
    assert {name.split(".")[-3] for name in changed if "lora_" in name} >= {"lora_A", "lora_B"}


def test_a_new_adapter_is_trained_on_a_base_that_stays(make, tiny_model_path):
    check_only_adapters_move(make(model=tiny_model_path, peft_config=NEW_LORA, max_steps=2))


def test_a_model_with_an_adapter_is_trained_on_a_base_that_stays(make, tiny_model_path):
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model_path), copy.deepcopy(NEW_LORA))
    check_only_adapters_move(make(model=model, max_steps=2))


def test_adapters_of_experts_are_trained_and_saved(make, tiny_tokenizer, tmp_path):
    """All experts of a layer are one parameter, which LoRA reaches by its name; plain PEFT reads what was learnt."""
    config = Qwen3MoeConfig(
        vocab_size=len(tiny_tokenizer),
        hidden_size=32,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=64,
        initializer_range=0.2,
        eos_token_id=EOS,
        pad_token_id=0,
    )
    Qwen3MoeForCausalLM(config).save_pretrained(tmp_path / "base")
    tiny_tokenizer.save_pretrained(tmp_path / "base")
    lora = LoraConfig(
        task_type="CAUSAL_LM", r=4, target_modules=[], target_parameters=["experts.gate_up_proj", "experts.down_proj"]
    )
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), lora)
    trainer = make(model=model, max_steps=2)
    check_only_adapters_move(trainer)
    trainer.save_model(str(tmp_path / "saved"))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    ids = torch.tensor([[6, 7, 8, 9, 10, 11]])
    untrained = plain(input_ids=ids).logits
    reloaded = PeftModel.from_pretrained(plain, tmp_path / "saved")(input_ids=ids).logits
    assert (reloaded - untrained).abs().max() > 1e-3
    assert_close(trainer.model(input_ids=ids).logits, reloaded, atol=1e-5, rtol=1e-5)


def test_recomputed_activations_change_nothing(make):
    weights = []
    for checkpointing in (False, True):
        trainer = without_chance(make(gradient_checkpointing=checkpointing, max_steps=2))
        trainer.train()
        weights.append(trained(trainer))
    for name, weight in weights[0].items():
        assert_close(weights[1][name], weight, atol=1e-6, rtol=1e-5)


def test_options_of_loading_reach_the_model(make, tiny_model_path):
    trainer = make(
        model=tiny_model_path,
        peft_config=NEW_LORA,
        model_init_kwargs={"dtype": "bfloat16"},
        cast_lm_head_to_fp32=True,
        **STEP,
    )
    assert trainer.model.get_base_model().model.layers[0].mlp.up_proj.base_layer.weight.dtype == torch.bfloat16
    head = trainer.model.get_output_embeddings()
    assert head.weight.dtype == torch.float32
    batch = rollout(trainer)
    plain = AutoModelForCausalLM.from_pretrained(tiny_model_path, dtype=torch.bfloat16)
    for row in range(4):
        prompt = batch["prompt_ids"][row][batch["prompt_mask"][row].bool()]
        completion = batch["completion_ids"][row][batch["completion_mask"][row].bool()]
        states = plain.model(input_ids=torch.cat([prompt, completion])[None]).last_hidden_state[
            0, len(prompt) - 1 : -1
        ]
        expected = (states.float() @ plain.lm_head.weight.float().T).log_softmax(-1).gather(1, completion[:, None])
        found = batch["old_per_token_logps"][row, : len(completion)]
        assert_close(found, expected.flatten(), atol=2e-2, rtol=0.0)


def test_code_of_a_model_runs_only_where_it_is_trusted(make_given, tiny_model_path, tmp_path):
    folder = tmp_path / "remote"
    shutil.copytree(tiny_model_path, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "remote_llama", "architectures": ["RemoteForCausalLM"]}
    config["auto_map"] = {"AutoConfig": "remote.RemoteConfig", "AutoModelForCausalLM": "remote.RemoteForCausalLM"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "remote.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n\n\n"
        "class RemoteConfig(LlamaConfig):\n    model_type = 'remote_llama'\n\n\n"
        "class RemoteForCausalLM(LlamaForCausalLM):\n    config_class = RemoteConfig\n"
    )
    with pytest.raises((ValueError, OSError), match="trust_remote_code|custom code"):
        make_given(model=str(folder), config={"trust_remote_code": False})
    trainer = make_given(model=str(folder), config={"trust_remote_code": True})
    assert type(trainer.model.get_base_model()).__name__ == "RemoteForCausalLM"


# 2. Prompts


def test_plain_prompts_reach_rewards_and_model_as_they_are(make, prompts, tiny_tokenizer):
    seen = Recorder()
    trainer = make(reward_funcs=seen, **STEP)
    before = trained(trainer)
    trainer.train()
    assert moved(trainer, before) == set(before)
    [call] = seen.calls
    assert set(call["prompts"]) <= set(prompts["prompt"])
    assert call["prompt_ids"] == [tiny_tokenizer(text)["input_ids"] for text in call["prompts"]]
    decoded = tiny_tokenizer.batch_decode(call["completion_ids"], skip_special_tokens=True)
    assert call["completions"] == decoded
    assert logged(trainer, "completions/mean_length")[0] == pytest.approx(statistics.mean(seen.lengths()))


def test_conversations_go_through_the_chat_template(make, chats, tiny_tokenizer):
    seen = Recorder()
    trainer = make(reward_funcs=seen, dataset=chats, **STEP)
    before = trained(trainer)
    trainer.train()
    assert moved(trainer, before) == set(before)
    [call] = seen.calls
    assert all(prompt[0]["role"] == "user" for prompt in call["prompts"])
    texts = [f"<user> {prompt[0]['content']} <eos> <assistant> " for prompt in call["prompts"]]
    assert call["prompt_ids"] == [tiny_tokenizer(text)["input_ids"] for text in texts]
    decoded = tiny_tokenizer.batch_decode(call["completion_ids"], skip_special_tokens=True)
    assert call["completions"] == [[{"role": "assistant", "content": text}] for text in decoded]


def test_options_of_the_chat_template_reach_it(make_given, chats, tiny_tokenizer):
    tokenizer, seen = copy.deepcopy(tiny_tokenizer), Recorder()
    tokenizer.chat_template = "{{ 'good ' if cheerful else 'dull ' }}{{ messages[0]['content'] }}"
    trainer = make_given(
        config={"chat_template_kwargs": {"cheerful": True}, **STEP},
        processing_class=tokenizer,
        train_dataset=chats,
        reward_funcs=seen,
    )
    trainer.train()
    for prompt, ids in zip(seen.prompts(), seen.calls[0]["prompt_ids"], strict=True):
        assert ids == tiny_tokenizer(f"good {prompt[0]['content']}")["input_ids"]


def test_rollouts_take_the_prompts_in_order_and_each_several_times(make, prompts):
    seen = Recorder()
    trainer = make(
        reward_funcs=seen,
        shuffle_dataset=False,
        num_generations=4,
        steps_per_generation=4,
        gradient_accumulation_steps=2,
        num_iterations=2,
        max_steps=8,
    )
    steps = []
    original = trainer.training_step
    trainer.training_step = lambda *args, **kwargs: (steps.append(len(seen.calls)), original(*args, **kwargs))[1]
    trainer.train()
    assert trainer.args.generation_batch_size == 16
    for call in range(2):
        texts = prompts["prompt"][4 * call : 4 * call + 4]
        assert seen.prompts(call) == [text for text in texts for _ in range(4)]
    assert len(seen.calls) == 2
    assert len(steps) == 8 * 2, "two micro-batches in each optimizer step"
    assert logged(trainer, "step_time"), "TRL's own timing is logged"


def test_more_generations_than_a_micro_batch_has_rows(make):
    seen = Recorder()
    trainer = make(reward_funcs=seen, num_generations=8, **STEP)
    before = trained(trainer)
    trainer.train()
    assert moved(trainer, before) == set(before)
    assert len(seen.prompts()) == 8
    assert len(set(seen.prompts())) == 1


def test_the_size_of_a_rollout_is_said_in_one_way_only(make_config):
    assert make_config(generation_batch_size=16).steps_per_generation == 4
    assert make_config(steps_per_generation=3, gradient_accumulation_steps=1).generation_batch_size == 12
    with pytest.raises(ValueError, match="can not be both configured at the same time"):
        make_config(generation_batch_size=16, steps_per_generation=4)
    with pytest.raises(ValueError, match="divisible"):
        make_config(num_generations=3)


def test_a_stream_is_trained_on_in_its_order(make, prompts):
    seen = Recorder()
    trainer = make(
        reward_funcs=seen, dataset=prompts.to_iterable_dataset(), shuffle_dataset=False, num_generations=2, **STEP
    )
    assert trainer.args.accelerator_config.dispatch_batches is False
    before = trained(trainer)
    trainer.train()
    assert moved(trainer, before) == set(before)
    assert seen.prompts() == [text for text in prompts["prompt"][:4] for _ in range(2)]


def test_a_stream_is_not_dispatched_and_read_by_one_worker(make, prompts):
    stream = prompts.to_iterable_dataset()
    with pytest.raises(ValueError, match="dispatch_batches=False"):
        make(dataset=stream, accelerator_config={"dispatch_batches": True})
    assert make(dataset=stream, dataloader_num_workers=4).args.dataloader_num_workers == 0


def test_an_evaluation_stream_leaves_the_workers_of_training(make_given, prompts):
    trainer = make_given(config={"dataloader_num_workers": 2}, eval_dataset=prompts.to_iterable_dataset())
    assert trainer.get_train_dataloader().num_workers == 2
    assert trainer.get_eval_dataloader().num_workers == 0
    assert trainer.args.dataloader_num_workers == 2


@pytest.mark.slow
def test_workers_of_the_data_loader_change_nothing(make):
    seen = []
    for workers in (0, 2):
        seen.append(Recorder())
        make(reward_funcs=seen[-1], dataloader_num_workers=workers, **STEP).train()
    assert seen[0].prompts() == seen[1].prompts()


def test_training_data_is_required(make_given):
    with pytest.raises(ValueError, match="train_dataset"):
        make_given(train_dataset=None)


# 3. Rewards


def test_a_reward_is_required(make_given, make_config, tiny_model_path, prompts):
    with pytest.raises(ValueError, match="one or more rewards"):
        make_given(reward_funcs=[])
    with pytest.raises(TypeError, match="reward_funcs"):
        PPOTrainer(tiny_model_path, args=make_config(), train_dataset=prompts)


def test_columns_reach_the_rewards_with_their_rows(make, prompts):
    seen = Recorder()
    numbered = prompts.add_column("number", list(range(len(prompts))))
    make(reward_funcs=seen, dataset=numbered, **STEP).train()
    [call] = seen.calls
    assert [prompts["prompt"][number] for number in call["number"]] == call["prompts"]
    assert len(set(call["number"])) == 8


def test_several_rewards_are_weighed_and_each_is_logged(make):
    """Of functions that wait, that judge every second completion only, and that are called at once."""
    judged = []

    def every_second(completion_ids, **kwargs):
        judged.append([0.5 * len(ids) if i % 2 else None for i, ids in enumerate(completion_ids)])
        return judged[-1]

    async def waits(completion_ids, **kwargs):
        return [float(sum(ids)) for ids in completion_ids]

    def never(completions, **kwargs):
        return [None] * len(completions)

    seen, weights = Recorder(), [2.0, 0.5, 0.1, 3.0]
    trainer = make(reward_funcs=[seen, every_second, waits, never], reward_weights=weights, **STEP)
    before = trained(trainer)
    trainer.train()
    assert moved(trainer, before) == set(before)
    sums = [float(sum(ids)) for ids in seen.calls[0]["completion_ids"]]
    columns = {"recorder": seen.lengths(), "every_second": judged[0], "waits": sums}
    first = trainer.state.log_history[0]
    for name, values in columns.items():
        given = [value for value in values if value is not None]
        assert first[f"rewards/{name}/mean"] == pytest.approx(statistics.mean(given), rel=1e-5), name
        assert first[f"rewards/{name}/std"] == pytest.approx(statistics.stdev(given), rel=1e-4), name
    totals = [
        sum(weight * value for weight, value in zip(weights, row, strict=False) if value is not None)
        for row in zip(*columns.values(), strict=True)
    ]
    assert first["reward"] == pytest.approx(statistics.mean(totals), rel=1e-5)
    assert first["reward_std"] == pytest.approx(statistics.stdev(totals), rel=1e-4)
    assert first["score/total"] == pytest.approx(first["reward"], rel=1e-5)
    assert first["rewards/never/mean"] is None


def test_a_completion_that_nobody_judges_is_refused(make):
    def never(completions, **kwargs):
        return [None] * len(completions)

    with pytest.raises(ValueError, match="Every reward function .* returned None for completion 0"):
        make(reward_funcs=never, **STEP).train()


def test_reward_models_beside_functions_score_as_they_do_alone(make_given, chats, tiny_tokenizer):
    models, own = [classifier("one"), classifier("two")], copy.deepcopy(tiny_tokenizer)
    own.chat_template = "{% for message in messages %}{{ message['content'] + ' the ' }}{% endfor %}"
    seen = Recorder()
    trainer = make_given(
        config=STEP,
        reward_funcs=[models[0], seen, models[1]],
        reward_processing_classes=[tiny_tokenizer, None, own],
        train_dataset=chats,
    )
    trainer.train()
    [call] = seen.calls
    texts = []  # what was sampled stands behind the generation prompt as it is, with an end token if it ended
    for prompt, completion, ids in zip(call["prompts"], call["completions"], call["completion_ids"], strict=True):
        texts.append((prompt[0]["content"], completion[0]["content"], " <eos>" * (ids[-1] == 1)))
    rendered = [
        [f"<user> {prompt} <eos> <assistant> {completion}{end}" for prompt, completion, end in texts],
        [f"{prompt} the {completion}{end}" for prompt, completion, end in texts],
    ]
    for model, rows in zip(models, rendered, strict=True):
        with torch.no_grad():
            scores = [model(**tiny_tokenizer(text, return_tensors="pt")).logits.item() for text in rows]
        logged_mean = trainer.state.log_history[0][f"rewards/{model.config.name_or_path}/mean"]
        assert logged_mean == pytest.approx(statistics.mean(scores), abs=1e-5)


def test_tokenizers_of_rewards_are_one_each(make_given, tiny_tokenizer):
    trainer = make_given(reward_funcs=classifier("one"), reward_processing_classes=tiny_tokenizer)
    assert trainer.reward_processing_classes == [tiny_tokenizer]
    with pytest.raises(ValueError, match="reward_processing_classes|must match"):
        make_given(reward_funcs=[classifier("one"), classifier("two")], reward_processing_classes=tiny_tokenizer)


def test_rewards_see_the_state_of_the_trainer_and_log_beside_it(make):
    steps, first_tokens, short = [], [], []

    def talks(completion_ids, trainer_state, log_extra, log_metric, **kwargs):
        steps.append(trainer_state.global_step)
        first_tokens.append([ids[0] for ids in completion_ids])
        short.append(statistics.mean(len(ids) < 5 for ids in completion_ids))
        log_extra("first_token", first_tokens[-1])
        log_metric("share_of_short", short[-1])
        return length(completion_ids)

    trainer = make(reward_funcs=talks, log_completions=True, num_iterations=1, max_steps=3)
    trainer.train()
    assert steps == [0, 1, 2]
    assert logged(trainer, "share_of_short") == pytest.approx(short)
    assert list(trainer._logs["extra"]["first_token"]) == first_tokens[-1]


def test_callbacks_see_every_step_and_every_log(make):
    class Counts(TrainerCallback):
        steps, entries = 0, 0

        def on_step_end(self, *args, **kwargs):
            self.steps += 1

        def on_log(self, *args, logs, **kwargs):
            self.entries += "loss" in logs

    counts = Counts()
    make(callbacks=[counts], max_steps=3).train()
    assert (counts.steps, counts.entries) == (3, 3)


# 4. Evaluation


@pytest.mark.parametrize("generations", [1, 2])
def test_evaluation_samples_and_logs_for_itself(make, prompts, generations):
    """Before the first step, and while it trains with another number of completions for each prompt."""
    seen = Recorder()
    trainer = make(
        reward_funcs=seen,
        eval_strategy="steps",
        eval_steps=1,
        eval_on_start=True,
        num_generations=4,
        num_generations_eval=generations,
        **STEP,
    )
    trainer.train()
    evaluations, of_one = logged(trainer, "eval_reward"), 16 * generations // 8
    assert len(evaluations) == 2
    assert len(seen.calls) == 2 * of_one + 1
    for number, calls in enumerate([range(of_one), range(of_one + 1, 2 * of_one + 1)]):
        texts = [text for call in calls for text in seen.prompts(call)]
        assert sorted(texts) == sorted(generations * list(prompts["prompt"]))
        lengths = [value for call in calls for value in seen.lengths(call)]
        assert evaluations[number] == pytest.approx(statistics.mean(lengths), rel=1e-5)


def of_kind(kind, rows):
    rows = rows.to_iterable_dataset() if "stream" in kind else rows
    both = {"one": rows, "two": rows}
    if "DatasetDict" in kind:
        return IterableDatasetDict(both) if "stream" in kind else DatasetDict(both)
    return both if "dict" in kind else rows


KINDS = ["rows", "stream", "dict", "stream dict", "DatasetDict", "stream DatasetDict"]


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_data_of_every_kind(make_given, prompts, kind):
    few = prompts.select(range(8))
    given = make_given(eval_dataset=of_kind(kind, few))
    later = make_given()
    names = ["eval_one_reward", "eval_two_reward"] if "ict" in kind else ["eval_reward"]
    for metrics in (given.evaluate(), later.evaluate(eval_dataset=of_kind(kind, few))):
        for name in names:
            assert 1.0 <= metrics[name] <= 8.0  # the mean number of tokens
        assert ("eval_reward" in metrics) == (len(names) == 1)


# 5. The loss


def loss_of(make, batch, **fields):
    """Loss and metrics of a batch under a configuration, for the same weights."""
    trainer = make(per_device_train_batch_size=8, gradient_accumulation_steps=1, vf_coef=0.0, **fields)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    trainer.state.global_step, trainer._step = 1, 1
    loss = trainer._compute_loss(trainer.model, dict(batch))
    loss.backward()
    return loss.item(), {name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None}, trainer


@pytest.fixture
def batch(make):
    trainer = without_chance(make(per_device_train_batch_size=8, gradient_accumulation_steps=1))
    batch = rollout(trainer)
    batch["old_per_token_logps"] = batch["old_per_token_logps"] - torch.randn(batch["advantages"].shape)
    return batch


CLIPS = {
    "clipped": {},
    "epsilon_high": {"epsilon_high": 0.6},
    "delta": {"delta": 1.5},
    "sequence": {"importance_sampling_level": "sequence"},
}


@pytest.mark.parametrize("name", CLIPS)
def test_clips_of_the_loss_equal_loops_by_hand(make, batch, name):
    loss, _, trainer = loss_of(make, batch, **CLIPS[name])
    high, delta = 1.0 + CLIPS[name].get("epsilon_high", 0.2), CLIPS[name].get("delta", math.inf)
    with torch.no_grad():
        new = policy_pass(trainer, trainer.model, texts_of(batch)).logps
    terms = []
    for row in range(8):
        size = int(batch["completion_mask"][row].sum())
        ratios = (new - batch["old_per_token_logps"])[row, :size].double()
        ratios = (ratios.mean().expand(size) if name == "sequence" else ratios).exp().tolist()
        for ratio, advantage in zip(ratios, batch["advantages"][row, :size].tolist(), strict=True):
            terms.append(-min(min(ratio, delta) * advantage, min(max(ratio, 0.8), high) * advantage))
    assert loss == pytest.approx(statistics.mean(terms), rel=1e-4, abs=1e-6)


def test_the_entropy_bonus_is_its_weight_times_the_entropy(make, batch):
    plain, without, _ = loss_of(make, batch)
    trainer = make(per_device_train_batch_size=8, gradient_accumulation_steps=1)
    entropies = policy_pass(trainer, trainer.model, texts_of(batch)).entropies
    entropy = entropies[batch["completion_mask"].bool()].mean()
    with_bonus, gradients, _ = loss_of(make, batch, entropy_coef=0.5)
    assert plain - with_bonus == pytest.approx(0.5 * entropy.item(), rel=1e-4)
    entropy.backward()
    for name, parameter in trainer.model.named_parameters():
        if parameter.grad is not None:
            assert_close(without[name] - gradients[name], 0.5 * parameter.grad, atol=1e-6, rtol=1e-3)


def test_the_adaptive_entropy_weight_grows_once_per_step(make):
    trainer = make(
        entropy_coef=0.01,
        use_adaptive_entropy=True,
        entropy_target=15.0,  # more than 35 tokens can have
        entropy_coef_delta=0.005,
        gradient_accumulation_steps=2,
        max_steps=3,
    )
    trainer.train()
    assert logged(trainer, "ppo/entropy_coef") == pytest.approx([0.015, 0.02, 0.025])


def test_further_passes_over_a_rollout_are_off_policy_by_what_was_learnt(make):
    seen = Recorder()
    trainer = make(reward_funcs=seen, num_iterations=3, max_steps=3)
    trainer.train()
    assert len(seen.calls) == 1
    first, *later = logged(trainer, "ppo/approx_kl")
    assert first == pytest.approx(0.0, abs=1e-9)
    assert min(later) > 1e-6


def whole(prompt, repeat=0):
    """A completion that ends: seven words at most, and the end token."""
    tokens = [token for token in answer(prompt, repeat) if token != EOS][:7]
    return [*tokens, EOS]


def cut(prompt, repeat=0):
    return [6 + (sum(prompt) + repeat + t) % 20 for t in range(8)]


def some_cut(prompt, repeat=0):
    return (cut if sum(prompt) % 2 else whole)(prompt, repeat)


def test_completions_that_were_cut_off_are_masked(make):
    batches = [rollout(without_chance(make(mask_truncated_completions=mask), some_cut)) for mask in (False, True)]
    ended = torch.tensor([EOS in row for row in batches[0]["completion_ids"].tolist()])
    assert 0 < ended.sum() < 8
    kept, masked = batches[1]["completion_mask"][ended], batches[1]["completion_mask"][~ended]
    assert torch.equal(kept, batches[0]["completion_mask"][ended])
    assert not masked.any()
    assert not batches[1]["advantages"][~ended].any()
    counted = batches[1]["advantages"][batches[1]["completion_mask"].bool()]
    assert counted.mean().item() == pytest.approx(0.0, abs=1e-6), "whitened over what counts"


def test_a_rollout_that_was_cut_off_everywhere_teaches_nothing(make):
    trainer = without_chance(make(mask_truncated_completions=True, max_steps=2), cut)
    before = all_weights(trainer)
    trainer.train()
    assert logged(trainer, "loss") == [0.0, 0.0]
    assert moved(trainer, before) == set()


def test_padding_to_a_multiple_changes_no_number(make):
    batches = [rollout(without_chance(make(pad_to_multiple_of=size))) for size in (None, 16)]
    assert batches[1]["prompt_ids"].shape == batches[1]["completion_ids"].shape == (8, 16)
    for name in ("old_per_token_logps", "old_values", "advantages", "returns"):
        short = batches[0][name]
        assert_close(batches[1][name][:, : short.size(1)], short, atol=1e-5, rtol=1e-4)
        assert not batches[1][name][:, short.size(1) :].any()


# 6. The page


def page_rows():
    """Name, outcome, and where or why of each of TRL's tests; those that share the rest are in one line."""
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in PAGE.read_text().splitlines()]
    lines = [row for row in cells if len(row) == 3 and row[0].startswith("`test_")]
    return [(name, outcome, where) for names, outcome, where in lines for name in re.findall(r"`(test_\w+)`", names)]


def test_the_page_knows_every_test_once_and_one_of_three_outcomes():
    names = [row[0] for row in page_rows()]
    assert len(names) == len(set(names)) > 100
    assert {row[1] for row in page_rows()} == {"passes", "refused", "not applicable"}


def test_what_passes_has_a_test_of_ours():
    tests = {node.name for node in ast.parse(Path(__file__).read_text()).body if isinstance(node, ast.FunctionDef)}
    for name, outcome, where in page_rows():
        named = set(re.findall(r"`(test_\w+)`", where))
        assert named <= tests, f"{name}: {sorted(named - tests)} are not in this file"
        assert bool(named) == (outcome == "passes"), f"{name}: a test shows that it passes, and nothing else"


REFUSED = sorted({re.search(r"`([^`]+)`", row[2])[1] for row in page_rows() if row[1] == "refused"})


@pytest.mark.parametrize("said", REFUSED)
def test_what_is_refused_is_refused_by_its_name(make_config, said):
    """A field with the value of TRL's test, or an argument that the constructor does not have."""
    field = yaml.safe_load(said)
    if isinstance(field, str):
        assert said not in inspect.signature(PPOTrainer.__init__).parameters
    else:
        with pytest.raises(ValueError, match="|".join(f"`{name}`" for name in field)):
            make_config(**field)
