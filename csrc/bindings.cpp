// The module megatron.kernels.built: every operation, in the instruction set that megatron/kernels/compiled.py chooses.
//
// Arguments are addresses, sizes and formats; megatron/kernels/*/compiled.py checks the tensors they come from. Values in memory (counts, choices)
// are checked here, before an operation runs: it raises ValueError.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "decode_bindings.h"
#include "include/operations.h"
#include "include/processor.h"
#include "memory/heap.h"
#include "self_check/self_check.h"

namespace py = pybind11;

// Written when the build was checked (csrc/build.py): the sets that were compared with the definitions in Python, and those that differed.
extern const char* const CHECKED_SETS[];
extern const char* const REFUSED_SETS[];

namespace {

std::vector<std::string> refused;

bool usable(const std::string& set) { return runs_here(set) && std::find(refused.begin(), refused.end(), set) == refused.end(); }

const InstructionSet& named(const std::string& name) {
  for (const InstructionSet& set : SETS)
    if (set.name == name) return set;
  throw std::invalid_argument("the kernels are not compiled for " + name);
}

const InstructionSet* current = &SETS[0];
const InstructionSet* without_pairs = current;  // for formats that a set with 16-bit products does not hold

void use(const std::string& name) {
  const InstructionSet& found = named(name);
  if (!runs_here(name)) throw std::invalid_argument("this processor has no " + name);
  if (!usable(name)) throw std::invalid_argument(name + " is refused: it computes something else than the definition");
  current = without_pairs = &found;
  if (has_pairs(name))
    for (const InstructionSet& set : SETS)
      if (!has_pairs(set.name) && usable(set.name)) without_pairs = &set;
}

void refuse(const std::string& name) {
  if (name == SETS[0].name) throw std::invalid_argument(name + " cannot be refused: nothing would be left");
  refused.push_back(named(name).name);
  if (current->name == name || without_pairs->name == name) use(SETS[0].name);
}

std::vector<std::string> compiled_sets() {
  std::vector<std::string> names;
  for (const InstructionSet& set : SETS) names.push_back(set.name);
  return names;
}

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const InstructionSet& set : SETS)
    if (usable(set.name)) names.push_back(set.name);
  return names;
}

std::vector<std::string> listed(const char* const* names) {
  std::vector<std::string> all;
  for (; *names != nullptr; names++) all.push_back(*names);
  return all;
}

std::string difference(const std::string& name) {
  const InstructionSet& found = named(name);
  if (!runs_here(name)) throw std::invalid_argument("this processor has no " + name);
  return self_check::difference(found);
}

const InstructionSet& set_for(Dtype dtype) { return dtype == Dtype::bfloat16 ? *current : *without_pairs; }

template <class T>
const T* at(uintptr_t address) {
  return reinterpret_cast<const T*>(address);
}
void* out(uintptr_t address) { return reinterpret_cast<void*>(address); }

// Counts of groups: not negative, summing to the rows that there are.
void check_counts(const int64_t* rows, int64_t groups, int64_t total) {
  int64_t left = total;
  for (int64_t g = 0; g < groups; g++) {
    if (rows[g] < 0) throw std::invalid_argument("row counts must not be negative, but group " + std::to_string(g) + " has " + std::to_string(rows[g]));
    if (rows[g] > left) left = -1;  // beyond the rows: never added up, so it cannot overflow
    if (left < 0) break;
    left -= rows[g];
  }
  if (left != 0) {
    std::string sum = left < 0 ? "more than " + std::to_string(total) : std::to_string(total - left);
    throw std::invalid_argument("row counts sum to " + sum + ", but there are " + std::to_string(total) + " rows; every row belongs to exactly one group");
  }
}

// Which LoRE row stands where: every place below `choices`, sorted by LoRE as the counts say, and with the expert's own LoREs.
void check_order(const int64_t* order, int64_t choices) {
  for (int64_t n = 0; n < choices; n++)
    if (order[n] < 0 || order[n] >= choices)
      throw std::invalid_argument("the order holds " + std::to_string(order[n]) + ", but there are " + std::to_string(choices) + " choices");
}

