"""The Markdown that language models answer in: what they thought before, and what they put between fences."""

import dataclasses
import re
from collections.abc import Iterator

_FENCE = re.compile(r"[ \t]*(?:(?:[-*+]|\d+[.)])[ \t]+)?(?P<marks>`{3,}|~{3,})(?P<info>[^`]*)$")
"""A line that opens a fenced block, in a list too, or closes one."""
_LANGUAGE = re.compile(r"[ \t]*\{?[ \t]*\.?([\w+#-]*)")


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced block of a text. language: in lower case, "" for none. start, end: where it stands, its fences too.
    closed: whether it has a last fence.
    """

    language: str
    code: str
    start: int
    end: int
    closed: bool


def without_thought(answer: str) -> str:
    """An answer without what the model thought before it (<think>): nothing, where it never came to an end of that."""
    _, end, said = answer.rpartition("</think>")
    return "" if not end and answer.lstrip().startswith("<think>") else said


def unwrapped(answer: str) -> str:
    """An answer with line ends as they are here; without the fence, if it stands as a whole in a block of Markdown."""
    text = answer.replace("\r\n", "\n").strip()
    first, _, rest = text.partition("\n")
    opened = _FENCE.match(first)
    if opened is None or _language(opened["info"]) not in ("markdown", "md"):
        return text
    before, _, last = rest.rpartition("\n")
    # A cut answer has none: then the last fence is that of a block inside.
    closed = last.strip() == opened["marks"] and all(block.closed for block in fenced(before))
    return (before if closed else rest).strip()


def fenced(text: str) -> Iterator[Block]:
    """The fenced blocks of a text, in order. The last one may be open: it then goes on to the text's end."""
    place = 0
    opened: re.Match[str] | None = None
    start = inside = 0
    for line in text.split("\n"):
        end = place + len(line)
        fence = _FENCE.match(line)
        if opened is None:
            if fence is not None:
                opened, start, inside = fence, place, end + 1
        elif fence is not None and not fence["info"].strip() and fence["marks"].startswith(opened["marks"]):
            yield Block(_language(opened["info"]), text[inside:place], start, end, True)
            opened = None
        place = end + 1
    if opened is not None:
        yield Block(_language(opened["info"]), text[inside:], start, len(text), False)


def _language(info: str) -> str:
    match = _LANGUAGE.match(info)
    return match[1].lower() if match else ""
