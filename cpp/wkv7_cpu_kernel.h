// WKV7 on the CPU: the kernels, compiled once for every instruction set (WKV7_VARIANT names it).
//
//   S_t = S_{t-1} diag(w_t) + (S_{t-1} a_t) b_t^T + v_t k_t^T        w_t = exp(log_w_t)
//   y_t = S_t r_t
//
// Tokens go in chunks of L = 16. With c the sum of log_w from the chunk's start to a token, e that to the token before it, S the
// state before the chunk and D = exp(c_L), the decay of the whole chunk, every token has two queries, two keys and two values:
//   queries  Q = [a exp(e); r exp(c)]      keys  K = [k exp(-c); b exp(-c)]      values  V = [v; u],  u_t = S_{t-1} a_t
//   C = Q K^T, in which r sees keys of its own token and before, a only keys before
//   [u; y] = Q S^T + C V            u in order of tokens: its own rows of C are the triangle of a linear system (WY form)
//   S after the chunk = (S + V^T K) diag(D)
// and backward, with G the gradient of the state after the chunk times diag(D), and Z = [du; dy], the gradients of [u; y]:
//   [dv; du] = K G^T + C^T Z        du from the last token back: the same triangle, transposed
//   dC = Z V^T, where C is not zero;  dQ = Z S + dC K;  dK = V G + dC^T Q;  gradient of the state before = G + Z^T Q
//   dlog_w_t = colsum((S + V^T K) o G) + sum_{s>=t} (r exp(c) o dQ_r - K o dK)_s + sum_{s>t} (a exp(e) o dQ_a)_s
// so that nearly all the work is products of small matrices with 32 rows. log_w is at least -0.607 in the model, and then exp(-c)
// is at most 2^14; it must not sum to less than -87 over 16 tokens. The triangular systems are solved by substitution: products
// of powers of the triangle lose all digits where keys repeat.
//
// A reset cuts a chunk, so that one has a state of zeros before it or none inside. Where threads are twice as many as heads, T is
// cut into segments. What a segment makes of the state S before it is S M + A, with matrices M and A that are its own: they are
// found for all segments at once, then chained, and then all segments are done at once (and so for G backward).
//
// Layout: a row of N channels is cut into nv panels of one vector (W lanes, zero padded); an array of rows is stored panel by
// panel, row by row, so that all strides are constants. np = nv * W. The 32 rows of a chunk are 8 of the first kind (a, k, v), 8
// of the second (r, b, u) of the same tokens, then those of the other 8 tokens: what a row of C multiplies lies in one piece.

#include "vectors.h"
#include "wkv7_cpu.h"

