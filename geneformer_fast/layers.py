"""Linear layers and embedding tables, with weights in floating point or in eight bits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeGuard

import torch
import torch.nn.functional as F
from geneformer_kernels import fp8_linear, int8_linear, int8_mode, linear, quantize_rows
from geneformer_kernels.int8_rows import activate, widened_weight
from geneformer_kernels.on_device import needs_gradient
from torch import nn

from geneformer_fast.errors import UnsupportedError

# Whole numbers of as many bytes: what they are viewed as, no change of dtype touches.
_WHOLE = {1: torch.int8, 2: torch.int16, 4: torch.int32}
#: Rows of a vocabulary that are widened at a time for logits on a CPU: 12.6 MB of width 768 in float32, where a whole
#: table of Geneformer V2 would be 62 MB.
DECODED_ROWS = 4096


class Rows(NamedTuple):
    """Activations rounded for a product of integers, as ``geneformer_kernels.quantize_rows`` makes them.

    Attributes
    ----------
    q
        [T, K] int8.
    scale
        [T] float32.
    """

    q: torch.Tensor
    scale: torch.Tensor


class Linear(nn.Linear):
    """A linear layer by ``geneformer_kernels.linear``, which multiplies bfloat16 faster on a CPU in inference."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[T, C] -> [T, N]."""
        return linear(x, self.weight, self.bias)