using Sizes = std::vector<int64_t>;

void matmul(uintptr_t y, uintptr_t x, uintptr_t weight, uintptr_t rows, const Sizes& sizes, bool transposed, int dtype, int threads) {
  const GroupedMatmul op{at<void>(x), at<void>(weight), out(y), at<int64_t>(rows), sizes.at(0), sizes.at(1), sizes.at(2), sizes.at(3), transposed, Dtype(dtype), threads};
  check_counts(op.rows, op.E, op.R);
  set_for(op.dtype).grouped_matmul(op);
}

void outer(uintptr_t result, uintptr_t x, uintptr_t y, uintptr_t rows, const Sizes& sizes, int dtype, int threads) {
  const GroupedOuter op{at<void>(x), at<void>(y), out(result), at<int64_t>(rows), sizes.at(0), sizes.at(1), sizes.at(2), sizes.at(3), Dtype(dtype), threads};
  check_counts(op.rows, op.E, op.R);
  set_for(op.dtype).grouped_outer(op);
}

LoreLayer lore_layer(const Sizes& sizes, const std::vector<uintptr_t>& parts, const std::vector<uintptr_t>& choice, int activation, int dtype, int threads) {
  LoreLayer layer{};
  layer.E = sizes.at(0), layer.R = sizes.at(1), layer.D = sizes.at(2), layer.F = sizes.at(3), layer.G = sizes.at(4), layer.L = sizes.at(5);
  for (int p = 0; p < 2; p++) {
    LoreProjection& projection = layer.projections[p];
    projection.weight = at<void>(parts.at(p * 4)), projection.a = at<void>(parts.at(p * 4 + 1)), projection.b = at<void>(parts.at(p * 4 + 2));
    projection.bias = at<void>(parts.at(p * 4 + 3)), projection.Q = sizes.at(6 + p);
  }
  layer.gated = layer.projections[1].weight != nullptr || layer.projections[1].a != nullptr;
  layer.rows = at<int64_t>(choice.at(0)), layer.pi = at<void>(choice.at(1)), layer.order = at<int64_t>(choice.at(2));
  layer.inverse = at<int64_t>(choice.at(3)), layer.lore_rows = at<int64_t>(choice.at(4));
  layer.activation = activation, layer.dtype = Dtype(dtype), layer.pi_is_double = sizes.at(8) != 0, layer.chosen = sizes.at(9) != 0, layer.threads = threads;
  check_counts(layer.rows, layer.E, layer.R);
  if (layer.chosen) {
    check_counts(layer.lore_rows, layer.G, layer.R * layer.L);
    check_order(layer.order, layer.R * layer.L);
    check_order(layer.inverse, layer.R * layer.L);
    const int64_t per_expert = layer.E ? layer.G / layer.E : 0;
    for (int64_t e = 0, g = 0; e < layer.E; e++) {
      int64_t own = 0;
      for (int64_t m = 0; m < per_expert; m++) own += layer.lore_rows[g++];
      if (own != layer.rows[e] * layer.L)
        throw std::invalid_argument("expert " + std::to_string(e) + " has " + std::to_string(layer.rows[e]) + " rows, but its LoREs have " + std::to_string(own) +
                                    " of the " + std::to_string(layer.rows[e] * layer.L) + " that these choose");
    }
    for (int64_t n = 0, e = 0, end = layer.E ? layer.rows[0] : 0; n < layer.R * layer.L; n++) {
      while (n >= end * layer.L) end += layer.rows[++e];
      const int64_t row = layer.order[n] / layer.L;
      if (row >= end || row < end - layer.rows[e])
        throw std::invalid_argument("the order puts row " + std::to_string(row) + " among the rows of expert " + std::to_string(e) + ", which it does not belong to");
    }
  }
  return layer;
}

// ---- rows and routes: addresses and sizes in the order of their structs

using Addresses = std::vector<uintptr_t>;
int64_t* integers(uintptr_t address) { return reinterpret_cast<int64_t*>(address); }

