"""The vLLM sampler without vLLM: what is refused, what an engine is asked, how weights are named, and in which order things happen. The real engine: tests/engine."""
import base64
import copy
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel
from PIL import Image
from policies import policy as policy_of
from safetensors.torch import load_file, save_file
from stand_in import StandIn

import emo_r3.cli
import emo_r3.vllm_sampler
from emo_r3.data import EMOSET8
from emo_r3.policy import Picture, add_lora, completion_logps, encode_prompts, load_policy, load_processor
from emo_r3.prompts import coherence_messages, consistency_messages, set_messages
from emo_r3.sampling import PolicyJudge, PolicySampler
from emo_r3.scenes import make_scenes
from emo_r3.config import make_config
from emo_r3.train import Trainer, run_sampler, train_step
from emo_r3.config import LORA_RANKS, check_engine
from emo_r3.vllm_sampler import (ABANDONED_S, BOUNDS, Ask, Drawn, EngineError, LocalEngine, PromptMismatch, ServedEngine, ServerWorker, StaleWeights, VLLMSampler, adapter_rank, as_served, branches, check_probe,
                                 check_read, engine_settings, full_weights, make_sampler, narrowed, resized, rollouts_of, spread_seeds, whole, write_adapter)


@pytest.fixture(autouse=True)
def short_probe(monkeypatch): monkeypatch.setattr(emo_r3.vllm_sampler, "PROBE_TEXT", "A quiet lake.")  # the stand-in asks its copy about one token at a time


@pytest.fixture(scope="module")
def processor(): return load_processor(max_pixels=2 * 9216)


@pytest.fixture
def policy(): return load_policy()


@pytest.fixture(scope="module")
def asked(): return [set_messages(x.question, x.image.resize(s)) for x, s in zip(make_scenes("in_domain", "train", 3), [(96, 96), (160, 96), (60, 150)])]


@pytest.fixture
def sampler(policy, processor): return VLLMSampler(policy, processor, engine=StandIn(policy, processor))


@torch.no_grad()
def change(policy, size=0.01):
    for p in policy.parameters():
        if p.requires_grad: p.add_(size * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))


@pytest.mark.parametrize("sampler, options, says", [
    ("vlm", {}, "did you mean 'vllm'"), ("vllm", {"tensor_paralel_size": 2}, "did you mean 'tensor_parallel_size'"), ("vllm", {"gpu_memory_utilization": 1.5}, "gpu_memory_utilization = 1.5; allowed: a share above 0, at most 1"),
    ("vllm", {"url": "http://x"}, "allowed: with sampler = 'vllm_server'"), ("policy", {"max_model_len": 10}, "allowed: with sampler = 'vllm'"), ("policy", {"x": 1}, "allowed: none"), ("vllm", {"max_model_len": 0.5}, "max_model_len = 0.5"),
    ("vllm", {"sleep": "no"}, "sleep = 'no'; allowed: true or false"), ("vllm", {"dtype": "fp8"}, "dtype = 'fp8'"), ("vllm", {"dtype": "float16"}, "dtype = 'float16'; allowed: 'bfloat16' or 'float32' (in float16"), ("vllm", {"probe_bound": 0}, "probe_bound = 0; allowed: a number above 0"), ("vllm", {"lora": "merged"}, "allowed without an adapter"),
    ("vllm_server", {}, "url is missing"), ("vllm_server", {"url": "10.0.0.7:8000", "folder": "x"}, "url = '10.0.0.7:8000'; allowed: the server's address, such as 'http://"), ("vllm_server", {"url": "http://x"}, "folder is missing"), ("vllm_server", {"url": "http://[", "folder": "x"}, "url = 'http://['"), ("vllm_server", {"url": "http://x", "folder": "y", "dtype": "float32"}, "'dtype' with sampler = 'vllm_server'; allowed: with sampler = 'vllm'"), ("vllm", {"max_num_seqs": True}, "max_num_seqs = True")])
def test_options_that_no_engine_can_be_started_with(sampler, options, says):
    with pytest.raises(ValueError, match=re.escape(says)) as caught: check_engine(sampler, options)
    assert "\n" not in str(caught.value)


def test_options_that_fit():
    check_engine("policy", {})
    check_engine("vllm", {"gpu_memory_utilization": 0.5, "enforce_eager": True, "lora": "merged", "probe_bound": 0.1}, lora=True)
    check_engine("vllm_server", {"url": "https://a", "folder": "/b", "timeout_s": 5})
    check_engine("vllm", {}, lora=512), check_engine("vllm", {"lora": "merged"}, lora=4096), check_engine("policy", {}, lora=4096)


