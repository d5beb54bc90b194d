// Rows into the order of their groups and back, on a CPU. Every index is checked before it is used.
#include "op.h"

#include <algorithm>

#include "counting_sort.h"

namespace NEOX_ISA {
namespace {

constexpr int64_t CHUNK = 1024;  // numbers of a row whose sums stay in the first cache

// to = scale * from
template <class S, class C>
inline void set_scaled(C* to, const S* from, C scale, int64_t n) {
  int64_t i = 0;
  for (; i + LANES<C> <= n; i += LANES<C>) store(to + i, load_wide(from + i) * all(scale));
  for (; i < n; i++) to[i] = widen(from[i]) * scale;
}

// to += scale * from
template <class S, class C>
inline void add_scaled(C* to, const S* from, C scale, int64_t n) {
  int64_t i = 0;
  for (; i + LANES<C> <= n; i += LANES<C>) store(to + i, load(to + i) + load_wide(from + i) * all(scale));
  for (; i < n; i++) to[i] += widen(from[i]) * scale;
}

// y = a * x + b * z, rounded once
template <class S, class C>
inline void pair_into(S* y, const S* x, C a, const S* z, C b, int64_t n) {
  int64_t i = 0;
  for (; i + LANES<C> <= n; i += LANES<C>) store_narrow(y + i, load_wide(x + i) * all(a) + load_wide(z + i) * all(b));
  for (; i < n; i++) y[i] = convert<S>(widen(x[i]) * a + widen(z[i]) * b);
}

// y = a * x, rounded once
template <class S, class C>
inline void scale_into(S* y, const S* x, C a, int64_t n) {
  int64_t i = 0;
  for (; i + LANES<C> <= n; i += LANES<C>) store_narrow(y + i, load_wide(x + i) * all(a));
  for (; i < n; i++) y[i] = convert<S>(widen(x[i]) * a);
}

// scaled = scale * a, and the dot product of a and b, in one pass
template <class S, class C>
inline C scale_and_dot(S* scaled, const S* a, const S* b, C scale, int64_t n) {
  Vec<C> sum = {};
  int64_t i = 0;
  for (; i + LANES<C> <= n; i += LANES<C>) {
    const Vec<C> left = load_wide(a + i);
    sum += left * load_wide(b + i);
    store_narrow(scaled + i, left * all(scale));
  }
  C total = 0;
  for (int lane = 0; lane < LANES<C>; lane++) total += sum[lane];
  for (; i < n; i++) {
    const C left = widen(a[i]);
    total += left * widen(b[i]);
    scaled[i] = convert<S>(left * scale);
  }
  return total;
}

// The first index outside of 0 to `end` - 1, or NONE_BAD.
int64_t first_outside(const int64_t* index, int64_t n, int64_t end) {
  uint64_t largest = 0;
  for (int64_t i = 0; i < n; i++) largest = std::max(largest, uint64_t(index[i]));  // a negative index is a large one
  if (n == 0 || largest < uint64_t(end)) return NONE_BAD;
  return std::find_if(index, index + n, [end](int64_t i) { return i < 0 || i >= end; }) - index;
}

// One row of y: the K rows of a token, where place R holds nothing.
template <class S>
void combine_token(const CombineRows& op, int64_t t) {
  using C = SumOf<S>;
  const S* rows = static_cast<const S*>(op.rows);
  const C* weight = op.weight == nullptr ? nullptr : static_cast<const C*>(op.weight) + t * op.K;
  const int64_t* place = op.inverse + t * op.K;
  S* y = static_cast<S*>(op.y) + t * op.D;
  const auto scale = [&](int64_t k) { return weight == nullptr ? C(1) : weight[k]; };
  if (op.K == 1 && place[0] < op.R) return scale_into(y, rows + place[0] * op.D, scale(0), op.D);
  if (op.K == 2 && place[0] < op.R && place[1] < op.R)
    return pair_into(y, rows + place[0] * op.D, scale(0), rows + place[1] * op.D, scale(1), op.D);
  alignas(64) C sums[CHUNK];
  for (int64_t begin = 0; begin < op.D; begin += CHUNK) {
    const int64_t n = std::min(CHUNK, op.D - begin);
    bool first = true;
    for (int64_t k = 0; k < op.K; k++) {
      if (place[k] >= op.R) continue;
      const S* row = rows + place[k] * op.D + begin;
      if (first) set_scaled(sums, row, scale(k), n);
      else add_scaled(sums, row, scale(k), n);
      first = false;
    }
    if (first) clear(sums, n);
    copy(y + begin, sums, n);
  }
}

template <class S>
void combine(const CombineRows& op) {
#pragma omp parallel for num_threads(op.threads) if (op.threads > 1) schedule(static)
  for (int64_t t = 0; t < op.T; t++) combine_token<S>(op, t);
}

template <class S>
void backward(const CombineBackward& op) {
  using C = SumOf<S>;
  const S *grad = static_cast<const S*>(op.grad), *rows = static_cast<const S*>(op.rows);
  const C* weight = static_cast<const C*>(op.weight);
  S* grad_rows = static_cast<S*>(op.grad_rows);
  C* grad_weight = static_cast<C*>(op.grad_weight);
  if (op.T > 0 && op.K > 0) clear(grad_weight, op.T * op.K);
#pragma omp parallel for num_threads(op.threads) if (op.threads > 1) schedule(static)
  for (int64_t r = 0; r < op.R; r++) {
    const int64_t choice = op.order[r], at = r * op.D;
    grad_weight[choice] = scale_and_dot(grad_rows + at, grad + (op.K == 1 ? choice : choice / op.K) * op.D, rows + at, weight[choice], op.D);
  }
}

}  // namespace

Sorted sort_by_group(const SortByGroup& op) {
  const int64_t groups = op.G + (op.padded ? 1 : 0);
  const int64_t bad = first_outside(op.group, op.N, groups);
  if (bad != NONE_BAD) return {-1, op.group[bad]};
  CountingSort sort(groups, op.threads);
  const auto rows = allocate<int64_t>(groups);
  int64_t routed = op.N;
#pragma omp parallel num_threads(op.threads) if (op.threads > 1)
  {
#pragma omp for schedule(static, 1)
    for (int block = 0; block < op.threads; block++) {
      int64_t* counts = sort.counts(block);
      for (int64_t i = block_start(op.N, block, op.threads); i < block_start(op.N, block + 1, op.threads); i++) counts[op.group[i]]++;
    }
#pragma omp single
    {
      sort.start(rows.get());
      std::copy_n(rows.get(), op.G, op.rows);
      if (op.padded) routed -= rows[op.G];
    }
#pragma omp for schedule(static, 1)
    for (int block = 0; block < op.threads; block++) {
      for (int64_t i = block_start(op.N, block, op.threads); i < block_start(op.N, block + 1, op.threads); i++) {
        const int64_t place = sort.place(block, op.group[i]);
        op.inverse[i] = std::min(place, routed);
        if (place < routed) op.order[place] = i;
      }
    }
  }
  return {routed, 0};
}

int64_t gather_rows(const GatherRows& op) {
  const int64_t bad = first_outside(op.order, op.R, op.T * op.K);
  if (bad != NONE_BAD) return bad;
  if (op.row_bytes == 0) return NONE_BAD;
  const char* x = static_cast<const char*>(op.x);
  char* rows = static_cast<char*>(op.rows);
#pragma omp parallel for num_threads(op.threads) if (op.threads > 1) schedule(static)
  for (int64_t r = 0; r < op.R; r++) {
    const int64_t token = op.K == 1 ? op.order[r] : op.order[r] / op.K;
    std::memcpy(rows + r * op.row_bytes, x + token * op.row_bytes, op.row_bytes);
  }
  return NONE_BAD;
}

int64_t combine_rows(const CombineRows& op) {
  const int64_t bad = first_outside(op.inverse, op.T * op.K, op.R + (op.R < op.T * op.K ? 1 : 0));
  if (bad != NONE_BAD) return bad;
  switch (op.dtype) {
    case Dtype::float32: combine<float>(op); break;
    case Dtype::float64: combine<double>(op); break;
    case Dtype::bfloat16: combine<bf16>(op); break;
  }
  return NONE_BAD;
}

int64_t combine_backward(const CombineBackward& op) {
  const int64_t bad = first_outside(op.order, op.R, op.T * op.K);
  if (bad != NONE_BAD) return bad;
  switch (op.dtype) {
    case Dtype::float32: backward<float>(op); break;
    case Dtype::float64: backward<double>(op); break;
    case Dtype::bfloat16: backward<bf16>(op); break;
  }
  return NONE_BAD;
}

}  // namespace NEOX_ISA
