"""The demo's adapter in a process of its own, which knows nothing of the training: what everyone else does with it."""

import json
import subprocess
import sys
from pathlib import Path


# Written beside the adapter, for people to run and to read.
DESCRIBE = '''"""Describe a picture with the adapter beside this file: python describe.py PICTURE"""

import sys
from pathlib import Path

import modeling_minigpt4
from transformers import pipeline

if len(sys.argv) != 2:
    sys.exit(__doc__)
describe = pipeline("image-text-to-text", model=str(Path(__file__).with_name("adapter")), device="cpu")
content = [{"type": "image", "path": sys.argv[1]}, {"type": "text", "text": "Describe this image in detail."}]
options = {"max_new_tokens": MAX_NEW_TOKENS, "do_sample": False}
(answer,) = describe(text=[{"role": "user", "content": content}], return_full_text=False, generate_kwargs=options)
print(answer["generated_text"])
'''
# The same with `generate`, then the file above as it was written.
RELOAD = """
import json, runpy, sys
import modeling_minigpt4
from transformers import AutoModelForImageTextToText, AutoProcessor

folder, script, picture, instruction, length = sys.argv[1:]
content = [{"type": "image", "path": picture}, {"type": "text", "text": instruction}]
model = AutoModelForImageTextToText.from_pretrained(folder)
processor = AutoProcessor.from_pretrained(folder)
inputs = processor.apply_chat_template(
    [{"role": "user", "content": content}],
    add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
)
reply = model.generate(**inputs, max_new_tokens=int(length), do_sample=False)[:, inputs["input_ids"].shape[1] :]
(generated,) = processor.post_process_image_text_to_text(reply)

sys.argv = [script, picture]
told = runpy.run_path(script)
print()
print(json.dumps([generated, told["answer"]["generated_text"]]))
"""


def reload_adapter(folder: Path, picture: Path, instruction: str, max_new_tokens: int) -> tuple[str, str]:
    """
    Write `describe.py`, and let a new process load the adapter and describe a picture, with `generate` and with it.

    Args:
        folder: the demo's output, with `adapter` in it.
        picture: the picture to describe.
        instruction: what `generate` is asked; `describe.py` asks the same.
        max_new_tokens: the most tokens of a reply.

    Raises:
        RuntimeError: if it fails or the two differ.
    """
    adapter, script = folder / "adapter", folder / "describe.py"
    script.write_text(DESCRIBE.replace("MAX_NEW_TOKENS", str(max_new_tokens)), encoding="utf-8")
    command = [sys.executable, "-c", RELOAD, str(adapter), str(script), str(picture), instruction, str(max_new_tokens)]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8")
    if done.returncode:
        raise RuntimeError(f"The adapter in {adapter} could not be loaded in a new process:\n{done.stderr}")
    generated, piped = json.loads(done.stdout.splitlines()[-1])
    if generated != piped:
        raise RuntimeError(f"generate and pipeline differ: {generated!r} and {piped!r}.")
    return generated, piped
