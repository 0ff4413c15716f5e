"""`rlhf-recipes export`: what is in a folder, that it loads elsewhere, what is refused, and what is uploaded."""

import json
import os
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer, LlamaForCausalLM

from rlhf_recipes.models import load_reward_model
from rlhf_recipes.models.readout import Readout
from rlhf_recipes.models.trained_on import raw_score, save_trained_on
from rlhf_recipes.rewards import ClassifierReward
from rlhf_recipes.tools import cli
from rlhf_recipes.tools.export import merging
from rlhf_recipes.tools.export.card import escape, licence_of

CARDS = """
import contextlib, io, json, re, sys
sys.modules["rlhf_recipes"] = None  # importing it fails
outputs = {}
for name in sys.argv[1:]:
    code = re.search(r"```python\\n(.*?)```", open(f"{name}/README.md").read(), re.DOTALL)[1]
    with contextlib.redirect_stdout(io.StringIO()) as text:
        names = {}
        exec(code, names)
    ids = names.get("ids") or names["inputs"]["input_ids"][0].tolist()
    outputs[name] = {"printed": text.getvalue(), "ids": ids, "kind": type(names["model"]).__name__}
print(json.dumps(outputs))
"""


def copy_run(run, folder, /, **changes):
    """A copy of a run, with changed keys of its JSON files: `adapter_config={"bias": "all"}`."""
    shutil.copytree(run, folder)
    for name, values in changes.items():
        path = folder / f"{name}.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return folder


def front_matter(folder):
    return yaml.safe_load((folder / "README.md").read_text().split("---\n")[1])


@pytest.fixture
def mean_reward(reward_run, tmp_path):
    """The reward model, read as the mean over the completion's tokens, with gain and bias."""
    folder = copy_run(reward_run, tmp_path / "mean_run")
    Readout("mean", gain=2.0, bias=-1.0).save(folder)
    return folder


@pytest.fixture
def encoder_run(bert_path, reward_run, tmp_path):
    """An adapter on an encoder, as the reward stage leaves it."""
    base = AutoModelForSequenceClassification.from_pretrained(bert_path)
    config = LoraConfig(task_type="SEQ_CLS", target_modules=["query"], modules_to_save=["classifier", "pooler"])
    model, tokenizer = get_peft_model(base, config), AutoTokenizer.from_pretrained(bert_path)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    folder = tmp_path / "encoder_run"
    model.save_pretrained(folder)
    tokenizer.eos_token = tokenizer.sep_token
    tokenizer.save_pretrained(folder)
    save_trained_on(folder, model, [tokenizer("the film", "was good")["input_ids"]], raw_score)
    for name in ("run.json", "evaluation.json"):
        shutil.copy(reward_run / name, folder)
    return folder


def test_the_code_of_every_card_runs_without_this_package(
    sft_run, chat_run, ppo_run, reward_run, mean_reward, encoder_run, run_export, tmp_path
):
    runs = {"sft": sft_run, "chat": chat_run, "ppo": ppo_run, "reward": reward_run, "mean": mean_reward}
    runs["encoder"] = encoder_run
    for name, run in runs.items():
        run_export(run, name=f"{name}_adapter")
        run_export(run, "--merge", name=f"{name}_merged")
    names = [f"{name}_{form}" for name in runs for form in ("adapter", "merged")]
    result = subprocess.run(
        [sys.executable, "-c", CARDS, *names], capture_output=True, text=True, cwd=tmp_path, timeout=300
    )
    assert result.returncode == 0, result.stderr
    outputs = json.loads(result.stdout.splitlines()[-1])
    assert {name for name, output in outputs.items() if output["kind"].startswith("Peft")} == {
        name for name in names if name.endswith("adapter")
    }
    chat = AutoTokenizer.from_pretrained(chat_run).convert_tokens_to_ids(["<user>", "<assistant>"])
    for name in ("sft", "ppo"):
        assert not set(chat) & set(outputs[f"{name}_merged"]["ids"]), "trained on texts, whatever the template says"
    assert [outputs["chat_merged"]["ids"][place] for place in (0, -1)] == chat

    for name in ("reward", "mean", "encoder"):  # our own scorer gives the same number for the same texts
        completion = "It was good." if name == "encoder" else " It was good."
        for form in ("adapter", "merged"):
            # Merged, the folder itself is the reward model; an adapter's base is loaded as the code loads it
            folder = tmp_path / f"{name}_{form}"
            model, tokenizer = load_reward_model(folder, dtype="auto")
            score = ClassifierReward(model, tokenizer, readout=Readout.load(folder))(
                ["How was the film?"], [completion]
            )
            assert float(outputs[f"{name}_{form}"]["printed"]) == pytest.approx(score[0], abs=1e-5), (name, form)
    scores = [float(outputs[f"{name}_adapter"]["printed"]) for name in ("reward", "mean")]
    assert scores[0] != scores[1]


