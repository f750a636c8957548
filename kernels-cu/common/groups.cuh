// Rows that are shared out to groups of lanes: a group is the least power of two of lanes that holds a row of
// vectors, at most a warp.
#pragma once
#include "reduce.cuh"

struct Groups {
    u32 lanes;  // of a group
    u32 lane;   // of this thread in its group
    u32 first;  // row of this thread's warp's first group
    u32 step;   // rows that the grid takes at once
    u32 group;  // of this thread in its warp

    INLINE explicit Groups(u32 vectors) {
        lanes = 1;
        while (lanes < vectors && lanes < 32) lanes *= 2;
        u32 in_warp = 32 / lanes, warp = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
        lane = threadIdx.x % lanes;
        group = threadIdx.x % 32 / lanes;
        first = warp * in_warp;
        step = gridDim.x * (blockDim.x / 32) * in_warp;
    }

    // Calls f(row, there) for the rows of this thread; every lane of a warp calls it equally often, with
    // `there` false past the last row.
    template <typename F>
    INLINE void for_rows(u32 rows, F f) const {
        for (u32 n = first; n < rows; n += step) f(n + group, n + group < rows);
    }

    // Over a group; every lane of it receives the result. The whole warp calls it.
    INLINE float sum(float x) const {
        for (u32 offset = lanes / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
        return x;
    }

    // What the first lane of the group holds. The whole warp calls it.
    INLINE int from_first(int x) const { return __shfl_sync(0xffffffffu, x, int(group * lanes)); }
};
