import tomllib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ooc_ntk.errors import InputError, StorageError
from ooc_ntk.inputs.job import Job
from ooc_ntk.inputs.jobfile import format_toml, read_job_file, write_job_file

FILE = """
model = "nets.py:build"      # relative to this file
weights = "../w.safetensors"
train = "data/x.npz[0:100]"
test = "digits"
outputs = "f.py:f"
kernel = "output:3"
parameters = ["layer*", "!*.bias"]
batch_size = 16

[budget]
host = "16GiB"
disk = "1TiB"
"""


def test_a_job_file_is_read_with_paths_from_its_folder(tmp_path):
    path = tmp_path / "job.toml"
    path.write_text(FILE)
    read = read_job_file(path)
    assert read.model == f"{tmp_path}/nets.py:build"
    assert read.weights == f"{tmp_path}/../w.safetensors"
    assert read.train == f"{tmp_path}/data/x.npz[0:100]"
    assert read.test == "digits"
    assert read.outputs == f"{tmp_path}/f.py:f"
    assert (read.budget.host, read.budget.device, read.budget.disk) == ("16GiB", None, "1TiB")
    arguments = read.arguments()
    assert "budget" not in arguments
    assert "scale" not in arguments
    job = Job.from_spec(arguments)
    assert (job.kernel, job.parameters, job.batch_size, job.scale) == ("output:3", ("layer*", "!*.bias"), 16, "sum")
    assert job.base == tmp_path


def test_base_moves_the_folder(tmp_path):
    path = tmp_path / "job.toml"
    path.write_text('base = "sub"\ntrain = "x.npy"\nparameters = "w*"\nmodel = "pack:net"\n')
    read = read_job_file(path)
    assert read.train == f"{tmp_path}/sub/x.npy"
    assert read.base == f"{tmp_path}/sub"
    assert read.parameters == "w*"
    assert read.model == "pack:net"
    assert read.budget is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("kernl = 'trace'", r"unknown key in /.*job.toml 'kernl'; did you mean 'kernel'"),
        ("[budget]\nhots = '1GiB'", r"unknown key of \[budget\] in .* 'hots'; did you mean 'host'"),
        ("kernel = 3", "key 'kernel': expected `str \\| null`, got `int`"),
        ("batch_size = '3'", "key 'batch_size': expected `int"),
        ("seed = 1.5", "key 'seed': expected `int"),
        ("parameters = [1]", r"key 'parameters\[0\]': expected `str`, got `int`"),
        ("budget = '3GiB'", "key 'budget': expected `object"),
        ("[budget]\nhost = 3", "key 'budget.host': expected `str"),
        ("kernel = trace", "not valid TOML: .*line 1"),
        ("seed = 1\nseed = 2\n", "not valid TOML: Cannot overwrite a value"),
        ("train = 'mnist5'", "did you mean 'mnist5k'"),
        ("model = 'net'", "unknown model 'net'; did you mean 'lenet'"),
    ],
)
def test_bad_files_are_refused_with_a_reason(tmp_path, content, message):
    (tmp_path / "job.toml").write_text(content)
    with pytest.raises(InputError, match=message):
        read_job_file(tmp_path / "job.toml")


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(InputError, match=r"there is no file /.*none.toml"):
        read_job_file(tmp_path / "none.toml")
    with pytest.raises(InputError, match="cannot be read"):
        read_job_file(tmp_path)
    (tmp_path / "latin.toml").write_bytes(b"# \xe9t\xe9\n")
    with pytest.raises(InputError, match="not UTF-8"):
        read_job_file(tmp_path / "latin.toml")


def test_a_written_job_is_read_back(tmp_path):
    job = Job(model="nets.py:build", train="digits[0:9]", parameters=["a", "!b"], seed=3, base=tmp_path)
    path = tmp_path / "job.toml"
    write_job_file(path, {**job.spec(), "budget": {"host": "1GiB", "device": None}})
    read = read_job_file(path)
    assert read.budget.host == "1GiB"
    assert Job.from_spec(read.arguments()).spec() == job.spec()
    assert [entry.name for entry in tmp_path.iterdir()] == ["job.toml"]


def test_a_live_job_is_written_and_says_what_is_missing(tmp_path):
    import torch

    job = Job(model=torch.nn.Linear(2, 1), train=torch.ones(3, 2))
    write_job_file(tmp_path / "job.toml", job.spec())
    read = read_job_file(tmp_path / "job.toml")
    assert read.model == read.train == "<live>"
    with pytest.raises(InputError, match="give the model"):
        Job.from_spec(read.arguments())


text = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
value = text | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | st.booleans()
table = st.dictionaries(text, value | st.lists(text, max_size=3), max_size=4)


@given(spec=st.dictionaries(text, value | st.lists(text, max_size=3) | table, max_size=5))
def test_toml_round_trips(spec):
    assert tomllib.loads(format_toml(spec)) == spec


def test_what_toml_cannot_hold():
    for wrong in (object(), [[1]], {"a": {"b": 1}}, b"x"):
        with pytest.raises(InputError, match="a job file cannot hold key"):
            format_toml({"key": wrong})
    with pytest.raises(InputError, match="not valid Unicode"):
        format_toml({"key": "\ud800"})


def test_a_file_that_cannot_be_written(tmp_path):
    with pytest.raises(StorageError, match="cannot write the job file"):
        write_job_file(tmp_path / "nowhere" / "job.toml", {})
