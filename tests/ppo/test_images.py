"""Prompts with pictures: small models with policy, reference and critic as adapters on their language part."""

import copy
import re

import pytest
import torch
import transformers
from datasets import Dataset, IterableDataset
from datasets import Image as ImageFeature
from datasets import Sequence as SequenceFeature
from peft import LoraConfig, PeftModel
from PIL import Image
from torch.testing import assert_close
from transformers import GenerationConfig

from rlhf_recipes import PPOTrainer
from rlhf_recipes.data.dialogues import BadRow
from rlhf_recipes.evaluation import evaluate_policy
from rlhf_recipes.models import language_layers
from rlhf_recipes.models.generation import sample_after
from rlhf_recipes.models.images import ImageReader, chat_with_images, images_of
from rlhf_recipes.ppo.passes import sample_from
from rlhf_recipes.ppo.prompts import PromptRules, check_rows
from rlhf_recipes.reward_modeling import PreferenceConfig, PreferenceTrainer
from rlhf_recipes.rewards import RemoteReward
from tests.ppo.support import rollout, without_chance

COLOURS = ("red", "green", "blue", "white")
VOCABULARY = 16
QUESTION = [{"role": "user", "content": "which colour ?"}]
QWEN = pytest.mark.parametrize("built_vision", ["qwen2_5_vl"], indirect=True)
BOTH = pytest.mark.parametrize("built_vision", ["llava", "qwen2_5_vl"], indirect=True)


