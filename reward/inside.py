"""What runs inside the sandbox: a script of the standard library alone, in one of three roles.

`program` runs a source with its standard input. `answer` and `tests` are two sandboxes with a socket between: one holds
the answer's code, the other the tests. The tests call the answer's functions through the socket, and plain data comes
back, which is rebuilt and compared where the answer's code has never been. So there is nothing there for it to patch:
no assertion, no `==`, no success marker, no expected value.

Messages are lines of JSON. Numbers, text, containers, Fraction and Decimal travel by value; everything else stays where
it is and travels as {"ref": [owner, number]}. A Remote stands for it on the other side.
"""

from __future__ import annotations

import builtins
import json
import operator
import os
import resource
import sys
import types

TYPE_CHECKING = False  # without importing typing: this starts for every answer
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

    Json = Any

# What the tests may ask of an object of the answer. No `==` with the tests' own values, no `in`, no arithmetic:
# these would hand it the expected value, and believe what it says.
_ASKED: dict[str, Callable[..., Any]] = {
    "call": lambda function, /, *args, **kwargs: function(*args, **kwargs),
    "get": getattr,
    "set": setattr,
    "getitem": operator.getitem,
    "setitem": operator.setitem,
    "iter": iter,
    "next": next,
    "len": len,
    "bool": bool,
    "str": str,
    # between two objects of the answer's own classes
    "eq": operator.eq,
    "lt": operator.lt,
    "le": operator.le,
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
}
# What the answer may ask of the tests' objects that were handed to it.
_CALLED_BACK = {name: _ASKED[name] for name in ("call", "iter", "next")}


class Gone(BaseException):
    """The other side has ended."""


class Unsendable(BaseException):
    """The tests hand the answer an object that cannot leave them: nothing can be said of the answer."""


