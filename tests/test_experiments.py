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
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from emo_r3 import cli, experiments
from emo_r3.checkpoint import Stopped
from emo_r3.evaluate import EvalReport, Graded, wilson_interval, write_predictions
from emo_r3.experiments import (EMBEDDED_SETS, EXPERIMENTS, PAPER, TABLES, TITLES, Cell, Grid, Measured, Row, Runner, Task, Trial, bootstrap, cell_tasks, choose_case, collect_cell, collect_cells, compare_rows,
                                experiment, experiment_cells, experiment_rows, grid_latex, grid_markdown, grid_text, in_and_out, last_words, picture_differences, read_curves, read_data_sets, recipe_fields, run_cells,
                                score, shell_line, step_times, table_csv, table_grids, table_rows)
from emo_r3.scenes import domain_label_set, make_scenes

REAL = read_data_sets("emoset=data/EmoSet-118K,emotion6=data/Emotion6,webemo=data/WEBEmo")


def graded(right, n=None, name="p"): # right: which of n pictures are answered correctly, or one truth value a picture
    values = [i < right for i in range(n)] if n is not None else right
    return tuple(Graded(f"{name}{i}", "fear", "fear" if ok else "awe", "text", True, grounded=bool(ok)) for i, ok in enumerate(values))


def all_cells(sets, seeds=(1, 2)): return list(dict.fromkeys(c for name in EXPERIMENTS for c in experiment_cells(name, sets, seeds)))


