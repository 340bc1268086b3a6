"""A policy in parts on two or four processes learns what it learns on one, and its checkpoints know nothing of how many there were."""
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
import torch
import yaml
from policies import policy
from safetensors.torch import load_file
from test_resume import BASE

from emo_r3.ranks import Ranks, even_shares
from emo_r3.scenes import make_scenes
from emo_r3.sharding import Spread, launched_sharding
from emo_r3.config import make_config, plain_config
from emo_r3.train import train

SCRIPT = Path(__file__).parent / "sharded_ranks.py"
SAME = ("reward", "reward_std", "loss", "kl", "entropy", "grad_norm", "clip_ratio/high_mean", "clip_ratio/low_mean", "rewards/accuracy/mean", "completions/mean_length", "completions/min_length", "completions/max_length", "learning_rate")


def run(folder, sharding, ranks, *fields, environment=()):
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(ranks), "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"] if ranks > 1 else []
    done = subprocess.run([sys.executable, *launcher, str(SCRIPT), str(folder), sharding, *fields], capture_output=True, text=True, timeout=580, env={**os.environ, "OMP_NUM_THREADS": "1", **dict(environment)})
    return done


def result(folder): # metrics by step, weights by name
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: {name: line[name] for name in SAME if name in line} for line in lines if "loss" in line}, load_file(folder / "policy" / "model.safetensors")


