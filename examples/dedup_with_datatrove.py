"""Near-duplicates on a cluster: the signatures of `fastmtp clean`, on the engine of datatrove.

    pip install "datatrove[io,processing]"
    python examples/dedup_with_datatrove.py --input cleaned/ --output deduplicated/ --tasks 64 --workers 16

Use it where one machine is outgrown; where it is not, `fastmtp clean` is simpler and compares pairs exactly.
`--input` is a folder of JSONL files of rows, which the tasks share; `--output` gets one file per task. On Slurm or Ray,
put `SlurmPipelineExecutor` or `RayPipelineExecutor` in the place of `LocalPipelineExecutor`: the stages stay the same.
"""

import argparse
import json

import numpy as np
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.dedup import MinhashDedupBuckets, MinhashDedupCluster, MinhashDedupFilter, MinhashDedupSignature
from datatrove.pipeline.dedup.minhash import MinhashConfig
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.writers import JsonlWriter
from datatrove.utils.hashing import HashConfig
from datatrove.utils.word_tokenizers import WhitespaceTokenizer

from swift_fastmtp.data.near_duplicates import prompt_and_answer, signature
from swift_fastmtp.data.shingles import runs, units

# datatrove removes what shares a bucket, without comparing: 6 + 6 equal minima are needed, where clean asks for 2 + 2.
BANDS, ROWS_PER_BAND, NGRAM = 21, 6, 3
CONFIG = MinhashConfig(
    n_grams=NGRAM, num_buckets=BANDS, hashes_per_bucket=2 * ROWS_PER_BAND, hash_config=HashConfig(precision=32)
)


class Signature(MinhashDedupSignature):
    """Prompt and answer each with their own minima, as `fastmtp clean` does; a document's text is the row's JSON."""

    def get_shingles(self, text):
        sides = [np.unique(runs(units(side), NGRAM)) for side in prompt_and_answer(json.loads(text))]
        return signature(sides, BANDS, ROWS_PER_BAND)

    def get_signature(self, shingles):
        return shingles.tolist()


def read(folder):
    def document(_reader, row, path, number):
        return {"text": json.dumps(row, ensure_ascii=False), "id": f"{path}:{number}"}

    return JsonlReader(folder, adapter=document)


def write(folder):
    return JsonlWriter(folder, "${rank}.jsonl", compression=None, adapter=lambda _writer, doc: json.loads(doc.text))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", required=True)
    parser.add_argument("--output", required=True)
    parser.add_argument("--tasks", type=int, default=8, help="parts of the work")
    parser.add_argument("--workers", type=int, default=2, help="parts done at the same time")
    args = parser.parse_args()
    work = f"{args.output}/work"
    signatures = Signature(f"{work}/signatures", CONFIG, WhitespaceTokenizer())  # the tokenizer is not used
    stages = {
        "signatures": ([read(args.input), signatures], args.tasks),
        "buckets": ([MinhashDedupBuckets(f"{work}/signatures", f"{work}/buckets", config=CONFIG)], BANDS),
        "clusters": ([MinhashDedupCluster(f"{work}/buckets", f"{work}/remove", config=CONFIG)], 1),
        "filter": (
            [
                read(args.input),
                MinhashDedupFilter(f"{work}/remove", write(f"{args.output}/removed")),
                write(f"{args.output}/kept"),
            ],
            args.tasks,  # as for the signatures: a row is known by its task and place
        ),
    }
    for name, (pipeline, tasks) in stages.items():
        LocalPipelineExecutor(pipeline, tasks=tasks, workers=args.workers, logging_dir=f"{work}/logs/{name}").run()


if __name__ == "__main__":
    main()
