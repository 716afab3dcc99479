"""Every example of the pages in ``docs`` runs as printed, and their tables say what the code says.

The blocks of a page run one after the other in one folder, in this process: importing torch anew for each of them would
take most of the time.
"""

import os
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import ooc_ntk
from ooc_ntk.cli import app
from ooc_ntk.compute.rates import rates_path
from ooc_ntk.execution.cluster.dispatch import MOST_KILLED, SLOW_AFTER, SLOW_SECONDS, SLOW_TIMES
from ooc_ntk.execution.cluster.options import PATIENCE_SECONDS
from ooc_ntk.inputs.images.catalog import CATALOG
from ooc_ntk.inputs.images.catalog import IMAGENET as IMAGENET_PIXELS
from ooc_ntk.inputs.images.seeds import parse_seed_name
from ooc_ntk.inputs.images.spec import parse_image_spec
from ooc_ntk.inputs.zoo.build import build_model
from ooc_ntk.inputs.zoo.names import ALIASES, IMAGENET, SMALL
from ooc_ntk.planning.outputs import OUTPUTS
from tests.inputs.images.real_files import write_cifar10, write_imagefolder

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when transformers are imported

DOCS = Path(__file__).parents[1] / "docs"
PAGES = tuple(sorted(page.name for page in DOCS.glob("*.md")))

