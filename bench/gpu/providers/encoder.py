"""Candidates of the encoder cases: inference over a set of cells, and training steps over it."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from geneformer_kernels.dispatch import use_impl

from bench.gpu.card import half_dtype
from bench.gpu.impls import CUDNN, uses_cudnn
from bench.gpu.measure import Candidate, Place, Prepared, Unavailable, Variant, Work
from bench.gpu.models import (
    CHECKED_GRADIENTS,
    Stock,
    StockBert,
    StockPreNorm,
    distinct_shapes,
    encoder_flops,
    in_half,
    ours_loss,
    packed_hidden,
    random_encoder,
    tiny_config,
)
from bench.gpu.timer import as_graph
from bench.gpu.workload import Mix, Packed, Padded, Workload, fitted
from geneformer_fast import Encoder, EncoderConfig

# Whether it is the same function; how exact it is, the tests judge. Of the differences of hidden states between tokens
# bfloat16 rounds away up to 3 %, cells that see each other change 19 % and more (``random_encoder``).
TOLERANCE = {"hidden": 0.1, "loss": 0.02, **dict.fromkeys(CHECKED_GRADIENTS, 0.3)}
# Twelve layers through torch.compile.
COMPILE_S = 25.0


@dataclass(frozen=True)
class EncoderCase:
    """A preset, ``"inference"`` or ``"training"``, and the mixes of cells."""

    preset: str
    mode: str
    mixes: tuple[Mix, ...]

    def variants(self, place: Place) -> list[Variant]:
        """One per mix."""
        config = EncoderConfig.preset(self.preset)
        if place.is_tiny:
            config = tiny_config(config)
        maker = Inference if self.mode == "inference" else Training
        return [
            maker(config, Workload.of(config, mix, is_tiny=place.is_tiny), mix, place).variant() for mix in self.mixes
        ]


class Side:
    """What both modes share: the float32 encoder all weights come from, the cells, and the truth."""

    mode = ""
    #: The longest cell that is compared: plain attention in float32 needs memory for the square, in training per layer.
    check_len = 2048

    def __init__(self, config: EncoderConfig, load: Workload, mix: Mix, place: Place) -> None:
        self.config, self.load, self.mix, self.place = config, load, mix, place
        self.device, self.dtype = place.device, half_dtype(place.device)
        self.check = load.checked(self.check_len)
        self._encoder: Encoder | None = None

    @property
    def encoder(self) -> Encoder:
        """Float32, made when first asked for."""
        if self._encoder is None:
            self._encoder = random_encoder(self.config, self.device)
        return self._encoder

    @property
    def n_masked(self) -> int:
        """Rows that pass the head."""
        return 0

    def variant(self) -> Variant:
        """The problem."""
        lengths = self.load.lengths
        factor = 3 if self.mode == "training" else 1
        flops = factor * encoder_flops(self.config, lengths, self.n_masked)
        counts = {"cells": len(lengths), "tokens": sum(lengths)}
        return Variant(
            name=self.mix.name + (f"_{self.mix.length}" if self.mix.length else ""),
            what=f"{self.mode}, {self.mix.what}",
            work=Work(flops=flops, counts=counts),
            build=self.candidates,
            truth=self.truth,
            tolerance=dict.fromkeys(TOLERANCE, 0.001) if self.dtype == torch.float32 else TOLERANCE,
            has_lead=False,
            has_energy=True,
        )

    def candidates(self) -> Sequence[Candidate]:
        """Ours, then rivals."""
        raise NotImplementedError

    def truth(self) -> Mapping[str, torch.Tensor]:
        """Float32 results on the checked cells."""
        raise NotImplementedError

    def stock(self, attention: str, **options: Any) -> Stock:
        """A rival with our weights where it can hold them, in float32."""
        if self.config.inputs == "values":
            raise Unavailable("no stock encoder reads values")
        if attention == "pre-norm":
            return StockPreNorm(self.encoder)
        return StockBert(self.encoder, attention, **options)

    def float32_stock(self) -> Stock:
        """The rival that tells the truth."""
        return self.stock("eager" if self.config.norm == "post" else "pre-norm")

    def _packed_shapes(self) -> int:
        return len({(batch.size, batch.tokens.n_cells) for batch in self.load.packed(self.load.n_tokens, self.device)})

    def rivals(self, make: Callable[..., Prepared]) -> list[Candidate]:
        """The stock candidates; ``make(attention, is_compiled=..., ...)`` prepares one."""
        is_bert = self.config.norm == "post"
        shape = "transformers BERT" if is_bert else "transformers BERT of the same shape (post-norm, another function)"
        chosen = [
            Candidate(
                f"transformers-{name}", f"{shape}, {what}", lambda a=attention: make(a), is_same=is_bert, is_slow=slow
            )
            for name, attention, what, slow in (
                ("sdpa", "sdpa", "SDPA", False),
                ("flash2", "flash_attention_2", "flash-attention 2", False),
                ("eager", "eager", "eager attention", True),
            )
        ]
        compiled = Candidate(
            "transformers-compile", f"{shape}, SDPA, torch.compile", lambda: make("sdpa", is_compiled=True),
            is_same=is_bert, compile_s=COMPILE_S,
        )  # fmt: skip
        if self.config.norm == "pre":
            chosen = [
                Candidate("torch-pre-norm", "torch.nn.TransformerEncoder, SDPA", lambda: make("pre-norm")),
                *chosen,
            ]
        return [*chosen, compiled]


class Inference(Side):
    """Hidden states of the last layer of all cells, weights and activations in 16 bits."""

    mode = "inference"

    def truth(self) -> Mapping[str, torch.Tensor]:
        """Hidden states, with the mean over tokens taken away: it is common to all and would hide errors."""
        try:
            stock = self.float32_stock()
        except Unavailable:
            with torch.inference_mode(), use_impl("reference"):
                hidden = self.encoder(self.check.packed(1 << 30, self.device)[0].tokens).values
        else:
            alone = self.check.padded(1, self.device)  # cell by cell, so that no mask is involved
            hidden = packed_hidden(stock, alone, len(self.check.cells))
        self._mean = hidden.mean(0)
        return {"hidden": hidden - self._mean}

    def candidates(self) -> Sequence[Candidate]:
        """Ours, ours as graphs, compiled and on torch operations; then rivals."""
        return [
            Candidate("ours", "this project", lambda: self._ours(), is_ours=True),
            Candidate(
                "ours-graph", "this project, one CUDA graph per batch", lambda: self._ours("graph"), is_ours=True
            ),
            Candidate(
                "ours-compile",
                "this project, torch.compile",
                lambda: self._ours("compile"),
                is_ours=True,
                compile_s=COMPILE_S,
            ),
            Candidate("ours-torch", "this project on torch operations", lambda: self._ours("torch"), is_slow=True),
            *self.rivals(self._rival),
        ]

    def _ours(self, how: str = "") -> Prepared:
        if how == "graph" and self.device.type != "cuda":
            raise Unavailable("CUDA graphs need CUDA")
        encoder = in_half(self.encoder, self.dtype)
        forward: Any = self.place.compiled(encoder, n_shapes=self._packed_shapes()) if how == "compile" else encoder
        impl = lambda: use_impl("torch") if how == "torch" else contextlib.nullcontext()  # noqa: E731

        def once(batch: Packed) -> torch.Tensor:
            with torch.inference_mode(), impl():
                return forward(batch.tokens).values

        batches, n_tokens = fitted(lambda n: self.load.packed(n, self.device), once, self.load.n_tokens)
        steps = [lambda batch=batch: once(batch) for batch in batches]
        if how == "graph":
            steps = [as_graph(step, self.device) for step in steps]

        def result() -> Mapping[str, torch.Tensor]:
            packed = self.check.packed(1 << 30, self.device)
            return {"hidden": torch.cat([once(batch) for batch in packed]).float() - self._mean}

        notes: dict[str, Any] = {"batch_tokens": n_tokens, "batches": len(batches)}
        if not how and uses_cudnn(lambda: once(batches[0])):
            notes["attention"] = CUDNN
        return Prepared(lambda: _all(steps), result, notes)

    def _rival(self, attention: str, *, is_compiled: bool = False) -> Prepared:
        model = self.stock(attention).to(self.dtype)
        plain = model
        shapes = distinct_shapes(self.load.padded(self.load.n_tokens, self.device))
        forward = self.place.compiled(model, n_shapes=shapes) if is_compiled else model

        def once(batch: Padded) -> torch.Tensor:
            with torch.inference_mode():
                return forward(batch.ids, batch.mask)

        batches, n_tokens = fitted(lambda n: self.load.padded(n, self.device), once, self.load.n_tokens)

        def result() -> Mapping[str, torch.Tensor]:
            padded = self.check.padded(1 << 30, self.device)
            return {"hidden": packed_hidden(plain, padded, len(self.check.cells)) - self._mean}

        return Prepared(lambda: _all([lambda b=b: once(b) for b in batches]), result,
                        {"batch_tokens": n_tokens, "batches": len(batches)})  # fmt: skip


class Training(Side):
    """Forward, loss over 15 % masked rows, backward; float32 weights under autocast, dropout as the preset says."""

    mode = "training"
    check_len = 512

    @property
    def n_masked(self) -> int:
        """Rows that pass the head."""
        return self.load.n_masked

    def truth(self) -> Mapping[str, torch.Tensor]:
        """Loss and gradients of the checked cells without dropout, in float32."""
        (batch,) = self.check.padded(1 << 30, self.device)
        model = self.float32_stock().eval()
        loss = model.loss(batch)
        loss.backward()
        return {"loss": loss, **model.gradients()}

    def candidates(self) -> Sequence[Candidate]:
        """Ours, also compiled and on torch operations; rivals with the head on masked rows; stock with all logits."""
        every_row = Candidate(
            "transformers-all-logits", "transformers BertForMaskedLM, SDPA, logits of all rows as it computes them",
            lambda: self._rival("sdpa", is_full=True), is_same=self.config.norm == "post", is_slow=True,
        )  # fmt: skip
        return [
            Candidate("ours", "this project", lambda: self._ours(), is_ours=True),
            Candidate(
                "ours-compile",
                "this project, torch.compile",
                lambda: self._ours("compile"),
                is_ours=True,
                compile_s=COMPILE_S,
            ),
            Candidate("ours-torch", "this project on torch operations", lambda: self._ours("torch"), is_slow=True),
            *self.rivals(self._rival),
            every_row,
        ]

    def _autocast(self) -> Any:
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    def _ours(self, how: str = "") -> Prepared:
        encoder = copy.deepcopy(self.encoder)
        impl = lambda: use_impl("torch") if how == "torch" else contextlib.nullcontext()  # noqa: E731
        loss_of: Any = ours_loss
        if how == "compile":
            loss_of = self.place.compiled(ours_loss, n_shapes=self._packed_shapes())

        def once(batch: Packed) -> torch.Tensor:
            with impl():
                with self._autocast():
                    loss = loss_of(encoder, batch)
                loss.backward()
            return loss

        def result() -> Mapping[str, torch.Tensor]:
            (batch,) = self.check.packed(1 << 30, self.device)
            with _checked(encoder):
                loss = once(batch).detach()
                named = dict(encoder.named_parameters())
                return {"loss": loss, **{name: _clone(named[name].grad) for name in CHECKED_GRADIENTS}}

        return self._prepared(encoder, once, self.load.packed, result)

    def _rival(self, attention: str, *, is_compiled: bool = False, is_full: bool = False) -> Prepared:
        model = self.stock(attention) if attention == "pre-norm" else self.stock(attention, is_full=is_full)
        shapes = distinct_shapes(self.load.padded(self.load.n_tokens, self.device))
        loss_of: Any = self.place.compiled(_stock_loss, n_shapes=shapes) if is_compiled else _stock_loss

        def once(batch: Padded, loss_of: Any = loss_of) -> torch.Tensor:
            with self._autocast():
                loss = loss_of(model, batch)
            loss.backward()
            return loss

        def result() -> Mapping[str, torch.Tensor]:
            (batch,) = self.check.padded(1 << 30, self.device)
            with _checked(model):
                loss = once(batch, _stock_loss).detach()  # compiling once more for this would say nothing of ours
                return {"loss": loss, **{name: _clone(grad) for name, grad in model.gradients().items()}}

        return self._prepared(model, once, self.load.padded, result)

    def _prepared(
        self, model: torch.nn.Module, once: Callable[[Any], torch.Tensor], cut: Callable[..., list[Any]], result: Any
    ) -> Prepared:
        model.train()
        batches, n_tokens = fitted(lambda n: cut(n, self.device), once, self.load.n_tokens)
        model.zero_grad(set_to_none=True)

        def run() -> None:
            model.zero_grad(set_to_none=True)
            for batch in batches:
                once(batch)

        return Prepared(run, result, {"batch_tokens": n_tokens, "batches": len(batches)})


def _stock_loss(model: Stock, batch: Padded) -> torch.Tensor:
    return model.loss(batch)


def _clone(gradient: torch.Tensor | None) -> torch.Tensor:
    if gradient is None:
        raise RuntimeError("a parameter got no gradient")
    return gradient.detach().clone()


@contextlib.contextmanager
def _checked(model: torch.nn.Module) -> Any:
    """Without dropout, gradients empty before and after."""
    model.zero_grad(set_to_none=True)
    model.eval()
    try:
        yield
    finally:
        model.train()
        model.zero_grad(set_to_none=True)


def _all(steps: Sequence[Callable[[], Any]]) -> None:
    for step in steps:
        step()
