// Attention over intervals of keys on Hopper's tensor cores: that of attention.cu, where heads are wide enough.
//   o[i] = sum_j p[i,j] v[j],   p[i,j] = exp(q[i] . k[j] scale - lse[i]),   row_start[i] <= j < row_end[i]
//                                                          Dao et al. 2022; pipelined: Shah et al. 2024
//
// A block has 128 queries of a head. One warp copies tiles of 128 keys and of their values into two rings of stages,
// from the last key that a query sees to the first, so that nothing behind it is read; two warpgroups have 64 queries
// each. Their scores of the next tile are under way while the weights of the last one multiply its values, and the
// softmax of the next runs beside that product. They take turns to begin products, tile by tile, so that one has the
// tensor cores while the other takes exponentials (3.1 there: ping-pong). p never leaves the registers. A warpgroup
// passes over tiles of which none of its queries sees anything, and compares only in those that not all of them see whole.
//
// Where such blocks are too few for the machine, a block has 64 queries (few): both warpgroups know them, and each takes
// every second tile, of 64 keys; at last the first takes in what the second has summed.
//
// What is hidden changes no bit, as in attention.cu: where a result is not finite, both warpgroups begin again,
// careful, tile by tile, with what is not finite taken out of values and given to those who see it.
//
// Keys of a cache lie in rows of a map [caches, Tk, columns]; k_column and v_column are where the first head's begin. With caches
// > 0, batch row b reads cache slots[b]; outside of 0..caches it sees nothing; with 0 it reads row b and slots is not read.
//
// Target  sm_90a
//
// entry                              grid       block  shared       arguments                                                                                                         bytes                 flops
// attention_fwd_wgmma_d64_bf16       T/128,H,B  384    2048+147592  o lse | q:map k:map v:map slots row_start row_end | T Tk H G k_column v_column caches | scale  2B(2TH+2TkH/G)D+4BTH  4BHTTkD
// attention_fwd_wgmma_d128_bf16      T/128,H,B  384    2048+163912  o lse | q:map k:map v:map slots row_start row_end | T Tk H G k_column v_column caches | scale  2B(2TH+2TkH/G)D+4BTH  4BHTTkD
// attention_fwd_few_wgmma_d64_bf16   T/64,H,B   384    1024+139528  o lse | q:map k:map v:map slots row_start row_end | T Tk H G k_column v_column caches | scale  2B(2TH+2TkH/G)D+4BTH  4BHTTkD
// attention_fwd_few_wgmma_d128_bf16  T/64,H,B   384    1024+147592  o lse | q:map k:map v:map slots row_start row_end | T Tk H G k_column v_column caches | scale  2B(2TH+2TkH/G)D+4BTH  4BHTTkD
//
// Needs   D of 64 or 128; rows of all maps 16-byte aligned; no extent of 0. Boxes hold 64 elements of 128 rows
//         (few: of 64), swizzled by 128 bytes.
// Rounds  p to bf16 as a factor; o once, on store; sums in f32, fixed order (deterministic).
#include "common/warpgroups.cuh"

extern __shared__ __align__(1024) char shared_memory[];

// A block has as many queries as a tile has keys.
template <int D_, bool FEW_>
struct Layout {
    static constexpr bool FEW = FEW_;
    static constexpr int D = D_, QUERIES = FEW ? 64 : 128, KEYS = QUERIES, STAGES = (D == 64 ? 4 : 2) * (128 / KEYS);
    // Every how many tiles of keys a warpgroup takes one, and the warps that read it.
    static constexpr int STEP = FEW ? 2 : 1, READERS = 8 / STEP;
    static constexpr u32 TILE = D / 64 * SLAB<QUERIES>, KEY_RING = TILE, VALUE_RING = KEY_RING + STAGES * TILE,
                         BARRIERS = VALUE_RING + STAGES * TILE;
    static constexpr u32 QUERIES_FULL = BARRIERS, KEYS_FULL = BARRIERS + 8, VALUES_FULL = KEYS_FULL + STAGES * 16;

    // Tiles that pass by: as many for either warpgroup, so that each has stages of its own.
    INLINE static int tiles(const Span& all) { return (all.tiles(KEYS) + STEP - 1) / STEP * STEP; }
};

template <typename L>
struct Rings {
    using Ring = Stage<L::STAGES, L::TILE, L::READERS>;
    Ring keys, values;

    INLINE explicit Rings(u32 shared)
        : keys{shared + L::KEY_RING, shared + L::KEYS_FULL}, values{shared + L::VALUE_RING, shared + L::VALUES_FULL} {}

