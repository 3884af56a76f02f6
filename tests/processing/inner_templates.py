"""Chat templates in the manner of today's language models, each with a tokenizer that knows its special tokens."""

from typing import Any

from tiny_text import byte_tokenizer


# A system text of its own where none is given, tools and thinking switched by a variable.
CHATML = """{%- if messages[0].role == 'system' -%}
{{ '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- else -%}
{{ '<|im_start|>system\\nYou are helpful.<|im_end|>\\n' }}
{%- endif -%}
{%- if tools %}{{ '<|im_start|>system\\nTools: ' + tools[0].function.name + '<|im_end|>\\n' }}{% endif -%}
{%- for message in messages -%}
{%- if message.role == 'assistant' and message.tool_calls -%}
{{ '<|im_start|>assistant\\nCall ' + message.tool_calls[0].function.name + '<|im_end|>\\n' }}
{%- elif not (loop.first and message.role == 'system') -%}
{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|im_start|>assistant\\n' }}
{%- if thinking is defined and not thinking %}{{ '<think></think>' }}{% endif -%}
{%- endif -%}
"""

# As SmolLM2's: one line, and a newline at the very end of the file, which Jinja drops.
SMOL = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are small<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}\n"
)

# Writes BOS itself, trims every content, and gathers its pieces in a variable.
LLAMA3 = """{%- set loop_messages = messages -%}
{%- for message in loop_messages -%}
{%- set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' -%}
{%- if loop.index0 == 0 -%}{%- set content = bos_token + content -%}{%- endif -%}
{{- content -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' -}}{%- endif -%}"""  # noqa: E501

# Has no system role, calls the assistant "model", and refuses turns that do not alternate.
GEMMA = """{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}{{ raise_exception('System role not supported') }}{%- endif -%}
{%- for message in messages -%}
{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
{%- endif -%}
{%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}
{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>model\n' }}{%- endif -%}
"""

# Puts the system text into the last user message, and EOS right behind each reply.
MISTRAL = """{%- set system = messages[0]['content'] if messages[0]['role'] == 'system' else '' -%}
{%- set rest = messages[1:] if messages[0]['role'] == 'system' else messages -%}
{{- bos_token -}}
{%- for message in rest -%}
{%- if message['role'] == 'user' -%}
{%- if loop.last and system -%}{{- '[INST] ' + system + '\n\n' + message['content'] + '[/INST]' -}}
{%- else -%}{{- '[INST] ' + message['content'] + '[/INST]' -}}{%- endif -%}
{%- elif message['role'] == 'assistant' -%}{{- ' ' + message['content'] + eos_token -}}
{%- else -%}{{- raise_exception('Only user and assistant roles are supported!') -}}{%- endif -%}
{%- endfor -%}"""

# Takes the thoughts out of earlier replies, as reasoning models do.
THINKING = """{%- for message in messages -%}
{%- set content = message.content -%}
{%- if message.role == 'assistant' and '</think>' in content and not loop.last -%}
{%- set content = content.split('</think>')[-1].lstrip() -%}
{%- endif -%}
{{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"""

# Writes replies in capitals: nobody can tell where they stand in the text.
SHOUTING = """{%- for message in messages -%}
{{- '<|im_start|>' + message.role + '\n' + message.content | upper + '<|im_end|>\n' -}}
{%- endfor -%}"""

# Brings marks of its own, which leave out the end of the turn.
MARKED = """{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\n' -}}
{%- if message['role'] == 'assistant' -%}
{%- generation -%}{{- message['content'] -}}{%- endgeneration -%}
{%- else -%}{{- message['content'] -}}{%- endif -%}
{{- '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"""

IM = ("<|im_start|>", "<|im_end|>")
# name: template, special tokens, BOS, EOS, the token that ends a reply, whether there is a system role
FAMILIES: dict[str, tuple[str, tuple[str, ...], str | None, str, str, bool]] = {
    "chatml": (CHATML, IM, None, "<|im_end|>", "<|im_end|>", True),
    "smol": (SMOL, IM, "<|im_start|>", "<|im_end|>", "<|im_end|>", True),
    "llama3": (
        LLAMA3,
        ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        "<|begin_of_text|>",
        "<|eot_id|>",
        "<|eot_id|>",
        True,
    ),
    "gemma": (GEMMA, ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"), "<bos>", "<eos>", "<end_of_turn>", False),
    "mistral": (MISTRAL, ("<s>", "</s>", "[INST]", "[/INST]"), "<s>", "</s>", "</s>", True),
}


def family_tokenizer(name: str) -> Any:
    template, special, bos, eos, _, _ = FAMILIES[name]
    front = (bos,) if bos and name != "smol" else ()
    tokens = {"bos_token": bos, "eos_token": eos, "pad_token": "<pad>"}
    return byte_tokenizer(special=(*special, "<pad>"), front=front, chat_template=template, **tokens)


def template_tokenizer(template: str | None) -> Any:
    """A tokenizer of the ChatML kind that brings `template`."""
    tokens = {"bos_token": None, "eos_token": "<|im_end|>", "pad_token": "<pad>"}
    return byte_tokenizer(special=(*IM, "<pad>"), front=(), chat_template=template, **tokens)
