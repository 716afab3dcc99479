"""Images and networks by name through the command line, against kernels that are computed by hand from raw pixels.

The data sets are generated, in the files of the real ones.
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import ooc_ntk
from ooc_ntk.inputs.zoo.build import build_model
from tests import oracle
from tests.cases import KINKED, SMOOTH
from tests.inputs.images import real_files
from tests.named import IMAGENET, NORMALISATIONS, by_hand, command, done, files_of, refused, torchvision_fake

pytestmark = pytest.mark.usefixtures("one_thread", "frozen")

CPU = ("--device", "cpu")


# --- a study of empirical-ntks, as it is typed there ------------------------------------------------------------------


def raw_cifar10(folder, file, number):
    """Pixels (height, width, channels) of one image, straight from the pickle."""
    with (folder / "cifar-10-batches-py" / file).open("rb") as opened:
        held = pickle.load(opened, encoding="bytes")
    return held[b"data"][number].reshape(3, 32, 32).transpose(1, 2, 0)


def seed_input(pixels):
    """What empirical-ntks hands to a network: 224 × 224 pixels with ImageNet's normalisation."""
    image = np.asarray(Image.fromarray(pixels).resize((224, 224), Image.Resampling.BILINEAR), dtype=np.float64)
    return torch.from_numpy(((image / 255 - IMAGENET[0]) / IMAGENET[1]).transpose(2, 0, 1)).float()


@pytest.mark.grid
def test_a_study_of_empirical_ntks_in_one_line(memory_path):
    data, out = memory_path / "data", memory_path / "out"
    real_files.write_cifar10(data, train=15, test=6)
    shown = done("run", "CIFAR-10_0_12_0_5", "resnet-18_init", "--data-dir", data, "--out", out)
    assert "17 × 12 float32" in shown
    found = ooc_ntk.open(out)
    assert found.shape == (17, 12)
    assert (found.plan.columns, found.plan.outputs) == (11_177_025, 1)
    assert (found.plan.train_samples, found.plan.test_samples) == (12, 5)
    # Three images of each batch: the fifth train sample is the second of the second file.
    chosen = {0: ("data_batch_1", 0), 4: ("data_batch_2", 1), 14: ("test_batch", 2)}
    inputs = torch.stack([seed_input(raw_cifar10(data, *place)) for place in chosen.values()])
    rows = oracle.jacobian(build_model("resnet-18_init"), inputs)
    wanted = oracle.kernel(rows, 3)
    entries = found[:][np.ix_(list(chosen), [0, 4])]
    assert oracle.error(entries, wanted[:, :2]) <= KINKED
    assert oracle.error(found.diagonal()[list(chosen)], wanted.diagonal()) <= KINKED
    assert command("verify", out, "--samples", "1").exit_code == 0


# --- data sets --------------------------------------------------------------------------------------------------------


def write_imagefolder(folder):
    images, labels = real_files.write_imagefolder(folder / "photos", samples=8)
    return {"": (images, labels)}


def write_fashionmnist(folder):
    return real_files.write_mnist(folder, title="FashionMNIST", packed=True, seed=3)


def write_nothing(folder):
    folder.mkdir()
    made = [torchvision_fake(number, 20, classes=7) for number in range(9)]
    both = [image for image, _ in made], np.array([label for _, label in made])
    return {"train": both, "test": both}


@dataclasses.dataclass(frozen=True)
class Named:
    """One data set: how it is written and named, and what happens to its images.

    ``test`` is its test split and ``model`` a network by name; what ``write`` returns is held raw under the splits.
    """

    write: object
    name: str
    options: str
    geometry: dict
    test: str = "test"
    model: str = "mlp,width=8"


