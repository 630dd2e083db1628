"""What `fastmtp bench` is to do: a plan of a few lines becomes every server, its command, and every run.

One entry under `servers` is a whole sweep: it stands for one server per number of drafts and token map. So the paper's
ablation is five lines. What is left out has the paper's value.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.config_file import read_config
from ..data.client import Sampling, check_address
from ..data.tasks import Task, load_task
from ..errors import FastMTPError
from ..files.inputs import check_file
from ..files.schema import check_values
from ..files.show import MAX_INTEGER, listed, show, show_key
from ..method.token_map import CONFIG_KEY, check_tokenizer, read_token_map
from ..redaction import HIDDEN, is_secret_name, redact_words, without_login
from ..serving.launch import command, serve_flags
from ..serving.sglang_plugin import VARIABLE
from .plan_file import Filled, as_written, read_file, several, typed, variables_in
from .results import MAX_STEPS, Server

METHODS = ("baseline", "vanilla", "tuned", "tuned+map")
NO_MAP = "none"
"""As `token_map`: the whole vocabulary, even of a head that has maps of its own."""
ENGINES = ("sglang", "vllm")
MAX_SERVERS = 1000
MAX_RUNS = 100_000
MAX_NAME_BYTES = 200
"""Of a server's name, from which its log has its own."""
MAX_TEXT = 1000
"""Characters of a name or a path."""
MAX_WORD = 100_000
"""Of a word of a command, which may be a script; Linux takes no longer ones."""


@dataclass
class Launch:
    """How to reach one configuration: an address, or a command to start it with."""

    server: Server
    base_url: str | None = None
    command: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def shown_command(self) -> list[str]:
        """The command for people: `${NAME}` where a variable was filled in, and no key."""
        return redact_words(as_written(self.command))


@dataclass
class Plan:
    """Everything that is decided before the first request."""

    model: str
    tasks: dict[str, Task]
    launches: dict[str, Launch]
    sampling: Sampling
    temperatures: list[float]
    concurrency: list[int]
    seed: int
    warmup: int
    baseline: str | None
    served_model_name: str | None
    timeout: float
    retry_seconds: float
    start_seconds: float

    def record(self) -> dict[str, Any]:
        """What `plan.json` holds, and what must be the same to go on in a folder."""
        sampling = {k: v for k, v in asdict(self.sampling).items() if k != "temperature"}
        tasks = {name: task.info() for name, task in self.tasks.items()}
        record: dict[str, Any] = as_written(
            {
                "settings": {**sampling, "seed": self.seed, "warmup": self.warmup, "tasks": tasks},
                "temperatures": self.temperatures,
                "concurrency": self.concurrency,
                "servers": {name: asdict(launch.server) for name, launch in self.launches.items()},
                "environments": {name: _digests(launch.environment) for name, launch in self.launches.items()},
                "baseline": self.baseline,
            }
        )
        if names := variables_in(json.dumps(record, ensure_ascii=False)):
            record["variables"] = _digests({name: os.environ[name] for name in names})
        return record


def _digests(environment: dict[str, str]) -> dict[str, str]:
    """Enough to see that a value changed. Of a key not even that: another one measures the same."""
    found = {}
    for name, value in environment.items():
        if isinstance(value, Filled):
            found[name] = value.shown
        elif is_secret_name(name):
            found[name] = HIDDEN
        else:
            found[name] = hashlib.sha256(value.encode()).hexdigest()[:12]
    return found


# Keys of a plan, and their defaults.
_PLAN: dict[str, Any] = {
    "model": None,
    "tasks": ["smoke"],
    "num_questions": None,
    "max_new_tokens": 1024,
    "temperatures": [0.0],
    "top_k": 20,
    "top_p": 0.95,
    "chat_template_kwargs": {},
    "concurrency": [1],
    "num_steps": [3],
    "seed": 0,
    "warmup": 4,
    "baseline": None,
    "served_model_name": None,
    "engine": "sglang",
    "python": None,
    "flags": [],
    "environment": {},
    "timeout": 600.0,
    "retry_seconds": 60.0,
    "start_seconds": 1800.0,
    "servers": {},
}
_SERVER = (
    *("label", "method", "folder", "num_steps", "token_map", "base_url", "command", "python", "flags", "environment"),
)


def read_plan(paths: str | Sequence[str]) -> dict[str, Any]:
    """Plan files (YAML), put together: values of a later one go before, its `flags`, `environment` and `servers` are
    added. `${NAME}` is the environment variable.

    Raises `FastMTPError` if one is no plan, or names a variable that is not set.
    """
    plan: dict[str, Any] = {}
    for path in [paths] if isinstance(paths, str) else paths:
        for key, value in read_file(path).items():
            if isinstance(value, dict) and isinstance(plan.get(key), dict):
                plan[key] = {**plan[key], **value}
            elif key == "flags" and isinstance(value, list) and isinstance(plan.get(key, []), list):
                plan[key] = [*plan.get(key, []), *value]
            else:
                plan[key] = value
    return plan


