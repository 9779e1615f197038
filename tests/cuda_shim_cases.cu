// Small kernels, right and wrong, for test_cuda_shim.py. They run only on the shim.
#include "device.cuh"

// Reverses 64 numbers through shared memory.
template <bool barrier>
__global__ void reverse(const float* from, float* to) {
  __shared__ float x[64];
  x[threadIdx.x] = from[threadIdx.x];
  if (barrier) __syncthreads();
  to[threadIdx.x] = x[63 - threadIdx.x];
}
extern "C" int run_reverse(const float* from, float* to) { return launch(reverse<true>, 1, 64, 0, nullptr, from, to); }
extern "C" int run_reverse_without_barrier(const float* from, float* to) {
  return launch(reverse<false>, 1, 64, 0, nullptr, from, to);
}

// The block's sum, by shuffles and shared memory, in each of 3 x 2 blocks.
__global__ void block_sum(const float* from, float* to) {
  __shared__ float warp_sums[4];
  const int block = blockIdx.y * gridDim.x + blockIdx.x, i = threadIdx.y * blockDim.x + threadIdx.x;
  float x = from[block * 128 + i];
  for (int m = 16; m > 2; m /= 2) x += __shfl_xor_sync(0xffffffffu, x, m);
  x += __shfl_down_sync(0xffffffffu, x, 2);
  x += __shfl_down_sync(0xffffffffu, x, 1);
  x = __shfl_sync(0xffffffffu, x, 0);
  if (i % 32 == 31) warp_sums[i / 32] = x;
  __syncthreads();
  if (i == 0) to[block] = warp_sums[0] + warp_sums[1] + warp_sums[2] + warp_sums[3];
}
extern "C" int run_block_sum(const float* from, float* to) {
  return launch(block_sum, dim3(3, 2), dim3(16, 8), 0, nullptr, from, to);
}

// C (16, 8) = A (16, 16) B (16, 8), elements fetched one by one as the PTX ISA lists them for mma.m16n8k16:
// A's i-th of 8: row groupID (+ 8 unless i < 2 or 4 <= i < 6), column threadID_in_group 2 + (i & 1) (+ 8 if i >= 4);
// B's i-th of 4: row threadID_in_group 2 + (i & 1) (+ 8 if i >= 2), column groupID;
// C's i-th of 4: row groupID (+ 8 if i >= 2), column threadID_in_group 2 + (i & 1).
__global__ void product_bf16(const bf16* A, const bf16* B, float* C) {
  const int group = threadIdx.x >> 2, in_group = threadIdx.x % 4;
  bf16 a[8], b[4];
  for (int i = 0; i < 8; i++) {
    const int row = i < 2 || (i >= 4 && i < 6) ? group : group + 8;
    const int column = in_group * 2 + (i & 1) + (i >= 4 ? 8 : 0);
    a[i] = A[row * 16 + column];
  }
  for (int i = 0; i < 4; i++) b[i] = B[(in_group * 2 + (i & 1) + (i >= 2 ? 8 : 0)) * 8 + group];
  uint32_t a_pairs[4], b_pairs[2];
  memcpy(a_pairs, a, sizeof a);
  memcpy(b_pairs, b, sizeof b);
  float c[4] = {};
  mma_bf16(c, a_pairs, b_pairs[0], b_pairs[1]);
  for (int i = 0; i < 4; i++) C[(i < 2 ? group : group + 8) * 8 + in_group * 2 + (i & 1)] = c[i];
}
extern "C" int run_product_bf16(const bf16* A, const bf16* B, float* C) {
  return launch(product_bf16, 1, 32, 0, nullptr, A, B, C);
}

