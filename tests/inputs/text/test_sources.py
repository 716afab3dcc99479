import shutil

import numpy as np
import pytest
import torch

from ooc_ntk.errors import InputError
from ooc_ntk.inputs.source import SlicedSource
from ooc_ntk.inputs.text import TextSource, absolute_text, build_text_model, open_text
from ooc_ntk.inputs.text.tokens import TokenTable

LINES = ("the old cat sat on the mat .", "cat", 'that "dog ran', "the cats and the dogs ran on and on")
COLA = "".join(f"gj04\t{number % 2}\t{'*' if number % 2 else ''}\t{line}\n" for number, line in enumerate(LINES))


def table(texts, types=False, pad=0):
    offsets = np.cumsum([0, *map(len, texts)]).astype(np.int64)
    ids = np.array([token for text in texts for token in text], dtype=np.int32)
    return TokenTable(ids, offsets, (ids % 2).astype(np.uint8) if types else None, pad)


TOKENS = ([5, 6, 7], [8], [9, 5, 5, 6], [7, 7])


def test_samples_are_padded_on_the_right_to_one_length():
    source = TextSource(table(TOKENS, types=True, pad=3), torch.tensor([1, 0, 1, 0]))
    assert (source.length, source.lengths.tolist(), source.lengths.dtype) == (4, [3, 1, 4, 2], torch.int64)
    samples = source.fetch(1, 3)
    assert samples.args == ()
    assert {name: value.tolist() for name, value in samples.kwargs.items()} == {
        "input_ids": [[8, 3, 3, 3], [9, 5, 5, 6]],
        "attention_mask": [[1, 0, 0, 0], [1, 1, 1, 1]],
        "token_type_ids": [[0, 0, 0, 0], [1, 1, 1, 0]],
    }
    assert samples.targets.tolist() == [0, 1]
    assert {value.dtype for _, value in samples.named()} == {torch.int64}
    held = sum(value.numel() * value.element_size() for _, value in samples.named())
    assert source.sample_bytes * 2 == held


def test_ranges_give_the_samples_of_the_whole():
    source = TextSource(table(TOKENS), None, next_tokens=True).padded(6)
    whole = source.fetch(0, 4)
    assert whole.targets.shape == (4, 6)
    assert source.sample_bytes * 4 == sum(value.numel() * 8 for _, value in whole.named())
    for start in range(4):
        for stop in range(start + 1, 5):
            part = source.fetch(start, stop)
            for (_, value), (_, wanted) in zip(part.named(), whole.named(), strict=True):
                assert torch.equal(value, wanted[start:stop])


def test_targets_of_a_language_model_are_the_tokens_that_follow():
    samples = TextSource(table(TOKENS), torch.zeros(4), next_tokens=True, length=5).fetch(0, 4)
    none = -100
    assert samples.targets.tolist() == [
        [6, 7, none, none, none],
        [none] * 5,
        [5, 5, 6, none, none],
        [7, none, none, none, none],
    ]
    ids, mask = samples.kwargs["input_ids"], samples.kwargs["attention_mask"]
    for row in range(4):
        for place in range(5):
            follows = place + 1 < 5 and mask[row, place + 1] == 1
            assert samples.targets[row, place] == (ids[row, place + 1] if follows else none)


def test_padding_to_another_length_keeps_all_but_the_padding():
    source = TextSource(table(TOKENS), torch.tensor([0.5, 1, 2, 3]), spec="text:/a.tsv,column=0", limit=8)
    longer = source.padded(8)
    assert (longer.length, longer.spec) == (8, "text:/a.tsv,column=0,length=8")
    assert (longer.padded(5).spec, source.spec) == ("text:/a.tsv,column=0,length=5", "text:/a.tsv,column=0")
    short, long = source.fetch(0, 4), longer.fetch(0, 4)
    for name, value in long.kwargs.items():
        assert torch.equal(value[:, :4], short.kwargs[name])
        assert not value[:, 4:].any()
    assert torch.equal(short.targets, long.targets)
    with pytest.raises(InputError, match="cannot be padded to 3 tokens: its longest text, number 2, has 4"):
        source.padded(3)
    with pytest.raises(InputError, match="to be padded to 9 tokens, but the model takes 8"):
        longer.padded(9)


