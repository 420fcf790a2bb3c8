"""What accelerate() does to a model besides its results: nothing that undo() does not take out again."""

from __future__ import annotations

import copy
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from small_berts import ARCHITECTURES, assert_same_step, bert, inputs, labels_for, step
from torch import nn

import geneformer_fast as gf
from geneformer_fast.drop_in.patch import PackedForward

transformers = pytest.importorskip("transformers")


def attributes(model: nn.Module) -> list[dict[str, Any]]:
    """Everything a model's modules hold, with hooks and submodules listed."""
    return [
        {name: dict(value) if isinstance(value, dict) else value for name, value in vars(module).items()}
        for module in model.modules()
    ]


def is_packed(model: nn.Module) -> bool:
    return any(isinstance(vars(module).get("forward"), PackedForward) for module in model.modules())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_undo_leaves_the_model_exactly_as_it_was(architecture: str) -> None:
    model, given = bert(architecture).eval(), inputs()
    model.register_forward_hook(lambda *_: None)
    with torch.no_grad():
        stock = model(**given, output_hidden_states=True)
        before, names = attributes(model), [name for name, _ in model.named_modules()]
        state = {name: value.clone() for name, value in model.state_dict().items()}
        handle = gf.accelerate(model)
        assert is_packed(model)
        assert [name for name, _ in model.named_modules()] == names
        assert model.state_dict().keys() == state.keys()
        model(**given, output_hidden_states=True)
        handle.undo()
        assert attributes(model) == before
        assert "forward" not in vars(model)
        assert model.forward.__func__ is type(model).forward
        again = model(**given, output_hidden_states=True)
    assert type(again) is type(stock)
    for ours, theirs in zip(again.hidden_states, stock.hidden_states, strict=True):
        assert torch.equal(ours, theirs)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_twice_is_once() -> None:
    model, given = bert("BertForMaskedLM").eval(), inputs()
    before = attributes(model)
    first, second = gf.accelerate(model), gf.accelerate(model)
    with torch.no_grad():
        packed = model(**given).logits
    second.undo()
    assert attributes(model) == before
    first.undo()
    second.undo()
    assert attributes(model) == before
    gf.accelerate(model)
    with torch.no_grad():
        assert torch.equal(model(**given).logits, packed)


