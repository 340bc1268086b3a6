"""Twelve things that people do wrong, through the command line: one line that names file, field, value or what is allowed; no traceback; nothing that looks like a result."""
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from emo_r3 import cli
from test_cli import folder, pictures, run_main, tiny  # noqa: F401  (fixtures)

RESULTS = ("policy", "summary.json", "report.html")


def fails(capsys, *argv, words, run="out") -> str:
    "The one line of a command that must fail; whatever `run` holds afterwards is no result."
    code, out, err = run_main(capsys, *argv)
    lines = err.splitlines()
    assert code == 2 and "Traceback" not in err + out and [l for l in lines if "error" in l] == lines[-1:] and lines[-1].startswith("emo-r3: error: "), err
    for word in words: assert str(word) in lines[-1], (word, lines[-1])
    assert not any((Path(run) / name).exists() for name in RESULTS)
    return lines[-1]


def train(tiny, *options): return ("train", tiny / "tiny.yaml", "--output-dir", "out", *options)  # noqa: F811


# ---- the data

def test_1_missing_folder(folder, tiny, capsys):  # noqa: F811
    fails(capsys, *train(tiny, "--data", "photos/emoset"), words=["photos/emoset", "no file or folder here"])  # it could be a hub id
    fails(capsys, *train(tiny, "--data", "./photos"), words=["./photos", "no such file or folder"])
    fails(capsys, "evaluate", tiny / "policy", "photos.csv", words=["photos.csv", "no such file or folder"])
    fails(capsys, "predict", "cat.png", "--policy", tiny / "policy", words=["cat.png", "does not exist"])
    assert os.listdir() == []


def test_2_empty_folder(folder, tiny, capsys):  # noqa: F811
    Path("photos/train").mkdir(parents=True), Path("photos/test").mkdir(), Path("empty").mkdir()
    fails(capsys, *train(tiny, "--data", "photos"), words=["photos", "no examples", "'train'", "one folder a label"])
    fails(capsys, *train(tiny, "--data", "empty"), words=["empty", "'train'"])
    fails(capsys, "evaluate", tiny / "policy", "empty", words=["empty", "no examples", ".jpg"])
    assert not Path("out").exists()