@pytest.mark.parametrize("rank", [513, 1024])
def test_an_adapter_that_the_engine_has_no_room_for_is_refused_before_anything_starts(rank, policy, processor, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    adapted = add_lora(policy, rank, 8.0)
    assert adapter_rank(adapted) == rank
    server = {"url": "http://127.0.0.1:9", "folder": str(tmp_path)}
    for make in (lambda: LocalEngine(adapted, processor, {}), lambda: make_sampler("vllm", {}, adapted, processor), lambda: make_sampler("vllm_server", server, adapted, processor), lambda: check_engine("vllm", {"lora": "adapter"}, rank)):
        with pytest.raises(ValueError, match=re.escape(f"lora_rank = {rank}; allowed with sampler = 'vllm") + ".*at most 512.*'lora': 'merged'"): make()
    with pytest.raises(ImportError): LocalEngine(adapted, processor, {"lora": "merged"})  # as far as vLLM itself, which is not here


def test_an_adapter_has_the_least_room_that_holds_it(policy, processor):
    for rank, room in ((1, 1), (4, 8), (8, 8), (9, 16), (257, 320)):
        assert engine_settings(add_lora(load_policy(), rank, 8.0), processor, {})["max_lora_rank"] == room in LORA_RANKS
    assert "max_lora_rank" not in engine_settings(policy, processor, {}) and "max_lora_rank" not in engine_settings(add_lora(policy, 4, 8.0), processor, {"lora": "merged"})


def test_what_is_sent_is_narrow_and_what_is_meant_is_wide(sampler, asked):
    seen, real = [], sampler.engine.ask
    sampler.engine.ask = lambda asks: (seen.append(asks), real(asks))[1]
    with sampler.awake():
        del seen[:]  # the probe's
        sampler.sample(asked, 2, 4, 0.7, seed=1), sampler.score(asked[:1], [("a ghost", "a key")])
    (sampled, scored), image = seen, sampler.policy.config.image_token_id
    rows = [tuple(row.tolist()) for row in encode_prompts(sampler.processor, asked).ids]
    assert [a.becomes for a in sampled] == rows and len({a.picture.tokens for a in sampled}) > 1
    assert {len(a.becomes) - len(rows[0]) for a in scored} >= {0, 1} and all(a.becomes[:len(rows[0])] == rows[0] for a in scored)  # the answers' common beginnings behind the question
    for a in (*sampled, *scored):
        assert a.ids == narrowed(a.becomes, image) and sum(t == image for t in a.ids) == 1 < sum(t == image for t in a.becomes) == a.picture.tokens
    assert all(a.params["n"] == 2 and a.params["temperature"] == 0.7 and a.params["max_tokens"] == 4 and set(a.params["logit_bias"].values()) == {-100.0} and image in a.params["logit_bias"] for a in sampled)
    assert narrowed((), 9) == () and narrowed((9, 9, 1, 9), 9) == (9, 1, 9)


@pytest.mark.parametrize("size", [(96, 96), (300, 200), (31, 500), (97, 101), (20, 20)])
def test_a_resized_picture_has_the_very_pixels_and_is_not_resized_again(processor, size):
    picture = Picture(make_scenes("in_domain", "train", 1)[0].image.resize(size), processor.image_processor)
    sent = Picture(resized(picture), processor.image_processor)
    assert sent.grid == picture.grid and resized(sent).size == sent.image.size and torch.equal(sent.pixel_values, picture.pixel_values)


def test_another_prompt_than_was_meant_is_named(sampler, asked):
    image = sampler.policy.config.image_token_id
    sampler.engine.spoil = lambda read, drawn: ([t for i, t in enumerate(read) if t != image or i % 2], drawn)
    with pytest.raises(PromptMismatch, match=r"prompt 0 \(112 x 84 pixels, sent as \d+ x \d+ patches\): the engine made \d+ picture tokens of it, the policy's processor \d+"): sampler.sample(asked, 1, 4, 1.0, seed=0)
    sampler.engine.spoil = lambda read, drawn: ([read[0], 11, *read[2:]], drawn)
    with pytest.raises(PromptMismatch, match="which differ from place 1 on"): sampler.sample(asked, 1, 4, 1.0, seed=0)
    with pytest.raises(PromptMismatch, match="prompt 4: the engine read 2 tokens and we sent 3, which differ from place 2 on"): check_read(Ask((1, 2, 3), (1, 2, 3), None, {}), (1, 2), 9, 4)


def test_sampled_as_by_the_policy_and_scored_as_by_its_judge(sampler, policy, processor, asked):
    with sampler.awake():
        r = sampler.sample(asked, 3, 40, 0.7, seed=2)
        asks = [consistency_messages(asked[0][0]["content"][0]["image"], "A ghost."), coherence_messages("A ghost.", "Fear.", EMOSET8), coherence_messages("A ghost.", "Fear.", EMOSET8)]
        answers = [("Yes", "No"), EMOSET8.labels, ("a ghost", "a ghost stands", "a key")]
        scores, written = sampler.score(asks, answers), sampler.generate(asks)
    with torch.no_grad(): again = completion_logps(policy, *r.rows(torch.arange(9)), 0.7)
    assert ((again - r.logps).abs() * r.completion_mask).max() < 1e-5 and (r.logps[r.completion_mask == 0] == 0).all()
    judge = PolicyJudge(policy, processor)
    assert written == judge.generate(asks)
    for ours, theirs in zip(scores, judge.score(asks, answers)): assert ours == pytest.approx(theirs, abs=1e-4)
    greedy, theirs = sampler.sample(asked, 2, 40, 0.0), PolicySampler(policy, processor).sample(asked, 2, 40, 0.0)
    assert greedy.texts == theirs.texts and torch.equal(greedy.completion_mask, theirs.completion_mask) and torch.equal(greedy.ended, theirs.ended)


def test_one_window_one_transfer(sampler, policy, asked):
    e = sampler.engine.events
    assert e == ["sleep"]
    with sampler.awake():
        sampler.sample(asked, 2, 4, 0.7, seed=1)
        with sampler.awake(): sampler.score([asked[0]], [("Yes", "No")])
    assert e == ["sleep", "wake", "take", "ask", "ask", "ask", "sleep"] and sampler.syncs == 1  # the first is the probe's
    del e[:]
    sampler.generate([asked[0]])
    assert e == ["wake", "ask", "sleep"]
    change(policy)
    sampler.learned()
    with sampler.awake(): pass
    assert e[3:] == ["wake", "take", "ask", "sleep"] and sampler.figures()["sampling/probe_difference"] == sampler.gap < 1e-4


def test_a_forgotten_transfer_is_refused_and_the_engine_sleeps(sampler, policy, asked, monkeypatch):
    sampler.sample(asked, 1, 2, 1.0, seed=0)
    change(policy)
    sampler.learned()
    with monkeypatch.context() as m:
        m.setattr(sampler.engine, "take", lambda policy: None)
        with pytest.raises(StaleWeights, match=r"differ by .* \(-[\d.]+ nats a token by the policy, -[\d.]+ by the engine\); allowed: 0.001"): sampler.sample(asked, 1, 2, 1.0, seed=0)
        assert sampler.engine.events[-1] == "sleep" and sampler.stale and sampler.depth == 0
        with pytest.raises(StaleWeights): sampler.sample(asked, 1, 2, 1.0, seed=0)  # nor the second time
    sampler.sample(asked, 1, 2, 1.0, seed=0)


def test_the_probe_s_two_signs():
    assert check_probe([-1, -2], [-1.1, -1.9], 0.2) == pytest.approx(0.1)
    with pytest.raises(StaleWeights, match="allowed: 0.05"): check_probe([-1, -2], [-1.1, -1.9], 0.05)
    with pytest.raises(StaleWeights, match="nan"): check_probe([-1, -2], [-1.1, float("nan")], 0.5)
    with pytest.raises(StaleWeights, match="to the bit those of before"): check_probe([-1, -2], [-1.1, -1.9], 0.2, before=([-1.01, -2], [-1.1, -1.9]))
    check_probe([-1, -2], [-1.1, -1.9], 0.2, before=([-1.0001, -2], [-1.1, -1.9]))  # as good as nothing moved
    check_probe([-1, -2], [-1.1, -1.9001], 0.2, before=([-1.01, -2], [-1.1, -1.9]))  # both moved


def test_half_precision_has_a_wider_bound(policy, processor, asked):
    sampler = VLLMSampler(policy, processor, engine=StandIn(policy, processor))
    sampler.engine.dtype = "bfloat16"
    off = BOUNDS["bfloat16"] * 0.9
    real = sampler.engine.answers
    sampler.engine.answers = lambda a: [replace(d, wanted={t: v - off for t, v in d.wanted.items()}) for d in real(a)]
    sampler.sample(asked, 1, 2, 1.0, seed=0)
    assert sampler.gap == pytest.approx(off, rel=1e-2)
    sampler.engine.dtype, sampler.stale = "float32", True
    with pytest.raises(StaleWeights): sampler.sample(asked, 1, 2, 1.0, seed=0)
    sampler.options["probe_bound"] = 1.0
    sampler.seen = None
    sampler.sample(asked, 1, 2, 1.0, seed=0)


def test_an_engine_that_never_takes_weights_is_refused_though_each_step_is_small(policy, processor, asked):
    "One step moves the probe by less than what counts as movement; many of them do not."
    policy = copy.deepcopy(policy)
    sampler = VLLMSampler(policy, processor, engine=StandIn(policy, processor))
    sampler.engine.dtype = "bfloat16"
    sampler.sample(asked, 1, 2, 1.0, seed=0)
    sampler.engine.take = lambda p: None
    with pytest.raises(StaleWeights):
        for step in range(60):
            change(policy, 1e-6)  # always the same way
            sampler.learned()
            sampler.sample(asked, 1, 2, 1.0, seed=0)
    assert 0 < step < 59  # the first steps were let through


def test_the_bound_is_the_coarser_of_the_two(policy, processor, asked):
    "An engine in single precision beside a policy under autocast differs as much as one in bf16 does; only where both are exact the bound is narrow."
    sampler = VLLMSampler(policy, processor, engine=StandIn(policy, processor))
    real = sampler.engine.answers
    sampler.engine.answers = lambda a: [replace(d, wanted={t: v - 0.1 for t, v in d.wanted.items()}) for d in real(a)]
    with torch.autocast("cpu", torch.bfloat16), sampler.awake(): assert BOUNDS["float32"] < sampler.gap < BOUNDS["bfloat16"]
    sampler.learned()
    with pytest.raises(StaleWeights, match="allowed: 0.001"): sampler.sample(asked, 1, 2, 1.0, seed=0)
    assert set(BOUNDS) == {"float32", "bfloat16"}


@pytest.mark.parametrize("spoil, says", [(lambda d: replace(d, ids=(), logps=()), "a completion of 0 tokens with 0 log-probabilities"), (lambda d: replace(d, logps=d.logps[:-1]), r"a completion of (\d+) tokens with (?!\1)\d+ log-probabilities")])
def test_a_completion_without_tokens_is_refused(sampler, asked, spoil, says):
    sampler.sample(asked, 1, 2, 1.0, seed=0)
    sampler.engine.spoil = lambda read, drawn: (read, [*drawn[:-1], spoil(drawn[-1])])
    for ask in (lambda: sampler.sample(asked, 2, 2, 1.0, seed=0), lambda: sampler.generate(asked)):
        with pytest.raises(RuntimeError, match=f"prompt 0: the engine drew {says}; allowed: 1 token or more"): ask()


def test_a_drawn_picture_token_is_refused(sampler, policy, asked):
    sampler.sample(asked, 1, 2, 1.0, seed=0)
    banned = policy.config.image_token_id
    sampler.engine.spoil = lambda read, drawn: (read, [replace(d, ids=(*d.ids[:-1], banned)) for d in drawn])
    with pytest.raises(RuntimeError, match=f"completion 0: the engine drew token {banned}"): sampler.sample(asked, 1, 2, 1.0, seed=0)


def test_missing_values_and_completions_are_refused(sampler, asked):
    sampler.sample(asked, 1, 2, 1.0, seed=0)
    sampler.engine.spoil = lambda read, drawn: (read, [replace(d, wanted={}) for d in drawn])
    with pytest.raises(RuntimeError, match="left out the log-probability of token"): sampler.score([asked[0]], [("Yes", "No")])
    sampler.engine.spoil = lambda read, drawn: (read, drawn[:1])
    with pytest.raises(RuntimeError, match="drew 3 completions for 3 prompts; allowed: 2 for each"): sampler.sample(asked, 2, 2, 1.0, seed=0)


@pytest.mark.parametrize("settings, says", [((0, 4, 1.0), "num_generations = 0"), ((2, 0, 1.0), "max_new_tokens = 0"), ((2, 4, 0.005), "temperature = 0.005; allowed with vLLM"), ((2, 4, 3.0), "temperature = 3.0; allowed with vLLM")])
def test_settings_that_cannot_be_sampled_with(sampler, asked, settings, says):
    with pytest.raises(ValueError, match=says): sampler.sample(asked, *settings)


def test_no_messages_and_empty_answers(sampler, asked):
    with pytest.raises(ValueError, match="messages: there are none"): sampler.sample([], 1, 1)
    with pytest.raises(ValueError, match="an answer is empty"): sampler.score([asked[0]], [("Yes", "")])
    assert sampler.score([], []) == sampler.generate([]) == []


def test_too_long_a_prompt_is_refused(sampler, asked):
    sampler.engine.longest = 300
    with pytest.raises(ValueError, match=r"prompt 0: \d+ tokens and up to 290 new ones; allowed: 300 together"): sampler.sample(asked, 1, 290, 1.0, seed=0)


def test_completions_cut_by_the_engine_are_not_padded_into(policy, processor, asked):
    "Behind a completion that was cut there may stand an end token's padding: nothing of it counts."
    r = rollouts_of(encode_prompts(processor, asked[:1]), [Drawn((40, 41, 2), (-1.0, -2.0, -3.0), {}), Drawn((50,), (-4.0,), {})], 2, processor, VLLMSampler(policy, processor, engine=StandIn(policy, processor)).ends)
    assert r.completion_mask.tolist() == [[1, 1, 1], [1, 0, 0]] and r.ended.tolist() == [True, False] and r.logps.tolist() == [[-1.0, -2.0, -3.0], [-4.0, 0.0, 0.0]]


def test_seeds_lie_apart_and_branches_share():
    seeds = spread_seeds(5, 100)
    assert len({s + i for s in seeds + spread_seeds(6, 100) + spread_seeds(7, 100) for i in range(16)}) == 4800 and spread_seeds(5, 3) == seeds[:3] != spread_seeds(6, 3) and spread_seeds(None, 2) == [None, None] and all(0 <= s < 2**56 for s in seeds)
    assert branches([[1], [2]]) == {(): [1, 2]} and branches([[1, 2], [1, 3], [1, 2]]) == {(): [1], (1,): [2, 3]}


@pytest.mark.parametrize("kind", ["full", "lora", "four_bit"])
def test_weights_are_those_that_the_policy_computes_with(kind, processor, asked):
    policy, plain = policy_of(kind), load_policy()
    state = dict(full_weights(policy))
    assert state.keys() == dict(plain.named_parameters()).keys()
    plain.load_state_dict(state, strict=False)
    prompts, ids = encode_prompts(processor, asked).padded(), torch.tensor([[40, 41, 42]] * 3)
    with torch.no_grad(): a, b = (completion_logps(m, prompts, ids, torch.ones_like(ids)) for m in (policy, plain))
    assert (a - b).abs().max() < 1e-5
    bare = dict(full_weights(policy, merged=False))
    assert (kind == "full") == all(torch.equal(bare[n], state[n]) for n in bare)


def test_an_adapter_in_a_folder_is_the_one_worn(tmp_path):
    policy = policy_of("lora")
    write_adapter(policy, tmp_path / "a")
    write_adapter(policy, tmp_path / "none", write=False)
    again = PeftModel.from_pretrained(load_policy(), tmp_path / "a")
    ours, theirs = (dict(full_weights(m)) for m in (policy, again))
    assert all(torch.equal(ours[n], theirs[n]) for n in ours) and not (tmp_path / "none").exists()


def test_shared_tensors_are_gathered():
    class Shared(torch.Tensor):
        def full_tensor(self): return torch.ones(2)
    assert whole(torch.zeros(1).as_subclass(Shared)).tolist() == [1, 1] and whole(torch.zeros(1, requires_grad=True)).requires_grad is False


def test_without_vllm_it_says_how_to_get_it(policy, processor, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ImportError, match=r"pip install -e '\.\[gpu\]'"): make_sampler("vllm", {}, policy, processor)
    with pytest.raises(ValueError, match="tensor_parallel_size = 2; allowed: 1"): LocalEngine(policy, processor, {"tensor_parallel_size": 2})
    policy.name_or_path = ""
    with pytest.raises(ValueError, match="it has no name_or_path"): LocalEngine(policy, processor, {})


class Worker(ServerWorker):
    "Our own methods on what they need of vLLM's worker, with a stand-in for the model."
    def __init__(self, engine, dtype): self.engine, self.model_config, self.device, self.loaded = engine, SimpleNamespace(dtype=dtype), torch.device("cpu"), {}
    def get_model(self): return self.engine.sampler.model

    def reload_weights(self, weights_iterator):
        self.loaded = dict(weights_iterator)
        self.engine.sampler.model.load_state_dict(self.loaded, strict=False)


class Server(ThreadingHTTPServer):
    "A server that speaks as vLLM's does, with a stand-in behind it."
    def __init__(self, engine, version="0.32.0", refuses=(), dtype=torch.float32):
        super().__init__(("127.0.0.1", 0), Handler)
        self.engine, self.version, self.refuses, self.calls, self.lock, self.models, self.sizes, self.replies, self.fails = engine, version, refuses, [], threading.Lock(), set(), [], {}, []  # fails: (method or path, status; 0: a reset) for its next requests
        self.worker = Worker(engine, dtype)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self): return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args): pass

    def reply(self, status, body):
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())

    def fail(self, what):
        "Whether this request is one that fails."
        status = next((f for f in self.server.fails if f[0] == what), None)
        if status is None: return False
        self.server.fails.remove(status)
        if status[1]: self.reply(status[1], {"error": "for a moment"})
        else: self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0"), self.connection.close()  # a reset
        return True

    def finish(self):
        try: super().finish()
        except OSError: pass  # reset

    def do_GET(self): self.fail(self.path) or self.reply(200, {"version": self.server.version})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.calls.append(body.get("method", self.path))
            if self.fail(self.server.calls[-1]): return
            if self.path in self.server.refuses: return self.reply(404, {"detail": "Not Found"})
            if self.path in self.server.replies: return self.reply(200, self.server.replies[self.path])
            if self.path == "/collective_rpc":
                if body["method"] == "emo_r3_take": self.server.sizes += [p.stat().st_size for p in Path(body["kwargs"]["folder"]).iterdir()]
                return self.reply(200, {"results": [getattr(self.server.worker, body["method"])(**body["kwargs"])]})
            if self.path != "/inference/v1/generate": return self.reply(200, {"success": True})
            return self.reply(200, self.generate(body))

    def generate(self, body):
        engine, image = self.server.engine, self.server.engine.sampler.model.config.image_token_id
        picture = None
        for part in body.get("content_parts", ()):
            picture = Picture(Image.open(io.BytesIO(base64.b64decode(part["url"].split(",")[1]))), engine.sampler.processor.image_processor)
        ids = tuple(t for i in body["token_ids"] for t in ([i] * picture.tokens if i == image else [i]))
        drawn = engine.answers(Ask((), ids, picture, body["sampling_params"]))
        content = lambda d: [{"token_id": t, "logprob": l, "top_logprobs": [{"token_id": w, "logprob": v} for w, v in d.wanted.items()]} for t, l in zip(d.ids, d.logps)]
        return {"prompt_token_ids": list(ids), "choices": [{"index": i, "token_ids": list(d.ids), "logprobs": {"content": content(d)}} for i, d in reversed(list(enumerate(drawn)))]}


