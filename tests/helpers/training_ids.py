"""What ms-swift's own pipeline would train on, as ids."""

import shutil

from swift_fastmtp.swift_plugin.register import register

TOOLS = [{"type": "function", "function": {"name": "look_up", "parameters": {"type": "object", "properties": {}}}}]


def trained(folder, dataset, **options):
    """(input ids, labels) of every example that `swift sft` would train on, by ms-swift's own pipeline."""
    register()
    from swift.pipelines.export.cached_dataset import ExportCachedDataset

    flags = {"model": folder, "model_type": "fastmtp", "dataset": dataset, "to_cached_dataset": "true"}
    flags |= {"split_dataset_ratio": 0, "output_dir": f"{dataset}.cache", "dataset_num_proc": 1, **options}
    pipeline = ExportCachedDataset([str(x) for k, v in flags.items() for x in (f"--{k}", v)])
    rows, _ = pipeline._prepare_dataset()
    encoded = [pipeline.template.encode(row, return_length=True) for row in rows]
    shutil.rmtree(f"{dataset}.cache", ignore_errors=True)
    return [(x["input_ids"], x["labels"]) for x in encoded]


def supervised(examples):
    """(everything before, answer) of each run of supervised tokens."""
    found = []
    for ids, labels in examples:
        assert all(label in (-100, i) for i, label in zip(ids, labels, strict=True))
        start = None
        for at, label in enumerate([*labels, -100]):
            if label != -100 and start is None:
                start = at
            if label == -100 and start is not None:
                found.append((ids[:start], ids[start:at]))
                start = None
    return sorted(found)
