// Products in float32 arithmetic, on every processor. Weights that a bfloat16 holds exactly are kept as such, two to a
// unit, so that a pass reads half the bytes: widened again they are the same numbers.
#include <vector>

#include "panels.h"

namespace {

// The weights of a unit: two bfloat16, the even depth in the low half.
struct Pairs {
  static constexpr int DEPTH = 2;
  static INLINE_MEMBER vf weights(vu unit, int which) { return (vf)(which ? unit & 0xffff0000u : unit << 16); }
};
// Or one float.
struct Singles {
  static constexpr int DEPTH = 1;
  static INLINE_MEMBER vf weights(vu unit, int) { return (vf)unit; }
};

// What the registers hold, beside a unit and its x: few rows of a whole panel, more of two vectors at a time, which
// halves what is read for each product.
constexpr int ROWS_OF_ALL = LANES == 16 ? 12 : 3, ROWS_OF_TWO = LANES == 16 ? 12 : 6;

template <class Unit, class T>
struct FloatProduct {
  static constexpr int ROWS = ROWS_OF_TWO;
  const float* x;  // [n, depth * Unit::DEPTH]
  const char* panels;
  const T* bias;
  T* out;          // rows `stride` apart
  int64_t n, width, depth, stride;

  template <int R, int P>
  void tile(int64_t row, int64_t panel, Fetch fetch) const {
    constexpr int ALL = P * VECTORS, V = R <= ROWS_OF_ALL ? ALL : 2;
    slice<R, P, V, true>(row, panel, 0, fetch);
    for (int first = V; first < ALL; first += V) slice<R, P, V, false>(row, panel, first, fetch);
  }

 private:
  // One depth. The loops are nested so that the registers hold the shorter side.
  template <int R, int V>
  static INLINE_MEMBER void add(vf (&sums)[R][V], const char* w, int64_t size, const float* x, int64_t line, int h) {
    const auto weights = [=](int v) {
      return Unit::weights(load_raw<vu>(w + v / VECTORS * size + v % VECTORS * LANES * 4), h);
    };
    if constexpr (R > V) {
      vf column[V];
      for (int v = 0; v < V; v++) column[v] = weights(v);
      for (int r = 0; r < R; r++) {
        const vf value = splat(x[r * line]);
        for (int v = 0; v < V; v++) sums[r][v] += column[v] * value;
      }
    } else {
      for (int v = 0; v < V; v++) {
        const vf column = weights(v);
        for (int r = 0; r < R; r++) sums[r][v] += column * x[r * line];
      }
    }
  }

  template <int R, int P, int V, bool FETCHES>
  void slice(int64_t row, int64_t panel, int first, Fetch fetch) const {
    const int64_t size = STEP * depth, line = depth * Unit::DEPTH;
    const float* at = x + row * line;
    const char* w = panels + panel * size + first * LANES * 4;
    vf sums[R][V] = {};
    for (int64_t k = 0; k < depth; k++, w += STEP) {
      if constexpr (FETCHES) fetch.next<P>(size);
      for (int h = 0; h < Unit::DEPTH; h++, at++) add<R, V>(sums, w, size, at, line, h);
    }
    for (int r = 0; r < R; r++)
      for (int v = 0; v < V; v++) {
        const int64_t column = panel * PANEL + (first + v) * LANES;
        store(out + (row + r) * stride + column, sums[r][v] + (bias ? load(bias + column) : vf{}));
      }
  }
};

const float* widened(const float* x, int64_t) { return x; }

// In the calling thread's memory, until its next call.
const float* widened(const bf16* x, int64_t count) {
  static thread_local std::vector<float> store_;
  store_.resize(count);
  for (int64_t i = 0; i < count; i++) store_[i] = as_float(x[i]);
  return store_.data();
}

// For many tiles a panel's weights are widened once, into memory that all share.
template <class T>
void widened_product(const LinearArgs<T>& a, const float* x) {
  parallel_for(a.width / PANEL, 1, [&](int64_t panel, int64_t end) {
    static thread_local std::vector<float> store_;
    store_.resize(a.depth * PANEL);
    float* wide = store_.data();
    for (; panel < end; panel++) {
      const char* pairs = static_cast<const char*>(a.panels) + panel * PANEL * a.depth * 2;
      for (int64_t k = 0; k < a.depth; k++)
        for (int v = 0; v < VECTORS; v++) {
          const vu unit = load_raw<vu>(pairs + k / 2 * STEP + v * LANES * 4);
          store(wide + k * PANEL + v * LANES, Pairs::weights(unit, k % 2));
        }
      const T* bias = a.bias ? a.bias + panel * PANEL : nullptr;
      const FloatProduct<Singles, T> one{x, reinterpret_cast<const char*>(wide), bias, a.out + panel * PANEL, a.n,
                                         PANEL, a.depth, a.width};
      whole_panel(one, 0, pairs + PANEL * a.depth * 2, STEP / 2);
    }
  });
}

}  // namespace

template <class T>
void linear(const LinearArgs<T>& a) {
  if (!a.n) return;
  const float* x = widened(a.x, a.n * a.depth);
  const char* panels = static_cast<const char*>(a.panels);
  if (!a.pairs)
    product(FloatProduct<Singles, T>{x, panels, a.bias, a.out, a.n, a.width, a.depth, a.width});
  else if (a.n <= 2 * ROWS_OF_TWO)
    product(FloatProduct<Pairs, T>{x, panels, a.bias, a.out, a.n, a.width, a.depth / 2, a.width});
  else
    widened_product(a, x);
}

template void linear(const LinearArgs<float>&);
#if !HAS_BF16_PRODUCT
template void linear(const LinearArgs<bf16>&);
#endif

bool fits_bf16(const float* weight, int64_t count) {
  vu lost{};
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES) lost |= load_raw<vu>(weight + i) & 0xffffu;
  uint32_t any = 0;
  for (; i < count; i++) any |= load_raw<uint32_t>(weight + i) & 0xffffu;
  for (int lane = 0; lane < LANES; lane++) any |= lost[lane];
  return !any;
}

void pack_panels(const float* weight, bf16* panels, int64_t width, int64_t depth) {
  pack(weight, panels, width, depth, 2, [](int64_t, float w) { return static_cast<bf16>(load_raw<uint32_t>(&w) >> 16); });
}
void pack_panels(const float* weight, float* panels, int64_t width, int64_t depth) {
  pack(weight, panels, width, depth, 1, [](int64_t, float w) { return w; });
}
void pack_panels(const bf16* weight, bf16* panels, int64_t width, int64_t depth) {
  pack(weight, panels, width, depth, 2, [](int64_t, bf16 w) { return w; });
}
