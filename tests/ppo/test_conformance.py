"""Checks of the conformance list that need whole runs: KL 0 at the start, sampling, what knobs do to learning."""

import pytest
import torch
from peft import LoraConfig
from scipy.stats import chisquare
from transformers import BitsAndBytesConfig, GenerationConfig, LlamaConfig, LlamaForCausalLM

from tests.ppo.support import logged, rollout, slow_but

FOUR_BIT = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
LORA = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear")


def count(completion_ids, **kwargs):
    return [0.1 * len(ids) for ids in completion_ids]


STARTS = {"trained adapter": ("k1", "full"), "fresh adapter": ("full",), "4-bit": ("k3",), "whole": ("full",)}


@pytest.mark.parametrize(
    ("start", "estimator"),
    [
        pytest.param(start, estimator, marks=[] if estimator in often else pytest.mark.slow)
        for start, often in STARTS.items()
        for estimator in ("k1", "k3", "full")
    ],
)
def test_kl_is_0_at_the_start_at_any_temperature(make_trainer, tiny_model_path, start, estimator):
    """C25 and C16: policy and reference are the same network, and both divide by the temperature."""
    fresh = {"model": tiny_model_path, "reward_funcs": count, "critic_init": "policy"}
    fields = {
        "trained adapter": {},
        "fresh adapter": {**fresh, "peft_config": LORA},
        "4-bit": {**fresh, "peft_config": LORA, "quantization_config": FOUR_BIT},
        "whole": fresh,
    }[start]
    trainer = make_trainer(temperature=0.6, kl_estimator=estimator, max_steps=1, num_iterations=1, **fields)
    trainer.train()
    first = trainer.state.log_history[0]
    assert first["kl"] == pytest.approx(0.0, abs=1e-5)
    assert first["ppo/ratio_max"] == pytest.approx(1.0, abs=1e-5)
    assert first["ppo/approx_kl"] == pytest.approx(0.0, abs=1e-8)
    assert first["ppo/clip_fraction"] == 0.0


@pytest.mark.parametrize("estimator", slow_but(["k1", "full"], "full"))
def test_the_anchors_of_the_kl_loss(make_trainer, estimator):
    """C26: to the old policy it is 0 on the first minibatch of every rollout; to the reference only of the first."""
    found = {}
    for anchor in ("old", "reference"):
        fields = {"kl_placement": "loss", "kl_anchor": anchor, "kl_estimator": estimator, "kl_coef": 0.1}
        trainer = make_trainer(**fields, max_steps=4, learning_rate=5e-3)
        trainer.train()
        found[anchor] = logged(trainer, "ppo/kl_loss")
    for losses in found.values():
        assert losses[0] == pytest.approx(0.0, abs=1e-6)
        assert abs(losses[1]) > 1e-4
    assert found["old"][2] == pytest.approx(0.0, abs=1e-6)
    assert found["reference"][2] > 1e-3


@pytest.fixture
def narrow_minded_path(tiny_tokenizer, tmp_path):
    """A model of 150 tokens whose files ask for top-k, top-p, another temperature and a repetition penalty."""
    config = LlamaConfig(
        vocab_size=150,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
        initializer_range=0.2,
        eos_token_id=tiny_tokenizer.eos_token_id,
        pad_token_id=tiny_tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(
        do_sample=True, top_k=20, top_p=0.8, temperature=0.3, repetition_penalty=1.3, eos_token_id=1, pad_token_id=0
    )
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_completions_are_sampled_from_the_policy_itself(make_trainer, narrow_minded_path, temperature):
    """C46: 10,000 first tokens against softmax(logits / T), whatever the model's own generation settings say."""
    trainer = make_trainer(
        model=narrow_minded_path,
        reward_funcs=count,
        critic_init="policy",
        temperature=temperature,
        max_completion_length=1,
    )
    trainer.model.train()
    prompt = [6, 7, 8, 9]
    rows, _ = zip(*[trainer._generate_single_turn([prompt] * 2000, None, {}, 1) for _ in range(5)], strict=True)
    tokens = torch.tensor([row[0] for batch in rows for row in batch])
    assert len(tokens) == 10_000
    model = LlamaForCausalLM.from_pretrained(narrow_minded_path)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt])).logits[0, -1].double()
    expected = 10_000 * (logits / temperature).softmax(-1)
    found = torch.bincount(tokens, minlength=150).double()
    rare = expected < 5
    assert expected[rare].sum() > 0
    assert (~rare).sum() > 30
    found, expected = (torch.cat([n[~rare], n[rare].sum()[None]]) for n in (found, expected))
    assert chisquare(found.numpy(), expected.numpy()).pvalue > 1e-3


def test_the_log_probabilities_are_those_of_the_samples(make_trainer):
    """What is sampled often has the log-probability that its frequency says, at the temperature."""
    trainer = make_trainer(temperature=0.5, max_completion_length=1, per_device_train_batch_size=8)
    batch = rollout(trainer)
    with torch.no_grad():
        for row in range(8):
            logits = trainer.model(
                input_ids=batch["prompt_ids"][row : row + 1, batch["prompt_mask"][row].bool()]
            ).logits
            logp = (logits[0, -1] / 0.5).log_softmax(-1)[batch["completion_ids"][row, 0]]
            assert batch["old_per_token_logps"][row, 0].item() == pytest.approx(logp.item(), abs=1e-5)


def fraction_of_good(completions, **kwargs):
    return [10 * text.split().count("good") / max(1, len(text.split())) for text in completions]


@pytest.fixture
def learn(make_trainer):
    def run(**fields):
        defaults = {
            "reward_funcs": fraction_of_good,
            "critic_init": "policy",
            "per_device_train_batch_size": 16,
            "gradient_accumulation_steps": 1,
            "max_steps": 60,
            "learning_rate": 5e-3,
            "critic_learning_rate": 5e-3,
            "lr_scheduler_type": "constant",
            "kl_coef": 0.02,
        }
        trainer = make_trainer(**defaults | fields)
        trainer.train()
        return trainer

    return run


def late(trainer, key):
    values = logged(trainer, key)[-6:]
    return sum(values) / len(values)


@pytest.mark.slow
def test_what_holds_the_policy_back(learn):
    """C51: an entropy bonus keeps the entropy up; a larger KL coefficient keeps the KL down, in reward and in loss."""
    free = learn(kl_coef=0.0, max_steps=40)
    assert late(free, "reward") > logged(free, "reward")[0] + 1.0, "the test needs a policy that learns"
    assert late(learn(kl_coef=0.0, max_steps=40, entropy_coef=0.3), "entropy") > late(free, "entropy") + 0.2
    assert late(learn(kl_coef=1.0, max_steps=40), "kl") < late(free, "kl") / 2
    in_loss = learn(kl_coef=1.0, kl_placement="loss", kl_estimator="full", max_steps=40)
    assert late(in_loss, "kl") < late(free, "kl") / 2


@pytest.mark.slow
def test_the_adaptive_controller_steers_near_its_target(learn):
    """C50: from a coefficient that is much too small, and with a reward that is worth much more KL."""
    fields = {"kl_controller": "adaptive", "kl_target": 2.0, "kl_horizon": 24, "max_steps": 120}
    steered = learn(kl_coef=0.1, **fields)
    found = logged(steered, "kl")[-15:]
    assert max(logged(steered, "kl")) > 6.0, "the test needs a KL that was far off"
    assert 1.0 < sum(found) / 15 < 3.0
    assert logged(steered, "kl_coef")[-1] > 0.2
