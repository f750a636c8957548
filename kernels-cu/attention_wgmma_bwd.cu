// The gradient of attention over intervals of keys on Hopper's tensor cores: that of attention.cu, where heads are
// wide enough.
//   ds = p (do . v - do . o),   dq = scale ds k,   dk = scale ds^T q,   dv = p^T do          Dao 2023; Shah et al. 2024
//
// A block has 128 keys of a head, transposed: tiles of 64 queries pass by. p and ds never leave the registers as left
// factors of dv and dk; ds goes to shared memory besides, for dq = ds k of the tile, which is added up in f32 in global
// memory: five products. Tiles of keys add in ascending order, each when its turn comes, so that the bits are the same
// every time; without `ordered` they add when they can, to what must be zeros before. Blocks take tiles of keys in the
// order in which they begin, so that who is waited for has begun. What is added up is rounded by a kernel of its own.
//
// Where a result is not finite, all is made again, in two passes that take what is not finite out of tiles that not all
// see, as attention.cu does: over keys for dk and dv, over 128 queries of a block for dq. They sum in the same order, so
// that what is hidden changes no bit; they leave at once where nothing is `wanted` of them.
//
// One warp finds and copies what passes by into a ring of stages, in one pass another adds dq up; two warpgroups have 64
// rows each.
//
// `words` and `sums` belong to one call: words are zeros before it.
// `stats` (lse log2 e, do . o), `seen` and `spans` are what attention_bwd_prepare_* makes of 64 queries at a time, padded
// with queries that see nothing. `grad` is do. The heads of q begin in column 0 of its rows, those of k and v in k_column and
// v_column; rows of dk and dv lie kv_stride apart, those of dq q_stride. Slots and caches as in attention.cu. Where heads
// turned by the positions of their rows (`turned`; without caches), dq and dk turn back before they are rounded, as in rope.cu.
//
// Target  sm_90a
//
// entry                                  grid               block  shared       arguments                                                                                                                             bytes                      flops
// attention_bwd_wgmma_d64_bf16           Tk/128,H/G,caches  384    1024+156672  dk dv sums words | q:map k:map v:map grad:map stats seen spans slots positions | B T Tk H G kv_stride k_column v_column caches ordered turned ratio:u64 | scale  2B(2TH+4TkH/G)D+8BTH(D+1)  10BHTTkD
// attention_bwd_wgmma_d128_bf16          Tk/128,H/G,caches  384    1024+201728  dk dv sums words | q:map k:map v:map grad:map stats seen spans slots positions | B T Tk H G kv_stride k_column v_column caches ordered turned ratio:u64 | scale  2B(2TH+4TkH/G)D+8BTH(D+1)  10BHTTkD
// attention_bwd_finish_wgmma_d64_bf16    T/64,H,B           128    1024+8192    dq words | sums spans positions | T q_stride turned ratio:u64 | scale                                                                                            6BTHD                      BTHD
// attention_bwd_finish_wgmma_d128_bf16   T/64,H,B           128    1024+16384   dq words | sums spans positions | T q_stride turned ratio:u64 | scale                                                                                            6BTHD                      BTHD
// attention_bwd_keys_wgmma_d64_bf16      Tk/128,H/G,caches  384    1024+106568  dk dv | q:map k:map v:map grad:map stats seen spans slots positions wanted | B T Tk H G kv_stride k_column v_column caches turned ratio:u64 | scale              2B(2TH+4TkH/G)D+8BTH       8BHTTkD
// attention_bwd_keys_wgmma_d128_bf16     Tk/128,H/G,caches  384    1024+170040  dk dv | q:map k:map v:map grad:map stats seen spans slots positions wanted | B T Tk H G kv_stride k_column v_column caches turned ratio:u64 | scale              2B(2TH+4TkH/G)D+8BTH       8BHTTkD
// attention_bwd_queries_wgmma_d64_bf16   T/128,H,B          384    3072+98376   dq | q:map k:map v:map grad:map stats seen spans slots positions wanted | T Tk H G q_stride k_column v_column caches turned ratio:u64 | scale                    2B(3TH+2TkH/G)D+8BTH       6BHTTkD
// attention_bwd_queries_wgmma_d128_bf16  T/128,H,B          384    3072+196680  dq | q:map k:map v:map grad:map stats seen spans slots positions wanted | T Tk H G q_stride k_column v_column caches turned ratio:u64 | scale                    2B(3TH+2TkH/G)D+8BTH       6BHTTkD
//
// Needs   D of 64 or 128; rows of all maps 16-byte aligned; no extent of 0. Boxes hold 64 elements of 64 rows, swizzled by
//         128 bytes.
// Rounds  p and ds to bf16 as factors; dq, dk, dv once, on store; sums in f32, fixed order (deterministic) if `ordered`.
#include "common/warpgroups.cuh"
#include "common/waves.cuh"

// Rows of a block's own tiles, of a warpgroup, and of what passes by.
constexpr int OWN = 128, HALF = 64, PASSING = 64;

extern __shared__ __align__(1024) char shared_memory[];

using Scores = float[1][PASSING / 8][4];

template <int NI>
INLINE void add_all(float (&acc)[1][NI][4], const float (&x)[1][NI][4]) {
#pragma unroll
    for (int j = 0; j < NI; j++)
#pragma unroll
        for (int e = 0; e < 4; e++) acc[0][j][e] += x[0][j][e];
}