def test_the_digest_is_of_texts_and_targets_and_not_of_padding():
    labels = torch.tensor([1, 0, 1, 0])
    source = TextSource(table(TOKENS, types=True), labels)
    assert len(bytes.fromhex(source.digest())) == 16
    same = (source.padded(9), TextSource(table(TOKENS, types=True, pad=4), labels.clone(), spec="text:b.txt"))
    assert {other.digest() for other in same} == {source.digest()}
    joined = ([5, 6], [7, 8], [9, 5, 5, 6], [7, 7])  # the same tokens, split elsewhere
    others = (
        TextSource(table(TOKENS), labels),
        TextSource(table(TOKENS, types=True), labels.float()),
        TextSource(table(TOKENS, types=True), 1 - labels),
        TextSource(table(TOKENS, types=True), None),
        TextSource(table(TOKENS, types=True), labels, next_tokens=True),
        TextSource(table(joined, types=True), labels),
        TextSource(table(TOKENS[::-1], types=True), labels),
        TextSource(table(TOKENS[:3], types=True), labels[:3]),
    )
    digests = [other.digest() for other in (source, *others)]
    assert len(set(digests)) == len(digests)
    assert source.digest_range(0, 3) == others[-1].digest()
    assert source.digest_range(1, 3) == TextSource(table(TOKENS[1:3], types=True), labels[1:3]).digest()
    with pytest.raises(InputError, match="cannot digest samples 2 to 5 of data with 4"):
        source.digest_range(2, 5)


def test_slices_fetch_samples_of_the_length_of_the_whole():
    source = TextSource(table(TOKENS), None, spec="text:/a.txt")
    part = SlicedSource(source, 0, 2)
    assert part.fetch(0, 2).kwargs["input_ids"].shape == (2, 4)
    assert (part.sample_bytes, part.spec) == (source.sample_bytes, "text:/a.txt[0:2]")
    assert source.is_text
    assert source.mask_key in part.fetch(0, 1).kwargs


# From here on texts are tokenised.


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "in_domain_train.tsv"
    path.write_text(COLA)
    return path


def opened(text, folder=None, **options):
    given = {"base": None, "data_dir": None, "tokenizer": None if folder is None else str(folder), **options}
    return open_text(text, **given)


def test_tokens_are_those_of_the_tokenizer_text_by_text(transformers, folders, file):
    for folder, typed in ((folders.bert, True), (folders.gpt2, False)):
        source = opened(f"text:{file}", folder)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        samples = source.fetch(0, 4)
        assert list(samples.kwargs) == ["input_ids", "attention_mask", *(["token_type_ids"] if typed else [])]
        assert samples.targets.tolist() == [0, 1, 0, 1]
        for index, line in enumerate(LINES):
            wanted = tokenizer(line)["input_ids"]
            assert samples.kwargs["input_ids"][index, : len(wanted)].tolist() == wanted
            assert source.lengths[index] == len(wanted) == samples.kwargs["attention_mask"][index].sum()
        assert source.length == int(source.lengths.max())


def test_without_a_pad_token_the_end_of_text_pads(folders, file):
    samples = opened(f"text:{file}", folders.gpt2).fetch(1, 2)
    assert samples.kwargs["attention_mask"].sum() == 1
    assert samples.kwargs["input_ids"][0, 1:].tolist() == [1] * 8


def test_second_texts_have_their_own_token_type(transformers, folders, tmp_path):
    (tmp_path / "pairs.csv").write_text("sentence,other,label\nthe cat,a dog ran,1\na,mat,0\n")
    samples = opened("text:pairs.csv,pair=other", folders.bert, base=tmp_path).fetch(0, 2)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folders.bert)
    wanted = tokenizer("the cat", "a dog ran")
    assert samples.kwargs["input_ids"][0].tolist() == wanted["input_ids"]
    assert samples.kwargs["token_type_ids"].tolist() == [[0, 0, 0, 0, 1, 1, 1, 1], [0, 0, 0, 1, 1, 0, 0, 0]]


