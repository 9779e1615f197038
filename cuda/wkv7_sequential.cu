// WKV7, step by step, on CUDA: any T, any head size N up to 128, fp32 inside. The oracle of the faster kernel, and what runs
// where that one does not.
//
//   S_t = S_{t-1} diag(w_t) + u_t b_t^T + v_t k_t^T      u_t = S_{t-1} a_t      w = exp(log_w)
//   y_t = S_t r_t                                        where reset[t], S_{t-1} is zero
//
// With G_t the gradient of S_t, that through y_t included (G_T = g_final + gy_T r_T^T):
//   du_t = G_t b_t                          gv_t = G_t k_t
//   G_{t-1} = G_t diag(w_t) + du_t a_t^T + gy_{t-1} r_{t-1}^T, where reset[t] the last term alone
//   gr_t = S_t^T gy_t     gk_t = G_t^T v_t     ga_t = S_{t-1}^T du_t     gb_t = G_t^T u_t
//   g_log_w_t[j] = w_t[j] sum_i S_{t-1}[i,j] G_t[i,j]
// A row of S (a value channel) needs no other row, and nor does a row of G: `sweep` makes u and y from rows of S, and du and
// gv from rows of G. Once u and du are known, a column (a key channel) needs no other column: `column_gradients` makes the
// rest. Nothing is divided by w: the states are kept every 16 steps and rebuilt in registers between.
//
// Everything comes in 16s: see lines.cuh. Each lane adds up its share of 16 sums, one per step; then lane s gets the whole sum
// of step s. One barrier per 16 steps; the next 16 are loaded while these are computed. No atomics, and one fixed order of
// additions: results are the same bit for bit on every run.
//
// Tensors (B, T, H, N) contiguous, states (B, H, N, N) indexed [value, key], reset (B, T) bytes.
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
  Wide<E> reader, writer, remover, inserter, w;
  Narrow value, out, u;
  uint8_t reset[L];
};

