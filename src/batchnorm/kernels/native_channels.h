// The numbers of channels, between the loops over values: from sums to moments and gradients, and into the tables that the
// loops read. They are taken a block of channels at a time, so that the compiler can use vectors, and are compiled with the
// loops for each instruction set: of a batch of few rows they would else take as long as the values.
#pragma once

#include "native.h"

namespace batchnorm {
namespace {

constexpr int64_t BLOCK = 64;
#define SHARED __attribute__((noinline))  // a small batch finds little of its code in the cache
#define CHANNELWISE _Pragma("omp simd") for (int64_t i = 0; i < n; ++i)

template <class T> INLINE void read_as(const void *from, int64_t c, int64_t n, double *to) {
    CHANNELWISE to[i] = number(((const T *)from)[c + i]);
}
SHARED inline void read(const void *from, int64_t dtype, int64_t c, int64_t n, double otherwise, double *to) {
    if (!from) {
        CHANNELWISE to[i] = otherwise;
        return;
    }
    switch (dtype) {
    case FLOAT64: return read_as<double>(from, c, n, to);
    case BFLOAT16: return read_as<BFloat16>(from, c, n, to);
    case FLOAT16: return read_as<Half>(from, c, n, to);
    default: return read_as<float>(from, c, n, to);
    }
}
template <class T> INLINE void write_as(void *to, int64_t c, int64_t n, const double *values) {
    CHANNELWISE assign(((T *)to)[c + i], values[i]);
}
INLINE void write(void *to, int64_t dtype, int64_t c, int64_t n, const double *values) {
    if (!to) return;
    switch (dtype) {
    case FLOAT64: return write_as<double>(to, c, n, values);
    case BFLOAT16: return write_as<BFloat16>(to, c, n, values);
    case FLOAT16: return write_as<Half>(to, c, n, values);
    default: return write_as<float>(to, c, n, values);
    }
}

// Value by value, in double.
template <class T> struct Slow {
    const Call &call;
    int64_t place(int64_t position, int64_t c) const {
        if (call.rows) return position * call.channels + c;
        return (position / call.length * call.channels + c) * call.length + position % call.length;
    }
    int64_t positions() const { return call.samples * call.length; }
    bool counts(int64_t position) const { return !call.mask || call.mask[position]; }
    double at(const void *from, int64_t position, int64_t c) const { return number(((const T *)from)[place(position, c)]); }

    void moments(int64_t c, double count, double &mean, double &var) const {
        double sum = 0, squares = 0, rest = 0;
        for (int64_t p = 0; p < positions(); ++p)
            if (counts(p)) sum += at(call.x, p, c);
        mean = sum / count;
        for (int64_t p = 0; p < positions(); ++p) {
            if (!counts(p)) continue;
            const double d = at(call.x, p, c) - mean;
            rest += d;
            squares += d * d;
        }
        var = squares / count - (rest / count) * (rest / count);
        if (isfinite(rest)) mean += rest / count;
    }
    double argument(int64_t p, int64_t c, double mean, double gain, double shift) const {
        return (at(call.x, p, c) - mean) * gain + shift;
    }
    void forward(int64_t c, double mean, double gain, double shift) const {
        for (int64_t p = 0; p < positions(); ++p) {
            double z = argument(p, c, mean, gain, shift);
            if (call.other) z += at(call.other, p, c);
            if (call.activation != NONE && z < 0) z = call.activation == RELU ? 0 : z * LEAKY_SLOPE;
            assign(((T *)call.out)[place(p, c)], counts(p) ? z : 0);
        }
    }
    double gradient(int64_t p, int64_t c, double mean, double gain, double shift) const {
        const double dy = at(call.dy, p, c);
        if (call.activation == NONE) return dy;
        const double z = call.other ? at(call.other, p, c) : argument(p, c, mean, gain, shift);
        return z > 0 ? dy : call.activation == RELU ? 0 : dy * LEAKY_SLOPE;
    }
    void sums(int64_t c, double mean, double gain, double shift, double &dbias, double &products) const {
        dbias = products = 0;
        for (int64_t p = 0; p < positions(); ++p) {
            if (!counts(p)) continue;
            const double dz = gradient(p, c, mean, gain, shift);
            dbias += dz;
            products += dz * (at(call.x, p, c) - mean);
        }
    }
    void backward(int64_t c, double mean, double gain, double shift, double slope, double level) const {
        for (int64_t p = 0; p < positions(); ++p) {
            const double dz = counts(p) ? gradient(p, c, mean, gain, shift) : 0;
            double dx = dz * gain;
            if (call.batch_statistics) dx -= (at(call.x, p, c) - mean) * slope + level;
            if (call.out) assign(((T *)call.out)[place(p, c)], counts(p) ? dx : 0);
            if (call.dresidual) assign(((T *)call.dresidual)[place(p, c)], dz);
        }
    }
};

struct Channels {
    // inverse: 1 / sqrt(var + eps); shift is for x - mean
    double mean[BLOCK], inverse[BLOCK], gain[BLOCK], shift[BLOCK], r[BLOCK], d[BLOCK];
};
SHARED inline void of_block(const Call &call, int64_t c, int64_t n, Channels &ch) {
    double weight[BLOCK];
    read(call.weight, call.weight_dtype, c, n, 1, weight);
    read(call.bias, call.bias_dtype, c, n, 0, ch.shift);
    read(call.renorm, FLOAT64, c, n, 1, ch.r);
    read(call.renorm, FLOAT64, call.chunks * call.channels + c, n, 0, ch.d);
    CHANNELWISE {
        ch.mean[i] = call.mean[c + i];
        ch.inverse[i] = 1 / sqrt(call.var[c + i] + call.eps);
        ch.gain[i] = ch.inverse[i] * weight[i] * ch.r[i];
        ch.shift[i] += weight[i] * ch.d[i];
    }
}
INLINE double clamp(double value, double low, double high) { return value < low ? low : value > high ? high : value; }
// Batch renormalization: how far the batch is from the running statistics.
INLINE void renormalise(const Call &call, int64_t c, int64_t n) {
    double mean[BLOCK], var[BLOCK];
    read(call.running_mean, call.running_mean_dtype, c, n, 0, mean);
    read(call.running_var, call.running_var_dtype, c, n, 1, var);
    CHANNELWISE {
        const double sigma = sqrt(var[i] + call.eps), away = (call.mean[c + i] - mean[i]) / sigma;
        call.renorm[c + i] = clamp(sqrt(call.var[c + i] + call.eps) / sigma, 1 / call.r_max, call.r_max);
        call.renorm[call.chunks * call.channels + c + i] = clamp(away, -call.d_max, call.d_max);
    }
}
// Without branches, as are the conditions below: so they are vectors too.
INLINE bool bounded(double value) { return fabs(value) < INFINITY; }
INLINE bool fits(double factor) {
    return (factor == 0) | ((fabs(factor) < 1e37) & (fabs(factor) > 1e-37));
}
INLINE bool finite(const Channels &ch, int64_t i) { return bounded(ch.mean[i]) & bounded(ch.inverse[i]); }

// The tables of a block; the mean is split in two there. Rows hold a channel as often as they hold positions.
template <class A> INLINE void repeat(const Job &job, A *table, int64_t c, int64_t n) {
    for (int64_t at = c + job.call->channels; at < job.width; at += job.call->channels)
        memcpy(table + at, table + c, n * sizeof(A));
}
template <class A> SHARED void fill(const Job &job, int64_t c, int64_t n, const Channels &ch) {
    const Tables<A> t = tables<A>(job);
    CHANNELWISE {
        const A rounded = plain_nan((A)ch.mean[i]);
        t.mean[c + i] = rounded;
        t.gain[c + i] = plain_nan((A)ch.gain[i]);
        t.shift[c + i] = plain_nan((A)(ch.shift[i] - ch.gain[i] * (ch.mean[i] - (double)rounded)));
    }
    A *const all[] = {t.mean, t.gain, t.shift};
    for (A *table : all) repeat(job, table, c, n);
}
// What backward subtracts: of the batch's statistics.
template <class A>
SHARED void fill(const Job &job, int64_t c, int64_t n, const Channels &ch, const double *slope, const double *level) {
    const Tables<A> t = tables<A>(job);
    CHANNELWISE {
        t.slope[c + i] = plain_nan((A)slope[i]);
        t.level[c + i] = plain_nan((A)(level[i] - slope[i] * (ch.mean[i] - (double)t.mean[c + i])));
    }
    repeat(job, t.slope, c, n);
    repeat(job, t.level, c, n);
}
SHARED inline void sums_of(const Job &job, int64_t c, int64_t n, double *first, double *second) {
    CHANNELWISE {
        first[i] = job.first[c + i];
        second[i] = job.second[c + i];
    }
    for (int64_t at = c + job.call->channels; at < job.splits * job.width; at += job.call->channels)
        CHANNELWISE {
            first[i] += job.first[at + i];
            second[i] += job.second[at + i];
        }
}
// Channels [c0, c1), of which a row of several positions has more than there are.
template <class Each> INLINE void in_blocks(const Job &job, int64_t c0, int64_t c1, Each each) {
    const int64_t end = c1 < job.call->channels ? c1 : job.call->channels;
    for (int64_t c = c0; c < end; c += BLOCK) each(c, end - c < BLOCK ? end - c : BLOCK);
}

INLINE bool any(const uint8_t *of, int64_t n) { return memchr(of, 1, n) != nullptr; }
template <class Condition> INLINE bool any(int64_t n, Condition condition) {
    double found[BLOCK], sum = 0;
    CHANNELWISE found[i] = condition(i) ? 1 : 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; ++i) sum += found[i];
    return sum > 0;
}
// Channels that floats can't hold. They are rare, and bytes no vectors beside doubles, so first it is asked whether any is.
template <class A, class Condition> INLINE void mark(uint8_t *careful, int64_t n, Condition condition) {
    if (sizeof(A) != sizeof(float) || !any(n, condition)) return;
    for (int64_t i = 0; i < n; ++i) careful[i] |= condition(i);
}
template <class T> void with_moments(const Job &job, int64_t c0, int64_t c1) {
    using A = Arithmetic<T>;
    in_blocks(job, c0, c1, [&](int64_t c, int64_t n) {
        Channels ch;
        of_block(*job.call, c, n, ch);
        memset(job.careful + c, 0, n);
        mark<A>(job.careful + c, n, [&](int64_t i) {
            return finite(ch, i) & !(fits(ch.gain[i]) & (fabs(ch.mean[i]) < 1e37));
        });
        fill<A>(job, c, n, ch);
    });
}
// The shift that forward sums are taken about: a value of the batch plus how far 8 are from it in the mean. Of a
// constant it is that constant.
template <class T> void with_shifts(const Job &job, int64_t c0, int64_t c1) {
    using A = Arithmetic<T>;
    constexpr int64_t looks = 8;
    const Call &call = *job.call;
    const Slow<T> slow{call};
    int64_t at[looks], found = 0, first = 0;
    while (first < job.places && !slow.counts(first)) ++first;
    for (int64_t i = 0; i < looks; ++i) {
        const int64_t sample = i * call.samples / looks, place = i * call.length / looks;
        const int64_t position = i ? sample * call.length + place : first;
        if (position < job.places && slow.counts(position)) at[found++] = slow.place(position, 0);
    }
    const int64_t step = call.rows ? 1 : call.length;
    A *means = tables<A>(job).mean;
    in_blocks(job, c0, c1, [&](int64_t c, int64_t n) {
        const T *x = (const T *)call.x + c * step;
        A base[BLOCK] = {}, sum[BLOCK] = {};
        const auto look = [&](int64_t step) __attribute__((always_inline)) {
            CHANNELWISE base[i] = found ? (A)number(x[at[0] + i * step]) : 0;
            for (int64_t j = 1; j < found; ++j)
                CHANNELWISE sum[i] += (A)number(x[at[j] + i * step]) - base[i];
        };
        if (call.rows) look(1);
        else look(call.length);
        CHANNELWISE means[c + i] = base[i] + sum[i] / looks;
        repeat(job, means, c, n);
        memset(job.again + c, 0, n);
    });
}
template <class T> bool finish_forward(const Job &job, int64_t c0, int64_t c1) {
    using A = Arithmetic<T>;
    const Call &call = *job.call;
    const double m = (double)(job.count > 0 ? job.count : 1), share = 1 / m;
    const bool may_be_tiny = sizeof(A) == sizeof(float) && call.eps < 1e-20;
    A *means = tables<A>(job).mean;
    bool repeated = false;
    in_blocks(job, c0, c1, [&](int64_t c, int64_t n) {
        double first[BLOCK], second[BLOCK], *const mean = call.mean + c, *const var = call.var + c;
        sums_of(job, c, n, first, second);
        CHANNELWISE {
            const double away = first[i] * share, found = second[i] * share - away * away;
            mean[i] = (double)means[c + i] + away;
            var[i] = found < 0 ? 0 : found;
        }
        const auto odd = [&](int64_t i) {
            return (may_be_tiny & (second[i] < m * 1e-30)) | !(bounded(first[i]) & bounded(second[i]));
        };
        const auto far = [&](int64_t i) {
            const double away = first[i] * share;
            return away * away > 8 * (second[i] * share - away * away);
        };
        if (!any(n, [&](int64_t i) { return odd(i) | far(i); })) return;
        for (int64_t i = 0; i < n; ++i) {
            if (odd(i)) {
                Slow<T>{call}.moments(c + i, m, mean[i], var[i]);
            } else if (far(i) && !job.again[c + i]) {
                job.again[c + i] = 1;
                repeated = true;
            }
        }
    });
    if (repeated) {
        in_blocks(job, c0, c1, [&](int64_t c, int64_t n) {
            CHANNELWISE means[c + i] = bounded(call.mean[c + i]) ? (A)call.mean[c + i] : means[c + i];
            repeat(job, means, c, n);
        });
        return true;
    }
    if (call.renorm && !call.renorm_given)
        in_blocks(job, c0, c1, [&](int64_t c, int64_t n) { renormalise(call, c, n); });
    with_moments<T>(job, c0, c1);
    return false;
}
template <class T> bool finish_backward(const Job &job, int64_t c0, int64_t c1) {
    using A = Arithmetic<T>;
    const Call &call = *job.call;
    const double share = 1 / (double)(job.count > 0 ? job.count : 1);
    in_blocks(job, c0, c1, [&](int64_t c, int64_t n) {
        Channels ch;
        double dbias[BLOCK], products[BLOCK], slope[BLOCK], level[BLOCK];
        of_block(call, c, n, ch);
        sums_of(job, c, n, dbias, products);
        CHANNELWISE products[i] -= (ch.mean[i] - (double)(A)ch.mean[i]) * dbias[i];  // they were taken with the rounded mean
        mark<A>(job.careful + c, n, [&](int64_t i) {
            return finite(ch, i) & !(bounded(dbias[i]) & bounded(products[i]));
        });
        for (int64_t i = any(job.careful + c, n) ? 0 : n; i < n; ++i)
            if (job.careful[c + i]) Slow<T>{call}.sums(c + i, ch.mean[i], ch.gain[i], ch.shift[i], dbias[i], products[i]);
        CHANNELWISE {
            const double projection = ch.inverse[i] * products[i];  // sum of dz * x_hat
            slope[i] = ch.gain[i] * ch.inverse[i] * projection * share;
            level[i] = ch.gain[i] * dbias[i] * share;
            job.dweight[c + i] = ch.r[i] * projection + ch.d[i] * dbias[i];
            job.dbias[c + i] = dbias[i];
        }
        mark<A>(job.careful + c, n, [&](int64_t i) {  // a tiny factor matters only to values that are as large
            return finite(ch, i) & ((fabs(slope[i]) > 1e37) | (ch.inverse[i] < 1e-12)) & !fits(slope[i]);
        });
        fill<A>(job, c, n, ch, slope, level);
    });
    return false;
}

inline void pool(const Call &call, const int64_t *counts, int64_t count, int64_t c, int64_t n, double *mean, double *var) {
    const double unbiased = call.unbiased ? (double)count / (double)(count > 1 ? count - 1 : 1) : 1;
    CHANNELWISE {
        mean[i] = call.mean[c + i];
        var[i] = call.var[c + i] * unbiased;
    }
    if (call.chunks == 1) return;
    const double share = 1 / (double)(count > 0 ? count : 1);
    double sum[BLOCK] = {}, squares[BLOCK] = {};
    for (int64_t j = 0; j < call.chunks; ++j) {
        const double held = (double)counts[j], *means = call.mean + j * call.channels + c;
        CHANNELWISE sum[i] += held * (means[i] - mean[i]);
    }
    CHANNELWISE mean[i] += sum[i] * share;
    for (int64_t j = 0; j < call.chunks; ++j) {
        if (counts[j] == 0) continue;
        const double held = (double)counts[j], *means = call.mean + j * call.channels + c;
        const double *vars = call.var + j * call.channels + c;
        CHANNELWISE {
            const double away = means[i] - mean[i];
            squares[i] += held * (vars[i] + away * away);
        }
    }
    CHANNELWISE var[i] = squares[i] * share * unbiased;
}

}  // namespace
}  // namespace batchnorm
