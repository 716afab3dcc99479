"""Transformer networks from text, ``hf:FOLDER_OR_PACKAGE,task=...``: loaded by transformers, never downloaded."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

import torch
from torch import Tensor, nn

from ooc_ntk.errors import InputError
from ooc_ntk.inputs.options import NamedSpec, check_keys, parse_named, whole_number
from ooc_ntk.inputs.weights import apply_weights

from .configs import Config, first_line, read_config
from .folders import WEIGHT_FILES, absolute_place, choice, find_folder, flag, has_weights, quiet_transformers
from .network import POOLS, TASKS, TextNetwork, settle_mask

_log = logging.getLogger(__name__)

_KEYS: Final = ("task", "pool", "normalize", "labels", "seed", "init")
_AUTO: Final = {
    "encoder": "AutoModel",
    "classification": "AutoModelForSequenceClassification",
    "causal": "AutoModelForCausalLM",
}
#: Names shown of a long list.
_SHOWN: Final = 5


class AutoClass(Protocol):
    """What is used of the classes of transformers that load a model of any architecture."""

    __name__: str

    def from_config(self, config: Config, **options: object) -> nn.Module:
        """Make a model with random weights."""

    def from_pretrained(self, folder: str, **options: object) -> tuple[nn.Module, dict[str, Iterable[object]]]:
        """Load a model, and report on its weights."""


@dataclass(frozen=True)
class _Choices:
    """The options of a spec: ``labels`` is None unless given, ``task`` may be ``auto``."""

    place: str
    task: str
    pool: str
    normalize: bool
    labels: int | None
    seed: int
    init: bool


def _parse(text: str) -> tuple[NamedSpec, _Choices]:
    """Take a spec apart; which options belong to which task is checked once the task is known."""
    spec = parse_named(text, "model")
    if spec.name != "hf" or not spec.part:
        raise InputError(
            f"model {text!r} names no transformer; write hf:FOLDER or hf:PACKAGE, for example hf:models/bert"
        )
    check_keys(spec, _KEYS, "model")
    labels = whole_number(spec, "labels", 2) if "labels" in dict(spec.options) else None
    return spec, _Choices(
        place=spec.part,
        task=choice(spec, "task", ("auto", *TASKS)),
        pool=choice(spec, "pool", POOLS),
        normalize=flag(spec, "normalize"),
        labels=labels,
        seed=whole_number(spec, "seed", 0, smallest=0),
        init=flag(spec, "init"),
    )


def absolute_text_model(text: str, base: Path | None = None) -> str:
    """Write a model spec so that it means the same from any folder.

    Args:
        text: the spec.
        base: folder that a relative path is relative to; None is the current one.

    Returns:
        The spec with an absolute folder; the name of a package stays as it is.

    Raises:
        InputError: if the text is no spec of a transformer, or an option is not known.
    """
    spec, chosen = _parse(text)
    return str(NamedSpec(spec.name, absolute_place(chosen.place, base), spec.options))


def tokenizer_place(text: str, base: Path | None = None) -> str:
    """Where the tokenizer of a model lies: the folder or package of its spec.

    Args:
        text: the model spec.
        base: folder that a relative path is relative to; None is the current one.

    Returns:
        An absolute path or the name of a package, for the ``tokenizer`` of ``open_text`` and for :func:`max_tokens`.

    Raises:
        InputError: if the text is no spec of a transformer.
    """
    return absolute_place(_parse(text)[1].place, base)


def build_text_model(
    text: str, *, weights: Mapping[str, Tensor] | None = None, base: Path | None = None
) -> TextNetwork:
    """Build the transformer that a spec names.

    ``hf:PATH_OR_PACKAGE[,task=auto|encoder|classification|causal][,pool=mean|cls|none][,normalize=1][,labels=2]
    [,seed=0][,init=1]``. The path is a folder with ``config.json`` and weights (safetensors or ``.bin``); a package is
    an installed one that ships such a folder. ``task=auto`` reads ``architectures`` of the configuration. An encoder's
    pooler is left out: no task but classification uses it. ``init=1`` draws all weights with the seed;
    classification without a head in the folder draws the head. Pooling that sentence-transformers keep in files of
    their own is not read.

    Args:
        text: the spec.
        weights: weights to use in place of the folder's, under the names that transformers give them, with or without
            ``model.`` (the network's own prefix) before all of them; those of a pooler that is left out are ignored.
        base: folder that a relative path is relative to; None is the current one.

    Returns:
        The network, in eval mode, float32, on the CPU; its forward takes ``input_ids``, ``attention_mask`` and
        ``token_type_ids`` by keyword and returns one tensor. Texts must be padded on the right. Attention is plain
        (``eager``) and keeps no cache. The state of torch's random generator is as it was before.

    Raises:
        InputError: if the spec cannot be read, transformers, the folder, its configuration or its weights are missing,
            the architecture cannot be loaded or does not fit the task, or the weights belong to another one.
    """
    spec, chosen = _parse(text)
    folder = find_folder(chosen.place, base)
    where = f"model {text!r}"
    with quiet_transformers() as transformers:
        config = read_config(transformers, folder)
        task, headed = _task(chosen, config, spec, where)
        config.use_cache = False
        if task == "classification":
            _set_labels(chosen, config, headed, weights is not None, where)
        if weights is None and not chosen.init and not has_weights(folder):
            raise InputError(
                f"{where}: the folder {folder} holds no weights ({', '.join(WEIGHT_FILES)}); copy them there, give "
                "weights, or use init=1 for random ones"
            )
        auto: AutoClass = getattr(transformers, _AUTO[task])
        random_state = torch.get_rng_state()
        try:
            if weights is None and not chosen.init:
                model = _load(auto, folder, config, chosen.seed, not headed and task == "classification", where)
            else:
                model = _draw(auto, config, chosen.seed, where)
        finally:
            torch.set_rng_state(random_state)
    if weights is not None:
        apply_weights(model, _plain_names(model, weights))
    model.eval()
    network = TextNetwork(model, task, chosen.pool, chosen.normalize).eval()
    settle_mask(network, where)
    _log.info("%s: %s from %s, task %s, mask %s", where, type(model).__name__, folder, task, network.mask)
    return network


def _task(chosen: _Choices, config: Config, spec: NamedSpec, where: str) -> tuple[str, bool]:
    """The task, and whether the folder's architecture has a head for classes."""
    architecture = str((getattr(config, "architectures", None) or [""])[0])
    headed = architecture.endswith("ForSequenceClassification")
    task = chosen.task
    if task == "auto":
        causal = architecture.endswith(("LMHeadModel", "ForCausalLM"))
        task = "classification" if headed else "causal" if causal else "encoder"
    given = dict(spec.options)
    for key, wanted in (("pool", "encoder"), ("normalize", "encoder"), ("labels", "classification")):
        if key in given and task != wanted:
            raise InputError(f"{where}: {key} is an option of task={wanted}, but the task is {task}; leave it out")
    if chosen.normalize and chosen.pool == "none":
        raise InputError(f"{where}: normalize=1 works on pooled states, but pool=none; use pool=mean or pool=cls")
    return task, headed


def _set_labels(chosen: _Choices, config: Config, headed: bool, replaced: bool, where: str) -> None:
    """Bring the number of classes into the configuration."""
    held = headed and not chosen.init and not replaced
    if held and chosen.labels not in (None, config.num_labels):
        raise InputError(
            f"{where}: labels={chosen.labels}, but the head in the folder has {config.num_labels}; leave labels out, "
            "or use init=1 for random weights"
        )
    if not headed or chosen.labels is not None:
        config.num_labels = 2 if chosen.labels is None else chosen.labels


def _draw(auto: AutoClass, config: Config, seed: int, where: str) -> nn.Module:
    """A model with seeded random weights."""

    def make(**options: object) -> nn.Module:
        torch.default_generator.manual_seed(seed)
        return auto.from_config(config, attn_implementation="eager", dtype=torch.float32, **options)

    return _without_pooler(make, auto, where)


def _load(auto: AutoClass, folder: Path, config: Config, seed: int, fresh: bool, where: str) -> nn.Module:
    """A model with the folder's weights; only the head may be drawn, where it is fresh."""
    report: dict[str, Iterable[object]] = {}

    def make(**options: object) -> nn.Module:
        torch.default_generator.manual_seed(seed)
        model, loaded = auto.from_pretrained(
            str(folder),
            config=config,
            attn_implementation="eager",
            dtype=torch.float32,
            local_files_only=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # reported below
            output_loading_info=True,
            **options,
        )
        report.update(loaded)
        return model

    model = _without_pooler(make, auto, where)
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    shapes = sorted(str(key[0] if isinstance(key, tuple) else key) for key in report.get("mismatched_keys", ()))
    missing = sorted(str(key) for key in report.get("missing_keys", ()))
    if fresh and prefix != ".":
        missing = [name for name in missing if name.startswith(prefix) and not name.startswith(f"{prefix}pooler.")]
        shapes = [name for name in shapes if name.startswith(prefix)]
    problems = [f"{len(names)} {kind}: {_listed(names)}" for kind, names in _named(missing, shapes) if names]
    if problems:
        raise InputError(
            f"{where}: the weights in {folder} do not belong to {type(model).__name__}, which the configuration and "
            f"the task ask for: {'; '.join(problems)}; put config.json and weights of one model there, or choose "
            "another task"
        )
    unused = sorted(str(key) for key in report.get("unexpected_keys", ()))
    if unused:
        _log.info("%s: %d tensors of the folder are not used: %s", where, len(unused), _listed(unused))
    return model


def _named(missing: list[str], shapes: list[str]) -> tuple[tuple[str, list[str]], ...]:
    """What can be wrong with weights, with its names."""
    return ("missing", missing), ("of another shape", shapes)


def _without_pooler(make: Callable[..., nn.Module], auto: AutoClass, where: str) -> nn.Module:
    """Make a model, as an encoder without its pooler where the architecture lets one choose."""
    try:
        if auto.__name__ == "AutoModel":
            try:
                return make(add_pooling_layer=False)
            except TypeError as error:
                if "add_pooling_layer" not in str(error):
                    raise
        return make()
    except Exception as error:
        raise InputError(f"{where} cannot be loaded by transformers: {first_line(error)}") from error


def _plain_names(model: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights under the names of the inner model: without the network's prefix, and without a left-out pooler."""
    own = set(model.state_dict())
    plain = dict(weights)
    if plain and all(name.startswith("model.") for name in plain):
        shorter = {name.removeprefix("model."): value for name, value in plain.items()}
        # Some architectures have a "model." of their own, so the form that fits better is taken.
        if len(own & set(shorter)) > len(own & set(plain)):
            plain = shorter
    if not any(name.startswith("pooler.") for name in own):
        dropped = [name for name in plain if name.startswith("pooler.")]
        if dropped:
            _log.info("weights of the pooler are not used: %s", _listed(dropped))
        plain = {name: value for name, value in plain.items() if name not in dropped}
    return plain


def _listed(names: list[str]) -> str:
    """Names of a list, the first few of a long one."""
    return ", ".join(names[:_SHOWN]) + (f", … (+{len(names) - _SHOWN})" if len(names) > _SHOWN else "")
