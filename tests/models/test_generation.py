"""Sampling in a batch that gets smaller: the tokens that transformers draws, with less work."""

import pytest
import torch
from torch.testing import assert_close
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import DynamicLayer

from rlhf_recipes.models import load_causal_lm, load_tokenizer
from rlhf_recipes.models.arguments import CACHE
from rlhf_recipes.models.generation import (
    EnoughEnded,
    RoomyLayer,
    ignored_settings,
    read_prompts,
    sample,
    sample_after_texts,
    sample_with_transformers,
)
from rlhf_recipes.models.packing import pack

PAD, END = 0, 2

# Every kind of setting of transformers 5.23 that shapes what is drawn, or how the drawing ends
SHAPING = {
    "min_p": 0.2,
    "top_p": 0.5,
    "top_k": 3,
    "top_h": 0.3,
    "typical_p": 0.2,
    "epsilon_cutoff": 0.2,
    "eta_cutoff": 0.2,
    "temperature": 0.3,
    "repetition_penalty": 3.0,
    "no_repeat_ngram_size": 1,
    "suppress_tokens": [3, 4, 5, 6, 7],
    "begin_suppress_tokens": [3, 4, 5, 6, 7],
    "bad_words_ids": [[3], [4], [5], [6], [7]],
    "sequence_bias": [[[5], 9.0]],
    "min_new_tokens": 9,
    "min_length": 16,
    "exponential_decay_length_penalty": [1, 1.5],
    "forced_eos_token_id": 5,
    "forced_bos_token_id": 5,
    "guidance_scale": 3.0,
    "watermarking_config": {"greenlist_ratio": 0.25, "bias": 5.0, "hashing_key": 7, "context_width": 1},
    "num_beams": 3,
    "num_return_sequences": 2,
    "stop_strings": ["a"],
    "max_time": 1e-9,
    "prompt_lookup_num_tokens": 2,
}
LENGTHS = (1, 7, 3, 5, 2, 4, 6, 3)


def make_model(seed=0):
    torch.manual_seed(seed)
    sizes = {"vocab_size": 12, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6)
    return model


def prompts(lengths=LENGTHS):
    generator = torch.Generator().manual_seed(1)
    mask = torch.tensor([[0] * (max(lengths) - n) + [1] * n for n in lengths])
    return torch.randint(3, 12, mask.shape, generator=generator), mask


def settings(pad=PAD, count=14, temperature=1e-4, **more):
    fields = {"do_sample": True, "top_k": 0, "eos_token_id": END, "pad_token_id": pad, "use_cache": True}
    return GenerationConfig(**(fields | {"max_new_tokens": count, "temperature": temperature} | more))


def sampled(model, ids, mask, config=None, ends=(END,)):
    config = config or settings()
    return sample(model, ids, mask, config, config.temperature, list(ends))


def packed_model(seed=0):
    model = make_model(seed)
    pack(model)
    return model


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("pad", [PAD, END])
@pytest.mark.parametrize("lengths", [LENGTHS, (4, 4, 4), (1, 1), (1, 9)])
def test_greedy_tokens_are_those_of_transformers(seed, pad, lengths):
    ids, mask = prompts(lengths)
    greedy = settings(pad, do_sample=False, temperature=None)
    expected = make_model(seed).generate(input_ids=ids, attention_mask=mask, generation_config=greedy)
    found = sampled(packed_model(seed), ids, mask, settings(pad))
    assert torch.equal(found, expected)


def test_some_of_these_rows_end_early_and_some_do_not():
    ids, mask = prompts()
    ends = [
        (sampled(packed_model(seed), ids, mask)[:, ids.size(1) :] == END).any(dim=1).float().mean()
        for seed in range(6)
    ]
    assert any(0.0 < share < 1.0 for share in ends)


def test_the_cache_of_prompts_is_that_of_transformers():
    ids, mask = prompts()
    expected = make_model()(input_ids=ids[:, :-1], attention_mask=mask[:, :-1], position_ids=positions(mask)[:, :-1])
    cache = read_prompts(packed_model(), ids, mask)
    counts = mask[:, None, :-1, None].bool()
    for layer, other in zip(cache.layers, expected[CACHE].layers, strict=True):
        assert_close(layer.keys, other.keys.masked_fill(~counts, 0.0), atol=1e-5, rtol=1e-4)
        assert_close(layer.values, other.values.masked_fill(~counts, 0.0), atol=1e-5, rtol=1e-4)


