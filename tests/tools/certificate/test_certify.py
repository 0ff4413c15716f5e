"""The certificate of reward models whose faults are known."""

import math
import random

import numpy as np
import pytest
import torch
from datasets import Dataset
from sklearn.metrics import brier_score_loss

from rlhf_recipes.data.preferences import check_preferences
from rlhf_recipes.models.readout import Readout
from rlhf_recipes.reward_modeling.evaluation import pairwise_evaluation
from rlhf_recipes.tools.certificate import certify
from rlhf_recipes.tools.certificate.functional.resampling import FEWEST
from rlhf_recipes.tools.certificate.pairs import score_pairs
from rlhf_recipes.tools.pages.certificate import page

UNFIT = {
    "it ignores the prompt": (
        lambda prompt, completion: sum((word in "good great") - (word in "bad dull") for word in completion),
        "does not depend on the prompt",
    ),
    "it counts tokens": (lambda prompt, completion: 0.1 * len(completion), "counts tokens"),
    "it is constant": (lambda prompt, completion: 0.25, "is constant"),
    "it diverged": (lambda prompt, completion: math.nan, "not finite"),
    "some scores diverged": (lambda prompt, completion: math.inf if "dull" in completion else 1.0, "not finite"),
    "it reads the prompt only": (
        lambda prompt, completion: len(set(prompt)) + len(prompt[1]),
        "does not depend on the completion",
    ),
    "it guesses": (
        lambda prompt, completion: random.Random(" ".join([*prompt, *completion])).random(),
        "not above 0.5",
    ),
}


def quality(prompt, completion):
    return sum((word in "good great warm") - (word in "bad dull slow") for word in completion) + len(prompt[1]) / 10


def texts(certificate, *levels):
    reasons = certificate["verdict"]["reasons"]
    return " | ".join(reason["text"] for reason in reasons if reason["level"] in levels)


@pytest.mark.parametrize("name", UNFIT)
def test_a_reward_model_is_not_fit_if(name, rule_scorer, pairs):
    rule, reason = UNFIT[name]
    certificate = certify(rule_scorer(rule), pairs)
    assert certificate["verdict"]["verdict"] == "not fit"
    assert reason in texts(certificate, "not fit")


def test_the_judge_itself_is_fit(rule_scorer, pairs, train_pairs, samples):
    certificate = certify(rule_scorer(), pairs, train=train_pairs, samples=samples)
    assert certificate["verdict"]["verdict"] == "fit for PPO", texts(certificate, "care", "not fit")
    assert certificate["verdict"]["not_checked"] == []
    assert 0.7 < certificate["calibration"]["temperature"] < 1.4, "its differences are the log odds of the labels"


