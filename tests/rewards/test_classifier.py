"""Reward models with a tokenizer of their own read the format they were trained on."""

import pytest
import torch
from datasets import Dataset, DatasetDict
from torch.testing import assert_close
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from rlhf_recipes.data.context import context_length
from rlhf_recipes.models import load_reward_model, load_sequence_classifier, load_tokenizer
from rlhf_recipes.models.readout import Readout
from rlhf_recipes.models.tiny import word_tokenizer
from rlhf_recipes.rewards import ClassifierReward
from rlhf_recipes.rewards.encoding import encode, encode_rows, is_encoder

PROMPTS, COMPLETIONS = ["the film", "a story was"], ["was good and warm", "dull"]
CHAT = "{% for m in messages %}<{{ m.role }}> {{ m.content }} {{ eos_token or '' }}<line> {% endfor %}"


@pytest.fixture
def encoder(bert_path):
    return load_reward_model(bert_path)


@pytest.fixture
def decoder():
    tokenizer = word_tokenizer([*"the film a story was good and warm dull".split(), "<user>", "<assistant>", "<line>"])
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(tokenizer), **sizes, num_labels=1, pad_token_id=0, initializer_range=0.5)
    return LlamaForSequenceClassification(config).eval(), tokenizer


def as_transformers_does(model, ids):
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0, 0].item()


class TestEncoder:
    def test_the_format_is_the_pair_with_special_tokens(self, encoder):
        """C40: the ids are BERT's own pair, and the score is that of the model on them, whatever is padded."""
        model, tokenizer = encoder
        reward = ClassifierReward(model, tokenizer, batch_size=2)
        scores = reward(prompts=PROMPTS, completions=COMPLETIONS)
        for prompt, completion, score in zip(PROMPTS, COMPLETIONS, scores, strict=True):
            ids = tokenizer(prompt, completion)["input_ids"]
            text = " ".join(tokenizer.convert_ids_to_tokens(ids))
            assert text == f"[CLS] {prompt} [SEP] {completion} [SEP]"
            assert_close(score, as_transformers_does(model, ids), atol=1e-6, rtol=1e-5)
            assert abs(score - as_transformers_does(model, ids[1:-1])) > 1e-3, "special tokens matter"
        assert reward(prompts=PROMPTS[::-1], completions=COMPLETIONS)[0] != scores[0], "the prompt is read too"

    def test_prompts_that_are_empty(self, encoder):
        ids, _ = encode(encoder[1], "", "good and warm", encoder=True)
        assert encoder[1].decode(ids) == "[CLS] good and warm [SEP]"

    def test_normalisation(self, encoder):
        raw = ClassifierReward(*encoder)(prompts=PROMPTS, completions=COMPLETIONS)
        normal = ClassifierReward(*encoder, readout=Readout(gain=0.25, bias=-0.5))
        assert normal(prompts=PROMPTS, completions=COMPLETIONS) == pytest.approx([0.25 * x - 0.5 for x in raw])

    def test_a_text_longer_than_the_context_is_named(self, encoder):
        """C40's other side: 24 positions hold a text of 24 tokens and no more."""
        reward = ClassifierReward(*encoder, name="bert")
        fits = "good " * 20  # [CLS] film [SEP] good*20 [SEP]
        assert len(reward(prompts=["film"], completions=[fits])) == 1
        with pytest.raises(ValueError, match=r"Row 1 has 25 tokens for the reward model 'bert', whose context is 24"):
            reward(prompts=["film", "film"], completions=["good", fits + "good"])

    def test_a_tokenizer_without_special_tokens_is_refused(self, encoder):
        model, tokenizer = encoder
        tokenizer.backend_tokenizer.post_processor = None
        with pytest.raises(ValueError, match=r"does not put them around a text"):
            ClassifierReward(model, tokenizer)(prompts=["film"], completions=["good"])

    def test_it_has_no_score_per_token(self, encoder):
        with pytest.raises(ValueError, match="encoder .*one score per text.*'sum'"):
            ClassifierReward(*encoder, readout=Readout("sum"))

    def test_chats_need_a_template(self, encoder):
        model, tokenizer = encoder
        chat = {"prompts": [[{"role": "user", "content": "film"}]]}
        chat["completions"] = [[{"role": "assistant", "content": "good"}]]
        with pytest.raises(ValueError, match="no chat template"):
            ClassifierReward(model, tokenizer)(**chat)
        tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
        ids, _ = encode(tokenizer, chat["prompts"][0], chat["completions"][0], encoder=True)
        assert tokenizer.decode(ids) == "[CLS] film good [SEP]"


