// What Hopper has beyond Ampere: barriers that count arrivals and bytes, tiles that copy themselves, products of four
// warps on shared memory. The section is that of the PTX ISA manual.
#pragma once
#include "ptx.cuh"

// How a matrix lies in global memory, for copies of its tiles. The host makes it.
struct alignas(64) TensorMap {
    u64 words[16];
};

// Fetches what a tensor map says, ahead of its first copy.   9.7.9.15 prefetch.tensormap
INLINE void prefetch_map(const TensorMap& map) { asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory"); }

// A barrier in shared memory, 8 bytes, whose phase ends with so many arrivals and all bytes that were announced.
// 9.7.13.15.9 mbarrier.init
INLINE void init_barrier(u32 barrier, u32 arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Shows initialised barriers to copies; other threads need a barrier of the block besides.   9.7.13.4 fence
INLINE void fence_barrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

// All threads of a cluster meet; what they wrote before is seen after.   9.7.13.3 barrier.cluster
INLINE void meet_cluster() {
    asm volatile("barrier.cluster.arrive.release;\n\tbarrier.cluster.wait.acquire;" ::: "memory");
}

// 9.7.13.15.13 mbarrier.arrive
INLINE void arrive(u32 barrier) {
    asm volatile("mbarrier.arrive.release.cta.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// The same at the barrier that block `rank` of the cluster has at this address.   9.7.9.23 mapa
INLINE void arrive_at(u32 rank, u32 barrier) {
    asm volatile("{\n.reg .b32 there;\n"
                 "mapa.shared::cluster.u32 there, %0, %1;\n"
                 "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [there];\n}"
                 ::"r"(barrier), "r"(rank)
                 : "memory");
}

// Arrives, and announces bytes that copies will bring in this phase.   9.7.13.15.13 mbarrier.arrive.expect_tx
INLINE void arrive_expecting(u32 barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
                 : "memory");
}

// Waits until the phase of this parity has ended; that before the first has parity 1.
// 9.7.13.15.16 mbarrier.try_wait
#define WAIT_PHASE(SCOPE)                                                                        \
    u32 done;                                                                                    \
    do {                                                                                         \
        asm volatile("{\n.reg .pred done;\n"                                                     \
                     "mbarrier.try_wait.parity.acquire." SCOPE ".shared::cta.b64 done, [%1], %2;\n" \
                     "selp.u32 %0, 1, 0, done;\n}"                                               \
                     : "=r"(done)                                                                \
                     : "r"(barrier), "r"(parity)                                                 \
                     : "memory");                                                                \
    } while (!done)

INLINE void wait_phase(u32 barrier, u32 parity) { WAIT_PHASE("cta"); }

// The same where other blocks of the cluster arrive.
INLINE void wait_phase_of_cluster(u32 barrier, u32 parity) { WAIT_PHASE("cluster"); }

#undef WAIT_PHASE

// Begins to copy the box of a map at (column, row) to shared memory; its bytes count at the barrier, those beyond
// the matrix arrive as zeros.   9.7.9.27.1.2 cp.async.bulk.tensor
INLINE void copy_box(u32 to, const TensorMap& map, u32 barrier, u32 column, u32 row) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];"
                 ::"r"(to), "l"(&map), "r"(barrier), "r"(column), "r"(row)
                 : "memory");
}

// The same, to this place in the blocks of a cluster whose bits are set; each has its own barrier.
INLINE void copy_box_to(u16 blocks, u32 to, const TensorMap& map, u32 barrier, u32 column, u32 row) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
                 "[%0], [%1, {%3, %4}], [%2], %5;"
                 ::"r"(to), "l"(&map), "r"(barrier), "r"(column), "r"(row), "h"(blocks)
                 : "memory");
}

// The same of a box at (column, row, layer).
INLINE void copy_box(u32 to, const TensorMap& map, u32 barrier, u32 column, u32 row, u32 layer) {
    asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];"
                 ::"r"(to), "l"(&map), "r"(barrier), "r"(column), "r"(row), "r"(layer)
                 : "memory");
}

// Begins to copy so many bytes, a multiple of 16 that lie at one, to shared memory; they count at the barrier.
// 9.7.9.25.4.1 cp.async.bulk
INLINE void copy_bytes(u32 to, const void* from, u32 bytes, u32 barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
                 "l"(__cvta_generic_to_global(from)), "r"(bytes), "r"(barrier)
                 : "memory");
}

// Begins to copy so many bytes, a multiple of 16 that lie at one, from shared memory.   9.7.9.25.4.1 cp.async.bulk
INLINE void store_bytes(void* to, u32 from, u32 bytes) {
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(__cvta_generic_to_global(to)),
                 "r"(from), "r"(bytes)
                 : "memory");
}

