// Shared by native.cpp and the loops of every instruction set.
#pragma once

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if !defined(__GNUC__)
#error "batchnorm's native kernels need GCC or Clang"
#endif
#define INLINE inline __attribute__((always_inline))

// Whether vectors of this width in bits are built; a test builds a single width, with -DBN_ONLY=256.
#if defined(BN_ONLY)
#define BUILT(bits) (BN_ONLY == (bits))
#else
#define BUILT(bits) 1
#endif

namespace batchnorm {

enum Dtype : int64_t { FLOAT32, FLOAT64, BFLOAT16, FLOAT16 };
enum Activation : int { NONE, RELU, LEAKY_RELU, RUNTIME };
enum Phase : int { START = 1, SUM = 2, STORE = 4 };
constexpr double LEAKY_SLOPE = 0.01;
constexpr int64_t CHANNELS_AT_ONCE = 16;
constexpr int64_t ROWS_PER_SUM = 128;  // rows summed in float before the sums are added up in double
constexpr int64_t STRIP_ROWS = 4;      // rows in a strip; a divisor of ROWS_PER_SUM

// One call, as call.py packs it: constants first, then pointers; null stands for an absent tensor. x, other, dy, out and
// dresidual share dtype and layout: samples x channels x length, or, where rows is 1, `samples` rows of channels (length
// 1). mask has one byte per position.
//
// Chunks are virtual batches: each has `chunk` samples with statistics of their own, and the last takes the samples that
// are left. mean, var and renorm then have chunks x channels numbers. renorm is r, then d, of batch renormalization
// (Ioffe 2017): z = weight * (r * x_hat + d) + bias. Unless renorm_given, r and d are computed here from the running
// statistics, within r_max and d_max. A negative momentum stands for the cumulative mean.
struct Call {
    int64_t dtype, rows, samples, channels, length, chunks, chunk;
    int64_t weight_dtype, bias_dtype, running_mean_dtype, running_var_dtype;
    int64_t batch_statistics, activation, update_running, unbiased, renorm_given;
    double momentum, eps, r_max, d_max;
    const void *x, *other;  // other: the residual; in backward y, where there was a residual
    const uint8_t *mask;
    const void *dy;
    void *out, *dresidual;
    const void *weight, *bias;
    void *dweight, *dbias;
    double *mean, *var, *renorm;
    void *running_mean, *running_var;
    int64_t *batches, *skipped;  // skipped: count of non-finite batches, which update nothing; if null they do
};

// The numbers per channel that the loops read, in the type of the arithmetic. While forward sums, mean is the shift that
// is subtracted. In backward dx = dz * gain - d * slope - level.
template <class A> struct Tables {
    A *mean, *gain, *shift, *slope, *level;
};
struct Job;
struct Unit {
    int64_t c0, c1, p0, p1, remainder, split, part;
};
struct Loops {
    void (*sum)(const Job &, const Unit &);
    void (*store)(const Job &, const Unit &);
    // For channels [c0, c1): fill the tables for forward's sums; fill them for storing; turn sums into moments or
    // gradients, and return whether a second pass of sums is needed.
    void (*prepare_sums)(const Job &, int64_t c0, int64_t c1) = nullptr;
    void (*prepare_store)(const Job &, int64_t c0, int64_t c1) = nullptr;
    bool (*finish)(const Job &, int64_t c0, int64_t c1) = nullptr;
    // Pool the moments of all chunks, for n channels (at most a block), with the kind of variance that is kept.
    void (*pool)(const Call &, const int64_t *counts, int64_t count, int64_t c, int64_t n, double *mean,
                 double *var) = nullptr;
};

struct Job {
    const Call *call;
    double *dweight, *dbias;  // one number per channel
    Loops loops;
    void (*start)(const Job &, int64_t c0, int64_t c1);
    int phase;
    int64_t count, count_with_padding;  // values per channel, without and with those that the mask leaves out
    int64_t channels_at_once;           // in a unit of work
    int64_t splits, parts, units;       // parts of the positions; threads; units of work
    int64_t positions, width, widest, repeats;  // rows: their number, width, channels per unit, positions per row
    int64_t prefetch_bytes;             // distance from a line that is written to the line that is prefetched with it
    bool prefetches;                    // planes: whether sums prefetch the next sample, as no store has done it
    double *first, *second;             // sums: splits x width
    void *tables, *scratch;
    uint8_t *second_pass;  // per channel: whether sums are taken a second time, about a better shift
    uint8_t *use_double;   // per channel: whether its numbers do not fit a float
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
    const int64_t remainder = last ? (job.call->samples - job.positions * job.repeats) * job.call->channels : 0;
    return {c0, end, p0, p1, remainder, split, part};
}

// Return the loops of one instruction set for a call. They run only on a processor that has it.
Loops find_baseline(const Call &call, bool gradients, bool stream);
Loops find_avx2(const Call &call, bool gradients, bool stream);
Loops find_avx512(const Call &call, bool gradients, bool stream);

// The rest is compiled once for each instruction set.
namespace {

template <class To, class From> INLINE To cast(From from) {
    static_assert(sizeof(To) == sizeof(From), "a change of type, not of value");
    To to;
    memcpy(&to, &from, sizeof to);
    return to;
}

// Clear the low bits of a NaN. The compiler would reduce `value == value ? value : NAN` to the value.
INLINE float canonical_nan(float value) {
    const uint32_t bits = cast<uint32_t>(value);
    return cast<float>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc00000u : bits);
}
INLINE double canonical_nan(double value) { return value; }
// The two 16-bit types, converted by integer operations, which every processor has. Words are vectors of uint32, Floats
// of float.
template <class Words> INLINE Words pick(Words where, Words yes, Words no) { return (yes & where) | (no & ~where); }
struct BFloat16 {
    uint16_t bits;
    template <class Words, class Floats> static INLINE Words to_float_bits(Words half) { return half << 16; }
    template <class Words> static INLINE Words rounded(Words w) {
        // Round to nearest, ties to even. A NaN whose low bits are all set would overflow; here every NaN comes from 16
        // bits or from `canonical_nan`.
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

INLINE double to_double(float value) { return value; }
INLINE double to_double(double value) { return value; }
template <class H> INLINE double to_double(H half) {
    return cast<Single>(H::template to_float_bits<Word, Single>(Word{half.bits}))[0];
}
INLINE void assign(float &to, double value) { to = (float)value; }
INLINE void assign(double &to, double value) { to = value; }
template <class H> INLINE void assign(H &to, double value) {
    to.bits = (uint16_t)H::template from_float_bits<Word, Single>(cast<Word>(Single{canonical_nan((float)value)}))[0];
}

template <class T> struct ArithmeticOf { using type = float; };
template <> struct ArithmeticOf<double> { using type = double; };
template <class T> using Arithmetic = typename ArithmeticOf<T>::type;

}  // namespace
}  // namespace batchnorm
