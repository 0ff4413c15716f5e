"""SFT with pictures: batches, loss and saved adapter against the processor and the model alone."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from PIL import Image

from rlhf_recipes.models import language_layers, load_image_model, load_policy
from rlhf_recipes.models.images import ImageReader, chat_with_images
from rlhf_recipes.supervised import CompletionConfig, CompletionTrainer, ImageCollator, evaluate_completions

COLOURS = ("red", "green", "blue")
QUESTION = [{"role": "user", "content": "which colour ?"}]
PAIR = {"prompt": QUESTION, "completion": [{"role": "assistant", "content": "red"}]}


def rows(count):
    """Rows with a picture, with two, and without one."""
    made = []
    for number in range(count):
        colours = [COLOURS[number % 3], "white"][: (1, 2, 0)[number % 5 % 3]]
        answer = " ".join([COLOURS[number % 3]] * (1 + number % 2))
        images = [Image.new("RGB", size, colour) for colour, size in zip(colours, ((28, 28), (56, 84)), strict=False)]
        made.append({"prompt": QUESTION, "images": images, "completion": [{"role": "assistant", "content": answer}]})
    return Dataset.from_list(made)


@pytest.fixture
def base(built_vision, tmp_path):
    built_vision[0].save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


@pytest.fixture
def make(base, built_vision, tmp_path):
    def make(train, target_modules=None, evals=None, **fields):
        model = load_image_model(base)
        settings = {"max_length": None, "max_steps": 2, "learning_rate": 1e-2, "per_device_train_batch_size": 4}
        quiet = {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "use_cpu": True, "bf16": False}
        return CompletionTrainer(
            model=model,
            args=CompletionConfig(str(tmp_path / "sft"), **settings | quiet | fields),
            train_dataset=train,
            eval_dataset=evals,
            processing_class=built_vision[1],
            peft_config=LoraConfig(
                task_type="CAUSAL_LM", r=4, target_modules=target_modules or language_layers(model)
            ),
        )

    return make


def plain_losses(model, processor, row):
    """Negative log-probabilities of the completion's tokens, end token included, by the processor alone."""
    fields = processor.apply_chat_template(
        chat_with_images(row), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    answer = torch.tensor([*processor.tokenizer(row["completion"][0]["content"])["input_ids"], 1])
    prompt = fields.pop("input_ids")
    fields.pop("attention_mask")
    if "mm_token_type_ids" in fields:  # no token of an answer stands for a picture
        fields["mm_token_type_ids"] = torch.nn.functional.pad(fields["mm_token_type_ids"], (0, answer.numel()))
    with torch.no_grad():
        logits = model(input_ids=torch.cat([prompt, answer[None]], dim=1), **fields).logits[0, prompt.size(1) - 1 : -1]
    return -logits.log_softmax(-1).gather(1, answer[:, None])[:, 0]


@pytest.mark.parametrize("built_vision", ["llava", "qwen2_5_vl"], indirect=True)
def test_training_evaluation_and_the_saved_adapter(make, base, built_vision, tmp_path):
    trainer = make(rows(8), evals=rows(7))
    before = {name: weight.clone() for name, weight in trainer.model.named_parameters()}
    trainer.train()
    changed = {name for name, weight in trainer.model.named_parameters() if not torch.equal(weight, before[name])}
    assert changed
    assert all(".language_model." in name and "lora" in name for name in changed)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in trainer.model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0.0, 0.3, generator=generator)
    evaluation = evaluate_completions(trainer)
    trainer.save_model()

    model = PeftModel.from_pretrained(load_image_model(base), tmp_path / "sft").eval()
    losses = torch.cat([plain_losses(model, built_vision[1], row) for row in rows(7)])
    assert evaluation["loss"] == pytest.approx(losses.mean().item(), abs=2e-5)
    assert evaluation["n"] == 7
    assert (tmp_path / "sft" / "processor_config.json").exists()
    assert (tmp_path / "sft" / "trained_on.json").exists()
    policy = load_policy(load_image_model(base), tmp_path / "sft")
    again = torch.cat([plain_losses(policy.eval(), built_vision[1], row) for row in rows(2)])
    torch.testing.assert_close(again, losses[: len(again)])


def test_what_does_not_fit_is_refused_by_name(make, built_vision):
    given = rows(4)
    with pytest.raises(ValueError, match="the train rows have no column `images` or `image`"):
        make(given.remove_columns("images"))
    paths = Dataset.from_list([{**PAIR, "images": []}, {**PAIR, "images": ["no/such/file.png"]}])
    with pytest.raises(ValueError, match="The prompt of row 1 of the late rows has a picture 0 that cannot be read"):
        make(given, evals={"late": paths})
    with pytest.raises(TypeError, match="`processing_class` is a processor, but `model` is a str"):
        CompletionTrainer(model="base", processing_class=built_vision[1])
    with pytest.raises(ValueError, match="Rows with pictures are not cut"):
        make(given, max_length=64)
    with pytest.raises(ValueError, match=r"An adapter is on 'model.vision_tower.*outside of the language part"):
        make(given, target_modules="all-linear")
    with pytest.raises(ValueError, match="The prompt of row 0 of the train rows has no chat as `completion`"):
        make(given.remove_columns("completion").add_column("completion", ["red"] * 4))
    broken = given.remove_columns("images").add_column("images", [["no/such/file.png"]] * 4)
    with pytest.raises(ValueError, match="The prompt of row 0 of the eval rows has a picture 0 that cannot be read"):
        make(given, evals=broken)
    named = [{"role": "assistant", "content": "red <image>"}]
    with pytest.raises(ValueError, match="The prompt of row 0 of the train rows has an answer with the image token"):
        make(given.remove_columns("completion").add_column("completion", [named] * 4))


@pytest.mark.parametrize("built_vision", ["qwen2_5_vl"], indirect=True)
def test_a_picture_with_more_tokens_than_the_context_is_refused(built_vision):
    model, processor = built_vision
    large = Dataset.from_list([{**PAIR, "images": [Image.new("RGB", (112, 112), "red")]}])
    reader = ImageReader(processor, model)
    ImageCollator(reader, [1], longest=27).check(large, "train")  # of them 16 of the picture
    with pytest.raises(
        ValueError, match="row 0 of the train rows has 27 tokens with its pictures and completion, but"
    ):
        ImageCollator(reader, [1], longest=26).check(large, "train")
