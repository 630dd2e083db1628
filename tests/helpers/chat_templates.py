"""Chat templates of our own that do with reasoning, tools and system prompts what published ones do, and the tiny
model with one of them in its folder.

`thinking`: the generation prompt opens `<think>`, history is without reasoning (Qwen3.5). `hybrid`: `/nothink` behind
the question, an answer ends with the token of the next role (GLM-4.5). `closing`: no reasoning is written at all, only
`</think>` (DeepSeek-V3.1). `calls`: tool calls as JSON, a system prompt of its own (MiMo). `items`: walks over the
arguments of tool calls (Qwen3.5's coder models).
"""

import json
import shutil
from pathlib import Path

from transformers import AutoTokenizer

from helpers.paths import TINY

_REASONING = """
{%- macro split(m) -%}
  {%- set ns = namespace(why='', text=m.content or '') -%}
  {%- if m.reasoning_content is string -%}{%- set ns.why = m.reasoning_content -%}
  {%- elif '</think>' in ns.text -%}
    {%- set ns.why = ns.text.split('</think>')[0].split('<think>')[-1].strip('\n') -%}
    {%- set ns.text = ns.text.split('</think>')[-1].lstrip('\n') -%}
  {%- endif -%}
  {{- ns.why ~ '\x00' ~ ns.text -}}
{%- endmacro -%}
{%- set last = namespace(user=-1) -%}
{%- for m in messages -%}{%- if m.role == 'user' -%}{%- set last.user = loop.index0 -%}{%- endif -%}{%- endfor -%}
"""

THINKING = (
    _REASONING
    + """
{%- for m in messages -%}
  {%- if m.role == 'system' and not loop.first -%}
    {{- raise_exception('a system message must come first') -}}
  {%- endif -%}
  {%- if m.role == 'assistant' -%}
    {%- set parts = split(m).split('\x00') -%}
    {%- if loop.index0 > last.user -%}
      {{- '<|im_start|>assistant\n<think>\n' ~ parts[0] ~ '\n</think>\n\n' ~ parts[1] ~ '<|im_end|>\n' -}}
    {%- else -%}{{- '<|im_start|>assistant\n' ~ parts[1] ~ '<|im_end|>\n' -}}{%- endif -%}
  {%- else -%}{{- '<|im_start|>' ~ m.role ~ '\n' ~ m.content ~ '<|im_end|>\n' -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- '<|im_start|>assistant\n<think>\n' -}}
  {%- if enable_thinking is defined and not enable_thinking -%}{{- '\n</think>\n\n' -}}{%- endif -%}
{%- endif -%}"""
)

HYBRID = (
    _REASONING
    + """
{{- '<|start|>' -}}
{%- set quiet = enable_thinking is defined and not enable_thinking -%}
{%- for m in messages -%}
  {%- if m.role == 'assistant' -%}
    {%- set parts = split(m).split('\x00') -%}
    {{- '<|assistant|>\n<think>' ~ (parts[0] if loop.index0 > last.user else '') ~ '</think>' -}}
    {%- if parts[1].strip() -%}{{- '\n' ~ parts[1].strip() -}}{%- endif -%}
  {%- elif m.role == 'tool' -%}{{- '<|observation|>\n' ~ m.content -}}
  {%- else -%}
    {{- '<|' ~ m.role ~ '|>\n' ~ m.content ~ ('/nothink' if quiet and m.role == 'user' else '') -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>' ~ ('\n<think></think>' if quiet else '') -}}{%- endif -%}"""
)

CLOSING = """
{%- for m in messages -%}
  {%- if m.role == 'assistant' -%}{{- '<|assistant|></think>' ~ (m.content or '').split('</think>')[-1] ~ '<|end|>' -}}
  {%- else -%}{{- '<|' ~ m.role ~ '|>' ~ m.content -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- '<|assistant|>' ~ ('</think>' if enable_thinking is defined and not enable_thinking else '<think>') -}}
{%- endif -%}"""

CALLS = """
{%- if messages[0].role != 'system' or tools -%}
  {%- set own = messages[0].content if messages[0].role == 'system' else 'You are a tiny assistant.' -%}
  {{- '<|im_start|>system\n' ~ own -}}
  {%- for tool in tools or [] -%}{{- '\n' ~ (tool | tojson) -}}{%- endfor -%}{{- '<|im_end|>\n' -}}
{%- endif -%}
{%- for m in messages -%}
  {%- if m.role == 'assistant' -%}
    {{- '<|im_start|>assistant\n' ~ (m.content or '') -}}
    {%- for call in m.tool_calls or [] -%}
      {{- '\n<tool_call>\n{"name": "' ~ call.function.name ~ '", "arguments": ' ~ (call.function.arguments | tojson) -}}
      {{- '}\n</tool_call>' -}}
    {%- endfor -%}
    {{- '<|im_end|>\n' -}}
  {%- elif m.role == 'tool' -%}
    {{- '<|im_start|>user\n<tool_response>\n' ~ m.content ~ '\n</tool_response><|im_end|>\n' -}}
  {%- elif not (loop.first and tools and m.role == 'system') -%}
    {{- '<|im_start|>' ~ m.role ~ '\n' ~ m.content ~ '<|im_end|>\n' -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"""

ITEMS = CALLS.replace(
    """{"name": "' ~ call.function.name ~ '", "arguments": ' ~ (call.function.arguments | tojson) -}}
      {{- '}\\n</tool_call>' -}}""",
    """<function=' ~ call.function.name ~ '>\\n' -}}
      {%- for key, value in call.function.arguments | items -%}{{- key ~ '=' ~ value ~ '\\n' -}}{%- endfor -%}
      {{- '</tool_call>' -}}""",
)

TEMPLATES = {"thinking": THINKING, "hybrid": HYBRID, "closing": CLOSING, "calls": CALLS, "items": ITEMS}
TOKENS = ["<|start|>", "<|user|>", "<|assistant|>", "<|system|>", "<|observation|>", "<|tool|>", "<|end|>"]
END = {
    "thinking": "<|im_end|>",
    "calls": "<|im_end|>",
    "items": "<|im_end|>",
    "hybrid": "<|user|>",
    "closing": "<|end|>",
}
"""The token that ends an answer."""


def with_template(name: str, folder: Path, source: Path = TINY) -> Path:
    """The model of `source` in a new folder, with one of the templates; the tokens that it needs are special."""
    shutil.copytree(source, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": TOKENS})
    tokenizer.chat_template = TEMPLATES[name]
    tokenizer.eos_token = END[name]
    tokenizer.save_pretrained(folder)
    generation = json.loads((folder / "generation_config.json").read_text())
    generation["eos_token_id"] = tokenizer.eos_token_id
    (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder
