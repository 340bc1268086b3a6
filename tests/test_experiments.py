"""Tables and figures: every cell's command is a configuration, medians and means are those of a hand, the bootstrap is the enumeration's, and a run that fails is named."""
import csv
import hashlib
import io
import itertools
import json
import os
import shlex
import signal
import statistics
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from emo_r3 import cli, experiments
from emo_r3.checkpoint import Stopped
from emo_r3.evaluate import EvalReport, Graded, wilson_interval, write_predictions
from emo_r3.experiments import (CELLS_OWN, EMBEDDED_SETS, EXPERIMENTS, METHOD_OPTIONS, PAPER, TABLES, TITLES, Cell, Grid, Measured, Row, Runner, Task, Trial, bootstrap, cell_tasks, check_before_running, check_same_pictures, choose_case,
                                collect_cell, collect_cells, compare_rows, comparison_grids, comparisons, draw_curves, evaluation_record, experiment, experiment_cells, experiment_rows, grid_latex, grid_markdown, grid_text,
                                in_and_out, last_words, origin_lines, paper_grid, picture_differences, read_curves, read_data_sets, run_cells, score, shell_line, step_times, table_csv, table_grids, table_rows, task_config)
from emo_r3.scenes import domain_label_set, make_scenes
from emo_r3.config import plain_config

REAL = read_data_sets("emoset=data/EmoSet-118K,emotion6=data/Emotion6,webemo=data/WEBEmo")


def graded(right, n=None, name="p"): # right: which of n pictures are answered correctly, or one truth value a picture
    values = [i < right for i in range(n)] if n is not None else right
    return tuple(Graded(f"{name}{i}", "fear", "fear" if ok else "awe", "text", True, grounded=bool(ok)) for i, ok in enumerate(values))


def all_cells(sets, seeds=(1, 2)): return list(dict.fromkeys(c for name in EXPERIMENTS for c in experiment_cells(name, sets, seeds)))


COMMIT = "a1b2c3d"


def leave(cell, tasks, sets=EMBEDDED_SETS, right=lambda cell, test: 6, n=10, metrics=(), commit=COMMIT):
    "Writes what the commands of a cell would leave behind."
    for task in tasks:
        if task.test:
            write_predictions(task.leaves, {task.test: EvalReport(graded(right(cell, task.test), n, f"{task.test}-"), domain_label_set("in_domain"), task.fields["method"], task.fields["mode"])})
            task.record.write_text(json.dumps(evaluation_record(task) | {"commit": commit, "versions": {"torch": "2.0"}}))
            continue
        reports = {test: EvalReport(graded(right(cell, test), n, f"{test}-"), domain_label_set("in_domain"), task.fields["method"], "strict") for test in sets.test}
        write_predictions(task.leaves.parent / "predictions" / "after.jsonl", reports)
        (task.leaves.parent / "config.yaml").write_text(yaml.safe_dump(task_config(task)))
        (task.leaves.parent / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics))
        task.leaves.write_text(json.dumps({"steps": 2, "wall_s": 1.0, **({"commit": commit, "versions": {"torch": "2.0"}} if commit else {}), "after": {test: {"accuracy": r.accuracy} for test, r in reports.items()}}))


# ---- cells and commands

def test_tables_share_their_runs():
    cells = {name: {c.name for c in experiment_cells(name, EMBEDDED_SETS, [1, 2, 3])} for name in EXPERIMENTS}
    assert len(cells["table1"]) == 2 + 2 * 3 * (1 + 3 * 2) and len(cells["table2"]) == 6 and len(cells["table3"]) == 1 + 4 * 3
    assert cells["table3"] & cells["table1"] == {"vanilla", *(f"in_domain-{m}-G8-seed{s}" for m in ("grpo", "emo_r3") for s in (1, 2, 3))}
    assert cells["figure3"] | cells["figure4"] <= cells["table1"] and cells["figure5"] <= cells["table3"]
    assert set().union(*cells.values()) == cells["table1"] | cells["table2"] | cells["table3"]


@pytest.mark.parametrize("parts, words", [(("grop",), "did you mean 'grpo'"), (("grpo", "faces", None, 1), "num_generations = None"), (("sft", "faces", 8, 1), "num_generations = 8"), (("vanilla", "faces"), "train = 'faces'"), (("set", "faces", 8), "seed = None")])
def test_cells_that_are_none(parts, words):
    with pytest.raises(ValueError, match=words): Cell(*parts)


def test_methods_keep_and_add_rows():
    assert experiment_rows("table3", EMBEDDED_SETS, ["sft", "sft", "set", "sft"]) == [("set", 8), ("sft", None)]  # each once
    assert experiment_rows("table1", EMBEDDED_SETS, ["sft", "grpo"]) == [("sft", None), ("grpo", 4), ("grpo", 8)]
    assert experiment_rows("table3", EMBEDDED_SETS, ["emo_r3_reference", "sft", "set"]) == [("set", 8), ("emo_r3_reference", 8), ("sft", None)]
    with pytest.raises(ValueError, match="did you mean 'dapo'"): experiment_rows("table3", EMBEDDED_SETS, ["dappo"])
    with pytest.raises(ValueError, match="did you mean 'table3'"): experiment_rows("tabel3", EMBEDDED_SETS)
    with pytest.raises(ValueError, match="got 'llava'"): experiment_rows("table1", EMBEDDED_SETS, ["llava"])
    assert experiment_rows("table1", REAL)[:3] == [("llava", None), ("llava_sepm", None), ("vanilla", None)] and len(experiment_rows("table1", EMBEDDED_SETS)) == 9


EXPECTED = {  # what each method is, field by field
    "sft": {"method": "sft", "num_generations": 1, "beta": 0.0, "filter_key": "none"}, "grpo": {"method": "grpo", "filter_key": "none", "delta": 3.0, "epsilon_high": 0.3}, "set": {"method": "set"},
    "dapo": {"method": "grpo", "filter_key": "overall", "epsilon_low": 0.2, "epsilon_high": 0.28, "beta": 0.0, "delta": 3.0, "average": "token", "max_refills": 20},
    "emo_r3": {"method": "emo_r3", "judge": "policy"}, "emo_r3_reference": {"method": "emo_r3", "judge": "reference"}, "cold_start": {"method": "emo_r3"}}


def configuration(task):
    args = vars(cli.parse(list(task.words)))
    return cli.run_config(args["recipe"], {k: v for k, v in args.items() if k not in ("command", "recipe", "output_dir", "resume", "accept_changes")})[1]


