"""What the linters do not check: files are short, nothing is written twice, and the formatter decides."""

import collections
import pathlib

ROOT = pathlib.Path(__file__).parents[1]
PRODUCT = [
    path
    for folder in ("bench", "csrc", "data_tools", "kernels", "phi1")
    for path in sorted((ROOT / folder).rglob("*"))
    if path.suffix in (".cpp", ".cu", ".cuh", ".h", ".inl", ".py")
]


def runs_of_equal_lines(texts: dict[str, str], count: int) -> list[list[tuple[str, int]]]:
    """Where `count` lines, empty ones and indentation aside, stand more than once: (name, line) of each place."""
    places: dict[tuple[str, ...], list[tuple[str, int]]] = collections.defaultdict(list)
    for name, text in texts.items():
        lines = [(line.strip(), number) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
        for start in range(len(lines) - count + 1):
            places[tuple(line for line, _ in lines[start : start + count])].append((name, lines[start][1]))
    return [found for found in places.values() if len(found) > 1]


def test_no_ten_equal_lines_stand_twice() -> None:
    assert len(PRODUCT) > 150
    assert runs_of_equal_lines({str(path.relative_to(ROOT)): path.read_text() for path in PRODUCT}, 10) == []
    text = "".join(f"{i}\n" for i in range(12))
    assert runs_of_equal_lines({"a": text, "b": f"x\n\n{text}"}, 11) == [[("a", 1), ("b", 3)], [("a", 2), ("b", 4)]]


def test_no_file_is_longer_than_500_lines() -> None:
    files = [*PRODUCT, *(ROOT / "tests").rglob("*.py"), *(ROOT / "tests").rglob("*.cpp")]
    assert [str(path) for path in files if len(path.read_text().splitlines()) > 500] == []


def test_the_formatter_is_left_out_only_for_the_arguments_of_kernels() -> None:
    skipped = {path: path.read_text().count("# fmt: ") for path in PRODUCT if path.suffix == ".py"}
    assert sum(skipped.values()) < 20
    assert {path.relative_to(ROOT).parts[0] for path, count in skipped.items() if count} == {"kernels"}
