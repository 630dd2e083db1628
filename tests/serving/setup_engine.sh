#!/usr/bin/env bash
# Make a virtual environment with stock SGLang on a CPU, for the serving tests and for trying serving on a laptop.
#
#   bash tests/serving/setup_engine.sh [FOLDER]      prints the folder; about a minute, 1.6 GB
#
# SGLang pins other versions than training does, hence an environment of its own. Without FOLDER it lives in the user's
# cache under a name made from the pins, so that it is built once. A folder that is complete is left as it is.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
sglang=${SGLANG_VERSION:-0.5.23} torch=2.13.0 transformers=${TRANSFORMERS_VERSION:-5.19.0} xgrammar=0.2.7
pins=$(printf '%s' "$sglang $torch $transformers $xgrammar $(cat "$here/requirements.txt")" | sha256sum | cut -c1-12)
folder=${1:-${XDG_CACHE_HOME:-$HOME/.cache}/swift_fastmtp/sglang-cpu-$pins}

mkdir -p "$(dirname "$folder")"
exec 9>"$folder.lock" && flock 9  # tests that run side by side make it once
if [ ! -f "$folder/complete" ]; then
  rm -rf "$folder"
  {
    python3 -m venv "$folder"
    # torch is pinned for every step: xgrammar and compressed-tensors would pull a CUDA build.
    printf 'torch==%s\ntransformers==%s\n' "$torch" "$transformers" > "$folder/constraints.txt"
    pip="$folder/bin/pip --quiet --disable-pip-version-check"
    $pip install -c "$folder/constraints.txt" torch transformers
    $pip install --no-deps "sglang==$sglang" "xgrammar==$xgrammar"  # xgrammar's one heavy need, triton, is stubbed
    $pip install -c "$folder/constraints.txt" -r "$here/requirements.txt" || exit 1
    touch "$folder/complete"
  } >&2
fi
echo "$folder"
