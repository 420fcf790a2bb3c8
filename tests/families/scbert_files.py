"""Small checkpoints as scBERT's tools write them, and a plain PerformerLM to hold results against."""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import Any

import torch
import torch.nn.functional as F
from formula_weights import formula_weights


def shapes_of(
    *, dim: int = 20, depth: int = 2, heads: int = 2, dim_head: int = 8, n_features: int = 16, length: int = 9,
    n_tokens: int = 7, n_classes: int | None = None,
) -> dict[str, list[int]]:  # fmt: skip
    """Names and shapes in the order of the state dict; with ``n_classes`` of a fine-tuned model."""
    inner, found = heads * dim_head, {"token_emb.weight": [n_tokens, dim], "pos_emb.emb.weight": [length, dim]}
    found["performer.calls_since_last_redraw"] = []
    for i in range(depth):
        attention, feed_forward = (f"performer.net.layers.{i}.{half}." for half in "01")
        found |= {f"{attention}norm.weight": [dim], f"{attention}norm.bias": [dim]}
        found[f"{attention}fn.fast_attention.projection_matrix"] = [n_features, dim_head]
        found |= {f"{attention}fn.to_{part}.weight": [inner, dim] for part in "qkv"}
        found |= {f"{attention}fn.to_out.weight": [dim, inner], f"{attention}fn.to_out.bias": [dim]}
        found |= {f"{feed_forward}norm.weight": [dim], f"{feed_forward}norm.bias": [dim]}
        found |= {f"{feed_forward}fn.fn.w1.weight": [4 * dim, dim], f"{feed_forward}fn.fn.w1.bias": [4 * dim]}
        found |= {f"{feed_forward}fn.fn.w2.weight": [dim, 4 * dim], f"{feed_forward}fn.fn.w2.bias": [dim]}
    found |= {"norm.weight": [dim], "norm.bias": [dim]}
    if n_classes is None:
        return found | {"to_out.weight": [n_tokens, dim], "to_out.bias": [n_tokens]}
    found |= {"to_out.conv1.weight": [1, 1, 1, dim], "to_out.conv1.bias": [1]}
    for name, (n_out, n_in) in {"fc1": (512, length), "fc2": (128, 512), "fc3": (n_classes, 128)}.items():
        found |= {f"to_out.{name}.weight": [n_out, n_in], f"to_out.{name}.bias": [n_out]}
    return found


def state_of(**sizes: Any) -> OrderedDict[str, torch.Tensor]:
    """The weights of shared/fixtures/scbert_tiny.json, in float64."""
    shapes = shapes_of(**sizes)
    # Positions have a formula of their own, and the counter none: they are not counted.
    names = [name for name in shapes if not name.startswith(("pos_emb", "performer.calls"))]
    tensors = formula_weights(names, shapes, lambda name: name.endswith("norm.weight"))
    for name in shapes:
        if name.endswith("projection_matrix"):
            tensors[name] *= 6
    length, dim = shapes["pos_emb.emb.weight"]
    rows = 0.5 * torch.cos(0.3 + 0.17 * torch.arange((length - 1) * dim, dtype=torch.float64))
    tensors["pos_emb.emb.weight"] = torch.cat([rows.view(length - 1, dim), torch.zeros(1, dim)])
    tensors["performer.calls_since_last_redraw"] = torch.tensor(417)
    return OrderedDict((name, tensors[name]) for name in shapes)


def as_stored(state: OrderedDict[str, torch.Tensor], prefix: str = "") -> OrderedDict[str, torch.Tensor]:
    """As in a file: float32 but for gene2vec, which is float64."""
    return OrderedDict(
        (f"{prefix}{name}", tensor if name.startswith("pos_emb") or not tensor.ndim else tensor.float())
        for name, tensor in state.items()
    )


def written(state: OrderedDict[str, torch.Tensor], form: str) -> dict[str, Any]:
    """What ``save_ckpt``, ``save_simple_ckpt`` or nobody's function puts around a state dict."""
    if form == "plain":
        return state
    if form == "simple":
        return {"model_state_dict": state}
    layer = torch.nn.Linear(3, 2)
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-4)
    layer(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    scheduler = {
        "first_cycle_steps": 15, "cycle_mult": 2, "base_max_lr": 1e-4, "max_lr": 1e-4, "min_lr": 1e-6,
        "warmup_steps": 5, "gamma": 0.9, "cur_cycle_steps": 15, "cycle": 0, "step_in_cycle": 3, "last_epoch": 3,
        "base_lrs": [1e-6], "_step_count": 4, "_last_lr": [6e-5],
    }  # fmt: skip
    return {
        "epoch": 3, "model_state_dict": state, "optimizer_state_dict": optimizer.state_dict(),
        "scheduler_state_dict": scheduler, "losses": 0.25,
    }  # fmt: skip


def performer(state: OrderedDict[str, torch.Tensor], tokens: torch.Tensor) -> torch.Tensor:
    """Encodings [B, L, C] of bins [B, L], plainly, with one stabiliser for the whole batch."""
    p = {name: tensor for name, tensor in state.items() if tensor.ndim}
    norm = lambda x, name: F.layer_norm(x, x.shape[-1:], p[f"{name}.weight"], p[f"{name}.bias"])  # noqa: E731
    x = p["token_emb.weight"][tokens] + p["pos_emb.emb.weight"].to(p["token_emb.weight"].dtype)
    for i in range(sum(name.endswith("projection_matrix") for name in p)):
        first, second = f"performer.net.layers.{i}.0.", f"performer.net.layers.{i}.1."
        projection = p[f"{first}fn.fast_attention.projection_matrix"]
        h, d = norm(x, f"{first}norm"), projection.shape[1]
        q, k, v = ((h @ p[f"{first}fn.to_{part}.weight"].T).unflatten(-1, (-1, d)).transpose(1, 2) for part in "qkv")
        features = []
        for rows, is_query in ((q, True), (k, False)):
            dash = rows * d**-0.25 @ projection.T
            largest = dash.amax(-1, keepdim=True) if is_query else dash.amax()
            half = (rows**2).sum(-1, keepdim=True) / 2 * d**-0.5
            features.append((torch.exp(dash - half - largest) + 1e-4) / math.sqrt(len(projection)))
        of_q, of_k = features
        out = of_q @ (of_k.transpose(2, 3) @ v) / (of_q @ of_k.sum(2)[..., None])
        x = x + out.transpose(1, 2).flatten(2) @ p[f"{first}fn.to_out.weight"].T + p[f"{first}fn.to_out.bias"]
        h = F.gelu(norm(x, f"{second}norm") @ p[f"{second}fn.fn.w1.weight"].T + p[f"{second}fn.fn.w1.bias"])
        x = x + h @ p[f"{second}fn.fn.w2.weight"].T + p[f"{second}fn.fn.w2.bias"]
    return norm(x, "norm")


def classified(state: OrderedDict[str, torch.Tensor], encodings: torch.Tensor) -> torch.Tensor:
    """Logits [B, K] of the published classifier, its first layer as the convolution that it is."""
    x = F.relu(F.conv2d(encodings[:, None], state["to_out.conv1.weight"], state["to_out.conv1.bias"]))
    x = x.view(len(x), -1)
    for name in ("fc1", "fc2", "fc3"):
        x = F.linear(x if name == "fc1" else F.relu(x), state[f"to_out.{name}.weight"], state[f"to_out.{name}.bias"])
    return x
