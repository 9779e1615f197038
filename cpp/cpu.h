// What CPU kernels share: how they are compiled for several instruction sets, element types, threads.
#pragma once
#include <cstdint>

// Macros, as no inline function may be shared among variants: see vectors.h.
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

namespace cpu {

enum Type { kFloat32 = 0, kBFloat16 = 1, kFloat64 = 2 };
enum Variant { kPortable = 0, kAvx2 = 1, kAvx512 = 2 };  // AVX2 with FMA; cpu_has (cpu.cpp) tells what this machine can run

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

}  // namespace cpu
