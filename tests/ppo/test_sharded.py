"""PPO under FSDP2 or ZeRO-2 is PPO under DDP and on one process: gradients, rollouts, files, resumed runs."""

import json
import os
import shutil
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import DistributedType
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from torch.testing import assert_close

from rlhf_recipes.ppo.checks import check_not_sharded
from rlhf_recipes.ppo.inputs import check_given
from rlhf_recipes.ppo.sharded import check_sharding

WORKER = Path(__file__).with_name("sharded_worker.py")
FOUR_BITS = {"bnb_4bit_quant_storage": "float32"}
ALL_CONTROLS = {
    "max_steps": 6,
    "num_iterations": 3,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "target_kl": 0.0095,  # drops the third update
    "score_scaling": "running",
    "kl_controller": "adaptive",
    "kl_target": 0.01,
    "kl_horizon": 16,
}
HEAD = {"critic": "head", "gradient_checkpointing": True, "kl_placement": "loss", "kl_estimator": "full"}
WARMUP = {"critic_warmup_steps": 2, "weight_decay": 0.1}
SAVING = {
    "save_strategy": "steps",
    "save_steps": 1,
    "steps_per_generation": 4,
    "max_steps": 6,
    "critic_warmup_steps": 1,
    "lr_scheduler_type": "linear",
}

IN_16_BITS = {"bnb_4bit_quant_storage": "bfloat16", "bnb_4bit_compute_dtype": "bfloat16"}
# Of three processes one holds a part of the critic's head, and two hold nothing of it
OF_TWELVE = {"gradient_accumulation_steps": 1, "gradient_checkpointing": True}
MORE = {
    "adapter": {"rows": 12, "evaluate": True, "fields": ALL_CONTROLS | OF_TWELVE},
    "four_bits": {"rows": 12, "evaluate": True, "fields": OF_TWELVE, "quantization": FOUR_BITS},
}


def cases(policy, base, reward_adapter):
    """Trainings that are the same on one process and on two, and then those that are not."""
    same = {
        "adapter": {"fields": ALL_CONTROLS, "evaluate": True},
        "head": {"fields": HEAD, "evaluate": True},
        "four_bits": {"quantization": FOUR_BITS, "evaluate": True, "fields": {"gradient_checkpointing": True}},
        "replicated": {"quantization": {"bnb_4bit_quant_storage": "uint8"}},
        "model": {"fields": {"critic": "model"}, "more": {"critic_model": str(reward_adapter)}, "evaluate": True},
        "whole": {"model": base, "evaluate": True},
    }
    layers = {"critic_layers": 1, "ptx_coef": 0.3, "ptx_batch_size": 2}
    of_two = {  # each process has pretraining texts of its own
        "layers": {"fields": layers},
        "warmup": {"fields": WARMUP},
        "warmup_head": {"fields": WARMUP | {"critic": "head"}},
        "tensorflow": {"fields": {"tensorflow_adam": True}},
    }
    saved = {"chance": True, "quantization": FOUR_BITS, "fields": SAVING, "evaluate": True}
    of_two |= {
        "head_bf16": {"fields": HEAD | {"bf16": True}},
        "four_bits_bf16": {"quantization": IN_16_BITS, "fields": {"gradient_checkpointing": True, "bf16": True}},
    }
    return same, of_two, {"saved": saved, "past": {}, "infinite": {}, "lost": {}}


def run(command, arguments, repo_root, check=True):
    environment = os.environ | {"PYTHONPATH": str(repo_root), "OMP_NUM_THREADS": "1"}
    finished = subprocess.run(
        [*command, str(WORKER), *map(str, arguments)], env=environment, capture_output=True, text=True, timeout=1800
    )
    assert not check or finished.returncode == 0, finished.stderr[-5000:]
    return finished