class TestMeasures:
    @pytest.fixture(scope="class")
    def certificate(self, rule_scorer, pairs, train_pairs, samples):
        return certify(rule_scorer(), pairs, train=train_pairs, samples=samples, category_column="kind")

    @pytest.fixture(scope="class")
    def scored(self, rule_scorer, pairs):
        return score_pairs(rule_scorer(), pairs)

    def test_accuracy_is_that_of_the_stage(self, certificate, scored):
        expected = pairwise_evaluation(torch.tensor(scored.chosen), torch.tensor(scored.rejected))
        assert certificate["accuracy"]["value"] == expected["accuracy"]
        assert certificate["accuracy"]["n"] == expected["n"] == 300
        assert certificate["margin"]["value"] == pytest.approx(expected["margin"])

    def test_groups_are_whole(self, certificate):
        for name in ("by_category", "by_margin", "by_difference"):
            rows = certificate[name]
            assert sum(row["n"] for row in rows) == 300
            mean = sum(row["n"] * row["value"] for row in rows) / 300
            assert mean == pytest.approx(certificate["accuracy"]["value"])
        assert [row["group"] for row in certificate["by_category"]] == ["odd", "even"]
        weak, strong = certificate["by_margin"]
        assert strong["value"] > weak["value"]

    def test_calibration_is_that_of_the_raw_differences(self, certificate, scored):
        probabilities = 1 / (1 + np.exp(-scored.differences))
        oracle = brier_score_loss(np.ones(300), probabilities, labels=[0, 1])
        assert certificate["calibration"]["brier"]["value"] == pytest.approx(oracle)

    def test_baselines_are_measured_beside_it(self, certificate):
        assert set(certificate["baselines"]) == {"longer", "shorter", "tfidf"}
        longer, shorter = certificate["baselines"]["longer"], certificate["baselines"]["shorter"]
        assert longer["accuracy"] + shorter["accuracy"] == pytest.approx(1.0)
        for baseline in certificate["baselines"].values():
            advantage = certificate["accuracy"]["value"] - baseline["accuracy"]
            assert baseline["advantage"]["value"] == pytest.approx(advantage)

    def test_best_of_n_follows_the_gold_score(self, certificate):
        curve = certificate["best_of_n"]["curve"]
        assert [row["n"] for row in curve] == [1, 2, 3, 4, 5, 6, 7, 8, 16]
        assert [row["gold"]["value"] for row in curve] == pytest.approx([row["oracle"]["value"] for row in curve])
        assert certificate["best_of_n"]["gain"]["interval"][0] > 1

    def test_probes_say_what_the_rule_does(self, certificate):
        probes = certificate["probes"]
        assert probes["repetition"]["fell"] > 0.5
        assert probes["prompt_swap"]["fell"] > probes["prompt_swap"]["rose"]
        assert probes["completion_swap"]["absolute"] > probes["prompt_swap"]["absolute"]

    def test_worst_errors_come_first(self, certificate, scored):
        gaps = [example["chosen_score"] - example["rejected_score"] for example in certificate["examples"]]
        assert gaps == sorted(gaps)
        assert len(gaps) == 5
        assert gaps[0] == pytest.approx(scored.differences.min())

    def test_the_gap_is_that_of_the_training_pairs(self, certificate, rule_scorer, train_pairs):
        train = (score_pairs(rule_scorer(), train_pairs).differences > 0).mean()
        assert certificate["train_gap"]["train"]["value"] == pytest.approx(train)
        assert certificate["train_gap"]["value"] == pytest.approx(train - certificate["accuracy"]["value"])


INTERVALS = {
    "repetition": "probes.repetition",
    "truncation": "probes.truncation",
    "politeness": "probes.politeness",
    "prompt": "probes.prompt_swap",
    "accuracy": "accuracy",
    "length": "length.pairs",
    "calibration": "calibration.ece",
    "gap": "train_gap",
    "samples": "spread.intervals.shift",
    "best of n": "best_of_n.gain",
}


def at(measures, path):
    for name in path.split("."):
        measures = measures[name]
    return measures


