"""Type checks of the arguments of public functions, by their annotations, before a function does anything.

A decorator reads the annotations of a function, and its error names the parameter whose value has another type. All
other conditions on values are checked by the function itself.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import math
import numbers
import operator
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar, cast

from .errors import (
    BackendError,
    ConfigError,
    FileError,
    ShapeError,
    TargetError,
    TnadaptError,
    safe_repr,
    unexpected_keyword,
)

# -- Type checks of the arguments of public functions ------------------------------------------------------------------


# Python does not print longer integers.
_MOST_BITS = 14_000

T = TypeVar("T", bound=Callable[..., Any])
S = TypeVar("S")


class _Type(NamedTuple):
    """The values that an annotation stands for.

    Attributes
    ----------
    accepts : callable
        Whether a value is one of them.
    one, several : str
        What a single one and many of them are called.
    error : type of TnadaptError
        What another value raises.
    listed : bool
        Whether an iterator is made a list first, since the function goes through it more than once.
    """

    accepts: Callable[[Any], bool]
    one: str
    several: str
    error: type[TnadaptError] = ConfigError
    listed: bool = False


def checks_arguments(function: T) -> T:
    """Return a function, or a class, that checks the types of its arguments against their annotations.

    Parameters
    ----------
    function : callable
        A function, or a class, of which ``__init__`` is decorated. Its annotations are strings. Parameters that are
        annotated with ``Any``, and those without an annotation, take everything.

    Returns
    -------
    callable

    Notes
    -----
    ``int`` takes what has ``__index__``, but for bool; ``float`` takes real numbers; a sequence may be anything
    iterable but text and mappings; classes are compared by name, since annotations may name classes that are not
    imported. An iterator that is given for a sequence or a collection becomes a list; of others, the elements are not
    checked.

    Examples
    --------
    >>> @checks_arguments
    ... def repeat(text: "str", times: "int | None" = None) -> "str":
    ...     return text * (times or 1)
    >>> repeat("ab", 2)
    'abab'
    >>> repeat("ab", times=0.5)
    Traceback (most recent call last):
        ...
    tnadapt.errors.ConfigError: times must be an integer or None; got 0.5
    """
    if isinstance(function, type):
        cls: Any = function
        cls.__init__ = checks_arguments(cls.__init__)
        return cast("T", cls)

    every = inspect.signature(function).parameters
    parameters = {
        name: parameter
        for name, parameter in every.items()
        if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    }
    positional = [name for name, parameter in parameters.items() if parameter.kind is not parameter.KEYWORD_ONLY]
    types = {
        name: None if parameter.annotation is parameter.empty else _type_of(parameter.annotation)
        for name, parameter in parameters.items()
    }
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in every.values())

    @functools.wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        for place, (name, value) in enumerate((*zip(positional, args, strict=False), *kwargs.items())):
            expected = types.get(name)
            if expected is None:
                if not takes_any and name not in types:
                    title = function.__qualname__.rpartition("<locals>.")[2].removesuffix(".__init__")
                    raise unexpected_keyword(title, name, [known for known in types if known != "self"])
                continue
            if expected.listed and isinstance(value, Iterator):
                value = list(value)
                if name in kwargs:
                    kwargs[name] = value
                else:
                    args = (*args[:place], value, *args[place + 1 :])
            if not expected.accepts(value):
                error = wrong_argument(name, expected.one, value, expected.error)
                if way := _way_out(name, value, types):
                    raise type(error)(f"{error}; {way}")
                if other := _swapped(name, dict(zip(positional, args, strict=False)) | kwargs, types):
                    raise type(error)(f"{error}; {name} and {other} may be swapped")
                raise error
        return function(*args, **kwargs)

    return cast("T", checked)


def _way_out(name: str, value: Any, parameters: Collection[str]) -> str | None:
    """Return which argument to give instead of a wrong one, if that is clear."""
    if name == "rank" and "max_error" in parameters and _is_number(value) and 0.0 < float(value) < 1.0:
        return f"for a relative error, max_error={float(value)!r}"
    if name == "rank" and "mask" in parameters and _is_array(value):
        return "give an array of known elements as mask=, and one of their weights as weights="
    if name == "members" and (isinstance(value, str) or _is_integer(value)):
        text = safe_repr(value)
        return f"for one, {f'member={text}' if 'member' in parameters else f'members=[{text}]'}"
    return None


def _swapped(name: str, values: Mapping[str, Any], types: Mapping[str, _Type | None]) -> str | None:
    """Return the argument whose value is of the type of a wrong one, and that may take the wrong one's, if any."""
    expected = types[name]
    for other, value in values.items():
        if other in (name, "self") or expected is None or value is None or not expected.accepts(value):
            continue
        type_ = types.get(other)
        if type_ is None or (type_.accepts(values[name]) and not type_.accepts(value)):
            return other
    return None