DATA_SETS = {
    "cifar10": Named(real_files.write_cifar10, "CIFAR-10", "resize=20,crop=16", {"resize": 20, "crop": 16}),
    "cifar100": Named(real_files.write_cifar100, "cifar100", "", {}, model="lenet,classes=4"),
    "svhn": Named(real_files.write_svhn, "SVHN", "resize=18", {"resize": 18}, test="extra"),
    "mnist": Named(real_files.write_mnist, "MNIST", "", {}, model="lenet,activation=tanh,pool=avg"),
    "fashionmnist": Named(write_fashionmnist, "FashionMNIST", "channels=3,resize=14", {"channels": 3, "resize": 14}),
    "fgvcaircraft": Named(real_files.write_aircraft, "FGVC-Aircraft", "resize=14x18", {"resize": (14, 18)}),
    "food101": Named(real_files.write_food101, "Food-101", "resize=18,crop=16", {"resize": 18, "crop": 16}),
    "flowers102": Named(real_files.write_flowers102, "Flowers-102", "crop=15", {"crop": 15}, test="val"),
    "imagefolder": Named(write_imagefolder, "imagefolder", "resize=24,crop=20", {"resize": 24, "crop": 20}),
    "fakedata": Named(
        write_nothing, "FakeData", "size=20,samples=9,classes=7,resize=16", {"resize": 16}, model="lenet,classes=2"
    ),
}


def spec_of(named, split, folder, first, last):
    part = folder / "photos" if named.name == "imagefolder" else split
    return f"{named.name}:{part}{',' if named.options else ''}{named.options}[{first}:{last}]"


@pytest.mark.parametrize("name", DATA_SETS)
def test_every_data_set_from_its_files_to_its_kernel(name, memory_path):
    named, data, out = DATA_SETS[name], memory_path / "data", memory_path / "out"
    written = named.write(data)
    splits = ("", "") if name == "imagefolder" else ("train", named.test)
    # Three train samples, then one or two test samples; of the folder both come from the same images.
    ranges = ((0, 3), (4, 6)) if name == "imagefolder" else ((0, 3), (0, min(2, len(written[named.test][1]))))
    specs = [spec_of(named, split, data, *part) for split, part in zip(splits, ranges, strict=True)]
    shown = done(
        "run", "--train", specs[0], "--test", specs[1], "--data-dir", data, "--model", named.model, *CPU, "--out", out
    )
    assert "complete" in shown
    images, labels = [], []
    for split, (first, last) in zip(splits, ranges, strict=True):
        raw, classes = written[split]
        images += [by_hand(raw[n], NORMALISATIONS[name], **named.geometry) for n in range(first, last)]
        labels += list(classes[first:last])
    inputs = torch.stack(images)

    job = ooc_ntk.Job(named.model, specs[0], specs[1], data_dir=data)
    handed = [source.fetch(0, len(source)) for source in (job.train_source(), job.test_source())]
    torch.testing.assert_close(torch.cat([samples.args[0] for samples in handed]), inputs, rtol=1e-6, atol=1e-6)
    assert torch.cat([samples.targets for samples in handed]).tolist() == labels

    found = ooc_ntk.open(out)
    assert found.shape == (len(inputs), 3)
    module = build_model(named.model, sample_shape=tuple(inputs.shape[1:]))
    wanted = oracle.kernel(oracle.jacobian(module, inputs), 3)
    assert oracle.error(found, wanted) <= KINKED
    assert command("verify", out, "--samples", "2").exit_code == 0


def test_labels_of_the_files_are_the_targets_of_the_loss(memory_path):
    """Or a data set with its labels in another order would go unnoticed."""
    written = real_files.write_svhn(memory_path)
    images, labels = written["train"]
    assert 0 in labels[:6]  # which SVHN writes as 10
    job = ("--train", "svhn:train[0:6]", "--data-dir", memory_path, "--model", "mlp,width=6,activation=tanh")
    done("run", *job, "--outputs", "loss", *CPU, "--out", memory_path / "out")
    inputs = torch.stack([by_hand(images[n], NORMALISATIONS["svhn"]) for n in range(6)])
    module = build_model("mlp,width=6,activation=tanh", sample_shape=(3, 32, 32))
    rows = oracle.jacobian(module, inputs, torch.from_numpy(labels[:6]), "loss")
    assert oracle.error(ooc_ntk.open(memory_path / "out"), oracle.kernel(rows, 6)) <= SMOOTH * 5


