"""Decontamination finds planted copies of HumanEval however they are dressed, and leaves other code alone."""

import ast
import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import numpy
import pyarrow
import pytest
from fake_openai import FakeServer, completion

from bench.decontaminate import CHANGES, functions, one_more, renamed, verdicts
from data_tools import decontaminate, python_text, similarity
from data_tools.dataset import Dataset, Failure, run_stage
from data_tools.decontaminate import Config
from data_tools.tasks import entry
from phi1.errors import UserError
from phi1.evaluate import humaneval

PROBLEMS = {problem.task_id: problem for problem in humaneval.load()}
SEPARATE = PROBLEMS["HumanEval/1"]  # separate_paren_groups: 25 lines with a docstring of 40 words
ROLLING = PROBLEMS["HumanEval/9"]  # rolling_max: a docstring of 13 words with its examples

WEAK = ("one statement more", "Python 2 line in it")
"""Changes that the rate itself speaks of; the others leave a tree as it was, or what they leave cannot be read."""
BENCHMARK = decontaminate.Benchmark(
    Config(input=pathlib.Path(), output=pathlib.Path(), embedder="none", ast_rate=0.8), exercises=False
)

OTHER = '''def median_of_three(a, b, c):
    """Return the middle one of three numbers."""
    if a > b:
        a, b = b, a
    if b > c:
        b, c = c, b
    if a > b:
        a, b = b, a
    return b
'''


def commented(problem: humaneval.Problem) -> str:
    """The solution with a comment over every line, and no docstring."""
    body = "".join(
        f"{line[: len(line) - len(line.lstrip())]}# now this\n{line}\n" if line.strip() else "\n"
        for line in problem.solution.split("\n")
    )
    head = problem.prompt[: problem.prompt.index('"""')].rstrip() + "\n"
    return head + body


def dataset(folder: pathlib.Path, contents: list[str], *, exercises: bool) -> Dataset:
    columns = [("hexsha", pyarrow.string()), ("content", pyarrow.string())]
    columns += [("solution", pyarrow.string())] * exercises

    def produce(*_: Any) -> Iterator[dict[str, Any]]:
        for content in contents:
            row = {"hexsha": hashlib.sha1(content.encode()).hexdigest(), "content": content}
            yield row | ({"solution": ""} if exercises else {})

    @dataclasses.dataclass(frozen=True)
    class Made:
        of: tuple[str, ...]

    return run_stage("made", Made(tuple(contents)), folder, [], 1, produce, pyarrow.schema(columns), quiet=True)


def decontaminated(tmp_path: pathlib.Path, contents: list[str], *, exercises: bool = True, **options: Any) -> Dataset:
    made = dataset(tmp_path / "in", contents, exercises=exercises)
    options = {"embedder": "none"} | options
    return decontaminate.run(Config(input=made.folder, output=tmp_path / "out", **options))


def reasons(result: Dataset) -> list[str]:
    return [
        failure["reason"].split(":")[0] + " " + failure["reason"].split(":")[1].strip() for failure in result.failures()
    ]


def test_planted_copies_are_found_and_unrelated_code_stays(tmp_path: pathlib.Path) -> None:
    planted = [SEPARATE.prompt + SEPARATE.solution, renamed(SEPARATE), commented(SEPARATE), renamed(ROLLING)]
    result = decontaminated(tmp_path, [*planted, OTHER])
    assert reasons(result) == ["ngram HumanEval/1", "ast HumanEval/1", "ast HumanEval/1", "ast HumanEval/9"]
    assert result.column("content") == [OTHER]
    assert result.counters["removed_ngram"] == 1 and result.counters["removed_ast"] == 3
    extra = result.manifest["config"]
    assert extra["serialisations"] == ["preorder", "sorted"] and extra["ast_rate"] == 0.95


def test_every_task_renamed_is_found_but_the_small_ones(tmp_path: pathlib.Path) -> None:
    """15 solutions have fewer than 14 nodes: other names and another docstring hide them, unless size is not asked
    for.
    """
    result = decontaminated(tmp_path, [renamed(problem) for problem in PROBLEMS.values()])
    assert result.rows == 13 and result.counters["small_trees_alone"] == 13
    assert result.manifest["config"]["small_tasks"] == 15
    all_sizes = Config(input=tmp_path / "in", output=tmp_path / "all", embedder="none", ast_min_nodes=0)
    assert decontaminate.run(all_sizes).rows == 0


