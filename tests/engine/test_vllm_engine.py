"""The vLLM sampler against vLLM's real engine, on the CPU, driving the embedded policy: `make test-vllm`."""
import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("vllm")
sys.path.insert(0, str(Path(__file__).parents[1]))
from policies import policy as policy_of  # noqa: E402
from served import vllm_server  # noqa: E402

from emo_r3.data import EMOSET8  # noqa: E402
from emo_r3.groups import group_logps  # noqa: E402
from emo_r3.policy import EMBEDDED_POLICY, banned_tokens, completion_logps, encode_prompts, load_policy, load_processor, unwrapped  # noqa: E402
from emo_r3.prompts import coherence_messages, consistency_messages, set_messages  # noqa: E402
from emo_r3.sampling import PolicyJudge, PolicySampler  # noqa: E402
from emo_r3.scenes import make_scenes  # noqa: E402
from emo_r3.vllm_sampler import PromptMismatch, StaleWeights, VLLMSampler, make_sampler  # noqa: E402

pytestmark = pytest.mark.vllm
SIZES = [(96, 96), (160, 96), (60, 150), (97, 101)]
BOUND = 1e-5


@pytest.fixture(scope="module")
def processor(): return load_processor(max_pixels=2 * 9216)


@pytest.fixture(scope="module")
def asked(): return [set_messages(x.question, x.image.resize(s)) for x, s in zip(make_scenes("in_domain", "train", 4), SIZES)]


@pytest.fixture(scope="module", params=["full", "lora", "merged", "four_bit"])
def sampler(request, processor):
    kind = request.param
    made = VLLMSampler(policy_of("lora" if kind == "merged" else kind), processor, {"lora": "merged"} if kind == "merged" else {})
    made.kind = kind
    yield made
    made.close()


def gap(rollouts, scored): return ((scored - rollouts.logps).abs() * rollouts.completion_mask).max().item()


def agree(rollouts, scored):
    "Whether an engine's log-probabilities are ours: to 1e-5, but for one token in a hundred, whose probability is so small that a float has no more digits."
    off = (scored - rollouts.logps).abs()[rollouts.completion_mask.bool()]
    return off.quantile(0.99) < BOUND and off.max() < 5 * BOUND


@torch.no_grad()
def change(policy, size=0.01, seed=0):
    "Moves what learns, as an update would."
    gen = torch.Generator().manual_seed(seed)
    for p in policy.parameters():
        if p.requires_grad: p.add_(size * torch.randn(p.shape, generator=gen))


def test_log_probabilities_agree_with_transformers_on_pictures_of_mixed_sizes(sampler, asked):
    r = sampler.sample(asked, 4, 48, 0.7, seed=3)
    assert len({p.grid for p in r.prompts.pictures}) >= 3 and len(set(r.lengths.tolist())) > 2
    rows, ids, mask = r.rows(torch.arange(16))
    with torch.no_grad():
        assert agree(r, completion_logps(sampler.policy, rows, ids, mask, 0.7))
        assert agree(r, group_logps(sampler.policy, *r.packed(torch.arange(16)), 0.7))
        assert gap(r, completion_logps(sampler.policy, rows, ids, mask, 1.0)) > 1e-2  # a forgotten temperature would be seen
    assert sampler.gap < 1e-4


def test_greedy_completions_are_the_policy_s(sampler, asked):
    ours, theirs = sampler.sample(asked, 2, 48, 0.0), PolicySampler(sampler.policy, sampler.processor).sample(asked, 2, 48, 0.0)
    assert ours.texts == theirs.texts and torch.equal(ours.ended, theirs.ended)
    assert torch.equal(ours.completion_ids * ours.completion_mask, theirs.completion_ids * theirs.completion_mask)


