"""A run that was killed, or stopped by a signal, and resumed is the same run to the last bit: weights, optimizer, random numbers, metrics; and it is never resumed as another run by accident."""
import hashlib
import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from policies import processor
from safetensors.torch import load_file

import emo_r3.train
from emo_r3.checkpoint import Stopped, checkpoints
from emo_r3.policy import add_lora, load_policy
from emo_r3.rewards import ExtraReward, UserCodeError
from emo_r3.sampling import PolicySampler
from emo_r3.scenes import make_scenes
from emo_r3.config import make_config
from emo_r3.train import train

BASE = make_config(dict(policy="embedded", train_size=8, prompts_per_step=4, prompts_per_update=4, num_generations=4, max_completion_tokens=56, learning_rate=1e-4, lr_schedule="linear", freeze_vision=True,
                        precision="fp32", min_pixels=None, max_pixels=None, eval_every=2, sample_every=2, save_every=2, epochs=2, max_steps=4, trackers=()))
MODES = {"one update": BASE, "several updates": replace(BASE, prompts_per_update=2), "several epochs": replace(BASE, epochs_per_step=2, freeze_vision=False),
         "adapter": replace(BASE, lora_rank=4, prompts_per_update=2), "written verdicts": replace(BASE, reflection="generate", prompts_per_update=2, beta=0.0),
         "eight bits": replace(BASE, optimizer="adamw_8bit", prompts_per_update=2), "adapter on four bits": replace(BASE, optimizer="paged_adamw_8bit", lora_rank=48, four_bit=True, precision="bf16", max_steps=3)}
CLOCKS = ("timing_s/", "perf/", "step_time")


class Killed(BaseException): "Ends a run without a checkpoint, and the objects it leaves behind are not used again. (Real kills, of whole processes, are campaigns/kill9.py's.)"


class Evaluating:
    "An evaluation that draws random numbers and remembers something, as one of your own might."
    def __init__(self): self.seen = []

    def __call__(self, model, when):
        self.seen.append(when)
        return {"here": {"accuracy": torch.rand(1).item(), "n": len(self.seen)}}

    def kept_state(self): return list(self.seen)
    def set_kept_state(self, state): self.seen = list(state)


def go(config, folder, **options):
    policy = load_policy(four_bit=config.four_bit)
    if config.lora_rank: policy = add_lora(policy, config.lora_rank, config.lora_alpha, seed=config.seed)
    return train(config, policy, processor(), make_scenes("in_domain", "train", config.train_size, seed=3), folder, evaluate=Evaluating(), **options)


def sha256(path): return hashlib.sha256(path.read_bytes()).hexdigest()


def metrics(folder): return [{k: v for k, v in json.loads(line).items() if not k.startswith(CLOCKS)} for line in (folder / "metrics.jsonl").read_text().splitlines()]


def everything(folder):
    "What has to be equal: fingerprints of weights, optimizer, random numbers; metrics, samples and summary without clocks."
    last = checkpoints(folder / "checkpoints")[-1]
    state, summary = json.loads((last / "state.json").read_text()), json.loads((folder / "summary.json").read_text())
    weights = next(p for p in (folder / "policy").iterdir() if p.suffix == ".safetensors")
    return {"weights": sha256(weights), "saved weights": sha256(last / "policy" / weights.name), "optimizer": sha256(last / "optimizer.safetensors"), "random": sha256(last / "rank_0.safetensors"), "own": json.loads((last / "rank_0.json").read_text()), "name": last.name,
            "state": {k: v for k, v in state.items() if k != "wall_s"}, "metrics": metrics(folder), "samples": {p.name: sha256(p) for p in sorted((folder / "samples").iterdir())},
            "summary": {k: v for k, v in summary.items() if k != "wall_s"}}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "Each mode's uninterrupted run, made when it is first asked for."
    made = {}
    def of(mode):
        if mode not in made:
            made[mode] = tmp_path_factory.mktemp("whole") / "run"
            go(MODES[mode], made[mode])
        return everything(made[mode])
    return of


def at_call(monkeypatch, name, n, what):
    "Makes the n-th call of a function of the loop do something first."
    real, calls = getattr(emo_r3.train, name), []
    def counted(*args, **options):
        calls.append(1)
        if len(calls) == n: what()
        return real(*args, **options)
    monkeypatch.setattr(emo_r3.train, name, counted)


