// The hidden layer of the experts on a CPU, backward. Names: d.. is the gradient of ..; by place as in arrangement.h.
#pragma once

#include <type_traits>

#include "../include/activation.h"
#include "arrangement.h"

namespace NEOX_ISA {
namespace {

template <class S>
class Backward {
  using P = typename ProductFor<S>::type;
  using Sum = typename P::Sum;
  using Left = typename P::Left;
  using Right = typename P::Right;

 public:
  explicit Backward(const LoreBackward& given) : op(given), layer(given.layer), by(given.layer) {}

  void run() {
    prepare();
#pragma omp parallel num_threads(layer.threads) if (layer.threads > 1)
    {
      const S* x = static_cast<const S*>(op.x);
#pragma omp for schedule(static)
      for (int64_t r = 0; r < (rows.copied ? layer.R : 0); r++) rows.fill(x, layer.D, by.place, 1, r);
#pragma omp for schedule(static)
      for (int64_t n = 0; n < (lore_rows.copied ? by.choices : 0); n++) lore_rows.fill(x, layer.D, layer.order, layer.L, n);
#pragma omp for schedule(static)
      for (int64_t r = 0; r < layer.R; r++) through_activation(r);
      for (int p = 0; p < 1 + layer.gated; p++) {
        if (layer.projections[p].bias != nullptr) {
#pragma omp for schedule(static)
          for (int64_t e = 0; e < layer.E; e++) bias_gradient(p, e);
        }
        if (layer.projections[p].a != nullptr && by.several) {
#pragma omp for schedule(static)
          for (int64_t n = 0; n < by.choices; n++) copy(chosen[p].get() + n * ld, before[p].get() + layer.order[n] / layer.L * ld, ld);
        }
      }
#pragma omp for schedule(dynamic, 4)
      for (int64_t t = 0; t < int64_t(packs.size()); t++) pack_x(packs[t]);
#pragma omp for schedule(dynamic, 1)
      for (int64_t t = 0; t < int64_t(first_tasks.size()); t++) {
        const MixedTask task = first_tasks[t];
        if (task.of_memory) inner_gradients(lore_tasks[task.index]);
        else weight_gradient(weighted[task.index / weight_tasks.size()], weight_tasks[task.index % weight_tasks.size()]);
      }
#pragma omp for schedule(dynamic, 1)
      for (int64_t t = 0; t < int64_t(second_tasks.size()); t++) {
        const MixedTask task = second_tasks[t];
        if (task.of_memory) factor_gradient(entangled[task.index / factor_tasks.size()], factor_tasks[task.index % factor_tasks.size()]);
        else x_gradient(x_tasks[task.index]);
      }
    }
  }

 private:
  const LoreBackward& op;
  const LoreLayer& layer;
  const Arrangement by;
  Rows<P> rows, lore_rows;               // x by place, and by LoRE row
  int64_t ld = 0, rank[2] = {0, 0};
  Buffer<Left> before[2], chosen[2];     // gradients of the projections by place; the same by LoRE row where a row has several
  Buffer<Left> z[2], dz[2];              // pi u, and the gradient of u, by LoRE row
  std::vector<int> weighted, entangled;  // the projections that have weights, and those that have LoREs
  std::vector<RowTask> lore_tasks, factor_tasks, x_tasks;
  std::vector<Task> packs, weight_tasks;
  std::vector<MixedTask> first_tasks, second_tasks;  // the LoREs' among the weights' and among the rows'
  std::vector<int64_t> panels;           // where an expert's packed rows of x begin
  Buffer<Right> packed;
  int64_t block = 0, width = 0;

  static constexpr int64_t FACTOR_COLUMNS = 512, X_DEPTH = 256, AHEAD = 512;

