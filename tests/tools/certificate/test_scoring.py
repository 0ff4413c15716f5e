"""Reward models by path: adapters and whole models, decoders and encoders, read at the last token or at all."""

import copy
import shutil

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.testing import assert_close
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedTokenizerFast,
)

from rlhf_recipes.models import Roles, load_causal_lm, load_policy, load_sequence_classifier
from rlhf_recipes.models.readout import Readout
from rlhf_recipes.tools.certificate import certify, load_scorer
from rlhf_recipes.tools.certificate.pairs import score_pairs

USER, ANSWER = {"role": "user", "content": "the film was"}, {"role": "assistant", "content": "good"}
TEMPLATE = (
    "{% if slowly %}slow {% endif %}{% for m in messages %}{{ m.content + ' ' }}"
    "{% if m.role == 'assistant' %}{{ '<unk> very ' }}{% endif %}{% endfor %}"
)
PROMPT, COMPLETIONS = "the film was", [" good", " very bad and slow", " warm but dull"]


@pytest.fixture(scope="module")
def encoder_path(tmp_path_factory):
    """Folder of a random BERT reward model whose tokenizer puts [CLS] and [SEP] around texts."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"the film was good very bad and slow warm but dull".split()]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    folder = tmp_path_factory.mktemp("encoder")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=16, **names).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = BertConfig(vocab_size=len(words), num_labels=1, max_position_embeddings=16, **sizes)
    BertForSequenceClassification(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def decoder_path(tiny_model_path, tiny_tokenizer, tmp_path_factory):
    """Folder of a whole decoder reward model."""
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("decoder")
    load_sequence_classifier(tiny_model_path).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return str(folder)


def score(scorer):
    return torch.tensor(scorer.score([scorer.encode(PROMPT, completion) for completion in COMPLETIONS]))


def test_an_adapter_on_its_base(tiny_model_path, reward_adapter, tiny_tokenizer):
    scores = score(load_scorer(tiny_model_path, str(reward_adapter), batch_size=2))
    base = AutoModelForSequenceClassification.from_pretrained(tiny_model_path, num_labels=1)
    model = PeftModel.from_pretrained(base, str(reward_adapter)).eval()
    texts = [f"{PROMPT}{completion} <eos>" for completion in COMPLETIONS]
    expected = torch.cat([model(**tiny_tokenizer(text, return_tensors="pt")).logits[0] for text in texts])
    assert_close(scores, expected.detach().double(), rtol=0, atol=1e-5)
    assert scores.std() > 0.01


@pytest.mark.parametrize("four_bit", [False, True], ids=["bfloat16", "4-bit"])
def test_half_precision_is_read_as_ppo_reads_it(tiny_model_path, reward_adapter, sft_adapter, four_bit):
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16) if four_bit else None
    options = {"dtype": "bfloat16", "quantization_config": quantization}
    scorer = load_scorer(tiny_model_path, str(reward_adapter), **options)
    rows = [scorer.encode(PROMPT, completion).ids for completion in COMPLETIONS]
    roles = Roles(load_policy(load_causal_lm(tiny_model_path, **options), str(sft_adapter)).eval())
    roles.add_scalar_role("reward", str(reward_adapter))
    expected = roles.scores("reward", rows, pad_token_id=0, batch_size=4)
    scores = score(scorer)
    assert_close(scores, expected.double(), rtol=0, atol=1e-5)
    assert not torch.equal(scores, scores.bfloat16().double()), "the head's numbers keep their digits"


def test_a_whole_decoder(decoder_path, tiny_tokenizer):
    scores = score(load_scorer(decoder_path))
    model = AutoModelForSequenceClassification.from_pretrained(decoder_path).eval()
    texts = [f"{PROMPT}{completion} <eos>" for completion in COMPLETIONS]
    expected = torch.cat([model(**tiny_tokenizer(text, return_tensors="pt")).logits[0] for text in texts])
    assert_close(scores, expected.detach().double(), rtol=0, atol=1e-5)


def test_a_whole_encoder(encoder_path):
    scorer = load_scorer(encoder_path)
    model = AutoModelForSequenceClassification.from_pretrained(encoder_path).eval()
    tokenizer = AutoTokenizer.from_pretrained(encoder_path)
    ids = [tokenizer(PROMPT, completion, return_tensors="pt").input_ids for completion in COMPLETIONS]
    expected = torch.cat([model(input_ids=own).logits[0] for own in ids]).detach().double()
    assert_close(score(scorer), expected, rtol=0, atol=1e-5)
    assert scorer.max_length == 16
    first = scorer.encode(PROMPT, COMPLETIONS[1])
    assert tokenizer.convert_ids_to_tokens(first.ids) == "[CLS] the film was [SEP] very bad and slow [SEP]".split()

    rows = {"prompt": ["the film was", "the good film was"] * 3, "chosen": [" good"] * 6, "rejected": [" bad and"] * 6}
    assert certify(scorer, Dataset.from_dict(rows))["accuracy"]["n"] == 6


@pytest.mark.parametrize("readout", ["sum", "mean"])
def test_readouts_over_tokens(decoder_path, tiny_tokenizer, tmp_path, readout):
    scorer = load_scorer(decoder_path)
    scorer.readout = Readout(readout)
    model = AutoModelForSequenceClassification.from_pretrained(decoder_path).eval()
    expected = []
    for completion in COMPLETIONS:
        batch = tiny_tokenizer(f"{PROMPT}{completion} <eos>", return_tensors="pt")
        numbers = model.score(model.model(**batch).last_hidden_state)[0, 3:, 0]  # the prompt has three words
        expected.append(numbers.sum() if readout == "sum" else numbers.mean())
    assert_close(score(scorer), torch.stack(expected).detach().double(), rtol=0, atol=1e-5)


def test_gain_and_bias_are_read_and_left_to_the_report(decoder_path, tmp_path):
    folder = tmp_path / "normalised"
    shutil.copytree(decoder_path, folder)
    Readout(gain=0.5, bias=2.0).save(folder)
    scorer = load_scorer(str(folder))
    assert (scorer.readout.gain, scorer.readout.bias) == (0.5, 2.0)
    assert_close(score(scorer), score(load_scorer(decoder_path)))


def test_lengths_are_those_of_the_completions(decoder_path, encoder_path):
    for path in (decoder_path, encoder_path):  # with the end token, or the last [SEP]
        scorer = load_scorer(path)
        lengths = [scorer.encode(PROMPT, completion).length for completion in COMPLETIONS]
        assert [length - lengths[0] for length in lengths] == [0, 3, 2]
    assert load_scorer(decoder_path).encode(PROMPT, " good").length == 2


class TestChats:
    """Templates whose turns close with a token that only a generation_config.json names, as Gemma's and Phi-3's."""

    @pytest.fixture
    def closing(self, tiny_model_path, reward_adapter, tiny_tokenizer, tmp_path):
        """Name `<unk>` as an end in the generation_config.json of the base or of the adapter, and load the scorer."""

        def load(where):
            folders = {"base": tmp_path / "base", "reward": tmp_path / "reward"}
            shutil.copytree(tiny_model_path, folders["base"])
            shutil.copytree(reward_adapter, folders["reward"])
            (folders["base"] / "generation_config.json").unlink(missing_ok=True)
            config = folders["reward"] / "adapter_config.json"
            config.write_text(config.read_text().replace(str(tiny_model_path), str(folders["base"])))
            tokenizer = copy.deepcopy(tiny_tokenizer)
            tokenizer.chat_template = TEMPLATE
            for folder in folders.values():
                tokenizer.save_pretrained(folder)
            if where is not None:
                ends = [tokenizer.eos_token_id, tokenizer.unk_token_id]
                GenerationConfig(eos_token_id=ends).save_pretrained(folders[where])
            return load_scorer(str(folders["base"]), str(folders["reward"]))

        return load

    @pytest.mark.parametrize(
        ("where", "last"), [("base", "<unk>"), ("reward", "<unk>"), (None, "<eos>")], ids=["base", "reward", "neither"]
    )
    def test_the_score_is_read_at_the_token_that_ends_the_answer(self, closing, where, last):
        scorer = closing(where)
        words = scorer.tokenizer.convert_ids_to_tokens(scorer.encode([USER], [ANSWER]).ids)
        assert words == ["the", "film", "was", "good", last]

    def test_a_row_says_how_its_chat_is_rendered(self, closing):
        scorer = closing("base")
        plain = scorer.encode([USER], [ANSWER])
        other = scorer.encode([USER], [ANSWER], tools="[]", template_kwargs={"slowly": True})
        assert (plain.start, other.start, plain.length, other.length) == (3, 4, 2, 2)
        assert scorer.encoded(other.ids, [USER], template_kwargs={"slowly": True}).start == 4
        rows = {"prompt": [[USER]] * 2, "chosen": [[ANSWER]] * 2, "rejected": [[dict(ANSWER, content="bad")]] * 2}
        more = {"chat_template_kwargs": [{"slowly": True}, {"slowly": False}]}
        scored = score_pairs(scorer, Dataset.from_dict(rows | more)).chosen
        assert_close(torch.tensor(scored), torch.tensor(scorer.score([other, plain])), rtol=0, atol=1e-6)
        assert abs(scored[0] - scored[1]) > 1e-4


class TestBadInput:
    def test_a_base_is_no_reward_model(self, tiny_model_path):
        with pytest.raises(ValueError, match="is no trained reward model"):
            load_scorer(tiny_model_path)

    def test_a_policy_is_no_reward_model(self, tiny_model_path, sft_adapter):
        with pytest.raises(ValueError, match="does not hold 'score.weight', so its score would be random"):
            load_scorer(tiny_model_path, str(sft_adapter))

    def test_another_base(self, decoder_path, reward_adapter):
        with pytest.raises(ValueError, match="was trained on"):
            load_scorer(decoder_path, str(reward_adapter))

    def test_no_adapter(self, tiny_model_path, tmp_path):
        with pytest.raises(FileNotFoundError, match="holds no adapter"):
            load_scorer(tiny_model_path, str(tmp_path))

    def test_pickled_weights(self, tiny_model_path, reward_adapter, tmp_path):
        (tmp_path / "adapter_config.json").write_text((reward_adapter / "adapter_config.json").read_text())
        (tmp_path / "adapter_model.bin").write_bytes(b"")
        with pytest.raises(FileNotFoundError, match="safetensors files only"):
            load_scorer(tiny_model_path, str(tmp_path))

    def test_an_encoder_read_per_token(self, encoder_path):
        scorer = load_scorer(encoder_path)
        scorer.readout = Readout("sum")
        with pytest.raises(ValueError, match="no head `score`"):
            score(scorer)

    def test_no_padding_token(self, decoder_path, tmp_path):
        scorer = load_scorer(decoder_path)
        scorer.tokenizer.pad_token = None
        with pytest.raises(ValueError, match="no padding token"):
            type(scorer)(scorer.model, scorer.tokenizer)