// The same from shared memory: ldmatrix for A, transposed for B, copied there by cp.async.
template <bool wait>
__global__ void product_ldmatrix(const bf16* A, const bf16* B, float* C) {
  __shared__ __align__(16) bf16 a[16][24], b[16][8];
  const int lane = threadIdx.x;
  cp_async_16(&a[lane / 2][lane % 2 * 8], A + lane * 8);
  cp_async_commit();
  if (lane < 16) cp_async_16(&b[lane][0], B + lane * 8);
  cp_async_commit();
  if (wait) {
    cp_async_wait<1>();
    cp_async_wait<0>();
  }
  __syncwarp();
  uint32_t a_pairs[4], b_pairs[2];
  ldmatrix<4>(a_pairs, &a[lane % 16][lane / 16 * 8]);
  ldmatrix_trans<2>(b_pairs, &b[lane % 16][0]);
  float c[4] = {};
  mma_bf16(c, a_pairs, b_pairs[0], b_pairs[1]);
  for (int i = 0; i < 4; i++) C[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = c[i];
  cp_async_wait<0>();
}
extern "C" int run_product_ldmatrix(const bf16* A, const bf16* B, float* C) {
  return launch(product_ldmatrix<true>, 1, 32, 0, nullptr, A, B, C);
}
extern "C" int run_product_too_early(const bf16* A, const bf16* B, float* C) {
  return launch(product_ldmatrix<false>, 1, 32, 0, nullptr, A, B, C);
}

// C (16, 8) = A (16, 8) B (8, 8), as the PTX ISA lists mma.m16n8k8 for tf32:
// A's i-th of 4: row groupID (+ 8 for a1, a3), column threadID_in_group (+ 4 for a2, a3); B's: row threadID_in_group (+ 4
// for b1), column groupID; C as above.
__global__ void product_tf32(const float* A, const float* B, float* C) {
  const int group = threadIdx.x >> 2, in_group = threadIdx.x % 4;
  uint32_t a[4];
  for (int i = 0; i < 4; i++) a[i] = to_tf32(A[(group + (i == 1 || i == 3 ? 8 : 0)) * 8 + in_group + (i >= 2 ? 4 : 0)]);
  float c[4] = {};
  mma_tf32(c, a, to_tf32(B[in_group * 8 + group]), to_tf32(B[(in_group + 4) * 8 + group]));
  for (int i = 0; i < 4; i++) C[(i < 2 ? group : group + 8) * 8 + in_group * 2 + (i & 1)] = c[i];
}
extern "C" int run_product_tf32(const float* A, const float* B, float* C) {
  return launch(product_tf32, 1, 32, 0, nullptr, A, B, C);
}

// Number formats: to bf16 and back, 2^x.
__global__ void formats(const float* from, float* rounded, float* powers) {
  const int i = threadIdx.x;
  rounded[i] = i % 2 ? high_bf16(pack_bf16(0.f, from[i])) : low_bf16(pack_bf16(from[i], 0.f));
  powers[i] = ex2(from[i]);
}
extern "C" int run_formats(const float* from, float* rounded, float* powers) {
  return launch(formats, 1, 128, 0, nullptr, from, rounded, powers);
}

// Shared memory that nobody wrote, static and dynamic.
__global__ void uninitialised(float* to) {
  DYNAMIC_SHARED(memory);
  __shared__ float x[32];
  if (threadIdx.x == 0) x[0] = 1.f;
  __syncthreads();
  to[threadIdx.x] = x[threadIdx.x];
  to[32 + threadIdx.x] = reinterpret_cast<float*>(memory)[threadIdx.x];
}
extern "C" int run_uninitialised(float* to) { return launch(uninitialised, 1, 32, 128, nullptr, to); }

// From here on: wrong programs, each of which the shim must stop.

__global__ void half_at_a_barrier() {
  if (threadIdx.x < 64) __syncthreads();
}
extern "C" int stop_barrier_not_reached() { return launch(half_at_a_barrier, 1, 128, 0, nullptr); }

__global__ void two_barriers() {
  if (threadIdx.x < 64) __syncthreads();
  else
    __syncthreads();
}
extern "C" int stop_two_barriers() { return launch(two_barriers, 1, 128, 0, nullptr); }

__global__ void half_a_warp_shuffles(float* to) {
  float x = threadIdx.x;
  if (threadIdx.x < 16) x = __shfl_xor_sync(0xffffffffu, x, 1);
  to[threadIdx.x] = x;
}
extern "C" int stop_divergent_warp() {
  static float to[32];
  return launch(half_a_warp_shuffles, 1, 32, 0, nullptr, to);
}

__global__ void shuffle_against_barrier() {
  if (threadIdx.x < 16) __syncwarp();
  else __syncthreads();
}
extern "C" int stop_shuffle_against_barrier() { return launch(shuffle_against_barrier, 1, 32, 0, nullptr); }

__global__ void small_warp() { __syncwarp(); }
extern "C" int stop_small_warp() { return launch(small_warp, 1, 40, 0, nullptr); }

__global__ void overrun() {
  DYNAMIC_SHARED(memory);
  memory[100] = 1;
}
extern "C" int stop_overrun() { return launch(overrun, 1, 32, 100, nullptr); }

extern "C" int stop_too_much_shared() { return launch(small_warp, 1, 32, 120 * 1024, nullptr); }

__global__ void misaligned() {
  __shared__ __align__(16) bf16 x[32][9];
  uint32_t pairs[1];
  ldmatrix<1>(pairs, x[threadIdx.x]);
}
extern "C" int stop_misaligned() { return launch(misaligned, 1, 32, 0, nullptr); }

alignas(16) static unsigned char outside[64];
__global__ void copy_to_global(const void* from) {
  cp_async_16(outside, from);
  cp_async_commit();
  cp_async_wait<0>();
}
extern "C" int stop_copy_to_global() { return launch(copy_to_global, 1, 1, 0, nullptr, (const void*)outside); }

template <bool commit>
__global__ void copy_without_wait(const void* from) {
  __shared__ __align__(16) unsigned char x[16];
  cp_async_16(x, from);
  if (commit) cp_async_commit();
}
extern "C" int stop_never_waited() { return launch(copy_without_wait<true>, 1, 1, 0, nullptr, (const void*)outside); }
extern "C" int stop_never_committed() { return launch(copy_without_wait<false>, 1, 1, 0, nullptr, (const void*)outside); }

// Races, which are stopped only in a library compiled to look for them.

// Thread 0 writes and then another, in the warp `apart` from it, reads; or the reverse.
enum Between { NOTHING, SHUFFLE, WARP, BLOCK };
template <bool write_first, Between between>
__global__ void two_accesses(int apart, float* to) {
  __shared__ float x[2];
  const bool first = threadIdx.x == 0, second = static_cast<int>(threadIdx.x) == 1 + 32 * apart;
  if (first && write_first) x[0] = 1.f;
  if (first && !write_first) to[0] = x[0];
  if (between == SHUFFLE) __shfl_xor_sync(0xffffffffu, 0, 1);
  if (between == WARP) __syncwarp();
  if (between == BLOCK) __syncthreads();
  if (second && write_first) to[0] = x[0];
  if (second && !write_first) x[0] = 1.f;
}
static float somewhere[64];
template <bool write_first, Between between>
static int run_two_accesses(int apart) {
  return launch(two_accesses<write_first, between>, 1, 64, 0, nullptr, apart, (float*)somewhere);
}
extern "C" int run_a_warp_in_step() { return run_two_accesses<true, WARP>(0) | run_two_accesses<false, WARP>(0); }
extern "C" int run_a_block_in_step() { return run_two_accesses<true, BLOCK>(1) | run_two_accesses<false, BLOCK>(1); }
extern "C" int stop_read_after_write() { return run_two_accesses<true, NOTHING>(0); }
extern "C" int stop_write_after_read() { return run_two_accesses<false, NOTHING>(0); }
extern "C" int stop_only_a_shuffle_between() { return run_two_accesses<true, SHUFFLE>(0); }
extern "C" int stop_read_of_another_warp() { return run_two_accesses<true, WARP>(1); }
extern "C" int stop_write_after_read_of_another_warp() { return run_two_accesses<false, WARP>(1); }

__global__ void two_writes(float* to) {
  __shared__ float x;
  x = 1.f;
  __syncwarp();
  to[threadIdx.x] = x;
}
extern "C" int stop_two_writes() { return launch(two_writes, 1, 32, 0, nullptr, (float*)somewhere); }

// A lane's own words, then a matrix of all lanes' words.
template <bool in_step>
__global__ void matrix_of_all(uint32_t* to) {
  __shared__ __align__(16) uint32_t x[32];
  x[threadIdx.x] = threadIdx.x;
  if (in_step) __syncwarp();
  uint32_t mine;
  ldmatrix<1>(&mine, x + threadIdx.x % 8 * 4);
  to[threadIdx.x] = mine;
}
extern "C" int run_matrix_of_all() { return launch(matrix_of_all<true>, 1, 32, 0, nullptr, (uint32_t*)somewhere); }
extern "C" int stop_matrix_too_early() { return launch(matrix_of_all<false>, 1, 32, 0, nullptr, (uint32_t*)somewhere); }

// Every lane copies 16 bytes, and reads those of a neighbour or its own; then 16 more come to the same place.
template <bool wait, bool in_step, bool in_step_again>
__global__ void copies(const float* from, int neighbour, float* to) {
  __shared__ __align__(16) float x[32][4];
  for (int i = 0; i < 2; i++) {
    cp_async_16(x[threadIdx.x], from);
    cp_async_commit();
    if (wait) cp_async_wait<0>();
    if (in_step) __syncwarp();
    to[threadIdx.x] = x[threadIdx.x ^ neighbour][0];
    if (in_step_again) __syncwarp();
  }
  cp_async_wait<0>();
}
template <bool wait, bool in_step, bool in_step_again>
static int run_copies(int neighbour) {
  return launch(copies<wait, in_step, in_step_again>, 1, 32, 0, nullptr, (const float*)outside, neighbour, (float*)somewhere);
}
extern "C" int run_own_copies() { return run_copies<true, false, false>(0); }
extern "C" int run_others_copies() { return run_copies<true, true, true>(1); }
extern "C" int stop_own_copy_too_early() { return run_copies<false, true, true>(0); }
extern "C" int stop_waited_for_by_another_lane() { return run_copies<true, false, true>(1); }
extern "C" int stop_copy_over_what_is_read() { return run_copies<true, true, false>(1); }
