"""The methods beside EMO-R3 on the same loop: supervised answers against transformers' own loss, DAPO's filter against counts by hand, losses by name, the checkpoint that is reported."""
import json
from dataclasses import asdict, replace

import pytest
import torch
from policies import double_throughout, processor

import emo_r3.train as loop
from emo_r3.checkpoint import Stopped
from emo_r3.data import EMOSET8
from emo_r3.config import LOSS_TYPES
from emo_r3.loss import grpo_loss
from emo_r3.parsing import read_completion
from emo_r3.policy import add_lora, banned_tokens, encode_prompts, load_policy, unwrapped
from emo_r3.prompts import direct_messages
from emo_r3.rewards import ExtraReward, RewardRecord
from emo_r3.scenes import make_scenes
from emo_r3.config import loss_options, make_config
from emo_r3.train import Depleted, Experience, Trainer, begin_step, collect, group_means, join, take_groups, to_advantages, train, train_step, update
from test_resume import BASE, Evaluating, at_call, everything, go, kill, terminate

ALONE = replace(BASE, lr_schedule="constant")  # for single steps
SFT = replace(BASE, method="sft", num_generations=1, beta=0.0)
DAPO = replace(BASE, method="grpo", beta=0.0, filter_key="accuracy", epsilon_high=0.28, delta=None, train_size=16, learning_rate=1e-5)


@pytest.fixture(scope="module")
def examples(): return make_scenes("in_domain", "train", 16, seed=3)


def grads(trainer): return torch.cat([p.grad.flatten() for p in trainer.learns.values()])


# -- supervised answers

@pytest.mark.parametrize("lora", [0, 4])
def test_the_gradient_of_supervised_answers_is_that_of_transformers_own_loss(examples, lora):
    "Cross-entropy with labels of -100 before the answer, its mean over all answer tokens, from a plain forward pass of each row: what a Trainer of transformers minimises."
    config = replace(SFT, lr_schedule="constant", freeze_vision=False, max_grad_norm=1e9, lora_rank=lora, tokens_per_forward=300)
    def policy():
        model = load_policy(dtype="float64")
        return add_lora(model, lora, 32.0, seed=1) if lora else model
    trainer = Trainer(config, policy(), processor())
    trainer.optimizer.step = lambda: None
    with double_throughout(): metrics = update(trainer, collect(trainer, examples[:5], 0, {}), torch.arange(5), None, None)
    mine = grads(trainer)
    other, total, tokens = policy(), 0.0, 0
    learns = [p for p in other.parameters() if p.requires_grad]
    end = processor().tokenizer.eos_token
    rows = []
    for x in examples[:5]:
        prompt = encode_prompts(processor(), [direct_messages(x.question, x.load_image())]).padded()
        answer = processor().tokenizer(f"\\boxed{{{x.label}}}{end}", add_special_tokens=False, return_tensors="pt").input_ids
        rows.append((prompt, answer)); tokens += answer.shape[1]
    with double_throughout():
        for prompt, answer in rows:
            unwrapped(other).model.rope_deltas = None
            ids = torch.cat([prompt["input_ids"], answer], 1)
            labels = torch.cat([torch.full_like(prompt["input_ids"], -100), answer], 1)
            out = other(input_ids=ids, attention_mask=torch.ones_like(ids), mm_token_type_ids=torch.cat([prompt["mm_token_type_ids"], torch.zeros_like(answer)], 1),
                        pixel_values=prompt["pixel_values"].double(), image_grid_thw=prompt["image_grid_thw"])
            allowed = out.logits.index_fill(-1, torch.tensor(banned_tokens(unwrapped(other))), float("-inf"))  # no completion holds a picture's placeholders
            loss = torch.nn.functional.cross_entropy(allowed[0, :-1], labels[0, 1:], ignore_index=-100, reduction="sum") / tokens
            loss.backward()
            total += loss.item()
    theirs = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in learns])
    assert metrics["loss"] == pytest.approx(total, abs=1e-10) and (mine - theirs).abs().max() < 1e-9 and theirs.norm() > 0.1


def test_supervised_answers_are_learned_and_nothing_is_sampled(examples, tmp_path, monkeypatch):
    monkeypatch.setattr("emo_r3.sampling.PolicySampler.sample", lambda *a, **k: pytest.fail("supervised learning sampled"))
    summary = train(replace(SFT, learning_rate=5e-4, train_size=16, epochs=4, max_steps=None, lr_schedule="constant"), load_policy(), processor(), examples, tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines]
    assert summary["steps"] == 16 and sum(losses[-4:]) < 0.7 * sum(losses[:4]) and not any(name.startswith(("reward", "kl")) for name in lines[0])
    sample = json.loads((tmp_path / "run" / "samples" / "step_00001.json").read_text())["groups"][0]
    assert [c["text"] for c in sample["completions"]] == [f"\\boxed{{{sample['label']}}}"]


