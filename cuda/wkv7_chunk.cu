// WKV7 in chunks of 16 tokens on tensor cores: head size 64, bf16 tensors, fp32 states. The fast path of training.
//
//   S_t = S_{t-1} diag(w_t) + u_t b_t^T + v_t k_t^T      u_t = S_{t-1} a_t      w = exp(log_w)
//   y_t = S_t r_t                                        where reset[t], S_{t-1} is zero
//
// One block of threads is one (batch row, head[, segment]) and walks over its chunks; the state never leaves its registers. With S
// the state before a chunk, rows of V, U, Y the tokens of the chunk, c_t the sum of log_w over its tokens <= t, e_t that over
// tokens < t, D = exp(c of the last token), o the product of elements:
//
//   Rt = r o exp(c)    At = a o exp(e)    Ki = k o exp(-c)    Bi = b o exp(-c)
//   Aab, Aak = At Bi^T, At Ki^T for s < t, else 0             Arb, Ark = Rt Bi^T, Rt Ki^T for s <= t, else 0
//   P = At S^T + Aak V        U = M P, M = (I - Aab)^-1       Y = Rt S^T + Arb U + Ark V
//   S <- (S + V^T Ki + U^T Bi) diag(D)
//
// Backward, chunks from the last to the first, G the gradient of the state after the chunk, times D:
//   dU = Bi G^T + Arb^T gY    dP = M^T dU                     gV = Ki G^T + Ark^T gY + Aak^T dP
//   dAab, dAak = dP U^T, dP V^T for s < t, else 0             dArb, dArk = gY U^T, gY V^T for s <= t, else 0
//   dRt = gY S + dArk Ki + dArb Bi                            dAt = dP S + dAak Ki + dAab Bi
//   dKi = V G + dArk^T Rt + dAak^T At                         dBi = U G + dArb^T Rt + dAab^T At
//   gr, ga, gk, gb: those times exp(c), exp(e), exp(-c), exp(-c)                          G <- G + gY^T Rt + dP^T At
//   g_log_w_t = colsum(S o G) + sum over all s of (Ki o (V G) + Bi o (U G))_s
//               + sum over s >= t of (Rt o dRt + At o dAt - Ki o dKi - Bi o dBi)_s - (At o dAt)_t
// The sums in the last line cancel in part, so all of it is formed from the same rounded operands, chunk by chunk.
//
// An RWKV-7 model has log_w in (-0.607, 0): over a chunk a decay spans at most 14 bits, and exp(-c) needs no care. Right
// results need -5 < log_w <= 0 on average over a chunk, so that nothing overflows.
//
// Resets. A token sees those of its chunk from the last reset at or before it; the state before the chunk reaches the tokens
// before the first reset, and the state after it knows those from the last reset on. So pairs are left out of the matrices,
// rows of the products with states are zeroed, and S is dropped where the chunk has a reset. log_w of a token with reset
// meets no such pair.
//
// M is made by forward substitution in fp32 and multiplied in tf32: where tokens repeat, Aab is near -1 everywhere below the
// diagonal, and bf16, or an inverse by repeated squaring, loses all accuracy. Other operands of the tensor cores are bf16,
// and everything else is fp32.
//
// Chunks come in groups of four. First each warp prepares one chunk of the group: Rt, At, Ki, Bi, M and the other matrices,
// which no state enters. Then all warps walk over the four chunks. In the forward pass, a warp owns 16 value channels, rows
// of S, and needs nothing of the others. In the backward pass it owns the same rows of G until dP is known; then, with two
// barriers a chunk, it makes the gradients of 16 key channels. No atomics and one fixed order of additions: results are the same
// bit for bit on every run.
//
// Where (batch row, head) pairs are too few to fill the GPU, T is cut into segments: see `segment_maps`.
//
// Bytes a token and head, each moved once: 896 forward (1536 where a backward pass follows) and 2304 backward, for bf16 log_w,
// and 128, 128 and 256 more for fp32. For B 8, T 4096, C 4096 at 4.3 TB/s those are 0.75 + 1.1 ms.
//                      registers on sm_90   shared memory   blocks a multiprocessor: sm_90 and sm_100, sm_80, sm_86/89/120
//   forward,  bf16 log_w        126         51.1 KB         4, 3, 1
//   forward,  fp32 log_w        126         56.0 KB         4, 2, 1
//   backward, bf16 log_w        152         89.1 KB         2, 1, 1
//   backward, fp32 log_w        149         97.1 KB         2, 1, 1
//
// Tensors (B, T, H, 64) contiguous, states (B, H, 64, 64) indexed [value, key], reset (B, T) bytes.
#include <type_traits>

#include "tiles.cuh"

constexpr int GROUP = WARPS;  // chunks

// Blocks that a multiprocessor shall hold, that is, how many registers a thread may have.
#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ == 860 || __CUDA_ARCH__ == 890 || __CUDA_ARCH__ >= 1200)
#define FORWARD_BLOCKS 1
#define BACKWARD_BLOCKS 1
#else
#define FORWARD_BLOCKS 4
#define BACKWARD_BLOCKS 2
#endif

struct Shape {
  int T, H, segments, length;  // of a segment, in chunks; the last ones may be shorter
  __device__ int chunks() const { return (T + L - 1) / L; }
  __device__ int first(int segment) const { return min(segment * length, chunks()); }  // chunk of a segment
  // the matrix of the block's (batch row, head) and a segment, in (B, H, segments, 64, 64)
  __device__ int64_t matrix(int segment) const { return (int64_t(blockIdx.x) * segments + segment) * N * N; }
  __device__ unsigned stride() const { return H * N; }  // elements from token to token
  // the element of token 0 and channel 0, for the block's (batch row, head)
  __device__ int64_t start() const { return (int64_t(blockIdx.x) / H * T * H + blockIdx.x % H) * N; }
};

template <class W>
struct Tensors {
  const bf16 *r, *k, *v, *a, *b;
  const W* log_w;
  const uint8_t* reset;  // or null
};

// ---- blocks in shared memory, "tiled" (tiles.cuh), in the order of the registers, so that they can be loaded either way

