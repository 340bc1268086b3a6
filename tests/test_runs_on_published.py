"""A run on data as it was published: its own test set, other sets beside it, rows chosen by a manifest; and what cannot be put together is said before anything is loaded."""
import json

import pytest
import yaml
from published_fixtures import emoset, emotion6, webemo

from emo_r3.cli import main, run_config, run_data
from emo_r3.evaluate import read_predictions
from emo_r3.published import manifest_sha256

TINY = "--train-size 8 --prompts-per-step 4 --prompts-per-update 4 --num-generations 2 --max-completion-tokens 8 --eval-size 6 --eval-during 4 --max-steps 1 --save-every 1 --eval-every 1 --trackers [] --max-pixels 9216".split()


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    root = tmp_path_factory.mktemp("published")
    made = {"emoset": emoset(root / "EmoSet"), "emotion6": emotion6(root / "Emotion6"), "webemo": webemo(root / "WEBEmo")}
    labels = {"emoset": "emoset8", "emotion6": "emotion6", "webemo": "webemo7"}
    return {name: {"data": str(path), "data_format": name, "label_set": labels[name]} for name, path in made.items()}


def options(values): return [word for name, value in values.items() for word in (f"--{name.replace('_', '-')}", value if isinstance(value, str) else json.dumps(value))]


def test_a_run_is_measured_on_every_set(sets, tmp_path, capsys):
    assert main(["data", "sample", sets["emoset"]["data"], "--format", "emoset", "--split", "train", "--size", "8", "--seed", "1", "--output", str(tmp_path / "train.jsonl")]) == 0
    assert main(["data", "sample", sets["emotion6"]["data"], "--format", "emotion6", "--split", "test", "--size", "5", "--seed", "1", "--output", str(tmp_path / "six.jsonl")]) == 0
    others = {"emotion6": sets["emotion6"] | {"manifest": str(tmp_path / "six.jsonl")}, "webemo": sets["webemo"]}
    assert main(["train", "scenes_cpu", *options(sets["emoset"]), *TINY, "--train-manifest", str(tmp_path / "train.jsonl"), "--eval-sets", json.dumps(others), "--report", "best", "--output-dir", str(tmp_path / "run")]) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert {name: figures["n"] for name, figures in summary["after"].items()} == {"emoset": 6, "emotion6": 5, "webemo": 6}
    assert {name: figures["label_set"] for name, figures in summary["after"].items()} == {"emoset": "emoset8", "emotion6": "emotion6", "webemo": "webemo7"}
    assert summary["manifests"] == {str(tmp_path / name): manifest_sha256(tmp_path / name) for name in ("train.jsonl", "six.jsonl")} and summary["reported"]["checkpoint"] == "step_000001"
    kept = read_predictions(tmp_path / "run" / "predictions" / "after.jsonl")
    assert {name: r.n for name, r in kept.items()} == {"emoset": 6, "emotion6": 5, "webemo": 6} and {name: r.correct / r.n for name, r in kept.items()} == {name: f["accuracy"] for name, f in summary["after"].items()}
    listed = [json.loads(line)["id"] for line in (tmp_path / "six.jsonl").read_text().splitlines()]
    assert [g.id for g in kept["emotion6"].predictions] == listed


def test_what_is_trained_on_is_not_tested_on(sets):
    _, config = run_config("scenes_cpu", {"data": sets["emoset"]["data"], "data_format": "emoset", "train_size": "10", "prompts_per_step": "2", "prompts_per_update": "2", "eval_size": "100", "eval_every": "1", "eval_during": "100"})
    data = run_data(config)
    parts = [{x.id for x in part} for part in (data.train, data.during["emoset"], data.test["emoset"])]
    assert [len(p) for p in parts] == [10, 6, 16] and not parts[0] & parts[1] and not (parts[0] | parts[1]) & parts[2]


