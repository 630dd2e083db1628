"""Options of the command line are the parameters of the functions behind it, and cost no import of these."""

import argparse
import inspect
import json
import re
import subprocess
import sys
from dataclasses import MISSING, fields, is_dataclass
from importlib import import_module

import pytest

from swift_fastmtp.bench.plan_keys import PlanValues
from swift_fastmtp.cli import VERBS, _parser, main
from swift_fastmtp.data.clean import FILTERS, ROW_FILTERS, _parameters, clean
from swift_fastmtp.options import add_options

PLACES = sorted({place for verb in VERBS.values() for place in verb.places})


def options_of(place, words=(), names=None):
    parser = argparse.ArgumentParser(add_help=False)
    add_options(parser, place, words, names)
    return {action.dest: action for action in parser._actions}


def parsed(*words):
    return vars(_parser(words[0]).parse_args(words))


@pytest.mark.parametrize("place", PLACES)
def test_what_is_read_is_what_python_sees(place):
    """Names, and which have to be given; a default is shown as it is."""
    module, _, name = place.partition(":")
    made = getattr(import_module(f"swift_fastmtp.{module}"), name)
    if is_dataclass(made):
        wanted = {f.name: f.default for f in fields(made) if f.default is not MISSING or f.default_factory != MISSING}
        empty = MISSING
    else:
        parameters = inspect.signature(made).parameters.values()
        wanted = {p.name: p.default for p in parameters if p.kind is not p.VAR_KEYWORD}
        empty = inspect.Parameter.empty
    options = options_of(place)
    assert list(options) == list(wanted)
    for name, default in wanted.items():
        if not is_dataclass(made):
            assert options[name].required == (default is empty)
        if isinstance(default, str | int | float) and not isinstance(default, bool):
            shown = options[name].help.rpartition("default: ")[2]
            assert type(default)(shown) == default


def test_the_command_has_every_parameter_of_the_filters():
    names = {f.name for kind in ROW_FILTERS for f in _parameters(kind)} | set(inspect.signature(clean).parameters)
    options = [name for place in VERBS["clean"].places for name in options_of(place)]
    assert names - {"parameters"} == set(options)
    assert len(set(FILTERS)) == len(FILTERS)


@pytest.mark.parametrize("verb", VERBS)
def test_every_option_has_its_help(verb):
    assert VERBS[verb].run.__doc__
    for place in VERBS[verb].places:
        for action in options_of(place, VERBS[verb].words, VERBS[verb].names).values():
            assert action.help and not action.help.startswith("; default"), action.dest


def test_numbers_of_a_plan_are_numbers_on_the_command_line():
    options = {}
    for place in VERBS["bench"].places:
        options |= options_of(place, VERBS["bench"].words, VERBS["bench"].names)
    numbers = [
        name for name, key in PlanValues.model_fields.items() if re.search(r"\b(int|float)\b", str(key.annotation))
    ]
    assert {"rounds", "warmup", "top_p", "concurrency"} <= set(numbers)
    assert [name for name in numbers if options[name].type in (None, str)] == []


def test_an_option_that_is_left_out_has_no_value():
    assert parsed("mix", "--inputs", "a", "--output_dir", "b") == {"verb": "mix", "inputs": ["a"], "output_dir": "b"}


def test_every_kind_of_value():
    words = ["--model", "m", "--prompts", "a", "b", "--output", "o", "--base_url", "x", "y"]
    words += ["--temp", "0", "--top_k=5", "--on_bad_row", "skip"]
    wanted = {"model_dir": "m", "prompts": ["a", "b"], "output": "o", "temperature": 0.0, "top_k": 5}
    wanted |= {"on_bad_row": "skip", "base_urls": ["x", "y"], "chat_template_kwargs": {"enable_thinking": False}}
    given = parsed("distill", *words, "--chat_template_kwargs", '{"enable_thinking": false}')
    assert given == {"verb": "distill", **wanted}
    assert parsed("mix", "--inputs", "a", "--output_dir", "b", "--tokens", "1.5M")["tokens"] == 1_500_000
    assert parsed("simulate", "--model", "m", "--dataset", "d", "--adapters")["adapters"] == []
    assert parsed("export", "--adapters", "a", "--output_dir", "b", "--no_remote_code")["no_remote_code"] is True
    assert parsed("report", "a", "b", "--output_dir", "c")["results"] == ["a", "b"]


WRONG = {
    "distill --model m --prompts p --output o --temperature nan": "argument --temperature: invalid number value: 'nan'",
    "distill --model m --prompts p --output o --top_k 1.5": "argument --top_k: invalid int value: '1.5'",
    "distill --model m --prompts p --output o --chat_template_kwargs []": "argument --chat_template_kwargs: invalid",
    "mix --inputs a --output_dir b --tokens many": "argument --tokens: invalid tokens value: 'many'",
    "mix --inputs a --output_dir b --count some": "argument --count: invalid choice: 'some'",
    "mix --inputs a": "the following arguments are required: --output_dir",
    "inspect": "the following arguments are required: model",
    "clean --inputs --output b": "argument --inputs: expected at least one argument",
    "card f --api_kex secret-word": "unrecognized arguments: --api_kex",
    "baked": "argument VERB: invalid choice: 'baked'",
    "": "the following arguments are required: VERB",
}


@pytest.mark.parametrize("line", WRONG)
def test_wrong_words(line, capsys):
    with pytest.raises(SystemExit) as end:
        main(line.split())
    *_, last = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and WRONG[line] in last and "secret-word" not in last


HELP = """
import contextlib, io, json, sys
from swift_fastmtp.cli import VERBS, main
for words in [[], *([verb] for verb in VERBS)]:
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
        main([*words, "--help"])
print(json.dumps(sorted(sys.modules)))
"""


def test_help_imports_no_verb():
    done = subprocess.run([sys.executable, "-c", HELP], capture_output=True, text=True, check=True)
    loaded = set(json.loads(done.stdout))
    assert not loaded & {"torch", "transformers", "numpy", "openai", "matplotlib"}
    assert not loaded & {f"swift_fastmtp.{place.partition(':')[0]}" for place in PLACES} - {"swift_fastmtp.cli"}


ONLY_FILES = ["data.mix", "data.clean", "export.inspection", "serving.launch", "report.report", "report.compare"]


def test_verbs_that_only_read_files_start_without_torch():
    """It takes seconds; where they need it after all, they import it then."""
    imports = "\n".join(f"import swift_fastmtp.{module}" for module in [*ONLY_FILES, "report.model_card"])
    code = f"import json, sys\n{imports}\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not set(json.loads(done.stdout)) & {"torch", "transformers"}
