"""The filters of `fastmtp clean` that look at one row: each says why a row is to be removed, or None.

A filter is a dataclass; its fields are its parameters, and options of the command. The thresholds are set so that
answers written by people pass; Gopher's (Rae et al., arXiv 2112.11446, table A1) are for web pages and would remove
good code.
"""

import hashlib
import json
import re
from codecs import BOM_UTF8
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from ..checkpoint.checkpoint import Checkpoint
from ..errors import FastMTPError
from ..files import inputs
from ..files.row_forms import UnreadableRowError, normalize
from ..files.rows import MAX_ROW_BYTES, Row
from .chat_template import load_tokenizer
from .conversation import is_complete, message_text
from .examples import check_row_ids, check_vocabulary, rendered_otherwise, training_examples
from .language import language
from .language_names import language_code
from .near_duplicates import prompt_and_answer
from .scripts import CJK
from .shingles import Hashes, runs, units

CountTokens = Callable[[Row], list[int]]
"""Tokens of each message of a row."""


@dataclass
class Truncated:
    """Rows whose answer was cut off (a `finish_reason` that `is_complete` does not know), or that do not end with an
    answer.

    Source: the paper's "truncated reasoning" (Appendix A).
    """

    name: ClassVar[str] = "truncated"

    def __call__(self, row: Row) -> str | None:
        last = row["messages"][-1]
        if last["role"] != "assistant":
            return f"ends with a message of the {last['role']}, not with an answer"
        if not last["content"].strip() and not last.get("tool_calls"):
            return "the answer is empty"
        for holder in (row, *row["messages"]):
            reason = holder.get("finish_reason")
            if reason is not None and not is_complete(reason):
                return f"finish_reason is {reason}"
        return None


@dataclass
class Reasoning:
    """Answers whose reasoning does not end, begins twice, or ends in nothing.

    A lone `</think>` is right: the templates of several reasoning models open the block in the prompt.
    """

    name: ClassVar[str] = "reasoning"

    def __call__(self, row: Row) -> str | None:
        for message in row["messages"]:
            if message["role"] != "assistant":
                continue
            content, parsed = message["content"], str(message.get("reasoning_content") or "")
            opened, closed = content.count("<think>"), content.count("</think>")
            if "<think>" in parsed or "</think>" in parsed:
                return "<think> or </think> inside reasoning_content"
            if opened > 1 or closed > 1 or (parsed and opened + closed):
                return "reasoning twice"
            if opened and not closed:
                return "<think> without </think>"
            if opened and content.index("<think>") > content.index("</think>"):
                return "</think> before <think>"
            if closed and not content.split("</think>")[1].strip() and not message.get("tool_calls"):
                return "nothing after </think>"
        return None


@dataclass
class SpecialTokens:
    """Messages with the text of a chat special token, U+FFFD (bytes that were no text) or control characters.

    As text they become the real token when the row is tokenized, and end a turn where nobody ended it.
    """

    name: ClassVar[str] = "special_tokens"
    _BAD: ClassVar[re.Pattern[str]] = re.compile(
        r"<\|[a-zA-Z][a-zA-Z0-9_]*\|>|<｜[^｜<>\n]{1,40}｜>|[\x00-\x08\x0e-\x1f\x7f-\x9f\ufffd]"
    )

    def __call__(self, row: Row) -> str | None:
        for message in row["messages"]:
            if match := self._BAD.search(message_text(message)):
                return f"{match[0]!a} in a message of the {message['role']}"
        return None


@dataclass
class Length:
    """Answers and rows that are too short or too long, in tokens.

    Defaults: an answer shorter than K + 1 = 4 tokens has no position with all K targets; the paper generates at most
    4096 tokens; MiMo's context has 32768.

    Args:
        count: tokens of each message of a row
        min_answer_tokens: of the last answer
        max_answer_tokens: of any answer; paper: 4096
        max_row_tokens: of all messages together
    """

    count: CountTokens
    min_answer_tokens: int = 4
    max_answer_tokens: int = 4096
    max_row_tokens: int = 32768
    name: ClassVar[str] = "length"

    def __call__(self, row: Row) -> str | None:
        counts = self.count(row)
        answers = [n for n, m in zip(counts, row["messages"], strict=True) if m["role"] == "assistant"]
        if answers and answers[-1] < self.min_answer_tokens:
            return f"an answer of {answers[-1]} tokens"
        if answers and max(answers) > self.max_answer_tokens:
            return f"an answer of {max(answers)} tokens"
        return f"{sum(counts)} tokens" if sum(counts) > self.max_row_tokens else None