def test_a_small_tree_needs_a_name_or_docstring_that_agrees(tmp_path: pathlib.Path) -> None:
    """HumanEval/53 is `return x + y`."""
    task = PROBLEMS["HumanEval/53"]
    words = "Add two numbers x and y"
    rows = [
        "def total(a, b):\n    return a + b\n",
        f'def total(a, b):\n    """{words}."""\n    return a + b\n',
        'def total(a, b):\n    """The sum of prices."""\n    return a + b\n',
        "def Add(a, b):\n    return a + b\n",
    ]
    assert words in task.prompt
    result = decontaminated(tmp_path, rows)
    assert result.column("content") == [rows[0], rows[2]] and result.counters["small_trees_alone"] == 2


def test_a_docstring_quoted_in_prose_is_found_in_a_document(tmp_path: pathlib.Path) -> None:
    words = ast.get_docstring(ast.parse(SEPARATE.prompt).body[1])  # type: ignore[arg-type]
    assert words is not None
    text = "A question: " + words.replace("\n", " ").upper() + " How?\n"
    result = decontaminated(tmp_path, [text, "Prose: about nothing, and not Python.\n"], exercises=False)
    assert reasons(result) == ["ngram HumanEval/1"]
    assert result.rows == 1 and result.counters["kept_without_code"] == 1


def test_code_blocks_of_a_textbook_are_compared(tmp_path: pathlib.Path) -> None:
    text = f"Here is how:\n\n```python\n{renamed(SEPARATE)}```\n\nThat is it.\n"
    short = f"Adding:\n\n```python\n{renamed(PROBLEMS['HumanEval/53'])}```\n"  # return x + y
    assert reasons(decontaminated(tmp_path, [text, short], exercises=False)) == ["ast HumanEval/1"]


def test_what_cannot_be_checked_is_not_clean(tmp_path: pathlib.Path) -> None:
    broken = OTHER.replace("if a > b:", "if a > b", 1)
    result = decontaminated(tmp_path, [broken, "x = 1\n", "", OTHER])
    assert reasons(result) == [
        "unchecked its code does not parse, so its tree cannot be compared",
        "unchecked an exercise without a function",
        "unchecked an exercise without a function",
    ]
    kept = decontaminate.run(Config(input=tmp_path / "in", output=tmp_path / "kept", embedder="none", unchecked="keep"))
    assert kept.rows == 4 and kept.counters["kept_unchecked"] == 3
    texts = decontaminated(tmp_path / "texts", [f"So:\n\n{broken}", "x = 1\n", " \n", OTHER], exercises=False)
    assert [reason.split()[0] for reason in reasons(texts)] == ["unchecked", "unchecked"] and texts.rows == 2


def test_code_that_does_not_parse_is_compared_by_its_tokens(tmp_path: pathlib.Path) -> None:
    broken = renamed(SEPARATE).replace("):", ") -> :", 1)  # the first line: nothing to mend
    result = decontaminated(
        tmp_path, [broken, "def f(x:\n    return ]\n"], exercises=False, unchecked="keep", ast_rate=0.9
    )
    assert reasons(result) == ["tokens HumanEval/1"] and result.counters["kept_unchecked"] == 1


@pytest.mark.parametrize("kind", [kind for kind in CHANGES if kind not in WEAK])
def test_a_planted_copy_is_found_however_it_is_dressed(kind: str) -> None:
    """Every eighth task: all whose tree is large enough are removed at 0.95."""
    texts = [
        CHANGES[kind](problem) for i, problem in enumerate(PROBLEMS.values()) if i % 8 == 1 and BENCHMARK.sizes[i] >= 14
    ]
    found = verdicts(BENCHMARK, [text for text in texts if text is not None])
    assert len(found) >= 10 and all(grams or unread or best >= 0.95 for grams, best, unread in found)