def test_new_weights_take_effect_at_once(sampler, asked):
    old = sampler.sample(asked, 2, 32, 0.7, seed=5)
    change(sampler.policy)
    sampler.learned()
    new = sampler.sample(asked, 2, 32, 0.7, seed=5)
    with torch.no_grad(): now = [completion_logps(sampler.policy, *r.rows(torch.arange(8)), 0.7) for r in (old, new)]
    assert gap(old, now[0]) > 1e-2  # the policy is another
    assert agree(new, now[1])  # and the engine is with it


def test_old_weights_are_refused(sampler, asked, monkeypatch):
    sampler.sample(asked[:1], 1, 4, 0.7, seed=5)
    change(sampler.policy, seed=1)
    sampler.learned()
    with monkeypatch.context() as m:
        m.setattr(sampler.engine, "take", lambda policy: None)  # the transfer is forgotten
        with pytest.raises(StaleWeights, match="by the policy, .* by the engine"): sampler.sample(asked[:1], 1, 4, 0.7, seed=5)
        assert sampler.stale and sampler.depth == 0
    sampler.sample(asked[:1], 1, 4, 0.7, seed=5)  # with it all is well


def test_caches_of_the_old_policy_are_forgotten(sampler, asked, monkeypatch):
    "Keys and values of a prompt longer than a block (128 tokens on a CPU) are remembered; those of the old weights must not be."
    long = [[{"role": "system", "content": "A word. " * 80}, *asked[0]]]
    read = lambda: sampler.sample(long, 2, 16, 0.7, seed=1)
    scored = lambda r: completion_logps(sampler.policy, *r.rows(torch.arange(2)), 0.7)
    for forgetful in (False, True):
        read()
        change(sampler.policy, 0.02, seed=2)
        sampler.learned()
        with monkeypatch.context() as m, torch.no_grad():
            if not forgetful: m.setattr(sampler.engine.llm, "reset_prefix_cache", lambda: True)
            try: r = read()
            except StaleWeights: continue  # the probe's own prompt was remembered
            assert agree(r, scored(r)) == (forgetful or sampler.engine.adapter)  # what was remembered under an old adapter's number is not read under a new one's
        sampler.learned()


def test_one_seed_one_draw_and_nothing_beside_it_matters(sampler, asked):
    draw = lambda asked, seed: sampler.sample(asked, 3, 40, 1.5, seed=seed)
    one, again, other = draw(asked, 11), draw(asked, 11), draw(asked, 12)
    assert torch.equal(one.completion_ids, again.completion_ids)
    assert len(set(one.texts) & set(other.texts)) < 5  # of 12; were the next seed the next of the engine's count, 8 would be the same
    assert draw(asked[:1], 11).texts == one.texts[:3]  # the first prompt's draw does not depend on the others
    same = sampler.sample([asked[0]] * 3, 4, 24, 1.5, seed=11)
    assert len(set(same.texts)) > 6  # nor do equal prompts draw alike


def test_a_picture_s_tokens_are_never_drawn(processor, asked):
    "Of a policy that would write little else."
    policy, rows = load_policy(), None
    banned = banned_tokens(policy)
    with torch.no_grad():
        rows = policy.get_input_embeddings().weight  # the output layer's too
        first = policy(**encode_prompts(processor, asked[:1]).padded()).logits[0, -1].argmax()
        rows[banned] = 2 * rows[first]
        assert policy(**encode_prompts(processor, asked[:1]).padded()).logits[0, -1].softmax(0)[banned].sum() > 0.9
    sampler = VLLMSampler(policy, processor)
    r = sampler.sample(asked, 8, 24, 1.0, seed=0)
    assert not set(r.completion_ids[r.completion_mask.bool()].tolist()) & set(banned)
    with torch.no_grad(): assert agree(r, completion_logps(policy, *r.rows(torch.arange(32)), 1.0))
    sampler.close()


def questions():
    xs = make_scenes("in_domain", "train", 3, seed=4)
    return [consistency_messages(x.image, f"A {x.objects[0]} stands out.") for x in xs] + [coherence_messages(f"A {x.objects[0]} stands out.", "A viewer would smile.", EMOSET8) for x in xs]


