// WKV6 on the CPU behind a plain C interface (called through ctypes): the choice of instruction set.
// Compiled once for every instruction set with WKV6_VARIANT defined, which gives the kernels, and once without.
#ifdef WKV6_VARIANT
#include "wkv6_cpu_kernel.h"
#else

#include "wkv6_cpu.h"

namespace wkv6 {
namespace {

struct Kernels { Kernel *forward, *backward; };

Kernels choose(int variant) {
#if defined(__x86_64__)
    if (variant == cpu::kAvx512) return {avx512::forward, avx512::backward};
    if (variant == cpu::kAvx2) return {avx2::forward, avx2::backward};
#endif
    return {portable::forward, portable::backward};
}

}  // namespace
}  // namespace wkv6

extern "C" {

// `variant` is one that cpu_has.
void wkv6_cpu_forward(int variant, int threads, void* parallel, int type, int w_type, int64_t B, int64_t T, int64_t H,
                      int64_t N, const void* r, const void* k, const void* v, const void* log_w, const void* u,
                      const void* state, void* y, void* final_state, void* checkpoints) {
    wkv6::Problem p{};
    p.type = type, p.w_type = w_type, p.B = B, p.T = T, p.H = H, p.N = N;
    p.r = r, p.k = k, p.v = v, p.log_w = log_w, p.u = u, p.state = state;
    p.y = y, p.final_state = final_state, p.checkpoints = checkpoints;
    wkv6::choose(variant).forward(p, {threads, parallel});
}

void wkv6_cpu_backward(int variant, int threads, void* parallel, int type, int w_type, int64_t B, int64_t T, int64_t H,
                       int64_t N, const void* r, const void* k, const void* v, const void* log_w, const void* u,
                       void* checkpoints, const void* gy, const void* gfinal, void* gr, void* gk, void* gv, void* gw,
                       void* gu, void* gstate) {
    wkv6::Problem p{};
    p.type = type, p.w_type = w_type, p.B = B, p.T = T, p.H = H, p.N = N;
    p.r = r, p.k = k, p.v = v, p.log_w = log_w, p.u = u, p.checkpoints = checkpoints;
    p.gy = gy, p.gfinal = gfinal, p.gr = gr, p.gk = gk, p.gv = gv, p.gw = gw, p.gu = gu, p.gstate = gstate;
    wkv6::choose(variant).backward(p, {threads, parallel});
}

}  // extern "C"
#endif