// How heads of D turned by the positions of their rows. Made by all threads of a block, before they meet.
template <int D>
struct Rotation {
    const int* positions;
    const u64* frequencies;

    INLINE Rotation(const int* of_rows, u32 turned, u64 ratio) : positions(turned != 0 ? of_rows : nullptr) {
        __shared__ u64 of_pairs[D / 2];
        frequencies = of_pairs;
        if (positions == nullptr) return;
        for (u32 j = threadIdx.x; j < D / 2; j += blockDim.x) of_pairs[j] = frequency(ratio, j);
    }

    // Turns a result back: this thread's rows `row` of `rows` and eight further, which are those of `first` on.
    INLINE void back(float (&x)[1][D / 8][4], u64 first, int row, int rows) const {
        if (positions == nullptr) return;
#pragma unroll
        for (int lower = 0; lower < 2; lower++) {
            const int n = row + lower * 8, position = n < rows ? positions[first + n] : -1;
            if (position < 0) continue;
#pragma unroll
            for (int j = 0; j < D / 8; j++) {
                const Wave w = wave(turns(position, frequencies[j * 4 + threadIdx.x % 4]));
                float &a = x[0][j][lower * 2], &b = x[0][j][lower * 2 + 1];
                const float turned = a * w.cos + b * w.sin;
                b = b * w.cos - a * w.sin, a = turned;
            }
        }
    }
};

// What passes by: two tiles of 64 rows.
template <int D_>
struct Layout {
    static constexpr int D = D_;
    static constexpr u32 OWN_TILE = D / 64 * SLAB<OWN>, TILE = D / 64 * SLAB<PASSING>;
};

// Two tiles of 128 rows that a block keeps: one box for every 64.
template <int D>
INLINE void copy_own(u32 to, const TensorMap& map, u32 barrier, int column, int row, int layer) {
#pragma unroll
    for (int h = 0; h < OWN / HALF; h++) copy_slabs<D, HALF>(to + h * (D / 64 * SLAB<HALF>), map, barrier, column, row + h * HALF, layer);
}

// ---- dk and dv

template <int D, int STAGES = D == 64 ? 4 : 3>
struct Keys : Layout<D> {
    using L = Layout<D>;
    // Queries multiplied at once, as many as registers allow.
    static constexpr int SLICE = D == 64 ? 64 : 32;
    // A stage: queries, gradients, their stats and intervals, their span and whether it is the end.
    static constexpr u32 STATS = 2 * L::TILE, SEEN = STATS + PASSING * 8, SPAN = SEEN + PASSING * 8, END = SPAN + 16,
                         STAGE = SPAN + 1024;
    static constexpr u32 RING = 2 * L::OWN_TILE, BARRIERS = RING + STAGES * STAGE, OWN_FULL = BARRIERS + STAGES * 16;
    using Ring = Stage<STAGES, STAGE>;

    const TensorMap &q, &k, &v, &grad;
    const float2* stats;
    const int2* seen;
    const Span* spans;
    const int* slots;
    u32 batch, queries, keys, heads, group, kv_stride;
    int k_column, v_column;
    u32 caches;
    float scale;
    int first, kv_head, slot;
    Rotation<D> rotation;

    INLINE int last() const { return min(first + OWN, int(keys)); }
    INLINE int spans_of_row() const { return (queries + PASSING - 1) / PASSING; }

    // Which spans of batch row `b` hold queries for the block's keys: from the first to the last of them. For a warp.
    INLINE int2 passing(int b) const {
        int begin = -0x7fffffff, end = 0;
        for (int t = threadIdx.x % 32; t < spans_of_row(); t += 32) {
            if (spans[u64(b) * spans_of_row() + t].meets(first, last())) begin = max(begin, -t), end = t + 1;
        }
        return make_int2(-warp_reduce<Max>(begin), warp_reduce<Max>(end));
    }

    INLINE void send(Ring& ring, int b, int head, int t) const {
        ring.wait_empty();
        const u32 stage = ring.tile(), full = ring.full();
        if (threadIdx.x == 0) {
            const u64 span = u64(b) * spans_of_row() + t;
            store_shared(stage + END, 0u);
            arrive_expecting(full, 2 * L::TILE + PASSING * 16 + 16);
            copy_slabs<D, PASSING>(stage, q, full, head * D, t * PASSING, b);
            copy_slabs<D, PASSING>(stage + L::TILE, grad, full, head * D, t * PASSING, b);
            copy_bytes(stage + SPAN, spans + span, sizeof(Span), full);
            copy_bytes(stage + SEEN, seen + span * PASSING, PASSING * 8, full);
            const u64 of_head = (u64(b) * heads + head) * spans_of_row() + t;
            copy_bytes(stage + STATS, stats + of_head * PASSING, PASSING * 8, full);
        }
        __syncwarp();
        ring.advance();
    }

    // Calls f(b, head, t) for what passes by, in order. For a warp.
    template <typename F>
    INLINE void for_passing(const F& f) const {
        for (int b = 0; b < int(batch); b++) {
            if (cache_of(slots, caches, b) != slot) continue;
            const int2 range = passing(b);
            for (int g = 0; g < int(group); g++)
                for (int t = range.x; t < range.y; t++) f(b, kv_head * group + g, t);
        }
    }

