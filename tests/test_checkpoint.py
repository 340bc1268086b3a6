"""A checkpoint is there whole or not at all, damage is noticed, only the newest whole one is used, and what comes back is what went in, to the last bit."""
import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import bitsandbytes
import numpy as np
import pytest
import torch
from policies import KINDS, policy, processor
from safetensors.torch import load_file, save_file

import emo_r3.checkpoint as checkpoint
from emo_r3.checkpoint import (DamagedCheckpoint, Stopped, StopSignals, check_checkpoint, checkpoint_name, checkpoints, differences, latest_checkpoint, load_optimizer, load_weights, new_checkpoint, only_one,
                               optimizer_tensors, prune_checkpoints, random_states, set_random_states)
from emo_r3.policy import save_policy, staged_folder


cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def make(folder, step, updates=0):
    target = folder / checkpoint_name(step, updates)
    with new_checkpoint(target) as staging:
        (staging / "policy").mkdir()
        save_file({"w": torch.full((64,), float(step))}, staging / "policy" / "model.safetensors")
        (staging / "state.json").write_text(json.dumps({"step": step}))
    return target


def truncate(path): path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def swap(path): path.write_bytes(bytes(path.stat().st_size))  # same length, other content


# ---- whole or not there

def test_a_block_that_fails_leaves_nothing(tmp_path):
    make(tmp_path, 1)
    with pytest.raises(RuntimeError), new_checkpoint(tmp_path / "step_000002") as staging:
        (staging / "x").write_text("half")
        raise RuntimeError
    assert os.listdir(tmp_path) == ["step_000001"]


@pytest.mark.parametrize("when", ["in the block", "before the manifest", "before the rename"])
def test_a_kill_leaves_nothing_under_the_name(tmp_path, when):
    code = f"""
import os, signal, sys; from pathlib import Path; import emo_r3.checkpoint as c
kill = lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL)
if {when!r} == "before the manifest": c.write_manifest = kill
if {when!r} == "before the rename": Path.rename = kill
with c.new_checkpoint(Path(sys.argv[1]) / "step_000002") as staging:
    (staging / "x").write_text("half")
    if {when!r} == "in the block": kill()
"""
    make(tmp_path, 1)
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)]).returncode == -signal.SIGKILL
    left = [p for p in tmp_path.iterdir() if p.name.startswith(".step_000002.partial")]
    assert len(left) == 1 and latest_checkpoint(tmp_path).name == "step_000001"
    (tmp_path / "run").mkdir()
    left[0].rename(tmp_path / "run" / left[0].name)
    with only_one(tmp_path / "run"): assert os.listdir(tmp_path / "run") == [".lock"]  # the next process tidies up


def test_an_existing_folder_is_replaced_whole_or_kept(tmp_path, monkeypatch):
    for text in ("old", "new"):
        with staged_folder(tmp_path / "policy") as staging: (staging / "x").write_text(text)
    assert (tmp_path / "policy" / "x").read_text() == "new"
    rename, calls = Path.rename, []
    def second_fails(self, target):
        calls.append(self)
        if len(calls) == 2: raise OSError(errno.EIO, "input/output error")
        return rename(self, target)
    monkeypatch.setattr(Path, "rename", second_fails)
    with pytest.raises(OSError), staged_folder(tmp_path / "policy") as staging: (staging / "x").write_text("newest")
    assert (tmp_path / "policy" / "x").read_text() == "new" and os.listdir(tmp_path) == ["policy"]


def test_everything_is_on_the_disk_before_the_name_is_taken(tmp_path, monkeypatch):
    done = []
    fsync, rename = os.fsync, Path.rename
    monkeypatch.setattr(os, "fsync", lambda handle: done.append(os.readlink(f"/proc/self/fd/{handle}") if Path("/proc/self/fd").exists() else "") or fsync(handle))
    monkeypatch.setattr(Path, "rename", lambda self, target: done.append("rename") or rename(self, target))
    make(tmp_path, 3)
    names, at = [Path(d).name for d in done], done.index("rename")
    if not Path("/proc/self/fd").exists(): pytest.skip("no /proc here")
    assert {"model.safetensors", "state.json", "manifest.json", "policy"} <= set(names[:at]) and names[at + 1:] == [tmp_path.name]