def wrong_argument(name: str, expected: str, value: Any, error: type[TnadaptError] = ConfigError) -> TnadaptError:
    """Return the error for an argument of a wrong type."""
    return error(f"{name} must be {expected}; got {safe_repr(value)}")


def flag(name: str, value: Any) -> bool:
    """Return ``value`` as a bool, or raise an error that names it, as the decorator does."""
    if not _is_flag(value):
        raise wrong_argument(name, "True or False", value)
    return bool(value)


@functools.cache
def _type_of(annotation: str) -> _Type | None:
    """Return the type that an annotation stands for, or None if it allows any."""
    return _of_node(ast.parse(annotation, mode="eval").body)


def _of_node(node: ast.expr) -> _Type | None:
    if isinstance(node, ast.BinOp):
        return _union(node)
    if isinstance(node, ast.Constant):
        return _Type(lambda value: value is None, "None", "None") if node.value is None else _type_of(str(node.value))
    if isinstance(node, ast.Subscript):
        arguments = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        return _generic(ast.unparse(node.value), arguments)
    name = ast.unparse(node)
    if name in _NAMED:
        return _NAMED[name]
    if name not in _CLASSES:
        return None  # an alias or a protocol: checked by the function
    article = "an" if name[0] in "AEIO" else "a"
    error = _ERRORS.get(name, ConfigError)
    return _Type(lambda value: _is_a(value, name), f"{article} {name}", f"{name}s", error)


def _union(node: ast.BinOp) -> _Type | None:
    """Return the type of ``a | b``."""
    parts: list[ast.expr] = []
    rest: ast.expr = node
    while isinstance(rest, ast.BinOp):
        parts.insert(0, rest.right)
        rest = rest.left
    types = [_of_node(part) for part in (rest, *parts)]
    if any(type_ is None for type_ in types):
        return None
    known = [type_ for type_ in types if type_ is not None]
    return _Type(
        lambda value: any(type_.accepts(value) for type_ in known),
        _either([type_.one for type_ in known]),
        _either([type_.several for type_ in known]),
        next((type_.error for type_ in known if type_.one != "None"), ConfigError),
        any(type_.listed for type_ in known),
    )


def _either(words: list[str]) -> str:
    return f"{', '.join(words[:-1])} or {words[-1]}" if len(words) > 1 else words[0]


def _generic(name: str, arguments: list[ast.expr]) -> _Type | None:
    """Return the type of ``name[arguments]``."""
    if name == "os.PathLike":
        return None
    if name in ("type", "Callable"):
        return _NAMED[name]
    if name in ("Mapping", "dict"):
        return _mapping(*map(_of_node, arguments))
    if name == "tuple" and not (isinstance(arguments[-1], ast.Constant) and arguments[-1].value is ...):
        return _tuple([_of_node(node) for node in arguments])
    if name in ("Sequence", "Collection", "Iterable", "Iterator", "list", "set", "tuple"):
        return _sequence(_of_node(arguments[0]), listed=name not in ("Iterable", "Iterator"))
    return None


def _sequence(element: _Type | None, listed: bool) -> _Type:
    def accepts(value: Any) -> bool:
        if element is _HASHABLE and isinstance(value, str):
            return True
        if not is_sequence(value):
            return False
        return element is None or isinstance(value, Iterator) or all(map(element.accepts, value))

    if not listed and element is None:
        return _Type(accepts, "an iterable", "iterables")
    of = "" if element is None else f" of {element.several}"
    error = ShapeError if element is None else element.error
    return _Type(accepts, f"a sequence{of}", f"sequences{of}", error, listed)