    // `again()` tells whether all comes by once more.
    template <typename Again>
    INLINE void produce(u32 shared, const Again& again) const {
        const u32 full = shared + OWN_FULL;
        if (threadIdx.x == 0) {
            arrive_expecting(full, 2 * L::OWN_TILE);
            copy_own<D>(shared, k, full, k_column + kv_head * D, first, slot);
            copy_own<D>(shared + L::OWN_TILE, v, full, v_column + kv_head * D, first, slot);
        }
        __syncwarp();
        Ring ring{shared + RING, shared + BARRIERS};
        for (int careful = 0; careful < 2; careful++) {
            for_passing([&](int b, int head, int t) { send(ring, b, head, t); });
            ring.wait_empty();
            if (threadIdx.x == 0) {
                store_shared(ring.tile() + END, 1u);
                arrive(ring.full());
            }
            __syncwarp();
            ring.advance();
            if (careful || !again()) break;
        }
    }

    // What passes by, for 64 keys: P^T = exp(K Q^T - lse), dS^T = P^T (V dO^T - delta), dV += P^T dO, dK += dS^T Q.
    template <bool CAREFUL>
    INLINE void walk(float (&dk)[1][D / 8][4], float (&dv)[1][D / 8][4], Ring& ring, u32 shared) const {
        const int lane = threadIdx.x % 32, half = threadIdx.x / 128 - 1, own = first + half * HALF;
        const u32 own_keys = shared + half * L::TILE, own_values = own_keys + L::OWN_TILE;
        const int key = own + threadIdx.x / 32 % 4 * 16 + lane / 4;
        for (;; ring.release()) {
            ring.wait();
            const u32 stage = ring.tile();
            u32 end, words[4];
            load_shared(end, stage + END);
            if (end != 0) break;
            load_shared(words, stage + SPAN);
            const Span span = {int(words[0]), int(words[1]), int(words[2]), int(words[3])};
            const bool met = span.meets(own, min(own + HALF, int(keys)));
            const bool whole = span.whole(own, min(own + HALF, int(keys)));
            if (!CAREFUL && !met) continue;
#pragma unroll 1
            for (int slice = 0; slice < PASSING; slice += SLICE) {
                const u32 queries_at = row_at(stage, slice), grads_at = row_at(stage + L::TILE, slice);
                Factor<SLICE> p, ds;
                if (met) {
                    float s[1][SLICE / 8][4], dp[1][SLICE / 8][4];
                    begin_dots<D, HALF, PASSING>(s, own_keys, queries_at);
                    begin_dots<D, HALF, PASSING>(dp, own_values, grads_at);
                    wait_products<0>();
#pragma unroll
                    for (int n = 0; n < SLICE / 16; n++) {
                        differ(s[0][2 * n], dp[0][2 * n], stage, slice + n * 16, key, whole);
                        differ(s[0][2 * n + 1], dp[0][2 * n + 1], stage, slice + n * 16 + 8, key, whole);
                        as_factor(p[n], s[0], n);
                        as_factor(ds[n], dp[0], n);
                    }
                }
                if (CAREFUL && !span.whole(first, last())) {
                    const auto sees_key = [&](int row, int, int lower) {
                        return sees(interval_at(stage, slice + row), key + lower * 8);
                    };
                    give_to_those_who_see<SLICE>(dv, Slabs<PASSING>{grads_at}, sees_key);
                    give_to_those_who_see<SLICE>(dk, Slabs<PASSING>{queries_at}, sees_key);
                    clean_together([&] {
                        clean_rows<D, PASSING, SLICE>(queries_at);
                        clean_rows<D, PASSING, SLICE>(grads_at);
                    });
                }
                if (met) {
                    begin_sums<D, PASSING>(dv, p, grads_at);
                    begin_sums<D, PASSING>(dk, ds, queries_at);
                    wait_products<0>();
                }
            }
        }
        ring.release();
    }

    INLINE static int2 interval_at(u32 stage, int row) {
        u32 begin, end;
        load_shared(begin, stage + SEEN + row * 8);
        load_shared(end, stage + SEEN + row * 8 + 4);
        return make_int2(begin, end);
    }

    // Scores become p, and products of values and gradients ds: of this lane's keys, and of two of the queries from
    // `first_query` on.
    INLINE void differ(float (&s)[4], float (&dp)[4], u32 stage, int first_query, int key, bool whole) const {
        const u32 two = (first_query + threadIdx.x % 4 * 2) * 8;
        float stats_of[4];
        load_shared(stats_of, stage + STATS + two);
#pragma unroll
        for (int e = 0; e < 4; e++) {
            const float lse = stats_of[e % 2 * 2], delta = stats_of[e % 2 * 2 + 1];
            s[e] = exp2_fast(fmaf(s[e], scale * LOG2_E, -lse));
            dp[e] = s[e] * (dp[e] - delta);
        }
        if (whole) return;
        u32 words[4];
        load_shared(words, stage + SEEN + two);
#pragma unroll
        for (int e = 0; e < 4; e++) {
            const int2 range = make_int2(words[e % 2 * 2], words[e % 2 * 2 + 1]);
            if (!sees(range, key + e / 2 * 8)) s[e] = 0.0f, dp[e] = 0.0f;
        }
    }

    // For one thread.
    INLINE void begin(u32 shared) const {
        prefetch_map(q), prefetch_map(k), prefetch_map(v), prefetch_map(grad);
        init_barrier(shared + OWN_FULL, 1);
        Ring{shared + RING, shared + BARRIERS}.init();
        fence_barrier_init();
    }

