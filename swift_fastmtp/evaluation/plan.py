"""What `fastmtp bench` is to do: a plan of a few lines becomes every server, its command, and every run.

One entry under `servers` is a whole sweep: it stands for one server per number of drafts and token map. So the paper's
ablation is five lines. What is left out has the paper's value.
"""

import hashlib
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ..data.client import Sampling
from ..errors import FastMTPError
from ..export.serve_args import command, serve_flags
from ..families import read_config
from ..serving.sglang_plugin import VARIABLE
from ..vocab.maps import CONFIG_KEY, check_tokenizer, read_token_map
from .results import Server
from .tasks import Task, load_task

METHODS = ("baseline", "vanilla", "tuned", "tuned+map")
NO_MAP = "none"
"""As `token_map`: the whole vocabulary, even of a head that has maps of its own."""


@dataclass
class Launch:
    """How to reach one configuration: an address, or a command to start it with."""

    server: Server
    base_url: str | None = None
    command: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)


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
        return {
            "settings": {**sampling, "seed": self.seed, "warmup": self.warmup, "tasks": tasks},
            "temperatures": self.temperatures,
            "concurrency": self.concurrency,
            "servers": {name: asdict(launch.server) for name, launch in self.launches.items()},
            "environments": {name: _digests(launch.environment) for name, launch in self.launches.items()},
            "baseline": self.baseline,
        }


def _digests(environment: dict[str, str]) -> dict[str, str]:
    """Enough to see that a value changed; a value may be a secret."""
    return {name: hashlib.sha256(value.encode()).hexdigest()[:12] for name, value in environment.items()}


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
        for key, value in _read_file(path).items():
            if isinstance(value, dict) and isinstance(plan.get(key), dict):
                plan[key] = {**plan[key], **value}
            else:
                plan[key] = [*plan.get(key, []), *value] if key == "flags" and isinstance(value, list) else value
    return plan


