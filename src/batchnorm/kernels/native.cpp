// Batch normalization on CPU behind a plain C interface: pointers and sizes in, a status out. It knows neither Python
// nor torch, and borrows its threads from whoever calls bn_use_threads. The formulas are those of reference.py.
//
// Statistics are double: mean, biased variance. Values are centred before they are squared: on a shift taken from the
// batch in the first pass, and where that turns out far from the mean, in a second one on the mean. Float loops subtract
// the mean rounded to float; what the rounding left goes into the numbers of the channel, as in reference.py. A channel
// whose sums, variance or factors do not fit a float (values near 1e30, subnormal ones) is computed again, carefully:
// in double, value by value.

#include "native.h"

#define API extern "C" __attribute__((visibility("default")))

namespace batchnorm {
namespace {

struct Set {
    const char *name;
    Loops (*find)(const Call &, bool gradients, bool stream);
};
Set best_set() {
#if defined(__x86_64__)
    __builtin_cpu_init();
#if BUILT(512)
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl"))
        return {"AVX-512", find_avx512};
#endif
#if BUILT(256)
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return {"AVX2", find_avx2};
#endif
#endif
#if !BUILT(128)
    abort();
#elif defined(__x86_64__)
    return {"SSE2", find_baseline};
#elif defined(__aarch64__)
    return {"NEON", find_baseline};
#else
    return {"generic vectors", find_baseline};
#endif
}
const Set set = best_set();  // when the library is loaded: no two threads meet here

// Threads, lent by the caller: torch_parallel_for and torch_get_num_threads of torch's stable C interface.
typedef void (*Work)(int64_t begin, int64_t end, void *job);
typedef int32_t (*ParallelFor)(int64_t begin, int64_t end, int64_t grain, Work work, void *argument);
typedef int32_t (*CountThreads)(uint32_t *threads);
ParallelFor parallel_for = nullptr;
CountThreads count_threads = nullptr;

int64_t threads() {
    uint32_t n = 1;
    return parallel_for && count_threads && count_threads(&n) == 0 && n > 0 ? n : 1;
}
// What a thread is called with.
void work(int64_t begin, int64_t end, void *argument) {
    const Job &job = *(const Job *)argument;
    for (int64_t part = begin; part < end; ++part) {
        for (int64_t i = part * job.units / job.parts; i < (part + 1) * job.units / job.parts; ++i) {
            const Unit u = unit(job, i, part);
            const bool whole = job.phase & START;  // a unit with all positions of its channels ends what it begins
            if (whole) job.start(job, u.c0, u.c1);
            if (job.phase & SUM)
                do job.loops.sum(job, u);
                while (whole && job.finish(job, u.c0, u.c1));
            if (job.phase & PUT) job.loops.put(job, u);
        }
    }
}
void run(Job &job, int phase) {
    job.phase = phase;
    // Where the threads fail the work is done here: every unit gives the same when it is done twice.
    if (job.parts < 2 || parallel_for(0, job.parts, 1, work, &job) != 0) work(0, job.parts, &job);
}

INLINE double parameter(const void *from, int64_t dtype, int64_t i, double otherwise) {
    if (!from) return otherwise;
    switch (dtype) {
    case FLOAT64: return ((const double *)from)[i];
    case BFLOAT16: return number(((const BFloat16 *)from)[i]);
    case FLOAT16: return number(((const Half *)from)[i]);
    default: return ((const float *)from)[i];
    }
}
INLINE void set_parameter(void *to, int64_t dtype, int64_t i, double value) {
    if (!to) return;
    switch (dtype) {
    case FLOAT64: return assign(((double *)to)[i], value);
    case BFLOAT16: return assign(((BFloat16 *)to)[i], value);
    case FLOAT16: return assign(((Half *)to)[i], value);
    default: return assign(((float *)to)[i], value);
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

struct Channel {
    double mean, inverse, gain, shift, r, d;  // inverse: 1 / sqrt(var + eps); shift is for x - mean
};
INLINE Channel channel(const Call &call, int64_t c) {
    const double inverse = 1 / sqrt(call.var[c] + call.eps), weight = parameter(call.weight, call.weight_dtype, c, 1);
    const double r = call.renorm ? call.renorm[c] : 1, d = call.renorm ? call.renorm[call.chunks * call.channels + c] : 0;
    return {call.mean[c], inverse, inverse * weight * r, parameter(call.bias, call.bias_dtype, c, 0) + weight * d, r, d};
}
double clamp(double value, double low, double high) { return value < low ? low : value > high ? high : value; }
// Batch renormalization: how far the batch is from the running statistics.
void renormalise(const Call &call, int64_t c) {
    const double sigma = sqrt(parameter(call.running_var, call.running_var_dtype, c, 1) + call.eps);
    const double away = (call.mean[c] - parameter(call.running_mean, call.running_mean_dtype, c, 0)) / sigma;
    call.renorm[c] = clamp(sqrt(call.var[c] + call.eps) / sigma, 1 / call.r_max, call.r_max);
    call.renorm[call.chunks * call.channels + c] = clamp(away, -call.d_max, call.d_max);
}
bool fits(double factor) { return factor == 0 || (fabs(factor) < 1e37 && fabs(factor) > 1e-37); }
bool finite(const Channel &ch) { return isfinite(ch.mean) && isfinite(ch.inverse); }

// The tables of a channel; the mean is split in two there. Rows hold a channel as often as they hold positions.
template <class A> INLINE void fill(const Job &job, int64_t c, double mean, double gain, double shift, double slope, double level) {
    const Tables<A> t = tables<A>(job);
    const A rounded = plain_nan((A)mean);
    const double rest = mean - (double)rounded;
    for (int64_t i = c; i < job.width; i += job.call->channels) {
        t.mean[i] = rounded;
        t.gain[i] = plain_nan((A)gain);
        t.shift[i] = plain_nan((A)(shift - gain * rest));
        t.slope[i] = plain_nan((A)slope);
        t.level[i] = plain_nan((A)(level - slope * rest));
    }
}
INLINE void sums_of(const Job &job, int64_t c, double &first, double &second) {
    first = second = 0;
    for (int64_t split = 0; split < job.splits; ++split)
        for (int64_t i = split * job.width + c; i < (split + 1) * job.width; i += job.call->channels) {
            first += job.first[i];
            second += job.second[i];
        }
}

template <class T> void with_moments(const Job &job, int64_t c0, int64_t c1) {
    using A = Arithmetic<T>;
    for (int64_t c = c0; c < c1 && c < job.call->channels; ++c) {
        const Channel ch = channel(*job.call, c);
        const bool small = sizeof(A) == sizeof(float);
        job.careful[c] = small && finite(ch) && !(fits(ch.gain) && fabs(ch.mean) < 1e37);
        fill<A>(job, c, ch.mean, ch.gain, ch.shift, 0, 0);
    }
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
    const T *x = (const T *)call.x;
    A *means = tables<A>(job).mean;
    for (int64_t c = c0; c < c1 && c < call.channels; ++c) {
        const int64_t offset = call.rows ? c : c * call.length;
        const double base = found ? number(x[at[0] + offset]) : 0;
        double sum = 0;
        for (int64_t i = 1; i < found; ++i) sum += number(x[at[i] + offset]) - base;
        const A shift = (A)(base + sum / looks);
        for (int64_t i = c; i < job.width; i += call.channels) means[i] = shift;
        job.again[c] = 0;
    }
}
template <class T> bool finish_forward(const Job &job, int64_t c0, int64_t c1) {
    using A = Arithmetic<T>;
    const Call &call = *job.call;
    const double m = (double)(job.count > 0 ? job.count : 1), share = 1 / m;
    bool any = false;
    for (int64_t c = c0; c < c1 && c < call.channels; ++c) {
        const Tables<A> t = tables<A>(job);
        double first, second;
        sums_of(job, c, first, second);
        const double away = first * share, var = second * share - away * away;
        const bool tiny = sizeof(A) == sizeof(float) && second < m * 1e-30 && call.eps < 1e-20;
        if (!isfinite(first) || !isfinite(second) || tiny) {
            Slow<T>{call}.moments(c, m, call.mean[c], call.var[c]);
            continue;
        }
        if (!job.again[c] && away * away > 8 * var) {
            job.again[c] = 1;
            any = true;
        }
        call.mean[c] = (double)t.mean[c] + away;
        call.var[c] = var > 0 ? var : var == var ? 0 : var;
    }
    if (any) {
        for (int64_t c = c0; c < c1 && c < call.channels; ++c)
            if (isfinite(call.mean[c]))
                for (int64_t i = c; i < job.width; i += call.channels) tables<A>(job).mean[i] = (A)call.mean[c];
        return true;
    }
    if (call.renorm && !call.renorm_given)
        for (int64_t c = c0; c < c1 && c < call.channels; ++c) renormalise(call, c);
    with_moments<T>(job, c0, c1);
    return false;
}
template <class T> bool finish_backward(const Job &job, int64_t c0, int64_t c1) {
    using A = Arithmetic<T>;
    const Call &call = *job.call;
    const double m = (double)(job.count > 0 ? job.count : 1);
    for (int64_t c = c0; c < c1 && c < call.channels; ++c) {
        const Channel ch = channel(call, c);
        double dbias, products;
        sums_of(job, c, dbias, products);
        products -= (ch.mean - (double)(A)ch.mean) * dbias;  // they were taken with the rounded mean
        if (sizeof(A) == sizeof(float) && finite(ch) && (job.careful[c] || !isfinite(dbias) || !isfinite(products))) {
            job.careful[c] = 1;
            Slow<T>{call}.sums(c, ch.mean, ch.gain, ch.shift, dbias, products);
        }
        const double projection = ch.inverse * products;  // sum of dz * x_hat
        const double slope = ch.gain * ch.inverse * projection / m, level = ch.gain * dbias / m;
        // A tiny factor matters only to values that are as large.
        const bool matters = fabs(slope) > 1e37 || ch.inverse < 1e-12;
        if (sizeof(A) == sizeof(float) && finite(ch) && matters && !fits(slope)) job.careful[c] = 1;
        fill<A>(job, c, ch.mean, ch.gain, ch.shift, call.batch_statistics ? slope : 0, call.batch_statistics ? level : 0);
        job.dweight[c] = ch.r * projection + ch.d * dbias;
        job.dbias[c] = dbias;
    }
    return false;
}

// How the work is divided. A channel is best summed and then written by one thread, while it is in that thread's cache;
// where channels are too few, or what they hold too much, positions are divided, and sums merged.
constexpr int64_t VALUES_PER_THREAD = 96 << 10;    // below, waking a thread costs more than it brings
constexpr int64_t RUN_BYTES = 2048;                // memory read in one go
constexpr int64_t ROW_BYTES = 2048;                // of one row, where a position's channels take less
constexpr int64_t CACHE_BYTES = 512 << 10;         // of a core
constexpr int64_t STREAM_BYTES = 8 << 20;          // outputs that would drive everything else out of the cache
constexpr int64_t STREAM_RUN_BYTES = 1024;         // shorter runs have too many lines that are not written whole

int64_t at_least(int64_t a, int64_t b) { return a > b ? a : b; }
int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }

int64_t worth(int64_t values) { return at_least(1, at_most(threads(), values / VALUES_PER_THREAD)); }
void divide(Job &job, int64_t size, int64_t tensors_read, int64_t workers) {
    const Call &call = *job.call;
    const int64_t positions = call.samples * call.length, channels = call.channels;
    job.positions = positions;
    job.width = channels;
    job.repeats = 1;
    job.splits = 1;
    if (!call.rows) {
        const int64_t fill_run = at_least(1, RUN_BYTES / (call.length * size));
        const int64_t share = at_least(1, channels / (4 * workers));
        job.channels_at_once = at_most(at_most(fill_run, share), CHANNELS_AT_ONCE);
        if (channels < 4 * workers && channels % workers) job.splits = workers;
    } else {
        const int64_t columns = CACHE_BYTES / (positions * size * tensors_read) / 64 * 64;
        const bool fits_whole = positions * channels * size * tensors_read <= CACHE_BYTES && workers == 1;
        if (columns >= 64 && !fits_whole && channels >= 64 * workers) {
            job.channels_at_once = at_most(columns, (channels / workers + 63) / 64 * 64);
        } else {
            if (2 * channels * size <= ROW_BYTES && !call.mask) {
                const int64_t repeats = ROW_BYTES / (channels * size);
                job.repeats = channels % 16 ? (repeats + 15) / 16 * 16 : repeats;
                if (job.repeats * 8 * workers > positions) job.repeats = 1;
            }
            job.positions = positions / job.repeats;
            job.channels_at_once = job.width = channels * job.repeats;
            job.splits = workers;
        }
    }
    job.widest = at_most(job.channels_at_once, job.width);
    job.units = (job.width + job.channels_at_once - 1) / job.channels_at_once * job.splits;
    job.parts = at_most(workers, job.units);
}
bool aligned(const void *pointer, int64_t to) { return (intptr_t)pointer % to == 0; }
bool streams(const Job &job, int64_t size) {
    const Call &call = *job.call;
    // Of a chunk that fits the cache y would drive out what comes after it all the same.
    if (!call.out || call.chunks * call.samples * call.channels * call.length * size < STREAM_BYTES) return false;
    if (call.dresidual && ((intptr_t)call.dresidual - (intptr_t)call.out) % 64 != 0) return false;
    if (!call.rows) return call.length * size >= STREAM_RUN_BYTES;
    return aligned(call.out, 64) && job.width * size % 64 == 0 && job.channels_at_once * size % 64 == 0;
}

// What is one batch to the statistics. Where it is backward, sums has room for dweight and dbias of every channel.
template <class T>
bool compute_batch(const Call &call, bool gradients, double *sums_of_gradients, int64_t workers, int64_t &count) {
    using A = Arithmetic<T>;
    const int64_t size = sizeof(T), channels = call.channels, positions = call.samples * call.length;
    Job job = {};
    job.call = &call;
    job.dweight = sums_of_gradients;
    job.dbias = sums_of_gradients + channels;
    job.count = job.places = positions;
    if (call.mask) {
        job.count = 0;
        for (int64_t p = 0; p < positions; ++p) job.count += call.mask[p] != 0;
    }
    count = job.count;
    if (channels == 0) return true;
    if (!gradients && !call.batch_statistics)
        for (int64_t c = 0; c < channels; ++c) {
            call.mean[c] = parameter(call.running_mean, call.running_mean_dtype, c, 0);
            call.var[c] = parameter(call.running_var, call.running_var_dtype, c, 1);
        }
    if (positions == 0) {
        for (int64_t c = 0; c < channels; ++c) {
            if (gradients) job.dweight[c] = job.dbias[c] = 0;
            else if (call.batch_statistics) call.mean[c] = call.var[c] = 0;
            if (!gradients && call.renorm && !call.renorm_given) renormalise(call, c);
        }
        return true;
    }
    divide(job, size, gradients ? 2 : 1, workers);

    const int64_t numbers = job.splits * job.width * 2 * sizeof(double), tables = 5 * job.width * sizeof(A);
    const int64_t scratch = job.parts * 2 * job.widest * sizeof(A);
    char *memory = (char *)malloc(numbers + tables + scratch + 2 * channels);
    if (!memory) return false;
    job.first = (double *)memory;
    job.second = job.first + job.splits * job.width;
    job.tables = memory + numbers;
    job.scratch = memory + numbers + tables;
    job.again = (uint8_t *)memory + numbers + tables + scratch;
    job.careful = job.again + channels;

    const bool stream = streams(job, size);
    const bool sums = gradients ? call.batch_statistics || call.dweight || call.dbias : call.batch_statistics;
    const int put = call.out || call.dresidual ? PUT : 0;
    job.loops = set.find(call, gradients, stream);
    job.start = sums && !gradients ? with_shifts<T> : with_moments<T>;
    job.finish = gradients ? finish_backward<T> : finish_forward<T>;
    if (job.splits == 1 && put) {
        run(job, START | (sums ? SUM : 0) | put);
    } else {
        job.start(job, 0, channels);
        if (sums)
            do run(job, SUM);
            while (job.finish(job, 0, channels));
        if (put) run(job, put);
    }

    for (int64_t c = 0; c < channels; ++c) {
        if (!job.careful[c] || !put) continue;
        const Slow<T> slow{call};
        const Channel ch = channel(call, c);
        if (!gradients) {
            slow.forward(c, ch.mean, ch.gain, ch.shift);
        } else {
            double dbias = 0, products = 0;
            if (call.batch_statistics) slow.sums(c, ch.mean, ch.gain, ch.shift, dbias, products);
            const double m = (double)at_least(job.count, 1);
            slow.backward(c, ch.mean, ch.gain, ch.shift, ch.gain * ch.inverse * ch.inverse * products / m,
                          ch.gain * dbias / m);
        }
    }
    free(memory);
    return true;
}

// The part of a call that is a virtual batch.
template <class T> Call chunk_of(const Call &call, int64_t i) {
    Call part = call;
    const int64_t from = i * call.chunk, to = i + 1 < call.chunks ? from + call.chunk : call.samples;
    const int64_t values = from * call.channels * call.length;
    const auto past = [values](const void *at) { return at ? (T *)at + values : nullptr; };
    part.samples = to - from;
    part.x = past(call.x);
    part.other = past(call.other);
    part.dy = past(call.dy);
    part.out = past(call.out);
    part.dresidual = past(call.dresidual);
    if (call.mask) part.mask = call.mask + from * call.length;
    part.mean = call.mean + i * call.channels;
    part.var = call.var + i * call.channels;
    if (call.renorm) part.renorm = call.renorm + i * call.channels;
    return part;
}
struct Chunks {
    const Call *call;
    bool gradients;
    double *sums;     // 2 x channels a chunk
    int64_t *counts;  // values that a channel has in each chunk
    bool *done;
};
template <class T> void compute_chunk(const Chunks &all, int64_t i, int64_t workers) {
    const Call part = chunk_of<T>(*all.call, i);
    all.done[i] = compute_batch<T>(part, all.gradients, all.sums + 2 * i * part.channels, workers, all.counts[i]);
}
template <class T> void compute_chunks(int64_t begin, int64_t end, void *argument) {
    const Chunks &all = *(const Chunks *)argument;
    for (int64_t i = begin; i < end; ++i)
        compute_chunk<T>(all, i, 1);
}

INLINE bool holds(int64_t dtype, double value) { return isfinite(dtype == FLOAT64 ? value : (float)value); }

// Running statistics take a part of the batch's: momentum of it, or where that is below 0 one over the batches so far.
// A batch of one value has no unbiased variance, and one of none no mean: neither moves anything. Where skipped is
// given, a batch with a channel that is not finite moves nothing in any.
void update(const Call &call, const int64_t *counts) {
    int64_t count = 0;
    for (int64_t i = 0; i < call.chunks; ++i) count += counts[i];
    const double share = 1 / (double)at_least(count, 1);
    const double unbiased = call.biased ? 1 : (double)count / (double)at_least(count - 1, 1);
    // The moments of all chunks together.
    const auto pooled = [&](int64_t c, double &mean, double &var) {
        mean = call.mean[c];
        var = call.var[c] * unbiased;
        if (call.chunks == 1) return;
        double sum = 0, squares = 0;
        for (int64_t i = 0; i < call.chunks; ++i) sum += (double)counts[i] * (call.mean[i * call.channels + c] - mean);
        mean += sum * share;
        for (int64_t i = 0; i < call.chunks; ++i) {
            const double away = call.mean[i * call.channels + c] - mean;
            if (counts[i]) squares += (double)counts[i] * (call.var[i * call.channels + c] + away * away);
        }
        var = squares * share * unbiased;
    };
    double mean, var;
    for (int64_t c = 0; call.skipped && c < call.channels; ++c) {
        pooled(c, mean, var);
        if (holds(call.running_mean_dtype, mean) && holds(call.running_var_dtype, var)) continue;
        ++*call.skipped;
        return;
    }
    if (call.batches) ++*call.batches;
    if (count < 2) return;
    const double weight = call.momentum < 0 ? 1.0 / (double)at_least(call.batches ? *call.batches : 1, 1) : call.momentum;
    for (int64_t c = 0; c < call.channels; ++c) {
        const double old_mean = parameter(call.running_mean, call.running_mean_dtype, c, 0);
        const double old_var = parameter(call.running_var, call.running_var_dtype, c, 0);
        pooled(c, mean, var);
        set_parameter(call.running_mean, call.running_mean_dtype, c, weight * mean + (1 - weight) * old_mean);
        set_parameter(call.running_var, call.running_var_dtype, c, weight * var + (1 - weight) * old_var);
    }
}

template <class T> int32_t compute(const Call &call, bool gradients) {
    const int64_t chunks = call.chunks, numbers = gradients ? 2 * chunks * call.channels : 0;
    const int64_t values = call.samples * call.channels * call.length;
    char *memory = (char *)malloc(numbers * sizeof(double) + chunks * (sizeof(int64_t) + sizeof(bool)));
    if (!memory) return 1;
    int64_t *counts = (int64_t *)memory + numbers;
    Chunks all = {&call, gradients, (double *)memory, counts, (bool *)(counts + chunks)};
    const int64_t workers = worth(values), workers_of_chunk = worth(values / chunks);
    // Threads wait for each other once where each takes chunks of its own, else in every chunk.
    const bool even = chunks >= 4 * workers || chunks % workers == 0;
    if (workers == 1 || chunks == 1 || (workers_of_chunk == workers && !even)) {
        for (int64_t i = 0; i < chunks; ++i) compute_chunk<T>(all, i, workers);
    } else if (parallel_for(0, chunks, (chunks + workers - 1) / workers, compute_chunks<T>, &all) != 0) {
        compute_chunks<T>(0, chunks, &all);  // the threads failed
    }
    bool done = true;
    for (int64_t i = 0; i < chunks; ++i) done = done && all.done[i];
    if (done && gradients) {
        for (int64_t c = 0; c < call.channels; ++c) {
            double dweight = 0, dbias = 0;
            for (int64_t i = 0; i < chunks; ++i) {
                dweight += all.sums[2 * i * call.channels + c];
                dbias += all.sums[(2 * i + 1) * call.channels + c];
            }
            set_parameter(call.dweight, call.weight_dtype, c, dweight);
            set_parameter(call.dbias, call.bias_dtype, c, dbias);
        }
    } else if (done && call.moving) {
        update(call, all.counts);
    }
    free(memory);
    return done ? 0 : 1;
}
int32_t compute(const Call &call, bool gradients) {
    switch (call.dtype) {
    case FLOAT64: return compute<double>(call, gradients);
    case BFLOAT16: return compute<BFloat16>(call, gradients);
    case FLOAT16: return compute<Half>(call, gradients);
    default: return compute<float>(call, gradients);
    }
}

}  // namespace
}  // namespace batchnorm

using namespace batchnorm;

// Changes whenever Call does: native.py refuses a library of another number.
API int32_t bn_abi() { return 2; }
API const char *bn_instructions() { return set.name; }
API void bn_use_threads(ParallelFor run_parallel, CountThreads count) {
    parallel_for = run_parallel;
    count_threads = count;
}
// y, and in training the moments and the running statistics. 0, or 1 where memory for a few numbers a channel is lacking.
API int32_t bn_forward(const Call *call) { return compute(*call, false); }
// dx, dweight, dbias and dresidual.
API int32_t bn_backward(const Call *call) { return compute(*call, true); }
