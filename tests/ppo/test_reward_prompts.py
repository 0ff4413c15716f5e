"""The column `reward_prompt`: every reward reads it in place of the prompt, and nothing else does."""

import asyncio
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from torch.testing import assert_close
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from rlhf_recipes import GRPOAdapterConfig, GRPOAdapterTrainer
from rlhf_recipes.data.reward_prompts import REWARD_PROMPT
from rlhf_recipes.evaluation.sampling import sample_rows
from rlhf_recipes.models.readout import Readout
from rlhf_recipes.ppo._trl import rewards as call_rewards
from rlhf_recipes.reward_modeling import PreferenceConfig, PreferenceTrainer
from rlhf_recipes.rewards import ClassifierReward, EnsembleReward, RemoteReward, TokenClassifierReward
from rlhf_recipes.rewards.encoding import encode_rows
from tests.ppo.support import rollout, rollout_and_record, texts_of_ids, unpadded, without_chance

FACTS = "actor was funny but cold"


@pytest.fixture
def facts(prompts):
    """The prompts, with facts that only rewards see, of one to five words."""
    words = FACTS.split()
    column = [f"{' '.join(words[: 1 + len(prompt) % 5])} {prompt}" for prompt in prompts["prompt"]]
    return prompts.add_column(REWARD_PROMPT, column)


@pytest.fixture
def needy(reward_adapter, tmp_path):
    """A copy of the reward adapter that was trained on reward prompts."""
    folder = shutil.copytree(reward_adapter, tmp_path / "needy")
    Readout("last", 0.5, 1.0, reward_prompt=True).save(folder)
    return folder


def scored_sequences(trainer, batch, rows=8):
    """Reward prompt and completion of each row of a rollout, as token ids."""
    tokenizer = trainer.processing_class
    pairs = [unpadded(batch, row) for row in range(rows)]
    own = {tuple(tokenizer(row["prompt"])["input_ids"]): row[REWARD_PROMPT] for row in trainer.train_dataset}
    return [(tokenizer(own[tuple(prompt)])["input_ids"], completion) for prompt, completion in pairs]


@pytest.mark.parametrize("placement", ["terminal", "redistributed", "attention"])
def test_an_adapter_reads_the_facts_and_nobody_else_does(make_trainer, needy, facts, prompts, placement):
    seen = []

    def sees(prompts, reward_prompt, **kwargs):
        seen.extend(zip(prompts, reward_prompt, strict=True))
        return [0.0] * len(prompts)

    options = {"reward_funcs": [str(needy), sees], "reward_placement": placement, "kl_coef": 0.0}
    trainer = without_chance(make_trainer(dataset=facts, eval_dataset=facts, **options))
    batch, record = rollout_and_record(trainer)
    sequences = scored_sequences(trainer, batch)
    numbers = trainer.roles.prefix_scores("reward_0", [a + b for a, b in sequences], 0, 8)
    tails = [row[-len(completion) :] for row, (_, completion) in zip(numbers, sequences, strict=True)]
    assert_close(record.scores, torch.stack([0.5 * tail[-1] + 1.0 for tail in tails]), atol=1e-5, rtol=1e-5)
    if placement == "redistributed":
        for given, tail in zip(record.token_rewards["needy"], tails, strict=True):
            changes = 0.5 * tail.diff(prepend=torch.zeros(1))
            changes[0] += 1.0
            assert_close(given, changes, atol=1e-5, rtol=1e-5)
    if placement == "attention":
        weights = trainer.roles.last_token_attention("reward_0", [a + b for a, b in sequences], 0, 8)
        for given, row, (_, completion) in zip(record.attention, weights, sequences, strict=True):
            assert_close(given, row[-len(completion) :])
    assert all(graded.endswith(f" {prompt}") for prompt, graded in seen)

    # Policy, reference and critic: the same numbers as without the column, to the last bit
    folder = shutil.copytree(needy, needy.with_name("plain"))
    Readout("last", 0.5, 1.0).save(folder)
    plain = without_chance(make_trainer(reward_funcs=[str(folder)], kl_coef=0.0))
    assert plain.train_dataset["prompt"] == trainer.train_dataset["prompt"]
    other = rollout(plain)
    for name in ("prompt_ids", "completion_ids", "old_per_token_logps", "ref_per_token_logps", "old_values"):
        assert torch.equal(batch[name], other[name]), name


