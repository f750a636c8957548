// New keys or values enter a cache.
//   cache[slots[b], positions[b,t], w] = src[b, t, at + w]     w < W
// A slot outside 0..S or a position outside 0..P is unused. A warp takes a row b, t; of rows that meet in one place
// the last one writes, so each row looks whether one behind it goes there too.
//
// entry                   grid             block  shared  arguments                                       bytes
// cache_append_rows_bf16  min(BT/8,4*sms)  256    0       cache | src slots positions | B T S P W C at |  4BTW
// cache_append_rows_f32   min(BT/8,4*sms)  256    0       cache | src slots positions | B T S P W C at |  8BTW
//
// Needs   tensors 16-byte aligned; any sizes. C is the width of a row of src.
#include "common/pack.cuh"

constexpr int THREADS = 256;

struct Places {
    const int *slots, *positions;
    u32 batch, steps, capacity;

    // Whether a row behind (b, t) goes to the same place. All lanes of a warp ask together.
    INLINE bool replaced(u32 b, u32 t, int slot, int position) const {
        const u32 lane = threadIdx.x % 32;
        // Rows of the same batch row, then of those behind it that share its slot.
        for (u32 other = b; other < batch; other++) {
            if (slots[other] != slot) continue;
            for (u32 from = other == b ? t + 1 : 0; from < steps; from += 32) {
                const bool same = from + lane < steps && positions[other * steps + from + lane] == position;
                if (__any_sync(0xffffffffu, same)) return true;
            }
        }
        return false;
    }
};

template <typename T>
INLINE void append(T* cache, const T* src, const int* slots, const int* positions, u32 batch, u32 steps, u32 count,
                   u32 capacity, u32 width, u32 columns, u32 column) {
    const Places places{slots, positions, batch, steps, capacity};
    const u32 lane = threadIdx.x % 32, warps = gridDim.x * (THREADS / 32);
    constexpr u32 VECTOR = 16 / sizeof(T);
    const bool vectors = (width | columns | column) % VECTOR == 0;
    for (u32 n = (blockIdx.x * THREADS + threadIdx.x) / 32; n < batch * steps; n += warps) {
        const int slot = slots[n / steps], position = positions[n];
        // As unsigned, what is negative lies outside.
        if (u32(slot) >= count || u32(position) >= capacity) continue;
        if (places.replaced(n / steps, n % steps, slot, position)) continue;
        const T* from = src + u64(n) * columns + column;
        T* to = cache + (u64(slot) * capacity + position) * width;
        if (vectors) {
            for (u32 c = lane * VECTOR; c < width; c += 32 * VECTOR) store16(to + c, load16(from + c));
        } else {
            for (u32 c = lane; c < width; c += 32) to[c] = from[c];
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 4)
    cache_append_rows_bf16(bf16* cache, const bf16* src, const int* slots, const int* positions, u32 batch, u32 steps,
        u32 count, u32 capacity, u32 width, u32 columns, u32 column) {
    append(cache, src, slots, positions, batch, steps, count, capacity, width, columns, column);
}

extern "C" __global__ void __launch_bounds__(THREADS, 4)
    cache_append_rows_f32(float* cache, const float* src, const int* slots, const int* positions, u32 batch, u32 steps,
        u32 count, u32 capacity, u32 width, u32 columns, u32 column) {
    append(cache, src, slots, positions, batch, steps, count, capacity, width, columns, column);
}