class Peer:
    """One end of the conversation: asks, and serves while it waits."""

    def __init__(self, name: str, fd: int, serves: dict[str, Callable[..., Any]]) -> None:
        self.name = name  # "answer" or "tests"
        self.asked = 0
        self.serves = serves
        self._own: list[Any] = []
        self._read = os.fdopen(fd, "rb")
        self._write = os.fdopen(os.dup(fd), "wb")

    def ask(self, operation: str, /, *args: Any, **kwargs: Any) -> Any:
        """Have the other side do something; lists, dicts and sets that it changed are changed here too.

        Raises:
            Exception: what it raised, as the nearest built-in exception.
            Gone: when there is no other side any more.
        """
        self.asked += 1
        sent = [self.encode(arg) for arg in args]
        self._send(
            {
                "ask": operation,
                "args": sent,
                "kwargs": {k: self.encode(v) for k, v in kwargs.items()},
            }
        )
        while "ask" in (message := self._receive()):
            self._serve(message)
        own: dict[Any, Any] = {**dict(enumerate(args)), **kwargs}
        for place, value in message.get("changed", []):
            if place != 0 and place in own:
                _replace(own[place], self.decode(value))
        if "error" in message:
            names, text, given = message["error"]
            error = _exception(names, text, self.decode(given))
            if operation != "next" and isinstance(error, StopIteration | StopAsyncIteration):
                error = RuntimeError(str(error))  # it would end a loop of the tests without a word
            raise error
        return self.decode(message["value"])

    def serve(self) -> None:
        """Answer until the other side has ended."""
        try:
            while True:
                self._serve(self._receive())
        except Gone:
            pass

    def encode(self, value: Any) -> Json:
        """A value as JSON; a subclass as its built-in base, so what it overrides stays behind."""
        match value:
            case None | bool():
                return value
            case int():
                return int(value) if value.bit_length() < 64 else {"int": hex(value)}
            case float():
                return float(value)
            case str():
                return str.__str__(value)
            case list():
                return [self.encode(item) for item in value]
            case tuple() | set() | frozenset():
                kind = next(k for k in (tuple, set, frozenset) if isinstance(value, k))
                return {kind.__name__: [self.encode(item) for item in value]}
            case dict():
                return {"dict": [[self.encode(k), self.encode(v)] for k, v in value.items()]}
            case bytes() | bytearray():
                return {"bytes" if isinstance(value, bytes) else "bytearray": value.hex()}
            case complex():
                return {"complex": [value.real, value.imag]}
            case range():
                return {"range": [value.start, value.stop, value.step]}
            case _ if _is_from("fractions", "Fraction", value):
                return {"fraction": [self.encode(value.numerator), self.encode(value.denominator)]}
            case _ if _is_from("decimal", "Decimal", value):
                return {"decimal": str(value)}
            case _ if _is_builtin_type(value):
                return {"type": value.__name__}
            case Remote():
                return {"ref": [_other(self.name), object.__getattribute__(value, "_number")]}
        if self.name == "tests" and not callable(value) and not hasattr(value, "__next__"):
            raise Unsendable(type(value).__name__)
        for number, known in enumerate(self._own):
            if known is value:
                return {"ref": [self.name, number]}
        self._own.append(value)
        return {"ref": [self.name, len(self._own) - 1]}

    def decode(self, value: Json) -> Any:
        """The value of its JSON; only data and references can come out, whatever was sent."""
        if isinstance(value, list):
            return [self.decode(item) for item in value]
        if not isinstance(value, dict):
            return value
        ((kind, content),) = value.items()
        match kind:
            case "int":
                return int(content, 16)
            case "tuple" | "set" | "frozenset":
                return {"tuple": tuple, "set": set, "frozenset": frozenset}[kind](
                    self.decode(content)
                )
            case "dict":
                return {self.decode(k): self.decode(v) for k, v in content}
            case "bytes":
                return bytes.fromhex(content)
            case "bytearray":
                return bytearray.fromhex(content)
            case "complex":
                return complex(*content)
            case "range":
                return range(*content)
            case "fraction":
                import fractions

                return fractions.Fraction(*(self.decode(part) for part in content))
            case "decimal":
                import decimal

                return decimal.Decimal(content)
            case "type" if isinstance(kind := getattr(builtins, content), type):
                return kind
            case "ref":
                owner, number = content
                return self._own[number] if owner == self.name else Remote(self, number)
        raise ValueError(f"there is no kind {kind!r}")

    def _serve(self, message: Json) -> None:
        try:
            if self.name == "tests":
                _check_is_handed(message["args"])
            args = self.decode(message["args"])
            kwargs = {name: self.decode(value) for name, value in message["kwargs"].items()}
            value = self.encode(self.serves[message["ask"]](*args, **kwargs))
            sent = {**dict(enumerate(message["args"])), **message["kwargs"]}
            changed = self._changed(sent, {**dict(enumerate(args)), **kwargs})
            self._send({"value": value, "changed": changed})
        except (Gone, Unsendable):
            raise
        except BaseException as error:  # the answer's code may raise anything
            names = [kind.__name__ for kind in type(error).__mro__]
            self._send({"error": [names, _text(error), self._given(error)]})

    def _changed(self, sent: dict[Any, Json], args: dict[Any, Any]) -> list[tuple[Any, Json]]:
        now = [
            (place, self.encode(arg))
            for place, arg in args.items()
            if place != 0 and type(arg) in (list, dict, set, bytearray)
        ]
        return [(place, value) for place, value in now if value != sent[place]]

    def _given(self, error: BaseException) -> Json:
        """The arguments of an exception where they are data; None where they are not."""
        try:
            return self.encode(error.args) if _is_plain(error.args) else None
        except BaseException:  # the answer's classes may do anything
            return None

    def _send(self, message: Json) -> None:
        try:
            self._write.write(json.dumps(message).encode() + b"\n")
            self._write.flush()
        except OSError as error:
            raise Gone from error

    def _receive(self) -> Json:
        try:
            line = self._read.readline()
        except OSError as error:
            raise Gone from error
        if not line.endswith(b"\n"):
            raise Gone
        return json.loads(line)