def takes(server): return [c for c in server.calls if c in ("emo_r3_take", "/reset_prefix_cache", "/reset_mm_cache", "/reset_encoder_cache")]


def test_a_server_is_asked_and_given_weights(policy, processor, asked, tmp_path):
    server = Server(StandIn(policy, processor))
    options = {"url": server.url + "/", "folder": str(tmp_path / "shared")}
    sampler = make_sampler("vllm_server", options, policy, processor)
    change(policy)
    r = sampler.sample(asked, 3, 24, 0.7, seed=4)
    with torch.no_grad(): again = completion_logps(policy, *r.rows(torch.arange(9)), 0.7)
    assert ((again - r.logps).abs() * r.completion_mask).max() < 1e-5 and sampler.engine.dtype == "float32"
    assert takes(server) == ["emo_r3_take", "/reset_prefix_cache", "/reset_mm_cache", "/reset_encoder_cache"] and not list((tmp_path / "shared").iterdir())  # no folder of weights is left
    assert sampler.score([asked[0]], [("Yes", "No")])[0] == pytest.approx(PolicyJudge(policy, processor).score([asked[0]], [("Yes", "No")])[0], abs=1e-4)
    server.shutdown()


def test_a_server_in_half_precision_is_sent_half(policy, processor, asked, tmp_path):
    "What it says that it computes in decides: half the bytes, and to the bit what it would have rounded to itself. The probe's bound is then that of half precision."
    sizes = {}
    change(policy)  # the stored policy's weights are round numbers
    for dtype in (torch.float32, torch.bfloat16):
        server = Server(StandIn(policy, processor), dtype=dtype)
        sampler = make_sampler("vllm_server", {"url": server.url, "folder": str(tmp_path)}, policy, processor)
        sampler.engine.take(policy)
        sizes[dtype], loaded = server.sizes, server.worker.loaded
        assert sampler.engine.dtype == str(dtype).removeprefix("torch.") and all(torch.equal(loaded[n], w.to(dtype)) for n, w in full_weights(policy)) and loaded.keys() == dict(full_weights(policy)).keys()
        server.shutdown()
    (full,), (half,) = sizes[torch.float32], sizes[torch.bfloat16]
    assert 0.49 < half / full < 0.52
    for dtype in (torch.float32, torch.bfloat16): assert as_served(torch.ones(2, dtype=torch.bfloat16), dtype).dtype == torch.bfloat16  # never widened
    assert as_served(torch.ones(2, dtype=torch.int64), torch.bfloat16).dtype == torch.int64
    coarse = Server(StandIn(policy, processor), dtype=torch.bfloat16)
    sampler = make_sampler("vllm_server", {"url": coarse.url, "folder": str(tmp_path)}, policy, processor)
    sampler.sample(asked, 1, 2, 1.0, seed=0)
    assert BOUNDS["float32"] < sampler.gap < BOUNDS["bfloat16"]  # the stand-in computes with the rounded weights
    coarse.shutdown()


