"""torch.compile around an accelerated model: same results, and one graph for the whole encoder."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_berts import ARCHITECTURES, assert_same_step, bert, inputs, labels_for, step

import geneformer_fast as gf

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture(autouse=True)
def fresh_compiler() -> Any:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "architecture",
    [pytest.param(each, marks=[pytest.mark.slow] * (each != "BertForMaskedLM")) for each in ARCHITECTURES],
)
def test_step_of_a_compiled_model(architecture: str) -> None:
    model, given = bert(architecture, num_hidden_layers=1).double().train(), inputs()
    labels = labels_for(model, given)
    stock = step(model, given, labels)
    handle = gf.accelerate(model)
    compiled = torch.compile(model, backend="aot_eager")
    ours = step(compiled, given, labels)
    assert_same_step({name.removeprefix("_orig_mod."): value for name, value in ours.items()}, stock, atol=1e-11)
    # Undone under a compiled model, the stock forward is compiled in its place.
    handle.undo()
    again = step(compiled, given, labels)
    assert_same_step({name.removeprefix("_orig_mod."): value for name, value in again.items()}, stock)


@pytest.mark.slow
def test_other_lengths_and_evaluation_after_training() -> None:
    model = bert("BertForMaskedLM").train()
    gf.accelerate(model)
    compiled = torch.compile(model, backend="aot_eager")
    for lengths in ([40, 3], [33, 21, 5], [7, 7], [1]):
        given = inputs(lengths)
        labels = labels_for(model, given)
        torch.testing.assert_close(
            compiled(**given, **labels).loss, model(**given, **labels).loss, atol=1e-5, rtol=1e-5
        )
        model.eval()
        with torch.no_grad():
            torch.testing.assert_close(compiled(**given).logits, model(**given).logits, atol=1e-5, rtol=1e-5)
        model.train()


def test_the_graph_breaks_where_padding_goes_and_nowhere_else() -> None:
    model, given = bert("BertForTokenClassification").eval(), inputs()
    gf.accelerate(model)
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, example: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    with torch.no_grad():
        torch.compile(model, backend=backend)(**given)
    attending = [sum("varlen_attention" in str(node.target) for node in graph.graph.nodes) for graph in graphs]
    assert sorted(attending) == [0] * (len(graphs) - 1) + [model.config.num_hidden_layers]
    reasons = torch._dynamo.utils.counters["graph_break"]
    assert reasons
    assert all("_looked_at" in reason for reason in reasons)


@pytest.mark.slow
def test_a_compiled_function_may_read_logits() -> None:
    model, given = bert("BertForMaskedLM").train(), inputs()
    labels = labels_for(model, given)
    gf.accelerate(model)

    def total(given: dict[str, torch.Tensor], labels: dict[str, torch.Tensor]) -> torch.Tensor:
        output = model(**given, **labels)
        return output.loss + output.logits.square().mean()

    torch.testing.assert_close(torch.compile(total, backend="aot_eager")(given, labels), total(given, labels))


@pytest.mark.slow
def test_recomputing_in_a_compiled_model() -> None:
    from small_berts import recompute

    model, given = bert("BertForMaskedLM").train(), inputs()
    labels = labels_for(model, given)
    stock = step(model, given, labels)
    gf.accelerate(model)
    recompute(model, is_reentrant=False)
    ours = step(torch.compile(model, backend="aot_eager"), given, labels)
    assert_same_step({name.removeprefix("_orig_mod."): value for name, value in ours.items()}, stock)
