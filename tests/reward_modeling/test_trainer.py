"""The trainer of reward models: TRL's own where nothing else is asked for, and brute force where it is."""

import itertools
import json
import random

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file
from torch.nn.functional import logsigmoid
from torch.testing import assert_close
from transformers import BitsAndBytesConfig, set_seed
from trl import RewardConfig, RewardTrainer

from rlhf_recipes.models import load_sequence_classifier, upcast_trainable
from rlhf_recipes.models.reward import score_tokens
from rlhf_recipes.reward_modeling import (
    PreferenceConfig,
    PreferenceTrainer,
    Readout,
    evaluate_pairs,
    score_sequences,
)

FOUR_BIT = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
NOUNS = "film story actor ending scene plot music".split()
GOOD, BAD = "good great warm funny bright".split(), "bad dull slow cold dark".split()
PAIRS = [
    {"prompt": f"the {noun} was", "chosen": f" very {GOOD[n % 5]}", "rejected": f" {BAD[n % 5]} and so dark"}
    for n, noun in enumerate([*NOUNS, "the film", "this actor", "a story", "that plot", "write"])
]
# Two to four completions of each prompt, of different lengths.
GROUPS = [
    {
        "prompt": pair["prompt"],
        "completions": [pair["chosen"], pair["rejected"], " not bad", " so so"][: 2 + n % 3],
        "ranks": [1, 2, 2, 3][: 2 + n % 3],
        "best": 0,
        "ratings": [1.0, -1.0, -1.0, -2.0][: 2 + n % 3],
    }
    for n, pair in enumerate(PAIRS)
]


def only(rows, *columns):
    return Dataset.from_list([{name: row[name] for name in ("prompt", "completions", *columns)} for row in rows])


@pytest.fixture
def make(tiny_model_path, tiny_tokenizer, tmp_path):
    """Make a trainer that has the same start each time."""

    def make(rows, cls=PreferenceTrainer, four_bit=False, lora=True, evaluate_on=None, **fields):
        defaults = {
            "output_dir": str(tmp_path / "run"),
            "use_cpu": True,
            "bf16": False,
            "gradient_checkpointing": False,
            "per_device_train_batch_size": 4,
            "max_steps": 3,
            "learning_rate": 1e-2,
            "logging_steps": 1,
            "report_to": "none",
            "save_strategy": "no",
            "disable_tqdm": True,
        }
        set_seed(0)
        model = load_sequence_classifier(tiny_model_path, quantization_config=FOUR_BIT if four_bit else None)
        rows = rows if isinstance(rows, Dataset) else Dataset.from_list(rows)
        trainer = cls(
            model=model,
            args=(PreferenceConfig if cls is PreferenceTrainer else RewardConfig)(**(defaults | fields)),
            train_dataset=rows,
            eval_dataset=rows if evaluate_on is None else Dataset.from_list(evaluate_on),
            processing_class=tiny_tokenizer,
            peft_config=LoraConfig(task_type="SEQ_CLS", r=4, target_modules="all-linear") if lora else None,
        )
        upcast_trainable(trainer.model)
        return trainer

    return make


def history(trainer):
    trainer.train()
    speed = ("train_runtime", "train_samples_per_second", "train_steps_per_second")
    return [{key: value for key, value in entry.items() if key not in speed} for entry in trainer.state.log_history]


def weights_after_a_step(trainer):
    """The step of plain gradient descent shows the gradient."""
    trainer.train()
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


ONE_STEP = {
    "max_steps": 1,
    "optim": "sgd",
    "learning_rate": 1.0,
    "max_grad_norm": 1e9,
    "lr_scheduler_type": "constant",
}


