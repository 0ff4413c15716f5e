"""vLLM in the trainer's process, with a stand-in for its `LLM`; the real one is in `test_real.py`."""

from types import SimpleNamespace

import pytest
from torch.testing import assert_close

from rlhf_recipes.ppo.vllm.colocated import ColocatedVLLM, start_vllm
from rlhf_recipes.ppo.vllm.engine import Adapter, Drawing, SamplingStopped
from rlhf_recipes.ppo.vllm.sampler import VLLMSampler
from tests.ppo.support import logged
from tests.ppo.with_vllm.stub_vllm import Engine, merged


class LLM:
    """What `ColocatedVLLM` uses of `vllm.LLM`. As the real one, it goes on with what it loaded under a number."""

    def __init__(self, engine):
        self.engine, self.numbers = engine, {}
        self.llm_engine = SimpleNamespace(
            model_config=SimpleNamespace(max_model_len=engine.context),
            add_lora=self.add_lora,
            remove_lora=lambda number: self.numbers.pop(number) is not None,
        )

    def add_lora(self, request):
        if request.lora_int_id not in self.numbers:
            self.numbers[request.lora_int_id] = merged(self.engine.base, request.lora_path)
        return True

    def generate(self, prompts, sampling_params, lora_request, use_tqdm):
        assert use_tqdm is False
        self.engine.adapters["in use"] = self.numbers[lora_request.lora_int_id]
        return [
            self.answer(each["prompt_token_ids"], vars(params))
            for each, params in zip(prompts, sampling_params, strict=True)
        ]

    def answer(self, prompt, params):
        status, answer = self.engine.complete({"model": "in use", "prompt": prompt, **params})
        if status != 200:
            raise ValueError(answer)
        [choice] = answer["choices"]
        if scores := choice.get("prompt_logprobs"):
            places = [{int(token): SimpleNamespace(**value) for token, value in place.items()} for place in scores[1:]]
            return SimpleNamespace(prompt_logprobs=[None, *places])
        values = zip(choice["token_ids"], choice["logprobs"]["token_logprobs"], strict=True)
        places = [{token: SimpleNamespace(logprob=value)} for token, value in values]
        return SimpleNamespace(outputs=[SimpleNamespace(token_ids=tuple(choice["token_ids"]), logprobs=places)])


def request(name, number, path):
    return SimpleNamespace(lora_name=name, lora_int_id=number, lora_path=path)


def params(**fields):
    return SimpleNamespace(**fields)


def test_versions_follow_each_other(tiny_model_path, sft_adapter, reward_adapter, tmp_path):
    llm = LLM(Engine(tiny_model_path))
    engine = ColocatedVLLM(llm, request, params)
    assert engine.context == 40
    drawing, prompts = Drawing(0.7, max_tokens=5, ends=(1,)), [[7, 8], [7, 8]]
    first, second = Adapter("one", sft_adapter), Adapter("two", sft_adapter)
    engine.load(first)
    engine.load(first)
    completions = engine.sample(first, prompts, [3, 4], drawing)
    assert completions[0] != completions[1]
    assert [len(each.ids) == len(each.logps) <= 5 for each in completions] == [True, True]
    scores = engine.score(first, [7, 8, 9])
    engine.load(second)
    engine.unload(first)
    engine.unload(first)
    assert list(llm.numbers) == [2]
    assert engine.loads == 2
    assert engine.score(second, [7, 8, 9]) == scores
    assert engine.sample(second, prompts, [3, 4], drawing) == completions
    with pytest.raises(SamplingStopped, match="vLLM failed in this process: ValueError: This model's maximum context"):
        engine.sample(second, [[7] * 38], [3], drawing)
    llm.llm_engine.add_lora = lambda request: False
    with pytest.raises(SamplingStopped, match="did not load the adapter"):
        engine.load(first)


def test_without_vllm_it_says_what_to_do():
    with pytest.raises(
        ModuleNotFoundError, match="vllm is not installed there.*run it apart, with `vllm_mode: server`"
    ):
        start_vllm(
            "base",
            dtype="float32",
            four_bits=False,
            rank=8,
            gpu_memory_utilization=0.3,
            max_model_length=None,
            model_impl="vllm",
            trust_remote_code=False,
        )


@pytest.mark.slow
def test_a_run(make_trainer, tiny_model_path):
    run = make_trainer(gradient_accumulation_steps=1)
    llm = LLM(Engine(tiny_model_path))
    run.sampler = VLLMSampler(run, ColocatedVLLM(llm, request, params))
    run.train()
    assert_close(logged(run, "kl")[0], 0.0)
    assert max(logged(run, "sampling/sampling_logp_difference/max")) < 1e-5
    assert list(llm.numbers) == [2], "the version of the second rollout"