class WideCopy(torch.Tensor):
    """A weight that was widened for somebody to read; to write into it would change nothing, and is refused.

    Adapters are merged into weights that way, and weights drawn anew.
    """

    _WRITING = frozenset(("__setitem__", "__set__", *(f"__i{name}__" for name in ("add", "sub", "mul", "truediv"))))

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Plain tensors come out of everything that reads."""
        name = getattr(func, "__name__", "")
        is_writing = name in cls._WRITING or (name.endswith("_") and not name.endswith("__"))
        written = args[0] if args else (kwargs or {}).get("tensor")  # as torch.nn.init has it
        if is_writing and name != "requires_grad_" and isinstance(written, cls):
            raise UnsupportedError(
                "weights of eight bits cannot be changed (merging an adapter, too, needs the model before it was "
                "quantized); change that one, and quantize it again"
            )
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


class EightBits(nn.Module):
    """What layers with weights of eight bits share.

    Weights, scales and biases keep their dtypes: ``.to(torch.bfloat16)``, ``.half()`` and the like move
    :attr:`compute_dtype` only. Nothing of it learns.

    Attributes
    ----------
    scheme
        One of :data:`geneformer_fast.quantization.choices.SCHEMES`.
    compute_dtype
        Dtype of what comes out, and of products that are not of integers: float32, bfloat16 or float16.
    weight_q, weight_scale
        [N, K] int8 or float8_e4m3fn, and [N] float32, what a row of it is multiplied by.
    smooth
        [K] float32 or None: what is multiplied into the input, column by column.
    """

    scheme: str
    compute_dtype: torch.dtype
    weight_q: torch.Tensor
    weight_scale: torch.Tensor
    smooth: torch.Tensor | None

    def hold(self, n_rows: int, width: int, scheme: str, compute_dtype: torch.dtype, *, has_smooth: bool) -> None:
        """Make room for the weight."""
        check_compute_dtype(compute_dtype)
        self.scheme, self.compute_dtype = scheme, compute_dtype
        is_float8 = scheme == "fp8" and isinstance(self, nn.Linear)
        self.register_buffer(
            "weight_q", torch.empty(n_rows, width, dtype=torch.float8_e4m3fn if is_float8 else torch.int8)
        )
        self.register_buffer("weight_scale", torch.empty(n_rows, dtype=torch.float32))
        self.register_buffer("smooth", torch.empty(width, dtype=torch.float32) if has_smooth else None)

    @property
    def weight(self) -> torch.Tensor:
        """[N, K], widened to the compute dtype at every call: what the layer multiplies its input by."""
        return self.widened(self.compute_dtype).as_subclass(WideCopy)

    @weight.setter
    def weight(self, value: torch.Tensor) -> None:
        raise UnsupportedError("a quantized layer cannot be given another weight; quantize the changed model")

    @property
    def row_scale(self) -> torch.Tensor:
        """[N]: :attr:`weight_scale`, which has another axis in models of transformers."""
        return self.weight_scale.view(-1)

    def widened(self, dtype: torch.dtype, rows: slice = slice(None)) -> torch.Tensor:
        """Some rows of :attr:`weight` in a dtype; scaled before they are narrowed, for float16's sake."""
        weight_q, weight_scale = self.weight_q[rows], self.row_scale[rows]
        if self.smooth is None:
            return widened_weight(weight_q, weight_scale, dtype)
        return (widened_weight(weight_q, weight_scale, torch.float32) * self.smooth).to(dtype)

    def decoded(self, x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        """[R, K] -> ``linear(x, weight, bias)`` [R, N] in the dtype of ``x``, without widening all of the weight.

        ``x`` is not rounded, whatever the scheme: ranks of genes are read off logits, and nothing after them would
        average the error away.
        """
        return by_parts(x, bias, len(self.weight_q), lambda part: self.widened(x.dtype, part))

    def reset_parameters(self) -> None:
        """Refused: there is nothing random about weights of eight bits."""
        raise UnsupportedError("a quantized layer cannot be given fresh weights")

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> EightBits:
        """``.to``, ``.cuda``, ``.half`` and others come through here, with what they do to each tensor."""
        dtype = fn(torch.empty(0, dtype=self.compute_dtype, device=self.weight_q.device)).dtype
        check_compute_dtype(dtype)
        self.compute_dtype = dtype
        for name, buffer in self._buffers.items():
            if buffer is not None:
                self._buffers[name] = _moved(buffer, fn)
        for name, parameter in self._parameters.items():
            moved = None if parameter is None else _moved(parameter.detach(), fn)
            if parameter is None or moved is None or moved.device == parameter.device:
                continue
            if torch._has_compatible_shallow_copy_type(parameter, moved):  # as torch does: who shares it goes along
                parameter.data = moved
            else:
                self._parameters[name] = nn.Parameter(moved, requires_grad=parameter.requires_grad)
        return self


def decoded(x: torch.Tensor, weight_q: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """:meth:`EightBits.decoded` with the tensors of an int8 layer without smoothing."""
    return by_parts(x, bias, len(weight_q), lambda part: widened_weight(weight_q[part], scale[part], x.dtype))


def by_parts(
    x: torch.Tensor, bias: torch.Tensor, n_rows: int, widened: Callable[[slice], torch.Tensor]
) -> torch.Tensor:
    """[R, K] -> ``linear(x, weight, bias)`` [R, N] in the dtype of ``x``, with some rows of the weight at a time."""
    bias = bias.to(x.dtype)
    step = DECODED_ROWS if x.device.type == "cpu" else n_rows
    parts = [slice(start, start + step) for start in range(0, n_rows, step)]
    if needs_gradient(x, bias):
        return torch.cat([F.linear(x, widened(part), bias[part]) for part in parts], -1)
    out = x.new_empty(len(x), n_rows)
    for part in parts:
        out[:, part] = F.linear(x, widened(part), bias[part])
    return out


def _moved(tensor: torch.Tensor, fn: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """What ``fn`` does to a tensor, but for its dtype."""
    whole = tensor.view(_WHOLE[tensor.element_size()])
    moved = fn(whole)
    return (moved if moved.dtype == whole.dtype else whole.to(moved.device)).view(tensor.dtype)


class QuantizedLinear(EightBits, nn.Linear):
    """A linear layer with weights of eight bits and a scale per output channel; see :class:`EightBits`.

    In place of ``nn.Linear`` wherever that is called. Scheme ``"int8"`` rounds rows of the input where products of
    integers are faster (:attr:`is_dynamic`); whether they are does not depend on how many rows there are.

    Parameters
    ----------
    in_features, out_features
        K and N.
    scheme, compute_dtype
        As in :class:`EightBits`.
    has_bias, has_smooth
        Whether there is a ``bias`` [N], and a ``smooth`` [K].

    Attributes
    ----------
    mode
        Of scheme ``"int8"``: ``"dynamic"``, ``"weight_only"``, or None for what ``geneformer_kernels.int8_mode`` says,
        which is the faster one here.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        scheme: str,
        compute_dtype: torch.dtype = torch.float32,
        has_bias: bool = True,
        has_smooth: bool = False,
    ) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        self.mode: str | None = None
        self.hold(out_features, in_features, scheme, compute_dtype, has_smooth=has_smooth)
        bias = nn.Parameter(torch.empty(out_features, dtype=torch.float32), requires_grad=False) if has_bias else None
        self.register_parameter("bias", bias)

    @property
    def work_dtype(self) -> torch.dtype:
        """Dtype of what comes out: the compute dtype, or that of autocast where it is on."""
        kind = self.weight_q.device.type
        return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else self.compute_dtype

    @property
    def is_dynamic(self) -> bool:
        """Whether rows of the input are rounded here, for a product of integers."""
        if self.scheme != "int8":
            return False
        place = self.work_dtype, self.weight_q.device
        return (self.mode or int8_mode(self.in_features, self.out_features, *place)) == "dynamic"

    def rounded(self, x: torch.Tensor) -> Rows:
        """[..., K] as the rows that are multiplied; no gradient."""
        return Rows(*quantize_rows(x, smooth=self.smooth))

    def forward(
        self, x: torch.Tensor | Rows, *, activation: str | None = None, out_dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        """[..., K], or what :meth:`rounded` makes of it -> [..., N], with the gradient of a frozen weight.

        ``activation`` is None, ``"relu"``, ``"gelu"`` or ``"gelu_tanh"``.
        """
        work_dtype, is_dynamic = self.work_dtype, self.is_dynamic
        weights = (self.weight_q, self.row_scale, self.bias)
        out_dtype = out_dtype or work_dtype
        if is_dynamic and self.smooth is not None and not isinstance(x, Rows) and not needs_gradient(x, self.bias):
            x = self.rounded(x)
        if isinstance(x, Rows):
            return int8_linear(
                x.q, *weights, x_scale=x.scale, activation=activation, mode="dynamic", out_dtype=out_dtype
            )
        if not is_dynamic and self.scheme != "fp8" and not needs_gradient(x, self.bias):
            return self._by_widened(x.to(work_dtype), activation).to(out_dtype)
        x = x if self.smooth is None else x * self.smooth  # in float32
        x = x if is_dynamic else x.to(work_dtype)
        if self.scheme == "fp8":
            return fp8_linear(x, *weights, activation=activation, out_dtype=out_dtype)
        mode = "dynamic" if is_dynamic else "weight_only"
        return int8_linear(x, *weights, activation=activation, mode=mode, out_dtype=out_dtype)

    def _by_widened(self, x: torch.Tensor, activation: str | None) -> torch.Tensor:
        """As the layer was before, with its product; a gradient would keep the wide weight until it is needed."""
        out = linear(x.reshape(-1, self.in_features), *self.as_float(x.dtype))
        return activate(out, activation).view(*x.shape[:-1], self.out_features)

    def as_float(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Weight and bias in a dtype."""
        return self.widened(dtype), None if self.bias is None else self.bias.to(dtype)

    def extra_repr(self) -> str:
        """What ``print`` shows."""
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, scheme={self.scheme}"


class QuantizedEmbedding(EightBits, nn.Embedding):
    """A table of int8 with a scale per row, of which only what is looked up is widened; see :class:`EightBits`.

    Parameters
    ----------
    num_embeddings, embedding_dim
        V and C.
    scheme, compute_dtype
        As in :class:`EightBits`; the table is int8 in every scheme.
    padding_idx
        As in ``nn.Embedding``, for those who ask.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        scheme: str,
        compute_dtype: torch.dtype = torch.float32,
        padding_idx: int | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim, self.padding_idx = num_embeddings, embedding_dim, padding_idx
        self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse = None, 2.0, False, False
        self.hold(num_embeddings, embedding_dim, scheme, compute_dtype, has_smooth=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """[...] ids -> [..., C] in the compute dtype."""
        scale = F.embedding(ids, self.row_scale[:, None])
        return (F.embedding(ids, self.weight_q) * scale).to(self.compute_dtype)

    def extra_repr(self) -> str:
        """What ``print`` shows."""
        return f"{self.num_embeddings}, {self.embedding_dim}, int8"


def check_compute_dtype(dtype: torch.dtype) -> None:
    """Refuse what weights of eight bits are not multiplied in.

    Raises
    ------
    UnsupportedError
        Such as for float64, which would show nothing but the rounding of the weights.
    """
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        name = str(dtype).removeprefix("torch.")
        raise UnsupportedError(f"quantized weights are computed with in float32, bfloat16 or float16, not in {name}")


def compute_dtype(layer: nn.Linear) -> torch.dtype:
    """Dtype a layer computes in, by itself."""
    return layer.compute_dtype if isinstance(layer, EightBits) else layer.weight.dtype


def wants_rows(layer: nn.Module | None) -> TypeGuard[QuantizedLinear]:
    """Whether a layer multiplies integers here, so that what comes before it had best hand it :class:`Rows`."""
    return isinstance(layer, QuantizedLinear) and layer.is_dynamic


@dataclass(frozen=True)
class Quantization:
    """How a model is quantized.

    Attributes
    ----------
    scheme
        That of the model: of its linear layers, the one that rounds most.
    layers
        Name -> scheme, of every layer and table with weights of eight bits.
    """

    scheme: str
    layers: Mapping[str, str]


def quantization_of(model: nn.Module) -> Quantization | None:
    """How a model is quantized; None where no layer is."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, EightBits)}
    if not found:
        return None
    schemes = {module.scheme for module in found.values() if isinstance(module, nn.Linear)} or {"int8-weights"}
    scheme = next(each for each in ("fp8", "int8", "int8-weights") if each in schemes)
    return Quantization(scheme, {name: module.scheme for name, module in found.items()})
