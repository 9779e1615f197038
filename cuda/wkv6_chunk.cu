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
// What should bind is bytes: a token and head costs 640 forward (1184 where a backward pass follows) and 1696 backward, each
// moved once. As compiled by nvcc 13.0 for sm_90 a warp issues 487 instructions a chunk forward (577 if log_w is fp32) and 861
// backward (945). For B 8, T 4096, C 4096 on 132 multiprocessors that is at least 0.5 and 0.85 million cycles, of the order
// of the time that the bytes take at 4.3 TB/s, 0.56 and 0.81 ms.
//                      registers on sm_90   shared memory   blocks a multiprocessor: sm_90 and sm_100, sm_80, sm_86/89/120
//   forward,  bf16 log_w        127         40.5 KB         4, 3, 2
//   forward,  fp32 log_w        124         46.5 KB         4, 3, 2
//   backward, bf16 log_w        128         52.8 KB         4, 3, 1
//   backward, fp32 log_w        128         54.8 KB         4, 2, 1
//
// Operands of the tensor cores are bf16, everything else is fp32. No atomics and one fixed order of additions: results are
// the same bit for bit on every run. Everything is built from one product, X Y^T of 16x16 blocks (`add_product`).
//
// Tensors (B, T, H, 64) contiguous, u (H, 64), states (B, H, 64, 64) indexed [key, value], gu (B, H, 64), a row per batch row.
#include "tiles.cuh"

constexpr float MIN_LOG_W = -16.625f;
constexpr uint32_t MIN_LOG_W_TWICE = 0xc185c185u;  // as bf16, in both halves

// Blocks that a multiprocessor shall hold, that is, how many registers a thread may have. Where there are 100 KB of shared
// memory, it is that which limits them.
#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ == 860 || __CUDA_ARCH__ == 890 || __CUDA_ARCH__ >= 1200)
#define FORWARD_BLOCKS 2
#define BACKWARD_BLOCKS 1
#else
#define FORWARD_BLOCKS 4
#define BACKWARD_BLOCKS 4
#endif

struct Shape {
  int T, H, segments;
  __device__ int chunks() const { return (T + L - 1) / L; }
};

// ---- decays, clamped

template <Order order>
DEVICE void load_clamped(LogDecay<bf16>& w, const unsigned char* slice, int lane) {
  load<order>(w, slice, lane);
#pragma unroll
  for (uint32_t& x : w.part[0].x) x = max_bf16(x, MIN_LOG_W_TWICE);
}
template <Order>
DEVICE void load_clamped(LogDecay<float>& w, const unsigned char* slice, int lane) {
  load(w, slice, lane, [](float x) { return fmaxf(x, MIN_LOG_W); });
}

// Which elements are at the bound: bits 15 - i and 31 - i for the low and high half of register i.
template <class W>
DEVICE uint32_t at_bound(const LogDecay<W>& w) {
  uint32_t bits = 0;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const uint32_t magnitude = w.part[0].x[i] & 0x7fff7fffu;  // bf16 are in order as integers; no carry between halves
    bits |= ((magnitude + 0x80008000u - (MIN_LOG_W_TWICE & 0x7fff7fffu)) & 0x80008000u) >> i;
  }
  return bits;
}

// ---- what the forward pass keeps for the backward pass, for every chunk
//
// The state before the chunk, rounded to bf16 as the products used it (8 KB), and the scores A (0.5 KB): 544 bytes a token
// and head, written and read once, beside the 640 bytes that the forward and 1152 that the backward pass must move. A state
// every 64 tokens would save 768 of those 1088 bytes; it would cost a second pass over k, v and log_w, and three more
// dependent steps for every four.

struct Checkpoint {
  unsigned char state[4][4][BLOCK_BYTES];  // [keys][values]: tiled blocks of S^T
  unsigned char scores[BLOCK_BYTES];       // tiled A; all for FIRST
};

// ---- where a block of threads works: blockIdx.x is its (batch row, head), blockIdx.y its segment

DEVICE int64_t batch_head() { return blockIdx.x; }
DEVICE int64_t batch_head_segment(const Shape& shape) { return batch_head() * shape.segments + blockIdx.y; }

struct Place {
  int chunk, end;   // chunks [chunk, end)
  unsigned stride;  // elements from token to token
  int64_t start;    // the element of the first token of the sequence and the first channel of the head

