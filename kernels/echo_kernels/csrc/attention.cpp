// Paged, ragged tree attention on the CPU. One task = (request, KV head, tile of query rows): it
// converts each block of keys and values to float32 once and uses it for the tile's rows times the
// G query heads of the group, with a running (online) softmax. Tasks are handed out dynamically.
//
// A row's result does not depend on the rows beside it, nor on where invisible keys lie between the
// visible ones: a path in a tree and the same tokens one by one give the same bits. For that, keys are
// added up in order (an invisible one adds zero), the running peak is a power of two, so that going over
// to a higher one is exact wherever it happens, and the sum of the weights is a double, which loses
// nothing that a float would show.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels.h"
#include "microkernel.h"

namespace {

constexpr int64_t BLOCK = 64;              // keys converted at a time
constexpr int64_t TILE_ROWS = 48;          // query rows (positions x group) that share a converted block
constexpr double SERIAL_FLOPS = 2e6;       // some 10 us on one thread: waking others gains nothing below
constexpr float NONE = -std::numeric_limits<float>::infinity();

struct Task {
  int32_t request, head, first, count;  // count query positions from row `first`
  int64_t work;
};

// One thread's working memory. Layouts: keys [dim, BLOCK], values [BLOCK, padded], q [rows, dim],
// scores [rows, BLOCK], out [rows, padded], sums [rows, LANES] double, visible [positions, BLOCK].
struct Scratch {
  std::vector<float> store;
  std::vector<uint8_t> visible;
  float *keys, *values, *q, *scores, *out, *sums, *peak;

  double* sums_of(int64_t row) { return reinterpret_cast<double*>(sums) + row * LANES; }

  void fit(int64_t rows, int64_t dim, int64_t padded) {
    const int64_t sizes[] = {dim * BLOCK, padded * BLOCK, rows * dim, rows * BLOCK, rows * padded, 2 * rows * LANES, rows};
    float** parts[] = {&keys, &values, &q, &scores, &out, &sums, &peak};
    int64_t total = 16;
    for (int64_t size : sizes) total += (size + 15) / 16 * 16;
    if (static_cast<int64_t>(store.size()) < total) store.resize(total);
    float* at = store.data() + (64 - reinterpret_cast<uintptr_t>(store.data()) % 64) % 64 / 4;
    for (int i = 0; i < 7; i++) {
      *parts[i] = at;
      at += (sizes[i] + 15) / 16 * 16;
    }
    if (static_cast<int64_t>(visible.size()) < rows * BLOCK) visible.resize(rows * BLOCK);
  }
};

[[noreturn]] void bad_request(int64_t r, const std::string& what) {
  throw std::invalid_argument("request " + std::to_string(r) + ": " + what);
}

template <class T>
void check_request(const AttentionArgs<T>& a, int64_t r) {
  const int64_t ctx = a.ctx_lens[r], kv = a.kv_lens[r], pages = (kv + a.block_size - 1) / a.block_size;
  if (a.q_start[r + 1] < a.q_start[r]) bad_request(r, "q_start falls");
  if (ctx < 0 || kv < ctx) bad_request(r, "needs 0 <= ctx_lens <= kv_lens");
  if (a.q_start[r + 1] == a.q_start[r]) return;
  if (kv - ctx > a.mask_width) bad_request(r, "the mask is narrower than kv_lens - ctx_lens");
  if (pages > a.max_blocks) bad_request(r, "kv_lens needs more blocks than block_tables has");
  for (int64_t i = 0; i < pages; i++) {
    const int64_t page = a.tables[r * a.table_stride + i];
    const int64_t used = std::min(a.block_size, kv - i * a.block_size);
    if (page < 0 || page * a.block_size + used > a.cache_rows)
      throw std::out_of_range("block_tables[" + std::to_string(r) + ", " + std::to_string(i) + "] is " +
                              std::to_string(page) + "; outside the cache of " + std::to_string(a.cache_rows) + " rows");
  }
}

// Largest first, so that the last task to start is a small one.
template <class T>
std::vector<Task> make_tasks(const AttentionArgs<T>& a, double& flops) {
  if (a.q_start[0] != 0 || a.q_start[a.batch] != a.n) throw std::invalid_argument("q_start must rise from 0 to N");
  const int64_t group = a.heads / a.kv_heads, tile = std::max<int64_t>(1, TILE_ROWS / group);
  std::vector<Task> tasks;
  for (int64_t r = 0; r < a.batch; r++) {
    check_request(a, r);
    const int32_t begin = a.q_start[r], end = a.q_start[r + 1];
    for (int32_t first = begin; first < end; first += tile) {
      const int32_t count = std::min<int32_t>(tile, end - first);
      const int64_t work = (count * group + 8) * static_cast<int64_t>(a.kv_lens[r]);  // 8: the conversions' share
      for (int32_t h = 0; h < a.kv_heads; h++) tasks.push_back({static_cast<int32_t>(r), h, first, count, work});
      flops += 4.0 * static_cast<double>(work * a.dim * a.kv_heads);
    }
  }
  if (flops > SERIAL_FLOPS)
    std::stable_sort(tasks.begin(), tasks.end(), [](const Task& x, const Task& y) { return x.work > y.work; });
  return tasks;
}

template <class T>
class TileRunner {
 public:
  // `upcoming` is what the thread will probably run next.
  TileRunner(const AttentionArgs<T>& args, const Task& task, const Task& upcoming, Scratch& scratch)
      : a(args), t(task), then(upcoming), s(scratch), group(a.heads / a.kv_heads), rows(t.count * group),
        padded((a.dim + LANES - 1) / LANES * LANES), ctx(a.ctx_lens[t.request]), kv(a.kv_lens[t.request]) {
    s.fit(rows, a.dim, padded);
  }