DEVICE void store_block(unsigned char* tiled, const Block& b, int lane) { store_tiled<SECOND>(tiled, b, lane); }
DEVICE int lane_with_halves_swapped(int lane) { return (lane & 7) | (lane & 8) << 1 | (lane & 16) >> 1; }
template <Order order>
DEVICE Block load_block(const unsigned char* tiled, int lane) {
  uint32_t x[4];
  ldmatrix<4>(x, tiled + 16 * (order == FIRST ? lane : lane_with_halves_swapped(lane)));
  return ordered<order>(x);
}
template <Order order>
DEVICE Block load_transposed(const unsigned char* tiled, int lane) {
  uint32_t x[4];
  ldmatrix_trans<4>(x, tiled + 16 * (order == SECOND ? lane : lane_with_halves_swapped(lane)));
  return ordered<order>(x);
}

// ---- a tile's elements: f(x, row, column) for each of the lane's

template <class F>
DEVICE void for_each(Tile& t, int lane, F f) {
#pragma unroll
  for (int n = 0; n < 2; n++)
#pragma unroll
    for (int i = 0; i < 4; i++) f(t.half[n].c[i], row_of(lane) + i / 2 * 8, 8 * n + col_of(lane) + i % 2);
}
DEVICE Block chosen(bool first, const Block& a, const Block& b) {  // without a branch
  return {{first ? a.x[0] : b.x[0], first ? a.x[1] : b.x[1], first ? a.x[2] : b.x[2], first ? a.x[3] : b.x[3]}};
}
// b with the columns for which keep(column) is false set to zero
template <class Keep>
DEVICE Block kept_columns(Block b, int lane, Keep keep) {
#pragma unroll
  for (int n = 0; n < 2; n++) {
    const int column = 8 * n + col_of(lane);
    const uint32_t mask = (keep(column) ? 0xffffu : 0) | (keep(column + 1) ? 0xffff0000u : 0);
    b.x[2 * n] &= mask, b.x[2 * n + 1] &= mask;
  }
  return b;
}
DEVICE Tile minus(const Tile& a, const Tile& b) {
  Tile d;
#pragma unroll
  for (int n = 0; n < 2; n++) d.half[n] = each([&](int i) { return a.half[n].c[i] - b.half[n].c[i]; });
  return d;
}
DEVICE Tile plus(const Tile& a, const Tile& b) {
  Tile d;
#pragma unroll
  for (int n = 0; n < 2; n++) d.half[n] = each([&](int i) { return a.half[n].c[i] + b.half[n].c[i]; });
  return d;
}
DEVICE Tile floats(const Block& b) { return {{floats(b, 0), floats(b, 1)}}; }
// What rounding left out of t, rounded itself. Where one token comes again and again and nothing is forgotten, a state grows while
// what is removed from it does not: both parts of the state make that product.
DEVICE Block rest_of(const Tile& t, const Block& r) { return rounded(minus(t, floats(r))); }

// a b^T in tf32; the elements of b are tf32 already. mma wants columns c and c + 4 of its operands in one lane, which has 2 c and
// 2 c + 1: as good, the sum over columns being the same.
DEVICE Tile product_tf32(const Tile& a, const Tile& b) {
  Tile d{};
#pragma unroll
  for (int n = 0; n < 2; n++) {
    const float* const x = a.half[n].c;
    const uint32_t first[4] = {to_tf32(x[0]), to_tf32(x[2]), to_tf32(x[1]), to_tf32(x[3])};
#pragma unroll
    for (int m = 0; m < 2; m++)
      mma_tf32(d.half[m].c, first, float_to_bits(b.half[n].c[2 * m]), float_to_bits(b.half[n].c[2 * m + 1]));
  }
  return d;
}

// ---- resets of a chunk: bit t for token t

struct Resets {
  uint32_t bits;
  __device__ int last() const { return 31 - __clz(bits | 1); }                             // where what S after knows begins
  __device__ int before(int t) const { return 31 - __clz((bits & ((2u << t) - 1)) | 1); }  // where what t sees begins
  __device__ bool reached(int t) const { return !(bits & ((2u << t) - 1)); }               // by the state before the chunk
};

// ---- decays

template <class W>
struct Decays {  // [token, channel], in bits
  Tile c, e;
  __device__ Decays(const unsigned char* slice, int lane) {
    LogDecay<W> w;
    load<SECOND>(w, slice, lane);
    const Ranges ranges(lane);
    c = sums_by_token(ranges.upto, w), e = sums_by_token(ranges.before, w);
    for_each(c, lane, [](float& x, int, int) { x *= LOG2_E; });
    for_each(e, lane, [](float& x, int, int) { x *= LOG2_E; });
  }
  __device__ static Tile exp2(const Tile& bits, float sign) {
    Tile t = bits;
#pragma unroll
    for (Half& half : t.half) half = each([&](int i) { return ex2(sign * half.c[i]); });
    return t;
  }
  __device__ Tile to_r() const { return exp2(c, 1.f); }
  __device__ Tile to_a() const { return exp2(e, 1.f); }
  __device__ Tile to_k() const { return exp2(c, -1.f); }  // and b
};

// ---- what no state enters

struct alignas(16) Factors {                                 // four blocks of 16 channels each
  unsigned char r[4][BLOCK_BYTES], k[4][BLOCK_BYTES], a[4][BLOCK_BYTES], b[4][BLOCK_BYTES];  // slices, then Rt, Ki, At, Bi, tiled
  unsigned char v[4][BLOCK_BYTES];                           // slices
};
struct alignas(16) Matrices {
  float D[N];
  unsigned char rk[BLOCK_BYTES], rb[BLOCK_BYTES], ak[BLOCK_BYTES];  // Ark, Arb, Aak: tiled [t, s]
  union {
    float square[L][L];     // Aab, then M, on the way
    float4 inverse[2][32];  // the halves of M, or of M^T for the backward pass, in tf32, as the lanes hold them
    unsigned char ab[BLOCK_BYTES];
  };  // in the end of the backward pass: the gradients of the four
  uint32_t resets;
};
template <class W>
using LogWSlices = unsigned char[4][slice_bytes<W>];