    // To the first tile of a warpgroup, and to its next.
    INLINE static int first() { return L::FEW ? threadIdx.x / 128 - 1 : 0; }
    INLINE void begin() { keys.skip(first()), values.skip(first()); }
    INLINE static void release(Ring& ring) { ring.release(), ring.skip(L::STEP - 1); }
    INLINE static void pass(Ring& ring) { ring.pass(), ring.skip(L::STEP - 1); }
};

// Where a block's queries, keys and values lie in their maps.
struct Place {
    int first, head, b, slot, key_column, value_column;
};

template <typename L>
INLINE void produce(const TensorMap& q, const TensorMap& k, const TensorMap& v, const Place& at, const Span& span, u32 shared,
                    int& spoilt) {
    const bool leads = threadIdx.x == 0;
    const auto copy = [&](u32 to, const TensorMap& map, u32 barrier, int column, int row, int layer) {
        if (!leads) return;
        arrive_expecting(barrier, L::TILE);
        copy_slabs<L::D, L::QUERIES>(to, map, barrier, column, row, layer);
    };
    Rings<L> rings(shared);
    const auto send = [&](typename Rings<L>::Ring& ring, const TensorMap& map, int column, int key) {
        ring.wait_empty();
        copy(ring.tile(), map, ring.full(), column, key, at.slot);
        ring.advance();
        __syncwarp();
    };
    copy(shared, q, shared + L::QUERIES_FULL, at.head * L::D, at.first, at.b);
    __syncwarp();
    for (int careful = 0; careful < 2; careful++) {
        for (int t = 0; t < L::tiles(span); t++) {
            const int key = span.end - (t + 1) * L::KEYS;
            send(rings.keys, k, at.key_column, key);
            send(rings.values, v, at.value_column, key);
        }
        if (careful || !again_carefully(spoilt, 0)) break;
    }
}

// A warpgroup's 64 queries: what it knows of them, and where it stands.
template <typename L>
struct Rows64 {
    static constexpr int D = L::D, KEYS = L::KEYS;
    using R = Rings<L>;
    using Scores = float[1][KEYS / 8][4];
    using Sums = float[1][D / 8][4];

    R rings;
    // Its queries in shared memory; what the block's queries see, what its own do, and what this lane's first does; that
    // of the other is eight behind.
    u32 queries;
    Span all, own;
    const int2* seen;
    float scale;

    INLINE int2 range(int half) const { return seen[half * 8]; }

    INLINE int key(int t) const { return all.end - (t + 1) * KEYS; }
    INLINE bool meets(int t) const { return own.meets(key(t), key(t) + KEYS); }

    INLINE void begin_scores(Scores& s) const { begin_dots<D, L::QUERIES, KEYS>(s, queries, rings.keys.tile()); }

    // Both warpgroups have a turn at every tile, the first warpgroup before the second: so the second calls it at the
    // beginning, and it takes the call of the second's last turn at the end. With tiles of their own they need none.
    INLINE static void take_turn() {
        if (!L::FEW) meet<MULTIPLIERS>(TURN - 1 + threadIdx.x / 128);
    }
    INLINE static void end_turn() {
        if (!L::FEW) come<MULTIPLIERS>(TURN + 2 - threadIdx.x / 128);
    }
    INLINE void pass_over() {
        take_turn();
        end_turn();
        R::pass(rings.keys);
        R::pass(rings.values);
    }

    INLINE void weigh(Scores& s, Softmax<1>& softmax, float (&shrink)[1][2], int t) const {
        if (!own.whole(key(t), key(t) + KEYS)) hide(s, key(t), [&](int, int half) { return range(half); }, -INFINITY);
        softmax.weigh(s, shrink, scale * LOG2_E);
    }

    // All tiles, the products of one beside the softmax of the next.
    INLINE void attend(Sums& o, Softmax<1>& softmax) {
        const int tiles = L::tiles(all);
        if (threadIdx.x >= 256) end_turn();
        int t = R::first();
        for (; t < tiles && !meets(t); t += L::STEP) pass_over();
        if (t < tiles) {
            Scores s;
            Factor<KEYS> p;
            float shrink[1][2];
            rings.keys.wait();
            take_turn();
            begin_scores(s);
            end_turn();
            wait_products<0>();
            R::release(rings.keys);
            weigh(s, softmax, shrink, t);
            as_factors<KEYS>(p, s);
            for (t += L::STEP; t < tiles && meets(t); t += L::STEP) {
                rings.keys.wait();
                rings.values.wait();
                take_turn();
                begin_scores(s);
                begin_sums<D, KEYS>(o, p, rings.values.tile());
                end_turn();
                wait_products<1>();
                R::release(rings.keys);
                weigh(s, softmax, shrink, t);
                wait_products<0>();
                R::release(rings.values);
                scale_rows(o, shrink);
                as_factors<KEYS>(p, s);
            }
            rings.values.wait();
            begin_sums<D, KEYS>(o, p, rings.values.tile());
            wait_products<0>();
            R::release(rings.values);
        }
        for (; t < tiles; t += L::STEP) pass_over();
        if (threadIdx.x < 256) take_turn();
    }