def test_a_server_that_cannot_take_weights_is_named(policy, processor, asked, tmp_path):
    server = Server(StandIn(policy, processor), refuses=("/collective_rpc",))
    options = {"url": server.url, "folder": str(tmp_path)}
    with pytest.raises(RuntimeError, match=r"/collective_rpc: answered 404 Not Found: .*; allowed: a server started with VLLM_SERVER_DEV_MODE=1 and --worker-extension-cls"): make_sampler("vllm_server", options, policy, processor)
    server.refuses, server.replies = (), {"/collective_rpc": {"results": ["None"]}}  # another worker's
    with pytest.raises(RuntimeError, match=r"emo_r3_about answered \['None'\]; allowed: a server started with .*of this version"): ServedEngine(options)
    server.replies, server.worker.model_config.dtype = {}, torch.float16
    with pytest.raises(RuntimeError, match="computes in float16; allowed: a server started with --dtype float32 or bfloat16"): ServedEngine(options)
    server.version = "0.31.2"
    with pytest.raises(RuntimeError, match="vLLM 0.31.2; allowed: 0.32"): ServedEngine(options)
    server.shutdown()
    with pytest.raises(RuntimeError, match=r"http://127.0.0.1:9/version: cannot be reached \(ConnectionRefusedError"): ServedEngine({"url": "http://127.0.0.1:9", "folder": str(tmp_path), "timeout_s": 2})


