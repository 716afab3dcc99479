"""``Job``: what is wanted (model, data, kernel), checked name by name before anything is computed."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Final, cast

import torch
from torch import Tensor, nn

from ooc_ntk.errors import InputError, unknown_name
from ooc_ntk.planning.outputs import OUTPUTS, OutputSpec, is_output_name
from ooc_ntk.planning.projection import Projection
from ooc_ntk.units import ITEM_BYTES

from .callables import absolute_callable, is_callable_spec, is_import_path, load_callable
from .datasets import Collate
from .images.seeds import parse_seed_name
from .joined import JOINT, JoinedData, JoinedSource, split_joined
from .models import absolute_model, is_model_name, load_model
from .samples import SampleSource, as_source
from .specs import Reading, absolute_spec, resolve_spec

KERNELS: Final = ("trace", "pseudo", "full", "output:<c>", "embedding", "embedding:<layers>", "conjugate")
SCALES: Final = ("sum", "mean")
NORMALIZE: Final = ("cosine",)
BY: Final = ("layer",)
PRECISIONS: Final = tuple(ITEM_BYTES)

#: What stands in a job's description where a live object was given.
LIVE: Final = "<live>"

#: From the model output of one sample and its target to a scalar or a vector of outputs.
OutputFunction = Callable[[Tensor, Tensor | None], Tensor]


@dataclass(frozen=True, eq=False)
class Job:
    """What is to be computed.

    Attributes:
        model: a module; a name such as ``resnet18,classes=10`` or ``hf:FOLDER``; or a spec ``pkg.module:factory`` or
            ``file.py:factory``.
        train: data (see :func:`ooc_ntk.inputs.samples.as_source`) or a data spec such as ``cifar10:train[0:2500]``;
            several specs joined by `` + `` are one data set, and :meth:`extend` appends to it.
        test: further data whose rows follow the train rows, or None.
        kernel: ``trace``, ``pseudo``, ``full`` or ``output:<c>``; or a kernel of features: ``embedding`` (of the last
            layer), ``embedding:<layers>`` (summed over those whose names match) or ``conjugate``.
        outputs: ``logits``, ``logprob``, ``loss``, ``margin``, ``next-token`` or ``clip``; a part such as
            ``logits[0:3]``; a function of (model output of one sample, its target), or the spec of one.
        projection: None for the exact kernel; a :class:`Projection`, or text such as ``sjlt:4096``.
        normalize: None or ``cosine``.
        scale: ``sum`` over outputs, or ``mean``.
        parameters: glob patterns on parameter names, ``!pattern`` excludes; None for all. Kept as a tuple.
        precision: ``float32``, ``tf32``, ``bf16``, ``bf16x3`` or ``float64``.
        device: ``cpu``, ``cuda`` or ``cuda:<n>``; None chooses CUDA where there is one.
        batch_size: samples per batch; None lets the plan choose.
        collate: from a list of samples of a Dataset to a batch.
        weights: file with the weights; only with a model spec.
        seed: of everything random.
        allow_batch_dependence: accept a model whose outputs for one sample change with its batch mates; every sample is
            then computed alone.
        data_dir: folder that holds data sets in their original files; None is ``$OOC_NTK_DATA``.
        loader_workers: processes that decode images ahead; 0 decodes ahead in a thread.
        image_cache: folder in which decoded images are kept from pass to pass; None keeps none.
        download: whether missing files of data sets are downloaded, through torchvision.
        by: ``layer`` keeps every layer's summand of the kernel as well; None keeps the kernel alone.
        base: folder that relative paths in specs are relative to; None is the current one.

    Raises:
        InputError: for any value that is not one of these.
    """

    model: nn.Module | str
    train: object
    test: object | None = None
    kernel: str = "trace"
    outputs: str | OutputFunction = "logits"
    projection: object | None = None
    normalize: str | None = None
    scale: str = "sum"
    parameters: str | Sequence[str] | None = None
    precision: str = "float32"
    device: str | None = None
    batch_size: int | None = None
    collate: Collate | None = None
    weights: Path | str | None = None
    seed: int = 0
    allow_batch_dependence: bool = False
    by: str | None = None
    data_dir: Path | str | None = None
    loader_workers: int = 0
    image_cache: Path | str | None = None
    download: bool = False
    base: Path | None = None
    _made: dict[str, object] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "projection", _projection(self.projection))
        if self.base is not None:
            object.__setattr__(self, "base", Path(self.base).expanduser().absolute())
        seeds = parse_seed_name(self.train) if isinstance(self.train, str) and "_" in self.train else None
        if seeds is not None:
            if self.test is not None:
                raise InputError(f"train data {self.train!r} names test data as well; leave test out")
            object.__setattr__(self, "train", seeds[0])
            object.__setattr__(self, "test", seeds[1])
        for name in ("data_dir", "image_cache"):
            place = getattr(self, name)
            if place is not None and not isinstance(place, str | Path):
                raise InputError(f"{name} must be a folder, got {type(place).__name__}")
        _check_integer("loader_workers", self.loader_workers, 0, 1024)
        if not isinstance(self.download, bool):
            raise InputError(f"download must be True or False, got {self.download!r}")
        self._check_inputs()
        _check_kernel(self.kernel)
        _check_outputs(self.outputs)
        if self.normalize is not None:
            _one_of("normalize", self.normalize, NORMALIZE, "None or 'cosine'")
        _one_of("scale", self.scale, SCALES)
        if self.by is not None:
            _one_of("by", self.by, BY, "None or 'layer'")
            if self.normalize is not None or self.projection is not None:
                what = "normalize" if self.normalize is not None else "projection"
                raise InputError(
                    f"layer-wise kernels are the summands of the exact kernel as it is; leave {what} out, or by='layer'"
                )
        if self.precision in ("float16", "fp16"):
            raise InputError(f"precision {self.precision!r} loses gradients to underflow; use bf16 or float32")
        _one_of("precision", self.precision, PRECISIONS)
        object.__setattr__(self, "parameters", _patterns(self.parameters))
        object.__setattr__(self, "device", checked_device(self.device))
        if self.of_features and (self.outputs != "logits" or self.parameters is not None):
            what = "outputs" if self.outputs != "logits" else "parameters"
            raise InputError(
                f"kernel {self.kernel!r} is one of features: nothing is differentiated; leave {what} out, or use "
                "kernel='trace'"
            )
        if self.batch_size is not None:
            _check_integer("batch_size", self.batch_size, 1, 2**31 - 1)
        _check_integer("seed", self.seed, 0, 2**64 - 1)
        if not isinstance(self.allow_batch_dependence, bool):
            raise InputError(f"allow_batch_dependence must be True or False, got {self.allow_batch_dependence!r}")
        if self.allow_batch_dependence and self.batch_size not in (None, 1):
            raise InputError(
                f"allow_batch_dependence computes every sample alone, got batch_size={self.batch_size}; leave it out"
            )

    @property
    def sketch(self) -> Projection | None:
        """The projection, None for the exact kernel."""
        return cast("Projection | None", self.projection)

    @property
    def of_features(self) -> bool:
        """Whether the kernel is one of features, and of no gradients."""
        return self.kernel.partition(":")[0] in ("embedding", "conjugate")

    def _check_inputs(self) -> None:
        """Check model, weights and data as far as that is possible without loading them."""
        if isinstance(self.model, str):
            absolute_model(self.model, self.base)
        elif not isinstance(self.model, nn.Module):
            kind = f"the class {self.model.__name__}" if isinstance(self.model, type) else type(self.model).__name__
            raise InputError(
                f"model must be a torch.nn.Module, a name such as 'resnet18' or 'file.py:factory', got {kind}"
                f"{'; pass an instance of it' if isinstance(self.model, type) else ''}"
            )
        elif self.weights is not None:
            raise InputError(
                f"weights={str(self.weights)!r} are only read into a model that a spec builds, and model is a live "
                f"{type(self.model).__name__}; call model.load_state_dict(...) yourself and leave weights out"
            )
        if self.weights is not None and not isinstance(self.weights, str | Path):
            raise InputError(f"weights must be a path, got {type(self.weights).__name__}")
        if self.train is None:
            raise InputError("train data is missing; pass train=..., for example a Dataset or 'mnist5k[0:4000]'")
        for what, data in (("train", self.train), ("test", self.test)):
            if isinstance(data, str | Path):
                absolute_spec(str(data), self.base, what)
        if self.collate is not None and not callable(self.collate):
            raise InputError(f"collate must be a function from a list of samples to a batch, got {self.collate!r}")

    def module(self) -> nn.Module:
        """The model: the live module as it is, or that of the spec, in eval mode, built once.

        Raises:
            InputError: if the spec or its weights cannot be loaded.
        """
        if isinstance(self.model, nn.Module):
            return self.model
        if "model" not in self._made:
            shape = self._sample_shape() if is_model_name(self.model) else None
            self._made["model"] = load_model(self.model, weights=self.weights, base=self.base, sample_shape=shape)
        return cast("nn.Module", self._made["model"])

    def _sample_shape(self) -> tuple[int, ...] | None:
        """Shape of one train sample without the sample axis, where the model has one input."""
        first = self.train_source().fetch(0, 1)
        return tuple(first.args[0].shape[1:]) if len(first.args) == 1 and not first.kwargs else None

    def train_source(self) -> SampleSource:
        """The train samples, opened once.

        Raises:
            InputError: if the data cannot be read.
        """
        return self._source("train", self.train)

    def test_source(self) -> SampleSource | None:
        """The test samples, opened once; None if the job has none.

        Raises:
            InputError: if the data cannot be read.
        """
        return None if self.test is None else self._source("test", self.test)

    def _source(self, what: str, data: object) -> SampleSource:
        if what not in self._made:
            self._made[what] = self._opened(what, data)
            if self.test is not None and cast("SampleSource", self._made[what]).length is not None:
                self._bring_to_one_length()
        return cast("SampleSource", self._made[what])

    def _opened(self, what: str, data: object) -> SampleSource:
        if isinstance(data, JoinedData):
            return JoinedSource([self._opened(what, part) for part in data.parts], what)
        if not isinstance(data, str | Path):
            return as_source(data, collate=self.collate, what=what)
        return resolve_spec(str(data), base=self.base, what=what, collate=self.collate, reading=self._reading())

    def _bring_to_one_length(self) -> None:
        """Pad train and test texts alike, so that layers see samples of one shape."""
        sources = {}
        for what, data in (("train", self.train), ("test", self.test)):
            sources[what] = cast("SampleSource", self._made[what]) if what in self._made else self._opened(what, data)
        lengths = [source.length for source in sources.values() if source.length is not None]
        for what, source in sources.items():
            same = source.length is None or source.length == max(lengths)
            self._made[what] = source if same else source.padded(max(lengths))

    def _reading(self) -> Reading:
        """Where data sets lie and how they are read."""
        folder = Path.cwd() / (self.base or ".")
        data_dir, cache = (
            None if place is None else folder / Path(place).expanduser()
            for place in (self.data_dir or os.environ.get("OOC_NTK_DATA"), self.image_cache)
        )
        tokenizer, limit, vocabulary = None, None, None
        if isinstance(self.model, str) and self.model.partition(":")[0].strip() == "hf":
            from .text import max_tokens, tokenizer_place, vocabulary_size  # needed for texts alone

            tokenizer = tokenizer_place(self.model, self.base)
            limit, vocabulary = max_tokens(tokenizer), vocabulary_size(tokenizer)
        return Reading(data_dir, self.loader_workers, cache, self.download, tokenizer, limit, vocabulary)

    def data_digests(self) -> list[str]:
        """Digests of the train samples and of the test samples if there are any, each computed once.

        Raises:
            InputError: if the data cannot be read.
        """
        if "digests" not in self._made:
            sources = (self.train_source(), self.test_source())
            self._made["digests"] = [source.digest() for source in sources if source is not None]
        return cast("list[str]", self._made["digests"])

    def with_model(self, **changes: object) -> Job:
        """The same job with another model or other weights; data that are open stay so."""
        found = replace(self, **changes)  # type: ignore[arg-type]
        found._made.update({name: value for name, value in self._made.items() if name != "model"})
        return found

    def extend(self, train: object) -> Job:
        """The same job with more train samples after those it has; test data stay as they are.

        Args:
            train: data as ``train`` takes them: of the same inputs, shapes and dtypes, and with targets if the job's
                have some. Samples that are there already may come again.

        Returns:
            The job; data that are open stay so, and are joined at once.

        Raises:
            InputError: if there are no such data, or they do not join.
        """
        if train is None:
            raise InputError("no samples to append are given; pass train data, for example 'mnist5k[4000:5000]'")
        if isinstance(train, str) and "_" in train and parse_seed_name(train) is not None:
            raise InputError(
                f"{train!r} names test data as well, and only train samples can be appended; name the train data "
                "alone, for example 'cifar10:train[0:2500]'"
            )
        old, more = (str(data) if isinstance(data, Path) else data for data in (self.train, train))
        both = f"{old}{JOINT}{more}" if isinstance(old, str) and isinstance(more, str) else JoinedData.of(old, more)
        found = replace(self, train=both)
        found._made.update({name: made for name, made in self._made.items() if name in ("model", "outputs", "test")})
        if "train" in self._made:
            parts = cast("SampleSource", self._made["train"]), found._opened("train", more)
            found._made["train"] = JoinedSource(parts, "train")
            if "test" in found._made and cast("SampleSource", found._made["train"]).length is not None:
                found._bring_to_one_length()
        return found

    def output_function(self) -> str | OutputFunction:
        """The output function: its name as text where it has one, otherwise the function itself.

        Raises:
            InputError: if a spec does not name a function.
        """
        if not isinstance(self.outputs, str) or is_output_name(self.outputs):
            return self.outputs
        if "outputs" not in self._made:
            function = load_callable(self.outputs, self.base, "output function")
            if not callable(function):
                raise InputError(f"outputs {self.outputs!r} is a {type(function).__name__}, not a function")
            self._made["outputs"] = function
        return cast("OutputFunction", self._made["outputs"])

    @property
    def model_is_live(self) -> bool:
        """Whether the model was given as a module."""
        return isinstance(self.model, nn.Module)

    @property
    def is_live(self) -> bool:
        """Whether the job holds live objects, so that its description alone cannot make it again."""
        return LIVE in self.spec().values()

    def spec(self) -> dict[str, object]:
        """Describe the job in values that TOML has.

        Returns:
            The arguments of a job, paths absolute, ``"<live>"`` in place of live objects, None where nothing is
            asked for. ``base`` is there only if an import path needs it. :meth:`from_spec` reads it.

        Raises:
            InputError: never for a job that was built.
        """
        model = absolute_model(self.model, self.base) if isinstance(self.model, str) else LIVE
        outputs = self.outputs if isinstance(self.outputs, str) else LIVE
        if outputs != LIVE and not is_output_name(outputs):
            outputs = absolute_callable(outputs, self.base)
        folder = Path.cwd() / (self.base or ".")
        spec: dict[str, object] = {
            "model": model,
            "weights": None if self.weights is None else str(folder / Path(self.weights).expanduser()),
            "train": self._data_spec("train", self.train),
            "test": None if self.test is None else self._data_spec("test", self.test),
            "kernel": self.kernel,
            "outputs": outputs,
            "normalize": self.normalize,
            "scale": self.scale,
            "parameters": None if self.parameters is None else list(self.parameters),
            "precision": self.precision,
            "device": self.device,
            "batch_size": self.batch_size,
            "seed": self.seed,
        }
        if self.sketch is not None:
            spec["projection"] = {name: value for name, value in asdict(self.sketch).items() if value is not None}
        if self.allow_batch_dependence:
            spec["allow_batch_dependence"] = True
        if self.by is not None:
            spec["by"] = self.by
        data_dir = self.data_dir or os.environ.get("OOC_NTK_DATA")
        for name, place in (("data_dir", data_dir), ("image_cache", self.image_cache)):
            if place is not None:
                spec[name] = str(folder / Path(place).expanduser())
        if self.loader_workers:
            spec["loader_workers"] = self.loader_workers
        named = [spec[key] for key in ("train", "test", "outputs")]
        named += [] if is_model_name(model) else [model]
        parts = [part for text in named if isinstance(text, str) for part in split_joined(text)]
        if any(is_import_path(re.sub(r"\[[^\[\]]*\]$", "", part)) for part in parts):
            spec["base"] = str(folder)
        return spec

    def _data_spec(self, what: str, data: object) -> str:
        """Spec of one data set, as far as it has one; samples that pass through live code have none."""
        if self.collate is not None:
            return LIVE
        if isinstance(data, str | Path):
            return absolute_spec(str(data), self.base, what)
        if isinstance(data, JoinedData):
            specs = [self._data_spec(what, part) for part in data.parts]
            return LIVE if LIVE in specs else JOINT.join(specs)
        return (data.spec or LIVE) if isinstance(data, SampleSource) else LIVE

    @classmethod
    def from_spec(cls, spec: Mapping[str, object]) -> Job:
        """Make a job of a description.

        Args:
            spec: as :meth:`spec` returns it, or as a job file gives it.

        Returns:
            The job.

        Raises:
            InputError: for a name that is not known, a value that is wrong, something missing, or a live object,
                which has to be given again.
        """
        known = [item.name for item in fields(cls) if item.init]
        for key, value in spec.items():
            if key not in known:
                raise unknown_name("name in the job", key, known)
            if isinstance(value, str) and value == LIVE:
                raise InputError(
                    f"the job was made from live Python objects, and its {key} cannot be made again from text; "
                    f"give the {key}, for example {_example(key)}"
                )
        for key in ("model", "train"):
            if spec.get(key) is None:
                raise InputError(f"the job names no {key}; give the {key}, for example {_example(key)}")
        given = {key: value for key, value in spec.items() if value is not None}
        return cls(**given)  # type: ignore[arg-type]


def _example(key: str) -> str:
    """How to give one of the inputs on the command line."""
    return {
        "model": "--model resnet18 or --model file.py:factory",
        "train": "--train mnist5k[0:4000]",
        "test": "--test mnist5k[4000:]",
        "outputs": "--outputs file.py:function",
    }.get(key, f"{key}=...")


def _projection(given: object) -> Projection | None:
    """A projection as it may be given: itself, text, or a table of its fields."""
    if given is None or isinstance(given, Projection):
        return given
    if isinstance(given, str):
        return Projection.parse(given)
    if isinstance(given, Mapping):
        known = [item.name for item in fields(Projection)]
        for key in given:
            if key not in known:
                raise unknown_name("key of [projection]", str(key), known)
        return Projection(**given)
    raise InputError(f"projection must be text such as 'sjlt:4096' or an ooc_ntk.Projection, got {given!r}")


def _one_of(kind: str, value: object, known: Iterable[str], accepted: str | None = None) -> None:
    """Check a name."""
    names = list(known)
    if not isinstance(value, str):
        raise InputError(f"{kind} must be {accepted or 'one of ' + ', '.join(names)}, got {value!r}")
    if value not in names:
        raise unknown_name(kind, value, names)


def _check_kernel(kernel: object) -> None:
    """Check the name of a kernel."""
    if isinstance(kernel, str) and kernel.partition(":")[0] == "output":
        number = kernel.partition(":")[2]
        if not (number.isascii() and number.isdigit()):
            raise InputError(
                f"kernel {kernel!r} must name one output by a number from 0 upwards, for example 'output:3'"
            )
        return
    if isinstance(kernel, str) and kernel.startswith("embedding:"):
        if not kernel.partition(":")[2] or "<" in kernel:
            raise InputError(f"kernel {kernel!r} must name layers, for example 'embedding:layer4*' or 'embedding:*'")
        return
    if kernel == KERNELS[3]:
        raise unknown_name("kernel", str(kernel), KERNELS)
    _one_of("kernel", kernel, KERNELS)


def _check_outputs(outputs: object) -> None:
    """Check the name of an output function; a spec is only read, not loaded."""
    if callable(outputs) or (isinstance(outputs, str) and is_callable_spec(outputs)):
        return
    if not isinstance(outputs, str):
        raise InputError(f"outputs must be {', '.join(OUTPUTS)}, a function or file.py:function, got {outputs!r}")
    OutputSpec.parse(outputs)


def _check_integer(name: str, value: object, smallest: int, largest: int) -> None:
    """Check a whole number."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise InputError(f"{name} must be a whole number, got {value!r}")
    if not smallest <= value <= largest:
        raise InputError(f"{name} must be from {smallest} to {largest}, got {value}")


