"""Nothing that came from somewhere else is executed, obeyed or trusted with a path, and no secret of the environment is written down. Each trap is shown to work before it is shown not to be sprung."""
import base64
import hashlib
import html
import importlib
import json
import os
import pickle
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.parse import quote, quote_plus

import pytest
import torch
import yaml
from PIL import EpsImagePlugin, Image

from emo_r3 import cli
from emo_r3.checkpoint import write_manifest
from emo_r3.data import EMOSET8, EMOTION6, DataError, EmotionExample, SetAside, load_examples, write_quarantine
from emo_r3.explore import RunReport
from test_bad_inputs import fails, train
from test_cli import folder, pictures, run_main, tiny  # noqa: F401  (fixtures)
from test_explore import CHROMIUM, Page, browser, make_run

SHORT = ("--max-tokens", "4", "--size", "1")


# ---- traps: each makes a file if anybody steps on it

class Bait:
    "Whoever unpickles it makes a file."
    def __init__(self, mark): self.mark = mark
    def __reduce__(self): return Path.touch, (self.mark,)


class Trap:
    "A file that nobody may make, and things that would make it."
    def __init__(self, root): self.mark = root / "sprung"
    @property
    def sprung(self) -> bool: return self.mark.exists()
    @property
    def pickled(self) -> bytes: return pickle.dumps(Bait(self.mark))
    @property
    def module(self) -> str: return f"open({str(self.mark)!r}, 'w').close()\n"
    @property
    def yaml(self) -> str: return f"!!python/object/apply:os.system ['touch {self.mark}']"
    @property
    def program(self) -> str: return f"#!/bin/sh\ntouch {self.mark}\n"


@pytest.fixture
def trap(folder):  # noqa: F811
    trap = Trap(folder)
    yield trap
    assert not trap.sprung


def attempt(capsys, *argv) -> object:
    "The exit code of a command, or what it raised: only what it did counts here."
    try: return run_main(capsys, *argv)[0]
    except Exception as error: return error


def uses(tiny, policy):  # noqa: F811
    "Both commands that load a policy's folder."
    return train(tiny, "--policy", policy, "--max-steps", "1"), ("evaluate", policy, "scenes:style", *SHORT)


@pytest.fixture
def model(folder, tiny):  # noqa: F811
    "A copy of the policy, to be spoiled."
    return Path(shutil.copytree(tiny / "policy", folder / "model"))


@pytest.fixture(scope="session")
def trained_adapter(tiny, tmp_path_factory):  # noqa: F811
    from emo_r3.policy import add_lora, load_policy, load_processor, save_policy
    return save_policy(add_lora(load_policy(tiny / "policy"), 2, 4.0), load_processor(tiny / "policy"), tmp_path_factory.mktemp("adapter") / "adapter")


@pytest.fixture
def adapter(folder, trained_adapter): return Path(shutil.copytree(trained_adapter, folder / "model"))  # noqa: F811


@pytest.fixture(scope="session")
def stopped(tiny, tmp_path_factory):  # noqa: F811
    "A run that was stopped after its second step, with two checkpoints."
    run = tmp_path_factory.mktemp("stopped") / "out"
    assert cli.main(["train", str(tiny / "tiny.yaml"), "--output-dir", str(run), "--save-every", "1"]) == 0
    for name in ("summary.json", "report.html"): (run / name).unlink()
    shutil.rmtree(run / "policy")
    return run


@pytest.fixture
def begun(folder, stopped): return Path(shutil.copytree(stopped, folder / "out")) / "checkpoints"  # noqa: F811


def change(path: Path, **values) -> Path:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return path


def test_the_traps_work(folder, monkeypatch):  # noqa: F811
    def springs(what) -> bool:
        trap = Trap(folder)
        what(trap)
        found = trap.sprung
        trap.mark.unlink(missing_ok=True)
        return found
    def imported(trap):
        Path("bait_module.py").write_text(trap.module)
        monkeypatch.syspath_prepend(str(folder))
        importlib.import_module("bait_module")
    def run(trap):
        Path("gs").write_text(trap.program)
        Path("gs").chmod(0o755)
        subprocess.run(["./gs"], check=True)
    assert springs(lambda t: pickle.loads(t.pickled)) and springs(lambda t: yaml.unsafe_load(t.yaml)) and springs(imported) and springs(run)


# ---- 1. nothing is executed: policies

