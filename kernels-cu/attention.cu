// Attention over intervals of keys, forward and backward.      Vaswani et al. 2017; Dao et al. 2022; Dao 2023
//   o[i] = sum_j p[i,j] v[j],   p[i,j] = exp(q[i] . k[j] scale - lse[i]),   row_start[i] <= j < row_end[i]
//   ds = p (do . v - do . o),   dq = scale ds k,   dk = scale ds^T q,   dv = p^T do
//
// Forward: a block has 128 queries of a head, 32 a warp; tiles of 64 keys and values pass through two cp.async
// stages and an online softmax; p never leaves the registers. Backward computes p and ds twice, once for tiles
// of keys (dk, dv; the queries pass by, transposed, so that p and ds are factors where they were made) and
// once for tiles of queries (dq): two products more than with dq added up atomically, but the same bits every
// time. A pass over the queries first prepares what both need.
//
// Intervals are arbitrary. A tile that nobody sees is not read; one that all queries of a span see whole takes
// no comparison. What a query does not see changes no bit of it, whatever it holds: hidden scores are replaced,
// and hidden rows meet weights of zero. Zero times a number is zero, but zero times NaN or infinity is NaN: that
// cannot happen unseen, so each block looks at its finished results, and only if one is not finite starts again,
// careful: of tiles not seen whole it then takes out what is not finite and gives it to those who see it. Finite
// data never pay for this.
//
// Head widths D: 32, 64, 128, each with entries of its own; BYTES and FLOPS count queries x keys that are seen.
// Rows of q, k, v lie q_stride and kv_stride apart, those of o and do (`grad`: `do` is a word of C) H D. With caches > 0, batch row b reads
// cache slots[b]; outside of 0..caches it sees nothing; with 0 it reads row b and slots is not read. Tp pads T
// to spans of 64.
//
// entry                            grid               block  shared      arguments                                                                                 bytes                 flops
// attention_fwd_d32_bf16           T/128,H,B          128    1152+24576  o lse | q k v slots row_start row_end | T Tk H G q_stride kv_stride caches | scale        2B(2TH+2TkH/G)D+4BTH  4BHTTkD
// attention_fwd_d64_bf16           T/128,H,B          128    1152+49152  o lse | q k v slots row_start row_end | T Tk H G q_stride kv_stride caches | scale        2B(2TH+2TkH/G)D+4BTH  4BHTTkD
// attention_fwd_d128_bf16          T/128,H,B          128    1152+98304  o lse | q k v slots row_start row_end | T Tk H G q_stride kv_stride caches | scale        2B(2TH+2TkH/G)D+4BTH  4BHTTkD
// attention_bwd_prepare_d32_bf16   T/64,H,B           128    0           stats seen spans | o lse grad slots row_start row_end | T Tk H caches |                   4BTHD+12BTH+16BT      2BHTD
// attention_bwd_prepare_d64_bf16   T/64,H,B           128    0           stats seen spans | o lse grad slots row_start row_end | T Tk H caches |                   4BTHD+12BTH+16BT      2BHTD
// attention_bwd_prepare_d128_bf16  T/64,H,B           128    0           stats seen spans | o lse grad slots row_start row_end | T Tk H caches |                   4BTHD+12BTH+16BT      2BHTD
// attention_bwd_keys_d32_bf16      Tk/128,H/G,caches  128    128+35072   dk dv | q k v grad stats seen spans slots | B T Tk H G q_stride kv_stride caches | scale  2B(2TH+4TkH/G)D+8BTH  8BHTTkD
// attention_bwd_keys_d64_bf16      Tk/128,H/G,caches  128    128+67840   dk dv | q k v grad stats seen spans slots | B T Tk H G q_stride kv_stride caches | scale  2B(2TH+4TkH/G)D+8BTH  8BHTTkD
// attention_bwd_keys_d128_bf16     Tk/64,H/G,caches   128    128+100608  dk dv | q k v grad stats seen spans slots | B T Tk H G q_stride kv_stride caches | scale  2B(2TH+4TkH/G)D+8BTH  8BHTTkD
// attention_bwd_queries_d32_bf16   T/128,H,B          128    2176+32768  dq | q k v grad stats seen spans slots | T Tk H G q_stride kv_stride caches | scale       2B(3TH+2TkH/G)D+8BTH  6BHTTkD
// attention_bwd_queries_d64_bf16   T/128,H,B          128    2176+65536  dq | q k v grad stats seen spans slots | T Tk H G q_stride kv_stride caches | scale       2B(3TH+2TkH/G)D+8BTH  6BHTTkD
// attention_bwd_queries_d128_bf16  T/128,H,B          128    2176+98304  dq | q k v grad stats seen spans slots | T Tk H G q_stride kv_stride caches | scale       2B(3TH+2TkH/G)D+8BTH  6BHTTkD
//
// Needs   D of 32, 64 or 128; strides multiples of 8, so that rows are 16-byte aligned.
// Rounds  p and ds to bf16 as factors; o, dq, dk, dv once, on store; sums in f32, fixed order (deterministic).
#include "common/attention.cuh"