    // Over the tiles of keys and values that a warpgroup read.
    INLINE void send_results(bf16* dk_to, bf16* dv_to, float (&dk)[1][D / 8][4], const float (&dv)[1][D / 8][4], u32 shared) const {
        scale_all(dk, scale);
        const u32 half = threadIdx.x / 128 - 1, row = threadIdx.x / 32 % 4 * 16, tile = shared + half * L::TILE;
        const int begin = first + half * HALF, rows = int(keys) - begin;
        const u64 from = u64(slot) * keys + begin, to = from * kv_stride + kv_head * D;
        rotation.back(dk, from, row + threadIdx.x % 32 / 4, rows);
        send_rows(dk_to + to, kv_stride, rows, dk, Slabs<HALF>{tile}, row);
        send_rows(dv_to + to, kv_stride, rows, dv, Slabs<HALF>{tile + L::OWN_TILE}, row);
    }

    INLINE void run(bf16* dk_to, bf16* dv_to) const {
        __shared__ int spoilt;
        const u32 shared = shared_address(shared_memory);
        if (threadIdx.x == 0) {
            spoilt = 0;
            begin(shared);
        }
        __syncthreads();
        if (threadIdx.x < 128) {
            release_registers<40>();
            if (threadIdx.x < 32) produce(shared, [&] { return again_carefully(spoilt, 0); });
            return;
        }
        claim_registers<232>();
        Ring ring{shared + RING, shared + BARRIERS};
        float dk[1][D / 8][4], dv[1][D / 8][4];
        clear(dk), clear(dv);
        wait_phase(shared + OWN_FULL, 0);
        walk<false>(dk, dv, ring, shared);
        if (again_carefully(spoilt, max(largest(dk), largest(dv)))) {
            clear(dk), clear(dv);
            walk<true>(dk, dv, ring, shared);
        }
        send_results(dk_to, dv_to, dk, dv, shared);
    }
};

// ---- All three in one pass

// What the kernels of a backward pass tell each other, words in global memory that are 0 at first: how many blocks have
// begun; whether a result is not finite; and, for each row of the batch, head and span of queries, how many tiles of
// keys have added to its dq.
enum Word { BEGUN, SPOILT, ADDED };

template <int D>
struct Once : Keys<D, D == 64 ? 4 : 2> {
    using Base = Keys<D, D == 64 ? 4 : 2>;
    using L = Layout<D>;
    // Barriers: dS is written; dq is staged, or has left its stage again.
    static constexpr int WRITTEN = 1, STAGED = 2, LEFT = 3;
    // A warpgroup makes 64 columns of dq at a time. Where that is all of them they take turns, else each has its own.
    static constexpr int SLABS = D / 64, ADDERS = SLABS * 128 + 32;
    // dS of two visits, transposed; dq, in the order in which threads hold it.
    static constexpr u32 DS = Base::OWN_FULL + 1024 - Base::OWN_FULL % 1024, DQ = DS + 2 * SLAB<OWN>, DQ_BYTES = PASSING * D * 4;

    float* sums;
    u32* words;
    bool ordered;

    // dQ = dS K, of 64 columns of the block's keys.
    INLINE static void begin_dq(float (&dq)[8][4], u32 ds, u32 slab) {
        begin_products();
#pragma unroll
        for (int n = 0; n < OWN / 16; n++) {
            const u32 rows = slab + n / 4 * L::TILE + n % 4 * (16 * 128);
            multiply_add<false, false>(dq, matrix_at(ds + n * (16 * 128), 0), matrix_at(rows, 0), n > 0);
        }
        commit_products();
    }

    INLINE static void stage(const float (&dq)[8][4], u32 to) {
        meet<LEFT, ADDERS>();
#pragma unroll
        for (int j = 0; j < 8; j++) store_shared(to + (j * 128 + threadIdx.x % 128) * 16, dq[j]);
        fence_writes();
        come<ADDERS>(STAGED);
    }