def make_plan(values: dict[str, Any]) -> Plan:
    """The whole plan of the values that a user gave (`_PLAN` has their names and defaults).

    Raises `FastMTPError` naming the key that is unknown, of another kind, or cannot be done.
    """
    given = _checked({**_PLAN, **_known_keys(values)})
    launches: dict[str, Launch] = {}
    for name, server in given["servers"].items():
        for full, launch in _expand(str(name), {} if server is None else server, given).items():
            if full in launches:
                raise FastMTPError(f"servers.{name}: two servers would be called {full}; rename one")
            launches[full] = launch
        if len(launches) > MAX_SERVERS:
            raise FastMTPError(f"servers: they stand for more than {MAX_SERVERS}; measure them in several folders")
    runs = len(launches) * len(given["temperatures"]) * len(given["concurrency"]) * len(given["tasks"])
    if runs > MAX_RUNS:
        raise FastMTPError(f"a plan of {runs} runs; at most {MAX_RUNS}: measure them in several folders")
    tasks = {}
    for spec in given["tasks"]:
        task = load_task(spec, given["num_questions"], given["seed"])
        if task.name in tasks:
            raise FastMTPError(f"tasks: two are called {task.name}; name one as name=FILE")
        tasks[task.name] = task
    baseline = given["baseline"] or next((n for n, x in launches.items() if x.server.method == "baseline"), None)
    if baseline is not None and baseline not in launches:
        raise FastMTPError(f"baseline: {show(baseline)} is not among the servers {listed(list(launches), 20)}")
    if baseline is not None:  # first, so that every other run is compared as soon as it ends
        launches = {baseline: launches.pop(baseline), **launches}
    return Plan(
        model=given["model"],
        tasks=tasks,
        launches=launches,
        sampling=Sampling(
            max_new_tokens=given["max_new_tokens"],
            top_k=given["top_k"],
            top_p=given["top_p"],
            chat_template_kwargs=given["chat_template_kwargs"],
        ),
        temperatures=[float(t) for t in given["temperatures"]],
        concurrency=given["concurrency"],
        baseline=baseline,
        **{k: given[k] for k in ("seed", "warmup", "served_model_name", "timeout", "retry_seconds", "start_seconds")},
    )


def _known_keys(values: dict[str, Any]) -> dict[str, Any]:
    _check_keys(values, _PLAN, "a plan")
    return {k: v for k, v in values.items() if v is not None}


# Largest values; what is beyond is a slip, and some of it would not end.
_NUMBERS: dict[str, tuple[float, float, bool]] = {
    "timeout": (1e-9, 1e9, False),
    "retry_seconds": (1e-9, 1e9, False),
    "start_seconds": (1e-9, 1e9, False),
    "temperatures": (0, 1000, False),
    "top_p": (0, 1, False),
    "top_k": (-1, 1e9, True),
    "max_new_tokens": (1, 1e9, True),
    "concurrency": (1, 1e5, True),
    "num_steps": (1, MAX_STEPS, True),
    "seed": (0, MAX_INTEGER, True),
    "warmup": (0, 1e6, True),
    "num_questions": (1, 1e9, True),
}
"""Key of a plan -> least, most, and whether it is whole."""
_SEVERAL = ("tasks", "temperatures", "concurrency", "num_steps")
"""Keys of a plan that may hold a list."""


def _checked(given: dict[str, Any]) -> dict[str, Any]:
    """The values of a plan, each of its kind. Raises `FastMTPError` naming the first key that is not."""
    if not given["model"]:
        raise FastMTPError("model: a plan needs the folder of the model, for its chat template and the baseline")
    for name in _SEVERAL:
        given[name] = _list(given[name], name)
    for name, (least, most, whole) in _NUMBERS.items():
        if given[name] is None:
            continue
        given[name] = typed(given[name])
        for value in given[name] if name in _SEVERAL else [given[name]]:
            _number(value, name, least, whole, most)
    for name in ("model", "engine", "python", "served_model_name", "baseline"):
        if given[name] is not None:
            given[name] = _text(given[name], name)
    if given["engine"] not in ENGINES:
        raise FastMTPError(f"engine: {show(given['engine'])} is none of {', '.join(ENGINES)}")
    given["tasks"] = [_text(spec, "tasks") for spec in given["tasks"]]
    given["flags"] = _words(given["flags"], "flags")
    given["environment"] = _environment(given["environment"], "environment")
    kwargs = given["chat_template_kwargs"] = typed(given["chat_template_kwargs"])
    if not isinstance(kwargs, dict):
        raise FastMTPError(f"chat_template_kwargs: must be a mapping, not {type(kwargs).__name__}")
    check_values(kwargs, "chat_template_kwargs")
    if not isinstance(given["servers"], dict) or not given["servers"]:
        raise FastMTPError("servers: a plan needs at least one")
    return given


