// What native.cpp and the loops of every instruction set share.
#pragma once

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if !defined(__GNUC__)
#error "batchnorm's native kernels need GCC or Clang"
#endif
#define INLINE inline __attribute__((always_inline))

// Vectors of so many bits are built; a test builds one width alone, with -DBN_ONLY=256.
#if defined(BN_ONLY)
#define BUILT(bits) (BN_ONLY == (bits))
#else
#define BUILT(bits) 1
#endif

namespace batchnorm {

enum Dtype : int64_t { FLOAT32, FLOAT64, BFLOAT16, FLOAT16 };
enum Activation : int { NONE, RELU, LEAKY_RELU, SAID_BY_JOB };
enum Phase : int { START = 1, SUM = 2, PUT = 4 };
constexpr double LEAKY_SLOPE = 0.01;
constexpr int64_t CHANNELS_AT_ONCE = 16;
constexpr int64_t ROWS_HELD = 128;  // positions summed in float before the sums go on in double
constexpr int64_t STRIP_ROWS = 4;   // that a strip goes down; a divisor of those

// One call, as native.py packs it. x, other, dy, out and dresidual share dtype and layout: samples x channels x length,
// or, where rows is 1, samples rows of channels (length 1). mask has a byte for each position. Null stands for absent.
//
// Chunks are virtual batches: so many samples have statistics of their own, the last chunk taking what is left over.
// mean, var and renorm then hold chunks x channels numbers. renorm is that many r, then as many d (Ioffe 2017):
// z = weight * (r * x_hat + d) + bias, both found here from the running statistics, within r_max and d_max, or given.
struct Call {
    int64_t dtype, rows, samples, channels, length, chunks, chunk;
    int64_t weight_dtype, bias_dtype, running_mean_dtype, running_var_dtype;
    int64_t batch_statistics, activation, update_running, unbiased, renorm_given;
    double momentum, eps, r_max, d_max;
    const void *x, *other;  // other: the residual, in backward y where there was one
    const uint8_t *mask;
    const void *dy;
    void *out, *dresidual;
    const void *weight, *bias;
    void *dweight, *dbias;
    double *mean, *var, *renorm;
    void *running_mean, *running_var;
    int64_t *batches, *skipped;  // skipped: batches left out since they are not finite; null where they are not
};

// Numbers of a channel, in the type of the arithmetic, as the loops read them. mean is the shift while sums are taken
// forward. dx = dz * gain - d * slope - level.
template <class A> struct Tables {
    A *mean, *gain, *shift, *slope, *level;
};
struct Job;
struct Unit {
    int64_t c0, c1, p0, p1, rest, split, part;
};
struct Loops {
    void (*sum)(const Job &, const Unit &);
    void (*put)(const Job &, const Unit &);
    // Of channels [c0, c1): ready for forward's sums; ready to be written; what follows from sums, and whether they must
    // be taken again.
    void (*shifts)(const Job &, int64_t c0, int64_t c1) = nullptr;
    void (*moments)(const Job &, int64_t c0, int64_t c1) = nullptr;
    bool (*finish)(const Job &, int64_t c0, int64_t c1) = nullptr;
    // The moments of all chunks together, of n channels, no more than a block, with the variance that is kept.
    void (*pool)(const Call &, const int64_t *counts, int64_t count, int64_t c, int64_t n, double *mean,
                 double *var) = nullptr;
};

struct Job {
    const Call *call;
    double *dweight, *dbias;  // of this call's channels
    Loops loops;
    void (*start)(const Job &, int64_t c0, int64_t c1);
    int phase;
    int64_t count, places;         // values that a channel has; those and what the mask leaves out
    int64_t channels_at_once;      // in a unit of work
    int64_t splits, parts, units;  // parts of the positions; threads; units of work
    int64_t positions, width, widest, repeats;  // of rows: how many, how wide, channels in a unit, positions in a row
    int64_t lead;                  // bytes between what is written and what is asked for meanwhile
    bool fetches;                  // of planes: whether sums ask for the next sample, which no writing has done before
    double *first, *second;        // sums: splits x width
    void *tables, *scratch;
    uint8_t *again, *careful;      // of a channel: whether a better shift is in place; whether floats can't hold it
};
template <class A> INLINE Tables<A> tables(const Job &job) {
    A *at = (A *)job.tables;
    const int64_t n = job.width;
    return {at, at + n, at + 2 * n, at + 3 * n, at + 4 * n};
}
INLINE Unit unit(const Job &job, int64_t index, int64_t part) {
    const int64_t split = index % job.splits, block = index / job.splits, c0 = block * job.channels_at_once;
    const int64_t end = c0 + job.channels_at_once < job.width ? c0 + job.channels_at_once : job.width;
    const int64_t p0 = split * job.positions / job.splits, p1 = (split + 1) * job.positions / job.splits;
    const bool last = job.call->rows && split + 1 == job.splits;
    const int64_t rest = last ? (job.call->samples - job.positions * job.repeats) * job.call->channels : 0;
    return {c0, end, p0, p1, rest, split, part};
}

// The loops for a call, of one instruction set: only for a processor that has it.
Loops find_baseline(const Call &call, bool gradients, bool stream);
Loops find_avx2(const Call &call, bool gradients, bool stream);
Loops find_avx512(const Call &call, bool gradients, bool stream);

// The rest is compiled anew for each instruction set.
namespace {

template <class To, class From> INLINE To cast(From from) {
    static_assert(sizeof(To) == sizeof(From), "a change of type, not of value");
    To to;
    memcpy(&to, &from, sizeof to);
    return to;
}

// A NaN without low bits; of `value == value ? value : NAN` the compiler would leave the value.
INLINE float plain_nan(float value) {
    const uint32_t bits = cast<uint32_t>(value);
    return cast<float>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc00000u : bits);
}
INLINE double plain_nan(double value) { return value; }
// The two halves, converted in integers so that every processor can: Words are vectors of uint32, Floats of float.
template <class Words> INLINE Words pick(Words where, Words yes, Words no) { return (yes & where) | (no & ~where); }
struct BFloat16 {
    uint16_t bits;
    template <class Words, class Floats> static INLINE Words to_float_bits(Words half) { return half << 16; }
    template <class Words> static INLINE Words rounded(Words w) {
        // To nearest, ties to even. A NaN would be lost if its low bits were all set; those met here come from 16 bits
        // or went through `plain_nan`.
        return w + 0x7fffu + ((w >> 16) & 1u);
    }
    template <class Words, class Floats> static INLINE Words from_float_bits(Words w) { return rounded<Words>(w) >> 16; }
};
struct Half {
    uint16_t bits;
    template <class Words, class Floats> static INLINE Words to_float_bits(Words half) {
        const Words shifted = (half & 0x7fffu) << 13;
        const Words finite = cast<Words>(cast<Floats>(shifted) * 0x1p112f);
        const Words special = (Words)((half & 0x7c00u) == 0x7c00u);
        return pick<Words>(special, shifted | 0x7f800000u, finite) | ((half & 0x8000u) << 16);
    }
    template <class Words, class Floats> static INLINE Words from_float_bits(Words w) {
        const Words sign = w & 0x80000000u, size = w ^ sign;
        const Words normal = (size + 0xc8000fffu + ((size >> 13) & 1u)) >> 13;
        const Words subnormal = cast<Words>(cast<Floats>(size) + 0.5f) - 0x3f000000u;
        const Words special = pick<Words>((Words)(size > 0x7f800000u), Words{} + 0x7e00u, Words{} + 0x7c00u);
        Words result = pick<Words>((Words)(size < 0x38800000u), subnormal, normal);
        result = pick<Words>((Words)(size >= 0x47800000u), special, result);
        return result | (sign >> 16);
    }
};
typedef uint32_t Word __attribute__((vector_size(4)));
typedef float Single __attribute__((vector_size(4)));

INLINE double number(float value) { return value; }
INLINE double number(double value) { return value; }
template <class H> INLINE double number(H half) {
    return cast<Single>(H::template to_float_bits<Word, Single>(Word{half.bits}))[0];
}
INLINE void assign(float &to, double value) { to = (float)value; }
INLINE void assign(double &to, double value) { to = value; }
template <class H> INLINE void assign(H &to, double value) {
    to.bits = (uint16_t)H::template from_float_bits<Word, Single>(cast<Word>(Single{plain_nan((float)value)}))[0];
}

template <class T> struct ArithmeticOf { using type = float; };
template <> struct ArithmeticOf<double> { using type = double; };
template <class T> using Arithmetic = typename ArithmeticOf<T>::type;

}  // namespace
}  // namespace batchnorm