constexpr int THREADS = 128, WARPS = 4;
// Queries that share a span, and the tile of the pass over queries.
constexpr int SPAN = 64;

extern __shared__ __align__(128) char shared_memory[];
__shared__ int slots_of_warps[WARPS];

// ---- Products of tiles with rows of D; a warp makes 16 MI rows

// s = a b^T: rows of the tile `a` (this warp's first) with `COLUMNS` rows of the tile `b`.
template <int D, int MI, int COLUMNS>
INLINE void dot_rows(float (&s)[MI][COLUMNS / 8][4], u32 a, u32 b) {
    constexpr int BYTES = 2 * D;
    const u32 a_lane = again(down_right<BYTES>()), b_lane = again(right_down<BYTES>());
#pragma unroll
    for (int i = 0; i < MI; i++)
#pragma unroll
        for (int j = 0; j < COLUMNS / 8; j++)
#pragma unroll
            for (int e = 0; e < 4; e++) s[i][j][e] = 0.0f;
#pragma unroll
    for (int k = 0; k < D / 16; k++) {
        u32 left[MI][4];
#pragma unroll
        for (int i = 0; i < MI; i++) load_matrices(left[i], a + block_at<BYTES>(a_lane, i, k));
#pragma unroll
        for (int j = 0; j < COLUMNS / 16; j++) {
            u32 right[4];
            load_matrices(right, b + block_at<BYTES>(b_lane, j, k));
#pragma unroll
            for (int i = 0; i < MI; i++) {
                multiply_add(s[i][2 * j], left[i], right[0], right[1]);
                multiply_add(s[i][2 * j + 1], left[i], right[2], right[3]);
            }
        }
    }
}

// acc += p b for `DEPTH` rows of the tile `b`.
template <int D, int MI, int DEPTH>
INLINE void add_rows(float (&acc)[MI][D / 8][4], const float (&p)[MI][DEPTH / 8][4], u32 b) {
    constexpr int BYTES = 2 * D;
    const u32 lane = again(down_right<BYTES>());
#pragma unroll
    for (int k = 0; k < DEPTH / 16; k++) {
        u32 left[MI][4];
#pragma unroll
        for (int i = 0; i < MI; i++) as_factor(left[i], p[i], k);
#pragma unroll
        for (int j = 0; j < D / 16; j++) {
            u32 right[4];
            load_matrices_transposed(right, b + block_at<BYTES>(lane, k, j));
#pragma unroll
            for (int i = 0; i < MI; i++) {
                multiply_add(acc[i][2 * j], left[i], right[0], right[1]);
                multiply_add(acc[i][2 * j + 1], left[i], right[2], right[3]);
            }
        }
    }
}

// ---- Numbers that are not finite

// Takes what is not finite out of `ROWS` rows of the tile `b` before `add_rows`, where zero times it would be
// NaN, and gives it to the rows of the result that see it. All threads call it.
template <int D, int MI, int ROWS, typename Seen>
INLINE void set_aside(float (&acc)[MI][D / 8][4], u32 b, const Seen& seen) {
    give_to_those_who_see<ROWS>(acc, Rows<2 * D>{b}, seen);
    // All have read it; and none multiplies before it is clean.
    __syncthreads();
    clean(b, ROWS * 2 * D, threadIdx.x, THREADS);
    __syncthreads();
}

// Whether all results of all threads are finite. A barrier for the block.
template <int MI, int NI>
INLINE bool all_finite(const float (&acc)[MI][NI][4]) {
    return block_reduce<Max, THREADS>(largest(acc), slots_of_warps) < __float_as_int(INFINITY);
}