  void prepare() {
    const S* x = static_cast<const S*>(op.x);
    rows.prepare(x, layer.R, layer.D, by.place, 0);
    if (by.several) lore_rows.prepare(x, by.choices, layer.D, layer.order, 0);
    ld = spread<P>(layer.F);
    for (int p = 0; p < 1 + layer.gated; p++) {
      const LoreProjection& projection = layer.projections[p];
      before[p] = allocate<Left>(layer.R * ld);
      if (projection.weight != nullptr) weighted.push_back(p);
      if (projection.a == nullptr) continue;
      entangled.push_back(p);
      rank[p] = round_up(projection.Q, P::K_ALIGN);
      z[p] = allocate<Left>(by.choices * rank[p]);
      dz[p] = allocate<Left>(by.choices * rank[p]);
      if (by.several) chosen[p] = allocate<Left>(by.choices * ld);
    }
    if (op.grad_pi != nullptr) std::memset(op.grad_pi, 0, by.choices * (layer.pi_is_double ? 8 : 4));
    if (by.has_lores) plan_lores();
    block = std::min<int64_t>(MAX_COLUMNS, round_up(layer.D, P::NR));
    while (block > P::NR && layer.E * ((layer.D + block - 1) / block) < 4 * layer.threads) block = round_up(block / 2, P::NR);
    width = block;
    x_tasks = row_tasks(by, layer.D, block, SUM_ROWS);
    if (!weighted.empty()) plan_weights();
    first_tasks = mixed(entangled.empty() ? 0 : lore_tasks.size(), weighted.size() * weight_tasks.size());
    second_tasks = mixed(entangled.size() * factor_tasks.size(), x_tasks.size());
  }

  void plan_weights() {
    panels.assign(layer.E + 1, 0);
    for (int64_t e = 0; e < layer.E; e++) panels[e + 1] = panels[e] + P::right_size(layer.rows[e], layer.D);
    packed = allocate<Right>(panels[layer.E]);
    packs = column_tasks(layer.rows, layer.E, layer.D, P::NR, false);
    weight_tasks = column_tasks(layer.rows, layer.E, layer.F, ROW_BLOCK, true);
  }

  void plan_lores() {
    for (int64_t g = 0; g < int64_t(by.lore_starts.size()) - 1; g++) {
      for (int64_t n = by.lore_starts[g]; n < by.lore_starts[g + 1]; n += TASK_ROWS)
        lore_tasks.push_back({g, n, std::min(by.lore_starts[g + 1], n + TASK_ROWS), 0, 0});
      for (int64_t j = 0; j < layer.F; j += FACTOR_COLUMNS) factor_tasks.push_back({g, 1, 0, j, std::min(layer.F, j + FACTOR_COLUMNS)});  // of B
      for (int64_t j = 0; j < layer.D; j += FACTOR_COLUMNS) factor_tasks.push_back({g, 0, 0, j, std::min(layer.D, j + FACTOR_COLUMNS)});  // of A
    }
  }

  // The gradients of the projections: dup = grad act(gate), dgate = grad up act'(gate); without a gate dup = grad act'(up).
  void through_activation(int64_t place) {
    const int64_t at = by.row_at(place) * layer.F, n = layer.F;
    const S* grad = static_cast<const S*>(op.grad) + at;
    const S *up = static_cast<const S*>(op.saved[0]), *gate = static_cast<const S*>(op.saved[1]);
    Left *dup = before[0].get() + place * ld, *dgate = layer.gated ? before[1].get() + place * ld : nullptr;
    const int64_t gap = (by.row_at(std::min(place + 1, layer.R - 1)) - by.row_at(place) - 1) * n;  // between this row and the next one
    with_activation<Sum>(layer.activation, [&](auto act) {
      for (int64_t j = 0; j < n; j += Stride<Sum>::width) {
        const int64_t later = j + AHEAD + (j + AHEAD < n ? 0 : gap);
        __builtin_prefetch(grad + later);
        if (up != nullptr) __builtin_prefetch(up + at + later);
        if (layer.gated) __builtin_prefetch(gate + at + later);
        __builtin_prefetch(dup + j + AHEAD, 1);
        if (layer.gated) __builtin_prefetch(dgate + j + AHEAD, 1);
        const auto g = take(grad + j, n - j);
        if (!layer.gated) {
          put(dup + j, up == nullptr ? g : g * act.slope(take(up + at + j, n - j)), n - j);
        } else {
          const auto v = take(gate + at + j, n - j);
          put(dup + j, g * act.value(v), n - j);
          put(dgate + j, g * take(up + at + j, n - j) * act.slope(v), n - j);
        }
      }
    });
    if (ld > n) {
      clear(dup + n, ld - n);
      if (dgate != nullptr) clear(dgate + n, ld - n);
    }
  }

  void bias_gradient(int p, int64_t e) {
    Sum* sums = scratch<Sum, 20>(layer.F);
    clear(sums, layer.F);
    for (int64_t r = by.starts[e]; r < by.starts[e + 1]; r++) {
      const Left* from = before[p].get() + r * ld;
      for (int64_t j = 0; j < layer.F; j++) sums[j] += widen(from[j]);
    }
    copy(static_cast<S*>(op.gradients[p].bias) + e * layer.F, sums, layer.F);
  }

