"""NF4 for PyTorch: exact 4-bit quantization operators, a linear layer on packed bytes, a checkpoint converter.

Importing the package loads the native library, which registers ``torch.ops.squish``. What needs more than torch (the
converter, the command line, the demo) is imported when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from squish_nf4 import _native
from squish_nf4._native import cmake_prefix_path, library_path
from squish_nf4._version import __version__

try:
    _native.load()
except ImportError as reason:
    if _native.is_starting_the_command():
        raise SystemExit(f"squish-nf4: {reason}") from None  # a sentence for its user, not a traceback
    raise

from squish_nf4 import flops, vmap
from squish_nf4.decompositions import decompositions
from squish_nf4.layout import pick_group_size
from squish_nf4.model.quantize import dequantize_model, quantize_model
from squish_nf4.model.report import QuantizeReport
from squish_nf4.nn.embedding import NF4Embedding
from squish_nf4.nn.linear import NF4Linear
from squish_nf4.nn.packer import NF4Packer
from squish_nf4.ops import dequantize_nf4, linear_nf4, quantize_nf4

vmap.register()
flops.register()

if TYPE_CHECKING:
    from squish_nf4.checkpoint.audit.diff import DiffReport, diff
    from squish_nf4.checkpoint.audit.inspection import Inspection, inspect
    from squish_nf4.checkpoint.audit.verify import VerifyReport, verify
    from squish_nf4.checkpoint.conversion.convert import UnfinishedError, convert, dry_run
    from squish_nf4.checkpoint.conversion.encode import quantize_tensor
    from squish_nf4.checkpoint.conversion.options import ConvertOptions
    from squish_nf4.checkpoint.conversion.plan import ConvertPlan
    from squish_nf4.checkpoint.conversion.report import ConvertReport, TensorReport
    from squish_nf4.checkpoint.directory.reader import iter_npy_dir, load_npy_dir
    from squish_nf4.checkpoint.loading.load_into import LoadReport, load_into
    from squish_nf4.checkpoint.messages import Progress
    from squish_nf4.torchscript.export import TorchScriptReport, export_torchscript
    from squish_nf4.torchscript.refusals import TorchScriptError

_LAZY = {
    "DiffReport": "squish_nf4.checkpoint.audit.diff",
    "diff": "squish_nf4.checkpoint.audit.diff",
    "Inspection": "squish_nf4.checkpoint.audit.inspection",
    "inspect": "squish_nf4.checkpoint.audit.inspection",
    "VerifyReport": "squish_nf4.checkpoint.audit.verify",
    "verify": "squish_nf4.checkpoint.audit.verify",
    "UnfinishedError": "squish_nf4.checkpoint.conversion.convert",
    "convert": "squish_nf4.checkpoint.conversion.convert",
    "dry_run": "squish_nf4.checkpoint.conversion.convert",
    "quantize_tensor": "squish_nf4.checkpoint.conversion.encode",
    "ConvertOptions": "squish_nf4.checkpoint.conversion.options",
    "ConvertPlan": "squish_nf4.checkpoint.conversion.plan",
    "ConvertReport": "squish_nf4.checkpoint.conversion.report",
    "TensorReport": "squish_nf4.checkpoint.conversion.report",
    "iter_npy_dir": "squish_nf4.checkpoint.directory.reader",
    "load_npy_dir": "squish_nf4.checkpoint.directory.reader",
    "LoadReport": "squish_nf4.checkpoint.loading.load_into",
    "load_into": "squish_nf4.checkpoint.loading.load_into",
    "Progress": "squish_nf4.checkpoint.messages",
    "TorchScriptReport": "squish_nf4.torchscript.export",
    "export_torchscript": "squish_nf4.torchscript.export",
    "TorchScriptError": "squish_nf4.torchscript.refusals",
}

__all__ = [
    "ConvertOptions",
    "ConvertPlan",
    "ConvertReport",
    "DiffReport",
    "Inspection",
    "LoadReport",
    "NF4Embedding",
    "NF4Linear",
    "NF4Packer",
    "Progress",
    "QuantizeReport",
    "TensorReport",
    "TorchScriptError",
    "TorchScriptReport",
    "UnfinishedError",
    "VerifyReport",
    "__version__",
    "cmake_prefix_path",
    "convert",
    "decompositions",
    "dequantize_model",
    "dequantize_nf4",
    "diff",
    "dry_run",
    "export_torchscript",
    "inspect",
    "iter_npy_dir",
    "library_path",
    "linear_nf4",
    "load_into",
    "load_npy_dir",
    "pick_group_size",
    "quantize_model",
    "quantize_nf4",
    "quantize_tensor",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'squish_nf4' has no attribute '{name}'")
    value = getattr(import_module(_LAZY[name]), name)
    globals()[name] = value  # a function, even where a module of the same name was imported on the way
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
