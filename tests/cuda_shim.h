// Runs CUDA kernels on the CPU, from the very .cu file that nvcc compiles: g++ -std=c++17 -x c++ -I tests cuda/NAME.cu
//
// A block's threads are fibers of one OS thread, and blocks run one after the other. A thread runs until it needs others (a
// barrier, a shuffle, an mma); then the scheduler picks the next one, in an order that cuda_shim_seed() shuffles, so that a
// result which depends on the order shows itself. The process aborts with a message where the program is wrong on a GPU too:
//   - a warp instruction or barrier that some threads of the warp or block do not reach, or reach at another line;
//   - a misaligned ldmatrix or cp.async, one that does not address shared memory, a cp.async never waited for;
//   - dynamic shared memory overrun, or more of it than every supported GPU has;
//   - compiled with -fsanitize=thread (and linked without it): a race on shared memory, whether this run's order shows it or not.
// Shared memory starts as NaN, and so does the target of a cp.async until its wait: reading too early gives NaN.
// Fragment layouts are those of the PTX ISA ("Matrix Fragments for mma.m16n8k16 / m16n8k8", "ldmatrix").
// What it cannot show: ex2.approx's and the tensor cores' own rounding, bank conflicts, occupancy, speed.
// One .cu file is one library: everything here is static, so that libraries loaded side by side share nothing.
#pragma once
#include <link.h>  // dl_iterate_phdr

#include <algorithm>
#include <cmath>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <mutex>
#include <random>
#include <vector>
#if !defined(__x86_64__) || defined(CUDA_SHIM_UCONTEXT)
#include <ucontext.h>
#endif

#define __global__ static
#define __device__
#define __host__
#define __shared__ static thread_local
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(8) uint2 { uint32_t x, y; };
struct alignas(16) uint4 { uint32_t x, y, z, w; };
static inline float2 make_float2(float x, float y) { return {x, y}; }
static inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
static inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
static inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
using std::max;
using std::min;

namespace shim {

// 99 KB is what sm_86, sm_89 and sm_120 give one block; sm_80 and sm_90 have more.
constexpr size_t max_dynamic_shared = 99 * 1024, guard_bytes = 256, stack_bytes = 256 * 1024;
constexpr unsigned char poison = 0xff, guard = 0xa5;  // 0xff...: NaN as bf16, float and double

[[noreturn]] __attribute__((format(printf, 1, 2))) static inline void fail(const char* format, ...) {
  va_list args;
  va_start(args, format);
  fputs("cuda shim: ", stderr);
  vfprintf(stderr, format, args);
  fputc('\n', stderr);
  fflush(stderr);
  abort();
}

// ---- fibers

#if defined(__x86_64__) && !defined(CUDA_SHIM_UCONTEXT)
typedef void* Context;  // the stack pointer, with the registers that a function must preserve on top of the stack
extern "C" __attribute__((visibility("hidden"))) void cuda_shim_switch(Context* from, Context to);
asm(".pushsection .text\n"
    ".type cuda_shim_switch, @function\n"
    "cuda_shim_switch:\n"
    "  pushq %rbp\n  pushq %rbx\n  pushq %r12\n  pushq %r13\n  pushq %r14\n  pushq %r15\n"
    "  movq %rsp, (%rdi)\n"
    "  movq %rsi, %rsp\n"
    "  popq %r15\n  popq %r14\n  popq %r13\n  popq %r12\n  popq %rbx\n  popq %rbp\n"
    "  ret\n"
    ".size cuda_shim_switch, .-cuda_shim_switch\n"
    ".popsection\n");
static inline void switch_context(Context& from, Context& to) { cuda_shim_switch(&from, to); }
static inline void make_context(Context& context, char* stack, void (*entry)()) {
  void** top = reinterpret_cast<void**>(stack + stack_bytes - 64);
  *--top = nullptr;  // entry's return address: it never returns
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; i++) *--top = nullptr;
  context = top;
}
#else
typedef ucontext_t Context;
static inline void switch_context(Context& from, Context& to) { swapcontext(&from, &to); }
static inline void make_context(Context& context, char* stack, void (*entry)()) {
  getcontext(&context);
  context.uc_stack.ss_sp = stack;
  context.uc_stack.ss_size = stack_bytes;
  context.uc_link = nullptr;
  makecontext(&context, entry, 0);
}
#endif

