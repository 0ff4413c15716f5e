"""Every kind of reward model as PPO's reward: normalised, read per token, in an ensemble, as an encoder."""

import copy
import json
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from rlhf_recipes.models.readout import Readout
from rlhf_recipes.ppo._trl import rewards as call_rewards
from rlhf_recipes.rewards import EnsembleReward
from tests.ppo.support import (
    answer,
    logged,
    rollout,
    rollout_and_record,
    slow_but,
    texts_of_ids,
    unpadded,
    without_chance,
)


@pytest.fixture
def adapter(reward_adapter, tmp_path):
    """Make copies of the reward adapter under other names, changed and read in other ways."""

    def make(name, readout=None, change=None):
        folder = shutil.copytree(reward_adapter, tmp_path / name)
        if readout is not None:
            readout.save(folder)
        if change is not None:
            config = json.loads((folder / "adapter_config.json").read_text()) | change
            (folder / "adapter_config.json").write_text(json.dumps(config))
        return folder

    return make


def head_numbers(trainer, batch, row, role="reward_0"):
    """The head's numbers at the tokens of a completion."""
    prompt, completion = unpadded(batch, row)
    [numbers] = trainer.roles.prefix_scores(role, [prompt + completion], 0, 1)
    return numbers[-len(completion) :]


@pytest.mark.parametrize("readout", ["last", "sum", "mean"])
@pytest.mark.parametrize("placement", ["terminal", "redistributed"])
def test_an_adapter_is_read_and_normalised_as_its_folder_says(make_trainer, adapter, readout, placement):
    """C38: gain and bias survive the way to PPO; per-token heads count the completion's tokens only."""
    folder = adapter("model", Readout(readout, 0.25, -0.5))
    trainer = without_chance(make_trainer(reward_funcs=str(folder), reward_placement=placement, kl_coef=0.0))
    batch, record = rollout_and_record(trainer)
    for row, score in enumerate(record.scores):
        numbers = head_numbers(trainer, batch, row)
        raw = {"last": numbers[-1], "sum": numbers.sum(), "mean": numbers.mean()}[readout]
        assert_close(score, 0.25 * raw - 0.5, atol=1e-5, rtol=1e-5)
        if placement == "redistributed":
            given = record.token_rewards[folder.name][row]
            each = {
                "last": 0.25 * numbers.diff(prepend=torch.zeros(1)),
                "sum": 0.25 * numbers,
                "mean": 0.25 * numbers / len(numbers),
            }[readout]
            each[0] -= 0.5
            assert_close(given, each, atol=1e-5, rtol=1e-5)
            assert_close(given.sum(), score, atol=1e-5, rtol=1e-5)


def test_the_critic_starts_from_the_normalised_score(make_trainer, adapter, tmp_path):
    """C52: before training the value after the last token is the score that PPO pays."""
    trainer = make_trainer(reward_funcs=str(adapter("model", Readout("last", 0.25, -0.5))))
    ids = torch.tensor([[6, 7, 8, 9, 10]])
    score = 0.25 * trainer.roles.scores("reward_0", ids.tolist(), 0, 1) - 0.5
    longer = texts_of_ids(torch.tensor([[6, 7, 8, 9, 10, 11]]), 2)  # the value before token t is read at t - 1
    assert_close(trainer.critic.forward(longer)[0, -1:], score, atol=1e-5, rtol=1e-5)

    trainer.critic.save(tmp_path / "critic")
    assert Readout.load(tmp_path / "critic") == Readout("last", 1.0, -0.5)
    trainer.critic._bias = 7.0
    trainer.critic.load(tmp_path / "critic")
    assert_close(trainer.critic.forward(longer)[0, -1:], score, atol=1e-5, rtol=1e-5)


