// WKV6 on the CPU: the kernels, compiled once for every instruction set (WKV6_VARIANT names it).
//
//   S_t = diag(w_t) S_{t-1} + k_t^T v_t          w_t = exp(log_w_t)
//   y_t = r_t (S_{t-1} + diag(u) k_t^T v_t)
//
// Tokens go in chunks of L = 16. With S the state before a chunk, and W(s, t) the product of w over s < tau < t,
//   y_t = r_t W(-1, t) S + sum_{s<t} A_ts v_s + A_tt v_t       A_ts = sum_i r_t k_s W(s, t),  A_tt = sum_i r_t u k_t
// and backward, with G the gradient of the state after the chunk and dA_ts = gy_t . v_s,
//   dr_t = W(-1, t) S gy_t + sum_{s<t} dA_ts k_s W(s, t) + dA_tt u k_t
//   dk_s = W(s, L) G v_s   + sum_{t>s} dA_ts r_t W(s, t) + dA_ss u r_s
//   dv_s = (k_s W(s, L)) G + sum_{t>=s} A_ts gy_t
// so that nearly all the work is products of small matrices.
//
// Pairs s < t inside a chunk are taken by halving: the pairs of an upper half (t) and a lower half (s) of 16 tokens,
// then those of 8, 4 and 2. Their decay W(s, t) splits at the border between the halves into a factor of s and one of
// t, both products of w: nothing is divided, no exponent is positive, and every decay down to w = 0 is exact.
// The gradient of log_w_t is the sum of r_q k_s dA_qs W(s, q) over the pairs around t, s < t < q. At every halving it
// is a suffix sum of r dr for t in the upper half and a prefix sum of k dk for t in the lower: sums of what is wanted,
// never differences of what is not.
//
// Layout: a row of N channels is cut into nv panels of one vector (W lanes, zero padded); an array of rows is stored
// panel by panel, row by row, so that all strides are constants. np = nv * W.

#include "vectors.h"
#include "wkv6_cpu.h"