def server_urls(words: Sequence[str]) -> dict[str, dict[str, Any]]:
    """`servers` of a plan from `--base_url` words, each `URL` or `name=URL`. The name tells the method, if it can.

    Raises `FastMTPError` for a name that is there twice, or an address that is none.
    """
    found: dict[str, dict[str, Any]] = {}
    for word in words:
        name, mark, url = word.partition("=")
        if not mark or "/" in name:
            name, url = "", word
        check_address(url, "--base_url")
        if not name:
            host = without_login(url).split("//")[-1].rstrip("/").removesuffix("/v1")
            name = "server" if len(words) == 1 else host.replace("/", "-")
        if name in found:
            raise FastMTPError(f"--base_url {without_login(url)}: the name {name} is there twice")
        method = next((m for m in reversed(METHODS) if name.lower().startswith(m)), None)
        found[name] = {"base_url": url, "label": name, **({"method": method} if method else {})}
    return found


def _expand(name: str, server: Any, plan: dict[str, Any]) -> dict[str, Launch]:
    """One entry of `servers` as one server per number of drafts and token map."""
    _check_name(name)
    where = f"servers.{name}"
    if not isinstance(server, dict):
        raise FastMTPError(f"{where}: must be a mapping, not {type(server).__name__}")
    _check_keys(server, _SERVER, where)
    server = {key: value for key, value in server.items() if value is not None}
    for key in ("label", "method", "folder", "base_url", "python"):
        if key in server:
            server[key] = _text(server[key], f"{where}.{key}")
    method = server.get("method")
    if method is not None and method not in METHODS:
        raise FastMTPError(f"{where}.method: {show(method)} is none of {', '.join(METHODS)}")
    if server.get("base_url"):
        return {name: _running(server, plan, name, method)}
    for key in ("command", "flags"):
        if key in server:
            server[key] = _words(server[key], f"{where}.{key}")
    server["environment"] = _environment(server.get("environment", {}), f"{where}.environment")
    folder = server.get("folder")
    if folder is None and not server.get("command"):
        method = method or "baseline"
    if method == "baseline":
        return {name: _launch(server, plan, name, method, 0, None)}
    if folder is None and server.get("command") is None:
        raise FastMTPError(f"{where}: needs `folder` (what to serve), `command` or `base_url`")
    maps: list[str | None] = [None]
    if server.get("token_map"):
        maps = [_text(path, f"{where}.token_map") for path in _list(server["token_map"], "token_map")]
    found = {}
    all_steps = typed(_list(server.get("num_steps", plan["num_steps"]), "num_steps"))
    if len(all_steps) * len(maps) > MAX_SERVERS:
        raise FastMTPError(f"{where}: stands for more than {MAX_SERVERS} servers; measure them in several folders")
    for steps in all_steps:
        _number(steps, f"{where}.num_steps", 1, True, MAX_STEPS)
        for path in maps:
            full = f"{name}-k{steps}" + (f"-{Path(path).stem}" if path and len(maps) > 1 else "")
            _check_name(full)
            found[full] = _launch(server, plan, name, method, int(steps), path)
    return found


def _check_name(name: str) -> None:
    """Raises `FastMTPError` for a server's name that its log could not have: it would lead out of the folder."""
    plain = name.isprintable() and "/" not in name and "\\" not in name and name.strip(". ") == name
    if not plain or not name or len(name.encode(errors="replace")) > MAX_NAME_BYTES:
        raise FastMTPError(
            f"servers.{show(name)}: its log has the name of the server, which must be plain: no slash, no dot at "
            f"an end, at most {MAX_NAME_BYTES} bytes; `label` is what tables show"
        )


def _running(server: dict[str, Any], plan: dict[str, Any], name: str, method: str | None) -> Launch:
    """A server that is there already; what it is, it is asked later."""
    where = f"servers.{name}"
    check_address(server["base_url"], f"{where}.base_url")
    steps = typed(server.get("num_steps", -1))
    if "num_steps" in server:
        _number(steps, f"{where}.num_steps", 0, True, MAX_STEPS)
    token_map = server.get("token_map")
    if token_map is not None:
        token_map = _text(token_map, f"{where}.token_map")
    label, model = server.get("label", name), plan["model"]
    spec = Server(label, method or "", steps, token_map, None, model, None, None)
    return Launch(spec, base_url=server["base_url"])


