// Routing on a CPU: softmax, choice, weights, counts and the order by key in one call.
#include "op.h"

#include <algorithm>

#include "../include/activation.h"
#include "../permute/counting_sort.h"

namespace NEOX_ISA {
namespace {

// NaN counts as the largest number, as in torch.topk.
struct NanFirst {
  template <class T>
  bool operator()(T a, T b) const {
    return a > b || (a != a && b == b);
  }
};
struct Larger {
  template <class T>
  bool operator()(T a, T b) const {
    return a > b;
  }
};

// The K first of a row in the order of `above`; of equal ones the one with the lowest number.
template <class Above, class T>
inline void choose(const T* logit, int64_t C, int64_t K, int64_t* choice) {
  const Above above;
  if (K == 1) {
    int64_t best = 0;
    for (int64_t c = 1; c < C; c++) best = above(logit[c], logit[best]) ? c : best;
    *choice = best;
    return;
  }
  for (int64_t c = 0; c < C; c++) {
    int64_t place = std::min(c, K);
    if (place == K && !above(logit[c], logit[choice[--place]])) continue;
    for (; place > 0 && above(logit[c], logit[choice[place - 1]]); place--) choice[place] = choice[place - 1];
    choice[place] = c;
  }
}

// x[i] = e^(x[i])
inline void exponentials(float* x, int64_t n) {
  int64_t i = 0;
  for (; i + LANES<float> <= n; i += LANES<float>) store(x + i, exp_(load(x + i)));
  if (i == n) return;
  float rest[LANES<float>] = {};
  std::memcpy(rest, x + i, (n - i) * sizeof(float));
  store(rest, exp_(load(rest)));
  std::memcpy(x + i, rest, (n - i) * sizeof(float));
}
inline void exponentials(double* x, int64_t n) {
  for (int64_t i = 0; i < n; i++) x[i] = std::exp(x[i]);
}

// Sums of one thread.
struct Sums {
  double* total;  // [P, C]
  double entropy = 0;
  int64_t not_numbers = 0;
};

constexpr int64_t TILE = 64;  // rows whose exponentials are computed together: vectors are full however few experts there are

// Softmax of up to TILE rows. Entropies are log(sum) - sum of p * (logit - largest).
template <class T>
void softmax(const Route& op, int64_t begin, int64_t end, Sums& sums) {
  const int64_t C = op.C;
  const T* logit = static_cast<const T*>(op.logit);
  T *probability = static_cast<T*>(op.probability), *logsumexp = static_cast<T*>(op.logsumexp);
  T largest[TILE];
  for (int64_t n = begin; n < end; n++) {
    const T* x = logit + n * C;
    T most = x[0];
    for (int64_t c = 1; c < C; c++) most = x[c] > most ? x[c] : most;
    largest[n - begin] = most;
    for (int64_t c = 0; c < C; c++) probability[n * C + c] = x[c] - most;
  }
  exponentials(probability + begin * C, (end - begin) * C);
  for (int64_t n = begin; n < end; n++) {
    const T *x = logit + n * C, most = largest[n - begin];
    T* p = probability + n * C;
    T sum = 0, spread = 0;
    for (int64_t c = 0; c < C; c++) sum += p[c];
    const T share = 1 / sum, log_sum = std::log(sum);
    for (int64_t c = 0; c < C; c++) {
      p[c] *= share;
      spread += p[c] > 0 ? p[c] * (x[c] - most) : T(0);
    }
    logsumexp[n] = most + log_sum;
    sums.entropy += log_sum - spread;
    sums.not_numbers += sum != sum;
  }
}

// Walks over rows that are sorted by parent.
class Parents {
 public:
  Parents(const int64_t* rows, int64_t n) : rows_(rows) {
    while (n >= end_ + rows_[parent_]) end_ += rows_[parent_++];
  }
  // Rows are asked for in order.
  int64_t of(int64_t n) {
    while (n >= end_ + rows_[parent_]) end_ += rows_[parent_++];
    return parent_;
  }

