"""What a model card says of tokens."""

from __future__ import annotations

from typing import Any

from geneformer_fast.data.values import preparation_in
from geneformer_fast.tokenization.arrow import TokenFolder

_MOST_FILES = 5
_DIGITS = 16  # of a fingerprint


def described(tokens: TokenFolder) -> dict[str, Any]:
    """Name -> what a token folder is made of, in words; files by their names, without their places."""
    found: dict[str, Any] = {
        "tokens": f"{tokens.path.absolute().name}, {tokens.n_cells:,} cells of {tokens.n_tokens:,} tokens",
        "fingerprint of the tokens": f"`{tokens.content_fingerprint[:_DIGITS]}`",
    }
    if tokens.manifest is not None:
        names = [entry["path"].rstrip("/").rpartition("/")[2] for entry in tokens.manifest["inputs"]]
        more = f" and {len(names) - _MOST_FILES:,} more" if len(names) > _MOST_FILES else ""
        found["made of"] = ", ".join(f"`{name}`" for name in names[:_MOST_FILES]) + more
    if tokens.vocabulary is not None:
        identity = tokens.vocabulary
        found["vocabulary"] = f"{identity['name']} (`{str(identity.get('fingerprint'))[:_DIGITS]}`)"
    if (rule := preparation_in(tokens)) is not None:
        chosen = ", ".join(f"{name} {value}" for name, value in rule["options"].items())
        found["values"] = f"{rule['family']}, {rule['n_genes']:,} genes{f' ({chosen})' if chosen else ''}"
    return found
