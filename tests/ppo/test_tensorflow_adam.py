"""TensorFlow's Adam against hand-computed numbers, its formula in plain floats, and torch's AdamW."""

import copy
import json
import math
import os
import subprocess
import sys

import pytest
import torch
from torch.testing import assert_close

from rlhf_recipes.data.synthetic import write_gold
from rlhf_recipes.ppo.tensorflow_adam import TensorFlowAdamW


def parameter(*numbers):
    return torch.nn.Parameter(torch.tensor(numbers, dtype=torch.float64))


def run(optimizer_class, gradients, **options):
    """The parameter after each step with these gradients."""
    weight = parameter(0.5, -2.0, 3.0)
    optimizer = optimizer_class([weight], **options)
    path = []
    for gradient in gradients:
        weight.grad = gradient.clone()
        optimizer.step()
        path.append(weight.detach().clone())
    return torch.stack(path)


@pytest.fixture
def gradients():
    return torch.randn(12, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_first_step_where_the_gradient_is_as_small_as_epsilon():
    for optimizer_class, share in {torch.optim.AdamW: 0.5, TensorFlowAdamW: 0.03065}.items():
        weight = parameter(0.0)
        optimizer = optimizer_class([weight], lr=2.0, betas=(0.9, 0.999), eps=1e-5, weight_decay=0.0)
        weight.grad = torch.full_like(weight, 1e-5)
        optimizer.step()
        assert_close(weight.item(), -share * 2.0, rtol=0, atol=1e-5)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_without_epsilon_it_is_torchs(gradients, weight_decay):
    options = {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-30, "weight_decay": weight_decay}
    expected = run(torch.optim.AdamW, gradients, **options)
    assert_close(run(TensorFlowAdamW, gradients, **options), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("beta1", "beta2"), [(0.8, 0.95), (0.0, 0.95), (0.8, 0.0)])
def test_equals_the_formula(gradients, beta1, beta2):
    lr, eps, decay = 0.01, 0.3, 0.1
    path = run(TensorFlowAdamW, gradients, lr=lr, betas=(beta1, beta2), eps=eps, weight_decay=decay)
    for index, weight in enumerate([0.5, -2.0, 3.0]):
        m = v = 0.0
        for t, g in enumerate(gradients[:, index].tolist(), start=1):
            m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
            lr_t = lr * math.sqrt(1 - beta2**t) / (1 - beta1**t)
            weight = weight - lr * decay * weight - lr_t * m / (math.sqrt(v) + eps)
            assert_close(path[t - 1, index].item(), weight, rtol=1e-12, atol=1e-12)


def test_defaults_are_those_of_openai():
    defaults = TensorFlowAdamW([parameter(0.0)]).defaults
    assert defaults == {"lr": 1e-5, "betas": (0.9, 0.999), "eps": 1e-5, "weight_decay": 0.0}


def test_goes_on_from_its_state(gradients):
    whole = run(TensorFlowAdamW, gradients, lr=0.01)
    weight, state = parameter(0.5, -2.0, 3.0), None
    for half in gradients.split(6):
        optimizer = TensorFlowAdamW([weight], lr=0.01)
        if state is not None:
            optimizer.load_state_dict(state)
        for gradient in half:
            weight.grad = gradient.clone()
            optimizer.step()
        state = copy.deepcopy(optimizer.state_dict())
    assert_close(weight.detach(), whole[-1], rtol=0, atol=0)


def test_groups_schedules_and_parameters_without_gradient():
    fast, slow, idle = parameter(1.0), parameter(1.0), parameter(1.0)
    optimizer = TensorFlowAdamW([{"params": [fast, idle], "lr": 0.1}, {"params": [slow]}], lr=0.01, eps=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0 if step else 1.0)
    for _ in range(2):
        fast.grad, slow.grad = torch.ones_like(fast), torch.ones_like(slow)
        optimizer.step()
        schedule.step()  # the second step has learning rate 0
    assert_close(torch.stack([fast, slow, idle]).flatten().tolist(), [0.9, 0.99, 1.0])


def test_closure_computes_gradients_anew():
    weight = parameter(1.0)
    optimizer = TensorFlowAdamW([weight], lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss = weight.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 1.0
    assert weight.item() < 1.0
    assert optimizer.step() is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "`lr` must not be negative, got -1.0"),
        ({"eps": -1e-8}, "`eps` must not be negative, got -1e-08"),
        ({"weight_decay": -0.1}, "`weight_decay` must not be negative, got -0.1"),
        ({"betas": (0.9, 1.0)}, r"`betas` must lie in \[0, 1\), got \(0.9, 1.0\)"),
        ({"betas": (-0.1, 0.9)}, r"`betas` must lie in \[0, 1\), got \(-0.1, 0.9\)"),
    ],
)
def test_numbers_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        TensorFlowAdamW([parameter(0.0)], **options)


@pytest.mark.slow
def test_the_textbook_recipe_trains_with_it(
    repo_root, tiny_model_path, tiny_texts, sft_adapter, reward_adapter, tmp_path
):
    """Launched with the recipe's YAML: the state of the optimizer, saved after two steps, is this Adam's."""
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in tiny_texts))
    write_gold(tmp_path / "gold.json", eos_token_id=1)
    folder = tmp_path / "tiny" / "ppo"
    options = {
        "config": "recipes/textbook_ppo/ppo.yaml",
        "model_name_or_path": tiny_model_path,
        "sft_adapter": sft_adapter,
        "reward_adapter": reward_adapter,
        "gold_score": tmp_path / "gold.json",
        "dataset_name": tmp_path / "prompts.jsonl",
        "dataset_train_split": "train",
        "dataset_test_split": "train",
        "output_dir": folder,
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "steps_per_generation": 1,
        "max_completion_length": 6,
        "logging_steps": 1,
        "evaluation_rows": 8,
        "save_strategy": "steps",
        "save_steps": 2,
        "report_to": "none",
    }
    argv = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    command = [sys.executable, "-m", "accelerate.commands.launch", "recipes/ppo.py", *argv]
    environment = os.environ | {"PYTHONPATH": str(repo_root)}
    result = subprocess.run(command, cwd=repo_root, env=environment, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "win rate of the policy by gold score" in result.stdout
    evaluation = json.loads((folder / "evaluation.json").read_text())
    assert (evaluation["win_rate_by"], evaluation["rows"]) == ("gold_score", 8)
    saved = torch.load(folder / "checkpoint-2" / "optimizer.pt", weights_only=True)
    assert all(state["step"] == 2 and isinstance(state["step"], int) for state in saved["state"].values())
    rates = sorted({group["initial_lr"] for group in saved["param_groups"]})
    assert rates == pytest.approx([3e-4, 3e-3]), "policy and critic"
    assert len(saved["state"]) == sum(len(group["params"]) for group in saved["param_groups"])