    // The same numbers in the same order, one after the other, from values that are finite where not all queries of
    // the block see them.
    INLINE void attend_carefully(Sums& o, Softmax<1>& softmax) {
        for (int t = R::first(); t < L::tiles(all); t += L::STEP) {
            Factor<KEYS> p;
            if (meets(t)) {
                Scores s;
                float shrink[1][2];
                rings.keys.wait();
                begin_scores(s);
                wait_products<0>();
                weigh(s, softmax, shrink, t);
                scale_rows(o, shrink);
                as_factors<KEYS>(p, s);
                R::release(rings.keys);
            } else {
                R::pass(rings.keys);
            }
            rings.values.wait();
            if (!all.whole(key(t), key(t) + KEYS)) set_aside(o, t);
            if (meets(t)) {
                begin_sums<D, KEYS>(o, p, rings.values.tile());
                wait_products<0>();
            }
            R::release(rings.values);
        }
    }

    INLINE void set_aside(Sums& o, int t) const {
        const u32 tile = rings.values.tile();
        constexpr int THREADS = MULTIPLIERS / L::STEP;
        give_to_those_who_see<KEYS>(o, Slabs<KEYS>{tile}, [&](int n, int, int half) { return sees(range(half), key(t) + n); });
        clean_together<THREADS>([&] { clean_rows<D, KEYS, KEYS, THREADS>(tile); });
    }

    // The second warpgroup leaves what it knows of the same queries in `room`, which nobody else uses any more; the first
    // takes it in.
    INLINE void join(Sums& o, Softmax<1>& softmax, u32 room) const {
        const auto at = [&](int j) { return room + (j * 128 + threadIdx.x % 128) * 16; };
        meet<CLEANING, MULTIPLIERS>();
        if (threadIdx.x >= 256) {
#pragma unroll
            for (int j = 0; j < D / 8; j++) store_shared(at(j), o[0][j]);
            const float rows[4] = {softmax.top[0][0], softmax.top[0][1], softmax.total[0][0], softmax.total[0][1]};
            store_shared(at(D / 8), rows);
        }
        meet<CLEANING, MULTIPLIERS>();
        if (threadIdx.x >= 256) return;
        float other[1][2], shrink[1][2], rows[4];
        load_shared(rows, at(D / 8));
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const float most = fmaxf(softmax.top[0][half], rows[half]);
            const float base = most == -INFINITY ? 0.0f : most * (scale * LOG2_E);
            shrink[0][half] = exp2_fast(softmax.top[0][half] * (scale * LOG2_E) - base);
            other[0][half] = exp2_fast(rows[half] * (scale * LOG2_E) - base);
            softmax.total[0][half] = softmax.total[0][half] * shrink[0][half] + rows[2 + half] * other[0][half];
            softmax.top[0][half] = most;
        }
        scale_rows(o, shrink);
#pragma unroll
        for (int j = 0; j < D / 8; j++) {
            float part[4];
            load_shared(part, at(j));
#pragma unroll
            for (int e = 0; e < 4; e++) o[0][j][e] += part[e] * other[0][e / 2];
        }
    }
};