@pytest.mark.parametrize("sets", [EMBEDDED_SETS, REAL], ids=lambda s: s.name)
def test_every_command_is_a_configuration(sets):
    if sets is REAL and not {"emoset_8gpu", "emotion6_8gpu"} <= set(cli.recipe_names()): pytest.skip("the full-scale recipes are not in the package yet")
    for cell in [*all_cells(sets), Cell("emo_r3_reference", sets.train[1], 8, 2)]:
        tasks = cell_tasks(cell, sets, Path("runs"))
        if cell.method in experiments.UNTRAINED:
            for task in tasks:
                args = cli.parse(list(task.words))
                assert args.method in (cli.WITHOUT_TRAINING if cell.method.endswith("sepm") else (experiments.VANILLA_PROMPT[sets.name],)) and ("llava" in args.policy) == ("llava" in cell.method) == (args.min_pixels is None and not sets.embedded)
                assert Path(args.predictions) == task.leaves and (args.format == (None if sets.embedded else task.test))
                assert (args.preset, args.precision, args.size) == (("released", "fp32", 192) if sets.embedded else ("paper", "bf16", 2000))  # the recipe's
            assert [t.test for t in tasks] == list(sets.test)
            continue
        c = configuration(tasks[-1])
        for name, value in (EXPECTED[cell.method] | {"num_generations": cell.num_generations or 1, "seed": cell.seed, "report": "best", "evaluate_before": False, "data_seed": None if sets.embedded else 1}).items(): assert getattr(c, name) == value, (cell.name, name)
        assert json.loads(json.dumps(task_config(tasks[-1]))) == json.loads(json.dumps(plain_config(c)))  # read here as the command line reads it
        assert tasks[-1].leaves == Path("runs") / cell.name / "summary.json" and c.eval_every > 0 and c.save_every > 0
        if sets.embedded: assert (c.data, c.label_set, c.max_steps) == (f"scenes:{cell.train}", domain_label_set(cell.train).name, {"in_domain": 100, "faces": 50}[cell.train])
        else: assert c.data == sets.paths[cell.train] and c.data_format == cell.train and set(c.eval_sets) == set(sets.test) - {cell.train} and c.eval_sets["webemo"]["label_set"] == "webemo7"
        if cell.train == "emotion6": assert c.train_size + 200 == 1386 and (c.train_size // c.prompts_per_step == 1386 // c.prompts_per_step or c.method == "sft")  # some are left to choose a checkpoint by
        if cell.method == "cold_start":
            first = configuration(tasks[0])
            assert len(tasks) == 2 and first.method == "sft" and first.report == "last" and c.policy == str(tasks[0].leaves.parent / "policy") and first.train_size < c.train_size
        else: assert len(tasks) == 1


def test_a_trial_reaches_every_command_and_no_cell_s_own_field():
    trial = Trial(2, 5, "some/policy", (("temperature", "0.5"),))
    c = configuration(cell_tasks(Cell("grpo", "faces", 4, 1), EMBEDDED_SETS, Path("runs"), trial)[0])
    assert (c.max_steps, c.eval_size, c.policy, c.temperature) == (2, 5, "some/policy", 0.5)
    args = cli.parse(list(cell_tasks(Cell("vanilla"), EMBEDDED_SETS, Path("runs"), trial)[0].words))
    assert args.size == 5 and args.policy == "some/policy"


@pytest.mark.parametrize("name", ["beta", "epsilon_low", "epsilon_high", "delta", "filter_key", "filter_low", "filter_high", "max_refills", "num_generations", "loss_type", "advantage", "clip", "ratio", "average", "judge", "method", "seed", "data", "report"])
def test_no_trial_makes_another_cell_of_a_cell(name):
    with pytest.raises(ValueError, match=f"--train-options: {name} = '2'; allowed: any field but"): Trial(options=(("learning_rate", "1"), (name, "2")))
    assert {field for options in METHOD_OPTIONS.values() for field in options} <= set(CELLS_OWN)


def test_manifests_choose_the_test_pictures_of_every_command():
    sets = read_data_sets("emoset=a,emotion6=b,webemo=c", "emoset=m.jsonl,webemo=n.jsonl")
    own, other = (configuration(cell_tasks(Cell("grpo", train, 4, 1), sets, Path("runs"))[0]) for train in sets.train)
    assert own.test_manifest == "m.jsonl" and own.eval_sets["webemo"]["manifest"] == "n.jsonl" and "manifest" not in own.eval_sets["emotion6"]
    assert other.test_manifest is None and other.eval_sets["emoset"]["manifest"] == "m.jsonl"
    assert [(a.manifest, a.size) for t in cell_tasks(Cell("vanilla"), sets, Path("runs")) for a in [cli.parse(list(t.words))]] == [("m.jsonl", 2000), (None, 2000), ("n.jsonl", 2000)]
    assert "--test-manifests emoset=FILE,webemo=FILE" in experiments.experiment_words("table1", "emoset=/secret/a", 3, manifests="emoset=/secret/m.jsonl,webemo=n.jsonl") and "secret" not in experiments.experiment_words("table1", "emoset=/secret/a", 3)
    with pytest.raises(ValueError, match="allowed with the embedded scenes: none"): read_data_sets("embedded", "emoset=m.jsonl")


@pytest.mark.parametrize("eval_size", [5, 2000])
def test_an_evaluation_and_a_run_look_at_the_same_pictures(tmp_path, eval_size):
    "With manifests of 8 pictures, fewer and more than are asked for, and where there is none; read by the commands' own readers."
    import published_fixtures as published
    from emo_r3.published import sample_data
    paths = {"emoset": published.emoset(tmp_path / "a"), "emotion6": published.emotion6(tmp_path / "b"), "webemo": published.webemo(tmp_path / "c")}
    for name in ("emoset", "webemo"): sample_data(paths[name], name, "test", tmp_path / f"{name}.jsonl", size=8)
    sets = read_data_sets(",".join(f"{k}={v}" for k, v in paths.items()), ",".join(f"{k}={tmp_path / k}.jsonl" for k in ("emoset", "webemo")))
    trial = Trial(eval_size=eval_size, options=(("train_size", "4"), ("prompts_per_step", "2"), ("prompts_per_update", "2")))
    seen = {task.test: [x.id for x in cli.eval_data(cli.parse(list(task.words)))[task.test]] for task in cell_tasks(Cell("vanilla"), sets, tmp_path, trial)}
    assert {test: len(ids) for test, ids in seen.items()} == {test: min(eval_size, there) for test, there in (("emoset", 8), ("emotion6", 18), ("webemo", 8))}
    for train in sets.train:
        read = cli.run_data(configuration(cell_tasks(Cell("grpo", train, 4, 1), sets, tmp_path, trial)[0])).test
        assert {test: [x.id for x in examples] for test, examples in read.items()} == seen


def test_the_seeds_of_a_real_cell_train_on_the_same_pictures(tmp_path):
    import published_fixtures as published
    sets = read_data_sets(f"emoset={published.emoset(tmp_path / 'a')},emotion6={published.emotion6(tmp_path / 'b')},webemo={published.webemo(tmp_path / 'c')}")
    trial = Trial(eval_size=2, options=(("train_size", "4"), ("prompts_per_step", "2"), ("prompts_per_update", "2"), ("eval_during", "3")))
    one, two = (cli.run_data(configuration(cell_tasks(Cell("grpo", "emoset", 4, seed), sets, tmp_path, trial)[0])) for seed in (1, 2))
    assert [x.id for x in one.train] == [x.id for x in two.train] and [x.id for x in one.during["emoset"]] == [x.id for x in two.during["emoset"]]
    scenes = [cli.run_data(configuration(cell_tasks(Cell("grpo", "in_domain", 4, seed), EMBEDDED_SETS, tmp_path, Trial(options=(("train_size", "16"),)))[0])).train for seed in (1, 2)]
    assert [x.id for x in scenes[0]] != [x.id for x in scenes[1]]


def test_a_dry_run_prints_every_command_and_makes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main("experiment table2 --seeds 2 --dry-run --runs there".split()) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6 and all(line.startswith("emo-r3 train scenes_cpu --output-dir there/embedded/in_domain-") for line in lines) and not list(tmp_path.iterdir())
    wrapped = shell_line(cell_tasks(Cell("grpo", "faces", 4, 1), EMBEDDED_SETS, Path("a b"))[0], ["torchrun", "--no-python"])
    assert shlex.split(wrapped)[:6] == ["torchrun", "--no-python", "emo-r3", "train", "scenes_cpu", "--output-dir"] and shlex.split(wrapped)[6] == "a b/faces-grpo-G4-seed1"


@pytest.mark.parametrize("argv, words", [
    (["table9"], ["'table9'", "figure5"]), (["table3", "--data", "embeded"], ["did you mean 'embedded'"]), (["table3", "--data", "emoset=a,emotion6=b"], ["each of emoset, emotion6, webemo once"]),
    (["table3", "--seeds", "0"], ["--seeds = 0"]), (["figure3", "--methods", "grpo"], ["--methods"]), (["table3", "--methods", "gpro"], ["did you mean 'grpo'"]),
    (["table3", "--train-options", "--seed 3"], ["--train-options", "seed = '3'"]), (["table1", "--train-options", "--epsilon-high 0.4"], ["--train-options", "epsilon_high = '0.4'"]), (["table3", "--train-options", "--learning-rat 3"], ["did you mean '--learning-rate'"]), (["table3", "--max-step", "1"], ["'--max-step'", "'--max-steps'"]),
])
def test_mistakes_are_one_line(tmp_path, monkeypatch, capsys, argv, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("EMO_R3_DEBUG", raising=False)
    assert cli.main(["experiment", *argv]) == 2
    err = capsys.readouterr().err
    assert err.startswith("emo-r3: error: ") and err.count("\n") == 1 and not list(tmp_path.iterdir())
    for word in words: assert word in err


# ---- running

STAND_IN = """
import os, signal, sys, time
from pathlib import Path
what, leaves = sys.argv[1:3]
signal.signal(signal.SIGTERM, lambda *a: (Path(leaves + '.stopped').touch(), sys.exit(143)))
print('half way\\r', end='', file=sys.stderr); print(what, os.environ.get('OMP_NUM_THREADS'), os.environ.get('LAUNCHED'), file=sys.stderr)
if what == 'sleep': Path(leaves + '.began').touch(); time.sleep(60)
if what == 'fail': sys.exit(3)
if what != 'forget': Path(leaves).parent.mkdir(parents=True, exist_ok=True); Path(leaves).touch()
"""


def stand_in(folder, what, test=None): return Task((what, str(folder / "summary.json"), "--predictions", "there"), folder / "summary.json", test)


@pytest.fixture
def processes(monkeypatch): monkeypatch.setattr(experiments, "_MAIN", STAND_IN)


def cell_of(seed): return Cell("set", "faces", 8, seed)


def test_a_failing_run_is_named_and_the_others_go_on(tmp_path, processes):
    wanted = {cell_of(i): [stand_in(tmp_path / what, what)] for i, what in enumerate(("fail", "fine", "forget", "also"), 1)}
    said, runner = [], Runner(tmp_path / "logs")
    failed = run_cells(wanted, runner, 2, said.append)
    assert set(failed) == {cell_of(1), cell_of(3)} and not runner.running
    assert failed[cell_of(1)].startswith("fail: exit code 3; fail.err ends with\n    fail ") and "forget: it ended without summary.json" in failed[cell_of(3)]
    assert (tmp_path / "fine/summary.json").exists() and (tmp_path / "also/summary.json").exists()
    assert sorted(s.split(",")[0] for s in said) == [f"faces-set-G8-seed{i}: {how}" for i, how in ((1, "failed"), (2, "done"), (3, "failed"), (4, "done"))]


def test_what_is_finished_is_not_run_again_and_later_commands_wait_for_earlier(tmp_path, processes):
    (tmp_path / "there").mkdir(); (tmp_path / "there/summary.json").write_text("mine")
    chain = [stand_in(tmp_path / "first", "fail"), stand_in(tmp_path / "second", "fine")]
    failed = run_cells({cell_of(1): [stand_in(tmp_path / "there", "fail")], cell_of(2): chain}, Runner(tmp_path / "logs"), 1, lambda line: None)
    assert list(failed) == [cell_of(2)] and (tmp_path / "there/summary.json").read_text() == "mine" and not (tmp_path / "second").exists()


def test_threads_and_launcher(tmp_path, processes, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    run_cells({cell_of(1): [stand_in(tmp_path / "a", "train"), stand_in(tmp_path / "b", "evaluate", test="faces")]}, Runner(tmp_path / "logs", ["env", "LAUNCHED=yes"], single=True), 2, lambda line: None)
    assert (tmp_path / "logs/a.err").read_text().endswith("train 1 yes\n") and (tmp_path / "logs/b-faces.err").read_text().endswith("evaluate 1 None\n")
    record = json.loads((tmp_path / "b/summary.task.json").read_text())  # an evaluation's command stands beside what it leaves
    assert record["words"] == ["evaluate", str(tmp_path / "b/summary.json")] and set(record) == {"words", "manifest_sha256", "commit", "versions"} and not list((tmp_path / "a").glob("*.task.json"))
    assert last_words(tmp_path / "logs/a.err") == "train 1 yes"  # of a bar that was redrawn, what stands there in the end


def test_a_signal_reaches_every_process(tmp_path, processes):
    wanted = {cell_of(i): [stand_in(tmp_path / f"run{i}", "sleep")] for i in (1, 2, 3)}
    for i in (1, 2, 3): (tmp_path / f"run{i}").mkdir()
    def signal_later():
        while not all((tmp_path / f"run{i}/summary.json.began").exists() for i in (1, 2)): time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)
    threading.Thread(target=signal_later, daemon=True).start()
    began, runner = time.monotonic(), Runner(tmp_path / "logs")
    with pytest.raises(Stopped): run_cells(wanted, runner, 2, lambda line: None)
    assert time.monotonic() - began < 30 and not runner.running
    assert [(tmp_path / f"run{i}/summary.json.stopped").exists() for i in (1, 2, 3)] == [True, True, False] and not (tmp_path / "logs/run3.err").exists()


# ---- numbers

def test_the_median_is_a_run_s_own():
    s = score([graded(9, 10), graded(2, 10), graded(8, 10)])
    assert s.accuracies == (0.9, 0.2, 0.8) and s.accuracy == 0.8 == statistics.median(s.accuracies) and s.ci95 == wilson_interval(8, 10) and s.n == 10
    assert s.grounding == pytest.approx(19 / 30) and s.format == 1.0
    assert score([graded(9, 10), graded(2, 10)]).accuracy == 0.2 and score([graded(3, 10)] * 4 + [graded(7, 10)]).accuracy == 0.3
    with pytest.raises(ValueError, match="9, 10 pictures"): score([graded(9, 10), graded(9, 9)])
    with pytest.raises(ValueError, match="2 different sets of 10 pictures"): score([graded(9, 10), graded(9, 10, name="q")])  # as many, but others
    with pytest.raises(ValueError): score([])


def test_means_by_hand():
    cells = {("a", "a"): 0.8, ("a", "b"): 0.5, ("a", "c"): 0.1, ("b", "a"): 0.3, ("b", "b"): 0.6, ("b", "c"): 0.4}
    assert in_and_out(cells) == pytest.approx({"A^I": 0.7, "A^O": 0.325, "A": 0.45})
    assert in_and_out({("a", "a"): 0.8}) == {"A^I": 0.8, "A^O": None, "A": 0.8}
    assert in_and_out(cells | {("b", "c"): None}) == {"A^I": pytest.approx(0.7), "A^O": None, "A": None}


def test_the_paper_s_table_is_the_paper_s():
    assert PAPER["sft", None]["emotion6", "emoset"] == 26.45 and PAPER["sft", None]["emotion6", "emotion6"] == 69.53 and PAPER["emo_r3", 8]["emoset", "webemo"] == 49.70
    assert PAPER["vanilla", None]["emoset", "emotion6"] == PAPER["vanilla", None]["emotion6", "emotion6"] == 50.00
    assert all(row in PAPER for t in TABLES.values() for row in t.rows if row[0] != "sepm") and ("emotion6", "emoset") not in PAPER["cold_start", 8]


@pytest.mark.parametrize("parts, weights", [([[1, 1, -1, 0]], None), ([[1, 0, -1], [2 / 3, 1 - 1 / 3, -1 / 3]], [0.25, 0.75]), ([[1, 1, 1]], None), ([[0, 0]], None)])
def test_the_bootstrap_against_every_possible_draw(parts, weights):
    shares = weights or [1 / len(parts)] * len(parts)
    every = [np.array([np.mean(way) for way in itertools.product(part, repeat=len(part))]) for part in parts]
    exact = np.array([sum(w * m for w, m in zip(shares, ways)) for ways in itertools.product(*every)])
    found = bootstrap(parts, weights, draws=20_000, seed=1)
    p = min(1.0, 2 * min(np.mean(exact <= 1e-12), np.mean(exact >= -1e-12)))
    assert found.mean == pytest.approx(sum(w * np.mean(d) for w, d in zip(shares, parts)), abs=1e-9) and found.n == sum(map(len, parts))
    assert found.p_value == pytest.approx(p, abs=0.02)
    for end, share in zip(found.ci95, (0.025, 0.975)):  # as many draws lie below the end as should
        assert np.mean(exact < end - 1e-9) <= share + 0.005 and np.mean(exact <= end + 1e-9) >= share - 0.005


def test_a_picture_keeps_its_differences_together():
    "After one training the first method gains exactly where it loses after the other: no draw of pictures can tell them apart."
    up, down = graded([1, 1, 0, 0]), graded([0, 0, 1, 1])
    first, second = {("a", "t"): [up], ("b", "t"): [down]}, {("a", "t"): [down], ("b", "t"): [up]}
    assert picture_differences(first, second) == ([[0, 0, 0, 0]], [1.0])
    found = bootstrap(*picture_differences(first, second))
    assert found.ci95 == (0.0, 0.0) and found.p_value == 1.0


def test_seeds_are_pooled_by_picture_and_sets_weigh_by_their_cells():
    first = {("a", "a"): [graded([1, 1]), graded([1, 0])], ("a", "b"): [graded([1, 1, 1])], ("b", "b"): [graded([1, 1, 1])]}
    second = {("a", "a"): [graded([0, 0])], ("a", "b"): [graded([1, 1, 0])], ("b", "b"): [graded([1, 0, 0])]}
    assert picture_differences(first, second) == ([[1.0, 0.5], [0.0, 0.5, 1.0]], [1 / 3, 2 / 3])
    with pytest.raises(ValueError, match="2 pictures were seen by one"): picture_differences({("a", "a"): [graded([1], name="x")]}, {("a", "a"): [graded([1], name="y")]})
    with pytest.raises(ValueError, match="different pictures"): picture_differences({("a", "a"): [graded([1]), graded([1, 1])]}, {("a", "a"): [graded([1])]})
    with pytest.raises(ValueError): bootstrap([[]])


# ---- collecting

def test_collection_counts_from_the_predictions(tmp_path):
    cell = Cell("grpo", "in_domain", 8, 1)
    tasks = cell_tasks(cell, EMBEDDED_SETS, tmp_path)
    assert collect_cell(cell, tasks, EMBEDDED_SETS) is None
    leave(cell, tasks, right=lambda c, test: EMBEDDED_SETS.test.index(test) + 1)
    found = collect_cell(cell, tasks, EMBEDDED_SETS)
    assert {t: sum(g.correct for g in gs) for t, gs in found.tests.items()} == {t: i + 1 for i, t in enumerate(EMBEDDED_SETS.test)} and found.to_dict()["accuracy"]["style"] == 0.2
    vanilla = cell_tasks(Cell("vanilla"), EMBEDDED_SETS, tmp_path)
    leave(Cell("vanilla"), vanilla)
    assert list(collect_cell(Cell("vanilla"), vanilla, EMBEDDED_SETS).tests) == list(EMBEDDED_SETS.test)


def test_another_run_in_the_folder_is_an_error(tmp_path):
    cell = Cell("dapo", "faces", 4, 1)
    tasks = cell_tasks(cell, EMBEDDED_SETS, tmp_path)
    leave(cell, tasks)
    assert collect_cell(cell, tasks, EMBEDDED_SETS)
    for trial in (Trial(max_steps=2), Trial(options=(("temperature", "0.5"),)), Trial(policy="elsewhere/policy"), Trial(eval_size=5)):
        with pytest.raises(ValueError, match="was run with"): collect_cell(cell, cell_tasks(cell, EMBEDDED_SETS, tmp_path, trial), EMBEDDED_SETS)
    config = tmp_path / cell.name / "config.yaml"
    config.write_text(yaml.safe_dump(yaml.safe_load(config.read_text()) | {"preset": "paper"}))  # the recipe's own field
    with pytest.raises(ValueError, match="preset = 'paper', wanted: 'released'"): collect_cell(cell, tasks, EMBEDDED_SETS)


@pytest.mark.parametrize("tried", [{"advantage": "gdpo"}, {"temperature": 0.5}, {"tis_cap": 2.0}, {"loss_type": "gspo"}, {"max_grad_norm": 0.5}, {"reflection": "soft"}, {"data_seed": 3}, {"epochs_per_step": 2}])
def test_a_trial_is_not_taken_for_the_real_run_whatever_it_changed(tmp_path, tried):
    "Fields that neither the recipe nor the cell mentions."
    cell = Cell("grpo", "faces", 4, 1)
    tasks = cell_tasks(cell, EMBEDDED_SETS, tmp_path)
    leave(cell, tasks)
    config, (name, value) = tmp_path / cell.name / "config.yaml", *tried.items()
    whole = yaml.safe_load(config.read_text())
    config.write_text(yaml.safe_dump(whole | tried))
    with pytest.raises(ValueError, match=f"was run with {name} = {value!r}, wanted: "): collect_cell(cell, tasks, EMBEDDED_SETS)
    config.write_text(yaml.safe_dump(whole | {"epsilon_middle": 0.1}))
    with pytest.raises(ValueError, match="config.yaml: epsilon_middle; allowed: the fields"): collect_cell(cell, tasks, EMBEDDED_SETS)


def test_a_run_older_than_a_field_was_made_with_its_default(tmp_path):
    cell = Cell("grpo", "faces", 4, 1)
    tasks = cell_tasks(cell, EMBEDDED_SETS, tmp_path)
    leave(cell, tasks)
    config = tmp_path / cell.name / "config.yaml"
    old = {name: value for name, value in yaml.safe_load(config.read_text()).items() if name not in ("data_seed", "advantage", "tis_cap")}
    config.write_text(yaml.safe_dump(old))
    assert collect_cell(cell, tasks, EMBEDDED_SETS)
    config.write_text(yaml.safe_dump({name: value for name, value in old.items() if name != "learning_rate"}))  # whose default is not this recipe's
    with pytest.raises(ValueError, match="learning_rate = 2e-06, wanted: 0.0001"): collect_cell(cell, tasks, EMBEDDED_SETS)


def test_runs_that_moved_together_are_the_same(tmp_path):
    cell = Cell("cold_start", "in_domain", 8, 1)
    leave(cell, cell_tasks(cell, EMBEDDED_SETS, tmp_path / "old"))
    (tmp_path / "old").rename(tmp_path / "new")
    tasks = cell_tasks(cell, EMBEDDED_SETS, tmp_path / "new")
    assert [m["run"] for m in collect_cell(cell, tasks, EMBEDDED_SETS).made] == ["in_domain-cold_start_sft-seed1", cell.name]
    config = tasks[1].leaves.with_name("config.yaml")
    config.write_text(config.read_text().replace("in_domain-cold_start_sft-seed1/policy", "faces-cold_start_sft-seed1/policy"))
    with pytest.raises(ValueError, match="was run with policy = "): collect_cell(cell, tasks, EMBEDDED_SETS)
    ours, theirs = (cell_tasks(Cell("grpo", "faces", 4, 1), EMBEDDED_SETS, tmp_path, Trial(policy=f"{where}/run/policy")) for where in ("ours", "theirs"))
    leave(Cell("grpo", "faces", 4, 1), theirs)
    with pytest.raises(ValueError, match="theirs/run/policy"): collect_cell(Cell("grpo", "faces", 4, 1), ours, EMBEDDED_SETS)  # a policy of a like name is another


@pytest.mark.parametrize("trial, words", [(Trial(policy="other"), r"words = \.\.\. embedded \.\.\., wanted: \.\.\. other \.\.\."), (Trial(eval_size=5), r"\.\.\. 192 \.\.\., wanted: \.\.\. 5 "), (Trial(options=(("max_completion_tokens", "9"),)), "wanted: ... 9"),
                                          (Trial(options=(("min_pixels", "100"),)), "--min-pixels 100"), (Trial(options=(("precision", "bf16"),)), "wanted: ... bf16")])
def test_an_evaluation_of_something_else_is_an_error(tmp_path, trial, words):
    cell = Cell("vanilla")
    tasks = cell_tasks(cell, EMBEDDED_SETS, tmp_path)
    leave(cell, tasks)
    assert collect_cell(cell, tasks, EMBEDDED_SETS).made[0] == {"run": "vanilla-in_domain", "commit": COMMIT, "versions": {"torch": "2.0"}}
    with pytest.raises(ValueError, match=words): collect_cell(cell, cell_tasks(cell, EMBEDDED_SETS, tmp_path, trial), EMBEDDED_SETS)
    (tmp_path / "vanilla").rename(tmp_path / "moved"); (tmp_path / "moved").rename(tmp_path / "elsewhere-vanilla")
    (tmp_path / "there").mkdir(); (tmp_path / "elsewhere-vanilla").rename(tmp_path / "there/vanilla")
    assert collect_cell(cell, cell_tasks(cell, EMBEDDED_SETS, tmp_path / "there"), EMBEDDED_SETS)  # where the predictions go is no part of how they are made


def test_predictions_of_unknown_making_are_refused_and_made_again(tmp_path, processes):
    cell = Cell("vanilla")
    tasks = cell_tasks(cell, EMBEDDED_SETS, tmp_path)
    leave(cell, tasks)
    tasks[1].record.unlink()
    with pytest.raises(ValueError, match="style.task.json is not beside it, so nobody knows how it was made"): collect_cell(cell, tasks, EMBEDDED_SETS)
    assert [task.done for task in tasks] == [True, False, True, True]
    failing = stand_in(tmp_path / "again", "fail", test="faces")
    failing.leaves.parent.mkdir(); failing.leaves.write_text("old"); failing.record.write_text("{}"); failing.leaves.unlink()
    assert run_cells({cell: [failing]}, Runner(tmp_path / "logs"), 1, lambda line: None) and not failing.record.exists()  # the old record would be of other predictions


def test_a_manifest_with_other_pictures_is_another_evaluation(tmp_path):
    manifest = tmp_path / "m.jsonl"
    manifest.write_text('{"id": "a", "label": "awe", "sha256": "0"}\n')
    sets = read_data_sets("emoset=a,emotion6=b,webemo=c", f"emoset={manifest}")
    tasks = cell_tasks(Cell("vanilla"), sets, tmp_path)
    leave(Cell("vanilla"), tasks, sets)
    assert collect_cell(Cell("vanilla"), tasks, sets)
    manifest.write_text('{"id": "b", "label": "awe", "sha256": "0"}\n')
    with pytest.raises(ValueError, match="emoset.jsonl: was made with manifest_sha256 = "): collect_cell(Cell("vanilla"), tasks, sets)


def test_a_cell_on_other_pictures_is_named_and_the_table_stands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for cell in experiment_cells("table3", EMBEDDED_SETS, [1, 2]):
        leave(cell, cell_tasks(cell, EMBEDDED_SETS, Path("runs/embedded")), n=9 if cell == Cell("set", "in_domain", 8, 2) else 10)
    wrong = experiment("table3", seeds=2, runs="runs", output="made", collect=True, say=lambda line: None)
    assert list(wrong) == ["in_domain-set-G8-seed2"] and "was tested on 9 pictures of in_domain, of which 0 are not among the 10 of most cells, and 1 of those are missing" in wrong["in_domain-set-G8-seed2"]
    record = json.loads(Path("made/table3.json").read_text())
    assert record["missing"] == ["in_domain-set-G8-seed2"] and {len(r["cells"][0]["accuracies"]) for r in record["rows"] if r["method"] == "set"} == {1} and record["not_compared"] == []


def test_the_pictures_of_most_cells_count_with_their_labels():
    def cell(seed, **tests): return cell_of(seed), Measured(cell_of(seed), tests, Path())
    same, other = graded(6, 10), graded(6, 10, name="q")
    assert check_same_pictures(dict([cell(1, faces=other), cell(2, faces=same), cell(3, faces=same)])).keys() == {cell_of(1)}
    assert check_same_pictures(dict([cell(1, faces=other), cell(2, faces=same)])).keys() == {cell_of(2)}
    assert check_same_pictures(dict([cell(1, faces=same), cell(2, faces=same[::-1]), cell(3, style=other)])) == {}  # the order says nothing, and another set is another set
    relabelled = (replace(same[0], label="awe"), *same[1:])
    assert "1 are not among" in check_same_pictures(dict([cell(1, faces=same), cell(2, faces=relabelled)]))[cell_of(2)]


def test_a_comparison_that_fails_leaves_a_dash_and_says_why():
    one, other = row("emo_r3", 8, 6), row("grpo", 8, 5)
    strange = Row("grpo", 8, other.runs | {("emoset", "webemo"): [graded(5, 10, "strange")] * 3})
    with pytest.raises(ValueError, match="webemo: 20 pictures"): compare_rows(one, strange)
    found = comparisons("table1", [strange, one], problems := [])
    assert [d is not None for d in map(found["grpo"]["emo_r3", 8].get, ("A^I", "A^O", "A", "emoset -> emotion6", "emoset -> webemo"))] == [True, False, False, True, False]
    assert problems == ["EMO-R3 and GRPO, G = 8: not compared, webemo: 20 pictures were seen by one method only; allowed: the same pictures"]
    assert comparison_grids(found)[0].rows[0][2].startswith("+10.0") and comparison_grids(found)[0].rows[0][3:] == ("-", "-")


def test_where_the_runs_come_from_is_said(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for cell in experiment_cells("table3", EMBEDDED_SETS, [1]):
        leave(cell, cell_tasks(cell, EMBEDDED_SETS, Path("runs/embedded")), commit={"grpo": "e4f5a6b+", "cold_start": None}.get(cell.method, COMMIT))
    said = []
    experiment("table3", seeds=1, runs="runs", output="made", collect=True, say=said.append)
    record = json.loads(Path("made/table3.json").read_text())
    assert record["commits"] == [{"commit": COMMIT, "runs": 6}, {"commit": None, "runs": 2}, {"commit": "e4f5a6b+", "runs": 1}]  # vanilla is four evaluations, the cold start two runs
    assert "machine" not in record and record["collected_on"]["torch"] and [m["commit"] for r in record["runs"] if r["method"] == "cold_start" for m in r["made"]] == [None, None]
    for text in ("\n".join(said), Path("made/table3.md").read_text()):
        assert f"The runs were made by 2 commits: {COMMIT} (6), e4f5a6b+ (1)." in text and "Of 2 of 9 runs the commit is unknown" in text and "A + stands for changes that were not committed." in text
    of = lambda seed, version: (cell_of(seed), Measured(cell_of(seed), {}, Path(), made=({"run": "r", "commit": COMMIT, "versions": {"torch": version, "threads": seed}},)))
    assert origin_lines(dict([of(1, "2.0"), of(2, "2.0")])) == [f"All runs were made by commit {COMMIT}."]
    assert origin_lines(dict([of(1, "2.0"), of(2, "2.1")]))[1] == "The runs' environments differ: torch 2.0,2.1."


@pytest.mark.parametrize("harm, words", [
    (lambda folder: (folder / "predictions/after.jsonl").write_bytes((folder / "predictions/after.jsonl").read_bytes()[:-30]), "line 40"),
    (lambda folder: (folder / "predictions/after.jsonl").unlink(), "FileNotFoundError"),
    (lambda folder: (folder / "summary.json").write_text((folder / "summary.json").read_text().replace("0.6", "0.7")), "says accuracy 0.7"),
    (lambda folder: (folder / "summary.json").write_text("{"), "JSONDecodeError"),
    (lambda folder: (folder / "predictions/after.jsonl").write_text("".join(l for l in (folder / "predictions/after.jsonl").read_text().splitlines(True) if '"domain": "style"' not in l)), "no predictions for style"),
])
def test_damaged_runs_are_named_and_the_rest_is_collected(tmp_path, harm, words):
    tasks = {c: cell_tasks(c, EMBEDDED_SETS, tmp_path) for c in (cell_of(1), cell_of(2))}
    for cell, ts in tasks.items(): leave(cell, ts)
    harm(tmp_path / cell_of(1).name)
    measured, wrong = collect_cells(tasks, EMBEDDED_SETS)
    assert list(measured) == [cell_of(2)] and list(wrong) == [cell_of(1)] and words in wrong[cell_of(1)] and cell_of(1).name in wrong[cell_of(1)]


def test_a_real_run_s_own_set_may_be_called_by_its_path(tmp_path):
    found = {"EmoSet-118K": graded(3, 4), "emotion6": graded(2, 4), "webemo": graded(1, 4)}
    assert list(experiments._named_tests(found, "emoset", REAL, tmp_path)) == ["emoset", "emotion6", "webemo"]
    with pytest.raises(ValueError, match="no predictions for webemo"): experiments._named_tests({"emoset": (), "emotion6": ()}, "emoset", REAL, tmp_path)


# ---- tables

def row(method, g, right, trains=("emoset", "emotion6"), tests=REAL.test, n=10, seeds=3): return Row(method, g, {(s, t): [graded(right, n, f"{t}-")] * seeds for s in trains for t in tests})


def test_the_paper_s_table_names_its_models():
    assert "median of 3 runs of Qwen2.5-VL-3B; LLaVA-1.5-7B as its rows say, untrained, %" in paper_grid("table1").title and "LLaVA" not in paper_grid("table3").title


def test_the_paper_s_numbers_stand_beside_its_own_cells_only():
    rows = [row("emo_r3", 8, 6), row("sepm", None, 5, seeds=1)]
    beside = grid_text(table_grids("table1", rows, REAL, beside=True)[0])
    assert "60.0 [31, 83] (paper 76.40)" in beside and beside.count("paper") == 3  # SEPM on this model is not in the paper
    assert not any("paper" in grid_text(g) for g in table_grids("table1", rows, REAL))
    embedded = [row("emo_r3", 8, 6, EMBEDDED_SETS.train, EMBEDDED_SETS.test)]
    assert not any("paper" in grid_text(g) for g in table_grids("table1", embedded, EMBEDDED_SETS, beside=True))


def test_means_and_comparisons_leave_out_what_is_missing():
    whole, part = row("emo_r3", 8, 6), row("grpo", 8, 5)
    assert {k: round(d.mean, 9) for k, d in compare_rows(whole, part).items()} == dict.fromkeys(["A^I", "A^O", "A", *(f"{s} -> {t}" for s, t in whole.runs)], 0.1)
    part = Row("grpo", 8, part.runs | {("emoset", "webemo"): []})
    assert "A^O" not in compare_rows(whole, part) and "A" not in compare_rows(whole, part) and compare_rows(whole, part)["A^I"].mean == pytest.approx(0.1)
    assert part.seeds == "0 to 3" and part.means == {"A^I": 0.5, "A^O": None, "A": None} and whole.seeds == "3" and row("vanilla", None, 5, seeds=1).seeds == "-"


def test_csv_markdown_and_latex_escape():
    grid = Grid("100 % of A_1 & B #2 $3 {4} ~5 ^6 \\7", ("a|b", "A^I"), (("x|y\\", "81.0 [76, 87]"), ("p <0.001", "-")))
    latex = grid_latex(grid)
    assert r"\caption{100 \% of A\_1 \& B \#2 \$3 \{4\} \textasciitilde{}5 \textasciicircum{}6 \textbackslash{}7}" in latex and r"$A^I$ \\" in latex and r"p \textless{}0.001 & -" in latex and latex.count(" & ") == 3
    lines = grid_markdown(grid).splitlines()[2:]
    assert [len(line.replace("\\|", "").split("|")) for line in lines] == [4] * 4 and lines[1] == "| :------- | ------------: |" and "x\\|y\\\\" in lines[2]
    assert "| :- |" in grid_markdown(Grid("", ("G", "n"), (("8", "1"),)))
    rows = [row("emo_r3", 8, 6), Row("grpo", 8, {("emoset", "emoset"): []})]
    read = list(csv.DictReader(io.StringIO(table_csv("table1", rows, REAL))))
    assert len(read) == 7 and float(read[0]["accuracy"]) == 0.6 and read[0]["accuracies"] == "0.6 0.6 0.6" and read[0]["in_domain"] == "True" and read[1]["in_domain"] == "False"
    assert read[6]["seeds"] == "0" and read[6]["accuracy"] == "" and float(read[0]["low"]) == wilson_interval(6, 10)[0]


def test_a_whole_table_from_its_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    right = {"vanilla": 3, "grpo": 5, "set": 6, "emo_r3": 7, "cold_start": 8}
    for cell in experiment_cells("table3", EMBEDDED_SETS, [1, 2, 3]): leave(cell, cell_tasks(cell, EMBEDDED_SETS, Path("runs/experiments/embedded")), right=lambda c, test: right[c.method] + (c.seed == 3) - (test != "in_domain"))
    assert cli.main(["experiment", "table3", "--output", "made"]) == 0  # everything is there: nothing is run
    out = capsys.readouterr().out
    record = json.loads(Path("made/table3.json").read_text())
    assert record["command"] == "emo-r3 experiment table3 --data embedded --seeds 3" and record["missing"] == [] and record["at_once"] is None and record["vanilla_prompt"] == "grpo"
    by_method = {r["method"]: r for r in record["rows"]}
    assert by_method["emo_r3"]["means"] == pytest.approx({"A^I": 0.7, "A^O": 0.6, "A": 0.625}) and by_method["emo_r3"]["cells"][0]["accuracies"] == [0.7, 0.7, 0.8]
    difference = next(d for d in record["differences"] if (d["method"], d["against"], d["where"]) == ("emo_r3", "set", "A"))
    assert difference["mean"] == pytest.approx(0.1) and difference["n"] == 40
    assert "The paper's Table 3" in out and "70.0 [40, 89]" in out and sorted(p.name for p in Path("made").iterdir()) == ["table3.csv", "table3.json", "table3.md", "table3.tex"]
    assert "76.40" not in Path("made/table3.md").read_text().split("The paper's")[0]
    (Path("runs/experiments/embedded") / cell_of(1).name.replace("faces", "in_domain") / "summary.json").write_text("{}")
    assert cli.main(["experiment", "table3", "--output", "made", "--collect"]) == 1
    out, err = capsys.readouterr()
    assert "in_domain-set-G8-seed1" in err and "1 of 13 cells are missing: in_domain-set-G8-seed1" in out
    assert json.loads(Path("made/table3.json").read_text())["missing"] == ["in_domain-set-G8-seed1"]


def test_nothing_is_written_where_nothing_was_collected(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("made").mkdir(); Path("made/table3.md").write_text("good")
    for name in ("table3", "figure3", "figure5"):
        assert cli.main(["experiment", name, "--collect", "--output", "made"]) == 1
        assert f"{name}: none of its " in (err := capsys.readouterr().err) and "nothing is written" in err
    monkeypatch.setattr(experiments, "_MAIN", "import sys; sys.exit(3)")  # every run fails
    assert cli.main(["experiment", "table2", "--seeds", "1", "--output", "elsewhere"]) == 1
    assert (err := capsys.readouterr().err).count("exit code 3") == 2 and "nothing is written" in err
    assert Path("made/table3.md").read_text() == "good" and [p.name for p in Path("made").iterdir()] == ["table3.md"] and not Path("elsewhere").exists()


def test_a_trial_is_kept_apart_and_says_that_it_is_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trial, said = Trial(2, 8), []
    for changed, folder in ((Trial(), "embedded"), (trial, "embedded-trial")):
        for cell in experiment_cells("table2", EMBEDDED_SETS, [1]): leave(cell, cell_tasks(cell, EMBEDDED_SETS, Path("runs") / folder, changed), right=lambda c, test: 6 + (c.method == "cold_start"), metrics=METRICS)
    assert experiment("table2", seeds=1, runs="runs", say=said.append) == {}
    files, whole = {kind: Path(f"runs/embedded/table2.{kind}") for kind in ("csv", "md", "tex", "json")}, Path("runs/embedded/table2.md").read_text()
    assert said[0] == "2 cells, 2 done already" and said[-1] == f"written: {', '.join(map(str, files.values()))}" and "TRIAL" not in whole
    assert experiment("table2", seeds=1, runs="runs", trial=trial, say=said.append) == {} and Path("runs/embedded/table2.md").read_text() == whole
    title = "TRIAL: 2 steps, 8 pictures a set. "
    assert said[-2].startswith(f"{title}Table 2") and said[-2].count(title) == 3  # not the paper's own
    text = {kind: Path(f"runs/embedded-trial/table2.{kind}").read_text() for kind in files}
    assert text["md"].count(f"**{title}") == text["tex"].count(rf"\caption{{{title}") == 3 and json.loads(text["json"])["trial"] == title[:-2] and json.loads(files["json"].read_text())["trial"] is None
    for name in ("figure3", "figure5"):
        for cell in experiment_cells(name, EMBEDDED_SETS, [1]): leave(cell, cell_tasks(cell, EMBEDDED_SETS, Path("runs/embedded-trial"), trial), metrics=METRICS)
        drawn = []
        monkeypatch.setattr(experiments.Figure, "savefig", lambda figure, *a, real=experiments.Figure.savefig, **k: (drawn.append(figure.get_suptitle()), real(figure, *a, **k)))
        assert experiment(name, seeds=1, runs="runs", trial=trial, say=said.append) == {} and drawn[0] == title[:-2] and not Path(f"runs/embedded/{name}.png").exists()
    assert Trial(policy="x", options=(("learning_rate", "1"),)).title == "TRIAL: another policy, learning_rate = 1"


def test_another_run_in_the_way_is_named_before_anything_is_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(experiments, "_MAIN", "raise SystemExit(3)")
    cells = experiment_cells("table3", EMBEDDED_SETS, [1])
    for cell in cells[:2]: leave(cell, cell_tasks(cell, EMBEDDED_SETS, Path("runs/experiments/embedded-trial"), Trial(2)))
    Path("runs/experiments/embedded-trial", cells[1].name, "summary.json").unlink()  # it did not get to its end
    assert cli.main("experiment table3 --seeds 1 --max-steps 3".split()) == 2  # the untrained one has no steps: it is the same
    err = capsys.readouterr().err
    assert "in_domain-grpo-G8-seed1: was run with max_steps = 2, wanted: 3" in err and "--runs; nothing was run" in err and err.count("\n") == 1
    assert cli.main("experiment table3 --seeds 1 --max-steps 3 --eval-size 4".split()) == 2
    assert "vanilla/in_domain.jsonl: was made with words" in (err := capsys.readouterr().err) and "(4 more are of another making)" in err and not list(tmp_path.rglob("logs"))
    check_before_running({cell: cell_tasks(cell, EMBEDDED_SETS, Path("runs/experiments/embedded-trial"), Trial(2)) for cell in cells})


def test_an_interrupted_experiment_says_how_to_go_on(tmp_path, processes, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(experiments, "_MAIN", f"import os, signal, time; os.kill({os.getpid()}, signal.SIGTERM); time.sleep(60)")
    assert cli.main("experiment table2 --seeds 1".split()) == 143
    out, err = capsys.readouterr()
    assert err == "emo-r3: interrupted; the same command goes on\n" and out.splitlines()[0] == f"2 cells, 0 done already; logs in {Path('runs/experiments/embedded/logs')}" and "written" not in out


def test_runs_that_never_differ_are_not_compared_in_numbers():
    found = comparison_grids(comparisons("table1", [row("grpo", 8, 5), row("emo_r3", 8, 5), row("dapo", 8, 6)]))[0].rows
    assert found[0][2:] == ("no picture differs",) * 3 and found[1][2].startswith("+10.0 [")
    assert [bootstrap([d, [0]]).differing for d in ([0, 1 / 3, 1 / 3 - 0.1 - 0.7 / 3], [1, -1, 0])] == [1, 2]  # a zero made of rounded thirds is one


# ---- figures

def line(step, accuracy, **more): return {"step": step, "reward": 0.5, "rewards/accuracy/mean": accuracy, "step_time": float(step), "timing_s/rollout": step / 2, "timing_s/update": 1.0, **more}


TESTED = {"eval/in_domain/accuracy": 0.9, "eval/style/accuracy": 0.8, "eval/faces/accuracy": 0.7}
LOOKED = {"eval/in_domain/accuracy": 0.7, "eval/style/accuracy": 0.2}
METRICS = [{"step": 0, **TESTED}, line(1, 0.1), line(2, 0.2, **LOOKED), line(4, 0.4), {"step": 5, **TESTED}]


def curves_of(folder, metrics, summary={}):
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in metrics))
    return read_curves(Measured(cell_of(1), {}, folder, summary))


def test_curves_hold_validation_and_never_test(tmp_path):
    assert curves_of(tmp_path, METRICS) == {"train": [(1, 0.1), (2, 0.2), (4, 0.4)], "validation": [(2, 0.7)], "train_of": "all groups drawn", "ended": None}
    run = Measured(cell_of(1), {}, tmp_path)
    assert step_times([run, run]) == {"rollout": 1.0, "reflect": 0.0, "logps": 0.0, "update": 1.0, "step": 2, "steps": 6}
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match="step_time"): step_times([run])


ENDED = {"why": "depleted", "step": 4, "kept": 0.0}


def in_vain(step, **more): return {"step": step, "filter/kept": 0.0, "filter/all_right": 1.0, "filter/all_wrong": 0.0, "filter/refills": 20, **more}


def test_the_early_end_of_a_filtered_run_is_drawn_where_the_policy_stood(tmp_path):
    passed = {"filter/kept": 0.4, "filter/accuracy": 0.95}
    filtered = [{"step": 0, **TESTED}, line(1, 0.5, **passed), line(2, 0.5, **passed, **LOOKED), line(4, 0.5, **passed), in_vain(5, **{"eval/in_domain/accuracy": 0.75, "eval/style/accuracy": 0.1, "filter/accuracy": 1.0}), {"step": 6, **TESTED}]
    found = curves_of(tmp_path, filtered, {"ended": ENDED})
    assert found["validation"] == [(2, 0.7), (4, 0.75)] and found["train"] == [(1, 0.95), (2, 0.95), (4, 0.95)] and found["train_of"] == "all groups drawn"
    older = [{k: v for k, v in r.items() if k != "filter/accuracy"} for r in filtered]
    assert curves_of(tmp_path, older, {"ended": ENDED}) | {"ended": None} == {"train": [(1, 0.5), (2, 0.5), (4, 0.5)], "validation": [(2, 0.7), (4, 0.75)], "train_of": "groups that passed the filter", "ended": None}
    seen = [r | ({} if r["step"] != 4 else LOOKED) for r in filtered]  # it was evaluated at its last step already
    assert curves_of(tmp_path, seen, {"ended": ENDED})["validation"] == [(2, 0.7), (4, 0.75)]
    at_once = [in_vain(1, **LOOKED), {"step": 2, **TESTED}]
    assert curves_of(tmp_path, at_once, {"ended": ENDED | {"step": 0}}) == {"train": [], "validation": [(0, 0.7)], "train_of": "all groups drawn", "ended": ENDED | {"step": 0}}


def crosses(ax): return [(tuple(l.get_xdata()), tuple(l.get_ydata())) for l in ax.get_lines() if l.get_marker() == "x"]


def test_every_early_end_has_its_cross_on_both_axes_and_its_words_in_one_legend():
    whole = {"train": [(1, 0.5), (2, 0.6)], "validation": [(2, 0.7)], "train_of": "all groups drawn", "ended": None}
    early = [{"train": [(1, 0.4)], "validation": [(1, 0.3)], "train_of": "groups that passed the filter", "ended": ENDED | {"step": 1}}, {"train": [(1, 0.4)], "validation": [], "ended": ENDED | {"step": 1}}, {"train": [], "validation": [], "ended": ENDED | {"step": 0}}]
    figure = draw_curves({"grpo": [whole, whole], "dapo": early})
    train, validation = figure.axes
    assert crosses(train) == [((1,), (0.4,)), ((1,), (0.4,)), ((0,), (0.02,))] and crosses(validation) == [((1,), (0.3,)), ((1,), (0.02,)), ((0,), (0.02,))]
    assert train.get_legend() is None and validation.get_legend() is None and [t.get_text() for t in figure.legends[0].get_texts()] == ["GRPO", "DAPO (x: 3 of 3 ended early; train: only groups that passed the filter)"]
    nothing = [t.get_text() for t in draw_curves({"dapo": early[2:]}).legends[0].get_texts()]
    assert nothing == ["DAPO (x: 1 of 1 ended early)"]  # also of a method without any curve


def test_one_validation_is_a_dot():
    figure = draw_curves({"grpo": [{"train": [(1, 0.5), (2, 0.6)], "validation": [(2, 0.7)], "ended": None}]})
    train, validation = ([l.get_marker() for l in ax.get_lines()] for ax in figure.axes)
    assert validation == ["o", "o"] and set(train) == {"None"}


def test_a_figure_that_cannot_be_says_what_it_shows(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"--methods: got grpo, set for figure3; .*always shows GRPO \(G = 8\), EMO-R3 \(G = 8\), DAPO \(G = 8\)"): experiment("figure3", methods=["grpo", "set"])
    for trial, folder, end in ((Trial(), "embedded", "allowed: one or more"), (Trial(eval_size=10), "embedded-trial", "allowed: one or more; try a larger --eval-size")):
        for cell in experiment_cells("figure4", EMBEDDED_SETS, [1]): leave(cell, cell_tasks(cell, EMBEDDED_SETS, Path("runs") / folder, trial))
        with pytest.raises(ValueError) as stop: experiment("figure4", seeds=1, runs="runs", trial=trial, say=lambda line: None)
        assert str(stop.value) == f"figure4: GRPO and EMO-R3, G = 8, seed 1, on in_domain: no picture of 10 on which exactly one of the two is right; {end}"


def test_a_real_depleted_run_s_curves(tmp_path, monkeypatch):
    "What training itself writes when its groups run out after two steps, the second of them evaluated."
    import torch
    import test_methods
    real = test_methods.loop.group_means
    def means(experience, key):
        trained = sum('"reward"' in text for text in (tmp_path / "run/metrics.jsonl").read_text().splitlines()) >= 2
        return torch.full((len(experience.examples),), 1.0 if trained else 0.5, dtype=torch.float64) if key == "accuracy" else real(experience, key)
    monkeypatch.setattr(test_methods.loop, "group_means", means)
    test_methods.go(replace(test_methods.DAPO, max_refills=2, report="best", eval_every=3), tmp_path / "run")
    rows, summary = [json.loads(text) for text in (tmp_path / "run/metrics.jsonl").read_text().splitlines()], json.loads((tmp_path / "run/summary.json").read_text())
    found = read_curves(Measured(cell_of(1), {}, tmp_path / "run", summary))
    (accuracy,) = (r["eval/here/accuracy"] for r in rows if "filter/kept" in r and "reward" not in r)
    assert summary["ended"]["step"] == 2 and found["validation"] == [(2, accuracy)] and found["train"] == [(1, 0.5), (2, 0.5)] and found["train_of"] == "all groups drawn"
    assert crosses(draw_curves({"dapo": [found]}).axes[1]) == [((2,), (accuracy,))]


def test_the_case_is_chosen_by_rule():
    one, other = graded([1, 1, 0, 0, 1, 0]), graded([1, 0, 1, 0, 0, 1])
    id, counts = choose_case(one, other)
    assert counts == {"both": 1, "only_first": 2, "only_second": 2, "neither": 1}
    assert id == sorted(["p1", "p2", "p4", "p5"], key=lambda p: hashlib.sha256(p.encode()).digest())[0] == choose_case(other[::-1], one)[0]
    with pytest.raises(ValueError, match="no picture of 6"): choose_case(one, one)
    with pytest.raises(ValueError, match="1 pictures"): choose_case(one, other[:-1])


def test_a_tested_picture_is_found_by_its_id(tmp_path):
    import published_fixtures as published
    from emo_r3.published import load_published
    sets = read_data_sets(f"emoset={published.emoset(tmp_path / 'a')},emotion6={published.emotion6(tmp_path / 'b')},webemo={published.webemo(tmp_path / 'c')}")
    for test in sets.test:
        example = load_published(sets.paths[test], test, "test")[-1]
        assert experiments.tested_picture(sets, test, example.id, 1).tobytes() == example.load_image().tobytes()
        with pytest.raises(ValueError, match=f"{test}: no test picture 'nobody'"): experiments.tested_picture(sets, test, "nobody", 1)
    scene = make_scenes("faces", "test", 5)[3]
    assert experiments.tested_picture(EMBEDDED_SETS, "faces", scene.id, 5).tobytes() == scene.load_image().tobytes()


def test_figures_from_their_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ids = {test: [x.id for x in make_scenes(test, "test", 10)] for test in EMBEDDED_SETS.test}
    monkeypatch.setattr(sys.modules[__name__], "graded", lambda right, n, name: tuple(Graded(id, "fear", "fear" if i < right else "awe", "a $ <b>", True) for i, id in enumerate(ids[name.rstrip("-")])))
    right = {"grpo": 5, "emo_r3": 7, "dapo": 4, "set": 6}
    for name in ("figure3", "figure4", "figure5"):
        for cell in experiment_cells(name, EMBEDDED_SETS, [1, 2]): leave(cell, cell_tasks(cell, EMBEDDED_SETS, Path("runs/embedded")), right=lambda c, test: right[c.method] + (c.method == "emo_r3" and c.seed == 2), metrics=METRICS)
        assert experiment(name, seeds=2, runs="runs", output="made", collect=True, say=lambda line: None) == {}
        with Image.open(f"made/{name}.png") as picture: assert picture.size[0] > 800
    case = json.loads(Path("made/figure4.json").read_text())["numbers"]
    assert case["counts"] == {"both right": 5, "only GRPO right": 0, "only EMO-R3 right": 2, "none right": 3} and case["id"] in ids["in_domain"][5:7] and case["seed"] == 1 and case["answers"]["GRPO"]["predicted"] == "awe"
    assert [r["seed"] for r in json.loads(Path("made/figure3.json").read_text())["numbers"]["dapo"]] == [1, 2]
    (Path("runs/embedded") / Cell("grpo", "in_domain", 8, 1).name / "summary.json").unlink()  # of GRPO only the second seed is left: EMO-R3's second is shown beside it, not its first
    experiment("figure4", seeds=2, runs="runs", output="made", collect=True, say=lambda line: None)
    case = json.loads(Path("made/figure4.json").read_text())["numbers"]
    assert case["seed"] == 2 and case["counts"]["only EMO-R3 right"] == 3
    (Path("runs/embedded") / Cell("emo_r3", "in_domain", 8, 2).name / "summary.json").unlink()
    with pytest.raises(ValueError, match="figure4: finished are GRPO with seed 2 and EMO-R3 with seed 1; allowed: one seed or more that both have"): experiment("figure4", seeds=2, runs="runs", output="made", collect=True, say=lambda line: None)
    for gone in Path("runs/embedded").glob("*-emo_r3-*/summary.json"): gone.unlink()
    with pytest.raises(ValueError, match="figure5: no finished run of emo_r3"): experiment("figure5", seeds=1, runs="runs", collect=True, say=lambda line: None)
    assert TITLES["set"] in json.loads(Path("made/figure5.json").read_text())["numbers"]


# ---- the real thing

TINY = ["--policy", "embedded", "--max-steps", "2", "--eval-size", "4", "--train-options", "--train-size 8 --prompts-per-step 4 --prompts-per-update 4 --eval-every 1 --eval-during 2 --save-every 1"]
COMMAND = [sys.executable, "-c", "import sys; from emo_r3.cli import main; sys.exit(main())", "experiment"]


@pytest.mark.slow
def test_the_published_layouts_from_data_to_table(tmp_path):
    "Both training sets, as published, through every part: recipe, eval_sets, evaluation, collection, and a picture found again by its id."
    import published_fixtures as published
    data = ",".join(f"{name}={make(tmp_path / name)}" for name, make in (("emoset", published.emoset), ("emotion6", published.emotion6), ("webemo", published.webemo)))
    small = "--train-size 8 --prompts-per-step 4 --prompts-per-update 4 --min-pixels null --max-pixels null --max-completion-tokens 48 --eval-every 1 --eval-during 4 --precision fp32 --gradient-checkpointing false --trackers [] --learning-rate 1e-3"
    common = ["--data", data, "--seeds", "1", "--jobs", "2", "--policy", "embedded", "--max-steps", "2", "--train-options", small]
    for argv in (["table1", "--methods", "vanilla,sepm,sft", *common], ["figure4", *common]):
        done = subprocess.run([*COMMAND, *argv], cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0 or "no picture of 16 on which exactly one" in done.stderr, done.stdout + done.stderr
    record = json.loads((tmp_path / "runs/experiments/real-trial/table1.json").read_text())
    assert record["missing"] == [] and [r["method"] for r in record["rows"]] == ["vanilla", "sepm", "sft"] and record["vanilla_prompt"] == "direct" and str(tmp_path) not in json.dumps(record)
    assert all(c["n"] == {"emoset": 16, "emotion6": 18, "webemo": 25}[c["test"]] for r in record["rows"] for c in r["cells"]) and len(record["rows"][0]["cells"]) == 6
    assert "(paper" not in (tmp_path / "runs/experiments/real-trial/table1.md").read_text()  # a trial's cell is not the paper's


@pytest.mark.slow
def test_a_table_is_run_stopped_resumed_and_drawn(tmp_path):
    "Two steps of every method: SIGTERM in the middle reaches the run, the same command goes on, and what is finished is left alone."
    command, environment = [*COMMAND, "table3", "--seeds", "1", *TINY], os.environ | {"OMP_NUM_THREADS": "1"}
    runs = tmp_path / "runs" / "experiments" / "embedded-trial"
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        end = time.monotonic() + 300
        while not list(runs.glob("*-grpo-G8-seed1/checkpoints/*")) and process.poll() is None and time.monotonic() < end: time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        assert "interrupted; the same command goes on" in process.communicate(timeout=120)[1]
    finally: process.kill()
    assert process.returncode == 143 and not (runs / "in_domain-cold_start-G8-seed1").exists()
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((runs / "table3.json").read_text())
    assert record["missing"] == [] and [r["method"] for r in record["rows"]] == ["vanilla", "grpo", "set", "emo_r3", "cold_start"] and all(c["n"] == 4 for r in record["rows"] for c in r["cells"])
    assert all(0 <= r["means"]["A"] <= 1 for r in record["rows"]) and record["at_once"] == 1
    stamp = (runs / "in_domain-grpo-G8-seed1/summary.json").stat().st_mtime_ns
    drawn = subprocess.run([*COMMAND, "figure5", "--seeds", "1", *TINY], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert drawn.returncode == 0 and (runs / "figure5.png").exists() and (runs / "in_domain-grpo-G8-seed1/summary.json").stat().st_mtime_ns == stamp, drawn.stderr
