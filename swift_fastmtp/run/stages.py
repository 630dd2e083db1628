"""The stages of a plan, each the command of an existing verb.

Stages meet in files below the plan's folder and nowhere else, so any of them can be run by hand: what is there when its
turn comes is taken. A stage's `settings` are what its result depends on; they are recorded when it begins, and another
plan is noticed by them (`state.py`).
"""

import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..bench.plan_file import as_written
from ..files.copies import file_hash
from ..options import as_words, words_of
from ..redaction import redact_words
from .plan import RunPlan, eval_file

TRAIN_SEED = 42
"""ms-swift's own; the plan's is added."""
FITTED_ROWS = 256
"""Of a layer that is fitted; the study on SmolLM2 (docs/results/smollm2.md) had 192."""
_NOT_SETTINGS = {"base_url", "concurrency", "timeout", "retry_seconds", "on_bad_row", "jobs", "plan"}
_NOT_SETTINGS |= {"environment", "python", "start_seconds", "resume_from_checkpoint"}
"""What says how a stage works, not what it makes; and the name of a plan, whose values are compared."""


@dataclass
class Stage:
    """One command."""

    name: str
    program: list[str]
    """The words before the options."""
    values: dict[str, Any]
    """Option → value, in the order of the command line."""
    output: Path | None
    """What is there, whole, when the stage is done; None: only the record says so."""
    pattern: str | None = None
    """Glob of everything it writes in the plan's folder."""
    words_before: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    plan: dict[str, Any] = field(default_factory=dict)
    """What its verb reads from a file that we write."""

    @property
    def words(self) -> list[str]:
        words = [*self.words_before, *self.program]
        for option, value in self.values.items():
            if self.name == "train":
                words += _argument(option, value)
            else:
                words += words_of(option, value, self.options.get(option, {}))
        return [name for word in words for name in _expanded(word)]

    @property
    def line(self) -> str:
        """The command as a shell takes it."""
        variables = [f"{name}={_quoted(as_written(value))}" for name, value in self.environment.items()]
        return " ".join([*variables, *map(_quoted, redact_words(as_written(self.words)))])

    def settings(self, out: Path) -> dict[str, Any]:
        """What the result depends on, by option: below the plan's folder by name, other files by content too, a
        model folder by its config.json."""
        found: dict[str, Any] = {}
        for option, value in self.values.items():
            if option not in _NOT_SETTINGS:
                found[option] = _setting(value, out)
        found |= self.plan
        if self.program[2:]:
            found["recipe" if self.name == "train" else "folder"] = _setting(self.program[2:], out)
        return json.loads(json.dumps(found))


def _argument(option: str, value: Any) -> list[str]:
    """An argument of `swift sft`, which takes JSON for mappings and a word for true."""
    if isinstance(value, dict):
        return [f"--{option}", json.dumps(value, ensure_ascii=False)]
    if isinstance(value, bool):
        return [f"--{option}", str(value).lower()]
    return [f"--{option}", *as_words(value)]


def _expanded(word: str) -> list[str]:
    """A pattern of ours as the files that are there."""
    if not word.endswith("*.pt"):
        return [word]
    return sorted(str(path) for path in Path(word).parent.glob("*.pt")) or [word]


def _quoted(word: str) -> str:
    if re.fullmatch(r"[^`\"\\$]*\$\{\w+\}[^`\"\\$]*", word):  # a variable that the plan names
        return f'"{word}"'
    return word if word.endswith("/*.pt") and shlex.quote(word[:-4]) == word[:-4] else shlex.quote(word)


def _setting(value: Any, out: Path) -> Any:
    if isinstance(value, list | tuple):
        return [_setting(each, out) for each in value]
    value = as_written(value)
    if not isinstance(value, str):
        return value
    name = value.rpartition("=")[2].rpartition("fastmtp-self-distill:")[2]
    path = Path(name)
    if path.is_relative_to(out):
        return value.replace(str(out), "OUT", 1)
    try:
        if path.is_dir():
            path = path / "config.json"  # of a model folder
        if path.is_file():
            return f"{value} ({path.name}, sha256 {file_hash(path)[:16]})"
    except OSError:  # no name of a file
        return value
    return value


