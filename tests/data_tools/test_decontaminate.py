"""Decontamination finds planted copies of HumanEval however they are dressed, and leaves other code alone."""

import ast
import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy
import pyarrow
import pytest

from data_tools import decontaminate, similarity
from data_tools.dataset import Dataset, run_stage
from data_tools.decontaminate import Config
from phi1.errors import UserError
from phi1.evaluate import humaneval

PROBLEMS = {problem.task_id: problem for problem in humaneval.load()}
SEPARATE = PROBLEMS["HumanEval/1"]  # separate_paren_groups: 25 lines with a docstring of 40 words
ROLLING = PROBLEMS["HumanEval/9"]  # rolling_max: a docstring of 13 words with its examples

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


class _Renamer(ast.NodeTransformer):
    """Other names for everything that the code names itself."""

    def __init__(self, names: set[str]) -> None:
        self.names = names

    def visit_Name(self, node: ast.Name) -> ast.Name:
        return ast.Name(f"zz_{node.id}" if node.id in self.names else node.id, node.ctx)

    def visit_arg(self, node: ast.arg) -> ast.arg:
        return ast.arg(f"zz_{node.arg}")

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        self.generic_visit(node)
        node.name, node.returns = "zz_" + node.name, None
        if ast.get_docstring(node) is not None:
            node.body[0] = ast.Expr(ast.Constant("Do it."))
        return node


def renamed(problem: humaneval.Problem) -> str:
    """The solution with new names, no annotations, another docstring."""
    tree = ast.parse(problem.prompt + problem.solution)
    names = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    names |= {n.arg for n in ast.walk(tree) if isinstance(n, ast.arg)}
    return ast.unparse(ast.fix_missing_locations(_Renamer(names).visit(tree))) + "\n"


def commented(problem: humaneval.Problem) -> str:
    """The solution with a comment over every line, and no docstring."""
    body = "".join(f"{line[: len(line) - len(line.lstrip())]}# now this\n{line}\n" if line.strip() else "\n"
                   for line in problem.solution.splitlines())  # fmt: skip
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
    assert extra["serialisation"] == similarity.SERIALISATION and extra["ast_rate"] == 0.95


def test_every_task_renamed_is_found(tmp_path: pathlib.Path) -> None:
    single = [p for p in PROBLEMS.values() if len(ast.parse(p.prompt).body) <= 2 and p.prompt.count("\ndef ") <= 1]
    result = decontaminated(tmp_path, [renamed(problem) for problem in single])
    assert len(single) > 150 and result.rows == 0


def test_a_docstring_quoted_in_prose_is_found_in_a_document(tmp_path: pathlib.Path) -> None:
    words = ast.get_docstring(ast.parse(SEPARATE.prompt).body[1])  # type: ignore[arg-type]
    assert words is not None
    text = "A question: " + words.replace("\n", " ").upper() + " How?\n"
    result = decontaminated(tmp_path, [text, "Prose: about nothing, and not Python.\n"], exercises=False)
    assert reasons(result) == ["ngram HumanEval/1"]
    assert result.rows == 1 and result.counters["kept_without_ast_test"] == 1


def test_code_blocks_of_a_textbook_are_compared(tmp_path: pathlib.Path) -> None:
    text = f"Here is how:\n\n```python\n{renamed(SEPARATE)}```\n\nThat is it.\n"
    short = f"Adding:\n\n```python\n{renamed(PROBLEMS['HumanEval/53'])}```\n"  # return x + y: below ast_min_nodes
    assert reasons(decontaminated(tmp_path, [text, short], exercises=False)) == ["ast HumanEval/1"]


def test_what_does_not_parse_is_not_kept_silently(tmp_path: pathlib.Path) -> None:
    broken = OTHER.replace("if a > b:", "if a > b", 1)
    result = decontaminated(tmp_path, [broken, "x = 1\n", OTHER])
    assert reasons(result) == ["unparsable its code does not parse, so its tree cannot be compared"] * 2
    kept = decontaminate.run(
        Config(input=tmp_path / "in", output=tmp_path / "kept", embedder="none", unparsable="keep")
    )
    assert kept.rows == 3 and kept.counters["kept_without_ast_test"] == 2