  const Left* by_choice(int p) const { return by.several ? chosen[p].get() : before[p].get(); }
  const Rows<P>& x_by_choice() const { return by.several ? lore_rows : rows; }

  void inner_gradients(const RowTask& task) {
    for (int p : entangled) inner_gradient(p, task);
  }

  // dzr = dprojection B^T of one LoRE's rows; dpi = <dzr, u>; dz = pi dzr.
  void inner_gradient(int p, const RowTask& task) {
    const LoreProjection& projection = layer.projections[p];
    const int64_t Q = projection.Q, wide = round_up(Q, P::NR);
    const S* b = static_cast<const S*>(projection.b) + task.expert * Q * layer.F;
    Right* panel = scratch<Right, 21>(P::right_size(std::min(DEPTH, layer.F), Q));
    Sum* sums = scratch<Sum, 22>(TASK_ROWS * wide);
    product_transposed<P>(by_choice(p) + task.first * ld, ld, task.last - task.first, b, layer.F, layer.F, Q, panel, sums, wide);
    for (int64_t n = task.first; n < task.last; n++) {
      const Sum* dzr = sums + (n - task.first) * wide;
      const S* u = static_cast<const S*>(op.u[p]) + n * Q;
      const Sum pi = Sum(by.pi(n));
      Sum dpi = 0;
      for (int64_t q = 0; q < Q; q++) {
        const Sum value = widen(u[q]);
        dpi += dzr[q] * value;
        z[p][n * rank[p] + q] = convert<Left>(Sum(pi * value));
        dz[p][n * rank[p] + q] = convert<Left>(Sum(pi * dzr[q]));
      }
      if (rank[p] > Q) {
        clear(z[p].get() + n * rank[p] + Q, rank[p] - Q);
        clear(dz[p].get() + n * rank[p] + Q, rank[p] - Q);
      }
      if (op.grad_pi == nullptr) continue;
      if (layer.pi_is_double) static_cast<double*>(op.grad_pi)[layer.order[n]] += double(dpi);
      else static_cast<float*>(op.grad_pi)[layer.order[n]] += float(dpi);
    }
  }

  // dB = z^T dprojection, or dA = dz^T x, of one LoRE, for a block of columns.
  void factor_gradient(int p, const RowTask& task) {
    const bool of_b = task.first == 1;
    const int64_t g = task.expert, Q = layer.projections[p].Q, n = task.end - task.begin;
    const int64_t first = by.lore_starts[g], count = by.lore_starts[g + 1] - first, N = of_b ? layer.F : layer.D;
    S* out = static_cast<S*>(of_b ? op.gradients[p].b : op.gradients[p].a) + g * Q * N + task.begin;
    const Left* left = (of_b ? z[p] : dz[p]).get() + first * rank[p];
    const int64_t right_ld = of_b ? ld : x_by_choice().ld;
    const Left* right = (of_b ? by_choice(p) : x_by_choice().at) + first * right_ld + task.begin;
    const bool far = layer.G * Q * N * int64_t(sizeof(S)) > STREAM_BYTES;
    Left* turned = scratch<Left, 23>(P::turned_size(DEPTH, Q));
    Right* panel = scratch<Right, 24>(P::right_size(DEPTH, FACTOR_COLUMNS));
    if (count <= P::ONCE) {
      P::pack_turned(turned, left, rank[p], count, Q);
      P::pack(panel, right, right_ld, count, n);
      P::turned_once(turned, Q, panel, count, n, out, N, far);
    } else {
      const int64_t wide = round_up(FACTOR_COLUMNS, P::NR);
      Sum* sums = scratch<Sum, 25>(Q * wide);
      for (int64_t k = 0; k < count; k += DEPTH) {
        const int64_t depth = std::min(DEPTH, count - k);
        P::pack_turned(turned, left + k * rank[p], rank[p], depth, Q);
        P::pack(panel, right + k * right_ld, right_ld, depth, n);
        P::turned(turned, Q, panel, depth, 0, depth, n, sums, wide, k == 0);
      }
      put_rows(out, N, sums, wide, Q, n, far);
    }
    if (far) streamed();
  }

