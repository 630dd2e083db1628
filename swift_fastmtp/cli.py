"""The `fastmtp` verbs. What each takes is written at the functions that `VERBS` names (`options.py`)."""

import argparse
import errno
import json
import os
import select
import signal
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from . import __version__
from .errors import FastMTPError
from .redaction import hide, redact

if TYPE_CHECKING:
    from .simulate.training_cost import Workload


def _plugin_path() -> None:
    """path for swift's --external_plugins"""
    from .swift_plugin.compat_swift import PLUGIN_FILE

    print(PLUGIN_FILE)


def _distill(prompts: list[str], output: str, **options: Any) -> None:
    """answers to your prompts, from the model itself"""
    from .data.distill import distill

    skip_or_stop = options.get("on_bad_row", "stop")
    files = [_prompt_file(name, number, output, skip_or_stop) for number, name in enumerate(prompts)]
    names = dict(zip(files, prompts, strict=True))
    distill(prompts=files, output=output, prompt_names=names, **_with_api_key(options))


def _prompt_file(name: str, number: int, output: str, on_bad_row: str) -> str:
    """A file as it is; a dataset of a hub is saved once, beside the answers."""
    from .files.jobs import parts_folder
    from .files.rows import save_hub_dataset
    from .files.staging import refuse_existing

    hub, _, dataset = name.partition(":")
    if hub not in ("hf", "swift"):
        return name
    refuse_existing(output)
    path = parts_folder(output) / f"prompts-{number}.jsonl"
    if not path.exists():
        if hub == "swift":
            from .swift_plugin.dataset import save_dataset

            save_dataset(dataset, path, on_bad_row)
        else:
            save_hub_dataset(dataset, path)
    return str(path)


def _hidden(**options: Any) -> None:
    """hidden states from the model's server, to train on without its backbone"""
    from .data.hidden import hidden

    count = hidden(**_with_api_key(options))
    print(f"{options['hidden_cache']}: the hidden states of {count} documents")


def _with_api_key(options: dict[str, Any]) -> dict[str, Any]:
    return {**options, "api_key": options.get("api_key") or os.environ.get("OPENAI_API_KEY")}


def _clean(**options: Any) -> None:
    """the rows worth training on, and why the others are not"""
    from .data.clean import clean

    clean(**options)


def _mix(**options: Any) -> None:
    """training and validation rows with a share of the tokens for each group"""
    from .data.mix import mix

    mix(**options)


def _vocab(**options: Any) -> None:
    """token maps, the ids that a draft may choose from, and what they cover"""
    from .vocab.build import vocab

    vocab(**options)


def _inspect(*, as_json: bool = False, gpus: str | None = None, **options: Any) -> None:
    """what MTP a checkpoint holds; exit status 1 if it cannot be trained here

    Args:
        as_json: for scripts
        gpus: what training it on these takes, such as 8xH20: memory, hours and disk, and which way to take
    """
    from .export.inspection import inspect_model, text

    folder = options.pop("folder")
    work = _work(gpus, options)
    # config.json alone says what training takes, but not what there is to be trained.
    has_weights = gpus is None or any(Path(folder).glob("*.safetensors*"))
    found = inspect_model(folder) if has_weights else None
    trainable = found is None or found.trainable
    training = None
    if gpus is not None and work and trainable:
        from .simulate.training_plan import plan

        training = plan(folder, gpus, work)
    if as_json:
        parts = found.to_dict() if found else {"model": folder}
        if training:
            parts["training"] = training.to_dict()
        print(json.dumps(parts, ensure_ascii=False, indent=2))
    else:
        print(text(found) if found else f"{folder}: no weights here; by its config.json:")
        if training:
            from .simulate.training_plan import text as text_of_plan

            print(text_of_plan(training))
    if not trainable:
        sys.exit(1)