class TestDecoder:
    @pytest.mark.parametrize("finished", [True, False])
    def test_the_end_token_is_read_where_it_was(self, decoder, finished):
        """C40: what is scored is `prompt + completion + end token`, as TRL's trainer writes it."""
        model, tokenizer = decoder
        reward = ClassifierReward(model, tokenizer, eos_token_ids={7})
        ids = [[5, 6, 7] if finished else [5, 6, 8]] * 2
        spaced = [f"{prompt} " for prompt in PROMPTS]
        scores = reward(prompts=spaced, completions=COMPLETIONS, completion_ids=ids)
        for prompt, completion, score in zip(spaced, COMPLETIONS, scores, strict=True):
            own = tokenizer(prompt + completion + (" <eos>" if finished else ""))["input_ids"]
            assert (own[-1] == tokenizer.eos_token_id) is finished
            assert_close(score, as_transformers_does(model, own), atol=1e-5, rtol=1e-5)

    def test_padding_is_found_by_position(self, decoder):
        """C37: a tokenizer whose padding is the end token gives the same score."""
        model, tokenizer = decoder
        before = ClassifierReward(model, tokenizer)(prompts=["film ", "film "], completions=COMPLETIONS)
        tokenizer.pad_token = tokenizer.eos_token
        assert ClassifierReward(model, tokenizer)(prompts=["film "] * 2, completions=COMPLETIONS) == before
        alone = [ClassifierReward(model, tokenizer)(prompts=["film "], completions=[text])[0] for text in COMPLETIONS]
        assert_close(alone, before, atol=1e-6, rtol=1e-5)

    @pytest.mark.parametrize("readout", ["sum", "mean"])
    def test_per_token_heads_are_read_at_the_completion(self, decoder, readout):
        model, tokenizer = decoder
        reward = ClassifierReward(model, tokenizer, readout=Readout(readout, 2.0, 1.0))
        scores = reward(prompts=[f"{prompt} " for prompt in PROMPTS], completions=COMPLETIONS)
        for prompt, completion, score in zip(PROMPTS, COMPLETIONS, scores, strict=True):
            ids = tokenizer(f"{prompt} {completion} <eos>")["input_ids"]
            start = len(prompt.split())
            with torch.no_grad():
                hidden = model.model(input_ids=torch.tensor([ids])).last_hidden_state
                numbers = model.score(hidden)[0, start:, 0]
            raw = numbers.sum() if readout == "sum" else numbers.mean()
            assert_close(score, 2.0 * raw.item() + 1.0, atol=1e-5, rtol=1e-5)

    def test_chats_end_at_the_end_token(self, decoder):
        _, tokenizer = decoder
        tokenizer.chat_template = CHAT
        prompt, completion = [{"role": "user", "content": "film"}], [{"role": "assistant", "content": "good"}]
        ids, start = encode(tokenizer, prompt, completion, encoder=False)
        assert ids[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(ids[start:]).split() == ["<assistant>", "good", "<eos>"]
        cut, _ = encode(tokenizer, prompt, completion, encoder=False, finished=False)
        assert cut == ids[:-1]


def test_scores_that_are_not_finite_are_named(decoder):
    model, tokenizer = decoder
    with torch.no_grad():
        model.score.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="'classifier' gives nan for row 0: it diverged"):
        ClassifierReward(model, tokenizer)(prompts=["film "], completions=["good"])


def test_more_outputs_are_refused(decoder):
    decoder[0].config.num_labels = 2
    with pytest.raises(ValueError, match="has 2 outputs. Load it with `num_labels=1`"):
        ClassifierReward(*decoder)


