"""Bodies with one operator changed."""

from data_tools.mutants import with_other_operators


def test_each_operator_is_changed_once() -> None:
    body = (
        "    count = 0\n    for x in v:\n        if x > 3 and x != 5:\n            count += x * 2\n    return count\n"
    )
    changed = list(with_other_operators(body, "v"))
    assert len(changed) == len(set(changed)) == 5
    for old, new in (("x > 3", "x >= 3"), ("!=", "=="), (" and ", " or "), ("+=", "-="), ("x * 2", "x + 2")):
        assert body.replace(old, new) in changed


def test_what_may_not_end_is_left_alone() -> None:
    assert not list(with_other_operators("    while v > 3:\n        v -= 1\n    return v + 1\n", "v"))
