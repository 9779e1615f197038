// What the chunk kernels share: 16x16 blocks in registers, their one product on tensor cores, and how they lie in shared memory
// and travel to and from global memory. Head size 64, chunks of 16 tokens, bf16.
#pragma once
#include <initializer_list>

#include "device.cuh"

constexpr int N = 64, L = 16;  // head size; tokens of a chunk
constexpr int WARPS = 4;       // a warp owns 16 of the 64 channels
constexpr int THREADS = 32 * WARPS;
constexpr float LOG2_E = 1.44269504f;
constexpr uint32_t ONES = 0x3f803f80u;  // two bf16

// ---- 16x16 blocks and the one product
//
// A block of bf16 is spread over the warp as mma wants its first operand: register h + 2 n of a lane holds elements
// (row + 8 h, 8 n + col) and (row + 8 h, 8 n + col + 1), row = lane / 4, col = 2 (lane % 4). The same registers, paired
// otherwise, are mma's second operand for the transposed block. A tile is the fp32 result: half[n].c[2 h + e] is element
// (row + 8 h, 8 n + col + e), so a rounded tile is a block again.

struct Block {
  uint32_t x[4];
};
struct Half {  // eight columns
  float c[4];
};
struct Tile {
  Half half[2];
};

// The compiler cannot know that threadIdx.x / 32 is the same for a whole warp; so it does, and saves registers.
DEVICE int warp_index() { return __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x / 32), 0); }
DEVICE int row_of(int lane) { return lane / 4; }
DEVICE int col_of(int lane) { return 2 * (lane % 4); }

// columns 8 n to 8 n + 7 of d += a b^T
template <int n>
DEVICE void add_half_product(Tile& d, const Block& a, const Block& b) {
  mma_bf16(d.half[n].c, a.x, b.x[n], b.x[n + 2]);
}
// d += a b^T
DEVICE void add_product(Tile& d, const Block& a, const Block& b) {
  add_half_product<0>(d, a, b);
  add_half_product<1>(d, a, b);
}
// The same in halves of the sum. The second operand need not lie in pairs of registers, which saves moves for a block that is
// a first operand elsewhere.
DEVICE void add_product_by_halves(Tile& d, const Block& a, const Block& b) {
#pragma unroll
  for (int i = 0; i < 4; i++) mma_bf16_k8(d.half[i % 2].c, a.x + i / 2 * 2, b.x[i]);
}

template <class F>
DEVICE Half each(F f) {  // c[i] = f(i)
  return {{f(0), f(1), f(2), f(3)}};
}
DEVICE Half floats(const Block& b, int n) {
  return {{low_bf16(b.x[2 * n]), high_bf16(b.x[2 * n]), low_bf16(b.x[2 * n + 1]), high_bf16(b.x[2 * n + 1])}};
}
DEVICE void set_rounded(Block& b, int n, const Half& x) {
  b.x[2 * n] = pack_bf16(x.c[0], x.c[1]);
  b.x[2 * n + 1] = pack_bf16(x.c[2], x.c[3]);
}
DEVICE Block rounded(const Tile& t) {
  Block b;
  set_rounded(b, 0, t.half[0]);
  set_rounded(b, 1, t.half[1]);
  return b;
}
DEVICE Half times(const Half& a, const Half& b) {
  return each([&](int i) { return a.c[i] * b.c[i]; });
}
DEVICE Tile times(const Tile& a, const Tile& b) { return {{times(a.half[0], b.half[0]), times(a.half[1], b.half[1])}}; }
DEVICE Half plus_product(const Half& sum, const Half& a, const Half& b) {
  return each([&](int i) { return sum.c[i] + a.c[i] * b.c[i]; });
}
DEVICE Block scaled(const Block& b, const Tile& by) { return rounded(times(Tile{{floats(b, 0), floats(b, 1)}}, by)); }

// ---- blocks in shared memory, in two forms; no access of them meets a bank twice
//
// slice: 16 tokens, 32 bytes each, of one warp's channels; the two 16-byte pieces are swapped in every other four tokens.
// tiled: the four registers of a block one after the other, each an 8x8 matrix of 128 bytes; to be loaded transposed.
//
// mma's first operand is four registers in a row, the second pairs of two. ldmatrix loads in the order of either use, told
// which, and saves the moves.

constexpr int BLOCK_BYTES = 512;
enum Order { FIRST, SECOND };
// registers h + 2 n of a block as they come from ldmatrix; its own inverse
template <Order order>
DEVICE Block ordered(const uint32_t (&x)[4]) {
  if constexpr (order == FIRST) return {{x[0], x[1], x[2], x[3]}};
  else return {{x[0], x[2], x[1], x[3]}};
}

