// The loops for AVX-512 as of Skylake. Whatever is compiled here may use it, and so must not be called elsewhere.
#if defined(__x86_64__) && (!defined(BN_ONLY) || BN_ONLY == 512)
#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma,prefer-vector-width=512")
#endif
#define W 64
#define FIND find_avx512
#define WIDEN(halves) _mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)(halves))
#include "native_loops.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
