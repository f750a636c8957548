// How kernels of Hopper divide the work of a block: one warp copies tiles into rings of stages, two warpgroups multiply
// them. The first warpgroup has the warp that copies, and three that leave at once.
#pragma once
#include "attention.cuh"
#include "ring.cuh"

// Threads of those who multiply, and with them the warp that copies.
constexpr int MULTIPLIERS = 256, ALL = MULTIPLIERS + 32;
// Their barriers; from TURN on one for each warpgroup.
constexpr int CLEANING = 1, VERDICT = 2, TURN = 3;

// A tile in shared memory is cut into slabs of 64 elements of every row, under the swizzle of 128 bytes: what a tensor
// map of such boxes brings, and products read.
template <int ROWS>
constexpr u32 SLAB = ROWS * 128;

template <int ROWS>
struct Slabs {
    u32 address;

    INLINE u32 at(u32 row, u32 chunk) const { return address + chunk / 8 * SLAB<ROWS> + chunk_at<128>(row, chunk % 8); }
};

// Begins to copy a tile of rows of D, one box for each slab; `column` is that of their first element.
template <int D, int ROWS>
INLINE void copy_slabs(u32 to, const TensorMap& map, u32 barrier, int column, int row, int layer) {
#pragma unroll
    for (int s = 0; s < D / 64; s++) copy_box(to + s * SLAB<ROWS>, map, barrier, column + s * 64, row, layer);
}

// The address of a row of a tile, for products that begin there; a multiple of 8.
INLINE u32 row_at(u32 tile, int row) { return tile + row * 128; }

// Begins s = a b^T, for the 64 rows at `a` and so many as s has columns at `b`; of tiles of so many rows.
template <int D, int A_ROWS, int B_ROWS, int NI>
INLINE void begin_dots(float (&s)[1][NI][4], u32 a, u32 b) {
    begin_products();
#pragma unroll
    for (int d = 0; d < D / 16; d++) {
        const u32 left = a + d / 4 * SLAB<A_ROWS> + d % 4 * 32, right = b + d / 4 * SLAB<B_ROWS> + d % 4 * 32;
        multiply_add<true, true>(s[0], matrix_at(left, 0), matrix_at(right, 0), d > 0);
    }
    commit_products();
}

// A result as a left factor.
template <int DEPTH>
using Factor = u32[DEPTH / 16][4];

template <int DEPTH>
INLINE void as_factors(Factor<DEPTH>& left, const float (&p)[1][DEPTH / 8][4]) {
#pragma unroll
    for (int k = 0; k < DEPTH / 16; k++) as_factor(left[k], p[0], k);
}

// Begins acc += p b for as many rows at `b` as p is deep, of a tile of `ROWS`.
template <int D, int ROWS, int STEPS>
INLINE void begin_sums(float (&acc)[1][D / 8][4], const u32 (&p)[STEPS][4], u32 b) {
    const u64 right = matrix_at(b, SLAB<ROWS>);
    begin_products();
#pragma unroll
    for (int k = 0; k < STEPS; k++) multiply_add<false>(acc[0], p[k], right + k * (16 * 128 >> 4), true);
    commit_products();
}

// Whether somebody's results of this round are not finite, so that all begin again, careful. `spoilt` is shared, and 0
// before.
INLINE bool again_carefully(int& spoilt, int largest) {
    if (largest >= __float_as_int(INFINITY)) atomicOr(&spoilt, 1);
    meet<VERDICT, ALL>();
    return *(const volatile int*)&spoilt != 0;
}

// `clean`s `COUNT` rows at `at`, of a tile of D and `ROWS`, together with the others who multiply, or with this warpgroup.
template <int D, int ROWS, int COUNT, int THREADS = MULTIPLIERS>
INLINE void clean_rows(u32 at) {
    for (int s = 0; s < D / 64; s++) clean(at + s * SLAB<ROWS>, COUNT * 128, threadIdx.x % THREADS, THREADS);
}

// Between what those threads read of tiles, and the products that follow: `each()` cleans.
template <int THREADS = MULTIPLIERS, typename Each>
INLINE void clean_together(const Each& each) {
    const u32 barrier = THREADS == MULTIPLIERS ? CLEANING : TURN - 1 + threadIdx.x / 128;
    meet<THREADS>(barrier);
    each();
    fence_writes();
    meet<THREADS>(barrier);
}
