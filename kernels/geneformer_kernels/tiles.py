"""Pieces of kernels without loads or stores, for several operations."""

import triton
import triton.language as tl


@triton.jit
def _bit_at(PLACE: tl.constexpr, LOG_N: tl.constexpr):
    """0 and 1 along the dimension of a hypercube [2] * LOG_N that holds this bit of the flat index."""
    return tl.reshape(tl.arange(0, 2), [1] * (LOG_N - 1 - PLACE) + [2] + [1] * PLACE)


@triton.jit
def _exchanged(cube, PLACE: tl.constexpr, FLIP_PLACE: tl.constexpr, LOG_N: tl.constexpr, IS_ACROSS: tl.constexpr):
    """One step of a bitonic sort: every element against its partner, which differs in one bit of the index."""
    if IS_ACROSS:
        flat = tl.reshape(cube, [1 << LOG_N])
        partner = tl.reshape(tl.gather(flat, tl.arange(0, 1 << LOG_N) ^ (1 << PLACE), 0), [2] * LOG_N)
    else:
        partner = tl.sum(cube, LOG_N - 1 - PLACE, keep_dims=True) - cube  # exact: integers wrap around
    takes_greater = _bit_at(PLACE, LOG_N)
    if FLIP_PLACE >= 0:
        takes_greater = takes_greater ^ _bit_at(FLIP_PLACE, LOG_N)
    return tl.where((cube > partner) != (takes_greater > 0), partner, cube)


@triton.jit
def sorted_places(x, LOG_N: tl.constexpr, LOG_EACH: tl.constexpr):
    """[N] int64, sorted upwards by a bitonic network, the element of position p at ``place_of(p)``.

    Of a position's bits the lower ones are compared most often. A thread holds elements that differ in the highest
    LOG_EACH bits of their place (N = 32 * warps * 2^LOG_EACH), a warp those that differ in the lowest five: so a
    position's lowest bits are the highest of its place. What leaves the thread goes by shuffle, what leaves the warp
    through shared memory, once per step. Against ``tl.sort`` that is 60 % of the instructions, half the shuffles and a
    quarter of the shared memory's traffic (2,048 int64 on 8 warps, sm_90, counted in the machine code).
    """
    cube = tl.reshape(x, [2] * LOG_N)
    for stage in tl.static_range(1, LOG_N + 1):
        for step in tl.static_range(stage):
            cube = _exchanged(
                cube,
                (stage - 1 - step + LOG_N - LOG_EACH) % LOG_N,
                (stage + LOG_N - LOG_EACH) % LOG_N if stage < LOG_N else -1,
                LOG_N,
                stage - 1 - step >= LOG_EACH + 5,
            )
    return tl.reshape(cube, [1 << LOG_N])


@triton.jit
def place_of(position, LOG_N: tl.constexpr, LOG_EACH: tl.constexpr):
    """Where :func:`sorted_places` puts the element of a position; both are below N."""
    return (position >> LOG_EACH) | ((position & ((1 << LOG_EACH) - 1)) << (LOG_N - LOG_EACH))


@triton.jit
def position_of(place, LOG_N: tl.constexpr, LOG_EACH: tl.constexpr):
    """The position of the element that :func:`sorted_places` put in a place."""
    return (place >> (LOG_N - LOG_EACH)) | ((place & ((1 << (LOG_N - LOG_EACH)) - 1)) << LOG_EACH)


@triton.jit
def in_order(x, LOG_N: tl.constexpr, LOG_EACH: tl.constexpr):
    """[N] elements in the order of their positions, from the order of their places."""
    return tl.reshape(tl.trans(tl.reshape(x, [1 << LOG_EACH, 1 << (LOG_N - LOG_EACH)])), [1 << LOG_N])