def test_the_critic_starts_from_the_score_without_the_facts(make_trainer, needy, facts):
    trainer = make_trainer(reward_funcs=str(needy), dataset=facts, eval_dataset=facts)
    ids = torch.tensor([[6, 7, 8, 9, 10, 11]])
    score = 0.5 * trainer.roles.scores("reward_0", [ids[0, :-1].tolist()], 0, 1) + 1.0
    assert_close(trainer.critic.forward(texts_of_ids(ids, 2))[0, -1:], score, atol=1e-5, rtol=1e-5)


def test_evaluations_score_with_the_facts(make_trainer, needy, facts):
    trainer = make_trainer(reward_funcs=str(needy), dataset=facts, eval_dataset=facts)
    trainer.model.eval()
    rows = sample_rows(trainer, facts, [0, 1, 2, 3], of_reference=False, gold=None, seed=0)
    for row, sampled in zip(facts, rows, strict=False):
        ids = trainer.processing_class(row[REWARD_PROMPT])["input_ids"] + sampled["completion_ids"]
        expected = 0.5 * trainer.roles.scores("reward_0", [ids], 0, 1).item() + 1.0
        assert sampled["reward_score"] == pytest.approx(expected, abs=1e-5)
    with pytest.raises(Exception, match="was trained on rows with `reward_prompt`, but these rows have no such"):
        sample_rows(trainer, facts.remove_columns(REWARD_PROMPT), [0], of_reference=False, gold=None, seed=0)


def test_an_ensemble_asks_for_what_a_member_needs(make_trainer, needy, reward_adapter, facts):
    members = [str(needy), str(reward_adapter)]
    with pytest.raises(ValueError, match="needs a column 'reward_prompt', because the reward model 'ensemble'"):
        make_trainer(reward_funcs=EnsembleReward(members))
    trainer = without_chance(make_trainer(reward_funcs=EnsembleReward(members), dataset=facts, eval_dataset=facts))
    batch, record = rollout_and_record(trainer)
    sequences = [a + b for a, b in scored_sequences(trainer, batch)]
    first, second = (trainer.roles.scores(f"reward_0_{member}", sequences, 0, 8) for member in (0, 1))
    assert_close(record.scores, (0.5 * first + 1.0 + second) / 2, atol=1e-5, rtol=1e-5)


def test_grpo_on_shared_roles_reads_the_facts_too(tmp_path, sft_adapter, needy, facts, prompts):
    options = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": "none"}
    options |= {
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 8,
        "save_strategy": "no",
    }

    def make(rows):
        args = GRPOAdapterConfig(str(tmp_path / "grpo"), **options)
        return GRPOAdapterTrainer(str(sft_adapter), str(needy), args=args, train_dataset=rows)

    with pytest.raises(ValueError, match="needs a column 'reward_prompt', because the reward model 'needy'"):
        make(prompts)
    trainer = make(facts)
    [score] = call_rewards(trainer, [facts[0]], ["good"], [[7, 1]])[0].tolist()
    ids = trainer.processing_class(facts[0][REWARD_PROMPT])["input_ids"] + [7, 1]
    assert score == pytest.approx(0.5 * trainer.roles.scores("reward_0", [ids], 0, 1).item() + 1.0, abs=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (None, "needs a column 'reward_prompt', because the reward model 'needy' was trained on rows that have it"),
        ("", "1 of 16 rows cannot be used; row 3: `reward_prompt` is empty. Fill it in each row"),
        ("missing", "1 of 16 rows cannot be used; row 3: `reward_prompt` is missing. Fill it in each row"),
        ("chat", "16 of 16 rows cannot be used; row 0: `reward_prompt` is a chat, but `prompt` is text. Give both"),
        ("number", "16 of 16 rows cannot be used; row 0: `reward_prompt` is neither text nor a chat"),
        ("film " * 130, "row 3: `reward_prompt` has 130 tokens, and the context leaves 120 for a prompt. Shorten"),
    ],
    ids=["no column", "empty", "missing", "chat", "number", "long"],
)
def test_rows_that_cannot_be_scored_stop_before_training(make_trainer, needy, facts, change, message):
    column = list(facts[REWARD_PROMPT])
    rows = facts.remove_columns(REWARD_PROMPT)
    if change == "chat":
        column = [[{"role": "user", "content": text}] for text in column]
    elif change == "number":
        column = list(range(len(column)))
    else:
        column[3] = None if change == "missing" else change
    bad = rows if change is None else rows.add_column(REWARD_PROMPT, column)
    with pytest.raises(ValueError, match=re.escape(message)):
        make_trainer(reward_funcs=str(needy), dataset=bad, eval_dataset=facts)


