// Pictures cut into patches of k x k positions, and put together again.             Dosovitskiy et al. 2021
//   patches[p, (dy k + dx) Ch + c] = image[py k + dy, px k + dx, c]
// A patch is padded with zeros to Z values, a multiple of 8; its k runs of k Ch values lie side by side in the
// picture, and are moved in vectors where they are made of whole ones. n counts the values of all patches.
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
    INLINE u32 width() const { return (k * run() + 7) / 8 * 8; }

    // Where value e of patch p lies among the pictures; all patches of all pictures are counted through.
    INLINE u64 at(u32 p, u32 e) const {
        const u32 across = size / k, rows = p / across, dy = e / run();
        return (u64(rows * k + dy) * size + p % across * k) * channels + e % run();
    }
};

template <int N, typename T>
INLINE void cut_lots(T* patches, const T* image, u32 n, Cut cut) {
    const u32 width = cut.width(), used = cut.k * cut.run();
    for_lots<N>(n, [=](auto lot, u32 i) {
        const u32 e = i % width;
        float v[lot.SIZE] = {};
        if (e < used) load(v, image + cut.at(i / width, e));
        store(patches + i, v);
    });
}

template <int N, typename T>
INLINE void join_lots(T* image, const T* patches, u32 n, Cut cut) {
    const u32 width = cut.width(), used = cut.k * cut.run();
    for_lots<N>(n, [=](auto lot, u32 i) {
        const u32 e = i % width;
        if (e >= used) return;
        float v[lot.SIZE];
        load(v, patches + i);
        store(image + cut.at(i / width, e), v);
    });
}

template <typename T>
INLINE void cut(T* patches, const T* image, u32 n, Cut c) {
    if (c.run() % WIDTH<T> == 0) cut_lots<WIDTH<T>>(patches, image, n, c);
    else cut_lots<1>(patches, image, n, c);
}

template <typename T>
INLINE void join(T* image, const T* patches, u32 n, Cut c) {
    if (c.run() % WIDTH<T> == 0) join_lots<WIDTH<T>>(image, patches, n, c);
    else join_lots<1>(image, patches, n, c);
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