// Calls `step(key, stage)` for every tile of `KEYS` keys of the span, from `key` on, when its keys and, behind
// them, its values lie at `stage`. The ring has two stages.
template <int D, int KEYS, typename Step>
INLINE void walk_keys(const Span& span, const bf16* k, const bf16* v, u64 stride, u32 ring, const Step& step) {
    constexpr int BYTES = 2 * D, TILE = KEYS * BYTES;
    const int tiles = span.tiles(KEYS);
    const auto fetch = [&](int t) {
        if (t < tiles) {
            const int first = span.begin + t * KEYS;
            const u32 stage = ring + t % 2 * (2 * TILE);
            copy_tile<KEYS, BYTES, THREADS>(stage, k + first * stride, stride, span.end - first, D, again(threadIdx.x));
            copy_tile<KEYS, BYTES, THREADS>(stage + TILE, v + first * stride, stride, span.end - first, D, again(threadIdx.x));
        }
        commit_copies();
    };
    fetch(0);
    for (int t = 0; t < tiles; t++) {
        // This tile is there, for all threads; and all have left the one that the next replaces.
        wait_copies<0>();
        __syncthreads();
        fetch(t + 1);
        step(span.begin + t * KEYS, ring + t % 2 * (2 * TILE));
    }
    wait_copies<0>();
    __syncthreads();
}

// ---- Forward

template <int D>
struct Forward {
    static constexpr int MI = 2, QUERIES = 16 * MI * WARPS, KEYS = 64, BYTES = 2 * D;
    static constexpr int TILE = KEYS * BYTES;
    // Keys multiplied at once, as many as registers allow.
    static constexpr int SLICE = D == 128 ? 32 : 64;

    INLINE static void run(bf16* o, float* lse, const bf16* q, const bf16* k, const bf16* v, const int* slots,
                           const int* row_start, const int* row_end, u32 queries, u32 keys, u32 heads, u32 group,
                           u32 q_stride, u32 kv_stride, u32 caches, float scale) {
        // The last queries see the most keys, where later ones see more: they begin first.
        const int first = (gridDim.x - 1 - blockIdx.x) * QUERIES, head = blockIdx.y, b = blockIdx.z;
        const int slot = cache_of(slots, caches, b);
        const u32 tile = shared_address(shared_memory), ring = tile + QUERIES * BYTES;
        const int own = threadIdx.x / 32 * (16 * MI), lane = threadIdx.x % 32;

        // One query a thread; each is read again where a tile is not seen whole.
        __shared__ int2 intervals[QUERIES];
        const auto seen = [&](int i, int half) { return intervals[own + i * 16 + half * 8 + lane / 4]; };
        const int n = first + threadIdx.x;
        int2 range = make_int2(0, 0);
        if (n < int(queries) && slot >= 0) {
            const u64 at = u64(b) * queries + n;
            range = interval(row_start, row_end, at, keys);
        }
        intervals[threadIdx.x] = range;
        Span span = Span::of(range);
        __shared__ Span spans[WARPS];
        span = span.across_warp();
        if (lane == 0) spans[threadIdx.x / 32] = span;
        copy_tile<QUERIES, BYTES, THREADS>(tile, q + (u64(b) * queries + first) * q_stride + head * D, q_stride,
                                           int(queries) - first, D, again(threadIdx.x));
        __syncthreads();
        span = spans[0].with(spans[1]).with(spans[2]).with(spans[3]);

        const u64 cache = u64(max(slot, 0)) * keys * kv_stride + head / group * D;
        float sum[MI][D / 8][4];
        Softmax<MI> softmax;
        // Careful only if the first round shows that something is not finite.
        for (int careful = 0;; careful = 1) {
            clear(sum);
            softmax.begin();
            walk_keys<D, KEYS>(span, k + cache, v + cache, kv_stride, ring, [&](int tile_key, u32 stage) {
                const bool whole = span.whole(tile_key, tile_key + KEYS);
#pragma unroll 1
                for (int slice = 0; slice < KEYS; slice += SLICE) {
                    const int key = tile_key + slice;
                    const u32 values = stage + TILE + slice * BYTES;
                    float s[MI][SLICE / 8][4];
                    dot_rows<D, MI, SLICE>(s, tile + own * BYTES, stage + slice * BYTES);
                    if (!whole) hide(s, key, seen, -INFINITY);
                    float shrink[MI][2];
                    softmax.weigh(s, shrink, scale * LOG2_E);
                    scale_rows(sum, shrink);
                    if (careful && !whole) {
                        set_aside<D, MI, SLICE>(sum, values, [&](int n, int i, int half) {
                            return sees(seen(i, half), key + n);
                        });
                    }
                    add_rows<D, MI, SLICE>(sum, s, values);
                }
            });
            if (careful || all_finite(sum)) break;
        }

        const u64 row = u64(again(b)) * queries + again(first);
#pragma unroll
        for (int i = 0; i < MI; i++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int2 range = seen(i, half);
                const float log_sum = softmax.finish(sum, i, half, range.x < range.y, scale);
                const int n = again(first) + own + i * 16 + half * 8 + lane / 4;
                if (lane % 4 == 0 && n < int(queries)) lse[(u64(again(b)) * heads + head) * queries + n] = log_sum;
            }
        send_rows(o + (row * heads + head) * D, u64(heads) * D, int(queries) - again(first), sum, Rows<BYTES>{tile}, threadIdx.x / 32 * (16 * MI));
    }
};

