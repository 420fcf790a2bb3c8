"""scGPT against float64 numbers that its own code produced (shared/fixtures/scgpt_tiny.json)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from formula_weights import formula_weights
from scgpt_folders import write

import geneformer_fast as gf
from geneformer_fast.decoders import elastic_similarity_loss
from geneformer_fast.encoder import Encoder
from geneformer_fast.families import scgpt
from geneformer_fast.ragged import Ragged

ROUNDED = 1e-9  # the file is rounded to 1e-10


@pytest.fixture
def fixture(shared_dir: Path) -> dict:
    return json.loads((shared_dir / "fixtures" / "scgpt_tiny.json").read_text())


@pytest.fixture
def encoder(fixture: dict, tmp_path: Path) -> Encoder:
    """As a user has it: from a folder, in float64."""
    sizes, norms = fixture["shapes"], set(fixture["norm_weight_keys"])
    tensors = formula_weights(fixture["keys_sorted"], sizes, norms.__contains__)
    vocab = {f"GENE{i}": i for i in range(17)} | {"<pad>": 17, "<cls>": 18, "<eoc>": 19}
    folder = write(tmp_path / "tiny", spelling="torch", vocab=vocab)
    torch.save(tensors, folder / "best_model.pt")
    return gf.load(folder, dtype="float64", device="cpu")


def packed(fixture: dict) -> tuple[Ragged, torch.Tensor]:
    genes, values = torch.tensor(fixture["genes"]), torch.tensor(fixture["values"], dtype=torch.float64)
    mask = genes != fixture["config"]["pad_id"]
    return Ragged.from_padded(torch.stack((genes.double(), values), dim=-1), mask), mask


def expected(fixture: dict, name: str, mask: torch.Tensor | None = None) -> torch.Tensor:
    found = torch.tensor(fixture[name], dtype=torch.float64)
    return found if mask is None else found[mask]


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, wanted, atol=ROUNDED, rtol=0)


def test_every_number_of_the_encoder(fixture: dict, encoder: Encoder) -> None:
    cells, mask = packed(fixture)
    inputs = encoder.embeddings
    close(inputs.of_genes(cells.values[:, 0].long()), expected(fixture, "gene_emb", mask))
    close(inputs.of_values(cells.values[:, 1]), expected(fixture, "value_emb", mask))
    hidden = encoder(cells)
    close(hidden.values, expected(fixture, "encoder_output", mask))
    close(hidden.values[hidden.starts.long()], expected(fixture, "cell_emb"))
    close(encoder.first_tokens(cells), expected(fixture, "cell_emb"))
    unit = scgpt.cell_embeddings(encoder, cells)
    wanted = torch.nn.functional.normalize(expected(fixture, "cell_emb"), dim=1)
    torch.testing.assert_close(unit.double(), wanted, atol=1e-7, rtol=0)  # float32


def test_classes_and_expression(fixture: dict, encoder: Encoder) -> None:
    cells, mask = packed(fixture)
    hidden = encoder(cells)
    close(encoder.logits(hidden), expected(fixture, "cls_output"))  # the head that the checkpoint has
    n_body = sum(p.numel() for p in encoder.parameters())
    scgpt.use_head(encoder, "expression")
    close(encoder.logits(hidden), expected(fixture, "mlm_output", mask))
    close(encoder.logits(hidden, torch.tensor([3, 1])), expected(fixture, "mlm_output", mask)[[3, 1]])
    close(scgpt.expression_of_cells(encoder, cells).values, expected(fixture, "mvc_output", mask))
    heads = {name: size for name, size in fixture["shapes"].items() if "decoder." in name and "cls" not in name}
    n_heads = sum(torch.Size(size).numel() for size in heads.values())
    assert n_body + n_heads == fixture["n_params"]
    some = Ragged.from_cells([torch.tensor([7, 3]), torch.tensor([2])])
    asked = scgpt.expression_of_cells(encoder, cells, some).values
    wanted = expected(fixture, "mvc_output")
    close(asked, torch.stack((wanted[0, 3], wanted[0, 1], wanted[1, 2])))


def test_elastic_similarity(fixture: dict) -> None:
    loss = elastic_similarity_loss(expected(fixture, "cell_emb"))
    assert abs(loss.item() - fixture["loss_ecs"]) < ROUNDED
    cells = expected(fixture, "cell_emb").requires_grad_()
    elastic_similarity_loss(cells).backward()
    assert cells.grad is not None
    assert cells.grad.abs().sum() > 0


def test_gradients_are_those_of_plain_torch(fixture: dict, encoder: Encoder) -> None:
    """A step of fine-tuning: through values that stand for several genes at once, the norms, and all layers."""
    cells, _ = packed(fixture)
    encoder.requires_grad_()
    encoder.logits(encoder(cells)).square().sum().backward()
    genes, values = cells.values[:, 0].long(), cells.values[:, 1:]
    source = encoder.source
    plain = {source.names[name]: tensor.double() for name, tensor in source.extras.items()}
    mine = dict(encoder.named_parameters())
    theirs = {entry.theirs[0]: entry.ours for entry in scgpt.entries(encoder.config, "cells")}
    plain |= {name: mine[ours].detach().clone() for name, ours in theirs.items()}
    plain = {name: tensor.requires_grad_() for name, tensor in plain.items()}
    plain_logits(plain, genes, values, cells.lengths.tolist()).square().sum().backward()
    for name, ours in theirs.items():
        torch.testing.assert_close(
            mine[ours].grad, plain[name].grad, atol=1e-10, rtol=1e-9, msg=lambda text, n=name: f"{n}: {text}"
        )


def plain_logits(w: dict, genes: torch.Tensor, values: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """MODELS.md section 5.3, in a few lines of torch."""
    F = torch.nn.functional

    def linear(name: str, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))

    def norm(name: str, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], 1e-5)

    v = linear("value_encoder.linear2", F.relu(linear("value_encoder.linear1", values.clamp(max=512))))
    stream = norm("encoder.enc_norm", w["encoder.embedding.weight"][genes]) + norm("value_encoder.norm", v)
    out = []
    for x in stream.split(lengths):
        for i in range(2):
            layer = f"transformer_encoder.layers.{i}."
            qkv = F.linear(x, w[f"{layer}self_attn.in_proj_weight"], w[f"{layer}self_attn.in_proj_bias"])
            q, k, u = (part.view(len(x), 4, -1).transpose(0, 1) for part in qkv.chunk(3, dim=-1))
            context = (torch.softmax(q @ k.mT * q.shape[-1] ** -0.5, -1) @ u).transpose(0, 1).flatten(1)
            x = norm(f"{layer}norm1", x + linear(f"{layer}self_attn.out_proj", context))
            x = norm(f"{layer}norm2", x + linear(f"{layer}linear2", F.relu(linear(f"{layer}linear1", x))))
        out.append(x[0])
    rows = torch.stack(out)
    for i in (0, 3):
        rows = norm(f"cls_decoder._decoder.{i + 2}", F.relu(linear(f"cls_decoder._decoder.{i}", rows)))
    return linear("cls_decoder.out_layer", rows)