def test_an_adapter_has_tokenizer_template_card_and_no_rows_of_the_training(sft_run, world, run_export):
    output, said = run_export(sft_run)
    assert {path.name for path in output.iterdir()} == {
        *("adapter_config.json", "adapter_model.safetensors", "README.md"),
        *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
    }, "and not trained_on.json, which holds rows of the training"
    assert json.loads((output / "adapter_config.json").read_text())["base_model_name_or_path"] == str(world / "base")
    weights = "adapter_model.safetensors"
    assert (output / weights).read_bytes() == (sft_run / weights).read_bytes()
    assert AutoTokenizer.from_pretrained(output).chat_template == AutoTokenizer.from_pretrained(sft_run).chat_template
    card = (output / "README.md").read_text()
    assert "4 bits (nf4" in card
    assert str(world) not in card, "no path of this machine"
    assert said.startswith(f"{output}: adapter of {sft_run}")
    assert not list(output.parent.glob(".exported-*"))


def test_the_card_says_what_was_trained_and_how_well(ppo_run, reward_run, run_export):
    output, _ = run_export(ppo_run)
    assert front_matter(output) == {
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "license": "other",
        "license_name": "tiny-licence",
        "license_link": "https://example.org/licence",
        "tags": ["trl", "rlhf-recipes", "ppo", "lora"],
    }, "a local base has no id to name"
    card, evaluation = (output / "README.md").read_text(), json.loads((ppo_run / "evaluation.json").read_text())
    low, high = evaluation["win_rate_ci"]
    assert f"| win rate over the reference | {evaluation['win_rate']:.3f} [{low:.3f}, {high:.3f}] |" in card
    assert "| `max_completion_length` | 6 |" in card
    versions = json.loads((ppo_run / "run.json").read_text())["versions"]
    assert f"trl {versions['trl']}" in card
    reward, _ = run_export(reward_run, "--merge", name="reward")
    evaluation = json.loads((reward_run / "evaluation.json").read_text())
    low, high = evaluation["accuracy_ci"]
    text = (reward / "README.md").read_text()
    assert f"| pair accuracy | {evaluation['accuracy']:.3f} [{low:.3f}, {high:.3f}] |" in text
    assert front_matter(reward)["library_name"] == "transformers"
    assert "reward-model" in front_matter(reward)["tags"]


def test_the_average_of_a_policys_weights_is_exported_with_its_own_results(ppo_run, run_export):
    output, _ = run_export(ppo_run / "ema", name="ema")
    weights = "adapter_model.safetensors"
    assert (output / weights).read_bytes() == (ppo_run / "ema" / weights).read_bytes()
    assert (output / weights).read_bytes() != (ppo_run / weights).read_bytes()
    evaluation = json.loads((ppo_run / "evaluation.json").read_text())
    low, high = evaluation["ema"]["win_rate_ci"]
    card = (output / "README.md").read_text()
    assert f"| win rate over the reference | {evaluation['ema']['win_rate']:.3f} [{low:.3f}, {high:.3f}] |" in card
    assert "| `max_completion_length` | 6 |" in card


EVIL = "x](javascript:1)\n# <script>alert(1)</script> | `a` --- http://evil.example @someone\n---\nlicense: mit"


