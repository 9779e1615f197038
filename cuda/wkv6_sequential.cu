// WKV6, step by step, on CUDA: any T, any head size N up to 128, fp32 inside. The oracle of the faster kernel, and what runs
// where that one does not.
//
//   S_t = diag(w_t) S_{t-1} + k_t^T v_t          w = exp(log_w)
//   y_t = r_t (S_{t-1} + diag(u) k_t^T v_t)
//
// With G_t the gradient of S_t (G_T that of the final state), and i a key, j a value channel:
//   G_{t-1}  = diag(w_t) G_t + r_t^T gy_t
//   gv_t[j]  = sum_i k_t[i] (G_t[i,j] + u[i] r_t[i] gy_t[j])
//   gr_t[i]  = sum_j S_{t-1}[i,j] gy_t[j] + u[i] k_t[i] (v_t . gy_t)
//   gk_t[i]  = sum_j G_t[i,j] v_t[j]      + u[i] r_t[i] (v_t . gy_t)
//   g_log_w_t[i] = w_t[i] sum_j S_{t-1}[i,j] G_t[i,j]
//   gu[i]    = sum_t r_t[i] k_t[i] (v_t . gy_t)
// gv is y with time reversed and r, k, v replaced by k, r, gy: one kernel, `sweep`, does both. `row_gradients` does the rest.
// g_log_w needs S_{t-1} and G_t at the same time. The usual way around that, a running sum of r gr - k gk, loses all
// accuracy under strong decay, where it is a small difference of large numbers. So the states are kept every 16 steps and
// rebuilt in registers between.
//
// Everything comes in 16s: a block is 16 lines of 16 lanes and takes 16 steps at a time. A line owns one row or column of the
// state, spread over its lanes, E elements each. Each lane adds up its share of 16 sums, one per step; then lane s gets
// the whole sum of step s. One barrier per 16 steps; the next 16 are loaded while these are computed. No
// atomics, and one fixed order of additions: results are the same bit for bit on every run.
//
// Tensors (B, T, H, N) contiguous, u (H, N), states (B, H, N, N) indexed [key, value], gu (B, H, N), one row per batch row.
#include "lines.cuh"

// E, the elements of a line per lane, is 1, 4 or 8: N up to 16, 64 and 128. The blocks per multiprocessor asked for in
// __launch_bounds__ are the most with which ptxas does not spill; .ci/nvcc watches it.

struct Shape {
  int64_t T;
  int H, N;
  __device__ int64_t tiles() const { return (T + L - 1) / L; }
};

template <int E>
struct alignas(16) SweepTile {
  Wide<E> reader, writer, w;
  Narrow value, out;
  float bonus[L];
};

