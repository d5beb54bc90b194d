// Every operation in every instruction set: an operation is named here once. csrc/build.py compiles each cpu.cpp once for each set.
#pragma once

#include "../adam/op.h"
#include "../attention/op.h"
#include "../decode_attention/op.h"
#include "../decode_experts/op.h"
#include "../decode_linear/op.h"
#include "../grouped_gemm/op.h"
#include "../grouped_lore/op.h"
#include "../linear_cross_entropy/op.h"
#include "../permute/op.h"
#include "../rms_norm/op.h"
#include "../route/op.h"

// (name, result, arguments)
#define NEOX_OPERATIONS(X)                                                                  \
  X(grouped_matmul, void, (const GroupedMatmul&))                                           \
  X(grouped_outer, void, (const GroupedOuter&))                                             \
  X(lore_forward, void, (const LoreForward&))                                               \
  X(lore_backward, void, (const LoreBackward&))                                             \
  X(sort_by_group, Sorted, (const SortByGroup&))                                            \
  X(gather_rows, int64_t, (const GatherRows&))                                              \
  X(combine_rows, int64_t, (const CombineRows&))                                            \
  X(combine_backward, int64_t, (const CombineBackward&))                                    \
  X(route, int64_t, (const Route&))                                                         \
  X(route_backward, void, (const RouteBackward&))                                           \
  X(choice_statistics, bool, (ChoiceStatistics&))                                           \
  X(attention_forward, void, (const attention::Problem&))                                   \
  X(attention_backward, void, (const attention::Problem&, const attention::Gradients&))     \
  X(gradient_norm, double, (const adam::Gradients&, int))                                   \
  X(adam_update, void, (const adam::Update&, int))                                          \
  X(linear_cross_entropy, void, (const LinearCrossEntropy&))                                \
  X(rms_norm_forward, void, (const RmsNormForward&))                                        \
  X(rms_norm_backward, void, (const RmsNormBackward&))                                      \
  X(decode_linear, void, (const DecodeLinear&))                                             \
  X(decode_experts, void, (const DecodeExperts&))                                           \
  X(decode_attention, void, (const DecodeAttention&))

// The sets that are compiled, best last, the emulated ones at the end. csrc/build.py passes them.
#if !defined(NEOX_SETS)
#define NEOX_SETS(X) X(generic)
#endif

struct InstructionSet {
  const char* name;
#define NEOX_POINTER(name, result, arguments) result(*name) arguments;
  NEOX_OPERATIONS(NEOX_POINTER)
#undef NEOX_POINTER
};

#define NEOX_FUNCTION(name, result, arguments) result name arguments;
#define NEOX_ADDRESS(name, result, arguments) &name,
#define NEOX_SET(set)                                                                    \
  namespace set {                                                                        \
  NEOX_OPERATIONS(NEOX_FUNCTION)                                                         \
  inline InstructionSet operations() { return {#set, NEOX_OPERATIONS(NEOX_ADDRESS)}; }   \
  }
NEOX_SETS(NEOX_SET)
#define NEOX_ROW(set) set::operations(),
inline const InstructionSet SETS[] = {NEOX_SETS(NEOX_ROW)};
#undef NEOX_FUNCTION
#undef NEOX_ADDRESS
#undef NEOX_SET
#undef NEOX_ROW