class TestPlainPairs:
    @pytest.mark.parametrize(
        ("fields", "four_bit"),
        [({"per_device_train_batch_size": 5}, False), ({"center_rewards_coefficient": 0.01}, True)],
    )
    def test_training_is_that_of_trl_to_the_last_bit(self, make, fields, four_bit):
        trainers = [make(PAIRS, cls, four_bit, **fields) for cls in (RewardTrainer, PreferenceTrainer)]
        theirs, ours = map(history, trainers)
        assert ours == theirs
        for expected, got in zip(*(trainer.model.parameters() for trainer in trainers), strict=True):
            assert torch.equal(got, expected)

    def test_margins_are_those_of_trl_too(self, make):
        rows = [{**pair, "margin": n / 3} for n, pair in enumerate(PAIRS)]
        assert history(make(rows)) == history(make(rows, RewardTrainer))

    @pytest.mark.parametrize("kind", ["label", "null", "table"])
    def test_the_same_said_in_other_rows_gives_the_same(self, make, kind):
        """Hard labels by the general path: C28."""
        rows = {
            "label": [{**pair, "label": 1.0} for pair in PAIRS],
            "null": [{**pair, "label": None} for pair in PAIRS[:-1]] + [{**PAIRS[-1], "label": 1.0}],
            "table": [
                {"prompt": pair["prompt"], "completions": [pair["rejected"], pair["chosen"]], "label": 0.0}
                for pair in PAIRS
            ],
        }[kind]
        fields = {"center_rewards_coefficient": 0.1}
        for theirs, ours in zip(
            history(make(PAIRS, RewardTrainer, **fields)), history(make(rows, **fields)), strict=True
        ):
            assert ours == pytest.approx(theirs, abs=1e-5)


class TestLosses:
    """One step of plain gradient descent against the loss of every pair by itself."""

    def expected(self, make, loss, **fields):
        trainer = make(PAIRS, RewardTrainer, **ONE_STEP, **fields)
        model = trainer.model
        groups = [
            torch.stack(
                [self.score(model, trainer.processing_class, group["prompt"], text) for text in group["completions"]]
            )
            for group in GROUPS[:4]
        ]
        total = sum(loss(scores, group) for scores, group in zip(groups, GROUPS, strict=False)) / 4
        total.backward()
        return total.item(), {name: (p - p.grad).detach() for name, p in model.named_parameters() if p.requires_grad}

    def score(self, model, tokenizer, prompt, text):
        ids = tokenizer(f"{prompt}{text} <eos>", return_tensors="pt")["input_ids"]
        return model(input_ids=ids).logits[0, 0]

    @pytest.mark.parametrize("ties", ["drop", "soft"])
    def test_all_pairs_of_a_prompt_have_the_weight_of_one_over_their_number(self, make, ties):
        """C33."""

        def loss(scores, group):
            losses = []
            for (left, high), (right, low) in itertools.combinations(zip(scores, group["ranks"], strict=True), 2):
                if high == low and ties == "soft":
                    losses.append(-(logsigmoid(left - right) + logsigmoid(right - left)) / 2)
                elif high != low:
                    losses.append(-logsigmoid((left - right) * (1 if high < low else -1)))
            return sum(losses) / len(losses)

        value, weights = self.expected(make, loss)
        trainer = make(only(GROUPS[:4], "ranks"), objective="ranking", ties=ties, **ONE_STEP)
        got = weights_after_a_step(trainer)
        assert trainer.state.log_history[0]["loss"] == pytest.approx(value, abs=1e-5)
        for name, weight in weights.items():
            assert_close(got[name], weight, rtol=0, atol=1e-5)

    @pytest.mark.parametrize("objective", ["best_of_k", "regression", "plackett_luce"])
    def test_other_objectives(self, make, objective):
        def loss(scores, group):
            if objective == "best_of_k":
                return scores.logsumexp(0) - scores[0]
            if objective == "regression":
                return (scores - torch.tensor(group["ratings"])).square().mean()
            ranks = group["ranks"]
            places = range(len(ranks))
            return sum(
                torch.stack([scores[j] for j in places if ranks[j] >= ranks[i]]).logsumexp(0) - scores[i]
                for i in places
            )

        value, weights = self.expected(make, loss)
        column = {"best_of_k": "best", "regression": "ratings", "plackett_luce": "ranks"}[objective]
        trainer = make(only(GROUPS[:4], column), objective=objective, **ONE_STEP)
        got = weights_after_a_step(trainer)
        assert trainer.state.log_history[0]["loss"] == pytest.approx(value, abs=1e-5)
        for name, weight in weights.items():
            assert_close(got[name], weight, rtol=0, atol=1e-5)

    @pytest.mark.parametrize(("use", "expected"), [("scale", 3.0), ("ignore", 1.0)])
    def test_margins_as_weights_or_not_at_all(self, make, use, expected):
        rows = [{**pair, "margin": 3.0} for pair in PAIRS[:4]]
        plain, changed = (make(PAIRS[:4], RewardTrainer, max_steps=1), make(rows, margin_use=use, max_steps=1))
        losses = [history(trainer)[0]["loss"] for trainer in (plain, changed)]
        assert losses[1] == pytest.approx(expected * losses[0], rel=1e-5)

    def test_noise_bounds_the_loss(self, make):
        """C30."""
        trainer = make(PAIRS, label_noise=0.1)
        chosen, rejected = (
            score_sequences(trainer.model, trainer.train_dataset[f"{side}_ids"]) for side in ("chosen", "rejected")
        )
        expected = -(0.9 * torch.sigmoid(chosen - rejected) + 0.05).log().mean().item()
        assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, abs=1e-5)

    def test_the_evaluation_weighs_each_prompt_alike(self, make):
        """Batches of 5, 5 and 2 prompts, of different numbers of completions."""
        trainer = make(only(GROUPS, "ranks"), objective="ranking", per_device_eval_batch_size=5)
        whole = make(only(GROUPS, "ranks"), objective="ranking", per_device_eval_batch_size=12)
        assert trainer.evaluate()["eval_loss"] == pytest.approx(whole.evaluate()["eval_loss"], abs=1e-5)