// A line is one value channel, its lanes share the key channels:
//   out_t = reader_t (S + diag(u) writer_t^T value_t);  S = diag(w_t) S + writer_t^T value_t
// Forward: reader, writer, value = r, k, v, out = y. Reversed: k, r, gy and gv. out, tile_states (B, H, tiles, N, N: S
// before each tile), state and final_state may be null.
template <int E, bool reversed>
__global__ void __launch_bounds__(L * L, E == 8 ? 1 : 2)
    sweep(Shape shape, Input reader, Input writer, Input value, Input log_w, const float* u, const float* state, Output out,
          float* tile_states, float* final_state) {
  DYNAMIC_SHARED(memory);
  SweepTile<E>* const buffers = reinterpret_cast<SweepTile<E>*>(memory);
  const int N = shape.N, parts = (N + L - 1) / L;
  const int lane = threadIdx.x % L, line = threadIdx.x / L;
  const int64_t bh = blockIdx.x / parts, b = bh / shape.H, h = bh % shape.H;
  const int first = blockIdx.x % parts * L, column = first + line;

  float S[E], u_h[E];
#pragma unroll
  for (int e = 0; e < E; e++) {
    const int i = channel<E>(lane, e);
    S[e] = state && i < N && column < N ? state[(bh * N + i) * N + column] : 0.f;
    u_h[e] = e * L + lane < N ? u[h * N + e * L + lane] : 0.f;
  }
  auto put_state = [&](float* to) {
#pragma unroll
    for (int e = 0; e < E; e++) {
      const int i = channel<E>(lane, e);
      if (i < N && column < N) to[i * N + column] = S[e];
    }
  };

  // For loads and stores a line is a step and its lanes are channels. Beyond T and N: zeros, and no decay.
  auto row_of = [&](int64_t tile) -> int64_t {
    const int64_t step = tile * L + line;
    if (step >= shape.T) return -1;
    return ((b * shape.T + (reversed ? shape.T - 1 - step : step)) * shape.H + h) * N;
  };
  uint32_t reader_bits[E], writer_bits[E], w_bits[E], value_bits;
  auto load = [&](int64_t tile) {
    const int64_t row = row_of(tile);
#pragma unroll
    for (int e = 0; e < E; e++) {
      const int i = e * L + lane;
      const bool ok = row >= 0 && i < N;
      reader_bits[e] = ok ? reader.bits(row + i) : 0;
      writer_bits[e] = ok ? writer.bits(row + i) : 0;
      w_bits[e] = ok ? log_w.bits(row + i) : 0;
    }
    value_bits = row >= 0 && first + lane < N ? value.bits(row + first + lane) : 0;
  };
  auto put_out = [&](int64_t tile, const SweepTile<E>& buffer) {
    const int64_t row = row_of(tile);
    if (out.data && row >= 0 && first + lane < N) out.put(row + first + lane, buffer.out[line][lane]);
  };

  const int64_t tiles = shape.tiles();
  load(0);
  for (int64_t tile = 0; tile < tiles; tile++) {
    SweepTile<E>& now = buffers[tile % 2];
    float bonus = 0.f;
#pragma unroll
    for (int e = 0; e < E; e++) {
      const float x = reader.value(reader_bits[e]), y = writer.value(writer_bits[e]);
      now.reader[line][e * L + lane] = x;
      now.writer[line][e * L + lane] = y;
      now.w[line][e * L + lane] = expf(log_w.value(w_bits[e]));
      bonus += x * u_h[e] * y;
    }
    now.value[line][lane] = value.value(value_bits);
    bonus = total_over_line(bonus);
    if (lane == 0) now.bonus[line] = bonus;
    __syncthreads();
    if (tile > 0) put_out(tile - 1, buffers[(tile - 1) % 2]);
    if (tile + 1 < tiles) load(tile + 1);

    if (tile_states) put_state(tile_states + (bh * tiles + tile) * N * N);
    float sums[4] = {};  // a lane's: of four steps each
#pragma unroll 1         // unrolled, the loads of all steps come first and registers run out
    for (int first_step = 0; first_step < L; first_step += 4) {
      float four[4];
#pragma unroll
      for (int i = 0; i < 4; i++) {
        float x[E], y[E], w[E];
        read_channels<E>(x, now.reader[first_step + i], lane);
        read_channels<E>(y, now.writer[first_step + i], lane);
        read_channels<E>(w, now.w[first_step + i], lane);
        const float z = now.value[first_step + i][line];
        four[i] = 0.f;
#pragma unroll
        for (int e = 0; e < E; e++) {
          four[i] += x[e] * S[e];
          S[e] = w[e] * S[e] + y[e] * z;
        }
      }
      sums[0] = sums[1], sums[1] = sums[2], sums[2] = sums[3];
      sums[3] = sum_four(four, lane, 1);
    }
    now.out[lane][line] = sum_four(sums, lane, 4) + now.bonus[lane] * now.value[lane][line];
  }
  __syncthreads();
  put_out(tiles - 1, buffers[(tiles - 1) % 2]);
  if (final_state) put_state(final_state + bh * N * N);
}