// A line is one value channel, its lanes share the key channels.
//   forward:   u = S . remover;   S = w S + u inserter + value writer;   out = S . reader
//   reversed:  S += value writer;   u = S . remover;   out = S . reader;   S = w S + u inserter
// Forward, S is a row of the state, reader, writer, remover, inserter, value = r, k, a, b, v, out = y. Reversed, S is a row of
// G, they are k, r, b, a, gy, and out = gv, u = du. out, u_out, tile_states (B, H, tiles, N, N: S before each tile), state,
// reset and final_state may be null.
template <int E, bool reversed>
__global__ void __launch_bounds__(L * L, E == 8 ? 1 : 2)
    sweep(Shape shape, Input reader, Input writer, Input remover, Input inserter, Input value, Input log_w,
          const uint8_t* reset, const float* state, Output out, float* u_out, float* tile_states, float* final_state) {
  DYNAMIC_SHARED(memory);
  SweepTile<E>* const buffers = reinterpret_cast<SweepTile<E>*>(memory);
  const int N = shape.N, parts = (N + L - 1) / L;
  const int lane = threadIdx.x % L, line = threadIdx.x / L;
  const int64_t bh = blockIdx.x / parts, b = bh / shape.H, h = bh % shape.H;
  const int first = blockIdx.x % parts * L, row = first + line;

  float S[E];
#pragma unroll
  for (int e = 0; e < E; e++) {
    const int j = channel<E>(lane, e);
    S[e] = state && j < N && row < N ? state[(bh * N + row) * N + j] : 0.f;
  }
  auto put_state = [&](float* to) {
#pragma unroll
    for (int e = 0; e < E; e++) {
      const int j = channel<E>(lane, e);
      if (j < N && row < N) to[row * N + j] = S[e];
    }
  };

  // For loads and stores a line is a step and its lanes are channels. Beyond T and N: zeros, and no decay.
  auto step_of = [&](int64_t tile) -> int64_t {  // (b, t), or -1
    const int64_t step = tile * L + line;
    if (step >= shape.T) return -1;
    return b * shape.T + (reversed ? shape.T - 1 - step : step);
  };
  uint32_t reader_bits[E], writer_bits[E], remover_bits[E], inserter_bits[E], w_bits[E], value_bits;
  uint8_t reset_bits;
  auto load = [&](int64_t tile) {
    const int lane = lane_index() % L;  // read anew, so that no address is kept in registers from tile to tile
    const int64_t step = step_of(tile), from = (step * shape.H + h) * N;
#pragma unroll
    for (int e = 0; e < E; e++) {
      const int j = e * L + lane;
      const bool ok = step >= 0 && j < N;
      reader_bits[e] = ok ? reader.bits(from + j) : 0;
      writer_bits[e] = ok ? writer.bits(from + j) : 0;
      remover_bits[e] = ok ? remover.bits(from + j) : 0;
      inserter_bits[e] = ok ? inserter.bits(from + j) : 0;
      w_bits[e] = ok ? log_w.bits(from + j) : 0;
    }
    value_bits = step >= 0 && first + lane < N ? value.bits(from + first + lane) : 0;
    reset_bits = reset && step >= 0 ? reset[step] : 0;
  };
  auto put_out = [&](int64_t tile, const SweepTile<E>& buffer) {
    const int64_t step = step_of(tile), to = (step * shape.H + h) * N + first + lane;
    if (step < 0 || first + lane >= N) return;
    if (out.data) out.put(to, buffer.out[line][lane]);
    if (u_out) u_out[to] = buffer.u[line][lane];
  };

  const int64_t tiles = shape.tiles();
  load(0);
  for (int64_t tile = 0; tile < tiles; tile++) {
    SweepTile<E>& now = buffers[tile % 2];
#pragma unroll
    for (int e = 0; e < E; e++) {
      now.reader[line][e * L + lane] = reader.value(reader_bits[e]);
      now.writer[line][e * L + lane] = writer.value(writer_bits[e]);
      now.remover[line][e * L + lane] = remover.value(remover_bits[e]);
      now.inserter[line][e * L + lane] = inserter.value(inserter_bits[e]);
      now.w[line][e * L + lane] = expf(log_w.value(w_bits[e]));
    }
    now.value[line][lane] = value.value(value_bits);
    if (lane == 0) now.reset[line] = reset_bits;
    __syncthreads();
    if (tile > 0) put_out(tile - 1, buffers[(tile - 1) % 2]);
    if (tile + 1 < tiles) load(tile + 1);

    if (tile_states) put_state(tile_states + (bh * tiles + tile) * N * N);
    float sums[4] = {}, u_mine = 0.f;  // a lane's: shares of four steps each; u of step `lane`
#pragma unroll 1                       // unrolled, the loads of all steps come first and registers run out
    for (int first_step = 0; first_step < L; first_step += 4) {
      float four[4];
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int step = first_step + i;
        const bool starts = now.reset[step];
        const float value_now = now.value[step][line];
        float x[E], w[E], z[E];
        if (reversed) read_channels<E>(x, now.writer[step], lane);
#pragma unroll
        for (int e = 0; e < E; e++) {
          if (reversed) S[e] += x[e] * value_now;
          else if (starts) S[e] = 0.f;
        }
        read_channels<E>(x, now.remover[step], lane);
        float u = 0.f;
#pragma unroll
        for (int e = 0; e < E; e++) u += x[e] * S[e];
        u = total_over_line(u);
        if (lane == step) u_mine = u;
        four[i] = 0.f;
        if (reversed) {
          read_channels<E>(x, now.reader[step], lane);
#pragma unroll
          for (int e = 0; e < E; e++) four[i] += x[e] * S[e];
        }
        read_channels<E>(w, now.w[step], lane);
        read_channels<E>(z, now.inserter[step], lane);
#pragma unroll
        for (int e = 0; e < E; e++) S[e] = reversed && starts ? 0.f : w[e] * S[e] + u * z[e];
        if (!reversed) {
          read_channels<E>(w, now.writer[step], lane);
          read_channels<E>(x, now.reader[step], lane);
#pragma unroll
          for (int e = 0; e < E; e++) {
            S[e] += w[e] * value_now;
            four[i] += x[e] * S[e];
          }
        }
      }
      sums[0] = sums[1], sums[1] = sums[2], sums[2] = sums[3];
      sums[3] = sum_four(four, lane, 1);
    }
    now.out[lane][line] = sum_four(sums, lane, 4);
    now.u[lane][line] = u_mine;
  }
  __syncthreads();
  put_out(tiles - 1, buffers[(tiles - 1) % 2]);
  if (final_state) put_state(final_state + bh * N * N);
}

