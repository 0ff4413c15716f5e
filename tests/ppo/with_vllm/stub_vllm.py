"""A server that speaks vLLM's protocol and samples with transformers and PEFT, one row and one token at a time.

It is the oracle of the tests: adapters come from their folders alone, log-probabilities from whole texts.
"""

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, DynamicCache


def merged(base, folder):
    """The base with an adapter added to its weights, in the way of PEFT and not in that of the trainer."""
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
    return model.merge_and_unload().eval()


class Engine:
    """What a server keeps. The attributes in the second paragraph make it misbehave."""

    def __init__(self, base, context=40):
        self.base, self.context, self.lock = base, context, threading.RLock()
        self.first, self.adapters, self.loaded, self.seen = None, {}, [], []
        self.stale = False  # an adapter that is loaded after the first one computes what the first one does
        self.raw = False  # log-probabilities without the temperature
        self.without_updates = False  # no adapters at run time
        self.most_tokens = 10**6  # of a completion
        self.away = 0  # requests that it drops, before it is there again
        self.restart_at = None  # number of the completion at which it forgets all adapters

    def load(self, name, folder):
        if name in self.adapters:
            return 400, f"The lora adapter '{name}' has already been loaded."
        if not Path(folder).is_dir():
            return 404, f"Loading lora {name} failed: No adapter found for {folder}"
        self.loaded.append((name, folder))
        self.first = self.first or merged(self.base, folder)
        self.adapters[name] = self.first if self.stale or len(self.loaded) == 1 else merged(self.base, folder)
        return 200, None

    def unload(self, name):
        kept = self.adapters.pop(name, None)
        return (200, None) if kept else (404, f"The lora adapter '{name}' cannot be found.")

    @torch.no_grad()
    def logits(self, name, ids, cache=None):
        return self.adapters[name](input_ids=torch.tensor([ids]), past_key_values=cache).logits[0].double()

    def complete(self, request):
        self.seen.append(request)
        if self.restart_at is not None and len(self.seen) >= self.restart_at:
            self.adapters, self.restart_at = {}, None
        name, prompt = request["model"], request["prompt"]
        if name not in self.adapters:
            return 404, f"The model `{name}` does not exist."
        if len(prompt) + request["max_tokens"] > self.context:
            return 400, f"This model's maximum context length is {self.context} tokens."
        choice = {}
        if request.get("prompt_logprobs") is not None:
            logps = self.logits(name, prompt).log_softmax(-1)
            choice["prompt_logprobs"] = [None] + [
                {str(token): {"logprob": logps[place, token].item()}} for place, token in enumerate(prompt[1:])
            ]
            return 200, {"choices": [choice]}
        ids, values, generator = [], [], torch.Generator().manual_seed(request["seed"])
        cache = DynamicCache()
        while len(ids) < min(request["max_tokens"], self.most_tokens):
            logits = self.logits(name, ids[-1:] or prompt, cache)[-1]
            drawn = (logits / request["temperature"]).softmax(-1)
            ids.append(int(torch.multinomial(drawn, 1, generator=generator)))
            values.append((logits.softmax(-1) if self.raw else drawn)[ids[-1]].log().item())
            if ids[-1] in request["stop_token_ids"]:
                break
        return 200, {"choices": [{"token_ids": ids, "logprobs": {"token_logprobs": values}}]}


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.answer({"/v1/models": (200, {"data": [{"id": "base", "max_model_len": self.server.engine.context}]})})

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        engine = self.server.engine
        with engine.lock:
            calls = {"/v1/completions": lambda: engine.complete(request)}
            if not engine.without_updates:
                calls["/v1/load_lora_adapter"] = lambda: engine.load(request["lora_name"], request["lora_path"])
                calls["/v1/unload_lora_adapter"] = lambda: engine.unload(request["lora_name"])
            if engine.away:
                engine.away -= 1
                self.close_connection = True  # as a process that is killed
                return
            self.answer({self.path: calls[self.path]()} if self.path in calls else {})

    def answer(self, known):
        status, body = known.get(self.path, (404, {"detail": "Not Found"}))
        if isinstance(body, str):
            body = {"error": {"message": body, "code": status}}
        text = "Success" if body is None else json.dumps(body)
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *args):
        pass


@contextmanager
def serving(engine):
    """Serve an engine on the loopback interface, and give its address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.engine = engine
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
