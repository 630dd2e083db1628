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
from ..checkpoint.config_file import TOKEN_MAPS_KEY, TOKEN_MAPS_VARIABLE
from ..data.client import Sampling, check_address
from ..data.tasks import Question, Task, load_task
from ..errors import FastMTPError
from ..files.inputs import check_file
from ..files.schema import build, check_values
from ..files.show import listed, show
from ..method.map_files import check_tokenizer
from ..method.verification import REGIMES
from ..redaction import HIDDEN, is_secret_name, redact_words, without_login
from ..serving.flags import ENVIRONMENT, command, static_map
from ..serving.launch import flags_for, scheduled_flags
from ..serving.regime_flags import sampled_flags
from ..serving.schedule_flags import read_schedule
from .distribution import DISTRIBUTION, sampled_questions
from .plan_file import Filled, as_written, read_file, variables_in
from .plan_keys import METHODS, PlanKeys, ServerKeys
from .results import Server

NO_MAP = "none"
"""As `token_map`: the whole vocabulary, even of a head that has maps of its own."""
TOGETHER_ROUNDS, APART_ROUNDS = 3, 2
"""What is measured without `rounds`: A B, B A, A B; or, where each start takes minutes, A B A."""
MAX_SERVERS = 1000
MAX_RUNS = 100_000
MAX_NAME_BYTES = 200
"""Of a server's name, from which its log has its own."""


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
    rounds: int
    together: bool
    """All servers are up while any of them is measured."""
    questions_per_slot: int | None
    """How many conversations a run has for each that is on its way at once, the task's first; None: all."""
    distribution_samples: int
    """Answers to each prompt that test the distribution; 0: no test."""

    def questions(self, task: str, concurrency: int) -> list[Question]:
        """What a run asks."""
        if task == DISTRIBUTION:
            of_tasks = [(name, one.questions) for name, one in self.tasks.items()]
            return sampled_questions(of_tasks, self.distribution_samples)
        questions = self.tasks[task].questions
        return questions[: self.questions_per_slot * concurrency] if self.questions_per_slot else questions

    def record(self) -> dict[str, Any]:
        """What `plan.json` holds, and what must be the same to go on in a folder."""
        sampling = {k: v for k, v in asdict(self.sampling).items() if k != "temperature"}
        tasks = {name: task.info() for name, task in self.tasks.items()}
        # A single round is recorded as it was before there were several, so that such a folder can be gone on with.
        rounds = {"rounds": self.rounds, "together": self.together} if self.rounds > 1 else {}
        samples = {"distribution_samples": self.distribution_samples} if self.distribution_samples else {}
        per_slot = {"questions_per_slot": self.questions_per_slot} if self.questions_per_slot else {}
        record: dict[str, Any] = as_written(
            {
                "settings": {**sampling, "seed": self.seed, "warmup": self.warmup, **rounds, "tasks": tasks},
                "temperatures": self.temperatures,
                "concurrency": self.concurrency,
                **per_slot,
                **samples,
                "servers": {name: _as_recorded(launch.server) for name, launch in self.launches.items()},
                "environments": {name: _digests(launch.environment) for name, launch in self.launches.items()},
                "baseline": self.baseline,
            }
        )
        if names := variables_in(json.dumps(record, ensure_ascii=False)):
            record["variables"] = _digests({name: os.environ[name] for name in names})
        return record


def _as_recorded(server: Server) -> dict[str, Any]:
    """Without a schedule as before there were any, so that such a folder can be gone on with."""
    record = asdict(server)
    if server.schedule is None:
        del record["schedule"]
    return record