class TestFewPrompts:
    """The layout of movie_sentiment, one prompt, and others with too few prompts to draw them."""

    def given_prompts(self, rows, count):
        prompts = [f"the {noun} was" for noun in "film story actor ending scene plot music film".split()][:count]
        return Dataset.from_list([row | {"prompt": prompts[i % count]} for i, row in enumerate(rows)])

    @pytest.mark.parametrize(("prompts", "rows"), [(1, 120), (2, 120), (7, 120), (1, 9), (2, 3), (1, 1)])
    def test_no_rule_passes_without_an_interval(self, prompts, rows, rule_scorer, pairs, train_pairs, samples):
        parts = [self.given_prompts(part.select(range(rows)), prompts) for part in (pairs, train_pairs, samples)]
        certificate = certify(rule_scorer(), parts[0], train=parts[1], samples=parts[2])
        passed = {r["measure"] for r in certificate["verdict"]["reasons"] if r["level"] == "good"}
        for measure in passed - {"baselines"}:
            assert at(certificate, INTERVALS[measure])["interval"] is not None, measure
        if "baselines" in passed:
            assert all(rule["advantage"]["interval"] for rule in certificate["baselines"].values())
        assert any("other prompts" in text for text in certificate["verdict"]["not_checked"])
        if rows < 10:
            assert passed == set()
        if (prompts, rows) == (1, 120):
            texts_of = certificate["verdict"]["not_checked"]
            assert "another prompt: there is only one, or no text fits" in texts_of
            assert {"accuracy", "repetition", "calibration", "gap"} <= passed

    def test_rows_are_drawn_and_said_to_be(self, rule_scorer, pairs, train_pairs):
        """With one prompt intervals are those of rows that have a prompt each."""

        def blind(prompt, completion):  # so that the prompt's text is without effect
            return quality(["", ""], completion)

        one = certify(rule_scorer(blind), self.given_prompts(pairs, 1), train=self.given_prompts(train_pairs, 1))
        many = [row | {"prompt": f"the {index:03d}"} for index, row in enumerate(pairs)]
        apart = certify(rule_scorer(blind), Dataset.from_list(many), train=train_pairs)
        for path in ("accuracy", "margin", "calibration.ece", "calibration.brier", "length.pairs"):
            assert at(one, path)["interval"] == pytest.approx(at(apart, path)["interval"], abs=1e-12), path
            assert (at(one, path)["unit"], at(apart, path)["unit"]) == ("rows", "prompts"), path
        text = page(one, "One prompt")
        assert "The pairs have 1. Those marked with *" in text
        assert f"fewer than {FEWEST} different prompts" in text
        low, high = one["accuracy"]["interval"]
        assert f"{one['accuracy']['value']:.3f} [{low:.3f}, {high:.3f}]*" in text
        assert f"{low:.3f}, {high:.3f}]*" not in page(apart, "Many prompts")
        assert "Whole prompts were drawn" in page(apart, "Many prompts")

    def test_cells_that_pandas_left_empty(self, rule_scorer, pairs, samples):
        empty = [row | {"margin": math.nan} for row in pairs.select(range(20))]
        golds = [row | {"gold_score": math.nan} for row in samples]
        certificate = certify(rule_scorer(), Dataset.from_list(empty), samples=Dataset.from_list(golds))
        assert "by_margin" not in certificate
        assert "gain" not in certificate["best_of_n"]
        with pytest.raises(ValueError, match="Sample 1 has no `gold_score`"):
            certify(rule_scorer(), pairs, samples=Dataset.from_list([samples[0], *golds[1:3]]))

    def test_training_rows_that_say_nothing(self, rule_scorer, pairs, train_pairs):
        ties = train_pairs.select(range(20)).add_column("label", [0.5] * 20)
        for train in (train_pairs.select([]), ties):
            certificate = certify(rule_scorer(), pairs, train=train)
            assert certificate.get("train_gap") is None
            assert [text for text in certificate["verdict"]["not_checked"] if text.startswith("train/validation gap")]
            assert "tfidf" not in certificate["baselines"]


def test_gain_and_bias_change_the_scores_and_no_verdict(rule_scorer, pairs, samples):
    plain = certify(rule_scorer(), pairs, samples=samples)
    normalised = certify(rule_scorer(readout=Readout(gain=0.01, bias=7.0)), pairs, samples=samples)
    assert normalised["scores"]["all"]["mean"] == pytest.approx(0.01 * plain["scores"]["all"]["mean"] + 7.0)
    assert normalised["spread"]["samples"]["std"] == pytest.approx(0.01 * plain["spread"]["samples"]["std"])
    for name in ("accuracy", "calibration", "length", "probes"):
        assert normalised[name] == plain[name]
    assert normalised["spread"]["shift"] == pytest.approx(plain["spread"]["shift"])


@pytest.mark.parametrize("where", ["probes", "samples", "training pairs"])
def test_scores_that_diverge_on_other_texts_are_found(where, rule_scorer, pairs, train_pairs, samples):
    def diverging(prompt, completion):
        bad = {"probes": len(completion) > 12, "samples": len(prompt) == 4, "training pairs": "warm" in completion}[
            where
        ]
        return math.nan if bad else quality(prompt, completion)

    if where == "training pairs":
        pairs = pairs.filter(lambda row: "warm" not in row["chosen"] + row["rejected"])
    certificate = certify(rule_scorer(diverging), pairs, train=train_pairs, samples=samples)
    assert certificate["verdict"]["verdict"] == "not fit"
    assert certificate["scores"]["not_finite"] > 0
    assert "not finite" in texts(certificate, "not fit")
    assert "not fit" in page(certificate, where)


def test_overfitting_shows(rule_scorer, pairs, train_pairs):
    known = {row["prompt"] + row["chosen"] for row in train_pairs}

    def by_heart(prompt, completion):
        text = " ".join([*prompt, *completion]).removesuffix(" <eos>")
        return (text in known) + 0.5 * random.Random(text).random()

    certificate = certify(rule_scorer(by_heart), pairs, train=train_pairs)
    assert certificate["train_gap"]["train"]["value"] > 0.95
    assert "by heart" in texts(certificate, "care")


