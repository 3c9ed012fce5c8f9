// RMS normalisation (with the residual sum folded in) and the gated SiLU: one pass over each row.
#include <algorithm>
#include <cmath>

#include "kernels.h"

namespace {

constexpr int64_t GRAIN = 32768;  // elements a thread should have at least

int64_t row_grain(int64_t width) { return std::max<int64_t>(1, GRAIN / std::max<int64_t>(1, width)); }

// residual += x, rounded to T.
template <class T>
void add_row(const T* x, T* residual, int64_t width) {
  for (int64_t i = 0; i < width; i += LANES) {
    const int64_t k = width - i;
    store_n(residual + i, load_n(residual + i, k) + load_n(x + i, k), k);
  }
}

template <class T>
void norm_row(const T* x, const T* weight, T* out, int64_t width, float eps) {
  vf sums[4] = {};
  int64_t i = 0;
  for (; i + 4 * LANES <= width; i += 4 * LANES)
    for (int j = 0; j < 4; j++) {
      const vf v = load(x + i + j * LANES);
      sums[j] += v * v;
    }
  for (; i < width; i += LANES) {
    const vf v = load_n(x + i, width - i);
    sums[0] += v * v;
  }
  const float square = sum_lanes((sums[0] + sums[1]) + (sums[2] + sums[3]));
  const float inverse = 1.0f / std::sqrt(square / static_cast<float>(width) + eps);
  for (i = 0; i < width; i += LANES) {
    const int64_t k = width - i;
    const vf normed = round_to(x, load_n(x + i, k) * inverse);  // rounded before the weight, as HF Llama
    store_n(out + i, load_n(weight + i, k) * normed, k);
  }
}

// x * sigmoid(x), through e^-|x| so that nothing overflows.
INLINE vf silu(vf x) {
  const vf t = exp_nonpositive((x < 0.0f) ? x : -x);
  return x * ((x < 0.0f) ? t : splat(1.0f)) / (1.0f + t);
}

}  // namespace

template <class T>
void rms_norm(const T* x, T* residual, const T* weight, T* out, int64_t n, int64_t width, float eps) {
  parallel_for(n, row_grain(width), [=](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; r++) {
      const T* row = x + r * width;
      if (residual) {
        add_row(row, residual + r * width, width);
        row = residual + r * width;
      }
      norm_row(row, weight, out + r * width, width, eps);
    }
  });
}

template <class T>
void silu_mul(const T* gate_up, T* out, int64_t n, int64_t width) {
  parallel_for(n, row_grain(3 * width), [=](int64_t begin, int64_t end) {  // 3: its exponential and division
    for (int64_t r = begin; r < end; r++) {
      const T *gate = gate_up + 2 * r * width, *up = gate + width;
      for (int64_t i = 0; i < width; i += LANES) {
        const int64_t k = width - i;
        const vf activated = round_to(gate, silu(load_n(gate + i, k)));
        store_n(out + r * width + i, activated * load_n(up + i, k), k);
      }
    }
  });
}

template void rms_norm(const float*, float*, const float*, float*, int64_t, int64_t, float);
template void rms_norm(const bf16*, bf16*, const bf16*, bf16*, int64_t, int64_t, float);
template void silu_mul(const float*, float*, int64_t, int64_t);
template void silu_mul(const bf16*, bf16*, int64_t, int64_t);