def test_text_of_a_run_cannot_break_out_of_the_card(sft_run, run_export, tmp_path):
    evaluation = {"loss": EVIL, "perplexity": float("nan"), "n": True, "win_rate": 0.5, "win_rate_by": EVIL}
    record = {"recipe": EVIL, "versions": {EVIL: EVIL}, "git_commit": EVIL}
    run = copy_run(sft_run, tmp_path / "evil", evaluation=evaluation, run=record, trained_on={"base": EVIL})
    (run / "config.yaml").write_text(yaml.safe_dump({"dataset_name": EVIL, EVIL: EVIL, "lora_r": [EVIL]}))
    output, _ = run_export(run, "--merge")
    card = (output / "README.md").read_text()
    head, body = card.split("---\n", 2)[1:]
    assert yaml.safe_load(head) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "license": "other",
        "license_name": "tiny-licence",
        "license_link": "https://example.org/licence",
        "tags": ["trl", "rlhf-recipes", "sft", "lora"],
    }
    assert re.findall(r"(?m)^# .*", body)[0].startswith("# x\\]")
    assert len(re.findall(r"(?m)^# ", body)) == 1
    unescaped = re.sub(r"\\.", "", re.sub(r"```python.*?```", "", body, flags=re.DOTALL))
    for markup in ("<script", "](", "`a`", "http://evil", "@someone", "\nlicense:", "nan"):
        assert markup not in unescaped, markup


def test_characters_of_terminals_and_of_xml_are_taken_out():
    assert escape("a\x1b[31mb\x00") == "a\ufffd\\[31mb\ufffd"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"README.md": "---\nlicense: apache-2.0\n---\n"}, "apache-2.0"),
        ({"README.md": "---\nlicense: [mit]\n---\n", "LICENSE": "Free."}, "other"),
        ({"README.md": "---\n: {\n---\n"}, None),
        ({"README.md": "no front matter"}, None),
        ({"README.md": "---\nlicense: 'a\n  b'\n---\n"}, None),
        ({}, None),
    ],
)
def test_the_licence_is_the_bases(files, expected, tmp_path):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    licence = licence_of(str(tmp_path))
    assert licence.name == expected
    assert (licence.file is not None) == ("LICENSE" in files)


def test_an_unknown_licence_is_said_and_a_file_is_copied(sft_run, world, run_export, tmp_path):
    for number, files in enumerate(({}, {"LICENSE": "Free."})):
        base = tmp_path / f"base{number}"
        shutil.copytree(world / "base", base, ignore=shutil.ignore_patterns("README.md"))
        for name, text in files.items():
            (base / name).write_text(text)
        run = copy_run(sft_run, tmp_path / f"run{number}", adapter_config={"base_model_name_or_path": str(base)})
        output, _ = run_export(run, name=f"out{number}")
        meta, card = front_matter(output), (output / "README.md").read_text()
        assert (meta.get("license"), meta.get("license_link")) == (("other", "LICENSE") if files else (None, None))
        assert ("not known" in card) == (not files)
        assert (output / "LICENSE").exists() == bool(files)


