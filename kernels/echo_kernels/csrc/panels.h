// The frame of a product of a few rows with a large matrix, the shape of decoding and verification. The matrix
// lies in panels of PANEL columns, so that a pass reads it once, in order; each panel serves every row before
// the next is touched, and the next is fetched meanwhile. A row's sums are taken in one order whatever the other
// rows are: its result does not depend on who shares the pass.
//
// Elements go by *units* of four bytes, what one lane of an instruction takes: one float, two bfloat16 or four int8.
#pragma once

#include <cstdint>

#include "kernels.h"

constexpr int64_t AHEAD = 16384;         // bytes fetched ahead where a panel is read once
constexpr int64_t STEP = PANEL * 4;      // bytes of a panel that a unit of x meets
constexpr int VECTORS = PANEL / LANES;   // vectors of units across a panel

// What is fetched while a tile runs: `bytes` for every unit of depth, from `at` on.
struct Fetch {
  const char* at;
  int64_t bytes;

  // The share of one unit of depth, of panels `size` bytes apart.
  template <int P>
  INLINE_MEMBER void next(int64_t size) {
    for (int p = 0; p < P; p++) {
      __builtin_prefetch(at + p * size);
      if (bytes > 64) __builtin_prefetch(at + p * size + 64);
    }
    at += bytes;
  }
};

// Kind: a product of one element type. It has `n` rows, `width` columns, `depth` units, the `panels` [width / PANEL,
// depth, PANEL] units, ROWS, the most rows of a tile, and tile<R, P>(row, panel, fetch), which writes the R rows from
// `row` on for the P panels from `panel` on.
template <int R, class Kind>
void tile_of(int64_t rows, const Kind& kind, int64_t row, int64_t panel, Fetch fetch) {
  if (rows == R) return kind.template tile<R, 1>(row, panel, fetch);
  if constexpr (R > 1) tile_of<R - 1>(rows, kind, row, panel, fetch);
}

// All rows against one panel: tiles of equal height, each of which fetches its share of what is read `next`, `bytes`
// for every unit of depth.
template <class Kind>
void whole_panel(const Kind& kind, int64_t panel, const char* next, int64_t bytes) {
  const int64_t tiles = (kind.n + Kind::ROWS - 1) / Kind::ROWS, size = bytes * kind.depth;
  for (int64_t t = 0; t < tiles; t++) {
    const int64_t begin = kind.n * t / tiles, end = kind.n * (t + 1) / tiles;
    const Fetch fetch = tiles == 1 ? Fetch{next - size + AHEAD, bytes} : Fetch{next + size * t / tiles, bytes / tiles};
    tile_of<Kind::ROWS>(end - begin, kind, begin, panel, fetch);
  }
}

template <class Kind>
void product(const Kind& kind) {
  parallel_for(kind.width / PANEL, 1, [&](int64_t panel, int64_t end) {
    if (kind.n == 1)  // two panels together: a single row has too few sums in flight
      for (; panel + 2 <= end; panel += 2)
        kind.template tile<1, 2>(0, panel, {kind.panels + panel * STEP * kind.depth + AHEAD, STEP});
    for (; panel < end; panel++) whole_panel(kind, panel, kind.panels + (panel + 1) * STEP * kind.depth, STEP);
  });
}

// weight [width, depth] -> panels [width / PANEL, depth / unit, PANEL, unit]; convert(row, element) is what is kept.
template <class From, class To, class Convert>
void pack(const From* weight, To* panels, int64_t width, int64_t depth, int64_t unit, Convert convert) {
  parallel_for(width, 16, [=](int64_t row, int64_t end) {
    for (; row < end; row++) {
      To* panel = panels + row / PANEL * PANEL * depth + row % PANEL * unit;
      for (int64_t k = 0; k < depth; k++) panel[k / unit * PANEL * unit + k % unit] = convert(row, weight[row * depth + k]);
    }
  });
}