def agree(one, other, steps=range(1, 6)):
    "Sums in another order differ in their last bits, and AdamW divides by gradients: one of 1e-8 turns a last bit into 1e-9 of a weight."
    for step in steps:
        assert one[0][step].keys() == other[0][step].keys() and "kl" in one[0][step]
        for name, value in one[0][step].items(): assert other[0][step][name] == pytest.approx(value, rel=1e-6, abs=1e-9), (step, name)
    assert one[1].keys() == other[1].keys()
    for name, weight in one[1].items():
        assert weight.dtype == torch.float64
        torch.testing.assert_close(other[1][name], weight, rtol=0, atol=1e-7, msg=lambda said: f"{name}: {said}")


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone") / "run"
    done = run(folder, "none", 1)
    assert done.returncode == 0, done.stderr[-3000:]
    found = result(folder)
    begun = load_file(Path(__file__).parent.parent / "emo_r3" / "embedded" / "policy" / "model.safetensors")
    name = "model.layers.3.mlp.down_proj.weight"
    assert (found[1][name] - begun[name].double()).abs().mean() > 1e-4  # five steps moved the weights a thousand times as far as runs may differ
    assert found[0][1]["completions/min_length"] == 9 < found[0][1]["completions/max_length"]
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "sharding", "fields"), [(2, "none", ()), (2, "zero2", ("gradient_checkpointing=true",)), (2, "zero3", ("tokens_per_forward=600",)), (4, "zero2", ("tokens_per_forward=900",)), (4, "zero3", ("gradient_checkpointing=true",))])
def test_five_steps_are_those_of_one_process(alone, tmp_path, ranks, sharding, fields):
    done = run(tmp_path / "run", sharding, ranks, *fields)
    assert done.returncode == 0, done.stderr[-3000:]
    agree(alone, result(tmp_path / "run"))
    balance = [json.loads(line)["perf/rank_balance"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(0.5 < b <= 1 for b in balance)


@pytest.mark.slow
@pytest.mark.parametrize(("sharding", "others"), [("zero3", (1, 2)), ("zero2", (2,))])
def test_a_run_of_four_goes_on_with_one_or_two_in_the_middle_of_a_step(alone, tmp_path, sharding, others):
    stopped = run(tmp_path / "four", sharding, 4, environment={"TEST_STOP": "term:2:update:4"})  # in the second step, one of its two updates made
    assert stopped.returncode != 0
    left = [p.name for p in (tmp_path / "four" / "checkpoints").iterdir()]
    assert "step_000001_update_1" in left or "step_000001_update_2" in left, left
    for n in others:
        subprocess.run(["cp", "-r", str(tmp_path / "four"), str(tmp_path / f"on_{n}")], check=True)
        done = run(tmp_path / f"on_{n}", "none" if n == 1 else "zero2", n)
        assert done.returncode == 0, done.stderr[-3000:]
        assert f"another number of processes: 4 -> {n}" in done.stderr
        agree(alone, result(tmp_path / f"on_{n}"))


@pytest.mark.slow
@pytest.mark.parametrize("what", ["bf16", "dead"])
@pytest.mark.parametrize("sharding", ["zero2", "zero3"])
def test_in_half_precision_the_reference_is_the_policy_and_dead_updates_decay(what, sharding):
    done = run(what, sharding, 2)
    assert done.returncode == 0 and done.stdout.count("finished") == 2, done.stderr[-3000:]


@pytest.mark.slow
def test_with_a_frozen_tower_and_a_dead_half(tmp_path):
    "beta = 0: groups without variance are left out, on one rank more than on the other; the tower is whole on each rank."
    fields = ("freeze_vision=true", "beta=0.0", "max_steps=2", "num_generations=2", "max_completion_tokens=10")  # nearly all groups are dead: no answer is finished
    for name, ranks, sharding in (("one", 1, "none"), ("two", 2, "zero2"), ("three", 2, "zero3")):
        done = run(tmp_path / name, sharding, ranks, *fields)
        assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in (tmp_path / "one" / "metrics.jsonl").read_text().splitlines()]
    assert any(line.get("frac_reward_zero_std", 0) > 0 for line in lines)
    one = result(tmp_path / "one")
    for name in ("two", "three"):
        other = result(tmp_path / name)
        for key, weight in one[1].items(): torch.testing.assert_close(other[1][key], weight, rtol=0, atol=1e-7, msg=lambda said: f"{key}: {said}")


@pytest.mark.slow
def test_the_launch_file_starts_a_sharded_run_and_an_evaluation_is_shared(tmp_path):
    "As tutorials/eight_gpus has it, on two processes of this CPU."
    there = {**os.environ, "OMP_NUM_THREADS": "1"}
    scripts = Path(sys.executable).parent
    launch = [str(scripts / "accelerate"), "launch", "--config_file", str(Path(__file__).parent.parent / "emo_r3" / "launch" / "fsdp2_reshard.yaml"), "--num_processes", "2", "--no_python", str(scripts / "emo-r3")]
    small = ["--max-steps", "1", "--prompts-per-step", "8", "--prompts-per-update", "8", "--eval-size", "3", "--evaluate-before", "false", "--output-dir", str(tmp_path / "run")]
    done = subprocess.run([*launch, "train", "scenes_cpu", *small], capture_output=True, text=True, timeout=580, env=there)
    assert done.returncode == 0 and str(tmp_path / "run" / "report.html") in done.stdout, done.stderr[-3000:]
    for name, command in (("one", [str(scripts / "emo-r3")]), ("two", launch)):
        done = subprocess.run([*command, "evaluate", str(tmp_path / "run" / "policy"), "scenes", "--size", "3", "--predictions", str(tmp_path / name)], capture_output=True, text=True, timeout=580, env=there)
        assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes() == (tmp_path / "run" / "predictions" / "after.jsonl").read_bytes()


def test_launch_files_say_what_they_are_called():
    folder = Path(__file__).parent.parent / "emo_r3" / "launch"
    asked = {}
    for path in sorted(folder.glob("*.yaml")):
        said = yaml.safe_load(path.read_text())
        fsdp = said.get("fsdp_config", {})
        environment = {"ACCELERATE_USE_FSDP": "true" if said["distributed_type"] == "FSDP" else "false", "FSDP_VERSION": str(fsdp.get("fsdp_version", 1)), "FSDP_RESHARD_AFTER_FORWARD": str(fsdp.get("fsdp_reshard_after_forward", "")).lower()}
        asked[path.stem] = launched_sharding(environment)
    assert asked == {"ddp": "none", "fsdp2": "zero2", "fsdp2_reshard": "zero3", "multi_node": "zero2"}


def test_what_cannot_be_sharded_is_refused(monkeypatch, tmp_path):
    for fields, said in (({"sharding": "zero2", "lora_rank": 4}, "sharding = 'zero2'; allowed: none with lora_rank above 0"), ({"sharding": "zero3", "optimizer": "adamw_8bit"}, "sharding = 'zero3'; allowed: none (distributed_type: MULTI_GPU in accelerate's launch file) with optimizer = 'adamw_8bit'"), ({"sharding": "zero1"}, "zero2")):
        with pytest.raises(ValueError, match="sharding") as error: make_config({**plain_config(BASE), **fields})
        assert said in str(error.value)
    for name, value in (("ACCELERATE_USE_FSDP", "true"), ("FSDP_VERSION", "2"), ("FSDP_RESHARD_AFTER_FORWARD", "false")): monkeypatch.setenv(name, value)
    for fields in ({"lora_rank": 4}, {"optimizer": "adamw_8bit"}):  # asked for by the launch file alone, it is refused before a policy is needed
        with pytest.raises(ValueError, match="sharding = 'zero2'; allowed: none .*MULTI_GPU"): train(replace(BASE, **fields), None, None, make_scenes("in_domain", "train", BASE.prompts_per_step, seed=1), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match="allowed: none, zero2, zero3"): Spread(policy(), "zero4", Ranks())


@pytest.mark.parametrize("seed", range(20))
def test_shares_are_even_and_nothing_is_lost(seed):
    random = Random(seed)
    world, n = random.randint(2, 8), random.randint(1, 12)
    tokens = [[random.choice((random.randint(1, 50), random.randint(500, 5000))) for _ in range(n)] for _ in range(world)]
    shares = even_shares(tokens)
    assert sorted(g for share in shares for g in share) == [(r, i) for r in range(world) for i in range(n)] and {len(s) for s in shares} == {n}
    sums, before = [sum(tokens[r][i] for r, i in share) for share in shares], [sum(row) for row in tokens]
    assert max(sums) <= max(before) and min(sums) >= min(before)
    heavy, light = sums.index(max(sums)), sums.index(min(sums))  # no single swap between the two would still bring them closer
    gap = max(sums) - min(sums)
    if gap > 0.01 * sum(sums) / world: assert all(abs(gap - 2 * (tokens[a[0]][a[1]] - tokens[b[0]][b[1]])) >= gap for a in shares[heavy] for b in shares[light])
