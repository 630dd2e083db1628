"""What the tests show of each form of target, beside which an MTP layer is put, trained and served: the table of
docs/graft.md, made from what was recorded while they ran (`support_matrix.py`)."""

import json

from helpers.paths import ROOT
from helpers.target_forms import QUANTIZED
from swift_fastmtp.files.table import markdown_table

RECORD = ROOT / "docs/results/target_forms.json"
DENSE = {"Llama, tied": "llama", "Qwen2, tied": "qwen2", "Mistral, tied": "mistral"}
FORMS = ["MiMo, plain", *DENSE, *QUANTIZED]
STAGES = {
    "graft": "`fastmtp graft --draft_only` writes the layer, no file of the target changes, and `fastmtp doctor` "
    "takes the folder",
    "train": "on stored hidden states, without a layer of the backbone: gradients are those of the whole model that "
    "computes with the numbers that the quantized tensors stand for, to the last bit",
    "SGLang": "a whole server of the target drafts with the folder; rounds are those of the simulator, in float32 all "
    "of them, in bfloat16 their sum within 10 %",
    "vLLM": "the same of a vLLM engine, by the flags of `fastmtp serve-args --engine vllm`",
    "probe": "`fastmtp doctor --probe` runs the target and measures the layer",
}
NO_READER = "packed weights are not read here"
NO_KERNEL = "no kernel for a CPU"
# Why a stage was not run for a form.
NOT_RUN = {
    "probe": {
        **dict.fromkeys([form for form in QUANTIZED if form != "FP8 blocks"], NO_READER),
        **dict.fromkeys(DENSE, "another class than the layer's"),
    },
    "SGLang": {
        "MiMo, plain": "whole checkpoints are, see families",
        **dict.fromkeys(("compressed-tensors FP8", "compressed-tensors int4"), NO_KERNEL),
        **dict.fromkeys(("ModelOpt NVFP4", "compressed-tensors NVFP4", "MXFP4", "bitsandbytes NF4"), NO_KERNEL),
    },
    "vLLM": {
        "MiMo, plain": "whole checkpoints are, see families",
        "FP8 blocks": "its kernel needs AMX",
        "ModelOpt NVFP4": NO_KERNEL,
        "compressed-tensors NVFP4": NO_KERNEL,
        "MXFP4": NO_KERNEL,
        "bitsandbytes NF4": "vLLM 0.32 has none",
    },
}


def read():
    return json.loads(RECORD.read_text(encoding="utf-8"))


def table():
    """A row for each form, a column for each stage."""
    record = read()
    rows = []
    for form in FORMS:
        ran = record["shown"].get(form, {})
        rows.append((form, *("ran" if stage in ran else f"– {NOT_RUN[stage][form]}" for stage in STAGES)))
    return page(STAGES, rows, record)


def page(columns, rows, record):
    """A table, what it was run with, and below it what each column means and which tests show it.

    Args:
        columns: name -> meaning.
        rows: of the table, the row's name first.
        record: what `support_matrix.py` wrote.
    """
    lines = [markdown_table(("", *columns), rows, num_text=len(columns) + 1)]
    versions = [f"{name} {version}" for name, version in record["run with"].items() if name != "device"]
    lines += ["", f"Run on a {record['run with']['device']} with {', '.join(versions)}:", ""]
    for column, meaning in columns.items():
        tests = {test for of_row in record["shown"].values() for test in of_row.get(column, ())}
        files = ", ".join(f"`{name}`" for name in sorted({test.partition("::")[0] for test in tests}))
        lines.append(f"* **{column}**: {meaning} ({len(tests)} {'test' if len(tests) == 1 else 'tests'} in {files})")
    return "\n".join(lines)