def positions(mask):
    return (mask.cumsum(dim=1) - 1).clamp(min=0)


def test_no_time_is_spent_on_padding_or_on_rows_that_ended():
    model, seen = packed_model(), []
    layer = model.model.layers[0]
    layer.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[:2].numel()))
    ids, mask = prompts()
    sequences = sampled(model, ids, mask, settings(count=40))
    lengths = [row.index(END) + 1 if END in row else 40 for row in sequences[:, ids.size(1) :].tolist()]
    assert min(lengths) < max(lengths)
    assert seen[0] == int(mask[:, :-1].sum())  # prompts: real tokens only, the last of each comes with the first step
    running = [sum(length > step for length in lengths) for step in range(max(lengths))]
    steps = seen[1:]
    assert len(steps) == max(lengths)
    # a quarter of the rows in the batch may have ended
    assert all(alive <= rows and alive > 0.75 * rows for alive, rows in zip(running, steps, strict=True))


def test_rows_stop_the_loop_when_a_quarter_has_ended():
    ids = torch.tensor([[END, 5, 6], [5, 5, 5], [5, 5, 5], [5, 5, 5], [5, 5, 5]])
    enough = EnoughEnded(torch.tensor([END]), start=1)
    assert enough(ids, None).tolist() == [False] * 5  # an end token in a prompt ends nothing
    ids[0, 2] = END
    assert enough(ids, None).tolist() == [False] * 5  # a fifth
    ids[1, 1] = END
    assert enough(ids, None).tolist() == [True] * 5