@pytest.mark.parametrize("values, says", [
    (dict(method="sft"), "num_generations = 8; allowed with method = 'sft': 1"), (dict(method="sft", num_generations=1), "beta = 0.01; allowed with method = 'sft': 0"),
    (dict(method="sft", num_generations=1, beta=0, filter_key="overall"), "filter_key = 'overall'"), (dict(method="sft", num_generations=1, beta=0, advantage="gdpo"), "advantage = 'gdpo'"), (dict(num_generations=1), "num_generations = 1; allowed: a whole number, 2 or more"),
    (dict(method="sft", num_generations=1, beta=0, temperature=0.5), "temperature = 0.5; allowed with method = 'sft': 1"), (dict(method="sft", num_generations=1, beta=0, tis_cap=2.0), "tis_cap = 2.0; allowed with method = 'sft': null"),
    (dict(loss_type="grpo", average="constant"), "average = 'constant' beside loss_type = 'grpo'"), (dict(loss_type="dapo", clip="cispo"), "clip = 'cispo' beside loss_type"), (dict(data_seed=-1), "data_seed = -1"),
    (dict(filter_low=1.0), "filter_low = 1.0; allowed: less than filter_high = 0.99"), (dict(filter_high="1"), "filter_high = '1'"), (dict(max_refills=0), "max_refills = 0"), (dict(tis_cap=-1), "tis_cap = -1"), (dict(loss_type="grop"), "did you mean 'grpo'"),
    (dict(report="best", eval_every=0), "report = 'best'"), (dict(report="best", save_every=0), "report = 'best'"), (dict(data_format="emosett"), "did you mean 'emoset'"), (dict(advantage="z"), "allowed: group, mean, gdpo"), (dict(filter_key="acc"), "allowed: none, overall, accuracy"),
    (dict(eval_sets=["x"]), "eval_sets = "), (dict(evaluate_before="no"), "evaluate_before = 'no'"), (dict(clip="tis"), "allowed: ppo, cispo")])
def test_what_does_not_go_together(values, says):
    with pytest.raises(ValueError, match=says): make_config(values)


# -- DAPO's filter

def fake(trainer, examples, right):
    "An experience whose completions are right or wrong as the table says, all of them well formed."
    G = trainer.config.num_generations
    texts = [f"<think>so</think>\\boxed{{{x.label if r else next(l for l in EMOSET8 if l != x.label)}}}" for x, row in zip(examples, right) for r in row]
    rows = [processor().tokenizer.encode(t) for t in texts]
    T = max(map(len, rows))
    ids = torch.tensor([r + [0] * (T - len(r)) for r in rows])
    mask = torch.tensor([[1] * len(r) + [0] * (T - len(r)) for r in rows])
    completions = [read_completion("grpo", t) for t in texts]
    rewards = loop.score_completions(completions, [x for x in examples for _ in range(G)], None, trainer.weights)
    rollouts = loop.Rollouts(encode_prompts(processor(), loop.asked(trainer, examples)), ids, mask, torch.zeros(ids.shape), torch.ones(len(rows)).bool(), tuple(texts), G)
    return Experience(tuple(examples), rollouts, tuple(completions), None, tuple(rewards), to_advantages(trainer, rewards))


RIGHT = [[1, 1, 1, 1], [0, 0, 0, 0], [1, 0, 0, 0], [1, 1, 0, 1]]


@pytest.mark.parametrize("key, kept", [("accuracy", [2, 3]), ("overall", [1, 2, 3])])  # overall: 1.0, 0.1, 0.325, 0.775; a group that is all wrong but well formed passes
def test_which_groups_pass(examples, monkeypatch, key, kept):
    trainer = Trainer(replace(DAPO, lr_schedule="constant", filter_key=key, prompts_per_step=len(kept), prompts_per_update=1), load_policy(), processor())
    made = fake(trainer, examples[:4], RIGHT)
    monkeypatch.setattr(loop, "collect", lambda trainer, examples, seed, timing: made)
    found, deals, figures = loop.collect_live(trainer, examples[:len(kept)], 0, {}, None)
    assert [x.id for x in found.examples] == [examples[i].id for i in kept] and deals == 1
    assert figures == pytest.approx({"filter/kept": len(kept) / 4, "filter/all_right": 0.25, "filter/all_wrong": 0.25, "filter/accuracy": 0.5, "filter/reward": (1.0 + 0.1 + 0.325 + 0.775) / 4, "filter/refills": 1})
    assert group_means(made, "overall").tolist() == pytest.approx([1.0, 0.1, 0.325, 0.775])