namespace wkv7 {
namespace WKV7_VARIANT {
namespace {

using namespace vectors;

constexpr int L = 16, kStack = 2 * L;
static_assert(kCheckpoint % L == 0, "blocks are whole chunks");
// How long the map of a segment takes, in the time that doing it takes (measured with AVX-512 and heads of 64).
constexpr double kForwardMapCost = 1.2, kBackwardMapCost = 0.6;
// a register tile of matrix products, in rows and vectors
constexpr int kRows = kBytes == 64 ? 8 : 4, kCols = VECTORS_32 && kBytes == 16 ? 4 : 2;

// The row of a token's first or second query, key or value.
INLINE constexpr int place(int t, int kind) { return t / 8 * 16 + kind * 8 + t % 8; }

template <int n> struct Number { static constexpr int value = n; };

// step(c, Number<C>) for panels first <= c < last: kCols at a time, then one by one.
template <class Step> INLINE void by_columns(int64_t first, int64_t last, const Step& step) {
    for (; first + kCols <= last; first += kCols) step(first, Number<kCols>());
    for (; first < last; first++) step(first, Number<1>());
}

// exp(x) and exp(-x), which share the even and the odd part of their series; error 1e-7 relative.
INLINE void exponentials(Vec<float> x, Vec<float>& up, Vec<float>& down) {
    using V = Vec<float>;
    const V most = all(87.f);
    x = x < -most ? -most : x > most ? most : x;
    V shifted = x * 1.44269504f + 12582912.f;  // 1.5 * 2^23 rounds to an integer, in the low bits
    V n = shifted - 12582912.f;
    V f = x - n * 0.693359375f;
    f = f + n * 2.12194440e-4f;
    V f2 = f * f;
    V even = f2 * (1 / 720.f) + 1 / 24.f, odd = f2 * (1 / 5040.f) + 1 / 120.f;
    even = even * f2 + 0.5f, odd = odd * f2 + 1 / 6.f;
    even = even * f2 + 1.f, odd = (odd * f2 + 1.f) * f;
    up = (V)((Int)(even + odd) + ((Int)shifted << 23));
    down = (V)((Int)(even - odd) - ((Int)shifted << 23));
}
INLINE void exponentials(Vec<double> x, Vec<double>& up, Vec<double>& down) {
    UNROLL for (int l = 0; l < Lanes<double>::W; l++) up[l] = ::exp(x[l]), down[l] = ::exp(-x[l]);
}

// ---- matrix products

// R rows and C panels of a result, in registers.
template <int R, int C, class F> struct Tile {
    static constexpr int W = Lanes<F>::W;
    using V = Vec<F>;
    V sum[R][C] = {};

    // += x (R of a stack's rows, n columns) b (n, C panels of b_rows rows)
    INLINE void product(const F* x, const F* b, int64_t b_rows, int64_t n) {
        for (; n > 0; n -= W, x += kStack * W) {
            int64_t some = least(W, n);
            for (int64_t k = 0; k < some; k++, b += W) {
                V y[C];
                UNROLL for (int c = 0; c < C; c++) y[c] = at(b + c * b_rows * W);
                UNROLL for (int r = 0; r < R; r++) {
                    V xr = all(x[r * W + k]);
                    UNROLL for (int c = 0; c < C; c++) sum[r][c] += xr * y[c];
                }
            }
        }
    }
    // += a[r, s] rows[s], rows of a stack, summed over first <= s < last
    template <int row, int column> INLINE void combine(const F* a, const F* rows, int first, int last) {
        for (int s = first; s < last; s++) {
            V y[C];
            UNROLL for (int c = 0; c < C; c++) y[c] = at(rows + (c * kStack + s) * W);
            UNROLL for (int r = 0; r < R; r++) {
                V ar = all(a[r * row + s * column]);
                UNROLL for (int c = 0; c < C; c++) sum[r][c] += ar * y[c];
            }
        }
    }
    // The solution x of x = sum + a x, a strictly lower triangular.
    INLINE void solve_lower(const F* a) {
        UNROLL for (int s = 0; s < R; s++) UNROLL for (int r = 0; r < R; r++) if (r > s) {
            V ar = all(a[r * kStack + s]);
            UNROLL for (int c = 0; c < C; c++) sum[r][c] += ar * sum[s][c];
        }
    }
    // The solution x of x = sum + a^T x.
    INLINE void solve_upper(const F* a) {
        UNROLL for (int q = 0; q < R; q++) UNROLL for (int r = 0; r < R; r++) if (r < R - 1 - q) {
            V ar = all(a[(R - 1 - q) * kStack + r]);
            UNROLL for (int c = 0; c < C; c++) sum[r][c] += ar * sum[R - 1 - q][c];
        }
    }
    INLINE void save(F* out, int64_t panel) const {
        UNROLL for (int r = 0; r < R; r++) UNROLL for (int c = 0; c < C; c++) at(out + c * panel + r * W) = sum[r][c];
    }
};

// The first n rows of C panels of to = (from + x^T y) scale, x and y stacks (y: its C panels). The scale is that of rows or
// columns, or null for 1. kind: of the stacks' rows that are not all zero, if only one is not.
template <int C, bool kScaleRows, int kind = -1, class F>
void update(F* to, const F* from, const F* scale, const F* x, const F* y, int64_t np, int64_t n) {
    constexpr int W = Lanes<F>::W, R = kRows < W ? kRows : W;
    using V = Vec<F>;
    V columns[C];
    UNROLL for (int c = 0; c < C; c++) columns[c] = !kScaleRows && scale ? at(scale + c * W) : all(F(1));
    for (int64_t i = 0; i < n; i += R) {
        const F* xi = x + i / W * kStack * W + i % W;
        V sum[R][C];
        UNROLL for (int r = 0; r < R; r++) UNROLL for (int c = 0; c < C; c++) sum[r][c] = at(from + (c * np + i + r) * W);
        for (int s = kind > 0 ? place(0, kind) : 0; s < kStack; s += kind >= 0 && s % 8 == 7 ? 9 : 1) {
            V ys[C];
            UNROLL for (int c = 0; c < C; c++) ys[c] = at(y + (c * kStack + s) * W);
            UNROLL for (int r = 0; r < R; r++) {
                V xr = all(xi[s * W + r]);
                UNROLL for (int c = 0; c < C; c++) sum[r][c] += xr * ys[c];
            }
        }
        UNROLL for (int r = 0; r < R; r++) UNROLL for (int c = 0; c < C; c++)
            at(to + (c * np + i + r) * W) = sum[r][c] * (kScaleRows ? all(scale[i + r]) : columns[c]);
    }
}

// ---- one chunk

// What of C is not zero, for the queries and keys of the same 8 tokens: 8 rows a, 8 rows r; 8 columns k, 8 columns b.
template <class F> struct Mask {
    alignas(64) F keep[16][16];
    constexpr Mask() : keep() {
        for (int q = 0; q < 16; q++) for (int p = 0; p < 16; p++) keep[q][p] = q < 8 ? p % 8 < q : p % 8 <= q - 8;
    }
};
template <class F> constexpr Mask<F> kMask;

// Where forward keeps a chunk, and backward each chunk of a block: stacks, and 16 rows each of exp(c) and exp(-c).
template <class F> struct Slot {
    static constexpr int W = Lanes<F>::W;
    F *q, *k, *v, *up, *down, *decay, *c;

    // One vector more than the rows: buffers a power of two apart would share the same few sets of the cache.
    static int64_t stack(int64_t nv) { return (nv * kStack + 1) * W; }
    static int64_t floats(int64_t nv, bool backward) {
        return 3 * stack(nv) + (backward ? 2 * (nv * L + 1) * W : 0) + nv * W + kStack * kStack;
    }
    Slot(F* p, int64_t nv, bool backward) {
        for (F** x : {&q, &k, &v}) *x = p, p += stack(nv);
        if (backward)
            for (F** x : {&up, &down}) *x = p, p += (nv * L + 1) * W;
        decay = p, p += nv * W;
        c = p;
    }
};

// Where gradients go.
struct Out { void* p; int type; };
struct Outs { Out r, log_w, k, a, b; };

// Heads h0 <= h < h1 of batch row b. Tokens go in blocks, and all heads do a block before the next one: they share the pages of
// memory that their rows lie on, and looking up pages is a good part of the cost of reaching memory.
template <class F> struct Heads {
    static constexpr int W = Lanes<F>::W;
    using V = Vec<F>;
    const Problem& p;
    int64_t b, h0, h1, N, nv, np, square, stride, blocks;

    Heads(const Problem& p, int64_t b, int64_t h0, int64_t h1)
        : p(p), b(b), h0(h0), h1(h1), N(p.N), nv((p.N + W - 1) / W), np(nv * W), square(np * np), stride(p.H * p.N),
          blocks((p.T + kCheckpoint - 1) / kCheckpoint) {}

    // n tokens of head h from t on
    struct Place { int64_t h, t, n; };

    // ---- between memory and panels

    template <class IO> IO* rows(void* tensor, Place at) const {
        return static_cast<IO*>(tensor) + (b * p.T + at.t) * stride + at.h * N;
    }
    template <class IO> const IO* rows(const void* tensor, Place at) const { return rows<IO>(const_cast<void*>(tensor), at); }

    template <class IO> INLINE V get(const IO* row, int64_t c) const {
        return c < N / W ? vectors::load(row + c * W) : load_some<F>(row + c * W, N % W);
    }

    // A tensor's rows become those of one kind in a stack; rows without a token become zeros.
    void load(F* stack, int kind, const void* tensor, Place at_) const {
        Element<F>::as(p.type, [&](auto element) __attribute__((always_inline)) {
            auto* row = rows<decltype(element)>(tensor, at_);
            for (int t = 0; t < L; t++, row += stride)
                for (int64_t j = 0; j < nv; j++) at(stack + (j * kStack + place(t, kind)) * W) = t < at_.n ? get(row, j) : V{};
        });
    }
    // 16 rows, `panel` rows a panel, go to a tensor.
    template <class Row> void save(Out out, const F* from, int64_t panel, Place at_, const Row& row_of) const {
        Element<F>::as(out.type, [&](auto element) __attribute__((always_inline)) {
            using IO = decltype(element);
            auto* row = rows<IO>(out.p, at_);
            int64_t size = sizeof(IO);
            bool large = p.B * p.T * stride * size >= 1 << 20;  // not used soon
            bool past_caches = large && N % W == 0 && reinterpret_cast<uintptr_t>(out.p) % (W * size) == 0;
            for (int t = 0; t < at_.n; t++, row += stride)
                for (int64_t c = 0; c < nv; c++) {
                    V x = at(from + (c * panel + row_of(t)) * W);
                    if (past_caches) stream(row + c * W, x);
                    else if (c < N / W) store(row + c * W, x);
                    else store_some<F>(row + c * W, N % W, x);
                }
        });
    }
    // Asks for the rows of 16 tokens ahead of their use, between the steps of the chunk before: rows are `stride` apart, which is
    // more than a processor foresees.
    INLINE void fetch(const void* tensor, int type, Place at) const {
        int64_t size = type == kBFloat16 ? 2 : sizeof(F), n = least(L, p.T - at.t);
        const char* row = static_cast<const char*>(tensor) + ((b * p.T + at.t) * stride + at.h * N) * size;
        for (int64_t t = 0; t < n; t++, row += stride * size)
            for (int64_t j = 0; j < N * size; j += 64) __builtin_prefetch(row + j, 0, 2);
    }
    // The chunk that most likely follows: the head's next, the next head's first, or the first of the block at `after`.
    Place following(Place at, int64_t start, int64_t end, int64_t after) const {
        if (at.t + at.n < end) return {at.h, at.t + at.n, 0};
        if (at.h + 1 < h1) return {at.h + 1, start, 0};
        return {h0, after < 0 || after >= p.T ? start : after, 0};
    }

    // The panels of an (N, N) matrix.
    void load_matrix(F* to, const F* from) const {
        for (int64_t c = 0; c < nv; c++)
            for (int64_t i = 0; i < N; i++) at(to + (c * np + i) * W) = get(from + i * N, c);
    }
    void save_matrix(F* to, const F* from) const {
        for (int64_t c = 0; c < nv; c++)
            for (int64_t i = 0; i < N; i++) {
                if (c < N / W) store(to + i * N + c * W, at(from + (c * np + i) * W));
                else store_some<F>(to + i * N + c * W, N % W, at(from + (c * np + i) * W));
            }
    }
    F* checkpoint(int64_t h, int64_t block) const {
        return static_cast<F*>(p.saved) + ((b * p.H + h) * blocks + block) * N * N;
    }

    bool resets(int64_t t) const { return p.reset && p.reset[b * p.T + t]; }
    // The end of the chunk (or, with the block's end as `most`, of the run of chunks) that starts at t.
    int64_t cut(int64_t t, int64_t most) const {
        if (!p.reset) return most;
        for (int64_t s = t + 1; s < most; s++) if (resets(s)) return s;
        return most;
    }

    // ---- the parts of a chunk

    // Queries, keys and decay (if `keep`, exp(c) and exp(-c)) of a chunk.
    void prepare(const Slot<F>& s, Place at_, bool keep) const {
        Element<F>::as(p.type, [&](auto element) __attribute__((always_inline)) {
            Element<F>::as(p.w_type, [&](auto w_element) __attribute__((always_inline)) {
                prepare_as<decltype(element), decltype(w_element)>(s, at_, keep);
            });
        });
    }
    template <class IO, class W_IO> void prepare_as(const Slot<F>& s, Place at_, bool keep) const {
        const IO *r = rows<IO>(p.r, at_), *k = rows<IO>(p.k, at_), *a = rows<IO>(p.a, at_), *b = rows<IO>(p.b, at_);
        const W_IO* w = rows<W_IO>(p.log_w, at_);
        for (int64_t c = 0; c < nv; c++) {
            V sum{}, before = all(F(1)), up = before, down = before;
            F *q = s.q + c * kStack * W, *keys = s.k + c * kStack * W;
            for (int t = 0; t < L; t++) {
                V at_a{}, at_r{}, at_k{}, at_b{};
                if (t < at_.n) {
                    sum += get(w + t * stride, c);
                    exponentials(sum, up, down);
                    at_a = get(a + t * stride, c) * before, at_r = get(r + t * stride, c) * up;
                    at_k = get(k + t * stride, c) * down, at_b = get(b + t * stride, c) * down;
                }
                int first = place(t, 0) * W, second = place(t, 1) * W;
                at(q + first) = at_a, at(q + second) = at_r, at(keys + first) = at_k, at(keys + second) = at_b;
                if (keep) at(s.up + (c * L + t) * W) = up, at(s.down + (c * L + t) * W) = down;
                before = up;
            }
            at(s.decay + c * W) = up;
        }
    }

    // The transpose of stacked rows: kStack / W panels of np rows.
    void transpose_stack(F* to, const F* from) const {
        for (int64_t c = 0; c < nv; c++)
            for (int64_t q = 0; q < kStack; q += W) transpose_block(to + (q * nv + c * W) * W, from + (c * kStack + q) * W);
    }

    // out = x y^T where it may differ from zero, (kStack, kStack). y: transposed
    void scores(F* out, const F* x, const F* y) const {
        for (int q = 0; q < kStack; q += kRows)
            by_columns(0, (q < 16 ? 16 : 32) / W, [&](int64_t s, auto n) __attribute__((always_inline)) {
                Tile<kRows, n.value, F> tile;
                tile.product(x + q * W, y + s * np * W, np, N);
                UNROLL for (int r = 0; r < kRows; r++) UNROLL for (int c = 0; c < n.value; c++) {
                    int64_t from = (s + c) * W;
                    V sum = tile.sum[r][c];
                    if ((q ^ from) < 16) sum *= at(kMask<F>.keep[q % 16 + r] + from % 16);
                    at(out + (q + r) * kStack + from) = sum;
                }
            });
    }

    // u, in C panels from j on of the stack v, from the transposed state
    template <int C> INLINE void values(const Slot<F>& s, F* v, const F* state, int64_t j) const {
        v += j * kStack * W;
        for (int t = 0; t < L; t += kRows) {
            int q = place(t, 0), u = place(t, 1);
            Tile<kRows, C, F> tile;
            tile.product(s.q + q * W, state + j * np * W, np, N);
            tile.template combine<kStack, 1>(s.c + q * kStack, v, 0, u);
            tile.solve_lower(s.c + q * kStack + u);
            tile.save(v + u * W, kStack * W);
        }
    }

    // ---- forward

    // Tokens t0 <= t < t1 from the states `from` (null for zeros), (h1 - h0, N, N). The states after go to `to`. t0 is the first
    // token of a block.
    void forward(int64_t t0, int64_t t1, const F* from, F* to) const {
        int64_t size = Slot<F>::floats(nv, false), transposed = (np * kStack + W), n = h1 - h0;
        Buffer<F> memory(size + transposed + (nv * L + 1) * W + n * square);
        Slot<F> s(memory.p, nv, false);
        F *keys = memory.p + size, *y = keys + transposed, *states = y + (nv * L + 1) * W;
        for (int64_t i = 0; i < n; i++) {
            F* state = states + i * square;
            memset(state, 0, square * sizeof(F));
            if (from) load_transposed(state, from + i * N * N);
        }
        for (int64_t start = t0; start < t1; start += kCheckpoint)
            for (int64_t h = h0; h < h1; h++) {
                F* state = states + (h - h0) * square;
                if (p.saved) save_matrix(checkpoint(h, start / kCheckpoint), state);
                int64_t end = least(start + kCheckpoint, t1);
                for (int64_t t = start, next; t < end; t = next) {
                    if (resets(t)) memset(state, 0, square * sizeof(F));
                    next = cut(t, least(t + L, end));
                    Place at{h, t, next - t};
                    forward_chunk(s, at, following(at, start, end, end), state, keys, y);
                }
            }
        for (int64_t i = 0; i < n; i++) save_transposed(to + i * N * N, states + i * square);
    }

    void forward_chunk(const Slot<F>& s, Place at, Place next, F* state, F* keys, F* y) const {
        prepare(s, at, false);
        load(s.v, 0, p.v, at);
        fetch(p.log_w, p.w_type, next), fetch(p.a, p.type, next);
        transpose_stack(keys, s.k);
        scores(s.c, s.q, keys);
        fetch(p.r, p.type, next), fetch(p.k, p.type, next);
        by_columns(0, nv, [&](int64_t j, auto n) __attribute__((always_inline)) {
            values<n.value>(s, s.v, state, j);
            F* v = s.v + j * kStack * W;
            for (int t = 0; t < L; t += kRows) {
                int q = place(t, 1);
                Tile<kRows, n.value, F> tile;
                tile.product(s.q + q * W, state + j * np * W, np, N);
                tile.template combine<kStack, 1>(s.c + q * kStack, v, 0, q + kRows);
                tile.save(y + (j * L + t) * W, L * W);
            }
            F* here = state + j * np * W;
            update<n.value, true>(here, here, s.decay, s.k, v, np, N);
            if (j == 0) fetch(p.b, p.type, next), fetch(p.v, p.type, next);
        });
        save({p.y, p.type}, y, L, at, [](int t) { return t; });
    }

    // A transposed state, [value, key] in memory.
    void load_transposed(F* to, const F* from) const {
        Buffer<F> matrix(square);
        memset(matrix.p, 0, square * sizeof(F));
        load_matrix(matrix.p, from);
        transpose(to, matrix.p, nv);
    }
    void save_transposed(F* to, const F* from) const {
        Buffer<F> matrix(square);
        transpose(matrix.p, from, nv);
        save_matrix(to, matrix.p);
    }

    // What head h0's tokens t0 <= t < t1 make of a state S before them: S map + added, (N, N) each.
    void map(int64_t t0, int64_t t1, F* added, F* map) const {
        int64_t size = Slot<F>::floats(nv, false), stack = Slot<F>::stack(nv);
        Buffer<F> memory(size + 2 * stack + 2 * square);
        Slot<F> s(memory.p, nv, false);
        F *keys = memory.p + size, *us = keys + stack, *state = us + stack, *turned = state + square;
        memset(us, 0, (stack + 2 * square) * sizeof(F));
        for (int64_t i = 0; i < N; i++) turned[i / W * np * W + i * W + i % W] = 1;
        for (int64_t t = t0, next; t < t1; t = next) {
            if (resets(t)) memset(state, 0, 2 * square * sizeof(F));
            next = cut(t, least(t + L, t1));
            Place at{h0, t, next - t};
            prepare(s, at, false);
            load(s.v, 0, p.v, at);
            transpose_stack(keys, s.k);
            scores(s.c, s.q, keys);
            by_columns(0, nv, [&](int64_t j, auto n) __attribute__((always_inline)) {
                F *v = s.v + j * kStack * W, *u = us + j * kStack * W, *here = state + j * np * W, *there = turned + j * np * W;
                values<n.value>(s, s.v, state, j);
                update<n.value, true>(here, here, s.decay, s.k, v, np, N);
                values<n.value>(s, us, turned, j);
                update<n.value, true, 1>(there, there, s.decay, s.k, u, np, N);
            });
        }
        save_transposed(added, state);
        save_transposed(map, turned);
    }

    // ---- backward

    struct Work { F *transposed, *z, *gq, *gk, *gv, *gc, *other, *total; };

    // Tokens t0 <= t < t1 from the gradients of the states after them (null for zeros); those of the states before go to `to`.
    void backward(int64_t t0, int64_t t1, const F* from, F* to, const Outs& outs) const {
        constexpr int64_t kChunks = kCheckpoint / L;
        int64_t size = Slot<F>::floats(nv, true), stack = Slot<F>::stack(nv), n = h1 - h0, odd = square + W;
        Buffer<F> memory(kChunks * (size + odd) + 5 * stack + kStack * kStack + odd + np + n * odd);
        F *slots = memory.p, *states = slots + kChunks * size, *rest = states + kChunks * odd;
        Work work;
        for (F** x : {&work.transposed, &work.z, &work.gq, &work.gk, &work.gv}) *x = rest, rest += stack;
        work.gc = rest, work.other = work.gc + kStack * kStack, work.total = work.other + odd;
        F* gs = work.total + np;
        for (int64_t i = 0; i < n; i++) {
            memset(gs + i * odd, 0, square * sizeof(F));
            if (from) load_matrix(gs + i * odd, from + i * N * N);
        }
        for (int64_t start = (t1 - 1) / kCheckpoint * kCheckpoint; start >= t0; start -= kCheckpoint)
            for (int64_t h = h0; h < h1; h++) {
                F* g = gs + (h - h0) * odd;
                // runs of chunks without a reset inside, from the last one
                for (int64_t end = least(start + kCheckpoint, t1), t; end > start; end = t) {
                    for (t = end - 1; t > start && !resets(t); t--) {}
                    memset(states, 0, square * sizeof(F));
                    if (!resets(t)) load_matrix(states, checkpoint(h, start / kCheckpoint));
                    int64_t chunks = (end - t + L - 1) / L;
                    for (int64_t i = 0; i < chunks; i++) {
                        Place at{h, t + i * L, least(L, end - t - i * L)};
                        rebuild(Slot<F>(slots + i * size, nv, true), at, following(at, start, end, start - kCheckpoint),
                                work.transposed, states + i * odd, i + 1 < chunks ? odd : 0);
                    }
                    for (int64_t i = chunks - 1; i >= 0; i--) {
                        Place at{h, t + i * L, least(L, end - t - i * L)};
                        Slot<F> s(slots + i * size, nv, true);
                        if (i == chunks - 1) decay(g, s.decay);
                        const F* next = i ? Slot<F>(slots + (i - 1) * size, nv, true).decay : nullptr;
                        backward_chunk(s, at, states + i * odd, g, next, work, outs);
                    }
                    if (resets(t)) memset(g, 0, square * sizeof(F));
                }
            }
        for (int64_t i = 0; i < n; i++) save_matrix(to + i * N * N, gs + i * odd);
    }

    // What head h0's tokens t0 <= t < t1 make of the gradient G of the state after them: G map + added, (N, N) each.
    void gradient_map(int64_t t0, int64_t t1, F* added, F* map) const {
        int64_t size = Slot<F>::floats(nv, false), stack = Slot<F>::stack(nv), odd = square + W;
        Buffer<F> memory(size + 3 * stack + 3 * odd);
        Slot<F> s(memory.p, nv, false);
        F *keys = memory.p + size, *z = keys + stack, *du = z + stack, *g = du + stack, *turned = g + odd, *other = turned + odd;
        const F* no_scale = nullptr;
        memset(du, 0, (stack + 2 * odd) * sizeof(F));
        for (int64_t i = 0; i < N; i++) turned[i / W * np * W + i * W + i % W] = 1;
        for (int64_t end = t1, t; end > t0; end = t) {
            for (t = end - 1; t % L && !resets(t); t--) {}
            Place at{h0, t, end - t};
            prepare(s, at, false);
            load(z, 1, p.gy, at);
            transpose_stack(keys, s.k);
            scores(s.c, s.q, keys);
            decay(g, s.decay), decay(turned, s.decay);
            by_columns(0, nv, [&](int64_t j, auto n) __attribute__((always_inline)) {
                value_gradients<n.value>(s, z, g, other, j);
                value_gradients<n.value>(s, du, turned, other, j);
            });
            by_columns(0, nv, [&](int64_t c, auto n) __attribute__((always_inline)) {
                F *gc = g + c * np * W, *there = turned + c * np * W, *q = s.q + c * kStack * W;
                update<n.value, false>(gc, gc, no_scale, z, q, np, N);
                update<n.value, false, 0>(there, there, no_scale, du, q, np, N);
            });
            if (resets(t)) memset(g, 0, 2 * odd * sizeof(F));
        }
        save_matrix(added, g);
        save_matrix(map, turned);
    }

    // The gradient of u, in C panels from j on of the stack z, which has that of y. other: room for C panels
    template <int C> INLINE void value_gradients(const Slot<F>& s, F* z, const F* g, F* other, int64_t j) const {
        z += j * kStack * W;
        transpose(other, g, nv, j, j + C);
        for (int t = L - kRows; t >= 0; t -= kRows) {
            int q = place(t, 0), u = place(t, 1);
            Tile<kRows, C, F> tile;
            tile.product(s.k + u * W, other, np, N);
            tile.template combine<1, kStack>(s.c + u, z, q + kRows, kStack);
            tile.solve_upper(s.c + q * kStack + u);
            tile.save(z + q * W, kStack * W);
        }
    }

    void decay(F* g, const F* decay) const {
        for (int64_t c = 0; c < nv; c++)
            for (int64_t i = 0; i < N; i++) at(g + (c * np + i) * W) *= at(decay + c * W);
    }

    // Fills the slot from the transposed state before the chunk; the state after it goes `next` behind it, if that is not 0.
    void rebuild(const Slot<F>& s, Place at, Place then, F* keys, F* state, int64_t next) const {
        prepare(s, at, true);
        load(s.v, 0, p.v, at);
        fetch(p.log_w, p.w_type, then), fetch(p.a, p.type, then), fetch(p.gy, p.type, at);
        transpose_stack(keys, s.k);
        scores(s.c, s.q, keys);
        fetch(p.r, p.type, then), fetch(p.k, p.type, then);
        by_columns(0, nv, [&](int64_t j, auto n) __attribute__((always_inline)) {
            F* here = state + j * np * W;
            values<n.value>(s, s.v, state, j);
            if (j == 0) fetch(p.b, p.type, then), fetch(p.v, p.type, then);
            if (next) update<n.value, true>(here + next, here, s.decay, s.k, s.v + j * kStack * W, np, N);
        });
    }

    // g: the gradient of the state after the chunk, times the chunk's decay; then that of the state before it, times `next`.
    void backward_chunk(const Slot<F>& s, Place at_, const F* state, F* g, const F* next, const Work& w, const Outs& outs) const {
        load(w.z, 1, p.gy, at_);
        by_columns(0, nv, [&](int64_t j, auto n) __attribute__((always_inline)) {
            F* z = w.z + j * kStack * W;
            value_gradients<n.value>(s, w.z, g, w.other, j);
            for (int t = 0; t < L; t += kRows) {
                int v = place(t, 0);
                Tile<kRows, n.value, F> tile;
                tile.product(s.k + v * W, w.other, np, N);
                tile.template combine<1, kStack>(s.c + v, z, v, kStack);
                tile.save(w.gv + (j * L + t) * W, L * W);
            }
        });
        save({p.gv, p.type}, w.gv, L, at_, [](int t) { return t; });
        transpose_stack(w.transposed, s.v);
        scores(w.gc, w.z, w.transposed);
        by_columns(0, nv, [&](int64_t c, auto n) __attribute__((always_inline)) {
            F *gc = g + c * np * W, *S = w.other;
            transpose(S, state, nv, c, c + n.value);
            const F *q = s.q + c * kStack * W, *k = s.k + c * kStack * W;
            V total[n.value] = {};
            UNROLL for (int i = 0; i < n.value; i++) total[i] = through(S + i * np * W, gc + i * np * W);
            for (int t = 0; t < L; t += kRows)
                for (int kind = 0; kind < 2; kind++) {
                    int at = place(t, kind);
                    Tile<kRows, n.value, F> tile;
                    tile.product(w.z + at * W, S, np, N);
                    tile.template combine<kStack, 1>(w.gc + at * kStack, k, 0, place(t, 1) + kRows);
                    tile.save(w.gq + (c * kStack + at) * W, kStack * W);
                }
            for (int t = 0; t < L; t += kRows)
                for (int kind = 0; kind < 2; kind++) {
                    int at_k = place(t, kind);
                    Tile<kRows, n.value, F> tile;
                    tile.product(s.v + at_k * W, gc, np, N);
                    UNROLL for (int r = 0; r < kRows; r++) UNROLL for (int i = 0; i < n.value; i++)
                        total[i] += at(k + (i * kStack + at_k + r) * W) * tile.sum[r][i];
                    tile.template combine<1, kStack>(w.gc + at_k, q, place(t, 0), kStack);
                    tile.save(w.gk + (c * kStack + at_k) * W, kStack * W);
                }
            UNROLL for (int i = 0; i < n.value; i++) finish(s, w, c + i, total[i]);
            update<n.value, false>(gc, gc, next ? next + c * W : nullptr, w.z, q, np, N);
        });
        save(outs.a, w.gq, kStack, at_, [](int t) { return place(t, 0); });
        save(outs.r, w.gq, kStack, at_, [](int t) { return place(t, 1); });
        save(outs.k, w.gk, kStack, at_, [](int t) { return place(t, 0); });
        save(outs.b, w.gk, kStack, at_, [](int t) { return place(t, 1); });
        save(outs.log_w, w.gv, L, at_, [](int t) { return t; });
    }

    // the columns' sums of S * G, in one panel
    INLINE V through(const F* S, const F* g) const {
        constexpr int A = W < 4 ? W : 4;
        V sum[A] = {}, total{};
        for (int64_t i = 0; i < np; i += A)
            UNROLL for (int a = 0; a < A; a++) sum[a] += at(S + (i + a) * W) * at(g + (i + a) * W);
        UNROLL for (int a = 0; a < A; a++) total += sum[a];
        return total;
    }

    // In panel c, dQ and dK become the gradients of a, r, k and b; log_w's go to w.gv.
    void finish(const Slot<F>& s, const Work& w, int64_t c, V run) const {
        int64_t o = c * kStack * W;
        for (int t = L - 1; t >= 0; t--) {
            int64_t first = o + place(t, 0) * W, second = o + place(t, 1) * W, row = (c * L + t) * W;
            V up = at(s.up + row), down = at(s.down + row), before = t ? at(s.up + row - W) : all(F(1));
            V a = at(w.gq + first), r = at(w.gq + second), k = at(w.gk + first), b = at(w.gk + second);
            run += at(s.q + second) * r - at(s.k + first) * k - at(s.k + second) * b;
            at(w.gv + row) = run;
            run += at(s.q + first) * a;
            at(w.gq + first) = a * before, at(w.gq + second) = r * up;
            at(w.gk + first) = k * down, at(w.gk + second) = b * down;
        }
    }
};

// A few tokens (T < 8), one after the other, on the states as they lie in memory: a chunk would be mostly padding.
template <class F> struct Steps {
    static constexpr int W = Lanes<F>::W;
    using V = Vec<F>;
    const Problem& p;
    int64_t N, nv;
    Buffer<F> memory;
    F *r, *w, *k, *v, *a, *b, *y;

    explicit Steps(const Problem& p) : p(p), N(p.N), nv((p.N + W - 1) / W), memory(7 * nv * W) {
        F* rest = memory.p;
        for (F** x : {&r, &w, &k, &v, &a, &b, &y}) *x = rest, rest += nv * W;
    }

    INLINE V get(const F* row, int64_t c) const { return c < N / W ? load(row + c * W) : load_some<F>(row + c * W, N % W); }
    INLINE void put(F* row, int64_t c, V x) const {
        if (c < N / W) store(row + c * W, x);
        else store_some<F>(row + c * W, N % W, x);
    }

    void forward(int64_t head) {
        int64_t batch = head / p.H, h = head % p.H, square = N * N;
        const F* from = p.state ? static_cast<const F*>(p.state) + head * square : nullptr;
        F* to = static_cast<F*>(p.final_state) + head * square;
        for (int64_t t = 0; t < p.T; t++, from = to) {
            if (!from || (p.reset && p.reset[batch * p.T + t])) memset(to, 0, square * sizeof(F)), from = to;
            int64_t first = ((batch * p.T + t) * p.H + h) * N;
            auto read = [&](F* row, const void* tensor, int type) {
                Element<F>::as(type, [&](auto element) __attribute__((always_inline)) {
                    load_as(row, static_cast<const decltype(element)*>(tensor) + first, 1, 1, N, N);
                });
            };
            read(r, p.r, p.type), read(k, p.k, p.type), read(v, p.v, p.type), read(a, p.a, p.type), read(b, p.b, p.type);
            read(w, p.log_w, p.w_type);
            step(from, to);
            Element<F>::as(p.type, [&](auto element) __attribute__((always_inline)) {
                store_as(static_cast<decltype(element)*>(p.y) + first, y, 1, 1, N, N);
            });
        }
    }

    void step(const F* from, F* to) {
        for (int64_t c = 0; c < nv; c++) {
            V up, down;
            exponentials(at(w + c * W), up, down);
            at(w + c * W) = up;
        }
        for (int64_t i = 0; i < N; i += W) {
            int64_t n = least(W, N - i);
            alignas(64) F u[W];
            V sum[W] = {};
            for (int64_t m = 0; m < n; m++)
                for (int64_t c = 0; c < nv; c++) sum[m] += get(from + (i + m) * N, c) * at(a + c * W);
            at(u) = sums<F>(sum);
            for (int64_t m = 0; m < W; m++) sum[m] = V{};
            for (int64_t m = 0; m < n; m++)
                for (int64_t c = 0; c < nv; c++) {
                    V s = get(from + (i + m) * N, c) * at(w + c * W) + all(u[m]) * at(b + c * W) + all(v[i + m]) * at(k + c * W);
                    put(to + (i + m) * N, c, s);
                    sum[m] += s * at(r + c * W);
                }
            at(y + i) = sums<F>(sum);
        }
    }
};

// ---- tasks

template <class F> INLINE const F* row(const void* p, int64_t i, int64_t size) {
    return p ? static_cast<const F*>(p) + i * size : nullptr;
}
template <class F> INLINE F* row(void* p, int64_t i, int64_t size) { return static_cast<F*>(p) + i * size; }

// How one call is cut into tasks: the heads of a batch row into `groups`; where threads are twice as many as heads, or more, T
// into segments instead, of whole blocks. On the way, which is from the last token in the backward pass, `parallel` segments come
// after the first one. In a first step it is done, and the maps of all others but the last are found; in a second step all others
// are done. The first has a share of the tokens of `map_cost`, what a map costs where doing the same costs 1: so all threads are
// done with the first step at once.
struct Cut {
    const Problem& p;
    int64_t groups, parallel, first, blocks = (p.T + kCheckpoint - 1) / kCheckpoint;