// ---- threads and the scheduler

struct Site {
  const char* file;
  int line;
  bool operator!=(const Site& other) const { return line != other.line || strcmp(file, other.file) != 0; }
};
#define CUDA_SHIM_HERE const char *file = __builtin_FILE(), int line = __builtin_LINE()

struct Copy {  // a cp.async under way
  void* to;
  const void* from;
  int bytes, filled;
};

enum class At { running, warp_instruction, barrier, end };
typedef void (*WarpInstruction)(void* const* lanes);  // its operands, one struct a lane

struct Thread {
  Context context;
  At at;
  Site site;
  dim3 index;
  int number, lane;
  unsigned warp_steps;  // how many __syncwarp its warp has passed
  WarpInstruction instruction;
  void* operands;
  std::vector<Copy> uncommitted;
  std::vector<std::vector<Copy>> groups;
};

static Context scheduler;
static Thread* current;  // null while the scheduler runs
static std::vector<Thread> threads;
static std::vector<char*> stacks;  // kept from launch to launch
static std::vector<unsigned char> dynamic_shared;
static size_t dynamic_bytes;
static std::function<void()> body;
static dim3 grid_size, block_size, block_index;
static unsigned seed;
static std::mt19937 random_order;
static std::mutex one_launch;

// `__shared__` variables are thread_local, and nothing else here is: so they are exactly this library's TLS segment.
static thread_local char tls_anchor;
struct Range {
  unsigned char* start;
  size_t bytes;
  bool holds(const void* p) const { return p >= start && p < start + bytes; }
};
static int find_tls(dl_phdr_info* info, size_t, void* result) {
  for (int i = 0; i < info->dlpi_phnum; i++) {
    Range range{static_cast<unsigned char*>(info->dlpi_tls_data), info->dlpi_phdr[i].p_memsz};
    if (info->dlpi_phdr[i].p_type == PT_TLS && range.start && range.holds(&tls_anchor)) {
      *static_cast<Range*>(result) = range;
      return 1;
    }
  }
  return 0;
}
static Range static_shared;

static inline bool is_shared(const void* p) {
  return static_shared.holds(p) || Range{dynamic_shared.data(), dynamic_bytes}.holds(p);
}

// ---- races on shared memory
//
// Two accesses to a byte by different threads, one of them a write, need a barrier between them, or a __syncwarp where both are
// of one warp; shuffles, mma and ldmatrix order nothing. A cp.async writes from its issue to its wait, and its target is nobody's
// until then. -fsanitize=thread makes the compiler tell of every access; its runtime library is not linked: its functions are
// here, and check shared memory alone. What they find does not depend on the order in which the threads happen to run.

#ifdef __SANITIZE_THREAD__
#define CUDA_SHIM_UNCHECKED __attribute__((no_sanitize("thread"), noinline))

struct Seen {  // the last accesses to one byte; `phase` counts barriers, `step` the warp's __syncwarp
  unsigned write_phase, write_step, read_phase, read_step;
  int writer, reader, read_warp;  // reader: a thread, or `several` of its warp; read_warp: a warp or `several`
  bool copying;                   // by a cp.async of the writer's
};
struct Watched {
  unsigned char* start;
  size_t bytes;
  Seen* seen;
};
enum Access { read, write, copy };
constexpr int several = -1;
static unsigned phase;
static std::vector<Seen> seen;
static Watched watched[2];  // static and dynamic shared memory
extern "C" __attribute__((visibility("hidden"))) const char __ehdr_start[];  // where this library begins

