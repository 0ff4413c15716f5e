"""Runs whose completions a server samples: with the policy's adapter as it is, or not at all."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from rlhf_recipes.ppo.vllm.engine import SamplingStopped
from tests.ppo.support import logged, trained, without_chance
from tests.ppo.with_vllm.stub_vllm import Engine, serving


@pytest.fixture
def engine(tiny_model_path):
    return Engine(tiny_model_path)


@pytest.fixture
def make(make_trainer, engine):
    """Make a trainer of two rollouts of two steps, whose completions the engine samples."""
    with serving(engine) as url:

        def make_served(**fields):
            served = {"use_vllm": True, "vllm_mode": "server", "vllm_server_base_url": url, "vllm_server_timeout": 5.0}
            return make_trainer(**{"gradient_accumulation_steps": 1, **served, **fields})

        yield make_served


def noted(trainer):
    """The prompts and completions of all rollouts of a run, in the order in which they are sampled."""
    rows, sample = [], trainer.sampler

    def sample_and_note(prompt_ids, embeds=None):
        sampled = sample(prompt_ids, embeds)
        rows.extend(zip(map(tuple, prompt_ids), sampled[0], strict=True))
        return sampled

    trainer.sampler = sample_and_note
    return rows


def test_each_version_is_sent_and_sampled_from(make, engine, repo_root, tmp_path):
    run, sampled_with = make(temperature=0.7, gradient_accumulation_steps=1), []
    sample = run.sampler

    def sample_and_compare(prompt_ids, embeds=None):
        sampled, now = sample(prompt_ids, embeds), trained(run)
        saved = load_file(Path(engine.loaded[-1][1]) / "adapter_model.safetensors")
        matches = [torch.equal(now[key.replace(".weight", ".default.weight")], saved[key]) for key in saved]
        sampled_with.append(all(matches) and len(matches) == 28)
        return sampled

    run.sampler = sample_and_compare
    run.train()
    assert sampled_with == [True, True]
    assert logged(run, "kl")[0] == pytest.approx(0.0, abs=1e-9)
    assert max(logged(run, "sampling/sampling_logp_difference/max")) < 1e-5
    assert logged(run, "sampling/importance_sampling_ratio/mean") == [1.0, 1.0]
    keys = {key for key in run.state.log_history[0] if key.startswith("sampling/")}
    assert keys == set(re.findall(r"(?m)^\| `(sampling/\S+)` \|", (repo_root / "docs" / "vllm.md").read_text()))
    names, folders = zip(*engine.loaded, strict=True)
    assert len(set(names)) == len(set(folders)) == 2, "each version has a name and a folder of its own"
    assert list(engine.adapters) == [names[1]]
    assert [path.name for path in (tmp_path / "run" / "vllm_adapters").iterdir()] == [names[1]]
    requests = [each for each in engine.seen if "prompt_logprobs" not in each and each["max_tokens"] == 8]
    assert len({each["seed"] for each in requests}) == len(requests) == 8
    for each in requests:  # nothing is left to the server
        assert each["return_token_ids"] is each["ignore_eos"] is True
        assert each["stop_token_ids"] == [run.processing_class.eos_token_id]
        assert (each["temperature"], each["top_p"], each["top_k"], each["min_p"]) == (0.7, 1.0, 0, 0.0)
        assert each["repetition_penalty"] == 1.0
        assert all(isinstance(token, int) for token in each["prompt"])


def test_a_server_that_fails_is_asked_again_or_stops_the_run(make, engine):
    run = make()
    prompts, start = [[7, 8, 9], [7, 8, 9], [10, 11]], torch.get_rng_state()
    expected = run.sampler(prompts)
    assert expected[0][0] != expected[0][1], "each row has a seed of its own"
    torch.set_rng_state(start)
    loads, engine.restart_at, engine.away = len(engine.loaded), len(engine.seen) + 2, 2
    assert run.sampler(prompts) == expected
    assert len(engine.loaded) == loads + 1, "it was restarted, and got the adapter again"

    torch.set_rng_state(start)
    run.sampler._engine._timeout, engine.away = 0.2, 10**6
    with pytest.raises(SamplingStopped, match=r"has not answered for [\d.]+ seconds.*vllm serve"):
        run.sampler(prompts)
    run.sampler._engine._timeout, engine.away = 5.0, 0
    assert run.sampler(prompts) == expected, "the random numbers of a rollout that was not made are those of the next"

    engine.most_tokens = 2
    with pytest.raises(SamplingStopped, match="cut a completion off after 2 tokens, where 16 were allowed"):
        run.sampler._probe.check(run.sampler._adapter)
    engine.most_tokens, engine.stale = 10**6, True
    for name, parameter in run.model.named_parameters():
        if "lora_B.default" in name:
            parameter.data *= 1.5
    with pytest.raises(SamplingStopped, match=r"same text differ by .* nats per token.*adapter as it is now") as found:
        run.sampler(prompts)
    run.sampler._probe._tolerance = 3.0 * float(re.search(r"differ by (\S+) nats", str(found.value))[1])
    with pytest.raises(SamplingStopped, match="goes on with an earlier version of the policy's adapter"):
        run.sampler(prompts)


@pytest.mark.slow
def test_a_run_is_that_of_the_same_completions_by_transformers(make, make_trainer, engine, tmp_path):
    run = make(temperature=0.7)
    rows = noted(run)
    run.train()
    assert logged(run, "kl")[0] == pytest.approx(0.0, abs=1e-9)
    assert max(logged(run, "sampling/sampling_logp_difference/max")) < 1e-5
    assert logged(run, "sampling/importance_sampling_ratio/mean") == [1.0, 1.0]
    other = make_trainer(gradient_accumulation_steps=1, temperature=0.7)
    completions = iter(rows)

    def again(prompt, repeat):
        expected, ids = next(completions)
        assert prompt == expected
        return ids

    without_chance(other, again).train()
    for key in ("reward", "kl", "loss", "grad_norm", "critic/value_loss", "ppo/approx_kl"):
        assert_close(logged(run, key), logged(other, key), rtol=1e-3, atol=1e-5)
    for name, weight in trained(other).items():
        assert_close(trained(run)[name], weight, rtol=0, atol=2e-4)
    names, folders = zip(*engine.loaded, strict=True)
    assert len(set(names)) == len(set(folders)) == 2, "each version has a name and a folder of its own"
    assert list(engine.adapters) == [names[1]]
    assert [path.name for path in (tmp_path / "run" / "vllm_adapters").iterdir()] == [names[1]]


@pytest.mark.slow
@pytest.mark.parametrize("rows", [16, 8], ids=["within an epoch", "at the end of one"])
def test_a_run_goes_on_where_a_server_was_lost(rows, make, engine, prompts, tmp_path):
    """The checkpoint at the stop is that of a run that was not stopped: the same completions, the same weights."""
    fields = {"save_strategy": "no", "max_steps": 6, "save_only_model": True, "dataset": prompts.select(range(rows))}
    whole = make(**fields, output_dir=str(tmp_path / "whole"))
    sampled = noted(whole)
    whole.train()
    folder = tmp_path / "run" / "checkpoint-4"
    stopped = lose_the_server(make(**fields), engine)
    assert "stopped after step 4, and nothing of it is lost" in str(stopped.value)
    assert f"`resume_from_checkpoint: {folder}`" in str(stopped.value)
    files = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    stopped = lose_the_server(make(**fields), engine, resume_from_checkpoint=str(folder))
    assert str(stopped.value).endswith(f"Nothing was trained yet: resume from {folder} again.")
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == files
    resumed = make(**fields, output_dir=str(tmp_path / "resumed"))
    rest = noted(resumed)
    resumed.train(resume_from_checkpoint=str(folder))
    assert rest == sampled[-len(rest) :]
    for name, weight in trained(resumed).items():
        assert_close(weight, trained(whole)[name], rtol=0, atol=1e-6)


def lose_the_server(run, engine, **options):
    """Train until the server does not answer any more, from the fourth step on, and let it come back."""
    sample = run.sampler

    def sample_until_it_is_lost(*args):
        if run.state.global_step == 4:
            engine.away, sample._engine._timeout = 10**6, 0.2
        return sample(*args)

    run.sampler = sample_until_it_is_lost
    with pytest.raises(SamplingStopped, match=r"has not answered for [\d.]+ seconds.*vllm serve") as stopped:
        run.train(**options)
    engine.away = 0
    return stopped


@pytest.mark.slow
def test_a_stale_adapter_stops_the_run(make, engine, tmp_path):
    engine.stale = True
    run = make()
    with pytest.raises(SamplingStopped, match=r"same text differ by .* nats per token.*adapter as it is now.*step 2"):
        run.train()
    assert json.loads((tmp_path / "run" / "checkpoint-2" / "ppo_state.json").read_text())["step"] == 2


@pytest.mark.slow
def test_another_temperature_or_base_is_found_before_the_training(make, engine, tiny_model_path, tmp_path):
    engine.raw = True
    make()  # of temperature 1, at which both are one
    with pytest.raises(
        SamplingStopped, match=r"samples after a text differ by .*`--logprobs-mode processed_logprobs`"
    ):
        make(temperature=0.7)
    base = AutoModelForCausalLM.from_pretrained(tiny_model_path)
    base.lm_head.weight.data *= 1.1
    base.save_pretrained(tmp_path / "other")
    engine.base, engine.raw, engine.first, engine.adapters, engine.loaded = tmp_path / "other", False, None, {}, []
    with pytest.raises(SamplingStopped, match=r"same text differ by .*with the same weights and precision.*float32"):
        make()


@pytest.mark.slow
def test_completions_that_are_off_are_weighted(make, engine):
    """An engine with a temperature of its own, as one that rounds otherwise: TRL's weights, by hand."""
    run = make(vllm_tolerance=0.5, max_steps=2, vllm_importance_sampling_clip_max=1.02)
    complete = engine.complete
    engine.complete = lambda request: complete(request | {"temperature": 1.05} if "seed" in request else request)
    run.train()
    gap, largest, mean = (
        logged(run, f"sampling/{name}")[0]
        for name in (
            "sampling_logp_difference/mean",
            "sampling_logp_difference/max",
            "importance_sampling_ratio/mean",
        )
    )
    assert 0.001 < gap < largest < 0.5
    assert logged(run, "sampling/importance_sampling_ratio/max") == [pytest.approx(1.02)]
    assert 0.9 < mean < 1.02
    assert logged(run, "ppo/ratio_mean")[0] == pytest.approx(1.0), (
        "the policy's own log-probabilities are the old ones"
    )