    Cut(const Problem& p, int threads, double map_cost) : p(p) {
        int64_t few = (p.H + 7) / 8, enough = (threads + p.B - 1) / p.B;
        groups = least(few > enough ? few : enough, p.H);
        parallel = least(threads / (p.B * p.H), blocks - 1);
        first = least(1 + int64_t(blocks * map_cost / (map_cost + parallel)), blocks - parallel);
    }
    int64_t tasks() const { return p.B * groups; }
    int64_t batch(int64_t task) const { return task / groups; }
    int64_t head(int64_t task) const { return task % groups * p.H / groups; }
    int64_t head_end(int64_t task) const { return (task % groups + 1) * p.H / groups; }
    // the blocks on the way before segment i
    int64_t before(int64_t i) const { return i ? first + (blocks - first) * (i - 1) / parallel : 0; }
};

// All segments of all heads, in two steps. start: of the whole, (heads, N, N), or null for zeros; end: where it shall end, the
// same. run(head, i, from, to) does segment i on the way; map(head, i, added, map) finds its map.
template <class F, class Run, class Map>
void in_segments(const Cut& cut, const Threads& threads, const F* start, F* end, const Run& run, const Map& map) {
    int64_t n = cut.parallel, N = cut.p.N, square = N * N, heads = cut.p.B * cut.p.H;
    Buffer<F> starts(heads * n * square), maps(heads * n * square);  // of segments 1 to n; what is added becomes the start
    threads.each(heads * n, [&](int64_t task) {
        int64_t head = task / n, i = task % n;
        F* to = starts.p + task * square;
        if (i == 0) run(head, 0, start ? start + head * square : nullptr, to);
        else map(head, i, to, maps.p + task * square);
    });
    threads.each(heads, [&](int64_t head) {
        for (int64_t task = head * n; task + 1 < (head + 1) * n; task++) {
            const F *from = starts.p + task * square, *by = maps.p + (task + 1) * square;
            F* to = starts.p + (task + 1) * square;
            for (int64_t i = 0; i < N; i++)
                for (int64_t m = 0; m < N; m++)
                    for (int64_t j = 0; j < N; j++) to[i * N + j] += from[i * N + m] * by[m * N + j];
        }
    });
    threads.each(heads * n, [&](int64_t task) {
        int64_t head = task / n, i = task % n + 1;
        Buffer<F> unused(square);
        run(head, i, starts.p + task * square, i == n ? end + head * square : unused.p);
    });
}

template <class F> void forward_as(const Problem& p, const Threads& threads) {
    int64_t square = p.N * p.N, heads = p.B * p.H;
    if (p.T < 8 && !p.saved) {
        // starting threads takes as long as a quarter of a million elements of the state
        int64_t most = 1 + heads * square * p.T / (1 << 18), tasks = least(least(threads.count, most), heads);
        return threads.each(tasks, [&](int64_t task) {
            Steps<F> steps(p);
            for (int64_t h = task * heads / tasks; h < (task + 1) * heads / tasks; h++) steps.forward(h);
        });
    }
    Cut cut(p, threads.count, kForwardMapCost);
    auto token = [&](int64_t i) { return least(cut.before(i) * kCheckpoint, p.T); };
    auto head = [&](int64_t h) { return Heads<F>(p, h / p.H, h % p.H, h % p.H + 1); };
    if (cut.parallel > 1)
        return in_segments(
            cut, threads, row<F>(p.state, 0, 0), row<F>(p.final_state, 0, 0),
            [&](int64_t h, int64_t i, const F* from, F* to) { head(h).forward(token(i), token(i + 1), from, to); },
            [&](int64_t h, int64_t i, F* added, F* map) { head(h).map(token(i), token(i + 1), added, map); });
    threads.each(cut.tasks(), [&](int64_t task) {
        int64_t b = cut.batch(task), h = cut.head(task), at = b * p.H + h;
        Heads<F>(p, b, h, cut.head_end(task))
            .forward(0, p.T, row<F>(p.state, at, square), row<F>(p.final_state, at, square));
    });
}

template <class F> void backward_as(const Problem& p, const Threads& threads) {
    int64_t square = p.N * p.N;
    const Outs outs{{p.gr, p.type}, {p.glog_w, p.w_type}, {p.gk, p.type}, {p.ga, p.type}, {p.gb, p.type}};
    Cut cut(p, threads.count, kBackwardMapCost);
    auto token = [&](int64_t i) { return least((cut.blocks - cut.before(i)) * kCheckpoint, p.T); };
    auto head = [&](int64_t h) { return Heads<F>(p, h / p.H, h % p.H, h % p.H + 1); };
    if (cut.parallel > 1)
        return in_segments(
            cut, threads, row<F>(p.gfinal, 0, 0), row<F>(p.gstate, 0, 0),
            [&](int64_t h, int64_t i, const F* from, F* to) { head(h).backward(token(i + 1), token(i), from, to, outs); },
            [&](int64_t h, int64_t i, F* added, F* map) { head(h).gradient_map(token(i + 1), token(i), added, map); });
    threads.each(cut.tasks(), [&](int64_t task) {
        int64_t b = cut.batch(task), h = cut.head(task), at = b * p.H + h;
        Heads<F>(p, b, h, cut.head_end(task))
            .backward(0, p.T, row<F>(p.gfinal, at, square), row<F>(p.gstate, at, square), outs);
    });
}

}  // namespace

void forward(const Problem& p, const Threads& threads) {
#if VECTOR_BYTES == 16
    if (p.type == kFloat64) return forward_as<double>(p, threads);
#endif
    forward_as<float>(p, threads);
}
void backward(const Problem& p, const Threads& threads) {
#if VECTOR_BYTES == 16
    if (p.type == kFloat64) return backward_as<double>(p, threads);
#endif
    backward_as<float>(p, threads);
}

}  // namespace WKV7_VARIANT
}  // namespace wkv7
