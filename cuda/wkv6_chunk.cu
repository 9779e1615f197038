// WKV6 in chunks of 16 tokens on tensor cores: head size 64, bf16 tensors, fp32 states. The fast path of training.
//
//   S_t = diag(w_t) S_{t-1} + k_t^T v_t          w = exp(log_w)
//   y_t = r_t (S_{t-1} + diag(u) k_t^T v_t)
//
// One block is one (batch row, head[, segment of T]) and walks over its chunks; the state never leaves its registers. With S
// the state before a chunk, s and t tokens of the chunk, and decays per key channel:
//
//   rt_t = r_t exp(sum of log_w over tokens < t)    kh_s = k_s exp(sum over tokens > s)    D = exp(sum over the chunk)
//   A[t,s] = sum over channels of r_t k_s exp(sum over tokens between s and t) for s < t;  A[t,t] = r_t . (u k_t);  else 0
//   y = rt S + A v                                  S <- diag(D) S + kh^T v
//
// Backward, chunks from the last to the first, G the gradient of the state after the chunk, gA = gy v^T for s < t:
//   gr = exp(..rt) (gy S^T) + (the part through A) + u k gA_tt        gv = kh G + A^T gy        gA_tt = gy_t . v_t
//   gk = exp(..kh) (v G^T)  + (the part through A) + u r gA_tt        G <- diag(D) G + rt^T gy  gu = sum of r k gA_tt
//   g_log_w_t = D sum_j S[,j] G[,j] + sum over i > t of rt_i (gy S^T)_i + sum over s < t of kh_s (v G^T)_s
//               + sum over pairs s < t < i of the pair's share of A . gA
// The last line is a suffix sum of r times its gradient through A minus one of k times its gradient through A. They cancel
// where decays are strong, so both are formed from the same rounded operands; the usual running sum of r gr - k gk
// over all of T, of rounded gradients, is wrong by half under strong decay.
//
// Scores without overflow. The exponential in A must be a factor of t times a factor of s to become a matrix product.
// Both are taken relative to the middle of the half chunk (8 tokens) in which s lies, before token 4 or 12:
//   near_t = r_t exp(sum from the middle of t's own half to t)      (t before the middle: minus the sum from t to it)
//   far_t  = r_t exp(sum from token 4 to t), t in the second half, for s in the first
//   kk_s   = k_s exp(sum from s to the middle of its half)          (s after the middle: minus the sum)
// A positive exponent spans at most four tokens. log_w is clamped at -16.625 (24 bits a step: a decay of 6e-8, which no
// output in bf16 can tell from 0; -inf becomes that too), so it stays below 2^96 and leaves 2^31 for |r| and |k|. Where
// log_w is clamped its gradient is 0.
//
// Operands of the tensor cores are bf16, everything else is fp32. No atomics and one fixed order of additions: results are
// the same bit for bit on every run. Everything is built from one product, X Y^T of 16x16 blocks (`add_product`).
//
// Tensors (B, T, H, 64) contiguous, u (H, 64), states (B, H, 64, 64) indexed [key, value], gu (B, H, 64), a row per batch row.
#include "device.cuh"

constexpr int N = 64, L = 16;  // head size; tokens of a chunk
constexpr int WARPS = 4;       // a warp owns 16 of the 64 channels
constexpr int THREADS = 32 * WARPS;
constexpr float LOG2_E = 1.44269504f;
constexpr float MIN_LOG_W = -16.625f;
constexpr uint32_t MIN_LOG_W_TWICE = 0xc185c185u;  // as bf16, in both halves
constexpr uint32_t ONES = 0x3f803f80u;

struct Shape {
  int T, H, segments;
  __device__ int chunks() const { return (T + L - 1) / L; }
};

// ---- 16x16 blocks and the one product
//
// A block of bf16 is spread over the warp as mma wants its first operand: register h + 2 n of a lane holds elements
// (row + 8 h, 8 n + col) and (row + 8 h, 8 n + col + 1), row = lane / 4, col = 2 (lane % 4). The same registers, paired
// otherwise, are mma's second operand for the transposed block. A tile is the 16x16 result: c[n][2 h + e] is element
// (row + 8 h, 8 n + col + e), so a rounded tile is a block again.

struct Block {
  uint32_t x[4];
};
struct Tile {
  float c[2][4];
};

DEVICE int row_of(int lane) { return lane / 4; }
DEVICE int col_of(int lane) { return 2 * (lane % 4); }

// columns 8 n to 8 n + 7 of d += a b^T
template <int n>
DEVICE void add_half_product(Tile& d, const Block& a, const Block& b) {
  mma_bf16(d.c[n], a.x, b.x[n], b.x[n + 2]);
}
DEVICE void add_product(Tile& d, const Block& a, const Block& b) {
  add_half_product<0>(d, a, b);
  add_half_product<1>(d, a, b);
}

DEVICE Block rounded(const Tile& t) {
  Block b;
#pragma unroll
  for (int i = 0; i < 4; i++) b.x[i] = pack_bf16(t.c[i / 2][i % 2 * 2], t.c[i / 2][i % 2 * 2 + 1]);
  return b;
}
DEVICE Tile floats(const Block& b) {
  Tile t;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    t.c[i / 2][i % 2 * 2] = low_bf16(b.x[i]);
    t.c[i / 2][i % 2 * 2 + 1] = high_bf16(b.x[i]);
  }
  return t;
}
// out = f(in...), element by element
template <class F, class... In>
DEVICE Tile each(F f, const In&... in) {
  Tile out;
#pragma unroll
  for (int i = 0; i < 8; i++) out.c[i / 4][i % 4] = f(in.c[i / 4][i % 4]...);
  return out;
}
template <class F>
DEVICE Tile indexed(F f) {  // out.c[n][i] = f(n, i)
  Tile out;
#pragma unroll
  for (int i = 0; i < 8; i++) out.c[i / 4][i % 4] = f(i / 4, i % 4);
  return out;
}
DEVICE Tile times(const Tile& a, const Tile& b) {
  return each([](float x, float y) { return x * y; }, a, b);
}
DEVICE Block scaled(const Block& b, const Tile& by) { return rounded(times(floats(b), by)); }

// ---- blocks in shared memory. Each form is free of bank conflicts for the accesses named here.
//
// slice: 16 tokens, 32 bytes each, of one warp's channels; the two 16-byte pieces swapped in every other four rows.
// sheet: 16 tokens, 128 bytes each, all channels; piece p of row i lies at p ^ (i % 8).
// tiled: the four registers of a block one after the other, each an 8x8 matrix of 128 bytes.
//
// mma's first operand is four registers in a row, the second pairs of two: ldmatrix can load in the order of either use, and
// saves moves when told which.

constexpr int BLOCK_BYTES = 512, SHEET_BYTES = 2048;
enum Order { FIRST, SECOND };

