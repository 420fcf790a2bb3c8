"""A run is continued with what it began with or not at all, by one process at a time; a full disk costs it nothing."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import resource
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import toys
from ground import SHORT, Ground

import geneformer_fast as gf
from geneformer_fast import pretrain
from geneformer_fast.cli import main
from geneformer_fast.errors import CheckpointError, OutputError, TrainingError
from geneformer_fast.files.locks import folder_lock
from geneformer_fast.training.checkpoint import checkpoints_in
from geneformer_fast.training.logs import JsonLines, TensorBoard

TWO = dataclasses.replace(SHORT, steps=2, progress=False)


def other_tokens(folder: Path) -> Path:
    """As many cells and tokens as on the ground, of other genes."""
    cells = toys.cells(80, seed=3)
    cells.X = cells.X[:, ::-1].copy() if not hasattr(cells.X, "tocsc") else cells.X.tocsc()[:, ::-1].tocsr()
    gf.tokenize(cells, folder, dictionary=toys.vocabulary(), obs=["kind", "score"], progress=False)
    return folder


def options(ground: Ground) -> dict:
    return dict(config=ground.config(), recipe=TWO, eval_share=0.2, device="cpu")


def test_other_tokens_of_equal_lengths_are_refused(ground: Ground, tmp_path: Path) -> None:
    pretrain(ground.tokens, tmp_path / "run", **options(ground))
    other = gf.open_tokens(other_tokens(tmp_path / "other"))
    assert (other.n_cells, other.n_tokens) == (ground.tokens.n_cells, ground.tokens.n_tokens)
    with pytest.raises(OutputError, match="a run of other tokens, however alike they look"):
        pretrain(other, tmp_path / "run", resume=True, **options(ground))
    # The same tokens in another place are the same.
    same = tmp_path / "same"
    cells = toys.cells(80, seed=3)
    gf.tokenize(cells, same, dictionary=toys.vocabulary(), obs=["kind", "score"], progress=False)
    pretrain(same, tmp_path / "run", resume=True, **options(ground))


def test_other_evaluation_tokens_are_refused(ground: Ground, tmp_path: Path) -> None:
    chosen = {**options(ground), "eval_share": None}
    pretrain(ground.tokens, tmp_path / "run", eval_tokens=ground.tokens.path, **chosen)
    with pytest.raises(OutputError, match="other tokens to evaluate on"):
        pretrain(ground.tokens, tmp_path / "run", eval_tokens=other_tokens(tmp_path / "other"), resume=True, **chosen)


def test_another_checkpoint_to_begin_with_is_refused(ground: Ground, tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 2)):
        torch.manual_seed(seed)
        gf.save(gf.Encoder(ground.config(), head="mlm"), tmp_path / name)
    chosen = dict(recipe=TWO, eval_share=0, device="cpu")
    pretrain(ground.tokens, tmp_path / "run", init=tmp_path / "a", **chosen)
    for init in (tmp_path / "b", None):
        with pytest.raises(OutputError, match="other weights to begin with"):
            pretrain(ground.tokens, tmp_path / "run", init=init, config=ground.config(), resume=True, **chosen)
    pretrain(ground.tokens, tmp_path / "run", init=tmp_path / "a", resume=True, **chosen)
    # fit looks at the weights of the model that it is given.
    ground.fit(ground.model(), TWO, out=tmp_path / "fit")
    model = ground.model()
    with torch.no_grad():
        model.head.bias[0] += 1
    with pytest.raises(OutputError, match="other weights to begin with"):
        ground.fit(model, TWO, out=tmp_path / "fit", resume=True)


def test_fresh_weights_are_the_seeds_whatever_the_machine_draws(ground: Ground, tmp_path: Path, monkeypatch) -> None:
    pretrain(ground.tokens, tmp_path / "run", **options(ground))
    draw = torch.nn.Module.register_parameter
    monkeypatch.setattr(
        torch.nn.Module,
        "register_parameter",
        lambda self, name, p: (p is not None and p.data.add_(1e-3), draw(self, name, p)),
    )
    pretrain(ground.tokens, tmp_path / "run", resume=True, **options(ground))


def test_runs_of_earlier_versions_go_on_with_a_warning(ground: Ground, tmp_path: Path) -> None:
    pretrain(ground.tokens, tmp_path / "run", **options(ground))
    path = tmp_path / "run" / "run.json"
    content = json.loads(path.read_text())
    old = {key: value for key, value in content.items() if key not in ("tokens_content", "weights")}
    path.write_text(json.dumps(old))
    with pytest.warns(UserWarning, match="of an earlier version, which did not write down what its tokens and weights"):
        pretrain(ground.tokens, tmp_path / "run", resume=True, **options(ground))
    assert json.loads(path.read_text()) == content
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pretrain(ground.tokens, tmp_path / "run", resume=True, **options(ground))


def test_the_machine_may_change(ground: Ground, tmp_path: Path) -> None:
    long = dataclasses.replace(TWO, steps=4, save_every=2)

    def stop(record) -> None:
        if record.step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ground.fit(ground.model(), long, out=tmp_path / "run", on_step=stop)
    other = dataclasses.replace(
        long, precision="float16", token_budget=300, workers=0, save_every=1, keep=3, is_recomputing=True
    )
    history = ground.fit(ground.model(), other, out=tmp_path / "run", resume=True)
    assert [record.step for record in history.steps] == [3, 4]


def test_two_at_once_is_one_sentence(ground: Ground, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    with folder_lock(run):
        for resume in (False, True):
            with pytest.raises(OutputError, match="run is being written by another process"):
                pretrain(ground.tokens, run, resume=resume, **options(ground))
        gf.save(ground.model(), tmp_path / "model")
        words = ["pretrain", str(ground.tokens.path), "--out", str(run), "--config", str(tmp_path / "model"), "--quiet"]
        assert main(words) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        assert "being written by another process" in said
        assert not list(run.iterdir())

    refused = []

    def again(record) -> None:  # a second run from within the first, as from another thread
        import threading

        def second() -> None:
            try:
                pretrain(ground.tokens, run, resume=True, **options(ground))
            except OutputError as error:
                refused.append(str(error))

        thread = threading.Thread(target=second)
        thread.start()
        thread.join()

    final = pretrain(ground.tokens, run, on_step=again, **options(ground))
    assert len(refused) == 2
    assert gf.load(final)


def test_what_killed_runs_leave_never_blocks_resume(ground: Ground, tmp_path: Path) -> None:
    run = tmp_path / "run"
    leftovers = [".run.json.tmp", ".log.jsonl.partial", ".DS_Store", ".run.json.abc.part/run.json", ".final.partial/x"]

    def leave() -> None:
        for name in leftovers:
            (run / name).parent.mkdir(parents=True, exist_ok=True)
            (run / name).write_text("{")

    leave()
    pretrain(ground.tokens, run, resume=True, **options(ground))
    leave()
    (run / "checkpoints" / ".step-00000002.xyz.part").mkdir()
    (run / "checkpoints" / ".step-00000002.partial").mkdir()
    pretrain(ground.tokens, run, resume=True, **options(ground))
    assert [path.name for path in run.rglob(".*")] == [".DS_Store"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match="holds files that are no training run"):
        pretrain(ground.tokens, tmp_path / "mine", resume=True, **options(ground))


@contextlib.contextmanager
def room_for(n_bytes: int) -> Iterator[None]:
    """Files that grow beyond this fail as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def bits(folder: Path) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in gf.load(folder).state_dict().items()}


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Sums of products come out in an order that depends on the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
def test_a_full_disk_is_one_sentence_and_resume_goes_on(ground: Ground, tmp_path: Path) -> None:
    long = {**options(ground), "recipe": dataclasses.replace(TWO, steps=6, save_every=2)}
    whole = pretrain(ground.tokens, tmp_path / "whole", **long)
    size = (whole / "model.safetensors").stat().st_size
    run = tmp_path / "run"
    for step in (3, 5):  # the next checkpoint finds no room
        with contextlib.ExitStack() as stack:

            def fill(record, step=step, stack=stack) -> None:
                if record.step == step:
                    stack.enter_context(room_for(size // 2))

            with pytest.raises(OutputError, match=rf"step-0000000{step + 1}/model\.safetensors cannot be written"):
                pretrain(ground.tokens, run, resume=True, on_step=fill, **long)
        assert [path.name for path in checkpoints_in(run / "checkpoints")][-1] == f"step-0000000{step - 1}"
        assert not list((run / "checkpoints").glob(".*"))
    with room_for(size // 2), pytest.raises(OutputError, match=r"cannot be written"):
        pretrain(ground.tokens, run, resume=True, **long)
    assert not (run / "final").exists()
    assert bits(pretrain(ground.tokens, run, resume=True, **long)) == bits(whole)
    assert (run / "log.jsonl").read_text().count("\n") == (tmp_path / "whole" / "log.jsonl").read_text().count("\n")


def test_a_log_without_room_is_one_sentence(tmp_path: Path) -> None:
    log = JsonLines(tmp_path)
    log.step({"step": 1, "loss": 2.0})
    with (
        room_for((tmp_path / "log.jsonl").stat().st_size + 5),
        pytest.raises(OutputError, match=r"log\.jsonl cannot be"),
    ):
        log.step({"step": 2, "loss": 1.0})
    log.close()
    (tmp_path / "log.jsonl").write_text('{"step": 1}\n[]\n{"step": 2, "lo')
    with pytest.warns(UserWarning, match="1 damaged lines are left out"):
        JsonLines(tmp_path, 5).close()
    assert (tmp_path / "log.jsonl").read_text() == '{"step": 1}\n'


def test_tensorboard_without_room_is_one_sentence(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tensorboard")
    board = TensorBoard(tmp_path)

    def say() -> None:
        for step in range(3000):
            board.step({"step": step, "loss": 1.0})

    with room_for(200):
        with pytest.raises(OutputError, match="tensorboard cannot be written"):
            say()
        with pytest.raises(OutputError, match="tensorboard cannot be written"):
            board.close()
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"step": -1}, "step is -1"),
        ({"n_worse": "many"}, "n_worse"),
        ({"evaluations": [{"step": []}]}, "evaluations"),
        ({"world_size": None}, "world_size"),
    ],
)
def test_a_state_that_says_something_else_is_named(ground: Ground, tmp_path: Path, change: dict, said: str) -> None:
    ground.fit(ground.model(), TWO, out=tmp_path / "run")
    (last,) = checkpoints_in(tmp_path / "run" / "checkpoints")
    content = json.loads((last / "state.json").read_text())
    content.pop("sha256")
    (last / "state.json").write_text(json.dumps({**content, **change}))
    with pytest.raises(CheckpointError, match=rf"state\.json: .*{said}"):
        ground.fit(ground.model(), TWO, out=tmp_path / "run", resume=True)