def test_batches_of_the_tokenizer_are_put_together(folders, tmp_path):
    texts = [" ".join(["cat"] * (number % 7 + 1)) for number in range(2345)]
    (tmp_path / "many.txt").write_text("\n".join(texts))
    source = opened(f"text:{tmp_path}/many.txt", folders.bert)
    assert (len(source), source.length) == (2345, 9)
    assert source.lengths.tolist() == [number % 7 + 3 for number in range(2345)]
    assert source.fetch(1999, 2001).kwargs["input_ids"].tolist() == [
        [2, 7, 7, 7, 7, 7, 3, 0, 0],
        [2, 7, 7, 7, 7, 7, 7, 3, 0],
    ]


def test_lengths_and_cuts(folders, file):
    whole = opened(f"text:{file}", folders.bert, limit=24)
    assert opened(f"text:{file},length=20", folders.bert, limit=24).length == 20
    for text, limit in (("length=6,truncate=1", 24), ("length=6,truncate=1", None), ("truncate=1", 6)):
        cut = opened(f"text:{file},{text}", folders.bert, limit=limit)
        assert cut.length == 6
        assert cut.lengths.tolist() == [min(6, count) for count in whole.lengths.tolist()]
        ids = cut.fetch(0, 4).kwargs["input_ids"]
        assert ids[:, 0].tolist() == [2] * 4
        assert ids[[0, 2, 3], 5].tolist() == [3] * 3  # a text that is cut ends with [SEP] as well
    assert opened(f"text:{file},truncate=1", folders.bert, limit=24).length == whole.length


def test_language_modelling_of_a_file(folders, file):
    source = opened(f"text:{file},next=1", folders.gpt2)
    samples = source.fetch(0, 4)
    ids = samples.kwargs["input_ids"]
    assert samples.targets[0, :7].tolist() == ids[0, 1:8].tolist()
    assert (samples.targets != -100).sum(1).tolist() == [count - 1 for count in source.lengths.tolist()]
    network = build_text_model(f"hf:{folders.gpt2}")
    loss = torch.nn.functional.cross_entropy(network(**samples.kwargs).transpose(1, 2), samples.targets)
    longer = source.padded(20).fetch(0, 4)
    again = torch.nn.functional.cross_entropy(network(**longer.kwargs).transpose(1, 2), longer.targets)
    torch.testing.assert_close(loss, again)


@pytest.mark.parametrize("place", ["cola_public/raw", "raw", "."])
def test_cola_in_the_data_folder(folders, tmp_path, place):
    names = {"train": "in_domain_train", "dev": "in_domain_dev", "test": "out_of_domain_dev"}
    (tmp_path / place).mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names.values(), 1):
        (tmp_path / place / f"{name}.tsv").write_text("".join(COLA.splitlines(keepends=True)[:number]))
    for number, (part, name) in enumerate(names.items(), 1):
        source = opened(f"cola:{part}", folders.bert, data_dir=tmp_path)
        assert len(source) == number
        assert source.fetch(0, number).targets.tolist() == [0, 1, 0][:number]
        assert source.spec == f"cola:{part},tokenizer={folders.bert}"
        assert source.digest() == opened(f"cola:{name}", folders.bert, data_dir=tmp_path).digest()
    with pytest.raises(InputError, match=r"is no in_domain_dev.tsv in .*; unpack the public release from https"):
        opened("cola:dev", folders.bert, data_dir=tmp_path / "elsewhere")


def test_equal_texts_in_other_files_have_one_digest(folders, file, tmp_path):
    (tmp_path / "other.csv").write_text(
        "label,text\n" + "".join(f'{i % 2},"{line.replace(chr(34), 2 * chr(34))}"\n' for i, line in enumerate(LINES))
    )
    first, second = (opened(f"text:{path}", folders.bert) for path in (file, tmp_path / "other.csv"))
    assert first.digest() == second.digest() == first.padded(30).digest()
    assert first.digest() != opened(f"text:{file}", folders.gpt2).digest()