namespace wkv6 {
namespace WKV6_VARIANT {
namespace {

using namespace vectors;

constexpr int L = 16;
static_assert(kCheckpoint % L == 0, "blocks are whole chunks");
// a register tile of matrix products, in rows and vectors
constexpr int kRows = kBytes == 64 ? 8 : 4, kCols = VECTORS_32 && kBytes == 16 ? 4 : 2;

// ---- matrix products

// out (R rows, C panels) = x (L, N) b (N, C panels) + sum over first <= s < last of a[r, s] rows[s]
template <int R, int C, class F>
INLINE void product_tile(F* out, const F* x, const F* b, int64_t N, int64_t np, const F* a, int a_row, int a_col,
                         const F* rows, int first, int last) {
    constexpr int W = Lanes<F>::W;
    using V = Vec<F>;
    V sum[R][C] = {};
    for (int64_t k0 = 0; k0 < N; k0 += W, x += L * W) {
        int64_t n = least(W, N - k0);
        for (int64_t k = 0; k < n; k++, b += W) {
            V y[C];
            UNROLL for (int c = 0; c < C; c++) y[c] = at(b + c * np * W);
            UNROLL for (int r = 0; r < R; r++) {
                V xr = all(x[r * W + k]);
                UNROLL for (int c = 0; c < C; c++) sum[r][c] += xr * y[c];
            }
        }
    }
    for (int s = first; s < last; s++) {
        V y[C];
        UNROLL for (int c = 0; c < C; c++) y[c] = at(rows + (c * L + s) * W);
        UNROLL for (int r = 0; r < R; r++) {
            V ar = all(a[r * a_row + s * a_col]);
            UNROLL for (int c = 0; c < C; c++) sum[r][c] += ar * y[c];
        }
    }
    UNROLL for (int r = 0; r < R; r++) UNROLL for (int c = 0; c < C; c++) at(out + (c * L + r) * W) = sum[r][c];
}

enum Also { kNothing, kLower, kUpper };  // out = x b, + tril(a) rows, + tril(a)^T rows

// C panels of a chunk's rows times a matrix.
template <int C, class F>
void product(F* out, const F* x, const F* b, int64_t N, int64_t np, Also also = kNothing, const F* a = nullptr,
             const F* rows = nullptr) {
    constexpr int W = Lanes<F>::W, R = kRows;
    for (int r = 0; r < L; r += R) {
        if (also == kUpper) product_tile<R, C>(out + r * W, x + r * W, b, N, np, a + r, 1, L, rows, r, L);
        else if (also == kLower) product_tile<R, C>(out + r * W, x + r * W, b, N, np, a + r * L, L, 1, rows, 0, r + R);
        else product_tile<R, C>(out + r * W, x + r * W, b, N, np, x, 0, 0, x, 0, 0);
    }
}

// to (R rows, C panels) = decay from + sum over the chunk's t of x[t, row] y[t]
template <int R, int C, bool kDecayRows, class F>
INLINE void update_tile(F* to, const F* from, const F* decay, const F* x, const F* y, int64_t np) {
    constexpr int W = Lanes<F>::W;
    using V = Vec<F>;
    V sum[R][C];
    UNROLL for (int r = 0; r < R; r++) UNROLL for (int c = 0; c < C; c++)
        sum[r][c] = at(from + (c * np + r) * W) * (kDecayRows ? all(decay[r]) : at(decay + c * W));
    for (int t = 0; t < L; t++) {
        V yt[C];
        UNROLL for (int c = 0; c < C; c++) yt[c] = at(y + (c * L + t) * W);
        UNROLL for (int r = 0; r < R; r++) {
            V xr = all(x[t * W + r]);
            UNROLL for (int c = 0; c < C; c++) sum[r][c] += xr * yt[c];
        }
    }
    UNROLL for (int r = 0; r < R; r++) UNROLL for (int c = 0; c < C; c++) at(to + (c * np + r) * W) = sum[r][c];
}

// C panels of to = decay from + x^T y, the decay of rows (keys x, values y) or of columns (values x, keys y)
template <int C, bool kDecayRows, class F>
void update(F* to, const F* from, const F* decay, const F* x, const F* y, int64_t np) {
    constexpr int W = Lanes<F>::W, R = kRows < W ? kRows : W;
    for (int64_t i = 0; i < np; i += R)
        update_tile<R, C, kDecayRows>(to + i * W, from + i * W, decay + (kDecayRows ? i : 0),
                                      x + i / W * L * W + i % W, y, np);
}

template <int n> struct Number { static constexpr int value = n; };

// step(c, Number<C>) for panels c .. c + C: kCols at a time, then one by one.
template <class Step> INLINE void by_columns(int64_t nv, const Step& step) {
    int64_t c = 0;
    for (; c + kCols <= nv; c += kCols) step(c, Number<kCols>());
    for (; c < nv; c++) step(c, Number<1>());
}

// out[t, s] = x[t] . y[s] for `n` rows of x and of y, by register tiles of W dot products
template <class F> INLINE void dots(F* out, const F* x, const F* y, int n, int64_t nv) {
    constexpr int W = Lanes<F>::W, S = W >= 16 ? 4 : W >= 4 ? 2 : 1, Q = W / S;
    for (int q = 0; q < n; q += Q)
        for (int s = 0; s < n; s += S) {
            Vec<F> sum[W] = {};
            for (int64_t c = 0; c < nv; c++)
                UNROLL for (int i = 0; i < Q; i++) UNROLL for (int j = 0; j < S; j++)
                    sum[i * S + j] += at(x + (c * L + q + i) * W) * at(y + (c * L + s + j) * W);
            alignas(64) F result[W];
            at(result) = sums<F>(sum);
            UNROLL for (int i = 0; i < Q; i++) memcpy(out + (q + i) * L + s, result + i * S, S * sizeof(F));
        }
}

// out[m] = sum over panels c of term(m, c), for 16 values of m
template <class F, class Term> INLINE void sixteen(F* out, int64_t nv, const Term& term) {
    constexpr int W = Lanes<F>::W;
    for (int g = 0; g < 16; g += W) {
        Vec<F> sum[W] = {};
        for (int64_t c = 0; c < nv; c++) UNROLL for (int m = 0; m < W; m++) sum[m] += term(g + m, c);
        at(out + g) = sums<F>(sum);
    }
}

// ---- one chunk

// Buffers of one chunk, each of L rows in panels.
template <class F> struct Chunk {
    static constexpr int W = Lanes<F>::W;
    using V = Vec<F>;
    int64_t N, nv;
    F *r, *k, *v, *w;             // w: log_w first
    F *rt, *kh;                   // r_t W(-1, t), k_s W(s, L)
    F *x;                         // of 2n tokens, in the lower half k_s, in the upper r_t, decayed to their border
    F *gy, *dr, *dk, *dv;         // (backward only)
    F *decay;                     // the decay of the chunk, one row
    F *a, *da;                    // A and dA, (L, L)

    // One vector more than L rows: buffers a power of two apart would share the same few sets of the cache.
    static int64_t size(int64_t nv) { return (nv * L + 1) * W; }
    static int64_t floats(int64_t nv, bool backward) {
        return (backward ? 11 : 7) * size(nv) + nv * W + (backward ? 2 : 1) * L * L;
    }
    Chunk(F* p, int64_t N, int64_t nv, bool backward) : N(N), nv(nv) {
        for (F** x : {&r, &k, &v, &w, &rt, &kh, &x}) *x = p, p += size(nv);
        if (backward)
            for (F** x : {&gy, &dr, &dk, &dv}) *x = p, p += size(nv);
        decay = p, p += nv * W;
        a = p, p += L * L;
        da = p;
        memset(a, 0, L * L * sizeof(F));  // above the diagonal it stays 0
    }

    // Takes k, v, w and decay to a place of their own.
    void use(F* slot) { k = slot, v = k + size(nv), w = v + size(nv), decay = w + size(nv); }

    // f = the decays from n tokens before and after each border to it.
    template <int n> static INLINE void to_borders(V* f, const V* w) {
        UNROLL for (int mid = n; mid < L; mid += 2 * n) {
            f[mid - 1] = f[mid] = all(F(1));
            UNROLL for (int i = 1; i < n; i++) {
                f[mid + i] = f[mid + i - 1] * w[mid + i - 1];
                f[mid - 1 - i] = f[mid - i] * w[mid - i];
            }
        }
    }
    // f[t] = W(-1, t), f[s] = W(s, L)
    static INLINE void from_start(V* f, const V* w) {
        f[0] = all(F(1));
        UNROLL for (int t = 1; t < L; t++) f[t] = f[t - 1] * w[t - 1];
    }
    static INLINE void to_end(V* f, const V* w) {
        f[L - 1] = all(F(1));
        UNROLL for (int t = L - 2; t >= 0; t--) f[t] = f[t + 1] * w[t + 1];
    }

    // w and the chunk's decay from log_w in w. Adds the sum of log_w to log_sum, if there is one.
    void exponentials(F* log_sum = nullptr) {
        for (int64_t c = 0; c < nv; c++) {
            F* wc = w + c * L * W;
            V sum{};
            UNROLL for (int t = 0; t < L; t++) sum += at(wc + t * W);
            // one rounding for the whole chunk: that of w, L times over, would add up in slow channels
            at(decay + c * W) = exponential(sum);
            if (log_sum) at(log_sum + c * W) += sum;
            UNROLL for (int t = 0; t < L; t++) at(wc + t * W) = exponential(at(wc + t * W));
        }
    }

    void decay_keys() {
        for (int64_t o = 0; o < nv * L * W; o += L * W) {
            V d = all(F(1));
            UNROLL for (int t = L - 1; t >= 0; t--) {
                at(kh + o + t * W) = at(k + o + t * W) * d;
                d *= at(w + o + t * W);
            }
        }
    }
    void decay_queries() {
        for (int64_t o = 0; o < nv * L * W; o += L * W) {
            V d = all(F(1));
            UNROLL for (int t = 0; t < L; t++) {
                at(rt + o + t * W) = at(r + o + t * W) * d;
                d *= at(w + o + t * W);
            }
        }
    }
    template <int n> INLINE void decay_to_borders() {
        for (int64_t o = 0; o < nv * L * W; o += L * W) {
            const F *rc = r + o, *kc = k + o, *wc = w + o;
            F* xc = x + o;
            V e[L], f[L];
            UNROLL for (int t = 0; t < L; t++) e[t] = at(wc + t * W);
            to_borders<n>(f, e);
            UNROLL for (int t = 0; t < L; t++) at(xc + t * W) = at((t & n ? rc : kc) + t * W) * f[t];
        }
    }

    void scores(const F* u) {
        alignas(64) F m[16];
        decay_to_borders<8>();
        dots(a + 8 * L, x + 8 * W, x, 8, nv);
        decay_to_borders<4>();
        dots(a + 4 * L, x + 4 * W, x, 4, nv);
        dots(a + 12 * L + 8, x + 12 * W, x + 8 * W, 4, nv);
        decay_to_borders<2>();
        // (2, 0), (2, 1), (3, 0), (3, 1), (6, 4) ...
        sixteen(m, nv, [&](int i, int64_t c) __attribute__((always_inline)) {
            int q = i / 4 * 4 + 2 + i / 2 % 2, s = i / 4 * 4 + i % 2;
            return at(x + (c * L + q) * W) * at(x + (c * L + s) * W);
        });
        for (int i = 0; i < 16; i++) a[(i / 4 * 4 + 2 + i / 2 % 2) * L + i / 4 * 4 + i % 2] = m[i];
        // (1, 0), (3, 2) ...
        sixteen(m, nv, [&](int i, int64_t c) __attribute__((always_inline)) {
            if (i >= 8) return V{};
            return at(r + (c * L + 2 * i + 1) * W) * at(k + (c * L + 2 * i) * W);
        });
        for (int i = 0; i < 8; i++) a[(2 * i + 1) * L + 2 * i] = m[i];
        sixteen(m, nv, [&](int i, int64_t c) __attribute__((always_inline)) {
            return at(r + (c * L + i) * W) * at(u + c * W) * at(k + (c * L + i) * W);
        });
        for (int i = 0; i < 16; i++) a[i * L + i] = m[i];
    }

    void score_gradients() {
        dots(da, gy, v, 8, nv);
        dots(da + 8 * L, gy + 8 * W, v, 8, nv);
        dots(da + 8 * L + 8, gy + 8 * W, v + 8 * W, 8, nv);
    }

    // Adds to gr, gk and gw what the pairs of n tokens above and n below each border give, in one panel.
    template <int n> INLINE void pair_gradients(V* gr, V* gk, V* gw, const V* e, const F* r, const F* k) {
        V f[L];
        to_borders<n>(f, e);
        UNROLL for (int mid = n; mid < L; mid += 2 * n) {
            V up[n] = {}, low[n] = {}, up_run{}, low_run{};
            UNROLL for (int i = 0; i < n; i++) {
                int s = mid - n + i, q = mid + i;
                V x_low = at(k + s * W) * f[s], x_up = at(r + q * W) * f[q];
                UNROLL for (int j = 0; j < n; j++) {
                    up[j] += all(da[(mid + j) * L + s]) * x_low;
                    low[j] += all(da[q * L + mid - n + j]) * x_up;
                }
            }
            UNROLL for (int i = 0; i < n; i++) {
                int q = mid + n - 1 - i, s = mid - n + i;
                V d_up = up[n - 1 - i] * f[q], d_low = low[i] * f[s];
                gr[q] += d_up;
                gk[s] += d_low;
                gw[q] += up_run;
                gw[s] += low_run;
                up_run += at(r + q * W) * d_up;
                low_run += at(k + s * W) * d_low;
            }
        }
    }

    // sum over rows of S * G, in one panel
    static INLINE V pass_through(const F* st, const F* gt, int64_t np) {
        constexpr int A = W < 4 ? W : 4;
        V sum[A] = {}, total{};
        for (int64_t j = 0; j < np; j += A)
            UNROLL for (int a = 0; a < A; a++) sum[a] += at(st + (j + a) * W) * at(gt + (j + a) * W);
        UNROLL for (int a = 0; a < A; a++) total += sum[a];
        return total;
    }

    // In panel c, dr = S gy and dk = G v become the gradients of r and k, w becomes that of log_w; adds to gu.
    // st, gt: the panel of the transposed state before the chunk, and of the gradient of the state after it.
    void finish(int64_t c, const F* st, const F* gt, const F* u, F* gu) {
        int64_t o = c * L * W;
        const F *r = this->r + o, *k = this->k + o;
        F *dr = this->dr + o, *dk = this->dk + o, *w = this->w + o;
        V e[L], before[L], after[L], gr[L], gk[L], gw[L];
        UNROLL for (int t = 0; t < L; t++) e[t] = at(w + t * W);
        from_start(before, e);
        to_end(after, e);
        V r_run = pass_through(st, gt, nv * W) * at(decay + c * W), k_run{};
        UNROLL for (int t = L - 1, s = 0; t >= 0; t--, s++) {
            gr[t] = at(dr + t * W) * before[t];
            gk[s] = at(dk + s * W) * after[s];
            gw[t] = t > s ? r_run : gw[t] + r_run;
            gw[s] = t > s ? k_run : gw[s] + k_run;
            r_run += at(r + t * W) * gr[t];
            k_run += at(k + s * W) * gk[s];
        }
        pair_gradients<8>(gr, gk, gw, e, r, k);
        pair_gradients<4>(gr, gk, gw, e, r, k);
        pair_gradients<2>(gr, gk, gw, e, r, k);
        UNROLL for (int s = 0; s < L; s += 2) {
            V d = all(da[(s + 1) * L + s]);
            gr[s + 1] += d * at(k + s * W);
            gk[s] += d * at(r + (s + 1) * W);
        }
        V uc = at(u + c * W), sum = at(gu + c * W);
        UNROLL for (int t = 0; t < L; t++) {
            V d = all(da[t * L + t]), dkt = d * at(k + t * W);
            at(dr + t * W) = gr[t] + uc * dkt;
            at(dk + t * W) = gk[t] + uc * (d * at(r + t * W));
            at(w + t * W) = gw[t];
            sum += at(r + t * W) * dkt;
        }
        at(gu + c * W) = sum;
    }
};

// ---- heads

// Heads h0 <= h < h1 of batch row b. Tokens go in blocks, and all heads do a block before the next one: they share the
// pages of memory that their rows lie on, and looking up pages is a good part of the cost of reaching memory.
template <class F> struct Heads {
    static constexpr int W = Lanes<F>::W;
    const Problem& p;
    int64_t b, h0, h1, N, nv, np, square, stride, blocks;

    Heads(const Problem& p, int64_t b, int64_t h0, int64_t h1)
        : p(p), b(b), h0(h0), h1(h1), N(p.N), nv((p.N + W - 1) / W), np(nv * W), square(np * np), stride(p.H * p.N),
          blocks((p.T + kCheckpoint - 1) / kCheckpoint) {}

    int64_t offset(int64_t h, int64_t t) const { return (b * p.T + t) * stride + h * N; }
    // The chunk of head h at t, and how many tokens it has (0: there is none).
    struct Place { int64_t h, t, n; };
    static Place place(int64_t h, int64_t t, int64_t end) { return {h, t, end > t ? least(L, end - t) : 0}; }

    void load(F* to, const void* from, int type, Place at) const {
        Element<F>::as(type, [&](auto element) __attribute__((always_inline)) {
            load_as(to, static_cast<const decltype(element)*>(from) + offset(at.h, at.t), at.n, L, stride, N);
        });
    }
    void save(void* to, int type, const F* from, Place at) const {
        Element<F>::as(type, [&](auto element) __attribute__((always_inline)) {
            store_as(static_cast<decltype(element)*>(to) + offset(at.h, at.t), from, at.n, L, stride, N,
                     past_caches(to, type));
        });
    }
    // Whether results go past the caches: large ones do, if their rows are whole vectors.
    bool past_caches(const void* to, int type) const {
        int64_t size = type == kBFloat16 ? 2 : sizeof(F), vector = W * size;
        return p.B * p.T * stride * size >= 1 << 20 && N % W == 0 && reinterpret_cast<uintptr_t>(to) % vector == 0;
    }
    // Asks for a chunk's rows ahead of their use, between the steps of the chunk before: rows are `stride` apart, which
    // is more than a processor foresees.
    template <bool kWrite = false> INLINE void fetch(const void* rows, int type, Place at) const {
        if (kWrite && past_caches(rows, type)) return;
        int64_t size = type == kBFloat16 ? 2 : sizeof(F);
        for (int64_t i = 0; i < at.n; i++) {
            const char* row = static_cast<const char*>(rows) + offset(at.h, at.t + i) * size;
            for (int64_t j = 0; j < N * size; j += 64) __builtin_prefetch(row + j, kWrite, 3);
        }
    }
    void load_state(F* to, const F* from) const { load_as(to, from, N, np, N, N); }
    void save_state(F* to, const F* from) const { store_as(to, from, N, np, N, N); }
    F* checkpoint(int64_t h, int64_t block) const {
        return static_cast<F*>(p.checkpoints) + (((b * p.H + h) * blocks) + block) * N * N;
    }

    // The tokens t0 <= t < t1 from the states `from` (null for zeros), (h1 - h0, N, N). The states after go to `to`.
    void forward(int64_t t0, int64_t t1, const F* from, F* to) const {
        int64_t size = Chunk<F>::floats(nv, false), n = h1 - h0;
        Buffer<F> memory(size + n * (square + np));
        Chunk<F> c(memory.p, N, nv, false);
        F *states = memory.p + size, *us = states + n * square;
        for (int64_t i = 0; i < n; i++) {
            if (from) load_state(states + i * square, from + i * N * N);
            else memset(states + i * square, 0, square * sizeof(F));
            load_as(us + i * np, static_cast<const F*>(p.u) + (h0 + i) * N, 1, 1, N, N);
        }
        for (int64_t start = t0; start < t1; start += kCheckpoint)
            for (int64_t h = h0; h < h1; h++) {
                F *state = states + (h - h0) * square, *u = us + (h - h0) * np;
                if (p.checkpoints) save_state(checkpoint(h, start / kCheckpoint), state);
                int64_t end = least(start + kCheckpoint, t1);
                for (int64_t t = start; t < end; t += L) {
                    Place next = t + L < end  ? place(h, t + L, t1)
                                 : h + 1 < h1 ? place(h + 1, start, t1)
                                              : place(h0, end, t1);
                    forward_chunk(c, place(h, t, end), next, state, u);
                }
            }
        if (to) for (int64_t i = 0; i < n; i++) save_state(to + i * N * N, states + i * square);
    }

    void forward_chunk(Chunk<F>& c, Place at, Place next, F* state, const F* u) const {
        load(c.r, p.r, p.type, at);
        load(c.k, p.k, p.type, at);
        load(c.v, p.v, p.type, at);
        load(c.w, p.log_w, p.w_type, at);
        fetch(p.r, p.type, next);
        fetch<true>(p.y, p.type, at);
        c.exponentials();
        fetch(p.k, p.type, next);
        c.decay_queries();
        c.decay_keys();
        c.scores(u);
        fetch(p.v, p.type, next);
        by_columns(nv, [&](int64_t j, auto n) __attribute__((always_inline)) {
            F *s = state + j * np * W, *y = c.r + j * L * W, *v = c.v + j * L * W;
            product<n.value>(y, c.rt, s, N, np, kLower, c.a, v);
            update<n.value, true>(s, s, c.decay, c.kh, v, np);
        });
        fetch(p.log_w, p.w_type, next);
        save(p.y, p.type, c.r, at);
    }

    // What the tokens add to a state, and (added to log_decay, np zeros) the logarithm of what they leave of it.
    void added(int64_t t0, int64_t t1, F* to, F* log_decay) const {
        int64_t size = Chunk<F>::floats(nv, false);
        Buffer<F> memory(size + square);
        Chunk<F> c(memory.p, N, nv, false);
        F* state = memory.p + size;
        memset(state, 0, square * sizeof(F));
        for (int64_t t = t0; t < t1; t += L) {
            load(c.k, p.k, p.type, place(h0, t, t1));
            load(c.v, p.v, p.type, place(h0, t, t1));
            load(c.w, p.log_w, p.w_type, place(h0, t, t1));
            c.exponentials(log_decay);
            c.decay_keys();
            by_columns(nv, [&](int64_t j, auto n) __attribute__((always_inline)) {
                F* s = state + j * np * W;
                update<n.value, true>(s, s, c.decay, c.kh, c.v + j * L * W, np);
            });
        }
        save_state(to, state);
    }

    // The same for the gradient of the state, going back.
    void added_gradient(int64_t t0, int64_t t1, F* to, F* log_decay) const {
        int64_t size = Chunk<F>::floats(nv, true);
        Buffer<F> memory(size + 2 * square);
        Chunk<F> c(memory.p, N, nv, true);
        F *gt = memory.p + size, *g = gt + square;
        memset(gt, 0, square * sizeof(F));
        for (int64_t t = t0 + (t1 - t0 - 1) / L * L; t >= t0; t -= L) {
            load(c.r, p.r, p.type, place(h0, t, t1));
            load(c.gy, p.gy, p.type, place(h0, t, t1));
            load(c.w, p.log_w, p.w_type, place(h0, t, t1));
            c.exponentials(log_decay);
            c.decay_queries();
            by_columns(nv, [&](int64_t i, auto n) __attribute__((always_inline)) {
                F* s = gt + i * np * W;
                update<n.value, false>(s, s, c.decay + i * W, c.gy, c.rt + i * L * W, np);
            });
        }
        transpose(g, gt, nv);
        save_state(to, g);
    }

    // The same tokens' gradients, from those of the states after them, `from` (null for zeros). Those of the states
    // before them go to `to`; gu is (h1 - h0, np) zeros.
    void backward(int64_t t0, int64_t t1, const F* from, F* to, F* gu) const {
        int64_t size = Chunk<F>::floats(nv, true), rows = Chunk<F>::size(nv), slot = 3 * rows + np, n = h1 - h0;
        Buffer<F> memory(size + kCheckpoint / L * (slot + square) + square + n * (square + np));
        Chunk<F> c(memory.p, N, nv, true);
        F *slots = memory.p + size;  // k, v, w and decay of a block's chunks
        F *states = slots + kCheckpoint / L * slot, *g = states + kCheckpoint / L * square, *gts = g + square;
        F *us = gts + n * square;
        for (int64_t i = 0; i < n; i++) {
            if (from) {
                load_state(g, from + i * N * N);
                transpose(gts + i * square, g, nv);
            } else memset(gts + i * square, 0, square * sizeof(F));
            load_as(us + i * np, static_cast<const F*>(p.u) + (h0 + i) * N, 1, 1, N, N);
        }
        for (int64_t start = (t1 - 1) / kCheckpoint * kCheckpoint; start >= t0; start -= kCheckpoint)
            for (int64_t h = h0; h < h1; h++) {
                int64_t end = least(start + kCheckpoint, t1), i = h - h0;
                Place after = h + 1 < h1   ? place(h + 1, start, end)
                              : start > t0 ? place(h0, start - kCheckpoint, start)
                                           : place(h0, 0, 0);
                load_state(g, checkpoint(h, start / kCheckpoint));
                transpose(states, g, nv);
                int64_t last = (end - start - 1) / L;
                for (int64_t s = 0; s <= last; s++) {
                    c.use(slots + s * slot);
                    next_state(c, place(h, start + s * L, end), s < last ? place(h, start + (s + 1) * L, end) : after,
                               s < last ? states + s * square : nullptr);
                }
                fetch(p.r, p.type, place(h, start + last * L, end));
                fetch(p.gy, p.type, place(h, start + last * L, end));
                for (int64_t s = last; s >= 0; s--) {
                    c.use(slots + s * slot);
                    backward_chunk(c, place(h, start + s * L, end), place(h, start + (s - 1) * L, s > 0 ? end : 0),
                                   states + s * square, g, gts + i * square, us + i * np, gu + i * np);
                }
            }
        if (to) for (int64_t i = 0; i < n; i++) {
            transpose(g, gts + i * square, nv);
            save_state(to + i * N * N, g);
        }
    }

    // From the transposed state before a chunk that after it, behind it in memory. Leaves k, v, w and decay in c.
    void next_state(Chunk<F>& c, Place at, Place next, F* state) const {
        load(c.k, p.k, p.type, at);
        load(c.v, p.v, p.type, at);
        load(c.w, p.log_w, p.w_type, at);
        fetch(p.k, p.type, next);
        fetch(p.v, p.type, next);
        c.exponentials();
        fetch(p.log_w, p.w_type, next);
        if (!state) return;
        c.decay_keys();
        by_columns(nv, [&](int64_t i, auto n) __attribute__((always_inline)) {
            F* s = state + i * np * W;
            update<n.value, false>(s + square, s, c.decay + i * W, c.v, c.kh + i * L * W, np);
        });
    }

    // c has k, v, w and decay. state: transposed, before the chunk; gt: its gradient, after the chunk, and then before
    // it; g: room for one.
    void backward_chunk(Chunk<F>& c, Place at, Place next, const F* state, F* g, F* gt, const F* u, F* gu) const {
        load(c.r, p.r, p.type, at);
        load(c.gy, p.gy, p.type, at);
        fetch(p.r, p.type, next);
        c.decay_queries();
        c.decay_keys();
        fetch<true>(p.gv, p.type, at);
        c.scores(u);
        fetch(p.gy, p.type, next);
        c.score_gradients();
        fetch<true>(p.gr, p.type, at);
        by_columns(nv, [&](int64_t j, auto n) __attribute__((always_inline)) {
            transpose(g, gt, nv, j, j + n.value);
            product<n.value>(c.dv + j * L * W, c.kh, g, N, np, kUpper, c.a, c.gy + j * L * W);
        });
        save(p.gv, p.type, c.dv, at);
        fetch<true>(p.gk, p.type, at);
        by_columns(nv, [&](int64_t i, auto n) __attribute__((always_inline)) {
            int64_t o = i * L * W, m = i * np * W;
            product<n.value>(c.dr + o, c.gy, state + m, N, np);
            product<n.value>(c.dk + o, c.v, gt + m, N, np);
            for (int q = 0; q < n.value; q++) c.finish(i + q, state + m + q * np * W, gt + m + q * np * W, u, gu);
            update<n.value, false>(gt + m, gt + m, c.decay + i * W, c.gy, c.rt + o, np);
            if (i == 0) fetch<true>(p.gw, p.w_type, at);
        });
        save(p.gr, p.type, c.dr, at);
        save(p.gk, p.type, c.dk, at);
        save(p.gw, p.w_type, c.w, at);
    }
};

// A few tokens (T < 8), one after the other, on the states as they lie in memory: a chunk would be mostly padding.
template <class F> struct Steps {
    static constexpr int W = Lanes<F>::W;
    using V = Vec<F>;
    const Problem& p;
    int64_t N, nv, np;
    Buffer<F> memory;
    F *r, *k, *v, *w, *u, *y;

    explicit Steps(const Problem& p) : p(p), N(p.N), nv((p.N + W - 1) / W), np(nv * W), memory(6 * np) {
        r = memory.p, k = r + np, v = k + np, w = v + np, u = w + np, y = u + np;
    }

    void forward(int64_t head) {
        int64_t b = head / p.H, h = head % p.H, square = N * N;
        const F* from = p.state ? static_cast<const F*>(p.state) + head * square : nullptr;
        F* to = static_cast<F*>(p.final_state) + head * square;
        if (p.checkpoints) {  // T < kCheckpoint: only the initial state
            F* first = static_cast<F*>(p.checkpoints) + head * square;
            if (from) memcpy(first, from, square * sizeof(F));
            else memset(first, 0, square * sizeof(F));
        }
        if (!from) memset(to, 0, square * sizeof(F)), from = to;
        load_as(u, static_cast<const F*>(p.u) + h * N, 1, 1, N, N);
        for (int64_t t = 0; t < p.T; t++, from = to) {
            int64_t first = ((b * p.T + t) * p.H + h) * N;
            auto read = [&](F* to, const void* tensor, int type) {
                Element<F>::as(type, [&](auto element) __attribute__((always_inline)) {
                    load_as(to, static_cast<const decltype(element)*>(tensor) + first, 1, 1, N, N);
                });
            };
            read(r, p.r, p.type);
            read(k, p.k, p.type);
            read(v, p.v, p.type);
            read(w, p.log_w, p.w_type);
            step(from, to);
            Element<F>::as(p.type, [&](auto element) __attribute__((always_inline)) {
                store_as(static_cast<decltype(element)*>(p.y) + first, y, 1, 1, N, N);
            });
        }
    }

    void step(const F* from, F* to) {
        V sum{};
        for (int64_t i = 0; i < np; i += W) {
            at(w + i) = exponential(at(w + i));
            sum += at(r + i) * at(u + i) * at(k + i);
        }
        F bonus = 0;
        for (int l = 0; l < W; l++) bonus += sum[l];
        int64_t c = 0;
        for (; c + 4 * W <= N; c += 4 * W) columns<4>(c, bonus, from, to);
        for (; c + W <= N; c += W) columns<1>(c, bonus, from, to);
        if (c == N) return;
        V yc = all(bonus) * at(v + c);
        for (int64_t i = 0; i < N; i++) {
            V s = load_some<F>(from + i * N + c, N - c);
            yc += all(r[i]) * s;
            store_some<F>(to + i * N + c, N - c, all(w[i]) * s + all(k[i]) * at(v + c));
        }
        at(y + c) = yc;
    }

    template <int C> INLINE void columns(int64_t c, F bonus, const F* from, F* to) {
        V sum[C], vc[C];
        UNROLL for (int q = 0; q < C; q++) vc[q] = at(v + c + q * W), sum[q] = all(bonus) * vc[q];
        for (int64_t i = 0; i < N; i++) {
            V ri = all(r[i]), ki = all(k[i]), wi = all(w[i]);
            UNROLL for (int q = 0; q < C; q++) {
                V s = load(from + i * N + c + q * W);
                sum[q] += ri * s;
                store(to + i * N + c + q * W, wi * s + ki * vc[q]);
            }
        }
        UNROLL for (int q = 0; q < C; q++) at(y + c + q * W) = sum[q];
    }
};

// ---- tasks

template <class F> INLINE const F* row(const void* p, int64_t i, int64_t size) {
    return p ? static_cast<const F*>(p) + i * size : nullptr;
}
template <class F> INLINE F* row(void* p, int64_t i, int64_t size) { return static_cast<F*>(p) + i * size; }

// How one call is cut into tasks: the heads of a batch row into `groups`; where there are fewer heads than threads,
// the tokens into `segments` instead, of whole blocks.
struct Cut {
    const Problem& p;
    int64_t groups, segments, blocks = (p.T + kCheckpoint - 1) / kCheckpoint;

