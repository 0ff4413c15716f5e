"""LLaVA-RLHF's recipe: the correct-answer term, the world's truth, and every stage for two steps."""

import json
import random

import pytest
from PIL import ImageColor

from rlhf_recipes.config import parse_stage
from rlhf_recipes.models.readout import Readout

TINY = {"max_steps": 2, "logging_steps": 1, "disable_tqdm": True}


@pytest.fixture
def load(load_script, repo_root, monkeypatch):
    """Import a script of the recipe, which finds the modules beside it."""
    monkeypatch.syspath_prepend(str(repo_root / "recipes" / "llava_rlhf"))
    return lambda name: load_script(repo_root / "recipes" / "llava_rlhf" / f"{name}.py")


def start(module, **options):
    argv = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    return module.main(*parse_stage(module.ARGUMENTS, argv))


@pytest.mark.parametrize(
    ("kind", "answer", "bonus"),
    [
        ("general", "A. A cat.", 0.0),
        ("A", "A. A cat.", 1.0),
        ("A", "  A. A cat.", 1.0),
        ("B", "A. A cat.", 0.0),
        ("C", "I see two, so the correct option is C. Two.", 1.0),
        ("C", "The correct option is B. One.", 0.0),
        ("no", "No, it is red.", 0.5),
        ("no", "Yes, it is.", -0.5),
        ("no", "yes .", -0.5),
        ("no", "Perhaps.", 0.0),
        ("yes", "Yes, it is.", 0.0),
        ("yes", "No.", 0.0),
    ],
)
def test_the_correct_answer_term(load, kind, answer, bonus):
    """RLHF/models/ppo_trainer.py of the paper's code, case by case."""
    term = load("fact_rewards").correct_answer
    assert term([answer], [kind]) == [bonus]
    assert term([[{"role": "assistant", "content": answer}]], [kind], other=1) == [bonus]


def test_an_unknown_kind_of_question_is_refused(load):
    with pytest.raises(ValueError, match="`caption_type` must be 'general', 'A' to 'D', 'yes' or 'no', got 'E'"):
        load("fact_rewards").correct_answer(["A."], ["E"])


def test_what_is_counted_as_hallucinated(load):
    rewards = load("fact_rewards")
    rows = {
        "completions": [" colour red , material wood , place unknown .", " no .", " yes .", " , ."],
        "caption_type": ["general", "no", "no", "general"],
        "facts": [["glass", "red", "shelf"]] * 4,
    }
    assert rewards.stated(**rows) == [2.0, None, None, 0.0]
    assert rewards.hallucinated(**rows) == [1.0, None, None, 0.0]
    assert rewards.gold(**rows) == [0.0, 1.0, -1.0, 0.0]


def test_answers_are_as_true_as_asked(load):
    pictures = load("pictures")
    rng = random.Random(0)
    picture = pictures.Picture("ball", {"colour": "red", "material": "wood", "place": "shelf"})
    counts = [
        pictures.count_statements(pictures.write_answer(picture, "general", 0.5, 0.2, rng), ["red", "wood", "shelf"])
        for _ in range(2000)
    ]
    stated, wrong = (sum(column) / 6000 for column in zip(*counts, strict=True))
    assert stated == pytest.approx(0.8, abs=0.02)
    assert wrong == pytest.approx(0.3, abs=0.02)
    assert sorted(picture.facts(rng)) == ["red", "shelf", "wood"]


def test_every_stage_runs(load, load_stage, repo_root, tmp_path, capsys):
    """With facts and without, as `compare.py` runs them: the reward model that needs facts says so."""
    out = tmp_path / "llava_rlhf"
    sizes = {"corpus_size": 128, "sft_size": 48, "prompts": 96, "test_prompts": 16}
    start(load("world"), output_dir=out / "world", **sizes)
    prompts = {name: (out / "world" / f"prompts_{name}.jsonl").read_text() for name in ("train", "test")}
    train, test = ({json.loads(line)["prompt"] for line in text.splitlines()} for text in prompts.values())
    assert not train & test
    small = {"model_name_or_path": out / "world" / "base", "per_device_train_batch_size": 8, **TINY}
    sft = {"config": repo_root / "recipes/llava_rlhf/sft.yaml", "dataset_name": out / "world" / "sft.jsonl"}
    start(load_stage("sft"), output_dir=out / "sft", **sft, **small)
    # A model of three steps writes anything, and ends it by chance only
    start(
        load("annotate"),
        world=out / "world",
        sft_adapter=out / "sft",
        output_dir=out / "preferences",
        max_new_tokens=64,
    )

    compare = load("compare")
    compare.main(compare.CompareArguments(str(out), seeds=1), **small)
    printed = capsys.readouterr().out
    assert "share of stated attributes that are not true" in printed
    for arm in ("with_facts", "without_facts"):
        folder = out / "seeds" / f"{arm}_0"
        assert Readout.load(folder / "reward").reward_prompt == (arm == "with_facts")
        evaluation = json.loads((folder / "ppo" / "evaluation.json").read_text())
        for side in ("policy", "reference"):
            means = evaluation[side]["rewards"]
            if means["stated"]:
                rate = means["hallucinated"] / means["stated"]
                assert evaluation[side]["hallucination_rate"] == pytest.approx(rate)


