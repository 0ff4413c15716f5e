"""Runs whose completions vLLM itself samples, on a CPU: `make test-vllm` makes the environment in which it runs.

vLLM asks for an earlier transformers than this library, so that its server is another process of another environment.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, TrainerCallback

from rlhf_recipes import PPOConfig, PPOTrainer
from rlhf_recipes.models.loading import load_tokenizer
from rlhf_recipes.ppo.vllm.engine import SamplingStopped
from tests.ppo.support import logged, trained, without_chance

pytestmark = pytest.mark.vllm

ROOT = Path(__file__).resolve().parents[3]
PYTHON = os.environ.get("VLLM_PYTHON", str(ROOT / ".venv-vllm" / "bin" / "python"))
# As on a user's machine: what the tests set for themselves is not for the server
QUIET = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
PATIENCE = 1800  # seconds for a server to start, on a machine that has other work


class Server:
    """A vLLM server as docs/vllm.md starts it, which can be killed and started again at the same address."""

    def __init__(self, base, log):
        self.base, self.log = base, log
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url, self.process = f"http://127.0.0.1:{self.port}", None

    def start(self):
        # vllm-cpu's `vllm serve` looks for a package named vllm: its module is what that command runs
        options = "--enable-lora --max-lora-rank 8 --dtype float32 --generation-config vllm --enforce-eager".split()
        options += ["--logprobs-mode", "processed_logprobs", "--host", "127.0.0.1", "--port", str(self.port)]
        command = [PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", str(self.base), *options]
        environment = os.environ | QUIET | {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True"}
        environment.pop("PYTHONPATH", None)
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command, env=environment, stdout=log, stderr=log, start_new_session=True, cwd=self.log.parent
            )
        patience = time.monotonic() + PATIENCE
        while time.monotonic() < patience:
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            try:
                if httpx.get(f"{self.url}/health", timeout=5).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.5)
        raise AssertionError(f"no server within {PATIENCE} seconds: {self.log.read_text()[-3000:]}")

    def kill(self):
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)  # its engine is a process of its own
            self.process.wait()
            self.process = None


@contextmanager
def serving(base, folder):
    assert Path(PYTHON).exists(), f"{PYTHON} is not there: run `make test-vllm`, which makes its environment"
    server = Server(base, folder / "server.log")
    server.start()
    try:
        yield server
    finally:
        server.kill()


def random_adapter(base, folder, seed):
    """An adapter that changes every layer, so that no mistake is hidden behind one that changes nothing."""
    config = LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules="all-linear")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.01
    model.save_pretrained(folder)
    return str(folder)


def commas(completion_ids, **kwargs):
    """A reward that depends on the tokens alone."""
    return [sum(token % 3 == 0 for token in ids) / len(ids) for ids in completion_ids]


def make(base, adapter, output_dir, prompts, **fields):
    args = PPOConfig(
        str(output_dir),
        use_cpu=True,
        bf16=False,
        activation_checkpointing=False,
        model_init_kwargs={"dtype": "float32"},
        per_device_train_batch_size=8,
        num_iterations=1,
        max_steps=2,
        max_completion_length=24,
        learning_rate=1e-3,
        critic_init="policy",
        seed=3,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **fields,
    )
    rows = Dataset.from_list([{"prompt": prompt} for prompt in prompts])
    return PPOTrainer(adapter, commas, args, rows, processing_class=load_tokenizer(str(base)))


def noted(trainer):
    """Prompts and completions in the order in which they are sampled."""
    rows, sample = [], trainer.sampler

    def sample_and_note(prompt_ids, embeds=None):
        sampled = sample(prompt_ids, embeds)
        rows.extend(zip(prompt_ids, sampled[0], strict=True))
        return sampled

    trainer.sampler = sample_and_note
    return rows


class Killed(TrainerCallback):
    """Kill the server in the middle of the second rollout, and start it again, or not."""

    def __init__(self, server, again):
        self.server, self.again = server, again

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 1:
            self.thread = threading.Thread(target=self.restart)
            self.thread.start()
            if not self.again:
                self.thread.join()

    def restart(self):
        if self.again:
            time.sleep(0.3)
        self.server.kill()
        if self.again:
            self.server.start()


@pytest.fixture(scope="module")
def quickstart_base(repo_root, tmp_path_factory):
    """The base model of the quickstart, made by its own script where it is not there yet."""
    made = repo_root / "outputs" / "quickstart" / "world" / "base"
    if made.is_dir():
        return made
    folder = tmp_path_factory.mktemp("quickstart") / "world"
    script = [sys.executable, str(repo_root / "recipes" / "quickstart" / "world.py")]
    subprocess.run([*script, "--output_dir", str(folder)], check=True)
    return folder / "base"


@pytest.fixture(scope="module")
def quickstart_prompts(quickstart_base):
    rows = [json.loads(line) for line in (quickstart_base.parent / "prompts_train.jsonl").open()]
    return [row["prompt"] for row in rows[:16]]


@pytest.fixture(scope="module")
def smollm2_base(request, repo_root):
    made = repo_root / "outputs" / "smollm2" / "model"
    return made if made.is_dir() else request.getfixturevalue("smollm2")


def check_run(base, prompts, server, folder):
    """Two updates are those of the same completions by transformers, also where the server is killed in the middle."""
    adapter = random_adapter(base, folder / "adapter", seed=5)
    served = {"use_vllm": True, "vllm_mode": "server", "vllm_server_base_url": server.url}
    calm = make(base, adapter, folder / "calm", prompts, **served)
    rows = noted(calm)
    calm.train()
    assert len(rows) == 16
    assert logged(calm, "kl")[0] == pytest.approx(0.0, abs=1e-9)
    assert max(logged(calm, "sampling/sampling_logp_difference/mean")) < 1e-5
    assert logged(calm, "sampling/importance_sampling_ratio/max") == [1.0, 1.0]

    completions = iter(rows)
    other = without_chance(make(base, adapter, folder / "other", prompts), lambda *_: next(completions)[1])
    other.train()
    assert_close(logged(calm, "reward"), logged(other, "reward"), rtol=0, atol=1e-6)
    for key in ("kl", "loss", "grad_norm"):
        assert_close(logged(calm, key), logged(other, key), rtol=1e-2, atol=1e-4)

    run = make(base, adapter, folder / "run", prompts, **served, vllm_server_timeout=2.0 * PATIENCE)
    again = noted(run)
    killed = Killed(server, again=True)
    run.add_callback(killed)
    run.train()
    killed.thread.join()
    assert again == rows
    for name, weight in trained(run).items():
        assert_close(weight, trained(calm)[name], rtol=0, atol=1e-4)
    return calm, adapter


def test_the_quickstarts_model(quickstart_base, quickstart_prompts, tmp_path):
    with serving(quickstart_base, tmp_path) as server:
        calm, adapter = check_run(quickstart_base, quickstart_prompts, server, tmp_path)
        served = {"use_vllm": True, "vllm_mode": "server", "vllm_server_base_url": server.url}
        lost = make(
            quickstart_base, adapter, tmp_path / "lost", quickstart_prompts, **served, vllm_server_timeout=20.0
        )
        lost.add_callback(Killed(server, again=False))
        with pytest.raises(
            SamplingStopped, match="has not answered for .* seconds.*stopped after step 1.*checkpoint-1"
        ):
            lost.train()
        server.start()
        resumed = make(quickstart_base, adapter, tmp_path / "resumed", quickstart_prompts, **served)
        resumed.train(resume_from_checkpoint=str(tmp_path / "lost" / "checkpoint-1"))
        for name, weight in trained(resumed).items():
            assert_close(weight, trained(calm)[name], rtol=0, atol=1e-4)


def test_two_processes(quickstart_base, quickstart_prompts, tmp_path):
    """One server samples for both; they stop together when it is lost, and go on together from one checkpoint."""
    adapter = random_adapter(quickstart_base, tmp_path / "adapter", seed=5)
    (tmp_path / "prompts.json").write_text(json.dumps(quickstart_prompts))
    with serving(quickstart_base, tmp_path) as server:
        arguments = [str(quickstart_base), adapter, str(tmp_path), server.url]
        lost = {"kill": server.process.pid, "timeout": 20.0}
        train_on_two(*arguments, json.dumps({"calm": {"again": True}, "lost": lost}))
        server.kill()
        server.start()
        checkpoint = tmp_path / "lost" / "checkpoint-1"
        train_on_two(*arguments, json.dumps({"resumed": {"resume": str(checkpoint)}}))
    calm, other, resumed = (
        [json.loads((tmp_path / f"{name}_{rank}.json").read_text()) for rank in (0, 1)]
        for name in ("calm", "other", "resumed")
    )
    for rank in (0, 1):
        stopped = (tmp_path / f"lost_{rank}.txt").read_text()
        assert re.search(r"has not answered for .* seconds.*stopped after step 1.*checkpoint-1", stopped)
        assert (checkpoint / f"rng_state_{rank}.pth").is_file()
        assert calm[rank]["spread"] == resumed[rank]["spread"] == 0.0
        assert len(calm[rank]["rows"]) == 16
        assert resumed[rank]["rows"] == calm[rank]["rows"][8:]
    assert calm[0]["rows"] != calm[1]["rows"]
    ours, theirs = ([entry for entry in run[0]["log"] if "loss" in entry] for run in (calm, other))
    assert len(ours) == len(theirs) == 2
    assert ours[0]["kl"] == pytest.approx(0.0, abs=1e-9)
    for step, expected in zip(ours, theirs, strict=True):
        assert step["sampling/sampling_logp_difference/mean"] < 1e-5
        assert step["reward"] == pytest.approx(expected["reward"], abs=1e-6)
        for key in ("kl", "loss", "grad_norm"):
            assert step[key] == pytest.approx(expected[key], rel=1e-2, abs=1e-4), key
    for name, weight in load_file(tmp_path / "resumed_0.safetensors").items():
        assert_close(weight, load_file(tmp_path / "calm_0.safetensors")[name], rtol=0, atol=1e-4)


def train_on_two(*arguments):
    """Run the worker on two processes, over gloo."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    worker = str(Path(__file__).with_name("served_worker.py"))
    done = subprocess.run(
        [*command, worker, *arguments], env=environment, capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 0, done.stderr[-5000:]


def test_smollm2(smollm2_base, tmp_path):
    prompts = [f"Film review: {words}" for words in ("the plot was", "i liked it", "a slow, dark story of", "what a")]
    with serving(smollm2_base, tmp_path) as server:
        check_run(smollm2_base, prompts * 4, server, tmp_path)


def test_a_stale_cache_is_found(quickstart_base, quickstart_prompts, tmp_path):
    """A folder that is written over: the server keeps keys and values of the text, and of fresh ones it is right."""
    adapter = random_adapter(quickstart_base, tmp_path / "adapter", seed=5)
    with serving(quickstart_base, tmp_path) as server:
        served = {"use_vllm": True, "vllm_mode": "server", "vllm_server_base_url": server.url}
        run = make(quickstart_base, adapter, tmp_path / "run", quickstart_prompts, **served)
        sampler = run.sampler
        for name, parameter in run.model.named_parameters():
            if "lora_B.default" in name:
                parameter.data *= 3.0
        version = sampler._adapter
        run.roles.save_policy(version.folder)
        request = {"lora_name": version.name, "lora_path": str(version.folder), "load_inplace": True}
        httpx.post(f"{server.url}/v1/load_lora_adapter", json=request, timeout=60).raise_for_status()
        with pytest.raises(SamplingStopped, match="tokens that it samples after a text differ by"):
            sampler._probe.check(version)
        sampler([[5, 6, 7]])  # under a name of its own, all is right


def test_colocated(quickstart_base, tmp_path):
    """`ColocatedVLLM` in vLLM's environment, against PEFT here."""
    folders = [random_adapter(quickstart_base, tmp_path / f"adapter_{seed}", seed) for seed in (5, 6)]
    out = tmp_path / "answer.json"
    worker = [PYTHON, str(Path(__file__).with_name("colocated_worker.py")), str(out), str(quickstart_base), *folders]
    environment = os.environ | QUIET | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(worker, env=environment, capture_output=True, text=True, timeout=PATIENCE, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    answer = json.loads(out.read_text())
    assert answer["context"] == 512
    assert answer["again"] == answer["versions"][0]["completions"], "the same seeds"
    for folder, version in zip(folders, answer["versions"], strict=True):
        base = AutoModelForCausalLM.from_pretrained(quickstart_base, dtype=torch.float32)
        model = PeftModel.from_pretrained(base, folder).eval()
        assert_close(version["scores"], logps_of(model, answer["text"], 1, 1.0), rtol=0, atol=1e-4)
        for prompt, (ids, logps) in zip(answer["prompts"], version["completions"], strict=True):
            assert_close(logps, logps_of(model, prompt + ids, len(prompt), 0.7), rtol=0, atol=1e-4)
            assert len(ids) == 12 or ids[-1] == 1
    assert answer["versions"][0]["completions"] != answer["versions"][1]["completions"]


@torch.no_grad()
def logps_of(model, ids, start, temperature):
    logps = (model(torch.tensor([ids])).logits[0, :-1] / temperature).log_softmax(-1)
    return [logps[place - 1, ids[place]].item() for place in range(start, len(ids))]
