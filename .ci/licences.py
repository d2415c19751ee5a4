"""Collects the licences of what is linked into the programs and the module, for the wheel.

usage: licences.py FOLDER

Writes FOLDER/THIRD-PARTY.txt, from the sources that cargo has: for each crate its name, version and licence, then the
texts that lie in it, also those of the C and C++ libraries that it brings along.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# A crate's own texts lie on top; those of a library inside it one folder below.
PATTERNS = ("LICEN[CS]E*", "COPYING*", "NOTICE*", "*/LICEN[CS]E*", "*/COPYING*")


def main() -> int:
    """Writes the file; returns the exit code."""
    folder = Path(sys.argv[1])
    command = [
        "cargo",
        "metadata",
        "--locked",
        "--format-version",
        "1",
        "--filter-platform",
        "x86_64-unknown-linux-gnu",
    ]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=True)
    packages = [package for package in json.loads(ended.stdout)["packages"] if package["source"]]
    texts: dict[str, list[str]] = {}
    for package in sorted(packages, key=lambda package: (package["name"], package["version"])):
        home = Path(package["manifest_path"]).parent
        name = f"{package['name']} {package['version']}"
        texts.setdefault(f"licence: {package['license'] or 'see its files'}", []).append(name)
        for pattern in PATTERNS:
            for path in sorted(path for path in home.glob(pattern) if path.is_file()):
                text = path.read_text(encoding="utf-8", errors="replace").strip()
                texts.setdefault(text, []).append(f"{name}, {path.relative_to(home)}")
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(ROOT / "LICENSE", folder)
    with (folder / "THIRD-PARTY.txt").open("w", encoding="utf-8") as file:
        for text, owners in texts.items():
            file.write(f"{'=' * 100}\n{'; '.join(owners)}\n\n{text}\n\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
