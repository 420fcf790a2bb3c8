"""What operations are made of on a CPU: compiled loops, threads, and products that a library computes.

Nothing is loaded here: numba is imported by those modules only that compile.
"""
