// WKV6 on the CPU behind a plain C interface (called through ctypes): the choice of instruction set, and threads.
// Compiled once for every instruction set with WKV6_VARIANT defined, which gives the kernels, and once without.
#ifdef WKV6_VARIANT
#include "wkv6_cpu_kernel.h"
#else

#include <atomic>
#include <thread>
#include <vector>

#include "wkv6_cpu.h"

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace wkv6 {
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

namespace {

enum Variant { kPortable = 0, kAvx2 = 1, kAvx512 = 2 };

struct Kernels { Kernel *forward, *backward; };

bool choose(int variant, Kernels& kernels) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (variant == kAvx512 && has_avx512) return kernels = {avx512::forward, avx512::backward}, true;
    if (variant == kAvx2 && has_avx2) return kernels = {avx2::forward, avx2::backward}, true;
#endif
    if (variant == kPortable) return kernels = {portable::forward, portable::backward}, true;
    return false;
}

}  // namespace
}  // namespace wkv6

extern "C" {

// 1 if this machine can run the variant: 0 portable, 1 AVX2 with FMA, 2 AVX-512.
int wkv6_cpu_has(int variant) {
    wkv6::Kernels kernels;
    return wkv6::choose(variant, kernels);
}

void wkv6_cpu_forward(int variant, int threads, void* parallel, int type, int w_type, int64_t B, int64_t T, int64_t H,
                      int64_t N, const void* r, const void* k, const void* v, const void* log_w, const void* u,
                      const void* state, void* y, void* final_state, void* checkpoints) {
    wkv6::Problem p{};
    p.type = type, p.w_type = w_type, p.B = B, p.T = T, p.H = H, p.N = N;
    p.r = r, p.k = k, p.v = v, p.log_w = log_w, p.u = u, p.state = state;
    p.y = y, p.final_state = final_state, p.checkpoints = checkpoints;
    wkv6::Kernels kernels;
    if (wkv6::choose(variant, kernels)) kernels.forward(p, {threads, parallel});
}

void wkv6_cpu_backward(int variant, int threads, void* parallel, int type, int w_type, int64_t B, int64_t T, int64_t H,
                       int64_t N, const void* r, const void* k, const void* v, const void* log_w, const void* u,
                       void* checkpoints, const void* gy, const void* gfinal, void* gr, void* gk, void* gv, void* gw,
                       void* gu, void* gstate) {
    wkv6::Problem p{};
    p.type = type, p.w_type = w_type, p.B = B, p.T = T, p.H = H, p.N = N;
    p.r = r, p.k = k, p.v = v, p.log_w = log_w, p.u = u, p.checkpoints = checkpoints;
    p.gy = gy, p.gfinal = gfinal, p.gr = gr, p.gk = gk, p.gv = gv, p.gw = gw, p.gu = gu, p.gstate = gstate;
    wkv6::Kernels kernels;
    if (wkv6::choose(variant, kernels)) kernels.backward(p, {threads, parallel});
}

}  // extern "C"
#endif