@dataclass
class Repetition:
    """Answers that repeat themselves: duplicate lines, duplicate 10-grams, or an end that loops.

    Lines and 10-grams are Gopher's measures, with wider limits. The loop, a unit of any length that the answer ends
    with at least `_LOOPS` times, is what small models fall into.

    Args:
        max_duplicate_lines: share of an answer's lines; Gopher: 0.3
        max_duplicate_ngrams: share of an answer's words in them; Gopher: 0.1
        min_loop_characters: an end that loops for less is no loop
    """

    max_duplicate_lines: float = 0.5
    max_duplicate_ngrams: float = 0.5
    min_loop_characters: int = 60
    name: ClassVar[str] = "repetition"
    _NGRAM: ClassVar[int] = 10
    _MIN_LINES: ClassVar[int] = 6
    _MIN_UNITS: ClassVar[int] = 50

    def __call__(self, row: Row) -> str | None:
        for message in row["messages"]:
            if message["role"] == "assistant" and (why := self._why(message_text(message))):
                return why
        return None

    def _why(self, text: str) -> str | None:
        if unit := looping_end(text, self.min_loop_characters):
            return f"ends with {unit!r} again and again"
        lines = [line for line in map(str.strip, text.splitlines()) if any(map(str.isalnum, line))]
        share = 1 - len(set(lines)) / len(lines) if len(lines) >= self._MIN_LINES else 0.0
        if share > self.max_duplicate_lines:
            return f"{share:.0%} of the lines are duplicates, as {Counter(lines).most_common(1)[0][0]!r}"
        words = units(text)
        share = duplicate_share(runs(words, self._NGRAM), self._NGRAM) if len(words) >= self._MIN_UNITS else 0.0
        return f"{share:.0%} of the words are in 10-grams said before" if share > self.max_duplicate_ngrams else None


_LOOPS = 5


