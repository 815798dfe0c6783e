// The loops for AVX-512 as of Skylake. All code compiled here may use these instructions, so only processors that have
// them may run it.
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
// Move bfloat16 values to the upper halves of 32 bits and back by one permutation, instead of a conversion and a shift.
// The masked forms are used because GCC warns about an uninitialized operand in the others.
#define UPPER _mm512_set_epi16(15, 15, 14, 14, 13, 13, 12, 12, 11, 11, 10, 10, 9, 9, 8, 8, \
                               7, 7, 6, 6, 5, 5, 4, 4, 3, 3, 2, 2, 1, 1, 0, 0)
#define ODD _mm512_set_epi16(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, \
                             31, 29, 27, 25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1)
#define WIDEN_UP(halves) _mm512_maskz_permutexvar_epi16(0xaaaaaaaa, UPPER, _mm512_castsi256_si512((__m256i)(halves)))
#define NARROW_UP(words) \
    _mm512_maskz_extracti64x4_epi64(0xff, _mm512_maskz_permutexvar_epi16(0xffffffff, ODD, (__m512i)(words)), 0)
#include "native_loops.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
