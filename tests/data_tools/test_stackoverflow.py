"""StackOverflow's dump: questions joined with answers, bad lines, licences, HTML as text."""

import pathlib
import subprocess
import sys
import xml.sax.saxutils
from typing import Any

import pytest

from data_tools import ingest, stackoverflow
from data_tools.dataset import Dataset
from data_tools.ingest import Config
from phi1.errors import UserError


def run(tmp_path: pathlib.Path, *sources: str, **options: Any) -> Dataset:
    output = tmp_path / options.pop("name", "documents")
    return ingest.run(Config(output=output, sources=sources, **options))


def posts(path: pathlib.Path, rows: list[dict[str, Any]]) -> str:
    lines = ['<?xml version="1.0" encoding="utf-8"?>', "<posts>"]
    for row in rows:
        lines.append("  <row " + " ".join(f"{k}={xml.sax.saxutils.quoteattr(str(v))}" for k, v in row.items()) + " />")
    path.write_text("\n".join([*lines, "</posts>\n"]), encoding="utf-8")
    return f"stackoverflow:{path}"


def question(number: int, tags: str = "<python><list>", **values: Any) -> dict[str, Any]:
    row = {"Id": number, "PostTypeId": 1, "CreationDate": "2019-01-01T00:00:00.000", "Score": 3, "Tags": tags}
    return row | {"Title": f"Question {number}?", "Body": f"<p>How do I {number}?</p>"} | values


def answer(number: int, parent: int, score: int, body: str, date: str = "2020-01-01") -> dict[str, Any]:
    row = {"Id": number, "PostTypeId": 2, "ParentId": parent, "CreationDate": date, "Score": score}
    return row | {"Body": body if body.startswith("<") else f"<p>{body}</p>"}