// Which 8x8 matrix of the block, and which row of it, a lane addresses for ldmatrix.
struct Part {
  int h, n, i;
  __device__ Part(int lane, Order order)
      : h(order == FIRST ? lane >> 3 & 1 : lane >> 4), n(order == FIRST ? lane >> 4 : lane >> 3 & 1), i(lane & 7) {}
};
template <Order order, bool transposed>
DEVICE Block load_block(const unsigned char* row) {
  uint32_t x[4];
  if constexpr (transposed) ldmatrix_trans<4>(x, row);
  else ldmatrix<4>(x, row);
  if constexpr (order == FIRST) return {{x[0], x[1], x[2], x[3]}};
  else return {{x[0], x[2], x[1], x[3]}};
}

DEVICE int slice_offset(int token, int piece) { return token * 32 + ((piece ^ (token >> 2 & 1)) << 4); }
template <Order order>
DEVICE Block load_slice(const unsigned char* slice, int lane) {
  const Part part(lane, order);
  return load_block<order, false>(slice + slice_offset(part.i + 8 * part.h, part.n));
}
template <Order order>
DEVICE Block load_slice_transposed(const unsigned char* slice, int lane) {
  const Part part(lane, order);
  return load_block<order, true>(slice + slice_offset(part.i + 8 * part.n, part.h));
}

// The block of channels 16 q to 16 q + 15. q changes two bits of the offset, and they carry nothing.
DEVICE int sheet_offset(int token, int piece) { return token * 128 + ((piece ^ (token & 7)) << 4); }
template <Order order>
DEVICE Block load_sheet(const unsigned char* sheet, int q, int lane) {
  const Part part(lane, order);
  return load_block<order, false>(sheet + (sheet_offset(part.i + 8 * part.h, part.n) ^ (q << 5)));
}
template <Order order>
DEVICE Block load_sheet_transposed(const unsigned char* sheet, int q, int lane) {
  const Part part(lane, order);
  return load_block<order, true>(sheet + (sheet_offset(part.i + 8 * part.n, part.h) ^ (q << 5)));
}

DEVICE void store_tiled(unsigned char* tiled, const Block& b, int lane) {
#pragma unroll
  for (int i = 0; i < 4; i++) *reinterpret_cast<uint32_t*>(tiled + 128 * i + 4 * lane) = b.x[i];
}
template <Order order>
DEVICE Block load_tiled_transposed(const unsigned char* tiled, int lane) {
  const Part part(lane, order);
  return load_block<order, true>(tiled + 128 * (part.n + 2 * part.h) + 16 * part.i);
}

// ---- global memory <-> shared memory. `from` and `to` in global memory are the chunk's first token, and for slices the
// warp's first channel; `stride` elements from token to token. Tokens from `tokens` on are beyond T: they read as zeros
// (no key, no decay) and are not written.

template <class X>
constexpr int slice_bytes = L * 16 * sizeof(X);

DEVICE void copy_slice(unsigned char* to, const bf16* from, int64_t stride, int tokens, int lane) {
  const int token = lane / 2, piece = lane % 2;
  cp_async_16(to + slice_offset(token, piece), from + token * stride + 8 * piece, token < tokens);
}
// A slice of floats: 64 bytes a token, piece p of row i at p ^ (i / 2 % 4).
DEVICE int float_slice_offset(int token, int piece) { return token * 64 + ((piece ^ (token >> 1 & 3)) << 4); }
DEVICE void copy_slice(unsigned char* to, const float* from, int64_t stride, int tokens, int lane) {
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const int token = lane / 4 + 8 * i, piece = lane % 4;
    cp_async_16(to + float_slice_offset(token, piece), from + token * stride + 4 * piece, token < tokens);
  }
}
DEVICE void copy_sheet(unsigned char* to, const bf16* from, int64_t stride, int tokens, int thread) {
  const int token = thread / 8, piece = thread % 8;
  cp_async_16(to + sheet_offset(token, piece), from + token * stride + 8 * piece, token < tokens);
}

// b[token, channel], through `scratch` (BLOCK_BYTES of the warp's own).
DEVICE void write_slice(bf16* to, const Block& b, int64_t stride, int tokens, unsigned char* scratch, int lane) {
#pragma unroll
  for (int i = 0; i < 4; i++)
    *reinterpret_cast<uint32_t*>(scratch + slice_offset(row_of(lane) + 8 * (i % 2), i / 2) + 2 * col_of(lane)) = b.x[i];
  __syncwarp();
  const int token = lane / 2, piece = lane % 2;
  const uint4 x = *reinterpret_cast<const uint4*>(scratch + slice_offset(token, piece));
  if (token < tokens) *reinterpret_cast<uint4*>(to + token * stride + 8 * piece) = x;
}

// ---- decays
//
// Sums of log_w over ranges of tokens are products with matrices of 0 and 1, exact in bf16. A float log_w is taken as the
// sum of two bf16, 16 bits of it, so that both types go the same way.

template <class W>
struct LogDecay {  // [channel, token], clamped
  Block part[sizeof(W) == 2 ? 1 : 2];
};

template <Order order>
DEVICE void load(LogDecay<bf16>& w, const unsigned char* slice, int lane) {
  w.part[0] = load_slice_transposed<order>(slice, lane);
#pragma unroll
  for (uint32_t& x : w.part[0].x) x = max_bf16(x, MIN_LOG_W_TWICE);
}
template <Order>
DEVICE void load(LogDecay<float>& w, const unsigned char* slice, int lane) {
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const int channel = row_of(lane) + 8 * (i % 2), token = col_of(lane) + 8 * (i / 2);
    const unsigned char* at = slice + float_slice_offset(token, channel / 4) + channel % 4 * 4;  // token + 1: 64 bytes on
    const float a = fmaxf(*reinterpret_cast<const float*>(at), MIN_LOG_W),
                b = fmaxf(*reinterpret_cast<const float*>(at + 64), MIN_LOG_W);
    const uint32_t high = pack_bf16(a, b);
    w.part[0].x[i] = high;
    w.part[1].x[i] = pack_bf16(a - low_bf16(high), b - high_bf16(high));
  }
}

// A range of tokens s for every token t. In all of them a token of the second half has the whole first half in its range and
// one of the first half nothing of the second, and within a half the two halves are alike: one 8x8 matrix, this lane's
// register of it, says it all.
struct Ranges {
  uint32_t before, upto, middle;  // s < t;  s <= t;  s before the middle of t's half
  __device__ explicit Ranges(int lane) {
    const int t = row_of(lane), s = col_of(lane);
    const uint32_t low = ONES & 0xffff, high = ONES ^ low;
    before = (s < t ? low : 0) | (s + 1 < t ? high : 0);
    upto = (s <= t ? low : 0) | (s + 1 <= t ? high : 0);
    middle = s < 4 ? ONES : 0;
  }
};

