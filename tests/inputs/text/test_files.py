import pytest
import torch

from ooc_ntk.errors import InputError
from ooc_ntk.inputs.text.files import Columns, label_tensor, read_texts

COLA = (
    "gj04\t1\t\tOur friends won't buy this analysis, let alone the next one.\n"
    'cj99\t0\t*\tThe "more you want, the less you eat.\n'
    'clc95\t1\t\tSarah said "I\'m leaving" , and left.\r\n'
    "r-67\t0\t*\t'What' that John saw?\n"
)


def write(tmp_path, name, content, encoding="utf-8"):
    path = tmp_path / name
    path.write_bytes(content.encode(encoding))
    return path


def read(tmp_path, name, content, **columns):
    rows = read_texts(write(tmp_path, name, content), Columns(**columns))
    labels = label_tensor(rows)
    return rows.texts, rows.pairs, None if labels is None else labels.tolist()


def test_cola_has_quotes_that_quote_nothing(tmp_path):
    texts, pairs, labels = read(tmp_path, "in_domain_train.tsv", COLA)
    assert texts == [
        "Our friends won't buy this analysis, let alone the next one.",
        'The "more you want, the less you eat.',
        'Sarah said "I\'m leaving" , and left.',
        "'What' that John saw?",
    ]
    assert pairs is None
    assert labels == [1, 0, 1, 0]


@pytest.mark.parametrize(
    ("name", "content", "columns", "wanted"),
    [
        ("a.tsv", "label\tsentence\tid\n1\tone two\t7\n0\tthree\t8\n", {}, (["one two", "three"], None, [1, 0])),
        ("a.tsv", "index\tsentence\n0\tone\n1\ttwo\n", {}, (["one", "two"], None, None)),
        ("a.tsv", "q\ta\tlabel\none\ttwo\t3\n", {"text": "q", "pair": "a"}, (["one"], ["two"], [3])),
        ("a.tsv", "q\ta\nb\tc\n", {"text": "1", "header": False}, (["a", "c"], None, None)),
        ("a.tsv", "q\ta\nb\tc\n", {"text": "1", "header": True}, (["c"], None, None)),
        ("a.tsv", "a\t1\nb\t0\n", {"text": "0", "label": "1"}, (["a", "b"], None, [1, 0])),
        ("a.tsv", "sentence\tlabel\none\t1\n", {"header": False, "text": "0"}, (["sentence", "one"], None, None)),
        ("a.tsv", "only\nlines\n\n", {}, (["only", "lines"], None, None)),
        ("a.csv", 'text,label\n"a, ""b""",0.5\n"c\nd",2\n\n', {}, (['a, "b"', "c\nd"], None, [0.5, 2])),
        ("a.csv", "0,one\n1,two\n", {"text": "1", "label": "0"}, (["one", "two"], None, [0, 1])),
        ("a.csv", "\ufefftext\nfirst\n", {}, (["first"], None, None)),
        (
            "a.jsonl",
            '{"text": "a\\nb", "label": 1}\n\n{"label": true, "text": "été"}',
            {},
            (["a\nb", "été"], None, [1, 1]),
        ),
        ("a.jsonl", '{"a": "x", "b": "y", "c": 1.5}', {"text": "a", "pair": "b", "label": "c"}, (["x"], ["y"], [1.5])),
        ("a.txt", "a\tb\r\n\n \x85c\u2028d\nlast", {}, (["a\tb", " \x85c\u2028d", "last"], None, None)),
    ],
)
def test_texts_second_texts_and_labels(tmp_path, name, content, columns, wanted):
    assert read(tmp_path, name, content, **columns) == wanted


def test_labels_are_classes_only_if_all_are_whole_numbers(tmp_path):
    for values, dtype in ((("0", "-1", " 2"), torch.int64), (("0", "1.0", "2"), torch.float32)):
        path = write(tmp_path, "a.tsv", "".join(f"cat\t{value}\n" for value in values))
        labels = label_tensor(read_texts(path, Columns("0", "1")))
        assert labels.dtype == dtype
        assert labels.tolist() == [float(value) for value in values]