    // What passes by, for 64 keys, as `Keys::walk`; and dQ of all 128 keys.
    INLINE void walk(float (&dk)[1][D / 8][4], float (&dv)[1][D / 8][4], u32 shared) const {
        const int lane = threadIdx.x % 32, half = threadIdx.x / 128 - 1, own = this->first + half * HALF;
        const int row = half * HALF + threadIdx.x / 32 % 4 * 16 + lane / 4, key = this->first + row;
        const u32 own_keys = shared + half * L::TILE, own_values = own_keys + L::OWN_TILE, slab = SLABS == 2 ? half : 0;
        typename Base::Ring ring{shared + Base::RING, shared + Base::BARRIERS};
        for (u32 visit = 0;; ring.release()) {
            ring.wait();
            const u32 queries = ring.tile(), grads = queries + L::TILE;
            u32 end, words[4];
            load_shared(end, queries + Base::END);
            if (end != 0) break;
            load_shared(words, queries + Base::SPAN);
            const Span span = {int(words[0]), int(words[1]), int(words[2]), int(words[3])};
            if (!span.meets(this->first, this->first + OWN)) continue;
            const bool whole = span.whole(own, own + HALF);
            const Rows<128> tile{shared + DS + visit % 2 * SLAB<OWN>};
            Factor<PASSING> p, ds;
            Scores s, dp;
            begin_dots<D, HALF, PASSING>(s, own_keys, queries);
            begin_dots<D, HALF, PASSING>(dp, own_values, grads);
            wait_products<0>();
#pragma unroll
            for (int n = 0; n < PASSING / 16; n++) {
                this->differ(s[0][2 * n], dp[0][2 * n], queries, n * 16, key, whole);
                this->differ(s[0][2 * n + 1], dp[0][2 * n + 1], queries, n * 16 + 8, key, whole);
                as_factor(p[n], s[0], n);
                as_factor(ds[n], dp[0], n);
#pragma unroll
                for (int e = 0; e < 4; e++) store_shared(tile.at(row + e % 2 * 8, n * 2 + e / 2) + lane % 4 * 4, ds[n][e]);
            }
            begin_sums<D, PASSING>(dv, p, grads);
            // Two visits on its dS is written over: by then all have been here once more, and have done with it.
            fence_writes();
            meet<WRITTEN, MULTIPLIERS>();
            if (SLABS == 2 || half == visit % 2) {
                float dq[8][4];
                begin_dq(dq, tile.address, shared + slab * SLAB<HALF>);
                begin_sums<D, PASSING>(dk, ds, queries);
                wait_products<1>();
                stage(dq, shared + DQ + slab * (PASSING * 64 * 4));
            } else {
                begin_sums<D, PASSING>(dk, ds, queries);
            }
            wait_products<0>();
            visit++;
        }
        ring.release();
    }

    // Adds what is staged to the sums, when those who have smaller keys have done so; the first of them stores it. They
    // began earlier than this block, so that the wait ends. Without an order all add to zeros. For a warp.
    INLINE void add_up(u32 shared) const {
        const bool leads = threadIdx.x % 32 == 0;
        come<ADDERS>(LEFT);
        this->for_passing([&](int b, int head, int t) {
            const int spans = this->spans_of_row();
            const Span span = this->spans[u64(b) * spans + t];
            if (!span.meets(this->first, this->first + OWN)) return;
            const u64 at = (u64(b) * this->heads + head) * spans + t;
            const u32 turn = this->first / OWN - span.begin / OWN;
            meet<STAGED, ADDERS>();
            if (leads) {
                float* to = sums + at * (PASSING * D);
                if (ordered) {
                    while (load_acquire(words + ADDED + at) != turn) {}
                    fence_copies();
                }
                if (ordered && turn == 0) store_bytes(to, shared + DQ, DQ_BYTES);
                else add_floats(to, shared + DQ, DQ_BYTES);
                commit_stores();
                wait_stores_read();
            }
            __syncwarp();
            come<ADDERS>(LEFT);
            if (leads) {
                wait_stores();
                add_release(words + ADDED + at, 1);
            }
            __syncwarp();
        });
    }

    INLINE void run(bf16* dk_to, bf16* dv_to, u32 shared) const {
        if (threadIdx.x == 0) this->begin(shared);
        __syncthreads();
        if (threadIdx.x < 128) {
            release_registers<40>();
            if (threadIdx.x < 32) this->produce(shared, [] { return false; });
            else if (threadIdx.x < 64) add_up(shared);
            return;
        }
        claim_registers<232>();
        float dk[1][D / 8][4], dv[1][D / 8][4];
        clear(dk), clear(dv);
        wait_phase(shared + Base::OWN_FULL, 0);
        walk(dk, dv, shared);
        if (max(largest(dk), largest(dv)) >= __float_as_int(INFINITY)) atomicOr(words + SPOILT, 1);
        // Both have read all keys.
        meet<WRITTEN, MULTIPLIERS>();
        this->send_results(dk_to, dv_to, dk, dv, shared);
    }
};

template <int D>
INLINE void backward_once(bf16* dk, bf16* dv, float* sums, u32* words, const TensorMap& q, const TensorMap& k,
                          const TensorMap& v, const TensorMap& grad, const float2* stats, const int2* seen, const Span* spans,
                          const int* slots, u32 batch, u32 queries, u32 keys, u32 heads, u32 group, u32 kv_stride,
                          u32 k_column, u32 v_column, u32 caches, u32 ordered, const Rotation<D>& rotation, float scale) {
    __shared__ u32 begun;
    if (threadIdx.x == 0) begun = atomicAdd(words + BEGUN, 1);
    __syncthreads();
    // In the order in which blocks begin: by tiles of keys, the first of all heads before the second.
    const u32 others = gridDim.y * gridDim.z, rest = begun % others;
    const Once<D> pass{{{}, q, k, v, grad, stats, seen, spans, slots, batch, queries, keys, heads, group, kv_stride,
                        int(k_column), int(v_column), caches, scale, int(begun / others) * OWN, int(rest % gridDim.y),
                        int(rest / gridDim.y), rotation},
                       sums, words, ordered != 0};
    pass.run(dk, dv, shared_address(shared_memory));
}

