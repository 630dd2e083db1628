"""The keys of a plan and of its servers, and what each may hold.

People write plans by hand, so a value is first read as what is meant, then checked: one value where several are
possible is a list of it, a number where a text is meant (`python: 3`) is a text, and a word that a variable was filled
into (`Filled`) is a number where one is meant. A text stays the object that it is: `Filled` knows what the plan wrote.
"""

from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, PlainValidator, model_validator

from ..files.schema import Amount, Count, ListOf, Positive, Rate, Whole
from ..files.show import show
from ..method.metrics import MAX_ROUNDS
from .distribution import MAX_SAMPLES
from .plan_file import several, typed
from .results import MAX_STEPS

MAX_TEXT = 1000
"""Characters of a name or a path."""
MAX_WORD = 100_000
"""Of a word of a command, which may be a script; Linux takes no longer ones."""


def _text(value: Any, most: int) -> str:
    """A text; numbers and paths become one."""
    if not isinstance(value, str | int | float | Path) or "\0" in str(value):
        raise ValueError(f"must be a text, not {show(value)}")
    if len(str(value)) > most:
        raise ValueError(f"{show(value)} is longer than {most} characters")
    return value if isinstance(value, str) else str(value)


def _elements(value: Any) -> list[Any]:
    """A list, or the one value that stands for it; `several` are in the place of one."""
    elements = []
    for element in value if isinstance(value, list) else [value]:
        elements += several(element)
    return elements


def _different(value: Any) -> list[Any]:
    elements = _elements(value)
    different = {x if isinstance(x, str | int | float) else show(x) for x in elements}
    if not elements or len(different) < len(elements):
        raise ValueError("needs at least one value, and none twice")
    return elements


def _named(environment: dict[str, str]) -> dict[str, str]:
    for name in environment:
        if not name or "=" in name:
            raise ValueError(f"{show(name)} is no name of a variable")
    return environment


T = TypeVar("T")
Several = Annotated[ListOf[T], BeforeValidator(_different)]
Text = Annotated[str, PlainValidator(partial(_text, most=MAX_TEXT))]
Word = Annotated[str, PlainValidator(partial(_text, most=MAX_WORD))]
Words = Annotated[ListOf[Word], BeforeValidator(_elements)]
Environment = Annotated[dict[Text, Word], AfterValidator(_named)]
Method = Literal["baseline", "vanilla", "tuned", "tuned+map"]
METHODS: tuple[Method, ...] = get_args(Method)

# Numbers. The largest values: what is beyond is a slip, and some of it would not end.
Typed = BeforeValidator(typed)
Seconds = Annotated[Amount, Field(gt=0, le=1e9), Typed]
Temperature = Annotated[Amount, Field(le=1000), Typed]
Number = Annotated[Positive, Field(le=10**9), Typed]
Concurrency = Annotated[Positive, Field(le=10**5), Typed]
Steps = Annotated[Count, Field(le=MAX_STEPS), Typed]
DraftSteps = Annotated[Positive, Field(le=MAX_STEPS), Typed]


class _Keys(BaseModel):
    """Keys that a user writes: an unknown one is a slip, and null is a key that is not there."""

    @model_validator(mode="before")
    @classmethod
    def _known(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        for key in values:
            if key not in cls.model_fields:
                raise ValueError(f"has no {show(key)}; it has {', '.join(cls.model_fields)}")
        return {key: value for key, value in values.items() if value is not None}


class ServerKeys(_Keys):
    """One entry of `servers`: a sweep of servers."""

    label: Text | None = None
    method: Method | None = None
    folder: Text | None = None
    num_steps: Several[Steps] | None = None
    token_map: Several[Text] | None = None
    regime: Literal["greedy", "rejection", "block"] | None = None
    """Of drafts above temperature 0 (`method.verification`)."""
    schedule: Text | None = None
    base_url: Text | None = None
    command: Words = []
    python: Text | None = None
    flags: Words = []
    environment: Environment = {}


class PlanValues(_Keys):
    """The keys that the command line has too; what is left out has the paper's value.

    Args:
        model: folder of the model, for its chat template; default: the plan's
        tasks: names, name=FILE or files
        num_questions: of every task, drawn by the seed; default: the task's
        max_new_tokens: paper: 1024
        temperatures: of answers; 0 is greedy
        top_k: above temperature 0
        top_p: above temperature 0
        chat_template_kwargs: JSON, as {"enable_thinking": false}
        concurrency: conversations at a time
        num_steps: drafts per step, K, of a plan's servers
        baseline: name of the server that others are compared with; default: the first whose method is `baseline`
        rounds: how often the baseline is measured, and the others in turn with it; default: 3 if the servers are up
            together, else 2; 1 for one server
        distribution_samples: short answers to each of three prompts, from every server, that test above temperature 0
            whether the baseline's distribution is kept (docs/bench.md); default: none
        warmup: answers before anything is timed
        seed: of drawn questions and sampled answers
        served_model_name: the servers' name of the model; default: the only one they have
        timeout: seconds of silence until a server must show that it lives
        retry_seconds: a request is repeated so long after its first failure
    """

    model: Text | None = None
    tasks: Several[Text] = ["smoke"]
    num_questions: Number | None = None
    max_new_tokens: Number = 1024
    temperatures: Several[Temperature] = [0.0]
    top_k: Annotated[Whole, Field(ge=-1, le=10**9), Typed] = 20
    top_p: Annotated[Rate, Typed] = 0.95
    chat_template_kwargs: Annotated[dict[str, Any], Typed] = {}
    concurrency: Several[Concurrency] = [1]
    num_steps: Several[DraftSteps] = [3]
    baseline: Text | None = None
    rounds: Annotated[Positive, Field(le=MAX_ROUNDS), Typed] | None = None
    distribution_samples: Annotated[Count, Field(le=MAX_SAMPLES), Typed] = 0
    warmup: Annotated[Count, Field(le=10**6), Typed] = 4
    seed: Annotated[Count, Typed] = 0
    served_model_name: Text | None = None
    timeout: Seconds = 600.0
    retry_seconds: Seconds = 60.0


class PlanKeys(PlanValues):
    """A whole plan."""

    engine: Literal["sglang", "vllm"] = "sglang"
    python: Text | None = None
    flags: Words = []
    environment: Environment = {}
    start_seconds: Seconds = 1800.0
    together: Annotated[bool, Typed] | None = None
    questions_per_slot: Number | None = None
    servers: dict[str, ServerKeys | None] = {}