def kill(): raise Killed


def terminate(): signal.raise_signal(signal.SIGTERM)


def test_two_whole_runs_are_equal_and_another_seed_is_not(whole, tmp_path):
    go(BASE, tmp_path / "again")
    assert everything(tmp_path / "again") == whole("one update")
    go(replace(BASE, seed=2), tmp_path / "other")
    for key in ("weights", "optimizer", "random", "metrics"): assert everything(tmp_path / "other")[key] != whole("one update")[key]
    assert [json.loads(line)["step"] for line in (tmp_path / "again" / "metrics.jsonl").read_text().splitlines()] == [0, 1, 2, 3, 4, 5]


MOMENTS = [("several updates", "update", 2, kill), ("several updates", "update", 6, terminate), ("several epochs", "update", 6, terminate), ("several epochs", "reflect", 4, kill), ("adapter", "update", 5, terminate),
           ("adapter", "append_metrics", 4, kill), ("written verdicts", "update", 5, terminate), ("written verdicts", "score_completions", 3, kill), ("one update", "begin_step", 3, terminate), ("one update", "save_run", 2, kill),
           ("one update", "write_sample", 2, kill), ("one update", "save_policy", 4, kill), ("one update", "eval_metrics", 2, kill), ("several updates", "write_whole", 2, kill),
           ("eight bits", "update", 4, terminate), ("eight bits", "update", 7, kill), ("adapter on four bits", "update", 2, terminate), ("adapter on four bits", "append_metrics", 4, kill)]


@pytest.mark.parametrize("mode, where, n, what", MOMENTS, ids=[f"{m}-{w}-{n}-{a.__name__}" for m, w, n, a in MOMENTS])
def test_stopped_and_resumed_is_the_same_run(whole, tmp_path, monkeypatch, mode, where, n, what):
    folder = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises((Killed, Stopped)) as caught:
        at_call(patch, where, n, what)
        go(MODES[mode], folder)
    assert not (folder / "summary.json").exists()
    if what is terminate:
        assert caught.value.code == 143
        if where == "update" and mode != "one update": assert checkpoints(folder / "checkpoints")[-1].name.split("_update_")[1:]  # in the middle of a step
    torch.manual_seed(99)  # nothing of this process is relied on
    go(MODES[mode], folder)
    assert everything(folder) == whole(mode)