@pytest.mark.parametrize(("objective", "cut"), [("ranking", (2, 4)), ("ranking", (3, 3)), ("token", (3, 3))])
def test_micro_batches_change_nothing(make, objective, cut):
    """8 prompts in one step, in micro-batches of one size, or of 3, 3 and 2."""
    size, steps = cut
    column = "ranks" if objective == "ranking" else "ratings"
    rows = only(GROUPS[:8], column)
    whole = make(rows, objective=objective, per_device_train_batch_size=8, **ONE_STEP)
    parts = make(
        rows, objective=objective, per_device_train_batch_size=size, gradient_accumulation_steps=steps, **ONE_STEP
    )
    expected, got = weights_after_a_step(whole), weights_after_a_step(parts)
    for name, weight in expected.items():
        assert_close(got[name], weight, rtol=0, atol=1e-5)
    assert parts.state.log_history[0]["loss"] == pytest.approx(whole.state.log_history[0]["loss"], abs=1e-5)


class TestMetrics:
    def test_ties_and_lists(self, make):
        trainer = make(only(GROUPS[:4], "ranks"), objective="ranking", max_steps=1)
        texts = [f"{group['prompt']}{text} <eos>" for group in GROUPS[:4] for text in group["completions"]]
        scores = score_sequences(trainer.model, trainer.processing_class(texts)["input_ids"]).tolist()
        rest, leads = iter(scores), []
        for group in GROUPS[:4]:
            ranked = [(next(rest), rank) for rank in group["ranks"]]
            leads += [(a - b) * (1 if i < j else -1) for (a, i), (b, j) in itertools.combinations(ranked, 2) if i != j]
        entry = history(trainer)[0]
        expected = {
            "accuracy": sum(lead > 0 for lead in leads) / len(leads),
            "margin": sum(leads) / len(leads),
            "min_reward": min(scores),
            "mean_reward": sum(scores) / len(scores),
            "max_reward": max(scores),
        }
        assert {name: entry[name] for name in expected} == pytest.approx(expected, abs=1e-5)

    def test_a_batch_of_ties_has_no_accuracy(self, make):
        entry = history(make([{**pair, "label": 0.5} for pair in PAIRS], max_steps=1))[0]
        assert entry["loss"] >= 0.693
        assert not {"accuracy", "margin"} & entry.keys()