// dq of 64 queries of a head, of what was added up.
template <int D>
INLINE void finish(bf16* dq_to, u32* words, const float* sums, const Span* spans, u32 queries, u32 q_stride,
                   const Rotation<D>& rotation, float scale) {
    const int t = blockIdx.x, head = blockIdx.y, b = blockIdx.z;
    __syncthreads();
    const Span span = spans[u64(b) * gridDim.x + t];
    float dq[1][D / 8][4];
    clear(dq);
    if (span.begin < span.end) {
        const float* from = sums + ((u64(b) * gridDim.y + head) * gridDim.x + t) * (PASSING * D) + threadIdx.x * 4;
#pragma unroll
        for (int j = 0; j < D / 8; j++) unpack(dq[0][j], load16(from + j * 128 * 4));
    }
    if (largest(dq) >= __float_as_int(INFINITY)) atomicOr(words + SPOILT, 1);
#pragma unroll
    for (int j = 0; j < D / 8; j++)
#pragma unroll
        for (int e = 0; e < 4; e++) dq[0][j][e] = (dq[0][j][e] + 0.0f) * scale;
    const u32 row = threadIdx.x / 32 * 16;
    const int rows = int(queries) - t * PASSING;
    const u64 first = u64(b) * queries + t * PASSING;
    rotation.back(dq, first, row + threadIdx.x % 32 / 4, rows);
    send_rows(dq_to + first * q_stride + head * D, q_stride, rows, dq, Slabs<PASSING>{shared_address(shared_memory)}, row);
}

// ---- dq alone

template <int D>
struct Queries : Layout<D> {
    using L = Layout<D>;
    static constexpr int STAGES = 4;
    // Keys multiplied at once, as many as registers allow.
    static constexpr int SLICE = D == 64 ? 64 : 32;
    static constexpr u32 STAGE = 2 * L::TILE, RING = 2 * L::OWN_TILE, BARRIERS = RING + STAGES * STAGE,
                         OWN_FULL = BARRIERS + STAGES * 16;
    using Ring = Stage<STAGES, STAGE>;

    const TensorMap &q, &k, &v, &grad;
    int first, head, b, slot, k_column, v_column;
    Span all;
    float scale;

    // From the tile of 128 on that holds the first key.
    INLINE int key(int t) const { return all.begin / OWN * OWN + t * PASSING; }
    INLINE int tiles() const { return all.begin < all.end ? (all.end - key(0) + PASSING - 1) / PASSING : 0; }

    INLINE void produce(u32 shared, int& spoilt) const {
        const bool leads = threadIdx.x == 0;
        const u32 own = shared + OWN_FULL;
        if (leads) {
            arrive_expecting(own, 2 * L::OWN_TILE);
            copy_own<D>(shared, q, own, head * D, first, b);
            copy_own<D>(shared + L::OWN_TILE, grad, own, head * D, first, b);
        }
        __syncwarp();
        Ring ring{shared + RING, shared + BARRIERS};
        for (int careful = 0; careful < 2; careful++) {
            for (int t = 0; t < tiles(); t++) {
                ring.wait_empty();
                if (leads) {
                    arrive_expecting(ring.full(), STAGE);
                    copy_slabs<D, PASSING>(ring.tile(), k, ring.full(), k_column, key(t), slot);
                    copy_slabs<D, PASSING>(ring.tile() + L::TILE, v, ring.full(), v_column, key(t), slot);
                }
                __syncwarp();
                ring.advance();
            }
            if (careful || !again_carefully(spoilt, 0)) break;
        }
    }

    // Tiles of keys, for 64 queries: P = exp(Q K^T - lse), dS = P (dO V^T - delta), dQ += dS K; of 128 keys at a time, as
    // in one pass. `seen` and `logs` belong to this lane's first row; those of the other are eight behind.
    template <bool CAREFUL>
    INLINE void walk(float (&dq)[1][D / 8][4], Ring& ring, u32 shared, const Span& own, const int2* seen,
                     const float2* logs) const {
        for (int begin = key(0); begin < all.end; begin += OWN) {
            float sum[1][D / 8][4];
            clear(sum);
            for (int from = begin; from < min(begin + OWN, all.end); from += PASSING, ring.release()) {
                ring.wait();
#pragma unroll 1
                for (int slice = 0; slice < PASSING; slice += SLICE)
                    step<CAREFUL>(sum, row_at(ring.tile(), slice), row_at(ring.tile() + L::TILE, slice), shared, from + slice,
                                  own.meets(begin, begin + OWN), own, seen, logs);
            }
            add_all(dq, sum);
        }
    }

    template <bool CAREFUL>
    INLINE void step(float (&sum)[1][D / 8][4], u32 keys, u32 values, u32 shared, int from, bool met, const Span& own, const int2* seen,
                     const float2* logs) const {
        const u32 half = threadIdx.x / 128 - 1, queries = shared + half * L::TILE, grads = queries + L::OWN_TILE;
        const auto range = [&](int, int lower) { return seen[lower * 8]; };
        Factor<SLICE> factor;
        if (met) {
            float s[1][SLICE / 8][4], ds[1][SLICE / 8][4];
            begin_dots<D, HALF, PASSING>(s, queries, keys);
            begin_dots<D, HALF, PASSING>(ds, grads, values);
            wait_products<0>();
            if (!own.whole(from, from + SLICE)) hide(s, from, range, -INFINITY), hide(ds, from, range, 0.0f);
#pragma unroll
            for (int j = 0; j < SLICE / 8; j++)
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    const float2 log = logs[e / 2 * 8];
                    ds[0][j][e] = exp2_fast(fmaf(s[0][j][e], scale * LOG2_E, -log.x)) * (ds[0][j][e] - log.y);
                }
            as_factors<SLICE>(factor, ds);
        }
        if (CAREFUL && !all.whole(from, from + SLICE)) {
            give_to_those_who_see<SLICE>(sum, Slabs<PASSING>{keys},
                                         [&](int n, int i, int lower) { return sees(range(i, lower), from + n); });
            clean_together([&] { clean_rows<D, PASSING, SLICE>(keys); });
        }
        if (met) {
            begin_sums<D, PASSING>(sum, factor, keys);
            wait_products<0>();
        }
    }
};

