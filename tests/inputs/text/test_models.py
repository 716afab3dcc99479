import json
import shutil
import sys

import pytest
import torch
from torch import nn

from ooc_ntk.errors import InputError
from ooc_ntk.inputs.text import absolute_text_model, build_text_model, max_tokens, tokenizer_place

LONG = 12  # tokens to which the nine of the batch are padded further


def lengthened(batch):
    return {name: nn.functional.pad(value, (0, LONG - 9), value=1 - ("mask" in name)) for name, value in batch.items()}


def alone(network, batch, index):
    """Output of one text without any padding."""
    length = int(batch["attention_mask"][index].sum())
    return network(**{name: value[index : index + 1, :length] for name, value in batch.items()})[0]


def states(transformers, folder, batch, index):
    """Token states of one text without padding, by transformers."""
    encoder = transformers.AutoModel.from_pretrained(folder).eval()
    length = int(batch["attention_mask"][index].sum())
    with torch.no_grad():
        return encoder(input_ids=batch["input_ids"][index : index + 1, :length]).last_hidden_state[0]


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "gpt2", "masked"])
def test_encoders_pool_the_token_states_of_transformers(transformers, folders, batch, family):
    folder = getattr(folders, family)
    with torch.no_grad():
        found = {
            options: build_text_model(f"hf:{folder},task=encoder,{options}")(**batch)
            for options in ("pool=mean", "pool=cls", "pool=none", "pool=mean,normalize=1", "pool=cls,normalize=1")
        }
    for index in range(4):
        wanted = states(transformers, folder, batch, index)
        mean, first = wanted.mean(0), wanted[0]
        torch.testing.assert_close(found["pool=mean"][index], mean, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(found["pool=cls"][index], first, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(found["pool=none"][index, : len(wanted)], wanted, atol=1e-6, rtol=1e-6)
        assert not found["pool=none"][index, len(wanted) :].any()
        torch.testing.assert_close(found["pool=mean,normalize=1"][index], mean / mean.norm(), atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(found["pool=cls,normalize=1"][index], first / first.norm(), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("bert", "pool=mean"),
        ("bert", "pool=mean,normalize=1"),
        ("bert", "pool=cls"),
        ("bert", "pool=none"),
        ("bert", "task=classification"),
        ("headed", "task=auto"),
        ("roberta", "pool=mean"),
        ("distilbert", "pool=mean"),
        ("gpt2", "task=encoder"),
        ("gpt2", "task=causal"),
        ("scored", "task=classification"),
    ],
)
def test_outputs_and_gradients_depend_neither_on_padding_nor_on_batch_mates(folders, batch, family, options):
    network = build_text_model(f"hf:{getattr(folders, family)},{options}")
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.float64, 1e-12)):
        network.to(dtype)
        outputs, longer = network(**batch), network(**lengthened(batch))
        assert outputs.dtype == dtype
        scale = float(outputs.detach().abs().max())
        for index in range(4):
            single = alone(network, batch, index)
            for found in (outputs[index], longer[index]):
                kept = found[: len(single)] if single.ndim == 2 else found
                assert float((kept - single).detach().abs().max()) <= tolerance * scale
                if single.ndim == 2:
                    assert not found[len(single) :].any()
            parameters = list(network.parameters())
            first, second = (
                torch.autograd.grad(value.sum(), parameters, retain_graph=True, allow_unused=True)
                for value in (longer[index], single)
            )
            for padded, plain in zip(first, second, strict=True):
                assert (padded is None) == (plain is None)
                if plain is not None:
                    size = max(1.0, float(plain.abs().max()))
                    assert float((padded - plain).abs().max()) <= 20 * tolerance * size