def test_rows_of_evaluations_and_streams_are_checked_too(make_trainer, reward_adapter, needy, facts, prompts):
    with pytest.raises(ValueError, match=r"because the rows of `train_dataset` have it.*\(`eval_dataset`\)"):
        make_trainer(reward_funcs=str(reward_adapter), dataset=facts, eval_dataset=prompts)
    with pytest.raises(ValueError, match=r"'needy' was trained on rows that have it.*\(`train_dataset`\)"):
        make_trainer(reward_funcs=str(needy), dataset=prompts.to_iterable_dataset(), eval_dataset=facts)
    empty = facts.map(lambda row: {REWARD_PROMPT: " "}).to_iterable_dataset()
    with pytest.raises(ValueError, match="`train_dataset`: row 0: `reward_prompt` is empty"):
        make_trainer(reward_funcs=str(needy), dataset=empty, eval_dataset=facts)


def test_models_with_a_tokenizer_of_their_own_read_the_facts(bert_path, gpt2_path, tiny_tokenizer):
    rows = {"prompts": ["the film"], "completions": ["was good"], "reward_prompt": ["funny the film"]}
    for path in (bert_path, gpt2_path):
        model = AutoModelForSequenceClassification.from_pretrained(path, num_labels=1)
        torch.nn.init.normal_((model.classifier if path is bert_path else model.score).weight)
        tokenizer = AutoTokenizer.from_pretrained(path)
        reward = ClassifierReward(model, tokenizer, readout=Readout(reward_prompt=True))
        assert reward(**rows) == reward.scores(["funny the film"], ["was good"], [True])
        assert reward(**rows) != reward.scores(["the film"], ["was good"], [True])
        with pytest.raises(ValueError, match="these rows have no such column"):
            reward(prompts=["the film"], completions=["was good"])

    lengths = SimpleNamespace(num_labels=1)

    class Places(torch.nn.Module):
        config, device = lengths, torch.device("cpu")

        def forward(self, input_ids, attention_mask):
            return SimpleNamespace(logits=attention_mask.cumsum(dim=1)[..., None].float())

    reward = TokenClassifierReward(Places(), tiny_tokenizer, tiny_tokenizer)
    ids = [tiny_tokenizer("was good")["input_ids"]]
    spaced = {"prompts": ["the film "], "completion_ids": ids}
    assert reward(**spaced) == [[3.0, 4.0]]
    assert reward(**spaced, reward_prompt=["funny the film "]) == [[4.0, 5.0]]


def test_a_server_gets_the_facts_as_the_prompt(monkeypatch):
    reward, sent = RemoteReward("http://127.0.0.1:9/score"), []

    async def post(client, payload):
        sent.append(payload)
        return {"scores": [0.5]}

    monkeypatch.setattr(reward, "_post", post)
    rows = {"prompts": ["p"], "completions": ["c"], "reward_prompt": ["facts p"]}
    assert asyncio.run(reward(**rows)) == [0.5]
    assert sent == [{"prompts": ["facts p"], "completions": ["c"], "finished": [True]}]


