"""Instruments: time per operation, memory, energy."""
