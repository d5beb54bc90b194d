// Which instruction sets this processor has.
#pragma once

#include <string>

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

inline bool is_emulated(const std::string& set) { return set.rfind("emulated", 0) == 0; }
// Sets with 16-bit products are compiled for bf16 alone, where products are concerned.
inline bool has_pairs(const std::string& set) { return set == "amx" || set == "avx512bf16" || is_emulated(set); }

// Linux gives the tiles' registers to a process that asks for them (arch_prctl, ARCH_REQ_XCOMP_PERM, feature 18).
inline bool has_amx(bool ask_for_tiles) {
#if defined(__x86_64__) && defined(__linux__)
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  const bool tiles = d & (1u << 24), products = d & (1u << 22);
  return tiles && products && (!ask_for_tiles || syscall(SYS_arch_prctl, 0x1023, 18) == 0);
#else
  (void)ask_for_tiles;
  return false;
#endif
}

// `ask_for_tiles`: AMX counts only where Linux gives its registers.
inline bool runs_here(const std::string& set, [[maybe_unused]] bool ask_for_tiles = true) {
  if (set == "generic" || is_emulated(set)) return true;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512dq");
  const bool pairs = avx512 && __builtin_cpu_supports("avx512bf16");
  if (set == "avx2") return avx2;
  if (set == "avx512") return avx512;
  if (set == "avx512bf16") return pairs;
  if (set == "amx") return pairs && has_amx(ask_for_tiles);
#endif
  return false;
}
