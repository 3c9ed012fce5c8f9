// Products of few rows with a large matrix, the shape of decoding and verification. The matrix lies in panels
// of PANEL columns, so that a pass reads it once, in order; each panel serves every row before the next is
// touched, and the next is fetched meanwhile. A row's sums are taken in one order whatever the other rows
// are: its result does not depend on who shares the pass.
//
// Elements go by *units* of four bytes, what one lane of an instruction takes: two bfloat16 or four int8.
#include <algorithm>
#include <cmath>
#include <vector>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "kernels.h"

#if defined(__AVX512BF16__) && !defined(__AMX_BF16__)  // with AMX, oneDNN's products are the faster ones
#define HAS_BF16_PRODUCT 1
#endif
#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
#define HAS_INT8_PRODUCT 1
#endif

#if defined(HAS_BF16_PRODUCT) || defined(HAS_INT8_PRODUCT)

namespace {

constexpr int MAX_ROWS = 14;       // of a tile: 28 sums and 2 columns fill the registers
constexpr int64_t AHEAD = 16384;   // bytes fetched ahead where a panel is read once
constexpr int64_t STEP = PANEL * 4;  // bytes of a panel that a unit of x meets

// Both factors in units. The element type's `Sums` say how they are added up and what becomes of them.
struct Factors {
  const int32_t* x;     // [n, depth]
  const char* panels;   // [width / PANEL, depth, PANEL] units
  int64_t n, width, depth;
};

// What is fetched while a tile runs: `bytes` for every unit of depth, from `at` on.
struct Fetch {
  const char* at;
  int64_t bytes;
};

// out[r, :] = sum over k of x[r, k] * panel[k, :] for R rows and P panels beside each other.
template <int R, int P, class Sums>
INLINE void tile(const Factors& a, const Sums& sums, int64_t row, int64_t panel, Fetch fetch) {
  constexpr int V = 2 * P;
  const int64_t size = STEP * a.depth;
  const int32_t* x = a.x + row * a.depth;
  const char* w = a.panels + panel * size;
  typename Sums::Sum sum[R][V];
  for (int r = 0; r < R; r++)
    for (int v = 0; v < V; v++) sum[r][v] = sums.begin(row + r);
  for (int64_t k = 0; k < a.depth; k++) {
    __m512i columns[V];
    for (int v = 0; v < V; v++) columns[v] = _mm512_loadu_si512(w + v / 2 * size + k * STEP + v % 2 * (STEP / 2));
    for (int p = 0; p < P; p++) {
      _mm_prefetch(fetch.at + p * size, _MM_HINT_T0);
      if (fetch.bytes > 64) _mm_prefetch(fetch.at + p * size + 64, _MM_HINT_T0);
    }
    fetch.at += fetch.bytes;
    for (int r = 0; r < R; r++) {
      const __m512i unit = _mm512_set1_epi32(x[r * a.depth + k]);
      for (int v = 0; v < V; v++) sum[r][v] = Sums::add(sum[r][v], columns[v], unit);
    }
  }
  for (int v = 0; v < V; v++)
    for (int r = 0; r < R; r++) sums.end(row + r, panel * PANEL + v * LANES, sum[r][v]);
}

template <int R, class Sums>
void tile_of(int64_t rows, const Factors& a, const Sums& sums, int64_t row, int64_t panel, Fetch fetch) {
  if (rows == R) return tile<R, 1>(a, sums, row, panel, fetch);
  if constexpr (R > 1) tile_of<R - 1>(rows, a, sums, row, panel, fetch);
}

// All rows against one panel: tiles of equal height, each of which fetches its share of the next panel.
template <class Sums>
void whole_panel(const Factors& a, const Sums& sums, int64_t panel) {
  const int64_t tiles = (a.n + MAX_ROWS - 1) / MAX_ROWS, bytes = STEP * a.depth;
  const char* next = a.panels + (panel + 1) * bytes;
  for (int64_t t = 0; t < tiles; t++) {
    const int64_t begin = a.n * t / tiles, end = a.n * (t + 1) / tiles;
    const Fetch fetch = tiles == 1 ? Fetch{next - bytes + AHEAD, STEP} : Fetch{next + bytes * t / tiles, STEP / tiles};
    tile_of<MAX_ROWS>(end - begin, a, sums, begin, panel, fetch);
  }
}

template <class Sums>
void product(const Factors& a, const Sums& sums) {
  parallel_for(a.width / PANEL, 1, [&](int64_t panel, int64_t end) {
    if (a.n == 1)  // two panels together: a single row has too few sums in flight
      for (; panel + 2 <= end; panel += 2)
        tile<1, 2>(a, sums, 0, panel, {a.panels + panel * STEP * a.depth + AHEAD, STEP});
    for (; panel < end; panel++) whole_panel(a, sums, panel);
  });
}

}  // namespace

#endif

#if defined(HAS_BF16_PRODUCT)

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

void linear(const LinearArgs& a) {
  if (!a.n) return;
  product({reinterpret_cast<const int32_t*>(a.x), reinterpret_cast<const char*>(a.panels), a.n, a.width, a.depth / 2},
          Bf16Sums{a.bias, a.out, a.width});
}

bool has_linear() { return true; }

#else

void linear(const LinearArgs&) {}
bool has_linear() { return false; }

#endif

#if defined(HAS_INT8_PRODUCT)

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
  product({reinterpret_cast<const int32_t*>(codes), reinterpret_cast<const char*>(a.panels), a.n, a.width, a.depth / 4},
          Int8Sums{rows, a.scales, a.out, a.width});
}

bool has_linear_int8() { return true; }

#else

void linear_int8(const Int8Args&) {}
bool has_linear_int8() { return false; }

#endif

namespace {

// weight [width, depth] -> panels [width / PANEL, depth / unit, PANEL, unit].
template <class From, class To, class Convert>
void pack(const From* weight, To* panels, int64_t width, int64_t depth, int64_t unit, Convert convert) {
  parallel_for(width, 16, [=](int64_t row, int64_t end) {
    for (; row < end; row++) {
      To* panel = panels + row / PANEL * PANEL * depth + row % PANEL * unit;
      for (int64_t k = 0; k < depth; k++) panel[k / unit * PANEL * unit + k % unit] = convert(row, weight[row * depth + k]);
    }
  });
}

}  // namespace

void pack_panels(const bf16* weight, bf16* panels, int64_t width, int64_t depth) {
  pack(weight, panels, width, depth, 2, [](int64_t, bf16 w) { return w; });
}

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