  __device__ explicit Place(const Shape& shape) {
    const int segment = blockIdx.y, chunks = shape.chunks(), length = chunks / shape.segments;
    const int longer = chunks - length * shape.segments;  // the first segments are a chunk longer
    chunk = segment * length + (segment < longer ? segment : longer);
    end = chunk + length + (segment < longer);
    stride = shape.H * N;
    start = (batch_head() / shape.H * shape.T * shape.H + batch_head() % shape.H) * N;
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
__global__ void __launch_bounds__(THREADS, FORWARD_BLOCKS)
    chunk_forward(Shape shape, const bf16* r, const bf16* k, const bf16* v, const W* log_w, const float* u,
                  const float* states, bf16* y, float* final_state, Checkpoint* checkpoints) {
  DYNAMIC_SHARED(memory);
  ForwardShared<W>& shared = *reinterpret_cast<ForwardShared<W>*>(memory);
  const int warp = warp_index(), lane = threadIdx.x % 32, row = row_of(lane), col = col_of(lane);
  const Place place(shape);
  const Ranges ranges(lane);

  Tile S[4];
  auto for_each_of_state = [&](auto use) {  // an element of S and its place in a state
#pragma unroll
    for (int q = 0; q < 4; q++)
#pragma unroll
      for (int i = 0; i < 8; i++) {
        const int value = 16 * warp + row + i % 4 / 2 * 8, key = 16 * q + i / 4 * 8 + col + i % 2;
        use(S[q].half[i / 4].c[i % 4], key * N + value);
      }
  };
  for_each_of_state([&](float& x, int i) { x = states ? states[batch_head_segment(shape) * N * N + i] : 0.f; });
  const float* const u_here = u + batch_head() % shape.H * N + 16 * warp + col;
  const Tile bonus{{each([&](int i) { return u_here[i % 2]; }), each([&](int i) { return u_here[8 + i % 2]; })}};

  const int64_t step = int64_t(L) * place.stride;
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
  Checkpoint* kept = checkpoints ? checkpoints + batch_head() * shape.chunks() + place.chunk : nullptr;

  int slot = 0;
  for (int chunk = place.chunk; chunk < place.end; chunk++) {
    const auto& inputs = shared.inputs[warp][slot];
    auto& exchange = shared.exchange[chunk % 2];
    cp_async_wait<1>();
    __syncwarp();
    const Block r_now = load_slice<FIRST>(inputs.r, lane), k_now = load_slice<SECOND>(inputs.k, lane);
    LogDecay<W> w;
    load_clamped<SECOND>(w, inputs.log_w, lane);
    copy(chunk + 2, slot > 0 ? slot - 1 : 2);

    // the warp's keys. Sums in bits; `whole` does not depend on the token, `middle` on its half alone.
    const Tile before = sums_by_token(ranges.before, w), upto = sums_by_token(ranges.upto, w);
    Tile middle = sums_by_token(ranges.middle, w), whole{}, to_rt, to_kh, to_near, to_far{}, to_kk;
#pragma unroll
    for (const Block& part : w.part) add_product(whole, Block{{ONES, ONES, ONES, ONES}}, part);
#pragma unroll
    for (int n = 0; n < 2; n++) {
      auto before_bits = [&](int i) { return LOG2_E * before.half[n].c[i]; };
      auto upto_bits = [&](int i) { return LOG2_E * upto.half[n].c[i]; };
      const Half middle_bits = each([&](int i) { return LOG2_E * middle.half[n].c[i]; });
      const float whole_bits[2] = {LOG2_E * whole.half[n].c[0], LOG2_E * whole.half[n].c[1]};
      to_rt.half[n] = each([&](int i) { return ex2(before_bits(i)); });
      to_kh.half[n] = each([&](int i) { return ex2(whole_bits[i % 2] - upto_bits(i)); });
      to_near.half[n] = each([&](int i) { return ex2(before_bits(i) - middle_bits.c[i]); });
      to_kk.half[n] = each([&](int i) { return ex2(middle_bits.c[i] - upto_bits(i)); });
      to_far.half[n] = each([&](int i) { return i < 2 ? 0.f : ex2(before_bits(i) - middle_bits.c[i - 2]); });
      if (row == 0)
        *reinterpret_cast<float2*>(&exchange.D[16 * warp + 8 * n + col]) =
            make_float2(ex2(whole_bits[0]), ex2(whole_bits[1]));
    }
    const Block rt = scaled(r_now, to_rt), near = scaled(r_now, to_near), far = scaled(r_now, to_far),
                kk = scaled(k_now, to_kk);
    exchange.rt[warp][lane] = make_uint4(rt.x[0], rt.x[1], rt.x[2], rt.x[3]);
    store_tiled<SECOND>(exchange.kh[warp], scaled(k_now, to_kh), lane);
    Tile scores{}, diagonal{};
    add_half_product<0>(scores, Block{{near.x[0], far.x[1], near.x[2], far.x[3]}}, kk);
    add_half_product<1>(scores, near, kk);
    add_product(diagonal, scaled(r_now, bonus), k_now);
    auto causal = [&](int n, int i) {  // an element of the two 8x8 matrices on the diagonal
      const int s = col + i % 2;
      return s < row ? scores.half[n].c[i] : s == row ? diagonal.half[n].c[i] : 0.f;
    };
    exchange.scores[warp][lane] = make_float4(causal(0, 0), causal(0, 1), scores.half[0].c[2], scores.half[0].c[3]);
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
      if (kept) store_tiled<FIRST>(kept->state[q][warp], S_q, lane);
      const uint4 x = exchange.rt[q][lane];
      add_product(out, Block{{x.x, x.y, x.z, x.w}}, S_q);
    }
    if (kept) {
      const uint32_t mine = warp == 0 ? A.x[0] : warp == 1 ? A.x[2] : warp == 2 ? A.x[1] : A.x[3];
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
        S[q].half[n] = times(S[q].half[n], Half{{D.x, D.y, D.x, D.y}});
      }
      add_product(S[q], v_now, load_tiled_transposed<SECOND>(exchange.kh[q], lane));
    }
    slot = slot < 2 ? slot + 1 : 0;
  }
  if (final_state && place.end == shape.chunks())
    for_each_of_state([&](float& x, int i) { final_state[batch_head() * N * N + i] = x; });
}