def test_a_policy_that_is_only_a_pickle(trap, tiny, model, capsys):  # noqa: F811
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(trap.pickled)
    for argv in uses(tiny, model): fails(capsys, *argv, words=["model", "pytorch_model.bin", "safetensors"])
    (model / "model.safetensors").write_bytes(trap.pickled)  # a pickle under the trusted name
    for argv in uses(tiny, model): fails(capsys, *argv, words=["model", "damaged"])
    assert not Path("out").exists()


def test_a_pickle_beside_a_policy_is_not_opened(trap, tiny, model, capsys):  # noqa: F811
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "model.pkl"): (model / name).write_bytes(trap.pickled)
    assert run_main(capsys, "evaluate", model, "scenes:style", *SHORT)[0] == 0
    (model / "model.safetensors").rename(model / "other.safetensors")  # none that transformers looks for: it must not fall back on the pickle
    assert run_main(capsys, "evaluate", model, "scenes:style", *SHORT)[0] == 2


def test_a_list_of_shards_that_names_a_pickle(trap, tiny, model, capsys, monkeypatch):  # noqa: F811
    opened, real = [], torch.load
    monkeypatch.setattr(torch, "load", lambda file, *args, **options: (opened.append(str(file)), real(file, *args, **options))[1])
    (model / "model.safetensors").rename(model / "other.safetensors")
    torch.save(Bait(trap.mark), model / "part.bin")
    (model / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": {"lm_head.weight": "part.bin"}}))
    code = attempt(capsys, "evaluate", model, "scenes:style", *SHORT)
    assert code == 2 and opened == []


@pytest.mark.parametrize("file, values", [
    ("config.json", {"auto_map": {"AutoConfig": "bait.E", "AutoModelForImageTextToText": "bait.E"}}),
    ("config.json", {"auto_map": {"AutoConfig": "bait.E", "AutoModelForImageTextToText": "bait.E"}, "model_type": "bait"}),
    ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["bait.E", "bait.E"]}}),
    ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["bait.E", "bait.E"]}, "tokenizer_class": "BaitTokenizer"}),
    ("preprocessor_config.json", {"auto_map": {"AutoImageProcessor": "bait.E", "AutoProcessor": "bait.E"}, "image_processor_type": "Bait"}),
    ("generation_config.json", {"custom_generate": "bait", "auto_map": {"GenerationConfig": "bait.E"}}),
])
def test_code_beside_a_policy_is_never_imported(trap, tiny, model, capsys, monkeypatch, file, values):  # noqa: F811
    for place in (model, Path("custom_generate"), Path()):
        place.mkdir(exist_ok=True)
        for name in ("bait.py", "generate.py"): (place / name).write_text(trap.module)
    monkeypatch.syspath_prepend(str(model))
    change(model / file, **values)
    code, out, err = run_main(capsys, "evaluate", model, "scenes:style", *SHORT)
    assert code in (0, 2) and "Traceback" not in out + err
    assert code == 2 if values.get("model_type") == "bait" else code == 0  # refused, or passed over


@pytest.mark.parametrize("template", ["{{ cycler.__init__.__globals__.os.system('touch ' + '@') }}", "{{ ''.__class__.__mro__[1].__subclasses__() }}{{ lipsum.__globals__['os'].system('touch @') }}",
                                      "{% for m in [].__class__.__base__.__subclasses__() %}{{ m.__init__.__globals__['__builtins__']['open']('@', 'w') }}{% endfor %}"])
def test_a_chat_template_stays_in_its_box(trap, tiny, model, capsys, template):  # noqa: F811
    (model / "chat_template.jinja").write_text(template.replace("@", str(trap.mark)))
    assert attempt(capsys, "evaluate", model, "scenes:style", *SHORT) != 0


def test_a_policy_does_not_choose_a_kernel_from_the_hub(trap, tiny, model, capsys, monkeypatch):  # noqa: F811
    from transformers.integrations import hub_kernels
    asked = []
    monkeypatch.setattr(hub_kernels, "is_kernels_available", lambda: True)
    monkeypatch.setattr(hub_kernels, "get_kernel", lambda name, **_: (asked.append(name), (_ for _ in ()).throw(ValueError("no network")))[0])
    change(model / "config.json", attn_implementation="kernels-community/flash-attn3")
    attempt(capsys, "evaluate", model, "scenes:style", *SHORT)
    assert asked == []


# ---- adapters