def test_stackoverflow_joins_a_question_with_its_best_answer(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = "<p>Use <code>sorted</code>:</p>\n<pre><code>for a in b:\n    if a &lt; 1:\n        print(a)\n</code></pre>"
    source = posts(
        tmp_path / "Posts.xml",
        [
            question(4, AcceptedAnswerId=9),
            question(5, tags="|python-3.x|python|", CreationDate="2010-05-05T00:00:00.000"),
            question(6, tags="<java>"),
            question(7),
            answer(8, 4, 50, "popular"),
            answer(9, 4, 2, "accepted"),
            answer(10, 5, 1, "low"),
            answer(11, 5, 8, code),
            answer(12, 5, 8, "same score, later"),
            answer(13, 6, 9, "java"),
            {"Id": 14, "PostTypeId": 5, "Body": "a tag wiki"},
        ],
    )
    dataset = run(tmp_path, source)
    rows = {row["source"]: row for row in dataset.read()}
    assert rows.keys() == {"stackoverflow:4", "stackoverflow:5"}
    assert rows["stackoverflow:4"]["content"] == "Question 4?\n\nHow do I 4?\n\naccepted\n"
    assert rows["stackoverflow:5"]["content"] == (
        "Question 5?\n\nHow do I 5?\n\nUse `sorted`:\n\n```\nfor a in b:\n    if a < 1:\n        print(a)\n```\n"
    )
    assert rows["stackoverflow:4"]["max_stars_repo_licenses"] == ["CC BY-SA 4.0"]
    assert rows["stackoverflow:5"]["max_stars_repo_licenses"] == ["CC BY-SA 2.5", "CC BY-SA 4.0"]
    assert dataset.counters["dropped_unanswered"] == 1
    assert not (tmp_path / "documents" / "spool").exists()
    monkeypatch.setattr(stackoverflow, "_QUESTIONS_BYTES", 500)  # several units
    parts = run(tmp_path, source, name="parts")
    assert len(parts.shards) > 2
    assert sorted(parts.column("hexsha")) == sorted(dataset.column("hexsha"))


def test_licence_by_date_unless_stated() -> None:
    dates = {"2011-04-07T23:59:59": "2.5", "2011-04-08T00:00:00": "3.0", "2018-05-01T12:00:00": "3.0"}
    for date, version in (dates | {"2018-05-02T00:00:00": "4.0"}).items():
        assert stackoverflow.post_license({"CreationDate": date}) == f"CC BY-SA {version}"
    assert (
        stackoverflow.post_license({"CreationDate": "2009-01-01", "ContentLicense": "CC BY-SA 4.0"}) == "CC BY-SA 4.0"
    )


def test_a_cut_dump_is_told(tmp_path: pathlib.Path) -> None:
    source = posts(tmp_path / "Posts.xml", [question(1), answer(2, 1, 1, "yes")])
    text = (tmp_path / "Posts.xml").read_text()
    (tmp_path / "Posts.xml").write_text(text[: text.index("</posts>")])
    with pytest.raises(UserError, match=r"Posts\.xml: not a whole StackOverflow"):
        run(tmp_path, source)


BAD_ROWS = {
    "a reference that XML does not have": (b"&lt;p&gt;How do I 1", b"&lt;p&gt;&#x0E;How do I 1"),
    "a bare ampersand": (b"Question 1?", b"Question & answer &nbsp; 1?"),
    "a control character": (b"Question 1?", b"Question \x0e 1?"),
    "not UTF-8": (b"Question 1?", b"Question caf\xe9 1?"),
    "an angle": (b"Question 1?", b"Question < 1?"),
    "half a score": (b'Score="1"', b'Score="1.5"'),
}


@pytest.mark.parametrize("fault", BAD_ROWS)
def test_a_bad_line_that_can_be_mended_is(fault: str, tmp_path: pathlib.Path) -> None:
    source = posts(tmp_path / "Posts.xml", [question(1), answer(2, 1, 1, "yes"), question(3), answer(4, 3, 1, "no")])
    before, after = BAD_ROWS[fault]
    text = (tmp_path / "Posts.xml").read_bytes()
    assert before in text
    (tmp_path / "Posts.xml").write_bytes(text.replace(before, after, 1))
    dataset = run(tmp_path, source)
    assert dataset.rows == 2 and not dataset.failures()


def test_bad_lines_are_failures_and_the_rest_goes_on(tmp_path: pathlib.Path) -> None:
    rows = [question(i) for i in range(1, 9)] + [answer(10 + i, i, 1, f"yes {i}") for i in range(1, 9)]
    rows[0].pop("Id")
    rows[2]["AcceptedAnswerId"] = "x"
    rows[11]["Score"] = "nan"
    rows[12].pop("ParentId")
    source = posts(tmp_path / "Posts.xml", rows)
    lines = (tmp_path / "Posts.xml").read_text().replace("/>", "", 2).splitlines()  # rows 0 and 1 have no end
    (tmp_path / "Posts.xml").write_text("\n".join(lines))
    dataset = run(tmp_path, source, max_failed=1.0)
    assert {row["source"] for row in dataset.read()} == {f"stackoverflow:{i}" for i in (6, 7, 8)}
    assert [(failure["key"], failure["reason"][:20]) for failure in dataset.failures()] == [
        (f"stackoverflow/Posts.xml line {line}", reason)
        for line, reason in {
            3: "unclosed token: line",
            4: "unclosed token: line",
            5: "AcceptedAnswerId is ",
            14: "Score is 'nan'",
            15: "ParentId is missing",
        }.items()
    ]


def test_another_tag_or_dump_after_an_interruption_is_not_mixed(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [question(1), answer(2, 1, 1, "snake"), question(3, tags="<java>"), answer(4, 3, 1, "coffee")]
    source = posts(tmp_path / "Posts.xml", rows)

    def interrupted(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(ingest, "run_stage", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, source)
    assert list((tmp_path / "documents" / "spool").glob("*.sqlite"))
    assert "coffee" in next(run(tmp_path, source, tag="java").read())["content"]
    with pytest.raises(UserError, match=r'config.tag: "java" there, "python" asked'):
        run(tmp_path, source)
    with monkeypatch.context() as patched:
        patched.setattr(ingest, "run_stage", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, source, name="replaced")
    posts(tmp_path / "Posts.xml", [question(1), answer(2, 1, 1, "viper")])
    assert "viper" in next(run(tmp_path, source, name="replaced").read())["content"]


def test_two_processes_join_one_dump(tmp_path: pathlib.Path) -> None:
    rows = [row for i in range(1, 400, 2) for row in (question(i), answer(i + 1, i, 1, f"yes {i}"))]
    source = posts(tmp_path / "Posts.xml", rows)
    command = [sys.executable, "-m", "phi1.cli", "data", "ingest", "--sources", source, "--output", str(tmp_path / "d")]
    root = pathlib.Path(ingest.__file__).parent.parent
    both = [subprocess.Popen(command, cwd=root, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate()[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert Dataset(tmp_path / "d").rows == 200 and not (tmp_path / "d" / "spool").exists()


def test_html_becomes_text_and_code_stays_as_it_is() -> None:
    html = "<p>One\n two</p>\n\n<ul><li>a</li><li>b</li></ul><pre class='x'><code>\tx  =  1\n\n\n\ny\n</code></pre><p>&amp;</p>"
    assert stackoverflow.html_to_text(html) == "One two\n\n- a\n- b\n\n```\n\tx  =  1\n\n\n\ny\n```\n\n&"
    unclosed = "<p>Use</p><pre><code>a = 1\nb = 2\n</code><p>and more</p><pre><code>c = 3"
    assert stackoverflow.html_to_text(unclosed) == "Use\n\n```\na = 1\nb = 2\n```\n\nand more\n\n```\nc = 3\n```"


def test_prose_is_judged_by_its_words_and_its_code_by_its_lines(tmp_path: pathlib.Path) -> None:
    paragraph = "<p>" + "A long explanation stands in one line. " * 60 + "</p>"
    minified = "<pre><code>" + "a=1;" * 300 + "</code></pre>"
    source = posts(
        tmp_path / "Posts.xml",
        [
            question(1),
            answer(2, 1, 1, paragraph),
            question(3),
            answer(4, 3, 1, paragraph + minified),
            question(5),
            answer(6, 5, 1, "<p>" + "x" * 2000 + "</p>"),
        ],
    )
    dataset = run(tmp_path, source)
    assert [row["source"] for row in dataset.read()] == ["stackoverflow:1"]
    assert dataset.counters["dropped_minified"] == 2


def test_authors_and_addresses_are_kept(tmp_path: pathlib.Path) -> None:
    source = posts(
        tmp_path / "Posts.xml",
        [
            question(1, OwnerUserId=7),
            answer(2, 1, 1, "yes") | {"OwnerDisplayName": "Ann"},
            question(3),
            answer(4, 3, 1, "no"),
        ],
    )
    first, second = run(tmp_path, source).read()
    assert first["authors"] == ["https://stackoverflow.com/users/7", "Ann"] and second["authors"] == []
    assert first["url"] == "https://stackoverflow.com/a/2"