def test_ctrl_c_names_the_step_and_how_to_go_on(ground: Ground, tmp_path: Path, capsys, monkeypatch) -> None:
    from geneformer_fast.training import loop

    gf.save(ground.model(), tmp_path / "model")
    words = ["pretrain", str(ground.tokens.path), "--out", str(tmp_path / "run"), "--config", str(tmp_path / "model")]
    words += ["--steps", "9", "--batch-cells", "16", "--token-budget", "150", "--save-every", "2"]
    words += ["--device", "cpu"]
    after = loop._Run._after_step

    def stopping(run, piece) -> None:
        after(run, piece)
        if run.step == 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(loop._Run, "_after_step", stopping)
        assert main(words) == 130
    said = capsys.readouterr().err
    assert "interrupted: after step 5; the last checkpoint is of step 4, in" in said
    assert "run the same command with --resume (resume=True) to go on" in said
    assert main([*words, "--resume"]) == 0
    assert "9 steps" in capsys.readouterr().out


def test_cells_are_counted_before_the_first_step(ground: Ground, tmp_path: Path) -> None:
    said: list[str] = []
    chosen = {**options(ground), "eval_share": None}
    pretrain(ground.tokens, tmp_path / "a", tell=said.append, eval_column=("kind", ["a"]), **chosen)
    n = sum(kind == "a" for kind in ground.tokens.column("kind").to_pylist())
    assert said == [f"training {80 - n} cells ({(80 - n) / 80:.1%}); validation {n} cells ({n / 80:.1%})"]


