// Pictures cut into patches of k x k positions, and put together again.             Dosovitskiy et al. 2021
//   patches[p, (dy k + dx) Ch + c] = image[py k + dy, px k + dx, c]
// A patch is padded with zeros to Z values, a multiple of 8; its k runs of k Ch values lie side by side in the
// picture. Where runs are made of whole vectors, they are moved in those. n counts the values of all patches.
//
// A run of V vectors, V odd, ends in the middle of a sector. Of two runs of two neighbours,
//   a b     a's last vector shares its sector with b's first in the picture, with c's first in the patch, and d's first
//   c d     with c's and with b's last.
// So b, c, the last of a and the first of d are moved side by side, 2V + 2 vectors that fill their sectors on both sides,
// and then the rest of d and of a, which lie in pairs; in every other square the other way round, so that rests meet.
//
// entry                grid               block  shared  arguments                   bytes
// patchify_fwd_bf16    min(n/2048,8*sms)  256    0       patches | image | n S Ch k |  4n
// patchify_fwd_f32     min(n/1024,8*sms)  256    0       patches | image | n S Ch k |  8n
// unpatchify_fwd_bf16  min(n/2048,8*sms)  256    0       image | patches | n S Ch k |  4n
// unpatchify_fwd_f32   min(n/1024,8*sms)  256    0       image | patches | n S Ch k |  8n
//
// Needs   Operands begin at multiples of 16 bytes.
// Rounds  never.
#include "common/lots.cuh"

constexpr int THREADS = 256;

// How pictures are cut.
struct Cut {
    u32 size, channels, k;

    INLINE u32 run() const { return k * channels; }
    INLINE u32 used() const { return k * run(); }
    INLINE u32 width() const { return (used() + 7) / 8 * 8; }

    template <typename T>
    INLINE bool is_in_vectors() const { return run() % WIDTH<T> == 0 && used() == width(); }

    // Where value e of patch p lies among the pictures; all patches of all pictures are counted through.
    INLINE u64 at(u32 p, u32 e) const {
        const u32 across = size / k, rows = p / across, dy = e / run();
        return (u64(rows * k + dy) * size + p % across * k) * channels + e % run();
    }
};

// Calls f(at, from) for every vector of `N` values: where it lies among the patches, and where among the pictures.
template <int N, typename F>
INLINE void for_vectors(u32 n, Cut cut, const F& f) {
    const u32 run = cut.run(), across = cut.size / cut.k, vectors = run / N;
    const u32 pair = vectors % 2 != 0 && cut.k % 2 == 0 && across % 2 == 0 ? 2 : 1;
    // A warp takes whole squares, if there is room for one.
    const u32 square = pair * pair * vectors, taken = square < 32 ? 32 / square * square : 32;
    if (threadIdx.x % 32 >= taken) return;
    const u32 warps = THREADS / 32, first = (blockIdx.x * warps + threadIdx.x / 32) * taken + threadIdx.x % 32;
    for (u32 v = first; v < n / N; v += gridDim.x * warps * taken) {
        u32 rest = v / square, i = v % square, right = 0, below = 0;
        if (pair == 2) {
            if (rest % 2 != 0) i = square - 1 - i;
            if (i >= 2 * vectors) i = 2 * vectors + (i + vectors - 1) % (2 * vectors);
            // Of b, c, a, d.
            const u32 which = i / vectors;
            right = which % 3 == 0, below = which % 2, i %= vectors;
        }
        const auto next = [&](u32 extent) {
            const u32 at = rest % extent;
            rest /= extent;
            return at;
        };
        const u32 dy = next(cut.k / pair) * pair + below, px = next(across / pair) * pair + right, py = rest;
        f(((py * across + px) * cut.k + dy) * run + i * N, ((py * cut.k + dy) * across + px) * run + i * N);
    }
}

template <typename T>
INLINE void cut(T* patches, const T* image, u32 n, Cut c) {
    if (c.is_in_vectors<T>()) {
        for_vectors<WIDTH<T>>(n, c, [=](u32 at, u32 from) { store16(patches + at, load16(image + from)); });
        return;
    }
    for_lots<1>(n, [=](auto, u32 i) {
        const u32 e = i % c.width();
        patches[i] = e < c.used() ? image[c.at(i / c.width(), e)] : T{};
    });
}

template <typename T>
INLINE void join(T* image, const T* patches, u32 n, Cut c) {
    if (c.is_in_vectors<T>()) {
        for_vectors<WIDTH<T>>(n, c, [=](u32 at, u32 to) { store16(image + to, load16(patches + at)); });
        return;
    }
    for_lots<1>(n, [=](auto, u32 i) {
        const u32 e = i % c.width();
        if (e < c.used()) image[c.at(i / c.width(), e)] = patches[i];
    });
}

extern "C" __global__ void __launch_bounds__(THREADS)
    patchify_fwd_bf16(bf16* patches, const bf16* image, u32 n, u32 size, u32 channels, u32 k) {
    cut(patches, image, n, {size, channels, k});
}

extern "C" __global__ void __launch_bounds__(THREADS)
    patchify_fwd_f32(float* patches, const float* image, u32 n, u32 size, u32 channels, u32 k) {
    cut(patches, image, n, {size, channels, k});
}

extern "C" __global__ void __launch_bounds__(THREADS)
    unpatchify_fwd_bf16(bf16* image, const bf16* patches, u32 n, u32 size, u32 channels, u32 k) {
    join(image, patches, n, {size, channels, k});
}

extern "C" __global__ void __launch_bounds__(THREADS)
    unpatchify_fwd_f32(float* image, const float* patches, u32 n, u32 size, u32 channels, u32 k) {
    join(image, patches, n, {size, channels, k});
}
