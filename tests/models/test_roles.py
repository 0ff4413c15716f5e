"""Adapters as roles on one base, against models loaded one by one with PEFT alone."""

import gc

import bitsandbytes
import pytest
import torch
from peft import PeftModel
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BitsAndBytesConfig

from rlhf_recipes.models import Roles, load_causal_lm, load_policy, load_sequence_classifier
from rlhf_recipes.models.roles import CRITIC, POLICY, REFERENCE, checkpoint_contexts

FOUR_BIT = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)


# Reference models come from the package's loaders, which keep bitsandbytes from repacking 4-bit layers (its other
# kernel shifts outputs by about 1 %); the adapters on them come from PEFT alone.


@pytest.fixture(params=[None, FOUR_BIT], ids=["float32", "4-bit"])
def quantization(request):
    return request.param


def make_roles(tiny_model_path, sft_adapter, reward_adapter, quantization=None):
    roles = Roles(load_policy(load_causal_lm(str(tiny_model_path), quantization_config=quantization), sft_adapter))
    roles.add_copy(REFERENCE)
    roles.add_scalar_role("reward", reward_adapter)
    roles.add_copy(CRITIC, source="reward")
    roles.add_head(CRITIC, roles.heads["reward"].weight)
    roles.set_trainable(POLICY, CRITIC)
    return roles


@pytest.fixture
def roles(tiny_model_path, sft_adapter, reward_adapter, quantization):
    return make_roles(tiny_model_path, sft_adapter, reward_adapter, quantization)


