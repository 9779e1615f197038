// WKV6 on the CPU, plain C interface. First version: the recurrence, one (batch, head) at a time.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {
constexpr int64_t kCheckpoint = 128;

struct bf16 {
    uint16_t bits;
    operator float() const {
        uint32_t x = uint32_t(bits) << 16;
        float f;
        std::memcpy(&f, &x, 4);
        return f;
    }
    bf16() = default;
    bf16(float f) {
        uint32_t x;
        std::memcpy(&x, &f, 4);
        bits = f != f ? 0x7fc0 : uint16_t((x + 0x7fff + ((x >> 16) & 1)) >> 16);
    }
};

template <class F, class IO, class W>
void forward(int64_t B, int64_t T, int64_t H, int64_t N, const IO* r, const IO* k, const IO* v, const W* log_w,
             const F* u, const F* state, IO* y, F* final_state, F* checkpoints) {
    int64_t blocks = (T + kCheckpoint - 1) / kCheckpoint;
    std::vector<F> yt(N);
    for (int64_t bh = 0; bh < B * H; bh++) {
        int64_t b = bh / H, h = bh % H;
        F* S = final_state + bh * N * N;
        if (state) std::memcpy(S, state + bh * N * N, N * N * sizeof(F));
        else std::memset(S, 0, N * N * sizeof(F));
        for (int64_t t = 0; t < T; t++) {
            if (checkpoints && t % kCheckpoint == 0)
                std::memcpy(checkpoints + (bh * blocks + t / kCheckpoint) * N * N, S, N * N * sizeof(F));
            int64_t o = ((b * T + t) * H + h) * N;
            for (int64_t j = 0; j < N; j++) yt[j] = 0;
            for (int64_t i = 0; i < N; i++) {
                F ri = F(r[o + i]), ki = F(k[o + i]), wi = std::exp(F(log_w[o + i])), ui = u[h * N + i];
                for (int64_t j = 0; j < N; j++) {
                    F kv = ki * F(v[o + j]);
                    yt[j] += ri * (S[i * N + j] + ui * kv);
                    S[i * N + j] = wi * S[i * N + j] + kv;
                }
            }
            for (int64_t j = 0; j < N; j++) y[o + j] = IO(yt[j]);
        }
    }
}

template <class F, class IO, class W>
void backward(int64_t B, int64_t T, int64_t H, int64_t N, const IO* r, const IO* k, const IO* v, const W* log_w,
              const F* u, const F* checkpoints, const IO* gy, const F* gfinal, IO* gr, IO* gk, IO* gv, W* gw, F* gu,
              F* gstate) {
    int64_t blocks = (T + kCheckpoint - 1) / kCheckpoint;
    std::vector<F> states(kCheckpoint * N * N), gvt(N);
    std::memset(gu, 0, H * N * sizeof(F));
    for (int64_t bh = 0; bh < B * H; bh++) {
        int64_t b = bh / H, h = bh % H;
        F* G = gstate + bh * N * N;
        if (gfinal) std::memcpy(G, gfinal + bh * N * N, N * N * sizeof(F));
        else std::memset(G, 0, N * N * sizeof(F));
        for (int64_t c = blocks - 1; c >= 0; c--) {
            int64_t t0 = c * kCheckpoint, t1 = t0 + kCheckpoint < T ? t0 + kCheckpoint : T;
            std::memcpy(&states[0], checkpoints + (bh * blocks + c) * N * N, N * N * sizeof(F));
            for (int64_t t = t0; t + 1 < t1; t++) {
                int64_t o = ((b * T + t) * H + h) * N;
                const F* S = &states[(t - t0) * N * N];
                F* S1 = &states[(t - t0 + 1) * N * N];
                for (int64_t i = 0; i < N; i++) {
                    F ki = F(k[o + i]), wi = std::exp(F(log_w[o + i]));
                    for (int64_t j = 0; j < N; j++) S1[i * N + j] = wi * S[i * N + j] + ki * F(v[o + j]);
                }
            }
            for (int64_t t = t1 - 1; t >= t0; t--) {
                int64_t o = ((b * T + t) * H + h) * N;
                const F* S = &states[(t - t0) * N * N];
                F vg = 0, ruk = 0;
                for (int64_t j = 0; j < N; j++) {
                    vg += F(v[o + j]) * F(gy[o + j]);
                    ruk += F(r[o + j]) * u[h * N + j] * F(k[o + j]);
                }
                for (int64_t j = 0; j < N; j++) gvt[j] = ruk * F(gy[o + j]);
                for (int64_t i = 0; i < N; i++) {
                    F ri = F(r[o + i]), ki = F(k[o + i]), wi = std::exp(F(log_w[o + i])), ui = u[h * N + i];
                    F dr = ui * ki * vg, dk = ui * ri * vg, dw = 0;
                    for (int64_t j = 0; j < N; j++) {
                        F g = G[i * N + j];
                        dr += S[i * N + j] * F(gy[o + j]);
                        dk += g * F(v[o + j]);
                        dw += S[i * N + j] * g;
                        gvt[j] += ki * g;
                        G[i * N + j] = wi * g + ri * F(gy[o + j]);
                    }
                    gr[o + i] = IO(dr);
                    gk[o + i] = IO(dk);
                    gw[o + i] = W(wi * dw);
                    gu[h * N + i] += ri * ki * vg;
                }
                for (int64_t j = 0; j < N; j++) gv[o + j] = IO(gvt[j]);
            }
        }
    }
}

