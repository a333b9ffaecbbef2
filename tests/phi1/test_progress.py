"""The progress line, on a terminal and in a log."""

import contextlib
import io

import pytest

from phi1 import progress
from phi1.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr(progress, "_SECONDS", {"terminal": 0.0, "log": 0.0})
    progress._display.cache_clear()
    return Terminal()


def screen(written: str) -> list[str]:
    """The lines that a terminal would show: a carriage return, up a line and erase are all that is understood."""
    lines, at = [""], 0
    for part in written.replace("\r", "\0\r").replace("\n", "\0\n").replace("\x1b", "\0\x1b").split("\0"):
        if part.startswith("\n"):
            at += 1
            lines += [""] * (at + 1 - len(lines))
            lines[at] = lines[at] if not part[1:] else part[1:]
        elif part.startswith("\x1b[1A"):
            at -= 1
        elif part.startswith("\x1b[2K"):
            lines[at] = part[4:]
        elif part.startswith("\x1b["):  # a colour, the cursor: the text behind it
            lines[at] += part.partition("m" if "m" in part else "l" if "l" in part else "h")[2]
        else:
            lines[at] += part.lstrip("\r")
    return [line for line in lines if line]


def test_a_terminal_has_one_line_that_lives(terminal: Terminal) -> None:
    with contextlib.redirect_stderr(terminal):
        work = Progress("embed", 3_000, "documents")
        for _ in range(3):
            work.advance(1_000, "fast")
        work.close()
    shown = screen(terminal.getvalue())
    assert (
        len(shown) == 1 and shown[0].startswith("embed: 3,000/3,000 documents") and shown[0].rstrip().endswith("fast")
    )
    assert terminal.getvalue().count("embed: ") > 3, "it was drawn while the work went on"


def test_work_within_work_has_its_line_below_for_so_long(terminal: Terminal) -> None:
    with contextlib.redirect_stderr(terminal):
        outer = Progress("annotate", 2, "shards")
        inner = Progress("ask", 5, "documents")
        inner.advance(5)
        assert [line.partition(":")[0] for line in screen(terminal.getvalue())] == ["annotate", "ask"]
        inner.close()
        outer.advance(2)
        outer.close()
        Progress("filter", 1, "shards").close()
    shown = [line.partition("shards")[0] for line in screen(terminal.getvalue())]
    assert shown[0] == "annotate: 2/2 " and shown[-1] == "filter: 0/1 "


def test_the_cursor_comes_back_though_nobody_closes(terminal: Terminal) -> None:
    with contextlib.redirect_stderr(terminal):
        work = Progress("embed", 3, "documents")
        work.advance()
        assert "\x1b[?25l" in terminal.getvalue()
        del work
    assert terminal.getvalue().rpartition("\x1b[?25")[2].startswith("h")


def test_a_log_has_plain_lines_at_a_bounded_rate(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seconds = iter([0.0, *(i / 2 for i in range(1, 200))])
    monkeypatch.setattr("time.monotonic", lambda: next(seconds))
    work = Progress("tokenize", 100, "documents")
    for _ in range(100):
        work.advance(note="7 tokens")
    work.close()
    lines = capsys.readouterr().err.splitlines()
    assert 2 < len(lines) < 8, "one every 15 seconds, and the last"
    assert all("\x1b" not in line and line.endswith("7 tokens") for line in lines)
    assert lines[-1].startswith("tokenize: 100/100 documents") and "ETA 0 s" in lines[-1]
    Progress("tokenize", 1, "documents", quiet=True).close()
    assert capsys.readouterr().err == ""
