// What attention kernels share: spans of keys, the softmax, numbers that are not finite, finished rows.
//
// A warp has 16 MI rows of a product, in fragments of mma.m16n8k16: of each 16 by 8 a lane holds rows lane / 4 and 8
// more (`half`), columns 2 (lane % 4) and the next. Tiles of shared memory say where chunk c of 16 bytes of row r
// lies: `tile.at(r, c)`.
#pragma once
#include "interval.cuh"
#include "pack.cuh"
#include "reduce.cuh"
#include "tile.cuh"

// ---- Spans of keys

// Of several queries: begin..end holds every key that one of them sees, all see inner_begin..inner_end.
struct alignas(16) Span {
    int begin, end, inner_begin, inner_end;

    INLINE static Span of(int2 seen) {
        const bool some = seen.x < seen.y;
        return {some ? seen.x : 0x7fffffff, seen.y, some ? seen.x : 0x7fffffff, seen.y};
    }
    INLINE Span with(const Span& s) const {
        return {min(begin, s.begin), max(end, s.end), max(inner_begin, s.inner_begin), min(inner_end, s.inner_end)};
    }
    INLINE Span across_warp() const {
        Span all = *this;
#pragma unroll
        for (int offset = 16; offset > 0; offset /= 2) {
            all = all.with({__shfl_xor_sync(0xffffffffu, all.begin, offset), __shfl_xor_sync(0xffffffffu, all.end, offset),
                            __shfl_xor_sync(0xffffffffu, all.inner_begin, offset),
                            __shfl_xor_sync(0xffffffffu, all.inner_end, offset)});
        }
        return all;
    }
    INLINE bool meets(int first, int last) const { return begin < last && end > first; }
    INLINE bool whole(int first, int last) const { return inner_begin <= first && inner_end >= last; }
    // Tiles of so many keys that hold all of it.
    INLINE int tiles(int keys) const { return begin < end ? (end - begin + keys - 1) / keys : 0; }
};

// ---- Sums

template <int MI, int NI>
INLINE void scale_all(float (&acc)[MI][NI][4], float by) {
#pragma unroll
    for (int i = 0; i < MI; i++)
#pragma unroll
        for (int j = 0; j < NI; j++)
#pragma unroll
            for (int e = 0; e < 4; e++) acc[i][j][e] *= by;
}

template <int MI, int NI>
INLINE void clear(float (&acc)[MI][NI][4]) {
#pragma unroll
    for (int i = 0; i < MI; i++)
#pragma unroll
        for (int j = 0; j < NI; j++)
#pragma unroll
            for (int e = 0; e < 4; e++) acc[i][j][e] = 0.0f;
}

// Block `k` of 16 columns as a left factor, once rounded: what a lane holds of a result is what it needs of a factor.
template <int NI>
INLINE void as_factor(u32 (&left)[4], const float (&p)[NI][4], int k) {
#pragma unroll
    for (int e = 0; e < 4; e++) left[e] = pack(p[2 * k + e / 2][e % 2 * 2], p[2 * k + e / 2][e % 2 * 2 + 1]);
}

// Running softmax of this lane's rows, 8 half + 16 i: the largest score, and the lane's part of the sum.
template <int MI>
struct Softmax {
    float top[MI][2], total[MI][2];

    INLINE void begin() {
#pragma unroll
        for (int i = 0; i < MI; i++)
#pragma unroll
            for (int half = 0; half < 2; half++) top[i][half] = -INFINITY, total[i][half] = 0.0f;
    }

    // Scores become weights; what was summed so far has to shrink by `shrink` to their scale.
    template <int NI>
    INLINE void weigh(float (&s)[MI][NI][4], float (&shrink)[MI][2], float scale) {
#pragma unroll
        for (int i = 0; i < MI; i++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                float most = top[i][half];
#pragma unroll
                for (int j = 0; j < NI; j++) most = fmaxf(most, fmaxf(s[i][j][half * 2], s[i][j][half * 2 + 1]));
                most = warp_reduce<Max, 4>(most);
                // A row that has seen nothing yet has no largest score.
                const float base = most == -INFINITY ? 0.0f : most * scale;
                shrink[i][half] = exp2_fast(top[i][half] * scale - base);
                float sum = total[i][half] * shrink[i][half];
#pragma unroll
                for (int j = 0; j < NI; j++)
#pragma unroll
                    for (int e = half * 2; e < half * 2 + 2; e++) {
                        s[i][j][e] = exp2_fast(fmaf(s[i][j][e], scale, -base));
                        sum += s[i][j][e];
                    }
                top[i][half] = most, total[i][half] = sum;
            }
    }