def _work(gpus: str | None, options: dict[str, Any]) -> "Workload | None":
    """What `--gpus` is asked about; the options that describe it are nobody's without it."""
    if gpus is None:
        if options:
            raise FastMTPError(f"--{next(iter(options))} is about training; name the machine too, such as --gpus 8xH20")
        return None
    from .simulate.gpus import read_gpus
    from .simulate.training_cost import Workload

    read_gpus(gpus)  # a bad one stops it before anything is read
    return Workload(**options)


def _graft(model: str, output_dir: str, **options: Any) -> None:
    """the base model's MTP layer, put into a tuned model that lost it"""
    from .export.graft import graft

    done = graft(model, output_dir, **options)
    draft_only = options.get("draft_only", False)
    what = f"a {done.family} layer for {model}" if draft_only else f"{model} with a {done.family} head"
    print("\n".join((f"{output_dir}: {what}", *(f"  {note}" for note in done.notes))))
    if draft_only:
        print(f"  serve it: fastmtp serve-args {output_dir}")
    else:
        print(f"  heal it: swift sft --model_type fastmtp --model {output_dir} --dataset ...")


def _export(
    *,
    draft_only: bool = False,
    no_remote_code: bool = False,
    results: Sequence[str] | None = None,
    hub_name: str | None = None,
    **options: Any,
) -> None:
    """a checkpoint that SGLang and vLLM serve

    Args:
        draft_only: only config, tokenizer and the MTP layer
        no_remote_code: a config.json that needs no --trust-remote-code
        results: results.json of fastmtp bench; writes a model card
        hub_name: for the card: OWNER/NAME of the base on the hub
    """
    from .checkpoint.checkpoint import Checkpoint
    from .export.beside import export_trained

    if results:
        from .report.merge import load_results

        load_results(results)  # bad ones stop it before anything is written
    folder = options["output_dir"]
    base = export_trained(remote_code=not no_remote_code, draft_only=draft_only, **options)
    # Of a head that was trained beside a model that cannot take it, both are the folder of the layer alone.
    written = "full checkpoint" if Checkpoint(folder).has_backbone() else "draft-only folder"
    print(f"{folder}: {written}, base {base}")
    if results:
        from .report.model_card import write_card

        print(f"{write_card(folder, results, hub_name)}: model card")


def _serve_args(**options: Any) -> None:
    """the command that serves an exported folder, and why"""
    from .serving.flags import explain
    from .serving.launch import serve_flags

    print(explain(serve_flags(**options)))


def _doctor(*, data: str | None = None, probe: bool = False, probe_prompts: str | None = None, **options: Any) -> None:
    """what would make acceptance collapse silently; exit status 1 on errors

    Args:
        data: rows to train on: are they rendered as they were asked?
        probe: run the model and measure its MTP layer: what is accepted, and if little is, why
        probe_prompts: --probe with these rows (JSONL with `messages` or `prompt`) for the built-in ones
    """
    from .export.doctor import examine

    if probe_prompts:
        from .files.rows import read_rows

        read_rows(probe_prompts)  # bad ones stop it before anything is loaded
    folder, findings = options["folder"], examine(**options)
    if data:
        from .export.data_check import examine_data

        findings += examine_data(folder, data)
    for finding in findings:
        print(finding)
    if probe or probe_prompts:
        from .export.finding import Finding
        from .export.init_head import initial_head
        from .simulate.probe import probe as measure

        sys.stdout.flush()  # what the files told, before a minute of work
        engine = options.get("engine", "sglang")
        probed = measure(folder, options.get("model"), probe_prompts, engine, initial_head)
        print(probed.text)
        found = [Finding(*verdict) for verdict in probed.verdicts]
        for finding in found:
            print(finding)
        findings += found
    errors = sum(f.level == "error" for f in findings)
    print(f"{folder}: {errors} errors, {len(findings) - errors} warnings")
    if errors:
        sys.exit(1)


