"""Run by the interpreter of vLLM's environment: sample and score with two versions of an adapter, into a file."""

import json
import sys
from pathlib import Path

from rlhf_recipes.ppo.vllm.colocated import start_vllm
from rlhf_recipes.ppo.vllm.engine import Adapter, Drawing

PROMPTS, TEXT = [[5, 6, 7], [5, 6, 7], [9, 10]], [20 + place % 90 for place in range(150)]


def rows(completions):
    return [(each.ids, each.logps) for each in completions]


if __name__ == "__main__":
    out, base, *folders = sys.argv[1:]
    engine = start_vllm(
        base,
        dtype="float32",
        four_bits=False,
        rank=8,
        gpu_memory_utilization=0.3,
        max_model_length=None,
        model_impl="vllm",
        trust_remote_code=False,
    )
    drawing, versions, last = Drawing(0.7, max_tokens=12, ends=(1,)), [], None
    answer = {"context": engine.context, "prompts": PROMPTS, "text": TEXT, "versions": versions}
    for number, folder in enumerate(folders):
        adapter = Adapter(f"policy-{number}", Path(folder))
        engine.load(adapter)
        if last is not None:
            engine.unload(last)
        completions = rows(engine.sample(adapter, PROMPTS, [11, 12, 13], drawing))
        versions.append({"completions": completions, "scores": engine.score(adapter, TEXT)})
        if last is None:
            answer["again"] = rows(engine.sample(adapter, PROMPTS, [11, 12, 13], drawing))
        last = adapter
    Path(out).write_text(json.dumps(answer))  # on its standard output vLLM writes too, and after this