#: Names of empirical-ntks: how the files are written, and resize and crop there; ``own`` normalisation but for CIFAR.
SEEDS = {
    "CIFAR-10": (real_files.write_cifar10, 224, None),
    "CIFAR-100": (real_files.write_cifar100, 224, None),
    "SVHN": (real_files.write_svhn, 224, None),
    "MNIST": (real_files.write_mnist, 224, None),
    "FashionMNIST": (write_fashionmnist, 224, None),
    "FGVCAircraft": (real_files.write_aircraft, (224, 224), None),
    "Food-101": (real_files.write_food101, 240, 224),
    "Flowers-102": (real_files.write_flowers102, 240, 224),
    "FakeData": (None, None, None),
}


@pytest.mark.parametrize("name", SEEDS)
def test_every_name_of_empirical_ntks_runs_as_it_is_written_there(name, memory_path):
    write, resize, crop = SEEDS[name]
    out = memory_path / "out"
    if write is None:
        written = {split: [[torchvision_fake(n, 224)[0] for n in range(3)]] for split in ("train", "test")}
    else:
        written = write(memory_path / "data")
    where = () if write is None else ("--data-dir", memory_path / "data")
    done("run", f"{name}_1_3_0_1", "mlp,width=2,classes=1", *where, *CPU, "--quiet", "--out", out)
    split = "trainval" if name in ("FGVCAircraft", "Flowers-102") else "train"
    key = name.lower().replace("-", "")
    mean, deviation = IMAGENET if name.startswith("CIFAR") else NORMALISATIONS[key]
    normalisation = (mean * 3, deviation * 3) if len(mean) == 1 else (mean, deviation)
    chosen = [written[split][0][1], written[split][0][2], written["test"][0][0]]
    inputs = torch.stack([by_hand(raw, normalisation, resize=resize, crop=crop, channels=3) for raw in chosen])
    assert inputs.shape == (3, 3, 224, 224)
    wanted = oracle.kernel(oracle.jacobian(build_model("mlp,width=2,classes=1,inputs=150528"), inputs), 2)
    assert oracle.error(ooc_ntk.open(out), wanted) <= KINKED


def test_a_data_set_without_a_split_is_train_and_test(memory_path):
    real_files.write_mnist(memory_path)
    done("run", "mnist,resize=8", "mlp,width=2", "--data-dir", memory_path, *CPU, "-q", "--out", memory_path / "out")
    found = ooc_ntk.open(memory_path / "out")
    assert (found.plan.train_samples, found.plan.test_samples) == (12, 5)


def test_the_data_folder_may_be_in_the_environment(memory_path, monkeypatch):
    real_files.write_mnist(memory_path)
    monkeypatch.setenv("OOC_NTK_DATA", str(memory_path))
    done("run", "mnist:test,resize=8", "mlp,width=2", *CPU, "-q", "--out", memory_path / "out")
    monkeypatch.delenv("OOC_NTK_DATA")
    assert ooc_ntk.open(memory_path / "out").shape == (5, 5)
    assert command("verify", memory_path / "out", "--samples", "2").exit_code == 0  # the run knows the folder


# --- models -----------------------------------------------------------------------------------------------------------

FAKE = "fakedata:train,size=32,samples=3"

#: Model, parameters that are wanted (None for all) and how many there are, tolerance. Of the largest networks one early
#: layer and the head are enough: rows are exact for each layer by itself, and the whole of them would take minutes.
MODELS = [
    ("resnet18,head=1", None, 11_177_025, KINKED),
    ("resnet34,head=1", None, 21_285_185, KINKED),
    ("resnet50,head=1", "layer1.0.conv2.weight fc.*", 36_864 + 2_049, KINKED),
    ("resnet101,head=1", "layer1.1.conv2.weight fc.*", 36_864 + 2_049, KINKED),
    ("resnext101_32x8d,head=1", "layer1.0.conv2.weight fc.*", 18_432 + 2_049, KINKED),
    ("efficientnet_b7,head=1", "features.0.* classifier.*", 64 * 27 + 128 + 2_561, SMOOTH * 5),
    ("resnet18_cifar,classes=3", None, 11_170_371, KINKED),
    ("mlp,classes=3", None, 3072 * 512 + 512 + 512 * 513 + 3 * 513, KINKED),
    ("lenet,classes=3", None, 456 + 2_416 + 48_120 + 10_164 + 255, KINKED),
    ("vit_tiny,classes=3", None, 9_408 + 65 * 192 + 192 + 12 * 444_864 + 384 + 579, SMOOTH),
]