// Begins to copy a box from shared memory to (column, row) of a map; what it has beyond the matrix is left out.
// 9.7.9.27.1.2 cp.async.bulk.tensor
INLINE void store_box(const TensorMap& map, u32 from, u32 column, u32 row) {
    asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];" ::"l"(&map), "r"(from),
                 "r"(column), "r"(row)
                 : "memory");
}

// Four 8x8 matrices of bf16 to shared memory: what `load_matrices` does, the other way.   9.7.14.5.16 stmatrix
INLINE void store_matrices(u32 row, const u32 (&m)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row), "r"(m[0]), "r"(m[1]),
                 "r"(m[2]), "r"(m[3])
                 : "memory");
}

// Four floats to shared memory as they are: sums of products must not be moved before they are awaited.
// 9.7.9.11 st.shared
INLINE void store_shared(u32 to, const float (&v)[4]) {
    asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(to), "f"(v[0]), "f"(v[1]), "f"(v[2]), "f"(v[3])
                 : "memory");
}

// Begins to add so many bytes of floats.   9.7.9.25.4.2 cp.reduce.async.bulk
INLINE void add_floats(float* to, u32 from, u32 bytes) {
    asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(
                     __cvta_generic_to_global(to)),
                 "r"(from), "r"(bytes)
                 : "memory");
}

// Closes the group of copies to global memory begun by this thread since the last call.
// 9.7.9.27.2.1 cp.async.bulk.commit_group
INLINE void commit_stores() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Waits until this thread's copies have read shared memory, but for the latest `LEFT` groups, or are done.
// 9.7.9.27.2.2 cp.async.bulk.wait_group
template <int LEFT = 0>
INLINE void wait_stores_read() {
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(LEFT) : "memory");
}
INLINE void wait_stores() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

// Sees what other blocks did before they added to a word.   9.7.9.8 ld.acquire, 9.7.13.6 red.release
INLINE u32 load_acquire(const u32* from) {
    u32 v;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(__cvta_generic_to_global(from)) : "memory");
    return v;
}

INLINE void add_release(u32* to, u32 x) {
    asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(__cvta_generic_to_global(to)), "r"(x) : "memory");
}

// Shows what this thread knows of global memory to its copies.   9.7.13.4 fence.proxy.async
INLINE void fence_copies() { asm volatile("fence.proxy.async.global;" ::: "memory"); }

// Shows what this thread has written to shared memory to products and copies.   9.7.13.4 fence.proxy.async
INLINE void fence_writes() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// A barrier of the block for so many threads, whole warps; 0 is that of __syncthreads.   9.7.13.1 bar.sync
template <int BARRIER, int THREADS>
INLINE void meet() {
    asm volatile("bar.sync %0, %1;" ::"n"(BARRIER), "n"(THREADS) : "memory");
}

// The same of a barrier that is told at run time.
template <int THREADS>
INLINE void meet(u32 barrier) {
    asm volatile("bar.sync %0, %1;" ::"r"(barrier), "n"(THREADS) : "memory");
}

// Counts among those for whom the barrier waits, and goes on.   9.7.13.1 bar.arrive
template <int THREADS>
INLINE void come(u32 barrier) {
    asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "n"(THREADS) : "memory");
}

// Gives registers back, or takes them: a thread has `COUNT` then. All warps of a warpgroup call it.
// 9.7.19.5 setmaxnreg
template <int COUNT>
INLINE void release_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}

template <int COUNT>
INLINE void claim_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}

// A matrix in shared memory for `multiply_add`: rows of 128 bytes under the swizzle of 128, 8 of them to 1024 bytes.
// Where rows run across the depth, `next` bytes lie between blocks of 64 vectors.   9.7.15.5.1.2.2 matrix descriptor
INLINE u64 matrix_at(u32 address, u32 next) {
    return u64(address >> 4) | u64(next >> 4) << 16 | u64(1024 >> 4) << 32 | 1ull << 62;
}

// Before the first product of a warpgroup, and after other writes to its registers.   9.7.15.7.1 wgmma.fence
INLINE void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

// Closes the group of products begun since the last call.   9.7.15.7.2 wgmma.commit_group
INLINE void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until at most `LEFT` groups are under way.   9.7.15.7.3 wgmma.wait_group
template <int LEFT>
INLINE void wait_products() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory");
}

// Begins c = a b + (keep ? c : 0) for 64 rows of a and the columns of c, at a depth of 16. ALONG: rows of memory run
// along the depth, else across it; a may be a warp's factor in registers. Of c, warp w has rows 16 w and on, laid out as
// by mma.m16n8k16; it must not be touched before the wait.   9.7.15.5.2 wgmma.mma_async
#define SUM(i) "+f"(c[(i) / 4][(i) % 4])
#define SUMS4(i) SUM(i), SUM(i + 1), SUM(i + 2), SUM(i + 3)
#define SUMS16(i) SUMS4(i), SUMS4(i + 4), SUMS4(i + 8), SUMS4(i + 12)
#define SUMS32(i) SUMS16(i), SUMS16(i + 16)
#define SUMS64(i) SUMS32(i), SUMS32(i + 32)
#define SUMS96(i) SUMS64(i), SUMS32(i + 64)
#define SUMS128(i) SUMS64(i), SUMS64(i + 64)

