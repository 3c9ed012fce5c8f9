// Gumbel noise from a counter: the bits depend on (seed, position, token) alone.
#include <algorithm>

#include "kernels.h"

namespace {

constexpr uint64_t GOLDEN = 0x9E3779B97F4A7C15ull;
constexpr float BELOW_ONE = 0x1.fffffep-1f;
constexpr int64_t CHUNK = 1024;  // tokens a piece: its variates stay in the first-level cache

INLINE uint64_t mix(uint64_t x) {  // the splitmix64 finaliser
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
  return x ^ (x >> 31);
}

void uniforms(uint64_t key, int64_t first, int64_t count, float* out) {
  for (int64_t i = 0; i < count; i++) {
    const uint32_t bits = static_cast<uint32_t>(mix(key + static_cast<uint64_t>(first + i + 1) * GOLDEN) >> 32);
    const float x = (static_cast<float>(bits) + 0.5f) * 0x1p-32f;
    out[i] = x < BELOW_ONE ? x : BELOW_ONE;
  }
}

// log(1 - x): the logarithm of the rounded 1 - x, plus what the rounding lost.
INLINE vf log1m(vf x) {
  const vf u = 1.0f - x;
  const vf lost = (1.0f - u) - x;
  return log_positive(u) + lost / u;
}

}  // namespace

void gumbel(const int64_t* seeds, const int64_t* positions, float* out, int64_t n, int64_t vocab) {
  const int64_t pieces = (vocab + CHUNK - 1) / CHUNK;
  parallel_for(n * pieces, 32, [=](int64_t begin, int64_t end) {
    alignas(64) float x[CHUNK + LANES] = {};
    for (int64_t p = begin; p < end; p++) {
      const int64_t row = p / pieces, first = p % pieces * CHUNK, count = std::min(CHUNK, vocab - first);
      const uint64_t key = mix(mix(seeds[row]) + static_cast<uint64_t>(positions[row]) * GOLDEN);
      uniforms(key, first, count, x);
      for (int64_t i = 0; i < count; i += LANES)
        store_n(out + row * vocab + first + i, -log_positive(-log1m(load(x + i))), count - i);
    }
  });
}