#: Those that take ten seconds and more; ``resnet18`` and ``resnet18_cifar`` have the same layers.
DEEP = {f"{name},head=1" for name in ("resnet34", "resnet50", "resnet101", "resnext101_32x8d", "efficientnet_b7")}


def fake_inputs():
    return torch.stack([torch.from_numpy(torchvision_fake(number, 32)[0]).float() / 255 for number in range(3)])


def parameter_names(module, patterns):
    """Parameters that match, by hand."""
    starts = tuple(pattern.removesuffix("*") for pattern in patterns.split())
    return [name for name, _ in module.named_parameters() if name.startswith(starts)]


@pytest.mark.parametrize(
    ("model", "patterns", "columns", "bound"),
    [pytest.param(*each, id=each[0], marks=[pytest.mark.grid] if each[0] in DEEP else []) for each in MODELS],
)
def test_every_network_runs_from_its_name_to_its_kernel(model, patterns, columns, bound, memory_path):
    out = memory_path / "out"
    chosen = () if patterns is None else [word for part in patterns.split() for word in ("--parameters", part)]
    shown = done("run", "--model", model, "--train", f"{FAKE}[0:3]", *chosen, *CPU, "--out", out)
    assert "the model was built from its spec" in shown
    found = ooc_ntk.open(out)
    assert found.shape == (3, 3)
    assert found.plan.columns == columns
    assert found.plan.outputs == (1 if "head=1" in model else 3)
    module = build_model(model, sample_shape=(3, 32, 32))
    names = None if patterns is None else parameter_names(module, patterns)
    wanted = oracle.kernel(oracle.jacobian(module, fake_inputs(), names=names), 3)
    assert oracle.error(found, wanted) <= bound
    del module
    assert command("verify", out, "--samples", "2" if patterns is None else "1").exit_code == 0


@pytest.mark.parametrize(
    "model",
    [
        "resnet-34_init",
        *(
            pytest.param(each, marks=pytest.mark.grid)
            for each in ("ResNet-34_init", "resnet34,head=1,seed=438", "ResNet-34,head=1")
        ),
    ],
)
def test_spellings_of_one_network_are_one_model(model, memory_path):
    job = ("--train", f"{FAKE}[0:2]", "--parameters", "fc.*", "--parameters", "layer1.0.conv1.*", *CPU, "-q")
    for place, spelling in (("wanted", "resnet34,head=1"), ("found", model)):
        done("run", "--model", spelling, *job, "--out", memory_path / place)
    found, wanted = (ooc_ntk.open(memory_path / place) for place in ("found", "wanted"))
    assert np.array_equal(found[:], wanted[:])


def test_weights_in_torchvisions_names_get_a_head_of_one_output(memory_path):
    state = build_model("resnet18,seed=7").state_dict()  # other values than those of seed 438, and 1,000 classes
    assert state["fc.weight"].shape == (1000, 512)
    torch.save(state, memory_path / "resnet18.pth")
    job = ("--weights", memory_path / "resnet18.pth", "--train", f"{FAKE}[0:2]", *CPU, "--quiet")
    done("run", "--model", "resnet18,head=1", *job, "--out", memory_path / "out")
    found = ooc_ntk.open(memory_path / "out")
    assert found.plan.columns == 11_177_025
    module = build_model("resnet18,head=1")
    drawn = {name: value for name, value in module.state_dict().items() if name.startswith("fc.")}
    module.load_state_dict({**state, **drawn})
    wanted = oracle.kernel(oracle.jacobian(module, fake_inputs()[:2]), 2)
    assert oracle.error(found, wanted) <= KINKED
    assert command("verify", memory_path / "out", "--samples", "1").exit_code == 0