def test_a_source_can_be_made_again_from_its_spec(folders, file, tmp_path, monkeypatch):
    shutil.copytree(folders.bert, tmp_path / "tok")
    first = opened("text:in_domain_train.tsv,tokenizer=tok", base=tmp_path).padded(15)
    assert first.spec == f"text:{tmp_path}/in_domain_train.tsv,tokenizer={tmp_path}/tok,length=15"
    monkeypatch.chdir("/")
    again = opened(first.spec, folders.gpt2)
    assert (again.spec, again.length, again.digest()) == (first.spec, 15, first.digest())


def test_specs_are_written_with_absolute_paths(tmp_path):
    assert absolute_text("text:a.csv , column=q,truncate", tmp_path) == f"text:{tmp_path}/a.csv,column=q,truncate=1"
    assert absolute_text("text:a.txt,tokenizer=x/y", tmp_path) == f"text:{tmp_path}/a.txt,tokenizer={tmp_path}/x/y"
    assert absolute_text("text:a.txt,tokenizer=pkg", tmp_path) == f"text:{tmp_path}/a.txt,tokenizer=pkg"
    assert absolute_text("cola:dev,length=8", tmp_path) == "cola:dev,length=8"


@pytest.mark.parametrize(
    ("text", "limit", "message"),
    [
        (
            "text:{file}",
            8,
            r"line 1 \(sample 0, 'the old cat sat on the mat \.'\) has 10 tokens, the model's limit is 8",
        ),
        (
            "text:{file},length=11",
            24,
            r"line 4 \(sample 3, 'the cats .*'\) has 13 tokens, length is 11; use truncate=1",
        ),
        ("text:{file},length=40", 24, "length=40, but the model takes 24 tokens"),
        ("text:{file},truncate=1", None, "truncate=1 needs to know where to cut"),
        ("text:{file},length=0", None, "length of .* must be from 1"),
        ("text:{file},next=1,label=1", None, "with next=1 the targets are the next tokens; leave label out"),
        ("text:{file},colunm=1", None, "did you mean 'column'"),
        ("text:{file},header=maybe", None, "must be 0 or 1, got 'maybe'"),
        ("text:{file}x", None, "is no file of texts; use .tsv"),
        ("text:", None, r"names no texts; write text:FILE"),
        ("cola:all", None, "unknown part of cola 'all'"),
        ("cola", None, "unknown part of cola ''"),
        ("cola:train", None, "needs the data folder that holds the public release"),
        ("cola:train,column=1", None, "unknown option of train data 'cola' 'column'"),
        ("text:{file},tokenizer=no/where", None, "tokenizer .*no/where' not found"),
        ("text:{file},tokenizer={roberta}", None, "no tokenizer"),
        ("text:{file},tokenizer={masked}", None, "holds no tokenizer: none of tokenizer.json, vocab.txt is there"),
        ("text:{folder}/damaged.txt,tokenizer={folder}", None, "no tokenizer can be loaded from"),
    ],
)
def test_what_cannot_be_opened_is_refused(folders, file, tmp_path, text, limit, message):
    (tmp_path / "tokenizer.json").write_text('{"version": 3}')
    (tmp_path / "damaged.txt").write_text("cat\n")
    text = text.format(file=file, folder=tmp_path, **vars(folders))
    with pytest.raises(InputError, match=message):
        opened(text, folders.bert, limit=limit)


def test_texts_without_tokens_are_refused(folders, tmp_path):
    (tmp_path / "a.txt").write_text("cat\n\n\u200b\u0301\n")
    (tmp_path / "tok").mkdir()
    shutil.copy(folders.gpt2 / "tokenizer_config.json", tmp_path / "tok")
    # A tokenizer that drops marks as some do.
    content = (folders.gpt2 / "tokenizer.json").read_text()
    normalizer = '"normalizer": {"type": "Replace", "pattern": {"Regex": "[^ -~]"}, "content": ""}'
    (tmp_path / "tok" / "tokenizer.json").write_text(content.replace('"normalizer": null', normalizer))
    with pytest.raises(InputError, match=r"a.txt, line 3 \(sample 1, .*\) has no tokens; remove the line"):
        opened(f"text:{tmp_path}/a.txt", tmp_path / "tok")


def test_without_a_tokenizer_one_is_asked_for(file):
    with pytest.raises(InputError, match="needs a tokenizer; use a model hf:FOLDER, whose tokenizer is taken"):
        opened(f"text:{file}")