template <class W>
DEVICE Tile sums_by_token(uint32_t range, const LogDecay<W>& w) {  // [token, channel]
  Tile sums{};
#pragma unroll
  for (const Block& part : w.part) add_product(sums, Block{{range, ONES, 0, range}}, part);
  return sums;
}

// ---- what the forward pass keeps for the backward pass, for every chunk
//
// The state before the chunk, rounded to bf16 as the products used it (8 KB), and the scores A (0.5 KB): 544 bytes a token
// and head, written and read once, beside the 640 bytes that the forward and 1152 that the backward pass must move. A state
// every 64 tokens would save 768 of those 1088 bytes; it would cost a second pass over k, v and log_w, and three more
// dependent steps for every four.

struct Checkpoint {
  unsigned char state[4][4][BLOCK_BYTES];  // [keys][values]: tiled blocks of S^T
  unsigned char scores[BLOCK_BYTES];       // tiled A
};

// ---- where a block of threads works

struct Place {
  int64_t bh;      // (batch row, head)
  int chunk, end;  // chunks [chunk, end)
  int64_t stride;  // elements from token to token
  int64_t start;   // of the sequence: first token, first channel

  __device__ Place(const Shape& shape, unsigned block) {
    const int64_t chunks = shape.chunks();
    const unsigned segment = block % shape.segments;
    bh = block / shape.segments;
    chunk = static_cast<int>(chunks * segment / shape.segments);
    end = static_cast<int>(chunks * (segment + 1) / shape.segments);
    stride = int64_t(shape.H) * N;
    start = bh / shape.H * shape.T * stride + bh % shape.H * N;
  }
};

// ---- forward
//
// A warp first prepares r, k and log_w of its 16 key channels, for all 16 tokens, and gives the others through `exchange`
// what they need: rt, kh, and its share of the scores. After the barrier it owns 16 value channels: S^T is four tiles of
// its registers, 16 values by 16 keys each, and y its 16 columns. There are two exchanges in turn, so that one barrier a
// chunk is enough. Inputs arrive by cp.async two chunks ahead, only for the warp that reads them.

template <class W>
struct alignas(16) ForwardShared {
  struct alignas(16) Inputs {
    unsigned char r[BLOCK_BYTES], k[BLOCK_BYTES], v[BLOCK_BYTES], log_w[slice_bytes<W>];
  } inputs[WARPS][3];
  struct alignas(16) Exchange {
    uint4 rt[WARPS][32];                   // blocks [token, key] of a warp's keys, as the lanes hold them
    unsigned char kh[WARPS][BLOCK_BYTES];  // tiled blocks [token, key]
    float4 scores[WARPS][32];              // a warp's share of A: tiles (0, 0) and (1, 0)
    float2 scores_11[WARPS][32];           // and (1, 1)
    float D[N];
  } exchange[2];
  unsigned char y[WARPS][BLOCK_BYTES];
};

// states: what each (batch row, head, segment) starts from, or null for zeros. final_state and checkpoints may be null.
template <class W>
__global__ void __launch_bounds__(THREADS, 4)
    chunk_forward(Shape shape, const bf16* r, const bf16* k, const bf16* v, const W* log_w, const float* u,
                  const float* states, bf16* y, float* final_state, Checkpoint* checkpoints) {
  DYNAMIC_SHARED(memory);
  ForwardShared<W>& shared = *reinterpret_cast<ForwardShared<W>*>(memory);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, row = row_of(lane), col = col_of(lane);
  const Place place(shape, blockIdx.x);
  const Ranges ranges(lane);

  Tile S[4];
  auto for_each_of_state = [&](auto use) {  // an element of S and its place in a state
#pragma unroll
    for (int q = 0; q < 4; q++)
#pragma unroll
      for (int i = 0; i < 8; i++) {
        const int value = 16 * warp + row + i % 4 / 2 * 8, key = 16 * q + i / 4 * 8 + col + i % 2;
        use(S[q].c[i / 4][i % 4], key * N + value);
      }
  };
  for_each_of_state([&](float& x, int i) { x = states ? states[int64_t(blockIdx.x) * N * N + i] : 0.f; });
  Tile bonus;  // u, [token, key] of the warp's keys
#pragma unroll
  for (int i = 0; i < 8; i++)
    bonus.c[i / 4][i % 4] = u[place.bh % shape.H * N + 16 * warp + i / 4 * 8 + col + i % 2];

  const int64_t step = L * place.stride;
  int64_t here = place.start + place.chunk * step + 16 * warp, ahead = here;
  auto copy = [&](int chunk, int slot) {
    if (chunk < place.end) {
      const int tokens = shape.T - chunk * L;
      auto& to = shared.inputs[warp][slot];
      copy_slice(to.r, r + ahead, place.stride, tokens, lane);
      copy_slice(to.k, k + ahead, place.stride, tokens, lane);
      copy_slice(to.v, v + ahead, place.stride, tokens, lane);
      copy_slice(to.log_w, log_w + ahead, place.stride, tokens, lane);
    }
    ahead += step;
    cp_async_commit();
  };
  copy(place.chunk, 0);
  copy(place.chunk + 1, 1);
  Checkpoint* kept = checkpoints ? checkpoints + place.bh * shape.chunks() + place.chunk : nullptr;

  int slot = 0;
  for (int chunk = place.chunk; chunk < place.end; chunk++) {
    const auto& inputs = shared.inputs[warp][slot];
    auto& exchange = shared.exchange[chunk % 2];
    cp_async_wait<1>();
    __syncwarp();
    const Block r_now = load_slice<FIRST>(inputs.r, lane), k_now = load_slice<SECOND>(inputs.k, lane);
    LogDecay<W> w;
    load<SECOND>(w, inputs.log_w, lane);
    copy(chunk + 2, slot > 0 ? slot - 1 : 2);

    // the warp's keys; n, i, e index tiles. `whole` does not depend on the token, `middle` on its half alone.
    const Tile before = sums_by_token(ranges.before, w), upto = sums_by_token(ranges.upto, w);
    Tile middle = sums_by_token(ranges.middle, w), whole{};
#pragma unroll
    for (const Block& part : w.part) add_product(whole, Block{{ONES, ONES, ONES, ONES}}, part);
    Tile to_rt, to_kh, to_near, to_far{}, to_kk;
#pragma unroll
    for (int n = 0; n < 2; n++) {
#pragma unroll
      for (int i = 0; i < 4; i++) middle.c[n][i] *= LOG2_E;
#pragma unroll
      for (int e = 0; e < 2; e++) {
        const float whole_bits = LOG2_E * whole.c[n][e];
        whole.c[n][e] = ex2(whole_bits);
#pragma unroll
        for (int i = e; i < 4; i += 2) {
          to_rt.c[n][i] = ex2(LOG2_E * before.c[n][i]);
          to_kh.c[n][i] = ex2(whole_bits - LOG2_E * upto.c[n][i]);
          to_near.c[n][i] = ex2(LOG2_E * before.c[n][i] - middle.c[n][i]);
          to_kk.c[n][i] = ex2(middle.c[n][i] - LOG2_E * upto.c[n][i]);
        }
        to_far.c[n][2 + e] = ex2(LOG2_E * before.c[n][2 + e] - middle.c[n][e]);
      }
    }
    const Block rt = scaled(r_now, to_rt), near = scaled(r_now, to_near), far = scaled(r_now, to_far),
                kk = scaled(k_now, to_kk);
    exchange.rt[warp][lane] = make_uint4(rt.x[0], rt.x[1], rt.x[2], rt.x[3]);
    store_tiled(exchange.kh[warp], scaled(k_now, to_kh), lane);
    if (row == 0) {
#pragma unroll
      for (int n = 0; n < 2; n++)
        *reinterpret_cast<float2*>(&exchange.D[16 * warp + 8 * n + col]) = make_float2(whole.c[n][0], whole.c[n][1]);
    }
    Tile scores{}, diagonal{};
    add_half_product<0>(scores, Block{{near.x[0], far.x[1], near.x[2], far.x[3]}}, kk);
    add_half_product<1>(scores, near, kk);
    add_product(diagonal, scaled(r_now, bonus), k_now);
    auto causal = [&](int n, int i) {  // an element of the two 8x8 matrices on the diagonal
      const int s = col + i % 2;
      return s < row ? scores.c[n][i] : s == row ? diagonal.c[n][i] : 0.f;
    };
    exchange.scores[warp][lane] = make_float4(causal(0, 0), causal(0, 1), scores.c[0][2], scores.c[0][3]);
    exchange.scores_11[warp][lane] = make_float2(causal(1, 2), causal(1, 3));
    __syncthreads();

    // the warp's values
    float4 a = exchange.scores[0][lane];
    float2 a_11 = exchange.scores_11[0][lane];
#pragma unroll
    for (int i = 1; i < WARPS; i++) {
      const float4 b = exchange.scores[i][lane];
      const float2 b_11 = exchange.scores_11[i][lane];
      a.x += b.x, a.y += b.y, a.z += b.z, a.w += b.w;
      a_11.x += b_11.x, a_11.y += b_11.y;
    }
    const Block A{{pack_bf16(a.x, a.y), pack_bf16(a.z, a.w), 0, pack_bf16(a_11.x, a_11.y)}};
    const Block v_now = load_slice_transposed<FIRST>(inputs.v, lane);  // [value, token]
    Tile out{};
    add_product(out, A, v_now);
#pragma unroll
    for (int q = 0; q < 4; q++) {
      const Block S_q = rounded(S[q]);
      if (kept) store_tiled(kept->state[q][warp], S_q, lane);
      const uint4 x = exchange.rt[q][lane];
      add_product(out, Block{{x.x, x.y, x.z, x.w}}, S_q);
    }
    if (kept) {
      const uint32_t mine = warp == 0 ? A.x[0] : warp == 1 ? A.x[1] : warp == 2 ? A.x[2] : A.x[3];
      *reinterpret_cast<uint32_t*>(kept->scores + 128 * warp + 4 * lane) = mine;
      kept++;
    }
    write_slice(y + here, rounded(out), place.stride, shape.T - chunk * L, shared.y[warp], lane);
    here += step;
#pragma unroll
    for (int q = 0; q < 4; q++) {
#pragma unroll
      for (int n = 0; n < 2; n++) {
        const float2 D = *reinterpret_cast<const float2*>(&exchange.D[16 * q + 8 * n + col]);
        S[q].c[n][0] *= D.x, S[q].c[n][1] *= D.y, S[q].c[n][2] *= D.x, S[q].c[n][3] *= D.y;
      }
      add_product(S[q], v_now, load_tiled_transposed<SECOND>(exchange.kh[q], lane));
    }
    slot = slot < 2 ? slot + 1 : 0;
  }
  if (final_state && place.end == shape.chunks())
    for_each_of_state([&](float& x, int i) { final_state[place.bh * N * N + i] = x; });
}