template <int D>
INLINE void backward_queries(bf16* dq_to, const TensorMap& q, const TensorMap& k, const TensorMap& v, const TensorMap& grad,
                             const float2* stats, const int2* seen, const Span* spans, const int* slots, const u32* wanted,
                             u32 queries, u32 keys, u32 heads, u32 group, u32 q_stride, u32 k_column, u32 v_column,
                             u32 caches, const int* positions, u32 turned, u64 ratio, float scale) {
    if (*wanted == 0) return;
    const Rotation<D> rotation(positions, turned, ratio);
    using Pass = Queries<D>;
    using L = Layout<D>;
    __shared__ int2 intervals[OWN];
    __shared__ float2 logs[OWN];
    __shared__ int spoilt;
    const u32 shared = shared_address(shared_memory), lane = threadIdx.x % 32;
    // The last queries see the most keys, where later ones see more: they begin first.
    const int first = (gridDim.x - 1 - blockIdx.x) * OWN, head = blockIdx.y, b = blockIdx.z, kv = head / group * D;
    const int spans_of_row = (queries + PASSING - 1) / PASSING, t = first / PASSING;
    const u64 padded = u64(spans_of_row) * PASSING, row = u64(b) * heads + head;
    const Span upper = spans[u64(b) * spans_of_row + t];
    const Span lower = t + 1 < spans_of_row ? spans[u64(b) * spans_of_row + t + 1] : Span::of(make_int2(0, 0));
    const Pass pass{{}, q, k, v, grad, first, head, b, max(cache_of(slots, caches, b), 0), int(k_column) + kv,
                    int(v_column) + kv, upper.with(lower), scale};

    if (threadIdx.x < OWN) {
        const int n = first + threadIdx.x;
        const bool there = n < int(padded);
        intervals[threadIdx.x] = there ? seen[b * padded + n] : make_int2(0, 0);
        logs[threadIdx.x] = there ? stats[row * padded + n] : make_float2(0.0f, 0.0f);
    }
    if (threadIdx.x == 0) {
        prefetch_map(q), prefetch_map(k), prefetch_map(v), prefetch_map(grad);
        spoilt = 0;
        init_barrier(shared + Pass::OWN_FULL, 1);
        typename Pass::Ring{shared + Pass::RING, shared + Pass::BARRIERS}.init();
        fence_barrier_init();
    }
    __syncthreads();
    if (threadIdx.x < 128) {
        release_registers<40>();
        if (threadIdx.x < 32) pass.produce(shared, spoilt);
        return;
    }
    claim_registers<232>();
    typename Pass::Ring ring{shared + Pass::RING, shared + Pass::BARRIERS};
    const u32 half = threadIdx.x / 128 - 1, in_half = threadIdx.x / 32 % 4 * 16, local = half * HALF + in_half + lane / 4;
    const Span own = half == 0 ? upper : lower;
    float dq[1][D / 8][4];
    clear(dq);
    wait_phase(shared + Pass::OWN_FULL, 0);
    pass.template walk<false>(dq, ring, shared, own, intervals + local, logs + local);
    if (again_carefully(spoilt, largest(dq))) {
        clear(dq);
        pass.template walk<true>(dq, ring, shared, own, intervals + local, logs + local);
    }
    scale_all(dq, scale);
    const int begin = first + half * HALF, rows = int(queries) - begin;
    const u64 from = u64(b) * queries + begin;
    rotation.back(dq, from, in_half + lane / 4, rows);
    send_rows(dq_to + from * q_stride + head * D, q_stride, rows, dq, Slabs<HALF>{shared + half * L::TILE}, in_half);
}

template <int D>
INLINE void backward_keys(bf16* dk, bf16* dv, const TensorMap& q, const TensorMap& k, const TensorMap& v, const TensorMap& grad,
                          const float2* stats, const int2* seen, const Span* spans, const int* slots, const u32* wanted,
                          u32 batch, u32 queries, u32 keys, u32 heads, u32 group, u32 kv_stride, u32 k_column, u32 v_column,
                          u32 caches, const int* positions, u32 turned, u64 ratio, float scale) {
    if (*wanted == 0) return;
    const Keys<D> pass{{}, q, k, v, grad, stats, seen, spans, slots, batch, queries, keys, heads, group, kv_stride,
                       int(k_column), int(v_column), caches, scale, int(blockIdx.x) * OWN, int(blockIdx.y), int(blockIdx.z),
                       {positions, turned, ratio}};
    pass.run(dk, dv);
}

extern "C" __global__ void __launch_bounds__(384, 1)
    attention_bwd_wgmma_d64_bf16(bf16* dk, bf16* dv, float* sums, u32* words, const __grid_constant__ TensorMap q, const __grid_constant__ TensorMap k,
        const __grid_constant__ TensorMap v, const __grid_constant__ TensorMap grad,
        const float2* stats, const int2* seen, const Span* spans, const int* slots, const int* positions, u32 batch, u32 queries, u32 keys,
        u32 heads, u32 group, u32 kv_stride, u32 k_column, u32 v_column, u32 caches, u32 ordered, u32 turned, u64 ratio, float scale) {
    backward_once<64>(dk, dv, sums, words, q, k, v, grad, stats, seen, spans, slots, batch, queries, keys, heads, group,
        kv_stride, k_column, v_column, caches, ordered, {positions, turned, ratio}, scale);
}

