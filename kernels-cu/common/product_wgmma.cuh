// The main loop of matrix products on Hopper: copies feed a ring of stages, two warpgroups multiply them.
//
// One thread of the first warpgroup copies tiles, 64 deep, into the ring. A cluster of two blocks has tiles one below the
// other: each copies its own of the left factor and half of the right one, which both receive, so that the L2 cache is
// asked for it once. The warpgroups multiply one group of products ahead of the stage that they hand back, to both
// blocks, for both write to it. Either operand may lie along the depth or across it: the tensor cores read both, so
// nothing is transposed. What a tile has beyond the matrix arrives as zeros and is not stored. There are at most
// as many blocks as the machine has SMs, and each cluster takes every so many-th item: the copies of the next run while one is
// finished. An item is a pair of tiles of the result, or one of the parts of its depth.
//
// Both warpgroups have rows of one tile (a team of two), or each has every second tile (teams of one): then one
// multiplies while the other finishes its rows, which counts for as much as the depth is small.
#pragma once
#include "product.cuh"
#include "ring.cuh"
#include "tile.cuh"

// Blocks that share a right factor.
constexpr u32 CLUSTER = 2;

// Whose turn it is to multiply, where warpgroups have tiles of their own: a warpgroup that runs ahead of the ring by more
// than a round could not tell the phases of its stages.
template <bool APART>
struct Turns {
    u32 barriers, group, phase;

    INLINE Turns(u32 barriers, u32 group) : barriers(barriers), group(group), phase(group ^ 1) {}

    INLINE static void init(u32 barriers) {
        if constexpr (APART) init_barrier(barriers, 4), init_barrier(barriers + 8, 4);
    }
    INLINE void wait() {
        if constexpr (APART) wait_phase(barriers + group * 8, phase), phase ^= 1;
    }
    INLINE void pass() const {
        if (APART && threadIdx.x % 32 == 0) arrive(barriers + (group ^ 1) * 8);
    }
};

// 16 rows and 64 columns of bf16 on their way out, under the swizzle of 128 bytes.
constexpr u32 BOX_BYTES = 16 * 128;

// A block's tile and the ring of stages that feeds it; behind that, the room of warps that finish rows, and barriers.
template <int TEAMS_, int ROWS_, int COLUMNS_, int STAGES_, int BOXES_>
struct Tile {
    static constexpr int TEAMS = TEAMS_, ROWS = ROWS_, COLUMNS = COLUMNS_, DEPTH = 64, STAGES = STAGES_;
    // Rows of a warpgroup, in blocks of 64.
    static constexpr int EACH = ROWS * TEAMS / 2, BLOCKS = EACH / 64;
    static constexpr u32 A_BYTES = ROWS * DEPTH * 2, B_BYTES = COLUMNS * DEPTH * 2, STAGE_BYTES = A_BYTES + B_BYTES;
    // Columns that a warp finishes at once.
    static constexpr int WIDE = 32, SLICES = COLUMNS / WIDE;
    // Its room: so many boxes, or finished rows; whole periods of the swizzle.
    static constexpr int BOXES = BOXES_;
    static constexpr u32 ROOM = (BOXES == 1 ? FINISH_BYTES<WIDE> + 1023 : BOXES * BOX_BYTES) / 1024 * 1024;
    static constexpr u32 FINISH = STAGES * STAGE_BYTES, BARRIERS = FINISH + 8 * ROOM, TURNS = BARRIERS + STAGES * 16;
    // Room for what an end of the product needs, 1 KiB.
    static constexpr u32 BEHIND = TURNS + 16;
    using Ring = Stage<STAGES, STAGE_BYTES, CLUSTER * 8 / TEAMS>;
    using Turn = Turns<TEAMS == 2>;
};

// Together: for great depths. Apart: for small ones. Few: for few rows.
using Together = Tile<1, 128, 256, 4, 2>;
using Apart = Tile<2, 128, 192, 5, 1>;
using Few = Tile<2, 64, 128, 8, 2>;