def test_a_full_disk_leaves_earlier_checkpoints(tmp_path):
    "The limit on a file's size stands for a full disk: the operating system refuses to write on."
    make(tmp_path, 1)
    code = """
import resource, signal, sys, torch; from pathlib import Path; from safetensors.torch import save_file; from emo_r3.checkpoint import new_checkpoint
signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    with new_checkpoint(Path(sys.argv[1]) / "step_000002") as staging:
        if sys.argv[2] == "tensors": save_file({"w": torch.zeros(100_000)}, staging / "w.safetensors")
        else: (staging / "x.json").write_text("1" * 200_000)
except OSError as error: print(type(error).__name__, error); sys.exit(3)
"""
    for what in ("tensors", "text"):
        out = subprocess.run([sys.executable, "-c", code, str(tmp_path), what], capture_output=True, text=True)
        assert out.returncode == 3 and "too large" in out.stdout.lower(), out
        assert os.listdir(tmp_path) == ["step_000001"]
    check_checkpoint(tmp_path / "step_000001")


# ---- damage

@pytest.mark.parametrize("file", ["policy/model.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("how", [truncate, flip, swap, Path.unlink])
def test_damage_is_noticed_named_and_set_aside(tmp_path, capsys, file, how):
    for step in (1, 2, 10): make(tmp_path, step)
    how(tmp_path / "step_000010" / file)
    with pytest.raises(DamagedCheckpoint, match="step_000010"): check_checkpoint(tmp_path / "step_000010")
    assert latest_checkpoint(tmp_path) == tmp_path / "step_000002"
    said = capsys.readouterr().err
    assert "step_000010" in said and "damaged_step_000010_1" in said and (file == "manifest.json" or file in said)
    assert sorted(os.listdir(tmp_path)) == ["damaged_step_000010_1", "step_000001", "step_000002"]
    assert latest_checkpoint(tmp_path) == tmp_path / "step_000002" and capsys.readouterr().err == ""  # once is enough
    how(make(tmp_path, 10) / file)
    latest_checkpoint(tmp_path)
    assert (tmp_path / "damaged_step_000010_2").is_dir()


def test_a_file_more_a_folder_less_and_strange_manifests(tmp_path):
    target = make(tmp_path, 1)
    (target / "extra.bin").write_bytes(b"x")
    with pytest.raises(DamagedCheckpoint, match="extra.bin is not in manifest.json"): check_checkpoint(target)
    (target / "extra.bin").unlink()
    check_checkpoint(target)
    for text in ("[]", "{}", '{"format": 1, "files": []}', '{"format": 1, "files": {"state.json": 3}}', '{"format": 2, "files": {}}', "[" * 100_000, "\x00"):
        (target / "manifest.json").write_text(text)
        with pytest.raises(DamagedCheckpoint, match="manifest.json"): check_checkpoint(target)
    with pytest.raises(DamagedCheckpoint, match="manifest.json is missing"): check_checkpoint(tmp_path / "nothing")
    assert latest_checkpoint(tmp_path / "nothing") is None


def test_newest_first_and_retention(tmp_path):
    for step, updates in ((2, 0), (10, 0), (9, 3), (9, 12), (100, 0)): make(tmp_path, step, updates)
    (tmp_path / "step_abc").mkdir(), (tmp_path / "best").mkdir()
    assert [p.name for p in checkpoints(tmp_path)] == ["step_000002", "step_000009_update_3", "step_000009_update_12", "step_000010", "step_000100"]
    prune_checkpoints(tmp_path, keep_last=2, best="step_000009_update_3")
    assert [p.name for p in checkpoints(tmp_path)] == ["step_000009_update_3", "step_000010", "step_000100"]
    prune_checkpoints(tmp_path, keep_last=1)
    assert [p.name for p in checkpoints(tmp_path)] == ["step_000100"] and not [p for p in tmp_path.iterdir() if "partial" in p.name]


def test_a_disk_that_cannot_be_read_is_damage_too(tmp_path, monkeypatch, capsys):
    for step in (1, 2): make(tmp_path, step)
    real = checkpoint.file_sha256
    def bad_sector(path):
        if "step_000002" in str(path): raise OSError(errno.EIO, "Input/output error", str(path))
        return real(path)
    monkeypatch.setattr(checkpoint, "file_sha256", bad_sector)
    assert latest_checkpoint(tmp_path) == tmp_path / "step_000001" and "Input/output error" in capsys.readouterr().err


def test_somebody_elses_run_is_left_as_it_is(tmp_path, capsys):
    for step in (1, 2): make(tmp_path, step)
    flip(tmp_path / "step_000002" / "state.json")
    assert latest_checkpoint(tmp_path, set_aside=False) == tmp_path / "step_000001"
    assert "state.json" in capsys.readouterr().err and sorted(os.listdir(tmp_path)) == ["step_000001", "step_000002"]


def test_a_kill_between_two_renames_loses_nothing(tmp_path):
    (tmp_path / "policy").mkdir()
    (tmp_path / "policy" / "x").write_text("old")
    (tmp_path / "policy").rename(tmp_path / ".policy.partial-123-old")
    (tmp_path / ".policy.partial-123").mkdir()
    with only_one(tmp_path): assert (tmp_path / "policy" / "x").read_text() == "old" and sorted(os.listdir(tmp_path)) == [".lock", "policy"]


# ---- what comes back

def test_random_numbers_go_on_where_they_were():
    draw = lambda: (torch.rand(3).tolist(), np.random.rand(), np.random.normal(), random.random(), random.gauss(0, 1))
    torch.manual_seed(1), np.random.seed(2), random.seed(3)
    draw()  # normal and gauss each keep a second number back
    tensors, plain = random_states()
    plain = json.loads(json.dumps(plain))
    first = draw()
    assert draw() != first
    set_random_states(tensors, plain)
    assert draw() == first


@pytest.mark.parametrize("kind", KINDS)
def test_policy_and_optimizer_go_on_bitwise(kind, tmp_path):
    "Two updates against one, a checkpoint, and the second in fresh objects; without the optimizer's memory it comes out otherwise."
    def start():
        model = policy(kind)
        learns = {n: p for n, p in model.named_parameters() if p.requires_grad}
        return model, learns, torch.optim.AdamW(learns.values(), lr=1e-3)
    def step(model, optimizer, seed):
        ids = torch.randint(16, 1000, (2, 12), generator=torch.Generator().manual_seed(seed))
        model(input_ids=ids).logits.square().mean().backward()
        optimizer.step(), optimizer.zero_grad()
    model, learns, optimizer = start()
    step(model, optimizer, 0)
    save_policy(model, processor(), tmp_path / "policy")
    save_file(optimizer_tensors(optimizer, list(learns)), tmp_path / "o.safetensors")
    groups = json.loads(json.dumps(optimizer.state_dict()["param_groups"]))
    step(model, optimizer, 1)
    for memory in (True, False):
        again, fresh, other = start()
        load_weights(again, tmp_path / "policy")
        if memory: load_optimizer(other, list(fresh), load_file(tmp_path / "o.safetensors"), groups)
        step(again, other, 1)
        assert all(torch.equal(p, fresh[n]) for n, p in learns.items()) == memory
    with pytest.raises(DamagedCheckpoint, match="no parameter"): load_optimizer(other, ["a"] * len(fresh), load_file(tmp_path / "o.safetensors"), groups)


def test_weights_of_another_shape_are_refused(tmp_path):
    small = policy()
    save_policy(small, processor(), tmp_path / "policy")
    other = policy()
    other.model.language_model.layers[0].mlp.gate_proj.weight = torch.nn.Parameter(torch.zeros(4, 128))
    with pytest.raises(DamagedCheckpoint, match=r"gate_proj.*\(4, 128\)"): load_weights(other, tmp_path / "policy")


def test_what_differs_is_said_field_by_field():
    assert differences({"a": 1, "b": None, "c": [1]}, {"a": 1, "b": 2, "d": 0}) == ["b: None -> 2", "c: [1] -> (absent)", "d: (absent) -> 0"]
    assert differences({"a": {"x": 1.5}}, json.loads(json.dumps({"a": {"x": 1.5}}))) == []


# ---- one process, and signals

def test_a_second_process_is_refused_until_the_first_is_gone(tmp_path):
    hold = "import sys, time; from pathlib import Path; from emo_r3.checkpoint import only_one\nwith only_one(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", hold, str(tmp_path)], stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match="in use by another process"), only_one(tmp_path): pass
        first.kill()
    with only_one(tmp_path): pass


