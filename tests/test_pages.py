"""What the pages and the README say can be followed: links lead somewhere, recipes and flags exist, formulas can be typeset."""
import json
import re
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from emo_r3.config import TrainConfig, make_config

ROOT = Path(__file__).parent.parent
PAGES = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)


def markdown(page): return ["".join(c["source"]) for c in json.loads(page.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "markdown"]


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    text = "\n".join(markdown(page)) if page.suffix == ".ipynb" else page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#\s]+)", text):
        if not re.match(r"[a-z]+:", target): assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_formulas_have_single_backslashes(page):
    for text in markdown(page): assert not re.search(r"\\\\[a-zA-Z]{2,}", text), text[:200]


def test_recipes_and_options_in_readme_exist():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    recipes = re.findall(r"echo '(\{.*?\})'", text)
    for recipe in recipes: make_config(yaml.safe_load(recipe))
    known = {f.name for f in fields(TrainConfig)}
    options = [o for line in text.splitlines() if "emo-r3 train" in line or "ARGS=" in line for o in re.findall(r"--([a-z][a-z-]+)", line.rpartition("emo-r3 train")[2])]  # what stands before it is torchrun's
    assert recipes and options and {o.replace("-", "_") for o in options} <= known | {"help", "output_dir", "dry_run"}


def test_options_named_in_messages_exist():
    "An error that advises an option advises one that there is."
    known = {f.name.replace("_", "-") for f in fields(TrainConfig)}
    advised = [o for line in (ROOT / "emo_r3" / "cli.py").read_text(encoding="utf-8").splitlines() if "so try" in line or "try a smaller" in line for o in re.findall(r"--([a-z][a-z-]+)", line)]
    assert advised and set(advised) <= known
