// Number types, and one wrapper for every PTX instruction that CUDA C++ has no name for. The section
// is that of the PTX ISA manual. Nothing here needs a header of the CUDA toolkit.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#define INLINE __device__ __forceinline__
#define INFINITY __int_as_float(0x7f800000)
#define LOG2_E 1.4426950408889634f
#define LN_2 0.6931471805599453f

// Hides from the compiler that `x` is what it was: what is computed from it then waits in no register meanwhile.
INLINE u32 again(u32 x) {
    asm volatile("" : "+r"(x));
    return x;
}

// The upper half of a float.
struct bf16 {
    u16 bits;
};

INLINE float to_float(float x) { return x; }
INLINE float to_float(bf16 x) { return __uint_as_float(u32(x.bits) << 16); }

// The halves of a register that holds two bf16; the one at the lower address is low.
INLINE float low(u32 pair) { return __uint_as_float(pair << 16); }
INLINE float high(u32 pair) { return __uint_as_float(pair & 0xffff0000u); }

// Two floats rounded to nearest even.   9.7.9.21 cvt.rn.bf16x2.f32
INLINE u32 pack(float low, float high) {
    u32 pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

// 2^x; results below 2^-126 are zero.   9.7.3.21 ex2.approx.ftz.f32
INLINE float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// log2 x.   9.7.3.20 lg2.approx.f32
INLINE float log2_fast(float x) {
    float y;
    asm("lg2.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// 1 / x.   9.7.3.13 rcp.approx.f32
INLINE float reciprocal_fast(float x) {
    float y;
    asm("rcp.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// The address inside shared memory of a generic pointer into it.   9.7.9.20 cvta.to.shared
INLINE u32 shared_address(const void* p) { return u32(__cvta_generic_to_shared(p)); }

// Words to and from shared memory, aligned to their whole size.   9.7.9.11 st.shared, 9.7.9.8 ld.shared
INLINE void store_shared(u32 to, u32 a) { asm volatile("st.shared.u32 [%0], %1;" ::"r"(to), "r"(a) : "memory"); }

INLINE void store_shared(u32 to, float a, float b) {
    asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(to), "f"(a), "f"(b) : "memory");
}

INLINE void store_shared(u32 to, const u32 (&v)[4]) {
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(v[0]), "r"(v[1]), "r"(v[2]), "r"(v[3])
                 : "memory");
}

INLINE void load_shared(u32& v, u32 from) {
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(from) : "memory");
}

INLINE void load_shared(u32 (&v)[4], u32 from) {
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
                 : "r"(from)
                 : "memory");
}

INLINE void load_shared(float (&v)[4], u32 from) {
    asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(v[0]), "=f"(v[1]), "=f"(v[2]), "=f"(v[3])
                 : "r"(from)
                 : "memory");
}

// 16 bytes to global memory at once.   9.7.9.11 st.global.v4
INLINE void store_global(void* to, const u32 (&v)[4]) {
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)), "r"(v[0]), "r"(v[1]),
                 "r"(v[2]), "r"(v[3])
                 : "memory");
}

// Begins to copy 16 bytes from global to shared memory past L1, or 16 zeros where `there` is false;
// then `from` is not read.   9.7.9.25.3.1 cp.async
INLINE void copy_async(u32 to, const void* from, bool there) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(there ? 16 : 0)
                 : "memory");
}

// Closes the group of copies begun by this thread since the last call.   9.7.9.25.3.2 cp.async.commit_group
INLINE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most `LEFT` of this thread's groups are under way. Other threads' copies need a barrier
// besides.   9.7.9.25.3.3 cp.async.wait_group
template <int LEFT>
INLINE void wait_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory");
}

// Four 8x8 matrices of bf16; lane l gives the address of row l % 8 of matrix l / 8 and receives elements
// 2 (l % 4) and the next of row l / 4 of each.   9.7.14.5.15 ldmatrix
INLINE void load_matrices(u32 (&m)[4], u32 row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
                 : "r"(row)
                 : "memory");
}

// As `load_matrices`, each matrix transposed.   9.7.14.5.15 ldmatrix.trans
INLINE void load_matrices_transposed(u32 (&m)[4], u32 row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
                 : "r"(row)
                 : "memory");
}

// c += a b for a 16x16, b 16x8. With g = lane / 4 and t = lane % 4, a lane holds of c: rows g and g + 8,
// columns 2t and 2t + 1; of a: rows g, g + 8, g, g + 8 at columns 2t (twice) and 2t + 8 (twice) and the next;
// of b: rows 2t and 2t + 8 and the next, column g.   9.7.14.5.8 mma.m16n8k16
INLINE void multiply_add(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