class TestTies:
    ROWS = [{**pair, "label": 0.5 if n % 3 == 0 else 1.0} for n, pair in enumerate(PAIRS)]

    def test_dropped_ones_are_not_trained_on_but_evaluated(self, make):
        trainer = make(self.ROWS, ties="drop")
        assert len(trainer.train_dataset) == 8
        result = evaluate_pairs(trainer)
        assert (result["n"], result["ties"]) == (12, 4)

    def test_nothing_but_ties_is_refused(self, make):
        with pytest.raises(ValueError, match="All 4 training rows are ties"):
            make([row for row in self.ROWS if row["label"] == 0.5], ties="drop")

    def test_they_bring_scores_together(self, make):
        rows = [{**pair, "label": 0.5} for pair in PAIRS]
        trainer = make(rows, max_steps=30)
        before = evaluate_loss(trainer)
        trainer.train()
        assert before > evaluate_loss(trainer) == pytest.approx(0.693147, abs=1e-3)


def evaluate_loss(trainer):
    return trainer.evaluate()["eval_loss"]


@pytest.mark.parametrize(("readout", "four_bit"), [("last", False), ("sum", False), ("mean", True)])
class TestReadouts:
    def test_scores_are_read_at_the_tokens_of_the_completion_whatever_the_batch(self, make, readout, four_bit):
        """C29 and C37."""
        trainer = make(only(GROUPS, "ranks"), objective="ranking", readout=readout, four_bit=four_bit, max_steps=1)
        trainer.train()
        model = trainer.model.eval()
        for row in trainer.eval_dataset.select(range(3)):
            start = len(trainer.processing_class(row["prompt"])["input_ids"])
            for ids in row["completion_ids"]:
                with torch.no_grad():
                    hidden = model.get_base_model().model(input_ids=torch.tensor([ids])).last_hidden_state[0]
                    tokens = (hidden @ model.get_base_model().score.weight[0])[start:]
                expected = {"last": tokens[-1], "sum": tokens.sum(), "mean": tokens.mean()}[readout]
                starts = None if readout == "last" else [start, start]
                longer = [*ids, *ids[-1:] * 3]
                got = score_sequences(model, [ids, longer], 2, readout, starts)
                assert_close(got[0], expected, rtol=0, atol=1e-4)

    def test_the_readout_is_saved_with_the_adapter(self, make, readout, four_bit, tmp_path):
        trainer = make(only(GROUPS, "ranks"), objective="ranking", readout=readout, four_bit=four_bit, max_steps=1)
        before = trainer.model.get_base_model().score.weight.detach().clone()
        trainer.train()
        trainer.save_model()
        saved = load_file(tmp_path / "run" / "adapter_model.safetensors")
        head = saved["base_model.model.score.weight"]
        assert torch.equal(head, trainer.model.get_base_model().score.weight)
        assert not torch.equal(head, before)
        assert Readout.load(tmp_path / "run") == Readout(readout)
        assert (tmp_path / "run" / "reward_model.json").exists() == (readout != "last")


def test_the_score_depends_on_the_completion(make):
    """C37: two completions of one prompt differ wherever the score is read."""
    trainer = make(only(GROUPS, "ranks"), objective="ranking", readout="mean")
    for row in trainer.train_dataset:
        scores = score_sequences(trainer.model, row["completion_ids"], 4, "mean", row["prompt_lengths"])
        assert len(set(scores.tolist())) == len(scores)