def looping_end(text: str, min_characters: int) -> str:
    """The unit that the end of a text repeats at least five times over at least `min_characters`, or "".

    Linear: backwards from the end, the distance to the last occurrence of the last L characters is the period of a
    loop if there is one with a period up to L / 2 (Fine and Wilf's theorem); L doubles.
    """
    back = text.rstrip()[::-1]
    length = 2
    while length < len(back):
        period = back.find(back[:length], 1)
        if 0 < period <= length:
            times = max(_LOOPS, -(-min_characters // period))
            unit = back[:period]
            if back.startswith(unit * times) and any(map(str.isalnum, unit)):
                return unit[::-1]
        length *= 2
    return ""


def duplicate_share(hashes: Hashes, n: int) -> float:
    """Share of a text's units that lie in an n-gram which stood earlier in the text (Gopher's duplicate n-gram
    fraction, by units instead of characters). `hashes`: its n-grams, in order."""
    _, first = np.unique(hashes, return_index=True)
    again = np.ones(len(hashes), np.int64)
    again[first] = 0
    covered = np.convolve(again, np.ones(n, np.int64)) > 0
    return float(covered.mean())


@dataclass
class Language:
    """Answers in another language than their question, where both are long and clear enough to say so.

    Code and formulas do not count, and a question that speaks of languages or translation is not judged. A row's own
    `language` is believed if the answer agrees with it.
    """

    name: ClassVar[str] = "language"
    _ABOUT_LANGUAGES: ClassVar[re.Pattern[str]] = re.compile(
        r"translat|traduc|tradui|übersetz|翻[译譯]|[译譯][成为為]"
        r"|\b(?:english|chinese|mandarin|cantonese|french|german|spanish|japanese|korean|russian|italian|portuguese|latin"
        r"|arabic|hindi|polish|dutch|turkish|vietnamese|thai|indonesian)\b"
        r"|[英中汉漢法德俄日韩韓][文语語]|双语|雙語|西班牙|葡萄牙|意大利|阿拉伯|拉丁",
        re.I,
    )

    def __call__(self, row: Row) -> str | None:
        asked, answer = prompt_and_answer(row)
        spoken = language(answer)
        if spoken is None or language_code(row.get("language")) == spoken:
            return None
        expected = language(asked)
        if expected in (None, spoken) or self._ABOUT_LANGUAGES.search(asked):
            return None
        return f"asked in {expected}, answered in {spoken}"


@dataclass
class Refusals:
    """Answers that begin by refusing, in English or Chinese. Off by default: they are what the model says."""

    name: ClassVar[str] = "refusals"
    _REFUSAL: ClassVar[re.Pattern[str]] = re.compile(
        r"(?:i['’]?m|i am) (?:really |very |so )?(?:sorry|afraid)[^.!\n]{0,60}?"
        r"\b(?:can(?:no|['’])?t|unable|not able|won['’]t)"
        r"|^\W*(?:sorry[^a-z]{0,3})?i (?:can(?:no|['’])?t|am unable to|won['’]t) "
        r"(?:help|assist|provide|fulfil|comply|answer|do that)"
        r"|as an? (?:ai|artificial intelligence|large language model|language model)\b"
        r"|(?:抱歉|对不起|對不起|很遗憾)[^。！\n]{0,20}?(?:不能|无法|無法|不便|没办法)"
        r"|^\W*我(?:不能|无法|無法)(?:帮助|协助|提供|满足|回答|处理)|作为一?[个個名款]?(?:人工智能|AI|大?语言模型)",
        re.I,
    )

    def __call__(self, row: Row) -> str | None:
        for message in row["messages"]:
            if message["role"] == "assistant":
                begin = message["content"].split("</think>")[-1].strip()[:200]
                if match := self._REFUSAL.search(begin):
                    return f"refuses: {match[0]!r}"
        return None


@dataclass
class Decontaminate:
    """Rows whose prompt shares a 13-gram with an evaluation task, or is equal to a task shorter than that.

    Words, or characters of Chinese, after lower-casing (GPT-3, arXiv 2005.14165, appendix C). 13-grams that more than
    ten tasks of a file share are its template ("put your final answer within ..."); what is mostly template does not
    count.

    By default the bundled tasks only, never those that happen to be in this machine's cache: the same command keeps the
    same rows everywhere. `compared` says what was compared, for the report.

    Args:
        decontaminate: tasks, by name, as name=FILE or as files; default: smoke
    """

    decontaminate: list[str] = field(default_factory=lambda: list(bundled_tasks()))
    name: ClassVar[str] = "decontaminate"
    _NGRAM: ClassVar[int] = 13
    _TEMPLATE: ClassVar[int] = 10

    def __post_init__(self) -> None:
        self._file_of: dict[int, str] = {}
        self.compared: list[dict[str, Any]] = []
        for path in self.decontaminate:
            texts = [text for text in _task_texts(path) if text.strip()]
            digest = hashlib.sha256(json.dumps(texts, ensure_ascii=False).encode()).hexdigest()
            self.compared.append({"task": path, "prompts": len(texts), "sha256": digest})
            tasks = [runs(units(text), self._NGRAM) for text in texts]
            number = Counter(h for task in tasks for h in set(task.tolist()))
            for task in tasks:
                template = np.array([number[h] > self._TEMPLATE for h in task.tolist()], np.int64)
                covered = np.convolve(template, np.ones(self._NGRAM, np.int64)) > 0
                # Also what begins or ends in the template: more than half of its units are.
                of_template = np.convolve(covered, np.ones(self._NGRAM, np.int64), "valid") > self._NGRAM // 2
                self._file_of.update(dict.fromkeys(task[~of_template].tolist(), path))

    def __call__(self, row: Row) -> str | None:
        if not self._file_of:
            return None
        for message in row["messages"]:
            if message["role"] != "assistant":
                words = units(message["content"])
                for at, h in enumerate(runs(words, self._NGRAM).tolist()):
                    if h in self._file_of:
                        return f"in {self._file_of[h]}: {' '.join(words[at : at + self._NGRAM])!r}"
        return None


ALL = 10**9
"""Questions of a task: more than there are."""


def bundled_tasks() -> list[str]:
    """Names of the evaluation tasks whose prompts are in this package."""
    return sorted(path.stem for path in (Path(__file__).parent / "tasks").glob("*.jsonl"))


def _task_texts(path: str) -> list[str]:
    """What is asked in each task of a JSONL file with `messages`, `prompt` or `turns`, or of a task of
    `tasks.py`: its name, or name=FILE. A name is a name, whatever files this folder has."""
    from .tasks import load_task, task_names

    if path.partition("=")[0].partition(":")[0] in task_names():
        return [turn for question in load_task(path, ALL).questions for turn in question.turns]
    texts: list[str] = []
    number = 0
    try:
        with inputs.open_file(path) as file:
            while line := file.readline(MAX_ROW_BYTES):
                number += 1
                if not line.strip():
                    continue
                task = inputs.loads(line.removeprefix(BOM_UTF8) if number == 1 else line)
                asked = list(task.get("turns", []))
                if not asked or "messages" in task or "prompt" in task:
                    asked += [m["content"] for m in normalize(task)["messages"] if m["role"] == "user"]
                if not asked or not all(isinstance(text, str) for text in asked):
                    raise KeyError
                texts += asked
    except FastMTPError as error:
        raise FastMTPError(f"--decontaminate {error}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise FastMTPError(f"--decontaminate {path}: cannot be read ({error})") from None
    except ValueError as error:
        raise FastMTPError(f"--decontaminate {path}:{number}: not JSON ({error})") from None
    except (KeyError, TypeError, AttributeError, UnreadableRowError):
        raise FastMTPError(
            f"--decontaminate {path}:{number}: a task needs `messages`, `prompt` or `turns` (a list of strings)"
        ) from None
    if not texts:
        raise FastMTPError(f"--decontaminate {path}: holds no tasks")
    return texts


@dataclass
class Asked:
    """Rows that the chat template of --model renders otherwise than they were asked, or cannot render, and rows with
    ids that it does not have. Only with --model."""

    model: str | None
    name: ClassVar[str] = "asked"

    def __post_init__(self) -> None:
        self._tokenizer = load_tokenizer(self.model) if self.model else None
        self._vocab_size = Checkpoint(self.model).vocab_size if self.model else 0

    def __call__(self, row: Row) -> str | None:
        if self._tokenizer is None:
            return None
        try:
            check_row_ids(row, self._vocab_size)
            if not self._tokenizer.chat_template:
                return None
            other = rendered_otherwise(self._tokenizer, row)
            for example in training_examples(self._tokenizer, row):
                check_vocabulary(example, self._vocab_size)
        except FastMTPError as error:
            return str(error)
        if other is None:
            return None
        return f"asked {other.kept!r}, the chat template of --model renders {other.rendered!r}"


class TokenCounter:
    """Tokens of each message: its own `token_ids`, else by the tokenizer of a model folder, else an estimate."""

    def __init__(self, model: str | None = None) -> None:
        self._tokenizer = load_tokenizer(model) if model else None
        self._vocab_size = Checkpoint(model).vocab_size if model else None
        self._row: Row | None = None
        self._counts: list[int] = []
        self.how: Counter[str] = Counter()

    def __call__(self, row: Row) -> list[int]:
        if row is not self._row:
            self._row, self._counts = row, [self._count(m) for m in row["messages"]]
        return self._counts

    def check(self, row: Row) -> None:
        """Raises `FastMTPError` for token ids that are none, or that the model does not have."""
        if self._vocab_size is not None:
            check_row_ids(row, self._vocab_size)

    def _count(self, message: dict[str, Any]) -> int:
        ids = message.get("token_ids")
        if isinstance(ids, list):
            self.how["token_ids"] += 1
            return len(ids)
        text = message_text(message)
        self.how["tokenizer" if self._tokenizer else "estimate"] += 1
        if self._tokenizer:
            return len(self._tokenizer.encode(text, add_special_tokens=False))
        return estimate_tokens(text)


_CJK = re.compile(f"[{CJK}]")


def estimate_tokens(text: str) -> int:
    """Tokens of a text for Qwen2's tokenizer (MiMo's), about: CJK characters / 1.3 + other characters / 3.8.

    Within a third for prose and code; formulas, whose digits are tokens, have up to twice as many.
    """
    cjk = len(_CJK.findall(text))
    return -int(-(cjk / 1.3 + (len(text) - cjk) / 3.8) // 1)
