"""Who brings a model writes one file: it is recognised, loaded, given cells, read, saved and listed."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import itertools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import anndata
import made_up_family as sixth
import made_up_values as roots
import numpy as np
import pytest
import torch

import geneformer_fast as gf
from geneformer_fast import Encoder, EncoderConfig, families
from geneformer_fast.cli import main
from geneformer_fast.config import PRESETS
from geneformer_fast.data.identity import identity_of
from geneformer_fast.doctor import as_text, examine
from geneformer_fast.errors import CheckpointError, UnsupportedError

N_GENES = 40


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """The registry as it is where nothing else is installed, and as it was afterwards."""
    monkeypatch.setattr(families, "_registered", {})
    families._load_entry_points.cache_clear()
    yield monkeypatch
    families._load_entry_points.cache_clear()


@pytest.fixture
def model(registry: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A checkpoint as its own tool would write it."""
    folder = tmp_path / "sixth-model"
    torch.manual_seed(5)
    with registry.context() as patch:
        patch.setattr(families, "_registered", {"sixth": sixth.FAMILY})
        sixth.save(Encoder(sixth.preset(2, 16)), folder)
    families._load_entry_points.cache_clear()
    (folder / sixth.GENES).write_text("".join(f"G{i},{1 + i % 3}\n" for i in range(N_GENES)))
    return folder


def cells(n: int = 12) -> anndata.AnnData:
    rng = np.random.default_rng(1)
    adata = anndata.AnnData(rng.poisson(1.0, (n, N_GENES)).astype(np.float32))
    adata.var["ensembl_id"] = [f"G{i}" for i in range(N_GENES)]
    adata.obs_names = [f"cell{i}" for i in range(n)]
    return adata


def plain(encoder: Encoder, tokens: list[int]) -> torch.Tensor:
    """The model in plain torch: hidden states of one cell."""
    config, state = encoder.config, encoder.state_dict()
    rank = torch.arange(len(tokens))
    x = state["embeddings.table.weight"][tokens] * torch.exp2(-rank / state["embeddings.half_life"])[:, None]
    for i in range(config.n_layers):
        w = {name.removeprefix(f"blocks.{i}."): value for name, value in state.items() if f"blocks.{i}." in name}
        qkv = (x @ w["qkv.weight"].T + w["qkv.bias"]).view(len(tokens), 3, config.n_heads, -1).permute(1, 2, 0, 3)
        attended = torch.softmax(qkv[0] @ qkv[1].mT / qkv.shape[-1] ** 0.5, dim=-1) @ qkv[2]
        out = attended.transpose(0, 1).flatten(1) @ w["out.weight"].T + w["out.bias"]
        width = (config.width,)
        x = torch.layer_norm(x + out, width, w["attention_norm.weight"], w["attention_norm.bias"], config.eps)
        inner = torch.nn.functional.gelu(x @ w["up.weight"].T + w["up.bias"])
        out = inner @ w["down.weight"].T + w["down.bias"]
        x = torch.layer_norm(x + out, width, w["ff_norm.weight"], w["ff_norm.bias"], config.eps)
    return x


def check_all_the_way(model: Path, tmp_path: Path) -> None:
    """From a checkpoint and counts to embeddings and back."""
    with pytest.warns(UserWarning, match="its card says that it glows, and it fades"):
        encoder = gf.load(model, device="cpu")
    assert isinstance(encoder.embeddings, sixth.FadingRanks)
    assert families.family_of(encoder.config).title == "Sixth"
    adata, folder = cells(), tmp_path / "tokens"
    adata.write_h5ad(tmp_path / "cells.h5ad")
    asked = ["tokenize", str(tmp_path / "cells.h5ad"), "--out", str(folder), "--dictionary", str(model), "--quiet"]
    assert main([*asked, "--preset", "sixth"]) == 0
    tokens = gf.open_tokens(folder)
    values, bounds = tokens.read(range(12))
    listed = [values[a:b].tolist() for a, b in itertools.pairwise(bounds)]
    assert all(cell[0] == 0 and len(cell) <= 24 and min(cell[1:]) > 2 for cell in listed)
    got = gf.embed(tokens.path, encoder, progress=False)  # where its authors read
    wanted = torch.stack([plain(encoder, cell)[1:].mean(0) for cell in listed])
    np.testing.assert_allclose(got, wanted.numpy(), rtol=1e-5, atol=1e-6)
    with pytest.raises(UnsupportedError, match="would make all others louder"):
        gf.perturb(tokens.path, encoder, tmp_path / "perturbed", genes="all")
    again = gf.save(encoder, tmp_path / "again")
    assert (again / sixth.WEIGHTS).read_bytes() == (model / sixth.WEIGHTS).read_bytes()
    # With a head that its own format has no place for, it is saved under our names, and still known.
    with_head = gf.save(Encoder(encoder.config, "cells", n_classes=3), tmp_path / "ours")
    assert (with_head / "config.json").exists()
    loaded = gf.load(with_head, device="cpu")
    assert isinstance(loaded.embeddings, sixth.FadingRanks)
    assert families.family_of(loaded.config).name == "sixth"


