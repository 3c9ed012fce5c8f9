// The likeliest token of a row of logits: one pass for the maximum, then a look into the piece that has it.
#include <algorithm>
#include <limits>

#include "kernels.h"

namespace {

constexpr int64_t PIECE = 512;

// The largest of x[0, n), NaN where one is in it.
template <class T>
float largest(const T* x, int64_t n) {
  vf most = splat(-std::numeric_limits<float>::infinity());
  vi wrong = {};
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) {
    const vf v = load(x + i);
    most = v > most ? v : most;
    wrong |= (vi)(v != v);
  }
  float best = max_lanes(most);
  for (int lane = 0; lane < LANES; lane++)
    if (wrong[lane]) best = std::numeric_limits<float>::quiet_NaN();
  for (; i < n; i++) {
    T one[LANES] = {x[i]};
    const float v = load(one)[0];
    if (!(v <= best)) best = best != best ? best : v;
  }
  return best;
}

template <class T>
int64_t first_of(const T* x, int64_t n, float value) {
  for (int64_t i = 0; i < n; i++) {
    T one[LANES] = {x[i]};
    if (load(one)[0] == value) return i;
  }
  return 0;
}

}  // namespace

template <class T>
void best_token(const T* logits, const int64_t* rows, int64_t* tokens, float* best, int64_t n, int64_t vocab) {
  parallel_for(n, 4, [=](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; r++) {
      const T* row = logits + rows[r] * vocab;
      float most = -std::numeric_limits<float>::infinity();
      int64_t piece = 0;
      for (int64_t i = 0; i < vocab && most == most; i += PIECE) {
        const float here = largest(row + i, std::min(PIECE, vocab - i));
        if (!(here <= most)) most = here, piece = i;
      }
      best[r] = most;
      tokens[r] = most == most ? piece + first_of(row + piece, std::min(PIECE, vocab - piece), most) : 0;
    }
  });
}

template void best_token(const float*, const int64_t*, int64_t*, float*, int64_t, int64_t);
template void best_token(const bf16*, const int64_t*, int64_t*, float*, int64_t, int64_t);
