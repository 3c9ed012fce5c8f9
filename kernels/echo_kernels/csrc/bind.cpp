// The Python face: takes tensors whose shapes and dtypes were checked (echo_kernels/ops.py), allocates
// outputs and calls the kernels. The only file here that knows torch.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include "kernels.h"

namespace py = pybind11;
using at::Tensor;

namespace {
thread_local int own_threads = 0;  // of this thread's calls; 0: as many as torch's
}

int thread_count() { return at::in_parallel_region() ? 1 : own_threads ? own_threads : at::get_num_threads(); }

namespace {

template <class T>
T* data(const Tensor& t) {
  return static_cast<T*>(t.data_ptr());
}
template <class T>
T* data(const std::optional<Tensor>& t) {
  return t ? data<T>(*t) : nullptr;
}

// Calls f(float{}) or f(bf16{}).
template <class F>
void by_dtype(const Tensor& t, F f) {
  if (t.scalar_type() == at::kFloat)
    f(float{});
  else
    f(bf16{});
}

Tensor rms_norm_py(const Tensor& x, const Tensor& weight, double eps) {
  Tensor out = at::empty(x.sizes(), x.options());
  by_dtype(x, [&](auto e) {
    using T = decltype(e);
    rms_norm<T>(data<T>(x), nullptr, data<T>(weight), data<T>(out), x.size(0), x.size(1), eps);
  });
  return out;
}

py::tuple add_rms_norm_py(const Tensor& x, py::object residual, const Tensor& weight, double eps) {
  const Tensor sum = py::cast<Tensor>(residual);
  Tensor out = at::empty(x.sizes(), x.options());
  by_dtype(x, [&](auto e) {
    using T = decltype(e);
    rms_norm<T>(data<T>(x), data<T>(sum), data<T>(weight), data<T>(out), x.size(0), x.size(1), eps);
  });
  return py::make_tuple(out, residual);
}

Tensor rope_store_py(const Tensor& qkv, const Tensor& cos, const Tensor& sin, const Tensor& positions,
                     const Tensor& slots, const Tensor& k_cache, const Tensor& v_cache, int64_t heads,
                     const std::optional<Tensor>& q_weight, const std::optional<Tensor>& k_weight, double eps) {
  const int64_t n = qkv.size(0), dim = k_cache.size(2);
  Tensor q = at::empty({n, heads, dim}, qkv.options());
  by_dtype(qkv, [&](auto e) {
    using T = decltype(e);
    rope_store(RopeArgs<T>{data<T>(qkv), data<float>(cos), data<float>(sin), data<int64_t>(positions),
                           data<int64_t>(slots), data<T>(k_cache), data<T>(v_cache), data<T>(q), data<T>(q_weight),
                           data<T>(k_weight), static_cast<float>(eps), n, heads, k_cache.size(1), dim, cos.size(0),
                           k_cache.size(0)});
  });
  return q;
}

Tensor silu_mul_py(const Tensor& gate_up) {
  const int64_t n = gate_up.size(0), width = gate_up.size(1) / 2;
  Tensor out = at::empty({n, width}, gate_up.options());
  by_dtype(gate_up, [&](auto e) {
    using T = decltype(e);
    silu_mul<T>(data<T>(gate_up), data<T>(out), n, width);
  });
  return out;
}

Tensor tree_attention_py(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache, const Tensor& tables,
                         int64_t block_size, const Tensor& q_start, const Tensor& ctx_lens, const Tensor& kv_lens,
                         const Tensor& mask, double scale) {
  py::gil_scoped_release unlocked;
  Tensor out = at::empty(q.sizes(), q.options());
  by_dtype(q, [&](auto e) {
    using T = decltype(e);
    tree_attention(AttentionArgs<T>{
        data<T>(q), data<T>(k_cache), data<T>(v_cache), data<int32_t>(tables), data<int32_t>(q_start),
        data<int32_t>(ctx_lens), data<int32_t>(kv_lens), data<bool>(mask), data<T>(out), static_cast<float>(scale),
        q.size(0), q.size(1), k_cache.size(1), q.size(2), k_cache.size(0), tables.size(0), tables.size(1),
        tables.stride(0), block_size, mask.size(1), mask.stride(0)});
  });
  return out;
}

void compact_kv_py(const std::vector<Tensor>& pools, const Tensor& src, const Tensor& dst) {
  for (const Tensor& pool : pools) {
    const int64_t layers = pool.size(0), rows = pool.size(1);
    if (layers == 0 || rows == 0) continue;
    compact_rows(data<char>(pool), layers, rows, pool.nbytes() / (layers * rows), data<int64_t>(src),
                 data<int64_t>(dst), src.numel());
  }
}

Tensor gumbel_py(const Tensor& seeds, const Tensor& positions, int64_t vocab, const py::object& /*device: always cpu*/) {
  py::gil_scoped_release unlocked;
  Tensor out = at::empty({seeds.size(0), vocab}, seeds.options().dtype(at::kFloat));
  gumbel(data<int64_t>(seeds), data<int64_t>(positions), data<float>(out), seeds.size(0), vocab);
  return out;
}

py::tuple best_token_py(const Tensor& logits, const Tensor& rows) {
  const int64_t n = rows.size(0), *row = data<int64_t>(rows);
  for (int64_t i = 0; i < n; i++)
    if (row[i] < 0 || row[i] >= logits.size(0)) throw std::out_of_range("a row lies outside the logits");
  Tensor tokens = at::empty({n}, rows.options()), best = at::empty({n}, rows.options().dtype(at::kFloat));
  by_dtype(logits, [&](auto e) {
    using T = decltype(e);
    best_token<T>(data<T>(logits), row, data<int64_t>(tokens), data<float>(best), n, logits.size(1));
  });
  return py::make_tuple(tokens, best);
}

py::tuple top_tokens_py(const Tensor& logits, int64_t k) {
  const int64_t n = logits.size(0);
  Tensor log_probs = at::empty({n, k}, logits.options().dtype(at::kFloat));
  Tensor tokens = at::empty({n, k}, logits.options().dtype(at::kLong));
  by_dtype(logits, [&](auto e) {
    using T = decltype(e);
    top_tokens<T>(data<T>(logits), data<float>(log_probs), data<int64_t>(tokens), n, logits.size(1), k);
  });
  return py::make_tuple(log_probs, tokens);
}

// None where torch's product is to be used.
std::optional<Tensor> pack_weight_py(const Tensor& weight) {
  const int64_t width = weight.size(0), depth = weight.size(1);
  const bool narrow = weight.scalar_type() == at::kBFloat16;
  if (!width || width % PANEL || !depth || (narrow && (depth % 2 || HAS_BF16_TILES))) return {};
  const bool pairs = narrow || (depth % 2 == 0 && fits_bf16(data<float>(weight), width * depth));
  const int64_t unit = pairs ? 2 : 1;
  Tensor panels = at::empty({width / PANEL, depth / unit, PANEL, unit},
                            weight.options().dtype(pairs ? at::kBFloat16 : at::kFloat));
  if (narrow)
    pack_panels(data<bf16>(weight), data<bf16>(panels), width, depth);
  else if (pairs)
    pack_panels(data<float>(weight), data<bf16>(panels), width, depth);
  else
    pack_panels(data<float>(weight), data<float>(panels), width, depth);
  return panels;
}

Tensor linear_py(const Tensor& x, const Tensor& panels, const std::optional<Tensor>& bias) {
  py::gil_scoped_release unlocked;
  Tensor out = at::empty({x.size(0), panels.size(0) * PANEL}, x.options());
  by_dtype(x, [&](auto e) {
    using T = decltype(e);
    linear(LinearArgs<T>{data<T>(x), panels.data_ptr(), panels.scalar_type() == at::kBFloat16, data<T>(bias),
                         data<T>(out), x.size(0), out.size(1), x.size(1)});
  });
  return out;
}

// (panels, scales), or None where a wider product is to be used.
py::object pack_int8_py(const Tensor& weight) {
  const int64_t width = weight.size(0), depth = weight.size(1);
  if (!HAS_INT8_PRODUCT || weight.scalar_type() != at::kBFloat16 || !width || width % PANEL || !depth || depth % 16)
    return py::none();
  Tensor panels = at::empty({width / PANEL, depth / 4, PANEL, 4}, weight.options().dtype(at::kByte));
  Tensor scales = at::empty({width}, weight.options().dtype(at::kFloat));
  pack_int8_panels(data<bf16>(weight), data<uint8_t>(panels), data<float>(scales), width, depth);
  return py::make_tuple(panels, scales);
}

Tensor linear_int8_py(const Tensor& x, const Tensor& panels, const Tensor& scales) {
  py::gil_scoped_release unlocked;
  Tensor out = at::empty({x.size(0), scales.size(0)}, x.options());
  linear_int8({data<bf16>(x), data<uint8_t>(panels), data<float>(scales), data<bf16>(out), x.size(0), out.size(1),
               x.size(1)});
  return out;
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("rms_norm", &rms_norm_py);
  m.def("add_rms_norm", &add_rms_norm_py);
  m.def("rope_store", &rope_store_py);
  m.def("silu_mul", &silu_mul_py);
  m.def("tree_attention", &tree_attention_py);
  m.def("compact_kv", &compact_kv_py);
  m.def("gumbel", &gumbel_py);
  m.def("best_token", &best_token_py);
  m.def("top_tokens", &top_tokens_py);
  m.def("pack_weight", &pack_weight_py);
  m.def("linear", &linear_py);
  m.def("pack_int8", &pack_int8_py);
  m.def("linear_int8", &linear_int8_py);
  m.def("set_threads", [](int threads) { own_threads = threads; });
  m.def("threads", [] { return own_threads; });
  m.def("pool_threads", &pool_threads);
  m.attr("multiplies") = !HAS_BF16_TILES;
  m.def("pool_times", [] {
    const PoolTimes times = pool_times();
    return py::make_tuple(times.calls, times.working, times.waiting);
  });
  m.attr("lanes") = LANES;
}