def picture(colour, size=(28, 28)):
    image = Image.new("RGB", size, colour)
    image.paste("black", (size[0] // 2, size[1] // 3, size[0], size[1]))  # the places of its parts are to matter
    return image


@pytest.fixture
def model(built_vision):
    return built_vision[0]


@pytest.fixture
def processor(built_vision):
    return built_vision[1]


@pytest.fixture
def rows():
    """Chats with one picture, two, or none, of unlike length."""
    two = [{"role": "user", "content": "a square ? which colour ?"}]
    prompts = [QUESTION, two, QUESTION, two]
    images = [[picture("red")], [picture("blue", (84, 56)), picture("green", (40, 90))], [], [picture("white")]]
    columns = {"prompt": prompts * 4, "images": images * 4, "colour": list(COLOURS) * 4}
    return Dataset.from_dict(columns).cast_column("images", SequenceFeature(ImageFeature()))


def sees_red(completions, images, **kwargs):
    """Paid for the amount of red in the pictures and the length of the answer: it needs both."""
    assert len(images) == len(completions)
    return [
        float(sum(image.getpixel((0, 0))[0] for image in own)) / 255 + 0.1 * len(answer[0]["content"].split())
        for own, answer in zip(images, completions, strict=True)
    ]


@pytest.fixture
def make(model, processor, rows, make_config):
    def make(reward_funcs=sees_red, dataset=None, processing_class=None, target_modules=None, other=None, **fields):
        base = copy.deepcopy(model) if other is None else other
        targets = target_modules or language_layers(base)
        return PPOTrainer(
            model=base,
            reward_funcs=reward_funcs,
            args=make_config(critic_init="policy", **fields),
            train_dataset=rows if dataset is None else dataset,
            eval_dataset=rows,
            processing_class=processing_class or processor,
            peft_config=LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=targets),
        )

    return make


def spread(trainer):
    """Let every adapter change what its role computes."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0.0, 0.2, generator=generator)
    return trainer


def made_up(prompt, repeat=0):
    tokens = [4 + (sum(prompt) + repeat + step) % 8 for step in range(1 + (len(prompt) + repeat) % 4)]
    return [*tokens, 1]


def plain_fields(processor, row):
    """What the processor alone makes of a prompt: its ids, and what else the model takes."""
    fields = processor.apply_chat_template(
        chat_with_images(row), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    del fields["attention_mask"]
    return fields


def with_completion(fields, ids):
    """The same with a completion after it, of which no token stands for a picture."""
    after = {"input_ids": torch.tensor([ids])}
    after["mm_token_type_ids"] = torch.zeros_like(after["input_ids"])
    more = {name: torch.cat([fields[name], values], dim=1) for name, values in after.items() if name in fields}
    return {**fields, **more}


@pytest.mark.parametrize(
    ("built_vision", "critic"),
    [("llava", "adapter"), ("llava", "head"), ("qwen2_5_vl", "adapter")],
    indirect=["built_vision"],
)
def test_every_network_reads_the_pictures(make, processor, rows, critic):
    """Log-probabilities and values are those of plain passes over single rows, with all of the processor's fields."""
    trainer = spread(without_chance(make(critic=critic), made_up))
    trainer.state.global_step = 1  # before the first update, policy and reference must be one
    head = trainer.roles.heads["critic"]
    torch.nn.init.normal_(head.weight, generator=torch.Generator().manual_seed(2))
    batch = rollout(trainer, rows=8)
    base = trainer.roles.model.get_base_model()
    for index in range(8):
        ids = batch["completion_ids"][index][batch["completion_mask"][index].bool()]
        fields = plain_fields(processor, rows[index])
        start, whole = fields["input_ids"].size(1), with_completion(fields, ids.tolist())
        expected = {}
        for role in ("default", None, "critic" if critic == "adapter" else "default"):
            with trainer.roles.use(role), torch.no_grad():
                logits = base(**whole).logits[0, start - 1 : -1]
                states = base.model(**whole).last_hidden_state[0, start - 1 : -1]
                expected[role] = logits.log_softmax(-1).gather(1, ids[:, None])[:, 0], head(states)[:, 0]
        length = len(ids)
        assert_close(batch["old_per_token_logps"][index, :length], expected["default"][0], atol=2e-5, rtol=1e-4)
        assert_close(batch["ref_per_token_logps"][index, :length], expected[None][0], atol=2e-5, rtol=1e-4)
        values = expected["critic" if critic == "adapter" else "default"][1]
        assert_close(batch["old_values"][index, :length], values, atol=2e-5, rtol=1e-4)
    with_red, blind = batch["old_per_token_logps"][0], batch["old_per_token_logps"][2]
    assert not torch.allclose(with_red, blind), "the same question without a picture"


@BOTH
def test_what_is_sampled_as_good_as_greedily_is_what_the_model_generates(make, processor, rows):
    """Prompts of unlike length in one batch, against the model's own generation, one by one."""
    trainer = spread(make())
    policy, prompts = trainer.model.eval(), [rows[index] for index in range(4)]
    ids, _, fields = trainer._tokenize_prompts([row["prompt"] for row in trainer.chats_of(prompts)])
    cold, settings = 1e-5, {"max_new_tokens": 6, "pad_token_id": 0}
    config = GenerationConfig(do_sample=True, temperature=cold, top_k=0, **settings)
    found = sample_after(policy, ids, config, cold, ends=[1], embedded=trainer.embed_tokenized(ids, fields))
    for row, own, completion in zip(prompts, ids, found, strict=True):
        alone = policy.generate(
            **plain_fields(processor, row), generation_config=GenerationConfig(do_sample=False, **settings)
        )
        generated = alone[0, len(own) :].tolist()
        assert completion == generated[: generated.index(1) + 1 if 1 in generated else None]
    assert len(max(found, key=len)) > 2, "else nothing is said of the tokens behind the first"


@QWEN
def test_ppo_trains_and_evaluates_and_leaves_the_vision_part_alone(make, model, tmp_path, rows):
    trainer = make(max_steps=2, num_iterations=2)
    before = {name: weight.clone() for name, weight in trainer.model.named_parameters()}
    assert not [name for name in before if "lora" in name and ("vision" in name or "projector" in name)]
    trainer.train()
    changed = {
        name for name, parameter in trainer.model.named_parameters() if not torch.equal(parameter, before[name])
    }
    assert changed
    assert all(".language_model." in name or name.startswith(("heads.", "base_model.heads")) for name in changed)
    [first, *_] = [entry["kl"] for entry in trainer.state.log_history if "kl" in entry]
    assert abs(first) < 1e-5
    result = evaluate_policy(trainer, rows, rows=8)
    assert result["reference"]["kl"] == pytest.approx(0.0, abs=1e-5)
    assert {"policy", "reference", "win_rate"} <= result.keys()
    assert {"eval_loss", "eval_reward"} <= trainer.evaluate().keys()
    trainer.save_model()
    assert (tmp_path / "run" / "processor_config.json").exists()
    saved = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "run").state_dict()
    mine = {name: weight for name, weight in trainer.model.state_dict().items() if ".default." in name}
    assert mine
    assert all(torch.equal(weight, saved[name]) for name, weight in mine.items())


@QWEN
def test_a_run_goes_on_in_the_middle_of_a_rollout_with_pictures(make, tmp_path):
    """The checkpoint holds the embeddings and positions of the rollout's prompts."""
    options = {"max_steps": 4, "num_iterations": 2, "save_strategy": "steps", "save_steps": 3}
    whole = make(**options)
    whole.train()
    again = make(**options)
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    for (name, weight), other in zip(whole.model.named_parameters(), again.model.parameters(), strict=True):
        assert torch.equal(weight, other), name


@QWEN
def test_sampling_is_from_the_distributions_that_are_trained(make, processor, rows):
    """Many samples of one prompt have the frequencies of the first token's log-probabilities."""
    trainer = spread(make())
    trainer.model.eval()
    chats = trainer.chats_of([rows[0]] * 512)
    ids, _, fields = trainer._tokenize_prompts([chats[0]["prompt"]] * 1)
    embedded = trainer.embed_tokenized(ids, fields)
    first = [row[0] for row in sample_from(trainer, trainer.model, ids * 512, embedded * 512)]
    with torch.no_grad():
        logits = trainer.model(**plain_fields(processor, rows[0])).logits[0, -1]
    shares = torch.bincount(torch.tensor(first), minlength=len(logits)) / 512
    assert_close(shares, logits.softmax(-1), atol=0.09, rtol=0.0)