// ---- key channels as rows
//
// The other kernels keep a state as [key, value], 16 keys a warp, and so want r, k and log_w as [channel, token].

template <class W>
struct Decays {        // of the warp's 16 channels; channel row + 8 h, token 8 n + col + e
  Tile before;         // [channel, token]: the sum over tokens < t
  float until[2][2];   // [n][h]: over tokens <= 8 n + col + 1; that over tokens <= 8 n + col is in `before`
  float middle[2][2];  // [n][h]: over tokens before the middle of the half n of the chunk, in bits
  float whole[2];      // [h]: over the chunk, in bits

  __device__ Decays(const Ranges& ranges, const LogDecay<W>& w) {
    Half first_half{};
#pragma unroll
    for (const Block& part : w.part) mma_bf16_k8(first_half.c, part.x, ONES);
    before = sums(ranges.before, first_half, w);
    const Tile to_middle = sums(ranges.middle, first_half, w);
    Half all = first_half;
#pragma unroll
    for (const Block& part : w.part) mma_bf16_k8(all.c, part.x + 2, ONES);
#pragma unroll
    for (int h = 0; h < 2; h++) {
      whole[h] = LOG2_E * all.c[2 * h];
#pragma unroll
      for (int n = 0; n < 2; n++) {
        middle[n][h] = LOG2_E * to_middle.half[n].c[2 * h];
        until[n][h] = before.half[n].c[2 * h + 1];
#pragma unroll
        for (const Block& part : w.part) until[n][h] += high_bf16(part.x[h + 2 * n]);
      }
    }
  }
  __device__ static Tile sums(uint32_t range, const Half& first_half, const LogDecay<W>& w) {
    Tile t{{Half{}, first_half}};
#pragma unroll
    for (const Block& part : w.part) {
      mma_bf16_k8(t.half[0].c, part.x, range);
      mma_bf16_k8(t.half[1].c, part.x + 2, range);
    }
    return t;
  }

  // What turns half n of r and k into that of rt, near, far (its second half) and of kh, kk.
  __device__ Half to_rt(int n) const {
    return each([&](int i) { return ex2(LOG2_E * before.half[n].c[i]); });
  }
  __device__ Half to_near(int n) const { return from_middle(n, n); }
  __device__ Half to_far() const { return from_middle(1, 0); }
  __device__ Half to_kh(int n) const {
    return each([&](int i) { return ex2(whole[i / 2] - LOG2_E * upto(n, i)); });
  }
  __device__ Half to_kk(int n) const {
    return each([&](int i) { return ex2(middle[n][i / 2] - LOG2_E * upto(n, i)); });
  }
  __device__ float upto(int n, int i) const { return i % 2 ? until[n][i / 2] : before.half[n].c[i + 1]; }
  __device__ Half from_middle(int n, int of) const {
    return each([&](int i) { return ex2(LOG2_E * before.half[n].c[i] - middle[of][i / 2]); });
  }
};

// A state as the warp holds it: four tiles of 16 keys by 16 values. Calls use(element, its place in (64, 64)).
template <class Use>
DEVICE void for_each_of_keys(Tile (&state)[4], int warp, int lane, Use use) {
#pragma unroll
  for (int q = 0; q < 4; q++)
#pragma unroll
    for (int i = 0; i < 8; i++) {
      const int key = 16 * warp + row_of(lane) + i % 4 / 2 * 8, value = 16 * q + i / 4 * 8 + col_of(lane) + i % 2;
      use(state[q].half[i / 4].c[i % 4], key * N + value);
    }
}
// state = diag(D) state + x z^T, x: [key, token], z: [token, value]
DEVICE void update(Tile (&state)[4], const float (&D)[2], const Block& x, const unsigned char (&z)[4][BLOCK_BYTES],
                   int lane) {
#pragma unroll
  for (int q = 0; q < 4; q++) {
    state[q] = times(state[q], Tile{{{{D[0], D[0], D[1], D[1]}}, {{D[0], D[0], D[1], D[1]}}}});
    add_product(state[q], x, load_slice_transposed<SECOND>(z[q], lane));
  }
}

// ---- segments of T, where (batch row, head) pairs are too few to fill the GPU
//
// `segment_states` takes every segment from a zero state, `chain_segments` joins them, and then the kernels above and below
// run all segments at once from the right states. In reverse, the same for G, with r and gy in place of k and v.

template <class W>
struct alignas(16) SegmentShared {
  struct alignas(16) Inputs {
    unsigned char z[4][BLOCK_BYTES], x[WARPS][BLOCK_BYTES], log_w[WARPS][slice_bytes<W>];
  } inputs[3];
};