  void run() {
    load_queries();
    for (int64_t first = 0; first < kv; first += BLOCK) {
      const int64_t count = std::min(BLOCK, kv - first);
      const bool masked = first + count > ctx || count < BLOCK;
      if (masked && !read_mask(first, count)) continue;
      convert_block(first, count);
      const int64_t vectors = (count + LANES - 1) / LANES;
      const int64_t columns = (vectors + COLS_STEP - 1) / COLS_STEP * COLS_STEP;  // the surplus is never read
      product(rows, columns, s.q, a.dim, s.keys, BLOCK, s.scores, BLOCK, a.dim, false);
      for (int64_t r = 0; r < rows; r++) {
        if (masked) hide(r, vectors);
        soften(r, vectors);
      }
      product(rows, padded / LANES, s.scores, BLOCK, s.values, padded, s.out, padded, count, true);
    }
    write();
  }

 private:
  const AttentionArgs<T>& a;
  const Task &t, &then;
  Scratch& s;
  const int64_t group, rows, padded, ctx, kv;

  // Queries times the scale; running maximum, sums and output start empty.
  void load_queries() {
    for (int64_t i = 0; i < t.count; i++) {
      const T* q = a.q + ((t.first + i) * a.heads + t.head * group) * a.dim;
      for (int64_t e = 0; e < group * a.dim; e += LANES)
        store_n(s.q + i * group * a.dim + e, load_n(q + e, group * a.dim - e) * a.scale, group * a.dim - e);
    }
    std::fill_n(s.peak, rows, NONE);
    std::fill_n(s.sums, 2 * rows * LANES, 0.0f);
    std::fill_n(s.out, rows * padded, 0.0f);
  }

  // visible[i, k] for the block's keys, 0 past its end; false if the tile sees none of them.
  bool read_mask(int64_t first, int64_t count) {
    const int64_t open = std::clamp<int64_t>(ctx - first, 0, count);
    uint8_t any = open > 0;
    for (int64_t i = 0; i < t.count; i++) {
      uint8_t* seen = s.visible.data() + i * BLOCK;
      const bool* mask = a.mask + (t.first + i) * a.mask_stride + first + open - ctx;
      std::fill_n(seen, open, 1);
      std::memcpy(seen + open, mask, count - open);
      std::fill_n(seen + count, BLOCK - count, 0);
      for (int64_t k = 0; k < BLOCK; k++) any |= seen[k];
    }
    return any;
  }

  // Offset of a logical position's row of a task's head in either cache.
  int64_t row_at(const Task& task, int64_t page, int64_t within) const {
    const int64_t block = a.tables[task.request * a.table_stride + page];
    return ((block * a.block_size + within) * a.kv_heads + task.head) * a.dim;
  }

  // The row one block on, where the keys go on: of this task, else of the upcoming one's beginning.
  int64_t row_ahead(int64_t page, int64_t first, int64_t within) const {
    const int64_t ahead = page + BLOCK / a.block_size;
    if (ahead * a.block_size < kv) return row_at(t, ahead, within);
    const int64_t begin = page - first / a.block_size;
    return begin * a.block_size < a.kv_lens[then.request] ? row_at(then, begin, within) : row_at(t, page, within);
  }