// ---- key channels as rows
//
// The other kernels keep a state as [key, value], 16 keys a warp, and so want r, k and log_w as [channel, token].

template <class W>
struct Decays {        // of the warp's 16 channels; channel row + 8 h, token 8 n + col + e
  Tile before, upto;   // [channel, token]: the sums over tokens < t and <= t
  float middle[2][2];  // [n][h]: over tokens before the middle of the half chunk n, in bits
  float whole[2];      // [h]: over the chunk, in bits

  __device__ Decays(const Ranges& ranges, const LogDecay<W>& w) {
    float first_half[4] = {}, all[4];
#pragma unroll
    for (const Block& part : w.part) mma_bf16_k8(first_half, part.x, ONES);
    before = sums(ranges.before, first_half, w);
    upto = sums(ranges.upto, first_half, w);
    const Tile to_middle = sums(ranges.middle, first_half, w);
#pragma unroll
    for (int i = 0; i < 4; i++) all[i] = first_half[i];
#pragma unroll
    for (const Block& part : w.part) mma_bf16_k8(all, part.x + 2, ONES);
#pragma unroll
    for (int h = 0; h < 2; h++) {
      whole[h] = LOG2_E * all[2 * h];
      middle[0][h] = LOG2_E * to_middle.c[0][2 * h];
      middle[1][h] = LOG2_E * to_middle.c[1][2 * h];
    }
  }
  __device__ static Tile sums(uint32_t range, const float (&first_half)[4], const LogDecay<W>& w) {
    Tile t{};
#pragma unroll
    for (int i = 0; i < 4; i++) t.c[1][i] = first_half[i];
#pragma unroll
    for (const Block& part : w.part) {
      mma_bf16_k8(t.c[0], part.x, range);
      mma_bf16_k8(t.c[1], part.x + 2, range);
    }
    return t;
  }

  // What the factors of rt, kh, near, far (its second half alone) and kk multiply r and k with.
  __device__ Tile to_rt() const {
    return each([](float sum) { return ex2(LOG2_E * sum); }, before);
  }
  __device__ Tile to_kh() const {
    return indexed([&](int n, int i) { return ex2(whole[i / 2] - LOG2_E * upto.c[n][i]); });
  }
  __device__ Tile to_near() const {
    return indexed([&](int n, int i) { return ex2(LOG2_E * before.c[n][i] - middle[n][i / 2]); });
  }
  __device__ Tile to_far() const {
    return indexed([&](int n, int i) { return n ? ex2(LOG2_E * before.c[1][i] - middle[0][i / 2]) : 0.f; });
  }
  __device__ Tile to_kk() const {
    return indexed([&](int n, int i) { return ex2(middle[n][i / 2] - LOG2_E * upto.c[n][i]); });
  }
};