template <int E>
struct alignas(16) RowTile {
  Wide<E> v, gy;
  Narrow r, k, w, gr, gk, g_log_w;
  float v_gy[L];
};

// A line is one key channel, its lanes share the value channels. Tiles from the last to the first: the states S_{t-1} of a
// tile forward from its tile_state, then G backward. g_final and g_state may be null.
template <int E>
__global__ void __launch_bounds__(L * L, E == 1 ? 2 : 1)
    row_gradients(Shape shape, Input r, Input k, Input v, Input log_w, const float* u, const float* tile_states, Input gy,
                  const float* g_final, Output gr, Output gk, Output g_log_w, float* gu, float* g_state) {
  DYNAMIC_SHARED(memory);
  RowTile<E>* const buffers = reinterpret_cast<RowTile<E>*>(memory);
  const int N = shape.N, parts = (N + L - 1) / L;
  const int lane = threadIdx.x % L, line = threadIdx.x / L;
  const int64_t bh = blockIdx.x / parts, b = bh / shape.H, h = bh % shape.H, tiles = shape.tiles();
  const int first = blockIdx.x % parts * L, key = first + line;

  float S[E], G[E];
  auto get_state = [&](float* to, const float* from) {
#pragma unroll
    for (int e = 0; e < E; e++) {
      const int j = channel<E>(lane, e);
      to[e] = from && key < N && j < N ? from[(int64_t)key * N + j] : 0.f;
    }
  };
  get_state(G, g_final ? g_final + bh * N * N : nullptr);
  const float bonus = key < N ? u[h * N + key] : 0.f;
  float gu_sum = 0.f;

  auto row_of = [&](int64_t tile) -> int64_t {
    const int64_t t = tile * L + line;
    return t < shape.T ? ((b * shape.T + t) * shape.H + h) * N : -1;
  };
  uint32_t v_bits[E], gy_bits[E], r_bits, k_bits, w_bits;
  auto load = [&](int64_t tile) {
    const int64_t row = row_of(tile);
#pragma unroll
    for (int e = 0; e < E; e++) {
      const int j = e * L + lane;
      const bool ok = row >= 0 && j < N;
      v_bits[e] = ok ? v.bits(row + j) : 0;
      gy_bits[e] = ok ? gy.bits(row + j) : 0;
    }
    const bool ok = row >= 0 && first + lane < N;
    r_bits = ok ? r.bits(row + first + lane) : 0;
    k_bits = ok ? k.bits(row + first + lane) : 0;
    w_bits = ok ? log_w.bits(row + first + lane) : 0;
  };
  auto put_out = [&](int64_t tile, const RowTile<E>& buffer) {
    const int64_t row = row_of(tile);
    if (row < 0 || first + lane >= N) return;
    gr.put(row + first + lane, buffer.gr[line][lane]);
    gk.put(row + first + lane, buffer.gk[line][lane]);
    g_log_w.put(row + first + lane, buffer.g_log_w[line][lane]);
  };

  load(tiles - 1);
  for (int64_t tile = tiles - 1; tile >= 0; tile--) {
    RowTile<E>& now = buffers[tile % 2];
    float dot = 0.f;
#pragma unroll
    for (int e = 0; e < E; e++) {
      const float x = v.value(v_bits[e]), g = gy.value(gy_bits[e]);
      now.v[line][e * L + lane] = x;
      now.gy[line][e * L + lane] = g;
      dot += x * g;
    }
    dot = total_over_line(dot);
    if (lane == 0) now.v_gy[line] = dot;
    now.r[line][lane] = r.value(r_bits);
    now.k[line][lane] = k.value(k_bits);
    now.w[line][lane] = expf(log_w.value(w_bits));
    __syncthreads();
    if (tile + 1 < tiles) put_out(tile + 1, buffers[(tile + 1) % 2]);
    if (tile > 0) load(tile - 1);

    get_state(S, tile_states + (bh * tiles + tile) * N * N);
    float before[L][E];  // S_{t-1} of each step
    float r_sums[4], k_sums[4], w_sums[4];
#pragma unroll
    for (int four = 0; four < 4; four++) {
      float sums[4];
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int s = 4 * four + i;
        float x[E], g[E];
        read_channels<E>(x, now.v[s], lane);
        read_channels<E>(g, now.gy[s], lane);
        const float k_s = now.k[s][line], w_s = now.w[s][line];
        sums[i] = 0.f;
#pragma unroll
        for (int e = 0; e < E; e++) {
          before[s][e] = S[e];
          sums[i] += S[e] * g[e];
          S[e] = w_s * S[e] + k_s * x[e];
        }
      }
      r_sums[four] = sum_four(sums, lane, 1);
    }
    __syncwarp();  // or the compiler keeps v and gy of all steps in registers for the way back
#pragma unroll
    for (int four = 3; four >= 0; four--) {
      float sums[4], dots[4];
#pragma unroll
      for (int i = 3; i >= 0; i--) {
        const int s = 4 * four + i;
        float x[E], g[E];
        read_channels<E>(x, now.v[s], lane);
        read_channels<E>(g, now.gy[s], lane);
        const float r_s = now.r[s][line], w_s = now.w[s][line];
        sums[i] = dots[i] = 0.f;
#pragma unroll
        for (int e = 0; e < E; e++) {
          sums[i] += G[e] * x[e];
          dots[i] += G[e] * before[s][e];
          G[e] = w_s * G[e] + r_s * g[e];
        }
      }
      k_sums[four] = sum_four(sums, lane, 1);
      w_sums[four] = sum_four(dots, lane, 1);
    }
    const float r_sum = sum_four(r_sums, lane, 4), k_sum = sum_four(k_sums, lane, 4), w_sum = sum_four(w_sums, lane, 4);

    // The lane's sums are those of step `lane`.
    const float r_t = now.r[lane][line], k_t = now.k[lane][line], v_gy = now.v_gy[lane];
    now.gr[lane][line] = r_sum + bonus * k_t * v_gy;
    now.gk[lane][line] = k_sum + bonus * r_t * v_gy;
    now.g_log_w[lane][line] = now.w[lane][line] * w_sum;
    gu_sum += r_t * k_t * v_gy;
  }
  __syncthreads();
  put_out(0, buffers[0]);

  gu_sum = total_over_line(gu_sum);
  if (lane == 0 && key < N) gu[bh * N + key] = gu_sum;