# --- reading images ---------------------------------------------------------------------------------------------------

DATAFLOWS = {
    "resident": ("--dataflow", "resident"),
    "recompute": ("--dataflow", "recompute"),
    "spill": ("--dataflow", "spill"),
}


@pytest.fixture(scope="module")
def photos(memory_folder):
    folder = memory_folder / "photos"
    real_files.write_imagefolder(folder, samples=12)
    return folder


@pytest.mark.parametrize("dataflow", DATAFLOWS)
def test_workers_and_the_cache_change_no_bit(dataflow, photos, memory_path):
    spec = f"imagefolder:{photos},resize=18,crop=16"
    job = ("--train", f"{spec}[0:8]", "--test", f"{spec}[8:12]", "--model", "mlp,width=8", *CPU, "-q")
    job += (*DATAFLOWS[dataflow], "--batch-size", "3", "--tile-samples", "4")
    ways = {
        "plain": (),
        "workers": ("--loader-workers", "2"),
        "cache": ("--image-cache", memory_path / "kept"),
        "both": ("--loader-workers", "2", "--image-cache", memory_path / "other"),
        "again": ("--loader-workers", "2", "--image-cache", memory_path / "other"),
    }
    for name, flags in ways.items():
        done("run", *job, *flags, "--out", memory_path / name)
    assert multiprocessing.active_children() == []
    plain = ooc_ntk.open(memory_path / "plain")
    assert plain.plan.dataflow == dataflow
    for name in ways:
        found = ooc_ntk.open(memory_path / name)
        assert found.plan.dataflow == dataflow
        assert np.array_equal(found[:], plain[:])
        assert np.array_equal(found.diagonal(), plain.diagonal())
    assert command("verify", memory_path / "both", "--samples", "2").exit_code == 0


@pytest.mark.parametrize("workers", [0, 2])
def test_images_are_decoded_once_a_pass_and_never_again_with_the_cache(workers, photos, memory_path):
    def decoded(out, passes, **reading):
        """Images decoded for the plan, images decoded for the run, and its kernel."""
        reading |= {"loader_workers": workers, "batch_size": 2, "device": "cpu"}
        job = ooc_ntk.Job("mlp,width=8", f"imagefolder:{photos},resize=16x16", **reading)
        source = job.train_source()
        how = ooc_ntk.Preferences(dataflow="recompute", tile_samples=6, passes=passes)
        plan = ooc_ntk.plan(job, ooc_ntk.Budget(host="16GiB", disk="1GiB"), preferences=how)
        assert len(plan.passes) == passes
        planned = source.decoded
        kernel = ooc_ntk.run(job, memory_path / out, plan=plan, progress=False)
        return planned, source.decoded - planned, kernel[:]

    _, two, _ = decoded("two", 2)
    _, three, wanted = decoded("three", 3)
    assert three - two == 12
    assert two - 2 * 12 <= 20  # looks at the structure of a few samples before the passes, however many there are
    planned, first, found = decoded("first", 3, image_cache=memory_path / "cache")
    assert planned + first == 12
    assert np.array_equal(found, wanted)
    planned, second, found = decoded("second", 3, image_cache=memory_path / "cache")
    assert (planned, second) == (0, 0)
    assert np.array_equal(found, wanted)


def test_the_cache_does_not_confuse_sizes_or_folders(photos, memory_path):
    real_files.write_imagefolder(memory_path / "others", samples=12, seed=50)
    for number, spec in enumerate((f"{photos},resize=16x16", f"{photos},resize=12x12", "others,resize=16x16")):
        place = spec if spec.startswith("/") else f"{memory_path}/{spec}"
        job = ("--train", f"imagefolder:{place}", "--model", "mlp,width=4", *CPU, "-q")
        done("run", *job, "--out", memory_path / f"plain{number}")
        done("run", *job, "--image-cache", memory_path / "cache", "--out", memory_path / f"cached{number}")
        plain, cached = (ooc_ntk.open(memory_path / f"{way}{number}")[:] for way in ("plain", "cached"))
        assert np.array_equal(plain, cached)
    assert len([name for name in files_of(memory_path / "cache") if name.endswith(".u8")]) == 3