def test_reflection_in_the_same_window_agrees_with_the_policy_s_own(sampler, asked):
    asks, answers = questions(), [("Yes", "No")] * 3 + [EMOSET8.labels] * 3
    judge = PolicyJudge(sampler.policy, sampler.processor)
    with sampler.awake():
        before = sampler.syncs
        sampler.sample(asked, 1, 8, 1.0, seed=0)
        ours, written = sampler.score(asks, answers), sampler.generate(asks)
        assert sampler.syncs == before  # one transfer for all
    theirs = judge.score(asks, answers)
    assert max(abs(a - b) for x, y in zip(ours, theirs) for a, b in zip(x, y)) < BOUND * 5  # a label is a sum over its tokens
    assert written == judge.generate(asks)


def test_whole_labels_are_scored_where_they_share_first_tokens(sampler):
    answers = [("a ghost", "a ghost stands", "a key", "ghost")] * 6
    encode = sampler.processor.tokenizer.encode
    assert len({encode(a)[0] for a in answers[0]}) < 4 and max(len(encode(a)) for a in answers[0]) > 2
    ours, theirs = sampler.score(questions(), answers), PolicyJudge(sampler.policy, sampler.processor).score(questions(), answers)
    assert max(abs(a - b) for x, y in zip(ours, theirs) for a, b in zip(x, y)) < BOUND * 5


def test_a_picture_that_the_engine_cuts_otherwise_is_refused(sampler, asked, monkeypatch):
    monkeypatch.setattr(sampler, "processor", load_processor(max_pixels=8 * 9216))  # not what the engine was started with
    large = [set_messages("Which?", make_scenes("in_domain", "train", 1)[0].image.resize((240, 240)))]
    with pytest.raises(PromptMismatch, match=r"prompt 0 \(240 x 240 pixels.*\): the engine made \d+ picture tokens of it, the policy's processor 100"): sampler.sample(large, 1, 4, 1.0, seed=0)


def test_random_states_and_threads_stay_as_they_were(sampler, asked):
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    expected = random.random(), np.random.rand(), torch.rand(2)
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    sampler.learned()
    with torch.autocast("cpu", torch.bfloat16, enabled=False): sampler.sample(asked, 2, 8, 1.0, seed=3)
    assert (random.random(), np.random.rand()) == expected[:2] and torch.equal(torch.rand(2), expected[2])


def test_too_long_a_prompt_is_refused(sampler, asked):
    with pytest.raises(ValueError, match="allowed: 4096 together"): sampler.sample(asked, 1, 4096, 1.0, seed=0)


STEPS = dict(sampler="vllm", tis_cap=2, max_steps=3, eval_size=8, eval_during=4, eval_every=0, prompts_per_step=4, prompts_per_update=4, num_generations=4)