// A state as the warp holds it: four tiles of 16 keys by 16 values. An element and its place in a state.
template <class Use>
DEVICE void for_each_of_keys(Tile (&state)[4], int warp, int lane, Use use) {
#pragma unroll
  for (int q = 0; q < 4; q++)
#pragma unroll
    for (int i = 0; i < 8; i++) {
      const int key = 16 * warp + row_of(lane) + i % 4 / 2 * 8, value = 16 * q + i / 4 * 8 + col_of(lane) + i % 2;
      use(state[q].c[i / 4][i % 4], key * N + value);
    }
}
// state = diag(D) state + x z^T, x: [key, token], z: a sheet [token, value]
DEVICE void update(Tile (&state)[4], const float (&D)[2], const Block& x, const unsigned char* z, int lane) {
#pragma unroll
  for (int q = 0; q < 4; q++) {
#pragma unroll
    for (int i = 0; i < 8; i++) state[q].c[i / 4][i % 4] *= D[i % 4 / 2];
    add_product(state[q], x, load_sheet_transposed<SECOND>(z, q, lane));
  }
}

// ---- segments of T, where (batch row, head) pairs are too few to fill the GPU
//
// `segment_states` takes every segment from a zero state, `chain_segments` joins them, and then the kernels above and below
// run all segments at once from the right states. In reverse, the same for G, with r and gy in place of k and v.

template <class W>
struct alignas(16) SegmentShared {
  struct alignas(16) Inputs {
    unsigned char z[SHEET_BYTES], x[WARPS][BLOCK_BYTES], log_w[WARPS][slice_bytes<W>];
  } inputs[3];
};

// states: (B, H, segments, 64, 64); decays: (B, H, segments, 64), of a whole segment.
template <class W, bool reverse>
__global__ void __launch_bounds__(THREADS, 4)
    segment_states(Shape shape, const bf16* x, const bf16* z, const W* log_w, float* states, float* decays) {
  DYNAMIC_SHARED(memory);
  SegmentShared<W>& shared = *reinterpret_cast<SegmentShared<W>*>(memory);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const Place place(shape, blockIdx.x);
  if (reverse ? place.chunk == 0 : place.end == shape.chunks()) return;  // nobody starts from its end
  const Ranges ranges(lane);

  const int64_t step = reverse ? -L * place.stride : L * place.stride;
  const int count = place.end - place.chunk, first = reverse ? place.end - 1 : place.chunk;
  int64_t ahead = place.start + first * L * place.stride;
  auto copy = [&](int i, int slot) {
    if (i < count) {
      const int tokens = shape.T - (reverse ? first - i : first + i) * L;
      auto& to = shared.inputs[slot];
      copy_sheet(to.z, z + ahead, place.stride, tokens, threadIdx.x);
      copy_slice(to.x[warp], x + ahead + 16 * warp, place.stride, tokens, lane);
      copy_slice(to.log_w[warp], log_w + ahead + 16 * warp, place.stride, tokens, lane);
    }
    ahead += step;
    cp_async_commit();
  };
  copy(0, 0);
  copy(1, 1);

  Tile state[4] = {};
  float total[2] = {};
  int slot = 0;
  for (int i = 0; i < count; i++) {
    const auto& inputs = shared.inputs[slot];
    cp_async_wait<1>();
    __syncthreads();
    copy(i + 2, slot > 0 ? slot - 1 : 2);
    LogDecay<W> w;
    load<FIRST>(w, inputs.log_w[warp], lane);
    const Decays<W> decays_now(ranges, w);
    const Block factor = scaled(load_slice_transposed<FIRST>(inputs.x[warp], lane),
                                reverse ? decays_now.to_rt() : decays_now.to_kh());
    const float D[2] = {ex2(decays_now.whole[0]), ex2(decays_now.whole[1])};
    update(state, D, factor, inputs.z, lane);
    total[0] += decays_now.whole[0], total[1] += decays_now.whole[1];
    slot = slot < 2 ? slot + 1 : 0;
  }
  for_each_of_keys(state, warp, lane, [&](float& e, int i) { states[int64_t(blockIdx.x) * N * N + i] = e; });
  if (col_of(lane) == 0)
    for (int h = 0; h < 2; h++)
      decays[int64_t(blockIdx.x) * N + 16 * warp + row_of(lane) + 8 * h] = ex2(total[h]);
}

// In place, a block per (batch row, head): from what each segment adds to a zero state, to what each segment starts from.
template <bool reverse>
__global__ void chain_segments(int segments, const float* first, float* states, const float* decays) {
  states += int64_t(blockIdx.x) * segments * N * N;
  decays += int64_t(blockIdx.x) * segments * N;
  for (int i = threadIdx.x; i < N * N; i += blockDim.x) {
    float running = first ? first[int64_t(blockIdx.x) * N * N + i] : 0.f;
    for (int j = 0; j < segments; j++) {
      const int segment = reverse ? segments - 1 - j : j;
      float& state = states[int64_t(segment) * N * N + i];
      const float next = j + 1 < segments ? decays[int64_t(segment) * N + i / N] * running + state : 0.f;
      state = running;
      running = next;
    }
  }
}

// ---- backward
//
// A warp owns 16 key channels: G is four tiles [16 keys, 16 values] of its registers, and gr, gk, g_log_w are its own
// business, as [key, token]. Only gv needs all keys: the warps put G and kh into `exchange`, and after the barrier, the only
// one of a chunk, each makes gv for 16 value channels. r, k, log_w and the state come by cp.async for the warp that reads
// them, one chunk ahead, into the place they are read from; gy, v and A for all, two chunks ahead.

template <class W>
struct alignas(16) BackwardShared {
  struct alignas(16) Inputs {
    unsigned char r[BLOCK_BYTES], k[BLOCK_BYTES], log_w[slice_bytes<W>], state[4][BLOCK_BYTES];
  } inputs[WARPS];
  struct alignas(16) Sheets {
    unsigned char gy[SHEET_BYTES], v[SHEET_BYTES], scores[BLOCK_BYTES];
  } sheets[3];
  struct alignas(16) Exchange {
    unsigned char G[WARPS][4][BLOCK_BYTES];  // [keys][values]: tiled blocks
    unsigned char kh[WARPS][BLOCK_BYTES];    // tiled blocks [key, token]
  } exchange[2];
  unsigned char scratch[WARPS][3][BLOCK_BYTES];
};

// From [channel, token] in `tiled` to [token, channel] in global memory: ldmatrix gathers four neighbouring channels a lane.
// Rows of the odd (second eight channels) 8x8 matrices of `tiled` are swapped in pairs, so that this meets no bank twice.
DEVICE void store_for_transposition(unsigned char* tiled, const Block& b, int lane) {
#pragma unroll
  for (int i = 0; i < 4; i++) *reinterpret_cast<uint32_t*>(tiled + 128 * i + (4 * lane ^ i % 2 * 32)) = b.x[i];
}
DEVICE void write_transposed(bf16* to, const unsigned char* tiled, int64_t stride, int tokens, int lane) {
  const int m = lane >> 3, i = lane & 7;
  const int channel = 4 * (i >> 1) + 2 * (m & 1) + (i & 1), half = channel >> 3;
  uint32_t x[4];
  ldmatrix_trans<4>(x, tiled + 128 * (half + 2 * (m >> 1)) + (16 * (channel & 7) ^ 32 * half));
#pragma unroll
  for (int n = 0; n < 2; n++) {
    const int token = row_of(lane) + 8 * n;
    if (token < tokens)
      *reinterpret_cast<uint2*>(to + token * stride + 2 * col_of(lane)) = make_uint2(x[2 * n], x[2 * n + 1]);
  }
}

