// What the step-by-step kernels share: a block is 16 lines of 16 lanes, and takes 16 steps at a time. A line owns a row or
// column of the state, spread over its lanes, E elements each.
#pragma once
#include "device.cuh"

constexpr int L = 16;  // steps of a tile, lines of a block, lanes of a line

// fp32 or bf16, known at run time. Bits are loaded early and become a float late, so that a load is not waited for.
struct Input {
  const void* data;
  bool is_bf16;
  __device__ uint32_t bits(int64_t i) const {
    return is_bf16 ? static_cast<const uint16_t*>(data)[i] : static_cast<const uint32_t*>(data)[i];
  }
  __device__ float value(uint32_t bits) const { return bits_to_float(is_bf16 ? bits << 16 : bits); }
};
struct Output {
  void* data;
  bool is_bf16;
  __device__ void put(int64_t i, float x) const {
    if (is_bf16) store(static_cast<bf16*>(data) + i, x);
    else store(static_cast<float*>(data) + i, x);
  }
};

// Which channel is element e of a lane: neighbours in groups of four, which one instruction reads from shared memory.
template <int E>
DEVICE int channel(int lane, int e) {
  constexpr int group = E < 4 ? E : 4;
  return e / group * group * L + lane * group + e % group;
}
template <int E>
DEVICE void read_channels(float* to, const float* row, int lane) {
  if constexpr (E % 4 == 0) {
#pragma unroll
    for (int e = 0; e < E; e += 4) {
      const float4 x = *reinterpret_cast<const float4*>(row + channel<E>(lane, e));
      to[e] = x.x, to[e + 1] = x.y, to[e + 2] = x.z, to[e + 3] = x.w;
    }
  } else {
#pragma unroll
    for (int e = 0; e < E; e++) to[e] = row[channel<E>(lane, e)];
  }
}

// The sum over two lanes that differ in `bit`: of a for the lane without the bit, of b for the lane with it.
DEVICE float join(float a, float b, int lane, int bit) {
  const bool has = lane & bit;
  return (has ? b : a) + __shfl_xor_sync(0xffffffffu, has ? a : b, bit);
}
// Four sums over the four lanes that differ in `bit` and `2 bit`, in three shuffles: a lane gets that of x[its two bits].
DEVICE float sum_four(const float (&x)[4], int lane, int bit) {
  return join(join(x[0], x[2], lane, 2 * bit), join(x[1], x[3], lane, 2 * bit), lane, bit);
}

// All lanes return the sum of x over their line.
DEVICE float total_over_line(float x) {
#pragma unroll
  for (int m = L / 2; m; m /= 2) x += __shfl_xor_sync(0xffffffffu, x, m);
  return x;
}

// In shared memory, [step][channel]: all channels, or those of the block's lines. The latter are read along steps too, hence
// the odd row length.
template <int E>
using Wide = float[L][L * E];
using Narrow = float[L][L + 1];