def leave(cell, tasks, sets=EMBEDDED_SETS, right=lambda cell, test: 6, n=10, metrics=()):
    "Writes what the commands of a cell would leave behind."
    for task in tasks:
        if task.test:
            write_predictions(task.leaves, {task.test: EvalReport(graded(right(cell, task.test), n, f"{task.test}-"), domain_label_set("in_domain"), task.fields["method"], task.fields["mode"])})
            continue
        reports = {test: EvalReport(graded(right(cell, test), n, f"{test}-"), domain_label_set("in_domain"), task.fields["method"], "strict") for test in sets.test}
        write_predictions(task.leaves.parent / "predictions" / "after.jsonl", reports)
        (task.leaves.parent / "config.yaml").write_text(yaml.safe_dump(recipe_fields(task.recipe) | {k: yaml.safe_load(v) for k, v in task.fields.items()}))
        (task.leaves.parent / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics))
        task.leaves.write_text(json.dumps({"steps": 2, "wall_s": 1.0, "after": {test: {"accuracy": r.accuracy} for test, r in reports.items()}}))


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
            assert [t.test for t in tasks] == list(sets.test)
            continue
        c = configuration(tasks[-1])
        for name, value in (EXPECTED[cell.method] | {"num_generations": cell.num_generations or 1, "seed": cell.seed, "report": "best", "evaluate_before": False}).items(): assert getattr(c, name) == value, (cell.name, name)
        assert tasks[-1].leaves == Path("runs") / cell.name / "summary.json" and c.eval_every > 0 and c.save_every > 0
        if sets.embedded: assert (c.data, c.label_set, c.max_steps) == (f"scenes:{cell.train}", domain_label_set(cell.train).name, {"in_domain": 100, "faces": 50}[cell.train])
        else: assert c.data == sets.paths[cell.train] and c.data_format == cell.train and set(c.eval_sets) == set(sets.test) - {cell.train} and c.eval_sets["webemo"]["label_set"] == "webemo7"
        if cell.train == "emotion6": assert c.train_size + 200 == 1386 and (c.train_size // c.prompts_per_step == 1386 // c.prompts_per_step or c.method == "sft")  # some are left to choose a checkpoint by
        if cell.method == "cold_start":
            first = configuration(tasks[0])
            assert len(tasks) == 2 and first.method == "sft" and first.report == "last" and c.policy == str(tasks[0].leaves.parent / "policy") and first.train_size < c.train_size
        else: assert len(tasks) == 1


def test_a_trial_reaches_every_command_and_no_cell_s_own_field():
    trial = Trial(2, 5, "some/policy", (("beta", "0.5"),))
    c = configuration(cell_tasks(Cell("grpo", "faces", 4, 1), EMBEDDED_SETS, Path("runs"), trial)[0])
    assert (c.max_steps, c.eval_size, c.policy, c.beta) == (2, 5, "some/policy", 0.5)
    args = cli.parse(list(cell_tasks(Cell("vanilla"), EMBEDDED_SETS, Path("runs"), trial)[0].words))
    assert args.size == 5 and args.policy == "some/policy"
    with pytest.raises(ValueError, match="num_generations = '2'"): Trial(options=(("num_generations", "2"),))


def test_manifests_choose_the_test_pictures_of_every_command():
    sets = read_data_sets("emoset=a,emotion6=b,webemo=c", "emoset=m.jsonl,webemo=n.jsonl")
    own, other = (configuration(cell_tasks(Cell("grpo", train, 4, 1), sets, Path("runs"))[0]) for train in sets.train)
    assert own.test_manifest == "m.jsonl" and own.eval_sets["webemo"]["manifest"] == "n.jsonl" and "manifest" not in own.eval_sets["emotion6"]
    assert other.test_manifest is None and other.eval_sets["emoset"]["manifest"] == "m.jsonl"
    assert [cli.parse(list(t.words)).manifest for t in cell_tasks(Cell("vanilla"), sets, Path("runs"))] == ["m.jsonl", None, "n.jsonl"]
    assert "--test-manifests emoset=FILE,webemo=FILE" in experiments.experiment_words("table1", "emoset=/secret/a", 3, manifests="emoset=/secret/m.jsonl,webemo=n.jsonl") and "secret" not in experiments.experiment_words("table1", "emoset=/secret/a", 3)
    with pytest.raises(ValueError, match="allowed with the embedded scenes: none"): read_data_sets("embedded", "emoset=m.jsonl")


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
    (["table3", "--train-options", "--seed 3"], ["--train-options", "seed = '3'"]), (["table3", "--train-options", "--learning-rat 3"], ["did you mean '--learning-rate'"]), (["table3", "--max-step", "1"], ["'--max-step'", "'--max-steps'"]),
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


def stand_in(folder, what, test=None): return Task((what, str(folder / "summary.json")), folder / "summary.json", test)


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
    for trial in (Trial(max_steps=2), Trial(options=(("beta", "0.5"),)), Trial(policy="elsewhere/policy")):
        with pytest.raises(ValueError, match="was run with"): collect_cell(cell, cell_tasks(cell, EMBEDDED_SETS, tmp_path, trial), EMBEDDED_SETS)
    config = tmp_path / cell.name / "config.yaml"
    config.write_text(yaml.safe_dump(yaml.safe_load(config.read_text()) | {"preset": "paper"}))  # the recipe's own field
    with pytest.raises(ValueError, match="preset = 'paper', wanted: 'released'"): collect_cell(cell, tasks, EMBEDDED_SETS)


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


# ---- figures

METRICS = [{"step": 0, "eval/in_domain/accuracy": 0.1}, *({"step": s, "reward": 0.5, "rewards/accuracy/mean": s / 10, "step_time": s, "timing_s/rollout": s / 2, "timing_s/update": 1.0} | ({"eval/in_domain/accuracy": 0.7, "eval/style/accuracy": 0.2} if s == 2 else {}) for s in (1, 2, 4)),
           {"step": 5, "eval/in_domain/accuracy": 0.9}]


def test_curves_hold_validation_and_never_test(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in METRICS))
    run = Measured(cell_of(1), {}, tmp_path, {"ended": {"why": "depleted", "step": 4}})
    assert read_curves(run) == {"train": [(1, 0.1), (2, 0.2), (4, 0.4)], "validation": [(2, 0.7)], "ended": {"why": "depleted", "step": 4}}
    assert step_times([run, run]) == {"rollout": 1.0, "reflect": 0.0, "logps": 0.0, "update": 1.0, "step": 2, "steps": 6}
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match="step_time"): step_times([run])


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
        for cell in experiment_cells(name, EMBEDDED_SETS, [1, 2]): leave(cell, cell_tasks(cell, EMBEDDED_SETS, Path("runs/embedded")), right=lambda c, test: right[c.method], metrics=METRICS)
        assert experiment(name, seeds=2, runs="runs", output="made", collect=True, say=lambda line: None) == {}
        with Image.open(f"made/{name}.png") as picture: assert picture.size[0] > 800
    case = json.loads(Path("made/figure4.json").read_text())["numbers"]
    assert case["counts"] == {"both right": 5, "only GRPO right": 0, "only EMO-R3 right": 2, "none right": 3} and case["id"] in ids["in_domain"][5:7] and case["seed"] == 1 and case["answers"]["GRPO"]["predicted"] == "awe"
    assert [r["seed"] for r in json.loads(Path("made/figure3.json").read_text())["numbers"]["dapo"]] == [1, 2]
    with pytest.raises(ValueError, match="figure5: no finished run of set, emo_r3"): experiment("figure5", seeds=1, runs="elsewhere", collect=True, say=lambda line: None)
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
    record = json.loads((tmp_path / "runs/experiments/real/table1.json").read_text())
    assert record["missing"] == [] and [r["method"] for r in record["rows"]] == ["vanilla", "sepm", "sft"] and record["vanilla_prompt"] == "direct" and str(tmp_path) not in json.dumps(record)
    assert all(c["n"] == {"emoset": 16, "emotion6": 18, "webemo": 25}[c["test"]] for r in record["rows"] for c in r["cells"]) and len(record["rows"][0]["cells"]) == 6
    assert "(paper" not in (tmp_path / "runs/experiments/real/table1.md").read_text()  # a trial's cell is not the paper's


@pytest.mark.slow
def test_a_table_is_run_stopped_resumed_and_drawn(tmp_path):
    "Two steps of every method: SIGTERM in the middle reaches the run, the same command goes on, and what is finished is left alone."
    command, environment = [*COMMAND, "table3", "--seeds", "1", *TINY], os.environ | {"OMP_NUM_THREADS": "1"}
    runs = tmp_path / "runs" / "experiments" / "embedded"
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        end = time.monotonic() + 300
        while not list(runs.glob("*-grpo-G8-seed1/checkpoints/*")) and process.poll() is None and time.monotonic() < end: time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=120)
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
