// The kernels' entry points: raw pointers and sizes, no torch. T is float or bf16; every array is
// contiguous unless a stride is given. Value errors throw std::invalid_argument (ValueError in
// Python) and bad indices std::out_of_range (IndexError), before anything is written.
#pragma once

#include <cstdint>
#include <functional>

#include "vec.h"

// Runs body(begin, end) over [0, n) in pieces of at least `grain`; serial when n <= grain.
void parallel_for(int64_t n, int64_t grain, const std::function<void(int64_t, int64_t)>& body);
int thread_count();

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

// A bf16 matrix [width, depth] as linear reads it: panels [width / PANEL, depth / 2, PANEL, 2]; width a multiple
// of PANEL, depth even. One buffer; what is fetched past its end is never read.
constexpr int64_t PANEL = 32;
struct LinearArgs {
  const bf16* x;       // [n, depth]
  const bf16* panels;
  const bf16* bias;    // [width] or null
  bf16* out;           // [n, width]
  int64_t n, width, depth;
};
bool has_linear();  // whether this processor has the instructions
void linear(const LinearArgs& a);
void pack_panels(const bf16* weight, bf16* panels, int64_t width, int64_t depth);

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
bool has_linear_int8();
void linear_int8(const Int8Args& a);
void pack_int8_panels(const bf16* weight, uint8_t* panels, float* scales, int64_t width, int64_t depth);