// Starts the copies of a chunk's inputs and returns its resets; by one warp.
template <class W>
DEVICE Resets copy_chunk(const Shape& shape, const Tensors<W>& in, int chunk, Factors& to, LogWSlices<W>& to_log_w, int lane) {
  const int tokens = shape.T - chunk * L;
  const unsigned stride = shape.stride();
  const int64_t from = shape.start() + int64_t(chunk) * L * stride;
#pragma unroll
  for (int q = 0; q < 4; q++) {
    copy_slice(to.r[q], in.r + from + 16 * q, stride, tokens, lane);
    copy_slice(to.k[q], in.k + from + 16 * q, stride, tokens, lane);
    copy_slice(to.v[q], in.v + from + 16 * q, stride, tokens, lane);
    copy_slice(to.a[q], in.a + from + 16 * q, stride, tokens, lane);
    copy_slice(to.b[q], in.b + from + 16 * q, stride, tokens, lane);
    copy_slice(to_log_w[q], in.log_w + from + 16 * q, stride, tokens, lane);
  }
  const int64_t first = int64_t(blockIdx.x) / shape.H * shape.T + chunk * L;
  const bool mine = in.reset && lane < L && lane < tokens && in.reset[first + lane];
  return {__ballot_sync(0xffffffffu, mine)};
}

// (I - square)^-1 in place, by forward substitution: lane j and j + 16 make column j.
DEVICE void invert(float (&square)[L][L], int lane) {
  float column[L];
#pragma unroll
  for (int t = 0; t < L; t++) {
    float sum = t == lane % L ? 1.f : 0.f;
#pragma unroll
    for (int s = 0; s < t; s += 4) {
      const float4 x = *reinterpret_cast<const float4*>(&square[t][s]);
      sum += x.x * column[s];
      if (s + 1 < t) sum += x.y * column[s + 1];
      if (s + 2 < t) sum += x.z * column[s + 2];
      if (s + 3 < t) sum += x.w * column[s + 3];
    }
    column[t] = sum;
  }
  __syncwarp();
  if (lane < L) {
#pragma unroll
    for (int t = 0; t < L; t++) square[t][lane] = column[t];
  }
  __syncwarp();
}

// Factors from r, k, a, b in place, and the matrices; by one warp, for which they have arrived. `matrices` may lie where `log_w`
// does: of that only the first slice is overwritten, by D, while the others are still needed.
template <class W, bool backward>
DEVICE void prepare(Factors& factors, const LogWSlices<W>& log_w, Resets resets, Matrices& matrices, int lane) {
  Tile rk{}, rb{}, ak{}, ab{};
#pragma unroll 1
  for (int q = 0; q < 4; q++) {
    const Decays<W> decays(log_w[q], lane);
    const Tile to_k = decays.to_k(), to_r = decays.to_r();
    const Block Rt = scaled(load_slice<FIRST>(factors.r[q], lane), to_r),
                At = scaled(load_slice<FIRST>(factors.a[q], lane), decays.to_a()),
                Ki = scaled(load_slice<FIRST>(factors.k[q], lane), to_k),
                Bi = scaled(load_slice<FIRST>(factors.b[q], lane), to_k);
    add_product(rk, Rt, Ki);
    add_product(rb, Rt, Bi);
    add_product(ak, At, Ki);
    add_product(ab, At, Bi);
    __syncwarp();
    store_block(factors.r[q], Rt, lane);
    store_block(factors.a[q], At, lane);
    store_block(factors.k[q], Ki, lane);
    store_block(factors.b[q], Bi, lane);
    if (row_of(lane) == 7) {
#pragma unroll
      for (int n = 0; n < 2; n++)
        *reinterpret_cast<float2*>(&matrices.D[16 * q + 8 * n + col_of(lane)]) =
            make_float2(to_r.half[n].c[2], to_r.half[n].c[3]);
    }
  }
  const int begin[2] = {resets.before(row_of(lane)), resets.before(row_of(lane) + 8)};
  auto upto = [&](float& x, int t, int s) { x = s <= t && s >= begin[t / 8] ? x : 0.f; };
  auto before = [&](float& x, int t, int s) { x = s < t && s >= begin[t / 8] ? x : 0.f; };
  for_each(rk, lane, upto);
  for_each(rb, lane, upto);
  for_each(ak, lane, before);
  if (lane == 0) matrices.resets = resets.bits;
  store_block(matrices.rk, rounded(rk), lane);
  store_block(matrices.rb, rounded(rb), lane);
  store_block(matrices.ak, rounded(ak), lane);
  for_each(ab, lane, before);
  auto& square = matrices.square;
  for_each(ab, lane, [&](float& x, int t, int s) { square[t][s] = x; });
  __syncwarp();
  invert(square, lane);
  Tile M;
  for_each(M, lane, [&](float& x, int i, int j) { x = bits_to_float(to_tf32(backward ? square[j][i] : square[i][j])); });
  __syncwarp();
#pragma unroll
  for (int n = 0; n < 2; n++) {
    const float* const c = M.half[n].c;
    matrices.inverse[n][lane] = make_float4(c[0], c[1], c[2], c[3]);
  }
}
DEVICE Tile load_inverse(const Matrices& matrices, int lane) {
  const float4 x = matrices.inverse[0][lane], y = matrices.inverse[1][lane];
  return {{{{x.x, x.y, x.z, x.w}}, {{y.x, y.y, y.z, y.w}}}};
}

// ---- states: a warp holds 16 values by 64 keys, four tiles. Calls use(two elements side by side, their place in (64, 64)).

template <class Use>
DEVICE void for_each_pair(Tile (&state)[4], int warp, int lane, Use use) {
#pragma unroll
  for (int q = 0; q < 4; q++)
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int value = 16 * warp + row_of(lane) + i % 2 * 8, key = 16 * q + i / 2 * 8 + col_of(lane);
      use(state[q].half[i / 2].c + i % 2 * 2, value * N + key);
    }
}
DEVICE void read_state(Tile (&state)[4], const float* from, int64_t matrix, int warp, int lane) {  // null: zeros
  for_each_pair(state, warp, lane, [&](float* x, int i) {
    const float2 pair = from ? *reinterpret_cast<const float2*>(from + matrix + i) : make_float2(0.f, 0.f);
    x[0] = pair.x, x[1] = pair.y;
  });
}
DEVICE void write_state(float* to, int64_t matrix, Tile (&state)[4], int warp, int lane) {
  for_each_pair(state, warp, lane, [&](float* x, int i) {
    *reinterpret_cast<float2*>(to + matrix + i) = make_float2(x[0], x[1]);
  });
}
// columns q of a state, times D
DEVICE void decay(Tile& t, const float (&D)[N], int q, int lane) {
#pragma unroll
  for (int n = 0; n < 2; n++) {
    const float2 d = *reinterpret_cast<const float2*>(&D[16 * q + 8 * n + col_of(lane)]);
    t.half[n] = times(t.half[n], Half{{d.x, d.y, d.x, d.y}});
  }
}