@pytest.mark.parametrize(
    ("family", "task", "mask", "shape"),
    [
        ("bert", "encoder", "full", (4, 8)),
        ("masked", "encoder", "full", (4, 8)),
        ("headed", "classification", "full", (4, 3)),
        ("gpt2", "causal", "causal", (4, 9, 20)),
        ("scored", "classification", "causal", (4, 3)),
    ],
)
def test_the_task_is_read_from_the_architecture(folders, batch, family, task, mask, shape):
    network = build_text_model(f"hf:{getattr(folders, family)}")
    assert (network.task, network.mask) == (task, mask)
    assert network(**batch).shape == shape
    assert not any(module.training for module in network.modules())
    assert {value.dtype for value in network.parameters()} == {torch.float32}
    assert network.model.config._attn_implementation == "eager"
    assert network.model.config.use_cache is False


@pytest.mark.parametrize("family", ["headed", "scored"])
def test_classes_are_those_of_transformers(transformers, folders, batch, family):
    folder = getattr(folders, family)
    wanted = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    found = build_text_model(f"hf:{folder}")(**batch)
    for index in range(4):
        length = int(batch["attention_mask"][index].sum())
        logits = wanted(input_ids=batch["input_ids"][index : index + 1, :length]).logits[0]
        torch.testing.assert_close(found[index], logits, atol=1e-6, rtol=1e-6)


def test_causal_logits_are_those_of_transformers(transformers, folders, batch):
    wanted = transformers.AutoModelForCausalLM.from_pretrained(folders.gpt2).eval()
    found = build_text_model(f"hf:{folders.gpt2}")(**batch)
    for index in range(4):
        length = int(batch["attention_mask"][index].sum())
        logits = wanted(input_ids=batch["input_ids"][index : index + 1, :length]).logits[0]
        torch.testing.assert_close(found[index, :length], logits, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "gpt2", "headed", "scored"])
def test_vmap_sees_through_the_network(folders, batch, family):
    network = build_text_model(f"hf:{getattr(folders, family)}")

    def one(ids, mask):
        return network(input_ids=ids[None], attention_mask=mask[None])[0]

    found = torch.func.vmap(one)(batch["input_ids"], batch["attention_mask"])
    torch.testing.assert_close(found, network(**batch), atol=1e-6, rtol=1e-5)


def test_token_types_reach_the_model(transformers, folders, batch):
    network = build_text_model(f"hf:{folders.bert}")
    types = (torch.arange(9) > 1).long().expand(4, 9)
    encoder = transformers.AutoModel.from_pretrained(folders.bert).eval()
    wanted = encoder(input_ids=batch["input_ids"][1:2, :7], token_type_ids=types[1:2, :7]).last_hidden_state
    found = network(**batch, token_type_ids=types)
    torch.testing.assert_close(found[1], wanted[0].mean(0), atol=1e-6, rtol=1e-6)
    assert not torch.allclose(found, network(**batch), atol=1e-2)
    with pytest.raises(InputError, match="DistilBertModel takes none"):
        build_text_model(f"hf:{folders.distilbert}")(**batch, token_type_ids=types)


@pytest.mark.parametrize("options", ["init=1", "init=1,task=classification", "task=classification"])
def test_what_is_drawn_depends_on_the_seed_and_leaves_the_generator_alone(folders, options):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first, again, other = (build_text_model(f"hf:{folders.bert},{options},seed={seed}") for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in first.state_dict().items())
    stored = build_text_model(f"hf:{folders.bert}").state_dict()
    name = "model.classifier.weight" if "classification" in options else "model.embeddings.word_embeddings.weight"
    assert not torch.equal(first.state_dict()[name], other.state_dict()[name])
    inner = "bert." if "classification" in options else ""
    kept = [
        torch.equal(first.state_dict()[key.replace("model.", f"model.{inner}", 1)], value)
        for key, value in stored.items()
        if key.endswith("query.weight")
    ]
    assert kept == [("init" not in options)] * 2


def test_a_fresh_head_has_the_classes_asked_for(folders, batch):
    assert build_text_model(f"hf:{folders.bert},task=classification,labels=5")(**batch).shape == (4, 5)
    assert build_text_model(f"hf:{folders.gpt2},task=classification,labels=5")(**batch).shape == (4, 5)
    assert build_text_model(f"hf:{folders.headed},init=1,labels=5")(**batch).shape == (4, 5)
    assert build_text_model(f"hf:{folders.headed},labels=3")(**batch).shape == (4, 3)