def test_a_critic_from_a_head_per_token_starts_at_zero(make_trainer, adapter):
    trainer = make_trainer(reward_funcs=str(adapter("model", Readout("sum", 0.25, -0.5))))
    ids = torch.tensor([[6, 7, 8, 9, 10]])
    assert trainer.critic.forward(texts_of_ids(ids, 3)).tolist() == [[0.0, 0.0]]


def test_a_malformed_file_stops_before_training(make_trainer, adapter):
    folder = adapter("model")
    (folder / "reward_model.json").write_text("{")
    with pytest.raises(ValueError, match="reward_model.json does not say how to read the reward model"):
        make_trainer(reward_funcs=str(folder))


def test_an_adapter_that_diverged_is_named(make_trainer, reward_adapter):
    trainer = make_trainer(reward_funcs=[str(reward_adapter), lambda prompts, **kwargs: [0.0] * len(prompts)])
    with torch.no_grad():
        trainer.roles.heads["reward_0"].weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="reward adapter 'reward' gives nan for completion 0: it diverged"):
        call_rewards(trainer, [{"prompt": "the film"}], ["good"], [[7]])


@pytest.mark.parametrize("aggregation", slow_but(["mean", "min", "mean_minus_std"], "min", "mean_minus_std"))
def test_an_ensemble_trains_and_logs_disagreement(make_trainer, adapter, aggregation):
    """Members with other readouts and normalisations, on the base that is in memory."""
    readouts = [Readout(), Readout("last", 0.25, -0.5), Readout("mean", 2.0, 1.0)]
    folders = [adapter(f"seed_{index}", readout) for index, readout in enumerate(readouts)]
    reward = EnsembleReward(folders, aggregation, k=0.5)
    trainer = without_chance(make_trainer(reward_funcs=reward, max_steps=2, num_iterations=1))
    batch, record = rollout_and_record(trainer)
    numbers = [[head_numbers(trainer, batch, row, f"reward_0_{m}") for row in range(8)] for m in range(3)]
    raw = [[tail.mean() if m == 2 else tail[-1] for tail in numbers[m]] for m in range(3)]
    scores = torch.tensor([[r.gain * x + r.bias for x in row] for r, row in zip(readouts, raw, strict=True)])
    spread = scores.std(dim=0, correction=0)
    expected = {"mean": scores.mean(0), "min": scores.amin(0), "mean_minus_std": scores.mean(0) - 0.5 * spread}
    assert_close(record.scores, expected[aggregation], atol=1e-5, rtol=1e-5)
    [disagreement] = trainer._metrics["train"]["rewards/ensemble/disagreement"]
    assert_close(disagreement, spread.mean().item(), atol=1e-5, rtol=1e-5)

    frozen = {name: p.clone() for name, p in trainer.model.named_parameters() if ".reward_0_" in name}
    assert len({name.split(".reward_0_")[1][0] for name in frozen}) == 3
    trainer.train()
    assert len(logged(trainer, "rewards/ensemble/disagreement")) == 2
    assert all(torch.equal(p, frozen[name]) for name, p in trainer.model.named_parameters() if name in frozen)


def test_members_on_other_bases_are_refused_by_name(make_trainer, adapter, tiny_model_path, tmp_path):
    AutoModelForCausalLM.from_pretrained(tiny_model_path).save_pretrained(tmp_path / "other_base")
    change = {"base_model_name_or_path": str(tmp_path / "other_base")}
    folders = [adapter("here"), adapter("elsewhere", change=change)]
    with pytest.raises(ValueError, match="adapter in '.*elsewhere' was trained on '.*other_base', but the base"):
        make_trainer(reward_funcs=EnsembleReward(folders))


def test_an_ensemble_is_not_read_per_token(make_trainer, adapter):
    folders = [adapter("one"), adapter("two")]
    with pytest.raises(ValueError, match="an ensemble is not read per token"):
        make_trainer(reward_funcs=EnsembleReward(folders), reward_placement="redistributed")


