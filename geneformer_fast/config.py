"""What an encoder is: its geometry, its variants, its precision; published models are presets of their families."""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from geneformer_fast import families
from geneformer_fast.arguments import checked
from geneformer_fast.errors import CheckpointError, UnsupportedError, VocabularyError
from geneformer_fast.files.schema import check_fields

if TYPE_CHECKING:
    import torch

CHOICES = {
    "norm": ("post", "pre"),
    "activation": ("relu", "gelu", "gelu_tanh", "swiglu"),
    "head_activation": ("relu", "gelu", "gelu_tanh"),
    "inputs": ("tokens", "values", "pairs"),
    "attention": ("softmax", "favor"),
}
#: Least and largest value of every number. The largest are far beyond any model; they keep a wrong digit in a file from
#: asking for all memory.
BOUNDS = {
    "n_layers": (1, 1_000),
    "width": (1, 2**17),
    "n_heads": (1, 2**12),
    "ff_width": (1, 2**19),
    "vocab_size": (0, 2**24),
    "max_len": (1, 2**24),
    "n_token_types": (0, 2**16),
    "n_bins": (1, 2**16),
    "eps": (0.0, 1.0),
    "dropout": (0.0, 1.0),
    "attention_dropout": (0.0, 1.0),
    "init_std": (0.0, 100.0),
    "bin_alpha": (-1e6, 1e6),
    "pad_id": (-(2**31), 2**31),
    "attention_width": (1, 2**19),
    "n_features": (0, 2**16),
}