    Cut(const Problem& p, int threads) : p(p) {
        int64_t few = (p.H + 7) / 8, enough = (threads + p.B - 1) / p.B;
        groups = least(few > enough ? few : enough, p.H);
        int64_t heads = p.B * p.H;
        segments = heads < threads ? least((threads + heads - 1) / heads, blocks) : 1;
    }
    int64_t tasks() const { return p.B * groups; }
    int64_t batch(int64_t task) const { return task / groups; }
    int64_t head(int64_t task) const { return task % groups * p.H / groups; }
    int64_t head_end(int64_t task) const { return (task % groups + 1) * p.H / groups; }
    int64_t token(int64_t segment) const { return least(segment * blocks / segments * kCheckpoint, p.T); }
};

// The state at each segment's start (or, going back, its gradient at each segment's end): first what each segment adds
// by itself, all at once, then one after the other. Segment 0 is the first one on the way.
template <class F, class Added>
void carry(F* states, const F* first, const Cut& cut, const Threads& threads, const Added& added) {
    const Problem& p = cut.p;
    constexpr int W = Lanes<F>::W;
    int64_t n = cut.segments, heads = p.B * p.H, square = p.N * p.N, np = (p.N + W - 1) / W * W;
    Buffer<F> decays(heads * n * np);
    memset(decays.p, 0, heads * n * np * sizeof(F));
    threads.each(heads * (n - 1), [&](int64_t i) {
        int64_t head = i / (n - 1), segment = i % (n - 1), at = head * n + segment;
        added(head, segment, states + (at + 1) * square, decays.p + at * np);
    });
    threads.each(heads, [&](int64_t head) {
        F* state = states + head * n * square;
        if (first) memcpy(state, first + head * square, square * sizeof(F));
        else memset(state, 0, square * sizeof(F));
        for (int64_t segment = 0; segment + 1 < n; segment++, state += square)
            for (int64_t i = 0; i < p.N; i++) {
                F decay = ::exp(decays.p[(head * n + segment) * np + i]);
                for (int64_t j = i * p.N; j < (i + 1) * p.N; j++) state[square + j] += decay * state[j];
            }
    });
}

template <class F> void forward_as(const Problem& p, const Threads& threads) {
    int64_t square = p.N * p.N, heads = p.B * p.H;
    if (p.T < 8) {
        // starting threads takes as long as a quarter of a million elements of the state
        int64_t most = 1 + heads * square * p.T / (1 << 18), tasks = least(least(threads.count, most), heads);
        return threads.each(tasks, [&](int64_t task) {
            Steps<F> steps(p);
            for (int64_t h = task * heads / tasks; h < (task + 1) * heads / tasks; h++) steps.forward(h);
        });
    }
    Cut cut(p, threads.count);
    int64_t n = cut.segments;
    if (n == 1)
        return threads.each(cut.tasks(), [&](int64_t task) {
            int64_t b = cut.batch(task), h = cut.head(task), at = b * p.H + h;
            Heads<F>(p, b, h, cut.head_end(task))
                .forward(0, p.T, row<F>(p.state, at, square), row<F>(p.final_state, at, square));
        });
    Buffer<F> starts(heads * n * square);
    carry(starts.p, row<F>(p.state, 0, 0), cut, threads, [&](int64_t head, int64_t segment, F* to, F* log_decay) {
        Heads<F>(p, head / p.H, head % p.H, head % p.H + 1)
            .added(cut.token(segment), cut.token(segment + 1), to, log_decay);
    });
    threads.each(heads * n, [&](int64_t i) {
        int64_t head = i / n, segment = i % n;
        F* end = segment == n - 1 ? row<F>(p.final_state, head, square) : nullptr;
        Heads<F>(p, head / p.H, head % p.H, head % p.H + 1)
            .forward(cut.token(segment), cut.token(segment + 1), starts.p + i * square, end);
    });
}

template <class F> void backward_as(const Problem& p, const Threads& threads) {
    Cut cut(p, threads.count);
    constexpr int W = Lanes<F>::W;
    int64_t np = (p.N + W - 1) / W * W, square = p.N * p.N, n = cut.segments, heads = p.B * p.H;
    Buffer<F> gu(heads * n * np);
    memset(gu.p, 0, heads * n * np * sizeof(F));
    if (n == 1) {
        threads.each(cut.tasks(), [&](int64_t task) {
            int64_t b = cut.batch(task), h = cut.head(task), at = b * p.H + h;
            Heads<F>(p, b, h, cut.head_end(task))
                .backward(0, p.T, row<F>(p.gfinal, at, square), row<F>(p.gstate, at, square), gu.p + at * np);
        });
    } else {
        Buffer<F> ends(heads * n * square);
        carry(ends.p, row<F>(p.gfinal, 0, 0), cut, threads, [&](int64_t head, int64_t segment, F* to, F* log_decay) {
            Heads<F>(p, head / p.H, head % p.H, head % p.H + 1)
                .added_gradient(cut.token(n - 1 - segment), cut.token(n - segment), to, log_decay);
        });
        threads.each(heads * n, [&](int64_t i) {
            int64_t head = i / n, segment = n - 1 - i % n;
            F* start = segment == 0 ? row<F>(p.gstate, head, square) : nullptr;
            Heads<F>(p, head / p.H, head % p.H, head % p.H + 1)
                .backward(cut.token(segment), cut.token(segment + 1), ends.p + i * square, start, gu.p + i * np);
        });
    }
    F* out = static_cast<F*>(p.gu);
    memset(out, 0, p.H * p.N * sizeof(F));
    for (int64_t at = 0; at < heads * n; at++)
        for (int64_t i = 0; i < p.N; i++) out[at / n % p.H * p.N + i] += gu.p[at * np + i];
}

}  // namespace

void forward(const Problem& p, const Threads& threads) {
    if (p.type == kFloat64) forward_as<double>(p, threads);
    else forward_as<float>(p, threads);
}
void backward(const Problem& p, const Threads& threads) {
    if (p.type == kFloat64) backward_as<double>(p, threads);
    else backward_as<float>(p, threads);
}

}  // namespace WKV6_VARIANT
}  // namespace wkv6