// g_log_w [channel, token], to [token, channel]
DEVICE void write_g_log_w(bf16* to, const Tile& g, int64_t stride, int tokens, unsigned char* scratch, int lane) {
  store_for_transposition(scratch, rounded(g), lane);
  __syncwarp();
  write_transposed(to, scratch, stride, tokens, lane);
}
DEVICE void write_g_log_w(float* to, const Tile& g, int64_t stride, int tokens, unsigned char* scratch, int lane) {
  float(*const rows)[20] = reinterpret_cast<float(*)[20]>(scratch);  // 8 tokens, 16 channels and padding
#pragma unroll
  for (int n = 0; n < 2; n++) {
#pragma unroll
    for (int i = 0; i < 4; i++) rows[col_of(lane) + i % 2][row_of(lane) + i / 2 * 8] = g.c[n][i];
    __syncwarp();
    const int token = row_of(lane) + 8 * n;
    const float4 x = *reinterpret_cast<const float4*>(&rows[row_of(lane)][2 * col_of(lane)]);
    if (token < tokens) *reinterpret_cast<float4*>(to + token * stride + 2 * col_of(lane)) = x;
    __syncwarp();
  }
}

// final_grads: the gradient of the state that each (batch row, head, segment) ends with, or null for zeros.
// gu: (B, H, segments, 64). g_state may be null.
template <class W>
__global__ void __launch_bounds__(THREADS, 2)
    chunk_backward(Shape shape, const bf16* r, const bf16* k, const bf16* v, const W* log_w, const float* u,
                   const Checkpoint* checkpoints, const bf16* gy, const float* final_grads, bf16* gr, bf16* gk, bf16* gv,
                   W* g_log_w, float* gu, float* g_state) {
  DYNAMIC_SHARED(memory);
  BackwardShared<W>& shared = *reinterpret_cast<BackwardShared<W>*>(memory);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, row = row_of(lane), col = col_of(lane);
  const Place place(shape, blockIdx.x);
  const Ranges ranges(lane);
  auto& inputs = shared.inputs[warp];

  Tile G[4];
  for_each_of_keys(G, warp, lane, [&](float& x, int i) {
    x = final_grads ? final_grads[int64_t(blockIdx.x) * N * N + i] : 0.f;
  });
  float u_now[2], gu_sum[2] = {};
  for (int h = 0; h < 2; h++) u_now[h] = u[place.bh % shape.H * N + 16 * warp + row + 8 * h];

  const int64_t step = L * place.stride;
  int64_t here = place.start + (place.end - 1) * step;
  const Checkpoint* kept = checkpoints + place.bh * shape.chunks() + place.end - 1;
  // `back` chunks before the one at `here`
  auto copy_inputs = [&](int chunk, int back) {
    if (chunk - back >= place.chunk) {
      const int64_t from = here - back * step + 16 * warp;
      const int tokens = shape.T - (chunk - back) * L;
      copy_slice(inputs.r, r + from, place.stride, tokens, lane);
      copy_slice(inputs.k, k + from, place.stride, tokens, lane);
      copy_slice(inputs.log_w, log_w + from, place.stride, tokens, lane);
#pragma unroll
      for (int q = 0; q < 4; q++) cp_async_16(inputs.state[q] + 16 * lane, kept[-back].state[warp][q] + 16 * lane);
    }
    cp_async_commit();
  };
  auto copy_sheets = [&](int chunk, int back, int slot) {
    if (chunk - back >= place.chunk) {
      const int64_t from = here - back * step;
      const int tokens = shape.T - (chunk - back) * L;
      auto& to = shared.sheets[slot];
      copy_sheet(to.gy, gy + from, place.stride, tokens, threadIdx.x);
      copy_sheet(to.v, v + from, place.stride, tokens, threadIdx.x);
      if (warp == 0) cp_async_16(to.scores + 16 * lane, kept[-back].scores + 16 * lane);
    }
    cp_async_commit();
  };
  copy_sheets(place.end - 1, 0, 0);
  copy_inputs(place.end - 1, 0);
  copy_sheets(place.end - 1, 1, 1);
  cp_async_wait<2>();
  __syncthreads();

  int slot = 0;
  for (int chunk = place.end - 1; chunk >= place.chunk; chunk--) {
    const auto& sheets = shared.sheets[slot];
    auto& exchange = shared.exchange[chunk % 2];
    auto& scratch = shared.scratch[warp];
    cp_async_wait<1>();
    __syncwarp();

    // products with the states: [s, t] of gA, [key, token] of gr and gk, [key, key] of S G^T
    Tile gA_by_s{}, gr_now{}, gk_now{}, S_G{};
#pragma unroll
    for (int q = 0; q < 4; q++) {
      const Block gy_q = load_sheet<SECOND>(sheets.gy, q, lane), v_q = load_sheet<FIRST>(sheets.v, q, lane),
                  S_q = load_tiled_transposed<FIRST>(inputs.state[q], lane), G_q = rounded(G[q]);
      store_tiled(exchange.G[warp][q], G_q, lane);
      add_product(gA_by_s, v_q, gy_q);
      add_product(gr_now, S_q, gy_q);
      add_product(gk_now, G_q, v_q);
      add_product(S_G, S_q, G_q);
    }
    const Block r_now = load_slice_transposed<FIRST>(inputs.r, lane), k_now = load_slice_transposed<FIRST>(inputs.k, lane);
    LogDecay<W> w;
    load<FIRST>(w, inputs.log_w, lane);
    __syncwarp();
    copy_inputs(chunk, 1);

    // gA both ways, s < t; its diagonal for this lane's tokens, gA_tt[n][e]
    auto later = [&](int n, int i) { return col + i % 2 > row ? gA_by_s.c[n][i] : 0.f; };
    const Block gA_st{{pack_bf16(later(0, 0), later(0, 1)), 0, pack_bf16(gA_by_s.c[1][0], gA_by_s.c[1][1]),
                       pack_bf16(later(1, 2), later(1, 3))}};
    store_tiled(scratch[0], gA_st, lane);
    float gA_tt[2][2];
#pragma unroll
    for (int e = 0; e < 2; e++) {
      const int holder = 4 * (col + e) + lane % 4;
      gA_tt[0][e] = __shfl_sync(0xffffffffu, gA_by_s.c[0][e], holder);
      gA_tt[1][e] = __shfl_sync(0xffffffffu, gA_by_s.c[1][2 + e], holder);
    }
    __syncwarp();
    const Block gA_ts = load_tiled_transposed<SECOND>(scratch[0], lane);

    const Decays<W> decays(ranges, w);
    const float D[2] = {ex2(decays.whole[0]), ex2(decays.whole[1])};
    float pass[2];  // sum_j S[,j] G[,j], times D
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const float mine = row % 2 ? S_G.c[h][2 * h + 1] : S_G.c[h][2 * h];
      pass[h] = D[h] * __shfl_sync(0xffffffffu, mine, 4 * row + row / 2);
    }

    // through the states
    Tile factor = decays.to_rt();
    const Block rt = scaled(r_now, factor);
    gr_now = times(gr_now, factor);
    Tile r_gr = times(floats(r_now), gr_now);  // r times its gradient, less (below) k times its gradient through A
    factor = decays.to_kh();
    store_tiled(exchange.kh[warp], scaled(k_now, factor), lane);
    gk_now = times(gk_now, factor);
    const Block k_gk = rounded(times(floats(k_now), gk_now));
    update(G, D, rt, sheets.gy, lane);

    // through A, relative to the middles
    const Tile to_kk = decays.to_kk(), to_near = decays.to_near(), to_far = decays.to_far();
    const Block kk = scaled(k_now, to_kk), near = scaled(r_now, to_near), far = scaled(r_now, to_far);
    Tile near_sum{}, far_sum{}, kk_sum{};
    mma_bf16_k8(near_sum.c[0], kk.x, gA_ts.x[0]);
    mma_bf16_k8(near_sum.c[1], kk.x + 2, gA_ts.x[3]);
    mma_bf16_k8(far_sum.c[1], kk.x, gA_ts.x[1]);
    add_half_product<0>(kk_sum, Block{{near.x[0], near.x[1], far.x[2], far.x[3]}}, gA_st);
    mma_bf16_k8(kk_sum.c[1], near.x + 2, gA_st.x[3]);
    const Tile near_rounded = floats(near), far_rounded = floats(far), kk_rounded = floats(kk), r_float = floats(r_now),
               k_float = floats(k_now);
    Tile g_log_w_now;
#pragma unroll
    for (int n = 0; n < 2; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int h = i / 2;
        const float kk_gk = kk_rounded.c[n][i] * kk_sum.c[n][i];
        const float k_gA = k_float.c[n][i] * gA_tt[n][i % 2], r_gA = r_float.c[n][i] * gA_tt[n][i % 2];
        gr_now.c[n][i] += to_near.c[n][i] * near_sum.c[n][i] + u_now[h] * k_gA;
        gk_now.c[n][i] += to_kk.c[n][i] * kk_sum.c[n][i] + u_now[h] * r_gA;
        r_gr.c[n][i] += near_rounded.c[n][i] * near_sum.c[n][i] - kk_gk;
        if (n == 1) {
          gr_now.c[n][i] += to_far.c[n][i] * far_sum.c[n][i];
          r_gr.c[n][i] += far_rounded.c[n][i] * far_sum.c[n][i];
        }
        gu_sum[h] += r_float.c[n][i] * k_gA;
        g_log_w_now.c[n][i] = pass[h] - kk_gk;
      }

    // sums over later tokens of r_gr, in two bf16 as it cancels, and over earlier ones of k_gk
    const Block r_gr_high = rounded(r_gr),
                r_gr_low = rounded(each([](float x, float high) { return x - high; }, r_gr, floats(r_gr_high)));
    // [t, s] of s > t and s < t; registers h + 2 n
    const uint32_t after = ranges.upto ^ ONES;
    mma_bf16(g_log_w_now.c[0], r_gr_high.x, after, ONES);
    mma_bf16(g_log_w_now.c[0], r_gr_low.x, after, ONES);
    mma_bf16_k8(g_log_w_now.c[0], k_gk.x, ranges.before);
    mma_bf16_k8(g_log_w_now.c[1], r_gr_high.x + 2, after);
    mma_bf16_k8(g_log_w_now.c[1], r_gr_low.x + 2, after);
    mma_bf16(g_log_w_now.c[1], k_gk.x, ONES, ranges.before);
#pragma unroll
    for (int i = 0; i < 4; i++) {  // clamped: no gradient
      float *const g = &g_log_w_now.c[i / 2][i % 2 * 2];
      if (low_bf16(w.part[0].x[i]) <= MIN_LOG_W) g[0] = 0.f;
      if (high_bf16(w.part[0].x[i]) <= MIN_LOG_W) g[1] = 0.f;
    }

    const int tokens = shape.T - chunk * L;
    const int64_t keys_here = here + 16 * warp;
    __syncwarp();
    store_for_transposition(scratch[0], rounded(gr_now), lane);
    store_for_transposition(scratch[1], rounded(gk_now), lane);
    __syncwarp();
    write_transposed(gr + keys_here, scratch[0], place.stride, tokens, lane);
    write_transposed(gk + keys_here, scratch[1], place.stride, tokens, lane);
    __syncwarp();
    write_g_log_w(g_log_w + keys_here, g_log_w_now, place.stride, tokens, scratch[0], lane);

    cp_async_wait<1>();
    __syncthreads();
    copy_sheets(chunk, 2, slot > 0 ? slot - 1 : 2);

    // the warp's values
    Tile gv_now{};
#pragma unroll
    for (int q = 0; q < 4; q++)
      add_product(gv_now, load_tiled_transposed<FIRST>(exchange.kh[q], lane),
                  load_tiled_transposed<SECOND>(exchange.G[q][warp], lane));
    add_product(gv_now, load_tiled_transposed<FIRST>(sheets.scores, lane),
                load_sheet_transposed<SECOND>(sheets.gy, warp, lane));
    write_slice(gv + keys_here, rounded(gv_now), place.stride, tokens, scratch[2], lane);

    here -= step;
    kept--;
    slot = slot < 2 ? slot + 1 : 0;
  }

  if (g_state && place.chunk == 0)
    for_each_of_keys(G, warp, lane, [&](float& x, int i) { g_state[place.bh * N * N + i] = x; });