def test_a_signal_waits_or_does_not():
    with StopSignals() as stop:
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(Stopped) as caught: stop.check()
        assert caught.value.code == 143
        with pytest.raises(Stopped), stop.at_once(): raise AssertionError("a block must not begin after a signal")
    with StopSignals() as stop:
        with pytest.raises(Stopped) as caught, stop.at_once():
            signal.raise_signal(signal.SIGINT)
            raise AssertionError("it did not stop at once")
        assert caught.value.code == 130
    with StopSignals() as outer, outer.at_once():
        with StopSignals() as inner: signal.raise_signal(signal.SIGTERM)  # the inner one decides
        assert inner.number == signal.SIGTERM and outer.number is None
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_second_signal_ends_the_process(tmp_path):
    code = """
import signal, time; from emo_r3.checkpoint import StopSignals
with StopSignals() as stop:
    print("ready", flush=True)
    while True: time.sleep(0.01)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        assert "good order" in process.stderr.readline() + process.stderr.readline()
        process.send_signal(signal.SIGTERM)  # an echo, as from a supervisor and its group
        time.sleep(1.2)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=10) == 143


def test_signals_are_left_alone_outside_the_main_thread():
    import threading
    seen = []
    def work():
        with StopSignals() as stop: seen.append(stop.number)
    thread = threading.Thread(target=work)
    thread.start(), thread.join()
    assert seen == [None] and checkpoint.signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


# ---- optimizers in eight bits

def learn(optimizer, weights, seed):
    gen = torch.Generator().manual_seed(seed)
    for w in weights: w.grad = torch.randn(w.shape, generator=gen).to(w)
    optimizer.step()


def eight_bit(kind, device="cpu"):
    "A matrix large enough to be paged, one that is packed, and a bias that is not."
    gen = torch.Generator().manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(shape, generator=gen).to(device)) for shape in ((400, 300), (64, 100), (16,))]
    return weights, getattr(bitsandbytes.optim, kind)(weights, lr=1e-2, weight_decay=0.01)


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("kind, device", [("AdamW8bit", "cpu"), ("PagedAdamW8bit", "cpu"), pytest.param("AdamW8bit", "cuda", marks=cuda), pytest.param("PagedAdamW8bit", "cuda", marks=cuda)])
def test_bytes_of_an_optimizer_come_back(tmp_path, kind, device):
    names, (weights, optimizer) = ["large", "small", "bias"], eight_bit(kind, device)
    for seed in (1, 2): learn(optimizer, weights, seed)
    save_file(optimizer_tensors(optimizer, names), tmp_path / "a.safetensors")
    groups, half_way = json.loads(json.dumps(optimizer.state_dict()["param_groups"])), [w.detach().clone() for w in weights]
    for seed in (3, 4): learn(optimizer, weights, seed)
    others, other = eight_bit(kind, device)
    with torch.no_grad():
        for w, known in zip(others, half_way): w.copy_(known)
    load_optimizer(other, names, load_file(tmp_path / "a.safetensors"), groups)
    save_file(optimizer_tensors(other, names), tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    if device == "cuda": assert [getattr(other.state[w]["state1"], "is_paged", False) for w in others] == [kind == "PagedAdamW8bit", False, False]
    for seed in (3, 4): learn(other, others, seed)
    for w, known in zip(others, weights): assert torch.equal(w, known)
    for w in (others[0], others[2]): assert not torch.equal(w, half_way[0 if w is others[0] else 2])
    plain = {k: t.dtype for k, t in load_file(tmp_path / "a.safetensors").items()}
    assert plain["large/state1"] == plain["small/state2"] == torch.uint8 and plain["bias/state1"] == torch.float32 and "bias/qmap1" not in plain


def test_what_a_paged_optimizer_is_given_goes_where_it_keeps_it(monkeypatch):
    "On a GPU that is managed memory; here a stand-in that can be told from other memory."
    weights, optimizer = eight_bit("AdamW8bit")
    learn(optimizer, weights, 1)
    kept, groups = optimizer_tensors(optimizer, ["large", "small", "bias"]), optimizer.state_dict()["param_groups"]
    others, other = eight_bit("AdamW8bit")
    other.is_paged, made = True, []
    def place(weight, dtype=torch.float32):
        made.append(torch.zeros_like(weight, dtype=dtype))
        return made[-1]
    monkeypatch.setattr(other, "get_state_buffer", place)
    load_optimizer(other, ["large", "small", "bias"], kept, groups)
    assert len(made) == 6 and all(any(other.state[w][what] is t for t in made) for w in others for what in ("state1", "state2"))
    for name, w in zip(("large", "small", "bias"), others):
        for what in ("state1", "state2"): assert torch.equal(other.state[w][what], kept[f"{name}/{what}"])
