"""Heads, frozen layers and several tasks: one whole training step beside transformers, and what is not kept."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import toys

import geneformer_fast as gf
from geneformer_fast import families
from geneformer_fast.errors import UnsupportedError
from geneformer_fast.finetuning.labels import Task
from geneformer_fast.finetuning.losses import cross_entropy
from geneformer_fast.finetuning.models import freeze, pretrained, with_head
from geneformer_fast.finetuning.objectives import CellObjective, GeneObjective

ANY = None  # the random numbers that collate may use, and these objectives do not


def batch_of(n_cells: int = 6) -> gf.Ragged:
    rng = np.random.default_rng(0)
    first = len(toys.vocabulary().special)
    return gf.Ragged.from_cells(
        [torch.from_numpy(first + rng.permutation(toys.N_GENES)[: 9 + 5 * i]).long() for i in range(n_cells)]
    )


def task(name: str, codes: list[int], weight: float = 1.0) -> Task:
    return Task(name, [str(c) for c in range(max(codes) + 1)], np.array(codes), weight)


def in_transformers(model: gf.Encoder, folder, cls: str):
    transformers = pytest.importorskip("transformers")
    gf.save(model, folder)
    theirs = getattr(transformers, cls).from_pretrained(folder, attn_implementation="eager").train()
    for module in theirs.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return theirs


def assert_same_gradients(ours: gf.Encoder, theirs: torch.nn.Module, kind: str) -> None:
    from geneformer_fast.checkpoints.mapping import bert_entries, to_theirs

    table = bert_entries(ours.config, kind, "bert.")
    grads = to_theirs({name: p.grad for name, p in ours.named_parameters()}, table)
    expected = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    assert grads.keys() == expected.keys()
    for name, grad in grads.items():
        scale = expected[name].abs().max().clamp(min=1e-3)
        assert ((grad - expected[name]).abs().max() / scale).item() < 1e-5, name


def test_a_step_on_cells_is_that_of_transformers(tmp_path):
    model = with_head(toys.encoder(dropout=0.0, attention_dropout=0.0), "cells", 3, seed=4).train()
    theirs = in_transformers(model, tmp_path / "model", "BertForSequenceClassification")
    tokens, labels = batch_of(), [0, 2, 1, 1, 0, 2]
    objective = CellObjective([task("type", labels)], [cross_entropy])
    total, weight = objective.loss(model, objective.collate(tokens, np.arange(6), ANY))
    (total / weight).backward()
    expected = theirs(
        input_ids=tokens.to_padded(0), attention_mask=tokens.mask().long(), labels=torch.tensor(labels)
    ).loss
    expected.backward()
    torch.testing.assert_close(total / weight, expected, rtol=1e-5, atol=0)
    assert_same_gradients(model, theirs, "cells")


def test_a_step_on_genes_is_that_of_transformers(tmp_path):
    model = with_head(toys.encoder(dropout=0.0, attention_dropout=0.0), "genes", 2, seed=4).train()
    theirs = in_transformers(model, tmp_path / "model", "BertForTokenClassification")
    tokens = batch_of()
    codes = np.full(model.config.vocab_size, -100)
    codes[10:30] = np.arange(20) % 2
    objective = GeneObjective(codes, np.full_like(codes, -100), cross_entropy)
    total, weight = objective.loss(model, objective.collate(tokens, np.arange(6), ANY))
    (total / weight).backward()
    labels = tokens.map(lambda values: torch.from_numpy(codes)[values]).to_padded(-100)
    expected = theirs(input_ids=tokens.to_padded(0), attention_mask=tokens.mask().long(), labels=labels).loss
    expected.backward()
    torch.testing.assert_close(total / weight, expected, rtol=1e-5, atol=0)
    assert_same_gradients(model, theirs, "genes")


def test_several_tasks_are_one_linear_head_each():
    """The loss is what separate heads on the shared pooled state give, labels that are missing left out."""
    model = with_head(toys.encoder(), "cells", 5, seed=4).eval()
    tokens = batch_of()
    first, second = task("a", [0, 2, 1, -100, 0, 2]), task("b", [1, 0, -100, -100, 1, -100], weight=3.0)
    objective = CellObjective([first, second], [cross_entropy, cross_entropy])
    total, weight = objective.loss(model, objective.collate(tokens, np.arange(6), ANY))
    with torch.no_grad():
        pooled = model.head.pooler(model(tokens).values[tokens.starts.long()])
        matrix, bias = model.head.classifier.weight, model.head.classifier.bias
        a = torch.nn.functional.linear(pooled, matrix[:3], bias[:3])
        b = torch.nn.functional.linear(pooled, matrix[3:], bias[3:])
    ce = torch.nn.functional.cross_entropy
    sums = [ce(logits, torch.from_numpy(t.codes), reduction="sum") for logits, t in ((a, first), (b, second))]
    torch.testing.assert_close(total.detach(), sums[0] + 3 * sums[1])
    assert weight.item() == 5 + 3 * 3
    total.backward()
    # A task that nobody is labelled in moves nothing of its head.
    model.zero_grad()
    nobody = CellObjective([first, task("b", [0, 1, 0, 0, 0, 0])], [cross_entropy, cross_entropy])
    nobody._codes[:, 1] = -100
    nobody.loss(model, nobody.collate(tokens, np.arange(6), ANY))[0].backward()
    assert (model.head.classifier.weight.grad[3:] == 0).all()
    assert (model.head.classifier.weight.grad[:3] != 0).any()


def test_cells_without_a_label_change_no_gradient():
    model = with_head(toys.encoder(), "cells", 3, seed=4).eval()
    tokens = batch_of()
    grads = []
    for cells, codes in (([0, 1, 4], [0, 2, -100, -100, 1, -100]), (range(6), [0, 2, -100, -100, 1, -100])):
        part = gf.Ragged.from_cells([tokens.cells()[i] for i in cells])
        objective = CellObjective([task("a", codes)], [cross_entropy])
        total, weight = objective.loss(model, objective.collate(part, np.array(cells), ANY))
        model.zero_grad()
        (total / weight).backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-6)


def saved_bytes(model: gf.Encoder, tokens: gf.Ragged) -> int:
    """Bytes that a forward pass keeps for its backward pass, parameters aside."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        logits = model.logits(model(tokens))
    logits.sum()
    return sum(kept.values())


