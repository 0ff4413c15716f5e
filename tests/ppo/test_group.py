"""GRPO and RLOO on shared roles: the numbers of TRL's own trainers, and of models that share nothing."""

from collections import Counter

import pytest
import torch
import trl
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BitsAndBytesConfig

from rlhf_recipes import GRPOAdapterConfig, GRPOAdapterTrainer, PPOConfig, RLOOAdapterConfig, RLOOAdapterTrainer
from rlhf_recipes.evaluation import evaluate_policy
from rlhf_recipes.rewards import EnsembleReward
from tests.ppo.support import EOS, answer

KINDS = {
    "grpo": (GRPOAdapterTrainer, GRPOAdapterConfig, trl.GRPOTrainer, trl.GRPOConfig),
    "rloo": (RLOOAdapterTrainer, RLOOAdapterConfig, trl.RLOOTrainer, trl.RLOOConfig),
}
both = pytest.mark.parametrize("kind", KINDS)


def settings(tmp_path, **fields):
    return {
        "output_dir": str(tmp_path / "run"),
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 8,
        "max_steps": 2,
        "learning_rate": 1e-3,
        "beta": 0.1,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    } | fields


@pytest.fixture
def make(tmp_path, sft_adapter, reward_adapter, prompts):
    """Make one of the trainers; keyword arguments change its configuration."""

    def make(kind, reward_funcs=None, model=None, dataset=None, **fields):
        own = {name: fields.pop(name) for name in ("peft_config", "quantization_config") if name in fields}
        trainer, config, *_ = KINDS[kind]
        return trainer(
            model=str(sft_adapter) if model is None else model,
            reward_funcs=str(reward_adapter) if reward_funcs is None else reward_funcs,
            args=config(**settings(tmp_path, **fields)),
            train_dataset=prompts if dataset is None else dataset,
            **own,
        )

    return make


def without_chance(trainer):
    """Let a trainer "sample" completions that depend on nothing but the prompt and its place in the group."""
    single = isinstance(trainer, trl.RLOOTrainer)  # it returns the completions alone

    def generate(prompt_ids, *args):
        seen = Counter()
        rows = []
        for prompt in map(tuple, prompt_ids):
            rows.append(answer(prompt, seen[prompt]))
            seen[prompt] += 1
        return rows if single else (rows, None)

    trainer._generate_single_turn = generate
    return trainer


def even(completion_ids, **kwargs):
    """A reward that differs within a group, and depends on the token ids alone."""
    return [sum(token % 2 == 0 for token in ids) / len(ids) for ids in completion_ids]


def adapter_of(trainer, name):
    """Copies of an adapter's weights, by the names that they have as the policy's."""
    named = trainer.model.named_parameters()
    return {key.replace(f".{name}.", ".default."): p.detach().clone() for key, p in named if f".{name}." in key}


@both
def test_the_updates_are_those_of_trls_own_trainer(kind, make, tmp_path, tiny_model_path, sft_adapter, prompts):
    _, _, theirs, config = KINDS[kind]
    ours = without_chance(make(kind, even, learning_rate=1e-2))
    policy = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny_model_path), sft_adapter, is_trainable=True
    )
    plain = theirs(policy, even, config(**settings(tmp_path, learning_rate=1e-2, disable_dropout=True)), prompts)
    before = adapter_of(ours, "default")
    ours.train()
    without_chance(plain).train()
    after, expected = adapter_of(ours, "default"), adapter_of(plain, "default")
    assert after.keys() == expected.keys() != set()
    for name, weights in after.items():
        assert_close(weights, expected[name], rtol=1e-3, atol=1e-5)
        assert not torch.equal(weights, before[name])
    for mine, trls in zip(ours.state.log_history[:2], plain.state.log_history[:2], strict=True):
        assert mine["reward"] == pytest.approx(trls["reward"])
        assert mine["kl_per_token"] == pytest.approx(trls["kl"], abs=1e-5)
        assert mine["kl"] == pytest.approx(mine["kl_per_token"] * mine["completions/mean_length"])


@both
def test_a_reward_adapter_gives_the_score_of_its_own_model(
    kind, make, reward_adapter, tiny_model_path, tiny_tokenizer, prompts
):
    base = AutoModelForSequenceClassification.from_pretrained(tiny_model_path, num_labels=1)
    apart = PeftModel.from_pretrained(base, reward_adapter).eval()
    seen = []

    def spy(prompt_ids, completion_ids, finished, **kwargs):
        seen.extend(zip(prompt_ids, completion_ids, finished, strict=True))
        return [0.0] * len(prompt_ids)

    trainer = without_chance(make(kind, [str(reward_adapter), spy, even], reward_weights=[1.0, 0.0, 0.5], max_steps=1))
    trainer.train()
    scores = []
    for prompt, completion, finished in seen:
        assert finished == (completion[-1] == EOS)
        with torch.no_grad():
            hidden = apart.base_model.model.model(input_ids=torch.tensor([prompt + completion])).last_hidden_state
            scores.append(apart.base_model.model.score(hidden)[0, -1, 0].item())
    entry = trainer.state.log_history[0]
    assert entry[f"rewards/{reward_adapter.name}/mean"] == pytest.approx(sum(scores) / len(scores), abs=1e-5)
    expected = sum(scores) / len(scores) + 0.5 * entry["rewards/even/mean"]
    assert entry["reward"] == pytest.approx(expected, abs=1e-5)


