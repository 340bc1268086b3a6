"""A tiny random LLaVA-1.5, made from nothing: Llama's kind of tokenizer, CLIP's kind of tower, and what a folder of the hub holds beside them."""
import json
from functools import cache
from pathlib import Path

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlamaTokenizer, LlavaConfig, LlavaForConditionalGeneration
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

EDGE, PATCH = 56, 14  # 4 x 4 tokens
TEMPLATE = ("{% for message in messages %}{{ message.role.upper() }}: {% if message.content is string %}{{ message.content }}{% else %}"
            "{% for item in message.content %}{% if item.type == 'image' %}<image>\n{% else %}{{ item.text }}{% endif %}{% endfor %}{% endif %} {% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}")


@cache
def tokenizer():
    "Letters, bytes for everything else, and a few words; `<s>` begins every text, `</s>` ends an answer."
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "▁", *(chr(c) for c in range(33, 127))]
    merges = [("▁", "A"), ("▁", "B"), ("o", "n"), ("▁", "e"), ("▁e", "m"), ("o", "t"), ("i", "on"), ("▁", "f"), ("o", "c")]
    vocab = {t: i for i, t in enumerate(dict.fromkeys([*tokens, *("".join(m) for m in merges)]))}
    made = LlamaTokenizer(vocab=vocab, merges=merges, unk_token="<unk>", bos_token="<s>", eos_token="</s>", add_bos_token=True)
    made.add_special_tokens({"additional_special_tokens": ["<image>"], "pad_token": "<pad>"})
    made.chat_template, made.padding_side = TEMPLATE, "left"
    return made


def config(text=(), **values):
    words = tokenizer()
    small = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4)
    text = LlamaConfig(vocab_size=len(words), num_key_value_heads=2, max_position_embeddings=2048, bos_token_id=1, eos_token_id=2, pad_token_id=words.pad_token_id, **small | dict(text))
    return LlavaConfig(vision_config=CLIPVisionConfig(image_size=EDGE, patch_size=PATCH, **small), text_config=text, image_token_index=words.convert_tokens_to_ids("<image>"), image_seq_length=(EDGE // PATCH) ** 2, **values)


def model(seed=0, **text):
    "Random weights, large enough that attention and answers differ from picture to picture."
    torch.manual_seed(seed)
    made = LlavaForConditionalGeneration(config(text)).eval()
    with torch.no_grad():
        for name, p in made.named_parameters():
            if p.dim() > 1: p.copy_(torch.randn(p.shape) * (0.5 if "embed" in name else 1.5 / p.shape[-1] ** 0.5))
    made.generation_config.eos_token_id, made.generation_config.pad_token_id = 2, tokenizer().pad_token_id
    return made


def images(**values): return CLIPImageProcessorPil(**{"size": {"shortest_edge": EDGE}, "crop_size": {"height": EDGE, "width": EDGE}} | values)


def folder(path, seed=0, **text):
    "A folder as the hub holds them: weights, tokenizer, the picture's part, and the processor's settings."
    path = Path(path)
    model(seed, **text).save_pretrained(path)
    tokenizer().save_pretrained(path)
    images().save_pretrained(path)
    return path