def test_what_an_engine_says_is_of_one_kind():
    assert issubclass(EngineError, RuntimeError) and issubclass(StaleWeights, EngineError) and issubclass(PromptMismatch, EngineError)
    for error in ("EngineError", "StaleWeights", "PromptMismatch"): assert error in emo_r3.vllm_sampler.__all__
    assert "raise RuntimeError(" not in Path(emo_r3.vllm_sampler.__file__).read_text()


@pytest.fixture
def hasty(monkeypatch): monkeypatch.setattr(emo_r3.vllm_sampler, "PAUSES_S", (0.01, 0.01, 0.01))


@pytest.mark.parametrize("status", [503, 429, 0])
@pytest.mark.parametrize("what", ["/inference/v1/generate", "emo_r3_about"])
def test_what_passes_does_not_end_a_run(policy, processor, asked, tmp_path, hasty, status, what):
    "The draw is the same as without the failure, for it goes by its seeds."
    server = Server(StandIn(policy, processor))
    sampler = make_sampler("vllm_server", {"url": server.url, "folder": str(tmp_path), "timeout_s": 20}, policy, processor)
    calm = sampler.sample(asked, 2, 6, 0.7, seed=4)
    server.fails = [(what, status)] * 3
    r = sampler.sample(asked, 2, 6, 0.7, seed=4)
    assert r.texts == calm.texts and torch.equal(r.logps, calm.logps) and server.fails == []
    server.fails, sampler.engine.at_once = [(what, status)] * 4, 1
    with pytest.raises(EngineError, match="answered" if status else "cannot be reached"): sampler.sample(asked, 2, 6, 0.7, seed=4)
    server.shutdown()


@pytest.mark.parametrize("what, status", [("emo_r3_take", 503), ("/reset_prefix_cache", 503), ("/v1/load_lora_adapter", 503), ("/inference/v1/generate", 500), ("emo_r3_about", 500), ("/inference/v1/generate", 404)])
def test_what_may_do_harm_or_never_passes_is_asked_once(processor, asked, tmp_path, hasty, what, status):
    policy = policy_of("lora" if "lora" in what else "full")
    server = Server(StandIn(policy, processor))
    sampler = make_sampler("vllm_server", {"url": server.url, "folder": str(tmp_path)}, policy, processor)
    server.fails, sampler.engine.at_once = [(what, status)] * 4, 1
    with pytest.raises(EngineError, match=f"answered {status}"): sampler.sample(asked, 1, 2, 1.0, seed=0)
    assert len(server.fails) == 3
    server.shutdown()


def test_a_server_that_is_not_ready_yet_is_asked_again_and_a_wrong_address_is_not(policy, processor, tmp_path, hasty, monkeypatch):
    server = Server(StandIn(policy, processor))
    server.fails = [("/version", 503), ("/version", 503)]
    assert ServedEngine({"url": server.url, "folder": str(tmp_path)}).dtype == "float32" and server.fails == []
    server.shutdown()
    monkeypatch.setattr(emo_r3.vllm_sampler, "PAUSES_S", (60.0,))
    began = time.monotonic()
    with pytest.raises(EngineError, match="cannot be reached"): ServedEngine({"url": "http://127.0.0.1:9", "folder": str(tmp_path)})
    assert time.monotonic() - began < 10


def test_the_worker_s_class_is_named_only_where_it_may_be_missing(policy, processor, tmp_path):
    server = Server(StandIn(policy, processor))
    server.fails = [("emo_r3_about", 500)]
    with pytest.raises(EngineError, match="answered 500.*--worker-extension-cls"): ServedEngine({"url": server.url, "folder": str(tmp_path)})
    engine = ServedEngine({"url": server.url, "folder": str(tmp_path)})
    server.fails = [("emo_r3_take", 500)]
    with pytest.raises(EngineError, match="answered 500") as caught: engine.take(policy)
    assert "worker-extension" not in str(caught.value)
    server.shutdown()