def test_a_looser_rate_removes_what_a_stricter_one_keeps(tmp_path: pathlib.Path) -> None:
    changed = renamed(ROLLING).replace("return zz_result", "zz_result.append(1)\n    return zz_result")
    assert changed.count("append(1)") == 1
    result = decontaminated(tmp_path, [changed])
    assert result.rows == 1 and result.counters["ast_rate_0.80"] == 1 and result.counters["ast_rate_0.95"] == 0
    looser = decontaminate.run(Config(input=tmp_path / "in", output=tmp_path / "looser", embedder="none", ast_rate=0.8))
    assert looser.rows == 0


def test_embedding_finds_a_copy_that_the_other_tests_miss(tmp_path: pathlib.Path) -> None:
    # Reworded, and restructured so that its tree differs.
    reworded = (SEPARATE.prompt + SEPARATE.solution).replace("Your goal is to separate", "The aim is to split").replace(
        "Input to this function is a string", "You are given one string"
    ).replace("current_depth += 1", "current_depth = current_depth + 1").replace(
        "result.append(''.join(current_string))", "result += [''.join(current_string)]"
    ).replace("Ignore any spaces in the input string", "Skip blanks").replace("are balanced", "match")  # fmt: skip
    few = tmp_path / "few.jsonl"  # 164 would take a slow machine half a minute
    rows = [dataclasses.asdict(p) | {"canonical_solution": p.solution} for p in list(PROBLEMS.values())[:10]]
    few.write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = decontaminated(tmp_path, [reworded, OTHER], embedder="minilm", ngram=30, ast_rate=0.99, problems=few)
    assert reasons(result) == ["embedding HumanEval/1"] and result.column("content") == [OTHER]
    assert result.manifest["config"]["embedding_model"] == "minilm"
    # Without anything to look at by tree, nothing is embedded.
    unseen = decontaminate.run(Config(input=tmp_path / "in", output=tmp_path / "unseen", embedder="minilm", ngram=30,
                                      ast_rate=0.999, embed_above=0.998, problems=few))  # fmt: skip
    assert unseen.rows == 2


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
        decontaminate.run(Config(input=made.folder, output=tmp_path / "out", problems=unsolved, embedder="none"))


def test_serialisation_and_rate_are_what_is_pinned() -> None:
    def tree(code: str) -> str:
        return similarity.serialise(ast.parse(code).body[0])

    first = tree('def f(x: int) -> int:\n    """Doc."""\n    return x + 1  # one\n')
    assert first == tree("@cached\ndef g(y):\n    return y + 2\n")
    # FunctionDef, arguments, arg, Return, BinOp, Name, Add, Constant
    assert len(first) == 8
    other = tree("def f(x):\n    return x - 1\n")
    assert similarity.ast_rates([first], [first, other], 0.0).tolist() == [[1.0, pytest.approx(7 / 8)]]
    assert similarity.ast_rates([first], [other], 0.9).tolist() == [[0.0]]
    assert similarity.ast_rates([], [other], 0.9).shape == (0, 1)


def test_share_of_solutions_with_a_twin_is_as_published_for_this_serialisation() -> None:
    """Preorder node types, HumanEval's solutions against each other: 1.2 / 3.7 / 4.9 / 6.1 / 15.2% have a twin at a rate
    of .95 / .9 / .85 / .8 / .7, counted by an independent implementation that kept annotations and contexts. Ours leaves those
    out, which makes trees shorter; the shares must be of that size, not several times it."""
    trees = [similarity.serialise(decontaminate._entry(problem)) for problem in PROBLEMS.values()]
    rates = similarity.ast_rates(trees, trees, 0.0)
    numpy.fill_diagonal(rates, 0.0)
    shares = [float((rates.max(axis=1) >= rate).mean()) for rate in (0.95, 0.9, 0.85, 0.8)]
    assert shares == sorted(shares) and 0.005 < shares[0] < 0.04 and shares[3] < 0.2
