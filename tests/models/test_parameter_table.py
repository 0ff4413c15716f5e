"""The table of a stage's roles, by hand."""

from peft import LoraConfig, get_peft_model
from torch import nn

from rlhf_recipes.models import stage_table


def cells(table):
    return [line.split() for line in table.splitlines()]


def test_a_base_with_an_adapter():
    base = nn.Sequential(nn.Linear(1024, 512, bias=False))
    model = get_peft_model(base, LoraConfig(target_modules=["0"], r=128))
    adapter = f"{128 * (1024 + 512):,}"
    mib = 128 * 1536 * 4 / 2**20
    assert cells(stage_table(model, "reward")) == [
        ["role", "parameters", "trained", "MiB"],
        ["base", "524,288", "0", "2.0"],
        ["reward", adapter, adapter, f"{mib:.1f}"],
        ["gradients,", "Adam", f"{3 * mib:.1f}"],
        ["together", f"{524_288 + 196_608:,}", adapter, f"{2 + 4 * mib:.1f}"],
    ]


def test_a_model_that_is_trained_as_a_whole_has_no_base():
    assert [row[0] for row in cells(stage_table(nn.Linear(2, 2), "policy"))] == [
        "role",
        "policy",
        "gradients,",
        "together",
    ]