# --- a job file, and a run that knows its job -------------------------------------------------------------------------


def test_a_job_file_by_names_is_resumed_verified_and_shown_by_its_run_alone(memory_path, monkeypatch):
    real_files.write_cifar10(memory_path / "sets")
    (memory_path / "jobs").mkdir()
    (memory_path / "jobs" / "job.toml").write_text(
        'model = "mlp,width=5"\ntrain = "CIFAR-10:train,resize=12[0:6]"\ntest = "cifar10:test,resize=12[1:3]"\n'
        'data_dir = "../sets"\ndevice = "cpu"\nkernel = "pseudo"\n'
    )
    monkeypatch.chdir(memory_path)
    done("run", "jobs/job.toml", "--tile-samples", "3", "--out", "out")
    whole = ooc_ntk.open("out")[:]
    assert whole.shape == (8, 6)

    tile = memory_path / "out" / "kernel.zarr" / "c" / "1" / "0"
    tile.unlink()
    elsewhere = memory_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    again = done("run", "--out", memory_path / "out")
    assert "nothing to do" not in again
    assert np.array_equal(ooc_ntk.open(memory_path / "out")[:], whole)
    assert "nothing to do" in done("run", "--out", memory_path / "out")
    assert "entries recomputed in float64" in done("verify", memory_path / "out")
    assert "complete" in done("info", memory_path / "out")
    assert files_of(elsewhere) == []


def test_a_name_of_empirical_ntks_in_a_job_file_brings_its_test_data(memory_path):
    real_files.write_mnist(memory_path)
    (memory_path / "job.toml").write_text('model = "mlp,width=2"\ntrain = "MNIST_0_3_1_3"\ndata_dir = "."\n')
    done("run", memory_path / "job.toml", *CPU, "-q", "--out", memory_path / "out")
    assert ooc_ntk.open(memory_path / "out").shape == (5, 3)
    assert "nothing to do" in done("run", "--out", memory_path / "out")
    assert command("verify", memory_path / "out", "--samples", "2").exit_code == 0


def test_the_interrupted_run_of_a_study_goes_on_with_its_folder_alone(memory_path):
    """Its first tiles are there, as after a stop."""
    real_files.write_mnist(memory_path / "data")
    job = ("MNIST_0_4_0_2", "mlp,width=2", "--data-dir", memory_path / "data", "--tile-samples", "2", *CPU, "-q")
    done("run", *job, "--out", memory_path / "out")
    whole = ooc_ntk.open(memory_path / "out")[:]
    for tile in ("0/0", "2/1"):
        (memory_path / "out" / "kernel.zarr" / "c" / tile).unlink()
    done("run", "--out", memory_path / "out")
    assert np.array_equal(ooc_ntk.open(memory_path / "out")[:], whole)
    assert command("verify", memory_path / "out", "--samples", "2").exit_code == 0


# --- checkpoints ------------------------------------------------------------------------------------------------------


@pytest.fixture
def checkpoints(memory_path, monkeypatch):
    monkeypatch.chdir(memory_path)
    states = {}
    for number, name in enumerate(("a", "b", "c")):
        states[name] = build_model(f"mlp,width=4,seed={number}", sample_shape=(1, 8, 8)).state_dict()
        torch.save(states[name], f"{name}.pt")
    return states


WEIGHTS = ("--weights", "a.pt", "b.pt", "c.pt")
DIGITS = ("--model", "mlp,width=4", "--train", "digits[0:20]")