def test_weights_in_half_precision_and_in_torch_files_are_read(transformers, folders, batch, tmp_path):
    shutil.copytree(folders.bert, tmp_path / "net")
    (tmp_path / "net" / "model.safetensors").unlink()
    stored = transformers.AutoModel.from_pretrained(folders.bert).state_dict()
    halves = {name: value.half() for name, value in stored.items()}
    torch.save(halves, tmp_path / "net" / "pytorch_model.bin")
    config = json.loads((folders.bert / "config.json").read_text())
    (tmp_path / "net" / "config.json").write_text(json.dumps({**config, "dtype": "float16"}))
    network = build_text_model("hf:net", base=tmp_path)
    own = network.model.state_dict()
    assert own["embeddings.word_embeddings.weight"].dtype == torch.float32
    assert all(torch.equal(value, halves[name].float()) for name, value in own.items())


@pytest.mark.parametrize(("family", "prefix"), [("bert", ""), ("bert", "model."), ("gpt2", ""), ("gpt2", "model.")])
def test_weights_by_the_names_of_transformers(transformers, folders, batch, tmp_path, family, prefix):
    """The folder's own weights may be missing then; the pooler and tied names may be there."""
    other = build_text_model(f"hf:{getattr(folders, family)},init=1,seed=7")
    shutil.copy(getattr(folders, family) / "config.json", tmp_path)
    weights = {f"{prefix}{name}": value for name, value in other.model.state_dict().items()}
    if family == "bert":
        weights[f"{prefix}pooler.dense.weight"] = torch.zeros(8, 8)
        weights[f"{prefix}pooler.dense.bias"] = torch.zeros(8)
    found = build_text_model(f"hf:{tmp_path}", weights=weights)
    assert torch.equal(found(**batch), other(**batch))
    assert not torch.equal(found(**batch), build_text_model(f"hf:{getattr(folders, family)}")(**batch))


@pytest.mark.parametrize("tied", [False, True])
def test_weights_of_a_model_that_has_a_prefix_model_of_its_own(transformers, batch, tmp_path, tied):
    """Without the head, which a file leaves out where it is tied, all names start with it."""
    config = transformers.LlamaConfig(
        vocab_size=20, num_hidden_layers=1, hidden_size=8, num_attention_heads=2, intermediate_size=16
    )
    config.tie_word_embeddings = tied
    torch.manual_seed(2)
    llama = transformers.LlamaForCausalLM(config).eval()
    llama.save_pretrained(tmp_path)
    wanted = build_text_model(f"hf:{tmp_path}")
    for state in (llama.state_dict(), wanted.state_dict()):
        weights = {name: value for name, value in state.items() if not (tied and "lm_head" in name)}
        found = build_text_model(f"hf:{tmp_path}", weights=weights)
        assert torch.equal(found(**batch), wanted(**batch))


def test_layers_that_see_a_window_of_tokens_keep_it(transformers, tmp_path):
    """One mask for all layers would let every layer see every earlier token."""
    config = transformers.MistralConfig(
        vocab_size=20,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=16,
        sliding_window=4,
        initializer_range=0.4,
    )
    torch.manual_seed(2)
    transformers.MistralForCausalLM(config).save_pretrained(tmp_path)
    network = build_text_model(f"hf:{tmp_path}")
    ids = torch.arange(5, 17)[None]
    changed = torch.cat([torch.tensor([[19]]), ids[:, 1:]], 1)
    first, second = (network(tokens, torch.ones_like(ids)) for tokens in (ids, changed))
    assert not torch.allclose(first[0, 3], second[0, 3])
    assert torch.equal(first[0, 4:], second[0, 4:])


def test_architectures_without_masks_are_refused(transformers, tmp_path):
    config = transformers.FNetConfig(vocab_size=20, hidden_size=8, num_hidden_layers=1, intermediate_size=16)
    config.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="does not mask padding"):
        build_text_model(f"hf:{tmp_path},init=1")