    // The sums of a row become means, or zeros where it has seen nothing; returns the logarithm of its weights' sum.
    template <int NO>
    INLINE float finish(float (&o)[MI][NO][4], int i, int half, bool some, float scale) const {
        const float all = warp_reduce<Sum, 4>(total[i][half]);
        const float share = some ? 1.0f / all : 0.0f;
#pragma unroll
        for (int j = 0; j < NO; j++) o[i][j][half * 2] *= share, o[i][j][half * 2 + 1] *= share;
        return some ? top[i][half] * scale + log2_fast(all) * LN_2 : 0.0f;
    }
};

// Rows of sums, each by its factor.
template <int MI, int NI>
INLINE void scale_rows(float (&acc)[MI][NI][4], const float (&by)[MI][2]) {
#pragma unroll
    for (int i = 0; i < MI; i++)
#pragma unroll
        for (int j = 0; j < NI; j++)
#pragma unroll
            for (int e = 0; e < 4; e++) acc[i][j][e] *= by[i][e / 2];
}

// Numbers of keys from `key` on become `nothing` for rows that do not see them: `seen(i, half)` is what a row sees.
template <int MI, int NI, typename Seen>
INLINE void hide(float (&s)[MI][NI][4], int key, const Seen& seen, float nothing) {
#pragma unroll
    for (int i = 0; i < MI; i++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int2 range = seen(i, half);
#pragma unroll
            for (int j = 0; j < NI; j++)
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    if (!sees(range, key + j * 8 + threadIdx.x % 4 * 2 + e)) s[i][j][half * 2 + e] = nothing;
                }
        }
}

// ---- Numbers that are not finite

INLINE bool finite(u32 bits16) { return (bits16 & 0x7f80) != 0x7f80; }

// As integers, all other numbers are larger than finite ones.
template <int MI, int NI>
INLINE int largest(const float (&acc)[MI][NI][4]) {
    int most = 0;
#pragma unroll
    for (int i = 0; i < MI; i++)
#pragma unroll
        for (int j = 0; j < NI; j++)
#pragma unroll
            for (int e = 0; e < 4; e++) most = max(most, __float_as_int(fabsf(acc[i][j][e])));
    return most;
}

// Gives what is not finite in `ROWS` rows of a tile to the rows of the result that see it: `seen(row, i, half)` tells
// whether row 8 half + 16 i of the lane does.
template <int ROWS, int MI, int NI, typename Tile, typename Seen>
INLINE void give_to_those_who_see(float (&acc)[MI][NI][4], const Tile& tile, const Seen& seen) {
    for (int row = 0; row < ROWS; row++) {
#pragma unroll
        for (int j = 0; j < NI; j++) {
            u32 pair;
            load_shared(pair, tile.at(row, j) + threadIdx.x % 4 * 4);
            if (finite(pair) && finite(pair >> 16)) continue;
#pragma unroll
            for (int i = 0; i < MI; i++)
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    if (!seen(row, i, half)) continue;
                    if (!finite(pair)) acc[i][j][half * 2] += low(pair);
                    if (!finite(pair >> 16)) acc[i][j][half * 2 + 1] += high(pair);
                }
        }
    }
}

// Puts zeros in place of what is not finite in `bytes` of shared memory, together with the other `threads`.
INLINE void clean(u32 tile, u32 bytes, u32 thread, u32 threads) {
    for (u32 at = thread * 16; at < bytes; at += threads * 16) {
        u32 v[4];
        load_shared(v, tile + at);
#pragma unroll
        for (int e = 0; e < 4; e++) v[e] = (finite(v[e]) ? v[e] & 0xffff : 0) | (finite(v[e] >> 16) ? v[e] & 0xffff0000u : 0);
        store_shared(tile + at, v);
    }
}

// ---- Finished rows

// Rounds a warp's rows of a result into rows of a tile, from `first` on, that no other warp touches and nobody reads,
// and sends them to `to` in whole rows; `rows` of the tile's rows exist.
template <int MI, int NI, typename Tile>
INLINE void send_rows(bf16* to, u64 stride, int rows, const float (&acc)[MI][NI][4], const Tile& tile, u32 first) {
    const u32 lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < MI; i++)
#pragma unroll
        for (int j = 0; j < NI; j++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const u32 row = first + i * 16 + half * 8 + lane / 4;
                store_shared(tile.at(row, j) + lane % 4 * 4, pack(acc[i][j][half * 2], acc[i][j][half * 2 + 1]));
            }
    __syncwarp();
#pragma unroll
    for (int n = 0; n < 16 * MI; n += 32 / NI) {
        const u32 row = first + n + lane / NI, chunk = lane % NI;
        Vec16 v;
        load_shared(v.word, tile.at(row, chunk));
        if (int(row) < rows) store16(to + row * stride + chunk * 8, v);
    }
}