// states: (B, H, segments, 64, 64); decays: (B, H, segments, 64), of a whole segment.
template <class W, bool reverse>
__global__ void __launch_bounds__(THREADS, FORWARD_BLOCKS)
    segment_states(Shape shape, const bf16* x, const bf16* z, const W* log_w, float* states, float* decays) {
  DYNAMIC_SHARED(memory);
  SegmentShared<W>& shared = *reinterpret_cast<SegmentShared<W>*>(memory);
  const int warp = warp_index(), lane = threadIdx.x % 32;
  const Place place(shape);
  if (reverse ? place.chunk == 0 : place.end == shape.chunks()) return;  // nobody starts from its end
  const Ranges ranges(lane);

  const int64_t step = int64_t(reverse ? -L : L) * place.stride;
  const int count = place.end - place.chunk, first = reverse ? place.end - 1 : place.chunk;
  int64_t ahead = place.start + int64_t(first) * L * place.stride + 16 * warp;
  auto copy = [&](int i, int slot) {
    if (i < count) {
      const int tokens = shape.T - (reverse ? first - i : first + i) * L;
      auto& to = shared.inputs[slot];
      copy_slice(to.z[warp], z + ahead, place.stride, tokens, lane);
      copy_slice(to.x[warp], x + ahead, place.stride, tokens, lane);
      copy_slice(to.log_w[warp], log_w + ahead, place.stride, tokens, lane);
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
    load_clamped<FIRST>(w, inputs.log_w[warp], lane);
    const Decays<W> decays_now(ranges, w);
    const Tile factor = reverse ? Tile{{decays_now.to_rt(0), decays_now.to_rt(1)}}
                                : Tile{{decays_now.to_kh(0), decays_now.to_kh(1)}};
    const float D[2] = {ex2(decays_now.whole[0]), ex2(decays_now.whole[1])};
    update(state, D, scaled(load_slice_transposed<FIRST>(inputs.x[warp], lane), factor), inputs.z, lane);
    total[0] += decays_now.whole[0], total[1] += decays_now.whole[1];
    slot = slot < 2 ? slot + 1 : 0;
  }
  for_each_of_keys(state, warp, lane, [&](float& e, int i) { states[batch_head_segment(shape) * N * N + i] = e; });
  if (col_of(lane) == 0)
    for (int h = 0; h < 2; h++)
      decays[batch_head_segment(shape) * N + 16 * warp + row_of(lane) + 8 * h] = ex2(total[h]);
}

// In place, from what each segment adds to a zero state to what each segment starts from. A thread per (batch row, head) and
// element of the state.
template <bool reverse>
__global__ void chain_segments(int segments, const float* first, float* states, const float* decays) {
  const int64_t bh = blockIdx.x;
  const int i = blockIdx.y * blockDim.x + threadIdx.x;
  states += bh * segments * N * N + i;
  decays += bh * segments * N + i / N;
  float running = first ? first[bh * N * N + i] : 0.f;
  for (int j = 0; j < segments; j++) {
    const int64_t segment = reverse ? segments - 1 - j : j;
    const bool last = j + 1 == segments;  // which `segment_states` leaves out
    const float added = last ? 0.f : states[segment * N * N], decay = last ? 0.f : decays[segment * N];
    states[segment * N * N] = running;
    running = decay * running + added;
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
    unsigned char gy[4][BLOCK_BYTES], v[4][BLOCK_BYTES], scores[BLOCK_BYTES];
  } sheets[3];
  struct alignas(16) Exchange {
    unsigned char G[WARPS][4][BLOCK_BYTES];  // [keys][values]: tiled blocks
    unsigned char kh[WARPS][BLOCK_BYTES];    // tiled blocks [key, token]
  } exchange[2];
  // Of a warp, mostly to save registers. A float2 is of channels row and row + 8.
  struct alignas(16) Scratch {
    union {
      struct {
        unsigned char gA[BLOCK_BYTES];  // tiled
        float gA_tt[L];
        float2 pass[8];        // D sum_j S[,j] G[,j]
        uint32_t clamped[32];  // by lane
      };
      unsigned char out[2][BLOCK_BYTES];  // blocks on their way to global memory
    };
    float2 u[8], gu[32];  // gu by lane
  } scratch[WARPS];
};

// Four blocks of either kernel, each with 1 KB for the system, must fit into the 228 KB of sm_90.
template <class Shared>
constexpr bool four_fit = 4 * (sizeof(Shared) + 1024) <= 228 * 1024;
static_assert(four_fit<ForwardShared<bf16>> && four_fit<ForwardShared<float>>, "the forward kernel's shared memory");
static_assert(four_fit<BackwardShared<bf16>> && four_fit<BackwardShared<float>>, "the backward kernel's shared memory");

// From [channel, token] to [token, channel]: register 2 n + j of the result holds channels 4 (lane % 4) + 2 j and the next of
// token row + 8 n, 8 neighbouring bytes of global memory. Rows of the 8x8 matrices of the last eight channels are swapped in
// pairs, so that this meets no bank twice.
DEVICE void store_for_transposition(unsigned char* tiled, const Block& b, int lane) {
#pragma unroll
  for (int i = 0; i < 4; i++) *reinterpret_cast<uint32_t*>(tiled + 128 * i + (4 * lane ^ i % 2 * 32)) = b.x[i];
}
DEVICE Block load_for_output(const unsigned char* tiled, int lane) {
  const int m = lane >> 3, i = lane & 7;
  const int channel = 4 * (i >> 1) + 2 * (m & 1) + (i & 1), h = channel >> 3;
  Block b;
  ldmatrix_trans<4>(b.x, tiled + 128 * (h + 2 * (m >> 1)) + (16 * (channel & 7) ^ 32 * h));
  return b;
}
DEVICE void write_pairs(bf16* to, uint32_t first, uint32_t second) {  // in one instruction; a uint2 became two
  *reinterpret_cast<uint64_t*>(to) = first | uint64_t(second) << 32;
}
// The same for floats: four channels of token row + 8 n. Meets banks twice at most.
DEVICE float4 transposed_half(const Half& x, unsigned char* scratch, int lane) {
  float(*const tokens)[20] = reinterpret_cast<float(*)[20]>(scratch);  // 8 tokens, 16 channels and padding
  __syncwarp();
#pragma unroll
  for (int i = 0; i < 4; i++) tokens[col_of(lane) + i % 2][row_of(lane) + i / 2 * 8] = x.c[i];
  __syncwarp();
  return *reinterpret_cast<const float4*>(&tokens[row_of(lane)][2 * col_of(lane)]);
}

// final_grads: the gradient of the state that each (batch row, head, segment) ends with, or null for zeros.
// gu: (B, H, segments, 64). g_state may be null.
template <class W>
__global__ void __launch_bounds__(THREADS, BACKWARD_BLOCKS)
    chunk_backward(Shape shape, const bf16* r, const bf16* k, const bf16* v, const W* log_w, const float* u,
                   const Checkpoint* checkpoints, const bf16* gy, const float* final_grads, bf16* gr, bf16* gk, bf16* gv,
                   W* g_log_w, float* gu, float* g_state) {
  DYNAMIC_SHARED(memory);
  BackwardShared<W>& shared = *reinterpret_cast<BackwardShared<W>*>(memory);
  const int warp = warp_index(), lane = threadIdx.x % 32, row = row_of(lane), col = col_of(lane);
  const Place place(shape);
  const Ranges ranges(lane);
  auto& inputs = shared.inputs[warp];

  Tile G[4];
  for_each_of_keys(G, warp, lane, [&](float& x, int i) {
    x = final_grads ? final_grads[batch_head_segment(shape) * N * N + i] : 0.f;
  });
  auto& scratch = shared.scratch[warp];
  const float* const u_row = u + batch_head() % shape.H * N + 16 * warp + row;
  if (lane % 4 == 0) scratch.u[row] = make_float2(u_row[0], u_row[8]);
  scratch.gu[lane] = make_float2(0.f, 0.f);

  const int64_t step = int64_t(L) * place.stride;
  int64_t here = place.start + (place.end - 1) * step + 16 * warp;
  const Checkpoint* kept = checkpoints + batch_head() * shape.chunks() + place.end - 1;
  // of the chunk `back` before this one
  auto copy_inputs = [&](int chunk, int back) {
    if (chunk - back >= place.chunk) {
      const int64_t from = here - back * step;
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
      copy_slice(to.gy[warp], gy + from, place.stride, tokens, lane);
      copy_slice(to.v[warp], v + from, place.stride, tokens, lane);
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
    cp_async_wait<1>();
    __syncwarp();

    // products with the states: [s, t] of gA, [key, token] of gr and gk, [key, key] of S G^T
    Tile gA{}, gr_now{}, gk_now{}, S_G{};
#pragma unroll
    for (int q = 0; q < 4; q++) {
      const Block gy_q = load_slice<SECOND>(sheets.gy[q], lane), v_q = load_slice<FIRST>(sheets.v[q], lane),
                  S_q = load_tiled_transposed<FIRST>(inputs.state[q], lane), G_q = rounded(G[q]);
      store_tiled<SECOND>(exchange.G[warp][q], G_q, lane);
      add_product(gA, v_q, gy_q);
      add_product(gr_now, S_q, gy_q);
      add_product_by_halves(gk_now, G_q, v_q);
      add_product_by_halves(S_G, S_q, G_q);
    }
    const Block r_now = load_slice_transposed<FIRST>(inputs.r, lane), k_now = load_slice_transposed<FIRST>(inputs.k, lane);
    LogDecay<W> w;
    load_clamped<FIRST>(w, inputs.log_w, lane);
    __syncwarp();
    copy_inputs(chunk, 1);

    // gA for s < t, its diagonal, and that of S G^T, into `scratch`
    auto later = [&](int n, int i) { return col + i % 2 > row ? gA.half[n].c[i] : 0.f; };
    store_tiled<SECOND>(scratch.gA,
                Block{{pack_bf16(later(0, 0), later(0, 1)), 0, pack_bf16(gA.half[1].c[0], gA.half[1].c[1]),
                       pack_bf16(later(1, 2), later(1, 3))}},
                lane);
    scratch.clamped[lane] = at_bound(w);
    const Decays<W> decays(ranges, w);
    const float D[2] = {ex2(decays.whole[0]), ex2(decays.whole[1])};
    if (lane % 4 == row / 2) {  // the lane of elements (row, row) and (row + 8, row + 8)
      auto diagonal = [&](const Tile& t, int h) { return row % 2 ? t.half[h].c[2 * h + 1] : t.half[h].c[2 * h]; };
      scratch.gA_tt[row] = diagonal(gA, 0);
      scratch.gA_tt[row + 8] = diagonal(gA, 1);
      scratch.pass[row] = make_float2(D[0] * diagonal(S_G, 0), D[1] * diagonal(S_G, 1));
    }
    __syncwarp();

    // through the states
    const Tile to_rt{{decays.to_rt(0), decays.to_rt(1)}};
    gr_now = times(gr_now, to_rt);
    const Tile to_kh{{decays.to_kh(0), decays.to_kh(1)}};
    gk_now = times(gk_now, to_kh);
    store_tiled<FIRST>(exchange.kh[warp], scaled(k_now, to_kh), lane);
    update(G, D, scaled(r_now, to_rt), sheets.gy, lane);

    // through A, half a chunk at a time: its tokens as s, with kk, and as t, with near and far. gA_st and gA_ts are 8x8
    // matrices of gA, [s, t] and transposed.
    auto gA_st = [&](int s_half, int t_half) {
      return *reinterpret_cast<const uint32_t*>(scratch.gA + 128 * (s_half + 2 * t_half) + 4 * lane);
    };
    auto gA_ts = [&](int t_half, int s_half) {
      uint32_t x;
      ldmatrix_trans<1>(&x, scratch.gA + 128 * (s_half + 2 * t_half) + 16 * (lane & 7));
      return x;
    };
    Block kk, near, far, k_gk, gr_rounded, gk_rounded;
    Tile g_log_w_now, r_gr;  // r_gr: r times its gradient less k times its gradient through A
    set_rounded(k_gk, 0, times(floats(k_now, 0), gk_now.half[0]));
    set_rounded(k_gk, 1, times(floats(k_now, 1), gk_now.half[1]));
#pragma unroll
    for (int n = 0; n < 2; n++) {
      const Half r_half = floats(r_now, n), k_half = floats(k_now, n), to_kk = decays.to_kk(n);
      set_rounded(kk, n, times(k_half, to_kk));
      if (n == 0) {  // t in the second half, s in the first
        r_gr = Tile{{times(r_half, gr_now.half[0]), times(floats(r_now, 1), gr_now.half[1])}};
        const Half to_far = decays.to_far();
        set_rounded(far, 1, times(floats(r_now, 1), to_far));
        Half sum{};
        mma_bf16_k8(sum.c, kk.x, gA_ts(1, 0));
        gr_now.half[1] = plus_product(gr_now.half[1], to_far, sum);
        r_gr.half[1] = plus_product(r_gr.half[1], floats(far, 1), sum);
      }
      const Half to_near = decays.to_near(n);
      set_rounded(near, n, times(r_half, to_near));
      Half sum_over_s{}, sum_over_t{};
      mma_bf16_k8(sum_over_s.c, kk.x + 2 * n, gA_ts(n, n));
      mma_bf16_k8(sum_over_t.c, near.x + 2 * n, gA_st(n, n));
      if (n == 0) mma_bf16_k8(sum_over_t.c, far.x + 2, gA_st(0, 1));
      gr_now.half[n] = plus_product(gr_now.half[n], to_near, sum_over_s);
      gk_now.half[n] = plus_product(gk_now.half[n], to_kk, sum_over_t);
      r_gr.half[n] = plus_product(r_gr.half[n], floats(near, n), sum_over_s);
      const Half kk_gk = times(floats(kk, n), sum_over_t);
      float2 gu_now = scratch.gu[lane];
      const float2 gA_tt = *reinterpret_cast<const float2*>(&scratch.gA_tt[8 * n + col]), pass = scratch.pass[row],
                   u_row = scratch.u[row];
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int h = i / 2;
        const float gA_now = i % 2 ? gA_tt.y : gA_tt.x, u_gA = (h ? u_row.y : u_row.x) * gA_now;
        gr_now.half[n].c[i] += u_gA * k_half.c[i];
        gk_now.half[n].c[i] += u_gA * r_half.c[i];
        (h ? gu_now.y : gu_now.x) += r_half.c[i] * (k_half.c[i] * gA_now);
        r_gr.half[n].c[i] -= kk_gk.c[i];
        g_log_w_now.half[n].c[i] = (h ? pass.y : pass.x) - kk_gk.c[i];
      }
      scratch.gu[lane] = gu_now;
      set_rounded(gr_rounded, n, gr_now.half[n]);
      set_rounded(gk_rounded, n, gk_now.half[n]);
    }

    // Sums of r_gr over later tokens, of k_gk over earlier ones: products with 0 and 1 again. r_gr cancels, so in two bf16.
    const Block r_gr_high = rounded(r_gr);
    auto rest = [&](int n) { return each([&](int i) { return r_gr.half[n].c[i] - floats(r_gr_high, n).c[i]; }); };
    const Block r_gr_low = rounded(Tile{{rest(0), rest(1)}});
    const uint32_t after = ranges.upto ^ ONES;
    Half &first = g_log_w_now.half[0], &second = g_log_w_now.half[1];
    mma_bf16(first.c, r_gr_high.x, after, ONES);
    mma_bf16(first.c, r_gr_low.x, after, ONES);
    mma_bf16_k8(first.c, k_gk.x, ranges.before);
    mma_bf16_k8(second.c, r_gr_high.x + 2, after);
    mma_bf16_k8(second.c, r_gr_low.x + 2, after);
    mma_bf16(second.c, k_gk.x, ONES, ranges.before);
    if (const uint32_t clamped = scratch.clamped[lane]) {
#pragma unroll
      for (int i = 0; i < 8; i++)
        if (clamped >> (15 + 16 * (i % 2) - i / 2) & 1) g_log_w_now.half[i / 4].c[i % 4] = 0.f;
    }

    const int tokens = shape.T - chunk * L;
    __syncwarp();
    store_for_transposition(scratch.out[0], gr_rounded, lane);
    store_for_transposition(scratch.out[1], gk_rounded, lane);
    __syncwarp();
    const Block gr_out = load_for_output(scratch.out[0], lane), gk_out = load_for_output(scratch.out[1], lane);
    [[maybe_unused]] Block g_log_w_out;
    if constexpr (sizeof(W) == 2) {
      __syncwarp();
      store_for_transposition(scratch.out[0], rounded(g_log_w_now), lane);
      __syncwarp();
      g_log_w_out = load_for_output(scratch.out[0], lane);
    }
#pragma unroll
    for (int n = 0; n < 2; n++) {
      [[maybe_unused]] float4 g_log_w_floats;
      if constexpr (sizeof(W) == 4) g_log_w_floats = transposed_half(g_log_w_now.half[n], scratch.out[0], lane);
      if (row + 8 * n < tokens) {
        const int64_t at = here + (row * place.stride + 2 * col) + n * 8 * int64_t(place.stride);
        write_pairs(gr + at, gr_out.x[2 * n], gr_out.x[2 * n + 1]);
        write_pairs(gk + at, gk_out.x[2 * n], gk_out.x[2 * n + 1]);
        if constexpr (sizeof(W) == 2) write_pairs(g_log_w + at, g_log_w_out.x[2 * n], g_log_w_out.x[2 * n + 1]);
        else *reinterpret_cast<float4*>(g_log_w + at) = g_log_w_floats;
      }
    }

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
                load_slice_transposed<SECOND>(sheets.gy[warp], lane));
    write_slice(gv + here, rounded(gv_now), place.stride, tokens, scratch.out[0], lane);

    here -= step;
    kept--;
    slot = slot < 2 ? slot + 1 : 0;
  }

  const int lane_again = lane_index();
  if (g_state && place.chunk == 0)
    for_each_of_keys(G, warp, lane_again, [&](float& x, int i) { g_state[batch_head() * N * N + i] = x; });
  float* const gu_row = gu + batch_head_segment(shape) * N + 16 * warp + row_of(lane_again);
  float2 sum = scratch.gu[lane_again];
#pragma unroll
  for (int bit = 1; bit <= 2; bit *= 2) {
    sum.x += __shfl_xor_sync(0xffffffffu, sum.x, bit);
    sum.y += __shfl_xor_sync(0xffffffffu, sum.y, bit);
  }
  if (lane_again % 4 == 0) gu_row[0] = sum.x, gu_row[8] = sum.y;
}