std::pair<int64_t, int64_t> sort_by_group(const Addresses& a, const Sizes& n, bool padded, int threads) {
  const Sorted sorted = current->sort_by_group({at<int64_t>(a.at(0)), integers(a.at(1)), integers(a.at(2)), integers(a.at(3)), n.at(0), n.at(1), padded, threads});
  return {sorted.rows, sorted.bad_group};
}

int64_t gather_rows(const Addresses& a, const Sizes& n, int threads) {
  return current->gather_rows({at<void>(a.at(0)), at<int64_t>(a.at(1)), out(a.at(2)), n.at(0), n.at(1), n.at(2), n.at(3), threads});
}

int64_t combine_rows(const Addresses& a, const Sizes& n, int dtype, int threads) {
  return current->combine_rows(
      {at<void>(a.at(0)), at<int64_t>(a.at(1)), at<void>(a.at(2)), out(a.at(3)), n.at(0), n.at(1), n.at(2), n.at(3), Dtype(dtype), threads});
}

int64_t combine_backward(const Addresses& a, const Sizes& n, int dtype, int threads) {
  return current->combine_backward({at<void>(a.at(0)), at<void>(a.at(1)), at<int64_t>(a.at(2)), at<void>(a.at(3)), out(a.at(4)), out(a.at(5)),
                                    n.at(0), n.at(1), n.at(2), n.at(3), Dtype(dtype), threads});
}

Selected selected(const Sizes& n, double scale, bool normalize, int dtype, int threads) {
  return {n.at(0), n.at(1), n.at(2), n.at(3), scale, normalize, Dtype(dtype), threads};
}

int64_t route(const Addresses& a, const Sizes& n, double scale, bool normalize, int dtype, int threads) {
  Route op{selected(n, scale, normalize, dtype, threads), at<void>(a.at(0)), at<int64_t>(a.at(1)), out(a.at(2)), integers(a.at(3)), out(a.at(4)), out(a.at(5)),
                 out(a.at(6)), out(a.at(7)), integers(a.at(8)), integers(a.at(9)), integers(a.at(10))};
  if (op.rows_P == nullptr) op.rows_P = &op.N;
  check_counts(op.rows_P, op.P, op.N);
  return current->route(op);
}

void route_backward(const Addresses& a, const Sizes& n, double scale, bool normalize, int dtype, int threads) {
  RouteBackward op{selected(n, scale, normalize, dtype, threads), at<void>(a.at(0)), at<void>(a.at(1)), at<void>(a.at(2)), at<void>(a.at(3)), at<void>(a.at(4)),
                         at<int64_t>(a.at(5)), at<int64_t>(a.at(6)), out(a.at(7))};
  if (op.rows_P == nullptr) op.rows_P = &op.N;
  check_counts(op.rows_P, op.P, op.N);
  for (int64_t i = 0; i < op.N * op.K; i++)
    if (op.choice[i] < 0 || op.choice[i] >= op.C) throw std::invalid_argument("route: there is no candidate " + std::to_string(op.choice[i]));
  current->route_backward(op);
}

// (changed, used); (-1, 0) if a choice is out of range.
std::pair<int64_t, int64_t> choice_statistics(uintptr_t choice, const Sizes& n) {
  ChoiceStatistics op{at<int64_t>(choice), n.at(0), n.at(1), n.at(2), n.at(3), 0, 0};
  if (!current->choice_statistics(op)) return {-1, 0};
  return {op.changed, op.used};
}

// ---- attention and Adam

// Address and three strides of a tensor [batch, heads, length, dim].
attention::Heads heads_of(const Sizes& tensor) { return {out(tensor.at(0)), tensor.at(1), tensor.at(2), tensor.at(3)}; }

