"""The text of a PTX module into functions, basic blocks and instructions.

Calls are inlined: a called function's instructions stand in the caller's place, under names of their own.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

SIZES = {name + str(8 * size): size for name in "busf" for size in (1, 2, 4, 8)} | {"pred": 1, "f16x2": 4, "bf16x2": 4}


class Register(NamedTuple):
    name: str


class Literal(NamedTuple):
    """A number as it is written, or the bits of a float."""

    value: int
    float_bits: int = 0  # 32 or 64, if it is a float


class Symbol(NamedTuple):
    """The address of a variable, or a label."""

    name: str


class Address(NamedTuple):
    base: Operand
    offset: int


class Several(NamedTuple):
    """{a, b, c, d}, or a|b."""

    parts: tuple[Operand, ...]


Operand = Register | Literal | Symbol | Address | Several


@dataclass(frozen=True)
class Instruction:
    name: str  # "ld.global.v4.u32"
    operands: tuple[Operand, ...]
    guard: str = ""  # the name of a predicate; the instruction is for the threads where it holds,
    negated: bool = False  # or does not
    text: str = field(default="", compare=False)

    @property
    def words(self) -> list[str]:
        return self.name.split(".")


@dataclass(frozen=True)
class Variable:
    """A place in memory: a constant, a table in shared memory, a local array, a parameter."""

    name: str
    space: str
    size: int
    align: int
    image: bytes = b""


@dataclass
class Function:
    name: str
    parameters: list[Variable]
    results: list[Variable]
    most_threads: int = 1024  # of a block
    registers: dict[str, int] = field(default_factory=dict)  # the size of each, by name
    variables: list[Variable] = field(default_factory=list)  # of its own: shared and local
    body: list[Instruction | str] = field(default_factory=list)  # a string is a label


@dataclass
class Module:
    variables: list[Variable]  # in constant, global and (extern) shared memory
    functions: dict[str, Function]


VARIABLE = re.compile(
    r"\.(?P<space>const|global|shared|local|param)\s+(?:\.align\s+(?P<align>\d+)\s+)?\.(?P<type>\w+)\s+"
    r"(?P<name>[\w$]+)(?P<count>\[\d*\])?(?:\s*=\s*\{?(?P<values>[^};]*)\}?)?"
)
FUNCTION = re.compile(
    r"\.(?:entry|func)\s+(?:\((?P<results>[^)]*)\)\s*)?(?P<name>[\w$]+)\s*(?:\((?P<parameters>[^)]*)\))?"
    r"(?P<limits>[^{};]*)(?P<body>\{|;)"
)
STATEMENT = re.compile(r"\s*(?:(?P<brace>[{}])|(?P<label>[$\w]+):|(?P<statement>[^;{}]*(?:\{[^;{}]*\}[^;{}]*)*);)")
INSTRUCTION = re.compile(r"(?:@(?P<not>!?)(?P<guard>[%\w]+)\s+)?(?P<name>[a-z][\w.]*)\s*(?P<operands>.*)", re.DOTALL)
REGISTERS = re.compile(r"\.reg\s+\.(?P<type>\w+)\s+(?P<names>.*)", re.DOTALL)


def variable_of(match: re.Match[str]) -> Variable:
    size = SIZES[match["type"]]
    if match["values"] is not None and (size != 1 or not match["count"]):
        raise NotImplementedError(f"a variable that is not given byte by byte: {match[0]}")
    image = bytes(int(value) for value in match["values"].split(",")) if match["values"] else b""
    count = int(match["count"][1:-1] or 0) if match["count"] else 1
    return Variable(match["name"], match["space"], size * count, int(match["align"] or size), image)


def parse(text: str) -> Module:
    """The module; every function with what it calls in it."""
    text = re.sub(r"//[^\n]*|/\*.*?\*/", "", text, flags=re.DOTALL)
    functions, outside, at = {}, "", 0
    for match in FUNCTION.finditer(text):
        if match.start() < at:
            continue
        outside += text[at : match.start()]
        at = match.end()
        if match["body"] == "{":
            at = end_of_scope(text, at)
            function = parse_function(match, text[match.end() : at - 1])
            functions[function.name] = function
    outside += text[at:]
    for function in functions.values():
        inline_calls(function, functions)
    return Module([variable_of(match) for match in VARIABLE.finditer(outside)], functions)


def end_of_scope(text: str, at: int) -> int:
    """Just behind the brace that closes the one before ``at``."""
    depth = 1
    while depth:
        brace = re.compile(r"[{}]").search(text, at)
        assert brace is not None, "a brace is not closed"
        depth += 1 if brace[0] == "{" else -1
        at = brace.end()
    return at


def parse_function(head: re.Match[str], body: str) -> Function:
    function = Function(
        head["name"],
        [variable_of(match) for match in VARIABLE.finditer(head["parameters"] or "")],
        [variable_of(match) for match in VARIABLE.finditer(head["results"] or "")],
    )
    if limit := re.search(r"\.maxntid (\d+)", head["limits"]):
        function.most_threads = int(limit[1])
    scopes: list[dict[str, str]] = [{}]  # names of an inner scope, and what they are called in the whole function
    count = at = 0
    for match in STATEMENT.finditer(body):
        if body[at : match.start()].strip():
            raise NotImplementedError(f"{function.name}: what is this? {body[at : match.start()].strip()}")
        at = match.end()
        if match["brace"] == "{":
            scopes.append({})
            count += 1
        elif match["brace"] == "}":
            scopes.pop()
        elif match["label"]:
            function.body.append(match["label"])
        else:
            statement = match["statement"].strip()
            if declared := REGISTERS.match(statement):
                for name in names_of(declared["names"]):
                    scopes[-1][name] = name if len(scopes) == 1 else f"{name}@{count}"
                    function.registers[scopes[-1][name]] = SIZES[declared["type"]]
            elif variable := VARIABLE.match(statement):
                if variable["space"] != "param":
                    function.variables.append(variable_of(variable))
                elif variable["count"]:
                    raise NotImplementedError(f"{function.name}: a call with an argument of several words: {statement}")
                else:  # an argument of a call: a register that no other call uses
                    name = variable["name"]
                    scopes[-1][name] = f"{name}@{count}"
                    function.registers[f"{name}@{count}"] = SIZES[variable["type"]]
            elif not statement.startswith((".pragma", ".loc")):
                function.body.append(parse_instruction(statement, scopes))
    return function


def names_of(declared: str) -> Iterator[str]:
    for part in declared.split(","):
        name, _, count = part.strip().partition("<")
        yield from [f"{name}{i}" for i in range(int(count[:-1]))] if count else [name]


def parse_instruction(statement: str, scopes: list[dict[str, str]]) -> Instruction:
    match = INSTRUCTION.fullmatch(statement)
    assert match is not None, f"not an instruction: {statement}"
    operands = [parse_operand(text, scopes) for text in split(match["operands"])]
    guard = renamed(match["guard"] or "", scopes)
    return Instruction(match["name"], tuple(operands), guard, match["not"] == "!", " ".join(statement.split()))


def split(text: str) -> list[str]:
    """At commas, but for those in brackets."""
    return [part.strip() for part in re.findall(r"(?:\{[^}]*\}|\([^)]*\)|[^,{(])+", text) if part.strip()]


def renamed(name: str, scopes: list[dict[str, str]]) -> str:
    return next((scope[name] for scope in reversed(scopes) if name in scope), name)


def parse_operand(text: str, scopes: list[dict[str, str]]) -> Operand:
    if text[0] in "{(":
        return Several(tuple(parse_operand(part, scopes) for part in split(text[1:-1])))
    if "|" in text:
        return Several(tuple(parse_operand(part, scopes) for part in text.split("|")))
    if text[0] == "[":
        base, offset = re.findall(r"([^+\-]+)\+?(-?\w*)", text[1:-1].replace(" ", ""))[0]
        return Address(parse_operand(base, scopes), int(offset or 0))
    if match := re.fullmatch(r"0([fFdD])([0-9a-fA-F]+)", text):
        return Literal(int(match[2], 16), 32 if match[1] in "fF" else 64)
    if re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|\d+)U?", text):
        return Literal(int(text.rstrip("U"), 0))
    name = renamed(text, scopes)
    return Register(name) if name.startswith("%") or "@" in name else Symbol(name)


def float_of(literal: Literal) -> float:
    if not literal.float_bits:
        return float(literal.value)
    form = "f" if literal.float_bits == 32 else "d"
    return float(struct.unpack(f"<{form}", literal.value.to_bytes(literal.float_bits // 8, "little"))[0])


def inline_calls(function: Function, functions: dict[str, Function]) -> None:
    body: list[Instruction | str] = []
    for number, item in enumerate(function.body):
        if isinstance(item, Instruction) and item.words[0] == "call":
            body += inlined(item, f"@call{number}", function, functions)
        else:
            body.append(item)
    function.body = body


def inlined(
    call: Instruction, mark: str, caller: Function, functions: dict[str, Function]
) -> Iterator[Instruction | str]:
    """What the called function does, under names that end in ``mark``; the caller gets its registers and variables."""
    results, name, arguments = (*call.operands, Several(()))[:3]
    if not (isinstance(results, Several) and isinstance(name, Symbol) and isinstance(arguments, Several)):
        raise NotImplementedError(f"a call of another form than (result), function, (arguments): {call.text}")
    callee = functions[name.name]
    inline_calls(callee, functions)
    caller.registers |= {register + mark: size for register, size in callee.registers.items()}
    caller.variables += [replace(variable, name=variable.name + mark) for variable in callee.variables]
    own = {variable.name for variable in callee.variables} | {item for item in callee.body if isinstance(item, str)}
    given = dict(zip([variable.name for variable in callee.parameters], arguments.parts, strict=True))
    given |= dict(zip([variable.name for variable in callee.results], results.parts, strict=True))

    def moved(operand: Operand) -> Any:
        match operand:
            case Several(parts):
                return Several(tuple(map(moved, parts)))
            case Address(base, offset):
                return Address(moved(base), offset)
            case Symbol(symbol):
                return given.get(symbol) or Symbol(symbol + mark if symbol in own else symbol)
            case Register(register):
                return Register(register + mark) if register in callee.registers else operand
        return operand

    for item in callee.body:
        if isinstance(item, str):
            yield item + mark
        elif item.words[0] == "ret":
            yield replace(item, name="bra", operands=(Symbol("end" + mark),), guard=item.guard and item.guard + mark)
        else:
            yield replace(item, operands=tuple(map(moved, item.operands)), guard=item.guard and item.guard + mark)
    yield "end" + mark
