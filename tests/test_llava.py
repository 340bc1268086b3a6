"""LLaVA-1.5 by the same calls: loaded, asked and measured as transformers itself would, and never trained; all on a tiny random one."""
import json
import shutil
from pathlib import Path

import llavas
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import LlavaForConditionalGeneration, LlavaProcessor
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from emo_r3.cli import main
from emo_r3.data import EMOTION6
from emo_r3.evaluate import evaluate, label_probabilities, predict
from emo_r3.policy import add_lora, check_trainable, completion_logps, encode_prompts, load_policy, load_processor, reads_once, save_policy
from emo_r3.prompts import EVAL_METHODS, coherence_messages, direct_messages, method_messages, set_messages
from emo_r3.sampling import PolicyJudge, PolicySampler
from emo_r3.scenes import make_scenes

HERE = "<image>"


@pytest.fixture(scope="module")
def saved(tmp_path_factory): return llavas.folder(tmp_path_factory.mktemp("llava") / "policy")


@pytest.fixture(scope="module")
def model(saved): return load_policy(saved)


@pytest.fixture(scope="module")
def processor(saved): return load_processor(saved)


@pytest.fixture
def folder(saved, tmp_path): return Path(shutil.copytree(saved, tmp_path / "policy"))


@pytest.fixture(scope="module")
def asked():
    "Ragged questions about pictures of three shapes, and one without a picture in between."
    out = [set_messages(x.question, x.image.resize(s)) for x, s in zip(make_scenes("in_domain", "train", 3), [(96, 96), (160, 96), (60, 150)])]
    out[2] = direct_messages("Which?", out[2][0]["content"][0]["image"])
    return [out[0], coherence_messages("A ghost stands out.", "A viewer would shiver.", EMOTION6), *out[1:]]


def change(file, **values): file.write_text(json.dumps(json.loads(file.read_text()) | values))


def change_part(file, part, **values): change(file, **{part: json.loads(file.read_text())[part] | values})


# ---- loading

def test_what_is_loaded_is_what_was_saved(saved, model):
    made, plain = llavas.model().state_dict(), LlavaForConditionalGeneration.from_pretrained(saved).state_dict()
    assert set(made) == set(model.state_dict()) == set(plain)
    for name, value in model.state_dict().items(): assert torch.equal(value, made[name]) and torch.equal(value, plain[name]), name
    assert not model.training and not reads_once(model) and reads_once(load_policy())


def test_saved_again_it_is_the_same(model, processor, asked, tmp_path):
    folder = save_policy(model, processor, tmp_path / "again")
    again, words = load_policy(folder), load_processor(folder)
    a, b = encode_prompts(processor, asked).padded(), encode_prompts(words, asked).padded()
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    with torch.no_grad(): assert torch.equal(model(**a).logits, again(**b).logits)
    assert words.tokenizer.chat_template == llavas.TEMPLATE


def test_weights_with_a_tower_s_positions_load(folder, model):
    "Older files also hold what is computed."
    weights = load_file(folder / "model.safetensors")
    name = next(n for n in weights if n.endswith("embeddings.position_embedding.weight"))
    weights[name.replace("position_embedding.weight", "position_ids")] = torch.arange(17)[None]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert torch.equal(load_policy(folder).lm_head.weight, model.lm_head.weight)


@pytest.mark.parametrize("spoil, says", [
    (lambda f: change_part(f / "config.json", "text_config", model_type="qwen2"), "text_config.model_type = 'qwen2' in config.json; allowed in a llava: 'llama'"),
    (lambda f: change_part(f / "config.json", "vision_config", model_type="siglip_vision_model"), "vision_config.model_type = 'siglip_vision_model'"),
    (lambda f: change(f / "config.json", model_type="llava_next"), "model_type = 'llava_next' in config.json; allowed: 'qwen2_5_vl', 'llava'"),
    (lambda f: change_part(f / "config.json", "text_config", quantization_config={"quant_method": "gptq"}), "quantization_config"),
    (lambda f: change(f / "config.json", text_config="x"), "config.json cannot be used"),
    (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "found only the pickle pytorch_model.bin"),
    (lambda f: change_part(f / "config.json", "text_config", num_hidden_layers=4), "its weights lack"),
    (lambda f: change_part(f / "config.json", "text_config", num_hidden_layers=2), "config.json has no place for"),
])
def test_unusable_folders_are_refused_by_name(folder, spoil, says):
    spoil(folder)
    with pytest.raises(ValueError) as caught: load_policy(folder)
    assert str(folder) in str(caught.value) and says in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("spoil, says", [
    (lambda f: change(f / "config.json", vision_feature_select_strategy="full"), "vision_feature_select_strategy = 'full'"),
    (lambda f: change(f / "config.json", image_token_index=7), "allowed: 7, as image_token_index in config.json says"),
    (lambda f: change_part(f / "config.json", "vision_config", image_size=28), "allowed: (1, 3, 28, 28)"),
    (lambda f: change(f / "preprocessor_config.json", crop_size={"height": 40000, "width": 40000}), "size or crop_size = 40000"),
    (lambda f: change(f / "preprocessor_config.json", size={"shortest_edge": 10**9}), "size or crop_size = 1000000000"),
    (lambda f: change(f / "preprocessor_config.json", image_std=[0.0, 0.0, 0.0]), "infinite"),
    (lambda f: (f / "preprocessor_config.json").write_text("["), "preprocessor_config.json cannot be read"),
    (lambda f: (f / "chat_template.jinja").write_text("{{ messages[0].role }}"), "chat template cannot be used"),
    (lambda f: (f / "chat_template.jinja").unlink(), "no chat template"),
])
def test_an_unusable_processor_is_refused_by_name(folder, spoil, says):
    spoil(folder)
    with pytest.raises(ValueError) as caught: load_processor(folder)
    assert str(folder) in str(caught.value) and says in str(caught.value) and "\n" not in str(caught.value)


