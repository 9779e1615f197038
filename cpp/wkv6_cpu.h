// One call of the WKV6 CPU kernels: what the kernels (wkv6_cpu_kernel.h) and their dispatcher (wkv6_cpu.cpp) share.
#pragma once
#include "cpu.h"

namespace wkv6 {

using cpu::kBFloat16;
using cpu::kFloat32;
using cpu::kFloat64;
using cpu::Threads;

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

using Kernel = void(const Problem&, const Threads&);

namespace portable { Kernel forward, backward; }
namespace avx2 { Kernel forward, backward; }
namespace avx512 { Kernel forward, backward; }

}  // namespace wkv6