class TestRows:
    def test_ties_and_turned_labels(self, rule_scorer, pairs):
        rows = pairs.select(range(60)).to_list()
        labels = [(1.0, 0.0, 0.5, 0.8, 0.2)[index % 5] for index in range(60)]
        turned = Dataset.from_list([{**row, "label": label} for row, label in zip(rows, labels, strict=True)])
        scored = score_pairs(rule_scorer(), turned)
        plain = score_pairs(rule_scorer(), pairs.select(range(60)))
        signs = np.where(np.array(labels) < 0.5, -1, 1)
        assert scored.differences.tolist() == pytest.approx((signs * plain.differences).tolist())
        assert scored.labels.tolist() == pytest.approx([max(label, 1 - label) for label in labels])
        certificate = certify(rule_scorer(), turned)
        assert certificate["data"] == {"pairs": 60, "left_out": 0, "ties": 12}
        assert certificate["accuracy"]["n"] == 48
        assert [row["group"] for row in certificate["by_confidence"]] == ["0.8", "1"]

    def test_a_preference_table(self, rule_scorer, pairs):
        few = pairs.select(range(40)).to_list()
        rows = [
            {"prompt": row["prompt"], "completions": [row["rejected"], row["chosen"]], "label": 0.0} for row in few
        ]
        ranked = {"prompt": "the film was", "completions": [" good", " bad", " slow"], "ranks": [1, 2, 2]}
        scored = score_pairs(rule_scorer(), check_preferences([*rows, ranked]))
        plain = score_pairs(rule_scorer(), pairs.select(range(40)))
        assert scored.differences[:40].tolist() == plain.differences.tolist()
        assert sorted(scored.labels[40:].tolist()) == [0.5, 1.0, 1.0]
        assert certify(rule_scorer(), check_preferences([*rows, ranked]))["data"]["ties"] == 1

    def test_rows_that_bring_their_tokens(self, rule_scorer, tiny_tokenizer):
        texts = ["the film was good and warm", "the film was bad"]
        ids = tiny_tokenizer(texts)["input_ids"]
        row = {
            "prompt": "the film was",
            "chosen": " x",
            "rejected": " y",
            "chosen_ids": ids[0],
            "rejected_ids": ids[1],
        }
        seen = []
        scorer = rule_scorer(lambda prompt, completion: seen.append((prompt, completion)) or 0.0)
        scored = score_pairs(scorer, Dataset.from_list([row]))
        assert seen == [(["the", "film", "was"], ["good", "and", "warm"]), (["the", "film", "was"], ["bad"])]
        assert (scored.chosen_lengths.tolist(), scored.rejected_lengths.tolist()) == ([3], [1])

    def test_long_rows_are_left_out_and_counted(self, rule_scorer, pairs):
        rows = [*pairs.select(range(50)), {**pairs[0], "chosen": " very" * 80}]
        certificate = certify(rule_scorer(), Dataset.from_list(rows))
        assert certificate["data"] == {"pairs": 50, "left_out": 1, "ties": 0}

    def test_bad_input_is_refused(self, rule_scorer, pairs, samples):
        scorer = rule_scorer()
        with pytest.raises(ValueError, match="Row 0 has the label 1.5"):
            score_pairs(scorer, pairs.select([0]).add_column("label", [1.5]))
        with pytest.raises(ValueError, match="None of the 300 pairs fits into 3 tokens"):
            score_pairs(rule_scorer(max_length=3), pairs)
        with pytest.raises(ValueError, match="no column 'topic'"):
            certify(scorer, pairs, category_column="topic")
        with pytest.raises(ValueError, match="`prompt` and `completion`, found"):
            certify(scorer, pairs, samples=samples.rename_column("completion", "text"))
        with pytest.raises(ValueError, match="All held-out pairs are ties"):
            certify(scorer, pairs.select([0, 1]).add_column("label", [0.5, 0.5]))
        partly = Dataset.from_list([*samples.select([0, 1]), {**samples[2], "gold_score": None}])
        with pytest.raises(ValueError, match="Sample 2 has no `gold_score`"):
            certify(scorer, pairs, samples=partly)

    @pytest.mark.parametrize("count", [1, 2, 3])
    def test_few_rows(self, rule_scorer, pairs, samples, count):
        one_prompt = {"prompt": "the film was", "completion": " good film", "gold_score": 1.0}
        few = Dataset.from_list([one_prompt] * count)
        certificate = certify(rule_scorer(), pairs.select(range(count)), train=pairs.select([0]), samples=few)
        assert certificate["verdict"]["verdict"] == "not fit"
        assert (certificate["best_of_n"] is None) == (count == 1)
        assert f"{count} pairs" in page(certificate, "Few rows")