def test_3_corrupt_picture(folder, tiny, capsys):  # noqa: F811
    pictures(Path("photos/train"), each=2), pictures(Path("photos/test"), each=2, seed=1)
    for broken in (Path("photos/train/fear/1.png"), Path("photos/test/awe/0.png")):
        whole = broken.read_bytes()
        broken.write_bytes(whole[: len(whole) // 2])
        fails(capsys, *train(tiny, "--data", "photos", "--eval-size", "4"), words=[broken, "damaged picture"])
        broken.write_text("I am a text")
        fails(capsys, *train(tiny, "--data", "photos", "--eval-size", "4"), words=[broken, "not a picture", "JPEG"])
        fails(capsys, "predict", broken, "--policy", tiny / "policy", words=[broken, "not a picture"])
        broken.write_bytes(whole)
    Path("photos/test/fear/0.png").write_bytes(b"")
    fails(capsys, "evaluate", tiny / "policy", "photos", "--split", "test", "--max-tokens", "4", "--output", "figures.json", words=["photos/test/fear/0.png", "not a picture"])
    assert sorted(os.listdir()) == ["out", "photos"] and os.listdir("out") == ["quarantine.jsonl"]  # found before a run began, and no figures of half an evaluation


def test_3b_a_few_bad_rows_and_pictures_are_set_aside(folder, tiny, capsys):  # noqa: F811
    pictures(Path("photos/train"), each=15), pictures(Path("photos/test"), each=10, seed=1)
    Path("photos/train/fear/3.png").write_text("I am a text"), Path("photos/test/awe/0.png").write_bytes(b"")
    code, _, err = run_main(capsys, *train(tiny, "--data", "photos", "--train-size", "30", "--eval-size", "20", "--eval-every", "0", "--max-steps", "1", "--max-quarantined", "0.1"))
    assert code == 0 and "2 rows and pictures were set aside, with the reasons in out/quarantine.jsonl" in err
    aside = [json.loads(line) for line in Path("out/quarantine.jsonl").read_text().splitlines()]
    assert [a["id"] for a in aside] == ["train/fear/3.png", "test/awe/0.png"] and all("not a picture" in a["reason"] for a in aside)
    rows = [json.loads(line) for line in Path("out/metrics.jsonl").read_text().splitlines()]
    assert [r["data/quarantined"] for r in rows if "reward" in r] == [2] and json.loads(Path("out/summary.json").read_text())["after"]["photos"]["n"] == 19
    shutil.rmtree("out")
    fails(capsys, *train(tiny, "--data", "photos", "--train-size", "30", "--max-quarantined", "0.01"), words=["photos/train/fear/3.png", "not a picture"])
    assert "fear/3.png" in Path("out/quarantine.jsonl").read_text()  # said in full, although the run did not begin


def test_3c_the_run_s_folder_is_taken_away(folder, tiny, capsys, monkeypatch):  # noqa: F811
    import emo_r3.train
    real = emo_r3.train.update
    monkeypatch.setattr(emo_r3.train, "update", lambda *args: (shutil.rmtree("out"), real(*args))[1])
    line = fails(capsys, *train(tiny, "--max-steps", "1"), words=["out/metrics.jsonl", "No such file or directory"])
    assert "Traceback" not in line and not Path("out").exists()


def test_4_label_outside_the_set(folder, tiny, capsys):  # noqa: F811
    pictures(Path("photos/train"), labels=("fear", "exitement"))
    fails(capsys, *train(tiny, "--data", "photos"), words=["photos/train/exitement", "'exitement'", "emoset8", "amusement", "did you mean 'excitement'"])
    assert os.listdir("out") == ["quarantine.jsonl"] and len(Path("out/quarantine.jsonl").read_text().splitlines()) == 2  # what was wrong, row by row
    Path("rows.jsonl").write_text(json.dumps({"image": "photos/train/fear/0.png", "label": "joy"}))
    fails(capsys, "evaluate", tiny / "policy", "rows.jsonl", words=["rows.jsonl, line 1", "'joy'", "emoset8"])
    fails(capsys, *train(tiny, "--label-set", "emotoin6"), words=["label_set", "'emotoin6'", "did you mean 'emotion6'"])
    fails(capsys, *train(tiny, "--label-set", "emotion6"), words=["label_set", "'emotion6'", "scenes", "emoset8"])


# ---- the recipe

def test_5_unknown_recipe_field(folder, tiny, capsys):  # noqa: F811
    Path("mine.yaml").write_text((tiny / "tiny.yaml").read_text() + "learning_rat: 1.0e-4\n")
    fails(capsys, "train", "mine.yaml", "--output-dir", "out", words=["mine.yaml", "'learning_rat'", "did you mean 'learning_rate'"])
    fails(capsys, *train(tiny, "--lerning-rate", "1e-4"), words=["'--lerning-rate'", "did you mean '--learning-rate'"])
    fails(capsys, *train(tiny, "--learning_rate_", "1e-4"), words=["'--learning-rate-'", "did you mean '--learning-rate'"])
    fails(capsys, "train", "scene_cpu", "--output-dir", "out", words=["'scene_cpu'", "did you mean 'scenes_cpu'"])
    fails(capsys, "train", "missing.yaml", "--output-dir", "out", words=["'missing.yaml'", "no file", "scenes_cpu"])
    fails(capsys, *train(tiny, "--method", "emo_r4"), words=["method", "'emo_r4'", "grpo, set, emo_r3", "did you mean 'emo_r3'"])
    assert os.listdir() == ["mine.yaml"]


def test_6_group_of_one(folder, tiny, capsys):  # noqa: F811
    fails(capsys, *train(tiny, "--num-generations", "1"), words=["num_generations", "= 1;", "2 or more"])
    assert os.listdir() == []


def test_7_negative_temperature(folder, tiny, capsys):  # noqa: F811
    for text in ("-0.5", "0", "-1e-3", "nan", ".nan", "-.inf", "inf"):
        fails(capsys, *train(tiny, f"--temperature={text}"), words=["temperature", "above 0"])
    fails(capsys, *train(tiny, "--temperature", "-0.5"), words=["temperature", "-0.5", "above 0"])
    fails(capsys, *train(tiny, "--temperature", "hot"), words=["temperature", "'hot'", "a number"])
    assert os.listdir() == []


def test_8_lambda_sum_above_1(folder, tiny, capsys):  # noqa: F811
    fails(capsys, *train(tiny, "--lambda-reflective", "0.7", "--lambda-format", "0.4"), words=["lambda_reflective", "lambda_format", "0.7 + 0.4", "at most 1"])
    fails(capsys, *train(tiny, "--lambda-reflective", "1"), words=["lambda_format", "1.0 + 0.1"])  # with the recipe's own .1
    fails(capsys, *train(tiny, "--lambda-format", "-0.1"), words=["lambda_format", "-0.1", "0 to 1"])
    assert os.listdir() == []


# ---- the policy

@pytest.mark.parametrize("lacking", [("tokenizer.json",), ("preprocessor_config.json", "processor_config.json")])
def test_9_model_folder_without_processor(folder, tiny, capsys, lacking):  # noqa: F811
    shutil.copytree(tiny / "policy", "model")
    for name in lacking: Path("model", name).unlink(missing_ok=True)
    for argv in (train(tiny, "--policy", "model"), ("evaluate", "model", "scenes:style", "--size", "1")):
        fails(capsys, *argv, words=["model", "processor is missing", lacking[0]])
    assert not Path("out").exists()


def test_10_pickle_checkpoint(folder, tiny, capsys):  # noqa: F811
    shutil.copytree(tiny / "policy", "model")
    (weights,) = Path("model").glob("*.safetensors")
    weights.rename("model/pytorch_model.bin")
    for argv in (train(tiny, "--policy", "model"), ("evaluate", "model", "scenes:style", "--size", "1")):
        fails(capsys, *argv, words=["model", "pytorch_model.bin", "safetensors", "pickle"])
    Path("model/pytorch_model.bin").unlink()
    fails(capsys, *train(tiny, "--policy", "model"), words=["model", "no weights", "safetensors"])
    assert not Path("out").exists()


def test_10b_a_policy_that_is_none(folder, tiny, capsys):  # noqa: F811
    Path("nothing").mkdir()
    fails(capsys, *train(tiny, "--policy", "nothing"), words=["nothing", "config.json"])
    fails(capsys, *train(tiny, "--policy", "./nowhere"), words=["./nowhere", "no such folder", "embedded"])
    shutil.copytree(tiny / "policy", "model")
    (weights,) = Path("model").glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:1000])  # an interrupted download
    fails(capsys, *train(tiny, "--policy", "model"), words=["policy model", "damaged"])


