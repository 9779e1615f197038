// One call of the WKV7 CPU kernels: what the kernels (wkv7_cpu_kernel.h) and their dispatcher (wkv7_cpu.cpp) share.
#pragma once
#include "cpu.h"

namespace wkv7 {

using cpu::kBFloat16;
using cpu::kFloat32;
using cpu::kFloat64;
using cpu::Threads;

constexpr int64_t kCheckpoint = 64;  // tokens between the states that forward keeps for backward

// Tensors are contiguous: r, k, v, a, b, log_w, y and their gradients (B, T, H, N); states (B, H, N, N) indexed [value, key];
// reset (B, T), not 0 at a token before which the state becomes zero; saved (B, H, ceil(T / kCheckpoint), N, N), indexed
// [key, value]. r, k, v, a, b, y and their gradients have `type`, log_w and glog_w `w_type`; all else is float, or double for
// kFloat64.
struct Problem {
    int type, w_type;
    int64_t B, T, H, N;
    const void *r, *log_w, *k, *v, *a, *b;
    const void* state;       // or null for zeros
    const uint8_t* reset;    // or null for none
    void *y, *final_state;
    void* saved;             // null if there will be no backward; an input of backward
    const void *gy, *gfinal;  // gfinal: or null for zeros
    void *gr, *glog_w, *gk, *gv, *ga, *gb, *gstate;
};

using Kernel = void(const Problem&, const Threads&);

namespace portable { Kernel forward, backward; }
namespace avx2 { Kernel forward, backward; }
namespace avx512 { Kernel forward, backward; }

}  // namespace wkv7