@pytest.fixture
def bert_adapter(bert_path, tmp_path):
    """A LoRA adapter with its head on the encoder, and the tokenizer beside it, as the reward stage saves them."""
    base = AutoModelForSequenceClassification.from_pretrained(bert_path, num_labels=1)
    model = get_peft_model(base, LoraConfig(task_type="SEQ_CLS", target_modules="all-linear"))
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_" in name or "classifier" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    model.save_pretrained(tmp_path / "bert_adapter")
    AutoTokenizer.from_pretrained(bert_path).save_pretrained(tmp_path / "bert_adapter")
    return tmp_path / "bert_adapter", model.eval()


@pytest.mark.parametrize("kind", ["whole", "adapter"])
def test_an_encoder_is_a_reward_in_one_line(make_trainer, bert_path, bert_adapter, tmp_path, kind):
    """C40: the encoder reads its own special tokens; C38: gain and bias are applied."""
    if kind == "whole":
        folder = shutil.copytree(bert_path, tmp_path / "bert")
        model = AutoModelForSequenceClassification.from_pretrained(bert_path).eval()
    else:
        folder, model = bert_adapter
    Readout("last", 0.25, -0.5).save(folder)
    tokenizer = AutoTokenizer.from_pretrained(bert_path)
    trainer = without_chance(
        make_trainer(reward_funcs=str(folder), critic_init="policy", max_steps=1, num_iterations=1)
    )
    batch, record = rollout_and_record(trainer)
    for row, score in enumerate(record.scores):
        prompt, completion = unpadded(batch, row)
        texts = [trainer.processing_class.decode(ids, skip_special_tokens=True) for ids in (prompt, completion)]
        ids = torch.tensor([tokenizer(*texts)["input_ids"]])
        with torch.no_grad():
            raw = model(input_ids=ids).logits[0, 0]
        assert_close(score, 0.25 * raw - 0.5, atol=1e-5, rtol=1e-5)
    assert trainer.reward_func_names == [folder.name]
    trainer.train()
    assert logged(trainer, f"rewards/{folder.name}/mean")


def test_an_encoder_adapter_without_its_head_is_refused(make_trainer, bert_adapter):
    from safetensors.torch import load_file, save_file

    file = bert_adapter[0] / "adapter_model.safetensors"
    save_file({k: v for k, v in load_file(file).items() if "lora_" in k}, file, metadata={"format": "pt"})
    base = bert_adapter[0].parent / "headless"
    model = AutoModelForSequenceClassification.from_pretrained(
        json.loads((bert_adapter[0] / "adapter_config.json").read_text())["base_model_name_or_path"]
    )
    model.bert.save_pretrained(base)
    config = json.loads((bert_adapter[0] / "adapter_config.json").read_text())
    (bert_adapter[0] / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(base)}))
    with pytest.raises(ValueError, match="no trained reward model: 2 weights, 'classifier.bias' among them"):
        make_trainer(reward_funcs=str(bert_adapter[0]), critic_init="policy")


def test_an_encoder_whose_context_is_too_short_names_the_row(make_trainer, bert_path):
    trainer = without_chance(make_trainer(reward_funcs=str(bert_path), critic_init="policy"))
    long = [7] * 30
    text = trainer.processing_class.decode(long)
    rows = [{"prompt": "the film"}, {"prompt": "the film"}]
    with pytest.raises(ValueError, match=r"Row 1 has \d+ tokens for the reward model 'bert', whose context is 24"):
        call_rewards(trainer, rows, ["good", text], [[7], long])


