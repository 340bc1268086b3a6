"""The commands that a tutorial prints work as printed: each is taken from the page's text and run, in order and in an empty folder, with nothing but the page's own options behind it that make it small enough for a CPU."""
import ast
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from published_fixtures import emoset

from emo_r3.cli import given_fields, main, parse, read_recipe, recipe_names, run_config
from emo_r3.data import EMOSET8

ROOT = Path(__file__).parent.parent
PAGES = ("one_gpu",)
NOT_HERE = ("python3 -m venv ", ". .venv/", "pip install ", "hf download ", 'python -c "import torch; print(torch.cuda', "python -m bitsandbytes", "tensorboard ", "vllm serve ")  # need the network, a GPU, or a browser; what can be said of them is checked below
ENDS = {"emo-r3 data check": 1}  # exit codes, where they are not 0: our copy of EmoSet has too few pictures


def cells(page, kind): return ["".join(c["source"]) for c in json.loads((ROOT / "nbs" / "tutorials" / f"{page}.ipynb").read_text(encoding="utf-8"))["cells"] if c["cell_type"] == kind]


def commands(page):
    "Every line of every block of bash in the page's text, in order."
    return [line for text in cells(page, "markdown") for block in re.findall(r"```bash\n(.*?)```", text, re.S) for line in block.replace("\\\n", " ").splitlines() if line.strip() and not line.startswith("#")]


def small(page):
    "The options that the page puts behind its commands: SMALL, by the command's first word."
    source = next(c for c in cells(page, "code") if c.startswith("SMALL = "))
    return ast.literal_eval(source.removeprefix("SMALL = "))


def substituted(page, command):
    "A command, and behind it the page's options for its kind."
    words = shlex.split(command)
    return [*words, *(shlex.split(small(page).get(words[1], "")) if words[0] == "emo-r3" else [])]


def here(page): return [c for c in commands(page) if not c.startswith(NOT_HERE)]


@pytest.mark.parametrize("page", PAGES)
def test_commands_are_known_with_all_their_options(page):
    "Also those that are too long for a test: names of commands, options, recipes and fields, as printed, before anything is put behind them."
    assert len(here(page)) > 8
    for command in here(page):
        words = shlex.split(command)
        if words[0] != "emo-r3": continue
        args = parse(words[1:])
        if words[1] not in ("train", "plan"): continue
        for recipe in args.recipe if isinstance(args.recipe, list) else [args.recipe]:
            assert recipe in recipe_names()
            for line in (words, substituted(page, command)): run_config(recipe, given_fields(parse(line[1:])))
    assert "--data" not in shlex.split(small(page)["train"])  # pictures are read from where the page says they are


@pytest.mark.parametrize("page", PAGES)
def test_what_cannot_run_here_names_what_is_there(page):
    said = [c for c in commands(page) if c.startswith(NOT_HERE)]
    settings = (ROOT / "settings.ini").read_text()
    assert len(said) + len(here(page)) == len(commands(page))
    for command in said:
        if command.startswith("pip install"):
            for extra in re.findall(r"\[(\w+)\]", command): assert f"{extra}_requirements" in settings
            for file in re.findall(r"-c (\S+)", command): assert (ROOT / file).is_file()
        if command.startswith("hf download"): assert command.split()[-1] in {read_recipe(name)[1].get("policy") for name in recipe_names()}
        if command.startswith("vllm serve"): assert "exported/" in command


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_every_command_works_as_printed(page, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    Image.effect_noise((64, 48), 60).convert("RGB").save("picture.jpg")
    for command in here(page):
        words = substituted(page, command)
        if words[:2] not in (["emo-r3", "plan"],) and not Path("data/EmoSet-118K").is_dir(): emoset(Path("data/EmoSet-118K"), train=dict.fromkeys(EMOSET8, 6), validation=dict.fromkeys(EMOSET8, 2), test=dict.fromkeys(EMOSET8, 2))
        expected = next((code for begin, code in ENDS.items() if command.startswith(begin)), 0)
        if words[0] == "emo-r3": code = main(words[1:])
        else: code = subprocess.run(["bash", "-c", command], env=os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}).returncode
        said = capfd.readouterr()
        assert code == expected, f"{command}\n{said.out[-2000:]}\n{said.err[-2000:]}"
        assert said.out.strip(), command
    for command in commands(page):  # what the others would look at is there
        for folder in re.findall(r"(?:--logdir |serve |lora-modules \w+=)((?:runs|exported)/\S+)", command): assert any(Path(folder).iterdir()), command


def test_options_in_the_tables_of_eight_gpus_are_those_of_the_command():
    text = "\n".join(cells("eight_gpus", "markdown"))
    rows = [row for row in re.findall(r"^\| [^|]+ \| (.+) \|$", text, re.M) if "`" in row]
    tried = [code for row in rows for code in re.findall(r"`([^`]+)`", row) if re.match("--[a-z]+(-[a-z]+)* ", code)]  # accelerate's own are written with an underscore
    assert len(tried) >= 10
    for options in tried: run_config("emoset_8gpu", given_fields(parse(["train", "emoset_8gpu", *shlex.split(options)])))
    for row in rows:
        for recipe in re.findall(r"recipes? `(\w+)`|, `(\w+_8gpu_\w+)`", row): assert max(recipe) in recipe_names()
    launched = set(re.findall(r"emo_r3/launch/(\w+)\.yaml", text + "".join(cells("eight_gpus", "code"))))
    assert launched == {p.stem for p in (ROOT / "emo_r3" / "launch").glob("*.yaml")}


@pytest.mark.slow
def test_every_command_of_eight_gpus_works_on_two_processes(tmp_path):
    "The page itself runs them, with the options that it shows; `nbdev_test` leaves those cells out, for they take a minute or two."
    done = subprocess.run([sys.executable, "-m", "jupyter", "nbconvert", "--to", "notebook", "--execute", "--output-dir", str(tmp_path), "--ExecutePreprocessor.timeout=900", "eight_gpus.ipynb"], cwd=ROOT / "nbs" / "tutorials", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    said = "\n".join("".join(o.get("text", "")) for c in json.loads((tmp_path / "eight_gpus.ipynb").read_text())["cells"] if c["cell_type"] == "code" for o in c["outputs"])
    for what in ("sharding zero2", "goes on from checkpoints/step_000002", "another number of processes: 2 -> 1", "runs/emoset/report.html", "release/emo-r3-emoset"): assert what in said, what
