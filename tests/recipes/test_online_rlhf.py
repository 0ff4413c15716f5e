"""Online RLHF on the small world: what a round leaves, interruptions, who may label, bad input."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import closing

import pytest
import torch
import yaml
from safetensors.torch import load_file

from rlhf_recipes import PPOTrainer
from rlhf_recipes.config import parse_stage
from rlhf_recipes.data.synthetic import GoldScore
from rlhf_recipes.tools.labeling.records import Answer
from rlhf_recipes.tools.labeling.store import Store
from rlhf_recipes.tools.report import write_report

TINY = {"per_device_train_batch_size": 4, "lora_r": 4, "learning_rate": 1e-2, "disable_tqdm": True}
OF_REWARD = TINY | {"max_steps": 2}
OF_PPO = TINY | {"steps_per_generation": 2, "num_iterations": 1, "save_steps": 1}
OF_PPO |= {"max_completion_length": 6, "evaluation_rows": 4, "max_test_rows": 4}
LOOP = {"rounds": 3, "ppo_steps": 6, "label_budget": 33, "labels_halved_after": 2, "members": 2, "report_pairs": 16}
ASKED = [18, 9, 6]  # 1, 1/2 and 1/3 of 18


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def records(folder):
    return [json.loads(path.read_text()) for path in sorted(folder.glob("round_*/round.json"))]


def judgements(folder):
    if not (folder / "labels.sqlite").exists():
        return []
    with closing(Store(folder / "labels.sqlite")) as store:
        return [(judgement.item, judgement.answer) for judgement in store.judgements()]


@pytest.fixture
def configs(repo_root, small_world, tmp_path):
    """Write the recipe's YAMLs of the stages, made small; `configs(sft_adapter)` gives the loop's fields for them."""

    def write(adapter, **of_ppo):
        places = {"sft_adapter": str(adapter), "dataset_name": str(small_world)}
        places |= {"gold_score": f"{small_world}/gold.json"} | of_ppo
        fields = {}
        for stage, own in (("reward", OF_REWARD), ("ppo", OF_PPO | places)):
            shipped = yaml.safe_load((repo_root / f"recipes/online_rlhf/{stage}.yaml").read_text())
            shipped |= own | {"model_name_or_path": f"{small_world}/base"}
            fields[f"{stage}_config"] = str(tmp_path / f"{stage}.yaml")
            (tmp_path / f"{stage}.yaml").write_text(yaml.safe_dump(shipped))
        return fields | {"output_dir": str(tmp_path / "run")}

    return write


@pytest.fixture
def words(repo_root):
    """Write a command line of the loop, which starts from the shipped YAML."""

    def write(fields):
        values = [str(word) for name, value in (LOOP | fields).items() for word in (f"--{name}", value)]
        return ["--config", str(repo_root / "recipes/online_rlhf/online.yaml"), *values]

    return write


JUDGE = """
def longer(prompt, first, second):
    return "tie" if len(first) == len(second) else "first" if len(first) > len(second) else "second"