class TestRewardStage:
    """The reward model is trained on what PPO will let it read."""

    ROWS = [
        {"prompt": f"the {noun}", REWARD_PROMPT: f"funny the {noun}", "chosen": " was good", "rejected": " was dull"}
        for noun in ("film", "story", "actor", "plot")
    ]

    @pytest.fixture
    def train(self, tiny_model_path, tiny_tokenizer, tmp_path):
        def make(rows, test=None):
            model = AutoModelForSequenceClassification.from_pretrained(tiny_model_path, num_labels=1)
            model.config.pad_token_id = 0
            args = PreferenceConfig(str(tmp_path / "reward"), use_cpu=True, bf16=False, report_to="none")
            rows, test = (None if part is None else Dataset.from_list(part) for part in (rows, test))
            return PreferenceTrainer(
                model=model, args=args, train_dataset=rows, eval_dataset=test, processing_class=tiny_tokenizer
            )

        return make

    def test_its_texts_hold_the_facts_and_its_folder_says_so(self, train, tiny_tokenizer, tmp_path):
        trainer = train(self.ROWS, self.ROWS)
        for dataset in (trainer.train_dataset, trainer.eval_dataset):
            texts = [tiny_tokenizer.decode(ids) for ids in dataset["chosen_ids"]]
            assert texts == [f"{row[REWARD_PROMPT]} was good <eos>" for row in self.ROWS]
        trainer.save_model()
        assert Readout.load(tmp_path / "reward") == Readout(reward_prompt=True)

    def test_without_the_column_nothing_is_said(self, train, tmp_path):
        train([{k: v for k, v in row.items() if k != REWARD_PROMPT} for row in self.ROWS]).save_model()
        assert not (tmp_path / "reward" / "reward_model.json").exists()

    def test_chats_keep_their_form(self, train, tiny_tokenizer):
        rows = [
            {
                name: [{"role": "user" if "prompt" in name else "assistant", "content": text.strip()}]
                for name, text in row.items()
            }
            for row in self.ROWS
        ]
        [ids, *_] = train(rows).train_dataset["chosen_ids"]
        assert tiny_tokenizer.decode(ids) == "<user> funny the film <eos> <assistant> was good <eos>"

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({REWARD_PROMPT: None}, "Row 0: `reward_prompt` is missing"),
            (
                {"chosen_ids": [6, 7, 8], "rejected_ids": [6, 7, 9]},
                "Row 0 of the train rows has a `reward_prompt` and",
            ),
        ],
    )
    def test_rows_that_do_not_hold_the_facts_are_refused(self, train, change, message):
        with pytest.raises(ValueError, match=message):
            train([self.ROWS[0] | change, self.ROWS[1]])

    def test_both_splits_have_the_facts_or_neither(self, train):
        test = [{k: v for k, v in row.items() if k != REWARD_PROMPT} for row in self.ROWS]
        with pytest.raises(ValueError, match="The train rows have the column `reward_prompt`, and the eval rows"):
            train(self.ROWS, test)

    def test_encoders_are_trained_on_the_facts(self, bert_path):
        tokenizer = AutoTokenizer.from_pretrained(bert_path)
        rows = encode_rows({"train": Dataset.from_list(self.ROWS)}, tokenizer, 24, None)
        assert rows["train"]["chosen_ids"][0] == tokenizer("funny the film", "was good")["input_ids"]


def test_the_certificate_reads_the_facts():
    from rlhf_recipes.tools.certificate.pairs import pair_rows

    [row, *_] = pair_rows(Dataset.from_list(TestRewardStage.ROWS))
    assert row["prompt"] == "funny the film"
    assert REWARD_PROMPT not in row