// Gradients are given in the backward: of the output, and the three that are computed.
void attend(const Sizes& sizes, double scale, int dtype, int threads, const std::vector<Sizes>& tensors, const Sizes& angles, uintptr_t log_sum) {
  attention::Problem op{};
  op.batch = sizes.at(0), op.heads = sizes.at(1), op.kv_heads = sizes.at(2), op.length = sizes.at(3), op.dim = sizes.at(4);
  op.scale = float(scale), op.is_bf16 = Dtype(dtype) == Dtype::bfloat16, op.threads = threads;
  op.query = heads_of(tensors.at(0)), op.key = heads_of(tensors.at(1)), op.value = heads_of(tensors.at(2)), op.output = heads_of(tensors.at(3));
  op.angles = {at<float>(angles.at(0)), at<float>(angles.at(1)), angles.at(2), angles.at(3)};
  op.log_sum = static_cast<float*>(out(log_sum));
  const InstructionSet& set = set_for(Dtype(dtype));
  if (tensors.size() == 4) {
    set.attention_forward(op);
  } else {
    set.attention_backward(op, {heads_of(tensors.at(4)), heads_of(tensors.at(5)), heads_of(tensors.at(6)), heads_of(tensors.at(7))});
  }
}

// `is_bf16`: 0 or 1 for each tensor.
adam::Gradients gradients_of(const Sizes& sizes, const Sizes& addresses, const Sizes& is_bf16) {
  if (addresses.size() != sizes.size() || is_bf16.size() != sizes.size()) throw std::invalid_argument("sizes, addresses and formats of gradients differ in number");
  return {int64_t(sizes.size()), sizes.data(), addresses.data(), is_bf16.data()};
}

double gradient_norm(const Sizes& sizes, const Sizes& addresses, const Sizes& is_bf16, int threads) {
  return set_for(Dtype::float32).gradient_norm(gradients_of(sizes, addresses, is_bf16), threads);
}

// `places`: the addresses of weights, averages, squares and of what takes the rounded weights (0: nothing does).
void adam_update(const Sizes& sizes, const Sizes& addresses, const Sizes& is_bf16, const std::vector<Sizes>& places, const std::vector<double>& steps,
                 const std::vector<double>& settings, bool decoupled, int threads) {
  const adam::Gradients gradients = gradients_of(sizes, addresses, is_bf16);
  if (steps.size() != sizes.size()) throw std::invalid_argument("there must be one step for each tensor");
  for (int p = 0; p < 4; p++)
    if (places.at(p).size() != sizes.size()) throw std::invalid_argument("there must be one address for each tensor");
  const adam::Settings given{settings.at(0), settings.at(1), settings.at(2), settings.at(3), settings.at(4), decoupled, settings.at(5)};
  set_for(Dtype::float32).adam_update({gradients, places[0].data(), places[1].data(), places[2].data(), places[3].data(), steps.data(), given}, threads);
}

// x, scale, inverse; then y, or grad, grad_x and grad_scale.
RmsNorm rms_norm(const std::vector<uintptr_t>& a, const Sizes& sizes, int dtype, int threads) {
  return {at<void>(a.at(0)), at<void>(a.at(1)), static_cast<float*>(out(a.at(2))), sizes.at(0), sizes.at(1), sizes.at(2), Dtype(dtype) == Dtype::bfloat16, threads};
}

void rms_norm_forward(const std::vector<uintptr_t>& a, const Sizes& sizes, double epsilon, int dtype, int threads) {
  set_for(Dtype(dtype)).rms_norm_forward({rms_norm(a, sizes, dtype, threads), out(a.at(3)), epsilon});
}

void rms_norm_backward(const std::vector<uintptr_t>& a, const Sizes& sizes, int dtype, int threads) {
  set_for(Dtype(dtype)).rms_norm_backward({rms_norm(a, sizes, dtype, threads), at<void>(a.at(3)), out(a.at(4)), out(a.at(5))});
}

// Hidden states, weight, labels, scale; then losses and the gradients of hidden states and weight (0: not wanted). Sizes: T, D, V, tokens of a chunk.
void linear_cross_entropy(const std::vector<uintptr_t>& a, const Sizes& sizes, int dtype, int threads) {
  const LinearCrossEntropy op{at<void>(a.at(0)), at<void>(a.at(1)), at<int64_t>(a.at(2)), at<void>(a.at(3)), out(a.at(4)), out(a.at(5)), out(a.at(6)),
                              sizes.at(0), sizes.at(1), sizes.at(2), sizes.at(3), Dtype(dtype), threads};
  for (int64_t t = 0; t < op.T; t++)
    if (op.labels[t] < 0 || op.labels[t] >= op.V)
      throw std::invalid_argument("the label of token " + std::to_string(t) + " is " + std::to_string(op.labels[t]) + ", but the vocabulary has " +
                                  std::to_string(op.V) + " tokens");
  set_for(op.dtype).linear_cross_entropy(op);
}

}  // namespace