// What the forward pass keeps for the backward pass, for every chunk, as the products used it: the state before it and U, 640
// bytes a token and head. Tiled blocks, by values first.
struct Checkpoint {
  unsigned char state[4][4][BLOCK_BYTES];  // [value, key]
  unsigned char U[4][BLOCK_BYTES];         // [value, token]
};

// ---- forward

template <class W>
struct alignas(16) ForwardShared {
  Factors factors[GROUP];
  union alignas(16) {
    LogWSlices<W> log_w;
    Matrices matrices;
  } more[GROUP];
};
// Four blocks, each with 1 KB for the system, fit into the 228 KB of sm_90.
static_assert(4 * (sizeof(ForwardShared<float>) + 1024) <= 228 * 1024, "the forward kernel's shared memory");

// states: what each (batch row, head, segment) starts from, or null for zeros. final_state and checkpoints may be null.
template <class W>
__global__ void __launch_bounds__(THREADS, FORWARD_BLOCKS)
    chunk_forward(Shape shape, Tensors<W> in, const float* states, bf16* y, float* final_state, Checkpoint* checkpoints) {
  DYNAMIC_SHARED(memory);
  ForwardShared<W>& shared = *reinterpret_cast<ForwardShared<W>*>(memory);
  const int warp = warp_index(), lane = threadIdx.x % 32;
  const int segment = blockIdx.y, first = shape.first(segment), end = shape.first(segment + 1);
  const unsigned stride = shape.stride();

  Tile S[4];
  read_state(S, states, shape.matrix(segment), warp, lane);
  int64_t here = shape.start() + int64_t(first) * L * stride + 16 * warp;
  Checkpoint* kept = checkpoints ? checkpoints + int64_t(blockIdx.x) * shape.chunks() + first : nullptr;

  for (int group = first; group < end; group += GROUP) {
    if (group + warp < end) {
      auto& log_w = shared.more[warp].log_w;
      const Resets resets = copy_chunk(shape, in, group + warp, shared.factors[warp], log_w, lane);
      cp_async_commit();
      cp_async_wait<0>();
      __syncwarp();
      prepare<W, false>(shared.factors[warp], log_w, resets, shared.more[warp].matrices, lane);
    }
    __syncthreads();
    for (int i = 0; i < GROUP && group + i < end; i++) {
      Factors& factors = shared.factors[i];
      const Matrices& matrices = shared.more[i].matrices;
      const Resets resets{matrices.resets};
      const Block V = load_slice_transposed<FIRST>(factors.v[warp], lane);  // [value, token]
      Tile P{}, out{};                                                      // [value, token], [token, value]
#pragma unroll
      for (int q = 0; q < 4; q++) {
        const Block S_q = rounded(S[q]);
        if (kept) store_block(kept->state[warp][q], S_q, lane);
        const Block A_q = load_block<SECOND>(factors.a[q], lane);
        add_product(P, S_q, A_q);
        add_product(P, rest_of(S[q], S_q), A_q);
        add_product(out, load_block<FIRST>(factors.r[q], lane), S_q);
      }
      if (resets.bits) {
        for_each(P, lane, [&](float& x, int, int t) { x = resets.reached(t) ? x : 0.f; });
        for_each(out, lane, [&](float& x, int t, int) { x = resets.reached(t) ? x : 0.f; });
      }
      add_product(P, V, load_block<SECOND>(matrices.ak, lane));
      const Tile U_now = product_tf32(P, load_inverse(matrices, lane));
      const Block U = rounded(U_now);
      if (kept) {
        store_block(kept->U[warp], U, lane);
        kept++;
      }
      add_product(out, load_block<FIRST>(matrices.rk, lane), V);
      add_product(out, load_block<FIRST>(matrices.rb, lane), U);
      __syncwarp();
      write_slice(y + here, rounded(out), stride, shape.T - (group + i) * L, factors.v[warp], lane);  // v is in registers
      here += int64_t(L) * stride;

      Block V_last = V, U_last = U;
      if (resets.bits) {
        const int last = resets.last();
        V_last = kept_columns(V, lane, [&](int t) { return t >= last; });
        U_last = kept_columns(U, lane, [&](int t) { return t >= last; });
#pragma unroll
        for (Tile& t : S) t = Tile{};
      }
#pragma unroll
      for (int q = 0; q < 4; q++) {
        add_product(S[q], V_last, load_transposed<SECOND>(factors.k[q], lane));
        add_product(S[q], U_last, load_transposed<SECOND>(factors.b[q], lane));
        decay(S[q], matrices.D, q, lane);
      }
    }
    __syncthreads();
  }
  if (final_state && blockIdx.y + 1 == gridDim.y) write_state(final_state, int64_t(blockIdx.x) * N * N, S, warp, lane);
}

// ---- segments of T
//
// What a segment makes of a state S before it is S M + A, with matrices M and A of its own: A comes of S = 0, M of S = I with
// V = 0. `segment_maps` finds them for all segments at once, `chain_segments` joins them, and then the kernels above and below run
// all segments at once from the right states. In reverse, the same for G, with gY in place of V. On the way, which in reverse is
// from the last segment to the first, segment 0 starts from what is given, and nothing starts where the last one ends.