def test_a_loss_that_comes_apart_is_said(ground: Ground) -> None:
    wild = dataclasses.replace(SHORT, learning_rate=30.0, warmup_share=0.0, epochs=4, clip=None)
    with (
        pytest.warns(
            UserWarning, match=r"the loss is .*equally likely gives 4\.\d+: training has come apart"
        ) as caught,
        contextlib.suppress(TrainingError),
    ):
        ground.fit(ground.model(), wild)
    assert len([entry for entry in caught if "come apart" in str(entry.message)]) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ground.fit(ground.model(), SHORT)


def test_divergence_has_no_false_alarms_and_sees_a_plateau_above_guessing() -> None:
    from geneformer_fast.training.divergence import Divergence

    calm = Divergence(0.7)
    assert not any(calm.look(step, loss) for step, loss in enumerate([5.0, 0.7, 3.0, 0.1] * 50))
    high = Divergence(0.7)
    said = [high.look(step, 2.5) for step in range(200)]
    assert [step for step, text in enumerate(said) if text] == [49]
    assert "the mean loss of the last 50 steps is 2.5" in said[49]
    assert Divergence(None).look(1, 1e9) is None


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_emulated_precisions_are_said(ground: Ground, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from geneformer_kernels import target

    from geneformer_fast import config
    from geneformer_fast.training import engine

    recipe = dataclasses.replace(TWO, precision=precision)
    monkeypatch.setattr(config, "has_float16", lambda: False)
    monkeypatch.setattr(target, "target_of", lambda device: target.Target("cpu", features=frozenset({"avx2"})))
    with pytest.warns(UserWarning, match=f"no {precision} of its own.*take precision 'float32', or 'auto'"):
        engine.Engine(ground.model(), ground.objective().loss, recipe, engine.distributed.Ranks())
    monkeypatch.setattr(config, "has_float16", lambda: True)
    fast = target.Target("cpu", features=frozenset({"avx512_bf16"}))
    monkeypatch.setattr(target, "target_of", lambda device: fast)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in (precision, "float32", "auto"):
            how = dataclasses.replace(TWO, precision=name)
            engine.Engine(ground.model(), ground.objective().loss, how, engine.distributed.Ranks())