@dataclass(frozen=True)
class EncoderConfig:
    """A transformer encoder over cells.

    Attributes
    ----------
    n_layers, width, n_heads, ff_width
        Blocks; hidden width C; attention heads H; inner feed-forward width F.
    vocab_size
        Rows of the token table (0 for ``inputs="values"``).
    max_len
        Longest cell, specials included: rows of the position table.
    norm
        ``"post"``: LayerNorm after each residual addition (BERT, Geneformer). ``"pre"``: before each sublayer.
    activation
        Feed-forward activation: ``"relu"``, ``"gelu"`` (error function), ``"gelu_tanh"`` or ``"swiglu"``.
    head_activation
        Activation within the MLM head.
    eps
        LayerNorm epsilon.
    embedding_norm, final_norm
        Whether the input embedding, and the last block's output, are normalised.
    n_token_types
        Rows of the token type table, of which Geneformer uses row 0 only; 0 for none.
    inputs
        ``"tokens"``: ranked gene tokens, or a value's bin at each gene's place. ``"values"``: one value per gene,
        embedded by soft bins (AIDO.Cell). ``"pairs"``: a gene's id and its value (scGPT). Or what the family names.
    n_bins, bin_alpha
        Soft bins of ``inputs="values"``.
    dropout, attention_dropout
        Probabilities, in training only: on embeddings and sublayer outputs; on attention weights.
    pad_id
        Token id that stands for no gene; never computed here, kept for checkpoints.
    init_std
        Standard deviation of fresh weights.
    tied_decoder
        Whether the MLM decoder shares the token table.
    vocabulary
        Name of the vocabulary the model was trained on, such as ``"geneformer-v2"``; None if unknown.
    vocabulary_fingerprint
        SHA-256 of that vocabulary, or None if only its name is known.
    family
        Name in the registry of families (``geneformer_fast.families``); None: told by the vocabulary, or none.
    attention
        ``"softmax"``, or ``"favor"``: linear attention by random features (Choromanski et al., arXiv:2009.14794).
    attention_width
        Width of all heads together; None: ``width``.
    qkv_bias
        Whether the projections to queries, keys and values have biases.
    n_features
        Random features of ``attention="favor"``.
    """

    n_layers: int
    width: int
    n_heads: int
    ff_width: int
    vocab_size: int
    max_len: int
    norm: str = "post"
    activation: str = "relu"
    head_activation: str = "relu"
    eps: float = 1e-12
    embedding_norm: bool = True
    final_norm: bool = False
    n_token_types: int = 2
    inputs: str = "tokens"
    n_bins: int = 100
    bin_alpha: float = 1.0
    dropout: float = 0.02
    attention_dropout: float = 0.02
    pad_id: int = 0
    init_std: float = 0.02
    tied_decoder: bool = True
    vocabulary: str | None = None
    vocabulary_fingerprint: str | None = None
    family: str | None = None
    attention: str = "softmax"
    attention_width: int | None = None
    qkv_bias: bool = True
    n_features: int = 0

    def __post_init__(self) -> None:
        check_fields(self, UnsupportedError, BOUNDS)
        for name, allowed in CHOICES.items():
            # Whether a family has the input that it names is seen where the input layer is made.
            if getattr(self, name) not in allowed and not (name == "inputs" and self.family):
                raise UnsupportedError(f"{name} must be one of {', '.join(allowed)}, not {getattr(self, name)!r}")
        if self.eps == 0:
            raise UnsupportedError("eps must be above 0, such as 1e-12")
        has_ids = self.inputs in ("tokens", "pairs")
        if has_ids and self.vocab_size < 1:
            raise UnsupportedError("an encoder over tokens needs vocab_size of at least 1")
        if has_ids and not 0 <= self.pad_id < self.vocab_size:
            raise UnsupportedError(f"pad_id must be one of the {self.vocab_size:,} token ids, not {self.pad_id}")
        if (self.attention_width or self.width) % self.n_heads:
            name = "width" if self.attention_width is None else "attention_width"
            raise UnsupportedError(
                f"{name} {self.attention_width or self.width} is not divisible by {self.n_heads} heads"
            )
        if (self.attention == "favor") != (self.n_features > 0):
            raise UnsupportedError(
                f"n_features is {self.n_features} with attention={self.attention!r}; give it with 'favor' alone"
            )

    @classmethod
    @checked
    def preset(cls, name: str, **changes: Any) -> EncoderConfig:
        """A published model's configuration by name (see :data:`PRESETS`), with fields changed by keyword.

        Names that others have for a model serve too, such as ``"gf-12L-95M-i4096"``.
        """
        if name not in PRESETS:
            raise UnsupportedError(f"no preset named {name!r}; there are {', '.join(PRESETS)}")
        return dataclasses.replace(PRESETS[name], **changes)

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return (self.attention_width or self.width) // self.n_heads

    def layer_index(self, layer: str | int) -> int:
        """Number of blocks to run for a named layer.

        Parameters
        ----------
        layer
            ``"last"``; ``"penultimate"`` (Geneformer's ``emb_layer=-1``, its default); an int from 0 for the output of
            that block, which transformers lists as ``hidden_states[N + 1]``; or ``"embeddings"``, the input of block 0.

        Raises
        ------
        UnsupportedError
            There is no such layer. Negative numbers are refused: libraries disagree on what -1 means.
        """
        named = {"last": self.n_layers, "penultimate": self.n_layers - 1, "embeddings": 0}
        if isinstance(layer, str) and layer.isdigit():
            layer = int(layer)
        if isinstance(layer, str) and layer in named:
            return named[layer]
        if isinstance(layer, int) and not isinstance(layer, bool) and 0 <= layer < self.n_layers:
            return layer + 1
        raise UnsupportedError(
            f'no layer {layer!r}: use "last", "penultimate", "embeddings" or 0 to {self.n_layers - 1} '
            "(numbers from the end are refused, because libraries disagree on what -1 means)"
        )

    def check_vocabulary(self, identity: dict[str, Any]) -> None:
        """Refuse tokens of another vocabulary, by name.

        Parameters
        ----------
        identity
            ``name``, ``n_tokens`` and ``fingerprint`` of the vocabulary that made the tokens.

        Raises
        ------
        VocabularyError
            The tokens were made with a vocabulary this model was not trained on.
        """
        name, fingerprint, n_tokens = (identity.get(key) for key in ("name", "fingerprint", "n_tokens"))
        mine = self.vocabulary or f"an unnamed vocabulary of {self.vocab_size:,} tokens"
        advice = "Tokenize again with the dictionary that belongs to the model, or load the model that fits the tokens."
        if self.vocabulary is not None and name is not None and name != self.vocabulary:
            raise VocabularyError(f"these tokens were made with {name}, but the model reads {mine}. {advice}")
        if self.vocabulary_fingerprint and fingerprint and fingerprint != self.vocabulary_fingerprint:
            raise VocabularyError(
                f"these tokens and the model both say {mine}, but the dictionaries differ "
                f"(fingerprints {fingerprint[:12]} and {self.vocabulary_fingerprint[:12]}). {advice}"
            )
        if n_tokens is not None and n_tokens > self.vocab_size:
            raise VocabularyError(
                f"these tokens were made with {name or 'a vocabulary'} of {n_tokens:,} tokens, but the model has "
                f"{self.vocab_size:,} ({mine}). {advice}"
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    @checked
    def from_dict(cls, values: dict[str, Any], *, where: str | os.PathLike[str] = "the configuration") -> EncoderConfig:
        """The inverse of :meth:`to_dict`; fields that are unknown, missing or of the wrong kind are refused by name.

        Raises
        ------
        CheckpointError
            Beginning with ``where``, the file or part of it.
        """
        if not isinstance(values, dict):
            raise CheckpointError(f"{where} holds no JSON object")
        fields = dataclasses.fields(cls)
        unknown = sorted(set(values) - {field.name for field in fields})
        if unknown:
            raise CheckpointError(f"{where} has fields this version does not know: {', '.join(unknown)}")
        missing = [f.name for f in fields if f.default is dataclasses.MISSING and f.name not in values]
        if missing:
            raise CheckpointError(f"{where} has no {', '.join(missing)}")
        try:
            return cls(**values)
        except UnsupportedError as error:
            raise CheckpointError(f"{where}: {error}") from None


def device_named(device: str | torch.device) -> torch.device:
    """The device of a name.

    Raises
    ------
    UnsupportedError
        No device has this name.
    """
    import torch

    try:
        return torch.device(device)
    except (RuntimeError, TypeError):
        raise UnsupportedError(f"no device is called {device!r}; use cpu, cuda, or cuda:N") from None


def usable_device(device: str | torch.device) -> torch.device:
    """The device of a name, if something can be put there.

    Raises
    ------
    UnsupportedError
        No device has this name, or torch cannot use it here.
    """
    import torch

    found = device_named(device)
    try:
        torch.empty(1, device=found)
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UnsupportedError(
            f"device {str(device)!r} cannot be used here ({reason}); torch sees {torch.cuda.device_count()} CUDA "
            "devices. Use cpu, or leave the device out"
        ) from None
    return found


def matmul_dtype(dtype: str | torch.dtype | None, device: str | torch.device) -> torch.dtype | None:
    """The precision policy: which dtype weights and matrix products have.

    The residual stream, LayerNorm parameters and statistics, and embedding tables stay float32 whatever this says
    (float64 for float64): a bfloat16 stream costs eight times the error of a float32 one.

    Parameters
    ----------
    dtype
        ``"float32"``, ``"bfloat16"``, ``"float16"``, ``"float64"`` (or short ``fp32``, ``bf16``, ``fp16``), a torch
        dtype, ``"auto"`` for the fastest exact-enough one on the device, or None to keep what a checkpoint holds.

    Raises
    ------
    UnsupportedError
        The dtype is unknown, or emulated on this device.
    """
    import torch
    from geneformer_kernels.target import target_of

    if dtype is None:
        return None
    short = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "fp64": "float64", "half": "float16"}
    name = str(dtype).removeprefix("torch.")
    name = short.get(name, name)
    target = target_of(device)
    if name == "auto":
        name = target.fastest_dtype
    if name not in ("float32", "bfloat16", "float16", "float64"):
        raise UnsupportedError(f"dtype {dtype!r} is not one of float32, bfloat16, float16, float64, auto")
    if name == "bfloat16" and target.kind == "cuda" and target.sm < 80:
        raise UnsupportedError(f"{target.name} has no bfloat16 (it would be emulated, slowly): use dtype='float16'")
    return getattr(torch, name)


