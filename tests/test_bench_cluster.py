"""The bench of worker processes runs in smoke size, and counts what it says it counts."""

import re

import pytest

from bench import cluster

pytestmark = pytest.mark.slow


@pytest.mark.grid
def test_smoke(capsys):
    assert cluster.main(["--smoke"]) == 0
    text = capsys.readouterr().out
    assert "MISSED" not in text, "nothing is judged in smoke size"
    assert "met" not in text.replace("method", "")
    share = float(re.search(r"wall / sleeping − 1 = ([\d.e-]+)", text).group(1))
    assert 0 <= share < 5
    assert re.search(r"memory: 200 tasks of 0\.0 s on 4 workers: idle \d+ MB, peak \d+ MB, \d+ tasks/s", text)
    rows = re.findall(r"^\s+([12])\s+([\d.]+)\s+([\d.]+)\s+(\d+)\s+(\d+)%$", text, re.MULTILINE)
    assert [row[0] for row in rows] == ["1", "2"]
    assert rows[0][3] == rows[1][3] == "14", "the same tasks by one worker and by two"
    assert all(float(whole) > float(tasks) for _, tasks, whole, _, _ in rows)


def test_parts_are_chosen(capsys):
    with pytest.raises(SystemExit):
        cluster.main(["--parts", "nonsense"])
    assert "invalid choice: 'nonsense'" in capsys.readouterr().err
