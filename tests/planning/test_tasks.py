"""The task list: complete, without repeats, and each task after everything it waits for."""

from hypothesis import given
from hypothesis import strategies as st

from ooc_ntk.planning.tasks import Task, dependencies, task_list
from ooc_ntk.planning.tiles import SampleGrid


@given(
    st.builds(SampleGrid, train=st.integers(1, 30), test=st.integers(0, 12), tile=st.integers(1, 30)),
    st.integers(1, 3),
    st.booleans(),
)
def test_every_task_comes_once_and_after_what_it_waits_for(grid, passes, in_memory):
    done = set()
    for task in task_list(grid, passes):
        assert task not in done
        assert set(dependencies(task, grid, in_memory=in_memory)) <= done
        done.add(task)
    assert len(done) == passes * (grid.row_tiles + grid.kernel_tile_count + 1)
    assert len({task.key for task in done}) == len(done)


def test_a_kernel_task_waits_for_both_its_panels_and_the_generation_before():
    grid = SampleGrid(6, 2, 2)
    found = {task.key for task in dependencies(Task("kernel", 1, 3, 0), grid, in_memory=False)}
    assert found == {"rows-1-3-0", "rows-1-0-0", "kernel-0-3-0"}
    assert [task.key for task in dependencies(Task("kernel", 0, 1, 1), grid, in_memory=False)] == ["rows-0-1-0"]


def test_memory_is_released_before_the_next_pass_derives():
    grid = SampleGrid(4, 0, 2)
    assert Task("release", 0) in dependencies(Task("rows", 1, 0), grid, in_memory=True)
    assert Task("release", 0) not in dependencies(Task("rows", 1, 0), grid, in_memory=False)
    released = dependencies(Task("release", 0), grid, in_memory=True)
    assert {task.key for task in released} == {"kernel-0-0-0", "kernel-0-1-0", "kernel-0-1-1"}