template <int E>
struct alignas(16) ColumnTile {
  Wide<E> v, gy, u, du;
  Narrow r, w, k, a, b, gr, g_log_w, gk, ga, gb;
  uint8_t reset[L];
};

// A line is one key channel, its lanes share the value channels. Tiles from the last to the first: the states S_{t-1} of a
// tile forward from its tile_state, then G backward. u and du as `sweep` made them; reset and g_final may be null.
template <int E>
__global__ void __launch_bounds__(L * L, E == 1 ? 2 : 1)
    column_gradients(Shape shape, Input r, Input log_w, Input k, Input v, Input a, Input b, const uint8_t* reset,
                     const float* tile_states, const float* u, const float* du, Input gy, const float* g_final, Output gr,
                     Output g_log_w, Output gk, Output ga, Output gb) {
  DYNAMIC_SHARED(memory);
  ColumnTile<E>* const buffers = reinterpret_cast<ColumnTile<E>*>(memory);
  const int N = shape.N, parts = (N + L - 1) / L;
  const int lane = threadIdx.x % L, line = threadIdx.x / L;
  const int64_t bh = blockIdx.x / parts, batch = bh / shape.H, h = bh % shape.H, tiles = shape.tiles();
  const int first = blockIdx.x % parts * L, key = first + line;

  float S[E], G[E];
  auto get_state = [&](float* to, const float* from) {
#pragma unroll
    for (int e = 0; e < E; e++) {
      const int i = channel<E>(lane, e);
      to[e] = from && key < N && i < N ? from[int64_t(i) * N + key] : 0.f;
    }
  };
  get_state(G, g_final ? g_final + bh * N * N : nullptr);

  auto step_of = [&](int64_t tile) -> int64_t {
    const int64_t t = tile * L + line;
    return t < shape.T ? batch * shape.T + t : -1;
  };
  uint32_t v_bits[E], gy_bits[E], r_bits, w_bits, k_bits, a_bits, b_bits;
  float u_values[E], du_values[E];
  uint8_t reset_bits;
  auto load = [&](int64_t tile) {
    const int64_t step = step_of(tile), from = (step * shape.H + h) * N;
#pragma unroll
    for (int e = 0; e < E; e++) {
      const int i = e * L + lane;
      const bool ok = step >= 0 && i < N;
      v_bits[e] = ok ? v.bits(from + i) : 0;
      gy_bits[e] = ok ? gy.bits(from + i) : 0;
      u_values[e] = ok ? u[from + i] : 0.f;
      du_values[e] = ok ? du[from + i] : 0.f;
    }
    const bool ok = step >= 0 && first + lane < N;
    const int64_t mine = from + first + lane;
    r_bits = ok ? r.bits(mine) : 0;
    w_bits = ok ? log_w.bits(mine) : 0;
    k_bits = ok ? k.bits(mine) : 0;
    a_bits = ok ? a.bits(mine) : 0;
    b_bits = ok ? b.bits(mine) : 0;
    reset_bits = reset && step >= 0 ? reset[step] : 0;
  };
  auto put_out = [&](int64_t tile, const ColumnTile<E>& buffer) {
    const int64_t step = step_of(tile), to = (step * shape.H + h) * N + first + lane;
    if (step < 0 || first + lane >= N) return;
    gr.put(to, buffer.gr[line][lane]);
    g_log_w.put(to, buffer.g_log_w[line][lane]);
    gk.put(to, buffer.gk[line][lane]);
    ga.put(to, buffer.ga[line][lane]);
    gb.put(to, buffer.gb[line][lane]);
  };

  load(tiles - 1);
  for (int64_t tile = tiles - 1; tile >= 0; tile--) {
    ColumnTile<E>& now = buffers[tile % 2];
#pragma unroll
    for (int e = 0; e < E; e++) {
      now.v[line][e * L + lane] = v.value(v_bits[e]);
      now.gy[line][e * L + lane] = gy.value(gy_bits[e]);
      now.u[line][e * L + lane] = u_values[e];
      now.du[line][e * L + lane] = du_values[e];
    }
    now.r[line][lane] = r.value(r_bits);
    now.w[line][lane] = expf(log_w.value(w_bits));
    now.k[line][lane] = k.value(k_bits);
    now.a[line][lane] = a.value(a_bits);
    now.b[line][lane] = b.value(b_bits);
    if (lane == 0) now.reset[line] = reset_bits;
    __syncthreads();
    if (tile + 1 < tiles) put_out(tile + 1, buffers[(tile + 1) % 2]);
    if (tile > 0) load(tile - 1);

    get_state(S, tile_states + (bh * tiles + tile) * N * N);
    float before[L][E];  // S_{t-1} of each step
    float r_sums[4], a_sums[4], k_sums[4], b_sums[4], w_sums[4];
#pragma unroll
    for (int four = 0; four < 4; four++) {
      float sums[4], dots[4];
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int s = 4 * four + i;
        float x[E];
        const float k_s = now.k[s][line], w_s = now.w[s][line], b_s = now.b[s][line];
        const bool starts = now.reset[s];
        sums[i] = dots[i] = 0.f;
        read_channels<E>(x, now.du[s], lane);
#pragma unroll
        for (int e = 0; e < E; e++) {
          before[s][e] = starts ? 0.f : S[e];
          dots[i] += before[s][e] * x[e];
        }
        read_channels<E>(x, now.u[s], lane);
#pragma unroll
        for (int e = 0; e < E; e++) S[e] = w_s * before[s][e] + b_s * x[e];
        read_channels<E>(x, now.v[s], lane);
#pragma unroll
        for (int e = 0; e < E; e++) S[e] += k_s * x[e];
        read_channels<E>(x, now.gy[s], lane);
#pragma unroll
        for (int e = 0; e < E; e++) sums[i] += S[e] * x[e];
      }
      r_sums[four] = sum_four(sums, lane, 1);
      a_sums[four] = sum_four(dots, lane, 1);
    }
    __syncwarp();  // or the compiler keeps the inputs of all steps in registers for the way back
#pragma unroll
    for (int four = 3; four >= 0; four--) {
      float sums[4], more[4], dots[4];
#pragma unroll
      for (int i = 3; i >= 0; i--) {
        const int s = 4 * four + i;
        float x[E];
        const float r_s = now.r[s][line], w_s = now.w[s][line], a_s = now.a[s][line];
        const bool starts = now.reset[s];
        sums[i] = more[i] = dots[i] = 0.f;
        read_channels<E>(x, now.gy[s], lane);
#pragma unroll
        for (int e = 0; e < E; e++) {
          G[e] += r_s * x[e];
          dots[i] += G[e] * before[s][e];
        }
        read_channels<E>(x, now.v[s], lane);
#pragma unroll
        for (int e = 0; e < E; e++) sums[i] += G[e] * x[e];
        read_channels<E>(x, now.u[s], lane);
#pragma unroll
        for (int e = 0; e < E; e++) more[i] += G[e] * x[e];
        read_channels<E>(x, now.du[s], lane);
#pragma unroll
        for (int e = 0; e < E; e++) G[e] = starts ? 0.f : w_s * G[e] + a_s * x[e];
      }
      k_sums[four] = sum_four(sums, lane, 1);
      b_sums[four] = sum_four(more, lane, 1);
      w_sums[four] = sum_four(dots, lane, 1);
    }
    // The lane's sums are those of step `lane`.
    now.gr[lane][line] = sum_four(r_sums, lane, 4);
    now.g_log_w[lane][line] = now.w[lane][line] * sum_four(w_sums, lane, 4);
    now.gk[lane][line] = sum_four(k_sums, lane, 4);
    now.ga[lane][line] = sum_four(a_sums, lane, 4);
    now.gb[lane][line] = sum_four(b_sums, lane, 4);
  }
  __syncthreads();
  put_out(0, buffers[0]);
}