def _simulate(*, adapters: Sequence[str] = (), costs: str | None = None, **options: Any) -> None:
    """acceptance without a server: every depth and every K at once

    Args:
        adapters: trained checkpoints to compare with it
        costs: results.json of `fastmtp bench --costs`, or a GPU to predict them for (a100, h20, h100, h200, a10, l40s,
            rtx4090): tells the best K by load
    """
    from .simulate.simulate import simulate

    if costs and costs.endswith(".json"):
        from .bench.costs import read_step_times

        options["step_times"] = read_step_times(costs)
    elif costs:
        options["step_times"] = costs
    simulate(checkpoints=list(adapters), **options)


def _bench(**options: Any) -> None:
    """acceptance, speed and losslessness of servers, running or from a plan"""
    from .bench.bench import bench

    bench(**_with_api_key(options))


def _report(**options: Any) -> None:
    """which server is fastest, tables, plots and one page, from results of fastmtp bench"""
    from .report.report import report

    print("\n".join(report(**options)))
    print(f"{options['output_dir']}: report.html, report.md, plots")


def _compare(**options: Any) -> None:
    """did B get worse than A? exit status 1 if so"""
    from .report.compare import compare, text

    found = compare(**options)
    print(text(found))
    if found.regressions:
        sys.exit(1)


def _card(**options: Any) -> None:
    """README.md of an exported folder, for the Hugging Face hub"""
    from .report.model_card import write_card

    print(f"{write_card(**options)}: model card")


def _run(**options: Any) -> None:
    """the whole way, from prompts to a measured head, in one command that goes on after a kill"""
    from .run.plan import Verbs
    from .run.run import run

    run(Verbs(_options_of, _check_words), **options)


class Verb(NamedTuple):
    """One command of `fastmtp`; the first line of its function's docstring is its help."""

    run: Callable[..., None]
    places: tuple[str, ...] = ()
    """Functions and dataclasses whose parameters are its options (`options.py`)."""
    words: tuple[str, ...] = ()
    """Parameters that are given without the name of an option."""
    names: Mapping[str, str] = MappingProxyType({})
    """Parameter → option, where they differ; "" for a parameter that is no option."""


_FILTERS = ("data.filters:Length", "data.filters:Repetition", "data.filters:Decontaminate")
_DISTILL = {"model_dir": "model", "base_urls": "base_url", "prompt_names": ""}
_INSPECT = {"folder": "model", "as_json": "json"}
_INSPECT_PLACES = ("export.inspection:inspect_model", "simulate.training_cost:Workload", "cli:_inspect")
_EXPORT = {"checkpoint": "adapters", "base_model": "model", "remote_code": "", "hub_name": "base_model"}
_SIMULATE = {
    "model_dir": "model",
    "checkpoints": "",
    "token_maps": "token_map",
    "context_maps": "context_map",
    "dtype": "torch_dtype",
    "step_times": "",
}
_BENCH = {"base_urls": "base_url", "temperatures": "temperature"}
VERBS = {
    "plugin-path": Verb(_plugin_path),
    "distill": Verb(_distill, ("data.distill:distill",), names=_DISTILL),
    "hidden": Verb(_hidden, ("data.hidden:hidden",), names={"model_dir": "model", "base_urls": "base_url"}),
    "clean": Verb(_clean, ("data.clean:clean", *_FILTERS)),
    "mix": Verb(_mix, ("data.mix:mix",)),
    "vocab": Verb(_vocab, ("vocab.build:vocab",)),
    "inspect": Verb(_inspect, _INSPECT_PLACES, ("folder",), _INSPECT),
    "graft": Verb(_graft, ("export.graft:graft",)),
    "export": Verb(_export, ("export.folders:export_full", "cli:_export"), names=_EXPORT),
    "serve-args": Verb(_serve_args, ("serving.launch:serve_flags",), ("folder",)),
    "doctor": Verb(_doctor, ("export.doctor:examine", "cli:_doctor"), ("folder",)),
    "simulate": Verb(_simulate, ("simulate.simulate:simulate", "cli:_simulate"), names=_SIMULATE),
    "bench": Verb(_bench, ("bench.bench:bench", "bench.plan_keys:PlanValues"), names=_BENCH),
    "report": Verb(_report, ("report.report:report",), ("results",)),
    "compare": Verb(_compare, ("report.compare:compare",), ("a", "b"), {"a": "A", "b": "B"}),
    "card": Verb(_card, ("report.model_card:write_card",), ("folder",)),
    "run": Verb(_run, ("run.run:run",), ("plan",), {"verbs": "", "plan": "PLAN", "base_urls": "base_url"}),
}


