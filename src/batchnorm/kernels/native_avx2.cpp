// The loops for AVX2 and FMA. All code compiled here may use these instructions, so only processors that have them may
// run it.
#if defined(__x86_64__) && (!defined(BN_ONLY) || BN_ONLY == 256)
#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif
#define W 32
#define FIND find_avx2
#define WIDEN(halves) _mm256_cvtepu16_epi32((__m128i)(halves))
#include "native_loops.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
