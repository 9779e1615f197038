// Bone (rwkv_bone/peft/bone.py) on the CPU: all of its forward and backward but the two large products.
//
//   bone_cpu_forward    u_j = x_j B_j^T;  s = sum_j u_j;  xu <- x + u, rounded without bias (rwkv_bone/peft/rounding.py);
//                       y <- tile(s)
//   bone_cpu_backward   t = sum_i g_i;  du_j = q_j + t;  dB_j += du_j^T x_j;  q_j <- q_j + du_j B_j, which is dx_j
//   bone_cpu_add        u <- u + x + tile(b) of bf16, rounded without bias (rwkv_bone/peft/rounding.py): the column layout's W'
//
// x, xu, q (n, in) and y, g (n, out) are contiguous, float or bf16; r divides in; out is any, and its last piece is cut.
// Tokens go in tiles, and a tile through all pieces in turn: u, du and all else between stays in the core's cache, and every
// tensor passes once, but g, which passes once for every group of pieces. Subnormal numbers count as zero, and sums are float's.
// Products of bf16 are taken two terms at a time, or in squares, where the processor has the instructions: bone_pairs.h.
//
// Compiled once for every instruction set with BONE_VARIANT defined, which gives the kernels, and once without, for the plain C
// interface. No inline function of a shared header may be called here: see vectors.h.
#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "cpu.h"

#if defined(__x86_64__) && defined(__has_include)
#if __has_include(<avx512bf16intrin.h>)
#define KNOWS_PAIRS 1  // the compiler
#endif
#if defined(__linux__) && __has_include(<amxbf16intrin.h>)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#define KNOWS_TILES 1
#endif
#endif

