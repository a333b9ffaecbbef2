"""Markdown as language models write it: thoughts, a fence around everything, fenced blocks."""

import pytest

from data_tools.markdown import Block, fenced, unwrapped, without_thought


def test_thoughts_are_left_out() -> None:
    assert without_thought("<think>hm\n</think>\nyes") == "\nyes"
    assert without_thought("hm</think>yes") == "yes"  # the server left out the beginning
    assert without_thought(" <think>hm") == ""
    assert without_thought("yes, <think> is a tag") == "yes, <think> is a tag"


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("```\nx = 1\n```", ""),
        ("```Python\nx = 1\n```", "python"),
        ("``` python3 \nx = 1\n```  ", "python3"),
        ("```{python}\nx = 1\n```", "python"),
        ("```{.python .numberLines}\nx = 1\n```", "python"),
        ('```python title="a.py"\nx = 1\n```', "python"),
        ("````python\nx = 1\n````", "python"),
        ("~~~python\nx = 1\n~~~", "python"),
        ("1. ```python\nx = 1\n   ```", "python"),
        ("```c++\nx = 1\n```", "c++"),
    ],
)
def test_a_fence_may_be_written_in_many_ways(text: str, language: str) -> None:
    assert list(fenced(f"So:\n{text}\nThen.")) == [Block(language, "x = 1\n", 4, 4 + len(text), True)]


def test_blocks_end_at_their_own_fence_or_with_the_text() -> None:
    text = "````md\n```python\nx\n```\n````\nThis is `one`, ```and``` this.\n```\ny"
    assert [(block.language, block.code, block.closed) for block in fenced(text)] == [
        ("md", "```python\nx\n```\n", True),
        ("", "y", False),
    ]
    assert next(fenced("~~~\nx\n```\ny\n~~~")).code == "x\n```\ny\n"


def test_an_answer_within_markdown_is_taken_out() -> None:
    inner = "# Lists\n\n```python\nx = 1\n```"
    assert unwrapped(f"```markdown\r\n{inner}\r\n\r\nThat is it.\r\n```\n") == f"{inner}\n\nThat is it."
    assert unwrapped(f"````md\n{inner}\n````") == inner
    # Cut: what ends it is the inner block's fence.
    assert unwrapped(f"```markdown\n{inner}") == inner
    for text in (inner, "```python\nx = 1\n```", f"Sure:\n```markdown\n{inner}\n```"):
        assert unwrapped(text) == text