@pytest.mark.slow
def test_what_vllm_would_not_sample_from_is_refused(make, make_trainer, engine, tiny_model_path, prompts):
    functions = {"reward_funcs": lambda completion_ids, **kwargs: [0.0] * len(completion_ids), "critic_init": "policy"}
    with pytest.raises(ValueError, match="trained as a whole. Give it an adapter"):
        make(model=tiny_model_path, **functions)
    config = LoraConfig(task_type="CAUSAL_LM", r=4, rank_pattern={"q_proj": 2}, target_modules=["q_proj", "v_proj"])
    with pytest.raises(ValueError, match="cannot have `rank_pattern`"):
        make(model=tiny_model_path, peft_config=config, **functions)
    assert engine.loaded == []
    engine.context = 10
    with pytest.raises(
        ValueError, match="context ends at 10 tokens, and the longest prompt and its completion have 12"
    ):
        make()
    engine.context, engine.without_updates = 128, True
    with pytest.raises(SamplingStopped, match="cannot be loaded at run time.*VLLM_ALLOW_RUNTIME_LORA_UPDATING=True"):
        make()


@pytest.mark.slow
def test_an_evaluation_samples_from_the_same_policy(make, engine):
    run = make(max_steps=2, eval_dataset=Dataset.from_list([{"prompt": "the film was"}] * 3))
    run.train()
    loads = len(engine.loaded)
    metrics = run.evaluate()
    assert math.isfinite(metrics["eval_reward"])
    assert len(engine.loaded) == loads + 1, "the version after the last update"