def _tuple(elements: list[_Type | None]) -> _Type:
    def accepts(value: Any) -> bool:
        if not is_sequence(value) or not hasattr(value, "__len__") or len(value) != len(elements):
            return False
        return all(element is None or element.accepts(part) for element, part in zip(elements, value, strict=True))

    words = ", ".join("anything" if element is None else element.one for element in elements)
    same = len({element.several for element in elements if element is not None}) == 1 and elements[0] is not None
    if len(elements) == 2 and same and elements[0] is not None:
        return _Type(accepts, f"a pair of {elements[0].several}", f"pairs of {elements[0].several}", ShapeError)
    return _Type(accepts, f"a tuple of {words}", f"tuples of {words}", ShapeError)


def _mapping(key: _Type | None, element: _Type | None = None) -> _Type:
    def accepts(value: Any) -> bool:
        return (
            isinstance(value, Mapping)
            and (key is None or all(map(key.accepts, value)))
            and (element is None or all(map(element.accepts, value.values())))
        )

    of = "" if key is None else f" of {key.several}"
    to = "" if element is None else f" to {element.several}"
    return _Type(accepts, f"a mapping{of}{to}", f"mappings{of}{to}", ShapeError if element is _ARRAY else ConfigError)


def _is_integer(value: Any) -> bool:
    if isinstance(value, bool):
        return False
    try:
        return operator.index(value).bit_length() <= _MOST_BITS
    except TypeError:
        return False


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not (isinstance(value, numbers.Real) or _is_array(value)):
        return False
    try:
        float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # an integer of over 1,024 bits; a longer array
        return False
    return True


def _is_flag(value: Any) -> bool:
    return type(value).__name__ == "bool" or (isinstance(value, int) and value in (0, 1))


#: Limits above this are those of the format, and nobody meets them by accident: messages name the other limit alone.
FAR = 10**6


def integer(name: str, value: Any, low: int, high: int, error: type[TnadaptError], other: str = "") -> int:
    """Return ``value`` as an integer from low to high, or raise an error that names it.

    Examples
    --------
    >>> integer("rank", 4, 1, 8, ConfigError)
    4
    >>> integer("rank", 4.0, 1, 8, ConfigError)
    Traceback (most recent call last):
        ...
    tnadapt.errors.ConfigError: rank must be an integer; got 4.0
    """
    other = f" {other}" if other else ""
    if isinstance(value, bool):
        raise error(f"{name} must be an integer{other}; got {value}")
    try:
        number = operator.index(value)
    except TypeError:
        raise error(f"{name} must be an integer{other}; got {safe_repr(value)}") from None
    if number < low and high > FAR:
        raise error(f"{name} must be at least {low}; got {safe_repr(number)}")
    if number > high > FAR:
        raise error(f"{name} must be at most {high:,}; got {safe_repr(number)}")
    if not low <= number <= high:
        raise error(f"{name} must be from {low} to {high}; got {safe_repr(number)}")
    return number


def is_sequence(value: Any) -> bool:
    """Return whether a value is iterable, and neither text nor a mapping."""
    if isinstance(value, (list, tuple)):
        return True
    if isinstance(value, (str, bytes, bytearray, Mapping, type)):
        return False
    if isinstance(value, Iterable):
        return getattr(value, "shape", None) != ()  # a 0-d array looks iterable
    try:
        iter(value)  # through __getitem__, like torch's data sets
    except TypeError:
        return False
    return True


def _is_array(value: Any) -> bool:
    """Return whether a value is an array of numbers of any library, which NumPy's scalars are not."""
    dtype = getattr(value, "dtype", None)
    if dtype is None or not hasattr(value, "shape") or isinstance(value, type):
        return False
    # Not of tensors: torch's compiler, which traces this check, cannot iterate over their classes.
    if type(value).__module__ == "numpy" and _is_a(value, "generic"):
        return False
    # Objects, dates, text; records, whose kind is also that of bfloat16.
    return getattr(dtype, "kind", "") not in tuple("OMmSU") and getattr(dtype, "names", None) is None


def _is_hashable(value: Any) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True


def _is_a(value: Any, name: str) -> bool:
    """Return whether a value is an instance of a class of that name."""
    last = name.rpartition(".")[2]
    return any(cls.__name__ == last for cls in type(value).__mro__)