def stages(plan: RunPlan) -> list[Stage]:
    """All stages of a plan, in order. Some depend on what an earlier one left, so this is asked again before each."""
    keys, out = plan.keys, plan.out
    distilled, cleaned, mixed, train = out / "distilled.jsonl", out / "clean.jsonl", out / "mixed", out / "train"
    best, maps, simulated, export = train / "best", out / "maps", out / "simulate", out / "export"
    results = out / "bench/results.json"

    base_url: dict[str, Any] = {"base_url": keys.base_url} if keys.base_url else {}
    decontaminate: dict[str, Any] = {"decontaminate": keys.tasks} if keys.tasks else {}
    # Shares are the user's to choose; without any, the rows' own proportions.
    shares: dict[str, Any] = {"inputs": [str(cleaned)]}
    if not keys.mix.keys() & {"shares", "config"}:
        shares = {"inputs": [f"all={cleaned}"], "shares": ["all=1"]}
    seed = {"seed": keys.seed}

    # What will be trained, as early as it is there: a layer that is fitted needs the answers.
    trained = [_verb(plan, "inspect", {}, {}, None, folder=plan.trained_model)]
    if keys.graft is not None:
        trained.insert(0, _graft(plan, mixed))
    early, late = ([], trained) if plan.layer is None else (trained, [])
    asked = keys.model if plan.layer is None else plan.trained_model
    made = [
        *early,
        _verb(
            plan,
            "distill",
            {"model": asked, "prompts": keys.prompts, "output": str(distilled), **seed, **base_url},
            keys.distill,
            distilled,
            pattern="distilled.jsonl*",
        ),
        _verb(
            plan,
            "clean",
            {"inputs": [str(distilled)], "output": str(cleaned), "model": asked, **decontaminate},
            keys.clean,
            cleaned,
            pattern="clean.jsonl*",
        ),
        _verb(plan, "mix", {**shares, "output_dir": str(mixed), "model": asked, **seed}, keys.mix, mixed),
        *late,
        _train(plan, mixed, train),
    ]
    if keys.vocab is not None:
        values = {"inputs": [str(cleaned)], "model": keys.model, "output_dir": str(maps)}
        made.append(_verb(plan, "vocab", values, keys.vocab, maps, pattern="maps*"))
    if plan.wants_simulate:
        made.append(_simulate(plan, best, mixed, maps, simulated))
    values = {"adapters": str(best), "model": plan.trained_model, "output_dir": str(export)}
    if keys.vocab is not None and _are_chosen(simulated / "maps.json"):
        values["token_maps"] = str(simulated / "maps.json")
    made.append(_verb(plan, "export", values, keys.export, export))
    if keys.engine != "none":
        values = {"plan": [str(out / "bench.yaml")], "output_dir": str(results.parent)}
        bench = _verb(plan, "bench", values, keys.bench, results, pattern="bench")
        bench.plan = {name: value for name, value in bench_plan(plan).items() if name not in _NOT_SETTINGS}
        made += [
            bench,
            _verb(plan, "report", {"output_dir": str(out / "report")}, {}, out / "report", folder=str(results)),
            _verb(plan, "card", {"results": [str(results)]}, keys.card, None, folder=str(export)),
        ]
    return made


def _verb(
    plan: RunPlan,
    name: str,
    own: dict[str, Any],
    given: Mapping[str, Any],
    output: Path | None,
    *,
    pattern: str | None = None,
    folder: str | None = None,
) -> Stage:
    """A stage that is a verb of `fastmtp`: our options, then the plan's, which go before ours.

    Args:
        folder: what the verb takes without an option.
    """
    program = ["fastmtp", name, *([folder] if folder else [])]
    pattern = pattern or (output.name if output else None)
    return Stage(name, program, {**own, **given}, output, pattern, options=plan.verbs.options_of(name))