// (B, H, segments, 64) to (B, H, 64)
__global__ void sum_segments(int segments, const float* parts, float* gu) {
  float sum = 0.f;
  for (int j = 0; j < segments; j++) sum += parts[(int64_t(blockIdx.x) * segments + j) * N + threadIdx.x];
  gu[int64_t(blockIdx.x) * N + threadIdx.x] = sum;
}

// ---- host

static bool valid(int w_dtype, int64_t B, int64_t T, int64_t H, int segments) {
  return (w_dtype == FLOAT32 || w_dtype == BFLOAT16) && B > 0 && T > 0 && H > 0 && T <= INT32_MAX - L && segments > 0 &&
         segments <= 65535 && segments <= (T + L - 1) / L && H <= 1 << 18 && B <= INT32_MAX / H;
}

// Scratch memory: states and decays of the segments, and the parts of gu.
struct Scratch {
  float *states, *decays, *gu;
  Scratch(void* memory, int64_t blocks)
      : states(static_cast<float*>(memory)), decays(states + blocks * N * N), gu(decays + blocks * N) {}
};

static dim3 grid_of(const Shape& shape, int64_t BH) {
  return dim3(static_cast<unsigned>(BH), static_cast<unsigned>(shape.segments));
}

// scratch.states: what each segment starts from (in reverse: ends with, for G), where the whole starts from `first`.
template <class W, bool reverse>
static int start_segments(Shape shape, int64_t BH, const bf16* x, const bf16* z, const W* log_w, const float* first,
                          const Scratch& scratch, void* stream) {
  const int error = launch(segment_states<W, reverse>, grid_of(shape, BH), dim3(THREADS), sizeof(SegmentShared<W>), stream,
                           shape, x, z, log_w, scratch.states, scratch.decays);
  if (error) return error;
  return launch(chain_segments<reverse>, dim3(static_cast<unsigned>(BH), N * N / 256), dim3(256), 0, stream, shape.segments,
                first, scratch.states, scratch.decays);
}