extern "C" __global__ void __launch_bounds__(384, 1)
    attention_bwd_wgmma_d128_bf16(bf16* dk, bf16* dv, float* sums, u32* words, const __grid_constant__ TensorMap q, const __grid_constant__ TensorMap k,
        const __grid_constant__ TensorMap v, const __grid_constant__ TensorMap grad,
        const float2* stats, const int2* seen, const Span* spans, const int* slots, const int* positions, u32 batch, u32 queries, u32 keys,
        u32 heads, u32 group, u32 kv_stride, u32 k_column, u32 v_column, u32 caches, u32 ordered, u32 turned, u64 ratio, float scale) {
    backward_once<128>(dk, dv, sums, words, q, k, v, grad, stats, seen, spans, slots, batch, queries, keys, heads, group,
        kv_stride, k_column, v_column, caches, ordered, {positions, turned, ratio}, scale);
}

extern "C" __global__ void __launch_bounds__(128)
    attention_bwd_finish_wgmma_d64_bf16(bf16* dq, u32* words, const float* sums, const Span* spans, const int* positions,
        u32 queries, u32 q_stride, u32 turned, u64 ratio, float scale) {
    finish<64>(dq, words, sums, spans, queries, q_stride, {positions, turned, ratio}, scale);
}

extern "C" __global__ void __launch_bounds__(128)
    attention_bwd_finish_wgmma_d128_bf16(bf16* dq, u32* words, const float* sums, const Span* spans, const int* positions,
        u32 queries, u32 q_stride, u32 turned, u64 ratio, float scale) {
    finish<128>(dq, words, sums, spans, queries, q_stride, {positions, turned, ratio}, scale);
}

extern "C" __global__ void __launch_bounds__(384, 1)
    attention_bwd_keys_wgmma_d64_bf16(bf16* dk, bf16* dv, const __grid_constant__ TensorMap q, const __grid_constant__ TensorMap k,
        const __grid_constant__ TensorMap v, const __grid_constant__ TensorMap grad,
        const float2* stats, const int2* seen, const Span* spans, const int* slots, const int* positions, const u32* wanted, u32 batch, u32 queries,
        u32 keys, u32 heads, u32 group, u32 kv_stride, u32 k_column, u32 v_column, u32 caches, u32 turned, u64 ratio, float scale) {
    backward_keys<64>(dk, dv, q, k, v, grad, stats, seen, spans, slots, wanted, batch, queries, keys, heads, group, kv_stride,
        k_column, v_column, caches, positions, turned, ratio, scale);
}

extern "C" __global__ void __launch_bounds__(384, 1)
    attention_bwd_keys_wgmma_d128_bf16(bf16* dk, bf16* dv, const __grid_constant__ TensorMap q, const __grid_constant__ TensorMap k,
        const __grid_constant__ TensorMap v, const __grid_constant__ TensorMap grad,
        const float2* stats, const int2* seen, const Span* spans, const int* slots, const int* positions, const u32* wanted, u32 batch, u32 queries,
        u32 keys, u32 heads, u32 group, u32 kv_stride, u32 k_column, u32 v_column, u32 caches, u32 turned, u64 ratio, float scale) {
    backward_keys<128>(dk, dv, q, k, v, grad, stats, seen, spans, slots, wanted, batch, queries, keys, heads, group, kv_stride,
        k_column, v_column, caches, positions, turned, ratio, scale);
}

extern "C" __global__ void __launch_bounds__(384, 1)
    attention_bwd_queries_wgmma_d64_bf16(bf16* dq, const __grid_constant__ TensorMap q, const __grid_constant__ TensorMap k,
        const __grid_constant__ TensorMap v, const __grid_constant__ TensorMap grad,
        const float2* stats, const int2* seen, const Span* spans, const int* slots, const int* positions, const u32* wanted, u32 queries, u32 keys,
        u32 heads, u32 group, u32 q_stride, u32 k_column, u32 v_column, u32 caches, u32 turned, u64 ratio, float scale) {
    backward_queries<64>(dq, q, k, v, grad, stats, seen, spans, slots, wanted, queries, keys, heads, group, q_stride, k_column,
        v_column, caches, positions, turned, ratio, scale);
}

extern "C" __global__ void __launch_bounds__(384, 1)
    attention_bwd_queries_wgmma_d128_bf16(bf16* dq, const __grid_constant__ TensorMap q, const __grid_constant__ TensorMap k,
        const __grid_constant__ TensorMap v, const __grid_constant__ TensorMap grad,
        const float2* stats, const int2* seen, const Span* spans, const int* slots, const int* positions, const u32* wanted, u32 queries, u32 keys,
        u32 heads, u32 group, u32 q_stride, u32 k_column, u32 v_column, u32 caches, u32 turned, u64 ratio, float scale) {
    backward_queries<128>(dq, q, k, v, grad, stats, seen, spans, slots, wanted, queries, keys, heads, group, q_stride, k_column,
        v_column, caches, positions, turned, ratio, scale);
}
