"""Every knob of the method, its default and where it comes from.

Users set knobs through ms-swift's own `--model_kwargs` (`--model_kwargs '{"fastmtp_beta": 0.5}'`, or a
`model_kwargs:` mapping in a recipe), or, as with every one of ms-swift's `model_kwargs`, with an environment variable:
a knob `beta` is the key `fastmtp_beta` and the variable `FASTMTP_BETA`. The key goes before the variable.
"""

import difflib
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from ..errors import FastMTPError
from ..families.family import ENGINE_NAMES

ENV_PREFIX = "FASTMTP_"
ROLLOUTS = ("exact", "paper")
# Against the frozen model's own distribution, not the text's token.
SOFT_LOSSES = ("kl", "lk")
LOSSES = ("ce", *SOFT_LOSSES)
BAD_ROWS = ("stop", "skip")
WORSE = ("withhold", "keep")
HOW_TO_SKIP = """skip such rows with --model_kwargs '{"fastmtp_on_bad_row": "skip"}'"""


@dataclass(frozen=True)
class FastMTPConfig:
    """Settings of the method. The help text of each field is its documentation, in the docs too."""

    num_speculative_steps: int = field(
        default=3,
        metadata={"help": "Draft depth K: how often the one head is applied to its own output (paper 3.1: 3)."},
    )
    beta: float = field(
        default=0.6,
        metadata={"help": "Decay of the step weights, alpha_k = beta^(k-1) / sum_j beta^(j-1) (paper Eq. 2: 0.6)."},
    )
    rollout: str = field(
        default="exact",
        metadata={
            "help": "Graph of the recursion: `exact` is what `engine` runs when it serves one MTP layer, "
            "`paper` is what the paper's code trains."
        },
    )
    engine: str = field(
        default="sglang",
        metadata={
            "help": "Whose graph `exact` is: `sglang`, `vllm`, or `both`, which stops where they compute something "
            "else with the same MTP layer (docs/engines.md)."
        },
    )
    loss: str = field(
        default="kl",
        metadata={
            "help": "Loss of each step: `kl`, against the frozen model's own distribution, `lk`, the same and turning "
            "into 1 - acceptance, or `ce`, against the text's token (paper Eq. 1)."
        },
    )
    temperature: float = field(
        default=1.0,
        metadata={"help": "Sampling temperature at which the soft losses compare head and model."},
    )
    lk_eta: float = field(
        default=3.0,
        metadata={"help": "`lk`: how fast KL gives way to it, weight exp(-eta x acceptance) (arXiv 2602.23881: 3)."},
    )
    token_map: str = field(
        default="",
        metadata={
            "help": "Token map file to train inside (SGLang's `--speculative-token-map`): logits, labels and rates are "
            "those of a draft that is served with it."
        },
    )
    backbone_lora: str = field(
        default="",
        metadata={
            "help": "Folder of a LoRA adapter that the model is served with: it is merged into the frozen backbone in "
            "memory, and the head is trained for base plus adapter (docs/adapters.md)."
        },
    )
    on_bad_row: str = field(
        default="stop",
        metadata={"help": "Rows that cannot be trained on: `stop`, or `skip`, which counts and names them in the log."},
    )
    other_val_dataset: str = field(
        default="",
        metadata={
            "help": "Rows of another kind than `--val_dataset`, in its syntax (FILE, FILE#COUNT): every evaluation "
            "compares the head on them with the initial one too, and says so."
        },
    )
    on_worse: str = field(
        default="withhold",
        metadata={
            "help": "A run that ends below the head it began with: `withhold` hands out that initial head, and "
            "`swift export` refuses the trained one; `keep` says so and changes nothing."
        },
    )
    hidden_cache: str = field(
        default="",
        metadata={"help": "Folder for the backbone's hidden states: epochs after the first read them, and skip it."},
    )
    hidden_cache_gb: float = field(
        default=0.0,
        metadata={
            "help": "Your consent to the size of `hidden_cache`, in GB (10^9 bytes); a run that needs more stops."
        },
    )
    loss_chunk_size: int = field(
        default=0,
        metadata={
            "help": "Rows whose logits exist at once, with a soft loss the frozen model's own among them; 0 takes what "
            "fills 64 MiB (CPU) or 512 MiB (GPU)."
        },
    )

    def __post_init__(self) -> None:
        _check(self.num_speculative_steps >= 1, "num_speculative_steps", self.num_speculative_steps, "at least 1")
        _check(0.0 < self.beta <= 1.0, "beta", self.beta, "in (0, 1]")
        _check(self.rollout in ROLLOUTS, "rollout", self.rollout, f"one of {', '.join(ROLLOUTS)}")
        _check(self.loss in LOSSES, "loss", self.loss, f"one of {', '.join(LOSSES)}")
        _check(self.engine in ENGINE_NAMES, "engine", self.engine, f"one of {', '.join(ENGINE_NAMES)}")
        engines = "sglang where fastmtp_rollout is paper, which no engine runs"
        _check(self.rollout == "exact" or self.engine == "sglang", "engine", self.engine, engines)
        _check(0.0 < self.temperature < float("inf"), "temperature", self.temperature, "above 0")
        _check(0.0 <= self.lk_eta < float("inf"), "lk_eta", self.lk_eta, "at least 0")
        _check(self.on_bad_row in BAD_ROWS, "on_bad_row", self.on_bad_row, f"one of {', '.join(BAD_ROWS)}")
        _check(self.on_worse in WORSE, "on_worse", self.on_worse, f"one of {', '.join(WORSE)}")
        _check(0.0 <= self.hidden_cache_gb < float("inf"), "hidden_cache_gb", self.hidden_cache_gb, "at least 0")
        _check(self.loss_chunk_size >= 0, "loss_chunk_size", self.loss_chunk_size, "at least 0")

    @property
    def step_weights(self) -> list[float]:
        """alpha_1..alpha_K of paper Eq. 2; they sum to 1."""
        powers = [self.beta**k for k in range(self.num_speculative_steps)]
        return [p / sum(powers) for p in powers]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], where: str = "model_kwargs") -> "FastMTPConfig":
        """Settings from `{knob: value}`; strings are parsed. Unknown or impossible values raise `FastMTPError`."""
        known = {f.name: f for f in fields(cls)}
        parsed: dict[str, Any] = {}
        for name, value in values.items():
            if name not in known:
                raise FastMTPError(f"{where}: unknown knob 'fastmtp_{name}'; known: {', '.join(knob_names())}")
            parsed[name] = _parse(name, value, type(known[name].default))
        return cls(**parsed)

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None) -> "FastMTPConfig":
        """Settings from the environment variables of the knobs. Others that begin alike are somebody else's."""
        return cls.from_run({}, os.environ if environ is None else environ)

    @classmethod
    def from_run(cls, model_kwargs: Mapping[str, Any], environ: Mapping[str, str]) -> "FastMTPConfig":
        """Settings from the keys of `model_kwargs`, in upper or lower case, and from the environment where there is no
        key. Raises `FastMTPError` for a key that is no knob, and for impossible values."""
        values: dict[str, Any] = {}
        for name in (f.name for f in fields(cls)):
            if _variable(name) in environ:
                values[name] = environ[_variable(name)]
        for key, value in model_kwargs.items():
            if not key.upper().startswith(ENV_PREFIX):
                raise FastMTPError(f"model_kwargs: unknown knob '{key}'; known: {', '.join(knob_names())}")
            values[key[len(ENV_PREFIX) :].lower()] = value
        return cls.from_mapping(values)