def test_an_adapter_that_is_only_a_pickle(trap, tiny, adapter, capsys):  # noqa: F811
    (adapter / "adapter_model.bin").write_bytes(trap.pickled)
    assert run_main(capsys, "evaluate", adapter, "scenes:style", *SHORT)[0] == 0  # beside the true ones it is not opened
    (adapter / "adapter_model.safetensors").unlink()
    for argv in uses(tiny, adapter): fails(capsys, *argv, words=["model", "adapter_model.safetensors", "pickle"])
    (adapter / "adapter_model.safetensors").write_bytes(trap.pickled)
    for argv in uses(tiny, adapter): assert attempt(capsys, *argv) != 0


def test_an_adapter_s_base_is_looked_at_as_any_policy_is(trap, tiny, adapter, capsys):  # noqa: F811
    shutil.copytree(tiny / "policy", "base")
    Path("base/model.safetensors").unlink()
    Path("base/pytorch_model.bin").write_bytes(trap.pickled)
    change(adapter / "adapter_config.json", base_model_name_or_path="./base")
    fails(capsys, "evaluate", adapter, "scenes:style", *SHORT, words=["base", "pytorch_model.bin", "safetensors"])


@pytest.mark.parametrize("values", [{"auto_mapping": {"base_model_class": "E", "parent_library": "bait"}}, {"megatron_config": {"a": 1}, "megatron_core": "bait"}, {"megatron_config": {"a": 1}, "megatron_core": "megatron.bait"}])
def test_an_adapter_imports_nothing(trap, tiny, adapter, capsys, monkeypatch, values):  # noqa: F811
    Path("bait.py").write_text(trap.module)
    Path("megatron").mkdir()
    for name in ("__init__.py", "bait.py"): Path("megatron", name).write_text(trap.module)
    monkeypatch.syspath_prepend(str(Path().resolve()))  # as in a notebook, or with python -m
    change(adapter / "adapter_config.json", **values)
    attempt(capsys, "evaluate", adapter, "scenes:style", *SHORT)
    monkeypatch.delitem(sys.modules, "megatron", raising=False)
    sprung = trap.sprung
    trap.mark.unlink(missing_ok=True)
    assert not sprung


# ---- checkpoints

def test_a_checkpoint_whose_optimizer_became_a_pickle(trap, tiny, begun, capsys):  # noqa: F811
    resume = train(tiny, "--save-every", "1")
    (begun / "step_000002/optimizer.safetensors").write_bytes(trap.pickled)
    code, _, err = run_main(capsys, *resume)
    assert code == 0 and "optimizer.safetensors has" in err and "set aside as damaged_step_000002_1" in err and Path("out/summary.json").is_file()  # from the one before


def test_a_pickle_in_every_checkpoint(trap, tiny, begun, capsys):  # noqa: F811
    resume, kept = train(tiny, "--save-every", "1"), sorted(p.name for p in begun.iterdir())
    assert kept == ["step_000001", "step_000002"]
    (begun / "step_000001/optimizer.safetensors").write_bytes(trap.pickled)
    (begun / "step_000002/optimizer.pt").write_bytes(trap.pickled)  # beside the whole ones
    fails(capsys, "train", tiny / "tiny.yaml", "--output-dir", "other", "--save-every", "1", "--resume", begun / "step_000002", words=["step_000002", "optimizer.pt is not in manifest.json"], run="other")
    fails(capsys, *resume, words=["out/checkpoints", "none of its 2 checkpoints is whole"])


@pytest.mark.parametrize("file", ["optimizer.safetensors", "rank_0.safetensors", "policy/model.safetensors"])
def test_a_manifest_that_vouches_for_a_pickle(trap, tiny, begun, capsys, file):  # noqa: F811
    spoiled = begun / "step_000002"
    (spoiled / file).write_bytes(trap.pickled)
    (spoiled / "manifest.json").unlink()
    write_manifest(spoiled)
    assert attempt(capsys, *train(tiny, "--save-every", "1")) != 0 and not Path("out/summary.json").exists()


def test_a_manifest_that_leads_out(trap, tiny, begun, capsys):  # noqa: F811
    Path("outside").write_text("x")
    manifest = json.loads((begun / "step_000002/manifest.json").read_text())
    manifest["files"]["../../../outside"] = {"bytes": 1, "sha256": hashlib.sha256(b"x").hexdigest()}
    (begun / "step_000002/manifest.json").write_text(json.dumps(manifest))
    fails(capsys, "train", tiny / "tiny.yaml", "--output-dir", "other", "--save-every", "1", "--resume", begun / "step_000002", words=["../../../outside is missing"], run="other")


