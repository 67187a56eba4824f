"""Safe unpickler for NumPy arrays and plain containers.

Python's unpickler calls any function that a file names. This one interprets the opcodes from
``pickletools`` itself: a name in the file only selects one of the few constructors in
``pickled_values``, arguments are checked before anything is built, and no state is set on objects.
Time and memory are bounded by the number of instructions and the file size.
"""

from __future__ import annotations

import mmap
import os
import pickletools
from collections import OrderedDict
from typing import IO, Any, cast

from tap_deploy.errors import CheckpointError, UnsafeCheckpointError
from tap_deploy.storage.pickled_values import (
    Constructors,
    Refused,
    Symbol,
    Unbuilt,
    check_key,
    check_value,
    symbol_from_name,
)
from tap_deploy.storage.regular_files import open_regular

# A checkpoint of the largest model has about 20 000, a vocabulary two per name.
MAX_INSTRUCTIONS = 1_000_000

# fmt: off
_LITERALS = frozenset((
    "INT", "LONG", "LONG1", "LONG4", "BININT", "BININT1", "BININT2", "FLOAT", "BINFLOAT",
    "STRING", "BINSTRING", "SHORT_BINSTRING",
    "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8",
    "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8",
))
# fmt: on
_CONSTANTS: dict[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}


def load_pickle(path: str | os.PathLike[str]) -> object:
    """Read a pickle that holds NumPy arrays and plain containers.

    Supported are arrays, NumPy scalars and dtypes of booleans, numbers and fixed-length text,
    written by NumPy 1 or 2 with pickle protocol 0 to 5; and dict, OrderedDict, list, tuple, set,
    str, bytes, bytearray, int, float, bool and None. Arrays are writable and have native byte
    order.

    Raises:
        UnsafeCheckpointError: the file asks for anything else; the message names it.
        CheckpointError: the file is missing, empty, truncated or not a pickle.
    """
    name = printable(os.fspath(path))
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            if size == 0:
                raise CheckpointError(f"{name} is empty; expected a pickle: download it again")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _Machine(size).run(data)
    except Refused as exc:
        raise UnsafeCheckpointError(refusal(printable(exc), name)) from exc
    except OSError as exc:
        raise CheckpointError(f"cannot read {name}: {exc.strerror or printable(exc)}") from exc
    except (ValueError, LookupError, OverflowError, MemoryError) as exc:
        is_explained = isinstance(exc, ValueError) and str(exc)
        reason = printable(exc) if is_explained else "inconsistent instructions"
        raise CheckpointError(
            f"{name} is not a complete pickle of arrays ({reason}); expected an official .pkl "
            "file: download it again"
        ) from exc


def refusal(what: str, source: str, allowed: str = "NumPy arrays") -> str:
    """Return the message of an ``UnsafeCheckpointError``."""
    return (
        f"refused to load {what} from {source}: a checkpoint may hold only {allowed} and "
        f"plain containers; get the file from its official source, or save the {allowed} alone"
    )


def printable(value: object) -> str:
    """Return a value as one short printable line; the value may come from a hostile file."""
    text = str(value)
    if len(text) > 200:
        text = f"{text[:90]}...{text[-90:]}"  # keep the end: it is what differs between paths
    return text if text.isprintable() else ascii(text)[1:-1]


