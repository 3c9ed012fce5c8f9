// Splits a fused qkv row, normalises and rotates q and k, and writes k and v into their cache rows.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>

#include "kernels.h"

namespace {

// 1 / rms of one head.
template <class T>
float inverse_rms(const T* x, int64_t dim, float eps) {
  vf sum = {};
  for (int64_t i = 0; i < dim; i += LANES) {
    const vf v = load_n(x + i, dim - i);
    sum += v * v;
  }
  return 1.0f / std::sqrt(sum_lanes(sum) / static_cast<float>(dim) + eps);
}

// Dimension i pairs with i + dim/2. float32 inside, one rounding at the store.
template <class T>
void rotate_head(const T* x, const T* weight, float eps, const float* cos, const float* sin, T* out, int64_t dim) {
  const int64_t half = dim / 2;
  const float inverse = weight ? inverse_rms(x, dim, eps) : 1.0f;
  for (int64_t i = 0; i < half; i += LANES) {
    const int64_t k = half - i, j = i + half;
    vf first = load_n(x + i, k), second = load_n(x + j, k);
    if (weight) {
      first = first * inverse * load_n(weight + i, k);
      second = second * inverse * load_n(weight + j, k);
    }
    store_n(out + i, first * load_n(cos + i, k) - second * load_n(sin + i, k), k);
    store_n(out + j, second * load_n(cos + j, k) + first * load_n(sin + j, k), k);
  }
}

template <class T>
void check_indices(const RopeArgs<T>& a) {
  for (int64_t r = 0; r < a.n; r++) {
    if (a.positions[r] < 0 || a.positions[r] >= a.table_rows)
      throw std::out_of_range("positions[" + std::to_string(r) + "] is " + std::to_string(a.positions[r]) +
                              "; the rotary tables have " + std::to_string(a.table_rows) + " rows");
    if (a.slots[r] < -1 || a.slots[r] >= a.cache_rows)
      throw std::out_of_range("slots[" + std::to_string(r) + "] is " + std::to_string(a.slots[r]) +
                              "; the caches have " + std::to_string(a.cache_rows) + " rows (-1 stores nothing)");
  }
}

template <class T>
void rope_row(const RopeArgs<T>& a, int64_t r) {
  const int64_t dim = a.dim, kv_width = a.kv_heads * dim;
  const T* q = a.qkv + r * (a.heads * dim + 2 * kv_width);
  const T *k = q + a.heads * dim, *v = k + kv_width;
  const float *cos = a.cos + a.positions[r] * dim, *sin = a.sin + a.positions[r] * dim;
  T* q_out = a.q + r * a.heads * dim;
  for (int64_t h = 0; h < a.heads; h++) rotate_head(q + h * dim, a.q_weight, a.eps, cos, sin, q_out + h * dim, dim);
  if (a.slots[r] < 0) return;
  T* k_out = a.k_cache + a.slots[r] * kv_width;
  for (int64_t h = 0; h < a.kv_heads; h++) rotate_head(k + h * dim, a.k_weight, a.eps, cos, sin, k_out + h * dim, dim);
  std::memcpy(a.v_cache + a.slots[r] * kv_width, v, kv_width * sizeof(T));
}

}  // namespace

template <class T>
void rope_store(const RopeArgs<T>& a) {
  check_indices(a);
  const int64_t width = (a.heads + 2 * a.kv_heads) * a.dim;
  parallel_for(a.n, std::max<int64_t>(1, 32768 / width), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; r++) rope_row(a, r);
  });
}

template void rope_store(const RopeArgs<float>&);
template void rope_store(const RopeArgs<bf16>&);