PYBIND11_MODULE(built, m) {
  m.attr("source_digest") = SOURCE_DIGEST;
  refused = listed(REFUSED_SETS);
  m.attr("checked_sets") = listed(CHECKED_SETS);
  m.def("compiled_sets", &compiled_sets, "All, best last; emulated ones at the end.");
  m.def("instruction_sets", &instruction_sets, "Those that this processor has and that are not refused, best last.");
  m.def("instruction_set", [] { return current->name; });
  m.def("use_instruction_set", &use);
  m.def("refused_sets", [] { return refused; });
  m.def("refuse_instruction_set", &refuse, "It is not used in this process again.");
  m.def("difference", &difference, "What a set computes differently from `generic`, tried in a process of its own; empty: nothing.");
  m.def("use_heap", &heap::use, "Whether large blocks from now on come from the heap for them; returns whether they did before.");
  m.def("trim_heap", &heap::trim, "Returns the memory of its free blocks to the system.");
  m.def("heap_used", &heap::used, "Bytes of its blocks that were not put back.");
  m.def("heap_functions", [] { return std::pair<uintptr_t, uintptr_t>(uintptr_t(&heap::get), uintptr_t(&heap::put)); }, "The addresses of `get` and `put`.");
  using Free = py::call_guard<py::gil_scoped_release>;
  m.def("attention_forward", &attend, Free());
  m.def("attention_backward", &attend, Free());
  m.def("gradient_norm", &gradient_norm, Free());
  m.def("adam_update", &adam_update, Free());
  m.def("rms_norm_forward", &rms_norm_forward, Free());
  m.def("rms_norm_backward", &rms_norm_backward, Free());
  m.def("linear_cross_entropy", &linear_cross_entropy, Free());
  m.def("grouped_matmul", &matmul, Free());
  m.def("grouped_outer", &outer, Free());
  m.def("lore_forward", [](const Sizes& sizes, const std::vector<uintptr_t>& parts, const std::vector<uintptr_t>& choice, int activation, int dtype, int threads,
                           uintptr_t x, const std::vector<uintptr_t>& results) {
    const LoreLayer layer = lore_layer(sizes, parts, choice, activation, dtype, threads);
    set_for(layer.dtype).lore_forward({layer, at<void>(x), out(results.at(0)), {out(results.at(1)), out(results.at(2))}, {out(results.at(3)), out(results.at(4))}});
  }, Free());
  m.def("lore_backward", [](const Sizes& sizes, const std::vector<uintptr_t>& parts, const std::vector<uintptr_t>& choice, int activation, int dtype, int threads,
                            const std::vector<uintptr_t>& given, const std::vector<uintptr_t>& results) {
    LoreBackward op{};
    op.layer = lore_layer(sizes, parts, choice, activation, dtype, threads);
    op.grad = at<void>(given.at(0)), op.x = at<void>(given.at(1));
    op.grad_x = out(results.at(0)), op.grad_pi = out(results.at(9));
    for (int p = 0; p < 2; p++) {
      op.saved[p] = at<void>(given.at(2 + p)), op.u[p] = at<void>(given.at(4 + p));
      op.gradients[p] = {out(results.at(1 + 4 * p)), out(results.at(2 + 4 * p)), out(results.at(3 + 4 * p)), out(results.at(4 + 4 * p))};
    }
    set_for(op.layer.dtype).lore_backward(op);
  }, Free());
  m.def("sort_by_group", &sort_by_group, Free());
  m.def("gather_rows", &gather_rows, Free());
  m.def("combine_rows", &combine_rows, Free());
  m.def("combine_backward", &combine_backward, Free());
  m.def("route", &route, Free());
  m.def("route_backward", &route_backward, Free());
  m.def("choice_statistics", &choice_statistics, Free());
  decode::define(m, []() -> const InstructionSet& { return *current; });
}