# ---- the run's folder

def test_11_no_write_permission(folder, tiny, capsys):  # noqa: F811
    Path("a_file").write_text("mine")
    fails(capsys, "train", tiny / "tiny.yaml", "--output-dir", "a_file/out", words=["output_dir", "a_file/out", "a file, not a folder"], run="a_file/out")
    fails(capsys, "train", tiny / "tiny.yaml", "--output-dir", "a_file", words=["a_file", "folder"], run="a_file")
    fails(capsys, "evaluate", tiny / "policy", "scenes:style", "--size", "1", "--output", "a_file/figures.json", words=["--output", "a_file/figures.json"])
    fails(capsys, "evaluate", tiny / "policy", "scenes:style", "--size", "1", "--output", ".", words=["--output", "'.'", "a folder"])
    assert Path("a_file").read_text() == "mine" and os.listdir() == ["a_file"]


def test_11b_a_folder_that_refuses(folder, tiny, capsys, monkeypatch):  # noqa: F811
    "Root may write everywhere, so the system's answer is played; and once more by a real read-only place that root respects too."
    Path("locked").mkdir()
    real = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "locked" and real(path, mode))
    fails(capsys, "train", tiny / "tiny.yaml", "--output-dir", "locked/out", words=["output_dir", "locked/out", "cannot be written"])
    if Path("/proc/self").is_dir():
        fails(capsys, "train", tiny / "tiny.yaml", "--output-dir", "/proc/self/out", words=["/proc/self/out"], run="/proc/self/out")


def test_11d_report_of_no_run(folder, tiny, capsys):  # noqa: F811
    Path("empty").mkdir()
    fails(capsys, "report", "empty", words=["empty", "config.yaml"], run="empty")
    fails(capsys, "report", "nowhere", words=["nowhere"], run="nowhere")


def test_11c_an_earlier_run_is_not_overwritten(folder, tiny, capsys):  # noqa: F811
    Path("out").mkdir()
    Path("out/metrics.jsonl").write_text("{}\n")
    fails(capsys, *train(tiny), words=["output_dir", "'out'", "not empty", "empty folder"])
    assert os.listdir("out") == ["metrics.jsonl"] and Path("out/metrics.jsonl").read_text() == "{}\n"