class TestTokens:
    @pytest.mark.parametrize("kind", ["mse", "bce"])
    def test_prompts_carry_no_loss(self, make, kind):
        """C36: the rating of a completion is the target of each of its tokens, and of none of the prompt's."""
        rows = [{**group, "ratings": [rating % 2 for rating in group["ratings"]]} for group in GROUPS]
        trainer = make(only(rows, "ratings"), objective="token", token_loss=kind)
        model, means = trainer.model.eval(), []
        for row, group in zip(trainer.eval_dataset, rows, strict=True):
            losses = []
            for ids, start, target in zip(row["completion_ids"], row["prompt_lengths"], group["ratings"], strict=True):
                call = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
                with torch.no_grad():
                    scores = score_tokens(model, model, call)[1][0, start:]
                p = scores.sigmoid()
                bce = -(target * p.log() + (1 - target) * (1 - p).log())
                losses.append(((scores - target).square() if kind == "mse" else bce).mean().item())
            means.append(sum(losses) / len(losses))
        assert trainer.evaluate()["eval_loss"] == pytest.approx(sum(means) / len(means), abs=1e-5)

    def test_steps_label_their_tokens_and_the_end_token(self, make):
        row = {"prompt": "the film was", "completions": [" very good but so slow"]}
        row |= {"steps": [[" very good", " but so slow"]], "step_labels": [[1.0, 0.0]]}
        open_step = {**row, "step_labels": [[None, 0.5]]}
        trainer = make([row, open_step] * 2, objective="token")
        (labels,), (others,) = trainer.train_dataset["token_labels"][:2]
        assert labels[3:] == [1.0, 1.0, 0.0, 0.0, 0.0, 0.0]
        assert torch.tensor(others[3:]).nan_to_num(-1.0).tolist() == [-1.0, -1.0, 0.5, 0.5, 0.5, 0.5]
        assert trainer.train_dataset["prompt_lengths"][:2] == [[3], [3]]
        assert evaluate_pairs(trainer) == {"loss": pytest.approx(evaluate_loss(trainer)), "n": 4}

    def test_steps_of_a_chat_are_found_in_its_last_turn(self, make, tiny_tokenizer):
        row = {
            "prompt": [{"role": "user", "content": "write"}],
            "completions": [[{"role": "assistant", "content": "good bad"}]],
            "steps": [["good", " bad"]],
            "step_labels": [[1.0, 0.0]],
        }
        trainer = make([row] * 2, objective="token")
        [[labels]], [[ids]] = ([trainer.train_dataset[name][0]] for name in ("token_labels", "completion_ids"))
        good, bad = (ids.index(tiny_tokenizer.convert_tokens_to_ids(word)) for word in ("good", "bad"))
        assert (labels[good], labels[bad], labels[-1]) == (1.0, 0.0, 0.0)

    def test_given_labels_are_taken_as_they_are(self, make):
        rows = [
            {
                "prompt": "the film",
                "completions": [" was good"],
                "completion_ids": [[6, 9, 14, 20]],
                "token_labels": [[None, None, 0.25, 0.75]],
            }
        ]
        (labels,) = make(rows * 2, objective="token").train_dataset["token_labels"][0]
        assert labels[2:] == [0.25, 0.75]


class TestTokenIds:
    def test_groups_get_the_format_of_pairs(self, make):
        """C40: end token and all."""
        pairs, groups = make(PAIRS), make(only(GROUPS, "ranks"), objective="ranking")
        for pair, group in zip(pairs.train_dataset, groups.train_dataset, strict=True):
            assert group["completion_ids"][:2] == [pair["chosen_ids"], pair["rejected_ids"]]

    def test_given_ids_are_kept_and_others_made(self, make):
        rows = [{**group, "completion_ids": None} for group in GROUPS]
        rows[1]["completion_ids"] = [[6, 7, n + 1] for n in range(len(rows[1]["completions"]))]
        trainer = make(rows, objective="ranking")
        plain = make(only(GROUPS, "ranks"), objective="ranking")
        assert trainer.train_dataset["completion_ids"][1] == rows[1]["completion_ids"]
        assert trainer.train_dataset["completion_ids"][2:] == plain.train_dataset["completion_ids"][2:]

    def test_a_group_with_a_text_that_is_too_long_is_left_out_whole(self, make):
        rows = [{**group, "completions": [*group["completions"][:-1], " very" * 9]} for group in GROUPS[:3]]
        trainer = make(only(rows + GROUPS[3:], "ranks"), objective="ranking", max_length=9)
        assert trainer.train_dataset["prompt"][:] == [group["prompt"] for group in GROUPS[3:]]