@pytest.mark.parametrize("change, says", [
    (dict(label_set="emotion6"), "label_set = 'emotion6'; allowed: emoset8, with data_format = emoset"), (dict(eval_sets={"x": "somewhere"}), "eval_sets: x = 'somewhere'; allowed: a mapping with data"),
    (dict(eval_sets={"emoset": {"data": "x"}}), "eval_sets: 'emoset' is the data set that is trained on"), (dict(eval_sets={"x": {"data": "y", "dataformat": "emoset"}}), "did you mean 'data_format'"), (dict(eval_sets={"x": {"data": "/nowhere"}}), "no such file or folder"),
    (dict(report="best", train_size="16", eval_every="1"), "none is left to choose by"), (dict(train_manifest="/nowhere.jsonl"), "manifest /nowhere.jsonl: no such file"), (dict(data_format="webemo", label_set="webemo7"), "")])
def test_what_cannot_be_put_together(sets, change, says):
    values = {**sets["emoset"], "train_size": "8", "prompts_per_step": "4", "prompts_per_update": "4"} | change
    with pytest.raises((ValueError, OSError)) as caught: run_data(run_config("scenes_cpu", {name: value if isinstance(value, str) else yaml.safe_dump(value, default_flow_style=True) for name, value in values.items()})[1])
    assert says in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["data_format", "train_manifest", "eval_sets"])
def test_scenes_are_drawn_and_not_read(name):
    with pytest.raises(ValueError, match=f"{name} = .*allowed with scenes: none"): run_data(run_config("scenes_cpu", {name: {"data_format": "emoset", "train_manifest": "x.jsonl", "eval_sets": "{x: {data: y}}"}[name]})[1])


@pytest.mark.parametrize("domain, labels", [("faces", "emotion6"), ("in_domain", "emoset8")])
def test_another_domain_of_the_scenes_can_be_trained_on(domain, labels):
    data = run_data(run_config("scenes_cpu", {"data": f"scenes:{domain}", "label_set": labels, "train_size": "16", "eval_size": "4", "eval_during": "4"})[1])
    assert {x.domain for x in data.train} == {domain} and next(iter(data.during)) == domain and list(data.test) == ["in_domain", "style", "unseen_triggers", "faces"]
    with pytest.raises(ValueError, match="label_set = 'webemo7'; allowed with data = "): run_data(run_config("scenes_cpu", {"data": f"scenes:{domain}", "label_set": "webemo7"})[1])


def test_a_manifest_is_a_pool_that_sizes_crop_alike(sets, tmp_path, capsys):
    assert main(["data", "sample", sets["emoset"]["data"], "--format", "emoset", "--split", "test", "--size", "12", "--seed", "1", "--output", str(tmp_path / "m.jsonl")]) == 0
    data = run_data(run_config("scenes_cpu", {**sets["emoset"], "train_size": "4", "prompts_per_step": "4", "prompts_per_update": "4", "eval_size": "6", "test_manifest": str(tmp_path / "m.jsonl")})[1])
    assert main(["evaluate", "embedded", sets["emoset"]["data"], "--format", "emoset", "--manifest", str(tmp_path / "m.jsonl"), "--size", "6", "--max-tokens", "4", "--max-pixels", "9216", "--predictions", str(tmp_path / "p.jsonl")]) == 0
    (measured,) = read_predictions(tmp_path / "p.jsonl").values()
    assert [g.id for g in measured.predictions] == [x.id for x in data.test["emoset"]] and measured.n == 6


def test_the_same_pictures_under_other_seeds(sets):
    def trained(**changes): return [x.id for x in run_data(run_config("scenes_cpu", {**sets["emoset"], "train_size": "8", "prompts_per_step": "4", "prompts_per_update": "4", "eval_size": "2", **changes})[1]).train]
    assert trained(seed="1") != trained(seed="2") and trained(seed="1", data_seed="1") == trained(seed="2", data_seed="1") == trained(seed="1")
    drawn = [[x.id for x in run_data(run_config("scenes_cpu", {"train_size": "16", "eval_size": "1", "eval_during": "1", "seed": seed, "data_seed": "7"})[1]).train] for seed in ("1", "2")]
    assert drawn[0] == drawn[1]