// states, maps: (B, H, segments, 64, 64), A and M of every segment where the one after it on the way has its place. in.v: in
// reverse gy. first: (B, H, 64, 64) or null for zeros. blockIdx.y is a segment on the way, blockIdx.z 0 for A and 1 for M.
template <class W, bool reverse>
__global__ void __launch_bounds__(THREADS, FORWARD_BLOCKS)
    segment_maps(Shape shape, Tensors<W> in, const float* first, float* states, float* maps) {
  DYNAMIC_SHARED(memory);
  ForwardShared<W>& shared = *reinterpret_cast<ForwardShared<W>*>(memory);
  const int warp = warp_index(), lane = threadIdx.x % 32;
  const bool from_first = blockIdx.y == 0, adds = blockIdx.z == 0;
  if (from_first && !adds) return;
  const int segment = reverse ? shape.segments - 1 - blockIdx.y : blockIdx.y;
  const int begin = shape.first(segment), count = shape.first(segment + 1) - begin;

  Tile S[4];  // or G
  if (adds) read_state(S, from_first ? first : nullptr, int64_t(blockIdx.x) * N * N, warp, lane);
  else for_each_pair(S, warp, lane, [](float* x, int i) { x[0] = i / N == i % N, x[1] = i / N == i % N + 1; });

  for (int group = 0; group < count; group += GROUP) {
    if (group + warp < count) {
      auto& log_w = shared.more[warp].log_w;
      const int chunk = begin + (reverse ? count - 1 - group - warp : group + warp);
      const Resets resets = copy_chunk(shape, in, chunk, shared.factors[warp], log_w, lane);
      cp_async_commit();
      cp_async_wait<0>();
      __syncwarp();
      prepare<W, reverse>(shared.factors[warp], log_w, resets, shared.more[warp].matrices, lane);
    }
    __syncthreads();
    for (int i = 0; i < GROUP && group + i < count; i++) {
      const Factors& factors = shared.factors[i];
      const Matrices& matrices = shared.more[i].matrices;
      const Resets resets{matrices.resets};
      const int last = resets.last();
      Tile P{};  // or dU; [value, token]
#pragma unroll
      for (int q = 0; q < 4; q++) {
        if (reverse) decay(S[q], matrices.D, q, lane);
        const Block S_q = rounded(S[q]), A_q = load_block<SECOND>(reverse ? factors.b[q] : factors.a[q], lane);
        add_product(P, S_q, A_q);
        add_product(P, rest_of(S[q], S_q), A_q);
      }
      if (resets.bits)
        for_each(P, lane, [&](float& x, int, int t) { x = (reverse ? t >= last : resets.reached(t)) ? x : 0.f; });
      Block V{};  // or gY
      if (adds) {
        V = load_slice_transposed<FIRST>(factors.v[warp], lane);
        add_product(P, V, reverse ? load_transposed<SECOND>(matrices.rb, lane) : load_block<SECOND>(matrices.ak, lane));
      }
      Block U = rounded(product_tf32(P, load_inverse(matrices, lane)));  // or dP
      if (resets.bits) {
        auto kept = [&](int t) { return reverse ? resets.reached(t) : t >= last; };
        V = kept_columns(V, lane, kept);
        U = kept_columns(U, lane, kept);
#pragma unroll
        for (Tile& t : S) t = Tile{};
      }
#pragma unroll
      for (int q = 0; q < 4; q++) {
        if (adds) add_product(S[q], V, load_transposed<SECOND>(reverse ? factors.r[q] : factors.k[q], lane));
        add_product(S[q], U, load_transposed<SECOND>(reverse ? factors.a[q] : factors.b[q], lane));
        if (!reverse) decay(S[q], matrices.D, q, lane);
      }
    }
    __syncthreads();
  }
  write_state(adds ? states : maps, shape.matrix(reverse ? segment - 1 : segment + 1), S, warp, lane);
}

constexpr int CHAIN_ROWS = 16;  // of the 64 of a state, which are independent of each other, in a block of 16 threads a row

// In place, from A to what each segment starts from: A + (what the segment before it on the way starts from) M.
template <bool reverse>
__global__ void __launch_bounds__(16 * CHAIN_ROWS)
    chain_segments(Shape shape, const float* first, float* states, const float* maps) {
  __shared__ float4 before[CHAIN_ROWS][N / 4];
  const int row = threadIdx.x / 16, column = threadIdx.x % 16 * 4, at = (CHAIN_ROWS * blockIdx.y + row) * N + column;
  auto place = [&](int i) { return shape.matrix(reverse ? shape.segments - 1 - i : i); };
  auto four = [](const float* x) { return *reinterpret_cast<const float4*>(x); };
  for (int i = 0; i < shape.segments; i++) {
    float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
    if (i > 0) sum = four(states + place(i) + at);
    else if (first) sum = four(first + int64_t(blockIdx.x) * N * N + at);
    if (i > 1) {  // what segment 1 starts from is there already
      const float* const map = maps + place(i) + column;
#pragma unroll 4
      for (int m = 0; m < N; m += 4) {
        const float4 x = before[row][m / 4], a = four(map + m * N), b = four(map + (m + 1) * N), c = four(map + (m + 2) * N),
                     d = four(map + (m + 3) * N);
        sum.x += x.x * a.x + x.y * b.x + x.z * c.x + x.w * d.x;
        sum.y += x.x * a.y + x.y * b.y + x.z * c.y + x.w * d.y;
        sum.z += x.x * a.z + x.y * b.z + x.z * c.z + x.w * d.z;
        sum.w += x.x * a.w + x.y * b.w + x.z * c.w + x.w * d.w;
      }
    }
    __syncwarp();
    before[row][column / 4] = sum;
    __syncwarp();
    if (i != 1) *reinterpret_cast<float4*>(states + place(i) + at) = sum;
  }
}

// ---- backward

template <class W>
struct alignas(16) BackwardShared {
  struct alignas(16) Chunk {
    Factors factors;
    Matrices matrices;
    unsigned char gy[4][BLOCK_BYTES];  // slices
    LogWSlices<W> log_w;
  } chunk[GROUP];
  Checkpoint checkpoint;
  unsigned char G[4][4][BLOCK_BYTES];                                                // [value, key], tiled, by values first
  unsigned char dP[4][BLOCK_BYTES];                                                  // [value, token], tiled
  unsigned char out[WARPS][BLOCK_BYTES];
};
// A block of threads may have 99 KB on sm_86, 89 and 120.
static_assert(sizeof(BackwardShared<float>) <= 99 * 1024, "the backward kernel's shared memory");

