"""The knobs of one run.

ms-swift exports `model_kwargs` to the environment and never takes them back, so the next run of the same process would
have them too. Here a run has the knobs of its own arguments, and what stands in the user's environment.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from ..method.config import ENV_PREFIX, FastMTPConfig

_run: ContextVar[FastMTPConfig | None] = ContextVar("fastmtp_knobs", default=None)


def knobs_of(args: Any) -> FastMTPConfig:
    """The knobs of ms-swift's arguments. Raises `FastMTPError` for an unknown or impossible one."""
    return FastMTPConfig.from_run(args.model_kwargs or {}, os.environ)


def run_knobs() -> FastMTPConfig:
    """The knobs of the run whose model or data is being loaded; without one (`get_model_processor` called directly),
    those of the environment."""
    return _run.get() or FastMTPConfig.from_env()


@contextmanager
def loading(knobs: FastMTPConfig) -> Iterator[None]:
    """`run_knobs` gives these."""
    token = _run.set(knobs)
    try:
        yield
    finally:
        _run.reset(token)


@contextmanager
def environment_kept() -> Iterator[None]:
    """What is done with `FASTMTP_` variables inside is undone."""
    before = _variables()
    try:
        yield
    finally:
        for name in _variables().keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)


def _variables() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name.startswith(ENV_PREFIX)}