def test_refills_are_dealt_on_and_surplus_groups_are_left(examples, monkeypatch):
    trainer = Trainer(replace(DAPO, lr_schedule="constant"), load_policy(), processor())
    monkeypatch.setattr(loop, "collect", lambda trainer, examples, seed, timing: (timing.update({"timing_s/rollout": 1.0}), fake(trainer, examples, RIGHT))[1])
    timing = {}
    found, deals, figures = loop.collect_live(trainer, examples[:4], 0, timing, lambda draw: (examples[4 * draw: 4 * draw + 4], draw))
    assert [x.id for x in found.examples] == [examples[i].id for i in (2, 3, 6, 7)] and deals == 2 and timing == {"timing_s/rollout": 2.0}
    whole = join([fake(trainer, examples[4 * k: 4 * k + 4], RIGHT) for k in (0, 1)])
    same = take_groups(whole, [2, 3, 6, 7])
    for name in ("completion_ids", "completion_mask", "logps", "ended"): assert torch.equal(getattr(found.rollouts, name), getattr(same.rollouts, name)), name
    assert found.rollouts.texts == same.rollouts.texts == tuple(t for i in (2, 3, 6, 7) for t in whole.rollouts.texts[4 * i: 4 * i + 4]) and torch.equal(found.advantages, same.advantages)
    assert [i.tolist() for i in found.rollouts.prompts.ids] == [whole.rollouts.prompts.ids[i].tolist() for i in (2, 3, 6, 7)] and found.rewards == same.rewards


def test_joined_experiences_teach_what_they_taught_apart(examples):
    trainer = Trainer(replace(ALONE, method="set", beta=0.0, max_grad_norm=1e9), load_policy(), processor())
    trainer.optimizer.step = lambda: None
    whole = collect(trainer, examples[:4], 7, {})
    def gradient(experience):
        update(trainer, experience, torch.arange(len(experience.examples)), None, None)
        return grads(trainer).clone()
    again = join([take_groups(whole, [0, 2]), take_groups(whole, [1]), take_groups(whole, [3])])
    assert [x.id for x in again.examples] == [examples[i].id for i in (0, 2, 1, 3)]
    assert torch.allclose(gradient(whole), gradient(again), atol=1e-6) and gradient(whole).norm() > 0


def test_a_depleted_run_ends_in_good_order(tmp_path, capsys, monkeypatch):
    "From the third step on every group is all right; two steps are made, and the policy of the second can be used."
    real, calls = loop.group_means, []
    def sure(experience, key):
        calls.append(key)
        return torch.full((len(experience.examples),), 1.0, dtype=torch.float64) if len(loop_steps(tmp_path)) >= 3 else torch.full((len(experience.examples),), 0.5, dtype=torch.float64)
    def loop_steps(folder): return (folder / "run" / "metrics.jsonl").read_text().splitlines() if (folder / "run" / "metrics.jsonl").exists() else []  # the evaluation before counts as one
    monkeypatch.setattr(loop, "group_means", sure)
    summary = go(replace(DAPO, max_refills=3, report="best", eval_every=1), tmp_path / "run")
    assert summary["steps"] == 2 and summary["ended"] | {"accuracy": 0, "reward": 0} == {"why": "depleted", "step": 2, "kept": 0.0, "all_right": 1.0, "all_wrong": 0.0, "refills": 3, "accuracy": 0, "reward": 0}
    assert "the run ends after step 2, for only 0 of 12 groups passed the filter (0.01 < mean accuracy < 0.99) in 3 draws, of 4 that a step needs; 100% were all right, 0% all wrong" in capsys.readouterr().err
    lines = [json.loads(line) for line in loop_steps(tmp_path)]
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4] and lines[3]["filter/kept"] == 0.0 and lines[2]["filter/refills"] == 1 and "eval/here/accuracy" in lines[4]
    assert (tmp_path / "run" / "policy" / "model.safetensors").exists() and load_policy(tmp_path / "run" / "policy")
    assert summary["reported"] == summary["best"] and summary["after"]["here"]["n"] >= 4


