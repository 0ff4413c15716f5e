"""What must not change a loss or an updated weight: padding, how a rollout is cut in parts, the form of the prompts.

The optimizer is plain gradient descent without clipping, so that a loss of the wrong size moves the weights otherwise.
"""

import copy

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from torch.testing import assert_close
from transformers import BitsAndBytesConfig

from rlhf_recipes import PPOTrainer
from tests.ppo.support import EOS, answer, logged, rollout, slow_but, trained, unpadded, without_chance

FOUR_BIT = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
SETUPS = ["llama", "llama_fresh_adapter", "llama_whole", "llama_4bit", "gpt2", "gpt2_whole"]
WHOLE = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}
DESCENT = {"optim": "sgd", "max_grad_norm": 0.0, "learning_rate": 0.1, "critic_learning_rate": 0.1}


def count(completion_ids, **kwargs):
    return [0.3 * len(ids) - 0.05 * (sum(ids) % 7) for ids in completion_ids]


@pytest.fixture
def setups(tiny_model_path, gpt2_path):
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear")
    fresh = {"reward_funcs": count, "critic_init": "policy"}
    return {
        "llama": {},
        "llama_fresh_adapter": {"model": tiny_model_path, "peft_config": lora},
        "llama_whole": {"model": tiny_model_path, **fresh},
        "llama_4bit": {"quantization_config": FOUR_BIT},
        "gpt2": {"model": gpt2_path, "peft_config": lora, **fresh},
        "gpt2_whole": {"model": gpt2_path, **fresh},
    }


@pytest.fixture
def eight(prompts):
    return prompts.select(range(8))


def outcome(trainer):
    """Losses and moved weights of one rollout with two epochs, each of which takes all of it in one step."""
    before = trained(trainer)
    trainer.train()
    assert len(logged(trainer, "loss")) == 2
    return logged(trainer, "loss"), {name: p - before[name] for name, p in trained(trainer).items()}


def assert_same(found, expected):
    assert found[0] == pytest.approx(expected[0], rel=1e-5, abs=1e-5)
    assert max(moved.abs().max() for moved in expected[1].values()) > 1e-3, "the test needs weights that move"
    for name, moved in expected[1].items():
        assert_close(found[1][name], moved, atol=1e-5, rtol=1e-3, msg=lambda text, name=name: f"{name}: {text}")


def fields_for_two_steps(**fields):
    return {"max_steps": 2, "entropy_coef": 0.01, "vf_coef": 0.5, **DESCENT, **fields}


@pytest.mark.parametrize("setup", slow_but(SETUPS, "llama", "llama_4bit", "gpt2_whole"))
def test_neither_padding_nor_the_size_of_micro_batches_matters(make_trainer, setups, eight, setup):
    fields = {"dataset": eight, **setups[setup], **fields_for_two_steps()}
    whole = without_chance(make_trainer(**fields, **WHOLE))
    prompt_ids, _, _ = whole._tokenize_prompts(list(eight["prompt"]))
    assert len({len(answer(ids)) for ids in prompt_ids}) > 3, "the test needs ragged lengths"
    expected = outcome(whole)
    parts = make_trainer(**fields, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    assert_same(outcome(without_chance(parts)), expected)
    wide = make_trainer(**fields, **WHOLE, pad_to_multiple_of=24)
    assert_same(outcome(without_chance(wide)), expected)


VARIANTS = {
    "token": {},
    "sequence": {"loss_aggregation": "sequence"},
    "fixed": {"loss_aggregation": "fixed"},
    "full_kl": {"kl_placement": "loss", "kl_estimator": "full", "kl_coef": 0.5},
    "k3": {"kl_placement": "loss", "kl_estimator": "k3", "kl_coef": 0.5},
    "bandit": {
        "advantage_estimator": "bandit",
        "loss_aggregation": "sequence",
        "importance_sampling_level": "sequence_product",
    },
    "whitened": {"whiten_rewards": True, "score_scaling": "batch"},
    "redistributed": {"reward_placement": "redistributed"},
    "attention": {"reward_placement": "attention"},
    "trunk": {"critic": "head"},
    "cut_off": {"mask_truncated_completions": True, "loss_aggregation": "sequence"},
    "ptx": {"ptx_coef": 0.3},
}


OF_MICRO_BATCHES = {
    *("entropy", "ppo/policy_loss", "ppo/clip_fraction", "ppo/approx_kl", "ppo/ratio_mean", "ppo/ratio_max"),
    *("ppo/kl_loss", "ppo/ptx_loss", "critic/value_loss", "critic/clip_fraction"),
}


@pytest.mark.parametrize("variant", slow_but(VARIANTS, *VARIANTS.keys() - {"token", "k3", "attention"}))
def test_gradient_accumulation_gives_the_step_of_the_whole_rollout(make_trainer, eight, variant):
    fields = fields_for_two_steps(dataset=eight, **VARIANTS[variant])
    if variant == "ptx":  # texts of one length: their loss is a mean over the tokens of a micro-batch
        fields["ptx_dataset"] = Dataset.from_list(
            [{"text": f"the film was {word}"} for word in "good bad dull".split()]
        )
        fields["num_iterations"] = 1
        fields["max_steps"] = 1
    found = []
    for size, steps in ((8, 1), (2, 4)):
        shape = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps}
        trainer = without_chance(make_trainer(**fields, **shape))
        before = trained(trainer)
        trainer.train()
        moved = {name: p - before[name] for name, p in trained(trainer).items()}
        found.append((logged(trainer, "loss"), moved, trainer.state.log_history))
    assert_same(found[1], found[0])
    for part, whole in zip(found[1][2], found[0][2], strict=True):
        for name in OF_MICRO_BATCHES & whole.keys():
            assert part[name] == pytest.approx(whole[name], rel=1e-5, abs=1e-5), name


