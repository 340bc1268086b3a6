"""Two processes train as one would on the same completions, stop and go on together, and notice when one of them is gone."""
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from test_resume import everything

SCRIPT = Path(__file__).parent / "two_ranks.py"


def torchrun(*options, ranks=2, environment=(), wait=True):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(ranks), "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", str(SCRIPT), *map(str, options)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1", **dict(environment)})
    if not wait: return process
    out, err = process.communicate(timeout=240)
    return process.returncode, out, err


def numbers(out): return [json.loads(line) for line in out.splitlines() if line.startswith("{")]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks") / "run"
    code, out, err = torchrun("train", folder)
    assert code == 0, err[-3000:]
    return folder


def test_gradient_and_figures_are_those_of_one_process(tmp_path):
    "The same ragged completions on two ranks and on one, in double precision; averaging the ranks' averages instead is seen."
    code, out, err = torchrun("gradient", tmp_path)
    assert code == 0, err[-3000:]
    one = subprocess.run([sys.executable, str(SCRIPT), "gradient", str(tmp_path)], stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}).stdout
    ((two,), (single,)) = numbers(out), numbers(one)
    a, b = (torch.load(tmp_path / f"gradient_{n}.pt", weights_only=True) for n in (1, 2))
    assert a.norm() > 0.1 and (a - b).norm() < 1e-10 * a.norm()
    assert two["lengths"] == single["lengths"] and len(set(two["lengths"])) > 3
    for name, value in single["metrics"].items(): assert two["metrics"][name] == pytest.approx(value, rel=1e-9, abs=1e-12), name
    wrong = torch.load(tmp_path / "averaged_2.pt", weights_only=True)
    assert (wrong - a).norm() > 1e-3 * a.norm()


def test_ranks_hold_the_same_weights_and_draw_other_completions(whole):
    rows = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows] == [0, 1, 2, 3, 4, 5]
    said = [json.loads(p.read_text()) for p in sorted(whole.glob("seen_*.json"))]
    assert len(said) == 2 and said[0]["weights"] == said[1]["weights"]
    assert sorted(said[0]["ids"][:4] + said[1]["ids"][:4]) == sorted(set(said[0]["ids"] + said[1]["ids"])) and not set(said[0]["ids"][:4]) & set(said[1]["ids"][:4])  # an epoch: every picture once
    assert not set(said[0]["seeds"]) & set(said[1]["seeds"]) and len(set(said[0]["seeds"] + said[1]["seeds"])) == 8
    for step in range(0, 32, 8): assert said[0]["texts"][step: step + 8] != said[1]["texts"][step: step + 8]


@pytest.mark.slow
@pytest.mark.parametrize("stop", ["kill", "term"])
def test_stopped_and_resumed_is_the_same_run_on_two_ranks(whole, tmp_path, stop):
    folder = tmp_path / "run"
    code, _, err = torchrun("train", folder, environment={"TEST_STOP": f"{stop}:1:update:5"})
    assert code != 0 and not (folder / "summary.json").exists(), err[-2000:]
    if stop == "term": assert re.search(r"step_\d+_update_1$", sorted(p.name for p in (folder / "checkpoints").iterdir() if p.name.startswith("step"))[-1])
    code, _, err = torchrun("train", folder)
    assert code == 0 and "resuming from" in err, err[-3000:]
    a, b = everything(folder), everything(whole)
    assert a == b
    for rank in (0, 1): assert (folder / "checkpoints" / a["name"] / f"rank_{rank}.json").read_text() == (whole / "checkpoints" / a["name"] / f"rank_{rank}.json").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(("how", "who", "sharding", "where"), [("dead", 0, "none", "update:3"), ("dead", 1, "none", "update:3"), ("frozen", 0, "none", "update:3"), ("frozen", 1, "none", "update:3"), ("dead", 1, "zero2", "collect:2"), ("frozen", 0, "zero2", "collect:2")])
def test_a_rank_that_is_gone_is_named_in_time(tmp_path, how, who, sharding, where):
    "Each process is started by itself, so that no supervisor ends the other one first."
    import socket
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    start = lambda rank: subprocess.Popen([sys.executable, str(SCRIPT), "train", str(tmp_path / "run")], stderr=subprocess.PIPE, text=True,
                                          env={**os.environ, "OMP_NUM_THREADS": "1", "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "TEST_TIMEOUT": "8", "TEST_SHARDING": sharding,
                                               "TEST_STOP": f"{'kill' if how == 'dead' else 'freeze'}:{who}:{where}"})
    processes = [start(rank) for rank in (0, 1)]
    clock, other = None, processes[1 - who]
    try:
        deadline = time.monotonic() + 150
        while processes[who].poll() is None and not (tmp_path / "frozen").exists() and time.monotonic() < deadline: time.sleep(0.1)
        clock = time.monotonic()
        _, err = other.communicate(timeout=60)
        took = time.monotonic() - clock
    finally:
        for p in processes:
            p.send_signal(signal.SIGCONT), p.kill()
    assert other.returncode not in (0, None) and took < 40, (took, err[-2000:])
    assert "RankLost" in err and re.search(rf"[Rr]anks? {who}", err.partition("RankLost")[2]), err[-2000:]
    assert (tmp_path / "run" / "checkpoints").is_dir() and not (tmp_path / "run" / "summary.json").exists()
