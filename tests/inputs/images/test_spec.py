import pytest

from ooc_ntk.errors import InputError
from ooc_ntk.inputs.images.catalog import CATALOG, find_set
from ooc_ntk.inputs.images.seeds import parse_seed_name
from ooc_ntk.inputs.images.spec import is_image_spec, parse_image_spec


@pytest.mark.parametrize("name", ["CIFAR-10", "cifar10", "Cifar_10", "CIFAR 10"])
def test_spellings_of_a_name_are_one(name):
    assert find_set(name) is CATALOG["cifar10"]
    assert str(parse_image_spec(f"{name}:TEST")) == "cifar10:test"
    assert is_image_spec(f"{name}:nonsense,x=1")


@pytest.mark.parametrize("text", ["mnist5k", "digits", "./cifar10", "cifar10.npz", "pkg.mnist:load", "", "data/svhn:x"])
def test_what_is_no_image_spec(text):
    assert not is_image_spec(text)


def test_catalogue_is_complete_and_consistent():
    assert set(CATALOG) == {
        *("cifar10", "cifar100", "svhn", "mnist", "fashionmnist", "fgvcaircraft", "food101", "flowers102"),
        *("imagefolder", "fakedata"),
    }
    for name, entry in CATALOG.items():
        assert entry.name == name
        assert len(entry.mean) == len(entry.deviation) == entry.channels
        assert all(0 <= value < 1 for value in entry.mean)
        assert all(0 < value <= 1 for value in entry.deviation)
        assert all(len(total) == 32 and int(total, 16) for total in entry.md5.values())
    sums = [total for entry in CATALOG.values() for total in entry.md5.values()]
    assert len(set(sums)) == len(sums)


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("cifar10", "cifar10:train"),
        ("cifar10:train,normalize=own,channels=3", "cifar10:train"),
        ("cifar100:test, crop=28 ,resize=30", "cifar100:test,resize=30,crop=28"),
        ("mnist:train,rgb", "mnist:train,channels=3"),
        ("mnist:train,rgb,channels=3,normalize=imagenet", "mnist:train,channels=3,normalize=imagenet"),
        ("SVHN:extra,resize=64x48", "svhn:extra,resize=64x48"),
        ("food101", "food101:train"),
        ("food101:test,resize=256,crop=224", "food101:test"),
        ("food101:test,resize=240", "food101:test,resize=240"),
        ("food101:test,crop=200", "food101:test,crop=200"),
        ("food101:test,resize=none", "food101:test,resize=none"),
        ("fgvcaircraft:trainval,resize=224x224", "fgvcaircraft:trainval"),
        ("flowers102:val", "flowers102:val"),
        ("fakedata", "fakedata:train,samples=250,size=224,classes=10"),
        ("FakeData:test,samples=3,channels=1,size=8", "fakedata:test,samples=3,size=8,classes=10,channels=1"),
    ],
)
def test_canonical_text_means_the_same(text, canonical):
    spec = parse_image_spec(text)
    assert str(spec) == canonical
    assert parse_image_spec(str(spec)) == spec


def test_defaults_of_preprocessing():
    food, plane, digit = (parse_image_spec(name) for name in ("food101", "fgvcaircraft", "mnist:train,rgb"))
    assert (food.resize, food.crop) == (256, 224)
    assert (plane.resize, plane.crop) == ((224, 224), None)
    assert food.normalisation == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert digit.normalisation == ((0.1307,) * 3, (0.3081,) * 3)
    assert parse_image_spec("cifar10:train,normalize=none").normalisation is None
    assert parse_image_spec("fakedata").normalisation is None
    assert parse_image_spec("fakedata:train,normalize=imagenet").normalisation == food.normalisation


