// What matrix products share, however they are multiplied: the order of their tiles, and what follows them.
#pragma once
#include "pack.cuh"
#include "silu.cuh"

// Where a tile begins.
struct Corner {
    u32 row, column;
};

// Tiles in groups of 8 rows of them, down before across: blocks that run together share what they read in L2.
template <int ROWS, int COLUMNS>
struct Raster {
    static constexpr u32 GROUP = 8;
    u32 down, across;

    INLINE Raster(u32 rows, u32 columns) : down((rows + ROWS - 1) / ROWS), across((columns + COLUMNS - 1) / COLUMNS) {}

    INLINE u32 tiles() const { return down * across; }

    INLINE Corner place(u32 tile) const {
        const u32 group = tile / (GROUP * across), within = tile % (GROUP * across);
        const u32 height = min(GROUP, down - group * GROUP);
        return {(group * GROUP + within % height) * ROWS, within / height * COLUMNS};
    }
};

// Shared memory of a warp that finishes rows of `WIDE` columns.
template <int WIDE>
constexpr u32 FINISH_BYTES = 16 * (WIDE + 8) * 4;

// Where a group of four columns of a finished row is, swapped in pairs so that neither way conflicts.
template <int WIDE>
INLINE u32 finished_at(u32 stage, u32 row, u32 group) {
    return stage + row * ((WIDE + 8) * 4) + (group ^ (WIDE == 64 ? group / 8 : row % 2)) * 16;
}

// Leaves 16 finished rows of a warp in shared memory.
template <int WIDE>
INLINE void stage_rows(const float (&acc)[WIDE / 8][4], u32 stage) {
    const u32 lane = threadIdx.x % 32, row = lane / 4;
#pragma unroll
    for (int j = 0; j < WIDE / 8; j++) {
        const u32 group = j * 2 + lane % 4 / 2;
        store_shared(finished_at<WIDE>(stage, row, group) + lane % 2 * 8, acc[j][0], acc[j][1]);
        store_shared(finished_at<WIDE>(stage, row + 8, group) + lane % 2 * 8, acc[j][2], acc[j][3]);
    }
}

// Hands them, which belong to (row0, column0) of the result and on, to `out(row, column, values)`, `Out::WIDTH` columns
// at a time.
template <int WIDE, typename Out>
INLINE void hand_out_rows(u32 stage, u32 row0, u32 column0, u32 rows, u32 columns, const Out& out) {
    constexpr int LANES = WIDE / Out::WIDTH;
    const u32 lane = threadIdx.x % 32, column = lane % LANES * Out::WIDTH;
    __syncwarp();
#pragma unroll
    for (u32 r = lane / LANES; r < 16; r += 32 / LANES) {
        float v[Out::WIDTH];
#pragma unroll
        for (int e = 0; e < Out::WIDTH; e += 4) {
            float x[4];
            load_shared(x, finished_at<WIDE>(stage, r, (column + e) / 4));
            v[e] = x[0], v[e + 1] = x[1], v[e + 2] = x[2], v[e + 3] = x[3];
        }
        const u32 n = row0 + r, m = column0 + column;
        if (n < rows && m < columns) out(n, m, v);
    }
    __syncwarp();
}

// Both: the layout of fragments would touch every line of global memory four times.
template <int WIDE, typename Out>
INLINE void finish_rows(const float (&acc)[WIDE / 8][4], u32 stage, u32 row0, u32 column0, u32 rows, u32 columns,
                        const Out& out) {
    stage_rows<WIDE>(acc, stage);
    hand_out_rows<WIDE>(stage, row0, column0, rows, columns, out);
}

template <typename Element>
INLINE void add(float (&v)[WIDTH<Element>], const Element* from) {
    float x[WIDTH<Element>];
    unpack(x, load16(from));
#pragma unroll
    for (int e = 0; e < WIDTH<Element>; e++) v[e] += x[e];
}

// What a product meets on its way out. Pointers whose flags are off are not read.
struct Epilogue {
    static constexpr int WIDTH = 8;
    bf16 *y, *pre;
    const bf16 *bias, *residual;
    u32 columns;
    bool has_bias, has_residual;

    INLINE void add_bias(float (&v)[8], u32 column) const {
        if (has_bias) add(v, bias + column);
    }
    // An activation takes what is stored.
    INLINE void store_pre(float (&v)[8], u64 row, u32 column) const {
        const Vec16 stored = packed(v);
        store16(pre + row * columns + column, stored);
        unpack(v, stored);
    }
    INLINE void store(float (&v)[8], u64 row, u32 column) const {
        if (has_residual) add(v, residual + row * columns + column);
        store16(y + row * columns + column, packed(v));
    }
};

struct None : Epilogue {
    INLINE void operator()(u64 row, u32 column, float (&v)[8]) const {
        add_bias(v, column);
        store(v, row, column);
    }
};

struct Silu : Epilogue {
    INLINE void operator()(u64 row, u32 column, float (&v)[8]) const {
        add_bias(v, column);
        store_pre(v, row, column);
#pragma unroll
        for (int e = 0; e < 8; e++) v[e] = silu(v[e]);
        store(v, row, column);
    }
};

// Gate and up are neighbours: eight columns become four.
struct SwiGlu : Epilogue {
    INLINE void operator()(u64 row, u32 column, float (&v)[8]) const {
        add_bias(v, column);
        store_pre(v, row, column);
        const u64 at = (row * columns + column) / 2;
        float h[4];
#pragma unroll
        for (int e = 0; e < 4; e++) h[e] = silu(v[2 * e]) * v[2 * e + 1];
        if (has_residual) {
            const uint2 r = *reinterpret_cast<const uint2*>(residual + at);
            h[0] += low(r.x), h[1] += high(r.x), h[2] += low(r.y), h[3] += high(r.y);
        }
        *reinterpret_cast<uint2*>(y + at) = make_uint2(pack(h[0], h[1]), pack(h[2], h[3]));
    }
};

struct Store {
    static constexpr int WIDTH = 8;
    bf16* to;
    u32 columns;

    INLINE void operator()(u64 row, u32 column, float (&v)[8]) const { store16(to + row * columns + column, packed(v)); }
};

// Where a gradient is stored, or added.
template <typename Element>
struct Gradient {
    static constexpr int WIDTH = ::WIDTH<Element>;
    Element* to;
    u32 columns;
    bool accumulate;

    INLINE void operator()(u64 row, u32 column, float (&v)[WIDTH]) const {
        Element* at = to + row * columns + column;
        if (accumulate) add(v, at);
        store16(at, packed(v));
    }
};