template <int D, bool FEW>
INLINE void forward(bf16* o, float* lse, const TensorMap& q, const TensorMap& k, const TensorMap& v, const int* slots,
                    const int* row_start, const int* row_end, u32 queries, u32 keys, u32 heads, u32 group, u32 k_column,
                    u32 v_column, u32 caches, float scale) {
    using L = Layout<D, FEW>;
    __shared__ int2 intervals[L::QUERIES];
    __shared__ Span spans[L::QUERIES / 32];
    __shared__ int spoilt;
    const u32 shared = shared_address(shared_memory), lane = threadIdx.x % 32;
    // The last queries see the most keys, where later ones see more: they begin first.
    const int first = (gridDim.x - 1 - blockIdx.x) * L::QUERIES, head = blockIdx.y, b = blockIdx.z;
    const int slot = cache_of(slots, caches, b), kv = head / group * D;

    if (threadIdx.x < L::QUERIES) {
        const int n = first + threadIdx.x;
        int2 range = make_int2(0, 0);
        if (n < int(queries) && slot >= 0) range = interval(row_start, row_end, u64(b) * queries + n, keys);
        intervals[threadIdx.x] = range;
        const Span span = Span::of(range).across_warp();
        if (lane == 0) spans[threadIdx.x / 32] = span;
    }
    if (threadIdx.x == 0) {
        prefetch_map(q);
        prefetch_map(k);
        prefetch_map(v);
        spoilt = 0;
        init_barrier(shared + L::QUERIES_FULL, 1);
        Rings<L> rings(shared);
        rings.keys.init();
        rings.values.init();
        fence_barrier_init();
    }
    __syncthreads();
    constexpr int LAST = L::QUERIES / 32 - 1;
    const Span upper = spans[0].with(spans[1]), lower = spans[LAST - 1].with(spans[LAST]), all = upper.with(lower);

    if (threadIdx.x < 128) {
        release_registers<24>();
        if (threadIdx.x >= 32) return;
        produce<L>(q, k, v, {first, head, b, slot, int(k_column) + kv, int(v_column) + kv}, all, shared, spoilt);
        return;
    }
    claim_registers<240>();
    const u32 half_block = FEW ? 0 : threadIdx.x / 128 - 1, own = threadIdx.x / 32 % 4 * 16, row = half_block * 64 + own;
    Rows64<L> rows{Rings<L>(shared), shared + half_block * (64 * 128), all, half_block == 0 ? upper : lower,
                   intervals + row + lane / 4, scale};
    float sum[1][D / 8][4];
    Softmax<1> softmax;
    const auto begin = [&] { clear(sum), softmax.begin(); };
    begin();
    rows.rings.begin();
    wait_phase(shared + L::QUERIES_FULL, 0);
    rows.attend(sum, softmax);
    if (again_carefully(spoilt, largest(sum))) {
        begin();
        rows.attend_carefully(sum, softmax);
    }
    if (FEW) {
        rows.join(sum, softmax, shared + L::KEY_RING);
        if (threadIdx.x >= 256) return;
    }

#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int2 range = rows.range(half);
        const float log_sum = softmax.finish(sum, 0, half, range.x < range.y, scale);
        const int n = first + row + half * 8 + lane / 4;
        if (lane % 4 == 0 && n < int(queries)) lse[(u64(b) * heads + head) * queries + n] = log_sum;
    }
    const u64 to = ((u64(b) * queries + first) * heads + head) * D;
    send_rows(o + to, u64(heads) * D, int(queries) - first, sum, Slabs<L::QUERIES>{shared}, row);
}

extern "C" __global__ void __launch_bounds__(384, 1)
    attention_fwd_wgmma_d64_bf16(bf16* o, float* lse, const __grid_constant__ TensorMap q, const __grid_constant__ TensorMap k,
        const __grid_constant__ TensorMap v, const int* slots, const int* row_start, const int* row_end, u32 queries,
        u32 keys, u32 heads, u32 group, u32 k_column, u32 v_column, u32 caches, float scale) {
    forward<64, false>(o, lse, q, k, v, slots, row_start, row_end, queries, keys, heads, group, k_column, v_column, caches, scale);
}

extern "C" __global__ void __launch_bounds__(384, 1)
    attention_fwd_wgmma_d128_bf16(bf16* o, float* lse, const __grid_constant__ TensorMap q, const __grid_constant__ TensorMap k,
        const __grid_constant__ TensorMap v, const int* slots, const int* row_start, const int* row_end, u32 queries,
        u32 keys, u32 heads, u32 group, u32 k_column, u32 v_column, u32 caches, float scale) {
    forward<128, false>(o, lse, q, k, v, slots, row_start, row_end, queries, keys, heads, group, k_column, v_column, caches, scale);
}

extern "C" __global__ void __launch_bounds__(384, 1)
    attention_fwd_few_wgmma_d64_bf16(bf16* o, float* lse, const __grid_constant__ TensorMap q, const __grid_constant__ TensorMap k,
        const __grid_constant__ TensorMap v, const int* slots, const int* row_start, const int* row_end, u32 queries,
        u32 keys, u32 heads, u32 group, u32 k_column, u32 v_column, u32 caches, float scale) {
    forward<64, true>(o, lse, q, k, v, slots, row_start, row_end, queries, keys, heads, group, k_column, v_column, caches, scale);
}

extern "C" __global__ void __launch_bounds__(384, 1)
    attention_fwd_few_wgmma_d128_bf16(bf16* o, float* lse, const __grid_constant__ TensorMap q, const __grid_constant__ TensorMap k,
        const __grid_constant__ TensorMap v, const int* slots, const int* row_start, const int* row_end, u32 queries,
        u32 keys, u32 heads, u32 group, u32 k_column, u32 v_column, u32 caches, float scale) {
    forward<128, true>(o, lse, q, k, v, slots, row_start, row_end, queries, keys, heads, group, k_column, v_column, caches, scale);
}