def test_a_statement_more_costs_what_the_rate_says() -> None:
    """An assignment is three nodes: found from where they are a twentieth, or a fifth, of the tree."""
    texts = [one_more(problem) for problem in PROBLEMS.values()]
    rates = [best for _, best, _ in verdicts(BENCHMARK, texts)]
    sure = [rate for rate, size in zip(rates, BENCHMARK.sizes, strict=True) if size >= 57]
    assert len(sure) > 20 and min(sure) >= 0.95
    assert all(rate >= 0.8 for rate, size in zip(rates, BENCHMARK.sizes, strict=True) if size >= 14)


def test_clean_code_stays() -> None:
    found = verdicts(BENCHMARK, [source for source, _ in functions(("more_itertools", "toolz"))])
    assert len(found) > 400 and sum(grams or unread or best >= 0.95 for grams, best, unread in found) <= 4


@pytest.mark.parametrize(
    "text",
    [
        "Use `def f(x):` to begin, and `return` to end.\n",
        "In prose one may def a word (as one wishes).\n",
        "A table:\n\n| a | b |\n|---|---|\n| 1 | 2 |\n",
        "$ git log\n$ ls\n",
    ],
)
def test_prose_is_no_code_that_could_not_be_read(text: str) -> None:
    assert python_text.find(text).unread == []


def test_other_languages_are_counted(tmp_path: pathlib.Path) -> None:
    text = "Run:\n\n```sh\nls\n```\n\n~~~ {.java}\nint f(int x) { return x; }\n~~~\n"
    assert python_text.find(text).languages == {"sh", "java"}
    result = decontaminated(tmp_path, [text], exercises=False)
    assert result.counters["kept_with_other_languages"] == 1


def test_a_row_without_content_is_not_clean() -> None:
    rows = [{"hexsha": "a", "content": None}, {"hexsha": "b", "content": "x = 1\n"}]
    out = list(BENCHMARK.sort_out(rows))  # type: ignore[arg-type]
    assert out[0] == Failure("a", "unchecked: no text") and out[1] == rows[1]


def test_rows_that_are_no_text(tmp_path: pathlib.Path) -> None:
    deep = "def f():\n    return " + "(" * 3000 + ")" * 3000 + "\n"
    rows = ["\0\0def f(:\n", deep, "\ufeff", "[" * 100_000, "\x0c\u2028"]
    result = decontaminated(tmp_path, rows, exercises=False)
    assert result.rows + result.counters["failures"] == 5
    assert any("no text" in failure["reason"] for failure in result.failures())
    assert any("does not parse" in failure["reason"] for failure in result.failures())


def test_mbpp_from_a_path(tmp_path: pathlib.Path) -> None:
    row = {
        "task_id": 2,
        "text": "Write a function to find the shared elements from the given two lists, each one once.",
        "code": "def similar_elements(a, b):\n  found = tuple(set(a) & set(b))\n  return (found)\n",
        "test_list": ["assert similar_elements((3, 4, 5, 6),(5, 7, 4, 10)) == (4, 5)"],
        "test_setup_code": "",
    }
    file = tmp_path / "mbpp.jsonl"
    file.write_text(json.dumps(row) + "\n")
    copied = "def common(left, right):\n    shared = tuple(set(left) & set(right))\n    return shared\n"
    words = f"# {row['text']}\nx = 1\n"
    result = decontaminated(tmp_path, [copied, words, OTHER], exercises=False, problems=(str(file), "humaneval"))
    assert reasons(result) == ["ast Mbpp/2", "ngram Mbpp/2"]
    assert result.manifest["config"]["tasks"] == 165


def test_a_looser_rate_removes_what_a_stricter_one_keeps(tmp_path: pathlib.Path) -> None:
    changed = renamed(ROLLING).replace("return zz_result", "zz_result.append(1)\n    return zz_result")
    assert changed.count("append(1)") == 1
    result = decontaminated(tmp_path, [changed])
    assert result.rows == 1 and result.counters["ast_rate_0.80"] == 1 and result.counters["ast_rate_0.95"] == 0
    looser = decontaminate.run(Config(input=tmp_path / "in", output=tmp_path / "looser", embedder="none", ast_rate=0.8))
    assert looser.rows == 0