#pragma unroll
  for (int e = 0; e < E; e++) {
    const int j = channel<E>(lane, e);
    if (g_state && key < N && j < N) g_state[(bh * N + key) * N + j] = G[e];
  }
}

static bool valid(int dtype, int w_dtype, int64_t B, int64_t T, int64_t H, int64_t N) {
  return (dtype == FLOAT32 || dtype == BFLOAT16) && (w_dtype == FLOAT32 || w_dtype == BFLOAT16) && B > 0 && T > 0 && H > 0 &&
         N > 0 && N <= 128 && H <= INT32_MAX && B <= INT32_MAX / H / 8;
}

static dim3 grid_of(int64_t B, int64_t H, int64_t N) { return dim3(static_cast<unsigned>(B * H * ((N + L - 1) / L))); }

template <int E>
static int forward(int dtype, int w_dtype, int64_t B, int64_t T, int64_t H, int64_t N, const void* r, const void* k,
                   const void* v, const void* log_w, const float* u, const float* state, void* y, float* final_state,
                   void* stream) {
  const bool is_bf16 = dtype == BFLOAT16, w_is_bf16 = w_dtype == BFLOAT16;
  const Shape shape{T, static_cast<int>(H), static_cast<int>(N)};
  return launch(sweep<E, false>, grid_of(B, H, N), dim3(L * L), 2 * sizeof(SweepTile<E>), stream, shape, Input{r, is_bf16},
                Input{k, is_bf16}, Input{v, is_bf16}, Input{log_w, w_is_bf16}, u, state, Output{y, is_bf16}, nullptr,
                final_state);
}