"""


class Interrupted(BaseException):
    """What `except Exception` does not catch, as with a signal that ends a process."""


@pytest.fixture
def loop(load_stage, configs, words, small_world, tmp_path, monkeypatch):
    """The loop with stages, samples and scores that cost nothing; labels, choices and files are the real ones."""
    script = load_stage("online_rlhf/rounds")
    (tmp_path / "sft").mkdir()
    calls, hooks = [], {}
    moods = ("great", "awful", "fine", "lovely", "dull")

    def sample(self, adapter, count, of):
        pairs = []
        for number in range(count):
            both = [f" the bed was {moods[(number * step + len(of)) % 5]} ." for step in (1, 2)]
            ids = [[5, 6, 7 + number % 3, 1], [5, 6, 9, 1 if number % 4 else 8]]
            pairs.append({"prompt": f"we tried the tent {number} :", "completions": both, "completion_ids": ids})
        calls.append(("sample", of, str(adapter)))
        return pairs

    def scores(number, pairs):
        generator = torch.Generator().manual_seed(number)
        raw = torch.randn(2, len(pairs), 2, generator=generator, dtype=torch.float64)
        return raw, 2 * raw

    def run(self, stage, folder, **fields):
        if (folder / "evaluation.json").exists():
            return
        hooks.get(stage, lambda *_: None)(folder)
        calls.append((stage, folder, fields))
        folder.mkdir(parents=True)
        side = {"gold_score": 1.5, "reward_score": 0.5, "kl": 2.0, "length": 9.0}
        found = {"accuracy": 0.75, "n": 8, "policy": side, "reference": side | {"gold_score": -0.5}}
        found |= {"win_rate": 0.6, "win_rate_ci": [0.5, 0.7]}
        (folder / "evaluation.json").write_text(json.dumps(found))

    for name, function in {"sample": sample, "scores": lambda self, *args: scores(*args), "run": run}.items():
        monkeypatch.setattr(script.Rounds, name, function)

    def start(**options):
        script.main(*parse_stage(script.ARGUMENTS, words(configs(tmp_path / "sft") | options)))
        return tmp_path / "run"

    start.script, start.calls, start.hooks, start.folder = script, calls, hooks, tmp_path / "run"
    start.scores = scores
    return start


def test_each_round_goes_on_from_the_last_one(loop, small_world, capsys):
    folder = loop()
    trained = {path.relative_to(folder).as_posix(): fields for stage, path, fields in loop.calls if stage != "sample"}
    assert list(trained) == [f"round_0{n}/{name}" for n in (1, 2, 3) for name in ("reward_0", "reward_1", "ppo")]
    assert "start_adapter" not in trained["round_01/reward_1"]
    assert trained["round_03/reward_1"]["start_adapter"] == folder / "round_02" / "reward_1"
    assert "policy_adapter" not in trained["round_01/ppo"]
    last = trained["round_03/ppo"]
    assert last["policy_adapter"] == folder / "round_02" / "ppo"
    assert last["critic_model"] == folder / "round_02" / "ppo" / "critic"
    assert last["reward_adapters"] == [f"{folder}/round_03/reward_{member}" for member in range(2)]
    assert last["max_steps"] == 2
    assert len({fields["seed"] for fields in trained.values()}) == 9

    # Each member: all labels so far in either part, and none of its held-out prompts was ever trained on
    for member in range(2):
        met = set()
        for number in (1, 2, 3):
            parts = [
                rows(folder / f"round_0{number}" / f"rows_{member}" / f"{name}.jsonl") for name in ("train", "test")
            ]
            train, test = ({row["prompt"] for row in part} for part in parts)
            met |= train
            assert not met & test
            assert train | test == {row["prompt"] for row in rows(folder / f"round_0{number}" / "labels.jsonl")}

    # Candidates are the last policy's; after the first round the ensemble is asked which of ten to choose
    samples = {of: adapter for kind, of, adapter in loop.calls if kind == "sample"}
    assert samples["ask 3"] == samples["report 2"] == f"{folder}/round_02/ppo"
    assert len(rows(folder / "round_03" / "candidates.jsonl")) == 60
    queries = rows(folder / "round_03" / "queries.jsonl")
    others = rows(folder / "round_03" / "candidates.jsonl")
    pairs = [pair for pair in others if pair["completions"][0] != pair["completions"][1]]
    raw, _ = loop.scores(2, pairs)
    variance = (raw[:, :, 0] - raw[:, :, 1]).sigmoid().var(dim=0, correction=0)
    assert [row["variance"] for row in queries] == pytest.approx(sorted(variance.tolist(), reverse=True)[:6])

    gold, table = GoldScore.from_file(f"{small_world}/gold.json"), records(folder)
    assert [record["asked"] for record in table] == ASKED
    assert [record["labels"] for record in table] == [18, 27, 33]
    assert [record["steps"] for record in table] == [2, 4, 6]
    assert sum(record["choices"] + record["ties"] + record["incomparable"] for record in table) == 33
    training = rows(folder / "round_03" / "labels.jsonl")
    answers = judgements(folder)
    assert len(training) == sum(answer.ranks is not None for _, answer in answers), "no answer, no label"
    right = []
    for row in training:
        both = zip(row["completions"], row["completion_ids"], strict=True)
        first, second = (sum(gold.parts(row["prompt"], text, ids[-1] == 1).values()) for text, ids in both)
        if row["round"] == 2 and row["label"] != 0.5 and first != second:
            right.append((first > second) == (row["label"] == 1.0))
    assert table[1]["agreement_with_gold"] == pytest.approx(sum(right) / len(right))
    assert "on new samples" in capsys.readouterr().out


def test_a_run_that_is_interrupted_at_every_step_loses_and_repeats_nothing(loop, monkeypatch):
    """Every file, batch of questions, stage and report, and one answer in ten, ends the process once."""
    done = set()

    def interrupted(owner, name, key):
        function = getattr(owner, name)

        def called(*args, **kwargs):
            result, event = function(*args, **kwargs), (name, key(*args))
            if event not in done:
                done.add(event)
                raise Interrupted
            return result

        monkeypatch.setattr(owner, name, called)

    interrupted(loop.script, "write_whole", lambda path, text: path if "rows" not in path.parent.name else "rows")
    interrupted(loop.script.Rounds, "run", lambda rounds, stage, folder: folder)
    interrupted(loop.script.Rounds, "report", lambda rounds, number: number)
    interrupted(Store, "add", lambda store, items, source: source)
    interrupted(Store, "judge", lambda store, session, item, answer: item // 10)
    options = {"rounds": 2, "ppo_steps": 4, "label_budget": 30}
    labels, reports, interruptions = [], [], 0
    while not (loop.folder / "round_02" / "round.json").exists():
        with pytest.raises(Interrupted):
            loop(**options)
        interruptions += 1
        after = judgements(loop.folder)
        assert after[: len(labels)] == labels, "no label is lost or changed"
        labels = after
        assert records(loop.folder)[: len(reports)] == reports, "no round is done twice"
        reports = records(loop.folder)
    folder = loop(**options)
    assert interruptions == len(done) == 2 * (3 + 3 + 1 + 1) + 1 + 3
    assert judgements(folder) == labels
    assert sorted(item for item, _ in labels) == list(range(30)), "each question is answered once"
    stages = [path for kind, path, _ in loop.calls if kind != "sample"]
    assert len(stages) == len(set(stages)) == 6, "no stage is run twice"
    assert [record["labels"] for record in records(folder)] == [20, 30]


def test_a_person_labels_the_next_round_while_ppo_trains(loop, monkeypatch, capsys):
    pytest.importorskip("fastapi")
    labellers = sys.modules["labellers"]
    waited = []

    def person(*_):
        """Label whatever is open: half of it is judged, one cannot be compared, one is skipped."""
        with closing(Store(loop.folder / "labels.sqlite")) as store:
            ann = store.session(store.sign_in("Ann"))
            asked = 0
            while (showing := store.show(ann)) is not None:
                verdicts = {0: Answer("incomparable"), 1: Answer("skipped")}
                store.judge(ann, showing.number, verdicts.get(asked, Answer("ranked", [1, 2], "clearly")))
                asked += 1
        return asked

    monkeypatch.setattr(labellers.time, "sleep", lambda seconds: waited.append(person()))
    answered = []
    loop.hooks["ppo"] = lambda folder: answered.append((folder.parent.name, person()))
    folder = loop(labeller="page", ask_ahead="true")
    assert waited == [18], "only the first round waits"
    assert answered == [("round_01", 9), ("round_02", 6), ("round_03", 0)]
    assert f"rlhf-recipes label --db {folder}/labels.sqlite" in capsys.readouterr().out
    samples = {of: adapter for kind, of, adapter in loop.calls if kind == "sample"}
    assert samples["ask 2"] == samples["ask 1"] == f"{folder.parent}/sft"
    assert samples["ask 3"] == f"{folder}/round_01/ppo", "PPO of round 2 has not begun when round 3 is asked"
    assert [(record["skipped"], record["incomparable"]) for record in records(folder)] == [(1, 1)] * 3
    assert [record["choices"] for record in records(folder)] == [16, 7, 4]


def test_a_judge_labels(loop, tmp_path):
    (tmp_path / "judges.py").write_text(JUDGE)
    folder = loop(labeller="judge", judge=f"--function {tmp_path}/judges.py:longer", rounds=1, ppo_steps=2)
    labels = rows(folder / "round_01" / "labels.jsonl")
    assert len(labels) == 33
    for row in labels:
        first, second = map(len, row["completions"])
        assert row["label"] == (0.5 if first == second else float(first > second))
    assert not (folder / "labels.sqlite").exists()


def test_the_report_shows_the_rounds_and_survives_damaged_ones(loop):
    folder = loop()
    (folder / "round_02" / "round.json").write_text('{"round": 2, "labels": "<b>", "gold')
    odd = {"round": 3, "labels": 33, "gold_score": [], "alpha": "<b>", "kl": 2.5, "kl_ci": 3}
    (folder / "round_03" / "round.json").write_text(json.dumps(odd))
    page = write_report([folder]).read_text()
    for text in ("Rounds", "labels agree with gold", "newest policy&#x27;s samples, by gold", "round_03/ppo"):
        assert text in page, text
    assert "round_03/reward_1" in page
    assert "round_01/reward_0" not in page
    assert "round_02/round.json is damaged" in page
    assert "could not be made" not in page
    assert (folder / "report" / "rounds-0-gold.png").is_file()


@pytest.mark.slow
def test_the_comparison_gives_each_kind_its_labels_and_the_same_ppo(loop, load_stage, configs, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "rounds", loop.script)
    fields = LOOP | {"rounds": 2, "ppo_steps": 4, "label_budget": 24} | configs(tmp_path / "sft")
    (tmp_path / "online.yaml").write_text(yaml.safe_dump(fields))
    compare = load_stage("online_rlhf/compare")
    args = compare.ComparisonArguments(online=str(tmp_path / "online.yaml"), output_dir=str(tmp_path / "all"), seeds=2)
    compare.main(args)
    found = json.loads((tmp_path / "all" / "comparison.json").read_text())["arms"]
    assert {arm: end["labels"] for arm, end in found.items()} == {
        **dict.fromkeys(("disagreement", "random", "offline"), 24),
        "offline_more": 40,
    }
    steps = {path.parts[-4:-1]: fields["max_steps"] for stage, path, fields in loop.calls if stage == "ppo"}
    for seed in ("seed_0", "seed_1"):
        for arm in ("disagreement", "random", "offline", "offline_more"):
            assert sum(value for key, value in steps.items() if key[:2] == (seed, arm)) == 4
    chosen = {arm: records(tmp_path / "all" / "seed_0" / arm)[-1]["selection"] for arm in compare.ARMS}
    assert chosen == {**dict.fromkeys(compare.ARMS, "random"), "disagreement": "disagreement"}
    before = len(loop.calls)
    compare.main(args)
    assert len(loop.calls) == before, "what is finished is not run again"
    with pytest.raises(ValueError, match="at least 2 `seeds`"):
        compare.main(compare.ComparisonArguments(seeds=1))


def test_leads_of_the_comparison_are_seed_by_seed(load_stage):
    compare = load_stage("online_rlhf/compare")

    def runs(*golds):
        rest = {"labels": 9, "reward_score": 1.0, "kl": 2.0, "newest_policy_accuracy": 0.5}
        return [[{"gold_score": -9.0} | rest, {"gold_score": gold} | rest] for gold in golds]

    found = compare.compared({"random": runs(1.0, 2.5, 4.0), "offline_more": runs(0.5, 2.0, 3.5)})
    assert found["random"]["gold_score"] == pytest.approx(2.5)
    assert found["random"]["lead"] == pytest.approx(0.5)
    assert found["random"]["lead_ci"] == pytest.approx([0.5, 0.5]), "the seeds differ, and the leads do not"
    low, high = found["random"]["gold_score_ci"]
    assert 1.0 <= low < 2.5 < high <= 4.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label_budget": 20}, r"gives the rounds \[11, 5, 4\] labels. The first needs at least 16"),
        ({"ppo_steps": 7}, "3 rounds cannot share 7 steps of PPO evenly"),
        ({"members": 1}, "`selection: disagreement` compares at least 2 `members`"),
        ({"candidates_per_label": 1}, "on 2 `candidates_per_label`"),
        ({"rounds": 0}, "`rounds` must be at least 1"),
        ({"error": 0.6}, r"`error` must lie in \[0, 0.5\]"),
        ({"labeller": "judge"}, "`labeller: judge` and `judge`, the options of `rlhf-recipes judge`, belong together"),
        ({"labeller": "judge", "judge": "--modell x"}, "are no options of `rlhf-recipes judge`"),
        ({"labeller": "somebody"}, "invalid choice: 'somebody'"),
    ],
)
def test_bad_input_is_refused_before_anything_is_made(loop, options, message):
    with pytest.raises(ValueError, match=message):
        loop(**options)
    assert not loop.folder.exists()
    assert not loop.calls


def test_what_is_not_there_is_refused_before_anything_is_made(loop, configs, words, tmp_path, monkeypatch):
    def start(fields):
        loop.script.main(*parse_stage(loop.script.ARGUMENTS, words(fields)))

    with pytest.raises(FileNotFoundError, match="The first policy, `sft_adapter`"):
        start(configs(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="`labeller: gold` reads the gold score of the world"):
        start(configs(tmp_path / "sft", gold_score=None))
    with pytest.raises(FileNotFoundError, match="There is no gold score"):
        start(configs(tmp_path / "sft", gold_score=f"{tmp_path}/gold.json"))
    monkeypatch.setitem(sys.modules, "fastapi", None)
    monkeypatch.delitem(sys.modules, "rlhf_recipes.tools.labeling.app", raising=False)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'rlhf-recipes\[label\]'"):
        start(configs(tmp_path / "sft") | {"labeller": "page"})
    assert not loop.folder.exists()


def test_other_settings_and_other_processes_are_kept_out_of_a_folder(loop):
    loop(rounds=1, ppo_steps=2)
    with pytest.raises(FileExistsError, match="other settings: `rounds` 1 there, and 3 now"):
        loop(ppo_steps=6)
    with sys.modules["labellers"].alone(loop.folder), pytest.raises(RuntimeError, match="Another process works in"):
        loop(rounds=1, ppo_steps=2)


@pytest.fixture
def sft(run_stage, small_world, tmp_path):
    """Folder of the SFT stage, two steps on the small world."""
    given = {"dataset_name": small_world / "sft.jsonl", "model_name_or_path": small_world / "base"}
    return run_stage("sft", **given, load_in_4bit="true", output_dir=tmp_path / "sft").folder


def weights(folder):
    return {path.relative_to(folder).as_posix(): load_file(path) for path in folder.glob("round_*/*/**/*.safetensors")}


def test_two_steps_of_each_stage_and_ppo_that_goes_on_from_its_checkpoint(
    load_stage, configs, words, sft, tmp_path, monkeypatch
):
    script = load_stage("online_rlhf/rounds")
    saved, save = [], PPOTrainer._save_checkpoint

    def save_and_stop(self, *args, **kwargs):
        save(self, *args, **kwargs)
        saved.append(self.state.global_step)
        if len(saved) == 1:
            raise Interrupted

    monkeypatch.setattr(PPOTrainer, "_save_checkpoint", save_and_stop)
    argv = words(configs(sft) | {"rounds": 1, "ppo_steps": 2, "label_budget": 20, "report_pairs": 8})
    with pytest.raises(Interrupted):
        script.main(*parse_stage(script.ARGUMENTS, argv))
    script.main(*parse_stage(script.ARGUMENTS, argv))
    assert saved == [1, 2], "PPO went on after its first step"

    folder = tmp_path / "run"
    trained = weights(folder)
    assert {f"round_01/{name}/adapter_model.safetensors" for name in ("reward_0", "reward_1", "ppo")} <= trained.keys()
    for member in range(2):
        readout = json.loads((folder / "round_01" / f"reward_{member}" / "reward_model.json").read_text())
        assert readout["gain"] != 1.0
    assert json.loads((folder / "round_01" / "ppo" / "evaluation.json").read_text())["policy"]["gold_score"] < 0
    (record,) = records(folder)
    assert record["labels"] == record["choices"] + record["ties"] + record["incomparable"] == 20
    assert 0.0 <= record["newest_policy_accuracy"] <= 1.0


KILLED_AFTER = (
    *("round_01/candidates.jsonl", "round_01/queries.jsonl", "labels.sqlite", "round_01/labels.jsonl"),
    *(
        "round_01/reward_0/evaluation.json",
        "round_01/reward_1/run.json",
        "round_01/ppo/checkpoint-1/trainer_state.json",
    ),
    *("round_01/ppo/evaluation.json", "round_02/labels.jsonl", "round_02/ppo/checkpoint-1/trainer_state.json"),
    "round_02/ppo/adapter_model.safetensors",
)


@pytest.mark.slow
def test_a_process_that_is_killed_again_and_again_ends_with_the_same_files(repo_root, configs, words, sft, tmp_path):
    command = [sys.executable, str(repo_root / "recipes/online_rlhf/rounds.py")]
    options = {"rounds": 2, "ppo_steps": 4, "label_budget": 30}
    fields, folder = configs(sft) | options, tmp_path / "run"
    environment = os.environ | {"PYTHONPATH": str(repo_root), "OMP_NUM_THREADS": "1"}
    whole = words(fields | {"output_dir": tmp_path / "whole"})
    subprocess.run([*command, *whole], env=environment, check=True, capture_output=True)

    labels, reports = [], []
    for name in KILLED_AFTER:
        process = subprocess.Popen([*command, *words(fields)], env=environment, stdout=subprocess.DEVNULL)
        while not (folder / name).exists():
            assert process.poll() is None, f"it ended before {name}"
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        after = judgements(folder)
        assert after[: len(labels)] == labels, "no label is lost or changed"
        labels = after
        assert records(folder)[: len(reports)] == reports, "no round is done twice"
        reports = records(folder)
    subprocess.run([*command, *words(fields)], env=environment, check=True, capture_output=True)
    assert sorted(item for item, _ in judgements(folder)) == list(range(30)), "each question is answered once"
    assert records(folder) == records(tmp_path / "whole")
    for name in ("reward_0", "ppo"):
        run = json.loads((folder / "round_02" / name / "run.json").read_text())
        assert str(folder / "round_01" / name) in [parent["path"] for parent in run["parents"]]
    both = weights(folder), weights(tmp_path / "whole")
    assert both[0].keys() == both[1].keys()
    for name, tensors in both[0].items():
        for key, tensor in tensors.items():
            assert torch.equal(tensor, both[1][name][key]), f"{name}: {key}"


@pytest.mark.slow
def test_a_person_labels_in_the_browser_while_ppo_trains(repo_root, configs, words, sft, tmp_path):
    httpx = pytest.importorskip("httpx")
    fields, folder = configs(sft) | {"rounds": 2, "ppo_steps": 8, "label_budget": 30}, tmp_path / "run"
    argv = words(fields | {"labels_halved_after": 4, "labeller": "page", "ask_ahead": "true"})
    environment = os.environ | {"PYTHONPATH": str(repo_root), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    loop = subprocess.Popen(
        [sys.executable, str(repo_root / "recipes/online_rlhf/rounds.py"), *argv],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    while "rlhf-recipes label --db" not in (line := loop.stdout.readline()):
        assert line, "it ended before it asked anybody"
    start = "import sys; from rlhf_recipes.tools.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", start, *line.split()[1:], "--port", "0"]
    page = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        address = page.stdout.readline().split()[2].rstrip("/")
        browser = httpx.Client(base_url=address, headers={"origin": address}, follow_redirects=True)
        browser.post("/sign-in", data={"name": "Ann"})
        during_ppo = []
        while len(judgements(folder)) < 30:
            assert loop.poll() is None, "it ended before all was labelled"
            found = re.search(r'name="item" value="(\d+)"', browser.get("/").text)
            if found is None:
                time.sleep(0.05)
                continue
            browser.post("/judge", data={"item": found[1], "choice": "first", "strength": "clearly"})
            trains = not (folder / "round_01" / "ppo" / "evaluation.json").exists()
            during_ppo += [int(found[1])] if int(found[1]) >= 20 and trains else []
    finally:
        page.terminate()
    assert loop.wait() == 0
    loop.stdout.close()
    page.stdout.close()
    assert sorted(during_ppo) == list(range(20, 30)), "the second round was labelled before PPO of the first one ended"
    assert [record["choices"] for record in records(folder)] == [20, 10]