 private:
  const int64_t* rows_;
  int64_t parent_ = 0, end_ = 0;  // rows before this parent
};

// Softmax, choice, weights and counts of the rows from `begin` to `end`.
template <class T>
void decide(const Route& op, int64_t begin, int64_t end, int64_t* counts, Sums& sums) {
  if (begin == end) return;
  Parents parents(op.rows_P, begin);
  for (int64_t tile = begin; tile < end; tile += TILE) {
    const int64_t tile_end = std::min(end, tile + TILE);
    softmax<T>(op, tile, tile_end, sums);
    for (int64_t n = tile; n < tile_end; n++) {
      const T* p = static_cast<const T*>(op.probability) + n * op.C;
      T* weight = static_cast<T*>(op.weight) + n * op.K;
      int64_t* choice = op.choice + n * op.K;
      const T* logit = static_cast<const T*>(op.logit) + n * op.C;
      if (p[0] == p[0]) choose<Larger>(logit, op.C, op.K, choice);
      else choose<NanFirst>(logit, op.C, op.K, choice);
      T chosen = 0;
      for (int64_t k = 0; k < op.K; k++) chosen += p[choice[k]];
      const T scale = op.normalize ? T(op.scale) / chosen : T(op.scale);
      const int64_t key = parents.of(n) * op.C;
      for (int64_t k = 0; k < op.K; k++) {
        weight[k] = scale * p[choice[k]];
        counts[key + choice[k]]++;
      }
      for (int64_t c = 0; c < op.C; c++) sums.total[key + c] += p[c];
    }
  }
}

void place(const Route& op, int block, CountingSort& sort) {
  const int64_t begin = block_start(op.N, block, op.threads), end = block_start(op.N, block + 1, op.threads);
  if (begin == end) return;
  Parents parents(op.rows_P, begin);
  for (int64_t n = begin; n < end; n++) {
    const int64_t key = parents.of(n) * op.C;
    for (int64_t i = n * op.K; i < (n + 1) * op.K; i++) {
      const int64_t at = sort.place(block, key + op.choice[i]);
      op.inverse[i] = at;
      op.order[at] = i;
    }
  }
}

// The number of rows that have no probabilities.
template <class T>
int64_t finish(const Route& op, const Sums* sums) {
  T* total = static_cast<T*>(op.total);
  for (int64_t i = 0; i < op.P * op.C; i++) {
    double sum = 0;
    for (int block = 0; block < op.threads; block++) sum += sums[block].total[i];
    total[i] = T(sum);
  }
  double entropy = 0;
  int64_t not_numbers = 0;
  for (int block = 0; block < op.threads; block++) {
    entropy += sums[block].entropy;
    not_numbers += sums[block].not_numbers;
  }
  *static_cast<T*>(op.entropy) = T(entropy / std::max<int64_t>(1, op.N));
  return not_numbers;
}

template <class T>
int64_t routed(const Route& op) {
  const int64_t keys = op.P * op.C;
  CountingSort sort(keys, op.threads);
  const auto totals = allocate<double>(keys * op.threads);
  clear(totals.get(), keys * op.threads);
  const auto sums = allocate<Sums>(op.threads);
  int64_t not_numbers = 0;
#pragma omp parallel num_threads(op.threads) if (op.threads > 1)
  {
#pragma omp for schedule(static, 1)
    for (int block = 0; block < op.threads; block++) {
      Sums own{totals.get() + block * keys};
      decide<T>(op, block_start(op.N, block, op.threads), block_start(op.N, block + 1, op.threads), sort.counts(block), own);
      sums[block] = own;
    }
#pragma omp single
    {
      sort.start(op.rows_G);
      not_numbers = finish<T>(op, sums.get());
    }
#pragma omp for schedule(static, 1)
    for (int block = 0; block < op.threads; block++) place(op, block, sort);
  }
  return not_numbers;
}

template <class T>
inline const T* row_of(const void* table, int64_t row, int64_t width) {
  return table == nullptr ? nullptr : static_cast<const T*>(table) + row * width;
}

// With p the probabilities of a row, w = scale * p (divided by the sum of the chosen p) and L = logsumexp:
//   dp = grad of p + grad of the totals + what w passes on;  grad of logit = p * (dp - sum of dp * p + dL)
template <class T>
void backward_row(const RouteBackward& op, int64_t n, int64_t parent) {
  const T *p = row_of<T>(op.probability, n, op.C), *direct = row_of<T>(op.grad_probability, n, op.C);
  const T *total = row_of<T>(op.grad_total, parent, op.C), *grad_weight = row_of<T>(op.grad_weight, n, op.K);
  const int64_t* choice = op.choice + n * op.K;
  T* out = static_cast<T*>(op.grad_logit) + n * op.C;
  for (int64_t c = 0; c < op.C; c++) out[c] = (direct == nullptr ? T(0) : direct[c]) + (total == nullptr ? T(0) : total[c]);
  if (grad_weight != nullptr) {
    T scale = T(op.scale), mean = 0;
    if (op.normalize) {
      T chosen = 0;
      for (int64_t k = 0; k < op.K; k++) {
        chosen += p[choice[k]];
        mean += grad_weight[k] * p[choice[k]];
      }
      scale /= chosen;
      mean /= chosen;
    }
    for (int64_t k = 0; k < op.K; k++) out[choice[k]] += scale * (grad_weight[k] - mean);
  }
  T shift = op.grad_logsumexp == nullptr ? T(0) : -static_cast<const T*>(op.grad_logsumexp)[n];
  for (int64_t c = 0; c < op.C; c++) shift += out[c] * p[c];
  for (int64_t c = 0; c < op.C; c++) out[c] = p[c] * (out[c] - shift);
}

template <class T>
void backward(const RouteBackward& op) {
#pragma omp parallel for num_threads(op.threads) if (op.threads > 1) schedule(static, 1)
  for (int block = 0; block < op.threads; block++) {
    const int64_t begin = block_start(op.N, block, op.threads), end = block_start(op.N, block + 1, op.threads);
    if (begin == end) continue;
    Parents parents(op.rows_P, begin);
    for (int64_t n = begin; n < end; n++) backward_row<T>(op, n, parents.of(n));
  }
}

}  // namespace

int64_t route(const Route& op) { return op.dtype == Dtype::float64 ? routed<double>(op) : routed<float>(op); }

void route_backward(const RouteBackward& op) { op.dtype == Dtype::float64 ? backward<double>(op) : backward<float>(op); }

// False if a choice is out of range.
bool choice_statistics(ChoiceStatistics& op) {
  const auto seen_at = allocate<int64_t>(op.E);  // the last token that used the expert, counted over all sequences
  std::fill_n(seen_at.get(), op.E, int64_t(-1));
  op.used = op.changed = 0;
  int64_t before = 0;
  for (int64_t t = 0; t < op.T; t++) {
    int64_t own = 0, shared = 0;
    for (int64_t k = 0; k < op.K; k++) {
      const int64_t e = op.choice[t * op.K + k];
      if (e < 0 || e > op.E) return false;
      if (e == op.E || seen_at[e] == t) continue;
      own++;
      shared += t > 0 && seen_at[e] == t - 1;
      seen_at[e] = t;
    }
    if (t % op.length) op.changed += own + before - 2 * shared;
    op.used += own;
    before = own;
  }
  return true;
}

}  // namespace NEOX_ISA
