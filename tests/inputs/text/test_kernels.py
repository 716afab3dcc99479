"""Kernels of text networks, from a file of texts to the finished matrix, against plain autograd."""

import numpy as np
import pytest

import ooc_ntk
from ooc_ntk.inputs.text import build_text_model, open_text
from tests import oracle
from tests.cases import SMOOTH


@pytest.mark.parametrize(
    ("family", "options"),
    [("bert", "pool=mean,normalize=1"), ("bert", "task=classification"), ("scored", ""), ("gpt2", "")],
)
def test_kernels_are_exact_and_the_same_at_any_padding(folders, compute, tmp_path, family, options):
    (tmp_path / "texts.txt").write_text("the old cat sat on the mat\ndog\na dog ran and the cats sat\nold cats\n")
    tokenizer = folders.bert if family == "bert" else folders.gpt2
    source = open_text(f"text:{tmp_path}/texts.txt", base=None, data_dir=None, tokenizer=str(tokenizer), limit=24)
    network = build_text_model(f"hf:{getattr(folders, family)}" + (f",{options}" if options else ""))
    found, longer = (
        compute(ooc_ntk.Job(model=network, train=data, device="cpu")) for data in (source, source.padded(14))
    )
    wanted = oracle.kernel(oracle.jacobian(network, source.fetch(0, 4).kwargs), 4)
    assert oracle.error(found, wanted) <= SMOOTH
    assert oracle.error(longer, wanted) <= SMOOTH
    assert {block.source for block in found.plan.blocks} == {"rule"}
    assert np.asarray(found).shape == (4, 4)