// ---- Backward

// What the backward passes know of a query beside its rows: stats (lse log2 e, do . o), and the keys it sees;
// spans of 64 queries. Queries are padded to whole spans, with zeros and queries that see nothing.
template <int D>
INLINE void prepare(float2* stats, int2* seen, Span* spans, const bf16* o, const float* lse, const bf16* grad,
                    const int* slots, const int* row_start, const int* row_end, u32 queries, u32 keys, u32 heads,
                    u32 caches) {
    constexpr int LANES = D / 8, ROWS = THREADS / LANES;
    const int first = blockIdx.x * SPAN, head = blockIdx.y, b = blockIdx.z;
    const u32 padded = gridDim.x * SPAN;
    const bool idle = cache_of(slots, caches, b) < 0;
    const auto range_of = [&](int n) {
        const u64 at = u64(b) * queries + n;
        return n < int(queries) && !idle ? interval(row_start, row_end, at, keys) : make_int2(0, 0);
    };
#pragma unroll
    for (int r = 0; r < SPAN; r += ROWS) {
        const int n = first + r + threadIdx.x / LANES;
        // A query that sees nothing has no numbers, whatever its rows hold.
        const int2 range = range_of(n);
        const bool there = range.x < range.y;
        float product = 0.0f;
        if (there) {
            const u64 at = ((u64(b) * queries + n) * heads + head) * D + threadIdx.x % LANES * 8;
            float x[8], y[8];
            unpack(x, load16(o + at));
            unpack(y, load16(grad + at));
#pragma unroll
            for (int e = 0; e < 8; e++) product = fmaf(x[e], y[e], product);
        }
        product = warp_reduce<Sum, LANES>(product);
        if (threadIdx.x % LANES == 0) {
            const u64 row = u64(b) * heads + head;
            const float log_sum = there ? lse[row * queries + n] * LOG2_E : 0.0f;
            stats[row * padded + n] = make_float2(log_sum, product);
        }
    }
    if (head != 0 || threadIdx.x >= 32) return;
    Span span = {0x7fffffff, 0, 0, 0x7fffffff};
#pragma unroll
    for (int r = 0; r < SPAN; r += 32) {
        const int n = first + r + threadIdx.x;
        const int2 range = range_of(n);
        seen[u64(b) * padded + n] = range;
        span = span.with(Span::of(range));
    }
    span = span.across_warp();
    if (threadIdx.x == 0) spans[u64(b) * gridDim.x + blockIdx.x] = span;
}

// dk and dv of a tile of keys: the queries that see them pass by, all heads of the group in order.
template <int D>
struct BackwardKeys {
    static constexpr int MI = D == 128 ? 1 : 2, KEYS = 16 * MI * WARPS, BYTES = 2 * D;
    // Queries multiplied at once, as many as registers allow.
    static constexpr int SLICE = D == 128 ? 64 : 32;
    static constexpr int KEY_TILE = KEYS * BYTES, TILE = SPAN * BYTES;
    // A stage: queries, gradients, stats, intervals, span.
    static constexpr int STATS = 2 * TILE, SEEN = STATS + SPAN * 8, WHOLE = SEEN + SPAN * 8, STAGE = WHOLE + 128;

    struct Problem {
        const bf16 *q, *grad;
        const float2* stats;
        const int2* seen;
        const Span* spans;
        const int* slots;
        u32 batch, queries, keys, heads, group, q_stride, caches;

        INLINE int first() const { return again(blockIdx.x) * KEYS; }
        INLINE int last() const { return min(first() + KEYS, int(keys)); }
        INLINE int kv_head() const { return again(blockIdx.y); }
        INLINE int slot() const { return again(blockIdx.z); }

        INLINE int spans_of_row() const { return (again(queries) + SPAN - 1) / SPAN; }
    };

    // Where the pass over the queries stands: batch row, query head of the group, span, and where spans end.
    struct Place {
        int b, g, t, end;
    };

