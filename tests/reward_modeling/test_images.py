"""Reward models that see pictures: trained on pairs, and read by PPO on the base that they share with the policy."""

import json
import re

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from PIL import Image
from torch.testing import assert_close
from transformers import AutoModelForSequenceClassification

from rlhf_recipes import PPOTrainer
from rlhf_recipes.models import language_layers, load_image_classifier, load_image_model
from rlhf_recipes.models.images import chat_with_images
from rlhf_recipes.models.readout import Readout
from rlhf_recipes.reward_modeling import (
    PreferenceConfig,
    PreferenceTrainer,
    evaluate_pairs,
    normalize_score_head,
)
from rlhf_recipes.rewards import EnsembleReward
from tests.ppo.support import rollout, without_chance

COLOURS = ("red", "green", "blue")
QUESTION = [{"role": "user", "content": "which colour ?"}]


QWEN = pytest.mark.parametrize("built_vision", ["qwen2_5_vl"], indirect=True)
BOTH = pytest.mark.parametrize("built_vision", ["llava", "qwen2_5_vl"], indirect=True)


def picture(colour, size=(28, 28)):
    image = Image.new("RGB", size, colour)
    image.paste("black", (size[0] // 2, size[1] // 3, size[0], size[1]))
    return image


def says(text):
    return [{"role": "assistant", "content": text}]


def pairs(count, facts=False):
    """The right colour is preferred; rows without a picture, and with two, are among them."""
    rows = []
    for number in range(count):
        right, wrong = COLOURS[number % 3], COLOURS[(number + 1 + number // 3 % 2) % 3]
        images = [[picture(right)], [picture(right, (56, 84)), picture("white")], []][number % 5 % 3]
        row = {"prompt": QUESTION, "images": images, "chosen": says(right), "rejected": says(wrong)}
        if facts:
            row["reward_prompt"] = [{"role": "user", "content": f"a {right} square which colour ?"}]
        rows.append(row)
    return Dataset.from_list(rows)


@pytest.fixture
def base(built_vision, tmp_path):
    """Folder of the base, as policy and reward model load it."""
    built_vision[0].save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


@pytest.fixture
def processor(built_vision):
    return built_vision[1]


@pytest.fixture
def make(base, processor, tmp_path):
    def make(rows, evals=None, processing_class=None, target_modules=None, **fields):
        model = load_image_classifier(base)
        settings = {"max_steps": 2, "learning_rate": 1e-2, "per_device_train_batch_size": 4, "logging_steps": 1}
        quiet = {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "use_cpu": True, "bf16": False}
        return PreferenceTrainer(
            model=model,
            args=PreferenceConfig(str(tmp_path / "reward"), **settings | quiet | fields),
            train_dataset=rows,
            eval_dataset=evals,
            processing_class=processing_class or processor,
            peft_config=LoraConfig(
                task_type="SEQ_CLS",
                r=4,
                target_modules=target_modules or language_layers(model),
                modules_to_save=["score"],
            ),
        )

    return make


def spread(model):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "modules_to_save" in name:
                parameter.normal_(0.0, 0.3, generator=generator)


def plain_inputs(processor, prompt, images, ids):
    """What the model is called with for one text, by the processor alone, with the completion's ids after it."""
    fields = processor.apply_chat_template(
        chat_with_images({"prompt": prompt, "images": images}),
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    fields.pop("attention_mask")
    fields["input_ids"] = torch.cat([fields["input_ids"], torch.tensor([ids])], dim=1)
    if "mm_token_type_ids" in fields:  # no token of a completion stands for a picture
        fields["mm_token_type_ids"] = torch.nn.functional.pad(fields["mm_token_type_ids"], (0, len(ids)))
    return fields


@BOTH
def test_the_classifier_is_the_base_with_a_head(base, built_vision, processor):
    scorer = load_image_classifier(base)
    assert set(scorer.state_dict()) - set(built_vision[0].state_dict()) == {"score.weight"}
    inputs = plain_inputs(processor, QUESTION, [picture("red")], [4, 1])
    with torch.no_grad():
        states = built_vision[0].model(**inputs).last_hidden_state[:, -1]
        assert_close(scorer(**inputs).logits, states @ scorer.score.weight.T)


@pytest.mark.parametrize(
    ("built_vision", "facts"), [("llava", False), ("qwen2_5_vl", True)], indirect=["built_vision"]
)
def test_batches_hold_what_the_processor_makes_of_each_text(make, processor, facts):
    rows = pairs(5, facts)
    trainer = make(rows)
    batch = next(iter(torch.utils.data.DataLoader(trainer.train_dataset, 5, collate_fn=trainer.data_collator)))
    seen = {name: iter(batch[name]) for name in ("pixel_values", "image_grid_thw") if name in batch}
    for index, row in enumerate(rows):
        for side, name in enumerate(("chosen", "rejected")):
            [word] = processor.tokenizer(row[name][0]["content"])["input_ids"]
            expected = plain_inputs(processor, row["reward_prompt" if facts else "prompt"], row["images"], [word, 1])
            mask = batch["attention_mask"][2 * index + side].bool()
            assert batch["input_ids"][2 * index + side][mask].tolist() == expected["input_ids"][0].tolist()
            for name, values in seen.items():
                assert all(torch.equal(next(values), value) for value in expected.get(name, ()))
            if "mm_token_type_ids" in batch:
                assert torch.equal(
                    batch["mm_token_type_ids"][2 * index + side][mask], expected["mm_token_type_ids"][0]
                )
    assert all(next(values, None) is None for values in seen.values())


@QWEN
def test_training_evaluation_and_scores_of_the_saved_model(make, base, processor, tmp_path):
    trainer = make(pairs(8), pairs(7), eval_strategy="steps", eval_steps=2)
    before = {name: weight.clone() for name, weight in trainer.model.named_parameters()}
    normalize_score_head(trainer)
    trainer.train()
    changed = {name for name, weight in trainer.model.named_parameters() if not torch.equal(weight, before[name])}
    assert any("lora" in name for name in changed)
    assert all(".language_model." in name or ".score." in name for name in changed)
    spread(trainer.model)
    trainer.save_model()
    assert (tmp_path / "reward" / "processor_config.json").exists()
    [*numbers] = json.loads((tmp_path / "reward" / "trained_on.json").read_text())["numbers"]
    assert len(numbers) == 7

    model = PeftModel.from_pretrained(load_image_classifier(base), tmp_path / "reward").eval()
    leads = []
    for row in pairs(7):
        scores = []
        for side in ("chosen", "rejected"):
            ids = [*processor.tokenizer(row[side][0]["content"])["input_ids"], 1]
            with torch.no_grad():
                scores.append(model(**plain_inputs(processor, QUESTION, row["images"], ids)).logits.item())
        leads.append(scores[0] - scores[1])
    result = evaluate_pairs(trainer)
    assert result["margin"] == pytest.approx(sum(leads) / 7, abs=2e-5)
    assert result["accuracy"] == pytest.approx(sum(lead > 0 for lead in leads) / 7)
    assert trainer.evaluate()["eval_accuracy"] == pytest.approx(result["accuracy"])


@pytest.mark.parametrize(
    ("built_vision", "facts", "ensemble"),
    [("llava", False, True), ("llava", True, False), ("qwen2_5_vl", False, False), ("qwen2_5_vl", True, True)],
    indirect=["built_vision"],
)
def test_ppo_reads_it_on_the_shared_base_as_plain_passes_do(
    make, base, processor, tmp_path, make_config, facts, ensemble
):
    """Score, critic and policy of one base; the expected score is of a second base and the processor alone."""
    reward = make(pairs(4, facts))
    spread(reward.model)
    reward.save_model()
    assert Readout.load(tmp_path / "reward").reward_prompt == facts
    rows = pairs(8, facts)
    policy = load_image_model(base)
    folder = str(tmp_path / "reward")

    def same(completions, images, **kwargs):
        return [float(len(images))] * len(completions)

    trainer = PPOTrainer(
        model=policy,
        reward_funcs=EnsembleReward([folder, same]) if ensemble else folder,
        args=make_config(critic_init="reward"),
        train_dataset=rows.remove_columns(["chosen", "rejected"]),
        processing_class=processor,
        peft_config=LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=language_layers(policy)),
    )
    without_chance(trainer, lambda prompt, repeat=0: [4 + (len(prompt) + repeat) % 5, 1])
    inputs = [rows[index] for index in range(8)]
    chats = trainer.chats_of(inputs)
    completions = [[4 + index % 5, 9, 1] for index in range(8)]
    texts = [says(processor.tokenizer.decode(ids[:-1])) for ids in completions]
    found = trainer._calculate_rewards(chats, [row["prompt"] for row in chats], texts, completions)[:, 0].tolist()

    model = PeftModel.from_pretrained(load_image_classifier(base), folder).eval()
    prompt = "reward_prompt" if facts else "prompt"
    with torch.no_grad():
        expected = [
            model(**plain_inputs(processor, row[prompt], row["images"], ids)).logits.item()
            for row, ids in zip(inputs, completions, strict=True)
        ]
        blind = model(**plain_inputs(processor, inputs[0][prompt], [], completions[0])).logits.item()
    if ensemble:
        found = [2.0 * score - 8.0 for score in found]
    assert_close(torch.tensor(found), torch.tensor(expected), atol=2e-5, rtol=0.0)
    assert abs(found[0] - blind) > 1e-3
    assert rollout(trainer, rows=8)["old_values"].abs().max() > 0.0


@pytest.mark.parametrize(
    ("built_vision", "placement"), [("llava", "redistributed"), ("qwen2_5_vl", "attention")], indirect=["built_vision"]
)
def test_its_score_is_placed_on_tokens(make, base, processor, tmp_path, make_config, placement):
    reward = make(pairs(4))
    spread(reward.model)
    reward.save_model()
    policy = load_image_model(base)
    trainer = PPOTrainer(
        model=policy,
        reward_funcs=str(tmp_path / "reward"),
        args=make_config(critic_init="policy", reward_placement=placement, max_steps=1),
        train_dataset=pairs(8).select_columns(["prompt", "images"]),
        processing_class=processor,
        peft_config=LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=language_layers(policy)),
    )
    trainer.train()
    assert any("loss" in entry for entry in trainer.state.log_history)


def test_what_does_not_fit_is_refused_by_name(make, processor, tiny_model_path, tiny_tokenizer, tmp_path):
    rows = pairs(4)
    with pytest.raises(ValueError, match="The train rows have the column 'images', but this stage reads text"):
        make(rows, processing_class=processor.tokenizer)
    with pytest.raises(ValueError, match=r"An adapter is on 'model.vision_tower.*outside of the language part"):
        make(rows, target_modules="all-linear")
    with pytest.raises(ValueError, match="With a processor, .* scores are read at the last token"):
        make(rows, readout="mean")
    with pytest.raises(ValueError, match="The train rows are text, and pictures need chats"):
        make(Dataset.from_list([{"prompt": "which", "chosen": "red", "rejected": "blue", "images": []}] * 4))
    with pytest.raises(ValueError, match=re.escape("The prompt of row 0 of the train rows is missing")):
        make(rows.remove_columns("prompt"))
    broken = rows.remove_columns("images").add_column("images", [["no/such/file.png"]] * 4)
    with pytest.raises(ValueError, match="The prompt of row 0 of the train rows has a picture 0 that cannot be read"):
        make(broken)
    text = AutoModelForSequenceClassification.from_pretrained(tiny_model_path, num_labels=1)
    args = PreferenceConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none")
    with pytest.raises(ValueError, match=r"\(`model_type: llama`\) does not read pictures"):
        PreferenceTrainer(model=text, args=args, train_dataset=rows, processing_class=processor)
    with pytest.raises(TypeError, match="`processing_class` is a processor, but `model` is a str"):
        PreferenceTrainer(model="base", args=args, train_dataset=rows, processing_class=processor)
