"""Wrong names, files and weights on the command line: exit code 2, what is wrong and what to do, and no run left."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest
import torch

from ooc_ntk.inputs.zoo.build import build_model
from tests.inputs.images import real_files
from tests.named import command, done, refused

pytestmark = pytest.mark.usefixtures("one_thread", "frozen")

FAKE = "fakedata:train,size=32,samples=3"
DATA = ("--data-dir", "data")
MLP = ("--model", "mlp,width=2")


@pytest.fixture(scope="module")
def sets(memory_folder):
    """Data sets in their files, a folder of images, and files of weights."""
    folder = memory_folder / "sets"
    for write in (real_files.write_cifar10, real_files.write_mnist, real_files.write_svhn, real_files.write_food101):
        write(folder / "data")
    real_files.write_imagefolder(folder / "photos")
    (folder / "texts.txt").write_text("the cat\n")
    shape = (1, 8, 8)
    states = {"a": "mlp,width=4", "b": "mlp,width=4,seed=1", "wide": "mlp,width=5", "deep": "mlp,width=4,depth=3"}
    for name, model in states.items():
        torch.save(build_model(model, sample_shape=shape).state_dict(), folder / f"{name}.pt")
    torch.save(build_model("resnet34,classes=5").state_dict(), folder / "resnet34.pt")
    torch.save(build_model("resnet18,classes=10").state_dict(), folder / "ten.pt")
    (folder / "damaged.pt").write_bytes((folder / "a.pt").read_bytes()[:900])
    return folder


@pytest.fixture
def here(sets, monkeypatch):
    monkeypatch.chdir(sets)
    monkeypatch.delenv("OOC_NTK_DATA", raising=False)
    return sets


def check(arguments, words, out):
    """Refused with one line that has the words, by ``plan`` and by ``run``, which leaves nothing behind."""
    shown = refused("run", *arguments, "--device", "cpu", "--out", out)
    assert shown.startswith("error: ")
    assert shown.strip().count("\n") == 0
    for word in words:
        assert word in shown
    assert not out.exists()
    assert refused("plan", *arguments, "--device", "cpu") == shown


CASES = {
    # --- weights
    "weights of a deeper network": (
        ("--model", "resnet18,head=1", "--train", FAKE, "--weights", "resnet34.pt"),
        [
            "122 tensors in the model, 218 in the weights",
            "96 unexpected: layer1.2.conv1.weight, layer1.2.bn1.weight",
            "fc.weight (5, 512), model has (1000, 512)",
            "use the model they were saved from",
        ],
    ),
    "weights of another family": (
        ("--model", "resnet18", "--train", FAKE, "--weights", "a.pt"),
        ["122 missing: conv1.weight, bn1.weight", "6 unexpected: fc1.weight, fc1.bias"],
    ),
    "weights with a smaller head": (
        ("--model", "resnet18,head=1", "--train", FAKE, "--weights", "ten.pt"),
        ["2 of another shape: fc.weight (10, 512), model has (1000, 512)"],
    ),
    "weights that are not there": (
        ("--model", "mlp,width=4", "--train", "digits[0:9]", "--weights", "none.pt"),
        ["weights not found", "/none.pt"],
    ),
    "damaged weights": (
        ("--model", "mlp,width=4", "--train", "digits[0:9]", "--weights", "damaged.pt"),
        ["/damaged.pt", "not a file of torch.save"],
    ),
    # --- slices
    "a slice beyond the train data": (
        ("--train", "cifar10:train[0:11]", *DATA, *MLP),
        ["train data 'cifar10:train[0:11]'", "which has 10 samples", "from 0 to 10"],
    ),
    "a slice beyond the test data": (
        ("--train", "cifar10", "--test", "cifar10:test[2:5]", *DATA, *MLP),
        ["test data", "[2:5]", "which has 4 samples"],
    ),
    "numbers beyond the train data": (
        ("CIFAR-10_0_12_0_4", "resnet-18_init", *DATA),
        ["train data", "[0:12]", "which has 10 samples"],
    ),
    "numbers beyond the test data": (
        ("CIFAR-10_0_10_0_5", "resnet-18_init", *DATA),
        ["test data", "[0:5]", "which has 4 samples"],
    ),
    "reversed numbers": (("CIFAR-10_5_2_0_4", "mlp", *DATA), ["begins at 5 and ends at 2"]),
    "too few numbers": (("CIFAR-10_0_5", "mlp", *DATA), ["'0_5'", "CIFAR-10_0_2500_0_1000"]),
    "a slice beyond an image folder": (
        ("--train", "imagefolder:photos,resize=8x8[0:9]", *MLP),
        ["/photos", "which has 7 samples"],
    ),
    "a slice beyond made-up images": (("--train", f"{FAKE}[0:4]", *MLP), ["which has 3 samples"]),
    # --- files
    "a data set that is not there": (
        ("--train", "cifar100", *DATA, *MLP),
        ["train data cifar100", "not found", "/data/cifar-100-python", "https://www.cs.toronto.edu", "--download"],
    ),
    "no data folder": (("--train", "cifar10", *MLP), ["train data cifar10", "no folder was given", "--data-dir"]),
    "no data folder for a study": (("CIFAR-10_0_5_0_2", "resnet-18_init"), ["no folder was given", "--data-dir"]),
    "a data folder that is not there": (
        ("--train", "cifar10", "--data-dir", "nowhere", *MLP),
        ["/nowhere does not exist", "https://www.cs.toronto.edu"],
    ),
    "an image folder that is not there": (("--train", "imagefolder:none", *MLP), ["there is no folder", "/none"]),
    "images of different shapes": (
        ("--train", "imagefolder:photos,resize=12", *MLP),
        ["comes out as (3, 13, 12)", "sample 0 as (3, 17, 12)", "resize=HEIGHTxWIDTH"],
    ),
    # --- names
    "an unknown data set": (("--train", "cifr10", *MLP), ["unknown data set 'cifr10'; did you mean 'cifar10'"]),
    "an unknown data set before all flags": (("cifr10", "mlp"), ["unknown data set 'cifr10'; did you mean 'cifar10'"]),
    "an unknown split": (("cifar10:trian", "mlp", *DATA), ["'trian'; did you mean 'train'"]),
    "an unknown option of data": (
        ("--train", "cifar10:train,resiz=3", *DATA, *MLP),
        ["unknown option of train data 'cifar10' 'resiz'; did you mean 'resize'"],
    ),
    "a size that is no number": (("--train", "cifar10:train,resize=big", *DATA, *MLP), ["resize", "got 'big'"]),
    "an unknown normalisation": (
        ("--train", "cifar10:train,normalize=imagnet", *DATA, *MLP),
        ["'imagnet'; did you mean 'imagenet'"],
    ),
    "an unknown model": (("--train", "digits", "--model", "resnt18"), ["'resnt18'; did you mean 'resnet18'"]),
    "an unknown model of a study": (
        ("CIFAR-10_0_5_0_2", "resnet-18_int", *DATA),
        ["unknown model 'resnet-18_int'; did you mean 'resnet-18_init'"],
    ),
    "an unknown option of a model": (
        ("cifar10", "resnet18,clases=3", *DATA),
        ["unknown option of model 'resnet18' 'clases'; did you mean 'classes'"],
    ),
    "an option of a fixed model": (
        ("cifar10", "resnet-18_init,classes=3", *DATA),
        ["takes no options", "resnet18,head=1,seed=438"],
    ),
    # --- given twice, or not at all
    "train data twice": (
        ("cifar10", "mlp,width=2", "--train", "cifar10", *DATA),
        ["train is given twice", "leave one of them out"],
    ),
    "the model twice": (("cifar10", "mlp,width=2", "--model", "mlp", *DATA), ["model is given twice", "'mlp,width=2'"]),
    "test data beside a name that has some": (
        ("--train", "CIFAR-10_0_3_0_2", "--test", "digits", *DATA, *MLP),
        ["'CIFAR-10_0_3_0_2' names test data as well", "leave test out"],
    ),
    "no model": (("cifar10", *DATA), ["names no model", "--model resnet18"]),
    # --- what does not fit
    "grey images for a network of three channels": (
        ("mnist", "resnet-18_init", *DATA),
        ["takes images of 3 channels", "(1, 28, 28)", "channels=3 to the data", "channels=1 to the model"],
    ),
    "a wrong number of channels": (
        ("cifar10", "lenet,channels=1", *DATA),
        ["channels=1", "(3, 32, 32) have channels=3", "drop the option"],
    ),
    "images that no patches cover": (
        ("mnist,resize=30", "vit_tiny", *DATA),
        ["patches of 4 × 4", "images of 30 × 30", "a divisor of 30"],
    ),
    "images that are too small": (("digits[0:9]", "lenet"), ["12 × 12 pixels at least, got 8 × 8"]),
    "colour made grey": (("--train", "cifar10:train,channels=1", *DATA, *MLP), ["in colour, 3 channels"]),
    "texts for a network of images": (
        ("--train", "text:texts.txt", "--model", "mlp"),
        ["texts.txt", "needs a tokenizer", "hf:FOLDER"],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_wrong_input_is_refused_with_what_to_do(name, here, memory_path):
    check(*CASES[name], memory_path / "out")


@pytest.mark.parametrize(
    "words", [("--loader-workers", "-1"), ("--loader-workers", "two"), ("extra",), ("--wieghts", "a.pt")]
)
def test_wrong_words_are_refused(words, here, memory_path):
    shown = refused("run", "cifar10", "mlp", *words, *DATA, "--out", memory_path / "out")
    assert words[0] in shown
    assert not (memory_path / "out").exists()


def test_a_model_beside_a_job_file_is_refused(here, memory_path):
    (memory_path / "job.toml").write_text('model = "mlp,width=2"\ntrain = "digits[0:9]"\n')
    shown = refused("run", memory_path / "job.toml", "lenet", "--out", memory_path / "out")
    assert "names its own model" in shown
    assert "--model lenet" in shown


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('data_dri = "."', ["'data_dri'; did you mean 'data_dir'"]),
        ("loader_workers = -1", ["loader_workers must be from 0"]),
        ('train = "cifar10:train,resiz=3"', ["'resiz'; did you mean 'resize'"]),
        ('model = "resnt18"', ["'resnt18'; did you mean 'resnet18'"]),
        ('test = "digits"\ntrain = "MNIST_0_3_0_2"', ["names test data as well"]),
    ],
)
def test_wrong_lines_of_a_job_file_are_refused(line, words, here, memory_path):
    lines = ['model = "mlp,width=2"', 'train = "digits[0:9]"']
    kept = [each for each in lines if not any(part.startswith(each.split(" ")[0]) for part in line.split("\n"))]
    (memory_path / "job.toml").write_text("\n".join([*kept, line]) + "\n")
    shown = refused("run", memory_path / "job.toml", "--out", memory_path / "out")
    for word in words:
        assert word in shown
    assert not (memory_path / "out").exists()


# --- damaged files ----------------------------------------------------------------------------------------------------


def damage(path, content):
    path.write_bytes(content)
    return hashlib.md5(content).hexdigest()


def test_a_cifar_file_that_is_cut_short_is_named_with_both_sums(memory_path):
    real_files.write_cifar10(memory_path)
    path = memory_path / "cifar-10-batches-py" / "data_batch_4"
    found = damage(path, path.read_bytes()[:-2000])
    shown = refused("run", "CIFAR-10_0_4_0_2", "mlp,width=2", "--data-dir", memory_path, "--out", memory_path / "out")
    for word in (str(path), found, "634d18415352ddfa80567beed471001a"):
        assert word in shown
    assert not (memory_path / "out").exists()


def test_a_digit_file_that_is_packed_and_cut_short_is_named_with_both_sums(memory_path):
    real_files.write_mnist(memory_path, packed=True)
    path = memory_path / "MNIST" / "raw" / "t10k-images-idx3-ubyte.gz"
    found = damage(path, path.read_bytes()[:-20])
    shown = refused("run", "mnist", "mlp,width=2", "--data-dir", memory_path, "--out", memory_path / "out")
    for word in (str(path), found, "9fb629c4189551a2d022fa330f9573f3"):
        assert word in shown


def test_digits_of_another_shape_are_named_with_both_shapes(memory_path):
    real_files.write_mnist(memory_path)
    path = memory_path / "MNIST" / "raw" / "train-images-idx3-ubyte"
    damage(path, real_files.idx_bytes(np.zeros((12, 28, 27), np.uint8)))
    shown = refused("run", "mnist", "mlp,width=2", "--data-dir", memory_path, "--out", memory_path / "out")
    for word in (str(path), "(28, 27)", "(28, 28)"):
        assert word in shown


def test_a_file_of_a_set_that_is_missing_is_named(memory_path):
    real_files.write_cifar10(memory_path)
    (memory_path / "cifar-10-batches-py" / "data_batch_3").unlink()
    shown = refused("run", "cifar10", "mlp,width=2", "--data-dir", memory_path, "--out", memory_path / "out")
    assert "data_batch_3" in shown
    assert "cifar-10-batches-py" in shown


@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_that_cannot_be_decoded_stops_the_run_with_its_name(workers, memory_path):
    """In the middle of the data, which planning does not look at."""
    real_files.write_imagefolder(memory_path / "photos", samples=90, size=(9, 9))
    job = ("--model", "mlp,width=2", "--train", f"imagefolder:{memory_path}/photos,resize=8x8", "--device", "cpu")
    job += ("--batch-size", "10", "--tile-samples", "30")
    path = sorted((memory_path / "photos").glob("*/*"))[80]
    whole = path.read_bytes()
    path.write_bytes(whole[:100])
    done("plan", *job)
    shown = refused("run", *job, "-q", "--loader-workers", workers, "--out", memory_path / "out")
    assert "sample 80 cannot be decoded" in shown
    assert str(path) in shown
    path.write_bytes(whole)
    again = refused("run", *job, "-q", "--out", memory_path / "out")  # a digest was taken of the damaged file
    assert "data" in again
    done("run", *job, "-q", "--out", memory_path / "new")


# --- checkpoints ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("third", "words"),
    [
        ("wide.pt", ["/wide.pt", "fc1.weight (5, 64), model has (4, 64)", "checkpoints must be of one model"]),
        ("deep.pt", ["/deep.pt", "2 unexpected: fc3.weight, fc3.bias", "checkpoints must be of one model"]),
        ("none.pt", ["weights not found", "/none.pt"]),
        ("damaged.pt", ["/damaged.pt", "not a file of torch.save"]),
    ],
)
def test_a_wrong_third_checkpoint_is_refused_before_anything_is_computed(third, words, here, memory_path):
    job = ("--model", "mlp,width=4", "--train", "digits[0:20]", "--weights", "a.pt", "b.pt", third)
    shown = refused("run", *job, "--device", "cpu", "--out", memory_path / "out")
    for word in words:
        assert word in shown
    assert not (memory_path / "out").exists()


def test_other_weights_in_the_folder_of_checkpoints_are_refused(here, memory_path):
    job = ("--model", "mlp,width=4", "--train", "digits[0:20]", "--device", "cpu", "-q", "--out", memory_path / "out")
    done("run", *job, "--weights", "a.pt", "b.pt")
    shown = refused("run", *job, "--weights", "b.pt", "a.pt")
    assert "holds other checkpoints (000-a, 001-b)" in shown
    assert command("verify", memory_path / "out").exit_code == 0


# --- texts ------------------------------------------------------------------------------------------------------------

WORDS = ("the", "cat", "sat", "ran", "and")


@pytest.fixture(scope="module")
def bert(memory_folder):
    """A configuration and a vocabulary, without weights."""
    pytest.importorskip("transformers")
    folder = memory_folder / "bert"
    folder.mkdir()
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    config = {"model_type": "bert", "vocab_size": 10, "max_position_embeddings": 12, **sizes}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "vocab.txt").write_text("\n".join(("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS)) + "\n")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    lines = ["the cat sat", "and ran", "the cat " * 6, "ran"]
    (folder / "long.txt").write_text("\n".join(lines) + "\n")
    (folder / "short.txt").write_text("\n".join(lines[:2]) + "\n")
    (folder / "table.tsv").write_text("gj04\t1\t\tthe cat\ngj04\t1\tthe cat\n")
    (folder / "classes.csv").write_text("sentence,label\nthe cat,0\nthe cat sat,yes\n")
    return folder


TEXT_CASES = {
    "a text that is too long": (
        ("--train", "text:{bert}/long.txt", "--model", "hf:{bert},init=1"),
        ["/long.txt, line 3 (sample 2, 'the cat the cat", "has 14 tokens", "limit is 12", "truncate=1"],
    ),
    "a text that is longer than asked for": (
        ("--train", "text:{bert}/short.txt,length=4", "--model", "hf:{bert},init=1"),
        ["line 1 (sample 0, 'the cat sat')", "has 5 tokens", "length is 4"],
    ),
    "a length beyond the model's": (
        ("--train", "text:{bert}/short.txt,length=13", "--model", "hf:{bert},init=1"),
        ["length=13", "12"],
    ),
    "a slice beyond the texts": (
        ("--train", "text:{bert}/short.txt[0:3]", "--model", "hf:{bert},init=1"),
        ["[0:3]", "which has 2 samples"],
    ),
    "a file that is not there": (
        ("--train", "text:{bert}/none.txt", "--model", "hf:{bert},init=1"),
        ["train data not found", "/none.txt"],
    ),
    "a line without its columns": (
        ("--train", "text:{bert}/table.tsv", "--model", "hf:{bert},init=1"),
        ["/table.tsv, line 2", "3", "4"],
    ),
    "a label that is no number": (
        ("--train", "text:{bert}/classes.csv", "--model", "hf:{bert},init=1"),
        ["/classes.csv, line 3", "'yes'"],
    ),
    "a model without weights": (
        ("--train", "text:{bert}/short.txt", "--model", "hf:{bert}"),
        ["holds no weights", "init=1"],
    ),
    "a model that is not there": (
        ("--train", "text:{bert}/short.txt", "--model", "hf:{bert}x"),
        ["/bertx", "nothing is downloaded"],
    ),
    "an unknown task": (
        ("--train", "text:{bert}/short.txt", "--model", "hf:{bert},task=clasification"),
        ["'clasification'; did you mean 'classification'"],
    ),
    "an unknown option of texts": (
        ("--train", "text:{bert}/short.txt,lenght=4", "--model", "hf:{bert},init=1"),
        ["'lenght'; did you mean 'length'"],
    ),
    "the release of CoLA nowhere": (
        ("--train", "cola:train", "--model", "hf:{bert},init=1"),
        ["cola:train", "needs the data folder", "https://nyu-mll.github.io/CoLA/"],
    ),
    "the release of CoLA in another folder": (
        ("--train", "cola:train", "--model", "hf:{bert},init=1", "--data-dir", "{bert}"),
        ["cola:train not found", "in_domain_train.tsv", "https://nyu-mll.github.io/CoLA/"],
    ),
    "images for a network of texts": (
        ("--train", "digits[0:4]", "--model", "hf:{bert},init=1"),
        ["the model failed on the first sample", "(1, 1, 8, 8)"],
    ),
}


@pytest.mark.parametrize("name", TEXT_CASES)
def test_wrong_texts_and_models_of_text_are_refused(name, bert, memory_path, monkeypatch):
    monkeypatch.delenv("OOC_NTK_DATA", raising=False)
    arguments, words = TEXT_CASES[name]
    check([word.format(bert=bert) for word in arguments], words, memory_path / "out")
