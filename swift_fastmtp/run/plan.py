"""The keys of `fastmtp run`'s plan, checked before anything starts.

A plan names the model, the prompts and what differs from the defaults; a key below a stage (`distill:`, `train:`, ..)
is an option of that stage's own verb. So a plan has nothing to learn beyond the verbs, and every value in it is parsed
by the verb's own parser now, not hours later when its turn comes.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator

from ..bench.plan import read_plan
from ..bench.plan_file import as_written, read_file, typed
from ..bench.plan_keys import Environment, Seconds, Several, Text, Typed, Word, Words
from ..checkpoint.checkpoint import Checkpoint
from ..data.client import check_address
from ..errors import FastMTPError
from ..export.dense import AS_QWEN2
from ..export.inspection import inspect_model
from ..files.inputs import check_file
from ..files.schema import Count, build
from ..files.show import meant, show
from ..redaction import is_secret_name

Options = Mapping[str, Mapping[str, Any]]
"""Option → what argparse knows of it."""


@dataclass(frozen=True)
class Verbs:
    """What the command line knows of the verbs; `cli.py`, which imports this folder, hands it in."""

    options_of: Callable[[str], Options]
    check: Callable[[Sequence[str]], None]
    """Raises `FastMTPError` if the words of a `fastmtp` command would be refused."""


def _switch(value: Any) -> Any:
    """`on` and `off` in the place of a stage's options."""
    value = typed(value)
    return {} if value is True else None if value is False else value


Map = Annotated[dict[str, Any], Typed]
Stage = Annotated[dict[str, Any] | None, BeforeValidator(_switch)]
"""Options of one that may be left out; None: it is."""


class RunKeys(BaseModel):
    """A whole plan. What is a mapping is of one stage: options of its verb."""

    model: Text
    prompts: Several[Text]
    output_dir: Text = "output/run"
    tasks: Several[Text] = []
    """What is measured on, and so taken out of the training rows; none: rows that are held out."""
    seed: Annotated[Count, Typed] = 0
    estimate: Annotated[bool, Typed] = True
    """Whether a run begins with a measurement of what it will take."""

    # Servers: some that run, for the answers, or an engine that is started, for answers and benchmark.
    base_url: Several[Text] = []
    engine: Literal["none", "sglang", "vllm"] = "none"
    python: Text | None = None
    flags: Words = []
    environment: Environment = {}
    start_seconds: Seconds = 1800.0

    graft: Stage = None
    """Where the model has no MTP layer: `donor`, or without one a layer that is fitted on the answers."""
    distill: Map = {}
    clean: Map = {}
    mix: Map = {}
    train: Map = {}
    vocab: Stage = None
    simulate: Stage = None
    export: Map = {}
    bench: Map = {}
    card: Map = {}


class TrainKeys(BaseModel):
    """What a plan's `train` has beside the arguments of `swift sft`."""

    recipe: Text | None = None
    launcher: Words = []
    """Words before `swift sft`, as those of srun."""
    environment: dict[Text, Word] = {}
    """Variables of the command: NPROC_PER_NODE, NNODES, .. as ms-swift reads them."""


OPTION_STAGES = ("graft", "distill", "clean", "mix", "vocab", "simulate", "export", "bench", "card")
_OWN: dict[str, set[str]] = {
    "graft": {"model", "output_dir", "init_from_last_layer", "fit_on", "draft_only"},
    "distill": {"model", "prompts", "output", "base_url", "api_key", "shard"},
    "clean": {"inputs", "output", "model"},
    "mix": {"inputs", "output_dir", "model"},
    "train": {"model", "dataset", "val_dataset", "output_dir", "add_version", "create_checkpoint_symlink"}
    | {"resume_from_checkpoint"},
    "vocab": {"inputs", "model", "output_dir"},
    "simulate": {"model", "adapters", "output_dir"},
    "export": {"adapters", "model", "output_dir", "token_maps", "draft_only", "results", "base_model"},
    "bench": {"plan", "base_url", "output_dir", "api_key", "model", "costs"},
    "card": {"folder", "results"},
}
"""Options that `fastmtp run` gives itself, or that would make something else than the next stage takes."""
_ELSEWHERE = {"base_url": "write it at the top of the plan", "api_key": "give it in OPENAI_API_KEY"}


@dataclass
class RunPlan:
    """A plan whose keys are known and whose inputs are there."""

    keys: RunKeys
    train: TrainKeys
    arguments: dict[str, Any]
    """Of `swift sft`."""
    verbs: Verbs
    where: str
    """The plan's files, for errors."""
    written: dict[str, Any] = field(default_factory=dict)
    """Its values with `${NAME}` where a variable was filled in."""

    @cached_property
    def checkpoint(self) -> Checkpoint:
        return Checkpoint(self.keys.model)

    @property
    def layer(self) -> Checkpoint | None:
        """What holds the MTP layer before anything has run; None where it is made of the answers."""
        if self.keys.graft is None:
            return self.checkpoint
        donor = self.keys.graft.get("donor")
        return Checkpoint(donor) if donor else None

    @property
    def out(self) -> Path:
        return Path(self.keys.output_dir)

    def asked(self, name: str, default: Any = None) -> Any:
        """An argument of `swift sft`: the plan's, else the recipe's."""
        if name in self.arguments:
            return self.arguments[name]
        recipe = read_file(self.train.recipe) if self.train.recipe else {}
        value = recipe.get(name)
        return default if value is None else value

    @property
    def trained_model(self) -> str:
        """The folder that is trained: the model, or what `graft` makes of it."""
        return self.keys.model if self.keys.graft is None else str(self.out / "with-mtp")

    @property
    def wants_simulate(self) -> bool:
        """Without an engine nothing else measures; and it chooses among token maps."""
        return self.keys.engine == "none" or self.keys.vocab is not None or self.keys.simulate is not None