template <class W>
static int forward(Shape shape, int64_t BH, const bf16* r, const bf16* k, const bf16* v, const W* log_w, const float* u,
                   const float* state, bf16* y, float* final_state, Checkpoint* checkpoints, void* memory, void* stream) {
  if (shape.segments > 1) {
    const Scratch scratch(memory, BH * shape.segments);
    const int error = start_segments<W, false>(shape, BH, k, v, log_w, state, scratch, stream);
    if (error) return error;
    state = scratch.states;
  }
  return launch(chunk_forward<W>, grid_of(shape, BH), dim3(THREADS), sizeof(ForwardShared<W>), stream, shape, r, k, v, log_w,
                u, state, y, final_state, checkpoints);
}

template <class W>
static int backward(Shape shape, int64_t BH, const bf16* r, const bf16* k, const bf16* v, const W* log_w, const float* u,
                    const Checkpoint* checkpoints, const bf16* gy, const float* g_final, bf16* gr, bf16* gk, bf16* gv,
                    W* g_log_w, float* gu, float* g_state, void* memory, void* stream) {
  const Scratch scratch(memory, BH * shape.segments);
  const bool segmented = shape.segments > 1;
  if (segmented) {
    const int error = start_segments<W, true>(shape, BH, r, gy, log_w, g_final, scratch, stream);
    if (error) return error;
    g_final = scratch.states;
  }
  const int error = launch(chunk_backward<W>, grid_of(shape, BH), dim3(THREADS), sizeof(BackwardShared<W>), stream, shape, r,
                           k, v, log_w, u, checkpoints, gy, g_final, gr, gk, gv, g_log_w, segmented ? scratch.gu : gu,
                           g_state);
  if (error || !segmented) return error;
  return launch(sum_segments, dim3(static_cast<unsigned>(BH)), dim3(N), 0, stream, shape.segments, scratch.gu, gu);
}