@pytest.fixture(scope="module")
def batch(tiny_tokenizer):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(4, len(tiny_tokenizer), (3, 9), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0  # left padding
    mask[1, 7:] = 0  # right padding
    return ids, mask


def policy_loss(model, ids, mask):
    logits = model(input_ids=ids, attention_mask=mask).logits
    return (logits.log_softmax(-1)[..., 7] * mask).mean()


def critic_loss(roles, ids, mask):
    with roles.use(CRITIC):
        hidden = roles.hidden_states(ids, attention_mask=mask)
    return ((roles.apply_head(CRITIC, hidden) - 1.0) ** 2 * mask).mean()


def count_4bit_layers():
    return sum(isinstance(thing, bitsandbytes.nn.Linear4bit) for thing in gc.get_objects())


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


class TestSwitching:
    def test_it_leaves_requires_grad_alone(self, roles):
        before = {name: p.requires_grad for name, p in roles.model.named_parameters()}
        for role in (CRITIC, None, "reward", POLICY):
            with roles.use(role):
                assert {name: p.requires_grad for name, p in roles.model.named_parameters()} == before
        trainable = [name for name, value in before.items() if value]
        assert trainable
        assert all(f".{POLICY}." in name or f".{CRITIC}." in name for name in trainable)

    def test_each_role_computes_what_its_adapter_alone_computes(
        self, roles, batch, tiny_model_path, sft_adapter, quantization
    ):
        ids, mask = batch
        base = load_causal_lm(str(tiny_model_path), quantization_config=quantization)
        expected_base = base(input_ids=ids, attention_mask=mask).logits
        expected_policy = PeftModel.from_pretrained(base, sft_adapter)(input_ids=ids, attention_mask=mask).logits
        with torch.no_grad():
            policy = roles.model(input_ids=ids, attention_mask=mask).logits
            with roles.use(None):
                bare = roles.model(input_ids=ids, attention_mask=mask).logits
            with roles.use(REFERENCE):
                reference = roles.model(input_ids=ids, attention_mask=mask).logits
        counts = mask.bool()
        assert_close(policy[counts], expected_policy[counts], atol=1e-5, rtol=1e-5)
        assert_close(bare[counts], expected_base[counts], atol=1e-5, rtol=1e-5)
        assert_close(reference, policy, atol=0, rtol=0)
        assert not torch.allclose(policy, bare, atol=0.1)

    def test_it_comes_back_after_an_error_and_when_nested(self, roles, batch):
        ids, mask = batch
        with torch.no_grad():
            before = roles.model(input_ids=ids, attention_mask=mask).logits
            with pytest.raises(KeyError), roles.use(CRITIC), roles.use("reward"):
                raise KeyError
            after = roles.model(input_ids=ids, attention_mask=mask).logits
        assert_close(after, before, atol=0, rtol=0)

    def test_base_weights_never_change(self, roles, batch):
        base = {n: p.clone() for n, p in roles.model.named_parameters() if "lora_" not in n and "heads" not in n}
        optimizer = torch.optim.SGD([p for p in roles.model.parameters() if p.requires_grad], lr=1.0)
        (policy_loss(roles.model, *batch) + critic_loss(roles, *batch)).backward()
        optimizer.step()
        for name, parameter in roles.model.named_parameters():
            if name in base:
                assert torch.equal(parameter, base[name]), name


class TestScores:
    def test_they_equal_the_classification_model(self, roles, reward_adapter, tiny_model_path, quantization):
        base = load_sequence_classifier(str(tiny_model_path), quantization_config=quantization)
        expected_model = PeftModel.from_pretrained(base, reward_adapter).eval()
        sequences = [[5, 6, 7, 8], [9, 4], [5, 6, 7, 8, 9, 10, 11]]
        with torch.no_grad():
            expected = [expected_model(input_ids=torch.tensor([ids])).logits.item() for ids in sequences]
        scores = roles.scores("reward", sequences, pad_token_id=0, batch_size=2)
        assert_close(scores, torch.tensor(expected), atol=1e-5, rtol=1e-5)

    def test_they_depend_on_the_last_token_and_not_on_padding(self, roles):
        one = roles.scores("reward", [[5, 6, 7]], pad_token_id=0, batch_size=1)
        padded = roles.scores("reward", [[5, 6, 7], [4] * 9], pad_token_id=0, batch_size=2)[:1]
        other = roles.scores("reward", [[5, 6, 8]], pad_token_id=0, batch_size=1)
        assert_close(padded, one, atol=1e-5, rtol=1e-5)
        assert abs(one - other) > 1e-3

    def test_the_critic_from_the_reward_adapter_starts_at_its_score(self, roles):
        ids = [5, 6, 7, 8]
        score = roles.scores("reward", [ids], pad_token_id=0, batch_size=1)
        with torch.no_grad(), roles.use(CRITIC):
            hidden = roles.hidden_states(torch.tensor([ids]), attention_mask=torch.ones(1, 4, dtype=torch.long))
        assert_close(roles.apply_head(CRITIC, hidden)[:, -1], score, atol=1e-5, rtol=1e-5)


class TestGradients:
    def expected_critic_gradients(self, tiny_model_path, reward_adapter, batch):
        """The critic as a model of its own: PEFT's classification model, no roles, no switching."""
        base = AutoModelForSequenceClassification.from_pretrained(tiny_model_path, num_labels=1)
        model = PeftModel.from_pretrained(base, reward_adapter, is_trainable=True)
        ids, mask = batch
        hidden = model.get_base_model().model(input_ids=ids, attention_mask=mask).last_hidden_state
        head = model.get_base_model().score
        ((head(hidden).squeeze(-1) - 1.0) ** 2 * mask).mean().backward()
        return gradients(model)

    @pytest.mark.parametrize("checkpointing", [False, True])
    def test_policy_and_critic_in_one_loss(self, checkpointing, tiny_model_path, sft_adapter, reward_adapter, batch):
        roles = make_roles(tiny_model_path, sft_adapter, reward_adapter)
        if checkpointing:
            roles.model.enable_input_require_grads()
            roles.model.gradient_checkpointing_enable(
                gradient_checkpointing_kwargs={"use_reentrant": False, "context_fn": checkpoint_contexts}
            )
        roles.model.train()
        (policy_loss(roles.model, *batch) + critic_loss(roles, *batch)).backward()
        found = gradients(roles.model)

        alone = load_policy(AutoModelForCausalLM.from_pretrained(tiny_model_path), sft_adapter)
        policy_loss(alone, *batch).backward()
        for name, gradient in gradients(alone).items():
            if "lora_" in name:
                assert_close(found[name], gradient, atol=1e-6, rtol=1e-4)
        for name, gradient in self.expected_critic_gradients(tiny_model_path, reward_adapter, batch).items():
            if "lora_" in name:
                assert_close(found[name.replace(".default.", ".critic.")], gradient, atol=1e-6, rtol=1e-4)
            else:
                assert_close(found["heads.critic.weight"], gradient, atol=1e-6, rtol=1e-4)

    def test_checkpointing_without_the_context_is_wrong(self, tiny_model_path, sft_adapter, reward_adapter, batch):
        """The trap is real: this is why `checkpoint_contexts` exists."""
        roles = make_roles(tiny_model_path, sft_adapter, reward_adapter)
        roles.model.enable_input_require_grads()
        roles.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        roles.model.train()
        critic_loss(roles, *batch).backward()
        name = next(n for n, p in roles.model.named_parameters() if "critic.weight" in n and "layers.0" in n)
        found = gradients(roles.model).get(name)
        expected = self.expected_critic_gradients(tiny_model_path, reward_adapter, batch)
        assert found is None or not torch.allclose(found, expected[name.replace(".critic.", ".default.")], rtol=1e-2)

    @pytest.mark.parametrize("checkpointing", [False, True])
    def test_4bit_gradients_stay_right_after_generation_and_evaluation(
        self, checkpointing, tiny_model_path, sft_adapter, reward_adapter, batch
    ):
        """Against a float32 twin whose weights are the dequantised 4-bit weights."""
        roles = make_roles(tiny_model_path, sft_adapter, reward_adapter, FOUR_BIT)
        twin = make_roles(tiny_model_path, sft_adapter, reward_adapter)
        weights = {
            name: module.weight.data.clone()
            for name, module in load_causal_lm(str(tiny_model_path), quantization_config=FOUR_BIT)
            .dequantize()
            .named_modules()
            if isinstance(module, torch.nn.Linear)
        }
        for name, module in twin.model.get_base_model().named_modules():
            if name.removesuffix(".base_layer") in weights and hasattr(module, "weight"):
                module.weight.data = weights[name.removesuffix(".base_layer")].float()
        if checkpointing:
            roles.model.enable_input_require_grads()
            roles.model.gradient_checkpointing_enable(
                gradient_checkpointing_kwargs={"use_reentrant": False, "context_fn": checkpoint_contexts}
            )
        roles.model.eval()
        with torch.no_grad():
            roles.model.generate(input_ids=batch[0], attention_mask=batch[1], max_new_tokens=3)
            policy_loss(roles.model, *batch)
            critic_loss(roles, *batch)
        for each in (roles, twin):
            each.model.train()
            (policy_loss(each.model, *batch) + critic_loss(each, *batch)).backward()
        expected = gradients(twin.model)
        found = gradients(roles.model)
        assert expected.keys() == found.keys()
        for name, gradient in expected.items():
            assert (found[name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-8, name


class TestFiles:
    def test_peft_alone_loads_what_is_saved(self, roles, tiny_model_path, batch, tmp_path, quantization):
        roles.save_policy(tmp_path)
        roles.save_scalar_role(CRITIC, CRITIC, tmp_path / "critic")
        assert not list(tmp_path.rglob("*.bin"))
        ids, mask = batch
        base = load_causal_lm(str(tiny_model_path), quantization_config=quantization)
        policy = PeftModel.from_pretrained(base, tmp_path)
        classifier = load_sequence_classifier(str(tiny_model_path), quantization_config=quantization)
        critic = PeftModel.from_pretrained(classifier, tmp_path / "critic")
        with torch.no_grad():
            assert_close(
                policy(input_ids=ids, attention_mask=mask).logits[mask.bool()],
                roles.model(input_ids=ids, attention_mask=mask).logits[mask.bool()],
                atol=1e-5,
                rtol=1e-5,
            )
            score = critic(input_ids=torch.tensor([[5, 6, 7]])).logits.item()
        assert score == pytest.approx(roles.scores(CRITIC, [[5, 6, 7]], 0, 1).item(), abs=1e-5)

    def test_load_restores_the_weights(self, roles, tmp_path):
        roles.save_policy(tmp_path)
        roles.save_scalar_role(CRITIC, CRITIC, tmp_path / "critic")
        saved = {name: p.clone() for name, p in roles.model.named_parameters() if p.requires_grad}
        for parameter in roles.model.parameters():
            if parameter.requires_grad:
                parameter.data.add_(1.0)
        roles.load(tmp_path, POLICY, POLICY)
        roles.load(tmp_path / "critic", CRITIC, CRITIC)
        for name, parameter in roles.model.named_parameters():
            if name in saved:
                assert torch.equal(parameter, saved[name]), name

    def test_one_base_in_memory(self, tiny_model_path, sft_adapter, reward_adapter):
        gc.collect()
        before = count_4bit_layers()
        roles = make_roles(tiny_model_path, sft_adapter, reward_adapter, FOUR_BIT)
        assert set(roles.model.peft_config) == {POLICY, REFERENCE, CRITIC, "reward"}
        assert count_4bit_layers() - before == 2 * 7  # two blocks of seven linear layers, once


class TestErrors:
    def test_a_folder_without_adapter(self, tiny_model_path, tmp_path):
        with pytest.raises(FileNotFoundError, match="holds no adapter"):
            load_policy(load_causal_lm(str(tiny_model_path)), tmp_path)

    def test_an_adapter_of_another_base_by_name(self, tiny_model_path, sft_adapter, tmp_path):
        other = tmp_path / "other"
        AutoModelForCausalLM.from_pretrained(tiny_model_path).save_pretrained(other)
        with pytest.raises(ValueError, match="was trained on .* but the base model is"):
            load_policy(load_causal_lm(str(other)), sft_adapter)

    def test_an_adapter_of_another_shape(self, tiny_model_path, sft_adapter, tmp_path):
        base = load_causal_lm(str(tiny_model_path))
        config = base.config.to_dict() | {"intermediate_size": 192}
        smaller = AutoModelForCausalLM.from_config(type(base.config)(**config))
        smaller.config._name_or_path = base.config._name_or_path
        with pytest.raises(ValueError, match=r"does not fit the base model in \d+ of \d+ weights; .*expected shape"):
            load_policy(smaller, sft_adapter)

    def test_a_reward_adapter_without_head(self, tiny_model_path, sft_adapter):
        roles = Roles(load_policy(load_causal_lm(str(tiny_model_path)), sft_adapter))
        with pytest.raises(ValueError, match="no score head"):
            roles.add_scalar_role("reward", sft_adapter)

    def test_weights_that_are_not_safetensors(self, tiny_model_path, sft_adapter, tmp_path):
        (tmp_path / "adapter_config.json").write_text((sft_adapter / "adapter_config.json").read_text())
        torch.save({}, tmp_path / "adapter_model.bin")
        with pytest.raises(FileNotFoundError, match="safetensors"):
            load_policy(load_causal_lm(str(tiny_model_path)), tmp_path)


def test_the_classifier_loader_gives_one_label(tiny_model_path):
    assert load_sequence_classifier(str(tiny_model_path)).config.num_labels == 1