// A block of 64 vectors at a depth of 64, under the swizzle of 128 bytes.
constexpr u32 BLOCK_BYTES = 64 * 128;

// What the clusters have to do: every pair of tiles of the result, for each part of the depth.
template <typename T>
struct Items {
    Raster<CLUSTER * T::ROWS, T::COLUMNS> raster;
    u32 depth, part_depth;

    // Calls `each(corner, part, begin, steps)` for the tiles of this block.
    template <typename Each>
    INLINE void visit(const Each& each) const {
        const u32 tiles = raster.tiles(), items = tiles * ((depth + part_depth - 1) / part_depth);
        for (u32 i = blockIdx.x / CLUSTER; i < items; i += gridDim.x / CLUSTER) {
            const u32 part = i / tiles, begin = part * part_depth, end = min(depth, begin + part_depth);
            Corner corner = raster.place(i % tiles);
            corner.row += blockIdx.x % CLUSTER * T::ROWS;
            each(corner, part, begin, (end - begin + T::DEPTH - 1) / T::DEPTH);
        }
    }
};

// Copies the left factor of a stage, from row `first` on at depth `k`. ALONG: its rows are rows of memory, else columns.
template <typename T, bool ALONG>
INLINE void fetch_left(u32 to, const TensorMap& map, u32 barrier, u32 first, u32 k) {
    if constexpr (ALONG) {
        copy_box(to, map, barrier, k, first);
    } else {
#pragma unroll
        for (int i = 0; i < T::ROWS / 64; i++) copy_box(to + i * BLOCK_BYTES, map, barrier, first + i * 64, k);
    }
}

// Copies this block's share of the right factor to all of the cluster: some of the columns, or of the depth.
template <typename T, bool ALONG>
INLINE void fetch_right(u32 to, const TensorMap& map, u32 barrier, u32 first, u32 k) {
    constexpr u16 ALL_BLOCKS = (1 << CLUSTER) - 1;
    const u32 share = blockIdx.x % CLUSTER * ((ALONG ? T::COLUMNS : T::DEPTH) / CLUSTER);
    to += share * 128;
    if constexpr (ALONG) {
        copy_box_to(ALL_BLOCKS, to, map, barrier, k, first + share);
    } else {
#pragma unroll
        for (int i = 0; i < T::COLUMNS / 64; i++) {
            copy_box_to(ALL_BLOCKS, to + i * BLOCK_BYTES, map, barrier, first + i * 64, k + share);
        }
    }
}

template <typename T, bool A_ALONG, bool B_ALONG>
INLINE void produce(const TensorMap& a, const TensorMap& b, const Items<T>& items, typename T::Ring stage) {
    items.visit([&](Corner corner, u32, u32 begin, u32 steps) {
        for (u32 step = 0; step < steps; step++) {
            const u32 k = begin + step * T::DEPTH;
            wait_phase_of_cluster(stage.empty(), stage.phase ^ 1);
            arrive_expecting(stage.full(), T::STAGE_BYTES);
            fetch_left<T, A_ALONG>(stage.tile(), a, stage.full(), corner.row, k);
            fetch_right<T, B_ALONG>(stage.tile() + T::A_BYTES, b, stage.full(), corner.column, k);
            stage.advance();
        }
    });
}

// The sums of a warpgroup: of every block of 64 rows, in slices of 32 columns.
template <typename T>
using Sums = float[T::BLOCKS][T::SLICES][4][4];