def test_one_model_is_accelerated_and_no_other() -> None:
    model, other = bert("BertForMaskedLM"), bert("BertForMaskedLM")
    forwards = {name: getattr(transformers, name).forward for name in ARCHITECTURES}
    gf.accelerate(model)
    assert not is_packed(other)
    assert {name: getattr(transformers, name).forward for name in ARCHITECTURES} == forwards
    assert not is_packed(bert("BertForMaskedLM"))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(
    "how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_copies_are_accelerated_models_of_their_own(architecture: str, how: Any) -> None:
    model, given = bert(architecture).train(), inputs()
    labels = labels_for(model, given)
    stock = step(model, given, labels)
    handle = gf.accelerate(model)
    other = how(model)
    for name, module in other.named_modules():
        forward = vars(module).get("forward")
        assert forward is None or forward.module is module, name
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert_same_step(step(other, given, labels), stock)
    handle.undo()
    assert is_packed(other)
    gf.accelerate(other).undo()
    assert not is_packed(other)
    assert_same_step(step(other, given, labels), stock)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_saved_weights_are_plain(architecture: str, tmp_path: Path) -> None:
    model = bert(architecture)
    model.save_pretrained(tmp_path / "stock")
    gf.accelerate(model)
    model.save_pretrained(tmp_path / "ours")
    names = [sorted(path.name for path in (tmp_path / which).iterdir()) for which in ("stock", "ours")]
    assert names[0] == names[1]
    for name in names[0]:
        assert (tmp_path / "stock" / name).read_bytes() == (tmp_path / "ours" / name).read_bytes()
    again = getattr(transformers, architecture).from_pretrained(tmp_path / "ours")
    assert not is_packed(again)


def test_trainers_read_the_stock_signature() -> None:
    import inspect

    model = bert("BertForMaskedLM")
    before = inspect.signature(model.forward)
    gf.accelerate(model)
    assert inspect.signature(model.forward) == before


def test_replicas_run_with_their_own_weights() -> None:
    """nn.DataParallel copies a module's attributes, and would otherwise call the forward of the original."""
    model, given = bert("BertForMaskedLM").train(), inputs()
    labels = labels_for(model, given)
    gf.accelerate(model)
    with torch.no_grad():
        expected = model(**given, **labels).loss
    replicas = {module: module._replicate_for_data_parallel() for module in model.modules()}
    for module, replica in replicas.items():
        for name, child in module._modules.items():
            if child is not None:
                replica._modules[name] = replicas[child]
                setattr(replica, name, replicas[child])
        for name, parameter in module._parameters.items():
            if parameter is not None:
                setattr(replica, name, parameter.detach().clone())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
        output = replicas[model](**given, **labels)
    assert list(output.keys()) == ["loss"]
    torch.testing.assert_close(output.loss, expected)


def as_of_sharding(hook: Any) -> Any:
    """A hook as torch's sharding sets it: it looks at no shape, and packed cells are handed to what it is on."""
    hook.__module__ = "torch.distributed.fsdp"
    return hook


@pytest.mark.parametrize("kind", ["Linear", "LayerNorm", "Dropout", "BertSelfOutput", "BertIntermediate", "BertOutput"])
@pytest.mark.parametrize("when", ["pre", "post", "backward"])
def test_hooks_of_sharding_run_and_cells_stay_packed(kind: str, when: str) -> None:
    model, given = bert("BertForMaskedLM").train(), inputs()
    labels = labels_for(model, given)
    stock = step(model, given, labels)
    gf.accelerate(model)
    called: set[str] = set()
    hooked = [(name, m) for name, m in model.bert.named_modules() if type(m).__name__ == kind]
    for name, module in hooked:
        register = {
            "pre": module.register_forward_pre_hook,
            "post": module.register_forward_hook,
            "backward": module.register_full_backward_hook,
        }[when]
        register(as_of_sharding(lambda *_, name=name: called.add(name) or None))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert_same_step(step(model, given, labels), stock)
    expected = {name for name, _ in hooked if kind != "Dropout" or "self" not in name.split(".")}
    assert called == expected


@pytest.mark.parametrize("kind", ["BertEmbeddings", "BertEncoder", "BertLayer", "BertAttention", "BertSelfAttention"])
def test_hooks_on_containers_run_too(kind: str) -> None:
    model, given, seen = bert("BertModel").eval(), inputs(), []
    hooked = [module for module in model.modules() if type(module).__name__ == kind]
    with torch.no_grad():
        stock = model(**given).pooler_output
        gf.accelerate(model)
        for module in hooked:
            module.register_forward_hook(lambda module, args, out: seen.append(module))
        ours = model(**given).pooler_output
    assert seen == hooked
    torch.testing.assert_close(ours, stock, atol=1e-5, rtol=1e-5)


def test_a_hook_that_changes_a_result_changes_the_result() -> None:
    model, given = bert("BertModel").eval(), inputs()
    model.encoder.layer[0].intermediate.dense.register_forward_hook(lambda m, args, out: out * 0.5)
    model.encoder.layer[1].attention.self.key.register_forward_hook(lambda m, args, out: out + 0.3)
    with torch.no_grad():
        stock = model(**given).pooler_output
        gf.accelerate(model)
        torch.testing.assert_close(model(**given).pooler_output, stock, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["Linear", "LayerNorm", "BertSelfOutput", "BertOutput", "BertEmbeddings"])
@pytest.mark.parametrize("is_autocast", [False, True])
def test_hooked_modules_get_the_dtypes_of_the_stock_model(kind: str, is_autocast: bool) -> None:
    """The residual stream is float32 inside; a module of a bfloat16 model is handed bfloat16 all the same."""
    model, given = bert("BertModel").to(torch.float32 if is_autocast else torch.bfloat16).eval(), inputs()
    seen: dict[str, list[tuple[torch.dtype, ...]]] = {}
    sizes: list[int] = []

    def note(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
            seen.setdefault(name, []).append((*(each.dtype for each in args), out.dtype))
            sizes.append(out.shape[:-1].numel())

        return as_of_sharding(hook)

    for name, module in model.encoder.named_modules() if kind != "BertEmbeddings" else model.named_modules():
        if type(module).__name__ == kind:
            module.register_forward_hook(note(name))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=is_autocast):
        stock = model(**given)
        gf.accelerate(model)
        ours = model(**given)
    assert seen
    n_tokens = given["attention_mask"].numel() if kind == "BertEmbeddings" else int(given["attention_mask"].sum())
    assert n_tokens in sizes
    for name, (theirs, mine) in seen.items():
        # Under autocast a product may be handed what autocast would make of its input.
        assert mine[1:] == theirs[1:], name
        assert mine[0] in (theirs[0], torch.bfloat16), name
    assert ours.last_hidden_state.dtype == stock.last_hidden_state.dtype
    keep = given["attention_mask"].bool()
    torch.testing.assert_close(ours.last_hidden_state[keep], stock.last_hidden_state[keep], atol=0.1, rtol=0.05)


def test_noise_of_hooks_on_embeddings_has_the_shape_they_expect() -> None:
    """NEFTune scales its noise by the length that it sees."""
    model, given, shapes = bert("BertModel").train(), inputs(), []
    gf.accelerate(model)
    model.embeddings.word_embeddings.register_forward_hook(lambda m, args, out: shapes.append([*out.shape]))
    model(**given)
    assert shapes == [[4, 40, 32]]


def test_a_clear_word_where_transformers_is_absent() -> None:
    import subprocess
    import sys

    code = (
        "import sys; sys.modules['transformers'] = None\n"
        "import geneformer_fast\n"
        "try: geneformer_fast.accelerate\n"
        "except geneformer_fast.errors.UnsupportedError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", "import geneformer_fast.errors\n" + code], capture_output=True, text=True, check=False
    )
    assert "pip install 'geneformer-fast[hf]'" in done.stdout, done.stderr