@pytest.mark.parametrize("mode", ["eight bits", "adapter on four bits"])
def test_an_optimizer_in_eight_bits_keeps_bytes(whole, tmp_path, mode):
    "What the runs above compare are bytes, not averages too small to be packed; and the optimizer cannot be exchanged within a run."
    go(replace(MODES[mode], max_steps=1, lr_schedule="constant"), tmp_path / "run")
    kept = load_file(checkpoints(tmp_path / "run" / "checkpoints")[-1] / "optimizer.safetensors")
    packed = [name for name, t in kept.items() if name.endswith("/state1") and t.dtype == torch.uint8]
    assert packed and all({f"{name[:-6]}{what}" for what in ("state2", "absmax1", "absmax2", "qmap1", "qmap2", "step")} <= set(kept) for name in packed)
    assert sum(kept[name].count_nonzero() for name in packed) > 100 and {int(t) for n, t in kept.items() if n.endswith("/step")} == {4 // MODES[mode].prompts_per_update}
    (tmp_path / "run" / "summary.json").unlink()
    with pytest.raises(ValueError, match="optimizer: '(paged_)?adamw_8bit' -> 'adamw'.* cannot change within a run"): go(replace(MODES[mode], max_steps=2, lr_schedule="constant", optimizer="adamw"), tmp_path / "run", accept_changes=True)


def test_stopped_again_and_again(whole, tmp_path, monkeypatch):
    "Every update is followed by a signal, for as long as the run lasts."
    folder, stops = tmp_path / "run", 0
    while not (folder / "summary.json").exists():
        with monkeypatch.context() as patch:
            at_call(patch, "update", 1, terminate)
            try: go(MODES["several updates"], folder)
            except Stopped: stops += 1
        assert stops < 20
    assert stops == 8 and everything(folder) == whole("several updates")  # 4 steps of 2 updates each


class Drawing:
    "A sampler of one's own that counts what it drew, and is interrupted in the middle."
    def __init__(self, at=None): self.drawn, self.at, self.sampler = 0, at, None

    def sample(self, *args, **options):
        self.drawn += 1
        if self.drawn == self.at: terminate()
        return self.sampler.sample(*args, **options)

    def kept_state(self): return {"drawn": self.drawn}
    def set_kept_state(self, state): self.drawn = state["drawn"]


def test_what_helpers_keep_is_of_the_moment_that_is_saved(tmp_path):
    "The third sampling is interrupted after the sampler has counted it; the run that goes on counts it once."
    def run(folder, sampler):
        policy = load_policy()
        sampler.sampler = PolicySampler(policy, processor())
        return train(BASE, policy, processor(), make_scenes("in_domain", "train", 8, seed=3), folder, evaluate=Evaluating(), sampler=sampler)
    run(tmp_path / "whole", whole := Drawing())
    with pytest.raises(Stopped): run(tmp_path / "run", Drawing(at=3))
    run(tmp_path / "run", again := Drawing())
    assert whole.drawn == again.drawn == 4 and everything(tmp_path / "run") == everything(tmp_path / "whole")


def test_the_best_by_validation_is_kept_across_kills(tmp_path, monkeypatch):
    folder, config = tmp_path / "run", replace(BASE, eval_every=1, save_every=1, keep_last=1, trackers=("tensorboard",))
    accuracy = iter([0.1, 0.2, 0.9, 0.3, 0.4, 0.5, 0.6])
    monkeypatch.setattr(Evaluating, "__call__", lambda self, model, when: {"here": {"accuracy": next(accuracy)}})
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        at_call(patch, "update", 4, terminate)
        go(config, folder)
    assert {p.name for p in checkpoints(folder / "checkpoints")} >= {"step_000002"}
    summary = go(config, folder)
    assert [p.name for p in checkpoints(folder / "checkpoints")] == ["step_000002", "step_000004"]
    assert summary["best"] == {"validation_accuracy": 0.9, "checkpoint": "step_000002"} and list((folder / "tracking").rglob("*tfevents*"))


def test_the_newest_whole_checkpoint_is_used(whole, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        at_call(patch, "update", 7, terminate)
        go(MODES["several updates"], folder)
    newest = checkpoints(folder / "checkpoints")[-1]
    weights = newest / "policy" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.write_bytes(data)
    go(MODES["several updates"], folder)
    said = capsys.readouterr().err
    assert "policy/model.safetensors is not what was written" in said and f"damaged_{newest.name}_1" in said and "resuming from" in said
    assert everything(folder) == whole("several updates") and (folder / "checkpoints" / f"damaged_{newest.name}_1").is_dir()


def test_no_checkpoint_is_whole(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        at_call(patch, "update", 3, terminate)
        go(BASE, folder)
    for c in checkpoints(folder / "checkpoints"): (c / "state.json").write_text("{}")
    before = sorted(p.name for p in folder.iterdir())
    with pytest.raises(ValueError, match="none of its . checkpoints is whole"): go(BASE, folder)
    assert sorted(p.name for p in folder.iterdir()) == before and all(c.name.startswith("damaged_") for c in (folder / "checkpoints").iterdir())


# ---- the same run, or none

@pytest.fixture()
def stopped(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        at_call(patch, "update", 3, terminate)
        go(BASE, folder)
    return folder


def tree(folder): return {str(p.relative_to(folder)): sha256(p) for p in folder.rglob("*") if p.is_file()}


def test_another_configuration_is_refused_field_by_field(stopped, capsys):
    before = tree(stopped)
    with pytest.raises(ValueError, match=r"beta: 0.01 -> 0.02; kl: 'k3' -> 'k2'\); allowed: the same, or --accept-changes"): go(replace(BASE, beta=0.02, kl="k2"), stopped)
    with pytest.raises(ValueError, match=r"learning_rate: 0.0001 -> 1e-05 cannot change within a run") as error: go(replace(BASE, learning_rate=1e-5, beta=0.02), stopped)
    assert "accept-changes" not in str(error.value)  # nothing is offered that would be refused next
    with pytest.raises(ValueError, match=r"extras: \{\} -> \{'mine': 0.5\}"): go(BASE, stopped, extras=[ExtraReward(lambda c, x: [0.0] * len(c), 0.5, "mine")])
    assert tree(stopped) == before
    for change in ({"learning_rate": 1e-5}, {"max_steps": 3}, {"num_generations": 8}, {"prompts_per_step": 8, "prompts_per_update": 8}):  # what the optimizer, the schedule or the order keep
        with pytest.raises(ValueError, match=f"{next(iter(change))}: .* cannot change within a run"): go(replace(BASE, **change), stopped, accept_changes=True)
    assert tree(stopped) == before
    go(replace(BASE, beta=0.02), stopped, accept_changes=True)
    assert "under another configuration: beta: 0.01 -> 0.02" in capsys.readouterr().err and yaml.safe_load((stopped / "config.yaml").read_text())["beta"] == 0.02


def test_another_policy_to_begin_with_is_refused(stopped):
    "As in a notebook: the policy that was being trained is handed in again, and would become its own reference."
    policy, before = load_policy(), tree(stopped)
    with torch.no_grad(): next(policy.parameters()).add_(1e-3)
    with pytest.raises(ValueError, match="began with other weights than the policy given now"): train(BASE, policy, processor(), make_scenes("in_domain", "train", 8, seed=3), stopped, evaluate=Evaluating())
    assert tree(stopped) == before


def test_other_pictures_are_refused(stopped):
    before = tree(stopped)
    with pytest.raises(ValueError, match="other training pictures"): train(BASE, load_policy(), processor(), make_scenes("in_domain", "train", 8, seed=4), stopped, evaluate=Evaluating())
    assert tree(stopped) == before


def test_other_libraries_are_told(stopped, capsys, monkeypatch):
    real = emo_r3.train.library_versions()
    monkeypatch.setattr(emo_r3.train, "library_versions", lambda: real | {"torch": "9.9", "threads": 64})
    go(BASE, stopped)
    said = capsys.readouterr().err
    assert f"under another version: torch: '{real['torch']}' -> '9.9'" in said and f"threads: {real['threads']} -> 64" in said


def test_never_a_path_and_a_finished_run(stopped, tmp_path, whole):
    before = tree(stopped)
    with pytest.raises(ValueError, match="not empty"): go(BASE, stopped, resume="never")
    with pytest.raises(ValueError, match="no such folder"): go(BASE, tmp_path / "x", resume="nowhere")
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    with pytest.raises(ValueError, match="holds no checkpoint that is whole"): go(BASE, tmp_path / "x", resume=tmp_path / "empty")
    shutil.rmtree(tmp_path / "x")
    assert tree(stopped) == before and not (tmp_path / "x").exists()
    go(BASE, tmp_path / "branch", resume=stopped)  # from its newest checkpoint into a new folder
    branch, straight = everything(tmp_path / "branch"), whole("one update")
    left_behind = ("samples", "state", "summary")  # earlier samples, and the best checkpoint, are in the other folder
    assert {k: v for k, v in branch.items() if k not in left_behind} == {k: v for k, v in straight.items() if k not in left_behind} and branch["samples"].items() <= straight["samples"].items()
    assert branch["summary"] == {k: v for k, v in straight["summary"].items() if k != "best"}
    assert tree(stopped) == before
    with pytest.raises(ValueError, match="finished run"): go(BASE, tmp_path / "branch")
    go(BASE, tmp_path / "from here", resume=checkpoints(stopped / "checkpoints")[0])
    assert everything(tmp_path / "from here")["weights"] == whole("one update")["weights"]


def test_a_run_without_checkpoints_is_not_resumed_over(tmp_path, monkeypatch):
    folder, config = tmp_path / "run", replace(BASE, save_every=0)
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        at_call(patch, "update", 3, terminate)
        go(config, folder)
    assert not (folder / "checkpoints").exists()
    before = tree(folder)
    with pytest.raises(ValueError, match="not empty"): go(config, folder)
    assert tree(folder) == before


# ---- numbers that are not finite

def poison(monkeypatch, calls):
    "Makes the gradient of some updates NaN."
    real, n = emo_r3.train.clip_gradients, []
    def spoiled(parameters, *args, **options):
        parameters = list(parameters)
        n.append(1)
        if len(n) in calls: parameters[0].grad[0] = float("nan")
        return real(parameters, *args, **options)
    monkeypatch.setattr(emo_r3.train, "clip_gradients", spoiled)


def test_an_update_that_is_not_finite_is_skipped_and_written_aside(tmp_path, monkeypatch, capsys):
    folder, weights = tmp_path / "run", []
    config = replace(MODES["several updates"], save_every=1)
    real = emo_r3.train.update
    def watched(trainer, *args):
        flat = lambda: torch.cat([p.detach().flatten().clone() for p in trainer.policy.parameters()])
        before = flat()
        try: return real(trainer, *args)
        finally: weights.append(torch.equal(before, flat()))
    monkeypatch.setattr(emo_r3.train, "update", watched)
    poison(monkeypatch, {3})
    go(config, folder)
    assert weights == [False, False, True, False, False, False, False, False]  # the third alone changed nothing
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [r["skipped_updates"] for r in rows[1:-1]] == [0, 1, 0, 0] and all("NaN" not in line for line in (folder / "metrics.jsonl").read_text().splitlines())
    assert rows[2]["learning_rate"] < rows[1]["learning_rate"] and rows[4]["learning_rate"] == pytest.approx(1e-4 * (1 - 7 / 8))  # the schedule counts it
    report = json.loads((folder / "skipped" / "step_000001_update_1" / "report.json").read_text())
    assert report["why"].startswith("loss = ") and "grad_norm = nan" in report["why"] and len(report["texts"]) == 16 and len(report["ids"]) == 4
    assert "step 2, update 1: loss = " in capsys.readouterr().err


def test_too_many_in_a_row_end_the_run(tmp_path, monkeypatch):
    folder, config = tmp_path / "run", replace(BASE, max_skipped_updates=2, save_every=1)
    with monkeypatch.context() as patch:
        poison(patch, {2, 3})
        with pytest.raises(FloatingPointError, match=r"2 updates in a row were skipped \(max_skipped_updates = 2\)"): go(config, folder)
    assert sorted(os.listdir(folder / "skipped")) == ["step_000001_update_1", "step_000002_update_1"] and not (folder / "summary.json").exists()
    kept = checkpoints(folder / "checkpoints")[-1]
    assert kept.name == "step_000002_update_1" and json.loads((kept / "state.json").read_text())["step"] == 2  # saved before it gave up
    shutil.rmtree(folder / "skipped")
    go(config, folder)  # healed: it goes on from there
    assert (folder / "summary.json").exists()


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler")  # the first update of all is skipped
def test_skips_apart_do_not_add_up(tmp_path, monkeypatch):
    poison(monkeypatch, {1, 3})
    go(replace(BASE, max_skipped_updates=2), tmp_path / "run")


# ---- rewards and judges of your own

def test_an_own_reward_counts_and_one_that_fails_ends_the_run_with_its_name(tmp_path):
    short = ExtraReward(lambda completions, examples: [1.0 / (1 + len(c.text)) for c in completions], 0.5, "short")
    go(BASE, tmp_path / "run", extras=[short])
    rows = metrics(tmp_path / "run")
    assert all(0 < r["rewards/short/mean"] < 0.1 and r["rewards/short/std"] > 0 for r in rows[1:-1])
    sample = json.loads((tmp_path / "run" / "samples" / "step_00002.json").read_text())["groups"][0]["completions"][0]
    assert set(sample["rewards"]["extra"]) == {"short"}
    def wrong(completions, examples): return [float("nan")] * len(completions)
    with pytest.raises(UserCodeError, match="wrong"): go(BASE, tmp_path / "bad", extras=[ExtraReward(wrong, 1.0)])
    assert checkpoints(tmp_path / "bad" / "checkpoints")[-1].name == "step_000000"  # what was there stands


def test_a_judge_that_hangs_is_given_up(tmp_path):
    import threading
    class Asleep:
        def score(self, messages, answers): threading.Event().wait(30)
    with pytest.raises(UserCodeError, match="judge Asleep.score.*judge_timeout_s|judge Asleep.score.*timeout_s"): go(replace(BASE, judge_timeout_s=0.5), tmp_path / "run", judge=Asleep())