# ---- recipes, templates, options, a run's own config.yaml

@pytest.mark.parametrize("text", ["@", "templates: @", "templates: {set: @}", "trackers: [@]", "label_map: {@: fear}", "seed: !!python/name:os.system", "policy: !!python/object/new:os.system ['true']"])
def test_yaml_makes_no_objects(trap, tiny, capsys, text):  # noqa: F811
    text = text.replace("@", trap.yaml)
    Path("mine.yaml").write_text(text)
    fails(capsys, "train", "mine.yaml", "--output-dir", "out", words=["mine.yaml", "not readable as YAML", "python"])
    for argv in (("evaluate", tiny / "policy", "scenes", "--size", "1"), ("predict", "cat.png", "--policy", tiny / "policy")):
        fails(capsys, *argv, "--templates", "mine.yaml", words=["--templates mine.yaml", "not readable as YAML"])
    Path("run").mkdir()
    Path("run/config.yaml").write_text(text)
    fails(capsys, "report", "run", words=["run/config.yaml", "not readable as YAML"], run="run")


def test_options_make_no_objects(trap, tiny, capsys):  # noqa: F811
    for option in ("--label-map", "--templates", "--seed", "--trackers", "--learning-rate"):
        fails(capsys, *train(tiny, option, trap.yaml), words=[option[2:].replace("-", "_"), "python/object"])
    fails(capsys, "evaluate", tiny / "policy", pictures(Path("photos")), "--label-map", trap.yaml, words=["label_map", "python/object"])


# ---- data

FORMULAS = ("=cmd|' '!A0", "+1+1", "@SUM(1)", '=HYPERLINK("http x","y")', "{{ 7*7 }}", "$(touch sprung)", "`touch sprung`")


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_formulas_in_a_table_are_text(trap, kind):
    rows = [{"image": f"{formula}.png", "label": "fear"} for formula in FORMULAS]
    for row in rows: Image.new("RGB", (8, 8)).save(row["image"])
    def written(rows) -> Path:
        quoted = lambda text: '"' + text.replace('"', '""') + '"'
        text = "\n".join(map(json.dumps, rows)) if kind == "jsonl" else "\n".join(["image,label", *(f"{quoted(r['image'])},{quoted(r['label'])}" for r in rows)])
        Path(f"rows.{kind}").write_text(text + "\n")
        return Path(f"rows.{kind}")
    found = load_examples(written(rows), EMOSET8)
    assert [x.id for x in found] == [r["image"] for r in rows] and all(x.load_image().size == (8, 8) for x in found)
    for formula in FORMULAS:
        with pytest.raises(DataError, match="is not in emoset8") as caught: load_examples(written([rows[0] | {"label": formula}]), EMOSET8)
        assert formula in str(caught.value)


@pytest.fixture
def hub_free(folder, monkeypatch):  # noqa: F811
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
    datasets.disable_progress_bars()
    return datasets


def test_a_data_set_s_loading_script_is_not_run(trap, hub_free, monkeypatch):
    pixels = pictures(Path("photos"))
    rows = {"image": [{"bytes": (pixels / label / "0.png").read_bytes(), "path": None} for label in ("fear", "awe")], "label": ["fear", "awe"]}
    Path("emo").mkdir()
    hub_free.Dataset.from_dict(rows, hub_free.Features(image=hub_free.Image(), label=hub_free.Value("string"))).to_parquet("emo/train.parquet")
    Path("parquet.py").write_text(trap.module)  # of the name that datasets is asked to load by
    for source in ("emo", "emo/train.parquet"): assert [x.label for x in load_examples(source, EMOSET8)] == ["fear", "awe"]
    Path("emo/emo.py").write_text(trap.module)
    monkeypatch.setenv("HF_DATASETS_TRUST_REMOTE_CODE", "1")
    with pytest.raises(DataError, match="scripts are no longer supported"): load_examples("emo", EMOSET8)
    with pytest.raises(DataError, match="a file of kind '.py'"): load_examples("emo/emo.py", EMOSET8)
    Path("emo/train.parquet").unlink()
    with pytest.raises(DataError, match="no examples found"): load_examples("emo", EMOSET8)


def test_a_data_set_s_card_makes_no_objects(trap, hub_free):
    Path("emo").mkdir()
    hub_free.Dataset.from_dict({"image": ["a.png"], "label": ["fear"]}).to_parquet("emo/train.parquet")
    Path("emo/README.md").write_text(f"---\nconfigs: {trap.yaml}\n---\n")
    with pytest.raises(DataError, match="python/object"): load_examples("emo", EMOSET8)


