"""What `emo-r3 export` writes is loaded by plain transformers in a process without emo_r3, and says the same there; the model card says what is known, and no more; what cannot be exported is refused, and nothing is left behind."""
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from policies import processor

import emo_r3.export as export
from emo_r3.checkpoint import DamagedCheckpoint
from emo_r3.cli import main
from emo_r3.evaluate import wilson_interval
from emo_r3.export import Probe, Source, export_policy, find_source, merged, model_card
from emo_r3.policy import add_lora, completion_logps, encode_prompts, load_policy, save_policy
from emo_r3.prompts import set_messages
from emo_r3.scenes import make_scenes
from emo_r3.config import make_config
from emo_r3.train import train

SMALL = make_config(dict(policy="embedded", train_size=8, prompts_per_step=4, prompts_per_update=4, num_generations=4, max_completion_tokens=56, learning_rate=1e-3, freeze_vision=True, precision="fp32", min_pixels=None, max_pixels=None,
                         eval_every=1, sample_every=0, save_every=1, max_steps=2, trackers=()))
ADAPTERS = {"lora": dict(lora_rank=8), "four_bit": dict(lora_rank=8, four_bit=True), "bf16": dict(lora_rank=8, precision="bf16")}
RIGHT = {"before": 20, "during": 25, "after": 31}


def look(model, when): return {"in_domain": {"accuracy": RIGHT[when] / 40, "n": 40, "ci95": list(wilson_interval(RIGHT[when], 40))}}


def go(folder, evaluate=look, **changes):
    config = replace(SMALL, **changes)
    policy = load_policy(four_bit=config.four_bit, dtype="bfloat16" if config.lora_rank and config.precision == "bf16" else "float32")
    if config.lora_rank: policy = add_lora(policy, config.lora_rank, config.lora_alpha, seed=1)
    compared = lambda: {"comparison": {"in_domain": {"n": 40, "gained": 15, "lost": 4, "difference": 11 / 40, "ci95": [0.07, 0.46], "p_value": 0.019}}}
    train(config, policy, processor(), make_scenes("in_domain", "train", 8, seed=3), folder, evaluate=evaluate, recipe="small", conclude=compared if evaluate else None)
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    "Runs by kind, made when they are first asked for."
    root, made = tmp_path_factory.mktemp("runs"), {}
    def of(kind):
        if kind not in made: made[kind] = go(root / kind, **{"full": {}, "unlooked": dict(evaluate=None, report="last"), **ADAPTERS}[kind])
        return made[kind]
    return of


@pytest.fixture(scope="module")
def base(tmp_path_factory): return save_policy(load_policy(), processor(), tmp_path_factory.mktemp("base") / "Small-VL")


PLAIN = """
import json, sys
sys.modules["emo_r3"] = None  # an import of it fails
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoTokenizer, GenerationConfig
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
folder, picture, base, said = sys.argv[1], sys.argv[2], sys.argv[3], sys.argv[4]
if base:
    from peft import PeftModel
    from transformers import BitsAndBytesConfig
    held = {"quantization_config": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype="float32", llm_int8_skip_modules=["model.visual", "lm_head"])} if "four_bit" in base else {}
    model = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(base.split("|")[0], dtype="float32", **held), folder)
    for layer in model.modules():  # with it, bitsandbytes computes in half precision on some CPUs
        if hasattr(layer, "support_avx512bf16_for_cpu"): layer.support_avx512bf16_for_cpu = False
else:
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto")
    GenerationConfig.from_pretrained(folder)
tokenizer, images = AutoTokenizer.from_pretrained(folder), Qwen2VLImageProcessorPil.from_pretrained(folder)
seen = images(images=[Image.open(picture).convert("RGB")], return_tensors="pt")
n = int(seen["image_grid_thw"].prod()) // images.merge_size**2
text = tokenizer.apply_chat_template([{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Which emotion?"}]}], tokenize=False, add_generation_prompt=True).replace("<|image_pad|>", "<|image_pad|>" * n)
prompt, answer = (tokenizer(t, add_special_tokens=False, return_tensors="pt").input_ids for t in (text, said))
ids = torch.cat([prompt, answer], 1)
with torch.no_grad(): logits = model.eval()(input_ids=ids, mm_token_type_ids=(ids == tokenizer.convert_tokens_to_ids("<|image_pad|>")).long(), **seen).logits.float()
banned = [tokenizer.convert_tokens_to_ids(t) for t in ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")]
logits[..., banned] = float("-inf")
print(json.dumps(logits.log_softmax(-1)[0, prompt.shape[1] - 1: -1].gather(1, answer[0, :, None])[:, 0].tolist()))
"""
SAID = "A ghost stands out. \\boxed{fear}<|im_end|>"