def _patterns(parameters: object) -> tuple[str, ...] | None:
    """Bring parameter patterns to a tuple."""
    if parameters is None:
        return None
    patterns = (parameters,) if isinstance(parameters, str) else parameters
    if not isinstance(patterns, Sequence) or not all(isinstance(pattern, str) for pattern in patterns):
        raise InputError(f"parameters must be a name pattern or a list of them, got {parameters!r}")
    if not patterns or any(pattern in ("", "!") for pattern in patterns):
        raise InputError(f"parameters {parameters!r} hold no pattern; write for example 'layer4.*', or None for all")
    return tuple(patterns)


def checked_device(device: object) -> str | None:
    """Check the name of a device, and that it is there."""
    if device is None:
        return None
    try:
        parsed = torch.device(device) if isinstance(device, str | torch.device) else None
    except RuntimeError:
        parsed = None
    if parsed is None or parsed.type not in ("cpu", "cuda") or (parsed.type == "cpu" and parsed.index):
        raise InputError(f"device must be 'cpu', 'cuda' or 'cuda:<number>', got {str(device)!r}")
    if parsed.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if count == 0:
            raise InputError(
                f"device {str(device)!r} is asked for, but torch sees no CUDA device here; use device='cpu'"
            )
        if parsed.index is not None and parsed.index >= count:
            raise InputError(
                f"device {str(device)!r} is asked for, but there are {count} CUDA devices, 0 to {count - 1}"
            )
    return str(parsed)