# ---- pictures that are programs

POSTSCRIPT = "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n(anything) run\n%%EOF\n"


@pytest.fixture
def ghostscript(trap, folder, monkeypatch):  # noqa: F811
    "A Ghostscript that is a trap: Pillow would hand PostScript to it."
    Path("bin").mkdir()
    Path("bin/gs").write_text(trap.program)
    Path("bin/gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    return trap


def test_ghostscript_is_a_real_trap(ghostscript):
    Path("x.png").write_text(POSTSCRIPT)
    with pytest.raises(Exception), Image.open("x.png") as picture: picture.load()
    assert ghostscript.sprung
    ghostscript.mark.unlink()


def test_a_picture_that_is_postscript(ghostscript, tiny, capsys):  # noqa: F811
    pixels = pictures(Path("photos/train"))
    (pixels / "fear/0.png").write_text(POSTSCRIPT)
    fails(capsys, "predict", pixels / "fear/0.png", "--policy", tiny / "policy", words=["fear/0.png", "not a picture"])
    with pytest.raises(DataError, match="not a picture"): load_examples(pixels, EMOSET8)[2].load_image()


def test_a_sample_that_is_postscript(ghostscript, capsys):
    for picture in (make_run(Path("run"), steps=2, G=2, samples=(2,)) / "samples").glob("*.png"): picture.write_text(POSTSCRIPT)
    run_main(capsys, "report", "run")
    sprung = ghostscript.sprung
    ghostscript.mark.unlink(missing_ok=True)
    assert not sprung


def test_a_sample_that_names_a_picture_outside_its_run(folder, capsys):  # noqa: F811
    Image.new("RGB", (8, 8), (1, 2, 3)).save("private.png")
    run = make_run(Path("run"), steps=2, G=2, samples=(2,))
    sample = json.loads((run / "samples/step_00002.json").read_text())
    for record, name in zip(sample["groups"], (str(folder / "private.png"), "../../private.png")): record["picture"] = name
    (run / "samples/step_00002.json").write_text(json.dumps(sample))
    assert run_main(capsys, "report", "run")[0] == 0
    assert Page(Path("run/report.html").read_text()).tags.count("img") == 0


# ---- 2. the report: text stays text

def words(name: str) -> str:
    "What somebody would write to take a page over, with a name to find it by."
    return (f"[{name}]<script>window.hacked=1</script>\"><img src=x onerror=window.hacked=1>'><svg onload=window.hacked=1></svg></script></style></title></pre>"
            f"<a href=\"javascript:window.hacked=1\">{name}</a><iframe srcdoc='<script>parent.hacked=1</script>'></iframe>--></textarea>")


def planted_sample(sample: dict) -> dict:
    "A sample in which every text is hostile; the first completion is well formed, the second is not. (A text in a number's place is refused.)"
    for g, record in enumerate(sample["groups"]):
        for name in ("id", "label", "question", "picture"): record[name] = words(f"group{g}.{name}")
        record |= {"labels": [words(f"group{g}.labels")], "objects": [words(f"group{g}.objects")]}
        for i, c in enumerate(record["completions"][:2]):
            here = f"group{g}.completion{i}"
            for name in ("text", "answer", "why"): c[name] = words(f"{here}.{name}")
            c |= {"steps": [words(f"{here}.step{k}") for k in (1, 2, 3)], "well_formed": i == 0}
            c["verdict"] |= {name: words(f"{here}.{name}") for name in ("consistency_answer", "coherence_answer", "written")}
            c["rewards"]["extra"] = {words(f"{here}.extra"): 1.0}
        record["completions"][1]["steps"] = [words(f"group{g}.completion1.step1"), None, None]
        record["completions"][1]["text"] = "before " + words(f"group{g}.completion1.step1") + " " + words(f"group{g}.completion1.text")
    return sample


def planted_figures(figures: dict, when: str) -> dict:
    "A domain's figures in which every name is hostile."
    named = {label: words(f"{when}.{label}") for label in [*figures["confusion"]["rows"], *figures["confusion"]["columns"]]}
    confusion = figures["confusion"] | {axis: [named[label] for label in figures["confusion"][axis]] for axis in ("rows", "columns")}
    return figures | {"confusion": confusion, "per_class": {named[label]: v for label, v in figures["per_class"].items()}, "method": words(f"{when}.method"), "mode": words(f"{when}.mode"), "label_set": words(f"{when}.label_set")}


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    "A run's folder that is hostile in every field which a policy, a data set or a configuration can write."
    run = make_run(tmp_path_factory.mktemp("planted") / "run", steps=12, G=3, samples=(4, 12))
    config = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(yaml.safe_dump({name: words(f"config.{name}") for name in config} | {words("config name"): [words("config list")], "templates": {words("config key"): words("config value")}}))
    for path in (run / "samples").glob("*.json"): path.write_text(json.dumps(planted_sample(json.loads(path.read_text()))))
    summary, domain = json.loads((run / "summary.json").read_text()), {d: words(f"domain {d.replace('_', ' ')}") for d in ("in_domain", "style", "unseen_triggers", "faces")}
    for when in ("before", "after"): summary[when] = {domain[d]: planted_figures(figures, when) for d, figures in summary[when].items()}
    summary |= {"comparison": {domain[d]: c for d, c in summary["comparison"].items()}} | {name: words(f"summary.{name}") for name in ("recipe", "method", "seed")} | {words("summary name"): words("summary value")}
    (run / "summary.json").write_text(json.dumps(summary))
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        for name in [n for n in row if n.startswith("eval/")]:
            _, d, rest = name.split("/", 2)
            row[f"eval/{domain[d]}/{rest}"] = row.pop(name)
        row |= {words("metric"): 1.0, "note": words("metric value"), "kl": words("kl")}
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run


SHOWN = [f"group0.completion0.{name}" for name in ("step1", "step2", "step3", "answer", "extra", "consistency_answer", "coherence_answer")] + \
        [f"group0.completion1.{name}" for name in ("step1", "text", "why")] + \
        ["group0.label", "group0.objects", "group1.label", "config.policy", "config.seed", "config.method", "config name", "summary.recipe", "before.fear", "after.unparsed", "domain in domain", "domain faces"]


def test_a_report_shows_hostile_words_as_words(planted, capsys):
    assert run_main(capsys, "report", planted)[:2] == (0, f"{planted / 'report.html'}\n")
    source = (planted / "report.html").read_text()
    page = Page(source).check()  # only our tags, no handlers, no address but data: and #
    assert not {"script", "iframe", "textarea"} & set(page.tags) and not [v for _, k, v in page.attributes if k in ("srcdoc", "action", "formaction", "xlink:href")]
    assert "<script" not in source and "javascript:window.hacked=1</a>" not in source and "onerror=window" not in source.replace("&gt;&lt;img src=x onerror=window", "")
    for name in SHOWN: assert words(name) in page.text, name
    assert json.dumps({words("config key"): words("config value")}, ensure_ascii=False) in page.text
    assert sum("<script>" in (value or "") for _, _, value in page.attributes) > 10  # titles and labels hold them too, and Page found them whole


def test_the_same_words_unescaped_would_be_found():
    with pytest.raises(AssertionError): Page(f"<p>{words('x')}</p>").check()
    assert "script" in json.dumps(words("x"))


PROBE = """<script>addEventListener("load", () => {
    document.querySelectorAll("a").forEach(a => a.click());
    setTimeout(() => { document.body.dataset.hacked = String(window.hacked); document.body.dataset.seen = document.body.innerText.split("<script>").length - 1; }, 200);
});</script>"""


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine (Debian and Ubuntu: apt-get install chromium)")
def test_a_browser_shows_hostile_words_and_obeys_none(planted, tmp_path):
    source = RunReport(planted).html()
    def found(name: str, page: str) -> dict:
        (tmp_path / f"{name}.html").write_text(page)
        dom = browser(tmp_path, "--virtual-time-budget=3000", "--dump-dom", (tmp_path / f"{name}.html").as_uri()).stdout
        return {key: value for tag, key, value in Page(dom).attributes if tag == "body"}
    unlocked = source.replace('http-equiv="Content-Security-Policy"', 'name="nothing"').replace("</html>", PROBE + "</html>")  # so that a probe of ours can run, and theirs could
    shown = found("unlocked", unlocked)
    assert shown["data-hacked"] == "undefined" and int(shown["data-seen"]) >= 20
    assert found("spoiled", unlocked.replace("<main>", "<main>" + words("raw"), 1))["data-hacked"] == "1"  # the probe would have seen it
    locked = found("locked", source.replace("<main>", '<main><script>document.body.dataset.hacked = "1"</script>', 1))
    assert "data-hacked" not in locked and locked["class"] == "emo page"  # and were a word ever to slip through, the page's own policy stops it


# ---- 3. secrets

SECRETS = {name: f"CANARY/{name.lower().replace('_', '-')}+{random.Random(name).randrange(10**12)}&'x'" for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "OPENAI_API_KEY", "AWS_SECRET_ACCESS_KEY", "MY_SERVICE_PASSWORD")}


