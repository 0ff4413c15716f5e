"""What the output layer makes of hidden states in pieces, against the model's own logits of single rows."""

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from torch.testing import assert_close
from transformers import AutoConfig, AutoModelForCausalLM

from rlhf_recipes.models.packing import is_packed, pack
from rlhf_recipes.models.rows import Texts, pad_rows
from rlhf_recipes.models.states import completion_logps, language_model_loss
from tests.families.table import FAMILIES

TEMPERATURE = 0.7
LENGTHS = [(3, 80), (9, 75), (1, 80), (6, 1), (4, 61)]  # of prompts and completions: more tokens than one chunk has
ADAPTERS = {
    "none": None,
    "output_layer": LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "lm_head"]),
    "prompt_tuning": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "prefix_tuning": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
}


def make_model(family, adapter="none"):
    """A random model of a family, with an adapter that changes it."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(FAMILIES[family].kind, **FAMILIES[family].config))
    for parameter in model.parameters():
        if parameter.dim() == 1:  # gains and biases, so that they are not 1 and 0
            parameter.data += torch.randn_like(parameter) * 0.2
    if adapter != "none":
        model = get_peft_model(model, ADAPTERS[adapter])
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += torch.randn_like(parameter) * 0.1
    return model.eval()


def make_batch():
    ids = torch.randint(2, 60, (len(LENGTHS), 90), generator=torch.Generator().manual_seed(0)).tolist()
    prompts = [row[:prompt] for row, (prompt, _) in zip(ids, LENGTHS, strict=True)]
    completions = [row[p : p + t] for row, (p, t) in zip(ids, LENGTHS, strict=True)]
    prompt_ids, prompt_mask = pad_rows(prompts, 0, side="left")
    completion_ids, completion_mask = pad_rows(completions, 0)
    texts = Texts(
        prompt_ids=prompt_ids, prompt_mask=prompt_mask, completion_ids=completion_ids, completion_mask=completion_mask
    )
    return texts, prompts, completions


@pytest.mark.parametrize(
    ("family", "adapter"),
    [
        ("gemma2", "none"),  # caps its logits
        ("granite", "none"),  # divides them
        ("gptj", "none"),  # an output layer with bias
        ("bert_decoder", "none"),  # transforms the states before its output layer, which TRL's fused one does not
        ("mistral", "output_layer"),
        ("mistral", "prompt_tuning"),
        ("mistral", "prefix_tuning"),
    ],
)
def test_log_probabilities_and_entropies_are_those_of_single_rows(family, adapter):
    model = make_model(family, adapter)
    texts, prompts, completions = make_batch()
    logps, entropies = completion_logps(model, texts, TEMPERATURE)
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([[*prompt, *completion]]), use_cache=False).logits[0]
        exact = (logits[-len(completion) - 1 : -1].double() / TEMPERATURE).log_softmax(dim=-1)
        n = len(completion)
        assert_close(logps[row, :n].double(), exact[range(n), completion], atol=2e-5, rtol=1e-5)
        assert_close(entropies[row, :n].double(), -(exact.exp() * exact).sum(dim=-1), atol=2e-5, rtol=1e-5)
        assert not logps[row, n:].any()
        assert not entropies[row, n:].any()


@pytest.mark.parametrize("packed", [False, True])
def test_the_output_layer_sees_the_states_before_completions_only_and_few_at_a_time(packed):
    model = make_model("llama")
    if packed:
        pack(model)
        assert is_packed(model)
    texts, *_ = make_batch()
    seen = []
    handle = model.get_output_embeddings().register_forward_hook(
        lambda module, inputs, output: seen.append(output.shape)
    )
    completion_logps(model, texts, TEMPERATURE)
    handle.remove()
    tokens = sum(completion for _, completion in LENGTHS)
    positions = [shape[0] * shape[1] for shape in seen]
    assert positions == [1, 256, tokens - 256], "one that nobody reads, and each token once"


def test_many_tokens_in_chunks_equal_all_at_once():
    """More tokens than one chunk has, and padding in between, in float64; loss and gradient."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, 700, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    head = torch.nn.Linear(6, 11, bias=False, dtype=torch.float64)
    ids = torch.randint(0, 11, (3, 700), generator=generator)
    lengths = (700, 433, 1)
    mask = (torch.arange(700) < torch.tensor(lengths)[:, None]).long()
    loss = language_model_loss(hidden, ids, mask, head)
    losses = []
    for row, n in enumerate(lengths):
        logps = head(hidden[row, : n - 1]).log_softmax(-1)
        losses.append(-logps[torch.arange(n - 1), ids[row, 1:n]])
    expected = torch.cat(losses).mean()
    assert_close(loss.double(), expected, atol=1e-5, rtol=1e-6)  # the sums are in float32
    inputs = [hidden, head.weight]
    found, wanted = torch.autograd.grad(loss, inputs), torch.autograd.grad(expected, inputs)
    for mine, theirs in zip(found, wanted, strict=True):
        assert_close(mine, theirs, atol=1e-8, rtol=1e-5)
    assert not found[0][1, 433:].any()