// The products of one stage. 16 of depth are 32 bytes along rows, or 16 rows.
template <typename T, bool A_ALONG, bool B_ALONG>
INLINE void multiply(Sums<T>& acc, u32 a, u32 b, bool keep) {
    const u64 left = matrix_at(a, BLOCK_BYTES), right = matrix_at(b, BLOCK_BYTES);
    constexpr u32 A_STEP = (A_ALONG ? 32 : 16 * 128) >> 4, B_STEP = (B_ALONG ? 32 : 16 * 128) >> 4;
    begin_products();
#pragma unroll
    for (int k = 0; k < T::DEPTH / 16; k++) {
#pragma unroll
        for (int i = 0; i < T::BLOCKS; i++) {
            multiply_add<A_ALONG, B_ALONG>(acc[i], left + i * (BLOCK_BYTES >> 4) + k * A_STEP, right + k * B_STEP, keep || k > 0);
        }
    }
    commit_products();
}

// Sums an item over its stages.
template <typename T, bool A_ALONG, bool B_ALONG>
INLINE void sum(Sums<T>& acc, typename T::Ring& stage, typename T::Turn& turn, u32 below, u32 steps) {
    // Begins the products of the next stage; returns the barrier that hands it back.
    const auto begin = [&](bool keep) {
        stage.wait();
        multiply<T, A_ALONG, B_ALONG>(acc, stage.tile() + below * 128, stage.tile() + T::A_BYTES, keep);
        const u32 read = stage.empty();
        stage.advance();
        return read;
    };
    const auto hand_back = [](u32 barrier) {
        if (threadIdx.x % 32 < CLUSTER) arrive_at(threadIdx.x % 32, barrier);
    };
    turn.wait();
    u32 last = begin(false);
    for (u32 step = 1; step < steps; step++) {
        const u32 next = begin(true);
        wait_products<1>();
        hand_back(last);
        last = next;
    }
    turn.pass();
    wait_products<0>();
    hand_back(last);
}

// Where the sums of a warp belong: 16 rows of every block of 64, and all columns of the tile.
struct Place {
    u32 row, column, part;
    // Shared memory of the warp.
    u32 room;
};

// Hands what a warp has summed to `out`, as finish_rows does; whatever comes of a row is written out once, not for every
// slice.
template <typename T, typename Out>
INLINE void finish(const Sums<T>& acc, const Place& at, u32 rows, u32 columns, const Out& out) {
    constexpr int SLICES = T::SLICES;
#pragma unroll 1
    for (int n = 0; n < T::BLOCKS * SLICES; n++) {
#pragma unroll
        for (int i = 0; i < T::BLOCKS * SLICES; i++)
            if (i == n) stage_rows<T::WIDE>(acc[i / SLICES][i % SLICES], at.room);
        const u32 row = at.row + n / SLICES * 64, column = at.column + n % SLICES * T::WIDE;
        hand_out_rows<T::WIDE>(at.room, row, column, rows, columns, out);
    }
}

// What becomes of two neighbouring columns of a row where they are only rounded.
struct Rounded {
    struct Row {};

    INLINE Row row(u32) const { return {}; }
    INLINE u32 operator()(Row, u32, float a, float b) const { return pack(a, b); }
};

// Leaves 32 columns of a warp's rows in a half of a box, as pairs that `out(row, column, a, b)` makes; `upper` and `lower`
// are what it knows of the two rows that a lane has sums of.
template <typename Out>
INLINE void fill_box(const float (&z)[4][4], u32 box, u32 half, u32 column, const typename Out::Row& upper,
                     const typename Out::Row& lower, const Out& out) {
    column += threadIdx.x % 4 * 2;
#pragma unroll
    for (int j = 0; j < 4; j += 2, column += 16) {
        const u32 pairs[4] = {out(upper, column, z[j][0], z[j][1]), out(lower, column, z[j][2], z[j][3]),
                              out(upper, column + 8, z[j + 1][0], z[j + 1][1]),
                              out(lower, column + 8, z[j + 1][2], z[j + 1][3])};
        store_matrices(box + block_at<128>(down_right<128>(), 0, half * 2 + j / 2), pairs);
    }
}

