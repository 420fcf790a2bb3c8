"""What is put on top of an encoder of genes and values: expression of genes, and classes of cells by several layers.

scGPT's heads (Cui et al., Nature Methods 2024). They read hidden states of packed cells, in the dtype of their weights.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from geneformer_fast.config import EncoderConfig
from geneformer_fast.heads import CellClassifier
from geneformer_fast.layers import EightBits
from geneformer_fast.ragged import Ragged

#: Layers of scGPT's annotation head, the last one included.
N_LAYERS = 3


class LayeredClassifier(CellClassifier):
    """Class of a cell, from its first token: linear, ReLU and LayerNorm several times, then linear (scGPT).

    Parameters
    ----------
    config
        Of the encoder.
    n_classes
        What the last layer tells apart.
    n_layers
        Linear layers, the last one included.
    """

    def __init__(self, config: EncoderConfig, n_classes: int, *, n_layers: int = N_LAYERS) -> None:
        nn.Module.__init__(self)
        width = config.width
        self.hidden = nn.ModuleList(nn.Linear(width, width) for _ in range(n_layers - 1))
        self.norms = nn.ModuleList(nn.LayerNorm(width, eps=config.eps) for _ in range(n_layers - 1))
        self.classifier = nn.Linear(width, n_classes)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """[B, C] first rows -> [B, n_classes] logits."""
        for linear, norm in zip(self.hidden, self.norms, strict=True):
            assert isinstance(norm, nn.LayerNorm)
            rows = norm(F.relu(linear(_as_input(linear, rows))).to(norm.weight.dtype))
        return self.classifier(_as_input(self.classifier, rows))

    def linears(self) -> Sequence[nn.Module]:
        """The layers that a row passes one after another."""
        return [*self.hidden, self.classifier]


class ExpressionDecoder(nn.Module):
    """Expression of a gene, in the model's bins, from its hidden state (scGPT's masked values); perhaps of cells too.

    Parameters
    ----------
    config
        Of the encoder.
    has_zeros
        Whether a second pass tells how probable it is that a gene is expressed at all.
    of_cells
        Whether there is a :class:`CellExpression`, which reads the cell's embedding instead.

    Attributes
    ----------
    layers, zeros
        Three linear layers with leaky ReLU between them; ``zeros`` is None without.
    cells
        None without.
    """

    def __init__(self, config: EncoderConfig, *, has_zeros: bool = False, of_cells: bool = False) -> None:
        super().__init__()
        self.layers = _three(config.width)
        self.zeros = _three(config.width) if has_zeros else None
        self.cells = CellExpression(config, has_zeros=has_zeros) if of_cells else None

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """[R, C] hidden rows -> [R] expected values."""
        return _passed(self.layers, rows)

    def expressed(self, rows: torch.Tensor) -> torch.Tensor:
        """[R, C] hidden rows -> [R] probabilities that the genes are not zero, by which scGPT multiplies values.

        Raises
        ------
        ValueError
            The model was trained without them.
        """
        if self.zeros is None:
            raise ValueError("this model tells no probability of zero: it was trained without explicit_zero_prob")
        return torch.sigmoid(_passed(self.zeros, rows))

    def linears(self) -> Sequence[nn.Module]:
        """The layers that a row passes one after another."""
        return list(self.layers)


class CellExpression(nn.Module):
    """Expression of genes from the embedding of a cell alone: ``W(sigmoid(gene2query(gene))) . cell`` (scGPT's MVC).

    Attributes
    ----------
    gene2query, project, project_zeros
        The latter of the probability that a gene is expressed; None without.
    is_detached
        Whether gene embeddings get no gradient from it.
    """

    def __init__(self, config: EncoderConfig, *, has_zeros: bool = False, is_detached: bool = False) -> None:
        super().__init__()
        width = config.width
        self.gene2query = nn.Linear(width, width)
        self.project = nn.Linear(width, width, bias=False)
        self.project_zeros = nn.Linear(width, width) if has_zeros else None
        self.is_detached = is_detached

    def forward(self, cells: torch.Tensor, genes: Ragged) -> torch.Tensor:
        """[B, C] embeddings of cells, and of the genes asked for in each [T, C] -> [T] expected values."""
        return self._read(self.project, cells, genes)

    def expressed(self, cells: torch.Tensor, genes: Ragged) -> torch.Tensor:
        """As :meth:`forward`, the probabilities that the genes are not zero."""
        if self.project_zeros is None:
            raise ValueError("this model tells no probability of zero: it was trained without explicit_zero_prob")
        return torch.sigmoid(self._read(self.project_zeros, cells, genes))

    def _read(self, project: nn.Linear, cells: torch.Tensor, genes: Ragged) -> torch.Tensor:
        values = genes.values.detach() if self.is_detached else genes.values
        queries = project(torch.sigmoid(self.gene2query(_as_input(self.gene2query, values))))
        cells = _as_input(project, cells)
        if genes.n_cells == 1:
            return queries @ cells[0]
        return (queries * cells[genes.cell_index()]).sum(-1)


def elastic_similarity_loss(cells: torch.Tensor, threshold: float = 0.3) -> torch.Tensor:
    """scGPT's elastic cell similarity: ``mean(1 - (relu(cosine) - threshold)^2)`` over all pairs of a batch.

    Like cells are drawn together, and others pushed apart, about a threshold. As in the original the diagonal counts as
    a similarity of 0, and negative similarities do too.

    Parameters
    ----------
    cells
        [B, C] embeddings.
    threshold
        Above which cells attract one another.

    Returns
    -------
    torch.Tensor
        A scalar; scGPT adds ten times it to its loss.
    """
    unit = F.normalize(cells, dim=1)
    cosine = (unit @ unit.T).clone().fill_diagonal_(0.0)
    return (1 - (F.relu(cosine) - threshold).square()).mean()


def _three(width: int) -> nn.ModuleList:
    return nn.ModuleList([nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, 1)])


def _passed(layers: nn.ModuleList, rows: torch.Tensor) -> torch.Tensor:
    """[R, C] -> [R], leaky ReLU between the layers."""
    for index, layer in enumerate(layers):
        rows = layer(_as_input(layer, rows if index == 0 else F.leaky_relu(rows)))
    return rows.squeeze(-1)


def _as_input(layer: nn.Module, rows: torch.Tensor) -> torch.Tensor:
    """Rows in the dtype that a layer takes; one with weights of eight bits rounds them itself."""
    weight = None if isinstance(layer, EightBits) else getattr(layer, "weight", None)
    return rows if weight is None else rows.to(weight.dtype)