DEVICE int slice_offset(int token, int piece) { return token * 32 + ((piece ^ (token >> 2 & 1)) << 4); }
template <Order order>
DEVICE Block load_slice(const unsigned char* slice, int lane) {
  const int h = order == FIRST ? lane >> 3 & 1 : lane >> 4, n = order == FIRST ? lane >> 4 : lane >> 3 & 1;
  uint32_t x[4];
  ldmatrix<4>(x, slice + slice_offset((lane & 7) + 8 * h, n));
  return ordered<order>(x);
}
template <Order order>
DEVICE Block load_slice_transposed(const unsigned char* slice, int lane) {
  const int h = order == FIRST ? lane >> 3 & 1 : lane >> 4, n = order == FIRST ? lane >> 4 : lane >> 3 & 1;
  uint32_t x[4];
  ldmatrix_trans<4>(x, slice + slice_offset((lane & 7) + 8 * n, h));
  return ordered<order>(x);
}

// `order` is that of the load to come. Transposing swaps the two middle registers, and so does SECOND.
template <Order order>
DEVICE void store_tiled(unsigned char* tiled, const Block& b, int lane) {
  const Block in_order = ordered<order == FIRST ? SECOND : FIRST>(b.x);
#pragma unroll
  for (int i = 0; i < 4; i++) *reinterpret_cast<uint32_t*>(tiled + 128 * i + 4 * lane) = in_order.x[i];
}
template <Order order>
DEVICE Block load_tiled_transposed(const unsigned char* tiled, int lane) {
  uint32_t x[4];
  ldmatrix_trans<4>(x, tiled + 16 * lane);
  return ordered<order>(x);
}

// ---- global memory <-> shared memory. `from` and `to` in global memory are the chunk's first token, and for slices the
// warp's first channel; `stride` elements from token to token. Tokens from `tokens` on are beyond T: they read as zeros
// (no key, no decay) and are not written.

template <class X>
constexpr int slice_bytes = L * 16 * sizeof(X);

DEVICE void copy_slice(unsigned char* to, const bf16* from, unsigned stride, int tokens, int lane) {
  const int token = lane / 2, piece = lane % 2;
  cp_async_16(to + slice_offset(token, piece), from + (token * stride + 8 * piece), token < tokens);
}
// A slice of floats: 64 bytes a token, piece p of row i at p ^ (i / 2 % 4).
DEVICE int float_slice_offset(int token, int piece) { return token * 64 + ((piece ^ (token >> 1 & 3)) << 4); }
DEVICE void copy_slice(unsigned char* to, const float* from, unsigned stride, int tokens, int lane) {
#pragma unroll
  for (int i = 0; i < 2; i++) {  // tokens lane / 4 and, 512 bytes on, lane / 4 + 8
    const int token = lane / 4, piece = lane % 4;
    cp_async_16(to + float_slice_offset(token, piece) + 512 * i,
                from + (token * stride + 4 * piece) + i * 8 * int64_t(stride), token + 8 * i < tokens);
  }
}
// b[token, channel], through `scratch` (BLOCK_BYTES of the warp's own): tiled, but with the two halves of the 8x8 matrices of
// the last eight channels swapped, as reading 32 bytes a token would meet banks twice.
DEVICE void write_slice(bf16* to, const Block& b, unsigned stride, int tokens, unsigned char* scratch, int lane) {
#pragma unroll
  for (int i = 0; i < 4; i++) *reinterpret_cast<uint32_t*>(scratch + 128 * i + (4 * lane ^ i / 2 * 64)) = b.x[i];
  __syncwarp();
  const int token = lane / 2, piece = lane % 2;
  const unsigned char* const from = scratch + 128 * (token / 8 + 2 * piece) + (16 * (token % 8) ^ 64 * piece);
  if (token < tokens) *reinterpret_cast<uint4*>(to + (token * stride + 8 * piece)) = *reinterpret_cast<const uint4*>(from);
}

// ---- decays
//
// Sums of log_w over ranges of tokens are products with matrices of 0 and 1, exact in bf16. A float log_w is taken as the
// sum of two bf16, 16 bits of it, so that both types go the same way.

template <class W>
struct LogDecay {  // [channel, token]
  Block part[sizeof(W) == 2 ? 1 : 2];
};
template <Order order>
DEVICE void load(LogDecay<bf16>& w, const unsigned char* slice, int lane) {
  w.part[0] = load_slice_transposed<order>(slice, lane);
}
template <class F>
DEVICE void load(LogDecay<float>& w, const unsigned char* slice, int lane, F of_each) {
  const int first = float_slice_offset(col_of(lane), row_of(lane) / 4) + row_of(lane) % 4 * 4;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    // eight channels on: two pieces, another bit of the offset; eight tokens on: 512 bytes; one token on: 64
    const unsigned char* const at = slice + (first ^ i % 2 * 32) + i / 2 * 512;
    const float a = of_each(*reinterpret_cast<const float*>(at)), b = of_each(*reinterpret_cast<const float*>(at + 64));
    const uint32_t high = pack_bf16(a, b);
    w.part[0].x[i] = high;
    w.part[1].x[i] = pack_bf16(a - low_bf16(high), b - high_bf16(high));
  }
}
template <Order>
DEVICE void load(LogDecay<float>& w, const unsigned char* slice, int lane) {
  load(w, slice, lane, [](float x) { return x; });
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

// ---- host

[[maybe_unused]] static bool aligned(std::initializer_list<const void*> pointers) {
  for (const void* p : pointers)
    if (reinterpret_cast<uintptr_t>(p) % 16) return false;
  return true;
}
