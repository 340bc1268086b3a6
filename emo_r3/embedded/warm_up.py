"""Makes the embedded policy from nothing: `python -m emo_r3.embedded.warm_up --output-dir DIR --seed 1` (about half an hour on two cores).

Three stages, each from the weights that the one before saved. **Naming**: the vision tower alone; each of its 16 output tokens must name, through the tied output head, the object in its cell.
This puts pictures and words in one space. **Speaking**: the vision tower is frozen, its features are computed once for a pool of scenes, and the
text model learns the forms of speech: Structured Emotional Thinking, think-then-box, a direct answer, and to answer both reflection questions.
**Polishing**: the same with fewer errors in the texts and a falling learning rate, so that sampling follows its best guesses more closely.

What it never sees: a scene of a validation or test split (no picture holds a held-out pair of trigger and thing), or the data set's label of any scene. The emotions
in its traces are drawn from a planted prior over each trigger's two plausible readings, and for half of the triggers the prior favours the other one.
"""
import argparse
import random
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from emo_r3.data import EMOSET8, EMOTION6, WEBEMO7, LabelSet, emotion_question
from emo_r3.parsing import match_label, parse_set
from emo_r3.policy import load_policy, load_processor
from emo_r3.prompts import coherence_messages, consistency_messages, direct_messages, set_messages, think_messages
from emo_r3.sampling import PolicyJudge, PolicySampler
from emo_r3.scenes import DOMAINS, VENDORS, SceneSpec, compose, domain_label_set, domain_triggers, is_grounded, make_scenes, objects_of, render, scene_objects, split_things

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
TAGS = ["<step1>", "</step1>", "<step2>", "</step2>", "<step3>", "</step3>", "<think>", "</think>", "\\boxed{"]
CHAT = ("{% for message in messages %}<|im_start|>{{ message.role }}\n{% if message.content is string %}{{ message.content }}{% else %}"
        "{% for item in message.content %}{% if item.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ item.text }}{% endif %}{% endfor %}"
        "{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
IMAGE_TOKENS = 16  # 96 x 96 pixels, patches of 12, merged 2 x 2

# How a viewer responds to each emotion: no two emotions share a phrase, so step 2 tells which one is meant.
RESPONSES = {
    "amusement": ("laugh at the joke", "chuckle with delight", "grin at the silliness"),
    "anger": ("clench their fists", "want to shout in protest", "boil with rage"),
    "awe": ("stare in wonder", "feel small before such grandeur", "fall silent with reverence"),
    "contentment": ("relax and breathe out", "settle into quiet comfort", "feel at peace"),
    "disgust": ("turn away in revulsion", "wrinkle their nose", "feel sick"),
    "excitement": ("jump up with energy", "cheer with anticipation", "feel a rush of thrill"),
    "fear": ("shiver and want to hide", "freeze in dread", "look for a way to escape"),
    "joy": ("beam with happiness", "dance for gladness", "feel warm and glad"),
    "sadness": ("sigh with a heavy heart", "feel close to tears", "mourn a loss"),
    "surprise": ("gasp in astonishment", "blink in disbelief", "raise both eyebrows"),
}
CALM = {"contentment", "sadness"}


# ---- what the traces say ------------------------------------------------------------------------------------------------

def prefers_second(name: str) -> bool:
    "Whether the planted prior favours a trigger's second reading: every other trigger (every third face)."
    o = scene_objects()[name]
    return o.index % 2 == 1 if o.kind == "trigger" else o.index % 3 == 1


def prior(name: str, labels: LabelSet) -> dict[str, float]:
    "The planted distribution over the labels for a trigger: .60 for the favoured reading, .28 for the other, the rest spread evenly."
    o = scene_objects()[name]
    favoured, other = (o.second, o.label) if prefers_second(name) else (o.label, o.second)
    rest = [l for l in labels.labels if l not in (favoured, other)]
    return {favoured: 0.60, other: 0.28} | {l: 0.12 / len(rest) for l in rest}


def with_article(name: str) -> str: return ("an " if name[0] in "aeiou" else "a ") + name


def describe(trigger: str, things) -> str:
    "Step 1: the trigger, and what stands beside it."
    head = with_article(trigger)
    tail = " and ".join(with_article(t) for t in things)
    return f"{head[0].upper()}{head[1:]} stands out" + (f", next to {tail}." if tail else ".")


def respond(rng: random.Random, emotion: str) -> str: return f"A viewer would {rng.choice(RESPONSES[emotion])}."


def conclude(emotion: str, labels: LabelSet) -> str:
    sign = "Positive" if labels.polarity[emotion] == "positive" else "Negative"
    return f"{sign}, {'low' if emotion in CALM else 'high'} arousal."


def swapped(rng: random.Random, names: tuple[str, ...]) -> tuple[str, ...]:
    "The same names with one replaced by an absent object of its own kind."
    i = rng.randrange(len(names))
    kind = scene_objects()[names[i]].kind
    return tuple(rng.choice([o.name for o in objects_of(kind) if o.name not in names]) if j == i else n for j, n in enumerate(names))


def break_format(rng: random.Random, text: str) -> str:
    "One of the ways in which a small model spoils the form."
    tag = rng.choice(["</step1>", "<step2>", "</step2>", "<step3>", "</step3>"])
    return rng.choice([text.replace(tag, "", 1), text[: text.rindex("\n")], text.replace("\\boxed{", "").replace("}", "")])


def set_trace(rng: random.Random, spec: SceneSpec, labels: LabelSet, noise: dict[str, float]) -> str:
    "A SET completion as the warm-up teaches it, with a share of invented objects, incoherent answers and broken forms."
    emotion, = rng.choices(*zip(*prior(spec.trigger, labels).items()))
    names = swapped(rng, spec.names) if rng.random() < noise["invent"] else spec.names
    answer = rng.choice(labels.labels) if rng.random() < noise["incoherent"] else emotion
    text = (f"<step1>{describe(names[0], names[1:])}</step1>\n<step2>{respond(rng, emotion)}</step2>\n"
            f"<step3>{conclude(emotion, labels)}</step3>\n\\boxed{{{answer}}}")
    return break_format(rng, text) if rng.random() < noise["broken"] else text


# ---- scenes that the warm-up may see ------------------------------------------------------------------------------------

def warm_scene(rng: random.Random) -> tuple[SceneSpec, LabelSet]:
    "A scene of any vendor and any trigger whose pairs all belong to the training split, and the label set it is asked about."
    domain = rng.choices(DOMAINS, weights=(48, 0, 16, 18))[0]
    trigger = rng.choice(domain_triggers(domain)).name
    things = tuple(rng.sample(split_things(trigger, "train"), rng.choice((1, 2))))
    return compose(rng, trigger, things, rng.choice(VENDORS)), domain_label_set(domain)


def crowd(rng: random.Random) -> SceneSpec:
    "A scene for naming alone: four triggers, or one with three things of the training split."
    if rng.random() < 0.6: names = [o.name for o in rng.sample(objects_of("trigger") + objects_of("face"), 4)]
    else:
        first = rng.choice(objects_of("trigger") + objects_of("face")).name
        names = [first, *rng.sample(split_things(first, "train"), 3)]
    return compose(rng, names[0], tuple(names[1:]), rng.choice(VENDORS))


# ---- tokenizer, processor, model ----------------------------------------------------------------------------------------

def corpus() -> list[str]:
    "Every sentence form that the policy is asked or says; the tokenizer's merges are learnt from it."
    rng, out = random.Random(0), []
    for labels in (EMOSET8, EMOTION6, WEBEMO7):
        q = emotion_question(labels)
        for messages in (set_messages(q), think_messages(q), direct_messages(q), consistency_messages(Image.new("RGB", (8, 8)), "A thing."), coherence_messages("A thing.", "A viewer.", labels)):
            out += [messages[0]["content"][-1]["text"]] * 3
        out += [f"\\boxed{{{l}}} {l}" for l in labels.labels] * 3
    for o in scene_objects().values():
        out += [describe(o.name, ()), f"{o.name}, {with_article(o.name)}", f"next to {with_article(o.name)} and {with_article(o.name)}."] * 3
    quiet = dict(invent=0.0, incoherent=0.0, broken=0.0)
    for labels in (EMOSET8, EMOTION6):
        for trigger in (o for o in scene_objects().values() if o.label in labels and o.second in labels):
            spec = compose(rng, trigger.name, tuple(split_things(trigger.name, "train")[:2]), VENDORS[0])
            out += [set_trace(rng, spec, labels, quiet), f"<think>{describe(trigger.name, ())} {respond(rng, trigger.label)}</think>"]
    out += [f"A viewer would {r}." for rs in RESPONSES.values() for r in rs] * 3
    out += ["Yes\nNo\nuser\nassistant", "Which of these can you see in the image? nothing nothing"] * 6
    return out


def build_tokenizer() -> PreTrainedTokenizerFast:
    "A byte-level BPE in which every word of the corpus is one token; anything else falls back to pieces and bytes."
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(corpus(), trainers.BpeTrainer(vocab_size=2048 - len(TAGS), min_frequency=2, special_tokens=SPECIAL, show_progress=False,
                                                          initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    bpe.add_tokens([AddedToken(t, normalized=False) for t in TAGS])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>", padding_side="left",
                                   chat_template=CHAT, clean_up_tokenization_spaces=False, model_max_length=2048)


def build_image_processor() -> Qwen2VLImageProcessorPil:
    "Resizes to about 96 x 96 pixels, keeping the aspect ratio."
    return Qwen2VLImageProcessorPil(patch_size=12, merge_size=2, temporal_patch_size=2, size={"shortest_edge": 4608, "longest_edge": 9216})


def build_model(tokenizer: PreTrainedTokenizerFast) -> Qwen2_5_VLForConditionalGeneration:
    "A Qwen2.5-VL of 2.2 million parameters with random weights."
    token = tokenizer.convert_tokens_to_ids
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}
    special = dict(bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    config = Qwen2_5_VLConfig(
        text_config=dict(vocab_size=-(-len(tokenizer) // 64) * 64, hidden_size=128, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4,
                         num_key_value_heads=2, max_position_embeddings=4096, rope_parameters=rope, tie_word_embeddings=True, **special),
        vision_config=dict(depth=4, hidden_size=128, intermediate_size=256, num_heads=4, patch_size=12, spatial_merge_size=2, temporal_patch_size=2,
                           window_size=96, fullatt_block_indexes=[0, 1, 2, 3], out_hidden_size=128),
        image_token_id=token("<|image_pad|>"), video_token_id=token("<|video_pad|>"), vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"), tie_word_embeddings=True, **special)
    return Qwen2_5_VLForConditionalGeneration(config)


# ---- stage 1: naming ----------------------------------------------------------------------------------------------------

def first_token(tokenizer, name: str) -> int:
    "The id of a name's first word, which no other object's name begins with."
    return tokenizer.encode(" " + name, add_special_tokens=False)[0]


def cell_targets(tokenizer, spec: SceneSpec) -> list[int]:
    "For each of the 16 image tokens (4 x 4, row by row) the first token of the object in its cell, or of the word nothing."
    at = {p.cell: first_token(tokenizer, p.name) for p in spec.placements}
    empty = tokenizer.encode(" nothing", add_special_tokens=False)[0]
    return [at.get(r // 2 * 2 + c // 2, empty) for r in range(4) for c in range(4)]


def pixels(images, specs) -> dict[str, torch.Tensor]:
    return images([render(s) for s in specs], return_tensors="pt")


def see(model, batch) -> torch.Tensor:
    "The vision tower's output tokens, (N, 16, hidden)."
    out = model.model.visual(batch["pixel_values"], grid_thw=batch["image_grid_thw"]).pooler_output
    return out.view(len(batch["image_grid_thw"]), IMAGE_TOKENS, -1)


def schedule(step: int, steps: int, rate: float) -> float:
    "Linear warm-up over 50 steps, constant to the middle, then linearly to a twentieth."
    return rate * min(1.0, (step + 1) / 50) * (1.0 if step < steps / 2 else 0.05 + 0.95 * 2 * (1 - step / steps))


def learn_to_name(model, tokenizer, images, rng, steps: int, batch_size: int = 64, rate: float = 2e-3) -> None:
    "Stage 1: the vision tower and the embeddings of names."
    head = model.lm_head.weight
    optimizer = torch.optim.AdamW([*model.model.visual.parameters(), head], lr=rate, betas=(0.9, 0.98), weight_decay=0.01)
    started = time.time()
    for step in range(steps):
        for group in optimizer.param_groups: group["lr"] = schedule(step, steps, rate)
        specs = [crowd(rng) if rng.random() < 0.7 else warm_scene(rng)[0] for _ in range(batch_size)]
        targets = torch.tensor([cell_targets(tokenizer, s) for s in specs])  # (N, 16)
        logits = see(model, pixels(images, specs)) @ head.T  # (N, 16, V)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        optimizer.zero_grad(); loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0); optimizer.step()
        if step % 50 == 0:
            right = (logits.argmax(-1) == targets).float().mean()
            print(f"naming {step:5d}  loss {loss.item():.3f}  right {right.item():.3f}  {time.time() - started:.0f} s", flush=True)


# ---- stage 2: speaking --------------------------------------------------------------------------------------------------

class Speech:
    "One training text: what is asked, what is answered, and verdicts to give at chosen words of the question."
    def __init__(self, scene: int | None, prompt: str, answer: str = "", weight: float = 1.0, verdicts: dict[str, bool] | None = None):
        self.scene, self.prompt, self.answer, self.weight, self.verdicts = scene, prompt, answer, weight, verdicts or {}


def text_of(messages) -> str: return messages[0]["content"][-1]["text"]


BLANK = Image.new("RGB", (8, 8))  # stands for the picture while a question's text is made; the pool's features take its place
NOISE = dict(invent=0.10, incoherent=0.08, broken=0.05)  # shares of the traces with each kind of error
LESS_NOISE = dict(invent=0.04, incoherent=0.03, broken=0.02)


def speak_set(rng, i, spec, labels, noise) -> Speech:
    return Speech(i, text_of(set_messages(emotion_question(labels))), set_trace(rng, spec, labels, noise))


def speak_think(rng, i, spec, labels, noise) -> Speech:
    "Think-then-box: the same description and response in one breath."
    emotion, = rng.choices(*zip(*prior(spec.trigger, labels).items()))
    names = swapped(rng, spec.names) if rng.random() < noise["invent"] else spec.names
    answer = rng.choice(labels.labels) if rng.random() < noise["incoherent"] else emotion
    thought = f"<think>{describe(names[0], names[1:])} {respond(rng, emotion)}</think>"
    if rng.random() < noise["broken"]: thought = thought.replace(rng.choice(["<think>", "</think>"]), "")
    return Speech(i, text_of(think_messages(emotion_question(labels))), f"{thought}\n\\boxed{{{answer}}}")


def speak_direct(rng, i, spec, labels, noise) -> Speech:
    emotion, = rng.choices(*zip(*prior(spec.trigger, labels).items()))
    return Speech(i, text_of(direct_messages(emotion_question(labels))), f"\\boxed{{{emotion}}}")


def tagged(rng, step: str, k: int) -> str: return f"<step{k}>{step}</step{k}>" if rng.random() < 0.25 else step


def speak_consistency(rng, i, spec, labels, noise) -> Speech:
    "The paper's first question, about a true description (whole or in part) or one with type-matched inventions."
    names = list(spec.names)
    if rng.random() < 0.3: rng.shuffle(names)
    names = tuple(names[: rng.choice((1, 2, 3, 3))])
    if wrong := rng.random() < 0.5: names = swapped(rng, names)
    if wrong and rng.random() < 0.2: names = swapped(rng, names)
    truth = {n: n in spec.names for n in names}
    prompt = text_of(consistency_messages(BLANK, tagged(rng, describe(names[0], names[1:]), 1)))
    return Speech(i, prompt, "Yes" if all(truth.values()) else "No", 3.0, truth)


def speak_checklist(rng, i, spec, labels, noise) -> Speech:
    "A dense form of the same skill: at each name of a list, is it there?"
    absent = [n for _ in range(3) for n in swapped(rng, spec.names) if n not in spec.names]
    names = list(dict.fromkeys([*spec.names, *absent])); rng.shuffle(names)
    return Speech(i, "Which of these can you see in the image? " + ", ".join(names) + ".", verdicts={n: n in spec.names for n in names})


def speak_coherence(rng, i, spec, labels, noise) -> Speech:
    "The paper's second question: the emotion that step 2 describes, whatever step 1 says."
    emotion = rng.choice(labels.labels)
    step1, step2 = tagged(rng, describe(spec.names[0], spec.names[1:]), 1), tagged(rng, respond(rng, emotion), 2)
    return Speech(None, text_of(coherence_messages(step1, step2, labels)), emotion, 8.0)


def encode(tokenizer, speech: Speech) -> tuple[list[int], list[int], list[float]]:
    "Token ids, and for each the target that follows it (-100: none) with its weight."
    picture = "<|vision_start|>" + "<|image_pad|>" * IMAGE_TOKENS + "<|vision_end|>" if speech.scene is not None else ""
    head = f"<|im_start|>user\n{picture}{speech.prompt}<|im_end|>\n<|im_start|>assistant\n"
    asked = tokenizer(head, add_special_tokens=False, return_offsets_mapping=True)
    ids, targets, weights = asked["input_ids"], [-100] * len(asked["input_ids"]), [0.0] * len(asked["input_ids"])
    yes, no = (tokenizer.convert_tokens_to_ids(w) for w in ("Yes", "No"))
    for name, there in speech.verdicts.items():
        at = head.index(" " + name) if " " + name in head else head.index(name)
        token = next(k for k, (start, end) in enumerate(asked["offset_mapping"]) if end > at + 1)
        targets[token], weights[token] = (yes if there else no), 1.0
    said = tokenizer.encode(speech.answer + "<|im_end|>", add_special_tokens=False) if speech.answer else []
    ids, targets, weights = ids + said, targets[:-1] + said + [-100], weights[:-1] + [speech.weight] * len(said) + [0.0]
    if not said: targets, weights = targets + [-100] * (len(ids) - len(targets)), weights + [0.0] * (len(ids) - len(weights))
    return ids, targets, weights


def collate(tokenizer, model, batch: list[Speech], features: torch.Tensor):
    "Right-padded ids, embeddings with the pool's features in place of image tokens, M-RoPE positions, targets, weights."
    rows = [encode(tokenizer, s) for s in batch]
    width = max(len(r[0]) for r in rows)
    pad = lambda values, fill: values + [fill] * (width - len(values))
    ids = torch.tensor([pad(r[0], tokenizer.pad_token_id) for r in rows])
    targets, weights = torch.tensor([pad(r[1], -100) for r in rows]), torch.tensor([pad(r[2], 0.0) for r in rows])
    image = ids == model.config.image_token_id
    embeddings = model.get_input_embeddings()(ids)
    seen = [s.scene for s in batch if s.scene is not None]
    grid = torch.tensor([[1, 8, 8]] * len(seen)) if seen else None
    if seen: embeddings = embeddings.masked_scatter(image.unsqueeze(-1), features[seen].flatten(0, 1))
    positions, _ = model.model.get_rope_index(ids, mm_token_type_ids=image.int(), image_grid_thw=grid, attention_mask=torch.ones_like(ids))
    return embeddings, positions, targets, weights


def speech_loss(tokenizer, model, batch, features) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    "The weighted mean cross-entropy, and predictions beside targets."
    embeddings, positions, targets, weights = collate(tokenizer, model, batch, features)
    hidden = model.model.language_model(inputs_embeds=embeddings, position_ids=positions, use_cache=False).last_hidden_state
    chosen = targets != -100
    logits, wanted, weight = model.lm_head(hidden[chosen]), targets[chosen], weights[chosen]
    return (F.cross_entropy(logits, wanted, reduction="none") * weight).sum() / weight.sum(), logits.argmax(-1), wanted


# For each share of the run: how many texts of each kind a step takes.
SPEAKING = [(0.30, {speak_checklist: 16, speak_consistency: 16, speak_coherence: 8}, {speak_set: 10, speak_think: 3, speak_direct: 2}),
            (1.00, {speak_checklist: 2, speak_consistency: 16, speak_coherence: 8}, {speak_set: 16, speak_think: 5, speak_direct: 2})]
POLISHING = [(1.00, {speak_consistency: 8, speak_coherence: 4}, {speak_set: 22, speak_think: 7, speak_direct: 2})]


def look_at(model, images, specs) -> torch.Tensor:
    "The frozen vision tower's tokens for a pool of scenes, (N, 16, hidden)."
    with torch.no_grad():
        return torch.cat([see(model, pixels(images, specs[i: i + 128])) for i in range(0, len(specs), 128)])


def learn_to_speak(model, tokenizer, images, rng, steps: int, mix=SPEAKING, noise=NOISE, rate: float = 1e-3, pool_size: int = 12000) -> None:
    "Stages 2 and 3: the text model; the vision tower is frozen and has looked at the pool once."
    pool = [warm_scene(rng) for _ in range(pool_size)]
    features, started = look_at(model, images, [s for s, _ in pool]), time.time()
    print(f"speaking: {pool_size} scenes seen", flush=True)
    optimizer = torch.optim.AdamW([*model.model.language_model.parameters()], lr=rate, betas=(0.9, 0.98), weight_decay=0.01)
    right: dict[str, list[float]] = {}
    for step in range(steps):
        for group in optimizer.param_groups: group["lr"] = schedule(step, steps, rate)
        short, long = next((s, l) for share, s, l in mix if step < share * steps)
        optimizer.zero_grad()
        for kinds in (short, long):
            batch = [kind(rng, i, *pool[i], noise) for kind, n in kinds.items() for i in rng.sample(range(pool_size), n)]
            loss, said, wanted = speech_loss(tokenizer, model, batch, features)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.model.language_model.parameters(), 1.0); optimizer.step()
        if step % 100 == 99:
            with torch.no_grad():
                for kind in (speak_checklist, speak_consistency, speak_coherence, speak_set):
                    probe = [kind(rng, i, *pool[i], noise) for i in rng.sample(range(pool_size), 64)]
                    value, said, wanted = speech_loss(tokenizer, model, probe, features)
                    hits = said == wanted
                    if kind is speak_consistency:  # the verdict alone, not the dense ones
                        end = tokenizer.eos_token_id
                        answers = torch.cat([wanted[1:] == end, torch.tensor([False])])
                        hits = hits[answers]
                    right[kind.__name__] = [round(value.item(), 3), round(hits.float().mean().item(), 3)]
            print(f"speaking {step + 1:5d}  " + "  ".join(f"{k[6:]} {v[0]:.3f} {v[1]:.3f}" for k, v in right.items()) + f"  {time.time() - started:.0f} s", flush=True)


# ---- what it can do -----------------------------------------------------------------------------------------------------

GATES = {"consistency": (0.92, 1), "coherence": (0.95, 1), "grounding": (0.90, 1), "format": (0.95, 1), "accuracy": (0.45, 0.60), "sampled_accuracy": (0.35, 1)}


def judge_figures(judge, n: int, seed: int) -> dict[str, float]:
    "How often the judge is right on n validation scenes: half the descriptions are true, half name an absent object of the same kind."
    rng, questions, truth, told, meant = random.Random(f"judge {seed}"), [], [], [], []
    for i, x in enumerate(make_scenes("in_domain", "validation", n, seed)):
        names = x.objects if i % 2 else swapped(rng, x.objects)
        questions.append(consistency_messages(x.load_image(), describe(names[0], names[1:]))); truth.append(bool(i % 2))
        meant.append(rng.choice(x.label_set.labels))
        told.append(coherence_messages(describe(x.objects[0], x.objects[1:]), respond(rng, meant[-1]), x.label_set))
    said = [yes > no for yes, no in judge.score(questions, [["Yes", "No"]] * n)]
    labels = EMOSET8.labels
    read = [labels[max(range(len(labels)), key=p.__getitem__)] for p in judge.score(told, [labels] * n)]
    right = lambda a, b: sum(x == y for x, y in zip(a, b)) / len(a)
    yes_rate = lambda value: sum(s for s, t in zip(said, truth) if t == value) / truth.count(value)
    return {"consistency": right(said, truth), "yes_when_true": yes_rate(True), "yes_when_false": yes_rate(False), "coherence": right(read, meant)}


def measure(model, processor, n: int = 384, seed: int = 0) -> dict[str, float]:
    "The policy's figures on n in-domain validation scenes, greedy and sampled, and its judgement; compare with GATES."
    sampler, scenes = PolicySampler(model, processor), make_scenes("in_domain", "validation", n, seed)
    out = judge_figures(PolicyJudge(model, processor), n, seed)
    for prefix, temperature in (("", 0.0), ("sampled_", 1.0)):
        texts = sampler.sample([set_messages(x.question, x.load_image()) for x in scenes], 1, 64, temperature, seed=seed).texts
        parsed = [parse_set(t) for t in texts]
        share = lambda hits: sum(hits) / n
        out |= {prefix + "accuracy": share(match_label(c.answer, x.label_set) == x.label for c, x in zip(parsed, scenes)),
                prefix + "grounding": share(is_grounded(c.steps[0], x.objects) for c, x in zip(parsed, scenes)),
                prefix + "format": share(c.well_formed for c in parsed)}
    return out


# ---- the whole ----------------------------------------------------------------------------------------------------------

def main() -> None:
    "Makes and saves the policy."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, required=True, help="folder for the policy (created; must be empty)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--naming-steps", type=int, default=1200)
    parser.add_argument("--speaking-steps", type=int, default=2000)
    parser.add_argument("--polishing-steps", type=int, default=300)
    args = parser.parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    if any(args.output_dir.iterdir()): parser.error(f"--output-dir {args.output_dir} is not empty")
    tokenizer, images = build_tokenizer(), build_image_processor()
    stage = lambda name: args.output_dir / name
    torch.manual_seed(args.seed)
    model = build_model(tokenizer)
    learn_to_name(model, tokenizer, images, random.Random(f"naming {args.seed}"), args.naming_steps)
    save(model, tokenizer, images, stage("named"), torch.float32)
    model = load_policy(stage("named"))
    learn_to_speak(model, tokenizer, images, random.Random(f"speaking {args.seed}"), args.speaking_steps)
    save(model, tokenizer, images, stage("spoken"))
    model = load_policy(stage("spoken"))
    learn_to_speak(model, tokenizer, images, random.Random(f"polishing {args.seed}"), args.polishing_steps, POLISHING, LESS_NOISE, rate=4e-4)
    save(model, tokenizer, images, stage("policy"))
    figures = measure(load_policy(stage("policy")), load_processor(stage("policy")))
    for name, value in figures.items(): print(f"{name:18} {value:.3f}" + ("  gate {} to {}".format(*GATES[name]) if name in GATES else ""))


def save(model, tokenizer, images, folder: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    "Writes the policy with its processor; what ships is in bf16."
    model.generation_config.update(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    model.to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    images.save_pretrained(folder)


if __name__ == "__main__":
    main()
