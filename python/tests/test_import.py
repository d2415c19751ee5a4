"""`import pegaflow` needs neither vLLM nor torch, and the connector must not pull in what vLLM on CPU cannot stand."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest


def loaded_by(statement: str) -> set[str]:
    code = f"import sys; {statement}; print('\\n'.join(sys.modules))"
    output = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    return set(output.split())


def test_the_package_alone_loads_neither_vllm_nor_torch() -> None:
    modules = loaded_by("import pegaflow; assert pegaflow.__version__")
    assert "pegaflow._native" in modules
    assert not {"vllm", "torch", "numpy"} & modules


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
def test_the_connector_does_not_load_numba() -> None:
    """vLLM 0.32 on CPU fails when the connector's module, which it imports early, has loaded numba before it."""
    before = loaded_by("import vllm.distributed.kv_transfer.kv_connector.v1.base")
    modules = loaded_by("from pegaflow import PegaKVConnector")
    assert not {"numba", "llvmlite"} & (modules - before)


def test_unknown_names_are_attribute_errors() -> None:
    import pegaflow

    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        pegaflow.nothing  # noqa: B018
