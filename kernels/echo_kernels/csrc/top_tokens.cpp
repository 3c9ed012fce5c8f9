// The k likeliest tokens of a row of logits and their log-probabilities. The row is read once, in pieces that stay in
// the L1 cache while their maximum, their sum of exponentials and their candidates are taken.
#include <algorithm>
#include <cmath>
#include <limits>

#include "kernels.h"

namespace {

constexpr int64_t PIECE = 128;
constexpr float NOTHING = -std::numeric_limits<float>::infinity();

// The first n lanes; the others load as NOTHING.
template <class T>
vf load_some(const T* p, int64_t n) {
  if (n >= LANES) return load(p);
  T part[LANES];
  store(part, splat(NOTHING));
  std::memcpy(part, p, n * sizeof(T));
  return load(part);
}

// The largest of x[0, n), NaN where one is in it.
template <class T>
float largest(const T* x, int64_t n) {
  vf most = splat(NOTHING);
  vi wrong = {};
  for (int64_t i = 0; i < n; i += LANES) {
    const vf v = load_some(x + i, n - i);
    most = v > most ? v : most;
    wrong |= (vi)(v != v);
  }
  for (int lane = 0; lane < LANES; lane++)
    if (wrong[lane]) return std::numeric_limits<float>::quiet_NaN();
  return max_lanes(most);
}

template <class T>
float sum_of_exponentials(const T* x, int64_t n, float peak) {
  vf total = {};
  for (int64_t i = 0; i < n; i += LANES) total += exp_nonpositive(load_some(x + i, n - i) - peak);
  return sum_lanes(total);
}

// The k best so far: values fall, equal ones keep the order of their tokens.
struct Best {
  float* values;
  int64_t* tokens;
  int64_t k;

  float last() const { return values[k - 1]; }

  template <class T>
  void consider(const T* x, int64_t first, int64_t n) {
    for (int64_t i = 0; i < n; i += LANES) {
      float lanes[LANES];
      store(lanes, load_some(x + i, n - i));
      for (int lane = 0; lane < LANES; lane++)
        if (lanes[lane] > last()) insert(lanes[lane], first + i + lane);
    }
  }

  void insert(float value, int64_t token) {
    int64_t at = k - 1;
    for (; at > 0 && value > values[at - 1]; at--) values[at] = values[at - 1], tokens[at] = tokens[at - 1];
    values[at] = value, tokens[at] = token;
  }
};

template <class T>
void one_row(const T* row, int64_t vocab, Best best) {
  std::fill_n(best.values, best.k, NOTHING);
  std::fill_n(best.tokens, best.k, 0);
  float peak = NOTHING;
  double total = 0.0;  // of exp(logit - peak)
  for (int64_t i = 0; i < vocab; i += PIECE) {
    const int64_t n = std::min(PIECE, vocab - i);
    const float here = largest(row + i, n);
    if (!(here < std::numeric_limits<float>::infinity())) {  // NaN or infinite: nothing of the row is usable
      peak = NOTHING;
      break;
    }
    if (here > peak) total *= std::exp(static_cast<double>(peak) - here), peak = here;
    if (peak > NOTHING) total += sum_of_exponentials(row + i, n, peak);
    if (here > best.last()) best.consider(row + i, i, n);
  }
  const float log_total = static_cast<float>(std::log(total));
  for (int64_t j = 0; j < best.k; j++) {
    best.values[j] = peak > NOTHING ? std::min(best.values[j] - peak - log_total, 0.0f) : NOTHING;
    if (best.values[j] == NOTHING) best.tokens[j] = 0;
  }
}

}  // namespace

template <class T>
void top_tokens(const T* logits, float* log_probs, int64_t* tokens, int64_t n, int64_t vocab, int64_t k) {
  const int64_t grain = std::max<int64_t>(1, 32768 / vocab);
  parallel_for(n, grain, [=](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; r++) one_row(logits + r * vocab, vocab, Best{log_probs + r * k, tokens + r * k, k});
  });
}

template void top_tokens(const float*, float*, int64_t*, int64_t, int64_t, int64_t);
template void top_tokens(const bf16*, float*, int64_t*, int64_t, int64_t, int64_t);