def test_a_hub_base_and_hub_rows_are_named_by_their_ids(sft_run, run_export, tmp_path):
    run = copy_run(sft_run, tmp_path / "run", adapter_config={"base_model_name_or_path": "some-org/some-base"})
    (run / "config.yaml").write_text("dataset_name: some-org/rows\nmodel_name_or_path: some-org/some-base\n")
    output, _ = run_export(run)
    meta = front_matter(output)
    assert (meta["base_model"], meta["base_model_relation"]) == ("some-org/some-base", "adapter")
    assert meta["datasets"] == ["some-org/rows"]
    assert "license" not in meta
    config = json.loads((output / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "some-org/some-base"


def test_a_whole_model_is_exported_as_it_is(reward_run, run_export, tmp_path):
    merged, _ = run_export(reward_run, "--merge", name="merged")
    run = tmp_path / "averaged"
    shutil.copytree(merged, run)
    (run / "README.md").unlink()
    (run / "run.json").write_text(json.dumps({"stage": "reward", "recipe": "average"}))
    output, _ = run_export(run)
    weights = "model.safetensors"
    assert (output / weights).read_bytes() == (run / weights).read_bytes()
    assert "No evaluation is recorded." in (output / "README.md").read_text()


def test_gguf_ready_has_what_the_converter_reads(sft_run, world, run_export, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(world / "base", base)
    (base / "tokenizer.model").write_bytes(b"sentencepiece")
    run = copy_run(sft_run, tmp_path / "run", adapter_config={"base_model_name_or_path": str(base)})
    output, _ = run_export(run, "--gguf-ready")
    config = json.loads((output / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["dtype"] == "bfloat16"
    assert "quantization_config" not in config
    assert (output / "tokenizer.model").read_bytes() == b"sentencepiece"
    assert (output / "chat_template.jinja").is_file()
    assert (output / "tokenizer.json").is_file()


def test_a_merge_that_loses_the_adapter_warns(sft_run, run_export, tmp_path):
    from safetensors.torch import load_file, save_file

    run = copy_run(sft_run, tmp_path / "run")
    weights = load_file(run / "adapter_model.safetensors")
    weights = {name: 1e-5 * value if "lora_B" in name else value for name, value in weights.items()}
    save_file(weights, run / "adapter_model.safetensors", metadata={"format": "pt"})
    _, said = run_export(run, "--merge")
    share = int(re.search(r"rounding to bfloat16 undoes (\d+)% of the adapter's", said)[1])
    assert share > 90
    trained_on = json.loads((sft_run / "trained_on.json").read_text())
    numbers = [[value - 1.0 for value in row] for row in trained_on["numbers"]]
    run = copy_run(sft_run, tmp_path / "other", trained_on={"numbers": numbers})
    _, said = run_export(run, "--merge", name="other_out")
    assert "is another one than was trained" in said
    (run / "trained_on.json").unlink()
    _, said = run_export(run, "--merge", name="unmeasured")
    assert "was not measured" in said


def unfinished(run):
    (run / "evaluation.json").unlink()


def not_a_run(run):
    (run / "run.json").unlink()


def moved_base(run):
    path = run / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"base_model_name_or_path": "/gone/base"}))


def pickled(run):
    (run / "adapter_model.safetensors").rename(run / "adapter_model.bin")


def other_stage(run):
    (run / "run.json").write_text('{"stage": "base"}')


def damaged(run):
    (run / "evaluation.json").write_text("{")


def residual(run):
    path = run / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"init_lora_weights": "pissa"}))


@pytest.mark.parametrize(
    ("change", "words", "error", "message"),
    [
        (unfinished, [], ValueError, "not finished: it has no evaluation.json"),
        (not_a_run, [], ValueError, "cannot be exported: it has no run.json"),
        (other_stage, [], ValueError, "run.json names the stage 'base'"),
        (moved_base, ["--merge"], FileNotFoundError, "write its new absolute path as `base_model_name_or_path`"),
        (pickled, [], FileNotFoundError, "has no adapter_model.safetensors"),
        (damaged, [], ValueError, "evaluation.json is damaged"),
        (residual, ["--merge"], ValueError, "took a part of the base out"),
        (None, ["--public"], ValueError, "`--public` is for `--push"),
        (None, ["--dequantize"], ValueError, "`--dequantize` is for"),
        (None, ["--push", "me/model"], ValueError, "which nobody else has"),
        (None, ["--merge", "--push", "model"], ValueError, "takes ORG/NAME"),
        (None, ["--merge", "--push", "me/a/b"], ValueError, "takes ORG/NAME"),
        (None, ["--merge", "--push", "me/../b"], ValueError, "takes ORG/NAME"),
    ],
)
def test_what_cannot_be_exported_is_refused_before_weights_are_loaded(
    change, words, error, message, sft_run, run_export, tmp_path, monkeypatch
):
    run = copy_run(sft_run, tmp_path / "run")
    if change is not None:
        change(run)
    monkeypatch.setattr(merging, "merge_run", None)
    with pytest.raises(error, match=re.escape(message)):
        run_export(run, *words, api=Hub())
    assert {path.name for path in tmp_path.iterdir()} == {"run"}


