"""Families of vision-language models: what PPO reads of pictures, against the model and its processor alone."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.testing import assert_close
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3ImageProcessorPil,
    Gemma3Processor,
    GenerationConfig,
    GotOcr2ImageProcessorPil,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessorPil,
    Idefics3Processor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
    Qwen2VLProcessor,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    SmolVLMImageProcessorPil,
)

from rlhf_recipes import PPOTrainer
from rlhf_recipes.models import language_layers, load_image_classifier, load_image_model, load_processor
from rlhf_recipes.models.generation import sample_after
from rlhf_recipes.models.image_embeddings import pad_prompts
from rlhf_recipes.models.images import MODEL_TYPES, ImageReader, chat_with_images, check_reads_images
from rlhf_recipes.models.packing import is_packed, pack
from rlhf_recipes.models.rows import Texts, pad_rows
from rlhf_recipes.models.vision import without_videos

_ENDS = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1}
_LAYERS = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def tokenizer_of(*special, **named):
    """A tokenizer of words, some of which stand for pictures, and attributes that name them."""
    words = [
        "<pad>",
        "<eos>",
        "<unk>",
        *special,
        *named.values(),
        *"user assistant : which colour is red blue".split(),
    ]
    inner = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
        extra_special_tokens=named,
    )
    tokenizer.add_special_tokens({"extra_special_tokens": list(special)})
    return tokenizer


def template(picture):
    return (
        "{% for m in messages %}{{ m['role'] }} : {% for part in m['content'] %}{% if part['type'] == 'image' %}"
        + picture
        + " {% else %}{{ part['text'] }}{% endif %}{% endfor %} {% endfor %}"
        "{% if add_generation_prompt %}assistant : {% endif %}"
    )


def text_sizes(tokenizer):
    return {"vocab_size": len(tokenizer), "num_key_value_heads": 2, **_LAYERS, **_ENDS}


def qwen2_vl():
    start, image, end, video = (f"<|{name}|>" for name in ("vision_start", "image_pad", "vision_end", "video_pad"))
    tokenizer = tokenizer_of(start, image, end, video)
    processor = without_videos(Qwen2VLProcessor)(
        Qwen2VLImageProcessorPil(size={"shortest_edge": 56**2, "longest_edge": 112**2}),
        tokenizer,
        chat_template=template(f"{start} {image} {end}"),
    )
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2]}
    config = Qwen2VLConfig(
        text_config={"rope_parameters": rope, **text_sizes(tokenizer)},
        vision_config={"depth": 2, "embed_dim": 32, "hidden_size": 32, "mlp_ratio": 2, "num_heads": 4},
        image_token_id=tokenizer.vocab[image],
        video_token_id=tokenizer.vocab[video],
        vision_start_token_id=tokenizer.vocab[start],
        vision_end_token_id=tokenizer.vocab[end],
    )
    return Qwen2VLForConditionalGeneration(config), processor


def _idefics3(configuration, family, processor_class, image_processor):
    places = [f"<row_{row}_col_{column}>" for row in (1, 2, 3) for column in (1, 2, 3)]
    tokenizer = tokenizer_of("<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>", *places)
    processor = processor_class(
        image_processor(size={"longest_edge": 112}, max_image_size={"longest_edge": 56}, do_image_splitting=True),
        tokenizer,
        image_seq_len=4,
        chat_template=template("<image>"),
    )
    config = configuration(
        text_config=LlamaConfig(**text_sizes(tokenizer)),
        vision_config={"image_size": 56, "patch_size": 14, **_LAYERS},
        image_token_id=tokenizer.vocab["<image>"],
        scale_factor=2,
        pad_token_id=0,
    )
    return family(config), processor


def idefics3():
    return _idefics3(Idefics3Config, Idefics3ForConditionalGeneration, Idefics3Processor, Idefics3ImageProcessorPil)


def smolvlm():
    """Its own processor needs torchvision and num2words; of pictures it makes what this one makes."""
    return _idefics3(SmolVLMConfig, SmolVLMForConditionalGeneration, Idefics3Processor, SmolVLMImageProcessorPil)


def internvl():
    tokenizer = tokenizer_of(
        start_image_token="<img>", end_image_token="</img>", context_image_token="<IMG_CONTEXT>", video_token="<video>"
    )
    processor = without_videos(InternVLProcessor)(
        GotOcr2ImageProcessorPil(size={"height": 28, "width": 28}, min_patches=1, max_patches=4),
        tokenizer,
        image_seq_length=4,
        chat_template=template("<IMG_CONTEXT>"),
    )
    config = InternVLConfig(
        text_config=Qwen2Config(**text_sizes(tokenizer)),
        vision_config={"image_size": [28, 28], "patch_size": [7, 7], **_LAYERS},
        image_token_id=tokenizer.vocab["<IMG_CONTEXT>"],
        image_seq_length=4,
        downsample_ratio=0.5,
    )
    return InternVLForConditionalGeneration(config), processor


def gemma3():
    tokenizer = tokenizer_of(
        image_token="<image_soft_token>", boi_token="<start_of_image>", eoi_token="<end_of_image>"
    )
    processor = Gemma3Processor(
        Gemma3ImageProcessorPil(size={"height": 56, "width": 56}),
        tokenizer,
        image_seq_length=4,
        chat_template=template("<start_of_image>"),
    )
    config = Gemma3Config(
        text_config={"head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 8, **text_sizes(tokenizer)},
        vision_config={"image_size": 56, "patch_size": 14, **_LAYERS},
        mm_tokens_per_image=4,
        image_token_index=tokenizer.vocab["<image_soft_token>"],
        boi_token_index=tokenizer.vocab["<start_of_image>"],
        eoi_token_index=tokenizer.vocab["<end_of_image>"],
    )
    return Gemma3ForConditionalGeneration(config), processor


FAMILIES = [qwen2_vl, idefics3, smolvlm, internvl, gemma3]


@pytest.fixture
def family(request):
    model, processor = request.param()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() > 1:  # spread so far that every mistake shows
            parameter.data.normal_(0.0, 0.2, generator=generator)
    return model.eval(), processor


def picture(colour, size):
    image = Image.new("RGB", size, colour)
    image.paste("black", (size[0] // 2, size[1] // 3, size[0], size[1]))
    return image


def rows():
    """Chats with one picture, two of unlike size, and none."""
    shown = [[picture("red", (56, 56))], [picture("blue", (112, 56)), picture("green", (60, 100))], []]
    chat = [{"role": "user", "content": "which colour is"}]
    return [{"prompt": chat, "images": images} for images in shown]


def plain_fields(processor, row):
    """What the processor alone makes of a prompt, without the mask, which is 1 everywhere."""
    fields = processor.apply_chat_template(
        chat_with_images(row), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    del fields["attention_mask"]
    return fields


def with_completion(fields, ids):
    after = {"input_ids": torch.tensor([ids])}
    after["mm_token_type_ids"] = after["token_type_ids"] = torch.zeros_like(after["input_ids"])
    more = {name: torch.cat([fields[name], values], dim=1) for name, values in after.items() if name in fields}
    return {**fields, **more}


COMPLETIONS = [[9, 10, 1], [8, 1], [11, 9, 8, 1]]


@pytest.mark.parametrize("family", FAMILIES, indirect=True, ids=lambda build: build.__name__)
@torch.no_grad()
def test_pictures_as_embeddings_are_what_the_model_makes_of_them(family, tmp_path):
    model, processor = family
    assert model.config.model_type in MODEL_TYPES
    reader = ImageReader(processor, model)
    chats = reader.rows(rows())
    prompt_ids, pixels = reader.encode([row["prompt"] for row in chats])
    singles = [plain_fields(processor, row) for row in rows()]
    assert prompt_ids == [fields["input_ids"][0].tolist() for fields in singles]
    wholes = [with_completion(fields, ids) for fields, ids in zip(singles, COMPLETIONS, strict=True)]
    alone = [model(**whole).logits[0] for whole in wholes]

    # SFT and reward models: a batch as the processor hands it over
    ids, mask = pad_rows([whole["input_ids"][0].tolist() for whole in wholes], 0)
    fields = reader.network_fields(ids, [reader.pixels(row) for row in rows()])
    together = model(input_ids=ids, attention_mask=mask, **fields).logits
    for found, expected in zip(together, alone, strict=True):
        assert_close(found[: len(expected)], expected, atol=2e-5, rtol=1e-4)

    # PPO: prompts as embeddings, in rows and one after another
    embedded = reader.embed(prompt_ids, pixels)
    left = dict(zip(("prompt_ids", "prompt_mask"), pad_rows(prompt_ids, 0, side="left"), strict=True))
    right = dict(zip(("completion_ids", "completion_mask"), pad_rows(COMPLETIONS, 0), strict=True))
    texts = Texts(**left, **right, **pad_prompts(embedded))
    pack(model)
    assert is_packed(model) == (model.config.model_type != "gemma3")
    for packed in {False, is_packed(model)}:
        places = texts.rows(packed)
        logits = model(**texts.network_input(places, model.get_input_embeddings()), use_cache=False).logits
        before = places.gather(logits, texts.positions_before)
        for found, expected, completion in zip(before, alone, COMPLETIONS, strict=True):
            length = len(completion)
            assert_close(found[:length], expected[-1 - length : -1], atol=2e-5, rtol=1e-4)
    assert not torch.allclose(alone[0][-1], alone[2][-1], atol=1e-3), "the pictures are to matter"

    # Sampling, as good as greedily
    settings = {"max_new_tokens": 5, "pad_token_id": 0}
    config = GenerationConfig(do_sample=True, temperature=1e-5, top_k=0, **settings)
    sampled = sample_after(model, prompt_ids, config, 1e-5, ends=[1], embedded=embedded)
    for single, completion in zip(singles, sampled, strict=True):
        likeliest = GenerationConfig(do_sample=False, eos_token_id=1, **settings)
        greedy = model.generate(**single, generation_config=likeliest)
        assert completion == greedy[0, single["input_ids"].size(1) :].tolist()

    # The score head's class reads what is saved, and sees the same states
    model.save_pretrained(tmp_path)
    scorer = load_image_classifier(str(tmp_path))
    states = model.base_model(**wholes[0]).last_hidden_state[:, -1]
    assert_close(scorer(**wholes[0]).logits, states @ scorer.score.weight.T, atol=2e-5, rtol=1e-4)

    policy = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=language_layers(model)))
    check_reads_images(policy)
    trained = [name for name, weight in policy.named_parameters() if weight.requires_grad]
    assert trained
    assert all(".language_model." in name or ".text_model." in name for name in trained)


@pytest.mark.parametrize("built_vision", ["qwen2_5_vl"], indirect=True)
def test_a_saved_processor_reads_pictures_as_before(built_vision, tmp_path):
    model, processor = built_vision
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded = load_processor(str(tmp_path))
    assert loaded.tokenizer.padding_side == "left"
    for row in rows():
        before, after = plain_fields(processor, row), plain_fields(loaded, row)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)


def test_what_reads_no_pictures_has_no_processor(tiny_model_path):
    with pytest.raises(ValueError, match="has no processor, which makes of pictures what a model reads: there is a"):
        load_processor(tiny_model_path)
    with pytest.raises(FileNotFoundError, match="Model folder './nowhere' does not exist"):
        load_processor("./nowhere")
    for load in (load_image_model, load_image_classifier):
        with pytest.raises(ValueError, match="`model_type: llama` reads no pictures. Give a vision-language model"):
            load(tiny_model_path)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES, indirect=True, ids=lambda build: build.__name__)
def test_ppo_trains(family, make_config):
    """TRL's output layer and the roles on such a base: before the first update old and new policy are one."""
    model, processor = family
    chats = [{"prompt": row["prompt"], "images": row["images"]} for row in rows()] * 4
    dataset = Dataset.from_list(chats)

    def brief(completion_ids, **kwargs):
        return [-float(len(ids)) for ids in completion_ids]

    trainer = PPOTrainer(
        model=model,
        reward_funcs=brief,
        args=make_config(critic_init="policy", max_steps=3),
        train_dataset=dataset,
        processing_class=processor,
        peft_config=LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=language_layers(model)),
    )
    trainer.train()
    [first, *_] = [entry["kl"] for entry in trainer.state.log_history if "kl" in entry]
    assert abs(first) < 1e-5