def _graft(plan: RunPlan, mixed: Path) -> Stage:
    """The layer of a model that has none."""
    own: dict[str, Any] = {"model": plan.keys.model, "output_dir": plan.trained_model}
    if "donor" not in (plan.keys.graft or {}):
        own |= {"init_from_last_layer": True, "fit_on": str(mixed / "train.jsonl"), "max_rows": FITTED_ROWS}
    return _verb(plan, "graft", own, plan.keys.graft or {}, Path(plan.trained_model))


def _train(plan: RunPlan, mixed: Path, train: Path) -> Stage:
    keys, recipe = plan.keys, plan.train.recipe
    own: dict[str, Any] = {} if recipe else {"model_type": "fastmtp", "metric_for_best_model": "mtp_tau"}
    own |= {
        "model": plan.trained_model,
        "dataset": f"fastmtp-self-distill:{mixed}/train.jsonl",
        "val_dataset": f"fastmtp-self-distill:{mixed}/val.jsonl",
        "output_dir": str(train),
        "add_version": False,
        "create_checkpoint_symlink": True,
        "seed": TRAIN_SEED + keys.seed,
    }
    # The graph of the engine that will serve the head, unless the plan or the recipe has one.
    knobs = dict(plan.asked("model_kwargs", {}))
    chosen = {key.lower(): value for key, value in knobs.items()}
    if keys.engine == "vllm" and "fastmtp_engine" not in chosen and chosen.get("fastmtp_rollout") != "paper":
        arguments = {**plan.arguments, "model_kwargs": {**knobs, "fastmtp_engine": "vllm"}}
    else:
        arguments = plan.arguments
    return Stage(
        "train",
        ["swift", "sft", *([recipe] if recipe else [])],
        {**own, **arguments},
        train / "best",
        train.name,
        words_before=plan.train.launcher,
        environment=plan.train.environment,
    )


def resumed(stage: Stage) -> Stage:
    """Training that has checkpoints goes on from the newest whole one."""
    folder = stage.output.parent if stage.output else None
    if stage.name == "train" and folder is not None and any(folder.glob("checkpoint-*")):
        stage.values["resume_from_checkpoint"] = str(folder)
    return stage


def _simulate(plan: RunPlan, best: Path, mixed: Path, maps: Path, simulated: Path) -> Stage:
    own: dict[str, Any] = {"model": plan.trained_model, "adapters": [str(best)]}
    if file := eval_file(plan):
        own["dataset"] = file
    else:
        own |= {"dataset": str(mixed / "val.jsonl"), "answers": "given"}
    if plan.keys.vocab is not None:
        own |= {"token_map": [str(maps / "*.pt")], "by": "language"}
    own["output_dir"] = str(simulated)
    given = dict(plan.keys.simulate or {})
    if "dataset" in given:
        own.pop("answers", None)
    return _verb(plan, "simulate", own, given, simulated / "simulate.json", pattern="simulate")


def _are_chosen(maps: Path) -> bool:
    """Whether the simulator recommends a map for any language; as long as it has not run, that is assumed."""
    return not maps.exists() or json.loads(maps.read_text(encoding="utf-8")) != {}


def bench_plan(plan: RunPlan) -> dict[str, Any]:
    """The plan of `fastmtp bench`: the model without drafts, with its own head, with the trained one."""
    keys, written, export = plan.keys, plan.written, plan.out / "export"
    servers: dict[str, Any] = {
        "baseline": {"label": "Baseline", "method": "baseline"},
        "vanilla": {"label": "Vanilla MTP", "method": "vanilla", "folder": keys.model},
        "tuned": {"label": "FastMTP", "method": "tuned", "folder": str(export)},
    }
    if keys.vocab is not None and _are_chosen(plan.out / "simulate/maps.json"):
        servers["tuned"]["token_map"] = "none"
        servers["tuned-maps"] = {"label": "FastMTP + maps", "method": "tuned+map", "folder": str(export)}
    names = ("python", "flags", "environment", "start_seconds")
    engine = {name: written[name] for name in names if written.get(name)}
    tasks = {"tasks": written["tasks"]} if keys.tasks else {}
    return {"model": written["model"], "engine": keys.engine, "seed": keys.seed, **tasks, **engine, "servers": servers}
