"""Commands whose options are the fields of dataclasses."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
from collections.abc import Callable
from typing import Annotated, get_type_hints

import typer


def with_fields(command: Callable) -> Callable:
    """`command` with an option for each field of every parameter whose type is a dataclass.

    Names, types and defaults are the fields'. A default of the parameter itself, an instance, gives other defaults.
    The help is what the class's docstring says of a field under `Args:`.
    """
    signature = inspect.signature(command, eval_str=True)
    classes = {p.name: p.annotation for p in signature.parameters.values() if dataclasses.is_dataclass(p.annotation)}
    parameters = []
    for parameter in signature.parameters.values():
        parameters += _options(parameter) if parameter.name in classes else [parameter]

    @functools.wraps(command)
    def with_instances(**values):
        for name, kind in classes.items():
            values[name] = kind(**{field.name: values.pop(field.name) for field in dataclasses.fields(kind)})
        return command(**values)

    # Options have no order, so that those without a default may follow others.
    parameters = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in parameters]
    with_instances.__signature__ = inspect.Signature(parameters)
    with_instances.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return with_instances


def _options(parameter: inspect.Parameter) -> list[inspect.Parameter]:
    kind, defaults = parameter.annotation, parameter.default
    types, help = get_type_hints(kind), _described_fields(kind)
    options = []
    for field in dataclasses.fields(kind):
        default = field.default if defaults is inspect.Parameter.empty else getattr(defaults, field.name)
        options.append(
            inspect.Parameter(
                field.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=inspect.Parameter.empty if default is dataclasses.MISSING else default,
                annotation=Annotated[types[field.name], typer.Option(help=help[field.name])],
            )
        )
    return options


def _described_fields(kind: type) -> dict[str, str]:
    """What a class's docstring says of each field, with other fields named as the options that they are."""
    lines = inspect.getdoc(kind).partition("Args:\n")[2].split("\n\n")[0]
    entries = dict(re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", lines, re.MULTILINE))
    options = {name: f"--{name.replace('_', '-')}" for name in entries}

    def sentence(text: str) -> str:
        text = re.sub(r"`([^`]+)`", lambda match: options.get(match[1], match[1]), " ".join(text.split()))
        return text[:1].upper() + text[1:]

    return {name: sentence(text) for name, text in entries.items()}
