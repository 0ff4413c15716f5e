"""Fields about vLLM: honoured, refused where they have no effect, and what contradicts them."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from peft import LoraConfig

from rlhf_recipes import PPOConfig
from rlhf_recipes.ppo.unused import NOT_HONOURED
from rlhf_recipes.ppo.vllm.sampler import start_engine

PAGE = Path(__file__).resolve().parents[3] / "docs" / "vllm.md"
SERVER = {"use_vllm": True, "vllm_mode": "server", "vllm_server_base_url": "http://127.0.0.1:8000"}


def test_fields_of_either_mode(make_config):
    config = make_config(**SERVER, vllm_server_timeout=5.0, vllm_tolerance=0.1, vllm_importance_sampling_clip_min=0.5)
    assert config.vllm_importance_sampling_mode == "token_truncate"
    assert config.vllm_importance_sampling_clip_max == 3.0
    make_config(
        use_vllm=True, vllm_max_model_length=64, vllm_gpu_memory_utilization=0.5, vllm_model_impl="transformers"
    )
    make_config(use_vllm=True, vllm_importance_sampling_correction=False)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"vllm_mode": "server"}, "`vllm_mode` is 'server', but `use_vllm` is false. Set `use_vllm: true`"),
        ({"vllm_tolerance": 0.1}, "`vllm_tolerance` is 0.1, but `use_vllm` is false"),
        ({"use_vllm": True, "vllm_mode": "serve"}, "`vllm_mode` must be one of server, colocate, got 'serve'"),
        (
            {"use_vllm": True, "vllm_importance_sampling_mode": "word"},
            "`vllm_importance_sampling_mode` must be one of token_truncate",
        ),
        ({**SERVER, "vllm_server_base_url": None}, "`vllm_server_base_url` must be the address.*got None"),
        ({**SERVER, "vllm_server_base_url": "127.0.0.1:8000"}, "`vllm_server_base_url` must be the address"),
        ({**SERVER, "vllm_server_base_url": "file:///etc"}, "`vllm_server_base_url` must be the address"),
        ({**SERVER, "vllm_max_model_length": 64}, "is 'server': start the server with `--max-model-len`, and remove"),
        ({**SERVER, "vllm_model_impl": "transformers"}, "start the server with `--model-impl`, and remove it"),
        ({"use_vllm": True, "vllm_server_timeout": 5.0}, "no server to wait for. Set `vllm_mode: server`, or remove"),
        ({"use_vllm": True, "vllm_server_base_url": "http://127.0.0.1:8000"}, "Set `vllm_mode: server`, or remove it"),
        ({**SERVER, "vllm_server_timeout": 0.0}, "`vllm_server_timeout` must be positive, got 0.0"),
        ({**SERVER, "vllm_tolerance": -1.0}, "`vllm_tolerance` must be positive, got -1.0"),
        ({**SERVER, "vllm_importance_sampling_clip_max": 0.0}, "`vllm_importance_sampling_clip_max` must be positive"),
        (
            {"use_vllm": True, "vllm_gpu_memory_utilization": 1.5},
            r"`vllm_gpu_memory_utilization` must lie in \(0, 1\]",
        ),
        ({**SERVER, "generation_kwargs": {"use_cache": True}}, "`generation_kwargs` is .* generation by transformers"),
        ({**SERVER, "cache_implementation": "static"}, "`cache_implementation` is .* generation by transformers"),
        ({**SERVER, "top_p": 0.9}, "`top_p` is 0.9.*sampled from the policy itself"),
        ({**SERVER, "vllm_group_port": 51217}, "`vllm_group_port` is 51217, but PPO does not use it.*Remove it"),
        ({**SERVER, "vllm_server_port": 8001}, "give the whole address in `vllm_server_base_url`"),
        ({"use_vllm": True, "vllm_tensor_parallel_size": 2}, "start a server with `--tensor-parallel-size`"),
        ({"use_vllm": True, "vllm_enable_sleep_mode": True}, "with little memory, start a server on another device"),
    ],
)
def test_fields_that_are_refused(make_config, fields, message):
    with pytest.raises(ValueError, match=message):
        make_config(**fields)


def test_the_page_has_every_field_with_its_default():
    page = PAGE.read_text()
    rows = re.findall(r"(?m)^\| \**`(\w+)`\** \| `([^`]+)` \|", page)
    fields = {name: field.default for name, field in PPOConfig.__dataclass_fields__.items() if "vllm" in name}
    honoured = {name: default for name, default in fields.items() if name not in NOT_HONOURED}
    assert {name: yaml.safe_load(default) for name, default in rows} == honoured
    refused = page.split("## What is refused")[1].split("## ")[0]
    assert fields.keys() - honoured.keys() - set(re.findall(r"`(\w+)`", refused)) == {"vllm_importance_sampling_cap"}


def policy(whole=False, image_reader=None, processes=1, mode="colocate"):
    """What is looked at of a trainer before vLLM is started."""
    model = SimpleNamespace(peft_config={"default": LoraConfig()})
    return SimpleNamespace(
        trains_whole_model=whole,
        image_reader=image_reader,
        accelerator=SimpleNamespace(num_processes=processes),
        roles=SimpleNamespace(model=model),
        args=SimpleNamespace(vllm_mode=mode),
    )


@pytest.mark.parametrize(
    ("facts", "instead"),
    [
        ({"whole": True}, r"Give it an adapter \(`peft_config`, `use_peft: true`\), or remove `use_vllm`"),
        ({"image_reader": object()}, "the prompts have pictures. Remove `use_vllm`"),
        ({"processes": 2}, "With several, start a server, and set `vllm_mode: server`"),
    ],
)
def test_runs_that_are_refused_name_what_to_use_instead(facts, instead):
    with pytest.raises(ValueError, match=instead):
        start_engine(policy(**facts))