// ---- host

static bool valid(int dtype, int w_dtype, int64_t B, int64_t T, int64_t H, int64_t N) {
  return (dtype == FLOAT32 || dtype == BFLOAT16) && (w_dtype == FLOAT32 || w_dtype == BFLOAT16) && B > 0 && T > 0 && H > 0 &&
         N > 0 && N <= 128 && H <= INT32_MAX && B <= INT32_MAX / H / 8;
}

static dim3 grid_of(int64_t B, int64_t H, int64_t N) { return dim3(static_cast<unsigned>(B * H * ((N + L - 1) / L))); }

struct Tensors {
  Input r, log_w, k, v, a, b;
  const uint8_t* reset;
};

template <int E>
static int forward(Shape shape, int64_t B, const Tensors& in, const float* state, Output y, float* u, float* tile_states,
                   float* final_state, void* stream) {
  return launch(sweep<E, false>, grid_of(B, shape.H, shape.N), dim3(L * L), 2 * sizeof(SweepTile<E>), stream, shape, in.r,
                in.k, in.a, in.b, in.v, in.log_w, in.reset, state, y, u, tile_states, final_state);
}

template <int E>
static int backward(Shape shape, int64_t B, const Tensors& in, const float* state, Input gy, const float* g_final, Output gr,
                    Output g_log_w, Output gk, Output gv, Output ga, Output gb, float* g_state, float* scratch,
                    void* stream) {
  const int64_t elements = B * shape.T * shape.H * shape.N;
  float *const u = scratch, *const du = u + elements, *const tile_states = du + elements;
  const dim3 grid = grid_of(B, shape.H, shape.N), block(L * L);
  int error = forward<E>(shape, B, in, state, Output{nullptr, false}, u, tile_states, nullptr, stream);
  if (error) return error;
  error = launch(sweep<E, true>, grid, block, 2 * sizeof(SweepTile<E>), stream, shape, in.k, in.r, in.b, in.a, gy, in.log_w,
                 in.reset, g_final, gv, du, nullptr, g_state);
  if (error) return error;
  return launch(column_gradients<E>, grid, block, 2 * sizeof(ColumnTile<E>), stream, shape, in.r, in.log_w, in.k, in.v, in.a,
                in.b, in.reset, tile_states, u, du, gy, g_final, gr, g_log_w, gk, ga, gb);
}