// The C interface: device pointers, the tensors and checkpoints aligned to 16 bytes; w_dtype, the dtype of log_w and its
// gradient, a code of device.cuh; a stream. Returns a CUDA error code, 0 for success. `segments`: 1 to ceil(T / 16) and at
// most 65535; forward and backward need not take the same.

extern "C" int64_t wkv6_chunk_checkpoint_bytes(int64_t B, int64_t T, int64_t H) {
  return B * H * ((T + L - 1) / L) * static_cast<int64_t>(sizeof(Checkpoint));
}

// Bytes of `scratch` for forward and backward.
extern "C" int64_t wkv6_chunk_scratch_bytes(int64_t B, int64_t H, int segments) {
  return segments == 1 ? 0 : B * H * segments * static_cast<int64_t>((N * N + 2 * N) * sizeof(float));
}

// A good number of segments: one where there are two blocks a multiprocessor anyway, else so many that there are, but none
// below 256 tokens, as segments cost another pass over three of the tensors.
extern "C" int wkv6_chunk_segments(int64_t B, int64_t T, int64_t H, int multiprocessors) {
  const int64_t wanted = 2 * int64_t(multiprocessors), blocks = B * H, longest = T / (16 * L);
  const int64_t segments = (wanted + blocks - 1) / blocks;
  return static_cast<int>(segments < longest ? segments : longest > 1 ? longest : 1);
}