SIGNAL = """
import sys, threading, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from emo_r3.vllm_sampler import Ask, _Asked
class Hanging(BaseHTTPRequestHandler):
    def log_message(self, *_): pass
    def do_POST(self): print("asked", flush=True), time.sleep(40)
server = ThreadingHTTPServer(("127.0.0.1", 0), Hanging)
server.daemon_threads = True
threading.Thread(target=server.serve_forever, daemon=True).start()
_Asked.__init__ = lambda self: None
engine = _Asked()
from emo_r3.wire import Server
engine.server, engine.url, engine.model, engine.held, engine.met, engine.at_once = Server(f"http://127.0.0.1:{server.server_port}", 30.0), "x", None, None, True, 8
engine.ask([Ask((1,), (1,), None, {})] * 3)
"""


def test_a_signal_does_not_wait_for_answers_under_way():
    running = subprocess.Popen([sys.executable, "-W", "ignore", "-c", SIGNAL], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        running.stdout.readline()
        began = time.monotonic()
        running.send_signal(signal.SIGINT)
        said = running.communicate(timeout=25)[1]
    finally: running.kill()
    assert "KeyboardInterrupt" in said and time.monotonic() - began < 15


def test_work_in_threads_is_in_order_and_ends_with_the_first_failure():
    each, begun = emo_r3.vllm_sampler._each, []
    def work(i): return (begun.append(i), time.sleep(0.02 * (3 - i % 3)), i * i)[-1]
    assert each(work, range(9), 4) == [i * i for i in range(9)] and each(work, [], 4) == []
    def failing(i): return begun.append(i) or 1 // (i - 2)
    del begun[:]
    with pytest.raises(ZeroDivisionError): each(failing, range(10_000), 1)
    time.sleep(0.1)
    assert begun == [0, 1, 2]


def test_an_adapter_goes_over_in_the_server_s_precision(processor, asked, tmp_path):
    "Half the bytes for a server in half precision, and to the bit what it rounds to itself."
    policy, size, state = policy_of("lora"), {}, {}
    for dtype in (torch.float32, torch.bfloat16):
        server = Server(StandIn(policy, processor), dtype=dtype)
        engine = ServedEngine({"url": server.url, "folder": str(tmp_path / str(dtype))})
        engine.take(policy)
        (file,) = (tmp_path / str(dtype)).rglob("adapter_model.safetensors")
        size[dtype], state[dtype] = file.stat().st_size, load_file(file)
        server.shutdown()
    full, half = state.values()
    assert full.keys() == half.keys() and all(w.dtype == torch.float32 and half[n].dtype == torch.bfloat16 and torch.equal(half[n], w.bfloat16()) for n, w in full.items())
    assert 0.45 < size[torch.bfloat16] / size[torch.float32] < 0.65


@pytest.mark.parametrize("how", ["gone", "forgotten"])
def test_a_server_that_is_gone_does_not_hide_what_a_run_ended_with(processor, tmp_path, capsys, how):
    policy = policy_of("lora")
    server = Server(StandIn(policy, processor))
    engine = ServedEngine({"url": server.url, "folder": str(tmp_path)})
    engine.take(policy)
    if how == "gone": server.shutdown(), server.server_close()
    else: server.refuses = ("/v1/unload_lora_adapter",)
    capsys.readouterr()
    with pytest.raises(ZeroDivisionError):
        try: 1 / 0
        finally: engine.close()
    note = capsys.readouterr().err
    assert note.startswith("emo-r3: note: the adapter policy-") and note.count("\n") == 1 and ("cannot be reached" if how == "gone" else "answered 404") in note and list(tmp_path.iterdir()) == []
    engine.close()  # nothing is left to do
    assert capsys.readouterr().err == ""
    server.shutdown() if how == "forgotten" else None


def test_two_runs_with_a_server_each_share_a_folder(policy, processor, asked, tmp_path, monkeypatch):
    "The second one hands over while the first is writing: neither touches the other's."
    servers = [Server(StandIn(policy, processor)) for _ in range(2)]
    other = load_policy()
    change(other, 0.02)
    first, second = (make_sampler("vllm_server", {"url": s.url, "folder": str(tmp_path)}, p, processor) for s, p in zip(servers, (policy, other)))
    real, nested = save_file, []
    def writing(sent, file, metadata):
        if not nested:
            nested.append(file)
            second.sample(asked, 1, 2, 1.0, seed=0)
        return real(sent, file, metadata)
    monkeypatch.setattr(emo_r3.vllm_sampler, "save_file", writing)
    ours = first.sample(asked, 1, 8, 1.0, seed=0)
    with torch.no_grad(): assert ((completion_logps(policy, *ours.rows(torch.arange(3)), 1.0) - ours.logps).abs() * ours.completion_mask).max() < 1e-5
    second.sample(asked, 1, 2, 1.0, seed=0)
    assert len(nested) == 1 and list(tmp_path.iterdir()) == []
    for s in servers: s.shutdown()


@pytest.mark.parametrize("answer", [{}, {"prompt_token_ids": [1]}, {"prompt_token_ids": [1], "choices": [{"index": 0, "token_ids": [1]}]}, {"prompt_token_ids": [1], "choices": [3]}, [1], {"prompt_token_ids": None, "choices": []}])
def test_an_answer_that_cannot_be_read_is_shown(policy, processor, asked, tmp_path, answer):
    server = Server(StandIn(policy, processor))
    engine = ServedEngine({"url": server.url, "folder": str(tmp_path)})
    server.replies["/inference/v1/generate"] = answer
    with pytest.raises(RuntimeError, match="/inference/v1/generate: an answer that cannot be read .*allowed: prompt_token_ids, and choices"): engine.ask([Ask((1,), (1,), None, {})])
    server.shutdown()


def test_a_server_is_not_waited_for_for_ever_and_leads_nowhere_else(policy, processor, tmp_path):
    "What page 10a bounds is bounded here too: time, size, and where to."
    came = []
    class Odd(BaseHTTPRequestHandler):
        def log_message(self, *args): pass
        def do_GET(self):
            came.append(self.path)
            try: self.odd()
            except OSError: pass
        def odd(self):
            self.send_response(*((307, "x\x1b[2J" * 99) if self.path == "/elsewhere" else (200,)))
            for name, value in (("Location", "/there"), ("Content-Length", "99999999")): self.send_header(name, value)
            self.end_headers()
            while self.path == "/drip": self.wfile.write(b" "), time.sleep(0.05)
    server, real = Server(StandIn(policy, processor)), ServedEngine
    engine = real({"url": server.url, "folder": str(tmp_path), "timeout_s": 0.4})
    odd = ThreadingHTTPServer(("127.0.0.1", 0), Odd)
    threading.Thread(target=odd.serve_forever, daemon=True).start()
    engine.server.url = f"http://127.0.0.1:{odd.server_port}"
    began = time.monotonic()
    for path, says in (("/drip", "no answer within timeout_s = 0.4"), ("/elsewhere", "answered 307"), ("/broken", "broke off after 0 of 99,999,999 bytes")):
        with pytest.raises(RuntimeError, match=says) as caught: engine.call(path)
        assert str(caught.value).isprintable() and len(str(caught.value)) < 500
    assert time.monotonic() - began < 10 and came == ["/drip", "/elsewhere", "/broken"]
    for s in (server, odd): s.shutdown()


# ---- one run a server

def two_runs(policy, processor, tmp_path, **server):
    server = Server(StandIn(policy, processor), **server)
    other = load_policy()
    change(other, 0.02)
    options = [{"url": server.url, "folder": str(tmp_path / name)} for name in ("a", "b")]
    return server, make_sampler("vllm_server", options[0], policy, processor), make_sampler("vllm_server", options[1], other, processor)


def test_a_second_run_on_a_server_is_noticed_by_the_first(policy, processor, asked, tmp_path):
    "Before it hands over again, and after every answer: what was drawn from the other's weights is thrown away."
    server, first, second = two_runs(policy, processor, tmp_path)
    first.sample(asked, 1, 2, 1.0, seed=0)
    second.sample(asked, 1, 2, 1.0, seed=0)
    says = "another run has handed its own weights over since this one did; allowed: one run a server"
    for ask in (lambda: first.sample(asked, 1, 2, 1.0, seed=0), lambda: first.score([asked[0]], [("Yes", "No")]), lambda: first.generate(asked[:1])):
        with pytest.raises(StaleWeights, match=says): ask()
    first.learned()
    before = len(takes(server))
    with pytest.raises(StaleWeights, match=says): first.sample(asked, 1, 2, 1.0, seed=0)
    assert len(takes(server)) == before  # and the second one's weights stay where they are
    second.sample(asked, 1, 2, 1.0, seed=0)
    server.shutdown()


def test_a_run_that_hands_over_while_another_draws_is_noticed(policy, processor, asked, tmp_path):
    server, first, second = two_runs(policy, processor, tmp_path)
    first.sample(asked, 1, 2, 1.0, seed=0)
    real = server.engine.answers
    def answers(ask):
        server.engine.answers = real
        server.worker.emo_r3_weights = "the other's"  # between two of the first one's questions
        return real(ask)
    server.engine.answers = answers
    with pytest.raises(StaleWeights, match="another run"): first.sample(asked, 1, 2, 1.0, seed=0)
    server.shutdown()


def test_a_server_that_was_started_anew_is_noticed(policy, processor, asked, tmp_path):
    server = Server(StandIn(policy, processor))
    sampler = make_sampler("vllm_server", {"url": server.url, "folder": str(tmp_path)}, policy, processor)
    sampler.sample(asked, 1, 2, 1.0, seed=0)
    server.worker = Worker(server.engine, torch.float32)
    with pytest.raises(StaleWeights, match="has lost the weights that this run handed over, as if it had been started anew"): sampler.sample(asked, 1, 2, 1.0, seed=0)
    server.shutdown()


def test_a_resumed_run_takes_its_server_and_folder_over(policy, processor, asked, tmp_path):
    "After a crash while it wrote: what was left is no obstacle, and goes when it is a day old, by the disk's clock; what is younger may be another run's."
    server, folder = Server(StandIn(policy, processor)), tmp_path / "shared"
    options = {"url": server.url, "folder": str(folder)}
    make_sampler("vllm_server", options, policy, processor).sample(asked, 1, 2, 1.0, seed=0)
    (folder / "mine").mkdir()
    for left, age in (("emo_r3_weights-a-1", 2), (".emo_r3_weights-b-1.partial-1", 2), (".emo_r3_weights-c-7.partial-1", 0.5), ("emo_r3_weights-d-7", 0.5), ("mine", 9)):
        (folder / left).mkdir(exist_ok=True)
        save_file({"half": torch.zeros(3)}, file := folder / left / "model.safetensors", {"weights": "of another"})
        for path in (file, file.parent): os.utime(path, (time.time() - age * ABANDONED_S,) * 2)
    change(policy)
    again = make_sampler("vllm_server", options, policy, processor)
    r = again.sample(asked, 1, 8, 1.0, seed=0)
    with torch.no_grad(): assert ((completion_logps(policy, *r.rows(torch.arange(3)), 1.0) - r.logps).abs() * r.completion_mask).max() < 1e-5
    assert sorted(left.name for left in folder.iterdir()) == [".emo_r3_weights-c-7.partial-1", "emo_r3_weights-d-7", "mine"]
    server.shutdown()


@pytest.mark.parametrize("how, says", [("other", "found weights of another run in"), ("unseen", "found no weights in")])
def test_other_weights_in_the_folder_are_not_taken(policy, processor, asked, tmp_path, monkeypatch, how, says):
    "Two runs with one folder and a server each, a network's file system that shows an old file, or a folder that the server does not see."
    server, folder = Server(StandIn(policy, processor)), tmp_path / "shared"
    real, state = server.worker.emo_r3_take, {n: w.clone() for n, w in server.engine.sampler.model.named_parameters()}
    def between(folder, weights):
        file = Path(folder) / "model.safetensors"
        if how == "other": save_file(load_file(file), file, {"weights": "theirs"})
        else: file.unlink()
        return real(folder, weights)
    monkeypatch.setattr(server.worker, "emo_r3_take", between)
    change(policy)
    sampler = make_sampler("vllm_server", {"url": server.url, "folder": str(folder)}, policy, processor)
    with pytest.raises(StaleWeights, match=says): sampler.sample(asked, 1, 2, 1.0, seed=0)
    assert all(torch.equal(w, state[n]) for n, w in server.engine.sampler.model.named_parameters())
    server.shutdown()


def test_what_lies_in_the_folder_can_be_read_by_a_server_of_another_user(processor, tmp_path):
    policy = policy_of("lora")
    server, modes = Server(StandIn(policy, processor)), []
    engine = ServedEngine({"url": server.url, "folder": str(tmp_path)})
    real = engine.call
    engine.call = lambda path, body=None, again=False: (modes.extend((p.name, p.stat().st_mode & 0o044) for p in tmp_path.rglob("*.safetensors")), real(path, body, again))[1]
    engine.take(policy)
    assert {name for name, _ in modes} == {"model.safetensors", "adapter_model.safetensors"} and all(mode == 0o044 for _, mode in modes)
    engine.close()
    assert list(tmp_path.iterdir()) == []
    server.shutdown()


def test_ranks_meet_before_and_after_one_of_them_hands_over(policy, processor, tmp_path):
    server, met = Server(StandIn(policy, processor)), []
    class Second:
        first = False
        def meet(self, where): met.append(where)
        def told(self, thing, where): return thing
    engine = ServedEngine({"url": server.url, "folder": str(tmp_path)}, Second())
    engine.take(policy)
    assert met == ["handing weights to the server", "the server's new weights"] and server.calls == ["emo_r3_about"] and not list(tmp_path.iterdir())
    server.shutdown()


def small(**fields): return make_config(dict(policy="embedded", train_size=4, prompts_per_step=2, prompts_per_update=2, num_generations=2, max_completion_tokens=24, learning_rate=1e-3, precision="fp32", min_pixels=None, max_pixels=None) | fields)


def test_a_step_of_training_opens_one_window_and_closes_it_before_the_update(policy, processor):
    engine = StandIn(policy, processor)
    sampler = VLLMSampler(policy, processor, engine=engine)
    trainer = Trainer(small(), policy, processor, sampler)  # corrected without being asked
    assert trainer.judge is sampler and trainer.judge_timeout_s is None
    real = trainer.optimizer.step
    trainer.optimizer.step = lambda: (engine.events.append("update"), real())[1]
    for step in range(2):
        del engine.events[:]
        experience, metrics = train_step(trainer, make_scenes("in_domain", "train", 2, seed=step), seed=step)
        e = engine.events
        assert e[:3] == ["wake", "take", "ask"] and e[-2:] == ["sleep", "update"] and e.count("wake") == e.count("take") == e.count("sleep") == 1 and e.count("ask") >= 2 and sampler.stale
        assert metrics["sampling/probe_difference"] < 1e-4 and metrics["timing_s/sync"] > 0 and metrics["sampling/sampling_logp_difference/max"] < 1e-4
        assert metrics["sampling/importance_sampling_ratio/mean"] == pytest.approx(1, abs=1e-4)


def test_who_reflects(policy, processor):
    sampler = VLLMSampler(policy, processor, engine=StandIn(policy, processor))
    assert isinstance(Trainer(small(judge="reference"), policy, processor, sampler).judge, PolicyJudge)
    assert Trainer(small(method="set"), policy, processor, sampler).judge is None
    assert isinstance(Trainer(small(), policy, processor).sampler, PolicySampler)


@pytest.mark.parametrize("fields, says", [
    (dict(sampler="vlm"), "did you mean 'vllm'"), (dict(sampler="vllm", vllm={"max_model_length": 5}), "did you mean 'max_model_len'"), (dict(vllm={"url": "http://x"}), "allowed: with sampler = 'vllm_server'"), (dict(sampler="vllm", vllm=[1]), "vllm = "),
    (dict(sampler="vllm", temperature=3.0), "temperature = 3.0; allowed with vLLM"), (dict(sampler="vllm", vllm={"lora": "merged"}), "lora_rank = 0"), (dict(sampler="vllm", method="sft", num_generations=1, beta=0), "sampler = 'vllm'; allowed with method = 'sft': policy")])
def test_configurations_that_no_engine_can_serve(fields, says):
    with pytest.raises(ValueError, match=re.escape(says)): small(**fields)


def test_a_configuration_makes_its_sampler(policy, processor, tmp_path, monkeypatch):
    monkeypatch.setattr(emo_r3.vllm_sampler, "LocalEngine", lambda policy, processor, options: StandIn(policy, processor))
    made = run_sampler(small(sampler="vllm", reflection="generate", preset="released"), policy, processor)
    assert isinstance(made, VLLMSampler) and (made.temperature, made.top_p) == (0.6, 0.95)
    assert run_sampler(small(sampler="vllm"), policy, processor).temperature == 0.0


def test_a_run_measures_with_its_sampler_and_closes_it(processor, tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(emo_r3.vllm_sampler, "LocalEngine", lambda policy, processor, options: made.append(StandIn(policy, processor)) or made[-1])
    monkeypatch.setattr("emo_r3.sampling.PolicySampler.sample", lambda *a, **k: pytest.fail("the policy sampled itself"))
    emo_r3.cli.run(small(sampler="vllm", max_steps=1, eval_size=2, eval_during=2, eval_every=0, report="last", trackers=()), tmp_path / "run")
    (engine,) = made
    assert engine.events[-1] == "close" and engine.events.count("take") == 2  # before the first step, and after it


# ---- several processes, an engine each

RANK = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
import emo_r3.vllm_sampler
emo_r3.vllm_sampler.PROBE_TEXT = "A quiet lake."
from emo_r3.policy import load_policy, load_processor
from emo_r3.ranks import Ranks
from emo_r3.scenes import make_scenes
from emo_r3.config import make_config
from emo_r3.train import train
from emo_r3.vllm_sampler import VLLMSampler
from stand_in import StandIn
config = make_config(dict(policy="embedded", train_size=8, prompts_per_step=4, prompts_per_update=4, num_generations=2, max_completion_tokens=12, learning_rate=1e-3, precision="fp32", min_pixels=None, max_pixels=None,
                          max_steps=3, eval_every=0, report="last", trackers=(), sharding="none", rank_timeout_s=10))
ranks, policy, processor = Ranks(10.0), load_policy(), load_processor()
engine = StandIn(policy, processor)
if ranks.rank == int(sys.argv[3]):
    real = engine.take
    engine.take = lambda policy: real(policy) if engine.events.count("take") == 0 else Path(sys.argv[1], "forgotten").touch()  # from the second step on
train(config, policy, processor, make_scenes("in_domain", "train", 8, seed=3), Path(sys.argv[1]) / "run", evaluate=None, ranks=ranks, sampler=VLLMSampler(policy, processor, engine=engine))
"""


@pytest.mark.slow
@pytest.mark.parametrize("who", [0, 1])
def test_one_rank_s_stale_engine_ends_the_others_in_time(tmp_path, who):
    "Each process is started by itself, so that no supervisor ends the other: the one says that its weights are stale, the other that this one is gone."
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    (tmp_path / "rank.py").write_text(RANK)
    start = lambda rank: subprocess.Popen([sys.executable, "-W", "ignore", str(tmp_path / "rank.py"), str(tmp_path), str(Path(__file__).parent), str(who)], stderr=subprocess.PIPE, text=True,
                                          env={**os.environ, "OMP_NUM_THREADS": "1", "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)})
    processes = [start(rank) for rank in (0, 1)]
    try:
        first = processes[who].communicate(timeout=150)[1]
        clock = time.monotonic()
        said, took = [first, processes[1 - who].communicate(timeout=60)[1]], time.monotonic() - clock
    finally:
        for p in processes: p.kill()
    assert took < 40 and all(p.returncode not in (0, None) for p in processes) and (tmp_path / "forgotten").exists(), said[0][-3000:]
    assert "StaleWeights: after the transfer of weights the probe's log-probabilities differ" in said[0], said[0][-3000:]
    assert "RankLost" in said[1] and f"rank {who} ended" in said[1] and "StaleWeights" not in said[1], said[1][-3000:]
    assert not (tmp_path / "run" / "summary.json").exists()