def read_run_plan(paths: Sequence[str], given: Mapping[str, Any], verbs: Verbs) -> RunPlan:
    """The plan of some files, put together as `fastmtp bench --plan` does, and of options that go before them.

    Raises `FastMTPError` naming the key that is unknown, missing or of another kind, or the input that is not there.
    """
    where = ", ".join(str(path) for path in paths) or "the command line"
    values = {**read_plan(list(paths)), **{key: value for key, value in given.items() if value not in (None, [])}}
    try:
        for key in values:
            if key not in RunKeys.model_fields:
                raise FastMTPError(f"unknown key {show(key)}; {meant(key, list(RunKeys.model_fields))}")
        keys = build(RunKeys, {key: value for key, value in values.items() if value is not None})
        train = {key: value for key, value in keys.train.items() if key in TrainKeys.model_fields}
        plan = RunPlan(
            keys,
            build(TrainKeys, train, "train"),
            {key: value for key, value in keys.train.items() if key not in train},
            verbs,
            where,
            as_written(values),
        )
        _check_options(plan)
        _check_inputs(plan)
    except FastMTPError as error:
        lacks = str(error).replace("the file lacks", "lacks")
        raise FastMTPError(f"{where}: {lacks}") from None
    return plan


def _check_options(plan: RunPlan) -> None:
    """Every key of a stage is an option of its verb, and one that is the plan's to give."""
    for stage in OPTION_STAGES:
        options = plan.verbs.options_of(stage)
        for key in getattr(plan.keys, stage) or {}:
            _check_own(stage, key)
            if key not in options:
                names = [name for name in options if name not in _OWN[stage]]
                raise FastMTPError(f"{stage}.{key}: `fastmtp {stage}` has no such option; {meant(key, names)}")
    for key in plan.arguments:
        _check_own("train", key)
    if plan.arguments:
        from ..swift_plugin.names import argument_names

        names = argument_names()
        for key in plan.arguments:
            if key not in names:
                close = meant(key, [*TrainKeys.model_fields, *names])
                how = close if close.startswith("did") else "docs/training.md has its knobs (below model_kwargs)"
                raise FastMTPError(f"train.{key}: `swift sft` has no such argument; {how}")


def _check_own(stage: str, key: str) -> None:
    if key in _OWN[stage]:
        how = _ELSEWHERE.get(key, "`fastmtp run` gives it; leave it out")
        raise FastMTPError(f"{stage}: `{key}` has no place below it; {how}")


def _check_inputs(plan: RunPlan) -> None:
    """Files and addresses, and what cannot be done together."""
    keys = plan.keys
    _check_model(keys)
    for name in keys.prompts:
        if name.partition(":")[0] not in ("hf", "swift"):
            check_file(name)
    for url in keys.base_url:
        check_address(url, "base_url")
    if plan.train.recipe:
        check_file(plan.train.recipe)
    for name, value in [*keys.environment.items(), *plan.train.environment.items()]:
        if is_secret_name(name) and value == as_written(value):
            raise FastMTPError(f"environment: {name} stands in the plan, which is copied; write `${{{name}}}` for it")
    if keys.engine == "none":
        for stage in ("bench", "card"):
            if getattr(keys, stage):
                raise FastMTPError(f"{stage}: needs an engine that serves the trained head; add `engine: sglang`")
    if keys.mix.get("val_ratio") == 0:
        raise FastMTPError("mix.val_ratio: must be above 0; the best checkpoint is chosen on validation rows")
    if plan.wants_simulate and "dataset" not in (keys.simulate or {}):
        files = [task for task in keys.tasks if Path(_file_of(task)).is_file()]
        if keys.tasks and len(files) != 1:
            raise FastMTPError(
                "tasks: without an engine they are one file of prompts; or name another file as simulate.dataset"
            )
        for task in files:
            check_file(_file_of(task))


def _check_model(keys: RunKeys) -> None:
    """Whether there will be an MTP layer to train: hours later `swift sft` would say so."""
    if keys.graft is None:
        reasons = inspect_model(keys.model).reasons
        if not reasons:
            return
        how = ""
        # A quantized model gets its layer beside it, which a plan cannot train.
        if "`fastmtp graft" in reasons[0] and "--draft_only" not in reasons[0]:
            how = "; in a plan: `graft: {donor: BASE}`, or `graft: on` where no base has one"
        raise FastMTPError(f"{keys.model}: {reasons[0]}{how}")
    if keys.engine != "none":
        # The commands of servers are made for folders that hold a layer.
        raise FastMTPError(
            "graft: not together with `engine`; make the layer by `fastmtp graft` and name its folder as model, or "
            "leave `engine` out (servers at base_url may give the answers)"
        )
    if donor := keys.graft.get("donor"):
        _ = Checkpoint(donor).trainable_family
        return
    model = Checkpoint(keys.model)
    if not set(AS_QWEN2) & set(model.config.get("architectures") or []):
        _ = model.trainable_family


def _file_of(task: str) -> str:
    """Of a task that is `NAME=FILE` or a file."""
    name, mark, file = task.partition("=")
    return file if mark and "/" not in name else task


def eval_file(plan: RunPlan) -> str | None:
    """The prompts that are measured on without a server; None: validation rows."""
    files = [_file_of(task) for task in plan.keys.tasks]
    return next((file for file in files if Path(file).is_file()), None)