    // The first span of head `g` of batch row `b` that holds queries for the tile, or of the first head of a later
    // row that reads the cache; row `batch` if there is none.
    INLINE static Place seek(const Problem& p, int b, int g) {
        for (; b < int(p.batch); b++, g = 0) {
            if (cache_of(p.slots, p.caches, b) != p.slot()) continue;
            int begin = -0x7fffffff, end = 0;
            for (int t = threadIdx.x; t < p.spans_of_row(); t += THREADS) {
                if (p.spans[u64(b) * p.spans_of_row() + t].meets(p.first(), p.last())) begin = max(begin, -t), end = t + 1;
            }
            begin = -block_reduce<Max, THREADS>(begin, slots_of_warps);
            end = block_reduce<Max, THREADS>(end, slots_of_warps);
            if (begin < end) return {b, g, begin, end};
        }
        return {b, 0, 0, 0};
    }

    INLINE static void advance(const Problem& p, Place& at) {
        if (++at.t < at.end) return;
        const bool more = at.g + 1 < int(p.group);
        at = seek(p, more ? at.b : at.b + 1, more ? at.g + 1 : 0);
    }

    INLINE static void fetch(const Problem& p, const Place& at, u32 stage) {
        if (at.b < int(p.batch)) {
            const int head = p.kv_head() * p.group + at.g, first = at.t * SPAN, rows = int(p.queries) - first;
            const u64 row = u64(at.b) * p.queries + first, padded = u64(p.spans_of_row()) * SPAN;
            copy_tile<SPAN, BYTES, THREADS>(stage, p.q + row * p.q_stride + head * D, p.q_stride, rows, D, again(threadIdx.x));
            copy_tile<SPAN, BYTES, THREADS>(stage + TILE, p.grad + (row * p.heads + head) * D, u64(p.heads) * D, rows, D, again(threadIdx.x));
            const int part = threadIdx.x % 32;
            if (threadIdx.x < 32) {
                const float2* from = p.stats + (u64(at.b) * p.heads + head) * padded + first + part * 2;
                copy_async(stage + STATS + part * 16, from, true);
            } else if (threadIdx.x < 64) {
                copy_async(stage + SEEN + part * 16, p.seen + at.b * padded + first + part * 2, true);
            } else if (threadIdx.x == 64) {
                copy_async(stage + WHOLE, p.spans + u64(at.b) * p.spans_of_row() + at.t, true);
            }
        }
        commit_copies();
    }

    // One stage: P^T = exp(K Q^T - lse), dS^T = P^T (V dO^T - delta), dV += P^T dO, dK += dS^T Q.
    INLINE static void step(const Problem& p, float (&dk)[MI][D / 8][4], float (&dv)[MI][D / 8][4], u32 keys, u32 values,
                            u32 stage, float scale, int careful) {
        u32 words[4];
        load_shared(words, stage + WHOLE);
        const Span span = {int(words[0]), int(words[1]), int(words[2]), int(words[3])};
        if (!span.meets(p.first(), p.last())) return;
        const bool whole = span.whole(p.first(), p.last());
        const int thread = again(threadIdx.x), own = thread / 32 * (16 * MI), lane = thread % 32;
#pragma unroll 1
        for (int slice = 0; slice < SPAN; slice += SLICE) {
            float s[MI][SLICE / 8][4], ds[MI][SLICE / 8][4];
            dot_rows<D, MI, SLICE>(s, keys + own * BYTES, stage + slice * BYTES);
            dot_rows<D, MI, SLICE>(ds, values + own * BYTES, stage + TILE + slice * BYTES);
#pragma unroll
            for (int j = 0; j < SLICE / 8; j++) {
                // Two queries: lse and delta of each.
                const u32 pair = (slice + j * 8 + lane % 4 * 2) * 8;
                float stats[4];
                load_shared(stats, stage + STATS + pair);
#pragma unroll
                for (int i = 0; i < MI; i++)
#pragma unroll
                    for (int e = 0; e < 4; e++) {
                        s[i][j][e] = exp2_fast(fmaf(s[i][j][e], scale * LOG2_E, -stats[e % 2 * 2]));
                        ds[i][j][e] = s[i][j][e] * (ds[i][j][e] - stats[e % 2 * 2 + 1]);
                    }
                if (whole) continue;
                load_shared(words, stage + SEEN + pair);
#pragma unroll
                for (int i = 0; i < MI; i++)
#pragma unroll
                    for (int e = 0; e < 4; e++) {
                        const int key = p.first() + own + i * 16 + e / 2 * 8 + lane / 4;
                        const int2 seen = make_int2(words[e % 2 * 2], words[e % 2 * 2 + 1]);
                        if (!sees(seen, key)) s[i][j][e] = 0.0f, ds[i][j][e] = 0.0f;
                    }
            }
            if (careful && !whole) {
                const auto seen = [&](int row, int i, int half) {
                    u32 begin, end;
                    load_shared(begin, stage + SEEN + (slice + row) * 8);
                    load_shared(end, stage + SEEN + (slice + row) * 8 + 4);
                    return sees(make_int2(begin, end), p.first() + own + i * 16 + half * 8 + lane / 4);
                };
                set_aside<D, MI, SLICE>(dv, stage + TILE + slice * BYTES, seen);
                set_aside<D, MI, SLICE>(dk, stage + slice * BYTES, seen);
            }
            add_rows<D, MI, SLICE>(dv, s, stage + TILE + slice * BYTES);
            add_rows<D, MI, SLICE>(dk, ds, stage + slice * BYTES);
        }
    }

