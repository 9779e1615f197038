// What the CUDA kernels share: number formats, tensor core and copy instructions, the launch. Needs sm_80 or newer, the number
// formats and the launch sm_75.
// Two bodies, one meaning: PTX under nvcc; elsewhere tests/cuda_shim.h, which runs the kernels on a CPU.
#pragma once
#include <cstddef>
#include <cstdint>
#ifndef __CUDACC__
#include "cuda_shim.h"
#define DEVICE static inline
#else
#define DEVICE static __device__ __forceinline__
#endif

struct bf16 {
  uint16_t bits;
};

// The dtype codes of the C interface.
enum { FLOAT32 = 0, BFLOAT16 = 1 };

constexpr int invalid_value = 1;  // cudaErrorInvalidValue

#ifdef __CUDACC__

#define DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]

// Two floats to bf16, nearest even; `low` goes to the lower half (the lower address, the lower index of a fragment).
DEVICE uint32_t round_to_bf16(float x);
DEVICE uint32_t pack_bf16(float low, float high) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
  return round_to_bf16(low) | round_to_bf16(high) << 16;
#else
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
#endif
}

DEVICE float bits_to_float(uint32_t bits) { return __uint_as_float(bits); }
DEVICE uint32_t float_to_bits(float x) { return __float_as_uint(x); }

// The thread's place in its warp, read anew at every call: what is made of it need not live in registers from one use to
// the next.
DEVICE int lane_index() {
  unsigned lane;
  asm volatile("mov.u32 %0, %%laneid;" : "=r"(lane));
  return lane & 31;  // known to the compiler to be small
}

// 2^x, to 2 ulp; results below 2^-126 are 0.
DEVICE float ex2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// The larger of two bf16, for both halves.
DEVICE uint32_t max_bf16(uint32_t a, uint32_t b) {
  uint32_t pair;
  asm("max.bf16x2 %0, %1, %2;" : "=r"(pair) : "r"(a), "r"(b));
  return pair;
}

// The nearest tf32 number, as the operand of an mma.
DEVICE uint32_t to_tf32(float x) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return bits;
}

// D (16, 8) += A (16, 16) B (16, 8): bf16 operands, fp32 accumulators, fragments as in the PTX ISA.
DEVICE void mma_bf16(float* d, const uint32_t* a, uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// The same with A (16, 8) B (8, 8): a[0], a[1] and b0 alone.
DEVICE void mma_bf16_k8(float* d, const uint32_t* a, uint32_t b0) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(b0));
}

// D (16, 8) += A (16, 8) B (8, 8): tf32 operands.
DEVICE void mma_tf32(float* d, const uint32_t* a, uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

DEVICE uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// `matrices` (1, 2 or 4) 8x8 matrices of 16-bit elements from shared memory, one register each; lane 8 m + i gives the
// address of row i of matrix m, aligned to 16 bytes.
template <int matrices>
DEVICE void ldmatrix(uint32_t* to, const void* row) {
  static_assert(matrices == 1 || matrices == 2 || matrices == 4, "ldmatrix loads 1, 2 or 4 matrices");
  const uint32_t from = shared_address(row);
  if constexpr (matrices == 1)
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];" : "=r"(to[0]) : "r"(from) : "memory");
  else if constexpr (matrices == 2)
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];"
                 : "=r"(to[0]), "=r"(to[1]) : "r"(from) : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(from) : "memory");
}

// The same, each matrix transposed.
template <int matrices>
DEVICE void ldmatrix_trans(uint32_t* to, const void* row) {
  static_assert(matrices == 1 || matrices == 2 || matrices == 4, "ldmatrix loads 1, 2 or 4 matrices");
  const uint32_t from = shared_address(row);
  if constexpr (matrices == 1)
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];" : "=r"(to[0]) : "r"(from) : "memory");
  else if constexpr (matrices == 2)
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
                 : "=r"(to[0]), "=r"(to[1]) : "r"(from) : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(from) : "memory");
}

// 16 bytes from global to shared memory behind the program's back; where `ok` is false, zeros. Then commit (closes a
// group of copies), wait (until at most `groups_left` groups are under way), and a barrier if other threads read them.
DEVICE void cp_async_16(void* to, const void* from, bool ok = true) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               ::"r"(shared_address(to)), "l"(from), "r"(ok ? 16 : 0) : "memory");
}
DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int groups_left>
DEVICE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(groups_left) : "memory");
}