def _digests(environment: dict[str, str]) -> dict[str, str]:
    """Enough to see that a value changed. Of a key not even that: another one measures the same."""
    digests = {}
    for name, value in environment.items():
        if isinstance(value, Filled):
            digests[name] = value.shown
        elif is_secret_name(name):
            digests[name] = HIDDEN
        else:
            digests[name] = hashlib.sha256(value.encode()).hexdigest()[:12]
    return digests


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
    """The whole plan of the values that a user gave (`PlanKeys` has their names and defaults).

    Raises `FastMTPError` naming the key that is unknown, of another kind, or cannot be done.
    """
    keys = build(PlanKeys, values)
    if not keys.model:
        raise FastMTPError("model: a plan needs the folder of the model, for its chat template and the baseline")
    if not keys.servers:
        raise FastMTPError("servers: a plan needs at least one")
    check_values(keys.chat_template_kwargs, "chat_template_kwargs")

    # Every server, under a name of its own; and no more runs than anybody waits for.
    launches: dict[str, Launch] = {}
    opened: dict[str, Checkpoint] = {}
    for name, server in keys.servers.items():
        for full_name, launch in _expand(name, server or ServerKeys(), keys, opened).items():
            if full_name in launches:
                raise FastMTPError(f"servers.{name}: two servers would be called {full_name}; rename one")
            launches[full_name] = launch
        if len(launches) > MAX_SERVERS:
            raise FastMTPError(f"servers: they stand for more than {MAX_SERVERS}; measure them in several folders")

    # Servers that run already take turns; those that are started may not have room beside each other.
    together = keys.together
    if together is None:
        together = all(launch.base_url for launch in launches.values())
    rounds = keys.rounds or (1 if len(launches) == 1 else TOGETHER_ROUNDS if together else APART_ROUNDS)
    runs = len(launches) * len(keys.temperatures) * len(keys.concurrency) * len(keys.tasks) * rounds
    if runs > MAX_RUNS:
        raise FastMTPError(f"a plan of {runs} runs; at most {MAX_RUNS}: measure them in several folders")

    # The questions.
    tasks: dict[str, Task] = {}
    for spec in keys.tasks:
        task = load_task(spec, keys.num_questions, keys.seed)
        if task.name in tasks:
            raise FastMTPError(f"tasks: two are called {task.name}; name one as name=FILE")
        tasks[task.name] = task

    if keys.distribution_samples:
        _check_sampling(keys, tasks)

    # The baseline goes first, so that every other run is compared as soon as it ends.
    baseline = keys.baseline or next((n for n, x in launches.items() if x.server.method == "baseline"), None)
    if baseline is not None and baseline not in launches:
        raise FastMTPError(f"baseline: {show(baseline)} is not among the servers {listed(list(launches), 20)}")
    if baseline is not None:
        launches = {baseline: launches.pop(baseline), **launches}
    return Plan(
        model=keys.model,
        tasks=tasks,
        launches=launches,
        sampling=Sampling(
            max_new_tokens=keys.max_new_tokens,
            top_k=keys.top_k,
            top_p=keys.top_p,
            chat_template_kwargs=keys.chat_template_kwargs,
        ),
        temperatures=keys.temperatures,
        concurrency=keys.concurrency,
        seed=keys.seed,
        warmup=keys.warmup,
        baseline=baseline,
        served_model_name=keys.served_model_name,
        timeout=keys.timeout,
        retry_seconds=keys.retry_seconds,
        start_seconds=keys.start_seconds,
        rounds=rounds,
        together=together,
        questions_per_slot=keys.questions_per_slot,
        distribution_samples=keys.distribution_samples,
    )


def _check_sampling(keys: PlanKeys, tasks: dict[str, Task]) -> None:
    """Raises `FastMTPError` for what `distribution_samples` cannot be done with."""
    if DISTRIBUTION in tasks:
        raise FastMTPError(
            f"tasks: {DISTRIBUTION} is what answers of distribution_samples are kept as; rename the task"
        )
    if not any(keys.temperatures):
        raise FastMTPError("distribution_samples: at temperature 0 nothing is sampled; add one (temperatures: [0, 1])")


def _by_load(file: str) -> dict[str, int]:
    return {str(size): steps for size, steps in sorted(read_schedule(Path(file)).items())}