#pragma unroll
  for (int h = 0; h < 2; h++) {
    gu_sum[h] += __shfl_xor_sync(0xffffffffu, gu_sum[h], 1);
    gu_sum[h] += __shfl_xor_sync(0xffffffffu, gu_sum[h], 2);
    if (col == 0) gu[int64_t(blockIdx.x) * N + 16 * warp + row + 8 * h] = gu_sum[h];
  }
}

// (B, H, segments, 64) to (B, H, 64)
__global__ void sum_segments(int segments, const float* parts, float* gu) {
  float sum = 0.f;
  for (int j = 0; j < segments; j++) sum += parts[(int64_t(blockIdx.x) * segments + j) * N + threadIdx.x];
  gu[int64_t(blockIdx.x) * N + threadIdx.x] = sum;
}

// ---- host

constexpr int invalid_value = 1;  // cudaErrorInvalidValue

static bool valid(int w_dtype, int64_t B, int64_t T, int64_t H, int segments) {
  return (w_dtype == FLOAT32 || w_dtype == BFLOAT16) && B > 0 && T > 0 && H > 0 && T <= INT32_MAX - L && segments > 0 &&
         segments <= (T + L - 1) / L && H <= INT32_MAX && B <= INT32_MAX / H / segments;
}

// Scratch memory: states and decays of the segments, and the parts of gu.
struct Scratch {
  float *states, *decays, *gu;
  Scratch(void* memory, int64_t blocks)
      : states(static_cast<float*>(memory)), decays(states + blocks * N * N), gu(decays + blocks * N) {}
};