// Starts the kernel on a stream of the current device; returns a CUDA error code, 0 for success.
template <class... Parameters, class... Arguments>
static int launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, void* stream,
                  Arguments... arguments) {
  if (shared_bytes > 48 * 1024) {
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                   static_cast<int>(shared_bytes));
    if (error != cudaSuccess) return cudaGetLastError();  // which is forgotten then, and not told again of the next launch
  }
  kernel<<<grid, block, shared_bytes, static_cast<cudaStream_t>(stream)>>>(arguments...);
  return cudaGetLastError();
}

#else

#define DYNAMIC_SHARED(name) unsigned char* name = shim::dynamic_shared.data()

DEVICE float bits_to_float(uint32_t bits) { return shim::bits_to_float(bits); }
DEVICE uint32_t float_to_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}
DEVICE int lane_index() { return shim::current->lane; }
DEVICE uint32_t round_to_bf16(float x);
DEVICE uint32_t pack_bf16(float low, float high) { return round_to_bf16(low) | round_to_bf16(high) << 16; }
DEVICE float ex2(float x) {
  const float y = exp2f(x);
  return y < 0x1p-126f ? 0.f : y;
}
DEVICE uint32_t max_bf16(uint32_t a, uint32_t b) {
  return pack_bf16(fmaxf(bits_to_float(a << 16), bits_to_float(b << 16)),
                   fmaxf(bits_to_float(a & 0xffff0000u), bits_to_float(b & 0xffff0000u)));
}
DEVICE uint32_t to_tf32(float x) {  // nearest, ties away from zero
  const uint32_t bits = float_to_bits(x);
  return std::isfinite(x) ? (bits + 0x1000) & 0xffffe000u : bits;
}
DEVICE void mma_bf16(float* d, const uint32_t* a, uint32_t b0, uint32_t b1, CUDA_SHIM_HERE) {
  shim::mma(shim::mma_m16n8k16_bf16, d, a, b0, b1, {file, line});
}
DEVICE void mma_bf16_k8(float* d, const uint32_t* a, uint32_t b0, CUDA_SHIM_HERE) {
  const uint32_t widened[4] = {a[0], a[1], 0, 0};
  shim::mma(shim::mma_m16n8k16_bf16, d, widened, b0, 0, {file, line});
}
DEVICE void mma_tf32(float* d, const uint32_t* a, uint32_t b0, uint32_t b1, CUDA_SHIM_HERE) {
  shim::mma(shim::mma_m16n8k8_tf32, d, a, b0, b1, {file, line});
}
template <int matrices>
DEVICE void ldmatrix(uint32_t* to, const void* row, CUDA_SHIM_HERE) {
  shim::ldmatrix<matrices, false>(to, row, {file, line});
}
template <int matrices>
DEVICE void ldmatrix_trans(uint32_t* to, const void* row, CUDA_SHIM_HERE) {
  shim::ldmatrix<matrices, true>(to, row, {file, line});
}
DEVICE void cp_async_16(void* to, const void* from, bool ok = true, CUDA_SHIM_HERE) {
  shim::cp_async(to, from, 16, ok ? 16 : 0, {file, line});
}
DEVICE void cp_async_commit() { shim::cp_async_commit(); }
template <int groups_left>
DEVICE void cp_async_wait() {
  shim::cp_async_wait(groups_left);
}
template <class... Parameters, class... Arguments>
static int launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, void*,
                  Arguments... arguments) {
  return shim::launch(grid, block, shared_bytes, [=] { kernel(arguments...); });
}

#endif

DEVICE uint32_t round_to_bf16(float x) {
  const uint32_t bits = float_to_bits(x);
  return x != x ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
DEVICE float low_bf16(uint32_t pair) { return bits_to_float(pair << 16); }
DEVICE float high_bf16(uint32_t pair) { return bits_to_float(pair & 0xffff0000u); }

DEVICE float to_float(float x) { return x; }
DEVICE float to_float(bf16 x) { return bits_to_float(uint32_t(x.bits) << 16); }
DEVICE void store(float* to, float x) { *to = x; }
DEVICE void store(bf16* to, float x) { to->bits = static_cast<uint16_t>(pack_bf16(x, 0.f)); }