@pytest.mark.parametrize(
    "words",
    [(*DIGITS, *WEIGHTS, "--out", "OUT"), (*WEIGHTS, *DIGITS, "--out", "OUT"), (*DIGITS, "--out", "OUT", *WEIGHTS)],
    ids=["between", "first", "last"],
)
def test_several_weights_are_a_run_each_and_a_table(words, checkpoints):
    shown = done("run", *words)
    assert [f"checkpoint {n} of 3" in shown for n in (1, 2, 3)] == [True] * 3
    names = ("000-a", "001-b", "002-c")
    info = done("info", "OUT")
    for table in (shown, info):
        assert all(name in table for name in names)
    audit = done("verify", "OUT")
    assert all(name in audit for name in names)
    assert audit.count("entries recomputed in float64") == 3
    found = ooc_ntk.open_checkpoints("OUT")
    assert found.names == names
    images = ooc_ntk.Job(*DIGITS[1::2]).train_source().fetch(0, 20).args[0]
    wanted = []
    for state in checkpoints.values():
        module = build_model("mlp,width=4", sample_shape=(1, 8, 8))
        module.load_state_dict(state)
        wanted.append(oracle.kernel(oracle.jacobian(module, images), 20))
    for kernel, expected in zip(found, wanted, strict=True):
        assert oracle.error(kernel, expected) <= KINKED
    assert oracle.error(found.mean(), np.mean(wanted, axis=0)) <= KINKED
    again = command("run", *words)
    assert (again.exit_code, "000-a" in again.output) == (0, True)


def test_a_checkpoint_that_does_not_verify_exits_with_1(checkpoints):
    done("run", *DIGITS, *WEIGHTS, "-q", "--out", "OUT")
    tile = next(Path("OUT/001-b/kernel.zarr/c").rglob("0/0"))
    content = bytearray(tile.read_bytes())
    content[9] ^= 64
    tile.write_bytes(content)
    result = command("verify", "OUT", "--samples", "0")
    assert result.exit_code == 1
    assert "FAILED" in result.output


# --- what names once slipped on ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["resnet50,head=1", "resnet101,head=1"])
def test_rules_cover_every_layer_of_a_deep_residual_network(model):
    """Its activations grow from block to block, and with them the rounding between a sample alone and in a batch."""
    plan = json.loads(done("plan", "--model", model, "--train", FAKE, *CPU, "--json"))
    assert [block["name"] for block in plan["blocks"] if block["source"] != "rule"] == []


@pytest.mark.parametrize("name", ["CIFAR10_0_5_0_2", "cifar-10_0_5_0_2", "CIFAR-1O_0_5_0_2"])
def test_a_slip_in_a_name_of_empirical_ntks_gets_the_right_name_suggested(name):
    assert "did you mean 'CIFAR-10_" in refused("plan", name, "resnet-18_init", *CPU)


def test_a_projected_run_keeps_to_the_threads_that_torch_was_given(memory_path):
    """Compiled loops share OpenMP with torch, and starting them must not set its threads; they start once a process."""
    code = (
        "import torch, ooc_ntk\n"
        "torch.set_num_threads(1)\n"
        "job = ooc_ntk.Job('mlp,width=4', 'digits[0:20]', projection='sjlt:64', device='cpu')\n"
        f"kernel = ooc_ntk.run(job, {str(memory_path / 'out')!r}, progress=False)\n"
        "print(kernel.plan.threads, torch.get_num_threads())\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert ran.stdout.split() == ["1", "1"]


# --- a projection -----------------------------------------------------------------------------------------------------


def test_a_large_network_is_projected_by_name(memory_path):
    out = memory_path / "out"
    layers = ("--parameters", "layer1.*", "--parameters", "fc.*")  # an audit of all would take a minute
    job = ("--model", "resnet50,head=1", "--train", FAKE, *layers, "--projection", "sjlt:64")
    done("run", *job, *CPU, "-q", "--out", out)
    found = ooc_ntk.open(out)
    module = build_model("resnet50,head=1")
    names = parameter_names(module, "layer1.* fc.*")
    assert found.plan.columns == sum(module.get_parameter(name).numel() for name in names)
    exact = oracle.kernel(oracle.jacobian(module, fake_inputs(), names=names), 3)
    assert (np.abs(found[:] - exact) / found.errors()).max() <= 5  # standard errors
    assert command("verify", out, "--samples", "2").exit_code == 0
