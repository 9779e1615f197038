// WKV7 on the CPU behind a plain C interface (called through ctypes): the choice of instruction set.
// Compiled once for every instruction set with WKV7_VARIANT defined, which gives the kernels, and once without.
#ifdef WKV7_VARIANT
#include "wkv7_cpu_kernel.h"
#else

#include "wkv7_cpu.h"

namespace wkv7 {
namespace {

struct Kernels { Kernel *forward, *backward; };

// float64 has portable kernels only.
Kernels choose(int variant, int type) {
#if defined(__x86_64__)
    if (variant == cpu::kAvx512 && type != kFloat64) return {avx512::forward, avx512::backward};
    if (variant == cpu::kAvx2 && type != kFloat64) return {avx2::forward, avx2::backward};
#endif
    return {portable::forward, portable::backward};
}

}  // namespace
}  // namespace wkv7

extern "C" {

// `variant` is one that cpu_has.
void wkv7_cpu_forward(int variant, int threads, void* parallel, int type, int w_type, int64_t B, int64_t T, int64_t H, int64_t N,
                      const void* r, const void* log_w, const void* k, const void* v, const void* a, const void* b,
                      const void* state, const uint8_t* reset, void* y, void* final_state, void* saved) {
    wkv7::Problem p{};
    p.type = type, p.w_type = w_type, p.B = B, p.T = T, p.H = H, p.N = N;
    p.r = r, p.log_w = log_w, p.k = k, p.v = v, p.a = a, p.b = b, p.state = state, p.reset = reset;
    p.y = y, p.final_state = final_state, p.saved = saved;
    wkv7::choose(variant, type).forward(p, {threads, parallel});
}

void wkv7_cpu_backward(int variant, int threads, void* parallel, int type, int w_type, int64_t B, int64_t T, int64_t H, int64_t N,
                       const void* r, const void* log_w, const void* k, const void* v, const void* a, const void* b,
                       const uint8_t* reset, void* saved, const void* gy, const void* gfinal, void* gr, void* glog_w, void* gk,
                       void* gv, void* ga, void* gb, void* gstate) {
    wkv7::Problem p{};
    p.type = type, p.w_type = w_type, p.B = B, p.T = T, p.H = H, p.N = N;
    p.r = r, p.log_w = log_w, p.k = k, p.v = v, p.a = a, p.b = b, p.reset = reset, p.saved = saved;
    p.gy = gy, p.gfinal = gfinal, p.gr = gr, p.glog_w = glog_w, p.gk = gk, p.gv = gv, p.ga = ga, p.gb = gb, p.gstate = gstate;
    wkv7::choose(variant, type).backward(p, {threads, parallel});
}

}  // extern "C"
#endif
