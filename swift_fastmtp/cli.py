"""The `fastmtp` verbs. Each only parses its arguments and calls the function that does the work."""

import argparse
import errno
import json
import math
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any, NoReturn

from . import __version__
from .errors import FastMTPError
from .files.inputs import loads
from .redaction import hide, redact


def _plugin_path(_: argparse.Namespace) -> None:
    from .swift_plugin.compat_swift import PLUGIN_FILE

    print(PLUGIN_FILE)


def _distill(args: argparse.Namespace) -> None:
    from .data.distill import distill

    files = [_prompt_file(name, number, args.output, args.on_bad_row) for number, name in enumerate(args.prompts)]
    distill(
        args.model,
        files,
        args.output,
        prompt_names=dict(zip(files, args.prompts, strict=True)),
        base_urls=args.base_url,
        served_model_name=args.served_model_name,
        api_key=args.api_key or os.environ.get("OPENAI_API_KEY"),
        concurrency=args.concurrency,
        timeout=args.timeout,
        retry_seconds=args.retry_seconds,
        batch_size=args.batch_size,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        chat_template_kwargs=args.chat_template_kwargs,
        num_answers=args.num_answers,
        seed=args.seed,
        shard=args.shard,
        on_bad_row=args.on_bad_row,
        torch_dtype=args.torch_dtype,
    )


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


def _clean(args: argparse.Namespace) -> None:
    from .data.clean import clean

    clean(**{k: v for k, v in vars(args).items() if k not in ("run", "verb") and v is not None})


def _mix(args: argparse.Namespace) -> None:
    from .data.mix import mix

    mix(**{k: v for k, v in vars(args).items() if k not in ("run", "verb")})


def _vocab(args: argparse.Namespace) -> None:
    from .vocab.build import vocab

    vocab(**{k: v for k, v in vars(args).items() if k not in ("run", "verb")})


def _inspect(args: argparse.Namespace) -> None:
    from .export.inspection import inspect_model, text

    found = inspect_model(args.model)
    print(json.dumps(found.to_dict(), ensure_ascii=False, indent=2) if args.json else text(found))
    if not found.trainable:
        sys.exit(1)


def _graft(args: argparse.Namespace) -> None:
    from .export.graft import graft

    done = graft(args.model, args.output_dir, args.donor, args.init_from_last_layer, args.overwrite)
    print("\n".join((f"{args.output_dir}: {args.model} with a {done.family} head", *(f"  {n}" for n in done.notes))))
    print(f"  heal it: swift sft --model_type fastmtp --model {args.output_dir} --dataset ...")


def _export(args: argparse.Namespace) -> None:
    from .export.folders import export_draft, export_full

    if args.results:
        from .report.merge import load_results

        load_results(args.results)  # bad ones stop it before anything is written
    write = export_draft if args.draft_only else export_full
    base = write(args.adapters, args.output_dir, args.model, not args.no_remote_code, args.token_maps)
    print(f"{args.output_dir}: {'draft-only folder' if args.draft_only else 'full checkpoint'}, base {base}")
    if args.results:
        from .report.model_card import write_card

        print(f"{write_card(args.output_dir, args.results, args.base_model)}: model card")


def _serve_args(args: argparse.Namespace) -> None:
    from .serving.launch import explain, serve_flags

    print(explain(serve_flags(args.folder, args.engine, args.num_steps, args.token_map, args.model)))


def _doctor(args: argparse.Namespace) -> None:
    from .export.doctor import examine

    findings = examine(args.folder, args.model, args.token_map, args.tp_size)
    if args.data:
        from .export.data_check import examine_data

        findings += examine_data(args.folder, args.data)
    for finding in findings:
        print(finding)
    errors = sum(f.level == "error" for f in findings)
    print(f"{args.folder}: {errors} errors, {len(findings) - errors} warnings")
    if errors:
        sys.exit(1)


def _simulate(args: argparse.Namespace) -> None:
    from .simulate.simulate import simulate

    options = {k: v for k, v in vars(args).items() if k not in ("run", "verb", "model", "adapters", "dataset")}
    options |= {"token_maps": options.pop("token_map"), "dtype": options.pop("torch_dtype")}
    simulate(args.model, args.adapters, args.dataset, **options)


def _bench(args: argparse.Namespace) -> None:
    from .bench.bench import bench

    own = ("run", "verb", "output_dir", "plan", "base_url", "api_key")
    bench(
        args.output_dir,
        plan=args.plan,
        base_urls=args.base_url or (),
        api_key=args.api_key or os.environ.get("OPENAI_API_KEY"),
        **{k: v for k, v in vars(args).items() if k not in own},
    )