def disguises(secret: str) -> dict[str, bytes]:
    "Everything that a secret may look like in a file."
    raw = secret.encode()
    shifted = {f"base64 after {k}": base64.b64encode(b"\0" * k + raw)[4 if k else 0: -4] for k in range(3)}  # inside a longer text: without the characters that its neighbours share
    return {"raw": raw, "html": html.escape(secret).encode(), "json": json.dumps(secret)[1:-1].encode(), "yaml": secret.replace("'", "''").encode(), "url": quote(secret, safe="").encode(), "form": quote_plus(secret).encode(), "url path": quote(secret).encode(),
            "hex": raw.hex().encode(), "utf-16": secret.encode("utf-16-le"), **shifted, **{f"url-safe {k}": v.replace(b"+", b"-").replace(b"/", b"_") for k, v in shifted.items()}}


def leaks(text: bytes) -> list[str]:
    "Which secrets a text holds, and how."
    return [f"{name} as {how}" for name, secret in SECRETS.items() for how, form in disguises(secret).items() if form in text]


def leaks_in(root: Path) -> list[str]: return [f"{path.relative_to(root)}: {leak}" for path in sorted(root.rglob("*")) if path.is_file() for leak in leaks(path.read_bytes() + str(path).encode())]


@pytest.mark.parametrize("how", list(disguises("x")))
def test_the_search_finds_every_disguise(how):
    secret = SECRETS["OPENAI_API_KEY"]
    wrapped = {"base64": lambda k: base64.b64encode(b"q" * k + secret.encode() + b" and more text"), "url-safe base64": lambda k: base64.urlsafe_b64encode(b"q" * k + secret.encode() + b" and more text")}
    kind, _, k = how.partition(" after ")
    text = wrapped[kind](int(k)) if k else disguises(secret)[how]
    assert any(leak.startswith("OPENAI_API_KEY as") for leak in leaks(b"before " + text + b" after")) and leaks(b"nothing here") == []


