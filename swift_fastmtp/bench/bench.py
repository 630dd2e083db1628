"""`fastmtp bench`: what servers do on tasks, every request kept.

Servers take turns (`order`), each with its prefix cache flushed before every run. A request is a line of
`requests.jsonl` as soon as it ends (`records`), so a run that was killed goes on where it was; `results.json` follows
from the lines (`from_records.summarize`).
"""

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

from ..data.chat_template import check_chat_template, load_tokenizer
from ..errors import FastMTPError
from ..files.staging import write_json
from ..redaction import without_login
from .costs import COSTS, COSTS_STEPS, costs_table, with_paused_servers
from .engines import Engine, Identity
from .from_records import summarize
from .measure import Measurement
from .plan import Launch, Plan, make_plan, read_plan, server_urls
from .records import missing_turns, open_records, read_plan_record
from .results import Results, check_results
from .servers import Started, started
from .summary import distributions, regimes, table, warnings


def bench(
    output_dir: str,
    *,
    plan: str | Sequence[str] | None = None,
    base_urls: Sequence[str] | None = None,
    api_key: str | None = None,
    costs: bool = False,
    **values: Any,
) -> Results:
    """Measure, and write `plan.json`, `requests.jsonl`, `results.json` and the servers' logs to `output_dir`.

    Args:
        output_dir: folder to write; an unfinished run is continued
        plan: YAML of servers to start and measure; several are put together (docs/bench.md)
        base_urls: or running servers (SGLang, OpenAI's API), each URL or NAME=URL
        api_key: default, on the command line, where others on the machine do not see it: $OPENAI_API_KEY
        costs: measure what a step takes at 1, 2, 4 .. 32 answers at once, instead of tasks (docs/bench.md)
        values: values of a plan (`PlanValues`) that go before the file's

    Raises `FastMTPError` if the plan is not good, the folder is another plan's, or a server fails; what is finished is
    kept.
    """
    if bool(plan) == bool(base_urls):
        raise FastMTPError("either --plan or --base_url says which servers to measure")
    # What is to be done, and everything that can be refused before a server is started.
    wanted = {**(read_plan(plan) if plan else {"servers": server_urls(base_urls or ())})}
    if costs:
        wanted = {"num_steps": COSTS_STEPS, **wanted, **COSTS}
        if isinstance(wanted.get("servers"), dict):
            wanted["servers"] = with_paused_servers(wanted["servers"])
    wanted |= {k: v for k, v in values.items() if v is not None}
    made = make_plan(wanted)
    tokenizer = load_tokenizer(made.model)
    if any(any("sglang" in part for part in launch.command) for launch in made.launches.values()):
        check_chat_template(tokenizer, made.model)  # before a server is started, which takes minutes
    folder = Path(output_dir)
    _meet(made, folder, tokenizer, api_key)
    if made.distribution_samples and (made.baseline is None or len(made.launches) < 2):
        raise FastMTPError(
            "distribution_samples: needs a server and a baseline to compare it with; name it by method: baseline"
        )

    # The servers in turn; what is finished is kept.
    with open_records(folder, made) as (records, part, record), _Servers(made, folder) as servers:
        left = missing_turns(made, record, records)
        for name, turn in groupby(left, key=lambda key: key[0]):
            passes = {key: left[key] for key in turn}
            url, server = servers.reach(name)
            engine = _engine(url, made, tokenizer, api_key)
            asyncio.run(Measurement(made, name, engine, server, records, part).all(passes))
        results = summarize(records, record)
        check_results(results)
        write_json(results.as_json(), folder / "results.json")

    print(costs_table(results) if costs else table(results))
    print(f"{folder / 'results.json'}: {len(results.runs)} runs, {sum(r.num_requests for r in results.runs)} requests")
    for line in [*regimes(results), *distributions(results), *warnings(results)]:
        print(line)
    return results


def _engine(url: str, plan: Plan, tokenizer: Any, api_key: str | None) -> Engine:
    return Engine(
        url,
        tokenizer,
        plan.sampling,
        plan.served_model_name,
        api_key,
        timeout=plan.timeout,
        retry_seconds=plan.retry_seconds,
        concurrency=max(plan.concurrency),
    )


def _meet(plan: Plan, folder: Path, tokenizer: Any, api_key: str | None) -> None:
    """Ask running servers what they are. One that was asked when the folder was begun need not be there any more."""
    known = read_plan_record(folder).get("servers", {})
    for name, launch in plan.launches.items():
        if launch.base_url is None:
            continue
        asked = launch.server
        if name in known:
            recorded = {k: known[name][k] for k in ("num_steps", "token_map", "draft_model", "command", "method")}
            launch.server = replace(asked, **recorded)
            continue

        async def ask(url: str) -> Identity:
            engine = _engine(url, plan, tokenizer, api_key)
            try:
                return await engine.connect()
            finally:
                await engine.close()

        identity = asyncio.run(ask(launch.base_url))
        steps = identity.num_steps if asked.num_steps < 0 else asked.num_steps
        if steps is not None and asked.method and (asked.method == "baseline") != (steps == 0):
            what = f"makes {steps} drafts per step" if steps else "makes no drafts"
            raise FastMTPError(
                f"{name}: the server at {without_login(launch.base_url)} {what}, so it is no {asked.method} server; "
                "name it by what it is, or serve it so"
            )
        token_map = asked.token_map or (Path(identity.token_map).stem if identity.token_map else None)
        launch.server = replace(
            asked,
            num_steps=steps or 0,
            token_map=token_map,
            method=asked.method or ("tuned+map" if token_map else "tuned" if steps else "baseline"),
            draft_model=(identity.draft_model or identity.model_path) if steps else None,
            command=identity.command,
        )
    if plan.baseline is None:
        plan.baseline = next((n for n, x in plan.launches.items() if x.server.method == "baseline"), None)


class _Servers:
    """The servers of a plan that are up: all of them, or only the one that was asked for last."""

    def __init__(self, plan: Plan, folder: Path) -> None:
        self._plan, self._folder = plan, folder
        self._up: dict[str, tuple[str, Started | None]] = {}
        self._stack = ExitStack()

    def __enter__(self) -> "_Servers":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def reach(self, name: str) -> tuple[str, Started | None]:
        """Address of a server, and its process if it was started here."""
        if name not in self._up:
            self._stack.close()
            self._up.clear()
            for one in self._plan.launches if self._plan.together else [name]:
                self._up[one] = self._stack.enter_context(
                    _reach(one, self._plan.launches[one], self._plan, self._folder)
                )
        return self._up[name]


@contextmanager
def _reach(name: str, launch: Launch, plan: Plan, folder: Path) -> Iterator[tuple[str, Started | None]]:
    if launch.base_url is not None:
        yield launch.base_url, None
        return
    with started(name, launch, folder / "logs" / f"{name}.log", plan.start_seconds) as server:
        yield server.url, server
