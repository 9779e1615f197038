// Threads, and which instruction sets this machine has: what CPU kernels share.
#include "cpu.h"

#include <atomic>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace cpu {
namespace {

// Products of small decays are often subnormal, and then some processors take a hundred times as long.
struct FlushSubnormals {
#if defined(__x86_64__)
    unsigned saved = _mm_getcsr();
    FlushSubnormals() { _mm_setcsr(saved | 0x8040); }
    ~FlushSubnormals() { _mm_setcsr(saved); }
#endif
};

struct Work {
    std::atomic<int64_t> next{0};
    int64_t n;
    void (*task)(const void*, int64_t);
    const void* data;

    static void go(void* self) {
        Work& work = *static_cast<Work*>(self);
        FlushSubnormals flush;
        for (int64_t i; (i = work.next.fetch_add(1)) < work.n;) work.task(work.data, i);
#if defined(__x86_64__)
        _mm_sfence();  // stores past the caches are seen by whoever sees this thread end
#endif
    }
};

}  // namespace

void Threads::run(int64_t n, void (*task)(const void*, int64_t), const void* data) const {
    Work work;
    work.n = n, work.task = task, work.data = data;
    unsigned workers = n < count ? unsigned(n) : unsigned(count);
    if (workers <= 1) return Work::go(&work);
    if (parallel) {
        using Gomp = void (*)(void (*)(void*), void*, unsigned, unsigned);
        return reinterpret_cast<Gomp>(parallel)(Work::go, &work, workers, 0);
    }
    std::vector<std::thread> others;
    for (unsigned i = 1; i < workers; i++) others.emplace_back(Work::go, &work);
    Work::go(&work);
    for (std::thread& other : others) other.join();
}

}  // namespace cpu

// 1 if this machine can run the variant, else 0.
extern "C" int cpu_has(int variant) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (variant == cpu::kAvx2) return avx2;
    if (variant == cpu::kAvx512)
        return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif
    return variant == cpu::kPortable;
}
