"""Tasks over time: lanes, pauses, faults, and few bars of many tasks."""

import pytest

from ooc_ntk.report.figures import timeline
from ooc_ntk.report.figures.timeline import draw_timeline, make_timeline
from ooc_ntk.storage.manifest import Receipt


def task(key, start, seconds, **more):
    return Receipt(key, seconds, started=1000.0 + start, **more)


def test_no_times_no_timeline():
    assert make_timeline([]) is None
    assert make_timeline([Receipt("rows-0-0-0", 1.0)]) is None, "of an older version, which kept no times"


def test_a_pause_is_cut_out_and_faults_are_told():
    receipts = [
        task("kernel-0-0-0", 100.0, 2.0, retries=2, worker="b"),
        task("rows-0-0-0", 0.0, 3.0, worker="a"),
        task("rows-0-1-0", 1.0, 3.0, worker="b", batch_size=4),
        task("release-0-0-0", 4.0, 0.1),
    ]
    found = make_timeline(receipts)
    assert found.tasks == 3
    assert found.workers == ("a", "b")
    assert [bar.what for bar in found.bars] == ["rows of tile 0", "rows of tile 1", "kernel tiles from (0, 0)"]
    assert [bar.again for bar in found.bars] == ["", "in batches of 4, as memory was short", "tried again 2 times"]
    assert found.pauses == ((1004.0, 1100.0),)
    plot = draw_timeline(found)
    ends = [max(each.data_source.data["right"]) for each in plot.renderers if "right" in each.data_source.data]
    assert max(ends) == pytest.approx(6.0 + timeline.LEFT_OF_PAUSE * 6.0), "4 s of rows, 2 s of kernel"


def test_tasks_at_once_have_lanes_of_their_own():
    found = make_timeline([task("rows-0-0-0", 0, 2), task("rows-0-1-0", 1, 2), task("rows-0-2-0", 2.5, 1)])
    names, places = timeline._lanes(found)
    assert names == ["rows", ""]
    assert places == [0, 1, 0]


def test_of_many_tasks_neighbours_are_one_bar(monkeypatch):
    monkeypatch.setattr(timeline, "MOST_BARS", 20)
    receipts = [task(f"kernel-0-{n}-0", n, 0.9, retries=int(n == 50), bytes_read=10) for n in range(100)]
    found = make_timeline(receipts)
    assert found.tasks == 100
    assert len(found.bars) <= 30
    assert sum(bar.moved for bar in found.bars) == 1000
    assert [bar.what for bar in found.bars if bar.again] == ["kernel tiles from (50, 0)"]
    assert found.bars[0].start == 1000.0
    assert max(bar.stop for bar in found.bars) == pytest.approx(1099.9)