CUDA_SHIM_UNCHECKED static Seen* seen_of(const void* p) {
  for (Watched& w : watched) {
    const size_t at = static_cast<const unsigned char*>(p) - w.start;
    if (at < w.bytes) return w.seen + at;
  }
  return nullptr;
}
[[noreturn]] CUDA_SHIM_UNCHECKED static void race(const void* p, const Thread& t, Access access, const char* what, int other,
                                                  const void* code) {
  const bool dynamic = seen_of(p) >= watched[1].seen;
  char others[32] = "several threads";
  if (other != several) snprintf(others, sizeof others, "thread %d", other);
  fail("race: thread %d %s byte %zu of %s shared memory, %s %s; the code is at 0x%zx of the library, see addr2line -fi", t.number,
       access == read ? "reads" : "writes", static_cast<const unsigned char*>(p) - watched[dynamic].start,
       dynamic ? "dynamic" : "static", what, others, static_cast<const char*>(code) - __ehdr_start);
}
// `whole_warp`: by all lanes of t's warp together
CUDA_SHIM_UNCHECKED static void touch(const void* p, size_t bytes, Access access, const Thread& t, bool whole_warp,
                                      const void* code) {
  Seen* s = seen_of(p);
  if (!s) return;
  const int warp = t.number / 32, thread = whole_warp ? several : t.number;
  for (size_t i = 0; i < bytes; i++, s++) {
    const unsigned char* const byte = static_cast<const unsigned char*>(p) + i;
    if (s->copying) race(byte, t, access, "the target of a cp.async not waited for, by", s->writer, code);
    if (s->write_phase == phase && s->writer != thread && (s->writer / 32 != warp || s->write_step == t.warp_steps))
      race(byte, t, access, "with no barrier since it was written by", s->writer, code);
    if (access == read) {
      if (s->read_phase != phase) s->read_phase = phase, s->read_warp = warp, s->read_step = t.warp_steps, s->reader = thread;
      else if (s->read_warp != warp) s->read_warp = s->reader = several;
      else if (s->read_step != t.warp_steps) s->read_step = t.warp_steps, s->reader = thread;
      else if (s->reader != thread) s->reader = several;
      continue;
    }
    if (s->read_phase == phase && (s->read_warp != warp || (s->read_step == t.warp_steps && s->reader != thread)))
      race(byte, t, access, "with no barrier since it was read by", s->reader, code);
    s->write_phase = phase, s->write_step = t.warp_steps, s->writer = t.number, s->copying = access == copy;
  }
}
CUDA_SHIM_UNCHECKED static void arrived(const void* p, size_t bytes) {  // a cp.async of the current thread has been waited for
  Seen* s = seen_of(p);
  for (size_t i = 0; i < bytes; i++, s++) s->write_phase = phase, s->write_step = current->warp_steps, s->copying = false;
}
static inline void watch(Range static_range, Range dynamic_range) {
  seen.assign(static_range.bytes + dynamic_range.bytes, Seen{});
  phase = 0;
  watched[0] = {static_range.start, static_range.bytes, seen.data()};
  watched[1] = {dynamic_range.start, dynamic_range.bytes, seen.data() + static_range.bytes};
}
static inline void new_phase() { phase++; }

#define CUDA_SHIM_HOOK(name, ...) \
  extern "C" __attribute__((visibility("hidden"))) CUDA_SHIM_UNCHECKED void __tsan_##name(__VA_ARGS__)
#define CUDA_SHIM_ACCESS(name, access, bytes, ...)                                      \
  CUDA_SHIM_HOOK(name, __VA_ARGS__) {                                                   \
    if (current) touch(p, bytes, access, *current, false, __builtin_return_address(0)); \
  }