def launch(repo_root, arguments, check=True, file="fsdp2", processes=2):
    """Launch processes as a launch file says."""
    file = repo_root / "recipes" / "accelerate" / f"{file}.yaml"
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--config_file", str(file)]
    command += ["--num_processes", str(processes), "--main_process_port", "0"]
    return run(command, arguments, repo_root, check)


@pytest.fixture(scope="module")
def adapters(sft_adapter, reward_adapter):
    return sft_adapter, reward_adapter


@pytest.fixture(scope="module")
def of_all(adapters, tiny_model_path):
    return cases(adapters[0], tiny_model_path, adapters[1])


@pytest.fixture(scope="module")
def unspread(adapters, of_all, tmp_path_factory, repo_root):
    """Results and weights of each case by launch: `one` and `ddp`."""
    same, of_two, _ = of_all
    folders = {name: tmp_path_factory.mktemp(name) for name in ("one", "ddp")}
    os.environ["ACCELERATE_USE_CPU"] = "true"
    try:
        run([sys.executable], [*adapters, folders["one"], json.dumps(same)], repo_root)
        two = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        run(two, [*adapters, folders["ddp"], json.dumps(same | of_two)], repo_root)
    finally:
        del os.environ["ACCELERATE_USE_CPU"]
    return folders


@pytest.fixture(scope="module")
def found(unspread, adapters, of_all, tmp_path_factory, repo_root):
    """The same, with those of `fsdp`."""
    folder, work = tmp_path_factory.mktemp("fsdp"), of_all[0] | of_all[1] | of_all[2]
    for name in ("tensorflow", "infinite", "lost"):
        del work[name]
    launch(repo_root, [*adapters, folder, json.dumps(work)])
    return unspread | {"fsdp": folder}


@pytest.fixture(scope="module")
def zero(unspread, adapters, of_all, tmp_path_factory, repo_root):
    """The same, with those of `zero2`."""
    if find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed: pip install 'rlhf-recipes[deepspeed]'")
    folder, work = tmp_path_factory.mktemp("zero2"), of_all[0] | of_all[1] | of_all[2]
    # DeepSpeed refuses bf16, and says itself of a gradient past it that something is wrong, in other words
    for name in ("past", "head_bf16", "four_bits_bf16"):
        del work[name]
    launch(repo_root, [*adapters, folder, json.dumps(work)], file="zero2")
    return unspread | {"zero2": folder}


@pytest.fixture(scope="module")
def one_of_twelve(sft_adapter, reward_adapter, tmp_path_factory, repo_root):
    """Results of one process at a batch that three and four processes can share."""
    folder = tmp_path_factory.mktemp("one")
    run([sys.executable], [sft_adapter, reward_adapter, folder, json.dumps(MORE)], repo_root)
    return folder


def read(folders, kind, case, processes=2):
    stem = folders[kind] / f"{case}_{1 if kind == 'one' else processes}"
    return json.loads(Path(f"{stem}.json").read_text()), load_file(f"{stem}.safetensors"), stem


def steps(result):
    return [entry for entry in result["log"] if "loss" in entry]


def assert_same_steps(ours, theirs):
    assert len(ours) == len(theirs) >= 4
    for found_step, step in zip(ours, theirs, strict=True):
        of_rollouts = [key for key in ("kl", "reward") if key in step]
        for key in ("loss", "grad_norm", "critic/value_loss", "ppo/updates_made", "entropy", *of_rollouts):
            assert found_step[key] == pytest.approx(step[key], rel=1e-5, abs=1e-5), (step["step"], key)


def assert_same_evaluations(ours, theirs):
    for side in ("policy", "reference"):
        for key in ("reward_score", "kl", "length", "eos_rate"):
            assert ours[side][key] == pytest.approx(theirs[side][key], rel=1e-4, abs=1e-4), (side, key)


def distance(ours, theirs):
    """The norm of the difference of two sets of weights."""
    return sum((ours[name] - weight).square().sum().item() for name, weight in theirs.items()) ** 0.5


