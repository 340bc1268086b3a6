"""The commands: what each leaves behind, how options become fields, and what is printed last. Bad input has a file of its own."""
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from PIL import Image

from emo_r3 import cli, recipe
from emo_r3.cli import load_pair
from emo_r3.data import EMOSET8
from emo_r3.policy import EMBEDDED_POLICY
from emo_r3.scenes import DOMAINS, book_example, make_scenes
from emo_r3.vllm_sampler import EngineError

RUN_FOLDER = {"config.yaml", "metrics.jsonl", "summary.json", "samples", "policy", "report.html"}


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    "A folder with a random policy, and a recipe of two steps on it."
    from emo_r3.embedded.warm_up import build_image_processor, build_model, build_tokenizer
    from emo_r3.policy import VLProcessor, save_policy
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    save_policy(build_model(tokenizer), VLProcessor(build_image_processor(), tokenizer, chat_template=tokenizer.chat_template), folder / "policy")
    recipe = dict(policy=str(folder / "policy"), train_size=4, eval_size=2, eval_during=1, min_pixels=None, max_pixels=None, num_generations=2, max_completion_tokens=6,
                  prompts_per_step=2, prompts_per_update=2, epochs=1, max_steps=2, eval_every=1, sample_every=1, precision="fp32", trackers=[])
    (folder / "tiny.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return folder


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    "An empty folder to work in."
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("EMO_R3_DEBUG", raising=False)
    return tmp_path


def run_main(capsys, *argv) -> tuple[int, str, str]:
    "The exit code, stdout and stderr of one command."
    capsys.readouterr()
    code = cli.main([str(a) for a in argv])
    out, err = capsys.readouterr()
    return code, out, err


def pictures(root: Path, labels=("fear", "awe"), each=2, seed=0) -> Path:
    "A folder of class folders with pictures in them."
    scenes = iter(make_scenes("in_domain", "train", len(labels) * each, seed))
    for label in labels:
        (root / label).mkdir(parents=True)
        for i in range(each): next(scenes).load_image().save(root / label / f"{i}.png")
    return root


# ---- the parser, which needs no torch

def test_the_package_hands_out_what_a_run_needs():
    import emo_r3
    assert all(callable(getattr(emo_r3, name)) for name in emo_r3.__all__)
    with pytest.raises(AttributeError, match="nothing"): emo_r3.nothing

def test_help_and_version_load_no_torch():
    code = "import sys; from emo_r3.cli import main; codes = [main(['--help']), main(['--version']), main(['evaluate', '--help']), main(['trian'])]; print(codes, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "[0, 0, 0, 2] False", done.stderr


@pytest.mark.parametrize("argv, words", [
    ([], ["COMMAND"]),
    (["trian"], ["'trian'", "train, plan, evaluate, predict, report", "did you mean 'train'"]),
    (["evaluate", "embedded"], ["DATA"]),
    (["evaluate", "embedded", "scenes", "--szie", "3"], ["'--szie'", "did you mean '--size'", "evaluate --help"]),
    (["evaluate", "embedded", "scenes", "--size", "many"], ["--size", "'many'"]),
    (["evaluate", "embedded", "scenes", "--siz", "3"], ["'--siz'", "'--size'"]),  # no abbreviations: they break when a field is added
    (["evaluate", "embedded", "scenes", "more"], ["'more'"]),
    (["evaluate", "embedded", "scenes:styel"], ["'scenes:styel'", "did you mean 'style'"]),
    (["evaluate", "embedded", "scenes", "--size", "0"], ["--size", "0", "1 or more"]),
    (["evaluate", "embedded", "scenes", "--split", "tset"], ["'tset'", "train, validation, test"]),
    (["evaluate", "embedded", "scenes", "--labels", "emoset8"], ["--labels", "scenes"]),
    (["predict", "a.png", "--labels", "emoset9"], ["'emoset9'", "did you mean 'emoset8'"]),
])
def test_mistakes_are_one_line_with_the_nearest_name(folder, capsys, argv, words):
    code, out, err = run_main(capsys, *argv)
    assert code == 2 and out == "" and err.startswith("emo-r3: error: ") and err.count("\n") == 1
    for word in words: assert word in err


def test_debug_shows_where_an_error_came_from(folder, capsys, monkeypatch):
    monkeypatch.setenv("EMO_R3_DEBUG", "1")
    with pytest.raises(ValueError, match="trian"): cli.main(["trian"])


def test_tidy_ties_negative_numbers_and_reads_underscores():
    assert cli.tidy(["train", "r", "--learning_rate", "-1e-4", "--beta=-.5", "--seed", "-3", "--x", "-.5"]) == \
        ["train", "r", "--learning-rate=-1e-4", "--beta=-.5", "--seed=-3", "--x=-.5"]
    assert cli.tidy(["predict", "my_cat.png", "--policy", "my_runs/a_b"]) == ["predict", "my_cat.png", "--policy", "my_runs/a_b"]
    assert cli.tidy(["train", "--data=my_data/a_b", "-x"]) == ["train", "--data=my_data/a_b", "-x"]


# ---- recipes and fields

def test_every_recipe_of_the_package_is_a_configuration():
    assert "scenes_cpu" in cli.recipe_names()
    for name in cli.recipe_names(): assert cli.run_config(name, {})[0] == name


@pytest.mark.parametrize("text, words", [
    ("", ["None", "a mapping"]), ("- a\n- b\n", ["['a', 'b']", "a mapping"]), ("method: [", ["YAML"]), ("method: \xff".encode("latin1"), ["YAML", "utf-8"]),
    ("learning_rate: fast", ["learning_rate", "'fast'", "a number"]), ("num_generations: 4.5", ["num_generations", "4.5", "a whole number"]), ("seed: yes", ["seed", "True"]),
    ("method: 3", ["method", "3", "a text"]), ("templates: [a]", ["templates", "a mapping"]), ("trackers: tensorboard", ["trackers", "'tensorboard'", "a list"]),
    ("max_steps: ''", ["max_steps", "''", "or null"]), ("train_size: null", ["train_size", "None"]), ("1: 2", ["unknown field 1"]),
])
def test_recipes_that_are_none(folder, text, words):
    Path("odd.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError) as caught: cli.run_config("odd.yaml", {})
    for word in ["odd.yaml", *words]: assert word in str(caught.value)


@pytest.mark.parametrize("kind, good, bad", [(bool, [True, False], [1, "yes", None]), (int, [3, -1], [True, 3.0, "3", None]), (int | None, [None, 3], [False, ""]),
                                             (float, [0.5, 1, "1e-4", "inf"], [True, "fast", None, []]), (str, ["", "no"], [3, None, False]), (tuple, [[1], ()], ["a", {}]), (dict, [{}], [[]])])
def test_types_of_values(kind, good, bad):
    for value in good: assert isinstance(recipe.field_value("it", value, kind), kind) and recipe.field_value("it", value, kind) == (float(value) if kind is float else tuple(value) if kind is tuple else value)
    for value in bad:
        with pytest.raises(ValueError, match="^it = .*; allowed: "): recipe.field_value("it", value, kind)


def test_options_replace_the_recipe_field_by_field(folder):
    Path("mine.yaml").write_text("policy: embedded\nlearning_rate: 1e-4\ntrackers: []\nprecision: fp32\nlambda_format: 0\n")
    name, config = cli.run_config("mine.yaml", {"seed": "7", "beta": "0", "data": "123", "adam_betas": "0.8,0.9", "trackers": "tensorboard", "max_steps": "null"})
    assert name == "mine" and config.learning_rate == 1e-4 and config.trackers == ("tensorboard",) and config.lambda_format == 0.0
    assert (config.seed, config.beta, config.data, config.adam_betas, config.max_steps) == (7, 0.0, "123", (0.8, 0.9), None)
    assert isinstance(config.beta, float) and isinstance(config.seed, int)


def test_a_run_s_config_is_a_recipe(folder):
    from emo_r3.train import write_config
    _, config = cli.run_config("scenes_cpu", {"seed": "3", "learning_rate": "3e-5", "trackers": "[]"})
    Path("run").mkdir()
    write_config(Path("run"), config)
    assert cli.run_config("run/config.yaml", {})[1] == config


def test_train_help_explains_every_field(capsys, monkeypatch):
    from emo_r3.config import TrainConfig
    monkeypatch.setenv("COLUMNS", "1000")
    code, out, _ = run_main(capsys, "train", "--help")
    assert code == 0
    for f in fields(TrainConfig):
        line, = (l for l in out.splitlines() if l.strip().startswith(f"--{f.name.replace('_', '-')} "))
        assert f.metadata["help"] in line and f.metadata["source"] in line and "(default: " in line
    titles = [l[:-1] for l in out.splitlines() if l.endswith(":") and not l.startswith(" ")]
    assert titles[2:] == list(cli._GROUPS.values())  # after the arguments and the options
    assert "--learning-rate FLOAT" in out and "(default: 2e-06; paper, Sec. 4.1)" in out and "scenes_cpu" in out


# ---- the pictures of a run

def test_parts_of_a_run_share_no_scene():
    _, config = cli.run_config("scenes_cpu", {"train_size": "200", "eval_size": "60", "eval_during": "40"})
    data = cli.run_data(config)
    assert list(data.test) == list(DOMAINS) and list(data.during) == ["in_domain", "style"] and len(data.train) == 200
    parts = [{x.id for x in xs} for xs in (data.train, *data.during.values(), *data.test.values())]
    assert sum(map(len, parts)) == len(set().union(*parts)) == 200 + 2 * 40 + 4 * 60
    pairs = lambda xs: {(x.objects[0], thing) for x in xs for thing in x.objects[1:]}
    assert not pairs(data.test["in_domain"]) & pairs(data.during["in_domain"])  # the look while training is no look at the test


def test_another_seed_trains_on_other_scenes_and_is_tested_on_the_same():
    one, two = (cli.run_data(cli.run_config("scenes_cpu", {"train_size": "16", "eval_size": "8", "seed": s})[1]) for s in ("1", "2"))
    assert [x.id for x in one.train] != [x.id for x in two.train]
    assert [x.id for x in one.test["style"]] == [x.id for x in two.test["style"]]


def test_own_pictures_are_divided(folder, tiny):
    pictures(folder / "mine" / "train", each=4), pictures(folder / "mine" / "test", each=3, seed=1)
    data = cli.run_data(cli.run_config(str(tiny / "tiny.yaml"), {"data": "mine"})[1])
    assert len(data.train) == 4 and len(data.during["mine"]) == 1 and len(data.test["mine"]) == 2
    ids = [x.id for x in (*data.train, *data.during["mine"])]
    assert len(set(ids)) == 5 and all(i.startswith("train/") for i in ids) and all(x.id.startswith("test/") for x in data.test["mine"])
    nothing_left = cli.run_data(cli.run_config(str(tiny / "tiny.yaml"), {"data": "mine", "train_size": "8"})[1])
    assert len(nothing_left.train) == 8 and nothing_left.during == {}


# ---- runs

def check_run(run: Path, domains) -> dict:
    assert RUN_FOLDER <= {p.name for p in run.iterdir()} and not [p for p in run.rglob("*") if "partial" in p.name]
    summary = json.loads((run / "summary.json").read_text())
    assert list(summary["before"]) == list(summary["after"]) == list(domains)
    for figures in (*summary["before"].values(), *summary["after"].values()):
        assert {"accuracy", "n", "ci95", "unparsed"} <= set(figures) and figures["n"] == 2
    return summary


def test_train_leaves_a_whole_run_and_prints_its_report_last(folder, tiny, capsys, monkeypatch):
    import emo_r3.train
    recipe, written, write = tiny / "tiny.yaml", [], emo_r3.train.write_whole
    monkeypatch.setattr(emo_r3.train, "write_whole", lambda path, text: (written.append(path.name), write(path, text))[1])
    code, out, err = run_main(capsys, "train", recipe, "--seed", 3, "--max_steps", 1, "--learning-rate=1e-5")
    assert code == 0, err
    run = Path("runs/tiny-emo_r3-seed3")
    assert out.splitlines()[-1] == str(run / "report.html")
    assert all(any(line.startswith(d) for line in out.splitlines()) for d in DOMAINS)  # the table
    assert written == ["config.yaml", "summary.json"]
    summary = check_run(run, DOMAINS)
    assert list(summary["comparison"]) == list(DOMAINS) and summary["comparison"]["faces"]["n"] == 2  # answers paired, for the report
    assert (summary["recipe"], summary["seed"], summary["steps"], summary["method"]) == ("tiny", 3, 1, "emo_r3")
    assert yaml.safe_load((run / "config.yaml").read_text())["learning_rate"] == 1e-5

    from emo_r3.policy import load_policy, load_processor
    moved = max((a - b).abs().max().item() for a, b in zip(load_policy(run / "policy").parameters(), load_policy(tiny / "policy").parameters()))
    assert 0 < moved < 1e-3
    load_processor(run / "policy")

    (run / "report.html").unlink()
    assert run_main(capsys, "report", run)[:2] == (0, f"{run / 'report.html'}\n") and (run / "report.html").is_file()

    code, out, err = run_main(capsys, "train", recipe, "--seed", 3, "--max-steps", 1, "--method", "grpo")
    assert code == 0 and out.splitlines()[-1] == "runs/tiny-grpo-seed3/report.html"
    assert cli.run_folder(run) == Path("runs/tiny-emo_r3-seed3-2")


def test_train_on_own_pictures(folder, tiny, capsys):
    pictures(folder / "mine" / "train", each=3), pictures(folder / "mine" / "test", each=1, seed=1)
    code, out, err = run_main(capsys, "train", tiny / "tiny.yaml", "--data", "mine", "--output-dir", "out", "--method", "set")
    assert code == 0, err
    check_run(Path("out"), ["mine"])
    rows = [json.loads(line) for line in Path("out/metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows] == [0, 1, 2, 3] and "eval/mine/accuracy" in rows[1]  # eval_every is 1: a look after step 1


def test_evaluate_prints_a_table_and_writes_its_figures(folder, tiny, capsys):
    code, out, err = run_main(capsys, "evaluate", tiny / "policy", "scenes", "--size", 2, "--max-tokens", 4, "--output", "figures.json")
    assert code == 0, err
    assert [line.split()[:2] for line in out.splitlines()[3:]] == [[d, "2"] for d in DOMAINS]
    figures = json.loads(Path("figures.json").read_text())
    assert list(figures["domains"]) == list(DOMAINS) and figures["domains"]["faces"]["label_set"] == "emotion6" and figures["data"] == "scenes"
    assert os.listdir() == ["figures.json"]
    assert run_main(capsys, "evaluate", tiny / "policy", "scenes:faces", "--size", 1, "--max-tokens", 4, "--method", "grpo", "--split", "validation")[1].splitlines()[-1].startswith("faces ")


def test_evaluate_reads_own_pictures(folder, tiny, capsys):
    pictures(folder / "mine", labels=("joy", "surprise"))
    code, out, err = run_main(capsys, "evaluate", tiny / "policy", "mine", "--labels", "emotion6", "--max-tokens", 4, "--size", 3)
    assert code == 0 and out.splitlines()[-1].split()[:2] == ["mine", "3"], err


def table(root: Path, name: str, rows: int, seed: int = 0, split: str = "") -> Path:
    "A CSV whose columns nobody could guess, in words of its own: schreck is fear, wow is awe."
    pictures(root / "pixels", each=rows // 2, seed=seed)
    lines = [f"pixels/{label}/{i}.png;{word};{split}" for label, word in (("fear", "Schreck"), ("awe", "wow")) for i in range(rows // 2)]
    (root / name).write_text("bild;stimmung;split\n" + "\n".join(lines) + "\n")
    return root / name


MINE = ("--image-column", "bild", "--label-column", "stimmung", "--label-map", "{schreck: fear, wow: awe}")


def test_evaluate_reads_a_table_with_columns_of_its_own(folder, tiny, capsys):
    table(folder, "mood.csv", 4)
    code, out, err = run_main(capsys, "evaluate", tiny / "policy", "mood.csv", *MINE, "--max-tokens", 4, "--output", "figures.json")
    assert code == 0 and out.splitlines()[-1].split()[:2] == ["mood", "4"], err
    per_class = json.loads(Path("figures.json").read_text())["domains"]["mood"]["per_class"]
    assert {label: s["n"] for label, s in per_class.items() if s["n"]} == {"fear": 2, "awe": 2}


@pytest.mark.parametrize("options, words", [
    ((), ["mood.csv, line 2", "no image column", "bild, stimmung"]), (("--image-column", "bidl"), ["mood.csv", "'bidl'", "did you mean 'bild'"]),
    (("--image-column", "bild"), ["no label column"]), (MINE[:4], ["mood.csv, line 2", "'Schreck'", "emoset8"]), ((*MINE[:5], "[a]"), ["label_map", "['a']", "a mapping"]),
    ((*MINE[:5], "{schreck: fera}"), ["'Schreck'", "did you mean 'fear'"])])
def test_columns_that_are_not_there(folder, tiny, capsys, options, words):
    table(folder, "mood.csv", 4)
    code, out, err = run_main(capsys, "evaluate", tiny / "policy", "mood.csv", *options)
    assert code == 2 and out == "" and err.count("\n") == 1
    for word in words: assert word in err


def test_train_reads_a_table_with_columns_of_its_own(folder, tiny, capsys):
    table(folder, "mood.csv", 8, split="train")
    rows = (folder / "mood.csv").read_text().splitlines()
    (folder / "mood.csv").write_text("\n".join(r.replace(";train", ";test") if i in (1, 5) else r for i, r in enumerate(rows)) + "\n")
    _, config = cli.run_config(str(tiny / "tiny.yaml"), {"data": "mood.csv", "image_column": "bild", "label_column": "stimmung", "label_map": "{schreck: fear, wow: awe}"})
    data = cli.run_data(config)
    assert [sorted({x.label for x in xs}) for xs in (data.train, data.test["mood"])] == [["awe", "fear"]] * 2 and len(data.train) == 4
    code, out, err = run_main(capsys, "train", tiny / "tiny.yaml", "--data", "mood.csv", *MINE, "--output-dir", "out", "--method", "set", "--max-steps", 1)
    assert code == 0, err
    assert cli.run_config("out/config.yaml", {"image_column": "null"})[1].image_column is None and cli.run_config("out/config.yaml", {})[1].label_map == config.label_map


@pytest.mark.parametrize("argv", [("evaluate", "embedded", "scenes"), ("train", "scenes_cpu", "--output-dir", "out")])
@pytest.mark.parametrize("option", [MINE[:2], MINE[2:4], MINE[4:]])
def test_scenes_have_no_columns(folder, capsys, argv, option):
    code, _, err = run_main(capsys, *argv, *option)
    assert code == 2 and option[0][2:].replace("-", "_") in err and "scenes" in err and os.listdir() == []


OTHER_WORDS = {"set": "{question} Denke nach. <a></a> <b></b> <c></c> \\boxed{}", "tags": ["a", "b", "c"]}


def test_templates_and_sizes_reach_the_policy(folder, tiny, capsys, monkeypatch):
    import emo_r3.evaluate
    asked, sizes, real = [], [], emo_r3.evaluate.PolicySampler.sample
    def sample(self, messages, *args, **options):
        asked.append(messages[0][0]["content"][-1]["text"])
        sizes.append(self.processor.image_processor.size)
        return real(self, messages, *args, **options)
    monkeypatch.setattr(emo_r3.evaluate.PolicySampler, "sample", sample)
    Path("words.yaml").write_text(yaml.safe_dump(OTHER_WORDS))
    book_example().image.save("ghost.png")
    options = ("--templates", "words.yaml", "--min-pixels", 784, "--max-pixels", 3136)
    for argv in (("evaluate", tiny / "policy", "scenes:style", "--size", 1, "--max-tokens", 4), ("predict", "ghost.png", "--policy", tiny / "policy")):
        code, _, err = run_main(capsys, *argv, *options)
        assert code == 0, err
        code, _, err = run_main(capsys, *argv)
        assert code == 0, err
    assert ["Denke nach" in text for text in asked] == [True, False] * 2
    assert [dict(s) == {"shortest_edge": 784, "longest_edge": 3136} for s in sizes] == [True, False] * 2


@pytest.mark.parametrize("text, words", [("- a", ["a mapping"]), ("sett: x", ["'sett'", "did you mean 'set'"]), ("set: no question", ["prompts.set", "{question}"]), ("set: [", ["YAML"]), (None, ["No such file"])])
def test_templates_that_cannot_work(folder, tiny, capsys, text, words):
    if text: Path("words.yaml").write_text(text)
    book_example().image.save("ghost.png")
    for argv in (("evaluate", tiny / "policy", "scenes"), ("predict", "ghost.png", "--policy", tiny / "policy")):
        code, out, err = run_main(capsys, *argv, "--templates", "words.yaml")
        assert code == 2 and out == "" and err.count("\n") == 1
        for word in ("words.yaml", *words): assert word in err


@pytest.mark.parametrize("options, words", [(("--min-pixels", 0), ["min_pixels = 0", "1 or more"]), (("--max-pixels", "-5"), ["max_pixels = -5"]), (("--min-pixels", 9, "--max-pixels", 4), ["min_pixels = 9", "4 or less"]),
                                            (("--method", "sett"), ["--method", "'sett'", "did you mean 'set'"])])
def test_sizes_and_methods_that_cannot_work(folder, capsys, options, words):
    for argv in (("evaluate", "./nowhere", "scenes"), ("predict", book_example().image.save("ghost.png") or "ghost.png", "--policy", "./nowhere")):
        code, _, err = run_main(capsys, *argv, *options)  # told before the policy is looked for
        assert code == 2
        for word in words: assert word in err


def test_evaluate_on_the_same_scenes_as_a_run():
    _, config = cli.run_config("scenes_cpu", {"eval_size": "5", "train_size": "16"})
    args = cli.parse(["evaluate", "embedded", "scenes", "--size", "5"])
    same = lambda data: {d: [x.id for x in xs] for d, xs in data.items()}
    assert same(cli.eval_data(args)) == same(cli.run_data(config).test)


def test_predict_shows_what_the_policy_says(folder, tiny, capsys, monkeypatch):
    import emo_r3.evaluate
    from emo_r3.evaluate import Prediction
    Image.new("RGB", (40, 30)).save("a.png"), book_example().image.save("b.jpg")
    said = iter([Prediction("fear", dict.fromkeys(EMOSET8, 0.0) | {"fear": 0.93}, ("A ghost.", "A shiver.", "Negative."), "...", True, ""),
                 Prediction(None, None, ("A ghost.", None, None), "the whole text", False, "<step2> is missing"),
                 Prediction(None, None, (None, None, None), "the whole text", False, "")])
    monkeypatch.setattr(emo_r3.evaluate, "predict", lambda *args, **options: next(said))
    code, out, err = run_main(capsys, "predict", "a.png", "b.jpg", "a.png", "--policy", tiny / "policy")
    assert code == 0 and out.splitlines() == [
        "a.png: fear (93%)", "  1. A ghost.", "  2. A shiver.", "  3. Negative.", "b.jpg: no label could be read (<step2> is missing)", "  1. A ghost.",
        "a.png: no label could be read (the answer is none of amusement, awe, contentment, excitement, anger, disgust, fear, sadness)", "  the whole text"]


def test_predict_runs(folder, tiny, capsys):
    book_example().image.save("ghost.png")
    code, out, err = run_main(capsys, "predict", "ghost.png", "--policy", tiny / "policy")
    assert code == 0 and out.startswith("ghost.png: "), err


@pytest.mark.parametrize("file, values, says", [("preprocessor_config.json", {"merge_size": 1}, "merge_size = 1 in preprocessor_config.json, spatial_merge_size = 2 in config.json: a picture would have other tokens than features"),
                                                ("preprocessor_config.json", {"patch_size": 14}, "patch_size = 14 in preprocessor_config.json, patch_size = 12"), ("config.json", {"image_token_id": 7}, "<|image_pad|> is token 5 of the tokenizer, image_token_id = 7")])
def test_a_processor_of_another_model_is_refused(tmp_path, file, values, says):
    "Else transformers complains, if at all, about shapes, deep inside the first forward pass."
    folder = shutil.copytree(EMBEDDED_POLICY, tmp_path / "policy")
    (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | values))
    with pytest.raises(ValueError, match=re.escape(says)): load_pair(str(folder))
    load_pair("embedded")


# ---- what is not here

BIG = [name for name in cli.recipe_names() if name != "scenes_cpu"]


@pytest.mark.parametrize("name", BIG)
def test_a_recipe_whose_data_is_not_here_says_what_to_get_and_what_can_be_done_without(folder, capsys, name):
    code, out, err = run_main(capsys, "train", name)
    assert code == 2 and out == "" and err.count("\n") == 1 and os.listdir() == []
    title, format = ("Emotion6", "emotion6") if "emotion6" in name else ("EmoSet-118K", "emoset")
    for words in (f"data = './data/{title}': no such file or folder", f"your copy of {title}", cli.PUBLISHED_AT[format][0], f"--data PATH, or data in a recipe, says where it is, and 'emo-r3 data check PATH --format {format}'", "on a laptop"): assert words in err, words
    options = err.partition("put behind it: ")[2].split()
    _, config = cli.run_config(name, cli.given_fields(cli.parse(["train", name, *options])))
    assert config.policy == "embedded" and config.method in ("emo_r3", "grpo", "sft")
    data = cli.run_data(replace(config, train_size=16, eval_during=2))  # scenes, with the labels that the recipe names
    assert data.train and data.test


@pytest.mark.slow
@pytest.mark.parametrize("name", BIG)
def test_what_is_advised_without_data_runs(folder, capsys, name):
    "Word for word."
    _, _, err = run_main(capsys, "train", name)
    code, out, err = run_main(capsys, "train", name, *err.partition("put behind it: ")[2].split())
    assert code == 0 and out.rstrip().endswith("report.html"), err


def test_the_readme_and_the_message_say_the_same():
    assert cli.ON_A_LAPTOP.format("") in (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def test_other_places_where_no_data_is(folder, capsys):
    for options, words in ((("--data", "/nowhere/x"), "data = '/nowhere/x': no such file or folder; allowed: your copy of EmoSet-118K"), (("--data", "x.csv", "--data-format", "null"), "data = 'x.csv': no such file or folder; allowed: scenes, class folders")):
        code, _, err = run_main(capsys, "train", "emoset_1gpu_lora", *options)
        assert code == 2 and words in err and err.count("\n") == 1
    from published_fixtures import emoset
    emoset(Path("data/EmoSet-118K"), train=dict.fromkeys(EMOSET8, 2), test=dict.fromkeys(EMOSET8, 1))
    sets = json.dumps({"emotion6": {"data": "/nowhere", "data_format": "emotion6", "label_set": "emotion6"}})
    code, _, err = run_main(capsys, "train", "emoset_1gpu_lora", "--train-size", 16, "--prompts-per-step", 8, "--prompts-per-update", 8, "--eval-sets", sets)
    assert code == 2 and "eval_sets: emotion6, data = '/nowhere': no such file or folder; allowed: your copy of Emotion6" in err and "laptop" not in err


def test_a_path_that_looks_like_a_hub_id_has_the_same_help(folder, capsys):
    "The recipe's own path without ./ in front: the hub has nothing of that name."
    code, out, err = run_main(capsys, "train", "emoset_1gpu_lora", "--data", "data/EmoSet-118K")
    assert code == 2 and out == "" and err.count("\n") == 1 and "error: data = data/EmoSet-118K: no file or folder here, nor a data set that the hub gives us" in err
    assert f"; allowed: {cli.what_to_get(cli.run_config('emoset_1gpu_lora', {})[1])}" in err and cli.ON_A_LAPTOP.format("") in err
    from published_fixtures import emoset
    emoset(Path("data/EmoSet-118K"), train=dict.fromkeys(EMOSET8, 2), test=dict.fromkeys(EMOSET8, 1))
    sets = json.dumps({"emotion6": {"data": "data/Emotion6", "data_format": "emotion6", "label_set": "emotion6"}})
    options = ("--data", "data/EmoSet-118K", "--train-size", 16, "--prompts-per-step", 8, "--prompts-per-update", 8)
    code, _, err = run_main(capsys, "train", "emoset_1gpu_lora", *options, "--eval-sets", sets)
    assert code == 2 and "eval_sets: emotion6, data = data/Emotion6: no such file or folder" in err and "allowed: your copy of Emotion6" in err and "laptop" not in err
    code, _, err = run_main(capsys, "train", "emoset_1gpu_lora", *options, "--train-manifest", "nowhere.jsonl")  # something else is missing
    assert code == 2 and "nowhere.jsonl" in err and "your copy of" not in err
    code, _, err = run_main(capsys, "train", "emoset_1gpu_lora", "--data", "some/one", "--data-format", "null")
    assert code == 2 and "some/one: no file or folder here" in err and "your copy of" not in err


# ---- out of memory

def test_an_engine_s_share_is_advised_as_a_shell_takes_it_and_by_the_device_s_size(folder, monkeypatch):
    words = ["train", "emoset_8gpu", "--sampler", "vllm", "--vllm", '{"gpu_memory_utilization": 0.6}', "--gradient-checkpointing", "true"]
    monkeypatch.setenv("WORLD_SIZE", "8")
    def advised():
        said = cli.memory_advice(cli.parse(words))
        options = [part for part in said.partition("try ")[2].partition(", by the formulas")[0].split(", or ") if part.startswith("--vllm")]
        return options[0].rpartition(" (")
    option, _, effect = advised()
    assert shlex.split(option) == ["--vllm", '{"gpu_memory_utilization": 0.3}']
    cli.run_config("emoset_8gpu", cli.given_fields(cli.parse([*words, *shlex.split(option)])))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=141_000_000_000))
    before, after = re.findall(r"([\d.]+) GB", advised()[2])
    least, most = re.findall(r"([\d.]+) GB", effect)
    assert float(before) - float(after) == pytest.approx(0.3 * 141, abs=0.11) and float(least) - float(most) == pytest.approx(0.3 * 80, abs=0.11)


def test_advice_for_want_of_memory_is_by_what_is_asked(folder, capsys, monkeypatch):
    from emo_r3.config import TrainConfig
    def advised(*words):
        def burst(args):
            "Runs out of memory."
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        monkeypatch.setitem(cli._COMMANDS, words[0], (cli._COMMANDS[words[0]][0], burst))
        code, out, err = run_main(capsys, *words)
        assert code == 2 and out == "" and err.count("\n") == 1 and err.startswith("emo-r3: error: CUDA out of memory. Tried to allocate 2.00 GiB.; allowed: what fits, so "), err
        return err
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert "--gradient-checkpointing true (" in advised("train", "emoset_8gpu", "--gradient-checkpointing", "false") and "--gradient-checkpointing" not in advised("train", "emoset_8gpu")
    assert "try --sharding zero2 (" in advised("train", "emoset_8gpu", "--sharding", "none")
    monkeypatch.delenv("WORLD_SIZE")
    small = advised("train", "emoset_1gpu_4bit")
    assert "(evaluation " in small and "'emo-r3 plan emoset_1gpu_4bit --gpus 1xNAME'" in small and not {"--gradient-checkpointing", "--optimizer", "--sharding", "--four-bit"} & set(small.split())
    for line in (small, advised("train", "emoset_1gpu_lora", "--policy", "someone/else")):  # of an unknown shape there are names alone
        options = [w for w in line.split() if w.startswith("--") and w not in ("--gpus",)]
        assert options and {o[2:].replace("-", "_") for o in options} <= {f.name for f in fields(TrainConfig)}
    assert "--precision bf16" in advised("evaluate", "embedded", "scenes") and "--precision bf16" not in advised("evaluate", "embedded", "scenes", "--precision", "bf16")
    book_example().image.save("ghost.png")
    assert "--max-pixels" in advised("predict", "ghost.png") and "end what else runs" in advised("report", ".")


def test_what_an_engine_says_is_one_line(capsys, monkeypatch, tmp_path):
    def fails(*given, **named): raise EngineError("server http://127.0.0.1:9: cannot be reached")
    monkeypatch.setattr("emo_r3.train.run_sampler", fails)
    assert cli.main(["train", "scenes_cpu", "--max-steps", "1", "--train-size", "64", "--sampler", "vllm_server", "--vllm", json.dumps({"url": "http://127.0.0.1:9", "folder": str(tmp_path)}), "--output-dir", str(tmp_path / "run")]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == "emo-r3: error: server http://127.0.0.1:9: cannot be reached"


def test_whoever_has_read_enough_is_not_told_of_it():
    read, write = os.pipe()
    os.close(read)  # as `head` does
    done = subprocess.run([sys.executable, "-c", "import sys; from emo_r3.cli import main; sys.exit(main(['plan', 'emoset_8gpu']))"], stdout=write, stderr=subprocess.PIPE, text=True, timeout=120)
    os.close(write)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("policy", ["/nowhere", "./nowhere", "~/nowhere"])
def test_a_plan_for_a_folder_that_is_not_there(capsys, policy):
    assert cli.main(["plan", "emoset_8gpu", "--policy", policy]) == 2 and f"policy {policy!r}: no such folder; allowed: embedded" in capsys.readouterr().err