def _launch(
    server: dict[str, Any], plan: dict[str, Any], name: str, method: str | None, steps: int, asked: str | None
) -> Launch:
    folder = server.get("folder") or plan["model"]
    environment = {**plan["environment"], **server["environment"]}
    static = asked if asked and asked != NO_MAP and Path(asked).suffix != ".json" else None
    token_map = asked if asked != NO_MAP else None
    if server.get("command"):
        words = [word.replace("{num_steps}", str(steps)) for word in server["command"]]
    else:
        flags = serve_flags(folder, plan["engine"], steps or None, static, plan["model"])
        dropped = "--speculative" if not steps else "--speculative-token-map" if asked and not static else None
        words = command([f for f in flags if not (dropped and f.words[0].startswith(dropped))])
        # The paths among them are those of the plan, with the variables that it names.
        from_plan = {str(Path(path)): path for path in (folder, plan["model"], static) if isinstance(path, Filled)}
        words = [from_plan.get(word, word) for word in words]
        if asked is None and "--speculative-token-map" in words:  # the one that the head was trained inside
            static = token_map = words[words.index("--speculative-token-map") + 1]
        if asked is None and static is None and steps and CONFIG_KEY in read_config(Path(folder)):
            token_map = f"{folder}/config.json"
        elif plan["engine"] == "sglang":  # what a server does about maps is said, not found where it happens to run
            environment[VARIABLE] = token_map if token_map and not static else NO_MAP
        python = server.get("python") or plan["python"]
        if python and words[0] == "python":
            words[0] = python
    words += [*plan["flags"], *server.get("flags", [])]
    size = None
    if static is not None:
        check_file(static)
        size = len(read_token_map(static, Checkpoint(plan["model"]).vocab_size))
        check_tokenizer(static, plan["model"])
    vanilla = os.path.realpath(folder) == os.path.realpath(plan["model"])
    program, *arguments = redact_words(as_written(words))
    spec = Server(
        label=server.get("label", name),
        method=method or ("tuned+map" if token_map else "vanilla" if vanilla and server.get("folder") else "tuned"),
        num_steps=steps,
        token_map=Path(token_map).stem if token_map else None,
        token_map_size=size,
        model=plan["model"],
        draft_model=folder if steps else None,
        command=[Path(program).name, *arguments],  # where Python lies is nobody else's business
    )
    return Launch(spec, command=words, environment=environment)


def _check_keys(values: dict[str, Any], known: Any, where: str) -> None:
    for key in values:
        if key not in known:
            raise FastMTPError(f"{where} has no {show(key)}; it has {', '.join(known)}")


def _list(value: Any, name: str) -> list[Any]:
    """A plan may name one where several are possible."""
    found = []
    for element in value if isinstance(value, list) else [value]:
        found += several(element)
    different = {x if isinstance(x, str | int | float) else show(x) for x in found}
    if not found or len(different) < len(found):
        raise FastMTPError(f"{name}: needs at least one value, and none twice")
    return found


def _words(value: Any, where: str) -> list[str]:
    """Words of a command line; YAML reads some of them as numbers."""
    found = []
    for element in value if isinstance(value, list) else [value]:
        found += [_text(word, where, MAX_WORD) for word in several(element)]
    return found


def _environment(value: Any, where: str) -> dict[str, str]:
    if not isinstance(value, dict):
        raise FastMTPError(f"{where}: must be a mapping of variables, not {type(value).__name__}")
    found = {}
    for name, text in value.items():
        key = _text(name, where)
        if not key or "=" in key:
            raise FastMTPError(f"{where}: {show(key)} is no name of a variable")
        found[key] = _text(text, f"{where}.{show_key(key)}", MAX_WORD)
    return found


def _text(value: Any, where: str, most: int = MAX_TEXT) -> str:
    """A text; numbers and paths become one."""
    if not isinstance(value, str | int | float | Path) or "\0" in str(value):
        raise FastMTPError(f"{where}: must be a text, not {show(value)}")
    if len(str(value)) > most:
        raise FastMTPError(f"{where}: {show(value)} is longer than {most} characters")
    return value if isinstance(value, str) else str(value)


def _number(value: Any, name: str, least: float, whole: bool, most: float) -> None:
    is_number = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
    if not is_number or not value >= least:  # NaN is not
        kind = "whole number" if whole else "number"
        bound = "above 0" if 0 < least < 1 else f"at least {least:g}"
        raise FastMTPError(f"{name}: {show(value)} must be a {kind}, {bound}")
    if value > most:
        raise FastMTPError(f"{name}: {show(value)} is too much; at most {most:g}")
