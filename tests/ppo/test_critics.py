"""The critic, of each kind: its first values, where they are read, what it leaves alone, and its files."""

import pytest
import torch
from peft import LoraConfig, PeftModel
from torch.testing import assert_close
from transformers import AutoModelForSequenceClassification, BitsAndBytesConfig

from rlhf_recipes.models.roles import CRITIC, POLICY, is_critic_parameter
from rlhf_recipes.ppo.rollout import texts_of
from tests.ppo.support import rollout, rollout_and_record, texts_of_ids, trained, unpadded, without_chance

FOUR_BIT = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
LORA = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear")


def count(completion_ids, **kwargs):
    return [0.1 * len(ids) for ids in completion_ids]


@pytest.fixture
def own_model(tiny_model_path):
    """A classifier with a score head that is not zero."""
    torch.manual_seed(5)
    return AutoModelForSequenceClassification.from_pretrained(tiny_model_path, num_labels=1)


@pytest.mark.parametrize("kind", ["adapter", "head", "model"])
@pytest.mark.parametrize("base", ["adapter", "fresh adapter", "whole", "4-bit"])
def test_a_zero_head_says_exactly_0(make_trainer, tiny_model_path, own_model, kind, base):
    """C52."""
    fields = {
        "adapter": {},
        "fresh adapter": {"model": tiny_model_path, "peft_config": LORA, "reward_funcs": count},
        "whole": {"model": tiny_model_path, "reward_funcs": count},
        "4-bit": {"quantization_config": FOUR_BIT},
    }[base]
    fields |= {"critic_model": own_model} if kind == "model" else {}
    trainer = make_trainer(critic=kind, critic_init="policy", **fields)
    batch = rollout(without_chance(trainer))
    assert batch["old_values"].shape == batch["completion_ids"].shape
    assert not batch["old_values"].any()


def test_without_a_reward_adapter_it_starts_from_the_policy(make_trainer):
    """The commonest call: a function as reward, and nothing said of the critic."""
    trainer = without_chance(make_trainer(reward_funcs=count, max_steps=1))
    assert trainer.args.critic_init is None
    batch = rollout(trainer)
    assert not batch["old_values"].any()
    ids = batch["completion_ids"]
    with torch.no_grad():
        with trainer.roles.use(CRITIC):
            states = trainer.roles.hidden_states(ids)
        with trainer.roles.use(POLICY):
            assert_close(states, trainer.roles.hidden_states(ids), atol=0, rtol=0)
        with trainer.roles.use(None):
            assert (states - trainer.roles.hidden_states(ids)).abs().max() > 0.1
    trainer.train()
    assert trainer.state.global_step == 1


@pytest.mark.parametrize("quantization", [None, FOUR_BIT], ids=["float32", "4-bit"])
def test_from_the_reward_adapter_the_value_at_the_last_token_is_the_score(make_trainer, quantization):
    """C52: the value read at the last token of the completion, one position after the last that PPO uses."""
    trainer = make_trainer(quantization_config=quantization)
    batch, record = rollout_and_record(without_chance(trainer))
    for row in range(8):
        prompt, completion = unpadded(batch, row)
        longer = torch.tensor([[*prompt, *completion, 6]])  # the value before one token more
        with torch.no_grad():
            value = trainer.critic.forward(texts_of_ids(longer, len(prompt)))[0, -1].item()
        assert value == pytest.approx(record.scores[row].item(), abs=1e-4)
        assert abs(value) > 1e-3


def test_a_model_of_its_own_is_read_before_each_token(make_trainer, own_model):
    trainer = make_trainer(critic="model", critic_model=own_model)
    batch = rollout(without_chance(trainer))
    assert batch["old_values"].abs().max() > 1e-2
    for row in range(8):
        prompt, completion = unpadded(batch, row)
        for t in range(len(completion)):
            with torch.no_grad():
                value = own_model(input_ids=torch.tensor([prompt + completion[:t]])).logits.item()
            assert batch["old_values"][row, t].item() == pytest.approx(value, abs=1e-5)


def test_a_head_on_the_trunk_reads_the_policys_states(make_trainer):
    trainer = make_trainer(critic="head")
    with torch.no_grad():
        trainer.roles.heads[CRITIC].weight.normal_()
    batch = rollout(without_chance(trainer))
    for row in range(8):
        prompt, completion = unpadded(batch, row)
        ids = torch.tensor([prompt + completion])
        with torch.no_grad():
            states = trainer.model(input_ids=ids, output_hidden_states=True).hidden_states[-1][0]
        values = (states.double() @ trainer.roles.heads[CRITIC].weight[0].double())[len(prompt) - 1 : -1]
        assert_close(batch["old_values"][row, : len(completion)].double(), values, atol=1e-4, rtol=1e-4)


def test_the_head_computes_in_float32_where_the_network_does_not(make_trainer):
    trainer = make_trainer(critic="head")
    states = torch.randn(2, 3, trainer.model.config.hidden_size)
    with torch.no_grad():
        trainer.roles.heads[CRITIC].weight.normal_()
        expected = trainer.critic.read(states)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(trainer.critic.read(states), expected)


