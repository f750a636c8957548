// Tiles of bf16 in shared memory: how they lie, how they arrive, how the tensor cores read them.
//
// A tile has rows of 64 bytes or of a multiple of 128, cut into chunks of 16. Chunk c of row r lies where
// chunk c ^ s(r) would, so that the eight chunks of an ldmatrix (one column of chunks, eight rows) and the
// eight chunks of a cp.async quarter-warp (along rows) each meet all 32 banks once.
#pragma once
#include "ptx.cuh"

// Byte offset of a chunk in a tile with rows of `BYTES`.
template <int BYTES>
INLINE u32 chunk_at(u32 row, u32 chunk) {
    static_assert(BYTES == 64 || BYTES % 128 == 0, "rows fill banks");
    return row * BYTES + ((chunk ^ (BYTES == 64 ? row / 2 % 4 : row % 8)) * 16);
}

// A tile at an address.
template <int BYTES>
struct Rows {
    u32 address;

    INLINE u32 at(u32 row, u32 chunk) const { return address + chunk_at<BYTES>(row, chunk); }
};

// Begins to copy a tile of `ROWS` rows; rows past the first `rows` and columns past the first `columns`
// arrive as zeros. `stride` counts elements; `columns` is a multiple of 8 or reaches past the tile. `thread` is
// for callers who hide it from the compiler.
template <int ROWS, int BYTES, int THREADS>
INLINE void copy_tile(u32 tile, const bf16* from, u64 stride, int rows, int columns, u32 thread = threadIdx.x) {
    constexpr int CHUNKS = BYTES / 16, STEP = THREADS / CHUNKS;
    static_assert(STEP % 8 == 0, "the swizzle repeats from step to step");
    const int row = thread / CHUNKS, chunk = thread % CHUNKS;
    const u32 to = tile + chunk_at<BYTES>(row, chunk);
    from += u64(row) * stride + chunk * 8;
    const bool inside = chunk * 8 < columns;
#pragma unroll
    for (int i = 0; i < (ROWS + STEP - 1) / STEP; i++) {
        if (ROWS % STEP != 0 && row + i * STEP >= ROWS) break;
        copy_async(to + i * STEP * BYTES, from, inside && row + i * STEP < rows);
        from += STEP * stride;
    }
}

// Blocks of 16x16 elements, the unit that one ldmatrix.x4 reads as four 8x8 matrices. A lane's part of the
// address comes first, with the matrices taken down, then right, or right, then down.
template <int BYTES>
INLINE u32 down_right() {
    return chunk_at<BYTES>(threadIdx.x % 16, threadIdx.x / 16 % 2);
}

template <int BYTES>
INLINE u32 right_down() {
    return chunk_at<BYTES>(threadIdx.x % 8 + threadIdx.x / 16 % 2 * 8, threadIdx.x / 8 % 2);
}

// The address of block (row, column) for a lane: blocks to the right flip bits that the swizzle uses, blocks
// below leave them alone.
template <int BYTES>
INLINE u32 block_at(u32 lane, u32 row, u32 column) {
    return (lane ^ column * 32) + row * 16 * BYTES;
}
