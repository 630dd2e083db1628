"""A server with OpenAI's protocol that renders, tokenizes and parses for itself, and writes down what it was asked with
and what it answered: the truth that training is compared with.

It renders with transformers alone, as SGLang does (arguments of tool calls are parsed first). What it answers follows
from the prompt; ids are not always those that the text would be encoded to again.
"""

import copy
import json
import random
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from transformers import AutoTokenizer

from helpers.listening import Listening

WORDS = ("the cell", "a small part", "of the body", "history", "water", "holds", "most", "it", "is", "什么", "1 + 1")


class ScriptedEngine(Listening):
    """`with ScriptedEngine(folder) as engine:` serves `engine.url`; `engine.turns`: (asked, answered, finish reason).

    `parse`: whether reasoning and tool calls are parsed out of the text. `tells`: `ids`, `count` (how many tokens the
    prompt has) or `nothing`.
    """

    def __init__(self, folder: Path, parse: bool = True, tells: str = "ids", cut_off: float = 0.15):
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.parse, self.tells, self.cut_off = parse, tells, cut_off
        self.turns: list[tuple[list[int], list[int], str]] = []
        self.lock = threading.Lock()
        engine = self

        class Bound(_Handler):
            owner = engine

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Bound)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}"

    def chat(self, body: dict) -> dict:
        messages = copy.deepcopy(body["messages"])
        for message in messages:
            for call in message.get("tool_calls") or []:
                call["function"]["arguments"] = json.loads(call["function"]["arguments"])
        kwargs = body.get("chat_template_kwargs") or {}
        prompt = self.tokenizer.apply_chat_template(
            messages, tools=body.get("tools"), tokenize=False, add_generation_prompt=True, **kwargs
        )
        asked = self.tokenizer.encode(prompt, add_special_tokens=False)
        chance = random.Random(f"{prompt} {body.get('seed')}")
        text = self._text(prompt, body.get("tools"), chance)
        answered = self._encode(text, chance)
        reason = "length" if chance.random() < self.cut_off else "stop"
        if reason == "stop":
            answered.append(self.tokenizer.eos_token_id)
        message = self._message(text) if self.parse else {"role": "assistant", "content": text}
        if message.get("tool_calls") and reason == "stop":
            reason = "tool_calls"
        with self.lock:
            self.turns.append((asked, answered, reason))
        choice = {"index": 0, "message": message, "finish_reason": reason}
        if self.tells == "ids":
            choice |= {"prompt_token_ids": asked, "token_ids": answered}
        usage = {"prompt_tokens": len(asked), "completion_tokens": len(answered), "total_tokens": 0}
        answer = {"id": "1", "object": "chat.completion", "created": 0, "model": "scripted", "choices": [choice]}
        return answer if self.tells == "nothing" else {**answer, "usage": usage}

    def _text(self, prompt, tools, chance) -> str:
        answer = " ".join(chance.choices(WORDS, k=chance.randint(2, 9)))
        why = " ".join(chance.choices(WORDS, k=chance.randint(0, 5)))
        if tools and "<tool_response>" not in prompt:
            return f'\n<tool_call>\n{{"name": "look_up", "arguments": {{"word": "{answer}"}}}}\n</tool_call>'
        if prompt.endswith("<think>\n"):
            return f"{why}\n</think>\n\n{answer}"
        if prompt.endswith("<think>"):
            return f"{why}</think>{answer}"
        if prompt.endswith("<|assistant|>"):
            return f"\n<think>{why}</think>\n{answer}"
        return answer

    def _encode(self, text, chance) -> list[int]:
        """As a model may generate it: sometimes word by word, in which other tokens are chosen than for the whole."""
        pieces = re.findall(r"\s*\S+|\s+$", text) if chance.random() < 0.5 else [text]
        return [i for piece in pieces for i in self.tokenizer.encode(piece, add_special_tokens=False)]

    def _message(self, text) -> dict:
        message = {"role": "assistant", "content": text}
        if "</think>" in text:
            why, _, answer = text.partition("</think>")
            message = {
                **message,
                "content": answer.lstrip("\n"),
                "reasoning_content": why.split("<think>")[-1].strip("\n"),
            }
        if "<tool_call>" in text:
            call = json.loads(text.split("<tool_call>")[1].split("</tool_call>")[0])
            function = {"name": call["name"], "arguments": json.dumps(call["arguments"])}
            message |= {"content": None, "tool_calls": [{"id": "call_7", "type": "function", "function": function}]}
        return message


class _Handler(BaseHTTPRequestHandler):
    owner: ScriptedEngine

    def log_message(self, *_):
        pass

    def do_GET(self):
        self._reply(200, {"object": "list", "data": [{"id": "scripted", "object": "model"}]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        try:
            self._reply(200, self.owner.chat(body))
        except Exception as error:  # as engines answer what a template refuses
            self._reply(400, {"error": {"message": str(error)}})

    def _reply(self, status, value):
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