_STR = _Type(lambda value: isinstance(value, str), "a string", "strings")
_HASHABLE = _Type(_is_hashable, "hashable", "hashable keys")
_ARRAY = _Type(_is_array, "an array of numbers", "arrays of numbers", BackendError)
_NAMED: dict[str, _Type | None] = {
    # These are checked by the function; paths by path_of() in checkpoints/container.py.
    **dict.fromkeys(("Any", "Self", "object", "Path")),
    "Hashable": _HASHABLE,
    "str": _STR,
    "int": _Type(_is_integer, "an integer", "integers"),
    "float": _Type(_is_number, "a number", "numbers"),
    "bool": _Type(_is_flag, "True or False", "True or False"),
    "type": _Type(lambda value: isinstance(value, type), "a class", "classes"),
    "Callable": _Type(callable, "a function", "functions"),
    **dict.fromkeys(("Callback", "Do", "Progress"), _Type(callable, "a function", "functions")),
    "Array": _ARRAY,
    "ArrayT": _ARRAY,
    "np.ndarray": _ARRAY,
    "Tensor": _ARRAY,
}
#: Classes whose instances are recognized by the name of the class.
_CLASSES = frozenset({
    "AdapterFile", "Axis", "Config", "Engine", "Fingerprint", "Map", "Mark", "PopulationFile", "Pretrained",
    "Projection", "Reporter", "Source", "Spec", "Target", "Training", "UpdatePlan", "nn.Module", "torch.device",
})  # fmt: skip
_ERRORS = {"nn.Module": TargetError, "Target": TargetError, "AdapterFile": FileError}


# -- Settings of a map or source: frozen dataclasses, stored in configs and files --------------------------------------

# The limit for nested values, which a hostile file may have.
_MAX_DEPTH = 4


def require_frozen(cls: Any, what: str, reserved: str) -> None:
    """Raise a ConfigError unless a class is a frozen dataclass whose fields are all arguments.

    Other settings would be lost: two objects that differ in them would be equal, and a file would not hold them.

    Parameters
    ----------
    cls : type
    what : str
        The class in messages.
    reserved : str
        The name that a file uses for the kind.
    """
    # Of the class itself: inherited annotations say nothing about its own attributes.
    if "__dataclass_fields__" not in cls.__dict__ or not cls.__dict__["__dataclass_params__"].frozen:
        raise ConfigError(
            f"{what} must be a frozen dataclass: decorate the class with @dataclasses.dataclass(frozen=True)"
        )
    for field in dataclasses.fields(cls):
        if field.name == reserved or not field.init:
            raise ConfigError(
                f"{what} has the field {field.name!r}: the name {reserved!r} is reserved, and every field must be an "
                "argument of the class"
            )


def require_plain(settings: Any, what: str, others: str = "", other: type | tuple[type, ...] = ()) -> None:
    """Raise a ConfigError that names a field unless a file can hold the values of all and give them back.

    ``other`` is a class of settings that may be values, too, and ``others`` its name in the message.
    """
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if not _is_plain(value, _MAX_DEPTH, other):
            raise ConfigError(
                f"{what}: {field.name} must be None, a boolean, an integer, a finite float, a string{others} or a "
                f"tuple of these; got {safe_repr(value)}"
            )


def _is_plain(value: Any, depth: int, other: Any) -> bool:
    if isinstance(value, other):
        value = tuple(getattr(value, field.name) for field in dataclasses.fields(value))
    if isinstance(value, tuple):
        return depth > 0 and all(_is_plain(item, depth - 1, other) for item in value)
    if isinstance(value, float):
        return type(value) is float and math.isfinite(value)
    if type(value) is int:
        return abs(value) < 1 << 64
    return value is None or type(value) in (bool, str)


def from_stored(cls: Callable[..., S], fields: Mapping[str, Any], what: str) -> S:
    """Return the settings of a class with these fields, as JSON has them; raise a ConfigError if they do not fit."""
    known = [field.name for field in dataclasses.fields(cast("Any", cls))]
    for key in fields:
        if key not in known:
            advice = f"its settings are {', '.join(known)}" if known else "it has none"
            raise ConfigError(f"{what} has no setting {safe_repr(key)}; {advice}")
    try:
        return cls(**{key: _tuples(value, _MAX_DEPTH) for key, value in fields.items()})
    except TnadaptError:
        raise
    except Exception as error:  # a field is missing, or the class refuses a value
        raise ConfigError(f"{what}: {type(error).__name__}: {error}") from error


def _tuples(value: Any, depth: int) -> Any:
    """Convert lists to tuples, except values nested more deeply, which no field may have."""
    if isinstance(value, list) and depth > 0:
        return tuple(_tuples(item, depth - 1) for item in value)
    return value