// Hands what a warp has summed to the copy engine, which leaves out what is beyond the matrix. A box is filled again when it
// has been read. For ends that are short, since all columns are written out, and read nothing beside what belongs to rows.
template <typename T, typename Out>
INLINE void finish_in_boxes(const Sums<T>& acc, const Place& at, const TensorMap& to, const Out& out) {
    static_assert(T::SLICES % 2 == 0 && T::BLOCKS * T::SLICES / 2 % T::BOXES == 0, "whole boxes, the first one first");
    const u32 lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < T::BLOCKS; i++) {
        const u32 row = at.row + i * 64;
        const auto upper = out.row(row + lane / 4), lower = out.row(row + lane / 4 + 8);
#pragma unroll
        for (int n = 0; n < T::SLICES; n += 2) {
            const u32 box = at.room + (i * T::SLICES + n) / 2 % T::BOXES * BOX_BYTES, column = at.column + n * T::WIDE;
            if (lane == 0) wait_stores_read<T::BOXES - 1>();
            __syncwarp();
            fill_box(acc[i][n], box, 0, column, upper, lower, out);
            fill_box(acc[i][n + 1], box, 1, column + T::WIDE, upper, lower, out);
            fence_writes();
            __syncwarp();
            if (lane == 0) store_box(to, box, column, row), commit_stores();
        }
    }
}

// `take(acc, place)` takes the sums of an item.
template <typename T, bool A_ALONG, bool B_ALONG, typename Take>
INLINE void consume(const Items<T>& items, typename T::Ring stage, u32 shared, const Take& take) {
    const u32 warp = threadIdx.x / 32 - 4, group = warp / 4, below = T::TEAMS == 1 ? group * T::EACH : 0;
    const u32 room = shared + T::FINISH + warp * T::ROOM;
    typename T::Turn turn(shared + T::TURNS, group);
    u32 item = 0;
    items.visit([&](Corner corner, u32 part, u32, u32 steps) {
        if (T::TEAMS == 2 && item++ % 2 != group) return stage.skip(steps);
        Sums<T> acc;
        sum<T, A_ALONG, B_ALONG>(acc, stage, turn, below, steps);
        const Place at{corner.row + below + warp % 4 * 16, corner.column, part, room};
        take(acc, at);
    });
}

extern __shared__ __align__(1024) char shared_memory[];

template <typename T, bool A_ALONG, bool B_ALONG, typename Take>
INLINE void product(const TensorMap& a, const TensorMap& b, u32 rows, u32 columns, u32 depth, u32 part_depth,
                    const Take& take) {
    const u32 shared = shared_address(shared_memory);
    const typename T::Ring ring{shared, shared + T::BARRIERS};
    const Items<T> items{{rows, columns}, depth, part_depth};
    if (threadIdx.x == 0) {
        prefetch_map(a);
        prefetch_map(b);
        auto barriers = ring;
        barriers.init();
        T::Turn::init(shared + T::TURNS);
        fence_barrier_init();
    }
    meet_cluster();
    if (threadIdx.x < 128) {
        release_registers<24>();
        if (threadIdx.x == 0) produce<T, A_ALONG, B_ALONG>(a, b, items, ring);
    } else {
        claim_registers<240>();
        consume<T, A_ALONG, B_ALONG>(items, ring, shared, take);
    }
    // The other block writes to this one's shared memory and barriers until it has finished, too.
    meet_cluster();
}

// A product whose result leaves by the copy engine.
template <typename T, bool A_ALONG, bool B_ALONG, typename Out>
INLINE void product_in_boxes(const TensorMap& to, const TensorMap& a, const TensorMap& b, u32 rows, u32 columns, u32 depth,
                             const Out& out) {
    if (threadIdx.x == 0) prefetch_map(to);
    product<T, A_ALONG, B_ALONG>(a, b, rows, columns, depth, depth, [&](const Sums<T>& acc, const Place& at) {
        finish_in_boxes<T>(acc, at, to, out);
    });
    // A block's shared memory is read until then.
    wait_stores_read();
}
