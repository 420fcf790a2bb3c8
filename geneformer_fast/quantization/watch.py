"""What each layer of an encoder reads while it goes over cells: the largest of every column, and a sample of rows."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from geneformer_kernels import linear
from geneformer_kernels.ops.feed_forward.reference import activate
from torch import nn

from geneformer_fast.block import Block, add_norm
from geneformer_fast.encoder import Encoder
from geneformer_fast.errors import InputError
from geneformer_fast.heads import CellClassifier, MLMHead, Pooler
from geneformer_fast.progress import Progress
from geneformer_fast.ragged import Ragged

#: Rows of each layer that are kept: 4 to 20 MB per block of Geneformer V2. Ten times as many change no SQNR by 0.1 dB.
N_ROWS = 256
DECODER = "head.decoder"


@dataclass
class Seen:
    """What one layer was seen to read.

    Attributes
    ----------
    largest
        [K] float32, the largest magnitude of every column.
    rows
        [at most N_ROWS, K] float32, a sample.
    """

    largest: torch.Tensor
    rows: torch.Tensor


class Watch:
    """Looks at what the layers of an encoder read.

    Parameters
    ----------
    encoder
        In floating point.
    n_tokens
        That the encoder will go over.
    seed
        Of the sample: places among all tokens, the same for every layer.
    """

    def __init__(self, encoder: Encoder, n_tokens: int, seed: int = 0) -> None:
        self.encoder = encoder
        rng = np.random.default_rng(seed)
        places = np.sort(rng.choice(n_tokens, min(N_ROWS, n_tokens), replace=False))
        self._places, self._start = torch.from_numpy(places), 0
        self._chosen = torch.zeros(0, dtype=torch.int64)
        self._largest: dict[str, torch.Tensor] = {}
        self._rows: dict[str, list[torch.Tensor]] = {}

    def look(self, batches: Sequence[Ragged], shown: Progress | None = None) -> dict[str, Seen]:
        """Run the encoder over cells, and its head over the sampled tokens; ``shown`` is told of every batch.

        Returns
        -------
        dict
            Layer name to what it read: ``blocks.N.qkv``, ``.out``, ``.up`` and ``.down``, and of the head what it has
            of ``head.dense``, ``head.decoder`` (tied or not), ``head.pooler.dense`` and ``head.classifier``.

        Raises
        ------
        InputError
            A layer reads NaN or infinity: the model cannot be measured on these cells.
        """
        with torch.inference_mode(), self._hooks():
            for tokens in batches:
                stop = self._start + tokens.n_tokens
                is_here = (self._places >= self._start) & (self._places < stop)
                self._chosen = (self._places[is_here] - self._start).to(self.encoder.device)
                hidden = self.encoder(tokens.to(self.encoder.device))
                self._look_at_head(hidden)
                self._start = stop
                if shown is not None:
                    shown.update(tokens.n_cells)
        return {name: Seen(largest.cpu(), torch.cat(self._rows[name])) for name, largest in self._largest.items()}

    def _look_at_head(self, hidden: Ragged) -> None:
        head = self.encoder.head
        if isinstance(head, MLMHead):
            self._note(DECODER, head.transform(hidden.values[self._chosen]))
        elif isinstance(head, CellClassifier | Pooler):
            self.encoder.logits(hidden)
        elif head is not None:
            self.encoder.logits(hidden, self._chosen)

    @contextlib.contextmanager
    def _hooks(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for index in range(self.encoder.config.n_layers):
                block = self.encoder.blocks[index]
                assert isinstance(block, Block)
                prefix = f"blocks.{index}"
                after_attention: dict[str, torch.Tensor] = {}
                for handle in (
                    block.qkv.register_forward_pre_hook(partial(self._before, f"{prefix}.qkv", True)),
                    block.out.register_forward_pre_hook(partial(self._before, f"{prefix}.out", True)),
                    block.out.register_forward_hook(partial(_keep, after_attention)),
                    block.register_forward_hook(partial(self._after_block, prefix, after_attention)),
                ):
                    stack.callback(handle.remove)
            for name, module in self.encoder.named_modules():
                if name.startswith("head.") and isinstance(module, nn.Linear):
                    stack.callback(module.register_forward_pre_hook(partial(self._before, name, False)).remove)
            yield

    def _before(self, name: str, is_sampled: bool, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        self._note(name, inputs[0], is_sampled=is_sampled)

    def _after_block(
        self, prefix: str, after_attention: Mapping[str, torch.Tensor], block: Block, inputs: Any, output: Any
    ) -> None:
        """What the feed-forward reads, which no module of its own is called with: the product is fused."""
        stream, x = inputs[:2]
        norm = block.attention_norm if block.config.norm == "post" else block.ff_norm
        _, x = add_norm(after_attention["out"], stream, norm, block.config.norm, x.dtype)
        assert isinstance(x, torch.Tensor)
        self._note(f"{prefix}.up", x, is_sampled=True)
        hidden = linear(x, block.up.weight, block.up.bias)
        if block.config.activation == "swiglu":  # gate rows come first
            gate, hidden = hidden.chunk(2, dim=-1)
            hidden = gate * torch.sigmoid(gate) * hidden
        else:
            hidden = activate(hidden, block.config.activation)
        self._note(f"{prefix}.down", hidden, is_sampled=True)

    def _note(self, name: str, x: torch.Tensor, *, is_sampled: bool = False) -> None:
        """``is_sampled``: rows are those of all tokens, of which the chosen ones are kept; else the first ones are."""
        if not len(x):
            return
        largest = x.abs().amax(0).float()
        if not largest.isfinite().all():
            raise InputError(
                f"{name} reads NaN or infinity for some of these cells, so that nothing can be measured on them; check "
                "the weights, or take other cells"
            )
        before = self._largest.get(name)
        self._largest[name] = largest if before is None else torch.maximum(before, largest)
        kept = self._rows.setdefault(name, [])
        left = N_ROWS - sum(map(len, kept))
        kept.append((x[self._chosen] if is_sampled else x[:left]).float().cpu())


def _keep(place: dict[str, torch.Tensor], module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
    place["out"] = output