def test_packages_are_found_but_not_imported(folders, batch, tmp_path, monkeypatch):
    package = tmp_path / "site" / "tiny_text_model"
    shutil.copytree(folders.bert, package / "files" / "model")
    (package / "files" / "model" / "pooling").mkdir()
    (package / "files" / "model" / "pooling" / "config.json").write_text("{}")
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    for name in ("tiny_text_model", "tiny-text-model"):
        found = build_text_model(f"hf:{name}")
        assert torch.equal(found(**batch), build_text_model(f"hf:{folders.bert}")(**batch))
        assert max_tokens(name) == 24
        assert absolute_text_model(f"hf:{name},pool=cls", tmp_path) == f"hf:{name},pool=cls"
        assert tokenizer_place(f"hf:{name},pool=cls", tmp_path) == name
    assert "tiny_text_model" not in sys.modules
    shutil.copytree(folders.gpt2, package / "other")
    with pytest.raises(InputError, match=r"ships several models: .*files/model, .*other; give the path"):
        build_text_model("hf:tiny_text_model")


def test_specs_are_written_with_absolute_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bert").mkdir()
    assert absolute_text_model("hf:bert , pool=cls,init") == f"hf:{tmp_path}/bert,pool=cls,init=1"
    assert absolute_text_model("hf:nets/bert", tmp_path / "x") == f"hf:{tmp_path}/x/nets/bert"
    assert tokenizer_place("hf:bert,pool=cls") == f"{tmp_path}/bert"


def test_most_tokens_of_a_model_and_its_tokenizer(folders, tmp_path):
    assert max_tokens(folders.bert) == 24  # the tokenizer says so; there are 32 positions
    assert max_tokens(folders.gpt2) == 32
    assert max_tokens(folders.roberta) == 32  # of 34 positions two come before the first token
    assert max_tokens("bert", folders.root) == 24
    (tmp_path / "config.json").write_text('{"model_type": "bloom"}')
    assert max_tokens(tmp_path) is None