def test_one_file_that_is_registered_is_enough(model: Path, tmp_path: Path) -> None:
    assert "sixth-small" not in PRESETS
    with pytest.raises(CheckpointError, match=r"sixth-model has no config\.json, and no family .* BioNeMo Geneformer,"):
        gf.load(model)
    families.register(sixth.FAMILY)
    assert EncoderConfig.preset("Sixth_Small").n_layers == 3
    check_all_the_way(model, tmp_path)


def test_one_file_of_another_package_is_enough(registry, model: Path, tmp_path: Path) -> None:
    point = importlib.metadata.EntryPoint("sixth", "made_up_family:FAMILY", families.GROUP)
    broken = importlib.metadata.EntryPoint("seventh", "no_such_package:FAMILY", families.GROUP)
    found = importlib.metadata.entry_points
    registry.setattr(
        importlib.metadata,
        "entry_points",
        lambda **asked: [broken, point] if asked == {"group": families.GROUP} else found(**asked),
    )
    with pytest.warns(UserWarning, match=r"'seventh' \(no_such_package:FAMILY\) cannot be used: No module named"):
        assert "sixth" in families.layouts()
    check_all_the_way(model, tmp_path)


def test_a_family_of_values_in_one_file(registry, tmp_path: Path) -> None:
    families.register(roots.FAMILY)
    adata, folder = cells(), tmp_path / "values"
    adata.X[2, 3] = 50.0
    adata.write_h5ad(tmp_path / "cells.h5ad")
    listed = [f"G{i}" for i in reversed(range(N_GENES))]
    (tmp_path / "roots.txt").write_text("\n".join(listed))
    asked = ["tokenize", str(tmp_path / "cells.h5ad"), "--out", str(folder), "--dictionary", str(tmp_path), "--quiet"]
    assert main([*asked, "--family", "roots", "--option", "most=4"]) == 0
    model, tokens = Encoder(roots.CONFIG).eval(), gf.open_tokens(folder)
    identity = identity_of(tokens, model.config)
    assert (identity["name"], identity["family"]) == ("roots", "roots")
    values, bounds = tokens.read(range(12))
    wanted = np.minimum(np.sqrt(adata.X[:, ::-1]), 4.0)
    np.testing.assert_array_equal(values.reshape(12, N_GENES), wanted)
    packed = gf.Ragged.from_lengths(torch.from_numpy(values), torch.from_numpy(np.diff(bounds)))
    alone = gf.Ragged.from_cells([torch.from_numpy(wanted[5])])
    with torch.inference_mode():
        np.testing.assert_allclose(model(packed).values.view(12, N_GENES, 16)[5], model(alone).values, atol=1e-5)


def test_the_doctor_lists_it_and_what_it_refuses(registry) -> None:
    families.register(sixth.FAMILY)
    report = examine()
    listed = {each.name: each for each in report.families}
    assert [*listed][:3] == ["geneformer", "bionemo", "aido-cell"]
    assert listed["sixth"].refused == sixth.FAMILY.refused
    text = as_text(report)
    assert "Sixth, of ranked genes: sixth-small\n    not perturb: a gene that is taken out would make all" in text
    assert "Geneformer, of ranked genes: geneformer-v1-10m, geneformer-v1-12l" in text


def test_what_a_family_does_not_bring_is_said(registry, tmp_path: Path) -> None:
    config = dataclasses.replace(sixth.preset(1, 16), inputs="fading-ranks")
    with pytest.raises(UnsupportedError, match=r"no family of models is called 'sixth'; there are geneformer"):
        Encoder(config)
    families.register(sixth.Family(name="sixth", title="S", paper="", licence="", presets={}))
    with pytest.raises(UnsupportedError, match=r"inputs='fading-ranks' is not known here .*'sixth', which has no in"):
        Encoder(config)
    families.register(sixth.FAMILY)
    with pytest.raises(ValueError, match="no head named 'glow'; there are mlm, pooler, cells, genes"):
        Encoder(config, "glow")


def test_a_folder_that_nobody_knows_is_refused_with_all_that_are(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    titles = ", ".join(each.title for each in families.all_families())
    with pytest.raises(CheckpointError, match=rf"model_type is 'llama', which no family here knows; .*{titles}, any"):
        gf.load(tmp_path)


def test_asking_for_layouts_loads_neither_torch_nor_numpy() -> None:
    code = (
        "import sys; from geneformer_fast import families; families.layouts(); families.presets(); "
        "print(sorted({'torch', 'numpy', 'pyarrow', 'pydantic'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"