// The C interface: device pointers, dtype codes of device.cuh, a stream; returns a CUDA error code, 0 for success.
// dtype is that of r, k, v, a, b, y and their gradients, w_dtype that of log_w and its gradient.

extern "C" int wkv7_sequential_forward(int dtype, int w_dtype, int64_t B, int64_t T, int64_t H, int64_t N, const void* r,
                                       const void* log_w, const void* k, const void* v, const void* a, const void* b,
                                       const float* state /* or null: zeros */, const uint8_t* reset /* or null: none */,
                                       void* y, float* final_state, void* stream) {
  if (!valid(dtype, w_dtype, B, T, H, N)) return invalid_value;
  const bool is_bf16 = dtype == BFLOAT16;
  auto in = [&](const void* x) { return Input{x, is_bf16}; };
  const Tensors tensors{in(r), Input{log_w, w_dtype == BFLOAT16}, in(k), in(v), in(a), in(b), reset};
  const auto run = N <= L ? forward<1> : N <= 4 * L ? forward<4> : forward<8>;
  return run(Shape{T, static_cast<int>(H), static_cast<int>(N)}, B, tensors, state, Output{y, is_bf16}, nullptr, nullptr,
             final_state, stream);
}

// Bytes of `scratch` that the backward pass needs.
extern "C" int64_t wkv7_sequential_scratch(int64_t B, int64_t T, int64_t H, int64_t N) {
  return B * H * N * (2 * T + (T + L - 1) / L * N) * static_cast<int64_t>(sizeof(float));
}

extern "C" int wkv7_sequential_backward(int dtype, int w_dtype, int64_t B, int64_t T, int64_t H, int64_t N, const void* r,
                                        const void* log_w, const void* k, const void* v, const void* a, const void* b,
                                        const float* state /* or null: zeros */, const uint8_t* reset /* or null: none */,
                                        const void* gy, const float* g_final /* or null: zeros */, void* gr, void* g_log_w,
                                        void* gk, void* gv, void* ga, void* gb,
                                        float* g_state /* or null: not wanted */, float* scratch, void* stream) {
  if (!valid(dtype, w_dtype, B, T, H, N)) return invalid_value;
  const bool is_bf16 = dtype == BFLOAT16, w_is_bf16 = w_dtype == BFLOAT16;
  auto in = [&](const void* x) { return Input{x, is_bf16}; };
  auto out = [&](void* x) { return Output{x, is_bf16}; };
  const Tensors tensors{in(r), Input{log_w, w_is_bf16}, in(k), in(v), in(a), in(b), reset};
  const auto run = N <= L ? backward<1> : N <= 4 * L ? backward<4> : backward<8>;
  return run(Shape{T, static_cast<int>(H), static_cast<int>(N)}, B, tensors, state, in(gy), g_final, out(gr),
             Output{g_log_w, w_is_bf16}, out(gk), out(gv), out(ga), out(gb), g_state, scratch, stream);
}
