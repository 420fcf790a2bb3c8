"""What is profiled: who computes, with which geometry, in which precision."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from geneformer_fast.checkpoints import hf
from geneformer_fast.config import EncoderConfig
from geneformer_fast.encoder import Encoder
from geneformer_fast.errors import GeneformerFastError, ProfileError
from geneformer_fast.layers import quantization_of

OURS, STOCK, TORCH = "geneformer_fast", "transformers", "torch"
# Schemes of quantization whose products are of eight bits, and what those products are called.
_EIGHT_BITS = {"int8": "int8", "fp8": "fp8"}


@dataclass(frozen=True)
class Profiled:
    """A model, as far as figures depend on it.

    Attributes
    ----------
    model
        As it was given, wrapped or not; None where there is none.
    encoder
        The :class:`Encoder` in it, if there is one.
    config
        Geometry, of an Encoder or of a Hugging Face BERT.
    engine
        ``"geneformer_fast"``, ``"transformers"`` or ``"torch"``.
    is_packed
        Whether padding is taken out before anything is computed.
    is_accelerated
        Whether :func:`geneformer_fast.accelerate` did that.
    n_parameters
        None where there is no model.
    """

    model: nn.Module | None
    encoder: Encoder | None
    config: EncoderConfig | None
    engine: str
    is_packed: bool
    is_accelerated: bool
    n_parameters: int | None

    @property
    def geometry(self) -> dict[str, Any] | None:
        """The configuration in plain values."""
        return None if self.config is None else self.config.to_dict()

    @property
    def name(self) -> str:
        """The class, without wrappers."""
        return "no model" if self.model is None else type(unwrapped(self.model)).__name__

    @property
    def is_recomputing(self) -> bool:
        """Whether training computes blocks twice, to keep less in memory."""
        if self.model is None:
            return False
        modules = list(self.model.modules())
        return any(
            getattr(each, "is_recomputing", False) is True or getattr(each, "gradient_checkpointing", False) is True
            for each in modules
        )

    def dtype(self) -> str | None:
        """Of matrix products, as they would run now (within an autocast, that one's)."""
        if self.model is None:
            return None
        quantization = quantization_of(self.model)
        if quantization is not None and quantization.scheme in _EIGHT_BITS:
            return _EIGHT_BITS[quantization.scheme]
        weight = next((each.weight for each in self.model.modules() if isinstance(each, nn.Linear)), None)
        weight = next(self.model.parameters(), None) if weight is None else weight
        if weight is None:
            return None
        if torch.is_autocast_enabled(weight.device.type):
            return _plain(torch.get_autocast_dtype(weight.device.type))
        if self.encoder is not None:
            return _plain(self.encoder.dtype)
        return _plain(weight.dtype)


def profiled(model: nn.Module | None) -> Profiled:
    """Look at a model."""
    if model is None:
        return Profiled(None, None, None, TORCH, False, False, None)
    modules = list(model.modules())
    encoder = next((each for each in modules if isinstance(each, Encoder)), None)
    is_accelerated = any(_has_packed_forward(each) for each in modules)
    config = encoder.config if encoder is not None else _config_of(model)
    is_stock = any(type(each).__module__.startswith("transformers.") for each in modules)
    engine = OURS if encoder is not None or is_accelerated else STOCK if is_stock else TORCH
    n_parameters = sum(parameter.numel() for parameter in model.parameters())
    return Profiled(model, encoder, config, engine, engine == OURS, is_accelerated, n_parameters)


def device_of(model: nn.Module | None, said: torch.device | None) -> torch.device:
    """Where a model computes.

    Raises
    ------
    ProfileError
        Its weights lie elsewhere than was said, or nowhere.
    """
    tensors = [] if model is None else [*model.parameters(), *model.buffers()]
    if not tensors:
        return said or torch.device("cpu")
    places = {tensor.device for tensor in tensors}
    if any(place.type == "meta" for place in places):
        raise ProfileError("the model is on the meta device: it has no weights to compute with; load it first")
    if said is None:
        return next((place for place in places if place.type != "cpu"), tensors[0].device)
    if not any(_is_same(place, said) for place in places):
        names = ", ".join(sorted(map(str, places)))
        raise ProfileError(
            f"the model is on {names}, and device says {said}: move it (model.to({str(said)!r})) or leave device out"
        )
    return next(place for place in places if _is_same(place, said))


def unwrapped(model: nn.Module) -> nn.Module:
    """What DDP, ``torch.compile`` and the like were put around."""
    while isinstance(inner := getattr(model, "_orig_mod", getattr(model, "module", None)), nn.Module):
        model = inner
    return model


def settings_with(settings: Mapping[str, Any] | None, about: Profiled, device: torch.device) -> dict[str, Any]:
    """What was chosen, with what is true of every run."""
    found: dict[str, Any] = {"threads": torch.get_num_threads()}
    if about.is_accelerated:
        found["accelerated"] = True
    if about.is_recomputing:
        found["recomputing"] = True
    if device.type == "cuda":
        found["tf32"] = torch.backends.cuda.matmul.allow_tf32
    return {**found, **(settings or {})}


def _is_same(place: torch.device, said: torch.device) -> bool:
    return place.type == said.type and (said.index is None or place.index == said.index)


def _has_packed_forward(module: nn.Module) -> bool:
    """Whether ``accelerate`` has put its forward into a module, be it inside of other tools' wrappers."""
    forward = vars(module).get("forward")
    while forward is not None and not getattr(type(forward), "is_packed", False):
        forward = getattr(forward, "__func__", None) or getattr(forward, "__wrapped__", None)
    return forward is not None and bool(getattr(forward, "is_active", True))


def _config_of(model: nn.Module) -> EncoderConfig | None:
    """Geometry of a Hugging Face BERT; None of everything else."""
    for module in model.modules():
        settings: Any = getattr(module, "config", None)
        if getattr(settings, "model_type", None) != "bert" or not hasattr(settings, "to_dict"):
            continue
        try:
            return hf.config_from_settings(settings.to_dict(), Path(type(module).__name__))
        except GeneformerFastError:  # a BERT of another kind than ours
            return None
    return None


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