@pytest.mark.parametrize("how", [{}, {"lora_rank": 4}, {"lora_rank": 4, "four_bit": "true", "reflection": "generate"}], ids=["full", "lora", "four_bit, written answers"])
def test_three_steps_by_the_command(tmp_path, how):
    options = [x for name, value in (STEPS | how).items() for x in (f"--{name.replace('_', '-')}", str(value))]
    done = subprocess.run([str(Path(sys.executable).with_name("emo-r3")), "train", "scenes_cpu", *options, "--output-dir", str(tmp_path / "run")], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [x for x in lines if "grad_norm" in x]
    assert len(steps) == 3 and all(x["sampling/sampling_logp_difference/max"] < 5 * BOUND and x["sampling/probe_difference"] < 1e-4 and x["grad_norm"] > 0 for x in steps)
    assert all(x["sampling/importance_sampling_ratio/mean"] == pytest.approx(1, abs=1e-5) for x in steps) and all(x["timing_s/sync"] > 0 for x in steps)
    assert steps[1]["kl"] > 0  # the weights have moved, and the sampler with them
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["after"]


def test_two_processes_each_with_an_engine(tmp_path):
    "Under torchrun; the same question, another seed a rank, then an update."
    (tmp_path / "two.py").write_text('''
import json, sys
import torch
from pathlib import Path
from emo_r3.policy import completion_logps, load_policy, load_processor
from emo_r3.prompts import set_messages
from emo_r3.ranks import Ranks
from emo_r3.scenes import make_scenes
from emo_r3.vllm_sampler import make_sampler
ranks, policy, processor = Ranks(120.0), load_policy(), load_processor()
sampler, asked, out = make_sampler("vllm", {}, policy, processor, ranks), [set_messages(x.question, x.image) for x in make_scenes("in_domain", "train", 2)], []
for step in range(2):
    r = sampler.sample(asked, 4, 24, 1.0, seed=10 + ranks.rank)
    with torch.no_grad():
        out.append([r.texts, ((completion_logps(policy, *r.rows(torch.arange(8)), 1.0) - r.logps).abs() * r.completion_mask).max().item()])
        for p in policy.parameters(): p.add_(0.01 * torch.randn(p.shape, generator=torch.Generator().manual_seed(step)))
    sampler.learned()
Path(sys.argv[1], f"{ranks.rank}.json").write_text(json.dumps(out))
ranks.meet("the end")
''')
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--nproc_per_node", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", str(tmp_path / "two.py"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr[-3000:]
    a, b = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert a[0][0] != b[0][0] and all(off < 5 * BOUND for off in (a[0][1], a[1][1], b[0][1], b[1][1]))


@pytest.fixture(scope="module")
def server():
    "vLLM's own server, with our worker's methods."
    with vllm_server("--no-enable-chunked-prefill", "--enable-scale-out", "--logprobs-mode", "processed_logprobs", "--max-logprobs", "129", "--max-model-len", "2048", "--max-num-batched-tokens", "2048", "--worker-extension-cls", "emo_r3.vllm_sampler.ServerWorker",
                     "--mm-processor-kwargs", json.dumps({"size": {"shortest_edge": 4608, "longest_edge": 2 * 9216}}), "--limit-mm-per-prompt", json.dumps({"image": 1, "video": 0}), "--enable-lora", "--max-lora-rank", "8",
                     environment={"VLLM_SERVER_DEV_MODE": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}) as url: yield url


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_server_of_vllm_s_own(server, processor, asked, tmp_path, kind):
    policy = policy_of(kind)
    sampler = make_sampler("vllm_server", {"url": server, "folder": str(tmp_path / "shared")}, policy, processor)
    assert sampler.engine.dtype == "float32"  # as it says itself
    for step in range(2):
        r = sampler.sample(asked, 4, 40, 0.7, seed=step)
        with torch.no_grad(): assert agree(r, completion_logps(policy, *r.rows(torch.arange(16)), 0.7))
        change(policy, seed=step)
        sampler.learned()
    asks, answers = questions(), [("Yes", "No")] * 3 + [EMOSET8.labels] * 2 + [("a ghost", "a ghost stands", "a key")]
    with sampler.awake(): ours, written = sampler.score(asks, answers), sampler.generate(asks)
    judge = PolicyJudge(policy, processor)
    assert max(abs(a - b) for x, y in zip(ours, judge.score(asks, answers)) for a, b in zip(x, y)) < BOUND * 5 and written == judge.generate(asks)
    change(policy, seed=7)
    sampler.learned()
    sampler.engine.take = lambda policy: None
    with pytest.raises(StaleWeights): sampler.sample(asked, 1, 4, 0.7, seed=5)
    with pytest.raises(PromptMismatch, match="picture tokens"):
        monkey = make_sampler("vllm_server", {"url": server, "folder": str(tmp_path / "shared")}, policy, load_processor(max_pixels=8 * 9216))
        monkey.sample([set_messages("Which?", make_scenes("in_domain", "train", 1)[0].image.resize((240, 240)))], 1, 4, 1.0, seed=0)
    with pytest.raises(StaleWeights, match="another run has handed its own weights over"): sampler.sample(asked, 1, 4, 0.7, seed=5)  # the one that was just made
    sampler.close()
