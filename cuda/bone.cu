// What Bone (rwkv_bone/peft/bone.py) does in bf16 between its matrix products, each in one pass over memory:
//
//   bone_forward    s = sum_j u_j;  u <- x + u, rounded without bias (rwkv_bone/peft/rounding.py);  y <- tile(s)
//   bone_backward   t = sum_i g_i;  du <- q + tile(t)
//
// x, u, q, du (n, in), y, g (n, out), all contiguous; pieces of r columns. 8 divides r, in and out, r divides in, r <= 2048.
// A block has one row. Its threads stride by whole pieces, so that each of them meets the same 8 columns of every piece.
#include "device.cuh"

constexpr int THREADS = 256, WIDTH = 8;  // WIDTH bf16 are one 16-byte access
constexpr uint32_t ROW = 49473, COLUMN = 40503;  // of the pattern in rounding.py

struct Eight {
  float x[WIDTH];
};

DEVICE Eight load(const bf16* from) {
  const uint4 pairs = *reinterpret_cast<const uint4*>(from);
  return {{low_bf16(pairs.x), high_bf16(pairs.x), low_bf16(pairs.y), high_bf16(pairs.y), low_bf16(pairs.z), high_bf16(pairs.z),
           low_bf16(pairs.w), high_bf16(pairs.w)}};
}

DEVICE void store(bf16* to, const Eight& e) {
  *reinterpret_cast<uint4*>(to) =
      make_uint4(pack_bf16(e.x[0], e.x[1]), pack_bf16(e.x[2], e.x[3]), pack_bf16(e.x[4], e.x[5]), pack_bf16(e.x[6], e.x[7]));
}

// x with the 16 low bits of its pattern cleared: up to the next bf16 with the probability of the distance, else down.
DEVICE float round_evenly(float x, uint32_t row, uint32_t column) {
  if (x != x) return x;
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits_to_float((bits + ((row * ROW ^ column * COLUMN) & 0xffffu)) & 0xffff0000u);
}

// The sum over a row's pieces, column by column: to total[0 ... r). `part` is the sum of what this thread met.
DEVICE void sum_pieces(const Eight& part, int r, float* parts, float* total) {
  const int lanes = r / WIDTH, strides = THREADS / lanes;
  for (int i = 0; i < WIDTH; i++) parts[threadIdx.x * WIDTH + i] = part.x[i];
  __syncthreads();
  for (int c = threadIdx.x; c < r; c += THREADS) {
    float sum = 0;
    for (int k = 0; k < strides; k++) sum += parts[k * r + c];
    total[c] = sum;
  }
  __syncthreads();
}

__global__ void __launch_bounds__(THREADS) forward(int in, int out, int r, const bf16* x, bf16* u, bf16* y) {
  __shared__ float parts[THREADS * WIDTH], s[THREADS * WIDTH];
  const int64_t row = blockIdx.x;
  const int step = THREADS / (r / WIDTH) * r, first = threadIdx.x * WIDTH;
  x += row * in, u += row * in, y += row * out;
  Eight part = {};
  for (int c = first; first < step && c < in; c += step) {
    Eight sum = load(u + c);
    const Eight xs = load(x + c);
    for (int i = 0; i < WIDTH; i++) {
      part.x[i] += sum.x[i];
      sum.x[i] = round_evenly(xs.x[i] + sum.x[i], static_cast<uint32_t>(row), c + i);
    }
    store(u + c, sum);
  }
  sum_pieces(part, r, parts, s);
  for (int c = first; c < out; c += THREADS * WIDTH) {
    Eight tile;
    for (int i = 0; i < WIDTH; i++) tile.x[i] = s[c % r + i];
    store(y + c, tile);
  }
}

__global__ void __launch_bounds__(THREADS) backward(int in, int out, int r, const bf16* g, const bf16* q, bf16* du) {
  __shared__ float parts[THREADS * WIDTH], t[THREADS * WIDTH];
  const int64_t row = blockIdx.x;
  const int step = THREADS / (r / WIDTH) * r, first = threadIdx.x * WIDTH;
  g += row * out, q += row * in, du += row * in;
  Eight part = {};
  for (int c = first; first < step && c < out; c += step) {
    const Eight gs = load(g + c);
    for (int i = 0; i < WIDTH; i++) part.x[i] += gs.x[i];
  }
  sum_pieces(part, r, parts, t);
  for (int c = first; c < in; c += THREADS * WIDTH) {
    Eight sum = load(q + c);
    for (int i = 0; i < WIDTH; i++) sum.x[i] += t[c % r + i];
    store(du + c, sum);
  }
}

extern "C" int bone_forward(int64_t n, int in, int out, int r, const bf16* x, bf16* u, bf16* y, void* stream) {
  return launch(forward, static_cast<unsigned>(n), THREADS, 0, stream, in, out, r, x, u, y);
}

extern "C" int bone_backward(int64_t n, int in, int out, int r, const bf16* g, const bf16* q, bf16* du, void* stream) {
  return launch(backward, static_cast<unsigned>(n), THREADS, 0, stream, in, out, r, g, q, du);
}