// dtypes: 0 float32, 1 bfloat16, 2 float64
template <class Call>
int by_dtype(int dtype, int w_dtype, Call call) {
    if (dtype == 0 && w_dtype == 0) return call(float(), float(), float()), 0;
    if (dtype == 1 && w_dtype == 0) return call(float(), bf16(), float()), 0;
    if (dtype == 1 && w_dtype == 1) return call(float(), bf16(), bf16()), 0;
    if (dtype == 2 && w_dtype == 2) return call(double(), double(), double()), 0;
    return 1;
}
}  // namespace

extern "C" int wkv6_cpu_forward(int isa, int threads, void* parallel, int dtype, int w_dtype, int64_t B, int64_t T, int64_t H, int64_t N, const void* r,
                                const void* k, const void* v, const void* log_w, const void* u, const void* state,
                                void* y, void* final_state, void* checkpoints) {
    return by_dtype(dtype, w_dtype, [&](auto f, auto io, auto w) {
        using F = decltype(f);
        using IO = decltype(io);
        using W = decltype(w);
        forward<F, IO, W>(B, T, H, N, (const IO*)r, (const IO*)k, (const IO*)v, (const W*)log_w, (const F*)u,
                          (const F*)state, (IO*)y, (F*)final_state, (F*)checkpoints);
    });
}

extern "C" int wkv6_cpu_backward(int isa, int threads, void* parallel, int dtype, int w_dtype, int64_t B, int64_t T, int64_t H, int64_t N,
                                 const void* r, const void* k, const void* v, const void* log_w, const void* u,
                                 const void* checkpoints, const void* gy, const void* gfinal, void* gr, void* gk,
                                 void* gv, void* gw, void* gu, void* gstate) {
    return by_dtype(dtype, w_dtype, [&](auto f, auto io, auto w) {
        using F = decltype(f);
        using IO = decltype(io);
        using W = decltype(w);
        backward<F, IO, W>(B, T, H, N, (const IO*)r, (const IO*)k, (const IO*)v, (const W*)log_w, (const F*)u,
                           (const F*)checkpoints, (const IO*)gy, (const F*)gfinal, (IO*)gr, (IO*)gk, (IO*)gv, (W*)gw,
                           (F*)gu, (F*)gstate);
    });
}