def test_contexts():
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = RobertaConfig(vocab_size=9, **sizes, max_position_embeddings=18, pad_token_id=1, num_labels=1)
    roberta = RobertaForSequenceClassification(config)
    assert context_length(roberta) == 16
    roberta(input_ids=torch.full((1, 16), 5))
    with pytest.raises((IndexError, RuntimeError)):
        roberta(input_ids=torch.full((1, 17), 5))
    llama = LlamaForSequenceClassification(
        LlamaConfig(vocab_size=9, **sizes, max_position_embeddings=32, num_labels=1)
    )
    assert context_length(llama) == 32
    assert (is_encoder(roberta), is_encoder(llama)) == (True, False)


class TestEncodeRows:
    def test_pairs_are_encoded_as_they_are_scored(self, encoder):
        pair = {"prompt": "the film", "chosen": "was good", "rejected": "was dull"}
        tokenizer = encoder[1]
        [row] = encode_rows(DatasetDict(train=Dataset.from_list([pair])), tokenizer, 24, None)["train"]
        for side in ("chosen", "rejected"):
            assert row[f"{side}_ids"] == encode(tokenizer, pair["prompt"], pair[side], encoder=True)[0]

    def test_rows_that_do_not_fit_are_named_or_left_to_the_trainer(self, encoder):
        pairs = [{"chosen": "good", "rejected": "dull"}, {"chosen": "good", "rejected": "dull " * 23}]
        rows = DatasetDict(test=Dataset.from_list(pairs))
        for max_length in (None, 30):
            with pytest.raises(ValueError, match=r"`rejected` of row 1 of the test rows has 25 tokens.*context is 24"):
                encode_rows(rows, encoder[1], 24, max_length)
        assert len(encode_rows(rows, encoder[1], 24, 24)["test"][1]["rejected_ids"]) == 25

    def test_rows_of_the_preference_table(self, encoder):
        table = {"prompt": "the film", "completions": ["was good", "was dull", "was warm"], "ranks": [1, 3, 2]}
        rows = DatasetDict(train=Dataset.from_list([table]))
        [row] = encode_rows(rows, encoder[1], 24, None)["train"]
        texts = table["completions"]
        assert row["completion_ids"] == [encode(encoder[1], "the film", text, encoder=True)[0] for text in texts]
        with pytest.raises(ValueError, match="Completion 0 of row 0 of the train rows has 7 tokens"):
            encode_rows(rows, encoder[1], 6, None)
        given = DatasetDict(train=rows["train"].add_column("completion_ids", [[[2, 3]] * 3]))
        assert encode_rows(given, encoder[1], 24, None)["train"][0]["completion_ids"] == [[2, 3]] * 3

    def test_ids_that_are_given_stay(self, encoder):
        rows = DatasetDict(train=Dataset.from_dict({"chosen_ids": [[2, 5, 3]], "rejected_ids": [[2, 6, 3]]}))
        assert encode_rows(rows, encoder[1], 24, None)["train"][:] == rows["train"][:]


class TestLoading:
    def test_a_base_without_its_head_is_no_reward_model(self, tiny_model_path, bert_path, tmp_path):
        with pytest.raises(ValueError, match="is no trained reward model: 1 weights, 'score.weight'"):
            load_reward_model(tiny_model_path)
        config = AutoModelForSequenceClassification.from_pretrained(bert_path).config
        BertForMaskedLM(config).save_pretrained(tmp_path / "mlm")
        assert load_sequence_classifier(str(tmp_path / "mlm")).config.num_labels == 1
        with pytest.raises(ValueError, match=r"is no trained reward model: 4 weights, '\S*pooler|classifier"):
            load_reward_model(tmp_path / "mlm")

    def test_files_that_lack_more_than_a_head_are_refused(self, bert_path, tmp_path):
        model = AutoModelForSequenceClassification.from_pretrained(bert_path)
        kept = {name: value for name, value in model.state_dict().items() if "layer.1.output" not in name}
        model.save_pretrained(tmp_path / "part", state_dict=kept)
        with pytest.raises(ValueError, match=r"lack 4 weights .* beside its head, '\S*layer.1.output"):
            load_sequence_classifier(str(tmp_path / "part"))

    def test_an_encoder_ends_texts_with_its_separator(self, bert_path):
        assert AutoTokenizer.from_pretrained(bert_path).eos_token is None
        assert load_tokenizer(str(bert_path)).eos_token == "[SEP]"