# ---- Ctrl-C

MAIN = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); from emo_r3.cli import main; sys.exit(main())"  # a job in the background would ignore SIGINT


def test_12_ctrl_c(folder, tiny, capsys):  # noqa: F811
    log = Path("out/metrics.jsonl")
    options = ("--epochs", "100000", "--max-steps", "100000", "--eval-every", "0")
    with open("err.txt", "w") as err, subprocess.Popen([sys.executable, "-c", MAIN, *map(str, train(tiny, *options))], stdout=subprocess.PIPE, stderr=err, text=True) as process:
        deadline = time.monotonic() + 60
        while not (log.is_file() and log.read_text().count('"reward"') >= 2) and process.poll() is None and time.monotonic() < deadline: time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=30)
    err = Path("err.txt").read_text()
    assert process.returncode == 130 and out == "" and "Traceback" not in err, err
    last = err.rstrip("\n").splitlines()[-1]  # splitlines also parts the progress bar's carriage returns
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    kept = sorted(os.listdir("out/checkpoints"))[-1]
    assert last.startswith("emo-r3: stopped; out is not finished") and last.endswith(f"goes on from checkpoints/{kept}") and kept == f"step_{rows[-1]['step']:06d}" and rows[-1]["step"] >= 2
    assert not any(Path("out", name).exists() for name in RESULTS) and not [p for p in Path().rglob("*") if "partial" in p.name]
    fails(capsys, "evaluate", "./out/policy", "scenes:style", words=["out/policy"])
    fails(capsys, *train(tiny), words=["another configuration", "max_steps: 100000 -> ", "--accept-changes", "--resume never"])
    fails(capsys, *train(tiny, "--resume", "never"), words=["'out'", "not empty"])
    assert run_main(capsys, "report", "out")[0] == 0 and "has not ended: summary.json is missing" in Path("out/report.html").read_text()


@pytest.mark.parametrize("where, says", [("emo_r3.policy.load_policy", "holds no checkpoint to go on from"), ("emo_r3.train.begin_step", "goes on from checkpoints/step_000000"),
                                         ("emo_r3.train.update", "goes on from checkpoints/step_000000_update_1"), ("emo_r3.evaluate.evaluate", "goes on from checkpoints/step_000000")])
@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_12b_signals_at_other_times(folder, tiny, capsys, monkeypatch, where, says, number, code):  # noqa: F811
    import emo_r3.evaluate, emo_r3.policy, emo_r3.train  # noqa: F401
    module, _, name = where.rpartition(".")
    real = getattr(sys.modules[module], name)
    def stop(*args, **options):
        signal.raise_signal(number)
        return real(*args, **options)  # an update is finished, all else is not
    monkeypatch.setattr(where, stop)
    got, out, err = run_main(capsys, *train(tiny, "--max-steps", "2"))
    last = err.rstrip("\n").splitlines()[-1]
    assert got == code and last.startswith("emo-r3: stopped; ") and says in last and "Traceback" not in err and out == ""
    assert not Path("out/summary.json").exists() and not Path("out/report.html").exists() and not [p for p in Path().rglob("*") if "partial" in p.name]
    monkeypatch.setattr(where, real)
    assert run_main(capsys, *train(tiny, "--max-steps", "2"))[0] == 0 and Path("out/summary.json").exists()


def test_12d_ctrl_c_after_the_end(folder, tiny, capsys, monkeypatch):  # noqa: F811
    import emo_r3.explore
    class Slow:
        def __init__(self, run): pass
        def write(self): signal.raise_signal(signal.SIGINT)
    monkeypatch.setattr(emo_r3.explore, "RunReport", Slow)
    code, _, err = run_main(capsys, *train(tiny, "--max-steps", "1"))
    assert code == 130 and "finished" in err and "emo-r3 report out" in err and Path("out/summary.json").is_file()


def test_13_weights_that_run_away(folder, tiny, capsys):  # noqa: F811
    line = fails(capsys, *train(tiny, "--learning-rate", "1e30", "--max-grad-norm", "1e30", "--max-steps", "5", "--epochs", "5"), words=["grad_norm", "3 updates in a row were skipped (max_skipped_updates = 3)", "out/skipped"])
    assert "nan" in line or "inf" in line
