"""Loads only the packers of auto-gptq, autoawq, gptqmodel and AutoRound.

Their packages import GPU kernels and removed parts of transformers. A single module works without
these if each package above it is replaced by an empty one.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any


def load(name: str, empty: tuple[str, ...]) -> Any:
    """Imports a module while the packages with these names contain only modules.

    Raises:
        ModuleNotFoundError: the library is not installed.
    """
    top = name.partition(".")[0]
    spec = importlib.util.find_spec(top) if top not in sys.modules else sys.modules[top].__spec__
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"No module named {top!r}", name=top)
    for package in empty:
        if package not in sys.modules:
            module = ModuleType(package)
            module.__path__ = [str(Path(spec.origin).parent.parent / package.replace(".", "/"))]
            module.__spec__ = spec
            sys.modules[package] = module
    return importlib.import_module(name)


def load_auto_gptq() -> Any:
    """The linear layer of auto-gptq that runs on a CPU."""
    packages = ("auto_gptq", "auto_gptq.nn_modules", "auto_gptq.nn_modules.qlinear")
    return load("auto_gptq.nn_modules.qlinear.qlinear_cuda", packages).QuantLinear


def load_autoawq(version: str) -> Any:
    """The module of autoawq with the linear layers of a version, gemm or gemv."""
    packages = ("awq", "awq.modules", "awq.modules.linear", "awq.utils")
    return load(f"awq.modules.linear.{version}", packages)


def load_gptqmodel(name: str = "nn_modules.qlinear.torch") -> Any:
    """A module of gptqmodel; by default the one with the linear layer that runs on a CPU."""
    packages = ("gptqmodel", "gptqmodel.models")
    with contextlib.suppress(ImportError):  # a constant of its package is missing
        return load(f"gptqmodel.{name}", packages)
    sys.modules["gptqmodel"].DEBUG_ON = False  # type: ignore[attr-defined]
    return load(f"gptqmodel.{name}", packages)


def load_auto_round(name: str) -> Any:
    """A linear layer of AutoRound that runs on a CPU: qlinear_torch, for v1 qlinear_torch_zp."""
    packages = ("auto_round", "auto_round.utils")
    packages += ("auto_round_extension", "auto_round_extension.torch")
    with contextlib.suppress(ImportError):  # a function of its package is missing
        return load(f"auto_round_extension.torch.{name}", packages).QuantLinear
    sys.modules["auto_round.utils"].get_packing_device = lambda _: "cpu"  # type: ignore[attr-defined]
    return load(f"auto_round_extension.torch.{name}", packages).QuantLinear
