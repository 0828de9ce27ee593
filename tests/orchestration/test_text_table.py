"""Tables that people read: the same layout as written by hand, whatever the cells hold."""

import pytest

from orchestration.text_table import text_table

ROWS = [("job", "state", "took"), ("raysubmit_1", "RUNNING", ""), ("b", "[red]odd[/red]", "2h02m " + "x" * 300)]


@pytest.mark.parametrize("right", [(), (1,), (0, 2)])
def test_columns_stand_under_each_other(right):
    widths = [max(len(row[i]) for row in ROWS) for i in range(3)]
    lines = []
    for row in ROWS:
        cells = [c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths))]
        lines.append("  ".join(cells).rstrip())
    assert text_table(ROWS, right=right) == "\n".join(lines)


def test_wide_characters_take_two_columns_and_a_rule_is_as_long_as_its_table():
    lines = text_table([("名前", "1"), ("abcd", "20")], right=(1,), rule_after=1).splitlines()
    assert lines == ["名前   1", "--------", "abcd  20"]
    assert text_table([]) == ""
