// The loops for any processor of the architecture.
#include "native.h"

#if BUILT(128)
#if defined(__x86_64__)
#include <emmintrin.h>
#define GENERIC_ONLY  // no specialized loops, because nearly every x86-64 processor has AVX2
#endif
#define W 16
#define FIND find_baseline
#include "native_loops.h"
#endif
