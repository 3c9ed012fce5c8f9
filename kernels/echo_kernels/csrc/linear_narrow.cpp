// Products by the processor's own instructions for narrow numbers: bfloat16 (AVX512-BF16) and eight bits (AVX512-VNNI).
#include <algorithm>
#include <cmath>
#include <vector>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "panels.h"

#if HAS_BF16_PRODUCT || HAS_INT8_PRODUCT

namespace {

// Both factors in units. The element type's `Sums` say how they are added up and what becomes of them.
template <class Sums>
struct NarrowProduct {
  static constexpr int ROWS = 14;  // 28 sums and 2 columns fill the registers
  Sums sums;
  const int32_t* x;     // [n, depth]
  const char* panels;
  int64_t n, width, depth;

  // out[r, :] = sum over k of x[r, k] * panel[k, :] for R rows and P panels beside each other.
  template <int R, int P>
  void tile(int64_t row, int64_t panel, Fetch fetch) const {
    constexpr int V = VECTORS * P;
    const int64_t size = STEP * depth;
    const int32_t* at = x + row * depth;
    const char* w = panels + panel * size;
    typename Sums::Sum sum[R][V];
    for (int r = 0; r < R; r++)
      for (int v = 0; v < V; v++) sum[r][v] = sums.begin(row + r);
    for (int64_t k = 0; k < depth; k++) {
      __m512i columns[V];
      for (int v = 0; v < V; v++) columns[v] = _mm512_loadu_si512(w + v / 2 * size + k * STEP + v % 2 * (STEP / 2));
      fetch.next<P>(size);
      for (int r = 0; r < R; r++) {
        const __m512i unit = _mm512_set1_epi32(at[r * depth + k]);
        for (int v = 0; v < V; v++) sum[r][v] = Sums::add(sum[r][v], columns[v], unit);
      }
    }
    for (int v = 0; v < V; v++)
      for (int r = 0; r < R; r++) sums.end(row + r, panel * PANEL + v * LANES, sum[r][v]);
  }
};

}  // namespace

#endif

#if HAS_BF16_PRODUCT

namespace {

struct Bf16Sums {
  using Sum = __m512;
  const bf16* bias;
  bf16* out;
  int64_t width;

  Sum begin(int64_t) const { return _mm512_setzero_ps(); }
  static Sum add(Sum sum, __m512i columns, __m512i unit) {
    return _mm512_dpbf16_ps(sum, (__m512bh)columns, (__m512bh)unit);
  }
  void end(int64_t row, int64_t column, Sum sum) const {
    store(out + row * width + column, (vf)sum + (bias ? load(bias + column) : vf{}));
  }
};

}  // namespace

template <>
void linear(const LinearArgs<bf16>& a) {
  if (!a.n) return;
  product(NarrowProduct<Bf16Sums>{{a.bias, a.out, a.width}, reinterpret_cast<const int32_t*>(a.x),
                                  static_cast<const char*>(a.panels), a.n, a.width, a.depth / 2});
}

#endif

#if HAS_INT8_PRODUCT

namespace {

// A row of x in whole numbers from -127 to 127.
struct Quantised {
  float unit;       // what 1 stands for; NaN where the row isn't finite
  int32_t surplus;  // what the panels' shift adds to every sum of the row
};

struct Int8Sums {
  using Sum = vi;  // not __m512i: as lanes of 64 bits the sums would be spilled
  const Quantised* rows;
  const float* scales;
  bf16* out;
  int64_t width;

  Sum begin(int64_t row) const { return Sum{} - rows[row].surplus; }
  static Sum add(Sum sum, __m512i columns, __m512i unit) {
    return (Sum)_mm512_dpbusd_epi32((__m512i)sum, columns, unit);
  }
  void end(int64_t row, int64_t column, Sum sum) const {
    store(out + row * width + column, __builtin_convertvector(sum, vf) * (load(scales + column) * rows[row].unit));
  }
};

Quantised quantise(const bf16* x, int8_t* codes, int64_t depth) {
  vf top{}, bad{};
  for (int64_t k = 0; k < depth; k += LANES) {
    const vf value = load(x + k), size = value < 0 ? -value : value;
    top = size > top ? size : top;
    bad += value - value;
  }
  const float peak = max_lanes(top), inverse = peak > 0 ? 127 / peak : 0.0f;
  __m512i total = _mm512_setzero_si512();
  for (int64_t k = 0; k < depth; k += LANES) {
    const __m512i code = _mm512_cvtps_epi32((__m512)(load(x + k) * inverse));
    total = _mm512_add_epi32(total, code);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + k), _mm512_cvtepi32_epi8(code));
  }
  return {peak / 127 + sum_lanes(bad), INT8_SHIFT * _mm512_reduce_add_epi32(total)};
}

}  // namespace

void linear_int8(const Int8Args& a) {
  if (!a.n) return;
  static thread_local std::vector<int8_t> elements;
  static thread_local std::vector<Quantised> all;
  elements.resize(a.n * a.depth);
  all.resize(a.n);
  int8_t* codes = elements.data();
  Quantised* rows = all.data();
  parallel_for(a.n, 16, [=, &a](int64_t row, int64_t end) {
    for (; row < end; row++) rows[row] = quantise(a.x + row * a.depth, codes + row * a.depth, a.depth);
  });
  product(NarrowProduct<Int8Sums>{{rows, a.scales, a.out, a.width}, reinterpret_cast<const int32_t*>(codes),
                                  reinterpret_cast<const char*>(a.panels), a.n, a.width, a.depth / 4});
}

#else

void linear_int8(const Int8Args&) {}

#endif

void pack_int8_panels(const bf16* weight, uint8_t* panels, float* scales, int64_t width, int64_t depth) {
  for (int64_t row = 0; row < width; row++) {
    float peak = 0;
    for (int64_t k = 0; k < depth; k++) peak = std::max(peak, std::fabs(as_float(weight[row * depth + k])));
    scales[row] = peak / 127;
  }
  pack(weight, panels, width, depth, 4, [=](int64_t row, bf16 w) {
    const float code = scales[row] > 0 ? std::nearbyint(as_float(w) / scales[row]) : 0.0f;
    return static_cast<uint8_t>(static_cast<int32_t>(code) + INT8_SHIFT);
  });
}