@pytest.mark.parametrize("setup", SETUPS)
def test_what_stands_in_padding_does_not_matter(make_trainer, setups, eight, setup):
    """More columns on both sides, with random tokens in them, as other rows of a larger batch would bring them."""
    trainer = without_chance(make_trainer(dataset=eight, **WHOLE, **setups[setup]))
    trainer.current_gradient_accumulation_steps, trainer.state.global_step = 1, 1
    batch = rollout(trainer)
    batch["old_per_token_logps"] += 0.2 * torch.randn(batch["advantages"].shape)
    padded = dict(batch)
    for name, tensor in batch.items():
        if tensor.dim() == 2:
            side = (3, 0) if name.startswith("prompt") else (0, 4)
            padded[name] = torch.nn.functional.pad(tensor, side)
    for name in ("prompt", "completion"):
        noise = torch.randint(6, 30, padded[f"{name}_ids"].shape)
        padded[f"{name}_ids"] = torch.where(padded[f"{name}_mask"].bool(), padded[f"{name}_ids"], noise)
    for name in ("old_per_token_logps", "old_values", "advantages", "returns", "ref_per_token_logps"):
        padded[name] = padded[name].masked_fill(~padded["completion_mask"].bool(), 1e6)
    found = []
    for rows in (batch, padded):
        trainer.model.zero_grad()
        trainer._step = 1
        loss = trainer._compute_loss(trainer.model, rows)
        loss.backward()
        found.append(
            (loss.detach(), {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.requires_grad})
        )
    assert_close(found[1][0], found[0][0], atol=1e-5, rtol=1e-5)
    assert max(gradient.abs().max() for gradient in found[0][1].values()) > 1e-2
    for name, gradient in found[0][1].items():
        assert_close(found[1][1][name], gradient, atol=1e-5, rtol=1e-3, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("pad", slow_but(["<unk>", "good", "<eos>"], "good", "<eos>"))
def test_the_padding_token_does_not_matter(
    make_config, make_trainer, tiny_tokenizer, sft_adapter, reward_adapter, pad
):
    """With real samples: also if padding is the end token, which is counted once, where it was sampled (C43)."""
    prompts = Dataset.from_list([{"prompt": text} for text in ["the film", "a", "this actor was so", "it"] * 2])
    fields = {**fields_for_two_steps(**WHOLE), "seed": 3}
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.pad_token = pad
    found, batches = [], []
    for processing_class in (None, tokenizer):
        trainer = PPOTrainer(
            model=str(sft_adapter),
            reward_funcs=str(reward_adapter),
            args=make_config(**fields, max_completion_length=24),
            train_dataset=prompts,
            processing_class=processing_class,
        )
        torch.manual_seed(1)
        batches.append(rollout(trainer))
        trainer.state.global_step = 0
        found.append(outcome(trainer))
    assert trainer.processing_class.pad_token == pad
    assert_same(found[1], found[0])
    lengths = set()
    for row in range(8):
        prompt, completion = unpadded(batches[1], row)
        assert (prompt, completion) == unpadded(batches[0], row)
        assert EOS not in completion[:-1]
        lengths.add(len(completion))
        if len(completion) < 24:
            assert completion[-1] == EOS
    assert len(lengths) > 2, lengths


def test_four_completions_of_a_prompt_are_four_rows_with_that_prompt(make_trainer, prompts):
    two = prompts.select([0, 5])
    fields = fields_for_two_steps(**WHOLE)
    groups = without_chance(make_trainer(dataset=two, num_generations=4, **fields))
    assert len({tuple(answer([6, 7], repeat)) for repeat in range(4)}) == 4
    repeated = Dataset.from_list([row for row in two for _ in range(4)])
    single = without_chance(make_trainer(dataset=repeated, num_generations=1, **fields))
    assert_same(outcome(groups), outcome(single))


def test_a_conversation_is_the_text_that_its_template_makes(make_trainer, eight):
    fields = fields_for_two_steps(per_device_train_batch_size=4)
    texts = [row["prompt"] for row in eight]
    conversations = Dataset.from_list([{"prompt": [{"role": "user", "content": text}]} for text in texts])
    plain = Dataset.from_list([{"prompt": f"<user> {text} <eos> <assistant> "} for text in texts])
    found = [outcome(without_chance(make_trainer(dataset=rows, **fields))) for rows in (conversations, plain)]
    assert_same(found[0], found[1])