namespace bone {

constexpr int64_t kLanes = 16;  // a row of r numbers is padded to a multiple of it

struct Problem {
    int bf16, pairs;  // 1: products of pairs, 2: and of squares of them
    int64_t n, in, out, r;
    const void *x, *b, *g;
    void *xu, *y, *q;
    float* db;               // (shares, in / r, r, r padded)
    int64_t shares, groups;  // of the tokens, each with its own db, and of the pieces: shares times groups can be done at once
    int wants_dx;
};

struct Sum {
    int64_t n, width, r, u_row, x_row;  // entries from one row to the next; r may be 0
    uint16_t* u;
    const uint16_t *x, *b;
};

using Kernel = void(const Problem&, const cpu::Threads&);
using Add = void(const Sum&, const cpu::Threads&);

namespace portable { Kernel forward, backward; Add add; }
namespace avx2 { Kernel forward, backward; Add add; }
namespace avx512 { Kernel forward, backward; Add add; }

#ifdef BONE_VARIANT
}  // namespace bone
#if defined(__AVX512F__)
#include <immintrin.h>
#endif
namespace bone {
namespace BONE_VARIANT {
namespace {

constexpr int kBytes = VECTOR_BYTES, W = kBytes / 4;
constexpr int kRows = 4, kCols = VECTORS_32 ? 4 : 2;  // a register tile of a product: rows, and vectors
constexpr int64_t kDepth = 64;  // tokens, or pairs of them, of a tile: the operands of its products stay in the first cache

typedef float Vec __attribute__((vector_size(kBytes)));
struct bf16 { uint16_t bits; };

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

template <class To, class From> INLINE To cast(const From& from) {
    static_assert(sizeof(To) == sizeof(From), "the same bits");
    To to;
    memcpy(&to, &from, sizeof to);
    return to;
}

INLINE float widened(float x) { return x; }
INLINE float widened(bf16 x) { return cast<float>(uint32_t(x.bits) << 16); }

// Asks for the numbers that come next in a row: tiles read rows piece by piece, which the processor does not foresee.
template <class T> INLINE void prefetch(const T* from, int64_t count) {
    for (int64_t i = 0; i < count; i += 64 / int64_t(sizeof(T))) __builtin_prefetch(from + i);
}

// To the nearest, of two the even one. A NaN stays one.
INLINE void store(float* to, float x) { *to = x; }
INLINE void store(bf16* to, float x) {
    uint32_t bits = cast<uint32_t>(x);
    to->bits = uint16_t((x != x ? bits | 0x400000 : bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// Up to the next bf16 with the probability of the distance, else down: the pattern of rounding.py.
INLINE void store_evenly(float* to, float x, uint32_t, uint32_t) { *to = x; }
INLINE void store_evenly(bf16* to, float x, uint32_t row, uint32_t column) {
    uint32_t bits = cast<uint32_t>(x);
    to->bits = uint16_t((x != x ? bits | 0x400000 : bits + ((row * 49473 ^ column * 40503) & 0xffff)) >> 16);
}

// ---- c (rows, cols) = or += a b: a's element (i, k) at a[i * row + k * step], b (depth, columns) in rows of `width` floats or pairs

INLINE void load(Vec* to, const void* from) { memcpy(to, from, kBytes); }

template <int ROWS, int COLS, class A>
INLINE void register_tile(int64_t depth, const A* a, int64_t row, int64_t step, const float* b, float* c, int64_t width, bool add) {
    Vec sum[ROWS][COLS];
    UNROLL for (int i = 0; i < ROWS; i++) UNROLL for (int j = 0; j < COLS; j++) {
        if (add) load(&sum[i][j], c + i * width + j * W);
        else sum[i][j] = Vec{};
    }
    for (int64_t k = 0; k < depth; k++, a += step, b += width) {
        Vec right[COLS];
        UNROLL for (int j = 0; j < COLS; j++) load(&right[j], b + j * W);
        UNROLL for (int i = 0; i < ROWS; i++) {
            float left = widened(a[i * row]);
            UNROLL for (int j = 0; j < COLS; j++) sum[i][j] += left * right[j];
        }
    }
    UNROLL for (int i = 0; i < ROWS; i++) UNROLL for (int j = 0; j < COLS; j++) memcpy(c + i * width + j * W, &sum[i][j], kBytes);
}

template <int ROWS, int COLS, class A, class B>
INLINE void columns(int cols, int64_t depth, const A* a, int64_t row, int64_t step, const B* b, float* c, int64_t width, bool add) {
    if (cols == COLS) return register_tile<ROWS, COLS>(depth, a, row, step, b, c, width, add);
    if constexpr (COLS > 1) columns<ROWS, COLS - 1>(cols, depth, a, row, step, b, c, width, add);
}

template <int ROWS, class A, class B>
INLINE void row_group(int rows, int64_t depth, const A* a, int64_t row, int64_t step, const B* b, float* c, int64_t width, bool add) {
    if (rows < ROWS) {
        if constexpr (ROWS > 1) row_group<ROWS - 1>(rows, depth, a, row, step, b, c, width, add);
        return;
    }
    for (int64_t j = 0; j < width; j += kCols * W)
        columns<ROWS, kCols>(int(least(kCols, (width - j) / W)), depth, a, row, step, b + j, c + j, width, add);
}

template <class A, class B>
void product(int64_t rows, int64_t depth, const A* a, int64_t row, int64_t step, const B* b, float* c, int64_t width, bool add) {
    for (int64_t i = 0; i < rows; i += kRows, a += kRows * row, c += kRows * width)
        row_group<kRows>(int(least(kRows, rows - i)), depth, a, row, step, b, c, width, add);
}

// ---- one tile of tokens

INLINE int64_t padded(int64_t r) { return (r + kLanes - 1) / kLanes * kLanes; }

// Arrays of (tokens of a tile, r padded) floats, all zero: the padding is read too, and has to be a number.
struct Workspace {
    int64_t size;
    float* floats;
    Workspace(int64_t arrays, int64_t tokens, int64_t r) : size(tokens * padded(r)) {
        size_t bytes = size_t(arrays * size) * sizeof(float);
        floats = static_cast<float*>(aligned_alloc(64, bytes));
        if (!floats) abort();
        memset(floats, 0, bytes);
    }
    ~Workspace() { free(floats); }
    Workspace(const Workspace&) = delete;
    float* array(int64_t i) const { return floats + i * size; }
};

template <class T>
void forward_tile(const Problem& p, const Workspace& work, int64_t first, int64_t tokens) {
    const T* x = static_cast<const T*>(p.x) + first * p.in;
    T *xu = static_cast<T*>(p.xu) + first * p.in, *y = static_cast<T*>(p.y) + first * p.out;
    const float* b = static_cast<const float*>(p.b);
    const int64_t r = p.r, width = padded(r);
    float *s = work.array(0), *u = work.array(1);
    for (int64_t j = 0; j < p.in; j += r, b += r * width) {
        product(tokens, r, x + j, p.in, 1, b, u, width, false);
        const int64_t next = j + r < p.in ? r : 0;
        for (int64_t i = 0; i < tokens; i++) {
            const T* xs = x + i * p.in + j;
            T* __restrict xus = xu + i * p.in + j;
            const float* us = u + i * width;
            float* __restrict sums = s + i * width;
            prefetch(xs + r, next);
            for (int64_t c = 0; c < r; c++) {
                sums[c] = (j ? sums[c] : 0) + us[c];
                store_evenly(xus + c, widened(xs[c]) + us[c], uint32_t(first + i), uint32_t(j + c));
            }
        }
    }
    T* tile = reinterpret_cast<T*>(u);
    for (int64_t i = 0; i < tokens; i++, y += p.out) {
        for (int64_t c = 0; c < r; c++) store(tile + c, s[i * width + c]);
        for (int64_t j = 0; j < p.out; j += r) memcpy(y + j, tile, sizeof(T) * size_t(least(r, p.out - j)));
    }
}

template <class T>
void backward_tile(const Problem& p, const Workspace& work, int64_t share, int64_t group, int64_t first, int64_t tokens) {
    const T* x = static_cast<const T*>(p.x) + first * p.in;
    const T* g = static_cast<const T*>(p.g) + first * p.out;
    T* q = static_cast<T*>(p.q) + first * p.in;
    const int64_t r = p.r, width = padded(r), m = p.in / r;
    float *t = work.array(0), *update = work.array(1), *right = work.array(2), *du = work.array(3);
    for (int64_t i = 0; i < tokens; i++, g += p.out) {
        float* __restrict sums = t + i * width;
        for (int64_t c = 0; c < r; c++) sums[c] = 0;
        for (int64_t j = 0; j < p.out; j += r)
            for (int64_t c = 0, some = least(r, p.out - j); c < some; c++) sums[c] += widened(g[j + c]);
    }
    for (int64_t piece = m * group / p.groups, last = m * (group + 1) / p.groups; piece < last; piece++) {
        const int64_t j = piece * r, next = piece + 1 < last ? r : 0;
        for (int64_t i = 0; i < tokens; i++) {
            const T *qs = q + i * p.in + j, *xs = x + i * p.in + j;
            prefetch(qs + r, next), prefetch(xs + r, next);
            for (int64_t c = 0; c < r; c++) {
                du[i * width + c] = widened(qs[c]) + t[i * width + c];
                right[i * width + c] = widened(xs[c]);
            }
        }
        product(r, tokens, du, 1, width, right, p.db + (share * m + piece) * r * width, width, true);
        if (!p.wants_dx) continue;
        product(tokens, r, du, width, 1, static_cast<const float*>(p.b) + piece * r * width, update, width, false);
        for (int64_t i = 0; i < tokens; i++)
            for (int64_t c = 0; c < r; c++) {
                T* dx = q + i * p.in + j + c;
                store(dx, widened(*dx) + update[i * width + c]);
            }
    }
}

#if defined(__AVX512F__) && defined(KNOWS_PAIRS)
#include "bone_pairs.h"
#else  // never asked for
constexpr int64_t kPairTokens = 1;
void forward_pairs(const Problem&, const Workspace&, int64_t, int64_t) { abort(); }
void backward_pairs(const Problem&, const Workspace&, int64_t, int64_t, int64_t, int64_t) { abort(); }
#endif

template <class Tile>
void forward_all(const Problem& p, const cpu::Threads& threads, int64_t tokens, Tile tile) {
    threads.each((p.n + tokens - 1) / tokens, [&](int64_t i) {
        Workspace work(2, tokens, p.r);
        tile(p, work, i * tokens, least(tokens, p.n - i * tokens));
    });
}

template <class Tile>
void backward_all(const Problem& p, const cpu::Threads& threads, int64_t tokens, Tile tile) {
    threads.each(p.shares * p.groups, [&](int64_t task) {
        Workspace work(5, tokens, p.r);
        int64_t share = task / p.groups, size = (p.n + p.shares - 1) / p.shares, last = least(p.n, (share + 1) * size);
        for (int64_t i = share * size; i < last; i += tokens) tile(p, work, share, task % p.groups, i, least(tokens, last - i));
    });
}

}  // namespace

void forward(const Problem& p, const cpu::Threads& threads) {
    if (p.pairs) forward_all(p, threads, kPairTokens, forward_pairs);
    else forward_all(p, threads, kDepth, p.bf16 ? forward_tile<bf16> : forward_tile<float>);
}

void backward(const Problem& p, const cpu::Threads& threads) {
    if (p.pairs) backward_all(p, threads, kPairTokens, backward_pairs);
    else backward_all(p, threads, kDepth, p.bf16 ? backward_tile<bf16> : backward_tile<float>);
}

void add(const Sum& p, const cpu::Threads& threads) {
    constexpr int64_t kRowsAtOnce = 16;
    threads.each((p.n + kRowsAtOnce - 1) / kRowsAtOnce, [&](int64_t task) {
        Workspace work(1, 1, p.width);
        float* __restrict tiled = work.array(0);  // b's row over the whole width
        for (int64_t i = task * kRowsAtOnce; i < least(p.n, (task + 1) * kRowsAtOnce); i++) {
            bf16* __restrict u = reinterpret_cast<bf16*>(p.u) + i * p.u_row;
            const bf16* __restrict x = reinterpret_cast<const bf16*>(p.x) + i * p.x_row;
            const bf16* b = reinterpret_cast<const bf16*>(p.b) + i * p.r;
            for (int64_t c = 0; c < least(p.r, p.width); c++) tiled[c] = widened(b[c]);
            for (int64_t c = p.r; p.r && c < p.width; c += p.r) memcpy(tiled + c, tiled, 4 * size_t(least(p.r, p.width - c)));
            for (int64_t c = 0; c < p.width; c++)
                store_evenly(u + c, widened(u[c]) + tiled[c] + widened(x[c]), uint32_t(i), uint32_t(c));
        }
    });
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

// `variant` is one that cpu_has; `pairs` at most what bone_cpu_pairs says, for bf16 and an even r, else 0. b is (in / r, r, r padded to
// kLanes) floats, first index of the two the summed one, or (in / r, r / 2, r padded) pairs of bf16 along that.
void bone_cpu_forward(int variant, int threads, void* parallel, int bf16, int pairs, int64_t n, int64_t in, int64_t out, int64_t r,
                      const void* x, const void* b, void* xu, void* y) {
    bone::Problem p{bf16, pairs, n, in, out, r};
    p.x = x, p.b = b, p.xu = xu, p.y = y;
    CHOOSE(forward)(p, {threads, parallel});
}

void bone_cpu_backward(int variant, int threads, void* parallel, int bf16, int pairs, int64_t n, int64_t in, int64_t out, int64_t r,
                       const void* x, const void* b, const void* g, void* q, float* db, int64_t shares,
                       int64_t groups, int wants_dx) {
    bone::Problem p{bf16, pairs, n, in, out, r};
    p.x = x, p.b = b, p.g = g, p.q = q, p.db = db, p.shares = shares, p.groups = groups, p.wants_dx = wants_dx;
    CHOOSE(backward)(p, {threads, parallel});
}

// u and x (n, width) are bf16, with so many entries from one row to the next; b (n, r) too, each row of which is repeated; or r is 0.
void bone_cpu_add(int variant, int threads, void* parallel, int64_t n, int64_t width, int64_t r, int64_t u_row, int64_t x_row,
                  uint16_t* u, const uint16_t* x, const uint16_t* b) {
    CHOOSE(add)({n, width, r, u_row, x_row, u, x, b}, {threads, parallel});
}

// What the variant can multiply on this machine: 0 numbers, 1 pairs of bf16 too, 2 squares of pairs too.
int bone_cpu_pairs(int variant) {
#ifdef KNOWS_PAIRS
    __builtin_cpu_init();
    if (variant != 2 || !__builtin_cpu_supports("avx512bf16")) return 0;
#ifdef KNOWS_TILES
    unsigned a, b, c, d;
    const unsigned wanted = 1u << 22 | 1u << 24;  // AMX-BF16, AMX-TILE
    // Linux gives its registers to a process that asks: arch_prctl(ARCH_REQ_XCOMP_PERM, XTILEDATA)
    if (__get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & wanted) == wanted && !syscall(SYS_arch_prctl, 0x1023, 18)) return 2;
#endif
    return 1;
#else
    return 0;
#endif
}

}  // extern "C"
#endif
