// What Bone (rwkv_bone/peft/bone.py) does on the CPU between its matrix products, each in one pass over memory:
//
//   bone_cpu_forward    s = sum_j u_j;  xu <- x + u, rounded without bias (rwkv_bone/peft/rounding.py);  y <- tile(s)
//   bone_cpu_backward   t = sum_i g_i;  du <- q + tile(t);  pieces <- x
//
// x, xu, q (n, in), y, g (n, out), and u, du, pieces (in / r, n, r): piece by piece, as the small products take them fastest.
// All are contiguous, float or bf16; r divides in; out is any, and its last piece is cut. Compiled once for every instruction set with BONE_VARIANT defined, which gives the kernels, and once
// without, for the plain C interface. The loops are plain: the compiler makes vectors of them.
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "wkv6_cpu.h"

namespace bone {

constexpr int64_t kWidest = 4096;  // the largest r

struct Problem {
    int bf16;
    int64_t n, in, out, r;
    const void *x, *u, *g, *q;
    void *xu, *y, *du, *pieces;
};

using Kernel = void(const Problem&, const wkv6::Threads&);

namespace portable { Kernel forward, backward; }
namespace avx2 { Kernel forward, backward; }
namespace avx512 { Kernel forward, backward; }

#ifdef BONE_VARIANT
namespace BONE_VARIANT {
namespace {

#define INLINE inline __attribute__((always_inline))

constexpr int64_t kRows = 16;  // of a task
constexpr uint32_t kRow = 49473, kColumn = 40503;  // of the pattern in rounding.py

INLINE uint32_t bits_of(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return bits;
}

INLINE float widened(float x) { return x; }
INLINE float widened(uint16_t x) {
    uint32_t bits = uint32_t(x) << 16;
    float wide;
    memcpy(&wide, &bits, 4);
    return wide;
}

// To the nearest, of two the even one. A NaN stays one.
INLINE void store(float* to, float x) { *to = x; }
INLINE void store(uint16_t* to, float x) {
    uint32_t bits = bits_of(x);
    *to = uint16_t((x != x ? bits | 0x400000 : bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// Up to the next bf16 with the probability of the distance, else down.
INLINE void store_evenly(float* to, float x, uint32_t, uint32_t) { *to = x; }
INLINE void store_evenly(uint16_t* to, float x, uint32_t row, uint32_t column) {
    uint32_t bits = bits_of(x);
    *to = uint16_t((x != x ? bits | 0x400000 : bits + ((row * kRow ^ column * kColumn) & 0xffff)) >> 16);
}

template <class T>
INLINE void forward_row(const Problem& p, int64_t row) {
    const T* x = static_cast<const T*>(p.x) + row * p.in;
    const T* u = static_cast<const T*>(p.u) + row * p.r;
    T* __restrict xu = static_cast<T*>(p.xu) + row * p.in;
    T* y = static_cast<T*>(p.y) + row * p.out;
    float s[kWidest];
    T tile[kWidest];
    for (int64_t c = 0; c < p.r; c++) s[c] = 0;
    for (int64_t j = 0; j < p.in; j += p.r, u += p.n * p.r)
        for (int64_t c = 0; c < p.r; c++) {
            float piece = widened(u[c]);
            s[c] += piece;
            store_evenly(xu + j + c, widened(x[j + c]) + piece, uint32_t(row), uint32_t(j + c));
        }
    for (int64_t c = 0; c < p.r; c++) store(tile + c, s[c]);
    for (int64_t i = 0; i < p.out; i += p.r) memcpy(y + i, tile, sizeof(T) * (p.out - i < p.r ? p.out - i : p.r));
}

template <class T>
INLINE void backward_row(const Problem& p, int64_t row) {
    const T* g = static_cast<const T*>(p.g) + row * p.out;
    const T* q = static_cast<const T*>(p.q) + row * p.in;
    const T* x = static_cast<const T*>(p.x) + row * p.in;
    T* __restrict du = static_cast<T*>(p.du) + row * p.r;
    T* __restrict pieces = static_cast<T*>(p.pieces) + row * p.r;
    float t[kWidest];
    for (int64_t c = 0; c < p.r; c++) t[c] = 0;
    for (int64_t i = 0; i < p.out; i += p.r) {
        int64_t width = p.out - i < p.r ? p.out - i : p.r;
        for (int64_t c = 0; c < width; c++) t[c] += widened(g[i + c]);
    }
    for (int64_t j = 0; j < p.in; j += p.r, du += p.n * p.r, pieces += p.n * p.r) {
        for (int64_t c = 0; c < p.r; c++) store(du + c, widened(q[j + c]) + t[c]);
        memcpy(pieces, x + j, sizeof(T) * p.r);
    }
}

template <class T, void row_of(const Problem&, int64_t)>
void rows(const Problem& p, const wkv6::Threads& threads) {
    threads.run(
        (p.n + kRows - 1) / kRows,
        [](const void* data, int64_t i) {
            const Problem& p = *static_cast<const Problem*>(data);
            for (int64_t row = i * kRows; row < p.n && row < (i + 1) * kRows; row++) row_of(p, row);
        },
        &p);
}

}  // namespace

void forward(const Problem& p, const wkv6::Threads& threads) {
    p.bf16 ? rows<uint16_t, forward_row<uint16_t>>(p, threads) : rows<float, forward_row<float>>(p, threads);
}

void backward(const Problem& p, const wkv6::Threads& threads) {
    p.bf16 ? rows<uint16_t, backward_row<uint16_t>>(p, threads) : rows<float, backward_row<float>>(p, threads);
}

}  // namespace BONE_VARIANT
#endif
}  // namespace bone

#ifndef BONE_VARIANT
#if defined(__x86_64__)
#define CHOOSE(name) (variant == 2 ? bone::avx512::name : variant == 1 ? bone::avx2::name : bone::portable::name)
#else
#define CHOOSE(name) bone::portable::name
#endif

extern "C" {

// `variant` is one that wkv6_cpu_has.
void bone_cpu_forward(int variant, int threads, void* parallel, int bf16, int64_t n, int64_t in, int64_t out, int64_t r,
                      const void* x, const void* u, void* xu, void* y) {
    bone::Problem p{bf16, n, in, out, r};
    p.x = x, p.u = u, p.xu = xu, p.y = y;
    CHOOSE(forward)(p, {threads, parallel});
}

void bone_cpu_backward(int variant, int threads, void* parallel, int bf16, int64_t n, int64_t in, int64_t out, int64_t r,
                       const void* x, const void* g, const void* q, void* du, void* pieces) {
    bone::Problem p{bf16, n, in, out, r};
    p.x = x, p.g = g, p.q = q, p.du = du, p.pieces = pieces;
    CHOOSE(backward)(p, {threads, parallel});
}

}  // extern "C"
#endif