def test_a_filtered_run_uses_every_deal_once(tmp_path, monkeypatch):
    seen, real = [], loop.collect
    def noted(trainer, examples, seed, timing):
        seen.append((tuple(x.id for x in examples), seed))
        return real(trainer, examples, seed, timing)
    monkeypatch.setattr(loop, "collect", noted)
    go(DAPO, tmp_path / "run")
    dealt = [x for ids, _ in seen for x in ids]
    assert len(seen) >= 4 and len(set(seed for _, seed in seen)) == len(seen) and len(set(dealt[:16])) == 16  # an epoch deals each picture once
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert sum(line.get("filter/refills", 0) for line in lines) == len(seen)


# -- stopped and resumed

@pytest.mark.parametrize("config, where, n, what", [(SFT, "update", 3, terminate), (DAPO, "update", 2, terminate), (replace(DAPO, prompts_per_update=2), "update", 4, terminate), (DAPO, "collect", 4, kill), (replace(BASE, advantage="gdpo", prompts_per_update=2), "update", 3, terminate),
                                                    (replace(BASE, report="best", eval_every=1), "load_weights", 1, kill)], ids=["sft", "dapo", "dapo in mid-step", "dapo killed", "gdpo", "best, killed"])
def test_each_method_is_resumed_to_the_last_bit(tmp_path, monkeypatch, config, where, n, what):
    if config.report == "best": monkeypatch.setattr(Evaluating, "__call__", lambda self, model, when: (self.seen.append(when), {"here": {"accuracy": 1 / len(self.seen), "n": 1}})[1])
    go(config, tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(BaseException) as caught:
        at_call(patch, where, n, what)
        go(config, tmp_path / "run")
    assert type(caught.value).__name__ in ("Killed", "Stopped") and not (tmp_path / "run" / "summary.json").exists()
    torch.manual_seed(99)
    go(config, tmp_path / "run")
    assert everything(tmp_path / "run") == everything(tmp_path / "whole")


# -- the checkpoint that is reported

def test_the_best_by_validation_in_the_first_domain_is_measured_and_saved(tmp_path, monkeypatch):
    fingerprint = lambda model: sum(p.double().sum().item() for p in model.parameters())
    said = {0: 0.1, 1: 0.2, 2: 0.9, 3: 0.3, 4: 0.4}
    weights = {}
    def evaluation(model, when):
        weights.setdefault(when, []).append(fingerprint(model))
        k = len(weights.get("during", ())) if when == "during" else 0
        return {"trained on": {"accuracy": said[k], "n": 1}, "elsewhere": {"accuracy": 1 - said[k], "n": 1}}
    config = replace(BASE, report="best", eval_every=1, save_every=4, evaluate_before=False)
    summary = train(config, load_policy(), processor(), make_scenes("in_domain", "train", 8, seed=3), tmp_path / "run", evaluate=evaluation)
    assert summary["reported"] == {"checkpoint": "step_000002", "validation_accuracy": 0.9} and summary["before"] == {} and "before" not in weights
    assert len(weights["during"]) == 4 and weights["after"] == [weights["during"][1]] != [weights["during"][3]]  # the last step is looked at too
    assert fingerprint(load_policy(tmp_path / "run" / "policy")) == weights["during"][1]


# -- losses by name, and advantages

@pytest.mark.parametrize("name", [None, *LOSS_TYPES])
def test_each_loss_makes_an_update(examples, name):
    trainer = Trainer(replace(ALONE, loss_type=name, prompts_per_update=2, tis_cap=2.0), load_policy(), processor())
    before = next(iter(trainer.learns.values())).clone()
    _, metrics = train_step(trainer, examples[:4], seed=5)
    assert metrics["grad_norm"] > 0 and not torch.equal(before, next(iter(trainer.learns.values()))) and "sampling/importance_sampling_ratio/mean" in metrics
    assert ("cispo_clip_ratio" in metrics) == (name == "cispo") == (loss_options(trainer.config)["delta"] is None)


def test_weights_of_a_sampler_that_is_the_policy_change_nothing(examples):
    def gradient(**changes):
        trainer = Trainer(replace(ALONE, beta=0.0, max_grad_norm=1e9, **changes), load_policy(), processor())
        trainer.optimizer.step = lambda: None
        update(trainer, collect(trainer, examples[:4], 5, {}), torch.arange(4), None, None)
        return grads(trainer)
    plain = gradient()
    assert torch.equal(plain, gradient(tis_cap=0))
    assert (plain - gradient(tis_cap=2.0)).norm() < 1e-4 * plain.norm()  # sampler and scorer agree to rounding
    for level in ("token", "sequence"): assert (0.5 * plain - gradient(tis_cap=0.5, tis_level=level)).norm() < 1e-4 * plain.norm()  # every weight is cut to a half


def test_advantages_by_their_names(examples):
    rows = [RewardRecord(1.0, a, c, h, (c + h) / 2, 0.8 * a + 0.05 * c + 0.05 * h + 0.1, {"short": s}) for a, c, h, s in [(1, 1, 1, 0), (0, 1, 0, 1), (0, 0, 0, 1), (1, 0, 1, 0)]]
    extras = [ExtraReward(lambda completion, example: 0.0, 0.5, "short")]
    def of(name): return to_advantages(Trainer(replace(ALONE, advantage=name, preset="paper"), load_policy(), processor(), extras=extras), rows)[0]
    overall = torch.tensor([r.overall for r in rows])
    assert torch.allclose(of("mean"), overall - overall.mean()) and torch.allclose(of("group"), (overall - overall.mean()) / overall.std(correction=0), atol=1e-6)
    # each reward by itself is +1 or -1 here; format never varies
    assert torch.allclose(of("gdpo"), torch.tensor([0.8 + 0.05 + 0.05 - 0.5, -0.8 + 0.05 - 0.05 + 0.5, -0.8 - 0.05 - 0.05 + 0.5, 0.8 - 0.05 + 0.05 - 0.5]), atol=1e-6)


def test_a_gdpo_step_is_normalised_over_its_batch(examples):
    trainer = Trainer(replace(ALONE, advantage="gdpo"), load_policy(), processor())
    made = begin_step(trainer, examples[:4], 3).experience.advantages
    assert made.mean().abs() < 1e-6 and made.std(correction=0) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("name", ["mean", "gdpo"])
def test_a_group_without_variance_has_exactly_no_advantage(examples, monkeypatch, name):
    "Third-parts whose mean is not exactly themselves, beside groups that differ."
    G = 3
    trainer = Trainer(replace(ALONE, method="grpo", advantage=name, num_generations=G, beta=0.0), load_policy(), processor())
    paid = [[0.1] * 3, [0.7] * 3, [0.9, 0.1, 0.1], [0.1, 1.0, 0.1]]
    rows = [RewardRecord(1.0, r, 0.0, 0.0, 0.0, r) for row in paid for r in row]
    made = replace(fake(Trainer(replace(ALONE, method="grpo", num_generations=G), load_policy(), processor()), examples[:4], [[1, 0, 0]] * 4), rewards=tuple(rows), advantages=to_advantages(trainer, rows))
    monkeypatch.setattr(loop, "collect", lambda *a: made)
    found = begin_step(trainer, examples[:4], 3).experience.advantages
    assert (found[:2] == 0).all() and (found[2:] != 0).all()


# -- several ranks

class Beside:
    "A rank whose neighbour always says the same."
    rank, world, first = 1, 2, False
    def __init__(self, neighbour): self.neighbour = neighbour
    def every(self, value, where): return [self.neighbour if isinstance(value, (list, bool)) else value, value]
    def total(self, values, where): return [2 * v for v in values]


def test_gdpo_is_normalised_over_every_rank(examples):
    other = [[3.0, -1.0, -1.0, -1.0], [0.5, 0.5, -0.5, -0.5]]
    trainer = Trainer(replace(ALONE, advantage="gdpo", prompts_per_update=4), load_policy(), processor())
    alone = collect(trainer, examples[:2], 3, {}).advantages  # sums of each reward's own advantages
    trainer.ranks = Beside(other)
    made = begin_step(trainer, examples[:2], 3).experience.advantages
    everyone = torch.cat([torch.tensor(other), alone])
    assert torch.allclose(made, (alone - everyone.mean()) / everyone.std(correction=0), atol=1e-5)  # `paper`: 1 / n


def test_a_rank_that_is_full_draws_on_until_its_neighbour_is(examples, monkeypatch):
    trainer = Trainer(replace(DAPO, lr_schedule="constant"), load_policy(), processor())
    monkeypatch.setattr(loop, "collect", lambda trainer, examples, seed, timing: fake(trainer, examples, RIGHT))
    patient = Beside(False)
    said = iter([False, False, True, True])
    patient.every = lambda value, where: [next(said), value]
    trainer.ranks = patient
    found, deals, figures = loop.collect_live(trainer, examples[:2], 0, {}, lambda draw: (examples[4 * draw: 4 * draw + 4], draw))
    assert deals == 3 and len(found.examples) == 2 and figures["filter/refills"] == 3
    assert figures["filter/kept"] == 4 / 10  # first two pictures: none of RIGHT's first two rows passes; then two of four, twice
