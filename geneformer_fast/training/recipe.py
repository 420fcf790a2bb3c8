"""How to train: one frozen record of every choice, and the published recipes by name."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from geneformer_fast import families
from geneformer_fast.arguments import checked, renamed_fields, with_new_names
from geneformer_fast.data.masking import Masking
from geneformer_fast.errors import UnsupportedError
from geneformer_fast.files.schema import check_fields
from geneformer_fast.training.schedule import SCHEDULES, Schedule

PRECISIONS = ("auto", "float32", "bfloat16", "float16")
PARALLEL = ("ddp", "fsdp")
#: What may differ when a run continues: where and how it is computed and watched, not what is computed.
MACHINE = (
    *("token_budget", "precision", "is_recomputing", "workers", "parallel"),
    *("log_every", "save_every", "keep", "progress", "tensorboard", "wandb"),
)
#: Old name -> name of fields: recipes in files, and runs that were begun by earlier versions, have the old ones.
RENAMED = {"warmup_ratio": "warmup_share", "floor_ratio": "floor_share", "is_showing_progress": "progress"}
# Far beyond any run: they keep a wrong digit from counting steps, or starting threads, for ever.
_BOUNDS = {"epochs": (0.0, 1e6), "steps": (0, 10**9), "workers": (-math.inf, 1024)}


@renamed_fields(**RENAMED)
@dataclass(frozen=True)
class Recipe:
    """How to train.

    Attributes
    ----------
    epochs, steps
        How long: passes over the training cells (fractions are fine), or optimizer steps where ``steps`` is given.
    max_seconds
        End after this time at the latest. The learning rate follows time or steps, whichever is further along, so that
        it has fallen by then; what comes out depends on the machine.
    batch_cells, batch_tokens
        Size of one optimizer step, over all ranks: cells, as papers state it, or tokens. Exactly one is given.
    token_budget
        Most tokens that go through the model at once on one device. Larger steps are accumulated, each masked gene
        counting once, whatever piece it is in.
    learning_rate
        The peak.
    schedule, warmup_steps, warmup_share, floor, floor_share, power, decay
        See :class:`Schedule`. The rise takes ``warmup_steps``, or where that is None this share of all steps; ``floor``
        is the final learning rate over the peak, ``floor_share`` the share of steps at the end spent there; ``decay``
        is what ``"step"`` multiplies the rate by after every epoch.
    betas, eps, weight_decay, decays_all
        AdamW; ``decays_all`` decays biases and LayerNorm too.
    clip
        Largest norm of the gradient of the mean loss; None does not clip.
    precision
        Of matrix products: ``"float32"``, by autocast ``"bfloat16"`` or ``"float16"`` (the latter with loss scaling),
        or ``"auto"``, the fastest on the device. Parameters, optimizer and residual stream are float32 in any case.
    is_recomputing
        Keep only the inputs of blocks, and compute their insides again in the backward pass.
    masking
        For pretraining.
    seed
        Of orders, masks, dropout, and where `pretrain` makes the model of its weights.
    eval_every, save_every
        Steps between evaluations and between checkpoints; None: at the end of every epoch, and checkpoints every 1,000
        steps too.
    keep
        Checkpoints kept; older ones are removed.
    monitor, is_greater_better, patience
        The metric that decides which evaluation was best, and after how many evaluations without a better one training
        stops; None never stops early.
    is_best_restored
        Whether the model ends with the weights of the best evaluation rather than the last.
    workers
        Threads that read and mask ahead; 0 none.
    parallel
        Under torchrun: ``"ddp"`` replicates the model, ``"fsdp"`` shards parameters, gradients and optimizer.
    log_every
        Steps between lines of the log.
    tensorboard
        Whether to write TensorBoard files too.
    wandb
        Project of Weights & Biases to report to; None reports to none.
    progress
        Whether to show a progress bar; None shows one on a terminal, and lines of the log elsewhere.
    """

    epochs: float = 3.0
    steps: int | None = None
    max_seconds: float | None = None
    batch_cells: int | None = 144
    batch_tokens: int | None = None
    token_budget: int = 16_384
    learning_rate: float = 1e-3
    schedule: str = "linear"
    warmup_steps: int | None = None
    warmup_share: float = 0.05
    floor: float = 0.0
    floor_share: float = 0.0
    power: float = 1.0
    decay: float = 0.9
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.001
    decays_all: bool = False
    clip: float | None = 1.0
    precision: str = "float32"
    is_recomputing: bool = False
    masking: Masking = field(default_factory=Masking)
    seed: int = 42
    eval_every: int | None = None
    save_every: int | None = None
    keep: int = 2
    monitor: str = "loss"
    is_greater_better: bool = False
    patience: int | None = None
    is_best_restored: bool = False
    workers: int = 1
    parallel: str = "ddp"
    log_every: int = 1
    tensorboard: bool = False
    wandb: str | None = None
    progress: bool | None = None

    def __post_init__(self) -> None:
        check_fields(self, UnsupportedError, _BOUNDS)
        choices = {"schedule": SCHEDULES, "precision": PRECISIONS, "parallel": PARALLEL}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise UnsupportedError(f"{name} must be one of {', '.join(allowed)}, not {getattr(self, name)!r}")
        if (self.batch_cells is None) == (self.batch_tokens is None):
            raise UnsupportedError("give either batch_cells or batch_tokens, and set the other one to None")
        at_least_one = (
            *("steps", "batch_cells", "batch_tokens", "token_budget", "eval_every", "save_every"),
            *("keep", "patience", "log_every"),
        )
        for name in at_least_one:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UnsupportedError(f"{name} must be at least 1, not {value}")
        for name in ("epochs", "learning_rate", "eps", "power", "max_seconds"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise UnsupportedError(f"{name} must be above 0 and finite, not {value}")
        for name in ("warmup_steps", "weight_decay", "workers", "seed"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise UnsupportedError(f"{name} must not be negative, but is {value}")
        if not 0 < self.decay <= 1:
            raise UnsupportedError(f"decay must be above 0 and at most 1, not {self.decay}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise UnsupportedError(f"betas must be from 0 to below 1, not {self.betas}")
        if self.clip is not None and not self.clip > 0:
            raise UnsupportedError(f"clip must be above 0, or None, not {self.clip}")
        shares = (self.warmup_share, self.floor, self.floor_share)
        if not all(0 <= share <= 1 for share in shares):
            raise UnsupportedError("warmup_share, floor and floor_share must be from 0 to 1")

    @classmethod
    @checked
    def preset(cls, name: str, **changes: Any) -> Recipe:
        """A published recipe by name (see :data:`RECIPES`), with fields changed by keyword."""
        if name not in RECIPES:
            raise UnsupportedError(f"no recipe named {name!r}; there are {', '.join(RECIPES)}")
        return dataclasses.replace(RECIPES[name], **changes)

    def schedule_for(self, n_steps: int, epoch_steps: float | None = None) -> Schedule:
        """The learning rate over ``n_steps``; an epoch has ``epoch_steps``, or where that is None as ``epochs`` say."""
        warmup = self.warmup_steps if self.warmup_steps is not None else math.ceil(self.warmup_share * n_steps)
        floor_steps = math.floor(self.floor_share * n_steps)
        each = n_steps / self.epochs if epoch_steps is None else epoch_steps
        return Schedule(self.schedule, n_steps, warmup, self.floor, floor_steps, self.power, self.decay, each)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {**dataclasses.asdict(self), "betas": list(self.betas)}

    @classmethod
    @checked
    def from_dict(cls, values: dict[str, Any], *, where: str | os.PathLike[str] | None = None) -> Recipe:
        """The inverse of :meth:`to_dict`; what is left out has its default, unknown fields are refused by name.

        Fields by their old names are taken, with a warning.

        Raises
        ------
        UnsupportedError
            Beginning with ``where``, the file the values come from, if there is one.
        """
        try:
            values = with_new_names("recipe" if where is None else str(where), RENAMED, values)
            known = {item.name for item in dataclasses.fields(cls)}
            if unknown := sorted(set(values) - known):
                raise UnsupportedError(
                    f"a recipe has no field {', '.join(unknown)}; there are {', '.join(sorted(known))}"
                )
            if isinstance(masking := values.get("masking"), dict):
                if unknown := sorted(set(masking) - {item.name for item in dataclasses.fields(Masking)}):
                    raise UnsupportedError(f"masking has no field {', '.join(unknown)}")
                values["masking"] = Masking(**masking)
            if isinstance(values.get("betas"), list):
                values["betas"] = tuple(values["betas"])
            return cls(**values)
        except UnsupportedError as error:
            raise UnsupportedError(f"{where}: {error}" if where is not None else str(error)) from None


class _Recipes(Mapping[str, Recipe]):
    """What the families say of how their models were trained."""

    def __getitem__(self, name: str) -> Recipe:
        known = families.recipes()
        fields = dict(known[name if name in known else families.preset_name(name) or name])
        return Recipe(**{**fields, "masking": Masking(**fields.get("masking", {}))})

    def __iter__(self) -> Iterator[str]:
        return iter(families.recipes())

    def __len__(self) -> int:
        return len(families.recipes())


#: Published recipes by name (:func:`geneformer_fast.families.recipes`).
RECIPES: Mapping[str, Recipe] = _Recipes()