def assert_same_weights(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, weight in theirs.items():
        assert_close(ours[name], weight, atol=1e-5, rtol=1e-5, msg=name)


SAME = ["adapter", "head", "four_bits", "replicated", "model", "whole"]
OF_TWO = ["layers", "warmup", "warmup_head"]


def assert_as_unspread(folders, kind, case):
    """A spread run logged, saved and evaluated what one process and DDP did."""
    spread, weights, folder = read(folders, kind, case)
    for other in ("ddp", "one") if case in SAME else ("ddp",):
        expected, expected_weights, other_folder = read(folders, other, case)
        assert_same_steps(steps(spread), steps(expected))
        assert_same_weights(weights, expected_weights)
        files = sorted(path.relative_to(other_folder) for path in other_folder.glob("final/**/*.safetensors"))
        assert len(files) == 2 * ("evaluation" in expected)  # policy and critic
        for file in files:
            assert_same_weights(load_file(folder / file), load_file(other_folder / file))
        if files:
            assert_same_evaluations(spread["evaluation"], expected["evaluation"])
    if case == "adapter":
        assert [entry["ppo/updates_made"] for entry in steps(spread)] == [1.0, 1.0, 0.0, 1.0, 1.0, 1.0]
        assert any("eval_kl" in entry for entry in spread["log"])
    return spread


@pytest.mark.slow
@pytest.mark.parametrize("case", [*SAME, *OF_TWO])
def test_sharded_processes_train_as_ddp_and_as_one(case, found):
    sharded = assert_as_unspread(found, "fsdp", case)
    assert sharded["kind"] == "DistributedType.FSDP"
    if case == "replicated":
        assert sharded["held"] < 0.45, "4-bit weights in uint8 are whole on each process"
    else:
        assert sharded["held"] == pytest.approx(0.5, abs=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("case", [*SAME, *OF_TWO, "tensorflow"])
def test_zero_trains_as_ddp_and_as_one(case, zero):
    result = assert_as_unspread(zero, "zero2", case)
    assert result["kind"] == "DistributedType.DEEPSPEED"
    if case != "tensorflow":
        assert result["adam"] == pytest.approx(0.5, abs=0.01)
        assert read(zero, "ddp", case)[0]["adam"] == 1.0


@pytest.mark.slow
@pytest.mark.parametrize("processes", [3, 4])
def test_more_processes_train_as_one_and_resume_exactly(
    processes, one_of_twelve, sft_adapter, reward_adapter, tmp_path, repo_root
):
    """Three do not divide the widths of the weights, so that their parts are of different sizes, or empty."""
    saved = {"rows": processes, "chance": True, "quantization": FOUR_BITS, "fields": SAVING, "evaluate": True}
    resumed = {"resumed": saved | {"resume": str(tmp_path / f"saved_{processes}" / "checkpoint-3")}}
    work = json.dumps(MORE | {"saved": saved} | resumed)
    launch(repo_root, [sft_adapter, reward_adapter, tmp_path, work], processes=processes)
    folders = {"fsdp": tmp_path, "one": one_of_twelve}
    for case in MORE:
        sharded, weights, _ = read(folders, "fsdp", case, processes)
        expected, expected_weights, _ = read(folders, "one", case)
        assert sharded["held"] == pytest.approx(1 / processes, abs=0.05)
        assert_same_steps(steps(sharded), steps(expected))
        assert_same_weights(weights, expected_weights)
        assert_same_evaluations(sharded["evaluation"], expected["evaluation"])
    whole, again = (read(folders, "fsdp", case, processes) for case in ("saved", "resumed"))
    assert [entry["loss"] for entry in steps(again[0])] == [entry["loss"] for entry in steps(whole[0])]
    assert len(steps(whole[0])) == SAVING["max_steps"]
    assert all(torch.equal(again[1][name], weight) for name, weight in whole[1].items())
    assert again[0]["evaluation"]["policy"] == whole[0]["evaluation"]["policy"]


@pytest.mark.slow
@pytest.mark.parametrize(("case", "share"), [("head", 0.01), ("four_bits", 0.5)])
def test_16_bits_are_those_of_ddp(case, share, found):
    """Autocast rounds the same numbers, so that launches differ by less than bfloat16 does from float32.

    The losses of the first step are the same. Later a sum in another order lets some weight round to the other side.
    With `critic: head` both launches make one backward pass. With an adapter DDP makes two, of which the policy's
    is rounded before it is scaled: its distance was 0.15 of that to float32, and that of DDP to one process 0.2.
    """
    (ours, weights, _), (theirs, ddp_weights, _) = (read(found, kind, f"{case}_bf16") for kind in ("fsdp", "ddp"))
    assert (ours["precision"], theirs["precision"]) == ("bf16", "bf16")
    assert ours["held"] == pytest.approx(0.5, abs=0.05)
    for key in ("loss", "critic/value_loss", "entropy", "reward", "kl"):
        assert steps(ours)[0][key] == pytest.approx(steps(theirs)[0][key], rel=1e-5, abs=1e-5), key
    in_float32 = read(found, "ddp", case)[1]
    assert distance(weights, ddp_weights) < share * distance(ddp_weights, in_float32)


@pytest.mark.slow
def test_others_read_what_it_saved(found):
    weights, folder = read(found, "fsdp", "adapter")[1:]
    policy = AutoPeftModelForCausalLM.from_pretrained(folder / "final")
    for name, weight in policy.named_parameters():
        if "lora_" in name:
            assert torch.equal(weight, weights[name])


@pytest.mark.slow
def test_a_gradient_past_fsdp_stops_every_process_at_the_first_step(found):
    for rank in (0, 1):
        error = (found["fsdp"] / f"past_{rank}.txt").read_text()
        assert error.startswith("RuntimeError: The policy got no gradient in the first step: it was taken past FSDP.")


@pytest.mark.slow
def test_a_gradient_lost_before_deepspeed_stops_every_process_at_the_first_step(zero):
    for rank in (0, 1):
        error = (zero["zero2"] / f"lost_{rank}.txt").read_text()
        assert error.startswith("RuntimeError: The gradient of the critic is not the mean of those of the processes")


@pytest.mark.slow
def test_an_infinite_gradient_of_one_process_stops_all_under_zero(zero):
    for rank in (0, 1):
        error = (zero["zero2"] / f"infinite_{rank}.txt").read_text()
        assert error.startswith("FloatingPointError: The norm of the gradient is inf.")
        assert (zero["zero2"] / "infinite_2" / f"nonfinite_batch_{rank}.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "file"), [("found", "fsdp2"), ("zero", "zero2")])
def test_a_process_that_is_killed_stops_the_others_and_the_run_resumes_exactly(
    kind, file, request, adapters, of_all, tmp_path, repo_root
):
    folders, case = request.getfixturevalue(kind), of_all[2]["saved"]
    killed = [*adapters, tmp_path, json.dumps({"saved": case | {"killed_at": 3}})]
    stopped = launch(repo_root, killed, check=False, file=file)
    assert (tmp_path / "killed").exists(), stopped.stderr[-5000:]
    assert time.time() - float((tmp_path / "killed").read_text()) < 60
    assert stopped.returncode != 0
    assert not (tmp_path / "saved_2.json").exists()
    checkpoint = tmp_path / "saved_2" / "checkpoint-3"  # in the middle of a rollout
    assert {f"rollout_{rank}.safetensors" for rank in (0, 1)} <= {path.name for path in checkpoint.iterdir()}
    resumed = json.dumps({"saved": case | {"resume": str(checkpoint)}})
    launch(repo_root, [*adapters, tmp_path, resumed], file=file)
    name = "fsdp" if file == "fsdp2" else file
    whole, resumed = read(folders, name, "saved"), read({name: tmp_path}, name, "saved")
    numbers = [
        [(e["loss"], e["grad_norm"], e.get("kl")) for e in log[0]["log"] if "loss" in e] for log in (whole, resumed)
    ]
    assert numbers[0] == numbers[1]
    assert len(numbers[0]) == SAVING["max_steps"]
    assert all(torch.equal(resumed[1][name], weight) for name, weight in whole[1].items())
    assert whole[0]["evaluation"]["policy"] == resumed[0]["evaluation"]["policy"]


def ip(*words):
    return subprocess.run(["ip", *words], capture_output=True, text=True, check=True)


@pytest.fixture
def two_nodes():
    """Names, addresses and network devices of two nodes that see each other over one cable only."""
    names = [f"rlhf{os.getpid()}{letter}" for letter in "ab"]
    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", "veth-a", "netns", names[0], "type", "veth", "peer", "name", "veth-b", "netns", names[1])
    except (OSError, subprocess.CalledProcessError) as error:
        for name in names if shutil.which("ip") else ():
            subprocess.run(["ip", "netns", "del", name], capture_output=True)
        pytest.skip(f"no network namespaces can be made here: {getattr(error, 'stderr', None) or error}")
    nodes = [(names[0], "10.77.0.1", "veth-a"), (names[1], "10.77.0.2", "veth-b")]
    for name, address, device in nodes:
        ip("-n", name, "addr", "add", f"{address}/24", "dev", device)
        for link in (device, "lo"):
            ip("-n", name, "link", "set", link, "up")
    yield nodes
    for name in names:
        ip("netns", "del", name)


@pytest.mark.slow
def test_two_nodes_train_as_one_and_stop_when_one_is_gone(two_nodes, found, adapters, of_all, tmp_path, repo_root):
    """A training as on one machine, and then one in which the process on the second node is killed."""
    file = repo_root / "recipes" / "accelerate" / "fsdp2_two_nodes.yaml"
    case = of_all[0]["four_bits"]
    work = json.dumps({"four_bits": case, "gone": {"killed_at": 2}})
    launches = []
    for rank, (name, _, device) in enumerate(two_nodes):
        command = ["ip", "netns", "exec", name, sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
        command += ["--config_file", str(file), "--main_process_ip", two_nodes[0][1], "--machine_rank", str(rank)]
        command += ["--num_processes", "2", str(WORKER), *map(str, (*adapters, tmp_path)), work]
        own = {"PYTHONPATH": str(repo_root), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": device}
        log = (tmp_path / f"node_{rank}.txt").open("w")
        launches.append(subprocess.Popen(command, env=os.environ | own, stdout=log, stderr=subprocess.STDOUT))
    codes = [process.wait(1800) for process in launches]
    logs = [(tmp_path / f"node_{rank}.txt").read_text()[-3000:] for rank in (0, 1)]
    assert (tmp_path / "killed").exists(), logs
    assert time.time() - float((tmp_path / "killed").read_text()) < 60
    assert 0 not in codes, logs
    assert not (tmp_path / "gone_2.json").exists()
    two, one = (read(folders, "fsdp", "four_bits") for folders in ({"fsdp": tmp_path}, found))
    assert_same_steps(steps(two[0]), steps(one[0]))
    assert_same_weights(two[1], one[1])


def trainer(image_reader=None, plugin=None, in_8_bits=False, **args):
    base = SimpleNamespace(is_loaded_in_8bit=in_8_bits)
    own = {"fsdp_version": 2, "mixed_precision_policy": "bf16"}
    state = SimpleNamespace(fsdp_plugin=None if plugin is None else SimpleNamespace(**own | plugin))
    return SimpleNamespace(
        is_deepspeed_enabled=False,
        is_fsdp_enabled=plugin is not None,
        accelerator=SimpleNamespace(state=state),
        image_reader=image_reader,
        roles=SimpleNamespace(model=SimpleNamespace(get_base_model=lambda: base)),
        args=SimpleNamespace(
            **{"fp16": False, "optim": "adamw_torch_fused", "ema_decay": None, "use_vllm": False} | args
        ),
    )


@pytest.mark.parametrize(
    ("settings", "instead"),
    [
        ({"plugin": {"fsdp_version": 1}}, "Set `fsdp_version: 2`"),
        ({"plugin": {}, "fp16": True}, "Set `bf16: true`"),
        ({"plugin": {}, "optim": "paged_adamw_8bit"}, "Set `optim: adamw_torch`"),
        ({"plugin": {}, "ema_decay": 0.9}, r"launch with recipes/accelerate/ddp\.yaml"),
        ({"plugin": {}, "use_vllm": True}, r"Leave `use_vllm` out"),
        ({"plugin": {}, "in_8_bits": True}, "Load the base in 4 bits, with `bnb_4bit_quant_storage: bfloat16`"),
        ({"plugin": {}, "image_reader": object()}, r"Launch with recipes/accelerate/ddp\.yaml"),
    ],
)
def test_refusals_name_what_to_use_instead(settings, instead):
    with pytest.raises(ValueError, match=instead):
        check_sharding(trainer(**settings))


def test_what_is_allowed_computes_in_16_bits_by_autocast_alone():
    check_sharding(trainer())
    allowed = trainer(plugin={})
    check_sharding(allowed)
    assert allowed.accelerator.state.fsdp_plugin.mixed_precision_policy is None


def test_a_launch_in_which_one_process_reads_the_base_is_refused(monkeypatch, prompts):
    monkeypatch.setattr("rlhf_recipes.ppo.inputs.is_fsdp_enabled", lambda: True)
    with pytest.raises(ValueError, match="`fsdp_cpu_ram_efficient_loading`.*Set it to false"):
        check_given(None, prompts, None, None, None)


def test_recomputation_by_fsdp_is_refused_before_transformers_would_advise_it(monkeypatch, make_config, prompts):
    instead = "`fsdp_activation_checkpointing`.*to false.*and `activation_checkpointing: true` in the stage's YAML"
    monkeypatch.setenv("FSDP_ACTIVATION_CHECKPOINTING", "true")  # as accelerate's launcher does
    with pytest.raises(ValueError, match=instead):
        check_given(make_config(), prompts, None, None, None)
    monkeypatch.setenv("FSDP_ACTIVATION_CHECKPOINTING", "false")
    check_given(make_config(), prompts, None, None, None)
    own = make_config()
    own.fsdp_plugin_args = {"activation_checkpointing": True}  # as transformers does for `fsdp_config`
    with pytest.raises(ValueError, match=instead):
        check_given(own, prompts, None, None, None)


@pytest.mark.parametrize("launch", [{"is_fsdp_enabled": True}, {"is_deepspeed_enabled": True}])
def test_trainers_of_groups_are_refused_and_name_ddp(launch):
    other = SimpleNamespace(**{"is_fsdp_enabled": False, "is_deepspeed_enabled": False} | launch)
    with pytest.raises(ValueError, match=r"Launch with recipes/accelerate/ddp\.yaml"):
        check_not_sharded(other)


@pytest.mark.parametrize("file", ["fsdp2", "fsdp2_8_gpus", "fsdp2_two_nodes"])
def test_accelerate_reads_the_launch_files(file, repo_root):
    config = load_config_from_file(str(repo_root / "recipes" / "accelerate" / f"{file}.yaml"))
    assert config.distributed_type == DistributedType.FSDP
    assert config.num_processes == {"fsdp2": 2, "fsdp2_8_gpus": 8, "fsdp2_two_nodes": 16}[file]
    assert config.num_machines == 1 + (file == "fsdp2_two_nodes")
    of_fsdp2 = yaml.safe_load((repo_root / "recipes" / "accelerate" / "fsdp2.yaml").read_text())["fsdp_config"]
    assert config.fsdp_config == of_fsdp2
    known = {name.removeprefix("--") for action in launch_command_parser()._actions for name in action.option_strings}
    assert of_fsdp2.keys() <= known, "accelerate would leave out what it does not know"