def test_an_evaluation_leaves_out_what_a_run_would_leave_out(sets, tmp_path, capsys):
    root = emoset(tmp_path / "EmoSet", test=dict.fromkeys(("awe", "fear"), 20))
    for i, broken in enumerate(sorted((root / "image" / "awe").iterdir())[-2:]): broken.write_bytes(b"no picture")
    argv = ["evaluate", "embedded", str(root), "--format", "emoset", "--max-tokens", "4", "--max-pixels", "9216", "--predictions", str(tmp_path / "p.jsonl")]
    assert main(argv) == 0 and capsys.readouterr().err.count("emo-r3: left out: ") == 2
    (measured,) = read_predictions(tmp_path / "p.jsonl").values()
    assert measured.n == 38
    assert main([*argv, "--max-quarantined", "0"]) == 2 and "2 of 40 examples (5.0%) cannot be used; allowed: 0" in capsys.readouterr().err


@pytest.mark.parametrize("argv, says", [(["--preset", "papr"], "did you mean 'paper'"), (["--precision", "fp16"], "allowed: fp32, bf16"), (["--mode", "loose"], "allowed: strict, lenient")])
def test_what_an_evaluation_cannot_be_told(argv, says, capsys):
    assert main(["evaluate", "embedded", "scenes:faces", "--size", "1", *argv]) == 2 and says in capsys.readouterr().err


def test_the_preset_s_check_of_the_form_counts(tmp_path, capsys):
    "Words before the thought: in order for the paper's check, and not the whole text for the released code's."
    from emo_r3.sampling import PolicySampler
    real = PolicySampler.sample
    def spoken(self, *args, **options):
        from dataclasses import replace
        out = real(self, *args, **options)
        return replace(out, texts=tuple(r"Let me see. <think>a</think>\boxed{fear}" for _ in out.texts))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PolicySampler, "sample", spoken)
        for preset, share in (("paper", 1.0), ("released", 0.0)):
            assert main(["evaluate", "embedded", "scenes:in_domain", "--size", "2", "--method", "grpo", "--max-tokens", "4", "--preset", preset, "--output", str(tmp_path / "f.json")]) == 0
            assert json.loads((tmp_path / "f.json").read_text())["domains"]["in_domain"]["format"] == share


@pytest.mark.parametrize("words", ["--resume never", "--dry-run", "--output-dir x", "--accept-changes"])
def test_training_options_of_an_experiment_are_fields(words, capsys):
    assert main(["experiment", "table3", "--dry-run", f"--train-options={words}"]) == 2 and f"--train-options: '{words.split()[0]}' is no field of a run" in capsys.readouterr().err


def test_a_dry_run_of_data_that_is_not_there_fails_and_devices_are_for_dry_runs(capsys):
    assert main(["train", "emoset_8gpu", "--dry-run", "--data", "no/such"]) == 2 and "--data no/such: no such file or folder" in capsys.readouterr().err
    assert main(["train", "scenes_cpu", "--gpus", "8xH20"]) == 2 and "--gpus: allowed with --dry-run" in capsys.readouterr().err


def test_sft_by_its_name_alone():
    _, config = run_config("scenes_cpu", {"method": "sft"})
    assert (config.num_generations, config.beta) == (1, 0.0)
    with pytest.raises(ValueError, match="beta = 0.1; allowed with method = 'sft': 0"): run_config("scenes_cpu", {"method": "sft", "beta": "0.1"})


def test_scenes_are_no_further_set(sets):
    with pytest.raises(ValueError, match="eval_sets: x, data = 'scenes:faces'; allowed: the path of pictures"): run_data(run_config("scenes_cpu", {**sets["emoset"], "train_size": "4", "prompts_per_step": "4", "prompts_per_update": "4", "eval_sets": "{x: {data: 'scenes:faces', label_set: emotion6}}"})[1])
