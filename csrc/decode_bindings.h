// Decoding's operations as objects: what does not change from token to token is checked and kept, so that a call passes a few addresses.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "include/operations.h"

namespace decode {

namespace py = pybind11;
using Addresses = std::vector<uintptr_t>;
using Sizes = std::vector<int64_t>;

template <class T>
T* place(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

inline DecodeMatrix matrix(const Addresses& a, int64_t format) { return {place<const void>(a.at(0)), place<const float>(a.at(1)), int(format)}; }

// (scale, shift), [kind, activation], epsilon
inline DecodeInput input(const Addresses& a, const Sizes& n, double epsilon) {
  return {int(n.at(0)), place<const float>(a.at(0)), place<const float>(a.at(1)), epsilon, int(n.at(1))};
}

// [candidates, chosen, sigmoid, normalize], scale, bias
inline DecodeChoice choice(const Sizes& n, double scale, uintptr_t bias) {
  if (n.at(0) < n.at(1) || n.at(1) < 0) throw std::invalid_argument(std::to_string(n.at(1)) + " of " + std::to_string(n.at(0)) + " cannot be chosen");
  return {n.at(0), n.at(1), n.at(2) != 0, n.at(3) != 0, scale, place<const float>(bias)};
}

// Five pairs of addresses: matrix, left, a, b, and (bias, 0).
inline DecodeProjection projection(const Addresses& a, int64_t format) {
  const auto pair = [&](size_t i) { return matrix({a.at(2 * i), a.at(2 * i + 1)}, format); };
  return {pair(0), pair(1), place<const float>(a.at(8)), pair(2), pair(3)};
}

inline void positive(int64_t n, const char* what) {
  if (n < 1) throw std::invalid_argument(std::string("there must be at least one ") + what);
}

struct Linear {
  DecodeLinear op{};
  Linear(const Addresses& weights, const Sizes& sizes, const Addresses& norm, const Sizes& kind, double epsilon) {
    op.matrix = matrix(weights, sizes.at(0)), op.bias = place<const float>(weights.at(2)), op.O = sizes.at(1), op.K = sizes.at(2);
    op.input = input(norm, kind, epsilon);
    positive(op.O, "row"), positive(op.K, "column");
  }
  void run(const InstructionSet& set, uintptr_t x, uintptr_t y, int64_t N, bool add, int threads) const {
    DecodeLinear call = op;
    positive(N, "row of x");
    call.x = place<const float>(x), call.y = place<float>(y), call.N = N, call.add = add, call.threads = threads;
    set.decode_linear(call);
  }
};

struct Experts {
  DecodeExperts op{};
  // sizes: E, D, F, rank, M, Q, format, format of the router, format of the LoREs' router, activation
  Experts(const std::vector<Addresses>& projections, const Sizes& sizes, const std::vector<Addresses>& routers, const std::vector<Sizes>& choices,
          const std::vector<double>& scales, const Addresses& norm, const Sizes& kind) {
    op.E = sizes.at(0), op.D = sizes.at(1), op.F = sizes.at(2), op.rank = sizes.at(3), op.M = sizes.at(4), op.Q = sizes.at(5);
    op.up = projection(projections.at(0), sizes.at(6)), op.gate = projection(projections.at(1), sizes.at(6)), op.down = projection(projections.at(2), sizes.at(6));
    op.router = matrix(routers.at(0), sizes.at(7)), op.lore_router = matrix(routers.at(1), sizes.at(8)), op.activation = int(sizes.at(9));
    op.choice = choice(choices.at(0), scales.at(0), routers.at(0).at(2));
    op.lore_choice = choice(choices.at(1), scales.at(1), 0);
    op.input = input(norm, kind, scales.at(2));
    positive(op.E, "expert"), positive(op.D, "column"), positive(op.F, "hidden number"), positive(op.choice.K, "expert of a row");
    if (op.up.matrix.weight == nullptr || op.down.matrix.weight == nullptr) throw std::invalid_argument("experts need an up- and a down-projection");
  }

  // The choice: every slot exists, and no row names one twice.
  void check(const int64_t* slot, int64_t N) const {
    for (int64_t n = 0; n < N; n++)
      for (int64_t k = 0; k < op.choice.K; k++) {
        const int64_t s = slot[n * op.choice.K + k];
        if (s < 0 || s >= op.E) throw std::invalid_argument("there is no expert " + std::to_string(s) + " among " + std::to_string(op.E));
        for (int64_t before = 0; before < k; before++)
          if (slot[n * op.choice.K + before] == s) throw std::invalid_argument("a row chooses expert " + std::to_string(s) + " twice");
      }
  }

  // places: x, residual, y, expert, weight, slot, lore
  void run(const InstructionSet& set, const Addresses& places, int64_t N, bool choose, bool compute, int threads) const {
    DecodeExperts call = op;
    positive(N, "row of x");
    call.x = place<const float>(places.at(0)), call.residual = place<const float>(places.at(1)), call.y = place<float>(places.at(2));
    call.expert = place<int64_t>(places.at(3)), call.weight = place<float>(places.at(4)), call.slot = place<const int64_t>(places.at(5));
    call.lore = place<int64_t>(places.at(6)), call.N = N, call.choose = choose, call.compute = compute, call.threads = threads;
    if (choose && call.router.weight == nullptr) throw std::invalid_argument("there is no router to choose with");
    if (choose && compute && (op.choice.C > op.E || call.slot != nullptr)) throw std::invalid_argument("slots are given for a choice that was made before");
    if (!choose) check(call.slot == nullptr ? call.expert : call.slot, N);
    set.decode_experts(call);
  }
};

struct Attention {
  DecodeAttention op{};
  // sizes: H, K, d, norm of all heads, turned, window, format
  Attention(const Sizes& sizes, const Addresses& tables, const std::vector<Addresses>& norms, const Sizes& kinds, double epsilon) {
    op.H = sizes.at(0), op.K = sizes.at(1), op.d = sizes.at(2), op.norm_all_heads = sizes.at(3) != 0, op.turned = sizes.at(4), op.window = sizes.at(5);
    op.format = int(sizes.at(6));
    op.cosines = place<const float>(tables.at(0)), op.sines = place<const float>(tables.at(1)), op.slopes = place<const float>(tables.at(2));
    op.query_norm = input(norms.at(0), {kinds.at(0), 0}, epsilon), op.key_norm = input(norms.at(1), {kinds.at(1), 0}, epsilon);
    positive(op.H, "head"), positive(op.K, "key head"), positive(op.d, "number of a head");
    if (op.H % op.K != 0 || op.turned * 2 > op.d) throw std::invalid_argument("query heads must be a multiple of key heads, and at most all numbers turned");
  }

  void run(const InstructionSet& set, uintptr_t fused, uintptr_t y, const Addresses& caches, const Sizes& lengths, int threads) const {
    DecodeAttention call = op;
    const int64_t N = int64_t(lengths.size()) / 2;
    positive(N, "row");
    if (int64_t(caches.size()) != 2 * N) throw std::invalid_argument("every row needs a cache of keys and one of values");
    for (int64_t n = 0; n < N; n++)
      if (lengths[n] < 0 || lengths[n] >= lengths[N + n]) throw std::invalid_argument("a cache of " + std::to_string(lengths[N + n]) + " positions is full");
    std::vector<void*> at;
    for (const uintptr_t cache : caches) at.push_back(place<void>(cache));
    call.fused = place<const float>(fused), call.y = place<float>(y), call.N = N, call.keys = at.data(), call.values = at.data() + N;
    call.length = lengths.data(), call.room = lengths.data() + N, call.threads = threads;
    set.decode_attention(call);
  }
};

// `set`: the instruction set that runs.
template <class Set>
void define(py::module_& m, Set set) {
  py::class_<Linear>(m, "DecodeLinear")
      .def(py::init<const Addresses&, const Sizes&, const Addresses&, const Sizes&, double>())
      .def("run", [set](const Linear& self, uintptr_t x, uintptr_t y, int64_t N, bool add, int threads) { self.run(set(), x, y, N, add, threads); },
           py::call_guard<py::gil_scoped_release>());
  py::class_<Experts>(m, "DecodeExperts")
      .def(py::init<const std::vector<Addresses>&, const Sizes&, const std::vector<Addresses>&, const std::vector<Sizes>&, const std::vector<double>&,
                    const Addresses&, const Sizes&>())
      .def("run", [set](const Experts& self, const Addresses& places, int64_t N, bool choose, bool compute, int threads) {
        self.run(set(), places, N, choose, compute, threads);
      }, py::call_guard<py::gil_scoped_release>());
  py::class_<Attention>(m, "DecodeAttention")
      .def(py::init<const Sizes&, const Addresses&, const std::vector<Addresses>&, const Sizes&, double>())
      .def("run", [set](const Attention& self, uintptr_t fused, uintptr_t y, const Addresses& caches, const Sizes& lengths, int threads) {
        self.run(set(), fused, y, caches, lengths, threads);
      }, py::call_guard<py::gil_scoped_release>());
}

}  // namespace decode
