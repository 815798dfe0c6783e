// The numbers per channel, between the loops over values: sums become moments and gradients, which fill the tables that
// the loops read. They are computed for a block of channels at a time, so that the compiler can use vectors, and compiled
// with the loops for each instruction set: otherwise, in a batch of few rows, they would take as long as the values.
#pragma once

#include "native.h"

namespace batchnorm {
namespace {

constexpr int64_t BLOCK = 64;
#define NOINLINE __attribute__((noinline))  // less code: for a small batch little of it is in the cache
#define CHANNELWISE _Pragma("omp simd") for (int64_t i = 0; i < n; ++i)

template <class T> INLINE void read_as(const void *from, int64_t c, int64_t n, double *to) {
    CHANNELWISE to[i] = to_double(((const T *)from)[c + i]);
}
NOINLINE inline void read(const void *from, int64_t dtype, int64_t c, int64_t n, double otherwise, double *to) {
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

// The computation value by value, in double.
template <class T> struct ScalarLoops {
    const Call &call;
    int64_t offset(int64_t position, int64_t c) const {
        if (call.rows) return position * call.channels + c;
        return (position / call.length * call.channels + c) * call.length + position % call.length;
    }
    int64_t positions() const { return call.samples * call.length; }
    bool counts(int64_t position) const { return !call.mask || call.mask[position]; }
    double at(const void *from, int64_t position, int64_t c) const { return to_double(((const T *)from)[offset(position, c)]); }

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
            assign(((T *)call.out)[offset(p, c)], counts(p) ? z : 0);
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
            if (call.out) assign(((T *)call.out)[offset(p, c)], counts(p) ? dx : 0);
            if (call.dresidual) assign(((T *)call.dresidual)[offset(p, c)], dz);
        }
    }
};

struct Channels {
    // inverse: 1 / sqrt(var + eps); z = (x - mean) * gain + shift
    double mean[BLOCK], inverse[BLOCK], gain[BLOCK], shift[BLOCK], r[BLOCK], d[BLOCK];
};
NOINLINE inline void read_channels(const Call &call, int64_t c, int64_t n, Channels &ch) {
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
// Compute the r and d of batch renormalization.
INLINE void renorm_correction(const Call &call, int64_t c, int64_t n) {
    double mean[BLOCK], var[BLOCK];
    read(call.running_mean, call.running_mean_dtype, c, n, 0, mean);
    read(call.running_var, call.running_var_dtype, c, n, 1, var);
    CHANNELWISE {
        const double sigma = sqrt(var[i] + call.eps), delta = (call.mean[c + i] - mean[i]) / sigma;
        call.renorm[c + i] = clamp(sqrt(call.var[c + i] + call.eps) / sigma, 1 / call.r_max, call.r_max);
        call.renorm[call.chunks * call.channels + c + i] = clamp(delta, -call.d_max, call.d_max);
    }
}
// This and the conditions below have no branches, so that they are vectorized.
INLINE bool is_finite(double value) { return fabs(value) < INFINITY; }
INLINE bool fits_float(double factor) {
    return (factor == 0) | ((fabs(factor) < 1e37) & (fabs(factor) > 1e-37));
}
INLINE bool has_finite_moments(const Channels &ch, int64_t i) { return is_finite(ch.mean[i]) & is_finite(ch.inverse[i]); }

// Fill the tables for a block; the mean becomes a rounded mean and a rest, which goes into the shift. A row of several
// positions has each channel as many times.
template <class A> INLINE void repeat(const Job &job, A *table, int64_t c, int64_t n) {
    for (int64_t at = c + job.call->channels; at < job.width; at += job.call->channels)
        memcpy(table + at, table + c, n * sizeof(A));
}
template <class A> NOINLINE void fill_tables(const Job &job, int64_t c, int64_t n, const Channels &ch) {
    const Tables<A> t = tables<A>(job);
    CHANNELWISE {
        const A rounded = canonical_nan((A)ch.mean[i]);
        t.mean[c + i] = rounded;
        t.gain[c + i] = canonical_nan((A)ch.gain[i]);
        t.shift[c + i] = canonical_nan((A)(ch.shift[i] - ch.gain[i] * (ch.mean[i] - (double)rounded)));
    }
    A *const all[] = {t.mean, t.gain, t.shift};
    for (A *table : all) repeat(job, table, c, n);
}
// Fill the tables of the terms that backward subtracts because the statistics are the batch's.
template <class A>
NOINLINE void fill_tables(const Job &job, int64_t c, int64_t n, const Channels &ch, const double *slope, const double *level) {
    const Tables<A> t = tables<A>(job);
    CHANNELWISE {
        t.slope[c + i] = canonical_nan((A)slope[i]);
        t.level[c + i] = canonical_nan((A)(level[i] - slope[i] * (ch.mean[i] - (double)t.mean[c + i])));
    }
    repeat(job, t.slope, c, n);
    repeat(job, t.level, c, n);
}
NOINLINE inline void sums_of(const Job &job, int64_t c, int64_t n, double *first, double *second) {
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
// Apply a function to channels [c0, c1) in blocks; columns beyond the channels repeat them, and are skipped.
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
// Mark the channels whose numbers do not fit a float. They are rare, and bytes beside doubles are not vectorized, so it
// is first tested whether there is any.
template <class A, class Condition> INLINE void mark(uint8_t *use_double, int64_t n, Condition condition) {
    if (sizeof(A) != sizeof(float) || !any(n, condition)) return;
    for (int64_t i = 0; i < n; ++i) use_double[i] |= condition(i);
}
template <class T> void prepare_store(const Job &job, int64_t c0, int64_t c1) {
    using A = Arithmetic<T>;
    in_blocks(job, c0, c1, [&](int64_t c, int64_t n) {
        Channels ch;
        read_channels(*job.call, c, n, ch);
        memset(job.use_double + c, 0, n);
        mark<A>(job.use_double + c, n, [&](int64_t i) {
            return has_finite_moments(ch, i) & !(fits_float(ch.gain[i]) & (fabs(ch.mean[i]) < 1e37));
        });
        fill_tables<A>(job, c, n, ch);
    });
}
// Choose the shift that forward subtracts before it sums: a value of the batch, plus the mean distance of 8 probes from
// it. For a constant channel it is that constant.
template <class T> void prepare_sums(const Job &job, int64_t c0, int64_t c1) {
    using A = Arithmetic<T>;
    constexpr int64_t probes = 8;
    const Call &call = *job.call;
    const ScalarLoops<T> scalar{call};
    int64_t at[probes], found = 0, first = 0;
    while (first < job.count_with_padding && !scalar.counts(first)) ++first;
    for (int64_t i = 0; i < probes; ++i) {
        const int64_t sample = i * call.samples / probes, in_sample = i * call.length / probes;
        const int64_t position = i ? sample * call.length + in_sample : first;
        if (position < job.count_with_padding && scalar.counts(position)) at[found++] = scalar.offset(position, 0);
    }
    const int64_t step = call.rows ? 1 : call.length;
    A *means = tables<A>(job).mean;
    in_blocks(job, c0, c1, [&](int64_t c, int64_t n) {
        const T *x = (const T *)call.x + c * step;
        A base[BLOCK] = {}, sum[BLOCK] = {};
        const auto probe = [&](int64_t step) __attribute__((always_inline)) {
            CHANNELWISE base[i] = found ? (A)to_double(x[at[0] + i * step]) : 0;
            for (int64_t j = 1; j < found; ++j)
                CHANNELWISE sum[i] += (A)to_double(x[at[j] + i * step]) - base[i];
        };
        if (call.rows) probe(1);
        else probe(call.length);
        CHANNELWISE means[c + i] = base[i] + sum[i] / probes;
        repeat(job, means, c, n);
        memset(job.second_pass + c, 0, n);
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
            const double delta = first[i] * share, found = second[i] * share - delta * delta;
            mean[i] = (double)means[c + i] + delta;
            var[i] = found < 0 ? 0 : found;
        }
        const auto odd = [&](int64_t i) {
            return (may_be_tiny & (second[i] < m * 1e-30)) | !(is_finite(first[i]) & is_finite(second[i]));
        };
        const auto far = [&](int64_t i) {
            const double delta = first[i] * share;
            return delta * delta > 8 * (second[i] * share - delta * delta);
        };
        if (!any(n, [&](int64_t i) { return odd(i) | far(i); })) return;
        for (int64_t i = 0; i < n; ++i) {
            if (odd(i)) {
                ScalarLoops<T>{call}.moments(c + i, m, mean[i], var[i]);
            } else if (far(i) && !job.second_pass[c + i]) {
                job.second_pass[c + i] = 1;
                repeated = true;
            }
        }
    });
    if (repeated) {
        in_blocks(job, c0, c1, [&](int64_t c, int64_t n) {
            CHANNELWISE means[c + i] = is_finite(call.mean[c + i]) ? (A)call.mean[c + i] : means[c + i];
            repeat(job, means, c, n);
        });
        return true;
    }
    if (call.renorm && !call.renorm_given)
        in_blocks(job, c0, c1, [&](int64_t c, int64_t n) { renorm_correction(call, c, n); });
    prepare_store<T>(job, c0, c1);
    return false;
}
template <class T> bool finish_backward(const Job &job, int64_t c0, int64_t c1) {
    using A = Arithmetic<T>;
    const Call &call = *job.call;
    const double share = 1 / (double)(job.count > 0 ? job.count : 1);
    in_blocks(job, c0, c1, [&](int64_t c, int64_t n) {
        Channels ch;
        double dbias[BLOCK], products[BLOCK], slope[BLOCK], level[BLOCK];
        read_channels(call, c, n, ch);
        sums_of(job, c, n, dbias, products);
        CHANNELWISE products[i] -= (ch.mean[i] - (double)(A)ch.mean[i]) * dbias[i];  // the sums used the rounded mean
        mark<A>(job.use_double + c, n, [&](int64_t i) {
            return has_finite_moments(ch, i) & !(is_finite(dbias[i]) & is_finite(products[i]));
        });
        for (int64_t i = any(job.use_double + c, n) ? 0 : n; i < n; ++i)
            if (job.use_double[c + i])
                ScalarLoops<T>{call}.sums(c + i, ch.mean[i], ch.gain[i], ch.shift[i], dbias[i], products[i]);
        CHANNELWISE {
            const double projection = ch.inverse[i] * products[i];  // sum of dz * x_hat
            slope[i] = ch.gain[i] * ch.inverse[i] * projection * share;
            level[i] = ch.gain[i] * dbias[i] * share;
            job.dweight[c + i] = ch.r[i] * projection + ch.d[i] * dbias[i];
            job.dbias[c + i] = dbias[i];
        }
        mark<A>(job.use_double + c, n, [&](int64_t i) {  // a tiny factor matters only to values that are as large
            return has_finite_moments(ch, i) & ((fabs(slope[i]) > 1e37) | (ch.inverse[i] < 1e-12)) & !fits_float(slope[i]);
        });
        fill_tables<A>(job, c, n, ch, slope, level);
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
        const double in_chunk = (double)counts[j], *means = call.mean + j * call.channels + c;
        CHANNELWISE sum[i] += in_chunk * (means[i] - mean[i]);
    }
    CHANNELWISE mean[i] += sum[i] * share;
    for (int64_t j = 0; j < call.chunks; ++j) {
        if (counts[j] == 0) continue;
        const double in_chunk = (double)counts[j], *means = call.mean + j * call.channels + c;
        const double *vars = call.var + j * call.channels + c;
        CHANNELWISE {
            const double delta = means[i] - mean[i];
            squares[i] += in_chunk * (vars[i] + delta * delta);
        }
    }
    CHANNELWISE var[i] = squares[i] * share * unbiased;
}

}  // namespace
}  // namespace batchnorm
