"""A folder that `emo-r3 export` wrote, in vLLM itself: a process that cannot import emo_r3 loads it and answers about a picture as plain transformers does, from the same folder."""
import base64
import io
import json
import subprocess
import sys

import pytest

pytest.importorskip("vllm")
from emo_r3.export import export_policy  # noqa: E402
from emo_r3.policy import EMBEDDED_POLICY  # noqa: E402
from emo_r3.scenes import make_scenes  # noqa: E402

pytestmark = pytest.mark.vllm
CODE = """
import base64, io, json, os, sys
sys.modules["emo_r3"] = None  # an import of it fails
os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "HF_HUB_OFFLINE": "1"}
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
from vllm import LLM, SamplingParams
folder, prompt, picture = sys.argv[1:]
processor, model = AutoProcessor.from_pretrained(folder), AutoModelForImageTextToText.from_pretrained(folder).eval()
shown = Image.open(io.BytesIO(base64.b64decode(picture))).convert("RGB")
chat = [{"role": "user", "content": [{"type": "image", "image": shown}, {"type": "text", "text": prompt}]}]
inputs = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt")
plain = model.generate(**inputs, max_new_tokens=64, do_sample=False)[0, inputs["input_ids"].shape[1]:].tolist()
engine = LLM(model=folder, dtype="float32", enforce_eager=True, skip_mm_profiling=True, max_model_len=512, limit_mm_per_prompt={"image": 1, "video": 0})
asked = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64," + picture}}, {"type": "text", "text": prompt}]}]
print("\\n" + json.dumps([plain, list(engine.chat(asked, SamplingParams(temperature=0, max_tokens=64))[0].outputs[0].token_ids), processor.decode(plain)]))
"""


def test_vllm_answers_from_the_folder_as_transformers_does(tmp_path):
    folder, scene, file = export_policy(str(EMBEDDED_POLICY), tmp_path / "out").folder, make_scenes("in_domain", "test", 1)[0], io.BytesIO()
    scene.load_image().save(file, "PNG")
    prompt = scene.question + "\nThink in three steps, then write the final emotion in \\boxed{}."
    done = subprocess.run([sys.executable, "-c", CODE, str(folder), prompt, base64.b64encode(file.getvalue()).decode()], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    plain, engine, text = json.loads(done.stdout.splitlines()[-1])
    assert plain == engine and len(plain) > 3, text