class TestPairsInBothSplits:
    def test_nothing_but_held_out_pairs_gives_no_gap(self, rule_scorer, pairs, caplog):
        turned = {"chosen": pairs["rejected"][:], "rejected": pairs["chosen"][:], "label": [0.0] * len(pairs)}
        for train in (pairs, Dataset.from_dict({"prompt": pairs["prompt"][:]} | turned)):
            caplog.clear()
            certificate = certify(rule_scorer(), pairs, train=train)
            assert certificate["train_gap"] is None
            assert certificate["data"]["shared"] == 300
            assert "train/validation gap: the training pairs that were drawn are held-out" in texts(
                certificate, "not checked"
            )
            assert "300 of 300 training pairs that were drawn are held-out pairs, too" in caplog.text

    def test_the_others_make_the_gap(self, rule_scorer, pairs, train_pairs):
        columns = ["prompt", "chosen", "rejected"]
        mixed = Dataset.from_list(
            train_pairs.select_columns(columns).to_list() + pairs.select_columns(columns).to_list()
        )
        found = certify(rule_scorer(), pairs, train=mixed, train_rows=1000)
        alone = certify(rule_scorer(), pairs, train=train_pairs, train_rows=1000)
        shared = {(row["prompt"], *sorted((row["chosen"], row["rejected"]))) for row in pairs}
        both = sum((row["prompt"], *sorted((row["chosen"], row["rejected"]))) in shared for row in mixed)
        assert found["data"]["shared"] == both >= 300
        assert alone["data"]["shared"] == both - 300
        assert found["train_gap"] == alone["train_gap"]
        assert f"{both} training pairs are held-out pairs, too" in texts(found, "good", "care", "not checked")


class TestRowsThatCannotBeScored:
    @pytest.mark.parametrize("side", ["prompt", "chosen", "rejected"])
    @pytest.mark.parametrize(
        ("value", "problem"),
        [
            (None, "`{side}` is null"),
            ([{"role": "user", "content": "x"}], "are not all text or all chats"),
            ('[{"role": "user", "content": "x"}]', "`{side}` is a chat that was written as text"),
        ],
        ids=["null", "mixed", "written chat"],
    )
    def test_a_pair(self, rule_scorer, pairs, train_pairs, side, value, problem):
        rows = pairs.select(range(20)).to_list()
        if isinstance(value, list):  # a column of a dataset has one type
            rows = [row | {side: value} for row in rows]
        else:
            rows[3][side] = value
        place = "Row 0" if isinstance(value, list) else "Row 3"
        for splits in ({"test": rows}, {"test": pairs.to_list(), "train": rows}):
            splits = {name: Dataset.from_list(split) for name, split in splits.items()}
            with pytest.raises(ValueError, match=f"{place} cannot be scored: .*{problem.format(side=side)}"):
                certify(rule_scorer(), **splits)

    def test_a_message_without_content(self, rule_scorer):
        chat = [{"role": "user", "content": None}]
        answers = {side: [{"role": "assistant", "content": side}] for side in ("chosen", "rejected")}
        with pytest.raises(ValueError, match="Row 0 cannot be scored: `prompt` has a message whose `content` is null"):
            certify(rule_scorer(), Dataset.from_list([{"prompt": chat} | answers]))

    @pytest.mark.parametrize(
        "row",
        [
            {"prompt": "a", "chosen": "b"},
            {"prompt": "a", "response": "b", "helpfulness": 1},
            {"chosen": "a", "rejected": "b"},
        ],
    )
    def test_columns_that_are_missing(self, rule_scorer, row):
        with pytest.raises(
            ValueError, match="Pairs need the columns `prompt`, `chosen` and `rejected`; .* is missing"
        ):
            certify(rule_scorer(), Dataset.from_list([row]))

    def test_a_sample(self, rule_scorer, pairs, samples):
        rows = samples.to_list()
        rows[2]["completion"] = None
        with pytest.raises(ValueError, match="Sample 2 cannot be scored: `completion` is null"):
            certify(rule_scorer(), pairs, samples=Dataset.from_list(rows))
