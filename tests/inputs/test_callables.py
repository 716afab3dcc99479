import sys

import pytest

from ooc_ntk.errors import InputError
from ooc_ntk.inputs.callables import absolute_callable, call_factory, is_callable_spec, load_callable


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "sibling_of_user.py").write_text("VALUE = 7\n")
    (tmp_path / "user.py").write_text(
        "import sibling_of_user\nimport functools\n"
        "def seven():\n    return sibling_of_user.VALUE\n"
        "def late():\n    import late_sibling\n    return late_sibling.VALUE\n"
        "def stops():\n    raise SystemExit(3)\n"
        "class Box:\n    @staticmethod\n    def make():\n        return 'made'\n"
        "add = functools.partial(max, 1, 2)\n"
    )
    (tmp_path / "late_sibling.py").write_text("VALUE = 8\n")
    return tmp_path


def test_files_see_their_siblings_and_leave_the_path_alone(folder):
    before = list(sys.path)
    assert call_factory("user.py:seven", folder) == 7
    assert call_factory(f"{folder}/user.py:late") == 8
    assert call_factory("user.py:Box.make", folder) == "made"
    assert call_factory("user.py:add", folder) == 2
    assert sys.path == before
    assert not any("user." in path.name for path in folder.glob("__pycache__/*"))


def test_import_paths_see_the_base_folder(folder):
    (folder / "pack_of_user").mkdir()
    (folder / "pack_of_user" / "nets.py").write_text("def build():\n    return 'net'\n")
    assert call_factory("pack_of_user.nets:build", folder) == "net"
    assert load_callable("math:pi") == pytest.approx(3.14159, abs=1e-5)


def test_a_file_runs_once_until_it_changes(folder):
    path = folder / "once.py"
    path.write_text("value = []\n")
    first = load_callable(f"{path}:value")
    assert load_callable("once.py:value", folder) is first
    assert load_callable("./sub/../once.py:value", folder) is first
    path.write_text("value = 22\n")
    assert load_callable(f"{path}:value") == 22


@pytest.mark.parametrize(
    ("content", "message", "cause"),
    [
        ("def f(:\n", "SyntaxError", SyntaxError),
        ("raise ValueError('bad weather')", "bad.py raised ValueError: bad weather", ValueError),
        ("import no_such_thing_y", "ModuleNotFoundError: No module named 'no_such_thing_y'", ModuleNotFoundError),
        ("exit()", "raised SystemExit", SystemExit),
    ],
)
def test_errors_in_user_files_name_the_file_and_keep_their_cause(tmp_path, content, message, cause):
    (tmp_path / "bad.py").write_text(content)
    with pytest.raises(InputError, match=message) as caught:
        load_callable("bad.py:f", tmp_path, "model")
    assert isinstance(caught.value.__cause__, cause)
    assert str(tmp_path / "bad.py") in str(caught.value)
    assert not any(name.startswith("ooc_ntk_user_bad") for name in sys.modules)


def test_errors_in_modules(folder):
    (folder / "broken_of_user.py").write_text("1 / 0\n")
    (folder / "lacking_of_user.py").write_text("import no_such_thing_z\n")
    with pytest.raises(InputError, match="importing broken_of_user raised ZeroDivisionError") as caught:
        load_callable("broken_of_user:f", folder)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    with pytest.raises(InputError, match="importing lacking_of_user raised ModuleNotFoundError"):
        load_callable("lacking_of_user:f", folder)
    with pytest.raises(InputError, match="there is no module 'no_such_package'"):
        load_callable("no_such_package.nets:f", folder)


def test_errors_of_factories(folder):
    with pytest.raises(InputError, match="SystemExit"):
        call_factory("user.py:stops", folder)
    with pytest.raises(InputError, match="did you mean 'seven'"):
        call_factory("user.py:sevn", folder)
    with pytest.raises(InputError, match=r"unknown name in user\.py for model 'take'"):
        call_factory("user.py:Box.take", folder)


@pytest.mark.parametrize("text", ["", "nets", ":f", "a b:f", "nets:", "nets.py:", "a/b:f", "nets:3"])
def test_texts_that_are_no_callable_specs(text):
    assert not is_callable_spec(text)
    with pytest.raises(InputError, match=r"path/file.py:function"):
        load_callable(text)


def test_absolute_callables(tmp_path):
    assert absolute_callable("a/../nets.py:f", tmp_path) == f"{tmp_path}/nets.py:f"
    assert absolute_callable("/x/nets.py:f", tmp_path) == "/x/nets.py:f"
    assert absolute_callable("nets:f", tmp_path) == "nets:f"