def test_other_refusals(sft_run, reward_run, run_export, tmp_path, monkeypatch, capsys):
    with pytest.raises(ValueError, match="llama.cpp"):
        run_export(reward_run, "--gguf-ready")
    with pytest.raises(ValueError, match="reward, .*sft"):  # the stages in it are named
        run_export(sft_run.parent)
    (tmp_path / "exported").mkdir()
    with pytest.raises(FileExistsError, match="there already"):
        run_export(sft_run)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(OSError, match=r"takes 0.00 GB, and 0.00 GB are free"):
        run_export(sft_run, "--merge", name="large")
    assert cli.main(["export", str(tmp_path / "none"), "--output_dir", str(tmp_path / "x")]) == 2
    assert "There is no folder" in capsys.readouterr().err


def test_a_failure_leaves_nothing_behind(sft_run, run_export, tmp_path, monkeypatch):
    def full(self, *args, **kwargs):
        raise OSError("disk")

    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", full)
    with pytest.raises(OSError, match="disk"):
        run_export(sft_run, "--merge")
    assert list(tmp_path.iterdir()) == []


class Hub:
    """What `HfApi` does, as far as an upload needs it, without a network."""

    def __init__(self, account=None, existing=(), broken=False):
        self.account = account or {"name": "me", "orgs": [{"name": "us"}], "auth": {"accessToken": {"role": "write"}}}
        self.existing, self.broken, self.calls = existing, broken, []

    def whoami(self):
        if isinstance(self.account, OSError):
            raise self.account
        return self.account

    def repo_exists(self, name):
        return name in self.existing

    def create_repo(self, name, *, private, exist_ok):
        self.calls.append(("create", name, private, exist_ok))
        return f"https://huggingface.co/{name}"

    def upload_folder(self, *, repo_id, folder_path, commit_message):
        if self.broken:
            raise ConnectionError("no route")
        self.calls.append(("upload", repo_id, sorted(os.listdir(folder_path))))


@pytest.mark.parametrize("public", [False, True])
def test_push_makes_a_private_repository_of_the_whole_folder(public, sft_run, run_export):
    hub = Hub()
    output, said = run_export(sft_run, "--merge", "--push", "us/tiny", *["--public"] * public, api=hub)
    assert hub.calls == [("create", "us/tiny", not public, False), ("upload", "us/tiny", sorted(os.listdir(output)))]
    assert said.endswith("https://huggingface.co/us/tiny")
    assert "path = 'us/tiny'  # on the hub" in (output / "README.md").read_text()


READS = {"name": "me", "orgs": [], "auth": {"accessToken": {"role": "read"}}}


@pytest.mark.parametrize(
    ("hub", "message"),
    [
        (Hub(OSError("401 Unauthorized\nmore")), r"\(401 Unauthorized\). Log in with `hf auth login`"),
        (Hub({"name": "me", "orgs": [{"name": "them"}]}), r"not in 'us'. Name one of \['me', 'them'\]"),
        (Hub(READS), "not in 'us'"),
        (Hub({**READS, "orgs": [{"name": "us"}]}), "may only read"),
        (Hub(existing=["us/tiny"]), "on the hub already"),
    ],
)
def test_an_upload_that_would_fail_is_refused_before_the_work(hub, message, sft_run, run_export, tmp_path):
    with pytest.raises(ValueError, match=message):
        run_export(sft_run, "--merge", "--push", "us/tiny", api=hub)
    assert (hub.calls, list(tmp_path.iterdir())) == ([], [])


def test_a_failed_upload_keeps_the_export_and_says_how_to_go_on(sft_run, run_export, tmp_path):
    with pytest.raises(ValueError, match=r"but the upload failed: no route. Try again with `hf upload us/tiny"):
        run_export(sft_run, "--merge", "--push", "us/tiny", api=Hub(broken=True))
    assert (tmp_path / "exported" / "model.safetensors").is_file()