// Sums over the tokens (rows) from each on, in place.
DEVICE void sum_from_each(Tile& t, int lane) {
  const int row = row_of(lane);
#pragma unroll
  for (Half& half : t.half) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      float& x = half.c[i];
#pragma unroll
      for (int rows = 1; rows <= 4; rows *= 2) {
        const float later = __shfl_down_sync(0xffffffffu, x, 4 * rows);
        x += row + rows < 8 ? later : 0.f;
      }
    }
#pragma unroll
    for (int e = 0; e < 2; e++) half.c[e] += __shfl_sync(0xffffffffu, half.c[2 + e], lane % 4);
  }
}
// The sum over all tokens, of column 8 n + col + e, in every lane.
DEVICE float sum_of_column(const Tile& t, int n, int e) {
  float x = t.half[n].c[e] + t.half[n].c[2 + e];
#pragma unroll
  for (int bit = 4; bit <= 16; bit *= 2) x += __shfl_xor_sync(0xffffffffu, x, bit);
  return x;
}

DEVICE void write_tile(bf16* to, const Tile& t, unsigned stride, int tokens, unsigned char* scratch, int lane) {
  __syncwarp();
  write_slice(to, rounded(t), stride, tokens, scratch, lane);
}
DEVICE void write_tile(float* to, const Tile& t, unsigned stride, int tokens, unsigned char*, int lane) {
#pragma unroll
  for (int n = 0; n < 2; n++)
#pragma unroll
    for (int h = 0; h < 2; h++)
      if (row_of(lane) + 8 * h < tokens)
        *reinterpret_cast<float2*>(to + int64_t(row_of(lane) + 8 * h) * stride + 8 * n + col_of(lane)) =
            make_float2(t.half[n].c[2 * h], t.half[n].c[2 * h + 1]);
}

template <class W>
struct Gradients {
  bf16 *r, *k, *v, *a, *b;
  W* log_w;
};