class TestBadRows:
    @pytest.mark.parametrize(
        ("rows", "fields", "message"),
        [
            (PAIRS, {"objective": "ranking"}, "`objective` is 'ranking', but the train rows have `chosen`"),
            (only(GROUPS, "ranks"), {}, "Train row 0 has no `label`.*it has `ranks`.*`to_pairs`"),
            (only(GROUPS, "best"), {"objective": "regression"}, "Train row 0 has no `ratings`.*it has `best`"),
            ([{**pair, "label": 1.5} for pair in PAIRS], {}, "Train row 0 has the `label` 1.5"),
            ([{**pair, "label": "yes"} for pair in PAIRS], {}, "Train row 0 has the `label` 'yes'.*rename the column"),
            (
                [{**pair, "margin": -1.0} for pair in PAIRS],
                {"margin_use": "scale"},
                "Train row 0 has the `margin` -1.0",
            ),
            (
                [{**PAIRS[0], "label": 1.0, "margin": 1.0}, {**PAIRS[1], "label": None, "margin": float("nan")}],
                {},
                "Train row 1 has the `margin` nan",
            ),
            ([{**pair, "margin": "1.5"} for pair in PAIRS], {}, "Train row 0 has the `margin` '1.5'"),
            (
                [{**pair, "margin": None if n else 1.0} for n, pair in enumerate(PAIRS)],
                {},
                "Train row 1 has the `margin`",
            ),
            ([{"chosen": "good", "rejected": "bad"}], {"readout": "sum"}, "Row 0 has no `prompt`"),
            (
                [
                    {
                        "prompt": "the film",
                        "completions": [" a", " b"],
                        "completion_ids": [[9, 8], [6, 9]],
                        "label": 1.0,
                    }
                ],
                {"readout": "mean"},
                "Row 0: the token ids of a completion do not begin with the tokens of its prompt",
            ),
            (
                only(GROUPS, "ratings"),
                {"objective": "token", "token_loss": "bce"},
                "Row 0 has a target .* in \\[0, 1\\]",
            ),
        ],
    )
    def test_the_row_is_named(self, make, rows, fields, message):
        with pytest.raises(ValueError, match=message):
            make(rows, **fields)

    def test_another_configuration_is_refused(self):
        with pytest.raises(TypeError, match="`args` must be a PreferenceConfig, got RewardConfig"):
            PreferenceTrainer(model=None, args=RewardConfig(use_cpu=True, bf16=False))

    def test_models_without_a_head_for_every_token_are_refused(self, make):
        class Pooled(torch.nn.Module):
            def forward(self, **call):
                return None

        with pytest.raises(ValueError, match="Pooled has no head `score` that reads every token.*'last'"):
            score_tokens(Pooled(), Pooled(), {})

    def test_streams_are_refused_where_they_cannot_be_checked(self, make):
        trainer = make(only(GROUPS, "ranks"), objective="ranking")
        with pytest.raises(TypeError, match="Load them whole"):
            trainer.evaluate(only(GROUPS, "ranks").to_iterable_dataset())


def _toy(count, shuffled, seed=0):
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        prompt = f"the {rng.choice(NOUNS)} {rng.choice(NOUNS)} was {rng.choice(['very', 'so', 'not', 'but'])}"
        sides = [f" {rng.choice(GOOD)} and {rng.choice(NOUNS)}", f" {rng.choice(BAD)} and {rng.choice(NOUNS)}"]
        label = float(rng.random() < 0.5) if shuffled else 1.0
        rows.append({"prompt": prompt, "completions": sides, "label": label})
    return rows


@pytest.mark.parametrize("shuffled", [False, True])
def test_what_can_be_learned_is_learned_within_an_epoch(make, shuffled):
    """C39: separable preferences at 0.95 or better on other prompts, and coin flips at 0.5."""
    fields = {"max_steps": -1, "num_train_epochs": 1, "per_device_train_batch_size": 8}
    trainer = make(_toy(400, shuffled), evaluate_on=_toy(200, shuffled, seed=1), **fields)
    trainer.train()
    result = evaluate_pairs(trainer)
    if shuffled:
        assert result["accuracy_ci"][0] < 0.5 < result["accuracy_ci"][1]
        assert result["log_loss"] > 0.68
    else:
        assert result["accuracy"] >= 0.95
        assert result["log_loss"] < 0.2


def test_checkpoints_have_the_readout(make, tmp_path):
    trainer = make(
        only(GROUPS, "ranks"), objective="ranking", readout="sum", max_steps=2, save_strategy="steps", save_steps=1
    )
    trainer.train()
    assert json.loads((tmp_path / "run" / "checkpoint-1" / "reward_model.json").read_text())["readout"] == "sum"