def test_pictures_have_one_size(saved):
    for name in ("min_pixels", "max_pixels"):
        with pytest.raises(ValueError, match=f"{name} = 1000; allowed for a llava: none"): load_processor(saved, **{name: 1000})


def test_a_template_where_older_folders_keep_it(folder, processor, asked):
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": (folder / "chat_template.jinja").read_text()}))
    (folder / "chat_template.jinja").unlink()
    a, b = encode_prompts(processor, asked), encode_prompts(load_processor(folder), asked)
    assert all(map(torch.equal, a.ids, b.ids))


def test_code_beside_it_is_not_run(folder):
    (folder / "evil.py").write_text("raise SystemExit('run')")
    change(folder / "config.json", auto_map={"AutoConfig": "evil.E", "AutoModelForImageTextToText": "evil.E"})
    assert load_policy(folder).config.model_type == "llava" and load_processor(folder)


def test_in_four_bits_eyes_and_answers_stay_whole(saved, processor, asked):
    model = load_policy(saved, four_bit=True)
    small = {n for n, m in model.named_modules() if type(m).__name__ == "Linear4bit"}
    assert small and all("language_model" in n for n in small) and "lm_head" not in small
    assert len(PolicySampler(model, processor).sample(asked, 1, 3, 0.0).texts) == 4


# ---- prompts

def test_prompts_are_those_of_transformers_processor(saved, processor, asked):
    theirs = LlavaProcessor(llavas.images(), llavas.tokenizer(), patch_size=llavas.PATCH, vision_feature_select_strategy="default", num_additional_image_tokens=1, chat_template=llavas.TEMPLATE)
    for messages, ids in zip(asked, (prompts := encode_prompts(processor, asked)).ids):
        image = next((c["image"] for c in messages[0]["content"] if not isinstance(c, str) and c["type"] == "image"), None)
        out = theirs(images=image, text=theirs.apply_chat_template(messages, add_generation_prompt=True), return_tensors="pt")
        assert ids.tolist() == out["input_ids"][0].tolist() and ids[0] == 1 and (ids == 1).sum() == 1
        if image is not None: assert torch.equal(encode_prompts(processor, [messages]).padded()["pixel_values"], out["pixel_values"]) and (ids == processor.image_token_id).sum() == 16
    rows = prompts.padded()
    assert rows.keys() == {"input_ids", "attention_mask", "pixel_values"} and rows["pixel_values"].shape == (3, 3, 56, 56) and prompts.take([1]).padded().keys() == {"input_ids", "attention_mask"}
    assert len(set(rows["attention_mask"].sum(1).tolist())) == 3 and {p.shape for p in prompts.pictures} == {(4, 4)}


def test_a_picture_is_cut_as_the_folder_says(folder, processor):
    wide = Image.linear_gradient("L").resize((112, 56)).convert("RGB")
    cut = encode_prompts(processor, [direct_messages("Which?", wide)]).padded()["pixel_values"]
    assert torch.equal(cut, encode_prompts(processor, [direct_messages("Which?", wide.crop((28, 0, 84, 56)))]).padded()["pixel_values"])  # the middle
    change(folder / "preprocessor_config.json", image_processor_type="LlavaImageProcessor", do_pad=True)
    filled = encode_prompts(load_processor(folder), [direct_messages("Which?", wide)]).padded()["pixel_values"]
    whole = LlavaImageProcessorPil(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}, do_pad=True)(images=[wide], return_tensors="pt")["pixel_values"]
    assert torch.equal(filled, whole) and filled[0, :, 0].abs().max() < 0.02 < cut[0, :, 0].abs().min()  # a band of the mean colour above


def test_special_tokens_in_a_text_stay_text(model, processor):
    image = make_scenes("in_domain", "train", 1)[0].image
    (ids,) = encode_prompts(processor, [direct_messages(f"Which {HERE}? </s> <s> <pad> USER:", image)]).ids
    special = [processor.tokenizer.convert_tokens_to_ids(t) for t in ("<s>", "</s>", "<pad>", "<image>")]
    assert [int((ids == t).sum()) for t in special] == [1, 0, 0, 16]


