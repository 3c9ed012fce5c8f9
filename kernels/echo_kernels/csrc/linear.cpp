// Products of few rows with a large bf16 matrix, the shape of decoding and verification. The matrix lies in
// panels of PANEL columns, so that a pass reads it once, in order; each panel serves every row before the
// next is touched, and the next is fetched meanwhile. A row's sums are taken in one order whatever the other
// rows are: its result does not depend on who shares the pass.
#include <type_traits>
#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

#include "kernels.h"

#if defined(__AVX512BF16__) && !defined(__AMX_BF16__)  // with AMX, oneDNN's products are the faster ones

namespace {

constexpr int MAX_ROWS = 14;       // of a tile: 28 sums and 2 columns fill the registers
constexpr int PAIRED_ROWS = 6;     // up to here two panels are read together: more sums in flight
constexpr int64_t AHEAD = 16384;   // bytes fetched ahead where a panel is read once

// What is fetched while a tile runs: `bytes` for every two elements of depth, from `at` on.
struct Fetch {
  const char* at;
  int64_t bytes;
};

// out[r, :] = bias + sum over k of x[r, k] * panel[k, :] for R rows and P panels beside each other.
template <int R, int P>
INLINE void tile(const LinearArgs& a, int64_t row, int64_t panel, Fetch fetch) {
  constexpr int V = 2 * P;
  const int64_t size = PANEL * a.depth;
  const bf16 *x = a.x + row * a.depth, *w = a.panels + panel * size;
  __m512 sums[R][V];
  for (int r = 0; r < R; r++)
    for (int v = 0; v < V; v++) sums[r][v] = _mm512_setzero_ps();
  for (int64_t k = 0; k < a.depth; k += 2) {
    __m512bh columns[V];
    for (int v = 0; v < V; v++)
      columns[v] = (__m512bh)_mm512_loadu_si512(w + v / 2 * size + k * PANEL + v % 2 * PANEL);
    for (int p = 0; p < P; p++) {
      _mm_prefetch(fetch.at + p * size * 2, _MM_HINT_T0);
      if (fetch.bytes > 64) _mm_prefetch(fetch.at + p * size * 2 + 64, _MM_HINT_T0);
    }
    fetch.at += fetch.bytes;
    for (int r = 0; r < R; r++) {
      int32_t pair;
      std::memcpy(&pair, x + r * a.depth + k, sizeof pair);
      const __m512bh both = (__m512bh)_mm512_set1_epi32(pair);
      for (int v = 0; v < V; v++) sums[r][v] = _mm512_dpbf16_ps(sums[r][v], columns[v], both);
    }
  }
  for (int v = 0; v < V; v++) {
    const int64_t column = panel * PANEL + v * LANES;
    const vf bias = a.bias ? load(a.bias + column) : vf{};
    for (int r = 0; r < R; r++) store(a.out + (row + r) * a.width + column, (vf)sums[r][v] + bias);
  }
}

template <int P, int R>
void tile_of(int64_t rows, const LinearArgs& a, int64_t row, int64_t panel, Fetch fetch) {
  if (rows == R) return tile<R, P>(a, row, panel, fetch);
  if constexpr (R > 1) tile_of<P, R - 1>(rows, a, row, panel, fetch);
}

// All rows against one panel: tiles of equal height, each of which fetches its share of the next panel.
void whole_panel(const LinearArgs& a, int64_t panel) {
  const int64_t tiles = (a.n + MAX_ROWS - 1) / MAX_ROWS, bytes = PANEL * a.depth * 2;
  const char* next = reinterpret_cast<const char*>(a.panels) + (panel + 1) * bytes;
  for (int64_t t = 0; t < tiles; t++) {
    const int64_t begin = a.n * t / tiles, end = a.n * (t + 1) / tiles;
    const Fetch fetch = tiles == 1 ? Fetch{next - bytes + AHEAD, 128} : Fetch{next + bytes * t / tiles, 128 / tiles};
    tile_of<1, MAX_ROWS>(end - begin, a, begin, panel, fetch);
  }
}

}  // namespace

void linear(const LinearArgs& a) {
  if (!a.n) return;
  parallel_for(a.width / PANEL, 1, [&](int64_t panel, int64_t end) {
    if (a.n <= PAIRED_ROWS)
      for (; panel + 2 <= end; panel += 2) {
        const char* at = reinterpret_cast<const char*>(a.panels + panel * PANEL * a.depth);
        tile_of<2, PAIRED_ROWS>(a.n, a, 0, panel, {at + AHEAD, 128});
      }
    for (; panel < end; panel++) whole_panel(a, panel);
  });
}

bool has_linear() { return true; }

#else

void linear(const LinearArgs&) {}
bool has_linear() { return false; }

#endif

void pack_panels(const bf16* weight, bf16* panels, int64_t width, int64_t depth) {
  parallel_for(width / PANEL, 1, [=](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; p++)
      for (int64_t k = 0; k < depth; k++)
        for (int64_t c = 0; c < PANEL; c++)
          panels[p * PANEL * depth + k / 2 * 2 * PANEL + 2 * c + k % 2] = weight[(p * PANEL + c) * depth + k];
  });
}