@pytest.mark.usefixtures("elsewhere")
def test_embedding_finds_a_copy_that_the_other_tests_miss(tmp_path: pathlib.Path) -> None:
    # Reworded, and restructured so that its tree differs.
    reworded = (
        (SEPARATE.prompt + SEPARATE.solution)
        .replace("Your goal is to separate", "The aim is to split")
        .replace("Input to this function is a string", "You are given one string")
        .replace("current_depth += 1", "current_depth = current_depth + 1")
        .replace("result.append(''.join(current_string))", "result += [''.join(current_string)]")
        .replace("Ignore any spaces in the input string", "Skip blanks")
        .replace("are balanced", "match")
    )
    few = tmp_path / "few.jsonl"  # 164 would take a slow machine half a minute
    rows = [dataclasses.asdict(p) | {"canonical_solution": p.solution} for p in list(PROBLEMS.values())[:10]]
    few.write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = decontaminated(
        tmp_path, [reworded, OTHER], embedder="minilm", ngram=30, ast_rate=0.99, problems=(str(few),)
    )
    assert reasons(result) == ["embedding HumanEval/1"] and result.column("content") == [OTHER]
    assert result.manifest["config"]["embedding_model"] == "minilm"
    # Without anything to look at by tree, nothing is embedded.
    unseen = decontaminate.run(
        Config(
            input=tmp_path / "in",
            output=tmp_path / "unseen",
            embedder="minilm",
            ngram=30,
            ast_rate=0.999,
            embed_above=0.998,
            problems=(str(few),),
        )
    )
    assert unseen.rows == 2


