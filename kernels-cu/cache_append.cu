// New keys and values enter their caches.
//   keys[slots[b], positions[b,t], w] = src[b, t, at + w],   values[...] = src[b, t, at + W + w]     w < W
// A slot outside 0..S or a position outside 0..P is unused. Of rows that meet in one place the last one writes, so a
// row looks whether one behind it goes there too: a warp takes the keys or the values of up to four rows b, t .. t + 3,
// which look together.
//
// entry                   grid                block  shared  arguments                                             bytes
// cache_append_rows_bf16  min(2BT/4/8,4*sms)  256    0       keys values | src slots positions | B T S P W C at |  8BTW
// cache_append_rows_f32   min(2BT/4/8,4*sms)  256    0       keys values | src slots positions | B T S P W C at |  16BTW
//
// Needs   tensors 16-byte aligned; any sizes. C is the width of a row of src.
#include "common/pack.cuh"

constexpr int THREADS = 256;
// Rows of a warp.
constexpr u32 TOGETHER = 4;

// Which of the rows b, t .. are replaced: bit k is set where a row behind b, t + k goes to the same place. All lanes of a
// warp ask together.
INLINE u32 replaced(const int* slots, const int* positions, u32 batch, u32 steps, u32 b, u32 t, int slot,
                    const int (&own)[TOGETHER]) {
    const u32 lane = threadIdx.x % 32;
    u32 found = 0;
    const auto look = [&](u32 other, u32 begin) {
        for (u32 s = begin + lane; s - lane < steps; s += 32) {
            const int position = s < steps ? positions[other * steps + s] : -1;
#pragma unroll
            for (u32 k = 0; k < TOGETHER; k++)
                if (__any_sync(0xffffffffu, position == own[k] && (other != b || s > t + k))) found |= 1u << k;
        }
    };
    look(b, t + 1);
    // Batch rows behind it that share its slot.
    for (u32 other = b + 1; other < batch; other += 32) {
        u32 alike = __ballot_sync(0xffffffffu, other + lane < batch && slots[other + lane] == slot);
        for (; alike != 0; alike &= alike - 1) look(other + __popc((alike & (0u - alike)) - 1), 0);
    }
    return found;
}

template <typename T>
INLINE void append(T* keys, T* values, const T* src, const int* slots, const int* positions, u32 batch, u32 steps,
                   u32 count, u32 capacity, u32 width, u32 columns, u32 column) {
    const u32 lane = threadIdx.x % 32, warps = gridDim.x * (THREADS / 32), each = (steps + TOGETHER - 1) / TOGETHER;
    constexpr u32 VECTOR = 16 / sizeof(T);
    const bool vectors = (width | columns | column) % VECTOR == 0;
    for (u32 n = (blockIdx.x * THREADS + threadIdx.x) / 32; n < 2 * batch * each; n += warps) {
        const u32 b = n / 2 / each, t = n / 2 % each * TOGETHER;
        T* cache = n % 2 == 0 ? keys : values;
        const int slot = slots[b];
        // As unsigned, what is negative lies outside.
        if (u32(slot) >= count) continue;
        const int mine = lane < min(TOGETHER, steps - t) ? positions[b * steps + t + lane] : -1;
        int own[TOGETHER];
#pragma unroll
        for (u32 k = 0; k < TOGETHER; k++) own[k] = __shfl_sync(0xffffffffu, mine, k);
        const u32 gone = replaced(slots, positions, batch, steps, b, t, slot, own);
#pragma unroll
        for (u32 k = 0; k < TOGETHER; k++) {
            if (u32(own[k]) >= capacity || (gone >> k & 1) != 0) continue;
            const T* from = src + (u64(b) * steps + t + k) * columns + column + n % 2 * width;
            T* to = cache + (u64(slot) * capacity + own[k]) * width;
            if (vectors) {
                for (u32 c = lane * VECTOR; c < width; c += 32 * VECTOR) store16(to + c, load16(from + c));
            } else {
                for (u32 c = lane; c < width; c += 32) to[c] = from[c];
            }
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 4)
    cache_append_rows_bf16(bf16* keys, bf16* values, const bf16* src, const int* slots, const int* positions, u32 batch,
        u32 steps, u32 count, u32 capacity, u32 width, u32 columns, u32 column) {
    append(keys, values, src, slots, positions, batch, steps, count, capacity, width, columns, column);
}

extern "C" __global__ void __launch_bounds__(THREADS, 4)
    cache_append_rows_f32(float* keys, float* values, const float* src, const int* slots, const int* positions, u32 batch,
        u32 steps, u32 count, u32 capacity, u32 width, u32 columns, u32 column) {
    append(keys, values, src, slots, positions, batch, steps, count, capacity, width, columns, column);
}