template <class W>
static int forward(Shape shape, int64_t BH, const bf16* r, const bf16* k, const bf16* v, const W* log_w, const float* u,
                   const float* state, bf16* y, float* final_state, Checkpoint* checkpoints, void* memory, void* stream) {
  const dim3 grid(static_cast<unsigned>(BH * shape.segments)), block(THREADS);
  if (shape.segments > 1) {
    const Scratch scratch(memory, BH * shape.segments);
    int error = launch(segment_states<W, false>, grid, block, sizeof(SegmentShared<W>), stream, shape, k, v, log_w,
                       scratch.states, scratch.decays);
    if (error) return error;
    error = launch(chain_segments<false>, dim3(static_cast<unsigned>(BH)), dim3(256), 0, stream, shape.segments, state,
                   scratch.states, scratch.decays);
    if (error) return error;
    state = scratch.states;
  }
  return launch(chunk_forward<W>, grid, block, sizeof(ForwardShared<W>), stream, shape, r, k, v, log_w, u, state, y,
                final_state, checkpoints);
}

template <class W>
static int backward(Shape shape, int64_t BH, const bf16* r, const bf16* k, const bf16* v, const W* log_w, const float* u,
                    const Checkpoint* checkpoints, const bf16* gy, const float* g_final, bf16* gr, bf16* gk, bf16* gv,
                    W* g_log_w, float* gu, float* g_state, void* memory, void* stream) {
  const dim3 grid(static_cast<unsigned>(BH * shape.segments)), block(THREADS);
  float* gu_parts = gu;
  if (shape.segments > 1) {
    const Scratch scratch(memory, BH * shape.segments);
    int error = launch(segment_states<W, true>, grid, block, sizeof(SegmentShared<W>), stream, shape, r, gy, log_w,
                       scratch.states, scratch.decays);
    if (error) return error;
    error = launch(chain_segments<true>, dim3(static_cast<unsigned>(BH)), dim3(256), 0, stream, shape.segments, g_final,
                   scratch.states, scratch.decays);
    if (error) return error;
    g_final = scratch.states;
    gu_parts = scratch.gu;
  }
  const int error = launch(chunk_backward<W>, grid, block, sizeof(BackwardShared<W>), stream, shape, r, k, v, log_w, u,
                           checkpoints, gy, g_final, gr, gk, gv, g_log_w, gu_parts, g_state);
  if (error || shape.segments == 1) return error;
  return launch(sum_segments, dim3(static_cast<unsigned>(BH)), dim3(N), 0, stream, shape.segments, gu_parts, gu);
}

// The C interface: device pointers, aligned to 16 bytes; w_dtype, the dtype of log_w and its gradient, a code of device.cuh;
// a stream. Returns a CUDA error code, 0 for success. `segments`: 1 to ceil(T / 16), the same value need not be used twice.

extern "C" int64_t wkv6_chunk_checkpoint_bytes(int64_t B, int64_t T, int64_t H) {
  return B * H * ((T + L - 1) / L) * static_cast<int64_t>(sizeof(Checkpoint));
}

// Bytes of `scratch` for forward and backward.
extern "C" int64_t wkv6_chunk_scratch_bytes(int64_t B, int64_t H, int segments) {
  return segments == 1 ? 0 : B * H * segments * static_cast<int64_t>((N * N + 2 * N) * sizeof(float));
}

// Four blocks fit on a multiprocessor, and one alone cannot keep it busy. A segment costs another pass over three of its
// tensors and should have work to show for it.
extern "C" int wkv6_chunk_segments(int64_t B, int64_t T, int64_t H, int multiprocessors) {
  const int64_t wanted = 2 * int64_t(multiprocessors), blocks = B * H, longest = T / (16 * L);
  const int64_t segments = (wanted + blocks - 1) / blocks;
  return static_cast<int>(segments < longest ? segments : longest > 1 ? longest : 1);
}

extern "C" int wkv6_chunk_forward(int w_dtype, int64_t B, int64_t T, int64_t H, const void* r, const void* k, const void* v,
                                  const void* log_w, const float* u, const float* state /* or null: zeros */, void* y,
                                  float* final_state, void* checkpoints /* or null: no backward pass */, void* scratch,
                                  int segments, void* stream) {
  if (!valid(w_dtype, B, T, H, segments)) return invalid_value;
  const Shape shape{static_cast<int>(T), static_cast<int>(H), segments};
  auto run = [&](auto* w) {
    return forward(shape, B * H, static_cast<const bf16*>(r), static_cast<const bf16*>(k), static_cast<const bf16*>(v), w, u,
                   state, static_cast<bf16*>(y), final_state, static_cast<Checkpoint*>(checkpoints), scratch, stream);
  };
  return w_dtype == BFLOAT16 ? run(static_cast<const bf16*>(log_w)) : run(static_cast<const float*>(log_w));
}

extern "C" int wkv6_chunk_backward(int w_dtype, int64_t B, int64_t T, int64_t H, const void* r, const void* k, const void* v,
                                   const void* log_w, const float* u, const void* checkpoints, const void* gy,
                                   const float* g_final /* or null: zeros */, void* gr, void* gk, void* gv, void* g_log_w,
                                   float* gu, float* g_state /* or null: not wanted */, void* scratch, int segments,
                                   void* stream) {
  if (!valid(w_dtype, B, T, H, segments)) return invalid_value;
  const Shape shape{static_cast<int>(T), static_cast<int>(H), segments};
  auto run = [&](auto* w, auto* gw) {
    return backward(shape, B * H, static_cast<const bf16*>(r), static_cast<const bf16*>(k), static_cast<const bf16*>(v), w, u,
                    static_cast<const Checkpoint*>(checkpoints), static_cast<const bf16*>(gy), g_final,
                    static_cast<bf16*>(gr), static_cast<bf16*>(gk), static_cast<bf16*>(gv), gw, gu, g_state, scratch, stream);
  };
  return w_dtype == BFLOAT16 ? run(static_cast<const bf16*>(log_w), static_cast<bf16*>(g_log_w))
                             : run(static_cast<const float*>(log_w), static_cast<float*>(g_log_w));
}