def test_frozen_blocks_keep_no_activations_and_take_no_gradient():
    tokens = batch_of(20)
    kept = {}
    for n_layers, embeddings in ((0, False), (2, False), (2, True), (3, True)):
        model = with_head(toys.encoder(), "cells", 3).train()
        freeze(model, n_layers, embeddings=embeddings)
        kept[n_layers, embeddings] = saved_bytes(model, tokens)
        model.logits(model(tokens)).sum().backward()
        for index, block in enumerate(model.blocks):
            assert all((p.grad is None) == (index < n_layers) for p in block.parameters())
        is_frozen = [p.grad is None for p in model.embeddings.parameters()]
        assert all(is_frozen) if embeddings else not all(is_frozen)
        assert all(p.grad is not None for p in model.head.parameters())
    # Two of three blocks frozen and the embeddings too: little more than a third of the activations stays.
    assert kept[2, True] < 0.45 * kept[0, False]
    assert kept[3, True] < 0.1 * kept[0, False]
    # With the embeddings learning, gradients have to come through the frozen blocks.
    assert kept[2, False] > kept[2, True]


def test_freezing_more_than_there_is_is_refused():
    with pytest.raises(UnsupportedError, match="cannot freeze 4 layers: the model has 3"):
        freeze(toys.encoder(), 4)
    with pytest.raises(UnsupportedError, match="cannot freeze -1 layers"):
        freeze(toys.encoder(), -1)


def test_heads_are_fresh_by_seed_and_the_pooler_is_kept():
    base = gf.Encoder(toys.encoder().config, head="pooler")
    one, same, other = (with_head(base, "cells", 4, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one.head.classifier.weight, same.head.classifier.weight)
    assert not torch.equal(one.head.classifier.weight, other.head.classifier.weight)
    assert torch.equal(one.head.pooler.dense.weight, base.head.dense.weight)
    assert one.head.pooler.dense.weight.data_ptr() != base.head.dense.weight.data_ptr()
    assert isinstance(base.head, type(gf.Encoder(base.config, head="pooler").head))


def test_what_a_family_refuses_is_said_in_its_words(monkeypatch):
    model = gf.Encoder(gf.EncoderConfig.preset("aido-cell-3m", n_layers=1, width=32, n_heads=2, ff_width=32))
    assert pretrained(model).config == model.config
    refusing = replace(families.family("aido-cell"), refused={"finetune": "it learns nothing more"})
    monkeypatch.setattr(families, "family_of", lambda config: refusing)
    with pytest.raises(UnsupportedError, match="it learns nothing more"):
        pretrained(model)