template <int E>
static int backward(int dtype, int w_dtype, int64_t B, int64_t T, int64_t H, int64_t N, const void* r, const void* k,
                    const void* v, const void* log_w, const float* u, const float* state, const void* gy,
                    const float* g_final, void* gr, void* gk, void* gv, void* g_log_w, float* gu, float* g_state,
                    float* scratch, void* stream) {
  const bool is_bf16 = dtype == BFLOAT16, w_is_bf16 = w_dtype == BFLOAT16;
  const Shape shape{T, static_cast<int>(H), static_cast<int>(N)};
  const dim3 grid = grid_of(B, H, N), block(L * L);
  const Input r_in{r, is_bf16}, k_in{k, is_bf16}, v_in{v, is_bf16}, w_in{log_w, w_is_bf16}, gy_in{gy, is_bf16};
  int error = launch(sweep<E, false>, grid, block, 2 * sizeof(SweepTile<E>), stream, shape, r_in, k_in, v_in, w_in, u, state,
                     Output{nullptr, is_bf16}, scratch, nullptr);
  if (error) return error;
  error = launch(sweep<E, true>, grid, block, 2 * sizeof(SweepTile<E>), stream, shape, k_in, r_in, gy_in, w_in, u, g_final,
                 Output{gv, is_bf16}, nullptr, nullptr);
  if (error) return error;
  return launch(row_gradients<E>, grid, block, 2 * sizeof(RowTile<E>), stream, shape, r_in, k_in, v_in, w_in, u, scratch,
                gy_in, g_final, Output{gr, is_bf16}, Output{gk, is_bf16}, Output{g_log_w, w_is_bf16}, gu, g_state);
}

// The C interface: device pointers, dtype codes of device.cuh, a stream; returns a CUDA error code, 0 for success.
// dtype is that of r, k, v, y and their gradients, w_dtype that of log_w and its gradient.

extern "C" int wkv6_sequential_forward(int dtype, int w_dtype, int64_t B, int64_t T, int64_t H, int64_t N, const void* r,
                                       const void* k, const void* v, const void* log_w, const float* u,
                                       const float* state /* or null: zeros */, void* y, float* final_state, void* stream) {
  if (!valid(dtype, w_dtype, B, T, H, N)) return invalid_value;
  const auto run = N <= L ? forward<1> : N <= 4 * L ? forward<4> : forward<8>;
  return run(dtype, w_dtype, B, T, H, N, r, k, v, log_w, u, state, y, final_state, stream);
}

// Bytes of `scratch` that the backward pass needs.
extern "C" int64_t wkv6_sequential_scratch(int64_t B, int64_t T, int64_t H, int64_t N) {
  return B * H * ((T + L - 1) / L) * N * N * static_cast<int64_t>(sizeof(float));
}

extern "C" int wkv6_sequential_backward(int dtype, int w_dtype, int64_t B, int64_t T, int64_t H, int64_t N, const void* r,
                                        const void* k, const void* v, const void* log_w, const float* u,
                                        const float* state /* or null: zeros */, const void* gy,
                                        const float* g_final /* or null: zeros */, void* gr, void* gk, void* gv,
                                        void* g_log_w, float* gu, float* g_state /* or null: not wanted */, float* scratch,
                                        void* stream) {
  if (!valid(dtype, w_dtype, B, T, H, N)) return invalid_value;
  const auto run = N <= L ? backward<1> : N <= 4 * L ? backward<4> : backward<8>;
  return run(dtype, w_dtype, B, T, H, N, r, k, v, log_w, u, state, gy, g_final, gr, gk, gv, g_log_w, gu, g_state, scratch,
             stream);
}