def server_urls(words: Sequence[str]) -> dict[str, dict[str, Any]]:
    """`servers` of a plan from `--base_url` words, each `URL` or `name=URL`. The name tells the method, if it can.

    Raises `FastMTPError` for a name that is there twice, or an address that is none.
    """
    servers: dict[str, dict[str, Any]] = {}
    for word in words:
        name, mark, url = word.partition("=")
        if not mark or "/" in name:
            name, url = "", word
        check_address(url, "--base_url")
        if not name:
            host = without_login(url).split("//")[-1].rstrip("/").removesuffix("/v1")
            name = "server" if len(words) == 1 else host.replace("/", "-")
        if name in servers:
            raise FastMTPError(f"--base_url {without_login(url)}: the name {name} is there twice")
        method = next((m for m in reversed(METHODS) if name.lower().startswith(m)), None)
        servers[name] = {"base_url": url, "label": name, **({"method": method} if method else {})}
    return servers


def _expand(name: str, server: ServerKeys, plan: PlanKeys, opened: dict[str, Checkpoint]) -> dict[str, Launch]:
    """One entry of `servers` as one server per number of drafts and token map.

    `opened` holds the folders that were read already: a plan may name one a thousand times.
    """
    _check_name(name)
    where = f"servers.{name}"
    if server.base_url:
        return {name: _running(name, server, plan)}
    if server.schedule and (server.command or server.num_steps or not server.folder):
        raise FastMTPError(f"{where}: `schedule` says how many drafts `folder` makes; leave num_steps, command out")
    is_baseline = server.method == "baseline" or (server.method is None and not server.folder and not server.command)
    if is_baseline:
        return {name: _launch(server, plan, name, "baseline", 0, None, opened)}
    if not server.folder and not server.command:
        raise FastMTPError(f"{where}: needs `folder` (what to serve), `command` or `base_url`")

    # One for each number of drafts and each map. The name says which, where there are several.
    maps: Sequence[str | None] = server.token_map or [None]
    all_steps = server.num_steps or plan.num_steps
    by_load: dict[int, int] = {}
    if server.schedule:
        by_load = read_schedule(Path(server.schedule))
        all_steps = [max(by_load.values())]
    if 0 in all_steps:
        raise FastMTPError(
            f"{where}.num_steps: must be at least 1, not 0; a server without drafts has method: baseline"
        )
    if len(all_steps) * len(maps) > MAX_SERVERS:
        raise FastMTPError(f"{where}: stands for more than {MAX_SERVERS} servers; measure them in several folders")
    launches = {}
    for steps in all_steps:
        for path in maps:
            full_name = name if by_load else f"{name}-k{steps}"
            if path and len(maps) > 1:
                full_name += f"-{Path(path).stem}"
            _check_name(full_name)
            launches[full_name] = _launch(server, plan, name, server.method, steps, path, opened)
    return launches


def _check_name(name: str) -> None:
    """Raises `FastMTPError` for a server's name that its log could not have: it would lead out of the folder."""
    plain = name.isprintable() and "/" not in name and "\\" not in name and name.strip(". ") == name
    if not plain or not name or len(name.encode(errors="replace")) > MAX_NAME_BYTES:
        raise FastMTPError(
            f"servers.{show(name)}: its log has the name of the server, which must be plain: no slash, no dot at "
            f"an end, at most {MAX_NAME_BYTES} bytes; `label` is what tables show"
        )


def _running(name: str, server: ServerKeys, plan: PlanKeys) -> Launch:
    """A server that is there already; what it is, it is asked later."""
    where = f"servers.{name}"
    assert server.base_url and plan.model
    check_address(server.base_url, f"{where}.base_url")
    steps, token_maps = server.num_steps or [-1], server.token_map
    for key, values in (("num_steps", steps), ("token_map", token_maps or [])):
        if len(values) > 1:
            raise FastMTPError(f"{where}.{key}: {len(values)} of them; a server that runs has one")
    token_map = token_maps[0] if token_maps else None
    spec = Server(server.label or name, server.method or "", steps[0], token_map, None, plan.model, None, None)
    return Launch(spec, base_url=server.base_url)