// final_grads: the gradient of the state that each (batch row, head, segment) ends with, or null for zeros. g_state may be null.
template <class W>
__global__ void __launch_bounds__(THREADS, BACKWARD_BLOCKS)
    chunk_backward(Shape shape, Tensors<W> in, const Checkpoint* checkpoints, const bf16* gy, const float* final_grads,
                   Gradients<W> out, float* g_state) {
  DYNAMIC_SHARED(memory);
  BackwardShared<W>& shared = *reinterpret_cast<BackwardShared<W>*>(memory);
  const int warp = warp_index(), lane = threadIdx.x % 32;
  const int segment = blockIdx.y, first = shape.first(segment), end = shape.first(segment + 1);
  const unsigned stride = shape.stride();

  Tile G[4];
  read_state(G, final_grads, shape.matrix(segment), warp, lane);
  auto copy_checkpoint = [&](int chunk) {
    if (chunk >= first) {
      const Checkpoint* const kept = checkpoints + int64_t(blockIdx.x) * shape.chunks() + chunk;
      const unsigned char* const from = reinterpret_cast<const unsigned char*>(kept);
      unsigned char* const to = reinterpret_cast<unsigned char*>(&shared.checkpoint);
#pragma unroll
      for (int i = 0; i < int(sizeof(Checkpoint)) / 16 / THREADS; i++) {
        const int at = 16 * (threadIdx.x + i * THREADS);
        cp_async_16(to + at, from + at);
      }
    }
    cp_async_commit();
  };
  copy_checkpoint(end - 1);

  for (int group = first + (end - first - 1) / GROUP * GROUP; group >= first; group -= GROUP) {
    if (group + warp < end) {
      auto& mine = shared.chunk[warp];
      const Resets resets = copy_chunk(shape, in, group + warp, mine.factors, mine.log_w, lane);
#pragma unroll
      for (int q = 0; q < 4; q++)
        copy_slice(mine.gy[q], gy + shape.start() + int64_t(group + warp) * L * stride + 16 * q, stride,
                   shape.T - (group + warp) * L, lane);
      cp_async_commit();
      cp_async_wait<0>();
      __syncwarp();
      prepare<W, true>(mine.factors, mine.log_w, resets, mine.matrices, lane);
    }
    __syncthreads();

    for (int i = min(GROUP, end - group) - 1; i >= 0; i--) {
      auto& now = shared.chunk[i];
      const Factors& factors = now.factors;
      const Resets resets{now.matrices.resets};
      const int chunk = group + i, tokens = shape.T - chunk * L;
      const int64_t here = shape.start() + int64_t(chunk) * L * stride + 16 * warp;
      unsigned char* const scratch = shared.out[warp];

      // the warp's values: dP, gV and G
      {
        Tile dU{}, gV{};  // [value, token], [token, value]
#pragma unroll
        for (int q = 0; q < 4; q++) {
          decay(G[q], now.matrices.D, q, lane);
          const Block G_q = rounded(G[q]);
          store_block(shared.G[warp][q], G_q, lane);
          const Block B_q = load_block<SECOND>(factors.b[q], lane);
          add_product(dU, G_q, B_q);
          add_product(dU, rest_of(G[q], G_q), B_q);
          add_product(gV, load_block<FIRST>(factors.k[q], lane), G_q);
        }
        if (resets.bits) {
          const int last = resets.last();
          for_each(dU, lane, [&](float& x, int, int t) { x = t >= last ? x : 0.f; });
          for_each(gV, lane, [&](float& x, int t, int) { x = t >= last ? x : 0.f; });
        }
        Block gY = load_slice_transposed<FIRST>(now.gy[warp], lane);  // [value, token]
        add_product(dU, gY, load_transposed<SECOND>(now.matrices.rb, lane));
        Block dP = rounded(product_tf32(dU, load_inverse(now.matrices, lane)));  // [value, token]
        store_block(shared.dP[warp], dP, lane);
        add_product(gV, load_transposed<FIRST>(now.matrices.rk, lane), gY);
        add_product(gV, load_transposed<FIRST>(now.matrices.ak, lane), dP);
        write_tile(out.v + here, gV, stride, tokens, scratch, lane);
        if (resets.bits) {
          gY = kept_columns(gY, lane, [&](int t) { return resets.reached(t); });
          dP = kept_columns(dP, lane, [&](int t) { return resets.reached(t); });
#pragma unroll
          for (Tile& t : G) t = Tile{};
        }
#pragma unroll
        for (int q = 0; q < 4; q++) {
          add_product(G[q], gY, load_transposed<SECOND>(factors.r[q], lane));
          add_product(G[q], dP, load_transposed<SECOND>(factors.a[q], lane));
        }
      }
      cp_async_wait<0>();
      __syncthreads();

      // the warp's keys. First all that sums over values: the part through the states, the diagonal of S^T G, and one of the
      // gradients of the four matrices.
      Tile d_r{}, d_a{}, d_k{}, d_b{}, S_G{}, d_matrix{};
#pragma unroll
      for (int q = 0; q < 4; q++) {
        const Block gY = load_slice<FIRST>(now.gy[q], lane), V = load_slice<FIRST>(factors.v[q], lane),
                    dP = load_transposed<FIRST>(shared.dP[q], lane), U = load_transposed<FIRST>(shared.checkpoint.U[q], lane);
        const Block S = load_transposed<SECOND>(shared.checkpoint.state[q][warp], lane),
                    G_q = load_transposed<SECOND>(shared.G[q][warp], lane);  // [key, value]
        add_product(d_r, gY, S);
        add_product(d_a, dP, S);
        add_product(d_k, V, G_q);
        add_product(d_b, U, G_q);
        add_product(S_G, S, G_q);
        add_product(d_matrix, chosen(warp < 2, gY, dP), chosen(warp % 2 == 0, V, U));
      }
      const int begin[2] = {resets.before(row_of(lane)), resets.before(row_of(lane) + 8)};
      const bool with_itself = warp < 2;  // dArk and dArb have a diagonal
      for_each(d_matrix, lane, [&](float& x, int t, int s) {
        x = s < t + with_itself && s >= begin[t / 8] ? x : 0.f;
      });
      Matrices& d = now.matrices;  // which nobody needs any more
      store_block(warp == 0 ? d.rk : warp == 1 ? d.rb : warp == 2 ? d.ak : d.ab, rounded(d_matrix), lane);
      if (resets.bits) {
        const int last = resets.last();
        auto first = [&](float& x, int t, int) { x = resets.reached(t) ? x : 0.f; };
        for_each(d_r, lane, first);
        for_each(d_a, lane, first);
        auto from_last = [&](float& x, int t, int) { x = t >= last ? x : 0.f; };
        for_each(d_k, lane, from_last);
        for_each(d_b, lane, from_last);
      }
      __syncthreads();
      copy_checkpoint(chunk - 1);

      const Tile Rt = floats(load_block<FIRST>(factors.r[warp], lane)), At = floats(load_block<FIRST>(factors.a[warp], lane)),
                 Ki = floats(load_block<FIRST>(factors.k[warp], lane)), Bi = floats(load_block<FIRST>(factors.b[warp], lane));
      const Tile through_state = plus(times(Ki, d_k), times(Bi, d_b));
      {
        const Block K = load_transposed<SECOND>(factors.k[warp], lane), B = load_transposed<SECOND>(factors.b[warp], lane),
                    R = load_transposed<SECOND>(factors.r[warp], lane), A = load_transposed<SECOND>(factors.a[warp], lane);
        add_product(d_r, load_block<FIRST>(d.rk, lane), K);
        add_product(d_r, load_block<FIRST>(d.rb, lane), B);
        add_product(d_a, load_block<FIRST>(d.ak, lane), K);
        add_product(d_a, load_block<FIRST>(d.ab, lane), B);
        add_product(d_k, load_transposed<FIRST>(d.rk, lane), R);
        add_product(d_k, load_transposed<FIRST>(d.ak, lane), A);
        add_product(d_b, load_transposed<FIRST>(d.rb, lane), R);
        add_product(d_b, load_transposed<FIRST>(d.ab, lane), A);
      }
      const Tile a_part = times(At, d_a);
      Tile g_log_w = minus(plus(times(Rt, d_r), a_part), plus(times(Ki, d_k), times(Bi, d_b)));
      sum_from_each(g_log_w, lane);
      g_log_w = minus(g_log_w, a_part);
#pragma unroll
      for (int n = 0; n < 2; n++)
#pragma unroll
        for (int e = 0; e < 2; e++) {
          // element (j, j), j = 8 n + col + e, of S^T G
          const float S_G_jj = __shfl_sync(0xffffffffu, S_G.half[n].c[2 * n + e], 4 * (col_of(lane) + e) + lane % 4);
          const float sum = sum_of_column(through_state, n, e) + (resets.bits ? 0.f : S_G_jj);
          g_log_w.half[n].c[e] += sum;
          g_log_w.half[n].c[2 + e] += sum;
        }
      if (resets.bits) for_each(g_log_w, lane, [&](float& x, int t, int) { x = resets.bits >> t & 1 ? 0.f : x; });
      write_tile(out.log_w + here, g_log_w, stride, tokens, scratch, lane);
      const Decays<W> decays(now.log_w[warp], lane);
      const Tile to_k = decays.to_k();
      write_tile(out.r + here, times(d_r, decays.to_r()), stride, tokens, scratch, lane);
      write_tile(out.a + here, times(d_a, decays.to_a()), stride, tokens, scratch, lane);
      write_tile(out.k + here, times(d_k, to_k), stride, tokens, scratch, lane);
      write_tile(out.b + here, times(d_b, to_k), stride, tokens, scratch, lane);
    }
    __syncthreads();
  }
  if (g_state && first == 0) write_state(g_state, int64_t(blockIdx.x) * N * N, G, warp, lane);
}

// ---- host