extern "C" int wkv6_chunk_forward(int w_dtype, int64_t B, int64_t T, int64_t H, const void* r, const void* k, const void* v,
                                  const void* log_w, const float* u, const float* state /* or null: zeros */, void* y,
                                  float* final_state, void* checkpoints /* or null: no backward pass */, void* scratch,
                                  int segments, void* stream) {
  if (!valid(w_dtype, B, T, H, segments) || !aligned({r, k, v, log_w, y, checkpoints})) return invalid_value;
  const Shape shape{static_cast<int>(T), static_cast<int>(H), segments};
  auto run = [&](auto* w) {
    return forward(shape, B * H, static_cast<const bf16*>(r), static_cast<const bf16*>(k), static_cast<const bf16*>(v), w,
                   u, state, static_cast<bf16*>(y), final_state, static_cast<Checkpoint*>(checkpoints), scratch, stream);
  };
  return w_dtype == BFLOAT16 ? run(static_cast<const bf16*>(log_w)) : run(static_cast<const float*>(log_w));
}

extern "C" int wkv6_chunk_backward(int w_dtype, int64_t B, int64_t T, int64_t H, const void* r, const void* k, const void* v,
                                   const void* log_w, const float* u, const void* checkpoints, const void* gy,
                                   const float* g_final /* or null: zeros */, void* gr, void* gk, void* gv, void* g_log_w,
                                   float* gu, float* g_state /* or null: not wanted */, void* scratch, int segments,
                                   void* stream) {
  if (!valid(w_dtype, B, T, H, segments) || !aligned({r, k, v, log_w, checkpoints, gy, gr, gk, gv, g_log_w}))
    return invalid_value;
  const Shape shape{static_cast<int>(T), static_cast<int>(H), segments};
  auto run = [&](auto* w, auto* gw) {
    return backward(shape, B * H, static_cast<const bf16*>(r), static_cast<const bf16*>(k), static_cast<const bf16*>(v), w,
                    u, static_cast<const Checkpoint*>(checkpoints), static_cast<const bf16*>(gy), g_final,
                    static_cast<bf16*>(gr), static_cast<bf16*>(gk), static_cast<bf16*>(gv), gw, gu, g_state, scratch,
                    stream);
  };
  return w_dtype == BFLOAT16 ? run(static_cast<const bf16*>(log_w), static_cast<bf16*>(g_log_w))
                             : run(static_cast<const float*>(log_w), static_cast<float*>(g_log_w));
}