def test_a_judge_reads_what_no_other_test_sees(
    tmp_path: pathlib.Path, server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Vectors are made up: each row's nearest tasks are HumanEval/1 and the one after. A judge without an answer is no
    yes.
    """
    order = list(PROBLEMS)

    def vectors(self: Any, texts: list[str]) -> Any:
        rng = numpy.random.default_rng(0)
        tasks = rng.normal(size=(len(order), 64))
        rows = (
            tasks if len(texts) == len(order) else tasks[1] + 0.5 * tasks[2] + 3 * rng.normal(size=(len(texts), 64)) / 8
        )
        return rows / numpy.linalg.norm(rows, axis=1, keepdims=True)

    def script(body: dict[str, Any], index: int) -> Any:
        text = body["messages"][0]["content"]
        if "median" in text:
            return completion('{"same": false}')
        return completion(
            "Hm, I think so."
            if "riddle" in text
            else '{"same": true}'
            if "separate_paren_groups" in text
            else '{"same": false}'
        )

    monkeypatch.setattr(decontaminate.Benchmark, "_embedded", vectors)
    server.script = script
    rows = ["Klammern trennen: zerlege den Text in seine Gruppen.\n", "A riddle.\n", OTHER]
    options = {
        "embedder": "minilm",
        "embedding_distance": 0.1,
        "judge_nearest": 2,
        "base_url": server.base_url,
        "model": "fake-1",
    }
    result = decontaminated(tmp_path, rows, exercises=False, attempts=1, **options)
    assert result.column("content") == [OTHER] and len(server.bodies) == 6
    assert reasons(result) == ["judge HumanEval/1", "unchecked the judge gives no answer about HumanEval/1"]
    assert result.counters["removed_judge"] == 1
    kept = decontaminate.run(
        Config(input=tmp_path / "in", output=tmp_path / "kept", unchecked="keep", attempts=1, **options)
    )  # type: ignore[arg-type]
    assert kept.rows == 2 and kept.counters["kept_unchecked"] == 1
    with pytest.raises(UserError, match="--judge-nearest 2"):
        decontaminated(tmp_path / "x", rows, judge_nearest=2)


def test_summary_says_when_nothing_or_everything_matched(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    decontaminated(tmp_path / "a", [OTHER])
    assert "nothing matched, which is normal" in capsys.readouterr().err
    decontaminated(tmp_path / "b", [renamed(ROLLING)])
    assert "removed EVERY row" in capsys.readouterr().err


def test_bad_thresholds_and_inputs(tmp_path: pathlib.Path) -> None:
    made = dataset(tmp_path / "in", [OTHER], exercises=False)
    with pytest.raises(UserError, match="--ast-rate 95"):
        decontaminate.run(Config(input=made.folder, output=tmp_path / "out", ast_rate=95))
    unsolved = tmp_path / "problems.jsonl"
    unsolved.write_text('{"task_id": "X/1", "prompt": "def f():\\n", "entry_point": "f", "test": ""}\n')
    with pytest.raises(UserError, match="X/1: has no canonical_solution"):
        decontaminate.run(
            Config(input=made.folder, output=tmp_path / "out", problems=(str(unsolved),), embedder="none")
        )


def test_an_embedder_is_known_by_what_its_files_hold(tmp_path: pathlib.Path) -> None:
    problems = one_problem(tmp_path)
    for name in ("pytorch_model.bin", "model.safetensors", "config.json", "tokenizer.json"):
        (tmp_path / name).write_bytes(b"a")
    seen = set()
    for name in (None, "pytorch_model.bin", "model.safetensors", "config.json", "tokenizer.json"):
        if name:
            (tmp_path / name).write_bytes(b"b")  # of the same size
        config = Config(input=tmp_path, output=tmp_path, problems=(str(problems),))
        benchmark = decontaminate.Benchmark(config, exercises=False, embedder=("codegen:x", tmp_path))
        seen.add(benchmark.facts["embedding_weights"])
    assert len(seen) == 5


def test_a_benchmark_that_was_moved_is_the_same(tmp_path: pathlib.Path) -> None:
    made, problems = dataset(tmp_path / "in", [OTHER], exercises=False), one_problem(tmp_path)
    config = Config(input=made.folder, output=tmp_path / "out", problems=(str(problems),), embedder="none")
    once = decontaminate.run(config)
    moved = problems.rename(tmp_path / "moved.jsonl")
    config = dataclasses.replace(config, problems=(str(moved),))
    assert decontaminate.run(config).hash == once.hash
    other = tmp_path / "other.jsonl"
    other.write_text(moved.read_text() + moved.read_text().replace("HumanEval/1", "HumanEval/2"))
    with pytest.raises(UserError, match=r"different: config\.benchmark: .*config\.tasks: 1 there, 2 asked"):
        decontaminate.run(dataclasses.replace(config, problems=(str(other),)))


def one_problem(folder: pathlib.Path) -> pathlib.Path:
    file = folder / "one.jsonl"
    file.write_text(json.dumps(dataclasses.asdict(SEPARATE) | {"canonical_solution": SEPARATE.solution}) + "\n")
    return file


def test_serialisation_and_rate_are_what_is_pinned() -> None:
    def tree(code: str) -> str:
        return similarity.serialise(ast.parse(code).body[0])

    first = tree('def f(x: int) -> int:\n    """Doc."""\n    return x + 1  # one\n')
    assert first == tree("@cached\ndef g(y):\n    return y + 2\n")
    # FunctionDef, arguments, arg, Return, BinOp, Name, Add, Constant
    assert len(first) == 8
    other = tree("def f(x):\n    return x - 1\n")
    half = Fraction(1, 2)
    assert list(similarity.near_pairs([first], [first, other], half)) == [(0, 0, 8, 8), (0, 1, 7, 8)]
    assert list(similarity.near_pairs([first], [other], Fraction(9, 10))) == []
    assert list(similarity.near_pairs([], [other], half)) == []
    one, two = tree("def f():\n    a = b()\n    c = 2\n"), tree("def f():\n    c = 2\n    a = b()\n")
    assert one != two

    def ordered(code: str) -> str:
        return similarity.serialise(ast.parse(code).body[0], "sorted")

    assert ordered("def f():\n    if x:\n        a()\n        c = 2\n    d\n") == ordered(
        "def f():\n    d\n    if x:\n        c = 2\n        a()\n"
    )
    brackets = similarity.serialise(ast.parse("def f(x):\n    return x\n").body[0], "brackets")
    assert brackets.replace(" ", "") == tree("def f(x):\n    return x\n") and brackets.count(" ") == 5


def levenshtein(a: str, b: str) -> int:
    """The textbook's table."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        before, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (x != y))
    return row[-1]


@pytest.mark.parametrize(
    ("rate", "length"), [("0.95", 20), ("0.95", 40), ("0.9", 10), ("0.9", 30), ("0.85", 20), ("0.8", 5), ("0.8", 35)]
)
def test_at_exactly_the_rate_is_at_the_rate(rate: str, length: int) -> None:
    least = similarity.exact(float(rate))
    edits = int((1 - least) * length)
    text = "".join(chr(0x41 + i % 40) for i in range(length))
    changed, shorter = "~" * edits + text[edits:], text[edits:]
    beyond = "~" * (edits + 1) + text[edits + 1 :]
    found = list(similarity.near_pairs([changed, shorter, beyond], [text], least))
    assert sorted(found) == [(0, 0, length - edits, length), (1, 0, length - edits, length)]


def test_the_cut_off_loses_no_pair() -> None:
    """Pairs of HumanEval's trees against a table of all their distances, at each rate; float32 lost some of them."""
    trees = [tree[:40] for tree in BENCHMARK.trees["preorder"]][::4] + ["a" * n + "b" * (20 - n) for n in range(21)]
    distances = {(i, j): levenshtein(a, b) for i, a in enumerate(trees) for j, b in enumerate(trees)}
    for rate in (*decontaminate.RATES, 0.0):
        least = similarity.exact(rate)
        expected = {
            (i, j, n - d, n)
            for (i, j), d in distances.items()
            if Fraction((n := max(len(trees[i]), len(trees[j]))) - d, n) >= least
        }
        assert set(similarity.near_pairs(trees, trees, least)) == expected


def test_against_the_distance_of_the_trees_themselves() -> None:
    """APTED's edit distance is never below ours, so a pair that it calls near is near; nor is ours of brackets above
    twice that. Both are equal for most pairs that are near.
    """
    import apted
    from apted import helpers

    def as_tree(node: ast.AST) -> Any:
        children = [as_tree(child) for nodes in similarity._fields(node) for child in nodes]
        return helpers.Tree(type(node).__name__, *children)

    chosen = [f for f, size in zip(BENCHMARK.functions, BENCHMARK.sizes, strict=True) if size < 30][:10]
    chosen += [
        ast.parse(one_more(p)).body[-1]
        for p in list(PROBLEMS.values())[:24]
        if len(similarity.serialise(entry(p))) < 30
    ]  # type: ignore[misc]
    trees = [as_tree(function) for function in chosen]
    near, same = 0, 0
    for i, a in enumerate(chosen):
        for j in range(i):
            exact = apted.APTED(trees[i], trees[j]).compute_edit_distance()
            ours = levenshtein(similarity.serialise(a), similarity.serialise(chosen[j]))
            bracketed = levenshtein(similarity.serialise(a, "brackets"), similarity.serialise(chosen[j], "brackets"))
            assert ours <= exact and bracketed <= 2 * exact
            if exact <= 6:
                near, same = near + 1, same + (ours == exact)
    assert near >= 5 and same >= 0.8 * near


def test_share_of_solutions_with_a_twin_is_as_published_for_this_serialisation() -> None:
    """Preorder node types, HumanEval's solutions against each other: 1.2 / 3.7 / 4.9 / 6.1 / 15.2% have a twin at a
    rate of .95 / .9 / .85 / .8 / .7, counted by an independent implementation that kept annotations and contexts. Ours
    leaves those out, which makes trees shorter; the shares must be of that size, not several times it.
    """
    trees = BENCHMARK.trees["preorder"]
    shares = []
    for rate in (0.95, 0.9, 0.85, 0.8):
        pairs = similarity.near_pairs(trees, trees, similarity.exact(rate))
        shares.append(len({i for i, j, _, _ in pairs if i != j}) / len(trees))
    assert shares == sorted(shares) and 0.005 < shares[0] < 0.04 and shares[3] < 0.2


def test_the_base_rate_stands_beside_each_rate(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = decontaminated(tmp_path, [OTHER])
    twins = result.manifest["config"]["own_twins"]
    assert list(twins) == ["0.95", "0.90", "0.85", "0.80"] and twins["0.95"] >= 1
    assert f"0.80: 0 ({twins['0.80']} of 164)" in capsys.readouterr().err