#: A block of code, with what a comment before it says of running it.
BLOCK = re.compile(r"(?:^<!-- (not run|needs): (.+?) -->\n+)?^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)

WORDS = ("the", "a", "cat", "dog", "mat", "sat", "ran", "on", "##s", "that", "old", "it", "rain", "all", "night", ".")
SENTENCES = ("The cat sat on the mat.", "A dog ran on.", "It rain all night.", "That old cat that sat ran.")


@dataclass(frozen=True)
class Block:
    """A block of code of a page: its line there, language, text, and a reason not to run it."""

    page: str
    line: int
    kind: str
    body: str
    reason: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def _blocks(page: str) -> list[Block]:
    text = (DOCS / page).read_text()
    found = []
    for match in BLOCK.finditer(text):
        mark, said, kind, body = match.groups()
        reason = said if mark == "not run" else ""
        if mark == "needs" and not hasattr(ooc_ntk, said.removeprefix("ooc_ntk.")):
            reason = f"there is no {said} yet"
        found.append(Block(page, text.count("\n", 0, match.start(3)) + 1, kind, body, reason))
    return found


BLOCKS = {page: _blocks(page) for page in PAGES}


def _save_bert(folder: Path, positions: int = 32) -> None:
    """A BERT with random weights and a tokenizer of a few words, as ``save_pretrained`` leaves them."""
    transformers = pytest.importorskip("transformers")
    folder.mkdir(parents=True)
    vocabulary = folder.parent / "vocabulary.txt"
    vocabulary.write_text("\n".join(("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS)) + "\n")
    transformers.BertTokenizerFast(vocab=str(vocabulary), model_max_length=positions).save_pretrained(folder)
    config = transformers.BertConfig(
        vocab_size=len(WORDS) + 5,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=positions,
    )
    torch.manual_seed(0)
    transformers.BertModel(config).save_pretrained(folder)
    for number in (1, 2):
        torch.manual_seed(number)
        headed = transformers.BertForSequenceClassification(config)
        torch.save(headed.state_dict(), folder.parents[1] / f"seed{number}.pt")


def _save_gpt2(folder: Path) -> None:
    """A decoder likewise; it pads with its end-of-text token."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers

    numbers = {word: number for number, word in enumerate(("<|unk|>", "<|endoftext|>", *WORDS))}
    made = Tokenizer(models.WordLevel(numbers, unk_token="<|unk|>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token="<|endoftext|>", unk_token="<|unk|>", model_max_length=32
    )
    fast.save_pretrained(folder)
    config = transformers.GPT2Config(
        vocab_size=len(numbers), n_embd=16, n_layer=1, n_head=2, n_positions=32, bos_token_id=1, eos_token_id=1
    )
    torch.manual_seed(0)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)


def _write_cola(folder: Path) -> None:
    """The public release of CoLA, four sentences a file: source, label, its author's mark, sentence."""
    folder.mkdir(parents=True)
    for name in ("in_domain_train", "in_domain_dev", "out_of_domain_dev"):
        lines = [f"gj04\t{number % 2}\t{'*' * (1 - number % 2)}\t{text}" for number, text in enumerate(SENTENCES)]
        (folder / f"{name}.tsv").write_text("\n".join(lines) + "\n")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the pages say is there: data sets, weights and models, all small and made up."""
    folder = tmp_path_factory.mktemp("docs")
    write_cifar10(folder / "datasets" / "CIFAR-10", train=30, test=10)  # where ntk.py puts it
    _write_cola(folder / "datasets" / "cola_public" / "raw")
    for split, samples in (("train", 6), ("test", 4)):
        write_imagefolder(folder / "photos" / split, samples=samples)
    weights = build_model("resnet18,seed=1").state_dict()
    torch.save(weights, folder / "resnet18-f37072fd.pth")
    _save_bert(folder / "models" / "bert")
    _save_gpt2(folder / "models" / "gpt2")
    return folder


@pytest.fixture
def page_folder(files: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None, frozen: None) -> Iterator[Path]:
    monkeypatch.chdir(files)
    shutil.rmtree(files / "runs", ignore_errors=True)  # every page begins with none: their names are the same
    cache = files / "cache"  # a page calibrates
    cache.mkdir(exist_ok=True)
    shutil.copy(rates_path("cpu"), cache)
    monkeypatch.setenv("OOC_NTK_CACHE", str(cache))
    monkeypatch.delenv("OOC_NTK_DATA", raising=False)
    monkeypatch.syspath_prepend(files)  # a page imports what it wrote, as a script in its folder does
    sys.modules.pop("nets", None)
    yield files
    sys.modules.pop("nets", None)


def _run(block: Block, folder: Path) -> None:
    """Run a block, or write the file that its first line names."""
    torch.set_num_threads(1)  # a projection by numba leaves torch with as many threads as there are cores
    named = re.match(r"# ([\w.]+\.(?:py|toml))\n", block.body)
    if named is not None:
        (folder / named.group(1)).write_text(block.body)
    elif block.kind == "python":
        exec(compile(block.body, str(block), "exec"), {"__name__": "__main__"})
    else:
        for line in block.body.splitlines():
            assert line.startswith("$ ooc-ntk "), f"{block}: {line}"
            result = CliRunner().invoke(app, shlex.split(line)[2:])
            assert result.exit_code == 0, f"{block}: {line}\n{result.output}\n{result.exception!r}"


@pytest.mark.timeout(300)
@pytest.mark.parametrize("page", PAGES)
def test_page_runs_as_printed(page: str, page_folder: Path, request: pytest.FixtureRequest) -> None:
    if page == "object-stores.md":
        request.getfixturevalue("s3")  # a local server, which the environment names
    for block in BLOCKS[page]:
        if block.kind in ("python", "console", "toml") and not block.reason:
            _run(block, page_folder)


@pytest.mark.parametrize("block", [block for blocks in BLOCKS.values() for block in blocks if block.reason], ids=str)
def test_block_is_left_out(block: Block) -> None:
    pytest.skip(block.reason)


def test_every_block_is_of_a_known_kind() -> None:
    for block in (block for blocks in BLOCKS.values() for block in blocks):
        assert block.kind in ("python", "console", "toml", "text", "math"), str(block)
        assert not (block.kind == "text" and block.reason), f"{block}: nothing runs a text block anyway"


def _table(page: str, first: str) -> dict[str, list[str]]:
    """Rows of the table whose first column has this heading, by what stands there."""
    lines = (DOCS / page).read_text().splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith(f"| {first} |"))
    rows = {}
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        # A bar inside code is written \|.
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        rows[cells[0]] = cells[1:]
    return rows


def test_numbers_of_clusters() -> None:
    text = (DOCS / "clusters.md").read_text()
    rows = _table("clusters.md", "what | what happens")
    assert f"the seconds to go on without any worker ({PATIENCE_SECONDS:.0f})" in text
    assert f"`patience` ({PATIENCE_SECONDS:.0f} s)" in rows["all workers are lost"][0]
    assert (SLOW_TIMES, SLOW_SECONDS, SLOW_AFTER) == (2.0, 3.0, 3)
    assert (
        "twice the median of its kind (once three are done), and three seconds" in rows["a worker hangs or is slow"][0]
    )
    assert MOST_KILLED == 6
    assert "a task takes six workers with it, one after the other" in rows


def test_table_of_data_sets() -> None:
    rows = _table("data-and-models.md", "data set")
    assert sorted(rows) == sorted(f"`{name}`" for name in CATALOG if name not in ("imagefolder", "fakedata"))
    for name, (splits, size, classes, folders, mean, changes) in rows.items():
        entry = CATALOG[name.strip("`")]
        assert splits == ", ".join(entry.splits), name
        side = f"{entry.channels} × {entry.side} × {entry.side}" if entry.side else "3 × any size"
        assert (size, classes) == (side, str(entry.classes)), name
        assert re.findall(r"`(.*?)`", folders)[0].rstrip("/") == (entry.folders[0] or entry.title), name
        text = "; ".join(", ".join(f"{value:.4f}" for value in values) for values in (entry.mean, entry.deviation))
        assert mean == ("ImageNet; ImageNet" if (entry.mean, entry.deviation) == IMAGENET_PIXELS else text), name
        assert changes == _changes(name.strip("`")), name


def _changes(name: str) -> str:
    entry = CATALOG[name]
    size = entry.resize if not isinstance(entry.resize, tuple) else "x".join(map(str, entry.resize))
    return ", ".join(f"`{key}={value}`" for key, value in (("resize", size), ("crop", entry.crop)) if value) or "none"


def test_table_of_names_of_empirical_ntks() -> None:
    rows = _table("migration.md", "their data set")
    for name, (train, test) in rows.items():
        assert parse_seed_name(name.strip("`")) == (train.strip("`"), test.strip("`"))
        for spec in (train, test):
            parse_image_spec(spec.strip("`"))
    assert len(rows) == 9
    models = _table("migration.md", "their model")
    assert {name.strip("`"): ours.strip("`") for name, (ours, _) in models.items()} == ALIASES


def test_table_of_models() -> None:
    rows = _table("data-and-models.md", "model")
    assert sorted(rows) == sorted(f"`{name}`" for name in (*IMAGENET, *SMALL))
    for name, (parameters, with_head, head, *_) in rows.items():
        plain = name.strip("`")
        last = IMAGENET[plain].head if plain in IMAGENET else SMALL[plain]
        assert head == f"`{last}`", name
        with torch.device("meta"):  # nothing is drawn
            model = build_model(plain)
        count, layer = sum(part.numel() for part in model.parameters()), model.get_submodule(last)
        one = count - sum(part.numel() for part in layer.parameters()) + layer.in_features + 1
        assert (parameters, with_head) == (f"{count:,}", f"{one:,}"), name


def test_table_of_outputs() -> None:
    rows = _table("data-and-models.md", "outputs")
    assert [name.strip("`") for name in rows] == list(OUTPUTS)


def test_flags_of_the_tables_exist() -> None:
    every = CliRunner().invoke(app, ["run", "--help"], env={"COLUMNS": "400"}).output
    for theirs, (ours, _) in _table("migration.md", "their flag").items():
        for flag in re.findall(r"`(--[a-z-]+)", ours):
            assert flag in every, theirs