@pytest.mark.parametrize("size", [1, 3, 8])
def test_the_number_of_sequences_at_a_time_does_not_matter(make_trainer, size):
    trainer = make_trainer()
    batch = rollout(without_chance(trainer))
    values = trainer.critic.rollout(texts_of(batch), size).values
    mask = batch["completion_mask"].bool()
    assert_close(values[mask], batch["old_values"][mask], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("quantization", [None, FOUR_BIT], ids=["float32", "4-bit"])
def test_switching_roles_leaves_no_trace(make_trainer, quantization):
    """C53: the policy says the same before and after the others spoke; only policy and critic are trained."""
    trainer = make_trainer(quantization_config=quantization)
    ids = torch.tensor([[6, 7, 8, 9, 10]])
    with torch.no_grad():
        before = trainer.model(input_ids=ids).logits
        scores = trainer.roles.scores("reward_0", ids.tolist(), 0, 1)
        values = trainer.critic.forward(texts_of_ids(ids, 2))
        with trainer.roles.use(None):
            bare = trainer.model(input_ids=ids).logits
        with trainer.roles.use(trainer.reference):
            reference = trainer.model(input_ids=ids).logits
        assert torch.equal(trainer.model(input_ids=ids).logits, before)
        assert torch.equal(trainer.roles.scores("reward_0", ids.tolist(), 0, 1), scores)
        assert torch.equal(trainer.critic.forward(texts_of_ids(ids, 2)), values)
    assert torch.equal(reference, before)
    assert (bare - before).abs().max() > 1e-3

    base = {name: p.clone() for name, p in trainer.model.named_parameters() if not p.requires_grad}
    weights = trained(trainer)
    assert all(f".{POLICY}." in name or is_critic_parameter(name) for name in weights)
    trainer.train()
    for name, parameter in trainer.model.named_parameters():
        if name in base:
            assert parameter.grad is None
            assert torch.equal(parameter, base[name]), f"{name} must keep its bytes"
    assert all(not torch.equal(p, weights[n]) for n, p in trained(trainer).items() if "lora_B" in n or "heads" in n)


@pytest.mark.parametrize("kind", ["adapter", "head"])
def test_there_is_one_base_in_memory(make_trainer, tiny_model_path, kind):
    """C53: four roles cost their adapters and heads, not another base."""
    from rlhf_recipes.models import load_causal_lm

    base = sum(p.numel() for p in load_causal_lm(tiny_model_path).parameters())
    trainer = make_trainer(critic=kind)
    roles = {id(p): p.numel() for n, p in trainer.model.named_parameters() if "lora_" in n or n.startswith("heads.")}
    everything = {id(p): p.numel() for p in trainer.model.parameters()}
    assert sum(everything.values()) == base + sum(roles.values())
    assert sum(roles.values()) < base


@pytest.mark.parametrize("kind", ["adapter", "head", "model"])
@pytest.mark.parametrize("whole", [False, True], ids=["adapter", "whole"])
def test_what_is_saved_can_be_loaded(make_trainer, tiny_model_path, own_model, tmp_path, kind, whole):
    fields = {"model": tiny_model_path, "reward_funcs": count, "critic_init": "policy"} if whole else {}

    def build():
        torch.manual_seed(5)
        model = AutoModelForSequenceClassification.from_pretrained(tiny_model_path, num_labels=1)
        return make_trainer(critic=kind, **fields, **({"critic_model": model} if kind == "model" else {}))

    trainer = build()
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if is_critic_parameter(name):
                parameter.add_(0.05 * torch.randn_like(parameter))
    trainer.critic.save(tmp_path / "critic")
    fresh = build()
    texts = texts_of_ids(torch.tensor([[6, 7, 8, 9, 10, 11]]), 2)
    expected = trainer.critic.rollout(texts, 1).values
    assert not torch.allclose(fresh.critic.rollout(texts, 1).values, expected, atol=1e-3)
    fresh.critic.load(tmp_path / "critic")
    assert torch.equal(fresh.critic.rollout(texts, 1).values, expected)
    if kind == "adapter" and not whole:  # the format of reward models, which anybody can read
        base = AutoModelForSequenceClassification.from_pretrained(tiny_model_path, num_labels=1)
        classifier = PeftModel.from_pretrained(base, tmp_path / "critic").eval()
        with torch.no_grad():
            before_last = torch.tensor([[6, 7, 8, 9, 10]])
            assert classifier(input_ids=before_last).logits.item() == pytest.approx(expected[0, -1].item(), abs=1e-5)


def test_a_critic_model_that_cannot_be_one_is_refused(make_trainer, tiny_model_path):
    two = AutoModelForSequenceClassification.from_pretrained(tiny_model_path, num_labels=2)
    with pytest.raises(ValueError, match=r"no score head of one output .* `num_labels=1`"):
        make_trainer(critic="model", critic_model=two)
    with pytest.raises(FileNotFoundError, match="`critic_model` 'no-such-model' cannot be loaded"):
        make_trainer(critic="model", critic_model="no-such-model")
    small = AutoModelForSequenceClassification.from_pretrained(tiny_model_path, num_labels=1)
    small.resize_token_embeddings(20)
    with pytest.raises(ValueError, match="The embeddings of `critic_model` end at 19, and those of the policy"):
        make_trainer(critic="model", critic_model=small)


def test_a_critic_model_may_be_an_adapter(make_trainer, reward_adapter, tiny_model_path):
    """It is merged into its base, with its head."""
    base = AutoModelForSequenceClassification.from_pretrained(tiny_model_path, num_labels=1)
    expected = PeftModel.from_pretrained(base, reward_adapter).eval()
    critic = make_trainer(critic="model", critic_model=reward_adapter).critic.network
    ids = torch.tensor([[6, 7, 8]])
    with torch.no_grad():
        assert_close(critic(input_ids=ids).logits, expected(input_ids=ids).logits, atol=1e-5, rtol=1e-5)


def test_a_critic_model_by_its_path(make_trainer, own_model, tiny_tokenizer, tmp_path):
    own_model.save_pretrained(tmp_path / "critic")
    tiny_tokenizer.save_pretrained(tmp_path / "critic")
    paths, model = (
        rollout(without_chance(make_trainer(critic="model", critic_model=given)))["old_values"]
        for given in (str(tmp_path / "critic"), own_model)
    )
    assert_close(paths, model)