def knob_names() -> list[str]:
    """The keys users write in `model_kwargs`."""
    return [f"fastmtp_{f.name}" for f in fields(FastMTPConfig)]


def likely_typos(environ: Mapping[str, str]) -> dict[str, str]:
    """Variables that look like a knob's and are none, and the one that was probably meant."""
    variables = [_variable(f.name) for f in fields(FastMTPConfig)]
    typos = {}
    for name in environ:
        if name.startswith(ENV_PREFIX) and name not in variables:
            # Without the prefix: it would make everything look alike.
            ours = {v[len(ENV_PREFIX) :]: v for v in variables}
            for close in difflib.get_close_matches(name[len(ENV_PREFIX) :], ours, n=1, cutoff=0.8):
                typos[name] = ours[close]
    return typos


def _variable(name: str) -> str:
    return ENV_PREFIX + name.upper()


def _parse(name: str, value: Any, kind: type) -> Any:
    try:
        parsed = kind(value)
        # True is an int in Python, and int(2.5) is 2; neither is what the user meant.
        if isinstance(value, bool) or (not isinstance(value, str) and parsed != value):
            raise ValueError
    except (TypeError, ValueError, OverflowError):
        raise FastMTPError(f"fastmtp_{name}: cannot read {value!r} as {kind.__name__}") from None
    return parsed


def _check(ok: bool, name: str, value: Any, want: str) -> None:
    if not ok:
        raise FastMTPError(f"fastmtp_{name}: {value!r} is not possible; it must be {want}")