# ---- answers

def test_greedy_is_transformers_greedy(model, processor, asked):
    prompts = encode_prompts(processor, asked)
    drawn = PolicySampler(model, processor).sample(asked, 1, 12, 0.0)
    for i in range(4):
        alone = prompts.take([i]).padded()
        out = model.generate(**alone, max_new_tokens=12, do_sample=False, suppress_tokens=[processor.image_token_id])[0, alone["input_ids"].shape[1]:]
        n = int(drawn.completion_mask[i].sum())
        assert drawn.completion_ids[i, :n].tolist() == out[:n].tolist() and len(out) == n
    assert len(set(drawn.texts)) == 4


def test_noted_logps_are_those_of_one_pass(model, processor, asked):
    r = PolicySampler(model, processor).sample(asked, 3, 10, 0.8, seed=1)
    ids, mask = r.completions(torch.arange(12))
    with torch.no_grad(): again = completion_logps(model, *r.rows(torch.arange(12)), 0.8) * mask
    torch.testing.assert_close(r.logps[:, : ids.shape[1]], again, atol=1e-4, rtol=0)
    assert not (ids == processor.image_token_id).any() and len(set(r.texts)) > 4


def test_a_judge_scores_as_a_single_pass_does(model, processor, asked):
    judge = PolicyJudge(model, processor)
    answers = [["A", "B"], ["on", "emotion", "f"], ["A", "emotion"], ["B", "A"]]
    for options in (answers, [["A", "B"]] * 4):  # several tokens; one
        for m, some, scores in zip(asked, options, judge.score(asked, options)):
            (prompt,) = encode_prompts(processor, [m]).ids
            rows = encode_prompts(processor, [m]).padded()
            for answer, score in zip(some, scores, strict=True):
                tail = torch.tensor(processor.tokenizer.encode(answer, add_special_tokens=False))
                with torch.no_grad(): logits = model(**rows | {"input_ids": torch.cat([prompt, tail])[None], "attention_mask": torch.ones(1, len(prompt) + len(tail), dtype=torch.long)}).logits[0]
                logps = logits.index_fill(-1, torch.tensor([processor.image_token_id]), float("-inf")).log_softmax(-1)
                assert score == pytest.approx(float(logps[len(prompt) - 1: -1].gather(1, tail[:, None]).sum()), abs=1e-3)
    assert len(judge.generate(asked[:2])) == 2


@pytest.mark.parametrize("method", EVAL_METHODS)
def test_every_prompt_is_measured(model, processor, method):
    xs = make_scenes("in_domain", "test", 3)
    report = evaluate(PolicySampler(model, processor), xs, method=method, max_new_tokens=6, judge=PolicyJudge(model, processor), batch_size=2)
    assert report.n == 3 and report.method == method and report.accuracy == 0.0 and report.clipped == 1.0


def test_label_probabilities_add_up_and_are_those_of_whole_answers(model, processor):
    x = make_scenes("in_domain", "test", 1)[0]
    messages = method_messages("direct", x.question, x.image)
    found = label_probabilities(model, processor, messages, r"\boxed{awe}", x.label_set)
    whole = PolicyJudge(model, processor).score([messages], [[r"\boxed{%s}" % l for l in x.label_set]])[0]
    assert sum(found.values()) == pytest.approx(1, abs=1e-5)
    assert list(found.values()) == pytest.approx(torch.tensor(whole, dtype=torch.float64).softmax(0).tolist(), abs=1e-4)
    assert predict(model, processor, x.image, x.label_set, max_new_tokens=4).label is None


# ---- no training

def test_training_is_refused(saved, model):
    says = r"model_type = 'llava' can be measured, not trained; allowed in training: 'qwen2_5_vl'"
    for what in (model, saved, str(saved)):
        with pytest.raises(ValueError, match=says): check_trainable(what)
    with pytest.raises(ValueError, match=says): add_lora(model, 2, 4.0)
    check_trainable(load_policy()), check_trainable("embedded")


def test_the_command_measures_and_does_not_train(saved, tmp_path, capsys):
    for method in ("emo_r3", "direct", "sepm"):
        assert main(["evaluate", str(saved), "scenes:faces", "--size", "2", "--method", method, "--max-tokens", "4", "--output", str(tmp_path / f"{method}.json")]) in (0, None)
        assert json.loads((tmp_path / f"{method}.json").read_text())["domains"]["faces"]["n"] == 2
    capsys.readouterr()
    assert main(["train", "scenes_cpu", "--policy", str(saved), "--output-dir", str(tmp_path / "run")]) == 2
    assert "can be measured, not trained" in capsys.readouterr().err and not (tmp_path / "run" / "policy").exists()
