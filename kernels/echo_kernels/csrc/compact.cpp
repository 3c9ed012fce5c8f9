// Moves rows within the caches: gathers every source row, then scatters.
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels.h"

namespace {

void check_rows(const char* name, const int64_t* index, int64_t count, int64_t rows) {
  for (int64_t i = 0; i < count; i++)
    if (index[i] < 0 || index[i] >= rows)
      throw std::out_of_range(std::string(name) + "[" + std::to_string(i) + "] is " + std::to_string(index[i]) +
                              "; the pool has " + std::to_string(rows) + " rows");
}

}  // namespace

void compact_rows(char* pool, int64_t layers, int64_t rows, int64_t row_bytes, const int64_t* src, const int64_t* dst,
                  int64_t count) {
  check_rows("src", src, count, rows);
  check_rows("dst", dst, count, rows);
  parallel_for(layers, 1 + (1 << 18) / (1 + count * row_bytes), [=](int64_t begin, int64_t end) {
    std::vector<char> held(count * row_bytes);
    for (int64_t layer = begin; layer < end; layer++) {
      char* base = pool + layer * rows * row_bytes;
      for (int64_t i = 0; i < count; i++) std::memcpy(&held[i * row_bytes], base + src[i] * row_bytes, row_bytes);
      for (int64_t i = 0; i < count; i++) std::memcpy(base + dst[i] * row_bytes, &held[i * row_bytes], row_bytes);
    }
  });
}
