// Short vectors of floats in the compiler's own vector syntax, bf16 conversion, and the elementary
// functions the kernels need. Width follows the machine (16 lanes with AVX-512, 8 with AVX, else 4).
// NaN goes through every function here; nothing may be compiled with -ffast-math.
#pragma once

#include <cstdint>
#include <cstring>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__) && defined(__AVX512BW__)
constexpr int LANES = 16;
#elif defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

using bf16 = uint16_t;  // the bits of a bfloat16

typedef float vf __attribute__((vector_size(LANES * 4)));
typedef double vd __attribute__((vector_size(LANES * 8)));
typedef int32_t vi __attribute__((vector_size(LANES * 4)));
typedef uint32_t vu __attribute__((vector_size(LANES * 4)));
typedef uint16_t vh __attribute__((vector_size(LANES * 2)));
typedef uint8_t vb __attribute__((vector_size(LANES)));

#define INLINE_MEMBER inline __attribute__((always_inline))
#define INLINE static INLINE_MEMBER

template <class V, class T>
INLINE V load_raw(const T* p) {
  V v;
  std::memcpy(&v, p, sizeof(V));
  return v;
}

INLINE vf splat(float x) { return x - vf{}; }
INLINE vf load(const float* p) { return load_raw<vf>(p); }

// The two conversions between lanes of 16 and 32 bits; some compilers split the generic form in halves.
INLINE vu widen(vh h) {
#if defined(__AVX512F__) && defined(__AVX512BW__)
  return (vu)_mm512_cvtepu16_epi32((__m256i)h);
#elif defined(__AVX2__)
  return (vu)_mm256_cvtepu16_epi32((__m128i)h);
#else
  return __builtin_convertvector(h, vu);
#endif
}
INLINE vh narrow(vu u) {
#if defined(__AVX512F__) && defined(__AVX512BW__)
  return (vh)_mm512_cvtepi32_epi16((__m512i)u);
#else
  return __builtin_convertvector(u, vh);
#endif
}

INLINE vf load(const bf16* p) { return (vf)(widen(load_raw<vh>(p)) << 16); }
INLINE float as_float(bf16 h) {
  const uint32_t bits = static_cast<uint32_t>(h) << 16;
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
INLINE void store(float* p, vf v) { std::memcpy(p, &v, sizeof v); }

// Round to nearest even, as torch does; NaN stays NaN.
INLINE vu bf16_bits(vf v) {
  vu u = (vu)v;
  vu rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  return (v == v) ? rounded : (vu{} + 0x7fc0);
}
INLINE void store(bf16* p, vf v) {
  vh h = narrow(bf16_bits(v));
  std::memcpy(p, &h, sizeof h);
}

// The value after a round trip through the element type.
INLINE vf round_to(const float*, vf v) { return v; }
INLINE vf round_to(const bf16*, vf v) { return (vf)(bf16_bits(v) << 16); }

// The first n lanes (0 < n <= LANES); the other lanes load as zero.
template <class T>
INLINE vf load_n(const T* p, int64_t n) {
  if (n >= LANES) return load(p);
  T part[LANES] = {};
  std::memcpy(part, p, n * sizeof(T));
  return load(part);
}
template <class T>
INLINE void store_n(T* p, vf v, int64_t n) {
  if (n >= LANES) return store(p, v);
  T part[LANES];
  store(part, v);
  std::memcpy(p, part, n * sizeof(T));
}

// Pairwise within the vector: the order does not depend on the caller.
INLINE float sum_lanes(vf v) {
  float s[LANES];
  store(s, v);
  for (int step = LANES / 2; step; step /= 2)
    for (int i = 0; i < step; i++) s[i] += s[i + step];
  return s[0];
}
INLINE double sum_lanes(vd v) {
  double sum = 0;
  for (int i = 0; i < LANES; i++) sum += v[i];
  return sum;
}
INLINE float max_lanes(vf v) {
  float s[LANES];
  store(s, v);
  for (int step = LANES / 2; step; step /= 2)
    for (int i = 0; i < step; i++) s[i] = s[i] > s[i + step] ? s[i] : s[i + step];
  return s[0];
}

constexpr float LOG2_E = 1.44269504088896341f;
constexpr float ROUNDING = 12582912.0f;  // 1.5 * 2^23: adding it leaves the rounded integer in the low bits

// e^r for |r| <= ln(2) / 2, about 1 ulp.
INLINE vf exp_small(vf r) {
  vf p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  return p * (r * r) + r + 1.0f;
}

// e^x 2^-base for an integer base >= x log2(e) (below 2^-126 it is 0). NaN in, NaN out. The base enters
// through the exponent alone: another base gives the same bits of the mantissa.
INLINE vf exp_under(vf x, float base) {
  const vf n = (x * LOG2_E + ROUNDING) - ROUNDING, d = n - base;
  const vf r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  const vf power = (vf)((__builtin_convertvector(d, vi) + 127) << 23);
  return (d < -126.0f) ? vf{} : exp_small(r) * power;
}

// e^x for x <= 0 (below 2^-126 it is 0), about 1 ulp. NaN in, NaN out.
INLINE vf exp_nonpositive(vf x) { return exp_under(x, 0.0f); }

// Natural logarithm of positive normal numbers, about 1 ulp (and relatively exact near 1).
INLINE vf log_positive(vf x) {
  vi bits = (vi)x;
  vi e = (bits - 0x3f3504f3) >> 23;  // so that the mantissa lies in [sqrt(1/2), sqrt(2))
  vf f = (vf)(bits - (e << 23)) - 1.0f;
  vf n = __builtin_convertvector(e, vf);
  vf p = splat(7.0376836292e-2f);
  p = p * f - 1.1514610310e-1f;
  p = p * f + 1.1676998740e-1f;
  p = p * f - 1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f - 1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f - 2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  vf z = f * f;
  vf y = p * f * z - n * 2.12194440e-4f - 0.5f * z;
  return f + y + n * 0.693359375f;
}