def plainly(folder, tmp_path, base=""):
    "Log-probabilities of a sentence about a picture, by a process that has never heard of emo_r3."
    picture = tmp_path / "picture.png"
    make_scenes("in_domain", "train", 1)[0].load_image().save(picture)
    done = subprocess.run([sys.executable, "-c", PLAIN, str(folder), str(picture), base, SAID], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    return torch.tensor(json.loads(done.stdout.splitlines()[-1]))


def ours(policy):
    answer = torch.tensor([processor().tokenizer.encode(SAID, add_special_tokens=False)])
    ask = [{"role": "user", "content": [{"type": "image", "image": make_scenes("in_domain", "train", 1)[0].load_image()}, {"type": "text", "text": "Which emotion?"}]}]
    with torch.no_grad(): return completion_logps(policy, encode_prompts(processor(), [ask]).padded(), answer, torch.ones_like(answer))[0]


def card(folder):
    "The header, and the text."
    _, head, text = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    return yaml.safe_load(head), text


def nothing_of(path, folder):
    "Nothing in a folder names a path of this machine."
    for file in folder.rglob("*"):
        if file.suffix in (".json", ".md", ".jinja"): assert str(path) not in file.read_text(encoding="utf-8"), file


# ---- full weights

def test_a_run_says_the_same_in_plain_transformers(runs, tmp_path):
    made = export_policy(runs("full"), tmp_path / "out")
    assert (plainly(made.folder, tmp_path) - ours(load_policy(runs("full") / "policy"))).abs().max() < 1e-5
    assert (plainly(made.folder, tmp_path) - ours(load_policy())).abs().max() > 1e-3  # it has learned: the base says otherwise
    assert made.kind == "weights" and made.checks["this folder"].largest == 0 and made.checks["this folder"].same == made.checks["this folder"].n == 8
    assert {p.name for p in made.folder.iterdir()} == {"README.md", "config.json", "generation_config.json", "model.safetensors", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    pictures = json.loads((made.folder / "preprocessor_config.json").read_text())
    assert (pictures["image_processor_type"], pictures["processor_class"]) == ("Qwen2VLImageProcessor", "Qwen2_5_VLProcessor")
    nothing_of(tmp_path.parent, made.folder)


def test_the_card_tells_the_run_s_figures(runs, tmp_path):
    head, text = card(export_policy(runs("full"), tmp_path / "out").folder)
    assert head == {"library_name": "transformers", "pipeline_tag": "image-text-to-text", "tags": ["emo-r3", "emotion-recognition", "emo_r3"]}
    assert "| in_domain | 50.0 [35.2, 64.8], n = 40 | 77.5 [62.5, 87.7], n = 40 | +27.5 [+7.0, +46.0], p = 0.019 |" in text
    for said in ("recipe: small", "method: emo_r3, preset paper", "what learned: all weights but the vision tower's", "data: scenes, label set emoset8", "steps: 2 of 4 pictures with 4 completions each", "seed: 1", "Which emotion does this picture evoke?", "transformers: ", "Limits"): assert said in text
    assert "THIS_FOLDER" in text and "PeftModel" not in text


@pytest.mark.slow
def test_half_precision_and_shards(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "_SHARD", "2MB")
    made = export_policy(runs("full"), tmp_path / "out", dtype="bf16")
    assert len(list(made.folder.glob("model-*.safetensors"))) > 1 and (made.folder / "model.safetensors.index.json").is_file()
    assert 0 < made.checks["this folder"].mean < 0.05 and "Weights in bf16" in card(made.folder)[1] and next(load_policy(made.folder, "bfloat16").parameters()).dtype == torch.bfloat16
    assert (plainly(made.folder, tmp_path) - ours(load_policy(runs("full") / "policy"))).abs().max() < 0.3


def test_a_checkpoint_in_the_middle_knows_what_came_before_it(runs, tmp_path):
    middle = runs("full") / "checkpoints" / "step_000001"
    made = export_policy(middle, tmp_path / "out")
    _, text = card(made.folder)
    assert "| in_domain | 50.0 [35.2, 64.8], n = 40 | not measured | - |" in text and "77.5" not in text
    assert "after step 1: in_domain 62.5 %" in text and "steps: 1 of 4" in text
    assert (plainly(made.folder, tmp_path) - ours(load_policy(middle / "policy"))).abs().max() < 1e-5
    assert (ours(load_policy(middle / "policy")) - ours(load_policy(runs("full") / "policy"))).abs().max() > 1e-4
    last = find_source(runs("full") / "checkpoints" / "step_000002")
    assert last.summary["after"] and find_source(middle / "policy").step == 1  # the last one is what the summary speaks of


@pytest.mark.slow
def test_a_run_that_is_not_finished_gives_its_newest_whole_checkpoint(tmp_path):
    folder = go(tmp_path / "run")
    (folder / "summary.json").unlink()
    assert find_source(folder).step == 2
    weights = folder / "checkpoints" / "step_000002" / "policy" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    assert find_source(folder).step == 1 and (folder / "checkpoints" / "step_000002").is_dir()  # left as it is: somebody may look at it
    with pytest.raises(DamagedCheckpoint, match="model.safetensors has .* bytes"): export_policy(folder / "checkpoints" / "step_000002", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_run_without_evaluation_says_so(runs, tmp_path):
    _, text = card(export_policy(runs("unlooked"), tmp_path / "out").folder)
    assert "The run was not evaluated on test pictures." in text and "| in_domain" not in text


def test_a_run_whose_filter_found_nothing_says_so(tmp_path):
    "DAPO's end: no group passes, not even in the first step."
    folder = go(tmp_path / "run", filter_key="overall", filter_low=5.0, filter_high=6.0, max_refills=2)
    made = export_policy(folder, tmp_path / "out")
    _, text = card(made.folder)
    assert "ended early: the filter kept too few groups (depleted after step 0, 0 % kept, " in text and "steps: 0 of 4" in text
    assert made.checks["this folder"].largest == 0


@pytest.mark.slow
def test_a_policy_alone_says_that_it_knows_nothing(tmp_path, base):
    made = export_policy(base, tmp_path / "out")
    head, text = card(made.folder)
    assert "its run is not known" in text and "Which prompt the policy was trained with is not known here." in text and "Nothing is known here about how this policy was measured." in text
    assert (plainly(made.folder, tmp_path) - ours(load_policy())).abs().max() < 1e-5


# ---- adapters

@pytest.mark.parametrize("kind", ["lora", "four_bit"])
def test_a_kept_adapter_says_the_same_on_its_base(runs, tmp_path, base, kind):
    made = export_policy(runs(kind), tmp_path / "out", base=str(base))
    head, text = card(made.folder)
    assert made.kind == "adapter" and head["library_name"] == "peft" and "lora" in head["tags"] and "PeftModel" in text and ("BitsAndBytesConfig" in text) == (kind == "four_bit")
    there = plainly(made.folder, tmp_path, f"{base}|{kind}")
    assert (there - ours(load_policy(runs(kind) / "policy"))).abs().max() < 1e-5 and (there - ours(load_policy(four_bit=kind == "four_bit"))).abs().max() > 1e-3
    assert made.checks["this folder"].largest < 1e-5
    assert [name for name in made.checks if "full precision" in name] == (["the same adapter on its base in full precision, not in the four bits that it was trained on"] if kind == "four_bit" else [])
    if kind == "four_bit": assert made.checks[next(n for n in made.checks if "full precision" in n)].mean > 1e-3
    assert str(base.parent) not in text  # the card calls the base by its name alone


@pytest.mark.slow
def test_an_adapter_s_base_gets_the_name_that_others_know(runs, tmp_path):
    made = export_policy(runs("lora"), tmp_path / "out", base="someone/Small-VL")
    assert json.loads((made.folder / "adapter_config.json").read_text())["base_model_name_or_path"] == "someone/Small-VL"
    head, text = card(made.folder)
    assert head["base_model"] == "someone/Small-VL" and "vllm serve someone/Small-VL --enable-lora" in text
    nothing_of(tmp_path.parent, made.folder)


def test_merging_agrees_with_the_adapter(runs, tmp_path):
    made = export_policy(runs("lora"), tmp_path / "out", merge="full")
    assert made.kind == "weights" and made.checks["this folder"].largest < 1e-4 and made.checks["this folder"].same == 8
    assert (plainly(made.folder, tmp_path) - ours(load_policy(runs("lora") / "policy"))).abs().max() < 1e-5
    assert not list(made.folder.glob("adapter*")) and "a trained adapter merged" in card(made.folder)[1]


def test_merging_four_bits_both_ways(runs, tmp_path):
    "Onto the dequantised weights it is what was trained; onto the base's own it is not, and the folder says by how much. By hand: W + alpha / r B A, one layer."
    trained = load_policy(runs("four_bit") / "policy")
    full, written = (export_policy(runs("four_bit"), tmp_path / onto, merge=onto) for onto in ("full", "dequantised"))
    assert written.checks["this folder"].largest < 1e-4 and written.checks["this folder"].same == 8 and full.checks["this folder"].mean > 100 * written.checks["this folder"].mean
    assert (plainly(written.folder, tmp_path) - ours(trained)).abs().max() < 1e-4 < (plainly(full.folder, tmp_path) - ours(trained)).abs().max()
    layer = "model.language_model.layers.1.mlp.up_proj"
    lora = trained.get_base_model().get_submodule(layer)
    change = 32.0 / 8 * lora.lora_B["default"].weight @ lora.lora_A["default"].weight
    torch.testing.assert_close(load_policy(full.folder).get_submodule(layer).weight, load_policy().get_submodule(layer).weight + change, rtol=0, atol=1e-6)
    assert change.abs().max() > 1e-4 and "not quite the same: see the check" in card(full.folder)[1] and "the policy that was measured" in card(written.folder)[1]
    four_bits_alone = load_policy(written.folder).get_submodule(layer).weight - change
    assert len((four_bits_alone.flatten()[:64] / four_bits_alone.flatten()[:64].abs().max()).round(decimals=4).unique()) <= 16  # a block of 64 has at most 16 values


@pytest.mark.slow
def test_weights_held_in_half_precision_are_written_so(runs, tmp_path):
    "Merged in single precision and rounded once; asked for fp32, not rounded."
    half, whole = export_policy(runs("bf16"), tmp_path / "half", merge="full"), export_policy(runs("bf16"), tmp_path / "whole", merge="full", dtype="fp32")
    assert json.loads((half.folder / "config.json").read_text())["dtype"] == "bfloat16" and json.loads((whole.folder / "config.json").read_text())["dtype"] == "float32"
    assert 1.8 < (whole.folder / "model.safetensors").stat().st_size / (half.folder / "model.safetensors").stat().st_size < 2.2
    assert load_policy(half.folder, "bfloat16").device.type == "cpu"


def on_a_folder(runs, base, tmp_path):
    "A policy's folder whose adapter was trained on a folder of this machine."
    from shutil import copytree
    policy = copytree(runs("lora") / "policy", tmp_path / "trained")
    said = json.loads((policy / "adapter_config.json").read_text())
    (policy / "adapter_config.json").write_text(json.dumps(said | {"base_model_name_or_path": str(base)}))
    return policy


def test_a_folder_of_this_machine_is_not_handed_on(runs, tmp_path, base, monkeypatch, capsys):
    "Neither as the base of an adapter, however the folder is written, nor in what is merged."
    policy, out = on_a_folder(runs, base, tmp_path), tmp_path / "out"
    monkeypatch.chdir(base.parent)
    for called in (str(base), f"./{base.name}", base.name, f"../{base.parent.name}/{base.name}"):
        export._call_base(policy, called)
        with pytest.raises(ValueError, match=r"an adapter on .*, a folder of this machine, which the exported one would name; allowed: --base with the hub id .*, or --merge"): export_policy(policy, out)
        assert not out.exists()
    export._call_base(policy, str(base))
    made = export_policy(policy, out, base="someone/Small-VL")
    assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == "someone/Small-VL" and made.note == "" and made.checks["this folder"].largest < 1e-5
    made = export_policy(policy, tmp_path / "merged", merge="full")
    for folder in (out, tmp_path / "merged"):
        nothing_of(base.parent, folder), nothing_of(tmp_path, folder), nothing_of(export.__file__.rpartition("/")[0], folder)
    assert main(["export", str(policy), "--output", str(tmp_path / "here"), "--base", str(base)]) == 0
    assert f"adapter_config.json calls the base {str(base)!r}, a folder: before you pass it on" in capsys.readouterr().out


# ---- what is refused

@pytest.mark.parametrize("kind, options, says", [
    ("full", dict(merge="full"), "merge = 'full': .* holds full weights; allowed: without it"), ("lora", {}, "an adapter on 'embedded', a base that only emo_r3 knows by this name; allowed: --merge, or --base"), ("lora", dict(merge="half"), "merge.*'half'.*full, dequantised"),
    ("full", dict(dtype="fp16"), "dtype.*'fp16'.*fp32, bf16"), ("lora", dict(dtype="bf16", base="x/y"), "dtype = 'bf16': an adapter is kept as it is"), ("full", dict(base="x/y"), "base = 'x/y': there will be no adapter"), ("lora", dict(base="x/y", merge="full"), "base = 'x/y': there will be no adapter")])
def test_options_that_exclude_each_other(runs, tmp_path, kind, options, says):
    with pytest.raises(ValueError, match=says): export_policy(runs(kind), tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten_and_nothing_left_behind(runs, tmp_path, monkeypatch, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="output .*full' is not empty; allowed: a new or empty folder"): export_policy(runs("full"), tmp_path / "full")
    with pytest.raises(ValueError, match="output .*file' is a file"): export_policy(runs("full"), tmp_path / "file")
    def broken(*args): raise OSError(28, "No space left on device", "model.safetensors")
    monkeypatch.setattr(export, "model_card", broken)
    assert main(["export", str(runs("full")), "--output", str(tmp_path / "out")]) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "full"] and [p.name for p in (tmp_path / "full").iterdir()] == ["mine.txt"]
    monkeypatch.undo()
    (tmp_path / "empty").mkdir()
    assert export_policy(runs("full"), tmp_path / "empty").folder.is_dir()


def test_a_folder_that_says_something_else_never_appears_unnoticed(runs, tmp_path, monkeypatch):
    "The check compares what lies in the folder with what was trained: weights that were mixed up on the way show."
    real = export.merged
    def wrong(policy, onto="full"):
        model = real(policy, onto)
        with torch.no_grad(): model.model.language_model.layers[0].mlp.up_proj.weight.mul_(1.2)
        return model
    monkeypatch.setattr(export, "merged", wrong)
    found = export_policy(runs("lora"), tmp_path / "out", merge="full").checks["this folder"]
    assert found.mean > 1e-3 and f"{found.mean:.1e}" in card(tmp_path / "out")[1]


@pytest.mark.parametrize("make, says", [(lambda d: d / "nowhere", "no such folder; allowed: a run's folder"), (lambda d: d, "holds nothing; allowed: a run's folder"), (lambda d: (d / "checkpoints").mkdir() or d, "is not finished, and it holds no checkpoint that is whole")])
def test_folders_without_a_policy(tmp_path, make, says):
    (tmp_path / "source").mkdir()
    with pytest.raises((ValueError, OSError), match=says): find_source(make(tmp_path / "source"))


def test_the_command(runs, tmp_path, capsys):
    assert main(["export", str(runs("lora")), "--output", str(tmp_path / "out"), "--merge", "--dtype", "bf16"]) == 0
    said = capsys.readouterr().out
    assert f"{tmp_path / 'out'}: all weights, " in said and "this folder: log-probabilities of" in said and (tmp_path / "out" / "README.md").is_file()
    assert main(["export", str(runs("lora")), "--output", str(tmp_path / "out"), "--merge"]) == 2
    assert "is not empty" in capsys.readouterr().err


def test_a_probe_notices_nothing_where_nothing_changed(tmp_path):
    probe = Probe(load_policy(), processor(), n=3)
    same = probe.compare(load_policy())
    assert (same.mean, same.largest, same.same, same.n) == (0, 0, 3, 3) and same.tokens == int(probe.said.completion_mask.sum()) > 30
    other = add_lora(load_policy(), 4, 8.0)
    assert probe.compare(merged(other)).largest < 1e-5  # a fresh adapter changes nothing
    with torch.no_grad():
        for name, p in other.named_parameters():
            if "lora_B" in name: p.fill_(0.05)
    assert probe.compare(merged(other)).mean > 1e-3


def test_a_card_stays_a_card_whatever_a_run_s_files_say():
    "Names of libraries, of domains, and the commit come from files that may have been downloaded."
    evil = "x\n# Owned | cell\n"
    source = Source(Path("p"), None, {"commit": evil, "before": {evil: {"accuracy": 0.5, "n": 4, "ci95": [0.1, 0.9]}}, "after": {evil: {"accuracy": 0.5, "n": 4, "ci95": [0.1, 0.9]}}}, 3, {}, None, {evil: evil})
    card = model_card(source, "weights", "Qwen/Qwen2.5-VL-3B-Instruct", None, False, "float32", {})
    assert "\n# Owned" not in card and "Owned \\| cell" in card
    assert "base_model: runs" not in model_card(replace(source, summary={}), "weights", "a/b/c", None, False, "float32", {})


def test_an_exported_adapter_is_served_with_room_for_its_rank():
    card = model_card(Source(Path("p"), None, {}, 3, {}, None, {"torch": "1"}), "adapter", "Qwen/Qwen2.5-VL-3B-Instruct", None, False, "float32", {}, 64)
    assert "vllm serve Qwen/Qwen2.5-VL-3B-Instruct --enable-lora --max-lora-rank 64 --lora-modules" in card
    card = lambda rank: model_card(Source(Path("p"), None, {"recipe": "/home/me/recipes/mine.yaml"}, 3, {}, None, {"torch": "1"}), "adapter", "Qwen/Qwen2.5-VL-3B-Instruct", None, False, "float32", {}, rank)
    assert "--max-lora-rank 16 " in card(4) and "--max-lora-rank 320 " in card(257)
    assert "vllm serve" not in card(600) and "vLLM has no room for an adapter of rank 600 (at most 512): merge it" in card(600)


def test_a_recipe_of_one_s_own_is_called_by_its_name_alone():
    source = lambda recipe: Source(Path("p"), SMALL, {"recipe": recipe}, 3)
    assert "recipe: mine.yaml" in export.training_lines(source("/home/me/recipes/mine.yaml"))[0] and "recipe: scenes_cpu" in export.training_lines(source("scenes_cpu"))[0]