COMMANDS = """
import os, sys, traceback
import emo_r3.sampling
from emo_r3.cli import main
def ended(*argv):
    try: print("exit code", main(["train", *sys.argv[1:], *argv]), flush=True)
    except BaseException: traceback.print_exc()
ended("--output-dir", "out/good")
os.environ["EMO_R3_DEBUG"] = "1"
ended("--output-dir", "out/no_policy", "--policy", "./cut")
def score(*args, **options): raise ConnectionError("the judge's service answered 401")
emo_r3.sampling.PolicyJudge.score = score
ended("--output-dir", "out/no_judge", "--policy", "embedded", "--max-completion-tokens", "64")  # whose completions are worth asking about
"""


def test_no_secret_is_written_anywhere(folder, tiny):  # noqa: F811
    shutil.copytree(tiny / "policy", "cut")
    Path("cut/model.safetensors").write_bytes(Path("cut/model.safetensors").read_bytes()[:999])
    argv, places = [sys.executable, "-c", COMMANDS, str(tiny / "tiny.yaml"), "--save-every", "1", "--trackers", "tensorboard"], {"HOME": str(folder / "home"), "HF_HOME": str(folder / "home/hf")}
    done = subprocess.run(argv, capture_output=True, timeout=300, env=os.environ | SECRETS | places)
    said = done.stdout + done.stderr
    assert done.stdout.count(b"exit code") == done.stdout.count(b"exit code 0") == 1 and b"damaged" in said and b"answered 401" in said and done.stderr.count(b"Traceback (most recent call last)") >= 2, said.decode()[-2000:]
    written = {p.name for p in Path("out/good").rglob("*")}
    assert {"config.yaml", "metrics.jsonl", "summary.json", "report.html", "state.json", "step_00001.json"} <= written and any("tfevents" in name for name in written) and Path("out/no_judge/config.yaml").is_file()
    assert leaks(said) == [] and leaks_in(Path()) == []


