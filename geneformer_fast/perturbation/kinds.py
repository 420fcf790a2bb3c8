"""Kinds of edits, and which of what is asked for goes together. Nothing heavy is loaded to know that."""

from __future__ import annotations

from collections.abc import Sequence

from geneformer_fast.errors import UnsupportedError

#: Edits of counts, after which a cell's genes are ranked again.
COUNTS = "counts"
#: All kinds; those but the last are edits of ranks.
KINDS = ("delete", "overexpress", "inhibit", "activate", "swap", COUNTS)
#: The largest factor of counts: any count times this, and the sum of a cell's, is a number in float32.
MOST_TIMES = 1e12
#: Those that move a gene by a share of a cell's ranks.
MOVING = ("inhibit", "activate")
#: What genes may be chosen by before any is computed.
SCREENS = ("gradient",)
#: What is compared: the cell by its genes or its CLS token, and each gene that was not perturbed.
MODES = ("cell", "cls", "cell_and_gene", "cls_and_gene")


def check_genes(
    kind: str,
    genes: Sequence[str | int] | None,
    *,
    together: bool = False,
    pairs: bool = False,
    anchor: str | int | None = None,
    sets: Sequence[Sequence[str | int]] | None = None,
    doses: Sequence[float] = (),
) -> None:
    """Refuse what cannot be meant, whether genes are names or tokens.

    Parameters
    ----------
    kind, genes, together, pairs, anchor, sets, doses
        As :class:`~geneformer_fast.perturbation.edits.Edits` has them; ``genes`` is None for all.

    Raises
    ------
    UnsupportedError
        Says what does not go together, or which number is none.
    """
    if kind not in KINDS:
        raise UnsupportedError(f"kind (--kind) must be one of {', '.join(KINDS)}, not {kind!r}")
    _check_doses(kind, doses)
    _check_together(genes, together=together, pairs=pairs, anchor=anchor, sets=sets)
    if kind == "swap":
        if sets is not None:
            raise UnsupportedError("kind 'swap' exchanges two genes and takes no sets (--sets)")
        if not (pairs or anchor is not None or (together and genes is not None and len(genes) == 2)):
            raise UnsupportedError(
                "kind 'swap' exchanges two genes: ask for pairs (--pairs), an anchor (--anchor), or two genes together "
                "(--together)"
            )
    for some in (genes, *(sets or ())):
        if some is not None and len(set(some)) < len(some):
            twice = next(gene for gene in some if list(some).count(gene) > 1)
            raise UnsupportedError(f"gene {twice!r} is in a list twice: name each once")


def check_screen(
    screen: str | None, best: int | None, kind: str, genes: object, *, together: bool = False, sets: object = None
) -> None:
    """Refuse a screen of what cannot be screened.

    Raises
    ------
    UnsupportedError
        There is no such screen, or it does not go with what is asked for.
    """
    if screen is None:
        if best is not None:
            raise UnsupportedError("best (--best) is of a screen: say which with screen (--screen)")
        return
    if screen not in SCREENS:
        raise UnsupportedError(f"screen (--screen) must be one of {', '.join(SCREENS)}, not {screen!r}")
    if kind not in ("delete", "overexpress"):
        raise UnsupportedError(f"a screen (--screen) is of deletions or overexpressions, not of kind {kind!r}")
    if genes != "all" or together or sets is not None:
        raise UnsupportedError(
            "a screen (--screen) chooses among all genes, or their pairs (--pairs, --anchor): leave genes and lists out"
        )
    if best is not None and best < 1:
        raise UnsupportedError(f"best (--best) must be at least 1, not {best}")


def _check_doses(kind: str, doses: Sequence[float]) -> None:
    if kind == COUNTS:
        if not doses:
            raise UnsupportedError("kind 'counts' multiplies counts: say by which factors with doses (--doses)")
        wrong = [dose for dose in doses if not 0 <= dose <= MOST_TIMES or dose == 1]
        if wrong:
            raise UnsupportedError(
                f"doses (--doses) of counts are factors from 0 to {MOST_TIMES:.0e}, other than 1, which changes "
                f"nothing, not {wrong[0]}"
            )
    elif kind in MOVING:
        if not doses:
            raise UnsupportedError(f"kind {kind!r} moves genes by a share of the ranks: say which with doses (--doses)")
        wrong = [dose for dose in doses if not 0 < dose <= 1]
        if wrong:
            raise UnsupportedError(f"doses (--doses) are shares of a cell's ranks, above 0 and up to 1, not {wrong[0]}")
    elif doses:
        raise UnsupportedError(f"kind {kind!r} takes no doses (--doses); use inhibit, activate or counts")
    if len(set(doses)) < len(doses):
        raise UnsupportedError("doses (--doses) must differ from one another")


def _check_together(
    genes: Sequence[str | int] | None,
    *,
    together: bool,
    pairs: bool,
    anchor: str | int | None,
    sets: Sequence[Sequence[str | int]] | None,
) -> None:
    ways = {"together": together, "pairs": pairs, "anchor": anchor is not None}
    asked = [f"{name} (--{name})" for name, is_asked in ways.items() if is_asked]
    if sets is not None:
        if others := [*asked, *(["genes (--genes)"] if genes is not None else [])]:
            raise UnsupportedError(f"sets (--sets) are lists of genes of their own: leave {' and '.join(others)} out")
        if not sets or not all(sets):
            raise UnsupportedError("sets (--sets) must hold a gene each")
    if len(asked) > 1:
        raise UnsupportedError(f"{' and '.join(asked)} exclude each other: ask for one of them")
    if together and genes is None:
        raise UnsupportedError("together (--together) is of a list of genes: say which with genes (--genes)")
    if genes is not None and len(genes) < (2 if pairs else 1):
        least = "pairs (--pairs) need two genes" if pairs else "genes (--genes) must name a gene"
        raise UnsupportedError(least)
    if anchor is not None and genes is not None and anchor in genes:
        raise UnsupportedError(
            "the anchor (--anchor) is perturbed with each of the other genes, and must not be one of them (--genes)"
        )
