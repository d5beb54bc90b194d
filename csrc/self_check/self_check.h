// One instruction set against the set `generic`, on small inputs and without Python.
#pragma once

#include <string>

#include "../include/dtype.h"
#include "../include/operations.h"

namespace self_check {

struct Tally {
  int passed = 0, failed = 0;
  double worst = 0;   // difference, relative to the largest number of its result
  std::string first;  // what failed first
};

struct Format {
  Dtype dtype;
  const char* name;
  double bound;
};
constexpr Format FORMATS[] = {{Dtype::bfloat16, "bf16", 2e-2}, {Dtype::float32, "float", 1e-5}, {Dtype::float64, "double", 1e-13}};

// Every operation that `ours` computes in this format. `quick`: a few sizes instead of all.
Tally compare_sets(const InstructionSet& right, const InstructionSet& ours, const Format& format, bool quick);

// What `ours` computes differently from `generic` in a quick comparison; empty: nothing. It runs in a process of its own, so a crash is a difference.
std::string difference(const InstructionSet& ours);

}  // namespace self_check
