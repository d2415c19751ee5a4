#!/usr/bin/env bash
# LMCache beside a vLLM environment whose torch it uses, for its own bench of L2 adapters. 150 MB; no GPU, no CUDA.
#   usage: install.sh VENV BASE_VENV
# Repeatable: a finished environment of the same list is left as it is.
set -euo pipefail
if [ $# -ne 2 ]; then echo "usage: install.sh VENV BASE_VENV" >&2; exit 2; fi
venv=$1 base=$2
list=$(dirname "${BASH_SOURCE[0]}")/packages.txt
want=$(cat "$list" "${BASH_SOURCE[0]}" | sha256sum | cut -d' ' -f1)
if [ "$(cat "$venv/.installed" 2>/dev/null)" = "$want" ]; then exit 0; fi
echo "[lmcache] installing $(head -1 "$list") into $venv" >&2
rm -rf "$venv"
"$base/bin/python" -m venv "$venv"
site() { "$1/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; }
site "$base" > "$(site "$venv")/base.pth"
# Without what they ask for: that would bring CUDA, and other versions of what vLLM has.
"$base/bin/uv" pip install --quiet --python "$venv/bin/python" --no-deps -r "$list"
"$venv/bin/python" -W ignore -c 'import lmcache.lmcache_native'
echo "$want" > "$venv/.installed"
