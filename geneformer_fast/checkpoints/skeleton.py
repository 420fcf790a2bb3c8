"""Models with shapes and no numbers yet, to be filled from files."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from geneformer_fast.config import EncoderConfig
from geneformer_fast.encoder import Encoder


def skeleton(config: EncoderConfig, head: str | None = None, *, n_classes: int = 2) -> Encoder:
    """An encoder on torch's meta device: it takes no memory until tensors are assigned to it.

    Nothing is drawn. Drawing normal numbers on the meta device would give none either, but load torch's compiler with
    sympy and Triton: 160 MB and a second or two (torch 2.13).
    """
    with torch.device("meta"), _NothingDrawn():
        return Encoder(config, head, n_classes=n_classes)


class _NothingDrawn(TorchFunctionMode):
    """Leaves out what fills a tensor with normal random numbers."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.Tensor.normal_, nn.init.normal_):
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)