def _launch(
    server: ServerKeys,
    plan: PlanKeys,
    name: str,
    method: str | None,
    steps: int,
    asked: str | None,
    opened: dict[str, Checkpoint],
) -> Launch:
    """A server that is started.

    Args:
        steps: drafts per step; 0 for a baseline.
        asked: the token map that the plan names for it, or `NO_MAP`; None leaves it to the folder.
    """
    assert plan.model
    folder = server.folder or plan.model
    environment = {**plan.environment, **server.environment}
    # One static map is an option of SGLang's; a .json lists maps per language, which the plugins read.
    static = asked if asked and asked != NO_MAP and Path(asked).suffix != ".json" else None
    token_map = asked if asked != NO_MAP else None
    if server.command:
        words = [word.replace("{num_steps}", str(steps)) for word in server.command]
    else:
        # The command that `fastmtp serve-args` shows, without what this server shall not have.
        if str(folder) not in opened:
            opened[str(folder)] = Checkpoint(folder)
        checkpoint = opened[str(folder)]
        if server.schedule:
            flags = scheduled_flags(checkpoint, plan.engine, Path(server.schedule), static, plan.model)
        else:
            flags = flags_for(checkpoint, plan.engine, steps or None, static, plan.model)
        if server.regime and steps:
            flags = sampled_flags(checkpoint, flags, plan.engine, REGIMES[server.regime])
        inside = static_map(flags) if asked is None and steps else None  # the one that the head was trained inside
        dropped = "--speculative" if not steps else "--speculative-token-map" if asked and not static else None
        flags = [f for f in flags if not (dropped and f.words[0].startswith(dropped))]
        words = command([f for f in flags if f.words[0] != ENVIRONMENT])  # variables are set below
        # The paths among them are those of the plan, with the variables that it names.
        from_plan = {str(Path(path)): path for path in (folder, plan.model, static) if isinstance(path, Filled)}
        words = [from_plan.get(word, word) for word in words]
        if inside:
            static = token_map = inside
        if asked is None and static is None and steps and TOKEN_MAPS_KEY in checkpoint.config:
            token_map = f"{folder}/config.json"
        else:  # the plan decides about maps, not the environment that it happens to run in
            is_flag = any(flag.words[0] == "--speculative-token-map" for flag in flags)
            environment[TOKEN_MAPS_VARIABLE] = token_map if token_map and not is_flag else NO_MAP
        python = server.python or plan.python
        if python and words[0] == "python":
            words[0] = python
        if python and words[0] == "vllm":  # the command that is installed beside it
            words[0] = Filled(*(str(Path(name).with_name("vllm")) for name in (python, as_written(python))))
    words += [*plan.flags, *server.flags]

    # A map of another model is refused before anything is started, which takes minutes.
    size = None
    if static is not None:
        from ..method.token_map import read_token_map  # torch, which takes seconds: only where there is a map

        check_file(static)
        size = len(read_token_map(static, Checkpoint(plan.model).vocab_size))
        check_tokenizer(static, plan.model)

    # What the results say of it.
    vanilla = os.path.realpath(folder) == os.path.realpath(plan.model)
    program, *arguments = redact_words(as_written(words))
    spec = Server(
        label=server.label or name,
        method=method or ("tuned+map" if token_map else "vanilla" if vanilla and server.folder else "tuned"),
        num_steps=steps,
        token_map=Path(token_map).stem if token_map else None,
        token_map_size=size,
        model=plan.model,
        draft_model=folder if steps else None,
        command=[Path(program).name, *arguments],  # where Python lies is nobody else's business
        schedule=_by_load(server.schedule) if server.schedule else None,
    )
    return Launch(spec, command=words, environment=environment)