def test_an_image_folder_is_written_with_its_absolute_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    spec = parse_image_spec("ImageFolder:photos/train,resize=64,crop=64")
    assert str(spec) == f"imagefolder:{tmp_path}/photos/train,resize=64,crop=64"
    assert parse_image_spec("imagefolder:x", base=tmp_path / "jobs").path == f"{tmp_path}/jobs/x"
    assert parse_image_spec(str(spec)) == spec


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cifar11", "unknown train image data set 'cifar11'; did you mean 'cifar1"),
        ("cifar10:valid", "unknown split of train data cifar10 'valid'; Known: test, train|unknown split"),
        ("svhn:tests", "did you mean 'test'"),
        ("cifar10:train,resise=3", "unknown option of train data 'cifar10' 'resise'; did you mean 'resize'"),
        ("cifar10:train,samples=3", "unknown option of train data 'cifar10' 'samples'"),
        ("cifar10:train,resize=big", "resize of train data 'cifar10:train,resize=big' must be a number of pixels"),
        ("cifar10:train,crop=0", "must be from 1 to 16384 pixels, got 0"),
        ("cifar10:train,resize=3x99999", "must be from 1 to 16384 pixels, got 3x99999"),
        ("cifar10:train,normalize=imagenot", "did you mean 'imagenet'"),
        ("mnist:train,normalize=imagenet", "add channels=3"),
        ("mnist:train,channels=2", "asks for 2 channels; use 1, or 3"),
        ("mnist:train,channels=4", "from 1 to 3, got 4"),
        ("mnist:train,rgb=3", "rgb .* is a flag"),
        ("mnist:train,rgb,channels=1", "asks for 1 channels"),
        ("cifar10:train,channels=1", "cifar10 is in colour, 3 channels"),
        ("imagefolder", "names no folder"),
        ("fakedata:train,samples=0", "samples .* must be from 1"),
        ("fakedata:train,size=x", "size .* must be a whole number"),
        ("cifar10:train,resize=3,resize=4", "gives resize twice"),
    ],
)
def test_bad_specs_say_what_is_wrong(text, message):
    with pytest.raises(InputError, match=message):
        parse_image_spec(text)


@pytest.mark.parametrize(
    ("name", "train", "test"),
    [
        (
            "CIFAR-10_0_2500_0_1000",
            "cifar10:train,resize=224,normalize=imagenet[0:2500]",
            "cifar10:test,resize=224,normalize=imagenet[0:1000]",
        ),
        ("CIFAR-100", "cifar100:train,resize=224,normalize=imagenet", "cifar100:test,resize=224,normalize=imagenet"),
        ("SVHN_5_7_1_2", "svhn:train,resize=224[5:7]", "svhn:test,resize=224[1:2]"),
        (
            "FashionMNIST_0_1_2_3",
            "fashionmnist:train,channels=3,resize=224[0:1]",
            "fashionmnist:test,channels=3,resize=224[2:3]",
        ),
        ("MNIST", "mnist:train,channels=3,resize=224", "mnist:test,channels=3,resize=224"),
        ("FGVCAircraft", "fgvcaircraft:trainval,resize=224x224", "fgvcaircraft:test,resize=224x224"),
        (
            "Food-101_0_10_0_20",
            "food101:train,resize=240,crop=224[0:10]",
            "food101:test,resize=240,crop=224[0:20]",
        ),
        ("Flowers-102", "flowers102:trainval,resize=240,crop=224", "flowers102:test,resize=240,crop=224"),
        ("FakeData", "fakedata:train,samples=250,size=224", "fakedata:test,samples=250,size=224"),
    ],
)
def test_seed_names_become_specs_that_parse(name, train, test):
    assert parse_seed_name(name) == (train, test)
    for text in (train, test):
        parse_image_spec(text.partition("[")[0])


def test_seed_preprocessing_is_that_of_its_loaders():
    def read(name):
        return [parse_image_spec(text) for text in parse_seed_name(name)]

    imagenet = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    for name in ("CIFAR-10", "CIFAR-100", "FGVCAircraft", "Food-101", "Flowers-102"):
        assert [spec.normalisation for spec in read(name)] == [imagenet] * 2
    assert read("SVHN")[0].normalisation == ((0.4380, 0.4440, 0.4730), (0.1751, 0.1771, 0.1744))
    assert read("FashionMNIST")[1].normalisation == ((0.2860,) * 3, (0.3530,) * 3)
    assert read("FakeData")[0].normalisation is None
    assert {(spec.resize, spec.crop, spec.channels) for spec in read("Flowers-102")} == {(240, 224, 3)}
    assert {(spec.samples, spec.size, spec.channels) for spec in read("FakeData")} == {(250, 224, 3)}


@pytest.mark.parametrize(
    "text", ["cifar10:train", "cifar10", "CIFAR-10:train", "CIFAR-10,rgb", "CIFAR-10[0:5]", "x_1_2"]
)
def test_other_texts_are_no_seed_names(text):
    assert parse_seed_name(text) is None


@pytest.mark.parametrize("text", ["CIFAR-10_0_2500", "SVHN_", "MNIST_0_a_0_1", "Food-101_0_1_0_1_2", "SVHN_-1_2_0_1"])
def test_malformed_seed_numbers_are_refused(text):
    with pytest.raises(InputError, match="expected trainbegin_trainend_testbegin_testend"):
        parse_seed_name(text)


@pytest.mark.parametrize(("text", "what"), [("SVHN_5_5_0_1", "train"), ("SVHN_0_1_9_2", "test")])
def test_reversed_seed_numbers_are_refused(text, what):
    with pytest.raises(InputError, match=f"the {what} range of '{text}' holds no sample"):
        parse_seed_name(text)