@both
def test_the_policy_alone_is_trained_and_saved(kind, make, reward_adapter, tiny_model_path, sft_adapter):
    trainer = make(kind, EnsembleReward([str(reward_adapter), even], "min"), learning_rate=1e-2)
    frozen = ("ref", "reward_0_0")
    before = {name: adapter_of(trainer, name) for name in (*frozen, "default")}
    assert not torch.equal(*(torch.cat([p.flatten() for p in before[name].values()]) for name in frozen))
    trainer.train()
    for name in frozen:
        after = adapter_of(trainer, name)
        assert all(torch.equal(after[key], weights) for key, weights in before[name].items())
    assert any(not torch.equal(adapter_of(trainer, "default")[key], p) for key, p in before["default"].items())
    assert f"rewards/{trainer.reward_func_names[0]}/disagreement" in trainer.state.log_history[0]

    trainer.save_model()
    folder = trainer.args.output_dir
    ids = torch.tensor([[7, 8, 9, 10]])
    with torch.no_grad():
        saved = AutoPeftModelForCausalLM.from_pretrained(folder)(input_ids=ids).logits
        assert_close(saved, trainer.model.eval()(input_ids=ids).logits, rtol=1e-4, atol=1e-5)
        start = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model_path), sft_adapter)
        assert not torch.allclose(saved, start(input_ids=ids).logits, atol=1e-3)


@pytest.mark.parametrize(("kind", "beta"), [("grpo", 0.0), ("grpo", 0.1), ("rloo", 0.0)])
def test_the_reference_of_the_evaluation_is_the_sft_model(
    kind, beta, make, reward_adapter, tiny_model_path, sft_adapter, prompts
):
    seen = []

    def spy(prompt_ids, completion_ids, **kwargs):
        seen.extend(zip(prompt_ids, completion_ids, strict=True))
        return [float(len(ids)) for ids in completion_ids]

    trainer = make(kind, [str(reward_adapter), spy], reward_weights=[1.0, 0.0], beta=beta)
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if ".default." in name:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    evaluation = evaluate_policy(trainer, prompts, gold="spy", rows=16)
    base = AutoModelForCausalLM.from_pretrained(tiny_model_path)
    start, kl = PeftModel.from_pretrained(base, sft_adapter).eval(), 0.0
    for prompt, completion in seen[:16]:
        ids = torch.tensor([prompt + completion])
        with torch.no_grad():
            logps = [model(input_ids=ids).logits[0].log_softmax(-1) for model in (trainer.model.eval(), start)]
        at = torch.arange(len(prompt) - 1, len(prompt) + len(completion) - 1)
        kl += (logps[0] - logps[1])[at, torch.tensor(completion)].sum().item() / 16
    assert evaluation["policy"]["kl"] == pytest.approx(kl, rel=1e-3)
    assert evaluation["reference"]["kl"] == 0.0
    assert evaluation["policy"]["gold_score"] == sum(len(ids) for _, ids in seen[:16]) / 16


def test_a_resumed_run_ends_like_one_that_was_never_stopped(make, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 1, "learning_rate": 1e-2}
    whole = without_chance(make("grpo", even, **options))
    whole.train()
    folder = tmp_path / "run" / "checkpoint-1"
    assert not (folder / "ref").exists(), "only the policy is kept"
    resumed = without_chance(make("grpo", even, **options))
    resumed.train(resume_from_checkpoint=str(folder))
    assert resumed.state.global_step == 2
    expected = adapter_of(whole, "default")
    for name, weights in adapter_of(resumed, "default").items():
        assert_close(weights, expected[name])


def test_a_fresh_adapter_on_a_base_in_four_bits(make, tiny_model_path):
    trainer = make(
        "grpo",
        even,
        model=tiny_model_path,
        peft_config=LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear"),
        quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
        max_steps=1,
    )
    trained = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert trained
    assert all(".default." in name and p.dtype == torch.float32 for name, p in trained.items())
    trainer.train()
    assert trainer.state.log_history[0]["kl"] == 0.0, "the first rollout is the reference's"


def test_bad_input_is_refused_with_the_fix(make, tmp_path, tiny_model_path, prompts, sft_adapter):
    with pytest.raises(ValueError, match="trains an adapter.*Give `LoraConfig"):
        make("grpo", even, model=tiny_model_path)
    with pytest.raises(TypeError, match="must be a `RLOOAdapterConfig`, got PPOConfig"):
        RLOOAdapterTrainer(str(sft_adapter), even, PPOConfig(str(tmp_path), use_cpu=True, bf16=False), prompts)
    with pytest.raises(ValueError, match="One rollout takes 2 different prompts, but the dataset has 1"):
        make("rloo", even, dataset=prompts.select([0]))
    config = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", init_lora_weights="pissa")
    with pytest.raises(ValueError, match="takes a part of the base out of it"):
        make("grpo", even, model=tiny_model_path, peft_config=config)
    with pytest.raises(ValueError, match="`adapter_tolerance` must be positive, got 0"):
        GRPOAdapterConfig(**settings(tmp_path, adapter_tolerance=0.0))
    with pytest.raises(ValueError, match="`num_generations` is the size of a group, 2 or more, got null"):
        RLOOAdapterConfig(**settings(tmp_path, num_generations=None))
    with pytest.raises(ValueError, match="`beta` must be a number, got 'much'"):
        RLOOAdapterConfig(**settings(tmp_path, beta="much"))


def test_a_policy_without_a_reference_is_not_compared(tmp_path, tiny_model_path, prompts):
    config = trl.GRPOConfig(**settings(tmp_path, beta=0.0))
    trainer = trl.GRPOTrainer(tiny_model_path, even, config, prompts)
    with pytest.raises(ValueError, match="holds no reference"):
        evaluate_policy(trainer, prompts, rows=2)