@pytest.mark.parametrize(
    ("name", "content", "columns", "message"),
    [
        ("a.tsv", "", {}, "a.tsv holds no texts"),
        ("a.tsv", "sentence\tlabel\n", {}, "a.tsv holds no texts"),
        ("a.csv", "\n\n", {}, "a.csv holds no texts"),
        ("a.jsonl", "\n", {}, "a.jsonl holds no texts"),
        ("a.txt", " \n", {}, "a.txt holds no texts"),
        ("a.tsv", COLA + "x\t1\tno judgement\n", {}, "line 5, has 3 columns, but line 1 has 4"),
        ("a.csv", "text,label\none,1\ntwo, three,0\n", {}, "line 3, has 3 columns, but line 1 has 2"),
        ("a.csv", 'text\n"open\n', {}, "is not CSV: unexpected end of data"),
        ("a.tsv", "a\tb\n", {}, "2 columns and no header with sentence or text; name the one"),
        ("a.csv", "a,b,c,d\n", {}, "4 columns and no header"),
        ("a.tsv", "a\tb\n", {"text": "2"}, "no column '2': it has 2 without a header, numbered from 0"),
        ("a.tsv", "a\tb\n", {"text": "0", "label": "-1"}, "unknown column of train data .*'-1'"),
        ("a.tsv", "a\tb\n1\t2\n", {"header": True}, "has the columns a, b, none named sentence or text"),
        ("a.csv", "text,label\nx,0\n", {"label": "labels"}, "unknown column of .* 'labels'; did you mean 'label'"),
        ("a.csv", "text,text\nx,y\n", {}, "names the column 'text' twice"),
        ("a.jsonl", '{"text": "x"}\n{"label": 1}\n', {}, "line 2, has no 'text'"),
        ("a.jsonl", '{"text": "x"}\n{"text": \n', {}, "line 2, is not JSON"),
        ("a.jsonl", '"text"\n', {}, "line 1, is a str, not an object"),
        ("a.jsonl", '{"text": 3}\n', {}, "line 1, has a value of type int, not a text, in column text"),
        ("a.jsonl", '{"text": "x"}\n', {"header": True}, "JSON lines, which have no header; leave header out"),
        ("a.jsonl", '{"text": "x", "label": null}\n', {}, "line 1: the label None is not a finite number"),
        ("a.tsv", "s\t1\t\tfine\ns\t0\t*\t \n", {}, "line 2, has an empty text in column 3"),
        ("a.tsv", "s\t1\t\tfine\ns\tyes\t*\tbad\n", {}, "line 2: the label 'yes' is not a finite number"),
        ("a.csv", "text,label\nx,0\n\ny,nan\n", {}, "line 4: the label 'nan' is not a finite number"),
        ("a.csv", "text,label\nx,1e39\n", {}, "line 2: the label '1e39'"),
        ("a.csv", f"text,label\nx,{2**63}\n", {}, "line 2: the label"),
        ("a.txt", "one\n", {"label": "1"}, "one text a line and no columns; leave label out"),
        ("a.md", "one\n", {}, r"no file of texts; use .tsv, .csv, .jsonl, .txt"),
    ],
)
def test_what_cannot_be_read_is_named_with_its_line(tmp_path, name, content, columns, message):
    with pytest.raises(InputError, match=message):
        read(tmp_path, name, content, **columns)


def test_other_encodings_are_refused(tmp_path):
    path = write(tmp_path, "a.txt", "plain\nété\n", "latin-1")
    with pytest.raises(InputError, match=r"a.txt, line 2, is not UTF-8 \(byte 0xe9\); convert the file"):
        read_texts(path, Columns())
    with pytest.raises(InputError, match=r"test data not found: there is no file .*b.txt"):
        read_texts(tmp_path / "b.txt", Columns(), "test")