@pytest.mark.parametrize(
    ("model", "sizes"),
    [
        pytest.param(
            "qwen2_5_vl",
            {"captions": 64, "demonstrations": 32, "pairs": 32, "max_steps": 2, "evaluation_rows": 8},
            id="two steps",
        ),
        pytest.param("qwen2_5_vl", {}, id="whole", marks=pytest.mark.slow),
    ],
)
def test_every_stage_with_pictures(load, tmp_path, capsys, model, sizes):
    script = load("vision")
    image, colour, number = script.picture(random.Random(3))
    assert len([pixel for pixel in image.get_flattened_data() if pixel != (255, 255, 255)]) == 100 * (
        1 + script.NUMBERS.index(number)
    )
    said = [f"{number} squares , {colour} .", f"{colour} and {colour}", "three four .", ""]
    scores = script.true_statements([[{"content": text}] for text in said], [colour] * 4, [number] * 4)
    assert scores == [2.0, 1.0, 1.0 if number == "three" else -1.0, 0.0]
    out = tmp_path / "vision"
    start(script, output_dir=out, model=model, **sizes)
    sft, reward, ppo = (
        json.loads((out / stage / "evaluation.json").read_text()) for stage in ("sft", "reward", "ppo")
    )
    assert Readout.load(out / "reward").reward_prompt
    assert (sft["n"], reward["n"]) == (sizes.get("evaluation_rows", 256),) * 2
    gold = {side: ppo[side]["gold_score"] for side in ("policy", "reference")}
    assert -2.0 <= gold["reference"] <= 2.0
    if not sizes:
        assert reward["accuracy_ci"][0] > 0.8
        assert gold["policy"] > gold["reference"] + 0.3
        assert ppo["win_rate_ci"][0] > 0.5
    assert (out / "ppo" / "processor_config.json").exists()
    capsys.readouterr()
    start(script, output_dir=out, model=model, **sizes)
    assert capsys.readouterr().out.count("is there: nothing to do") == 4


def test_choices_are_of_the_picture_and_the_facts(load):
    script = load("vision")
    rng = random.Random(0)
    for _ in range(50):
        row = script.choice(rng)
        [asked] = row["reward_prompt"]
        _, _, number, colour, *_ = asked["content"].split()
        better, worse = script.true_statements([row["chosen"], row["rejected"]], [colour] * 2, [number] * 2)
        assert better > worse
        drawn = [pixel for pixel in row["images"][0].get_flattened_data() if pixel != (255, 255, 255)]
        assert len(drawn) == 100 * (1 + script.NUMBERS.index(number))
        assert set(drawn) == {ImageColor.getrgb(colour)}


def test_the_stages_see_pictures_that_rows_name(load, repo_root, run_stage, write_rows, tmp_path):
    """From rows with paths and the YAMLs for Qwen2.5-VL to a policy, on a small one made by code."""
    script = load("vision")
    rng, rows = random.Random(0), []
    for number in range(24):
        row = script.choice(rng)
        row["images"][0].save(tmp_path / f"{number}.png")
        rows.append({**row, "images": [str(tmp_path / f"{number}.png")]})
    args = script.VisionArguments(str(tmp_path), model="qwen2_5_vl", captions=0)
    script.make_base(args, tmp_path, rng)

    dataset = write_rows(rows)

    def run(stage, **options):
        small = {"model_name_or_path": tmp_path / "base", "dtype": "float32", "gradient_accumulation_steps": 1}
        config = repo_root / "recipes" / "llava_rlhf" / f"qwen2_5_vl_{stage}.yaml"
        return run_stage(stage, config=config, dataset_name=dataset, test_size=0.3, **small, **options)

    sft, reward = run("sft"), run("reward")
    ppo = run(
        "ppo",
        sft_adapter=sft.folder,
        reward_adapter=reward.folder,
        steps_per_generation=1,
        max_completion_length=6,
        evaluation_rows=4,
    )
    for stage in (sft, reward, ppo):
        assert (stage.folder / "processor_config.json").exists()
        trained = [name for name, weight in stage.trainer.model.named_parameters() if weight.requires_grad]
        assert trained
        assert all(".language_model." in name or "score" in name or "heads" in name for name in trained)
    seen = sft.evaluation["n"], reward.evaluation["n"]
    assert 0 < seen[0] == seen[1] < 24, "one question about different pictures is split by the pictures"
    assert ppo.trainer.image_reader is not None
