// The kernels' entry points: raw pointers and sizes, no torch. T is float or bf16; every array is
// contiguous unless a stride is given. Value errors throw std::invalid_argument (ValueError in
// Python) and bad indices std::out_of_range (IndexError), before anything is written.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "vec.h"

// Runs body(begin, end) over [0, n) in pieces of at least `grain`; serial when n <= grain. See pool.cpp.
void parallel_for(int64_t n, int64_t grain, const std::function<void(int64_t, int64_t)>& body);
int thread_count();  // that a call may use, its own among them

// What parallel_for has met since the process began, in nanoseconds.
struct PoolTimes {
  int64_t calls;    // that more than one thread was offered
  int64_t working;  // the callers' time in them
  int64_t waiting;  // of that, for pieces that other threads had begun
};
PoolTimes pool_times();
std::vector<int64_t> pool_threads();  // the system's numbers of the threads made so far, the callers not among them

// residual may be null; otherwise residual += x first and the norm is taken of it. x, out [n, width].
template <class T>
void rms_norm(const T* x, T* residual, const T* weight, T* out, int64_t n, int64_t width, float eps);

template <class T>
void silu_mul(const T* gate_up, T* out, int64_t n, int64_t width);  // [n, 2 width] -> [n, width]

template <class T>
struct RopeArgs {
  const T* qkv;              // [n, (heads + 2 kv_heads) dim]
  const float *cos, *sin;    // [table_rows, dim]
  const int64_t *positions;  // [n], rows of the tables
  const int64_t *slots;      // [n], rows of the caches or -1
  T *k_cache, *v_cache;      // [cache_rows, kv_heads, dim]
  T* q;                      // [n, heads, dim], out
  const T *q_weight, *k_weight;  // [dim] or null
  float eps;
  int64_t n, heads, kv_heads, dim, table_rows, cache_rows;
};
template <class T>
void rope_store(const RopeArgs<T>& a);

template <class T>
struct AttentionArgs {
  const T* q;                  // [n, heads, dim]
  const T *k_cache, *v_cache;  // [cache_rows, kv_heads, dim]
  const int32_t* tables;       // [batch, max_blocks], rows table_stride apart
  const int32_t *q_start, *ctx_lens, *kv_lens;  // [batch + 1], [batch], [batch]
  const bool* mask;            // [n, mask_width], rows mask_stride apart
  T* out;                      // [n, heads, dim]
  float scale;
  int64_t n, heads, kv_heads, dim, cache_rows;
  int64_t batch, max_blocks, table_stride, block_size, mask_width, mask_stride;
};
template <class T>
void tree_attention(const AttentionArgs<T>& a);

// pool [layers, rows, row_bytes]: row dst[i] = row src[i], all read before any is written.
void compact_rows(char* pool, int64_t layers, int64_t rows, int64_t row_bytes, const int64_t* src, const int64_t* dst,
                  int64_t count);

void gumbel(const int64_t* seeds, const int64_t* positions, float* out, int64_t n, int64_t vocab);

// The first index of each row's largest logit, and that logit (NaN, and index 0, where the row holds one).
// logits [*, vocab]; rows, tokens, best [n].
template <class T>
void best_token(const T* logits, const int64_t* rows, int64_t* tokens, float* best, int64_t n, int64_t vocab);

// The k largest logits of each row, as log-probabilities and in falling order, and their indices (equal logits: the
// lower index first). Rows with NaN, +inf or nothing above -inf give -inf; where there is -inf, index 0.
// logits [n, vocab]; log_probs, tokens [n, k].
template <class T>
void top_tokens(const T* logits, float* log_probs, int64_t* tokens, int64_t n, int64_t vocab, int64_t k);

// A matrix [width, depth] as linear reads it: panels [width / PANEL, depth / unit, PANEL, unit] of units of four bytes,
// two bf16 (`pairs`; depth even) or one float; width a multiple of PANEL. One buffer; what is fetched past its end is
// never read. Sums are float32 and rounded once.
constexpr int64_t PANEL = 32;
template <class T>
struct LinearArgs {
  const T* x;          // [n, depth]
  const void* panels;
  bool pairs;          // always, where T is bf16
  const T* bias;       // [width] or null
  T* out;              // [n, width]
  int64_t n, width, depth;
};
template <class T>
void linear(const LinearArgs<T>& a);
bool fits_bf16(const float* weight, int64_t count);  // whether a bf16 holds every number exactly
void pack_panels(const bf16* weight, bf16* panels, int64_t width, int64_t depth);
void pack_panels(const float* weight, bf16* panels, int64_t width, int64_t depth);
void pack_panels(const float* weight, float* panels, int64_t width, int64_t depth);

// Which products the processor has instructions for.
#if defined(__AVX512BF16__) && !defined(__AMX_BF16__)
#define HAS_BF16_PRODUCT 1
#else
#define HAS_BF16_PRODUCT 0
#endif
#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
#define HAS_INT8_PRODUCT 1
#else
#define HAS_INT8_PRODUCT 0
#endif
#if defined(__AMX_BF16__)  // oneDNN's products of bf16 are the faster ones
#define HAS_BF16_TILES 1
#else
#define HAS_BF16_TILES 0
#endif

// The same with weights of eight bits: panels [width / PANEL, depth / 4, PANEL, 4] of whole numbers from -127 to 127,
// shifted to be positive; `scales` is what 1 stands for in each column. The rows of x are rounded likewise, each to
// its own scale, and the sums are exact. depth a multiple of 16.
constexpr int32_t INT8_SHIFT = 128;
struct Int8Args {
  const bf16* x;          // [n, depth]
  const uint8_t* panels;
  const float* scales;    // [width]
  bf16* out;              // [n, width]
  int64_t n, width, depth;
};
void linear_int8(const Int8Args& a);
void pack_int8_panels(const bf16* weight, uint8_t* panels, float* scales, int64_t width, int64_t depth);