def _read_file(path: str) -> dict[str, Any]:
    def variable(found: re.Match[str]) -> str:
        if found[1] not in os.environ:
            raise FastMTPError(f"{path}: ${{{found[1]}}} is not set; set the variable, or write its value")
        return os.environ[found[1]]

    try:
        value = yaml.safe_load(re.sub(r"\$\{(\w+)\}", variable, Path(path).read_text(encoding="utf-8")))
    except OSError as error:
        raise FastMTPError(f"{path}: cannot be read ({error})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise FastMTPError(f"{path}: not YAML ({' '.join(str(error).split())})") from None
    if not isinstance(value, dict):
        raise FastMTPError(f"{path}: a plan is a mapping with `servers`, not {type(value).__name__}")
    return value


def make_plan(values: dict[str, Any]) -> Plan:
    """The whole plan of the values that a user gave (`_PLAN` has their names and defaults).

    Raises `FastMTPError` naming the key that is unknown, of another kind, or cannot be done.
    """
    _check_keys(values, _PLAN, "a plan")
    given = {**_PLAN, **{k: v for k, v in values.items() if v is not None}}
    for name in ("tasks", "temperatures", "concurrency", "num_steps"):
        given[name] = _list(given[name], name)
    if not given["model"]:
        raise FastMTPError("model: a plan needs the folder of the model, for its chat template and the baseline")
    for name in ("timeout", "retry_seconds", "start_seconds"):
        _number(given[name], name, 1e-9)
    for value in given["temperatures"]:
        _number(value, "temperatures", 0)
    for name, least in (("max_new_tokens", 1), ("concurrency", 1), ("num_steps", 1), ("seed", 0), ("warmup", 0)):
        for value in given[name] if isinstance(given[name], list) else [given[name]]:
            _number(value, name, least, whole=True)
    if given["num_questions"] is not None:
        _number(given["num_questions"], "num_questions", 1, whole=True)
    launches: dict[str, Launch] = {}
    if not isinstance(given["servers"], dict) or not given["servers"]:
        raise FastMTPError("servers: a plan needs at least one")
    for name, server in given["servers"].items():
        for full, launch in _expand(str(name), server or {}, given).items():
            if full in launches:
                raise FastMTPError(f"servers.{name}: two servers would be called {full}; rename one")
            launches[full] = launch
    tasks = {}
    for spec in given["tasks"]:
        task = load_task(str(spec), given["num_questions"], given["seed"])
        if task.name in tasks:
            raise FastMTPError(f"tasks: two are called {task.name}; name one as name=FILE")
        tasks[task.name] = task
    baseline = given["baseline"] or next((n for n, x in launches.items() if x.server.method == "baseline"), None)
    if baseline is not None and baseline not in launches:
        raise FastMTPError(f"baseline: {baseline!r} is not among the servers {', '.join(launches)}")
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


def server_urls(words: Sequence[str]) -> dict[str, dict[str, Any]]:
    """`servers` of a plan from `--base_url` words, each `URL` or `name=URL`. The name tells the method, if it can."""
    found: dict[str, dict[str, Any]] = {}
    for word in words:
        name, mark, url = word.partition("=")
        if not mark or "/" in name:
            name, url = "server" if len(words) == 1 else word.split("//")[-1], word
        if name in found:
            raise FastMTPError(f"--base_url {word}: the name {name} is there twice")
        method = next((m for m in reversed(METHODS) if name.lower().startswith(m)), None)
        found[name] = {"base_url": url, "label": name, **({"method": method} if method else {})}
    return found


def _expand(name: str, server: dict[str, Any], plan: dict[str, Any]) -> dict[str, Launch]:
    """One entry of `servers` as one server per number of drafts and token map."""
    where = f"servers.{name}"
    if not isinstance(server, dict):
        raise FastMTPError(f"{where}: must be a mapping, not {type(server).__name__}")
    _check_keys(server, _SERVER, where)
    method = server.get("method")
    if method is not None and method not in METHODS:
        raise FastMTPError(f"{where}.method: {method!r} is none of {', '.join(METHODS)}")
    if server.get("base_url"):
        spec = Server(
            server.get("label", name),
            method or "",
            int(server.get("num_steps", -1)),
            server.get("token_map"),
            None,
            plan["model"],
            None,
            None,
        )
        return {name: Launch(spec, base_url=server["base_url"])}
    folder = server.get("folder")
    if folder is None and not server.get("command"):
        method = method or "baseline"
    if method == "baseline":
        return {name: _launch(server, plan, where, method, 0, None)}
    if folder is None and server.get("command") is None:
        raise FastMTPError(f"{where}: needs `folder` (what to serve), `command` or `base_url`")
    maps: list[str | None] = _list(server.get("token_map"), "token_map") if server.get("token_map") else [None]
    found = {}
    for steps in _list(server.get("num_steps", plan["num_steps"]), "num_steps"):
        _number(steps, f"{where}.num_steps", 1, whole=True)
        for path in maps:
            full = f"{name}-k{steps}" + (f"-{Path(path).stem}" if path and len(maps) > 1 else "")
            found[full] = _launch(server, plan, where, method, int(steps), path)
    return found


def _launch(
    server: dict[str, Any], plan: dict[str, Any], where: str, method: str | None, steps: int, asked: str | None
) -> Launch:
    folder = str(server.get("folder") or plan["model"])
    environment = {**plan["environment"], **server.get("environment", {})}
    static = asked if asked and asked != NO_MAP and Path(asked).suffix != ".json" else None
    token_map = asked if asked != NO_MAP else None
    if server.get("command"):
        words = [str(word).replace("{num_steps}", str(steps)) for word in _list(server["command"], "command")]
    else:
        flags = serve_flags(folder, plan["engine"], steps or None, static, plan["model"])
        dropped = "--speculative" if not steps else "--speculative-token-map" if asked and not static else None
        words = command([f for f in flags if not (dropped and f.words[0].startswith(dropped))])
        if asked is None and "--speculative-token-map" in words:  # the one that the head was trained inside
            static = token_map = words[words.index("--speculative-token-map") + 1]
        if asked is None and static is None and steps and CONFIG_KEY in read_config(Path(folder)):
            token_map = f"{folder}/config.json"
        elif plan["engine"] == "sglang":  # what a server does about maps is said, not found where it happens to run
            environment[VARIABLE] = token_map if token_map and not static else NO_MAP
        python = server.get("python") or plan["python"]
        if python and words[0] == "python":
            words[0] = str(python)
    words += [str(word) for word in (*plan["flags"], *server.get("flags", []))]
    size = None
    if static is not None:
        size = len(read_token_map(static, read_config(Path(plan["model"]))["vocab_size"]))
        check_tokenizer(static, plan["model"])
    vanilla = Path(folder).resolve() == Path(plan["model"]).resolve()
    spec = Server(
        label=server.get("label", where.split(".", 1)[1]),
        method=method or ("tuned+map" if token_map else "vanilla" if vanilla and server.get("folder") else "tuned"),
        num_steps=steps,
        token_map=Path(token_map).stem if token_map else None,
        token_map_size=size,
        model=str(plan["model"]),
        draft_model=folder if steps else None,
        command=[Path(words[0]).name, *words[1:]],  # where Python lies is nobody else's business
    )
    return Launch(spec, command=words, environment={k: str(v) for k, v in environment.items()})


def _check_keys(values: dict[str, Any], known: Any, where: str) -> None:
    for key in values:
        if key not in known:
            raise FastMTPError(f"{where} has no {key!r}; it has {', '.join(known)}")


def _list(value: Any, name: str) -> list[Any]:
    """A plan may name one where several are possible."""
    found = value if isinstance(value, list) else [value]
    if not found or len({str(x) for x in found}) < len(found):
        if name in ("command", "flags"):
            return found
        raise FastMTPError(f"{name}: needs at least one value, and none twice")
    return found


def _number(value: Any, name: str, least: float, whole: bool = False) -> None:
    if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)) or value < least:
        kind = "whole number" if whole else "number"
        raise FastMTPError(f"{name}: {value!r} must be a {kind}, {'above 0' if 0 < least < 1 else f'at least {least}'}")