    INLINE static void run(bf16* dk_to, bf16* dv_to, const Problem& p, const bf16* k, const bf16* v, u32 kv_stride,
                           float scale) {
        const u32 key_tile = shared_address(shared_memory), value_tile = key_tile + KEY_TILE, ring = value_tile + KEY_TILE;
        const auto offset = [&] { return (u64(p.slot()) * p.keys + p.first()) * kv_stride + p.kv_head() * D; };
        const u64 at = offset();
        copy_tile<KEYS, BYTES, THREADS>(key_tile, k + at, kv_stride, p.last() - p.first(), D, again(threadIdx.x));
        copy_tile<KEYS, BYTES, THREADS>(value_tile, v + at, kv_stride, p.last() - p.first(), D, again(threadIdx.x));
        float dk[MI][D / 8][4], dv[MI][D / 8][4];
        // Careful only if the first round shows that something is not finite.
        for (int careful = 0;; careful = 1) {
            clear(dk);
            clear(dv);
            Place next = seek(p, 0, 0);
            fetch(p, next, ring);
            for (u32 stage = ring; next.b < int(p.batch); stage = 2 * ring + STAGE - stage) {
                // This stage is there, for all threads; and all have left the one that the next replaces.
                wait_copies<0>();
                __syncthreads();
                advance(p, next);
                fetch(p, next, 2 * ring + STAGE - stage);
                step(p, dk, dv, key_tile, value_tile, stage, scale, careful);
            }
            wait_copies<0>();
            const bool good = all_finite(dk);
            if (careful || (all_finite(dv) && good)) break;
        }
        scale_all(dk, scale);
        send_rows(dk_to + offset(), kv_stride, p.last() - p.first(), dk, Rows<BYTES>{key_tile}, threadIdx.x / 32 * (16 * MI));
        send_rows(dv_to + offset(), kv_stride, p.last() - p.first(), dv, Rows<BYTES>{value_tile}, threadIdx.x / 32 * (16 * MI));
    }
};

// dq of a tile of queries: the keys that they see pass by.
template <int D>
struct BackwardQueries {
    static constexpr int MI = 2, QUERIES = 16 * MI * WARPS, BYTES = 2 * D;
    static constexpr int KEYS = D == 128 ? 32 : 64, SLICE = 32;
    static constexpr int QUERY_TILE = QUERIES * BYTES, TILE = KEYS * BYTES;