class _Machine:
    """Stack machine that executes one pickle."""

    def __init__(self, size_bytes: int) -> None:
        self._constructors = Constructors(size_bytes)
        self._stack: list[Any] = []
        self._marked: list[list[Any]] = []
        self._memo: dict[int, Any] = {}  # a dict: a huge index must not allocate memory

    def run(self, data: mmap.mmap) -> object:
        """Execute the instructions up to STOP and return the top of the stack."""
        instructions = pickletools.genops(cast(IO[bytes], data))
        for count, (opcode, argument, _) in enumerate(instructions):
            if count == MAX_INSTRUCTIONS:
                raise ValueError(f"more than {MAX_INSTRUCTIONS} instructions")
            if opcode.name in _LITERALS:
                self._stack.append(argument)
            elif opcode.name in _CONSTANTS:
                self._stack.append(_CONSTANTS[opcode.name])
            elif opcode.name != "STOP":
                self._step(opcode.name, argument)
        return check_value(self._stack.pop())

    def _step(self, name: str, argument: Any) -> None:
        match name:
            case "PROTO" | "FRAME":
                pass
            case "MARK":
                self._marked.append(self._stack)
                self._stack = []
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                self._memo[argument] = self._stack[-1]
            case "MEMOIZE":
                self._memo[len(self._memo)] = self._stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                self._get(self._memo[argument])
            case "GLOBAL":
                self._stack.append(symbol_from_name(argument))
            case "STACK_GLOBAL":
                module, member = self._pop(2)
                if type(module) is not str or type(member) is not str:
                    raise ValueError("a global name that is no text")
                self._stack.append(symbol_from_name(f"{module} {member}"))
            case "INST":  # GLOBAL and a call in one
                raise Refused(f"an instance of {symbol_from_name(argument).name}")
            case "REDUCE":
                self._reduce(*self._pop(2))
            case "BUILD":
                target, state = self._pop(2)
                self._stack.append(self._constructors.build(target, state))
            case _:
                self._step_container(name)

    def _step_container(self, name: str) -> None:
        match name:
            case "EMPTY_LIST":
                self._stack.append([])
            case "EMPTY_DICT":
                self._stack.append({})
            case "EMPTY_SET":
                self._stack.append(set())
            case "TUPLE":
                self._tuple(self._pop_marked())
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                self._tuple(self._pop(int(name[-1])))
            case "LIST":
                items = self._pop_marked()
                self._stack.append([])
                self._extend(items)
            case "APPEND":
                self._extend(self._pop(1))
            case "APPENDS" | "ADDITEMS":
                self._extend(self._pop_marked())
            case "DICT":
                items = self._pop_marked()
                self._stack.append({})
                self._set_items(items)
            case "SETITEM":
                self._set_items(self._pop(2))
            case "SETITEMS":
                self._set_items(self._pop_marked())
            case _:
                raise Refused(f"pickle opcode {name}")

    def _pop(self, count: int) -> list[Any]:
        items = self._stack[-count:]
        if len(items) < count:
            raise IndexError("a value is missing")
        del self._stack[-count:]
        return items

    def _pop_marked(self) -> list[Any]:
        items, self._stack = self._stack, self._marked.pop()
        return items

    def _get(self, value: Any) -> None:
        is_built = isinstance(value, Unbuilt) and value.value is not None
        self._stack.append(value.value if is_built else value)

    def _reduce(self, symbol: Any, arguments: Any) -> None:
        if not isinstance(symbol, Symbol) or not isinstance(arguments, tuple | Symbol):
            kinds = type(symbol).__name__, type(arguments).__name__
            raise Refused("a call of {} with {}".format(*kinds))
        self._stack.append(self._constructors.call(symbol, arguments))

    def _tuple(self, items: list[Any]) -> None:
        match items:
            case [Symbol.NDARRAY, (0,), b"b" | "b"]:
                self._stack.append(Symbol.EMPTY_ARRAY)
            case _:
                self._stack.append(tuple(check_value(item) for item in items))

    def _extend(self, items: list[Any]) -> None:
        match self._stack[-1]:
            case list() as values:
                values.extend(check_value(item) for item in items)
            case set() as members:
                members.update(check_key(item) for item in items)
            case other:
                raise Refused(f"additions to {type(other).__name__}")

    def _set_items(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if type(target) not in (dict, OrderedDict):
            raise Refused(f"items for {type(target).__name__}")
        if len(items) % 2:
            raise ValueError("a dict key without a value")
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[check_key(key)] = check_value(value)