def test_as_many_tokens_as_the_model_takes_go_in(folders):
    for family in ("bert", "roberta", "gpt2"):
        network = build_text_model(f"hf:{getattr(folders, family)},task=encoder")
        ids = torch.full((1, 33), 7)
        network(ids[:, :32], torch.ones(1, 32, dtype=torch.int64))
        with pytest.raises((IndexError, RuntimeError)):
            network(ids, torch.ones(1, 33, dtype=torch.int64))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("hf:", "names no transformer; write hf:FOLDER"),
        ("bert:x", "names no transformer"),
        ("hf:{bert},tasks=encoder", "unknown option of model 'hf' 'tasks'; did you mean 'task'"),
        ("hf:{bert},task=classify", "did you mean 'classification'"),
        ("hf:{bert},pool=max", "unknown pool"),
        ("hf:{bert},normalize=yes", "normalize of .* must be 0 or 1, got 'yes'"),
        ("hf:{bert},seed=-1", "seed of .* must be from 0 to"),
        ("hf:{bert},labels=3", "labels is an option of task=classification, but the task is encoder"),
        ("hf:{gpt2},pool=mean", "pool is an option of task=encoder, but the task is causal"),
        ("hf:{bert},pool=none,normalize=1", "normalize=1 works on pooled states, but pool=none"),
        ("hf:{headed},labels=2", "labels=2, but the head in the folder has 3"),
        ("hf:{root}/nothing", "there is no folder .*nothing, and nothing is downloaded; give a local folder"),
        ("hf:some/bert", "hf download some/bert --local-dir FOLDER"),
        ("hf:no_such_package", "no installed package 'no_such_package'"),
        ("hf:__main__", "no installed package"),
        ("hf:json", "the package in .*json ships no model"),
        ("hf:{bert}/config.json", "is a file; give the folder that holds it: .*bert"),
        ("hf:{root}", "there is no config.json in"),
        ("hf:{root}/bare", "holds no weights .*model.safetensors.*; copy them there, give weights, or use init=1"),
        ("hf:{root}/broken", "cannot read the configuration in .*OSError"),
        ("hf:{root}/strange", "cannot read the configuration in .*has model type `strange`"),
        ("hf:{root}/t5,init=1", "is an encoder with a decoder, which needs two texts"),
        ("hf:{root}/vision,init=1", "does not run on input_ids and attention_mask alone: AttributeError"),
        ("hf:{root}/swapped", r"do not belong to BertModel, .*37 missing: embeddings.LayerNorm.bias, .*\(\+32\)"),
        ("hf:{root}/narrow", "of another shape: embeddings.LayerNorm.bias"),
        ("hf:{root}/damaged", "cannot be loaded by transformers: SafetensorError"),
        ("hf:{bert},task=causal", "do not belong to BertLMHeadModel, .*missing: cls.predictions"),
        ("hf:{masked},task=causal", "is not causal: its logits depend on later tokens; use task=encoder"),
        ("hf:{distilbert},task=causal", "cannot be loaded by transformers: ValueError: Unrecognized configuration"),
    ],
)
def test_what_cannot_be_built_is_refused(transformers, folders, spec, message):
    made = {name: folders.root / name for name in ("bare", "broken", "strange", "swapped", "narrow", "damaged")}
    config = json.loads((folders.bert / "config.json").read_text())
    for name, folder in made.items():
        folder.mkdir(exist_ok=True)
        text = {"broken": "{", "strange": '{"model_type": "strange"}'}.get(name)
        changed = {**config, "intermediate_size": 20, "hidden_size": 10} if name == "narrow" else config
        (folder / "config.json").write_text(text or json.dumps(changed))
    shutil.copy(folders.gpt2 / "model.safetensors", made["swapped"])
    shutil.copy(folders.bert / "model.safetensors", made["narrow"])
    (made["damaged"] / "model.safetensors").write_bytes(b"no weights at all")
    transformers.T5Config(vocab_size=20, d_model=8).save_pretrained(folders.root / "t5")
    transformers.ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, image_size=8, patch_size=4
    ).save_pretrained(folders.root / "vision")
    with pytest.raises(InputError, match=message):
        build_text_model(spec.format(**vars(folders)))


def test_weights_of_another_architecture_are_refused(transformers, folders):
    gpt2 = transformers.AutoModelForCausalLM.from_pretrained(folders.gpt2).state_dict()
    with pytest.raises(InputError, match=r"missing: embeddings.word_embeddings.weight.*unexpected: transformer.wte"):
        build_text_model(f"hf:{folders.bert}", weights=gpt2)
    narrow = build_text_model(f"hf:{folders.bert}").state_dict()
    narrow["model.embeddings.LayerNorm.bias"] = torch.zeros(3)
    with pytest.raises(InputError, match=r"1 of another shape: embeddings.LayerNorm.bias \(3,\), model has \(8,\)"):
        build_text_model(f"hf:{folders.bert}", weights=narrow)
    with pytest.raises(InputError, match="37 missing"):
        build_text_model(f"hf:{folders.bert}", weights={})


def test_the_generator_is_restored_after_a_failure(folders):
    before = torch.get_rng_state()
    with pytest.raises(InputError):
        build_text_model(f"hf:{folders.distilbert},task=causal,init=1")
    assert torch.equal(torch.get_rng_state(), before)


def test_reports_of_transformers_are_silent_only_meanwhile(transformers, folders, capfd):
    logging = transformers.utils.logging
    logging.set_verbosity_info()
    logging.enable_progress_bar()
    try:
        build_text_model(f"hf:{folders.masked},task=classification")
        assert logging.get_verbosity() == logging.INFO
        assert logging.is_progress_bar_enabled()
    finally:
        logging.set_verbosity_error()
        logging.disable_progress_bar()
    assert capfd.readouterr() == ("", "")


def test_without_transformers_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match=r"pip install 'ooc-ntk\[text\]'"):
        build_text_model(f"hf:{tmp_path}")
    with pytest.raises(InputError, match=r"pip install 'ooc-ntk\[text\]'"):
        max_tokens(tmp_path)