static bool valid(int w_dtype, int64_t B, int64_t T, int64_t H, int segments) {
  return (w_dtype == FLOAT32 || w_dtype == BFLOAT16) && B > 0 && T > 0 && H > 0 && T <= INT32_MAX - GROUP * L && segments > 0 &&
         segments <= 65535 && segments <= (T + L - 1) / L && H <= 1 << 18 && B <= INT32_MAX / H;
}
static Shape shape_of(int64_t T, int64_t H, int segments) {
  const int chunks = static_cast<int>((T + L - 1) / L);
  return {static_cast<int>(T), static_cast<int>(H), segments, (chunks + segments - 1) / segments};
}
template <class W>
static Tensors<W> tensors_of(const void* r, const W* log_w, const void* k, const void* v, const void* a, const void* b,
                             const uint8_t* reset) {
  auto in = [](const void* x) { return static_cast<const bf16*>(x); };
  return {in(r), in(k), in(v), in(a), in(b), log_w, reset};
}

static dim3 grid_of(const Shape& shape, int64_t BH) {
  return dim3(static_cast<unsigned>(BH), static_cast<unsigned>(shape.segments));
}

// What each segment starts from (in reverse: ends with, for G) goes to `states`, where the whole starts from `first`.
template <class W, bool reverse>
static int start_segments(const Shape& shape, int64_t BH, const Tensors<W>& in, const float* first, float* states, void* stream) {
  const unsigned x = static_cast<unsigned>(BH), y = static_cast<unsigned>(shape.segments);
  float* const maps = states + BH * shape.segments * N * N;
  const int error = launch(segment_maps<W, reverse>, dim3(x, y - 1, 2), dim3(THREADS), sizeof(ForwardShared<W>), stream, shape,
                           in, first, states, maps);
  if (error) return error;
  return launch(chain_segments<reverse>, dim3(x, N / CHAIN_ROWS), dim3(16 * CHAIN_ROWS), 0, stream, shape, first, states, maps);
}

// The C interface: device pointers, all but reset aligned to 16 bytes; w_dtype, the dtype of log_w and its gradient, a code
// of device.cuh; a stream. Returns a CUDA error code, 0 for success. `segments`: 1 to ceil(T / 16) and at most 65535; forward
// and backward need not take the same.

extern "C" int64_t wkv7_chunk_checkpoint_bytes(int64_t B, int64_t T, int64_t H) {
  return B * H * ((T + L - 1) / L) * static_cast<int64_t>(sizeof(Checkpoint));
}

// Bytes of `scratch` for forward and backward: the segments' states and maps.
extern "C" int64_t wkv7_chunk_scratch_bytes(int64_t B, int64_t H, int segments) {
  return segments == 1 ? 0 : 2 * B * H * segments * static_cast<int64_t>(N * N * sizeof(float));
}

// A good number of segments: so many that there are two blocks a multiprocessor, but none below 128 tokens; and one where that
// would give less than three, as finding the maps takes about as long as what they are for.
extern "C" int wkv7_chunk_segments(int64_t B, int64_t T, int64_t H, int multiprocessors) {
  const int64_t wanted = 2 * int64_t(multiprocessors) / (B * H), most = T / (8 * L);
  const int64_t segments = wanted < most ? wanted : most;
  return static_cast<int>(segments < 3 ? 1 : segments < 65535 ? segments : 65535);
}

extern "C" int wkv7_chunk_forward(int w_dtype, int64_t B, int64_t T, int64_t H, const void* r, const void* log_w, const void* k,
                                  const void* v, const void* a, const void* b, const float* state /* or null: zeros */,
                                  const uint8_t* reset /* or null: none */, void* y, float* final_state,
                                  void* checkpoints /* or null: no backward pass */, float* scratch, int segments,
                                  void* stream) {
  if (!valid(w_dtype, B, T, H, segments) || !aligned({r, log_w, k, v, a, b, state, y, final_state, checkpoints, scratch}))
    return invalid_value;
  const Shape shape = shape_of(T, H, segments);
  auto run = [&](auto* w) -> int {
    using W = std::remove_const_t<std::remove_pointer_t<decltype(w)>>;
    const auto in = tensors_of(r, w, k, v, a, b, reset);
    if (segments > 1)
      if (const int error = start_segments<W, false>(shape, B * H, in, state, scratch, stream)) return error;
    return launch(chunk_forward<W>, grid_of(shape, B * H), dim3(THREADS), sizeof(ForwardShared<W>), stream, shape, in,
                  segments > 1 ? scratch : state, static_cast<bf16*>(y), final_state, static_cast<Checkpoint*>(checkpoints));
  };
  return w_dtype == BFLOAT16 ? run(static_cast<const bf16*>(log_w)) : run(static_cast<const float*>(log_w));
}

extern "C" int wkv7_chunk_backward(int w_dtype, int64_t B, int64_t T, int64_t H, const void* r, const void* log_w, const void* k,
                                   const void* v, const void* a, const void* b, const uint8_t* reset /* or null: none */,
                                   const void* checkpoints, const void* gy, const float* g_final /* or null: zeros */, void* gr,
                                   void* g_log_w, void* gk, void* gv, void* ga, void* gb,
                                   float* g_state /* or null: not wanted */, float* scratch, int segments, void* stream) {
  if (!valid(w_dtype, B, T, H, segments) ||
      !aligned({r, log_w, k, v, a, b, checkpoints, gy, g_final, gr, g_log_w, gk, gv, ga, gb, g_state, scratch}))
    return invalid_value;
  const Shape shape = shape_of(T, H, segments);
  auto run = [&](auto* w, auto* gw) -> int {
    using W = std::remove_pointer_t<decltype(gw)>;
    if (segments > 1)
      if (const int error = start_segments<W, true>(shape, B * H, tensors_of(r, w, k, gy, a, b, reset), g_final, scratch, stream))
        return error;
    auto to = [](void* x) { return static_cast<bf16*>(x); };
    return launch(chunk_backward<W>, grid_of(shape, B * H), dim3(THREADS), sizeof(BackwardShared<W>), stream, shape,
                  tensors_of(r, w, k, v, a, b, reset), static_cast<const Checkpoint*>(checkpoints), static_cast<const bf16*>(gy),
                  segments > 1 ? scratch : g_final, Gradients<W>{to(gr), to(gk), to(gv), to(ga), to(gb), gw}, g_state);
  };
  return w_dtype == BFLOAT16 ? run(static_cast<const bf16*>(log_w), static_cast<bf16*>(g_log_w))
                             : run(static_cast<const float*>(log_w), static_cast<float*>(g_log_w));
}
