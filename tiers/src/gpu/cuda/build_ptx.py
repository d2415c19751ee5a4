"""Compiles gather_scatter.cu to gather_scatter.ptx with NVRTC, without a GPU and without nvcc. `make ptx` calls it.

The oldest NVRTC of CUDA 12 is used, so that drivers from CUDA 12.0 on take the PTX. The first line of the PTX holds a
hash of the source; a unit test compares it.
"""

import argparse
import ctypes
import subprocess
import sys
import tempfile
from pathlib import Path

NVRTC = "nvidia-cuda-nvrtc-cu12==12.0.76"
OPTIONS = [b"--gpu-architecture=compute_80"]
HERE = Path(__file__).resolve().parent


def fnv1a(data: bytes) -> int:
    """FNV-1a with 64 bits, as the unit test computes it."""
    value = 0xCBF29CE484222325
    for byte in data:
        value = (value ^ byte) * 0x100000001B3 % (1 << 64)
    return value


def install(directory: Path) -> Path:
    """Installs NVRTC below `directory`, if it is not there; returns its library."""
    found = list(directory.glob("nvidia/cuda_nvrtc/lib/libnvrtc.so.12"))
    if not found:
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(directory), NVRTC]
        subprocess.run(command, check=True)
        found = list(directory.glob("nvidia/cuda_nvrtc/lib/libnvrtc.so.12"))
    return found[0]


def compile_ptx(library: Path, source: bytes) -> bytes:
    """Returns the PTX of `source`."""
    ctypes.CDLL(str(library.with_name("libnvrtc-builtins.so.12.0")), mode=ctypes.RTLD_GLOBAL)
    nvrtc = ctypes.CDLL(str(library))
    program = ctypes.c_void_p()
    size = ctypes.c_size_t()

    def check(status: int, doing: str) -> None:
        if status:
            raise SystemExit(f"NVRTC: {doing} failed with status {status}")

    check(
        nvrtc.nvrtcCreateProgram(ctypes.byref(program), source, b"gather_scatter.cu", 0, None, None),
        "nvrtcCreateProgram",
    )
    options = (ctypes.c_char_p * len(OPTIONS))(*OPTIONS)
    status = nvrtc.nvrtcCompileProgram(program, len(OPTIONS), options)
    check(nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size)), "nvrtcGetProgramLogSize")
    log = ctypes.create_string_buffer(size.value)
    check(nvrtc.nvrtcGetProgramLog(program, log), "nvrtcGetProgramLog")
    print(log.value.decode(), end="", file=sys.stderr)
    check(status, "nvrtcCompileProgram")
    check(nvrtc.nvrtcGetPTXSize(program, ctypes.byref(size)), "nvrtcGetPTXSize")
    ptx = ctypes.create_string_buffer(size.value)
    check(nvrtc.nvrtcGetPTX(program, ptx), "nvrtcGetPTX")
    return ptx.value


def main() -> None:
    """Writes the PTX beside its source."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nvrtc", type=Path, help="where NVRTC is, or is to be installed; default: a temporary folder")
    arguments = parser.parse_args()
    source = (HERE / "gather_scatter.cu").read_bytes()
    with tempfile.TemporaryDirectory() as temporary:
        ptx = compile_ptx(install(arguments.nvrtc or Path(temporary)), source)
    header = f"// source-fnv1a: {fnv1a(source):016x}\n".encode()
    (HERE / "gather_scatter.ptx").write_bytes(header + ptx.rstrip(b"\0"))


if __name__ == "__main__":
    main()