def test_tokens_are_drawn_from_the_model():
    """The second token, after some rows left, follows the model's distribution: chi-square by hand, 4,000 rows."""
    torch.manual_seed(0)
    model, count = packed_model(3), 4000
    with torch.no_grad():
        model.lm_head.weight.mul_(0.1)  # flat enough for all tokens to come
    ids = torch.tensor([[4, 5], [0, 5]]).repeat(count // 2, 1)
    mask = torch.tensor([[1, 1], [0, 1]]).repeat(count // 2, 1)
    sequences = sampled(model, ids, mask, settings(count=3, temperature=1.0))
    for row, prompt in enumerate(([4, 5], [5])):
        drawn = sequences[row::2, 2:]
        with torch.no_grad():
            first = model(input_ids=torch.tensor([prompt])).logits[0, -1].softmax(dim=-1)
            texts = torch.tensor([[*prompt, token] for token in range(12)])
            second = model(input_ids=texts).logits[:, -1].softmax(dim=-1)
        expected = first[:, None] * second
        expected = torch.cat([expected[:END].flatten(), expected[END + 1 :].flatten(), first[END : END + 1]])
        pairs = torch.zeros(12, 12)
        for one, two in drawn[:, :2].tolist():
            pairs[one, two] += 1
        seen = torch.cat([pairs[:END].flatten(), pairs[END + 1 :].flatten(), pairs[END].sum()[None]])
        statistic = ((seen - expected * count / 2) ** 2 / (expected * count / 2)).sum().item()
        degrees = len(expected) - 1
        assert abs(statistic - degrees) < 4 * (2 * degrees) ** 0.5


def drawn(model, seed=3, **more):
    """Tokens of 16 rows, drawn by `sample_with_transformers`, from one random state."""
    torch.manual_seed(seed)
    ids, mask = prompts((4,) * 16)
    config = settings(temperature=1.0, count=6, **more)
    return sample_with_transformers(model, config, 1.0, input_ids=ids, attention_mask=mask)


@pytest.mark.parametrize("name", SHAPING)
def test_nothing_is_inherited_from_the_models_own_settings(name):
    model, expected = make_model(), drawn(make_model())
    model.generation_config = GenerationConfig(eos_token_id=END, do_sample=True, **{name: SHAPING[name]})
    own = model.generation_config
    assert torch.equal(drawn(model), expected)
    assert model.generation_config is own  # what is saved with the model stays
    assert list(ignored_settings(model)) == [name]


def test_greedy_settings_are_not_inherited():
    model = make_model()
    model.generation_config = GenerationConfig(do_sample=False, top_k=0, top_p=1.0, max_new_tokens=2, use_cache=False)
    assert torch.equal(drawn(model), drawn(make_model()))
    assert ignored_settings(model) == {}


_NOT_PROCESSORS = {"temperature", "stop_strings", "max_time", "num_return_sequences", "prompt_lookup_num_tokens"}


@pytest.mark.parametrize("name", sorted(SHAPING.keys() - _NOT_PROCESSORS))
def test_no_setting_passes_the_guard(name):
    with pytest.raises(RuntimeError) as caught:
        drawn(make_model(), **{name: SHAPING[name]})
    assert "sampled" in str(caught.value)


def test_a_faster_way_of_drawing_is_not_taken():
    assert torch.equal(drawn(make_model(), prompt_lookup_num_tokens=2), drawn(make_model()))


def test_a_model_that_generates_in_a_way_of_its_own_is_refused():
    class Own(LlamaForCausalLM):
        def generate(self, input_ids, custom_generate=None, **kwargs):
            return super().generate(input_ids=input_ids, **kwargs)

    model = Own(make_model().config)
    with pytest.raises(RuntimeError, match="Own generates in a way of its own"):
        drawn(model)


def test_greedy_search_and_another_temperature_do_not_pass_the_guard():
    ids, mask = prompts()
    greedy = settings(do_sample=False, temperature=None)
    for config in (greedy, settings(temperature=0.7)):
        with pytest.raises(RuntimeError, match="sampled at the temperature 1.0"):
            sample_with_transformers(make_model(), config, 1.0, input_ids=ids, attention_mask=mask)
        with pytest.raises(RuntimeError, match="sampled at the temperature 1.0"):
            sample(packed_model(), ids, mask, config, 1.0, [END])


def test_completions_of_texts_are_those_that_transformers_draws(tiny_model_path):
    """Batch by batch from one stream of random numbers, cut off behind the end token; one batch without a size."""
    model, tokenizer = load_causal_lm(tiny_model_path), load_tokenizer(tiny_model_path)
    prompts = ["the film", "a story was", "the", "it was not", "a"]
    for size in (2, None):
        torch.manual_seed(3)
        expected = []
        for start in range(0, 5, size or 5):
            inputs = tokenizer(prompts[start : start + (size or 5)], return_tensors="pt", padding=True)
            own = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "do_sample": True, "max_new_tokens": 12}
            rows = model.generate(**inputs, **own, pad_token_id=tokenizer.pad_token_id)[
                :, inputs["input_ids"].size(1) :
            ]
            for row in rows.tolist():
                end = row.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in row else len(row)
                expected.append(row[:end])
        torch.manual_seed(3)
        assert sample_after_texts(model, tokenizer, prompts, 12, batch_size=size) == expected
    assert sample_after_texts(model, tokenizer, [], 12) == []


def test_keys_and_values_have_room_for_more_tokens():
    """They are those of transformers' layer, and are copied once in many tokens."""
    torch.manual_seed(0)
    roomy, plain, copies = RoomyLayer(), DynamicLayer(), set()

    def add(rows, count):
        states = torch.randn(2, rows, 2, count, 4)
        for layer in (roomy, plain):
            layer.update(*states)
        assert torch.equal(roomy.keys, plain.keys)
        assert torch.equal(roomy.values, plain.values)
        copies.add(roomy.keys.data_ptr())

    for count in [5, *[1] * 40]:
        add(3, count)
    assert len(copies) == 2
    for layer in (roomy, plain):  # a row leaves
        layer.batch_select_indices(torch.tensor([2, 0]))
    held = {tensor.untyped_storage().nbytes() for tensor in vars(roomy).values() if isinstance(tensor, torch.Tensor)}
    assert held == {2 * 2 * 45 * 4 * 4}  # the other row is let go
    for _ in range(3):
        add(2, 1)
    assert roomy.get_seq_length() == plain.get_seq_length() == 48
