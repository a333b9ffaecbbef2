"""Command lines by tyro, with help that is wrapped to the terminal's width."""

import dataclasses
import inspect
import re
import shutil
import textwrap
import typing
from collections.abc import Sequence
from typing import Annotated, Any

import docstring_parser
import tyro


def parse(kind: type, prog: str, arguments: Sequence[str], description: str | None, **settings: Any) -> Any:
    """The object of `kind` that a command line asks for; exits, as any parser does, on --help and an unknown option.

    kind: a dataclass whose fields have docstrings. settings: `tyro.cli`'s.
    """
    if {"-h", "--help"} & set(arguments):
        _join_lines(kind)
    return tyro.cli(kind, prog=prog, args=arguments, description=_wrapped(description or ""), **settings)


def _join_lines(kind: type) -> None:
    """tyro shows an attribute's docstring with the line breaks that it has in the source: without those of a paragraph
    it wraps it itself. Also of the dataclasses that are fields.
    """
    for owner in filter(dataclasses.is_dataclass, kind.__mro__):
        hints = typing.get_type_hints(owner, include_extras=True)
        for found in docstring_parser.parse_from_object(owner).params:
            name, text = found.arg_name, inspect.cleandoc(found.description or "")
            if name in owner.__annotations__:
                text = "\n\n".join(" ".join(paragraph.split()) for paragraph in text.split("\n\n"))
                owner.__annotations__[name] = Annotated[hints[name], tyro.conf.arg(help=text)]
        for field in dataclasses.fields(owner):
            if isinstance(field.type, type) and dataclasses.is_dataclass(field.type):
                _join_lines(field.type)


def _wrapped(text: str) -> str:
    """A module's docstring with its prose wrapped; what is indented, and tables of terms, stay as they are.

    Indented by one column, since tyro would join the lines that begin with a letter.
    """
    width = shutil.get_terminal_size().columns - 1
    paragraphs = []
    for paragraph in inspect.cleandoc(text).split("\n\n"):
        if not re.search(r"^\s|^\S+ {2,}\S", paragraph, re.MULTILINE):
            paragraph = textwrap.fill(" ".join(paragraph.split()), width, break_on_hyphens=False)
        paragraphs.append(textwrap.indent(paragraph, " "))
    return "\n\n".join(paragraphs)
