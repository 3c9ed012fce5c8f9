// The two inner loops of attention, over scratch that lies in cache: a small matrix product and the
// conversion of key rows into a transposed block.
#pragma once

#include <utility>

#include "vec.h"

constexpr int ROWS_STEP = 6;                     // rows of the product held in registers
constexpr int COLS_STEP = LANES == 16 ? 4 : 2;   // vectors of columns held in registers

// c[r, :] = (accumulate ? c[r, :] : 0) + sum_t a[r, t] * b[t, :] for R rows and V vectors of columns.
template <int R, int V>
INLINE void product_tile(const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc, int64_t depth,
                         bool accumulate) {
  vf sums[R][V];
  for (int r = 0; r < R; r++)
    for (int v = 0; v < V; v++) sums[r][v] = accumulate ? load(c + r * ldc + v * LANES) : vf{};
  for (int64_t t = 0; t < depth; t++) {
    vf column[V];
    for (int v = 0; v < V; v++) column[v] = load(b + t * ldb + v * LANES);
    for (int r = 0; r < R; r++) {
      const float x = a[r * lda + t];
      for (int v = 0; v < V; v++) sums[r][v] += column[v] * x;
    }
  }
  for (int r = 0; r < R; r++)
    for (int v = 0; v < V; v++) store(c + r * ldc + v * LANES, sums[r][v]);
}

template <int V, int R = ROWS_STEP>
INLINE void product_rows(int64_t rows, const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc,
                         int64_t depth, bool accumulate) {
  for (; rows >= R; rows -= R, a += R * lda, c += R * ldc)
    product_tile<R, V>(a, lda, b, ldb, c, ldc, depth, accumulate);
  if constexpr (R > 1)
    if (rows) product_rows<V, R - 1>(rows, a, lda, b, ldb, c, ldc, depth, accumulate);
}

// The whole product: `vectors` columns of LANES each.
INLINE void product(int64_t rows, int64_t vectors, const float* a, int64_t lda, const float* b, int64_t ldb, float* c,
                    int64_t ldc, int64_t depth, bool accumulate) {
  for (; vectors >= COLS_STEP; vectors -= COLS_STEP, b += COLS_STEP * LANES, c += COLS_STEP * LANES)
    product_rows<COLS_STEP>(rows, a, lda, b, ldb, c, ldc, depth, accumulate);
  for (; vectors > 0; vectors--, b += LANES, c += LANES)
    product_rows<1>(rows, a, lda, b, ldb, c, ldc, depth, accumulate);
}

template <class T>
INLINE void prefetch(const T* row, int64_t dim) {
  for (int64_t d = 0; d < dim; d += 64 / static_cast<int64_t>(sizeof(T))) __builtin_prefetch(row + d);
}

// Rows of any element type -> float32 lines `ld` apart, zero beyond dim.
template <class T>
INLINE void widen_rows(const T* const* rows, int64_t count, int64_t dim, float* out, int64_t ld) {
  for (int64_t i = 0; i < count; i++, out += ld) {
    const T* row = rows[i];
    int64_t d = 0;
    for (; d + LANES <= dim; d += LANES) store(out + d, load(row + d));
    if (d < dim) store(out + d, load_n(row + d, dim - d));
  }
}

// Swaps the off-diagonal blocks of side S: lane l of the pair keeps its own where bit S agrees.
#if defined(__clang__)
template <int S, int... L>
INLINE void swap_blocks(vu& a, vu& b, std::integer_sequence<int, L...>) {
  const vu low = __builtin_shufflevector(a, b, (L & S ? LANES + L - S : L)...);
  b = __builtin_shufflevector(a, b, (L & S ? LANES + L : L + S)...);
  a = low;
}
#else
template <int S, int... L>
INLINE void swap_blocks(vu& a, vu& b, std::integer_sequence<int, L...>) {
  const vu low = __builtin_shuffle(a, b, vu{(L & S ? LANES + L - S : L)...});
  b = __builtin_shuffle(a, b, vu{(L & S ? LANES + L : L + S)...});
  a = low;
}
#endif

template <int S = LANES / 2>
INLINE void transpose(vu (&rows)[LANES]) {
  for (int i = 0; i < LANES; i++)
    if (!(i & S)) swap_blocks<S>(rows[i], rows[i + S], std::make_integer_sequence<int, LANES>{});
  if constexpr (S > 1) transpose<S / 2>(rows);
}

// Key rows of LANES keys -> out[d, 0..LANES), d < dim, lines `ld` floats apart.
INLINE void transpose_keys(const float* const* keys, int64_t dim, float* out, int64_t ld) {
  int64_t d = 0;
  for (; d + LANES <= dim; d += LANES) {
    vu rows[LANES];
    for (int i = 0; i < LANES; i++) rows[i] = load_raw<vu>(keys[i] + d);
    transpose(rows);
    for (int i = 0; i < LANES; i++) store(out + (d + i) * ld, (vf)rows[i]);
  }
  for (; d < dim; d++)
    for (int i = 0; i < LANES; i++) out[d * ld + i] = keys[i][d];
}

// bf16 elements travel in pairs, which halves the shuffles; each pair splits after the transpose.
INLINE void transpose_keys(const bf16* const* keys, int64_t dim, float* out, int64_t ld) {
  int64_t d = 0;
  for (; d + 2 * LANES <= dim; d += 2 * LANES) {
    vu rows[LANES];
    for (int i = 0; i < LANES; i++) rows[i] = load_raw<vu>(keys[i] + d);
    transpose(rows);
    for (int i = 0; i < LANES; i++) {
      store(out + (d + 2 * i) * ld, (vf)(rows[i] << 16));
      store(out + (d + 2 * i + 1) * ld, (vf)(rows[i] & 0xffff0000u));
    }
  }
  for (; d < dim; d++)
    for (int i = 0; i < LANES; i++) out[d * ld + i] = as_float(keys[i][d]);
}
