"""Operations of other people's models are counted exactly, or said to be unknown; never a wrong number."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import geneformer_fast as gf
from geneformer_fast.profiling.figures import Missing
from geneformer_fast.profiling.flops import foreign
from geneformer_fast.profiling.flops.bert import Shape, shape_of
from geneformer_fast.profiling.flops.foreign import COUNTED, UNKNOWN, ForeignCounter, count_foreign, may_multiply
from geneformer_fast.profiling.flops.work import count_of, encoder_flops

N, C, H, WIDE, V, L = 2, 32, 2, 48, 50, 8
LENGTHS = np.array([3, 7, 1])
T, SQUARES = 11, 59


def bert(kind: str = "BertForMaskedLM", attention: str = "eager", **changes: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=V, hidden_size=C, num_hidden_layers=N, num_attention_heads=H, intermediate_size=WIDE,
        max_position_embeddings=16, attn_implementation=attention, **changes,
    )  # fmt: skip
    return getattr(transformers, kind)(config)


def blocks(tokens: int, squares: int) -> int:
    """By hand."""
    return N * (2 * tokens * (4 * C * C + 2 * C * WIDE) + 4 * C * squares)


IDS = torch.randint(4, V, (3, L), generator=torch.Generator().manual_seed(1))
MASK = (torch.arange(L) < torch.tensor(LENGTHS)[:, None]).long()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("is_padded", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_stock_bert_by_hand_by_formula_and_counted(attention: str, is_padded: bool, dropout: float) -> None:
    model = bert(attention=attention, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout)
    inputs = {"input_ids": IDS, "attention_mask": MASK if is_padded else torch.ones_like(IDS)}
    forward = blocks(3 * L, 3 * L * L) + 2 * 3 * L * (C * C + C * V)
    model.eval()
    with torch.no_grad():
        assert count_foreign(model, lambda: model(**inputs))[:2] == (forward, COUNTED)
    model.train()
    step = count_foreign(model, lambda: model(**inputs, labels=IDS).loss.backward())
    assert step[:2] == (3 * forward, COUNTED)
    shape = shape_of(model)
    assert isinstance(shape, Shape)
    batch = shape.batch(LENGTHS if is_padded else np.full(3, L), padded_to=L)
    found = count_of(shape.anatomy, [batch], is_training=True)
    assert found.hardware == 3 * forward
    real = blocks(T, SQUARES) + 2 * T * (C * C + C * V) if is_padded else forward
    assert found.model == 3 * real


@pytest.mark.parametrize("kind", ["BertModel", "BertForSequenceClassification", "BertForTokenClassification"])
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_other_heads_by_formula_and_counted(kind: str, context: Callable[[], Any]) -> None:
    model = bert(kind, "sdpa", **({} if kind == "BertModel" else {"num_labels": 5})).eval()
    shape = shape_of(model)
    assert isinstance(shape, Shape)
    with context():
        counted, basis, _ = count_foreign(model, lambda: model(IDS, attention_mask=MASK))
    assert basis == COUNTED
    assert count_of(shape.anatomy, [shape.batch(LENGTHS, padded_to=L)]).hardware == counted


def test_recomputed_blocks_are_hardware() -> None:
    model = bert(attention="sdpa").train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    shape = shape_of(model)
    assert isinstance(shape, Shape)
    assert shape.is_recomputing
    step, basis, _ = count_foreign(model, lambda: model(IDS, labels=IDS).loss.backward())
    batch = shape.batch(np.full(3, L), padded_to=L)
    found = count_of(shape.anatomy, [batch], is_training=True, is_recomputing=True)
    assert (step, basis) == (found.hardware, COUNTED)
    assert found.hardware - found.model == blocks(3 * L, 3 * L * L)


@pytest.mark.parametrize("targets", [["query", "value"], ["query", "value", "dense"]])
def test_adapters_of_low_rank(targets: list[str]) -> None:
    peft = pytest.importorskip("peft")
    for kind, task in (("BertForSequenceClassification", "SEQ_CLS"), ("BertForMaskedLM", None)):
        config = peft.LoraConfig(task_type=task, r=3, target_modules=targets, lora_dropout=0.0)
        model = peft.get_peft_model(bert(kind), config).train()
        labels = torch.zeros(3, dtype=torch.long) if task else IDS
        step, basis, _ = count_foreign(model, lambda: model(input_ids=IDS, labels=labels).loss.backward())  # noqa: B023
        shape = shape_of(model)
        assert isinstance(shape, Shape), shape
        found = count_of(shape.anatomy, [shape.batch(np.full(3, L), padded_to=L)], is_training=True)
        assert (found.hardware, basis) == (step, COUNTED)
        assert found.hardware < 3 * (blocks(3 * L, 3 * L * L) + 2 * 3 * L * (C * C + C * V))


def test_accelerated_and_own_models_compute_no_padding() -> None:
    model = bert().eval()
    handle = gf.accelerate(model)
    shape = shape_of(model)
    assert isinstance(shape, Shape)
    assert count_of(shape.anatomy, [shape.batch(LENGTHS, padded_to=L)]).hardware == blocks(T, SQUARES)
    rows = count_of(shape.anatomy, [shape.batch(LENGTHS, padded_to=L, head_rows=2)])
    assert rows.hardware == rows.model == blocks(T, SQUARES) + 2 * 2 * (C * C + C * V)
    with torch.no_grad():
        flops, basis, note = count_foreign(model, lambda: model(IDS, attention_mask=MASK))
    assert isinstance(flops, Missing)
    assert basis == UNKNOWN
    assert "loops of geneformer_fast" in note
    gf.accelerate(model, padding="stock")
    shape = shape_of(model)
    assert isinstance(shape, Shape)
    assert not shape.is_packed
    handle.undo()
    shape = shape_of(model)
    assert isinstance(shape, Shape)
    assert not shape.is_packed
    own = gf.Encoder(gf.EncoderConfig(n_layers=N, width=C, n_heads=H, ff_width=WIDE, vocab_size=V, max_len=16))
    shape = shape_of(nn.ModuleList([own]))
    assert isinstance(shape, Shape)
    batch = shape.batch(LENGTHS)
    assert count_of(shape.anatomy, [batch]).hardware == encoder_flops(own.config, T, SQUARES)


def _decoder(model: Any) -> None:
    model.config.is_decoder = True


def _relative(model: Any) -> None:
    model.config.position_embedding_type = "relative_key"


def _flex(model: Any) -> None:
    model.config._attn_implementation = "flex_attention"


def _layer(model: Any) -> None:
    model.bert.encoder.layer[1].output = nn.Identity()


def _linear(model: Any) -> None:
    model.bert.encoder.layer[1].output.dense = nn.Identity()


def _beside(model: Any) -> None:
    model.register_module("more", nn.Linear(2, 2))
    model.__class__ = type("Own", (type(model),), {})


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (_decoder, "decoder"), (_relative, "relative_key"), (_flex, "flex_attention"),
        (_layer, "encoder.layer.1.output"), (_linear, "Identity"), (_beside, "beside BERT"),
    ],
)  # fmt: skip
def test_what_is_not_plain_bert_has_no_formula(spoil: Callable[[Any], None], said: str) -> None:
    model = bert()
    spoil(model)
    assert said in str(shape_of(model))
    assert "no BERT" in str(shape_of(nn.Linear(2, 2)))


class Calls(nn.Module):
    """A model that does one thing."""

    def __init__(self, call: Callable[..., torch.Tensor], *shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.call = call
        self.weights = nn.ParameterList(torch.randn(shape) for shape in shapes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.call(x, *self.weights)


def counts(model: nn.Module, x: torch.Tensor, *, is_training: bool = False) -> Any:
    if not is_training:
        with torch.no_grad():
            return count_foreign(model, lambda: model(x))
    return count_foreign(model, lambda: model(x).sum().backward())


def sdpa(x: torch.Tensor, weight: torch.Tensor, **options: Any) -> torch.Tensor:
    q = x @ weight
    return F.scaled_dot_product_attention(q, q, q, **options)


# (what, shape of x, shapes of the weights, operations forward, operations of the step)
EXACT: dict[str, tuple[Callable[..., torch.Tensor], tuple[int, ...], list[tuple[int, ...]], int, int]] = {
    "linear": (F.linear, (5, 6, 7), [(3, 7), (3,)], 2 * 30 * 21, 2 * 2 * 30 * 21),
    "matrix times vector": (torch.mv, (5, 7), [(7,)], 2 * 35, 4 * 35),
    "two vectors": (torch.dot, (7,), [(7,)], 2 * 7, 2 * 7),
    "einsum": (lambda x, w: torch.einsum("bij,jk->bik", x, w), (5, 6, 7), [(7, 3)], 2 * 30 * 21, 4 * 30 * 21),
    "addbmm": (lambda x, w: torch.addbmm(x[0, :, :1], x, w), (5, 6, 7), [(5, 7, 4)], 2 * 5 * 6 * 7 * 4, -1),
    # [2, 3, 8, 6] queries after a product with [6, 6].
    "attention": (sdpa, (2, 3, 8, 6), [(6, 6)], 2 * 48 * 36 + 4 * 6 * 64 * 6, 4 * 48 * 36 + 3 * 4 * 6 * 64 * 6),
    "convolution": (F.conv1d, (2, 6, 9), [(4, 6, 3)], 2 * 2 * 7 * 4 * 18, 4 * 2 * 7 * 4 * 18),
    "grouped convolution": (
        lambda x, w: F.conv1d(x, w, groups=3), (2, 6, 9), [(6, 2, 3)], 2 * 2 * 7 * 6 * 6, 4 * 2 * 7 * 6 * 6
    ),
    "transposed convolution": (
        lambda x, w: F.conv_transpose1d(x, w, stride=2), (2, 6, 9), [(6, 4, 3)], 2 * 2 * 9 * 6 * 12, 4 * 2 * 9 * 6 * 12
    ),
    "strided convolution": (
        lambda x, w: F.conv2d(x, w, stride=2), (2, 3, 9, 9), [(4, 3, 3, 3)], 2 * 2 * 16 * 4 * 27, 4 * 2 * 16 * 4 * 27
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", EXACT)
def test_operators_by_hand(what: str) -> None:
    """Nobody asks for the gradient of x: the backward pass has the weight's product only, and attention's four."""
    call, shape, weights, forward, step = EXACT[what]
    model, x = Calls(call, *weights), torch.randn(shape)
    assert counts(model, x)[:2] == (forward, COUNTED)
    with torch.inference_mode():
        assert count_foreign(model, lambda: model(x))[:2] == (forward, COUNTED)
    if step > 0:
        assert counts(model, x, is_training=True)[:2] == (step, COUNTED)


def test_attention_on_a_cpu_is_0_for_torch_and_not_here() -> None:
    """pytorch issue 195460: torch 2.13 and older know no formula for it."""
    x = torch.randn(2, 3, 8, 6)
    with FlopCounterMode(display=False) as mode, torch.no_grad():
        F.scaled_dot_product_attention(x, x, x)
    found = counts(Calls(lambda x: F.scaled_dot_product_attention(x, x, x)), x)[0]
    assert found == 4 * 6 * 64 * 6
    assert mode.get_total_flops() in (0, found)


def test_products_of_integers_are_counted() -> None:
    q = torch.randint(-9, 9, (32, 16), dtype=torch.int8)
    assert counts(Calls(lambda x: torch._int_mm(x, q.T)), q)[0] == 2 * 32 * 16 * 32


class Own(torch.autograd.Function):
    """What a kernel of somebody's own does: memory from torch, numbers from elsewhere."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        out = torch.empty(len(x), len(weight))
        out.detach().numpy()[:] = x.detach().numpy() @ weight.detach().numpy().T
        return out

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x, weight = ctx.saved_tensors
        d_weight = torch.empty_like(weight)
        d_weight.numpy()[:] = gradient.numpy().T @ x.detach().numpy()
        return gradient @ weight, d_weight