def warn_if_emulated(dtype: torch.dtype, device: str | torch.device, *, option: str = "dtype") -> None:
    """Say that a CPU computes a dtype by converting it to float32 and back, which takes many times as long.

    ``option`` is the name under which the caller was given the dtype.
    """
    import torch
    from geneformer_kernels.target import target_of

    if torch.device(device).type != "cpu":
        return
    is_native = {torch.bfloat16: target_of("cpu").has_fast_bf16, torch.float16: has_float16()}.get(dtype, True)
    if not is_native:
        name = str(dtype).removeprefix("torch.")
        warnings.warn(
            f"this CPU has no {name} of its own: products in it are emulated, 8 to 50 times slower than in float32; "
            f"take {option} 'float32', or 'auto' (the fastest here)",
            stacklevel=3,
        )


def has_float16() -> bool:
    """Whether oneDNN multiplies float16 on this CPU."""
    import torch

    try:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    except (AttributeError, RuntimeError):  # built without oneDNN
        return False


class _Presets(Mapping[str, EncoderConfig]):
    """The published models of all families, as they register them."""

    def __getitem__(self, name: str) -> EncoderConfig:
        # Under whatever name a model is asked for, it is listed under one.
        return families.presets()[families.preset_name(name) or name]

    def __iter__(self) -> Iterator[str]:
        return iter(families.presets())

    def __len__(self) -> int:
        return len(families.presets())


#: Published models by name (:func:`geneformer_fast.families.presets`).
PRESETS: Mapping[str, EncoderConfig] = _Presets()
