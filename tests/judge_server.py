"""The embedded policy behind OpenAI's chat interface, for tests and pages: real answers of `PolicyJudge`'s model over HTTP, one at a time.

    python tests/judge_server.py [--port 8010] [--policy embedded]    # prints its address, then serves until it is ended

Knows what a judge's client asks for: /v1/models; /v1/chat/completions with pictures as data URLs, `top_logprobs` of the first token, and vLLM's `prompt_logprobs`. On a GPU take vLLM.
"""
import argparse
import base64
import io
import json
import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from PIL import Image

from emo_r3.policy import encode_prompts, load_policy, load_processor
from emo_r3.sampling import PolicyJudge


def as_ours(turn):
    "A turn of OpenAI's form as transformers' chat template takes it."
    if isinstance(turn["content"], str): return turn
    parts = []
    for part in turn["content"]:
        if part["type"] == "text": parts.append({"type": "text", "text": part["text"]}); continue
        kind, _, encoded = part["image_url"]["url"].partition(";base64,")
        if kind != "data:image/png": raise ValueError(f"only pictures as PNG data URLs are served here, not {kind[:40]}")
        parts.append({"type": "image", "image": Image.open(io.BytesIO(base64.b64decode(encoded, validate=True))).convert("RGB")})
    return {"role": turn["role"], "content": parts}


class Served:
    "A model that answers requests, one at a time."
    def __init__(self, name="embedded"): self.name, self.model, self.processor, self.lock, self.requests = name, load_policy(name), load_processor(name), threading.Lock(), []

    def logps(self, rows): # (1, tokens, V)
        "The log-probability of every token at every place, with transformers' own forward pass."
        with torch.no_grad(): return self.model(**rows).logits.float().log_softmax(-1)

    def answer(self, body):
        "What OpenAI's (and vLLM's) interface would answer."
        messages = [as_ours(turn) for turn in body["messages"]]
        spoken = messages.pop()["content"] if body.get("continue_final_message") else ""
        rows = encode_prompts(self.processor, [messages]).padded()
        text, out, tokenizer = "", {}, self.processor.tokenizer
        if spoken:
            ids = torch.tensor([tokenizer.encode(spoken, add_special_tokens=False)])
            more = lambda row, what: torch.cat([row, what], 1)
            rows |= {"input_ids": more(rows["input_ids"], ids), "attention_mask": more(rows["attention_mask"], torch.ones_like(ids)), "mm_token_type_ids": more(rows["mm_token_type_ids"], torch.zeros_like(ids))}
        if body.get("prompt_logprobs") is not None:
            said, all_logps = rows["input_ids"][0].tolist(), self.logps(rows)[0]
            out = {"prompt_token_ids": said, "prompt_logprobs": [None, *({str(i): {"logprob": all_logps[t, i].item(), "rank": 1, "decoded_token": tokenizer.decode([i])}} for t, i in enumerate(said[1:]))]}
        elif body.get("logprobs"):
            values, ids = self.logps(rows)[0, -1].topk(body["top_logprobs"])
            listed = [{"token": tokenizer.decode([i]), "logprob": v, "bytes": None} for v, i in zip(values.tolist(), ids.tolist())]
            out = {"listed": [{**listed[0], "top_logprobs": listed}]}
        else: text = PolicyJudge(self.model, self.processor, temperature=body.get("temperature", 0.0), top_p=body.get("top_p", 1.0), max_new_tokens=body.get("max_tokens", 16)).generate([messages])[0]
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "logprobs": {"content": out.pop("listed")} if "listed" in out else None, "finish_reason": "stop"}
        return {"object": "chat.completion", "model": self.name, "choices": [choice], **out}


def handler_of(served):
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        def log_message(self, *_): pass

        def say(self, code, value):
            held = json.dumps(value).encode()
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(held)))
            self.end_headers()
            self.wfile.write(held)

        def do_GET(self): self.say(*((200, {"object": "list", "data": [{"id": served.name, "object": "model"}]}) if self.path == "/v1/models" else (404, {"error": {"message": f"no such path: {self.path}"}})))

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if self.path != "/v1/chat/completions": return self.say(404, {"error": {"message": f"no such path: {self.path}"}})
            if body.get("model") != served.name: return self.say(404, {"error": {"message": f"the model {body.get('model')!r} does not exist"}})
            served.requests.append(body)
            with served.lock: came = served.answer(body)
            self.say(200, came)
    return Handler


def start(served, port=0):
    "A running server on this machine, and its address."
    server = ThreadingHTTPServer(("127.0.0.1", port), handler_of(served))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server, f"http://127.0.0.1:{server.server_port}/v1"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--policy", default="embedded")
    asked = parser.parse_args()
    server, address = start(Served(asked.policy), asked.port)
    print(address, flush=True)
    threading.Event().wait()