// The first operands, so many as a lane has sums.
#define FIRST16 \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define FIRST32 FIRST16 \
    ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define FIRST64 FIRST32 \
    ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, " \
    "%49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define FIRST96 FIRST64 \
    ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, " \
    "%81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define FIRST128 FIRST96 \
    ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, " \
    "%111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, " \
    "%125, %126, %127"

// `COLUMNS` columns are `COUNT` sums of a lane; behind them come the operands by these names.
#define PRODUCT(COLUMNS, COUNT, A, B, KEEP, ACROSS, ...)                                             \
    asm volatile("{\n.reg .pred keep;\nsetp.ne.u32 keep, " KEEP ", 0;\n"                             \
                 "wgmma.mma_async.sync.aligned.m64n" #COLUMNS "k16.f32.bf16.bf16 {" FIRST##COUNT "}, " A \
                 ", " B ", keep, 1, 1, " ACROSS ";\n}"                                                \
                 : SUMS##COUNT(0)                                                                     \
                 : __VA_ARGS__                                                                        \
                 : "memory")

template <bool A_ALONG, bool B_ALONG>
INLINE void multiply_add(float (&c)[4][4], u64 a, u64 b, bool keep) {
    PRODUCT(32, 16, "%16", "%17", "%18", "%19, %20", "l"(a), "l"(b), "r"(u32(keep)), "n"(A_ALONG ? 0 : 1),
            "n"(B_ALONG ? 0 : 1));
}

template <bool A_ALONG, bool B_ALONG>
INLINE void multiply_add(float (&c)[8][4], u64 a, u64 b, bool keep) {
    PRODUCT(64, 32, "%32", "%33", "%34", "%35, %36", "l"(a), "l"(b), "r"(u32(keep)), "n"(A_ALONG ? 0 : 1),
            "n"(B_ALONG ? 0 : 1));
}

template <bool A_ALONG, bool B_ALONG>
INLINE void multiply_add(float (&c)[16][4], u64 a, u64 b, bool keep) {
    PRODUCT(128, 64, "%64", "%65", "%66", "%67, %68", "l"(a), "l"(b), "r"(u32(keep)), "n"(A_ALONG ? 0 : 1),
            "n"(B_ALONG ? 0 : 1));
}

template <bool A_ALONG, bool B_ALONG>
INLINE void multiply_add(float (&c)[24][4], u64 a, u64 b, bool keep) {
    PRODUCT(192, 96, "%96", "%97", "%98", "%99, %100", "l"(a), "l"(b), "r"(u32(keep)), "n"(A_ALONG ? 0 : 1),
            "n"(B_ALONG ? 0 : 1));
}

template <bool A_ALONG, bool B_ALONG>
INLINE void multiply_add(float (&c)[32][4], u64 a, u64 b, bool keep) {
    PRODUCT(256, 128, "%128", "%129", "%130", "%131, %132", "l"(a), "l"(b), "r"(u32(keep)), "n"(A_ALONG ? 0 : 1),
            "n"(B_ALONG ? 0 : 1));
}

template <bool B_ALONG>
INLINE void multiply_add(float (&c)[8][4], const u32 (&a)[4], u64 b, bool keep) {
    PRODUCT(64, 32, "{%32, %33, %34, %35}", "%36", "%37", "%38", "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b),
            "r"(u32(keep)), "n"(B_ALONG ? 0 : 1));
}

template <bool B_ALONG>
INLINE void multiply_add(float (&c)[16][4], const u32 (&a)[4], u64 b, bool keep) {
    PRODUCT(128, 64, "{%64, %65, %66, %67}", "%68", "%69", "%70", "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b),
            "r"(u32(keep)), "n"(B_ALONG ? 0 : 1));
}

// The same for sums in slices of 32 columns.
template <bool A_ALONG, bool B_ALONG, int SLICES>
INLINE void multiply_add(float (&c)[SLICES][4][4], u64 a, u64 b, bool keep) {
    multiply_add<A_ALONG, B_ALONG>(reinterpret_cast<float (&)[SLICES * 4][4]>(c), a, b, keep);
}

#undef SUM
#undef SUMS4
#undef SUMS16
#undef SUMS32
#undef SUMS64
#undef SUMS96
#undef SUMS128
#undef FIRST16
#undef FIRST32
#undef FIRST64
#undef FIRST96
#undef FIRST128
#undef PRODUCT
