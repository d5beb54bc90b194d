// Blocks of grouped products: what one task computes, and how the tasks are cut.
#pragma once

#include <vector>

#include "product.h"
#include "threads.h"

namespace NEOX_ISA {

constexpr int64_t ROW_BLOCK = 96;             // rows whose sums stay in the cache; a multiple of every MR and of 32
constexpr int64_t PANEL_BYTES = 256 * 1024;   // of packed weights: half of a second cache
constexpr int64_t MAX_COLUMNS = 256;          // of a task
constexpr int64_t SUM_ROWS = 512;             // of MAX_COLUMNS sums: half of a second cache
constexpr int64_t SUM_COLUMNS = 1024;         // of ROW_BLOCK rows of sums that stay in a second cache
constexpr int64_t STREAM_BYTES = 1 << 20;     // larger results are written past the caches: their lines need not be read before, and push nothing out

// c = a w^T, where w[n, K] is a weight as it lies in memory. `panel` has room for right_size(DEPTH, n).
constexpr int64_t DEPTH = 1024;
template <class P, class S>
inline void product_transposed(const typename P::Left* a, int64_t lda, int64_t m, const S* w, int64_t ldw, int64_t K, int64_t n, typename P::Right* panel,
                               typename P::Sum* c, int64_t ldc) {
  if (K == 0) clear(c, m * ldc);
  if (m <= P::FEW_ROWS) return dots<P>(a, lda, m, w, ldw, K, n, c, ldc);
  for (int64_t k = 0; k < K; k += DEPTH) {
    const int64_t depth = std::min(DEPTH, K - k);
    P::pack_transposed(panel, w + k, ldw, depth, n);
    for (int64_t i = 0; i < m; i += ROW_BLOCK)
      P::product(a + i * lda + k, lda, std::min(ROW_BLOCK, m - i), panel, depth, n, c + i * ldc, ldc, k == 0);
  }
}

// c (+)= a w, where w[K, n] is a weight as it lies in memory. `panel` has room for right_size(depth, n).
template <class P, class S>
inline void product_in_parts(const typename P::Left* a, int64_t lda, int64_t m, const S* w, int64_t ldw, int64_t K, int64_t n, typename P::Right* panel,
                             int64_t depth, typename P::Sum* c, int64_t ldc, bool fresh) {
  for (int64_t k = 0; k < K; k += depth) {
    P::pack(panel, w + k * ldw, ldw, std::min(depth, K - k), n);
    for (int64_t i = 0; i < m; i += ROW_BLOCK)
      P::product(a + i * lda + k, lda, std::min(ROW_BLOCK, m - i), panel, std::min(depth, K - k), n, c + i * ldc, ldc, fresh && k == 0);
  }
}

struct Task {
  int64_t expert, begin, end;  // columns
};

// Columns for one task: a packed panel of K rows fits into PANEL_BYTES, and there are enough tasks for the threads.
inline int64_t column_block(int64_t right_bytes_per_column, int64_t N, int64_t NR, int64_t threads, int64_t experts) {
  int64_t block = std::max<int64_t>(1, PANEL_BYTES / std::max<int64_t>(1, right_bytes_per_column) / NR) * NR;
  block = std::min(block, MAX_COLUMNS);
  while (block > NR && experts * ((N + block - 1) / block) < 4 * threads) block = round_up(block / 2, NR);
  return block;
}

inline std::vector<Task> column_tasks(const int64_t* rows, int64_t experts, int64_t N, int64_t block, bool also_empty) {
  std::vector<Task> tasks;
  for (int64_t e = 0; e < experts; e++)
    if (rows[e] || also_empty)
      for (int64_t j = 0; j < N; j += block) tasks.push_back({e, j, std::min(N, j + block)});
  return tasks;
}

inline std::vector<int64_t> starts_of(const int64_t* rows, int64_t groups) {
  std::vector<int64_t> starts(groups + 1, 0);
  for (int64_t g = 0; g < groups; g++) starts[g + 1] = starts[g] + rows[g];
  return starts;
}

// Rows that lie a multiple of 4096 bytes apart share eight places of a first cache; 2048 bytes, sixteen.
template <class T>
inline bool collide(int64_t length, int64_t bytes) {
  return length > 0 && length * int64_t(sizeof(T)) % bytes == 0;
}
// The distance of rows of K numbers, as a product needs them, that do not collide.
template <class P>
inline int64_t spread(int64_t K) {
  const int64_t length = round_up(K, P::K_ALIGN);
  return length + (collide<typename P::Left>(length, 2048) ? 64 / sizeof(typename P::Left) : 0);
}

// Rows as an operand of a product: themselves where they can be read as they are and do not collide, else a copy in the operand's type, with K rounded up by
// zeros.
template <class P>
struct Rows {
  using Left = typename P::Left;
  static constexpr int64_t COPY_COLUMNS = 512;
  const Left* at = nullptr;
  int64_t ld = 0;
  Buffer<Left> copied;

  // `place` is nullptr, or says which row of x stands where. `columns`: of the products' results; for few of them rows may collide.
  template <class S>
  static bool needs_copy(const S*, int64_t K, const int64_t* place, int64_t columns) {
    return place != nullptr || K % P::K_ALIGN != 0 || !std::is_same<S, Left>::value || (columns >= COPY_COLUMNS && collide<Left>(K, 4096));
  }
  template <class S>
  void prepare(const S* x, int64_t R, int64_t K, const int64_t* place, int64_t columns) {
    if (!needs_copy(x, K, place, columns)) {
      at = reinterpret_cast<const Left*>(x);
      ld = K;
      return;
    }
    ld = spread<P>(K);
    copied = allocate<Left>(R * ld);
    at = copied.get();
  }
  // To be called for every row, by whatever thread.
  template <class S>
  void fill(const S* x, int64_t K, const int64_t* place, int64_t per_row, int64_t r) {
    Left* to = copied.get() + r * ld;
    copy(to, x + (place == nullptr ? r : place[r] / per_row) * K, K);
    if (ld > K) clear(to + K, ld - K);
  }
};

}  // namespace NEOX_ISA