def _options_of(name: str) -> dict[str, dict[str, Any]]:
    """Option → what argparse knows of it, of a verb."""
    from .options import settings_of

    verb = VERBS[name]
    options = {}
    for place in verb.places:
        for parameter, (option, settings) in settings_of(place, verb.names).items():
            if parameter not in verb.words:
                options[option] = settings
    return options


def _check_words(words: Sequence[str]) -> None:
    """Raises `FastMTPError` if a command would be refused for an option."""
    _parser(words[0], _Raising).parse_args(words)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """As argparse, but a key that stands behind a misspelt option is not repeated."""
        known, mark, words = message.partition("unrecognized arguments: ")
        if mark:
            options = [word.partition("=")[0] for word in words.split() if word.startswith("-")]
            message = known + mark + " ".join(options or ["a word behind the others"])
        super().error(redact(message))


class _Raising(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise FastMTPError(f"{self.prog.removeprefix('fastmtp ')}: {message}")


def _parser(asked: str | None, kind: Callable[..., argparse.ArgumentParser] = _Parser) -> argparse.ArgumentParser:
    """Of all verbs, with the options of the one that is asked for."""
    from .options import add_options  # reads Python, for which importing this module need not pay

    parser = kind(prog="fastmtp", description="Train, export and measure MTP draft heads.")
    parser.add_argument("--version", action="version", version=__version__)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, verb in VERBS.items():
        of_verb = verbs.add_parser(name, help=str(verb.run.__doc__).partition("\n")[0])
        if name == asked:
            for place in verb.places:
                add_options(of_verb, place, verb.words, verb.names)
    return parser


_REFUSED_NAMES = (errno.ENAMETOOLONG, errno.ELOOP, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR)


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point. A `FastMTPError` becomes one line on stderr and exit status 1; so does a name that no file can have,
    or that may not be opened. No secret is printed, in a traceback neither."""
    words = sys.argv[1:] if argv is None else argv
    asked = next((word for word in words if not word.startswith("-")), None)
    options = vars(_parser(asked).parse_args(words))
    hide(options.get("api_key"))
    try:
        VERBS[options.pop("verb")].run(**options)
        sys.stdout.flush()
    except FastMTPError as error:
        sys.exit(f"fastmtp: error: {error}")
    except KeyboardInterrupt:
        print("fastmtp: interrupted; long jobs go on when started again", file=sys.stderr)
        sys.exit(130)
    except Exception as error:  # noqa: BLE001 (whatever others' code raises)
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            sys.exit(128 + signal.SIGPIPE)
        if isinstance(error, OSError) and error.errno in _REFUSED_NAMES and error.filename:
            # A name or a folder that the system refuses, wherever it was met first: no mistake of the program.
            sys.exit(f"fastmtp: error: {FastMTPError(f'{error.filename}: {error.strerror}')}")
        sys.exit(redact(traceback.format_exc().rstrip()))


def _nobody_reads() -> bool:
    """Whether what reads our output has ended (`fastmtp inspect MODEL | head`); then nothing more is written."""
    output = sys.stdout.fileno()
    pipe = select.poll()
    pipe.register(output, select.POLLOUT)
    broken = any(event & select.POLLERR for _, event in pipe.poll(0))
    if broken:
        os.dup2(os.open(os.devnull, os.O_WRONLY), output)  # what is left would be written at the end
    return broken


if __name__ == "__main__":
    main()
