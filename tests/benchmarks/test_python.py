"""Python per call: every row has its numbers, and the operators are put back."""

from sw_transplant.ops import direct


def test_every_row_is_measured(load, tmp_path) -> None:
    before = dict(direct._OPERATORS)
    rows = load("python").main(["--repeats", "2", "--json", str(tmp_path / "python.json")])
    assert before == direct._OPERATORS
    assert len(rows) == 3
    assert all(row["eval"] > 0 and row["train"] > row["eval"] for row in rows)
    assert [row["frozen"] is None for row in rows] == [True, False, False]
