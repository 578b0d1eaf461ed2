"""Writes docs/api.md from the docstrings of what squish_nf4 exports: python scripts/api_page.py (make format runs it).

Only the grouping stands here, and a sentence for each group. A public name that no group has ends the script, and
tests/package/test_docs_api.py compares the page with what this would write.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import squish_nf4  # noqa: E402
from squish_nf4.checkpoint.audit.compare import Differences, Place  # noqa: E402
from squish_nf4.checkpoint.audit.diff import TensorDiff  # noqa: E402
from squish_nf4.checkpoint.audit.inspection import Inspected  # noqa: E402
from squish_nf4.checkpoint.audit.measure import Group, Nf4Numbers  # noqa: E402
from squish_nf4.checkpoint.conversion.plan import Planned  # noqa: E402
from squish_nf4.model.report import LayerReport, LeftAlone  # noqa: E402

PAGE = ROOT / "docs" / "api.md"
WIDTH = 120

# title: (what the group is, its names in reading order)
GROUPS: dict[str, tuple[str, tuple[str, ...]]] = {
    "Operators": (
        "Functions on tensors, CPU or CUDA. They are `torch.ops.squish` with the refusal of non-finite weights added. "
        "[numerics.md](numerics.md) states the arithmetic.",
        ("quantize_nf4", "dequantize_nf4", "linear_nf4"),
    ),
    "Layers and models": (
        "[saving.md](saving.md) says how a quantized model is saved and loaded.",
        ("NF4Linear", "NF4Embedding", "NF4Packer", "quantize_model", "QuantizeReport", "dequantize_model"),
    ),
    "Checkpoints": (
        "[convert.md](convert.md) and [loading.md](loading.md) are the manuals, [format.md](format.md) the format.",
        (
            *("convert", "dry_run", "ConvertOptions", "ConvertReport", "TensorReport", "ConvertPlan"),
            *("UnfinishedError", "quantize_tensor", "load_npy_dir", "iter_npy_dir", "load_into", "LoadReport"),
            *("verify", "VerifyReport", "diff", "DiffReport", "inspect", "Inspection", "Progress"),
        ),
    ),
    "Leaving Python": (
        "[torchscript.md](torchscript.md), [compile-and-export.md](compile-and-export.md) and "
        "[native/cpp.md](native/cpp.md) show the ways.",
        (
            *("export_torchscript", "TorchScriptReport", "TorchScriptError"),
            *("decompositions", "library_path", "cmake_prefix_path"),
        ),
    ),
    "The rest": ("", ("pick_group_size", "__version__")),
}

# What the reports hold that has no public name of its own.
PARTS: dict[str, tuple[type, ...]] = {
    "QuantizeReport": (LayerReport, LeftAlone),
    "ConvertPlan": (Planned,),
    "DiffReport": (TensorDiff, Differences, Place),
    "Inspection": (Inspected, Nf4Numbers, Group),
}
CONSTANTS = {"__version__": "The version of the package, a string."}
SECTION = re.compile(r"(?m)^(Args|Attributes|Returns|Raises|Warns):\n((?:^(?:    .*)?\n?)+)")
ENTRY = re.compile(r"(?m)^(\S.*?): ")


def page() -> str:
    require_all_grouped()
    lines = [
        "# The Python interface",
        "",
        "Everything that `import squish_nf4` offers. Made of the docstrings by `scripts/api_page.py`: change those,",
        "then type `make format`.",
        "",
    ]
    for title, (_, names) in GROUPS.items():
        lines += [f"**[{title}](#{anchor(title)})**", "", "| | |", "|---|---|"]
        lines += [f"| [`{name}`](#{anchor(name)}) | {cell(first_line(name))} |" for name in names]
        lines.append("")
    for title, (text, names) in GROUPS.items():
        lines += [f"## {title}", ""]
        lines += [text, ""] if text else []
        for name in names:
            lines += entry(name)
    return "\n".join(lines).rstrip() + "\n"


def require_all_grouped() -> None:
    grouped = [name for _, names in GROUPS.values() for name in names]
    if sorted(grouped) != sorted(squish_nf4.__all__):
        raise SystemExit(f"scripts/api_page.py: not in one group each: {set(grouped) ^ set(squish_nf4.__all__)}")


def first_line(name: str) -> str:
    return CONSTANTS.get(name) or docstring(getattr(squish_nf4, name)).split("\n", 1)[0]


def entry(name: str) -> list[str]:
    value = getattr(squish_nf4, name)
    lines = [f"### {prose(name)}", ""]
    if name in CONSTANTS:
        return [*lines, CONSTANTS[name], ""]
    if inspect.isfunction(value):
        return [*lines, *code(f"squish_nf4.{name}", value), *body(docstring(value))]
    if not dataclasses.is_dataclass(value) and not issubclass(value, Exception):
        lines += code(f"squish_nf4.{name}", value)
    lines += body(docstring(value), fields_of(value))
    lines += members(value)
    for part in PARTS.get(name, ()):
        where = f"`{part.__module__}.{part.__name__}`"
        lines += [f"#### {part.__name__}", "", where, "", *body(docstring(part), fields_of(part))]
    return lines


def members(cls: type) -> list[str]:
    """What the class itself adds: properties in a list, and the methods of a module. Reports are not called."""
    own = {key: value for key, value in vars(cls).items() if not key.startswith("_") and key != "extra_repr"}
    properties = {key: value for key, value in own.items() if isinstance(value, property | cached_property)}
    lines = ["Properties:", ""] if properties else []
    lines += [f"- `{key}`: {prose(docstring(value))}" for key, value in properties.items()]
    lines += [""] if properties else []
    for key in () if dataclasses.is_dataclass(cls) else own:
        method = getattr(cls, key)
        if inspect.isroutine(method):
            title = f"{cls.__name__}.{key}"
            lines += [f"#### {title}", "", *code(title, method, drop_self=True), *body(docstring(method))]
    return lines


def code(name: str, function: Any, drop_self: bool = False) -> list[str]:
    return ["```python", signature(name, function, drop_self), "```", ""]


def signature(name: str, function: Any, drop_self: bool = False) -> str:
    """As it is written, on one line where that fits, else a parameter a line."""
    found = inspect.signature(function)
    parameters = list(found.parameters.values())
    if drop_self and parameters and parameters[0].name == "self":
        parameters = parameters[1:]
    shown: list[str] = []
    for before, parameter in zip([None, *parameters], parameters, strict=False):
        first_by_name = parameter.kind is parameter.KEYWORD_ONLY and (
            before is None or before.kind not in (parameter.KEYWORD_ONLY, parameter.VAR_POSITIONAL)
        )
        shown += ["*"] if first_by_name else []
        shown.append(parameter_text(parameter))
    result = "" if inspect.isclass(function) else f" -> {annotation(found.return_annotation)}"
    line = f"{name}({', '.join(shown)}){result}"
    if len(line) <= WIDTH:
        return line
    return f"{name}(\n" + "".join(f"    {text},\n" for text in shown) + f"){result}"


def parameter_text(parameter: inspect.Parameter) -> str:
    stars = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
    default = "" if parameter.default is parameter.empty else f" = {parameter.default!r}"
    return f"{stars}{parameter.name}: {annotation(parameter.annotation)}{default}"


def annotation(value: Any) -> str:
    text = value if isinstance(value, str) else inspect.formatannotation(value)
    return text.strip("'\"").replace("torch.nn.modules.linear.", "nn.").replace("torch.Tensor", "Tensor")


def fields_of(cls: type) -> dict[str, str]:
    """{field: its type, and its default}, of a dataclass."""
    if not dataclasses.is_dataclass(cls):
        return {}
    return {
        field.name: annotation(field.type)
        + ("" if field.default is dataclasses.MISSING else f", {field.default!r} by default")
        for field in dataclasses.fields(cls)
    }


def docstring(value: Any) -> str:
    text = value.__doc__
    if not text:
        raise SystemExit(f"scripts/api_page.py: {getattr(value, '__qualname__', value)} has no docstring")
    return inspect.cleandoc(text)


def body(text: str, fields: dict[str, str] | None = None) -> list[str]:
    """A docstring as Markdown: its prose, and each section as a list. fields: their types, to be shown with them."""
    lines: list[str] = []
    at = 0
    for section in SECTION.finditer(text + "\n"):
        lines += paragraphs(text[at : section.start()])
        at = section.end()
        lines += [f"{section[1]}:", "", *items(section[1], inspect.cleandoc("\n" + section[2]), fields or {}), ""]
    return lines + paragraphs(text[at:])


def paragraphs(text: str) -> list[str]:
    return [line for part in re.split(r"\n\s*\n", text.strip()) if part for line in (prose(part), "")]


def items(kind: str, text: str, fields: dict[str, str]) -> Iterator[str]:
    """The entries of a section: each begins a line, where a sentence has ended; those of Returns may have no name."""
    for item in re.split(r"(?m)(?:\A|(?<=\.)\n)(?=\S)", text)[1:]:
        found = ENTRY.match(item)
        if not found or (kind == "Returns" and not re.fullmatch(r"\w+", found[1])):
            yield f"- {prose(item)}"
            continue
        names = ", ".join(f"`{name}`" for name in found[1].split(", "))
        of_type = f" ({prose(fields[found[1]], code=True)})" if found[1] in fields else ""
        yield f"- {names}{of_type}: {prose(item[found.end() :])}"


def prose(text: str, code: bool = False) -> str:
    """One line; what Markdown would take for markup is escaped, and pages are linked."""
    text = " ".join(text.split())
    if code:
        return f"`{text}`"
    pieces = re.split(r"``(.+?)``", text)
    for at, piece in enumerate(pieces):
        if at % 2:
            pieces[at] = f"`{piece}`"
            continue
        piece = re.sub(r"[*<]|(?<![a-zA-Z0-9])_|_(?![a-zA-Z0-9])", r"\\\g<0>", piece)
        pieces[at] = re.sub(r"docs/([\w/-]+\.md)", r"[\1](\1)", piece)
    return "".join(pieces)


def cell(text: str) -> str:
    return prose(text).replace("|", "\\|")


def anchor(heading: str) -> str:
    return heading.lower().replace(" ", "-")


if __name__ == "__main__":
    PAGE.write_text(page())