def test_pictures_are_rgb_and_upright():
    see_through = Image.new("RGBA", (2, 2), (255, 0, 0, 0))
    [opened] = images_of({"image": see_through})
    assert (opened.mode, opened.getpixel((0, 0))) == ("RGB", (255, 255, 255))
    assert images_of({"images": None}) == images_of({}) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": "which colour ?"}, "is text, and pictures need a chat"),
        (
            {"prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}]},
            "has 1 places for pictures (parts of type `image`), but 2 pictures",
        ),
        ({"prompt": [{"role": "user", "content": "<image> which colour ?"}]}, "cannot be read by the processor"),
        ({"images": ["no/such/file.png"]}, "has a picture 0 that cannot be read"),
        ({"images": [b"no picture"]}, "has a picture 0 that cannot be read"),
        ({"prompt": [{"role": "system", "content": "a"}]}, "has no message of the user that its 2 pictures could go"),
    ],
    ids=["text", "places", "token", "path", "bytes", "system"],
)
def test_rows_whose_pictures_cannot_be_read_stop_before_training(model, processor, change, message):
    row = {"prompt": QUESTION, "images": [picture("red"), picture("blue")]} | change
    rules = PromptRules(processor.tokenizer, 64, VOCABULARY, {}, images=ImageReader(processor, model))
    stream = IterableDataset.from_generator(lambda: iter([row] * 2))  # as they are: Arrow would not hold them all
    with pytest.raises(ValueError, match=rf"`train_dataset`: the prompt of row 0 .*{re.escape(message)}"):
        next(iter(check_rows(stream, "train_dataset", rules)))


def test_rows_of_a_data_set_are_checked_as_a_whole(model, processor, rows):
    reader = ImageReader(processor, model)
    rules, short = (PromptRules(processor.tokenizer, longest, VOCABULARY, {}, images=reader) for longest in (64, 12))
    assert check_rows(rows, "train_dataset", rules) is rows
    with pytest.raises(ValueError, match="8 of 16 prompts cannot be used: the prompt of row 1 has 18 tokens, and the"):
        check_rows(rows, "train_dataset", short)
    paths = Dataset.from_dict({"prompt": [QUESTION], "images": [["no/such/file.png"]]})
    lost = paths.cast_column("images", SequenceFeature(ImageFeature()))
    for broken in (paths, lost):
        with pytest.raises(ValueError, match="1 of 1 prompts cannot be used: the prompt of row 0 has a picture"):
            check_rows(broken, "train_dataset", rules)


def test_what_does_not_fit_is_refused_by_name(make, processor, rows, tiny_model_path):
    with pytest.raises(ValueError, match=r"`train_dataset` has the column 'images', but prompts are read by"):
        make(processing_class=processor.tokenizer)
    with pytest.raises(ValueError, match=r"An adapter is on 'model.vision_tower.*outside of the language part"):
        make(target_modules="all-linear")
    with pytest.raises(ValueError, match="'remote' reads text and does not see the pictures"):
        make(reward_funcs=RemoteReward("http://127.0.0.1:9"))
    with pytest.raises(ValueError, match="`critic: model` and `critic_layers` are for texts"):
        make(critic_layers=1)
    text = transformers.AutoModelForCausalLM.from_pretrained(tiny_model_path)
    with pytest.raises(ValueError, match=r"LlamaForCausalLM \(`model_type: llama`\) does not read pictures"):
        make(other=text, target_modules="all-linear")
    with pytest.raises(ValueError, match="LlamaForCausalLM has no language part beside a vision tower"):
        language_layers(text)


def test_a_template_that_asks_for_no_answer_behind_a_picture_is_refused(model, processor):
    processor.chat_template = "{% for message in messages %}<image>{% endfor %}"
    with pytest.raises(BadRow, match="ends with a picture: the chat template writes nothing behind it"):
        ImageReader(processor, model).encode([chat_with_images({"prompt": QUESTION, "image": picture("red")})])


@BOTH
def test_image_tokens_and_features_must_agree(model, processor):
    reader = ImageReader(processor, model)
    [ids], [pixels] = reader.encode([chat_with_images({"prompt": QUESTION, "image": picture("red", (56, 56))})])
    assert ids.count(3) == 4
    with pytest.raises(ValueError, match=re.escape("Prompt 0 has 3 image tokens, and its pictures 4 features")):
        reader.embed([[token for place, token in enumerate(ids) if place != ids.index(3)]], [pixels])


def test_the_reward_stage_does_not_drop_pictures_in_silence(tiny_model_path, tiny_tokenizer, tmp_path):
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tiny_model_path, num_labels=1)
    rows = Dataset.from_list([{"prompt": "the film", "chosen": " good", "rejected": " bad", "image": picture("red")}])
    args = PreferenceConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none")
    with pytest.raises(ValueError, match="The train rows have the column 'image', but this stage reads text"):
        PreferenceTrainer(model=model, args=args, train_dataset=rows, processing_class=tiny_tokenizer)
