"""The task list: complete, without repeats, and each task after everything it waits for."""

from hypothesis import given
from hypothesis import strategies as st

from ooc_ntk.planning.superblocks import superblocks
from ooc_ntk.planning.tasks import Task, TaskGraph
from ooc_ntk.planning.tiles import SampleGrid


def graph_of(grid, passes=1, order="square", capacity=1, **settings):
    return TaskGraph(grid, superblocks(grid, order, capacity), passes, **settings)


@given(
    st.builds(SampleGrid, train=st.integers(1, 30), test=st.integers(0, 12), tile=st.integers(1, 30)),
    st.integers(1, 3),
    st.booleans(),
    st.sampled_from([("square", 1), ("square", 5), ("square", 16), ("triangle", 4), ("triangle", 11)]),
    st.booleans(),
)
def test_every_task_comes_once_and_after_what_it_waits_for(grid, passes, in_memory, blocks, normalised):
    normalised = normalised and blocks[0] == "square"
    graph = graph_of(grid, passes, *blocks, in_memory=in_memory, normalised=normalised)
    done = set()
    for task in graph.tasks():
        assert task not in done
        assert set(graph.dependencies(task)) <= done
        done.add(task)
    kernel_tasks = len(superblocks(grid, *blocks))
    assert len(done) == passes * (grid.row_tiles + kernel_tasks + 1)
    assert len({task.key for task in done}) == len(done)
    tiles = [tile for task in done if task.kind == "kernel" for tile in graph.superblock(task).tiles]
    assert sorted(tiles) == sorted(list(grid.kernel_tiles()) * passes)


def test_a_kernel_task_waits_for_its_panels_and_the_generation_before():
    graph = graph_of(SampleGrid(6, 2, 2), passes=2)
    found = {task.key for task in graph.dependencies(Task("kernel", 1, 3, 0))}
    assert found == {"rows-1-3-0", "rows-1-0-0", "kernel-0-3-0"}
    assert [task.key for task in graph.dependencies(Task("kernel", 0, 1, 1))] == ["rows-0-1-0"]
    square = graph_of(SampleGrid(8, 0, 1), capacity=4, normalised=True)
    task = square.kernel_task(0, (5, 3))
    assert {d.key for d in square.dependencies(task)} == {
        *(f"rows-0-{row}-0" for row in (2, 3, 4, 5)),
        "kernel-0-2-2",
        "kernel-0-4-4",
    }


def test_memory_is_released_before_the_next_pass_derives():
    grid = SampleGrid(4, 0, 2)
    graph = graph_of(grid, passes=2, in_memory=True)
    assert Task("release", 0) in graph.dependencies(Task("rows", 1, 0))
    assert Task("release", 0) not in graph_of(grid, passes=2).dependencies(Task("rows", 1, 0))
    released = graph.dependencies(Task("release", 0))
    assert {task.key for task in released} == {"kernel-0-0-0", "kernel-0-1-0", "kernel-0-1-1"}