class Remote:
    """An object that stays on the other side."""

    __slots__ = ("_number", "_peer")

    def __init__(self, peer: Peer, number: int) -> None:
        object.__setattr__(self, "_peer", peer)
        object.__setattr__(self, "_number", number)

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        return _ask("call", self, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return _ask("get", self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        _ask("set", self, name, value)

    def __getitem__(self, key: Any) -> Any:
        return _ask("getitem", self, key)

    def __setitem__(self, key: Any, value: Any) -> None:
        _ask("setitem", self, key, value)

    def __iter__(self) -> Any:
        items = _ask("iter", self)
        return iter(items) if not isinstance(items, Remote) else _items(items)

    def __next__(self) -> Any:
        return _ask("next", self)

    def __len__(self) -> int:
        return int(_ask("len", self))

    def __bool__(self) -> bool:
        return bool(_ask("bool", self))

    def __str__(self) -> str:
        return str(_ask("str", self))

    def __hash__(self) -> int:
        return hash(object.__getattribute__(self, "_number"))

    def __eq__(self, other: object) -> Any:
        return self._both("eq", other, False)

    def __lt__(self, other: object) -> Any:
        return self._both("lt", other)

    def __le__(self, other: object) -> Any:
        return self._both("le", other)

    def __add__(self, other: object) -> Any:
        return self._both("add", other)

    def __sub__(self, other: object) -> Any:
        return self._both("sub", other)

    def __mul__(self, other: object) -> Any:
        return self._both("mul", other)

    def _both(self, operation: str, other: object, otherwise: Any = NotImplemented) -> Any:
        return _ask(operation, self, other) if isinstance(other, Remote) else otherwise


def _ask(operation: str, remote: Remote, /, *args: Any, **kwargs: Any) -> Any:
    return object.__getattribute__(remote, "_peer").ask(operation, remote, *args, **kwargs)


def _items(iterator: Remote) -> Iterator[Any]:
    while True:
        try:
            item = next(iterator)
        except StopIteration:
            return
        yield item


def _check_is_handed(args: list[Json]) -> None:
    """Let the answer do something only to an object that the tests gave it, not to a type that it can name itself."""
    if args[0]["ref"][0] != "tests":
        raise PermissionError("not an object of the tests")


def _is_builtin_type(value: Any) -> bool:
    return isinstance(value, type) and getattr(builtins, value.__name__, None) is value


def _is_from(module: str, name: str, value: object) -> bool:
    """Whether a value is of a class of a module, which is not imported for the question."""
    return module in sys.modules and isinstance(value, getattr(sys.modules[module], name))


def _other(name: str) -> str:
    return "tests" if name == "answer" else "answer"


def _replace(value: Any, new: Any) -> None:
    """Make a container what the other side made of it."""
    if type(value) is not type(new):
        return
    if isinstance(value, list | bytearray):
        value[:] = new
    elif isinstance(value, dict | set):
        value.clear()
        value.update(new)


def _is_plain(value: Any) -> bool:
    """Whether a value is data through and through."""
    if isinstance(value, dict):
        return all(map(_is_plain, [*value, *value.values()]))
    if isinstance(value, list | tuple | set | frozenset):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | complex | str | bytes)


def _text(error: BaseException) -> str:
    try:
        return str(error)[:1000]
    except BaseException:
        return ""


def _exception(names: list[str], text: str, args: Any) -> Exception:
    """The nearest built-in Exception; what only ends a process, such as SystemExit, is a RuntimeError here."""
    for name in names:
        kind = getattr(builtins, name, None)
        if not (isinstance(kind, type) and issubclass(kind, Exception)):
            continue
        for given in (args, (text,)):
            try:
                found = kind(*given)
            except Exception:  # such as UnicodeDecodeError, which takes five arguments
                continue
            if given is not args or _text(found) == text:  # else its class says it in another way
                return found
    return RuntimeError(text)


def module_of(name: str, source: str) -> types.ModuleType:
    """Run a source as the module `name`."""
    module = types.ModuleType(name)
    sys.modules[name] = module  # dataclasses, pickle and unittest look there
    exec(compile(source, f"{name}.py", "exec"), module.__dict__)
    return module


def answer_role(source: str, fd: int) -> None:
    """Serve the functions of an answer's code."""

    def load() -> Json:
        module = module_of("answer", source)
        return {k: v for k, v in vars(module).items() if not k.startswith("__")}

    Peer("answer", fd, _ASKED | {"load": load}).serve()


def tests_role(tests: list[str], prelude: str, entry: str | None, fd: int, out: int) -> None:
    """Run tests against the answer; write a character for each: 1 passed, 0 failed, - says nothing."""
    peer = Peer("tests", fd, _CALLED_BACK)
    peer.ask("len", [])
    os.write(out, b".")  # both have started: from here on time counts
    try:
        given: dict[str, Any] = peer.ask("load")
    except Exception:
        os.write(out, b"0" * len(tests))
        return
    for test in tests:
        os.write(out, _verdict(peer, given, test, prelude, entry))


def _verdict(
    peer: Peer, given: dict[str, Any], test: str, prelude: str, entry: str | None
) -> bytes:
    peer.asked = 0
    mine: dict[str, Any] = {}
    module: types.ModuleType | None = None
    try:
        module = module_of("__main__", prelude)
        mine = _names(test, given, vars(module), entry)
        vars(module).update(mine)
        exec(compile(test, "tests.py", "exec"), vars(module))
        _collected(module)
        if entry is not None and "check" in vars(module):
            module.check(mine[entry])
        passed = True
    except Unsendable:
        return b"-"
    except (NameError, KeyError, AttributeError):
        return b"0"  # as when the answer has no such function
    except SystemExit as end:  # unittest.main() ends so; the answer cannot
        passed = not end.code
    except Exception:
        passed = False
    if not _is_touched(peer, mine):
        is_absent = not passed and module is not None and _lacks_name(test, given, module)
        return b"0" if is_absent else b"-"
    return b"1" if passed else b"0"


def _is_touched(peer: Peer, mine: dict[str, Any]) -> bool:
    """Whether a test has looked at the answer at all; one that has not says nothing of it."""
    return peer.asked > 0 or any(not isinstance(value, Remote) for value in mine.values())


def _lacks_name(test: str, given: dict[str, Any], module: types.ModuleType) -> bool:
    """Whether a test that ran in `module` uses a name that nobody defines: the answer has no such function.

    A test may catch the NameError itself, or have it caught, as unittest does.
    """
    import symtable

    try:
        tables = [symtable.symtable(test, "tests.py", "exec")]
    except (SyntaxError, ValueError):
        return False
    used, defined = set(), {*given, *vars(module), *vars(builtins)}
    for table in tables:
        tables += table.get_children()  # seen by this loop in turn
        for symbol in table.get_symbols():
            if symbol.is_global() or table is tables[0]:
                if symbol.is_assigned() or symbol.is_imported():
                    defined.add(symbol.get_name())
                elif symbol.is_referenced():
                    used.add(symbol.get_name())
    return any(not name.startswith("__") for name in used - defined)


def _names(
    test: str, given: dict[str, Any], known: dict[str, Any], entry: str | None
) -> dict[str, Any]:
    """What a test takes from the answer.

    Not a module of the standard library, which the test then gets itself, nor a built-in, unless nothing else is
    taken (MBPP tests a function named `sum`): `sorted` and `math.isclose` are never the answer's.
    """
    import ast

    nodes = list(ast.walk(ast.parse(test)))
    used = {node.id for node in nodes if isinstance(node, ast.Name)} | ({entry} if entry else set())
    owners = {
        node.value.id
        for node in nodes
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
    }
    for name in owners & sys.stdlib_module_names - known.keys():
        known[name] = __import__(name)
    free = {name for name in used & given.keys() if name == entry or name not in known}
    taken = {name for name in free if not hasattr(builtins, name)} or free
    return {name: given[name] for name in taken | ({entry} & given.keys() if entry else set())}


def _collected(module: types.ModuleType) -> None:
    """Run what a test runner would have found: functions test_…() and TestCases."""
    if unittest := sys.modules.get("unittest"):
        result = unittest.TestResult()
        unittest.defaultTestLoader.loadTestsFromModule(module).run(result)
        if not result.wasSuccessful():
            raise AssertionError
    for name, value in list(vars(module).items()):
        is_test = name.startswith("test") and isinstance(value, types.FunctionType)
        if is_test and not value.__code__.co_argcount:
            value()


def limit(limits: dict[str, int]) -> None:
    """Set limits by their names in `resource`, for good."""
    for name, value in limits.items():
        resource.setrlimit(getattr(resource, name), (value, value))


def main() -> None:
    """Read the task from a file descriptor, and run it."""
    with os.fdopen(int(sys.argv[1]), "rb") as file:
        task = json.load(file)
    sys.argv = [task["role"]]
    vars(builtins).update(
        exit=sys.exit, quit=sys.exit
    )  # `site` gives them, which does not run here
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)  # what went wrong before was worth a message
    limit(task["limits"])
    match task["role"]:
        case "program":
            os.write(task["out"], b".")
            os.close(task["out"])
            module_of("__main__", task["source"])
        case "answer":
            answer_role(task["source"], task["fd"])
        case "tests":
            tests_role(task["tests"], task["prelude"], task["entry"], task["fd"], task["out"])


if __name__ == "__main__":
    main()