def scores_of(make_trainer, reward, **arguments):
    """Scores that a trainer gives to one finished and one unfinished completion."""
    trainer = make_trainer(reward_funcs=reward, critic_init="policy", **arguments)
    rows = [{"prompt": "the film"}, {"prompt": "the film"}]
    return call_rewards(trainer, rows, ["good", "was bad"], [[7, 1], [7, 8]])[:, 0]


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_a_loaded_model_scores_as_its_folder_does(make_trainer, bert_path, gpt2_path, tmp_path, kind):
    """With its special tokens and end token, its gain and bias, and its own tokenizer or the one that is given."""
    source = bert_path if kind == "encoder" else gpt2_path
    model = AutoModelForSequenceClassification.from_pretrained(source, num_labels=1)
    torch.nn.init.normal_((model.classifier if kind == "encoder" else model.score).weight)
    folder = tmp_path / "reward"
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.save_pretrained(folder)
    Readout("last", 0.25, -0.5).save(folder)
    expected = scores_of(make_trainer, str(folder))
    load = AutoModelForSequenceClassification.from_pretrained
    assert_close(scores_of(make_trainer, load(folder)), expected, atol=0, rtol=0)
    model.config._name_or_path = ""  # made in memory: no tokenizer, and the raw score
    given = scores_of(make_trainer, model, reward_processing_classes=(tokenizer,))
    assert_close(0.25 * given - 0.5, expected, atol=1e-6, rtol=1e-6)
    beyond = copy.deepcopy(tokenizer)
    beyond.add_tokens(["beyond"])
    with pytest.raises(ValueError, match=r"has the token 'beyond' .*reward_processing_classes"):
        scores_of(make_trainer, model, reward_processing_classes=beyond)
    with pytest.raises(ValueError, match=r"`reward_funcs\[0\]` is a \w+ whose tokenizer is not found at ''"):
        scores_of(make_trainer, model)


def test_models_that_give_no_single_score_are_refused(make_trainer, gpt2_path, tmp_path):
    with pytest.raises(ValueError, match=r"`reward_funcs\[0\]` is a GPT2LMHeadModel, which has no score head"):
        scores_of(make_trainer, AutoModelForCausalLM.from_pretrained(gpt2_path))
    two = AutoModelForSequenceClassification.from_pretrained(gpt2_path, num_labels=2)
    with pytest.raises(ValueError, match="has 2 outputs. Load it with `num_labels=1`"):
        scores_of(make_trainer, two)
    two.save_pretrained(tmp_path / "two")
    with pytest.raises(
        ValueError, match="do not fit a classifier with one output: it was trained with several labels"
    ):
        scores_of(make_trainer, str(tmp_path / "two"))


def test_a_decoder_with_another_base_reads_the_end_token(make_trainer, reward_adapter, gpt2_path, tmp_path):
    base = AutoModelForSequenceClassification.from_pretrained(gpt2_path, num_labels=1)
    torch.manual_seed(0)
    torch.nn.init.normal_(base.score.weight)
    base.save_pretrained(tmp_path / "gpt2_reward")
    AutoTokenizer.from_pretrained(gpt2_path).save_pretrained(tmp_path / "gpt2_reward")
    trainer = without_chance(make_trainer(reward_funcs=[str(reward_adapter), str(tmp_path / "gpt2_reward")]))
    batch = rollout(trainer)
    ends = [unpadded(batch, row)[1][-1] for row in range(8)]
    assert len({end == 1 for end in ends}) == 2, "some completions are cut off"
    rows = [{"prompt": trainer.train_dataset[i]["prompt"]} for i in range(8)]
    ids = [answer(tuple(unpadded(batch, i)[0])) for i in range(8)]
    texts = [" " + trainer.processing_class.decode(row, skip_special_tokens=True) for row in ids]
    scores = call_rewards(trainer, rows, texts, ids)[:, 1]
    for row, (text, completion) in enumerate(zip(texts, ids, strict=True)):
        end = " <eos>" if completion[-1] == 1 else ""
        own = AutoTokenizer.from_pretrained(gpt2_path)(rows[row]["prompt"] + text + end, return_tensors="pt")
        with torch.no_grad():
            assert_close(scores[row], base.eval()(input_ids=own["input_ids"]).logits[0, 0], atol=1e-5, rtol=1e-5)
