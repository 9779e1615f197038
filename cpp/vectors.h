// Vectors of the instruction set that is compiled for, and rows of numbers in memory as vectors: what the recurrences' CPU
// kernels share. All is in an anonymous namespace, so that each object file has its own: no inline function may be shared among
// variants, for the linker would keep one copy of it for all, perhaps one with instructions that this machine lacks.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <type_traits>
#include <utility>

#ifdef __x86_64__
#include <immintrin.h>
#endif

#include "cpu.h"

namespace vectors {
namespace {

constexpr int kBytes = VECTOR_BYTES;
template <class F> struct Lanes {
    static constexpr int W = kBytes / sizeof(F);
    typedef F V __attribute__((vector_size(kBytes)));
};
template <class F> using Vec = typename Lanes<F>::V;
typedef int32_t Int __attribute__((vector_size(kBytes)));
typedef uint32_t Bits __attribute__((vector_size(kBytes)));
typedef uint16_t Half __attribute__((vector_size(kBytes / 2)));

struct bf16 { uint16_t bits; };

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// ---- vectors

// All lanes x. (V{} + x would be an addition: it turns -0 into 0.)
template <class F> INLINE Vec<F> all(F x) { return x - Vec<F>{}; }
template <class F> INLINE Vec<F>& at(F* p) { return *reinterpret_cast<Vec<F>*>(p); }  // aligned: our own buffers
template <class F> INLINE const Vec<F>& at(const F* p) { return *reinterpret_cast<const Vec<F>*>(p); }

INLINE Vec<float> load(const float* p) { Vec<float> x; memcpy(&x, p, sizeof x); return x; }
INLINE Vec<double> load(const double* p) { Vec<double> x; memcpy(&x, p, sizeof x); return x; }
INLINE Vec<float> load(const bf16* p) {
    Half h;
    memcpy(&h, p, sizeof h);
    return (Vec<float>)(__builtin_convertvector(h, Bits) << 16);
}
INLINE void store(float* p, Vec<float> x) { memcpy(p, &x, sizeof x); }
INLINE void store(double* p, Vec<double> x) { memcpy(p, &x, sizeof x); }
INLINE Half rounded(Vec<float> x) {  // to bf16, the nearest, of two the even one; NaN stays NaN
    Bits b = (Bits)x, nan = (Bits)(x != x);
    b = (b + 0x7fff + ((b >> 16) & 1)) >> 16;
    return __builtin_convertvector((b & ~nan) | (nan & 0x7fc0), Half);
}
INLINE void store(bf16* p, Vec<float> x) {
    Half h = rounded(x);
    memcpy(p, &h, sizeof h);
}

// Stores that go past the caches to memory, without reading the line first: large results are not used soon. p is
// aligned to the vector.
#if defined(__AVX512F__)
INLINE void stream(float* p, Vec<float> x) { _mm512_stream_ps(p, (__m512)x); }
INLINE void stream_half(void* p, Half x) { _mm256_stream_si256(static_cast<__m256i*>(p), (__m256i)x); }
#elif defined(__AVX2__)
INLINE void stream(float* p, Vec<float> x) { _mm256_stream_ps(p, (__m256)x); }
INLINE void stream_half(void* p, Half x) { _mm_stream_si128(static_cast<__m128i*>(p), (__m128i)x); }
#elif defined(__x86_64__)
INLINE void stream(float* p, Vec<float> x) { _mm_stream_ps(p, (__m128)x); }
INLINE void stream_half(void* p, Half x) { _mm_stream_si64(static_cast<long long*>(p), (long long)x); }
#else
INLINE void stream(float* p, Vec<float> x) { store(p, x); }
INLINE void stream_half(void* p, Half x) { memcpy(p, &x, sizeof x); }
#endif
INLINE void stream(bf16* p, Vec<float> x) { stream_half(p, rounded(x)); }
INLINE void stream(double* p, Vec<double> x) { store(p, x); }

// Error 1e-7 relative; exactly 0 below -86.6 (fp32 has no normal number there), -inf included; exactly 1 at 0.
INLINE Vec<float> exponential(Vec<float> x) {
    using V = Vec<float>;
    const V most = all(88.f);
    x = most < x ? most : x;
    V shifted = x * 1.44269504f + 12582912.f;  // 1.5 * 2^23 rounds to an integer, in the low bits
    V n = shifted - 12582912.f;
    V f = x - n * 0.693359375f;
    f = f + n * 2.12194440e-4f;
    V p = f * 1.9875691500e-4f + 1.3981999507e-3f;  // Cephes' expf
    p = p * f + 8.3334519073e-3f;
    p = p * f + 4.1665795894e-2f;
    p = p * f + 1.6666665459e-1f;
    p = p * f + 5.0000001201e-1f;
    p = p * (f * f) + (f + 1.f);
    p = (V)((Int)p + ((Int)shifted << 23));
    return x < -86.6f ? V{} : p;
}
INLINE Vec<double> exponential(Vec<double> x) {
    UNROLL for (int l = 0; l < Lanes<double>::W; l++) x[l] = ::exp(x[l]);
    return x;
}

// Lanes of a where bit D of the lane's number is 0, and lanes of b moved up by D where it is 1; and the other halves.
#ifdef __clang__
template <int D, class V, int... l> INLINE V even(V a, V b, std::integer_sequence<int, l...>) {
    return __builtin_shufflevector(a, b, (l & D ? int(sizeof...(l)) + l - D : l)...);
}
template <int D, class V, int... l> INLINE V odd(V a, V b, std::integer_sequence<int, l...>) {
    return __builtin_shufflevector(a, b, (l & D ? int(sizeof...(l)) + l : l + D)...);
}
#else
template <class F> struct Index { typedef int32_t I __attribute__((vector_size(kBytes))); };
template <> struct Index<double> { typedef int64_t I __attribute__((vector_size(kBytes))); };
template <int D, class V, int... l> INLINE V even(V a, V b, std::integer_sequence<int, l...>) {
    using I = typename Index<typename std::remove_reference<decltype(a[0])>::type>::I;
    return __builtin_shuffle(a, b, I{(l & D ? int(sizeof...(l)) + l - D : l)...});
}
template <int D, class V, int... l> INLINE V odd(V a, V b, std::integer_sequence<int, l...>) {
    using I = typename Index<typename std::remove_reference<decltype(a[0])>::type>::I;
    return __builtin_shuffle(a, b, I{(l & D ? int(sizeof...(l)) + l : l + D)...});
}
#endif

// The sums of W vectors, lane l that of vector l.
template <class F, int D = Lanes<F>::W / 2> INLINE Vec<F> sums(Vec<F>* x) {
    std::make_integer_sequence<int, Lanes<F>::W> lanes;
    UNROLL for (int i = 0; i < D; i++) x[i] = even<D>(x[i], x[i + D], lanes) + odd<D>(x[i], x[i + D], lanes);
    if constexpr (D > 1) return sums<F, D / 2>(x);
    else return x[0];
}

// Transposes the W x W matrix in x.
template <class F, int D = Lanes<F>::W / 2> INLINE void flip(Vec<F>* x) {
    std::make_integer_sequence<int, Lanes<F>::W> lanes;
    UNROLL for (int i = 0; i < Lanes<F>::W; i++) if (!(i & D)) {
        Vec<F> a = even<D>(x[i], x[i + D], lanes);
        x[i + D] = odd<D>(x[i], x[i + D], lanes);
        x[i] = a;
    }
    if constexpr (D > 1) flip<F, D / 2>(x);
}

// ---- rows and states between memory and panels

template <class F, class IO> INLINE Vec<F> load_some(const IO* p, int64_t n) {  // n < W lanes, zeros above
    alignas(64) IO x[Lanes<F>::W] = {};
    for (int64_t i = 0; i < n; i++) x[i] = p[i];
    return load(x);
}
template <class F, class IO> INLINE void store_some(IO* p, int64_t n, Vec<F> v) {
    alignas(64) IO x[Lanes<F>::W];
    store(x, v);
    for (int64_t i = 0; i < n; i++) p[i] = x[i];
}

// n rows of N channels, `stride` apart in memory, become panels of `rows` rows; the rows from n to `rows` become zeros.
template <class F, class IO> void load_as(F* to, const IO* from, int64_t n, int64_t rows, int64_t stride, int64_t N) {
    constexpr int W = Lanes<F>::W;
    int64_t full = N / W, rest = N % W;
    for (int64_t t = 0; t < n; t++, from += stride) {
        for (int64_t c = 0; c < full; c++) at(to + (c * rows + t) * W) = load(from + c * W);
        if (rest) at(to + (full * rows + t) * W) = load_some<F>(from + full * W, rest);
    }
    for (int64_t c = 0; c < full + (rest > 0); c++)
        for (int64_t t = n; t < rows; t++) at(to + (c * rows + t) * W) = Vec<F>{};
}
template <class F, class IO>
void store_as(IO* to, const F* from, int64_t n, int64_t rows, int64_t stride, int64_t N, bool past_caches = false) {
    constexpr int W = Lanes<F>::W;
    int64_t full = N / W, rest = N % W;
    if (past_caches) {
        for (int64_t t = 0; t < n; t++, to += stride)
            for (int64_t c = 0; c < full; c++) stream(to + c * W, at(from + (c * rows + t) * W));
        return;
    }
    for (int64_t t = 0; t < n; t++, to += stride) {
        for (int64_t c = 0; c < full; c++) store(to + c * W, at(from + (c * rows + t) * W));
        if (rest) store_some<F>(to + full * W, rest, at(from + (full * rows + t) * W));
    }
}

// How a tensor's elements lie in memory.
template <class F> struct Element;
template <> struct Element<float> {
    template <class Call> static INLINE void as(int type, const Call& call) {
        if (type == cpu::kBFloat16) call(bf16());
        else call(float());
    }
};
template <> struct Element<double> {
    template <class Call> static INLINE void as(int, const Call& call) { call(double()); }
};

// Transposes W rows of one vector.
template <class F> INLINE void transpose_block(F* to, const F* from) {
    constexpr int W = Lanes<F>::W;
    Vec<F> x[W];
    UNROLL for (int i = 0; i < W; i++) x[i] = at(from + i * W);
    flip<F>(x);
    UNROLL for (int i = 0; i < W; i++) at(to + i * W) = x[i];
}

// Panels first <= b < last of the transpose of an np x np matrix in panels.
template <class F> void transpose(F* to, const F* from, int64_t nv, int64_t first, int64_t last) {
    constexpr int W = Lanes<F>::W;
    int64_t np = nv * W;
    for (int64_t b = first; b < last; b++)
        for (int64_t a = 0; a < nv; a++) transpose_block(to + ((b - first) * np + a * W) * W, from + (a * np + b * W) * W);
}
template <class F> void transpose(F* to, const F* from, int64_t nv) { transpose(to, from, nv, 0, nv); }

// Aligned memory that goes with its scope.
template <class F> struct Buffer {
    F* p;
    explicit Buffer(int64_t n) {
        size_t bytes = (size_t(n) * sizeof(F) + 63) / 64 * 64;
        p = static_cast<F*>(aligned_alloc(64, bytes));
        if (!p) abort();  // some hundred KiB: the machine is out of memory, and so is Python
    }
    ~Buffer() { free(p); }
    Buffer(const Buffer&) = delete;
};

}  // namespace
}  // namespace vectors