    INLINE static void run(bf16* dq_to, const bf16* q, const bf16* k, const bf16* v, const bf16* grad,
                           const float2* stats, const int2* seen_by, const Span* spans, const int* slots, u32 queries,
                           u32 keys, u32 heads, u32 group, u32 q_stride, u32 kv_stride, u32 caches, float scale) {
        const int first = (gridDim.x - 1 - blockIdx.x) * QUERIES, head = blockIdx.y, b = blockIdx.z;
        const int own = threadIdx.x / 32 * (16 * MI), lane = threadIdx.x % 32;
        const int spans_of_row = (queries + SPAN - 1) / SPAN, t = first / SPAN;
        const u64 row = u64(b) * heads + head, padded = u64(spans_of_row) * SPAN;
        const u32 tile = shared_address(shared_memory), grad_tile = tile + QUERY_TILE, ring = grad_tile + QUERY_TILE;
        copy_tile<QUERIES, BYTES, THREADS>(tile, q + (u64(b) * queries + first) * q_stride + head * D, q_stride,
                                           int(queries) - first, D, again(threadIdx.x));
        copy_tile<QUERIES, BYTES, THREADS>(grad_tile, grad + ((u64(b) * queries + first) * heads + head) * D,
                                           u64(heads) * D, int(queries) - first, D, again(threadIdx.x));
        Span span = spans[u64(b) * spans_of_row + t];
        if (t + 1 < spans_of_row) span = span.with(spans[u64(b) * spans_of_row + t + 1]);
        // One query a thread; each is read again by those who need it.
        __shared__ int2 intervals[QUERIES];
        __shared__ float2 logs[QUERIES];
        const auto local = [&](int i, int half) { return own + i * 16 + half * 8 + lane / 4; };
        const auto seen = [&](int i, int half) { return intervals[local(i, half)]; };
        const int n = first + threadIdx.x;
        const bool there = n < int(padded);
        intervals[threadIdx.x] = there ? seen_by[b * padded + n] : make_int2(0, 0);
        logs[threadIdx.x] = there ? stats[row * padded + n] : make_float2(0.0f, 0.0f);
        __syncthreads();
        const u64 cache = u64(max(cache_of(slots, caches, b), 0)) * keys * kv_stride + head / group * D;
        float dq[MI][D / 8][4];
        // Careful only if the first round shows that something is not finite.
        for (int careful = 0;; careful = 1) {
            clear(dq);
            walk_keys<D, KEYS>(span, k + cache, v + cache, kv_stride, ring, [&](int key0, u32 stage) {
                const bool whole = span.whole(key0, key0 + KEYS);
#pragma unroll 1
                for (int slice = 0; slice < KEYS; slice += SLICE) {
                    float s[MI][SLICE / 8][4], ds[MI][SLICE / 8][4];
                    const int key = key0 + slice;
                    dot_rows<D, MI, SLICE>(s, tile + own * BYTES, stage + slice * BYTES);
                    dot_rows<D, MI, SLICE>(ds, grad_tile + own * BYTES, stage + TILE + slice * BYTES);
                    if (!whole) hide(s, key, seen, -INFINITY), hide(ds, key, seen, 0.0f);
#pragma unroll
                    for (int i = 0; i < MI; i++)
#pragma unroll
                        for (int half = 0; half < 2; half++) {
                            const float2 log = logs[local(i, half)];
#pragma unroll
                            for (int j = 0; j < SLICE / 8; j++)
#pragma unroll
                                for (int e = half * 2; e < half * 2 + 2; e++) {
                                    const float p = exp2_fast(fmaf(s[i][j][e], scale * LOG2_E, -log.x));
                                    ds[i][j][e] = p * (ds[i][j][e] - log.y);
                                }
                        }
                    if (careful && !whole) {
                        set_aside<D, MI, SLICE>(dq, stage + slice * BYTES, [&](int n, int i, int half) {
                            return sees(seen(i, half), key + n);
                        });
                    }
                    add_rows<D, MI, SLICE>(dq, ds, stage + slice * BYTES);
                }
            });
            if (careful || all_finite(dq)) break;
        }
        scale_all(dq, scale);
        const u64 to = u64(again(b)) * queries + again(first);
        send_rows(dq_to + to * q_stride + head * D, q_stride, int(queries) - again(first), dq, Rows<BYTES>{tile}, threadIdx.x / 32 * (16 * MI));
    }
};

extern "C" __global__ void __launch_bounds__(THREADS, 2)
    attention_fwd_d32_bf16(bf16* o, float* lse, const bf16* q, const bf16* k, const bf16* v, const int* slots,
        const int* row_start, const int* row_end, u32 queries, u32 keys, u32 heads, u32 group, u32 q_stride,
        u32 kv_stride, u32 caches, float scale) {
    Forward<32>::run(o, lse, q, k, v, slots, row_start, row_end, queries, keys, heads, group, q_stride, kv_stride, caches,
        scale);
}

extern "C" __global__ void __launch_bounds__(THREADS, 2)
    attention_fwd_d64_bf16(bf16* o, float* lse, const bf16* q, const bf16* k, const bf16* v, const int* slots,
        const int* row_start, const int* row_end, u32 queries, u32 keys, u32 heads, u32 group, u32 q_stride,
        u32 kv_stride, u32 caches, float scale) {
    Forward<64>::run(o, lse, q, k, v, slots, row_start, row_end, queries, keys, heads, group, q_stride, kv_stride, caches,
        scale);
}

