#!/usr/bin/env bash
# A real vLLM engine for the CPU, from PyPI alone, in a virtual environment.
#   usage: install.sh VERSION VENV
# Repeatable: a finished environment of the same version, lock and scripts is left as it is.
# Takes about a minute and 3 GB of disk; 0.9 GB are downloaded the first time.
set -euo pipefail
if [ $# -ne 2 ]; then echo "usage: install.sh VERSION VENV" >&2; exit 2; fi
version=$1 venv=$2
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
say() { echo "[vllm $version] $*" >&2; }

lock=$here/lock-$version.txt
stamp=$venv/.installed
want=$(cat "$here/install.sh" "$here/stubs.py" "$here/lock.py" "$here/test-packages.txt" "$lock" 2>/dev/null | sha256sum | cut -d' ' -f1)
if [ -x "$venv/bin/python" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$want" ]; then
    say "already in $venv"
    exit 0
fi

"$here/../../../.ci/system-packages" cc:gcc readelf:binutils libnuma.so.1:libnuma1 python-venv:python3-venv

# vLLM 0.26 to 0.32 are tested with 3.11 and run on 3.11 to 3.14.
python=
for candidate in "${PEGAFLOW_PYTHON:-}" python3.11 python3.12 python3.13 python3; do
    [ -n "$candidate" ] || continue
    if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))' 2>/dev/null; then
        python=$candidate
        break
    fi
done
if [ -z "$python" ]; then
    say "no Python 3.11 to 3.14 with the venv module found; install one (Debian 12, Ubuntu 24.04: apt-get install python3-venv) or name it in PEGAFLOW_PYTHON"
    exit 1
fi

say "making $venv with $($python --version)"
rm -rf "$venv"
mkdir -p "$(dirname "$venv")"
"$python" -m venv "$venv"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check uv==0.13.9
if [ ! -f "$lock" ]; then
    say "no lock for this version here; resolving"
    lock=$venv/lock.txt
    "$venv/bin/python" "$here/lock.py" "$version" > "$lock.new"
    mv "$lock.new" "$lock"
fi
say "installing $(grep -c == "$lock") packages"
"$venv/bin/uv" pip install --quiet --python "$venv/bin/python" --no-deps -r "$lock"
"$venv/bin/uv" pip install --quiet --python "$venv/bin/python" -r "$here/test-packages.txt"
"$venv/bin/python" "$here/stubs.py" "$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" >&2
say "checking that it imports"
CUDA_VISIBLE_DEVICES='' "$venv/bin/python" -W ignore -c '
import sys, torch, vllm
print("torch", torch.__version__, "vllm", vllm.__version__, file=sys.stderr)
sys.exit(vllm.__version__ != sys.argv[1])' "$version" 2> >(grep -v triton >&2)
echo "$want" > "$stamp"
say "ready"
