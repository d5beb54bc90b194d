// The instruction sets that the operations are compiled for, best last. csrc/build.py compiles each cpu.cpp once for each name.
#pragma once

#if defined(NEOX_FAST)  // one set, for whoever works on the kernels
#define NEOX_REAL_SETS(X) X(avx2)
#elif defined(__x86_64__)
#define NEOX_REAL_SETS(X) X(generic) X(avx2) X(avx512) X(avx512bf16) X(amx)
#else
#define NEOX_REAL_SETS(X) X(generic)
#endif
// Written out in C++, for tests of what surrounds the instructions; compiled on request.
#if defined(NEOX_WITH_EMULATED)
#define NEOX_SETS(X) NEOX_REAL_SETS(X) X(emulated_avx512bf16) X(emulated_amx)
#else
#define NEOX_SETS(X) NEOX_REAL_SETS(X)
#endif
