"""The errors users see. Each message names what was wrong, where, and what to do about it."""

from __future__ import annotations


class GeneformerFastError(Exception):
    """Base of every error this package raises on purpose; the command line prints it without a traceback."""


class InputError(GeneformerFastError):
    """A data file or AnnData object cannot be used: not counts, unreadable, truncated, unknown genes or columns."""


class VocabularyError(GeneformerFastError):
    """A gene dictionary is unusable, or tokens of one vocabulary met a model of another."""


class CheckpointError(GeneformerFastError):
    """Model files are missing, truncated, or do not fit the configuration; names the tensor and both shapes."""


class OutputError(GeneformerFastError):
    """An output exists already, is unfinished, or was begun with other options."""


class UnsupportedError(GeneformerFastError):
    """What was asked for explicitly cannot run here; the message says what to use instead."""


class TrainingError(GeneformerFastError):
    """Training cannot go on: the loss is not finite."""


class ProfileError(GeneformerFastError):
    """A run is profiled in a way that gives no figures: nothing was measured, it still goes on, or it is over."""


class ArgumentError(GeneformerFastError, TypeError):
    """A public function was given an argument of another kind than it takes; names the argument and both kinds."""