#define CUDA_SHIM_ACCESSES(n)                     \
  CUDA_SHIM_ACCESS(read##n, read, n, void* p)     \
  CUDA_SHIM_ACCESS(write##n, write, n, void* p)
#define CUDA_SHIM_UNALIGNED(n)                            \
  CUDA_SHIM_ACCESS(unaligned_read##n, read, n, void* p)   \
  CUDA_SHIM_ACCESS(unaligned_write##n, write, n, void* p)
CUDA_SHIM_ACCESSES(1) CUDA_SHIM_ACCESSES(2) CUDA_SHIM_ACCESSES(4) CUDA_SHIM_ACCESSES(8) CUDA_SHIM_ACCESSES(16)
CUDA_SHIM_UNALIGNED(2) CUDA_SHIM_UNALIGNED(4) CUDA_SHIM_UNALIGNED(8) CUDA_SHIM_UNALIGNED(16)
CUDA_SHIM_ACCESS(read_range, read, bytes, void* p, size_t bytes)
CUDA_SHIM_ACCESS(write_range, write, bytes, void* p, size_t bytes)
CUDA_SHIM_HOOK(init) {}
CUDA_SHIM_HOOK(func_entry, void*) {}
CUDA_SHIM_HOOK(func_exit) {}

#else
#define CUDA_SHIM_UNCHECKED
enum Access { read, write, copy };
static inline void touch(const void*, size_t, Access, const Thread&, bool, const void*) {}
static inline void arrived(const void*, size_t) {}
static inline void watch(Range, Range) {}
static inline void new_phase() {}
#endif

static inline void wait_at(At at, Site site) {
  current->at = at;
  current->site = site;
  switch_context(current->context, scheduler);
}

static void thread_main() {
  body();
  for (auto& group : current->groups)
    if (!group.empty()) fail("a thread ended with a cp.async that nobody waited for");
  if (!current->uncommitted.empty()) fail("a thread ended with a cp.async that was never committed");
  wait_at(At::end, {"the end", 0});
  fail("a finished thread ran on");
}

template <class Instruction, class Operands>
static inline void run_by_warp(Instruction* instruction, Operands& operands, Site site) {
  current->instruction = reinterpret_cast<WarpInstruction>(instruction);
  current->operands = &operands;
  wait_at(At::warp_instruction, site);
}

template <class T>
static inline void shuffle_if_seeded(std::vector<T>& items) {
  if (seed) std::shuffle(items.begin(), items.end(), random_order);
}

static void sync_warp(void* const*) {}

static inline void finish_warp_instruction(int first, int last) {
  Thread* leader = nullptr;
  for (int i = first; i < last; i++)
    if (threads[i].at == At::warp_instruction) leader = &threads[i];
  if (!leader) return;
  if (last - first != 32)
    fail("%s:%d: a warp instruction in a warp of %d threads", leader->site.file, leader->site.line, last - first);
  void* operands[32];
  for (int i = first; i < last; i++) {
    Thread& t = threads[i];
    if (t.at != At::warp_instruction || t.instruction != leader->instruction || t.site != leader->site)
      fail("divergent warp: lane %d is at %s:%d while lane %d is at %s:%d", leader->lane, leader->site.file,
           leader->site.line, t.lane, t.site.file, t.site.line);
    operands[i - first] = t.operands;
  }
  leader->instruction(operands);
  for (int i = first; i < last; i++) {
    threads[i].at = At::running;
    threads[i].warp_steps += leader->instruction == sync_warp;
  }
}

static inline void run_block() {
  const int n = static_cast<int>(threads.size());
  memset(static_shared.start, poison, static_shared.bytes);
  memset(dynamic_shared.data(), poison, dynamic_bytes);
  memset(dynamic_shared.data() + dynamic_bytes, guard, guard_bytes);
  for (int i = 0; i < n; i++) {
    Thread& t = threads[i];
    t.at = At::running;
    t.number = i;
    t.lane = i % 32;
    t.warp_steps = 0;
    t.index = dim3(i % block_size.x, i / block_size.x % block_size.y, i / (block_size.x * block_size.y));
    t.groups.clear();
    make_context(t.context, stacks[i], thread_main);
  }
  std::vector<int> warps, lanes;
  for (;;) {
    new_phase();
    for (int w = 0; w * 32 < n; w++) warps.push_back(w);
    while (!warps.empty()) {  // each turn takes one warp to its next warp instruction, barrier or end
      const size_t turn = seed ? random_order() % warps.size() : 0;
      const int first = warps[turn] * 32, last = std::min(n, first + 32);
      lanes.clear();
      for (int i = first; i < last; i++)
        if (threads[i].at == At::running) lanes.push_back(i);
      if (lanes.empty()) {
        warps.erase(warps.begin() + turn);
        continue;
      }
      shuffle_if_seeded(lanes);
      for (int i : lanes) {
        current = &threads[i];
        switch_context(scheduler, current->context);
        current = nullptr;
      }
      finish_warp_instruction(first, last);
    }
    const Thread& first = threads[0];
    for (const Thread& t : threads)
      if (t.at != first.at || (t.at == At::barrier && t.site != first.site))
        fail("barrier not reached by all: thread 0 is at %s:%d, thread %d at %s:%d", first.site.file, first.site.line,
             static_cast<int>(&t - &first), t.site.file, t.site.line);
    if (first.at == At::end) break;
    for (Thread& t : threads) t.at = At::running;
  }
  for (size_t i = 0; i < guard_bytes; i++)
    if (dynamic_shared[dynamic_bytes + i] != guard)
      fail("a write %zu bytes beyond the %zu bytes of dynamic shared memory", i, dynamic_bytes);
}

static int launch(dim3 grid, dim3 block, size_t shared_bytes, std::function<void()> kernel) {
  std::lock_guard<std::mutex> lock(one_launch);
  const size_t n = size_t(block.x) * block.y * block.z;
  if (n == 0 || n > 1024 || grid.x == 0 || grid.x > 0x7fffffffu || grid.y == 0 || grid.y > 65535 || grid.z == 0 ||
      grid.z > 65535 || block.z > 64)
    return 9;  // cudaErrorInvalidConfiguration
  if (shared_bytes > max_dynamic_shared)
    fail("%zu bytes of dynamic shared memory; sm_86, sm_89 and sm_120 have %zu", shared_bytes, max_dynamic_shared);
  tls_anchor = 0;  // a library's TLS segment exists from the first access on
  dl_iterate_phdr(find_tls, &static_shared);
  if (!static_shared.bytes) fail("no TLS segment found");
  grid_size = grid;
  block_size = block;
  body = kernel;
  dynamic_bytes = shared_bytes;
  dynamic_shared.resize(max_dynamic_shared + guard_bytes);
  watch(static_shared, {dynamic_shared.data(), dynamic_bytes});
  threads.resize(n);
  while (stacks.size() < n) stacks.push_back(static_cast<char*>(aligned_alloc(64, stack_bytes)));
  random_order.seed(seed);
  std::vector<dim3> blocks;
  for (unsigned z = 0; z < grid.z; z++)
    for (unsigned y = 0; y < grid.y; y++)
      for (unsigned x = 0; x < grid.x; x++) blocks.emplace_back(x, y, z);
  shuffle_if_seeded(blocks);
  for (const dim3& b : blocks) {
    block_index = b;
    run_block();
  }
  return 0;
}

// ---- warp instructions: operands of the 32 lanes in, results out

struct Shuffle {
  uint64_t value, result;
  int source;
};
static void shuffle(Shuffle* const* lanes) {
  for (int i = 0; i < 32; i++) lanes[i]->result = lanes[lanes[i]->source]->value;
}
template <class T>
static inline T shuffle_from(unsigned mask, T value, int source, Site site) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "shuffles move 4 or 8 bytes");
  if (mask != 0xffffffffu) fail("%s:%d: only full warps are supported", site.file, site.line);
  Shuffle s{0, 0, source};
  memcpy(&s.value, &value, sizeof value);
  run_by_warp(shuffle, s, site);
  memcpy(&value, &s.result, sizeof value);
  return value;
}

struct Ballot {
  bool vote;
  unsigned result;
};
static void ballot(Ballot* const* lanes) {
  unsigned votes = 0;
  for (int i = 0; i < 32; i++) votes |= unsigned(lanes[i]->vote) << i;
  for (int i = 0; i < 32; i++) lanes[i]->result = votes;
}

static inline float bits_to_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

struct Mma {  // D = A B + D; registers as PTX numbers them
  float d[4];
  uint32_t a[4], b[2];
};
template <int K>
static inline void multiply(Mma* const* lanes, const float (&a)[16][K], const float (&b)[K][8]) {
  float d[16][8];
  for (int i = 0; i < 16; i++)
    for (int j = 0; j < 8; j++) d[i][j] = lanes[i % 8 * 4 + j / 2]->d[i / 8 * 2 + j % 2];
  for (int i = 0; i < 16; i++)
    for (int k = 0; k < K; k++)
      for (int j = 0; j < 8; j++) d[i][j] += a[i][k] * b[k][j];
  for (int i = 0; i < 16; i++)
    for (int j = 0; j < 8; j++) lanes[i % 8 * 4 + j / 2]->d[i / 8 * 2 + j % 2] = d[i][j];
}
static void mma_m16n8k16_bf16(Mma* const* lanes) {
  float a[16][16], b[16][8];
  for (int k = 0; k < 16; k++) {
    const int half = k % 2 * 16;  // two elements a register, the lower k in the lower half
    for (int i = 0; i < 16; i++) {
      const uint32_t pair = lanes[i % 8 * 4 + k % 8 / 2]->a[i / 8 + k / 8 * 2];
      a[i][k] = bits_to_float(pair >> half << 16);
    }
    for (int j = 0; j < 8; j++) b[k][j] = bits_to_float(lanes[j * 4 + k % 8 / 2]->b[k / 8] >> half << 16);
  }
  multiply<16>(lanes, a, b);
}
static void mma_m16n8k8_tf32(Mma* const* lanes) {
  const uint32_t tf32 = 0xffffe000u;  // the tensor core ignores the other 13 bits
  float a[16][8], b[8][8];
  for (int k = 0; k < 8; k++) {
    for (int i = 0; i < 16; i++) a[i][k] = bits_to_float(lanes[i % 8 * 4 + k % 4]->a[i / 8 + k / 4 * 2] & tf32);
    for (int j = 0; j < 8; j++) b[k][j] = bits_to_float(lanes[j * 4 + k % 4]->b[k / 4] & tf32);
  }
  multiply<8>(lanes, a, b);
}
static inline void mma(void (*shape)(Mma* const*), float* d, const uint32_t* a, uint32_t b0, uint32_t b1, Site site) {
  Mma m{{d[0], d[1], d[2], d[3]}, {a[0], a[1], a[2], a[3]}, {b0, b1}};
  run_by_warp(shape, m, site);
  memcpy(d, m.d, sizeof m.d);
}

struct Ldmatrix {  // 8x8 matrices of 16-bit elements; lane 8 m + i gives the address of row i of matrix m
  const void* row;
  uint32_t* result;
  const Thread* thread;
  const void* code;
};
template <int matrices, bool trans>
static void ldmatrix_by_warp(Ldmatrix* const* lanes) {
  for (int m = 0; m < matrices; m++) {
    uint16_t x[8][8];
    for (int i = 0; i < 8; i++) {
      const void* row = lanes[8 * m + i]->row;
      if (reinterpret_cast<uintptr_t>(row) % 16) fail("ldmatrix: row %d of matrix %d is not aligned to 16 bytes", i, m);
      if (!is_shared(row)) fail("ldmatrix: row %d of matrix %d is not in shared memory", i, m);
      touch(row, 16, read, *lanes[8 * m + i]->thread, true, lanes[8 * m + i]->code);
      memcpy(x[i], row, 16);
    }
    for (int l = 0; l < 32; l++) {
      const int i = l / 4, j = l % 4 * 2;
      lanes[l]->result[m] = trans ? x[j][i] | uint32_t(x[j + 1][i]) << 16 : x[i][j] | uint32_t(x[i][j + 1]) << 16;
    }
  }
}
template <int matrices, bool trans>
static inline void ldmatrix(uint32_t* result, const void* row, Site site) {
  Ldmatrix l{row, result, current, __builtin_return_address(0)};
  run_by_warp(ldmatrix_by_warp<matrices, trans>, l, site);
}

// ---- cp.async: `filled` of `bytes` come from memory, the rest is zero. Nothing arrives before the wait.

CUDA_SHIM_UNCHECKED static inline void cp_async(void* to, const void* from, int bytes, int filled, Site site) {
  if (reinterpret_cast<uintptr_t>(to) % bytes || (filled && reinterpret_cast<uintptr_t>(from) % bytes))
    fail("%s:%d: cp.async is not aligned to its %d bytes", site.file, site.line, bytes);
  if (!is_shared(to)) fail("%s:%d: cp.async does not write to shared memory", site.file, site.line);
  touch(to, bytes, copy, *current, false, __builtin_return_address(0));
  memset(to, poison, bytes);
  current->uncommitted.push_back({to, from, bytes, filled});
}
static inline void cp_async_commit() {
  current->groups.push_back(std::move(current->uncommitted));
  current->uncommitted.clear();
}
CUDA_SHIM_UNCHECKED static inline void cp_async_wait(size_t groups_left) {
  auto& groups = current->groups;
  while (groups.size() > groups_left) {
    for (const Copy& c : groups.front()) {
      arrived(c.to, c.bytes);
      memset(c.to, 0, c.bytes);
      if (c.filled) memcpy(c.to, c.from, c.filled);
    }
    groups.erase(groups.begin());
  }
}

}  // namespace shim

#define threadIdx (shim::current->index)
#define blockIdx (shim::block_index)
#define blockDim (shim::block_size)
#define gridDim (shim::grid_size)

static inline void __syncthreads(CUDA_SHIM_HERE) { shim::wait_at(shim::At::barrier, {file, line}); }
static inline void __syncwarp(unsigned mask = 0xffffffffu, CUDA_SHIM_HERE) {
  if (mask != 0xffffffffu) shim::fail("%s:%d: only full warps are supported", file, line);
  int none = 0;
  shim::run_by_warp(shim::sync_warp, none, {file, line});
}
static inline unsigned __ballot_sync(unsigned mask, bool vote, CUDA_SHIM_HERE) {
  if (mask != 0xffffffffu) shim::fail("%s:%d: only full warps are supported", file, line);
  shim::Ballot b{vote, 0};
  shim::run_by_warp(shim::ballot, b, {file, line});
  return b.result;
}
static inline int __clz(unsigned x) { return x ? __builtin_clz(x) : 32; }
template <class T>
static inline T __shfl_sync(unsigned mask, T value, int source, CUDA_SHIM_HERE) {
  return shim::shuffle_from(mask, value, source & 31, {file, line});
}
template <class T>
static inline T __shfl_xor_sync(unsigned mask, T value, int bits, CUDA_SHIM_HERE) {
  return shim::shuffle_from(mask, value, (shim::current->lane ^ bits) & 31, {file, line});
}
template <class T>
static inline T __shfl_down_sync(unsigned mask, T value, unsigned delta, CUDA_SHIM_HERE) {
  const unsigned source = shim::current->lane + delta;  // beyond the warp: the lane's own value
  return shim::shuffle_from(mask, value, source < 32 ? int(source) : shim::current->lane, {file, line});
}
template <class T>
static inline T __shfl_up_sync(unsigned mask, T value, unsigned delta, CUDA_SHIM_HERE) {
  const int source = shim::current->lane - int(delta);
  return shim::shuffle_from(mask, value, source >= 0 ? source : shim::current->lane, {file, line});
}

// 0: threads in their natural order. Any other number: one of many shuffled orders.
extern "C" __attribute__((used, visibility("default"))) inline void cuda_shim_seed(unsigned seed) { shim::seed = seed; }