def test_a_planted_secret_is_found_wherever_a_configuration_goes(folder, tiny, capsys):  # noqa: F811
    template = "{question} <think></think> \\boxed{} " + SECRETS["MY_SERVICE_PASSWORD"]
    assert run_main(capsys, *train(tiny, "--save-every", "1", "--max-steps", "1", "--trackers", "tensorboard", "--templates", json.dumps({"think": template})))[0] == 0
    found = {leak.split(": ")[0] for leak in leaks_in(Path("out"))}
    assert {"config.yaml", "report.html", "checkpoints/step_000001/state.json"} <= found and any("tfevents" in name for name in found)
    assert all("MY_SERVICE_PASSWORD" in leak for leak in leaks_in(Path("out")))


# ---- 4. no name leads out of the run's folder

NAMES = ("../../escape", "../../../../../../tmp/escape", "/escape", "a\nb", "nul\0name", "..", ".", "C:\\escape", "..\\escape", "-rf", "~", "$HOME", "x" * 5000, "<b>", "\x1b[31mred", "\u202egnp.exe")


def tree(root: Path) -> dict[str, str]: return {str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest() if p.is_file() else "" for p in root.rglob("*")}


def trained_on(names, tiny, out: Path) -> None:  # noqa: F811
    "A run on pictures of these names, its samples, checkpoints and report."
    from emo_r3.policy import load_policy, load_processor
    from emo_r3.config import make_config
    from emo_r3.train import train as train_api
    examples = [EmotionExample(Image.new("RGB", (32, 32)), "Which?", "fear", EMOTION6, id=name, domain=name) for name in names]
    config = make_config(yaml.safe_load((tiny / "tiny.yaml").read_text()) | dict(label_set="emotion6", train_size=len(names), prompts_per_step=2, max_steps=len(names) // 2, save_every=1, trackers=["tensorboard"]))
    figures = {name: {"accuracy": 0.5, "n": 2} for name in names}
    train_api(config, load_policy(tiny / "policy"), load_processor(tiny / "policy"), examples, out, evaluate=lambda model, when: figures, recipe=names[0])
    RunReport(out).write()


def test_no_id_leads_out_of_the_run_s_folder(folder, tiny):  # noqa: F811
    Path("deep/er/still").mkdir(parents=True)
    Path("deep/mine").write_text("mine")
    outside = lambda: {name: content for name, content in tree(folder).items() if not name.startswith("deep/er/still/run")}
    before, tmp = outside(), set(os.listdir("/")) | set(os.listdir("/tmp"))
    run = Path("deep/er/still/run")
    trained_on(NAMES, tiny, run)
    assert outside() == before and not {name for name in (set(os.listdir("/")) | set(os.listdir("/tmp"))) - tmp if "escape" in name}
    assert sorted(p.name for p in run.iterdir() if p.name != ".lock") == ["checkpoints", "config.yaml", "metrics.jsonl", "policy", "report.html", "samples", "summary.json", "tracking"]
    assert all(re.fullmatch(r"step_\d{5}(_\d\.png|\.json)", p.name) for p in (run / "samples").iterdir())
    kept = {record["id"] for p in (run / "samples").glob("*.json") for record in json.loads(p.read_text())["groups"]}
    assert kept == set(NAMES)


def test_a_file_name_that_is_not_utf_8(folder, tiny):  # noqa: F811
    trained_on([os.fsdecode(b"\xff.png"), os.fsdecode(b"caf\xe9.png")], tiny, Path("run"))


def test_a_quarantine_is_one_file_and_one_line_each(folder):  # noqa: F811
    aside = [SetAside(name, name, name) for name in NAMES]
    assert write_quarantine(Path("run.jsonl"), aside) == Path("run.jsonl") and os.listdir() == ["run.jsonl"]
    assert [json.loads(line)["id"] for line in Path("run.jsonl").read_text().splitlines()] == list(NAMES)


@pytest.mark.parametrize("name", ["...yaml", "..\\..\\x.yaml", "a\nb.yaml", "-rf.yaml", "~.yaml", "x.y.yaml", "\x1b[31m.yaml"])
def test_no_recipe_s_name_leads_out_of_runs(folder, tiny, name, monkeypatch, capsys):  # noqa: F811
    Path(name).write_text((tiny / "tiny.yaml").read_text())
    went = []
    monkeypatch.setattr(cli, "run", lambda config, output_dir, *rest: went.append(Path(output_dir)) or Path("x"))
    assert cli.main(["train", f"./{name}"]) == 0
    assert went[0].parent == Path("runs") and went[0].name not in ("", ".", "..")
