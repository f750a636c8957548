// A ring of stages in shared memory: one thread fills it with copies, warps read it and hand it back.
#pragma once
#include "hopper.cuh"

// A stage of a ring, and how often the ring was walked.
template <int STAGES, u32 TILE, int READERS = 8>
struct Stage {
    u32 tiles, barriers, index = 0, phase = 0;

    INLINE u32 tile() const { return tiles + index * TILE; }
    // Its phases end when copies have filled it, and when all readers have handed it back.
    INLINE u32 full() const { return barriers + index * 16; }
    INLINE u32 empty() const { return full() + 8; }

    INLINE void init() {
        for (; phase == 0; advance()) {
            init_barrier(full(), 1);
            init_barrier(empty(), READERS);
        }
    }
    INLINE void advance() {
        if (++index == STAGES) index = 0, phase ^= 1;
    }
    // Passes over stages that are for others.
    INLINE void skip(u32 stages) {
        index += stages;
        phase ^= index / STAGES & 1, index %= STAGES;
    }

    // For the warp that copies.
    INLINE void wait_empty() const { wait_phase(empty(), phase ^ 1); }

    // For those who multiply: wait, hand back, or both. A warp hands back when all of its lanes are done.
    INLINE void wait() const { wait_phase(full(), phase); }
    INLINE void release() {
        __syncwarp();
        if (threadIdx.x % 32 == 0) arrive(empty());
        advance();
    }
    INLINE void pass() {
        wait();
        release();
    }
};
