// The CPU kernels: what WKV6's (wkv6_cpu_kernel.h), their dispatcher (wkv6_cpu.cpp) and Bone's (bone_cpu.cpp) share.
#pragma once
#include <cstdint>

// Macros, as no inline function may be shared among variants: see wkv6_cpu_kernel.h.
#define INLINE inline __attribute__((always_inline))
#ifdef __clang__
#define UNROLL _Pragma("clang loop unroll(full)")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif

// Of the instruction set that is compiled for: the bytes of a vector, and whether it has 32 of them, not 16.
#if defined(__AVX512F__)
#define VECTOR_BYTES 64
#define VECTORS_32 1
#elif defined(__AVX2__)
#define VECTOR_BYTES 32
#define VECTORS_32 0
#elif defined(__aarch64__)
#define VECTOR_BYTES 16
#define VECTORS_32 1
#else
#define VECTOR_BYTES 16
#define VECTORS_32 0
#endif

namespace wkv6 {

enum Type { kFloat32 = 0, kBFloat16 = 1, kFloat64 = 2 };

constexpr int64_t kCheckpoint = 128;  // tokens between the states that forward keeps for backward

// One call. Tensors are contiguous: r, k, v, log_w, y and their gradients (B, T, H, N); u (H, N); states
// (B, H, N, N) indexed [key, value]; checkpoints (B, H, ceil(T / kCheckpoint), N, N).
// r, k, v, y, gy, gr, gk, gv have `type`, log_w and gw have `w_type`; all else is float, or double for kFloat64.
struct Problem {
    int type, w_type;
    int64_t B, T, H, N;
    const void *r, *k, *v, *log_w, *u;
    const void* state;                     // or null for zeros
    void *y, *final_state, *checkpoints;   // checkpoints: null if there will be no backward; an input of backward
    const void *gy, *gfinal;               // gfinal: or null for zeros
    void *gr, *gk, *gv, *gw, *gu, *gstate;
};

// The threads that one call may use.
struct Threads {
    int count;
    void* parallel;  // GOMP_parallel of the OpenMP that torch runs on, or null to start threads of our own

    // task(i) for every 0 <= i < n, each once, in any order; returns when all are done.
    template <class Task>
    void each(int64_t n, const Task& task) const {
        run(n, [](const void* t, int64_t i) { (*static_cast<const Task*>(t))(i); }, &task);
    }
    void run(int64_t n, void (*task)(const void*, int64_t), const void* data) const;
};

using Kernel = void(const Problem&, const Threads&);

namespace portable { Kernel forward, backward; }
namespace avx2 { Kernel forward, backward; }
namespace avx512 { Kernel forward, backward; }

}  // namespace wkv6