extern "C" __global__ void __launch_bounds__(THREADS, 2)
    attention_fwd_d128_bf16(bf16* o, float* lse, const bf16* q, const bf16* k, const bf16* v, const int* slots,
        const int* row_start, const int* row_end, u32 queries, u32 keys, u32 heads, u32 group, u32 q_stride,
        u32 kv_stride, u32 caches, float scale) {
    Forward<128>::run(o, lse, q, k, v, slots, row_start, row_end, queries, keys, heads, group, q_stride, kv_stride, caches,
        scale);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    attention_bwd_prepare_d32_bf16(float2* stats, int2* seen, Span* spans, const bf16* o, const float* lse, const bf16* grad,
        const int* slots, const int* row_start, const int* row_end, u32 queries, u32 keys, u32 heads, u32 caches) {
    prepare<32>(stats, seen, spans, o, lse, grad, slots, row_start, row_end, queries, keys, heads, caches);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    attention_bwd_prepare_d64_bf16(float2* stats, int2* seen, Span* spans, const bf16* o, const float* lse, const bf16* grad,
        const int* slots, const int* row_start, const int* row_end, u32 queries, u32 keys, u32 heads, u32 caches) {
    prepare<64>(stats, seen, spans, o, lse, grad, slots, row_start, row_end, queries, keys, heads, caches);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    attention_bwd_prepare_d128_bf16(float2* stats, int2* seen, Span* spans, const bf16* o, const float* lse, const bf16* grad,
        const int* slots, const int* row_start, const int* row_end, u32 queries, u32 keys, u32 heads, u32 caches) {
    prepare<128>(stats, seen, spans, o, lse, grad, slots, row_start, row_end, queries, keys, heads, caches);
}

extern "C" __global__ void __launch_bounds__(THREADS, 2)
    attention_bwd_keys_d32_bf16(bf16* dk, bf16* dv, const bf16* q, const bf16* k, const bf16* v, const bf16* grad,
        const float2* stats, const int2* seen, const Span* spans, const int* slots, u32 batch, u32 queries, u32 keys, u32 heads, u32 group, u32 q_stride,
        u32 kv_stride, u32 caches, float scale) {
    BackwardKeys<32>::run(dk, dv, {q, grad, stats, seen, spans, slots, batch, queries, keys, heads, group, q_stride, caches}, k,
        v, kv_stride, scale);
}

extern "C" __global__ void __launch_bounds__(THREADS, 2)
    attention_bwd_keys_d64_bf16(bf16* dk, bf16* dv, const bf16* q, const bf16* k, const bf16* v, const bf16* grad,
        const float2* stats, const int2* seen, const Span* spans, const int* slots, u32 batch, u32 queries, u32 keys, u32 heads, u32 group, u32 q_stride,
        u32 kv_stride, u32 caches, float scale) {
    BackwardKeys<64>::run(dk, dv, {q, grad, stats, seen, spans, slots, batch, queries, keys, heads, group, q_stride, caches}, k,
        v, kv_stride, scale);
}

extern "C" __global__ void __launch_bounds__(THREADS, 2)
    attention_bwd_keys_d128_bf16(bf16* dk, bf16* dv, const bf16* q, const bf16* k, const bf16* v, const bf16* grad,
        const float2* stats, const int2* seen, const Span* spans, const int* slots, u32 batch, u32 queries, u32 keys, u32 heads, u32 group, u32 q_stride,
        u32 kv_stride, u32 caches, float scale) {
    BackwardKeys<128>::run(dk, dv, {q, grad, stats, seen, spans, slots, batch, queries, keys, heads, group, q_stride, caches}, k,
        v, kv_stride, scale);
}

extern "C" __global__ void __launch_bounds__(THREADS, 3)
    attention_bwd_queries_d32_bf16(bf16* dq, const bf16* q, const bf16* k, const bf16* v, const bf16* grad,
        const float2* stats, const int2* seen, const Span* spans, const int* slots, u32 queries, u32 keys, u32 heads, u32 group, u32 q_stride,
        u32 kv_stride, u32 caches, float scale) {
    BackwardQueries<32>::run(dq, q, k, v, grad, stats, seen, spans, slots, queries, keys, heads, group, q_stride, kv_stride,
        caches, scale);
}

extern "C" __global__ void __launch_bounds__(THREADS, 2)
    attention_bwd_queries_d64_bf16(bf16* dq, const bf16* q, const bf16* k, const bf16* v, const bf16* grad,
        const float2* stats, const int2* seen, const Span* spans, const int* slots, u32 queries, u32 keys, u32 heads, u32 group, u32 q_stride,
        u32 kv_stride, u32 caches, float scale) {
    BackwardQueries<64>::run(dq, q, k, v, grad, stats, seen, spans, slots, queries, keys, heads, group, q_stride, kv_stride,
        caches, scale);
}

extern "C" __global__ void __launch_bounds__(THREADS, 2)
    attention_bwd_queries_d128_bf16(bf16* dq, const bf16* q, const bf16* k, const bf16* v, const bf16* grad,
        const float2* stats, const int2* seen, const Span* spans, const int* slots, u32 queries, u32 keys, u32 heads, u32 group, u32 q_stride,
        u32 kv_stride, u32 caches, float scale) {
    BackwardQueries<128>::run(dq, q, k, v, grad, stats, seen, spans, slots, queries, keys, heads, group, q_stride, kv_stride,
        caches, scale);
}
