"""The mean of reward models' weights: by hand, against the adapters' own arithmetic, and what is refused."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.testing import assert_close
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from rlhf_recipes.models import load_reward_model
from rlhf_recipes.models.readout import Readout
from rlhf_recipes.reward_modeling.finished import average_reward_models, mean_weights, normalize_reward_model


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


def test_mean_weights():
    members = [{"w": torch.tensor([[1.0, 2.0]]), "b": torch.tensor([0.0])} for _ in range(3)]
    members[1]["w"] = torch.tensor([[4.0, -4.0]])
    members[2]["b"] = torch.tensor([6.0])
    mean = mean_weights(members)
    assert_close(mean, {"w": torch.tensor([[2.0, 0.0]]), "b": torch.tensor([2.0])}, rtol=0, atol=0)
    far = [{"w": torch.tensor([value])} for value in (3e8, 3.0, -3e8)]
    assert_close(mean_weights(far)["w"], torch.tensor([1.0]), rtol=0, atol=0, msg="added up in float64")


@pytest.mark.parametrize(
    "members",
    [[], [{"w": torch.zeros(1)}, {"w": torch.zeros(2)}], [{"w": torch.zeros(1)}, {"v": torch.zeros(1)}]],
)
def test_weights_that_do_not_fit_are_refused(members):
    with pytest.raises(ValueError, match="two or more|Models 0 and 1 differ"):
        mean_weights(members)


def test_a_second_fit_replaces_the_first(tmp_path):
    """C38: mean 2 and standard deviation 4 give gain .25 and bias -.5."""
    Readout("sum", 7.0, 7.0).save(tmp_path)
    scores = torch.tensor([-2.0, 6.0])
    for _ in range(2):
        assert normalize_reward_model(tmp_path, scores) == Readout("sum", 0.25, -0.5)
    normal = Readout.load(tmp_path).apply(scores)
    assert_close(normal, torch.tensor([-1.0, 1.0]))
    assert normalize_reward_model(tmp_path, scores, "mean_only") == Readout.load(tmp_path) == Readout("sum", 1.0, -2.0)


def test_nothing_is_written_where_it_cannot_work(tmp_path):
    with pytest.raises(ValueError, match="a constant has no standard deviation"):
        normalize_reward_model(tmp_path, torch.ones(3))
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(FileNotFoundError, match="There is no folder"):
        normalize_reward_model(tmp_path / "none", torch.tensor([1.0, 2.0]))
    assert not (tmp_path / "none").exists()
    (tmp_path / "reward_model.json").write_text("[]")
    with pytest.raises(ValueError, match="expected an object, found list"):
        normalize_reward_model(tmp_path, torch.tensor([1.0, 2.0]))