class OwnBackward(Own):
    """Only the gradients come from elsewhere."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight.T


def recurrent(x: torch.Tensor) -> torch.Tensor:
    return nn.LSTM(7, 4, batch_first=True)(x)[0]


UNKNOWNS: dict[str, tuple[Callable[..., torch.Tensor], tuple[int, ...], list[tuple[int, ...]], str]] = {
    "a kernel of its own": (lambda x, w: Own.apply(x, w) + 1, (5, 7), [(3, 7)], "does not see"),
    "a kernel of its own at the end": (Own.apply, (5, 7), [(3, 7)], "who called the model read"),
    "causal attention": (lambda x, w: sdpa(x, w, is_causal=True), (2, 3, 8, 6), [(6, 6)], "causal"),
    "a solver": (lambda x, w: torch.linalg.solve(w, x), (5, 7), [(5, 5)], "linalg_solve"),
    "a transform": (lambda x: torch.fft.rfft(x).abs(), (5, 7), [], "fft"),
    "distances": (lambda x, w: torch.cdist(x, w), (5, 7), [(3, 7)], "dist"),
    "sparse": (lambda x: torch.sparse.mm(torch.eye(5).to_sparse(), x), (5, 7), [], "sparse|kind of their own"),
    "nested": (
        lambda x, w: F.linear(torch.nested.as_nested_tensor([x, x[:2]], layout=torch.jagged), w).values(),
        (5, 7), [(3, 7)], "linear.default has no formula|kind of their own",
    ),
    "eight-bit weights in a library": (
        lambda x, w: torch.ops.test_foreign.product(x, w), (5, 7), [(3, 7)], "test_foreign.product"
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def library() -> Any:
    made = torch.library.Library("test_foreign", "DEF")
    made.define("product(Tensor x, Tensor w) -> Tensor")
    made.impl("product", lambda x, w: x @ w.T, "CPU")
    yield
    made._destroy()


@pytest.mark.parametrize("what", UNKNOWNS)
@pytest.mark.filterwarnings("ignore")
def test_what_has_no_formula_is_unknown(what: str, library: Any) -> None:
    call, shape, weights, said = UNKNOWNS[what]
    x, model = torch.randn(shape), Calls(call, *weights)
    with torch.no_grad():
        expected = model(x)
    flops, basis, note = counts(model, x)
    assert isinstance(flops, Missing)
    assert basis == UNKNOWN
    assert any(each in note for each in said.split("|")), note
    with torch.no_grad():
        assert torch.equal(model(x), expected)


def test_our_own_operations_in_somebodys_module_give_no_wrong_number() -> None:
    """Some are operators of torch, some loops that nothing of torch sees; or torch's own, which are counted."""
    import geneformer_kernels as kernels

    cells, up, down = torch.tensor([0, 2, 5]), torch.randn(48, 8), torch.randn(8, 48)
    norm = torch.ones(8), torch.zeros(8)

    def attention(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return kernels.varlen_attention_qkv((x @ w).view(5, 3, 1, 8), cu_seqlens=cells)

    def half(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        half = kernels.feed_forward(x @ w, up, None, down, None, activation="relu")
        return kernels.residual_layernorm(half, x, *norm, eps=1e-5, norm="post")[0]

    for call, width, flops in (
        (attention, 24, 2 * 5 * 8 * 24 + 4 * 8 * (4 + 9)),
        (half, 8, 2 * 5 * 8 * 8 + 4 * 5 * 8 * 48),
    ):
        for dtype in (torch.float32, torch.bfloat16):
            model = Calls(call, (8, width)).to(dtype)
            up, down = up.to(dtype), down.to(dtype)
            found, basis, _ = counts(model, torch.randn(5, 8, dtype=dtype))
            assert (isinstance(found, Missing) and basis == UNKNOWN) or found == flops
        up, down = up.float(), down.float()


def test_a_gradient_by_a_kernel_of_its_own_is_noticed() -> None:
    model = Calls(lambda x, w: OwnBackward.apply(x, w), (3, 7))
    x = torch.randn(5, 7)
    assert counts(model, x)[1] == COUNTED

    def step() -> None:
        model(x).sum().backward()
        torch.optim.SGD(model.parameters(), lr=0.1).step()

    assert "does not see" in count_foreign(model, step)[2]


def test_recurrent_layers_on_a_cpu() -> None:
    layer = nn.LSTM(7, 4)
    found = count_foreign(layer, lambda: layer(torch.randn(5, 2, 7)))
    assert found[1] == UNKNOWN or found[0] == 5 * 2 * 2 * 16 * (7 + 4)
    cell = nn.LSTMCell(7, 4)
    assert count_foreign(cell, lambda: cell(torch.randn(2, 7)))[0] == 2 * 2 * 16 * (7 + 4)


def test_the_step_of_an_ordinary_loop() -> None:
    """Dropout, norms, embeddings, a loss, clipping and an optimizer are no products; memory they take is written."""
    model = nn.Sequential(
        nn.Embedding(V, C), nn.LayerNorm(C), nn.Linear(C, WIDE), nn.GELU(), nn.Dropout(0.1), nn.Linear(WIDE, V)
    )
    optimizer = torch.optim.AdamW(model.parameters())

    def step() -> None:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(IDS).flatten(0, 1), IDS.flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    for _ in range(2):
        flops, basis, note = count_foreign(model, step)
        assert (flops, basis) == (3 * 2 * 24 * (C * WIDE + WIDE * V), COUNTED), note


def test_a_batch_may_be_made_within_the_step() -> None:
    model = nn.Linear(C, WIDE)

    def step() -> None:
        batch = torch.ones(5, C) + torch.empty(5, C).normal_()
        model(batch).sum().backward()

    assert count_foreign(model, step)[:2] == (2 * 2 * 5 * C * WIDE, COUNTED)


def test_a_compiled_model_is_counted_uncompiled() -> None:
    model, x = nn.Sequential(nn.Linear(C, WIDE), nn.ReLU()), torch.randn(5, C)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for _ in range(2):  # before anything was compiled, and after
        assert count_foreign(compiled, lambda: compiled(x).sum().backward())[:2] == (2 * 2 * 5 * C * WIDE, COUNTED)
        compiled(x)


def test_autocast_changes_no_count() -> None:
    model, x = nn.Linear(C, WIDE), torch.randn(5, C)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            model(x).sum().backward()

    assert count_foreign(model, step)[0] == 2 * 2 * 5 * C * WIDE


def test_counting_changes_nothing() -> None:
    model = bert(attention="sdpa").train()
    other = copy.deepcopy(model)
    torch.manual_seed(3)
    model(IDS, attention_mask=MASK, labels=IDS).loss.backward()
    torch.manual_seed(3)
    replay, hooks = torch.cuda.CUDAGraph.replay, len(other._forward_hooks)
    count_foreign(other, lambda: other(IDS, attention_mask=MASK, labels=IDS).loss.backward())
    for mine, its in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine.grad, its.grad)
    assert torch.cuda.CUDAGraph.replay is replay
    assert len(other._forward_hooks) == len(other._forward_pre_hooks) == hooks


def test_an_error_in_the_step_goes_through_and_leaves_nothing() -> None:
    model = nn.Linear(2, 3)
    with pytest.raises(RuntimeError, match="shapes"), ForeignCounter(model):
        model(torch.randn(5, 7))
    assert not model._forward_hooks
    assert torch.utils._python_dispatch._get_current_dispatch_mode() is None


def test_what_runs_elsewhere_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = nn.Linear(2, 3), torch.randn(5, 2)
    assert "not called" in count_foreign(model, lambda: x @ x.T)[2]

    def threaded() -> None:
        thread = threading.Thread(target=model, args=(x,))
        thread.start()
        thread.join()

    assert "another thread" in count_foreign(model, threaded)[2]
    assert "TorchScript" in count_foreign(torch.jit.trace(model, x), lambda: None)[2]
    replayed: list[Any] = []
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", replayed.append)

    def graph() -> None:
        model(x)
        torch.cuda.CUDAGraph.replay("a graph")  # type: ignore[arg-type]

    assert "CUDA graph" in count_foreign(model, graph)[2]
    assert replayed == ["a graph"]


def test_a_formula_that_does_not_fit_ends_no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(foreign._FORMULAS, "aten::addmm", lambda named, out: 1 // 0)
    model = nn.Linear(2, 3)
    flops, _, note = count_foreign(model, lambda: model(torch.randn(5, 2)).sum().backward())
    assert isinstance(flops, Missing)
    assert "ZeroDivisionError" in note
    assert model.weight.grad is not None


@pytest.mark.parametrize(
    ("name", "does"),
    [
        ("mm", True), ("_int_mm", True), ("addmm_", True), ("_weight_int4pack_mm", True), ("_foreach_mm", True),
        ("mkldnn_rnn_layer", True), ("_native_multi_head_attention", True), ("linalg_vector_norm", False),
        ("hamming_window", False), ("resolve_conj", False), ("_convert_indices_from_coo_to_csr", False),
        ("sqrt", False),
        ("lgamma", False), ("_fused_adamw_", False), ("upsample_bilinear2d", False), ("native_layer_norm", False),
        ("embedding_dense_backward", False), ("_log_softmax", False), ("_thnn_fused_lstm_cell", False),
    ],
)  # fmt: skip
def test_operators_are_told_by_name(name: str, does: bool) -> None:
    assert may_multiply(name) == does