  // dx = dprojection W + dz A, over both projections.
  void x_gradient(const RowTask& task) {
    const int64_t m = task.last - task.first, n = task.end - task.begin;
    Right* panel = scratch<Right, 26>(P::right_size(X_DEPTH, block));
    Sum* sums = scratch<Sum, 27>(SUM_ROWS * width);
    bool fresh = layer.projections[0].weight != nullptr && layer.F > 0;
    if (!fresh) clear(sums, m * width);
    for (int p = 0; p < 1 + layer.gated; p++) {
      const LoreProjection& projection = layer.projections[p];
      if (projection.weight != nullptr) {
        const S* w = static_cast<const S*>(projection.weight) + task.expert * layer.F * layer.D + task.begin;
        product_in_parts<P>(before[p].get() + task.first * ld, ld, m, w, layer.D, layer.F, n, panel, X_DEPTH, sums, width, fresh);
        fresh &= layer.F == 0;
      }
      if (projection.a != nullptr) add_inner(p, task, sums);
    }
    const bool far = layer.R * layer.D * int64_t(sizeof(S)) > STREAM_BYTES;
    for (int64_t i = 0; i < m; i++) put_row(static_cast<S*>(op.grad_x) + by.row_at(task.first + i) * layer.D + task.begin, sums + i * width, n, far);
    if (far) streamed();
  }

  // sums += dz A
  void add_inner(int p, const RowTask& task, Sum* sums) {
    const LoreProjection& projection = layer.projections[p];
    const int64_t Q = projection.Q, n = task.end - task.begin;
    const S* a = static_cast<const S*>(projection.a);
    Right* panel = scratch<Right, 28>(P::right_size(Q, block));
    const auto times_a = [&](int64_t g, int64_t from, int64_t to, Sum* into) {
      P::pack(panel, a + g * Q * layer.D + task.begin, layer.D, Q, n);
      P::product(dz[p].get() + from * rank[p], rank[p], to - from, panel, Q, n, into, width, false);
    };
    if (!by.several) {
      by.strips(task.expert, task.first, task.last,
                [&](int64_t g, int64_t from, int64_t to) { times_a(g, from, to, sums + (from - task.first) * width); });
      return;
    }
    const int64_t first = by.first_choice(task.expert), last = by.starts[task.expert + 1] * layer.L;
    Sum* y = scratch<Sum, 29>((last - first) * width);
    clear(y, (last - first) * width);
    by.strips(task.expert, first, last, [&](int64_t g, int64_t from, int64_t to) { times_a(g, from, to, y + (from - first) * width); });
    for (int64_t r = task.first; r < task.last; r++)
      for (int64_t l = 0; l < layer.L; l++) {
        const Sum* from = y + (layer.inverse[r * layer.L + l] - first) * width;
        for (int64_t j = 0; j < n; j++) sums[(r - task.first) * width + j] += from[j];
      }
  }

  void pack_x(const Task& task) {
    Right* to = packed.get() + panels[task.expert] + P::right_size(layer.rows[task.expert], P::NR) * (task.begin / P::NR);
    P::pack(to, rows.at + by.starts[task.expert] * rows.ld + task.begin, rows.ld, layer.rows[task.expert], task.end - task.begin);
  }

  // dW = dprojection^T x, for a block of its rows.
  void weight_gradient(int p, const Task& task) {
    const int64_t e = task.expert, m = task.end - task.begin, count = layer.rows[e], wide = round_up(layer.D, P::NR);
    S* out = static_cast<S*>(op.gradients[p].weight) + (e * layer.F + task.begin) * layer.D;
    const bool far = layer.E * layer.F * layer.D * int64_t(sizeof(S)) > STREAM_BYTES;
    Left* turned = scratch<Left, 30>(P::turned_size(TURNED_DEPTH, ROW_BLOCK));
    const bool direct = std::is_same<S, Sum>::value && layer.D % P::NR == 0 && layer.D > SUM_COLUMNS;
    Sum* sums = direct ? reinterpret_cast<Sum*>(out) : scratch<Sum, 31>(ROW_BLOCK * wide);
    if (!count) clear(sums, m * wide);
    for (int64_t r = 0; r < count; r += TURNED_DEPTH) {
      const int64_t depth = std::min(TURNED_DEPTH, count - r);
      P::pack_turned(turned, before[p].get() + (by.starts[e] + r) * ld + task.begin, ld, depth, m);
      P::turned(turned, m, packed.get() + panels[e], count, r, depth, layer.D, sums, wide, r == 0);
    }
    if (direct) return;
    put_rows(out, layer.D, sums, wide, m, layer.D, far);
    if (far) streamed();
  }
};

}  // namespace
}  // namespace NEOX_ISA