def _report(args: argparse.Namespace) -> None:
    from .report.report import report

    print(f"{report(args.results, args.output_dir)}: report.html, report.md, plots")


def _compare(args: argparse.Namespace) -> None:
    from .report.compare import Limits, compare, text

    found = compare(args.a, args.b, Limits(args.max_tau_drop, args.max_speed_drop, args.max_equal_drop))
    print(text(found))
    if found.regressions:
        sys.exit(1)


def _card(args: argparse.Namespace) -> None:
    from .report.model_card import write_card

    print(f"{write_card(args.folder, args.results, args.base_model, args.overwrite)}: model card")


def _json_object(text: str) -> dict[str, Any]:
    value = loads(text)
    if not isinstance(value, dict):
        raise ValueError
    return value


def number(text: str) -> float:
    """No NaN, which is below and above no limit, and no infinity."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError
    return value


def tokens(text: str) -> int:
    from .data.mix import parse_tokens

    return parse_tokens(text)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """As argparse, but a key that stands behind a misspelt option is not repeated."""
        known, mark, words = message.partition("unrecognized arguments: ")
        if mark:
            options = [word.partition("=")[0] for word in words.split() if word.startswith("-")]
            message = known + mark + " ".join(options or ["a word behind the others"])
        super().error(redact(message))


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="fastmtp", description="Train, export and measure MTP draft heads.")
    parser.add_argument("--version", action="version", version=__version__)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    verb = verbs.add_parser("plugin-path", help="path for swift's --external_plugins")
    verb.set_defaults(run=_plugin_path)

    verb = verbs.add_parser("distill", help="answers to your prompts, from the model itself")
    verb.add_argument("--model", required=True, help="checkpoint folder; with --base_url only its tokenizer is read")
    verb.add_argument("--prompts", required=True, nargs="+", help="JSONL (.gz, .xz), Parquet, hf:NAME, swift:NAME")
    verb.add_argument("--output", required=True, help="JSONL to write; an unfinished one is continued")
    verb.add_argument(
        "--base_url", nargs="+", help="servers of the model (SGLang, vLLM, swift deploy); default: in process"
    )
    verb.add_argument("--served_model_name", help="the servers' name of the model; default: the only one they have")
    verb.add_argument("--api_key", help="default, which others on the machine do not see: $OPENAI_API_KEY")
    verb.add_argument("--concurrency", type=int, default=128, help="conversations at a time, on servers")
    verb.add_argument(
        "--timeout", type=number, default=600, help="seconds of silence until a server must show that it lives"
    )
    verb.add_argument(
        "--retry_seconds", type=number, default=600, help="a request is repeated so long after its first failure"
    )
    verb.add_argument("--batch_size", type=int, default=32, help="conversations at a time, in process")
    verb.add_argument(
        "--torch_dtype",
        choices=("float32", "bfloat16", "float16"),
        help="in process; default: float32, on a GPU the model's",
    )
    verb.add_argument("--max_new_tokens", type=int, default=4096, help="paper: 4096")
    verb.add_argument("--temperature", type=number, default=0.6, help="paper: 0.6; 0 is greedy")
    verb.add_argument("--top_k", type=int, default=20, help="paper: 20")
    verb.add_argument("--top_p", type=number, default=0.95, help="paper: 0.95")
    verb.add_argument("--chat_template_kwargs", type=_json_object, help='JSON, as {"enable_thinking": false}')
    verb.add_argument("--num_answers", type=int, default=1, help="answers to every prompt, each with its own seed")
    verb.add_argument("--seed", type=int, default=0)
    verb.add_argument("--shard", default="0/1", help="i/n: this worker's share of one job")
    verb.add_argument("--on_bad_row", choices=("stop", "skip"), default="stop", help="skipped rows are in the report")
    verb.set_defaults(run=_distill)

    verb = verbs.add_parser("clean", help="the rows worth training on, and why the others are not")
    verb.add_argument("--inputs", nargs="+", required=True, help="JSONL (.gz, .xz) or Parquet")
    verb.add_argument("--output", required=True, help="JSONL to write, with a report beside it")
    verb.add_argument("--removed", help="JSONL to write of the rows that were removed, and why")
    verb.add_argument("--filters", nargs="+", metavar="NAME", help="only these; default: all but refusals")
    verb.add_argument("--skip_filters", nargs="+", metavar="NAME", help="all but these")
    verb.add_argument(
        "--model", help="folder of the tokenizer that counts where there are no token_ids; default: estimate"
    )
    verb.add_argument("--min_answer_tokens", type=int, help="of the last answer; default 4")
    verb.add_argument("--max_answer_tokens", type=int, help="of any answer; default and paper: 4096")
    verb.add_argument("--max_row_tokens", type=int, help="of all messages together; default 32768")
    verb.add_argument("--max_duplicate_lines", type=number, help="share of an answer's lines; default 0.5")
    verb.add_argument("--max_duplicate_ngrams", type=number, help="share of an answer's words in them; default 0.5")
    verb.add_argument("--min_loop_characters", type=int, help="an end that loops for less is no loop; default 60")
    verb.add_argument("--decontaminate", nargs="+", metavar="TASK", help="names, name=FILE or files; default: smoke")
    verb.add_argument("--duplicates_of", choices=("row", "prompt"), help="what has to be alike; default: row")
    verb.add_argument("--similarity", type=number, help="Jaccard similarity of near-duplicates; default 0.6")
    verb.add_argument("--ngram", type=int, help="words (Chinese: characters) that are compared together; default 3")
    verb.add_argument("--on_bad_row", choices=("stop", "skip"), default="stop", help="skipped rows are in the report")
    verb.set_defaults(run=_clean)

    verb = verbs.add_parser("mix", help="training and validation rows with a share of the tokens for each group")
    verb.add_argument("--inputs", nargs="+", required=True, help="JSONL (.gz, .xz), Parquet; or group=FILE")
    verb.add_argument("--output_dir", required=True, help="folder to write; must not exist")
    verb.add_argument("--shares", nargs="+", metavar="GROUP=SHARE", help="default: --config's, or the paper's")
    verb.add_argument("--config", help="YAML with shares and the rules of the groups, as recipes/data/paper_mix.yaml")
    verb.add_argument("--tokens", type=tokens, help="training tokens, as 200M; default: as many as the shares allow")
    verb.add_argument("--count", choices=("answers", "all"), default="answers", help="which tokens")
    verb.add_argument("--max_repeat", type=int, default=1, help="how often a row may be in train.jsonl")
    verb.add_argument("--val_ratio", type=number, default=0.005, help="fraction of the prompts that is held out")
    verb.add_argument("--seed", type=int, default=0)
    verb.add_argument(
        "--model", help="folder of the tokenizer that counts where there are no token_ids; default: estimate"
    )
    verb.add_argument("--on_bad_row", choices=("stop", "skip"), default="stop", help="skipped rows are in the report")
    verb.set_defaults(run=_mix)

    verb = verbs.add_parser("vocab", help="token maps, the ids that a draft may choose from, and what they cover")
    verb.add_argument("--inputs", nargs="+", required=True, help="JSONL (.gz, .xz) or Parquet of rows with answers")
    verb.add_argument("--model", required=True, help="folder with config.json and the tokenizer")
    verb.add_argument("--output_dir", required=True, help="folder to write; must not exist")
    verb.add_argument("--sizes", nargs="+", type=int, help="ids in each map; default: 8192 16384 32768 65536")
    verb.add_argument("--coverage", type=number, help="instead of sizes: share of held-out tokens, as 0.99")
    verb.add_argument("--by", choices=("language", "group", "category"), default="language", help="what has maps")
    verb.add_argument("--count", choices=("answers", "all"), default="answers", help="which tokens")
    verb.add_argument("--held_out", type=number, default=0.05, help="fraction of prompts that coverage is measured on")
    verb.add_argument("--jobs", type=int, default=1, help="processes that count")
    verb.add_argument("--on_bad_row", choices=("stop", "skip"), default="stop", help="skipped rows are in the report")
    verb.set_defaults(run=_vocab)

    verb = verbs.add_parser("inspect", help="what MTP a checkpoint holds; exit status 1 if it cannot be trained here")
    verb.add_argument("model", help="checkpoint folder; only config.json and headers are read")
    verb.add_argument("--json", action="store_true", help="for scripts")
    verb.set_defaults(run=_inspect)

    verb = verbs.add_parser("graft", help="the base model's MTP layer, put into a tuned model that lost it")
    verb.add_argument("--model", required=True, help="folder of the fine-tuned, merged or RL-trained model")
    verb.add_argument("--donor", help="folder of a model of the same sizes that has the layer: the base model")
    verb.add_argument("--output_dir", required=True, help="folder to write; must not exist")
    verb.add_argument("--init_from_last_layer", action="store_true", help="make a layer where there is no donor")
    verb.add_argument("--overwrite", action="store_true", help="replace an MTP layer that the model has")
    verb.set_defaults(run=_graft)

    verb = verbs.add_parser("export", help="a checkpoint that SGLang and vLLM serve")
    verb.add_argument("--adapters", required=True, help="checkpoint of swift sft (tuner type fastmtp, full or lora)")
    verb.add_argument("--output_dir", required=True, help="folder to write; must not exist")
    verb.add_argument("--model", help="base model folder; default: the one the checkpoint was trained for")
    verb.add_argument("--draft_only", action="store_true", help="only config, tokenizer and the MTP layer")
    verb.add_argument("--no_remote_code", action="store_true", help="a config.json that needs no --trust-remote-code")
    verb.add_argument(
        "--token_maps", help="JSON list of languages and maps that the server drafts with; see simulate --by"
    )
    verb.add_argument("--results", nargs="+", help="results.json of fastmtp bench; writes a model card")
    verb.add_argument("--base_model", help="for the card: OWNER/NAME of the base on the hub")
    verb.set_defaults(run=_export)

    verb = verbs.add_parser("serve-args", help="the command that serves an exported folder, and why")
    verb.add_argument("folder", help="full checkpoint or draft-only folder")
    verb.add_argument("--engine", choices=("sglang", "vllm"), default="sglang")
    verb.add_argument("--num_steps", type=int, help="drafts per step, K; default: what the head was trained for")
    verb.add_argument("--token_map", help="file for SGLang's --speculative-token-map")
    verb.add_argument("--model", help="target of a draft-only folder; default: its base model")
    verb.set_defaults(run=_serve_args)

    verb = verbs.add_parser("doctor", help="what would make acceptance collapse silently; exit status 1 on errors")
    verb.add_argument("folder", help="full checkpoint, draft-only folder or training checkpoint")
    verb.add_argument("--model", help="base model to compare with; default: the one the head was trained for")
    verb.add_argument("--token_map", help="file meant for SGLang's --speculative-token-map")
    verb.add_argument("--tp_size", type=int, default=1, help="planned tensor parallelism")
    verb.add_argument("--data", help="rows to train on: are they rendered as they were asked?")
    verb.set_defaults(run=_doctor)

    verb = verbs.add_parser("simulate", help="acceptance without a server: every depth and every K at once")
    verb.add_argument("--model", required=True, help="checkpoint folder; its own head is the first row")
    verb.add_argument("--adapters", nargs="*", default=[], help="trained checkpoints to compare with it")
    verb.add_argument("--dataset", required=True, help="JSONL with `messages` (or `prompt`)")
    verb.add_argument("--output_dir", help="write simulate.json, plots and maps.json here")
    verb.add_argument("--num_steps", type=int, default=3, help="largest draft depth K")
    verb.add_argument("--max_new_tokens", type=int, default=1024, help="paper: 1024")
    verb.add_argument("--answers", choices=("generate", "given"), default="generate", help="greedy, or the dataset's")
    verb.add_argument("--token_map", nargs="*", default=[], help="also measure with these SGLang token maps")
    verb.add_argument("--by", choices=("language", "group", "category"), help="a table and a token map for each")
    verb.add_argument("--temperature", type=number, default=0.0, help="of the answers; also measures sampled drafts")
    verb.add_argument("--top_k", type=int, default=20, help="of sampled answers, as in bench; 0 is all")
    verb.add_argument("--top_p", type=number, default=0.95, help="of sampled answers, as in bench")
    verb.add_argument("--seed", type=int, default=0, help="of sampled answers")
    verb.add_argument("--draft_ms", type=number, help="measured: one draft step; default: predicted from bytes")
    verb.add_argument("--verify_ms", type=number, help="measured: one verification step")
    verb.add_argument("--decode_ms", type=number, help="measured: one step without drafts; default: as --verify_ms")
    verb.add_argument("--max_rows", type=int, help="of the dataset, from its top; default: all")
    verb.add_argument("--batch_size", type=int, default=16)
    verb.add_argument("--torch_dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    verb.add_argument("--device", default="cpu")
    verb.set_defaults(run=_simulate)

    verb = verbs.add_parser("bench", help="acceptance, speed and losslessness of servers, running or from a plan")
    verb.add_argument("--output_dir", required=True, help="folder to write; an unfinished run is continued")
    verb.add_argument("--plan", nargs="+", metavar="YAML", help="servers to start and measure one after another")
    verb.add_argument("--base_url", nargs="+", metavar="[NAME=]URL", help="or running servers (SGLang, OpenAI's API)")
    verb.add_argument("--model", help="folder of the model, for its chat template; default: the plan's")
    verb.add_argument("--tasks", nargs="+", metavar="TASK", help="names, name=FILE or files; default: smoke")
    verb.add_argument("--num_questions", type=int, help="of every task, drawn by --seed; default: the task's")
    verb.add_argument("--max_new_tokens", type=int, help="default and paper: 1024")
    verb.add_argument("--temperature", type=number, nargs="+", dest="temperatures", help="default: 0, greedy")
    verb.add_argument("--top_k", type=int, help="above temperature 0; default: 20")
    verb.add_argument("--top_p", type=number, help="above temperature 0; default: 0.95")
    verb.add_argument("--concurrency", type=int, nargs="+", help="conversations at a time; default: 1")
    verb.add_argument("--num_steps", type=int, nargs="+", help="drafts per step, K, of a plan's servers; default: 3")
    verb.add_argument("--baseline", metavar="NAME", help="what others are compared with; default: the plan's first")
    verb.add_argument("--warmup", type=int, help="answers before anything is timed; default: 4")
    verb.add_argument("--seed", type=int, help="of drawn questions and sampled answers; default: 0")
    verb.add_argument("--chat_template_kwargs", type=_json_object, help='JSON, as {"enable_thinking": false}')
    verb.add_argument("--served_model_name", help="the servers' name of the model; default: the only one they have")
    verb.add_argument("--api_key", help="default, which others on the machine do not see: $OPENAI_API_KEY")
    verb.add_argument(
        "--timeout", type=number, help="seconds of silence until a server must show that it lives; default: 600"
    )
    verb.add_argument(
        "--retry_seconds", type=number, help="a request is repeated so long after its first failure; default: 60"
    )
    verb.set_defaults(run=_bench)

    verb = verbs.add_parser("report", help="tables, plots and one page from results of fastmtp bench")
    verb.add_argument("results", nargs="+", help="results.json; several are put together")
    verb.add_argument("--output_dir", required=True, help="folder to write; must not exist")
    verb.set_defaults(run=_report)

    verb = verbs.add_parser("compare", help="did B get worse than A? exit status 1 if so")
    verb.add_argument("a", metavar="A", help="results.json of before")
    verb.add_argument("b", metavar="B", help="results.json of now")
    verb.add_argument("--max_tau_drop", type=number, default=0.02, help="fraction of A's micro tau")
    verb.add_argument("--max_speed_drop", type=number, default=0.05, help="fraction of A's token/s")
    verb.add_argument(
        "--max_equal_drop", type=number, default=0.0, help="of the share of answers equal to the baseline"
    )
    verb.set_defaults(run=_compare)

    verb = verbs.add_parser("card", help="README.md of an exported folder, for the Hugging Face hub")
    verb.add_argument("folder", help="full checkpoint or draft-only folder of an export")
    verb.add_argument("--results", nargs="+", default=[], help="results.json of fastmtp bench")
    verb.add_argument("--base_model", help="OWNER/NAME of the base on the hub; default: what its folder tells")
    verb.add_argument("--overwrite", action="store_true", help="replace a README.md that somebody wrote")
    verb.set_defaults(run=_card)
    return parser


_REFUSED_NAMES = (errno.ENAMETOOLONG, errno.ELOOP, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR)


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point. A `FastMTPError` becomes one line on stderr and exit status 1; so does a name that no file can have,
    or that may not be opened. No secret is printed, in a traceback neither."""
    args = _parser().parse_args(argv)
    hide(getattr(args, "api_key", None))
    try:
        args.run(args)
    except FastMTPError as error:
        sys.exit(f"fastmtp: error: {error}")
    except KeyboardInterrupt:
        print("fastmtp: interrupted; long jobs go on when started again", file=sys.stderr)
        sys.exit(130)
    except Exception as error:  # noqa: BLE001 (whatever others' code raises)
        if isinstance(error, OSError) and error.errno in _REFUSED_NAMES and error.filename:
            # A name or a folder that the system refuses, wherever it was met first: no mistake of the program.
            sys.exit(f"fastmtp: error: {FastMTPError(f'{error.filename}: {error.strerror}')}")
        sys.exit(redact(traceback.format_exc().rstrip()))


if __name__ == "__main__":
    main()