  // Keys transposed, values as they are, both float32. Lanes past the block's end repeat its last key.
  // Rows one block ahead are fetched meanwhile: between two layers' calls the caches were evicted.
  void convert_block(int64_t first, int64_t count) {
    const T *keys[BLOCK], *values[BLOCK];
    const int64_t step = a.kv_heads * a.dim;  // from one cache row to the next
    int64_t page = first / a.block_size, within = first % a.block_size;
    for (int64_t k = 0; k < count; page++, within = 0) {
      int64_t at = row_at(t, page, within), next = row_ahead(page, first, within);
      for (; within < a.block_size && k < count; within++, k++, at += step, next += step) {
        keys[k] = a.k_cache + at;
        values[k] = a.v_cache + at;
        prefetch(a.k_cache + next, a.dim);
        prefetch(a.v_cache + next, a.dim);
      }
    }
    for (int64_t k = count; k % LANES; k++) keys[k] = keys[count - 1];
    for (int64_t k = 0; k < count; k += LANES) transpose_keys(keys + k, a.dim, s.keys + k, BLOCK);
    widen_rows(values, count, a.dim, s.values, padded);
  }

  // Scores of invisible keys become -inf, whatever they were.
  void hide(int64_t r, int64_t vectors) {
    const uint8_t* seen = s.visible.data() + r / group * BLOCK;
    for (int64_t v = 0; v < vectors; v++) {
      float* score = s.scores + r * BLOCK + v * LANES;
      const vi shown = __builtin_convertvector(load_raw<vb>(seen + v * LANES), vi);
      store(score, (shown != 0) ? load(score) : splat(NONE));
    }
  }

  // Scores -> weights against the new running maximum; older sums and output are rescaled to it.
  void soften(int64_t r, int64_t vectors) {
    float* score = s.scores + r * BLOCK;
    vf top = load(score);
    for (int64_t v = 1; v < vectors; v++) {
      const vf x = load(score + v * LANES);
      top = (x > top) ? x : top;
    }
    const float old = s.peak[r], found = std::ceil(max_lanes(top) * LOG2_E), peak = found > old ? found : old;
    const float base = peak == NONE ? 0.0f : peak;  // nothing visible yet: every weight is e^-inf = 0
    vd sum = load_raw<vd>(s.sums_of(r));
    if (peak != old && old != NONE) {
      const float shrink = std::exp2(old - peak);
      sum *= shrink;
      for (int64_t d = 0; d < padded; d += LANES) store(s.out + r * padded + d, load(s.out + r * padded + d) * shrink);
    }
    for (int64_t v = 0; v < vectors; v++) {
      const vf weight = exp_under(load(score + v * LANES), base);
      store(score + v * LANES, weight);
      sum += __builtin_convertvector(weight, vd);
    }
    std::memcpy(s.sums_of(r), &sum, sizeof sum);
    s.peak[r] = peak;
  }

  bool sees_any(int64_t position) const {
    if (ctx > 0) return true;
    const bool* mask = a.mask + position * a.mask_stride;
    return std::find(mask, mask + kv, true) != mask + kv;
  }

  // A sum of 0 is a row that sees nothing (0 out) or one whose visible logits are all -inf (NaN out).
  void write() {
    for (int64_t r = 0; r < rows; r++) {
      const int64_t position = t.first + r / group;
      T* out = a.out + (position * a.heads + t.head * group + r % group) * a.dim;
      const float sum = static_cast<float>(sum_lanes(load_raw<vd>(s.sums_of(r))));
      const float inverse = sum == 0.0f && !sees_any(position) ? 0.0f : 1.0f / sum;
      for (int64_t d = 0; d < a.dim; d += LANES) store_n(out + d, load(s.out + r * padded + d) * inverse, a.dim - d);
    }
  }
};

}  // namespace

template <class T>
void tree_attention(const AttentionArgs<T>& a) {
  double flops = 0;
  const std::vector<Task> tasks = make_tasks(a, flops);
  const bool serial = flops < SERIAL_FLOPS || tasks.size() < 2;
  const size_t threads = serial ? 1 : thread_count();
  std::atomic<size_t> next{0};
  const auto worker = [&](int64_t, int64_t) {
    static thread_local Scratch scratch;
    for (size_t i; (i = next.fetch_add(1)) < tasks.size();)
      TileRunner<T>(a, tasks[i], tasks[std::min(i + threads, tasks.size() - 1)], scratch).run();
  };
  if (serial)
    worker(0, 1);
  else
    parallel_for(threads, 1, worker);
}

template void tree_attention(const AttentionArgs<float>&);
template void tree_attention(const AttentionArgs<bf16>&);
