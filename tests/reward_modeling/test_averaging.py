"""The mean of reward models' weights: by hand, against the adapters' own arithmetic, and what is refused."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.testing import assert_close
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from rlhf_recipes.models import load_reward_model
from rlhf_recipes.reward_modeling.averaging import average_reward_models
from rlhf_recipes.reward_modeling.readout import Readout


@pytest.fixture
def adapters(tiny_model_path, tmp_path):
    """Two random reward adapters on the tiny model, with trained word vectors."""
    folders = []
    for seed in range(2):
        base = AutoModelForSequenceClassification.from_pretrained(tiny_model_path, num_labels=1)
        config = LoraConfig(task_type="SEQ_CLS", r=4, target_modules="all-linear", modules_to_save=["embed_tokens"])
        model = get_peft_model(base, config)
        torch.manual_seed(seed)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data + 0.1 * torch.randn_like(parameter)
        folders.append(tmp_path / f"reward_{seed}")
        model.save_pretrained(folders[-1])
    return folders


def test_average_of_adapters_is_the_average_of_whole_models(adapters, tmp_path):
    """What LoRA adds is averaged, which is not the product of averaged factors."""
    average_reward_models(adapters, tmp_path / "mean")
    mean, tokenizer = load_reward_model(tmp_path / "mean")
    left, right = (load_reward_model(folder)[0].state_dict() for folder in adapters)
    assert not torch.equal(left["score.weight"], right["score.weight"])
    for name, tensor in mean.state_dict().items():
        assert_close(tensor, (left[name] + right[name]) / 2, msg=name)
    assert tokenizer.get_vocab() == AutoTokenizer.from_pretrained(tmp_path / "mean").get_vocab()
    assert Readout.load(tmp_path / "mean") == Readout()


def test_models_that_cannot_be_averaged(adapters, bert_path, tmp_path):
    new = tmp_path / "mean"
    with pytest.raises(ValueError, match="two or more different"):
        average_reward_models(adapters[:1], new)
    with pytest.raises(ValueError, match="two or more different"):
        average_reward_models([*adapters, adapters[0]], new)
    with pytest.raises(FileExistsError, match="there already"):
        average_reward_models(adapters, adapters[0])
    with pytest.raises(ValueError, match="have other tokenizers"):
        average_reward_models([adapters[0], bert_path], new)
    Readout(gain=2.0).save(adapters[1])
    with pytest.raises(ValueError, match="normalise what comes out"):
        average_reward_models(adapters, new)
    assert not new.exists()
